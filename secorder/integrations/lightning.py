"""A callback for Lightning: curvature of the layers of a model that ``Trainer.fit`` trains."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any, Literal

import torch

from .._arguments import require_strings
from .._caution import caution
from .._torch.collectives import has_ranks
from ..errors import InvalidArgumentError
from ..layers.selection import LayerTypes
from ..monitor.names import flat
from ..monitor.recorder import CurvatureRecorder
from ..monitor.training import mean_loss
from ..parallel.fsdp import whole
from ..parallel.spread import is_distributed
from ..probe import CurvatureProbe
from .called import Called
from .options import divided, submodule, told_apart, try_options

try:
    import lightning.pytorch as pl
except ImportError:  # the older name of the package
    try:
        import pytorch_lightning as pl  # type: ignore[no-redef]
    except ImportError as error:
        raise ImportError(f"secorder.integrations.lightning needs it: pip install lightning ({error})") from error

__all__ = ["CurvatureCallback"]


class CurvatureCallback(pl.Callback):
    """Attaches a probe while ``Trainer.fit`` runs, and logs to the trainer's loggers.

    With gradient accumulation a point is one step of the optimizer, whose micro-batches are counted together. What was
    accumulated and logged is in Lightning's checkpoints, and a run that is resumed goes on from it.

    Args:
        module: dotted name of the submodule whose call is one batch (``"net"`` where ``training_step`` calls
            ``self.net(x)``); ``""`` for the LightningModule itself (``self(x)``). By default it is what the first
            training step calls; where that is not the LightningModule itself, or there are several ranks, this first
            batch is not recorded.
        layer_types: as for :class:`secorder.CurvatureProbe`.
        reduction: as for :class:`secorder.CurvatureProbe`.
        sinks: where numbers go, as for :class:`secorder.CurvatureRecorder`; by default all of the trainer's loggers,
            and with ``logger=False`` the ``recorder.history`` alone.
        self_log: patterns of the names that are logged by ``self.log`` too, for ``EarlyStopping`` and
            ``ModelCheckpoint`` to monitor (``"model/fisher_trace"``, ``"fisher_trace/net.0"``).
        options: further keywords of :class:`secorder.CurvatureProbe` (``every=5`` records each fifth batch)
            and of :class:`secorder.CurvatureRecorder` (``log_every``, ``hessian_every``, ``loss_fn`` …).

    Attributes:
        probe: the probe, from ``on_fit_start`` on; its numbers stay readable after training.
        recorder: the recorder, with its history.

    Raises:
        InvalidArgumentError, InvalidTypeError: an option is unknown, or has an unusable value; at ``on_fit_start``, the
            LightningModule has no such module.

    Example:
        >>> from secorder.integrations.lightning import CurvatureCallback  # doctest: +SKIP
        >>> trainer = Trainer(callbacks=[CurvatureCallback(every=5, log_every=50)])  # doctest: +SKIP
    """

    probe: CurvatureProbe | None
    recorder: CurvatureRecorder | None

    def __init__(
        self,
        module: str | None = None,
        layer_types: LayerTypes = None,
        *,
        reduction: Literal["mean", "sum"] = "mean",
        sinks: Any = None,
        self_log: str | Iterable[str] = ("model/*",),
        **options: Any,
    ) -> None:
        of_probe, self._schedule = divided(options)
        self._probe_arguments = {"layer_types": layer_types, "reduction": reduction, **of_probe}
        self._module = module
        try_options(self._probe_arguments, self._schedule, sinks)
        require_strings("module", () if module is None else [module])
        self._found = ""
        self._sinks = sinks
        self._self_log = require_strings("self_log", self_log)
        self.probe = None
        self.recorder = None
        self._called: Called | None = None
        self._active = False
        self._resumed: Mapping[str, Any] = {}
        self._global_step = 0
        self._losses: list[Any] = []
        self._shown: dict[str, float] = {}

    # ---- life

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Attach the probe."""
        self._global_step = trainer.global_step
        module = self._resumed.get("module", self._module) if self._module is None else self._module
        if module is None:
            self._called = Called(pl_module).__enter__()
        if module is not None or trainer.world_size == 1:
            self._attach(trainer, pl_module, module or "", strict=module is not None)

    def _attach(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", module: str, strict: bool = True) -> None:
        """A probe on this module, and what a checkpoint holds of it."""

        def scale() -> float:  # Lightning divides the loss by the number of micro-batches
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            return (1.0 if scaler is None else float(scaler.get_scale())) / trainer.accumulate_grad_batches

        try:
            model = submodule(pl_module, module)
            self.probe = CurvatureProbe(model, **{"loss_scale": scale, **self._probe_arguments})
        except InvalidArgumentError:
            if strict:
                raise
            return  # until it is seen what is called
        self._found = module
        sinks = list(trainer.loggers) if self._sinks is None else self._sinks
        together = {"synchronize": trainer.world_size > 1}
        schedule = {"optimizer": _Optimizers(trainer), **together, **self._schedule}
        self.recorder = CurvatureRecorder(self.probe, sinks if trainer.is_global_zero else None, **schedule)
        self._active = True
        self._go_on()

    def _go_on(self) -> None:
        """Take over what a checkpoint holds of the module that the probe is attached to."""
        if self.probe is not None and self.recorder is not None and self._resumed.get("module") == self._found:
            self.probe.load_state_dict(self._resumed["probe"])
            self.recorder.load_state_dict(self._resumed["recorder"])
        self._resumed = {}

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Go on from a checkpoint: strategies that shard parameters restore it after ``on_fit_start``."""
        self._global_step = trainer.global_step
        module = self._resumed.get("module")
        if module is None or (self._module is not None and self._module != module):
            return
        if self._active and self._found == module:
            if self._called is not None:
                self._called.remove()
                self._called = None
            self._go_on()
        else:
            self._detach()
            self._attach(trainer, pl_module, module)

    def _settle(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """After the first training step: move the probe to the module that was called."""
        assert self._called is not None
        called, self._called = self._called, None
        called.remove()
        if called.names == [""] and self._active:
            return
        self._detach()
        if len(called.names) == 1:
            self._attach(trainer, pl_module, called.names[0])
            return
        names = ", ".join(repr(name) for name in called.names)
        what = f"calls several modules: {names}" if names else "calls no module of the LightningModule"
        caution(
            f"CurvatureCallback records nothing: training_step {what}. Pass the name of the module whose call is one "
            'batch: CurvatureCallback(module="…").'
        )

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Detach the probe, also after an exception."""
        self._detach()

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Detach the probe."""
        self._detach()

    def _detach(self) -> None:
        if self._called is not None:
            self._called.remove()
            self._called = None
        if self.probe is not None and self.probe.attached:
            self.probe.detach()
        if self.recorder is not None:
            self.recorder.close()
        self._active = False

    # ---- steps

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what is due after a step of the optimizer."""
        if self._called is not None:
            self._settle(trainer, pl_module)
        if not self._active or self.recorder is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            self._losses.append(loss.detach() * trainer.accumulate_grad_batches)
        if trainer.global_step != self._global_step:
            self._global_step = trainer.global_step
            mean = sum(self._losses) / len(self._losses) if self._losses else None
            self._losses = []
            self.recorder.step(trainer.global_step, loss=mean)
            self._shown.update(self._monitored(self.recorder))
        for name, value in self._shown.items():
            pl_module.log(name, value, on_step=True, on_epoch=False, logger=False, batch_size=1)

    def _monitored(self, recorder: CurvatureRecorder) -> dict[str, float]:
        last = flat(recorder.history.last(self._global_step))
        return {name: x for name, x in last.items() if any(fnmatch(name, pattern) for pattern in self._self_log)}

    # ---- checkpoints

    @property
    def state_key(self) -> str:
        """What tells the states of several callbacks of one trainer apart: of a generator and a discriminator, say."""
        return super().state_key + told_apart({"module": self._module, **self._probe_arguments})

    def state_dict(self) -> dict[str, Any]:
        """What was accumulated and logged goes into Lightning's checkpoints.

        They hold what the first rank's callback returns: that is of all ranks, each of which must call this.
        """
        if self.probe is None or self.recorder is None:
            return dict(self._resumed)
        recorder = self.recorder.state_dict()
        if has_ranks():
            total, count = recorder["loss"]
            parameters = [p for group in self.probe.layer_parameters.values() for p in group]
            total = torch.tensor(total, dtype=torch.float64, device=parameters[0].device)
            recorder["loss"] = (mean_loss(total, count, together=True) * count if count else 0.0, count)
            if not any(map(is_distributed, parameters)):
                self.probe.synchronize()
        probe = {name: whole(tensor) for name, tensor in self.probe.state_dict().items()}
        return {"module": self._found, "probe": probe, "recorder": recorder}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until the probe is attached."""
        self._resumed = state_dict


class _Optimizers:
    """All groups of parameters of the trainer's optimizers."""

    def __init__(self, trainer: "pl.Trainer") -> None:
        self._trainer = trainer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._trainer.optimizers for group in optimizer.param_groups]
