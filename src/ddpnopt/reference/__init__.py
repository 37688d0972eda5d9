"""Dense differential dynamic programming (DDP) in float64: the optimizer's specification, which it is tested against.

Slow on purpose, and it shares no code with the rest of the library. :mod:`~ddpnopt.reference.step` is the method and
its equations, :mod:`~ddpnopt.reference.terminal` the loss at the output, :mod:`~ddpnopt.reference.chain` brings torch
modules into the form of both.
"""

from .chain import stages_of
from .step import DenseStep, Function, Policy, Stage, bellman, dense_step
from .terminal import Loss, Terminal, exact, gradient, matched, sampled

__all__ = [
    "DenseStep",
    "Function",
    "Loss",
    "Policy",
    "Stage",
    "Terminal",
    "bellman",
    "dense_step",
    "exact",
    "gradient",
    "matched",
    "sampled",
    "stages_of",
]
