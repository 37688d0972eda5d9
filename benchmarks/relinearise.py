"""Test accuracy with and without relinearisation, everything else equal.

    python benchmarks/relinearise.py

Each finished run is one line in docs/results/records; the same command goes on where it was stopped, and at the
end writes docs/results/relinearise.md.
"""

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import _records as records
import tyro
from _markdown import command, duration, number, plural, table, verdict
from _runner import complete
from _training import RESULTS, Run, check_seeds, plan

from ddpnopt.experiments import data
from ddpnopt.experiments.config import CurvatureName, TrainConfig
from ddpnopt.experiments.files import write_atomic
from ddpnopt.experiments.stats import mean_interval, paired_difference

DATASET = "digits"
Coupling = Literal["batch", "relinearised"]
COUPLINGS: tuple[Coupling, ...] = get_args(Coupling)
_DECIDING = ("curvatures", "seeds", "lrs", "epochs")  # settings that change what the page shows


@dataclass(frozen=True)
class Arguments:
    """Test accuracy with and without relinearisation, everything else equal."""

    curvatures: tuple[CurvatureName, ...] = ("kronecker", "identity")
    """Curvatures, each with its defaults."""

    seeds: int = 5
    """Number of seeds: 0, 1, 2, ..."""

    lrs: tuple[float, ...] = (1e-2, 1e-1, 1.0, 10.0, 100.0)
    """Learning rates."""

    epochs: int = 5
    """Passes over the training data."""

    jobs: int = 1
    """Processes at a time, one thread each."""

    redo: bool = False
    """Forget the recorded runs first (after a change of the code)."""

    out: Path = RESULTS
    """Folder of the page; its folder records holds the finished runs."""


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing, write the page; returns the exit code."""
    arguments = tyro.cli(Arguments, args=words)
    path = arguments.out / "records" / "relinearise.jsonl"
    try:
        check_seeds(arguments.seeds)
        if arguments.redo:
            records.forget(path, "DDPNOpt")
        runs = list(_runs(arguments))
        code = complete(runs, path, arguments.jobs, None, "relinearise")
        if code:
            return code
        known = records.read(path)
        found = {run: known[records.key(run.settings())] for run in runs}
        page = arguments.out / "relinearise.md"
        write_atomic(page, _page(arguments, found).encode())
    except ValueError as error:
        print(f"relinearise: {error}", file=sys.stderr)
        return 2
    print(page)
    return 0


def _runs(arguments: Arguments) -> Iterator[Run]:
    for curvature in arguments.curvatures:
        for lr in arguments.lrs:
            for coupling in COUPLINGS:
                yield from _of(arguments, curvature, lr, coupling)


def _of(arguments: Arguments, curvature: CurvatureName, lr: float, coupling: Coupling) -> list[Run]:
    """The runs of one setting, by seed."""
    config = TrainConfig(
        dataset=DATASET,
        model="fcn",
        curvature=curvature,
        coupling=coupling,
        lr=lr,
        weight_decay=0.0,
        epochs=arguments.epochs,
    )
    return [plan(replace(config, seed=seed)) for seed in range(arguments.seeds)]


@dataclass(frozen=True)
class Pair:
    """One learning rate with both couplings: test accuracies in percent and final train losses, by seed."""

    lr: float
    tests: Mapping[Coupling, list[float]]
    losses: Mapping[Coupling, list[float]]
    diverged: int

    def verdict(self) -> str:
        """Whether relinearised is higher, lower, or not told apart."""
        return verdict(paired_difference(self.tests["relinearised"], self.tests["batch"]))


def _pairs(arguments: Arguments, found: Mapping[Run, records.Result], curvature: CurvatureName) -> list[Pair]:
    pairs = []
    for lr in arguments.lrs:
        results = {c: [found[run] for run in _of(arguments, curvature, lr, c)] for c in COUPLINGS}
        pairs.append(
            Pair(
                lr,
                {c: [100 * result["test"][-1] for result in own] for c, own in results.items()},
                {
                    c: [math.nan if result["train_loss"] is None else result["train_loss"] for result in own]
                    for c, own in results.items()
                },
                sum(result["diverged"] for own in results.values() for result in own),
            )
        )
    return pairs


def _page(arguments: Arguments, found: Mapping[Run, records.Result]) -> str:
    pairs = {curvature: _pairs(arguments, found, curvature) for curvature in arguments.curvatures}
    counts = Counter(pair.verdict() for own in pairs.values() for pair in own)
    words = ", ".join(f"{word} at {counts[word]}" for word in ("higher", "lower", "not told apart"))
    source, config = data.source(DATASET), next(iter(found)).config
    diverged = sum(pair.diverged for own in pairs.values() for pair in own)
    seconds = math.fsum(result["wall"] for result in found.values())
    versions = ", ".join(sorted({result["torch"] for result in found.values()}))
    sections = [f"## {_written(curvature, found)}\n\n{_table(own)}\n" for curvature, own in pairs.items()]
    return f"""# Relinearising in the rollout

`coupling=Batch(relinearise=True)` against `coupling="batch"`: every stage of the second forward pass solves its
problem again at the state it meets. All else is equal, paired by seed: network, initial weights, order of the
samples, hyper-parameters. {source.title}, dense network of 5 layers, width {source.width};
batch {config.batch_size}, {plural(config.epochs, "epoch")}, {plural(arguments.seeds, "seed")}.

**Of {counts.total()} settings, relinearised is {words}.** {_gain(counts)}
Of {len(found)} runs, {diverged} diverged.

Test accuracy in percent, mean over seeds ± 95 % t interval; differences paired by seed, not corrected for their
number. Train losses: mean over seeds, at the end, without and with.

{chr(10).join(sections)}
Command: `{command("relinearise.py", arguments, _DECIDING)}` ({plural(len(found), "run")},
{duration(seconds)} of computing on one thread, torch {versions}).
"""


def _gain(counts: Mapping[str, int]) -> str:
    if counts["higher"] > counts["lower"]:
        return "It helps here more often than it harms."
    return "There is no gain here." if counts["higher"] == 0 else "There is no gain here on the whole."


def _written(curvature: CurvatureName, found: Mapping[Run, records.Result]) -> str:
    run = next(run for run in found if run.config.curvature == curvature and run.config.coupling == "batch")
    return f"`{run.settings()['method']}`"


def _table(pairs: Sequence[Pair]) -> str:
    header = ["learning rate", "batch", "relinearised", "difference", "relinearised is", "train losses"]
    rows = []
    for pair in pairs:
        difference = paired_difference(pair.tests["relinearised"], pair.tests["batch"])
        rows.append(
            [
                f"{pair.lr:g}",
                *(number(mean_interval(pair.tests[c])) for c in COUPLINGS),
                number(difference, sign=True),
                verdict(difference),
                " / ".join(f"{mean_interval(pair.losses[c]).mean:.3f}" for c in COUPLINGS),
            ]
        )
    return table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
