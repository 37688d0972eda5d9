"""The nominal trajectory: what every forward pass fed to each layer, and what the backward pass brought back.

The only code that registers hooks. A pass lives as long as the graph of its forward pass, or until the step
that used it: the graph's tensor hooks hold it, and it holds nothing of the graph, so neither a forward pass that
nobody differentiates nor a model that outlives its optimizer leaks.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from .conditions import Conditions
from .errors import StepError
from .passes import Leaf, Pass, Run, Visit, detached, floating, versions

BeforeStage = Callable[[nn.Module, list[Tensor]], None]


class _Hook:
    """A module hook that does not keep its recorder alive, and that a copied or pickled model carries along inert."""

    def __init__(self, method: Callable[..., None], module: nn.Module):
        self._method: weakref.WeakMethod[Callable[..., None]] | None = weakref.WeakMethod(method)
        self._module: weakref.ref[nn.Module] | None = weakref.ref(module)

    def __call__(self, module: nn.Module, *values: Any) -> None:
        method = self._method() if self._method else None
        if method is not None and self._module is not None and self._module() is module:
            method(module, *values)

    def __getstate__(self) -> dict[str, Any]:
        return {"_method": None, "_module": None}


class Recorder:
    """Records passes of ``model`` under grad mode, and runs the model again on a recorded pass."""

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module],
        stages: Iterable[nn.Module],
        criterion: nn.Module | None,
    ):
        self.model = model
        self.live: list[Pass] = []
        self._begun: list[weakref.ref[Pass]] = []
        self._kept: list[Pass] = []
        self._current: Pass | None = None
        self._keeping = False
        self._muted = False
        self._paused = False
        self._before_stage: BeforeStage | None = None
        self._unreached: int | None = None
        self._batch = 0
        self._handles = self._attach(layers, stages, criterion)
        self._release = weakref.finalize(self, _remove, self._handles)

    def close(self) -> None:
        """Take every hook off the model."""
        self._release()
        self.live.clear()

    def take(self) -> list[Pass]:
        """The passes that a backward pass has reached since the last step, oldest first."""
        live = [p for p in self.live if p.runs]
        if self._unreached is not None and live and self._unreached not in [p.batch for p in live]:
            raise StepError(
                f"the last forward pass had batch size {self._unreached}, the one that loss.backward() went through "
                f"had {live[-1].batch}: step before the next training batch, and evaluate under torch.no_grad()"
            )
        return live

    def forget(self) -> None:
        """Drop what passes have recorded of backward passes, and every graph that was kept."""
        for recorded in self.live:
            recorded.reached = False  # its graph may be gone through again
            held: list[Pass | Run | Visit] = [recorded, *recorded.runs, *recorded.visits.values()]
            for holder in held:
                holder.cotangents[:] = [None] * len(holder.cotangents)
        for kept in self._kept:
            kept.edges.clear()
            kept.outputs.clear()
        self.live.clear()
        self._kept.clear()
        self._unreached = None

    @contextlib.contextmanager
    def keeping_graph(self) -> Iterator[list[Pass]]:
        """Collect the passes begun inside, with their outputs and the graph's edges."""
        passes: list[Pass] = []
        before = self._keeping, self._begun
        self._keeping, self._begun = True, []
        try:
            yield passes
            passes += [p for p in (ref() for ref in self._begun) if p is not None]
        finally:
            self._kept += [p for p in (ref() for ref in self._begun) if p is not None]
            self._keeping, self._begun = before

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Ignore what backward passes bring: the caller reads the graph itself."""
        self._muted = True
        try:
            yield
        finally:
            self._muted = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing: layer rules may call modules by themselves."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def replay(self, recorded: Pass, before_stage: BeforeStage) -> Any:
        """Run the model again on a pass's inputs, same dropout masks, buffers restored; returns its output.

        ``before_stage(module, inputs)`` is called before each stage's first run.
        """
        with self._as_recorded(recorded), torch.no_grad():
            self._before_stage = before_stage
            try:
                return self.model(*recorded.args, **recorded.kwargs)
            finally:
                self._before_stage = None

    def again(self, recorded: Pass) -> Pass:
        """Record the same pass again with its graph: for columns that the first backward pass did not carry."""
        with self._as_recorded(recorded), torch.enable_grad(), self.keeping_graph() as passes:
            self.model(*recorded.args, **recorded.kwargs)
        (again,) = passes
        return again

    @contextlib.contextmanager
    def _as_recorded(self, recorded: Pass) -> Iterator[None]:
        recorded.check_unwritten()
        unreached, self._batch = self._unreached, recorded.batch
        try:
            with recorded.conditions.restored(self.model):
                yield
        finally:
            self._current = None
            self._unreached = unreached

    def _attach(
        self, layers: Iterable[nn.Module], stages: Iterable[nn.Module], criterion: nn.Module | None
    ) -> list[RemovableHandle]:
        def before(module: nn.Module, method: Callable[..., None]) -> RemovableHandle:
            return module.register_forward_pre_hook(_Hook(method, module), with_kwargs=True)

        def after(module: nn.Module, method: Callable[..., None], *, always: bool) -> RemovableHandle:
            return module.register_forward_hook(_Hook(method, module), with_kwargs=True, always_call=always)

        # the model's own hooks enclose its layers', also where the model is a layer itself
        handles = [before(self.model, self._begin)]
        handles += [before(stage, self._visit) for stage in stages]
        handles += [after(layer, self._ran, always=False) for layer in layers]
        handles.append(after(self.model, self._end, always=True))
        if criterion is not None:
            handles.append(before(criterion, self._criterion))
        return handles

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused or self._before_stage is not None or not torch.is_grad_enabled():
            return
        if self.live and all(p.grad is None for p in self.model.parameters()):
            self.forget()  # model.zero_grad() has dropped the gradients of a batch that was skipped
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        conditions = Conditions.now(self.model, tensors[0].device.type if tensors else "cpu")
        batch = len(tensors[0]) if tensors else 0
        self._current = Pass(detached(args), detached(kwargs), batch, conditions)
        self._current.versions = versions((args, kwargs))
        self._batch = batch
        self._begun = [ref for ref in self._begun if ref() is not None] + [weakref.ref(self._current)]
        if self.model.training:
            self._unreached = batch

    def _end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._paused:
            return
        ended, self._current = self._current, None
        if ended is None:
            return
        ended.own_draws = ended.conditions.changed(model)
        outputs = floating(output)
        ended.leaves = [Leaf.of(leaf) for leaf in outputs]
        ended.cotangents = [None] * len(outputs)
        self._tap(ended, outputs, ended.cotangents)
        if self._keeping:
            ended.outputs = outputs

    def _visit(self, stage: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused:
            return
        if self._before_stage is not None:
            self._before_stage(stage, self._state((args, kwargs)))
        elif self._current is not None and stage not in self._current.visits and torch.is_grad_enabled():
            inputs = self._state((args, kwargs))
            visit = Visit([x.detach() for x in inputs], [None] * len(inputs))
            self._current.visits[stage] = visit
            self._tap(self._current, inputs, visit.cotangents)

    def _state(self, tree: Any) -> list[Tensor]:
        """The floating-point inputs that lead with the batch: others (a bias, a mask) belong to no sample."""
        return [x for x in floating(tree) if x.ndim and len(x) == self._batch]

    def _ran(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._paused or self._current is None or self._before_stage is not None or not torch.is_grad_enabled():
            return
        outputs = floating(output)
        misfit = any(out.ndim < 1 or len(out) != self._current.batch for out in outputs)
        run = Run(layer, detached(args), detached(kwargs), [None] * len(outputs), misfit)
        self._current.runs.append(run)
        self._tap(self._current, outputs, run.cotangents)

    def _tap(self, into: Pass, tensors: Sequence[Tensor], cotangents: list[Tensor | None]) -> None:
        for i, tensor in enumerate(tensors):
            if not tensor.requires_grad:
                continue
            tensor.register_hook(_Tap(self, into, cotangents, i))
            if self._keeping:
                into.edges.append((cotangents, i, get_gradient_edge(tensor)))

    def _arrived(self, into: Pass, cotangents: list[Tensor | None], i: int, gradient: Tensor) -> None:
        if self._muted:
            return
        before = cotangents[i]
        cotangents[i] = gradient.detach() if before is None else before + gradient.detach()
        self._unreached = None
        if not into.reached:
            into.reached = True
            self.live.append(into)

    def _criterion(self, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if given is None or self._muted or self._paused:
            return
        for recorded in (ref() for ref in reversed(self._begun)):
            for i, leaf in enumerate(recorded.leaves if recorded else ()):
                if recorded and leaf.is_all_of(given):
                    recorded.criterion = detached(args), detached(kwargs), i
                    return


class _Tap:
    """A tensor hook: hands the gradient to the recorder and changes nothing."""

    def __init__(self, recorder: Recorder, into: Pass, cotangents: list[Tensor | None], i: int):
        self._to = recorder, into, cotangents, i

    def __call__(self, gradient: Tensor) -> None:
        recorder, into, cotangents, i = self._to
        recorder._arrived(into, cotangents, i, gradient)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
