"""How much damping a layer gets that hardly moves the output, and that it leaves the plateau it begins on."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpnopt import DDPNOpt, EigenKronecker, Gradient, Kronecker, reference
from ddpnopt.curvature import Curvature
from ddpnopt.sensitivity import LEAST, damped
from test_exact_step import blocks, controls

SAMPLES, KINDS = 24, 5
criterion = nn.CrossEntropyLoss()


def narrowed(scale: float) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network whose last layer passes on little of what the others do."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, KINDS)).double()
    with torch.no_grad():
        model[4].weight.mul_(scale)  # type: ignore[operator]
    return model, torch.randn(SAMPLES, 4).double(), torch.randint(KINDS, (SAMPLES,))


def step(optimizer: DDPNOpt, model: nn.Module, x: Tensor, y: Tensor, unit: float = 1.0) -> None:
    optimizer.zero_grad()
    (unit * criterion(model(x), y)).backward()
    optimizer.step()


def squares(model: nn.Sequential, x: Tensor, y: Tensor) -> tuple[list[float], float]:
    """``E |g_y|^2 E |a|^2`` of every linear layer, and the output's ``E |g|^2``, sample by sample."""
    found: list[list[float]] = []
    output: list[float] = []
    for one, target in zip(x, y, strict=True):
        states, inputs = one[None], []
        for module in model:
            if isinstance(module, nn.Linear):
                inputs.append(float(states.detach().square().sum() + 1))
            states = module(states)
        states.retain_grad()
        gradients = torch.autograd.grad(criterion(states, target[None]), [states, *model.parameters()])
        biases = [float(g.square().sum()) for g in gradients[2::2]]
        output.append(float(gradients[0].square().sum()))
        found.append([*biases, *inputs])
    mean = torch.tensor(found).mean(0)
    sides = len(mean) // 2
    return (mean[:sides] * mean[sides:]).tolist(), sum(output) / len(output)


def test_the_share_grows_with_the_sensitivity_and_unknown_ones_get_all() -> None:
    assert damped(LEAST, 1.0) == damped(5.0, 1.0) == 1.0
    assert damped(LEAST / 1e4, 1.0) == damped(LEAST, 1e4) == pytest.approx(1e-3)
    assert damped(None, 1.0) == damped(1.0, None) == damped(0.0, 1.0) == damped(1.0, 0.0) == 1.0


@pytest.mark.parametrize("curvature", [Kronecker(), Kronecker(rank=1), EigenKronecker()])
def test_what_is_compared_are_lengths_of_gradients(curvature: Curvature) -> None:
    model, x, y = narrowed(1e-2)
    layers, output = squares(model, x, y)
    optimizer = DDPNOpt(model, curvature=curvature)
    step(optimizer, model, x, y)
    found = [optimizer.state[block.parameters[0]]["square"] for block in blocks(optimizer)]
    if isinstance(curvature, EigenKronecker):  # which measures the gradients themselves, not their two sides
        assert found == pytest.approx(layers, rel=0.5)
    else:
        assert found == pytest.approx(layers, rel=1e-6)
    assert optimizer.state_dict()["square"] == pytest.approx(output, rel=1e-9)


@pytest.mark.parametrize("curvature", [Kronecker(refresh_every=1), EigenKronecker(refresh_every=1)])
@pytest.mark.parametrize("scale", [1e-2, 1e-5])
@pytest.mark.parametrize("unit", [1.0, 1e-4])
def test_a_step_with_a_share_is_the_dense_reference(curvature: Curvature, scale: float, unit: float) -> None:
    """In any unit of the loss."""
    model, x, y = narrowed(scale)
    options: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "max_change": math.inf}
    optimizer = DDPNOpt(model, 0.1, curvature=curvature, **options)
    start = copy.deepcopy(model.state_dict())
    step(optimizer, model, x, y, unit)
    kept = [optimizer.state[block.parameters[0]]["square"] for block in blocks(optimizer)]
    model.load_state_dict(start)
    before = controls(optimizer)
    functions, _ = reference.stages_of(model, x)
    end = reference.gradient(lambda z, t: unit * criterion(z, t), model(x).detach(), y)
    output = unit**2 * squares(model, x, y)[1]  # the mean of two equal steps
    step(optimizer, model, x, y, unit)

    shares = [min(1.0, (1000 * square / output) ** 0.75) for square in kept]
    assert shares[0] < 0.5
    assert shares[2] == 1.0
    own = 1 / max(10 + 2, 320 / SAMPLES)
    R = []
    for block, share in zip(blocks(optimizer), shares, strict=True):
        ridge, state = own * share * curvature.damping, optimizer.state[block.parameters[0]]  # type: ignore[attr-defined]
        if isinstance(curvature, Kronecker):
            assert state["ridge"] == pytest.approx(ridge)
        R.append(curvature.inverse(state, ridge).to_dense(*block.shape) / own)
    expected = reference.dense_step(functions, before, x, end, R=R)
    for new, wanted in zip(controls(optimizer), expected.controls, strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("form", "lr"), [({"coupling": "sample"}, 1.0), ({"terminal": Gradient(cap=1)}, 1 / 1002)])
def test_forms_that_are_told_all_keep_their_damping(form: dict[str, Any], lr: float) -> None:
    """``lr`` is what the ridge has of it, the batch form's with the two batches of its memory."""
    model, x, y = narrowed(1e-5)
    optimizer = DDPNOpt(model, 1e-3, **form)
    for _ in range(2):
        step(optimizer, model, x, y)
    ridges = [optimizer.state[block.parameters[0]]["ridge"] for block in blocks(optimizer)]
    assert ridges == pytest.approx([lr * Kronecker().damping] * 3)


def test_branches_that_begin_at_zero_are_told_by_the_steps_after() -> None:
    """Gradients of zero say nothing of a layer."""
    model, x, y = narrowed(0.0)
    optimizer = DDPNOpt(model)
    step(optimizer, model, x, y)
    assert optimizer.state[blocks(optimizer)[0].parameters[0]]["square"] == 0
    step(optimizer, model, x, y)
    ridges = [optimizer.state[block.parameters[0]]["ridge"] for block in blocks(optimizer)]
    assert ridges == [ridges[2]] * 3
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_small_weights_leave_the_plateau() -> None:
    """Which even damping does not: the same loss, told to be in its own unit, stays what guessing makes it."""

    def left(terminal: Gradient) -> float:
        torch.manual_seed(0)
        hidden = [m for _ in range(3) for m in (nn.Linear(12, 12), nn.GELU())]
        model = nn.Sequential(nn.Linear(4, 12), nn.GELU(), *hidden, nn.Linear(12, KINDS))
        for parameter in model.parameters():
            _ = nn.init.normal_(parameter, 0, 0.02) if parameter.ndim > 1 else nn.init.zeros_(parameter)
        x = torch.randn(256, 4)
        y = (x @ torch.randn(4, KINDS)).argmax(1)
        optimizer = DDPNOpt(model, terminal=terminal)
        for _ in range(60):
            step(optimizer, model, x, y)
        shares = y.bincount(minlength=KINDS) / len(y)
        return float(criterion(model(x), y).detach() / torch.special.entr(shares).sum())

    assert left(Gradient()) < 0.5
    assert left(Gradient(cap=1)) > 0.95


def test_it_resumes_bit_for_bit() -> None:
    model, x, y = narrowed(1e-4)
    optimizer = DDPNOpt(model, 1e-4, max_change=1e-4, weight_decay=0.0)
    for part in (slice(8), slice(8, 16)):
        step(optimizer, model, x[part], y[part])
    again = copy.deepcopy(model)
    resumed = DDPNOpt(again, 1e-4, max_change=1e-4, weight_decay=0.0)
    resumed.load_state_dict(optimizer.state_dict())
    for own, net in ((optimizer, model), (resumed, again)):
        for _ in range(2):
            step(own, net, x[16:], y[16:])
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_both_squares_are_moving_averages() -> None:
    """The output's is always 0.95 old; a layer's is that of its factors, at first the mean over steps."""
    model, x, y = narrowed(1e-3)
    optimizer = DDPNOpt(model, 1e-9, weight_decay=0.0)

    def found() -> tuple[float, float]:
        return optimizer.state_dict()["square"], optimizer.state[blocks(optimizer)[0].parameters[0]]["square"]

    step(optimizer, model, x, y)
    output, layer = found()
    step(optimizer, model, x, y, unit=0.1)
    assert found() == pytest.approx(((0.95 + 0.05 * 0.01) * output, (1 + 0.01) / 2 * layer), rel=1e-6)
