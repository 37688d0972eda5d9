"""One step of dense differential dynamic programming (DDP) on a small chain, in float64.

To be read beside Liu, Chen and Theodorou, *DDPNOpt: Differential Dynamic Programming Neural Optimizer*, ICLR 2021
(arXiv 2002.08809).

**Training as optimal control.** The state x_t is the activation that enters stage t, the control u_t is that
stage's parameters, and x_{t+1} = f_t(u_t, x_t). With samples i and stages t, the cost is

    J(u) = sum_i w_i phi_i(x_T^i) + sum_t l_t(u_t)          l_t(u) = gamma_t/2 |u|^2   (weight decay)

**Backward pass** (Algorithm 1, with first-order dynamics; the first index of a matrix is its row):

    Q_x  = f_x' V_x         Q_u  = l_u + f_u' V_x
    Q_xx = f_x' V_xx f_x    Q_ux = f_u' V_xx f_x    Q_uu = R + f_u' V_xx f_u
    k    = -Q_uu^-1 Q_u     K    = -Q_uu^-1 Q_ux
    V_x <- Q_x + Q_ux' k    V_xx <- Q_xx + Q_ux' K

R is all of Q_uu but the pulled-back V_xx: curvature over learning rate, damping, and l_uu = gamma I where
wanted. The caller builds R; l_uu is not added again.

**Rollout.** The chain runs again, and each stage answers to how far its input has moved already:

    u_t <- u_t + k_t + K_t dx_t     xhat_{t+1} = f_t(u_t, xhat_t)     dx_t = xhat_t - x_t     dx_0 = 0

**Coupling** says what a state is, where B samples share each control:

* "batch": one joint state X = (x_1 .. x_B) with cost J. This is DDP as it stands above: S = 1 policy.
* "sample" (Algorithm 3): sample i has V_x, V_xx, k, K of its own, from phi_i + sum_t l_t; R alone is Q_uu;
  the update is the w-weighted sum of the S = B policies, formed during one rollout of the whole batch.

**Relinearised** (not in the paper), a stage does not follow its affine policy, which knows how f_t was at (u_t, x_t)
only. It solves its problem at the state it meets, with the value ahead V_x, V_xx as it is around x_{t+1}:

    min over du of  V_x' dy + dy' V_xx dy / 2 + du' R du / 2 + l_u' du      dy = f_t(u_t, xhat_t) + f_u du - x_{t+1}

with f_u at (u_t, xhat_t). Where f is linear in u and in x, each by itself, dy is exact.

Without feedback, Q_ux = 0 in both passes, and V_x is what back-propagation computes (Proposition 2); no stage answers
to the rollout, relinearised or not.

Shape letters: T stages, B samples, S policies, P parameters of a stage, n features entering and m leaving it,
d outputs, C columns of the terminal factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import inf
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from .terminal import Terminal, require_float64

Function = Callable[[Tensor, Tensor], Tensor]  # dynamics of one sample, pure: (u [P], x [n]) -> x_next [m]


@dataclass(frozen=True)
class Stage:
    """One time step of the chain, as both passes see it."""

    f: Function
    u: Tensor  # [P]
    R: Tensor  # [P, P]
    l_u: Tensor  # [P], what enters Q_u beside f_u' V_x
    once: Tensor  # [P], what is added to the update after the policies have been averaged


class Policy(NamedTuple):
    """Affine policy du(dx) = k + K dx of one stage, and the value it leaves to the stage before."""

    k: Tensor  # [P]
    K: Tensor  # [P, n]
    V_x: Tensor  # [n]
    V_xx: Tensor  # [n, n]
    decrease: Tensor  # [], predicted for this stage alone: -(Q_u'k + k'Q_uu k / 2) = -Q_u'k / 2


Solver = Callable[[Stage, Tensor, Tensor, Tensor], Policy]  # (stage, x, V_x, V_xx), of one sample
Law = Callable[[Tensor], Tensor]  # of one stage: du [S, P] for the states [S, n] that it meets in the rollout


def bellman(
    stage: Stage, x: Tensor, V_x: Tensor, V_xx: Tensor, *, full_Q_uu: bool, feedback: bool, second_order: bool
) -> Policy:
    """Solve one stage for one sample (x [n], V_x [m], V_xx [m, m]); R alone is Q_uu unless ``full_Q_uu``."""
    f_u, f_x = jacrev(stage.f, argnums=(0, 1))(stage.u, x)
    Q_u, Q_x = stage.l_u + f_u.T @ V_x, f_x.T @ V_x
    Q_ux, Q_xx = f_u.T @ V_xx @ f_x, f_x.T @ V_xx @ f_x
    Q_uu = stage.R + f_u.T @ V_xx @ f_u if full_Q_uu else stage.R
    if second_order:  # without V_x . f_uu: Q_uu stays positive definite
        H_u_H_x = grad(lambda u, x: V_x @ stage.f(u, x), argnums=(0, 1))
        V_x_f_ux, V_x_f_xx = jacrev(H_u_H_x, argnums=1)(stage.u, x)
        Q_ux, Q_xx = Q_ux + V_x_f_ux, Q_xx + V_x_f_xx
    Q_ux = Q_ux if feedback else torch.zeros_like(Q_ux)
    k, K = -torch.linalg.solve(Q_uu, Q_u), -torch.linalg.solve(Q_uu, Q_ux)
    return Policy(k, K, Q_x + Q_ux.T @ k, Q_xx + Q_ux.T @ K, -Q_u @ k / 2)


def backward_pass(
    stages: Sequence[Stage], states: Sequence[Tensor], terminal: Terminal, solve: Solver, value_ridge: float
) -> list[Policy]:
    """Carry V_x, V_xx from output to input along states [S, n]: T policies, their fields with S in front."""
    V_x, V_xx = terminal.gradient, terminal.factor @ terminal.factor.mT
    policies: list[Policy] = []
    for stage, x in reversed(list(zip(stages, states[:-1], strict=True))):
        eye = torch.eye(V_xx.shape[-1]).to(V_xx)
        policies.insert(0, vmap(partial(solve, stage))(x, V_x, V_xx + value_ridge * eye))
        V_x, V_xx = policies[0].V_x, policies[0].V_xx
    return policies


def affine(policy: Policy, x: Tensor) -> Law:
    """Follow a policy around the nominal states x [S, n]."""
    return lambda met: policy.k + torch.einsum("spn,sn->sp", policy.K, met - x)


def relinearised(stage: Stage, x_next: Tensor, V_x: Tensor, V_xx: Tensor) -> Law:
    """Solve the stage at the states it meets, with V_x [S, m], V_xx [S, m, m] around the nominal x_next [S, m]."""

    def solve(met: Tensor, x_next: Tensor, V_x: Tensor, V_xx: Tensor) -> Tensor:
        f_u = jacrev(stage.f)(stage.u, met)
        dy = stage.f(stage.u, met) - x_next
        Q_u = stage.l_u + f_u.T @ (V_x + V_xx @ dy)
        du: Tensor = -torch.linalg.solve(stage.R + f_u.T @ V_xx @ f_u, Q_u)
        return du

    return lambda met: vmap(solve)(met, x_next, V_x, V_xx)


def rollout(
    stages: Sequence[Stage],
    x: Tensor,
    laws: Sequence[Law],
    weight: Tensor,
    longest: Sequence[float] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Run again from x [S, n] under the laws, averaged with weight [S]: T controls [P] and T + 1 states [S, n]."""
    controls, new = [], [x]
    for stage, law, bound in zip(stages, laws, longest or [inf] * len(stages), strict=True):
        du = weight @ law(new[-1])
        du = du * min(1.0, bound / float(du.norm())) if bound < inf else du
        controls.append(stage.u + du + stage.once)
        new.append(vmap(partial(stage.f, controls[-1]))(new[-1]))
    return controls, new


@dataclass(frozen=True)
class DenseStep:
    """One step and what led to it; S = 1 with the joint n, B times a sample's, or S = B (see coupling)."""

    controls: list[Tensor]  # T of [P], after the step
    trajectory: list[Tensor]  # T + 1 of [B, n], states of the rollout
    k: list[Tensor]  # T of [S, P]
    K: list[Tensor]  # T of [S, P, n]
    V_x: list[Tensor]  # T + 1 of [S, n], the last one terminal
    V_xx: list[Tensor]  # T + 1 of [S, n, n], the last one terminal; before value_ridge
    predicted_decrease: Tensor  # [T], w-weighted sum over the policies; counts R as cost


def joint(f: Function, B: int) -> Function:
    """Dynamics of the joint state, (u [P], X [B n]) -> X_next [B m], from those of one sample."""
    return lambda u, X: vmap(partial(f, u))(X.reshape(B, -1)).flatten()


def dense_step(
    functions: Sequence[Function],
    controls: Sequence[Tensor],
    x: Tensor,
    terminal: Terminal,
    *,
    R: Sequence[Tensor],
    decay: Sequence[float] | None = None,
    drift: Sequence[Tensor] | None = None,
    kept: Sequence[float] | None = None,
    longest: Sequence[float] | None = None,
    coupling: Literal["batch", "sample"] = "batch",
    feedback: bool = True,
    value_ridge: float = 0.0,
    second_order: bool = False,
    relinearise: bool = False,
) -> DenseStep:
    """Take one step: backward pass along the nominal trajectory, then one rollout of the whole batch.

    functions: T dynamics; controls: T of [P]; x [B, n]: the states that enter the first stage; terminal: the
    cost at the nominal output; R: T of [P, P], symmetric positive definite (see the module's docstring).
    decay: T of gamma. Q_u gets gamma u, the joint one once and each sample's alike; the averaged update has
    it once, also where the weights do not sum to 1.
    drift: T of [P], momentum. R is centred on u + drift: the joint Q_u gets -R drift. Per-sample policies do
    not see it; it is added to their average.
    kept: T shares of u that decoupled decay leaves, to which the update is added. No policy sees it but by the states
    of the rollout.
    longest: T bounds of |du|, control limits: what a policy answers at the state it meets is shortened to them.
    value_ridge: eps of the optional Tikhonov V_xx + eps I (Algorithm 3), for each V_xx as it enters a stage.
    second_order: dynamics to second order, V_x . f_ux in Q_ux and V_x . f_xx in Q_xx.
    relinearise: each stage is solved again at the state the rollout meets (coupling "batch" only). A stage's value
    ahead is taken at its own output, so what follows a layer is best a stage of its own, its control of length 0.

    Example: a linear-quadratic problem, min (u - 3)^2/2 + u^2/4, which DDP solves in one step.

        >>> from ddpnopt.reference import dense_step, exact
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> end = exact(lambda y, target: (y - target).square().sum() / 2, one, 4 * one)
        >>> step = dense_step([lambda u, x: x + u], [0 * one[0]], one, end, R=[one / 2], decay=[0.5])
        >>> step.controls[0].tolist()
        [2.0]
    """
    if coupling not in ("batch", "sample"):
        raise ValueError(f'coupling is {coupling!r}; it must be "batch" or "sample"')
    if relinearise and coupling != "batch":
        raise ValueError(f'relinearise goes with coupling "batch", got {coupling!r}')
    decay = [0.0] * len(functions) if decay is None else decay
    drift = [torch.zeros_like(u) for u in controls] if drift is None else drift
    kept = [1.0] * len(functions) if kept is None else kept
    B, whole = len(x), coupling == "batch"
    stages = []
    for f, u, metric, gamma, shift, share in zip(functions, controls, R, decay, drift, kept, strict=True):
        require_float64(x=x, controls=u, R=metric, drift=shift)
        once = (share - 1) * u
        if whole:
            stages.append(Stage(joint(f, B), u, metric, gamma * u - metric @ shift, once))
        else:
            surplus = (terminal.weight.sum() - 1) * torch.linalg.solve(metric, gamma * u)
            stages.append(Stage(f, u, metric, gamma * u, once + shift + surplus))
    if whole:  # one recursion for both couplings: the joint state is a single sample
        x, terminal = x.reshape(1, -1), terminal.joint()

    states = list(accumulate(stages, lambda X, stage: vmap(partial(stage.f, stage.u))(X), initial=x))
    solve = partial(bellman, full_Q_uu=whole, feedback=feedback, second_order=second_order)
    policies = backward_pass(stages, states, terminal, solve, value_ridge)
    V_x = [*(policy.V_x for policy in policies), terminal.gradient]
    V_xx = [*(policy.V_xx for policy in policies), terminal.factor @ terminal.factor.mT]
    laws = [affine(policy, X) for policy, X in zip(policies, states[:-1], strict=True)]
    if relinearise and feedback:
        ahead = [curvature + value_ridge * torch.eye(curvature.shape[-1]).to(curvature) for curvature in V_xx]
        laws = [relinearised(*law) for law in zip(stages, states[1:], V_x[1:], ahead[1:], strict=True)]
    new_controls, new_states = rollout(stages, states[0], laws, terminal.weight, longest)
    return DenseStep(
        controls=new_controls,
        trajectory=[X.reshape(B, -1) for X in new_states],
        k=[policy.k for policy in policies],
        K=[policy.K for policy in policies],
        V_x=V_x,
        V_xx=V_xx,
        predicted_decrease=torch.stack([terminal.weight @ policy.decrease for policy in policies]),
    )
