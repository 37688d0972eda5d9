"""The processes that train one model together: who they are, and what is sent between them, counted.

On torch's own collectives alone. What a process sends is counted where it is sent, by the ring that gloo and NCCL run
for messages of this size: with ``p`` processes and ``n`` bytes in each one's tensor, ``(p - 1) n`` to gather,
``2 (p - 1) / p n`` to sum, ``(p - 1) / p n`` to trade slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from .errors import StepError


@dataclass
class Traffic:
    """What this process has sent to others since it was set to zero: payload in bytes, and messages."""

    bytes: int = 0
    messages: int = 0


class UnreachableError(StepError):
    """Another process did not answer: it has ended, or is stuck."""


class Ranks:
    """One process among ``size`` that train the same weights on different samples.

    Args:
        group: of ``torch.distributed``; ``None``: this process is alone, and every collective is the identity.
        device: where tensors have to be to be sent.
    """

    def __init__(self, group: Any = None, device: torch.device | None = None):
        self._group = group
        self._device = torch.device("cpu") if device is None else device
        self.rank: int = 0 if group is None else distributed.get_rank(group)
        self.size: int = 1 if group is None else distributed.get_world_size(group)
        self.traffic = Traffic()

    def gather(self, tensor: Tensor, lengths: Sequence[int] | None = None) -> list[Tensor]:
        """Everybody's vectors, by rank; ``lengths``: theirs, where they differ."""
        if self.size == 1:
            return [tensor]
        longest = len(tensor) if lengths is None else max(lengths)
        own = tensor.to(self._device).contiguous()
        if len(own) < longest:
            own = torch.cat([own, own.new_zeros(longest - len(own))])
        found = [torch.empty_like(own) for _ in range(self.size)]
        self._run(distributed.all_gather, found, own)
        self._count(own.nbytes * (self.size - 1), self.size - 1)
        cut = [longest] * self.size if lengths is None else lengths
        return [part[:n].to(tensor.device) for part, n in zip(found, cut, strict=True)]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of everybody's tensors, the same bits on every rank; a new tensor unless this process is alone."""
        if self.size == 1 or not tensor.numel():
            return tensor
        total = tensor.to(self._device, copy=True).contiguous()
        self._run(distributed.all_reduce, total)
        self._count(2 * (self.size - 1) * total.nbytes // self.size, 2 * (self.size - 1))
        return total.to(tensor.device)

    def trade(self, tensor: Tensor, lengths: Sequence[int], theirs: Sequence[int]) -> list[Tensor]:
        """Give every rank its slice of a vector; returns the slices that they give to this one.

        Args:
            tensor: the slices for ranks 0, 1, ... one after another.
            lengths: of these.
            theirs: of what each rank gives to this one.
        """
        if self.size == 1:
            return [tensor]
        own = tensor.to(self._device).contiguous()
        found = own.new_empty(sum(theirs))
        self._run(distributed.all_to_all_single, found, own, list(theirs), list(lengths))
        self._count(own.nbytes - lengths[self.rank] * own.element_size(), self.size - 1)
        return list(found.to(tensor.device).split(list(theirs)))

    def _run(self, collective: Any, *arguments: Any) -> None:
        try:
            collective(*arguments, group=self._group)
        except RuntimeError as error:  # of the backend: a connection is gone, or its time is up
            raise UnreachableError(
                f"rank {self.rank} of {self.size} lost the others in the middle of a step ({error}); the weights here "
                "are as they were before it. Start again from the last checkpoint, on as many ranks as are left"
            ) from error

    def _count(self, sent: int, messages: int) -> None:
        self.traffic.bytes += sent
        self.traffic.messages += messages


def find_ranks(group: Any, device: torch.device) -> Ranks:
    """The ranks of a process group; of the default one, if there is one, for ``None``."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return Ranks()
    group = distributed.group.WORLD if group is None else group
    if distributed.get_world_size(group) == 1:
        return Ranks()
    return Ranks(group, device if "nccl" in distributed.get_backend(group) else None)
