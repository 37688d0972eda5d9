"""Convolutions: per-sample gradients from one grouped weight-gradient convolution."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..columns import Columns, DenseColumns
from .base import Block, Call, LayerRule, only_cotangent, weight_and_bias

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ConvRule(LayerRule):
    """``nn.Conv1d/2d/3d`` with any stride, padding, dilation and groups, on batched inputs."""

    name = "conv"
    why = "per-sample gradients by one grouped convolution"

    def blocks(self, module: nn.Module, trained: Sequence[str]) -> list[tuple[str, ...]]:
        return weight_and_bias(trained)

    def columns(self, module: nn.Module, blocks: Sequence[Block], call: Call) -> list[Columns]:
        assert isinstance(module, Convolution)
        v = only_cotangent(call)
        x = (call.args[0] if call.args else call.kwargs["input"]).to(v.dtype)
        of = {"weight": lambda: _weight_gradients(module, x, v), "bias": lambda: v.flatten(3).sum(3)[..., None]}
        return [DenseColumns(torch.cat([of[name]() for name in block.names], 3)) for block in blocks]


def _weight_gradients(module: Convolution, x: Tensor, v: Tensor) -> Tensor:
    """``[R, B, out, fan_in]``: with every sample a group of one image, the batch sum falls apart."""
    x, padding = _padded(module, x)
    batch, places = len(x), x.ndim - 2
    weight = module.weight
    x = x.reshape(1, -1, *x.shape[2:])
    shape = (batch * module.out_channels, *weight.shape[1:])
    gradients = []
    for column in v:
        _, gradient, _ = torch.ops.aten.convolution_backward(
            column.reshape(1, -1, *column.shape[2:]),
            x,
            x.new_empty(1).expand(shape),
            None,
            module.stride,
            padding,
            module.dilation,
            False,
            (0,) * places,
            batch * module.groups,
            (False, True, False),
        )
        gradients.append(gradient.reshape(batch, module.out_channels, -1))
    return gradients[0][None] if len(gradients) == 1 else torch.stack(gradients)


def _padded(module: Convolution, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return x, module.padding
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, module._reversed_padding_repeated_twice, mode=mode), (0,) * (x.ndim - 2)
