"""The three ways to call step, resuming, and what a state_dict holds."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import CURVATURES, NETWORKS, Case
from ddpnopt import Batch, DDPNOpt, Dense, Exact, Gradient, Identity, Kronecker, Matched, Sampled, StepError
from ddpnopt.terminal import Terminal

Loss = nn.Module


def backward_then_step(optimizer: DDPNOpt, case: Case, criterion: Loss) -> Any:
    optimizer.zero_grad()
    criterion(case.model(case.x), case.y).backward()
    return optimizer.step()


def closure_with_backward(optimizer: DDPNOpt, case: Case, criterion: Loss) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = criterion(case.model(case.x), case.y)
        loss.backward()
        return loss

    return optimizer.step(closure)


def closure_with_loss(optimizer: DDPNOpt, case: Case, criterion: Loss) -> Any:
    return optimizer.step(lambda: criterion(case.model(case.x), case.y))


FORMS = [backward_then_step, closure_with_backward, closure_with_loss]
TERMINALS: dict[str, Callable[[Loss], Terminal]] = {
    "gradient": lambda _: Gradient(),
    "matched": Matched,
    "exact": Exact,
    "sampled": lambda criterion: Sampled(criterion, columns=2),
}


def trained(
    form: Callable[..., Any], terminal: str, network: str = "mlp", steps: int = 20, **settings: Any
) -> list[Tensor]:
    torch.manual_seed(5)
    case, criterion = NETWORKS[network](), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model, terminal=TERMINALS[terminal](criterion), **settings)
    for _ in range(steps):
        form(optimizer, case, criterion)
    return [p.detach() for p in case.model.parameters()]


@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize("coupling", ["batch", "sample"])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_forms_give_the_same_bits(terminal: str, coupling: str, feedback: bool, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    settings: dict[str, Any] = {"coupling": coupling, "feedback": feedback, "lr": 0.1 if coupling == "batch" else 1e-3}
    first, *others = [trained(form, terminal, **settings) for form in FORMS]
    for other in others:
        for new, wanted in zip(other, first, strict=True):
            assert torch.equal(new, wanted)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("decoupled", [False, True])
def test_three_forms_agree_on_convolutions(curvature: str, decoupled: bool) -> None:
    settings: dict[str, Any] = {"curvature": CURVATURES[curvature], "momentum": 0.5, "weight_decay": 0.01}
    settings["decoupled_weight_decay"] = decoupled
    first, *others = [trained(form, "gradient", "conv", **settings) for form in FORMS]
    for other in others:
        for new, wanted in zip(other, first, strict=True):
            assert torch.equal(new, wanted)


def test_a_closure_that_returns_the_loss_needs_no_criterion_and_forms_no_gradients() -> None:
    with_criterion = trained(closure_with_loss, "matched")
    case = NETWORKS["mlp"]()
    torch.manual_seed(5)
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model, terminal=Matched())
    losses = [float(closure_with_loss(optimizer, case, criterion).detach()) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in case.model.parameters())
    for new, wanted in zip(case.model.parameters(), with_criterion, strict=True):
        torch.testing.assert_close(new.detach(), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("terminal", TERMINALS)
def test_sum_and_mean_agree(terminal: str) -> None:
    """A sum over B samples is B times the mean: one B times smaller lr for the same R, decay and damping apart."""

    def weights(reduction: str, lr: float) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss(reduction=reduction)
        end = Gradient(reduction) if terminal == "gradient" else TERMINALS[terminal](criterion)  # type: ignore[arg-type]
        optimizer = DDPNOpt(case.model, lr, terminal=end, curvature=Identity(), momentum=0.0)
        for _ in range(5):
            backward_then_step(optimizer, case, criterion)
        return [p.detach() for p in case.model.parameters()]

    for new, wanted in zip(weights("sum", 0.1), weights("mean", 0.5), strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("coupling", ["batch", "sample"])
def test_resume_is_bit_exact(curvature: str, coupling: Any, tmp_path: Path) -> None:
    def fresh() -> tuple[Case, DDPNOpt, torch.optim.lr_scheduler.StepLR, Loss]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
        optimizer = DDPNOpt(
            case.model,
            1e-2,
            curvature=CURVATURES[curvature],
            terminal=Sampled(criterion, columns=2),
            coupling=coupling,
            momentum=0.5,
            weight_decay=0.01,
        )
        return case, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5), criterion

    case, optimizer, scheduler, criterion = fresh()
    for step in range(12):
        backward_then_step(optimizer, case, criterion)
        scheduler.step()
        if step == 6:
            saved = {"m": case.model.state_dict(), "o": optimizer.state_dict(), "s": scheduler.state_dict()}
            torch.save(saved, tmp_path / "checkpoint.pt")
    expected = [p.detach() for p in case.model.parameters()]

    case, optimizer, scheduler, criterion = fresh()
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    case.model.load_state_dict(loaded["m"])
    optimizer.load_state_dict(loaded["o"])
    scheduler.load_state_dict(loaded["s"])
    for _ in range(5):
        backward_then_step(optimizer, case, criterion)
        scheduler.step()
    for new, wanted in zip(case.model.parameters(), expected, strict=True):
        assert torch.equal(new, wanted)


def test_state_keeps_float32_for_half_precision_weights() -> None:
    torch.set_default_dtype(torch.float32)
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    case = Case(case.model.bfloat16(), case.x.bfloat16(), case.y)
    optimizer = DDPNOpt(case.model)
    backward_then_step(optimizer, case, criterion)
    assert all(p.dtype == torch.bfloat16 for p in case.model.parameters())
    again = DDPNOpt(case.model)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, state in optimizer.state.items():
        assert state["S"].dtype == torch.float32
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(again.state[parameter][name]), torch.as_tensor(value))
            assert torch.as_tensor(again.state[parameter][name]).dtype == torch.as_tensor(value).dtype


def test_schedulers_and_groups_reach_the_step() -> None:
    def weights(lrs: list[float], scheduled: bool) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
        optimizer = DDPNOpt(case.model, lrs[0], curvature=Identity())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: lrs[t] / lrs[0]) if scheduled else None
        for lr in lrs[:-1]:
            if scheduler is None:
                optimizer.param_groups[0]["lr"] = lr
            backward_then_step(optimizer, case, criterion)
            if scheduler is not None:
                scheduler.step()
        return [p.detach() for p in case.model.parameters()]

    by_hand, by_scheduler = weights([1.0, 0.5, 0.25, 0.1], False), weights([1.0, 0.5, 0.25, 0.1], True)
    constant = weights([1.0] * 4, False)
    for new, wanted, other in zip(by_scheduler, by_hand, constant, strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-12, atol=1e-12)
        assert not torch.equal(new, other)


def test_inverses_follow_a_changed_lr() -> None:
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model, 0.1, curvature=Kronecker(refresh_every=1000, memory=0))
    backward_then_step(optimizer, case, criterion)
    optimizer.param_groups[0]["lr"] = 1.0
    backward_then_step(optimizer, case, criterion)
    assert all(state["ridge"] == pytest.approx(0.1) for state in optimizer.state.values())


def test_two_groups_with_equal_settings_are_one() -> None:
    def weights(split: bool) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
        optimizer = DDPNOpt(case.model, curvature=Identity())
        if split:
            *kept, bias = optimizer.param_groups[0]["params"]
            optimizer.param_groups[0]["params"] = kept
            optimizer.add_param_group({"params": [bias]})
        for _ in range(5):
            backward_then_step(optimizer, case, criterion)
        return [p.detach() for p in case.model.parameters()]

    for new, wanted in zip(weights(True), weights(False), strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-12, atol=1e-12)


def test_accumulated_micro_batches_are_the_batch() -> None:
    def weights(parts: int) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
        x, y = torch.randn(12, 4), torch.randint(3, (12,))
        optimizer = DDPNOpt(case.model, 1.0)
        for _ in range(5):
            optimizer.zero_grad()
            for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (criterion(case.model(part_x), part_y) / parts).backward()
            optimizer.step()
        return [p.detach() for p in case.model.parameters()]

    for new, wanted in zip(weights(3), weights(1), strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-8, atol=1e-8)


class Flagged(nn.Module):
    """Takes arguments that belong to no sample, as many models of other libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = NETWORKS["mlp"]().model

    def forward(self, x: Tensor, mask: Tensor | None = None, tokens: Tensor | int = 0, *, mode: str = "") -> Tensor:
        out: Tensor = self.inner(x)
        return out


@pytest.mark.parametrize("argument", [{"mask": None, "mode": "train"}, {"tokens": torch.tensor(7)}, {"tokens": 7}])
def test_arguments_of_no_sample_do_not_cost_accumulated_batches_their_feedback(argument: dict[str, Any]) -> None:
    def weights(parts: int) -> list[Tensor]:
        torch.manual_seed(5)
        model, criterion = Flagged(), nn.CrossEntropyLoss()
        x, y = torch.randn(12, 4), torch.randint(3, (12,))
        optimizer = DDPNOpt(model, 1.0)
        for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (criterion(model(part_x, **argument), part_y) / parts).backward()
        optimizer.step()
        return [p.detach() for p in model.parameters()]

    for new, wanted in zip(weights(3), weights(1), strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("between", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(8)], ids=["masks", "statistics"])
def test_what_accumulated_batches_draw_does_not_pass_for_a_deviation(between: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 8), between(), nn.Linear(8, 3))
    optimizer = DDPNOpt(model, 1e-9)
    for _ in range(2):
        nn.functional.cross_entropy(model(torch.randn(6, 4)), torch.randint(3, (6,))).backward()
    optimizer.step()
    for figures in optimizer.diagnostics()["layers"].values():
        assert figures["feedback"] <= 1e-4 * figures["k"]


def test_accumulated_batches_prepared_in_place_are_taken_and_later_writing_is_refused() -> None:
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model)
    parts = [torch.randn(6, 4), torch.randn(6, 4)]
    parts[0] -= 1.0
    for part in parts:
        criterion(case.model(part), torch.randint(3, (6,))).backward()
    optimizer.step()
    assert any(figures["feedback"] > 0 for figures in optimizer.diagnostics()["layers"].values())
    optimizer.zero_grad()
    for part in parts:
        criterion(case.model(part), torch.randint(3, (6,))).backward()
    parts[1] += 1.0
    with pytest.raises(ValueError, match="written into"):
        optimizer.step()


def test_copies_and_pickles_train_on_without_touching_the_original() -> None:
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model)
    backward_then_step(optimizer, case, criterion)
    ema = copy.deepcopy(case.model)
    criterion(ema(case.x), case.y).backward()
    with pytest.raises(ValueError, match="no gradient"):
        optimizer.zero_grad()
        optimizer.step()
    buffer = io.BytesIO()
    torch.save(case.model, buffer)
    twin: DDPNOpt = pickle.loads(pickle.dumps(optimizer))
    assert twin.model is not None
    twin_case = Case(twin.model, case.x, case.y)  # type: ignore[arg-type]
    backward_then_step(twin, twin_case, criterion)
    backward_then_step(optimizer, case, criterion)
    for new, wanted in zip(twin.model.parameters(), case.model.parameters(), strict=True):
        assert torch.equal(new, wanted)


def test_two_backward_passes_through_one_graph_add_up() -> None:
    def weights(twice: bool) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
        optimizer = DDPNOpt(case.model, 1.0)
        output = case.model(case.x)
        one, other = criterion(output, case.y), output.square().mean()
        if twice:
            one.backward(retain_graph=True)
            other.backward()
        else:
            (one + other).backward()
        optimizer.step()
        return [p.detach() for p in case.model.parameters()]

    for new, wanted in zip(weights(True), weights(False), strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-10, atol=1e-10)


def test_zero_grad_between_two_backward_passes_through_one_graph() -> None:
    def weights(detour: bool) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
        optimizer = DDPNOpt(case.model, 1.0)
        output = case.model(case.x)
        if detour:
            output.square().mean().backward(retain_graph=True)
            optimizer.zero_grad()
        criterion(output, case.y).backward()
        optimizer.step()
        return [p.detach() for p in case.model.parameters()]

    for new, wanted in zip(weights(True), weights(False), strict=True):
        assert torch.equal(new, wanted)


def test_a_forward_pass_serves_one_step() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 3))  # whose gradient needs no weight, so that autograd lets it pass
    optimizer = DDPNOpt(model, 0.1)
    output = model(torch.randn(6, 4))
    output.sum().backward(retain_graph=True)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    output.square().mean().backward()
    with pytest.raises(StepError, match="a step was already made from: run the model again"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("coupling", ["batch", "sample"])
@pytest.mark.parametrize("feedback", [True, False])
def test_a_grad_scaler_changes_nothing(coupling: Any, feedback: bool) -> None:
    def weights(scaled: bool) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
        optimizer = DDPNOpt(case.model, 0.01, coupling=coupling, feedback=feedback)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(4):
            optimizer.zero_grad()
            loss = criterion(case.model(case.x), case.y)
            if step == 2 and scaled:
                loss = loss * float("inf")  # to be skipped
            elif step == 2:
                continue
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return [p.detach() for p in case.model.parameters()]

    for new, wanted in zip(weights(True), weights(False), strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-9, atol=1e-10)


def test_gradients_without_a_forward_pass_of_the_model_are_refused() -> None:
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model)
    x = case.x
    for module in case.model:
        x = module(x)
    criterion(x, case.y).backward()
    with pytest.raises(ValueError, match="saw no forward pass"):
        optimizer.step()


SMOOTH = [Matched, lambda c: Exact(c, cap=1.0), lambda c: Sampled(c, columns=3, cap=1.0)]


@pytest.mark.parametrize("make", SMOOTH)
@pytest.mark.parametrize("kind", ["mixture", "sign", "outside"])
def test_a_loss_that_is_not_the_criterion_is_refused(make: Callable[[Loss], Terminal], kind: str) -> None:
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model, terminal=make(criterion))
    output = case.model(case.x)
    losses = {
        "mixture": lambda: 0.9 * criterion(output, case.y) + 0.1 * criterion(output, (case.y + 1) % 3),
        "sign": lambda: -criterion(output, case.y),
        "outside": lambda: criterion(output, case.y) + output.square().mean(),
    }
    losses[kind]().backward()
    with pytest.raises(ValueError, match="the loss has other parts"):
        optimizer.step()


@pytest.mark.parametrize("make", SMOOTH)
def test_a_multiple_of_the_criterion_is_a_loss_like_any_other(make: Callable[[Loss], Terminal]) -> None:
    def weights(plain: bool) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
        optimizer = DDPNOpt(case.model, 1.0, terminal=make(criterion))
        for _ in range(3):
            optimizer.zero_grad()
            if plain:
                (3 * criterion(case.model(case.x), case.y)).backward()
                optimizer.step()
            else:
                optimizer.step(lambda: 3 * criterion(case.model(case.x), case.y))
        return [p.detach() for p in case.model.parameters()]

    for new, wanted in zip(weights(True), weights(False), strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", SMOOTH)
def test_accumulated_uneven_micro_batches_with_a_criterion(make: Callable[[Loss], Terminal]) -> None:
    def weights(sizes: list[int]) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
        x, y = torch.randn(12, 4), torch.randint(3, (12,))
        optimizer = DDPNOpt(case.model, 1.0, terminal=make(criterion))
        for _ in range(3):
            optimizer.zero_grad()
            for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
                (criterion(case.model(part_x), part_y) * len(part_x) / 12).backward()
            optimizer.step()
        return [p.detach() for p in case.model.parameters()]

    for new, wanted in zip(weights([7, 5]), weights([12]), strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", SMOOTH)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_closure_over_micro_batches_is_the_batch(make: Callable[[Loss], Terminal], reduction: str) -> None:
    def weights(sizes: list[int]) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss(reduction=reduction)
        x, y = torch.randn(12, 4), torch.randint(3, (12,))
        optimizer = DDPNOpt(case.model, 1.0, terminal=make(criterion))

        def loss() -> Tensor:
            parts = zip(x.split(sizes), y.split(sizes), strict=True)
            shares = [len(part) / 12 if reduction == "mean" else 1.0 for part in x.split(sizes)]
            losses = [criterion(case.model(a), b) * share for (a, b), share in zip(parts, shares, strict=True)]
            return torch.stack(losses).sum()

        for _ in range(3):
            optimizer.step(loss)
        return [p.detach() for p in case.model.parameters()]

    for new, wanted in zip(weights([7, 5]), weights([12]), strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-8, atol=1e-8)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.embed(x)))
        return out


@pytest.mark.parametrize("make", [Matched, lambda c: Exact(c, cap=1.0)])
def test_the_criterion_may_see_the_output_in_another_order(make: Callable[[Loss], Terminal]) -> None:
    def weights(transposed: bool) -> tuple[list[Tensor], float]:
        torch.manual_seed(5)
        model, criterion = Tokens(), nn.CrossEntropyLoss()
        x, y = torch.randint(9, (8, 5)), torch.randint(4, (8, 5))
        optimizer = DDPNOpt(model, 1.0, terminal=make(criterion))
        for _ in range(3):
            optimizer.zero_grad()
            logits = model(x)
            loss = criterion(logits.transpose(1, 2), y) if transposed else criterion(logits.view(-1, 4), y.flatten())
            loss.backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()], float(optimizer.diagnostics()["actual_decrease"])

    (one, decrease), (other, wanted) = weights(True), weights(False)
    assert decrease == pytest.approx(wanted)
    for new, old in zip(one, other, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-8, atol=1e-9)


def test_a_tensor_made_from_the_output_is_not_the_output() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 300))
    criterion = nn.MSELoss()
    optimizer = DDPNOpt(model, terminal=Matched(criterion))
    x, y = torch.randn(64, 5), torch.rand(64, 300)
    for made in (lambda out: torch.sigmoid(out) * 2, lambda out: out.sigmoid_()):
        for _ in range(4):
            optimizer.zero_grad()
            criterion(made(model(x)), y).backward()
            with pytest.raises(ValueError, match="saw no call"):
                optimizer.step()


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *, x: Tensor) -> dict[str, Tensor]:
        return {"features": x * 2, "logits": self.inner(x)}


@pytest.mark.parametrize("terminal", TERMINALS)
def test_models_that_take_keywords_and_return_dictionaries(terminal: str) -> None:
    def weights(form: str) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
        model = Wrapped(case.model)
        optimizer = DDPNOpt(model, 0.05, terminal=TERMINALS[terminal](criterion))
        for _ in range(3):
            if form == "plain":
                optimizer.zero_grad()
                criterion(model(x=case.x)["logits"], case.y).backward()
                optimizer.step()
            else:
                optimizer.step(lambda: criterion(model(x=case.x)["logits"], case.y))
        return [p.detach() for p in model.parameters()]

    for new, wanted in zip(weights("plain"), weights("closure"), strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-9, atol=1e-10)


def test_a_skipped_batch_does_not_join_the_next_step() -> None:
    def weights(skipped: bool) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
        optimizer = DDPNOpt(case.model)
        if skipped:
            (100 * criterion(case.model(case.x), (case.y + 1) % 3)).backward()
        case.model.zero_grad()
        criterion(case.model(case.x), case.y).backward()
        optimizer.step()
        return [p.detach() for p in case.model.parameters()]

    for new, wanted in zip(weights(True), weights(False), strict=True):
        assert torch.equal(new, wanted)


@pytest.mark.parametrize("terminal", TERMINALS)
def test_batch_norm_in_training_mode_with_every_terminal(terminal: str) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    case, criterion = Case(model, torch.randn(8, 4), torch.randint(3, (8,))), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(model, 0.05, terminal=TERMINALS[terminal](criterion))
    losses = []
    for _ in range(5):
        losses.append(float(criterion(case.model(case.x), case.y).detach()))
        backward_then_step(optimizer, case, criterion)
    assert losses[-1] < losses[0]


def test_state_of_another_curvature_is_refused() -> None:
    case = NETWORKS["mlp"]()
    with pytest.raises(ValueError, match="Identity"):
        DDPNOpt(case.model).load_state_dict(DDPNOpt(case.model, curvature=Identity()).state_dict())


@pytest.mark.parametrize("coupling", ["batch", "sample", Batch(relinearise=True)])
def test_under_autocast_the_step_keeps_single_precision(coupling: Any) -> None:
    """Autocast is for the model: in the rollout a layer's step must not be rounded to half precision."""
    torch.set_default_dtype(torch.float32)
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    weight = case.model[0].weight
    assert isinstance(weight, nn.Parameter)
    nn.init.zeros_(weight)  # so that it is the step afterwards
    optimizer = DDPNOpt(case.model, 1.0, curvature=Identity(), coupling=coupling)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(case.model(case.x), case.y)
    loss.backward()
    optimizer.step()
    assert weight.abs().max() > 1e-3
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize(
    ("coupling", "joint"), [("batch", True), (Batch(relinearise=True), True), ("sample", False), (Dense(), False)]
)
def test_momentum_and_decay_are_on_by_default_where_nothing_published_is_to_be_met(coupling: Any, joint: bool) -> None:
    def group(**settings: Any) -> tuple[float, float, bool]:
        (own,) = DDPNOpt(nn.Sequential(nn.Linear(2, 2)), coupling=coupling, **settings).param_groups
        return own["momentum"], own["weight_decay"], own["decoupled_weight_decay"]

    momentum, decay, decoupled = (0.5, 0.01, True) if joint else (0.0, 0.0, False)
    assert group() == (momentum, decay, decoupled)
    assert group(momentum=0.3) == (0.3, decay, decoupled)
    assert group(momentum=0.0, weight_decay=0.0) == (0.0, 0.0, decoupled)
    assert group(weight_decay=0.2, decoupled_weight_decay=not decoupled) == (momentum, 0.2, not decoupled)
