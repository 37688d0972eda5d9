"""The state at a cut, read off autograd's graph: which tensors live across it, and what part of their gradient counts.

Just before a stage runs, the state is every tensor computed before and used after. Autograd numbers its nodes in the
order of execution, so a cut is a number ``q``, and an edge from a consumer ``n`` to what ``m`` computed crosses it if
``m < q <= n``. The part ``p`` of a tensor's gradient that belongs to the state comes along those edges alone:
consumers before the cut have used the tensor already.

A state must be measured, so it consists of *known* tensors, those that a module received or returned before the cut. A
crossing tensor that no module saw (a sum inside a forward, say) is replaced by what it was computed from: the cut
moves back through its node. Any set of tensors that every path to the loss crosses once is a state.

Pure functions of graph nodes; they register nothing and keep nothing.
"""

import heapq
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

Key = tuple[Node, int]
"""A tensor of the graph: the node that computed it, and which of the node's outputs it is."""

Edge = tuple[Node, int]
"""A use of a tensor: the consumer, and which of its inputs the tensor is."""

LEAF = 1 << 62
"""Nodes that accumulate a leaf's gradient are numbered above this."""


@dataclass(frozen=True)
class Cut:
    """Where a stage first runs: autograd's next number, and how many module boundaries were passed before."""

    stage: nn.Module
    number: int
    boundary: int


@dataclass(frozen=True)
class Share:
    """The part of a tensor's gradient from after a cut.

    Args:
        before: uses before the cut.
        after: uses after the cut.
        split: uses by a node through which the cut moves back for a part of the node's own gradient.
        leaves: whether the tensor is an output of the model, so that its gradient also comes from outside.
    """

    before: tuple[Edge, ...]
    after: tuple[Edge, ...]
    split: tuple[tuple[Edge, "Split"], ...]
    leaves: bool

    @property
    def whole(self) -> bool:
        """Whether it is all of the gradient."""
        return not self.before and not self.split


@dataclass(frozen=True)
class Split:
    """A node through which a cut moves back with a share of its outputs' gradients, by output."""

    node: Node
    shares: tuple[tuple[int, Share], ...]


@dataclass
class Graph:
    """What outputs depend on, back to where the model began.

    Args:
        number: each node's place in the order of execution.
        uses: of each tensor.
        leaves: numbers of the consumers of each leaf that requires a gradient.
    """

    outputs: Sequence[Key]
    number: dict[Node, int] = field(default_factory=dict)
    uses: dict[Key, list[Edge]] = field(default_factory=lambda: defaultdict(list))
    leaves: dict[Any, list[int]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class States:
    """The states at all cuts.

    Args:
        live: the cuts at which this share of this tensor's gradient belongs to the state, by their place in the order.
        behind: leaves that a state depends on and that have been used before its cut other than through the state.
        lost: cuts whose state cannot be told, with the reason.
    """

    live: dict[tuple[Key, Share], list[int]] = field(default_factory=lambda: defaultdict(list))
    behind: dict[int, set[Any]] = field(default_factory=lambda: defaultdict(set))
    lost: dict[int, str] = field(default_factory=dict)


def read_graph(outputs: Sequence[Key], first: int) -> Graph | None:
    """Walk the graph from ``outputs`` back to nodes numbered below ``first``.

    Returns:
        ``None`` if nodes are not numbered in the order of execution (made by another thread, say).
    """
    graph = Graph(outputs)
    stack = [node for node, _ in outputs]
    while stack:
        node = stack.pop()
        if node in graph.number:
            continue
        number = graph.number[node] = node._sequence_nr()
        if number < first or number > LEAF:
            continue
        for i, (source, k) in enumerate(node.next_functions):
            if source is None:
                continue
            below = source._sequence_nr()
            if below > LEAF:
                graph.leaves[_leaf_of(source)].append(number)
            elif below >= number:
                return None
            elif below >= first:
                graph.uses[source, k].append((node, i))
                stack.append(source)
    return graph


def states_at(graph: Graph, cuts: Sequence[Cut], known: Mapping[Key, int], *, hooked: bool) -> States:
    """The states at ``cuts``, in the order the stages ran.

    Args:
        graph: of the model's outputs.
        cuts: with rising numbers.
        known: the boundary at which each tensor can first be measured.
        hooked: whether saved tensors may be packed away (checkpointing), to be unpacked once only.
    """
    found = States()
    numbers = [cut.number for cut in cuts]
    outputs = set(graph.outputs)
    crossing: list[list[Key]] = [[] for _ in cuts]
    for key in {**dict.fromkeys(graph.uses), **dict.fromkeys(graph.outputs)}:
        lowest = bisect_right(numbers, graph.number[key[0]])
        last = max((graph.number[n] for n, _ in graph.uses.get(key, ())), default=-1)
        for t in range(lowest, len(cuts) if key in outputs else bisect_right(numbers, last)):
            crossing[t].append(key)
    by_node: dict[Node, set[int]] = defaultdict(set)
    for node, k in [*graph.uses, *graph.outputs]:
        by_node[node].add(k)
    for t, cut in enumerate(cuts):
        _trace(found, t, cut, crossing[t], graph, by_node, outputs, known, hooked=hooked)
    return found


def _trace(
    found: States, t: int, cut: Cut, crossing: Sequence[Key], graph: Graph, by_node: Mapping[Node, set[int]],
    outputs: set[Key], known: Mapping[Key, int], *, hooked: bool,
) -> None:  # fmt: skip
    moved: dict[Node, Split | None] = {}  # nodes the cut has moved back through; None: with all of their gradient
    waiting: set[Node] = set()
    heap: list[tuple[int, int, Node]] = []

    def add(node: Node) -> None:
        if node not in waiting:
            waiting.add(node)
            heapq.heappush(heap, (-graph.number[node], len(waiting), node))

    for node, _ in crossing:
        add(node)
    while heap:  # consumers carry higher numbers: theirs is settled before a node's own turn comes
        *_, node = heapq.heappop(heap)
        unknown: dict[int, Share] = {}
        whole = True
        for k in sorted(by_node[node]):
            uses = graph.uses.get((node, k), [])
            before = tuple(use for use in uses if graph.number[use[0]] < cut.number and use[0] not in moved)
            if len(before) == len(uses) and (node, k) not in outputs:
                whole = False
                continue
            split = tuple((use, part) for use in uses if (part := moved.get(use[0])) is not None)
            part_of = {*before, *(use for use, _ in split)}
            after = tuple(use for use in uses if use not in part_of)
            share = Share(before, after, split, (node, k) in outputs)
            if known.get((node, k), cut.boundary + 1) <= cut.boundary:
                found.live[(node, k), share].append(t)
                whole = False
            else:
                unknown[k] = share
                whole = whole and share.whole
        if not unknown:
            continue
        if not whole and (reason := _cannot_split(node, hooked=hooked)):
            found.lost[t] = reason
            return
        moved[node] = None if whole else Split(node, tuple(unknown.items()))
        for source, _ in node.next_functions:
            if source is None:
                continue
            if source._sequence_nr() > LEAF:
                found.behind[t].add(_leaf_of(source))
            elif source in graph.number and (source in by_node):
                add(source)


def _leaf_of(node: Any) -> Any:
    return node.variable


def _cannot_split(node: Node, *, hooked: bool) -> str | None:
    """Why a node cannot be asked for a part of its gradients, besides the whole that autograd asks it for."""
    if isinstance(node, BackwardCFunction):
        return f"{node.name()} is a custom function, or compiled code"
    if hooked and any(name.startswith("_raw_saved") for name in dir(node)):
        return f"{node.name()} may be checkpointed"
    return None
