"""Random numbers that stay as they are where others are drawn before them, or in other numbers: what is expected."""

from collections.abc import Callable, Mapping, Sequence
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten

#: What is expected of coins, and the median of other numbers.
MIDDLE = 0.5


def _coins(at: float, p: Tensor) -> Tensor:
    """Coins that show one with these probabilities."""
    return p if at == MIDDLE else (p > 1 - at).to(p)


def _mask(at: float, p: float) -> float:
    """Coins of one probability, such as a mask of dropout: never zero, which would hide all behind it."""
    return p * at / MIDDLE


def _normal(at: float, x: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    at_unit = torch.special.ndtri(torch.tensor(at, dtype=torch.float64, device="cpu"))
    return x.fill_(mean + std * float(at_unit))


#: By operation that draws elements one by one, what it returns instead. A mask of dropout is one: it is divided by p.
_EXPECTED: Mapping[Any, Callable[..., Any]] = {
    _ATEN.bernoulli.default: lambda at, probabilities, **_: _coins(at, probabilities).clone(),
    _ATEN.bernoulli.p: lambda at, x, p, **_: torch.full_like(x, _mask(at, p)),
    _ATEN.bernoulli_.float: lambda at, x, p=0.5, **_: x.fill_(_mask(at, p)),
    _ATEN.bernoulli_.Tensor: lambda at, x, p, **_: x.copy_(_coins(at, p)),
    _ATEN.exponential_.default: lambda at, x, rate=1.0, **_: x.fill_(-log(1 - at) / rate),
    _ATEN.native_dropout.default: lambda at, x, p, train: (
        x * (1.0 if train is False else _mask(at, 1.0)),
        torch.ones_like(x, dtype=torch.bool),
    ),
    _ATEN.normal_.default: _normal,
    _ATEN.rand.default: lambda at, size, **kwargs: torch.full(size, at, **kwargs),
    _ATEN.rand_like.default: lambda at, x, **kwargs: torch.full_like(x, at, **kwargs),
    _ATEN.randn.default: lambda at, size, **kwargs: _normal(at, torch.empty(size, **kwargs)),
    _ATEN.randn_like.default: lambda at, x, **kwargs: _normal(at, torch.empty_like(x, **kwargs)),
    _ATEN.uniform_.default: lambda at, x, low=0.0, high=1.0, **_: x.fill_(low + at * (high - low)),
}


class ExpectedDraws(TorchDispatchMode):
    """Inside, elements that are drawn one by one are what is expected of them; orders and choices stay random.

    Args:
        at: another quantile of each one's distribution.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled inside, and to be skipped loads all of the compiler, which takes a second."""
        return False

    def __init__(self, at: float = MIDDLE) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._at = at
        self.sizes: tuple[tuple[int, ...], ...] = ()  #: of what was drawn, in order

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, or return what is expected of it."""
        expected = _EXPECTED.get(function)
        if expected is None:
            return function(*args, **(kwargs or {}))
        self.sizes += (tuple(getattr(args[0], "shape", args[0])),)
        return expected(self._at, *args, **(kwargs or {}))
