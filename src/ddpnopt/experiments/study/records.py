"""Records of runs: a line of strict JSON each, which an experiment writes and another database takes over."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpnopt.experiments.study.store import Run, Store
from ddpnopt.experiments.study.task import Task

SUFFIX = ".jsonl"
_FIELDS: Mapping[str, tuple[type, ...]] = {
    "kind": (str,),
    "settings": (dict,),
    "code": (str,),
    "result": (dict, type(None)),
    "seconds": (float, int, type(None)),
}


@dataclass(frozen=True)
class Taken:
    """What became of the records of one file.

    Attributes:
        new: runs that the database did not have.
        known: runs that it had, finished or under way.
        other_code: left out, because the source or torch here is not what they were made with.
        measured: left out, because they measure time or memory.
        failed: left out, because they hold no result.
    """

    new: int
    known: int
    other_code: int
    measured: int
    failed: int


def lines(tasks: Sequence[Task], runs: Mapping[str, Run]) -> bytes:
    """Tasks with what their runs gave, by key, a line each, sorted by settings."""
    found = []
    for task in tasks:
        run = runs[task.key]
        line: dict[str, Any] = {"kind": task.kind, "settings": task.settings, "code": task.code}
        line |= {"result": run.result, "seconds": run.seconds}
        found.append((json.dumps([task.kind, task.settings], sort_keys=True), json.dumps(line, allow_nan=False)))
    return "".join(line + "\n" for _, line in sorted(found)).encode()


def files(places: Sequence[Path]) -> list[Path]:
    """The files of records among files and folders.

    Raises:
        ValueError: none is named, a place does not exist or a folder holds none.
    """
    if not places:
        raise ValueError("name files of records or folders that hold some, such as docs/results/paper/records")
    found: list[Path] = []
    for place in places:
        own = sorted(place.glob(f"*{SUFFIX}")) if place.is_dir() else [place]
        if not own or not own[0].is_file():
            raise ValueError(f"{place} is neither a file of records nor a folder of *{SUFFIX} files")
        found += own
    return found


def take(store: Store, path: Path, codes: Mapping[str, str], timed: Mapping[str, str]) -> Taken:
    """Put a file's finished runs into a database, under the study that the file is named after.

    Args:
        store: the table of runs; what is finished or under way there stays as it is.
        path: the file.
        codes: kinds to take, each with the fingerprint that its code has here; a run of other code is left out,
            since its figures are not those that this code gives.
        timed: likewise the kinds to leave out although the code is the same.

    Raises:
        ValueError: the file is damaged; nothing of it was taken.
    """
    records = list(_read(path))
    own = [record for record in records if codes.get(record[0].kind) == record[0].code]
    measured = sum(timed.get(task.kind) == task.code for task, _ in records)
    done = [(task, run) for task, run in own if run.result is not None]
    keys = sorted({task.key for task, _ in done})
    before = store.counts(keys)["done"]
    store.keep(path.stem, done)
    new = store.counts(keys)["done"] - before
    return Taken(new, len(keys) - new, len(records) - len(own) - measured, measured, len(own) - len(done))


def _read(path: Path) -> Iterator[tuple[Task, Run]]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line, parse_constant=_refuse)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; restore the file from a copy") from None
        sound = isinstance(record, dict) and record.keys() == _FIELDS.keys()
        if not sound or not all(isinstance(record[name], kind) for name, kind in _FIELDS.items()):
            raise ValueError(f"{path}, line {number}: not the record of a run; restore the file from a copy")
        state = "failed" if record["result"] is None else "done"
        task = Task(record["kind"], record["settings"], record["code"])
        yield task, Run(state, record["result"], None, record["seconds"])


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number")
