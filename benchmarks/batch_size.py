"""How many samples the curvature should count for, at small batches and at large ones, beside AdamW.

    python benchmarks/batch_size.py

Tasks, networks and loops are the suite's (benchmarks/_suite), with other batch sizes and the same number of steps for
all of them. Each finished run is one line in docs/results/records/batch_size.jsonl; the same command goes on where it
was stopped, and at the end writes docs/results/batch_size.md.
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

from ddpnopt.experiments.environment import version

DEFAULT_LR = 0.1
TASKS = ("digits", "cifar-cnn", "cifar-resnet", "characters")


@dataclass(frozen=True)
class Arguments:
    """How many samples the curvature should count for, at small batches and at large ones, beside AdamW."""

    tasks: tuple[str, ...] = ()
    """The suite's, by name. None: of digits, cifar-cnn, cifar-resnet and characters those whose files are at hand."""

    batches: tuple[int, ...] = (4, 16, 64)
    """Batch sizes."""

    memories: tuple[int, ...] = (0, 1280, 5120)
    """Of DDPNOpt's curvature, in samples."""

    lrs: tuple[float, ...] = (10.0,)
    """Learning rates of DDPNOpt beside the default, at the default memory."""

    rival_lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """Learning rates of AdamW."""

    steps: int = 200
    """Of every run."""

    seeds: int = 3
    """Runs of each kind."""

    data: Path | None = None
    """Folder with the files of the sets that are not bundled. None: the cache of `ddpnopt data fetch`."""

    out: Path = RESULTS
    """Folder of the page; its folder records holds the finished runs."""


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing, write the page; returns the exit code."""
    arguments, registration = tyro.cli(Arguments, args=words), read()
    unknown = [name for name in arguments.tasks if name not in registration.tasks]
    if unknown:
        print(f"batch_size: no task {unknown[0]!r}; choose of: {', '.join(registration.tasks)}", file=sys.stderr)
        return 2
    if not arguments.tasks:
        here = tuple(name for name in TASKS if _at_hand(registration.tasks[name], arguments.data))
        arguments = replace(arguments, tasks=here)
    return carried_out(
        "batch_size",
        lambda: [run for name in arguments.tasks for run in runs(arguments, registration, name)],
        lambda scores: page(arguments, registration, scores),
        registration,
        arguments.data,
        arguments.out,
    )


def runs(arguments: Arguments, registration: Registration, name: str) -> list[Run]:
    """All runs of a task."""
    load(registration.tasks[name].data, registration.tasks[name].sizes[BUDGET], arguments.data)  # says what is missing
    return [
        run
        for batch in arguments.batches
        for kind in (*own_kinds(arguments).values(), *rivals(arguments))
        for run in kind.runs(registration, sized(arguments, registration.tasks[name], batch), arguments.seeds)
    ]


def _at_hand(task: Task, folder: Path | None) -> bool:
    try:
        load(task.data, task.sizes[BUDGET], folder)
    except ValueError as error:
        print(f"left out: {task.name}: {error}", file=sys.stderr)
        return False
    return True


def own_kinds(arguments: Arguments) -> dict[str, Kind]:
    """DDPNOpt's, by the heading of their column."""
    kinds = {
        f"memory {memory:,}": Kind("ddpnopt-default", DEFAULT_LR, {"memory": memory}) for memory in arguments.memories
    }
    return kinds | {f"default, lr {lr:g}": Kind("ddpnopt-default", lr, {}) for lr in arguments.lrs}


def rivals(arguments: Arguments) -> list[Kind]:
    """AdamW's."""
    return [Kind("adamw", lr, {}) for lr in arguments.rival_lrs]


def sized(arguments: Arguments, task: Task, batch: int) -> Task:
    """The task with another batch size, and as many steps as asked for."""
    return replace(task, sizes={BUDGET: replace(task.sizes[BUDGET], batch=batch, steps=arguments.steps)})


def page(arguments: Arguments, registration: Registration, scores: Scores) -> str:
    """Lay the figures out."""
    kinds = own_kinds(arguments)

    def score(name: str, batch: int, kind: Kind) -> float:
        task = sized(arguments, registration.tasks[name], batch)
        return scores(kind.runs(registration, task, arguments.seeds))

    sections = []
    gaps: list[list[float]] = [[] for _ in kinds]
    above = [0] * len(gaps)
    for name in arguments.tasks:
        rows = []
        for batch in arguments.batches:
            ours = [score(name, batch, kind) for kind in kinds.values()]
            theirs = [score(name, batch, kind) for kind in rivals(arguments)]
            best = max(range(len(theirs)), key=theirs.__getitem__)
            for i, value in enumerate(ours):
                gaps[i].append(max(ours) - value)
                above[i] += value > theirs[best]
            cells = [f"**{value:.1f}**" if value == max(ours) else f"{value:.1f}" for value in ours]
            rows.append([str(batch), *cells, f"{theirs[best]:.1f} ({arguments.rival_lrs[best]:g})"])
        header = ["batch", *kinds, "AdamW, its best (lr)"]
        sections.append(f"## {registration.tasks[name].title}\n\n{table(header, rows)}\n")
    lost = [["points below the best of the row, mean", *(f"{sum(own) / len(own):.1f}" for own in gaps), ""]]
    lost += [["most", *(f"{max(own):.1f}" for own in gaps), ""]]
    lost += [["rows in which it is above AdamW's best", *(f"{count} of {len(gaps[0])}" for count in above), ""]]
    tables = "\n".join(sections)
    options: tuple[str, ...] = ("batches", "memories", "lrs", "rival_lrs", "steps", "seeds")
    options = options if arguments.tasks == TASKS else ("tasks", *options)
    computing = duration(scores.seconds)
    return f"""# Memory and batch size

The batch's own curvature stands against the averaged one's, `M (1 / lr + memory / batch)`, which counts for the last
`batch / lr + memory` samples, as far as there were so many. Here are the suite's tasks and networks, {arguments.steps}
steps with linear decay at every batch size, at several memories and `lr = {DEFAULT_LR:g}`, then at the default memory
and other learning rates: validation score in percent at the end, mean over {plural(arguments.seeds, "seed")}, the best
of DDPNOpt's in bold. All else is at its default. AdamW has the best of
{plural(len(arguments.rival_lrs), "learning rate")}, chosen on these very scores; each of DDPNOpt's columns is one
setting for all tasks and batches.

## All of them

{table(["", *header[1:]], lost)}

{tables}
Command: `{command("batch_size.py", arguments, options)}` ({computing} of computing), ddpnopt {version("ddpnopt")}.
"""


if __name__ == "__main__":
    sys.exit(main())
