"""What a step costs where torch's calls are longer than their arithmetic: small networks, calls counted and timed.

    python benchmarks/step_overhead.py

Writes docs/results/step_overhead.md. Calls are those that reach torch's dispatcher, autograd's backward pass included;
their number does not depend on the machine.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from _markdown import command, duration, plural, save_page, table
from _training import RESULTS
from step_time import BLOCK, FORMS, Network, Step, measure, step_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddpnopt.experiments.environment import version

OPTIMIZERS = ("Adam", "Adam, fused", "Kronecker", "Identity")


@dataclass(frozen=True)
class Arguments:
    """What a step costs where torch's calls are longer than their arithmetic."""

    turns: int = 20
    """Timed blocks of ten steps of each optimizer."""

    out: Path = RESULTS
    """Folder of the page."""


def dense(*widths: int) -> Network:
    """Dense layers with ReLU between."""

    def build() -> nn.Module:
        layers = [module for i, o in pairwise(widths) for module in (nn.Linear(i, o), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    return Network(f"Dense network {'-'.join(map(str, widths))}, ReLU", widths[:1], build)


NETWORKS: Mapping[int, Sequence[Network]] = {
    16: (dense(64, 32, 10), dense(64, 32, 32, 32, 32, 32, 10)),
    128: (dense(784, 256, 256, 10),),
}
"""By batch."""


class Calls(TorchDispatchMode):
    """Counts the calls that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls_of(step: Step) -> float:
    """Calls of a step, mean over a block."""
    with Calls() as calls:
        for _ in range(BLOCK):
            step()
    return float(calls.count) / BLOCK


def section(network: Network, batch: int, turns: int) -> str:
    drop_in, _, with_loss = FORMS
    pairs = [(name, drop_in) for name in OPTIMIZERS] + [("Kronecker", with_loss)]
    steps = {(name, form): step_of(network, name, form, batch) for name, form in pairs}
    timings = measure(steps, turns, network.words)
    rows = []
    for key, timing in timings.items():
        middle, low, high = timing.over(timings["Adam", drop_in])
        ratio = [f"{timing.milliseconds:.2f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
        rows.append([*key, f"{calls_of(steps[key]):.0f}", *ratio])
    header = ["", "call form", "calls", "ms per step", "over Adam", "quartiles"]
    return f"## {network.words}, batch {batch}\n\n{table(header, rows)}\n"


def main(words: Sequence[str] | None = None) -> int:
    """Count, time, write the page; returns the exit code."""
    arguments = tyro.cli(Arguments, args=words)
    torch.set_num_threads(1)
    began = time.perf_counter()
    found = [section(network, batch, arguments.turns) for batch, some in NETWORKS.items() for network in some]
    sections = "\n".join(found)
    page = f"""# Cost of a step of small networks

How many calls reach torch's dispatcher in a step, mean over {BLOCK}, which holds a curvature's rare refresh, and
processor time over Adam's of the same turn, in {plural(arguments.turns, "block")} of {BLOCK} steps, all taking turns in
one process, one thread, float32. The machine was shared with other work. [cost.md](../cost.md) says what takes them.

{sections}
Command: `{command("step_overhead.py", arguments, ("turns",))}` ({duration(time.perf_counter() - began)}), \
ddpnopt {version("ddpnopt")}, torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}).
"""
    save_page(arguments.out, "step_overhead", page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
