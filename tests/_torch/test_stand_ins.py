"""What a module holds in place of a parameter."""

import torch
from torch import nn

from secorder._torch.stand_ins import constant_in_place_of


def test_parameters_and_what_is_computed_are_no_constants() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    assert constant_in_place_of(model, "0.weight") is None
    value = torch.ones(3, 2)
    with torch.no_grad():
        del model[0].weight
        model[0].weight = value
    assert constant_in_place_of(model, "0.weight") is value
    assert constant_in_place_of(model[0], "weight") is value
    model[0].weight = value.clone().requires_grad_()
    assert constant_in_place_of(model, "0.weight") is None
    assert constant_in_place_of(model, "2.weight") is None
    del model[1].bias
    model[1].register_buffer("bias", value)
    assert constant_in_place_of(model, "1.bias") is value
