"""The backward pass over stages: from every block's columns to every stage's feedback policy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .columns import Columns, add_
from .curvature.base import Curvature, State
from .inverse import Inverse
from .limits import held
from .value import Policy, SampleValue, Value


@dataclass(frozen=True)
class Settings:
    """Numbers of a block's parameter group.

    Args:
        lr: step size ``eta``.
        decay: curvature of the stage cost, ``decay / 2 |u|^2`` if nothing but weight decay costs.
        kept: share of the weights that decoupled decay leaves, before the policy moves them.
        momentum: weight of the last update, a drift: ``R`` is centred on ``u - lr momentum v``.
        limit: largest change of the weights in one step, relative to them (:mod:`ddpnopt.limits`).
        damped: share of the curvature's damping (:mod:`ddpnopt.sensitivity`).
    """

    lr: float
    decay: float
    kept: float
    momentum: float
    limit: float
    damped: float


@dataclass(frozen=True)
class BlockTerms:
    """What one block brings into a step.

    Args:
        columns: its parameter gradients.
        cost: gradient ``l_u [out, fan_in]`` of the stage cost; ``None`` without one.
        velocity: momentum buffer ``[out, fan_in]``, in units of ``M^-1 Q_u``; ``None`` before the first step or
            without momentum.
        settings: numbers of its group.
        state: the curvature's.
        seen: columns that the curvature is built from, where they are not these: those of all ranks' samples.
    """

    columns: Columns
    cost: Tensor | None
    velocity: Tensor | None
    settings: Settings
    state: State
    seen: Columns | None = None


@dataclass(frozen=True)
class BlockPolicy:
    """One block's part of a stage's policy: weights on the columns in, new control out.

    Args:
        terms: what the block brought.
        inverse: ``M^-1``, damping included.
        offset: ``M^-1`` times the stage cost's gradient, ``[out, fan_in]``; ``None`` without one.
        state: the curvature's, this step counted in.
    """

    terms: BlockTerms
    inverse: Inverse
    offset: Tensor | None
    state: State

    def move_(self, control: Sequence[Tensor], weights: Tensor) -> Tensor | None:
        """Move what is kept of ``u`` by the policy with weights ``[R, B]`` on the columns; returns the new velocity.

        Without momentum that is ``None``.

        ``control``: the block's parameters, each as a matrix, ``[out, fan_in]`` side by side; written into.
        """
        terms = self.terms
        if self.offset is None and not terms.settings.momentum and terms.settings.limit == math.inf:
            terms.columns.move_(control, self.inverse, weights, -terms.settings.lr, terms.settings.kept)
            return None
        return self.follow_(control, self.direction(weights))

    def direction(self, weights: Tensor) -> Tensor:
        """``M^-1 (U' w + stage cost) + momentum v [out, fan_in]``: what moves the kept weights, over ``-lr``."""
        terms, momentum = self.terms, self.terms.settings.momentum
        if momentum and terms.velocity is not None:
            direction = terms.columns.solve_weighted_and(self.inverse, weights, terms.velocity, momentum)
        else:
            direction = terms.columns.solve_weighted(self.inverse, weights)
        return direction if self.offset is None else direction + self.offset

    def follow_(self, control: Sequence[Tensor], direction: Tensor) -> Tensor | None:
        """Move what is kept of ``u`` by ``-lr`` times a direction, within the limit; returns the new velocity, if any.

        ``direction`` is written into.
        """
        settings = self.terms.settings
        direction = held(direction, control, settings.lr, settings.limit)
        add_(control, direction, -settings.lr, settings.kept)
        return direction if settings.momentum else None


@dataclass(frozen=True)
class StagePolicy:
    """A stage's policy, and what it came from.

    Args:
        policy: from deviations to weights on the columns.
        blocks: the blocks' parts.
        gram: ``G' R^-1 G``, ``[N, N]`` or per sample ``[B, R, R]``.
        ahead: the value after the stage; ``None`` where full matrices carry it (:mod:`ddpnopt.dense`).
    """

    policy: Policy
    blocks: tuple[BlockPolicy, ...]
    gram: Tensor
    ahead: Value | None = None


def size(gram: Tensor, weights: Tensor) -> Tensor:
    """``|R^-1 G beta|_R``, the length of the update with weights ``beta [R, B]`` in the curvature's own measure.

    Per-sample Gram matrices give the root of the samples' summed squares instead, which ignores that samples'
    updates may cancel.
    """
    if gram.ndim == 2:
        flat = weights.flatten()
        return (flat @ gram @ flat).clamp_min(0).sqrt()
    return torch.einsum("rb,brq,qb->", weights, gram, weights).clamp_min(0).sqrt()


def backward_pass(
    stages: Sequence[Sequence[BlockTerms]],
    value: Value,
    curvature: Curvature,
    curved: int,
    *,
    feedback: bool,
    seen: Tensor | None = None,
) -> list[StagePolicy]:
    """Sweep from the last stage to the first; policies come back in the order of ``stages``.

    Args:
        stages: blocks of every stage, in the order the stages run.
        value: of the loss, from :class:`~ddpnopt.value.BatchValue` or :class:`~ddpnopt.value.SampleValue`.
        curvature: ``M``'s settings.
        curved: how many of the columns span the loss's curvature; the rest carry the gradient alone.
        feedback: ``False``: ``Q_ux = 0``, stages do not see one another.
        seen: ``V_x`` as weights on the columns that the curvature is built from, where those are others.
    """
    nominal = value.v_x if seen is None else seen
    policies: list[StagePolicy] = []
    for blocks in reversed(stages):
        ready = [block_policy(terms, curvature, value, nominal, curved) for terms in blocks]
        policy, value = stage_policy(ready, value, feedback=feedback)
        policies.append(policy)
    return policies[::-1]


def stage_policy(blocks: Sequence[BlockPolicy], ahead: Value, *, feedback: bool) -> tuple[StagePolicy, Value]:
    """A stage's policy from its blocks' parts and the value after it, and the value before it."""
    gram, d = gram_and_cost(blocks, joint=ahead.joint)
    policy, behind = ahead.backward(gram, d, feedback=feedback)
    return StagePolicy(policy, tuple(blocks), gram, ahead), behind


def relinearised(stage: StagePolicy, columns: Sequence[Columns]) -> StagePolicy:
    """The stage's problem solved again, with other columns per block; the value ahead and ``R`` stay.

    With the columns' gradients ``G_hat`` at the state that the rollout has reached, the layer's output moves by
    ``P' dx + G_hat' du`` in column coordinates. That ``du`` enters beside ``dx``, not times it, makes this the same
    recursion: ``beta = (C^-1 + Gram_hat)^-1 (C^-1 a - d_hat + r)``, ``C`` and ``a`` those of the value ahead.
    """
    assert stage.ahead is not None
    pairs = zip(stage.blocks, columns, strict=True)
    blocks = [replace(block, terms=replace(block.terms, columns=own)) for block, own in pairs]
    return stage_policy(blocks, stage.ahead, feedback=True)[0]


def block_policy(terms: BlockTerms, curvature: Curvature, value: Value, nominal: Tensor, curved: int) -> BlockPolicy:
    """One block's part of a policy, its curvature advanced by this step; arguments as in :func:`backward_pass`.

    ``nominal``: ``V_x`` of the back-propagated loss as weights on the columns, ``[R, B]``.
    """
    # the batch form builds M from back-propagated columns, the sample form from V_x itself, as the paper does
    sample = value if isinstance(value, SampleValue) else None
    lr, decay = terms.settings.lr, terms.settings.decay
    ridge = curvature.less_damped(terms.settings.damped).ridge(lr, decay, batch=sample is None)
    seen = terms.columns if terms.seen is None else terms.seen

    def gradient() -> Tensor:
        own = seen.weighted(nominal if sample is None else sample.v_x)
        return own if terms.cost is None else own + terms.cost

    columns = None
    if curvature.needs_columns:
        columns = seen.first(curved) if sample is None else seen.combined(sample.a)
    state = curvature.advance(terms.state, columns, gradient, ridge)
    inverse = curvature.inverse(state, ridge)
    return BlockPolicy(terms, inverse, None if terms.cost is None else inverse.solve(terms.cost), state)


def gram_and_cost(blocks: Sequence[BlockPolicy], *, joint: bool) -> tuple[Tensor, Tensor | None]:
    """A stage's ``G' R^-1 G``, and ``d = G' R^-1`` times its stage cost's gradient (``None`` without one)."""
    gram = _total([_gram(block, joint=joint) for block in blocks])
    costs = [d for d in (_cost(block, joint=joint) for block in blocks) if d is not None]
    return gram, _total(costs) if costs else None


def _total(tensors: Sequence[Tensor]) -> Tensor:
    total, *others = tensors
    for other in others:
        total = total + other
    return total


def _gram(block: BlockPolicy, *, joint: bool) -> Tensor:
    columns = block.terms.columns
    gram = columns.gram(block.inverse) if joint else columns.sample_gram(block.inverse)
    # a copy of its own, so that scaling it may write into it
    return gram.to(torch.float64, copy=True).mul_(block.terms.settings.lr)


def _cost(block: BlockPolicy, *, joint: bool) -> Tensor | None:
    """``d = G' R^-1`` times the gradient of decay and, in the batch form, of the drift's proximal term."""
    terms, offset, momentum = block.terms, block.offset, block.terms.settings.momentum
    drift = terms.velocity if joint and momentum else None
    if drift is None:
        pull, share = offset, 1.0
    elif offset is None:
        pull, share = drift, momentum
    else:
        pull, share = torch.add(offset, drift, alpha=momentum), 1.0
    # the number is multiplied in where few numbers are left
    return None if pull is None else terms.columns.directional(pull).double() * (share * terms.settings.lr)
