"""One layer's sites, however many calls it took, as rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfacopt.capture.records import Site
from kfacopt.layers.base import OneHot, Rows
from kfacopt.layers.fit import require_gradients_fit, require_inputs_fit, require_rows_pair
from kfacopt.layers.layer import Layer
from kfacopt.layers.tied import TiedEmbeddingHandler
from kfacopt.layers.unformed import UnformedRows
from kfacopt.likelihoods import KFACType
from kfacopt.linalg.tensors import as_statistic


def rows_of_layer(
    layer: Layer,
    reached: Sequence[tuple[Site, Tensor]],
    terms: Tensor,
    kfac_approx: KFACType,
    all_places: bool = False,
    needs_inputs: bool = True,
    inputs: Tensor | OneHot | UnformedRows | None = None,
    one_use: bool = False,
) -> Rows:
    """Rows of a layer from the cotangents that arrived at its calls.

    A layer that was called several times in one forward shares its weights over the calls: they are more places `s`.

    Args:
        layer: The layer.
        reached: Its calls and the cotangents `[v, *output]` at each.
        terms: What to divide sums over the rows by for the mean loss.
        kfac_approx: Expand, or reduce.
        all_places: Leave reducing to `Rows.for_factors`.
        needs_inputs: Whether rows of layers with outer products are to have inputs; where not, these have no columns.
        inputs: The rows' inputs where they are known: those of the rows that other cotangents gave for the same calls.
        one_use: Of a tied layer, the calls are all of one use: rows of that alone.

    Raises:
        TypeError: If the handler returned no tensors.
        ValueError: If the calls had different numbers of data, or the handler's rows lack an axis or have other sizes
            than its matrix.
    """
    if isinstance(layer.handler, TiedEmbeddingHandler) and not one_use:
        return _rows_of_both_uses(layer, layer.handler, reached, terms, kfac_approx, all_places, inputs)
    if layer.handler.structure == "elementwise":
        kfac_approx = KFACType.EXPAND  # there are no factors to reduce for: the diagonal is exact
    if all_places and kfac_approx == KFACType.REDUCE:
        every = rows_of_layer(layer, reached, terms, KFACType.EXPAND, False, needs_inputs, inputs, one_use)
        return every.but(reduce=True)
    gradients = [_gradients_of_call(layer, site, g, kfac_approx) for site, g in reached]
    if len(reached) > 1:
        _require_same_data(layer, gradients)
    joint = gradients[0] if len(reached) == 1 else torch.cat(gradients, dim=-2)
    if not needs_inputs and layer.handler.structure == "outer":
        inputs = joint.new_empty(*joint.shape[1:-1], 0)
    elif inputs is None:
        inputs = _inputs_of_layer(layer, [site for site, _ in reached], kfac_approx)
    if len(reached) > 1 and kfac_approx == KFACType.REDUCE and isinstance(inputs, Tensor):
        joint = joint.sum(-2, keepdim=True)
    require_rows_pair(layer, inputs, joint)
    return _same_dtype(inputs, joint, terms)


def _rows_of_both_uses(
    layer: Layer,
    handler: TiedEmbeddingHandler,
    reached: Sequence[tuple[Site, Tensor]],
    terms: Tensor,
    kfac_approx: KFACType,
    all_places: bool,
    inputs: Tensor | OneHot | UnformedRows | None,
) -> Rows:
    """Rows of an embedding's calls, and of the linear layer's with the same weight, of which either may be missing."""
    heads = [(site, g) for site, g in reached if handler.transposes(site.module)]
    lookups = [(site, g) for site, g in reached if not handler.transposes(site.module)]
    other = rows_of_layer(layer, heads, terms, kfac_approx, all_places, one_use=True) if heads else None
    if lookups:
        own = rows_of_layer(layer, lookups, terms, kfac_approx, all_places, inputs=inputs, one_use=True)
        return own.but(transposed=other)
    assert other is not None
    words, width = next(iter(layer.parameters.values())).shape
    nothing = OneHot(torch.zeros(0, 1, dtype=torch.long, device=other.gradients.device), words)
    gradients = other.gradients.new_zeros(other.gradients.shape[0], 0, 1, width)
    return Rows(nothing, gradients, other.terms, transposed=other)


def _gradients_of_call(layer: Layer, site: Site, cotangents: Tensor, kfac_approx: KFACType) -> Tensor:
    gradients = layer.handler.gradient_rows(site.module, cotangents, kfac_approx)
    if not isinstance(layer.handler, TiedEmbeddingHandler):  # whose two uses have matrices that are each other's
        require_gradients_fit(layer, gradients, len(cotangents))
    return as_statistic(gradients)


def _inputs_of_layer(layer: Layer, sites: Sequence[Site], kfac_approx: KFACType) -> Tensor | OneHot | UnformedRows:
    handler, inputs = layer.handler, []
    if len(sites) == 1 and kfac_approx == KFACType.EXPAND:
        (site,) = sites
        unformed = handler.unformed_rows(site.module, site.inputs, site.kwargs, layer.roles)
        if unformed is not None:
            require_inputs_fit(layer, unformed)
            return unformed
    for site in sites:
        a = handler.input_rows(site.module, site.inputs, site.kwargs, layer.roles, kfac_approx)
        if not isinstance(handler, TiedEmbeddingHandler):
            require_inputs_fit(layer, a)
        inputs.append(as_statistic(a) if isinstance(a, Tensor) else a)
    if len(inputs) == 1:
        return inputs[0]
    place = -3 if handler.structure == "elementwise" else -2
    merged = _join(inputs, place)
    averaged = kfac_approx == KFACType.REDUCE and isinstance(merged, Tensor)
    return merged.mean(place, keepdim=True) if averaged and isinstance(merged, Tensor) else merged


def input_squares(layer: Layer, sites: Sequence[Site]) -> Tensor | None:
    """The mean square of each of a layer's inputs, `[*k i]`, over its calls; None: not known."""
    handler = layer.handler
    found = [handler.input_squares(site.module, site.inputs, site.kwargs, layer.roles) for site in sites]
    known = [squares for squares in found if squares is not None]
    return torch.stack(known).mean(0) if known else None


def _same_dtype(inputs: Tensor | OneHot | UnformedRows, gradients: Tensor, terms: Tensor) -> Rows:
    if not isinstance(inputs, OneHot) and inputs.dtype != gradients.dtype:
        dtype = torch.promote_types(inputs.dtype, gradients.dtype)
        inputs, gradients = inputs.to(dtype), gradients.to(dtype)
    return Rows(inputs, gradients, terms.to(gradients.dtype))


def _join(inputs: Sequence[Tensor | OneHot], place: int) -> Tensor | OneHot:
    if all(isinstance(a, Tensor) for a in inputs):
        return torch.cat([a for a in inputs if isinstance(a, Tensor)], dim=place)
    hot = [a for a in inputs if isinstance(a, OneHot)]
    masks = [torch.ones_like(a.indices, dtype=torch.bool) if a.mask is None else a.mask for a in hot]
    return OneHot(torch.cat([a.indices for a in hot], dim=-1), hot[0].size, torch.cat(masks, dim=-1))


def _require_same_data(layer: Layer, gradients: Sequence[Tensor]) -> None:
    data = [g.shape[-3] for g in gradients]
    if len(set(data)) > 1:
        raise ValueError(
            f"the module {layer.name!r} was called {len(data)} times in one forward with {data} data: which of them "
            f"belong together is not known. Exclude it from curvature with a param group that has 'curvature': False"
        )
