"""A case of :mod:`tests.distributed_worker`: what is kept and sent, counted, is what the table of scaling computes."""

import json
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from secorder import CurvatureProbe

from .benchmarks.scaling import Cost, Llama, Net, cost, spread
from .helpers import in_sight_of_modes, seed

__all__ = ["CASES", "EXPECTED", "SMALL"]

#: Of the environment, where what fake processes tell is handed over.
EXPECTED = "EXPECTED_COSTS"
SMALL = Llama("small", 32, 16, 32, 8, 2)
SAMPLES = 4


class Scattered(TorchDispatchMode):
    """Counts the bytes that DTensor's reduce-scatters are given; FSDP2's own go by another operation."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.reduce_scatter_tensor.default:
            self.total += args[0].nbytes
        return func(*args, **(kwargs or {}))


def counted(rank: int, ranks: int) -> None:
    """Of the third step, which takes no look."""
    told = json.loads(os.environ[EXPECTED])
    torch.set_default_dtype(torch.float32)
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "tensor"))
    for accumulate in ("diagonal", "trace"):
        seed()
        model = spread(Net(SMALL), mesh)
        ids = torch.randint(32, (SAMPLES, 6), generator=torch.Generator().manual_seed(mesh.get_local_rank("data")))
        reduced, all_reduce = [0], dist.all_reduce

        def count(tensor: Any, *args: Any, reduced: list[int] = reduced, **kwargs: Any) -> Any:
            reduced[0] += tensor.nbytes
            return all_reduce(tensor, *args, **kwargs)  # noqa: B023

        with (
            CurvatureProbe(model, layer_types="all", reduction="mean", accumulate=accumulate) as probe,  # type: ignore[arg-type]
            pytest.MonkeyPatch.context() as patch,
        ):
            in_sight_of_modes(patch)
            for step in range(3):
                with Scattered() as scattered:
                    reduced[0] = 0
                    if step == 2:
                        patch.setattr(dist, "all_reduce", count)
                    F.cross_entropy(model(ids).mean(1), ids[:, 0]).backward()
            assert probe.num_samples == 3 * 2 * SAMPLES
            expected = cost(probe, SAMPLES)
            found = Cost(expected.kept, scattered.total, reduced[0])
            probe.fisher_trace()  # there is none that could not be told
        assert found == expected, (accumulate, found, expected)
        assert found == Cost(*told[accumulate]), (accumulate, found, told)


CASES = {"scaling": counted}
