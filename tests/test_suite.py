"""The benchmark suite: its rules on made-up records, what is registered, and a toy study from end to end."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import suite
import torch
from _suite import methods, scoring, tasks, tuning
from _suite.networks import NETWORKS
from _suite.registration import REGISTRATION, Method, Options, Registration, Size, Task, read
from _suite.running import Run, marks, train
from _suite.timing import LiveBytes
from torch import nn


@pytest.fixture(scope="module")
def registered() -> Registration:
    return read()


@pytest.fixture(autouse=True)
def single_precision() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


def ended(*validation: float, diverged: str = "", test: float | None = 0.0) -> tuning.Result:
    return {"validation": list(validation), "diverged": diverged, "test": test}


def test_marks_are_dense_at_first_and_end_with_the_run() -> None:
    assert marks(300)[:3] == (3, 6, 9)
    assert marks(300)[19:22] == (60, 75, 90)
    assert marks(300)[-1] == 300
    assert marks(101)[-1] == 101
    assert marks(150)[:2] == (2, 4)
    assert marks(3) == (1, 2, 3)


def test_targets_are_medians_that_the_reference_itself_reaches() -> None:
    at = (10, 20, 30)
    runs = [ended(50, 60, 90), ended(52, 70, 80), ended(54, 80, 70), ended(56, 85, 99)]
    assert scoring.targets(runs, at, 15) == scoring.Targets(52, 80)
    assert scoring.targets(runs, at, 20).early == 70
    assert scoring.median_steps(runs, at, 80) == 25  # 30, 30, 20, 20: three of four reach the final target
    failed = [ended(50, diverged="loss not finite"), ended(40, 41, 42), ended(60, 61, 62)]
    assert scoring.targets(failed, at, 10) == scoring.Targets(40, 42)


def test_steps_to_a_target_count_a_miss_as_infinite() -> None:
    at = (10, 20, 30)
    assert scoring.steps_to(ended(1, 2, 3), at, 2) == 20
    assert scoring.steps_to(ended(1, 2, 1), at, 3) == math.inf
    assert scoring.steps_to(ended(5, diverged="so early"), at, 5) == 10
    assert scoring.median_steps([ended(1, 1, 1), ended(1, 1, 9), ended(9, 9, 9)], at, 9) == 30
    assert scoring.median_steps([ended(1, 1, 1), ended(1, 1, 1), ended(9, 9, 9)], at, 9) == math.inf


def test_a_ratio_of_misses() -> None:
    assert scoring.ratio(3, 6) == 0.5
    assert scoring.ratio(math.inf, 6) == math.inf
    assert scoring.ratio(3, math.inf) == 0
    assert math.isnan(scoring.ratio(math.inf, math.inf))


def test_profiles_count_within_a_factor_of_the_best_and_never_a_miss() -> None:
    costs = [{"a": 10.0, "b": 20.0}, {"a": 30.0, "b": 10.0}, {"a": 5.0, "b": math.inf}, {"a": math.inf, "b": math.inf}]
    a, b, absent = (scoring.profile(costs, name) for name in ("a", "b", "c"))
    assert a == [1, 1, 3, math.inf]
    assert b == [1, 2, math.inf, math.inf]
    assert [scoring.share_within(a, factor) for factor in (1, 2, 3)] == [0.5, 0.5, 0.75]
    assert scoring.share_within(b, 1e9) == 0.5
    assert scoring.share_within(absent, 1e9) == 0


def test_sensitivity_is_the_contiguous_range_about_the_best() -> None:
    last = {1e-3: 94.6, 1e-2: 90.0, 0.1: 94.1, 1.0: 95.0, 10.0: 94.0, 100.0: 15.0}
    runs = {rate: [ended(0, score)] for rate, score in last.items()}
    found = scoring.sensitivity(runs, 20, 1)
    assert (found.low, found.high, found.decades) == (0.1, 10, 2.0)
    assert (found.diverged, found.collapsed, found.runs) == (0, 1, 6)
    runs[10.0] = [ended(99, diverged="loss not finite")]
    found = scoring.sensitivity(runs, 20, 1)
    assert (found.high, found.diverged, found.collapsed) == (1, 1, 1)


def test_sensitivity_compares_means_over_seeds_and_counts_runs() -> None:
    runs = {
        0.1: [ended(0, 90), ended(0, 94)],  # 92, whose first seed alone is 3 below that of the rate above
        1.0: [ended(0, 93), ended(0, 92.8)],
        10.0: [ended(0, 99), ended(0, 10), ended(0, diverged="loss not finite")],
    }
    found = scoring.sensitivity(runs, 20, 1)
    assert (found.low, found.high) == (0.1, 1)
    assert (found.diverged, found.collapsed, found.runs) == (1, 1, 7)
    for rate in runs:
        runs[rate] = [ended(0, 90), ended(0, diverged="loss not finite")]
    assert scoring.sensitivity(runs, 20, 1).decades == 0


def test_holm_as_in_his_worked_steps() -> None:
    assert scoring.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert scoring.holm([0.9, 0.8]) == [1, 1]
    assert scoring.holm([math.nan, 0.02])[1] == 0.02


def test_the_search_climbs_one_setting_at_a_time() -> None:
    method = Method("m", "M", "torch", knobs={"a": (0, 1, 2), "b": (0, 5, 7)})

    def run(lr: float, options: Options) -> tuning.Result:
        score = 100 - abs(math.log10(lr) + 0.5) - 3 * (options["a"] != 2) - (options["b"] != 7)
        return ended(diverged="too large") if lr > 50 else ended(0, score)

    trials = tuning.search(method, (1e-2, 1e-1, 1.0, 100.0), run)
    assert len(trials) == tuning.count(method, (1e-2, 1e-1, 1.0, 100.0)) == 10
    assert [trial.lr for trial in trials[4:6]] == [0.0316, 0.316]  # about 0.1: of two equal values the earlier trial
    chosen = tuning.best(trials)
    assert (chosen.lr, chosen.options) == (0.316, {"a": 2, "b": 7})


def test_of_two_equal_values_the_one_reached_earlier_is_better() -> None:
    late, early = (tuning.Trial(lr, {}, result) for lr, result in ((0.1, ended(1, 2, 3)), (1.0, ended(1, 3, 2))))
    assert tuning.best([late, early]) is early
    assert tuning.best([early, late]) is early


def test_every_tuned_method_gets_the_same_number_of_trials(registered: Registration) -> None:
    rates = registered.protocol["rates"]
    assert {tuning.count(m, rates) for m in registered.methods.values() if m.lr is None} == {13}
    assert registered.methods.keys() == methods.BUILDERS.keys()
    assert registered.protocol["tuning_seed"] >= max(t.sizes["full"].seeds for t in registered.tasks.values())
    assert len(registered.tasks) == 9


def test_the_page_names_the_registration_that_is_committed(registered: Registration) -> None:
    page = REGISTRATION.parents[2] / "docs" / "results" / "suite.md"
    assert registered.digest in page.read_text()


def test_every_network_takes_its_inputs(registered: Registration) -> None:
    shapes = {"digits": (64,), "friedman": (10,), "mnist-itself": (784,), "cifar10": (3, 32, 32), "shakespeare": (8,)}
    for task in registered.tasks.values():
        shape = shapes.get(task.data, (1, 28, 28))
        model = NETWORKS[task.network](shape, 4, task.sizes["quick"].width)
        x = torch.randint(4, (2, *shape)) if task.network == "transformer" else torch.randn(2, *shape)
        assert model(x).shape == ((2, 8, 4) if task.network == "transformer" else (2, 4))


def test_the_best_constant_scores_0_and_the_truth_100() -> None:
    size = Size(train=300, validation=100, test=100, batch=10, steps=1, width=(4,), seeds=1, ablation=1)
    samples = tasks.load("friedman", size)
    x, y = samples.train
    constant = nn.Linear(x.shape[1], 1)
    with torch.no_grad():
        constant.weight.zero_()
        constant.bias.copy_(y.mean(0))
    assert tasks.score(constant, samples, (x, y))[0] == pytest.approx(0, abs=1e-4)
    assert tasks.score(nn.Identity(), samples, (y, y))[0] == 100
    assert math.isnan(tasks.score(nn.Identity(), samples, (y / 0, y))[0])


def test_live_bytes_counts_a_storage_once_until_it_ends() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        view = kept[10:]
        for _ in range(5):
            view.add_(torch.ones(990))
    assert live.peak == 4 * (1000 + 990)


def toy(folder: Path) -> list[str]:
    """A study of one small task and three methods; words of its command."""
    whole = REGISTRATION.read_text()
    head = whole[: whole.index("[tasks.digits]")].replace("rates = [1e-4, 1e-3, 1e-2, 1e-1,", "rates = [")
    head = head.replace("timing_steps = 20", "timing_steps = 2").replace("{ quick = 5, full = 1 }", "{ quick = 2 }")
    task = """[tasks.digits]
title = "Toy"
data = "digits"
network = "mlp"
quick = { train = 200, validation = 60, test = 80, batch = 20, steps = 10, width = [8], seeds = 2, ablation = 2 }
"""
    methods = whole[whole.index("[methods.ddpnopt-default]") : whole.index("[methods.ddpnopt-stagewise]")]
    methods += whole[whole.index("[methods.adamw]") : whole.index("[methods.muon]")]
    ablation = '[ablation]\n"default" = {}\n"stage-wise" = { feedback = false }\n'
    path = folder / "toy.toml"
    path.write_text(head + task + methods + ablation)
    return ["--registration", str(path), "--out", str(folder)]


def test_a_toy_study_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = toy(tmp_path)
    records = tmp_path / "records" / "suite-digits.jsonl"
    assert suite.main(["digits", *words]) == 0
    first, page = records.read_bytes(), (tmp_path / "suite.md").read_text()
    lines = [json.loads(line) for line in first.splitlines()]
    tuned = [line for line in lines if line["settings"].get("seed") == 1000]
    assert len(tuned) == 2 * 9
    sensitivity = [line for line in lines if line["settings"].get("seed") == 1001]
    assert len(sensitivity) == 2 * 3
    # the rest: confirmations, the ablation's other variant, times and memory
    assert len(lines) == len(tuned) + len(sensitivity) + 3 * 2 + 2 + 1
    assert read(tmp_path / "toy.toml").digest in page
    assert "| DDPNOpt, tuned | " in page
    assert "| stage-wise | " in page
    assert (tmp_path / "suite-profiles.png").stat().st_size > 10_000

    capsys.readouterr()
    assert suite.main(["digits", *words, "--check"]) == 1  # one task cannot show what is claimed of nine
    assert "does not hold: Steps to the early target" in capsys.readouterr().err
    assert records.read_bytes() == first
    assert (tmp_path / "suite.md").read_text() == page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["imagenet"], "unknown task 'imagenet'; choose of: digits"),
        (["digits", "--methods", "adamm"], "unknown method 'adamm'; choose of: ddpnopt-default"),
        ([], "no task is on record"),
    ],
)
def test_what_there_is_not_is_refused_by_name(
    words: Sequence[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert suite.main([*words, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_diverges_is_recorded_as_such(registered: Registration) -> None:
    size = Size(train=200, validation=60, test=80, batch=20, steps=20, width=(8,), seeds=1, ablation=1)
    task = Task("toy", "Toy", "friedman", "mlp", {"quick": size})
    result = train(Run(task, "quick", registered.methods["sgd"], 100.0, {"momentum": 0.9}, 0))
    assert result["diverged"]
    assert result["test"] is None
    assert len(result["validation"]) < len(marks(20))
    assert tuning.value(result) == -math.inf
