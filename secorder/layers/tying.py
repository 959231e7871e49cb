"""Parameters that several layers hold."""

from collections.abc import Sequence

from torch import nn

from .rules import rule_for
from .selection import Layer, read_elsewhere, special_option

#: For each layer with a tied parameter: parameter → all that hold it, as (layer, parameter), itself among them.
Ties = dict[str, dict[str, list[tuple[str, str]]]]


def tied_layers(model: nn.Module, layers: Sequence[Layer]) -> tuple[list[Layer], Ties]:
    """The layers with every other one that holds one of their parameters, each under its own rule.

    Such a parameter's per-sample gradient is the sum of theirs: an embedding and the head that is tied to it. A module
    without a rule that holds it too (and may not use it) is not among them. Both results are empty where nothing is
    tied.
    """
    elsewhere = read_elsewhere(model.modules())
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        if module not in elsewhere and not special_option(module) and rule_for(module) is not None:
            for local, p in module.named_parameters(recurse=False, remove_duplicate=False):
                holders.setdefault(id(p), []).append((name, module, local))
    ties: Ties = {}
    together: dict[str, Layer] = {}
    for layer in layers:
        shared = {local: holders.get(id(p), []) for local, p in layer.parameters.items()}
        # Its own rule may be missing for no other reason than that another selected layer holds a parameter of it.
        ruled = all(any(module is layer.module for _, module, _ in by) for by in shared.values())
        if not ruled or (layer.rule is not None and all(len(by) == 1 for by in shared.values())):
            together.setdefault(layer.name, layer)
            continue
        ties[layer.name] = {local: [(name, own) for name, _, own in by] for local, by in shared.items()}
        for name, module, _ in (holder for by in shared.values() for holder in by):
            own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
            together[name] = Layer(name, module, own, rule_for(module), module, spread=layer.spread)
    return (list(together.values()), ties) if ties else ([], {})
