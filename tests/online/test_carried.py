"""What modules carry from one forward to the next is given to it, as an argument is."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.online.carried import carried, carried_cut_off

from ..helpers import run_again_where_nothing_tells
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


class Held:
    """A state of the user's own making."""

    def __init__(self) -> None:
        self.v: Any = 0.0


class Slotted:
    """One without a dictionary."""

    __slots__ = ("v",)

    def __init__(self) -> None:
        self.v: Any = 0.0


class InObject(Spiking):
    """The state in an object in a list, which a part of the model holds, too."""

    made: Any = Held

    def reset(self) -> None:
        self.states = [self.made()]
        vars(self.a)["shared"] = self.states

    def forward(self, x: Tensor) -> Tensor:
        state = vars(self.a)["shared"][0]
        state.v = state.v * 0.5 + self.a(x)
        return self.b(torch.sigmoid(self.states[0].v))


class InSlots(InObject):
    """The same in an object with slots."""

    made = Slotted


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
@pytest.mark.parametrize("kind", [Spiking, InDict, InObject, InSlots, InBuffer, Recurrent])
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
        assert not any(record.carried for record in probe._attachment.running.values())
        assert state.next_functions


class Given(nn.Module):
    """A state that comes as an object among the arguments, and is changed there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, states: list[Any]) -> Tensor:
        states[0].v = torch.tanh(states[0].v + self.a(x))
        return self.b(states[0].v)


@pytest.mark.parametrize("kind", [Held, Slotted])
def test_a_state_in_an_object_among_the_arguments(kind: Any) -> None:
    """What a look makes of it is taken back, so that training goes on from the user's."""

    def loss(m: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        states = [kind()]
        return sum((F.cross_entropy(m(x, states), batch[1]) for x in batch[0].unbind(1)), torch.zeros(()))

    model = Given().double()
    batches = [(torch.randn(n, 3, 4).double(), torch.randint(3, (n,))) for n in (5, 3)]
    expected = [loss(model, batch) for batch in batches]
    with CurvatureProbe(model, reduction="mean"):
        assert [loss(model, batch) for batch in batches] == expected
    assert follow(model, batches, loss, forwards="joined").exact


@run_again_where_nothing_tells
def test_what_is_measured_in_different_ways_in_two_forwards_is_left_out() -> None:
    """A cache that the look cannot cut off: the rows of the second forward are those of the first, too."""

    class Cached(Given):
        def forward(self, x: Tensor, states: Any) -> Tensor:
            states.v[0].v = torch.cat([*states.v[0].v, self.a(x)[:, None]], 1) if states.v[0].v else self.a(x)[:, None]
            states.v[0].v = [states.v[0].v]
            return self.b(torch.tanh(states.v[0].v[0]).mean(1))

    def loss(m: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        states = Held()
        states.v = [Held()]
        states.v[0].v = []
        return sum((F.cross_entropy(m(x, states), batch[1]) for x in batch[0].unbind(1)), torch.zeros(()))

    came = follow(Cached().double(), [(torch.randn(5, 3, 4).double(), torch.randint(3, (5,)))], loss, forwards="joined")
    assert came.refused.keys() == {"a"}
    assert any("measured in different ways" in warned for warned in came.warned)
    assert not any("failed" in warned for warned in came.warned)
