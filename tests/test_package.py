"""The wheel, the list of packages, the public names, and import without Triton."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import tomllib

import tritonloss
from tritonloss._dispatch import INTERPRET

ROOT = Path(__file__).parent.parent
once = pytest.mark.skipif(INTERPRET, reason="says the same in the plain run")


def modules():
    files = sorted((ROOT / "tritonloss").rglob("*.py"))
    parts = [f.relative_to(ROOT).with_suffix("").parts for f in files]
    return [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts]


@once
def test_packages_are_the_folders():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        "tritonloss" + "".join(f".{p}" for p in path.parent.relative_to(ROOT / "tritonloss").parts)
        for path in (ROOT / "tritonloss").rglob("__init__.py")
    }
    assert set(config["packages"]) == folders | {"tritonloss.kernels"}


@once
def test_all_is_sorted_and_complete():
    assert set(tritonloss.functional.__all__) <= set(tritonloss.__all__)
    for name in tritonloss.__all__:
        assert hasattr(tritonloss, name), name
    assert tritonloss.functional.__all__ == sorted(tritonloss.functional.__all__)


@once
@pytest.mark.parametrize("name", [n for n in tritonloss.functional.__all__ if n.islower()])
def test_every_loss_is_documented(name):
    text = inspect.getdoc(getattr(tritonloss, name))
    assert "Example:" in text and ">>>" in text, f"{name} shows no example"


@once
@pytest.mark.parametrize("name", modules())
def test_doctests(name):
    failures, _ = doctest.testmod(importlib.import_module(name))
    assert failures == 0


@once
def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@once
def test_one_file_names_the_binding_apis():
    """Only _op.py names autograd.Function, triton_op and custom_op."""
    for path in (ROOT / "tritonloss").rglob("*.py"):
        names = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
        }
        banned = names & {"Function", "custom_op", "triton_op"}
        assert not banned or path.name == "_op.py", f"{path.name} names {banned}"


@once
def test_imports_and_works_without_triton():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("no triton here")
sys.meta_path.insert(0, Absent())
import torch, tritonloss
x = torch.randn(4, 3, requires_grad=True)
tritonloss.sigmoid_focal_loss(x, torch.tensor([0, 3, 1, 3])).backward()
assert x.grad.isfinite().all()
assert "cannot be imported" in tritonloss.show_config()
with tritonloss.backend("triton"):
    try:
        tritonloss.sigmoid_focal_loss(x, torch.tensor([0, 3, 1, 3]))
    except RuntimeError as error:
        assert "cannot be imported" in str(error)
    else:
        raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@once
def test_wheel_in_a_clean_environment(tmp_path):
    """Installs nothing called ``kernels``, and imports from another folder."""
    pytest.importorskip("build")
    dist, clean = tmp_path / "dist", tmp_path / "venv"
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", dist, ROOT],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (wheel,) = dist.glob("*.whl")
    venv.create(clean, with_pip=True)
    python = clean / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    site = next((clean / "lib").glob("python*/site-packages"))
    installed = {p.name for p in site.iterdir()}
    assert "tritonloss" in installed and "kernels" not in installed and "tests" not in installed
    # torch is borrowed from here, after the clean environment's own packages
    import torch

    (site / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    code = (
        "import tritonloss, tritonloss.kernels.pointwise, torch;"
        f"assert str({str(clean)!r}) in tritonloss.__file__, tritonloss.__file__;"
        f"assert str({str(clean)!r}) in tritonloss.kernels.pointwise.__file__;"
        "x = torch.randn(4, 3, requires_grad=True);"
        "tritonloss.FocalLoss()(x, torch.tensor([0, 3, 1, 3])).backward()"
    )
    subprocess.run([python, "-c", code], cwd=tmp_path, check=True)
    if importlib.util.find_spec("matplotlib") and importlib.util.find_spec("jinja2"):
        command = [python, "-m", "tritonloss.diagnose", "--out", "page"]
        subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
        assert (tmp_path / "page" / "index.html").exists()
