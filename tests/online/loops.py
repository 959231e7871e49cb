"""A training loop held against a loop over samples: each number that a probe tells is exact, or it is not told."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secorder import CurvatureProbe, CurvatureWarning
from secorder._torch.pytree import map_tensors
from secorder.online.reading import unreadable

from ..reference import named_parameters, relative_error

#: The loss of a batch: runs the model, once or more.
Loss = Callable[[Any, Any], Tensor]


@dataclass
class Followed:
    """What came of a loop.

    Attributes:
        refused: by layer, why its number is not told.
        left_out: by layer, the batches that were left out of its mean.
        warned: what was warned of.
        probe: detached.
    """

    refused: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, list[int]] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)
    probe: CurvatureProbe | None = None

    @property
    def exact(self) -> bool:
        """Whether every layer is told, of all batches (and is then right: see :func:`follow`)."""
        return not self.refused and not self.left_out


def rows(batch: Any, dim: int = 0) -> list[Any]:
    """The batches of one that a batch is made of, its samples in one dimension of every tensor."""
    first: list[Tensor] = []
    map_tensors(first.append, batch)
    return [map_tensors(lambda t, n=n: t.narrow(dim, n, 1), batch) for n in range(first[0].shape[dim])]


def follow(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    alone: Callable[[Any], list[Any]] = rows,
    *,
    every: int = 1,
    after: Callable[[], None] | None = None,
    tolerance: float = 1e-9,
    **options: Any,
) -> Followed:
    """Train on batches with a probe, and hold what it tells against (1/N) Σ_n (∂ℓ_n/∂θ)² of the batches it counted.

    Args:
        model: the model.
        batches: one a step.
        loss: of a batch, for all samples or for one alone: a mean over samples.
        alone: the batches of one of a batch.
        every: of the probe.
        after: what the loop does after each backward.
        tolerance: relative to the largest entry.
        **options: of the probe.
    """
    came = Followed()
    parameters = named_parameters(model)
    probe = CurvatureProbe(model, every=every, **{"reduction": "mean", **options})
    layers = {layer.name: layer for layer in probe._fisher.layers}
    total = {name: {local: torch.zeros_like(p) for local, p in x.parameters.items()} for name, x in layers.items()}
    samples = dict.fromkeys(layers, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for index, batch in enumerate(batches):
            ones = alone(batch)
            with probe.paused():
                squares = _squares(model, list({id(p): p for p in parameters.values()}.values()), loss, ones)
            before = {name: float(sums.counts[2]) for name, sums in probe._fisher.sums.items()}
            for p in parameters.values():
                p.grad = None
            loss(model, batch).backward()
            for name, layer in layers.items():
                if float(probe._fisher.sums[name].counts[2]) > before[name]:
                    samples[name] += len(ones)
                    for local, p in layer.parameters.items():
                        total[name][local] += squares.get(id(p), 0.0)
                elif index % every == 0:
                    came.left_out.setdefault(name, []).append(index)
            if after is not None:
                after()
        came.refused = unreadable(probe._fisher)
        told = [name for name in layers if name not in came.refused and samples[name]]
        found = probe.fisher_diagonal(missing="skip").by_parameter() if told else {}
    came.warned = [str(w.message) for w in caught if issubclass(w.category, CurvatureWarning)]
    for name in told:
        for local, value in total[name].items():
            key = layers[name].parameter_name(local)
            error = relative_error(found[key], value / samples[name])
            assert error <= tolerance, f"{key} is off by {error:.2e} of the largest entry; {came}"
    probe.detach()
    came.probe = probe
    return came


def _squares(model: nn.Module, parameters: list[nn.Parameter], loss: Loss, ones: list[Any]) -> dict[int, Tensor]:
    """Σ_n (∂ℓ_n/∂θ)² by parameter, each from the state that the model is in."""
    state = {name: b.clone() for name, b in model.named_buffers()}
    found: dict[int, Tensor] = {}
    for one in ones:
        random_state = torch.get_rng_state()
        for p in parameters:
            p.grad = None
        value = loss(model, one)
        if value.requires_grad:
            value.backward()
        for p in parameters:
            if p.grad is not None:
                found[id(p)] = found.get(id(p), 0.0) + p.grad**2
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(state[name])
        torch.set_rng_state(random_state)
    return found
