"""KFAC: one Kronecker product a layer."""

from __future__ import annotations

from kfacopt.backends.checks import check_exponent, check_widest
from kfacopt.backends.layerwise import LayerwiseBackend
from kfacopt.blocks import Block, DiagonalBlock, EigenBlock, KroneckerBlock, OutputBlock
from kfacopt.blocks.sides import WIDEST, Diagonals
from kfacopt.blocks.storage import Storage
from kfacopt.layers.layer import Layer
from kfacopt.schedules import FACTOR_EVERY, KFAC_REFRESH_EVERY, Interval


class KFACBackend(LayerwiseBackend):
    """Kronecker factors inverted by Cholesky with the π-split of the damping (Martens & Grosse 2015).

    Args:
        factor_every: Steps between two updates of the Kronecker factors.
        refresh_every: Steps between two inversions.
        exponent: Power of the damped factors to divide by: 1 is the natural gradient, 1/2 scales as Shampoo does
            (Gupta et al. 2018). Normalisation layers keep 1.
        stagger: Spread the layers' inversions over the interval.
        widest: Inputs or outputs up to which a factor is a whole matrix; of more (a vocabulary's) it is its diagonal.
        storage: How Kronecker factors are kept, `kfacopt.blocks.Storage()` in half of the memory.
    """

    def __init__(
        self,
        factor_every: Interval = FACTOR_EVERY,
        refresh_every: Interval = KFAC_REFRESH_EVERY,
        exponent: float = 1.0,
        stagger: bool = True,
        widest: int = WIDEST,
        storage: Storage | None = None,
    ) -> None:
        super().__init__(factor_every, refresh_every, stagger, storage)
        self._exponent, self._widest = check_exponent(exponent), check_widest(widest)
        self.newton = exponent == 1.0

    def make_block(self, layer: Layer) -> Block:
        elementwise = layer.handler.structure == "elementwise"
        return DiagonalBlock() if elementwise else KroneckerBlock(self._exponent, Diagonals.of(layer, self._widest))


class OneSidedKFACBackend(KFACBackend):
    """`G ⊗ I`: K-FAC's factor of the gradients alone, the inputs taken for white (see `OutputBlock`).

    The backend of `SpectralDescent`. Inputs' rows are not formed, which spares a convolution its patches.

    Args:
        factor_every: Steps between two updates of G.
        refresh_every: Steps between two decompositions.
        exponent: Power of the damped factor to divide by, as in `KFACBackend`.
        stagger: Spread the layers' decompositions over the interval.
        widest: Outputs up to which G is kept whole; of layers with more its diagonal is.
        storage: How Kronecker factors are kept, `kfacopt.blocks.Storage()` in half of the memory.
    """

    needs_inputs = False

    def __init__(
        self,
        factor_every: Interval = FACTOR_EVERY,
        refresh_every: Interval = KFAC_REFRESH_EVERY,
        exponent: float = 1.0,
        stagger: bool = True,
        widest: int = WIDEST,
        storage: Storage | None = None,
    ) -> None:
        super().__init__(factor_every, refresh_every, exponent, stagger, widest, storage)

    def make_block(self, layer: Layer) -> Block:
        if layer.handler.structure == "elementwise":
            return super().make_block(layer)
        return OutputBlock(layer.shape, self._exponent, self._widest)


class EigenKFACBackend(LayerwiseBackend):
    """KFAC whose damping is added to the eigenvalues of the Kronecker product instead of to its factors.

    An eigendecomposition for each factor instead of an inverse, and four products a layer and step instead of two;
    in return a change of the damping takes effect at once.

    Args:
        factor_every: Steps between two updates of the Kronecker factors.
        refresh_every: Steps between two eigendecompositions.
        stagger: Spread the layers' eigendecompositions over the interval.
        widest: Inputs or outputs up to which a factor is a whole matrix; of more it is its diagonal.
        storage: How Kronecker factors are kept, `kfacopt.blocks.Storage()` in half of the memory.
    """

    def __init__(
        self,
        factor_every: Interval = FACTOR_EVERY,
        refresh_every: Interval = KFAC_REFRESH_EVERY,
        stagger: bool = True,
        widest: int = WIDEST,
        storage: Storage | None = None,
    ) -> None:
        super().__init__(factor_every, refresh_every, stagger, storage)
        self._widest = check_widest(widest)

    def make_block(self, layer: Layer) -> Block:
        elementwise = layer.handler.structure == "elementwise"
        return DiagonalBlock() if elementwise else EigenBlock(Diagonals.of(layer, self._widest))
