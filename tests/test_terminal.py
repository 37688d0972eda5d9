"""Terminals: columns at the output against closed forms and expectations."""

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from ddpnopt import Exact, Matched, Sampled
from ddpnopt import output_loss as output_loss_module
from ddpnopt.output_loss import OutputLoss


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


class Coupled(nn.Module):
    """Cross-entropy, and a little that couples a sample's positions."""

    reduction = "mean"

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        extra = (output.flatten(1).sum(1) / 10).square().mean()
        return nn.functional.cross_entropy(output, target) + self.share * extra


def whole_hessian(criterion: nn.Module, output: Tensor, target: Tensor) -> Tensor:
    """Of each sample's own loss, ``[B, d, d]``, by plain differentiation."""
    batch = len(output)
    weight = 1 / batch if criterion.reduction == "mean" else 1.0
    H = torch.autograd.functional.hessian(lambda y: criterion(y.view(output.shape), target), output.detach().flatten())
    assert isinstance(H, Tensor)
    blocks = H.view(batch, output.numel() // batch, batch, -1)
    return torch.stack([blocks[b, :, b] for b in range(batch)]) / weight


TOKENS = torch.tensor([[0, 2, 1], [2, 2, -100], [1, -100, 0], [0, 0, 3]])

RECOGNISED = {
    "squared error": (nn.MSELoss(), (4, 5, 2), torch.linspace(-1, 1, 40).view(4, 5, 2)),
    "squared error, summed": (nn.MSELoss(reduction="sum"), (4, 3), torch.linspace(-1, 1, 12).view(4, 3)),
    "several labels": (nn.BCEWithLogitsLoss(), (4, 3), torch.tensor([[0.0, 1.0, 1.0]]).expand(4, 3)),
    "robust": (nn.HuberLoss(delta=0.5), (4, 3), torch.linspace(-1, 1, 12).view(4, 3)),
    "no curvature": (nn.L1Loss(), (4, 3), torch.linspace(-1, 1, 12).view(4, 3)),
    "classes": (nn.CrossEntropyLoss(reduction="sum"), (4, 6), TOKENS[:, 0]),
    "classes of positions": (nn.CrossEntropyLoss(), (4, 6, 3), TOKENS),
    "masked, weighted and smoothed": (
        nn.CrossEntropyLoss(torch.linspace(0.5, 2, 6, dtype=torch.float64), label_smoothing=0.1),
        (4, 6, 3),
        TOKENS,
    ),
    "tokens side by side": (nn.CrossEntropyLoss(), (12, 6), TOKENS.flatten()),
}


@pytest.mark.parametrize("case", RECOGNISED)
def test_common_losses_need_no_backward_pass_for_every_output(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    criterion, shape, target = RECOGNISED[case]
    output = 2 * torch.randn(shape)
    output[0] *= 1e4  # a sample of whose classes the model is sure has no curvature to find a weight by
    target = target.to(output) if target.is_floating_point() else target
    monkeypatch.setattr("ddpnopt.output_loss._full", lambda *_: pytest.fail("formed the whole Hessian"))
    Z = Exact(criterion).factor(output_loss(criterion, output, target), 0)
    torch.testing.assert_close(torch.einsum("rbi,rbj->bij", Z, Z), whole_hessian(criterion, output, target))


@pytest.mark.parametrize(("share", "whole"), [(0.0, False), (1e-6, True), (0.5, True)])
def test_a_form_that_is_not_the_losss_own_is_not_taken(
    share: float, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    formed = Mock(wraps=output_loss_module._full)
    monkeypatch.setattr(output_loss_module, "_full", formed)
    criterion, output = Coupled(share), torch.randn(4, 6, 3)
    target = torch.randint(6, (4, 3))
    Z = Exact(criterion).factor(output_loss(criterion, output, target), 0)
    torch.testing.assert_close(torch.einsum("rbi,rbj->bij", Z, Z), whole_hessian(criterion, output, target))
    assert formed.called == whole


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-4), (torch.float16, 0.01), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("margin", [0.0, 9.0, 12.0])
def test_forms_are_known_in_other_types(
    margin: float, dtype: torch.dtype, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the model is sure of all it says, and curvature is less than float16 holds of a mean over tokens."""
    monkeypatch.setattr("ddpnopt.output_loss._full", lambda *_: pytest.fail("formed the whole Hessian"))
    criterion, target = nn.CrossEntropyLoss(), torch.randint(20, (64, 100))
    output = (torch.randn(64, 20, 100) + margin * nn.functional.one_hot(target, 20).mT).to(dtype)
    exact = Sampled(criterion).factor(output_loss(criterion, output.double(), target), 0)
    found = Sampled(criterion).factor(output_loss(criterion, output, target), 0)
    assert found.dtype == dtype
    assert float((found.double() - exact).norm()) < off * float(exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_position_between_two_classes_has_its_weight_whichever_they_are(dtype: torch.dtype) -> None:
    criterion, target = nn.CrossEntropyLoss(), torch.zeros(45, dtype=torch.long)
    output = torch.full((45, 10), -30.0)
    pairs = torch.combinations(torch.arange(10))
    output.scatter_(1, pairs, 0.0)
    Z = Exact(criterion).factor(output_loss(criterion, output.to(dtype), target), 0)
    H = Z.double().square().sum(0).gather(1, pairs)
    torch.testing.assert_close(H, torch.full_like(H, 0.25), rtol=4 * torch.finfo(dtype).eps, atol=0)


class Whitened(nn.Module):
    """A squared error in other coordinates, which couples all outputs."""

    reduction = "mean"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        coordinates = torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4).sin() + torch.eye(4)
        return ((output - target) @ coordinates.to(output)).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_outputs_of_a_regression_are_not_taken_for_confident_classes(dtype: torch.dtype) -> None:
    criterion, output, target = Whitened(), 300 * torch.randn(8, 4), torch.randn(8, 4)
    Z = Exact(criterion).factor(output_loss(criterion, output.to(dtype), target.to(dtype)), 0).double()
    H = whole_hessian(criterion, output, target)
    assert float((torch.einsum("rbi,rbj->bij", Z, Z) - H).norm()) < 0.05 * float(H.norm())


def test_two_labels_are_not_taken_for_two_classes() -> None:
    criterion = nn.BCEWithLogitsLoss()
    for _ in range(200):
        output, target = torch.randn(1, 2), torch.rand(1, 2)
        p = output.sigmoid()
        Z = Exact(criterion).factor(output_loss(criterion, output.bfloat16(), target.bfloat16()), 0)
        H = torch.diag_embed(p * (1 - p)) / 2
        torch.testing.assert_close(torch.einsum("rbi,rbj->bij", Z, Z).double(), H, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "target"), [((3, 4), torch.tensor([0, 3, 1])), ((2, 3, 2), torch.tensor([[0, 2]] * 2))]
)
def test_sampled_has_the_hessian_for_its_mean(shape: tuple[int, ...], target: Tensor) -> None:
    criterion = nn.CrossEntropyLoss()
    loss = output_loss(criterion, torch.randn(shape), target)
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
