"""A penalty in the loss that is the same for each sample."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe
from secorder.online.reading import unreadable

from ...helpers import Net, data, make
from ...reference import assert_all_close


def l2(model: nn.Module) -> Tensor:
    return sum(p.pow(2).sum() for p in model.parameters()) * 0.05


def expected(model: nn.Module, batches: list[tuple[Tensor, Tensor]], decay: float | None) -> dict[str, Tensor]:
    average, weight = {name: torch.zeros_like(p) for name, p in model.named_parameters()}, 0.0
    for inputs, targets in batches:
        squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for n in range(len(inputs)):
            loss = F.cross_entropy(model(inputs[n : n + 1]), targets[n : n + 1]) + l2(model)
            for (name, _), g in zip(
                model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
            ):
                squares[name] += g**2
        old, new = (1.0, 1.0) if decay is None else (decay, (1 - decay) / len(inputs))
        average = {name: old * average[name] + new * squares[name] for name in average}
        weight = weight + len(inputs) if decay is None else decay * weight + (1 - decay)
    return {name: value / weight for name, value in average.items()}


@pytest.mark.parametrize(
    ("options", "scale"),
    [({}, 1.0), ({"decay": 0.7}, 1.0), ({"loss_scale": 0.25}, 0.25), ({"layers": "0"}, 1.0)],
)
@pytest.mark.parametrize("keep_gradients", [True, False])
def test_it_belongs_to_every_sample(options: dict[str, Any], scale: float, keep_gradients: bool) -> None:
    model, batches = make(), [data(), data(3), data()]
    reference = expected(model, batches, options.get("decay"))
    with CurvatureProbe(model, penalty="shared", reduction="mean", **options) as probe:
        for inputs, targets in batches:
            if not keep_gradients:
                model.zero_grad()
            ((F.cross_entropy(model(inputs), targets) + l2(model)) * scale).backward()
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference)
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_layer_that_nothing_calls_has_the_penalty_alone() -> None:
    net = Net(lambda m, x: m.used(x), used=nn.Linear(4, 3), idle=nn.Linear(4, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with CurvatureProbe(net, penalty="shared") as probe:
        squares, batches = torch.zeros(15), [data(), data(3)]
        for inputs, targets in batches:
            optimizer.zero_grad()
            (F.cross_entropy(net(inputs), targets) + l2(net)).backward()
            squares += len(inputs) * torch.cat([0.1 * p.detach().flatten() for p in net.idle.parameters()]) ** 2
            optimizer.step()
        count = sum(len(targets) for _, targets in batches)
        torch.testing.assert_close(probe.fisher_diagonal()["idle"], squares / count)


def test_a_layer_that_nothing_calls_and_whose_gradient_was_not_cleared_is_refused() -> None:
    """What the penalty added to what was there is not known."""
    net = Net(lambda m, x: m.used(x), used=nn.Linear(4, 3), idle=nn.Linear(4, 3))
    with CurvatureProbe(net, penalty="shared") as probe:
        for inputs, targets in (data(), data()):
            (F.cross_entropy(net(inputs), targets) + l2(net)).backward()
        assert set(unreadable(probe._fisher)) == {"idle"}


def test_without_being_told_it_is_refused() -> None:
    model, (inputs, targets) = make(), data()
    with CurvatureProbe(model) as probe:
        (F.cross_entropy(model(inputs), targets) + l2(model)).backward()
        with pytest.raises(AttributionError, match="penalty"):
            probe.fisher_diagonal()


def test_several_forwards_are_refused() -> None:
    model, (inputs, targets) = make(), data()
    with CurvatureProbe(model, penalty="shared", forwards="separate") as probe:
        (F.cross_entropy(model(inputs), targets) + F.cross_entropy(model(-inputs), targets) + l2(model)).backward()
        with pytest.raises(AttributionError, match="one forward"):
            probe.fisher_diagonal()
