"""What importing the package needs, and what asks for an extra."""

from __future__ import annotations


def test_importing_kfacopt_is_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, kfacopt; heavy = ['pytorch_lightning', 'lightning', 'hydra', 'wandb', 'matplotlib', 'sklearn', "
        "'mlxtend', 'pandas', 'torchvision', 'curvlinops', 'rich']; "
        "found = [m for m in heavy if m in sys.modules]; assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
