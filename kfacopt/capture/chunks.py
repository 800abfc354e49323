"""From a prediction's cotangents to the rows of the layers, so many cotangents at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from kfacopt.capture.records import Site
from kfacopt.capture.rows import input_squares, rows_of_layer
from kfacopt.layers.base import OneHot, Rows
from kfacopt.layers.layer import Layer
from kfacopt.layers.unformed import UnformedRows
from kfacopt.likelihoods import KFACType

Reached = Mapping[Layer, Sequence[tuple[Site, Tensor]]]
"""Cotangents `[v, *output]` at the calls of each layer."""

# On a processor, cotangents go through the graph together as long as they fit into its cache; beyond, a batched pass is
# the slower one (CNN 16/32/32, batch 128, ten cotangents of 14 MB: 147 ms batched, 81 ms one by one).
_CACHED = 2**24


def split_cotangents(cotangents: Iterable[Tensor], sites: Iterable[Site], byte_budget: int = 2**28) -> Iterator[Tensor]:
    """Cotangents in chunks that are no larger than is fast and than the memory allows, but one vector at least.

    Args:
        cotangents: `[v, *prediction]`, each in one piece or several.
        sites: The calls that they are brought to.
        byte_budget: Bound on what a chunk takes at the outputs of all calls. An accelerator, which is the faster the
            more it is given at a time, is at full speed long before the default of 256 MB.
    """
    elements = sum(site.shape.numel() for site in sites)
    for some in cotangents:
        limit = min(byte_budget, _CACHED) if some.device.type == "cpu" else byte_budget
        yield from some.split(max(1, limit // max(1, elements * some.element_size())))


def rows_in_chunks(
    cotangents: Iterable[Tensor],
    reach: Callable[[Tensor], Reached],
    terms: Tensor,
    kfac_approx: KFACType,
    all_places: bool = False,
    needs_inputs: bool = True,
    needs_squares: bool = False,
) -> Iterator[tuple[Tensor, dict[Layer, Rows]]]:
    """The rows of every layer that cotangents reach, chunk by chunk; a layer's inputs are built once.

    Args:
        cotangents: Chunks `[v, *prediction]` of the cotangents of one prediction.
        reach: Brings a chunk to the calls of the layers.
        terms: What to divide sums over the rows by for the mean loss.
        kfac_approx, all_places, needs_inputs: See `rows_of_layer`.
        needs_squares: Whether a layer's first rows are to have the mean squares of its inputs, where they are known.

    Yields:
        The chunk, and each reached layer's rows; all but a layer's first have `first=False`.

    Raises:
        ValueError: If the calls of a layer had different numbers of data.
    """
    inputs: dict[tuple[Site, ...], Tensor | OneHot | UnformedRows] = {}
    counted: set[Layer] = set()
    for some in cotangents:
        rows: dict[Layer, Rows] = {}
        for layer, reached in reach(some).items():
            sites = tuple(site for site, _ in reached)
            made = rows_of_layer(layer, reached, terms, kfac_approx, all_places, needs_inputs, inputs.get(sites))
            inputs[sites] = made.held_inputs
            if layer in counted:
                made = _not_first(made)
            elif needs_squares and layer.handler.structure == "outer":
                made = made.but(squares=input_squares(layer, sites))
            rows[layer] = made
            counted.add(layer)
        yield some, rows


def _not_first(rows: Rows) -> Rows:
    other = None if rows.transposed is None else rows.transposed.but(first=False)
    return rows.but(first=False, transposed=other)
