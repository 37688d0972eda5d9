"""Compiled models: the module inside, and code that is older than the hooks."""

import torch
from torch import nn


def plain(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` was given to make ``model``, whose parameters it shares; any other model itself.

    Passes through either are recorded: compiled code breaks off at the recorder's hooks (:class:`.hooks.ModuleHook`).
    """
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def drop_old_code(model: nn.Module) -> None:
    """Have compiled code made anew, if the model or a part of it is compiled: of new hooks, old code knows nothing."""
    if any(plain(module) is not module or module._compiled_call_impl is not None for module in model.modules()):
        torch.compiler.reset()
