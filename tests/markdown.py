"""Code blocks of the README and of the documentation, run as a reader would: one after the other."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import nn


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language, those within admonitions and tabs included."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return ["\n".join(line[len(indent) :] for line in block.split("\n")) for indent, block in found]


def commands(path: Path) -> list[list[str]]:
    """The command lines of a page, without their comments."""
    found = [shlex.split(line, comments=True) for line in "".join(blocks(path, "bash")).splitlines()]
    return [command for command in found if command]


def linked_files(path: Path) -> list[str]:
    """What a page links to, but for addresses; anchors are cut off."""
    text = re.sub(r"<!--.*?-->|^ *```.*?^ *```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [link.split("#")[0] for link in re.findall(r"\]\(([\w./#-]+)\)", text) if link.split("#")[0]]


def run_python(path: Path) -> dict[str, Any]:
    """Run the blocks of a page one after the other in one namespace, which is returned.

    A reader brings along a model, a loss and a loader: `model`, `criterion` and `loader`.
    """
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    loader = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(3)]
    namespace = {"__name__": path.stem, "model": model, "loader": loader, "criterion": nn.CrossEntropyLoss()}
    for number, block in enumerate(blocks(path, "python"), start=1):
        # As in a file of the reader's: without what this file imports from __future__.
        exec(compile(block, f"{path.name}, python block {number}", "exec", dont_inherit=True), namespace)
    return namespace
