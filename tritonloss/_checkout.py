"""Where the kernels are: in the package, or, in a checkout, in a folder beside it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent
NAME = "tritonloss.kernels"


def find_kernels() -> None:
    """Make the folder of a checkout importable under its installed name, and no other folder."""
    folder = PACKAGE.parent / "kernels"
    if (PACKAGE / "kernels").is_dir() or not folder.is_dir() or NAME in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    sys.modules["tritonloss"].kernels = module


find_kernels()
