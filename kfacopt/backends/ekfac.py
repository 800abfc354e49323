"""EKFAC: a Kronecker eigenbasis a layer, with the curvature's own second moments along it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfacopt.backends.base import Settings
from kfacopt.backends.checks import check_exponent, check_widest
from kfacopt.backends.layerwise import LayerwiseBackend
from kfacopt.blocks import Block, CorrectedEigenBlock, DiagonalBlock, PartialEigenBlock
from kfacopt.blocks.sides import WIDEST, Diagonals
from kfacopt.blocks.storage import Storage
from kfacopt.layers.layer import Layer
from kfacopt.schedules import EKFAC_REFRESH_EVERY, FACTOR_EVERY, Interval, Timetable, as_interval


class FullEKFACBackend(LayerwiseBackend):
    """Amortised eigenbasis, corrected eigenvalues updated with every batch of rows (George et al. 2018).

    Args:
        factor_every: Steps between two updates of the factors and of the corrected eigenvalues.
        refresh_every: Steps between two eigendecompositions of a layer's factors.
        refine_every: Steps between two warm-started QR steps that keep the basis fresh in between; None: never.
        stagger: Spread the layers' refreshes over the interval.
        widest: Inputs or outputs up to which there is an eigenbasis; of more (a vocabulary's) the corrected eigenvalues
            are along the inputs or outputs themselves.
        storage: How Kronecker factors are kept, `kfacopt.blocks.Storage()` in half of the memory.
    """

    all_places = True

    def __init__(
        self,
        factor_every: Interval = FACTOR_EVERY,
        refresh_every: Interval = EKFAC_REFRESH_EVERY,
        refine_every: Interval | None = None,
        stagger: bool = True,
        widest: int = WIDEST,
        storage: Storage | None = None,
    ) -> None:
        super().__init__(factor_every, refresh_every, stagger, storage)
        self._widest = check_widest(widest)
        refine = None if refine_every is None else as_interval("refine_every", refine_every)
        self._refinements = None if refine is None else Timetable(refine, stagger)

    def make_block(self, layer: Layer) -> Block:
        elementwise = layer.handler.structure == "elementwise"
        return DiagonalBlock() if elementwise else CorrectedEigenBlock(diagonals=Diagonals.of(layer, self._widest))

    def refresh(self, step: int, settings: Mapping[Layer, Settings]) -> None:
        super().refresh(step, settings)
        if self._refinements is None:
            return
        fresh = set(self._refreshes.done_at(step))
        # What is under way will be brought into a basis from the present one.
        idle = {name: self.blocks[name] for name in self._idle(self.blocks)}
        able = [n for n, block in idle.items() if isinstance(block, CorrectedEigenBlock) and block.ready]
        due = self._refinements.due(step, able)
        self._by_owners([name for name in due if name not in fresh], _refine)
        self._refinements.done(step, due)

    def state_dict(self) -> dict[str, Any]:
        refinements = None if self._refinements is None else self._refinements.state_dict()
        return super().state_dict() | {"refinements": refinements}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self._refinements is not None and state["refinements"] is not None:
            self._refinements.load_state_dict(state["refinements"])


def _refine(name: str, block: Block) -> None:
    assert isinstance(block, CorrectedEigenBlock)
    block.refine()


class EKFACBackend(LayerwiseBackend):
    """EKFAC in the eigenvectors that matter: cheaper than KFAC where the factors' spectra are steep.

    Eigenvectors whose eigenvalue is at most `tail` times the factor's mean are not rotated into; they share the mean of
    their eigenvalues (`kfacopt.blocks.PartialEigenBlock`). Layers that cannot be cut (grouped convolutions, embeddings,
    layers with a side beyond `widest`, and any side of at most 64) keep everything. `FullEKFACBackend` cuts nothing.

    Args:
        factor_every: Steps between two updates of the factors and of the corrected eigenvalues.
        refresh_every: Steps between two eigendecompositions of a layer's factors.
        tail: Multiple of the mean eigenvalue up to which eigenvectors are cut.
        exponent: Power of the damped curvature to divide by: 1 is the natural gradient; 1/2 scales as Adam and Shampoo
            do, which serves where the noise of the gradient outweighs it (small batches of a language model).
        stagger: Spread the layers' refreshes over the interval.
        widest: Inputs or outputs up to which there is an eigenbasis; of more (a vocabulary's) the corrected eigenvalues
            are along the inputs or outputs themselves.
        storage: How Kronecker factors are kept, `kfacopt.blocks.Storage()` in half of the memory.
    """

    all_places = True

    def __init__(
        self,
        factor_every: Interval = FACTOR_EVERY,
        refresh_every: Interval = EKFAC_REFRESH_EVERY,
        tail: float = 0.3,
        exponent: float = 1.0,
        stagger: bool = True,
        widest: int = WIDEST,
        storage: Storage | None = None,
    ) -> None:
        super().__init__(factor_every, refresh_every, stagger, storage)
        if not 0.0 < tail < 1.0:
            raise ValueError(f"tail must lie between 0 and 1, got {tail}; FullEKFACBackend cuts nothing")
        self._tail, self._exponent, self._widest = tail, check_exponent(exponent), check_widest(widest)
        self.newton = exponent == 1.0

    def make_block(self, layer: Layer) -> Block:
        if layer.handler.structure == "elementwise":
            return DiagonalBlock()
        diagonals = Diagonals.of(layer, self._widest)
        cuttable = len(layer.shape) == 2 and not any(diagonals)
        if cuttable:
            return PartialEigenBlock(self._tail, self._exponent)
        return CorrectedEigenBlock(self._exponent, diagonals)
