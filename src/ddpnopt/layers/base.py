"""What a layer rule is: how a module's parameters form blocks, and the columns' gradients of each.

A rule sees one call of its module: the inputs it received and the gradients at its outputs, column by column.
It turns them into one :class:`~ddpnopt.columns.Columns` per block; everything else is asked of those.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..columns import Columns


@dataclass(frozen=True)
class Block:
    """Parameters of one module that share a curvature, seen as one matrix ``[out, fan_in]``.

    Args:
        names: parameter names within the module, the weight before the bias; a bias is the matrix's last column.
        parameters: the parameters, in the same order.
        held: whole parameters by those that are pieces of them, while a step has them (:mod:`ddpnopt.sharded`).
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    held: Mapping[nn.Parameter, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters' values, whole."""
        return [self.held.get(parameter, parameter) for parameter in self.parameters]

    def __hash__(self) -> int:
        return id(self.parameters[0])  # a block is asked for many times a step, and parameters hash slowly

    def matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like the parameters as one matrix ``[out, fan_in]``."""
        sides = [_as_matrix(tensor) for tensor in tensors]
        return sides[0] if len(sides) == 1 else torch.cat(sides, 1)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, fan_in)`` of the matrix."""
        rows = [len(p) if p.ndim else 1 for p in self.parameters]
        return rows[0], sum(p.numel() // max(out, 1) for p, out in zip(self.parameters, rows, strict=True))

    def sides(self) -> list[Tensor]:
        """The parameters themselves as matrices ``[out, n]``, side by side the block's: writing moves them."""
        return [_as_matrix(tensor.detach()) for tensor in self.tensors]

    def split(self, matrix: Tensor) -> list[Tensor]:
        """The inverse of :meth:`matrix`."""
        widths = [_as_matrix(tensor).shape[1] for tensor in self.tensors]
        return [
            side.reshape(parameter.shape)
            for side, parameter in zip(matrix.split(widths, 1), self.parameters, strict=True)
        ]


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(-1, 1)


@dataclass(frozen=True)
class Call:
    """One run of a module: its inputs, and its outputs' gradients ``[R, *output.shape]``, column by column.

    ``None`` stands for an output that no column depends on. These gradients lead with the batch after R, also where
    the outputs do not; the inputs are as the module got them (but see :meth:`LayerRule.positionwise`).
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    cotangents: Sequence[Tensor | None]


@dataclass(frozen=True)
class BatchDims:
    """Which dimension is the batch, of each floating-point tensor that goes in and out; the last one repeats."""

    inputs: tuple[int, ...] = (0,)
    outputs: tuple[int, ...] = (0,)


_FIRST = BatchDims()


class LayerRule(ABC):
    """How one kind of module answers; see the module's docstring. Rules have no state."""

    name: str
    why: str

    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters the rule answers for, by name within the module; those of children that it never calls too."""
        return {name: p for name, p in module._parameters.items() if p is not None}

    def refuses(self, module: nn.Module) -> str | None:
        """Why this module's parameters have no columns, if its settings say so."""
        return None

    def reads(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the rule can read a call on these arguments."""
        return True

    def positionwise(self, module: nn.Module) -> bool:
        """Whether it does the same at every place of the leading dimensions, so that the second may be the batch.

        :meth:`columns` then gets the inputs, too, with the batch in front.
        """
        return False

    def batch_dims(self, module: nn.Module) -> BatchDims:
        """Where the batch is in the module's inputs and outputs."""
        return _FIRST

    def draws(self, module: nn.Module) -> bool:
        """Whether :meth:`columns` draws the random numbers of the module's run again (dropout inside)."""
        return False

    @abstractmethod
    def blocks(self, module: nn.Module, trained: Sequence[str]) -> list[tuple[str, ...]]:
        """The trained parameters' names, grouped: each group is one block."""

    @abstractmethod
    def columns(self, module: nn.Module, blocks: Sequence[Block], call: Call) -> list[Columns]:
        """The columns' gradients of each block."""


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str, default: Any = None) -> Any:
    """The module's argument ``name``, which comes at ``position`` if it is not named."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def only_cotangent(call: Call) -> Tensor:
    """The gradient at a single-output module's output."""
    (cotangent,) = call.cotangents
    assert cotangent is not None
    return cotangent


def weight_and_bias(trained: Sequence[str]) -> list[tuple[str, ...]]:
    """``weight`` and ``bias`` as one block, or whichever of them is trained."""
    return [tuple(name for name in ("weight", "bias") if name in trained)]
