"""What the examples of training loops have in common: DIGITS, a small network, the flags and the table."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

criterion = nn.CrossEntropyLoss()


def flags(doc: str | None, **defaults: int | str | tuple[str, ...]) -> argparse.Namespace:
    """``--optimizer`` and a flag for each default: a number, a text, choices (the first is the default) or a switch.

    One thread and one seed, so that a row can be compared with a row.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"optimizer": ("ddpnopt", "adamw"), **defaults}.items():
        if isinstance(default, tuple):
            parser.add_argument(f"--{name}", choices=default, default=default[0])
        elif default is False:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default: {default}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return parser.parse_args()


def digits() -> tuple[TensorDataset, TensorDataset]:
    """DIGITS, 1,437 pictures to train on and 360 to test, ``[N, 64]``, each pixel standardised by the train part."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
    train, test = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split([1437, 360])
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def network() -> nn.Sequential:
    """A dense network of 64, 32, 32 and 10 units."""
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))


@torch.no_grad()
def row(epoch: int, model: nn.Module, train: TensorDataset, test: TensorDataset) -> None:
    """Print a row of the table: training loss and test accuracy, in evaluation mode."""
    training, _ = model.training, model.eval()
    (x, y), (test_x, test_y) = train.tensors, test.tensors
    loss = float(criterion(model(x), y))
    accuracy = 100 * float((model(test_x).argmax(1) == test_y).float().mean())
    model.train(training)
    print(f"epoch {epoch}: train loss {loss:.4f}, test accuracy {accuracy:.1f} %", flush=True)
