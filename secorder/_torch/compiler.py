"""What ``torch.compile`` is not to look into."""

import sys
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Uncompiled"]


class Uncompiled:
    """A function that runs as it stands wherever it is called, also by hooks of a compiled model.

    Else the compiler traces what such a hook does too, piece by piece: passes of the library's own, whose graphs are of
    no use, and on which older compilers fail. The compiler is not loaded for it.

    Args:
        function: any function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._disabled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return self._function(*args)
        if self._disabled is None:  # one for all calls: another one each time would be compiled for each time
            self._disabled = torch.compiler.disable(self._function)
        return self._disabled(*args)
