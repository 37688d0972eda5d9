"""Lightning, automatic optimisation: ``configure_optimizers`` makes the optimizer, nothing else is to be done.

Run:  python examples/lightning_automatic.py [--optimizer adamw] [--accumulate 2]

What to expect: about 96 % for both, and the very weights of a plain loop on the same batches. Lightning hands the
optimizer the closure of the last micro-batch only; DDPNOpt has kept the passes before it, so that with
``--accumulate 2`` (and half the batch) the steps are those of the whole batch.
"""

import lightning
import torch
from _shared import criterion, digits, flags, network, row
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader

from ddpnopt import DDPNOpt

arguments = flags(__doc__, epochs=5, accumulate=1)
train, test = digits()


class Classifier(lightning.LightningModule):
    """The optimizer is given the module itself, and the module is called: ``self(x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``[B, 10]``."""
        scores: Tensor = self.net(x)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        """The loss of one batch."""
        x, y = batch
        loss: Tensor = criterion(self(x), y)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The one line that differs."""
        if arguments.optimizer == "ddpnopt":
            return DDPNOpt(self)
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def on_train_epoch_start(self) -> None:
        """A row of the table."""
        row(self.current_epoch, self, train, test)


model = Classifier()
trainer = lightning.Trainer(
    max_epochs=arguments.epochs, accumulate_grad_batches=arguments.accumulate, accelerator="cpu", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(model, DataLoader(train, batch_size=16 // arguments.accumulate, shuffle=True))
row(arguments.epochs, model, train, test)
