"""Nine tasks, DDPNOpt and its rivals: steps, time and memory to targets fixed beforehand, with one tuning budget for all.

    pip install '.[conformance]'                   (the rivals; those that are not installed are left out)
    python benchmarks/suite.py digits

Tasks, sizes, search spaces, seeds and rules stand in benchmarks/_suite/registration.toml. Each finished run is one line in
docs/results/records; the same command goes on where it was stopped, and at the end writes docs/results/suite.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from _progress import Bar
from _runner import INTERRUPTED
from _suite.carrying import Plan, Recorder, StoppedError, carry_out
from _suite.methods import installed
from _suite.registration import REGISTRATION, Budget, Registration, read
from _suite.tasks import load
from _training import RESULTS

from ddpnopt.experiments.interrupt import StopRequest


@dataclass(frozen=True)
class Arguments:
    """Nine tasks, DDPNOpt and its rivals: steps, time and memory to targets fixed beforehand."""

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TASK")] = ()
    """Names in the registration. None: run nothing, write the page from the records."""

    methods: tuple[str, ...] = ()
    """Methods to run, such as ddpnopt adamw. None: all that are installed."""

    budget: Budget = "quick"
    """quick: sizes for one slow core; full: for a larger machine."""

    check: bool = False
    """Exit with 1 unless every registered claim holds."""

    data: Path | None = None
    """Folder with the files of the sets that are not bundled. None: the cache of `ddpnopt data fetch`."""

    out: Path = RESULTS
    """Folder of the page; its folder records holds the finished runs."""

    registration: Path = REGISTRATION
    """File with tasks and rules."""


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing, write the page; returns the exit code."""
    arguments = tyro.cli(Arguments, args=words)
    try:
        registration = read(arguments.registration)
        for task in _known(arguments.tasks, registration.tasks, "task"):
            code = _complete(arguments, registration, task)
            if code:
                return code
    except ValueError as error:
        print(f"suite: {error}", file=sys.stderr)
        return 2
    return 0


def _complete(arguments: Arguments, registration: Registration, name: str) -> int:
    """Carry out a task; 0, or the exit code of the signal that stopped it."""
    task = registration.tasks[name]
    load(task.data, task.sizes[arguments.budget], arguments.data)  # says at once where files are missing
    wanted = _known(arguments.methods, registration.methods, "method") or tuple(registration.methods)
    methods = tuple(m for m in registration.methods_of(name) if m.name in wanted and _at_hand(m.name))
    plan = Plan(registration, task, arguments.budget, methods)
    path = arguments.out / "records" / f"suite-{name}.jsonl"
    with StopRequest() as stop, Bar(f"{name}, {arguments.budget}", plan.count() + 1) as bar:
        recorder = Recorder(path, registration.digest, arguments.data, stop, bar.advance)
        try:
            carry_out(plan, recorder)
            recorder.measure(plan)
        except StoppedError:
            print("stopped; the same command goes on where this one stopped", file=sys.stderr)
            return INTERRUPTED + (stop.signal or 0)
    return 0


def _known(names: Sequence[str], there: Sequence[str] | object, what: str) -> tuple[str, ...]:
    """The names, all of which there are."""
    known = list(there)  # type: ignore[call-overload]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; choose of: {', '.join(known)}")
    return tuple(names)


def _at_hand(method: str) -> bool:
    if installed(method):
        return True
    print(f"left out: {method}, whose package is not installed", file=sys.stderr)
    return False


if __name__ == "__main__":
    sys.exit(main())
