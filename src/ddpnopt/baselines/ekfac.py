"""EKFAC: descent preconditioned by second moments in K-FAC's eigenbasis.

Source: George, Laurent, Bouthillier, Ballas, Vincent, *Fast Approximate Natural Gradient Descent in a
Kronecker-factored Eigenbasis*, NeurIPS 2018 (arXiv 1806.03884), Algorithm 1; running averages: EKFAC-ra.

Shapes: B samples, P positions (time steps, pixels). A layer's parameters are one matrix ``[out, fan]``,
``weight.reshape(out, -1)`` with the bias as last column; g_n ``[out, fan]`` is the gradient of sample n's own
loss. A batch's moments are ``A [fan, fan]``, ``S [out, out]`` and ``squares(Q_S, Q_A)``, the elementwise
``mean_n (Q_S' g_n Q_A)^2 [out, fan]``.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
Moments = tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]


@dataclass(frozen=True)
class Curvature:
    """``M = (Q_S (x) Q_A) diag(E) (Q_S (x) Q_A)'`` of one layer."""

    updates: int  # batches counted in
    A: Tensor  # [fan, fan], Kronecker factor
    S: Tensor  # [out, out], the other
    Q_A: Tensor  # eigenvectors of A, in columns, as of the last refresh
    Q_S: Tensor
    E: Tensor  # [out, fan], second moments of the g_n in that basis

    def solve(self, d: Tensor, damping: float) -> Tensor:
        """``(M + damping)^-1 d``, both ``[out, fan]``."""
        return self.Q_S @ (self.Q_S.T @ d @ self.Q_A / (self.E + damping)) @ self.Q_A.T


def linear_moments(x: Tensor, v: Tensor) -> Moments:
    """``A = sum x x'/B``, ``S = sum v v'/(B P)``; inputs x ``[B, P, fan]``, gradients v ``[B, P, out]``."""
    B, P, _ = x.shape
    rows, columns = x.flatten(0, 1), v.flatten(0, 1)

    def squares(Q_S: Tensor, Q_A: Tensor) -> Tensor:
        a, b = x @ Q_A, v @ Q_S
        if P == 1:  # (b_n a_n')^2 = b_n^2 a_n^2': no gradient is formed
            return b[:, 0].square().T @ a[:, 0].square() / B
        return (b.mT @ a).square().mean(0)

    return rows.T @ rows / B, columns.T @ columns / (B * P), squares


def conv_moments(g: Tensor) -> Moments:
    """``A, S = mean_n g'g, g g'``, each over ``sqrt(mean_n |g|^2)`` unless that is 0; g ``[B, out, fan]``."""
    rows, columns = g.flatten(0, 1), g.transpose(0, 1).flatten(1)
    norm = (g.square().sum() / len(g)).sqrt()
    scale = torch.where(norm == 0, 0.0, 1 / (len(g) * norm))
    squares = lambda Q_S, Q_A: (Q_S.T @ g @ Q_A).square().mean(0)  # noqa: E731
    return rows.T @ rows * scale, columns @ columns.T * scale, squares


def conv_weight_gradients(layer: nn.Conv1d | nn.Conv2d, x: Tensor, v: Tensor) -> Tensor:
    """``[B, out, fan]`` by one convolution: each sample is a group of a single image, so none are summed."""
    B, n, padding = len(x), x.ndim - 2, layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):  # as the layer's forward does
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0,) * n
    if layer.groups == 1 and layer.in_channels % 8 and (x.dtype, x.device.type) == (torch.float32, "cpu"):
        # a processor is slow at that unless channels come by the eight: patches of the inputs instead
        x = nn.functional.pad(x, [side for own in reversed(padding) for side in (own, own)])
        for i, (k, stride, d) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
            x = x.unfold(2 + i, d * (k - 1) + 1, stride)[..., ::d]
        x = x.permute(0, 1, *range(2 + n, 2 + 2 * n), *range(2, 2 + n)).flatten(1, 1 + n)
        return (x.flatten(2) @ v.flatten(2).mT).mT
    like = x.new_empty(1).expand(B * layer.out_channels, *layer.weight.shape[1:])
    x, v = x.reshape(1, -1, *x.shape[2:]), v.reshape(1, -1, *v.shape[2:])
    geometry = (layer.stride, padding, layer.dilation, False, (0,) * n, B * layer.groups, (False, True, False))
    g = torch.ops.aten.convolution_backward(v, x, like, None, *geometry)[1]
    return Tensor.reshape(g, (B, layer.out_channels, -1))


def moments(layer: Layer, x: Tensor, v: Tensor, weight: bool, bias: bool) -> Moments:
    """Moments from a layer's input, the gradients v at its output, and which parameters are trained."""
    if x.ndim < (2 if isinstance(layer, nn.Linear) else layer.weight.ndim):
        raise ValueError(f"its input needs a batch dimension, got shape {list(x.shape)}")
    if isinstance(layer, nn.Linear):
        x, v = x.reshape(len(x), -1, x.shape[-1]), v.reshape(len(v), -1, v.shape[-1])
        return linear_moments(torch.cat([x] * weight + [torch.ones_like(x[..., :1])] * bias, 2), v)
    sides = [conv_weight_gradients(layer, x, v)] if weight else []
    return conv_moments(torch.cat(sides + [v.flatten(2).sum(2, keepdim=True)] * bias, 2))


def eigenbasis(factor: Tensor, last: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix, in columns; on failure again in float64, then ``last``."""
    for symmetric in ((factor + factor.T) / 2, ((factor + factor.T) / 2).double()):
        with suppress(RuntimeError):  # torch.linalg.LinAlgError is one
            return Tensor.to(torch.linalg.eigh(symmetric)[1].contiguous(), factor.dtype)
    return last


def updated(old: Curvature | None, new: Moments, *, beta: float, refresh_every: int, running: bool) -> Curvature:
    """The curvature with one more batch counted in: factors, then the basis if it is due, then E.

    The t-th batch enters a moving average as ``X <- w X + (1 - w) X_batch``, ``w = min(beta, 1 - 1/t)``.
    """
    A, S, squares = new
    if old is None or (old.A.shape, old.S.shape) != (A.shape, S.shape):  # the first, or frozen differently
        Q_A, Q_S = (torch.eye(len(X), dtype=X.dtype, device=X.device) for X in (A, S))
        old = Curvature(0, A, S, Q_A, Q_S, A.new_zeros(len(S), len(A)))
    t = old.updates + 1
    w = min(beta, 1 - 1 / t)
    A, S, Q_A, Q_S = w * old.A + (1 - w) * A, w * old.S + (1 - w) * S, old.Q_A, old.Q_S
    if (t - 1) % refresh_every == 0:
        Q_A, Q_S = eigenbasis(A, Q_A), eigenbasis(S, Q_S)
    E = squares(Q_S, Q_A)
    return Curvature(t, A, S, Q_A, Q_S, w * old.E + (1 - w) * E if running else E)


class EKFAC(Optimizer):
    """Gradient descent preconditioned by EKFAC's curvature, layer by layer.

    In each step, for each ``nn.Linear`` (input ``[B, P..., in]``), ``nn.Conv1d`` and ``nn.Conv2d``::

        A, S      = moving averages of the Kronecker factors
        Q_A, Q_S  = their eigenvectors, every refresh_every steps
        E         = moving average of mean_n (Q_S' g_n Q_A)^2
        direction = Q_S [ (Q_S' d Q_A) / (E + damping) ] Q_A',      d = .grad + weight_decay * u
        buffer    = momentum * buffer + direction,                  u <- u - lr * buffer

    The past's weight in an average is ``min(beta, 1 - 1/t)``. Linear: ``A = sum x x'/B``,
    ``S = sum v v'/(B P)``, x with a 1 for the bias, v gradients of each sample's own loss at the output.
    Convolution: ``A = mean_n g'g / sqrt(tau)``, ``S = mean_n g g' / sqrt(tau)``, ``tau = mean_n |g|^2``;
    George et al. have moments of patches and output gradients; trace and Kronecker structure are the same, E
    is measured in the basis either way. Convolutions, and Linear layers with P > 1, form per-sample gradients,
    ``B * out * fan`` numbers. All else (norms, tied weights, layers not called as modules) takes a plain SGD
    step; frozen parameters are skipped. Not for ``torch.amp.GradScaler``, whose scale would stay in the
    recorded gradients (bfloat16 needs none).

    Args:
        model: the network; ``lr``, ``damping``, ``momentum``, ``weight_decay`` live in its parameter group.
        lr: step size, >= 0.
        damping: added to E, > 0, in the unit of a squared gradient of one sample's loss; default 0.03.
        refresh_every: steps between two computations of the eigenbases; default 10.
        beta: largest weight of the past in the averages, in [0, 1); default 0.95.
        momentum: heavy-ball factor on the direction, in [0, 1); default 0.
        weight_decay: coefficient of ``|u|^2 / 2`` in the objective, >= 0; default 0.
        second_moment: ``"running"`` (default) for the moving average of E, ``"batch"`` for the batch's.
        reduction: the loss's over samples; ``"mean"`` (default) scales recorded gradients by B.

    Raises:
        ValueError: for a bad argument; by :meth:`step`, which then changes nothing, if the result is
            not finite, if a layer was in several backward passes since the last step, and when closed.

    Example:
        >>> model, x, y = nn.Linear(10, 3), torch.randn(64, 10), torch.randint(3, (64,))
        >>> optimizer = EKFAC(model, lr=0.05)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
        >>> optimizer.close()  # takes the hooks off the model
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        damping: float = 0.03,
        refresh_every: int = 10,
        beta: float = 0.95,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        second_moment: Literal["running", "batch"] = "running",
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        for name, value, valid in (
            ("lr, finite and >= 0,", lr, 0 <= lr < math.inf),
            ("damping, finite and > 0,", damping, 0 < damping < math.inf),
            ("refresh_every >= 1", refresh_every, isinstance(refresh_every, int) and refresh_every >= 1),
            ("beta in [0, 1)", beta, 0 <= beta < 1),
            ("momentum in [0, 1)", momentum, 0 <= momentum < 1),
            ("weight_decay, finite and >= 0,", weight_decay, 0 <= weight_decay < math.inf),
            ("second_moment 'running' or 'batch'", second_moment, second_moment in ("running", "batch")),
            ("reduction 'mean' or 'sum'", reduction, reduction in ("mean", "sum")),
        ):
            if not valid:
                raise ValueError(f"EKFAC needs {name} but got {value!r}")
        group = {"lr": lr, "damping": damping, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(model.parameters(), group)
        running = second_moment == "running"
        self._updated = partial(updated, beta=beta, refresh_every=refresh_every, running=running)
        self._mean = reduction == "mean"
        self._layers = _layers(model)
        self._curvature: dict[str, Curvature] = {}
        self._passes: dict[str, list[list[Tensor]]] = {}  # by layer: [input, output gradient] per backward
        self._closed = False
        named = self._layers.items()
        self._hooks = [m.register_forward_hook(partial(self._record, n), with_kwargs=True) for n, m in named]

    def _record(self, name: str, _: Layer, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> None:
        if not output.requires_grad:  # torch.no_grad(), or nothing to train up to here
            return
        seen = [(args[0] if args else kwargs["input"]).detach()]

        def keep(v: Tensor) -> None:
            if len(seen) == 1:  # what no backward pass comes by is not kept
                self._passes.setdefault(name, []).append(seen)
            seen[1:] = [sum(seen[1:], v.detach())]  # a retained graph may be run through twice

        output.register_hook(keep)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step from ``.grad`` and the backward pass since the last step, or the one ``closure`` makes."""
        loss = None
        if closure is not None:
            self._passes = {}
            with torch.enable_grad():
                loss = closure()
        passes, self._passes = self._passes, {}
        if self._closed:
            raise ValueError("this EKFAC has been closed and sees no layer: make a new one")
        groups = {p: group for group in self.param_groups for p in group["params"] if p.grad is not None}
        directions = {p: p.grad.add(p, alpha=group["weight_decay"]) for p, group in groups.items()}
        curvature = dict(self._curvature)
        for name, seen in passes.items():
            layer = self._layers[name]
            trained = [p for p in layer.parameters(recurse=False) if p in groups]
            if not trained:
                continue
            dtype = torch.promote_types(trained[0].dtype, torch.float32)
            x, v = (t.to(dtype) for t in seen[0])
            v = v * len(x) if self._mean else v
            try:
                if len(seen) > 1:
                    raise ValueError(f"{len(seen)} backward passes since the last step, not one")
                batch = moments(layer, x, v, layer.weight in groups, layer.bias in groups)
                new = curvature[name] = self._updated(curvature.get(name), batch)
                if not bool(torch.isfinite(new.A.sum() + new.S.sum() + new.E.sum())):
                    raise ValueError("the second moments of its gradients are not finite")
            except ValueError as error:
                raise ValueError(f"EKFAC, layer {name!r}: {error}; nothing was changed") from error
            d = torch.cat([directions[p].reshape(len(p), -1).to(dtype) for p in trained], 1)
            d = new.solve(d, groups[trained[0]]["damping"])
            for p, part in zip(trained, torch.split(d, [p[0].numel() for p in trained], 1), strict=True):
                directions[p] = part.reshape(p.shape).to(p.dtype)
        new_weights = {}
        for p, group in groups.items():
            if group["momentum"] and self.state.get(p):
                directions[p] = directions[p] + group["momentum"] * self.state[p]["momentum_buffer"]
            new_weights[p] = p.add(directions[p], alpha=-group["lr"])
            if not bool(torch.isfinite(new_weights[p]).all()):
                raise ValueError("EKFAC: the step is not finite; nothing was changed")
        for p, group in groups.items():  # nothing fails from here on
            p.copy_(new_weights[p])
            self.state[p] = {"momentum_buffer": directions[p]} if group["momentum"] else {}
        self._curvature = curvature
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and forget backward passes that were not stepped on."""
        self._passes = {}
        super().zero_grad(set_to_none)

    def close(self) -> None:
        """Take the hooks off the model; :meth:`step` raises ``ValueError`` afterwards."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._passes, self._closed = [], {}, True

    def state_dict(self) -> dict[str, Any]:
        """Torch's, and under ``"curvature"`` each layer's :class:`Curvature` as a dictionary, never cast."""
        curvature = {name: dict(vars(layer)) for name, layer in self._curvature.items()}
        return super().state_dict() | {"curvature": curvature}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from :meth:`state_dict`, bit for bit; ``ValueError`` if it does not fit this model."""
        curvature = {}
        for name, saved in state_dict.get("curvature", {"": {}}).items():
            if name not in self._layers or len(saved["S"]) != len(self._layers[name].weight):
                raise ValueError(f"the state is not of an EKFAC for this model: layer {name!r} does not fit")
            to = self._layers[name].weight.device
            curvature[name] = Curvature(**{k: v if k == "updates" else v.to(to) for k, v in saved.items()})
        super().load_state_dict(dict(state_dict))
        self._curvature, self._passes = curvature, {}


def _layers(model: nn.Module) -> dict[str, Layer]:
    """The layers with a rule, by name: torch's own forward, plain parameters, in no other module."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Layer)
        and type(module).forward in (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward)
        and isinstance(module.weight, nn.Parameter)
        and all(owners[id(p)] == 1 for p in module.parameters())
    }
