"""What one forward pass leaves: its inputs, every layer's runs, every stage's state, and the gradients to come.

Records only: :mod:`ddpnopt.trajectory` fills them. A pass holds nothing of the graph but, at most, its edges.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

from .conditions import Conditions
from .errors import StepError


@dataclass(eq=False)
class Run:
    """One run of a layer: detached inputs, and gradients at its floating-point outputs (``None`` until they come).

    ``misfit``: its outputs do not lead with the batch, so that no column belongs to one sample.
    """

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cotangents: list[Tensor | None]
    misfit: bool


@dataclass(eq=False)
class Visit:
    """A stage's state at its first run: floating-point inputs (detached), and the gradients at them."""

    inputs: list[Tensor]
    cotangents: list[Tensor | None]


@dataclass(frozen=True)
class Leaf:
    """One tensor of a model's output, weakly held, as it was when the model returned it."""

    tensor: weakref.ref[Tensor]
    version: int
    shape: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> "Leaf":
        """The leaf as it is."""
        return Leaf(weakref.ref(tensor), tensor._version, tensor.shape, tensor.stride())

    def is_all_of(self, given: Tensor) -> bool:
        """Whether ``given`` is the tensor, unchanged: itself, or all of it in another shape or order."""
        own = self.tensor()
        if own is None or given._version != self.version or given.numel() != own.numel():
            return False
        if given is own:
            return True
        base = given._base
        return (
            base is not None and (base is own or base is own._base) and given.storage_offset() == own.storage_offset()
        )

    def laid_out(self, column: Tensor, given: Tensor) -> Tensor:
        """A column with ``given``'s shape, as one with the leaf's; ``given``: a tensor of which this is all."""
        if given.shape == self.shape and given.stride() == self.stride:
            return column.view(self.shape)
        storage = column.new_empty(column.numel())
        storage.as_strided(given.shape, given.stride()).copy_(column.view(given.shape))
        return storage.as_strided(self.shape, self.stride)

    def seen_as(self, given: Tensor, output: Tensor) -> Tensor:
        """A new output, in the shape and order of ``given``."""
        if given.shape == self.shape and given.stride() == self.stride:
            return output
        storage = output.new_empty(output.numel())
        storage.as_strided(self.shape, self.stride).copy_(output)
        return storage.as_strided(given.shape, given.stride())


@dataclass(eq=False)
class Pass:
    """One forward pass of the model.

    Args:
        args, kwargs: detached; ``versions`` counts writes into them.
        batch: length of the first tensor among them.
        conditions: what else the pass depended on.
        own_draws: it drew random numbers or wrote buffers: a larger batch would not have done the same.
        runs, visits: of layers, and of stages in the order they ran.
        leaves: the floating-point tensors of the output.
        cotangents: gradients at these.
        criterion: what the criterion was last called with on one of them, and which one.
        outputs, edges: the leaves themselves and where to differentiate, kept only while the graph is ours.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch: int
    conditions: Conditions
    runs: list[Run] = field(default_factory=list)
    visits: dict[nn.Module, Visit] = field(default_factory=dict)
    versions: list[int] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
    cotangents: list[Tensor | None] = field(default_factory=list)
    criterion: tuple[tuple[Any, ...], dict[str, Any], int] | None = None
    outputs: list[Tensor] = field(default_factory=list)
    edges: list[tuple[list[Tensor | None], int, GradientEdge]] = field(default_factory=list)
    reached: bool = False
    own_draws: bool = False

    def check_unwritten(self) -> None:
        """Raise :class:`StepError` if an argument was written into since the forward pass."""
        if self.versions != versions((self.args, self.kwargs)):
            raise StepError(
                "an input of the model was written into after the forward pass (by the loop, or by the model itself), "
                "and step() needs it again: give the model a copy, x.clone(), or do not work in place on it"
            )


def versions(tree: Any) -> list[int]:
    """How often each tensor in a nested structure has been written into; -1 where torch does not count."""
    tensors = (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def floating(tree: Any) -> list[Tensor]:
    """The floating-point tensors in nested tuples, lists and dictionaries."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def detached(tree: Any) -> Any:
    """The same nested structure with every tensor detached."""
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)
