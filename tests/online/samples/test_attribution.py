"""What is known of where samples are, and what later looks add to it."""

from dataclasses import replace

import pytest
from torch import nn

from secorder.layers.layout import Layout
from secorder.layers.selection import select_layers
from secorder.online.samples.attribution import Attribution, merged
from secorder.online.samples.relation import Verified


@pytest.mark.parametrize(
    ("dims", "shapes", "count"),
    [
        ((0, None), ((6, 4), (3,)), 6),
        ((0, 1), ((6, 4), (2, 6)), 6),
        ((0, 1), ((6, 4), (2, 1)), 6),  # what all samples share
        ((0, 1), ((6, 4), (2, 5)), None),
        ((0,), ((6, 4), (6,)), None),
        ((1,), ((6,),), None),
        ((0,), ((0, 4),), 0),
    ],
)
def test_the_number_of_samples_by_the_arguments_shapes(
    dims: tuple[int | None, ...], shapes: tuple[tuple[int, ...], ...], count: int | None
) -> None:
    assert Attribution(dims=dims).count_by_shapes(shapes) == count


def seen(rows: int) -> Verified:
    return Verified(Layout(), 0, (rows, 4), ((rows, 4),), rows)


def test_what_was_verified_of_a_layer_stays_while_it_is_captured_alike() -> None:
    (layer,) = select_layers(nn.Sequential(nn.Linear(4, 4)))
    before = Attribution(layers=(layer,), known={"0": (seen(6),)})
    after = Attribution(layers=(layer,), known={"0": (seen(5),)})
    assert merged(before, after).known == {"0": (seen(5), seen(6))}
    otherwise = replace(after, layers=(replace(layer, rule=None),))
    assert merged(before, otherwise).known == {"0": (seen(5),)}


def test_so_many_verified_calls_are_kept_at_each_place() -> None:
    (layer,) = select_layers(nn.Sequential(nn.Linear(4, 4)))
    found = Attribution(layers=(layer,))
    for rows in range(2, 40):
        found = merged(found, Attribution(layers=(layer,), known={"0": (seen(rows),)}))
    assert found.known["0"] == tuple(seen(rows) for rows in range(39, 23, -1))


def test_who_takes_part_of_what_a_layer_brings() -> None:
    tied = Attribution(ties={"a": {"weight": [("a", "weight"), ("b", "weight")]}})  # type: ignore[dict-item]
    assert tied.holders("a") == {"a", "b"}
    assert tied.sharing("b") == ["a"]
    assert tied.owners("c") == ["c"]
