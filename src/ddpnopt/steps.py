"""The two kinds of step, as functions of everything one step needs.

The open loop of the sample form is the adapted optimizer itself, in torch's order of operations. Every other form
is closed: columns, backward pass over stages, second forward pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .bellman import BlockPolicy, BlockTerms, StagePolicy, backward_pass, size
from .columns import Columns, DenseColumns, SpreadColumns
from .coupling import Coupling, is_joint, is_local, relinearises, rounds
from .curvature.base import State
from .dense import OTHERWISE, Dense, sweep
from .errors import StepError
from .joined import joined
from .layers import Block
from .linearise import Linearised, TerminalValue
from .network import Stage, matrix_of
from .passes import wide
from .reading import blocks_by_stage, later_by_stage, let_go, name_the_silent, read_all, read_layer, read_tied
from .relinearise import met
from .rollout import forward_pass, restore_overwritten
from .sharing import Found, Shared, averaged, gathered_deviation, meet_at, of_this_rank, share
from .stage_cost import StageCosts, parted, rounding, stage_costs, with_curvature
from .task import VELOCITY, VELOCITY_LR, Outcome, Task
from .terminal import Gradient
from .trees import floating
from .value import BatchPolicy, BatchValue, Policy, SampleValue


def open_loop(task: Task) -> Outcome:
    """``Q_ux = 0`` in the sample form: SGD, RMSprop, K-FAC or EKFAC, on the gradients autograd gave."""
    outcome = Outcome()
    found: list[Found] = []
    if task.curvature.needs_columns and task.passes and task.recorder is not None:
        linearised, _ = task.linearised(Gradient(task.terminal.reduction))
        for layer in task.network.layers:
            found += [(0, *pair) for pair in read_layer(task, layer, linearised, outcome)]
        for tied in task.network.tied:
            found += [(0, *pair) for pair in read_tied(task, tied, linearised, outcome)]
        name_the_silent(task, {p for _, block, _ in found for p in block.parameters}, outcome)
    shared = share(
        task.accord, task.network, Shared(found, task.block_gradients(), None, False), task.terminal.reduction
    )
    columns = {block.parameters[0]: read for _, block, read in shared.found}
    for block, gradient in shared.alone.items():
        state, velocity, _ = task.own_state(block)
        settings = task.settings(block, state)
        lr, decay, momentum = settings.lr, settings.decay, settings.momentum
        control = wide(matrix_of(block, block.tensors).clone())
        if decay:
            gradient = gradient.add(control, alpha=decay)
        own = columns.get(block.parameters[0])
        curvature = task.curvature if own is not None else task.curvature.without_factors()
        ridge = curvature.ridge(lr, decay, batch=False)
        q_u = gradient
        state = curvature.advance(state, own, lambda q_u=q_u: q_u, ridge)  # type: ignore[misc]
        inverse = curvature.inverse(state, ridge)
        if settings.kept != 1.0:
            control.mul_(settings.kept)
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
    outcome, accord, stages = Outcome(), task.accord, task.network.stages
    local = accord.several and is_local(task.coupling)
    linearised: list[Linearised] = []
    policies: dict[Stage, StagePolicy] = {}
    blocks: dict[Stage, list[tuple[Block, Columns]]] = {}
    end: TerminalValue | None = None
    costs = StageCosts()
    coupled = task.coupled()
    if task.passes and task.recorder is not None:
        linearised, end = task.linearised(task.terminal)
        noise = rounding(task.passes) if task.looks else 0.0
        for one in linearised:
            restore_overwritten(one.recorded, task.recorder)
            if coupled:
                one.keep_products()
        if isinstance(task.coupling, Dense):
            if task.derived:
                raise StepError(f"Dense() cannot follow a loss made of the model's derivatives; {OTHERWISE}")
            costs = stage_costs(task, read_all(task, linearised), end, noise)
            with task.recorder.paused():
                one, blocks, policies = sweep(
                    task.coupling, task.network, linearised, end, task.curvature,
                    model=task.recorder.model, terms_of=partial(_terms, task, costs),
                )  # fmt: skip
            linearised = [one]
        else:
            blocks = blocks_by_stage(task, linearised, outcome)
            costs = stage_costs(task, chain.from_iterable(blocks.values()), end, noise)
    whole = joined(linearised) if len(blocks) > 1 and coupled else None
    later = later_by_stage(task, linearised, blocks) if whole is not None else {}
    read = {p for pairs in blocks.values() for block, _ in pairs for p in block.parameters}
    alone = task.block_gradients(read | name_the_silent(task, read, outcome))
    if not isinstance(task.coupling, Dense):
        found = [(stages.index(stage), *pair) for stage, pairs in blocks.items() for pair in pairs]
        own = Shared(found, alone, end, whole is not None, costs)
        rounded = rounds(task.coupling)
        shared = share(accord, task.network, own, task.terminal.reduction, local=local, rounded=rounded)
        blocks, alone, end, costs = _by_stage(stages, shared.found), shared.alone, shared.end, shared.costs
        whole = whole if shared.whole else None
        if end is not None:
            seen = end.weight * end.a if local else None
            end = of_this_rank(accord, end) if local else end
            value = _value(task.coupling, end.a, end.curved, end.weight)
            terms = [[_terms(task, costs, block, columns) for block, columns in blocks[stage]] for stage in blocks]
            _, curvature = task.counted()
            swept = backward_pass(terms, value, curvature, end.curved, feedback=coupled, seen=seen)
            policies = dict(zip(blocks, swept, strict=True))
    for block, gradient in alone.items():
        _move_alone(task, block, gradient, outcome)

    again: list[StagePolicy] = []

    def apply(stage: Stage, policy: StagePolicy, weights: Tensor) -> None:
        mean = averaged(accord, [part.direction(weights) for part in policy.blocks]) if local else None
        for i, ((block, _), part) in enumerate(zip(blocks[stage], policy.blocks, strict=True)):
            velocity = _move(block, part, weights, None if mean is None else mean[i])
            outcome.states[block.parameters[0]] = _with_velocity(part, velocity)
        outcome.figures[stage.name] = partial(_figures, policy.policy, policy.gram, weights, policies[stage].policy)
        if policy is not policies[stage]:
            again.append(policy)

    def meet(stage: Stage, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> StagePolicy:
        assert task.recorder is not None
        layer, own = task.network.layers[stage.layers[0]], [block for block, _ in blocks[stage]]
        return met(task.recorder, linearised, layer, own, policies[stage], args, kwargs)

    def gather(stage: Stage, r: Tensor | None) -> Tensor | None:
        if local:
            meet_at(accord, stages.index(stage))
            return r
        assert end is not None
        return gathered_deviation(accord, stages.index(stage), r, len(end.a))

    if task.recorder is not None:
        let_go(task, linearised)
        moving = {stage: [block for block, _ in blocks[stage]] for stage in policies}
        at_state = meet if relinearises(task.coupling) else None
        together = gather if accord.several and shared.whole else None
        output = forward_pass(task.recorder, whole, moving, policies, apply, later, at_state, together)
        outcome.actual_decrease = _actual_decrease(task, whole, output)
    failed = [p.policy.failures for p in (*policies.values(), *again) if isinstance(p.policy, BatchPolicy)]
    outcome.failures = sum(failed)
    return outcome


def settle(task: Task, outcome: Outcome) -> None:
    """The last word of a step over several ranks: raises if on one of them anything has failed until here."""
    accord = task.accord
    if not accord.several:
        return
    own = outcome.actual_decrease
    samples = accord.counts[accord.ranks.rank]
    weight = samples / sum(accord.counts) if task.terminal.reduction == "mean" else 1.0
    known = own is not None or not samples
    all_known, parts = accord.exchange(float(known), 0.0 if own is None else own.double() * weight).T[:2]
    outcome.actual_decrease = parts.sum() if bool(all_known.all()) else None


def _by_stage(stages: Sequence[Stage], found: Sequence[Found]) -> dict[Stage, list[tuple[Block, Columns]]]:
    blocks: dict[Stage, list[tuple[Block, Columns]]] = {}
    for at, block, columns in found:
        blocks.setdefault(stages[at], []).append((block, columns))
    return blocks


def _value(coupling: Coupling, a: Tensor, curved: int, weight: float) -> BatchValue | SampleValue:
    kind = BatchValue if is_joint(coupling) else SampleValue
    return kind.terminal(a, curved, weight)


def _terms(task: Task, costs: StageCosts, block: Block, columns: Columns, *, alone: bool = False) -> BlockTerms:
    state, velocity, its_lr = task.own_state(block)
    state, past = parted(state)
    settings = task.settings(block, state, alone=alone)
    if velocity is not None and its_lr is not None and its_lr < settings.lr:
        # what is carried on is at most the last update itself: the velocity of a step with hardly any lr, and so with
        # hardly any damping, is long
        velocity = velocity * (its_lr / settings.lr)
    cost = costs.gradients.get(block)
    if settings.decay or cost is not None:
        control = wide(matrix_of(block, block.tensors))
        decay = settings.decay * control
        if cost is None:
            cost = decay
        else:
            own, kept = with_curvature(control, cost, past, edited=costs.edited)
            settings, state = replace(settings, decay=settings.decay + own), {**state, **kept}
            cost = cost + decay
    if isinstance(columns, SpreadColumns) and is_local(task.coupling):
        return BlockTerms(columns.own, cost, velocity, settings, state, seen=columns)
    return BlockTerms(columns, cost, velocity, settings, state)


def _move_alone(task: Task, block: Block, gradient: Tensor, outcome: Outcome) -> None:
    """A chain of one layer and one sample, whose only column is the whole batch's gradient."""
    one = torch.ones(1, 1, dtype=torch.float64, device=gradient.device)
    terms = _terms(task, StageCosts(), block, DenseColumns(gradient[None, None]), alone=True)
    value = _value(task.coupling, one, 1, 1.0)
    _, curvature = task.counted(alone=True)
    (policy,) = backward_pass([[terms]], value, curvature, 1, feedback=task.feedback)
    (part,) = policy.blocks
    velocity = _move(block, part, policy.policy.weights(None))
    outcome.states[block.parameters[0]] = _with_velocity(part, velocity)


def _actual_decrease(task: Task, whole: Linearised | None, output: Any) -> Tensor | None:
    criterion = task.terminal.criterion
    if whole is None or criterion is None or whole.recorded.criterion is None or task.recorder is None:
        return None
    args, kwargs, i = whole.recorded.criterion
    leaves = floating(output)
    if not args or len(leaves) != len(whole.recorded.leaves) or whole.recorded.leaves[i].shape != leaves[i].shape:
        return None
    before, *rest = args
    with torch.no_grad(), task.recorder.inbox.mute():
        now = criterion(whole.recorded.leaves[i].seen_as(before, leaves[i]), *rest, **kwargs)
        return torch.as_tensor(criterion(before, *rest, **kwargs) - now)


def _figures(policy: Policy, gram: Tensor, weights: Tensor, nominal: Policy) -> dict[str, float]:
    k_weights = policy.weights(None)
    sizes = {"k": size(gram, k_weights), "feedback": size(gram, weights - k_weights)}
    return {name: float(value) for name, value in {**sizes, "predicted_decrease": nominal.predicted()}.items()}


def _with_velocity(part: BlockPolicy, velocity: Tensor | None) -> State:
    if velocity is None:
        return part.state
    return {**part.state, VELOCITY: velocity, VELOCITY_LR: part.terms.settings.lr}


def _move(block: Block, part: BlockPolicy, weights: Tensor, direction: Tensor | None = None) -> Tensor | None:
    """Move a block by its policy, or in a direction that is known already; returns the new velocity, if any."""
    sides = block.sides()
    velocity = part.move_(sides, weights) if direction is None else part.follow_(sides, direction)
    if not all(side.data_ptr() == p.data_ptr() for side, p in zip(sides, block.tensors, strict=True)):
        _write(block, torch.cat(sides, 1))  # a parameter that is no view of its matrix, channels_last say
    return velocity


def _write(block: Block, matrix: Tensor) -> None:
    with torch.no_grad():
        for parameter, part in zip(block.tensors, block.split(matrix), strict=True):
            parameter.copy_(part)
