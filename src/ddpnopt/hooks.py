"""The hooks: what stands on a module, on a tensor, and on a node of autograd's graph.

Hooks on the graph hold its pass and what the pass leads to; they hold nothing of the graph, which holds them.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from .cuts import Edge, Key, Share, Split
from .passes import signed_sum

Terms = tuple[tuple[int, int], ...]


class ModuleHook:
    """A module hook that does not keep its recorder alive, and that a copied or pickled model carries along inert."""

    def __init__(self, method: Callable[..., None], module: nn.Module):
        _leave_out_of_compiled_code()
        self._method: weakref.WeakMethod[Callable[..., None]] | None = weakref.WeakMethod(method)
        self._module: weakref.ref[nn.Module] | None = weakref.ref(module)

    def __call__(self, module: nn.Module, *values: Any) -> None:
        method = self._method() if self._method else None
        if method is not None and self._module is not None and self._module() is module:
            method(module, *values)

    def __getstate__(self) -> dict[str, Any]:
        return {"_method": None, "_module": None}


@cache
def _leave_out_of_compiled_code() -> None:
    """Let compiled code break off at module hooks and run them as they are: traced, they would see no tensor."""
    # no decorator, which would import the compiler together with this package: seconds
    ModuleHook.__call__ = torch.compiler.disable(ModuleHook.__call__)  # type: ignore[method-assign]


class Ear(Protocol):
    """Who is told of gradients."""

    def listening(self) -> bool:
        """Whether it wants to know at present."""

    def arrived(self, slots: list[Tensor | None], i: int, gradient: Tensor) -> None:
        """A gradient for slot ``i`` has come."""


class TensorTap:
    """A tensor hook: passes the gradient on and changes nothing."""

    def __init__(self, ear: Ear, slots: list[Tensor | None], i: int):
        self._to = ear, slots, i

    def __call__(self, gradient: Tensor) -> None:
        ear, slots, i = self._to
        ear.arrived(slots, i, gradient)


class Taps:
    """Slots for gradients of tensors, of single uses, and of a split node's part; and the hooks that fill them."""

    def __init__(self) -> None:
        self.count = 0
        self._own: dict[Node, dict[int, int]] = defaultdict(dict)
        self._uses: dict[Node, dict[int, int]] = defaultdict(dict)
        self._parts: dict[Node, dict[Split, tuple[dict[int, Terms], dict[int, int]]]] = defaultdict(dict)

    def terms(self, key: Key, part: Share) -> Terms:
        """The share ``part`` of the gradient at ``key``, as slots with signs."""
        node, k = key
        if not part.whole and not part.leaves:
            terms = [(self._use(use), 1) for use in part.after]
        else:  # what comes from outside the model has no use of its own: it is what the others leave
            terms = [(self._slot(self._own[node], k), 1)]
            terms += [(self._use(use), -1) for use in (*part.before, *(use for use, _ in part.split))]
        return (*terms, *((self._part(split, use[1]), 1) for use, split in part.split))

    def edges(self) -> list[tuple[int, GradientEdge]]:
        """Where to differentiate for the slots of whole tensors: nodes that only these need are not executed."""
        return [(slot, GradientEdge(node, k)) for node, slots in self._own.items() for k, slot in slots.items()]

    def install(self, ear: Ear, slots: list[Tensor | None]) -> None:
        """Hook the nodes; the hooks hold ``ear`` and the list that gradients arrive in."""
        for node in dict.fromkeys([*self._own, *self._parts]):
            parts = list(self._parts.get(node, {}).values())
            node.register_prehook(_Before(ear, slots, self._own.get(node, {}), parts))
        for node in dict.fromkeys([*self._uses, *self._parts]):
            split = [into for _, into in self._parts.get(node, {}).values()]
            node.register_hook(_After(ear, slots, self._uses.get(node, {}), split))

    def _slot(self, slots: dict[int, int], i: int) -> int:
        if i not in slots:
            slots[i], self.count = self.count, self.count + 1
        return slots[i]

    def _use(self, use: Edge) -> int:
        return self._slot(self._uses[use[0]], use[1])

    def _part(self, split: Split, i: int) -> int:
        parts = self._parts[split.node]
        if split not in parts:
            parts[split] = {k: self.terms((split.node, k), part) for k, part in split.shares}, {}
        return self._slot(parts[split][1], i)


class _Before:
    """Before a node runs backward: its outputs' gradients are complete, and what it saved is still there."""

    def __init__(
        self,
        ear: Ear,
        slots: list[Tensor | None],
        own: Mapping[int, int],
        parts: Sequence[tuple[dict[int, Terms], dict[int, int]]],
    ):
        self._ear, self._slots, self._own, self._parts = ear, slots, own, parts

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        if not self._ear.listening():
            return
        for k, slot in self._own.items():
            if (gradient := gradients[k]) is not None:
                self._ear.arrived(self._slots, slot, gradient)
        slots = self._slots
        for shares, into in self._parts:
            given = [signed_sum(slots, shares[k]) if k in shares else None for k in range(len(gradients))]
            if all(gradient is None for gradient in given):
                continue
            node: Any = torch._C._current_autograd_node()  # a hook that held its node would never be freed
            with torch.no_grad():
                pulled = node(*given)
            for i, slot in into.items():
                slots[slot] = (pulled if isinstance(pulled, tuple) else (pulled,))[i]


class _After:
    """After a node has run backward: the gradients along its uses of other tensors, in the tensors' own shapes."""

    def __init__(
        self, ear: Ear, slots: list[Tensor | None], uses: Mapping[int, int], split: Sequence[Mapping[int, int]]
    ):
        self._ear, self._slots, self._uses, self._split = ear, slots, uses, split

    def __call__(self, gradients: tuple[Tensor | None, ...], _: object) -> None:
        if not self._ear.listening():
            return
        for i, slot in self._uses.items():
            if (gradient := gradients[i]) is not None:
                self._ear.arrived(self._slots, slot, gradient)
        slots = self._slots
        for into in self._split:
            for i, slot in into.items():
                part, whole = slots[slot], gradients[i]
                if part is not None and whole is not None:  # autograd undoes broadcasting after the node
                    slots[slot] = part.sum_to_size(whole.shape).to(whole.dtype)
