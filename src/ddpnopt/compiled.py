"""Compiled models are refused: hooks added after the first compiled call are ignored without a word."""

import torch
from torch import nn

from .errors import StepError

REMEDY = (
    "train the plain module: the optimizer reads layers by hooks, which compiled code leaves out or breaks up at. A "
    "compiled copy may serve for evaluation, under torch.no_grad()"
)


def refuse_compiled(model: nn.Module | None, *, seen: bool = False) -> None:
    """Raise :class:`StepError` if a module with parameters is compiled, in place or as a copy.

    ``seen``: whether the model has been seen to run in compiled code, whichever way it came there.
    """
    for name, module in model.named_modules() if model is not None else ():
        # a compiled copy wraps the module it was made from under this name
        as_copy = isinstance(getattr(module, "_orig_mod", None), nn.Module)
        if (as_copy or module._compiled_call_impl is not None) and any(True for _ in module.parameters()):
            how = "is what torch.compile returned" if as_copy else "was compiled in place (module.compile())"
            raise StepError(f"{name or 'the model'} {how}: {REMEDY}")
    if seen:
        raise StepError(f"the forward pass ran in code compiled by torch.compile: {REMEDY}")


def running_compiled() -> bool:
    """Whether the caller's code is compiled; a function so small that the compiler can trace it, and so says yes."""
    return torch.compiler.is_compiling()
