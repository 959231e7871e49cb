"""A callback for Hugging Face's ``Trainer``: curvature of the layers of a model that it trains.

Needs ``pip install secorder[transformers]``.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ..errors import InvalidArgumentError
from ..layers.selection import LayerTypes
from ..monitor.recorder import CurvatureRecorder
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
        reduction: as for :class:`secorder.CurvatureProbe`; the losses of transformers' models are means.
        every: log the Fisher at each ``every``-th step.
        hessian_every: measure and log the Hessian at each ``hessian_every``-th step; never by default.
        loss_fn: the loss of the Hessian; by default the model's own, ``lambda output, _: output.loss``.
        batch: the inputs (a dict with labels) that the Hessian is measured on.
        probe_options: further arguments of :class:`secorder.CurvatureProbe`; ``loss_scale`` is asked for where
            gradients are accumulated.

    Raises:
        InvalidArgumentError: gradients are accumulated and ``loss_scale`` is not given, when training begins.

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
        reduction: Literal["mean", "sum"] = "mean",
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
        if args.gradient_accumulation_steps > 1 and "loss_scale" not in self._probe_arguments:
            raise InvalidArgumentError(
                "with gradient accumulation, the trainer divides the loss of some models and not of others: pass "
                f"loss_scale=1 / {args.gradient_accumulation_steps} where it does (language models), loss_scale=1 "
                "where it does not (models that ignore num_items_in_batch, such as BERT's classifiers)."
            )
        self.probe = CurvatureProbe(model, **self._probe_arguments)
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
