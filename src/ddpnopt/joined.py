"""Micro-batches side by side: several recorded passes as one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .linearise import Linearised
from .passes import Visit
from .state import joined_state
from .trees import versions


def joined(parts: Sequence[Linearised]) -> Linearised | None:
    """Several passes as one, batches side by side, products kept; ``None`` if they do not stack.

    Arguments that lead with the batch are stacked; others (a flag, the number of tokens) have to be equal.

    Raises:
        StepError: if an argument was written into after its forward pass.
    """
    if len(parts) == 1:
        return parts[0]
    passes = [part.recorded for part in parts]
    for recorded in passes:
        recorded.check_unwritten()
    trees = [pytree.tree_flatten((p.args, p.kwargs)) for p in passes]
    alike = len({str(tree[1]) for tree in trees}) == len({tuple(p.visits) for p in passes}) == 1
    if not alike or any(p.own_draws for p in passes):
        return None
    leaves: list[Any] = []
    for values in zip(*(tree[0] for tree in trees), strict=True):
        if all(_leads(value, p.batch) for value, p in zip(values, passes, strict=True)):
            if len({value.shape[1:] for value in values}) > 1:
                return None
            leaves.append(torch.cat(values))
        elif all(_equal(values[0], value) for value in values[1:]):
            leaves.append(values[0])
        else:
            return None
    args, kwargs = pytree.tree_unflatten(leaves, trees[0][1])
    batch = sum(p.batch for p in passes)
    whole = replace(passes[0], args=args, kwargs=kwargs, batch=batch, versions=versions((args, kwargs)))
    scales = [p.scale for p in parts if p.scale is not None]
    columns = not scales
    whole.visits = {i: _joined_visit([p.visits[i] for p in passes], columns) for i in passes[0].visits}
    states = [p.state for p in passes if p.state is not None]
    whole.state = joined_state(states, columns) if len(states) == len(passes) else None
    if states and whole.state is None:
        return None
    return Linearised(whole, torch.cat(scales) if scales else None)


def _leads(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch


def _equal(first: Any, second: Any) -> bool:
    """Whether two arguments are one; what torch and Python cannot compare plainly has to be the same object."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and first.device == second.device and torch.equal(first, second)
    return first is second or (type(first) is type(second) and isinstance(first, int | float | str) and first == second)


def _joined_visit(visits: Sequence[Visit], columns: bool) -> Visit:
    products = [
        None if any(p is None for p in ps) else torch.cat([p for p in ps if p is not None], 1)
        for ps in zip(*(v.products for v in visits), strict=True)
    ]
    shapes = [(sum(s[0] for s in own), *own[0][1:]) for own in zip(*(v.shapes for v in visits), strict=True)]
    cotangents = [
        None if any(c is None for c in cs) else torch.cat([c for c in cs if c is not None], dim + int(columns))
        for dim, *cs in zip(visits[0].dims, *(v.cotangents for v in visits), strict=True)
    ]
    return Visit([], cotangents, visits[0].dims, shapes, products)
