"""``DDPNOpt``: parameter groups, life time, the step's order of events. No mathematics lives here."""

import copy
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from .accord import Accord, ScalerError
from .clipping import Clips
from .compiled import drop_old_code, plain
from .coupling import Coupling, default_numbers, is_joint
from .curvature import Curvature, Kronecker
from .dense import Dense
from .errors import NonFiniteError, StepError
from .evaluation import Evaluated, check_evaluated, evaluate
from .layers import mixes_samples
from .network import Network, is_chain, read_network
from .options import (
    OnNonfinite,
    check_chain,
    check_group,
    check_limit,
    check_numbers,
    check_options,
    check_several,
    check_sharded,
    check_stages,
    named,
)
from .persistence import loading, saving, with_numbers
from .ranks import Ranks, Traffic, find_ranks
from .report import Report, describe
from .scaling import found_scale, told_scale
from .sharded import Shards, gathered
from .stage_cost import any_known, is_due
from .steps import closed_loop, open_loop, settle
from .task import PEAK_LR, Outcome, Task, peak
from .terminal import Gradient, Terminal
from .trajectory import Recorder
from .transaction import Transaction
from .units import Units, found_units, is_open, loaded_units, output_sums, saved_units, settled
from .wrapped import unwrapped


class DDPNOpt(torch.optim.Optimizer):
    r"""Differential dynamic programming as an optimizer: every layer's update is a feedback policy.

    A backward pass over layers solves the Bellman equation of a quadratic model of the batch's loss; a second
    forward pass, run inside :meth:`step`, applies each layer's policy ``du = k + K dx`` to the deviation ``dx`` that
    the layers before it have caused (Liu, Chen and Theodorou, ICLR 2021, arXiv 2002.08809). With
    ``coupling="batch"`` the one control that all samples share is solved for jointly and exactly, which bounds the
    step at every learning rate.

    Args:
        model_or_params: the module to train (all its parameters that require a gradient, one group), bare, in a
            ``DistributedDataParallel`` or sharded by ``fully_shard``; or parameters or groups as for any
            ``torch.optim.Optimizer``: parameters without their module get the curvature's step alone.
        lr: step size ``eta`` of ``R = M (1 / eta + memory / batch) + ...``: in the batch form ``Kronecker`` and
            ``EigenKronecker`` have a ``memory`` of 1,280 samples, which bounds the step at small batches and at large
            learning rates; below the largest one that a group has had, the whole of ``M`` is scaled. Default 0.1.
        curvature: ``Kronecker()`` (default), ``EigenKronecker()``, ``Adaptive()`` or ``Identity()``.
        terminal: ``Gradient()`` (default), or ``Matched``, ``Exact``, ``Sampled`` with the loss module.
        coupling: ``"batch"`` (default), the joint problem of all samples, exact; ``"sample"``, the paper's
            Algorithm 3: every sample's own policy, averaged; ``Dense(...)``, that with full per-sample matrices,
            for a small ``nn.Sequential``; ``Batch(relinearise=True)``, the joint problem solved again, stage by
            stage, at the state that the second forward pass meets.
        feedback: ``False`` sets ``Q_ux = 0`` in both passes: no layer sees another. With ``coupling="sample"`` this is
            SGD, RMSprop or EKFAC, by the curvature. It is also off
            while a BatchNorm takes its statistics from the batch, which :meth:`report` says.
        momentum: weight of the last update, as a drift the policy takes into account; as ``lr`` falls the drift falls
            with it, as ``lr`` rises it does not grow. Default: 0.5 in the batch form, 0 in the others, which coincide
            with published optimizers.
        weight_decay: ``gamma`` of the stage cost ``gamma / 2 |u|^2`` per layer, or, decoupled, what it is in
            ``torch.optim.AdamW``. Default: 0.01 in the batch form, 0 in the others.
        decoupled_weight_decay: ``True``: no cost, but each step leaves ``1 / (1 + lr * weight_decay)`` of the weights,
            and the policy moves these. In the batch form, whose steps are bounded as ``lr`` grows, a group whose
            largest ``lr`` is above 0.1 counts it as 0.1 here. ``False``: the stage cost. Default: ``True`` in the batch
            form, ``False`` in the others.
        max_change: in the batch form, largest change of a layer's weights in one step, relative to their Frobenius norm
            or to that of freshly drawn ones (:mod:`ddpnopt.limits`); the layers behind one that is held answer to it. A
            group may have its own; ``math.inf`` is no limit. Default: 0.3 in the batch form, none in the others.
        stages: modules, or their names, whose input is to be taken for the whole state (residual blocks, say): the
            layers inside one move together. Default: every layer is a stage, and its state, all that lives at its
            cut, is found in autograd's graph.
        on_nonfinite: what to do with a step whose loss, gradients, curvature or new weights are not all finite; it
            changes neither weights nor state. ``"raise"`` (default): :class:`StepError` naming the layer;
            ``"skip"``: leave it out and count it in :meth:`diagnostics`. What the forward pass itself has changed
            (running statistics, random generators) stays, as after any forward pass.
        process_group: of ``torch.distributed``, whose ranks share the batch: the step is that of all their samples
            (``docs/distributed.md``). Default: the wrapper's or the shards', else the default group where there is
            one, as for a copy or an unpickled optimizer, since groups are neither copied nor pickled.

    Raises:
        ValueError: if a number is out of range, ``coupling`` or ``on_nonfinite`` is unknown, ``coupling`` is
            ``Dense`` on a model that is no chain, ``stages`` names no module or does not go with ``coupling``, or a
            parameter is complex or sharded in a way that does not go.
        TypeError: if ``curvature`` or ``terminal`` is not one, or ``feedback`` is not a bool.

    Example:
        >>> import torch
        >>> from ddpnopt import DDPNOpt
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> criterion = torch.nn.CrossEntropyLoss()
        >>> optimizer = DDPNOpt(model, lr=0.1)
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     loss = criterion(model(x), y)
        ...     loss.backward()
        ...     optimizer.step()
        >>> bool(criterion(model(x), y) < loss)
        True
    """

    _step_supports_amp_scaling = True  # a GradScaler then tells its scale, which the columns carry

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        lr: float = 0.1,
        *,
        curvature: Curvature | None = None,
        terminal: Terminal | None = None,
        coupling: Coupling = "batch",
        feedback: bool = True,
        momentum: float | None = None,
        weight_decay: float | None = None,
        decoupled_weight_decay: bool | None = None,
        max_change: float | None = None,
        stages: Sequence[str | nn.Module] | None = None,
        on_nonfinite: OnNonfinite = "raise",
        process_group: Any = None,
    ):
        self.curvature = Kronecker() if curvature is None else curvature
        self.terminal = Gradient() if terminal is None else terminal
        self.coupling, self.feedback, self.stages, self.on_nonfinite = coupling, feedback, stages, on_nonfinite
        check_options(self.curvature, self.terminal, coupling, feedback, on_nonfinite)
        check_stages(coupling, stages)
        decay = {"weight_decay": weight_decay, "decoupled_weight_decay": decoupled_weight_decay}
        given = {"momentum": momentum, **decay, "max_change": max_change}
        said = {name: value for name, value in given.items() if value is not None}
        defaults = {"lr": lr, **default_numbers(coupling), **said, PEAK_LR: 0.0}
        check_numbers(defaults)
        check_limit(defaults, coupling)
        wrapper: Any = None
        if isinstance(model_or_params, nn.Module):
            drop_old_code(model_or_params)
            inner, wrapper = unwrapped(plain(model_or_params))
            model_or_params = plain(inner)
        self.model = model_or_params if isinstance(model_or_params, nn.Module) else None
        self._group = wrapper.process_group if process_group is None and wrapper is not None else process_group
        self._shards = Shards(self.model, every=self._is_base)
        self._group = self._shards.group(self._group)
        if self._shards:
            check_sharded(base=self._is_base, columns=self.curvature.needs_columns)
        if isinstance(coupling, Dense):
            check_chain(model_or_params)
        params = model_or_params.parameters() if isinstance(model_or_params, nn.Module) else model_or_params
        super().__init__(params, defaults)
        self._steps = self._seen = 0
        self._refused: dict[str, str] = {}
        self._failures = 0
        self._skipped = 0
        self._clips = Clips()
        self._units: Units | None = None
        self._last: Outcome | None = None
        self._closed = False
        self.traffic = Traffic()  # what this rank has sent
        self._connect()
        if wrapper is not None and self._recorder is not None:
            self._recorder.inside(wrapper)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; its numbers are checked as at construction."""
        numbers = {**self.defaults, **param_group}
        check_numbers(numbers)
        check_limit(numbers, self.coupling)
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], self.model, self._shards)
        except ValueError:
            self.param_groups.pop()
            raise

    def close(self) -> None:
        """Take every hook off the model; the optimizer cannot step its layers afterwards."""
        for listener in (self._recorder, self._clips):
            listener.close() if listener is not None else None
        self._closed = True

    def report(self) -> Report:
        """Which layer is read by which rule, why, and at what cost, before any training; prints as a table."""
        self._refresh_network()
        self._shards.reshard()
        owned = self.model.named_parameters() if self.model is not None else ()
        frozen = {name: p for name, p in owned if p not in self._group_of}
        names = {parameter: name for name, parameter in self._names.items()}
        mixing = [n for n, m in self.model.named_modules() if mixes_samples(m)] if self.model is not None else []
        on = f"off while {mixing[0]} takes its statistics from the batch" if mixing else "on"
        feedback = on if self.feedback else "off"
        reads, form = self._reads_columns, str(self.coupling)
        return describe(self._network, self.curvature, form, names, frozen, feedback=feedback, columns=reads)

    def diagnostics(self) -> dict[str, Any]:
        """Figures of the last step.

        Returns:
            ``"layers"``: for each stage ``"k"``, the length of its open-loop update in the curvature's measure
            ``|du|_R``, ``"feedback"``, that of what ``K dx`` added, and ``"predicted_decrease"``; the sum of these,
            ``"predicted_decrease"`` of the batch's loss, open loop; ``"actual_decrease"``, ``None`` unless the terminal
            has a criterion; where the step settled them, else ``None``: ``"cap"``, the decrease of its own loss asked
            of every sample, and ``"outputs"``, over how many outputs that loss was taken to be a mean;
            ``"factorisation_failures"``, how often a factorisation had to be tried
            again since the start; ``"skipped_steps"``, how many steps were left out since the start because something
            was not finite, by ``on_nonfinite="skip"`` or by a GradScaler. Before the first step, and after loading, the
            last of these alone.
        """
        if self._last is None:
            return {"skipped_steps": self._skipped}
        layers = {name: figures() for name, figures in self._last.figures.items()}
        actual, units = self._last.actual_decrease, self._last.units
        return {
            "layers": layers,
            "predicted_decrease": sum(figures["predicted_decrease"] for figures in layers.values()),
            "actual_decrease": None if actual is None else float(actual),
            "cap": None if units is None else units.cap,
            "outputs": None if units is None else units.outputs,
            "factorisation_failures": sum(s.get("failures", 0) for s in self.state.values()) + self._failures,
            "skipped_steps": self._skipped,
        }

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and the recorded passes that a backward pass has already gone through."""
        super().zero_grad(set_to_none)
        self._forget()

    def _forget(self) -> None:
        for listener in (self._recorder, self._clips):
            listener.forget() if listener is not None else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that got a gradient; runs the model a second time unless ``feedback`` is off.

        Args:
            closure: optional; computes the loss, is called once with gradients enabled, and either calls
                ``backward`` itself (torch's convention) or only returns the loss (cheapest: no parameter gradients
                are formed). Without it, the step follows ``loss.backward()``.

        Returns:
            what the closure returned, or ``None``.

        Raises:
            StepError: (a ``ValueError`` and a ``RuntimeError``) if there was no backward pass, the batch is empty
                or was changed since, or anything is not finite (see ``on_nonfinite``). Weights and state are then
                as before the call, as they are after any other exception.
        """
        if self._closed:
            raise StepError("this optimizer was closed; make a new one to go on training")
        for group in self.param_groups:
            check_numbers(group)
        self._refresh_network()
        try:
            return self._step(closure)
        except BaseException:
            # a scaler takes its marks back after a step that returns, and only then
            self.__dict__.pop("found_inf", None)
            self.__dict__.pop("grad_scale", None)
            raise
        finally:
            self._forget()

    @property
    def _is_base(self) -> bool:
        """Whether this is the optimizer that is adapted, and no more: SGD, RMSprop or EKFAC."""
        return not is_joint(self.coupling) and not self.feedback

    @property
    def _reads_columns(self) -> bool:
        return not self._is_base or self.curvature.needs_columns

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        accord, loss = Accord(self._find_ranks()), None
        try:
            with accord.together():
                if accord.several:
                    check_several(accord.ranks.size, self.coupling)
                if bool(getattr(self, "found_inf", False)):  # a GradScaler's word
                    raise ScalerError("the GradScaler has found a gradient that is not finite")
                scale = told_scale(self, closure, sharded=bool(self._shards))
                found = self._evaluate(closure)
                loss = found.loss
                outcome = self._solve(found, scale, accord)
        except ScalerError:
            self._skipped += 1
        except NonFiniteError:
            if self.on_nonfinite == "raise":
                raise
            self._skipped += 1
        else:
            self._commit(outcome)
        return loss

    def _evaluate(self, closure: Callable[[], Any] | None) -> Evaluated:
        needs_graph = self.terminal.needs_loss and not self._is_base
        every = self._is_base or self._looks or any_known(self.state)
        return evaluate(
            closure, self._recorder, self._network, list(self._group_of),
            every=every, keep_graph=needs_graph, heard=self._clips.heard,
        )  # fmt: skip

    def _solve(self, found: Evaluated, scale: float | None, accord: Accord) -> Outcome:
        """Move the weights, or raise and leave them."""
        network = self._network if self._recorder is not None else None
        gradients = found.unscaled(1.0 if scale is None else scale)
        factor = 1.0 if scale is None or self._is_base else self._clips.factor()
        if scale is None:  # with the factor of a clip that has followed
            scale = self._clips.scale() if self._reads_columns else 1.0
        # on several ranks .grad is of a rank's own samples, whose length is not that of the batch's gradient
        clip = 1.0 if factor is None or accord.several else factor
        shorter = self._clips.shortening(clip)
        if factor and shorter != factor and not self._is_base:
            gradients = {p: gradient * (shorter / factor) for p, gradient in gradients.items()}
        with Transaction(self._names, self.model, found.passes, gradients, self._room, self._shards) as transaction:
            empty = accord.several and self._recorder is not None and found.empty(self._recorder)
            check_evaluated(found, network, empty=empty)
            passes = [p for p in found.passes if p.batch or not accord.several]
            accord.count(sum(p.batch for p in passes))
            with self._shards.whole():
                states: Mapping[torch.Tensor, Any] = self.state
                if self._shards:
                    states = {p: gathered(state, accord.ranks) for p, state in states.items()}
                task = Task(
                    self._network, self.param_groups, self._group_of, states, self.curvature, self.terminal,
                    self.coupling, self.feedback, self._recorder, passes, {} if empty else gradients, found.graph,
                    scale or 1.0, shorter, self._steps, self._seen, accord,
                    looks=self._looks or factor is None or found.derived, edited=factor is None, derived=found.derived,
                )  # fmt: skip
                if scale is None and passes and self._recorder is not None:
                    task = replace(task, loss_scale=found_scale(task))
                units = self._found_units(task) if self._leaves_open else None
                if units is not None:
                    task = replace(task, terminal=settled(self.terminal, units.cap), units=units)
                outcome = open_loop(task) if self._is_base else closed_loop(task)
                transaction.check(outcome.states, states)
                settle(task, outcome)
                self._shards.keep()
        outcome.clip, outcome.units, outcome.samples = clip, units, sum(accord.counts)
        return outcome

    @property
    def _leaves_open(self) -> bool:
        """Whether steps settle what they ask of a sample: the published forms ask for 1."""
        return is_joint(self.coupling) and is_open(self.terminal) and self.model is not None

    @property
    def _looks(self) -> bool:
        """Whether this step compares all gradients with the columns; sharded ones are of all ranks' samples."""
        return not (self._is_base or self._shards) and is_due(self._steps)

    def _found_units(self, task: Task) -> Units:
        sums = task.accord.total(output_sums(task.passes, self.terminal.reduction, task.loss_scale))
        return found_units(sums, sum(task.accord.counts), self._units)

    def _find_ranks(self) -> Ranks:
        """With whom to share the step; the adapted optimizer that needs no columns reads ``.grad``, as torch's do."""
        if self.model is None or not self._reads_columns or not self._group_of:
            return Ranks()
        found = find_ranks(self._group, next(iter(self._group_of)).device)
        found.traffic = self.traffic
        return found

    def _commit(self, outcome: Outcome) -> None:
        """Keep what a step leaves; its weights have moved already."""
        sizes = {block.parameters[0]: len(block.parameters) for block in self._network.blocks()}
        for parameter, state in outcome.states.items():
            own = {**state, "parameters": sizes[parameter]}
            self.state[parameter] = self._shards.cut(own)
        for group in self.param_groups if is_joint(self.coupling) else ():
            group[PEAK_LR] = peak(group)
        self._steps += 1
        self._seen += outcome.samples
        self._clips.settle(outcome.clip)
        self._units = outcome.units
        self._failures += outcome.failures
        self._last = outcome
        self._refused |= outcome.refused
        kinds = {layer.name: type(layer.module).__name__ for layer in self._network.layers}
        for name, reason in outcome.refused.items():
            warnings.warn(f"{name or 'the model'}, {kinds.get(name, 'Parameter')}: {reason}", stacklevel=4)

    def _connect(self) -> None:
        """Hook the model's layers and stages, whether or not they are trained at present."""
        self._signature: tuple[Any, ...] = ()
        self._recorder: Recorder | None = None
        self._refresh_network()
        if self.model is not None:
            layers = [m for m in self.model.modules() if any(p is not None for p in m._parameters.values())]
            stages = dict.fromkeys(chain(layers, (stage.module for stage in self._network.stages)))
            # the dense form starts from the gradient at the model's output
            outputs = [self.model] if isinstance(self.coupling, Dense) else []
            whole = self.stages is None and self.feedback and not outputs and not is_chain(self.model)
            self._recorder = Recorder(
                self.model, [*layers, *outputs], stages, self.terminal.criterion,
                whole_state=whole, values=self._leaves_open, local_gradients=self._reads_columns, shards=self._shards,
            )  # fmt: skip
            weakref.finalize(self, self._recorder.close)

    def _refresh_network(self) -> None:
        """Read the network again after parameters were frozen, thawed or regrouped, or a rule has failed."""
        groups = tuple(tuple((id(p), p.requires_grad) for p in group["params"]) for group in self.param_groups)
        if (signature := (groups, *self._refused)) == self._signature:
            return
        self._signature = signature
        self._shards.reshard()
        self._group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"] if p.requires_grad}
        self._network: Network = read_network(self.model, self._group_of, self.stages, self._refused, self._shards.held)
        self._names = named(self._group_of, self.param_groups, self.model)
        self._room: list[torch.Tensor] = []
        if self.model is not None and self._reads_columns and not self._shards:
            self._clips.watch(self._group_of)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers: loads with ``torch.load(..., weights_only=True)`` and resumes bit for bit."""
        own: dict[str, Any] = {"steps": self._steps, "samples": self._seen, "skipped_steps": self._skipped}
        own |= {"refused": dict(self._refused), "usual_clip": self._clips.usual}
        own |= saved_units(self._units)
        with saving(self, {**own, "curvature": type(self.curvature).__name__}):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; curvature keeps the precision it was saved with.

        Raises:
            ValueError: if the groups, their parameters or the shapes of the saved tensors do not match, or the state
                is of another curvature. Nothing is changed then.
        """
        self._refresh_network()
        state_dict = with_numbers(state_dict)
        names = {parameter: name for name, parameter in self._names.items()}
        blocks = {names[block.parameters[0]]: block for block in self._network.blocks()}
        mesh = self._shards.mesh if self._shards else None
        with loading(self, type(self.curvature).__name__, blocks, mesh) as loaded:
            super().load_state_dict(state_dict)
        self._steps, self._seen = loaded.get("steps", 0), loaded.get("samples", 0)
        self._skipped = loaded.get("skipped_steps", 0)
        self._clips.usual = loaded.get("usual_clip", 1.0)
        self._units = loaded_units(loaded)
        self._refused = dict(loaded.get("refused", {}))

    def __getstate__(self) -> dict[str, Any]:
        options = ["model", "curvature", "terminal", "coupling", "feedback", "stages", "on_nonfinite"]
        kept = [*options, "_steps", "_seen", "_failures", "_skipped", "_refused", "_clips", "_units", "_closed"]
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # saved before there were such entries
            group.setdefault("decoupled_weight_decay", False)
            group.setdefault(PEAK_LR, 0.0)
            group.setdefault("max_change", math.inf)
        if "model" in state:  # a copy or an unpickled optimizer; load_state_dict passes state and groups alone
            self._last = None
            # older ones have none of these
            cap = self.__dict__.pop("_cap", None)
            self.__dict__.setdefault("_units", None if cap is None else Units(cap))
            self.__dict__.setdefault("_seen", 0)
            self._clips = copy.copy(self.__dict__.get("_clips", Clips()))
            self._clips.usual = self.__dict__.pop("_usual_clip", self._clips.usual)
            self._group, self.traffic, self._shards = None, Traffic(), Shards(self.model, every=self._is_base)
            self._connect()
