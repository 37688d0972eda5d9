"""Terminal costs to second order: the loss at the chain's output, and the forms of its curvature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

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


def gradient(loss: Loss, y: Tensor, target: Tensor, *, cap: float = 1.0) -> Terminal:
    """Outer product of the gradient, Z = g / sqrt(cap), for outputs y [B, d] and targets [B, ...].

    With cap 1 that of Proposition 3. Along g, the quadratic model promises a decrease of cap/2.
    """
    g, _ = _loss_derivatives(loss, y, target)
    return Terminal(torch.full_like(g[:, 0], 1 / len(g)), g, g[..., None] / cap**0.5)


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
