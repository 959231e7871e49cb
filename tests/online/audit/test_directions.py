"""Random vectors that an audit looks at parameters with."""

from typing import Any

import pytest
import torch

from secorder.layers.one_by_one import Vectors
from secorder.layers.side_by_side import Frame, frame_of
from secorder.online.audit.directions import KEPT, Directions


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


def assert_of(frame: Frame | None, vectors: Vectors) -> None:
    assert frame is not None
    assert torch.equal(frame.random, frame_of([(vectors.r, vectors.s)], torch.zeros(1)).random)


def test_a_frame_is_of_one_backward_whatever_another_thread_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    directions, weight = Directions(), torch.zeros(3, 4)

    def begins(*arguments: Any) -> Any:
        for _ in range(KEPT):
            directions.begin()
        return frame_of(*arguments)

    directions.begin()
    vectors = directions.vectors(weight)
    with monkeypatch.context() as patch:
        patch.setattr("secorder.online.audit.directions.frame_of", begins)
        frame = directions.frame([weight], [vectors], [0.0])
    assert_of(frame, vectors)
    frame = directions.frame([weight], None, [0.0])
    assert_of(frame, directions.vectors(weight))
