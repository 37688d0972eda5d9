"""Figure 4: what feedback adds over a grid of learning rates and weight decays, all hyper-parameters equal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddpnopt.experiments.data import source
from ddpnopt.experiments.paper import availability
from ddpnopt.experiments.paper.fig4_panel import VARIANTS, Panel, gather
from ddpnopt.experiments.paper.fig4_section import section
from ddpnopt.experiments.paper.kinds import task
from ddpnopt.experiments.paper.problems import PROBLEMS
from ddpnopt.experiments.paper.training import POINT
from ddpnopt.experiments.report.section import Section
from ddpnopt.experiments.study.lab import Lab
from ddpnopt.experiments.study.task import Result, Task


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        steps: of each run, by problem.
        variants: keys of ``VARIANTS``.
        factors: learning rates as multiples of the lowest.
        decays: weight decays.
        seeds: number of seeds: 0, 1, 2, ...
    """

    steps: Mapping[str, int]
    variants: tuple[str, ...]
    factors: tuple[float, ...]
    decays: tuple[float, ...]
    seeds: int


FULL = Plan(
    steps={"wine-fcn": 100, "digits-fcn": 200},
    variants=tuple(VARIANTS),
    factors=(1, 3, 10, 30, 100),
    decays=(0.0, 1e-2),
    seeds=6,
)
QUICK = Plan(
    steps={"wine-fcn": 80, "digits-fcn": 100},
    variants=("own-sgd", "share-sgd", "own-rmsprop", "share-rmsprop", "batch"),
    factors=(1, 10, 100),
    decays=(0.0, 1e-2),
    seeds=2,
)


def run(lab: Lab, quick: bool) -> Section:
    """Run every grid whose data is at hand, and report."""
    plan = QUICK if quick else FULL
    missing = {name: availability.missing(PROBLEMS[name].dataset) for name in plan.steps}
    at_hand = [name for name, why in missing.items() if why is None]
    return section(panels(lab, plan, at_hand), plan.steps, {name: why for name, why in missing.items() if why}, quick)


def panels(lab: Lab, plan: Plan, problems: Sequence[str]) -> list[Panel]:
    """Carry out a plan on some of its problems: a panel for each and each variant."""
    pairs = [(problem, variant) for problem in problems for variant in plan.variants]
    grids = {
        key: [
            _task(*key, rate, decay, seed, plan.steps[key[0]])
            for rate in rates(key[1], plan)
            for decay in plan.decays
            for seed in range(plan.seeds)
        ]
        for problem, variant in pairs
        for key in ((problem, variant, True), (problem, VARIANTS[variant].opened, False))
    }
    results = iter(lab.execute([one for tasks in grids.values() for one in tasks]))
    done = {key: [next(results) for _ in tasks] for key, tasks in grids.items()}
    return [_panel(plan, problem, variant, done) for problem, variant in pairs]


def rates(variant: str, plan: Plan) -> tuple[float, ...]:
    """Learning rates of a variant, ascending."""
    return tuple(float(f"{VARIANTS[variant].lowest * factor:.6g}") for factor in plan.factors)


def _panel(plan: Plan, problem: str, variant: str, done: Mapping[tuple[str, str, bool], Sequence[Result]]) -> Panel:
    shape = len(plan.factors), len(plan.decays), plan.seeds
    points, classes = -(-plan.steps[problem] // POINT), source(PROBLEMS[problem].dataset).classes
    closed, opened = (
        gather(done[key], shape, points, classes)
        for key in ((problem, variant, True), (problem, VARIANTS[variant].opened, False))
    )
    return Panel(problem, variant, rates(variant, plan), plan.decays, VARIANTS[variant].params, closed, opened)


def _task(problem: str, method: str, feedback: bool, rate: float, decay: float, seed: int, steps: int) -> Task:
    return task(
        "train",
        {
            "problem": problem,
            "method": method,
            "params": {**VARIANTS[method].params, "lr": rate, "feedback": float(feedback)},
            "weight_decay": decay,
            "steps": steps,
            "seed": seed,
        },
    )
