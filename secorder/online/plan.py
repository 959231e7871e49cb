"""How a layer is measured as long as nothing about it changes: decided once, and held against each call."""

from ..layers.dtypes import compute_dtype
from ..layers.low_precision import is_low
from ..layers.rank_one import Plan
from ..layers.rules.linear import linear
from ..layers.selection import Layer
from .fisher import OnlineFisher


def plan_of(fisher: OnlineFisher, layer: Layer) -> Plan | None:
    """The plan of a linear layer that is whole and accumulated as it is computed; None of any other.

    It is kept until the sums are others, or elsewhere.
    """
    if layer not in fisher.plans:
        fisher.plans[layer] = _decided(fisher, layer)
    return fisher.plans[layer]


def _decided(fisher: OnlineFisher, layer: Layer) -> Plan | None:
    if layer.rule is not linear or layer.spread is not None or fisher.forwards == "joined":
        return None
    if fisher.penalty is not None or fisher.ranks is not None or fisher.on_nonfinite == "raise":
        return None
    if layer.name not in fisher.by_layer:  # it shares a parameter with one that is
        return None
    totals = fisher.by_layer[layer.name].totals
    (dtype, device), *others = {(x.dtype, x.device) for x in (*layer.parameters.values(), *totals)}
    if others or dtype is not compute_dtype(layer) or is_low(fisher.precision, device, dtype):
        return None
    return Plan(dtype, device)
