"""The losses of samples alone, and whether the batch's is made of them."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import (
    CouplingError,
    CurvatureProbe,
    InvalidArgumentError,
    NonFiniteError,
    per_layer_fisher_diagonal,
)
from secorder._torch import vjp
from secorder._torch.graph import tells_recomputation
from secorder.oneshot import sample_losses
from secorder.oneshot.measurement import Measurement
from secorder.oneshot.sample_losses import BatchLoss, own_gradients, own_losses

from ..benchmarks.memory import peak_memory
from ..helpers import data, make, measured
from ..reference import assert_all_close, fisher_by_sample, ggn_by_sample

WEIGHTS = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


def mine(f: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(f, t)


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), mine, nn.CrossEntropyLoss(reduction="sum")])
def test_losses_of_batches_of_one(loss_fn: Any) -> None:
    model, (x, y) = make(), data()
    found = measured(lambda task: own_losses(task, task.loss()[0]).detach(), model, (x, y), loss_fn)
    assert torch.allclose(found, torch.stack([loss_fn(model(x[n : n + 1]), y[n : n + 1]) for n in range(6)]).detach())


def test_a_loss_that_a_sample_alone_has_not() -> None:
    def standardised(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f, t) / f.std(0).sum()

    with pytest.raises(NonFiniteError, match="sample 0 taken alone"):
        measured(lambda task: own_losses(task, task.loss()[0]), make(), data(), standardised)


def check(task: Measurement) -> bool:
    output, _ = task.loss()
    point = output.detach().requires_grad_()
    batch = BatchLoss(task.loss_again(point, task.targets), [point], point)
    (found,) = own_gradients(task, batch, second_order=True)
    assert found is not None
    assert not batch.loss.requires_grad
    alone = [task.loss_fn(point[n : n + 1], task.targets[n : n + 1]) for n in range(len(point))]
    return torch.allclose(found, torch.autograd.grad(sum(alone), point)[0], rtol=1e-12)


def test_losses_of_samples_pass_and_others_are_told_apart() -> None:
    held = torch.rand(6)

    def weighted(f: Tensor, t: Tensor) -> Tensor:
        return (F.cross_entropy(f, t, reduction="none") * held).mean()

    def centred(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f - f.mean(0).detach(), t)

    assert measured(check, make(), data(), mine)
    assert measured(check, make(), data(), nn.CrossEntropyLoss())
    assert measured(check, make(), data(), nn.CrossEntropyLoss(weight=WEIGHTS))
    with pytest.raises(InvalidArgumentError, match="does not treat the samples of a batch alike"):
        measured(check, make(), data(), weighted)
    with pytest.raises(CouplingError, match="statistic of the batch"):
        measured(check, make(), data(), centred)


def test_a_loss_of_the_users_runs_once_for_all_samples_unless_it_writes() -> None:
    calls = itertools.count()  # which nothing puts back
    heard: list[float] = []

    def plain(f: Tensor, t: Tensor) -> Tensor:
        next(calls)
        return (f.logsumexp(1) - f.gather(1, t[:, None])[:, 0]).mean()

    def writing(f: Tensor, t: Tensor) -> Tensor:
        heard.append(0.0)
        return plain(f, t)

    def deciding(f: Tensor, t: Tensor) -> Tensor:
        return plain(f, t) if f.sum() > -1e9 else f.sum()  # which no vmap runs

    expected = per_layer_fisher_diagonal(make(), F.cross_entropy, *data())
    for loss_fn, most in ((plain, 7), (writing, 11), (deciding, 12)):
        start = next(calls)
        assert_all_close(per_layer_fisher_diagonal(make(), loss_fn, *data()), expected)
        assert next(calls) - start - 1 <= most
        assert not heard


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_that_are_broadcast_couple_the_samples() -> None:
    model, x, y = nn.Linear(4, 1), torch.randn(6, 4), torch.randn(6)
    with pytest.raises(CouplingError, match="statistic of the batch"):
        per_layer_fisher_diagonal(model, F.mse_loss, x, y)


def entropy_by_hand(f: Tensor, t: Tensor) -> Tensor:
    return (f.logsumexp(1) - f.gather(1, t[:, None])[:, 0]).mean()


def squares_by_hand(f: Tensor, t: Tensor) -> Tensor:
    return (f - t).square().mean()


@pytest.mark.parametrize(
    ("loss_fn", "kind", "most"),
    [
        (entropy_by_hand, "empirical", 8),
        (entropy_by_hand, "mc", 10),
        (squares_by_hand, "empirical", 10),  # one of them of targets, which are as large as outputs
        (squares_by_hand, "mc", 12),
    ],
)
def test_wide_outputs_of_a_loss_of_the_users(
    monkeypatch: pytest.MonkeyPatch, loss_fn: Any, kind: Any, most: int
) -> None:
    """How many copies of the outputs are alive at once, with all that the loss keeps for its derivatives."""
    x = torch.randn(16, 1)
    y = torch.randint(5000, (16,)) if loss_fn is entropy_by_hand else torch.randn(16, 5000)
    model = nn.Linear(1, 5000, bias=False)
    monkeypatch.setitem(vjp.CHUNK_BYTES, "cpu", 1)  # as if the outputs were wider still

    with CurvatureProbe(model, reduction="mean") as probe:
        run = lambda: probe.fisher_diagonal(loss_fn, x, y, fisher_type=kind)  # noqa: E731
        run()
        assert peak_memory(run) < (most + 0.3) * 8 * 16 * 5000  # and little things


KINDS: tuple[Any, ...] = ("empirical", "type-2")


def test_samples_of_wide_outputs_are_taken_in_parts_and_the_numbers_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, (x, y) = make(), data()
    whole = {kind: per_layer_fisher_diagonal(model, entropy_by_hand, x, y, fisher_type=kind) for kind in KINDS}
    monkeypatch.setitem(vjp.CHUNK_BYTES, "cpu", 1)
    for kind in KINDS:
        assert_all_close(per_layer_fisher_diagonal(model, entropy_by_hand, x, y, fisher_type=kind), whole[kind])

    def of_the_batch(f: Tensor, t: Tensor) -> Tensor:
        return (f - f.detach().mean(0)).square().mean()

    with pytest.raises(CouplingError, match="statistic of the batch"):
        per_layer_fisher_diagonal(model, of_the_batch, x, y)


@pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")
def test_cross_entropies_of_rows_are_known_by_their_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """First derivatives tell then; of what was passed otherwise, or is another in each sample, nothing is taken."""
    model, (x, y) = make(), data()
    held = y.clone()
    expected = per_layer_fisher_diagonal(model, nn.CrossEntropyLoss(), x, y)
    with monkeypatch.context() as patch:
        patch.setattr(sample_losses, "_require_invariance", None)  # which is not called
        found = per_layer_fisher_diagonal(model, lambda f, t: F.cross_entropy(f[:, :], t), x, y)
    assert_all_close(found, expected)
    with pytest.raises(InvalidArgumentError, match="closure"):
        per_layer_fisher_diagonal(model, lambda f, t: F.cross_entropy(f, held), x, y)
    with pytest.raises((InvalidArgumentError, CouplingError)):
        per_layer_fisher_diagonal(model, lambda f, t: F.cross_entropy(f, held[: len(f)]), x, y)
    with pytest.raises((InvalidArgumentError, CouplingError)):  # labels that a statistic of the batch decides about
        per_layer_fisher_diagonal(
            model, lambda f, t: F.cross_entropy(f, torch.where(f[:, 0] > f[:, 0].mean(), 1, 2)), x, y
        )
    with pytest.raises((InvalidArgumentError, CouplingError)):  # of half of a batch, and of a sample alone
        per_layer_fisher_diagonal(model, lambda f, t: F.cross_entropy(*(v[: (len(v) + 1) // 2] for v in (f, t))), x, y)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fisher_type", ["empirical", "type-2"])
def test_a_loss_of_fewer_digits_than_the_model_s(kind: torch.dtype, fisher_type: Any) -> None:
    """As language models take it; in what it is computed is what rounding it is held to."""

    def criterion(f: Tensor, t: Tensor) -> Tensor:
        return 2 * F.cross_entropy(f.to(kind), t)

    model, batch = make(), data()
    by_samples = fisher_by_sample(model, criterion, *batch, 6)
    expected = by_samples if fisher_type == "empirical" else ggn_by_sample(model, criterion, *batch)
    found = per_layer_fisher_diagonal(model, criterion, *batch, fisher_type=fisher_type).by_parameter()
    assert_all_close(found, expected, 8 * torch.finfo(kind).eps)
    with pytest.raises((CouplingError, InvalidArgumentError)):
        per_layer_fisher_diagonal(model, lambda f, t: criterion(f - f.mean(0), t), *batch, fisher_type=fisher_type)
    with pytest.raises((CouplingError, InvalidArgumentError)):
        per_layer_fisher_diagonal(model, lambda f, t: criterion(f / (0.1 + f.detach().std(0, correction=0)), t), *batch)


OWN_LOSSES: dict[str, Any] = {
    "cross entropy": lambda f, t: F.cross_entropy(f, t),
    "written out": lambda f, t: -f.log_softmax(1).gather(1, t[:, None]).mean(),
    "of margins": lambda f, t: F.softplus(-f.gather(1, t[:, None])).mean(),
    "tiny": lambda f, t: 1e-25 * F.cross_entropy(f, t),
    "huge": lambda f, t: 1e25 * F.cross_entropy(f, t),
}


@pytest.mark.parametrize("loss", OWN_LOSSES)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("fisher_type", ["empirical", "type-2"])
@pytest.mark.filterwarnings("ignore::secorder.CurvatureWarning")
def test_gradients_whose_squares_no_number_can_hold(loss: str, kind: torch.dtype, fisher_type: Any) -> None:
    """Those of samples that a fitted network is sure of, and of losses of any scale."""
    model, (x, _), own = make().to(kind), data(), OWN_LOSSES[loss]
    x = x.to(kind)
    with torch.no_grad():
        model[2].weight *= 1 if loss == "huge" else 1000
        labels = model(x).argmax(1)
    found = per_layer_fisher_diagonal(model, own, x, labels, fisher_type=fisher_type).by_parameter()
    by_samples = fisher_by_sample(model, own, x, labels, 6)
    expected = by_samples if fisher_type == "empirical" else ggn_by_sample(model, own, x, labels)
    assert all(torch.equal(found[name].isinf(), expected[name].isinf()) for name in found)
    assert_all_close(*({name: p.clamp(max=1e38) for name, p in x.items()} for x in (found, expected)), 1e-4)
