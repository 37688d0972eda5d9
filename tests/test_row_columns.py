"""Columns of an embedding's rows answer as the same columns with the gradients formed."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddpnopt.columns import DenseColumns, RowColumns, gathered, over_batches, over_uses
from ddpnopt.inverse import Inverse, Rotated, Separable


def of_list(R: int, B: int, S: int, height: int, width: int) -> tuple[RowColumns, DenseColumns]:
    """Columns of B samples that read S rows each, and the same by one-hot products."""
    rows, values = torch.randint(height, (B, S)), torch.randn(R, B, S, width)
    samples = torch.arange(B)[:, None].expand(B, S)
    one_hot = torch.nn.functional.one_hot(rows, height).to(values.dtype)
    found = gathered(samples.flatten(), rows.flatten(), values.flatten(1, 2), B, height)
    return found, DenseColumns(torch.einsum("bsv,rbsd->rbvd", one_hot, values))


def spd(n: int) -> Tensor:
    root = torch.randn(n, n)
    return root @ root.T + torch.eye(n)


INVERSES: dict[str, Callable[[int, int], Inverse]] = {
    "identity": lambda V, d: Separable(scale=0.3),
    "separable": lambda V, d: Separable(spd(V), spd(d), 2.0),
    "diagonal rows": lambda V, d: Separable(torch.rand(V) + 0.1, spd(d), 2.0),
    "diagonal": lambda V, d: Rotated(torch.rand(V, d) + 0.1),
    "half rotated": lambda V, d: Rotated(torch.rand(V, d) + 0.1, None, torch.linalg.qr(spd(d))[0]),
    "rotated": lambda V, d: Rotated(torch.rand(V, d) + 0.1, torch.linalg.qr(spd(V))[0], torch.linalg.qr(spd(d))[0]),
}


@pytest.mark.parametrize("kind", INVERSES)
@pytest.mark.parametrize("denser", [0, 1 << 60])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_every_answer_is_that_of_dense_columns(
    kind: str, denser: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddpnopt.columns.rows.DENSER", denser)
    monkeypatch.setattr("ddpnopt.columns.rows.CHUNK", chunk)
    for R, B, S in [(1, 4, 1), (3, 5, 4), (2, 1, 6)]:
        columns, dense = of_list(R, B, S, 7, 3)
        inverse, w, g = INVERSES[kind](7, 3), torch.randn(R, B), torch.randn(7, 3)
        close = torch.testing.assert_close
        close(columns.dense().values, dense.values)
        close(columns.weighted(w), dense.weighted(w))
        close(columns.directional(g), dense.directional(g))
        close(columns.gram(inverse), dense.gram(inverse))
        close(columns.sample_gram(inverse), dense.sample_gram(inverse))
        close(columns.solve_weighted(inverse, w), dense.solve_weighted(inverse, w))
        close(columns.combined(w).dense().values, dense.combined(w).values)
        close(columns.first(1).dense().values, dense.first(1).values)
        close(columns.absent(2).dense().values, dense.absent(2).values)
        close(columns.absent(2).gram(inverse), dense.absent(2).gram(inverse))


@settings(max_examples=30, deadline=None)
@given(
    R=st.integers(1, 3), B=st.integers(1, 6), S=st.integers(1, 5), V=st.integers(1, 9), d=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_moments_are_those_of_dense_columns(R: int, B: int, S: int, V: int, d: int, seed: int) -> None:
    torch.manual_seed(seed)
    columns, dense = of_list(R, B, S, V, d)
    S_diagonal, A = columns.factors()
    torch.testing.assert_close(S_diagonal, dense.factors()[0].diagonal())
    torch.testing.assert_close(A, dense.factors()[1])
    for out in (None, torch.rand(V), torch.linalg.qr(spd(V))[0]):
        fan_in = torch.linalg.qr(spd(d))[0]
        torch.testing.assert_close(columns.squares(out, fan_in), dense.squares(out, fan_in))
        torch.testing.assert_close(columns.squares(out, None), dense.squares(out, None))


def test_uses_add_up_and_batches_stand_side_by_side() -> None:
    (one, one_dense), (other, other_dense) = of_list(2, 4, 3, 7, 3), of_list(2, 4, 2, 7, 3)
    summed, beside = over_uses([one, other]), over_batches([one, other])
    assert isinstance(summed, RowColumns)
    assert isinstance(beside, RowColumns)
    torch.testing.assert_close(summed.dense().values, one_dense.values + other_dense.values)
    torch.testing.assert_close(beside.dense().values, torch.cat([one_dense.values, other_dense.values], 1))
    mixed = over_uses([one, other_dense])
    torch.testing.assert_close(mixed.dense().values, one_dense.values + other_dense.values)
    mixed = over_batches([one, other_dense])
    torch.testing.assert_close(mixed.dense().values, torch.cat([one_dense.values, other_dense.values], 1))
