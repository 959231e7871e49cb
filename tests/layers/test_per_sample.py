"""Per-sample gradients in their forms, over calls, layouts and stacked cotangents, against loops."""

import pytest
import torch
from torch import Tensor, nn

from secorder.layers.layout import Layout
from secorder.layers.per_sample import (
    Outer,
    PerSample,
    Rows,
    dense,
    distinct_rows,
    in_rows,
    merge,
    per_sample_gradients,
    stacked_gradients,
    sum_in_forms,
    total_gradient,
    with_cotangents,
)
from secorder.layers.rules import rule_for

from ..reference import gradient_by_sample
from .forms import NAMES, SIZE, N, form, written_out


@pytest.mark.parametrize("name", NAMES)
def test_every_form_written_out_and_summed(name: str) -> None:
    gradient = form(name)
    by_sample = written_out(gradient)
    torch.testing.assert_close(dense(gradient, SIZE), by_sample)
    torch.testing.assert_close(total_gradient(gradient, SIZE), by_sample.sum(0))
    torch.testing.assert_close(written_out(with_cotangents(gradient, lambda g: -3 * g)), -3 * by_sample)


@pytest.mark.parametrize("name", NAMES)
def test_the_sum_of_several_calls(name: str) -> None:
    parts = [form(name) for _ in range(3)]
    torch.testing.assert_close(dense(merge(parts), SIZE), sum(written_out(part) for part in parts))
    assert merge(parts[:1]) is parts[0]


@pytest.mark.parametrize("names", [(one, other) for one in NAMES for other in NAMES], ids=" and ".join)
def test_a_sum_of_forms(names: tuple[str, str]) -> None:
    parts = [form(name) for name in names]
    found = sum_in_forms(parts, SIZE)
    torch.testing.assert_close(sum(dense(part, SIZE) for part in found), sum(written_out(part) for part in parts))
    if len(found) == 2:
        outer, rows = found
        assert isinstance(outer, Outer)
        assert isinstance(rows, Rows)
        products = (written_out(outer) * written_out(rows)).sum(1)
        torch.testing.assert_close(in_rows(outer, rows).flatten(1).sum(1), products)


def test_distinct_rows_of_each_sample() -> None:
    places, where = distinct_rows(Rows(torch.tensor([[3, 1, 3], [0, 1, 0]]), torch.zeros(2, 3, 1), rows=4))
    assert places.tolist() == [1, 3, 4, 5, 0, 0]  # sample · rows + row, and zeros behind
    assert places[where].tolist() == [3, 1, 3, 4, 5, 4]


def test_all_rows_of_a_table_that_has_fewer_than_there_are_positions() -> None:
    places, where = distinct_rows(Rows(torch.tensor([[1, 1, 0], [2, 0, 2]]), torch.zeros(2, 3, 1), rows=3))
    assert places.tolist() == list(range(6))
    assert places[where].tolist() == [1, 1, 0, 5, 3, 5]


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "outer": (nn.Linear(4, 3), (4,)),
    "dense": (nn.LayerNorm(4), (4,)),
    "rows": (nn.Embedding(6, 3), ()),
}


def inputs_of(name: str, *leading: int) -> Tensor:
    return torch.randint(6, leading) if name == "rows" else torch.randn(*leading, *LAYERS[name][1])


def call(name: str, *leading: int) -> tuple[nn.Module, tuple[Tensor, ...], Tensor]:
    module, inputs = LAYERS[name][0].double(), (inputs_of(name, *leading),)
    return module, inputs, torch.randn_like(module(*inputs))


def assert_by_sample(found: dict[str, PerSample], expected: dict[str, Tensor], module: nn.Module) -> None:
    assert set(found) >= set(expected)
    for name, by_sample in expected.items():
        torch.testing.assert_close(dense(found[name], module.get_parameter(name).numel()), by_sample)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layout", [Layout(), Layout(1), Layout(0, 3, True), Layout(0, 3, False)], ids=str)
def test_samples_anywhere(name: str, layout: Layout) -> None:
    """Rows of one sample, in every order, are those of the same sample in a batch with samples in dim 0."""
    module, inputs, g = call(name, N, 3)
    expected = gradient_by_sample(module, inputs, g)
    if layout.rows > 1:
        x, u = layout.join(inputs[0]), layout.join(g)
    else:
        x, u = inputs[0].movedim(0, layout.dim), g.movedim(0, layout.dim)
    rule = rule_for(module)
    assert rule is not None
    assert_by_sample(per_sample_gradients(rule, module, [((x,), u)], [layout]), expected, module)


@pytest.mark.parametrize("name", LAYERS)
def test_stacked_cotangents_of_two_calls(name: str) -> None:
    module, first, _ = call(name, N, 2)
    second = (inputs_of(name, N, 4),)
    rule = rule_for(module)
    assert rule is not None
    cotangents = [torch.randn(3, *module(*inputs).shape) for inputs in (first, second)]
    stacked = stacked_gradients(rule, module, [first, second], cotangents)
    for k in range(3):
        parts = [gradient_by_sample(module, x, c[k]) for x, c in zip((first, second), cotangents, strict=True)]
        one = {key: with_cotangents(gradient, lambda g, k=k: g[k]) for key, gradient in stacked.items()}
        assert_by_sample(one, {key: parts[0][key] + parts[1][key] for key in parts[0]}, module)
