"""The processes that a launcher such as ``torchrun`` starts for one training run: what each does, and how all end.

Every rank takes its part of each batch. Rank 0 alone shows, writes and measures. An error on one rank ends all: it
answers the next exchange that the others are about to make, whichever it is, since all exchanges are alike.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

_Made = TypeVar("_Made")


class ElsewhereError(Exception):
    """Another rank has failed and says why; this one ends without a word."""


class LostError(OSError):
    """Another rank has ended without a word."""


class Team:
    """One process among ``size`` that train one model together; by default one that trains alone.

    Args:
        rank: its number.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this process shows, writes and measures."""
        return self.rank == 0

    def own(self, rows: Tensor) -> Tensor:
        """This rank's part of a batch's sample numbers; the parts differ by one sample at most, or are empty."""
        return rows.tensor_split(self.size)[self.rank]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is raised inside on one rank ends all: the first to fail raises it, the others ElsewhereError."""
        try:
            yield
        except (ElsewhereError, LostError):
            raise
        except Exception:
            if self.size > 1 and self._exchange(1.0)[: self.rank, 0].any():
                raise self._silenced() from None
            raise

    def agree(self, number: float = 0.0) -> Tensor:
        """Everybody's numbers, ``[size]`` in float64.

        Raises:
            ElsewhereError: a rank failed since the last exchange.
            LostError: a rank has ended.
        """
        if self.size == 1:
            return torch.tensor([number], dtype=torch.float64)
        found = self._exchange(0.0, number)
        if found[:, 0].any():
            raise self._silenced()
        return found[:, 1]

    def mean(self, own: float, share: float) -> float:
        """The mean over a batch of what is the mean ``own`` over this rank's ``share`` of it."""
        return own if self.size == 1 else float(self.agree(own * share if share else 0.0).sum())

    def from_first(self, make: Callable[[], _Made]) -> _Made:
        """What ``make`` returns on rank 0, where alone it is called."""
        if self.size == 1:
            return make()
        made: list[_Made | None] = [None]
        with self.together():
            made = [make() if self.leads else None]
        self.agree()
        with _lost(self):
            distributed.broadcast_object_list(made, src=0)
        return made[0]  # type: ignore[return-value]  # None only if that was made

    def average_gradients(self, model: nn.Module, share: float) -> None:
        """Let ``.grad``, of the mean over this rank's ``share`` of the batch, be that of the mean over the batch.

        ``DistributedDataParallel`` would weigh ranks alike, which is wrong for batches that do not divide evenly.
        """
        if self.size == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        flat = flat * share if share else torch.zeros_like(flat)
        with _lost(self):
            distributed.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _exchange(self, failed: float, number: float = 0.0) -> Tensor:
        own = torch.tensor([failed, number], dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        with _lost(self):
            distributed.all_gather(found, own)
        return torch.stack(found)

    def _silenced(self) -> ElsewhereError:
        """Wait until the rank that failed is gone: a launcher ends all as soon as one ends, before it has spoken."""
        with contextlib.suppress(RuntimeError):
            distributed.barrier()
        return ElsewhereError()


ALONE = Team()
"""A process that trains by itself."""


@contextlib.contextmanager
def join() -> Iterator[Team]:
    """Meet the other processes, if a launcher has started any: it sets WORLD_SIZE, RANK and where to meet.

    Raises:
        ValueError: the launcher says that there are several processes, but not which this is or where they meet.
    """
    if not launched():
        yield ALONE
        return
    meets = not distributed.is_initialized()
    if meets:
        # Its functions' defaults keep the group of the moment they are first imported, as by every optimizer's
        # constructor. That group outlives destroy_process_group, and gloo's threads with it: a process whose
        # interpreter ends while one of them drops a tensor aborts.
        importlib.import_module("torch.distributed.nn.functional")
        distributed.init_process_group("gloo")
    yield Team(distributed.get_rank(), distributed.get_world_size())
    if meets:  # after an error the process ends, and the others must not hear of it before it has said why
        distributed.barrier()  # a rank that left well before another was seen to abort
        distributed.destroy_process_group()


def launched() -> bool:
    """Whether a launcher has started several processes of which this is one."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


@contextlib.contextmanager
def _lost(team: Team) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of gloo: a connection is gone, or its time is up
        if not team.leads:
            raise ElsewhereError from error
        raise LostError(
            "another rank has ended or does not answer; start again with --resume, on as many ranks as are left "
            f"({str(error).partition('. ')[0]})"
        ) from error
