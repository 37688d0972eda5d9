"""Robust factorisations of symmetric positive semi-definite matrices.

Every function walks the same ladder and reports how far it had to go: as it is, with a jitter on the
diagonal, in float64, and last (the caller's part) the last good factor.
"""

import torch
from torch import Tensor

JITTERS = (0.0, 1e-6, 1e-4)
"""Diagonal added in turn, as a fraction of the mean diagonal."""


def symmetrise(matrix: Tensor) -> Tensor:
    """``(M + M') / 2``: moving averages of products are symmetric only up to rounding."""
    return (matrix + matrix.mT) / 2


def cholesky(matrix: Tensor) -> tuple[Tensor | None, int]:
    """Lower Cholesky factor of ``matrix [n, n]`` and the number of failed attempts before it.

    The factor is ``None`` if every rung failed (not finite, or clearly indefinite).
    """
    matrix = symmetrise(matrix)
    scale = matrix.diagonal().mean().clamp_min(torch.finfo(matrix.dtype).tiny)
    failures = 0
    for dtype in dict.fromkeys((matrix.dtype, torch.float64)):
        for jitter in JITTERS:
            eye = torch.eye(len(matrix), dtype=dtype, device=matrix.device)
            factor, info = torch.linalg.cholesky_ex(matrix.to(dtype) + jitter * scale.to(dtype) * eye)
            if int(info) == 0 and bool(torch.isfinite(factor).all()):
                return factor, failures
            failures += 1
    return None, failures


def inverse(matrix: Tensor) -> tuple[Tensor | None, int]:
    """Inverse of an SPD ``matrix [n, n]`` in its own dtype, and the number of failed attempts before it."""
    factor, failures = cholesky(matrix)
    if factor is None:
        return None, failures
    return symmetrise(torch.cholesky_inverse(factor)).to(matrix.dtype), failures


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
                return basis.to(matrix.dtype), failures
            failures += 1
    return None, failures
