"""The Max-Mahalanobis centre loss (Pang et al., ICLR 2020, arXiv 1905.10626)."""

import math

import torch
from torch import Tensor, nn


def simplex(classes: int, features: int) -> Tensor:
    """Corners of a regular simplex, ``[classes, features]`` in float64: unit rows, inner products ``-1 / (L - 1)``.

    Built row by row, lower triangular: each entry left of the diagonal is what the inner product with that
    earlier row requires, the entry on it what unit length does (Pang et al., Algorithm 1).

    Args:
        classes: ``L``, at least 2.
        features: ``d``, at least ``L - 1``.

    Raises:
        ValueError: if either is too small.
    """
    if classes < 2:
        raise ValueError(f"simplex: classes must be at least 2, got {classes}")
    if features < classes - 1:
        raise ValueError(f"simplex: {classes} classes need features >= {classes - 1}, got {features}")
    product = -1 / (classes - 1)
    centres = torch.zeros(classes, features, dtype=torch.float64)
    for i in range(classes):
        for j in range(min(i, classes - 1)):
            centres[i, j] = (product - centres[i] @ centres[j]) / centres[j, j]
        if i < classes - 1:
            centres[i, i] = math.sqrt(1 - float(centres[i].square().sum()))
    return centres


class MMC(nn.Module):
    """``|z - mu_y|^2``, mean over the batch, with fixed centres ``mu`` of norm ``C``.

    Without the factor 1/2, as in the authors' released code: the Hessian of a sample's own loss at the output is
    ``2 I``, and the best constant output, zero, has loss ``C^2``.

    Args:
        classes: number of classes ``L``, at least 2.
        features: size of the output ``z``, at least ``L - 1``; default ``classes``.
        C: norm of the centres; default 10, as released.

    Raises:
        ValueError: if classes or features is too small, or ``C`` is not a positive finite number.
    """

    reduction = "mean"
    centres: Tensor

    def __init__(self, classes: int, features: int | None = None, C: float = 10.0) -> None:
        super().__init__()
        if not (math.isfinite(C) and C > 0):
            raise ValueError(f"MMC: C must be a positive finite number, got {C!r}")
        corners = simplex(classes, classes if features is None else features)
        self.register_buffer("centres", (C * corners).to(torch.get_default_dtype()))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Loss, a number, of outputs ``z [B, d]`` and class numbers ``y [B]``."""
        return (z - self.centres[y]).square().sum(1).mean()

    def predict(self, z: Tensor) -> Tensor:
        """Number ``[B]`` of the centre nearest to each output ``z [B, d]``."""
        return (z @ self.centres.mT).argmax(1)  # of centres of one norm the nearest has the largest product
