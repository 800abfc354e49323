"""Sample space: the Jacobian of all loss terms, whitened, row by row; its kernel without forming it.

`J̃ = Sᵀ J` has a row for every loss term and every column of the square root of its Hessian, scaled so that `J̃ᵀ J̃` is
the curvature of the mean loss. Samples are ordered piece by piece, in each `(k t n)`: columns `k`, positions `t` of a
datum, data `n`.

Of several processes each has the rows of its own data, and samples are those of all, one process after the other: what
is as long as the samples is the same in all of them. The curvature is the mean of the processes' curvatures, so that
the rows of each are divided by the root of their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from kfacopt.linalg.tensors import flat
from kfacopt.replay.double_backward import gradients
from kfacopt.replay.linearization import Piece, Tensors
from kfacopt.replay.metric import Metric
from kfacopt.replay.recorder import ProductRecorder


@dataclass(eq=False)
class RecordedBlock:
    """Rows of one piece with respect to one parameter: `Σ_s g aᵀ`, `a [1|q n s i]`, `g [q n s o]`, `q = (k t)`."""

    a: Tensor
    g: Tensor

    def explicit(self, outputs: slice) -> Tensor:
        """The rows with respect to some of the outputs, `[(q n) (o i)]`."""
        return torch.einsum("qnso,qnsi->qnoi", self.g[..., outputs], self.a).flatten(0, 1).flatten(1)


class SampleSpace:
    """Products with `J̃`, and its kernel `J̃ J̃ᵀ`. Of several processes all must ask for the same.

    Args:
        metric: Of the step.
        max_bytes: Bound on what is held at a time besides the kernel itself.
    """

    def __init__(self, metric: Metric, max_bytes: int) -> None:
        self.metric, self.linearization = metric, metric.linearization
        self.max_bytes = max_bytes
        self._processes = self.linearization.processes
        self._number = self._processes.size
        self._columns = [self._by_position(i, piece) for i, piece in enumerate(self.linearization.pieces)]
        self.sizes = [v.shape[:-1].numel() for v in self._columns]
        self._everybodys = self._processes.gathered(sum(self.sizes))
        self.size, self._before = sum(self._everybodys), sum(self._everybodys[: self._processes.rank])
        self.dimension = sum(p.numel() for p in self.linearization.parameters)
        self.dtype = torch.promote_types(self._columns[0].dtype, self.linearization.parameters[0].dtype)

    def _by_position(self, index: int, piece: Piece) -> Tensor:
        """Cotangents `[k t n c]`."""
        columns = self.metric.columns(index)
        own = columns if self._number == 1 else columns / self._number**0.5
        return rearrange(own, "k (n t) c -> k t n c", t=piece.terms.terms_per_datum)

    def _of_all(self, own: Tensor) -> Tensor:
        """From the rows of this process' samples, `[m ...]`, those of all."""
        return self._processes.rows(own, self._everybodys)

    # -- products --------------------------------------------------------------------------------------------------

    def project(self, rows: Tensors) -> Tensor:
        """`Sᵀ w`, for rows `[m c]` of each piece."""
        return self._of_all(self._projected(rows))

    def _projected(self, rows: Tensors) -> Tensor:
        """The same of this process' samples."""
        parts = []
        for v, w in zip(self._columns, rows, strict=True):
            parts.append(torch.einsum("ktnc,ntc->ktn", v, w.unflatten(0, (-1, v.shape[1]))).flatten())
        return torch.cat(parts)

    def spread(self, samples: Tensor) -> list[Tensor]:
        """`S x` as rows `[m c]` of each piece."""
        parts, own = [], samples.narrow(0, self._before, sum(self.sizes))
        for v, x in zip(self._columns, own.split(self.sizes), strict=True):
            parts.append(torch.einsum("ktnc,ktn->ntc", v, x.view(v.shape[:-1]).to(v.dtype)).flatten(0, 1))
        return parts

    def transposed(self, samples: Tensor) -> list[Tensor]:
        """`J̃ᵀ x`, shaped as the parameters."""
        found = self.linearization.transposed(self.spread(samples))  # a mean over the processes
        return found if self._number == 1 else list(torch._foreach_mul(found, float(self._number)))

    def jacobian(self, vectors: Tensors) -> Tensor:
        """`J̃ v`."""
        return self.project(self.linearization.jacobian(vectors)).to(self.dtype)

    def residual(self) -> Tensor:
        """The shortest `r` for which `S r` is as near as can be to the loss' gradient at the predictions."""
        parts = []
        for v, piece in zip(self._columns, self.linearization.pieces, strict=True):
            u = (piece.gradient / self._number).unflatten(0, (-1, v.shape[1]))
            roots = rearrange(v, "k t n c -> n t c k")
            parts.append(rearrange(_shortest(roots, u), "n t k -> (k t n)"))
        return self._of_all(torch.cat(parts).to(self.dtype))

    # -- the Jacobian itself ---------------------------------------------------------------------------------------

    def kernel(self) -> Tensor:
        """`J̃ J̃ᵀ`, `[N N]`; each process makes its own rows of it, from some columns of everybody's `J̃` at a time."""
        if self._number > 1:
            mine = torch.zeros(sum(self.sizes), self.size, dtype=self.dtype, device=self._columns[0].device)
            for chunk in (*self._recorded_columns(), *self._other_columns()):
                mine.addmm_(chunk, self._of_all(chunk).T)
            return self._of_all(mine)
        result = torch.zeros(self.size, self.size, dtype=self.dtype, device=self._columns[0].device)
        for blocks in self._recorded_blocks():
            for per_piece in blocks:
                self._add_recorded(result, per_piece)
        for chunk in self._other_columns():
            result.addmm_(chunk, chunk.T)
        return result

    def rows(self) -> Tensor:
        """`J̃`, `[N P]`: parameters in their order."""
        return self._of_all(self._own_rows())

    def _own_rows(self) -> Tensor:
        parts: dict[int, Tensor] = {}
        for indices, blocks in zip(self._groups, self._recorded_blocks(), strict=True):
            for index, per_piece in zip(indices, blocks, strict=True):
                parts[index] = torch.cat([block.explicit(slice(None)) for block in per_piece]).to(self.dtype)
        others = self._others
        if others:
            whole = torch.cat(list(self._other_columns()), dim=1)
            sizes = [self.linearization.parameters[i].numel() for i in others]
            parts |= dict(zip(others, whole.split(sizes, dim=1), strict=True))
        return torch.cat([parts[i] for i in sorted(parts)], dim=1)

    def _add_recorded(self, kernel: Tensor, per_piece: Sequence[RecordedBlock]) -> None:
        places = max(block.g.shape[2] for block in per_piece)
        outputs, inputs = per_piece[0].g.shape[-1], per_piece[0].a.shape[-1]
        pairwise = 3 * (self.size * places) ** 2 * kernel.element_size()
        if places**2 * (outputs + inputs) < outputs * inputs and pairwise <= self.max_bytes:
            starts = [0, *torch.tensor(self.sizes).cumsum(0).tolist()]
            for p, left in enumerate(per_piece):
                for q, right in enumerate(per_piece[: p + 1]):
                    block = _pairs(left, right)
                    kernel[starts[p] : starts[p + 1], starts[q] : starts[q + 1]] += block
                    if p != q:
                        kernel[starts[q] : starts[q + 1], starts[p] : starts[p + 1]] += block.T
            return
        for chunk in self._explicit(per_piece):
            kernel.addmm_(chunk, chunk.T)

    def _recorded_columns(self) -> Iterator[Tensor]:
        """Columns of this process' rows for the parameters that have recorded ones."""
        for blocks in self._recorded_blocks():
            for per_piece in blocks:
                yield from self._explicit(per_piece)

    def _explicit(self, per_piece: Sequence[RecordedBlock]) -> Iterator[Tensor]:
        outputs, inputs = per_piece[0].g.shape[-1], per_piece[0].a.shape[-1]
        step = max(1, self._columns_at_once() // inputs)
        for start in range(0, outputs, step):
            yield torch.cat([block.explicit(slice(start, start + step)) for block in per_piece]).to(self.dtype)

    def _columns_at_once(self) -> int:
        return max(1, self.max_bytes // (3 * self.size * torch.finfo(self.dtype).bits // 8))

    # -- recorded products -----------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Find the parameters whose rows recorded products give, and check that they do."""
        parameters = self.linearization.parameters
        exact, needed = self._check()
        told = self._processes.gathered((exact, needed))  # all take the same columns at a time
        exact = set.intersection(*(recorded for recorded, _ in told))
        needed = [max(of_all) for of_all in zip(*(bytes_ for _, bytes_ in told), strict=True)]
        self._others = [i for i in range(len(parameters)) if i not in exact]
        self._groups: list[list[int]] = []
        budget, held = self.max_bytes / 2, math.inf
        for i in sorted(exact):
            if held + needed[i] > budget:
                self._groups.append([])
                held = 0.0
            self._groups[-1].append(i)
            held += needed[i]

    def _recorder(self) -> ProductRecorder:
        recorder = self.linearization.recorder
        assert recorder is not None
        return recorder

    def _recorded_backward(self, piece: Piece, weights: Sequence[Tensor], cotangent: Tensor) -> None:
        with self.linearization.guard():
            self._recorder().backward([piece.prediction], weights, [cotangent])

    def _check(self) -> tuple[set[int], list[float]]:
        """Which parameters' recorded rows are right, and the bytes of all rows of each.

        One random cotangent that is zero for half of the data: rows of that half must be zero (else data are mixed, as
        batch normalisation does), and the rows' sum must be autograd's gradient (else the weight is used elsewhere,
        too, as a tied one may be).
        """
        parameters, generator = self.linearization.parameters, torch.Generator().manual_seed(0)
        exact, needed = set(range(len(parameters))), [0.0] * len(parameters)
        for index, piece in enumerate(self.linearization.pieces):
            v = self._columns[index]
            passes = v.shape[0] * v.shape[1]
            data = v.shape[2]
            alive = (torch.randperm(data, generator=generator) >= data // 2).to(v.device)
            weights = torch.randn(v.shape[:-1], generator=generator, dtype=torch.float64).to(v) * alive
            cotangent = piece.terms.restore(torch.einsum("ktnc,ktn->ntc", v, weights).flatten(0, 1)[None])[0]
            with self.linearization.guard():
                wanted = torch.autograd.grad(
                    piece.prediction, parameters, cotangent, retain_graph=True, allow_unused=True
                )
            self._recorded_backward(piece, parameters, cotangent)
            for i, (parameter, gradient) in enumerate(zip(parameters, wanted, strict=True)):
                sides = self._recorder().take(parameter)
                if gradient is None:
                    continue
                if not sides or not _agree(sides, gradient, alive):
                    exact.discard(i)
                needed[i] += sum(passes * (a.numel() + g.numel()) * g.element_size() for a, g in sides)
        return exact, needed

    def _recorded_blocks(self) -> Iterator[list[list[RecordedBlock]]]:
        """For each group of parameters, for each of them, its rows in every piece."""
        for group in self._groups:
            chosen = [self.linearization.parameters[i] for i in group]
            per_piece = [self._record(index, piece, chosen) for index, piece in enumerate(self.linearization.pieces)]
            yield [[blocks[i] for blocks in per_piece] for i in range(len(group))]

    def _record(self, index: int, piece: Piece, chosen: Sequence[Tensor]) -> list[RecordedBlock]:
        v = self._columns[index]
        seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in chosen]
        for k in range(v.shape[0]):
            for t in range(v.shape[1]):
                cotangent = torch.zeros_like(piece.gradient).unflatten(0, (-1, v.shape[1]))
                cotangent[:, t] = v[k, t]
                self._recorded_backward(piece, chosen, piece.terms.restore(cotangent.flatten(0, 1)[None])[0])
                for sides, parameter in zip(seen, chosen, strict=True):
                    found = self._recorder().take(parameter)
                    if found:
                        sides.append(_joined(found))
        return [_block(sides, p, v) for sides, p in zip(seen, chosen, strict=True)]

    # -- everything else -------------------------------------------------------------------------------------------

    def _other_columns(self) -> Iterator[Tensor]:
        """Columns `[N ...]` of `J̃` for the parameters without recorded rows, in their order."""
        parameters = self.linearization.parameters
        whole = sum(parameters[i].numel() for i in self._others)
        if whole > self.size and whole <= self._columns_at_once():
            yield self._rows_one_by_one()
            return
        step = min(64, self._columns_at_once())
        for i in self._others:
            for start in range(0, parameters[i].numel(), step):
                columns = self.linearization.jacobian_columns(i, slice(start, start + step))
                projected = [self._projected(list(rows)) for rows in zip(*columns, strict=True)]
                yield torch.stack(projected, dim=1).to(self.dtype)

    def _rows_one_by_one(self) -> Tensor:
        chosen = [self.linearization.parameters[i] for i in self._others]
        rows = []
        for v, piece in zip(self._columns, self.linearization.pieces, strict=True):
            for k, t, n in torch.cartesian_prod(*(torch.arange(size) for size in v.shape[:-1])).tolist():
                cotangent = torch.zeros_like(piece.gradient).unflatten(0, (-1, v.shape[1]))
                cotangent[n, t] = v[k, t, n]
                at_prediction = piece.terms.restore(cotangent.flatten(0, 1)[None])[0]
                rows.append(
                    flat(gradients([piece.prediction], chosen, [at_prediction], self.linearization.guard)).to(
                        self.dtype
                    )
                )
        return torch.stack(rows)


def _shortest(roots: Tensor, u: Tensor) -> Tensor:
    """The shortest `r [n t k]` with `Σ_k roots_k r_k` nearest to `u`, for `roots [n t c k]`."""
    if roots.shape[-1] == 1 and roots.shape[-2] == 1:
        root = roots[..., 0]
        return torch.where(root != 0.0, u / torch.where(root != 0.0, root, 1.0), 0.0)
    shortest: Tensor = (torch.linalg.pinv(roots) @ u.unsqueeze(-1)).squeeze(-1)
    return shortest


def _pairs(left: RecordedBlock, right: RecordedBlock) -> Tensor:
    """`[(q n) (r m)]`: sums over both's places of `(a·a') (g·g')`."""
    inner = torch.einsum("qnsi,rmti->qnsrmt", left.a, right.a)
    return (inner * torch.einsum("qnso,rmto->qnsrmt", left.g, right.g)).sum((2, 5)).flatten(0, 1).flatten(1)


def _joined(sides: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(sides) == 1:
        return sides[0]
    return torch.cat([a for a, _ in sides], dim=1), torch.cat([g for _, g in sides], dim=1)


def _block(sides: Sequence[tuple[Tensor, Tensor]], parameter: Tensor, v: Tensor) -> RecordedBlock:
    passes, data = v.shape[0] * v.shape[1], v.shape[2]
    if not sides:  # this piece does not depend on the parameter
        outputs = parameter.shape[0]
        return RecordedBlock(
            v.new_zeros(1, data, 1, parameter.numel() // outputs),
            v.new_zeros(1, data, 1, 1).expand(passes, -1, -1, outputs),
        )
    first = sides[0][0]
    same = all(a.data_ptr() == first.data_ptr() and a.shape == first.shape for a, _ in sides)
    a = first.unsqueeze(0) if same else torch.stack([a for a, _ in sides])
    return RecordedBlock(a, torch.stack([g for _, g in sides]))


def _agree(sides: Sequence[tuple[Tensor, Tensor]], gradient: Tensor, alive: Tensor) -> bool:
    total, size = gradient.new_zeros(()), gradient.new_zeros(())
    for a, g in sides:
        if len(a) != len(alive) or len(g) != len(alive):
            return False
        dead = ~alive
        if bool((g[dead].abs().amax((1, 2)) * a[dead].abs().amax((1, 2)) != 0.0).any()):
            return False
        total = total + torch.einsum("nso,nsi->oi", g, a)
        size = size + torch.einsum("nso,nsi->oi", g.abs(), a.abs())
    tolerance = 1e2 * torch.finfo(gradient.dtype).eps  # rounding of a sum, whose terms may cancel
    return bool((total.view_as(gradient) - gradient).norm() <= tolerance * size.norm())
