"""Make a checkout ready to be built as a release: in the release workflow, before the build.

python tools/release.py --tag v0.1.0 --repository someone/tritonloss

Refuses a tag that is not the version, and a version without a dated section in CHANGELOG.md. Puts
the account into the addresses, and whole addresses into the README's links, which an index shows
without the files beside it.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ADDRESSES = ("pyproject.toml", "CITATION.cff", "mkdocs.yml")


def version(root: Path = ROOT) -> str:
    text = (root / "tritonloss" / "_version.py").read_text(encoding="utf-8")
    return re.search(r'"(.+)"', text)[1]


def problems(root: Path, tag: str) -> list[str]:
    """Why this checkout is no release; empty where it is one."""
    found = []
    if tag != f"v{version(root)}":
        found.append(f"the tag is {tag}, tritonloss/_version.py says {version(root)}")
    heading = rf"^## {re.escape(version(root))} \(\d{{4}}-\d{{2}}-\d{{2}}\)$"
    if not re.search(heading, (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE):
        found.append(f"CHANGELOG.md has no dated section for {version(root)}")
    return found


def linked(readme: str, repository: str, tag: str) -> str:
    """The README with whole addresses: pictures as files, all else as pages."""
    files = f"https://raw.githubusercontent.com/{repository}/{tag}/"
    pages = f"https://github.com/{repository}/blob/{tag}/"
    relative = r"(?!https?:|#|mailto:)([^)\s]+)\)"
    readme = re.sub(r"(!\[[^\]]*\]\()" + relative, rf"\g<1>{files}\g<2>)", readme)
    return re.sub(r"((?<!!)\[[^\]]*\]\()" + relative, rf"\g<1>{pages}\g<2>)", readme)


def prepare(root: Path, repository: str, tag: str) -> None:
    owner = repository.split("/")[0]
    for name in ADDRESSES:
        path = root / name
        if path.exists():
            text = path.read_text(encoding="utf-8").replace("OWNER/tritonloss", repository)
            path.write_text(text.replace("OWNER", owner), encoding="utf-8")
    readme = root / "README.md"
    text = linked(readme.read_text(encoding="utf-8"), repository, tag)
    readme.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tag", required=True)
    parser.add_argument("--repository", required=True, help="account/name")
    args = parser.parse_args()
    if found := problems(ROOT, args.tag):
        sys.exit("; ".join(found))
    prepare(ROOT, args.repository, args.tag)


if __name__ == "__main__":
    main()
