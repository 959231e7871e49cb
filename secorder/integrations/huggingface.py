"""A callback for Hugging Face's ``Trainer``: curvature of the layers of a model that it trains."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from .._caution import caution
from ..layers.selection import LayerTypes
from ..monitor.recorder import CurvatureRecorder
from ..online.losses.reduction import Reduction, token_weights
from ..probe import CurvatureProbe
from .options import divided, told_apart, try_options

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        f"secorder.integrations.huggingface needs transformers: pip install transformers accelerate ({error})"
    ) from error

__all__ = ["CurvatureCallback"]

#: What is said where the model does not see the labels.
_OUTSIDE = (
    "the model is called without labels (label smoothing, compute_loss_func, a compute_loss that takes them out), so "
    "that the loss is taken to be a mean over samples that is multiplied by nothing: pass reduction= and loss_scale=, "
    "or check by callback.probe.verify."
)


class CurvatureCallback(TrainerCallback, ExportableState):
    """Attaches a probe while ``Trainer.train`` runs, and logs to what the trainer reports to.

    A point is one step of the optimizer, whose micro-batches are counted together; ``model/loss`` is the trainer's own,
    at its ``logging_steps``. What was accumulated and logged is in the trainer's checkpoints, and a run that is resumed
    goes on from it.

    Args:
        sinks: where numbers go, as for :class:`secorder.CurvatureRecorder`. By default what ``report_to`` names:
            TensorBoard (into ``output_dir/runs/curvature``), Weights & Biases and MLflow (into the run that is active);
            with ``report_to="none"`` the ``recorder.history`` alone.
        layer_types: as for :class:`secorder.CurvatureProbe`.
        reduction: as for :class:`secorder.CurvatureProbe`; by default by the labels that the model is called
            with: means over tokens, where some are padding too, divided by ``num_items_in_batch`` where the
            trainer passes it.
        loss_fn: the loss of the Hessian; by default the model's own, ``lambda output, _: output.loss``.
        batch: the inputs (a dict with labels) that the Hessian is measured on.
        options: further keywords of :class:`secorder.CurvatureProbe` (``every=5`` records each fifth batch)
            and of :class:`secorder.CurvatureRecorder` (``log_every``, ``hessian_every``, ``on_finding`` …). The scale
            of the loss, where gradients are accumulated or scaled, is found (``loss_scale="returned"``).

    Attributes:
        probe: the probe, from the start of training on; its numbers stay readable after it.
        recorder: the recorder, with its history.

    Raises:
        InvalidArgumentError, InvalidTypeError: an option is unknown, or has an unusable value.

    Example:
        >>> from secorder.integrations.huggingface import CurvatureCallback  # doctest: +SKIP
        >>> Trainer(model, args, train_dataset=data, callbacks=[CurvatureCallback(log_every=50)])  # doctest: +SKIP
    """

    probe: CurvatureProbe | None
    recorder: CurvatureRecorder | None

    def __init__(
        self,
        sinks: Any = None,
        layer_types: LayerTypes = None,
        *,
        reduction: Reduction = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        batch: Any = None,
        **options: Any,
    ) -> None:
        given = {"sinks": sinks, "layer_types": layer_types, "reduction": reduction, "loss_fn": loss_fn, "batch": batch}
        self._given = {**given, **options}
        of_probe, self._schedule = divided(options)
        self._probe_arguments = {"layer_types": layer_types, "reduction": reduction, **of_probe}
        if batch is not None:
            self._schedule["batch"] = (batch, None)
            self._schedule["loss_fn"] = loss_fn or _own_loss
        try_options(self._probe_arguments, self._schedule, sinks)
        self._sinks = sinks
        self.probe = None
        self.recorder = None

    # ---- the trainer's events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the probe, and go on from a checkpoint."""
        model: nn.Module = kwargs["model"]
        options = {"loss_scale": "returned", **self._probe_arguments}
        if options["reduction"] is None:
            options["reduction"] = _ByLabels(model)
        self.probe = CurvatureProbe(model, **options)
        sinks = None
        if state.is_world_process_zero:
            sinks = _reported_to(args) if self._sinks is None else self._sinks
        schedule = {"optimizer": kwargs.get("optimizer"), "synchronize": args.world_size > 1, **self._schedule}
        self.recorder = CurvatureRecorder(self.probe, sinks, **schedule)
        # A checkpoint that was saved without this callback has no place for its state, which the trainer needs to save.
        places: Any = state.stateful_callbacks
        places.setdefault(type(self).__name__, self.state())
        if state.global_step:
            self._resume(args, state, self.probe, self.recorder)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the gradients, which are gone at the end of the step."""
        if self.recorder is not None:
            self.recorder.see_gradients()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log what is due."""
        if self.recorder is not None:
            self.recorder.step(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the trainer's own loss beside, at its ``logging_steps``."""
        loss = (kwargs.get("logs") or {}).get("loss")
        if self.recorder is not None and loss is not None:
            self.recorder.log({"loss": float(loss)}, state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put what was accumulated and logged beside the trainer's checkpoint."""
        folder = _checkpoint(args, state)
        if self.probe is None or self.recorder is None or not folder.is_dir():
            return
        saved = {"probe": self.probe.state_dict(), "recorder": self.recorder.state_dict()}
        torch.save(saved, folder / self._file(args.process_index))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach the probe and close the log."""
        if self.probe is not None and self.probe.attached:
            self.probe.detach()
        if self.recorder is not None:
            self.recorder.close()

    # ---- checkpoints

    def _resume(
        self, args: TrainingArguments, state: TrainerState, probe: CurvatureProbe, recorder: CurvatureRecorder
    ) -> None:
        told = args.resume_from_checkpoint
        folders = [*([Path(told)] if isinstance(told, str) else []), _checkpoint(args, state)]
        for folder in folders:
            there = [file for rank in (args.process_index, 0) if (file := folder / self._file(rank)).is_file()]
            for file in there[:1]:  # the first rank's, where there were fewer ranks
                saved = torch.load(file, weights_only=True)
                probe.load_state_dict(saved["probe"])
                recorder.load_state_dict(saved["recorder"])
                return
        caution(
            f"the curvature of the steps before {state.global_step} is not in what is resumed from: there is no "
            f"{self._file(args.process_index)} in {folders[0]}, as a callback of these options writes it. It is "
            "accumulated anew."
        )

    def _file(self, rank: int) -> str:
        """What a rank writes into checkpoints, beside what other callbacks do."""
        told = told_apart(self._probe_arguments)
        parts = ["curvature", f"{crc32(told.encode()):08x}" if told else "", str(rank or "")]
        return "-".join(filter(None, parts)) + ".pt"

    def state(self) -> dict[str, Any]:
        """The arguments that JSON can hold, for the trainer's own state; numbers are beside it in the checkpoint."""
        return {"args": {key: x for key, x in self._given.items() if x is not None and _is_json(x)}, "attributes": {}}


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".", f"checkpoint-{state.global_step}")


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _own_loss(output: Any, _: Any) -> Tensor:
    """The loss that the model itself returns."""
    loss: Tensor = output.loss
    return loss


def _reported_to(args: TrainingArguments) -> list[Any]:
    """The sinks for what the trainer reports to; runs were begun by the trainer's own callbacks, which come first."""
    sinks: list[Any] = []
    named = args.report_to or []
    if "tensorboard" in named:
        sinks.append(Path(args.output_dir or ".", "runs", "curvature"))
    if "wandb" in named:
        from ..monitor.sinks.wandb import WandbSink

        sinks.append(WandbSink())
    if "mlflow" in named:
        from ..monitor.sinks.mlflow import MLflowSink

        sinks.append(MLflowSink())
    return sinks


def _inside(model: nn.Module) -> Any:
    """The model that computes the loss, within what compiles or adapts it."""
    inside: Any = getattr(model, "_orig_mod", model)
    return inside.get_base_model() if hasattr(inside, "get_base_model") else inside


def _written(model: nn.Module) -> str:
    """How its forward is written, if that can be read."""
    try:
        return inspect.getsource(inspect.unwrap(type(model).forward))
    except (OSError, TypeError):
        return ""


class _ByLabels:
    """The weights c_n of a batch, by the labels among the model's arguments; None, for a mean over samples, without.

    A causal language model leaves out the first label of each sequence, and a model with a loss of its own in
    ``forward`` ignores the number of labels that the trainer passes. What is taken to be so is checked by the probe.
    """

    def __init__(self, model: nn.Module) -> None:
        inside = _inside(model)
        text, names = _written(inside), type(inside).__name__
        if "loss_function" in text:  # the library's own, by the kind of model: a causal one's of captions, too
            names += getattr(getattr(inside, "loss_function", None), "__name__", "")
        causal = "CausalLM" in names or "LMHead" in names
        items = "num_items_in_batch" if not text or "loss_function" in text or "num_items_in_batch" in text else ""
        self._weights = token_weights(shift=int(causal), items=items)
        self._warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | None:
        labels = kwargs.get("labels")
        if labels is None and not self._warned:
            self._warned = True
            caution(_OUTSIDE)
        tokens = isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point()
        return self._weights(*args, **kwargs) if tokens else None
