"""Run by torchrun from tests/test_distributed.py: compares ranks with what one process gets on all the data."""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from secorder import CurvatureProbe
from secorder.distributed import weighted_mean

from .reference import assert_all_close, fisher_by_sample, hessian_by_element


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def main(case: str) -> None:
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    inputs, targets = torch.randn(24, 4), torch.randint(3, (24,))
    model = make()
    expected = fisher_by_sample(make(), F.cross_entropy, inputs, targets, 24)
    # Uneven: the first rank gets most; with three ranks, the last gets nothing.
    cuts = [0, 16, 24, 24][: ranks + 1] if ranks == 3 else [0, 16, 24]
    mine = slice(cuts[rank], cuts[rank + 1])
    x, t = inputs[mine], targets[mine]
    if case == "passive":
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
    elif case == "averaged":  # DDP's averaging of gradients must not enter
        wrapped = DistributedDataParallel(model)
        size = 24 // ranks
        x, t = inputs[rank * size :][:size], targets[rank * size :][:size]
        with CurvatureProbe(model) as probe:
            F.cross_entropy(wrapped(x), t).backward()
            probe.synchronize()
            assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
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
        hessian = weighted_mean(probe.hessian_diagonal(F.cross_entropy, x, t), len(x))
        assert_all_close(hessian.by_parameter(), hessian_by_element(make(), F.cross_entropy, inputs, targets))
        fisher = weighted_mean(probe.fisher_diagonal(F.cross_entropy, x, t), len(x))
        assert_all_close(fisher.by_parameter(), expected)
    else:
        raise ValueError(case)
    print(f"rank {rank} agrees", flush=True)
    dist.barrier()  # a rank that leaves early breaks the connections of the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
