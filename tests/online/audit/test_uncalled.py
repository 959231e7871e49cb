"""Layers that no recorded forward calls: zero where nothing trains them, refused where something else does."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.online.reading import unreadable

from ...helpers import Net, data


def suspects(probe: CurvatureProbe) -> set[str]:
    return set(unreadable(probe._fisher))


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Agent(nn.Module):
    """The critic is trained by a method that is called in place of the model, and never in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic, self.idle = nn.Linear(4, 3), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.actor(x)

    def get_value(self, x: Tensor) -> Tensor:
        return self.critic(x)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_layer_that_is_trained_by_another_method_is_not_zero(set_to_none: bool, steps: int, kind: Any) -> None:
    model = Agent()
    optimizer = kind(model.parameters(), lr=0.1)
    probe = CurvatureProbe(model, reduction="mean")
    for _ in range(steps):
        for loss in (lambda: classify(model, data()), lambda: model.get_value(data()[0]).square().mean()):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss().backward()
            optimizer.step()
    assert suspects(probe) == {"critic"}
    found = probe.fisher_diagonal(missing="skip")
    assert found.keys() == {"actor", "idle"}
    assert not found["idle"].any()  # which nothing trains
    probe.reset()
    optimizer.zero_grad()
    classify(model, data()).backward()
    assert not suspects(probe)


def test_layers_that_start_late_or_share_a_trained_weight_are_told() -> None:
    """Zero as long as they are not called, whatever the optimizer does to what they share."""
    at = {"step": 0}
    model = Net(
        lambda m, x: m.a(x) + (m.late(x) if at["step"] > 1 else 0),
        a=nn.Linear(4, 3),
        late=nn.Linear(4, 3),
        twin=nn.Linear(4, 3),
    )
    model.twin.weight = model.a.weight
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with CurvatureProbe(model) as probe:
        for at["step"] in range(4):
            optimizer.zero_grad()
            classify(model, data()).backward()
            optimizer.step()
            assert "late" not in suspects(probe)
            assert "twin" not in suspects(probe)


def test_what_was_left_in_grad_before_is_no_training() -> None:
    """A head that was trained before the probe came, and is not called any more."""
    model = Agent()
    model.get_value(data()[0]).sum().backward()
    with CurvatureProbe(model, reduction="mean") as probe:
        for _ in range(3):
            classify(model, data()).backward()
        assert not suspects(probe)
        assert not probe.fisher_diagonal()["critic"].any()
        model.get_value(data()[0]).sum().backward()  # and now it is
        classify(model, data()).backward()
        assert suspects(probe) == {"critic"}
        probe.reset()
        classify(model, data()).backward()
        assert not suspects(probe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["AdamW", "SGD", "by hand"])
def test_weight_decay_alone_is_no_training(kind: str, dtype: torch.dtype) -> None:
    """Of a layer that nothing calls, whose gradient is zero or none."""
    model = Agent().to(dtype)
    optimizers = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}
    optimizer = optimizers.get(kind, torch.optim.SGD)(model.parameters(), lr=0.05, weight_decay=0.1)
    probe = CurvatureProbe(model, reduction="mean")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(20):
        optimizer.zero_grad(set_to_none=kind == "by hand")
        x, t = data()
        F.cross_entropy(model(x.to(dtype)), t).backward()
        optimizer.step()
        with torch.no_grad():
            for p in model.parameters() if kind == "by hand" else ():
                p.mul_(0.99)
    assert not suspects(probe)
    assert not probe.fisher_diagonal()["critic"].any()


@pytest.mark.parametrize(
    "moves",
    [
        lambda m: m.critic.weight.data.lerp_(m.actor.weight.data[:1], 0.01),
        lambda m: m.critic.bias.data.mul_(0.9),  # one number is a multiple of any other
        lambda m: m.critic.weight.data.sub_(1e-4 * torch.randn(1, 4)),
    ],
    ids=["an average", "one number", "a small step"],
)
def test_what_moves_otherwise_is_told_of(moves: Any) -> None:
    model = Agent().float()
    probe = CurvatureProbe(model, reduction="mean")
    for _ in range(2):
        x, t = data()
        F.cross_entropy(model(x.float()), t).backward()
        moves(model)
        model.zero_grad()
    assert suspects(probe) == {"critic"}
