"""The two kinds of step, as functions of everything one step needs.

The open loop of the sample form is the adapted optimizer itself, in torch's order of operations. Every other form
is closed: columns, backward pass over stages, second forward pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .bellman import BlockPolicy, BlockTerms, StagePolicy, backward_pass, size
from .columns import Columns, DenseColumns, over_uses
from .coupling import Coupling, is_joint, relinearises
from .curvature import Curvature
from .curvature.base import State
from .dense import Dense, sweep
from .joined import joined
from .layers import Block, mixes_samples
from .linearise import Linearised, TerminalValue, columns_of, linearise
from .network import Layer, Network, Stage, Tied, matrix_of
from .passes import Pass, floating
from .relinearise import met
from .rollout import Later, forward_pass, later_columns, restore_overwritten
from .terminal import Gradient, Terminal
from .trajectory import Recorder
from .value import BatchPolicy, BatchValue, SampleValue

VELOCITY = "velocity"
STRAY = (
    "a parameter of it is used outside its own runs: one update from the whole batch's gradient. For columns of its "
    "own, use the parameter by calling the module"
)
SILENT = (
    "it was not seen to run on the batch: one update from the whole batch's gradient. For columns of its own, let the "
    "model call the module itself on a tensor that leads with the batch, and use no functional form of it"
)


@dataclass(frozen=True)
class Task:
    """What one step works on.

    Args:
        network: layers, stages and loose parameters.
        groups, group_of: the optimizer's parameter groups, and each parameter's index among them.
        state: of the optimizer, by a block's first parameter; not written into.
        curvature, terminal, coupling, feedback: the optimizer's options.
        recorder: ``None`` for bare parameters.
        passes: recorded forward passes with their cotangents.
        gradients: of the batch's loss, for the parameters that have one.
        loss: with its graph, if the closure left it and the terminal wants it.
        loss_scale: what the loss had been multiplied by before its backward pass; ``gradients`` are without it.
        number: of the step, from 0.
    """

    network: Network
    groups: Sequence[Mapping[str, Any]]
    group_of: Mapping[nn.Parameter, int]
    state: Mapping[Tensor, State]
    curvature: Curvature
    terminal: Terminal
    coupling: Coupling
    feedback: bool
    recorder: Recorder | None
    passes: Sequence[Pass]
    gradients: Mapping[nn.Parameter, Tensor]
    loss: Tensor | None
    loss_scale: float
    number: int

    def linearised(self, terminal: Terminal) -> tuple[list[Linearised], TerminalValue]:
        """The passes with their columns, and the value at the output."""
        assert self.recorder is not None
        return linearise(self.passes, terminal, self.recorder, self.loss, self.number, self.loss_scale)

    def settings(self, block: Block) -> tuple[float, float, float]:
        """``lr``, ``weight_decay`` and ``momentum`` of a block's group."""
        group = self.groups[self.group_of[block.parameters[0]]]
        return float(group["lr"]), float(group["weight_decay"]), float(group["momentum"])

    def own_state(self, block: Block) -> tuple[State, Tensor | None]:
        """A block's curvature state, and its velocity."""
        state = dict(self.state.get(block.parameters[0], {}))
        if state.pop("parameters", len(block.parameters)) != len(block.parameters):
            return {}, None  # a bias was frozen, thawed or regrouped since: the block has another shape
        velocity = state.pop(VELOCITY, None)
        return state, velocity

    def gradient(self, block: Block) -> Tensor | None:
        """Gradient of the batch's loss as the block's matrix, at least in float32; ``None`` without one."""
        if any(p not in self.gradients for p in block.parameters):
            return None
        return _wide(matrix_of(block, [self.gradients[p] for p in block.parameters]))

    def coupled(self) -> bool:
        """Whether layers see one another: while samples are mixed, columns are not those of single samples."""
        return self.feedback and (self.recorder is None or not any(map(mixes_samples, self.recorder.model.modules())))

    def blocks(self) -> list[Block]:
        """All there are."""
        return self.network.blocks()


@dataclass
class Outcome:
    """What a step leaves: weights are moved already, everything else is here to be committed.

    Args:
        states: new state by a block's first parameter.
        figures: compute diagnostics by stage, if they are asked for.
        actual_decrease: of the loss on the same batch, where a criterion is known.
        failures: factorisations of the value's curvature that had to be tried again.
        refused: layers whose rule failed or that were not seen to run, with the reason.
    """

    states: dict[nn.Parameter, State] = field(default_factory=dict)
    figures: dict[str, Callable[[], dict[str, float]]] = field(default_factory=dict)
    actual_decrease: Tensor | None = None
    failures: int = 0
    refused: dict[str, str] = field(default_factory=dict)


def open_loop(task: Task) -> Outcome:
    """``Q_ux = 0`` in the sample form: SGD, RMSprop, K-FAC or EKFAC, on the gradients autograd gave."""
    outcome = Outcome()
    columns: dict[nn.Parameter, Columns] = {}
    if task.curvature.needs_columns and task.passes and task.recorder is not None:
        linearised, _ = task.linearised(Gradient(task.terminal.reduction))
        for layer in task.network.layers:
            columns |= {block.parameters[0]: c for block, c in _read(task, layer, linearised, outcome)}
        for tied in task.network.tied:
            columns |= {block.parameters[0]: c for block, c in _read_tied(task, tied, linearised, outcome)}
        read = {
            p for layer in task.network.layers for b in layer.blocks if b.parameters[0] in columns for p in b.parameters
        }
        _name_the_silent(task, read, outcome)
    for block in task.blocks():
        gradient = task.gradient(block)
        if gradient is None:
            continue
        lr, decay, momentum = task.settings(block)
        state, velocity = task.own_state(block)
        control = _wide(matrix_of(block, block.parameters).clone())
        if decay:
            gradient = gradient.add(control, alpha=decay)
        own = columns.get(block.parameters[0])
        curvature = task.curvature if own is not None else task.curvature.without_factors()
        ridge = curvature.ridge(lr, decay, batch=False)
        q_u = gradient
        state = curvature.advance(state, own, lambda q_u=q_u: q_u, ridge)  # type: ignore[misc]
        inverse = curvature.inverse(state, ridge)
        if momentum:
            velocity = torch.zeros_like(gradient) if velocity is None else velocity * momentum
            state = {**state, VELOCITY: inverse.accumulate_(velocity, gradient, 1.0)}
            control.add_(velocity, alpha=-lr)
        else:
            inverse.accumulate_(control, gradient, -lr)
        _write(block, control)
        outcome.states[block.parameters[0]] = state
    return outcome


def closed_loop(task: Task) -> Outcome:
    """Loose parameters first, then the backward and the forward pass over stages."""
    outcome = Outcome()
    linearised: list[Linearised] = []
    policies: dict[Stage, StagePolicy] = {}
    blocks: dict[Stage, list[tuple[Block, Columns]]] = {}
    if task.passes and task.recorder is not None:
        linearised, end = task.linearised(task.terminal)
        for one in linearised:
            restore_overwritten(one.recorded, task.recorder)
        if isinstance(task.coupling, Dense):
            with task.recorder.paused():
                one, blocks, policies = sweep(
                    task.coupling, task.network, linearised, end, task.curvature,
                    model=task.recorder.model, terms_of=partial(_terms, task),
                )  # fmt: skip
            linearised = [one]
        else:
            blocks = _blocks_by_stage(task, linearised, outcome)
            value = _value(task.coupling, end.a, end.curved, end.weight)
            terms = [[_terms(task, block, columns) for block, columns in blocks[stage]] for stage in blocks]
            swept = backward_pass(terms, value, task.curvature, end.curved, feedback=task.coupled())
            policies = dict(zip(blocks, swept, strict=True))
    whole = joined(linearised) if len(policies) > 1 and task.coupled() else None
    later = _later(task, linearised, blocks) if whole is not None else {}
    read = {p for pairs in blocks.values() for block, _ in pairs for p in block.parameters}
    _name_the_silent(task, read, outcome)
    for block in task.blocks():
        if read.isdisjoint(block.parameters) and (gradient := task.gradient(block)) is not None:
            _move_alone(task, block, gradient, outcome)

    again: list[StagePolicy] = []

    def apply(stage: Stage, policy: StagePolicy, weights: Tensor) -> None:
        for (block, _), part in zip(blocks[stage], policy.blocks, strict=True):
            velocity = _move(block, part, weights)
            outcome.states[block.parameters[0]] = _with_velocity(part.state, velocity)
        k_weights, predicted = policy.policy.k_weights, policies[stage].policy.predicted
        outcome.figures[stage.name] = partial(_figures, policy.gram, k_weights, weights, predicted)
        if policy is not policies[stage]:
            again.append(policy)

    def meet(stage: Stage, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> StagePolicy:
        assert task.recorder is not None
        layer, own = task.network.layers[stage.layers[0]], [block for block, _ in blocks[stage]]
        return met(task.recorder, linearised, layer, own, policies[stage], args, kwargs)

    if task.recorder is not None:
        if not relinearises(task.coupling):
            _let_go(task.network, linearised)
        moving = {stage: [block for block, _ in blocks[stage]] for stage in policies}
        at_state = meet if relinearises(task.coupling) else None
        output = forward_pass(task.recorder, whole, moving, policies, apply, later, at_state)
        outcome.actual_decrease = _actual_decrease(task, whole, output)
    failed = [p.policy.failures for p in (*policies.values(), *again) if isinstance(p.policy, BatchPolicy)]
    outcome.failures = sum(failed)
    return outcome


def _let_go(network: Network, linearised: Sequence[Linearised]) -> None:
    """Drop gradients at outputs that have been read for the last time; those of dense layers are in their columns."""
    kept = {layer.module for layer in network.layers if layer.rule.name == "linear"}
    for one in linearised:
        for run in one.recorded.runs:
            if run.layer not in kept:
                run.cotangents[:] = [None] * len(run.cotangents)


def _value(coupling: Coupling, a: Tensor, curved: int, weight: float) -> BatchValue | SampleValue:
    kind = BatchValue if is_joint(coupling) else SampleValue
    return kind.terminal(a, curved, weight)


def _blocks_by_stage(
    task: Task, linearised: Sequence[Linearised], outcome: Outcome
) -> dict[Stage, list[tuple[Block, Columns]]]:
    """Blocks with their columns, by stage, in the order the stages ran."""
    stage_of = {stage.module: stage for stage in task.network.stages}
    visited = list(dict.fromkeys(module for one in linearised for module in one.recorded.visits))
    ran = [stage_of[module] for module in visited if module in stage_of]
    tied_at: dict[nn.Module, list[Tied]] = {}  # a tied parameter moves with the first of its owners
    for tied in task.network.tied:
        owners = {owner.module for owner in tied.owners}
        for first in [module for module in visited if module in owners][:1]:
            tied_at.setdefault(first, []).append(tied)
    found = {}
    for stage in ran:
        pairs = []
        for layer in (task.network.layers[index] for index in stage.layers):
            pairs += _read(task, layer, linearised, outcome)
            for tied in tied_at.get(layer.module, ()):
                pairs += _read_tied(task, tied, linearised, outcome)
        if pairs:
            found[stage] = pairs
    return found


def _read(task: Task, layer: Layer, linearised: Sequence[Linearised], outcome: Outcome) -> list[tuple[Block, Columns]]:
    """The layer's blocks with their columns; none if no gradient reached it or its rule fails."""
    assert task.recorder is not None
    with task.recorder.paused():
        if layer.rule.name != "generic":
            return list(zip(layer.blocks, columns_of(layer, linearised) or (), strict=False))
        try:
            pairs = list(zip(layer.blocks, columns_of(layer, linearised) or (), strict=False))
        except Exception as error:  # vmap refuses modules in ways of its own, none of them the user's fault
            said = str(error).partition("\n")[0].partition(". ")[0]
            outcome.refused[layer.name] = (
                f"the generic rule failed ({said}): one update from the whole batch's gradient"
            )
            return []
    # a module need not use every parameter it has; one that got no gradient stays, as in torch
    return [(block, columns) for block, columns in pairs if all(p in task.gradients for p in block.parameters)]


def _read_tied(
    task: Task, tied: Tied, linearised: Sequence[Linearised], outcome: Outcome
) -> list[tuple[Block, Columns]]:
    """The same of a parameter of several layers: all their columns, or none."""
    modules = {owner.module for owner in tied.owners}
    runs = [run for one in linearised for run in one.recorded.runs if run.layer in modules]
    if any(run.misfit or run.stray for run in runs):
        return []
    uses = [columns for owner in tied.owners for _, columns in _read(task, owner, linearised, outcome)]
    if not uses or any(owner.name in outcome.refused for owner in tied.owners):
        return []
    return [(tied.block, over_uses(uses))]


def _later(
    task: Task, linearised: Sequence[Linearised], blocks: Mapping[Stage, Sequence[tuple[Block, Columns]]]
) -> dict[Stage, Later]:
    """What is still to run of layers after they have moved; read at the nominal weights, before any moves."""
    assert task.recorder is not None
    found: dict[Stage, Later] = {}
    with task.recorder.paused():
        for stage, pairs in blocks.items():
            if linearised[0].recorded.state is None:
                continue
            moving = {block for block, _ in pairs}
            layers = [task.network.layers[index] for index in stage.layers]
            owners = [owner for tied in task.network.tied if tied.block in moving for owner in tied.owners]
            moving |= {block for owner in owners for block in owner.blocks}
            of_stage: dict[nn.Module, list[tuple[Block, Columns]]] = {}
            for layer in (*layers, *owners):
                for later, own in later_columns(layer, linearised, moving).items():
                    of_stage.setdefault(later, []).extend(own)
            found[stage] = of_stage
    return found


def _name_the_silent(task: Task, read: set[nn.Parameter], outcome: Outcome) -> None:
    """Refuse layers that have a gradient but no columns: they were used other than by a call on the batch."""
    for layer in task.network.layers:
        parameters = [p for block in layer.blocks for p in block.parameters if p in task.gradients]
        if layer.name in outcome.refused or not parameters or not read.isdisjoint(parameters):
            continue
        stray = any(run.layer is layer.module and run.stray for one in task.passes for run in one.runs)
        outcome.refused[layer.name] = STRAY if stray else SILENT


def _terms(task: Task, block: Block, columns: Columns) -> BlockTerms:
    state, velocity = task.own_state(block)
    lr, decay, momentum = task.settings(block)
    control = _wide(matrix_of(block, block.parameters)) if decay else None
    return BlockTerms(columns, control, velocity, lr, decay, momentum, state)


def _move_alone(task: Task, block: Block, gradient: Tensor, outcome: Outcome) -> None:
    """A chain of one layer and one sample, whose only column is the whole batch's gradient."""
    one = torch.ones(1, 1, dtype=torch.float64, device=gradient.device)
    terms = _terms(task, block, DenseColumns(gradient[None, None]))
    value = _value(task.coupling, one, 1, 1.0)
    (policy,) = backward_pass([[terms]], value, task.curvature.without_factors(), 1, feedback=task.feedback)
    (part,) = policy.blocks
    velocity = _move(block, part, policy.policy.k_weights)
    outcome.states[block.parameters[0]] = _with_velocity(part.state, velocity)


def _actual_decrease(task: Task, whole: Linearised | None, output: Any) -> Tensor | None:
    criterion = task.terminal.criterion
    if whole is None or criterion is None or whole.recorded.criterion is None or task.recorder is None:
        return None
    args, kwargs, i = whole.recorded.criterion
    leaves = floating(output)
    if not args or len(leaves) != len(whole.recorded.leaves) or whole.recorded.leaves[i].shape != leaves[i].shape:
        return None
    before, *rest = args
    with torch.no_grad(), task.recorder.muted():
        now = criterion(whole.recorded.leaves[i].seen_as(before, leaves[i]), *rest, **kwargs)
        return torch.as_tensor(criterion(before, *rest, **kwargs) - now)


def _figures(gram: Tensor, k_weights: Tensor, weights: Tensor, predicted: Tensor) -> dict[str, float]:
    sizes = {"k": size(gram, k_weights), "feedback": size(gram, weights - k_weights)}
    return {name: float(value) for name, value in {**sizes, "predicted_decrease": predicted}.items()}


def _with_velocity(state: State, velocity: Tensor | None) -> State:
    return state if velocity is None else {**state, VELOCITY: velocity}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _move(block: Block, part: BlockPolicy, weights: Tensor) -> Tensor | None:
    sides = block.sides()
    if all(side.data_ptr() == p.data_ptr() for side, p in zip(sides, block.parameters, strict=True)):
        return part.move_(sides, weights)
    velocity = part.move_(sides, weights)
    _write(block, torch.cat(sides, 1))  # a parameter that is no view of its matrix, channels_last say
    return velocity


def _write(block: Block, matrix: Tensor) -> None:
    with torch.no_grad():
        for parameter, part in zip(block.parameters, block.split(matrix), strict=True):
            parameter.copy_(part)
