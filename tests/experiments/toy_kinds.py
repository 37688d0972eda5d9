"""Small kinds of tasks for the tests of the study room, importable by worker processes; and a coordinator to kill.

``python -m experiments.toy_kinds ADDRESS FOLDER COUNT`` carries out a toy experiment and prints its outcome.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpnopt.experiments.study.lab import Grid, Lab, Params
from ddpnopt.experiments.study.task import Kind, Result, Task

NAME = "experiments.toy_kinds"
GRIDS: dict[str, Grid] = {"first": {"a": (1.0, 2.0, 3.0), "b": (0.5, 0.25)}, "second": {"a": (2.0, 1.0)}}


def square(settings: Mapping[str, Any]) -> Result:
    """Note the start and the end, and square a number."""
    note(settings, "started")
    time.sleep(settings.get("sleep", 0.0))
    note(settings, "ended")
    return {"square": settings["n"] ** 2}


def fail(settings: Mapping[str, Any]) -> Result:
    """Fail, unless a file says that all is well."""
    note(settings, "started")
    if not (Path(settings["folder"]) / "well").exists():
        raise RuntimeError(f"nothing good comes of {settings['n']}")
    return {}


def stop(settings: Mapping[str, Any]) -> Result:
    """End the process without a word."""
    note(settings, "started")
    os._exit(1)


def note(settings: Mapping[str, Any], what: str) -> None:
    with (Path(settings["folder"]) / "log").open("a") as file:  # one short write: lines of processes do not mix
        file.write(f"{what} {settings['n']} {os.getpid()}\n")


def log(folder: Path) -> list[list[str]]:
    """What was noted: "started" or "ended", the number, the process."""
    path = folder / "log"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


KINDS = {
    "square": Kind(square, ()),
    "alone": Kind(square, (), alone=True),
    "fail": Kind(fail, ()),
    "nan": Kind(lambda _: {"value": float("nan")}, ()),
    "stop": Kind(stop, ()),
}


def task(kind: str, settings: Mapping[str, Any]) -> Task:
    return Task(kind, settings, "toy code")


def squares(folder: Path, count: int, **more: Any) -> list[Task]:
    return [task("square", {"n": n, "folder": str(folder), **more}) for n in range(count)]


def work_off(address: str) -> None:
    """Be a worker until nothing is left."""
    from ddpnopt.experiments.study.store import Store
    from ddpnopt.experiments.study.worker import work

    with Store(address) as store:
        work(store, KINDS, {"square": "toy code"}, wait=0)


def experiment(lab: Lab, folder: Path, count: int, sleep: float = 0.05) -> dict[str, Any]:
    """A search, whose values are runs, and runs."""

    def values(asked: list[tuple[str, Params]]) -> list[float]:
        lab.execute(
            [task("square", {"n": 0, "folder": str(folder), "search": [name, params]}) for name, params in asked]
        )
        return [-((params["a"] - 2.0) ** 2) for _, params in asked]

    chosen = lab.search(GRIDS, values)
    return {"chosen": chosen, "squares": lab.execute(squares(folder, count, sleep=sleep))}


if __name__ == "__main__":
    # here and not above, because workers need neither
    from ddpnopt.experiments.study.database_lab import DatabaseLab
    from ddpnopt.experiments.study.store import Store

    address, where, number = sys.argv[1:]
    with Store(address, lease=5.0) as opened:
        print(json.dumps(experiment(DatabaseLab(opened, "toy", NAME, jobs=2), Path(where), int(number))))
