"""CurvatureProbe: attach to a live model, accumulate Fisher diagonals while it trains, ask for Hessians at any time."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, overload

import torch
from torch import Tensor, nn

from .autocast import no_autocast
from .capture import Call, Capture, UnitCall
from .diagonals import Diagonals, LayerInfo
from .errors import (
    AttributionError,
    CouplingError,
    InvalidArgumentError,
    InvalidTypeError,
    NonFiniteError,
    ProbeStateError,
)
from .fisher import FisherType, fisher_diagonal
from .hessian import HessianMethod, LayerCost, Policy, estimate_cost, hessian_diagonal, on_problem
from .layers import Layer, LayerTypes, select_layers
from .loan import on_loan
from .rules import DIM_ZERO, Layout, contract, magnitude, per_sample_gradients, total_gradient
from .samples import Attribution, attribute, independent_by_structure
from .spectrum import Eigenvalues, Trace, layer_eigenvalues, layer_traces
from .trees import sample_sizes
from .units import unit_gradients
from .zspace import cast, compute_dtype, rounding, zeros

if TYPE_CHECKING:  # what shows results is loaded when it is asked for
    from .report import Report, SortKey
    from .tensorboard import CurvatureLog, Writer

__all__ = ["CurvatureProbe", "CurvatureWarning"]

LossFunction = Callable[[Any, Any], Tensor]


class HasScale(Protocol):
    """A loss scaler, such as ``torch.amp.GradScaler``."""

    def get_scale(self) -> float:
        """The factor of now."""


LossScale = float | HasScale | Callable[[], float] | None


@dataclass
class _Accumulator:
    """Σ of squared per-sample gradients of one layer (or their moving average), by parameter."""

    sums: list[Tensor] = field(default_factory=list)
    samples: float = 0
    batches: int = 0


#: Why a layer has no passive Fisher.
_OUTSIDE = (
    "its parameters get gradient from outside of the layer's calls (a tied weight, a weight penalty in the loss, a use "
    "such as F.linear(x, layer.weight), or a derivative that the model takes of itself), which belongs to no sample "
    "that a hook can see: leave the layer out with layers=, or measure it with a one-shot call."
)


class NoLayerError(InvalidArgumentError):
    """No layer of the model matches."""


class CurvatureWarning(UserWarning):
    """What is accumulated is not what it seems; the message says why and what to do."""


class CurvatureProbe:
    """Hooks on a live model that tell, layer by layer, how curved its loss is.

    While attached, every training step's own backward pass accumulates the empirical Fisher diagonal

        F_i = (1/N) Σ_n (∂ℓ_n/∂θ_i)²,

    the mean over all samples seen of the squared *per-sample* gradients (not the square of the mean gradient), at the
    cost of one matrix product per layer. :meth:`hessian_diagonal` and one-shot calls of :meth:`fisher_diagonal` run
    passes of their own when asked. The model is left as it is: outputs, gradients, random state, buffers and
    ``state_dict`` are bit for bit what they are without the probe.

    Args:
        model: the module whose call is one batch, samples in dim 0.
        layer_types: which modules to look at, subclasses included: types, or ``"all"`` for every module that holds
            parameters; None means ``(nn.Linear, nn.Conv2d)``.
        layers: names or shell-style patterns (``"encoder.*"``) of the modules to look at; with ``layer_types``
            None, of any type.
        reduction: how the training loss reduces the samples' losses ℓ_n: ``"mean"``, L = (1/N) Σ_n ℓ_n, or
            ``"sum"``. Only the passive Fisher needs to be told.
        every: record each ``every``-th forward only; the others cost nothing.
        decay: None for the mean over all samples; a number in (0, 1) for an exponential moving average over batches,
            ``F ← decay · F + (1 − decay) · F_batch``, corrected for its start at zero.
        sample_dim: the dimension of the model's inputs (and, if they have it, outputs and targets) that holds the
            samples. Where they are in each layer is found and verified.
        strict: raise :class:`~secorder.CouplingError` where samples are coupled while training (batch normalisation
            in train mode), so that passive per-sample gradients are not defined; by default a warning says so once.
        loss_scale: what the training loss is multiplied by before ``backward``: a number (``1 / 4`` where gradients of
            four micro-batches are accumulated), a ``torch.amp.GradScaler`` (or anything with ``get_scale()``), or a
            function that returns the number. It is divided out of every gradient.
        on_nonfinite: what to do with a layer's gradient that holds nan or inf (one bad batch, a step that a
            ``GradScaler`` will skip): ``"skip"`` leaves the batch out of that layer's mean and counts it in
            :attr:`num_skipped`; ``"raise"`` raises :class:`~secorder.NonFiniteError`; ``"keep"`` accumulates it.
        accumulator_device: where the sums are kept; by default where the parameters are.
        accumulator_dtype: their dtype; by default the parameters', float32 for half precision.

    Raises:
        InvalidTypeError: ``model`` is not a module (or is ``nn.DataParallel``), or ``layer_types`` holds no types.
        InvalidArgumentError: nothing matches, or another argument is out of its range.

    Half precision is accumulated in float32; float32 and float64 in their own dtype.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from secorder import CurvatureProbe
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> inputs, targets = torch.randn(16, 4), torch.randint(3, (16,))
        >>> with CurvatureProbe(model) as probe:
        ...     nn.functional.cross_entropy(model(inputs), targets).backward()
        ...     fisher = probe.fisher_diagonal()
        >>> fisher["0"].shape, probe.num_samples
        (torch.Size([40]), 16)
    """

    def __init__(
        self,
        model: nn.Module,
        layer_types: LayerTypes = None,
        *,
        layers: str | Iterable[str] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        every: int = 1,
        decay: float | None = None,
        sample_dim: int = 0,
        strict: bool = False,
        loss_scale: LossScale = None,
        on_nonfinite: Literal["skip", "raise", "keep"] = "skip",
        accumulator_device: torch.device | str | None = None,
        accumulator_dtype: torch.dtype | None = None,
    ) -> None:
        self._layers = select_layers(model, layer_types, layers)
        if not self._layers:
            raise NoLayerError(
                "no layer of the model matches: pass layer_types= with the types to look at, or layers= with names "
                "from model.named_modules()."
            )
        if reduction not in ("mean", "sum"):
            raise InvalidArgumentError(f'reduction must be "mean" or "sum", got {reduction!r}.')
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InvalidArgumentError(f"every must be an integer of at least 1, got {every!r}.")
        if decay is not None and not 0.0 < decay < 1.0:
            raise InvalidArgumentError(f"decay must lie between 0 and 1, got {decay!r}.")
        self._model = model
        self._reduction = reduction
        self._every = every
        if isinstance(sample_dim, bool) or not isinstance(sample_dim, int) or sample_dim < 0:
            raise InvalidArgumentError(f"sample_dim must be an integer of at least 0, got {sample_dim!r}.")
        self._decay = decay
        self._sample_dim = sample_dim
        self._strict = strict
        self._loss_scale = _loss_scale(loss_scale)
        if on_nonfinite not in ("skip", "raise", "keep"):
            raise InvalidArgumentError(f'on_nonfinite must be "skip", "raise" or "keep", got {on_nonfinite!r}.')
        self._on_nonfinite = on_nonfinite
        self._accumulator_device, self._accumulator_dtype = accumulator_device, accumulator_dtype
        self._capture: Capture | None = None
        self._attributions: dict[tuple[bool, ...], Attribution] = {}
        self._warned = self._warned_slow = False
        self._log: CurvatureLog | None = None
        self.reset()
        self.attach()

    # ---- life

    def attach(self) -> None:
        """Register the hooks again after :meth:`detach`; what was accumulated is kept.

        Raises:
            ProbeStateError: the probe is attached.
        """
        if self._capture is not None:
            raise ProbeStateError("the probe is attached already: call detach() first, or make a second probe.")
        self._capture = Capture(self._model, self._layers, self._every, _Accumulation(self))
        self._capture.attach()

    def detach(self) -> None:
        """Remove every hook. What was accumulated can still be read; measurements need :meth:`attach` again."""
        if self._capture is not None:
            self._capture.detach()
            self._capture = None

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model."""
        return self._capture is not None

    def __enter__(self) -> "CurvatureProbe":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside the ``with`` block.

        Raises:
            ProbeStateError: the probe is detached.
        """
        capture = self._attached_capture()
        capture.suspensions += 1
        try:
            yield
        finally:
            capture.suspensions -= 1

    def reset(self) -> None:
        """Forget everything accumulated."""
        self._accumulators = {layer.name: _Accumulator(self._zeros(layer)) for layer in self._layers}
        self.num_skipped: dict[str, int] = {}
        self._num_samples = 0
        self._share = 0.0  # of the samples: all of them, unless ranks were synchronised
        self._unattributed: dict[str, str] = {}
        self._batches = 0

    def _zeros(self, layer: Layer) -> list[Tensor]:
        return [z.to(self._accumulator_device, self._accumulator_dtype) for z in zeros(layer)]

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers looked at, in ``model.named_modules()`` order."""
        return [layer.name for layer in self._layers]

    @property
    def num_samples(self) -> int:
        """How many samples the accumulated Fisher has seen."""
        return self._num_samples

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"CurvatureProbe({len(self._layers)} layers, {self._num_samples} samples, {state})"

    # ---- the passive Fisher

    def _accumulated(self) -> Diagonals:
        if self._num_samples == 0:
            raise ProbeStateError(
                "nothing is accumulated yet: train with the probe attached (a forward of the model, then backward), "
                "or pass loss_fn, inputs and targets for a one-shot measurement. A model that torch.compile had run "
                "before the probe was attached ignores hooks: attach first, or call torch._dynamo.reset()."
            )
        for name, reason in self._unattributed.items():
            raise AttributionError(f"layer {name!r}: {reason}")
        unseen = [n for n in self.layer_names if self._capture is not None and n in self._capture.without_gradient]
        if unseen:
            raise AttributionError(
                f"no gradient reaches the layers {unseen} in training (they are frozen, with nothing trainable before "
                "them): leave them out with layers=, or pass loss_fn, inputs and targets for a one-shot measurement."
            )
        values = {}
        for layer in self._layers:
            accumulator = self._accumulators[layer.name]
            if accumulator.samples == 0:
                raise NonFiniteError(
                    f"every gradient of layer {layer.name!r} so far held nan or inf: lower the learning rate or the "
                    'loss scale, or pass on_nonfinite="keep" to see them.'
                )
            weight = accumulator.samples if self._decay is None else 1 - self._decay**accumulator.batches
            values[layer.name] = [total / weight for total in accumulator.sums]
        return Diagonals(self._layers, values, {name: LayerInfo("passive") for name in self.layer_names})

    # ---- measurements

    @overload
    def fisher_diagonal(self) -> Diagonals: ...

    @overload
    def fisher_diagonal(
        self,
        loss_fn: LossFunction,
        inputs: Any,
        targets: Any = None,
        *,
        fisher_type: FisherType = "empirical",
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        create_graph: bool = False,
        chunk_size: int | None = None,
    ) -> Diagonals: ...

    def fisher_diagonal(
        self,
        loss_fn: LossFunction | None = None,
        inputs: Any = None,
        targets: Any = None,
        *,
        fisher_type: FisherType = "empirical",
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        create_graph: bool = False,
        chunk_size: int | None = None,
    ) -> Diagonals:
        """The Fisher diagonal per layer: what training accumulated or, with arguments, of one batch.

        Without arguments: the empirical Fisher of all samples recorded, ``F = (1/N) Σ_n (∂ℓ_n/∂θ)²``.

        With arguments: of this batch alone, nothing is accumulated. ℓ_n is the loss of a batch of one, so that no
        reduction has to be known. With f_n the model's output for sample n:

        - ``"empirical"``: ``(1/N) Σ_n (∂ℓ_n/∂θ)²``;
        - ``"type-2"``: ``(1/N) Σ_n diag(J_nᵀ ∂²ℓ_n/∂f_n² J_n)``, the diagonal of the generalised Gauss-Newton matrix;
        - ``"mc"``: an unbiased estimate of it from ``num_samples`` draws.

        Args:
            loss_fn: ``loss_fn(model(inputs), targets)`` → scalar; a module or any callable.
            inputs: a tensor, or a tuple (``model(*inputs)``) or dict (``model(**inputs)``) of them; N samples in dim 0.
            targets: what ``loss_fn`` takes second; a tensor of N samples, or a structure of them, or None.
            fisher_type: which Fisher.
            num_samples: draws of ``"mc"``.
            generator: random numbers of ``"mc"``; the global random state is never advanced.
            create_graph: make the result differentiable with respect to the model's parameters.
            chunk_size: vector-Jacobian products batched at most; by default as many as fit 256 MB.

        Returns:
            layer name → 1-D tensor (weight flattened, then bias), in the parameters' dtype, float32 for half precision.

        Raises:
            ProbeStateError: nothing is accumulated yet, or a one-shot measurement on a detached probe.
            InvalidArgumentError, InvalidTypeError: an unusable argument, loss or batch.
            NonFiniteError: the loss is nan or infinite.
            CouplingError: the samples are coupled, so that per-sample gradients do not exist.
            AttributionError: a layer's gradient could not be attributed to samples while training.

        Sources: Kunstner, Balles, Hennig (2019), "Limitations of the empirical Fisher approximation", equations 2, 3
        and 8; Martens (2020), "New insights and perspectives on the natural gradient method", section 9.
        """
        if loss_fn is None:
            return self._accumulated()
        self._attached_capture()
        return fisher_diagonal(
            self._model,
            self._layers,
            _callable(loss_fn),
            inputs,
            targets,
            fisher_type=fisher_type,
            num_samples=num_samples,
            generator=generator,
            create_graph=create_graph,
            chunk_size=chunk_size,
            sample_dim=self._sample_dim,
        )

    def hessian_diagonal(
        self,
        loss_fn: LossFunction,
        inputs: Any,
        targets: Any = None,
        *,
        method: HessianMethod = "auto",
        num_samples: int | None = None,
        rtol: float | None = None,
        max_num_samples: int = 10_000,
        max_hvps: int | None = None,
        generator: torch.Generator | None = None,
        create_graph: bool = False,
        chunk_size: int | None = None,
        progress: bool = False,
    ) -> Diagonals:
        """The Hessian diagonal ``∂²L/∂θ_i²`` per layer, ``L = loss_fn(model(inputs), targets)`` exactly as given.

        ``"exact"`` takes, layer by layer, the cheapest way whose conditions hold (see :mod:`secorder.hessian`; the
        result's ``info`` tells which). ``"hutchinson"`` estimates without bias from random signs v on the layer's
        output z: ``Σ_n (J_nᵀ (H_z v)_n) ⊙ (J_nᵀ v_n)``; on the parameters where samples are coupled. ``"auto"`` is
        exact for layers that take at most ``max_hvps`` products, and an estimate for the others; ``info`` says so.

        Args:
            loss_fn: ``loss_fn(model(inputs), targets)`` → scalar; a module or any callable.
            inputs: a tensor, or a tuple (``model(*inputs)``) or dict (``model(**inputs)``) of them; N samples in dim 0.
            targets: what ``loss_fn`` takes second.
            method: ``"auto"``, ``"exact"`` or ``"hutchinson"``.
            num_samples: draws of an estimate, 100 by default; with ``rtol`` the least number, 16 by default.
            rtol: draw until a layer's ``‖standard error‖ / ‖diagonal‖`` is at most this; ``"auto"`` asks 0.05 unless
                ``num_samples`` is given. Whether it was met is the ``converged`` of the layer's ``info``.
            max_num_samples: draws at most, with ``rtol``.
            max_hvps: with ``"auto"``, Hessian-vector products that an exact layer may take; by default 10,000, and as
                many as take some ten seconds.
            generator: random numbers, of the draws and of the checks; the global random state is never advanced.
            create_graph: make the result differentiable with respect to the model's parameters (``"exact"`` only).
            chunk_size: Hessian-vector products batched at most; by default as many as fit 256 MB.
            progress: show a ``rich`` progress bar.

        Returns:
            layer name → 1-D tensor (weight flattened, then bias); where a layer was estimated, ``standard_error`` holds
            the standard error of every entry (zero where it is exact).

        Raises:
            ProbeStateError: the probe is detached.
            InvalidArgumentError, InvalidTypeError: an unusable argument, loss or batch.
            NonFiniteError: the loss is nan or infinite.
            DoubleBackwardError: an operator has no second derivative.

        Sources: Pearlmutter (1994), "Fast exact multiplication by the Hessian"; Martens, Sutskever, Swersky (2012),
        "Estimating the Hessian by back-propagating curvature", for random signs on z.
        """
        self._attached_capture()
        return hessian_diagonal(
            self._model,
            self._layers,
            _callable(loss_fn),
            inputs,
            targets,
            Policy.checked(method, num_samples, rtol, max_num_samples, max_hvps),
            generator=generator,
            create_graph=create_graph,
            chunk_size=chunk_size,
            progress=progress,
            sample_dim=self._sample_dim,
        )

    def hessian_trace(
        self,
        loss_fn: LossFunction,
        inputs: Any,
        targets: Any = None,
        *,
        num_samples: int | None = None,
        rtol: float | None = None,
        max_num_samples: int = 10_000,
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
    ) -> dict[str, Trace]:
        """The trace ``tr ∂²L/∂θ²`` of each layer's Hessian block, with its standard error.

        From random signs on the layer's output, ``Σ_n ⟨J_nᵀ (H_z v)_n, J_nᵀ v_n⟩``, or exactly where the model is
        piecewise linear after the layer and has fewer outputs than draws; on the parameters where samples are coupled.

        Args:
            loss_fn: as for :meth:`hessian_diagonal`.
            inputs: as for :meth:`hessian_diagonal`.
            targets: as for :meth:`hessian_diagonal`.
            num_samples: draws, 100 by default; with ``rtol`` the least number, 16 by default.
            rtol: draw until a layer's standard error relative to its trace is at most this.
            max_num_samples: draws at most, with ``rtol``.
            generator: random numbers.
            chunk_size: products batched at most.

        Returns:
            layer name → :class:`~secorder.Trace`.

        Raises:
            SecorderError: as :meth:`hessian_diagonal`.

        Sources: Hutchinson (1989), "A stochastic estimator of the trace of the influence matrix"; on z, Martens,
        Sutskever, Swersky (2012).
        """
        self._attached_capture()
        policy = Policy.checked("hutchinson", num_samples, rtol, max_num_samples, None)
        return on_problem(
            lambda problem: layer_traces(problem, policy),
            self._model,
            self._layers,
            _callable(loss_fn),
            inputs,
            targets,
            generator=generator,
            chunk_size=chunk_size,
            sample_dim=self._sample_dim,
        )

    def hessian_eigenvalues(
        self,
        loss_fn: LossFunction,
        inputs: Any,
        targets: Any = None,
        *,
        count: int = 1,
        tolerance: float = 1e-3,
        max_iterations: int = 200,
        generator: torch.Generator | None = None,
    ) -> dict[str, Eigenvalues]:
        """The largest and smallest eigenvalues of each layer's Hessian block ``∂²L/∂θ²``, by Lanczos iteration.

        Args:
            loss_fn: as for :meth:`hessian_diagonal`.
            inputs: as for :meth:`hessian_diagonal`.
            targets: as for :meth:`hessian_diagonal`.
            count: how many at each end.
            tolerance: on residuals ``‖H q − λ q‖``, relative to the largest eigenvalue in modulus.
            max_iterations: Hessian-vector products of a layer at most.
            generator: random numbers of the start.

        Returns:
            layer name → :class:`~secorder.Eigenvalues`, which tells whether the tolerance was met. An eigenvalue of
            higher multiplicity is told once.

        Raises:
            InvalidArgumentError: ``count`` or ``max_iterations`` is below 1; else as :meth:`hessian_diagonal`.

        Source: Golub, Van Loan, "Matrix computations", 4th edition, section 10.3.
        """
        self._attached_capture()
        if count < 1 or max_iterations < 1:
            raise InvalidArgumentError(f"count and max_iterations must be at least 1, got {count}, {max_iterations}.")
        policy = Policy.checked("hutchinson", None, None, 100, None)
        return on_problem(
            lambda problem: layer_eigenvalues(
                problem, policy, count=count, tolerance=tolerance, max_iterations=max_iterations
            ),
            self._model,
            self._layers,
            _callable(loss_fn),
            inputs,
            targets,
            generator=generator,
            sample_dim=self._sample_dim,
        )

    def estimate_cost(
        self,
        loss_fn: LossFunction,
        inputs: Any,
        targets: Any = None,
        *,
        method: HessianMethod = "auto",
        num_samples: int | None = None,
        rtol: float | None = None,
        max_hvps: int | None = None,
        chunk_size: int | None = None,
    ) -> dict[str, LayerCost]:
        """What :meth:`hessian_diagonal` with the same arguments would take, before it is paid.

        One forward, one backward and the checks are run, no basis and no draws.

        Args:
            loss_fn: as for :meth:`hessian_diagonal`.
            inputs: as for :meth:`hessian_diagonal`.
            targets: as for :meth:`hessian_diagonal`.
            method: as for :meth:`hessian_diagonal`.
            num_samples: as for :meth:`hessian_diagonal`.
            rtol: as for :meth:`hessian_diagonal`.
            max_hvps: as for :meth:`hessian_diagonal`.
            chunk_size: as for :meth:`hessian_diagonal`.

        Returns:
            layer name → :class:`~secorder.LayerCost`: the way, its products, those of the exact way, and memory.

        Raises:
            SecorderError: as :meth:`hessian_diagonal`.
        """
        self._attached_capture()
        return estimate_cost(
            self._model,
            self._layers,
            _callable(loss_fn),
            inputs,
            targets,
            Policy.checked(method, num_samples, rtol, 1 << 62, max_hvps),
            chunk_size=chunk_size,
            sample_dim=self._sample_dim,
        )

    # ---- watching

    def summary(self, hessian: Mapping[str, Tensor] | None = None, *, sort_by: "SortKey | None" = None) -> "Report":
        """The table of layers: ``rich.print(probe.summary())``, or ``print``.

        Args:
            hessian: a Hessian diagonal to show beside the accumulated Fisher.
            sort_by: see :func:`secorder.report`.

        Returns:
            a :class:`~secorder.Report` of the accumulated Fisher.

        Raises:
            ProbeStateError, AttributionError: as :meth:`fisher_diagonal` without arguments.
        """
        from .report import report

        return report(self.fisher_diagonal(), hessian, sort_by=sort_by, title=repr(self))

    def __str__(self) -> str:
        if self._num_samples == 0 or self._unattributed:
            return "\n".join([repr(self), *(f"  {x.name or 'model'}: {x.module}" for x in self._layers)])
        return str(self.summary())

    def log(self, writer: "Writer", step: int, *, hessian: Mapping[str, Tensor] | None = None) -> None:
        """Write the accumulated Fisher (and a Hessian diagonal) to TensorBoard: see :mod:`secorder.tensorboard`.

        Args:
            writer: anything with the methods of ``torch.utils.tensorboard.SummaryWriter``.
            step: the training step.
            hessian: what :meth:`hessian_diagonal` returned, if it is to be logged too.

        Raises:
            ProbeStateError, AttributionError: as :meth:`fisher_diagonal` without arguments.
        """
        from .tensorboard import CurvatureLog

        if self._log is None or self._log.writer is not writer:
            self._log = CurvatureLog(writer)
        self._log.log("fisher", self.fisher_diagonal(), step)
        if hessian is not None:
            self._log.log("hessian", hessian, step)

    def _attached_capture(self) -> Capture:
        if self._capture is None:
            raise ProbeStateError("the probe is detached: call attach(), or make a new probe.")
        return self._capture

    # ---- checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """What was accumulated, as a flat dict of tensors: for ``torch.save``, safetensors and distributed checkpoints.

        A run that is resumed from it accumulates bit for bit what one that was not interrupted does.
        """
        capture = self._capture
        counts = [0, 0] if capture is None else [capture.counts[True], capture.counts[False]]
        header = [_STATE_VERSION, int(self._reduction == "sum"), self._num_samples, self._batches, *counts]
        state = {
            "header": torch.tensor(header),
            "decay": torch.tensor(self._decay or 0.0, dtype=torch.float64),
            "share": torch.tensor(self._share, dtype=torch.float64),
        }
        for layer in self._layers:
            accumulator = self._accumulators[layer.name]
            skipped = self.num_skipped.get(layer.name, 0)
            state[f"counts/{layer.name}"] = torch.tensor(
                [accumulator.samples, accumulator.batches, skipped], dtype=torch.float64
            )
            for local, total in zip(layer.parameters, accumulator.sums, strict=True):
                state[f"sums/{layer.parameter_name(local)}"] = total.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` returned; replaces what is accumulated.

        Raises:
            InvalidArgumentError: the state is of another version, other layers, shapes or settings; nothing is changed.
        """
        header = state.get("header") if isinstance(state, Mapping) else None
        if not isinstance(header, Tensor) or int(header[0]) != _STATE_VERSION:
            raise InvalidArgumentError(
                f"the state is not one of CurvatureProbe.state_dict(), version {_STATE_VERSION}."
            )
        _, is_sum, num_samples, batches, *counts = header.tolist()
        theirs = ("sum" if is_sum else "mean", float(state["decay"]) or None)
        for key, own, other in zip(("reduction", "decay"), (self._reduction, self._decay), theirs, strict=True):
            if own != other:
                raise InvalidArgumentError(f"the state was accumulated with {key}={other!r}, not {own!r}.")
        sizes = {
            f"sums/{layer.parameter_name(local)}": p.numel()
            for layer in self._layers
            for local, p in layer.parameters.items()
        }
        found = {key: value.numel() for key, value in state.items() if key.startswith("sums/")}
        different = sorted(key.removeprefix("sums/") for key in sizes.keys() ^ found.keys())
        if different:
            raise InvalidArgumentError(f"the state and the probe differ in the parameters {different}.")
        different = sorted(key.removeprefix("sums/") for key, size in sizes.items() if found[key] != size)
        if different:
            raise InvalidArgumentError(f"the state has other shapes of the parameters {different}.")
        for layer in self._layers:
            samples, seen, skipped = state[f"counts/{layer.name}"].tolist()
            sums = [
                state[f"sums/{layer.parameter_name(local)}"].to(like, copy=True)
                for local, like in zip(layer.parameters, self._zeros(layer), strict=True)
            ]
            self._accumulators[layer.name] = _Accumulator(sums, samples, int(seen))
            if skipped:
                self.num_skipped[layer.name] = int(skipped)
        self._share = float(state["share"])
        self._num_samples, self._batches = num_samples, batches
        if self._capture is not None:
            self._capture.counts[True], self._capture.counts[False] = counts

    # ---- many processes

    def synchronize(self, group: "torch.distributed.ProcessGroup | None" = None) -> None:
        """Make the accumulated Fisher that of all samples of all ranks; every rank of the group must call it.

        Sums and counts are added up over the ranks in one collective, so that uneven batches and ranks without a batch
        give the number that one process would have got on all the data. Each rank then goes on from the common mean
        with an equal share of the samples behind it, so that a later call adds what came since. With ``decay``, the
        moving averages of the ranks are averaged, weighted by what is in them.

        Args:
            group: a process group; the default group if None.

        Raises:
            ProbeStateError: ``torch.distributed`` is not initialised.
        """
        import torch.distributed as dist

        from .distributed import add_up

        accumulators = [self._accumulators[layer.name] for layer in self._layers]
        weights = [a.samples if self._decay is None else 1 - self._decay**a.batches for a in accumulators]
        numbers = torch.tensor([self._share, self._batches, *weights], dtype=torch.float64)
        add_up([numbers, *(total for a in accumulators for total in a.sums)], group)
        ranks = dist.get_world_size(group)
        share, batches, *totals = numbers.tolist()
        self._share, self._num_samples, self._batches = share / ranks, round(share), round(batches)
        for accumulator, weight in zip(accumulators, totals, strict=True):
            if self._decay is None:
                accumulator.samples = weight / ranks
                factor = 1 / ranks
            else:  # the weight of a moving average of that many batches, on every rank
                accumulator.batches = max(self._batches, 1)
                factor = (1 - self._decay**accumulator.batches) / weight if weight else 0.0
            for total in accumulator.sums:
                total.mul_(factor)


#: Of the layout of :meth:`CurvatureProbe.state_dict`.
_STATE_VERSION = 2


class _UnitSum(NamedTuple):
    """Sums over samples of one parameter's per-sample gradients: squares, themselves, absolute values."""

    squares: Tensor
    whole: Tensor
    size: Tensor


class _Accumulation:
    """What the hooks of a probe tell goes into its accumulators here."""

    def __init__(self, probe: CurvatureProbe) -> None:
        self.probe = probe
        self.explained: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.modules = list(probe._model.modules())
        self.certain = independent_by_structure(probe._model, probe._sample_dim)
        self.skipped: set[str] = set()
        self.mode: tuple[bool, ...] = ()
        self.arguments: Any = None

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Layer], int]:
        """Where samples are: found once for each combination of train and eval modes, checked again now and then."""
        probe = self.probe
        self.mode = tuple(module.training for module in self.modules)
        self.arguments = (args, kwargs)
        if self.mode not in probe._attributions or (self.wants_gradients() and not self.certain):
            if 0 in sample_sizes(self.arguments, probe._sample_dim):
                return probe._layers, 0
            found = self._attribution(args, kwargs)
            if found.unclear:  # a batch that ends in nan tells nothing: it is left out, and the next one is looked at
                self._all_skipped()
                return probe._layers, -1
            probe._attributions[self.mode] = found
        found = probe._attributions[self.mode]
        return found.layers, found.count(self.arguments, probe._sample_dim)

    def expected(self, calls: dict[str, int]) -> bool:
        """Whether the calls of a forward are those that were seen when samples were looked for; else look again."""
        probe, arguments = self.probe, self.arguments
        self.arguments = None  # not to be kept alive
        found = probe._attributions.get(self.mode)
        if found is None or found.coupled or all(n <= found.calls.get(name, 0) for name, n in calls.items()):
            return True
        again = self._attribution(*arguments)
        for name, layouts in found.layouts.items():
            again.layouts.setdefault(name, layouts)
        again.calls = {name: max(again.calls.get(name, 0), found.calls.get(name, 0)) for name in probe._accumulators}
        probe._attributions[self.mode] = again
        return again.layers == found.layers  # units changed: the next forward is recorded by them

    def _attribution(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attribution:
        probe = self.probe
        with no_autocast():  # what belongs to which sample shows best in full precision
            found = on_loan(
                lambda direct: attribute(probe._model, probe._layers, args, kwargs, probe._sample_dim, direct=direct)
            )
        if found.coupled:
            names = sorted(found.unknown, key=probe.layer_names.index) or probe.layer_names
            message = (
                f"the samples of a batch influence one another in the model (batch normalisation in train mode?), so "
                f"that the per-sample gradients of the layers {names} hold parts of other samples': train with "
                "model.eval() statistics, or leave the layers out with layers=."
            )
            if probe._strict:
                raise CouplingError(message)
            if not probe._warned:
                warnings.warn(message, CurvatureWarning, stacklevel=2)
                probe._warned = True
        slow = [x.name for x, own in zip(found.layers, probe._layers, strict=True) if x.unit is not own.unit]
        if slow and not probe._warned_slow:
            warnings.warn(
                f"the calls of the layers {slow} do not tell their per-sample gradients (a row that all samples share, "
                "a parameter used outside of them, nothing trainable before them): a module that contains them runs "
                "once more a step. That is exact and slow; leave them out with layers= if it is too slow.",
                CurvatureWarning,
                stacklevel=2,
            )
            probe._warned_slow = True
        return found

    def layouts(self, layer: Layer, index: int, tensors: Sequence[Tensor | None], num_samples: int) -> list[Layout]:
        """Where the samples are in a call's output tensors: as found, checked against this batch's size."""
        found = self.probe._attributions[self.mode]
        known = found.layouts.get(layer.name, [])
        chosen = known[index * len(tensors) : (index + 1) * len(tensors)] or known[: len(tensors)]
        if layer.name in found.unknown and not found.coupled:
            chosen = []
        elif found.coupled and not chosen:
            chosen = [DIM_ZERO] * len(tensors)
        for position, (tensor, layout) in enumerate(zip(tensors, chosen, strict=False)):
            if tensor is None:
                continue
            if layout.rows > 1 and num_samples:
                chosen[position] = layout = layout._replace(rows=max(1, tensor.shape[0] // num_samples))
            if tensor.dim() <= layout.dim or tensor.shape[layout.dim] != layout.rows * num_samples:
                chosen = []
                break
        if layer.name in found.outside:
            raise AttributionError(f"layer {layer.name!r}: {_OUTSIDE}")
        if found.ambiguous:
            raise AttributionError(
                f"the model's arguments have sizes {found.ambiguous} in dim {self.probe._sample_dim}, and its output "
                "does not tell which of them is the number of samples: let the model return a tensor of that size, or "
                "measure with one-shot calls."
            )
        if not chosen:
            shapes = [tuple(t.shape) for t in tensors if t is not None]
            raise AttributionError(
                f"layer {layer.name!r} returned {shapes} for a batch of {num_samples} samples, and no dimension of it "
                "holds them (a row that all samples share, or samples in another dimension of the model's inputs: see "
                "sample_dim): leave the layer out with layers=, or measure it with a one-shot call."
            )
        return list(chosen)

    def _factors(self, count: int) -> tuple[float, float]:
        # g is ∂L/∂z, and L the mean of the ℓ_n: ∂ℓ_n/∂z_n is N times as large.
        scale = float(count**2) if self.probe._reduction == "mean" else 1.0
        scale /= self.probe._loss_scale() ** 2
        decay = self.probe._decay
        return (1.0, scale) if decay is None else (decay, (1 - decay) * scale / count)

    def _rounding(self, tensors: Iterable[Tensor]) -> float:
        capture = self.probe._capture
        low = None if capture is None else capture.autocast_dtype
        return max(rounding(dtype) for dtype in [*(t.dtype for t in tensors), *([low] if low is not None else [])])

    def _all_skipped(self) -> None:
        probe = self.probe
        if probe._on_nonfinite == "raise":
            raise NonFiniteError(
                "the model's output holds nan or inf: look at the inputs, lower the learning rate or the scale, or "
                'pass on_nonfinite="skip" to leave such batches out.'
            )
        for name in probe.layer_names:
            probe.num_skipped[name] = probe.num_skipped.get(name, 0) + 1

    def _skips(self, layer: Layer, gradients: Sequence[Tensor]) -> bool:
        """Whether a layer's gradient holds nan or inf and is left out."""
        probe = self.probe
        if probe._on_nonfinite == "keep" or all(math.isfinite(g.sum(dtype=torch.float32)) for g in gradients):
            return False
        if all(bool(g.isfinite().all()) for g in gradients):  # a sum of finite numbers that overflowed
            return False
        if probe._on_nonfinite == "raise":
            raise NonFiniteError(
                f"the gradient at layer {layer.name!r} holds nan or inf: lower the learning rate or the loss scale, or "
                'pass on_nonfinite="skip" to leave such batches out.'
            )
        probe.num_skipped[layer.name] = probe.num_skipped.get(layer.name, 0) + 1
        self.skipped.add(layer.name)
        return True

    def receive(self, layer: Layer, calls: list[Call], layouts: list[Layout], count: int) -> None:
        """Add the squares of a layer's per-sample gradients."""
        assert layer.rule is not None
        accumulator = self.probe._accumulators[layer.name]
        if self._skips(layer, [g for _, g in calls]):
            return
        kind = compute_dtype(layer)
        if self.wants_gradients():
            rounded = self._rounding(g for _, g in calls)
        if any(g.dtype is not kind or inputs[0].dtype is not kind for inputs, g in calls):
            calls = [(tuple(cast(x, kind) for x in inputs), cast(g, kind)) for inputs, g in calls]
        gradients = per_sample_gradients(layer.rule, layer.module, calls, layouts)
        beta, alpha = self._factors(count)
        for (name, parameter), total in zip(layer.parameters.items(), accumulator.sums, strict=True):
            if total.dtype is kind and total.device == calls[0][1].device:
                contract(gradients[name], numel=parameter.numel(), out=total, beta=beta, alpha=alpha)
            else:
                total.mul_(beta).add_(contract(gradients[name], numel=parameter.numel()).to(total), alpha=alpha)
        if self.wants_gradients():
            self.explained[layer.name] = [
                (total_gradient(gradients[name], p.numel()), rounded * magnitude(gradients[name], p.numel()))
                for name, p in layer.parameters.items()
            ]
        accumulator.samples += count
        accumulator.batches += 1

    def receive_unit(self, layers: list[Layer], calls: list[UnitCall], count: int) -> None:
        """The same for layers that are parts of a module without a rule."""
        known = [g for call in calls for g in call.gradients if g is not None]
        if sum(self._skips(layer, known) for layer in layers):  # each is counted
            return
        beta, alpha = self._factors(count)
        parts: list[list[_UnitSum]] = on_loan(lambda direct: self._unit_sums(layers, calls, count, direct))
        for layer, sums in zip(layers, parts, strict=True):
            accumulator = self.probe._accumulators[layer.name]
            for part, total in zip(sums, accumulator.sums, strict=True):
                total.mul_(beta).add_(part.squares.to(total), alpha=alpha)
            rounded = self._rounding(g for call in calls for g in call.gradients if g is not None)
            self.explained[layer.name] = [(part.whole, rounded * part.size.amax()) for part in sums]
            accumulator.samples += count
            accumulator.batches += 1

    @staticmethod
    def _unit_sums(layers: list[Layer], calls: list[UnitCall], count: int, direct: bool) -> list[list["_UnitSum"]]:
        sums = [[_UnitSum(*(torch.zeros_like(t) for _ in range(3))) for t in zeros(layer)] for layer in layers]
        for chunk in unit_gradients(layers, calls, count, direct=direct):
            for own, gradients in zip(sums, chunk, strict=True):
                for part, dense in zip(own, gradients, strict=True):
                    part.squares.add_(contract(dense, numel=part.squares.numel()))
                    part.whole.add_(dense.sum(0).flatten())
                    part.size.add_(dense.abs().sum(0).flatten())
        return sums

    def wants_gradients(self) -> bool:
        """At the recorded batches 1, 2, 4, 8, …: whether the captured calls explain the whole gradient."""
        batch = self.probe._batches + 1
        return batch & (batch - 1) == 0

    def finish(self, count: int, received: set[str], calls: dict[str, int], gradients: dict[int, Tensor]) -> None:
        """Count the batch, with zeros for the layers that its loss does not depend on."""
        probe = self.probe
        found = probe._attributions.get(self.mode, Attribution())
        for layer in found.layers:
            if layer.name not in received and layer.name in found.outside:
                probe._unattributed[layer.name] = _OUTSIDE
        explained, self.explained = self.explained, {}
        skipped, self.skipped = self.skipped, set()
        if self.wants_gradients() and not skipped:
            self._check(explained, gradients)
        for name, accumulator in probe._accumulators.items():
            if name not in received:
                if probe._decay is not None:
                    for total in accumulator.sums:
                        total.mul_(probe._decay)
                accumulator.samples += count
                accumulator.batches += 1
        if skipped < set(probe._accumulators):
            probe._num_samples += count
            probe._share += count
        probe._batches += 1
        if probe._unattributed:
            name, reason = next(iter(probe._unattributed.items()))
            raise AttributionError(f"layer {name!r}: {reason}")

    def _check(self, explained: dict[str, list[tuple[Tensor, Tensor]]], gradients: dict[int, Tensor]) -> None:
        for layer in self.probe._layers:
            for index, parameter in enumerate(layer.parameters.values()):
                whole = gradients.get(id(parameter))
                if whole is None:
                    continue
                if layer.name in explained:
                    known, bound = explained[layer.name][index]
                    allowed = bound + self._rounding([whole]) * whole.abs().amax()
                    strange = (whole.flatten() - known).abs().amax() > allowed
                else:  # no call of the layer was seen
                    strange = (whole != 0).any()
                if bool(strange):
                    self.probe._unattributed[layer.name] = _OUTSIDE


def _loss_scale(given: LossScale) -> Callable[[], float]:
    if given is None:
        return lambda: 1.0
    if hasattr(given, "get_scale"):
        return given.get_scale
    if callable(given):
        return given
    if not isinstance(given, (int, float)) or not given > 0:
        raise InvalidArgumentError(f"loss_scale must be a positive number or tell one, got {given!r}.")
    return lambda: float(given)


def _callable(loss_fn: LossFunction) -> LossFunction:
    if not callable(loss_fn):
        raise InvalidTypeError(f"loss_fn must be callable as loss_fn(outputs, targets), got {type(loss_fn).__name__}.")
    return loss_fn
