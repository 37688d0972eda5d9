"""Recurrent, attention and embedding layers in whole steps: against dense DDP, plain gradients, and one another."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ddpnopt import DDPNOpt, Exact, Gradient, Identity, reference


class Last(nn.Module):
    """The last hidden state of a recurrent layer, as the layer returns it."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        _, last = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
        return torch.cat(list(last[0] if isinstance(last, tuple) else last), 1)


class Cells(nn.Module):
    """A cell that runs over time."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for at in x.unbind(1):
            state = self.cell(at, state)
        return state[0] if isinstance(state, tuple) else state  # type: ignore[return-value]


class Attending(nn.Module):
    """Self-attention, averaged over positions."""

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.layer.batch_first else x.transpose(0, 1)
        out: Tensor = self.layer(x, x, x, need_weights=False)[0]
        return out.mean(1 if self.layer.batch_first else 0)


CHAINS: dict[str, Callable[[], list[nn.Module]]] = {
    "lstm": lambda: [nn.Linear(3, 4), Last(nn.LSTM(4, 3)), nn.Linear(3, 3)],
    "gru": lambda: [nn.Linear(3, 4), Last(nn.GRU(4, 3, batch_first=True)), nn.Linear(3, 3)],
    "rnn": lambda: [nn.Linear(3, 4), Last(nn.RNN(4, 3)), nn.Linear(3, 3)],
    "cell": lambda: [nn.Linear(3, 4), Cells(nn.GRUCell(4, 3)), nn.Linear(3, 3)],
    "attention": lambda: [nn.Linear(3, 4), Attending(nn.MultiheadAttention(4, 2, batch_first=True)), nn.Linear(4, 3)],
    "attention, batch second": lambda: [nn.Linear(3, 4), Attending(nn.MultiheadAttention(4, 2)), nn.Linear(4, 3)],
    "embedding": lambda: [
        nn.Embedding(6, 4),
        Attending(nn.MultiheadAttention(4, 2, add_bias_kv=True)),
        nn.Linear(4, 3),
    ],
}
CRITERION = nn.CrossEntropyLoss()


def chain(kind: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    model = nn.Sequential(*CHAINS[kind]())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randint(6, (5, 4)) if kind == "embedding" else torch.randn(5, 4, 3)
    return model, x, torch.randint(3, (5,))


def vector(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def unrolled(module: nn.Module, named: dict[str, Tensor], x: Tensor) -> Tensor:
    """The last hidden state of one sample ``[S, F]`` by the textbook's equations: torch's own cannot be vmapped."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    W, U, b, d = (next(p for name, p in named.items() if kind in name) for kind in kinds)
    h = c = x.new_zeros(U.shape[1])
    for at in x:
        i, s = W @ at + b, U @ h + d
        if len(U) == 4 * len(h):
            gate_i, gate_f, g, gate_o = (i + s).chunk(4)
            c = gate_f.sigmoid() * c + gate_i.sigmoid() * g.tanh()
            h = gate_o.sigmoid() * c.tanh()
        elif len(U) == 3 * len(h):
            (r, z, n), (r_s, z_s, n_s) = i.chunk(3), s.chunk(3)
            z = (z + z_s).sigmoid()
            h = z * h + (1 - z) * (n + (r + r_s).sigmoid() * n_s).tanh()
        else:
            h = (i + s).tanh()
    return h


def dynamics(module: nn.Module, shape: torch.Size, integers: bool) -> reference.Function:
    """A module as the reference sees it: flat parameters and one sample's flat state in, the next state out."""
    parameters = dict(module.named_parameters())

    def f(u: Tensor, x: Tensor) -> Tensor:
        parts = u.split([p.numel() for p in parameters.values()])
        named = {n: part.view_as(p) for (n, p), part in zip(parameters.items(), parts, strict=True)}
        if integers:  # one-hot: the reference's states are numbers
            return torch.mm(x.view(*shape, -1), named["weight"]).flatten()
        if isinstance(module, Last | Cells):
            return unrolled(module, named, x.view(shape))
        out: Tensor = functional_call(module, named, (x.view(1, *shape),))
        return out.flatten()

    return f


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the reference, which takes samples one by one
@pytest.mark.parametrize("terminal", ["gradient", "exact"])
@pytest.mark.parametrize("coupling", ["batch", "sample"])
@pytest.mark.parametrize("kind", CHAINS)
def test_one_step_is_the_dense_reference(kind: str, coupling: Any, terminal: str) -> None:
    lr = 0.5
    model, x, y = chain(kind)
    functions: list[reference.Function] = []
    state = x
    for module in model:
        functions.append(dynamics(module, state.shape[1:], integers=not state.is_floating_point()))
        state = module(state).detach()
    controls = [vector(module) for module in model]
    form = reference.gradient if terminal == "gradient" else reference.exact
    end = form(nn.functional.cross_entropy, state, y)
    start = nn.functional.one_hot(x, 6).double().flatten(1) if kind == "embedding" else x.flatten(1)
    R = [torch.eye(len(u)) / lr for u in controls]
    again = [functions[1](controls[1], functions[0](controls[0], one)) for one in start]
    torch.testing.assert_close(torch.stack(again), model[:2](x).flatten(1))
    expected = reference.dense_step(functions, controls, start, end, R=R, coupling=coupling)
    chosen = Gradient() if terminal == "gradient" else Exact(CRITERION)
    # a cell's first input is not all that enters it: the module that runs it over time is the stage
    stages = ["1"] if kind == "cell" else None
    optimizer = DDPNOpt(
        model, lr, curvature=Identity(), coupling=coupling, terminal=chosen, stages=stages, weight_decay=0.0
    )
    CRITERION(model(x), y).backward()
    optimizer.step()
    for module, wanted in zip(model, expected.controls, strict=True):
        torch.testing.assert_close(vector(module), wanted, rtol=1e-8, atol=1e-9)


class Encoder(nn.Module):
    def __init__(self, first: bool, dropout: float = 0.0, norm_first: bool = False) -> None:
        super().__init__()
        self.first, self.embedding = first, nn.Embedding(9, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout, batch_first=first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=first and not norm_first)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        h = self.embedding(x)
        h = self.encoder(h if self.first else h.transpose(0, 1), src_key_padding_mask=padding)
        out: Tensor = self.head(h.mean(1 if self.first else 0))
        return out


class Translator(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.embedding = first, nn.Embedding(9, 8)
        self.body = nn.Transformer(8, 2, 1, 1, 12, 0.0, batch_first=first)
        self.head = nn.Linear(8, 9)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x, target = (tokens if self.first else tokens.T for tokens in (x, target))
        out: Tensor = self.head(self.body(self.embedding(x), self.embedding(target)))
        return (out if self.first else out.transpose(0, 1)).transpose(1, 2)


def batch_of(length: int) -> tuple[Tensor, Tensor, Tensor]:
    padding = torch.arange(length).repeat(5, 1) >= torch.tensor([[length], [2], [3], [length], [1]])
    return torch.randint(9, (5, length)), torch.randint(3, (5,)), padding


@pytest.mark.filterwarnings("ignore:.*nested tensor")
@pytest.mark.parametrize("length", [4, 5])  # 5: as many positions as samples
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_where_the_batch_is_changes_nothing(length: int, training: bool, masked: bool, norm_first: bool) -> None:
    def weights(first: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Encoder(first, norm_first=norm_first).train(training)
        x, y, padding = batch_of(length)
        optimizer = DDPNOpt(model)
        for _ in range(2):
            optimizer.zero_grad()
            CRITERION(model(x, padding) if masked else model(x), y).backward()
            optimizer.step()
        assert {row.rule for row in optimizer.report().rows} == {"embedding", "attention", "linear", "norm"}
        with torch.no_grad():
            model(x, padding)
        assert torch.backends.mha.get_fastpath_enabled()
        return list(model.parameters())

    for one, other in zip(weights(True), weights(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_encoder_and_decoder_with_the_batch_second() -> None:
    def weights(first: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, x, target = Translator(first), torch.randint(9, (5, 4)), torch.randint(9, (5, 3))
        optimizer = DDPNOpt(model)
        for _ in range(2):
            optimizer.zero_grad()
            CRITERION(model(x, target), target).backward()
            optimizer.step()
        assert all(row.rule != "base" for row in optimizer.report().rows)
        return list(model.parameters())

    for one, other in zip(weights(True), weights(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(9, 6, padding_idx=0, max_norm=2.0), nn.LSTM(6, 5, 2, dropout=0.3)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(self.embedding(x).transpose(0, 1))[0].mean(0))
        return out


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.norm, self.head = nn.EmbeddingBag(9, 6, mode="mean"), nn.RMSNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.bag(x)))
        return out


MODELS: dict[str, Callable[[], nn.Module]] = {
    "encoder": partial(Encoder, True, 0.2),
    "encoder, batch second": partial(Encoder, False, 0.2),
    "tagger": Tagger,
    "bags": Bags,
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", ["plain", "closure"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_small_step_follows_the_gradient_dropout_included(kind: str, form: str, reduction: Any) -> None:
    model = MODELS[kind]()
    x, y, _ = batch_of(4)
    model(x)  # renormalises the rows that are longer than max_norm
    start = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    nn.functional.cross_entropy(model(x), y, reduction=reduction).backward()
    expected = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.set_rng_state(state)
    optimizer = DDPNOpt(model, 1e-7, curvature=Identity(), terminal=Gradient(reduction=reduction), weight_decay=0.0)
    if form == "plain":
        nn.functional.cross_entropy(model(x), y, reduction=reduction).backward()
        optimizer.step()
    else:
        optimizer.step(lambda: nn.functional.cross_entropy(model(x), y, reduction=reduction))
    assert all(row.rule != "base" for row in optimizer.report().rows)
    for new, old, gradient in zip(model.parameters(), start, expected, strict=True):
        torch.testing.assert_close((old - new.detach()) / 1e-7, gradient, rtol=1e-4, atol=1e-5)


class Packed(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(3, 5, batch_first=first), nn.Linear(5, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out: Tensor = self.head(self.body(packed)[1][-1])
        return out


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("form", ["plain", "closure"])
def test_packed_sequences_follow_the_batch_and_say_so(form: str, first: bool) -> None:
    model, x, y = Packed(first), torch.randn(5, 4, 3), torch.randint(3, (5,))
    lengths = torch.tensor([4, 2, 3, 1, 4])
    optimizer = DDPNOpt(model, 0.05)
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        with pytest.warns(UserWarning, match="body, GRU: ") if step == 0 else nullcontext():
            if form == "plain":
                loss = CRITERION(model(x, lengths), y)
                loss.backward()
                optimizer.step()
            else:
                loss = optimizer.step(lambda: CRITERION(model(x, lengths), y))
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
