"""The targets of the user's loss, where the loop calls the very module that the optimizer was given."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from kfacopt.capture.graph import Mark, marks_on
from kfacopt.capture.hooks import drop_inert_hooks, hook_type
from kfacopt.capture.loss_graph import is_view
from kfacopt.capture.records import Forward


class Targets:
    """Hooks on loss modules that note the target of each prediction (`Forward.targets`).

    Args:
        modules: The losses; called as torch's, with prediction and target.
        alive: The forwards whose backward may come, by the marks on their predictions' nodes.
    """

    def __init__(self, modules: Iterable[nn.Module], alive: MutableMapping[Mark, Forward]) -> None:
        self._alive = alive
        self._handles: list[RemovableHandle] = []
        hook = hook_type()
        for module in dict.fromkeys(modules):
            drop_inert_hooks(module)
            self._handles.append(module.register_forward_hook(hook(self._note), with_kwargs=True))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _note(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._alive:
            return
        given = dict(zip(("input", "target"), inputs, strict=False)) | kwargs
        prediction, target = given.get("input"), given.get("target")
        if not isinstance(prediction, Tensor) or not isinstance(target, Tensor) or prediction.grad_fn is None:
            return
        for forward in self._forwards_at(prediction):
            assert forward.prediction is not None
            if prediction.shape != forward.prediction.shape:
                if target.shape != prediction.shape or not _same_numbers(prediction, forward.prediction):
                    continue
                target = target.reshape(forward.prediction.shape)
            forward.targets.append(target.detach())

    def _forwards_at(self, prediction: Tensor) -> list[Forward]:
        """The forwards whose prediction a tensor is, or is another view of."""
        node = prediction.grad_fn
        found: list[Forward] = []
        output_nr: int | None = prediction.output_nr
        while node is not None:
            kept = [self._alive[mark] for mark in marks_on(node) if mark in self._alive]
            found += [f for f in kept if f.prediction is not None and f.output_nr == output_nr]
            if found or not is_view(node):
                break
            # A view has one output; what hands several on has as many inputs.
            following: tuple[Node | None, int] = node.next_functions[output_nr or 0]
            node, output_nr = following
        return found


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same numbers in the same order."""
    return one.numel() == other.numel() and bool((one.detach().reshape(-1) == other.reshape(-1)).all())
