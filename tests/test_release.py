"""What the release workflow refuses, and what it writes into the checkout that it builds."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path

import pytest

import tritonloss
from tritonloss._dispatch import INTERPRET

if INTERPRET:
    pytest.skip("says the same in the plain run", allow_module_level=True)

ROOT = Path(__file__).parent.parent
RELEASE = runpy.run_path(str(ROOT / "tools" / "release.py"))


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "tritonloss").mkdir()
    for name in ("tritonloss/_version.py", "CHANGELOG.md", "README.md", *RELEASE["ADDRESSES"]):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_version_stands_in_one_place():
    assert RELEASE["version"]() == tritonloss.__version__
    for name in ("pyproject.toml", "CITATION.cff", "README.md"):
        text = (ROOT / name).read_text()
        assert not re.search(rf"(?<![\d.]){re.escape(tritonloss.__version__)}(?![\d.])", text), name


def test_every_version_has_its_section():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    form = r"\d+\.\d+\.\d+ \((\d{4}-\d{2}-\d{2}|unreleased)\)"
    assert headings and all(re.fullmatch(form, h) for h in headings), headings
    assert headings[0].startswith(f"{tritonloss.__version__} (")
    versions = [tuple(map(int, h.split(" ")[0].split("."))) for h in headings]
    assert versions == sorted(set(versions), reverse=True)


def test_what_is_no_release_is_refused(checkout):
    version = tritonloss.__version__
    log = checkout / "CHANGELOG.md"
    log.write_text(f"# Changelog\n\n## {version} (unreleased)\n")
    assert RELEASE["problems"](checkout, f"v{version}") == [
        f"CHANGELOG.md has no dated section for {version}"
    ]
    log.write_text(f"# Changelog\n\n## {version} (2030-01-31)\n")
    assert RELEASE["problems"](checkout, f"v{version}") == []
    (wrong,) = RELEASE["problems"](checkout, "v99.0.0")
    assert "the tag is v99.0.0" in wrong


def test_addresses_are_whole(checkout):
    RELEASE["prepare"](checkout, "someone/tritonloss", "v1.0.0")
    for name in RELEASE["ADDRESSES"]:
        if (checkout / name).exists():
            assert "OWNER" not in (checkout / name).read_text(), name
    before, after = ((p / "README.md").read_text() for p in (ROOT, checkout))
    links = r"(!?)\[[^\]]*\]\(([^)\s]+)\)"
    for (mark, old), (_, new) in zip(
        re.findall(links, before), re.findall(links, after), strict=True
    ):
        if old.startswith(("http", "#")):
            assert new == old
        else:
            host = "raw.githubusercontent.com/someone/tritonloss/v1.0.0"
            page = "github.com/someone/tritonloss/blob/v1.0.0"
            assert new == f"https://{host if mark else page}/{old}"
            assert (ROOT / old.split("#")[0]).exists(), f"README.md links {old}"
