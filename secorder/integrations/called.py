"""Which modules a training step calls: those that no other module of the model calls."""

from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Called:
    """Sees which modules are called from outside of the model, while its hooks are there.

    ``names`` are those of the outermost modules that were called in train mode, in order; ``""`` for the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: list[str] = []
        self._model = model
        self._depth = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "Called":
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._enters(name)))
            self._handles.append(module.register_forward_hook(self._leaves, always_call=True))
        return self

    def _enters(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any) -> None:
            if name == "" and "forward" in vars(module):
                return  # strategies run the training step as the forward of the whole model, for the time of the call
            if self._depth == 0 and module.training and name not in self.names:
                self.names.append(name)
            self._depth += 1

        return enter

    def _leaves(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth = max(0, self._depth - 1)

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
