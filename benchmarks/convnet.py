"""A small convolutional network on pictures: DDPNOpt untuned beside Adam tuned, after the same number of steps.

    python benchmarks/convnet.py

Both train in the drop-in form. Each finished run is one line in docs/results/records; the same command goes on where
it was stopped, and at the end writes docs/results/convnet.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import _records as records
import tyro
from _convnet_page import page
from _convnet_study import Comparison, Study, compare, failures
from _markdown import command
from _runner import complete
from _training import REPORTED_SEEDS, RESULTS, check_seeds

from ddpnopt.experiments.files import write_atomic

DATASETS = ("digits-images", "fashion-mnist")
_DECIDING = ("seeds", "steps", "adam_lrs")  # settings that change what the page shows


@dataclass(frozen=True)
class Arguments:
    """A small convolutional network on pictures: DDPNOpt untuned beside Adam tuned, after the same number of steps."""

    dataset: Literal["digits-images", "fashion-mnist"] = "digits-images"
    """Which pictures."""

    seeds: int = REPORTED_SEEDS
    """Number of seeds reported: 0, 1, 2, ... (Adam is tuned on ten others)."""

    steps: tuple[int, ...] = (50, 100, 200, 400)
    """Numbers of steps after which accuracy is measured."""

    adam_lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Learning rates of Adam."""

    jobs: int = 1
    """Processes at a time, one thread each."""

    check: bool = False
    """Exit with 1 unless DDPNOpt is above Adam after every number of steps."""

    redo: bool = False
    """Forget DDPNOpt's recorded runs of this dataset first (after a change of its code); Adam's stay."""

    data: Path | None = None
    """Folder with the files of fashion-mnist. None: DDPNOPT_DATA, then the system's."""

    out: Path = RESULTS
    """Folder of the page; its folder records holds the finished runs."""


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing, write the page; returns the exit code."""
    arguments = tyro.cli(Arguments, args=words)
    try:
        check_seeds(arguments.seeds)
        study, path = _study(arguments, arguments.dataset), _file(arguments, arguments.dataset)
        if arguments.redo:
            records.forget(path, "DDPNOpt")
        code = complete(study.runs(), path, arguments.jobs, arguments.data, f"convnet {arguments.dataset}")
        return code or _report(arguments)
    except ValueError as error:
        print(f"convnet: {error}", file=sys.stderr)
        return 2


def _report(arguments: Arguments) -> int:
    comparisons = {name: found for name in DATASETS if (found := _compared(arguments, name)) is not None}
    path = arguments.out / "convnet.md"
    write_atomic(path, page(list(comparisons.values()), command("convnet.py", arguments, _DECIDING)).encode())
    print(path)
    faults = list(failures(comparisons[arguments.dataset]))
    for fault in faults:
        print(f"does not hold: {fault}", file=sys.stderr)
    return 1 if arguments.check and faults else 0


def _study(arguments: Arguments, name: str) -> Study:
    return Study(name, tuple(sorted(set(arguments.steps))), tuple(sorted(set(arguments.adam_lrs))), arguments.seeds)


def _file(arguments: Arguments, name: str) -> Path:
    return arguments.out / "records" / f"convnet-{name}.jsonl"


def _compared(arguments: Arguments, name: str) -> Comparison | None:
    """A dataset's comparison; None where runs are missing."""
    study, known = _study(arguments, name), records.read(_file(arguments, name))
    if any(records.key(run.settings()) not in known for run in study.runs()):
        return None
    return compare(study, known)


if __name__ == "__main__":
    sys.exit(main())
