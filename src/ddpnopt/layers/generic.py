"""Any other module: the gradients of its own parameters by a functional vjp over samples."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..columns import Columns, DenseColumns
from .base import Block, Call, LayerRule

Parameters = dict[str, Tensor]


class GenericRule(LayerRule):
    """Modules without a rule of their own. Slow, and right for every module that treats samples alike."""

    name = "generic"
    why = "no closed form for this type: functional vjp over samples"

    def blocks(self, module: nn.Module, trained: Sequence[str]) -> list[tuple[str, ...]]:
        return [(name,) for name in trained]

    def columns(self, module: nn.Module, blocks: Sequence[Block], call: Call) -> list[Columns]:
        parameters = {name: p.detach() for block in blocks for name, p in zip(block.names, block.tensors, strict=True)}
        gradients = per_sample_gradients(module, parameters, call)

        def columns_of(block: Block) -> Columns:
            values = gradients[block.names[0]]
            values = values.reshape(*values.shape[:2], *block.matrix(block.tensors).shape)
            return DenseColumns(values.to(torch.promote_types(values.dtype, torch.float32)))

        return [columns_of(block) for block in blocks]


def depends_on(module: nn.Module, block: Block, call: Call) -> bool:
    """Whether any output of this run of the module depends on a block of its own parameters."""
    own = {name: p.detach().requires_grad_() for name, p in zip(block.names, block.tensors, strict=True)}
    with torch.enable_grad():
        sums = [out.sum() for out in _outputs(module, own, call.args, call.kwargs) if out.requires_grad]
    found = torch.autograd.grad(sums, list(own.values()), allow_unused=True) if sums else ()
    return any(gradient is not None for gradient in found)


def _outputs(module: nn.Module, parameters: Parameters, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The floating-point tensors that the module returns, run with these parameters for its own."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}  # statistics must not move again
    with torch.enable_grad():
        out = torch.func.functional_call(module, {**buffers, **parameters}, tuple(args), dict(kwargs))
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def per_sample_gradients(module: nn.Module, parameters: Parameters, call: Call) -> Parameters:
    """Gradients ``[R, B, *shape]`` of ``parameters`` (of ``module``'s own, by name) for every column and sample.

    Vectorised where torch's vmap gets the module right, sample by sample where it does not. The sum over samples
    is compared with the whole batch's own gradient, so what comes back is right.

    Raises:
        RuntimeError: if the module mixes its samples, so that no gradient belongs to one of them.
    """
    used = [i for i, cotangent in enumerate(call.cotangents) if cotangent is not None]
    cotangents = [c for c in call.cotangents if c is not None]
    columns, batch = cotangents[0].shape[:2]
    leaves, spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
    batched = [isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == batch for leaf in leaves]
    inputs = [leaf for leaf, per_sample in zip(leaves, batched, strict=True) if per_sample]

    def outputs(parameters: Parameters, rows: list[Tensor]) -> list[Tensor]:
        own = iter(rows)
        filled = [next(own) if per_sample else leaf for leaf, per_sample in zip(leaves, batched, strict=True)]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        tensors = _outputs(module, parameters, args, kwargs)
        return [tensors[i] for i in used]

    def pulled(rows: list[Tensor], v: list[Tensor]) -> Parameters:
        """The gradients ``[*shape]`` of one column ``v [b, ...]`` summed over the ``b`` samples of ``rows``."""
        _, vjp, *_ = torch.func.vjp(lambda p: outputs(p, rows), parameters)
        gradients: Parameters = vjp(v)[0]
        return gradients

    def alone(rows: list[Tensor], v: list[Tensor]) -> Parameters:
        return pulled([row[None] for row in rows], [c[None] for c in v])

    def vectorised() -> Parameters:
        by_sample = torch.func.vmap(alone, randomness="same")
        by_column = torch.func.vmap(by_sample, in_dims=(None, 0), randomness="same")
        with warnings.catch_warnings():  # of operations that vmap runs one by one: slow is what this rule is
            warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
            gradients: Parameters = by_column(inputs, cotangents)
        return gradients

    def looped() -> Parameters:
        each = [
            alone([x[b] for x in inputs], [c[r, b] for c in cotangents]) for r in range(columns) for b in range(batch)
        ]
        stacked = {name: torch.stack([one[name] for one in each]) for name in parameters}
        return {name: values.view(columns, batch, *values.shape[1:]) for name, values in stacked.items()}

    whole = [pulled(inputs, [c[r] for c in cotangents]) for r in range(columns)]
    for attempt in (vectorised, looped):
        try:
            gradients = attempt()
        except RuntimeError:  # vmap refuses modules in ways of its own; what the loop refuses is not for columns
            if attempt is looped:
                raise
            continue
        if all(_adds_up(gradients[name], torch.stack([one[name] for one in whole])) for name in parameters):
            return gradients
    raise RuntimeError("it mixes the samples of a batch")


def _adds_up(gradients: Tensor, whole: Tensor) -> bool:
    if gradients.shape[0] != whole.shape[0] or gradients.shape[2:] != whole.shape[1:]:
        return False
    scale = gradients.norm().clamp_min(torch.finfo(whole.dtype).tiny)
    return bool((gradients.sum(1) - whole).norm() <= whole.numel() * torch.finfo(whole.dtype).eps ** 0.75 * scale)
