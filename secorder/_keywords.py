"""Renamed keywords: an error that gives the new name."""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec, TypeVar

from .errors import InvalidArgumentError

P = ParamSpec("P")
R = TypeVar("R")

#: Old name → new name. ``num_samples`` is the number of samples in data everywhere, and never that of draws.
RENAMED = {"num_samples": "num_draws", "max_num_samples": "max_draws"}


def refuse_renamed(keywords: Iterable[str], function: str) -> None:
    """Raise :class:`InvalidArgumentError`, with the new name, if a keyword passed to a function is an old one."""
    for keyword in keywords:
        if keyword in RENAMED:
            raise InvalidArgumentError(f"{function} takes {RENAMED[keyword]}= in place of {keyword}=.")


def refuses_renamed_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, which answers an old keyword by the new one's name."""

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        refuse_renamed(kwargs, f"{function.__name__}()")
        return function(*args, **kwargs)

    return checked
