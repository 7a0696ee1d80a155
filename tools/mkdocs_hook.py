"""What the documentation needs beside MkDocs: formulas and links of docstrings, links out of docs/.

A hook of MkDocs and an extension of Griffe, both named in mkdocs.yml.
"""

from __future__ import annotations

import posixpath
import re
import textwrap

import griffe
from latex2mathml.converter import convert

BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*|(?=\n)))*)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")
OWN = re.compile(r":meth:(`\w+`)")  # a method of the class that says so
ROLE = re.compile(r":(?:func|class|meth):`(?:tritonloss\.)?([^`]+)`")
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)

LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)\s#]+)")
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "guides/add-a-loss.md",
    "CHANGELOG.md": "changelog.md",
}


def _mathml(latex: str, display: str) -> str:
    """Browsers show it without a script."""
    return convert(" ".join(latex.split()), display=display)


def markdown(docstring: str) -> str:
    text = BLOCK.sub(
        lambda m: f'{m[1]}<div class="math">{_mathml(m[2], "block")}</div>\n', docstring
    )
    text = INLINE.sub(lambda m: f'<span class="math">{_mathml(m[1], "inline")}</span>', text)
    text = ROLE.sub(r"[`\1`][tritonloss.\1]", OWN.sub(r"\1", text))
    return EXAMPLE.sub(r"\1Examples:", text).replace("::\n", ":\n")


class Markdown(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        """Griffe loses names whose overloads stand in a stub alone."""
        for name in pkg["functional"].overloads:
            pkg.set_member(name, griffe.Alias(name, f"tritonloss.losses.ghm.{name}"))

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            first, _, rest = obj.docstring.value.partition("\n")
            obj.docstring.value = markdown(first + "\n" + textwrap.dedent(rest))


def on_page_markdown(text: str, *, page, config, **kwargs) -> str:
    """Links to files outside docs/: to the page that holds the file, or to the repository."""
    folder = posixpath.dirname("docs/" + page.file.src_uri)

    def link(match: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        if path.startswith("docs/"):
            return match[0]
        if path in PAGES:
            return match[1] + posixpath.relpath("docs/" + PAGES[path], folder)
        return f"{match[1]}{config.repo_url}/blob/main/{path}"

    return LINK.sub(link, text)
