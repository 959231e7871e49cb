"""A forward's loss is looked at once, leaves nothing behind, and where it cannot be looked at, that is said."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder import AttributionError, CurvatureProbe, CurvatureWarning
from secorder._torch.graph import tells_recomputation
from secorder.online.losses import watching

from ...helpers import Exponential, Net, data, make, mlp, no_warnings
from ..loops import follow

pytestmark = pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")

#: A loss of logits, shape (N, 3), and labels.
Criterion = Callable[[Tensor, Tensor], Tensor]


def residual() -> Net:
    """A model that is looked at again, since its structure does not tell by itself."""
    return Net(lambda m, x: m.b(torch.tanh(m.a(x)) + x), a=nn.Linear(4, 4), b=nn.Linear(4, 3))


def test_a_look_at_the_loss_calls_no_hook_and_leaves_nothing() -> None:
    entry = torch.autograd._engine_run_backward
    model, calls = residual(), []
    with CurvatureProbe(model, reduction="mean"):
        x, t = data(6)
        model(x)  # and no backward
        for _ in range(2):
            z = model(x).clone()
            z.retain_grad()
            z.register_hook(lambda g: calls.append(g))
            F.cross_entropy(z, t).backward()
            assert z.grad is not None
            torch.testing.assert_close(z.grad, calls[-1])
        assert torch.autograd._engine_run_backward is entry
        kept = model(x)
        del kept
    assert len(calls) == 2
    assert torch.autograd._engine_run_backward is entry


def test_a_probe_that_is_detached_waits_for_no_backward() -> None:
    entry, model, batch = torch.autograd._engine_run_backward, make(), data()
    probe = CurvatureProbe(model, reduction="mean")
    loss = F.cross_entropy(model(batch[0]), batch[1])
    assert torch.autograd._engine_run_backward is not entry
    probe.detach()
    assert torch.autograd._engine_run_backward is entry
    loss.backward()


@torch.jit.script
def scripted(z: Tensor, t: Tensor) -> Tensor:
    return -z.log_softmax(1).gather(1, t.unsqueeze(1)).mean()


UNSEEN: dict[str, Criterion] = {
    "a custom function": lambda z, t: F.nll_loss(-Exponential.apply(z), t),
    "a checkpoint": lambda z, t: checkpoint(F.cross_entropy, z, t, use_reentrant=False),
    "a script": scripted,
    "by segments": lambda z, t: torch.segment_reduce(
        F.cross_entropy(z, t, reduction="none"), "mean", lengths=torch.tensor([len(z)])
    ).squeeze(),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_where_a_loss_cannot_be_looked_at_the_first_read_says_so(name: str) -> None:
    came = follow(make(), [data(n) for n in (6, 7)], lambda m, b: UNSEEN[name](m(b[0]), b[1]))
    assert came.exact
    (warned,) = came.warned
    assert "cannot be seen whether the loss couples" in warned


def test_where_backward_is_given_the_gradient_on_the_outputs_the_first_read_says_so() -> None:
    for n, warns in ((6, True), (1, False)):
        model, (x, t) = make(), data(n)
        with CurvatureProbe(model, reduction="mean") as probe, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            z = model(x)
            z.backward((z.detach().softmax(1) - F.one_hot(t, 3)) / n)
            probe.fisher_diagonal(missing="skip")
        said = [str(w.message) for w in caught if "no loss" in str(w.message)]
        assert bool(said) is warns


def test_what_a_check_has_found_is_not_assumed_any_more() -> None:
    model, batch = make(), data(6)
    with CurvatureProbe(model) as probe:
        UNSEEN["a custom function"](model(batch[0]), batch[1]).backward()
        assert probe.verify(UNSEEN["a custom function"], *batch)
        with no_warnings():
            assert probe.fisher_diagonal()


def test_what_cannot_be_asked_hides_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one look at the loss fails, the other one is taken."""
    monkeypatch.setattr(watching, "chooses", lambda *_: 1 / 0)
    model, (x, t) = mlp(), data(8)
    with CurvatureProbe(model, reduction="mean") as probe:
        with pytest.warns(CurvatureWarning, match="couples the samples"):
            F.cross_entropy(model(x), t).sqrt().backward()
        with pytest.raises(AttributionError, match="couples the samples"):
            probe.fisher_diagonal()


def test_a_look_at_the_loss_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secorder.online.losses.watching.tell_scaler", lambda *_: 1 / 0)
    model, (x, t) = make(), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        F.cross_entropy(model(x), t).backward()
        with pytest.warns(UserWarning, match=r"analysing it failed \(ZeroDivisionError"):
            probe.fisher_diagonal()


@pytest.mark.parametrize(
    ("losses", "expected"),
    [(lambda a, b: [a + b], [2]), (lambda a, b: [b, a], [1, 1]), (lambda a, b: [a, a + b], [1, 2])],
    ids=["of both", "one each", "one again"],
)
def test_a_loss_of_several_forwards_is_looked_at_once(
    losses: Callable[..., list[Tensor]], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    monkeypatch.setattr(watching, "chooses", lambda loss: looks.append(len(loss.outputs)) or [])
    entry, model, (x, t) = torch.autograd._engine_run_backward, make(), data(6)
    with CurvatureProbe(model, reduction="mean", forwards="separate"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for loss in losses(F.cross_entropy(model(x), t), F.cross_entropy(model(x + 1), t)):
            loss.backward(retain_graph=True)
        assert looks == expected
        assert torch.autograd._engine_run_backward is entry


#: Losses of the logits of sequences, shape (N, 5, 3), and why they are not told; empty of one that is.
OF_SEQUENCES: dict[str, tuple[Criterion, str]] = {
    "a mean": (lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten()), ""),
    "of means in time": (lambda z, t: F.cross_entropy(z.mean(1), t[:, 0]), ""),
    "a sum": (lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten(), reduction="sum"), "is the sum of"),
    "contrastive": (lambda z, t: F.cross_entropy(z.mean(1) @ z.mean(1).T, torch.arange(len(z))), "couples the samples"),
    "hardest": (lambda z, t: torch.cdist(z.mean(1), z.mean(1)).amax(1).mean(), "couples the samples"),
    "of samples in dim 1": (lambda z, t: F.cross_entropy(z.mean(0), t[0]), "couples the samples"),
}


@pytest.mark.parametrize("name", OF_SEQUENCES)
@pytest.mark.parametrize("sizes", [(4, 4, 4), (5, 5, 5), (4, 7, 4)])
def test_where_samples_may_lie_elsewhere_the_loss_is_looked_at_where_they_are_taken_to_be(
    name: str, sizes: tuple[int, ...]
) -> None:
    loss, reason = OF_SEQUENCES[name]
    batches = [(torch.randn(n, 5, 4, dtype=torch.float64), torch.randint(3, (n, 5))) for n in sizes]
    came = follow(mlp(), batches, lambda m, b: loss(m(b[0]), b[1]))
    assert came.exact is not bool(reason)
    assert all("pass sample_dim=0 or sample_dim=1" in told for told in (*came.refused.values(), *came.warned[:1]))
    assert all(reason in told for told in came.refused.values())


@pytest.mark.parametrize("used", [False, True])
def test_outputs_of_one_sample_each_that_a_loss_takes_are_not_seen_through(used: bool) -> None:
    """Such as images' features: a loss that has all of them in each sample's couples these."""

    def forward(m: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        h = torch.tanh(m.a(x)).cumsum(1)
        return m.b(h.mean(1)), list(h)

    model = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    with CurvatureProbe(model, reduction="mean") as probe:
        for tokens in (4, 7):
            logits, features = model(torch.randn(4, tokens, 4))
            scale = torch.stack([own.mean() for own in features]).mean() if used else 1.0
            (scale * logits).square().sum(1).mean().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            probe.fisher_diagonal(missing="skip")
    said = [str(w.message) for w in caught]
    assert ["one tensor for each" in message for message in said] == [True] * used
