"""What modules carry from one forward to the next is given to it, as an argument is."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.online.carried import carried, carried_cut_off

from .loops import follow


class Spiking(nn.Module):
    """A layer without parameters of its own before the state."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
        self.reset()

    def reset(self) -> None:
        self.v: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.v * 0.5 + self.a(x)
        return self.b(torch.sigmoid(self.v))


class InDict(Spiking):
    """Several states, of which earlier ones are kept."""

    def reset(self) -> None:
        self.states: dict[str, list[Tensor]] = {"v": []}

    def forward(self, x: Tensor) -> Tensor:
        self.states["v"].append(self.a(x))
        return self.b(torch.tanh(torch.stack(self.states["v"]).sum(0)))


class InBuffer(Spiking):
    """A state that moves with the model."""

    def reset(self) -> None:
        self.__dict__.pop("v", None)
        self.register_buffer("v", torch.zeros(1), persistent=False)


class Recurrent(Spiking):
    """A layer that is measured by operations."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.GRU(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output, self.v = self.r(x[:, None], self.v if isinstance(self.v, Tensor) else None)
        return self.b(output[:, 0])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", [Spiking, InDict, InBuffer, Recurrent])
def test_a_state_that_a_module_carries_through_a_rollout(kind: type[Spiking], *, last: bool) -> None:
    """Reset for each batch, whose size changes; row n of all forwards is one sample."""

    def loss(m: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        m.reset()
        outputs = [m(x) for x in batch[0].unbind(1)]
        m.reset()
        return F.cross_entropy(outputs[-1] if last else torch.stack(outputs).mean(0), batch[1])

    model = kind().double()
    batches = [(torch.randn(n, 3, 4).double(), torch.randint(3, (n,))) for n in (5, 5, 3, 5)]
    assert follow(model, batches, loss, layer_types="all", forwards="joined").exact


def test_a_look_finds_it_cut_off_and_leaves_it_as_it_was() -> None:
    model = InDict()
    model(torch.randn(2, 4))
    (state,) = carried(model)
    with carried_cut_off(model) as carries:
        assert carries
        (given,) = model.states["v"]
        assert given.is_leaf
        assert given.requires_grad
        assert given.data_ptr() == state.data_ptr()
    assert model.states["v"][0] is state
    model.reset()
    with carried_cut_off(model) as carries:
        assert not carries


def test_what_was_carried_is_not_kept() -> None:
    model = Spiking()
    with CurvatureProbe(model, forwards="joined") as probe:
        for _ in range(3):
            output = model(torch.randn(2, 4))
        state = model.v.grad_fn
        model.reset()
        output.sum().backward()
        del output
        assert probe._attachment is not None
        assert not any(record.carried for record in probe._attachment._running.values())
        assert state.next_functions
