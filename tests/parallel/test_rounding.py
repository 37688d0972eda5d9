"""Float32 gradients go between ranks in 18 bits: Gram matrices and steps are those of whole numbers to rounding."""

import functools
from typing import Any

import pytest
import torch
from launch import launch
from networks import pictures
from programs import KRONECKER, PROGRAMS, batches
from torch import Tensor, distributed, nn

from ddpnopt import Batch, DDPNOpt, linalg
from ddpnopt.columns import DenseColumns, SpreadColumns
from ddpnopt.columns.rounded import packed, unpacked
from ddpnopt.experiments.paper.networks import cnn
from ddpnopt.inverse import Inverse, Rotated, Separable
from ddpnopt.ranks import Ranks

COUNTS, SHAPE = (5, 7, 0), (2, 12, 9, 41)  # samples of each rank; R, B, out, fan_in
KINDS = ["plain", "tiny", "uneven", "spikes", "dependent"]
LOST = {"rounded": 1e-5, "whole": 2e-6, "float64": 1e-14}  # of an inner product, over the rows' lengths


def gradients(kind: str) -> Tensor:
    """``[R, B, out, fan_in]`` in float64, all of them float32 numbers."""
    torch.manual_seed(0)
    values = torch.randn(SHAPE, dtype=torch.float32)
    if kind == "tiny":
        values *= 1e-9
    if kind == "uneven":
        values *= torch.logspace(-12, 6, SHAPE[1], dtype=torch.float32)[:, None, None]
    if kind == "spikes":
        for b in range(SHAPE[1]):
            values[:, b, b % 9, 3 * b] = 1e4
    if kind == "dependent":
        mixed = torch.randn(SHAPE[0] * SHAPE[1], 4, dtype=torch.float32)
        values = torch.einsum("nk,koi->noi", mixed, values[0, :4]).view(SHAPE)
    return values.double()


def inverses(dtype: torch.dtype) -> dict[str, Inverse]:
    torch.manual_seed(1)
    roots = [torch.randn(n, n, dtype=torch.float32) for n in SHAPE[2:]]
    squares = (root @ root.T / len(root) + 0.1 * torch.eye(len(root), dtype=root.dtype) for root in roots)
    out, fan_in = (linalg.symmetrise(square) for square in squares)
    diagonal = torch.rand(SHAPE[2:], dtype=torch.float32) + 0.1
    return {
        "identity": Separable(),
        "separable": Separable(out.to(dtype), fan_in.to(dtype), 0.5),
        "diagonal": Rotated(diagonal.to(dtype)),
    }


FORMS = {"rounded": (torch.float32, True), "whole": (torch.float32, False), "float64": (torch.float64, True)}


def grams(rank: int) -> dict[tuple[str, str, str], tuple[Tensor, int]]:
    """Gram matrices, and the bytes sent for each."""
    ranks = Ranks(distributed.group.WORLD)
    found = {}
    for form, (dtype, rounded) in FORMS.items():
        for kind in KINDS:
            own = DenseColumns(gradients(kind).to(dtype).split(COUNTS, 1)[rank])
            for name, inverse in inverses(dtype).items():
                ranks.traffic.bytes = 0
                gram = SpreadColumns(own, ranks, COUNTS, rounded).gram(inverse)
                found[form, kind, name] = gram, ranks.traffic.bytes
    return found


def trained(dtype: torch.dtype, coupling: Batch, rank: int = 0, size: int = 1) -> Tensor:
    """How far all weights have gone after some steps, from the same numbers in either precision."""
    torch.manual_seed(0)
    model, criterion = pictures().float().to(dtype), nn.CrossEntropyLoss()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = DDPNOpt(model, curvature=KRONECKER, coupling=coupling)
    for x, y in batches(PROGRAMS["pictures, kronecker"])[:4]:
        own, target = (part.tensor_split(size)[rank] for part in (x.float().to(dtype), y))
        optimizer.zero_grad()
        criterion(model(own), target).backward()
        optimizer.step()
    return (nn.utils.parameters_to_vector(model.parameters()).detach() - before).double()


def on_a_rank(rank: int, size: int) -> dict[str, Any]:
    moved = {rounded: trained(torch.float32, Batch(rounded=rounded), rank, size) for rounded in (True, False)}
    return {"grams": grams(rank), "moved": moved}


@functools.cache
def ranks() -> list[dict[str, Any]]:
    return launch(len(COUNTS), on_a_rank)


def wanted(kind: str, name: str) -> Tensor:
    """The Gram matrix in float64."""
    return DenseColumns(gradients(kind)).gram(inverses(torch.float64)[name])


def error(gram: Tensor, exact: Tensor) -> float:
    """The largest of an inner product, over the lengths of its rows."""
    length = exact.diagonal().sqrt()
    return float(((gram.double() - exact) / length / length[:, None]).abs().max())


@pytest.mark.parametrize("name", inverses(torch.float64))
@pytest.mark.parametrize("kind", KINDS)
def test_gram_matrices_of_rounded_gradients(kind: str, name: str) -> None:
    exact = wanted(kind, name)
    of = {form: [rank["grams"][form, kind, name] for rank in ranks()] for form in FORMS}
    for form, found in of.items():
        assert all(torch.equal(gram, found[0][0]) for gram, _ in found)
        assert error(found[0][0], exact) < LOST[form]
    assert of["rounded"][0][1] < 0.7 * of["whole"][0][1]


@pytest.mark.parametrize("name", inverses(torch.float64))
def test_the_gram_matrix_of_dependent_gradients_stays_positive_semi_definite(name: str) -> None:
    gram, _ = ranks()[0]["grams"]["rounded", "dependent", name]
    values = torch.linalg.eigvalsh(gram.double())
    assert float(values[0]) > -1e-7 * float(values[-1])


def test_a_float32_step_loses_no_more_than_with_whole_numbers() -> None:
    exact = trained(torch.float64, Batch())
    for rank in ranks():
        assert all(torch.equal(rank["moved"][rounded], ranks()[0]["moved"][rounded]) for rounded in (True, False))
    rounded, whole = (float((ranks()[0]["moved"][form] - exact).norm() / exact.norm()) for form in (True, False))
    assert not torch.equal(*ranks()[0]["moved"].values())
    assert rounded < 1.5 * whole + 1e-6


def sent(rank: int, size: int) -> list[int]:
    """Bytes of the first twelve steps in the paper's CNN: all but the last make the curvature's factors anew."""
    torch.set_default_dtype(torch.float32)
    model = cnn((1, 28, 28), 10)
    optimizer, found = DDPNOpt(model), []
    for _ in range(12):
        before = optimizer.traffic.bytes
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(32, 1, 28, 28)), torch.randint(10, (32,))).backward()
        optimizer.step()
        found.append(optimizer.traffic.bytes - before)
    return found


def test_at_32_samples_on_each_of_four_ranks_the_papers_cnn_sends_at_most_twice_what_sgd_does() -> None:
    size = 4  # on two it is less
    weights = sum(p.numel() for p in cnn((1, 28, 28), 10).parameters())
    gradients_averaged = 2 * (size - 1) / size * 4 * weights
    for first, second, *_, last in launch(size, sent):
        assert 9 * last + first < 2 * 10 * gradients_averaged
        # the first hundred steps make factors 29 times
        assert 71 * last + 28 * second + first < 2 * 100 * gradients_averaged


def test_what_is_not_finite_stays_so() -> None:
    rows = torch.zeros(3, 100, dtype=torch.float32)
    rows[0, 70], rows[1, 0] = float("inf"), float("nan")
    finite = unpacked(packed(rows)).isfinite().all(1)
    assert finite.tolist() == [False, False, True]


def test_rounding_is_an_option() -> None:
    assert repr(Batch(rounded=False)) == "Batch(rounded=False)"
    assert repr(Batch()) == "Batch()"
    with pytest.raises(TypeError, match="rounded must be True or False"):
        Batch(rounded=16)  # type: ignore[arg-type]
