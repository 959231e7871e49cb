"""Which layers are selected."""

from torch import nn

from secorder import CurvatureProbe

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
