"""Finished runs on record: one JSON line each, so that a command goes on where it was stopped.

A line has two objects: ``settings``, all that decides the run's numbers, and ``result``. The settings name the
optimizer with every option written out, so a changed default makes a new run and an old line is never mistaken
for it; the version of the code is not among them (:func:`forget` what new code would do differently).
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpnopt.experiments.files import write_atomic

Settings = Mapping[str, Any]
Result = Mapping[str, Any]
Records = Mapping[str, Result]


def key(settings: Settings) -> str:
    """Return the name under which a run with these settings is found."""
    return json.dumps(dict(settings), sort_keys=True)


def read(path: Path) -> dict[str, Result]:
    """Read a file of records, by :func:`key`; empty where there is none. A line cut off by a crash does not count."""
    if not path.exists():
        return {}
    records = {}
    whole = path.read_bytes().rpartition(b"\n")[0]
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            records[key(record["settings"])] = record["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}); delete that line") from error
    return records


def append(path: Path, settings: Settings, result: Result) -> None:
    """Add one run, whole or not at all; several processes may do so at a time."""
    line = json.dumps({"settings": dict(settings), "result": dict(result)}, allow_nan=False, separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(_whole_lines(file.fileno()))
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def forget(path: Path, beginning: str) -> None:
    """Drop the runs whose ``method`` begins with the given word."""
    if not path.exists():
        return
    read(path)  # damage is named before anything is written
    whole, end, _ = path.read_bytes().rpartition(b"\n")
    lines = (whole + end).splitlines(keepends=True)
    kept = [line for line in lines if not json.loads(line)["settings"]["method"].startswith(beginning)]
    write_atomic(path, b"".join(kept))


def _whole_lines(file: int) -> int:
    """Size of the file up to its last line break: what a crash left behind it is cut off."""
    size = os.fstat(file).st_size
    while size and os.pread(file, 1, size - 1) != b"\n":
        size -= 1
    return size
