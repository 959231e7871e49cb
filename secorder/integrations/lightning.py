"""A callback for Lightning: curvature of the layers of a model that ``Trainer.fit`` trains.

Needs ``pip install secorder[lightning]``.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import InvalidArgumentError
from ..layers.selection import LayerTypes
from ..monitor.recorder import CurvatureRecorder
from ..probe import CurvatureProbe

try:
    import lightning.pytorch as pl
except ImportError:  # the older name of the package
    try:
        import pytorch_lightning as pl  # type: ignore[no-redef]
    except ImportError as error:
        raise ImportError("secorder.integrations.lightning needs Lightning: pip install secorder[lightning]") from error

__all__ = ["CurvatureCallback"]


class CurvatureCallback(pl.Callback):
    """Attaches a probe while ``Trainer.fit`` runs, and logs to the trainer's TensorBoard logger.

    Args:
        module: dotted name of the submodule whose call is one batch (``"net"`` where ``training_step`` calls
            ``self.net(x)``); ``""`` for the LightningModule itself (``self(x)``).
        layer_types: as for :class:`secorder.CurvatureProbe`.
        layers: as for :class:`secorder.CurvatureProbe`.
        reduction: as for :class:`secorder.CurvatureProbe`.
        every: log the Fisher at each ``every``-th batch.
        hessian_every: measure and log the Hessian at each ``hessian_every``-th batch; never by default.
        loss_fn: the loss of the Hessian.
        batch: ``(inputs, targets)`` that the Hessian is measured on.
        probe_options: further arguments of :class:`secorder.CurvatureProbe`.

    Attributes:
        probe: the probe, from ``on_fit_start`` on; its numbers stay readable after training.

    Raises:
        InvalidArgumentError: the trainer has no logger with SummaryWriter's methods, at ``on_fit_start``.

    Example:
        >>> from secorder.integrations.lightning import CurvatureCallback  # doctest: +SKIP
        >>> trainer = Trainer(callbacks=[CurvatureCallback(every=50)])  # doctest: +SKIP
    """

    probe: CurvatureProbe | None

    def __init__(
        self,
        module: str = "",
        layer_types: LayerTypes = None,
        *,
        layers: str | Iterable[str] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        every: int = 10,
        hessian_every: int | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        batch: tuple[Any, Any] | None = None,
        **probe_options: Any,
    ) -> None:
        self._module = module
        self._probe_arguments = {"layer_types": layer_types, "layers": layers, "reduction": reduction, **probe_options}
        self._schedule: dict[str, Any] = {
            "every": every,
            "hessian_every": hessian_every,
            "loss_fn": loss_fn,
            "batch": batch,
        }
        self.probe = None
        self._recorder: CurvatureRecorder | None = None

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Attach the probe."""
        experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
        writer = next((e for e in experiments if hasattr(e, "add_histogram_raw")), None)
        if writer is None:
            raise InvalidArgumentError(
                "CurvatureCallback logs to TensorBoard: pass Trainer(logger=TensorBoardLogger(...))."
            )
        model: nn.Module = pl_module.get_submodule(self._module)
        scale = 1.0 / trainer.accumulate_grad_batches  # Lightning divides the loss by it
        self.probe = CurvatureProbe(model, **{"loss_scale": scale, **self._probe_arguments})
        self._recorder = CurvatureRecorder(self.probe, writer, **self._schedule)

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what is due."""
        if self._recorder is not None:
            self._recorder.step(trainer.global_step)

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Detach the probe, also after an exception."""
        self._detach()

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Detach the probe."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """What the probe accumulated goes into Lightning's checkpoints."""
        return {} if self.probe is None else self.probe.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint holds, once the probe is attached."""
        if self.probe is not None and state_dict:
            self.probe.load_state_dict(state_dict)

    def _detach(self) -> None:
        if self.probe is not None:
            self.probe.detach()
        self._recorder = None
