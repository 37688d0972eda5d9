"""The commands that carry out the paper's experiments, each as runs in a database, and report on them."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from ddpnopt.experiments.files import write_atomic
from ddpnopt.experiments.interrupt import StopRequest
from ddpnopt.experiments.paper.registry import EXPERIMENTS
from ddpnopt.experiments.report import report
from ddpnopt.experiments.report.section import Section, withheld
from ddpnopt.experiments.study import records
from ddpnopt.experiments.study.database_lab import DatabaseLab
from ddpnopt.experiments.study.display import RunsDisplay
from ddpnopt.experiments.study.store import Store
from ddpnopt.experiments.study.worker import codes, exit_on, work

_KINDS = "ddpnopt.experiments.paper.kinds"
_INTERRUPTED = 128  # plus the signal's number: a shell's convention for the exit code


@dataclass(frozen=True)
class Options:
    """Where and how an experiment's runs are carried out."""

    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Fewer seeds and shorter runs, to see it work; kept apart from the full experiment."""

    storage: str | None = None
    """Database of the runs: sqlite:///FOLDER/FILE.db or postgresql+psycopg://USER@HOST/DATABASE.
    None: OUT/runs.db."""

    jobs: int | None = None
    """Worker processes on this machine; 0 leaves the runs to `ddpnopt worker`. None: one a core."""

    out: Path = Path("runs/paper")
    """Folder for pages, pictures and records."""


_DEFAULTS = Options()


@dataclass(frozen=True)
class Reproduce:
    """Experiments to carry out one after the other in one database, and to report on together.

    Attributes:
        command: word by which the command is called.
        names: keys of ``EXPERIMENTS``.
        options: where and how.
        kinds: module that says what can be run.
    """

    command: str
    names: Sequence[str]
    options: Options
    kinds: str

    def run(self) -> int:
        """Carry out the experiments; returns the exit code.

        Raises:
            ValueError: runs failed or settings will not do; the other experiments were carried out and reported.
        """
        if self.options.jobs is not None and self.options.jobs < 0:
            raise ValueError(f"jobs must be at least 0, not {self.options.jobs}")
        address = self.options.storage or f"sqlite:///{self.options.out / 'runs.db'}"
        done, failed = [], []
        with Store(address) as store, StopRequest() as stop, RunsDisplay() as display:
            for name in self.names:
                try:
                    done.append(self._carry_out(name, store, display, stop))
                except KeyboardInterrupt:
                    display.line("ddpnopt: stopped; the same command goes on where this one stopped")
                    return _INTERRUPTED + (stop.signal or signal.SIGINT)
                except ValueError as error:
                    failed.append(f"{name}: {error}")
        if done:
            self._report(done)
        if failed:
            raise ValueError("; ".join(failed))
        return 0

    def _carry_out(self, name: str, store: Store, display: RunsDisplay, stop: StopRequest) -> "_Done":
        study = name + "-quick" * self.options.quick
        jobs = _cores() if self.options.jobs is None else self.options.jobs
        display.start(study)
        began = time.monotonic()
        lab = DatabaseLab(store, study, self.kinds, jobs, display, stop)
        section = EXPERIMENTS[name].run(lab, self.options.quick)
        if self.options.quick:
            section = withheld(section, "A quick run is too short to judge by.")
        runs = store.runs(list(lab.tasks))
        seconds = sum(run.seconds or 0.0 for run in runs.values())
        path = self.options.out / "records" / f"{study}{records.SUFFIX}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, records.lines(list(lab.tasks.values()), runs))
        return _Done(section, path, len(lab.tasks), lab.computed, seconds, time.monotonic() - began)

    def _report(self, done: Sequence["_Done"]) -> None:
        quick = self.options.quick
        title = "The paper's experiments" if len(self.names) > 1 else done[0].section.title
        page = report.write(
            [one.section for one in done],
            self.options.out / (self.command + "-quick" * quick),
            title + " (quick settings)" * quick,
            {one.section.name: one.seconds for one in done},
            {one.section.name: f"ddpnopt {one.section.name}{' --quick' * quick}" for one in done},
        )
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 120  # a log has no width: do not fold the tables
        for one in done:
            _print_section(console, one.section)
            print(
                f"{one.runs} runs, {report.duration(one.seconds)} of computing in all; this call computed "
                f"{one.computed} of them and took {report.duration(one.wall)}\nrecords: {one.records}"
            )
        print(f"page:    {page}")


@dataclass(frozen=True)
class _Done:
    """An experiment that was carried out: ``seconds`` of its runs, on whatever machine and in whatever call."""

    section: Section
    records: Path
    runs: int
    computed: int
    seconds: float
    wall: float


@dataclass(frozen=True)
class Worker:
    """Take runs from a database and carry them out, beside other workers on this and other machines."""

    storage: str
    """Database of the runs, as it was given to the command that asks for them."""

    study: str | None = None
    """Take only runs of this study, such as table3 or table3-quick. None: of any."""

    wait: float = 60.0
    """Seconds without any run waiting or under way after which the worker ends."""

    kinds: Annotated[str, tyro.conf.Suppress] = _KINDS

    def run(self) -> int:
        """Work; returns the exit code."""
        if not self.wait >= 0:
            raise ValueError(f"wait must be at least 0, not {self.wait:g}")
        exit_on(signal.SIGINT, signal.SIGTERM)
        module: Any = import_module(self.kinds)
        # a run that must be alone on its machine is left to the command that can see to that
        with Store(self.storage) as store:
            done = work(store, module.KINDS, codes(module, alone=False), self.study, self.wait)
        print(f"{done} runs done; none is left that this installation's source can carry out")
        return 0


@dataclass(frozen=True)
class Import:
    """Put the finished runs of a report's records into a database, so that they are not computed again."""

    records: tyro.conf.Positional[tuple[Path, ...]]
    """Files of records, or folders of them, such as docs/results/paper/records."""

    storage: str = f"sqlite:///{_DEFAULTS.out / 'runs.db'}"
    """Database of the runs; it is made where it does not exist."""

    timings: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also runs that measure time or memory: they tell of the machine that made them, not of this one."""

    def run(self) -> int:
        """Take over what the source and torch of this installation would compute likewise; returns the exit code.

        Raises:
            ValueError: a file is damaged, or all runs were made by other source or another torch.
        """
        paths = records.files(self.records)
        module: Any = import_module(_KINDS)
        wanted = codes(module, alone=None if self.timings else False)
        timed = {} if self.timings else codes(module, alone=True)
        with Store(self.storage) as store:
            every = {path: records.take(store, path, wanted, timed) for path in paths}
        for path, taken in every.items():
            left = (
                f"{taken.other_code} made by other source or another torch",
                f"{taken.measured} that measure time or memory (--timings takes them)",
                f"{taken.failed} that failed",
            )
            words = ", ".join(one for one in left if not one.startswith("0 "))
            print(f"{path.name}: {taken.new} runs taken over, {taken.known} known{'; left out: ' * bool(words)}{words}")
        if not any(taken.new or taken.known for taken in every.values()):
            raise ValueError(
                "none of these runs can stand for one of this installation; the commands compute them anew"
            )
        return 0


def subcommands() -> dict[str, Callable[..., Any]]:
    """What makes each command from its options, by the command's name."""
    every = {name: _maker(name, [name], experiment.what) for name, experiment in EXPERIMENTS.items()}
    reported = [name for name, experiment in EXPERIMENTS.items() if experiment.reported]
    everything = _maker("reproduce", reported, "Carry out the experiments one after the other and write one report.")
    return every | {"reproduce": everything, "worker": Worker, "import": Import}


def _maker(command: str, names: Sequence[str], what: str) -> Callable[..., Reproduce]:
    def make(options: Annotated[Options, tyro.conf.arg(name="")] = _DEFAULTS) -> Reproduce:
        return Reproduce(command, names, options, _KINDS)

    make.__doc__ = what
    return make


def _print_section(console: Console, section: Section) -> None:
    for table in section.tables:
        shown = TerminalTable()
        for place, title in enumerate(table.header):
            shown.add_column(Text(title), justify="left" if place == 0 else "right")
        for row in table.rows:
            shown.add_row(*(Text(cell) for cell in row))
        console.print(Text(table.title, style="bold"), shown, Text(table.note), sep="\n")
    for verdict in section.verdicts:
        line = f"{verdict.claim} ({verdict.form}): {verdict.judgement}. {verdict.evidence}"
        console.print(line, markup=False, soft_wrap=True)


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
