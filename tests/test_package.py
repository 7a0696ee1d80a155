"""Distributions, types, the list of packages, the public names, and import without Triton."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import tomllib
import torch

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
def test_dir_shows_public_names():
    assert dir(tritonloss) == sorted(tritonloss.__all__)
    assert not [n for n in dir(tritonloss) if n.startswith("_") and n != "__version__"]


@once
@pytest.mark.parametrize("folder", [".", "tests"])
def test_nothing_is_importable_twice(folder):
    code = """
import importlib, tritonloss, tritonloss.kernels
for name in ("kernels", "kernels.boxes", "tritonloss.perf", "tritonloss.tests", "tritonloss.tools"):
    try:
        importlib.import_module(name)
    except ImportError as error:
        assert "kernels is tritonloss.kernels" in str(error) or "No module named" in str(error)
    else:
        raise AssertionError(name)
"""
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / folder, env=path, check=True)


@once
def test_stubs_are_current():
    command = [sys.executable, ROOT / "tools" / "stubs.py", "--check"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source distribution, and the wheel that is built from it."""
    pytest.importorskip("build")
    dist = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", dist, ROOT]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    return wheel, source


def environment(folder: Path) -> tuple[Path, Path]:
    """A new environment that borrows torch from here: its Python and its site-packages."""
    venv.create(folder)
    site = next((folder / "lib").glob("python*/site-packages"))
    # after the new environment's own packages
    (site / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    return folder / "bin" / "python", site


def install(python: Path, *what) -> None:
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps"]
    subprocess.run([*command, *what], check=True)


@pytest.fixture(scope="module")
def clean(built, tmp_path_factory):
    """An environment with the wheel."""
    folder = tmp_path_factory.mktemp("clean")
    python, site = environment(folder)
    install(python, built[0])
    return folder, python, site


@once
@pytest.mark.parametrize(
    ("package", "version"), [("torch", "2.10.1+cu128"), ("triton", "3.5.0"), ("torch", "2.6.0")]
)
def test_says_where_the_kernels_need_newer_versions(package, version):
    code = f"""
import torch, {package}
{package}.__version__ = {version!r}
import tritonloss
x = torch.randn(4, 3, requires_grad=True)
tritonloss.sigmoid_focal_loss(x, torch.tensor([0, 3, 1, 3])).backward()
words = "the kernels need torch >= 2.11 and triton >= 3.6; here are torch "
said = tritonloss.show_config()
assert words in said and "{package} {version}" in said, said
with tritonloss.backend("triton"):
    try:
        tritonloss.sigmoid_focal_loss(x, torch.tensor([0, 3, 1, 3]))
    except RuntimeError as error:
        assert words in str(error)
    else:
        raise AssertionError("no error")
"""
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@once
def test_wheel_in_a_clean_environment(clean, tmp_path):
    """Installs nothing called ``kernels``, and imports from another folder."""
    folder, python, site = clean
    installed = {p.name for p in site.iterdir()}
    assert "tritonloss" in installed
    assert not installed & {"kernels", "tests", "tools", "perf", "examples"}
    assert {"py.typed", "modules.pyi"} <= {p.name for p in (site / "tritonloss").iterdir()}
    code = (
        "import tritonloss, tritonloss.kernels.pointwise, torch;"
        f"assert {str(folder)!r} in tritonloss.__file__, tritonloss.__file__;"
        f"assert {str(folder)!r} in tritonloss.kernels.pointwise.__file__;"
        "x = torch.randn(4, 3, requires_grad=True);"
        "tritonloss.FocalLoss()(x, torch.tensor([0, 3, 1, 3])).backward()"
    )
    subprocess.run([python, "-c", code], cwd=tmp_path, check=True)
    if importlib.util.find_spec("matplotlib") and importlib.util.find_spec("jinja2"):
        command = [python, "-m", "tritonloss.diagnose", "--out", "page"]
        subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
        assert (tmp_path / "page" / "index.html").exists()


@once
def test_distributions_are_as_the_index_takes_them(built):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *built]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    """The Python of an environment with an editable installation."""
    folder = tmp_path_factory.mktemp("editable")
    source = folder / "source"
    for part in ("tritonloss", "kernels"):
        shutil.copytree(ROOT / part, source / part)
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source / part)
    python, _ = environment(folder / "environment")
    # the mode that type checkers and editors can follow
    install(python, "--config-settings", "editable_mode=strict", "--editable", source)
    return python


CHECKERS = {
    "mypy": ("--strict", "--python-executable"),
    "pyright": ("--pythonpath",),
}


@once
@pytest.mark.parametrize("checker", CHECKERS)
def test_types_of_a_users_file(checker, clean, editable, tmp_path):
    """For the wheel and for an editable installation."""
    pytest.importorskip(checker)
    sample = shutil.copy(ROOT / "tests" / "types" / "sample.py", tmp_path)
    for python in (clean[1], editable):
        command = [sys.executable, "-m", checker, *CHECKERS[checker], python, sample]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, f"{python}: {run.stdout}"


@once
@pytest.mark.parametrize("checker", CHECKERS)
def test_a_wrong_type_is_seen(checker, clean, tmp_path):
    """A checker that cannot see the package finds nothing, and its success proves nothing."""
    pytest.importorskip(checker)
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import tritonloss as tl\n\nloss: int = tl.FocalLoss(gamma='two')\n")
    command = [sys.executable, "-m", checker, *CHECKERS[checker], clean[1], wrong]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout.count("error:") >= 2, run.stdout


@once
def test_a_call_has_the_types_of_forward():
    tree = ast.parse((ROOT / "tritonloss" / "set_criterion.py").read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    call, forward = functions["__call__"], functions["forward"]
    assert ast.dump(call.args) == ast.dump(forward.args)
    assert ast.dump(call.returns) == ast.dump(forward.returns)


@once
def test_the_users_file_runs():
    exec(compile((ROOT / "tests" / "types" / "sample.py").read_text(), "sample.py", "exec"), {})
