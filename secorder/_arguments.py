"""Checks of the numbers that users pass."""

from numbers import Real
from operator import index
from typing import Any

from .errors import InvalidArgumentError, InvalidTypeError

__all__ = ["require_integer", "require_number"]


def require_integer(name: str, value: Any, least: int) -> None:
    """Raise unless an argument is an integer, and not too small.

    Args:
        name: of the argument, for the message.
        value: what was passed.
        least: the smallest that is allowed.

    Raises:
        InvalidTypeError: it is no integer.
        InvalidArgumentError: it is too small.
    """
    try:
        index(value)
    except TypeError:
        raise InvalidTypeError(f"{name} must be an integer, got {value!r}.") from None
    if value < least:
        raise InvalidArgumentError(f"{name} must be at least {least}, got {value}.")


def require_number(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise unless an argument is a positive number.

    Args:
        name: of the argument, for the message.
        value: what was passed.
        zero: whether zero is allowed too.

    Raises:
        InvalidTypeError: it is no real number.
        InvalidArgumentError: it is negative or nan, or zero where that is not allowed.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InvalidTypeError(f"{name} must be a number, got {value!r}.")
    if not (float(value) > 0 or (zero and float(value) == 0)):
        raise InvalidArgumentError(f"{name} must be {'zero or ' if zero else ''}positive, got {value!r}.")
