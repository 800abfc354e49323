"""Where there is no terminal, a long run says how far it is."""

from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path

import bench_chain
import compare
import progress
import pytest
import train
from rich.console import Console


def test_a_file_gets_a_line_every_so_often() -> None:
    console = Console(file=io.StringIO(), width=40)
    count = iter(range(1000))
    with progress.told(lambda: f"number {next(count)} [of many] " + 40 * "x", console, every=0.01):
        time.sleep(0.2)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    lines = written.splitlines()
    assert len(lines) >= 2
    assert lines[0].endswith("number 0 [of many] " + 40 * "x")  # neither markup nor wrapped
    time.sleep(0.05)
    assert console.file.getvalue() == written  # type: ignore[attr-defined]


def test_a_terminal_has_its_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with progress.told(lambda: "never", console, every=0.001):
        time.sleep(0.02)
    assert "never" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_items_are_counted_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.told.__wrapped__, "__defaults__", (0.01,))
    console = Console(file=io.StringIO(), width=80)
    done = []
    for item in progress.counted(["a", "b"], lambda item: f"item {item}", console):
        ends = time.monotonic() + 30.0
        while f"item {item}" not in console.file.getvalue() and time.monotonic() < ends:  # type: ignore[attr-defined]
            time.sleep(0.01)
        done.append(item)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert done == ["a", "b"]
    assert lines[0].endswith("1 of 2: item a")
    assert lines[-1].endswith("2 of 2: item b")
    assert all("item" in line for line in lines)  # no bar


def test_items_have_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.told.__wrapped__, "__defaults__", (0.001,))
    console = Console(file=io.StringIO(), force_terminal=True)
    assert list(progress.counted(range(3), lambda _: "never", console)) == [0, 1, 2]
    assert "never" not in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's forward mode, of torch's own jit
@pytest.mark.parametrize("script", ["bench_step", "bench_operators", "bench_chain"])
def test_measurements_say_how_far_they_are(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.told.__wrapped__, "__defaults__", (0.05,))
    arguments = {
        "bench_step": ["--batch-size", "64", "--steps", "4", "--turn", "2", "--repeats", "1", "--only", "KFAC"],
        "bench_operators": ["--seconds", "0.1", "--threads", "1", "--only", "KFAC, mc"],
        "bench_chain": ["--repeats", "1", "--only", bench_chain.SIZES[0].key],
    }
    monkeypatch.setattr(sys, "argv", [script, *arguments[script]])
    __import__(script).main()
    said = capsys.readouterr().out
    told = {"bench_step": "repeat 1 of 1", "bench_operators": "KFAC, mc", "bench_chain": "batch, width, depth"}
    assert re.search(rf"(?m)^\[ *\d+ s\] \d+ of \d+: {told[script]}", said)
    assert "\r" not in said


def test_a_failing_run_ends_the_lines() -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(KeyError), progress.told(lambda: "line", console, every=0.001):
        raise KeyError("run")


def test_a_comparison_names_everybodys_loss() -> None:
    configs = compare.entries(["task=regression", "device=cpu", "optimizers=[sgd,adamw]"])
    data = train.build_data(configs["sgd"])
    racing = compare.lanes(configs, data, compare.torch.device("cpu"))
    assert compare.standings(racing, 5.0) == "0 of 5 s each, loss: not measured yet"
    for lane in racing:
        lane.measure(compare.measured_rows(configs["sgd"], data, lane.device))
    sgd, adamw = (f"{lane.record.curve[-1].loss:.4g}" for lane in racing)
    assert compare.standings(racing, 5.0) == f"0 of 5 s each, loss: sgd {sgd}, adamw {adamw}"


def test_a_training_run_says_epoch_step_and_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.told.__wrapped__, "__defaults__", (0.001,))
    overrides = ["task=regression", "optimizer=sgd", "trainer.max_epochs=2", "trainer.accelerator=cpu"]
    train.train(train.compose("train", [f"folder={tmp_path}", *overrides]))
    said = capsys.readouterr().out
    assert "epoch 2 of 2, step " in said
    assert ", loss " in said
    assert "\r" not in said  # no bar
