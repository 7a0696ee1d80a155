"""The documentation: it builds strictly, says something of every public name, and its code runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tritonloss as tl
from tritonloss._dispatch import INTERPRET

if INTERPRET:
    pytest.skip("says the same in the plain run", allow_module_level=True)

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# The hosts' pages run where the hosts are: tests/hosts.
RUN = [
    page
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
    if BLOCK.search(page.read_text()) and page.parent.name != "hosts"
]


@pytest.mark.parametrize("page", RUN, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), {})


def test_every_public_name_has_its_entry():
    entries = set(re.findall(r"^::: tritonloss\.(?:\S+\.)?(\w+)$", "\n".join(
        page.read_text() for page in PAGES), re.MULTILINE))  # fmt: skip
    missing = set(tl.__all__) - entries - {"__version__", "functional"}
    assert not missing, f"::: tritonloss.NAME on a page of docs/: {missing}"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})  # fmt: skip
    assert run.returncode == 0, run.stderr
    return folder


def test_docstrings_are_shown_as_they_are_meant(site):
    losses = sorted((site / "losses").glob("*/index.html"))
    assert len(losses) == len(list((ROOT / "docs" / "losses").glob("*.md"))) - 1  # the overview
    for page in losses:
        text = page.read_text()
        found = re.search(
            r":(math|func|class|meth):|\.\. math|<p>(Args|Returns|Raises|Example):", text
        )
        assert not found, f"{page.parent.name}: {found[0]}"
        assert ">Examples:</span>" in text and "&gt;&gt;&gt;" in text, page.parent.name
    assert "<math" in (site / "losses" / "sigmoid_focal_loss" / "index.html").read_text()


def test_search_knows_every_function(site):
    index = (site / "search" / "search_index.json").read_text()
    for name in tl.functional.__all__:
        assert name in index, name
