"""Linear layers: gradients are outer products and stay factored."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..columns import Columns, OuterColumns
from .base import Block, Call, LayerRule, only_cotangent, weight_and_bias


class LinearRule(LayerRule):
    """``nn.Linear`` on ``[B, in]`` or ``[B, ..., in]``; the dimensions between are positions."""

    name = "linear"
    why = "gradients are outer products of inputs and output gradients; none is formed per sample"

    def blocks(self, module: nn.Module, trained: Sequence[str]) -> list[tuple[str, ...]]:
        return weight_and_bias(trained)

    def positionwise(self, module: nn.Module) -> bool:
        return True

    def columns(self, module: nn.Module, blocks: Sequence[Block], call: Call) -> list[Columns]:
        v = only_cotangent(call)
        v = v.reshape(*v.shape[:2], -1, v.shape[-1])
        x = call.args[0] if call.args else call.kwargs["input"]
        x = x.reshape(v.shape[1], v.shape[2], -1).to(v.dtype)
        return [OuterColumns(v, _inputs_of(block, x)) for block in blocks]


def _inputs_of(block: Block, x: Tensor) -> Tensor:
    ones = x.new_ones(*x.shape[:2], 1)
    sides = {"weight": x, "bias": ones}
    return torch.cat([sides[name] for name in block.names], 2)
