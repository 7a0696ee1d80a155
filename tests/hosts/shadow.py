"""What every host is tested with: its loss and ours on the same call, and what is left behind.

To be imported before the host, which may need what ``shims.py`` gives it.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import runpy
import sys
import tempfile
from functools import wraps
from pathlib import Path

import pytest
import torch
from shims import make_hosts_importable
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tritonloss._dispatch import INTERPRET

if INTERPRET:
    pytest.skip("says the same in the plain run", allow_module_level=True)
# ultralytics writes its settings there when it is imported
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp()
os.environ["YOLO_OFFLINE"] = "true"
make_hosts_importable()

ROOT = Path(__file__).parents[2]
EXAMPLES, PAGES = ROOT / "examples" / "hosts", ROOT / "docs" / "hosts"


def run_example(name: str) -> dict:
    """A script for users, in this process: the hosts may need what ``shims.py`` gives them."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def run_page(name: str, integration) -> dict:
    """The code of a host's page, block after block; the page names what is exchanged."""
    text = (PAGES / f"{name}.md").read_text()
    with integration.installed() as exchanged:
        missing = [place for place in exchanged if f"`{place}`" not in text]
    assert not missing, f"docs/hosts/{name}.md lacks {missing}"
    blocks = [part.split("\n```")[0] for part in text.split("```python\n")[1:]]
    assert blocks
    space = {}
    for block in blocks:
        exec(compile(block, f"{name}.md", "exec"), space)
    return space


def _detached(value):
    if isinstance(value, nn.Module):
        return copy.deepcopy(value)
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _inputs(args, kwargs) -> list[Tensor]:
    return [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]


def gradients(result, inputs: list[Tensor]) -> list[Tensor]:
    """Of the sum of all values of a result, zeros where there is none."""
    values = [x.sum() for x in tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
    if not values or not inputs:
        return []
    found = torch.autograd.grad(sum(values), inputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def error_of(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest of theirs."""
    if theirs.numel() == 0:
        return 0.0
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)).item()


@contextlib.contextmanager
def shadowed(integration):
    """The host trains on its own; ours repeats each call on detached copies.

    Yields:
        Per exchanged name the number of calls, the largest error of a value and of a gradient.
    """
    found: dict[str, list] = {}

    def shadow(place):
        def make(original):
            ours = place.make(original)

            @wraps(original)
            def both(*args, **kwargs):
                copied = tree_map(_detached, (args, kwargs))
                theirs = original(*args, **kwargs)
                repeated = ours(*copied[0], **copied[1])
                calls = found.setdefault(str(place), [0, 0.0, 0.0])
                calls[0] += 1
                a, b = tree_leaves(repeated), tree_leaves(theirs)
                assert len(a) == len(b)
                for x, y in zip(a, b, strict=True):
                    assert x.shape == y.shape
                    calls[1] = max(calls[1], error_of(x, y))
                pairs = (
                    gradients(repeated, _inputs(*copied)),
                    gradients(theirs, _inputs(args, kwargs)),
                )
                for x, y in zip(*pairs, strict=True):
                    calls[2] = max(calls[2], error_of(x, y))
                return theirs

            return both

        return place._replace(make=make)

    host = integration._host
    places = host._places
    host._places = lambda: [p if p.new else shadow(p) for p in places() if p.key != "__init__"]
    try:
        with host.installed():
            yield found
    finally:
        host._places = places


def held_by(library: str) -> dict:
    """Every attribute of every loaded module of a library, and of the classes they hold."""
    found = {}
    for name, module in list(sys.modules.items()):
        if module is None or name.partition(".")[0] != library:
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = value
            if isinstance(value, type) and value.__module__.partition(".")[0] == library:
                found |= {(name, key, k): v for k, v in vars(value).items()}
    return found


def same(before: dict, after: dict) -> bool:
    return before.keys() == after.keys() and all(before[k] is after[k] for k in before)


def assert_nothing_is_left_behind(integration, library: str) -> None:
    integration.install()  # loads all modules
    integration.uninstall()
    before = held_by(library)
    names = integration.install()
    assert len(set(names)) == len(names)
    assert integration.install() == names  # twice is once
    assert not same(before, held_by(library))
    with integration.installed():
        pass
    assert not same(before, held_by(library))  # the inner block did not end the outer installation
    integration.uninstall()
    assert same(before, held_by(library))
    integration.uninstall()
    with contextlib.suppress(KeyError), integration.installed():
        raise KeyError
    assert same(before, held_by(library))


def assert_a_missing_place_is_named(integration, library: str, place: str, known: str) -> None:
    before = held_by(library)
    pattern = f"{re.escape(place)}.*{library} {re.escape(known)}"
    with pytest.raises(ImportError, match=pattern):
        integration.install()
    assert same(before, held_by(library))
