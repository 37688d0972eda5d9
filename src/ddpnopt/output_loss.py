"""The loss as a function of the model's output: its gradient, products with its Hessian, and a root of that.

Most losses couple few of the numbers that a model returns: a squared error none, a cross-entropy the classes of one
position. Whether one of these forms is the loss's own, a few products with the Hessian tell, so that neither ``d``
backward passes nor a matrix ``d x d`` is needed for a sample's ``d`` outputs:

    H = diag(h)                      h = H 1                     H^(1/2) = diag(sqrt(h))
    H = w (diag(p) - p p')           p a softmax over classes    H^(1/2) = sqrt(w) diag(q) (I - q q'),   q = sqrt(p)

each position with its own ``w`` (class weights, label smoothing, masks, a mean over positions) and ``p``; the second
root is one since ``q q'`` projects. ``w`` is read off the product with the likeliest class. A form counts as the loss's
own if it gives what the Hessian does for two random vectors.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import NonFiniteError
from .passes import wide

Root = Callable[[Tensor], Tensor]
"""From ``noise [B, d, R]`` to ``H^(1/2) noise``."""

Times = Callable[[Tensor], Tensor]
"""From ``v [B, d]`` to numbers of the same shape."""

Form = tuple[Times, Times, Root]
"""The product ``H v``, the larger of the two terms whose difference each of its numbers is, and the root."""

ROUNDINGS = 1000
"""How many roundings of the terms whose difference it is a form's product may be from the Hessian's."""

FARTHEST = 0.03
"""And how much of its length at most, in types of few digits and where terms cancel: at confident positions."""

PROBES = 2
"""Random vectors that a form has to meet."""


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
        """``w g``, ``[B, d]``, at least in float32."""
        return wide(self._scaled.detach()) / self._scale

    def product(self, v: Tensor) -> Tensor:
        """``w H v``, ``[B, d]``, at least in float32, for ``v`` of the same shape; one derivative of the loss."""
        if not self._scaled.requires_grad:
            return torch.zeros_like(v)
        longest = v.abs().amax().clamp_min(torch.finfo(v.dtype).tiny)  # a narrow type could not hold a small v
        value = (wide(self._scaled) * (v / longest)).sum()
        (derivative,) = torch.autograd.grad(value, self.output, retain_graph=True, allow_unused=True)
        if derivative is None:
            return torch.zeros_like(v)
        return wide(derivative.reshape(self.batch, -1)) * (longest / self._scale)

    @cached_property
    def _scaled(self) -> Tensor:
        """The gradient times :attr:`_scale`, in the output's type, differentiable once more."""
        scale = self.loss.new_full(self.loss.shape, self._scale)
        (gradient,) = torch.autograd.grad(self.loss, self.output, scale, create_graph=True)
        return gradient.reshape(self.batch, -1)

    @cached_property
    def _scale(self) -> float:
        """What undoes means over samples and positions, whose gradients half precision could not hold: a power of 2."""
        positions = self.output.numel() / (self.batch * max(self.output.shape[1:], default=1))
        return float(2 ** min(15, max(0, round(math.log2(max(1.0, positions / self.weight))))))


def hessian_root(loss: OutputLoss) -> Root:
    """``noise [B, d, R] -> Z noise`` with ``Z Z' = H`` of each sample's own loss, negative eigenvalues taken for zero.

    Where neither form of the module's docstring fits, by all of ``H``: ``d`` derivatives, ``B d^2`` memory.

    Raises:
        NonFiniteError: if the Hessian is not finite.
    """
    # a generator of its own: the caller's random numbers are the model's; H has no blocks between samples, so that the
    # same vector serves them all
    generator, like = torch.Generator().manual_seed(0), loss.gradient
    random = torch.randn(PROBES, like.shape[1], generator=generator, dtype=torch.float64, device="cpu")
    probes = [wide(v.to(loss.output)).to(like).expand_as(like) for v in random]
    found = [loss.product(v) / loss.weight for v in probes]
    if not all(bool(torch.isfinite(one).all()) for one in found):
        raise NonFiniteError("the loss's curvature at the model's output is not finite")
    roundings = ROUNDINGS * torch.finfo(loss.output.dtype).eps
    for times, terms, root in _forms(loss):
        pairs = [(times(v) - own, roundings * terms(v).norm(), own) for v, own in zip(probes, found, strict=True)]
        if all(bool(misfit.norm() <= torch.minimum(far, FARTHEST * own.norm())) for misfit, far, own in pairs):
            return root
    return _full(loss)


def _forms(loss: OutputLoss) -> Iterator[Form]:
    """Those of the module's docstring, each with what it would be if it were the loss's own."""
    like, shape = loss.gradient, loss.output.shape
    diagonal = loss.product(torch.ones_like(like)) / loss.weight
    yield (
        lambda v: diagonal * v,
        lambda v: diagonal * v,
        lambda noise: diagonal.clamp_min(0).sqrt()[:, :, None] * noise,
    )
    for classes in sorted({1, len(shape) - 1} if len(shape) > 1 else ()):
        yield _softmax(loss, wide(loss.output.detach()).softmax(classes), classes)


def _softmax(loss: OutputLoss, p: Tensor, classes: int) -> Form:
    """``w (diag(p) - p p')`` at every position, for ``p`` in the output's shape with ``classes`` for its dimension."""
    shape, flat = p.shape, loss.gradient.shape
    likeliest = torch.zeros_like(p).scatter_(classes, p.argmax(classes, keepdim=True), 1.0)

    def unweighted(v: Tensor) -> Tensor:
        return p * (v - (p * v).sum(classes, keepdim=True))

    product, wanted = unweighted(likeliest), (loss.product(likeliest.view(flat)) / loss.weight).view(shape)
    square = product.square().sum(classes, keepdim=True)
    w = torch.where(square > 0, (product * wanted).sum(classes, keepdim=True) / square, 0.0)
    q, root = p.sqrt(), (w.clamp_min(0) * p).sqrt()

    def from_noise(noise: Tensor) -> Tensor:
        by_position = noise.reshape(*shape, noise.shape[-1])
        along = (q[..., None] * by_position).sum(classes, keepdim=True)
        return (root[..., None] * (by_position - q[..., None] * along)).reshape(noise.shape)

    def times(v: Tensor) -> Tensor:
        return (w * unweighted(v.reshape(shape))).reshape(flat)

    return times, lambda v: (w * p * v.reshape(shape)).reshape(flat), from_noise


def _full(loss: OutputLoss) -> Root:
    """From the eigenvectors of all of ``H [B, d, d]``."""
    every = torch.eye(loss.gradient.shape[1]).to(loss.gradient)
    rows = [loss.product(own.expand_as(loss.gradient)) for own in every]
    hessian = torch.stack(rows, 1) / loss.weight
    if not bool(torch.isfinite(hessian).all()):
        raise NonFiniteError("the loss's curvature at the model's output is not finite")
    # near a confident output many eigenvalues all but coincide at zero, where single precision may not converge
    values, vectors = torch.linalg.eigh(((hessian + hessian.mT) / 2).double())
    factor = (vectors * values.clamp_min(0).sqrt()[:, None, :]).to(hessian.dtype)
    return lambda noise: factor @ noise
