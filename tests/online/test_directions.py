"""Random vectors that an audit looks at parameters with."""

import torch

from secorder.online.directions import Directions


def test_directions_are_private_and_copies_have_their_own() -> None:
    before = torch.get_rng_state()
    directions = Directions()
    assert not torch.equal(directions.vectors(torch.zeros(3, 4)).r, Directions().vectors(torch.zeros(3, 4)).r)
    assert torch.equal(before, torch.get_rng_state())


def test_a_block_is_looked_at_of_a_large_parameter_and_of_one_with_many_outputs() -> None:
    directions, matrix = Directions(), torch.zeros(100, 4)
    assert directions.vectors(matrix).whole
    assert directions.vectors(matrix, 1000) is directions.vectors(matrix)  # in one backward
    assert not directions.vectors(matrix, 1 << 20).whole
    assert directions.vectors(matrix[:10], 1 << 20).whole
    assert not directions.vectors(torch.zeros(1, 1).expand(1 << 10, 1 << 10)).whole
