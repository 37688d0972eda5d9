"""The tasks ``time`` and ``memory``: what a step costs, for one network, batch size and method at a time.

A *case* is a mapping with three entries:

- ``network``: ``"cnn"``, the paper's network on one 28x28 channel and ten classes, or ``[inputs, width, depth]``,
  ``depth`` linear layers with ReLU between them, hidden ones ``width`` wide, and ten outputs;
- ``batch``: samples per step;
- ``method``: a key of ``METHODS``, or :data:`DENSE`, vanilla DDP with every matrix formed.

Data are random, float32, and the learning rate is so small that weights hardly move: a step costs the same throughout.
A step is all of it: forward pass, backward pass and update.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ddpnopt.baselines import VanillaDDP
from ddpnopt.baselines.vanilla_ddp import memory as dense_memory
from ddpnopt.experiments.job import own_random_state
from ddpnopt.experiments.paper import networks
from ddpnopt.experiments.paper.methods import METHODS, Setup
from ddpnopt.experiments.study.task import Result

DENSE = "dense"
LIMIT_GB = 0.9  # GiB for dense DDP's matrices: a step that takes more takes more than some 20 s as well
BLOCK = 10  # steps: a multiple of every curvature's refresh_every, so that a block holds refreshes in due share
UNREFRESHED = ("emsa", "vanilla", DENSE)  # slow, and every step like the others: one makes a block
PARAMS = {"lr": 1e-3, "damping": 0.1, "rho": 1.0}
DIFFERENT = 4  # batches that follow each other: one alone is soon learned by heart, and leaves denormal gradients
CLASSES = 10
PICTURE = (1, 28, 28)
MEMORY_STEPS = 2  # the first makes the state, the second has it beside its own needs
STATUS = Path("/proc/self/status")

Case = Mapping[str, Any]
Step = Callable[[], object]


def case(network: str | Sequence[int], batch: int, method: str) -> dict[str, Any]:
    """A case; the entries are explained at the head of this module."""
    return {"network": network if isinstance(network, str) else list(network), "batch": batch, "method": method}


def run_time(settings: Mapping[str, Any]) -> Result:
    """Time a step of every case, on one thread, all taking turns in one process.

    Args:
        settings: ``cases`` and ``turns``, the number of timed blocks of each.

    Returns:
        ``blocks``: for each case, in order, the seconds per step of its block in every turn.
    """
    with own_random_state(0, threads=1):
        steps = [stepper(one) for one in settings["cases"]]
        lengths = [1 if one["method"] in UNREFRESHED else BLOCK for one in settings["cases"]]
        blocks = take_turns(steps, lengths, int(settings["turns"]))
    return {"blocks": [[float(f"{seconds:.5g}") for seconds in block] for block in blocks]}


def run_memory(
    settings: Mapping[str, Any], child: Sequence[str] = (sys.executable, "-m", "ddpnopt.experiments.paper.cost")
) -> Result:
    """Measure the memory of a few steps of one case, each time in a new process.

    The process first takes the same steps with a network of a few units, so that what libraries load is there, then
    makes network, optimizer and data, then takes two steps.

    Args:
        settings: ``case`` and ``repeats``, of which the median is taken.
        child: the command of that process; it reads a case from its standard input.

    Returns:
        ``added``: MiB by which the steps raised the process's peak of resident memory (VmHWM) above what was resident
        before them (VmRSS); ``peak``: that peak itself.

    Raises:
        ValueError: where the system has no ``/proc/self/status``, or the process failed.
    """
    if not STATUS.exists():
        raise ValueError(f"memory is measured by {STATUS}, which this system does not have: use Linux")
    found = [_in_new_process(settings["case"], child) for _ in range(int(settings["repeats"]))]
    return {name: round(median(one[name] for one in found), 2) for name in ("added", "peak")}


def dense_gib(network: str | Sequence[int], batch: int) -> float:
    """GiB that a step of dense DDP would take by its own estimate, for ``[inputs, width, depth]``."""
    layers = [layer for layer in model(network) if isinstance(layer, nn.Linear)]
    states = [batch * layer.in_features for layer in layers] + [batch * CLASSES]
    return dense_memory(states, [sum(p.numel() for p in layer.parameters()) for layer in layers])


def model(network: str | Sequence[int]) -> nn.Sequential:
    """A case's network, with weights drawn from seed 0 as He et al. 2015 (arXiv 1502.01852) do.

    Torch's own start makes a deep network's gradients so small that arithmetic with them is slow.
    """

    def build() -> nn.Sequential:
        if isinstance(network, str):
            return networks.cnn(PICTURE, CLASSES)
        inputs, width, depth = network
        return networks.fcn((inputs,), width, CLASSES, "relu", depth)

    return networks.seeded(lambda: _restarted(build()), 0)


def stepper(one: Case) -> Step:
    """A function that takes one training step of the case, on a network and with an optimizer of its own."""
    shape = PICTURE if isinstance(one["network"], str) else (one["network"][0],)
    return _stepper(model(one["network"]), shape, one["batch"], one["method"])


def take_turns(
    steps: Sequence[Step], lengths: Sequence[int], turns: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Seconds per step of every step function in each of ``turns`` blocks.

    One step of each before the first turn is not counted. The order is rotated from turn to turn, so that nobody
    always follows the same one.

    Args:
        steps: what is timed.
        lengths: steps that make a block of each.
        turns: blocks of each.
        clock: tells seconds.
    """
    for step in steps:
        step()
    blocks: list[list[float]] = [[] for _ in steps]
    for turn in range(turns):
        for place in range(len(steps)):
            which = (place + turn) % len(steps)
            began = clock()
            for _ in range(lengths[which]):
                steps[which]()
            blocks[which].append((clock() - began) / lengths[which])
    return blocks


def main() -> None:
    """The process that :func:`run_memory` starts: read a case, write ``added`` and ``peak`` in MiB, as JSON."""
    one = json.load(sys.stdin)
    with own_random_state(0, threads=1):
        warm = _tiny(one)
        for _ in range(MEMORY_STEPS):
            warm()
        step = stepper(one)
        before = _resident("VmRSS")
        for _ in range(MEMORY_STEPS):
            step()
        peak = _resident("VmHWM")
    print(json.dumps({"added": peak - before, "peak": peak}))


def _restarted(network: nn.Sequential) -> nn.Sequential:
    for layer in network:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return network


def _tiny(one: Case) -> Step:
    """Steps of the same method on a network of the same sort with next to no units."""
    if isinstance(one["network"], str):
        small = networks.seeded(lambda: networks.cnn((1, 4, 4), CLASSES, channels=2, width=2), 0)
        return _stepper(small, (1, 4, 4), 2, one["method"])
    return _stepper(model([2, 2, 2]), (2,), 2, one["method"])


def _stepper(network: nn.Sequential, shape: tuple[int, ...], batch: int, method: str) -> Step:
    criterion = nn.CrossEntropyLoss()
    optimizer: torch.optim.Optimizer
    if method == DENSE:
        optimizer = VanillaDDP(network, criterion, PARAMS["lr"], memory_limit_gb=LIMIT_GB)
    else:
        optimizer = METHODS[method].build(Setup(network, criterion, batch), PARAMS)
    batches = cycle([_batch(shape, batch) for _ in range(DIFFERENT)])

    def step() -> None:
        x, y = next(batches)
        optimizer.zero_grad()
        criterion(network(x), y).backward()
        optimizer.step()

    return step


def _batch(shape: tuple[int, ...], batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, *shape, dtype=torch.float32), torch.randint(CLASSES, (batch,))


def _in_new_process(one: Case, child: Sequence[str]) -> dict[str, float]:
    done = subprocess.run(child, input=json.dumps(dict(one)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"the memory of {dict(one)} cannot be measured: {done.stderr.strip()[-500:]}")
    return {name: float(value) for name, value in json.loads(done.stdout).items()}


def _resident(entry: str) -> float:
    """MiB of an entry of this process's status.

    VmHWM belongs to the program alone, whereas getrusage's figure may be that of the process that started it.
    """
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(entry + ":"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
