"""Curvatures ``M``: the part of ``Q_uu`` taken from the optimizer that is adapted."""

from .adaptive import Adaptive
from .base import Curvature
from .eigen_kronecker import EigenKronecker
from .identity import Identity
from .kronecker import Kronecker

__all__ = ["Adaptive", "Curvature", "EigenKronecker", "Identity", "Kronecker"]
