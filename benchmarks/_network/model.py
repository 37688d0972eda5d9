"""What a step takes, on paper: operations, messages and bytes by ranks and samples, each with its price."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

EXACT, LOCAL = "DDPNOpt, `rounded=False`", "DDPNOpt, `local=True`"
COMPARED = ("SGD", EXACT, LOCAL)
"""Methods of ``distributed_bytes.py`` that are modelled; whole numbers are sent, so that bytes follow from counts."""

Term = Callable[[int, int], float]
"""Of ranks ``p`` and samples per rank ``b``; ``N = p b``."""

OWN: Mapping[str, Term] = {
    "1": lambda p, b: 1.0,
    "b": lambda p, b: b,
    "b^2": lambda p, b: b**2,
    "b^3": lambda p, b: b**3,
}
"""Work on a rank's own samples."""
ALL: Mapping[str, Term] = {
    "N": lambda p, b: p * b,
    "N^2 / p": lambda p, b: p * b**2,
    "N^2": lambda p, b: (p * b) ** 2,
    "N^3": lambda p, b: (p * b) ** 3,
}
"""Work on all ranks' samples, done by every rank or shared out."""
BYTES: Mapping[str, Term] = {
    "(p - 1)": lambda p, b: p - 1,
    "(p - 1) b": lambda p, b: (p - 1) * b,
    "(p - 1) / p": lambda p, b: (p - 1) / p,
    "(p - 1) / p b": lambda p, b: (p - 1) / p * b,
    "(p - 1) / p N^2": lambda p, b: (p - 1) / p * (p * b) ** 2,
}
"""Gathered, summed and traded."""
HOPS: Mapping[str, Term] = {"(p - 1)": lambda p, b: p - 1}
"""Of a ring."""


@dataclass(frozen=True)
class Fitted:
    """A sum of terms with coefficients that are not negative.

    Args:
        terms: by name.
        coefficients: of each.
        worst: largest relative distance from the points it was fitted to.
    """

    terms: Mapping[str, Term]
    coefficients: Mapping[str, float]
    worst: float

    def __call__(self, p: int, b: int) -> float:
        return sum(c * self.terms[name](p, b) for name, c in self.coefficients.items())

    def part(self, names: Sequence[str], p: int, b: int) -> float:
        """Of some of the terms."""
        return sum(c * self.terms[name](p, b) for name, c in self.coefficients.items() if name in names)


def fitted(terms: Mapping[str, Term], points: Mapping[tuple[int, int], float]) -> Fitted:
    """Terms through counted points ``{(p, b): value}``, least squares of the relative distances."""
    known = {at: value for at, value in points.items() if value}
    if not known:
        return Fitted(terms, {}, 0.0)
    rows = np.array([[term(*at) / value for term in terms.values()] for at, value in known.items()])
    scale = np.linalg.norm(rows, axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(rows / scale, np.ones(len(rows)))
    values = found / scale
    coefficients = {name: float(c) for name, c in zip(terms, values, strict=True) if c}
    return Fitted(terms, coefficients, float(abs(rows @ values - 1).max()))


@dataclass(frozen=True)
class Processor:
    """How fast a rank computes.

    Args:
        overhead: seconds of a step without any samples.
        rate: operations a second.
        worst: largest relative distance from the times it was fitted to.
        exchange, byte: seconds of computing that an exchange takes, and a byte that is sent.
    """

    overhead: float
    rate: float
    worst: float = 0.0
    exchange: float = 0.0
    byte: float = 0.0


def sending(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Seconds of an exchange and of a byte, from exchanges, bytes and processor seconds, least squares."""
    rows = np.array([[exchanges, sent] for exchanges, sent, _ in points])
    scale = np.linalg.norm(rows, axis=0)
    exchange, byte = nnls(rows / scale, np.array([seconds for *_, seconds in points]))[0] / scale
    return float(exchange), float(byte)


def processor(points: Sequence[tuple[float, float]]) -> Processor:
    """From operations and processor seconds of steps, least squares of the relative distances."""
    rows = np.array([[1 / seconds, flops / seconds] for flops, seconds in points])
    scale = np.linalg.norm(rows, axis=0)
    found, _ = nnls(rows / scale, np.ones(len(rows)))
    overhead, each = found / scale
    return Processor(
        float(overhead), 1 / float(each) if each else math.inf, float(abs(rows @ [overhead, each] - 1).max())
    )


@dataclass(frozen=True)
class Wire:
    """What joins the ranks.

    Args:
        name: of it.
        latency: seconds that a message takes.
        bandwidth: bytes a second.
        tree: whether a message to all takes ``log2 p`` hops, not the ``p - 1`` of a ring.
    """

    name: str
    latency: float
    bandwidth: float
    tree: bool = False

    def hops(self, p: int) -> float:
        """One after the other until all have what all sent."""
        return math.ceil(math.log2(p)) if self.tree else p - 1


@dataclass(frozen=True)
class Spent:
    """Seconds of a step by what they are spent on."""

    own: float
    algebra: float
    messages: float
    bytes: float

    @property
    def total(self) -> float:
        """All of them, one after the other."""
        return self.own + self.algebra + self.messages + self.bytes

    @property
    def binds(self) -> str:
        """What most of it is spent on."""
        names = {"own": "own samples", "algebra": "algebra of all", "messages": "messages", "bytes": "bytes"}
        return max((getattr(self, key), name) for key, name in names.items())[1]


@dataclass(frozen=True)
class Step:
    """One method on one network.

    Args:
        flops, sent, messages: of a rank and step.
        processor: fitted to its times.
    """

    flops: Fitted
    sent: Fitted
    messages: Fitted
    processor: Processor

    def exchanges(self, b: int) -> float:
        """How often all tell all, a sum counted twice."""
        return self.messages(2, b)

    def computing(self, p: int, b: int) -> float:
        """Processor seconds of a rank."""
        used = self.processor
        return used.overhead + self.flops(p, b) / used.rate + self._sending(used, p, b)

    def _sending(self, used: Processor, p: int, b: int) -> float:
        return (used.exchange * self.exchanges(b) if p > 1 else 0.0) + used.byte * self.sent(p, b)

    def spent(self, p: int, b: int, wire: Wire, processor: Processor | None = None) -> Spent:
        """On other wires, and on another processor if one is given."""
        used = processor or self.processor
        return Spent(
            used.overhead + self.flops.part(list(OWN), p, b) / used.rate + self._sending(used, p, b),
            self.flops.part(list(ALL), p, b) / used.rate,
            self.exchanges(b) * wire.hops(p) * wire.latency,
            self.sent(p, b) / wire.bandwidth,
        )
