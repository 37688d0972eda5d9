"""How much damping a layer gets: the less, the less it moves the output.

``damping`` stands beside ``M`` in ``R``, and is absolute. Where signals and gradients shrink from layer to layer, as
they do through many plain layers at torch's initial weights, ``M`` is next to nothing, and ``R`` nothing but damping:
such a layer stays where it began. With ``g_u`` a sample's gradient by the layer's weights and ``g`` that at the model's
output,

    s = E |g_u|^2 / E |g|^2,        damping * min(1, (s / 0.001)^(3/4))

``s`` is the squared length of the output's derivative by the weights, weighed by what is wrong at the output, and knows
neither the unit of the loss nor how well it is fitted by now. Where ``M`` is nothing, a step is the gradient over the
damping: with the root of ``s`` all such layers would make steps of one length, with ``s`` itself the length would grow
as gradients fall. Between the two, with a control limit (:mod:`ddpnopt.limits`), most plateaus are left
(``docs/results/depth.md``).
"""

LEAST = 1e-3
"""Sensitivity from which on a layer gets all of the damping, as every layer of the suite's tasks is to."""

POWER = 0.75
"""Of the sensitivity, by which damping falls."""


def damped(square: float | None, output: float | None) -> float:
    """The share of the damping that a layer gets.

    Args:
        square: mean squared length of a sample's gradient by the layer's weights; ``None`` while that is unknown.
        output: the same by the model's output.
    """
    if not square or not output:
        return 1.0
    share: float = (square / output / LEAST) ** POWER
    return min(1.0, share)
