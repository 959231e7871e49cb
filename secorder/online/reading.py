"""Reading what was accumulated: the one place that waits for the device."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .._arguments import require_one_of
from .._sharing import counted_once
from .._torch.compile import in_whole_graph
from .._torch.several import divide_each
from ..errors import AttributionError, NonFiniteError, ProbeStateError, SecorderError
from ..oneshot.trace import Trace
from ..parallel.fsdp import whole_sum
from ..results import Diagonals, LayerInfo, Strategy
from .closing import audit_uncalled, failed_audits
from .fisher import OnlineFisher
from .noise import NoiseScales, noise_of
from .trace import effective_samples, trace_of
from .troubles import sentence
from .window_sums import WindowSums, joined

#: What to do where a layer's number cannot be given.
Missing = Literal["raise", "skip"]

#: What is read: a window of training, and the layers whose numbers cannot be given for it, with the reason.
Read = tuple[WindowSums, Mapping[str, str]]

_NOT_FINITE = 'lower the learning rate or the loss scale, or pass on_nonfinite="keep" to see them.'

NO_NOISE = (
    'gradient noise needs batches of more than one sample, one forward for each backward (or forwards="joined" or '
    '"separate", whichever holds), and no penalty=: there was no such batch.'
)


def num_samples(fisher: OnlineFisher) -> int:
    """How many samples the accumulated Fisher has seen."""
    own = float(fisher.seen) + fisher.elsewhere
    return round(own if fisher.earlier is None else own + float(fisher.earlier.seen) + fisher.earlier.elsewhere)


def num_skipped(fisher: OnlineFisher, only: WindowSums | None = None) -> dict[str, int]:
    """How many batches were left out of a layer's mean because a gradient held nan or inf, by layer (of a window)."""
    windows = [only] if only is not None else [x for x in (fisher, fisher.earlier) if x is not None]
    skipped = dict.fromkeys(fisher.sums, 0)
    for window in windows:
        for name, count in counts_of(fisher, window).items():
            skipped[name] += window.sums[name].batches - round(count.batches)
    return {name: count for name, count in skipped.items() if count}


class Counts(NamedTuple):
    """What is in a layer's sums."""

    samples: float  #: how many
    weight: float  #: of them, what sums are divided by
    batches: float  #: that count


def counts_of(fisher: OnlineFisher, window: OnlineFisher | WindowSums) -> dict[str, Counts]:
    """What is in the sums of each layer."""
    if fisher.accumulate == "diagonal":
        table = on_host([sums.counts for sums in window.sums.values()])
        return {name: Counts(*row) for name, row in zip(window.sums, table, strict=True)}
    rows = zip(window.sums, window.norms.rows(), strict=True)
    return {name: Counts(row.samples, row.weight, row.batches) for name, row in rows}


def on_host(tensors: Sequence[Tensor]) -> list[Any]:
    """Tensors of one shape as lists of numbers: gathered where the first one is, and read at once."""
    device = tensors[0].device
    found: list[Any] = torch.stack([t if t.device == device else t.to(device) for t in tensors]).tolist()
    return found


def everything(fisher: OnlineFisher) -> WindowSums:
    """All that was accumulated: before the last look at a window, and since."""
    now = WindowSums(fisher.sums, fisher.seen, fisher.elsewhere, fisher.batches, fisher.norms)
    return now if fisher.earlier is None else joined(fisher.earlier, now, fisher.decay)


def unreadable(fisher: OnlineFisher) -> dict[str, str]:
    """The layers whose number cannot be given, and why."""
    audit_uncalled(fisher)
    return {**{name: fisher.troubles.outside(name) for name in failed_audits(fisher)}, **fisher.marked()}


def diagonals(fisher: OnlineFisher, missing: Missing = "raise", read: Read | None = None) -> Diagonals:
    """The mean over all samples, or the moving average (of a window); see :class:`secorder.CurvatureProbe`."""
    if fisher.accumulate != "diagonal":
        raise ProbeStateError(
            f'the probe accumulates {fisher.accumulate!r}, no diagonal: make one with accumulate="diagonal", or pass '
            "loss_fn, inputs and targets to measure a batch."
        )
    window, counts = readable(fisher, missing, read)
    chosen = [layer for layer in fisher.layers if layer.name in counts]
    totals = {layer.name: window.sums[layer.name].sums for layer in chosen}
    unknown = LayerInfo(Strategy.ONLINE)
    infos = {by: replace(unknown, measured_by=by) for by in set(fisher.measured_by.values())}
    known = {name: infos[by] for name, by in fisher.measured_by.items()}
    found = Diagonals(chosen, totals, {name: known.get(name, unknown) for name in totals})
    divide_each(list(found.values()), [counts[name].weight for name in found])
    return found


def fisher_traces(fisher: OnlineFisher, missing: Missing = "raise", read: Read | None = None) -> dict[str, Trace]:
    """See :meth:`secorder.CurvatureProbe.fisher_trace`; arguments as of :func:`diagonals`."""
    window, counts = readable(fisher, missing, read)
    rows = dict(zip(window.sums, window.norms.rows(), strict=True))
    found, share = {}, ranks(window)
    traces = _traces(fisher, window, list(counts)) if fisher.accumulate == "diagonal" else {}
    for name, count in counts.items():
        row, value = rows[name], None
        if fisher.accumulate == "diagonal":
            value = traces[name] / count.weight
            effective = effective_samples(count.samples, count.batches, count.weight, fisher.decay)
        else:
            effective = row.weight**2 / row.weight_squares
        found[name] = trace_of(row, value, count.samples * share, effective * share)
    return found


def _traces(fisher: OnlineFisher, window: WindowSums, names: Sequence[str]) -> dict[str, float]:
    """The sums of the squares of these layers, read at once."""
    held = {layer.name: layer.parameters.values() for layer in fisher.layers}
    parts = [
        (name, whole_sum(own, p)) for name in names for own, p in zip(window.sums[name].sums, held[name], strict=True)
    ]
    found = dict.fromkeys(names, 0.0)
    for (name, _), value in zip(parts, on_host([part for _, part in parts]), strict=True):
        found[name] += value
    return found


def noise_scales(fisher: OnlineFisher, missing: Missing = "raise", read: Read | None = None) -> NoiseScales:
    """See :meth:`secorder.CurvatureProbe.gradient_noise_scale`; arguments as of :func:`diagonals`."""
    window, counts = readable(fisher, missing, read)
    rows = dict(zip(window.sums, window.norms.rows(), strict=True))
    found = {name: noise_of(rows[name]) for name in counts}
    unknown = [name for name, scale in found.items() if scale is None]
    if unknown and (missing == "raise" or len(unknown) == len(found)):
        raise AttributionError(sentence(unknown, NO_NOISE))
    samples = max(rows[name].samples for name in counts)
    known = {name: x for name, x in found.items() if x is not None}
    counted = counted_once({x.name: list(x.parameters.values()) for x in fisher.layers if x.name in known})
    return NoiseScales(known, round(samples * ranks(window)), counted)


def ranks(window: WindowSums) -> float:
    """How many times as many samples are behind what is told as this rank counts."""
    seen = float(window.seen)
    return 1 + window.elsewhere / seen if seen else 1.0


def readable(fisher: OnlineFisher, missing: Missing, read: Read | None) -> tuple[WindowSums, dict[str, Counts]]:
    """What is read, with the layers whose number can be given, and the samples in it.

    Raises where there is none, or by ``missing``.
    """
    window, troubles = read or (everything(fisher), unreadable(fisher))
    require_one_of("missing", missing, get_args(Missing))
    if troubles and (missing == "raise" or len(troubles) == len(fisher.layers)):
        raise _troubled(troubles)
    for assumed in filter(None, (fisher.assumed, fisher.troubles.unseen, fisher.sizes.assumed)):
        fisher.troubles.warn(assumed)
    counts = counts_of(fisher, window)
    if not any(count.samples for count in counts.values()):
        for name in counts:
            if name in fisher.troubles.left_out:
                raise _unseen(fisher, window, name)
        if any(sums.batches for sums in window.sums.values()):
            raise ProbeStateError(f"nothing is accumulated yet: every gradient so far held nan or inf: {_NOT_FINITE}")
        if in_whole_graph(fisher.name):
            fisher.troubles.saw("compiled")
        trained = [x.name for x in fisher.layers if any(map(fisher.uncalled.changed, x.parameters.values()))]
        raise ProbeStateError(fisher.troubles.nothing_accumulated(fisher.model, trained))
    chosen = {}
    for name, count in counts.items():
        if count.samples and name not in troubles:
            chosen[name] = count
        elif missing == "raise":
            raise _unseen(fisher, window, name)
    if not chosen:  # those that have seen samples are marked
        raise _troubled(troubles)
    return window, chosen


def _troubled(troubles: Mapping[str, str]) -> AttributionError:
    """What the first layer that cannot be read is told of, and the others of the same reason."""
    reason = next(iter(troubles.values()))
    return AttributionError(sentence([name for name, other in troubles.items() if other == reason], reason))


def _unseen(fisher: OnlineFisher, window: WindowSums, name: str) -> SecorderError:
    """Why a layer has seen no sample that counts."""
    reason = fisher.troubles.left_out.get(name)
    if window.sums[name].batches and reason is None:
        return NonFiniteError(f"every gradient of layer {name!r} so far held nan or inf: {_NOT_FINITE}")
    if reason is None:
        reason = (
            "no gradient reaches it in training (it is frozen, with nothing trainable before it, or no recorded batch "
            "called it): leave it out with layers=, or pass loss_fn, inputs and targets for a one-shot measurement."
        )
    return AttributionError(f"layer {name!r}: {reason}")
