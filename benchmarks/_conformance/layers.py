"""Probes of layers and graphs: does every tensor that has a gradient train, and does the loss fall."""

from dataclasses import replace
from typing import Any

import torch

from . import problems
from .methods import Method
from .probing import probe, trains


@probe("grouped convolutions")
def grouped_convolution(method: Method) -> str:
    """Conv2d with 2 and 4 groups: three steps move every tensor with a gradient, and the batch's loss falls."""
    return trains(method, problems.grouped_conv())


@probe("BatchNorm's affine tensors trained")
def batch_norm(method: Method) -> str:
    """Linear, BatchNorm1d, Linear: as above, the norm's weight and bias among them."""
    return trains(method, problems.batch_norm_mlp())


@probe("in-place ReLU")
def inplace(method: Method) -> str:
    """`ReLU(inplace=True)` after a Linear: as above."""
    return trains(method, problems.inplace_mlp())


@probe("module called twice")
def called_twice(method: Method) -> str:
    """One Linear used two times in the forward pass: as above."""
    return trains(method, problems.twice())


@probe("Embedding, MultiheadAttention, LayerNorm")
def attention(method: Method) -> str:
    """A one-block transformer encoder on token indices: as above, with `out_proj`, which attention never calls."""
    return trains(method, problems.attention())


@probe("LSTM")
def recurrent(method: Method) -> str:
    """An LSTM read at its last position: as above."""
    return trains(method, problems.recurrent())


@probe("frozen layer")
def frozen(method: Method) -> str:
    """The middle layer does not require a gradient: it stays as it is, the rest trains."""
    return trains(method, problems.frozen_mlp())


@probe("layer without a gradient")
def idle(method: Method) -> str:
    """A layer that the forward pass does not use: it stays as it is, the rest trains."""
    return trains(method, problems.idle())


@probe("Linear on 3-D input")
def positions(method: Method) -> str:
    """Linear layers over `[batch, positions, features]`: every tensor trains."""
    return trains(method, problems.positions())


@probe("Conv1d, ConvTranspose1d")
def conv_1d(method: Method) -> str:
    """A dilated Conv1d and a strided ConvTranspose1d: every tensor trains."""
    return trains(method, problems.conv_1d())


@probe("residual network")
def residual(method: Method) -> str:
    """Two residual blocks with BatchNorm2d and a projected skip: every tensor trains."""
    return trains(method, problems.residual())


@probe("tied weights")
def tied(method: Method) -> str:
    """The embedding's matrix is the last layer's weight: it trains, counted once."""
    return trains(method, problems.tied())


@probe("every parameter trained")
def every_parameter(method: Method) -> str:
    """Conv2d, BatchNorm2d, PReLU, a parameter of the model's own, GroupNorm, Linear, LayerNorm: every tensor trains."""
    return trains(method, problems.mixed())


@probe("bf16 autocast")
def autocast(method: Method) -> str:
    """Forward pass under `torch.autocast("cpu", torch.bfloat16)`: every tensor of a grouped CNN trains."""
    return trains(method, replace(problems.grouped_conv(), autocast=True))


@probe("`torch.compile`d model")
def compiled(method: Method) -> str:
    """Optimizer and loop get `torch.compile(model, backend="eager")`: every tensor trains."""
    problem = problems.mlp()
    compiled: Any = torch.compile(problem.model, backend="eager")
    return trains(method, replace(problem, model=compiled))
