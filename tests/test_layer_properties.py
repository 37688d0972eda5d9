"""Each fast rule, over whatever its module can be set to, against one autograd call per sample."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ddpnopt.conditions import redrawn, rng_states
from ddpnopt.layers import Block, Call, rule_for
from ddpnopt.layers.base import LayerRule
from ddpnopt.layers.generic import GenericRule

quick = settings(max_examples=25, deadline=None)
DTYPES = st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16])
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2}
SEEDS = st.integers(0, 2**31)
FROZEN = st.sampled_from(["nothing", "weights", "biases"])
LAYOUTS = st.sampled_from(["contiguous", "strided", "transposed"])


@dataclass(frozen=True)
class Setting:
    """A module and one call of it; ``dims``: of each tensor in ``args``, its batch dimension (``None``: none)."""

    module: nn.Module
    args: tuple[Any, ...]
    dims: tuple[int | None, ...] = (0,)
    kwargs: dict[str, Any] = field(default_factory=dict)
    frozen: str = "nothing"
    dtype: torch.dtype = torch.float64
    seen: tuple[int, ...] = ()  # outputs that get a gradient; all, if none is named


def leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        return torch.stack([x, x], -1)[..., 0]
    return x.transpose(0, -1).contiguous().transpose(0, -1) if layout == "transposed" else x


def shaken(module: nn.Module) -> nn.Module:
    """With parameters and buffers that are not those of initialisation."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.2)
    return module


def blocks_of(setting: Setting, rule: LayerRule) -> list[Block]:
    own = rule.parameters(setting.module)
    kept = {
        n: p for n, p in own.items() if setting.frozen == "nothing" or ("bias" in n) == (setting.frozen == "weights")
    }
    blocks = [Block(names, tuple(kept[n] for n in names)) for names in rule.blocks(setting.module, list(kept))]
    assert sorted(n for block in blocks for n in block.names) == sorted(kept)
    return blocks


def check(setting: Setting, R: int, *, generic: bool = True) -> None:
    """Columns of the fast rule, and of the generic one, are the gradients of single samples run by themselves."""
    module, rule = setting.module.to(setting.dtype), rule_for(setting.module)
    assert not isinstance(rule, GenericRule)
    own = rule.parameters(module)
    rng = rng_states(module)
    outputs = leaves(module(*setting.args, **setting.kwargs))
    given = rule.batch_dims(module).outputs
    dims = [given[min(i, len(given) - 1)] for i in range(len(outputs))]
    wide = torch.promote_types(setting.dtype, torch.float32)
    seen = setting.seen or tuple(range(len(outputs)))
    v = [torch.randn(R, *out.shape).to(setting.dtype).to(wide) if i in seen else None for i, out in enumerate(outputs)]
    exact = module.to(wide)  # the same numbers; autograd then does not round
    expected = [
        [
            single(exact, setting, own, [None if c is None else c[r] for c in v], dims, b, wide)
            for b in range(outputs[0].shape[dims[0]])
        ]
        for r in range(R)
    ]
    module.to(setting.dtype)
    moved = [None if c is None else c.movedim(dim + 1, 1) for c, dim in zip(v, dims, strict=True)]
    for tried in [rule, GenericRule()] if generic and setting.dtype == wide else [rule]:
        blocks = blocks_of(setting, tried)
        with torch.no_grad(), redrawn(module, rng):
            found = tried.columns(module, blocks, Call(setting.args, setting.kwargs, moved))
        for block, columns in zip(blocks, found, strict=True):
            wanted = torch.stack(
                [torch.stack([block.matrix([g[n] for n in block.names]) for g in row]) for row in expected]
            )
            values = columns.dense().values
            assert values.dtype == wide
            scale = float(wanted.abs().max().clamp_min(1.0))
            tolerance = TOLERANCE[setting.dtype] * scale
            torch.testing.assert_close(values, wanted, rtol=TOLERANCE[setting.dtype], atol=tolerance)


def single(
    module: nn.Module,
    setting: Setting,
    own: dict[str, nn.Parameter],
    v: Sequence[Tensor | None],
    dims: Sequence[int],
    b: int,
    wide: torch.dtype,
) -> dict[str, Tensor]:
    """Gradients of one sample, run alone."""

    def alone(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x if dim is None else x.narrow(dim, b, 1)
        return x.to(wide) if x.is_floating_point() else x

    args = torch.utils._pytree.tree_map(lambda x: x, setting.args)
    flat, spec = torch.utils._pytree.tree_flatten(args)
    args = torch.utils._pytree.tree_unflatten([alone(x, dim) for x, dim in zip(flat, setting.dims, strict=True)], spec)
    kwargs = {
        n: alone(x, 0 if n == "key_padding_mask" or n == "per_sample_weights" else None)
        for n, x in setting.kwargs.items()
    }
    outputs = leaves(module(*args, **kwargs))
    reached = [(out, c.narrow(dim, b, 1)) for out, c, dim in zip(outputs, v, dims, strict=True) if c is not None]
    gradients = torch.autograd.grad(
        [out for out, _ in reached], list(own.values()), [c for _, c in reached], materialize_grads=True
    )
    return dict(zip(own, gradients, strict=True))


@quick
@given(
    shape=st.lists(st.integers(1, 3), max_size=2), bias=st.booleans(), layout=LAYOUTS, frozen=FROZEN, dtype=DTYPES,
    R=st.integers(1, 2), B=st.integers(1, 4), seed=SEEDS,
)  # fmt: skip
def test_linear(
    shape: list[int], bias: bool, layout: str, frozen: str, dtype: torch.dtype, R: int, B: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x = laid_out(torch.randn(B, *shape, 3).to(dtype), layout)
    check(Setting(nn.Linear(3, 2, bias), (x,), frozen=frozen if bias else "nothing", dtype=dtype), R)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@quick
@given(
    places=st.integers(1, 3), groups=st.integers(1, 2), per_in=st.integers(1, 2), per_out=st.integers(1, 2),
    kernel=st.integers(1, 3), stride=st.integers(1, 3), padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    mode=st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]), dilation=st.integers(1, 2),
    bias=st.booleans(), layout=st.sampled_from(["contiguous", "strided", "transposed", "channels last"]), frozen=FROZEN,
    dtype=DTYPES, R=st.integers(1, 2), B=st.integers(1, 3), seed=SEEDS,
)  # fmt: skip
def test_convolutions(
    places: int, groups: int, per_in: int, per_out: int, kernel: int, stride: int, padding: Any, mode: Any,
    dilation: int, bias: bool, layout: str, frozen: str, dtype: torch.dtype, R: int, B: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[places - 1]
    stride = 1 if padding == "same" else stride
    module = kind(groups * per_in, groups * per_out, kernel, stride, padding, dilation, groups, bias, mode)
    x = torch.randn(B, groups * per_in, *[5, 6, 5][:places]).to(dtype)
    if layout == "channels last" and places > 1:
        x = x.contiguous(memory_format=torch.channels_last if places == 2 else torch.channels_last_3d)
    x = laid_out(x, layout)
    check(Setting(module, (x,), frozen=frozen if bias else "nothing", dtype=dtype), R)


@quick
@given(
    places=st.integers(1, 3), groups=st.integers(1, 2), per_in=st.integers(1, 2), per_out=st.integers(1, 2),
    kernel=st.integers(1, 3), stride=st.integers(1, 3), padding=st.integers(0, 2), more=st.integers(0, 2),
    dilation=st.integers(1, 3), bias=st.booleans(), layout=LAYOUTS, frozen=FROZEN, dtype=DTYPES, sized=st.booleans(),
    R=st.integers(1, 2), B=st.integers(1, 3), seed=SEEDS,
)  # fmt: skip
def test_transposed_convolutions(
    places: int, groups: int, per_in: int, per_out: int, kernel: int, stride: int, padding: int, more: int,
    dilation: int, bias: bool, layout: str, frozen: str, dtype: torch.dtype, sized: bool, R: int, B: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[places - 1]
    more = min(more, max(stride, dilation) - 1)
    module = kind(groups * per_in, groups * per_out, kernel, stride, padding, more, groups, bias, dilation)
    x = laid_out(torch.randn(B, groups * per_in, *[4, 3, 4][:places]).to(dtype), layout)
    shortest = (min(x.shape[2:]) - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
    assume(shortest > 0)
    kwargs = {}
    if sized:  # the call, not the module, says how long the output is
        module.output_padding = (0,) * places
        longer = dilation * (kernel - 1) - 2 * padding + min(more, stride - 1) + 1
        kwargs["output_size"] = [(n - 1) * stride + longer for n in x.shape[2:]]
    setting = Setting(module, (x,), kwargs=kwargs, frozen=frozen if bias else "nothing", dtype=dtype)
    check(setting, R, generic=not sized)


@quick
@given(
    kind=st.sampled_from(["layer", "rms", "group", "instance", "tracked", "batch"]), places=st.integers(0, 2),
    own=st.integers(1, 2), eps=st.sampled_from([None, 1e-5, 0.1]), bias=st.booleans(), layout=LAYOUTS, frozen=FROZEN,
    dtype=DTYPES, R=st.integers(1, 2), B=st.integers(2, 4), seed=SEEDS,
)  # fmt: skip
def test_normalisations(
    kind: str, places: int, own: int, eps: float | None, bias: bool, layout: str, frozen: str, dtype: torch.dtype,
    R: int, B: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    positions, some = [3, 2][:places], 1e-5 if eps is None else eps
    module: nn.Module
    if kind in ("layer", "rms"):
        shape = [3, 4][2 - own :]
        x = torch.randn(B, *positions, *shape)
        module = nn.RMSNorm(shape, eps=eps) if kind == "rms" else nn.LayerNorm(shape, some, bias=bias)
    elif kind == "group":
        x, module = torch.randn(B, 4, *positions), nn.GroupNorm(2, 4, some)
    elif kind == "batch":
        x = torch.randn(B, 4, *positions)
        module = (nn.BatchNorm1d if places < 2 else nn.BatchNorm2d)(4, some).eval()
    else:
        x = torch.randn(B, 4, *(positions or [3]))
        module = (nn.InstanceNorm1d if places < 2 else nn.InstanceNorm2d)(
            4, some, affine=True, track_running_stats=kind == "tracked"
        )
        module.train(kind == "instance")
    x = laid_out(x.to(dtype), layout)
    shaken(module)
    if len(list(module.parameters())) == 1:
        frozen = "nothing"
    check(Setting(module, (x,), frozen=frozen, dtype=dtype), R)


@quick
@given(
    shape=st.lists(st.integers(1, 4), max_size=2), V=st.integers(1, 6), padding=st.booleans(), layout=LAYOUTS,
    dtype=DTYPES, integers=st.sampled_from([torch.int64, torch.int32]), R=st.integers(1, 2), B=st.integers(1, 4),
    seed=SEEDS,
)  # fmt: skip
def test_embeddings(
    shape: list[int],
    V: int,
    padding: bool,
    layout: str,
    dtype: torch.dtype,
    integers: torch.dtype,
    R: int,
    B: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    module = nn.Embedding(V, 3, padding_idx=int(torch.randint(V, ())) if padding else None)
    check(Setting(module, (laid_out(torch.randint(V, (B, *shape)).to(integers), layout),), dtype=dtype), R)


@quick
@given(
    S=st.integers(1, 5), V=st.integers(1, 6), mode=st.sampled_from(["sum", "mean", "max"]), padding=st.booleans(),
    weighted=st.booleans(), layout=LAYOUTS, R=st.integers(1, 2), B=st.integers(1, 4), seed=SEEDS,
)  # fmt: skip
def test_embedding_bags(
    S: int, V: int, mode: str, padding: bool, weighted: bool, layout: str, R: int, B: int, seed: int
) -> None:
    torch.manual_seed(seed)
    module = nn.EmbeddingBag(V, 3, mode=mode, padding_idx=int(torch.randint(V, ())) if padding else None)
    kwargs = {"per_sample_weights": torch.randn(B, S)} if weighted and mode == "sum" else {}
    x = laid_out(torch.randint(V, (B, S)), layout)
    check(Setting(module, (x,), kwargs=kwargs), R, generic=False)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@quick
@given(
    kind=st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]), S=st.integers(1, 4), layers=st.integers(1, 2), two=st.booleans(),
    bias=st.booleans(), first=st.booleans(), given_state=st.booleans(), projected=st.booleans(), relu=st.booleans(),
    seen=st.sampled_from([(0,), (1,), (0, 1)]), frozen=FROZEN, layout=LAYOUTS,
    dtype=st.sampled_from([torch.float64, torch.float32]), R=st.integers(1, 2), B=st.integers(1, 3), seed=SEEDS,
)  # fmt: skip
def test_recurrent_layers(
    kind: Callable[..., nn.RNNBase], S: int, layers: int, two: bool, bias: bool, first: bool, given_state: bool,
    projected: bool, relu: bool, seen: tuple[int, ...], frozen: str, layout: str, dtype: torch.dtype, R: int, B: int,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    more: dict[str, Any] = {"proj_size": 2} if projected and kind is nn.LSTM else {}
    more |= {"nonlinearity": "relu"} if relu and kind is nn.RNN else {}
    module = kind(3, 4, num_layers=layers, bias=bias, batch_first=first, bidirectional=two, **more)
    x = laid_out(torch.randn(*((B, S) if first else (S, B)), 3).to(dtype), layout)
    args: tuple[Any, ...] = (x,)
    dims: tuple[int | None, ...] = (0 if first else 1, 1, 1)
    if given_state:
        h, c = (torch.randn(layers * (1 + two), B, width).to(dtype) for width in (more.get("proj_size", 4), 4))
        args = (x, (h, c) if kind is nn.LSTM else h)
    dims = dims[: len(leaves(args))]
    check(Setting(module, args, dims, {}, frozen if bias else "nothing", dtype, seen), R, generic=False)


@quick
@given(
    kind=st.sampled_from([nn.RNNCell, nn.LSTMCell, nn.GRUCell]), bias=st.booleans(), given_state=st.booleans(),
    frozen=FROZEN, dtype=st.sampled_from([torch.float64, torch.float32]), R=st.integers(1, 2),
    B=st.integers(1, 3), seed=SEEDS,
)  # fmt: skip
def test_recurrent_cells(
    kind: type[nn.RNNCellBase],
    bias: bool,
    given_state: bool,
    frozen: str,
    dtype: torch.dtype,
    R: int,
    B: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    x, h, c = (torch.randn(B, width).to(dtype) for width in (3, 4, 4))
    state = (h, c) if kind is nn.LSTMCell else h
    args: tuple[Any, ...] = (x, state) if given_state else (x,)
    setting = Setting(kind(3, 4, bias=bias), args, (0,) * len(leaves(args)), {}, frozen if bias else "nothing", dtype)  # type: ignore[call-arg]
    check(setting, R, generic=given_state)


MASKS = st.sampled_from([None, "bool", "float", "causal", "padding"])


@quick
@given(
    crossed=st.sampled_from(["self", "memory", "all"]), sizes=st.booleans(), bias=st.booleans(), first=st.booleans(),
    learnt=st.booleans(), zero=st.booleans(), weights=st.booleans(), averaged=st.booleans(), mask=MASKS, frozen=FROZEN,
    layout=LAYOUTS, dtype=DTYPES, R=st.integers(1, 2), B=st.integers(1, 3), seed=SEEDS,
)  # fmt: skip
def test_attention(
    crossed: str, sizes: bool, bias: bool, first: bool, learnt: bool, zero: bool, weights: bool, averaged: bool,
    mask: str | None, frozen: str, layout: str, dtype: torch.dtype, R: int, B: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    L, S = 3, 3 if crossed == "self" else 4
    kdim, vdim = (5, 3) if sizes and crossed == "all" else (4, 4)
    module = nn.MultiheadAttention(4, 2, 0.0, bias, learnt, zero, kdim, vdim, first)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    query, key, value = (
        laid_out(torch.randn(*((B, n) if first else (n, B)), width).to(dtype), layout)
        for n, width in ((L, 4), (S, kdim), (S, vdim))
    )
    if crossed == "self":
        key = value = query
    elif crossed == "memory":
        value = key
    kwargs: dict[str, Any] = {"need_weights": weights, "average_attn_weights": averaged}
    if mask == "bool":
        kwargs["attn_mask"] = (torch.rand(L, S) < 0.4) & (torch.arange(S) > 0)
    elif mask == "float":
        kwargs["attn_mask"] = torch.randn(L, S).to(dtype)
    elif mask == "padding":
        kwargs["key_padding_mask"] = (torch.rand(B, S) < 0.4) & (torch.arange(S) > 0)
    elif mask == "causal" and not (learnt or zero):
        kwargs |= {"attn_mask": torch.triu(torch.full((L, S), -math.inf), 1).to(dtype), "is_causal": True}
    dim = 0 if first else 1
    frozen = frozen if bias and not learnt else "nothing"
    setting = Setting(module, (query, key, value), (dim, dim, dim), kwargs, frozen, dtype)
    check(setting, R, generic=False)


Redraw = Callable[[], Setting]
REDRAWN: dict[str, Redraw] = {
    "recurrent": lambda: Setting(nn.LSTM(3, 4, 3, dropout=0.5, bidirectional=True), (torch.randn(4, 5, 3),), (1,)),
    "attention": lambda: Setting(nn.MultiheadAttention(4, 2, 0.5), (torch.randn(4, 5, 4),) * 3, (1,) * 3),
}


@pytest.mark.parametrize("kind", REDRAWN)
def test_masks_are_drawn_again(kind: str) -> None:
    """With dropout inside a sample cannot run alone; what its outputs in the batch pull back can be told."""
    setting = REDRAWN[kind]()
    module, rule = setting.module, rule_for(setting.module)
    assert rule.draws(module)
    assert not rule.draws(module.eval())
    rng = rng_states(module.train())
    out = leaves(module(*setting.args))[0]
    v = torch.randn_like(out)
    own = rule.parameters(module)
    blocks = [Block(names, tuple(own[n] for n in names)) for names in rule.blocks(module, list(own))]
    others = [None] * (len(leaves(module(*setting.args))) - 1)
    with torch.no_grad(), redrawn(module, rng):
        found = rule.columns(module, blocks, Call(setting.args, {}, [v[None].transpose(1, 2), *others]))
    for b in range(5):
        gradients = torch.autograd.grad(out[:, b], list(own.values()), v[:, b], retain_graph=True)
        named = dict(zip(own, gradients, strict=True))
        for block, columns in zip(blocks, found, strict=True):
            wanted = block.matrix([named[n] for n in block.names])
            torch.testing.assert_close(columns.dense().values[0, b], wanted)
