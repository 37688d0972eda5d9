"""E-MSA, the extended method of successive approximations: Pontryagin's maximum principle, layer by layer.

Source: Li, Chen, Tai, E, *Maximum Principle Based Algorithms for Deep Learning*, JMLR 18(165), 2018 (arXiv 1710.09513),
Algorithm 2, on mini-batches. :class:`Chain` cuts a model into stages and replays them; dense DDP uses it too.
Shapes: B samples; x_n ``[B, ...]`` enters stage n and x_{n+1} leaves it; the costate p_n is shaped like x_n.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import LBFGS, Optimizer

Theta = Mapping[str, Tensor]  # parameters of a stage, by name


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A detached copy, in ``dtype`` unless it holds integers."""
    return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextmanager
def _replayed(random: list[Tensor], device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] * (len(random) - 1)):
        torch.set_rng_state(random[0])
        for state in random[1:]:
            torch.cuda.set_rng_state(state, device)
        yield


@dataclass(frozen=True)
class Visit:
    """A stage, its input x_n, the random state in which it ran, and the dtype to compute in."""

    stage: nn.Sequential
    x: Tensor
    random: list[Tensor]
    dtype: torch.dtype

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that require a gradient, by name."""
        return {name: p for name, p in self.stage.named_parameters() if p.requires_grad}

    def run(self, params: Theta, x: Tensor) -> Tensor:
        """The stage's output from ``x`` with some parameters replaced; its buffers are not written to."""
        own = {**dict(self.stage.named_parameters()), **dict(self.stage.named_buffers())}
        rest = {name: cast(tensor, self.dtype) for name, tensor in own.items() if name not in params}
        return torch.as_tensor(functional_call(self.stage, {**rest, **params}, (x,)))

    def replay(self, params: Theta, x: Tensor) -> Tensor:
        """The same with the random numbers of the recorded pass: dropout draws the masks it drew then."""
        with _replayed(self.random, x.device):
            return self.run(params, x)


@dataclass
class Pass:
    """One forward pass and the gradient that came back."""

    x: Tensor  # input of the first stage
    random: list[Tensor]  # state of the generators then
    args: tuple[Any, ...] = ()  # what the criterion was given after the model's output
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    gradient: Tensor | None = None  # of the loss, at the criterion's output; without a criterion at the model's


class Chain:
    """Stages of an ``nn.Sequential`` (it may hold others), and the hooks that record what is fed through it.

    A stage is a layer with parameters and the modules without any up to the next; what precedes the first is in none.
    With a ``criterion``, a module called on the model's output, the gradient is recorded at its output. A
    ``ValueError`` says that the model is no ``nn.Sequential``, has no parameters, or shares one between layers.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module | None = None) -> None:
        members, groups = _members(model), list[list[nn.Module]]()
        if members == [model]:
            raise ValueError(f"the model must be an nn.Sequential (it may hold others), got {type(model).__name__}")
        for module in members:
            if any(True for _ in module.parameters()):
                groups.append([module])
            elif groups:
                groups[-1].append(module)
        self.stages = [nn.Sequential(*group) for group in groups]
        if set(Counter(p for stage in self.stages for p in stage.parameters()).values()) != {1}:
            raise ValueError(
                "every stage needs parameters of its own, but the model has none, or layers that share one"
            )
        self.passes: list[Pass] = []
        self._entered: Pass | None = None
        self._output: Callable[[], Tensor | None] = lambda: None
        at_model = self._left if criterion else self._keep_gradient
        self._hooks = [groups[0][0].register_forward_pre_hook(self._enter), model.register_forward_hook(at_model)]
        if criterion is not None:
            self._hooks.append(criterion.register_forward_hook(self._score, with_kwargs=True))

    def _enter(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        self._entered = Pass(x.detach(), _random_state(x.device)) if torch.is_grad_enabled() else None

    def _left(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self._output = ref(output)

    def _score(self, _: nn.Module, args: Any, kwargs: Mapping[str, Any], value: Tensor) -> None:
        if self._entered is not None and args and args[0] is self._output():
            self._entered.args, self._entered.kwargs = args[1:], kwargs
            self._keep_gradient(_, args, value)

    def _keep_gradient(self, _: nn.Module, __: Any, output: Tensor) -> None:
        entered, self._entered = self._entered, None
        if entered is None or not output.requires_grad:
            return

        def keep(gradient: Tensor) -> None:
            if entered.gradient is None:  # a pass that backward does not come by is not kept
                self.passes.append(entered)
            entered.gradient = gradient.detach() if entered.gradient is None else entered.gradient + gradient

        output.register_hook(keep)

    def take(self) -> tuple[Pass, Tensor]:
        """The pass since the last step and its gradient; ``ValueError`` unless there is exactly one."""
        passes, self.passes = self.passes, []
        if not self._hooks:
            raise ValueError("this optimizer has been closed and does not see the model: make a new one")
        if len(passes) == 1 and passes[0].gradient is not None:
            return passes[0], passes[0].gradient
        raise ValueError(f"a step needs one backward pass through the model before it, there were {len(passes)}")

    def sweep(self, start: Pass, dtype: torch.dtype) -> tuple[list[Visit], Tensor]:
        """The stages with their inputs, and the last one's output, as in that pass but in ``dtype``."""
        visits, x = [], cast(start.x, dtype)
        with torch.no_grad(), _replayed(start.random, x.device):
            for stage in self.stages:
                visits.append(Visit(stage, x, _random_state(x.device), dtype))
                x = visits[-1].run({}, x)
        return visits, x

    def close(self) -> None:
        """Take the hooks off the model and the criterion."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.passes, self._entered = [], [], None


def _members(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return [member for child in module._modules.values() for member in _members(child)]
    return [module]


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
