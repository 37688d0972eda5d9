"""Columns of several uses or of several batches, as one."""

from collections.abc import Sequence

import torch

from .base import Columns
from .dense import DenseColumns
from .outer import OuterColumns
from .scaled import ScaledColumns


def over_uses(uses: Sequence[Columns]) -> Columns:
    """Columns of a layer that ran several times in one forward pass: gradients add up, uses are positions."""
    if len(uses) == 1:
        return uses[0]
    uses = [use.plain() if isinstance(use, ScaledColumns) else use for use in uses]
    if all(isinstance(use, OuterColumns) for use in uses):
        outer = [use for use in uses if isinstance(use, OuterColumns)]
        return OuterColumns(torch.cat([u.v for u in outer], 2), torch.cat([u.x for u in outer], 1))
    kept = uses[0].added(uses[1:])
    return DenseColumns(torch.stack([use.dense().values for use in uses]).sum(0)) if kept is None else kept


def over_batches(parts: Sequence[Columns]) -> Columns:
    """Columns of several forward passes (accumulated micro-batches) side by side: batches add up."""
    if len(parts) == 1:
        return parts[0]
    parts = [part.plain() if isinstance(part, ScaledColumns) else part for part in parts]
    outer = [part for part in parts if isinstance(part, OuterColumns)]
    if len(outer) == len(parts):
        longest = max(part.positions for part in outer)
        pad = torch.nn.functional.pad
        v = [pad(part.v, (0, 0, 0, longest - part.positions)) for part in outer]
        x = [pad(part.x, (0, 0, 0, longest - part.positions)) for part in outer]
        return OuterColumns(torch.cat(v, 1), torch.cat(x, 0))
    kept = parts[0].beside(parts[1:])
    return DenseColumns(torch.cat([part.dense().values for part in parts], 1)) if kept is None else kept
