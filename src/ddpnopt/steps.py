"""The two kinds of step, as functions of everything one step needs.

The open loop of the sample form is the adapted optimizer itself, in torch's order of operations. Every other form
is closed: columns, backward pass over stages, second forward pass.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .bellman import BlockPolicy, BlockTerms, StagePolicy, backward_pass, size
from .columns import Columns, DenseColumns
from .coupling import Coupling, is_joint, relinearises
from .curvature.base import State
from .dense import Dense, sweep
from .joined import joined
from .layers import Block
from .linearise import Linearised
from .network import Network, Stage, matrix_of
from .passes import floating
from .reading import blocks_by_stage, later_by_stage, name_the_silent, read_layer, read_tied
from .relinearise import met
from .rollout import forward_pass, restore_overwritten
from .task import VELOCITY, Outcome, Task, wide
from .terminal import Gradient
from .value import BatchPolicy, BatchValue, SampleValue


def open_loop(task: Task) -> Outcome:
    """``Q_ux = 0`` in the sample form: SGD, RMSprop, K-FAC or EKFAC, on the gradients autograd gave."""
    outcome = Outcome()
    columns: dict[nn.Parameter, Columns] = {}
    if task.curvature.needs_columns and task.passes and task.recorder is not None:
        linearised, _ = task.linearised(Gradient(task.terminal.reduction))
        for layer in task.network.layers:
            columns |= {block.parameters[0]: c for block, c in read_layer(task, layer, linearised, outcome)}
        for tied in task.network.tied:
            columns |= {block.parameters[0]: c for block, c in read_tied(task, tied, linearised, outcome)}
        read = {
            p for layer in task.network.layers for b in layer.blocks if b.parameters[0] in columns for p in b.parameters
        }
        name_the_silent(task, read, outcome)
    for block in task.blocks():
        gradient = task.gradient(block)
        if gradient is None:
            continue
        lr, decay, momentum = task.settings(block)
        state, velocity = task.own_state(block)
        control = wide(matrix_of(block, block.parameters).clone())
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
            blocks = blocks_by_stage(task, linearised, outcome)
            value = _value(task.coupling, end.a, end.curved, end.weight)
            terms = [[_terms(task, block, columns) for block, columns in blocks[stage]] for stage in blocks]
            swept = backward_pass(terms, value, task.curvature, end.curved, feedback=task.coupled())
            policies = dict(zip(blocks, swept, strict=True))
    whole = joined(linearised) if len(policies) > 1 and task.coupled() else None
    later = later_by_stage(task, linearised, blocks) if whole is not None else {}
    read = {p for pairs in blocks.values() for block, _ in pairs for p in block.parameters}
    name_the_silent(task, read, outcome)
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


def _terms(task: Task, block: Block, columns: Columns) -> BlockTerms:
    state, velocity = task.own_state(block)
    lr, decay, momentum = task.settings(block)
    control = wide(matrix_of(block, block.parameters)) if decay else None
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
