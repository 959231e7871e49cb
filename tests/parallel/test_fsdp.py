"""Parameters that FSDP2 shards over ranks."""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from secorder import AttributionError, CurvatureProbe, InvalidArgumentError, InvalidTypeError, ProbeStateError
from secorder._torch.fsdp import local
from secorder._torch.graph import tells_recomputation
from secorder.layers.selection import ranks_of, select_layers
from secorder.parallel.fsdp import Shard, shard_of_sum, whole
from secorder.parallel.spread import Spread, is_distributed

from ..helpers import data, make, reference, run_ranks, step
from ..reference import assert_all_close


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", ["sharded", "sharded_tied", "norms_sharded"])
def test_ranks_agree_with_one_process(case: str, ranks: int) -> None:
    run_ranks(case, ranks)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[nn.Sequential]:
    """A model that is sharded over this process only."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, mesh = make(), init_device_mesh("cpu", (1,))
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        yield model
    finally:
        dist.destroy_process_group()


def test_a_mixed_precision_policy_is_refused_and_nothing_changed(alone: nn.Sequential) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = make()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with CurvatureProbe(model) as probe:
        hooks = [len(m._forward_hooks) for m in model.modules()]
        with pytest.raises(InvalidArgumentError, match="mixed-precision policy"):
            probe.hessian_diagonal(nn.functional.cross_entropy, *data())
        assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert all(is_distributed(p) for p in model.parameters())


@pytest.mark.parametrize("accumulate", ["diagonal", "trace"])
@pytest.mark.parametrize("policy", [{}, {"reduce_dtype": torch.float32}, {"output_dtype": torch.float32}], ids=str)
def test_training_under_a_mixed_precision_policy(mesh: Any, policy: dict[str, Any], accumulate: Any) -> None:
    """What rounds is no gradient from outside, which is seen all the same."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_default_dtype(torch.float32)
    model = nn.Sequential(nn.Linear(4, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 3))
    batches = [data(16) for _ in range(8)]
    expected = dict.fromkeys(("0", "1", "3"), 0.0)
    for batch in batches:
        for name, squares in reference(model, batch).items():
            expected[name[0]] += float(squares.sum()) / len(batches)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, **policy))
    with CurvatureProbe(model, "all", reduction="mean", accumulate=accumulate) as probe:
        for batch in batches:
            step(model, batch)
        assert {name: trace.value for name, trace in probe.fisher_trace().items()} == pytest.approx(expected, rel=0.03)
        inputs, targets = batches[0]
        (nn.functional.cross_entropy(model(inputs), targets) + model[3].weight.sum()).backward()
        with pytest.raises(AttributionError, match="from outside"):
            probe.fisher_trace()


LOSSES = {
    "the sum of its samples' losses": lambda m, x, y: nn.functional.cross_entropy(m(x), y, reduction="sum").backward(),
    "couples the samples": lambda m, x, y: nn.functional.cross_entropy(m(x), y).square().backward(),
    "is multiplied by 1/2": lambda m, x, y: (nn.functional.cross_entropy(m(x), y) / 2).backward(),
}


@pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")
@pytest.mark.parametrize("reason", LOSSES)
def test_a_loss_that_is_not_as_told_is_seen_of_shards_as_of_whole_parameters(alone: nn.Sequential, reason: str) -> None:
    with CurvatureProbe(alone, reduction="mean") as probe:
        for batch in (data(), data()):
            LOSSES[reason](alone, *batch)
        with pytest.raises(AttributionError, match=reason):
            probe.fisher_diagonal()


@pytest.mark.parametrize("accumulate", ["diagonal", "trace"])
@pytest.mark.parametrize(("each", "again"), [(True, False), (False, False), (True, True), (False, True)])
def test_parameters_that_stay_whole_for_a_while(mesh: Any, each: bool, again: bool, accumulate: Any) -> None:
    """After evaluation, or a backward that is not the step's last one, parameters are there in their shards' places."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model, batch = make(), data()
    for module in (model[0], model[2], model) if each else (model,):
        fully_shard(module, mesh=mesh, reshard_after_forward=again)
    with torch.no_grad():
        model(batch[0])
    for module in model:
        if again and isinstance(module, FSDPModule):
            module.unshard()
    model.unshard()
    assert not is_distributed(model[0].weight)
    with CurvatureProbe(model, reduction="mean", accumulate=accumulate) as probe:
        for last in (False, True, False):
            model.set_reshard_after_backward(last)
            step(model, batch)
            assert is_distributed(model[0].weight) == last
            for loaded in (False, True):
                if loaded:
                    probe.load_state_dict(probe.state_dict())
                if accumulate == "diagonal":
                    assert_all_close(
                        {n: whole(f) for n, f in probe.fisher_diagonal().by_parameter().items()},
                        reference(make(), batch),
                    )
            assert all(trace.value > 0 for trace in probe.fisher_trace().values())
            assert all(is_distributed(p) for group in probe.layer_parameters.values() for p in group)
            if not again:
                with torch.no_grad():
                    model(batch[0])
        probe.reset()
        step(model, batch)
        assert probe.num_samples == len(batch[0])


def test_flattened_parameters_are_refused_by_name(mesh: Any) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with pytest.raises(InvalidTypeError, match="fully_shard"):
        CurvatureProbe(FullyShardedDataParallel(make(), device_id=torch.device("cpu"), use_orig_params=True))


def test_shards_and_sums(alone: nn.Sequential) -> None:
    weight = alone[0].weight
    (layer, _) = select_layers(alone)
    assert (layer.spread, layer.sharded, layer.split) == (Spread((0,), ()), True, False)
    assert not is_distributed(make()[0].weight)
    assert local(weight).shape == (5, 4)
    part = torch.arange(20.0)
    assert torch.equal(shard_of_sum(part, weight, layer.spread), part)
    placed = Shard.of(weight).place(part)
    assert placed.placements == weight.placements
    assert torch.equal(whole(placed), part.view(5, 4))
    ranks = ranks_of(alone, [layer])
    assert ranks is not None
    assert ranks.together([3, 4]) == ranks.largest([3, 4]) == [3, 4]
    assert ranks_of(make(), select_layers(make())) is None


def test_a_whole_life(alone: nn.Sequential) -> None:
    batch = data()
    with CurvatureProbe(alone, reduction="mean") as probe:
        step(alone, batch)
        found, saved = probe.fisher_diagonal(), io.BytesIO()
        torch.save(probe.state_dict(), saved)
    gathered = {name: whole(t) for name, t in found.by_parameter().items()}
    assert_all_close(gathered, reference(make(), batch))
    assert all(torch.equal(a, b) for a, b in zip(found.whole(), found.values(), strict=True))
    assert pickle.loads(pickle.dumps(dict(found))).keys() == found.keys()


def test_what_is_sharded_cannot_be_read_without_the_ranks(
    alone: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, targets = data()
    with CurvatureProbe(alone, reduction="mean") as probe:
        nn.functional.cross_entropy(alone(inputs), targets).backward()
        monkeypatch.setattr(dist, "is_initialized", lambda: False)  # as after destroy_process_group
        for read in (probe.fisher_trace, probe.summary):
            with pytest.raises(ProbeStateError, match="before destroy_process_group"):
                read()
