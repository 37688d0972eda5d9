"""Cost of one training step of DDPNOpt over one of Adam, on one thread: time, peak memory, growth.

    python benchmarks/step_time.py

Writes docs/results/step_time.md. A step is all of it: forward pass, backward pass, update. All optimizers take turns
in one process, in blocks of steps long enough to hold the rare refreshes of a curvature in their due share, and each
block is compared with Adam's of the same turn, after as many steps as it takes until the rare ones are rare. What is
counted is the processor's time spent in the process, which a machine shared with other work disturbs less than the
clock on the wall. Memory is measured in a fresh process each.
"""

import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

import torch
import tyro
from _markdown import command, duration, plural, save_page, table
from _progress import Bar
from _training import RESULTS
from torch import Tensor, nn

from ddpnopt import Adaptive, DDPNOpt, EigenKronecker, Identity, Kronecker
from ddpnopt.baselines import EKFAC, EMSA
from ddpnopt.experiments.environment import version

BATCH = 128
MEMORY_BATCH = 256
PROCESSES = 5  # of whose peaks the median is taken: they differ by a tenth
BATCHES = (64, 128, 256, 512, 1024)
DEPTHS = (2, 4, 8)  # hidden layers
BLOCK = 10  # steps: a multiple of every curvature's refresh_every
SETTLED = 100  # steps after which the default curvature is refreshed as rarely as it ever is
DIFFERENT = 16  # batches that follow each other: one alone is soon learned by heart, and leaves denormal gradients
Step = Callable[[], object]
Make = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Arguments:
    """Cost of one training step of DDPNOpt over one of Adam, on one thread: time, peak memory, growth."""

    turns: int = 7
    """Timed blocks of each optimizer."""

    networks: tuple[Literal["small", "mlp", "cnn"], ...] = ("small", "mlp", "cnn")
    """small: dense 784-256-256-10. mlp: dense 784-1024-1024-1024-10. cnn: the paper's, on 3x32x32 pictures."""

    growth: bool = True
    """Also time the mlp with other batches and depths."""

    memory: bool = True
    """Also measure peak memory, in fresh processes."""

    out: Path = RESULTS
    """Folder of the page."""

    peak: tuple[str, str, str] | None = None
    """Measure this alone, in this process, and print the bytes: a network, an optimizer, a call form."""


@dataclass(frozen=True)
class Network:
    """A network to time, the shape of one of its inputs, and which optimizers are too dear to be timed on it."""

    words: str
    shape: tuple[int, ...]
    build: Callable[[], nn.Module]
    left_out: tuple[str, ...] = ()


def mlp(width: int = 1024, depth: int = 3) -> nn.Module:
    """784, then ``depth`` hidden layers of ``width``, then 10; ReLU."""
    layers: list[nn.Module] = []
    for inputs in (784, *[width] * (depth - 1)):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def cnn(channels: int = 32) -> nn.Module:
    """Four 3x3 convolutions, strides 1, 2, 1, 2, then two dense layers; ReLU."""
    layers: list[nn.Module] = []
    for inputs, stride in ((3, 1), (channels, 2), (channels, 1), (channels, 2)):
        layers += [nn.Conv2d(inputs, channels, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 8 * 8, 64), nn.ReLU(), nn.Linear(64, 10))


NETWORKS: Mapping[str, Network] = {
    "small": Network("Dense network 784-256-256-10, ReLU", (784,), lambda: mlp(256, 2)),
    "mlp": Network("Dense network 784-1024-1024-1024-10, ReLU", (784,), mlp, ("Adaptive", "EigenKronecker", "EMSA")),
    "cnn": Network(
        "Four 3x3 convolutions of 32 channels (strides 1, 2, 1, 2) on 3x32x32 pictures, dense layers 2048-64-10, ReLU",
        (3, 32, 32),
        cnn,
        ("EMSA",),
    ),
}

OPTIMIZERS: Mapping[str, Make] = {
    "Adam": lambda model: torch.optim.Adam(model.parameters()),
    "Adam, fused": lambda model: torch.optim.Adam(model.parameters(), fused=True),
    "EKFAC": lambda model: EKFAC(model, 0.01),
    "EMSA": lambda model: EMSA(model, rho=1.0),
    "Kronecker": lambda model: DDPNOpt(model),
    "Kronecker, no momentum": lambda model: DDPNOpt(model, momentum=0.0),
    "Identity": lambda model: DDPNOpt(model, curvature=Identity(), momentum=0.0),
    "Adaptive": lambda model: DDPNOpt(model, curvature=Adaptive(), momentum=0.0),
    "EigenKronecker": lambda model: DDPNOpt(model, curvature=EigenKronecker(), momentum=0.0),
}


def plain(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Step:
    """``loss.backward(); optimizer.step()``."""

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def closure_with_backward(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Step:
    """``optimizer.step(closure)`` with a closure that calls ``backward``."""

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return float(value.detach())

    return lambda: optimizer.step(closure)


def closure_with_loss(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Step:
    """``optimizer.step(closure)`` with a closure that only returns the loss."""
    return lambda: optimizer.step(loss)  # type: ignore[arg-type]


FORMS: Mapping[str, Callable[[torch.optim.Optimizer, Callable[[], Tensor]], Step]] = {
    "`loss.backward(); step()`": plain,
    "`step(closure)`, closure calls `backward`": closure_with_backward,
    "`step(closure)`, closure returns the loss": closure_with_loss,
}


@dataclass(frozen=True)
class Timing:
    """Seconds of a step, one value a block; blocks of the same place belong to the same turn."""

    blocks: tuple[float, ...]

    @property
    def milliseconds(self) -> float:
        """Median time of a step."""
        return 1000 * median(self.blocks)

    def over(self, other: "Timing") -> tuple[float, float, float]:
        """Median and quartiles of the ratio to another's block of the same turn."""
        ratios = [own / its for own, its in zip(self.blocks, other.blocks, strict=True)]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0], 0.0, ratios[0])
        return median(ratios), low, high


def step_of(network: Network, optimizer: str, form: str, batch: int = BATCH, different: int = DIFFERENT) -> Step:
    """A step function of an optimizer on a network of its own."""
    torch.manual_seed(0)
    batches = cycle([(torch.randn(batch, *network.shape), torch.randint(10, (batch,))) for _ in range(different)])
    model, criterion = network.build(), nn.CrossEntropyLoss()

    def loss() -> Tensor:
        x, y = next(batches)
        value: Tensor = criterion(model(x), y)
        return value

    return FORMS[form](OPTIMIZERS[optimizer](model), loss)


def contestants(network: Network) -> dict[tuple[str, str], Step]:
    """Step functions by optimizer and call form; Adam is first."""
    drop_in, _, with_loss = FORMS
    steps = {}
    for name in OPTIMIZERS:
        if name not in network.left_out:
            steps[name, drop_in] = step_of(network, name, drop_in)
        if name.startswith(("Kronecker", "Identity")):
            for form in list(FORMS)[1:] if name == "Kronecker" else [with_loss]:
                steps[name, form] = step_of(network, name, form)
    return steps


def measure(steps: Mapping[tuple[str, str], Step], turns: int, title: str) -> dict[tuple[str, str], Timing]:
    """Time every step function in ``turns`` blocks, taking turns; one block before that is not counted."""
    blocks: dict[tuple[str, str], list[float]] = {name: [] for name in steps}
    names = list(steps)
    with Bar(title, turns + 1) as bar:
        for _ in range(SETTLED - BLOCK):
            for name, step in steps.items():
                step() if name[0].startswith("Kronecker") else None
        for turn in range(turns + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody always follows the same one
                began = time.process_time()
                for _ in range(BLOCK):
                    steps[name]()
                if turn:
                    blocks[name].append((time.process_time() - began) / BLOCK)
            bar.advance()
    return {name: Timing(tuple(values)) for name, values in blocks.items()}


def section(network: Network, timings: Mapping[tuple[str, str], Timing]) -> str:
    adam = next(iter(timings.values()))
    rows = []
    for (optimizer, form), timing in timings.items():
        middle, low, high = timing.over(adam)
        rows.append([optimizer, form, f"{timing.milliseconds:.2f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}"])
    header = ["", "call form", "ms per step", "over Adam", "quartiles"]
    return f"## {network.words}\n\n{table(header, rows)}\n"


def growth(turns: int) -> str:
    """Time of a step against batch and depth, and the exponents of a power law through the first and the last."""
    drop_in = next(iter(FORMS))
    lines = []
    for words, sizes, networks in (
        ("batch", BATCHES, [(NETWORKS["mlp"], size) for size in BATCHES]),
        ("hidden layers", DEPTHS, [(Network("", (784,), lambda d=d: mlp(depth=d)), BATCH) for d in DEPTHS]),  # type: ignore[misc]
    ):
        steps = {
            (name, str(size)): step_of(network, name, drop_in, batch)
            for size, (network, batch) in zip(sizes, networks, strict=True)
            for name in ("Adam", "Kronecker")
        }
        timings = measure(steps, turns, words)
        rows = []
        for name in ("Adam", "Kronecker"):
            times = [timings[name, str(size)].milliseconds for size in sizes]
            exponent = math.log(times[-1] / times[0]) / math.log(sizes[-1] / sizes[0])
            last = math.log(times[-1] / times[-2]) / math.log(sizes[-1] / sizes[-2])
            rows.append([name, *(f"{t:.1f}" for t in times), f"{exponent:.2f} ({last:.2f})"])
        ratios = [timings["Kronecker", str(size)].over(timings["Adam", str(size)])[0] for size in sizes]
        rows.append(["ratio", *(f"{ratio:.2f}" for ratio in ratios), ""])
        lines.append(table([words, *map(str, sizes), "exponent (of the last step)"], rows))
    tables = "\n\n".join(lines)
    return f"""## Growth with batch and depth

Milliseconds of a step of dense networks 784-1024-...-10 in the drop-in form, by batch (three hidden layers) and by
depth (batch {BATCH}).

{tables}
"""


def memory_of(entry: str) -> int:
    """``VmRSS``, what this process has in memory, or ``VmHWM``, the most it ever had, in bytes."""
    status = Path("/proc/self/status").read_text()  # getrusage counts in the parent that this was forked from
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{entry}:")))


def peak_of(network: str, optimizer: str, form: str) -> int:
    """How far this process's memory grows above what it was before the model was built, in bytes."""
    nn.Linear(8, 8)(torch.randn(4, 8)).sum().backward()  # what torch loads at first use
    before = memory_of("VmRSS")
    step = step_of(NETWORKS[network], optimizer, form, MEMORY_BATCH, different=1)
    for _ in range(BLOCK + 2):
        step()
    return memory_of("VmHWM") - before


def memory(networks: Sequence[str]) -> str:
    """Peak memory in fresh processes."""
    drop_in, _, with_loss = FORMS
    rows = []
    for network in networks:
        adam = 0.0
        for name, form in (("Adam", drop_in), ("EKFAC", drop_in), ("Kronecker", drop_in), ("Kronecker", with_loss)):
            words = [sys.executable, __file__, "--peak", network, name, form]
            ended = (subprocess.run(words, capture_output=True, text=True, check=True) for _ in range(PROCESSES))
            peak = median(int(one.stdout.split()[-1]) for one in ended)
            adam = adam or peak
            rows.append([NETWORKS[network].words, name, form, f"{peak / 2**20:.0f}", f"{peak / adam:.2f}"])
    header = ["network", "", "call form", "MiB", "over Adam"]
    return (
        f"## Peak memory\n\nBatch {MEMORY_BATCH}: the largest resident size in {BLOCK + 2} steps above that before the "
        f"model was built, median of {PROCESSES} fresh processes.\n\n{table(header, rows)}\n"
    )


def page(sections: Sequence[str], arguments: Arguments, seconds: float) -> str:
    software = f"ddpnopt {version('ddpnopt')}, torch {torch.__version__}"
    tables = "\n".join(sections)
    return f"""# Cost of a step over Adam's

A step is forward pass, backward pass and update, for DDPNOpt also its second forward pass. Batch {BATCH}, random data,
float32, one thread, learning rate at its default. Each optimizer trains a network of its own; all take turns in one
process, in {plural(arguments.turns, "block")} of {BLOCK} steps, which hold a curvature's rare refreshes in due
share, once these are rare: after {SETTLED} steps of the default curvature. The ratio is the median over the turns of a
block's time to Adam's block of the same turn, with quartiles. Times are processor time of the process: the machine was
shared with other work, and the quartiles tell how much that shows. `Adam` is `torch.optim.Adam(model.parameters())`,
torch's default on a processor; its fused form is listed too. What is not listed for a network would take more than ten
times as long there. Where the time goes is in [cost.md](../cost.md).

{tables}
`Kronecker` is DDPNOpt's default: the curvature
`{Kronecker()!r}`,
terminal `Gradient()`, coupling `"batch"`, momentum 0.5. The other curvatures are without momentum. The other names are
curvatures of DDPNOpt, but for the rivals `Adam`, `EKFAC` and `EMSA`.

Command: `{command("step_time.py", arguments, ("turns", "networks"))}` ({duration(seconds)}), {software}.
Milliseconds and, less so, ratios depend on the machine ({torch.backends.cpu.get_cpu_capability()}).
"""


def main(words: Sequence[str] | None = None) -> int:
    """Time, write the page; returns the exit code."""
    arguments = tyro.cli(Arguments, args=words)
    torch.set_num_threads(1)
    if arguments.peak:
        print(peak_of(*arguments.peak))
        return 0
    began = time.perf_counter()
    try:
        sections = [
            section(NETWORKS[name], measure(contestants(NETWORKS[name]), arguments.turns, name))
            for name in arguments.networks
        ]
        sections += [growth(arguments.turns)] if arguments.growth else []
        sections += [memory([n for n in arguments.networks if n != "small"])] if arguments.memory else []
    except KeyboardInterrupt:
        print("stopped; nothing written", file=sys.stderr)
        return 130
    save_page(arguments.out, "step_time", page(sections, arguments, time.perf_counter() - began))
    return 0


if __name__ == "__main__":
    sys.exit(main())
