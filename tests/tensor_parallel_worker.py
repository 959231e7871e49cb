"""Cases of :mod:`tests.distributed_worker` with layers that lie in parts over the ranks, against one process."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from secorder import AttributionError, CurvatureProbe, InvalidArgumentError, get_layer_curvature_stats

from .helpers import seed
from .reference import (
    assert_all_close,
    assert_close,
    fisher_by_sample,
    gradients_by_sample,
    norms_of_layers,
)

__all__ = ["CASES"]

#: Samples, and what is divided by two, three and four ranks.
N, WIDTH = 12, 12


class Block(nn.Module):
    """Tokens, attention, a feed-forward net and a head, with norms that each rank has whole."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=i != 1) for i in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (-1, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return self.head(x.mean(1))


#: Rows of the table, columns and rows of the matrices lie over the ranks.
PLAN: dict[str, Any] = {
    "table": RowwiseParallel(input_layouts=Replicate()),
    **{name: ColwiseParallel() for name in ("q", "k", "v", "up")},
    **{name: RowwiseParallel() for name in ("out", "down")},
}


def block() -> Block:
    seed()
    return Block()


def mlp() -> nn.Sequential:
    seed()
    return nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 3))


MLP_PLAN: dict[str, Any] = {"0": ColwiseParallel(), "2": RowwiseParallel()}


def batch_of(make: Callable[[], nn.Module], step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(N, 4, generator=generator)
    if make is block:
        inputs = torch.randint(WIDTH, (N, 5), generator=generator)
    return inputs, torch.randint(3, (N,), generator=generator)


def expected_of(make: Callable[[], nn.Module], *batches: tuple[Tensor, Tensor]) -> tuple[dict[str, Any], Any]:
    """The Fisher of all samples, and what norms of layers tell of them and of each batch."""
    inputs, targets = (torch.cat(x) for x in zip(*batches, strict=True))
    fisher = fisher_by_sample(make(), F.cross_entropy, inputs, targets, len(inputs))
    layers: dict[str, list[str]] = {}
    for name in fisher:
        layers.setdefault(name.rpartition(".")[0], []).append(name)

    def norms(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return norms_of_layers(gradients_by_sample(make(), F.cross_entropy, x, y, len(x)), layers)

    traces, noises = norms(inputs, targets), [norms(*batch) for batch in batches]
    return fisher, {
        name: (traces[f"{name}: trace"], torch.stack([one[f"{name}: noise"] for one in noises]).mean(0))
        for name in layers
    }


def whole(found: Any) -> dict[str, Tensor]:
    return {n: x.full_tensor() if hasattr(x, "full_tensor") else x for n, x in found.by_parameter().items()}


def check(probe: CurvatureProbe, expected: tuple[dict[str, Any], Any], samples: int) -> None:
    fisher, norms = expected
    assert probe.num_samples == samples, probe.num_samples
    if probe.accumulate == "diagonal":
        found = probe.fisher_diagonal()
        for name, part in found.by_parameter().items():
            p = probe._model.get_parameter(name)
            assert getattr(part, "placements", None) == getattr(p, "placements", None)
        assert_all_close(whole(found), fisher)
        statistics = get_layer_curvature_stats(found)
        mean = torch.cat([f.flatten() for n, f in fisher.items() if n.rpartition(".")[0] == probe.layer_names[0]])
        assert abs(statistics[probe.layer_names[0]]["mean"] - mean.mean().item()) < 1e-9
    traces = probe.fisher_trace()
    assert set(traces) == set(norms)
    for name, trace in traces.items():
        assert_close(torch.tensor(trace.value) ** 2, norms[name][0][0])
    if probe.accumulate == "trace":
        for name, noise in probe.gradient_noise_scale().items():
            assert_close(torch.tensor([noise.squared_norm, noise.variance]), norms[name][1])


def parallel(make: Callable[[], nn.Module], mesh: Any) -> Any:
    return parallelize_module(make(), mesh, PLAN if make is block else MLP_PLAN)


def alone(rank: int, ranks: int) -> None:
    """Tensor parallelism by itself: all numbers, a state, a reset, batches that are not finite."""
    mesh = init_device_mesh("cpu", (ranks,))
    for make in (mlp, block):
        batches = [batch_of(make, i) for i in range(3)]
        for accumulate in ("diagonal", "trace"):
            model = parallel(make, mesh)
            plain, other = make(), parallel(make, mesh)
            options = {"layer_types": "all", "reduction": "mean", "accumulate": accumulate}
            with CurvatureProbe(model, **options) as probe, CurvatureProbe(other, **options) as second:
                for i, (x, y) in enumerate(batches):
                    loss = F.cross_entropy(model(x), y)
                    loss.backward()
                    own = F.cross_entropy(plain(x), y)
                    own.backward()
                    assert_close(loss.detach(), own.detach())
                    if i == 1:
                        check(probe, expected_of(make, *batches[:2]), 2 * N)
                        saved = io.BytesIO()
                        torch.save(probe.state_dict(), saved)
                        saved.seek(0)
                        second.load_state_dict(torch.load(saved, weights_only=False))
                        check(second, expected_of(make, *batches[:2]), 2 * N)
                for name, p in plain.named_parameters():  # training is as it was
                    g = model.get_parameter(name).grad
                    assert_close(g.full_tensor() if hasattr(g, "full_tensor") else g, p.grad)
                check(probe, expected_of(make, *batches), 3 * N)
                probe.reset()
                assert probe.num_samples == 0
                nothing_finite(model, make, batches)
                poisoned = model.up if make is block else model[0]
                for x, y in batches[:2]:
                    F.cross_entropy(model(x), y).backward()
                handle = poisoned.register_forward_hook(_Poison(rank == 0))
                F.cross_entropy(model(batches[2][0]), batches[2][1]).backward()
                handle.remove()
                name = "up" if make is block else "0"
                assert probe.num_skipped.get(name) == (2 if make is mlp else 1), probe.num_skipped
                trace = expected_of(make, *batches[:2])[1][name][0][0]
                assert_close(torch.tensor(probe.fisher_trace()[name].value) ** 2, trace)
            assert not any(m._forward_hooks and "secorder" in str(m._forward_hooks) for m in model.modules())


def nothing_finite(model: nn.Module, make: Callable[[], nn.Module], batches: Any) -> None:
    """A batch whose output is nan is left out."""
    if make is mlp:
        F.cross_entropy(model(batches[0][0] * torch.nan), batches[0][1]).backward()


class _Poison:
    """The gradient on a layer's output is nan on one rank, where the batch is left out by all."""

    def __init__(self, on: bool) -> None:
        self.on = on

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.on and output.requires_grad:
            output.register_hook(lambda g: g * torch.nan)


def options(rank: int, ranks: int) -> None:
    """Moving averages, sums, weights, layers of one kind alone, columns of a table, and a look at a window."""
    mesh = init_device_mesh("cpu", (ranks,))
    x, y = batch_of(block, 0)
    fisher, _ = expected_of(block, (x, y))
    plan = {**PLAN, "table": ColwiseParallel(output_layouts=Replicate())}
    for chosen in ({"decay": 0.9}, {"reduction": "sum"}, {"reduction": lambda ids: torch.full((N,), 1 / N)}):
        model = parallelize_module(block(), mesh, plan)
        with CurvatureProbe(model, layer_types="all", **chosen) as probe:
            kind = "sum" if chosen.get("reduction") == "sum" else "mean"
            F.cross_entropy(model(x), y, reduction=kind).backward()
            assert_all_close(whole(probe.window().fisher_diagonal()), fisher)
    model = parallel(block, mesh)
    with CurvatureProbe(model, layers=["head", "norm"], reduction="mean") as probe:
        F.cross_entropy(model(x), y).backward()
        found = whole(probe.fisher_diagonal())
        assert_all_close(found, {n: f for n, f in fisher.items() if n in found})
        assert len(found) == 4


def refusals(rank: int, ranks: int) -> None:
    """What is not known is refused in a sentence, and training goes on."""
    mesh = init_device_mesh("cpu", (ranks,))
    x, y = batch_of(block, 0)
    model = parallel(block, mesh)
    probe = CurvatureProbe(model, reduction="mean")
    with pytest.raises(InvalidArgumentError, match="tensor parallelism"):
        probe.hessian_diagonal(F.cross_entropy, x, y)
    with pytest.raises(InvalidArgumentError, match="tensor parallelism"):
        probe.synchronize()
    with pytest.raises(InvalidArgumentError, match="penalty"):
        CurvatureProbe(model, penalty="shared")
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            seed()
            self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.tanh(self.up(self.norm(x))))

    parts = parallelize_module(Parts(), mesh, plan)
    positions = torch.randn(N, 12, 4, generator=torch.Generator().manual_seed(0))
    mine = positions.chunk(ranks, 1)[rank]
    with CurvatureProbe(parts, layer_types="all", reduction="sum") as probe:
        parts(mine).square().sum().backward()
        with pytest.raises(AttributionError, match="lies over the ranks as"):
            probe.fisher_diagonal()
        found = whole(probe.fisher_diagonal(missing="skip"))

    def loss(z: Tensor, _: Any) -> Tensor:
        return z.square().sum()

    expected = fisher_by_sample(Parts(), loss, positions, None, N)
    assert set(found) == {"up.weight", "up.bias", "down.weight", "down.bias"}
    assert_all_close(found, {name: expected[name] for name in found})


def with_data(rank: int, ranks: int) -> None:
    """Two ranks with samples of their own, each of two parts: under FSDP2, and put together by hand."""
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "tensor"))
    mine = slice(0, 7) if mesh.get_local_rank("data") == 0 else slice(7, N)
    for make in (mlp, block):
        batches = [batch_of(make, i) for i in range(2)]
        for accumulate in ("diagonal", "trace"):
            model = parallel(make, mesh["tensor"])
            for module in (*model.children(), model):
                if any(True for _ in module.parameters()):
                    fully_shard(module, mesh=mesh["data"])
            with CurvatureProbe(model, layer_types="all", reduction="mean", accumulate=accumulate) as probe:
                for x, y in batches:
                    F.cross_entropy(model(x[mine]), y[mine]).backward()
                fisher, norms = expected_of(make, *batches)
                if accumulate == "diagonal":
                    assert_all_close(whole(probe.fisher_diagonal()), fisher)
                    state = probe.state_dict()
                    probe.reset()
                    probe.load_state_dict(state)
                for name, trace in probe.fisher_trace().items():
                    assert_close(torch.tensor(trace.value) ** 2, norms[name][0][0])
                assert probe.num_samples == 2 * N
                bad = _Poison(rank == 1)
                handle = (model.down if make is block else model[2]).register_forward_hook(bad)
                F.cross_entropy(model(batches[0][0][mine]), batches[0][1][mine]).backward()
                handle.remove()
                assert probe.num_skipped["down" if make is block else "2"] == 1
    model = parallel(mlp, mesh["tensor"])
    with CurvatureProbe(model, layer_types="all", reduction="mean") as probe:
        x, y = batch_of(mlp, 0)
        F.cross_entropy(model(x[mine]), y[mine]).backward()
        probe.synchronize(mesh.get_group("data"))
        assert_all_close(whole(probe.fisher_diagonal()), expected_of(mlp, (x, y))[0])
    dist.barrier()


CASES = {
    "tensor_parallel": alone,
    "tensor_parallel_options": options,
    "tensor_parallel_refusals": refusals,
    "tensor_parallel_data": with_data,
}
