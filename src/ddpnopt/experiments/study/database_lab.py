"""A lab whose tasks are rows of a database, run by worker processes here and, if some are started there, elsewhere."""

import json
import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

from ddpnopt.experiments.study.lab import Grid, Params, Values
from ddpnopt.experiments.study.search import search
from ddpnopt.experiments.study.store import Store
from ddpnopt.experiments.study.task import Result, Task
from ddpnopt.experiments.study.worker import OTHER_CODE, POLL, codes, serve

_ADD_AGAIN = 10.0  # seconds; another command may take tasks over, or drop them, and be stopped
_DEATHS = 10  # workers in a row that may end before a run does


@dataclass(frozen=True)
class Progress:
    """How far the tasks of one call are.

    Attributes:
        total: tasks asked for.
        before: of these, finished before the call.
        done: finished now, with those before.
        failed: ended by an error.
    """

    total: int
    before: int
    done: int
    failed: int


class DatabaseLab:
    """Carries out tasks in worker processes; whatever is finished once is never run again.

    Args:
        store: the table of runs; searches are kept in the same database.
        study: name under which tasks wait, for ``ddpnopt worker --study``.
        registry: name of the module that says what can be run (:class:`Registry`), importable by a new process.
        jobs: worker processes; with 0, tasks wait for workers elsewhere, except those that must run alone.
        watch: told of progress several times a second; default nobody.
        stop: asked several times a second whether to stop; default never.

    Attributes:
        tasks: every task that was asked for, by key.
        computed: how many of these were not finished when they were first asked for.
    """

    def __init__(
        self,
        store: Store,
        study: str,
        registry: str,
        jobs: int,
        watch: Callable[[Progress], None] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        if jobs < 0:
            raise ValueError(f"jobs must be at least 0, not {jobs}")
        self.tasks: dict[str, Task] = {}
        self.computed = 0
        self._store, self._study, self._jobs = store, study, jobs
        self._name, self._registry = registry, import_module(registry)
        self._watch, self._stop = watch, stop

    def execute(self, tasks: Sequence[Task]) -> list[Result]:
        """Have the tasks run, those that must run alone one by one after the others.

        Raises:
            ValueError: tasks failed, each once; those that failed in an earlier command are tried again.
            KeyboardInterrupt: a stop was asked for; the tasks at hand were given back.
        """
        current = codes(self._registry)
        for one in tasks:
            if current.get(one.kind) != one.code:
                raise ValueError(f"a task of kind {one.kind} was not made by {self._name}.task as it is now")
        for alone in (False, True):
            group = {one.key: one for one in tasks if self._registry.KINDS[one.kind].alone == alone}
            if group:
                self._carry_out(group, max(1, self._jobs) if alone else self._jobs, alone)
        runs = self._store.runs([one.key for one in tasks])
        failed = [one for one in tasks if runs[one.key].state == "failed"]
        if failed:
            first = failed[0]
            reason = (runs[first.key].error or "").strip().splitlines()[-1]
            raise ValueError(
                f"{len(failed)} of {len(runs)} runs failed; the first: {first.kind} "
                f"{json.dumps(dict(first.settings))}: {reason}; the same command tries failed runs again"
            )
        return [run.result or {} for run in (runs[one.key] for one in tasks)]

    def search(self, grids: Mapping[str, Grid], values: Values) -> dict[str, Params]:
        """Let Optuna search; see :func:`~ddpnopt.experiments.study.search.search`."""
        return search(self._store.address, self._study, codes(self._registry), grids, values)

    def _carry_out(self, tasks: Mapping[str, Task], jobs: int, alone: bool) -> None:
        """Wait until every task is done or failed."""
        keys, store = list(tasks), self._store
        store.forget_others(self._study, keys)
        store.retry(keys)
        store.add(self._study, list(tasks.values()))
        added, before = time.monotonic(), store.counts(keys)["done"]
        self.computed += len(keys) - before
        self.tasks.update(tasks)
        crew = _Crew(min(1 if alone else jobs, len(keys) - before), self._start_worker(alone))
        with crew:
            while True:
                count = store.counts(keys)
                ended = count["done"] + count["failed"]
                self._watch(Progress(len(keys), before, count["done"], count["failed"]))
                if ended == len(keys):
                    return
                if self._stop():
                    raise KeyboardInterrupt
                crew.keep(ended)
                if not count["running"] and time.monotonic() - added > _ADD_AGAIN:
                    store.add(self._study, list(tasks.values()))
                    added = time.monotonic()
                time.sleep(POLL)

    def _start_worker(self, alone: bool) -> Callable[[], BaseProcess]:
        expected = codes(self._registry, alone)
        arguments = (self._store.address, self._store.lease, self._name, alone, expected, self._study)
        return lambda: _context(self._name).Process(target=serve, args=arguments)


class _Crew(AbstractContextManager["_Crew"]):
    """Worker processes that are replaced when they die and ended with the context."""

    def __init__(self, size: int, make: Callable[[], BaseProcess]) -> None:
        self._size, self._make = size, make
        self._members: list[BaseProcess] = []
        self._deaths, self._ended = 0, -math.inf

    def keep(self, ended: int) -> None:
        """Replace members that are gone; ``ended`` tells whether runs get anywhere."""
        if ended > self._ended:
            self._ended, self._deaths = ended, 0
        gone = [member for member in self._members if not member.is_alive()]
        if any(member.exitcode == OTHER_CODE for member in gone):
            raise ValueError("the source of these runs was changed since the command began; start it again")
        self._deaths += len(gone)
        if self._deaths > _DEATHS:
            raise ValueError(f"{self._deaths} workers ended one after another without a result; see what they printed")
        self._members = [member for member in self._members if member not in gone]
        while len(self._members) < self._size:
            member = self._make()
            with _no_interrupt():
                member.start()
            self._members.append(member)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self._members:
            member.terminate()
        for member in self._members:
            member.join(10)
            member.kill()
            member.join()


def _context(registry: str) -> Any:
    """How processes are made: copies of one that has done its imports, which take longer than many a run."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([serve.__module__, registry])
    return context


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back; a process started meanwhile never gets it, and is ended by who started it."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
