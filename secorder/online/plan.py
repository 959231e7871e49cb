"""How a layer is measured as long as nothing about it changes: decided once, and held against each call."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.dtypes import compute_dtype
from ..layers.low_precision import is_low
from ..layers.rank_one import RankOne
from ..layers.rules.linear import linear
from ..layers.selection import Layer
from .sums import LayerSums

if TYPE_CHECKING:
    from .fisher import OnlineFisher


class Held(NamedTuple):
    """Where a parameter of a layer is held as long as nobody exchanges or moves it."""

    module: nn.Module  #: that holds it
    name: str  #: under which it does
    parameter: Tensor  #: that is to be there
    sums: LayerSums  #: of its layer, which are counted where it is


class Plan(NamedTuple):
    """Of a layer whose calls, where their rows are samples, may wait to be added together with those of others."""

    dtype: torch.dtype  #: of its parameters, and of what is accumulated of it
    device: torch.device  #: where these are

    def admits(self, inputs: Tensor, cotangents: Tensor, others: Sequence[RankOne]) -> bool:
        """Whether the factors of a call are such as it was made for, and those of the first that waits already are."""
        other = others[0].cotangents if others else cotangents
        return (
            inputs.dim() == cotangents.dim() == 2
            and inputs.layout is torch.strided
            and inputs.dtype is cotangents.dtype is other.dtype is self.dtype
            and inputs.device == cotangents.device == other.device == self.device
        )


def plan_of(fisher: "OnlineFisher", layer: Layer) -> Plan | None:
    """The plan of a linear layer that is whole and accumulated as it is computed; None of any other.

    It is kept until the sums are others, or elsewhere.
    """
    if layer not in fisher.plans:
        fisher.plans[layer] = _decided(fisher, layer)
    return fisher.plans[layer]


def _decided(fisher: "OnlineFisher", layer: Layer) -> Plan | None:
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
