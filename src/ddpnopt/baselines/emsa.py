"""E-MSA, the extended method of successive approximations: Pontryagin's maximum principle, layer by layer.

Source: Li, Chen, Tai, E, *Maximum Principle Based Algorithms for Deep Learning*, JMLR 18(165), 2018 (arXiv 1710.09513),
Algorithm 2, on mini-batches.
Shapes: B samples; x_n ``[B, ...]`` enters stage n and x_{n+1} leaves it; the costate p_n is shaped like x_n.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ddpnopt.baselines.chain import Chain, Theta, Visit, cast


@torch.enable_grad()
def hamiltonian(visit: Visit, theta: Theta, p_next: Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """``f(x_n, theta)``, ``H = p_{n+1} . f`` summed over the batch, and, if wanted, ``grad_x H`` (not of integers)."""
    x = visit.x.detach().requires_grad_(wanted and visit.x.is_floating_point())
    f = visit.replay(theta, x)
    H = (p_next * f).sum()
    return f, H, torch.autograd.grad(H, x, create_graph=bool(theta))[0] if x.requires_grad else None


def objective(
    visit: Visit, p_next: Tensor, x_next: Tensor, p: Tensor | None, rho: float, decay: Mapping[str, float], theta: Theta
) -> Tensor:
    """What a stage minimises over theta, the mean over the batch of the augmented Hamiltonian with its sign turned::

        ( -H + rho/2 |x_{n+1} - f(x_n, theta)|^2 + rho/2 |p_n - grad_x H|^2 ) / B + decay/2 |theta|^2

    x_{n+1} and p_n are what the current theta makes of x_n and p_{n+1}: the penalties and their gradients vanish there.
    """
    f, total, grad_x = hamiltonian(visit, theta, -p_next, wanted=rho > 0)
    total = total + rho / 2 * (x_next - f).square().sum()
    if grad_x is not None and p is not None:
        total = total + rho / 2 * (p + grad_x).square().sum()
    return total / len(f) + sum(decay[name] / 2 * t.square().sum() for name, t in theta.items())


@torch.enable_grad()
def minimised(function: Callable[[Theta], Tensor], start: Theta, iterations: int) -> list[Tensor]:
    """Where L-BFGS (``torch.optim.LBFGS``, history 10, strong Wolfe line search) gets to from ``start``."""
    theta = {name: t.clone().requires_grad_() for name, t in start.items()}
    history: Any = {"max_eval": 25 * iterations, "history_size": 10, "line_search_fn": "strong_wolfe"}
    solver: Optimizer = LBFGS(theta.values(), max_iter=iterations, **history)

    def closure() -> float:
        solver.zero_grad()
        value = function(theta)
        torch.autograd.backward(value)
        return float(value.detach())

    solver.step(closure)
    return [t.detach() for t in theta.values()]


class EMSA(Optimizer):
    """Maximise every stage's augmented Hamiltonian by itself, batch by batch (E-MSA).

    One backward pass gives the states x_n and costates p_n; then each stage moves, alone, by
    ``theta <- theta + lr * (theta* - theta)``, where theta* is what ``inner_iterations`` of L-BFGS make of
    :func:`objective` from theta. The first inner direction is the back-propagated gradient with its decay; rho holds
    a stage to the states and costates its neighbours count on. With ``rho = 0`` (plain MSA) a stage linear in theta
    has no minimum unless ``weight_decay > 0``.

    Choices: the inner solver is torch's L-BFGS, the authors' SciPy's L-BFGS-B (also without bounds); its start is not
    perturbed. Costates are minus the gradients of each sample's own loss, H and the penalties means over the batch, so
    rho means the same at every batch size. In the authors' code p carries the mean loss's 1/B and penalties are sums:
    their rho acts as ``rho B`` on states and ``rho / B`` on costates in the units used here. Their code draws the same
    batches in every epoch; here they are the loader's, so shuffle it.

    Args:
        model: an ``nn.Sequential``; ``lr``, ``rho``, ``weight_decay`` live in its parameter group.
        lr: fraction of the way to theta*, >= 0; default 1, the published method.
        rho: weight of the two penalties, >= 0.
        inner_iterations: L-BFGS iterations per stage and batch, >= 1; default 10.
        weight_decay: coefficient of ``|theta|^2 / 2`` beside the mean loss, >= 0; default 0.
        reduction: of the loss over samples, ``"mean"`` (default) or ``"sum"``; tells a sample's own gradient.

    Raises:
        ValueError: for a bad argument or a model that is no chain (see :class:`Chain`); by :meth:`step`, which then
            changes nothing, unless there was one backward pass and the result is finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> optimizer = EMSA(model, rho=1.0)
        >>> nn.functional.cross_entropy(model(torch.randn(64, 10)), torch.randint(3, (64,))).backward()
        >>> optimizer.step()
        >>> optimizer.close()  # takes the hooks off the model
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        *,
        rho: float,
        inner_iterations: int = 10,
        weight_decay: float = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        for name, value in (group := {"lr": lr, "rho": rho, "weight_decay": weight_decay}).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"EMSA needs {name}, finite and >= 0, but got {value!r}")
        if not isinstance(inner_iterations, int) or inner_iterations < 1:
            raise ValueError(f"EMSA needs inner_iterations >= 1 but got {inner_iterations!r}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"EMSA needs reduction 'mean' or 'sum' but got {reduction!r}")
        self._chain = Chain(model)
        super().__init__(model.parameters(), group)
        self._iterations, self._mean = inner_iterations, reduction == "mean"

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step from the backward pass since the last step, or the one ``closure`` makes; ``.grad`` is not used."""
        loss = None
        if closure is not None:
            self._chain.passes = []
            with torch.enable_grad():
                loss = closure()
        start, gradient = self._chain.take()
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        visits, x_next = self._chain.sweep(start, dtype)
        p_next = -cast(gradient, dtype) * (len(gradient) if self._mean else 1)
        groups = {p: group for group in self.param_groups for p in group["params"]}
        new: dict[Tensor, Tensor] = {}
        for visit in reversed(visits):
            p = hamiltonian(visit, {}, p_next, wanted=True)[2]
            if params := visit.trained:
                rho = groups[next(iter(params.values()))]["rho"]
                decay = {name: groups[w]["weight_decay"] for name, w in params.items()}
                problem = partial(objective, visit, p_next, x_next, p, rho, decay)
                best = minimised(problem, {name: cast(w, dtype) for name, w in params.items()}, self._iterations)
                new |= {w: w.lerp(t.to(w.dtype), groups[w]["lr"]) for w, t in zip(params.values(), best, strict=True)}
            if p is not None:  # else x_n is integer, and no stage comes before
                x_next, p_next = visit.x, p.detach()
        if not all(bool(torch.isfinite(t).all()) for t in new.values()):
            raise ValueError("EMSA: an inner solution is not finite; nothing was changed")
        for weight, moved in new.items():
            weight.copy_(moved)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and forget backward passes that were not stepped on."""
        self._chain.passes = []
        super().zero_grad(set_to_none)

    def close(self) -> None:
        """Take the hooks off the model; :meth:`step` raises ``ValueError`` afterwards."""
        self._chain.close()
