"""Columns: both forms answer as dense algebra does, and directional is the adjoint of weighted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpnopt.columns import (
    Columns,
    DenseColumns,
    Moment,
    OuterColumns,
    ScaledColumns,
    over_batches,
    over_uses,
)
from ddpnopt.columns.base import symmetric_product
from ddpnopt.inverse import Inverse, LowRank, Rotated, Separable, sandwich, times

SHAPES = [(1, 4, 1), (3, 4, 1), (1, 4, 5), (2, 3, 2), (1, 12, 2)]  # R, B, S
OUT, FAN_IN = 3, 6


def outer(R: int, B: int, S: int) -> OuterColumns:
    return OuterColumns(torch.randn(R, B, S, OUT), torch.randn(B, S, FAN_IN))


def spd(n: int) -> Tensor:
    root = torch.randn(n, n)
    return root @ root.T + torch.eye(n)


def low_rank(n: int, r: int) -> LowRank:
    return LowRank(torch.linalg.qr(torch.randn(n, r))[0], torch.rand(r) - 0.5, torch.tensor(0.7))


def matrix(side: LowRank) -> Tensor:
    """``rest I + basis diag(weights) basis'``, written out."""
    return side.rest * torch.eye(len(side.basis)) + side.basis @ torch.diag(side.weights) @ side.basis.T


def inverses() -> dict[str, Inverse]:
    torch.manual_seed(7)
    basis_out, basis_in = torch.linalg.qr(spd(OUT))[0], torch.linalg.qr(spd(FAN_IN))[0]
    return {
        "identity": Separable(),
        "scaled": Separable(scale=0.3),
        "separable": Separable(spd(OUT), spd(FAN_IN)),
        "one diagonal side": Separable(torch.rand(OUT) + 0.1, spd(FAN_IN), 2.0),
        "low rank": Separable(low_rank(OUT, 1), low_rank(FAN_IN, 2), 0.5),
        "low rank out": Separable(low_rank(OUT, 2), spd(FAN_IN)),
        "low rank in": Separable(spd(OUT), low_rank(FAN_IN, 2), 3.0),
        "diagonal": Rotated(torch.rand(OUT, FAN_IN) + 0.1),
        "rotated": Rotated(torch.rand(OUT, FAN_IN) + 0.1, basis_out, basis_in),
        "half rotated": Rotated(torch.rand(OUT, FAN_IN) + 0.1, None, basis_in),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", inverses())
def test_answers_are_dense_algebra(shape: tuple[int, int, int], kind: str) -> None:
    R, B, S = shape
    columns, inverse = outer(R, B, S), inverses()[kind]
    U = torch.einsum("rbso,bsi->rboi", columns.v, columns.x).reshape(R * B, -1)
    M_inverse = torch.linalg.inv(inverse.to_dense(OUT, FAN_IN))
    w, g = torch.randn(R, B), torch.randn(OUT, FAN_IN)
    blocks = (U @ M_inverse @ U.T).view(R, B, R, B).diagonal(dim1=1, dim2=3).permute(2, 0, 1)
    scale = torch.rand(B) + 0.5
    unscaled = OuterColumns(columns.v / scale[:, None, None], columns.x)
    forms: list[Columns] = [columns, columns.dense(), ScaledColumns(unscaled, scale)]
    forms += [ScaledColumns(unscaled.dense(), scale), ScaledColumns(unscaled, scale / 2).multiplied(2 * torch.ones(B))]
    for form in forms:
        close = torch.testing.assert_close
        close(form.weighted(w).flatten(), U.T @ w.flatten())
        close(form.directional(g).flatten(), U @ g.flatten())
        close((form.weighted(w) * g).sum(), (w * form.directional(g)).sum())
        close(form.gram(inverse), U @ M_inverse @ U.T)
        close(form.sample_gram(inverse), blocks)
        close(form.solve_weighted(inverse, w).flatten(), M_inverse @ U.T @ w.flatten())
        control = [torch.randn(OUT, FAN_IN - 1), torch.randn(OUT, 1)]
        solved = (M_inverse @ U.T @ w.flatten()).view(OUT, FAN_IN)
        close(form.solve_weighted_and(inverse, w, g, 0.7), solved + 0.7 * g)
        for kept in (1.0, 0.8):
            moved = kept * torch.cat(control, 1) - 0.3 * solved
            form.move_(control, inverse, w, -0.3, kept)
            close(torch.cat(control, 1), moved)
        close(form.combined(w).weighted(torch.ones(1, B)), form.weighted(w))
        close(form.first(1).directional(g), form.directional(g)[:1])


@pytest.mark.parametrize("shape", SHAPES)
def test_squares_are_second_moments_in_the_basis(shape: tuple[int, int, int]) -> None:
    columns = outer(*shape)
    out, fan_in = torch.linalg.qr(spd(OUT))[0], torch.linalg.qr(spd(FAN_IN))[0]
    expected = (out.T @ columns.dense().values @ fan_in).square().sum((0, 1)) / columns.batch
    torch.testing.assert_close(columns.squares(out, fan_in), expected)
    torch.testing.assert_close(columns.dense().squares(out, fan_in), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_carry_the_trace(shape: tuple[int, int, int]) -> None:
    columns = outer(*shape)
    S, A = columns.dense().factors()
    torch.testing.assert_close(S.trace() * A.trace(), columns.dense().values.square().sum() / columns.batch)
    scale = torch.rand(shape[1]) + 0.5
    scaled = ScaledColumns(OuterColumns(columns.v / scale[:, None, None], columns.x), scale)
    torch.testing.assert_close(scaled.factors(), columns.factors())
    torch.testing.assert_close(scaled.squares(None, None), columns.squares(None, None))
    S, A = columns.factors()
    if shape[2] == 1:
        torch.testing.assert_close(S, torch.einsum("rbso,rbsp->op", columns.v, columns.v) / columns.batch)
    torch.testing.assert_close(A, torch.einsum("bsi,bsj->ij", columns.x, columns.x) / columns.batch)


def test_a_wide_side_keeps_its_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = outer(1, 4, 1)
    full = columns.factors()
    monkeypatch.setattr("ddpnopt.columns.base.WIDEST", 4)
    S, A = columns.factors()
    torch.testing.assert_close(S, full[0])
    torch.testing.assert_close(A, full[1].diagonal())


@pytest.mark.parametrize(("shape", "kind"), [((2, 4, 1), "rotated"), ((2, 6, 3), "separable")])
def test_chunks_do_not_change_the_gram(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], kind: str) -> None:
    columns, inverse = outer(*shape), inverses()[kind]
    whole = columns.dense().gram(inverse)
    monkeypatch.setattr(OuterColumns, "dense", None)  # gradients are formed some rows at a time
    for chunk in (1, 150, 1 << 18):
        monkeypatch.setattr("ddpnopt.columns.base.CHUNK", chunk)
        torch.testing.assert_close(columns.gram(inverse), whole)


def test_blocks_do_not_change_a_symmetric_product(monkeypatch: pytest.MonkeyPatch) -> None:
    root, middle, other = torch.randn(7, 5), spd(5), torch.randn(7, 2)
    whole = root @ middle @ root.T
    for rows in (1, 2, 3, 7, 8):
        monkeypatch.setattr("ddpnopt.columns.base.ROWS", rows)
        torch.testing.assert_close(symmetric_product((root, root @ middle)), whole)
        torch.testing.assert_close(symmetric_product((root, root), solve=lambda some: some @ middle), whole)
        both = symmetric_product((root, root @ middle), (other, other))
        torch.testing.assert_close(both, whole * (other @ other.T))


@pytest.mark.parametrize("kind", ["separable", "low rank in", "rotated"])
def test_blocks_do_not_change_the_gram_of_gradients(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    columns, inverse = outer(2, 4, 3).dense(), inverses()[kind]
    whole = columns.gram(inverse)
    monkeypatch.setattr("ddpnopt.columns.base.ROWS", 3)
    torch.testing.assert_close(columns.gram(inverse), whole)


def test_moments_are_factors_not_multiplied_out() -> None:
    for columns in (outer(2, 4, 3), outer(2, 4, 3).dense(), ScaledColumns(outer(2, 4, 3), torch.rand(4))):
        for moment, factor in zip(columns.moments(), columns.factors(), strict=True):
            assert isinstance(moment, Moment)
            values = torch.randn(moment.side, 2)
            torch.testing.assert_close(moment.times(values), factor @ values)
            torch.testing.assert_close(moment.trace(), factor.trace())


def test_low_rank_sides_are_the_matrices_they_stand_for() -> None:
    out, fan_in, values = low_rank(OUT, 2), low_rank(FAN_IN, 3), torch.randn(2, OUT, FAN_IN)
    torch.testing.assert_close(times(values, fan_in), values @ matrix(fan_in))
    torch.testing.assert_close(sandwich(out, values, fan_in), matrix(out).T @ values @ matrix(fan_in))


def test_the_update_takes_the_solves_of_its_own_inverse() -> None:
    columns, w = outer(1, 4, 1), torch.randn(1, 4)
    for inverse in (Separable(spd(OUT), spd(FAN_IN)), Separable(spd(OUT), spd(FAN_IN))):
        columns.gram(inverse)
        torch.testing.assert_close(columns.solve_weighted(inverse, w), inverse.solve(columns.weighted(w)))


def test_half_precision_parameters_are_rounded_once() -> None:
    columns, w, inverse = outer(1, 2, 1), torch.randn(1, 2), Separable(spd(OUT), spd(FAN_IN))
    start = torch.randn(OUT, FAN_IN).bfloat16()
    for form in (columns, columns.dense()):
        control = [start.clone()]
        form.move_(control, inverse, w, -0.3, 0.9)
        expected = 0.9 * start.double() - 0.3 * inverse.solve(columns.weighted(w))
        assert (control[0].double() - expected).abs().max() <= 0.51 * 2**-7 * expected.abs().max()


def test_uses_add_up_and_batches_stand_side_by_side() -> None:
    one, other, g = outer(2, 4, 1), outer(2, 4, 3), torch.randn(OUT, FAN_IN)
    for pair in ((one, other), (one.dense(), other)):
        torch.testing.assert_close(over_uses(pair).directional(g), one.directional(g) + other.directional(g))
        both = torch.cat([one.directional(g), other.directional(g)], 1)
        torch.testing.assert_close(over_batches(pair).directional(g), both)
    assert over_uses([one]) is one
    assert over_batches([one]) is one


@settings(max_examples=40, deadline=None)
@given(
    R=st.integers(1, 3), B=st.integers(1, 9), S=st.integers(1, 4), out=st.integers(1, 5), fan_in=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_gram_is_symmetric_and_positive_for_any_shape(R: int, B: int, S: int, out: int, fan_in: int, seed: int) -> None:
    torch.manual_seed(seed)
    columns = OuterColumns(torch.randn(R, B, S, out), torch.randn(B, S, fan_in))
    for inverse in (Separable(spd(out), spd(fan_in)), Rotated(torch.rand(out, fan_in) + 0.1)):
        gram = columns.gram(inverse)
        torch.testing.assert_close(gram, columns.dense().gram(inverse))
        torch.testing.assert_close(gram, gram.T)
        assert torch.linalg.eigvalsh(gram)[0] > -1e-9 * gram.norm()


def test_dense_columns_of_one_sample() -> None:
    values = torch.randn(1, 1, OUT, FAN_IN)
    gram = DenseColumns(values).gram(Separable())
    torch.testing.assert_close(gram, values.square().sum().view(1, 1))
