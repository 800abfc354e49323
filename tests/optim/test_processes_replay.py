"""Steps that go by forwards which are run again: each of two processes has its own, and the step is of all data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import kfacopt
from kfacopt.replay.metric import Metric
from tests.optim.test_processes import (
    CE,
    MSE,
    Batch,
    Make,
    in_halves,
    make_batches,
    make_net,
    optimizer,
    plain,
    seeded,
    share,
    squared,
    train,
    weighted,
    weights_of,
)
from tests.processes import Found, alone, run_together


def natural(loss: nn.Module | None = None, **options: Any) -> Make:
    """`NaturalGradient` to the solution of its system."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        given = {key: value() if callable(value) else value for key, value in options.items()}
        given = {"solver": kfacopt.CG(tolerance=1e-14, progress=None), "damping": 0.1} | given
        return kfacopt.NaturalGradient(model, CE() if loss is None else loss, **given)

    return make


def uneven(batch: Batch) -> Batch:
    """Three data of eight in the first process, five in the second."""
    part = slice(0, 3) if distributed.get_rank() == 0 else slice(3, None)
    return batch[0][part], batch[1][part]


SUMS = CE(reduction="sum")
# Those whose steps go by forwards that are run again: what is trained, and the backward.
REPLAYED: dict[str, tuple[Make, Callable[[nn.Module, Batch], None]]] = {
    "natural": (natural(), plain(CE())),
    "natural-hessian": (natural(curvature="hessian", damping=1.0), plain(CE())),
    "natural-empirical": (natural(curvature="empirical"), plain(CE())),
    "natural-sum": (natural(SUMS), plain(SUMS)),
    "natural-squared": (natural(MSE()), squared),
    "natural-weighted": (natural(), weighted),
    "natural-accumulation": (natural(), in_halves),
    "natural-searched": (
        natural(
            line_search=kfacopt.GridLineSearch,
            acceleration=kfacopt.GeodesicAcceleration,
            damping_rule=lambda: kfacopt.LevenbergMarquardt(every=1),
        ),
        plain(CE()),
    ),
    "natural-backtracked": (
        natural(solver=lambda: kfacopt.CG(5, 1e-14, None, warm_start=0.95, backtracking=1.3)),
        plain(CE()),
    ),
    "gram": (natural(solver=kfacopt.Gram), plain(CE())),
    "gram-remembering": (natural(solver=lambda: kfacopt.Gram(momentum=0.9), weight_decay=0.1), weighted),
    "gram-of-parameters": (natural(solver=kfacopt.Gram), plain(CE())),
    "gram-accumulation": (natural(solver=kfacopt.Gram), in_halves),
    "gram-searched": (
        natural(
            MSE(),
            solver=kfacopt.Gram,
            line_search=kfacopt.GridLineSearch,
            acceleration=kfacopt.GeodesicAcceleration,
            damping_rule=lambda: kfacopt.LevenbergMarquardt(every=1),
        ),
        squared,
    ),
    "auto": (optimizer(lr="auto", damping=0.1), plain(CE())),
    "auto-ekfac": (optimizer(kfacopt.EKFAC, lr="auto", damping=0.1), plain(CE())),
    "line-search": (optimizer(step_length=kfacopt.GridLineSearch, lr=1.0, damping=0.1), plain(CE())),
}


def replays_equal_one_process(name: str) -> None:
    make, backward = REPLAYED[name]
    batches = make_batches(4, 96 if name == "gram-of-parameters" else 8)
    one, reference = train(make, batches, backward, alone())
    two, made = train(make, [share(batch) for batch in batches], backward, None)
    torch.testing.assert_close(weights_of(two), weights_of(one), rtol=1e-12, atol=1e-12)
    assert float((weights_of(two) - weights_of(make_net())).norm()) > 1e-3
    # Not the number of iterations: at the end of the tolerance that is rounding's to say.
    for key in ("damping", "rho", "step_size", "alpha", "mu", "kl", "backtracked", "samples", "parameter_space"):
        if key in reference.health():
            assert made.health()[key] == pytest.approx(reference.health()[key], rel=1e-8), key


def chain() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))


def half_the_sum(model: nn.Module, batch: Batch) -> None:
    """What the engine's mean over two processes is."""
    (0.5 * nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")).backward()


# What is trained, the backward in one process and in two, and which share of a batch a process has.
Trained = tuple[Make, Callable[[nn.Module, Batch], None], Callable[[nn.Module, Batch], None], Callable[[Batch], Batch]]
NEWTON: dict[str, Trained] = {
    "exact": (
        lambda model: kfacopt.TrustRegionNewton(model, CE(), kfacopt.ExactTrustRegion()),
        plain(CE()),
        plain(CE()),
        share,
    ),
    "default": (lambda model: kfacopt.TrustRegionNewton(model, MSE(), radius=0.5), squared, squared, share),
    "weighted": (lambda model: kfacopt.TrustRegionNewton(model, CE(), radius=0.5), weighted, weighted, share),
    "uneven": (lambda model: kfacopt.TrustRegionNewton(model, SUMS), half_the_sum, plain(SUMS), uneven),
}


def newton_equals_one_process() -> None:
    for name, (make, in_one, in_two, own) in NEWTON.items():
        batches = make_batches(3)
        one, reference = train(make, batches, in_one, alone(), net_of=chain)
        two, made = train(make, [own(batch) for batch in batches], in_two, None, net_of=chain)
        torch.testing.assert_close(weights_of(two), weights_of(one), rtol=1e-12, atol=1e-12, msg=name)
        assert float((weights_of(two) - weights_of(chain())).norm()) > 1e-2
        for key in ("radius", "rho", "accepted", "strategy"):
            assert made.health()[key] == pytest.approx(reference.health()[key], rel=1e-6), (name, key)


def a_second_backward_of_one_process_is_refused_by_all() -> None:
    net = chain()
    model = DistributedDataParallel(net)
    made, batch = kfacopt.TrustRegionNewton(model, CE()), share(make_batches(1)[0])
    model.require_backward_grad_sync = False
    for _ in range(1 + distributed.get_rank()):
        plain(CE())(model, batch)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = weights_of(net)
    with pytest.raises(RuntimeError, match="2 backwards have reached the model"):
        made.step()
    assert torch.equal(weights_of(net), before)


def sums_may_be_of_unlike_many_data() -> None:
    squares = MSE(reduction="sum")
    for loss, backward, options in (
        (SUMS, plain(SUMS), {}),
        (squares, squared_sum, {}),
        (squares, squared_sum, {"solver": kfacopt.Gram}),
    ):
        make, batches = natural(loss, **options), make_batches(4)
        one, _ = train(make, batches, backward, alone())
        two, _ = train(make, [uneven(batch) for batch in batches], backward, None)
        torch.testing.assert_close(weights_of(two), weights_of(one), rtol=1e-12, atol=1e-12)


def squared_sum(model: nn.Module, batch: Batch) -> None:
    target = nn.functional.one_hot(batch[1], 3).double()
    nn.functional.mse_loss(model(batch[0]), target, reduction="sum").backward()


def labels_are_drawn_by_every_process_anew() -> None:
    """Of the same data, too, and in every step; the step is one all the same."""
    drawn: list[Tensor] = []
    scaled_columns = Metric._scaled_columns

    def noting(metric: Metric, piece: Any) -> Tensor:
        drawn.append(scaled_columns(metric, piece))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Metric, "_scaled_columns", noting)
        train(natural(curvature="mc"), [make_batches(1)[0]] * 2, plain(CE()), None)
    assert len(drawn) == 2
    own = torch.stack([(columns < 0).double() for columns in drawn])  # which class was drawn, by sign
    everybodys = [torch.empty_like(own) for _ in range(2)]
    distributed.all_gather(everybodys, own)
    labels = [*everybodys[0], *everybodys[1]]
    assert not any(torch.equal(a, b) for i, a in enumerate(labels) for b in labels[:i])


def a_preconditioner_is_of_all_data() -> None:
    """Its labels are drawn, so that the number of products differs and the solution does not."""
    make = natural(solver=lambda: kfacopt.CG(tolerance=1e-14, progress=None, preconditioner=kfacopt.KFACBackend(1, 1)))
    batches = make_batches(3)
    one, _ = train(make, batches, plain(CE()), alone())
    two, _ = train(make, [share(batch) for batch in batches], plain(CE()), None)
    torch.testing.assert_close(weights_of(two), weights_of(one), rtol=1e-9, atol=1e-10)


def a_process_without_a_forward_is_refused() -> None:
    """By all of them, before anything moves."""
    for make in (natural(), optimizer(lr="auto")):
        net = make_net()
        model = DistributedDataParallel(net)
        made, before = make(model), weights_of(net).clone()
        model.require_backward_grad_sync = False
        if distributed.get_rank() == 0:
            plain(CE())(model, share(make_batches(1)[0]))
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match="not every process had one with a loss"):
            made.step()
        assert torch.equal(weights_of(net), before)


def a_forward_that_is_another_is_refused_by_all() -> None:
    for make in (natural(), optimizer(lr="auto", damping=0.1)):
        net = make_net()
        model = DistributedDataParallel(net)
        made = make(model)
        x, y = share(make_batches(1)[0])
        nn.functional.cross_entropy(model(x), y).backward()
        if distributed.get_rank() == 1:
            x.add_(1.0)
        with pytest.raises(RuntimeError, match="run again with the same inputs"):
            made.step()


CHECKS: dict[str, Callable[[], None]] = {
    **{f"equal: {name}": partial(replays_equal_one_process, name) for name in REPLAYED},
    **{
        check.__name__: check
        for check in (
            newton_equals_one_process,
            a_second_backward_of_one_process_is_refused_by_all,
            sums_may_be_of_unlike_many_data,
            labels_are_drawn_by_every_process_anew,
            a_preconditioner_is_of_all_data,
            a_process_without_a_forward_is_refused,
            a_forward_that_is_another_is_refused_by_all,
        )
    },
}


@pytest.fixture(scope="module")
def found() -> Found:
    return run_together(CHECKS, seconds=300.0)


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(found: Found, name: str) -> None:
    for rank, said in enumerate(found[name]):
        assert said == "", f"process {rank}: {said}"
