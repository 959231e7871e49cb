"""Checks of what users pass: numbers, devices, dtypes, words."""

import difflib
import os
from collections.abc import Iterable, Sequence
from numbers import Real
from operator import index
from os import PathLike
from typing import Any

import torch

from .errors import InvalidArgumentError, InvalidTypeError

#: Characters of a value that a message shows.
SHOWN = 100

#: Names that a message lists.
LISTED = 6


def shown(value: Any) -> str:
    """A value in a sentence: on one line, and what has a shape by that."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and not isinstance(value, type):
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: of many, the first of them and how many there are."""
    some = ", ".join(map(repr, names[:LISTED]))
    return some if len(names) <= LISTED else f"{some}, … ({len(names)} in all)"


def like(unknown: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that is unknown: what may have been meant by it."""
    close = difflib.get_close_matches(unknown, list(known), n=1)
    return f": did you mean {close[0]!r}?" if close else "."


def refuse_given(reason: str, **options: Any) -> None:
    """Raise, with a reason after its name, if an option that has no effect beside the others is given (not None)."""
    for name, value in options.items():
        if value is not None:
            raise InvalidArgumentError(f"{name}={shown(value)} {reason}")


def refuse_unused_draws(
    method: str, num_draws: Any = None, rtol: Any = None, max_draws: Any = None, max_hvps: Any = None
) -> None:
    """Raise if a Hessian's options contradict one another: of those that go by draws, or by their number."""
    if method == "exact":
        reason = 'goes with method="hutchinson" or "auto": method="exact" draws nothing.'
        refuse_given(reason, num_draws=num_draws, rtol=rtol, max_draws=max_draws)
    if method != "auto":
        refuse_given('goes with method="auto", which estimates the layers that would take more.', max_hvps=max_hvps)
    if rtol is None and (method == "hutchinson" or num_draws is not None):
        refuse_given(
            "goes with rtol=, the error that draws go down to: without it, num_draws are made.", max_draws=max_draws
        )


def require_callable(name: str, value: Any, call: str) -> None:
    """Raise unless an argument can be called, as ``call`` says; a class cannot, whose instances are meant."""
    if isinstance(value, type):
        raise InvalidTypeError(f"{name} is the class {value.__name__}, not made yet: pass {value.__name__}().")
    if not callable(value):
        raise InvalidTypeError(f"{name} must be callable as {call}, got {shown(value)}.")


def require_device(name: str, value: Any) -> None:
    """Raise unless an argument is a device, which holds numbers, or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (torch.device, str, int)):
        raise InvalidTypeError(f'{name} must be a device, such as "cpu", got {shown(value)}.')
    try:
        there = torch.empty(0, device=value)
    except (RuntimeError, AssertionError, NotImplementedError):  # of a name, or of a machine, that has none
        raise InvalidArgumentError(f'{name} must be a device of this machine, such as "cpu", got {value!r}.') from None
    if there.device.type == "meta":
        raise InvalidArgumentError(f'{name} must be a device that holds numbers, such as "cpu", got {value!r}.')


def require_flag(name: str, value: Any) -> None:
    """Raise unless an argument is True or False, or the like: 1, 0, one of NumPy's or of a tensor."""
    if isinstance(value, int) and value in (0, 1):
        return
    if str(getattr(value, "dtype", "")).removeprefix("torch.") == "bool" and value.ndim == 0:
        return
    raise InvalidTypeError(f"{name} must be True or False, got {shown(value)}.")


def require_floating_dtype(name: str, value: Any) -> None:
    """Raise unless an argument is a dtype of real numbers, of more than eight bits, or None."""
    if value is not None and not isinstance(value, torch.dtype):
        raise InvalidTypeError(f"{name} must be a dtype, such as torch.float32, got {shown(value)}.")
    if value is not None and not (value.is_floating_point and value.itemsize > 1):  # which nothing adds up in
        raise InvalidArgumentError(f"{name} must be a dtype of real numbers of 16 bits or more, got {value}.")


def require_integer(name: str, value: Any, least: int) -> None:
    """Raise unless an argument is an integer of at least ``least``."""
    try:
        if isinstance(value, bool):
            raise TypeError
        index(value)
    except TypeError:
        raise InvalidTypeError(f"{name} must be an integer, got {shown(value)}.") from None
    if value < least:
        raise InvalidArgumentError(f"{name} must be at least {least}, got {value}.")


def require_number(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise unless an argument is a positive number, or zero where that is allowed."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InvalidTypeError(f"{name} must be a number, got {shown(value)}.")
    if not (float(value) > 0 or (zero and float(value) == 0)):
        raise InvalidArgumentError(f"{name} must be {'zero or ' if zero else ''}positive, got {value!r}.")


def require_path(name: str, value: Any, *, or_with: str = "") -> None:
    """Raise unless an argument is the path of a file or a folder; or has a method, as open files have ``"read"``."""
    if or_with and hasattr(value, or_with):
        return
    if not isinstance(value, (str, PathLike)):
        raise InvalidTypeError(f"{name} must be the path of a file or folder, got {shown(value)}.")
    if not os.fspath(value):
        raise InvalidArgumentError(f"{name} must not be empty.")


def require_one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise unless an argument is one of some words (or None)."""
    if value not in allowed if isinstance(value, str) else True not in [value is word for word in allowed]:
        *others, last = (f'"{word}"' if isinstance(word, str) else str(word) for word in allowed)
        raise InvalidArgumentError(f"{name} must be {', '.join(others)} or {last}, got {shown(value)}.")


def require_method(name: str, value: Any, method: str) -> None:
    """Raise unless an argument has a method, and is no class."""
    if isinstance(value, type) or not callable(getattr(value, method, None)):
        raise InvalidTypeError(f"{name} must have {method}(), got {shown(value)}.")


def require_strings(name: str, value: Any) -> tuple[str, ...]:
    """The strings that an argument holds; raises unless it holds strings alone."""
    strings = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not all(isinstance(one, str) for one in strings):
        raise InvalidTypeError(f"{name} must be a string, or hold strings, got {shown(value)}.")
    return strings
