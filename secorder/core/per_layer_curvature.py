"""The documented functions: one-shot diagonals per layer, thin facades over :class:`~secorder.CurvatureProbe`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._caution import caution
from .._keywords import refuses_renamed_keywords
from ..errors import InvalidArgumentError
from ..layers.selection import LayerTypes, layers_to_measure
from ..monitor.statistics import get_layer_curvature_stats
from ..oneshot.fisher_pairs import FisherType
from ..oneshot.hessian.budget import HessianMethod
from ..online.samples.hypotheses import SampleDim
from ..probe import CurvatureProbe
from ..results import Diagonals

__all__ = ["get_layer_curvature_stats", "per_layer_fisher_diagonal", "per_layer_hessian_diagonal"]


@refuses_renamed_keywords
def per_layer_hessian_diagonal(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any = None,
    layer_types: LayerTypes = None,
    create_graph: bool = False,
    *,
    layers: str | Iterable[str] | None = None,
    frozen: bool = False,
    method: HessianMethod = "auto",
    num_draws: int | None = None,
    rtol: float | None = None,
    max_draws: int | None = None,
    max_hvps: int | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    progress: bool = False,
    sample_dim: int | Mapping[str, int | None] = 0,
) -> Diagonals:
    """The diagonal of the Hessian ``∂²L/∂θ²`` of ``L = loss_fn(model(inputs), targets)``, layer by layer.

    Args:
        model: any module; left as it was found.
        loss_fn: a loss module or callable with a scalar result; its own reduction counts.
        inputs: a tensor of N samples in dim 0, or a tuple or dict of them; or a data set, any iterable of batches.
        targets: what ``loss_fn`` takes second.
        layer_types: module types to include; None means ``(nn.Linear, nn.Conv2d)``.
        create_graph: make the diagonals differentiable with respect to the model's parameters.
        layers, frozen: as for :class:`secorder.CurvatureProbe`.
        method: ``"auto"``, exact where that is affordable, else an estimate, with a warning; ``"exact"``;
            ``"hutchinson"`` for an unbiased estimate.
        num_draws, rtol, max_draws, max_hvps, generator, chunk_size, progress: as for
            :meth:`secorder.CurvatureProbe.hessian_diagonal`.
        sample_dim: the dimension of the inputs that holds the samples; or a mapping of argument names to it, None for
            one that all samples share, such as a mask.

    Returns:
        layer name → 1-D tensor, weight flattened first, then bias, in ``model.named_modules()`` order; empty where no
        layer matches.

    Raises:
        SecorderError: as :meth:`secorder.CurvatureProbe.hessian_diagonal`, which does the work and names the sources.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from secorder import per_layer_hessian_diagonal
        >>> model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 1))
        >>> hessian = per_layer_hessian_diagonal(model, nn.MSELoss(), torch.randn(5, 10), torch.randn(5, 1))
        >>> {name: tuple(diagonal.shape) for name, diagonal in hessian.items()}
        {'0': (220,), '2': (21,)}
    """
    probe = _probe(model, loss_fn, layer_types, layers, frozen=frozen, sample_dim=sample_dim)
    if probe is None:
        return Diagonals([], {}, {})
    return probe.hessian_diagonal(
        loss_fn,
        inputs,
        targets,
        method=method,
        num_draws=num_draws,
        rtol=rtol,
        max_draws=max_draws,
        max_hvps=max_hvps,
        generator=generator,
        create_graph=create_graph,
        chunk_size=chunk_size,
        progress=progress,
    )


@refuses_renamed_keywords
def per_layer_fisher_diagonal(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any = None,
    layer_types: LayerTypes = None,
    create_graph: bool = False,
    *,
    layers: str | Iterable[str] | None = None,
    frozen: bool = False,
    fisher_type: FisherType = "empirical",
    num_draws: int = 1,
    rtol: float | None = None,
    max_draws: int | None = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    progress: bool = False,
    sample_dim: int | Mapping[str, int | None] = 0,
) -> Diagonals:
    """The diagonal of the Fisher matrix ``(1/N) Σ_n (∂ℓ_n/∂θ)²``, layer by layer: squared *per-sample* gradients.

    Args:
        model: any module; left as it was found.
        loss_fn: a loss module or callable with a scalar result; ℓ_n is its value on a batch of one.
        inputs: a tensor of N samples in dim 0, or a tuple or dict of them; or a data set, any iterable of batches.
        targets: what ``loss_fn`` takes second.
        layer_types: module types to include; None means ``(nn.Linear, nn.Conv2d)``.
        create_graph: make the diagonals differentiable with respect to the model's parameters.
        layers, frozen: as for :class:`secorder.CurvatureProbe`.
        fisher_type: ``"empirical"``, ``"type-2"`` (exact, the GGN) or ``"mc"`` (its estimate).
        num_draws, rtol, max_draws, generator, chunk_size, progress: as for
            :meth:`secorder.CurvatureProbe.fisher_diagonal`.
        sample_dim: the dimension of the inputs that holds the samples; or a mapping of argument names to it, None for
            one that all samples share, such as a mask.

    Returns:
        layer name → 1-D tensor, weight flattened first, then bias, in ``model.named_modules()`` order; empty where no
        layer matches.

    Raises:
        SecorderError: as :meth:`secorder.CurvatureProbe.fisher_diagonal`, which does the work and names the sources.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from secorder import per_layer_fisher_diagonal
        >>> model = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 3))
        >>> inputs, targets = torch.randn(8, 10), torch.randint(3, (8,))
        >>> fisher = per_layer_fisher_diagonal(model, nn.functional.cross_entropy, inputs, targets)
        >>> {name: tuple(diagonal.shape) for name, diagonal in fisher.items()}
        {'0': (55,), '2': (18,)}
    """
    probe = _probe(model, loss_fn, layer_types, layers, frozen=frozen, sample_dim=sample_dim)
    if probe is None:
        return Diagonals([], {}, {})
    return probe.fisher_diagonal(
        loss_fn,
        inputs,
        targets,
        fisher_type=fisher_type,
        num_draws=num_draws,
        rtol=rtol,
        max_draws=max_draws,
        generator=generator,
        create_graph=create_graph,
        chunk_size=chunk_size,
        progress=progress,
    )


class _Measuring(CurvatureProbe):
    """A probe for one measurement, of a model that it leaves without hooks: nothing is accumulated in training."""

    def attach(self) -> None:
        """There is nothing to record."""

    def _attached(self) -> Any:
        return None


def _probe(
    model: nn.Module,
    loss_fn: Any,
    layer_types: LayerTypes,
    layers: str | Iterable[str] | None,
    *,
    frozen: bool,
    sample_dim: SampleDim,
) -> CurvatureProbe | None:
    """A probe for one measurement; None where no layer matches."""
    layers = list(layers) if isinstance(layers, Iterator) else layers
    try:
        return _Measuring(model, layer_types, layers=layers, frozen=frozen, sample_dim=sample_dim)
    except InvalidArgumentError:
        if layers_to_measure(model, layer_types, layers, frozen=frozen):
            raise
    if next(model.parameters(), None) is not None:
        if layer_types is None and layers is None:
            caution('the model has no nn.Linear or nn.Conv2d, so that nothing is measured: pass layer_types="all".')
    elif isinstance(loss_fn, nn.Module) and next(loss_fn.parameters(), None) is not None:
        raise InvalidArgumentError("the model has no parameters, and loss_fn has: pass the model first, then the loss.")
    return None
