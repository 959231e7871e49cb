"""Random numbers that stay as they are where others are drawn before them, or in other numbers: what is expected."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten


def _dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    return x.clone(), torch.ones_like(x, dtype=torch.bool)


#: By operation that draws elements one by one, what it returns instead. A mask of dropout is one: it is divided by p.
_EXPECTED: Mapping[Any, Callable[..., Any]] = {
    _ATEN.bernoulli.default: lambda probabilities, **_: probabilities.clone(),
    _ATEN.bernoulli.p: lambda x, p, **_: torch.full_like(x, p),
    _ATEN.bernoulli_.float: lambda x, p=0.5, **_: x.fill_(p),
    _ATEN.bernoulli_.Tensor: lambda x, p, **_: x.copy_(p),
    _ATEN.exponential_.default: lambda x, rate=1.0, **_: x.fill_(1 / rate),
    _ATEN.native_dropout.default: _dropout,
    _ATEN.normal_.default: lambda x, mean=0.0, std=1.0, **_: x.fill_(mean),
    _ATEN.rand.default: lambda size, **kwargs: torch.full(size, 0.5, **kwargs),
    _ATEN.rand_like.default: lambda x, **kwargs: torch.full_like(x, 0.5, **kwargs),
    _ATEN.randn.default: lambda size, **kwargs: torch.zeros(size, **kwargs),
    _ATEN.randn_like.default: lambda x, **kwargs: torch.zeros_like(x, **kwargs),
    _ATEN.uniform_.default: lambda x, low=0.0, high=1.0, **_: x.fill_((low + high) / 2),
}


class ExpectedDraws(TorchDispatchMode):
    """Inside, elements that are drawn one by one are what is expected of them; orders and choices stay random."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled inside, and to be skipped loads all of the compiler, which takes a second."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: tuple[tuple[int, ...], ...] = ()  #: of what was drawn, in order

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, or return what is expected of it."""
        expected = _EXPECTED.get(function)
        if expected is None:
            return function(*args, **(kwargs or {}))
        self.sizes += (tuple(getattr(args[0], "shape", args[0])),)
        return expected(*args, **(kwargs or {}))
