"""The page that benchmarks/suite.py writes: a function of the outcomes, in Markdown. What fails stands first."""

import math
from collections.abc import Sequence

from _markdown import duration, number, plural, table, verdict

from .claims import DEFAULT, OWN, REFERENCE, claims, early_ratio, final_ratio, judged, memory_ratio, time_ratio
from .registration import Registration
from .scoring import holm
from .study import Entry, Outcome, floor
from .tuning import count


def file_names(budget: str) -> tuple[str, str]:
    """Of the page and of its figure."""
    stem = "suite" if budget == "quick" else f"suite-{budget}"
    return f"{stem}.md", f"{stem}-profiles.png"


def page(registration: Registration, outcomes: Sequence[Outcome], budget: str, python: str) -> str:
    """Return the whole page.

    Args:
        registration: rules and names.
        outcomes: the tasks that were run; those without DDPNOpt's runs are shown, but not judged.
        budget: "quick" or "full".
        python: versions of the software, for the end.
    """
    complete = judged(outcomes)
    return "\n".join(
        [
            _head(registration, outcomes, budget),
            _first(registration, complete),
            _overview(complete, budget),
            _methods(registration, outcomes),
            _sensitivity(registration, outcomes, budget),
            _ablation(registration, outcomes),
            *(_task(registration, outcome, budget, complete) for outcome in outcomes),
            _end(registration, outcomes, python),
        ]
    )


def _head(registration: Registration, outcomes: Sequence[Outcome], budget: str) -> str:
    left = [task.title for name, task in registration.tasks.items() if name not in {o.task.name for o in outcomes}]
    not_run = f"Not run: {'; '.join(left)}." if left else "All tasks were run."
    sizes = {
        "quick": "sizes for one slow core, short runs; they say little about long training",
        "full": "sizes for a larger machine, long runs",
    }[budget]
    return f"""# Nine tasks, DDPNOpt and its rivals

Every method gets the same number of tuning trials on validation data; targets are set by rules that stand in
[`registration.toml`](../../benchmarks/_suite/registration.toml), first committed before the first scored run.
Budget `{budget}`: {sizes}.
{len(outcomes)} of {len(registration.tasks)} tasks are on record. {not_run}
"""


def _first(registration: Registration, complete: Sequence[Outcome]) -> str:
    found = claims(complete, registration.claims)
    rows = [[claim.words, "holds" if claim.holds else "**does not hold**", claim.found] for claim in found]
    rows.sort(key=lambda row: row[1] == "holds")
    losses = [line for outcome in complete for line in _losses(outcome)]
    losses += [
        f"* **{o.task.title}**: its wins count for little. Tuned AdamW itself ends at {o.targets.final:.1f}, below the "
        f"{floor(o.task):g} under which a run counts as collapsed: these runs are too short for this network."
        for o in complete
        if o.targets.final < floor(o.task)
    ]
    return f"""## Where DDPNOpt loses or misses

{table(["registered claim, DDPNOpt tuned unless said otherwise", "", "found"], rows)}

{chr(10).join(losses) if losses else "No rival reaches a final target in fewer steps or less time, or tests higher."}
"""


def _losses(outcome: Outcome) -> list[str]:
    """What rivals do better than tuned DDPNOpt on one task."""
    own = outcome.entries[OWN]
    rivals = [e for name, e in outcome.entries.items() if not name.startswith(OWN)]
    parts = []
    fewer = [e.method.title for e in sorted(rivals, key=lambda e: e.final) if e.final < own.final]
    faster = [e.method.title for e in sorted(rivals, key=lambda e: e.seconds) if e.seconds < own.seconds]
    parts += [f"fewer steps to the final target: {', '.join(fewer)}"] if fewer else []
    parts += [f"less time to it: {', '.join(faster)}"] if faster else []
    if math.isinf(own.final):
        parts.insert(0, "DDPNOpt **misses the final target**")
    higher = [e.method.title for e in rivals if outcome.lead(OWN, e.method.name).high < 0]
    if higher:
        parts.append(f"higher test score: {', '.join(higher)}")
    return [f"* **{outcome.task.title}**: {'; '.join(parts)}."] if parts else []


def _overview(complete: Sequence[Outcome], budget: str) -> str:
    header = ["over tuned AdamW's", "early, steps", "final, steps", "final, time", "memory", "test, points"]
    rows = []
    for outcome in complete:
        for method in (OWN, DEFAULT):
            lead = outcome.lead(method, REFERENCE)
            rows.append(
                [
                    f"{outcome.task.title}: {'tuned' if method == OWN else 'default'}",
                    _factor(early_ratio(outcome, method)),
                    _factor(final_ratio(outcome, method)),
                    _factor(time_ratio(outcome, method)),
                    "" if math.isnan(memory := memory_ratio(outcome, method)) else f"{memory:.2f}",
                    number(lead, sign=True),
                ]
            )
    return f"""## Over tuned AdamW

{table(header, rows)}

Steps and time: ratios of medians over seeds, below 1 is less than AdamW; ∞: DDPNOpt misses the target. Test: difference
paired by seed, with 95 % t interval.

![Performance profiles]({file_names(budget)[1]})

Share of tasks in which a method's steps (left) or time (right) to the final target are at most a factor times the best
method's; a method that misses never counts.
"""


def _methods(registration: Registration, outcomes: Sequence[Outcome]) -> str:
    rows = []
    for method in registration.methods.values():
        there = [o for o in outcomes if method.name in o.entries]
        reached = sum(math.isfinite(o.entries[method.name].final) for o in there)
        cells = [_pair(o, method.name) if o in there else "" for o in outcomes]
        rows.append([method.title, *cells, f"{reached} of {len(there)}"])
    return f"""## All methods

Steps and time to the final target over tuned AdamW's; ∞: missed.

{table(["steps / time", *(o.task.name for o in outcomes), "reached"], rows)}
"""


def _pair(outcome: Outcome, method: str) -> str:
    if math.isinf(outcome.entries[method].final):
        return "∞"
    return f"{_factor(final_ratio(outcome, method))} / {_factor(time_ratio(outcome, method))}"


def _sensitivity(registration: Registration, outcomes: Sequence[Outcome], budget: str) -> str:
    tuned = [method for method in registration.methods.values() if method.lr is None]
    rows = []
    for method in tuned:
        found = [o.entries[method.name].sensitivity if method.name in o.entries else None for o in outcomes]
        there = [s for s in found if s is not None]
        if there:
            rows.append(
                [
                    method.title,
                    *("" if s is None else f"{s.decades:g}" for s in found),
                    f"{sum(s.diverged for s in there)} of {sum(s.runs for s in there)}",
                    f"{sum(s.collapsed for s in there)} of {sum(s.runs for s in there)}",
                ]
            )
    header = ["decades", *(o.task.name for o in outcomes), "diverged", "collapsed"]
    seeds = plural(registration.protocol["sensitivity_seeds"][budget], "seed")
    return f"""## Learning rates

Decades of learning rate, of those from 0.001 to 100 in steps of one decade, over which the last validation score, mean
over {seeds}, stays within {registration.claims["points"]:g} point of the method's own best (0: only one rate does).

{table(header, rows)}
"""


def _ablation(registration: Registration, outcomes: Sequence[Outcome]) -> str:
    there, base = [o for o in outcomes if o.ablation], registration.base
    rows = [
        [
            name,
            *(_variant(outcome, name, base) if name in outcome.ablation else "" for outcome in there),
            *_counts([outcome for outcome in there if name in outcome.ablation], name, base),
        ]
        for name in registration.ablation
    ]
    header = ["", *(f"{o.task.name}, {plural(o.size.ablation, 'seed')}" for o in there)]
    return f"""## Ablation at equal settings

DDPNOpt, untuned (learning rate 0.1, neither weight decay nor memory unless said, both where it says `default`), with
what is said changed. First row: mean test score; others: the change, paired by seed, with `*` where its 95 % interval
leaves out 0. In brackets the median steps to the final target (∞: missed).

{table([*header, "* higher, lower", "fewer steps, more"], rows)}

The last columns count tasks: test score higher and lower beyond its interval; steps to the final target fewer and more.
`feedback off`: each layer solves its own batch problem (`Q_uu` of the whole batch) and no layer sees another; the
difference to the first row is what the recursion across layers and the closed loop add.
"""


def _variant(outcome: Outcome, name: str, base: str) -> str:
    steps = outcome.steps_of(name)
    reached = f" ({'∞' if math.isinf(steps) else f'{steps:g}'})"
    if name == base:
        runs = outcome.ablation[name]
        return f"{sum(run['test'] or 0.0 for run in runs) / len(runs):.1f}{reached}"
    change = outcome.change(name, base)
    return f"{change.mean:+.1f}{'*' if change.low > 0 or change.high < 0 else ''}{reached}"


def _counts(outcomes: Sequence[Outcome], name: str, base: str) -> list[str]:
    """In how many tasks a variant tests higher and lower than the base, and takes fewer and more steps."""
    if name == base:
        return ["", ""]
    changes = [outcome.change(name, base) for outcome in outcomes]
    steps = [(outcome.steps_of(name), outcome.steps_of(base)) for outcome in outcomes]
    return [
        f"{sum(change.low > 0 for change in changes)}, {sum(change.high < 0 for change in changes)}",
        f"{sum(own < its for own, its in steps)}, {sum(own > its for own, its in steps)}",
    ]


def _task(registration: Registration, outcome: Outcome, budget: str, complete: Sequence[Outcome]) -> str:
    size, goal = outcome.size, outcome.targets
    header = [
        "", "learning rate", "early", "final", "ms per step", "s to final", "MiB", "test", "DDPNOpt minus it", "is", "p"
    ]  # fmt: skip
    ordered = sorted(outcome.entries.values(), key=lambda entry: (entry.final, entry.early))
    parts = f"{size.train:,}, {size.validation:,} and {size.test:,}"
    options = "; ".join(
        f"{e.method.title}: " + ", ".join(f"{k} {e.options[k]}" for k in e.method.knobs)
        for e in ordered
        if e.method.knobs
    )
    messages = [f"* {e.method.title}: {', '.join(e.messages)}" for e in ordered if e.messages]
    said = "\n\nWhat runs that diverged said:\n\n" + "\n".join(messages) if messages else ""
    left = [registration.methods[name].title for name in outcome.absent]
    absent = f" Not on record: {', '.join(left)}." if left else ""
    return f"""## {outcome.task.title}

{parts} samples to train, validate and test; batch {size.batch}, {size.steps} steps, {
        plural(size.seeds, "seed")
    }; score:
{outcome.unit}, %. Targets: early {goal.early:.2f}, final {goal.final:.2f}.{absent}

{table(header, (_row(registration, outcome, entry, complete) for entry in ordered))}

Chosen: {options}.{said}

Command: `python benchmarks/suite.py {outcome.task.name}{"" if budget == "quick" else " --budget full"}` ({
        duration(outcome.seconds)
    } of computing).
"""


def _row(registration: Registration, outcome: Outcome, entry: Entry, complete: Sequence[Outcome]) -> list[str]:
    name = entry.method.name
    against = ["", "", ""]
    if name != OWN and outcome in complete:
        lead = outcome.lead(OWN, name)
        places = [o for o in complete if name in o.entries]
        p = holm([o.p(OWN, name) for o in places])[places.index(outcome)]
        against = [number(lead, sign=True), verdict(lead), "" if math.isnan(p) else f"{p:.2g}"]
    return [
        entry.method.title,
        f"{entry.lr:g}",
        _steps(entry.early),
        _steps(entry.final),
        "" if entry.milliseconds is None else f"{entry.milliseconds:.2f}",
        _steps(entry.seconds, 2),
        "" if entry.megabytes is None else f"{entry.megabytes:.1f}",
        number(entry.test),
        *against,
    ]


def _end(registration: Registration, outcomes: Sequence[Outcome], python: str) -> str:
    digests = sorted({digest for outcome in outcomes for digest in outcome.digests})
    amendments = "\n".join(f"  {number}. {words}" for number, words in enumerate(registration.amendments, 1))
    rates, trials = (
        len(registration.protocol["rates"]),
        count(registration.methods[OWN], registration.protocol["rates"]),
    )
    torch = ", ".join(sorted({version for outcome in outcomes for version in outcome.torch}))
    return f"""## Rules

* Registration: tasks, search spaces, seeds, statistics. SHA-256 before the first scored run: `{registration.first}`;
  now: `{registration.digest}`. Records were made under {", ".join(digests)}. Amendments:
{amendments}
* Tuning: {trials} trials a method and task, one seed: {rates} learning rates from 1e-4 to 100, the two half decades
  about the best, two other values for each of two knobs. L-BFGS runs on minibatches and on some tasks only. All
  learning rates decay linearly to 0, but for the schedule-free method's.
* Target early: median over seeds of tuned AdamW's validation score after a tenth of the steps; final: of its best.
  Steps to a target: the first mark (every 1 % of the steps up to 20 %, then every 5 %) that reaches it, median over
  seeds.
* SAM and L-BFGS evaluate the gradient several times a step: their time shows it, their steps do not.
* Time: steps times the method's median step time, all methods taking turns in one process on one thread. It is
  processor time: the machine was shared, and a long step loses more of the clock's time to others than a short one.
  DDPNOpt is stepped by a closure that returns the loss. L-BFGS, at the learning rate of the measurement, may end a step
  early: its time is a lower bound.
* MiB: the most bytes of tensors alive at a time in the first 11 steps, made in the method's process after the data.
* p: paired t test, Holm's correction over the tasks. Test data choose nothing.
* Software: {python}, torch {torch}; raw records in [`records`](records), `suite-*.jsonl`.
"""


def _factor(value: float) -> str:
    words = {"nan": "both miss", "inf": "∞", "0.0": "AdamW misses"}
    return words.get(str(value), f"{value:.2f}")


def _steps(value: float, digits: int = 0) -> str:
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"
