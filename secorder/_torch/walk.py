"""The modules of a model, gone through quickly: measurements do so again and again."""

from torch import nn

_NAMED_MODULES = nn.Module.named_modules


def modules_in(module: nn.Module) -> list[nn.Module]:
    """Those of ``module.modules()``, in that order, without the nest of generators that it goes through them by."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [module]
    while waiting:
        here = waiting.pop()
        if here is not None and here not in found:
            if type(here).named_modules is not _NAMED_MODULES:  # a kind that tells of others
                return list(module.modules())
            found[here] = None
            waiting.extend(reversed(here._modules.values()))
    return list(found)
