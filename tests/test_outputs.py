"""Losses that are means over many outputs of a sample: how many are counted, and what a curvature makes of it."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpnopt import Adaptive, DDPNOpt, EigenKronecker, Gradient, Identity, Kronecker, Matched, reference
from ddpnopt.curvature import Curvature
from ddpnopt.units import CHANGE
from test_exact_step import blocks, controls
from test_units import closure, micro_batches, plain, scaled, unscaled

SAMPLES, LETTERS, KINDS = 12, 9, 7


class OverLetters(nn.CrossEntropyLoss):
    """Over all letters of all samples."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return super().forward(output.flatten(0, 1), target.flatten())


def sentences(letters: int = LETTERS) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, KINDS)).double()
    return model, torch.randn(SAMPLES, letters, 4).double(), torch.randint(KINDS, (SAMPLES, letters))


def counted(optimizer: DDPNOpt) -> float:
    return float(optimizer.diagnostics()["outputs"])


def participation(g: Tensor) -> float:
    """Of letters ``[B, T, kinds]``."""
    lengths = g.norm(dim=2)
    return float(lengths.sum(1).square().sum() / lengths.square().sum())


@pytest.mark.parametrize("form", [plain, closure, micro_batches, scaled, unscaled])
def test_the_first_steps_count_is_the_formulas(form: Callable[..., None]) -> None:
    model, x, y = sentences()
    criterion = OverLetters()
    output = model(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(criterion(output, y), output)
    optimizer = DDPNOpt(model)
    form(optimizer, lambda x, y: criterion(model(x), y), x, y)
    assert LETTERS / 2 < participation(g) < LETTERS
    assert counted(optimizer) == pytest.approx(participation(g), rel=1e-9)
    assert optimizer.diagnostics()["cap"] == 1.0


@pytest.mark.parametrize("letters", [1, 2, 50])
def test_letters_that_are_equally_wrong_are_counted_all(letters: int) -> None:
    model, x, y = sentences(letters)
    with torch.no_grad():
        model[2].weight.zero_(), model[2].bias.zero_()  # type: ignore[index]
    optimizer = DDPNOpt(model)
    plain(optimizer, lambda x, y: OverLetters()(model(x), y), x, y)
    assert counted(optimizer) == pytest.approx(letters)


def test_many_letters_are_counted_up_to_128() -> None:
    model, x, y = sentences(200)
    optimizer = DDPNOpt(model)
    plain(optimizer, lambda x, y: OverLetters()(model(x), y), x, y)
    assert counted(optimizer) == 128.0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("targets", ["hard", "smoothed", "soft"])
def test_one_cross_entropy_is_one_output(scale: float, classes: int, targets: str) -> None:
    torch.manual_seed(1)
    model, x = nn.Linear(4, classes), torch.randn(20, 4)
    with torch.no_grad():
        model.weight.mul_(scale)
    y = torch.randn(20, classes).softmax(1) if targets == "soft" else torch.randint(classes, (20,))
    optimizer = DDPNOpt(model, 1e-6)
    nn.CrossEntropyLoss(label_smoothing=0.1 * (targets == "smoothed"))(model(x), y).backward()
    optimizer.step()
    assert counted(optimizer) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("kind", ["number", "sample", "cap"])
def test_one_number_is_one_output_and_some_forms_count_nothing(kind: str) -> None:
    model, x = nn.Linear(4, 1), torch.randn(20, 4)
    settings: dict[str, dict[str, Any]] = {"sample": {"coupling": "sample"}, "cap": {"terminal": Gradient(cap=1)}}
    optimizer = DDPNOpt(model, 1e-6, **settings.get(kind, {}))
    nn.MSELoss()(model(x), torch.randn(20, 1)).backward()
    optimizer.step()
    assert optimizer.diagnostics()["outputs"] == (1.0 if kind == "number" else None)


def test_classes_may_stand_second() -> None:
    """Pictures whose pixels are of a class: ``[B, classes, height, width]``."""
    torch.manual_seed(1)
    model, x = nn.Conv2d(2, 5, 1, bias=False), torch.randn(6, 2, 4, 3)
    with torch.no_grad():
        model.weight.zero_()
    optimizer = DDPNOpt(model)
    nn.CrossEntropyLoss()(model(x), torch.randint(5, (6, 4, 3))).backward()
    optimizer.step()
    assert counted(optimizer) == pytest.approx(12)


class Beside(nn.Module):
    """Logits, and other tensors that they are made of, or that are made of them."""

    def __init__(self, what: str):
        super().__init__()
        self.what, self.body, self.head = what, nn.Linear(4, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = torch.relu(self.body(x))
        z = self.head(features)
        return {"features": (features, z), "twice": (z, z), "half": (z, features.bfloat16())}[self.what]


@pytest.mark.parametrize("what", ["features", "twice", "half"])
def test_features_beside_the_logits_are_no_outputs(what: str) -> None:
    torch.manual_seed(0)
    model, x, y = Beside(what), torch.randn(20, 4), torch.randint(3, (20,))
    optimizer = DDPNOpt(model)
    nn.functional.cross_entropy(next(z for z in model(x) if z.shape[1] == 3), y).backward()
    optimizer.step()
    assert counted(optimizer) == pytest.approx(1.0, rel=1e-3)


def test_a_sum_over_many_outputs_is_no_mean_over_them() -> None:
    """Its gradients are long: it asks for more, and its ``M`` knows."""

    def step(letters: int, times: float) -> dict[str, Any]:
        model, x, y = sentences(letters)
        optimizer = DDPNOpt(model)
        plain(optimizer, lambda x, y: times * OverLetters()(model(x), y), x, y)
        return optimizer.diagnostics()

    mean, total = step(100, 1.0), step(100, 100.0)
    assert mean["outputs"] > 70
    assert total["outputs"] == pytest.approx(mean["outputs"] / total["cap"])
    assert total["outputs"] < 10


def test_a_batch_without_a_gradient_says_nothing() -> None:
    model, x, y = sentences()
    optimizer = DDPNOpt(model)
    found = []
    for share in (0.0, 1.0, 0.0):
        optimizer.zero_grad()
        plain(optimizer, lambda x, y, share=share: share * OverLetters()(model(x), y), x, y)
        found.append(optimizer.diagnostics()["outputs"])
    assert found[0] is None
    assert found[1] > LETTERS / 2
    assert found[2] == found[1]


@pytest.mark.parametrize("how", ["on", "loaded", "copied"])
def test_the_count_changes_slowly(how: str) -> None:
    model, x, y = sentences()
    optimizer, criterion = DDPNOpt(model, 1e-9), OverLetters()

    def first_letter(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x)[:, 0], y[:, 0])

    plain(optimizer, lambda x, y: criterion(model(x), y), x, y)
    before = counted(optimizer)
    optimizer.zero_grad()
    if how == "loaded":
        again = DDPNOpt(model, 1e-9)
        optimizer.close()
        again.load_state_dict(optimizer.state_dict())
        optimizer = again
    if how == "copied":
        model, optimizer = copy.deepcopy((model, optimizer))
    plain(optimizer, first_letter, x, y)
    assert counted(optimizer) == pytest.approx(before / CHANGE)


def growth(curvature: Curvature, outputs: float) -> tuple[float, Curvature]:
    """What is said in the curvatures' docstrings."""
    if isinstance(curvature, Kronecker):
        damping = curvature.damping / math.sqrt(outputs)
        return outputs**0.75, Kronecker(damping=damping, refresh_every=1, memory=curvature.memory)
    return (math.sqrt(outputs) if isinstance(curvature, Adaptive) else 1.0), curvature


CURVATURES = [
    Kronecker(refresh_every=1),
    Kronecker(refresh_every=1, memory=3),
    Adaptive(),
    EigenKronecker(),
    Identity(),
]


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("kind", ["gradient", "matched"])
@pytest.mark.parametrize("lr", [0.01, 10.0])
def test_one_step_is_the_dense_reference(curvature: Curvature, kind: str, lr: float) -> None:
    """``R = growth M max(1 / lr + memory / batch, 320 / batch) + damping``, as each curvature says."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 20)).double()
    x, y = torch.randn(SAMPLES, 4).double(), torch.randn(SAMPLES, 20).double()
    criterion = nn.MSELoss()
    terminal = Gradient() if kind == "gradient" else Matched(criterion)
    options: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "max_change": math.inf}
    optimizer = DDPNOpt(model, lr, curvature=curvature, terminal=terminal, **options)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        with torch.no_grad():
            for p, value in zip(model.parameters(), start, strict=True):
                p.copy_(value)
        before = controls(optimizer)
        functions, _ = reference.stages_of(model, x)
        end = getattr(reference, kind)(nn.functional.mse_loss, model(x).detach(), y)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    outputs = counted(optimizer)
    assert 2 < outputs < 20 / 4
    M_times, damped = growth(curvature, outputs)
    seen = min(curvature.memory, 2 * SAMPLES) / SAMPLES
    own = 1 / (M_times * max(1 / lr + seen, min(curvature.memory, 320) / SAMPLES))
    R = []
    for block in blocks(optimizer):
        if isinstance(damped, Kronecker):  # whose state has the inverses, made with the damping that was told
            assert optimizer.state[block.parameters[0]]["ridge"] == pytest.approx(damped.ridge(own, 0.0, batch=True))
        inverse = damped.inverse(optimizer.state[block.parameters[0]], damped.ridge(own, 0.0, batch=True))
        R.append(inverse.to_dense(*block.shape) / own)
    expected = reference.dense_step(functions, before, x, end, R=R)
    for new, wanted in zip(controls(optimizer), expected.controls, strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-9, atol=1e-9)


class Heated(nn.Module):
    """A layer, and a parameter that is an output itself: the whole batch's, no sample's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.heat = nn.Linear(4, KINDS), nn.Parameter(torch.zeros(KINDS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.heat


@pytest.mark.filterwarnings("ignore:the model, Heated")
def test_a_parameter_without_columns_grows_as_its_diagonal_does() -> None:
    """Its curvature is ``Adaptive()``, whose ``M`` is a gradient's length; its memory is the others'."""

    def moved(memory: float, **settings: Any) -> tuple[Tensor, DDPNOpt]:
        _, x, y = sentences()
        torch.manual_seed(0)
        model = Heated().double()
        curvature = Kronecker(memory=memory)
        optimizer = DDPNOpt(model, curvature=curvature, momentum=0.0, weight_decay=0.0, **settings)
        plain(optimizer, lambda x, y: OverLetters()(sum(model(x)), y), x, y)
        return model.heat.detach(), optimizer

    for memory, weight in ((0, 10.0), (SAMPLES, 11.0), (1280, 320 / SAMPLES)):
        found, optimizer = moved(memory)
        wanted, _ = moved(0, terminal=Gradient(cap=1), lr=1 / (weight * math.sqrt(counted(optimizer))))
        assert bool(found.any())
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("letters", [8, 64])
def test_steps_on_long_samples_are_shorter(letters: int) -> None:
    def length(terminal: Gradient) -> float:
        model, x, y = sentences(letters)
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer = DDPNOpt(model, terminal=terminal, curvature=Kronecker(damping=1e-3), weight_decay=0.0)
        plain(optimizer, lambda x, y: OverLetters()(model(x), y), x, y)
        return float((nn.utils.parameters_to_vector(model.parameters()).detach() - before).norm())

    assert length(Gradient()) < 0.9 * length(Gradient(cap=1))


class Folded(nn.Sequential):
    """Returns all letters of all samples as rows."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x.flatten(0, 1)


@pytest.mark.parametrize("unit", [1.0, 100.0])
@pytest.mark.parametrize("terminal", ["gradient", "matched"])
def test_letters_as_rows_are_those_of_their_samples(unit: float, terminal: str) -> None:
    """Whether the model or the loss flattens ``[B, T, kinds]``; in large units the cap follows, too."""

    def weights(folded: bool) -> tuple[list[Tensor], dict[str, Any]]:
        model, x, y = sentences()
        criterion = nn.CrossEntropyLoss() if folded else OverLetters()
        net = Folded(*model.children()) if folded else model
        own = Matched(criterion) if terminal == "matched" else Gradient()
        optimizer = DDPNOpt(net, terminal=own)
        for _ in range(4):
            plain(optimizer, lambda x, y: unit * criterion(net(x), y.flatten() if folded else y), x, y)
        return [p.detach() for p in model.parameters()], optimizer.diagnostics()

    (found, told), (wanted, expected) = weights(True), weights(False)
    assert told["outputs"] == expected["outputs"]
    assert told["cap"] == expected["cap"]
    assert told["outputs"] > LETTERS / 2 or told["cap"] > 1
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


class WithCodebook(nn.Module):
    """Returns logits, and rows that belong to no sample."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.book = nn.Linear(4, KINDS), nn.Parameter(torch.randn(2 * SAMPLES, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x), self.book * 1


@pytest.mark.filterwarnings("ignore:.*was not seen to run")
def test_rows_beside_what_leads_with_the_batch_are_nobody_s() -> None:
    model = WithCodebook()
    optimizer = DDPNOpt(model)
    logits, book = model(torch.randn(SAMPLES, 4))
    (nn.functional.cross_entropy(logits, torch.randint(KINDS, (SAMPLES,))) + 100 * book.square().sum()).backward()
    optimizer.step()
    assert optimizer.diagnostics()["cap"] == 1.0
    assert counted(optimizer) == 1.0
