"""Train neural networks as an optimal-control problem: DDPNOpt for PyTorch."""

from .coupling import Batch
from .curvature import Adaptive, EigenKronecker, Identity, Kronecker
from .dense import Dense
from .errors import StepError
from .optimizer import DDPNOpt
from .terminal import Exact, Gradient, Matched, Sampled

__all__ = [
    "Adaptive",
    "Batch",
    "DDPNOpt",
    "Dense",
    "EigenKronecker",
    "Exact",
    "Gradient",
    "Identity",
    "Kronecker",
    "Matched",
    "Sampled",
    "StepError",
]
