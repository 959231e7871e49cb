"""How the loss is made of the samples' losses."""

from typing import Any

import pytest
import torch
from torch import nn

from secorder import CurvatureProbe, InvalidArgumentError, SecorderError, token_weights
from secorder.online.losses.reduction import check_reduction, loss_scale_of, weights_of

from ...helpers import data, mlp, step


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, "mean"), ("sum", "sum"), (nn.MSELoss(), "mean"), (nn.CrossEntropyLoss(reduction="sum"), "sum")],
)
def test_what_is_taken(given: Any, expected: str) -> None:
    assert check_reduction(given) == expected


@pytest.mark.parametrize(
    "given", ["none", 3, nn.MSELoss(reduction="none"), nn.CrossEntropyLoss(torch.ones(3)), nn.NLLLoss(ignore_index=0)]
)
def test_what_is_not(given: Any) -> None:
    with pytest.raises(InvalidArgumentError):
        check_reduction(given)


def test_weights_are_one_a_sample() -> None:
    assert torch.equal(weights_of(lambda x: x[:, 0], (torch.ones(3, 2),), {}, 3), torch.ones(3))
    with pytest.raises(InvalidArgumentError, match="one a sample"):
        weights_of(lambda x: x, (torch.ones(3, 2),), {}, 3)
    with pytest.raises(InvalidArgumentError, match=r"reduction= raised TypeError: .* called as the model is"):
        weights_of(lambda x, labels: labels, (torch.ones(3, 2),), {}, 3)


@pytest.mark.parametrize(("labels", "given"), [("labels", {"x": torch.ones(3)}), (1, {}), ("labels", {"labels": None})])
def test_token_weights_without_labels(labels: Any, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=f"no argument {labels!r}"):
        token_weights(labels)(torch.ones(3, 2), **given)


def test_token_weights_of_what_names_no_labels() -> None:
    for arguments in ({"labels": 1.5}, {"labels": None}, {"labels": -1}, {"ignore_index": "pad"}, {"shift": -1}):
        with pytest.raises(SecorderError, match=f"^{next(iter(arguments))} must be"):
            token_weights(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("accumulate", ["diagonal", "trace"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_whose_weights_are_no_numbers_does_not_count(bad: float, accumulate: Any) -> None:
    model, batch = mlp(), data()
    number = 1 / len(batch[0])
    with CurvatureProbe(model, reduction="mean", accumulate=accumulate) as probe:
        step(model, batch)
        expected = probe.fisher_trace()
    told = iter([number, bad, number])
    weights = lambda x: torch.tensor([number] * (len(x) - 1) + [next(told)])  # noqa: E731
    with CurvatureProbe(model, reduction=weights, accumulate=accumulate) as probe:
        for _ in range(3):
            step(model, batch)
        assert probe.num_skipped == dict.fromkeys(probe.layer_names, 1)
        for name, trace in probe.fisher_trace().items():
            assert trace.value == pytest.approx(expected[name].value, rel=1e-9)


def test_scales() -> None:
    assert loss_scale_of(None)() == 1.0
    assert loss_scale_of(0.5)() == 0.5
    assert loss_scale_of(lambda: 3.0)() == 3.0
