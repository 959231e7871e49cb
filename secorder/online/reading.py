"""What was accumulated, as it is told: the one place where the device is waited for."""

from collections.abc import Mapping
from typing import Literal

from ..errors import AttributionError, InvalidArgumentError, NonFiniteError, ProbeStateError, SecorderError
from ..results import Diagonals, LayerInfo, Strategy
from .fisher import OnlineFisher
from .sums import LayerSums, together
from .troubles import OUTSIDE, sentence

__all__ = ["all_sums", "diagonals", "num_samples", "num_skipped", "untold"]


def num_samples(fisher: OnlineFisher) -> int:
    """How many samples the accumulated Fisher has seen."""
    own = float(fisher.seen) + fisher.elsewhere
    return round(own if fisher.earlier is None else own + float(fisher.earlier.seen) + fisher.earlier.elsewhere)


def num_skipped(fisher: OnlineFisher) -> dict[str, int]:
    """How many batches were left out of a layer's mean because a gradient held nan or inf, by layer."""
    skipped = {}
    for name, sums in fisher.sums.items():
        both = [sums] if fisher.earlier is None else [sums, fisher.earlier.sums[name]]
        skipped[name] = sum(own.batches - round(float(own.counts[2])) for own in both)
    return {name: count for name, count in skipped.items() if count}


def all_sums(fisher: OnlineFisher) -> dict[str, LayerSums]:
    """All that was accumulated, by layer: before the last look at a window, and since."""
    if fisher.earlier is None:
        return fisher.sums
    return {name: together(fisher.earlier.sums[name], sums, fisher.decay) for name, sums in fisher.sums.items()}


def untold(fisher: OnlineFisher) -> dict[str, str]:
    """The layers whose number is not to be told, and why."""
    failed = [layer.name for layer, count in zip(fisher.layers, fisher.failures.tolist(), strict=True) if count]
    return {**dict.fromkeys(failed, OUTSIDE), **fisher.troubles.marks}


def diagonals(
    fisher: OnlineFisher,
    missing: Literal["raise", "skip"] = "raise",
    sums: Mapping[str, LayerSums] | None = None,
    troubles: Mapping[str, str] | None = None,
) -> Diagonals:
    """The mean over all samples, or the moving average; see :meth:`secorder.CurvatureProbe.fisher_diagonal`.

    Args:
        fisher: what was accumulated, and how.
        missing: what to do where a layer's number cannot be told.
        sums: of which stretch of training; by default of all that was accumulated.
        troubles: layers whose number was not to be told at its end, and why; by default those of now.
    """
    sums = all_sums(fisher) if sums is None else sums
    troubles = untold(fisher) if troubles is None else troubles
    weights = told(fisher, sums, troubles, missing)
    chosen = [layer for layer in fisher.layers if layer.name in weights]
    values = {x.name: [total / weights[x.name] for total in sums[x.name].sums] for x in chosen}
    return Diagonals(chosen, values, {layer.name: LayerInfo(Strategy.ONLINE) for layer in chosen})


def told(
    fisher: OnlineFisher,
    sums: Mapping[str, LayerSums],
    troubles: Mapping[str, str],
    missing: Literal["raise", "skip"],
) -> dict[str, float]:
    """The layers whose number can be told, and what its sums are divided by: the weight of the samples in them.

    Raises:
        SecorderError: there is none, or one is missing that is asked for.
    """
    if missing not in ("raise", "skip"):
        raise InvalidArgumentError(f'missing must be "raise" or "skip", got {missing!r}.')
    if troubles and (missing == "raise" or len(troubles) == len(fisher.layers)):
        reason = next(iter(troubles.values()))
        raise AttributionError(sentence([name for name, other in troubles.items() if other == reason], reason))
    if fisher.assumed:
        fisher.troubles.warn(fisher.assumed)
    counts = {name: own.counts.tolist() for name, own in sums.items()}
    if not any(samples for samples, _, _ in counts.values()):
        for name in sums:
            if name in fisher.troubles.left_out:
                raise _unseen(fisher, sums, name)
        raise ProbeStateError(fisher.troubles.nothing_accumulated())
    weights = {}
    for name, (samples, weight, _) in counts.items():
        if samples and name not in troubles:
            weights[name] = weight
        elif missing == "raise":
            raise _unseen(fisher, sums, name)
    return weights


def _unseen(fisher: OnlineFisher, sums: Mapping[str, LayerSums], name: str) -> SecorderError:
    """Why a layer has seen no sample that counts."""
    reason = fisher.troubles.left_out.get(name)
    if sums[name].batches and reason is None:
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
