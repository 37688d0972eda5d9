"""Any other module: the gradients of its own parameters by a functional vjp over samples."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..columns import Columns, DenseColumns
from .base import Block, Call, LayerRule

Tree = Any


class GenericRule(LayerRule):
    """Modules without a rule of their own. Slow, and right for every module that treats samples alike."""

    name = "generic"
    why = "no closed form for this type: functional vjp over samples"

    def blocks(self, module: nn.Module, trained: Sequence[str]) -> list[tuple[str, ...]]:
        return [(name,) for name in trained]

    def columns(self, module: nn.Module, blocks: Sequence[Block], call: Call) -> list[Columns]:
        parameters = {
            name: p.detach() for block in blocks for name, p in zip(block.names, block.parameters, strict=True)
        }
        gradients = per_sample_gradients(module, parameters, call)
        return [
            DenseColumns(gradients[block.names[0]].flatten(2).unflatten(2, block.matrix(block.parameters).shape))
            for block in blocks
        ]


def per_sample_gradients(module: nn.Module, parameters: dict[str, Tensor], call: Call) -> dict[str, Tensor]:
    """Gradients ``[R, B, *shape]`` of ``parameters`` (of ``module``'s own, by name) for every column and sample."""
    used = [i for i, cotangent in enumerate(call.cotangents) if cotangent is not None]
    cotangents = [c for c in call.cotangents if c is not None]
    batch = cotangents[0].shape[1]
    leaves, spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
    batched = [isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == batch for leaf in leaves]
    samples = [leaf for leaf, per_sample in zip(leaves, batched, strict=True) if per_sample]

    def outputs(parameters: dict[str, Tensor], sample: list[Tensor]) -> list[Tensor]:
        own = iter(sample)
        filled = [next(own)[None] if per_sample else leaf for leaf, per_sample in zip(leaves, batched, strict=True)]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        with torch.enable_grad():
            out = torch.func.functional_call(module, parameters, args, kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return [tensors[i][0] for i in used]

    def pulled(sample: list[Tensor], columns: list[Tensor]) -> dict[str, Tensor]:
        _, vjp = torch.func.vjp(lambda p: outputs(p, sample), parameters)
        result: dict[str, Tensor] = torch.func.vmap(lambda c: vjp(c)[0])(columns)
        return result

    per_sample = torch.func.vmap(pulled, in_dims=(0, 1), out_dims=1, randomness="same")
    result: dict[str, Tensor] = per_sample(samples, cotangents)
    return result
