"""Cases of :mod:`tests.distributed_worker` that log: numbers are of all ranks, the first writes, and nothing waits."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from secorder import CurvatureProbe, CurvatureRecorder

from .reference import assert_close
from .tensor_parallel_worker import MLP_PLAN, mlp

__all__ = ["CASES"]


def file_of_all() -> Path:
    """A file that all ranks know."""
    port = [torch.randint(1 << 30, ()).item()]
    dist.broadcast_object_list(port)
    return Path(gettempdir(), f"recorded-{port[0]}.jsonl")


def train(trained: nn.Module, model: nn.Module, x: Any, y: Any, sink: Any, **options: Any) -> Any:
    """What was logged, and the losses, of a model that trains with a recorder."""
    keywords = {"decay": options.pop("decay", None), "accumulate": options.pop("accumulate", "diagonal")}
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with CurvatureProbe(model, reduction="mean", **keywords) as probe:
        every = {"log_every": 2, "norms_every": 2, "histograms_every": 2}
        with CurvatureRecorder(probe, sink, optimizer=optimizer, **every, **options) as recorder:
            for _ in range(4):
                loss = F.cross_entropy(trained(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                recorder.step(loss=loss)
                losses.append(loss.detach())
        return recorder, torch.stack(losses)


def record(rank: int, ranks: int) -> None:
    """Under DistributedDataParallel, under FSDP2 and in parts: what one process logs of all the samples."""
    torch.manual_seed(3)
    inputs, targets = torch.randn(6 * ranks, 4), torch.randint(3, (6 * ranks,))
    mine = slice(6 * rank, 6 * rank + 6)
    mesh = init_device_mesh("cpu", (ranks,))
    for keywords in ({}, {"decay": 0.9}, {"accumulate": "trace"}):
        single = mlp()
        same, all_losses = train(single, single, inputs, targets, None, **keywords)
        for kind in ("ddp", "fsdp", "parts"):
            model: Any = mlp()
            trained, x, y = model, inputs[mine], targets[mine]
            if kind == "ddp":
                trained = DistributedDataParallel(model)
            elif kind == "fsdp":
                for module in (model[0], model[2], model[4], model):
                    fully_shard(module, mesh=mesh)
            else:
                parallelize_module(model, mesh, MLP_PLAN)
                x, y = inputs, targets
            path = file_of_all()
            # Ranks with parts of layers have the same samples, which are not to be put together.
            recorder, losses = train(trained, model, x, y, str(path), synchronize=kind != "parts", **keywords)
            dist.all_reduce(losses)
            assert_close(losses / ranks, all_losses)
            compare(recorder.history.to_dict(), same.history.to_dict())
            written_once(rank, path)


def compare(points: dict[str, Any], others: dict[str, Any]) -> None:
    """Gradient noise is of the batches of each rank, and so another number; all else is the same."""
    told = {key for key in points if "noise" not in key}
    assert told == {key for key in others if "noise" not in key}, told ^ others.keys()
    for key in told:
        found, expected = (torch.tensor([x or 0.0 for x in table[key]]).double() for table in (points, others))
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1e-9), (key, found, expected)


def lightning(rank: int, ranks: int) -> None:
    """Lightning's own strategies, resumed: what one process logs of all the samples, by the first rank."""
    import lightning as pl
    from lightning.pytorch.strategies import ModelParallelStrategy

    from secorder.integrations.lightning import CurvatureCallback

    class Lit(pl.LightningModule):
        def configure_model(self) -> None:
            self.net = mlp()
            if self.device_mesh is not None:
                for module in (self.net[0], self.net[2], self.net[4], self.net):
                    fully_shard(module, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, _: int) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(3)
    inputs, targets = torch.randn(6 * ranks, 4), torch.randint(3, (6 * ranks,))
    data = torch.utils.data.TensorDataset(inputs, targets)
    loader = torch.utils.data.DataLoader(data, batch_sampler=[list(range(6 * rank, 6 * rank + 6))])
    single = mlp()
    same, _ = train(single, single, inputs, targets, None)
    for kind in ("ddp", "fsdp"):
        path, checkpoint = file_of_all(), None
        for epochs in (3, 4):  # a run that is resumed between two points goes on from what all ranks had
            callback = CurvatureCallback(
                "net", reduction="mean", sinks=str(path), log_every=2, norms_every=2, histograms_every=2
            )
            trainer = pl.Trainer(
                accelerator="cpu", devices=ranks, max_epochs=epochs, logger=False, enable_checkpointing=False,
                strategy="ddp" if kind == "ddp" else ModelParallelStrategy(ranks, 1), use_distributed_sampler=False,
                enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
            )  # fmt: skip
            trainer.fit(Lit(), loader, ckpt_path=checkpoint)
            checkpoint = str(path.with_suffix(f".{kind}"))
            trainer.save_checkpoint(checkpoint)
        assert callback.recorder is not None
        assert callback.probe is not None
        assert callback.probe.num_samples == 4 * 6 * ranks
        tables = callback.recorder.history.to_dict(), same.history.to_dict()
        for table in tables:  # weights of before the last step are in no checkpoint
            for name in [name for name in table if "update_to_weight" in name]:
                assert table.pop(name)[0] > 0
        compare(*tables)
        written_once(rank, path)


class WithLoss(nn.Module):
    """A model that returns its loss, as the trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Any, labels: Any = None) -> Any:
        z = self.net(x)
        return {"loss": F.cross_entropy(z, labels), "logits": z}


def trainer(rank: int, ranks: int) -> None:
    """The Trainer's own strategy: traces are those of all samples, at its points, by the first rank."""
    from transformers import Trainer, TrainingArguments

    from secorder.integrations.huggingface import CurvatureCallback

    torch.manual_seed(3)
    inputs, targets = torch.randn(6 * ranks, 4), torch.randint(3, (6 * ranks,))
    path = file_of_all()
    every = {"log_every": 2, "norms_every": None, "histograms_every": None}
    callback = CurvatureCallback(str(path), reduction="mean", **every)
    options = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "seed": 1}
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, use_cpu=True, per_device_train_batch_size=6, num_train_epochs=4, learning_rate=0.1, optim="sgd",
            lr_scheduler_type="constant", max_grad_norm=0, **options,
        )  # fmt: skip
        data = [{"x": x, "labels": y} for x, y in zip(inputs, targets, strict=True)]
        Trainer(WithLoss(), arguments, train_dataset=data, callbacks=[callback]).train()
    single = mlp()
    same, _ = train(single, single, inputs, targets, None)
    assert callback.recorder is not None
    points, others = callback.recorder.history.to_dict(), same.history.to_dict()
    assert points["step"] == [2, 4]
    for layer in ("0", "2", "4"):
        assert_close(torch.tensor(points[f"fisher_trace/net.{layer}"]), torch.tensor(others[f"fisher_trace/{layer}"]))
    written_once(rank, path)


def written_once(rank: int, path: Path) -> None:
    """The first rank has written each point, and no other has."""
    dist.barrier()
    if rank == 0:
        lines = path.read_text().splitlines()
        assert len(lines) == len(set(lines))
        assert {json.loads(line)["step"] for line in lines} == {2, 4}
        path.unlink()


CASES = {"recorder": record, "lightning": lightning, "trainer": trainer}
