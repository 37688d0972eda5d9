from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import nn

import ddpnopt
from ddpnopt.experiments import models, optimizers
from ddpnopt.experiments.config import TrainConfig, digest, from_dict, resolve
from ddpnopt.experiments.data import DATASETS


@pytest.mark.parametrize(
    ("optimizer", "lr", "momentum"),
    [("ddpnopt", 0.1, 0.5), ("sgd", 0.1, 0.9), ("rmsprop", 0.001, 0), ("adam", 0.001, 0)],
)
def test_defaults_are_filled_in(optimizer: Any, lr: float, momentum: float) -> None:
    config = resolve(TrainConfig("DIGITS", optimizer=optimizer))
    assert (config.dataset, config.model, config.batch_size, config.epochs) == ("digits", "fcn", 16, 5)
    assert (config.lr, config.momentum) == (lr, momentum)
    assert resolve(config) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "nothing"}, "unknown dataset 'nothing'"),
        ({"dataset": ""}, "name a dataset"),
        ({"optimizer": "newton"}, "unknown optimizer 'newton'; choose one of: ddpnopt, sgd"),
        ({"curvature": "flat"}, "unknown curvature 'flat'"),
        ({"model": "transformer"}, "unknown model 'transformer'"),
        ({"model": "cnn"}, "model 'cnn' needs pictures"),
        ({"lr": -1.0}, "lr must be above 0, but it is -1.0"),
        ({"lr": float("nan")}, "lr must be above 0, but it is nan"),
        ({"lr": float("inf")}, "lr must be above 0, but it is inf"),
        ({"momentum": 1.0}, "momentum must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"damping": -0.1}, "damping must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"epochs": 0}, "epochs must be"),
        ({"seed": -1}, "seed must be"),
        ({"log_every": 0}, "log_every must be"),
        ({"checkpoint_every": 0}, "checkpoint_every must be"),
        ({"threads": 0}, "threads must be"),
        ({"optimizer": "adam", "momentum": 0.5}, "adam takes no momentum"),
        ({"optimizer": "sgd", "coupling": "sample"}, "coupling 'sample' has no meaning for optimizer 'sgd'"),
        ({"optimizer": "sgd", "feedback": False}, "feedback False has no meaning"),
    ],
)
def test_bad_settings_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(replace(TrainConfig("iris"), **change))


def test_the_digest_changes_with_every_setting_and_with_what_it_is_told() -> None:
    config = resolve(TrainConfig("iris"))
    others = [digest(replace(config, seed=1)), digest(replace(config, lr=0.2)), digest(config, "code")]
    assert len({digest(config), *others}) == 4
    assert digest(config) == digest(from_dict(asdict(config), "here"))


def test_settings_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r"here\.json does not hold the settings of a run: colour"):
        from_dict(asdict(TrainConfig("iris")) | {"colour": "red"}, "here.json")


@pytest.mark.parametrize("name", DATASETS)
def test_the_dense_network_is_the_papers(name: str) -> None:
    entry = DATASETS[name]
    model = models.build("fcn", entry, seed=0)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in layers] == [entry.width] * 4 + [entry.classes]
    tanh = any(isinstance(module, nn.Tanh) for module in model.modules())
    assert tanh == (name in ("wine", "iris", "digits", "digits-images"))
    assert model(torch.zeros(2, *entry.shape)).shape == (2, entry.classes)


@pytest.mark.parametrize("name", ["digits-images", "mnist", "fashion-mnist", "cifar10", "svhn", "cifar100"])
def test_the_convolutional_network_fits_its_pictures(name: str) -> None:
    entry = DATASETS[name]
    assert models.build("cnn", entry, seed=0)(torch.zeros(2, *entry.shape)).shape == (2, entry.classes)


def test_weights_come_from_the_seed_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (models.build("fcn", DATASETS["iris"], seed)[0].weight for seed in (3, 3, 4))  # type: ignore[index]
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_setting_of_ddpnopt_reaches_it() -> None:
    config = resolve(
        TrainConfig(
            "iris",
            lr=0.3,
            momentum=0.5,
            weight_decay=0.01,
            curvature="eigen-kronecker",
            damping=0.2,
            coupling="sample",
            terminal="sampled",
            columns=2,
            feedback=False,
        )
    )
    criterion = nn.CrossEntropyLoss()
    optimizer = optimizers.build(config, nn.Sequential(nn.Linear(4, 3)), criterion)
    assert isinstance(optimizer, ddpnopt.DDPNOpt)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.5, 0.01)
    assert optimizer.curvature == ddpnopt.EigenKronecker(damping=0.2)
    assert optimizer.terminal == ddpnopt.Sampled(criterion, columns=2)
    assert (optimizer.coupling, optimizer.feedback) == ("sample", False)


@pytest.mark.parametrize("coupling", ["batch", "relinearised", "sample"])
def test_settings_left_out_are_the_librarys(coupling: Any) -> None:
    built = optimizers.build(resolve(TrainConfig("iris", coupling=coupling)), nn.Linear(4, 3), nn.CrossEntropyLoss())
    assert isinstance(built, ddpnopt.DDPNOpt)
    assert built.defaults == ddpnopt.DDPNOpt(nn.Linear(4, 3), coupling=built.coupling).defaults


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("rmsprop", torch.optim.RMSprop), ("adam", torch.optim.Adam)]
)
def test_rivals_are_torchs_own(name: Any, kind: type[torch.optim.Optimizer]) -> None:
    config = resolve(TrainConfig("iris", optimizer=name, lr=0.3, weight_decay=0.01))
    optimizer = optimizers.build(config, nn.Linear(4, 3), nn.CrossEntropyLoss())
    assert type(optimizer) is kind
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.3, 0.01)
    assert optimizer.defaults.get("momentum", 0) == (0.9 if name == "sgd" else 0)
    left_out = optimizers.build(resolve(TrainConfig("iris", optimizer=name)), nn.Linear(4, 3), nn.CrossEntropyLoss())
    assert left_out.defaults["weight_decay"] == 0


@pytest.mark.parametrize("coupling", ["batch", "sample"])
def test_the_command_line_has_the_librarys_momentum(coupling: Any) -> None:
    library = ddpnopt.DDPNOpt(nn.Linear(2, 2), coupling=coupling)
    assert resolve(TrainConfig("DIGITS", coupling=coupling)).momentum == library.param_groups[0]["momentum"]
