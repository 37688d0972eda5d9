"""What a run was made with: versions, platform, commit and the code itself; no host names, no paths."""

import hashlib
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import ddpnopt

_PACKAGE = Path(ddpnopt.__file__).parent
_DECIDES_NUMBERS = ("config", "data", "job", "models", "optimizers", "team", "train")  # of experiments/


def environment(threads: int, ranks: int = 1) -> dict[str, Any]:
    """Describe the software, and a run's ``threads`` and ``ranks``; every value is a string, a number or None."""
    return {
        "ddpnopt": version("ddpnopt"),
        "code": code(),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "scikit-learn": version("scikit-learn"),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "ranks": ranks,
    }


def version(package: str) -> str | None:
    """Version of an installed package, or None where it is not installed as one."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@lru_cache
def code(modules: tuple[str, ...] = _DECIDES_NUMBERS) -> str:
    """Fingerprint (12 hexadecimal digits) of the source files that can change a run's numbers.

    Args:
        modules: of ``experiments``, without ``.py``, that count beside the whole library; default those of
            ``ddpnopt train``.
    """
    total = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        place = path.relative_to(_PACKAGE)
        own = place.relative_to("experiments").with_suffix("") if place.parts[0] == "experiments" else None
        if own is None or own.as_posix() in modules or own.parts[0] in modules:
            total.update(f"{place.as_posix()}\0".encode() + path.read_bytes())
    return total.hexdigest()[:12]


@lru_cache
def commit() -> str | None:
    """Commit of the package's files, with ``+`` if they were changed since; None outside a repository."""
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # installed, perhaps somewhere inside a repository that is not ours
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ".")
    return None if head is None else head + ("+" if changed else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
