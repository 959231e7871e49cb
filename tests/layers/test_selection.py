"""Which layers are selected."""

import warnings

import pytest
from torch import nn

from secorder import CurvatureProbe, CurvatureWarning, InvalidTypeError

from ..helpers import data, make, reference, step
from ..reference import assert_all_close


def test_selection() -> None:
    model = nn.ModuleDict({"encoder": make(), "head": nn.Linear(3, 2), "norm": nn.LayerNorm(3)})
    assert CurvatureProbe(model).layer_names == ["encoder.0", "encoder.2", "head"]
    assert CurvatureProbe(model, layers="encoder.*").layer_names == ["encoder.0", "encoder.2"]
    assert CurvatureProbe(model, layers=["head", "encoder.0"]).layer_names == ["encoder.0", "head"]
    assert CurvatureProbe(model, nn.LayerNorm).layer_names == ["norm"]
    assert CurvatureProbe(model, (nn.Linear, nn.LayerNorm), layers="*").layer_names[-2:] == ["head", "norm"]
    assert CurvatureProbe(model, "all").layer_names == ["encoder.0", "encoder.2", "head", "norm"]


def test_subclasses_of_the_default_types_are_included() -> None:
    class Mine(nn.Linear):
        pass

    model, batch = nn.Sequential(Mine(4, 3)), data()
    probe = CurvatureProbe(model)
    step(model, batch)
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_model_that_is_itself_a_layer() -> None:
    model, batch = nn.Linear(4, 3), data()
    probe = CurvatureProbe(model)
    step(model, batch)
    assert probe.layer_names == [""]
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_frozen_layers_are_left_out_where_others_are_trained() -> None:
    model = make()
    model[0].requires_grad_(False)
    assert CurvatureProbe(model).layer_names == ["2"]
    assert CurvatureProbe(model, frozen=True).layer_names == ["0", "2"]
    assert CurvatureProbe(model, layers="*").layer_names == ["0", "2"]
    assert CurvatureProbe(model.requires_grad_(False)).layer_names == ["0", "2"]


def test_default_types_that_leave_out_most_of_what_is_trained_are_told() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(make()[0].weight.repeat(2, 1))

    model = nn.Sequential(Bare(), nn.Linear(4, 2))
    with pytest.warns(CurvatureWarning, match=r"1 of 2 trained layers, 20% of the .*layer_types=.all."):
        CurvatureProbe(model)
    model[1].requires_grad_(False)
    with pytest.warns(CurvatureWarning, match="0 of 1 trained layers, 0%"):
        CurvatureProbe(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CurvatureProbe(model, "all")
        CurvatureProbe(model, layers="1")
        CurvatureProbe(make())


def test_layers_are_named() -> None:
    for layers in (3, [3], nn.Linear(1, 1)):
        with pytest.raises(InvalidTypeError, match="hold module names"):
            CurvatureProbe(make(), layers=layers)  # type: ignore[arg-type]
