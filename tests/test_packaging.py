"""The wheel: what is in it, and that it does what the README's first lines promise with nothing of this folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# `-I` leaves the environment's and the script's folders out of sys.path, and with them an editable installation's
# finder would still be there: what is imported must come from the unpacked wheel.
SWAP = """
import sys
sys.path.insert(0, {unpacked!r})
import torch
from torch import nn
import kfacopt
assert kfacopt.__file__.startswith({unpacked!r}), kfacopt.__file__

torch.manual_seed(0)
x = torch.randn(256, 4)
y = x[:, :3].argmax(1)
loader = [(x, y)] * 40
model, last = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)), []
{swap}
    last.append(loss.item())
assert last[-1] < 0.9 * last[0], last
"""


def first_block() -> str:
    found = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert found is not None
    return found.group(1)


@pytest.mark.slow
def test_a_wheel_runs_the_swap(tmp_path: Path) -> None:
    source, built, unpacked = tmp_path / "source", tmp_path / "dist", tmp_path / "unpacked"
    # A copy: a build leaves files beside the sources.
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "kfacopt", source / "kfacopt", ignore=shutil.ignore_patterns("__pycache__"))
    # The source distribution, and the wheel from that: what is missing in the first is missing in the second.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(built), str(source)]
    result = subprocess.run(build, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(unpacked)
    inside = {Path(name).parts[1] for name in names if name.startswith("kfacopt/")}
    assert not inside & {"experiments", "docs"}
    assert {"__init__.py", "py.typed", "optim", "operators", "lightning"} <= inside
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "kfacopt").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == {
        name for name in sources if not name.startswith(("kfacopt/experiments/", "kfacopt/docs/"))
    }
    code = SWAP.format(unpacked=str(unpacked), swap=first_block())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = [sys.executable, "-I", "-W", "error", "-c", code]
    subprocess.run(run, cwd=tmp_path, env=environment, check=True, timeout=600)
