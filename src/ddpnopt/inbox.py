"""The passes that have begun, and the gradients that backward passes bring to them, until a step takes both.

A pass lives as long as the graph of its forward pass, or until the step that used it: the graph's hooks hold it, and
here it is held weakly until a gradient arrives.
"""

import contextlib
import weakref
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from .errors import StepError
from .passes import Pass, add


class Inbox:
    """Passes of one model between their forward pass and a step."""

    def __init__(self) -> None:
        self.keeping = False
        self._live: list[Pass] = []
        self._begun: list[weakref.ref[Pass]] = []
        self._kept: list[Pass] = []
        self._muted = False
        self._collecting = False
        self._unreached: int | None = None
        self._derived = False

    @property
    def live(self) -> bool:
        """Whether a gradient has arrived that no step has used."""
        return bool(self._live)

    @property
    def empty(self) -> bool:
        """Whether the last forward pass in training mode was on a batch of length 0 and nothing came back yet."""
        return self._unreached == 0

    @property
    def muted(self) -> bool:
        """Whether backward passes are ignored at present."""
        return self._muted

    @property
    def listening(self) -> bool:
        """Whether gradients that arrive count."""
        return self._collecting or not self._muted

    def begun(self) -> Iterator[Pass]:
        """The passes that are still there, the latest first."""
        yield from (p for p in (ref() for ref in reversed(self._begun)) if p is not None)

    def begin(self, recorded: Pass, *, training: bool) -> None:
        """A forward pass begins."""
        self._begun = [ref for ref in self._begun if ref() is not None] + [weakref.ref(recorded)]
        if training:
            self._unreached = recorded.batch

    def arrived(self, into: Pass, slots: list[Tensor | None], i: int, gradient: Tensor) -> None:
        """A gradient has come to slot ``i`` of a pass."""
        if not self.listening:
            return
        gradient = gradient.detach() if gradient.requires_grad else gradient
        if self._collecting:
            slots[i] = gradient
            return
        if not (into.reached or into.waiting):
            self._live.append(into)
        self._unreached = None
        if torch.is_grad_enabled():
            into.waiting.setdefault(torch._C._current_graph_task_id(), []).append((slots, i, gradient))
            return
        into.reached = True
        slots[i] = add(slots[i], gradient)

    def settle(self, heard: Collection[int], *, graph: bool = False) -> bool:
        """Sort out what a loss was made of from what is the loss's; see :meth:`Pass.settle`.

        ``graph``: the loss's own gradients are still to come.
        """
        found = [self._derived, *(p.settle(heard) for p in self._live)]
        # where the loss is made of derivatives alone, those passes are the batch
        reached = [p for p in self._live if p.reached]
        self._live = reached if reached or graph else self._live
        return any(found)

    def take(self) -> list[Pass]:
        """The passes that a backward pass has reached since the last step, oldest first."""
        live = [p for p in self._live if p.runs]
        if any(p.spent for p in live):
            raise StepError(
                "loss.backward() went through a forward pass that a step was already made from: run the model again "
                "after each step, or add up the losses before one"
            )
        if self._unreached is not None and live and self._unreached not in [p.batch for p in live]:
            raise StepError(
                f"the last forward pass had batch size {self._unreached}, the one that loss.backward() went through "
                f"had {live[-1].batch}: step before the next training batch, and evaluate under torch.no_grad()"
            )
        return live

    def forget(self) -> None:
        """Drop what passes have recorded of backward passes, and every graph that was kept."""
        for recorded in self._live:
            recorded.reached = False  # its graph may be gone through again
            recorded.clear()
        for kept in self._kept:
            kept.edges.clear()
            kept.outputs.clear()
        self._live.clear()
        self._kept.clear()
        self._unreached = None
        self._derived = False

    def forget_passes(self) -> None:
        """The same, but not that some may have been gone through for the sake of a loss made of their derivatives."""
        derived = self._derived or any(p.waiting for p in self._live)
        self.forget()
        self._derived = derived

    @contextlib.contextmanager
    def keeping_graph(self) -> Iterator[list[Pass]]:
        """Collect the passes begun inside, with their outputs and the graph's edges."""
        passes: list[Pass] = []
        before = self.keeping, self._begun
        self.keeping, self._begun = True, []
        try:
            yield passes
            passes += [p for p in (ref() for ref in self._begun) if p is not None]
        finally:
            self._kept += [p for p in (ref() for ref in self._begun) if p is not None]
            self.keeping, self._begun = before

    @contextlib.contextmanager
    def mute(self, *, collecting: bool = False) -> Iterator[None]:
        """Ignore what backward passes bring: the caller reads the graph itself.

        ``collecting``: but for what autograd does not give to the caller, gradients of single uses of a tensor.
        """
        before = self._muted, self._collecting
        self._muted, self._collecting = True, collecting
        try:
            yield
        finally:
            self._muted, self._collecting = before

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Passes that begin inside do not count as the model's last one: they are ours."""
        before = self._unreached
        try:
            yield
        finally:
            self._unreached = before


class PassEar:
    """Tells an inbox of one pass's gradients; held by the graph's hooks, it holds nothing of the graph."""

    def __init__(self, inbox: Inbox, into: Pass):
        self._inbox, self._into = inbox, into

    def listening(self) -> bool:
        """Whether gradients that arrive count."""
        return self._inbox.listening

    def arrived(self, slots: list[Tensor | None], i: int, gradient: Tensor) -> None:
        """A gradient for slot ``i`` has come."""
        self._inbox.arrived(self._into, slots, i, gradient)
