"""Embeddings: a sample's gradient is that of its output, in the rows it has read."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..columns import Columns, RowColumns, gathered
from .base import Block, Call, LayerRule, argument, only_cotangent

BY_COUNT = "scale_grad_by_freq divides by the whole batch's counts: one update from the whole batch's gradient"


class EmbeddingRule(LayerRule):
    """``nn.Embedding`` on ``[B, ...]``. ``max_norm`` projects in the forward pass, which gradients do not see."""

    name = "embedding"
    why = "gradients are the output's, in the rows that were read; no table is formed per sample"

    def blocks(self, module: nn.Module, trained: Sequence[str]) -> list[tuple[str, ...]]:
        return [("weight",)]

    def refuses(self, module: nn.Module) -> str | None:
        return BY_COUNT if module.scale_grad_by_freq else None

    def positionwise(self, module: nn.Module) -> bool:
        return True

    def columns(self, module: nn.Module, blocks: Sequence[Block], call: Call) -> list[Columns]:
        assert isinstance(module, nn.Embedding)
        v = only_cotangent(call)
        read = argument(call.args, call.kwargs, 0, "input").reshape(v.shape[1], -1)
        return [_in_rows(module, read, v.reshape(*v.shape[:2], -1, v.shape[-1]))]


class EmbeddingBagRule(EmbeddingRule):
    """``nn.EmbeddingBag`` on ``[B, S]``, one bag per sample; bags given by offsets do not lead with the batch."""

    name = "embedding bag"

    def positionwise(self, module: nn.Module) -> bool:
        return False

    def reads(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        ndim: int = argument(args, kwargs, 0, "input").ndim
        return ndim == 2

    def columns(self, module: nn.Module, blocks: Sequence[Block], call: Call) -> list[Columns]:
        assert isinstance(module, nn.EmbeddingBag)
        v = only_cotangent(call)[:, :, None]
        read = argument(call.args, call.kwargs, 0, "input")
        share = read.ne(-1 if module.padding_idx is None else module.padding_idx).to(v.dtype)[..., None]
        if module.mode == "max":
            entries = module.weight.detach()[read].to(v.dtype).masked_fill(share == 0, -torch.inf)
            share = torch.zeros_like(entries).scatter_(1, entries.argmax(1, keepdim=True), 1.0) * share
        elif module.mode == "mean":
            share = share / share.sum(1, keepdim=True).clamp_min(1)
        elif (weights := argument(call.args, call.kwargs, 2, "per_sample_weights")) is not None:
            share = share * weights.to(v.dtype)[..., None]
        return [_in_rows(module, read, v * share)]


def _in_rows(module: nn.Embedding | nn.EmbeddingBag, read: Tensor, values: Tensor) -> RowColumns:
    """Columns of ``values [R, B, S, d]`` in the rows ``read [B, S]``; the padding row gets none."""
    samples = torch.arange(len(read), device=read.device)[:, None].expand_as(read)
    kept = torch.ones_like(read, dtype=torch.bool) if module.padding_idx is None else read != module.padding_idx
    return gathered(samples[kept], read[kept].long(), values[:, kept], len(read), module.num_embeddings)
