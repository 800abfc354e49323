"""What importing the package needs, and what asks for an extra."""

from __future__ import annotations

import importlib.abc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kfacopt.operators import GGNLinearOperator, IdentityLinearOperator, plot_spectral_density
from kfacopt.optional import required


def test_importing_kfacopt_takes_little_beyond_torch() -> None:
    """Nothing is loaded that torch has not loaded already, but what we are made of."""
    code = (
        "import sys, torch; before = set(sys.modules); import kfacopt; new = set(sys.modules) - before; "
        "roots = {name.split('.')[0] for name in new} - set(sys.stdlib_module_names); "
        "print(sorted(roots), sorted(name for name in new if name.startswith('torch.')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert found.stdout.strip() == "['einconv', 'einops', 'kfacopt'] []"


def absent(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As though a package were not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)

    class Refusing(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: Any) -> None:
            if name.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])


def progress() -> None:
    params = list(MODEL.parameters())
    data = [(torch.ones(1, 2), torch.ones(1, 1))]
    GGNLinearOperator(MODEL, nn.MSELoss(), params, data, progressbar=True)


MODEL = nn.Linear(2, 1)
USES: dict[str, Callable[[], Any]] = {
    "tqdm": progress,
    "scipy": lambda: IdentityLinearOperator([(2,)], torch.device("cpu"), torch.float32).to_scipy(),
    "matplotlib": lambda: plot_spectral_density({"": (torch.ones(2), torch.ones(2))}),
}


@pytest.mark.parametrize("package", list(USES))
def test_what_is_not_installed_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, package)
    with pytest.raises(ImportError, match=rf'^{package} is not installed.*pip install "kfacopt\[operators\]"'):
        USES[package]()


def test_what_an_installed_package_misses_itself_is_its_own_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "halfinstalled.py").write_text("import missing_dependency_of_it\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="missing_dependency_of_it"):
        required("halfinstalled", "operators")
