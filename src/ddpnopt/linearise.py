"""From recorded passes to what the backward pass over stages reads: columns everywhere, and the loss's value."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .columns import Columns, over_batches, over_uses
from .errors import StepError
from .layers import Call
from .network import Layer
from .terminal import Factored, OutputLoss, RankOne, Terminal
from .trajectory import Pass, Recorder, Visit


@dataclass(frozen=True)
class Linearised:
    """One pass with the columns its cotangents stand for.

    Args:
        recorded: the pass; its cotangents are ``[B, ...]`` if ``scale`` is given, else columns ``[R, B, ...]``.
        scale: ``c / w [B]``: what turns the batch's cotangents into columns ``c g`` of the samples' own losses.
    """

    recorded: Pass
    scale: Tensor | None

    def columns(self, cotangent: Tensor) -> Tensor:
        """Columns ``[R, B, ...]``, at least in float32."""
        cotangent = cotangent.to(torch.promote_types(cotangent.dtype, torch.float32))
        if self.scale is None:
            return cotangent
        return (cotangent * self.scale.to(cotangent).view(-1, *[1] * (cotangent.ndim - 1)))[None]

    def deviation(self, stage: nn.Module, inputs: Sequence[Tensor], name: str) -> Tensor | None:
        """``r = P' dx [R, B]`` at a stage whose state has become ``inputs``; ``None`` if nothing before it moves."""
        visit = self.recorded.visits[stage]
        shapes, now = [tuple(x.shape) for x in visit.inputs], [tuple(x.shape) for x in inputs]
        if shapes != now:
            raise StepError(
                f"the input of {name or 'the model'} had shape {shapes} in the forward pass and {now} in the second "
                f"one that step() runs: the batch was changed between forward and step"
            )
        total = None
        for x, new, cotangent in zip(visit.inputs, inputs, visit.cotangents, strict=True):
            if cotangent is None:
                continue
            dx = new - x
            product = (self.columns(cotangent) * dx).flatten(2).sum(2)
            total = product if total is None else total + product
        return total


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
        loss_scale: what the loss had been multiplied by before its backward pass (a GradScaler's doing).

    Raises:
        StepError: if the terminal needs the loss at the output and no criterion was called on the model's output.
    """
    batch = sum(p.batch for p in passes)
    per_weight = float(batch) if terminal.reduction == "mean" else 1.0
    weight = 1 / per_weight
    if isinstance(terminal, RankOne):
        with recorder.muted(), torch.enable_grad():
            scales = [_scale(p, terminal, loss) for p in passes]
        linearised = [Linearised(p, scale * (per_weight / loss_scale)) for p, scale in zip(passes, scales, strict=True)]
        return linearised, TerminalValue(1 / torch.cat(scales)[None], 1, weight)
    assert isinstance(terminal, Factored)
    pulled = [_pulled(p, terminal, recorder, loss, step) for p in passes]
    count, root = pulled[0][1], 1.0 if terminal.cap is None else math.sqrt(terminal.cap)
    a = torch.zeros(count, batch, dtype=torch.float64, device=pulled[0][2])
    a[-1] = root
    curved = count - 1 if terminal.cap is None else count
    return [Linearised(again, None) for again, *_ in pulled], TerminalValue(a, curved, weight)


def _scale(recorded: Pass, terminal: RankOne, loss: Tensor | None) -> Tensor:
    if not terminal.needs_loss:
        arrived = next((c for run in recorded.runs for c in run.cotangents if c is not None), torch.empty(0))
        return arrived.new_ones(recorded.batch, dtype=torch.promote_types(arrived.dtype, torch.float32))
    return terminal.scale(_output_loss(recorded, terminal, loss)).detach()


def _output_loss(recorded: Pass, terminal: Terminal, loss: Tensor | None) -> OutputLoss:
    weight = 1 / recorded.batch if terminal.reduction == "mean" else 1.0
    if terminal.criterion is not None and recorded.criterion is not None:
        args, kwargs = recorded.criterion
        if args:
            output = args[0].detach().requires_grad_()
            value = terminal.criterion(output, *args[1:], **kwargs)
        else:
            output = kwargs["input"].detach().requires_grad_()
            value = terminal.criterion(**{**kwargs, "input": output})
        return OutputLoss(value, output, weight, recorded.batch)
    if loss is not None and isinstance(recorded.output, Tensor):
        return OutputLoss(loss, recorded.output, weight, recorded.batch)
    name = type(terminal).__name__
    if terminal.criterion is None:
        raise StepError(
            f"{name}() needs the loss's curvature at the model's output: give it the loss module, "
            f"{name}(criterion), or pass step() a closure that returns the loss without calling backward"
        )
    raise StepError(
        f"{name}(criterion) saw no call of its criterion on the model's output in this forward pass: call that "
        f"very module, criterion(model(x), y), or pass step() a closure that returns the loss without calling backward"
    )


def _pulled(
    recorded: Pass, terminal: Factored, recorder: Recorder, loss: Tensor | None, step: int
) -> tuple[Pass, int, torch.device]:
    """The pass with columns ``[R + 1, B, ...]`` for cotangents: ``Z``, then the gradient; their count; the device.

    With a cap the gradient's column is ``g / sqrt(cap)``, and has curvature too.
    """
    with recorder.muted(), torch.enable_grad():
        at_output = _output_loss(recorded, terminal, loss)
        root = 1.0 if terminal.cap is None else math.sqrt(terminal.cap)
        gradient = at_output.gradient().detach() / (at_output.weight * root)
        factor = torch.cat([terminal.factor(at_output, step).detach(), gradient[None]])
        again = recorded if loss is not None and recorded.edges and not recorded.reached else recorder.again(recorded)
        output = again.output
        if not isinstance(output, Tensor):
            raise StepError(
                f"{type(terminal).__name__} needs a model whose output is one tensor, got {type(output).__name__}"
            )
        edges = [edge for _, _, edge in again.edges]
        columns = [
            torch.autograd.grad(output, edges, column.view(output.shape), retain_graph=True, allow_unused=True)
            for column in factor
        ]
    for i, (cotangents, place, _) in enumerate(again.edges):
        pulled = [column[i] for column in columns]
        present = [p for p in pulled if p is not None]
        cotangents[place] = torch.stack(present) if len(present) == len(pulled) else None
    return again, len(factor), factor.device


def joined(parts: Sequence[Linearised]) -> Linearised | None:
    """Several passes as one, batches side by side; ``None`` if their arguments do not stack."""
    if len(parts) == 1:
        return parts[0]
    passes = [part.recorded for part in parts]
    trees = [pytree.tree_flatten((p.args, p.kwargs)) for p in passes]
    stacked = []
    for leaves in zip(*(tree[0] for tree in trees), strict=True) if len({str(tree[1]) for tree in trees}) == 1 else ():
        if not all(
            isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == p.batch
            for leaf, p in zip(leaves, passes, strict=True)
        ):
            return None
        if len({leaf.shape[1:] for leaf in leaves}) > 1:
            return None
        stacked.append(torch.cat(leaves))
    if not stacked or len({tuple(p.visits) for p in passes}) > 1:
        return None
    args, kwargs = pytree.tree_unflatten(stacked, trees[0][1])
    whole = replace(passes[0], args=args, kwargs=kwargs, batch=sum(p.batch for p in passes))
    whole.visits = {i: _joined_visit([p.visits[i] for p in passes], parts[0].scale is None) for i in passes[0].visits}
    return Linearised(
        whole, None if parts[0].scale is None else torch.cat([p.scale for p in parts if p.scale is not None])
    )


def _joined_visit(visits: Sequence[Visit], columns: bool) -> Visit:
    inputs = [torch.cat(xs) for xs in zip(*(v.inputs for v in visits), strict=True)]
    cotangents = [
        None if any(c is None for c in cs) else torch.cat([c for c in cs if c is not None], int(columns))
        for cs in zip(*(v.cotangents for v in visits), strict=True)
    ]
    return Visit(inputs, cotangents)


def columns_of(layer: Layer, linearised: Sequence[Linearised]) -> list[Columns] | None:
    """Columns of each of a layer's blocks over all passes.

    ``None`` if no gradient reached the layer in some pass, or its outputs do not lead with the batch.
    """
    parts = []
    for one in linearised:
        runs = [
            run for run in one.recorded.runs if run.layer is layer.module and any(c is not None for c in run.cotangents)
        ]
        if not runs or any(run.misfit for run in runs):
            return None
        calls = [
            Call(run.args, run.kwargs, [None if c is None else one.columns(c) for c in run.cotangents]) for run in runs
        ]
        uses = [layer.rule.columns(layer.module, layer.blocks, call) for call in calls]
        parts.append([over_uses([use[i] for use in uses]) for i in range(len(layer.blocks))])
    return [over_batches([part[i] for part in parts]) for i in range(len(layer.blocks))]
