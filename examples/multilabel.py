"""Several labels for each picture: is the digit even, does it have a loop, is it greater than 4? BCEWithLogitsLoss.

Run:  python examples/multilabel.py [--optimizer adamw]

What to expect: DDPNOpt ahead at equal epochs, about 95 % of the pictures with all three labels right against 90 %
after five; a step of it costs several times AdamW's. Neither learning rate was tuned.
"""

import torch
from _shared import digits, flags
from torch import nn

from ddpnopt import DDPNOpt

arguments = flags(__doc__, epochs=5)
(x, digit), (test_x, test_digit) = (part.tensors for part in digits())
LABELS = torch.tensor([[d % 2 == 0, d in (0, 6, 8, 9), d > 4] for d in range(10)], dtype=torch.float32)
y, test_y = LABELS[digit], LABELS[test_digit]

model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
criterion = nn.BCEWithLogitsLoss()
optimizer: torch.optim.Optimizer
if arguments.optimizer == "ddpnopt":
    optimizer = DDPNOpt(model)
else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)


@torch.no_grad()
def row(epoch: int) -> None:
    """Loss, accuracy of each label, and the share of pictures with all three right."""
    right = (model(test_x) > 0) == (test_y > 0.5)
    even, loop, greater = (f"{100 * share:.1f}" for share in right.float().mean(0).tolist())
    everything = 100 * float(right.all(1).float().mean())
    print(f"epoch {epoch}: train loss {float(criterion(model(x), y)):.4f}, test accuracy {everything:.1f} %", end=" ")
    print(f"(even {even}, loop {loop}, above 4 {greater})")


row(0)
for epoch in range(arguments.epochs):
    for batch in torch.randperm(len(x)).split(16):
        optimizer.zero_grad()
        criterion(model(x[batch]), y[batch]).backward()
        optimizer.step()
    row(epoch + 1)
