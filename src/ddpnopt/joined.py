"""Micro-batches side by side: several recorded passes as one."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .linearise import Linearised
from .passes import Live, State, Visit, signed_sum


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
    columns = parts[0].scale is None
    whole.visits = {i: _joined_visit([p.visits[i] for p in passes], columns) for i in passes[0].visits}
    states = [p.state for p in passes if p.state is not None]
    whole.state = _joined_state(states, columns) if len(states) == len(passes) else None
    if states and whole.state is None:
        return None
    return Linearised(
        whole, None if parts[0].scale is None else torch.cat([p.scale for p in parts if p.scale is not None])
    )


def _joined_visit(visits: Sequence[Visit], columns: bool) -> Visit:
    inputs = [torch.cat(xs) for xs in zip(*(v.inputs for v in visits), strict=True)]
    cotangents = [
        None if any(c is None for c in cs) else torch.cat([c for c in cs if c is not None], dim + int(columns))
        for dim, *cs in zip(visits[0].dims, *(v.cotangents for v in visits), strict=True)
    ]
    return Visit(inputs, cotangents, visits[0].dims)


def _joined_state(states: Sequence[State], columns: bool) -> State | None:
    """``None`` if not the same tensors live at the cuts of all passes."""
    first = states[0]

    def joined_live(same: Sequence[Live], slot: int) -> Live | None:
        if len({(x.place, x.dim, x.terms, x.stages) for x in same}) > 1:
            return None
        return replace(same[0], value=torch.cat([x.value for x in same], same[0].dim), terms=((slot, 1),))

    whole = replace(first, live={}, cotangents=[])
    for state in states[1:]:
        if (state.live.keys(), state.later, state.lost) != (first.live.keys(), first.later, first.lost):
            return None
    for boundary in first.live:
        there = [state.live[boundary] for state in states]
        if len({len(live) for live in there}) > 1:
            return None
        for same in zip(*there, strict=True):
            live = joined_live(same, len(whole.cotangents))
            if live is None:
                return None
            parts = [signed_sum(state.cotangents, x.terms) for state, x in zip(states, same, strict=True)]
            present = [p for p in parts if p is not None]
            whole.cotangents.append(
                torch.cat(present, same[0].dim + int(columns)) if len(present) == len(parts) else None
            )
            whole.live.setdefault(boundary, []).append(live)
    return whole
