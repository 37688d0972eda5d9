"""Robust factorisations of symmetric positive semi-definite matrices.

Every function walks the same ladder and reports how far it had to go: as it is, with a jitter on the
diagonal, in float64, and last (the caller's part) the last good factor.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

JITTERS = (0.0, 1e-6, 1e-4)
"""Diagonal added in turn, as a fraction of the mean diagonal."""


def symmetrise(matrix: Tensor) -> Tensor:
    """``(M + M') / 2``: moving averages of products are symmetric only up to rounding."""
    return (matrix + matrix.mT) / 2


def cholesky(matrix: Tensor) -> tuple[Tensor | None, int]:
    """Lower Cholesky factor of a symmetric ``matrix [n, n]`` and the number of failed attempts before it.

    The factor is ``None`` if every rung failed (not finite, or clearly indefinite).
    """
    failures = 0
    for dtype in dict.fromkeys((matrix.dtype, torch.float64)):
        for jitter in JITTERS:
            tried = matrix.to(dtype, copy=bool(jitter))
            if jitter:
                tried.diagonal().add_(jitter * tried.diagonal().mean().clamp_min(torch.finfo(dtype).tiny))
            factor, info = torch.linalg.cholesky_ex(tried)
            # pivots are positive: their sum is finite if all of them are
            if int(info) == 0 and math.isfinite(float(factor.diagonal().sum())):
                return factor, failures
            failures += 1
    return None, failures


def inverse(matrix: Tensor) -> tuple[Tensor | None, int]:
    """Inverse of an SPD ``matrix [n, n]`` in its own dtype, and the number of failed attempts before it."""
    factor, failures = cholesky(symmetrise(matrix))
    if factor is None:
        return None, failures
    found = symmetrise(torch.cholesky_inverse(factor)).to(matrix.dtype)
    # LAPACK's come by columns, and products round by layout, which not every checkpoint keeps
    return found.contiguous(), failures


def eigenbasis(matrix: Tensor) -> tuple[Tensor | None, int]:
    """Orthogonal eigenvectors (columns) of a symmetric ``matrix [n, n]``, and the failed attempts before them."""
    matrix = symmetrise(matrix)
    scale = matrix.diagonal().mean()
    failures = 0
    for dtype in dict.fromkeys((matrix.dtype, torch.float64)):
        for jitter in JITTERS:
            eye = torch.eye(len(matrix), dtype=dtype, device=matrix.device)
            try:
                _, basis = torch.linalg.eigh(matrix.to(dtype) + jitter * scale.to(dtype) * eye)
            except RuntimeError:  # torch.linalg.LinAlgError is one
                failures += 1
                continue
            if bool(torch.isfinite(basis).all()):
                return basis.to(matrix.dtype).contiguous(), failures
            failures += 1
    return None, failures


def leading(
    start: Tensor, times: Callable[[Tensor], Tensor], form: Callable[[Tensor], Tensor], count: int, passes: int
) -> tuple[Tensor, Tensor] | None:
    """Leading eigenvectors ``[n, r]`` and eigenvalues ``[r]``, ``r <= count``, of a positive semi-definite matrix.

    Subspace iteration (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, section 4): what it finds are the Ritz
    pairs of the subspace it ends with, so the eigenvalues are never above the true ones. ``None`` if not finite.

    Args:
        start: ``[n, c]`` with ``c >= r``, vectors to begin from.
        times: multiplies the matrix ``M`` by ``Q [n, c]``.
        form: ``Q' M Q [c, c]``.
        count: ``r`` at most.
        passes: how often the subspace is multiplied.
    """
    subspace = start
    for _ in range(passes):
        subspace = torch.linalg.qr(times(subspace)).Q
    projected = symmetrise(form(subspace))
    if not bool(torch.isfinite(projected).all()):
        return None
    values, vectors = torch.linalg.eigh(projected)
    kept = slice(max(0, len(values) - count), None)
    return subspace @ vectors[:, kept], values[kept].clamp_min(0)
