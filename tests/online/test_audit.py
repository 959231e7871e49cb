"""The audit: what captured calls explain of a whole gradient is that gradient, or it is seen that it is not."""

import pytest
import torch
from torch import Tensor

from secorder.layers.per_sample import Outer, PerSample, Rows, dense
from secorder.online.audit import UNITS, actual, explained
from secorder.online.directions import Directions


def forms() -> dict[str, tuple[PerSample, tuple[int, ...]]]:
    return {
        "outer": (Outer(torch.randn(5, 1, 3, 4), torch.randn(5, 1, 3, 6)), (6, 4)),
        "groups": (Outer(torch.randn(5, 2, 3, 4), torch.randn(5, 2, 3, 3)), (6, 4)),
        "bias": (Outer(None, torch.randn(5, 1, 3, 6)), (6,)),
        "rows": (Rows(torch.randint(6, (5, 3)), torch.randn(5, 3, 4), 6), (6, 4)),
        "dense": (torch.randn(5, 6, 4), (6, 4)),
    }


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("form", forms())
def test_what_explains_a_gradient(form: str, block: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if block:
        monkeypatch.setattr("secorder.online.directions.WHOLE_ELEMENTS", 0)
        monkeypatch.setattr("secorder.online.directions.BLOCK", 2)
    part, shape = forms()[form]
    whole: Tensor = dense(part, torch.Size(shape).numel()).sum(0).view(shape)
    for _ in range(5):
        vectors = Directions().vectors(torch.zeros(shape))
        value, square = explained(part, vectors)
        bound = UNITS * torch.finfo(torch.float64).eps * square.sqrt()
        assert (actual(whole, vectors) - value).abs() <= bound
        other = whole + 1e-3 * torch.randn(shape)
        assert (actual(other, vectors) - value).abs() > bound


def test_directions_are_private_and_copies_have_their_own() -> None:
    before = torch.get_rng_state()
    directions = Directions()
    assert not torch.equal(directions.vectors(torch.zeros(3, 4)).r, Directions().vectors(torch.zeros(3, 4)).r)
    assert len(directions.some(["a", "b", "c"], 2)) == 2
    assert directions.some(["a", "b"], 2) == {"a", "b"}
    assert torch.equal(before, torch.get_rng_state())
