import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ddpnopt
from ddpnopt.experiments import cli, files, runs
from ddpnopt.experiments.config import resolve
from ddpnopt.experiments.data import Dataset
from ddpnopt.experiments.interrupt import StoppedError
from ddpnopt.experiments.progress import Silent
from ddpnopt.experiments.train import batches, total_steps, train
from experiments.folders import assert_same_run, metrics, tiny, weights

OPTIMIZERS = ["ddpnopt", "sgd", "rmsprop", "adam"]


class AtStep(Silent):
    """Calls ``act`` when a step is reported."""

    def __init__(self, step: int, act: Callable[[], Any]) -> None:
        self.at, self.act = step, act

    def step(self, done: int, total: int, loss: float) -> None:
        if done == self.at:
            self.act()


class Both(Silent):
    """Tells two reporters."""

    def __init__(self, *reporters: Silent) -> None:
        self.reporters = reporters

    def step(self, done: int, total: int, loss: float) -> None:
        for reporter in self.reporters:
            reporter.step(done, total, loss)


def ctrl_c() -> None:
    raise KeyboardInterrupt


def test_a_run_folder_holds_everything(iris: Dataset, tmp_path: Path) -> None:
    result = train(tiny(), tmp_path / "run", iris)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "result.json",
    }
    assert runs.finished(tmp_path / "run") == result
    assert result.status == "finished"
    assert 0 <= result.test_accuracy <= 1
    lines = files.read_metrics(tmp_path / "run" / files.METRICS)
    assert [line["step"] for line in lines if line["kind"] == "step"] == [3, 6, 9, 12]
    assert [line["step"] for line in lines if line["kind"] == "epoch"] == [7, 14]
    environment = (tmp_path / "run" / files.ENVIRONMENT).read_text()
    assert json.loads(environment)["torch"] == torch.__version__
    assert "/" not in environment  # no paths


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equal_seeds_give_equal_bits_and_other_seeds_do_not(iris: Dataset, tmp_path: Path, optimizer: str) -> None:
    train(tiny(optimizer=optimizer), tmp_path / "one", iris)
    torch.rand(7)  # the caller's random state plays no part
    train(tiny(optimizer=optimizer), tmp_path / "same", iris)
    train(tiny(optimizer=optimizer, seed=1), tmp_path / "other", iris)
    assert_same_run(tmp_path / "one", tmp_path / "same")
    assert not torch.equal(weights(tmp_path / "one")["0.weight"], weights(tmp_path / "other")["0.weight"])


def test_training_leaves_the_callers_random_state_alone(iris: Dataset, tmp_path: Path) -> None:
    drawn: list[float] = []
    for name in ("one", "other"):
        torch.rand(1)
        before = torch.get_rng_state()
        train(tiny(), tmp_path / name, iris, AtStep(5, lambda: drawn.append(float(torch.rand(1)))))
        assert torch.equal(before, torch.get_rng_state())
    assert drawn[0] == drawn[1]  # inside, the seed decides


def test_the_random_state_is_resumed(iris: Dataset, tmp_path: Path) -> None:
    drawn: list[float] = []
    draw = AtStep(2, lambda: torch.rand(3))  # before the checkpoint at 4
    draw.line = lambda text: drawn.append(float(torch.rand(1)))  # type: ignore[method-assign]  # at 7 and 14
    train(tiny(), tmp_path / "undisturbed", iris, draw)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "run", iris, Both(AtStep(2, lambda: torch.rand(3)), AtStep(6, ctrl_c)))
    train(tiny(), tmp_path / "run", iris, draw)
    assert drawn[:2] == drawn[2:]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("step", [2, 4, 7, 11, 13])
def test_an_exception_at_any_step_changes_nothing(iris: Dataset, tmp_path: Path, optimizer: str, step: int) -> None:
    config = tiny(optimizer=optimizer)
    train(config, tmp_path / "undisturbed", iris)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "disturbed", iris, AtStep(step, ctrl_c))
    train(config, tmp_path / "disturbed", iris)
    assert_same_run(tmp_path / "disturbed", tmp_path / "undisturbed")


@pytest.mark.parametrize("terminal", ["sampled", "exact"])
def test_every_state_of_ddpnopt_is_resumed(iris: Dataset, tmp_path: Path, terminal: str) -> None:
    config = tiny(terminal=terminal, curvature="eigen-kronecker", momentum=0.5, weight_decay=0.01)
    train(config, tmp_path / "undisturbed", iris)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "disturbed", iris, AtStep(6, ctrl_c))
    train(config, tmp_path / "disturbed", iris)
    assert_same_run(tmp_path / "disturbed", tmp_path / "undisturbed")


def test_a_stop_is_obeyed_after_the_step_and_loses_nothing(iris: Dataset, tmp_path: Path) -> None:
    asked: list[bool] = []
    with pytest.raises(StoppedError) as stopped:
        train(tiny(), tmp_path / "run", iris, AtStep(6, lambda: asked.append(True)), lambda: bool(asked))
    assert (stopped.value.step, stopped.value.total) == (6, 14)
    assert files.load_checkpoint(tmp_path / "run" / files.CHECKPOINT)["step"] == 6
    seen: list[int] = []
    resumed = Silent()
    resumed.step = lambda done, total, loss: seen.append(done)  # type: ignore[method-assign]
    train(tiny(), tmp_path / "run", iris, resumed)
    assert seen == list(range(7, 15))


@pytest.mark.parametrize(("optimizer", "epochs"), [("adam", 150), ("ddpnopt", 40)])
def test_a_killed_process_is_resumed_bit_exactly(tmp_path: Path, optimizer: str, epochs: int) -> None:
    words = ["train", "iris", "--optimizer", optimizer, "--epochs", str(epochs), "--log-every", "7"]
    words += ["--checkpoint-every", "20"]
    killed = tmp_path / "runs" / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpnopt.experiments.cli", *words, "--name", "killed"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        written = killed / files.METRICS
        deadline = time.monotonic() + 60
        while not (written.exists() and written.stat().st_size > 2000) and time.monotonic() < deadline:
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    assert (killed / files.CHECKPOINT).exists()
    assert runs.finished(killed) is None, "the run ended before it could be killed"
    assert cli.main(["train", "--resume", str(killed)]) == 0
    assert cli.main([*words, "--name", "undisturbed"]) == 0
    assert_same_run(killed, tmp_path / "runs" / "undisturbed")


def test_metrics_written_after_the_checkpoint_are_dropped(iris: Dataset, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "run", iris, AtStep(11, ctrl_c))  # checkpoint at 8, lines at 9
    with (tmp_path / "run" / files.METRICS).open("a") as file:
        file.write('{"kind": "ste')  # torn by the kill
    train(tiny(), tmp_path / "run", iris)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [3, 6, 7, 9, 12, 14]


def test_a_finished_run_is_not_repeated(iris: Dataset, tmp_path: Path) -> None:
    first = train(tiny(), tmp_path / "run", iris)
    assert train(tiny(), tmp_path / "run", iris, AtStep(1, ctrl_c)) == first


def test_other_settings_are_refused(iris: Dataset, tmp_path: Path) -> None:
    train(tiny(), tmp_path / "run", iris)
    with pytest.raises(ValueError, match=r"other settings \(seed 0 against 1\)"):
        train(tiny(seed=1), tmp_path / "run", iris)


@pytest.fixture
def interrupted(iris: Dataset, tmp_path: Path) -> Path:
    """A run that was stopped after step 11, its checkpoint at 8."""
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "run", iris, AtStep(11, ctrl_c))
    return tmp_path / "run"


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"PK" + c[9:]])
def test_a_damaged_checkpoint_is_refused_by_name(
    iris: Dataset, interrupted: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = interrupted / files.CHECKPOINT
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged")):
        train(tiny(), interrupted, iris)


def test_one_altered_bit_among_the_weights_is_refused_by_name(iris: Dataset, interrupted: Path) -> None:
    path = interrupted / files.CHECKPOINT
    stored = weights(interrupted)["0.weight"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(stored)] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged (checksum of")):
        train(tiny(), interrupted, iris)


def test_a_foreign_checkpoint_is_refused_by_name(iris: Dataset, interrupted: Path) -> None:
    torch.save({"step": 3}, interrupted / files.CHECKPOINT)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not a checkpoint of a run"):
        train(tiny(), interrupted, iris)


def test_torn_metrics_are_refused_by_name(iris: Dataset, interrupted: Path) -> None:
    path = interrupted / files.METRICS
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged")):
        train(tiny(), interrupted, iris)


def test_settings_changed_by_hand_are_refused(iris: Dataset, interrupted: Path) -> None:
    path = interrupted / files.CONFIG
    path.write_text(path.read_text().replace('"lr": 0.1', '"lr": 0.2'))
    with pytest.raises(ValueError, match=r"checkpoint\.pt was made with other settings \(lr 0\.1 against 0\.2\)"):
        train(tiny(lr=0.2), interrupted, iris)


def test_divergence_is_a_result_and_no_crash(iris: Dataset, tmp_path: Path) -> None:
    config = tiny(optimizer="sgd", lr=1e38)
    result = train(config, tmp_path / "run", iris)
    assert result.status == "diverged"
    assert "the loss" in str(result.reason)
    assert result.train_loss is None or math.isfinite(result.train_loss)
    assert 0 <= result.test_accuracy <= 1
    assert train(config, tmp_path / "run", iris) == result


def test_a_step_that_ddpnopt_refuses_is_a_divergence(
    iris: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ddpnopt.StepError("the update is not finite")

    monkeypatch.setattr(ddpnopt.DDPNOpt, "step", refuse)
    result = train(tiny(), tmp_path / "run", iris)
    assert (result.status, result.reason, result.steps) == ("diverged", "step 1: the update is not finite", 0)


def test_every_epoch_visits_every_sample_once_in_an_order_of_its_own() -> None:
    config = resolve(tiny(epochs=3))
    seen = list(batches(config, 105))
    assert len(seen) == total_steps(config, 105) == 21
    epochs = [torch.cat(seen[7 * e : 7 * e + 7]) for e in range(3)]
    assert all(torch.equal(epoch.sort().values, torch.arange(105)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(seen[0], next(batches(resolve(tiny(seed=1)), 105)))
    for first in (0, 1, 7, 13, 20, 21):
        rest = list(batches(config, 105, first))
        assert len(rest) == 21 - first
        assert all(torch.equal(a, b) for a, b in zip(rest, seen[first:], strict=True))


def test_sigint_stops_between_steps_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "iris", "--epochs", "2"]

    def step(self: object, done: int, total: int, loss: float) -> None:
        if done == 5:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("ddpnopt.experiments.progress.Display.step", step)
        assert cli.main([*words, "--name", "stopped"]) == 130
    said = capsys.readouterr().err
    assert "stopped after step 5 of 14" in said
    assert "continue with: ddpnopt train --resume runs/stopped" in said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert cli.main(["train", "--resume", "runs/stopped"]) == 0
    assert cli.main([*words, "--name", "undisturbed"]) == 0
    assert_same_run(Path("runs/stopped"), Path("runs/undisturbed"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
