"""Test accuracy against learning rate: DDPNOpt untuned beside SGD, RMSprop and Adam tuned.

    python benchmarks/robustness.py digits

Each finished run is one line in docs/results/records; the same command goes on where it was stopped, and at the
end writes docs/results/robustness.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import _records as records
import tyro
from _comparison import Comparison, Study, compare, failures, missing
from _markdown import command
from _robustness_figure import accuracy_by_rate, figure_name
from _robustness_page import page
from _runner import at_hand, complete
from _training import REPORTED_SEEDS, RESULTS, check_seeds

from ddpnopt.experiments.files import write_atomic
from ddpnopt.experiments.report.plots import save_png

DATASETS = ("digits", "wine", "iris", "fashion-mnist")
_DECIDING = ("seeds", "lrs", "rival_lrs", "epochs")  # settings that change what the page shows


@dataclass(frozen=True)
class Arguments:
    """Test accuracy against learning rate: DDPNOpt untuned beside SGD, RMSprop and Adam tuned."""

    datasets: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")] = ()
    """digits, wine, iris, fashion-mnist. None: all whose files are at hand."""

    seeds: int = REPORTED_SEEDS
    """Number of seeds reported: 0, 1, 2, ... (the rivals are tuned on ten others)."""

    lrs: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    """Learning rates of DDPNOpt."""

    rival_lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0, 30.0, 100.0)
    """Learning rates of SGD, RMSprop and Adam."""

    epochs: int | None = None
    """Passes over the training data. None: 5 for digits, 20 for wine and iris, 1 for fashion-mnist."""

    jobs: int = 1
    """Processes at a time, one thread each."""

    check: bool = False
    """Exit with 1 unless DDPNOpt holds what is claimed of it."""

    redo: bool = False
    """Forget DDPNOpt's recorded runs of these datasets first (after a change of its code); the rivals' stay."""

    data: Path | None = None
    """Folder with the files of fashion-mnist. None: DDPNOPT_DATA, then the system's."""

    out: Path = RESULTS
    """Folder of the page; its folder records holds the finished runs."""


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing, write the page; returns the exit code."""
    arguments = tyro.cli(Arguments, args=words)
    try:
        names = _names(arguments)
        for name in names:
            runs, path = _study(arguments, name).runs(), _file(arguments, name)
            if arguments.redo:
                records.forget(path, "DDPNOpt")
            code = complete(runs, path, arguments.jobs, arguments.data, name)
            if code:
                return code
        return _report(arguments, names)
    except ValueError as error:
        print(f"robustness: {error}", file=sys.stderr)
        return 2


def _report(arguments: Arguments, names: Sequence[str]) -> int:
    comparisons = {name: found for name in DATASETS if (found := _compared(arguments, name)) is not None}
    for name, comparison in comparisons.items():
        save_png(accuracy_by_rate(comparison), arguments.out / figure_name(name))
    path = arguments.out / "robustness.md"
    write_atomic(path, page(list(comparisons.values()), command("robustness.py", arguments, _DECIDING)).encode())
    print(path)
    faults = [fault for name in names for fault in failures(comparisons[name])]
    for fault in faults:
        print(f"does not hold: {fault}", file=sys.stderr)
    return 1 if arguments.check and faults else 0


def _names(arguments: Arguments) -> tuple[str, ...]:
    """The datasets asked for; all whose files are at hand where none is named."""
    names = tuple(name.lower() for name in arguments.datasets)
    unknown = [name for name in names if name not in DATASETS]
    if unknown:
        raise ValueError(f"unknown dataset {unknown[0]!r}; choose one of: {', '.join(DATASETS)}")
    check_seeds(arguments.seeds)
    return names or tuple(name for name in DATASETS if at_hand(name, arguments.data))


def _study(arguments: Arguments, name: str) -> Study:
    return Study(name, arguments.lrs, arguments.rival_lrs, arguments.seeds, arguments.epochs)


def _file(arguments: Arguments, name: str) -> Path:
    return arguments.out / "records" / f"robustness-{name}.jsonl"


def _compared(arguments: Arguments, name: str) -> Comparison | None:
    """A dataset's comparison; None where runs are missing."""
    study, known = _study(arguments, name), records.read(_file(arguments, name))
    return None if missing(study, known) else compare(study, known)


if __name__ == "__main__":
    sys.exit(main())
