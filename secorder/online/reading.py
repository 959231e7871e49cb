"""What was accumulated, as it is told: the one place where the device is waited for."""

from typing import Literal

from ..errors import AttributionError, NonFiniteError, ProbeStateError, SecorderError
from ..results import Diagonals, LayerInfo, Strategy
from .fisher import OnlineFisher
from .troubles import OUTSIDE, sentence

__all__ = ["diagonals", "num_samples", "num_skipped", "untold"]


def num_samples(fisher: OnlineFisher) -> int:
    """How many samples the accumulated Fisher has seen."""
    return round(float(fisher.seen) + fisher.elsewhere)


def num_skipped(fisher: OnlineFisher) -> dict[str, int]:
    """How many batches were left out of a layer's mean because a gradient held nan or inf, by layer."""
    skipped = {name: sums.batches - round(float(sums.counts[2])) for name, sums in fisher.sums.items()}
    return {name: count for name, count in skipped.items() if count}


def untold(fisher: OnlineFisher) -> dict[str, str]:
    """The layers whose number is not to be told, and why."""
    failed = [layer.name for layer, count in zip(fisher.layers, fisher.failures.tolist(), strict=True) if count]
    return {**dict.fromkeys(failed, OUTSIDE), **fisher.troubles.marks}


def diagonals(fisher: OnlineFisher, missing: Literal["raise", "skip"] = "raise") -> Diagonals:
    """The mean over all samples, or the moving average; see :meth:`secorder.CurvatureProbe.fisher_diagonal`."""
    troubles = untold(fisher)
    if troubles and (missing == "raise" or len(troubles) == len(fisher.layers)):
        reason = next(iter(troubles.values()))
        raise AttributionError(sentence([name for name, other in troubles.items() if other == reason], reason))
    if fisher.assumed:
        fisher.troubles.warn(fisher.assumed)
    counts = {name: sums.counts.tolist() for name, sums in fisher.sums.items()}
    if not any(samples for samples, _, _ in counts.values()):
        for name in fisher.sums:
            if name in fisher.troubles.left_out:
                raise _unseen(fisher, name)
        raise ProbeStateError(fisher.troubles.nothing_accumulated())
    values = {}
    for layer in fisher.layers:
        samples, weight, _ = counts[layer.name]
        if samples and layer.name not in troubles:
            values[layer.name] = [total / weight for total in fisher.sums[layer.name].sums]
        elif missing == "raise":
            raise _unseen(fisher, layer.name)
    chosen = [layer for layer in fisher.layers if layer.name in values]
    return Diagonals(chosen, values, {layer.name: LayerInfo(Strategy.ONLINE) for layer in chosen})


def _unseen(fisher: OnlineFisher, name: str) -> SecorderError:
    """Why a layer has seen no sample that counts."""
    reason = fisher.troubles.left_out.get(name)
    if fisher.sums[name].batches and reason is None:
        return NonFiniteError(
            f"every gradient of layer {name!r} so far held nan or inf: lower the learning rate or the loss scale, or "
            'pass on_nonfinite="keep" to see them.'
        )
    if reason is None:
        reason = (
            "no gradient reaches it in training (it is frozen, with nothing trainable before it, or no recorded batch "
            "called it): leave it out with layers=, or pass loss_fn, inputs and targets for a one-shot measurement."
        )
    return AttributionError(f"layer {name!r}: {reason}")
