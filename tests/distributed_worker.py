"""Run by torchrun from tests/parallel: compares ranks with what one process gets on all the data."""

import os
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from secorder import CurvatureProbe, get_layer_curvature_stats
from secorder.means import mean_over_ranks

from . import ranks_that_differ, recording_ranks, scaling_ranks, tensor_parallel_worker
from .helpers import make
from .reference import (
    assert_all_close,
    assert_close,
    fisher_by_sample,
    gradients_by_sample,
    hessian_by_element,
    norms_of_layers,
)
from .test_tied import Decoder, language_loss

CASES = ranks_that_differ.CASES | recording_ranks.CASES | scaling_ranks.CASES | tensor_parallel_worker.CASES


def main(case: str) -> None:
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    inputs, targets = torch.randn(24, 4), torch.randint(3, (24,))
    model = make()
    expected = fisher_by_sample(make(), F.cross_entropy, inputs, targets, 24)
    # Uneven: the first rank gets most; with three ranks, the last gets nothing.
    bounds = [0, 16, 24, 24, 24][: ranks + 1]
    mine = slice(bounds[rank], bounds[rank + 1])
    x, t = inputs[mine], targets[mine]
    if case == "online":
        wrapped = DistributedDataParallel(model)
        with CurvatureProbe(model) as probe:
            for part in (slice(0, 3), slice(3, None)):
                with wrapped.no_sync():  # ranks have different numbers of batches
                    if len(x[part]):
                        F.cross_entropy(wrapped(x[part]), t[part]).backward()
                if part.start == 0:
                    probe.synchronize()
            probe.synchronize()
            probe.synchronize()  # changes nothing more
            assert probe.num_samples == 24, probe.num_samples
            assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
    elif case == "other_ranks":  # one process began, as many go on, and one of them ends it
        part = 12 // ranks
        with CurvatureProbe(model) as probe:
            F.cross_entropy(model(inputs[:12]), targets[:12]).backward()
            state = probe.state_dict()
            assert state["header"][-1] == ranks
            state["header"][-1] = 1
            probe.load_state_dict(state)
            assert probe.num_samples == 12
            own = slice(12 + part * rank, 12 + part * rank + part)
            F.cross_entropy(model(inputs[own]), targets[own]).backward()
            probe.synchronize()
            assert probe.num_samples == 24
            assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
    elif case == "windows":  # some ranks have looked at a window of their own before
        with CurvatureProbe(model) as probe:
            for part in (slice(0, 3), slice(3, 5), slice(5, None)):
                if len(x[part]):
                    F.cross_entropy(model(x[part]), t[part]).backward()
                if part.start == 0 and rank == 0:
                    probe.window()
                elif part.start == 3:
                    probe.synchronize()
            window = probe.window(synchronize=True)
            held = 24 - 3  # less what the window of the first rank took out
            assert (window.num_samples, probe.num_samples) == (held, 24), window
            alone = fisher_by_sample(make(), F.cross_entropy, inputs[:3], targets[:3], 3)
            rest = {name: (24 * f - 3 * alone[name]) / held for name, f in expected.items()}
            assert_all_close(window.fisher_diagonal().by_parameter(), rest)
            assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
            probe.synchronize()
            assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
    elif case in ("norms", "norms_sharded"):  # traces and noise, of the batches of all ranks
        size = 24 // ranks
        batches = [(inputs[i * size :][:size], targets[i * size :][:size]) for i in range(ranks)]
        layers = {name: [f"{name}.weight", f"{name}.bias"] for name in ("0", "2")}
        told = [
            norms_of_layers(gradients_by_sample(make(), F.cross_entropy, *batch, size), layers) for batch in batches
        ]
        everything = norms_of_layers(gradients_by_sample(make(), F.cross_entropy, inputs, targets, 24), layers)
        x, t = batches[rank]
        if case == "norms":
            trained: torch.nn.Module = DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (ranks,))
            for layer in (model[0], model[2], model):
                fully_shard(layer, mesh=mesh)
            trained = model
        for accumulate in ("trace", "diagonal"):
            with CurvatureProbe(model, accumulate=accumulate, reduction="mean") as probe:
                for _ in range(2):  # with gradients in .grad at the second
                    F.cross_entropy(trained(x), t).backward()
                    probe.synchronize()
                traces, noise = probe.fisher_trace(), probe.gradient_noise_scale()
                for name in layers:
                    of_all = everything[f"{name}: trace"]
                    assert traces[name].num_samples == 48
                    assert_close(torch.tensor(traces[name].value) ** 2, of_all[0])
                    error = torch.tensor(traces[name].standard_error) ** 2
                    assert_close(error * 47 / 23, of_all[1], 1e-9)  # every sample twice
                    mean = torch.stack([ranked[f"{name}: noise"] for ranked in told]).mean(0)
                    assert_close(torch.tensor([noise[name].squared_norm, noise[name].variance]), mean)
            model.zero_grad()
    elif case == "averaged":  # DDP's averaging of gradients must not enter
        wrapped = DistributedDataParallel(model)
        size = 24 // ranks
        x, t = inputs[rank * size :][:size], targets[rank * size :][:size]
        with CurvatureProbe(model) as probe:
            F.cross_entropy(wrapped(x), t).backward()
            assert_all_close(probe.fisher_diagonal(synchronize=True).by_parameter(), expected)
    elif case == "decay":
        size = 24 // ranks
        x, t = inputs[rank * size :][:size], targets[rank * size :][:size]
        with CurvatureProbe(model, decay=0.9) as probe:
            F.cross_entropy(model(x), t).backward()
            probe.synchronize()
            assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
    elif case == "one_shot":
        size = 24 // ranks
        x, t = inputs[rank * size :][:size], targets[rank * size :][:size]
        probe = CurvatureProbe(model)
        hessian = mean_over_ranks(probe.hessian_diagonal(F.cross_entropy, x, t, method="exact"), len(x))
        assert_all_close(hessian.by_parameter(), hessian_by_element(make(), F.cross_entropy, inputs, targets))
        fisher = probe.fisher_diagonal(F.cross_entropy, x, t, synchronize=True)
        assert_all_close(fisher.by_parameter(), expected)
    elif case == "sharded":
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        bounds = [0, 14, 24] if ranks == 2 else [0, 10, 21, 24]
        x, t = inputs[bounds[rank] : bounds[rank + 1]], targets[bounds[rank] : bounds[rank + 1]]
        # A batch whose ranks have different numbers of samples is one batch of all of them.
        for decay in (None, 0.9):
            with CurvatureProbe(model, decay=decay) as probe:
                for part in (slice(0, 2), slice(2, None)) if decay is None else (slice(None),):
                    F.cross_entropy(model(x[part]), t[part]).backward()
                probe.synchronize()  # changes nothing
                assert probe.num_samples == 24, probe.num_samples
                found = probe.fisher_diagonal()
                for name, placed in found.by_parameter().items():
                    p = model.get_parameter(name)
                    assert placed.placements == p.placements, name
                    assert placed.to_local().shape == p.to_local().shape
                    assert_close(placed.full_tensor(), expected[name])
                state, statistics = probe.state_dict(), get_layer_curvature_stats(found)
                whole = torch.cat([expected["0.weight"].flatten(), expected["0.bias"]])
                assert abs(statistics["0"]["mean"] - whole.mean().item()) < 1e-9
                assert abs(statistics["0"]["max"] - whole.max().item()) < 1e-9
                probe.reset()
                probe.load_state_dict(state)
                assert_close(probe.fisher_diagonal().by_parameter()["0.weight"].full_tensor(), expected["0.weight"])
                bad = x * torch.nan if rank == 0 else x
                F.cross_entropy(model(bad), t).backward()  # left out by all ranks
                assert set(probe.num_skipped.values()) == {1}
                assert probe.num_samples == 24
                hooks = [[*m._forward_hooks, *m._forward_pre_hooks] for m in model.modules()]
                hessian = mean_over_ranks(probe.hessian_diagonal(F.cross_entropy, x, t, method="exact"), len(x))
                assert_all_close(hessian.by_parameter(), hessian_by_element(make(), F.cross_entropy, inputs, targets))
                fisher = probe.fisher_diagonal(F.cross_entropy, x, t, synchronize=True)
                assert_all_close(fisher.by_parameter(), expected)
                assert hooks == [[*m._forward_hooks, *m._forward_pre_hooks] for m in model.modules()]
                assert probe.num_samples == 24
                assert all(hasattr(p, "device_mesh") for p in model.parameters())
    elif case == "sharded_tied":
        torch.manual_seed(0)
        decoder, words = Decoder(bias=True), torch.randint(7, (6, 6))
        x, y = words[:, :-1], words[:, 1:]
        expected = fisher_by_sample(decoder, language_loss, x, y, 6)
        mesh = init_device_mesh("cpu", (ranks,))
        for module in (decoder.body, decoder):
            fully_shard(module, mesh=mesh)
        mine = slice(*([0, 4, 6] if ranks == 2 else [0, 3, 5, 6])[rank : rank + 2])
        for layers in (None, "*"):
            with CurvatureProbe(decoder, layers=layers) as probe:
                language_loss(decoder(x[mine]), y[mine]).backward()
                for name, placed in probe.fisher_diagonal().by_parameter().items():
                    assert_close(placed.full_tensor(), expected[name])
    else:
        for one in [case] if case in CASES else sorted(name for name in CASES if name.startswith(case)):
            CASES[one](rank, ranks)
    print(f"rank {rank} agrees", flush=True)
    leave(ranks)


def leave(ranks: int) -> None:
    """End when all have, by the launcher's store: a rank that leaves early breaks the connections of the others, and
    taking gloo down while they wait for one another now and then hangs."""
    store = dist.distributed_c10d._get_default_store()
    store.add("left", 1)
    while store.add("left", 0) < ranks:
        time.sleep(0.05)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
