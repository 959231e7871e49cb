"""What a Fisher will take, before it is paid: the checks are run, and a few of its columns."""

import math
from dataclasses import dataclass

from .._torch.pytree import tensors_in
from .._torch.vjp import gradients
from ..errors import DoubleBackwardError
from ..results import Strategy
from .fisher import Trial, in_batches
from .fisher_by_loop import one_sample
from .fisher_pairs import FisherType, Found
from .hessian.choice import Choice
from .hessian.cost import Cost, base_bytes, layer_cost
from .hessian.facts import Facts
from .measurement import Measurement
from .recording import recorded
from .timing import seconds_of

__all__ = ["fisher_cost"]

#: Columns of the longer trial.
SOME = 33


@dataclass(frozen=True)
class _Timed:
    """What trials told.

    Attributes:
        strategies: of the layers that are served by the whole batch.
        columns: how many there are.
        overhead: seconds without any column.
        seconds: of one column, for all layers together.
    """

    strategies: dict[str, Strategy]
    columns: int
    overhead: float
    seconds: float


def fisher_cost(task: Measurement, fisher_type: FisherType, num_draws: int) -> Cost:
    """What a Fisher will take, layer by layer.

    Args:
        task: the measurement.
        fisher_type: which Fisher.
        num_draws: draws of ``"mc"``.
    """
    timed = _timed(task, fisher_type, num_draws)
    passed, leaves = _sizes(task)
    sample = _seconds_of_sample(task) if len(timed.strategies) < len(task.layers) else 0.0
    costs = {}
    for layer in task.layers:
        numel = sum(p.numel() for p in layer.parameters.values())
        z = leaves.get(layer.name, 0)
        strategy = timed.strategies.get(layer.name, Strategy.LOOP)
        columns = timed.columns or num_columns(fisher_type, num_draws, passed // task.num_samples)
        products = columns * (1 if strategy in (Strategy.RULE, Strategy.UNUSED) else task.num_samples)
        facts = Facts(
            layer.name,
            numel,
            outputs=z // task.num_samples,
            passed=passed,
            output_elements=max(z, passed),
            parameter_elements=numel + 4 * passed,
        )
        seconds = timed.seconds * columns / max(1, len(timed.strategies))
        if strategy == Strategy.LOOP:
            seconds = task.num_samples * sample * columns / (len(task.layers) - len(timed.strategies))
        costs[layer.name] = layer_cost(task, facts, Choice(strategy, products, products), seconds)
    return Cost(costs, timed.overhead, base_bytes(task, passed, passed + sum(leaves.values())))


def num_columns(fisher_type: FisherType, num_draws: int, outputs: int) -> int:
    """Pairs of cotangents, at most."""
    return {"empirical": 1, "type-2": max(outputs, 1), "mc": num_draws}[fisher_type]


def _timed(task: Measurement, fisher_type: FisherType, num_draws: int) -> _Timed:
    """By two trials, of which the first tells what is done anyway."""
    found: Found = {}
    one, some = Trial(1), Trial(SOME)
    start = seconds_of(lambda: found.update(_tried(task, fisher_type, num_draws, one)))
    strategies = {name: info.strategy for name, (_, info) in found.items()}
    if not strategies:
        return _Timed({}, 0, start, 0.0)
    first = seconds_of(lambda: _tried(task, fisher_type, num_draws, one))
    if one.of <= 1:
        return _Timed(strategies, one.of, first, 0.0)
    longer = seconds_of(lambda: _tried(task, fisher_type, num_draws, some))
    seconds = max(longer - first, 1e-9) / (min(SOME, one.of) - 1)
    return _Timed(strategies, one.of, max(first - seconds, 0.0), seconds)


def _tried(task: Measurement, fisher_type: FisherType, num_draws: int, trial: Trial) -> Found:
    try:
        return in_batches(task, fisher_type, num_draws, trial)
    except DoubleBackwardError:  # of the checks; the definition needs one derivative
        return {}


def _sizes(task: Measurement) -> tuple[int, dict[str, int]]:
    """Numbers of the model's output, and by layer of z."""
    with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
        output, _ = task.loss()
        recording.close()
    passed = sum(t.numel() for t in tensors_in(output) if t.requires_grad)
    return passed, {name: sum(math.prod(x.shape) for x in leaves) for name, leaves in recording.leaves.items()}


def _seconds_of_sample(task: Measurement) -> float:
    """A forward and a gradient of a batch of one."""
    replacements = [s for layer in task.layers for s in task.isolated.replacements(layer)]

    def work() -> None:
        _, loss = one_sample(task, 0)
        if loss.requires_grad:
            gradients(loss, replacements)

    work()
    return seconds_of(work)
