"""Tracing the state of one forward pass: boundaries and cuts on the way, taps on the graph's nodes at its end.

The taps hold the pass, which holds nothing of the graph.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from .cuts import Cut, Edge, Graph, Key, Share, Split, read_graph, states_at
from .passes import Live, Place, Run, State, signed_sum

Boundary = tuple[nn.Module, bool, int]
Terms = tuple[tuple[int, int], ...]


def next_number() -> int:
    """The number that autograd will give to the next node."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


class Boundaries:
    """Counts entries and exits of every module, so that two runs of one model can be compared."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[nn.Module, bool]] = Counter()

    def passed(self, module: nn.Module, *, leaving: bool) -> Boundary:
        """The boundary passed now: module, whether it is the exit, and the how manieth time."""
        call = self._calls[module, leaving]
        self._calls[module, leaving] += 1
        return module, leaving, call


class Tracer:
    """Follows one forward pass; dropped at its end.

    Args:
        overwritten: places whose values are written into later, so that copies are kept.
    """

    def __init__(self, overwritten: Collection[Place]):
        self._overwritten = overwritten
        self._first = next_number()
        self._boundaries = Boundaries()
        self._count = 0
        self._hooked = False
        self._known: dict[Key, tuple[int, Live]] = {}
        self._cuts: dict[nn.Module, Cut] = {}
        self._finished: list[int] = []
        self._open: list[list[nn.Module]] = []
        self._starts: dict[nn.Module, list[int]] = {}
        self._spans: list[tuple[int, int]] = []

    def passed(self, module: nn.Module, tensors: Sequence[tuple[int, Tensor]], *, leaving: bool) -> None:
        """A module's entry or exit, with the tensors there that lead with the batch."""
        self._hooked |= torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        boundary = self._boundaries.passed(module, leaving=leaving)
        self._count += 1
        for index, tensor in tensors:
            if tensor.grad_fn is None or (key := (tensor.grad_fn, tensor.output_nr)) in self._known:
                continue
            place = Place(*boundary, index)
            value = tensor.detach().clone() if place in self._overwritten else tensor.detach()
            self._known[key] = self._count, Live(place, value, value._version, (), ())

    def begins(self, stage: nn.Module) -> None:
        """A run of a stage begins; its first is the stage's cut."""
        if stage not in self._cuts:
            self._cuts[stage] = Cut(stage, next_number(), self._count)
            self._finished.append(len(self._spans))
            self._open.append([module for module, starts in self._starts.items() if starts])
        self._starts.setdefault(stage, []).append(next_number())

    def ends(self, layer: nn.Module) -> None:
        """A run of a layer ends: the next one of the pass's runs."""
        starts = self._starts.get(layer)
        self._spans.append((starts.pop() if starts else self._first, next_number()))

    def finish(self, outputs: Sequence[Tensor], runs: Sequence[Run]) -> tuple[State, "Taps"]:
        """The states at all cuts, and the taps that will fill their slots."""
        state, taps, cuts = State(), Taps(), list(self._cuts.values())
        keys = [(out.grad_fn, out.output_nr) for out in outputs if out.grad_fn is not None]
        graph = read_graph(keys, self._first)
        if graph is None:
            state.lost = dict.fromkeys(self._cuts, "autograd's nodes are not numbered in the order of execution")
            return state, taps
        found = states_at(graph, cuts, {key: count for key, (count, _) in self._known.items()}, hooked=self._hooked)
        state.lost = {cuts[t].stage: why for t, why in found.lost.items()}
        state.behind = {cuts[t].stage: leaves for t, leaves in found.behind.items()}
        self._find_later(state, graph, runs)
        for (key, part), at in found.live.items():
            stages = tuple(cuts[t].stage for t in at if cuts[t].stage not in state.lost)
            if stages:
                seen = self._known[key][1]
                live = Live(seen.place, seen.value, seen.version, taps.terms(key, part), stages)
                state.live.setdefault((live.place.module, live.place.leaving, live.place.call), []).append(live)
        state.cotangents = [None] * taps.count
        return state, taps

    def _find_later(self, state: State, graph: Graph, runs: Sequence[Run]) -> None:
        """What runs after a cut of layers that moved before it: their change is part of the state too."""
        runs_of: dict[nn.Module, list[int]] = defaultdict(list)
        for i, run in enumerate(runs):
            runs_of[run.layer].append(i)
        order = {stage: t for t, stage in enumerate(self._cuts)}
        several = [layer for layer, places in runs_of.items() if len(places) > 1]
        for t, (stage, cut) in enumerate(self._cuts.items()):
            later: dict[int, frozenset[Any] | None] = {}
            for layer in dict.fromkeys([*several, *self._open[t]]):
                after = [i for i in runs_of[layer] if i >= self._finished[t]]
                if layer is stage or order.get(layer, t) >= t or not after:
                    continue
                later |= dict.fromkeys(after)
                if layer in self._open[t]:
                    used_later = self._used_after(cut, layer, self._spans[after[0]], graph)
                    if used_later is None:
                        state.lost[stage] = (
                            f"a parameter of the {type(layer).__name__} around it is used before and after"
                        )
                    later[after[0]] = used_later
            if later:
                state.later[stage] = later

    def _used_after(self, cut: Cut, layer: nn.Module, span: tuple[int, int], graph: Graph) -> frozenset[Any] | None:
        """The own parameters of a layer, running at the cut, that it uses after; ``None`` if one is used before too."""
        start, end = span
        uses = {p: [n for n in graph.leaves.get(p, ()) if start <= n < end] for p in layer._parameters.values()}
        after = frozenset(p for p, numbers in uses.items() if any(n >= cut.number for n in numbers))
        return None if any(n < cut.number for p in after for n in uses[p]) else after


class Ear(Protocol):
    """Who is told of gradients that arrive at a node."""

    def listening(self) -> bool:
        """Whether anybody wants to know."""

    def arrived(self, slot: int, gradient: Tensor) -> None:
        """Add to a slot."""

    @property
    def cotangents(self) -> list[Tensor | None]:
        """The slots."""


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
        terms = [(self._slot(self._own[node], k), 1)]
        terms += [(self._use(use), -1) for use in part.before]
        for use, split in part.split:
            terms += [(self._use(use), -1), (self._part(split, use[1]), 1)]
        return tuple(terms)

    def edges(self) -> list[tuple[int, GradientEdge]]:
        """Where to differentiate for the slots of whole tensors: nodes that only these need are not executed."""
        return [(slot, GradientEdge(node, k)) for node, slots in self._own.items() for k, slot in slots.items()]

    def install(self, ear: Ear) -> None:
        """Hook the nodes; ``ear`` is what the hooks hold."""
        for node in dict.fromkeys([*self._own, *self._parts]):
            parts = list(self._parts.get(node, {}).values())
            node.register_prehook(_Before(ear, self._own.get(node, {}), parts))
        for node, uses in self._uses.items():
            split = [slots for _, slots in self._parts.get(node, {}).values()]
            node.register_hook(_After(ear, uses, split))

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

    def __init__(self, ear: Ear, own: Mapping[int, int], parts: Sequence[tuple[dict[int, Terms], dict[int, int]]]):
        self._ear, self._own, self._parts = ear, own, parts

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        if not self._ear.listening():
            return
        for k, slot in self._own.items():
            if (gradient := gradients[k]) is not None:
                self._ear.arrived(slot, gradient)
        slots = self._ear.cotangents
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

    def __init__(self, ear: Ear, uses: Mapping[int, int], split: Sequence[Mapping[int, int]]):
        self._ear, self._uses, self._split = ear, uses, split

    def __call__(self, gradients: tuple[Tensor | None, ...], _: object) -> None:
        if not self._ear.listening():
            return
        for i, slot in self._uses.items():
            if (gradient := gradients[i]) is not None:
                self._ear.arrived(slot, gradient)
        slots = self._ear.cotangents
        for into in self._split:
            for i, slot in into.items():
                part, whole = slots[slot], gradients[i]
                if part is not None and whole is not None:  # autograd undoes broadcasting after the node
                    slots[slot] = part.sum_to_size(whole.shape).to(whole.dtype)
