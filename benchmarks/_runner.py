"""Carry out many runs: those on record are left out, each that ends is recorded at once, Ctrl-C loses none."""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import _records as records
from _progress import Bar
from _training import Run, train

from ddpnopt.experiments import data
from ddpnopt.experiments.interrupt import StopRequest

INTERRUPTED = 128  # plus the signal's number: a shell's convention for the exit code
Finished = tuple[Run, dict[str, Any]]


def at_hand(dataset: str, folder: Path | None) -> bool:
    """Whether a dataset can be loaded; says on the error stream why not."""
    try:
        data.load(dataset, folder)
    except ValueError as error:
        print(f"left out: {error}", file=sys.stderr)
        return False
    return True


def complete(runs: Sequence[Run], path: Path, jobs: int, folder: Path | None, title: str) -> int:
    """Carry out the runs that ``path`` does not hold yet.

    Args:
        runs: what is wanted.
        path: file of records.
        jobs: processes at a time; 1 works in this one.
        folder: of a dataset that is not bundled.
        title: what stands before the progress bar.

    Returns:
        0, or the exit code of the signal that stopped it after the runs then under way.
    """
    done = records.read(path)
    todo = list({records.key(run.settings()): run for run in runs if records.key(run.settings()) not in done}.values())
    if not todo:
        return 0
    with StopRequest() as stop, Bar(title, len(todo)) as bar:
        for run, result in _results(todo, jobs, folder, stop):
            records.append(path, run.settings(), result)
            bar.advance()
    if stop.signal is None:
        return 0
    print("stopped; the same command goes on where this one stopped", file=sys.stderr)
    return INTERRUPTED + stop.signal


def _results(todo: Sequence[Run], jobs: int, folder: Path | None, stop: Callable[[], bool]) -> Iterator[Finished]:
    """Yield each run with its result, as they end."""
    if jobs > 1:
        yield from _parallel(todo, jobs, folder, stop)
        return
    for run in todo:
        if stop():
            return
        yield run, train(run, folder)


def _parallel(todo: Sequence[Run], jobs: int, folder: Path | None, stop: Callable[[], bool]) -> Iterator[Finished]:
    waiting, under_way = list(reversed(todo)), dict[Future[dict[str, Any]], Run]()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_leave_signals_to_parent) as pool:
        while under_way or (waiting and not stop()):
            while waiting and len(under_way) < jobs and not stop():
                run = waiting.pop()
                under_way[pool.submit(train, run, folder)] = run
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                yield under_way.pop(future), future.result()


def _leave_signals_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
