"""E-MSA, the extended method of successive approximations: Pontryagin's maximum principle, layer by layer.

Source: Li, Chen, Tai, E, *Maximum Principle Based Algorithms for Deep Learning*, JMLR 18(165), 2018
(arXiv 1710.09513), Algorithm 2, on mini-batches. :class:`Chain` cuts a model into stages and replays them; the
dense DDP baseline uses it too.

Shapes: B samples; x_n ``[B, ...]`` enters stage n and x_{n+1} leaves it; the costate p_n is shaped like x_n.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import LBFGS, Optimizer

# --- A model as a chain of stages --------------------------------------------------------------------------


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

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that require a gradient, by name."""
        return {name: p for name, p in self.stage.named_parameters() if p.requires_grad}

    def call(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The stage's output from ``x`` with some parameters replaced; its buffers are not written to."""
        own = {**dict(self.stage.named_parameters()), **dict(self.stage.named_buffers())}
        tensors = {name: params[name] if name in params else cast(t, self.dtype) for name, t in own.items()}
        output: Tensor = functional_call(self.stage, tensors, (x,))
        return output

    def replay(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The same with the recorded pass's random numbers (dropout masks)."""
        with _replayed(self.random, x.device):
            return self.call(params, x)


@dataclass
class Pass:
    """One forward pass: the first stage's input, the random state then, and the gradient that came back.

    ``gradient`` is the loss's at the model's output or, where there is a criterion, at the criterion's, whose
    further arguments are ``args`` and ``kwargs``.
    """

    x: Tensor
    random: list[Tensor]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    gradient: Tensor | None = None


class Chain:
    """Stages of a model, and the hooks that record what is fed through it.

    A stage is a layer with parameters and the modules without any that follow it, up to the next layer; modules
    before the first layer belong to no stage.

    Args:
        model: an ``nn.Sequential``; it may hold others.
        criterion: a module called on the model's output; if given, gradients are recorded at its output.

    Raises:
        ValueError: if the model is no ``nn.Sequential``, has no parameters, or shares one between layers.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module | None = None) -> None:
        if not _is_sequence(model):
            raise ValueError(f"the model must be an nn.Sequential (it may hold others), got {type(model).__name__}")
        groups: list[list[nn.Module]] = []
        for module in _members(model):
            groups += [[]] if any(True for _ in module.parameters()) else []
            if groups:
                groups[-1].append(module)
        self.stages = [nn.Sequential(*group) for group in groups]
        uses = Counter(p for stage in self.stages for p in stage.parameters())
        if set(uses.values()) != {1}:
            raise ValueError("the model has no parameters, or layers that share one; every stage needs its own")
        self.passes: list[Pass] = []
        self._entered: Pass | None = None
        self._left: Callable[[], Tensor | None] = lambda: None
        self._hooks = [
            groups[0][0].register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave if criterion else self._keep_gradient),
        ]
        if criterion is not None:
            self._hooks.append(criterion.register_forward_hook(self._score, with_kwargs=True))

    def _enter(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        self._entered = Pass(x.detach(), _random_state(x.device)) if torch.is_grad_enabled() else None

    def _leave(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self._left = ref(output)

    def _score(self, criterion: nn.Module, args: Any, kwargs: Mapping[str, Any], value: Tensor) -> None:
        if self._entered is not None and args and args[0] is self._left():
            self._entered.args, self._entered.kwargs = args[1:], kwargs
            self._keep_gradient(criterion, args, value)

    def _keep_gradient(self, _: nn.Module, __: Any, output: Tensor) -> None:
        entered, self._entered = self._entered, None
        if entered is None or not output.requires_grad:
            return

        def keep(gradient: Tensor) -> None:
            if entered.gradient is None:  # a pass that backward does not come by is not kept
                self.passes.append(entered)
            entered.gradient = gradient.detach() if entered.gradient is None else entered.gradient + gradient

        output.register_hook(keep)  # type: ignore[no-untyped-call]

    def take(self) -> tuple[Pass, Tensor]:
        """The pass since the last step and its gradient; ``ValueError`` unless there is exactly one."""
        passes, self.passes = self.passes, []
        if not self._hooks:
            raise ValueError("this optimizer has been closed and does not see the model: make a new one")
        if len(passes) != 1 or passes[0].gradient is None:
            raise ValueError(f"a step needs one backward pass through the model before it, there were {len(passes)}")
        return passes[0], passes[0].gradient

    def sweep(self, start: Pass, dtype: torch.dtype) -> tuple[list[Visit], Tensor]:
        """The stages with their inputs, and the last one's output, as in that pass but in ``dtype``."""
        visits, x = [], cast(start.x, dtype)
        with torch.no_grad(), _replayed(start.random, x.device):
            for stage in self.stages:
                visits.append(Visit(stage, x, _random_state(x.device), dtype))
                x = visits[-1].call({}, x.clone())
        self._entered = None  # the first stage's hook has seen this too
        return visits, x

    def close(self) -> None:
        """Take the hooks off the model and the criterion."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.passes, self._entered = [], [], None


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _members(module: nn.Module) -> list[nn.Module]:
    if not _is_sequence(module):
        return [module]
    return [member for child in module._modules.values() if child is not None for member in _members(child)]


# --- The method --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What one stage minimises over its parameters theta, everything else frozen::

        ( -H + rho/2 |x_{n+1} - f(x_n, theta)|^2 + rho/2 |p_n - grad_x H|^2 ) / B + weight_decay/2 |theta|^2

    with ``H = p_{n+1} . f(x_n, theta)`` summed over the batch. At the current theta x_{n+1} and p_n are what the
    stage itself makes of x_n and p_{n+1}, so both penalties and their gradients vanish there.

    Args:
        visit: the stage f and x_n.
        p_next: the costate p_{n+1}: minus the gradient of each sample's own loss.
        x_next, p: x_{n+1} and p_n (``None`` where x_n holds integers, which leaves its penalty out).
        rho: weight of the penalties.
        decay: weight_decay of each parameter, by name.
    """

    visit: Visit
    p_next: Tensor
    x_next: Tensor
    p: Tensor | None
    rho: float
    decay: Mapping[str, float]

    def __call__(self, theta: Mapping[str, Tensor]) -> Tensor:
        """The objective []; differentiable in theta."""
        f, H, p = hamiltonian(self.visit, theta, self.p_next, penalised=self.rho > 0)
        total = -H
        if self.rho > 0:
            total = total + self.rho / 2 * (self.x_next - f).square().sum()
            total = total + (self.rho / 2 * (self.p - p).square().sum() if self.p is not None else 0)
        regular = [self.decay[name] / 2 * t.square().sum() for name, t in theta.items() if self.decay[name]]
        return total / len(f) + sum(regular)


def hamiltonian(
    visit: Visit, theta: Mapping[str, Tensor], p_next: Tensor, penalised: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``f(x_n, theta)``, H summed over the batch, and ``grad_x H`` as a function of theta (if it is wanted)."""
    x = visit.x.clone().requires_grad_(penalised and visit.x.is_floating_point())
    f = visit.replay(theta, x.view_as(x))  # an in-place module may come first
    H = (p_next * f).sum()
    return f, H, torch.autograd.grad(H, x, create_graph=True)[0] if x.requires_grad else None


def minimised(
    problem: Callable[[dict[str, Tensor]], Tensor], start: Mapping[str, Tensor], iterations: int
) -> list[Tensor]:
    """L-BFGS (``torch.optim.LBFGS``: history 10, strong Wolfe line search) from ``start``."""
    theta = {name: t.detach().clone().requires_grad_() for name, t in start.items()}
    solver = LBFGS(
        theta.values(), max_iter=iterations, max_eval=25 * iterations, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        value = problem(theta)
        gradients = torch.autograd.grad(value, list(theta.values()), allow_unused=True)
        for t, gradient in zip(theta.values(), gradients, strict=True):
            t.grad = torch.zeros_like(t) if gradient is None else gradient
        return float(value.detach())

    solver.step(closure)
    return [t.detach() for t in theta.values()]


class EMSA(Optimizer):
    """Maximise every stage's augmented Hamiltonian by itself, for one batch (E-MSA).

    One backward pass gives the states x_n and costates p_n; each stage then moves, alone, by

        theta <- theta + lr * (theta* - theta),     theta* = inner_iterations of L-BFGS on :class:`Problem`

    warm-started at its weights. The first inner direction is the back-propagated gradient with its decay; rho holds
    the stage to the states and costates its neighbours assume. With ``rho = 0`` (plain MSA) a stage that is linear
    in theta has no minimum unless ``weight_decay > 0``.

    Choices: inner solver ``torch.optim.LBFGS`` (history 10, strong Wolfe), the authors' is SciPy's L-BFGS-B, also
    without bounds; no perturbation of its start. The regulariser is ``weight_decay/2 |theta|^2``. Costates are
    gradients of each sample's own loss, and H and both penalties are means over the batch, so rho means the same for
    every batch size; in the authors' code p carries the 1/B of the mean loss while the penalties are sums, so that
    their rho acts as ``rho B`` on the states and ``rho / B`` on the costates in the units used here. Their code draws
    the same batches in every epoch; here they are the loader's (shuffle it).

    Args:
        model: an ``nn.Sequential``; its parameters form one group with ``lr``, ``rho``, ``weight_decay``.
        lr: fraction of the way to theta*, >= 0; default 1, the published method.
        rho: weight of the two penalties, >= 0.
        inner_iterations: L-BFGS iterations per stage and batch, >= 1; default 10.
        weight_decay: coefficient of ``|theta|^2 / 2`` beside the mean loss, >= 0; default 0.
        reduction: of the loss over samples, ``"mean"`` (default) or ``"sum"``; tells a sample's own gradient.

    Raises:
        ValueError: for a bad argument or a model that is no chain (see :class:`Chain`); by :meth:`step`, which
            then changes nothing, unless there was one backward pass and the result is finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3))
        >>> x, y = torch.randn(64, 10), torch.randint(3, (64,))
        >>> optimizer = EMSA(model, rho=1.0)
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
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
        for name, value, valid in (
            ("lr, finite and >= 0,", lr, 0 <= lr < math.inf),
            ("rho, finite and >= 0,", rho, 0 <= rho < math.inf),
            ("inner_iterations >= 1", inner_iterations, isinstance(inner_iterations, int) and inner_iterations >= 1),
            ("weight_decay, finite and >= 0,", weight_decay, 0 <= weight_decay < math.inf),
            ("reduction 'mean' or 'sum'", reduction, reduction in ("mean", "sum")),
        ):
            if not valid:
                raise ValueError(f"EMSA needs {name} but got {value!r}")
        super().__init__(model.parameters(), {"lr": lr, "rho": rho, "weight_decay": weight_decay})
        self._iterations, self._mean = inner_iterations, reduction == "mean"
        self._chain = Chain(model)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step from the backward pass since the last step, or the one ``closure`` makes; ``.grad`` is not used."""
        loss = None
        if closure is not None:
            self._chain.passes = []
            with torch.enable_grad():
                loss = closure()
        start, gradient = self._chain.take()
        groups = {p: group for group in self.param_groups for p in group["params"] if p.requires_grad}
        new: dict[Tensor, Tensor] = {}
        for problem in self._problems(start, gradient, groups):
            params = problem.visit.trained()
            with torch.enable_grad():
                best = minimised(
                    problem, {n: cast(p, problem.visit.dtype) for n, p in params.items()}, self._iterations
                )
            for p, theta in zip(params.values(), best, strict=True):
                new[p] = p.lerp(theta.to(p.dtype), groups[p]["lr"])
                if not bool(torch.isfinite(new[p]).all()):
                    raise ValueError("EMSA: an inner solution is not finite; nothing was changed")
        for p, moved in new.items():
            p.copy_(moved)
        return loss

    def _problems(self, start: Pass, gradient: Tensor, groups: dict[Tensor, dict[str, Any]]) -> Iterator[Problem]:
        """The stages' problems, last stage first; each costate is pulled back on the way."""
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        visits, x_next = self._chain.sweep(start, dtype)
        p_next = -cast(gradient, dtype) * (len(gradient) if self._mean else 1)
        for visit in reversed(visits):
            params = visit.trained()
            with torch.enable_grad():
                _, __, p = hamiltonian(visit, {}, p_next)
            p = None if p is None else p.detach()
            if params:
                rho = groups[next(iter(params.values()))]["rho"]
                decay = {name: groups[q]["weight_decay"] for name, q in params.items()}
                yield Problem(visit, p_next, x_next, p, rho, decay)
            if p is None:
                return
            x_next, p_next = visit.x, p

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and forget backward passes that were not stepped on."""
        self._chain.passes = []
        super().zero_grad(set_to_none)

    def close(self) -> None:
        """Take the hooks off the model; :meth:`step` raises ``ValueError`` afterwards."""
        self._chain.close()
