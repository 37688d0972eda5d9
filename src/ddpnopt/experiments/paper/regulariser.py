"""The vanishing-gradient regulariser of Pascanu, Mikolov and Bengio (ICML 2013, section 3.3), over layers.

For a sample with hidden states ``x_1, ..., x_T``, ``x_{k+1} = f_k(x_k)``, and gradients ``g_k = dE / dx_k``,

    Omega = sum_k ( |g_{k+1} df_k/dx_k| / |g_{k+1}| - 1 )^2

asks every layer to keep the length of the gradient that passes through it. As its authors propose, only the
immediate derivative is followed: ``g_{k+1}`` and ``x_k`` count as constants, so that a term has a gradient in its own
layer's parameters alone, through the Jacobian (with a sigmoid, its slope at the layer's output included). Theirs
is a recurrent network with one transition; here every layer has its own.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def penalty(layer: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Tensor:
    """One layer's term of ``Omega``, mean over the batch; differentiable in the layer's parameters.

    Args:
        layer: ``f_k``, each sample by itself, ``[B, n]`` to ``[B, m]``.
        x: ``x_k [B, n]``, constant.
        gradient: ``g_{k+1} [B, m]``, constant; its scale does not matter. A sample whose gradient is zero has no
            direction to keep, and its term is zero.
    """
    x = x.detach().requires_grad_()
    length = gradient.norm(dim=1, keepdim=True)
    unit = torch.where(length > 0, gradient / length, 0.0)
    (pulled,) = torch.autograd.grad(layer(x), x, unit.detach(), create_graph=True)
    term: Tensor = (pulled.norm(dim=1) - (length[:, 0] > 0).to(x)).square().mean()
    return term


def regularised(
    stages: Sequence[nn.Module], x: Tensor, loss_of: Callable[[Tensor], Tensor], strength: float
) -> tuple[Tensor, Tensor]:
    """The loss, and ``loss + strength * Omega`` over the transitions between hidden states.

    Input and output are no hidden states: the first stage, which reads the input, and the last, whose output the
    loss reads, have no term. Keeps the graph; costs about two more backward passes.

    Args:
        stages: layers with what follows them, in order.
        x: the first stage's input ``[B, n]``.
        loss_of: the loss, a number, of the last stage's output.
        strength: weight of ``Omega``, at least 0.

    Raises:
        ValueError: if ``strength`` is negative.
    """
    if not strength >= 0:
        raise ValueError(f"regularised: strength must be at least 0, got {strength!r}")
    states = []
    for stage in stages:
        x = stage(x)
        states.append(x)
    loss, hidden = loss_of(x), states[:-1]
    gradients = torch.autograd.grad(loss, hidden[1:], retain_graph=True)
    terms = [penalty(f, h, g) for f, h, g in zip(stages[1:-1], hidden, gradients, strict=False)]
    omega = torch.stack(terms).sum() if terms else loss.new_zeros(())
    return loss, loss + strength * omega
