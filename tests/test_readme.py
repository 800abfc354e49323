"""What the README shows works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn
from train import compose

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in "".join(blocks("bash")).splitlines()]


def test_python_blocks_run_one_after_the_other() -> None:
    # What a reader brings along: a model and a loader.
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    loader = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(3)]
    namespace = {"__name__": "readme", "model": model, "loader": loader}
    assert len(blocks("python")) >= 2
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_name_scripts_and_settings_that_exist(command: list[str]) -> None:
    files = [word for word in command if word.startswith("scripts/")]
    assert all((ROOT / file).is_file() for file in files)
    overrides = [word for word in command if "=" in word and not word.startswith("resume=")]
    if files and "-m" not in command:
        name = "compare" if files[0] == "scripts/compare" else "train"
        compose("suite" if any(word.startswith("suite=") for word in overrides) else name, overrides)


@pytest.mark.parametrize("file", re.findall(r"\]\(([\w./-]+)\)", re.sub(r"<!--.*?-->", "", README, flags=re.DOTALL)))
def test_linked_files_exist(file: str) -> None:
    assert (ROOT / file).exists()
