"""All layers are audited at first, and some passes of small ones later: what comes late, or seldom, is caught."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.layers.selection import select_layers
from secorder.online import backward as passes
from secorder.online.audit import audited
from secorder.online.audit.audited import FIRST, SHARE, share_of
from secorder.online.reading import unreadable
from secorder.online.record import Backward, ForwardRecord
from secorder.online.samples.attribution import Attribution

from ...helpers import Net, data, mlp


def train(model: nn.Module, steps: range, *, period: int = 1, penalised: tuple[str, ...] = ()) -> None:
    """Steps of a loss that holds a penalty on these layers at each ``period``-th of them."""
    for step in steps:
        inputs, targets = data()
        loss = F.cross_entropy(model(inputs), targets)
        if step % period == 0:
            loss = loss + 1e-3 * sum(model.get_submodule(name).weight.square().sum() for name in penalised)
        loss.backward()
        model.zero_grad()


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The layers that each backward's audit looks at, of passes that are drawn once each layer was looked at."""
    monkeypatch.setattr(audited, "EACH", FIRST)
    found: list[set[str]] = []
    intact = passes.close

    def close(fisher: object, backward: Backward) -> None:
        found.append(set(backward.audited))
        intact(fisher, backward)  # type: ignore[arg-type]

    monkeypatch.setattr(passes, "close", close)
    return found


def test_all_layers_at_first_and_some_passes_later(looked_at: list[set[str]]) -> None:
    model, before = mlp(), random.getstate()
    probe = CurvatureProbe(model)
    train(model, range(400))
    assert looked_at[:FIRST] == [{"0", "2", "4"}] * FIRST
    assert SHARE / 2 < sum(map(bool, looked_at[FIRST:])) / (400 - FIRST) < 2 * SHARE
    assert random.getstate() == before
    probe.reset()
    train(model, range(FIRST))
    assert looked_at[400:] == looked_at[:FIRST]


def test_a_layer_that_comes_late_is_looked_at_as_often(looked_at: list[set[str]]) -> None:
    """Such as an expert that nobody has asked before."""
    model = Net(lambda m, x: m.a(x) + (m.b(x) if asked else 0), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    with CurvatureProbe(model):
        asked = False
        train(model, range(40))
        asked = True
        train(model, range(40))
    assert looked_at[40 : 40 + FIRST] == [{"a", "b"} if "a" in names else {"b"} for names in looked_at[40 : 40 + FIRST]]
    assert {"b"} in looked_at
    assert not all(looked_at[40 + FIRST :])


@pytest.mark.parametrize(("rows", "width", "share"), [(32, 32, SHARE), (128, 256, SHARE), (128, 2048, 1.0)])
def test_the_more_work_the_larger_the_share_of_the_passes(rows: int, width: int, share: float) -> None:
    layers = select_layers(nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10), nn.LayerNorm(10)))
    record = ForwardRecord(Attribution(), rows, (), verified=False)
    record.layers["0"].calls, record.layers["2"].calls = [((rows, width),)], [((rows, 10),)]
    assert share_of(record, layers) == share


def test_the_more_numbers_are_compared_the_smaller_the_share() -> None:
    """A weight and its bias are one; those of a recurrent layer are one each."""
    shares = []
    for layer in (nn.Linear(512, 512), nn.LSTM(512, 128)):
        record = ForwardRecord(Attribution(), 128, (), verified=False)
        record.layers[""].calls = [((256, 512),)]
        shares.append(share_of(record, select_layers(layer, "all")))
    assert shares[1] == shares[0] / 4
    assert shares[1] > SHARE


def test_a_penalty_at_each_twentieth_step_is_caught_at_the_first_of_them() -> None:
    """In a short run each pass is looked at."""
    model = mlp()
    probe = CurvatureProbe(model)
    train(model, range(1, 21), period=20, penalised=("0", "2", "4"))
    assert unreadable(probe._fisher).keys() == {"0", "2", "4"}


@pytest.mark.parametrize("penalised", [("0", "2", "4"), ("2",)])
def test_a_penalty_that_comes_late_at_each_seventh_step_is_caught(
    penalised: tuple[str, ...], looked_at: list[set[str]]
) -> None:
    """Nothing is read meanwhile; once one pass has failed, all layers of all passes are looked at."""
    model = mlp()
    probe = CurvatureProbe(model)
    train(model, range(1, 100))
    train(model, range(100, 500), period=7, penalised=penalised)
    assert probe._fisher.failures.known
    assert looked_at[-64:] == [{"0", "2", "4"}] * 64
    assert unreadable(probe._fisher).keys() == set(penalised)


def test_what_is_read_brings_all_layers_back(looked_at: list[set[str]]) -> None:
    """Also where a penalty is on one layer first, and on others later."""
    model = mlp()
    probe = CurvatureProbe(model)
    train(model, range(FIRST))
    train(model, range(1), penalised=("2",))
    while "2" not in unreadable(probe._fisher):
        train(model, range(1), penalised=("2",))
    assert len(looked_at) < FIRST + 40
    train(model, range(1), penalised=("0", "4"))
    assert unreadable(probe._fisher).keys() == {"0", "2", "4"}
    probe.reset()
    train(model, range(1))
    assert not unreadable(probe._fisher)


class Chained(nn.Module):
    """More layers than are looked at together, of several positions each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        for layer in self.layers[first:]:
            x = x + torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("firsts", [(0, 0), (0, 5), (5, 0)])
def test_of_several_forwards_all_are_looked_at_or_none(firsts: tuple[int, int]) -> None:
    """One after the other: the backward has left the later one before it comes to the earlier one."""
    model = Chained()
    probe = CurvatureProbe(model, reduction="mean", forwards="separate")
    for _ in range(2 * FIRST):
        model(model(torch.randn(6, 3, 4), firsts[0]), firsts[1]).square().mean((1, 2)).mean().backward()
        model.zero_grad()
    assert not unreadable(probe._fisher)
