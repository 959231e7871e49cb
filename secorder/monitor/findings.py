"""Findings: what stands out in the curvature of a model, in words."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ..errors import CouplingError
from ..results import Diagonals, Strategy
from .html import html_list
from .names import Numbers
from .table import Report, report
from .terminal import Console, ConsoleOptions, Group, RenderResult, Text

FindingKind = Literal[
    "non-finite", "unreached", "dead", "dominant", "saddle", "disagreement", "coupled", "growing", "noisy", "edge"
]

#: From where on something is found. Shares lie between 0 and 1; the others are ratios, or a product for ``edge``.
THRESHOLDS: dict[FindingKind, float] = {
    "non-finite": 0.0,
    "dead": 0.5,
    "dominant": 0.9,
    "saddle": 0.25,
    "disagreement": 3.0,
    "growing": 10.0,
    "noisy": 1.0,
    "edge": 2.0,
}

#: Types of layers of which samples look up rows.
TABLES = ("Embedding", "EmbeddingBag")

#: What the value of a finding is.
MEASURES: dict[FindingKind, str] = {
    "non-finite": "share of numbers that are nan or infinite",
    "unreached": "number of parameters that the loss does not depend on",
    "dead": "share of parameters with no gradient on any sample",
    "dominant": "share of the whole trace",
    "saddle": "share of negative entries in the Hessian",
    "disagreement": "ratio of the Hessian's trace to the Fisher's",
    "growing": "the trace over its least of the last ten points",
    "noisy": "gradient noise scale over the batch size",
    "edge": "learning rate times top eigenvalue",
}

#: What a finding means, and what can be done.
TEXTS: dict[FindingKind, str] = {
    "non-finite": "lower the learning rate, or clip gradients.",
    "unreached": "the layer is not used, detached, or wholly dead.",
    "dead": "dead units (ReLU), or inputs that are always zero; they can be pruned at no cost.",
    "dominant": "steps are bounded by this layer; give it a smaller learning rate, or normalise its input.",
    "saddle": "the loss curves down along them, far from a minimum.",
    "disagreement": "the empirical Fisher is a poor substitute for the curvature here; use the Hessian, or "
    "fisher_type='type-2'.",
    "coupled": "there is no Fisher",
    "growing": "lower the learning rate, or clip gradients.",
    "noisy": "steps are mostly noise, so that a larger batch, or a lower learning rate, goes further.",
    "edge": "beyond 2 plain gradient descent diverges along that direction; lower the learning rate of this layer.",
}


@dataclass(frozen=True)
class Finding:
    """Something that stands out in a measurement.

    Attributes:
        kind: what: ``"non-finite"`` entries, ``"unreached"`` parameters, a ``"dead"`` or ``"dominant"`` layer,
            ``"saddle"`` directions, ``"disagreement"`` of Fisher and Hessian, ``"coupled"`` samples; while training
            also a ``"growing"`` trace, ``"noisy"`` gradients, and learning rates at the ``"edge"`` of stability.
        layer: where (``""`` for the whole model).
        value: the number that was found.
        threshold: from where on it is reported.
        text: what it means and what can be done.
    """

    kind: FindingKind
    layer: str
    value: float
    threshold: float
    text: str

    @property
    def measured(self) -> str:
        """What was found, without what can be done."""
        threshold = f" (threshold {self.threshold:.3g})" if self.threshold else ""
        value = f"{MEASURES[self.kind]} is {self.value:.3g}{threshold}" if self.kind in MEASURES else ""
        return f"[{self.kind}] " + ": ".join(filter(None, [self.layer, value]))

    def __str__(self) -> str:
        return f"{self.measured}{': ' if self.kind in MEASURES else ''}{self.text}"


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        fisher: the empirical Fisher diagonal per layer; None where samples are coupled, so that there is none.
        hessian: the Hessian diagonal per layer.
        statistics: ``"fisher"`` and ``"hessian"`` → layer name → statistics
            (:func:`secorder.monitor.statistics.layer_statistics`).
        findings: what stands out.
        num_samples: how many samples were measured.
        loss: the loss on them.
    """

    fisher: Diagonals | None
    hessian: Diagonals
    statistics: dict[str, dict[str, dict[str, float]]]
    findings: list[Finding]
    num_samples: int
    loss: float

    def report(self, **options: Any) -> Report:
        """The table of layers; ``options`` as for :func:`secorder.report`."""
        title = f"{self.num_samples:,} samples, loss {self.loss:.4g}"
        return report(self.fisher, self.hessian, **{"title": title, **options})

    def _sentences(self) -> list[str]:
        return [str(finding) for finding in self.findings] or ["Nothing stands out."]

    def __str__(self) -> str:
        return "\n".join([str(self.report()), *self._sentences()])

    __repr__ = __str__  # what a prompt shows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        mark = "• " if self.findings else ""
        yield Group(self.report(), *(Text(mark + sentence) for sentence in self._sentences()))

    def _repr_html_(self) -> str:
        """What a notebook shows: the table, and what was found."""
        return self.report()._repr_html_() + html_list(self._sentences())

    def to_json(self, **options: Any) -> str:
        """Statistics, findings, sizes and strategies as JSON; ``options`` as for ``json.dumps``."""
        strategies = {
            name: {"strategy": info.strategy, "num_hvps": info.num_hvps} for name, info in self.hessian.info.items()
        }
        return json.dumps(
            {
                "num_samples": self.num_samples,
                "loss": self.loss,
                "statistics": self.statistics,
                "hessian_strategies": strategies,
                "findings": [asdict(finding) for finding in self.findings],
            },
            **options,
        )


def find(
    hessian: Diagonals, statistics: dict[str, dict[str, dict[str, float]]], samples: int, coupled: CouplingError | None
) -> list[Finding]:
    """What stands out, the model's before its layers'; a mean loss makes the Hessian a sum over ``samples`` = 1."""
    curved, gathered = statistics["hessian"], without_tables(statistics.get("fisher", {}), hessian)
    values = shares(gathered, curved, {name: row["trace"] for name, row in (gathered or curved).items()})
    found = [] if coupled is None else [finding("coupled", "", 1.0, f"{TEXTS['coupled']}: {coupled}")]
    for name, row in curved.items():
        own, here = gathered.get(name), {kind: of_kind[name] for kind, of_kind in values.items() if name in of_kind}
        all_zero = own is not None and own["zero"] == row["zero"] == 1.0
        if here["non-finite"] > 0:
            here = {"non-finite": here["non-finite"]}
        elif all_zero or hessian.info[name].strategy == Strategy.UNUSED:
            here = {"unreached": float(hessian[name].numel())}
        elif own is not None and own["trace"] > 0:
            ratio, most = abs(row["trace"]) / samples / own["trace"], THRESHOLDS["disagreement"]
            if not 1 / most <= ratio <= most:
                found.append(replace(finding("disagreement", name, ratio), threshold=most if ratio > 1 else 1 / most))
        found += [finding(kind, name, x) for kind, x in here.items() if x > 0 and x >= THRESHOLDS.get(kind, 0.0)]
    order = list(THRESHOLDS)
    return sorted(found, key=lambda f: (f.layer != "", order.index(f.kind) if f.kind in order else 0))


def shares(fisher: Numbers, hessian: Numbers, traces: Mapping[str, float]) -> dict[FindingKind, dict[str, float]]:
    """By kind and layer, what thresholds are held against of statistics of diagonals, each by layer, and of traces."""
    bad = {name: row["nonfinite"] for name, row in fisher.items()}
    bad |= {name: max(bad.get(name, 0.0), row["nonfinite"]) for name, row in hessian.items()}
    whole = sum(traces.values()) if len(traces) > 2 else 0.0
    return {
        "non-finite": bad,
        "dead": {name: row["zero"] for name, row in fisher.items()},
        "saddle": {name: row["negative"] for name, row in hessian.items()},
        "dominant": {name: trace / whole for name, trace in traces.items()} if whole > 0 else {},
    }


def without_tables(statistics: Mapping[str, dict[str, float]], diagonals: Diagonals) -> dict[str, dict[str, float]]:
    """Statistics of a Fisher in which tables have no zero entries, unless all are: rows not looked up are not dead."""
    kinds = diagonals.layer_types
    tables = {name for name, row in statistics.items() if kinds[name] in TABLES and row["zero"] < 1}
    return {name: row | {"zero": 0.0} if name in tables else row for name, row in statistics.items()}


def finding(kind: FindingKind, layer: str, value: float, text: str | None = None) -> Finding:
    """A finding with its threshold and its text."""
    return Finding(kind, layer, value, THRESHOLDS.get(kind, 0.0), TEXTS[kind] if text is None else text)
