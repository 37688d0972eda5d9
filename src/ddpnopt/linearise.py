"""From recorded passes to columns at every tensor of theirs, and to the loss's value at the output."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from .columns import CHUNK
from .errors import StepError
from .finite import all_finite
from .output_loss import OutputLoss
from .passes import Pass, fronted, signed_sum, wide
from .terminal import Factored, Gradient, RankOne, Terminal
from .trajectory import Recorder


@dataclass(frozen=True)
class Linearised:
    """One pass with the columns its cotangents stand for.

    Args:
        recorded: the pass; its cotangents are ``[B, ...]`` if ``scale`` is given, else columns ``[R, B, ...]``.
        scale: ``c / w [B]``: what turns the batch's cotangents into columns ``c g`` of the samples' own losses.
    """

    recorded: Pass
    scale: Tensor | None

    def unscaled(self, cotangent: Tensor, dim: int = 0) -> Tensor:
        """Columns ``[R, B, ...]``, at least in float32, but for ``scale``; ``dim`` as in :meth:`columns`."""
        cotangent = wide(cotangent)
        return fronted(cotangent, 1 + dim, 1) if self.scale is None else fronted(cotangent, dim)[None]

    def columns(self, cotangent: Tensor, dim: int = 0) -> Tensor:
        """Columns ``[R, B, ...]``, at least in float32; ``dim``: which dimension of one column is the batch."""
        columns = self.unscaled(cotangent, dim)
        if self.scale is None:
            return columns
        return columns * self.scale.to(columns).view(-1, *[1] * (cotangent.ndim - 1))

    def deviation(self, stage: nn.Module, inputs: Sequence[Tensor], name: str) -> Tensor | None:
        """``r = P' dx [R, B]`` of a stage's own inputs, now ``inputs``; ``None`` if nothing before it moves.

        Asked once, after :meth:`keep_products`: the gradients at the inputs are let go of.
        """
        visit = self.recorded.visits[stage]
        now = [tuple(x.shape) for x in inputs]
        if visit.shapes != now:
            raise StepError(
                f"the input of {name or 'the model'} had shape {visit.shapes} in the forward pass and {now} in the "
                f"second one that step() runs: the batch was changed between forward and step"
            )
        total = None
        for before, new, cotangent, dim in zip(visit.products, inputs, visit.cotangents, visit.dims, strict=True):
            if cotangent is None or before is None:
                continue
            product = self.projected(cotangent, new, before, dim)
            total = product if total is None else total + product
        visit.cotangents[:] = [None] * len(visit.cotangents)
        return total

    def projected(self, cotangent: Tensor, new: Tensor, before: Tensor, dim: int = 0) -> Tensor:
        """``P' dx [R, B]`` of one tensor, now ``new`` with the batch in front; ``dim`` as in :meth:`columns`.

        ``before``: the inner products with the nominal tensor, but for ``scale``.
        """
        r = inner_products(self.unscaled(cotangent, dim), new) - before
        return r if self.scale is None else r * self.scale.to(r)

    def keep_products(self) -> None:
        """Find the inner products of the pass's states with the gradients, and let go of the states.

        ``<P, x' - x> = <P, x'> - <P, x>`` is as exact as ``x'`` is: either is rounded in parts of the size of
        ``<P, x>``. So nominal states need not be kept over the second forward pass. The pass is ``spent`` by this,
        unless a product is not finite: then all is kept, so that the error can name the layer.
        """
        recorded = self.recorded
        visits = recorded.visits.values()
        lives = [] if recorded.state is None else list(chain.from_iterable(recorded.state.live.values()))
        for visit in visits:
            own = zip(visit.inputs, visit.cotangents, visit.dims, strict=True)
            visit.products = [None if c is None else inner_products(self.unscaled(c, dim), x) for x, c, dim in own]
        for live in lives:
            assert recorded.state is not None
            assert live.value is not None
            cotangent = signed_sum(recorded.state.cotangents, live.terms)
            if cotangent is not None:
                value = fronted(live.value, live.dim)
                live.product = inner_products(self.unscaled(cotangent, live.dim), value)
        found = [*chain.from_iterable(visit.products for visit in visits), *(live.product for live in lives)]
        recorded.spent = all_finite(x for x in (*found, *recorded.cotangents) if x is not None)
        if recorded.spent:
            recorded.values = []
            for visit in visits:
                visit.inputs = []
            for live in lives:
                live.value = None


@dataclass(frozen=True)
class TerminalValue:
    """``a [R, B]`` of the batch's columns at the output, how many of the R span curvature, and ``w``."""

    a: Tensor
    curved: int
    weight: float


def linearise(
    passes: Sequence[Pass],
    terminal: Terminal,
    recorder: Recorder,
    loss: Tensor | None,
    step: int,
    before: int = 0,
    loss_scale: float = 1.0,
) -> tuple[list[Linearised], TerminalValue]:
    """Columns and value at the output of the passes of one step.

    Args:
        passes: with the cotangents of the batch's loss; for a pass that still has its graph (``edges``) and a
            ``loss`` to go with it, that graph is used for further columns.
        terminal: the form of the loss's curvature.
        recorder: runs a pass again where its graph is gone.
        loss: of the closure that left its graph, or ``None``.
        step: number of the step, for random columns.
        before: how many samples of the batch are on ranks before this one, for the same.
        loss_scale: what the loss had been multiplied by before its backward pass (a GradScaler's doing).

    Raises:
        StepError: if the terminal needs the loss at the output and no criterion was called on the model's output.
    """
    batch = sum(p.batch for p in passes)
    per_weight = float(batch) if terminal.reduction == "mean" else 1.0
    weight = 1 / per_weight

    def share(p: Pass) -> float:
        return loss_scale * (p.batch / batch if terminal.reduction == "mean" else 1.0)

    if isinstance(terminal, RankOne):
        with recorder.inbox.mute(), torch.enable_grad():
            scales = [_scale(p, terminal, loss, share(p)) for p in passes]
        linearised = [Linearised(p, scale * (per_weight / loss_scale)) for p, scale in zip(passes, scales, strict=True)]
        return linearised, TerminalValue(torch.cat(scales)[None].reciprocal(), 1, weight)
    assert isinstance(terminal, Factored)
    places = [(step, before + sum(p.batch for p in passes[:i])) for i in range(len(passes))]
    pulled = [_pulled(p, terminal, recorder, loss, place, share(p)) for p, place in zip(passes, places, strict=True)]
    count, root = pulled[0][1], 1.0 if terminal.cap is None else math.sqrt(terminal.cap)
    a = torch.zeros(count, batch, dtype=torch.float64, device=pulled[0][2])
    a[-1] = root
    curved = count - 1 if terminal.cap is None else count
    return [Linearised(again, None) for again, *_ in pulled], TerminalValue(a, curved, weight)


def _scale(recorded: Pass, terminal: RankOne, loss: Tensor | None, share: float) -> Tensor:
    if isinstance(terminal, Gradient):
        arrived = next((c for run in recorded.runs for c in run.cotangents if c is not None), torch.empty(0))
        return terminal.constant(wide(arrived), recorded.batch)
    return terminal.scale(_output_loss(recorded, terminal, loss, share)).detach()


def _output_loss(recorded: Pass, terminal: Terminal, loss: Tensor | None, share: float) -> OutputLoss:
    """The pass's loss as a function of the model's output; ``share``: see :func:`_multiple`."""
    weight = 1 / recorded.batch if terminal.reduction == "mean" else 1.0
    if loss is not None and recorded.outputs:
        # of the closure's loss, which is the whole batch's, a pass is only its share
        return OutputLoss(loss, recorded.outputs[_leaf(recorded)], weight * share, recorded.batch)
    name = type(terminal).__name__
    if terminal.criterion is None:
        raise StepError(
            f"{name}() needs the loss's curvature at the model's output: give it the loss module, "
            f"{name}(criterion), or pass step() a closure that returns the loss without calling backward"
        )
    if recorded.criterion is None:
        raise StepError(
            f"{name}(criterion) saw no call of its criterion on the model's output in this forward pass: call that "
            f"very module, criterion(model(x), y), or pass step() a closure that returns the loss without calling "
            f"backward"
        )
    args, kwargs, _ = recorded.criterion
    if args:
        output = args[0].detach().requires_grad_()
        value = terminal.criterion(output, *args[1:], **kwargs)
    else:
        output = kwargs["input"].detach().requires_grad_()
        value = terminal.criterion(**{**kwargs, "input": output})
    found = OutputLoss(value, output, weight, recorded.batch)
    multiple = _multiple(recorded, found, share, name)
    return found if multiple == 1.0 else OutputLoss(value * multiple, output, weight, recorded.batch)


def _leaf(recorded: Pass) -> int:
    """Which tensor of the model's output the loss looks at."""
    reached = [i for i, cotangent in enumerate(recorded.cotangents) if cotangent is not None]
    if recorded.criterion is not None:
        reached = [recorded.criterion[2]]
    if len(reached) != 1:
        raise StepError(
            f"the loss looks at {len(reached)} of the {len(recorded.leaves)} tensors that the model returns, and this "
            "terminal needs one: use Gradient(), or a model that returns one tensor"
        )
    return reached[0]


def _multiple(recorded: Pass, loss: OutputLoss, share: float, name: str) -> float:
    """What multiple of the criterion's value this pass's part of the loss is, in units of the whole batch's mean.

    The gradient that arrived at the output must be a positive multiple of the criterion's own; ``share`` is what that
    multiple is divided by: the loss's scale, and the part of the batch that the pass is of.
    """
    assert recorded.criterion is not None
    args, kwargs, i = recorded.criterion
    arrived = recorded.cotangents[i]
    if arrived is None:
        return 1.0
    given = args[0] if args else kwargs["input"]
    rounding = 10 * torch.finfo(arrived.dtype).eps ** 0.5
    # as arrived, but with room for squares of what a mean over many outputs leaves
    own = wide(recorded.leaves[i].laid_out(loss.gradient, given).to(arrived.dtype))
    arrived = wide(arrived)
    square = float(own.square().sum())
    multiple = float((own * arrived).sum()) / square if square > 0 else 0.0
    if square == 0 and not bool(arrived.any()):
        return 1.0
    if multiple <= 0 or float((arrived - multiple * own).norm()) > rounding * float(arrived.norm()):
        if not bool(torch.isfinite(arrived).all()):
            return 1.0  # what is not finite is refused by its own name later
        raise StepError(
            f"{name}(criterion): the gradient at the model's output is not that of the criterion, called once on it, "
            "so the loss has other parts (a mixture, a second criterion, a sign): pass step() a closure that returns "
            "the loss without calling backward, or use Gradient()"
        )
    multiple /= share
    return 1.0 if abs(multiple - 1) < rounding else multiple


def _pulled(
    recorded: Pass, terminal: Factored, recorder: Recorder, loss: Tensor | None, place: tuple[int, int], share: float
) -> tuple[Pass, int, torch.device]:
    """The pass with columns ``[R + 1, B, ...]`` for cotangents: ``Z``, then the gradient; their count; the device.

    With a cap the gradient's column is ``g / sqrt(cap)``, and has curvature too.
    """
    with recorder.inbox.mute(), torch.enable_grad():
        at_output = _output_loss(recorded, terminal, loss, share)
        root = 1.0 if terminal.cap is None else math.sqrt(terminal.cap)
        factor = terminal.factor(at_output, *place).detach()
        gradient = at_output.gradient / (at_output.weight * root)
        factor = torch.cat([factor, gradient.to(factor)[None]])
        leaf = _leaf(recorded)
        again = recorded if loss is not None and recorded.edges and not recorded.reached else recorder.again(recorded)
        again.criterion, given = recorded.criterion, at_output.output
        columns = []
        for column in factor:
            at = again.leaves[leaf].laid_out(column, given)
            edges = [edge for _, _, edge in again.edges]
            for slots in again.slots():
                slots[:] = [None] * len(slots)
            with recorder.inbox.mute(collecting=True):
                values = torch.autograd.grad(again.outputs[leaf], edges, at, retain_graph=True, allow_unused=True)
            for (cotangents, i, _), value in zip(again.edges, values, strict=True):
                cotangents[i] = value
            columns.append([list(slots) for slots in again.slots()])
    for slots, *by_column in zip(again.slots(), *columns, strict=True):
        for i, pulled in enumerate(zip(*by_column, strict=True)):
            present = [p for p in pulled if p is not None]
            slots[i] = torch.stack(present) if len(present) == len(pulled) else None
    return again, len(factor), factor.device


def inner_products(columns: Tensor, x: Tensor) -> Tensor:
    """``<P_rb, x_b>``, ``[R, B]``, for columns ``[R, B, ...]``; some samples at a time, within the cache.

    No matrix product, which may round more coarsely than the tensors are (TF32).
    """
    samples = max(1, CHUNK * columns.shape[1] // max(1, columns.numel()))
    if samples >= columns.shape[1]:
        return _inner_products(columns, x)
    parts = zip(columns.split(samples, 1), x.split(samples), strict=True)
    return torch.cat([_inner_products(P, own) for P, own in parts], 1)


def _inner_products(columns: Tensor, x: Tensor) -> Tensor:
    products = columns * x.to(columns.dtype)
    return products if products.ndim == 2 else products.sum(tuple(range(2, products.ndim)))
