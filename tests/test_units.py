"""How large a decrease is asked of a sample, where the caller does not say."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpnopt import DDPNOpt, Dense, Gradient, Identity, Kronecker, Matched
from ddpnopt.units import CHANGE

SAMPLES = 12


class Squares(nn.Module):
    """Sum over outputs of the squared error, mean or sum over samples."""

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss = (output - target).square().sum()
        return loss / len(output) if self.reduction == "mean" else loss


def task(outputs: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()
    return model, torch.randn(SAMPLES, 4).double(), 30 * torch.randn(SAMPLES, outputs).double()


def asked(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The formula, from the gradient of the squared error."""
    z = model(x).detach()
    g = 2 * (z - y)
    length = (g.norm(dim=1) / 2**0.5).clamp_min(1).log().mean().exp()
    long = g[g.norm(dim=1) > 2**0.5], z[g.norm(dim=1) > 2**0.5]
    size = (long[0] * long[1]).abs().sum() / long[0].abs().sum()
    return float(1 + (length - 1) * (2 + size / 10))


def step(optimizer: DDPNOpt, model: nn.Module, x: Tensor, y: Tensor, criterion: nn.Module) -> float:
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    return float(optimizer.diagnostics()["cap"])


def plain(optimizer: DDPNOpt, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
    loss(x, y).backward()
    optimizer.step()


def closure(optimizer: DDPNOpt, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
    optimizer.step(lambda: loss(x, y))


def micro_batches(optimizer: DDPNOpt, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
    for part in (slice(0, 4), slice(4, None)):
        (loss(x[part], y[part]) * len(x[part]) / len(x)).backward()
    optimizer.step()


def scaled(optimizer: DDPNOpt, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(loss(x, y)).backward()
    scaler.step(optimizer)


def unscaled(optimizer: DDPNOpt, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(loss(x, y)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


@pytest.mark.parametrize("form", [plain, closure, micro_batches, scaled, unscaled])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_first_steps_cap_is_the_formulas(form: Callable[..., None], reduction: Any) -> None:
    model, x, y = task()
    criterion = Squares(reduction)
    wanted = asked(model, x, y)
    assert wanted > 20
    optimizer = DDPNOpt(model, terminal=Gradient(reduction))
    if form is micro_batches and reduction == "sum":
        form(optimizer, lambda x, y: criterion(model(x), y) * SAMPLES / len(x), x, y)  # which it takes back
    else:
        form(optimizer, lambda x, y: criterion(model(x), y), x, y)
    assert optimizer.diagnostics()["cap"] == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("kind", ["gradient", "matched"])
def test_a_step_is_that_with_the_same_cap_named(kind: str) -> None:
    def weights(cap: Any) -> tuple[list[Tensor], Any]:
        model, x, y = task()
        criterion = Squares()
        end = Gradient(cap=cap) if kind == "gradient" else Matched(criterion, cap=cap)
        optimizer = DDPNOpt(model, terminal=end, curvature=Identity())
        plain(optimizer, lambda x, y: criterion(model(x), y), x, y)
        return [p.detach() for p in model.parameters()], optimizer.diagnostics()["cap"]

    found, cap = weights("auto")
    named, said = weights(cap)
    ones, _ = weights(1)
    assert said is None
    for new, wanted, other in zip(found, named, ones, strict=True):
        assert torch.equal(new, wanted)
        assert not torch.allclose(new, other, rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("masked", [False, True])
def test_a_log_likelihood_is_asked_for_one(scale: float, masked: bool) -> None:
    """However large its logits, and wrong; also where some are masked by ``-inf``."""
    torch.manual_seed(1)
    model, x, y = nn.Linear(4, 5), torch.randn(20, 4), torch.randint(4, (20,))
    with torch.no_grad():
        model.weight.mul_(scale)
    mask = torch.tensor([0.0, 0.0, 0.0, 0.0, -torch.inf if masked else 0.0])
    net = nn.Sequential(model, Plus(mask))
    criterion = nn.CrossEntropyLoss()
    for terminal in (Gradient(), Matched(criterion)):
        assert step(DDPNOpt(net, 1e-6, terminal=terminal), net, x, y, criterion) == 1.0


class Returning(nn.Module):
    """Logits of three classes, and other things."""

    def __init__(self, what: str):
        super().__init__()
        self.what, self.body = what, nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.spread = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        z = self.body(x)
        loss = nn.functional.cross_entropy(z, y)
        return {"loss": loss, "both": (z, loss), "spread": (z, self.spread), "named": {"logits": z, "loss": loss}}[
            self.what
        ]


@pytest.mark.parametrize("what", ["loss", "both", "spread", "named"])
@pytest.mark.parametrize("batch", [16, 512])
@pytest.mark.filterwarnings("ignore:the model, Returning")  # its own parameter has no columns
def test_what_is_of_no_sample_does_not_count(what: str, batch: int) -> None:
    """A loss that the model returns, or a parameter: it has the whole batch's gradient."""
    torch.manual_seed(0)
    model, x, y = Returning(what), torch.randn(batch, 4), torch.randint(3, (batch,))
    optimizer = DDPNOpt(model)
    found = model(x, y)
    loss = found["loss"] if what == "named" else found[1] if what == "both" else found
    if what == "spread":
        loss = nn.functional.cross_entropy(found[0] * found[1].exp(), y)
    loss.backward()
    optimizer.step()
    assert optimizer.diagnostics()["cap"] == 1.0


def test_masked_outputs_leave_the_others_their_cap() -> None:
    """A cross-entropy in units a hundred times as small, one class masked in the model."""

    def cap(mask: float) -> float:
        torch.manual_seed(1)
        net, x = nn.Sequential(nn.Linear(4, 3), Plus(torch.tensor([0.0, 0.0, mask]))), torch.randn(20, 4)
        optimizer = DDPNOpt(net)
        (100 * nn.functional.cross_entropy(net(x), torch.randint(2, (20,)))).backward()
        optimizer.step()
        return float(optimizer.diagnostics()["cap"])

    assert cap(-torch.inf) == pytest.approx(cap(-1e4), rel=1e-6)
    assert cap(-torch.inf) > 50


def test_outputs_that_were_written_into_are_not_taken_for_their_values() -> None:
    def cap(written: bool) -> float:
        model, x, y = task()
        optimizer, output = DDPNOpt(model), model(x)
        difference = output.sub_(y + 1e6) if written else output - (y + 1e6)
        ((difference + 1e6).square().sum() / len(x)).backward()
        optimizer.step()
        return float(optimizer.diagnostics()["cap"])

    assert cap(written=True) == pytest.approx(cap(written=False), rel=0.05)


def test_a_single_sample_hardly_moves_a_cap() -> None:
    """One whose probability is next to 0, that is, given as a probability."""
    torch.manual_seed(1)
    first, x = nn.Linear(4, 1), torch.randn(200, 4)
    with torch.no_grad():
        first.weight.mul_(20)
    model = nn.Sequential(first, nn.Sigmoid())
    with torch.no_grad():
        found, worst = model(x), first(x).abs().argmax()
    right = (found > 0.5).to(x)
    right[worst] = 1 - right[worst]
    assert float(1 - (found - right).abs()[worst]) < 1e-8  # its gradient is the inverse
    assert step(DDPNOpt(model, 1e-6), model, x, right, nn.BCELoss()) < 1.5


class Plus(nn.Module):
    def __init__(self, what: Tensor):
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return x + self.what


def test_a_cap_changes_slowly() -> None:
    model, x, y = task()
    optimizer, criterion = DDPNOpt(model, 1e-9), Squares()
    first = step(optimizer, model, x, y, criterion)
    assert step(optimizer, model, x, 10 * y, criterion) == pytest.approx(CHANGE * first)
    assert step(optimizer, model, x, 10 * y, criterion) == pytest.approx(CHANGE**2 * first)
    assert step(optimizer, model, x, y / 10, criterion) == pytest.approx(CHANGE * first)
    assert step(optimizer, model, x, y / 1000, criterion) == pytest.approx(first)
    near = 1.01 * y
    assert step(optimizer, model, x, near, criterion) == pytest.approx(asked(model, x, near), rel=1e-6)


@pytest.mark.parametrize("how", ["loaded", "copied"])
def test_the_last_cap_is_kept(how: str) -> None:
    model, x, y = task()
    optimizer, criterion = DDPNOpt(model, 1e-9), Squares()
    first = step(optimizer, model, x, y, criterion)
    if how == "loaded":
        again = DDPNOpt(model, 1e-9)
        optimizer.close()
        again.load_state_dict(optimizer.state_dict())
    else:
        model, again = copy.deepcopy((model, optimizer))
    assert step(again, model, x, 10 * y, criterion) == pytest.approx(CHANGE * first)


@pytest.mark.parametrize("how", ["loaded", "unpickled"])
def test_a_cap_from_before_outputs_were_counted_is_kept(how: str) -> None:
    model, x, y = task()
    optimizer = DDPNOpt(model, 1e-9)
    first = step(optimizer, model, x, y, Squares())
    again = DDPNOpt.__new__(DDPNOpt) if how == "unpickled" else DDPNOpt(model, 1e-9)
    optimizer.close()
    if how == "unpickled":
        state = {name: value for name, value in optimizer.__getstate__().items() if name != "_units"}
        again.__setstate__({**state, "_cap": first, "_closed": False})
    else:
        again.load_state_dict({name: value for name, value in optimizer.state_dict().items() if name != "outputs"})
    assert step(again, model, x, 10 * y, Squares()) == pytest.approx(CHANGE * first)


def test_an_optimizer_that_was_pickled_before_there_were_caps() -> None:
    model, x, y = task()
    optimizer = DDPNOpt(model, 1e-9)
    step(optimizer, model, x, y, Squares())
    state = optimizer.__getstate__()
    older = {name: value for name, value in state.items() if name not in ("_units", "_clips")} | {"_usual_clip": 0.5}
    again = DDPNOpt.__new__(DDPNOpt)
    again.__setstate__(older)
    optimizer.close()
    assert again.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    assert step(again, model, x, 10 * y, Squares()) > 2  # the first, for all it knows
    assert again._clips.usual == pytest.approx(0.55)  # by a tenth nearer to 1


@pytest.mark.parametrize("closed", [True, False])
def test_a_copy_watches_clips_for_itself(closed: bool) -> None:
    def moved(copied: bool) -> Tensor:
        torch.manual_seed(0)
        model, x = nn.Linear(4, 3), torch.randn(8, 4)
        optimizer = DDPNOpt(model, 0.1, curvature=Identity())
        if copied:
            other = copy.copy(optimizer)
            other.close() if closed else None
        model(x).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        before = model.weight.detach().clone()
        optimizer.step()
        return model.weight.detach() - before

    assert torch.equal(moved(copied=True), moved(copied=False))


@pytest.mark.parametrize("coupling", ["sample", Dense()])
def test_the_published_forms_ask_for_one(coupling: Any) -> None:
    def weights(terminal: Gradient) -> list[Tensor]:
        model, x, y = task()
        optimizer = DDPNOpt(model, 1e-3, terminal=terminal, coupling=coupling, curvature=Identity())
        plain(optimizer, lambda x, y: Squares()(model(x), y), x, y)
        assert optimizer.diagnostics()["cap"] is None
        return [p.detach() for p in model.parameters()]

    for new, wanted in zip(weights(Gradient()), weights(Gradient(cap=1)), strict=True):
        assert torch.equal(new, wanted)


@pytest.mark.parametrize("units", [3.0, 100.0, 300.0])
def test_targets_in_any_units_are_learned(units: float) -> None:
    """Of a function that takes a hidden layer: of its variance half at least, where a cap of 1 leaves nearly all."""

    def explained(terminal: Gradient) -> float:
        torch.manual_seed(0)
        x = torch.randn(512, 6)
        y = units * (torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]) / 1.2
        model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        optimizer, criterion = DDPNOpt(model, terminal=terminal, curvature=Kronecker()), nn.MSELoss()
        for i in range(200):
            own = slice(64 * (i % 8), 64 * (i % 8) + 64)
            optimizer.zero_grad()
            criterion(model(x[own]), y[own]).backward()
            optimizer.step()
        with torch.no_grad():
            return 1 - float((model(x) - y).square().mean() / y.var())

    assert explained(Gradient()) > 0.5
    if units >= 100:
        assert explained(Gradient(cap=1)) < 0.1
