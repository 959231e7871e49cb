"""The Lightning callback, in a real training."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from secorder import InvalidArgumentError

from ..helpers import make
from ..reference import assert_all_close, fisher_by_sample


def scalars(folder: Path) -> set[str]:
    (events,) = {path.parent for path in folder.rglob("events.*") if "curvature" in str(path) or "version" in str(path)}
    log = EventAccumulator(str(events))
    log.Reload()
    return {tag for tag in log.Tags()["scalars"] if "/" in tag}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning(tmp_path: Path, accumulate: int) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from secorder.integrations.lightning import CurvatureCallback

    torch.set_default_dtype(torch.float32)

    class Model(pl.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = make()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.net(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)  # so that the reference is that of one model

    data = TensorDataset(torch.randn(16, 4), torch.randint(3, (16,)))
    loader = DataLoader(data, batch_size=4)
    callback = CurvatureCallback("net", every=2, hessian_every=4, loss_fn=F.cross_entropy, batch=data[:4])
    model = Model()
    options: dict[str, Any] = {
        "max_epochs": 1,
        "default_root_dir": tmp_path,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accumulate_grad_batches": accumulate,
    }
    logger = pl.loggers.TensorBoardLogger(str(tmp_path))
    trainer = pl.Trainer(logger=logger, callbacks=[callback], **options)
    trainer.fit(model, loader, loader)
    assert callback.probe is not None
    assert not callback.probe.attached
    assert callback.probe.num_samples == 16
    expected = fisher_by_sample(model.net, F.cross_entropy, *data.tensors, 16)
    assert_all_close(callback.probe.fisher_diagonal().by_parameter(), expected, 1e-5)
    assert {"fisher/mean/0", "hessian/trace/2"} <= scalars(tmp_path)

    with pytest.raises(InvalidArgumentError, match="TensorBoardLogger"):
        pl.Trainer(logger=False, callbacks=[CurvatureCallback("net")], **options).fit(model, loader)
