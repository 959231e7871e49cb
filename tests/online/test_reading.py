"""What was accumulated is told as a mean, or it is said why it is not."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe, NonFiniteError, ProbeStateError
from secorder.online.reading import diagonals, num_samples, num_skipped, unreadable

from ..helpers import Net, data, make, reference
from ..reference import assert_all_close


def test_the_mean_over_all_samples() -> None:
    model, batch = make(), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        assert num_samples(probe._fisher) == len(batch[0])
        assert num_skipped(probe._fisher) == {}
        assert unreadable(probe._fisher) == {}
        assert_all_close(diagonals(probe._fisher).by_parameter(), reference(model, batch))


def test_nothing_seen_raises() -> None:
    with CurvatureProbe(make()) as probe, pytest.raises(ProbeStateError, match="was not called"):
        diagonals(probe._fisher)


@pytest.mark.parametrize("accumulate", ["diagonal", "trace"])
def test_gradients_none_of_which_was_a_number_are_named(accumulate: Any) -> None:
    model, batch = make(), data()
    with CurvatureProbe(model, reduction="mean", accumulate=accumulate) as probe:
        (F.cross_entropy(model(batch[0]), batch[1]) * torch.nan).backward()
        with pytest.raises(ProbeStateError, match="every gradient so far held nan or inf"):
            probe.fisher_trace()


def test_one_layer_of_which_no_gradient_was_a_number() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        z = m.a(x)
        if z.requires_grad:
            z.register_hook(lambda g: g * torch.nan)
        return m.b(z.tanh())

    model, batch = Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3)), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        with pytest.raises(NonFiniteError, match="every gradient of layer 'a' so far held nan or inf"):
            probe.fisher_diagonal()
        assert probe.fisher_diagonal(missing="skip").keys() == {"b"}


def test_layers_that_cannot_be_told_are_raised_for_or_left_out() -> None:
    model, batch = make(), data()
    first = next(module for module in model if isinstance(module, nn.Linear))
    with CurvatureProbe(model, reduction="mean") as probe:
        loss = F.cross_entropy(model(batch[0]), batch[1]) + first.weight.square().sum()
        loss.backward()
        (name,) = unreadable(probe._fisher)
        with pytest.raises(AttributionError, match=f"layer '{name}'"):
            diagonals(probe._fisher)
        told = diagonals(probe._fisher, "skip")
        assert set(told) == set(probe.layer_names) - {name}
        assert all(torch.isfinite(value).all() for value in told.values())


@pytest.mark.parametrize("accumulate", ["diagonal", "trace"])
def test_a_layer_without_samples_is_not_all_that_is_left_to_tell(accumulate: Any) -> None:
    """All that have seen samples are marked, and every batch is left out of the other one."""
    batch, ones = data(), torch.ones(1)
    model = Net(lambda m, x: (m.fc(x), m.scale(ones).sum()), fc=nn.Linear(4, 3), scale=nn.Linear(1, 1))
    with CurvatureProbe(model, reduction="mean", accumulate=accumulate) as probe:
        output, scale = model(batch[0])
        (F.cross_entropy(output * scale, batch[1]) + model.fc.weight.square().sum()).backward()
        for read in (probe.fisher_trace, *[probe.fisher_diagonal] * (accumulate == "diagonal")):
            with pytest.raises(AttributionError, match=r"layer 'fc'.*outside of the layer's calls"):
                read(missing="skip")
