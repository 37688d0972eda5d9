"""What ranks agree on in the course of a step: to go on, or to stop together, whoever it was that could not.

Every exchange carries a word on how its sender fares. A rank on which something fails answers the exchange that the
others are about to make, whichever it is, since all of a stretch have one length; then everybody hears the reason, and
all raise. Between exchanges nothing is sent but what all ranks send at the same place, computed from the same numbers.
"""

import contextlib
import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .errors import NonFiniteError, StepError
from .ranks import Ranks, UnreachableError

WELL, FAILED, NOT_FINITE, OVERFLOW = range(4)
SHORT = 5
"""Numbers in an exchange before the ranks know one another's batches."""
REASON = 400
"""Longest reason, in bytes."""


class ScalerError(StepError):
    """A GradScaler has found a gradient that is not finite: the step is left out, on all ranks."""


class Accord:
    """The agreements of one step.

    Args:
        ranks: who takes part.

    Attributes:
        counts: samples of each rank.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.counts: list[int] = [0]
        self._length = SHORT
        self._over = ranks.size == 1

    @property
    def several(self) -> bool:
        """Whether there is anybody to agree with."""
        return self.ranks.size > 1

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Whatever is raised inside on one rank is raised on all."""
        try:
            yield
        except Exception as error:
            if not self._over and not isinstance(error, UnreachableError):
                self._tell(error)
            raise

    def exchange(self, *values: float | Tensor) -> Tensor:
        """Everybody's numbers in float64, ``[size, n]``; fewer than ``n`` are followed by zeros.

        Raises:
            StepError: the reason, if it went wrong on some rank.
        """
        flat = [torch.as_tensor(value, dtype=torch.float64).detach().flatten().cpu() for value in values]
        return self._send(WELL, torch.cat(flat))

    def expect(self, length: int) -> None:
        """From now on exchanges are of ``length`` numbers."""
        self._length = length

    def count(self, samples: int) -> None:
        """Tell and learn how many samples every rank has."""
        self.counts = [int(n) for n in self.exchange(samples)[:, 0]] if self.several else [samples]
        if sum(self.counts) == 0 and self.several:
            raise StepError("the batch is empty on every rank")

    def total(self, sums: Sequence[float]) -> Sequence[float]:
        """Sums over everybody's samples."""
        if not self.several:
            return sums
        found: list[float] = self.exchange(*sums)[:, : len(sums)].sum(0).tolist()
        return found

    def texts(self, own: str) -> list[str]:
        """Everybody's texts; sent in full only if they are not all the same."""
        data = own.encode()
        said = self.exchange(zlib.crc32(data), len(data))[:, :2].long().tolist()
        if all(one == said[0] for one in said):
            return [own] * len(said)
        parts = self.ranks.gather(torch.frombuffer(bytearray(data), dtype=torch.uint8), [length for _, length in said])
        return [bytes(part.tolist()).decode() for part in parts]

    def _send(self, word: int, values: Tensor) -> Tensor:
        padded = torch.zeros(1 + self._length, dtype=torch.float64)
        padded[0], padded[1 : 1 + len(values)] = word, values
        if not self.several:
            return padded[None, 1:]
        found = torch.stack(self.ranks.gather(padded))
        words = [int(w) for w in found[:, 0]]
        if any(words):
            self._over = True
            self._stop(words, "")
        return found[:, 1:]

    def _tell(self, error: Exception) -> None:
        """Answer the next exchange with a failure; returns if this rank may raise its own error."""
        self._over = True
        kinds = {ScalerError: OVERFLOW, NonFiniteError: NOT_FINITE}
        word = next((word for kind, word in kinds.items() if isinstance(error, kind)), FAILED)
        padded = torch.zeros(1 + self._length, dtype=torch.float64)
        padded[0] = word
        words = [int(found[0]) for found in self.ranks.gather(padded)]
        reason = str(error).partition(" (nan or inf)")[0] or type(error).__name__
        self._stop(words, reason if isinstance(error, StepError) else f"{type(error).__name__}: {reason}", own=word)

    def _stop(self, words: Sequence[int], reason: str, own: int = WELL) -> None:
        """Hear why, and raise the gravest reason that is not this rank's own."""
        data = torch.zeros(REASON, dtype=torch.uint8)
        said = reason.encode()[:REASON]
        data[: len(said)] = torch.tensor(list(said), dtype=torch.uint8)
        reasons = [bytes(part.tolist()).rstrip(b"\0").decode(errors="ignore") for part in self.ranks.gather(data)]
        gravest = FAILED if FAILED in words else NOT_FINITE if NOT_FINITE in words else OVERFLOW
        if own == gravest:
            return
        kind = {FAILED: StepError, NOT_FINITE: NonFiniteError, OVERFLOW: ScalerError}[gravest]
        at = words.index(gravest)
        raise kind(f"rank {at} of {len(words)}: {reasons[at]}{'; no rank has moved' * (gravest == FAILED)}")


def alone() -> Accord:
    """Of a process that trains by itself."""
    return Accord(Ranks())
