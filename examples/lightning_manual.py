"""Lightning, manual optimisation: backward and step are called by ``training_step``.

Run:  python examples/lightning_manual.py [--optimizer adamw]

What to expect: the steps of the automatic form, bit for bit, and about 96 % for both. ``diagnostics()`` tells how much
of a step feedback was; it is on the optimizer that Lightning wraps.
"""

import lightning
import torch
from _shared import criterion, digits, flags, network, row
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader

from ddpnopt import DDPNOpt

arguments = flags(__doc__, epochs=5)
train, test = digits()


class Classifier(lightning.LightningModule):
    """The optimizer is given the inner network, which ``training_step`` calls: the very module that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> None:
        """One step."""
        x, y = batch
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        self.manual_backward(criterion(self.net(x), y))
        optimizer.step()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The one line that differs."""
        if arguments.optimizer == "ddpnopt":
            return DDPNOpt(self.net)
        return torch.optim.AdamW(self.net.parameters(), lr=3e-3)

    def on_train_epoch_start(self) -> None:
        """A row of the table."""
        row(self.current_epoch, self.net, train, test)


model = Classifier()
trainer = lightning.Trainer(
    max_epochs=arguments.epochs, accelerator="cpu", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(model, DataLoader(train, batch_size=16, shuffle=True))
row(arguments.epochs, model.net, train, test)
optimizer = trainer.optimizers[0]
if isinstance(optimizer, DDPNOpt):
    for name, figures in optimizer.diagnostics()["layers"].items():
        print(f"layer {name}: last step {figures['k']:.1e} open loop, {figures['feedback']:.1e} feedback")
