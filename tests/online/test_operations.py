"""Layers without a rule are measured by the operations that take their parameters."""

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder import AttributionError, CurvatureProbe
from secorder._torch.graph import tells_recomputation
from secorder.online import operations

from ..helpers import (
    Shared,
    data,
    no_warnings,
    reference,
    refused_where_nothing_tells,
    run_again_where_nothing_tells,
    step,
)
from ..reference import assert_all_close, fisher_by_sample


class Words(nn.Module):
    """A table of places and a norm by hand, for sequences of any length; a checkpoint where it is asked for."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(5, 4), nn.Embedding(9, 4)
        self.weight, self.mix = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4, 4))
        self.head, self.reentrant = nn.Linear(4, 3), reentrant

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.weight) @ self.mix

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        x = self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)
        found: Tensor = self.head(x.mean(1))
        return found


def batch(count: int = 5, length: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randint(5, (count, length)), torch.randint(3, (count,))


def measured(probe: CurvatureProbe) -> dict[str, bool]:
    """By layer without a rule, whether it is measured by operations."""
    known: Any = probe._attributions.any_known()
    return {layer.name: layer.by_operations for layer in known.layers if layer.rule is None}


@run_again_where_nothing_tells
def test_a_row_that_all_samples_share_costs_no_run_of_its_own() -> None:
    model, examples = Shared(), data()
    with CurvatureProbe(model, reduction="mean") as probe, no_warnings():
        step(model, examples)
        assert measured(probe) == {"shift": True}
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, examples))


@run_again_where_nothing_tells
def test_batches_of_other_sizes_and_lengths() -> None:
    """Also a batch of one, and one of as many samples as places."""
    model = Words()
    batches = [batch(), batch(4, 7), batch(1, 4), batch(6, 6), batch()]
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for examples in batches:
            step(model, examples)
        assert all(measured(probe).values())
        assert set(measured(probe)) == {"", "places"}
        found = probe.fisher_diagonal().by_parameter()
    count = sum(len(x) for x, _ in batches)
    every = [{k: v * len(b[0]) / count for k, v in reference(model, b).items()} for b in batches]
    assert_all_close(found, {name: sum(one[name] for one in every) for name in every[0]})


@pytest.mark.parametrize("reentrant", [True, pytest.param(False, marks=run_again_where_nothing_tells)])
def test_checkpoints_hide_operations_and_modules_run_again(reentrant: bool) -> None:
    model, examples = Words(reentrant), batch()
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for _ in range(3):
            step(model, examples)
        assert measured(probe) == {"": False, "places": not reentrant}  # whose graph may hold more of any parameter
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, examples))


def test_a_checkpoint_that_comes_later() -> None:
    model, examples = Words(), batch()
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for reentrant in (None, None, None, False, False, True, None):
            model.reentrant = reentrant
            step(model, examples)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, examples))


def test_gradients_are_what_they_are_without_a_probe() -> None:
    model, (x, y) = Words(), batch()
    step(model, (x, y))
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    with CurvatureProbe(model, "all", reduction="mean"):
        for _ in range(3):
            model.zero_grad()
            step(model, (x, y))
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


def test_a_use_in_the_loss_is_told() -> None:
    model, (x, y) = Words(), batch()
    with CurvatureProbe(model, "all", reduction="mean") as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(8):  # audits look at a few layers each
            (F.cross_entropy(model(x), y) + model.weight.pow(2).sum()).backward()
        assert "" in probe._fisher.troubles.marks or int(probe._fisher.failures.counts.sum())


def test_a_graph_without_backward_is_freed() -> None:
    model, (x, y) = Words(), batch()
    with CurvatureProbe(model, "all", reduction="mean"):
        step(model, (x, y))
        output = model(x)
        gone = weakref.ref(output)
        del output
        gc.collect()
        assert gone() is None


@run_again_where_nothing_tells
def test_low_precision_passes_the_audit() -> None:
    model, (x, y) = Words().float(), batch()
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
        assert all(measured(probe).values())
        probe.fisher_diagonal()


class Clamped(nn.Module):
    """A table of places whose scaled rows have their gradient, which is that of all samples, masked."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.sin(self.places)
        if places.requires_grad:
            places.register_hook(lambda g: g * (g.abs() > 0.01))
        found: Tensor = self.head(torch.tanh(x[:, None] + places).mean(1))
        return found


def test_hooks_of_the_model_on_what_is_followed() -> None:
    model, examples = Clamped(), data()
    with CurvatureProbe(model, "all", reduction="mean") as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(model, examples)
        with pytest.raises(AttributionError, match=r"layer ''"):
            probe.fisher_diagonal()
        assert probe.fisher_diagonal(missing="skip").keys() == {"head"}


@run_again_where_nothing_tells
def test_layers_that_are_gone_through_together_have_the_weights_of_the_backward() -> None:
    """An optimizer changes those of the upper layer before the gradient has come to the lower one."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core, self.head = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.core(x)[0].mean(1))
            return found

    model = Net().float()
    examples = torch.randn(5, 6, 3).float(), torch.randint(3, (5,))
    exact = copy.deepcopy(model).double()

    def update(p: Tensor) -> None:
        p.data.mul_(3.0)

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        step(model, examples)
        assert measured(probe) == {"core": True}
        found = {name: value.double() for name, value in probe.fisher_diagonal().by_parameter().items()}
    assert_all_close(found, reference(exact, (examples[0].double(), examples[1])), 1e-4)


def test_a_batch_of_one_sample_that_holds_several_sequences() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core, self.head = nn.LSTM(3, 4, num_layers=2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.core(x.flatten(0, 1))[0].mean(1)
            found: Tensor = self.head(h.unflatten(0, x.shape[:2]).mean(1))
            return found

    model = Net().float()
    exact = copy.deepcopy(model).double()
    batches = [(torch.randn(n, 2, 6, 3).float(), torch.randint(3, (n,))) for n in (4, 1, 1)]
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for examples in batches:
            step(model, examples)
        found = {name: value.double() for name, value in probe.fisher_diagonal().by_parameter().items()}
    every = [{k: len(x) / 6 * v for k, v in reference(exact, (x.double(), y)).items()} for x, y in batches]
    assert_all_close(found, {name: sum(one[name] for one in every) for name in every[0]}, 1e-4)


class Decays(nn.Module):
    """A state space model's rates, which are computed in float32 whatever the model is in."""

    def __init__(self) -> None:
        super().__init__()
        self.log_rates, self.fc = nn.Parameter(torch.rand(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rates = torch.exp(-self.log_rates.float().exp()).to(x.dtype)
        return self.fc(torch.stack([x, x * rates, x * rates**2]).sum(0))


@pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")
def test_what_is_computed_with_fewer_digits_on_the_way_passes_the_audit() -> None:
    model, (x, y) = Decays().double(), data()
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for _ in range(3):
            F.cross_entropy(model(x.double()), y).backward()
        expected = fisher_by_sample(model, F.cross_entropy, x.double(), y, len(x))
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected, 1e-6)  # of float32's digits


class Tied(nn.Module):
    """A language model whose table of words is its last layer, too, that returns its loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.mix = nn.Embedding(5, 4), nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids[:, :-1]) + self.places(torch.arange(ids.shape[1] - 1))
        return F.cross_entropy((torch.tanh(self.mix(x)) @ self.words.weight.t()).transpose(1, 2), ids[:, 1:])


@refused_where_nothing_tells
def test_a_table_that_is_used_twice_for_a_loss_alone_costs_no_run_of_its_own() -> None:
    model = Tied()
    with CurvatureProbe(model, "all", reduction="mean") as probe, no_warnings():
        ids = torch.randint(5, (6, 8))
        model(ids).backward()
        found = probe.fisher_diagonal().by_parameter()
    assert_all_close(found, fisher_by_sample(model, lambda loss, _: loss, ids, None, 6))


@run_again_where_nothing_tells
def test_no_garbage_is_looked_for_while_a_graph_is_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which makes objects by the thousand, and lets go of them."""
    enabled: list[bool] = []
    find = operations.find_uses
    monkeypatch.setattr(operations, "find_uses", lambda *args: enabled.append(gc.isenabled()) or find(*args))
    model = Words()
    with CurvatureProbe(model, "all", reduction="mean"):
        step(model, batch())
    assert enabled
    assert not any(enabled)
    assert gc.isenabled()
