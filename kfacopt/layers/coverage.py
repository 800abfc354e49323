"""Which parameters get curvature, which train by AdamW, and why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from kfacopt.layers import handler_for
from kfacopt.layers.base import LayerHandler
from kfacopt.layers.compound import CompoundHandler, Part
from kfacopt.layers.layer import Layer
from kfacopt.layers.tied import TiedEmbeddingHandler

Place = tuple[str, nn.Module, str]
"""Where a parameter is held: module path, module, the parameter's name in it."""


@dataclass(frozen=True)
class CoverageRow:
    """How one module's parameters are treated."""

    module: str
    parameters: tuple[str, ...]
    treatment: str
    why: str


class Coverage:
    """A table of all parameters of a model: `str()` shows it, `rows` holds it."""

    def __init__(self, rows: Sequence[CoverageRow]) -> None:
        self.rows = tuple(rows)

    def __str__(self) -> str:
        head = ("module", "parameters", "treatment", "why")
        body = [(r.module or "(root)", ", ".join(r.parameters), r.treatment, r.why) for r in self.rows]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(3)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]]) for line in [head, *body]
        ]
        lines.insert(1, "  ".join([*("-" * width for width in widths), "---"]))
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


def find_layers(
    model: nn.Module,
    wanted: Collection[nn.Parameter],
    excluded: Mapping[nn.Parameter, str],
    separate: bool,
    refusal: Callable[[Layer], str | None] = lambda layer: None,
) -> tuple[list[Layer], list[CoverageRow]]:
    """Group a model's parameters into layers, and say of the rest why they are in none.

    Args:
        model: The model.
        wanted: The parameters that are to get curvature if they can.
        excluded: Those that get none whatever they are, and why.
        separate: Give weight and bias a layer each.
        refusal: Why a layer is to train by AdamW all the same; None: it is not.

    Returns:
        The layers, and a row for every group of parameters that is in none of them.
    """
    wanted_ids, reasons = {id(p) for p in wanted}, {id(p): why for p, why in excluded.items()}
    places, divided = places_of(model), _divided_modules(model)
    rest: dict[tuple[str, str, str], list[str]] = {}
    groups: dict[tuple[tuple[int, ...], str], list[Place]] = {}
    parameters, in_parts = {id(p): p for p in model.parameters()}, _parameters_of_parts(divided)
    covered: set[int] = set()
    for key, held in places.items():
        treatment, why = _reason_against(key, parameters[key], held, wanted_ids, reasons, in_parts.get(key))
        if why:
            rest.setdefault((held[0][0], treatment, why), []).append(held[0][2])
            continue
        covered.add(key)
        if key not in in_parts:
            # Parameters held by the same modules make one layer, unless weight and bias are to be separate.
            owners = tuple(id(module) for _, module, _ in held)
            groups.setdefault((owners, held[0][2] if separate else ""), []).append(held[0])
    modules = {id(module): module for module in model.modules()}
    layers = [_layer([modules[o] for o in owners], members) for (owners, _), members in groups.items()]
    for path, module, handler in divided:
        for part in handler.parts(module):
            layers += _layers_of_part(path, module, part, covered, separate)
    order = {key: number for number, key in enumerate(places)}
    layers.sort(key=lambda layer: min(order[id(p)] for p in layer.parameters.values()))
    layers, refused = _sorted_out(layers, refusal)
    rows = refused + [CoverageRow(m, tuple(names), treatment, why) for (m, treatment, why), names in rest.items()]
    return layers, rows


def _sorted_out(
    layers: Sequence[Layer], refusal: Callable[[Layer], str | None]
) -> tuple[list[Layer], list[CoverageRow]]:
    """The layers that stay, and rows of those that are refused; who shares a parameter with one of them is, too."""
    against = {layer: refusal(layer) for layer in layers}
    lost = {id(p) for layer, why in against.items() if why is not None for p in layer.parameters.values()}
    for layer, why in against.items():
        if why is None and not lost.isdisjoint(id(p) for p in layer.parameters.values()):
            against[layer] = "has a parameter together with a layer that trains by AdamW"
    rows = [CoverageRow(layer.name, _labels(layer), "AdamW", why) for layer, why in against.items() if why is not None]
    return [layer for layer, why in against.items() if why is None], rows


def covered_rows(layers: Iterable[Layer], treatments: Iterable[str]) -> list[CoverageRow]:
    """Rows of the table for the layers that do get curvature."""
    rows = []
    for layer, treatment in zip(layers, treatments, strict=True):
        kinds = dict.fromkeys(type(module).__name__ for module in layer.modules)
        why = f"{type(layer.handler).__name__} on {' and '.join(kinds)}"
        if layer.handler.structure == "tied":
            why += ", one block for the sum of both uses"
        if layer.part is not None:
            why += f", {layer.part.what}"
        if len(layer.modules) > 1:
            why += f", shared by {len(layer.modules)} modules"
        rows.append(CoverageRow(layer.name, _labels(layer), treatment, why))
    return rows


def retreated(rows: Iterable[CoverageRow], places: Collection[tuple[str, str]], treatment: str) -> list[CoverageRow]:
    """The rows with another treatment of the parameters at some places, `(module, parameter)`; split where they differ.

    >>> rows = [CoverageRow("rnn", ("weight_ih_l0", "bias_ih_l0"), "AdamW", "no handler for RNN")]
    >>> [(row.parameters, row.treatment) for row in retreated(rows, {("rnn", "weight_ih_l0")}, "spectral")]
    [(('weight_ih_l0',), 'spectral'), (('bias_ih_l0',), 'AdamW')]
    """
    result = []
    for row in rows:
        chosen = tuple(name for name in row.parameters if (row.module, name) in places)
        left = tuple(name for name in row.parameters if name not in chosen)
        result += [replace(row, parameters=chosen, treatment=treatment)] if chosen else []
        result += [replace(row, parameters=left)] if left else []
    return result


def _labels(layer: Layer) -> tuple[str, ...]:
    return layer.roles if layer.part is None else tuple(layer.part.label(role) for role in layer.roles)


def places_of(model: nn.Module) -> dict[int, list[Place]]:
    """Where each parameter is held, by its id."""
    result: dict[int, list[Place]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                result.setdefault(id(parameter), []).append((path, module, name))
    return result


def _divided_modules(model: nn.Module) -> list[tuple[str, nn.Module, CompoundHandler]]:
    """The modules whose parts are layers, by their path."""
    found = ((path, module, handler_for(module)) for path, module in model.named_modules())
    return [(path, module, handler) for path, module, handler in found if isinstance(handler, CompoundHandler)]


def _parameters_of_parts(divided: Iterable[tuple[str, nn.Module, CompoundHandler]]) -> dict[int, str]:
    """The parameters of all parts, by id, and why one cannot be treated there ("": it can)."""
    result: dict[int, str] = {}
    for _, module, handler in divided:
        for part in handler.parts(module):
            held = {role: part.parameter(module, role) for role in part.paths}
            weight = held.get("weight")
            seen = not part.needs_weight or (weight is not None and weight.requires_grad)
            why = "" if seen else _UNSEEN
            for role, p in held.items():
                # A bias of which one part's weight is not seen is in no layer: its other rows would train alone.
                result[id(p)] = why if role == "weight" else result.get(id(p), "") or why
    return result


_UNSEEN = "the weight it is added to is frozen or computed, so that the graph does not show the product"


def _layers_of_part(path: str, module: nn.Module, part: Part, covered: Collection[int], separate: bool) -> list[Layer]:
    """The part as one layer, or a layer for each parameter; parameters that are not `covered` are left out."""
    held = {role: part.parameter(module, role) for role in part.paths}
    own = {role: p for role, p in held.items() if isinstance(p, nn.Parameter) and id(p) in covered}
    place = ".".join(filter(None, [path, part.name]))
    choices = [(role,) for role in own] if separate else [tuple(own)] if own else []
    return [
        Layer(
            place if set(roles) == set(held) else f"{place}.{'+'.join(roles)}",
            (module,),
            part.handler,
            {role: own[role] for role in roles},
            part,
        )
        for roles in choices
    ]


def _reason_against(
    key: int,
    parameter: nn.Parameter,
    held: list[Place],
    wanted: set[int],
    excluded: Mapping[int, str],
    of_part: str | None,
) -> tuple[str, str]:
    """Treatment and reason of a parameter that gets no curvature; empty if it does.

    `of_part` is what a compound module says of it; None: it is in no part of one.
    """
    _, module, _ = held[0]
    if key not in wanted and key not in excluded:
        return "not optimized", "in no param group"
    if not parameter.requires_grad:
        return "frozen", "requires_grad is False"
    if key in excluded:
        return "AdamW", excluded[key]
    if parameter.is_complex():
        return "AdamW", "complex numbers, of whose products there is no curvature"
    if of_part is not None:
        others = ", ".join(f"{p}.{n}" for p, _, n in held[1:])
        return ("AdamW", of_part or f"tied to {others}") if of_part or others else ("", "")
    handler = handler_for(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "AdamW", "made by torch.jit, where hooks see nothing: train the module that it was made of"
    if handler is None:
        raw = parameter.ndim in (2, 3) and not type(module).__module__.startswith("torch.")
        hint = "; if it multiplies by this, register kfacopt.layers.ProductsHandler" if raw else ""
        return "AdamW", f"no handler for {type(module).__name__}{hint}"
    refusal = next((r for r in (_refusal(m, n) for _, m, n in held) if r), None)
    if refusal:
        return "AdamW", refusal
    if len(held) > 1:
        others = ", ".join(f"{p}.{n}" for p, _, n in held[1:])
        same = all(_alike(handler, held[0], place) for place in held[1:])
        if not same and _tied(held) is None:
            return "AdamW", f"tied to {others}, a layer of another kind or shape"
    return "", ""


def _refusal(module: nn.Module, name: str) -> str | None:
    handler = handler_for(module)
    if handler is None:
        return f"no handler for {type(module).__name__}"
    refusal = handler.refusal(module)
    if isinstance(handler, CompoundHandler):
        return refusal or f"in no part of {type(module).__name__} that multiplies by a matrix"
    if refusal is None and name not in handler.roles(module):
        return f"{type(handler).__name__} does not treat {name!r}"
    return refusal


def _alike(handler: LayerHandler, first: Place, other: Place) -> bool:
    # Rows of several modules can only be joined if they mean the same parameter in the same way.
    return (
        handler_for(other[1]) is handler
        and other[2] == first[2]
        and type(other[1]) is type(first[1])
        and other[1].extra_repr() == first[1].extra_repr()
    )


def _tied(held: Iterable[Place]) -> TiedEmbeddingHandler | None:
    """The handler of a weight that embeddings and linear layers hold; None if it is another tie."""
    places = list(held)
    if any(name != "weight" for _, _, name in places):
        return None
    return TiedEmbeddingHandler.of({module: handler_for(module) for _, module, _ in places})


def _layer(modules: list[nn.Module], members: list[Place]) -> Layer:
    path, module, _ = members[0]
    handler = handler_for(module)
    if len(modules) > 1 and (tied := _tied((path, m, name) for m in modules for _, _, name in members)) is not None:
        handler = tied
    assert handler is not None
    covered = {name: module._parameters[name] for _, _, name in members}
    roles = [role for role in handler.roles(module) if role in covered]
    whole = set(roles) == set(handler.roles(module))
    name = path if whole else ".".join(filter(None, [path, "+".join(roles)]))
    parameters = {role: p for role in roles if (p := covered[role]) is not None}
    return Layer(name, tuple(dict.fromkeys(modules)), handler, parameters)
