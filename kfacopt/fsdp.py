"""What has to be known of torch's `fully_shard` (FSDP2): the one file that uses private names of it.

`fully_shard` keeps of every parameter a shard in each process (a `DTensor`, which the optimizer trains). Around a
forward and a backward a whole copy stands in its place, a leaf of the graph that the engine allocates and frees. A
backward of ours in the user's graph needs these copies too, and must leave the engine as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

_ENGINE = "torch.distributed.fsdp"
_WHOLE = frozenset({Tensor, nn.Parameter})
_LENT = "_kfacopt_whole"


def is_engines(hook: Any) -> bool:
    """Whether a hook on a tensor is the engine's own: a backward must call it, as it brings the parameters.

    >>> is_engines(print)
    False
    """
    return type(getattr(hook, "__self__", None)).__module__.startswith(_ENGINE)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor lies in several processes (a `DTensor`).

    >>> is_sharded(torch.ones(2))
    False
    """
    if type(tensor) in _WHOLE:  # asked dozens of times of each parameter in a step
        return False
    return hasattr(tensor, "placements") and hasattr(tensor, "full_tensor")


def copy_in(module: nn.Module, parameter: Tensor) -> Tensor:
    """What the graph knows a parameter as right after a call of `module`, which holds it.

    A module that was given to `fully_shard` itself has its shards back by then; in others the copies still stand.
    """
    return ShardedModel(module).leaf(parameter) if is_sharded(parameter) else parameter


@contextmanager
def copies_within(module: nn.Module) -> Iterator[None]:
    """Right after a call of `module`: its graph can be asked within this context, which all processes must enter.

    A node of the graph may hold a copy of a parameter. Of a module that was given to `fully_shard` itself, and of those
    in it, the engine has freed these by then; it fetches them once more, and frees them again.
    """
    groups = [group for group in ShardedModel(module)._groups if not group.is_unsharded]
    try:
        for group in groups:
            group.unshard()
            group.wait_for_unshard()
        yield
    finally:
        for group in groups:
            _reshard(group)


def whole_copy(parameter: Tensor) -> Tensor:
    """A parameter as a whole, without a graph: itself, or of a sharded one what is `lent` to it.

    >>> whole_copy(nn.Parameter(torch.ones(1)))
    tensor([1.])
    """
    whole: Tensor = getattr(parameter, _LENT) if is_sharded(parameter) else parameter
    return whole.detach()


@contextmanager
def lent(wholes: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Within this context sharded parameters have whole copies beside them, which the engine does not know of."""
    for parameter, whole in wholes.items():
        setattr(parameter, _LENT, whole)
    try:
        yield
    finally:
        for parameter in wholes:
            delattr(parameter, _LENT)


def class_of(module: nn.Module) -> type[nn.Module]:
    """A module's class as it was before `fully_shard` put one of its own in front.

    >>> class_of(nn.Linear(2, 1)).__name__
    'Linear'
    """
    kinds = type(module).__mro__
    return kinds[2] if kinds[1].__name__ == "FSDPModule" else kinds[0]


class ShardedModel:
    """The parts of a model that `fully_shard` has taken over; of any other model there are none.

    Args:
        model: Holds them, itself or its modules.

    Raises:
        RuntimeError: If the installed torch has other private names than this file knows.

    >>> bool(ShardedModel(nn.Linear(2, 1)))
    False
    """

    def __init__(self, model: nn.Module) -> None:
        found = {id(state): (state, name) for name, module in model.named_modules() if (state := _state_of(module))}
        self._states = [state for state, _ in found.values()]
        self._groups, self._names = [], dict[int, str]()
        for state, name in found.values():
            for group in _groups_of(state):
                self._groups.append(group)
                self._names[id(group)] = name
        self._held = {id(held.sharded_param): held for group in self._groups for held in group.fsdp_params}

    def __bool__(self) -> bool:
        return bool(self._groups)

    def holds(self, parameter: Tensor) -> bool:
        """Whether a parameter is one of the sharded ones."""
        return id(parameter) in self._held

    def same_parameters(self, other: ShardedModel) -> bool:
        """Whether the very same parameters are sharded."""
        return self._held.keys() == other._held.keys()

    def leaf(self, parameter: Tensor) -> Tensor:
        """What the graph knows a parameter as: its whole copy, where it is sharded and a forward has made one."""
        held = self._held.get(id(parameter))
        copy: Tensor = parameter if held is None else getattr(held, "_unsharded_param", parameter)
        return copy

    def is_copy(self, parameter: Tensor) -> bool:
        """Whether this is the whole copy of a parameter, which the engine writes over, and not what is trained."""
        return any(getattr(held, "_unsharded_param", None) is parameter for held in self._held.values())

    @property
    def has_waiting(self) -> bool:
        """Whether gradients wait within the engine that are not in `.grad` yet (`set_requires_gradient_sync`)."""
        for group in self._groups:
            if group._partial_reduce_output is not None:
                return True
            for held in group.fsdp_params:
                copy = getattr(held, "_unsharded_param", None)
                if held.unsharded_accumulated_grad is not None or (copy is not None and copy.grad is not None):
                    return True
        return False

    def reshard(self) -> None:
        """Put the shards into the modules again wherever whole copies stand; these are fetched anew when needed.

        Out of forwards and backwards only.
        """
        for group in self._groups:
            _reshard(group)

    @property
    def mesh(self) -> Any:
        """The device mesh that all parameters lie on; None where nothing is sharded.

        Raises:
            RuntimeError: If they lie on several.
        """
        meshes = {group.mesh_info.mesh: self._names[id(group)] for group in self._groups}
        if len(meshes) > 1:
            places = ", ".join(f"{name!r} on {mesh}" for mesh, name in meshes.items())
            raise RuntimeError(
                f"fully_shard put modules on different device meshes ({places}): one step is of one mesh. Give "
                f"fully_shard the same mesh everywhere"
            )
        return next(iter(meshes), None)

    @property
    def group(self) -> Any:
        """torch's process group of the mesh; None: the default one, or none.

        Raises:
            RuntimeError: If the mesh has several axes, and not all processes that there are.
        """
        if (mesh := self.mesh) is None or (mesh.ndim > 1 and mesh.size() == distributed.get_world_size()):
            return None
        if mesh.ndim > 1:
            raise RuntimeError(
                f"fully_shard's device mesh {mesh} has {mesh.ndim} axes, but not all of the "
                f"{distributed.get_world_size()} processes: give it all of them, or one axis"
            )
        return mesh.get_group()

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers; all must ask."""
        if not self:
            return number
        asked = torch.tensor(number, device=self._groups[0].device)
        distributed.all_reduce(asked, distributed.ReduceOp.MAX, group=self.group)
        return int(asked)

    def check(self) -> None:
        """Refuse what cannot be trained yet, by name.

        Raises:
            RuntimeError: If there is something.
        """
        size = self.mesh.size() if self else 1
        for group in self._groups:
            place = f"the module {name!r}" if (name := self._names[id(group)]) else "the model"
            if any(held.is_dtensor for held in group.fsdp_params):
                raise RuntimeError(
                    f"{place} is sharded by tensor parallelism too: curvature of a layer whose outputs are divided is "
                    f"not there yet. Shard it by fully_shard alone"
                )
            if type(group.offload_policy).__name__ != "OffloadPolicy":
                raise RuntimeError(
                    f"{place} has {type(group.offload_policy).__name__}: parameters and statistics are to be on one "
                    f"device. Leave offload_policy out"
                )
            if group.gradient_divide_factor not in (None, size):
                raise RuntimeError(
                    f"{place} has a gradient divide factor of {group.gradient_divide_factor}, but the curvature is "
                    f"that of the mean over the {size} processes: leave set_gradient_divide_factor out, and multiply "
                    f"the loss"
                )

    def recover(self) -> None:
        """After an error within a backward: the next forward finds the engine ready, and `.grad` as it was."""
        for state in self._states:
            if state._is_root and hasattr(state, "_reset_iter_state"):
                state._reset_iter_state()

    @contextmanager
    def out_of_turn(self) -> Iterator[None]:
        """Around forwards of ours that no backward follows: the engine is then as it was before them."""
        contexts = {id(state._comm_ctx): state._comm_ctx for state in self._states}.values()
        orders = [(context.post_forward_order, list(context.post_forward_order)) for context in contexts]
        orders += [(group._post_forward_indices, list(group._post_forward_indices)) for group in self._groups]
        try:
            yield
        finally:
            self.reshard()
            for held, before in orders:
                held[:] = before

    @contextmanager
    def left_as_is(self) -> Iterator[None]:
        """Around a backward of ours within the user's: the engine fetches parameters, and is then as it was.

        It reduces no gradients and frees only what it fetched for this pass; the order of its prefetches stays, and so
        do gradients that wait in it.
        """
        kept = [_Kept(group) for group in self._groups]
        contexts = {id(state._state_ctx): state._state_ctx for state in self._states}.values()
        queued = [(context, context.post_backward_final_callback_queued) for context in contexts]
        stages = [(state, state._training_state) for state in self._states]
        try:
            for context in contexts:
                context.post_backward_final_callback_queued = True  # else it would end the user's pass with ours
            for one in kept:
                one.begin()
            yield
        finally:
            for one in kept:
                one.end()
            for state, stage in stages:
                state._training_state = stage
            for context, was in queued:
                context.post_backward_final_callback_queued = was


class _Kept:
    """What a group of parameters that are fetched together is like before a pass of ours."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._stage = group._training_state
        self._stays = group.is_unsharded or group._all_gather_result is not None
        self._order = list(group._post_forward_indices)

    def begin(self) -> None:
        self._group.post_backward = self._post_backward

    def _post_backward(self, *_: Any) -> None:
        """In the place of the engine's, which would reduce the gradients that are there."""
        self._group._training_state = _stage("POST_BACKWARD")
        if not self._stays:
            self._group.reshard()

    def end(self) -> None:
        group = self._group
        del group.post_backward
        if not self._stays:
            group._training_state = _stage("POST_BACKWARD")
            group.wait_for_unshard()  # of one that was fetched ahead and not needed
            _reshard(group)
        group._training_state = self._stage
        group._post_forward_indices[:] = self._order


def _reshard(group: Any) -> None:
    if group.is_unsharded:
        group._to_sharded()


def _state_of(module: nn.Module) -> Any:
    """What the engine keeps of a module that was given to `fully_shard`; None of any other."""
    if not any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
        return None
    return _private(lambda: module._get_fsdp_state())  # type: ignore[operator]


def _groups_of(state: Any) -> list[Any]:
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    group = _private(lambda: state._fsdp_param_group)  # torch 2.9 knew one for each module
    return [] if group is None else [group]


def _stage(name: str) -> Any:
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    return TrainingState[name]


def _private(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except AttributeError as error:
        raise RuntimeError(
            f"fully_shard of torch {torch.__version__} is not the one that kfacopt knows ({error}): use torch 2.13, or "
            f"train with torch.nn.parallel.DistributedDataParallel"
        ) from error
