"""Runs an example as a script, where warnings are errors: `python -m tests.example examples/swap.py`."""

from __future__ import annotations

import runpy
import sys
import warnings

# What other packages do at their own import or among themselves is not ours to mend.
OTHERS: list[tuple[type[Warning], str]] = [
    (Warning, r"pytorch_lightning|lightning_fabric|curvlinops|linear_operator"),
    (DeprecationWarning, r"torch\.jit"),
    (FutureWarning, r"torch\.utils\._pytree"),
]


def example(path: str) -> None:
    """Run the script at `path`."""
    warnings.simplefilter("error")
    for category, module in OTHERS:
        warnings.filterwarnings("ignore", category=category, module=module)
    sys.argv = [path]  # as the script itself would see it
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    example(sys.argv[1])
