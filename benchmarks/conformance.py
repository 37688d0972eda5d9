"""What a training loop may ask of an optimizer, asked of DDPNOpt and of every rival that is installed.

    pip install '.[conformance]'
    python benchmarks/conformance.py

Writes docs/results/conformance.md and, beside it, conformance.json. With ``--only`` it prints and writes nothing.
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from _conformance.answers import Answer, interview
from _conformance.methods import METHODS
from _conformance.page import Answers, mark, page
from _conformance.probing import PROBES
from _markdown import command, duration
from _training import RESULTS
from rich.console import Console
from rich.table import Table

from ddpnopt.experiments.environment import environment, version
from ddpnopt.experiments.files import write_atomic, write_json

NAME_WIDTH = 44  # of the longest row head


@dataclass(frozen=True)
class Arguments:
    """What a training loop may ask of an optimizer, asked of DDPNOpt and of every rival that is installed."""

    only: tuple[str, ...] = ()
    """Methods to ask, such as ddpnopt; prints their answers, writes no page."""

    seconds: float = 60.0
    """How long one answer may take."""

    out: Path = RESULTS
    """Folder of the page."""


def shown(found: Answers) -> Table:
    """The table, for a terminal."""
    shown = Table("", *found)
    for key, probe in PROBES.items():
        shown.add_row(probe.title.replace("`", ""), *(mark(answers[key]).strip("*") for answers in found.values()))
    return shown


def record(found: Answers) -> dict[str, Any]:
    """Every answer, with what it was asked of and what with."""
    methods = {
        name: {
            "name": METHODS[name].name,
            "package": METHODS[name].package,
            "version": version(METHODS[name].distribution),
            "answers": {key: asdict(answer) for key, answer in answers.items()},
        }
        for name, answers in found.items()
    }
    probes = {key: {"title": probe.title, "passes": probe.passes} for key, probe in PROBES.items()}
    return {"environment": environment(1), "probes": probes, "methods": methods}


def ask(names: tuple[str, ...], seconds: float) -> dict[str, dict[str, Answer]]:
    """Ask the methods in turn; says on the error stream how far it is."""
    found = {}
    for number, name in enumerate(names, 1):
        found[name] = dict(interview(METHODS[name], seconds))
        passed = sum(answer.verdict == "yes" for answer in found[name].values())
        print(f"{number} of {len(names)}: {name}: {passed} of {len(PROBES)}", file=sys.stderr, flush=True)
    return found


def main(words: list[str] | None = None) -> int:
    """Ask, print, write the page; returns the exit code."""
    arguments = tyro.cli(Arguments, args=words)
    unknown = [name for name in arguments.only if name not in METHODS]
    if unknown:
        print(f"conformance: unknown method {unknown[0]!r}; there are {', '.join(METHODS)}", file=sys.stderr)
        return 2
    began = time.perf_counter()
    try:
        found = ask(arguments.only or tuple(METHODS), arguments.seconds)
    except KeyboardInterrupt:
        print("stopped; nothing written", file=sys.stderr)
        return 130
    console = Console()
    console.width = max(console.width, NAME_WIDTH + sum(len(name) + 3 for name in found))
    console.print(shown(found))
    if arguments.only:
        for name, answers in found.items():
            for key, answer in answers.items():
                if answer.remark and answer.verdict != "yes":
                    print(f"{name}, {PROBES[key].title}: {answer.remark}")
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    software = f"torch {version('torch')}, Python {environment(1)['python']}"
    spent = duration(time.perf_counter() - began)
    footer = f"Command: `{command('conformance.py', arguments, ('seconds',))}` ({spent}), {software}."
    footer += " Raw answers: [conformance.json](conformance.json)."
    write_json(arguments.out / "conformance.json", record(found))
    path = arguments.out / "conformance.md"
    write_atomic(path, page(found, footer).encode())
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
