"""The conformance page: the table, what it says, and every answer that is not a plain yes."""

import re
from collections.abc import Iterable, Mapping

from _markdown import plural, table

from ddpnopt.experiments.environment import version

from .answers import Answer
from .methods import METHODS, Method
from .probing import PROBES, STEPS

Answers = Mapping[str, Mapping[str, Answer]]  # by method, then by probe
OURS = "ddpnopt"
CELLS = {"yes": "yes", "rounding": "~", "missing": "-"}


def page(found: Answers, footer: str) -> str:
    """Write the page.

    Args:
        found: answers of every method.
        footer: the command, its time and its software.
    """
    return f"""# Conformance: what a training loop may ask of an optimizer

{plural(len(PROBES), "question")}, each a few lines of a training loop on a small network, asked of `DDPNOpt` and of
optimizers that can be installed beside it. Every answer comes from a process of its own. A method is run with its own
documented loop, at its default settings where [none are given](#methods); only its answer to the loop in question is
judged, not how well it trains.
`yes`: passed. `~`: differs, but no more than the same batch in another order does. **no**: ran, and did not do it.
**error**: raised. **died**, **hung**: the process did. `-`: not installed.

{_table(found)}

## Reading

{_reading(found)}

## What passes

{_list(f"*{probe.title}*: {probe.passes}" for probe in PROBES.values())}

## Every answer that is not a plain yes

Also those that came with a warning of the method's own.

{_details(found)}

## Methods

{_methods(found)}

{footer}
"""


def mark(answer: Answer) -> str:
    """A cell of the table."""
    return CELLS.get(answer.verdict, f"**{answer.verdict}**")


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"* {item}" for item in items)


def _table(found: Answers) -> str:
    header = ["", *(METHODS[name].name for name in found)]
    rows = [[probe.title, *(mark(answers[key]) for answers in found.values())] for key, probe in PROBES.items()]
    passed = [f"{_passed(answers)}" for answers in found.values()]
    return table(header, [*rows, [f"yes, of {len(PROBES)}", *passed]])


def _passed(answers: Mapping[str, Answer]) -> int:
    return sum(answer.verdict == "yes" for answer in answers.values())


def _reading(found: Answers) -> str:
    ours = found[OURS]
    rivals = {n: a for n, a in found.items() if METHODS[n].distribution != OURS and _asked(a)}
    items = []
    for key, probe in PROBES.items():
        passing = [METHODS[name].name for name, answers in rivals.items() if answers[key].verdict == "yes"]
        if ours[key].verdict != "yes" and passing:
            items.append(f"**Others are better**: {probe.title}. {_some(passing, len(rivals))} can.")
    for key, probe in PROBES.items():
        failing = [METHODS[name].name for name, answers in rivals.items() if answers[key].verdict not in CELLS]
        if ours[key].verdict == "yes" and len(failing) * 2 > len(rivals):
            items.append(f"**Most others cannot**: {probe.title}. {_some(failing, len(rivals))} cannot.")
    return f"""{_list(items)}
* An optimizer that reads gradients alone never sees a layer: SGD, AdamW and their like pass the questions about layers
  by construction, and a step of theirs costs a fraction ([step time](step_time.md)). Those rows tell apart methods
  that look into the network.
* `DDPNOpt` runs the model a second time in each step. The rows on BatchNorm, dropout, closures and micro-batches ask
  whether that shows.
* Limits: one small network per question, {plural(STEPS, "step")}, one seed, CPU: "runs" is not "trains well"."""


def _asked(answers: Mapping[str, Answer]) -> bool:
    return any(answer.verdict != "missing" for answer in answers.values())


def _some(names: list[str], of: int) -> str:
    if len(names) == of:
        return f"All {of} rivals"
    return f"{len(names)} of {plural(of, 'rival')} ({', '.join(names)})"


def _details(found: Answers) -> str:
    parts = []
    for name, answers in found.items():
        lines = [
            f"*{PROBES[key].title}*: {mark(answer)}, {_told(answer)}"
            for key, answer in answers.items()
            if answer.verdict not in ("yes", "missing") or answer.warned
        ]
        if lines:
            parts.append(f"**{METHODS[name].name}**\n\n{_list(lines)}")
    return "\n\n".join(parts)


def _told(answer: Answer) -> str:
    """What was found and what the method warned of, as code: Markdown might read it as something else."""
    found = _code(answer.remark) if answer.verdict != "yes" else ""
    warned = f"it warns {_code(answer.warned[0])}" if answer.warned else ""
    more = f" and {plural(len(answer.warned) - 1, 'time')} more" if len(answer.warned) > 1 else ""
    return "; ".join(part for part in (found, warned + more) if part)


def _code(words: str) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", words).replace("`", "'")
    return f"`{plain}`"


def _methods(found: Answers) -> str:
    rows = [
        [METHODS[name].name, f"`{METHODS[name].package}`", _version(METHODS[name]), METHODS[name].words]
        for name in found
    ]
    return table(["", "package", "version", "settings and loop"], rows)


def _version(method: Method) -> str:
    return version(method.distribution) or "not installed"
