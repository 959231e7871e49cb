"""Version counters of tensors."""

import torch

from secorder._torch.versions import same_memory, version


def test_in_place_operations_are_counted() -> None:
    x = torch.ones(3)
    before = version(x)
    x + 1
    assert version(x) == before
    x[:2].mul_(2)
    assert version(x) == version(x.detach()) == before + 1
    assert version(x.clone()) == 0


def test_inference_tensors_have_none() -> None:
    with torch.inference_mode():
        x = torch.ones(3)
    assert version(x) == 0


def test_memory_that_is_given_by_data() -> None:
    x = torch.nn.Parameter(torch.ones(3))
    before = x.data
    x.data.mul_(2)
    assert same_memory(x, before)
    x.data = x.data * 2
    assert not same_memory(x, before)
