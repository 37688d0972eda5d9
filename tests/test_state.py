"""Finding the state at a cut: no cost to a chain, nothing left behind, and plain words where it cannot be told."""

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ddpnopt import DDPNOpt, Exact, Gradient, Identity, Matched
from ddpnopt.network import is_chain
from ddpnopt.terminal import Terminal
from graphs import GRAPHS, OTHERS, Named, Net, Record


def trained(
    model: nn.Module, x: Tensor, *, steps: int = 3, lr: float = 0.3, parts: int = 1, terminal: Terminal | None = None
) -> list[Tensor]:
    optimizer = DDPNOpt(model, lr, curvature=Identity(), terminal=terminal)
    y = torch.arange(len(x)) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (F.cross_entropy(model(part_x), part_y) / parts).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.Linear(4, 3),
    "flat": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), nn.Tanh(), nn.Linear(6, 3)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_pays_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CHAINS[name]()
    layers = sum(bool(m._parameters) for m in model.modules())

    def no_walk(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("ddpnopt.trajectory.Tracer", no_walk)
    trained(model, torch.randn(6, 4), steps=1)
    optimizer = DDPNOpt(model)
    assert hooks(model) == 2 * layers + 2
    optimizer.close()


def test_what_is_no_chain() -> None:
    relu, linear = nn.ReLU(), nn.Linear(4, 4)
    assert not is_chain(nn.Sequential(linear, relu, linear))
    assert not is_chain(nn.Sequential(linear, nn.TransformerEncoderLayer(4, 1)))
    assert not is_chain(Net(lambda net, x: net.a(x), a=linear))
    assert all(is_chain(make()) for make in CHAINS.values())


class Marker(torch.autograd.Function):
    """Lives as long as the graph."""

    graphs: list[Any] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.marker = nn.Identity()
        Marker.graphs.append(weakref.ref(ctx.marker))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


@pytest.mark.parametrize("graph", ["gate", "free stream", "shared"])
@pytest.mark.parametrize("terminal", [Gradient(), Matched(), Exact()])
def test_no_graph_and_no_activation_survives(graph: str, terminal: Any) -> None:
    """Also not of a forward pass that nobody differentiates, nor of one that fails."""
    case = GRAPHS[graph]()
    model = Net(lambda net, x: Marker.apply(net.inner(x)), inner=case.model)  # type: ignore[no-untyped-call]
    y = torch.arange(len(case.x)) % 3
    optimizer = DDPNOpt(model, terminal=terminal)
    Marker.graphs.clear()

    def tensors() -> int:
        gc.collect()
        return sum(type(thing) in (Tensor, nn.Parameter) for thing in gc.get_objects())

    def one_round() -> None:
        optimizer.step(lambda: F.cross_entropy(model(case.x), y))
        if isinstance(terminal, Gradient):
            F.cross_entropy(model(case.x), y).backward()
            optimizer.step()
        model(case.x)
        with pytest.raises(RuntimeError):
            model(case.x[:, :1])
        optimizer.zero_grad()

    one_round()
    one_round()  # momentum's first drift is the second step's
    before = tensors()
    one_round()
    one_round()
    assert tensors() == before
    assert len(Marker.graphs) >= 6
    assert not any(ref() for ref in Marker.graphs)


class Taking(nn.Module):
    """A layer that takes a dataclass or a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, given: Any) -> Tensor:
        out: Tensor = self.weight * (given["logits"] if isinstance(given, dict) else given.logits)
        return out


@pytest.mark.filterwarnings(
    "ignore:.*the generic rule failed"
)  # it takes tensors apart from their batch in pytrees only
@pytest.mark.parametrize("pack", [Record, Named])
def test_no_graph_survives_in_what_a_layer_was_given(pack: Callable[..., Any]) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        out: Tensor = net.take(pack(logits=Marker.apply(net.a(x)), features=x))  # type: ignore[no-untyped-call]
        return out

    model, x = Net(run, a=nn.Linear(3, 3), take=Taking()), torch.randn(5, 3)
    Marker.graphs.clear()
    optimizer = DDPNOpt(model)
    model(x)
    optimizer.step(lambda: model(x).square().mean())
    gc.collect()
    assert len(Marker.graphs) == 2
    assert not any(ref() for ref in Marker.graphs)


class BasicBlock(nn.Module):
    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        skip = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.downsample = skip if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        rectified: Tensor = self.relu(out)
        return rectified


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Sequential(BasicBlock(4, 4, 1), BasicBlock(4, 8, 2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    head = Net(lambda net, x: net.linear(x.mean(1)), linear=nn.Linear(8, 3))
    return nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), head)


@pytest.mark.filterwarnings("ignore:.*one update from the whole batch's gradient")  # parts of torch's attention
@pytest.mark.parametrize("make", [resnet, encoder])
@pytest.mark.parametrize("autocast", [False, True])
def test_networks_as_people_write_them(make: Callable[[], nn.Module], autocast: bool) -> None:
    torch.set_default_dtype(torch.float32)
    model = make()
    x = torch.randn(12, 1, 8, 8) if make is resnet else torch.randn(12, 5, 4)
    y = torch.arange(12) % 3
    optimizer = DDPNOpt(model, 0.03)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-4:]) / 4 < losses[0]  # dropout makes single ones jump


@pytest.mark.parametrize("graph", [*GRAPHS, "scaled", "tied"])
@pytest.mark.parametrize("exact", [False, True])
def test_micro_batches_are_the_batch(graph: str, exact: bool) -> None:
    def weights(parts: int) -> list[Tensor]:
        torch.manual_seed(3)
        case = (GRAPHS | OTHERS)[graph]()
        x = torch.randn(6, *case.x.shape[1:])
        criterion = nn.CrossEntropyLoss()
        optimizer = DDPNOpt(case.model, 0.3, curvature=Identity(), terminal=Exact(criterion) if exact else Gradient())
        y = torch.arange(6) % 3
        for _ in range(2):
            optimizer.zero_grad()
            for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (criterion(case.model(part_x), part_y) / parts).backward()
            optimizer.step()
        return [p.detach() for p in case.model.parameters()]

    for new, wanted in zip(weights(2), weights(1), strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("detour", [False, True])
def test_two_backward_passes_through_one_graph(graph: str, detour: bool) -> None:
    """They add up; what ``zero_grad`` has dropped between them leaves nothing."""

    def weights(twice: bool) -> list[Tensor]:
        torch.manual_seed(3)
        case = GRAPHS[graph]()
        optimizer = DDPNOpt(case.model, 0.3, curvature=Identity())
        output = case.model(case.x)
        one, other = output.square().mean(), F.cross_entropy(output, torch.arange(len(output)) % 3)
        if twice:
            one.backward(retain_graph=True)
            if detour:
                optimizer.zero_grad()
            other.backward()
        else:
            (other if detour else one + other).backward()
        optimizer.step()
        return [p.detach() for p in case.model.parameters()]

    for new, wanted in zip(weights(True), weights(False), strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-9, atol=1e-9)


def test_values_written_into_are_restored_once_and_copied_from_then_on() -> None:
    def weights(in_place: bool) -> tuple[list[Tensor], list[int]]:
        torch.manual_seed(3)
        runs: list[int] = []

        def run(net: Any, x: Tensor) -> Tensor:
            runs[-1] += 1
            h = net.b(torch.tanh(net.a(x)))
            skip = net.skip(x)  # b's output lives across this cut, and is written into after
            if in_place:
                h += skip
            else:
                h = h + skip
            out: Tensor = net.head(torch.tanh(h))
            return out

        linear = nn.Linear
        model = Net(run, a=linear(3, 4), b=linear(4, 4), skip=linear(3, 4), head=linear(4, 3))
        x, y = torch.randn(5, 3), torch.arange(5) % 3
        optimizer = DDPNOpt(model, 1.0, curvature=Identity())
        for _ in range(3):
            runs.append(0)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()], runs

    (new, runs), (wanted, plain) = weights(True), weights(False)
    assert runs == [3, 2, 2]
    assert plain == [2, 2, 2]
    for one, other in zip(new, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return 2 * gradients[0]


def custom_stream(net: Any, x: Tensor) -> Tensor:
    z = Double.apply(net.stem(x))  # type: ignore[no-untyped-call]
    out: Tensor = net.head(z + net.b(torch.tanh(net.a(z * z))))
    return out


def checkpointed_stream(net: Any, x: Tensor) -> Tensor:
    def inside(h: Tensor) -> Tensor:
        z = torch.sin(h)  # saves what is recomputed, so that it cannot be asked for a part
        out: Tensor = z + net.b(torch.tanh(net.a(z * z)))
        return out

    out: Tensor = net.head(checkpoint(inside, net.stem(x), use_reentrant=False))
    return out


def another_way() -> Callable[[Any, Tensor], Tensor]:
    passes = [0]

    def run(net: Any, x: Tensor) -> Tensor:
        passes[0] += 1
        h = net.act(net.stem(x)) if passes[0] % 2 else torch.tanh(net.stem(x))
        out: Tensor = net.head(h + net.b(torch.tanh(net.a(h))))
        return out

    return run


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (custom_stream, "[ab], Linear: .*DoubleBackward is a custom function"),
        (checkpointed_stream, "[ab], Linear: .*may be checkpointed"),
        (another_way(), "Linear: .*took another way"),
    ],
)
def test_what_cannot_be_followed_is_said_once(run: Callable[[Any, Tensor], Tensor], reason: str) -> None:
    linear = nn.Linear
    model = Net(run, stem=linear(3, 4), act=nn.Tanh(), a=linear(4, 4), b=linear(4, 4), head=linear(4, 3))
    x, y = torch.randn(5, 3), torch.arange(5) % 3
    optimizer = DDPNOpt(model, 0.3)
    losses = []

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    with pytest.warns(UserWarning, match=reason) as said:
        step()
    assert len({str(w.message) for w in said}) == len(said)
    for _ in range(3):
        step()
    assert losses[-1] < losses[0]


def test_calls_without_gradients_are_counted_in_both_passes() -> None:
    def weights(extra: bool) -> list[Tensor]:
        def run(net: Any, x: Tensor) -> Tensor:
            h = net.stem(x)
            if extra:
                with torch.no_grad():
                    net.act(2 * h)
            skip = net.act(h)  # known from this exit on
            out: Tensor = net.head(torch.sin(skip) + net.b(torch.tanh(net.a(skip))))
            return out

        torch.manual_seed(3)
        linear = nn.Linear
        model = Net(run, stem=linear(3, 4), act=nn.Tanh(), a=linear(4, 4), b=linear(4, 4), head=linear(4, 3))
        return trained(model, torch.randn(5, 3), lr=1.0)

    for new, wanted in zip(weights(True), weights(False), strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*was not seen to run on the batch")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointed_blocks_train(reentrant: bool) -> None:
    def block(net: Any, x: Tensor) -> Tensor:
        out: Tensor = x + net.b(torch.tanh(net.a(x)))
        return out

    def run(net: Any, x: Tensor) -> Tensor:
        out: Tensor = net.head(net.tail(checkpoint(net.block, net.stem(x), use_reentrant=reentrant)))
        return out

    def weights(run: Callable[[Any, Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        linear = nn.Linear
        block_ = Net(block, a=linear(4, 4), b=linear(4, 4))
        tail = Net(block, a=linear(4, 4), b=linear(4, 4))
        model = Net(run, stem=linear(3, 4), block=block_, tail=tail, head=linear(4, 3))
        return trained(model, torch.randn(5, 3))

    plain = weights(lambda net, x: net.head(net.tail(net.block(net.stem(x)))))
    for new, wanted in zip(weights(run), plain, strict=True):
        if not reentrant:  # else the layers inside are updated alone
            torch.testing.assert_close(new, wanted, rtol=1e-12, atol=1e-12)
        assert bool(torch.isfinite(new).all())


class Twice(nn.Module):
    """A weight of its own, used before and after the layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.weight * torch.tanh(self.inner(self.weight * x))
        return out


class Past(Twice):
    """The same, used before the layer inside, in a tensor that runs past it and that no module sees."""

    def forward(self, x: Tensor) -> Tensor:
        past = self.weight * x
        out: Tensor = past + torch.tanh(self.inner(x))
        return out


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Twice, "a parameter of the Twice around it"),
        (Past, "on a layer that has moved through a tensor that no module"),
    ],
)
def test_a_parameter_around_a_layer_that_cannot_be_told_apart(block: type[Twice], reason: str) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        out: Tensor = net.head(net.block(net.stem(x)))
        return out

    model = Net(run, stem=nn.Linear(3, 4), block=block(), head=nn.Linear(4, 3))
    with pytest.warns(UserWarning, match=f"block.inner, Linear: .*{reason}"):
        trained(model, torch.randn(5, 3), steps=1)


def test_a_layer_whose_parameters_are_used_outside_it_gets_all_its_gradient() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        h = net.b(torch.tanh(net.a(x)))
        return F.linear(torch.tanh(h), net.a.weight.t()[:3])

    model = Net(run, a=nn.Linear(3, 4), b=nn.Linear(4, 4))
    x, y = torch.randn(5, 3), torch.arange(5) % 3
    for closure in (False, True):
        before = [p.detach().clone() for p in model.parameters()]
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        optimizer = DDPNOpt(model, 1e-7, curvature=Identity(), weight_decay=0.0)
        with pytest.warns(UserWarning, match="a, Linear: a parameter of it is used outside its own runs"):
            if closure:
                optimizer.step(lambda: F.cross_entropy(model(x), y))
            else:
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        for new, old, gradient in zip(model.parameters(), before, gradients, strict=True):
            torch.testing.assert_close((old - new.detach()) / 1e-7, gradient, rtol=1e-4, atol=1e-6)
        optimizer.close()


class Weighted(nn.Module):
    """A layer, perhaps a shift, and logarithms of weights for the loss, which no forward pass reads."""

    def __init__(self, shifted: bool) -> None:
        super().__init__()
        self.layer, self.logs = nn.Linear(4, 2), nn.Parameter(torch.zeros(2))
        self.shift = nn.Parameter(torch.zeros(2)) if shifted else None

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.layer(x)
        return z if self.shift is None else z + self.shift


@pytest.mark.parametrize("form", ["backward", "closure", "unscaled"])
@pytest.mark.parametrize("shifted", [True, False])
def test_a_parameter_that_the_loss_alone_reads_is_trained(form: str, shifted: bool) -> None:
    """Learned weights of several losses: their gradient is in no sample's columns."""
    torch.manual_seed(0)
    model, x, y = Weighted(shifted), torch.randn(32, 4), torch.randn(32, 2)
    optimizer, scaler = DDPNOpt(model), torch.amp.GradScaler("cpu", init_scale=256.0)

    def loss() -> Tensor:
        found: Tensor = (model(x) - y).square() * torch.exp(-model.logs) + model.logs
        return found.mean()

    with pytest.warns(UserWarning, match="logs, Parameter: a parameter of it is used outside its own runs") as warned:
        for _ in range(30):
            if form == "backward":
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
            elif form == "closure":
                optimizer.step(loss)
            else:
                optimizer.zero_grad()
                scaler.scale(loss()).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
    assert len(warned) == 1
    with torch.no_grad():
        best = (model(x) - y).square().mean(0).log()  # where the loss is least for these errors
    torch.testing.assert_close(model.logs.detach(), best, rtol=0.1, atol=0.1)
    assert model.shift is None or "S" in optimizer.state[model.shift]


class Gated(nn.Module):
    """A parameter that reaches the outputs through a gate, 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.gate = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = x + self.gate * self.shift
        return z


def test_a_parameter_without_effect_as_yet_is_its_modules_own() -> None:
    """Its columns are 0, and a penalty in the loss gives it a gradient."""
    torch.manual_seed(0)
    gated, x, y = Gated(), torch.randn(32, 4), torch.randn(32, 2)
    model = nn.Sequential(nn.Linear(4, 2), gated)
    optimizer = DDPNOpt(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.zero_grad()
            ((model(x) - y).square().mean() + 1e-3 * gated.shift.square().sum()).backward()
            optimizer.step()
    assert not optimizer.state_dict()["refused"]
    assert float(gated.gate.detach()) != 0
