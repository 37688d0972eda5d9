"""What torch asks of its own optimizers, asked of this one: the tests of its ``TestOptimRenewed``, by their names.

torch ships the harness (``OptimizerInfo``, and the error inputs that all optimizers share) but not the tests, so the
bodies are ours. Each runs for bare parameters, as there, and where it makes sense for a module: a strided convolution
with BatchNorm. ``INAPPLICABLE`` says why the others do not run; a test holds the two against the list.
"""

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ddpnopt import Adaptive, DDPNOpt, EigenKronecker, Identity, Kronecker

pytest.importorskip("expecttest", reason="torch's test harness needs it")
common = pytest.importorskip("torch.testing._internal.common_optimizers")
# the import freezes torch's backend flags for the whole process, a rule of torch's own test suite
torch.backends.__allow_nonbracketed_mutation_flag = True

FLAG = "concerns the {} flag, which this optimizer does not have: an unknown keyword is refused by Python itself"
FOREACH, FUSED = FLAG.format("foreach"), FLAG.format("fused")
GPU = "needs CUDA tensors; states follow their parameter's device by the code that the CPU tests run"

INAPPLICABLE = {
    "test_forloop_goes_right_direction_multigpu": "needs two GPUs, and one forward pass spanning both is not supported",
    "test_rosenbrock_sparse": "OptimizerInfo(supports_sparse=False): sparse gradients count as the dense ones they"
    " stand for (test_recipes.py); sparse parameters are refused (test_errors)",
    "test_complex": "OptimizerInfo(supports_complex=False): refused by name (test_errors)",
    "test_complex_2d": "OptimizerInfo(supports_complex=False): refused by name (test_errors)",
    "test_foreach_matches_forloop": FOREACH,
    "test_mixed_device_dtype": FOREACH,
    "test_set_default_dtype_works_with_foreach": FOREACH,
    "test_foreach_large_tensor": FOREACH,
    "test_peak_memory_foreach": FOREACH,
    "test_defaults_changed_to_foreach": FOREACH,
    "test_fused_matches_forloop": FUSED,
    "test_fused_error_on_params_on_meta": FUSED,
    "test_fused_large_tensor": FUSED,
    "test_fused_does_not_step_if_foundinf": FUSED + "; a scaler's found_inf: test_nonfinite.py",
    "test_fused_cpu_matches_cuda": FUSED,
    "test_cpu_load_state_dict": FLAG.format("fused or capturable"),
    "test_state_dict_with_cuda_params": GPU,
    "test_second_order_optims_return_consistent_types": "is about LBFGS's tolerance_grad",
}

# as of torch 2.13
UPSTREAM = [
    *INAPPLICABLE,
    "test_optim_infos_do_not_specify_global_cliquey_kwargs",
    "test_errors",
    "test_forloop_goes_right_direction",
    "test_param_group_with_lrscheduler_goes_right_direction",
    "test_tensor_lr",
    "test_param_groups_weight_decay",
    "test_param_groups_lr",
    "test_step_is_noop_when_params_have_no_grad",
    "test_step_is_noop_for_zero_grads",
    "test_optimizer_can_be_printed",
    "test_state_dict_deterministic",
    "test_can_load_older_state_dict",
    "test_can_load_from_to_named_state_dict",
    "test_save_load_equality_with_weights_only",
    "test_load_nontensor_step",
    "test_state_dict_pre_hook",
    "test_state_dict_post_hook",
    "test_state_dict_pre_post_hook",
    "test_load_state_dict_pre_hook_and_prepend",
    "test_load_state_dict_post_hook",
    "test_load_state_dict_pre_post_hook",
    "test_step_post_hook",
    "test_step_pre_hook",
    "test_step_all_hooks",
    "test_deepcopy_copies_all_public_attrs",
    "test_non_empty_state",
]


def test_every_name_is_either_here_or_explained() -> None:
    here = {name for name in globals() if name in set(UPSTREAM)}
    assert here.isdisjoint(INAPPLICABLE)
    assert here | set(INAPPLICABLE) == set(UPSTREAM)
    assert len(UPSTREAM) == len(set(UPSTREAM))


def test_no_name_that_the_installed_torch_mentions_is_missing() -> None:
    rules = [rule for info in common.optim_db for rule in info.decorators if hasattr(rule, "test_name")]
    mentioned = {rule.test_name for rule in rules if rule.cls_name == "TestOptimRenewed" and rule.test_name}
    assert mentioned
    assert mentioned <= set(UPSTREAM)


def optim_inputs_func_ddpnopt(device: str, dtype: torch.dtype | None = None) -> list[Any]:
    settings: dict[str, dict[str, Any]] = {
        "default": {},
        "non-default lr": {"lr": 1e-2},
        "Tensor lr": {"lr": torch.tensor(0.001)},
        "nonzero weight_decay": {"weight_decay": 0.1},
        "momentum": {"momentum": 0.9, "lr": 0.01},
        "weight_decay w/ momentum": {"momentum": 0.9, "weight_decay": 0.1, "lr": 0.01},
        "identity": {"curvature": Identity(), "lr": 1e-3},
        "adaptive": {"curvature": Adaptive(), "lr": 1e-2},
        "eigenbasis": {"curvature": EigenKronecker(), "lr": 1e-2},
        "per sample": {"coupling": "sample", "curvature": Kronecker(), "lr": 1e-4},
        "no feedback": {"feedback": False, "lr": 1e-2},
        "sgd": {"coupling": "sample", "feedback": False, "curvature": Identity(), "lr": 1e-3},
        "rmsprop": {"coupling": "sample", "feedback": False, "curvature": Adaptive(), "lr": 1e-3},
    }
    return [common.OptimizerInput(params=None, kwargs=kwargs, desc=name) for name, kwargs in settings.items()]


def optim_error_inputs_func_ddpnopt(device: str, dtype: torch.dtype) -> list[Any]:
    refused: list[tuple[Any, dict[str, Any], str, type[Exception], str]] = [
        (None, {"lr": -1.0}, "lr", ValueError, "Invalid lr: -1.0"),
        (None, {"momentum": -0.5}, "momentum", ValueError, "Invalid momentum: -0.5"),
        (None, {"weight_decay": -1.0}, "weight_decay", ValueError, "Invalid weight_decay: -1.0"),
        (None, {"maximize": True}, "maximize", TypeError, "maximize"),
        (None, {"foreach": True}, "foreach", TypeError, "foreach"),
        (
            [{"params": [Parameter(torch.ones(2))], "maximize": True}],
            {},
            "maximize in a group",
            ValueError,
            "negative of the objective",
        ),
        (
            [("weight", torch.rand(2, 3, dtype=torch.complex64, requires_grad=True))],
            {},
            "complex",
            ValueError,
            "weight of shape .2, 3. is torch.complex64: complex and sparse parameters are not supported",
        ),
        ([torch.zeros(2, 2).to_sparse().requires_grad_()], {}, "sparse", ValueError, "is torch.sparse_coo"),
    ]
    own = [
        common.ErrorOptimizerInput(
            common.OptimizerInput(params=params, kwargs=kwargs, desc=desc), error_type=kind, error_regex=says
        )
        for params, kwargs, desc, kind, says in refused
    ]
    return [*common.get_error_inputs_for_all_optims(device, dtype), *own]


INFO = common.OptimizerInfo(
    DDPNOpt,
    optim_inputs_func=optim_inputs_func_ddpnopt,
    optim_error_inputs_func=optim_error_inputs_func_ddpnopt,
    supported_impls=(),
    not_og_supported_flags=(),
    supports_complex=False,
    supports_sparse=False,
)
INPUTS = [given.desc for given in optim_inputs_func_ddpnopt("cpu")]
every_input = pytest.mark.parametrize("desc", INPUTS)


def kwargs_of(desc: str) -> dict[str, Any]:
    """Fresh each time: a scheduler writes into a Tensor lr."""
    return next(dict(given.kwargs) for given in INFO.optim_inputs_func("cpu") if given.desc == desc)


@pytest.fixture(autouse=True)
def single_precision() -> None:
    torch.set_default_dtype(torch.float32)  # the fixture for all tests restores it


@dataclass
class Problem:
    """What to give the optimizer, the parameters, and the loss; ``module``: that it owns them, if it does."""

    given: Any
    parameters: list[Tensor]
    loss: Callable[[], Tensor]
    module: nn.Module | None = None

    def again(self) -> "Problem":
        """The same with parameters of its own."""
        return bare(self.parameters) if self.module is None else module(self.module)


def bare(weights: list[Tensor] | None = None, *, contiguous: bool = True, named: bool = False) -> Problem:
    torch.manual_seed(7)
    if contiguous:
        drawn = [torch.randn(10, 5), torch.randn(10)]
    else:
        drawn = [torch.randn(10, 5, 2)[..., 0], torch.randn(10, 2)[..., 0]]
    parameters: list[Tensor] = [Parameter(w.detach().clone() if weights else w) for w in weights or drawn]
    weight, bias = parameters
    x = torch.randn(5)
    given = [("weight", weight), ("bias", bias)] if named else parameters
    return Problem(given, parameters, lambda: (weight.mv(x) + bias).pow(2).sum())


def conv_norm() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(4, 2, 1, stride=2), nn.BatchNorm2d(2, eps=1e-05, momentum=0.1))


def module(like: nn.Module | None = None) -> Problem:
    model = conv_norm() if like is None else copy.deepcopy(like)
    torch.manual_seed(7)
    x, target = torch.rand(3, 4, 6, 6), torch.randn(3, 2, 3, 3)
    return Problem(model, list(model.parameters()), lambda: (model(x) - target).square().mean(), model)


PROBLEMS: dict[str, Callable[[], Problem]] = {"bare": bare, "module": module}
every_problem = pytest.mark.parametrize("problem", PROBLEMS)


def closure_of(optimizer: DDPNOpt, problem: Problem) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss()
        loss.backward()
        return loss

    return closure


def run(optimizer: DDPNOpt, problem: Problem, steps: int) -> None:
    closure = closure_of(optimizer, problem)
    for _ in range(steps):
        closure()
        optimizer.step()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def test_optim_infos_do_not_specify_global_cliquey_kwargs() -> None:
    for given in INFO.optim_inputs_func("cpu"):
        assert not {"foreach", "fused", "differentiable"} & given.kwargs.keys()


@pytest.mark.parametrize("i", range(len(optim_error_inputs_func_ddpnopt("cpu", torch.float32))))
def test_errors(i: int) -> None:
    refused = INFO.optim_error_inputs_func("cpu", torch.float32)[i]
    assert refused.error_on == common.OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = refused.optimizer_error_input
    # where torch's inputs leave the parameters to the test, a good one shows that it is the setting which is refused
    attempts: list[Any] = [[Parameter(torch.ones(2, 2))], None] if given.params is None else [given.params]
    for attempt in attempts:
        if issubclass(refused.error_type, Warning):
            with pytest.warns(refused.error_type, match=refused.error_regex):
                DDPNOpt(attempt, **given.kwargs)
        else:
            with pytest.raises(refused.error_type, match=refused.error_regex):
                DDPNOpt(attempt, **given.kwargs)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedulers", [[], *INFO.scheduler_inputs], ids=["constant", "scheduled"])
@every_input
@every_problem
def test_forloop_goes_right_direction(
    problem: str, desc: str, schedulers: list[Callable[..., Any]], contiguous: bool
) -> None:
    if problem == "bare":
        made = bare(contiguous=contiguous)
    else:
        made = module()
        if not contiguous:
            made.module.to(memory_format=torch.channels_last)  # type: ignore[union-attr, call-overload]
    optimizer = DDPNOpt(made.given, **kwargs_of(desc))
    scheduled = [make(optimizer) for make in schedulers]
    closure = closure_of(optimizer, made)
    first = float(closure().detach())
    for _ in range(20):
        loss = closure()
        optimizer.step()
        _advance(scheduled, loss)
    assert float(closure().detach()) < first


def _advance(schedulers: list[Any], loss: Tensor) -> None:
    for scheduler in schedulers:
        assert isinstance(scheduler, LRScheduler)
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss.detach())
        else:
            scheduler.step()


@every_problem
def test_param_group_with_lrscheduler_goes_right_direction(problem: str) -> None:
    made = PROBLEMS[problem]()
    first, *rest = made.parameters
    if made.module is None:
        optimizer = DDPNOpt([{"params": [first]}, {"params": rest, "lr": 0.01}])
    else:
        optimizer = DDPNOpt(made.module)
        optimizer.param_groups[0]["params"] = [first]
        optimizer.add_param_group({"params": rest, "lr": 0.01})
    scheduled = [make(optimizer) for make in INFO.scheduler_inputs[0]]
    closure = closure_of(optimizer, made)
    before = float(closure().detach())
    for _ in range(20):
        loss: Tensor = optimizer.step(closure)
        _advance(scheduled, loss)
    assert float(closure().detach()) < before


@every_input
@every_problem
def test_tensor_lr(problem: str, desc: str) -> None:
    kwargs = kwargs_of(desc)
    one = PROBLEMS[problem]()
    other = one.again()
    number, tensor = (DDPNOpt(p.given, **{**kwargs, "lr": lr}) for p, lr in ((one, 1e-3), (other, torch.tensor(1e-3))))
    for _ in range(5):
        run(number, one, 1)
        run(tensor, other, 1)
        for a, b in zip(one.parameters, other.parameters, strict=True):
            torch.testing.assert_close(a, b)


@every_input
def test_param_groups_weight_decay(desc: str) -> None:
    made, kwargs = bare(), kwargs_of(desc)
    weight, bias = made.parameters
    own: dict[str, Any] = {name: kwargs.pop(name) for name in ("lr", "momentum", "weight_decay") if name in kwargs}
    groups: list[dict[str, Any]] = [{"params": [weight], **own}, {"params": [bias], **own, "weight_decay": 0.0}]
    optimizer = DDPNOpt(groups, **kwargs)
    first = float(made.loss().detach())
    run(optimizer, made, 20)
    assert float(made.loss().detach()) < first


@every_input
@every_problem
def test_param_groups_lr(problem: str, desc: str) -> None:
    made, kwargs = PROBLEMS[problem](), kwargs_of(desc)
    own: dict[str, Any] = {name: kwargs.pop(name) for name in ("lr", "momentum", "weight_decay") if name in kwargs}
    own.setdefault("lr", 1e-3)
    irrelevant = Parameter(torch.randn(2))
    before = irrelevant.detach().clone()
    if made.module is None:
        optimizer = DDPNOpt([{"params": made.parameters, **own}, {"params": [irrelevant]}], lr=1e-28, **kwargs)
    else:
        optimizer = DDPNOpt(made.module, **own, **kwargs)
        optimizer.add_param_group({"params": [irrelevant], "lr": 1e-28, "momentum": 0.0, "weight_decay": 0.0})
    first = float(made.loss().detach())
    for _ in range(20):
        closure_of(optimizer, made)()
        irrelevant.grad = torch.rand_like(irrelevant)
        optimizer.step()
    assert float(made.loss().detach()) < first
    torch.testing.assert_close(irrelevant.detach(), before)


@every_input
def test_step_is_noop_when_params_have_no_grad(desc: str) -> None:
    params = [torch.randn(2, 3) for _ in range(2)]
    before = [p.clone() for p in params]
    optimizer = DDPNOpt(params, **kwargs_of(desc))
    assert float(optimizer.step(lambda: torch.tensor([1.0]))) == 1.0
    assert same(params, before)


@pytest.mark.parametrize("desc", [desc for desc in INPUTS if "weight_decay" not in desc])  # decay needs no gradient
@every_problem
def test_step_is_noop_for_zero_grads(problem: str, desc: str) -> None:
    kwargs = {"weight_decay": 0.0, **kwargs_of(desc)}
    made = PROBLEMS[problem]()
    before = [p.detach().clone() for p in made.parameters]
    optimizer = DDPNOpt(made.given, **kwargs)
    (made.loss() * 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step(lambda: made.loss() * 0)
    assert same([p.detach() for p in made.parameters], before)


@every_input
@every_problem
def test_optimizer_can_be_printed(problem: str, desc: str) -> None:
    assert repr(DDPNOpt(PROBLEMS[problem]().given, **kwargs_of(desc))).startswith("DDPNOpt (")


@pytest.mark.parametrize("named", [(True, True), (True, False), (False, True), (False, False)])
@every_input
def test_state_dict_deterministic(desc: str, named: tuple[bool, bool]) -> None:
    made = bare(named=named[0])
    optimizer = DDPNOpt(made.given, **kwargs_of(desc))
    run(optimizer, made, 10)
    other = bare(made.parameters, named=named[1])
    again = DDPNOpt(other.given, **kwargs_of(desc))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _stay_together(made, optimizer, other, again)
    again.param_groups.extend(again.param_groups)
    assert same(_unnamed(optimizer)["param_groups"][-1], _unnamed(again)["param_groups"][-1])


@every_input
def test_state_dict_deterministic_for_a_module(desc: str) -> None:
    made = module()
    optimizer = DDPNOpt(made.given, **kwargs_of(desc))
    run(optimizer, made, 10)
    other = made.again()
    again = DDPNOpt(other.given, **kwargs_of(desc))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _stay_together(made, optimizer, other, again)


def _stay_together(made: Problem, optimizer: DDPNOpt, other: Problem, again: DDPNOpt) -> None:
    for _ in range(10):
        run(optimizer, made, 1)
        run(again, other, 1)
        assert same([p.detach() for p in made.parameters], [p.detach() for p in other.parameters])
    assert same(_unnamed(optimizer), _unnamed(again))


def _unnamed(optimizer: DDPNOpt) -> dict[str, Any]:
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group.pop("param_names", None)
    return state


@every_input
@pytest.mark.parametrize("whole", [True, False])
def test_can_load_older_state_dict(desc: str, whole: bool) -> None:
    """Older: without what has been added beside torch's own since 0.1."""
    made = module()
    optimizer = DDPNOpt(made.given if whole else made.parameters, **kwargs_of(desc))
    run(optimizer, made, 3)
    older = copy.deepcopy(optimizer.state_dict())
    older.pop("skipped_steps")
    older.pop("usual_clip")
    for state in older["state"].values():
        state.pop("parameters")
    for group in older["param_groups"]:
        group.pop("decoupled_weight_decay")
    optimizer.load_state_dict(older)
    run(optimizer, made, 1)
    assert optimizer.state_dict()["steps"] == 4


@pytest.mark.parametrize("named", [(True, True), (True, False), (False, True), (False, False)])
@every_input
def test_can_load_from_to_named_state_dict(desc: str, named: tuple[bool, bool]) -> None:
    made = module()
    model = made.module
    assert model is not None

    def make(with_names: bool) -> DDPNOpt:
        return DDPNOpt(model.named_parameters() if with_names else model.parameters(), **kwargs_of(desc))

    optimizer, again = make(named[0]), make(named[1])
    run(optimizer, made, 3)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(again, made, 1)
    if any(named):
        assert again.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]


@every_input
@every_problem
def test_save_load_equality_with_weights_only(problem: str, desc: str) -> None:
    made = PROBLEMS[problem]()
    optimizer = DDPNOpt(made.given, **kwargs_of(desc))
    closure = closure_of(optimizer, made)
    for _ in range(3):
        optimizer.step(closure)
    saved, buffer = optimizer.state_dict(), io.BytesIO()
    torch.save(saved, buffer)
    for weights_only in (False, True):
        buffer.seek(0)
        assert same(torch.load(buffer, weights_only=weights_only), saved)


@every_input
@every_problem
def test_load_nontensor_step(problem: str, desc: str) -> None:
    """Ours is a number from the start; a tensor, as torch's own are, must do as well."""
    made = PROBLEMS[problem]()
    optimizer = DDPNOpt(made.given, **kwargs_of(desc))
    run(optimizer, made, 3)
    changes: list[Callable[[Any], Any]] = [float, torch.tensor]
    for change in changes:
        state = copy.deepcopy(optimizer.state_dict())
        for own in state["state"].values():
            own |= {"step": change(own["step"])} if "step" in own else {}
        optimizer.load_state_dict(state)
        run(optimizer, made, 1)


def _mark(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state["test"] = 1  # type: ignore[index]


def _unmark(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    assert "steps" in state_dict  # the hook sees what this optimizer adds
    return {**state_dict, "marked": state_dict["state"].pop("test", None) is not None}


@every_problem
def test_state_dict_pre_hook(problem: str) -> None:
    optimizer = DDPNOpt(PROBLEMS[problem]().given)
    optimizer.register_state_dict_pre_hook(_mark)
    assert optimizer.state_dict()["state"]["test"] == 1


@every_problem
def test_state_dict_post_hook(problem: str) -> None:
    optimizer = DDPNOpt(PROBLEMS[problem]().given)
    optimizer.register_state_dict_post_hook(_unmark)
    assert optimizer.state_dict()["marked"] is False


@every_problem
def test_state_dict_pre_post_hook(problem: str) -> None:
    optimizer = DDPNOpt(PROBLEMS[problem]().given)
    optimizer.register_state_dict_pre_hook(_mark)
    optimizer.register_state_dict_post_hook(_unmark)
    state = optimizer.state_dict()
    assert "test" not in state["state"]
    assert state["marked"] is True


def _set_lr(lr: float, *, copied: bool) -> Callable[[torch.optim.Optimizer, dict[str, Any]], dict[str, Any] | None]:
    def hook(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        changed = copy.deepcopy(state_dict) if copied else state_dict
        changed["param_groups"][0]["lr"] = lr
        changed["steps"] = 40
        return changed if copied else None

    return hook


@every_problem
def test_load_state_dict_pre_hook_and_prepend(problem: str) -> None:
    optimizer = DDPNOpt(PROBLEMS[problem]().given)
    state = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(_set_lr(0.002, copied=False))
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(_set_lr(0.003, copied=True), prepend=True)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.002  # the first one ran last


def _note(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state["lr"] = optimizer.param_groups[0]["lr"]  # type: ignore[index]


@every_problem
def test_load_state_dict_post_hook(problem: str) -> None:
    optimizer = DDPNOpt(PROBLEMS[problem]().given)
    optimizer.register_load_state_dict_post_hook(_note)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state["lr"] == 0.1  # type: ignore[index]


@every_problem
def test_load_state_dict_pre_post_hook(problem: str) -> None:
    """A hook that returns another state is obeyed in everything, also in what this optimizer adds to torch's."""
    made = PROBLEMS[problem]()
    optimizer = DDPNOpt(made.given)
    run(optimizer, made, 2)

    def halve(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(state_dict)
        for state in changed["state"].values():
            state |= {name: value / 2 for name, value in state.items() if isinstance(value, Tensor)}
        return changed

    optimizer.register_load_state_dict_pre_hook(_set_lr(0.003, copied=True))
    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_post_hook(_note)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.state.pop("lr") == 0.003  # type: ignore[call-overload]
    assert optimizer.state_dict()["steps"] == 40
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert same(value, saved["state"][key][name] / 2 if isinstance(value, Tensor) else value)


def _count_hooks(kind: str, problem: str) -> None:
    made = PROBLEMS[problem]()
    optimizer = DDPNOpt(made.given, 1e-3)
    seen: list[int] = []

    def hook(given: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert given is optimizer
        seen.append(optimizer.state_dict()["steps"])

    register = optimizer.register_step_pre_hook if kind == "pre" else optimizer.register_step_post_hook
    handle = register(hook)
    run(optimizer, made, 2)
    handle.remove()
    run(optimizer, made, 1)
    assert seen == ([0, 1] if kind == "pre" else [1, 2])


@every_problem
def test_step_pre_hook(problem: str) -> None:
    _count_hooks("pre", problem)


@every_problem
def test_step_post_hook(problem: str) -> None:
    _count_hooks("post", problem)


@every_problem
def test_step_all_hooks(problem: str) -> None:
    made = PROBLEMS[problem]()
    optimizer, other = DDPNOpt(made.given, 1e-3), torch.optim.SGD(made.parameters, 1e-3)
    order: list[str] = []

    def say(what: str) -> Callable[..., None]:
        return lambda *_: order.append(what)

    handles = [
        register_optimizer_step_pre_hook(say("global pre")),
        register_optimizer_step_post_hook(say("global post")),
        optimizer.register_step_pre_hook(say("pre")),
        optimizer.register_step_post_hook(say("post")),
        other.register_step_pre_hook(say("pre")),
        other.register_step_post_hook(say("post")),
    ]
    try:
        once = ["global pre", "pre", "post", "global post"]
        run(optimizer, made, 1)
        assert order == once
        other.step()
        assert order == once * 2
        run(optimizer, made, 1)
        assert order == once * 3
    finally:
        for handle in handles:
            handle.remove()
    run(optimizer, made, 1)
    other.step()
    assert order == once * 3


@every_input
@every_problem
def test_deepcopy_copies_all_public_attrs(problem: str, desc: str) -> None:
    made = PROBLEMS[problem]()
    optimizer = DDPNOpt(made.given, **kwargs_of(desc))
    run(optimizer, made, 3)

    def public(thing: object) -> set[str]:
        return {name for name in vars(thing) if not name.startswith("_")}

    twin = copy.deepcopy(optimizer)
    assert public(twin) == public(optimizer)
    assert same(twin.state_dict(), optimizer.state_dict())


@every_input
@every_problem
def test_non_empty_state(problem: str, desc: str) -> None:
    made = PROBLEMS[problem]()
    optimizer = DDPNOpt(made.given, **kwargs_of(desc))
    run(optimizer, made, 1)
    assert optimizer.state
    assert all(len(state) > 0 for state in optimizer.state.values())
