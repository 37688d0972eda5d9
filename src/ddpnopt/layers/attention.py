"""Attention: its projections' gradients are outer products over positions.

Shapes: ``L`` positions of the query, ``S`` of key and value, ``E`` features; the batch leads everywhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..columns import Columns, DenseColumns, OuterColumns
from .base import BatchDims, Block, Call, LayerRule, argument

INPUTS = ("query", "key", "value")


class AttentionRule(LayerRule):
    """``nn.MultiheadAttention`` on batches, all its options; its ``out_proj``, which it never calls, is part of it.

    What lies between the projections runs once more, all samples together and with the same dropout, and is
    differentiated at the projections. Not read: dropout in half precision on a GPU, whose mask depends on the kernel.
    """

    name = "attention"
    why = "outer products over positions; gradients at the projections by one vjp of what lies between them"

    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        assert isinstance(module, nn.MultiheadAttention)
        behind = {f"out_proj.{name}": p for name, p in super().parameters(module.out_proj).items()}
        return super().parameters(module) | behind

    def blocks(self, module: nn.Module, trained: Sequence[str]) -> list[tuple[str, ...]]:
        together = [("in_proj_weight", "in_proj_bias"), ("out_proj.weight", "out_proj.bias")]
        if "in_proj_weight" not in trained:
            together = together[1:]
        pairs = [tuple(name for name in pair if name in trained) for pair in together]
        single = [(name,) for name in trained if not any(name in pair for pair in pairs)]
        return [*single, *(pair for pair in pairs if pair)]

    def reads(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        query: Tensor = argument(args, kwargs, 0, "query")
        halved = query.is_cuda and (query.dtype.itemsize < 4 or torch.is_autocast_enabled("cuda"))
        return query.ndim == 3 and not query.is_nested and not (halved and self.draws(module))

    def batch_dims(self, module: nn.Module) -> BatchDims:
        dim = 0 if module.batch_first else 1
        return BatchDims((dim, dim, dim, 0), (dim, 0))  # masks and attention weights lead with the batch either way

    def draws(self, module: nn.Module) -> bool:
        assert isinstance(module, nn.MultiheadAttention)
        return module.training and module.dropout > 0

    def columns(self, module: nn.Module, blocks: Sequence[Block], call: Call) -> list[Columns]:
        assert isinstance(module, nn.MultiheadAttention)
        dtype = next(v.dtype for v in call.cotangents if v is not None)
        weights = {name: p.detach().to(dtype) for name, p in self.parameters(module).items()}
        given = [argument(call.args, call.kwargs, i, name) for i, name in enumerate(INPUTS)]
        inputs = [(x if module.batch_first else x.transpose(0, 1)).to(dtype) for x in given]
        projected = _projected(inputs, weights)
        with torch.enable_grad():
            heads, attention = _attended(module, [x.requires_grad_() for x in projected], call)
        v = _pulled(projected, heads, attention, weights["out_proj.weight"], call)

        def columns_of(block: Block) -> Columns:
            name = block.names[0]
            if name in ("bias_k", "bias_v"):
                return DenseColumns(v[INPUTS.index("key" if name == "bias_k" else "value")][:, :, -1:])
            at_inputs = [v[i][:, :, : x.shape[1]] for i, x in enumerate(inputs)]
            if name == "in_proj_bias":
                return DenseColumns(torch.cat([own.sum(2) for own in at_inputs], 2)[..., None])
            if name == "in_proj_weight":
                return _packed(block, inputs, at_inputs, shared=[_same(given[0], x) for x in given])
            if name.startswith("out_proj"):
                out = call.cotangents[0]
                at_output = heads.new_zeros(len(v[0]), *heads.shape) if out is None else out
                return OuterColumns(at_output, _with_one(block, heads.detach()))
            i = ("q_proj_weight", "k_proj_weight", "v_proj_weight").index(name)
            return OuterColumns(at_inputs[i], inputs[i])

        return [columns_of(block) for block in blocks]


def _projected(inputs: Sequence[Tensor], weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Queries, keys and values, a learnt key and value included."""
    packed = weights.get("in_proj_weight")
    if packed is not None:
        matrices: Sequence[Tensor] = packed.chunk(3)
    else:
        matrices = [weights[f"{letter}_proj_weight"] for letter in "qkv"]
    bias = weights.get("in_proj_bias")
    biases: Sequence[Tensor | None] = [None] * 3 if bias is None else bias.chunk(3)
    projected = [F.linear(x, W, b) for x, W, b in zip(inputs, matrices, biases, strict=True)]
    for i, name in ((1, "bias_k"), (2, "bias_v")):
        if name in weights:
            projected[i] = torch.cat([projected[i], weights[name].expand(len(projected[i]), 1, -1)], 1)
    return projected


def _attended(module: nn.MultiheadAttention, projected: Sequence[Tensor], call: Call) -> tuple[Tensor, Tensor | None]:
    """What ``out_proj`` sees ``[B, L, E]``, and the attention weights: torch's own code with identity projections."""
    dtype = projected[0].dtype
    names = {3: "key_padding_mask", 4: "need_weights", 5: "attn_mask", 6: "average_attn_weights", 7: "is_causal"}
    options = {name: argument(call.args, call.kwargs, i, name) for i, name in names.items()}
    options = {name: value for name, value in options.items() if value is not None}
    for name in ("key_padding_mask", "attn_mask"):
        if (mask := options.get(name)) is not None:
            mask = mask.to(dtype) if mask.is_floating_point() else mask
            options[name] = mask if module.bias_k is None else F.pad(mask, (0, 1))
    one = torch.eye(module.embed_dim, dtype=dtype, device=projected[0].device)
    query, key, value = (x.transpose(0, 1) for x in projected)
    heads, attention = F.multi_head_attention_forward(
        query,
        key,
        value,
        module.embed_dim,
        module.num_heads,
        in_proj_weight=None,
        in_proj_bias=None,
        bias_k=None,
        bias_v=None,
        add_zero_attn=module.add_zero_attn,
        dropout_p=module.dropout,
        out_proj_weight=one,
        out_proj_bias=None,
        training=module.training,
        use_separate_proj_weight=True,
        q_proj_weight=one,
        k_proj_weight=one,
        v_proj_weight=one,
        **options,
    )
    return heads.transpose(0, 1), attention


def _pulled(
    projected: Sequence[Tensor], heads: Tensor, attention: Tensor | None, out_proj: Tensor, call: Call
) -> list[Tensor]:
    """Columns ``[R, B, L or S, E]`` at queries, keys and values."""
    at_output, *at_weights = call.cotangents
    ends: list[tuple[Tensor, Tensor]] = []
    if at_output is not None:
        ends.append((heads, at_output @ out_proj))
    if at_weights and at_weights[0] is not None and attention is not None:
        ends.append((attention, at_weights[0]))
    tensors = [tensor for tensor, _ in ends]
    pulled = [
        torch.autograd.grad(tensors, projected, [v[r] for _, v in ends], retain_graph=True, materialize_grads=True)
        for r in range(len(ends[0][1]))
    ]
    return [torch.stack(columns) for columns in zip(*pulled, strict=True)]


def _packed(
    block: Block, inputs: Sequence[Tensor], at_inputs: Sequence[Tensor], shared: Sequence[bool]
) -> OuterColumns:
    """Columns of the packed projections ``[3 E, E]``: what is projected for several uses is there once."""
    if all(shared):
        return OuterColumns(torch.cat(list(at_inputs), 3), _with_one(block, inputs[0]))
    width = at_inputs[0].shape[3]
    in_place = [F.pad(v, (i * width, (2 - i) * width)) for i, v in enumerate(at_inputs)]
    return OuterColumns(torch.cat(in_place, 2), _with_one(block, torch.cat(list(inputs), 1)))


def _with_one(block: Block, x: Tensor) -> Tensor:
    """Inputs of a block's matrix: with a 1 for the bias, where it is part of it."""
    ones = x.new_ones(*x.shape[:2], 1)
    sides = [ones if name.endswith("bias") else x for name in block.names]
    return torch.cat(sides, 2)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
