"""What the ranks run: training loops as data, each the same in one process with the concatenated batch."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from networks import Heated, Heating, Mixed, Residual, Unread, Words, conv, mlp, narrowed, pictures, wide
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ddpnopt import Adaptive, Batch, DDPNOpt, EigenKronecker, Exact, Gradient, Identity, Kronecker, Matched, Sampled
from ddpnopt.terminal import Terminal

BATCH = 48  # samples enough for factors of full rank, whose eigenbasis is one
EMPTY, SHORT = 2, 4  # the step at which the last rank has no samples, and the one of a short last batch


def _numbers(model: nn.Module, batch: int) -> Tensor:
    return torch.randint(7, (batch, 5)) if isinstance(model, Words) else torch.randn(batch, 6)


class Hundredfold(nn.CrossEntropyLoss):
    """In units a hundred times as small."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return 100 * super().forward(output, target)


@dataclass(frozen=True)
class Program:
    """A training loop.

    Args:
        model: makes it.
        settings: of the optimizer.
        terminal: made with the criterion.
        criterion: of the loss, on classes or, if it is a squared error, on numbers.
        steps: how many.
        wrap: train in a ``DistributedDataParallel``; ``"given"`` to the optimizer, or the model itself is.
        parts: micro-batches per step.
        form: of the step: after backward, also with a GradScaler that has unscaled, or a closure.
        empty: whether a rank goes without samples once.
        short: samples of the last batch that is a short one.
        twins: every rank has all samples.
        clipped: each rank multiplies its gradients by a factor of its own, one process does not.
        penalty: ``gamma`` of ``gamma / 2 |u|^2`` in the loss.
        apart: how far weights may be from those of one process.
        shard: the model's children (``"children"``), the first of them (``"first"``) or none (``"root"``) are sharded
            each by itself, the rest with the model; ``"some"``: the first, and the rest is not.
        reshard: whether weights are cut again between the forward and the backward pass; ``None`` is torch's choice.
    """

    model: Callable[[], nn.Module] = mlp
    settings: dict[str, Any] = field(default_factory=dict)
    terminal: Callable[[nn.Module], Terminal] | None = None
    criterion: nn.Module = field(default_factory=nn.CrossEntropyLoss)
    steps: int = 6
    wrap: str = ""
    parts: int = 1
    form: str = "backward"
    empty: bool = True
    short: int = 6
    twins: bool = False
    clipped: bool = False
    penalty: float = 0.0
    apart: float = 1e-10
    shard: str = ""
    reshard: bool | None = None


LONG = 0.01
"""A learning rate at which the batch counts for more than ``M``'s first samples, or twins' would for fewer steps."""

DECAYED = {"momentum": 0.5, "weight_decay": 0.01, "decoupled_weight_decay": False}
KRONECKER = Kronecker(refresh_every=2, average_every=1)
PROGRAMS: dict[str, Program] = {
    "identity": Program(settings={"curvature": Identity()}, steps=20),
    "adaptive": Program(settings={"curvature": Adaptive(beta=0.9)}, steps=20),
    "kronecker": Program(settings={"curvature": KRONECKER}, steps=20),
    "eigen": Program(settings={"curvature": EigenKronecker(refresh_every=2)}, steps=20),
    "less damped": Program(narrowed, {"momentum": 0.5}, steps=4),
    "limited": Program(conv, {"momentum": 0.5, "max_change": 0.01}, steps=4),
    "decay and momentum": Program(settings={**DECAYED, "weight_decay": 0.1, "curvature": Identity()}),
    "conv, identity": Program(conv, {"curvature": Identity(), **DECAYED}, steps=20),
    "conv, adaptive": Program(conv, {"curvature": Adaptive(), "weight_decay": 0.01}, steps=20),
    "conv, kronecker": Program(conv, {"curvature": KRONECKER}, steps=20),
    "low rank": Program(wide, {"curvature": Kronecker(refresh_every=2, rank=1)}, criterion=nn.MSELoss(), steps=20),
    "conv, eigen": Program(conv, {"curvature": EigenKronecker(refresh_every=2)}, steps=20),
    "conv, sample": Program(conv, {"coupling": "sample", "lr": 0.01}),
    "pictures, identity": Program(pictures, {"curvature": Identity(), **DECAYED, "decoupled_weight_decay": True}),
    "pictures, adaptive": Program(pictures, {"curvature": Adaptive()}),
    "pictures, kronecker": Program(pictures, {"curvature": KRONECKER}),
    "pictures, low rank": Program(pictures, {"curvature": Kronecker(refresh_every=2, rank=4)}),
    "pictures, eigen": Program(pictures, {"curvature": EigenKronecker(refresh_every=2)}),
    "pictures, exact": Program(pictures, terminal=lambda c: Exact(c)),
    "pictures, sample": Program(pictures, {"coupling": "sample", "lr": 0.01, "weight_decay": 0.01}),
    "pictures, k-fac": Program(pictures, {"coupling": "sample", "feedback": False, "lr": 1e-4}),
    "local": Program(Residual, {"coupling": Batch(local=True), "curvature": Identity(), "lr": 1e-4}, apart=1e-6),
    "local, pictures": Program(
        pictures, {"coupling": Batch(local=True), "curvature": Identity(), "lr": 1e-4}, apart=1e-7
    ),
    "local twins": Program(Residual, {"coupling": Batch(local=True), "momentum": 0.5, "lr": LONG}, twins=True),
    "local twins, pictures": Program(
        pictures, {"coupling": Batch(local=True), "curvature": KRONECKER, "weight_decay": 0.01, "lr": LONG}, twins=True
    ),
    "local twins, adaptive": Program(Residual, {"coupling": Batch(local=True), "curvature": Adaptive()}, twins=True),
    "local twins, eigen": Program(
        settings={"coupling": Batch(local=True), "curvature": EigenKronecker(), "lr": LONG},
        terminal=lambda c: Exact(c),
        twins=True,
    ),
    "local twins, words": Program(Words, {"coupling": Batch(local=True), "lr": LONG}, twins=True),
    "read by the loss": Program(Heated, criterion=Heating()),
    "read by the loss, closure": Program(Heated, criterion=Heating(), form="closure"),
    "penalty": Program(Residual, penalty=0.1),
    "penalty, closure": Program(Residual, {"curvature": Adaptive()}, penalty=0.1, form="closure"),
    "penalty, a wrapper": Program(pictures, penalty=0.1, wrap="given", parts=2, empty=False),
    "penalty, clipped": Program(Unread, penalty=0.1, clipped=True),
    "penalty, unscaled": Program(penalty=0.1, form="unscaled", steps=4),
    "residual": Program(Residual),
    "residual, adaptive": Program(Residual, {"curvature": Adaptive()}),
    "unread": Program(Unread, {"momentum": 0.5}),
    "unread, of a sum": Program(
        Unread, {"lr": 0.01}, terminal=lambda c: Gradient("sum"), criterion=nn.CrossEntropyLoss(reduction="sum")
    ),
    "unread, a wrapper": Program(Unread, wrap="given"),
    "words": Program(Words, {"curvature": KRONECKER}),
    "gradient of a sum": Program(
        settings={"lr": 0.01}, terminal=lambda c: Gradient("sum"), criterion=nn.CrossEntropyLoss(reduction="sum")
    ),
    "large units": Program(settings={"lr": 0.01, "momentum": 0.5}, criterion=Hundredfold(), steps=4),
    "large units, micro-batches": Program(Residual, criterion=Hundredfold(), parts=3, empty=False),
    "large units, unscaled": Program(criterion=Hundredfold(), form="unscaled", steps=4),
    "matched": Program(Residual, terminal=lambda c: Matched(c)),
    "exact": Program(terminal=lambda c: Exact(c)),
    "exact, conv": Program(conv, terminal=lambda c: Exact(c)),
    "sampled": Program(terminal=lambda c: Sampled(c, columns=2), criterion=nn.MSELoss()),
    "sample": Program(settings={"coupling": "sample", "lr": 0.01}),
    "no feedback": Program(settings={"feedback": False}),
    "k-fac": Program(conv, {"coupling": "sample", "feedback": False, "lr": 1e-3, "momentum": 0.5}),
    "ekfac": Program(settings={"curvature": EigenKronecker(), "coupling": "sample", "feedback": False, "lr": 1e-4}),
    "stages": Program(Residual, {"stages": ["first", "inner", "last"]}),
    "micro-batches": Program(Residual, parts=3, empty=False),
    "closure": Program(Residual, form="closure"),
    "closure, matched": Program(Residual, terminal=lambda c: Matched(c), form="closure"),
    "closure with backward": Program(form="closure with backward"),
    "inside a wrapper": Program(Residual, wrap="inside"),
    "a wrapper": Program(conv, wrap="given"),
    "a wrapper, no_sync": Program(Residual, wrap="given", parts=3, empty=False),
    "a wrapper, closure": Program(Residual, wrap="given", form="closure"),
    "sharded, identity": Program(Mixed, DECAYED | {"curvature": Identity()}, steps=20, shard="children"),
    "sharded, adaptive": Program(Mixed, DECAYED | {"curvature": Adaptive()}, steps=20, shard="first", reshard=False),
    "sharded, kronecker": Program(Mixed, {"curvature": KRONECKER}, steps=20, shard="children", reshard=False),
    "sharded, eigen": Program(
        settings={"curvature": EigenKronecker(refresh_every=2)}, steps=20, shard="first", reshard=True
    ),
    "sharded, low rank": Program(
        wide, {"curvature": Kronecker(refresh_every=2, rank=1)}, criterion=nn.MSELoss(), shard="root"
    ),
    "sharded, sample": Program(Mixed, {"coupling": "sample", "lr": 0.01}, steps=20, shard="children"),
    "sharded, no feedback": Program(Mixed, {"feedback": False, "momentum": 0.5}, steps=20, shard="children"),
    "sharded, k-fac": Program(conv, {"coupling": "sample", "feedback": False, "lr": 1e-3}, shard="children"),
    "sharded, stages": Program(Residual, {"stages": ["first", "inner", "last"]}, shard="children"),
    "sharded, less damped": Program(narrowed, {"momentum": 0.5}, steps=4, shard="children"),
    "sharded, limited": Program(Mixed, {"momentum": 0.5, "max_change": 0.01}, steps=4, shard="children"),
    "sharded, unread": Program(Unread, {"momentum": 0.5}, shard="root"),
    "sharded, words": Program(Words, {"curvature": KRONECKER}, shard="root", reshard=True),
    "sharded, exact": Program(Mixed, terminal=lambda c: Exact(c), shard="children", reshard=True),
    "sharded, micro-batches": Program(Residual, parts=2, empty=False, short=9, shard="children"),
    "sharded, closure": Program(Mixed, form="closure with backward", shard="some"),
    "sharded, pictures": Program(pictures, {"curvature": KRONECKER}, shard="children"),
    "sharded, local": Program(
        Residual, {"coupling": Batch(local=True), "momentum": 0.5, "lr": LONG}, twins=True, shard="children"
    ),
}  # fmt: skip


def batches(program: Program) -> list[tuple[Tensor, Tensor]]:
    """All ranks' samples, by step."""
    torch.manual_seed(1)
    model = program.model()
    made = []
    for step in range(program.steps):
        n = program.short if step == SHORT else BATCH
        x = _numbers(model, n)
        with torch.no_grad():
            output = model(x)
        classes = isinstance(program.criterion, nn.CrossEntropyLoss)
        target = torch.randint(3, (n,)) if classes else torch.randn(output.shape)
        made.append((x, target))
    return made


def cut(n: int, rank: int, size: int, *, empty: bool) -> slice:
    """This rank's samples among ``n``: uneven, and none for the last if ``empty``."""
    filled = size - 1 if empty and size > 1 else size
    ends = [n * (i + 1) // filled - (i % 2 if i + 1 < filled else 0) for i in range(filled)]
    return slice([0, *ends, n][rank], [*ends, n][rank])


def train(program: Program, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """Weights after all steps, and what is told of the last one."""
    torch.manual_seed(0)
    model, criterion = program.model(), program.criterion
    wrapper: Any = model
    if program.wrap and size > 1:
        wrapper = nn.parallel.DistributedDataParallel(model)
    if program.shard and size > 1:
        shard(model, size, program.shard, program.reshard)
    settings = dict(program.settings)
    if program.terminal is not None:
        settings["terminal"] = program.terminal(criterion)
    optimizer = DDPNOpt(wrapper if program.wrap == "given" else model, **settings)
    for step, (x, y) in enumerate(batches(program)):
        warnings.filterwarnings("ignore", message=".*(it was not seen to run|is used outside its own runs)")
        own = cut(len(x), rank, size, empty=program.empty and step == EMPTY) if not program.twins else slice(None)
        advance(program, optimizer, wrapper, x[own], y[own])
    return {
        "weights": whole(model),
        "figures": optimizer.diagnostics(),
    }


def shard(model: nn.Module, size: int, which: str, reshard: bool | None = None, **settings: Any) -> None:
    """Apply ``fully_shard`` to ``which`` of the model's children, and to the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mesh = init_device_mesh("cpu", (size,))
    children = [child for child in model.children() if list(child.parameters())]
    inner = {"root": [], "first": children[:1], "some": children[:1], "children": children}[which]
    for module in [*inner, model] if which != "some" else inner:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, **settings)


def whole(model: nn.Module) -> list[Tensor]:
    """The model's weights, put together where they are in pieces."""
    values: list[Any] = [p.detach() for p in model.parameters()]
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for p in values]


def advance(program: Program, optimizer: DDPNOpt, model: Any, x: Tensor, y: Tensor) -> None:
    """One step of a loop."""
    criterion = program.criterion

    def penalty() -> Tensor:
        squares = (p.square().sum() for group in optimizer.param_groups for p in group["params"])
        return program.penalty / 2 * sum(squares, torch.zeros(())) if program.penalty else torch.zeros(())

    if program.form == "backward":
        optimizer.zero_grad()
        pieces = list(zip(x.chunk(program.parts), y.chunk(program.parts), strict=True))
        for i, (inputs, target) in enumerate(pieces):
            last = i + 1 == len(pieces)
            quiet = model.no_sync() if hasattr(model, "no_sync") and not last else contextlib.nullcontext()
            with quiet:
                share = len(inputs) / len(x) if len(pieces) > 1 else 1.0
                ((criterion(model(inputs), target) + penalty()) * share).backward()
        if program.clipped and distributed.is_initialized():
            gradients = (p.grad for group in optimizer.param_groups for p in group["params"])
            torch._foreach_mul_([g for g in gradients if g is not None], 0.5 / (1 + distributed.get_rank()))
        optimizer.step()
        return
    if program.form == "unscaled":
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        scaler.scale(criterion(model(x), y) + penalty()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        return

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = criterion(model(x), y) + penalty()
        if program.form == "closure with backward":
            loss.backward()
        return loss

    optimizer.step(closure)


def train_all(rank: int, size: int, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Programs in turn; what went wrong in one of them, under ``"error"``."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            found[name] = train(PROGRAMS[name], rank, size)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        distributed.barrier()
    return found
