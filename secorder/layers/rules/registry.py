"""The rules by layer type, and which one is exact for a module."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from ..._arguments import require_callable
from ..._torch.differentiability import can_be_trained
from ..._torch.modules import computes_as, own_parameters
from ...errors import AttributionError, InvalidArgumentError, InvalidTypeError
from ..per_sample import Rule

R = TypeVar("R", bound=Rule)


class Entry(NamedTuple):
    """A rule as it was entered for a layer type."""

    rule: Rule
    #: names of the parameters that it knows; None for all that a module of the type holds
    parameters: frozenset[str] | None
    any_leading_dim: bool  #: whether the layer treats all leading dimensions alike, so that samples may be in dim 1


#: The rules by layer type; subclasses that do not override ``forward`` use their base's.
RULES: dict[type[nn.Module], Entry] = {}
#: By rules that form per-sample gradients, what tells them in factors, of which cotangents may be the first: where
#: nothing but squares is made of them.
SQUARES: dict[Rule, Rule] = {}


def rule_of(
    *layer_types: type[nn.Module], parameters: tuple[str, ...] | None = None, any_leading_dim: bool = False
) -> Callable[[R], R]:
    """Enter the decorated function as the rule of layer types.

    Args:
        layer_types: types of modules.
        parameters: names of the parameters that the rule knows; a module that holds others has no rule. None for all.
        any_leading_dim: whether the layer treats all leading dimensions alike, so that samples may be in dim 1.

    Raises:
        InvalidTypeError: a target is not a module type, or the rule not callable.
        InvalidArgumentError: a type has a rule already, or none is named.

    Example:
        >>> import torch
        >>> from secorder.layers.rules import rule_of
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(width))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> @rule_of(Scale)
        ... def scale(module, inputs, g):
        ...     return {"weight": inputs[0] * g}
    """
    if not layer_types:
        raise InvalidArgumentError("rule_of needs the layer types that the rule is for: @rule_of(MyLayer).")
    for kind in layer_types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise InvalidTypeError(f"rule_of takes subclasses of torch.nn.Module, got {kind!r}.")
        if kind in RULES:
            raise InvalidArgumentError(f"{kind.__name__} has a rule already ({RULES[kind].rule.__name__}).")

    def enter(rule: R) -> R:
        require_callable("a rule", rule, "rule(module, inputs, g)")
        entry = Entry(rule, None if parameters is None else frozenset(parameters), any_leading_dim)
        RULES.update(dict.fromkeys(layer_types, entry))
        return rule

    return enter


def squares_of(rule: Rule) -> Callable[[R], R]:
    """Enter the decorated function as a rule's for squares."""

    def enter(squared: R) -> R:
        SQUARES[rule] = squared
        return squared

    return enter


def rule_for(module: nn.Module) -> Rule | None:
    """The rule that is exact for this module, or None.

    A rule speaks for the module only where the module still computes what its type does: ``forward`` is the type's
    own, and its parameters are the type's own too (no parametrization, no weight kept under another name).
    """
    kind = next((kind for kind in type(module).__mro__ if kind in RULES), None)
    if kind is None or not computes_as(module, kind):
        return None
    own = own_parameters(module)
    if not all(map(can_be_trained, own.values())):
        return None
    every = own.values() if next(module.children(), None) is None else module.parameters()
    if hasattr(module, "parametrizations") or len(own) != len({id(p) for p in every}):
        return None
    entry = RULES[kind]
    return entry.rule if entry.parameters is None or own.keys() <= entry.parameters else None


def takes_any_leading_dim(rule: Rule) -> bool:
    """Whether a rule's layers treat all leading dimensions alike."""
    return any(entry.rule is rule and entry.any_leading_dim for entry in RULES.values())


def expect_dims(module: nn.Module, a: Tensor, dims: int) -> None:
    """Raise :class:`AttributionError` unless an input has so many dimensions: the batch's and what the layer takes."""
    if a.dim() != dims:
        raise AttributionError(
            f"{type(module).__name__} was called without a batch dimension (input of {a.dim()} dimensions, "
            f"expected {dims}): add one with unsqueeze(0)."
        )
