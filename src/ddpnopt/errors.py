"""The exceptions that belong to the library."""


class StepError(ValueError, RuntimeError):
    """A step that could not be carried out; weights and optimizer state are as they were before it.

    Raised by :meth:`ddpnopt.DDPNOpt.step` when there is nothing to step from (no backward pass), when the
    loss, a gradient or an update is not finite, and when the second forward pass does not retrace the first.
    It is a ``ValueError`` and a ``RuntimeError``, so that loops which catch either keep working.
    """


class NonFiniteError(StepError):
    """The kind of :class:`StepError` that ``on_nonfinite="skip"`` turns into a step left out."""
