"""A callback for Hugging Face's ``Trainer``: curvature of the layers of a model that it trains.

Needs ``pip install secorder[transformers]``.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ..layers.selection import LayerTypes
from ..monitor.recorder import CurvatureRecorder
from ..online.reduction import Reduction, token_weights
from ..probe import CurvatureProbe

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "secorder.integrations.huggingface needs transformers: pip install secorder[transformers]"
    ) from error

__all__ = ["CurvatureCallback"]


class CurvatureCallback(TrainerCallback):
    """Attaches a probe while ``Trainer.train`` runs, and logs to TensorBoard.

    Args:
        logdir: folder of the log; ``args.output_dir/runs/curvature`` by default.
        layer_types: as for :class:`secorder.CurvatureProbe`.
        layers: as for :class:`secorder.CurvatureProbe`.
        reduction: as for :class:`secorder.CurvatureProbe`; by default by the labels that the model is called
            with: means over tokens, where some are padding too, divided by ``num_items_in_batch`` where the
            trainer passes it.
        every: log the Fisher at each ``every``-th step.
        hessian_every: measure and log the Hessian at each ``hessian_every``-th step; never by default.
        loss_fn: the loss of the Hessian; by default the model's own, ``lambda output, _: output.loss``.
        batch: the inputs (a dict with labels) that the Hessian is measured on.
        probe_options: further arguments of :class:`secorder.CurvatureProbe`. The scale of the loss, where gradients are
            accumulated or scaled, is found (``loss_scale="returned"``).

    Attributes:
        probe: the probe, from the start of training on; its numbers stay readable after it.

    Example:
        >>> from secorder.integrations.huggingface import CurvatureCallback  # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=data, callbacks=[CurvatureCallback(every=50)])  # doctest: +SKIP
    """

    probe: CurvatureProbe | None

    def __init__(
        self,
        logdir: str | None = None,
        layer_types: LayerTypes = None,
        *,
        layers: str | Iterable[str] | None = None,
        reduction: Reduction = None,
        every: int = 10,
        hessian_every: int | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        batch: Any = None,
        **probe_options: Any,
    ) -> None:
        self._logdir = logdir
        self._probe_arguments = {"layer_types": layer_types, "layers": layers, "reduction": reduction, **probe_options}
        self._schedule: dict[str, Any] = {"every": every, "hessian_every": hessian_every}
        if hessian_every is not None:
            self._schedule["loss_fn"] = loss_fn or (lambda output, _: output.loss)
            self._schedule["batch"] = None if batch is None else (batch, None)
        self.probe = None
        self._recorder: CurvatureRecorder | None = None
        self._writer: SummaryWriter | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the probe."""
        model: nn.Module = kwargs["model"]
        options = {"loss_scale": "returned", **self._probe_arguments}
        if options["reduction"] is None:
            options["reduction"] = _ByLabels(model)
        self.probe = CurvatureProbe(model, **options)
        self._writer = SummaryWriter(self._logdir or f"{args.output_dir}/runs/curvature")
        self._recorder = CurvatureRecorder(self.probe, self._writer, **self._schedule)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log what is due."""
        if self._recorder is not None:
            self._recorder.step(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach the probe and close the log."""
        if self.probe is not None:
            self.probe.detach()
        if self._writer is not None:
            self._writer.close()
        self._recorder = None


class _ByLabels:
    """The weights c_n of a batch, by the labels among the model's arguments; None, for a mean over samples, without.

    A causal language model leaves out the first label of each sequence.
    """

    def __init__(self, model: nn.Module) -> None:
        causal = any(kind in type(model).__name__ for kind in ("CausalLM", "LMHead"))
        self._weights = token_weights(shift=int(causal))

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | None:
        labels = kwargs.get("labels")
        tokens = isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point()
        return self._weights(*args, **kwargs) if tokens else None
