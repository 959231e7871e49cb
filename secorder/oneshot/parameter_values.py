"""What parameters hold, put back where a forward overwrites them.

A momentum encoder that the forward moves on, weights that it normalises or clips in place: passes of our own do it too,
and each is to start from the same weights, and to leave the user's as they were.
"""

from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._torch.fsdp import local
from .._torch.modules import forward_hooks, own_tensors
from .._torch.versions import same_memory
from .restoring import same

#: Models of which a forward was seen to overwrite nothing, in train mode or in eval mode.
_HARMLESS: WeakKeyDictionary[nn.Module, set[bool]] = WeakKeyDictionary()


def may_be_overwritten(model: nn.Module, *, anew: bool) -> list[nn.Parameter]:
    """The parameters that a forward may overwrite: none where all modules are PyTorch's own, which overwrite none.

    With ``anew`` that is seen again of a model that did not overwrite any.
    """
    modules = list(model.modules())
    known = not anew and model.training in _HARMLESS.get(model, ())
    if known or all(_is_torchs_own(m) for m in modules):
        return []
    return [t for m in modules for t in own_tensors(m) if isinstance(t, nn.Parameter) and _has_values(t)]


def _is_torchs_own(module: nn.Module) -> bool:
    own = type(module).__module__.startswith("torch.nn.") and "forward" not in vars(module)
    return own and not forward_hooks(module)


def _has_values(parameter: Tensor) -> bool:
    plain = parameter.layout is torch.strided and not parameter.is_nested
    if not plain or parameter.is_meta or parameter.is_inference():
        return False
    # Other processes may train the same memory (``share_memory``): what they write is not to be put back.
    return parameter.device.type != "cpu" or not local(parameter).is_shared()


class ParameterValues:
    """The values of parameters, as they were when this was made.

    A forward may put other memory into their ``replacements`` (``p.data = …``).
    """

    def __init__(self, model: nn.Module, replacements: Iterable[Tensor], *, anew: bool) -> None:
        parameters = may_be_overwritten(model, anew=anew)
        self._model = model
        #: Of each tensor its memory, and a copy of what is in it where that is the user's own.
        self._kept = [(p, p.data, local(p).clone()) for p in {id(p): p for p in parameters}.values()]
        self._memory = [(t, t.data) for t in replacements if _has_values(t)] if parameters else []
        self._compared = not parameters

    def ran(self) -> None:
        """The first forward has run: what it did not overwrite is forgotten, since all of them do the same."""
        if not self._compared:
            self._compared = True
            self._kept = [kept for kept in self._kept if _overwritten(*kept)]
            self._memory = [kept for kept in self._memory if not same_memory(*kept)]
            if not (self._kept or self._memory):
                _HARMLESS.setdefault(self._model, set()).add(self._model.training)

    def restore(self) -> None:
        """Put everything back."""
        for parameter, data, values in self._kept:
            if not same_memory(local(parameter), local(data)):
                parameter.data = data
            local(data).copy_(values)
        for replacement, data in self._memory:
            replacement.data = data


def _overwritten(parameter: Tensor, data: Tensor, values: Tensor) -> bool:
    return not (same_memory(local(parameter), local(data)) and same(local(data), values))
