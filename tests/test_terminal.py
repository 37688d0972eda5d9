"""Terminals: columns at the output against closed forms and expectations."""

import pytest
import torch
from torch import Tensor, nn

from ddpnopt import Exact, Matched, Sampled
from ddpnopt.terminal import OutputLoss


def output_loss(criterion: nn.Module, output: Tensor, target: Tensor) -> OutputLoss:
    output = output.requires_grad_()
    weight = 1 / len(output) if criterion.reduction == "mean" else 1.0
    return OutputLoss(criterion(output, target), output, weight, len(output))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_exact_is_the_closed_form_of_cross_entropy(reduction: str) -> None:
    output, target = torch.randn(5, 3), torch.randint(3, (5,))
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    Z = Exact(criterion).factor(output_loss(criterion, output, target), 0)
    p = output.detach().softmax(1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(torch.einsum("rbi,rbj->bij", Z, Z), expected)


def test_exact_over_positions() -> None:
    output, target = torch.randn(2, 3, 4), torch.randint(3, (2, 4))
    criterion = nn.CrossEntropyLoss()  # mean over samples and positions
    Z = Exact(criterion).factor(output_loss(criterion, output, target), 0)
    p = output.detach().softmax(1)
    H = torch.einsum("bcs,cd,st->bcsdt", p, torch.eye(3), torch.eye(4))
    H = H - torch.einsum("bcs,bds,st->bcsdt", p, p, torch.eye(4))
    torch.testing.assert_close(torch.einsum("rbi,rbj->bij", Z, Z), H.reshape(2, 12, 12) / 4)


def test_sampled_has_the_hessian_for_its_mean() -> None:
    output, target = torch.randn(3, 4), torch.randint(4, (3,))
    criterion = nn.CrossEntropyLoss()
    loss = output_loss(criterion, output, target)
    Z = Exact(criterion).factor(loss, 0)
    H = torch.einsum("rbi,rbj->bij", Z, Z)
    sampled = Sampled(criterion, columns=50)
    draws = torch.stack([sampled.factor(loss, step) for step in range(200)])
    torch.testing.assert_close(torch.einsum("srbi,srbj->bij", draws, draws) / 200, H, rtol=0, atol=0.02)
    assert torch.equal(sampled.factor(loss, 3), sampled.factor(loss, 3))
    assert not torch.equal(sampled.factor(loss, 3), sampled.factor(loss, 4))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_matched_is_exact_along_the_gradient(reduction: str) -> None:
    output, target = torch.randn(6, 3), torch.randint(3, (6,))
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    c = Matched(criterion, cap=1e9).scale(output_loss(criterion, output, target))
    p = output.detach().softmax(1)
    g = p - nn.functional.one_hot(target, 3)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    gHg = torch.einsum("bi,bij,bj->b", g, H, g)
    torch.testing.assert_close(c.square() * g.square().sum(1).square(), gHg)
    capped = Matched(criterion, cap=0.01).scale(output_loss(criterion, output, target))
    torch.testing.assert_close(capped, torch.full_like(capped, 10.0))


def test_a_loss_without_curvature_or_gradient_asks_for_no_more_than_the_cap() -> None:
    output, target = torch.randn(4, 3), torch.randn(4, 3)
    linear, flat = nn.L1Loss(), nn.HuberLoss(delta=1e-12)
    for criterion in (linear, flat):
        c = Matched(criterion, cap=4.0).scale(output_loss(criterion, output, target))
        torch.testing.assert_close(c, torch.full_like(c, 0.5))
    same = nn.MSELoss()
    c = Matched(same).scale(output_loss(same, target.clone(), target))
    torch.testing.assert_close(c, torch.ones_like(c))
