"""The package as a whole: public names, one-way imports, docstring examples."""

import ast
import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import ddpnopt

ROOT = Path(ddpnopt.__file__).parent
CORE = sorted(p for p in ROOT.rglob("*.py") if "experiments" not in p.parts)

# a module may import only what stands before it
ORDER = [
    "errors", "ranks", "accord", "linalg", "inverse", "sensitivity", "columns", "sharded", "curvature", "layers",
    "value", "limits",
    "bellman", "network", "compiled", "conditions", "trees", "passes", "output_loss", "terminal", "inbox", "units",
    "finite", "cuts", "hooks", "state", "wrapped", "trajectory", "linearise", "joined", "relinearise", "rollout",
    "transaction", "dense", "coupling", "task", "reading", "stage_cost", "sharing", "steps", "evaluation", "options",
    "persistence", "clipping", "scaling", "report", "optimizer",
]  # fmt: skip


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = path.relative_to(ROOT).parts[: -node.level]
            parts = [*package, *(node.module or "").split(".")] if node.module else [*package]
            names = [parts[0]] if parts and parts[0] else [alias.name for alias in node.names]
            found |= set(names)
        elif isinstance(node, ast.ImportFrom):
            found.add(f"={(node.module or '').split('.')[0]}")
        elif isinstance(node, ast.Import):
            found |= {f"={alias.name.split('.')[0]}" for alias in node.names}
    return found


def test_all_names_are_public_and_back() -> None:
    public = {
        name for name, value in vars(ddpnopt).items() if not name.startswith("_") and not isinstance(value, type(ast))
    }
    assert public == set(ddpnopt.__all__)


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    own = room(path)
    for name in imported(path):
        if name.startswith("="):
            import sys

            assert name[1:] in {"torch", "ddpnopt"} | sys.stdlib_module_names, f"{path.name} imports {name[1:]}"
        elif own in ORDER and name != own:
            assert name in ORDER[: ORDER.index(own)], f"{own} imports {name}"
        elif own in ("reference", "baselines"):
            assert name == own, f"{own} imports {name}"


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstring_examples_run(path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    name = ".".join(["ddpnopt", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_importing_the_library_imports_no_extra() -> None:
    import subprocess
    import sys

    code = "import sys, ddpnopt; print([m for m in ('sklearn', 'matplotlib', 'rich', 'tyro') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(out.stdout) == []


def test_every_module_is_reachable() -> None:
    assert {m.name for m in pkgutil.iter_modules([str(ROOT)])} >= set(ORDER)
