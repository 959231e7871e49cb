"""One-shot diagnostics: Fisher, Hessian, statistics, and what a practitioner can make of them."""

import json
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.text import Text
from torch import Tensor, nn

from ._torch.pytree import map_tensors
from .batch import batch_size, sample_dimension
from .diagonals import Diagonals, weighted_sum
from .errors import CouplingError, InvalidArgumentError, InvalidTypeError
from .hessian import HessianMethod
from .layers import LayerTypes
from .loan import losses
from .probe import CurvatureProbe
from .progress import progress_bar
from .report import Report, report
from .stats import layer_statistics

__all__ = ["Diagnosis", "Finding", "diagnose"]

FindingKind = Literal["non-finite", "unreached", "dead", "dominant", "saddle", "disagreement", "coupled"]

#: From where on something is found. Shares lie between 0 and 1; ``disagreement`` is a ratio of traces.
THRESHOLDS: dict[FindingKind, float] = {
    "non-finite": 0.0,
    "dead": 0.5,
    "dominant": 0.9,
    "saddle": 0.25,
    "disagreement": 3.0,
}


@dataclass(frozen=True)
class Finding:
    """Something that deserves a look.

    Attributes:
        kind: what: ``"non-finite"`` entries, ``"unreached"`` parameters, a ``"dead"`` or ``"dominant"`` layer,
            ``"saddle"`` directions, ``"disagreement"`` of Fisher and Hessian, ``"coupled"`` samples.
        layer: where (``""`` for the whole model).
        value: the number that was found.
        threshold: from where on it is told.
        text: what it means and what can be done.
    """

    kind: FindingKind
    layer: str
    value: float
    threshold: float
    text: str

    def __str__(self) -> str:
        where = f"{self.layer}: " if self.layer else ""
        return f"[{self.kind}] {where}{self.text} ({self.value:.3g}; told from {self.threshold:.3g} on)"


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        fisher: the empirical Fisher diagonal per layer; None where samples are coupled, so that there is none.
        hessian: the Hessian diagonal per layer.
        statistics: ``"fisher"`` and ``"hessian"`` → layer name → statistics (:func:`secorder.stats.layer_statistics`).
        findings: what deserves a look.
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

    def __str__(self) -> str:
        found = [str(finding) for finding in self.findings] or ["Nothing stands out."]
        return "\n".join([str(self.report()), *found])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = [Text(f"• {finding}") for finding in self.findings] or [Text("Nothing stands out.")]
        yield Group(self.report(), *found)

    def to_json(self, **options: Any) -> str:
        """Statistics, findings, sizes and ways as JSON; ``options`` as for ``json.dumps``."""
        ways = {name: {"way": info.way, "num_hvps": info.num_hvps} for name, info in self.hessian.info.items()}
        return json.dumps(
            {
                "num_samples": self.num_samples,
                "loss": self.loss,
                "statistics": self.statistics,
                "hessian_ways": ways,
                "findings": [asdict(finding) for finding in self.findings],
            },
            **options,
        )


def diagnose(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any = None,
    layer_types: LayerTypes = None,
    *,
    layers: str | Iterable[str] | None = None,
    method: HessianMethod = "auto",
    num_samples: int | None = None,
    reduction: Literal["mean", "sum"] | None = None,
    sample_dim: int = 0,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Diagnosis:
    """Measure Fisher and Hessian diagonals of a batch, or of a whole data set, and say what stands out.

    Args:
        model: any module; left as it was found.
        loss_fn: ``loss_fn(model(inputs), targets)`` → scalar.
        inputs: a batch; or, in place of the batch, a ``DataLoader`` (any iterable of ``(inputs, targets)`` that is not
            itself a tensor, tuple, list or dict): the result is that of all its samples together.
        targets: what ``loss_fn`` takes second; None with a ``DataLoader``.
        layer_types: as for :class:`secorder.CurvatureProbe`.
        layers: as for :class:`secorder.CurvatureProbe`.
        method: how the Hessian is measured: ``"auto"``, ``"exact"`` or ``"hutchinson"``.
        num_samples: draws of an estimate.
        reduction: how the loss reduces samples, ``"mean"`` or ``"sum"``, which the Hessian of several batches depends
            on; by default it is found out from the loss of a batch and of its halves.
        sample_dim: the dimension of the inputs that holds the samples.
        generator: random numbers of draws and checks.
        progress: show a progress bar over the batches.

    Returns:
        a :class:`Diagnosis`: ``print`` it, or look at its ``fisher``, ``hessian``, ``statistics`` and ``findings``.

    Raises:
        SecorderError: as the probe's measurements; coupled samples are no error here but a finding.

    Example:
        >>> import torch, secorder
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> inputs, labels = torch.randn(32, 4), torch.randint(3, (32,))
        >>> diagnosis = secorder.diagnose(model, torch.nn.functional.cross_entropy, inputs, labels)
        >>> sorted(diagnosis.statistics), diagnosis.num_samples
        (['fisher', 'hessian'], 32)
    """
    batches: Iterable[tuple[Any, Any]] = _batches(inputs) if _is_loader(inputs) else [(inputs, targets)]
    total = len(inputs) if _is_loader(inputs) and isinstance(inputs, Sized) else None
    options: dict[str, Any] = {"method": method, "num_samples": num_samples, "generator": generator}
    fisher: Diagonals | None = None
    hessian: Diagonals | None = None
    coupled: CouplingError | None = None
    seen, whole_loss, first = 0, 0.0, None
    with ExitStack() as stack:
        probe = stack.enter_context(CurvatureProbe(model, layer_types, layers=layers, sample_dim=sample_dim))
        advance = stack.enter_context(progress_bar(progress, "Curvature", total, unit="batches"))
        for x, t in batches:
            count = batch_size(x, t, sample_dim)
            if first is None:
                first = (x, t, count)
            elif reduction is None:
                reduction = _reduction(model, loss_fn, *first, sample_dim)
                if reduction == "sum":  # the first batch was weighted as that of a mean
                    assert hessian is not None
                    hessian, whole_loss = _scaled(hessian, 1 / first[2]), whole_loss / first[2]
            loss = losses(model, loss_fn, [(x, t)]).item()
            if coupled is None:
                try:
                    part = probe.fisher_diagonal(loss_fn, x, t, generator=generator)
                    fisher = weighted_sum(fisher, part, count)
                except CouplingError as error:
                    coupled = error
            weight = 1.0 if reduction == "sum" else float(count)
            hessian = weighted_sum(hessian, probe.hessian_diagonal(loss_fn, x, t, **options), weight)
            whole_loss += weight * loss
            seen += count
            advance(1)
    if hessian is None:
        raise InvalidArgumentError("the data holds no batch: pass at least one sample.")
    if reduction != "sum":
        hessian, whole_loss = _scaled(hessian, 1 / seen), whole_loss / seen
    fisher = None if fisher is None or coupled is not None else _scaled(fisher, 1 / seen)
    statistics = {"hessian": layer_statistics(hessian)}
    if fisher is not None:
        statistics["fisher"] = layer_statistics(fisher)
    samples = seen if reduction == "sum" else 1
    findings = _findings(fisher, hessian, statistics, samples, coupled)
    return Diagnosis(fisher, hessian, statistics, findings, seen, whole_loss)


# --------------------------------------------------------------------------------------------------------------------
# Data


def _is_loader(inputs: Any) -> bool:
    return not isinstance(inputs, (Tensor, tuple, list, dict)) and isinstance(inputs, Iterable)


def _batches(loader: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise InvalidTypeError(
                f"the data must yield (inputs, targets), got {type(batch).__name__}: wrap it in a generator that does."
            )
        yield batch[0], batch[1]


def _scaled(diagonals: Diagonals, factor: float) -> Diagonals:
    result = weighted_sum(None, diagonals, factor)
    result.info = diagonals.info
    return result


def _reduction(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any, count: int, dim: int
) -> Literal["mean", "sum"]:
    """How a loss reduces samples, from its value on a batch and on the batch's two parts."""

    def part(tree: Any, start: int, length: int) -> Any:
        def cut(tensor: Tensor) -> Tensor:
            at = sample_dimension(tensor, count, dim)
            return tensor if at is None else tensor.narrow(at, start, length)

        return map_tensors(cut, tree)

    cut = count // 3
    if cut:
        parts = [(part(inputs, at, n), part(targets, at, n)) for at, n in ((0, cut), (cut, count - cut))]
        whole, first, second = losses(model, loss_fn, [(inputs, targets), *parts])
        if torch.allclose(whole, (cut * first + (count - cut) * second) / count, rtol=1e-3):
            return "mean"
        if torch.allclose(whole, first + second, rtol=1e-3):
            return "sum"
    raise InvalidArgumentError(
        'it cannot be told whether the loss is a mean or a sum over samples: pass reduction="mean" or "sum".'
    )


# --------------------------------------------------------------------------------------------------------------------
# Findings


def _findings(
    fisher: Diagonals | None,
    hessian: Diagonals,
    statistics: dict[str, dict[str, dict[str, float]]],
    samples: int,
    coupled: CouplingError | None,
) -> list[Finding]:
    curved, gathered = statistics["hessian"], statistics.get("fisher", {})
    traces = {name: row["trace"] for name, row in (gathered or curved).items()}
    whole = sum(traces.values()) if len(traces) > 2 else 0.0
    found = [] if coupled is None else [_finding("coupled", "", 1.0, f"there is no Fisher: {coupled}")]
    for name, row in curved.items():
        own = gathered.get(name)
        share = traces.get(name, 0.0) / whole if whole > 0 else 0.0
        unused = hessian.info[name].way == "unused"
        found += _findings_of_layer(name, row, own, unused, hessian[name].numel(), share, samples)
    order = list(THRESHOLDS)
    return sorted(found, key=lambda f: (f.layer != "", order.index(f.kind) if f.kind in order else 0))


def _finding(kind: FindingKind, layer: str, value: float, text: str) -> Finding:
    return Finding(kind, layer, value, THRESHOLDS.get(kind, 0.0), text)


def _findings_of_layer(
    name: str,
    row: dict[str, float],
    own: dict[str, float] | None,
    unused: bool,
    numel: int,
    share: float,
    samples: int,
) -> Iterator[Finding]:
    """What stands out in a layer, by the statistics of its Hessian and, if there is one, its own of the Fisher."""
    bad = max(row["nonfinite"], own["nonfinite"] if own else 0.0)
    if bad > THRESHOLDS["non-finite"]:
        text = "entries are nan or infinite: lower the learning rate, or clip gradients."
        yield _finding("non-finite", name, bad, text)
        return
    if unused or (own is not None and own["zero"] == 1.0 and row["zero"] == 1.0):
        text = "the loss does not depend on these parameters: a layer that is not used, detached, or wholly dead."
        yield _finding("unreached", name, float(numel), text)
        return
    if own is not None and own["zero"] >= THRESHOLDS["dead"]:
        text = (
            "share of parameters with no gradient on any sample: dead units (ReLU), or inputs that are always zero; "
            "they can be pruned at no cost."
        )
        yield _finding("dead", name, own["zero"], text)
    if share >= THRESHOLDS["dominant"]:
        text = (
            "share of the whole trace: steps are bounded by this layer; give it a smaller learning rate, or normalise "
            "its input."
        )
        yield _finding("dominant", name, share, text)
    if row["negative"] >= THRESHOLDS["saddle"]:
        text = "share of negative entries in the Hessian: the loss curves down along them, far from a minimum."
        yield _finding("saddle", name, row["negative"], text)
    if own is not None and own["trace"] > 0:
        ratio = abs(row["trace"]) / samples / own["trace"]
        if not 1 / THRESHOLDS["disagreement"] <= ratio <= THRESHOLDS["disagreement"]:
            text = (
                "ratio of the Hessian's trace to the Fisher's: the empirical Fisher does not stand for the curvature "
                "here; use the Hessian, or fisher_type='type-2'."
            )
            yield _finding("disagreement", name, ratio, text)
