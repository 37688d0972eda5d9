"""Normalisation layers: the gradient of a scale is the normalised input times the output's gradient."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..columns import Columns, DenseColumns
from .base import Block, Call, LayerRule, argument, only_cotangent


class NormRule(LayerRule):
    """``Layer``-, ``RMS``-, ``Group``-, ``Instance``- and ``BatchNorm``: weight and bias are a block each.

    In training mode BatchNorm's statistics couple the samples; a column's gradient is then what reaches this
    sample's outputs, and the batch's sum is exact.
    """

    name = "norm"
    why = "gradients of scale and shift in closed form"

    def blocks(self, module: nn.Module, trained: Sequence[str]) -> list[tuple[str, ...]]:
        return [(name,) for name in trained]

    def reads(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        x = argument(args, kwargs, 0, "input")
        return not isinstance(module, _InstanceNorm) or x.ndim > module._get_no_batch_dim()

    def positionwise(self, module: nn.Module) -> bool:
        return isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1

    def columns(self, module: nn.Module, blocks: Sequence[Block], call: Call) -> list[Columns]:
        v = only_cotangent(call)
        x = argument(call.args, call.kwargs, 0, "x" if isinstance(module, nn.RMSNorm) else "input")
        of = {
            "weight": lambda: _per_parameter(module, v * normalised(module, x, v.dtype)),
            "bias": lambda: _per_parameter(module, v),
        }
        return [DenseColumns(of[block.names[0]]().flatten(2).view(*v.shape[:2], *_shape(block))) for block in blocks]


def mixes_samples(module: nn.Module) -> bool:
    """Whether a module normalises by the statistics of the present batch, so that no sample's output is its own."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def normalised(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The input before scale and shift, as the forward pass saw it, in ``dtype``."""
    if isinstance(module, nn.RMSNorm):
        # in the input's own precision: an eps of None stands for a number that depends on it
        return F.rms_norm(x, module.normalized_shape, eps=module.eps).to(dtype)
    x = x.to(dtype)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    assert isinstance(module, _BatchNorm | _InstanceNorm)
    own = module.training or module.running_mean is None  # of the batch, or of each sample
    mean, var = (None, None) if own else (module.running_mean, module.running_var)
    if isinstance(module, _InstanceNorm):
        return F.instance_norm(x, mean, var, use_input_stats=own, eps=module.eps)
    mean, var = (m if m is None else m.to(x.dtype) for m in (mean, var))
    return F.batch_norm(x, mean, var, training=own, eps=module.eps)


def _per_parameter(module: nn.Module, values: Tensor) -> Tensor:
    """Sum ``[R, B, ...]`` over all positions a parameter entry is shared by."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        own = len(module.normalized_shape)
        return values.flatten(2, -own - 1).sum(2) if values.ndim > 2 + own else values
    return values.flatten(3).sum(3) if values.ndim > 3 else values


def _shape(block: Block) -> tuple[int, int]:
    matrix = block.matrix(block.tensors)
    return matrix.shape[0], matrix.shape[1]
