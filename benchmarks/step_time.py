"""Time of one training step of DDPNOpt over one of Adam, on one thread, for each curvature and call form.

    python benchmarks/step_time.py

Writes docs/results/step_time.md. A step is all of it: forward pass, backward pass, update. All optimizers take turns
in one process, in blocks of steps long enough to hold the rare refreshes of a curvature in their due share, and each
block is compared with Adam's of the same turn, so that a machine that slows down slows both.
"""

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
from _markdown import command, duration, plural, table
from _progress import Bar
from _training import RESULTS
from torch import Tensor, nn

from ddpnopt import Adaptive, DDPNOpt, EigenKronecker, Identity, Kronecker
from ddpnopt.experiments.environment import version
from ddpnopt.experiments.files import write_atomic

BATCH = 128
BLOCK = 10  # steps: a multiple of every curvature's refresh_every
DIFFERENT = 16  # batches that follow each other: one alone is soon learned by heart, and leaves denormal gradients
CURVATURES = (Identity(), Adaptive(), Kronecker(), EigenKronecker())
Step = Callable[[], object]


@dataclass(frozen=True)
class Arguments:
    """Time of one training step of DDPNOpt over one of Adam, on one thread, for each curvature and call form."""

    turns: int = 21
    """Timed blocks of each optimizer."""

    networks: tuple[Literal["mlp", "cnn"], ...] = ("mlp", "cnn")
    """mlp: dense 784-256-256-10. cnn: four convolutions of 16 channels on 3x32x32 pictures, two dense layers."""

    out: Path = RESULTS
    """Folder of the page."""


@dataclass(frozen=True)
class Network:
    """A network to time, and the shape of one of its inputs."""

    words: str
    shape: tuple[int, ...]
    build: Callable[[], nn.Module]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, stride in ((3, 1), (16, 2), (16, 1), (16, 2)):
        layers += [nn.Conv2d(inputs, 16, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 8 * 8, 64), nn.ReLU(), nn.Linear(64, 10))


NETWORKS: Mapping[str, Network] = {
    "mlp": Network("Dense network 784-256-256-10, ReLU", (784,), mlp),
    "cnn": Network(
        "Four 3x3 convolutions of 16 channels (strides 1, 2, 1, 2) on 3x32x32 pictures, dense layers 1024-64-10, ReLU",
        (3, 32, 32),
        cnn,
    ),
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


def contestants(network: Network) -> dict[tuple[str, str], Step]:
    """A step function, on a network of its own, by optimizer and call form; Adam is first."""
    torch.manual_seed(0)
    batches = [(torch.randn(BATCH, *network.shape), torch.randint(10, (BATCH,))) for _ in range(DIFFERENT)]
    criterion = nn.CrossEntropyLoss()

    def loss_of(model: nn.Module) -> Callable[[], Tensor]:
        turns = cycle(batches)

        def loss() -> Tensor:
            x, y = next(turns)
            value: Tensor = criterion(model(x), y)
            return value

        return loss

    model = network.build()
    steps = {("Adam", next(iter(FORMS))): plain(torch.optim.Adam(model.parameters()), loss_of(model))}
    for curvature in CURVATURES:
        for words, form in FORMS.items():
            model = network.build()
            steps[type(curvature).__name__, words] = form(DDPNOpt(model, curvature=curvature), loss_of(model))
    return steps


def measure(steps: Mapping[tuple[str, str], Step], turns: int, title: str) -> dict[tuple[str, str], Timing]:
    """Time every step function in ``turns`` blocks, taking turns; one block before that is not counted."""
    blocks: dict[tuple[str, str], list[float]] = {name: [] for name in steps}
    names = list(steps)
    with Bar(title, turns + 1) as bar:
        for turn in range(turns + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody always follows the same one
                began = time.perf_counter()
                for _ in range(BLOCK):
                    steps[name]()
                if turn:
                    blocks[name].append((time.perf_counter() - began) / BLOCK)
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


def page(sections: Sequence[str], arguments: Arguments, seconds: float) -> str:
    settings = ", ".join(f"`{curvature!r}`" for curvature in CURVATURES)
    software = f"ddpnopt {version('ddpnopt')}, torch {torch.__version__}"
    tables = "\n".join(sections)
    return f"""# Time of a step over Adam's

A step is forward pass, backward pass and update, for DDPNOpt also its second forward pass. Batch {BATCH}, random data,
float32, one thread, learning rate at its default. Each optimizer trains a network of its own; all take turns in one
process, in {plural(arguments.turns, "block")} of {BLOCK} steps, which hold a curvature's rare refreshes in due
share. The ratio is the median over the turns of a block's time to Adam's block of the same turn, with quartiles.

{tables}
Curvatures: {settings}; terminal `Gradient()`, coupling `"batch"`.

Command: `{command("step_time.py", arguments, ("turns", "networks"))}` ({duration(seconds)}), {software}.
Milliseconds and, less so, ratios depend on the machine ({torch.backends.cpu.get_cpu_capability()}).
"""


def main(words: Sequence[str] | None = None) -> int:
    """Time, write the page; returns the exit code."""
    arguments = tyro.cli(Arguments, args=words)
    torch.set_num_threads(1)
    began = time.perf_counter()
    try:
        sections = [
            section(NETWORKS[name], measure(contestants(NETWORKS[name]), arguments.turns, name))
            for name in arguments.networks
        ]
    except KeyboardInterrupt:
        print("stopped; nothing written", file=sys.stderr)
        return 130
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "step_time.md"
    write_atomic(path, page(sections, arguments, time.perf_counter() - began).encode())
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
