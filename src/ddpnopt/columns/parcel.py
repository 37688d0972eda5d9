"""Columns as plain tensors and back, so that they can be sent to another process."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from .base import Columns
from .dense import DenseColumns
from .outer import OuterColumns
from .rows import RowColumns
from .scaled import ScaledColumns


@dataclass(frozen=True)
class Label:
    """What columns are made of, without the numbers.

    Args:
        form: ``"outer"``, ``"dense"`` or ``"rows"``.
        shapes, dtypes: of the tensors.
        height: of the table, for rows.
    """

    form: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    height: int = 0

    @property
    def nbytes(self) -> int:
        """Length of the parcel, in bytes."""
        return sum(
            prod(shape) * dtype_named(name).itemsize for shape, name in zip(self.shapes, self.dtypes, strict=True)
        )

    def nothing(self, device: torch.device) -> Columns:
        """Such columns of no samples."""
        dims = {"outer": (1, 0), "dense": (1,), "rows": (0, 0, 1)}[self.form]  # where samples, or what they read, are
        shapes = [(*shape[:dim], 0, *shape[dim + 1 :]) for shape, dim in zip(self.shapes, dims, strict=True)]
        label = Label(self.form, tuple(shapes), self.dtypes, self.height)
        return put_together(label, torch.empty(0, dtype=torch.uint8, device=device), 0)

    @staticmethod
    def read(told: Any) -> "Label":
        """A label from nested lists, as JSON has them."""
        form, shapes, dtypes, height = told
        return Label(form, tuple(map(tuple, shapes)), tuple(dtypes), height)

    def told(self) -> list[Any]:
        """As nested lists."""
        return [self.form, [list(shape) for shape in self.shapes], list(self.dtypes), self.height]


def taken_apart(columns: Columns) -> tuple[Label, list[Tensor]]:
    """Columns as tensors, with a label that tells how to put them together."""
    plain = columns.plain() if isinstance(columns, ScaledColumns) else columns
    if isinstance(plain, OuterColumns):
        return _labelled("outer", [plain.v, plain.x])
    if isinstance(plain, RowColumns):
        return _labelled("rows", [plain.samples, plain.rows, plain.values], plain.height)
    return _labelled("dense", [plain.dense().values])


def as_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors' bytes, one after another."""
    # a lone number may have any stride, and be contiguous and flat
    flat = [tensor.detach().contiguous().as_strided((tensor.numel(),), (1,)) for tensor in tensors]
    return torch.cat([numbers.view(torch.uint8) for numbers in flat])


def put_together(label: Label, data: Tensor, batch: int) -> Columns:
    """The inverse of :func:`taken_apart` and :func:`as_bytes`; ``batch``: how many samples the columns are of."""
    tensors, start = [], 0
    for shape, name in zip(label.shapes, label.dtypes, strict=True):
        end = start + prod(shape) * dtype_named(name).itemsize
        tensors.append(data[start:end].clone().view(dtype_named(name)).view(shape))  # a copy: dtypes ask for alignment
        start = end
    if label.form == "outer":
        return OuterColumns(tensors[0], tensors[1])
    if label.form == "rows":
        return RowColumns(tensors[0], tensors[1], tensors[2], batch, label.height)
    return DenseColumns(tensors[0])


def _labelled(form: str, tensors: list[Tensor], height: int = 0) -> tuple[Label, list[Tensor]]:
    names = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    return Label(form, tuple(tuple(tensor.shape) for tensor in tensors), names, height), tensors


def dtype_named(name: str) -> torch.dtype:
    """The dtype that a label tells."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype
