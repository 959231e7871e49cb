"""Parameters that several layers hold, such as a head's that is tied to its embedding."""

from collections.abc import Mapping, Sequence
from typing import Any


def held_before(parameters: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """By layer, the names of its parameters that a layer before it holds too; layers without are missing."""
    seen: set[int] = set()
    found = {}
    for layer, own in parameters.items():
        found[layer] = [name for name, p in own.items() if id(p) in seen]
        seen.update(map(id, own.values()))
    return {layer: names for layer, names in found.items() if names}


def counted_once(parameters: Mapping[str, Sequence[Any]]) -> list[str]:
    """The layers that are together all parameters: without those all of whose parameters others hold.

    Of two that have a part in common alone, both are there.
    """
    seen: set[int] = set()
    left_out = set()
    for layer in sorted(parameters, key=lambda name: -len(parameters[name])):
        own = set(map(id, parameters[layer]))
        if own and own <= seen:
            left_out.add(layer)
        seen |= own
    return [layer for layer in parameters if layer not in left_out]
