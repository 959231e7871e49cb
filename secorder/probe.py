"""CurvatureProbe: attach to a live model, accumulate Fisher diagonals while it trains, ask for Hessians at any time."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, overload
from weakref import finalize, ref

import torch
from torch import Tensor, nn

from ._arguments import (
    refuse_given,
    require_callable,
    require_device,
    require_flag,
    require_floating_dtype,
    require_integer,
    require_number,
    require_one_of,
)
from ._caution import caution
from ._keywords import refuses_renamed_keywords
from ._torch.fsdp import sharded_by_gathered
from ._torch.random_state import one_at_a_time, random_state_kept
from .batch import batch_size
from .errors import InvalidArgumentError, ProbeStateError
from .layers.low_precision import Precision
from .layers.selection import (
    Layer,
    LayerTypes,
    layers_to_measure,
    present,
    ranks_of,
    select_layers,
    share_of_parameters,
    trained,
)
from .means import mean_over_ranks
from .oneshot.data_eigenvalues import eigenvalues_of_data
from .oneshot.data_set import first_of, is_data_set, require_one_batch, seconds_besides, takes_data_sets
from .oneshot.eigenvalues import MAX_ITERATIONS, Eigenvalues, Ends, Which, eigenvalues
from .oneshot.fisher import check_fisher_type, fisher_budget, fisher_diagonal
from .oneshot.fisher_pairs import Asked, FisherType
from .oneshot.hessian.budget import Budget, HessianMethod
from .oneshot.hessian.cost import Cost, result_bytes
from .oneshot.hessian.diagonal import hessian_diagonal
from .oneshot.hessian.facts import Facts
from .oneshot.hessian.investigate import facts
from .oneshot.isolation import Result
from .oneshot.measurement import Measurement, measure, whole_layers
from .oneshot.operators import By, Curvature
from .oneshot.overwriting import on_copies
from .oneshot.quantity import Quantity, quantity_cost
from .oneshot.timing import Told, seconds_of
from .oneshot.trace import Trace, traces
from .oneshot.warn import warn_if_estimated, warn_if_not_finite
from .online.attributions import Attributions
from .online.checkpoint import load_state, state_of, synchronize
from .online.fisher import Accumulate, OnlineFisher
from .online.hooks import Attachment
from .online.losses.reduction import LossScale, Reduction, check_reduction, loss_scale_of
from .online.noise import NoiseScales
from .online.reading import Missing, diagonals, fisher_traces, noise_scales, num_samples, num_skipped, unreadable
from .online.samples.hypotheses import SampleDim, check_sample_dim
from .online.samples.specified_dimensions import (
    require_known_arguments,
    require_one_dimension,
    specified_dimensions,
    with_shared_ones_hidden,
)
from .online.verification import Verification, verify
from .online.window import Window, take_window
from .parallel.all_reduce import raised_on_all
from .parallel.ranks import Ranks
from .results import Diagonals

if TYPE_CHECKING:  # what shows results is loaded when it is asked for
    from .monitor.log import CurvatureLog
    from .monitor.table import Report, SortKey

LossFunction = Callable[[Any, Any], Tensor]

Read = TypeVar("Read")


class CurvatureProbe:
    """Hooks on a live model that measure, layer by layer, how curved its loss is.

    While attached, every training step's own backward pass accumulates the empirical Fisher diagonal

        F_i = (1/N) Σ_n (∂ℓ_n/∂θ_i)²,

    the mean over all samples seen of the squared *per-sample* gradients (not the square of the mean gradient), at the
    cost of one matrix product per layer. :meth:`hessian_diagonal` and one-shot calls of :meth:`fisher_diagonal` run
    passes of their own when asked. The model is left as it is: outputs, gradients, random state, buffers and
    ``state_dict`` are bit for bit what they are without the probe. Recorded forwards of a compiled model run eagerly,
    and match the eager model bit for bit.

    Args:
        model: the module whose call is one batch, samples in dim 0.
        layer_types: which modules to measure, subclasses included: types, or ``"all"`` for every module that holds
            parameters; None means ``(nn.Linear, nn.Conv2d)``.
        layers: names or shell-style patterns (``"encoder.*"``) of the modules to measure, of any type unless
            ``layer_types`` is given. A name or pattern after an exclamation mark (``"!head"``) is left out.
        frozen: measure frozen layers too, at the same cost as trained ones. By default they are left out if other
            layers are trained, unless ``layers`` names them.
        reduction: how the training loss reduces the samples' losses ℓ_n: ``"mean"``, L = (1/N) Σ_n ℓ_n, ``"sum"``, a
            loss module (its ``reduction``), or a function of the model's arguments that returns the weights c_n of
            L = Σ_n c_n ℓ_n, one a sample (token means with padding, class weights; see :func:`secorder.token_weights`),
            or None for a batch whose loss is a mean.
            Only the online Fisher needs it; by default a mean is assumed, and the first read warns about it.
        every: record each ``every``-th forward only; the others cost nothing.
        decay: None for the mean over all samples; a number in (0, 1) for an exponential moving average over batches,
            ``F ← decay · F + (1 − decay) · F_batch``, corrected for its start at zero.
        sample_dim: the dimension of the model's inputs (and, if they have it, outputs and targets) that holds the
            samples, or a mapping of argument names to dimensions (None for an argument without samples; for all of them
            if each call is one sample), or ``"list"`` if each entry of a list is one, such as images of several sizes.
            By default it is found: the dimension along which the model's outputs do not influence one another, or the
            entries of a list, or the graphs of a batch vector ``[0, 0, 1, 2, 2, …]``. Where the samples are in each
            layer is always found, and verified.
        strict: raise at once, even inside the model's forward and backward, if a number cannot be given: for coupled
            samples (:class:`~secorder.CouplingError`), a gradient from outside of a layer, or an error of the probe's
            own. By default training goes on, and reading the number raises; most causes are warned of once.
        loss_scale: the factor by which training multiplies the loss before ``backward``; it is divided out. A number
            (``1 / 4`` if gradients of four micro-batches are accumulated), a ``torch.amp.GradScaler`` (or anything with
            ``get_scale()``), a function that returns the number, or ``"returned"`` for a model that returns its loss,
            whose factor the probe can see. By default it is one; if a model returns a loss that is multiplied by
            another number, reading raises.
        forwards: what it means if one backward runs through several forwards: ``"separate"``, each forward has samples
            of its own (a GAN's real and fake images); ``"joined"``, row n of all of them is one sample (a siamese net,
            a rollout), whose gradients are added before they are squared. By default forwards with different numbers of
            samples are separate; with equal numbers, reading raises.
        penalty: ``"shared"`` if the loss has a term that is the same for each sample, such as an L2 penalty: its
            gradient then belongs to each ℓ_n. By default, reading a layer with a gradient from outside of its calls
            raises.
        accumulate: ``"diagonal"``, or ``"trace"`` for norms of per-sample gradients alone, which serve
            :meth:`fisher_trace` and :meth:`gradient_noise_scale` at little cost and without memory of the parameters'
            size.
        precision: the precision of the factors in the matrix products of diagonals and norms; sums are in float32.
            ``"float32"``; ``"bfloat16"``, with an error of at most 2⁻⁷ of each entry for a layer with one position, and
            elsewhere as exact as training's own gradient (:mod:`secorder.layers.low_precision`); ``"auto"``, which
            takes bfloat16 if a layer computes in half precision on a device that is faster in it (not on the CPU).
        on_nonfinite: what to do with a layer's gradient that holds nan or inf (one bad batch, a step that a
            ``GradScaler`` will skip): ``"skip"`` leaves the batch out of that layer's mean and counts it in
            :attr:`num_skipped`; ``"raise"`` raises :class:`~secorder.NonFiniteError`; ``"keep"`` accumulates it.
        accumulator_device: where the sums are kept; by default where the parameters are. ``"cpu"`` saves an
            accelerator's memory: the sums of a step are copied there while the next steps run.
        accumulator_dtype: their dtype; by default the parameters', float32 for half precision.

    Raises:
        InvalidTypeError: ``model`` is not a module (or is ``nn.DataParallel``), or another argument has a wrong type.
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
        frozen: bool = False,
        reduction: Reduction = None,
        every: int = 1,
        decay: float | None = None,
        sample_dim: SampleDim = None,
        strict: bool = False,
        loss_scale: LossScale = None,
        forwards: Literal["separate", "joined"] | None = None,
        penalty: Literal["shared"] | None = None,
        accumulate: Accumulate = "diagonal",
        precision: Precision = "auto",
        on_nonfinite: Literal["skip", "raise", "keep"] = "skip",
        accumulator_device: torch.device | str | None = None,
        accumulator_dtype: torch.dtype | None = None,
    ) -> None:
        require_flag("frozen", frozen)
        layers = list(layers) if isinstance(layers, Iterator) else layers
        with one_at_a_time():
            selected = _layers_to_measure(model, layer_types, layers, frozen=frozen)
        require_integer("every", every, 1)
        if decay is not None:
            require_number("decay", decay, zero=True)
            if not 0.0 < decay < 1.0:
                raise InvalidArgumentError(f"decay must lie between 0 and 1, got {decay!r}.")
        require_flag("strict", strict)
        require_one_of("on_nonfinite", on_nonfinite, ("skip", "raise", "keep"))
        require_one_of("forwards", forwards, ("separate", "joined", None))
        require_one_of("penalty", penalty, ("shared", None))
        require_one_of("accumulate", accumulate, get_args(Accumulate))
        if accumulate == "trace" and penalty is not None:
            raise InvalidArgumentError('penalty="shared" goes with accumulate="diagonal".')
        require_one_of("precision", precision, get_args(Precision))
        check_sample_dim(sample_dim)
        require_known_arguments(model, sample_dim)
        require_device("accumulator_device", accumulator_device)
        require_floating_dtype("accumulator_dtype", accumulator_dtype)
        self._model = model
        self._every = every
        self._sample_dim = sample_dim
        self._layers = selected
        self._ranks = ranks_of(model, selected)
        _check_ranks(self._ranks, selected, penalty)
        kind = check_reduction(reduction)
        self._settings: dict[str, Any] = {
            "reduction": kind,
            "decay": decay,
            "strict": strict,
            "loss_scale": loss_scale_of(loss_scale),
            "returned": None if loss_scale is None else loss_scale == "returned",
            "on_nonfinite": on_nonfinite,
            "forwards": forwards,
            "penalty": penalty,
            "device": accumulator_device,
            "dtype": accumulator_dtype,
            "accumulate": accumulate,
            "precision": precision,
            "select": partial(layers_to_measure, layer_types=layer_types, layers=layers, frozen=frozen, unchecked=True),
        }
        self._attributions = Attributions(model, sample_dim)
        self._attachment: Attachment | None = None
        self._verified = reduction is not None  # told, or found to be right
        self._reduction: Literal["mean", "sum"] | None = None if reduction is None or callable(kind) else kind
        self._log: CurvatureLog | None = None
        self._told = Told()  # by trials of one-shot measurements
        self.attach()

    # ---- life

    @cached_property
    def _fisher(self) -> OnlineFisher:
        """What training accumulates; who measures one batch alone never asks for it."""
        return OnlineFisher(model=self._model, layers=self._layers, **self._settings)

    def attach(self) -> None:
        """Register the hooks again after :meth:`detach`, as ``with probe:`` does; what was accumulated is kept.

        Raises:
            ProbeStateError: the probe is attached.
        """
        if self._attachment is not None:
            raise ProbeStateError("the probe is attached already: call detach() first, or make a second probe.")
        self._attachment = Attachment(self._model, self._fisher, self._attributions, self._every)
        self._attachment.attach()
        # Whoever has the probe no more can neither read it nor detach it. The model's hooks hold the attachment.
        finalize(self, _let_go, ref(self._attachment)).atexit = False

    def detach(self) -> None:
        """Remove every hook. What was accumulated can still be read; measurements need :meth:`attach` again.

        A probe that nothing refers to any more is detached by itself.
        """
        if self._attachment is not None and self._attachment.detach():
            self._attachment = None

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model."""
        return self._attachment is not None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold what was accumulated, and are detached: their model is another one."""
        return {**vars(self), "_attachment": None, "_log": None}

    def __enter__(self) -> "CurvatureProbe":
        if not self.attached:
            self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside the ``with`` block.

        Raises:
            ProbeStateError: the probe is detached.
        """
        attachment = self._attached()
        attachment.pauses += 1
        try:
            yield
        finally:
            attachment.pauses -= 1

    def reset(self) -> None:
        """Forget everything accumulated."""
        self._fisher.reset()

    @property
    def layer_names(self) -> list[str]:
        """Names of the measured layers, in ``model.named_modules()`` order."""
        return [layer.name for layer in self._layers]

    @property
    def layer_parameters(self) -> dict[str, tuple[nn.Parameter, ...]]:
        """The parameters of each measured layer, as they are in the model now; of those that still are in it."""
        now = dict(self._model.named_modules(remove_duplicate=False))
        inside = [layer for layer in self._layers if now.get(layer.name) is layer.module]
        gathered = {} if self._ranks is None else sharded_by_gathered(self._model)
        held = {layer.name: present(layer).parameters.values() for layer in inside}
        return {name: tuple(gathered.get(id(p), p) for p in parameters) for name, parameters in held.items()}

    @property
    def decay(self) -> float | None:
        """The decay of the moving average over batches; None for the mean over all samples."""
        return self._fisher.decay

    @property
    def accumulate(self) -> Accumulate:
        """What is accumulated, ``"diagonal"`` or ``"trace"``."""
        return self._fisher.accumulate

    @property
    def every(self) -> int:
        """Each ``every``-th forward is recorded."""
        return self._every

    @property
    def num_samples(self) -> int:
        """How many samples the accumulated Fisher has seen."""
        return num_samples(self._fisher)

    @property
    def num_batches(self) -> int:
        """How many batches were recorded, those included that were left out."""
        return self._fisher.num_batches

    @property
    def num_skipped(self) -> dict[str, int]:
        """How many batches were left out of a layer's mean because a gradient held nan or inf, by layer."""
        return num_skipped(self._fisher)

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"CurvatureProbe({len(self._layers)} layers, {self.num_samples} samples, {state})"

    # ---- measurements

    @overload
    def fisher_diagonal(self, *, synchronize: bool = False, missing: Missing = "raise") -> Diagonals: ...

    @overload
    def fisher_diagonal(
        self,
        loss_fn: LossFunction,
        inputs: Any,
        targets: Any = None,
        *,
        fisher_type: FisherType = "empirical",
        num_draws: int = 1,
        rtol: float | None = None,
        max_draws: int | None = None,
        generator: torch.Generator | None = None,
        create_graph: bool = False,
        chunk_size: int | None = None,
        progress: bool = False,
        synchronize: bool = False,
    ) -> Diagonals: ...

    @takes_data_sets(by_sample=lambda options: True)
    @refuses_renamed_keywords
    def fisher_diagonal(
        self,
        loss_fn: LossFunction | None = None,
        inputs: Any = None,
        targets: Any = None,
        *,
        fisher_type: FisherType = "empirical",
        num_draws: int = 1,
        rtol: float | None = None,
        max_draws: int | None = None,
        generator: torch.Generator | None = None,
        create_graph: bool = False,
        chunk_size: int | None = None,
        progress: bool = False,
        synchronize: bool = False,
        missing: Missing = "raise",
    ) -> Diagonals:
        """The Fisher diagonal per layer: what training accumulated or, with arguments, of one batch.

        Without arguments: the empirical Fisher of all samples recorded, ``F = (1/N) Σ_n (∂ℓ_n/∂θ)²``.

        With arguments: of this batch alone, nothing is accumulated. ℓ_n is the loss of a batch of one, so that no
        reduction has to be known. With f_n the model's output for sample n:

        - ``"empirical"``: ``(1/N) Σ_n (∂ℓ_n/∂θ)²``;
        - ``"type-2"``: ``(1/N) Σ_n diag(J_nᵀ ∂²ℓ_n/∂f_n² J_n)``, the diagonal of the generalised Gauss-Newton matrix;
        - ``"mc"``: an unbiased estimate of it from ``num_draws`` draws.

        Args:
            loss_fn: ``loss_fn(model(inputs), targets)`` → scalar; a module or any callable.
            inputs: a tensor, or a tuple (``model(*inputs)``) or dict (``model(**inputs)``) of them; N samples in dim 0.
                Or, in place of the batch, a data set: any iterable of ``(inputs, targets)``, such as a ``DataLoader``;
                the result is that of all samples together, with the standard error over batches.
            targets: what ``loss_fn`` takes second; a tensor of N samples, or a structure of them, or None.
            fisher_type: which Fisher.
            num_draws: draws of ``"mc"``.
            rtol: of ``"type-2"`` with many outputs: exact for each sample's heaviest columns, until the rest's share of
                the loss's own trace is at most this, and an unbiased estimate of the rest, drawn until its standard
                error relative to the diagonal is.
            max_draws: draws at most, with ``rtol``; 10,000 by default.
            generator: random numbers of ``"mc"`` and ``rtol``; the global random state is never advanced.
            create_graph: make the result differentiable with respect to the model's parameters.
            chunk_size: vector-Jacobian products batched at most; by default as many as fit 256 MB, on a CPU 32 MB.
            progress: show a ``rich`` progress bar.
            synchronize: of all samples of all ranks (see :meth:`synchronize`); every rank must call it.
            missing: without ``loss_fn``, what to do where a layer's number cannot be given: ``"raise"``, or ``"skip"``
                to return the others.

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

        Example:
            >>> import torch
            >>> from secorder import CurvatureProbe
            >>> model, loss_fn = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.nn.CrossEntropyLoss()
            >>> inputs, targets = torch.randn(8, 4), torch.randint(3, (8,))
            >>> with CurvatureProbe(model) as probe:
            ...     fisher = probe.fisher_diagonal(loss_fn, inputs, targets, fisher_type="type-2")
            >>> fisher["0"].shape, fisher.by_parameter()["0.weight"].shape, fisher.info["0"].strategy
            (torch.Size([15]), torch.Size([3, 4]), 'rule')
        """
        if loss_fn is None:
            given = any(x is not None for x in (inputs, targets, generator, chunk_size, rtol, max_draws))
            if given or create_graph or (fisher_type, num_draws) != ("empirical", 1):
                raise InvalidArgumentError(
                    "without loss_fn, fisher_diagonal() returns what training accumulated and takes synchronize= and "
                    "missing= alone: pass loss_fn, inputs and targets to measure a batch."
                )
            return self._read(diagonals, synchronize, missing)
        check_fisher_type(fisher_type, num_draws)
        require_one_of("missing", missing, get_args(Missing))
        refuse_given(
            "goes with what training accumulated, without loss_fn.", missing=missing if missing == "skip" else None
        )
        require_flag("synchronize", synchronize)
        options = _options(generator, chunk_size, progress, create_graph)
        budget = fisher_budget(fisher_type, rtol, max_draws, create_graph=create_graph)
        with raised_on_all() if synchronize else nullcontext():
            fisher = self._measure(
                partial(fisher_diagonal, asked=Asked(fisher_type, num_draws), budget=budget),
                *(loss_fn, inputs, targets),
                by_sample=True,
                **options,
            )
            warn_if_not_finite(fisher, "Fisher")
        return mean_over_ranks(fisher, batch_size(inputs, targets, self._one_shot_dim)) if synchronize else fisher

    def _read(self, of: Callable[[OnlineFisher, Missing], Read], synchronize: bool, missing: Missing) -> Read:
        """What training accumulated."""
        require_flag("synchronize", synchronize)
        if synchronize:
            self.synchronize()
        found = of(self._fisher, missing)
        self._warn_if_assumed()
        return found

    def _warn_if_assumed(self) -> None:
        """Warn once of the reduction that was assumed, where it was neither told nor verified."""
        if not self._verified:
            self._verified = True
            caution(
                "the loss of training was assumed to be a mean over the samples of each batch: pass reduction=, or "
                "check with probe.verify(loss_fn, inputs, targets)."
            )

    def fisher_trace(self, *, synchronize: bool = False, missing: Missing = "raise") -> dict[str, Trace]:
        """The trace of each layer's empirical Fisher that training accumulated: ``tr F = (1/N) Σ_n ‖∂ℓ_n/∂θ‖²``.

        With ``accumulate="trace"`` from the norms of the per-sample gradients, else the sum of the diagonal.

        Args:
            synchronize: of all samples of all ranks (see :meth:`synchronize`); every rank must call it.
            missing: what to do where a layer's number cannot be given: ``"raise"``, or ``"skip"`` to return the others.

        Returns:
            layer name → :class:`~secorder.Trace`. Its standard error is that of a mean over ``num_samples`` samples;
            where a diagonal is accumulated, their variance is estimated from the first batch and some of those after
            it. With ``penalty``, it is nan.

        Raises:
            ProbeStateError, AttributionError: as :meth:`fisher_diagonal` without arguments.

        Example:
            >>> import torch
            >>> from secorder import CurvatureProbe
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
            >>> with CurvatureProbe(model, accumulate="trace", reduction="mean") as probe:
            ...     model(torch.randn(8, 4)).square().sum(1).mean().backward()
            >>> probe.fisher_trace()["0"].num_samples
            8
        """
        return self._read(fisher_traces, synchronize, missing)

    def gradient_noise_scale(self, *, synchronize: bool = False, missing: Missing = "raise") -> NoiseScales:
        """How many samples a batch needs for its gradient to be more signal than noise, by layer: ``tr Σ / |G|²``.

        From S, the mean of the N squared norms of a batch's per-sample gradients, and B, that of their mean:
        ``|G|² = (N B − S) / (N − 1)`` and ``tr Σ = (S − B) N / (N − 1)``, unbiased and averaged over batches (weighted
        by their samples, or as ``decay`` says) before the ratio. A micro-batch of gradient accumulation is a batch of
        its own. With ``accumulate="trace"`` from every recorded batch, else from the first and some of those after it.

        Args:
            synchronize: of the batches of all ranks (see :meth:`synchronize`); every rank must call it.
            missing: as for :meth:`fisher_trace`.

        Returns:
            layer name → :class:`~secorder.NoiseScale`; ``.total`` is that of all layers together.

        Raises:
            ProbeStateError, AttributionError: as :meth:`fisher_diagonal` without arguments; AttributionError where no
                batch determines it (batches of one sample, several forwards of one backward, ``penalty``).

        Sources: McCandlish, Kaplan, Amodei, et al. (2018), "An empirical model of large-batch training", appendix A.1;
        Gray, Tiwari, Bergsma, Hestness (2024), "Normalization layer per-example gradients are sufficient to predict
        gradient noise scale in transformers".

        Example:
            >>> import torch
            >>> from secorder import CurvatureProbe
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
            >>> with CurvatureProbe(model, accumulate="trace", reduction="mean") as probe:
            ...     model(1 + torch.randn(64, 4)).square().sum(1).mean().backward()
            >>> noise = probe.gradient_noise_scale()
            >>> noise["0"].value == noise.total.value > 0
            True
        """
        return self._read(noise_scales, synchronize, missing)

    def window(self, *, keep_total: bool = True, synchronize: bool = False) -> Window:
        """Take out what was accumulated since the last call of this method (or the start), and begin a new window.

        For a curve over time, in which the mean over the whole run would hide what changes: a
        :class:`~secorder.Window` holds only the samples between two calls. Training steps cost no more.
        :meth:`fisher_diagonal` is still that of all samples: what is taken out is added to a sum of the same size in
        host memory, made at the first call.

        Args:
            keep_total: False drops what is taken out, and takes no memory for it: :meth:`fisher_diagonal` and
                :attr:`num_samples` then cover only what came since the last call.
            synchronize: of all samples of all ranks (see :meth:`synchronize`); every rank must call it.

        Returns:
            a :class:`~secorder.Window`. With ``decay`` its moving average begins at the call. A layer whose number
            cannot be given stays so until :meth:`reset`.

        Raises:
            ProbeStateError: ``synchronize`` without ``torch.distributed``. An empty window raises when it is read.
        """
        require_flag("keep_total", keep_total)
        require_flag("synchronize", synchronize)
        if synchronize:
            self.synchronize()
        taken = take_window(self._fisher, keep_total=keep_total)
        if taken.num_samples:
            self._warn_if_assumed()
        return taken

    @refuses_renamed_keywords
    def verify(self, loss_fn: LossFunction, inputs: Any, targets: Any = None) -> Verification:
        """Check on one batch that ``reduction`` and ``loss_scale`` are right.

        One forward and backward run with hooks of their own, with this probe's arguments; the result is compared with
        the one-shot empirical Fisher of the batch, which needs neither. Where parameters hold gradients
        that training left for this very batch, their scale is found too. Nothing is accumulated; gradients, buffers,
        the random state, and what model and loss keep in Python objects are restored.

        Args:
            loss_fn: ``loss_fn(model(inputs), targets)`` → scalar: the loss of the training.
            inputs: of one batch.
            targets: what ``loss_fn`` takes second.

        Returns:
            a :class:`~secorder.Verification`: true where both agree; ``print`` it for a sentence that says what to
            pass.

        Raises:
            SecorderError: as :meth:`fisher_diagonal` with the same arguments.

        Example:
            >>> import torch
            >>> from secorder import CurvatureProbe
            >>> model, loss_fn = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.nn.CrossEntropyLoss(reduction="sum")
            >>> with CurvatureProbe(model) as probe:
            ...     print(probe.verify(loss_fn, torch.randn(8, 4), torch.randint(3, (8,))))
            your loss is a sum: pass reduction="sum".
        """
        require_callable("loss_fn", loss_fn, "loss_fn(outputs, targets)")
        require_one_batch("verify", inputs, targets)
        one_shot = self.fisher_diagonal(loss_fn, inputs, targets)
        count = batch_size(inputs, targets, self._one_shot_dim)
        with self.paused():
            found = verify(self._fisher, self._sample_dim, on_copies(loss_fn), inputs, targets, one_shot, count)
        self._verified = bool(found)
        if found:
            self._fisher.troubles.unseen = ""
        return found

    @takes_data_sets(by_sample=lambda options: False)
    @refuses_renamed_keywords
    def hessian_diagonal(
        self,
        loss_fn: LossFunction,
        inputs: Any,
        targets: Any = None,
        *,
        method: HessianMethod = "auto",
        num_draws: int | None = None,
        rtol: float | None = None,
        max_draws: int | None = None,
        max_hvps: int | None = None,
        generator: torch.Generator | None = None,
        create_graph: bool = False,
        chunk_size: int | None = None,
        progress: bool = False,
    ) -> Diagonals:
        """The Hessian diagonal ``∂²L/∂θ_i²`` per layer, ``L = loss_fn(model(inputs), targets)`` exactly as given.

        ``"exact"`` takes, layer by layer, the cheapest strategy whose conditions hold (see
        :mod:`secorder.oneshot.hessian`; the result's ``info`` says which). ``"hutchinson"`` estimates without bias
        from random signs v on the layer's output z: ``Σ_n (J_nᵀ (H_z v)_n) ⊙ (J_nᵀ v_n)``; on the parameters where
        samples are coupled. ``"auto"`` is exact for layers that take at most ``max_hvps`` products, and an estimate for
        the others; ``info`` says so, and so does a :class:`~secorder.CurvatureWarning`.

        Args:
            loss_fn, inputs, targets: as for :meth:`fisher_diagonal`.
            method: ``"auto"``, ``"exact"`` or ``"hutchinson"``.
            num_draws: draws of an estimate, 100 by default; with ``rtol`` the least number, 16 by default.
            rtol: draw until a layer's ``‖standard error‖ / ‖diagonal‖`` is at most this; ``"auto"`` asks 0.05 unless
                ``num_draws`` is given. Whether it was met is the ``converged`` of the layer's ``info``.
            max_draws: draws at most, with ``rtol``; 10,000 by default.
            max_hvps: with ``"auto"``, Hessian-vector products that an exact layer may take; by default 10,000, and as
                many as take some ten seconds.
            generator: random numbers, of the draws and of the checks; the global random state is never advanced.
            create_graph: make the result differentiable with respect to the model's parameters (``"exact"`` only).
            chunk_size: Hessian-vector products batched at most; by default as many as fit 256 MB, on a CPU its caches.
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

        Example:
            >>> import torch
            >>> from secorder import CurvatureProbe
            >>> model, loss_fn = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.nn.CrossEntropyLoss()
            >>> inputs, targets = torch.randn(8, 4), torch.randint(3, (8,))
            >>> with CurvatureProbe(model) as probe:
            ...     hessian = probe.hessian_diagonal(loss_fn, inputs, targets)
            >>> hessian["0"].shape, hessian.info["0"].strategy
            (torch.Size([15]), 'chain')
        """
        budget = Budget.checked(method, num_draws, rtol, max_draws, max_hvps)
        options = _options(generator, chunk_size, progress, create_graph)
        if create_graph and method == "hutchinson":
            raise InvalidArgumentError('create_graph=True needs method="exact".')
        if create_graph:
            reason = "goes without create_graph=True, with which every layer is exact."
            refuse_given(reason, num_draws=num_draws, rtol=rtol, max_draws=max_draws, max_hvps=max_hvps)
        hessian = self._measure(partial(hessian_diagonal, budget=budget), loss_fn, inputs, targets, **options)
        if method == "auto":
            warn_if_estimated(hessian.info)
        warn_if_not_finite(hessian, "Hessian")
        return hessian

    @takes_data_sets(by_sample=lambda options: options.get("of", "hessian") != "hessian")
    @refuses_renamed_keywords
    def hessian_trace(
        self,
        loss_fn: LossFunction,
        inputs: Any,
        targets: Any = None,
        *,
        of: Curvature = "hessian",
        by: By = "layer",
        method: HessianMethod = "auto",
        num_draws: int | None = None,
        rtol: float | None = None,
        max_draws: int | None = None,
        max_hvps: int | None = None,
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
        progress: bool = False,
    ) -> dict[str, Trace]:
        """The trace of each layer's block of a curvature matrix, with its standard error.

        By the strategies of :meth:`hessian_diagonal`, whose sum it is: exact where that is affordable, else from random
        signs on the layer's output, ``Σ_n ⟨J_nᵀ (H_z v)_n, J_nᵀ v_n⟩``, or on the parameters. Of the GGN, with S a root
        of the loss's Hessian, from random signs on its columns, ``Σ_n ‖J_nᵀ S_n v_n‖² / N``, for all layers at once.

        Args:
            loss_fn, inputs, targets, method, max_draws, max_hvps, progress: as for :meth:`hessian_diagonal`.
            of: ``"hessian"``, ``∂²L/∂θ²``; ``"ggn"``, its generalised Gauss-Newton part ``(1/N) Σ_n J_nᵀ ∂²ℓ_n/∂f_n²
                J_n`` (the type-2 Fisher); ``"fisher"``, the empirical one ``(1/N) Σ_n ∂ℓ_n/∂θ ∂ℓ_n/∂θᵀ``.
            by: ``"layer"`` for the block of all of a layer's parameters, ``"parameter"`` for each parameter's own.
            num_draws: draws, 100 by default; with ``rtol`` the least number, 16 by default.
            rtol: draw until the standard error relative to the trace is at most this; ``"auto"`` asks 0.05.
            generator, chunk_size: as for :meth:`hessian_diagonal`.

        Returns:
            layer name, or parameter name → :class:`~secorder.Trace`.

        Raises:
            SecorderError: as :meth:`hessian_diagonal`; with ``of`` other than ``"hessian"`` as :meth:`fisher_diagonal`.

        Sources: Hutchinson (1989), "A stochastic estimator of the trace of the influence matrix"; on z, Martens,
        Sutskever, Swersky (2012).

        Example:
            >>> import torch
            >>> from secorder import CurvatureProbe
            >>> model, loss_fn = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.nn.CrossEntropyLoss()
            >>> inputs, targets = torch.randn(8, 4), torch.randint(3, (8,))
            >>> with CurvatureProbe(model) as probe:
            ...     trace = probe.hessian_trace(loss_fn, inputs, targets)["0"]
            >>> trace.value > 0, trace.standard_error, trace.num_draws
            (True, 0.0, 0)
        """
        _check_curvature(of, by)
        budget = Budget.checked(method, num_draws, rtol, max_draws, max_hvps)
        if of == "fisher":
            reason = 'goes with of="hessian" or "ggn": of="fisher" is exact.'
            refuse_given(reason, num_draws=num_draws, rtol=rtol, max_draws=max_draws, max_hvps=max_hvps)
        options = {"by_sample": of != "hessian", **_options(generator, chunk_size, progress)}
        found = self._measure(partial(traces, budget=budget, of=of, by=by), loss_fn, inputs, targets, **options)
        if method == "auto":
            warn_if_estimated(found)
        warn_if_not_finite(found, "trace")
        return found

    def hessian_eigenvalues(
        self,
        loss_fn: LossFunction,
        inputs: Any,
        targets: Any = None,
        *,
        of: Curvature = "hessian",
        by: By = "layer",
        count: int = 1,
        which: Which = "both",
        tolerance: float = 1e-3,
        max_iterations: int = MAX_ITERATIONS,
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
        progress: bool = False,
    ) -> dict[str, Eigenvalues]:
        """The largest and smallest eigenvalues of each layer's block of a curvature matrix, by Lanczos iteration.

        Args:
            loss_fn, inputs, targets, of, by: as for :meth:`hessian_trace`.
            count: how many; of both ends, at each.
            which: ``"both"`` ends, ``"top"``, ``"bottom"``, or the ``"largest"`` in modulus, which mostly take half the
                products: eigenvalues at the other end are small, and lie close together.
            tolerance: on residuals ``‖H q − λ q‖``, relative to the largest eigenvalue in modulus. An eigenvalue's own
                error is about the square of it, over the gap to the next: 0.03 mostly gives three digits.
            max_iterations: products of a block at most; of a data set, passes through it, all blocks together.
            generator: random numbers of the start.
            chunk_size: products batched at most, in the checks.
            progress: show a ``rich`` progress bar.

        Returns:
            layer name, or parameter name → :class:`~secorder.Eigenvalues`, which says whether the tolerance was met.
            An eigenvalue of higher multiplicity may be found once only.

        Raises:
            InvalidArgumentError: ``count`` or ``max_iterations`` is below 1, ``tolerance`` below 0, ``which`` no end;
                otherwise as :meth:`hessian_trace`.
            NonFiniteError: a block holds nan or infinite entries.

        Source: Golub, Van Loan, "Matrix computations", 4th edition, section 10.3.

        Example:
            >>> import torch
            >>> from secorder import CurvatureProbe
            >>> model, loss_fn = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.nn.CrossEntropyLoss()
            >>> inputs, targets = torch.randn(8, 4), torch.randint(3, (8,))
            >>> with CurvatureProbe(model) as probe:
            ...     found = probe.hessian_eigenvalues(loss_fn, inputs, targets, count=2)["0"]
            >>> len(found.top), found.top[0] >= found.top[1] > 0, found.converged
            (2, True, True)
        """
        _check_curvature(of, by)
        require_flag("progress", progress)
        ends = Ends(count, which, tolerance, max_iterations)
        options: dict[str, Any] = {"by_sample": of != "hessian", "generator": generator, "chunk_size": chunk_size}
        if is_data_set(inputs, targets):
            with random_state_kept(self._model):
                return eigenvalues_of_data(
                    lambda work, x, t: self._measure(work, loss_fn, x, t, **options),
                    *(*self._data_context, loss_fn, inputs),
                    ends=ends,
                    of=of,
                    by=by,
                    progress=progress,
                )
        work = partial(eigenvalues, ends=ends, of=of, by=by)
        return self._measure(work, loss_fn, inputs, targets, **options, progress=progress)

    def hessian_facts(
        self, loss_fn: LossFunction, inputs: Any, targets: Any = None, *, chunk_size: int | None = None
    ) -> dict[str, Facts]:
        """The facts about each layer by which :func:`secorder.oneshot.hessian.choice.choose` chooses its strategy.

        Args:
            loss_fn, inputs, targets, chunk_size: as for :meth:`hessian_diagonal`.

        Returns:
            layer name → :class:`~secorder.oneshot.hessian.facts.Facts`, to be printed.

        Raises:
            SecorderError: as :meth:`hessian_diagonal`.
        """
        require_one_batch("hessian_facts", inputs, targets)
        return self._measure(facts, loss_fn, inputs, targets, chunk_size=chunk_size)

    @refuses_renamed_keywords
    def estimate_cost(
        self,
        loss_fn: LossFunction,
        inputs: Any,
        targets: Any = None,
        *,
        quantity: Quantity = "hessian",
        method: HessianMethod = "auto",
        num_draws: int | None = None,
        rtol: float | None = None,
        max_draws: int | None = None,
        max_hvps: int | None = None,
        fisher_type: FisherType = "empirical",
        count: int = 1,
        which: Which = "both",
        tolerance: float = 1e-3,
        max_iterations: int = MAX_ITERATIONS,
        chunk_size: int | None = None,
    ) -> Cost:
        """What a measurement with the same arguments would take: products, memory and seconds.

        This runs a forward, a backward, the checks, and two short trials of each layer's products.

        Args:
            loss_fn, inputs, targets, method, rtol, max_draws, max_hvps, chunk_size: as for :meth:`hessian_diagonal`.
            quantity: of which measurement: ``"hessian"``, ``"trace"`` (of the Hessian), ``"eigenvalues"`` or
                ``"fisher"``.
            num_draws: as for :meth:`hessian_diagonal`, or :meth:`fisher_diagonal`.
            fisher_type: as for :meth:`fisher_diagonal`.
            count, which, tolerance, max_iterations: as for :meth:`hessian_eigenvalues`.

        Returns:
            layer name → :class:`~secorder.LayerCost`: the strategy, its products, those of the exact one, memory and
            seconds; its ``seconds`` are those of the whole measurement. Of a data set, each batch counts as the first.

        Raises:
            SecorderError: as the measurement itself.

        Example:
            >>> import torch
            >>> from secorder import CurvatureProbe
            >>> model, loss_fn = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.nn.CrossEntropyLoss()
            >>> inputs, targets = torch.randn(8, 4), torch.randint(3, (8,))
            >>> with CurvatureProbe(model) as probe:
            ...     cost = probe.estimate_cost(loss_fn, inputs, targets)
            >>> cost["0"].strategy, 0 < cost["0"].num_bytes <= cost.num_bytes, cost.seconds < 60
            ('chain', True, True)
        """
        require_one_of("quantity", quantity, get_args(Quantity))
        ends = Ends(count, which, tolerance, max_iterations)
        drawn = {"num_draws": num_draws, "rtol": rtol, "max_draws": max_draws}
        budget = _budget(quantity, method, fisher_type, ends, max_hvps, drawn)
        num_batches, loading = 1, 0.0
        if is_data_set(inputs, targets):
            with random_state_kept(self._model):
                (inputs, targets), num_batches, loading = first_of(inputs, self._one_shot_dim)
        asked = quantity, budget, Asked(fisher_type, num_draws or 1), ends
        batch = loss_fn, inputs, targets
        how: dict[str, Any] = {"by_sample": quantity == "fisher", "chunk_size": chunk_size}
        cost = self._measure(lambda task: quantity_cost(task, *asked), *batch, **how)
        # What it takes to put everything back, once all that happens the first time alone has happened.
        cost.overhead += seconds_of(lambda: self._measure(lambda task: None, *batch, **how))
        if quantity == "fisher" and num_batches > 1:
            options: dict[str, Any] = {"fisher_type": fisher_type, "num_draws": num_draws or 1, "rtol": rtol}
            options |= {"max_draws": max_draws, "chunk_size": chunk_size}
            of_batches = partial(self.fisher_diagonal, loss_fn, **options)
            cost.overhead += seconds_besides(of_batches, (inputs, targets), cost.seconds)
        if num_batches > 1 and quantity in ("fisher", "hessian"):  # the mean, and what tells its error
            cost.base_bytes += 2 * result_bytes(self._layers)
        cost.overhead += loading
        cost.num_batches = num_batches
        return cost

    def _measure(
        self,
        work: Callable[[Measurement], Result],
        loss_fn: LossFunction,
        inputs: Any,
        targets: Any,
        *,
        by_sample: bool = False,
        **options: Any,
    ) -> Result:
        """``work`` on the isolated model."""
        self._attached()
        if by_sample:
            require_one_dimension(self._sample_dim)
        batch = loss_fn, with_shared_ones_hidden(self._model, inputs, self._sample_dim), targets
        with one_at_a_time(), whole_layers(self._model, self._layers, self._ranks) as layers:
            options |= {"by_sample": by_sample, "sample_dim": self._one_shot_dim, "told": self._told}
            return measure(work, self._model, layers, *batch, **options)

    # ---- watching

    def summary(
        self, hessian: Mapping[str, Tensor] | None = None, *, sort_by: "SortKey | None" = None, depth: int | None = None
    ) -> "Report":
        """The table of layers: ``rich.print(probe.summary())``, or ``print``.

        Args:
            hessian: a Hessian diagonal to show beside the accumulated Fisher.
            sort_by, depth: see :func:`secorder.report`.

        Returns:
            a :class:`~secorder.Report` of the accumulated Fisher.

        Raises:
            ProbeStateError, AttributionError: as :meth:`fisher_diagonal` without arguments.
        """
        from .monitor.table import report

        return report(self.fisher_diagonal(), hessian, sort_by=sort_by, depth=depth, title=repr(self))

    def __str__(self) -> str:
        readable = self.num_samples > 0 and not unreadable(self._fisher)
        if readable and self._fisher.accumulate == "diagonal":
            return str(self.summary())
        traces = self.fisher_trace() if readable else {}
        lines = [f"  {x.name or 'model'}: {x.module}" for x in self._layers]
        of = [f", tr F = {traces[x.name].value:.3g}" if readable else "" for x in self._layers]
        return "\n".join([repr(self), *map("".join, zip(lines, of, strict=True))])

    def log(self, sinks: Any, step: int, *, hessian: Mapping[str, Tensor] | None = None) -> None:
        """Write the accumulated Fisher (and a Hessian diagonal): see :func:`secorder.monitor.log.log_diagonals`.

        Args:
            sinks: a ``torch.utils.tensorboard.SummaryWriter``, or another sink; several as a list.
            step: the training step.
            hessian: what :meth:`hessian_diagonal` returned, if it is to be logged too.

        Raises:
            ProbeStateError, AttributionError: as :meth:`fisher_diagonal` without arguments.
            InvalidTypeError: it is no sink, or the step no integer.
        """
        from .monitor.log import CurvatureLog

        require_integer("step", step, 0)
        if self._log is None or self._log.given is not sinks:
            self._log = CurvatureLog(sinks, strict=True)
        self._log.diagonals("fisher", self.fisher_diagonal(), step)
        if hessian is not None:
            self._log.diagonals("hessian", hessian, step)

    def _attached(self) -> Attachment:
        if self._attachment is None:
            raise ProbeStateError("the probe is detached: call attach(), or make a new probe.")
        return self._attachment

    @property
    def _one_shot_dim(self) -> int:
        """The dimension that holds the samples in passes of our own: as it was told, or found in training."""
        told = specified_dimensions(self._sample_dim)
        if told is not None:
            others = told - {0}  # dim 0 is looked at besides
            return others.pop() if len(others) == 1 else 0
        known = self._attributions.any_known()
        return next((dim for dim in known.dims if dim is not None), 0) if known is not None else 0

    @property
    def _data_context(self) -> tuple[nn.Module, int, Literal["mean", "sum"] | None]:
        """What measuring a data set takes: the model, where samples are in its inputs, and the reduction if told."""
        self._attached()
        require_one_dimension(self._sample_dim)
        return self._model, self._one_shot_dim, self._reduction

    # ---- checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """What was accumulated, as a flat dict of tensors: for ``torch.save``, safetensors and distributed checkpoints.

        A run that is resumed from it accumulates bit for bit what one that was not interrupted does.
        """
        return state_of(self._fisher, self._attachment)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` returned; replaces what is accumulated.

        Raises:
            InvalidArgumentError: the state is of another version, other layers, shapes or settings; nothing is changed.
        """
        load_state(self._fisher, self._attachment, state)

    # ---- many processes

    def synchronize(self, group: "torch.distributed.ProcessGroup | None" = None) -> None:
        """Make the accumulated Fisher that of all samples of all ranks; every rank of the group must call it.

        Sums and counts are added up over the ranks in one collective, so that uneven batches and ranks without a batch
        give the number that one process would have got on all the data. Each rank then goes on from the common mean
        with an equal share of the samples behind it, so that a later call adds what came since. With ``decay``, the
        moving averages of the ranks are averaged, weighted by what is in them. Under ``fully_shard`` (FSDP2) there is
        nothing to do: each recorded backward adds up all ranks' samples layer by layer, and leaves each rank its shard.

        Args:
            group: a process group; the default group if None.

        Raises:
            ProbeStateError: ``torch.distributed`` is not initialised.
        """
        synchronize(self._fisher, group)


def _layers_to_measure(
    model: nn.Module, layer_types: LayerTypes, layers: str | Iterable[str] | None, *, frozen: bool
) -> list[Layer]:
    """The layers that match; with the default types, a warning where these are not most of what is trained."""
    selected = layers_to_measure(model, layer_types, layers, frozen=frozen)
    if not selected:
        if next(model.parameters(), None) is None:
            raise InvalidArgumentError("the model has no parameters: there is nothing to measure.")
        raise InvalidArgumentError(
            "no layer of the model matches: pass layer_types= with the types to measure, or layers= with names "
            "from model.named_modules()."
        )
    if layers is None and layer_types is None:
        _warn_of_share(model, selected)
    return selected


def _let_go(attachment: "ref[Attachment]") -> None:
    """Take the hooks off, if the model is still there."""
    left = attachment()
    if left is not None:
        left.detach()


def _check_ranks(ranks: Ranks | None, layers: Sequence[Layer], penalty: str | None) -> None:
    """Raise what is not supported where parameters lie over ranks."""
    if ranks is not None and penalty is not None:
        raise InvalidArgumentError(
            'penalty="shared" does not go with parameters that lie over ranks (fully_shard, tensor parallelism).'
        )
    if ranks is not None and ranks.data and not all(layer.sharded for layer in layers):
        raise InvalidArgumentError(
            "some layers are sharded (fully_shard) and some are not: make a probe for each kind with layers=."
        )


def _options(
    generator: torch.Generator | None, chunk_size: int | None, progress: bool = False, create_graph: bool = False
) -> dict[str, Any]:
    """How to measure, as :func:`.measure` takes it."""
    require_flag("progress", progress)
    require_flag("create_graph", create_graph)
    return {"generator": generator, "chunk_size": chunk_size, "progress": progress, "create_graph": create_graph}


def _budget(
    quantity: Quantity,
    method: HessianMethod,
    fisher_type: FisherType,
    ends: Ends,
    max_hvps: int | None,
    drawn: dict[str, Any],
) -> Budget:
    """How exact what a cost is asked for is to be, of options that its measurement takes."""
    for name, value, usual, of in (
        ("method", method, "auto", ("hessian", "trace")),
        ("fisher_type", fisher_type, "empirical", ("fisher",)),
        *((name, value, getattr(Ends(), name), ("eigenvalues",)) for name, value in vars(ends).items()),
        ("max_hvps", max_hvps, None, ("hessian", "trace")),
    ):
        if quantity not in of and value != usual:
            refuse_given(f'goes with quantity="{of[0]}", not "{quantity}".', **{name: value})
    if quantity == "fisher":
        check_fisher_type(fisher_type, 1 if drawn["num_draws"] is None else drawn["num_draws"])
        return fisher_budget(fisher_type, drawn["rtol"], drawn["max_draws"]) or Budget()
    if quantity == "eigenvalues":
        refuse_given('goes with what is drawn, not with quantity="eigenvalues".', **drawn)
    return Budget.checked(method, **drawn, max_hvps=max_hvps)


def _check_curvature(of: Curvature, by: By) -> None:
    """Raise unless there is such a matrix, and such a block of it."""
    require_one_of("of", of, get_args(Curvature))
    require_one_of("by", by, get_args(By))


def _warn_of_share(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Warn where the default layer types leave out most of what is trained."""
    share = share_of_parameters(model, layers)
    if share < 0.5:
        every = {layer.name for layer in trained(select_layers(model, "all", unchecked=True))}
        measured = len(every.intersection(layer.name for layer in layers))
        caution(
            f"the probe measures {measured} of {len(every)} trained layers, {share:.0%} of the trainable parameters "
            '(by default nn.Linear and nn.Conv2d): pass layer_types="all", or types of your own.'
        )
