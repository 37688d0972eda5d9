"""The commands: settings from the command line, the work, and what is printed about it."""

import shlex
import signal
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import Annotated, Protocol

import tyro
from rich.console import Console

from ddpnopt.experiments import data, files, runs
from ddpnopt.experiments.compare import CompareConfig, check, compare, count_runs
from ddpnopt.experiments.config import TrainConfig, resolve
from ddpnopt.experiments.data import Dataset
from ddpnopt.experiments.data.commands import Data
from ddpnopt.experiments.interrupt import StoppedError, StopRequest
from ddpnopt.experiments.paper import commands as paper
from ddpnopt.experiments.progress import Display, Reporter, Silent
from ddpnopt.experiments.report import comparison as report
from ddpnopt.experiments.report.tables import terminal_table, verdict
from ddpnopt.experiments.runs import Result
from ddpnopt.experiments.team import Team, join, launched
from ddpnopt.experiments.train import total_steps, train

_INTERRUPTED = 128  # plus the signal's number: a shell's convention for the exit code

# a settings class whose options stand on the command line without a prefix
_Flat = tyro.conf.arg(name="")


@dataclass(frozen=True)
class Train:
    """Train one network with one optimizer, and keep all of it in a run folder."""

    config: Annotated[TrainConfig, _Flat] = field(default_factory=TrainConfig)

    out: Path = Path("runs")
    """Folder in which the run folder is made."""

    name: str | None = None
    """Name of the run folder. None: DATASET-OPTIMIZER-seedSEED, numbered where that exists."""

    data: Path | None = None
    """Folder with the files of a dataset that is not bundled. None: the cache, then the system's."""

    resume: Path | None = None
    """Continue the run in this folder, with its settings, bit-exactly; only --data may stand beside it."""

    def run(self) -> int:
        """Train, on every rank that a launcher has started; returns the exit code."""
        with join() as team:
            return _train(self, team)


@dataclass(frozen=True)
class Compare:
    """Run several optimizers over several seeds; print a table, write loss curves and a page."""

    config: Annotated[CompareConfig, _Flat] = field(default_factory=CompareConfig)

    out: Path = Path("runs")
    """Folder in which the comparison's folder is made."""

    name: str | None = None
    """Name of the comparison's folder, whose finished runs are read back. None: compare-DATASET."""

    data: Path | None = None
    """Folder with the files of a dataset that is not bundled. None: the cache, then the system's."""

    def run(self) -> int:
        """Compare; returns the exit code."""
        return _compare(self)


class Command(Protocol):
    """What was asked for, its settings read but not yet checked."""

    def run(self) -> int:
        """Carry it out; returns the exit code."""


def run(arguments: Sequence[str]) -> int:
    """Read the command line (:func:`parse`) and carry it out.

    Returns:
        The exit code.

    Raises:
        ValueError: a launcher started several processes of a command that does not share its work out among them.
    """
    command = parse(arguments)
    if launched() and not isinstance(command, Train):
        with join() as team, team.together():
            raise ValueError("of all commands only train runs on several ranks; start this one without the launcher")
    return command.run()


def parse(arguments: Sequence[str]) -> Command:
    """Read the command line; help and misuse end the program as usual, with codes 0 and 2."""
    parsed: Command = tyro.extras.subcommand_cli_from_dict(
        {"train": Train, "compare": Compare, "data": Data, **paper.subcommands()},
        prog="ddpnopt",
        description="Train networks by differential dynamic programming, and compare with what you use now.",
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    return parsed


def _train(command: Train, team: Team) -> int:
    config, folder = team.from_first(lambda: _train_target(command))
    with team.together():
        dataset = data.load(config.dataset, command.data)
    if team.leads and runs.finished(folder) is not None:
        print(f"{folder} is finished already; its result:")
    label = f"{config.dataset} {config.optimizer}"
    shown: AbstractContextManager[Reporter] = Display(label) if team.leads else nullcontext(Silent())
    with StopRequest(patient=team.size > 1) as stop, shown as display:
        try:
            result = train(config, folder, dataset, display, stop, team)
        except (StoppedError, KeyboardInterrupt) as error:
            words = ["ddpnopt", "train", "--resume", str(folder)]
            words += [] if command.data is None else ["--data", str(command.data)]
            where = str(error) or "stopped inside a step; the last checkpoint holds"
            display.line(f"ddpnopt: {where}\ncontinue with: {shlex.join(words)}")
            return _INTERRUPTED + (stop.signal or signal.SIGINT)
    if team.leads:
        _print_result(config, folder, dataset, result)
    return 0


def _compare(command: Compare) -> int:
    config = check(command.config)
    dataset = data.load(config.dataset, command.data)
    folder = command.out / (command.name or f"compare-{config.dataset}")
    with StopRequest() as stop, Display(f"{config.dataset}") as display:
        try:
            comparison = compare(config, folder, _Runs(dataset, folder, display, stop, count_runs(config)))
        except (StoppedError, KeyboardInterrupt):
            display.line("ddpnopt: stopped; the same command goes on where this one stopped")
            return _INTERRUPTED + (stop.signal or signal.SIGINT)
    page = report.write(comparison, dataset, folder)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a log has no width: do not fold the table
    console.print(terminal_table(comparison))
    console.print(verdict(comparison), markup=False, soft_wrap=True)
    for row in comparison.rows:
        if row.choice.at_edge:
            print(f"note: {row.optimizer}'s learning rate ends its grid; a better value may lie beyond")
    print(f"curves: {folder / report.CURVES}\npage:   {page}")
    return 0


@dataclass
class _Runs:
    """Carries out the runs of a comparison one after another, and shows how far they are."""

    dataset: Dataset
    folder: Path
    display: Display
    stop: StopRequest
    planned: int
    done: int = 0

    def __call__(self, config: TrainConfig, name: str) -> Result:
        folder = self.folder / name
        if self.stop():
            raise StoppedError(folder, 0, total_steps(config, len(self.dataset.train)))
        resolved = resolve(config)
        title = f"{resolved.optimizer} lr {resolved.lr:g} seed {resolved.seed}"
        self.display.label = f"run {self.done + 1}/{self.planned}: {title}"
        known = runs.finished(folder) is not None
        result = train(config, folder, self.dataset, self, self.stop)
        self.done += 1
        if not self.display.on_terminal:
            end = "read back" if known else f"validation accuracy {result.validation_accuracy:.1%}"
            self.display.line(f"{self.display.label}: {end}{' (diverged)' * (result.status == 'diverged')}")
        return result

    def step(self, done: int, total: int, loss: float) -> None:
        """Count the step among those of all runs."""
        self.display.step(self.done * total + done, self.planned * total, loss)

    def line(self, text: str) -> None:
        """Say nothing of single epochs."""


def _train_target(command: Train) -> tuple[TrainConfig, Path]:
    """Settings and folder of the run that is asked for, new or resumed."""
    if command.resume is None:
        config = resolve(command.config)
        return config, _new_folder(command, config)
    default = TrainConfig()
    given = [f.name for f in fields(TrainConfig) if getattr(command.config, f.name) != getattr(default, f.name)]
    given += ["name"] * (command.name is not None)
    if given:
        raise ValueError(f"--resume takes its settings from {command.resume}; leave out {', '.join(given)}")
    return runs.read_config(command.resume), command.resume


def _new_folder(command: Train, config: TrainConfig) -> Path:
    if command.name is not None:
        folder = command.out / command.name
        if folder.exists():
            raise ValueError(f"{folder} exists; continue it with --resume {folder}, or take another --name")
        return folder
    name = f"{config.dataset}-{config.optimizer}-seed{config.seed}"
    numbered = (command.out / (name if number == 1 else f"{name}-{number}") for number in count(1))
    return next(folder for folder in numbered if not folder.exists())


def _print_result(config: TrainConfig, folder: Path, dataset: Dataset, result: Result) -> None:
    tests = len(dataset.test)
    loss = "not finite" if result.train_loss is None else f"{result.train_loss:.4g}"
    print(f"{dataset.source.title}, {config.model}, {config.optimizer}, lr {config.lr:g}, seed {config.seed}")
    if result.status == "diverged":
        print(f"diverged       {result.reason}; the figures are those of the last weights")
    print(f"train loss     {loss}")
    print(f"test accuracy  {result.test_accuracy:.1%} ({round(result.test_accuracy * tests)} of {tests})")
    per_step = 1000 * result.seconds / max(1, result.steps)
    print(f"time           {result.seconds:.1f} s for {result.steps} steps, {per_step:.2f} ms each")
    print(f"run folder     {folder} ({files.METRICS}, {files.CHECKPOINT}, {files.RESULT})")
