"""The loss as a function of the model's output: its gradient, and a root of its Hessian.

Most losses couple few of the numbers that a model returns: a squared error none, a cross-entropy the classes of one
position. Of two such forms one product with the Hessian tells whether they are the case, so that neither ``d``
backward passes nor a matrix ``d x d`` is needed for a sample's ``d`` outputs:

    H = diag(h)                      h = H 1                     H^(1/2) = diag(sqrt(h))
    H = w (diag(p) - p p')           p a softmax over classes    H^(1/2) = sqrt(w) diag(q) (I - q q'),   q = sqrt(p)

each position with its own ``w`` (class weights, label smoothing, masks, a mean over positions) and ``p``; the second
root is one since ``q q'`` projects. A form that is not the loss's own would have to meet ``H v`` for a random ``v``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import NonFiniteError
from .passes import wide

Root = Callable[[Tensor], Tensor]
"""From ``noise [B, d, R]`` to ``H^(1/2) noise``."""

MET = 1000
"""Roundings of the output's type that a form's product with the Hessian may be off by, relative to its length."""

MOST = 0.05
"""The same as a number, for types of few digits."""


@dataclass(frozen=True)
class OutputLoss:
    """The loss as a function of the output, with its graph: ``loss`` (a number) of ``output [B, ...]``.

    ``weight``: ``w``, what the batch's loss multiplies each sample's own loss by.
    """

    loss: Tensor
    output: Tensor
    weight: float
    batch: int

    @cached_property
    def gradient(self) -> Tensor:
        """``w g``, ``[B, d]``, differentiable once more."""
        (gradient,) = torch.autograd.grad(self.loss, self.output, create_graph=True)
        return gradient.reshape(self.batch, -1)

    def derivative(self, value: Tensor) -> Tensor:
        """``d value / d output`` as ``[B, d]``; zeros where it does not depend on it."""
        if not value.requires_grad:
            return value.new_zeros(self.batch, self.output.numel() // self.batch)
        (derivative,) = torch.autograd.grad(value, self.output, retain_graph=True, allow_unused=True)
        zeros = torch.zeros_like(self.output)
        return (zeros if derivative is None else derivative).reshape(self.batch, -1)


def hessian_root(loss: OutputLoss) -> Root:
    """``noise [B, d, R] -> Z noise`` with ``Z Z' = H`` of each sample's own loss, negative eigenvalues taken for zero.

    Where neither form of the module's docstring fits, by all of ``H``: ``d`` backward passes, ``B d^2`` memory.

    Raises:
        NonFiniteError: if the Hessian is not finite.
    """
    gradient = loss.gradient

    def times(v: Tensor) -> Tensor:
        return wide(loss.derivative((gradient * v.to(gradient)).sum())) / loss.weight

    # a generator of its own: the caller's random numbers are those of the model; samples share what does not mix them
    generator = torch.Generator().manual_seed(0)
    like = wide(gradient.detach())
    v = torch.randn(like.shape[1], generator=generator, dtype=torch.float64).to(like).expand_as(like)
    found = times(v)
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteError("the loss's curvature at the model's output is not finite")
    off = min(MET * torch.finfo(gradient.dtype).eps, MOST) * found.norm()
    for product, root in _forms(loss, times, v, found):
        if bool((product - found).norm() <= off):
            return root
    return _full(loss, gradient)


def _forms(
    loss: OutputLoss, times: Callable[[Tensor], Tensor], v: Tensor, found: Tensor
) -> Iterator[tuple[Tensor, Root]]:
    """The forms as their product with ``v``, ``[B, d]``, and their root; ``found``: the Hessian's own product."""
    shape = loss.output.shape
    for classes in sorted({1, len(shape) - 1} if len(shape) > 1 else ()):
        p = wide(loss.output.detach()).softmax(classes)
        own, wanted = v.reshape(shape), found.reshape(shape)
        product = p * (own - (p * own).sum(classes, keepdim=True))
        square = product.square().sum(classes, keepdim=True)
        w = torch.where(square > 0, (product * wanted).sum(classes, keepdim=True) / square, 0.0)
        root = (w.clamp_min(0) * p).sqrt()
        yield (w * product).reshape(v.shape), _softmax_root(root, p.sqrt(), classes)
    diagonal = times(torch.ones_like(v))
    yield diagonal * v, lambda noise: diagonal.clamp_min(0).sqrt()[:, :, None] * noise


def _softmax_root(root: Tensor, q: Tensor, classes: int) -> Root:
    def times(noise: Tensor) -> Tensor:
        by_position = noise.reshape(*q.shape, noise.shape[-1])
        along = (q[..., None] * by_position).sum(classes, keepdim=True)
        return (root[..., None] * (by_position - q[..., None] * along)).reshape(noise.shape)

    return times


def _full(loss: OutputLoss, gradient: Tensor) -> Root:
    rows = [loss.derivative(entry.sum()) for entry in gradient.unbind(1)]
    hessian = wide(torch.stack(rows, 1)) / loss.weight
    if not bool(torch.isfinite(hessian).all()):
        raise NonFiniteError("the loss's curvature at the model's output is not finite")
    # near a confident output many eigenvalues all but coincide at zero, where single precision may not converge
    values, vectors = torch.linalg.eigh(((hessian + hessian.mT) / 2).double())
    factor = (vectors * values.clamp_min(0).sqrt()[:, None, :]).to(hessian.dtype)
    return lambda noise: factor @ noise
