"""skorch: an estimator of scikit-learn. DDPNOpt takes the module where other optimizers take its parameters: six lines.

Run:  python examples/skorch_estimator.py [--optimizer adamw]

What to expect: about 96 % for both, and the very weights of a plain loop on the same batches. Cloning, pickling,
``GridSearchCV`` over ``lr`` or ``optimizer__weight_decay``, and ``save_params(f_optimizer=...)`` work as with any
optimizer; groups by pattern (``optimizer__param_groups``) do not reach DDPNOpt this way.
"""

from typing import Any

import torch
from _shared import digits, flags, network
from skorch import NeuralNetClassifier
from skorch.helper import predefined_split

from ddpnopt import DDPNOpt

arguments = flags(__doc__, epochs=5)
train, test = digits()


class DDPNOptClassifier(NeuralNetClassifier):
    """Gives the optimizer the module instead of its parameters; the rest of ``initialize_optimizer`` stays."""

    def get_params_for_optimizer(self, prefix: str, named_parameters: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the optimizer."""
        _, options = super().get_params_for_optimizer(prefix, named_parameters)
        return (self.module_,), options


settings: dict[str, Any] = {
    "criterion": torch.nn.CrossEntropyLoss, "max_epochs": arguments.epochs, "batch_size": 16,
    "iterator_train__shuffle": True, "train_split": predefined_split(test), "verbose": 0,
}  # fmt: skip
if arguments.optimizer == "ddpnopt":
    estimator = DDPNOptClassifier(network(), optimizer=DDPNOpt, lr=0.1, **settings)
else:
    estimator = NeuralNetClassifier(network(), optimizer=torch.optim.AdamW, lr=3e-3, **settings)
estimator.fit(train, y=None)
for epoch in estimator.history:
    loss, accuracy = epoch["train_loss"], 100 * epoch["valid_acc"]
    print(f"epoch {epoch['epoch']}: train loss {loss:.4f}, test accuracy {accuracy:.1f} %")
