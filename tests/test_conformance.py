"""DDPNOpt against every probe of the conformance table; and every probe against something that must not pass it."""

import json
import mmap
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import conformance
import pytest
import torch
from _conformance.answers import Answer, answer, interview
from _conformance.isolation import DiedError, HungError, isolated
from _conformance.methods import METHODS, Edit, GradientMaker, Method, Plain, Trainer, WithClosure, advance, no_edit
from _conformance.page import page
from _conformance.probing import PROBES, SensitiveError, UnmetError, same
from _conformance.problems import Problem
from torch import distributed, nn
from torch.optim import LBFGS, SGD, Optimizer


@pytest.mark.parametrize("method", ["ddpnopt", "ddpnopt-sample"])
@pytest.mark.parametrize("probe", PROBES)
def test_ddpnopt(probe: str, method: str) -> None:
    found = answer(METHODS[method], PROBES[probe])
    assert found.verdict == "yes", found.remark


class Forgetful(SGD):
    """Leaves out the first trained tensor."""

    def step(self, closure: Any = None) -> Any:
        skipped = next(p for group in self.param_groups for p in group["params"] if p.grad is not None)
        skipped.grad = None
        return super().step(closure)


class Silent(SGD):
    """Returns nothing."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)


class Deaf(SGD):
    """Knows one learning rate, the one it was made with."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = self.defaults["lr"]
        return super().step(closure)


class Outside(SGD):
    """Keeps a momentum where no state dictionary finds it."""

    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.drift = [
            p.grad + 0.9 * d for p, d in zip(parameters, getattr(self, "drift", [0.0] * len(parameters)), strict=True)
        ]
        for p, d in zip(parameters, self.drift, strict=True):
            p.grad = d
        return super().step(closure)


class Opaque:
    """No plain value."""


class Pickled(SGD):
    """Has an object of its own class in its state dictionary."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "opaque": Opaque()}


class Scaled(SGD):
    """Says that it handles the loss scale, and does not."""

    _step_supports_amp_scaling = True


class Signs(SGD):
    """Steps by the sign of the gradient, whatever its length."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None if p.grad is None else p.grad.sign()
        return super().step(closure)


class Hoarder(SGD):
    """Keeps every gradient."""

    def step(self, closure: Any = None) -> Any:
        self.hoard = [*getattr(self, "hoard", []), *(p.grad.clone() for g in self.param_groups for p in g["params"])]
        return super().step(closure)


class Heavy(SGD):
    """Keeps what no tensor holds, a megabyte a step, of memory that no other test can have left to be used again."""

    def step(self, closure: Any = None) -> Any:
        page = mmap.mmap(-1, 2**20)
        page.write(b"x" * 2**20)
        self.hoard = [*getattr(self, "hoard", []), page]
        return super().step(closure)


class Lazy(SGD):
    """Does not step."""

    def step(self, closure: Any = None) -> Any:
        return None


class Apart(SGD):
    """Every process steps by its own measure."""

    def step(self, closure: Any = None) -> Any:
        if distributed.is_initialized():
            self.param_groups[0]["lr"] = 0.1 * (1 + distributed.get_rank())
        return super().step(closure)


class LastAlone(Plain):
    """Drops the gradients of all micro-batches but the last."""

    def step(self, *batches: Problem, edit: Edit = no_edit, advance: Callable[..., Any] = advance) -> None:
        super().step(batches[-1], edit=edit, advance=advance)


class EightAlone(Plain):
    """Takes no other batch than the first."""

    def step(self, *batches: Problem, edit: Edit = no_edit, advance: Callable[..., Any] = advance) -> None:
        if len(batches[0].target) != 8:
            raise ValueError("8 samples")
        super().step(*batches, edit=edit, advance=advance)


@dataclass(frozen=True)
class Making:
    """Makes a trainer around an optimizer; without ``checks``, whatever the learning rate."""

    build: Callable[..., Optimizer] = SGD
    loop: type[Trainer] = Plain
    checks: bool = True

    def __call__(self, model: nn.Module, still: Sequence[nn.Parameter] = (), lr: float = 0.1) -> Trainer:
        kept = [p for p in model.parameters() if all(p is not other for other in still)]
        groups: Any = [{"params": kept}, {"params": list(still), "lr": 0.0}] if still else kept
        return self.loop(model, (self.build(groups, lr=lr if self.checks else abs(lr)),))


def _no_optimizer(model: nn.Module, **settings: Any) -> Trainer:
    return GradientMaker(model, (SGD(model.parameters(), lr=0.1),), maker=object())


MUST_FAIL: dict[str, Callable[..., Trainer]] = {
    "is_optimizer": _no_optimizer,
    "step_after_backward": Making(LBFGS, WithClosure),
    "closure_alone": Making(Silent),
    "scheduler": Making(Deaf),
    "groups": Making(Deaf),
    "resume": Making(Outside),
    "resume_weights_only": Making(Pickled),
    "grad_scaler": Making(Scaled),
    "grad_scaler_unscaled": Making(Scaled),
    "clipping_runs": Making(Lazy),
    "clipping_reaches": Making(Signs),
    "micro_batches": Making(loop=LastAlone),
    "deepcopy": Making(Outside),
    "negative_lr": Making(checks=False),
    "data_parallel": Making(Apart),
    "nan_batch": Making(),
    "smaller_batch": Making(loop=EightAlone),
    "leak": Making(Hoarder),
    "batch_norm_count": Making(LBFGS, WithClosure),
    "dropout": Making(LBFGS, WithClosure),
}


@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_can_fail(probe: str) -> None:
    make = MUST_FAIL.get(probe, Making(Forgetful))
    found = answer(Method("", "", make, ""), PROBES[probe])
    assert found.verdict != "yes"
    if make == Making(Forgetful):  # all that stand for a layer
        assert "tensors trained, not " in found.remark


@pytest.mark.parametrize("probe", [p for p in PROBES if p != "nan_batch"])
def test_sgd_passes_every_probe_but_nan(probe: str) -> None:
    found = answer(Method("", "", Making(), ""), PROBES[probe])
    assert found.verdict == "yes", found.remark


def test_a_leak_outside_tensors_is_seen() -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not tell how much memory a process holds")
    assert "MiB more" in answer(Method("", "", Making(Heavy), ""), PROBES["leak"]).remark


def _exit() -> None:
    os._exit(3)


def test_a_crash_and_a_hang_are_answers() -> None:
    with pytest.raises(DiedError, match="exit code 3"):
        isolated(60.0, _exit)
    with pytest.raises(HungError, match="0 s"):
        isolated(0.1, time.sleep, 60.0)
    assert isolated(60.0, divmod, 7, 3) == (2, 1)


def test_a_rival_that_is_not_installed_says_how_to_get_it() -> None:
    found = interview(replace(METHODS["singd"], package="no-such-package-of-ddpnopt>=1"), 1.0)
    assert set(found.values()) == {Answer("missing", 'pip install "no-such-package-of-ddpnopt>=1"')}


def test_the_page_holds_every_question_and_what_others_do_better() -> None:
    def answers(**verdicts: str) -> dict[str, Answer]:
        return {key: Answer(verdicts.get(key, "yes"), "because", ("be`ware",) * (key == "tied")) for key in PROBES}

    shown = page({"ddpnopt": answers(compiled="error"), "sgd": answers(nan_batch="no")}, "made so")
    for probe in PROBES.values():
        assert f"\n| {probe.title} | " in shown
        assert f"*{probe.title}*: {probe.passes}" in shown
    assert "**Others are better**: `torch.compile`d model. All 1 rivals can." in shown
    assert "**Most others cannot**: NaN batch leaves the weights finite. All 1 rivals cannot." in shown
    assert f"| yes, of {len(PROBES)} | {len(PROBES) - 1} | {len(PROBES) - 1} |" in shown
    assert "* *`torch.compile`d model*: **error**, `because`\n" in shown
    assert shown.count("* *tied weights*: yes, it warns `be'ware`\n") == 2
    assert shown.rstrip().endswith("made so")


def test_the_command_writes_page_and_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in set(METHODS) - {"ddpnopt", "singd"}:
        monkeypatch.delitem(METHODS, name)
    monkeypatch.setitem(METHODS, "singd", replace(METHODS["singd"], package="no-such-package-of-ddpnopt"))
    for key in set(PROBES) - {"negative_lr", "clipping_reaches"}:
        monkeypatch.delitem(PROBES, key)
    assert conformance.main(["--only", "ddpnopt", "--out", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == []
    assert conformance.main(["--out", str(tmp_path)]) == 0
    shown = (tmp_path / "conformance.md").read_text()
    assert "| negative learning rate rejected | yes | - |" in shown
    assert "| clipped gradients reach the step | yes | - |" in shown
    raw = json.loads((tmp_path / "conformance.json").read_text())
    assert raw["methods"]["ddpnopt"]["answers"]["negative_lr"]["verdict"] == "yes"
    missing = raw["methods"]["singd"]["answers"]["clipping_reaches"]
    assert (missing["verdict"], missing["remark"]) == ("missing", 'pip install "no-such-package-of-ddpnopt"')


def test_an_unknown_method_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance.main(["--only", "adamm"]) == 2
    assert "'adamm'" in capsys.readouterr().err


def test_the_committed_page_is_about_these_probes() -> None:
    shown = (Path(__file__).parents[1] / "docs" / "results" / "conformance.md").read_text()
    for probe in PROBES.values():
        assert f"*{probe.title}*: {probe.passes}" in shown, "run benchmarks/conformance.py again"


def test_weights_are_compared_over_the_way_gone() -> None:
    start, there = torch.zeros(3), torch.ones(3)
    same(there, there + 1e-6, start, "")
    with pytest.raises(UnmetError, match="differ"):
        same(there, there + 1e-4, start, "")
    with pytest.raises(SensitiveError, match="order of the samples"):
        same(there, there + 1e-4, start, "", there - 1e-4)
    with pytest.raises(UnmetError, match="do not move"):
        same(start, start, start, "")
    with pytest.raises(UnmetError, match="not finite"):
        same(there * float("nan"), there, start, "")
