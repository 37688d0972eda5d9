"""Runs of the suite's loop in kinds that differ in their seed alone: carried out once, their last scores averaged."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import _records as records
from _progress import Bar
from _runner import INTERRUPTED
from _suite.carrying import Recorder, StoppedError
from _suite.registration import Registration, Task
from _suite.running import Run

from ddpnopt.experiments.files import write_atomic
from ddpnopt.experiments.interrupt import StopRequest

BUDGET = "quick"


@dataclass(frozen=True)
class Kind:
    """A registered method with a learning rate and options."""

    method: str
    lr: float
    options: Mapping[str, Any]

    def runs(self, registration: Registration, task: Task, seeds: int) -> list[Run]:
        """Its runs, by seed."""
        method = registration.methods[self.method]
        return [Run(task, BUDGET, method, self.lr, method.options(**self.options), seed) for seed in range(seeds)]


class Scores:
    """Mean last validation scores of runs on record, and the seconds that the asked for took."""

    def __init__(self, known: records.Records) -> None:
        self._known = known
        self._wall: dict[str, float] = {}

    def __call__(self, runs: Sequence[Run]) -> float:
        """Mean; minus infinity if a run diverged."""
        keys = [records.key(run.settings()) for run in runs]
        found = [self._known[key] for key in keys]
        self._wall.update((key, one["wall"]) for key, one in zip(keys, found, strict=True))
        last = [-math.inf if one["diverged"] else one["validation"][-1] for one in found]
        return float(sum(last) / len(last))

    def step_seconds(self, runs: Sequence[Run]) -> float:
        """Median over runs of the time spent in steps."""
        return float(median(self._known[records.key(run.settings())]["seconds"] for run in runs))

    @property
    def seconds(self) -> float:
        """Of computing."""
        return sum(self._wall.values())


def carried_out(
    name: str,
    runs: Callable[[], Sequence[Run]],
    page: Callable[[Scores], str],
    registration: Registration,
    data: Path | None,
    out: Path,
) -> int:
    """Carry out what is missing, then write the page; returns the exit code.

    Args:
        name: of the benchmark: its page is ``name.md``, its records ``records/name.jsonl`` in ``out``.
        runs: all there are; ValueError where files are missing.
        page: lays the scores out.
        registration: the suite's.
        data: folder of the files of sets that are not bundled.
        out: folder of the page.
    """
    path = out / "records" / f"{name}.jsonl"
    try:
        wanted = runs()
        with StopRequest() as stop, Bar(name.replace("_", " "), len(wanted)) as bar:
            recorder = Recorder(path, registration.digest, data, stop, bar.advance)
            for run in wanted:
                recorder(run)
    except StoppedError:
        print("stopped; the same command goes on where this one stopped", file=sys.stderr)
        return INTERRUPTED + (stop.signal or 0)
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    found = out / f"{name}.md"
    write_atomic(found, page(Scores(records.read(path))).encode())
    print(found)
    return 0
