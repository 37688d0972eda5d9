"""Convolutions and transposed ones: per-sample gradients from one grouped weight-gradient convolution."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..columns import Columns, DenseColumns
from .base import Block, Call, LayerRule, argument, only_cotangent, weight_and_bias

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class ConvRule(LayerRule):
    """``nn.Conv1d/2d/3d`` with any stride, padding, dilation and groups, on batched inputs."""

    name = "conv"
    why = "per-sample gradients by one grouped convolution"

    def blocks(self, module: nn.Module, trained: Sequence[str]) -> list[tuple[str, ...]]:
        return weight_and_bias(trained)

    def reads(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        return _leads_with_batch(module, args, kwargs)

    def columns(self, module: nn.Module, blocks: Sequence[Block], call: Call) -> list[Columns]:
        assert isinstance(module, Convolution)
        v = only_cotangent(call)
        x, padding = _padded(module, argument(call.args, call.kwargs, 0, "input").to(v.dtype))
        of = {"weight": lambda: _weight_gradients(module, x, v, padding), "bias": lambda: _bias_gradients(v)}
        return [DenseColumns(torch.cat([of[name]() for name in block.names], 3)) for block in blocks]


class ConvTransposeRule(LayerRule):
    """``nn.ConvTranspose1d/2d/3d`` on batches; the weight leads with the inputs, so the bias is a block of its own."""

    name = "conv transpose"
    why = "per-sample gradients by one grouped convolution"

    def blocks(self, module: nn.Module, trained: Sequence[str]) -> list[tuple[str, ...]]:
        return [(name,) for name in trained]

    def reads(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        return _leads_with_batch(module, args, kwargs)

    def columns(self, module: nn.Module, blocks: Sequence[Block], call: Call) -> list[Columns]:
        assert isinstance(module, Transposed)
        v = only_cotangent(call)
        x = argument(call.args, call.kwargs, 0, "input").to(v.dtype)
        assert not isinstance(module.padding, str)
        padding = module.padding
        of = {"weight": lambda: _weight_gradients(module, x, v, padding), "bias": lambda: _bias_gradients(v)}
        return [DenseColumns(of[block.names[0]]()) for block in blocks]


def _leads_with_batch(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the input is a batch of images and not one."""
    assert isinstance(module, Convolution | Transposed)
    ndim: int = argument(args, kwargs, 0, "input").ndim
    return ndim == len(module.kernel_size) + 2


def _bias_gradients(v: Tensor) -> Tensor:
    """``[R, B, out, 1]``."""
    return v.flatten(3).sum(3)[..., None]


def _weight_gradients(module: Convolution | Transposed, x: Tensor, v: Tensor, padding: tuple[int, ...]) -> Tensor:
    """``[R, B, *matrix]``: with every sample a group of one image, the batch sum falls apart."""
    batch, places = len(x), x.ndim - 2
    rows, *others = module.weight.shape
    more = _output_padding(module, x, v) if module.transposed else (0,) * places
    x = x.reshape(1, -1, *x.shape[2:])
    shape = (batch * rows, *others)
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
            module.transposed,
            more,
            batch * module.groups,
            (False, True, False),
        )
        gradients.append(gradient.reshape(batch, rows, -1))
    return gradients[0][None] if len(gradients) == 1 else torch.stack(gradients)


def _output_padding(module: Convolution | Transposed, x: Tensor, v: Tensor) -> tuple[int, ...]:
    """What the outputs ``v [R, B, out, ...]`` are longer than the inputs ask for: a call may name their size."""
    kernel, stride, padding, dilation = module.kernel_size, module.stride, module.padding, module.dilation
    plain = [
        (inputs - 1) * stride[i] - 2 * int(padding[i]) + dilation[i] * (kernel[i] - 1) + 1
        for i, inputs in enumerate(x.shape[2:])
    ]
    return tuple(outputs - size for outputs, size in zip(v.shape[3:], plain, strict=True))


def _padded(module: Convolution, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return x, module.padding
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, module._reversed_padding_repeated_twice, mode=mode), (0,) * (x.ndim - 2)
