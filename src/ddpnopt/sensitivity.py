"""How much damping a layer gets: the less, the less it moves the output.

``damping`` stands beside ``M`` in ``R``, and is absolute. Where signals and gradients shrink from layer to layer, as
they do through many plain layers at torch's initial weights, ``M`` is 1e-10 and less, and ``R`` nothing but damping:
such a layer stays where it began. With ``g_u`` a sample's gradient by the layer's weights and ``g`` that at the model's
output,

    s = E |g_u|^2 / E |g|^2,        damping * min(1, sqrt(s / 0.001))

``s`` is the squared length of the output's derivative by the weights, weighed by what is wrong at the output, and knows
neither the unit of the loss nor how well it is fitted by now. Where ``M`` is nothing, a step is the gradient over the
damping and so no longer than ``0.3 |g|``, the same for every such layer, and no less. Every layer of the suite's tasks
has a larger ``s`` than that, the least of them 0.0013 in the deep autoencoder, and so all of the damping.
"""

import math

LEAST = 1e-3
"""Sensitivity from which on a layer gets all of the damping: below that of any layer in the suite's tasks."""


def damped(square: float | None, output: float | None) -> float:
    """The share of the damping that a layer gets.

    Args:
        square: mean squared length of a sample's gradient by the layer's weights; ``None`` while that is unknown.
        output: the same by the model's output.
    """
    if not square or not output:
        return 1.0
    return min(1.0, math.sqrt(square / output / LEAST))
