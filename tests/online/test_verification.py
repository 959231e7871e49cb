"""One batch both ways: what a probe was told wrong, in a sentence."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe, Verification, token_weights

from ..helpers import data, make, run_again_where_nothing_tells, step
from ..reference import assert_all_close


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("options", "reduction", "message"),
    [
        ({}, "mean", "are right"),
        ({"reduction": "sum"}, "sum", "are right"),
        ({"reduction": nn.CrossEntropyLoss(reduction="sum")}, "sum", "are right"),
        ({}, "sum", 'a sum: pass reduction="sum"'),
        ({"reduction": "sum"}, "mean", 'a mean: pass reduction="mean"'),
        ({"loss_scale": 0.25}, "mean", "are right"),
    ],
)
def test_the_reduction_is_found_out(options: dict[str, Any], reduction: str, message: str) -> None:
    model, batch = make(), data()
    state = torch.get_rng_state()
    with CurvatureProbe(model, **options) as probe:
        found = probe.verify(lambda f, t: F.cross_entropy(f, t, reduction=reduction), *batch)
        assert isinstance(found, Verification)
        assert message in str(found)
        assert bool(found) is ("are right" in message)
        assert probe.num_samples == 0
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("scale", [1 / 4, 3.0])
def test_the_scale_of_gradients_that_training_left_is_found_out(scale: float) -> None:
    model, batch = make(), data()
    with CurvatureProbe(model) as probe:
        step(model, batch, scale)
        before = gradients(model)
        found = probe.verify(F.cross_entropy, *batch)
        assert not found
        assert ("loss_scale=1/4" if scale == 1 / 4 else "loss_scale=3") in found.message
        assert all(torch.equal(a, b) for a, b in zip(gradients(model), before, strict=True))
    with CurvatureProbe(model, loss_scale=scale) as probe:
        assert probe.verify(F.cross_entropy, *batch)


def test_buffers_are_put_back() -> None:
    model, batch = make(nn.BatchNorm1d(5)).eval(), data()
    model[1].train()
    model[1].momentum = 0.5
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with CurvatureProbe(model.eval()) as probe:
        assert probe.verify(F.cross_entropy, *batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_model_and_loss_keep_elsewhere_is_put_back() -> None:
    """A buffer that a forward makes anew, counters and lists, a generator; a loss's centre."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("centre", torch.zeros(2))
            self.calls, self.history = 0, [0]
            self.generator = torch.Generator().manual_seed(1)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(x)
            self.centre = 0.9 * self.centre + output.detach().mean(0)
            self.calls += 1
            self.history.append(self.calls)
            return output + 1e-9 * torch.rand(output.shape, generator=self.generator)

    model, kept = Counting(), {"loss": torch.zeros(())}

    def loss_fn(f: Tensor, t: Tensor) -> Tensor:
        kept["loss"] = F.cross_entropy(f, t)
        return kept["loss"]

    held, generator = (model.centre, kept["loss"]), model.generator.get_state()
    with CurvatureProbe(model, reduction="mean") as probe:
        assert probe.verify(loss_fn, torch.randn(6, 3), torch.arange(6) % 2)
    assert model.centre is held[0]
    assert kept["loss"] is held[1]
    assert not model.centre.any()
    assert (model.calls, model.history) == (0, [0])
    assert torch.equal(model.generator.get_state(), generator)


def test_a_layer_that_differs_says_why() -> None:
    model, (inputs, targets) = make(), data()

    def penalised(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f, t) + 0.1 * model[0].weight.pow(2).sum()

    with CurvatureProbe(model) as probe:
        found = probe.verify(penalised, inputs, targets)
    assert not found
    assert "outside of the layer" in found.differing["0"]
    assert "2" not in found.differing


def test_a_loss_of_another_scale_differs_alike_in_every_layer() -> None:
    model, (inputs, targets) = make(), data()
    per_sample = nn.CrossEntropyLoss(reduction="none")
    with CurvatureProbe(model, reduction="mean") as probe:
        found = probe.verify(lambda f, t: per_sample(f, t).sum() / (len(f) if len(f) == 1 else 2.5), inputs, targets)
    assert not found
    assert found.message.startswith(f"the online Fisher is {(len(inputs) / 2.5) ** 2:.3g} times")
    assert all("times the one-shot one" in reason for reason in found.differing.values())


@run_again_where_nothing_tells
def test_samples_that_the_loss_weights_say_what_to_pass() -> None:
    model, (inputs, targets) = make(), data()
    weighted = nn.CrossEntropyLoss(torch.linspace(0.2, 3.0, 3))
    with CurvatureProbe(model) as probe:
        found = probe.verify(weighted, inputs, targets)
    assert not found
    assert found.differing.keys() == {"0", "2"}
    assert all("such as secorder.token_weights" in reason for reason in found.differing.values())
    assert found.message.count("class weights") == 1


class Tagger(nn.Module):
    """Labels for tokens, some of which are padding; the loss is a mean over the others."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(torch.tanh(self.body(self.embedding(ids)).cumsum(1)))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_token_means_with_padding() -> None:
    """ℓ_n is the mean over the tokens of one sample, and a sample without any has none."""
    torch.manual_seed(0)
    model = Tagger()
    total, count = {name: torch.zeros_like(p) for name, p in model.named_parameters()}, 0
    with CurvatureProbe(model, layers=["body", "head"], reduction=token_weights()) as probe:
        for lengths in ((5, 2, 4, 0), (1, 3, 3, 5)):
            ids, labels = torch.randint(9, (4, 5)), torch.randint(5, (4, 5))
            for n, length in enumerate(lengths):
                labels[n, length:] = -100
            with probe.paused():
                for n, length in enumerate(lengths):
                    if length:
                        loss = model(ids[n : n + 1], labels[n : n + 1])["loss"]
                        grads = torch.autograd.grad(loss, list(model.parameters()))
                        for (name, _), g in zip(model.named_parameters(), grads, strict=True):
                            total[name] += g**2
                        count += 1
            model(ids=ids, labels=labels)["loss"].backward()
        assert probe.num_samples == count == 7
        found = probe.fisher_diagonal().by_parameter()
    assert_all_close(found, {name: value / count for name, value in total.items()})


def test_token_weights_of_several_batches() -> None:
    labels = torch.tensor([[1, -100, 2, 3], [4, 5, -100, -100]])
    assert token_weights()(labels=labels).tolist() == [0.6, 0.4]
    assert token_weights(shift=1)(labels=labels).tolist() == [2 / 3, 1 / 3]
    assert token_weights(0)(labels, num_items_in_batch=10).tolist() == [0.3, 0.2]
    assert token_weights()(labels=torch.tensor([3, -100, 1])).tolist() == [0.5, 0.0, 0.5]
