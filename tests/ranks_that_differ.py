"""Cases of :mod:`tests.distributed_worker` in which something happens on one rank alone: all must go on alike."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from secorder import AttributionError, CurvatureProbe, ProbeStateError, get_layer_curvature_stats
from secorder.layers.rules import RULES, rule_of
from secorder.means import mean_over_ranks

from .helpers import make, seed
from .reference import assert_all_close, assert_close, fisher_by_sample

__all__ = ["CASES"]


class Scale(nn.Module):
    """A layer with a rule of the user's, which may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 5))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Some(nn.Module):
    """A net of which one layer may see some rows alone, which ones depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        seed()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.some = False

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if self.some:
            return self.c(torch.cat([torch.tanh(self.b(h[1:])), h[:1]]).roll(1, 0))
        return self.c(torch.tanh(self.b(h)))


@contextmanager
def rule_that_may_fail() -> Iterator[None]:
    def scale(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> Mapping[str, Tensor]:
        if module.fails:
            raise RuntimeError("on this rank alone")
        return {"weight": inputs[0] * g}

    rule_of(Scale)(scale)
    try:
        yield
    finally:
        del RULES[Scale]


def sharded(model: nn.Module, ranks: int) -> Any:
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in (*model.children(), model):
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return model


def batches_of(rank: int, ranks: int, count: int) -> tuple[list[tuple[Tensor, Tensor]], Callable[[int], Any]]:
    """This rank's batches, and what all ranks have of one, put together."""
    torch.manual_seed(2)
    every = [[(torch.randn(n, 4), torch.randint(3, (n,))) for n in (6, 5, 4)[:ranks]] for _ in range(count)]
    return [parts[rank] for parts in every], lambda i: tuple(torch.cat(x) for x in zip(*every[i], strict=True))


def check(probe: CurvatureProbe, reference: nn.Module, *batches: Any, but: Any = None) -> None:
    """The probe tells the Fisher of these batches; of some layers, of others."""
    for accumulate_name, held in {"": batches, **(but or {})}.items():
        inputs, targets = (torch.cat(x) for x in zip(*held, strict=True))
        expected = fisher_by_sample(reference, F.cross_entropy, inputs, targets, len(inputs))
        told = tuple(f"{name}." for name in probe.layer_names)
        names = [n for n in expected if n.startswith(accumulate_name) and (accumulate_name or not _of(n, but))]
        names = [n for n in names if n.startswith(told)]
        if probe.accumulate == "diagonal":
            found = {n: x.full_tensor() for n, x in probe.fisher_diagonal().by_parameter().items()}
            assert_all_close({n: found[n] for n in names}, {n: expected[n] for n in names})
            assert all(row["mean"] > 0 for row in get_layer_curvature_stats(probe.fisher_diagonal()).values())
        for layer, trace in probe.fisher_trace().items():
            own = [n for n in names if n.rpartition(".")[0] == layer]
            if own:
                assert_close(torch.tensor(trace.value), sum(expected[n].sum() for n in own))


def _of(name: str, others: Any) -> bool:
    return any(name.startswith(other) for other in others or ())


def weights(rank: int, ranks: int) -> None:
    """Samples that are weighed count on all ranks."""
    (batch,), whole = batches_of(rank, ranks, 1)

    def reduction(x: Tensor) -> Tensor:
        return (x[:, 0] > 0) / len(x)

    for accumulate in ("diagonal", "trace"):
        model = sharded(make(), ranks)
        with CurvatureProbe(model, reduction=reduction, accumulate=accumulate) as probe:
            losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
            (losses * (batch[0][:, 0] > 0)).mean().backward()
        x, y = whole(0)
        kept = x[:, 0] > 0
        assert probe.num_samples == kept.sum()
        check(probe, make(), (x[kept], y[kept]))


def first_batches(rank: int, ranks: int) -> None:
    """A rank begins with nothing, and then with one sample: where samples are is found together."""
    batches, whole = batches_of(rank, ranks, 3)
    cut = [0 if rank == 0 else 9, 1 if rank == 0 else 9, 9]
    for accumulate in ("diagonal", "trace"):
        model = sharded(make(), ranks)
        with CurvatureProbe(model, reduction="sum", accumulate=accumulate) as probe:
            for (x, y), n in zip(batches, cut, strict=True):
                F.cross_entropy(model(x[:n]), y[:n], reduction="sum").backward()
        first = whole(1)
        first = tuple(torch.cat([t[:1], t[6:]]) for t in first)
        check(probe, make(), first, whole(2))


def failures(rank: int, ranks: int) -> None:
    """A function of the user's fails on one rank: the batch is left out by all, of that layer or altogether."""
    batches, whole = batches_of(rank, ranks, 4)
    with rule_that_may_fail():
        for accumulate in ("diagonal", "trace"):
            failing = False

            def reduction(x: Tensor) -> Tensor:
                if failing:  # noqa: B023
                    raise RuntimeError("on this rank alone")
                return torch.full((len(x),), 1 / len(x))

            model = sharded(make(Scale(), nn.Tanh()), ranks)
            with CurvatureProbe(model, layer_types="all", reduction=reduction, accumulate=accumulate) as probe:
                for i, (x, y) in enumerate(batches):
                    failing = i == 1 and rank == 1
                    model[1].fails = i == 2 and rank == 0
                    F.cross_entropy(model(x), y).backward()
            assert model[1].weight.grad is not None
            alone = {"1.": (whole(0), whole(3))}
            check(probe, make(Scale(), nn.Tanh()), whole(0), whole(2), whole(3), but=alone)


def untold_layers(rank: int, ranks: int) -> None:
    """Of one rank's call of a layer it cannot be told where samples are: all leave the batch out of it."""
    batches, whole = batches_of(rank, ranks, 3)
    for accumulate in ("diagonal", "trace"):
        model = sharded(Some(), ranks)
        with CurvatureProbe(model, reduction="mean", accumulate=accumulate, layers="b") as probe:
            for i, (x, y) in enumerate(batches):
                model.some = i == 1 and rank == 1
                F.cross_entropy(model(x), y).backward()
        check(probe, Some(), whole(0), whole(2))


def bad_numbers(rank: int, ranks: int) -> None:
    """Gradients are not finite on one rank, in one layer alone or in all."""
    batches, whole = batches_of(rank, ranks, 3)
    for accumulate in ("diagonal", "trace"):
        model = sharded(make(), ranks)
        with CurvatureProbe(model, reduction="mean", accumulate=accumulate) as probe:
            for i, (x, y) in enumerate(batches):
                handle = model[0].register_forward_hook(_Poison(on=i == 1 and rank == ranks - 1))
                F.cross_entropy(model(x), y).backward()
                handle.remove()
        assert probe.num_skipped == {"0": 1}, probe.num_skipped
        check(probe, make(), whole(0), whole(1), whole(2), but={"0.": (whole(0), whole(2))})


class _Poison:
    """The gradient on a layer's output is nan, and what comes after it as it was."""

    def __init__(self, *, on: bool) -> None:
        self.on = on

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.on and output.requires_grad:
            output.register_hook(lambda g: g * torch.nan)


def penalty(rank: int, ranks: int) -> None:
    """What one rank alone has seen to be wrong is told by none: under DDP after the sums are put together."""
    (batch, _), _ = batches_of(rank, ranks, 2)
    model = make()
    with CurvatureProbe(model, reduction="mean") as probe:
        for _ in range(3):
            outside = model[0].weight.square().sum() if rank == 1 else 0.0
            (F.cross_entropy(model(batch[0]), batch[1]) + outside).backward()
        for _ in range(2):
            probe.synchronize()
            with pytest.raises(AttributionError):
                probe.fisher_diagonal()
        assert list(probe.fisher_diagonal(missing="skip")) == ["2"]
    with CurvatureProbe(model, reduction="mean") as probe:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        if rank == 0:
            probe._fisher.troubles.mark(["2"], "as it happens")
        window = probe.window(synchronize=True)
        assert list(window.fisher_diagonal(missing="skip")) == ["0"]
    dist.barrier()


def strict_audits(rank: int, ranks: int) -> None:
    """An audit that fails on one rank raises on all, where the probe is strict: none waits for it in vain."""
    (batch,), _ = batches_of(rank, ranks, 1)
    model = sharded(make(), ranks)
    with CurvatureProbe(model, reduction="mean", strict=True) as probe:
        probe._fisher.failures.counts[0] += rank == 1
        with pytest.raises(AttributionError, match="layer '0': a part of the gradient comes from outside"):
            F.cross_entropy(model(batch[0]), batch[1]).backward()
    dist.barrier()


class Coupled(nn.Module):
    """Samples influence one another after the last layer, on some ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make()
        self.couples = False

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.net(x)
        return z - z.mean(0) if self.couples else z


def coupled(rank: int, ranks: int) -> None:
    """What couples samples on one rank is refused on all; batch normalisation is told with statistics as they are."""
    ((x, y),), _ = batches_of(rank, ranks, 1)
    model = Coupled()
    for layer in (model.net[0], model.net[2]):
        fully_shard(layer, mesh=init_device_mesh("cpu", (ranks,)))
    model.couples = rank == 0
    with CurvatureProbe(model, reduction="mean") as probe:
        F.cross_entropy(model(x), y).backward()
        with pytest.raises(AttributionError):
            probe.fisher_diagonal()
    normed = sharded(make(nn.BatchNorm1d(5), nn.Tanh()), ranks)
    with CurvatureProbe(normed, layer_types="all", reduction="mean") as probe:
        F.cross_entropy(normed(x), y).backward()
        assert all((diagonal > 0).any() for diagonal in probe.fisher_diagonal().values())


def one_shot(rank: int, ranks: int) -> None:
    """A measurement that raises on one rank raises on all, and the next one goes well."""
    model = make()
    (batch,), whole = batches_of(rank, ranks, 1)

    def fails(outputs: Tensor, targets: Tensor) -> Tensor:
        if rank == 0:
            raise KeyError("on this rank alone")
        return F.cross_entropy(outputs, targets)

    with CurvatureProbe(model) as probe:
        ways: list[Callable[[Any], Any]] = [
            lambda loss_fn: probe.fisher_diagonal(loss_fn, *batch, synchronize=True),
            lambda loss_fn: probe.fisher_diagonal(loss_fn, [batch], synchronize=True),
            lambda loss_fn: mean_over_ranks(lambda: probe.fisher_diagonal(loss_fn, *batch), len(batch[0])),
        ]
        expected = fisher_by_sample(make(), F.cross_entropy, *whole(0), len(whole(0)[0]))
        for way in ways:
            with pytest.raises(
                KeyError if rank == 0 else ProbeStateError, match="this rank" if rank == 0 else "rank 0"
            ):
                way(fails)
            assert_all_close(way(F.cross_entropy).by_parameter(), expected)


CASES = {
    "differ_one_shot": one_shot,
    "differ_coupled": coupled,
    "differ_weights": weights,
    "differ_first_batches": first_batches,
    "differ_failures": failures,
    "differ_untold_layers": untold_layers,
    "differ_bad_numbers": bad_numbers,
    "differ_penalty": penalty,
    "differ_strict_audits": strict_audits,
}
