"""What a forward that begins is recorded as, or why it is not."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe, CurvatureWarning, NonFiniteError
from secorder.online.attributions import Attributions
from secorder.online.opening import open_record
from secorder.online.reading import unreadable

from ..helpers import Net, data, mlp, no_warnings, reference, step
from ..reference import assert_all_close


def test_a_record_of_a_batch() -> None:
    model, (inputs, _) = mlp(), data()
    with CurvatureProbe(model) as probe:
        assert probe._attachment is not None
        record = open_record(probe._attachment, (inputs,), {})
        assert record is not None
        assert record.num_samples == 6
        assert record.verified
        assert record.shapes == ((6, 4),)
        assert open_record(probe._attachment, (inputs[:0],), {}) is None
        assert probe._fisher.troubles._causes == {"empty"}


def test_a_layer_that_has_left_the_model_raises_at_once_where_the_probe_is_strict() -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model, strict=True) as probe:
        step(model, batch)
        model[4] = nn.Linear(5, 3)
        with pytest.raises(AttributionError, match="taken its place"):
            step(model, batch)
        assert torch.is_grad_enabled()
        assert probe.attached


def test_batches_that_cannot_be_told_are_warned_of_once() -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model):
        step(model, batch)
        model[4] = nn.Linear(5, 3)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(3):
                step(model, batch)
    assert [one.category for one in told] == [CurvatureWarning]


def test_a_model_of_which_nothing_can_be_told_is_not_looked_at_at_each_step() -> None:
    runs = itertools.count()

    def forward(m: Any, text: str) -> Tensor:
        next(runs)
        return m.a(torch.full((1, 4), float(len(text))))

    model = Net(forward, a=nn.Linear(4, 3))
    with CurvatureProbe(model) as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for steps in (8, 8):
            for _ in range(steps):
                model("ab").sum().backward()
            with pytest.raises(AttributionError, match="called with str and no tensor"):
                probe.fisher_diagonal()
            probe.reset()
    assert next(runs) <= 16 + 2 * 5  # batches 1, 2, 4, 8 and 16


def acting(model: nn.Module) -> None:
    """An agent's unbatched call, made with gradients and never differentiated."""
    model(torch.randn(4)).argmax()


def saliency(model: nn.Module) -> None:
    """A derivative with respect to the input alone."""
    inputs = torch.randn(4, requires_grad=True)
    torch.autograd.grad(model(inputs).max(), inputs)


@pytest.mark.parametrize("other", [acting, saliency])
@pytest.mark.parametrize("first", [True, False])
def test_a_forward_of_which_nothing_is_known_does_no_harm_without_a_backward(other: Any, *, first: bool) -> None:
    model = mlp()
    batches = [data(), data(3), data(7)]
    with CurvatureProbe(model, reduction="mean") as probe, no_warnings():
        expected: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            if first or index:
                other(model)
            step(model, batch)
            for name, value in reference(model, batch).items():
                expected[name] = expected.get(name, 0.0) + value * len(batch[0]) / 16
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)


def test_a_forward_of_which_nothing_is_known_is_told_of_once_a_backward_comes() -> None:
    model = mlp()
    with CurvatureProbe(model, reduction="mean") as probe:
        step(model, data())
        output = model(torch.randn(4))
        assert not unreadable(probe._fisher)
        with pytest.warns(CurvatureWarning, match="no dimension of the model's arguments"):
            output.sum().backward()
        with pytest.raises(AttributionError, match=r"shapes \[\(4,\)\]"):
            probe.fisher_diagonal()


def test_a_loop_that_calls_its_model_in_two_ways_in_turn_is_looked_at_no_more_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Net(lambda m, x, y=None: m.fc(x if y is None else x + y), fc=nn.Linear(4, 3))
    with CurvatureProbe(model, reduction="mean") as probe:
        looked, look = [], Attributions.verify
        monkeypatch.setattr(Attributions, "verify", lambda *args: (looked.append(index), look(*args))[1])
        for index in range(1, 17):
            model(*[data()[0]] * (1 + index % 2)).sum().backward()
        assert probe.num_samples == 16 * 6
    assert looked == [1, 2, 4, 8, 16]


def test_a_verification_batch_that_ends_in_nan_raises_where_that_is_asked_for() -> None:
    model, (inputs, targets) = mlp(), data()
    with CurvatureProbe(model, reduction="mean", on_nonfinite="raise") as probe:
        with pytest.raises(NonFiniteError, match="the model's output holds nan or inf"):
            model(inputs * torch.nan)
        step(model, (inputs, targets))
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, (inputs, targets)))


class Squares(torch.autograd.Function):
    """The mean square of products with a weight, as fused losses of a head have it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return (x @ weight.T).square().mean()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        z = x @ weight.T
        return 2 * g * z @ weight / z.numel(), 2 * g * z.T @ x / z.numel()


def test_of_a_loss_in_a_function_of_its_own_it_is_said_that_the_model_returns_no_samples() -> None:
    model = Net(lambda m, x: Squares.apply(m.body(x), m.head.weight), body=nn.Linear(4, 3), head=nn.Linear(3, 2))
    with CurvatureProbe(model, reduction="mean") as probe:
        for size in (4, 4, 3):
            model(torch.randn(size, 4)).backward()
        with pytest.raises(AttributionError, match=r"'head'.*Net, which would run again for them, returned \[\(\)\]"):
            probe.fisher_diagonal()
