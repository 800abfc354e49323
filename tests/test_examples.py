"""Every example runs, in short mode, without a warning of our making, and prints what it promises."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import kfacopt
from tests.example import example
from tests.processes import ROOT, forked

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

FRESH = ("-m", "tests.example")
"""What starts an example in an interpreter of its own."""


def run(name: str, launcher: Sequence[str] | None = None, *arguments: str, **environment: str) -> str:
    """What an example prints, in its short mode.

    With a launcher, which comes between Python and the example's path, it has an interpreter of its own; without, a
    process that is forked from one that has imported torch and us, which would be half of what an example takes.
    """
    path = str(ROOT / "examples" / f"{name}.py")
    if launcher is not None:
        result = subprocess.run(
            [sys.executable, *launcher, path, *arguments],
            env=os.environ | {"KFACOPT_SHORT": "1", "PYTHONPATH": str(ROOT)} | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, stream) for stream in ("stdout", "stderr")]
        process = forked(_forked, path, *said)
        process.start()
        process.join(300)
        process.kill()
        process.join()
        out, errors = (file.read_text() for file in said)
        assert process.exitcode == 0, out + errors
        return out


def _forked(path: str, *said: Path) -> None:
    for stream, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.environ["KFACOPT_SHORT"] = "1"
    os.chdir(ROOT)
    example(path)


def numbers(text: str, pattern: str) -> list[float]:
    """The numbers that the groups of the pattern capture, line by line."""
    found = re.findall(pattern, text, re.MULTILINE)
    assert found, f"{pattern!r} is not in\n{text}"
    return [float(x) for group in found for x in ([group] if isinstance(group, str) else group)]


def test_every_example_is_tested() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES} <= tested


def test_swap() -> None:
    adamw, ekfac = numbers(run("swap", FRESH), r"AdamW (\d\S*), EKFAC (\d\S*)")
    assert ekfac < 0.9 * adamw


def test_distributed() -> None:
    """By torchrun in two processes, which hold all parameters or a part of each, and in one."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pattern = r"^(\d) processes: loss (\S+) -> (\S+), length of the weights (\S+)$"
    one = numbers(run("distributed"), pattern)
    assert one[0] == 1
    assert one[2] < one[1]
    for engine in ("ddp", "fsdp2"):
        together = run("distributed", torchrun, engine, OMP_NUM_THREADS="1")
        two = numbers(together, pattern)
        assert two[0] == 2
        assert two[1:] == pytest.approx(one[1:], rel=1e-4)
        assert "the curvature of 3 layers" in together


def test_custom_direction() -> None:
    found = numbers(run("custom_direction"), r"loss (\d\S*), largest divergence of a step (\d\S*)")
    (newton, _), (sign, divergence) = zip(found[::2], found[1::2], strict=True)
    assert newton < sign < 2.0
    assert divergence <= 0.5 * 0.03 + 1e-4  # half of kl_clip


def test_custom_backend() -> None:
    table = dict(re.findall(r"^(\S.*?) {2,}(.*)$", run("custom_backend"), re.MULTILINE))
    losses = {name: [float(x) for x in row.split()[:-1]] for name, row in table.items() if "epoch" not in name}
    assert losses["KFAC"][-1] < losses["AdamW"][-1]
    assert losses["diagonal Fisher"][-1] < 0.5 * losses["diagonal Fisher"][0]
    if "curvlinops KFAC" in losses:
        assert losses["curvlinops KFAC"][-1] < losses["AdamW"][-1]
    else:
        with pytest.raises(ImportError):
            import curvlinops  # noqa: F401


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # of linear_operator
@pytest.mark.parametrize("shared", [False, True])
def test_diagonal_fisher_of_custom_backend_is_the_diagonal(shared: bool) -> None:
    """Of one batch, all places of a convolution or none, against the dense Fisher in float64."""
    DiagonalFisher = runpy.run_path(str(ROOT / "examples" / "custom_backend.py"))["DiagonalFisher"]
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)] if shared else [nn.Linear(9, 3)]
    model = nn.Sequential(*layers).double()
    x = torch.randn(4, *((1, 3, 3) if shared else (9,)), dtype=torch.float64)
    criterion, backend = nn.CrossEntropyLoss(), DiagonalFisher()
    optimizer = kfacopt.SecondOrderOptimizer(model, criterion, backend=backend, damping=0.01, curvature="ggn")
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    prediction = model(x)
    criterion(prediction, torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    optimizer.close()
    p = prediction.detach().softmax(-1)
    hessians = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    jacobians = torch.func.jacrev(lambda q: torch.func.functional_call(model, q, (x,)))(parameters)
    for name, average in backend.averages.items():
        weight, bias = (
            torch.einsum("nc...,ncd,nd...->...", j, hessians, j) / len(x)
            for j in (jacobians[f"{name}.weight"], jacobians[f"{name}.bias"])
        )
        want = torch.cat([weight.flatten(1), bias.unsqueeze(1)], dim=1)
        torch.testing.assert_close(average, want, rtol=1e-10, atol=1e-12)


def test_custom_layer() -> None:
    output = run("custom_layer")
    assert "the handler's rows give autograd's gradients" in output
    without, handled = numbers(output, r"training loss after \d+ steps: (\S+)")
    assert handled < without
    assert "no handler for Bilinear" in output
    assert "BilinearHandler on Bilinear" in output


def test_lightning_callback() -> None:
    output = run("lightning_callback")
    curves = numbers(output, r"validation loss (\S+) -> (\S+)$")
    assert len(curves) == 6
    adamw, returned, swapped = curves[1::2]
    assert max(returned, swapped) < adamw
    assert returned == pytest.approx(swapped, rel=1e-3)
    assert output.count("curvature/damping") == 2


@pytest.mark.slow
def test_huggingface_trainer() -> None:
    if not all(importlib.util.find_spec(name) for name in ("transformers", "accelerate")):
        script = [sys.executable, str(ROOT / "examples" / "huggingface_trainer.py")]
        said = subprocess.run(script, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert said.returncode == 1
        assert re.search(r"this example needs .*: pip install transformers accelerate", said.stderr)
        return
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    losses = numbers(run("huggingface_trainer", launcher=(), PYTHONPATH=path), r"the last (\S+)")
    assert losses[1] < losses[0]  # GPT-2: ours, AdamW
    assert losses[3] < losses[2]  # BERT


def test_huggingface_style() -> None:
    output = run("huggingface_style")
    losses = numbers(output, r"EKFAC +step +\d+ +loss (\S+)$")
    assert losses[-1] < losses[0]
    assert "EmbeddingHandler" in output


def test_amp_and_accumulation() -> None:
    rows = re.findall(r"^(\w+), (\d) x \d+ +(.*)$", run("amp_and_accumulation"), re.MULTILINE)
    losses = {(kind, int(parts)): [float(x) for x in row.split()] for kind, parts, row in rows}
    assert losses["float32", 1][:3] == pytest.approx(losses["float32", 4][:3], rel=1e-4)
    assert losses["bfloat16", 1][:3] == pytest.approx(losses["float32", 1][:3], rel=0.05)
    for row in losses.values():
        assert row[-1] < 0.05 * row[0]


def test_resume() -> None:
    assert "every loss equal: True, every weight equal: True" in run("resume")


def test_param_groups() -> None:
    output = run("param_groups")
    assert re.search(r"^embedding +weight +AdamW +its param group has 'curvature': False", output, re.MULTILINE)
    first, *_, last = numbers(output, r"training loss (\S+)")
    assert last < first
    (damping,) = numbers(output, r"^ +damping +(\S+)$")
    assert damping > 0


def test_hessian_spectrum() -> None:
    rows = re.findall(r"^  (Hessian|GGN|EKFAC) +(.*)$", run("hessian_spectrum"), re.MULTILINE)
    early = {name: [float(x) for x in row.split()[:4]] for name, row in rows[:3]}
    low, high, trace, norm = zip(*(early[name] for name in ("Hessian", "GGN", "EKFAC")), strict=True)
    assert low[0] < -0.01 < min(low[1:])
    assert high[2] <= 1.01 * high[1]
    assert trace[2] == pytest.approx(trace[1], rel=0.05)  # one is an estimate
    assert norm[2] < 1.05 * norm[1]


def test_corrected_eigenvalues() -> None:
    output = run("corrected_eigenvalues")
    kfac, ekfac = (numbers(output, rf"^{name} +(\S+) +(\S+) +(\S+)$") for name in ("KFAC", "EKFAC"))
    assert ekfac[0] < kfac[0]
    assert ekfac[2] == 1.0  # the Fisher's own second moments, to the digits that are printed
    assert kfac[2] > 1.5


def test_steps_on_a_slice() -> None:
    output = run("steps_on_a_slice")
    sgd, adam, natural = numbers(output, r"loss after \d+ steps: (\S+)$")
    assert natural < min(sgd, adam)


def test_influence() -> None:
    output = run("influence")
    rows = re.findall(r"^(held-out influence|self-influence|loss|random) +(.*)$", output, re.MULTILINE)
    found = {name: [float(x.rstrip("%")) for x in row.split()] for name, row in rows}
    (without,) = numbers(output, r"^\(nothing\) +(\S+)")
    for name in ("held-out influence", "self-influence"):
        area, precision, loss, _ = found[name]
        assert area > found["random"][0] + 0.2
        assert precision > found["random"][1] + 20.0
        assert loss < without


def test_laplace() -> None:
    rows = re.findall(r"^(trained|Laplace) +(\S+) +(\S+)%", run("laplace"), re.MULTILINE)
    (trained, _), (laplace, _) = ([float(x) for x in row[1:]] for row in rows)
    assert laplace < 0.95 * trained


def test_deep_chain() -> None:
    output = run("deep_chain")
    depths = numbers(output, r"^ +(\d+) +\d\S+ +\S+$")
    residuals = numbers(output, r"^ +\d+ +\d\S+ +(\S+)$")
    assert depths == [4, 16, 64]
    assert max(residuals) < 1e-10
    newton, adamw, sgd = numbers(output, r"^(?:TrustRegionNewton|AdamW|SGD) +(\d+) steps")
    assert newton < min(adamw, sgd)


def test_pinn_poisson() -> None:
    output = run("pinn_poisson")
    (error,) = numbers(output, r"^relative L2 error: (\S+)$")
    assert error < 1e-5  # after 3 s; on an idle machine below 1e-8


def test_pinn_heat() -> None:
    output = run("pinn_heat")
    adam, lbfgs, ours = (numbers(output, rf"^{name} .* (\S+)$")[0] for name in ("adam", "lbfgs", "natural_gradient"))
    assert ours < 0.1 * min(adam, lbfgs)


def test_least_squares() -> None:
    gradients = numbers(run("least_squares"), r"natural gradient .* (\S+)$")
    assert len(gradients) == 2
    assert max(gradients) < 0.1
