"""What one forward pass leaves: its inputs, every layer's runs, every stage's state, and the gradients to come.

Records only: :mod:`ddpnopt.trajectory` fills them. A pass holds nothing of the graph but, at most, its edges.
"""

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from .conditions import Conditions
from .errors import StepError
from .trees import versions


@dataclass(eq=False)
class Run:
    """One run of a layer: detached inputs, and gradients at its floating-point outputs (``None`` until they come).

    ``dims``: of each output, the dimension that is the batch. ``misfit``: there is no such dimension, or the rule
    cannot read this call, so that no column belongs to one sample. ``rng``: states of the generators before the run,
    where the rule needs them. ``stray``: a parameter of the layer was also used outside its runs, so that columns read
    off these are not all.
    """

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    cotangents: list[Tensor | None]
    dims: list[int]
    misfit: bool
    rng: list[Tensor] | None = None
    stray: bool = False

    def let_go(self, *, cotangents: bool) -> None:
        """Drop the inputs, and the gradients if they are not wanted any more either."""
        self.args, self.kwargs = (), {}
        if cotangents:
            self.cotangents[:] = [None] * len(self.cotangents)


@dataclass(eq=False)
class Visit:
    """A stage's state at its first run: floating-point inputs, and the gradients at them.

    The inputs are detached and lead with the batch; where it is in the gradients, ``dims`` says. In the end their
    inner products with the gradients, ``[R, B]``, take their place (``None`` without a gradient).
    """

    inputs: list[Tensor]
    cotangents: list[Tensor | None]
    dims: list[int]
    shapes: list[tuple[int, ...]]
    products: list[Tensor | None] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Where in a forward pass a tensor is seen.

    Args:
        module: the module that receives or (``leaving``) returns it.
        call: which entry or exit of the module in this pass, from 0.
        index: which of the floating-point tensors there.
    """

    module: nn.Module
    leaving: bool
    call: int
    index: int


@dataclass(eq=False)
class Live:
    """One tensor of the state, for the stages at whose cuts the same part of its gradient counts.

    Args:
        place: where it can be measured.
        value: nominal, detached; ``version`` counts the writes into it until then. In the end ``product [R, B]``, its
            inner products with the gradient (``None`` without one), takes its place.
        shape: of the value.
        dim: which of its dimensions is the batch.
        terms: the gradient ``p`` as slots of :attr:`State.cotangents` with their signs.
        stages: the stages.
    """

    place: Place
    value: Tensor | None
    version: int
    shape: torch.Size
    dim: int
    terms: tuple[tuple[int, int], ...]
    stages: tuple[nn.Module, ...]
    product: Tensor | None = None


@dataclass(eq=False)
class State:
    """The states at the cuts of one pass: what lives there, and where the gradients will arrive.

    Args:
        live: tensors, by the module boundary at which they are measured.
        cotangents: slots, ``None`` until a gradient arrives; see :func:`signed_sum`.
        later: for each stage, the runs that follow its cut of layers that ran before it, by their place among the
            pass's runs, with the parameters to which this applies (``None``: all).
        behind: for each stage, parameters that its state depends on other than through the tensors in it.
        lost: stages whose state cannot be told, with the reason; their own input stands for it.
    """

    live: dict[tuple[nn.Module, bool, int], list[Live]] = field(default_factory=dict)
    cotangents: list[Tensor | None] = field(default_factory=list)
    later: dict[nn.Module, dict[int, frozenset[Any] | None]] = field(default_factory=dict)
    behind: dict[nn.Module, set[Any]] = field(default_factory=dict)
    lost: dict[nn.Module, str] = field(default_factory=dict)


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
        reached: a gradient has arrived, and counts.
        waiting: gradients that have arrived with graphs of their own (``create_graph=True``), by autograd's number of
            the backward pass: a loss may be made of them, and then they are no part of the loss's own.
        own_draws: it drew random numbers or wrote buffers: a larger batch would not have done the same.
        spent: a step has let go of what was recorded.
        runs, visits: of layers, and of stages in the order they ran.
        state: what lives at the cuts, where this was asked for.
        leaves: the floating-point tensors of the output.
        values: these detached, where this was asked for.
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
    state: State | None = None
    versions: list[int] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    cotangents: list[Tensor | None] = field(default_factory=list)
    criterion: tuple[tuple[Any, ...], dict[str, Any], int] | None = None
    outputs: list[Tensor] = field(default_factory=list)
    edges: list[tuple[list[Tensor | None], int, GradientEdge]] = field(default_factory=list)
    reached: bool = False
    waiting: dict[int, list[tuple[list[Tensor | None], int, Tensor]]] = field(default_factory=dict)
    own_draws: bool = False
    spent: bool = False

    def check_unwritten(self) -> None:
        """Raise :class:`StepError` if an argument was written into since the forward pass."""
        if self.versions != versions((self.args, self.kwargs)):
            raise StepError(
                "an input of the model was written into after the forward pass (by the loop, or by the model itself), "
                "and step() needs it again: give the model a copy, x.clone(), or do not work in place on it"
            )

    def clear(self) -> None:
        """Drop the gradients that have arrived."""
        self.waiting.clear()
        for slots in self.slots():
            slots[:] = [None] * len(slots)

    def settle(self, heard: Collection[int]) -> bool:
        """Let those of the ``waiting`` gradients count whose backward pass has reached parameters.

        Args:
            heard: backward passes that have; none: nobody knows, and all count.

        Returns:
            whether there were others.
        """
        others = False
        for number, arrived in self.waiting.items():
            if heard and number not in heard:
                others = True
                continue
            self.reached = True
            for slots, i, gradient in arrived:
                slots[i] = add(slots[i], gradient)
        self.waiting.clear()
        return others

    def slots(self) -> list[list[Tensor | None]]:
        """Every list that gradients arrive in."""
        holders: list[State | Run | Visit] = [*self.runs, *self.visits.values()]
        holders += [self.state] if self.state is not None else []
        return [self.cotangents, *(holder.cotangents for holder in holders)]


def add(before: Tensor | None, gradient: Tensor) -> Tensor:
    """Their sum, if there was any before."""
    return gradient if before is None else before + gradient


def wide(tensor: Tensor) -> Tensor:
    """The tensor, at least in float32."""
    if tensor.dtype is torch.float32 or tensor.dtype is torch.float64:
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def fronted(tensor: Tensor, dim: int, to: int = 0) -> Tensor:
    """The tensor with dimension ``dim`` moved to place ``to``."""
    return tensor if dim == to else tensor.movedim(dim, to)


def signed_sum(cotangents: Sequence[Tensor | None], terms: Sequence[tuple[int, int]]) -> Tensor | None:
    """A sum of slots with signs; ``None`` if no gradient came to any."""
    total = None
    for slot, sign in terms:
        part = cotangents[slot]
        if part is not None:
            total = torch.add(total, part, alpha=sign) if total is not None else part if sign > 0 else -part
    return total
