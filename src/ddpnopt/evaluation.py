"""The three ways to a gradient: a past backward pass, a closure that makes one, a closure that leaves its graph."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .errors import NonFiniteError, StepError
from .network import Network
from .passes import Pass
from .trajectory import Recorder


@dataclass(frozen=True)
class Evaluated:
    """What a step starts from.

    Args:
        loss: what the closure returned, or ``None``.
        passes: recorded forward passes, with their cotangents.
        gradients: of the batch's loss, for the parameters that have one; with a closure that leaves its graph, only
            for those that are not read off columns.
        graph: the loss again, where its graph is still there for more columns.
        derived: whether the loss may be made of derivatives of the model.
    """

    loss: Any
    passes: Sequence[Pass]
    gradients: Mapping[nn.Parameter, Tensor]
    graph: Tensor | None = None
    derived: bool = False

    def empty(self, recorder: Recorder) -> bool:
        """Whether all batches were of length 0."""
        return not any(p.batch for p in self.passes) and (bool(self.passes) or recorder.inbox.empty)

    def unscaled(self, loss_scale: float) -> Mapping[nn.Parameter, Tensor]:
        """The gradients of the loss itself, if it had been multiplied by ``loss_scale``."""
        if loss_scale == 1.0:
            return self.gradients
        return {p: gradient / loss_scale for p, gradient in self.gradients.items()}


def evaluate(
    closure: Callable[[], Any] | None,
    recorder: Recorder | None,
    network: Network,
    parameters: Sequence[nn.Parameter],
    *,
    every: bool,
    keep_graph: bool,
    heard: set[int] | None,
) -> Evaluated:
    """Gather passes and gradients.

    Args:
        closure: see :meth:`ddpnopt.DDPNOpt.step`.
        recorder: of the model, or ``None`` for bare parameters.
        network: tells which parameters are not read off columns.
        parameters: to train.
        every: whether the gradients of all of them are needed.
        keep_graph: whether a graph that the closure left will be used for more columns.
        heard: autograd's numbers of the backward passes that have left gradients of parameters, those of the closure
            included as soon as it has run; ``None`` where nobody listens.

    Raises:
        StepError: if the closure returned more than one number, or a forward pass of another batch has followed the
            backward pass.
    """
    if closure is None:
        derived = recorder.inbox.settle(heard or ()) if recorder else False
        passes = recorder.inbox.take() if recorder else []
        return Evaluated(None, passes, _own(parameters, recorder), derived=derived)
    if recorder is None:
        with torch.enable_grad():
            loss = closure()
        _check_number(loss)
        gradients = _own(parameters, None)
        if not gradients and isinstance(loss, Tensor) and loss.requires_grad:
            gradients = _differentiated(loss, [], parameters, retain_graph=False)
        return Evaluated(loss, [], gradients)
    before = set(heard or ())
    with torch.enable_grad(), recorder.inbox.keeping_graph() as kept:
        loss = closure()
    _check_number(loss)
    went_back = bool(heard and heard - before)
    fresh = [p for p in kept if p.edges and not p.reached and not went_back]
    derived = any(p.waiting for p in fresh)
    for p in fresh:
        p.clear()
    derived |= recorder.inbox.settle(heard or (), graph=bool(fresh))
    earlier = recorder.inbox.take()
    if not (fresh and isinstance(loss, Tensor) and loss.requires_grad):
        return Evaluated(loss, earlier, _own(parameters, recorder), derived=derived)
    if recorder.shards:
        raise StepError(
            "the model is sharded (fully_shard), and the closure left the backward pass to step(): call "
            "loss.backward() in the closure"
        )
    wanted = parameters if every or derived else _not_in_columns(network, fresh)
    with recorder.inbox.mute(collecting=True):
        gradients = _differentiated(loss, fresh, wanted, retain_graph=keep_graph)
    # a pass that the loss does not look at has no samples in the batch
    fresh = [p for p in fresh if any(c is not None for slots in p.slots() for c in slots)] or fresh
    if earlier:
        for parameter, gradient in _own(parameters, recorder).items():
            gradients[parameter] = gradients[parameter] + gradient if parameter in gradients else gradient
    return Evaluated(loss, [*earlier, *fresh], gradients, loss if keep_graph else None, derived)


def check_evaluated(found: Evaluated, network: Network | None, *, empty: bool = False) -> None:
    """Raise :class:`StepError` if there is nothing to step from, or the model's layers were not seen to run.

    Args:
        found: to be checked.
        network: of the model; ``None`` for bare parameters, where a step without a gradient does nothing, as in torch.
        empty: whether this is one of several ranks, and its batch is known to be empty.

    Raises:
        NonFiniteError: if the loss is not finite.
    """
    if empty:
        return
    if any(p.batch == 0 for p in found.passes):
        raise StepError("the batch is empty: the model was called on an input of length 0")
    loss = found.loss
    value = float(loss.detach() if isinstance(loss, Tensor) else loss) if isinstance(loss, Tensor | float) else 0.0
    if not math.isfinite(value):
        raise NonFiniteError(f"the loss is {value}")
    if network is None:
        return
    if not found.passes and not found.gradients:
        raise StepError(
            "step() found no gradient: call loss.backward() first, on a loss of the model that this optimizer was "
            "made with, or pass a closure that returns the loss"
        )
    if not found.passes and network.layers:
        raise StepError(
            "step() found gradients but saw no forward pass of the model since the last step: step once per backward "
            "pass, and train through the very module this optimizer was made with, not a part of it. If it is compiled "
            "and has run before, its code leaves the optimizer's hooks out: make the optimizer before the first call, "
            "or call torch.compiler.reset() after"
        )


def _own(parameters: Sequence[nn.Parameter], recorder: Recorder | None) -> dict[nn.Parameter, Tensor]:
    return _dense(recorder.gradients(parameters) if recorder else {p: p.grad for p in parameters})


def _dense(gradients: Mapping[nn.Parameter, Tensor | None]) -> dict[nn.Parameter, Tensor]:
    """The gradients that are there, none of them sparse."""
    there = {p: gradient for p, gradient in gradients.items() if gradient is not None}
    return {p: gradient.to_dense() if gradient.is_sparse else gradient for p, gradient in there.items()}


def _not_in_columns(network: Network, passes: Sequence[Pass]) -> list[nn.Parameter]:
    """Parameters whose own gradient a step needs; the generic rule may fail, so its layers count."""
    unread = {layer.module for layer in network.layers if layer.rule.name == "generic"}
    unread |= {run.layer for p in passes for run in p.runs if run.misfit or run.stray}
    inside = chain.from_iterable(layer.blocks for layer in network.layers if layer.module in unread)
    # a tied parameter's columns of several forms may turn out too many to be read
    mixed = {x for x in network.tied if len({owner.rule.name for owner in x.owners}) > 1}
    tied = (x.block for x in network.tied if x in mixed or not unread.isdisjoint(o.module for o in x.owners))
    blocks = chain((loose.block for loose in network.loose), tied, inside)
    return [p for block in blocks for p in block.parameters]


def _differentiated(
    loss: Tensor, passes: Sequence[Pass], parameters: Sequence[nn.Parameter], *, retain_graph: bool
) -> dict[nn.Parameter, Tensor]:
    """Fill the passes' cotangents from the loss's graph; returns the gradients of ``parameters`` that have one."""
    edges = [edge for p in passes for edge in p.edges]
    wanted: list[Any] = [*(edge for _, _, edge in edges), *parameters]
    if not wanted:
        return {}
    values = torch.autograd.grad(loss, wanted, retain_graph=retain_graph, allow_unused=True)
    for (cotangents, i, _), value in zip(edges, values, strict=False):
        cotangents[i] = value
    return _dense(dict(zip(parameters, values[len(edges) :], strict=True)))


def _check_number(loss: Any) -> None:
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise StepError(
            f"the closure returned a tensor of shape {tuple(loss.shape)}; return one number, the batch's loss"
        )
