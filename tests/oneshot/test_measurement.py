"""What every measurement is given."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secorder import InvalidArgumentError, InvalidTypeError, ProbeStateError
from secorder.layers.selection import select_layers
from secorder.oneshot.measurement import Measurement, measure

from ..helpers import data, make, measured, seeded


def test_runs_of_the_model_and_of_the_loss_are_the_same_each_time() -> None:
    def work(task: Measurement) -> None:
        (one, loss), (other, again) = task.loss(), task.loss(second_order=True)
        assert torch.equal(one, other)
        assert loss == again == task.loss_again(one, task.targets)
        assert (task.num_samples, task.dimension(one), task.certain) == (6, 0, True)

    measured(work, make(nn.Dropout()), data())


def test_a_part_is_some_samples_in_leaves_of_their_own() -> None:
    def work(task: Measurement) -> None:
        inputs, targets, leaves = task.part([4, 1])
        assert torch.equal(inputs, x[[4, 1]])
        assert torch.equal(targets, y[[4, 1]])
        assert leaves[id(x)] is inputs
        output = task.loss()[0]
        assert torch.equal(task.cut(output, [4, 1])[0], output[[4, 1]])

    x, y = data()
    measured(work, make(), (x, y))


def test_signs_do_not_depend_on_how_many_are_drawn_at_once() -> None:
    def signs(*counts: int) -> torch.Tensor:
        like = [torch.zeros(2, 3), torch.zeros(5)]
        return measured(
            lambda task: torch.cat([torch.cat([s.flatten(1) for s in task.signs(n, like)], 1) for n in counts]),
            make(),
            data(),
        )

    assert torch.equal(signs(6), signs(1, 2, 3))
    assert signs(6).abs().eq(1).all()


def test_the_generator_makes_random_numbers_the_same() -> None:
    drawn = measured(lambda task: task.random((3,), torch.zeros(1)), make(), data())
    assert torch.equal(drawn, torch.randn(3, generator=seeded()))


def test_what_cannot_be_measured_is_refused() -> None:
    model, (x, y) = make(), data()
    layers = select_layers(model)

    def run(loss: object = F.cross_entropy, targets: torch.Tensor = y, by_sample: bool = True) -> int:
        return measure(lambda task: task.num_samples, model, layers, loss, x, targets, by_sample=by_sample)  # type: ignore[arg-type]

    assert run() == 6
    with pytest.raises(InvalidTypeError, match="not made yet"):
        run(nn.CrossEntropyLoss)
    with pytest.raises(InvalidArgumentError):
        run(targets=y[:4])
    assert run(targets=y[:4], by_sample=False) == 1
    model[0] = nn.Linear(4, 5)
    with pytest.raises(ProbeStateError, match="'0' is no longer"):
        run()
