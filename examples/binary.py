"""A binary classifier with one output and BCEWithLogitsLoss: scikit-learn's breast cancer table, 569 rows.

Run:  python examples/binary.py [--optimizer adamw]

What to expect: 96 to 99 % for both, a sample or two apart; DDPNOpt's training loss after one epoch is AdamW's after
three. Neither learning rate was tuned.
"""

import torch
from _shared import flags
from sklearn.datasets import load_breast_cancer
from torch import nn

from ddpnopt import DDPNOpt

arguments = flags(__doc__, epochs=10)
features, benign = load_breast_cancer(return_X_y=True)
x, y = torch.tensor(features, dtype=torch.float32), torch.tensor(benign, dtype=torch.float32)[:, None]
train, test = torch.randperm(len(x)).split([455, 114])
x = (x - x[train].mean(0)) / x[train].std(0)

model = nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
criterion = nn.BCEWithLogitsLoss()
optimizer: torch.optim.Optimizer
if arguments.optimizer == "ddpnopt":
    optimizer = DDPNOpt(model)
else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)


@torch.no_grad()
def row(epoch: int) -> None:
    """Loss and accuracy."""
    right = (model(x[test]) > 0) == (y[test] > 0.5)
    loss, accuracy = float(criterion(model(x[train]), y[train])), 100 * float(right.float().mean())
    print(f"epoch {epoch}: train loss {loss:.4f}, test accuracy {accuracy:.1f} %")


row(0)
for epoch in range(arguments.epochs):
    for batch in train[torch.randperm(len(train))].split(16):
        optimizer.zero_grad()
        criterion(model(x[batch]), y[batch]).backward()
        optimizer.step()
    row(epoch + 1)
