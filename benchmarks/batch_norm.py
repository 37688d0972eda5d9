"""What BatchNorm's coupling of the samples costs: one step against the exact joint step, and whole trainings.

    python benchmarks/batch_norm.py

Writes docs/results/batch_norm.md. In training mode BatchNorm makes every sample's output depend on all inputs, while
the columns are taken as if sample b's column lived in sample b only; feedback is then off. The exact step comes
from ``ddpnopt.reference``: the state is the whole batch as one vector, the dynamics mix its samples, and its policies
are followed closed loop, in float64. The trainings are on DIGITS, in float32.
"""

import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median

import torch
import tyro
from _markdown import command, duration, plural, save_page, table
from _training import RESULTS
from torch import Tensor, nn
from torch.func import functional_call

from ddpnopt import DDPNOpt, Identity, StepError, reference
from ddpnopt.experiments.data import Dataset, load
from ddpnopt.experiments.environment import version
from ddpnopt.reference import step as dense

CRITERION = nn.CrossEntropyLoss()
INPUTS, WIDTH, CLASSES = 4, 6, 3
HIDDEN, BATCH = 32, 16  # of the trainings


@dataclass(frozen=True)
class Arguments:
    """One step of DDPNOpt on a small network with BatchNorm against the exact joint step, and trainings with it."""

    batches: tuple[int, ...] = (8, 32, 64)
    """Batch sizes."""

    lrs: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    """Learning rates."""

    seeds: int = 5
    """Networks and batches of each kind."""

    train_lrs: tuple[float, ...] = (0.1, 1.0, 10.0)
    """Learning rates of the trainings."""

    train_seeds: int = 3
    """Trainings of each kind."""

    epochs: int = 5
    """Length of a training."""

    out: Path = RESULTS
    """Folder of the page."""


def network(training: bool) -> nn.Sequential:
    """Two dense layers with BatchNorm in between, its scale and shift a stage of their own."""
    model = nn.Sequential(
        nn.Linear(INPUTS, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)
    ).double()
    model[1].train(training)
    return model


def exact_step(model: nn.Sequential, x: Tensor, y: Tensor, lr: float) -> list[Tensor]:
    """The parameters after dense DDP on the joint state of all samples, in the model's order."""
    parts = [nn.Sequential(*list(model)[own]) for own in (slice(1), slice(1, 3), slice(3, None))]
    stages, count = [], len(x)
    for part in parts:
        named = dict(part.named_parameters())
        u = torch.cat([p.detach().flatten() for p in named.values()])
        R = torch.eye(len(u), dtype=u.dtype) / lr
        f, none = partial(_apply, part, named, count), torch.zeros_like(u)
        stages.append(reference.Stage(f, u, R, none, none))
    states = list(accumulate(stages, lambda X, stage: stage.f(stage.u, X[0])[None], initial=x.reshape(1, -1)))
    end = reference.gradient(nn.functional.cross_entropy, states[-1].view(count, -1), y).joint()
    solve = partial(reference.bellman, full_Q_uu=True, feedback=True, second_order=False)
    policies = dense.backward_pass(stages, states, end, solve, 0.0)
    laws = [dense.affine(policy, X) for policy, X in zip(policies, states[:-1], strict=True)]
    controls, _ = dense.rollout(stages, states[0], laws, end.weight)
    sizes = [[p.numel() for p in part.parameters()] for part in parts]
    return [piece for u, own in zip(controls, sizes, strict=True) for piece in u.split(own)]


def _apply(part: nn.Sequential, named: dict[str, nn.Parameter], count: int, u: Tensor, X: Tensor) -> Tensor:
    """A stage on the joint state: parameters ``u [P]``, states ``X [B n]``."""
    pieces = zip(named.items(), u.split([p.numel() for p in named.values()]), strict=True)
    values = {name: piece.view_as(p) for (name, p), piece in pieces}
    norm = part[0]
    if isinstance(norm, nn.BatchNorm1d):
        x = X.view(count, -1)
        mean, var = x.mean(0), x.var(0, correction=0)
        if not norm.training and norm.running_mean is not None and norm.running_var is not None:
            mean, var = norm.running_mean, norm.running_var
        return torch.tanh((x - mean) / (var + norm.eps).sqrt() * values["0.weight"] + values["0.bias"]).flatten()
    out: Tensor = functional_call(part, values, (X.view(count, -1),))
    return out.flatten()


@dataclass(frozen=True)
class Difference:
    """Relative error of the update, cosine to the exact one, decrease of the loss over that of the exact step."""

    error: float
    cosine: float
    decrease: float


def difference(seed: int, count: int, lr: float, *, training: bool) -> Difference:
    """Of one step on one network and batch."""
    torch.manual_seed(seed)
    model = network(training)
    with torch.no_grad():
        for tensor in (model[1].weight, model[1].running_var):
            assert isinstance(tensor, Tensor)
            tensor.uniform_(0.5, 1.5)
    x, y = torch.randn(count, INPUTS, dtype=torch.float64), torch.randint(CLASSES, (count,))
    own = deepcopy(model)
    optimizer = DDPNOpt(own, lr, curvature=Identity(), momentum=0.0, weight_decay=0.0)
    optimizer.step(lambda: CRITERION(own(x), y))
    wanted = exact_step(model, x, y, lr)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    ours = torch.cat([p.detach().flatten() for p in own.parameters()]) - start
    exact = torch.cat(wanted) - start
    with torch.no_grad():
        before, after = CRITERION(model(x), y), CRITERION(own(x), y)
        for parameter, value in zip(model.parameters(), wanted, strict=True):
            parameter.copy_(value.view_as(parameter))
        best = CRITERION(model(x), y)
    cosine = float(ours @ exact / (ours.norm() * exact.norm()))
    return Difference(float((ours - exact).norm() / exact.norm()), cosine, float((before - after) / (before - best)))


def trained(dataset: Dataset, seed: int, lr: float, epochs: int) -> float | None:
    """Test accuracy in percent after a training with BatchNorm in every hidden layer; ``None`` if a step failed."""
    torch.manual_seed(seed)
    widths = (dataset.train.x[0].numel(), HIDDEN, HIDDEN)
    hidden = [(nn.Linear(i, o), nn.BatchNorm1d(o), nn.Tanh()) for i, o in pairwise(widths)]
    model = nn.Sequential(*(module for layer in hidden for module in layer), nn.Linear(HIDDEN, dataset.source.classes))
    optimizer = DDPNOpt(model, lr, momentum=0.0, weight_decay=0.0)
    for _ in range(epochs):
        for batch in torch.randperm(len(dataset.train.x)).split(BATCH):
            if len(batch) < BATCH:
                continue  # a batch of one sample has no statistics
            optimizer.zero_grad()
            CRITERION(model(dataset.train.x[batch]), dataset.train.y[batch]).backward()
            try:
                optimizer.step()
            except StepError:
                return None
    with torch.no_grad():
        right = model.eval()(dataset.test.x).argmax(1) == dataset.test.y
    return 100 * float(right.float().mean())


def trainings(arguments: Arguments) -> str:
    """Test accuracy by learning rate."""
    dataset, rows = load("digits"), []
    for lr in arguments.train_lrs:
        found = [trained(dataset, seed, lr, arguments.epochs) for seed in range(arguments.train_seeds)]
        rows.append([f"{lr:g}", *("failed" if accuracy is None else f"{accuracy:.1f}" for accuracy in found)])
    return table(["lr", *(f"seed {seed}" for seed in range(arguments.train_seeds))], rows)


def page(arguments: Arguments) -> str:
    """Measure, and lay the figures out."""
    began = time.perf_counter()
    rows: list[list[str]] = []
    control: list[float] = []
    for count in arguments.batches:
        for lr in arguments.lrs:
            found = [difference(seed, count, lr, training=True) for seed in range(arguments.seeds)]
            control += [difference(seed, count, lr, training=False).error for seed in range(arguments.seeds)]
            errors, cosines, decreases = zip(*((d.error, d.cosine, d.decrease) for d in found), strict=True)
            figures = (median(errors), max(errors), median(cosines), median(decreases))
            rows.append([str(count), f"{lr:g}", *(f"{value:.3f}" for value in figures)])
    header = ["batch", "lr", "error", "largest error", "cosine", "decrease"]
    software = f"ddpnopt {version('ddpnopt')}, torch {torch.__version__}"
    return f"""# BatchNorm in training mode against the exact joint step

BatchNorm makes each sample's output depend on the whole batch; the columns are taken as if sample b's column lived in
sample b only, and feedback is off
([derivations](../derivations.md#batchnorm-in-training-mode)). Here one step on {INPUTS}-{WIDTH}-{CLASSES}
with BatchNorm before Tanh is compared with dense DDP on the joint state, closed loop, whose dynamics do mix the
samples:
`Identity()`, `Gradient()`, coupling `"batch"`, float64, random inputs and labels, {plural(arguments.seeds, "seed")}.
Error: length of the difference of the two updates over the length of the exact one, median and largest over the seeds.
Cosine between the two updates, and decrease of the loss over that of the exact step: medians.

{table(header, rows)}

With BatchNorm in evaluation mode, which mixes nothing, the largest error over all rows is {max(control):.0e}:
feedback is back then.

## Training with it

Test accuracy in percent on DIGITS of a dense network with two hidden layers of {HIDDEN}, BatchNorm before each Tanh,
after {plural(arguments.epochs, "epoch")} of batches of {BATCH}; default settings but for the learning rate, and without
momentum and weight decay.

{trainings(arguments)}

Command: `{command("batch_norm.py", arguments, ("batches", "lrs", "seeds", "train_lrs", "train_seeds", "epochs"))}`
({duration(time.perf_counter() - began)}), {software}.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and write the page."""
    arguments = tyro.cli(Arguments, args=words)
    save_page(arguments.out, "batch_norm", page(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
