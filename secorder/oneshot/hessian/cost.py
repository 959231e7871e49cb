"""The cost of a Hessian, estimated before it is measured."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from ..._torch.memory import most_bytes
from ..._torch.vjp import default_chunk_size
from ...layers.selection import Layer
from ...results import Strategy
from ..measurement import Measurement
from ..recording import Recording, recorded
from ..timing import seconds_of
from .budget import Budget
from .chain import Chain, seconds_of_chain
from .choice import Choice, seconds_of_exact
from .decision import circumstances, matters
from .facts import Facts
from .investigate import Findings, along_chain, attached, investigate
from .output_draws import Reduce, whole
from .trials import learn_seconds


@dataclass(frozen=True)
class LayerCost:
    """What a measurement will take for one layer.

    Attributes:
        strategy: the strategy it will go by (see :class:`~secorder.LayerInfo`).
        num_hvps: Hessian-vector products, vector-Jacobian products for ``"columns"`` and Fishers; for estimates the
            least number, for eigenvalues the largest.
        exact_hvps: those of the cheapest exact strategy that is allowed.
        num_bytes: memory of one batch of products, about.
        seconds: that it will take, by short trials; of what serves several layers at once, an equal part. For an
            estimate down to ``rtol``, by the spread of the first draws; for eigenvalues, by how residuals fall.
    """

    strategy: Strategy
    num_hvps: int
    exact_hvps: int
    num_bytes: int
    seconds: float = field(default=0.0, compare=False)


class Cost(dict[str, LayerCost]):
    """What a measurement will take, layer by layer: layer name → :class:`LayerCost`.

    Attributes:
        overhead: seconds of what is done once for all layers: forwards, gradients, checks.
        base_bytes: memory besides products, about: graphs, copies of the outputs, results.
        num_batches: batches of a data set, each of which takes that long.
    """

    overhead: float
    base_bytes: int
    num_batches: int

    def __init__(self, layers: Mapping[str, LayerCost], overhead: float, base_bytes: int) -> None:
        super().__init__(layers)
        self.overhead = overhead
        self.base_bytes = base_bytes
        self.num_batches = 1

    @property
    def seconds(self) -> float:
        """That the whole measurement will take, about."""
        return self.num_batches * (self.overhead + sum(cost.seconds for cost in self.values()))

    @property
    def num_bytes(self) -> int:
        """Memory that it will take beyond the model's own, about."""
        return self.base_bytes + max((cost.num_bytes for cost in self.values()), default=0)

    def __repr__(self) -> str:
        return f"Cost({self.seconds:.3g} s, {self.num_bytes / 1e6:.3g} MB, {super().__repr__()})"


#: Seconds from which on an investigation is not made again.
LONG = 0.2

#: Strategies whose products, if there are any, do not end in z.
_NOT_IN_Z = (Strategy.UNUSED, Strategy.PARAMETER_BASIS, Strategy.PARAMETER_DRAWS, Strategy.PER_SAMPLE, Strategy.LOOP)

#: Strategies whose products are with the Hessian, of one layer.
_BY_LAYER = (Strategy.OUTPUT_BASIS, Strategy.OUTPUT_DRAWS, Strategy.PARAMETER_BASIS, Strategy.PARAMETER_DRAWS)


def estimate_cost(task: Measurement, budget: Budget, reduce: Reduce = whole) -> Cost:
    """What a Hessian diagonal or trace would take: one forward, one backward, the checks and short trials are run."""
    with ExitStack() as opened:
        found, recording, overhead, kept = _investigated(task, budget, opened)
        of = circumstances(task, found, budget)
        if matters(found, budget):
            learn_seconds(task, found, budget, recording)
        by_chain = _seconds_by_chain(task, found, budget)
        budget = budget.after(sum(by_chain.values()))
        drawn = learn_seconds(task, found, budget, recording, draws=reduce)
        task.told.keep(of, found.facts, found.seconds, sum(by_chain.values()))
        chosen = found.chosen(budget)
    served = max(1, sum(c.strategy == Strategy.COLUMNS and c.products > 0 for c in chosen.values()))
    costs = {}
    for layer in task.layers:
        facts, choice = found.facts[layer.name], chosen[layer.name]
        if choice.strategy == Strategy.CHAIN:
            seconds = by_chain[layer.name]
        elif choice.strategy == Strategy.COLUMNS:
            seconds = choice.products * facts.seconds_by_column / served
        elif choice.strategy in (Strategy.COLUMN_DRAWS, Strategy.OUTPUT_DRAWS, Strategy.PARAMETER_DRAWS):
            seconds = drawn.get(layer.name, 0.0)
        else:
            seconds = seconds_of_exact(facts, budget)
        costs[layer.name] = layer_cost(task, facts, choice, seconds)
    if any(c.strategy in (Strategy.PARAMETER_BASIS, Strategy.PARAMETER_DRAWS) for c in chosen.values()):
        overhead += 3 * found.seconds  # another forward and gradient
    return Cost(costs, overhead, kept + result_bytes(task.layers))


def _investigated(task: Measurement, budget: Budget, opened: ExitStack) -> tuple[Findings, Recording, float, int]:
    """What an investigation finds, in a recording that stays open; its seconds, and the memory that it takes.

    One that is short is made again, which tells both; of one that takes long, memory is that of what it begins with.
    """

    def investigated() -> tuple[Findings, Recording]:
        recording = opened.enter_context(recorded(task.isolated, task.ruled, own_parameters=False))
        return investigate(task, recording, budget, columns=True), recording

    kept, made = 0, list[tuple[Findings, Recording]]()
    seconds = seconds_of(lambda: made.append(investigated()))  # with what happens the first time alone
    if seconds < LONG:
        opened.close()
        kept = most_bytes(investigated)
        opened.close()
        seconds = seconds_of(lambda: made.append(investigated()))
    else:
        found, recording = made[-1]
        with recording.paused():  # a checkpoint runs forwards again
            kept = most_bytes(lambda: _kept(task, found))
            plain = min(found.seconds, _kept(task, found))
        seconds -= found.seconds - plain
        found.seconds = plain
    return *made[-1], seconds, kept


def _kept(task: Measurement, found: Findings) -> float:
    """What an investigation keeps; how many seconds its forward and gradient take."""
    with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
        kept: list[Any] = []
        seconds = seconds_of(lambda: kept.append(attached(task, recording, with_gradients=found.put_off is None)))
        if found.output_side is not None and found.output_side.root is not None:
            replace(found.output_side, root=None).find_root(task.chunk_size)
    return seconds


def result_bytes(layers: Sequence[Layer]) -> int:
    """Memory of a number for each element of the layers."""
    return sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters.values())


def _seconds_by_chain(task: Measurement, found: Findings, budget: Budget) -> dict[str, float]:
    """What each layer takes that the chain serves, with the memory of all of them learnt."""

    def told(chain: Chain) -> tuple[int, dict[str, float]]:
        return most_bytes(lambda: seconds_of_chain(task, chain)), seconds_of_chain(task, chain)

    num_bytes, seconds = along_chain(task, found, budget, told) or (0, {})
    for name in seconds:
        found.learn(name, num_bytes=num_bytes)
    return seconds


def layer_cost(task: Measurement, facts: Facts, choice: Choice, seconds: float = 0.0) -> LayerCost:
    """The cost of what was chosen, with the memory of one batch of products: as a trial told, else by their size."""
    elements = facts.parameter_elements if choice.strategy in _NOT_IN_Z else facts.output_elements
    layer = next(x for x in task.layers if x.name == facts.layer)
    like = next(iter(layer.parameters.values()))
    by_layer = choice.strategy in _BY_LAYER
    most = task.products_at_once(elements, like) if by_layer else default_chunk_size(elements, like, task.chunk_size)
    batch = min(max(choice.products, 1), most)
    num_bytes = facts.num_bytes or 4 * batch * elements * like.element_size()
    return LayerCost(choice.strategy, choice.products, choice.exact_products, num_bytes, seconds)
