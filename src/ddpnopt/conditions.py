"""What a forward pass depends on beside its inputs: random numbers, autocast, buffers."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditions:
    """States of the random number generators (the CPU's, then the model's GPUs') and of autocast; buffers' versions.

    ``modules``: all of the model's, in which buffers are looked for.
    """

    rng: list[Tensor]
    autocast: tuple[str, torch.dtype, bool]
    buffers: list[int]
    modules: list[nn.Module]

    @staticmethod
    def now(model: nn.Module, device: str) -> "Conditions":
        """The conditions at present; ``device``: the type of the inputs' device."""
        autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        modules = every_module(model)
        return Conditions(rng_states(model), autocast, _versions(modules), modules)

    def changed(self, model: nn.Module) -> bool:
        """Whether random numbers were drawn or buffers written since (dropout, batch statistics)."""
        drawn = any(not torch.equal(a, b) for a, b in zip(self.rng, rng_states(model), strict=True))
        return drawn or self.buffers != _versions(self.modules)

    @contextlib.contextmanager
    def restored(self, model: nn.Module) -> Iterator[None]:
        """Run the body under these conditions; afterwards buffers and generators are as before it."""
        named = [(module, dict(module._buffers)) for module in self.modules if module._buffers]
        buffers = {b: b.clone() for _, own in named for b in own.values() if b is not None}
        device, dtype, enabled = self.autocast
        fast = torch.backends.mha.get_fastpath_enabled()
        # without gradients torch would fuse an evaluated transformer, and take its layers' sequences apart
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with redrawn(model, self.rng), torch.autocast(device, dtype=dtype, enabled=enabled):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, own in named:
                module._buffers.update(own)  # a module may put a new tensor in a buffer's place
            for buffer, before in buffers.items():
                # through .data: a graph recorded in the body is still to be differentiated, and must not see a change
                buffer.data.copy_(before)


@contextlib.contextmanager
def redrawn(model: nn.Module, states: list[Tensor]) -> Iterator[None]:
    """Draw random numbers from these states in the body; afterwards the generators are as before it."""
    now = rng_states(model)
    _set_rng_states(model, states)
    try:
        yield
    finally:
        _set_rng_states(model, now)


def every_module(model: nn.Module) -> list[nn.Module]:
    """``model.modules()``, several times faster: every step asks for them."""
    found = {model: None}
    waiting = [model]
    while waiting:
        new = [m for m in waiting.pop()._modules.values() if m is not None and m not in found]
        found.update(dict.fromkeys(new))
        waiting += new
    return list(found)


def _devices(model: nn.Module) -> list[torch.device]:
    if not torch.cuda.is_initialized():
        return []
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


def _versions(modules: list[nn.Module]) -> list[int]:
    buffers = [b for module in modules for b in module._buffers.values() if b is not None]
    return [-1 if buffer.is_inference() else buffer._version for buffer in buffers]


def rng_states(model: nn.Module) -> list[Tensor]:
    """States of the CPU's generator and of those of the GPUs that hold the model's parameters."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _devices(model))]


def _set_rng_states(model: nn.Module, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(_devices(model), states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)
