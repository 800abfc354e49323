"""The documentation: its code runs, it names everything public, and the built site is whole and needs no network."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from torch import nn

import kfacopt
from kfacopt import CapturingOptimizer
from tests.markdown import blocks, commands, linked_files, run_python
from tests.test_readme import ROOT, check_command

DOCS = ROOT / "kfacopt" / "docs"
PAGES = sorted((DOCS / "pages").rglob("*.md"))
pages = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(DOCS / "pages")) for page in PAGES])
GUIDES = sorted((DOCS / "pages" / "guides").glob("*.md"))
WITHOUT_CODE = {"hydra", "notebooks", "pictures"}


@pages
def test_python_blocks_run_one_after_the_other(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what a page writes
    run_python(page)


def test_every_guide_has_code() -> None:
    assert {page.stem for page in GUIDES if not blocks(page, "python")} <= WITHOUT_CODE


@pages
def test_commands_and_links(page: Path) -> None:
    for command in commands(page):
        check_command(command)
    for file in linked_files(page):
        assert (page.parent / file).exists(), file


def test_everything_public_is_in_the_reference() -> None:
    """What `import X as X` re-exports, as typing has it."""
    shown = set(re.findall(r"^::: (\S+)", "".join(page.read_text() for page in PAGES), flags=re.MULTILINE))
    for module in ("kfacopt", "kfacopt.operators", "kfacopt.lightning"):
        source = (ROOT / module.replace(".", "/") / "__init__.py").read_text()
        names = re.findall(r" as (\w+)$", source, flags=re.MULTILINE)
        modules = {name for name in names if isinstance(getattr(kfacopt, name, None), type(kfacopt))}
        assert names
        assert {f"{module}.{name}" for name in names if name not in modules} <= shown


def test_the_numbers_of_health_are_explained() -> None:
    """Every one that an optimizer reports has a row on the page about trouble, and no row is of none."""
    text = (DOCS / "pages" / "guides" / "trouble.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE)
    explained = {name for row in rows for name in re.findall(r"`([\w/<>]+)`", row)}
    made: dict[str, Callable[[nn.Module, nn.Module], CapturingOptimizer]] = {
        "EKFAC": kfacopt.EKFAC,
        "damping rule": partial(kfacopt.KFAC, damping_rule=kfacopt.LevenbergMarquardt(every=1)),
        "auto": partial(kfacopt.EKFAC, lr="auto"),
        "spectral": kfacopt.SpectralDescent,
        "gram": partial(kfacopt.NaturalGradient, line_search=kfacopt.GridLineSearch()),
        "cg": partial(kfacopt.NaturalGradient, solver=kfacopt.CG()),
        "newton": kfacopt.TrustRegionNewton,
    }
    found: set[str] = set()
    for make in made.values():
        model, criterion = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), nn.CrossEntropyLoss()
        optimizer = make(model, criterion)
        for _ in range(6):
            optimizer.zero_grad()
            criterion(model(torch.randn(16, 4)), torch.arange(16) % 3).backward()
            optimizer.step()
        found |= {re.sub(r"/.*", "/<layer>", name) for name in optimizer.health()}
        optimizer.close()
    assert explained - {"dropped_updates/<layer>"} == found


class Page(HTMLParser):
    """The anchors of a page, where it links to, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(found.get("href", ""))
        elif "src" in found:
            self.loads.append(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    config = str(DOCS / "mkdocs.yml")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", str(folder)]
    # Whoever asked for something else than this folder would ask nobody.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "true", **nowhere}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.slow
def test_every_link_leads_somewhere(site: Path) -> None:
    found = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    assert len(found) >= len(PAGES)
    broken = []
    for path, page in found.items():
        if path.name == "404.html":  # its links are from the root of a server
            continue
        for link in (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchors = found[target].anchors if target in found else set()
            if not target.exists() or (parts.fragment and target in found and unquote(parts.fragment) not in anchors):
                broken.append(f"{path.name}: {link}")
    assert not broken


@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert not [link for link in Page(path).loads if urlsplit(link).netloc], path
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", path.read_text()), path
