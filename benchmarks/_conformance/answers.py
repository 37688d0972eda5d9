"""Ask every probe of a method, each in a process of its own."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ddpnopt.experiments.environment import version

from . import conventions, distributed, layers, safety  # enter their probes
from .isolation import DiedError, HungError, isolated
from .methods import Method
from .probing import PROBES, Probe, SensitiveError, UnmetError
from .problems import mlp

__all__ = ["MODULES", "Answer", "answer", "installed", "interview"]
MODULES = (conventions, layers, safety, distributed)


@dataclass(frozen=True)
class Answer:
    """How a method came through a probe.

    Args:
        verdict: ``yes``; ``no``: it ran and did not do what was asked; ``rounding``: off by what rounding alone does;
            ``error``: an exception; ``died``, ``hung``; ``missing``: the package is not installed.
        remark: what was found, or the exception.
        warned: what it warned of meanwhile.
    """

    verdict: str
    remark: str
    warned: tuple[str, ...] = ()


def answer(method: Method, probe: Probe) -> Answer:
    """Ask in this process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            verdict, remark = "yes", probe(method)
        except SensitiveError as sensitive:
            verdict, remark = "rounding", str(sensitive)
        except UnmetError as unmet:
            verdict, remark = "no", str(unmet)
        except Exception as error:
            verdict, remark = "error", f"{type(error).__name__}: {error}"
    said = dict.fromkeys(_line(str(w.message)) for w in caught if issubclass(w.category, UserWarning))
    return Answer(verdict, _line(remark), tuple(said))


def interview(method: Method, seconds: float) -> Mapping[str, Answer]:
    """Ask everything; by the names of the probes.

    Args:
        method: which.
        seconds: how long an answer may take.
    """
    if not installed(method):
        return dict.fromkeys(PROBES, Answer("missing", f'pip install "{method.package}"'))
    try:
        found: dict[str, Answer] = isolated(len(PROBES) * (seconds + 5), _interview, method, seconds)
    except (DiedError, HungError) as fault:  # the package itself, while it was loaded
        return dict.fromkeys(PROBES, Answer(fault.verdict, str(fault)))
    return found


def installed(method: Method) -> bool:
    """Whether the method's package is there; this library is, whether or not as a package."""
    return method.distribution == "ddpnopt" or version(method.distribution) is not None


def _interview(method: Method, seconds: float) -> dict[str, Any]:
    torch.set_num_threads(1)
    _load(method)
    found = {}
    for name, probe in PROBES.items():
        try:
            found[name] = isolated(seconds, answer, method, probe)
        except (DiedError, HungError) as fault:
            found[name] = Answer(fault.verdict, str(fault))
    return found


def _load(method: Method) -> None:
    """Import the method's package once; whether it can be made is for the probes to find."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            method.make(mlp().model)
        except Exception:
            return


def _line(words: str, longest: int = 300) -> str:
    """One line of bounded length."""
    flat = " ".join(words.split())
    return flat if len(flat) <= longest else f"{flat[:longest]}..."
