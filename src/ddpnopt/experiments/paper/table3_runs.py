"""The runs behind Table 3: every method tuned with one budget on every problem, then run over paired seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddpnopt.experiments.paper import availability
from ddpnopt.experiments.paper.kinds import task
from ddpnopt.experiments.paper.methods import METHODS
from ddpnopt.experiments.paper.problems import PROBLEMS
from ddpnopt.experiments.paper.tuning import thinned, tuned
from ddpnopt.experiments.stats import Interval, mean_interval
from ddpnopt.experiments.study.lab import Lab, Params
from ddpnopt.experiments.study.task import Result, Task

OWN, UNTUNED_MARK = "batch", "-untuned"
UNTUNED: Params = {"lr": 0.1, "damping": 0.1}  # the library's; momentum and decay are the others'
_TIE, _WORST_LOSS = 1e-6, 100.0


@dataclass(frozen=True)
class Effort:
    """How much is spent on a problem, the same for each method.

    Attributes:
        trials: combinations of hyper-parameters tried, evenly thinned from a method's eight.
        tuning_seeds: seeds each is tried on; never among those reported.
        seeds: number of seeds reported: 0, 1, 2, ...
        steps: of each run.
    """

    trials: int
    tuning_seeds: int
    seeds: int
    steps: int


Plan = Mapping[str, Effort]
"""What is run: the effort for each problem, by its name."""

_PICTURES = ("mnist-fcn", "fashion-mnist-fcn")
_CONVOLUTIONS = ("mnist-cnn", "svhn-cnn", "cifar10-cnn")
QUICK: Plan = {
    "wine-fcn": Effort(3, 1, 3, 80),
    "digits-fcn": Effort(3, 1, 3, 200),
    "mnist-fcn": Effort(3, 1, 3, 100),
}
FULL: Plan = {
    "wine-fcn": Effort(8, 2, 10, 160),
    "iris-fcn": Effort(8, 2, 10, 160),
    "digits-fcn": Effort(8, 2, 10, 400),
    **dict.fromkeys(_PICTURES, Effort(4, 1, 10, 500)),
    **dict.fromkeys(("mnist-cnn", "cifar10-cnn"), Effort(4, 1, 3, 25)),
}
UNCUT: Plan = {
    **{name: FULL[name] for name in ("wine-fcn", "iris-fcn", "digits-fcn")},
    **dict.fromkeys(_PICTURES, Effort(8, 2, 10, 1719)),  # one epoch
    **dict.fromkeys(_CONVOLUTIONS, Effort(8, 2, 10, 2000)),  # four to six epochs
}
FIRST_TUNING_SEED = 1000


@dataclass(frozen=True)
class Entry:
    """One method on one problem.

    Attributes:
        name: key of the method, with ``"-untuned"`` where lr and damping are the library's defaults.
        params: hyper-parameters it was run with.
        tuned: the highest validation accuracy of the search, 0 to 1, less 1e-6 of the train loss; None without one.
        tests: test accuracy of each seed, 0 to 1.
        diverged: number of seeds whose loss or step was not finite; they count with their last weights.
        seconds: of a run, mean over seeds.
    """

    name: str
    params: Params
    tuned: float | None
    tests: tuple[float, ...]
    diverged: int
    seconds: float

    @property
    def accuracy(self) -> Interval:
        """Mean and 95 % interval of the test accuracy, in percent."""
        return mean_interval(self.tests).scaled(100)


@dataclass(frozen=True)
class Row:
    """One problem: what was spent and what each method reached; ``missing`` says why it was not run."""

    problem: str
    effort: Effort
    entries: tuple[Entry, ...]
    missing: str | None = None


def rows(lab: Lab, plan: Plan, device: str = "cpu") -> list[Row]:
    """Return the rows of the table, one a problem, computed on a device as torch names it."""
    missing = {name: availability.missing(PROBLEMS[name].dataset) for name in plan}
    pairs = [(name, method) for name in plan if missing[name] is None for method in methods(name)]
    grids = {f"{name}/{method}": thinned(METHODS[method].grid, plan[name].trials) for name, method in pairs}
    chosen, scores = tuned(lab, grids, lambda asked: _scores(lab, asked, plan, device))
    runs = [(name, method, method, chosen[f"{name}/{method}"]) for name, method in pairs]
    runs += [(name, f"{OWN}{UNTUNED_MARK}", OWN, UNTUNED) for name in plan if missing[name] is None]
    results = iter(
        lab.execute(
            [
                _task(name, method, params, seed, plan[name].steps, device)
                for name, _, method, params in runs
                for seed in range(plan[name].seeds)
            ]
        )
    )
    entries: dict[str, list[Entry]] = {name: [] for name in plan}
    for name, label, method, params in runs:
        own = [next(results) for _ in range(plan[name].seeds)]
        validation = scores.get(f"{name}/{method}") if label == method else None
        entries[name].append(_entry(label, params, validation, own))
    return [Row(name, plan[name], tuple(entries[name]), missing[name]) for name in plan]


def methods(problem: str) -> tuple[str, ...]:
    """Methods run on a problem: all, but vanilla DDP, as in the paper, only where the network is dense."""
    return tuple(name for name in METHODS if name != "vanilla" or PROBLEMS[problem].network == "fcn")


def _scores(lab: Lab, asked: Sequence[tuple[str, Params]], plan: Plan, device: str) -> list[float]:
    """Mean validation accuracy of each combination over the tuning seeds; the lower train loss breaks ties."""
    tasks = []
    for search, params in asked:
        name, method = search.split("/")
        seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + plan[name].tuning_seeds)
        tasks += [_task(name, method, params, seed, plan[name].steps, device) for seed in seeds]
    results = iter(lab.execute(tasks))
    scores = []
    for search, _ in asked:
        own = [next(results) for _ in range(plan[search.split("/")[0]].tuning_seeds)]
        loss = mean_interval([_WORST_LOSS if one["loss"] is None else one["loss"] for one in own]).mean
        scores.append(mean_interval([one["validation"] for one in own]).mean - _TIE * min(loss, _WORST_LOSS))
    return scores


def _task(problem: str, method: str, params: Params, seed: int, steps: int, device: str) -> Task:
    settings = {
        "problem": problem,
        "method": method,
        "params": dict(params),
        "weight_decay": 0.0,
        "steps": steps,
        "seed": seed,
    }
    return task("train", settings if device == "cpu" else settings | {"device": device})


def _entry(name: str, params: Params, tuned: float | None, results: Sequence[Result]) -> Entry:
    return Entry(
        name,
        params,
        tuned,
        tests=tuple(one["test"] for one in results),
        diverged=sum(one["diverged"] is not None for one in results),
        seconds=mean_interval([one["seconds"] for one in results]).mean,
    )
