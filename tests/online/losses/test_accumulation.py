"""Gradients of several batches that are added up, each of a loss that is divided by their number."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe, CurvatureWarning
from secorder._torch.graph import tells_recomputation
from secorder.online.losses.accumulation import fraction, one_over

from ...helpers import mlp

pytestmark = pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")

#: What a loop does with the loss of one of ``k`` micro-batches, of which it is given the logits and labels.
Step = Callable[[Tensor, Tensor, int], None]

DIVIDED: dict[str, Step] = {
    "divided": lambda z, t, k: (F.cross_entropy(z, t) / k).backward(),
    "multiplied": lambda z, t, k: (F.cross_entropy(z, t) * (1 / k)).backward(),
    "by a gradient": lambda z, t, k: F.cross_entropy(z, t).backward(torch.tensor(1 / k)),
    "after a conversion": lambda z, t, k: (F.cross_entropy(z, t).double() / k).backward(),
    "a mean of sums": lambda z, t, k: (F.cross_entropy(z, t, reduction="sum") / len(z) / k).backward(),
}

#: Of which nothing is to be said.
NOT_DIVIDED: dict[str, Step] = {
    "added up": lambda z, t, k: F.cross_entropy(z, t).backward(),
    "a sum made a mean": lambda z, t, k: (F.cross_entropy(z, t, reduction="sum") / len(z)).backward(),
    "sums made a mean": lambda z, t, k: (
        (F.cross_entropy(z, t, reduction="sum") + z.square().sum()) / len(z)
    ).backward(),
    "weighted": lambda z, t, k: (0.3 * F.cross_entropy(z, t)).backward(),
}


def accumulate(
    step: Step, *, k: int = 4, size: int = 6, every: int = 1, cleared: bool = False, **options: object
) -> tuple[nn.Module, CurvatureProbe]:
    """Two steps of an optimizer, of ``k`` micro-batches each."""
    model = mlp()
    probe = CurvatureProbe(model, every=every, **options)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureWarning)
        for _ in range(2):
            for _ in range(k):
                if cleared:
                    optimizer.zero_grad(set_to_none=False)
                step(model(torch.randn(size, 4)), torch.randint(3, (size,)), k)
            optimizer.step()
            optimizer.zero_grad()
    return model, probe


@pytest.mark.parametrize("kind", DIVIDED)
def test_a_loss_that_is_divided_without_being_told_is_refused(kind: str) -> None:
    _, probe = accumulate(DIVIDED[kind])
    with pytest.raises(AttributionError, match=r"multiplied by 1/4 .*: pass loss_scale=1/4 where .*or loss_scale=1"):
        probe.fisher_diagonal()


@pytest.mark.parametrize("kind", ["divided", "a mean of sums"])
@pytest.mark.parametrize("told", [{"loss_scale": "returned"}, {"reduction": lambda x: None}], ids=["returned", "mean"])
def test_it_is_refused_where_what_is_told_tells_nothing_of_it(kind: str, told: dict[str, object]) -> None:
    """The scale of a loss that the model returns, which it does not; that a batch's loss is a mean."""
    _, probe = accumulate(DIVIDED[kind], **told)
    with pytest.raises(AttributionError, match="loss_scale=1/4"):
        probe.fisher_diagonal()


@pytest.mark.parametrize(("every", "size"), [(4, 6), (3, 6), (1, 1)], ids=["first of each", "some", "of one sample"])
def test_it_is_seen_where_not_each_batch_is_recorded_and_of_single_samples(every: int, size: int) -> None:
    _, probe = accumulate(DIVIDED["divided"], every=every, size=size, sample_dim=0)
    with pytest.raises(AttributionError, match="loss_scale=1/4"):
        probe.fisher_diagonal()


@pytest.mark.parametrize("kind", NOT_DIVIDED)
def test_what_is_no_division_by_the_number_of_batches_is_left_alone(kind: str) -> None:
    _, probe = accumulate(NOT_DIVIDED[kind], reduction="mean")
    assert probe.fisher_diagonal()


@pytest.mark.parametrize("told", [{"k": 1}, {"cleared": True}, {"loss_scale": 1 / 4}, {"loss_scale": 1.0}], ids=str)
def test_where_it_is_told_or_nothing_is_added_up_all_is_well(told: dict[str, float]) -> None:
    """A half of a loss may be its own affair."""
    _, probe = accumulate(lambda z, t, _: (F.cross_entropy(z, t) / 2).backward(), reduction="mean", **told)  # type: ignore[arg-type]
    assert probe.fisher_diagonal()


def test_a_check_says_it_too_and_a_reset_forgets_it() -> None:
    model, probe = accumulate(DIVIDED["divided"])
    batch = torch.randn(6, 4), torch.randint(3, (6,))
    assert "pass loss_scale=1/4" in str(probe.verify(nn.CrossEntropyLoss(), *batch))
    probe.reset()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    assert probe.fisher_diagonal()


def test_fractions_are_written_as_people_do() -> None:
    assert [fraction(x) for x in (0.25, 1 / 3, 65536.0, 0.3)] == ["1/4", "1/3", "6.554e+04", "0.3"]
    scales = (0.25, 1 / 3, 0.3, 0.6, 1.0, 4.0, -0.25, 0.0, float("inf"), float("nan"))
    assert [one_over(x) for x in scales] == [4, 3, *[1] * 8]


def test_what_is_left_is_remembered_as_long_as_the_loss_is_divided() -> None:
    """A parameter's next gradient may lie where an earlier one lay, and look like it."""
    model, probe = accumulate(DIVIDED["divided"], cleared=True)
    assert probe._fisher.accumulation.left is not None
    for _ in range(8):  # some are looked at
        model.zero_grad()
        F.cross_entropy(model(torch.randn(6, 4)), torch.randint(3, (6,))).backward()
    assert probe._fisher.accumulation.left is None
    assert probe.fisher_diagonal()
