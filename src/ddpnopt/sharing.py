"""From the columns of this rank's samples to those of all ranks' samples, at whose sums every rank then looks alike."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .accord import Accord
from .columns import Columns, ScaledColumns, SpreadColumns, over_batches, spreads
from .columns.parcel import Label, as_bytes, dtype_named, put_together, taken_apart
from .errors import NonFiniteError, StepError
from .finite import all_finite
from .layers import Block
from .linearise import TerminalValue
from .network import Network
from .stage_cost import StageCosts
from .terminal import Reduction

Found = tuple[int, Block, Columns]
"""The index of a stage (0 where there are none), a block that moves there, and its columns."""


@dataclass(frozen=True)
class Shared:
    """What a step works on, of one rank or of all.

    Args:
        found: blocks with their columns, stages in the order they ran.
        alone: gradients of the batch's loss, of the blocks without columns.
        end: the value at the output; ``None`` without a pass.
        whole: whether the batch can go through the model a second time.
        costs: the stage costs of blocks with columns.
    """

    found: Sequence[Found]
    alone: dict[Block, Tensor]
    end: TerminalValue | None
    whole: bool
    costs: StageCosts = field(default_factory=StageCosts)


def share(
    accord: Accord, network: Network, own: Shared, reduction: Reduction, *, local: bool = False, rounded: bool = True
) -> Shared:
    """The same of all ranks: columns side by side in the order of ranks, gradients as of the whole batch's loss.

    Args:
        accord: of the step; from here on its exchanges are as long as the deviations' are.
        network: of this rank; the others' must be the same.
        own: what this rank found; nothing, if it has no samples.
        reduction: of the loss.
        local: whether all columns stay where they are, as :class:`SpreadColumns`, whatever that costs later.
        rounded: whether columns that stay are rounded for their Gram matrix.

    Raises:
        NonFiniteError: if this rank's columns are not finite, so that nobody gets them.
        StepError: if ranks saw different layers run, or in different order.
    """
    if not accord.several:
        return own
    blocks = network.blocks()
    index = {block.parameters[0]: i for i, block in enumerate(blocks)}
    parcels = [(at, index[block.parameters[0]], *taken_apart(columns)) for at, block, columns in own.found]
    a = torch.empty(0, dtype=torch.float64) if own.end is None else own.end.a.detach().double().cpu()
    tensors = [a, *(tensor for *_, parts in parcels for tensor in parts)]
    if not all_finite([*tensors, *own.alone.values(), *own.costs.gradients.values()]):
        raise NonFiniteError("the columns of the batch are not finite")
    said = {
        "moves": [[at, i, label.told()] for at, i, label, _ in parcels],
        "alone": [index[block.parameters[0]] for block in own.alone],
        "costs": [index[block.parameters[0]] for block in own.costs.gradients],
        "edited": own.costs.edited,
        "end": None if own.end is None else [len(a), own.end.curved],
        "whole": own.whole,
    }
    plans = [json.loads(text) for text in accord.texts(json.dumps(said))]
    filled = [q for q, n in enumerate(accord.counts) if n]
    check_alike(plans, filled, network)
    first, counts, device = plans[filled[0]], accord.counts, blocks[0].parameters[0].device
    labels = [[Label.read(told) for _, _, told in plan["moves"]] for plan in plans]
    spread = partial(spreads, counts=counts, rounded=rounded)
    stays = [local or (x.form == "dense" and spread(x.shapes[0], dtype_named(x.dtypes[0]))) for x in labels[filled[0]]]
    moving = [[label for label, stay in zip(of, stays, strict=False) if not stay] for of in labels]
    sent = [a, *(tensor for (*_, parts), stay in zip(parcels, stays, strict=False) if not stay for tensor in parts)]
    count, curved = first["end"] or (0, 0)
    sizes = [
        8 * count * n + sum(label.nbytes for label in of) if n else 0 for n, of in zip(counts, moving, strict=True)
    ]
    received = accord.ranks.gather(as_bytes([tensor.cpu() for tensor in sent]), sizes)
    unread, costing = (sorted({i for plan in plans for i in plan[of]}) for of in ("alone", "costs"))
    gradients = _summed(accord, own.alone, [blocks[i] for i in unread], reduction)
    costs = _summed(accord, own.costs.gradients, [blocks[i] for i in costing], reduction)
    edited = any(plan["edited"] for plan in plans)
    accord.expect(1 + max(0 if local else count * max(counts), 1))  # a stage and deviations

    opened = [_opened(received[q].to(device), count, moving[q], counts[q]) for q in filled]
    arrived = zip(*(columns for _, columns in opened), strict=True)
    found: list[Found] = []
    for k, ((at, i, _), stay) in enumerate(zip(first["moves"], stays, strict=True)):
        if stay:
            held = own.found[k][2] if own.found else labels[filled[0]][k].nothing(device)
            plain = held.plain() if isinstance(held, ScaledColumns) else held
            columns: Columns = SpreadColumns(plain, accord.ranks, tuple(counts), rounded)
        else:
            columns = over_batches(next(arrived))
        found.append((at, blocks[i], columns))
    weight = 1 / sum(counts) if reduction == "mean" else 1.0
    end = TerminalValue(torch.cat([a for a, _ in opened], 1), curved, weight) if first["end"] else None
    return Shared(found, gradients, end, all(plans[q]["whole"] for q in filled), StageCosts(costs, edited))


def _opened(data: Tensor, count: int, labels: Sequence[Label], batch: int) -> tuple[Tensor, list[Columns]]:
    """What one rank sent: ``a [count, batch]`` and its columns, as the labels say."""
    a, *parts = data.split([8 * count * batch, *(label.nbytes for label in labels)])
    columns = [put_together(label, part, batch) for label, part in zip(labels, parts, strict=True)]
    return a.clone().view(torch.float64).view(count, batch), columns


def of_this_rank(accord: Accord, end: TerminalValue) -> TerminalValue:
    """The value at the output of this rank's samples as if they stood for all; ``end``: of all."""
    before, own = sum(accord.counts[: accord.ranks.rank]), accord.counts[accord.ranks.rank]
    return TerminalValue(end.a[:, before : before + own], end.curved, end.weight * sum(accord.counts) / max(own, 1))


def averaged(accord: Accord, own: Sequence[Tensor]) -> list[Tensor]:
    """Means of the ranks' tensors, weighted by samples; sent as one."""
    share = accord.counts[accord.ranks.rank] / sum(accord.counts)
    flat = torch.cat([(x * share if share else torch.zeros_like(x)).flatten() for x in own])
    parts = accord.ranks.sum(flat).split([x.numel() for x in own])
    return [part.view_as(x) for part, x in zip(parts, own, strict=True)]


def meet_at(accord: Accord, stage: int, *values: float | Tensor) -> Tensor:
    """Numbers of all ranks ``[size, n]``, which have come to the same stage.

    Raises:
        StepError: if they have not.
    """
    found = accord.exchange(float(stage), *values)
    if bool((found[:, 0] != stage).any()):
        raise StepError("in their second forward passes the ranks ran the layers in different order")
    return found[:, 1:]


def gathered_deviation(accord: Accord, stage: int, own: Tensor | None, columns: int) -> Tensor:
    """``r = P' dx [R, N]`` of all ranks' samples at a stage's cut; ``own``: of this rank's, ``None`` is zero."""
    r = torch.zeros(columns, accord.counts[accord.ranks.rank]) if own is None else own
    found = meet_at(accord, stage, r)
    parts = [part[: columns * n].view(columns, n) for part, n in zip(found, accord.counts, strict=True)]
    return torch.cat(parts, 1).to(r.device)


def check_alike(plans: Sequence[Mapping[str, Any]], filled: Sequence[int], network: Network) -> None:
    """Raise :class:`StepError` unless the ranks that have samples (``filled``) saw the same layers do the same."""
    blocks = network.blocks()
    first = filled[0]
    for q in filled[1:]:
        ours, theirs = (_outline(plans[r]) for r in (first, q))
        for mine, other in zip(ours, theirs, strict=False):
            if mine != other:
                names = [_name(network, blocks[entry[1]]) for entry in (mine, other)]
                raise StepError(
                    f"ranks {first} and {q} took different ways through the model: {names[0]} on one stands where "
                    f"{names[1]} stands on the other. Every rank must run the same layers in the same order"
                )
        if len(ours) != len(theirs) or plans[first]["end"] != plans[q]["end"]:
            raise StepError(
                f"ranks {first} and {q} took different ways through the model: {len(ours)} and {len(theirs)} blocks "
                "of parameters got a gradient. Every rank must run the same layers in the same order"
            )


def _outline(plan: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """What must be alike: stages, blocks, and what their columns are made of."""
    labels = [(at, i, Label.read(told)) for at, i, told in plan["moves"]]
    return [(at, i, label.form, label.dtypes, label.height) for at, i, label in labels]


def _name(network: Network, block: Block) -> str:
    owner = next((layer.name for layer in network.layers if any(block is own for own in layer.blocks)), "")
    return ".".join(part for part in (owner, block.names[0]) if part) or "a parameter"


def _summed(
    accord: Accord, own: Mapping[Block, Tensor], blocks: Sequence[Block], reduction: Reduction
) -> dict[Block, Tensor]:
    """Gradients of the whole batch's loss: the ranks' own, weighted by their samples where the loss is a mean."""
    share = accord.counts[accord.ranks.rank] / sum(accord.counts) if reduction == "mean" else 1.0
    found: dict[Block, Tensor] = {}
    for dtype in dict.fromkeys(_wide(block) for block in blocks):
        there = [block for block in blocks if _wide(block) == dtype]
        parts = [(own[block] * share if block in own else _zeros(block, dtype)).flatten() for block in there]
        total = accord.ranks.sum(torch.cat(parts))
        for block, part in zip(there, total.split([len(part) for part in parts]), strict=True):
            found[block] = part.view(block.shape)
    return found


def _wide(block: Block) -> torch.dtype:
    return torch.promote_types(block.parameters[0].dtype, torch.float32)


def _zeros(block: Block, dtype: torch.dtype) -> Tensor:
    return torch.zeros(block.shape, dtype=dtype, device=block.parameters[0].device)
