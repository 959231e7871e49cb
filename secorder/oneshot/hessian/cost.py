"""What a Hessian will take, before it is paid."""

from dataclasses import dataclass

from ..._torch.vjp import default_chunk_size
from ...results import Strategy
from ..measurement import Measurement
from ..recording import recorded
from .budget import Budget
from .choice import Choice, choose
from .facts import Facts
from .investigate import investigate

__all__ = ["LayerCost", "estimate_cost", "layer_cost"]


@dataclass(frozen=True)
class LayerCost:
    """What a measurement will take for one layer.

    Attributes:
        strategy: the strategy it will go by (see :class:`~secorder.LayerInfo`).
        num_hvps: Hessian-vector products, vector-Jacobian products for ``"columns"`` and Fishers; for estimates the
            least number, for eigenvalues the largest.
        exact_hvps: those of the cheapest exact strategy that is allowed.
        num_bytes: memory of one batch of products, about.
    """

    strategy: Strategy
    num_hvps: int
    exact_hvps: int
    num_bytes: int


#: Strategies whose products end in z.
_IN_Z = (Strategy.COLUMNS, Strategy.OUTPUT_BASIS, Strategy.OUTPUT_DRAWS, Strategy.OUTPUT_PRODUCTS, Strategy.RULE)


def estimate_cost(task: Measurement, budget: Budget) -> dict[str, LayerCost]:
    """What a Hessian diagonal or trace would take for each layer: one forward, one backward and the checks are run.

    See :meth:`secorder.CurvatureProbe.estimate_cost`, which this function carries out.
    """
    with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
        found = investigate(task, recording, budget, columns=True)
        chosen = choose(list(found.facts.values()), budget)
    return {x.name: layer_cost(task, found.facts[x.name], chosen[x.name]) for x in task.layers}


def layer_cost(task: Measurement, facts: Facts, choice: Choice) -> LayerCost:
    """The cost of what was chosen, with the memory of one batch of products."""
    in_z = choice.strategy in _IN_Z
    elements = facts.output_elements if in_z else facts.parameter_elements
    layer = next(x for x in task.layers if x.name == facts.layer)
    like = next(iter(layer.parameters.values()))
    batch = min(max(choice.products, 1), default_chunk_size(elements, like, task.chunk_size))
    num_bytes = 4 * batch * elements * like.element_size()
    return LayerCost(choice.strategy, choice.products, choice.exact_products, num_bytes)
