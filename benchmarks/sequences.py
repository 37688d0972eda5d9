"""What a loss over the positions of a sequence needs, at several lengths: other numbers, or its own curvature.

    python benchmarks/sequences.py

The suite's character transformer and loop (benchmarks/_suite), with windows of other lengths. Each finished run is one
line in docs/results/records/sequences.jsonl; the same command goes on where it was stopped, and at the end writes
docs/results/sequences.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from _kinds import BUDGET, Kind, Scores, carried_out
from _markdown import command, duration, plural, table
from _suite.registration import Registration, Task, read
from _suite.running import Run
from _suite.tasks import load
from _training import RESULTS

from ddpnopt import Kronecker
from ddpnopt.experiments.environment import version

LR = 0.1
COLUMNS = 2
ADVICE = {"damping": 0.01, "memory": 160}  # for losses over many outputs of a sample


@dataclass(frozen=True)
class Arguments:
    """What a loss over the positions of a sequence needs, at several lengths: other numbers, or its own curvature."""

    lengths: tuple[int, ...] = (8, 32, 128)
    """Letters of a window."""

    steps: tuple[int, ...] = (150, 600)
    """Of a run."""

    rival_lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    """Learning rates of AdamW and of Muon."""

    seeds: int = 3
    """Runs of each kind."""

    data: Path | None = None
    """Folder with shakespeare.txt. None: the cache of `ddpnopt data fetch`."""

    out: Path = RESULTS
    """Folder of the page; its folder records holds the finished runs."""


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing, write the page; returns the exit code."""
    arguments, registration = tyro.cli(Arguments, args=words), read()
    if min(arguments.lengths, default=0) < 1 or min(arguments.steps, default=0) < 1:
        print("sequences: lengths and steps must be at least 1, and there must be some of each", file=sys.stderr)
        return 2
    return carried_out(
        "sequences",
        lambda: runs(arguments, registration),
        lambda scores: page(arguments, registration, scores),
        registration,
        arguments.data,
        arguments.out,
    )


def runs(arguments: Arguments, registration: Registration) -> list[Run]:
    """All there are, the short ones first."""
    found = []
    for length in arguments.lengths:
        for steps in arguments.steps:
            task = windowed(registration, length, steps)
            load(task.data, task.sizes[BUDGET], arguments.data)  # says what is missing
            for kind in (*own_kinds(length).values(), *rivals(arguments, "adamw"), *rivals(arguments, "muon")):
                found += kind.runs(registration, task, arguments.seeds)
    return sorted(found, key=lambda run: run.size.steps)


def windowed(registration: Registration, length: int, steps: int) -> Task:
    """The characters in windows of a length."""
    task = registration.tasks["characters"]
    size = replace(task.sizes[BUDGET], steps=steps)
    return replace(task, name=f"characters-{length}", data=f"shakespeare-{length}", sizes={BUDGET: size})


def own_kinds(length: int) -> dict[str, Kind]:
    """DDPNOpt's, by the heading of their column."""
    scaled = float(f"{Kronecker().damping / length:.3g}")
    by_hand = float(f"{LR / length:.3g}")
    sampled = {"terminal": "sampled", "columns": COLUMNS}
    return {
        "default": Kind("ddpnopt-default", LR, {}),
        "cap 1": Kind("ddpnopt-default", LR, {"cap": 1.0}),
        "cap 1, lr and damping over T": Kind("ddpnopt-default", by_hand, {"cap": 1.0, "damping": scaled}),
        "Sampled": Kind("ddpnopt-default", LR, sampled),
        "Sampled, with these": Kind("ddpnopt-default", LR, {**sampled, **ADVICE}),
    }


def rivals(arguments: Arguments, method: str) -> list[Kind]:
    """One rival's, by learning rate."""
    return [Kind(method, lr, {}) for lr in arguments.rival_lrs]


def page(arguments: Arguments, registration: Registration, scores: Scores) -> str:
    """Lay the figures out."""
    rows, names = [], tuple(own_kinds(1))
    above = {rival: dict.fromkeys(names, 0) for rival in ("adamw", "muon")}
    for length in arguments.lengths:
        for steps in arguments.steps:
            task = windowed(registration, length, steps)

            def score(kind: Kind, task: Task = task) -> float:
                return scores(kind.runs(registration, task, arguments.seeds))

            row = [f"{length}, {steps}"]
            ours = [score(kind) for kind in own_kinds(length).values()]
            for method, ahead in above.items():
                best, lr = max((score(kind), kind.lr) for kind in rivals(arguments, method))
                row.append(f"{best:.1f} ({lr:g})")
                for name, value in zip(names, ours, strict=True):
                    ahead[name] += value > best
            cells = [f"**{value:.1f}**" if value == max(ours) else f"{value:.1f}" for value in ours]
            rows.append([row[0], *cells, *row[1:]])
    count = len(rows)
    for rival, ahead in above.items():
        words = f"above {registration.methods[rival].title}'s best"
        rows.append([words, *(f"{ahead[name]} of {count}" for name in names), "", ""])
    header = ["letters T, steps", *names, "AdamW, its best (lr)", "Muon + AdamW, its best (lr)"]
    size = registration.tasks["characters"].sizes[BUDGET]
    options = ("lengths", "steps", "rival_lrs", "seeds")
    return f"""# Sequences

The loss of a sequence of `T` letters is the mean over its letters. The square of its gradient, which is all that
`Gradient()`, the default, knows of its curvature, is up to `T` times less than one letter's. The default counts the
letters at the model's output and makes up for it ([derivations](../derivations.md#a-mean-over-many-outputs)).
`cap 1`: `Gradient(cap=1)`, which does not count them; `lr and damping over T`: with that, `lr = {LR:g} / T` and
`Kronecker(damping={Kronecker().damping:g} / T)`.
`Sampled`: the terminal `Sampled(criterion, columns={COLUMNS}, cap=1.0)`, columns of the curvature at every letter;
`with these`: and `Kronecker(damping={ADVICE["damping"]:g}, memory={ADVICE["memory"]})`.

The suite's character transformer, one block of width {size.width[0]}, {size.train:,} windows, batch {
        size.batch
    }, linear
decay: share of the validation loss explained at the end, in percent, mean over {plural(arguments.seeds, "seed")}, the
best of DDPNOpt's in bold. DDPNOpt has `lr = {LR:g}` where nothing else is said; AdamW and Muon the best of
{plural(len(arguments.rival_lrs), "learning rate")}, chosen on these very scores.

{table(header, rows)}

A step with `Sampled` took {_cost(arguments, registration, scores)} the default's time, evaluation not counted.

Command: `{command("sequences.py", arguments, options)}` ({duration(scores.seconds)} of computing), ddpnopt {
        version("ddpnopt")
    }.
"""


def _cost(arguments: Arguments, registration: Registration, scores: Scores) -> str:
    ratios = []
    for length in arguments.lengths:
        task, kinds = windowed(registration, length, max(arguments.steps)), own_kinds(length)
        own, base = (
            scores.step_seconds(kinds[name].runs(registration, task, arguments.seeds))
            for name in ("Sampled, with these", "default")
        )
        ratios.append(own / base)
    return f"{min(ratios):.1f} to {max(ratios):.1f} times"


if __name__ == "__main__":
    sys.exit(main())
