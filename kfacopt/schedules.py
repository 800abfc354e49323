"""When statistics and caches are due: intervals, and how refreshes spread over the steps between.

The learning rate's way to zero is here, too.

An interval is a number of steps, a callable `step -> number of steps`, or an object of this file (also a callable).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler

Interval = int | Callable[[int], int]


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1 step, got {value}")


@dataclass(frozen=True)
class Constant:
    """The same interval for ever.

    >>> Constant(10)(123)
    10
    """

    every: int

    def __post_init__(self) -> None:
        _require_positive("every", self.every)

    def __call__(self, step: int) -> int:
        return self.every


@dataclass(frozen=True)
class Growing:
    """Short intervals early, when curvature changes fast; geometric growth over a burn-in; then constant.

    Args:
        start: Interval at step 0.
        end: Interval from step `burn_in` on.
        burn_in: Steps over which the interval grows.

    >>> [Growing(1, 100, burn_in=200)(step) for step in (0, 100, 200, 5000)]
    [1, 10, 100, 100]
    """

    start: int
    end: int
    burn_in: int

    def __post_init__(self) -> None:
        for name in ("start", "end", "burn_in"):
            _require_positive(name, getattr(self, name))

    def __call__(self, step: int) -> int:
        progress = min(1.0, step / self.burn_in)
        growth = float((self.end / self.start) ** progress)
        return max(1, round(self.start * growth))


# Curvature changes fastest in the first steps, and a trust region measured by stale curvature bounds nothing: the
# statistics are taken at every step at first. An eigendecomposition costs about three inversions.
FACTOR_EVERY = Growing(1, 10, burn_in=30)
"""Default of every backend's `factor_every`, and so of the natural gradient's."""
KFAC_REFRESH_EVERY = Growing(2, 50, burn_in=50)
"""Default of KFAC's `refresh_every`."""
EKFAC_REFRESH_EVERY = Growing(5, 50, burn_in=50)
"""Default of EKFAC's `refresh_every`."""


SPECTRAL_FACTOR_EVERY = Growing(1, 40, burn_in=30)
"""Default of `factor_every` with the spectral step: which outputs go together, most of what curvature decides there,
moves slowly. On six tasks 10, 20 and 40 trained alike, with EKFAC on eight 10 and 40."""
SPECTRAL_REFRESH_EVERY = Growing(5, 100, burn_in=50)
"""Default of `refresh_every` with the spectral step."""


class MaxOverhead:
    """The shortest interval that keeps curvature within a share of the time of a step; it measures both.

    One object may serve as `factor_every` and as `refresh_every`: then the share is split evenly between them. The
    choice follows the clock, so two runs differ, and a resumed run need not repeat the uninterrupted one bit for bit.

    Args:
        max_overhead: Time of updates and refreshes over the time of the rest of the step, for instance 0.2.
        longest: The longest interval it will choose.

    >>> schedule = MaxOverhead(0.2)
    >>> schedule.observe("refresh", seconds=0.5, step_seconds=0.05)
    >>> schedule.interval("refresh")
    50
    """

    def __init__(self, max_overhead: float = 0.2, longest: int = 10_000) -> None:
        if not max_overhead > 0.0:
            raise ValueError(f"max_overhead must be positive, got {max_overhead}: it is a share of the time of a step")
        self.max_overhead = max_overhead
        self.longest = longest
        self._seconds: dict[str, float] = {}
        self._step_seconds = 0.0

    def observe(self, kind: str, seconds: float, step_seconds: float) -> None:
        """Take in what one whole update or refresh of kind `kind` cost and what a step costs without it."""
        old = self._seconds.get(kind)
        self._seconds[kind] = seconds if old is None else 0.7 * old + 0.3 * seconds
        known = self._step_seconds
        self._step_seconds = step_seconds if known == 0.0 else 0.9 * known + 0.1 * step_seconds

    def interval(self, kind: str) -> int:
        """The interval for one kind of work; 1 until something has been observed."""
        if kind not in self._seconds or self._step_seconds <= 0.0:
            return 1
        share = self.max_overhead / len(self._seconds)
        return min(self.longest, max(1, math.ceil(self._seconds[kind] / (share * self._step_seconds))))

    def __call__(self, step: int) -> int:
        return max((self.interval(kind) for kind in self._seconds), default=1)

    def state_dict(self) -> dict[str, Any]:
        """What was measured."""
        return {"seconds": dict(self._seconds), "step_seconds": self._step_seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what was measured."""
        self._seconds, self._step_seconds = dict(state["seconds"]), float(state["step_seconds"])


@dataclass(frozen=True)
class OwnShare:
    """The interval that a shared `MaxOverhead` gives one kind of work, `"factors"` or `"refresh"`.

    >>> OwnShare(MaxOverhead(), "refresh")(0)
    1
    """

    schedule: MaxOverhead
    kind: str

    def __call__(self, step: int) -> int:
        return self.schedule.interval(self.kind)


@dataclass(frozen=True)
class Background:
    """Decompositions beside the training: a step that is due launches one, a later step takes it over.

    As `refresh_every` of an optimizer or backend that keeps blocks by layer: a copy of the layer's statistics is
    decomposed on a thread of its own while steps go on with the cache that they have. It is taken over `delay` steps
    after it was launched, whenever the thread was done, and waited for if it is late: what a run computes depends on
    neither clock nor machine load, and a checkpoint of the steps between resumes bit for bit (it holds the copy). A
    layer's first decomposition is done in the step, as there is nothing to go on with; so is what costs nothing.

    It pays where a core is free. What is launched needs the factors' memory once more until it is taken over.

    Args:
        every: Steps between two launches of a layer, as any `refresh_every`, but no `MaxOverhead`: that follows the
            clock. A layer is not launched again before it was taken over.
        delay: Steps from the launch to the hand-over; a number, or a callable of the step of the launch.
        threads: That torch may use within a decomposition.

    Raises:
        TypeError, ValueError: An interval that is none; a `MaxOverhead`.

    >>> Background(50, delay=10)(123)
    50
    """

    every: Interval
    delay: Interval = 10
    threads: int = 1

    def __post_init__(self) -> None:
        as_interval("every", self.every)
        as_interval("delay", self.delay)
        if isinstance(self.every, (MaxOverhead, Background, WhenMoved)) or isinstance(self.delay, MaxOverhead):
            raise _unlike_in_every_run("Background", f"{self.every!r} with the delay {self.delay!r}")
        _require_positive("threads", self.threads)

    def __call__(self, step: int) -> int:
        return as_interval("every", self.every)(step)

    def hand_over(self, step: int) -> int:
        """The step that takes over what step `step` launches.

        >>> Background(50, delay=Growing(1, 10, burn_in=30)).hand_over(0)
        1
        """
        delay = as_interval("delay", self.delay)(step)
        if isinstance(delay, bool) or not isinstance(delay, int) or delay < 1:
            raise ValueError(f"the delay {self.delay!r} returned {delay!r} at step {step}, not a positive int")
        return step + delay


@dataclass(frozen=True)
class WhenMoved:
    """Decompositions only of what has moved: a layer that is due keeps its own while it is true to a tolerance.

    As `refresh_every` of an optimizer or backend that keeps blocks by layer. What is cached is held against the
    statistics at every due step. An eigenbasis stays while the share of each factor's Frobenius norm that is beside
    the diagonal along it is at most `tolerance` (and, where only dominant eigenvectors are kept, no cut one has come to
    be dominant); its eigenvalues follow all the same. The inverses of KFAC and `SpectralDescent` stay while
    `(factor + damping) inverse` is the identity to `tolerance` in every direction (inverse roots: while their power
    is); a change of the damping counts. So what a layer is preconditioned with is never older than that, however long
    nothing is decomposed.

    The question costs a product with each factor (an eigenbasis) or less; an `eigh` takes about seven. It pays where
    statistics are at rest: in the first 200 steps of the deep autoencoder nothing was spared at a tolerance of 0.1, and
    at 0.3 a quarter was, for a loss of 97.7 in place of 90.9.
    It is decided from the statistics alone, by the process that owns the layer: runs repeat, and resume bit for bit.

    Args:
        every: Steps between two questions, as any `refresh_every`; no `MaxOverhead` and no `Background`.
        tolerance: The share.

    Raises:
        TypeError, ValueError: An interval that is none of these; a tolerance that is not positive.

    >>> WhenMoved(50, tolerance=0.1)(123)
    50
    """

    every: Interval
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        as_interval("every", self.every)
        if isinstance(self.every, (MaxOverhead, Background, WhenMoved)):
            raise _unlike_in_every_run("WhenMoved", repr(self.every))
        if not self.tolerance > 0.0:
            raise ValueError(f"tolerance must be positive, got {self.tolerance}: it is a share of a factor's norm")

    def __call__(self, step: int) -> int:
        return as_interval("every", self.every)(step)


def _unlike_in_every_run(schedule: str, given: str) -> TypeError:
    return TypeError(
        f"{schedule} takes an interval that is the same in every run, not {given}: pass a number, "
        f"kfacopt.schedules.Growing or a callable of the step"
    )


def as_interval(name: str, interval: Interval) -> Callable[[int], int]:
    """Make a callable of an interval; `name` is the argument's name in errors.

    Raises:
        ValueError: If an int is not positive.
        TypeError: If it is neither an int nor a callable.
    """
    if isinstance(interval, bool) or not (isinstance(interval, int) or callable(interval)):
        raise TypeError(
            f"{name} must be a number of steps, a callable step -> number of steps or a schedule of "
            f"kfacopt.schedules, got {interval!r}"
        )
    if isinstance(interval, int):
        _require_positive(name, interval)
        return Constant(interval)
    return interval


class Timetable:
    """Which of several parts are due at a step, each part every `interval(step)` steps.

    The first time everything is due at once (there is nothing to work with before); after that the parts are
    *staggered*: each waits its own fraction of the first interval, so that no step bears all of them.

    Args:
        interval: `step -> number of steps`.
        stagger: Spread the parts over the interval; otherwise all are due together.

    >>> timetable = Timetable(Constant(4), stagger=True)
    >>> for step in range(9):
    ...     due = timetable.due(step, ["a", "b"])
    ...     timetable.done(step, due)
    ...     if due: print(step, due)
    0 ['a', 'b']
    2 ['a']
    4 ['b']
    6 ['a']
    8 ['b']
    """

    def __init__(self, interval: Callable[[int], int], stagger: bool) -> None:
        self._interval = interval
        self._stagger = stagger
        self._last: dict[str, int] = {}
        self._waits: dict[str, tuple[int, int]] = {}

    def due(self, step: int, parts: list[str]) -> list[str]:
        """Those of `parts` that are due at `step`; a part never done is due."""
        every = self._interval_at(step)
        return [p for p in parts if p not in self._last or step - self._last[p] >= self._wait(p, every)]

    def done(self, step: int, parts: list[str], workers: Mapping[str, int] | None = None) -> None:
        """Note that `parts` were done at `step`.

        Args:
            step: Counted from 0.
            parts: What was done.
            workers: Who did them, if several work side by side; in the order in which each is to do his own. Each then
                has a part to do as often as the others: if one worked while they wait, nothing would be gained.
        """
        fresh = [part for part in parts if part not in self._last]
        for part in parts:
            self._waits.pop(part, None)
            self._last[part] = step
        for own in _by_worker(fresh, workers or {}):
            if self._stagger and len(own) > 1:
                self._waits |= {part: (index + 1, len(own)) for index, part in enumerate(own)}

    def forget(self, parts: Collection[str]) -> None:
        """Take parts for never done: they are due at once."""
        for part in parts:
            self._last.pop(part, None)
            self._waits.pop(part, None)

    def done_at(self, step: int) -> list[str]:
        """The parts that were last done at `step`."""
        return [part for part, last in self._last.items() if last == step]

    def staleness(self, step: int) -> int:
        """Steps since the part that has waited longest was done."""
        return step - min(self._last.values()) if self._last else 0

    def state_dict(self) -> dict[str, Any]:
        """Plain Python: when each part was last done and what it waits for."""
        return {
            "last": dict(self._last),
            "waits": {part: list(wait) for part, wait in self._waits.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
        self._last = dict(state["last"])
        self._waits = {part: (wait[0], wait[1]) for part, wait in state["waits"].items()}

    def _wait(self, part: str, every: int) -> int:
        share, parts = self._waits.get(part, (1, 1))
        return -(-share * every // parts)  # rounded up in integers: no two steps differ by more than one part

    def _interval_at(self, step: int) -> int:
        every = self._interval(step)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"the schedule {self._interval!r} returned {every!r} at step {step}, not a positive int")
        return every


def _by_worker(parts: list[str], workers: Mapping[str, int]) -> list[list[str]]:
    """Each worker's parts in the order of `workers`; what nobody in particular does goes with the first's.

    >>> _by_worker(["a", "b", "c"], {"c": 0, "a": 1}), _by_worker(["a", "b"], {"b": 0, "a": 0})
    ([['c', 'b'], ['a']], [['a', 'b']])
    """
    numbers = sorted(set(workers.values()))
    if len(numbers) < 2:
        return [parts]
    own = [[part for part in workers if workers[part] == number and part in parts] for number in numbers]
    own[0] += [part for part in parts if part not in workers]
    return own


def to_zero(optimizer: Optimizer, steps: int) -> LRScheduler:
    """The learning rates on a straight line to zero, the other half of steps of a fixed length.

    Such steps do not shorten by themselves as a minimum comes near: with a constant rate the noise of batches is a
    floor. It is torch's own scheduler; call its `step()` after each of the optimizer's. AdamW's rate follows.

    Args:
        optimizer: Any of torch's interface.
        steps: After so many of its steps the rates are zero.

    Raises:
        ValueError: If there is no step.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> scheduler = to_zero(optimizer, steps=4)
    >>> for _ in range(3):
    ...     optimizer.step()
    ...     scheduler.step()
    >>> [round(rate, 6) for rate in scheduler.get_last_lr()]
    [0.25]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
