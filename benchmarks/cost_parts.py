"""Where a step's time goes: counted operations and bytes beside measured times, for Adam and for DDPNOpt's default.

    python benchmarks/cost_parts.py

Writes docs/results/cost_parts.md, for the dense network 784-1024-1024-1024-10 at batch 128 in the drop-in form, one
thread. docs/cost.md explains the counts.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tyro
from _markdown import command, duration, save_page, table
from _training import RESULTS
from step_time import BATCH, BLOCK, FORMS, NETWORKS, step_of
from torch import nn

from ddpnopt import Kronecker, bellman, linearise, steps, trajectory, transaction, value
from ddpnopt.curvature.factor import FULL
from ddpnopt.experiments.environment import version

WIDTHS = (784, 1024, 1024, 1024, 10)


@dataclass(frozen=True)
class Arguments:
    """Where a step's time goes, for Adam and for DDPNOpt's default."""

    blocks: int = 6
    """Timed blocks of ten steps of each."""

    out: Path = RESULTS
    """Folder of the page."""


@dataclass(frozen=True)
class Count:
    """Floating-point operations and bytes to or from memory that a part of a step cannot do without."""

    operations: float
    bytes: float


def counts() -> tuple[dict[str, Count], dict[str, Count]]:
    """Of Adam's step and of DDPNOpt's, by part."""
    B, layers, r = BATCH, list(pairwise(WIDTHS)), Kronecker().rank or 0
    weights = sum(i * o for i, o in layers)
    product = 2 * B * weights  # of the batch with every weight matrix
    inputs = 2 * B * sum(i * o for i, o in layers[1:])  # the first layer's input needs no gradient
    states = 4 * B * sum(WIDTHS)  # bytes of every layer's inputs, once
    sides = [side for pair in layers for side in pair]
    wide = [side for side in sides if side > FULL * r]
    shared = {
        "forward pass": Count(product, 4 * weights + 2 * states),
        "backward pass": Count(product + inputs, 3 * 4 * weights + 4 * states),
    }
    adam = {**shared, "Adam's update": Count(15 * weights, 7 * 4 * weights)}
    gram = sum(2 * B * B * side for side in sides) + sum(4 * B * side * r for side in wide)
    factors = sum(2 * (4 * B * side * r + 4 * side * r * r) for side in wide) / Kronecker().refresh_every
    ours = {
        **shared,
        "copy of the weights": Count(0, 2 * 4 * weights),
        "factors and inverses": Count(factors, 4 * r * sum(wide) / Kronecker().refresh_every),
        "Gram matrices": Count(gram, 2 * 4 * B * sum(sides)),
        "momentum's drift seen by the columns": Count(product, 4 * weights + 2 * states),
        "value recursion": Count(len(layers) * B**3 / 3, len(layers) * 8 * 5 * B * B),
        "second forward pass": Count(product, 4 * weights + 2 * states),
        "deviations": Count(3 * B * sum(WIDTHS[1:-1]), 3 * states),
        "weights on the columns": Count(len(layers) * 2 * B * B, len(layers) * 8 * B * B),
        # the velocity is read and written, then added to the weights
        "update of the weights": Count(product, 5 * 4 * weights),
        "check of the weights": Count(weights, 4 * weights),
    }
    return adam, ours


class Clock:
    """Processor time by part; a part inside another is taken out of it."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its own time booked under ``part``."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.process_time() - began
                self.spent[part] += whole - self._inside.pop()
                if self._inside:
                    self._inside[-1] += whole

        return call


PARTS: Mapping[str, tuple[object, str]] = {
    "backward pass": (torch.Tensor, "backward"),
    "Adam's update": (torch.optim.Adam, "step"),
    "copy of the weights": (transaction.Transaction, "__enter__"),
    "factors and inverses": (bellman, "block_policy"),
    "Gram matrices": (bellman, "gram_and_cost"),
    "momentum's drift seen by the columns": (bellman, "_cost"),
    "value recursion": (value.BatchValue, "backward"),
    "second forward pass": (trajectory.Recorder, "replay"),
    "deviations": (linearise.Linearised, "deviation"),
    "weights on the columns": (value.BatchPolicy, "weights"),
    "update of the weights": (steps, "_move"),
    "check of the weights": (transaction.Transaction, "check"),
}


@contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """Every part's function timed."""
    with ExitStack() as stack:
        for part, (owner, name) in PARTS.items():
            stack.enter_context(patch.object(owner, name, clock.timed(part, getattr(owner, name))))
        stack.enter_context(patch.object(nn.Sequential, "forward", clock.timed("forward pass", nn.Sequential.forward)))
        yield


def measured(optimizer: str, blocks: int) -> dict[str, float]:
    """Milliseconds of a step by part, ``rest`` being what no part holds."""
    step, clock = step_of(NETWORKS["mlp"], optimizer, next(iter(FORMS))), Clock()
    for _ in range(BLOCK + 1):  # the first of a block refreshes
        step()
    with clocked(clock):
        run = clock.timed("rest", step)
        for _ in range(blocks * BLOCK):
            run()
    # the second forward pass is the model's own forward, called from replay
    milliseconds = {part: 1000 * t / (blocks * BLOCK) for part, t in clock.spent.items()}
    if optimizer == "Kronecker":
        half = milliseconds["forward pass"] / 2
        milliseconds["forward pass"] = half
        milliseconds["second forward pass"] += half
    return milliseconds


def section(title: str, counted: Mapping[str, Count], spent: Mapping[str, float]) -> str:
    rows = [
        [part, f"{count.operations / 1e9:.3f}", f"{count.bytes / 2**20:.1f}", f"{spent.get(part, 0.0):.2f}"]
        for part, count in counted.items()
    ]
    rows.append(["rest", "", "", f"{spent['rest']:.2f}"])
    operations, moved = (sum(getattr(c, name) for c in counted.values()) for name in ("operations", "bytes"))
    rows.append(["together", f"{operations / 1e9:.3f}", f"{moved / 2**20:.1f}", f"{sum(spent.values()):.2f}"])
    return f"## {title}\n\n{table(['part', 'GFLOP, counted', 'MiB, counted', 'ms, measured'], rows)}\n"


def main(words: Sequence[str] | None = None) -> int:
    """Count, time, write the page; returns the exit code."""
    arguments = tyro.cli(Arguments, args=words)
    torch.set_num_threads(1)
    began = time.perf_counter()
    adam, ours = counts()
    sections = "\n".join(
        section(title, counted, measured(optimizer, arguments.blocks))
        for title, optimizer, counted in (("Adam", "Adam", adam), ("DDPNOpt, default", "Kronecker", ours))
    )
    page = f"""# Where a step's time goes

Dense network 784-1024-1024-1024-10, batch {BATCH}, drop-in form, float32, one thread: what each part cannot do without,
counted by hand ([cost.md](../cost.md)), beside the processor time it took, means over {arguments.blocks * BLOCK}
steps. The two forward passes of DDPNOpt are timed together and shared out evenly. The machine was shared with other
work.

{sections}
Command: `{command("cost_parts.py", arguments, ("blocks",))}` ({duration(time.perf_counter() - began)}), \
ddpnopt {version("ddpnopt")}, torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}).
"""
    save_page(arguments.out, "cost_parts", page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
