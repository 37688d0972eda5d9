"""Dense differential dynamic programming (DDP) for small chains in float64: the optimizer's specification.

Slow on purpose, to be read beside Liu, Chen and Theodorou, *DDPNOpt: Differential Dynamic Programming Neural
Optimizer*, ICLR 2021 (arXiv 2002.08809). The fast path shares no code with it and is tested against it.

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

Without feedback, Q_ux = 0 in both passes, and V_x is what back-propagation computes (Proposition 2).

Shape letters: T stages, B samples, S policies, P parameters of a stage, n features entering and m leaving it,
d outputs, C columns of the terminal factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Size, Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

Function = Callable[[Tensor, Tensor], Tensor]  # dynamics of one sample, pure: (u [P], x [n]) -> x_next [m]
Loss = Callable[[Tensor, Tensor], Tensor]  # terminal cost of one sample, pure: (y [d], target) -> phi []


def require_float64(**tensors: Tensor) -> None:
    """Refuse any dtype in which rounding could pass for an error, or hide one."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float64:
            raise TypeError(f"{name} is {tensor.dtype}; the reference computes in torch.float64 only")


@dataclass(frozen=True)
class Terminal:
    """Terminal cost sum_i w_i phi_i to second order: phi_i has gradient g_i and curvature Z_i Z_i'."""

    weight: Tensor  # w [B]; 1/B, a mean, from the functions below; ``dataclasses.replace`` for others
    gradient: Tensor  # g [B, d]
    factor: Tensor  # Z [B, d, C]

    def __post_init__(self) -> None:
        require_float64(weight=self.weight, gradient=self.gradient, factor=self.factor)

    def joint(self) -> Terminal:
        """Return the same cost for one joint output: V_X = (w_i g_i), V_XX = blockdiag(w_i Z_i Z_i')."""
        w, B = self.weight, len(self.weight)
        Z = torch.einsum("a,adc,ab->adbc", w.sqrt(), self.factor, torch.eye(B).to(w))
        G = w[:, None] * self.gradient
        return Terminal(torch.ones(1).to(w), G.reshape(1, -1), Z.reshape(1, G.numel(), -1))


def gradient(loss: Loss, y: Tensor, target: Tensor) -> Terminal:
    """Outer product of the gradient, Z = g (Proposition 3), for outputs y [B, d] and targets [B, ...]."""
    g, _ = _loss_derivatives(loss, y, target)
    return Terminal(torch.full_like(g[:, 0], 1 / len(g)), g, g[..., None])


def matched(loss: Loss, y: Tensor, target: Tensor, *, cap: float = 1.0) -> Terminal:
    """Rank one, exact along the gradient: Z = c g with c^2 = max(1/cap, g'Hg / (g'g)^2); Z = 0 where g = 0.

    H is phi_i's Hessian at the output. Along g, the quadratic model promises a decrease of cap/2 at most.
    """
    g, H = _loss_derivatives(loss, y, target)
    size = g.norm(dim=1, keepdim=True)
    e = torch.where(size > 0, g / size, 0.0)  # Z in terms of e = g/|g|: powers of a tiny g would underflow
    eHe = torch.einsum("bi,bij,bj->b", e, H, e)[:, None]
    Z = torch.maximum(size.square() / cap, eHe).sqrt() * e
    return replace(gradient(loss, y, target), factor=Z[..., None])


def exact(loss: Loss, y: Tensor, target: Tensor) -> Terminal:
    """All of the loss's Hessian: Z = H^(1/2), symmetric, with the negative eigenvalues of H cut to zero."""
    _, H = _loss_derivatives(loss, y, target)
    eigenvalues, U = torch.linalg.eigh(H)
    Z = U * eigenvalues.clamp(min=0).sqrt()[:, None, :] @ U.mT
    return replace(gradient(loss, y, target), factor=Z)


def sampled(loss: Loss, y: Tensor, target: Tensor, noise: Tensor) -> Terminal:
    """Random columns Z = H^(1/2) noise; noise [B, d, C] with E[noise noise'] = I makes E[Z Z'] = H."""
    end = exact(loss, y, target)
    return replace(end, factor=end.factor @ noise)


def _loss_derivatives(loss: Loss, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradient [B, d] and Hessian [B, d, d] of each sample's loss at its output."""
    require_float64(y=y)
    return vmap(grad(loss))(y, target), vmap(jacrev(grad(loss)))(y, target)


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


def rollout(
    stages: Sequence[Stage], states: Sequence[Tensor], policies: Sequence[Policy], weight: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Run again under the policies, averaged with weight [S]: T controls [P] and T + 1 states [S, n]."""
    controls, new = [], [states[0]]
    for stage, x, policy in zip(stages, states[:-1], policies, strict=True):
        dx = new[-1] - x
        du = policy.k + torch.einsum("spn,sn->sp", policy.K, dx)
        controls.append(stage.u + weight @ du + stage.once)
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
    coupling: Literal["batch", "sample"] = "batch",
    feedback: bool = True,
    value_ridge: float = 0.0,
    second_order: bool = False,
) -> DenseStep:
    """Take one step: backward pass along the nominal trajectory, then one rollout of the whole batch.

    functions: T dynamics; controls: T of [P]; x [B, n]: the states that enter the first stage; terminal: the
    cost at the nominal output; R: T of [P, P], symmetric positive definite (see the module's docstring).
    decay: T of gamma. Q_u gets gamma u, the joint one once and each sample's alike; the averaged update has
    it once, also where the weights do not sum to 1.
    drift: T of [P], momentum. R is centred on u + drift: the joint Q_u gets -R drift. Per-sample policies do
    not see it; it is added to their average.
    value_ridge: eps of the optional Tikhonov V_xx + eps I (Algorithm 3), for each V_xx as it enters a stage.
    second_order: dynamics to second order, V_x . f_ux in Q_ux and V_x . f_xx in Q_xx.

    Example: a linear-quadratic problem, min (u - 3)^2/2 + u^2/4, which DDP solves in one step.

        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> end = exact(lambda y, target: (y - target).square().sum() / 2, one, 4 * one)
        >>> step = dense_step([lambda u, x: x + u], [0 * one[0]], one, end, R=[one / 2], decay=[0.5])
        >>> step.controls[0].tolist()
        [2.0]
    """
    if coupling not in ("batch", "sample"):
        raise ValueError(f'coupling is {coupling!r}; it must be "batch" or "sample"')
    decay = [0.0] * len(functions) if decay is None else decay
    drift = [torch.zeros_like(u) for u in controls] if drift is None else drift
    B, whole = len(x), coupling == "batch"
    stages = []
    for f, u, metric, gamma, shift in zip(functions, controls, R, decay, drift, strict=True):
        require_float64(x=x, controls=u, R=metric, drift=shift)
        if whole:
            stages.append(Stage(joint(f, B), u, metric, gamma * u - metric @ shift, torch.zeros_like(u)))
        else:
            surplus = (terminal.weight.sum() - 1) * torch.linalg.solve(metric, gamma * u)
            stages.append(Stage(f, u, metric, gamma * u, shift + surplus))
    if whole:  # one recursion for both couplings: the joint state is a single sample
        x, terminal = x.reshape(1, -1), terminal.joint()

    states = list(accumulate(stages, lambda X, stage: vmap(partial(stage.f, stage.u))(X), initial=x))
    solve = partial(bellman, full_Q_uu=whole, feedback=feedback, second_order=second_order)
    policies = backward_pass(stages, states, terminal, solve, value_ridge)
    new_controls, new_states = rollout(stages, states, policies, terminal.weight)
    return DenseStep(
        controls=new_controls,
        trajectory=[X.reshape(B, -1) for X in new_states],
        k=[policy.k for policy in policies],
        K=[policy.K for policy in policies],
        V_x=[*(policy.V_x for policy in policies), terminal.gradient],
        V_xx=[*(policy.V_xx for policy in policies), terminal.factor @ terminal.factor.mT],
        predicted_decrease=torch.stack([terminal.weight @ policy.decrease for policy in policies]),
    )


def stages_of(model: nn.Sequential, x: Tensor) -> tuple[list[Function], list[Tensor]]:
    """Split a chain of modules into T dynamics and T controls; x [B, ...] is any input of the model.

    A stage is one module with parameters and those without after it (the first stage: also before it). The
    state is one sample's activation, flattened; the control is the module's matrix [out, fan_in + 1] by rows:
    weight.reshape(out, -1), with the bias, where there is one, as last column. No module may mix samples.
    """
    groups: list[list[nn.Module]] = [[]]
    for module in model:
        if list(module.parameters()) and list(nn.Sequential(*groups[-1]).parameters()):
            groups.append([])
        groups[-1].append(module)
    functions, controls = list[Function](), list[Tensor]()
    for group in groups:
        stage = nn.Sequential(*group)
        parameters = dict(stage.named_parameters())
        require_float64(**parameters)
        if [name.partition(".")[2] for name in parameters] not in (["weight"], ["weight", "bias"]):
            raise TypeError(f"a stage needs one weight and may have a bias, but has {list(parameters)}")
        shapes = {name: p.shape for name, p in parameters.items()}
        functions.append(partial(_apply, stage, shapes, x.shape[1:]))
        controls.append(torch.cat([p.reshape(len(p), -1) for p in parameters.values()], 1).flatten().detach())
        x = stage(x).detach()
    return functions, controls


def _apply(stage: nn.Module, shapes: dict[str, Size], shape: Size, u: Tensor, x: Tensor) -> Tensor:
    """Run modules on x [n], reshaped to ``shape``, with the parameters that u [P] holds."""
    widths = [s[1:].numel() for s in shapes.values()]
    columns = u.reshape(-1, sum(widths)).split_with_sizes(widths, dim=1)
    values = {name: c.reshape(shapes[name]) for name, c in zip(shapes, columns, strict=True)}
    y: Tensor = functional_call(stage, values, (x.reshape(1, *shape),))
    return y.flatten()
