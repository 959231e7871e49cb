"""Random vectors that an audit looks at parameters with."""

import torch

from secorder.online.directions import Directions


def test_directions_are_private_and_copies_have_their_own() -> None:
    before = torch.get_rng_state()
    directions = Directions()
    assert not torch.equal(directions.vectors(torch.zeros(3, 4)).r, Directions().vectors(torch.zeros(3, 4)).r)
    assert len(directions.some(["a", "b", "c"], 2)) == 2
    assert directions.some(["a", "b"], 2) == {"a", "b"}
    assert torch.equal(before, torch.get_rng_state())
