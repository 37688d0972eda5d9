"""Layer rules: from one call of a module to its parameters' column gradients."""

import sys

from torch import nn

from .attention import AttentionRule
from .base import Block, Call, LayerRule
from .conv import ConvRule, ConvTransposeRule
from .embedding import EmbeddingBagRule, EmbeddingRule
from .generic import GenericRule
from .layout import Layout, is_batch
from .linear import LinearRule
from .norm import NormRule, mixes_samples
from .recurrent import CellRule, RecurrentRule

_RULES: dict[type[nn.Module], LayerRule] = {
    nn.Linear: LinearRule(),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvRule()),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ConvTransposeRule()),
    **dict.fromkeys(
        (
            nn.LayerNorm,
            nn.RMSNorm,
            nn.GroupNorm,
            *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
            *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        ),
        NormRule(),
    ),
    nn.Embedding: EmbeddingRule(),
    nn.EmbeddingBag: EmbeddingBagRule(),
    nn.MultiheadAttention: AttentionRule(),
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU), RecurrentRule()),
    **dict.fromkeys((nn.RNNCell, nn.LSTMCell, nn.GRUCell), CellRule()),
}
_GENERIC = GenericRule()


def rule_for(module: nn.Module) -> LayerRule:
    """Return the rule of a module's exact type (a subclass may compute something else), or the generic one."""
    kind = type(module)
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if sharded is not None and kind.__mro__[1] is sharded:  # fully_shard has put a class of its own in front
        kind = kind.__mro__[2]
    return _RULES.get(kind, _GENERIC)


__all__ = ["Block", "Call", "LayerRule", "Layout", "is_batch", "mixes_samples", "rule_for"]
