"""The library's warnings, attributed to the user's line that caused them."""

import warnings
from contextlib import suppress
from inspect import currentframe

from .errors import CurvatureWarning

#: Packages whose lines are not the user's: the library, and what calls it for the user.
OTHERS = ("secorder", "torch", "lightning", "pytorch_lightning", "transformers", "accelerate")


def caution(message: str) -> None:
    """Warn, at the innermost line that is none of the library's, of PyTorch's or of a trainer's.

    Where the user's filters make an error of it, nothing is raised: it may be in the middle of a training step.
    """
    level, frame = 1, currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in OTHERS:
        frame, level = frame.f_back, level + 1
    with suppress(CurvatureWarning):
        warnings.warn(message, CurvatureWarning, stacklevel=max(1, level))
