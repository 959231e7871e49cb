"""Layers whose own calls do not tell are measured by the module around them."""

import random
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe, CurvatureWarning

from ..helpers import Doubled, Net, data, make, reference, run_again_where_nothing_tells, step
from ..reference import assert_all_close
from .loops import follow


def test_frozen_layer_without_gradient_is_measured_by_the_module_around_it() -> None:
    model, batch = make(), data()
    model[0].requires_grad_(False)
    probe = CurvatureProbe(model, frozen=True, reduction="mean")
    with pytest.warns(CurvatureWarning, match="layers '0' .*exact and slow"):
        step(model, batch)
    step(model, batch)  # warns once
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


class Coarse(nn.Module):
    """Computes in fewer digits than its parameters have, in a function that operations do not tell of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (Doubled.apply(self.weight.float()).T @ x.float().T).T.double()


def test_a_module_that_computes_in_fewer_digits_than_its_parameters_have() -> None:
    model, batch = nn.Sequential(nn.Linear(4, 4), Coarse(), nn.Tanh(), nn.Linear(5, 3)), data(50)
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for _ in range(6):
            step(model, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch), tolerance=1e-6)


class Cell(nn.Module):
    """Returns what it goes on computing with; frozen in part, so that operations do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))
        self.gate = nn.Parameter(torch.randn(5), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = torch.tanh(x @ self.weight)
        output = torch.sin(self.gate * state)
        return state, output.cos(), output


def test_an_output_that_the_module_computes_another_one_from() -> None:
    """The gradient on it holds what comes through the other, which running the module again brings once more."""
    model = Net(lambda m, x: m.head(sum(m.cell(x))), cell=Cell(), head=nn.Linear(5, 3))
    batch = data()
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        step(model, batch)
        fisher = probe.fisher_diagonal()
    assert fisher.info["cell"].measured_by == "rerun"
    assert_all_close(fisher.by_parameter(), reference(model, batch))


class Keeps(Cell):
    """Goes by what it keeps in Python objects or buffers, and changes that with each call."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        self.kept = kept
        self.register_buffer("scale", torch.ones(4))
        self.reset()

    def reset(self) -> None:
        self.calls, self.seen, self.mean, self.state = 0, [1.0], torch.zeros(4), torch.zeros(5)
        self.scale = torch.ones(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = (x + self.mean) * self.scale * sum(self.seen, self.calls)
        found = super().forward(x + self.state[:4])
        if self.kept == "number":
            self.calls += 1
        elif self.kept == "list":
            self.seen.append(2.0)
        elif self.kept == "tensor":
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        elif self.kept == "tensor in place":
            self.mean += x.detach().mean(0)
        elif self.kept == "buffer in place":
            self.scale *= 2.0
        elif self.kept == "buffer":
            self.scale = 2.0 * self.scale
        elif self.kept == "tensor with a graph":
            self.state = found[0].mean(0)
        return found


KEPT = ["number", "list", "tensor", "tensor in place", "tensor with a graph", "buffer", "buffer in place"]


@pytest.mark.parametrize("kept", KEPT)
def test_a_module_runs_again_with_what_it_kept_at_the_call(kept: str) -> None:
    """And keeps afterwards what the user's own forward has left."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.cell.reset()
        output: Tensor = m.head(sum(m.cell(x)))
        return output

    model = Net(forward, cell=Keeps(kept), head=nn.Linear(5, 3))
    plain, batch = deepcopy(model), data()
    expected = reference(deepcopy(model), batch)
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        step(model, batch)
        fisher = probe.fisher_diagonal()
    step(plain, batch)
    assert fisher.info["cell"].measured_by == "rerun"
    assert_all_close(fisher.by_parameter(), expected)
    assert (model.cell.calls, model.cell.seen) == (plain.cell.calls, plain.cell.seen)
    assert torch.equal(model.cell.mean, plain.cell.mean)
    assert torch.equal(model.cell.state, plain.cell.state)
    assert torch.equal(model.cell.scale, plain.cell.scale)
    assert (model.cell.state.grad_fn is None) == (plain.cell.state.grad_fn is None)


@pytest.mark.parametrize("first", [0, 5], ids=["always", "late"])
@pytest.mark.parametrize("draw", [random.random, numpy.random.rand], ids=["python", "numpy"])
def test_a_model_that_is_run_again_in_one_batch_draws_what_it_drew(draw: Callable[[], float], first: int) -> None:
    """Drawn with Python or NumPy; where no batch has shown that, the first one that would need it is left out."""
    row, now = torch.randn(1, 4), [0]

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden: Tensor = m.first(x)
        if now[0] >= 5:  # a row that all samples share
            hidden = hidden + m.first(row)
        if now[0] >= first:
            hidden = hidden * (1 + draw())
        output: Tensor = m.last(torch.tanh(hidden))
        return output

    model, batches = Net(forward, first=nn.Linear(4, 5), last=nn.Linear(5, 3)), [data() for _ in range(7)]
    left_out = [5] if first == 5 else []

    def seed(*_: Any) -> None:
        random.seed(now[0])
        numpy.random.seed(now[0])

    handle = model.register_forward_pre_hook(seed)  # so that each sample alone meets the number that was drawn
    expected = []
    for now[0] in set(range(7)) - set(left_out):
        expected.append(reference(model, batches[now[0]]))
    handle.remove()
    with CurvatureProbe(model, reduction="mean") as probe:
        for now[0] in range(7):
            seed()
            says = "'first'.* Python's or NumPy's.* This batch is left out"
            with pytest.warns(CurvatureWarning, match=says) if now[0] in left_out else nullcontext():
                step(model, batches[now[0]])
        found = probe.fisher_diagonal().by_parameter()
    for name in ("first.weight", "first.bias"):
        assert_all_close({name: found[name]}, {name: sum(x[name] for x in expected) / len(expected)})


class Pages(nn.Module):
    """Leaves blank pages out, as data tells, before a layer, and returns the loss, or what it computes by, beside."""

    def __init__(self, returned: str, *, put_back: bool = True) -> None:
        super().__init__()
        self.returned, self.put_back = returned, put_back
        self.page, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        kept = x.flatten(1).any(1)
        pages = torch.tanh(self.page(x[kept]))
        mask = kept[:, None, None].expand(-1, x.shape[1], 6)
        states = x.new_zeros(mask.shape).masked_scatter(mask, pages) if self.put_back else pages
        logits = self.head(states.mean(1))
        loss = nn.functional.cross_entropy(logits, y)
        if "penalised" in self.returned:
            loss = loss + pages.square().mean()
        if "decayed" in self.returned:
            loss = loss + self.page.weight.square().sum()
        beside = {"pages": pages, "list": tuple(states.unbind())}
        return {
            "logits": logits,
            **({"loss": loss} if "loss" in self.returned else {}),
            **{name: found for name, found in beside.items() if name in self.returned},
        }


def _pages(model: nn.Module, batch: Any) -> Tensor:
    output = model(*batch)
    return output["loss"] if "loss" in output else nn.functional.cross_entropy(output["logits"], batch[1])


def _of_pages(*counts: int) -> list[Any]:
    return [(torch.randn(n, 5, 4), torch.randint(3, (n,))) for n in counts]


# Of the last batch, the list is of as many as there are samples.
_LISTS = [pytest.param(kind, marks=run_again_where_nothing_tells) for kind in ("list", "loss, list")]


@pytest.mark.parametrize("returned", ["loss", "loss, pages", "pages", *_LISTS])
@pytest.mark.parametrize("put_back", [True, False])
def test_outputs_of_no_samples_beside_those_of_a_model_that_runs_again(returned: str, put_back: bool) -> None:
    """The loss that a model returns, and what it computes its other outputs by, take no part: these tell all."""
    came = follow(Pages(returned, put_back=put_back), _of_pages(3, 4, 3, 3, 3, 5), _pages)
    assert came.exact
    assert came.probe is not None
    assert came.probe.fisher_diagonal().info["page"].measured_by == "rerun"


def test_it_is_not_looked_for_samples_in_each_batch_where_outputs_tell_them() -> None:
    model, calls = Pages("loss, list"), []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    batches = _of_pages(*[3] * 8)
    with CurvatureProbe(model, "all", reduction="mean"):
        for batch in batches[:-1]:
            _pages(model, batch).backward()
        calls.clear()
        _pages(model, batches[-1]).backward()
    assert len(calls) == 1


@pytest.mark.parametrize("returned", ["penalised loss", "penalised loss, pages", "penalised loss, list"])
def test_a_loss_that_is_made_of_more_than_the_other_outputs_is_refused(returned: str) -> None:
    came = follow(Pages(returned), _of_pages(3, 4, 3, 5), _pages)
    assert "page" in came.refused.keys() | came.left_out.keys()


def test_a_penalty_of_weights_in_the_loss_that_a_model_returns() -> None:
    """As AdaLoRA has it: it is said what to do, and what is told then is exact."""
    batches = _of_pages(3, 4, 3, 3, 3, 5)
    model = Pages("decayed loss")
    assert follow(deepcopy(model), batches, _pages, penalty="shared").exact
    with CurvatureProbe(model, "all", reduction="mean") as probe, pytest.warns(CurvatureWarning, match="made of more"):
        _pages(model, batches[0]).backward()
    with pytest.raises(AttributionError, match=r'made of more than the outputs .* pass penalty="shared"'):
        probe.fisher_diagonal()


@pytest.mark.parametrize("penalty", [None, "shared"])
@pytest.mark.parametrize(
    "change",
    [Tensor.clone, Tensor.detach, lambda z: z[:, :1], lambda z: z.softmax(1)],
    ids=["clone", "detach", "slice", "softmax"],
)
def test_a_loss_that_is_made_of_what_the_model_does_not_return_is_no_penalty(
    change: Callable[[Tensor], Tensor], penalty: Any
) -> None:
    class Changed(Pages):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            output = super().forward(x, y)
            return {**output, "logits": change(output["logits"])}

    came = follow(Changed("decayed loss"), _of_pages(3, 4, 3, 5), _pages, penalty=penalty)
    assert "page" in came.refused.keys() | came.left_out.keys()
