"""Findings while a model trains: when each begins and when it ends."""

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .._caution import caution
from .findings import THRESHOLDS, Finding, FindingKind, finding, shares
from .names import WHOLE_MODEL, Numbers

__all__ = ["Change"]

#: A finding ends below this share of its threshold, so that a number that hovers about it is not told again and again.
EASE = 0.8

#: Points back in which a trace's growth is looked for, and over which gradient noise is averaged.
MEMORY = 10

#: Points of gradient noise that are needed before it is judged.
NOISE_POINTS = 3


@dataclass
class Observation:
    """What is known at one point of the log."""

    numbers: dict[str, dict[str, float]] = field(default_factory=dict)  #: what is logged: statistic → layer → number
    #: layer → statistics of the Fisher (:func:`secorder.monitor.statistics.layer_statistics`)
    fisher: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    #: the same of the Hessian, where it was measured
    hessian: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    left_out: Collection[str] = ()  #: layers of which gradients were left out because they held nan or inf
    batch_size: float | None = None  #: samples of a training step; None where it is not known
    #: |G|² and tr Σ of the whole model, whose ratio is the gradient noise scale; None where it is not known
    noise: tuple[float, float] | None = None

    def add(self, numbers: Numbers) -> None:
        """Take further numbers."""
        for statistic, values in numbers.items():
            self.numbers.setdefault(statistic, {}).update(values)


@dataclass(frozen=True)
class Change:
    """A finding that begins or ends.

    Attributes:
        finding: what stands out, or stood out.
        begins: whether it begins; else it ends.
        step: at which training step.
    """

    finding: Finding
    begins: bool
    step: int

    def __str__(self) -> str:
        return f"step {self.step}: {self.finding if self.begins else f'no longer {self.finding.measured}'}"


class RunningFindings:
    """Keeps what stands out, and tells each :class:`Change`; by default one warning for each kind of finding."""

    def __init__(self, tell: Callable[[Change], None] | None = None) -> None:
        self._tell = tell
        self._active: dict[tuple[FindingKind, str], Finding] = {}
        self._traces: deque[Mapping[str, float]] = deque(maxlen=MEMORY)
        self._noise: deque[tuple[float, float]] = deque(maxlen=MEMORY)

    @property
    def now(self) -> list[Finding]:
        """What stands out now."""
        return list(self._active.values())

    def update(self, point: Observation, step: int) -> list[Change]:
        """Compare a point with its thresholds, tell what begins and ends, and return it."""
        changes = []
        if point.noise is not None:
            self._noise.append(point.noise)
        for kind, values in _values(point, self._traces, self._noise).items():
            for layer, value in values.items():
                before = self._active.get((kind, layer))
                threshold = THRESHOLDS[kind] * (1.0 if before is None else EASE)
                if value >= threshold and value > 0:
                    self._active[kind, layer] = finding(kind, layer, value)
                    if before is None:
                        changes.append(Change(self._active[kind, layer], True, step))
                elif before is not None:
                    del self._active[kind, layer]
                    changes.append(Change(finding(kind, layer, value), False, step))
        if "fisher_trace" in point.numbers:
            self._traces.append(point.numbers["fisher_trace"])
        if self._tell is None:
            _warn(changes, step)
        else:
            for change in changes:
                self._tell(change)
        return changes

    def markdown(self, step: int) -> str:
        """What stands out now, as a list."""
        found = "\n".join(f"- {one}" for one in self.now)
        return f"At step {step}:\n\n{found}" if found else f"At step {step} nothing stands out."

    def state_dict(self) -> dict[str, Any]:
        """What stands out and the traces that growth is told by, as plain Python."""
        kept = {"traces": [dict(row) for row in self._traces], "noise": [list(pair) for pair in self._noise]}
        return {"active": [asdict(one) for one in self.now], **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        found = [Finding(**one) for one in state["active"]]
        self._active = {(one.kind, one.layer): one for one in found}
        self._traces = deque(state["traces"], maxlen=MEMORY)
        self._noise = deque(((pair[0], pair[1]) for pair in state["noise"]), maxlen=MEMORY)


def _values(
    point: Observation, earlier: "deque[Mapping[str, float]]", noise: "deque[tuple[float, float]]"
) -> dict[FindingKind, dict[str, float]]:
    """Of each kind that this point can tell, the number of each layer that is held against the threshold."""
    traces = point.numbers.get("fisher_trace", {})
    found = shares(point.fisher, point.hessian, traces)
    loss = point.numbers.get(WHOLE_MODEL, {}).get("loss")
    gone = {name: 1.0 for name in point.left_out if name not in point.fisher}  # of which no gradient was left
    found["non-finite"] |= gone if loss is None else {"": float(not math.isfinite(loss)), **gone}
    if traces and earlier:
        least = {name: min((row[name] for row in earlier if row.get(name, 0) > 0), default=math.nan) for name in traces}
        found["growing"] = {name: trace / least[name] for name, trace in traces.items()}
    if point.noise is not None and point.batch_size and len(noise) >= NOISE_POINTS:
        # Both are averaged before the ratio: that of one window, of few batches, is itself mostly noise.
        signal, variance = (sum(pair[place] for pair in noise) for place in (0, 1))
        found["noisy"] = {"": variance / signal / point.batch_size if signal > 0 else math.inf}
    if "learning_rate_times_eigenvalue" in point.numbers:
        found["edge"] = point.numbers["learning_rate_times_eigenvalue"]
    return found


def _warn(changes: list[Change], step: int) -> None:
    """One warning for each kind that begins, and for each that ends, however many layers it is found in."""
    groups: dict[tuple[str, bool], list[Finding]] = {}
    for change in changes:
        groups.setdefault((change.finding.kind, change.begins), []).append(change.finding)
    for (_, begins), (first, *others) in groups.items():
        names = ", ".join(x.layer for x in others[:3]) + (" …" if len(others) > 3 else "")
        caution(f"{Change(first, begins, step)}{f' (and {len(others)} more: {names})' if others else ''}")
