"""``DistributedDataParallel`` around a model."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from secorder import AttributionError, CurvatureProbe, per_layer_hessian_diagonal
from secorder._torch.ddp import within_rank
from secorder._torch.graph import tells_recomputation

from ..helpers import data, make, reference, step
from ..reference import assert_all_close


def online(probe: CurvatureProbe) -> dict[str, Tensor]:
    return {name.removeprefix("module."): f for name, f in probe.fisher_diagonal().by_parameter().items()}


def test_inside_of_a_rank_what_is_wrapped_runs_alone(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper, calls = DistributedDataParallel(make()), []
    monkeypatch.setattr(wrapper, "_pre_forward", lambda *a, **k: calls.append(1) or (a, k))
    with within_rank(wrapper.modules()):
        inside = wrapper(data()[0])
        assert not calls
    assert "forward" not in vars(wrapper)
    assert inside.shape == wrapper(data()[0]).shape
    assert calls == [1]


def test_passes_of_our_own_speak_with_no_other_rank(mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may have a batch of one, none at all, or no probe: they would wait for one another for ever."""
    calls = []
    before = DistributedDataParallel._pre_forward
    monkeypatch.setattr(DistributedDataParallel, "_pre_forward", lambda *a, **k: calls.append(1) or before(*a, **k))
    wrapper, batch = DistributedDataParallel(make()), data()
    with CurvatureProbe(wrapper, reduction="mean") as probe:
        for number in range(1, 4):
            step(wrapper, batch)
            assert len(calls) == number
        probe.fisher_diagonal(F.cross_entropy, *batch)
        found = per_layer_hessian_diagonal(wrapper, F.cross_entropy, *batch)
        assert len(calls) == 3
        assert_all_close(online(probe), reference(make(), batch))
    assert torch.equal(found["module.0"], per_layer_hessian_diagonal(make(), F.cross_entropy, *batch)["0"])


@pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")
@pytest.mark.parametrize("options", [{"static_graph": True}, {"find_unused_parameters": True}], ids=str)
@pytest.mark.parametrize("attached", ["inner", "wrapper"])
def test_what_a_wrapper_hands_on_hides_nothing_of_the_loss(mesh: Any, options: Any, attached: str) -> None:
    model, batch = make(), data()
    wrapper = DistributedDataParallel(model, **options)
    probed: nn.Module = model if attached == "inner" else wrapper
    with CurvatureProbe(probed, reduction="mean") as probe:
        F.cross_entropy(wrapper(batch[0]), batch[1]).backward()
        assert_all_close(online(probe), reference(make(), batch))
    with CurvatureProbe(probed, reduction="mean") as probe:
        F.cross_entropy(wrapper(batch[0]), batch[1]).square().backward()
        with pytest.raises(AttributionError, match="the loss couples the samples"):
            probe.fisher_diagonal()
    with CurvatureProbe(probed, reduction="sum") as probe:
        F.cross_entropy(wrapper(batch[0]), batch[1]).backward()
        with pytest.raises(AttributionError, match='reduction="mean"'):
            probe.fisher_diagonal()


def test_what_is_replicated_by_its_first_call_is_so_by_the_users_own(mesh: Any) -> None:
    from torch.distributed._composable.replicate import replicate

    model, batch, gradients = replicate(make()), data(), []
    replicate.state(model)._comm_hook_args.append(((None, lambda _, bucket: _seen(gradients, bucket)), {}))
    with CurvatureProbe(model, reduction="mean") as probe:
        for number in range(1, 4):
            step(model, batch)
            assert len(gradients) == number
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(make(), batch))


def _seen(gradients: list[Tensor], bucket: Any) -> torch.futures.Future[Tensor]:
    gradients.append(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
