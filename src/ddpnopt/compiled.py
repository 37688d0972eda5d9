"""The module inside a compiled one."""

from torch import nn


def plain(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` was given to make ``model``, whose parameters it shares; any other model itself.

    Passes through either are recorded: compiled code breaks off at the recorder's hooks (:class:`.hooks.ModuleHook`).
    """
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model
