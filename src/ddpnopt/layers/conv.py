"""Convolutions and transposed ones: per-sample gradients from one grouped weight-gradient convolution."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..columns import Columns, DenseColumns
from .base import Block, Call, LayerRule, argument, only_cotangent, weight_and_bias

AT_ONCE = 1 << 20
"""How many numbers of inputs and output gradients a grouped convolution gets at once: it copies them."""

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
        return [DenseColumns(_gradients(module, block, x, v, padding)) for block in blocks]


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
        return [DenseColumns(_gradients(module, block, x, v, padding)) for block in blocks]


def _leads_with_batch(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the input is a batch of images and not one."""
    assert isinstance(module, Convolution | Transposed)
    ndim: int = argument(args, kwargs, 0, "input").ndim
    return ndim == len(module.kernel_size) + 2


def _gradients(
    module: Convolution | Transposed, block: Block, x: Tensor, v: Tensor, padding: tuple[int, ...]
) -> Tensor:
    """``[R, B, *matrix]`` of a block, for inputs ``x [B, in, ...]`` and output gradients ``v [R, B, out, ...]``."""
    gradients = v.new_empty(*v.shape[:2], *block.shape)
    if "bias" in block.names:
        gradients[..., -1] = v.flatten(3).sum(3)
    if "weight" not in block.names:
        return gradients
    of = _by_unfolding if _odd(module, x) else _by_groups
    samples = max(1, AT_ONCE // max(1, x[:1].numel() + v[:1, :1].numel()))
    weight = gradients[..., : module.weight[0].numel()]
    for part, images, columns in zip(weight.split(samples, 1), x.split(samples), v.split(samples, 1), strict=True):
        for into, column in zip(part, columns, strict=True):
            into.copy_(of(module, images, column, padding))
    return gradients


def _odd(module: Convolution | Transposed, x: Tensor) -> bool:
    """Whether groups of one image are slow: a processor's float32 kernels are made for channels by the eight."""
    on_processor = x.dtype == torch.float32 and x.device.type == "cpu"
    return on_processor and not module.transposed and module.groups == 1 and module.in_channels % 8 > 0


def _by_groups(module: Convolution | Transposed, x: Tensor, v: Tensor, padding: tuple[int, ...]) -> Tensor:
    """``[B, rows, numbers]``: with every sample a group of one image, the batch sum falls apart."""
    batch, rows = len(x), len(module.weight)
    more = _output_padding(module, x, v) if module.transposed else (0,) * (x.ndim - 2)
    gradient: Tensor = torch.ops.aten.convolution_backward(
        v.reshape(1, -1, *v.shape[2:]),
        x.reshape(1, -1, *x.shape[2:]),
        x.new_empty(1).expand(batch * rows, *module.weight.shape[1:]),
        None,
        module.stride,
        padding,
        module.dilation,
        module.transposed,
        more,
        batch * module.groups,
        (False, True, False),
    )[1]
    return gradient.view(batch, rows, -1)


def _by_unfolding(module: Convolution | Transposed, x: Tensor, v: Tensor, padding: tuple[int, ...]) -> Tensor:
    """``[B, rows, numbers]``: products of the patches with the output gradients; for one group."""
    n = x.ndim - 2
    patches = F.pad(x, [pad for own in reversed(padding) for pad in (own, own)])
    for i, (size, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        patches = patches.unfold(2 + i, dilation * (size - 1) + 1, stride)[..., ::dilation]
    patches = patches.permute(0, 1, *range(2 + n, 2 + 2 * n), *range(2, 2 + n))
    return (patches.flatten(1, 1 + n).flatten(2) @ v.flatten(2).mT).mT


def _output_padding(module: Convolution | Transposed, x: Tensor, v: Tensor) -> tuple[int, ...]:
    """What the outputs ``v [B, out, ...]`` are longer than the inputs ask for: a call may name their size."""
    kernel, stride, padding, dilation = module.kernel_size, module.stride, module.padding, module.dilation
    plain = [
        (inputs - 1) * stride[i] - 2 * int(padding[i]) + dilation[i] * (kernel[i] - 1) + 1
        for i, inputs in enumerate(x.shape[2:])
    ]
    return tuple(outputs - size for outputs, size in zip(v.shape[2:], plain, strict=True))


def _padded(module: Convolution, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return x, module.padding
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, module._reversed_padding_repeated_twice, mode=mode), (0,) * (x.ndim - 2)
