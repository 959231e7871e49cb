"""The library's own exceptions: each also is the built-in exception that fits, so that either can be caught."""


class SecorderError(Exception):
    """Base of every error that secorder raises on its own account."""


class InvalidTypeError(SecorderError, TypeError):
    """An argument has the wrong type, such as a model that is not an ``nn.Module``."""


class InvalidArgumentError(SecorderError, ValueError):
    """An argument has the right type and an unusable value, such as an empty batch."""


class ProbeStateError(SecorderError, RuntimeError):
    """The probe is not in a state that allows the call, such as a measurement after ``detach()``."""


class AttributionError(SecorderError, RuntimeError):
    """A layer's gradient cannot be attributed to single samples, so that no per-sample quantity can be given."""


class CouplingError(SecorderError, RuntimeError):
    """The samples of a batch influence one another's loss, so that per-sample gradients are not defined."""


class NonFiniteError(SecorderError, RuntimeError):
    """The loss is not finite, so that no curvature exists at this point."""


class DoubleBackwardError(SecorderError, RuntimeError):
    """An operator of the model or of the loss cannot be differentiated twice."""


class RuleError(SecorderError, AssertionError):
    """A layer's rule disagrees with brute force (:func:`secorder.testing.check_rule`)."""


class CurvatureWarning(UserWarning):
    """What is accumulated is not what it seems; the message says why and what to do."""
