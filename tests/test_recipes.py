"""What training loops put around an optimizer: clipping, averaging, schedules, autocast, scaling, accumulation."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cases import NETWORKS, Case
from ddpnopt import DDPNOpt, Dense, EigenKronecker, Exact, Gradient, Identity, Kronecker, Matched, Sampled, StepError
from ddpnopt.clipping import Clips

Step = Callable[[DDPNOpt, Case, nn.Module], object]


def plain(optimizer: DDPNOpt, case: Case, criterion: nn.Module) -> None:
    optimizer.zero_grad()
    criterion(case.model(case.x), case.y).backward()
    optimizer.step()


def trained(step: Step, steps: int = 4, network: str = "mlp", smooth: bool = False, **settings: Any) -> list[Tensor]:
    torch.manual_seed(5)
    case, criterion = NETWORKS[network](), nn.CrossEntropyLoss()
    if smooth:
        case.model[3] = nn.Tanh()
    optimizer = DDPNOpt(case.model, **settings)
    for _ in range(steps):
        step(optimizer, case, criterion)
    return [p.detach() for p in case.model.parameters()]


def close(ones: list[Tensor], others: list[Tensor], rtol: float = 1e-9, atol: float = 1e-10) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


LOOSE = partial(nn.Embedding, 7, 4, scale_grad_by_freq=True)  # such a gradient depends on the other samples


CLIPPED: list[dict[str, Any]] = [
    {},
    {"terminal": Matched(nn.CrossEntropyLoss())},
    {"curvature": Identity(), "coupling": "sample"},
    {"coupling": Dense(), "curvature": Identity()},
    {"momentum": 0.5},
]


def clipped_by(factor: float, settings: dict[str, Any], edit: Callable[[nn.Module], object] | None = None) -> Tensor:
    """How far a step moves the weights whose gradients were clipped by a factor, or edited."""
    torch.manual_seed(5)
    case = NETWORKS["mlp"]()
    criterion = getattr(settings.get("terminal"), "criterion", None) or nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model, 0.5, weight_decay=0.0, **settings)
    before = parameters_to_vector(case.model.parameters()).detach()
    criterion(case.model(case.x), case.y).backward()
    if edit is not None:
        edit(case.model)
    elif factor != 1:
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in case.model.parameters() if p.grad is not None]))
        torch.nn.utils.clip_grad_norm_(case.model.parameters(), factor * norm)
    optimizer.step()
    return parameters_to_vector(case.model.parameters()).detach() - before


def test_a_warm_restart_keeps_what_was_learned() -> None:
    """With momentum: velocities of steps of hardly any learning rate, and so of hardly any damping, are long."""
    torch.manual_seed(5)
    x = torch.randn(256, 12)
    y = (x[:, :4] * x[:, 4:8]).sum(1).gt(0).long()
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer, criterion = DDPNOpt(model), nn.CrossEntropyLoss()
    scheduler = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=40)
    losses = []
    for _ in range(3):
        for _ in range(40):
            rows = torch.randint(256, (16,))
            optimizer.zero_grad()
            criterion(model(x[rows]), y[rows]).backward()
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                losses.append(float(criterion(model(x), y)))
    assert losses[39] < 0.8 * losses[0]
    assert max(losses[40:]) < 1.5 * losses[39]


@pytest.mark.parametrize("settings", CLIPPED)
def test_a_step_from_clipped_gradients_is_as_much_shorter(settings: dict[str, Any]) -> None:
    whole = clipped_by(1.0, settings)
    # up to the curvature of the activations, through which layers see how far those before them have moved
    assert (clipped_by(0.25, settings) - 0.25 * whole).norm() < 0.01 * 0.25 * whole.norm()
    assert torch.equal(clipped_by(3.0, settings), whole)  # a clip that is not reached changes no bit


@pytest.mark.parametrize("settings", [{"momentum": 0.0}, {"curvature": Identity(), "coupling": "sample"}])
def test_a_clip_of_every_step_drops_out(settings: dict[str, Any]) -> None:
    """As it does from Adam's steps: loops made for Adam clip most of theirs."""
    torch.manual_seed(5)
    model, criterion = nn.Sequential(LOOSE(), nn.Flatten(), nn.Linear(8, 3)), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(model, 0.01, weight_decay=0.0, **settings)
    x, y = torch.randint(7, (5, 2)), torch.randint(3, (5,))

    def moved(model: nn.Module, optimizer: DDPNOpt, factor: float) -> Tensor:
        before = parameters_to_vector(model.parameters()).detach()
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        for p in model.parameters() if factor != 1 else ():
            assert p.grad is not None
            p.grad *= factor
        optimizer.step()
        return parameters_to_vector(model.parameters()).detach() - before

    for _ in range(60):
        moved(model, optimizer, 0.2)
    whole, as_usual, more, less = (
        moved(*copy.deepcopy((model, optimizer)), factor) for factor in (1.0, 0.2, 0.05, 0.8)
    )
    assert torch.equal(less, whole)
    assert (as_usual - whole).norm() < 0.01 * whole.norm()
    assert (more - 0.25 * whole).norm() < 0.01 * whole.norm()

    again = DDPNOpt(model, 0.01, weight_decay=0.0, **settings)
    again.load_state_dict(optimizer.state_dict())
    assert (moved(model, again, 0.05) - more).norm() == 0


def test_gradients_replaced_by_multiples_are_those_multiplied_in_place() -> None:
    def replaced(model: nn.Module) -> None:
        for p in model.parameters():
            p.grad = None if p.grad is None else 0.5 * p.grad

    def halved(model: nn.Module) -> None:
        for p in model.parameters():
            assert p.grad is not None
            p.grad *= 0.5

    assert torch.equal(clipped_by(1.0, {}, replaced), clipped_by(1.0, {}, halved))


def test_clipping_inside_the_closure_and_over_micro_batches() -> None:
    def weights(inside: bool) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
        optimizer = DDPNOpt(case.model, 0.5)

        def loss() -> Tensor:
            optimizer.zero_grad()
            for x, y in zip(case.x.split(2), case.y.split(2), strict=True):
                (criterion(case.model(x), y) * len(x) / len(case.x)).backward()
            torch.nn.utils.clip_grad_norm_(case.model.parameters(), 1e-2)
            return torch.zeros(())

        for _ in range(3):
            if inside:
                optimizer.step(loss)
            else:
                loss()
                optimizer.step()
        return [p.detach() for p in case.model.parameters()]

    assert equal(weights(True), weights(False))


def test_loose_parameters_are_clipped_beside_the_layers() -> None:
    def moved(clip: float | None) -> dict[str, Tensor]:
        torch.manual_seed(5)
        model, criterion = nn.Sequential(LOOSE(), nn.Flatten(), nn.Linear(8, 3)), nn.CrossEntropyLoss()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = DDPNOpt(model, 0.01, curvature=Identity(), feedback=False, weight_decay=0.0)
        criterion(model(torch.randint(7, (5, 2))), torch.randint(3, (5,))).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return {name: p.detach() - before[name] for name, p in model.named_parameters()}

    free, clipped = moved(None), moved(1e-6)
    assert all(clipped[name].norm() < 1e-4 * change.norm() for name, change in free.items())


def test_clipping_is_the_adapted_optimizer_s_where_it_is_one() -> None:
    """Without feedback the sample form reads .grad, as SGD does; so do parameters without a module."""

    def weights(make: Callable[[nn.Module], torch.optim.Optimizer]) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
        optimizer = make(case.model)
        for _ in range(3):
            optimizer.zero_grad()
            criterion(case.model(case.x), case.y).backward()
            torch.nn.utils.clip_grad_norm_(case.model.parameters(), 1e-2)
            optimizer.step()
        return [p.detach() for p in case.model.parameters()]

    sgd = weights(lambda model: torch.optim.SGD(model.parameters(), 0.1))
    settings: dict[str, Any] = {"curvature": Identity(), "coupling": "sample", "feedback": False}
    assert equal(weights(lambda model: DDPNOpt(model, 0.1, **settings)), sgd)
    assert equal(weights(lambda model: DDPNOpt(model.parameters(), 0.1, **settings)), sgd)


@pytest.mark.parametrize("ema", [True, False])
def test_an_averaged_model_is_a_copy_that_the_optimizer_does_not_see(ema: bool) -> None:
    def weights(averaging: bool) -> tuple[list[Tensor], list[Tensor]]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
        optimizer = DDPNOpt(case.model)
        plain(optimizer, case, criterion)  # hooks and a pass are on the model when it is copied
        average = AveragedModel(case.model, multi_avg_fn=get_ema_multi_avg_fn(0.5) if ema else None)
        wanted = [p.detach().clone() for p in case.model.parameters()]
        for i in range(4):
            plain(optimizer, case, criterion)
            if averaging:
                average.update_parameters(case.model)
                now = [p.detach() for p in case.model.parameters()]
                part = 1.0 if i == 0 else 0.5 if ema else 1 / (i + 1)
                wanted = [old + part * (new - old) for old, new in zip(wanted, now, strict=True)]
                average(case.x).sum().backward()  # with grad mode on: nothing of it reaches the optimizer
        if averaging:
            close([p.detach() for p in average.module.parameters()], wanted)
        return [p.detach() for p in case.model.parameters()], wanted

    assert equal(weights(True)[0], weights(False)[0])


SCHEDULERS: dict[str, Callable[[DDPNOpt], Any]] = {
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=8),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.5, step_size_up=3),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}


@pytest.mark.parametrize("curvature", [Kronecker(), Identity()])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_its_values_set_by_hand(name: str, curvature: Any) -> None:
    torch.manual_seed(5)
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model, 0.1, curvature=curvature)
    scheduler = SCHEDULERS[name](optimizer)
    used = []
    for _ in range(7):
        used.append({key: optimizer.param_groups[0][key] for key in ("lr", "momentum")})
        plain(optimizer, case, criterion)
        scheduler.step(*([1.0] if name == "plateau" else []))
    assert len({tuple(one.values()) for one in used}) > 2
    if name in ("one cycle", "cyclic"):
        assert len({one["momentum"] for one in used}) > 2  # both cycle momentum by default
    settings = iter(used)

    def by_hand(optimizer: DDPNOpt, case: Case, criterion: nn.Module) -> None:
        optimizer.param_groups[0] |= next(settings)
        plain(optimizer, case, criterion)

    assert equal(trained(by_hand, 7, lr=0.1, curvature=curvature), [p.detach() for p in case.model.parameters()])


def test_one_cycle_whose_momentum_is_no_momentum_is_refused_at_the_step() -> None:
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    optimizer = DDPNOpt(case.model)
    lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=8, max_momentum=1.0)
    with pytest.raises(ValueError, match=r"Invalid momentum: 1.0; give a number in \[0, 1\)"):
        plain(optimizer, case, criterion)


Loss = Callable[[Case, nn.Module], Tensor]


def autocast(dtype: torch.dtype) -> Loss:
    def loss(case: Case, criterion: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return criterion(case.model(case.x), case.y)  # type: ignore[no-any-return]

    return loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("form", ["plain", "closure"])
def test_autocast_is_near_full_precision(dtype: torch.dtype, network: str, form: str) -> None:
    torch.set_default_dtype(torch.float32)
    loss = autocast(dtype)

    def step(optimizer: DDPNOpt, case: Case, criterion: nn.Module) -> None:
        if form == "closure":
            optimizer.step(lambda: loss(case, criterion))
            return
        optimizer.zero_grad()
        loss(case, criterion).backward()
        optimizer.step()

    # at a ReLU's kink the last bit decides which way a sample goes
    found, wanted, start = (trained(own, n, network, smooth=True) for own, n in ((step, 3), (plain, 3), (plain, 0)))
    for new, full, old in zip(found, wanted, start, strict=True):
        assert new.dtype == torch.float32
        assert (new - full).norm() < 0.05 * (full - old).norm()


def scaled(optimizer: DDPNOpt, case: Case, loss: Tensor, scale: float, clip: float | None = None) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(case.model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()


SETTINGS: dict[str, dict[str, Any]] = {
    "batch": {"lr": 0.1},
    "identity": {"lr": 0.1, "curvature": Identity()},
    "sample": {"lr": 1e-2, "coupling": "sample"},
    "ekfac": {"lr": 1e-2, "coupling": "sample", "feedback": False, "curvature": EigenKronecker()},
    "matched": {"lr": 0.1, "terminal": "matched"},
    "exact": {"lr": 0.1, "terminal": "exact"},
    "sum": {"lr": 0.1, "terminal": "sum"},
}


def with_terminal(name: str) -> tuple[dict[str, Any], nn.Module]:
    reduction = "sum" if name == "sum" else "mean"
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    terminals: dict[str | None, Any] = {
        "matched": Matched(criterion),
        "exact": Exact(criterion, cap=1.0),
        "sum": Gradient("sum"),
        None: None,
    }
    return {**SETTINGS[name], "terminal": terminals[SETTINGS[name].get("terminal")]}, criterion


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", SETTINGS)
def test_unscaling_before_the_step_changes_nothing(name: str, network: str) -> None:
    # rounding turns the eigenbasis freely where eigenvalues meet, at zero: for it a power of two, which does not round
    scale = 1024.0 if name == "ekfac" else 3000.0

    def weights(scaling: bool) -> list[Tensor]:
        torch.manual_seed(5)
        case = NETWORKS[network]()
        settings, criterion = with_terminal(name)
        optimizer = DDPNOpt(case.model, **settings)
        for _ in range(3):
            if scaling:
                scaled(optimizer, case, criterion(case.model(case.x), case.y), scale)
            else:
                plain(optimizer, case, criterion)
        return [p.detach() for p in case.model.parameters()]

    close(weights(True), weights(False), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["batch", "sample", "ekfac", "matched"])
def test_unscaled_and_clipped_is_the_loss_times_the_clip_s_factor(name: str) -> None:
    def weights(scaling: bool) -> list[Tensor]:
        torch.manual_seed(5)
        case = NETWORKS["mlp"]()
        settings, criterion = with_terminal(name)
        optimizer = DDPNOpt(case.model, **settings)
        for _ in range(3):
            loss = criterion(case.model(case.x), case.y)
            if scaling:
                scaled(optimizer, case, loss, 1024.0, clip=0.05)
                continue
            gradients = torch.autograd.grad(loss, list(case.model.parameters()), retain_graph=True)
            norm = float(torch.stack([g.norm() for g in gradients]).norm())
            assert norm > 0.1
            optimizer.zero_grad()
            (loss * (0.05 / (norm + 1e-6))).backward()
            optimizer.step()
        return [p.detach() for p in case.model.parameters()]

    close(weights(True), weights(False), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("unscale", [True, False])
def test_half_precision_with_a_scaler_and_clipping_trains(unscale: bool) -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(5)
    case, criterion, loss = NETWORKS["conv"](), nn.CrossEntropyLoss(), autocast(torch.float16)
    optimizer, scaler = DDPNOpt(case.model), torch.amp.GradScaler("cpu")
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss(case, criterion)
        losses.append(float(value.detach()))
        scaler.scale(value).backward()
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(case.model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.diagnostics()["skipped_steps"] < 4


class OverTokens(nn.CrossEntropyLoss):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return super().forward(output.flatten(0, 1), target.flatten())


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("terminal", [Matched, partial(Sampled, cap=1.0)])
def test_half_precision_holds_a_mean_over_many_confident_tokens(terminal: Any, unscale: bool) -> None:
    """Of 32 x 20 tokens that the model is sure of: squares of such gradients are below what float16 holds."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(5)
    model, criterion = nn.Linear(8, 64), OverTokens()
    x, y = torch.randn(32, 20, 8), torch.full((32, 20), 3)
    with torch.no_grad():
        model.bias[3] = 9.0
    optimizer, scaler = DDPNOpt(model, terminal=terminal(criterion)), torch.amp.GradScaler("cpu")
    before = model.weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            value = criterion(model(x), y)
        scaler.scale(value).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert not torch.equal(model.weight, before)


def unscaled_step(optimizer: DDPNOpt, loss: Callable[[], Tensor], scaler: torch.amp.GradScaler | None) -> None:
    """A step with the scaler's ``unscale_`` before it, or a plain one."""
    optimizer.zero_grad()
    if scaler is None:
        loss().backward()
        optimizer.step()
        return
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


class AllTied(nn.Module):
    """Has no parameter but one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(tokens).tanh().mean(1))
        return out


class Mixing(nn.Module):
    """The generic rule fails on it: no gradient belongs to one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) * self.gain


@pytest.mark.parametrize("make", [AllTied, lambda: nn.Sequential(nn.Embedding(7, 3), Mixing(), nn.Flatten())])
@pytest.mark.filterwarnings("ignore:.*generic rule failed")
def test_the_scale_is_found_in_any_layer(make: Callable[[], nn.Module]) -> None:
    def weights(scaler: torch.amp.GradScaler | None) -> list[Tensor]:
        torch.manual_seed(5)
        model, criterion = make(), nn.CrossEntropyLoss()
        x, y = torch.randint(7, (6, 3)), torch.randint(7, (6,))
        optimizer = DDPNOpt(model, lr=1.0)
        for _ in range(2):
            unscaled_step(optimizer, lambda: criterion(model(x), y), scaler)
        return [p.detach() for p in model.parameters()]

    close(weights(torch.amp.GradScaler("cpu", init_scale=1024.0)), weights(None))


class Tables(nn.Module):
    """Products of rows: of large tables few entries have a gradient."""

    def __init__(self, rows: int, sparse: bool) -> None:
        super().__init__()
        self.one, self.other = (nn.Embedding(rows, 4, sparse=sparse) for _ in range(2))

    def forward(self, pairs: Tensor) -> Tensor:
        out: Tensor = (self.one(pairs[:, 0]) * self.other(pairs[:, 1])).sum(1)
        return out


@pytest.mark.parametrize(("rows", "sparse"), [(9, True), (9999, False)])
def test_the_scale_is_found_where_no_remembered_entry_tells(rows: int, sparse: bool) -> None:
    def weights(scaler: torch.amp.GradScaler | None) -> list[Tensor]:
        torch.manual_seed(5)
        model = Tables(rows, sparse)
        optimizer, pairs = DDPNOpt(model), torch.randint(1, 8, (6, 2))
        for _ in range(2):
            unscaled_step(optimizer, lambda: (model(pairs) - 1).square().mean(), scaler)
        return [p.detach() for p in model.parameters()]

    close(weights(torch.amp.GradScaler("cpu", init_scale=1024.0)), weights(None))


def test_rows_edited_after_unscaling_hide_the_scale() -> None:
    model, scaler = Tables(9, sparse=True), torch.amp.GradScaler("cpu")
    optimizer = DDPNOpt(model)
    scaler.scale((model(torch.randint(1, 8, (6, 2))) - 1).square().mean()).backward()
    scaler.unscale_(optimizer)
    gradient = model.one.weight.grad
    assert gradient is not None
    gradient._values().mul_(2)
    with pytest.raises(StepError, match="so the scale cannot be told"):
        scaler.step(optimizer)


def test_what_is_remembered_of_gradients() -> None:
    layers = nn.Linear(128, 64), nn.Linear(64, 2)
    parameters = [p for layer in layers for p in layer.parameters()]
    clips = Clips()
    clips.watch(parameters)
    layers[1](layers[0](torch.randn(3, 128))).sum().backward()
    clips.watch([*parameters[1:], parameters[0]])  # as when a layer is thawed
    heard = clips.heard
    assert heard is not None
    assert len(heard) == 1
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 0.5)
    assert clips.factor() == pytest.approx(0.5)
    gradient = parameters[0].grad
    assert gradient is not None
    gradient[:, 64:] = 0  # every 128th entry, of 8,192, would be of the first column
    assert clips.factor() is None
    clips.forget()
    assert not heard
    assert clips.factor() == 1.0


def test_the_scale_is_found_where_a_layer_was_thawed() -> None:
    def weights(scaler: torch.amp.GradScaler | None) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
        first = case.model[0].requires_grad_(False)
        optimizer = DDPNOpt(case.model)
        for step in range(3):
            first.requires_grad_(step > 0)
            unscaled_step(optimizer, lambda: criterion(case.model(case.x), case.y), scaler)
        return [p.detach() for p in case.model.parameters()]

    close(weights(torch.amp.GradScaler("cpu", init_scale=1024.0)), weights(None))


def test_gradients_changed_by_different_factors_hide_the_scale() -> None:
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    optimizer, scaler = DDPNOpt(case.model), torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in case.model.parameters()]
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda g: g.mul_(2), lambda g: g.clamp_(-1e-3, 1e-3), lambda g: g.neg_(), lambda g: g.zero_()
    ]  # fmt: skip
    for change in changes:
        optimizer.zero_grad()
        scaler.scale(criterion(case.model(case.x), case.y)).backward()
        scaler.unscale_(optimizer)
        gradient = case.model[2].weight.grad
        assert isinstance(gradient, Tensor)
        change(gradient)
        with pytest.raises(StepError, match="not those of the backward pass times one factor"):
            scaler.step(optimizer)
        scaler.update(1024.0)
    assert equal([p.detach() for p in case.model.parameters()], before)


def test_a_closure_under_a_scaler_is_refused() -> None:
    case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss()
    optimizer, scaler = DDPNOpt(case.model), torch.amp.GradScaler("cpu")
    scaler.scale(criterion(case.model(case.x), case.y)).backward()
    with pytest.raises(StepError, match="without a closure"):
        scaler.step(optimizer, lambda: criterion(case.model(case.x), case.y))


@pytest.mark.parametrize("sizes", [[12], [4, 4, 4], [7, 4, 1], [1, 11]])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("coupling", "feedback"), [("batch", True), ("sample", True), ("sample", False)])
def test_micro_batches_however_uneven_are_the_batch(
    sizes: list[int], reduction: Any, coupling: Any, feedback: bool
) -> None:
    def weights(sizes: list[int]) -> list[Tensor]:
        torch.manual_seed(5)
        case, criterion = NETWORKS["mlp"](), nn.CrossEntropyLoss(reduction=reduction)
        x, y = torch.randn(12, 4), torch.randint(3, (12,))
        optimizer = DDPNOpt(case.model, 0.01, terminal=Gradient(reduction), coupling=coupling, feedback=feedback)
        for _ in range(3):
            optimizer.zero_grad()
            for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
                share = len(part_x) / len(x) if reduction == "mean" else 1.0
                (criterion(case.model(part_x), part_y) * share).backward()
            optimizer.step()
        return [p.detach() for p in case.model.parameters()]

    close(weights(sizes), weights([12]), rtol=1e-5, atol=1e-8)


def test_a_mean_over_micro_batches_of_different_size_weighs_samples_as_the_loss_does() -> None:
    """loss / k of uneven micro-batches is no batch mean: each sample counts by its own micro-batch's size."""

    def weights(accumulated: bool) -> list[Tensor]:
        torch.manual_seed(5)
        case = NETWORKS["mlp"]()
        each = nn.CrossEntropyLoss(reduction="none")
        x, y = torch.randn(12, 4), torch.randint(3, (12,))
        optimizer = DDPNOpt(case.model, 0.1)
        sizes = [9, 3]
        if accumulated:
            for part_x, part_y in zip(x.split(sizes), y.split(sizes), strict=True):
                (each(case.model(part_x), part_y).mean() / 2).backward()
        else:
            share = torch.cat([torch.full((n,), 1 / (2 * n)) for n in sizes])
            (each(case.model(x), y) * share).sum().backward()
        optimizer.step()
        return [p.detach() for p in case.model.parameters()]

    close(weights(True), weights(False))


@pytest.mark.parametrize("coupling", ["batch", "sample"])
def test_sparse_gradients_count_as_the_dense_ones_they_stand_for(coupling: Any) -> None:
    def weights(form: str) -> list[Tensor]:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Embedding(7, 4, sparse=form != "dense"), nn.Flatten(), nn.Linear(8, 3))
        x, y, criterion = torch.randint(7, (5, 2)), torch.randint(3, (5,)), nn.CrossEntropyLoss()
        optimizer = DDPNOpt(model, 0.01, coupling=coupling)
        optimizer.zero_grad()
        if form == "closure":
            optimizer.step(lambda: criterion(model(x), y))
        else:
            criterion(model(x), y).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    plain, closure, dense = weights("plain"), weights("closure"), weights("dense")
    close(plain, closure)
    close(plain, dense)


def test_a_state_of_other_shapes_is_refused_when_it_is_loaded() -> None:
    def optimizer_of(*widths: int, **settings: Any) -> DDPNOpt:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, widths[0]), nn.Tanh(), nn.Linear(widths[0], 3))
        optimizer, criterion = DDPNOpt(model, **settings), nn.CrossEntropyLoss()
        plain(optimizer, Case(model, torch.randn(5, 4), torch.randint(3, (5,))), criterion)
        return optimizer

    every: list[dict[str, Any]] = [
        {},
        {"curvature": EigenKronecker()},
        {"curvature": Identity(), "momentum": 0.5},
        {"curvature": Identity(), "momentum": 0.5, "coupling": "sample", "feedback": False},
    ]
    for settings in every:
        saved, other = optimizer_of(6, **settings).state_dict(), optimizer_of(5, **settings)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=r"the saved state of 0\.weight does not fit: '\w+' has shape"):
            other.load_state_dict(saved)
        assert str(other.state_dict()) == str(before)
        other.load_state_dict(before)
