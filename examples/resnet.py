"""A residual network with BatchNorm on CIFAR-10, or on the 8 x 8 pictures of DIGITS.

Run:  ddpnopt data fetch cifar10
      python examples/resnet.py [--optimizer adamw] [--data digits-images]

What to expect: on DIGITS (``--epochs 4``), after epochs 1 to 4, 96, 99, 98 and 99 % for DDPNOpt, 93, 97, 96 and 98 %
for AdamW, whose epochs are faster. BatchNorm mixes the samples of a batch, so that columns are not those
of single samples; DDPNOpt's feedback is off while it does.
"""

import time

import torch
from _shared import flags
from torch import Tensor, nn

from ddpnopt import DDPNOpt
from ddpnopt.experiments.data import Part, load

arguments = flags(__doc__, data=("cifar10", "digits-images"), epochs=1, samples=10_000)
dataset = load(arguments.data)


class Residual(nn.Module):
    """``relu(shortcut(x) + branch(x))``; with a stride of 2 the picture's sides are halved."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        plain = stride == 1 and channels == out
        self.shortcut = nn.Identity() if plain else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of pictures ``[B, C, H, W]``."""
        return torch.relu(self.shortcut(x) + self.branch(x))


model = nn.Sequential(
    nn.Conv2d(dataset.source.shape[0], 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
    Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, dataset.source.classes),
)  # fmt: skip
criterion = nn.CrossEntropyLoss()
optimizer: torch.optim.Optimizer
if arguments.optimizer == "ddpnopt":
    optimizer = DDPNOpt(model)
else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)


@torch.no_grad()
def measured(part: Part) -> tuple[float, float]:
    """Loss, and accuracy in percent, in evaluation mode."""
    model.eval()
    scores = torch.cat([model(x) for x in part.x.split(500)])
    model.train()
    return float(criterion(scores, part.y)), 100 * float((scores.argmax(1) == part.y).float().mean())


train = Part(dataset.train.x[: arguments.samples], dataset.train.y[: arguments.samples])
test = Part(dataset.test.x[: arguments.samples], dataset.test.y[: arguments.samples])
print(f"epoch 0: train loss {measured(train)[0]:.4f}, test accuracy {measured(test)[1]:.1f} %", flush=True)
for epoch in range(arguments.epochs):
    began = time.perf_counter()
    for batch in torch.randperm(len(train)).split(64):
        optimizer.zero_grad()
        criterion(model(train.x[batch]), train.y[batch]).backward()
        optimizer.step()
    seconds = time.perf_counter() - began
    loss, (_, accuracy) = measured(train)[0], measured(test)
    print(f"epoch {epoch + 1}: train loss {loss:.4f}, test accuracy {accuracy:.1f} %, {seconds:.0f} s", flush=True)
