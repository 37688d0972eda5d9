"""Every fast layer rule against the generic one, and that against single samples through autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import CURVATURES
from ddpnopt import DDPNOpt, Exact, Identity
from ddpnopt.columns import Columns
from ddpnopt.layers import Block, Call, rule_for
from ddpnopt.layers.base import LayerRule
from ddpnopt.layers.generic import GenericRule

Make = Callable[[], tuple[nn.Module, Tensor]]

FAST: dict[str, Make] = {
    "linear": lambda: (nn.Linear(4, 3), torch.randn(5, 4)),
    "linear without bias": lambda: (nn.Linear(4, 3, bias=False), torch.randn(5, 4)),
    "linear over positions": lambda: (nn.Linear(4, 3), torch.randn(5, 6, 4)),
    "linear over two dimensions": lambda: (nn.Linear(4, 3), torch.randn(5, 2, 3, 4)),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2), torch.randn(5, 4, 9)),
    "conv2d": lambda: (
        nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
        torch.randn(5, 2, 7, 6),
    ),
    "conv2d same": lambda: (nn.Conv2d(2, 4, (4, 3), padding="same", bias=False), torch.randn(5, 2, 7, 6)),
    "conv2d valid": lambda: (nn.Conv2d(2, 4, 3, padding="valid"), torch.randn(5, 2, 7, 6)),
    "conv2d circular": lambda: (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), torch.randn(5, 2, 5, 5)),
    "conv2d reflect": lambda: (nn.Conv2d(2, 4, 3, padding=2, padding_mode="reflect"), torch.randn(5, 2, 5, 5)),
    "conv2d depthwise": lambda: (nn.Conv2d(4, 4, 3, groups=4), torch.randn(5, 4, 5, 5)),
    "conv3d": lambda: (nn.Conv3d(2, 2, 2), torch.randn(3, 2, 3, 4, 3)),
    "layer norm": lambda: (nn.LayerNorm(4), torch.randn(5, 4)),
    "layer norm over positions": lambda: (nn.LayerNorm((3, 4)), torch.randn(5, 2, 3, 4)),
    "layer norm without bias": lambda: (nn.LayerNorm(4, bias=False), torch.randn(5, 6, 4)),
    "rms norm": lambda: (nn.RMSNorm(4), torch.randn(5, 6, 4)),
    "rms norm over positions": lambda: (nn.RMSNorm((3, 4), eps=0.1), torch.randn(5, 2, 3, 4)),
    "conv transpose 1d": lambda: (nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), torch.randn(5, 4, 6)),
    "conv transpose 2d": lambda: (
        nn.ConvTranspose2d(2, 3, (3, 2), (1, 2), (2, 1), (1, 0), dilation=(2, 1)),
        torch.randn(5, 2, 5, 4),
    ),
    "conv transpose 3d": lambda: (nn.ConvTranspose3d(2, 3, 2, stride=2, bias=False), torch.randn(3, 2, 2, 3, 2)),
    "instance norm": lambda: (nn.InstanceNorm1d(4, affine=True), torch.randn(5, 4, 6)),
    "instance norm in evaluation": lambda: (
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(),
        torch.randn(5, 4, 3, 2),
    ),
    "embedding": lambda: (nn.Embedding(7, 3), torch.randint(7, (5, 4))),
    "embedding of one index": lambda: (nn.Embedding(7, 3), torch.randint(7, (5,))),
    "embedding with padding": lambda: (nn.Embedding(4, 3, padding_idx=-1), torch.randint(4, (5, 2, 3))),
    "embedding bag": lambda: (nn.EmbeddingBag(4, 3), torch.randint(4, (5, 6))),
    "embedding bag of sums with padding": lambda: (
        nn.EmbeddingBag(4, 3, mode="sum", padding_idx=1),
        torch.randint(4, (5, 6)),
    ),
    "embedding bag of means with padding": lambda: (nn.EmbeddingBag(2, 3, padding_idx=1), torch.randint(2, (9, 3))),
    "embedding bag of maxima": lambda: (nn.EmbeddingBag(4, 3, mode="max"), torch.randint(4, (5, 6))),
    "embedding bag of maxima with padding": lambda: (
        nn.EmbeddingBag(4, 3, mode="max", padding_idx=2),
        torch.randint(4, (5, 3)),
    ),
    "group norm": lambda: (nn.GroupNorm(2, 4), torch.randn(5, 4, 3, 3)),
    "group norm of vectors": lambda: (nn.GroupNorm(2, 4), torch.randn(5, 4)),
    "batch norm in evaluation": lambda: (nn.BatchNorm2d(4).eval(), torch.randn(5, 4, 3, 3)),
}
GENERIC: dict[str, Make] = {
    "prelu, which vmap gets wrong": lambda: (nn.PReLU(4), torch.randn(5, 4)),
    "prelu over positions": lambda: (nn.PReLU(4), torch.randn(5, 4, 3)),
}


def blocks_of(module: nn.Module, rule: LayerRule) -> list[Block]:
    own = dict(module.named_parameters())
    return [Block(names, tuple(own[n] for n in names)) for names in rule.blocks(module, list(own))]


def columns_by_parameter(module: nn.Module, rule: LayerRule, x: Tensor, cotangents: Tensor) -> dict[str, Tensor]:
    """Gradients [R, B, numel] of every parameter."""
    blocks = blocks_of(module, rule)
    found: dict[str, Tensor] = {}
    for block, columns in zip(blocks, rule.columns(module, blocks, Call((x,), {}, [cotangents])), strict=True):
        values = columns.dense().values
        for name, parameter, start in zip(block.names, block.parameters, _starts(block), strict=True):
            width = parameter.numel() // values.shape[2]
            found[name] = values[:, :, :, start : start + width].flatten(2)
    return found


def _starts(block: Block) -> list[int]:
    starts, at = [], 0
    for parameter in block.parameters:
        starts.append(at)
        at += parameter.numel() // len(parameter)
    return starts


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", [*FAST, *GENERIC])
@pytest.mark.parametrize("R", [1, 3])
def test_columns_are_single_samples_gradients(kind: str, R: int) -> None:
    module, x = {**FAST, **GENERIC}[kind]()
    assert isinstance(rule_for(module), GenericRule) == (kind in GENERIC)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 3)
    output = module(x)
    cotangents = torch.randn(R, *output.shape)
    expected: dict[str, list[Tensor]] = {name: [] for name, _ in module.named_parameters()}
    for r in range(R):
        for b in range(len(x)):
            gradients = torch.autograd.grad(module(x[b : b + 1]), list(module.parameters()), cotangents[r, b : b + 1])
            for name, gradient in zip(expected, gradients, strict=True):
                expected[name].append(gradient.flatten())
    for rule in {rule_for(module), GenericRule()}:
        for name, values in columns_by_parameter(module, rule, x, cotangents).items():
            wanted = torch.stack(expected[name]).view(R, len(x), -1)
            torch.testing.assert_close(values, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [3, 8])  # by patches, and by groups
def test_stretches_of_a_batch_do_not_change_the_gradients_of_convolutions(
    monkeypatch: pytest.MonkeyPatch, channels: int
) -> None:
    layer = nn.Conv2d(channels, 4, 3, dtype=torch.float32)
    x, v = torch.randn(5, channels, 6, 6, dtype=torch.float32), torch.randn(2, 5, 4, 4, 4, dtype=torch.float32)
    blocks = [Block(("weight", "bias"), tuple(layer.parameters()))]
    found = []
    for numbers in (1 << 20, 2 * (x[0].numel() + v[0, 0].numel()), 1):
        monkeypatch.setattr("ddpnopt.layers.conv.AT_ONCE", numbers)
        (columns,) = rule_for(layer).columns(layer, blocks, Call((x,), {}, [v]))
        found.append(columns.dense().values)
    for values in found[1:]:
        torch.testing.assert_close(values, found[0], rtol=1e-5, atol=1e-5)


def test_batch_norm_in_training_sums_to_the_batch_gradient() -> None:
    module, x = nn.BatchNorm1d(4), torch.randn(6, 4)
    output = module(x)
    v = torch.randn_like(output)
    gradients = torch.autograd.grad(output, list(module.parameters()), v)
    for gradient, values in zip(
        gradients, columns_by_parameter(module, rule_for(module), x, v[None]).values(), strict=True
    ):
        torch.testing.assert_close(values.sum((0, 1)), gradient)


def test_keyword_inputs() -> None:
    for make in (FAST["linear"], FAST["conv2d"], FAST["layer norm"]):
        module, x = make()
        rule = rule_for(module)
        v = torch.randn(1, *module(x).shape)
        blocks = blocks_of(module, rule)
        g = torch.randn(blocks[0].matrix(blocks[0].parameters).shape)
        by_position: Columns = rule.columns(module, blocks, Call((x,), {}, [v]))[0]
        by_name: Columns = rule.columns(module, blocks, Call((), {"input": x}, [v]))[0]
        assert torch.equal(by_position.directional(g), by_name.directional(g))


class Mixing(nn.Module):
    """Centres its inputs over the batch, so that no gradient belongs to one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) * self.scale


def test_a_module_that_mixes_samples_is_trained_all_the_same() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Mixing(), nn.Linear(4, 3))
    optimizer = DDPNOpt(model)
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    before = [p.detach().clone() for p in model.parameters()]
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="Mixing: the generic rule failed"):
        optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert any(row.rule == "base" and "generic rule failed" in row.why for row in optimizer.report().rows)


class Recurrent(nn.Module):
    """Runs one layer three times, and another model's idea of a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        out: Tensor = self.head(x)
        return out


def test_a_layer_that_runs_several_times_gets_the_gradient_of_all_uses() -> None:
    model, x, y = Recurrent(), torch.randn(5, 4), torch.randint(3, (5,))
    expected = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = DDPNOpt(model, lr=1e-7, curvature=Identity(), weight_decay=0.0)
    optimizer.step(lambda: nn.functional.cross_entropy(model(x), y))
    for new, old, gradient in zip(model.parameters(), start, expected, strict=True):
        torch.testing.assert_close((old - new) / 1e-7, gradient, rtol=1e-4, atol=1e-6)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(torch.tanh(self.embed(x)))
        return logits.mT


@pytest.mark.parametrize("form", ["plain", "closure"])
def test_a_shared_parameter_gets_the_gradient_of_both_owners(form: str) -> None:
    model, x, y = Tied(), torch.randint(7, (5, 3)), torch.randint(7, (5, 3))
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    start = model.embed.weight.detach().clone()
    optimizer = DDPNOpt(model, lr=1e-7, curvature=Identity(), weight_decay=0.0)
    if form == "plain":
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    else:
        optimizer.step(lambda: nn.functional.cross_entropy(model(x), y))
    torch.testing.assert_close((start - model.embed.weight.detach()) / 1e-7, expected, rtol=1e-4, atol=1e-6)
    (row,) = optimizer.report().rows
    assert row.rule == "embedding + linear"
    assert "shared" in row.why


@pytest.mark.parametrize("training", [True, False])
def test_no_layer_sees_another_while_batch_norm_mixes_the_samples(training: bool) -> None:
    def step(feedback: bool) -> tuple[list[Tensor], int, str]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
        model[1].train(training)
        calls: list[nn.Module] = []
        model[0].register_forward_hook(lambda module, *_: calls.append(module))
        optimizer = DDPNOpt(model, 1.0, curvature=Identity(), feedback=feedback)
        x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        return [p.detach() for p in model.parameters()], len(calls), str(optimizer.report()).splitlines()[0]

    own, calls, head = step(feedback=True)
    without, once, _ = step(feedback=False)
    assert once == 1
    assert calls == (1 if training else 2)
    assert head.endswith("off while 1 takes its statistics from the batch" if training else "feedback on")
    assert all(map(torch.equal, own, without)) == training


class Statistics(nn.Module):
    """Keeps statistics, as BatchNorm does, and does not mix the samples by them."""

    mean: Tensor
    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(50))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
            self.batches += 1
        return x


def test_dropout_masks_and_running_statistics_are_those_of_the_first_pass() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach() == 0)
            return x

    model = nn.Sequential(nn.Linear(4, 50), Statistics(), nn.Dropout(0.5), Spy(), nn.Linear(50, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    optimizer = DDPNOpt(model)
    nn.functional.cross_entropy(model(x), y).backward()
    norm = model[1]
    assert isinstance(norm, Statistics)
    torch.rand(7)  # what the loop draws in between must not be drawn again
    counted, before_step = norm.mean.clone(), torch.get_rng_state()
    optimizer.step()
    assert torch.equal(norm.mean, counted)
    assert int(norm.batches) == 1
    assert torch.equal(torch.get_rng_state(), before_step)
    assert len(seen) == 2
    assert torch.equal(*seen)


class Counting(nn.Module):
    """Keeps a running mean and a count of its own, written in place or replaced."""

    def __init__(self, replaces: bool) -> None:
        super().__init__()
        self.replaces, self.scale = replaces, nn.Parameter(torch.ones(4))
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        if self.replaces:
            self.mean = mean
        else:
            self.mean.copy_(mean)
        return x * self.scale


@pytest.mark.parametrize("replaces", [True, False])
@pytest.mark.parametrize("form", ["plain", "closure"])
def test_statistics_of_a_module_of_your_own_move_once(replaces: bool, form: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Counting(replaces), nn.Linear(4, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    expected = 0.1 * model[0](x).detach().mean(0)
    optimizer = DDPNOpt(model, terminal=Exact(nn.CrossEntropyLoss()) if form == "closure" else None)
    if form == "plain":
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    else:
        optimizer.step(lambda: nn.functional.cross_entropy(model(x), y))
    mean = model[1].mean
    assert isinstance(mean, Tensor)
    torch.testing.assert_close(mean, expected)
    assert optimizer.report().rows[1].rule == "generic"


def test_report_names_every_parameter_once() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 3), nn.PReLU())
    optimizer = DDPNOpt(model)
    report = optimizer.report()
    assert [row.rule for row in report.rows] == ["conv", "norm", "linear", "generic"]
    assert sum(row.parameters for row in report.rows) == sum(p.numel() for p in model.parameters())
    assert "BatchNorm2d" in str(report)
    assert "Kronecker" in str(report)


class Behind(nn.Module):
    """Uses a layer's parameters without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(nn.functional.linear(torch.tanh(self.a(x)), self.b.weight, self.b.bias))
        out: Tensor = self.c(x)
        return out


@pytest.mark.parametrize("curvature", CURVATURES)
def test_layers_that_turn_silent_or_freeze_in_part_train_on(curvature: str) -> None:
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    model = Behind()
    optimizer = DDPNOpt(model, 0.01, curvature=CURVATURES[curvature], momentum=0.5)
    with pytest.warns(UserWarning, match="b, Linear: it was not seen to run"):
        for step in range(5):
            if step == 3:
                model.a.bias.requires_grad_(False)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    again = DDPNOpt(model, 0.01, curvature=CURVATURES[curvature], momentum=0.5)
    again.load_state_dict(optimizer.state_dict())
    assert any(row.why.startswith("it was not seen") for row in again.report().rows)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(4, 6), nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

    def forward(self, x: Tensor, head: int) -> Tensor:
        out: Tensor = self.heads[head](torch.tanh(self.body(x)))
        return out


def test_a_head_used_in_one_micro_batch_only_gets_its_gradient() -> None:
    model, x, y = Heads(), torch.randn(6, 4), torch.randint(3, (6,))
    optimizer = DDPNOpt(model, 1e-7, curvature=Identity(), weight_decay=0.0)
    start = [p.detach().clone() for p in model.parameters()]
    for head in (0, 1):
        (nn.functional.cross_entropy(model(x, head), y) / 2).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    for new, old, gradient in zip(model.parameters(), start, gradients, strict=True):
        torch.testing.assert_close((old - new.detach()) / 1e-7, gradient, rtol=1e-4, atol=1e-6)


class Shifted(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.shift = nn.Linear(5, 6), nn.Parameter(torch.zeros(shape))
        self.block, self.last = Shift(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.block(self.first(x), self.shift).mean(1))
        return out


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6) / 3)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return torch.tanh((x + shift) @ self.weight)


@pytest.mark.filterwarnings("ignore:.*one update from the whole batch")
@pytest.mark.parametrize("shape", [(4, 6), (1, 4, 6), ()])
def test_inputs_that_belong_to_no_sample(shape: tuple[int, ...]) -> None:
    model, x, y = Shifted(shape), torch.randn(8, 4, 5), torch.randint(3, (8,))
    optimizer = DDPNOpt(model, 0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert {row.rule for row in optimizer.report().rows if row.name in ("first", "last")} == {"linear"}


@pytest.mark.parametrize("settings", [{}, {"coupling": "sample"}, {"coupling": "sample", "feedback": False}], ids=str)
@pytest.mark.parametrize("form", ["plain", "closure"])
def test_sparse_gradients_are_made_dense(settings: dict[str, Any], form: str) -> None:
    def weights(sparse: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 3))
        x, y = torch.randint(7, (5, 3)), torch.randint(3, (5,))
        optimizer = DDPNOpt(model, **settings)
        if form == "plain":
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        else:
            optimizer.step(lambda: nn.functional.cross_entropy(model(x), y))
        assert {row.rule for row in optimizer.report().rows} == {"embedding", "linear"}
        return list(model.parameters())

    for one, other in zip(weights(False), weights(True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_an_embedding_whose_gradient_is_divided_by_counts_follows_the_batch() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randint(7, (5, 3)), torch.randint(3, (5,))
    optimizer = DDPNOpt(model, lr=1e-7, curvature=Identity(), weight_decay=0.0)
    assert [row.rule for row in optimizer.report().rows] == ["linear", "base"]
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), [next(model.parameters())])
    start = next(model.parameters()).detach().clone()
    optimizer.step(lambda: nn.functional.cross_entropy(model(x), y))
    torch.testing.assert_close((start - next(model.parameters()).detach()) / 1e-7, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("closure", [False, True])
def test_a_tied_parameter_whose_gradients_would_be_too_many_gets_one_update(
    monkeypatch: pytest.MonkeyPatch, closure: bool
) -> None:
    model, x, y = Tied(), torch.randint(7, (5, 3)), torch.randint(7, (5, 3))
    optimizer = DDPNOpt(model, lr=1e-7, curvature=Identity(), weight_decay=0.0)
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    start = model.embed.weight.detach().clone()
    monkeypatch.setattr("ddpnopt.reading.LARGEST", 5 * expected.numel() - 1)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    if not closure:
        loss().backward()
    with pytest.warns(UserWarning, match="140 numbers: one update"):
        optimizer.step(loss if closure else None)
    torch.testing.assert_close((start - model.embed.weight.detach()) / 1e-7, expected, rtol=1e-4, atol=1e-6)
