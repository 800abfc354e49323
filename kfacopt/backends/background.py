"""Decompositions that run beside the training: launched in one step, taken over in another."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kfacopt.blocks.base import Block, Renewal
from kfacopt.layers.layer import Layer
from kfacopt.linalg.side_by_side import pool


@dataclass
class _Launch:
    """One decomposition: of which statistics, for which step, by which process.

    Its future is lost in a copy, and where it failed: then it is launched again from the same statistics.
    """

    snapshot: dict[str, Tensor]
    damping: float
    hand_over: int
    owner: int
    future: Future[Renewal] | None = None
    taken: bool = False


@dataclass
class UnderWay:
    """The decompositions that were launched and not yet taken over, by layer name.

    All processes hold the statistics that were launched, so that what any of them saves serves all; the owner alone
    works on them. Of one thread, in the order of the launches: the results do not depend on when it runs.

    Args:
        threads: That torch may use within a decomposition. The bits of a result may depend on it.
    """

    threads: int = 1
    _launched: dict[str, _Launch] = field(default_factory=dict)
    _pool: ThreadPoolExecutor | None = None
    _process: int = 0

    def __contains__(self, name: str) -> bool:
        return name in self._launched

    def __len__(self) -> int:
        return len(self._launched)

    def launch(self, name: str, block: Block, damping: float, hand_over: int, owner: int, rank: int) -> None:
        """Copy a block's statistics and let its owner decompose them.

        Args:
            name: The layer's.
            block: Has a cache, which must stay until the hand-over; its statistics may go on.
            damping: As of `Block.refresh`.
            hand_over: The step that takes over.
            owner: The rank of the process that works on it.
            rank: Of this process.
        """
        copies = {key: tensor.clone() for key, tensor in block.snapshot().items()}
        self._launched[name] = _Launch(copies, damping, hand_over, owner)
        if owner == rank:
            self._submit(name, block)

    def due(self, step: int) -> list[str]:
        """What step `step` takes over, in the order of the launches; what failed in an earlier step is among it."""
        return [name for name, launch in self._launched.items() if launch.hand_over <= step]

    def owners(self, names: Collection[str]) -> dict[str, int]:
        """Which process decomposes which block."""
        return {name: self._launched[name].owner for name in names}

    def renew(self, name: str, block: Block) -> None:
        """Wait for a decomposition, and let the block take it over. `forget` comes once all processes have it.

        Raises:
            Exception: What the decomposition raised, with a note that names the layer; nothing was taken over then, and
                the next step tries again.
        """
        launch = self._launched[name]
        if launch.taken:  # by a step in which another one failed
            return
        if launch.future is None or self._process != os.getpid():  # a thread does not survive a fork
            self._submit(name, block)
        assert launch.future is not None
        try:
            renewal = launch.future.result()
        except Exception as error:
            launch.future = None
            error.add_note(f"while the curvature of {name!r} was decomposed in the background")
            raise
        block.renew(renewal)
        launch.taken, launch.future = True, None

    def forget(self, names: Collection[str]) -> None:
        """Drop what was taken over, or what nobody will take over."""
        for name in names:
            launch = self._launched.pop(name)
            if launch.future is not None:
                launch.future.cancel()

    def follow(self, blocks: Mapping[str, Block], rank: int) -> None:
        """Keep what is of these blocks, and launch what is not under way here, as it came with a copy."""
        self.forget([name for name in self._launched if name not in blocks])
        for name, launch in self._launched.items():
            if launch.future is None and not launch.taken and launch.owner == rank:
                self._submit(name, blocks[name])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python: the statistics that were launched, not what came of them."""
        return {
            name: {"snapshot": dict(launch.snapshot), "damping": launch.damping, "hand_over": launch.hand_over}
            for name, launch in self._launched.items()
            if not launch.taken
        }

    def load_state_dict(
        self, state: Mapping[str, Any], blocks: Mapping[str, Block], owners: Mapping[str, int], rank: int
    ) -> None:
        """Launch what was under way when a state was saved.

        Args:
            state: What `state_dict` returned, of layers that are here and have a cache to go on with.
            blocks: By layer name, their own state loaded before.
            owners: Which process decomposes which.
            rank: Of this one.

        Raises:
            ValueError: If what was launched does not fit a block's statistics; nothing is changed then.
        """
        launched = {name: _read(name, kept, blocks[name], owners.get(name, 0)) for name, kept in state.items()}
        self.forget(list(self._launched))
        self._launched = launched
        self.follow(blocks, rank)

    def _submit(self, name: str, block: Block) -> None:
        launch = self._launched[name]
        if self._pool is None or self._process != os.getpid():
            self._pool, self._process = pool(1, self.threads, "kfacopt-background"), os.getpid()
        device = next(iter(launch.snapshot.values())).device
        launch.future = self._pool.submit(_decomposed, block, launch.snapshot, launch.damping, _queue(device))

    def __getstate__(self) -> dict[str, Any]:
        bare = {
            name: _Launch(la.snapshot, la.damping, la.hand_over, la.owner, None, la.taken)
            for name, la in self._launched.items()
        }
        return {"threads": self.threads, "_launched": bare, "_pool": None, "_process": 0}


def check_devices(layers: Sequence[Layer]) -> None:
    """Refuse layers whose statistics lie where a second thread is not known to be in step with the first.

    Raises:
        NotImplementedError: If so, with the layer and its device.
    """
    for layer in layers:
        for parameter in layer.parameters.values():
            if parameter.device.type not in ("cpu", "cuda", "meta"):
                raise NotImplementedError(
                    f"{layer.name!r} lies on {parameter.device}: Background decomposes on CPUs and CUDA devices only. "
                    f"Pass refresh_every= the interval itself"
                )


def _queue(device: torch.device) -> Any:
    """The queue of kernels that the launch is in: in it the copies come first, and a hand-over after the results."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


@contextmanager
def _within(queue: Any) -> Iterator[None]:
    entered: AbstractContextManager[Any] = nullcontext() if queue is None else torch.cuda.stream(queue)
    with torch.no_grad(), entered:
        yield


def _decomposed(block: Block, snapshot: Mapping[str, Tensor], damping: float, queue: Any) -> Renewal:
    with _within(queue):
        return block.decomposed(snapshot, damping)


def _read(name: str, kept: Mapping[str, Any], block: Block, owner: int) -> _Launch:
    launched = dict(kept["snapshot"])
    wanted = {key: (list(t.shape), t.dtype) for key, t in block.snapshot().items()}
    found = {key: (list(t.shape), t.dtype) if isinstance(t, Tensor) else t for key, t in launched.items()}
    if found != wanted:
        raise ValueError(f"what was under way of the curvature of {name!r} is {found}, but its statistics are {wanted}")
    here = {key: launched[key].to(t.device, copy=True) for key, t in block.snapshot().items()}
    return _Launch(here, float(kept["damping"]), int(kept["hand_over"]), owner)
