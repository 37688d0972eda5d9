"""The loops of other libraries make the very steps of a plain loop, and their checkpoints resume them."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ddpnopt import DDPNOpt, Matched
from examples.scripts import run

# their own warnings (few workers, deprecated calls inside) are none of ours
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.xdist_group("integrations")]
BATCH, EPOCHS = 16, 2


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(96, 6, generator=generator)
    return TensorDataset(x, (x[:, 0] + x[:, 1] * x[:, 2] > 0).long() + (x[:, 3] > 1).long())


def network() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))


def plain(terminal: Matched | None = None, autocast: bool = False, epochs: int = EPOCHS) -> list[Tensor]:
    model, criterion = network(), terminal.criterion if terminal else nn.CrossEntropyLoss()
    assert criterion is not None
    optimizer = DDPNOpt(model, lr=1.0, terminal=terminal)
    for _ in range(epochs):
        for x, y in DataLoader(data(), batch_size=BATCH):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
    return list(model.parameters())


def assert_same(model: nn.Module, wanted: list[Tensor]) -> None:
    for new, expected in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(new, expected, rtol=0, atol=0)


def lightning_module(manual: bool, inner: bool) -> Any:
    import lightning

    class Classifier(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = network(), not manual

        def forward(self, x: Tensor) -> Any:
            return self.net(x)

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            scores = self.net(batch[0]) if inner else self(batch[0])
            loss = nn.functional.cross_entropy(scores, batch[1])
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

        def configure_optimizers(self) -> DDPNOpt:
            return DDPNOpt(self.net if inner else self, lr=1.0)

    return Classifier()


def fit(module: Any, *, batch: int = BATCH, epochs: int = EPOCHS, resume: Path | None = None, **settings: Any) -> Any:
    import lightning

    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data(), batch_size=batch), ckpt_path=resume, weights_only=True if resume else None)
    return trainer


@pytest.mark.parametrize("inner", [False, True], ids=["module", "network"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_lightning_is_the_plain_loop(manual: bool, inner: bool) -> None:
    pytest.importorskip("lightning")
    module = lightning_module(manual, inner)
    fit(module)
    assert_same(module, plain())


def test_lightning_accumulates_to_the_whole_batch() -> None:
    pytest.importorskip("lightning")
    module = lightning_module(manual=False, inner=False)
    fit(module, batch=BATCH // 2, accumulate_grad_batches=2)
    for new, wanted in zip(module.parameters(), plain(), strict=True):
        torch.testing.assert_close(new, wanted, rtol=1e-5, atol=1e-5)


def test_lightning_resumes_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    fit(lightning_module(manual=False, inner=False), epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    module = lightning_module(manual=False, inner=False)
    fit(module, resume=tmp_path / "half.ckpt")
    assert_same(module, plain())


def test_a_module_that_is_not_the_one_lightning_calls_is_refused_by_name() -> None:
    pytest.importorskip("lightning")
    module = lightning_module(manual=False, inner=True)
    module.configure_optimizers = lambda: DDPNOpt(module)  # training_step calls module.net, never the module
    with pytest.raises(ValueError, match="the very module this optimizer was made with"):
        fit(module)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("precision", "matched"), [("no", False), ("bf16", False), ("no", True)])
def test_accelerate_is_the_plain_loop(accumulate: int, precision: str, matched: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
    criterion = nn.CrossEntropyLoss()
    terminal = Matched(criterion) if matched else None
    model: Any = network()
    optimizer: Any = DDPNOpt(model, lr=1.0, terminal=terminal)
    loader: Any = DataLoader(data(), batch_size=BATCH // accumulate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(criterion(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
    tolerance = 1e-5 if precision == "no" else 2e-2  # bfloat16: the loss is rounded per micro-batch
    for new, wanted in zip(model.parameters(), plain(terminal, precision == "bf16"), strict=True):
        torch.testing.assert_close(new, wanted, rtol=tolerance, atol=tolerance)


def test_skorch_is_the_plain_loop_and_resumes(tmp_path: Path) -> None:
    skorch = pytest.importorskip("skorch")

    class Estimator(skorch.NeuralNetClassifier):  # type: ignore[misc,name-defined]
        def get_params_for_optimizer(self, prefix: str, named_parameters: Any) -> Any:
            return (self.module_,), super().get_params_for_optimizer(prefix, named_parameters)[1]

    def estimator(epochs: int) -> Any:
        settings = {"lr": 1.0, "batch_size": BATCH, "train_split": None, "verbose": 0, "max_epochs": epochs}
        return Estimator(network(), criterion=nn.CrossEntropyLoss, optimizer=DDPNOpt, **settings)

    x, y = (tensor.numpy() for tensor in data().tensors)
    whole = estimator(EPOCHS).fit(x, y)
    assert_same(whole.module_, plain())
    half = estimator(1).fit(x, y)
    names = {"f_params": tmp_path / "params.pt", "f_optimizer": tmp_path / "optimizer.pt"}
    half.save_params(**names)
    other = estimator(1).initialize()
    other.load_params(**names)
    assert_same(other.partial_fit(x, y).module_, plain())


def test_the_trainer_resumes_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("transformers")

    def rows(*more: str) -> list[str]:
        printed = run("transformers_trainer.py", "--epochs", "2", "--folder", "run", *more, folder=tmp_path)
        return [line for line in printed.splitlines() if line.startswith("epoch")]

    whole = rows()
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    optimizer = torch.load(checkpoints[0] / "optimizer.pt", weights_only=True)
    assert optimizer["steps"] == 90
    shutil.rmtree(checkpoints[1])
    assert rows("--resume")[-1] == whole[-1]


def test_an_average_of_the_weights_is_no_part_of_the_step() -> None:
    model = network()
    optimizer = DDPNOpt(model, lr=1.0)
    average = torch.optim.swa_utils.AveragedModel(copy.deepcopy(model))
    for _ in range(EPOCHS):
        for x, y in DataLoader(data(), batch_size=BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(average(x), y).backward()  # a copy that runs, and is not trained
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            average.update_parameters(model)
    assert_same(model, plain())
