"""What the README shows works."""

from __future__ import annotations

from pathlib import Path

import pytest
from train import compose

from tests.markdown import blocks, commands, linked_files, run_python

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def test_python_blocks_run_one_after_the_other() -> None:
    assert len(blocks(README, "python")) >= 2
    run_python(README)


@pytest.mark.parametrize("command", commands(README), ids=" ".join)
def test_commands_name_scripts_and_settings_that_exist(command: list[str]) -> None:
    check_command(command)


def check_command(command: list[str]) -> None:
    """Scripts exist, and the settings of a run compose."""
    files = [word for word in command if word.startswith(("scripts/", "examples/"))]
    assert all((ROOT / file).is_file() for file in files)
    overrides = [word for word in command if "=" in word and not word.startswith("resume=")]
    if files and "-m" not in command:
        name = "compare" if files[0] == "scripts/compare" else "train"
        compose("suite" if any(word.startswith("suite=") for word in overrides) else name, overrides)


@pytest.mark.parametrize("file", linked_files(README))
def test_linked_files_exist(file: str) -> None:
    assert (ROOT / file).exists()
