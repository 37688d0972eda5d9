"""Dense differential dynamic programming on a joint batch: the exact method that DDPNOpt makes affordable.

Source: Liu, Chen, Theodorou, *DDPNOpt: Differential Dynamic Programming Neural Optimizer*, ICLR 2021 (arXiv
2002.08809), Algorithm 1 with first-order dynamics and no approximation of Q_uu; "vanilla DDP" in its Tables 2 to 4.

Shapes: B samples. The state is the whole batch: n and m are all the numbers, ``B * features``, that enter and leave a
stage, P is the number of its parameters. Everything is computed in float64.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from ddpnopt.baselines.chain import Chain, Pass, Visit, cast

DTYPE = torch.float64


class Value(NamedTuple):
    """Derivatives of the cost to go at a state: V_x ``[n]``, V_xx ``[n, n]``."""

    V_x: Tensor
    V_xx: Tensor


class Policy(NamedTuple):
    """``du = k + K dx``: k ``[P]``, K ``[P, n]``."""

    k: Tensor
    K: Tensor


def terminal(criterion: nn.Module, start: Pass, weight: Tensor, output: Tensor) -> Value:
    """Gradient and exact Hessian of the loss ``sum(weight * criterion(output, ...))`` at the model's output."""
    y = output.detach().requires_grad_()
    tensors = {**dict(criterion.named_parameters()), **dict(criterion.named_buffers())}
    tensors = {name: cast(t, DTYPE) for name, t in tensors.items()}
    args = tuple(cast(a, DTYPE) if isinstance(a, Tensor) else a for a in start.args)
    kwargs = {name: cast(a, DTYPE) if isinstance(a, Tensor) else a for name, a in start.kwargs.items()}
    with torch.enable_grad():
        loss = (weight.to(DTYPE) * functional_call(criterion, tensors, (y, *args), kwargs)).sum()
        V_x = torch.autograd.grad(loss, y, create_graph=True)[0].flatten()
        return Value(V_x.detach(), jacobians(V_x, [y])[0])


def linearised(visit: Visit, with_state: bool) -> tuple[Tensor, Tensor]:
    """Jacobians ``f_x [m, n]`` and ``f_u [m, P]`` of a stage; without state ``f_x`` is ``[m, 0]``."""
    x = visit.x.detach().requires_grad_(with_state)
    u = {name: cast(p, DTYPE).requires_grad_() for name, p in visit.trained.items()}
    with torch.enable_grad():
        y = visit.replay(u, x).flatten()
        none, parts = y.new_zeros(len(y), 0), jacobians(y, [x] * with_state + list(u.values()))
    return torch.cat([none, *parts[:with_state]], 1), torch.cat([none, *parts[with_state:]], 1)


def jacobians(y: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """``dy/dz [m, z.numel()]`` of ``y [m]`` for each input z, all rows in one batched backward pass."""
    if not y.requires_grad or not inputs:
        return [y.new_zeros(len(y), z.numel()) for z in inputs]
    rows = torch.eye(len(y), dtype=y.dtype, device=y.device)
    parts = torch.autograd.grad(
        y, inputs, rows, is_grads_batched=True, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return [part.flatten(1).detach() for part in parts]


def bellman(value: Value, f_x: Tensor, f_u: Tensor, l_u: Tensor, R: Tensor) -> tuple[Policy, Value]:
    """One step of the Bellman recursion, from the value after a stage to its policy and the value before it.

    Args:
        value: at the stage's output.
        f_x, f_u: Jacobians ``[m, n]``, ``[m, P]``.
        l_u: gradient of the stage cost, ``[P]``.
        R: diagonal ``[P]`` of what Q_uu has besides ``f_u' V_xx f_u``.

    Raises:
        ValueError: if Q_uu is not positive definite.
    """
    V_x, V_xx = value
    Q_x, Q_u = f_x.T @ V_x, l_u + f_u.T @ V_x
    Q_xx, Q_ux, Q_uu = f_x.T @ V_xx @ f_x, f_u.T @ V_xx @ f_x, f_u.T @ V_xx @ f_u
    Q_uu.diagonal().add_(R)
    factor, failed = torch.linalg.cholesky_ex(Q_uu)
    if failed:
        raise ValueError("Q_uu is not finite and positive definite; raise damping or lower lr")
    gains = -torch.cholesky_solve(torch.cat([Q_u[:, None], Q_ux], 1), factor)
    k, K = gains[:, 0], gains[:, 1:]
    V_xx = Q_xx + Q_ux.T @ K
    return Policy(k, K), Value(Q_x + Q_ux.T @ k, (V_xx + V_xx.T) / 2)


def rollout(visits: Sequence[Visit], policies: Sequence[Policy]) -> dict[nn.Parameter, Tensor]:
    """The chain once more, each stage answering to how far its input has moved: the new value of each parameter."""
    new: dict[nn.Parameter, Tensor] = {}
    x = visits[0].x
    for visit, (k, K) in zip(visits, policies, strict=True):
        params = visit.trained
        du = k + K @ (x - visit.x).flatten() if K.shape[1] else k
        parts = torch.split(du, [p.numel() for p in params.values()])
        u = {
            name: cast(p, DTYPE) + part.reshape(p.shape) for (name, p), part in zip(params.items(), parts, strict=True)
        }
        x = visit.replay(u, x)
        new |= {p: u[name].to(p.dtype) for name, p in params.items()}
    return new


def memory(states: Sequence[int], params: Sequence[int]) -> float:
    """GiB that the dense matrices of a step take at once.

    Args:
        states: ``B * features`` entering each stage, and last those of the output.
        params: parameters P of each stage.
    """
    kept = peak = 0
    for t in reversed(range(len(params))):
        n, m, P = states[t] if t else 0, states[t + 1], params[t]
        jacobian, hessian, factor = 2 * m * (n + P), 3 * m * m + n * n + P * P + 2 * P * n, P * P
        kept += P * n
        peak = max(peak, kept + jacobian + hessian + factor)
    return 8 * peak / 2**30


class VanillaDDP(Optimizer):
    """One dense DDP iteration per batch, for small chains: the joint state of all samples, and every matrix formed.

    Backward through the stages, from V_x and V_xx (exact) of the loss at the output::

        Q_x  = f_x' V_x         Q_u  = weight_decay u + f_u' V_x
        Q_xx = f_x' V_xx f_x    Q_ux = f_u' V_xx f_x
        Q_uu = f_u' V_xx f_u + (1 / lr + damping + weight_decay) I
        k    = -Q_uu^-1 Q_u     K    = -Q_uu^-1 Q_ux
        V_x <- Q_x + Q_ux' k    V_xx <- Q_xx + Q_ux' K

    then forward: ``u <- u + k + K dx``, dx the change of the stage's input since the recorded pass, run again with the
    same random numbers (dropout) and without touching buffers. Dynamics are first-order, as in the paper's
    implementation, so that V_xx is a Gauss-Newton matrix. lr is a proximal weight: ``lr = inf`` leaves ``damping``.

    The loss is ``criterion(model(x), ...)``, times whatever scalar the backward pass shows; cost, gradient and Hessian
    are those of the loss itself (its mean over the batch, say). ``.grad`` is not used, nor clipping of it.

    Args:
        model: an ``nn.Sequential``; ``lr``, ``damping``, ``weight_decay`` live in its parameter group.
        criterion: the loss module; its first argument must be the model's output itself.
        lr: step size, > 0, ``inf`` allowed.
        damping: added to the diagonal of Q_uu at any lr, >= 0; default 0.03.
        weight_decay: coefficient of the stage cost ``|u|^2 / 2``, >= 0; default 0.
        memory_limit_gb: GiB that a step's matrices may take, > 0; default 4.

    Raises:
        ValueError: for a bad argument or a model that is no chain; by :meth:`step`, which then changes nothing, if
            the step would take more memory (the message says how much), unless there was one backward pass through
            model and criterion, if Q_uu is not positive definite, or the result not finite.

    Example:
        >>> model, criterion = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3)), nn.CrossEntropyLoss()
        >>> optimizer = VanillaDDP(model, criterion, lr=1.0)
        >>> criterion(model(torch.randn(16, 10)), torch.randint(3, (16,))).backward()
        >>> optimizer.step()
        >>> optimizer.close()  # takes the hooks off the model and the criterion
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        lr: float,
        *,
        damping: float = 0.03,
        weight_decay: float = 0.0,
        memory_limit_gb: float = 4.0,
    ) -> None:
        for name, value, valid in (
            ("criterion, an nn.Module,", criterion, isinstance(criterion, nn.Module)),
            ("lr > 0", lr, lr > 0),
            ("damping, finite and >= 0,", damping, 0 <= damping < math.inf),
            ("weight_decay, finite and >= 0,", weight_decay, 0 <= weight_decay < math.inf),
            ("memory_limit_gb > 0", memory_limit_gb, memory_limit_gb > 0),
        ):
            if not valid:
                raise ValueError(f"VanillaDDP needs {name} but got {value!r}")
        self._chain = Chain(model, criterion)
        super().__init__(model.parameters(), {"lr": lr, "damping": damping, "weight_decay": weight_decay})
        self._criterion, self._limit = criterion, memory_limit_gb

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step from the backward pass since the last step, or the one ``closure`` makes."""
        loss = None
        if closure is not None:
            self._chain.passes = []
            with torch.enable_grad():
                loss = closure()
        start, weight = self._chain.take()
        visits, output = self._chain.sweep(start, DTYPE)
        self._check_memory(visits, output)
        value, policies = terminal(self._criterion, start, weight, output), []
        for t in reversed(range(len(visits))):
            l_u, R = self._stage_cost(visits[t])
            try:
                policy, value = bellman(value, *linearised(visits[t], with_state=t > 0), l_u, R)
            except ValueError as error:
                raise ValueError(f"VanillaDDP, stage {t}: {error}; nothing was changed") from error
            policies.append(policy)
        new = rollout(visits, policies[::-1])
        if not all(bool(torch.isfinite(p).all()) for p in new.values()):
            raise ValueError("VanillaDDP: the step is not finite; nothing was changed")
        for p, moved in new.items():
            p.copy_(moved)
        return loss

    def _check_memory(self, visits: Sequence[Visit], output: Tensor) -> None:
        states = [*(visit.x.numel() for visit in visits), output.numel()]
        params = [sum(p.numel() for p in visit.trained.values()) for visit in visits]
        needed = memory(states, params)
        if needed > self._limit:
            raise ValueError(
                f"VanillaDDP would take about {needed:.3g} GiB for this model and batch (joint states of up to "
                f"{max(states[1:])} numbers, stages of up to {max(params)} parameters); the limit, memory_limit_gb, is "
                f"{self._limit:.3g} GiB: take a smaller batch or network, or raise it"
            )

    def _stage_cost(self, visit: Visit) -> tuple[Tensor, Tensor]:
        """Gradient of the stage cost, and the diagonal R of Q_uu, both ``[P]``."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        l_u, R = [visit.x.new_zeros(0, dtype=DTYPE)], [visit.x.new_zeros(0, dtype=DTYPE)]
        for p in visit.trained.values():
            lr, damping, decay = (groups[p][name] for name in ("lr", "damping", "weight_decay"))
            if not lr > 0:
                raise ValueError(f"VanillaDDP needs lr > 0 but got {lr!r}; nothing was changed")
            l_u.append(decay * cast(p, DTYPE).flatten())
            R.append(torch.full_like(l_u[-1], 1 / lr + damping + decay))
        return torch.cat(l_u), torch.cat(R)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and forget backward passes that were not stepped on."""
        self._chain.passes = []
        super().zero_grad(set_to_none)

    def close(self) -> None:
        """Take the hooks off the model and the criterion; :meth:`step` raises ``ValueError`` afterwards."""
        self._chain.close()
