"""Which layers are selected."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder import (
    AttributionError,
    CurvatureProbe,
    CurvatureWarning,
    InvalidArgumentError,
    InvalidTypeError,
    per_layer_fisher_diagonal,
)

from ..helpers import data, make, reference, step
from ..reference import assert_all_close


def test_selection() -> None:
    model = nn.ModuleDict({"encoder": make(), "head": nn.Linear(3, 2), "norm": nn.LayerNorm(3)})
    assert CurvatureProbe(model).layer_names == ["encoder.0", "encoder.2", "head"]
    assert CurvatureProbe(model, layers="encoder.*").layer_names == ["encoder.0", "encoder.2"]
    assert CurvatureProbe(model, layers=["head", "encoder.0"]).layer_names == ["encoder.0", "head"]
    assert CurvatureProbe(model, nn.LayerNorm).layer_names == ["norm"]
    assert CurvatureProbe(model, layers="!encoder.*").layer_names == ["head"]
    assert CurvatureProbe(model, "all", layers=["!encoder.0", "!head"]).layer_names == ["encoder.2", "norm"]
    assert CurvatureProbe(model, layers=iter(["*", "!norm"])).layer_names == ["encoder.0", "encoder.2", "head"]
    assert CurvatureProbe(model, (nn.Linear, nn.LayerNorm), layers="*").layer_names[-2:] == ["head", "norm"]
    assert CurvatureProbe(model, "all").layer_names == ["encoder.0", "encoder.2", "head", "norm"]


def test_subclasses_of_the_default_types_are_included() -> None:
    class Mine(nn.Linear):
        pass

    model, batch = nn.Sequential(Mine(4, 3)), data()
    probe = CurvatureProbe(model, reduction="mean")
    step(model, batch)
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_model_that_is_itself_a_layer() -> None:
    model, batch = nn.Linear(4, 3), data()
    probe = CurvatureProbe(model, reduction="mean")
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


class Mixed(nn.Module):
    """Parts of which nothing can be told."""

    def __init__(self) -> None:
        super().__init__()
        self.complex, self.scripted = nn.Linear(4, 4, dtype=torch.complex64), torch.jit.script(nn.Linear(4, 4))
        self.table, self.head = nn.Embedding(9, 4, max_norm=1.0), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scripted(self.complex(x.cfloat()).abs() + self.table.weight[0]))


def test_what_cannot_be_told_is_left_out_as_the_error_says() -> None:
    model, batch = Mixed(), data()
    left_out: list[str] = []
    for _ in range(3):
        with pytest.raises((InvalidArgumentError, AttributionError), match="leave") as told:
            CurvatureProbe(model, "all", layers=left_out or None)
        left_out.append(str(told.value).split("layers='")[1].split("'")[0])
    with CurvatureProbe(model, "all", layers=left_out, reduction="mean") as probe:
        step(model, batch)
        assert probe.layer_names == ["head"]
        assert set(probe.fisher_diagonal()) == {"head"}
    with pytest.raises(InvalidArgumentError, match="no module is named or matches '!nothing'"):
        CurvatureProbe(model, layers="!nothing")


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=["max_norm", "by_freq"])
def test_tables_of_special_embeddings_in_any_layer_are_refused(option: dict[str, Any]) -> None:
    """In a layer with all that it contains, and as the weight of a head."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(6, 3, **option), nn.Linear(3, 6)
            self.head.weight = self.table.weight

    model = nn.ModuleDict({"tied": Tied(), "other": nn.Linear(3, 2)})
    for layer_types in (None, "all", Tied, nn.Embedding, nn.Linear):
        with pytest.raises(AttributionError, match=rf"'tied.table'.* with {next(iter(option))}="):
            CurvatureProbe(model, layer_types)
    assert CurvatureProbe(model, layers="other").layer_names == ["other"]


def test_a_layer_may_contain_scripted_parts() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.scripted = nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scripted(self.first(x).tanh())  # type: ignore[no-any-return]

    model, batch = Outer(), data()
    with CurvatureProbe(model, Outer, reduction="mean") as probe:
        step(model, batch)
        fisher = probe.fisher_diagonal()
        assert_all_close(fisher.by_parameter(), reference(model, batch))
    one_shot = per_layer_fisher_diagonal(model, nn.functional.cross_entropy, *batch, layer_types=Outer)
    assert_all_close(one_shot, fisher)
