"""A worker: a process that takes tasks from the table of runs until there are no more."""

import json
import math
import multiprocessing
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any, Protocol

from ddpnopt.experiments.study import identity
from ddpnopt.experiments.study.store import Claim, Store
from ddpnopt.experiments.study.task import Kind, Task

POLL = 0.2  # seconds between looks for a new task
OTHER_CODE = 3  # exit code of a worker that finds other source than its coordinator has


class Registry(Protocol):
    """A module that says what can be run: ``ddpnopt.experiments.paper.kinds`` is one."""

    @property
    def KINDS(self) -> Mapping[str, Kind]:
        """Every kind of task by its name."""

    @property
    def task(self) -> Callable[[str, Mapping[str, Any]], Task]:
        """Make a task of a kind, under the fingerprint that the kind's code has here."""


def codes(registry: Registry, alone: bool | None = None) -> dict[str, str]:
    """Fingerprint of every kind's code, or of those only that must, or need not, run alone."""
    chosen = [name for name, kind in registry.KINDS.items() if alone in (None, kind.alone)]
    return {name: registry.task(name, {}).code for name in chosen}


def work(
    store: Store,
    kinds: Mapping[str, Kind],
    codes: Mapping[str, str],
    study: str | None = None,
    wait: float = math.inf,
    wanted: Callable[[], bool] = lambda: True,
) -> int:
    """Run task after task.

    Args:
        store: the table of runs.
        kinds: what each kind of task runs.
        codes: the kinds to take, with the fingerprints that tasks must have been made under.
        study: take only tasks of this study; None (default): of any.
        wait: end when for so many seconds no task was waiting or being run by anyone; default: never.
        wanted: asked before every task whether to go on; default: always.

    Returns:
        How many tasks it ran. An exception that is no :class:`Exception`, such as KeyboardInterrupt, gives the task
        at hand back and passes through.
    """
    worker, done, busy = identity.own(), 0, time.monotonic()
    while wanted():
        claim = store.claim(worker, codes, study)
        if claim is not None:
            _carry_out(store, worker, claim, kinds[claim.kind])
            done += 1
        if claim is not None or store.unfinished(codes, study):
            busy = time.monotonic()
        elif time.monotonic() - busy >= wait:
            break
        if claim is None:
            time.sleep(POLL)
    return done


def serve(address: str, lease: float, registry: str, alone: bool, expected: dict[str, str], study: str) -> None:
    """Be a worker process of a coordinator until ended by it, or until it is gone and the task at hand done.

    Args:
        address: of the table of runs; ``lease`` goes with it.
        lease: see :class:`Store`.
        registry: name of the :class:`Registry`.
        alone: whether to take tasks that must run alone, or the others.
        expected: the coordinator's fingerprints; with others here, the process ends with code ``OTHER_CODE``.
        study: whose tasks to take.
    """
    exit_on(signal.SIGTERM)
    module: Any = import_module(registry)
    if codes(module, alone) != expected:
        sys.exit(OTHER_CODE)
    parent = multiprocessing.parent_process()
    with Store(address, lease) as store:
        work(store, module.KINDS, expected, study, wanted=lambda: parent is None or parent.is_alive())


def exit_on(*signals: signal.Signals) -> None:
    """End this process with code 128 plus the signal's number, by SystemExit, when one of these comes."""

    def end(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for number in signals:
        signal.signal(number, end)


def _carry_out(store: Store, worker: str, claim: Claim, kind: Kind) -> None:
    began = time.perf_counter()
    with _heartbeat(store, claim.key, worker):
        try:
            result = json.dumps(kind.run(claim.settings), allow_nan=False)
        except Exception:
            store.fail(claim.key, worker, traceback.format_exc(), time.perf_counter() - began)
        except BaseException:
            store.release(claim.key, worker)
            raise
        else:
            store.finish(claim.key, worker, result, time.perf_counter() - began)


@contextmanager
def _heartbeat(store: Store, key: str, worker: str) -> Iterator[None]:
    """Give signs of life from a thread, four within a lease."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(store.lease / 4):
            try:
                store.beat(key, worker)
            except ValueError:  # the storage does not answer just now; if the lease runs out, so be it
                continue

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
