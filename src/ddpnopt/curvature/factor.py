"""One Kronecker factor: its moving average and its damped inverse, as pure functions of plain tensors.

A factor is kept whole (``""`` holds a matrix), by its diagonal (a vector; sides above ``columns.WIDEST``), or, where
that is wide, as its leading directions and its trace, ``U diag(values) U' + rest (I - U U')`` with
``rest = (trace - sum values) / (n - r)``: nothing ``n x n`` is then formed, averaged or inverted.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from .. import linalg
from ..columns import Diagonal, Moment
from ..inverse import LowRank, Side
from .base import State

FULL = 8
"""A side up to this multiple of ``rank`` is kept whole: there a product with its inverse is not dear."""

SPARE = 8
"""Samples whose directions join the subspace at each averaging, beside the directions it had."""


def averaged(state: State, name: str, moment: Moment | Diagonal, past: float, rank: int | None) -> State:
    """The factor ``name`` as ``past`` times itself plus ``1 - past`` times the new moment."""
    if rank is None or isinstance(moment, Diagonal) or moment.side <= FULL * rank:
        whole = moment.matrix()
        return {name: past * state[name] + (1 - past) * whole if name in state else whole}
    old = _low_rank(state, name) if f"{name}_basis" in state else None
    new = moment if old is None else replace(moment, scale=moment.scale * (1 - past))
    trace = new.trace() if old is None else new.trace() + past * state[f"{name}_trace"]

    def times(values: Tensor) -> Tensor:
        return new.times(values) if old is None else new.times(values) + past * old.times(values.mT).mT

    def form(values: Tensor) -> Tensor:
        return new.form(values) if old is None else new.form(values) + past * (values.mT @ old.times(values.mT).mT)

    wanted = rank + SPARE if old is None else max(SPARE, rank + SPARE - old.basis.shape[1])
    samples = new.samples(wanted).mT
    start = samples if old is None else torch.cat([old.basis, samples], 1)
    found = linalg.leading(start, times, form, rank, passes=2 if old is None else 1)
    if found is None:  # not finite: neither is the step, which says so
        found = start.new_zeros(len(start), 0), start.new_zeros(0)
    return {f"{name}_basis": found[0], f"{name}_values": found[1], f"{name}_trace": trace}


def mean_eigenvalue(state: State, name: str) -> Tensor:
    """Trace over dimension."""
    if f"{name}_trace" in state:
        return torch.as_tensor(state[f"{name}_trace"] / len(state[f"{name}_basis"]))
    whole: Tensor = state[name]
    return whole.sum() / len(whole) if whole.ndim == 1 else whole.diagonal().mean()


def square(state: State) -> float:
    """``trace S trace A``, the mean squared length of a sample's gradient as far as factors know it."""
    traces = [mean_eigenvalue(state, name).double() * _side(state, name) for name in ("S", "A")]
    return float(traces[0] * traces[1])


def _side(state: State, name: str) -> int:
    return len(state[f"{name}_basis"] if f"{name}_trace" in state else state[name])


def split_ridge(mean_S: Tensor, mean_A: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """``l1, l2`` with ``l1 l2 = ridge`` for ``(S + l1) (x) (A + l2)``, in proportion to the mean eigenvalues."""
    pi = (mean_A / mean_S).sqrt()
    pi = torch.where(torch.isfinite(pi) & (pi > 0), pi, torch.ones_like(pi))
    return math.sqrt(ridge) / pi, math.sqrt(ridge) * pi


def inverted(state: State, name: str, damping: Tensor) -> tuple[State, int]:
    """``(factor + damping I)^-1`` as entries of a state, and the failed attempts before it."""
    if f"{name}_trace" in state:
        return _inverted_low_rank(state, name, damping), 0
    factor: Tensor = state[name]
    if factor.ndim == 1:
        return {f"{name}_inverse": (factor + damping).reciprocal()}, 0
    damped = factor.clone()
    damped.diagonal().add_(damping)
    inverse, failures = linalg.inverse(damped)
    if inverse is None:
        inverse = state.get(f"{name}_inverse", damped.diagonal().reciprocal())
    return {f"{name}_inverse": inverse}, failures


def side(state: State, name: str) -> Side:
    """The inverse that :func:`inverted` left."""
    if f"{name}_inverse_basis" in state:
        return LowRank(*(state[f"{name}_inverse_{part}"] for part in ("basis", "weights", "rest")))
    inverse: Tensor = state[f"{name}_inverse"]
    return inverse


def _low_rank(state: State, name: str) -> LowRank:
    """The factor itself."""
    basis, values, trace = (state[f"{name}_{part}"] for part in ("basis", "values", "trace"))
    rest = ((trace - values.sum()) / (basis.shape[0] - basis.shape[1])).clamp_min(0)
    return LowRank(basis, values - rest, rest)


def _inverted_low_rank(state: State, name: str, damping: Tensor) -> State:
    factor = _low_rank(state, name)
    # a factor without damping and without rest has no inverse: the jitter that a whole one would get
    least = linalg.JITTERS[1] * mean_eigenvalue(state, name).clamp_min(torch.finfo(factor.basis.dtype).tiny)
    rest = (factor.rest + damping).maximum(least).reciprocal()
    weights = (state[f"{name}_values"] + damping).maximum(least).reciprocal() - rest
    parts = {"basis": factor.basis, "weights": weights, "rest": rest}
    return {f"{name}_inverse_{part}": value for part, value in parts.items()}
