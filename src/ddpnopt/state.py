"""Following one forward pass past its modules' boundaries and its stages' cuts, to the states at these."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .cuts import Cut, Graph, Key, read_graph, states_at
from .hooks import Taps
from .passes import Live, Place, Run, State, signed_sum

Boundary = tuple[nn.Module, bool, int]


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
        pieces: gives the parameters that the optimizer knows by those that modules and the graph have in their place.
    """

    def __init__(self, overwritten: Collection[Place], pieces: Callable[[], Mapping[Any, Any]]):
        self._overwritten, self._pieces = overwritten, pieces
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
        self._known_as: Mapping[Any, Any] = {}

    def passed(self, module: nn.Module, tensors: Sequence[tuple[int, Tensor, int]], *, leaving: bool) -> None:
        """A module's entry or exit, with the tensors there that have a batch dimension: which, what, and where."""
        self._hooked |= torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        boundary = self._boundaries.passed(module, leaving=leaving)
        self._count += 1
        for index, tensor, dim in tensors:
            if tensor.grad_fn is None or (key := (tensor.grad_fn, tensor.output_nr)) in self._known:
                continue
            place = Place(*boundary, index)
            value = tensor.detach().clone() if place in self._overwritten else tensor.detach()
            self._known[key] = self._count, Live(place, value, value._version, value.shape, dim, (), ())

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

    def finish(self, outputs: Sequence[Tensor], runs: Sequence[Run]) -> tuple[State, Taps]:
        """The states at all cuts, and the taps that will fill their slots."""
        state, taps, cuts = State(), Taps(), list(self._cuts.values())
        keys = [(out.grad_fn, out.output_nr) for out in outputs if out.grad_fn is not None]
        graph = read_graph(keys, self._first)
        if graph is None:
            state.lost = dict.fromkeys(self._cuts, "autograd's nodes are not numbered in the order of execution")
            return state, taps
        self._known_as = self._pieces()
        graph.leaves = {self._known_as.get(leaf, leaf): numbers for leaf, numbers in graph.leaves.items()}
        found = states_at(graph, cuts, {key: count for key, (count, _) in self._known.items()}, hooked=self._hooked)
        state.lost = {cuts[t].stage: why for t, why in found.lost.items()}
        state.behind = {
            cuts[t].stage: {self._known_as.get(leaf, leaf) for leaf in leaves} for t, leaves in found.behind.items()
        }
        self._find_later(state, graph, runs)
        self._find_strays(graph, runs)
        for (key, part), at in found.live.items():
            stages = tuple(cuts[t].stage for t in at if cuts[t].stage not in state.lost)
            if stages:
                seen = self._known[key][1]
                live = replace(seen, terms=taps.terms(key, part), stages=stages)
                state.live.setdefault((live.place.module, live.place.leaving, live.place.call), []).append(live)
        state.cotangents = [None] * taps.count
        return state, taps

    def _own(self, layer: nn.Module) -> list[Any]:
        return [self._known_as.get(p, p) for p in layer._parameters.values()]

    def _find_later(self, state: State, graph: Graph, runs: Sequence[Run]) -> None:
        """What runs after a cut of layers that moved before it: their change is part of the state too."""
        runs_of: dict[nn.Module, list[int]] = defaultdict(list)
        for i, run in enumerate(runs):
            runs_of[run.layer].append(i)
        order = {stage: t for t, stage in enumerate(self._cuts)}
        several = [layer for layer, places in runs_of.items() if len(places) > 1]
        owners: dict[Any, list[nn.Module]] = defaultdict(list)
        for layer in runs_of:
            for p in self._own(layer):
                owners[p].append(layer)
        moves = {  # when a parameter of several layers moves: at the first of their cuts
            p: min(order.get(layer, len(order)) for layer in own) for p, own in owners.items() if len(own) > 1
        }
        sharing = [layer for layer in runs_of if not moves.keys().isdisjoint(self._own(layer))]
        for t, (stage, cut) in enumerate(self._cuts.items()):
            later: dict[int, frozenset[Any] | None] = {}
            for layer in dict.fromkeys([*several, *sharing, *self._open[t]]):
                after = [i for i in runs_of[layer] if i >= self._finished[t]]
                if not after:
                    continue
                if order.get(layer, t) >= t:  # it has not moved, but what it shares may have
                    moved = frozenset(p for p in self._own(layer) if moves.get(p, t) < t)
                    later |= dict.fromkeys(after, moved) if moved else {}
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

    def _find_strays(self, graph: Graph, runs: Sequence[Run]) -> None:
        """Mark the runs of layers that own a parameter which was used outside the runs of all its owners."""
        spans: dict[Any, list[tuple[int, int]]] = defaultdict(list)
        for run, span in zip(runs, self._spans, strict=True):
            for p in self._own(run.layer):
                spans[p].append(span)
        strays = {
            p for p, own in spans.items() if not all(any(a <= n < b for a, b in own) for n in graph.leaves.get(p, ()))
        }
        for run in runs:
            run.stray = not strays.isdisjoint(self._own(run.layer))

    def _used_after(self, cut: Cut, layer: nn.Module, span: tuple[int, int], graph: Graph) -> frozenset[Any] | None:
        """The own parameters of a layer, running at the cut, that it uses after; ``None`` if one is used before too."""
        start, end = span
        uses = {p: [n for n in graph.leaves.get(p, ()) if start <= n < end] for p in self._own(layer)}
        after = frozenset(p for p, numbers in uses.items() if any(n >= cut.number for n in numbers))
        return None if any(n < cut.number for p in after for n in uses[p]) else after


def joined_state(states: Sequence[State], columns: bool) -> State | None:
    """The states of several passes side by side, products kept; ``None`` if not the same tensors live at all cuts."""
    first = states[0]

    def joined_live(same: Sequence[Live], slot: int) -> Live | None:
        if len({(x.place, x.dim, x.terms, x.stages) for x in same}) > 1:
            return None
        dim, products = same[0].dim, [x.product for x in same if x.product is not None]
        shape = list(same[0].shape)
        shape[dim] = sum(x.shape[dim] for x in same)
        product = torch.cat(products, 1) if len(products) == len(same) else None
        return replace(same[0], shape=torch.Size(shape), product=product, terms=((slot, 1),))

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
