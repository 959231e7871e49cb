"""The Lightning callback, in real trainings."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from secorder import CurvatureWarning, InvalidArgumentError, InvalidTypeError

from ..helpers import make, run_ranks
from ..reference import assert_all_close, fisher_by_sample

pl = pytest.importorskip("lightning.pytorch")

from secorder.integrations.lightning import CurvatureCallback  # noqa: E402


class Model(pl.LightningModule):  # type: ignore[name-defined, misc]
    """A classifier that calls its net, with a learning rate of zero, so that the reference is that of one model."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__()
        self.net, self.lr = make(), lr

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Calling(Model):
    """Is called itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Parts(Model):
    """Calls two modules after another."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net[2](self.net[1](self.net[0](batch[0]))), batch[1])


class Manual(Model):
    """Steps by itself, with half of the loss each time, and returns what it likes."""

    def __init__(self, returned: Any) -> None:
        super().__init__()
        self.automatic_optimization, self.returned = False, returned

    def training_step(self, batch: Any, index: int) -> Any:
        self.manual_backward(super().training_step(batch, index) / 2)
        if index % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return self.returned


@pytest.fixture
def data() -> TensorDataset:
    torch.set_default_dtype(torch.float32)
    return TensorDataset(torch.randn(16, 4), torch.randint(3, (16,)))


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    quiet: dict[str, Any] = dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False)
    given = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu", **quiet, **options}
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **given)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(tmp_path: Path, data: TensorDataset, accumulate: int) -> None:
    loader = DataLoader(data, batch_size=4)
    callback = CurvatureCallback(
        "net", log_every=1, norms_every=1, hessian_every=2, loss_fn=F.cross_entropy, batch=data[:4], on_finding=print
    )
    model = Model()
    logger = pl.loggers.TensorBoardLogger(str(tmp_path))
    trainer(tmp_path, callback, logger=logger, accumulate_grad_batches=accumulate).fit(model, loader, loader)
    assert callback.probe is not None
    assert callback.recorder is not None
    assert not callback.probe.attached
    assert callback.probe.num_samples == 16
    expected = fisher_by_sample(model.net, F.cross_entropy, *data.tensors, 16)
    assert_all_close(callback.probe.fisher_diagonal().by_parameter(), expected, 1e-5)
    history = callback.recorder.history.to_dict()
    assert history["step"] == list(range(1, 4 // accumulate + 1))  # one point a step
    whole = F.cross_entropy(model.net(data.tensors[0]), data.tensors[1]).item()
    assert sum(history["model/loss"]) / len(history["step"]) == pytest.approx(whole, rel=1e-5)
    log = EventAccumulator(logger.log_dir)
    log.Reload()
    assert {"fisher_mean/0", "hessian_trace/2", "gradient_norm/0"} <= set(log.Tags()["scalars"])


@pytest.mark.parametrize(("kind", "samples"), [(Model, 12), (Calling, 16)])
def test_what_is_called_is_found(tmp_path: Path, data: TensorDataset, kind: type, samples: int) -> None:
    """Without a word and without a logger; the batch that told it is not recorded where another module is called."""
    callback = CurvatureCallback(every=1, log_every=1)
    model = kind()
    trainer(tmp_path, callback).fit(model, DataLoader(data, batch_size=4))
    assert callback.probe is not None
    assert callback.recorder is not None
    assert callback.probe.num_samples == samples
    expected = fisher_by_sample(model.net, F.cross_entropy, *(t[-samples:] for t in data.tensors), samples)
    found = {name.removeprefix("net."): x for name, x in callback.probe.fisher_diagonal().by_parameter().items()}
    assert_all_close(found, expected, 1e-5)
    assert len(callback.recorder.history.points("fisher_trace")) == samples // 4
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("returned", "losses"), [(None, 0), ({"loss": torch.tensor(0.5)}, 2)])
def test_manual_optimization(tmp_path: Path, data: TensorDataset, returned: Any, losses: int) -> None:
    callback = CurvatureCallback("net", log_every=1, loss_scale=0.5)
    model = Manual(returned)
    trainer(tmp_path, callback).fit(model, DataLoader(data, batch_size=4))
    assert callback.probe is not None
    assert callback.recorder is not None
    expected = fisher_by_sample(model.net, F.cross_entropy, *data.tensors, 16)
    assert_all_close(callback.probe.fisher_diagonal().by_parameter(), expected, 1e-5)
    assert callback.recorder.history.to_dict().get("model/loss", []) == [0.5] * losses


def test_a_module_that_is_not_called_is_told(tmp_path: Path, data: TensorDataset) -> None:
    """The LightningModule itself, where ``training_step`` calls a part of it."""
    with pytest.warns(CurvatureWarning, match="no batch went through the probe's model in 2 steps"):
        trainer(tmp_path, CurvatureCallback("", log_every=2)).fit(Model(), DataLoader(data, batch_size=8))


def test_several_modules_are_named(tmp_path: Path, data: TensorDataset) -> None:
    with pytest.warns(CurvatureWarning, match=r"calls several modules: 'net\.0', 'net\.1', 'net\.2'"):
        trainer(tmp_path, CurvatureCallback()).fit(Parts(), DataLoader(data, batch_size=8))


def test_a_misspelt_module(tmp_path: Path, data: TensorDataset) -> None:
    with pytest.raises(InvalidArgumentError, match="Model has no module 'nett': it has net"):
        trainer(tmp_path, CurvatureCallback("nett")).fit(Model(), DataLoader(data, batch_size=8))


@pytest.mark.parametrize("options", [{"module": 3}, {"self_log": 3}, {"self_log": ["model/*", 3]}])
def test_names_are_strings(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InvalidTypeError, match=f"{name} must be a string, or hold strings"):
        CurvatureCallback(**options)


def test_every_and_log_every_are_two_things(tmp_path: Path, data: TensorDataset) -> None:
    callback = CurvatureCallback("net", every=2, log_every=4)
    trainer(tmp_path, callback).fit(Model(), DataLoader(data, batch_size=2))
    assert callback.probe is not None
    assert callback.recorder is not None
    assert callback.probe.num_samples == 8
    assert callback.recorder.history.to_dict()["step"] == [4, 8]


def test_early_stopping_and_checkpoints_by_curvature(tmp_path: Path, data: TensorDataset) -> None:
    stopping = pl.callbacks.EarlyStopping("model/fisher_trace", patience=1, check_on_train_epoch_end=True)
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor="fisher_trace/0", save_on_train_epoch_end=True)
    callback = CurvatureCallback("net", log_every=4, self_log=("model/*", "fisher_trace/0"))
    logger = pl.loggers.CSVLogger(str(tmp_path))
    options: dict[str, Any] = {"max_epochs": 20, "enable_checkpointing": True, "logger": logger}
    made = trainer(tmp_path, callback, stopping, best, **options)
    made.fit(Model(), DataLoader(data, batch_size=4))
    assert made.current_epoch == 2  # the model does not change
    assert callback.recorder is not None
    trace = callback.recorder.history.to_dict()["fisher_trace/0"][-1]
    assert float(best.best_model_score) == pytest.approx(trace, rel=1e-5)
    assert "fisher_trace/0" in Path(logger.log_dir, "metrics.csv").read_text()


@pytest.mark.parametrize("module", ["net", None])
def test_a_run_that_is_resumed_has_everything(tmp_path: Path, data: TensorDataset, module: str | None) -> None:
    def fit(folder: Path, epochs: int, checkpoint: str | None = None) -> CurvatureCallback:
        torch.manual_seed(0)
        callback = CurvatureCallback(module, log_every=3)
        made = trainer(folder, callback, max_epochs=epochs, enable_checkpointing=True)
        made.fit(Model(lr=0.1), DataLoader(data, batch_size=4), ckpt_path=checkpoint)
        made.save_checkpoint(folder / "last.ckpt")
        return callback

    whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "first", 2)
    second = fit(tmp_path / "second", 4, str(tmp_path / "first" / "last.ckpt"))
    assert second.probe is not None
    assert whole.probe is not None
    assert second.probe.num_samples == whole.probe.num_samples == (64 if module else 60)
    for name, diagonal in whole.probe.fisher_diagonal().items():
        assert torch.equal(diagonal, second.probe.fisher_diagonal()[name])
    assert second.recorder is not None
    assert whole.recorder is not None
    assert second.recorder.history.to_dict() == whole.recorder.history.to_dict()


def test_several_callbacks_of_one_trainer(tmp_path: Path, data: TensorDataset) -> None:
    """Each finds its own state in the checkpoint."""
    loader, saved = DataLoader(data, batch_size=4), tmp_path / "two.ckpt"
    for epochs, checkpoint in ((1, None), (2, saved)):
        callbacks = [
            CurvatureCallback("net", **{"log_every": 1}),
            CurvatureCallback("net", accumulate="trace", every=2),
        ]
        fitted = trainer(tmp_path, *callbacks, max_epochs=epochs)
        fitted.fit(Model(), loader, ckpt_path=checkpoint)
        fitted.save_checkpoint(saved)
        found = [callback.probe for callback in callbacks]
        assert [(p.accumulate, p.num_samples) for p in found if p] == [("diagonal", 16 * epochs), ("trace", 8 * epochs)]
    assert CurvatureCallback().state_key == "CurvatureCallback"


def test_layers_of_another_type(tmp_path: Path, data: TensorDataset) -> None:
    callback = CurvatureCallback("net", nn.Linear, layers="2", decay=0.5)
    trainer(tmp_path, callback).fit(Model(), DataLoader(data, batch_size=8))
    assert callback.probe is not None
    assert list(callback.probe.fisher_diagonal()) == ["2"]


@pytest.mark.slow
def test_ranks_log_what_one_process_logs_of_all_samples() -> None:
    run_ranks("lightning", 2)
