"""Write the types of the modules, whose signatures are made from those of the functions.

python tools/stubs.py           write tritonloss/modules.pyi and tritonloss/functional.pyi
python tools/stubs.py --check   say whether they are what would be written
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tritonloss import functional, modules  # noqa: E402

HEAD = '"""Written by tools/stubs.py."""\n\n'
GHM = """    amount: Tensor
    updates: Tensor
"""


def _annotation(p: inspect.Parameter) -> str:
    text = f"{p.name}: {p.annotation}"
    default = json.dumps(p.default) if isinstance(p.default, str) else repr(p.default)
    return text if p.default is p.empty else f"{text} = {default}"


def _function(name: str, parameters: list[str], result: str, indent: str = "    ") -> str:
    body = "".join(f"{indent}    {p},\n" for p in parameters)
    return f"{indent}def {name}(\n{body}{indent}) -> {result}: ...\n"


def _module(cls: type) -> str:
    signature = inspect.signature(cls.function)
    positional = [p for p in signature.parameters.values() if p.kind != p.KEYWORD_ONLY]
    keyword = [p for p in signature.parameters.values() if p.kind == p.KEYWORD_ONLY]
    own = [p for p in keyword if p.name in cls._hyper]
    # the state of a module is its own
    per_call = [p for p in keyword if p.name not in cls._hyper and p.name != "state"]
    result = "Tensor" if _has_state(signature) else signature.return_annotation
    lines = [f"class {cls.__name__}(nn.Module):\n"]
    lines += [f"    {p.name}: {p.annotation}\n" for p in own]
    if _has_state(signature):
        lines.append(GHM)
    star = ["*"]
    lines.append(
        _function("__init__", ["self", *(star if own else []), *map(_annotation, own)], "None")
    )
    call = ["self", *map(_annotation, positional)]
    call += (star if per_call else []) + [_annotation(p) for p in per_call]
    lines += [_function(name, call, result) for name in ("forward", "__call__")]
    return "".join(lines)


def _has_state(signature: inspect.Signature) -> bool:
    return "state" in signature.parameters


def modules_stub() -> str:
    classes = [
        c for n, c in vars(modules).items()
        if inspect.isclass(c) and issubclass(c, modules._Loss) and not n.startswith("_")
    ]  # fmt: skip
    return (
        HEAD + "from torch import Tensor, nn\nfrom torch.distributed import ProcessGroup\n\n"
        "from ._levels import Levels, LevelTargets\nfrom .losses.ranking import ALRP, RankSort\n\n"
        + "\n".join(_module(c) for c in classes)
    )


def _place(name: str) -> tuple[str, str]:
    return getattr(functional, name).__module__, name


def _import(module: str, name: str) -> str:
    line = f"from {module} import {name} as {name}\n"
    return line if len(line) <= 101 else f"from {module} import (\n    {name} as {name},\n)\n"


def functional_stub() -> str:
    """What ghm returns depends on whether a state is given; all others are as they stand."""
    names, overloads = [], []
    for name in sorted(functional.__all__, key=_place):
        function = getattr(functional, name)
        signature = inspect.signature(function)
        if inspect.isclass(function) or not _has_state(signature):
            names.append(_import(function.__module__, name))
            continue
        for given, result in (("None", "Tensor"), ("State", "tuple[Tensor, State]")):
            parameters, star = [], False
            for p in signature.parameters.values():
                if p.kind == p.KEYWORD_ONLY and not star:
                    parameters.append("*")
                    star = True
                if p.name != "state":
                    parameters.append(_annotation(p))
                else:
                    parameters.append(f"state: {given}" + (" = None" if given == "None" else ""))
            overloads.append("@overload\n" + _function(name, parameters, result, ""))
    every = "".join(f'    "{n}",\n' for n in functional.__all__)
    return (
        HEAD + "from typing import overload\n\nfrom torch import Tensor\n"
        "from torch.distributed import ProcessGroup\n\n"
        "from tritonloss._levels import Levels, LevelTargets\n" + "".join(names)
        + f"\nState = tuple[Tensor, Tensor]\n\n__all__ = [\n{every}]\n\n" + "".join(overloads)
    )  # fmt: skip


STUBS = {"modules.pyi": modules_stub, "functional.pyi": functional_stub}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = 0
    for name, write in STUBS.items():
        path, text = ROOT / "tritonloss" / name, write()
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"tritonloss/{name} is stale: python tools/stubs.py writes it")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
