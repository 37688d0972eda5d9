"""The drop-in form on DIGITS: a usual training loop; only the optimizer's line differs.

Run:  python examples/drop_in.py [--optimizer adamw]
"""

import argparse

import torch
from sklearn.datasets import load_digits

from ddpnopt import DDPNOpt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--optimizer", choices=["ddpnopt", "adamw"], default="ddpnopt")
parser.add_argument("--epochs", type=int, default=5)
arguments = parser.parse_args()

torch.manual_seed(0)
torch.set_num_threads(1)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
train, test = torch.randperm(len(x)).split([1437, 360])
x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)

model = torch.nn.Sequential(
    torch.nn.Linear(64, 32),
    torch.nn.Tanh(),
    torch.nn.Linear(32, 32),
    torch.nn.Tanh(),
    torch.nn.Linear(32, 10),
)
criterion = torch.nn.CrossEntropyLoss()
optimizer: torch.optim.Optimizer
if arguments.optimizer == "ddpnopt":
    optimizer = DDPNOpt(model)
    print(optimizer.report())
else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for epoch in range(arguments.epochs):
    for batch in train[torch.randperm(len(train))].split(16):
        optimizer.zero_grad()
        loss = criterion(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (model(x[test]).argmax(1) == y[test]).float().mean()
        print(f"epoch {epoch + 1}: train loss {criterion(model(x[train]), y[train]):.4f}, ", end="")
    print(f"test accuracy {100 * accuracy:.1f} %")
