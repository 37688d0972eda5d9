"""Nine tasks, DDPNOpt and its rivals: steps, time and memory to targets fixed beforehand, one tuning budget for all.

    pip install '.[conformance]'                   (the rivals; those that are not installed are left out)
    python benchmarks/suite.py digits

Tasks, sizes, search spaces, seeds and rules stand in benchmarks/_suite/registration.toml. Each finished run is one line
in docs/results/records; the same command goes on where it was stopped, and at the end writes docs/results/suite.md,
with --budget full suite-full.md.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from _progress import Bar
from _runner import INTERRUPTED
from _suite.carrying import Plan, Recorder, StoppedError, carry_out
from _suite.claims import claims, judged
from _suite.figures import profiles
from _suite.methods import installed
from _suite.page import file_names, page
from _suite.registration import REGISTRATION, Budget, Registration, read
from _suite.study import outcome
from _suite.tasks import load
from _training import RESULTS

from ddpnopt.experiments.environment import version
from ddpnopt.experiments.files import write_atomic
from ddpnopt.experiments.interrupt import StopRequest
from ddpnopt.experiments.report.plots import save_png

RIVALS = ("pytorch-optimizer", "asdfghjkl", "singd", "schedulefree")


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
        return _report(arguments, registration)
    except ValueError as error:
        print(f"suite: {error}", file=sys.stderr)
        return 2


def _complete(arguments: Arguments, registration: Registration, name: str) -> int:
    """Carry out a task; 0, or the exit code of the signal that stopped it."""
    task = registration.tasks[name]
    load(task.data, task.sizes[arguments.budget], arguments.data)  # says at once where files are missing
    wanted = _known(arguments.methods, registration.methods, "method") or tuple(registration.methods)
    methods = tuple(m for m in registration.methods_of(name) if m.name in wanted and _at_hand(m.name))
    plan = Plan(registration, task, arguments.budget, methods)
    with StopRequest() as stop, Bar(f"{name}, {arguments.budget}", plan.count() + 1) as bar:
        recorder = Recorder(_file(arguments, name), registration.digest, arguments.data, stop, bar.advance)
        try:
            carry_out(plan, recorder)
            recorder.measure(plan)
        except StoppedError:
            print("stopped; the same command goes on where this one stopped", file=sys.stderr)
            return INTERRUPTED + (stop.signal or 0)
    return 0


def _report(arguments: Arguments, registration: Registration) -> int:
    """Write figure and page from what is on record; 1 where claims are checked and one does not hold."""
    found = [
        outcome(registration, task, arguments.budget, _file(arguments, name))
        for name, task in registration.tasks.items()
    ]
    outcomes = [one for one in found if one is not None]
    if not outcomes:
        print("suite: no task is on record with its reference; name a task", file=sys.stderr)
        return 2
    file, figure = file_names(arguments.budget)
    save_png(profiles(outcomes, tuple(registration.methods.values())), arguments.out / figure)
    software = f"ddpnopt {version('ddpnopt')}, " + ", ".join(
        f"{package} {version(package)}" for package in RIVALS if version(package) is not None
    )
    path = arguments.out / file
    write_atomic(path, page(registration, outcomes, arguments.budget, software).encode())
    print(path)
    failed = [claim for claim in claims(judged(outcomes), registration.claims) if not claim.holds]
    for claim in failed if arguments.check else ():
        print(f"does not hold: {claim.words}: {claim.found}", file=sys.stderr)
    return 1 if arguments.check and failed else 0


def _file(arguments: Arguments, task: str) -> Path:
    return arguments.out / "records" / f"suite-{task}.jsonl"


def _known(names: Sequence[str], there: Mapping[str, object], what: str) -> tuple[str, ...]:
    """The names, all of which there are."""
    for name in names:
        if name not in there:
            raise ValueError(f"unknown {what} {name!r}; choose of: {', '.join(there)}")
    return tuple(names)


def _at_hand(method: str) -> bool:
    if installed(method):
        return True
    print(f"left out: {method}, whose package is not installed", file=sys.stderr)
    return False


if __name__ == "__main__":
    sys.exit(main())
