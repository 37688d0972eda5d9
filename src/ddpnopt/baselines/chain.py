"""A chain cut into stages, recorded and run again: what the baselines from optimal control share.

Shapes: B samples; x_n ``[B, ...]`` enters stage n and x_{n+1} leaves it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.func import functional_call

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
