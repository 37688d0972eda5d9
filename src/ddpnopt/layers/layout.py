"""Which dimension is the batch, of what goes into a module and what comes out of it."""

from collections.abc import Sequence

from torch import Tensor, nn

from .base import LayerRule

LAYERS = nn.TransformerEncoderLayer | nn.TransformerDecoderLayer
STACKS = nn.TransformerEncoder | nn.TransformerDecoder


class Layout:
    """Layout of a model's tensors, from modules' settings, from rules, and from shapes where these leave a choice.

    Torch's transformers with ``batch_first=False`` have the batch second in every layer inside. Elsewhere in a model
    with such modules, a layer that does the same at every position has the batch second if the first dimension is
    not as long as the batch.
    """

    def __init__(self, model: nn.Module):
        sequence_first = [m for m in model.modules() if not getattr(m, "batch_first", True)]
        holders = [m for m in model.modules() if isinstance(m, LAYERS) and not m.self_attn.batch_first]
        stacks = [m for m in model.modules() if isinstance(m, STACKS) and m.layers and m.layers[0] in holders]
        self._second = {inner for holder in [*holders, *stacks] for inner in holder.modules()}
        self._either = bool(sequence_first)

    def dims(
        self, module: nn.Module, rule: LayerRule, tensors: Sequence[Tensor], batch: int, *, inputs: bool
    ) -> list[int]:
        """Of each floating-point tensor that goes in (or out), in order, the dimension that should be the batch."""
        sides = rule.batch_dims(module)
        given = sides.inputs if inputs else sides.outputs
        dims = [given[min(i, len(given) - 1)] for i in range(len(tensors))]
        if not self._second and not self._either:
            return dims
        if module in self._second and (isinstance(module, LAYERS | STACKS) or rule.name == "generic"):
            return [int(x.ndim > 2) for x in tensors]
        if not rule.positionwise(module):
            return dims
        return [1 if self._is_second(module, x, batch) else dim for x, dim in zip(tensors, dims, strict=True)]

    def _is_second(self, module: nn.Module, x: Tensor, batch: int) -> bool:
        possible = x.ndim > 2 and is_batch(x, 1, batch)
        return possible and (module in self._second or (self._either and not is_batch(x, 0, batch)))


def is_batch(tensor: Tensor, dim: int, batch: int) -> bool:
    """Whether a tensor's dimension ``dim`` has the batch's length."""
    return tensor.ndim > dim and tensor.shape[dim] == batch
