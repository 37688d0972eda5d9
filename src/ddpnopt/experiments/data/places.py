"""Where the files of a dataset lie."""

import os
from pathlib import Path

FOLDER_VARIABLE = "DDPNOPT_DATA"


def cache() -> Path:
    """The folder that holds the fetched sets: DDPNOPT_DATA, else XDG_CACHE_HOME/ddpnopt, else ~/.cache/ddpnopt."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    parent = os.environ.get("XDG_CACHE_HOME")
    return (Path(parent) if parent else Path.home() / ".cache") / "ddpnopt"


def find(folder: Path, name: str) -> Path | None:
    """Return the path of ``name`` or ``name.gz`` in ``folder``, or None where neither is there."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
