"""Which dimension holds the samples: found, or why not."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.layers.selection import select_layers
from secorder.layers.structure import independent_by_structure, linear_by_structure
from secorder.oneshot.independence import outputs_independent, separating_masks
from secorder.oneshot.isolation import isolate
from secorder.online.samples import hypotheses as samples
from secorder.online.samples.attribution import Attribution
from secorder.online.samples.hypotheses import SampleDim, Separation, Trial
from secorder.online.samples.sample_dimension import Question
from secorder.online.samples.search import attribute

from ...helpers import Net, data, make
from ...reference import assert_all_close, fisher_by_sample


def look(forward: Callable[..., Tensor], *shape: int, dim: SampleDim = None) -> Attribution:
    model = Net(forward, a=nn.Linear(4, 4))
    return attribute(model, select_layers(model), (torch.randn(*shape),), {}, dim)


def over_time(m: nn.Module, x: Tensor) -> Tensor:
    """Steps in dim 0 influence one another."""
    return m.a(x).cumsum(0)


def test_the_dimension_along_which_outputs_do_not_influence_one_another() -> None:
    assert look(over_time, 5, 3, 4).dims == (1,)
    assert look(lambda m, x: m.a(x).cumsum(1), 5, 3, 4).dims == (0,)


def test_two_dimensions_that_would_do_are_told_of() -> None:
    found = look(lambda m, x: m.a(x), 5, 3, 4)
    assert found.dims == (0,)
    assert found.alternative == 1


def test_the_dimension_that_more_outputs_hold_is_taken() -> None:
    """Words and their contexts: one number a word, and one for each of its three contexts."""
    tables = {"a": nn.Embedding(9, 4), "b": nn.Embedding(9, 4)}
    model = Net(lambda m, word, near: (m.a(word).sum(1), (m.a(word)[:, None] * m.b(near)).sum(2)), **tables)
    words = torch.randint(9, (5,)), torch.randint(9, (5, 3))
    found = attribute(model, select_layers(model, "all"), words, {}, None)
    assert found.dims == (0, 0)
    assert found.alternative is None


def test_a_dimension_of_which_nothing_tells_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that starts at zero: nothing refutes the usual dimension, and nothing supports the other one."""
    tried = []

    def separates(trial: Trial, base: Any, masks: Any) -> Separation | None:
        tried.append(trial.hypothesis.dim)
        return samples.separates(trial, base, masks)

    monkeypatch.setattr("secorder.online.samples.sample_dimension.separates", separates)
    model = Net(lambda m, x: m.a(x), a=nn.Linear(4, 4))
    nn.init.zeros_(model.a.weight)
    found = attribute(model, select_layers(model), (torch.randn(8, 3, 4),), {}, None)
    assert found.provisional
    assert found.dims == (0,)
    assert tried == [0, 1]


def test_a_dimension_that_was_told_and_does_not_separate() -> None:
    found = look(over_time, 5, 3, 4, dim=0)
    assert found.coupled
    assert found.separable == 1
    none = look(lambda m, x: m.a(x).cumsum(0).cumsum(1), 5, 3, 4, dim=0)
    assert none.coupled
    assert none.separable is None


def test_arguments_that_are_no_tensors_are_named() -> None:
    model = Net(lambda m, text, scale: m.a(scale * torch.tensor([[float(len(text))] * 4])), a=make()[0])
    found = attribute(model, select_layers(model), ("ab",), {"scale": 2.0}, None)
    assert "called with str, float and no tensor" in found.undecided
    assert "attach the probe to the part of it" in found.undecided


def test_where_nothing_tells_of_the_number_it_is_said() -> None:
    model = Net(lambda m, x, y: m.a(x).sum() + m.a(y).sum(), a=nn.Linear(4, 4))
    found = attribute(model, select_layers(model), (torch.randn(5, 4), torch.randn(7, 4)), {}, None)
    assert "sizes [5, 7]" in found.undecided


def test_a_batch_of_one_cannot_tell() -> None:
    assert look(lambda m, x: m.a(x), 1, 4).provisional


@pytest.mark.parametrize("count", [2, 3, 20])
def test_drawn_trials_change_some_samples_and_keep_others(count: int) -> None:
    for mask in Question.masks(count, 1):
        assert 0 < int(mask.sum()) < count


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_for_any_two_samples_one_is_replaced_without_the_other(count: int) -> None:
    masks = separating_masks(count)
    for n in range(count):
        for m in range(count):
            assert n == m or bool((masks[:, m] & ~masks[:, n]).any())


class Leaks(nn.Module):
    """One sample influences another."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.fc, self.source, self.target = nn.Linear(4, 3), source, target

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.fc(x)
        leak = torch.zeros_like(z)
        leak[self.target] = z[self.source]
        return z + 1e-6 * leak


@pytest.mark.parametrize("pair", [(0, 5), (5, 0), (2, 3)])
def test_one_sample_that_influences_another_is_seen(pair: tuple[int, int]) -> None:
    x, _ = data()
    for model, alone in ((nn.Linear(4, 3), True), (Leaks(*pair), False)):
        with isolate(model, None, []) as isolated:
            assert outputs_independent(isolated, x, len(x), 0) is alone


def test_structure_that_leaves_no_doubt() -> None:
    chain = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3), nn.Tanh())
    assert not independent_by_structure(chain)
    chain.eval()
    assert independent_by_structure(chain)
    assert not independent_by_structure(chain, sample_dim=1)
    assert not linear_by_structure(chain, chain[0])
    assert linear_by_structure(chain[:5], chain[0])
    chain[4].register_forward_hook(lambda *_: None)
    assert not independent_by_structure(chain)


def test_a_net_that_is_dead_at_first_has_its_samples_in_the_usual_dimension() -> None:
    """One entry that comes alive when columns are changed is no evidence that columns are samples."""
    torch.manual_seed(0)
    model = nn.Sequential(*(m for a, b in ((2, 1), (1, 2), (2, 2)) for m in (nn.Linear(a, b, bias=False), nn.ReLU())))
    model, inputs, targets = model.double(), torch.randn(3, 2).double(), torch.randn(3, 2).double()
    with CurvatureProbe(model, reduction="mean") as probe:
        F.mse_loss(model(inputs), targets).backward()
        probe.reset()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.abs_()
        inputs = inputs.abs()
        F.mse_loss(model(inputs), targets).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = probe.fisher_diagonal().by_parameter()
    assert_all_close(found, fisher_by_sample(model, F.mse_loss, inputs, targets, 3))


class Experts(nn.Module):
    """Tokens go to one of two experts, each of which drops some of what it makes of those that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gate", torch.randn(4, 2))
        self.weight = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen = (rows @ self.gate).argmax(1)
        out = torch.zeros_like(rows)
        for number in range(2):
            ids = (chosen == number).nonzero().flatten()
            made = F.dropout(torch.tanh(rows[ids] @ self.weight[number]), 0.4, self.training)
            out = out.index_add(0, ids, made)
        return out.view(x.shape)


def with_experts(mixed: Callable[[Tensor], Tensor] = lambda h: h) -> nn.Module:
    parts = {"a": nn.Linear(4, 4), "experts": Experts(), "b": nn.Linear(4, 3)}
    return Net(lambda m, x: m.b(m.experts(mixed(m.a(x))).mean(1)), **parts)


def test_experts_that_drop_some_of_what_they_make() -> None:
    """How many tokens an expert gets, and so how many numbers are drawn, goes by data: others get others then."""
    torch.manual_seed(0)
    model, count = with_experts(), 0
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for size in (3, 4, 5, 6):
            x, y = torch.randn(size, 5, 4), torch.randint(3, (size,))
            state = torch.get_rng_state()
            F.cross_entropy(model(x), y).backward()
            torch.set_rng_state(state)
            with probe.paused():
                losses = F.cross_entropy(model(x), y, reduction="none")
            for loss in losses:
                own = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
                for name, g in zip(total, own, strict=True):
                    total[name] += g**2
            count += size
        found = probe.fisher_diagonal().by_parameter()
    assert found.keys() == total.keys()
    for name, g in total.items():
        torch.testing.assert_close(found[name], g / count, rtol=1e-10, atol=1e-16)


def test_a_loss_that_a_model_with_such_experts_returns() -> None:
    """Beside outputs of samples: that it is a sum of theirs is seen although changes shift the draws."""
    torch.manual_seed(0)

    def forward(m: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        found = m.inner(x)
        return F.cross_entropy(found, y), found

    model = Net(forward, inner=with_experts())
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for size in (4, 6, 5):
            model(torch.randn(size, 5, 4), torch.randint(3, (size,)))[0].backward()
        assert len(probe.fisher_diagonal()) == 3


@pytest.mark.parametrize(
    "mixed",
    [
        lambda h: h + 0.3 * h.roll(1, 0),
        lambda h: h - h.mean(0).detach(),
        lambda h: h / (1 + h.detach().abs().amax()),
        lambda h: h + h.std(0) * torch.randn_like(h),
        lambda h: h + h.std(0) * torch.empty_like(h).uniform_(-1, 1),
        lambda h: h + h.detach().mean(0) * (torch.rand(h.shape).to(h) - 0.5),
        lambda h: h + h.mean(0) * (F.dropout(torch.ones_like(h)) - 1),
        lambda h: torch.where(torch.rand(len(h), 1, 1) < 0.1, h.mean(0), h),
        lambda h: torch.where(torch.bernoulli(torch.full((len(h), 1, 1), 0.9)).bool(), h, h.mean(0)),
    ],
    ids=["neighbours", "mean", "largest", "noise", "jitter", "centred", "dropped", "seldom", "coins"],
)
def test_samples_that_influence_one_another_beside_such_experts(mixed: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = with_experts(mixed)
    found = attribute(model, select_layers(model), (torch.randn(4, 5, 4),), {})
    assert found.coupled


def test_a_coin_by_which_samples_are_mixed_is_none_that_data_shifts() -> None:
    """With what is expected of it nothing would be mixed."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = F.dropout(m.a(x), 0.1)
        return m.b(torch.where(torch.rand(()) < 0.5, h.roll(1, 0), h).mean(1))

    model = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    found = []
    for seed in range(6):
        torch.manual_seed(seed)
        found.append(attribute(model, select_layers(model), (torch.randn(4, 5, 4),), {}).coupled)
    assert {True, False} == set(found)
