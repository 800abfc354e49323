"""Which handler treats which layer type."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from kfacopt.layers.base import LayerHandler, OneHot
from kfacopt.likelihoods import KFACType


class RefusedHandler(LayerHandler):
    """Stands for a handler that does not apply, and says why.

    Args:
        reason: The phrase shown by `coverage()`.
        names: The parameters that the reason is about.

    >>> RefusedHandler("it is Tuesday").refusal(nn.Linear(1, 1))
    'it is Tuesday'
    """

    def __init__(self, reason: str, names: tuple[str, ...] = LayerHandler.parameter_names) -> None:
        self.reason = reason
        self.parameter_names = names

    def refusal(self, module: nn.Module) -> str | None:
        return self.reason

    def input_rows(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        roles: tuple[str, ...],
        approx: KFACType,
    ) -> Tensor | OneHot:
        raise self._error(module)

    def gradient_rows(self, module: nn.Module, gradient: Tensor, approx: KFACType) -> Tensor:
        raise self._error(module)

    def pack(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
        raise self._error(module)

    def unpack(self, module: nn.Module, matrix: Tensor, roles: tuple[str, ...]) -> dict[str, Tensor]:
        raise self._error(module)

    def _error(self, module: nn.Module) -> RuntimeError:
        return RuntimeError(f"{type(module).__name__} has no rows: {self.reason}. Ask refusal(module) first")


class OwnForwardRefused(RefusedHandler):
    """Stands for a handler that does not apply because a module's forward is not the one that it knows."""


class RegistrationHandle:
    """Undoes a registration: call `remove` (twice is harmless) or use it in a `with` block."""

    def __init__(self, entries: list[LayerHandler], handler: LayerHandler) -> None:
        self._entries = entries
        self._handler: LayerHandler | None = handler

    def remove(self) -> None:
        """Forget the registration; an earlier one of the same type applies again."""
        if self._handler is not None:
            # The newest equal entry goes: handlers are stateless, equal ones are interchangeable.
            newest = max(i for i, entry in enumerate(self._entries) if entry is self._handler)
            del self._entries[newest]
            self._handler = None

    def __enter__(self) -> RegistrationHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class HandlerRegistry:
    """Handlers by layer type; the nearest type in the resolution order wins, of equals the newest.

    A subclass that overrides `forward` does not inherit its parent's handler: nobody has said that its output is still
    that of its parent (think of LoRA), so it is refused until it is registered itself.

    Args:
        handlers: The initial table.
        by_name: Handlers of types that are not ours to import, by module and name; a registration counts more.
    """

    def __init__(
        self,
        handlers: Mapping[type[nn.Module], LayerHandler] | None = None,
        by_name: Mapping[str, LayerHandler] | None = None,
    ) -> None:
        self._by_name = dict(by_name or {})
        self._entries: dict[type[nn.Module], list[LayerHandler]] = {}
        for module_type, handler in (handlers or {}).items():
            self.register(module_type, handler)

    def register(self, module_type: type[nn.Module], handler: LayerHandler) -> RegistrationHandle:
        """Let `handler` treat `module_type` and its subclasses that keep its `forward`.

        Raises:
            TypeError: If `module_type` is not a module class or `handler` not a `LayerHandler` instance.
        """
        if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
            raise TypeError(
                f"module_type must be a subclass of torch.nn.Module, got {module_type!r}: register the class, not a "
                "module of it"
            )
        if not isinstance(handler, LayerHandler):
            raise TypeError(
                f"handler must be an instance of kfacopt.LayerHandler, got {handler!r}: did you forget to call it?"
            )
        entries = self._entries.setdefault(module_type, [])
        entries.append(handler)
        return RegistrationHandle(entries, handler)

    def lookup(self, module: nn.Module) -> LayerHandler | None:
        """The handler of `module`, or None if its type (with all its ancestors) is unknown."""
        for ancestor in type(module).__mro__:
            entries = self._entries.get(ancestor)
            handler = entries[-1] if entries else self._by_name.get(f"{ancestor.__module__}.{ancestor.__qualname__}")
            if handler is None:
                continue
            if "forward" in vars(module):
                return OwnForwardRefused("its forward was replaced on the instance", handler.parameter_names)
            own, known = (getattr(t, "forward", None) for t in (type(module), ancestor))
            if own is not known:
                return OwnForwardRefused(
                    f"subclass of {ancestor.__name__} with a forward of its own: register a handler",
                    handler.parameter_names,
                )
            return handler
        return None
