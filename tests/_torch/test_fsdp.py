"""FSDP2 (``fully_shard``): its modules and its hooks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn

from secorder._torch.fsdp import fsdp_mesh_dims, fsdp_modules, is_fsdp_hook, sharded_by_gathered
from secorder._torch.modules import forward_hooks


@pytest.fixture
def _one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_plain_model_has_none() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_forward_hook(lambda *_: None)
    assert fsdp_modules(model) == []
    assert not any(is_fsdp_hook(hook) for hook in forward_hooks(model))


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.usefixtures("_one_rank")
def test_modules_and_hooks_are_found() -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh)
    model[0].register_forward_hook(lambda *_: None)
    assert fsdp_modules(model) == [model[0]]
    assert fsdp_mesh_dims(model) == {id(p): 1 for p in model[0].parameters()}
    hooks = forward_hooks(model[0])
    assert [is_fsdp_hook(hook) for hook in hooks].count(False) == 1
    assert any(is_fsdp_hook(hook) for hook in hooks)
    sharded, weight = dict(model[0].named_parameters()), model[0].weight
    model[0].unshard()
    assert model[0].weight is not weight
    assert sharded_by_gathered(model) == {id(p): sharded[name] for name, p in model[0].named_parameters()}
