"""The nominal trajectory: what every forward pass fed to each layer, and the taps for what a backward pass brings back.

Together with :mod:`ddpnopt.hooks` the only code that registers hooks. The graph's hooks hold its pass, which holds
nothing of the graph, so neither a forward pass that nobody differentiates nor a model that outlives its optimizer
leaks.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from .conditions import Conditions, rng_states
from .hooks import ModuleHook, TensorTap
from .inbox import Inbox, PassEar
from .layers import Layout, is_batch, rule_for
from .passes import Leaf, Pass, Place, Run, Visit, fronted
from .sharded import Shards
from .state import Boundaries, Boundary, Tracer
from .trees import detached, floating, leaves, versions
from .wrapped import keep_gradients_local, wrapper_running

BeforeStage = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
AtBoundary = Callable[[Boundary, Any], None]


class Recorder:
    """Records passes of ``model`` under grad mode, and runs the model again on a recorded pass.

    Args:
        model: the model.
        layers: modules whose runs are recorded.
        stages: modules at whose first run the state is cut.
        criterion: of the loss, if the terminal has one.
        whole_state: whether to find all that lives at a cut; else a stage's input is its state, right for chains.
        values: whether to keep the values at the output until the step.
        local_gradients: whether a ``DistributedDataParallel`` that the model runs in is to leave gradients alone.
        shards: of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[nn.Module],
        stages: Iterable[nn.Module],
        criterion: nn.Module | None,
        *,
        whole_state: bool = False,
        values: bool = False,
        local_gradients: bool = False,
        shards: Shards | None = None,
    ):
        self.model = model
        self.shards = Shards(None) if shards is None else shards
        self.inbox = Inbox()
        self.closed = False
        self._values = values
        self._local_gradients = local_gradients
        self._wrapper: weakref.ref[nn.Module] | None = None
        self._current: Pass | None = None
        self._paused = False
        self._before_stage: BeforeStage | None = None
        self._at_boundary: AtBoundary | None = None
        self._whole_state = whole_state
        self._tracer: Tracer | None = None
        self._boundaries = Boundaries()
        self.overwritten: set[Place] = set()  # places whose tensors are written into later: copies are kept
        self.untraced: set[str] = set()
        self._batch = 0
        self._layout = Layout(model)
        self._drawn: dict[nn.Module, list[Tensor]] = {}
        self._handles = self._attach(layers, stages, criterion)
        self._release = weakref.finalize(self, _remove, self._handles)

    def close(self) -> None:
        """Take every hook off the model."""
        self._release()
        self.inbox.forget()
        self.closed = True

    def inside(self, wrapper: nn.Module) -> None:
        """The model runs inside this ``DistributedDataParallel``."""
        if self._local_gradients and (self._wrapper is None or self._wrapper() is not wrapper):
            self._wrapper = weakref.ref(wrapper)
            keep_gradients_local(wrapper, self)

    def gradients(self, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor | None]:
        """What backward passes have left for these parameters; where they are sharded, of the samples seen here."""
        return {p: self.shards.gradients.get(p) if p in self.shards else p.grad for p in parameters}

    def forget(self) -> None:
        """Drop what backward passes have brought."""
        self.inbox.forget()
        self.shards.gradients.clear()

    def _read_off_columns(self, recorded: Pass) -> frozenset[nn.Parameter]:
        """Parameters of layers that a pass's columns tell all of; of no other layer."""
        if self.shards.every:
            return frozenset()
        pieces = self.shards.pieces()
        owners = Counter(pieces.get(p, p) for module in self.model.modules() for p in module._parameters.values())
        unread = {run.layer for run in recorded.runs if run.misfit or run.stray}
        read = {run.layer for run in recorded.runs if _has_columns(run.layer)} - unread
        own = (pieces.get(p, p) for layer in read for p in layer._parameters.values())
        return frozenset(p for p in own if p is not None and owners[p] == 1)

    def _parameters(self) -> list[nn.Parameter]:
        pieces = self.shards.pieces()
        return [pieces.get(p, p) for p in self.model.parameters()]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing: layer rules may call modules by themselves."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def replay(self, recorded: Pass, before_stage: BeforeStage, at_boundary: AtBoundary | None = None) -> Any:
        """Run the model again on a pass's inputs, same dropout masks, buffers restored; returns its output.

        ``before_stage(module, args, kwargs)`` is called before each stage's runs, ``at_boundary(boundary, values)`` at
        every module's entry and exit, where the recorder looks at the whole state.
        """
        with self._as_recorded(recorded), torch.no_grad():
            self._before_stage, self._at_boundary = before_stage, at_boundary
            self._boundaries = Boundaries()
            try:
                return self.model(*recorded.args, **recorded.kwargs)
            finally:
                self._before_stage = self._at_boundary = None

    def again(self, recorded: Pass) -> Pass:
        """Record the same pass again with its graph: for columns that the first backward pass did not carry."""
        with self._as_recorded(recorded), torch.enable_grad(), self.inbox.keeping_graph() as passes:
            self.model(*recorded.args, **recorded.kwargs)
        (again,) = passes
        return again

    @contextlib.contextmanager
    def _as_recorded(self, recorded: Pass) -> Iterator[None]:
        recorded.check_unwritten()
        self._batch = recorded.batch
        try:
            with self.inbox.unchanged(), recorded.conditions.restored(self.model):
                yield
        finally:
            self._current = None

    def _attach(
        self, layers: Iterable[nn.Module], stages: Iterable[nn.Module], criterion: nn.Module | None
    ) -> list[RemovableHandle]:
        def before(module: nn.Module, method: Callable[..., None], *, first: bool = False) -> RemovableHandle:
            return module.register_forward_pre_hook(ModuleHook(method, module), with_kwargs=True, prepend=first)

        def after(module: nn.Module, method: Callable[..., None], *, always: bool) -> RemovableHandle:
            return module.register_forward_hook(ModuleHook(method, module), with_kwargs=True, always_call=always)

        # the model's own hooks enclose its layers', also where the model is a layer itself
        handles = [before(self.model, self._begin)]
        replaced = {*self.shards.modules} - {self.model}
        inner = [m for m in self.model.modules() if m is not self.model] if self._whole_state else []
        handles += [before(module, self._enter) for module in inner]
        # fully_shard gives its modules other tensors than they were called on: a stage's state is in the latter, and
        # a state inside may have the former
        handles += [before(stage, self._visit, first=stage in replaced) for stage in stages]
        handles += [before(module, self._enter, first=True) for module in inner if module in replaced]
        handles += [after(layer, self._ran, always=False) for layer in layers]
        handles += [after(module, self._leave, always=False) for module in inner]
        handles.append(after(self.model, self._end, always=True))
        if criterion is not None:
            handles.append(before(criterion, self._criterion))
        return handles

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused or self._before_stage is not None or not torch.is_grad_enabled():
            return
        if (wrapper := wrapper_running()) is not None:
            self.inside(wrapper)
        if self.inbox.live and all(p.grad is None for p in self._parameters()):
            self.inbox.forget_passes()  # model.zero_grad() has dropped the gradients of a batch that was skipped
            self.shards.gradients.clear()
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        conditions = Conditions.now(self.model, tensors[0].device.type if tensors else "cpu")
        batch = len(tensors[0]) if tensors else 0
        self._current = Pass(detached(args), detached(kwargs), batch, conditions)
        self._current.versions = versions((args, kwargs))
        self._batch = batch
        self._tracer = Tracer(self.overwritten, self.shards.pieces) if self._whole_state else None
        self.inbox.begin(self._current, training=self.model.training)

    def _end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._paused:
            return
        ended, self._current = self._current, None
        tracer, self._tracer = self._tracer, None
        if ended is None:
            return
        ended.own_draws = ended.conditions.changed(model)
        outputs = floating(output)
        ended.leaves = [Leaf.of(leaf) for leaf in outputs]
        ended.values = [leaf.detach() for leaf in outputs] if self._values else []
        ended.cotangents = [None] * len(outputs)
        self._tap(ended, outputs, ended.cotangents)
        if tracer is not None:
            ended.state, taps = tracer.finish(outputs, ended.runs)
            taps.install(PassEar(self.inbox, ended), ended.state.cotangents)
            if self.inbox.keeping:
                ended.edges += [(ended.state.cotangents, i, edge) for i, edge in taps.edges()]
        if self.shards:
            self._handles += self.shards.listen()
            self.shards.unneeded = self._read_off_columns(ended)
        if self.inbox.keeping:
            ended.outputs = outputs

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pass_boundary(module, (args, kwargs), leaving=False)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._pass_boundary(module, output, leaving=True)

    def _pass_boundary(self, module: nn.Module, tree: Any, *, leaving: bool) -> None:
        if self._paused:
            return
        if self._at_boundary is not None:
            self._at_boundary(self._boundaries.passed(module, leaving=leaving), tree)
        elif self._tracer is not None:  # counted without gradients too: the second pass has none and cannot tell
            tensors = floating(tree) if torch.is_grad_enabled() else []
            dims = self._layout.dims(module, rule_for(module), tensors, self._batch, inputs=not leaving)
            own = enumerate(zip(tensors, dims, strict=True))
            fitting = [(i, x, dim) for i, (x, dim) in own if is_batch(x, dim, self._batch)]
            self._tracer.passed(module, fitting, leaving=leaving)

    def _visit(self, stage: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused:
            return
        if self._before_stage is not None:
            self._before_stage(stage, args, kwargs)
        elif self._current is not None and torch.is_grad_enabled():
            if rule_for(stage).draws(stage):
                self._drawn[stage] = rng_states(stage)
            if self._tracer is not None:
                self._tracer.begins(stage)
            if stage in self._current.visits:
                return
            state = self.state(stage, (args, kwargs))
            inputs, dims = [x for x, _ in state], [dim for _, dim in state]
            moved = [fronted(x.detach(), dim) for x, dim in state]
            visit = Visit(moved, [None] * len(inputs), dims, [tuple(x.shape) for x in moved])
            self._current.visits[stage] = visit
            self._tap(self._current, inputs, visit.cotangents)

    def state(self, stage: nn.Module, tree: Any) -> list[tuple[Tensor, int]]:
        """The floating-point inputs with a dimension that is the batch: others (a bias, a mask) belong to no sample.

        A tensor that is given twice (the query and the key of an attention) is there once, with all its gradient.
        """
        inputs = floating(tree)
        dims = self._layout.dims(stage, rule_for(stage), inputs, self._batch, inputs=True)
        fitting = [(x, dim) for x, dim in zip(inputs, dims, strict=True) if is_batch(x, dim, self._batch)]
        return fitting if len(fitting) < 2 else list({id(x): (x, dim) for x, dim in fitting}.values())

    def _ran(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._paused or self._current is None or self._before_stage is not None or not torch.is_grad_enabled():
            return
        outputs, rule = floating(output), rule_for(layer)
        dims = self._layout.dims(layer, rule, outputs, self._batch, inputs=False)
        fits = all(is_batch(out, dim, self._batch) for out, dim in zip(outputs, dims, strict=True))
        misfit = not fits or not rule.reads(layer, args, kwargs)
        rng = self._drawn.pop(layer, None)
        run = Run(layer, detached(args), detached(kwargs), [None] * len(outputs), dims, misfit, rng)
        self._current.runs.append(run)
        if self._tracer is not None:
            self._tracer.ends(layer)
        self._tap(self._current, outputs, run.cotangents)

    def _tap(self, into: Pass, tensors: Sequence[Tensor], cotangents: list[Tensor | None]) -> None:
        ear = PassEar(self.inbox, into)
        for i, tensor in enumerate(tensors):
            if not tensor.requires_grad:
                continue
            tensor.register_hook(TensorTap(ear, cotangents, i))
            if self.inbox.keeping:
                into.edges.append((cotangents, i, get_gradient_edge(tensor)))

    def _criterion(self, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if given is None or self.inbox.muted or self._paused:
            return
        for recorded in self.inbox.begun():
            for i, leaf in enumerate(recorded.leaves):
                if leaf.is_all_of(given):
                    recorded.criterion = detached(args), detached(kwargs), i
                    return


def _has_columns(layer: nn.Module) -> bool:
    rule = rule_for(layer)
    return rule.name != "generic" and rule.refuses(layer) is None


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
