"""Which layers are selected."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import (
    AttributionError,
    CurvatureProbe,
    CurvatureWarning,
    InvalidArgumentError,
    InvalidTypeError,
    per_layer_fisher_diagonal,
    per_layer_hessian_diagonal,
)

from ..helpers import data, make, no_warnings, reference, step
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
    with no_warnings():
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
    with pytest.raises(InvalidArgumentError, match="no module's name matches '!nothing'"):
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


class Quantised(nn.Linear):
    """Its weight is kept in eight bits, as by quantised layers that stand in for ``nn.Linear``."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer)
        self.weight = nn.Parameter((self.weight.detach() * 50).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) / 50, self.bias)


@pytest.mark.parametrize("layer_types", [None, "all"])
@pytest.mark.parametrize("adapted", [True, False])
def test_integers_are_no_parameters(layer_types: Any, adapted: bool) -> None:
    class Adapted(Quantised):
        def __init__(self, inner: int, outer: int) -> None:
            super().__init__(inner, outer)
            self.bias.requires_grad_(False)
            self.low, self.high = nn.Linear(inner, 2, bias=False), nn.Linear(2, outer, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.high(self.low(x))

    kind = Adapted if adapted else Quantised
    model, (x, y) = nn.Sequential(kind(4, 5), nn.Tanh(), kind(5, 3)), data()
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses = [F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) for n in range(6)]
    gradients = [torch.autograd.grad(loss, list(wanted.values())) for loss in losses]
    expected = {name: torch.stack(g).square().mean(0) for name, *g in zip(wanted, *gradients, strict=True)}

    def own_loss(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f, t)

    with CurvatureProbe(model, layer_types, reduction="mean") as probe:
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
        found = probe.fisher_diagonal().by_parameter()
    for by_parameter in (found, per_layer_fisher_diagonal(model, own_loss, x, y, layer_types).by_parameter()):
        told = {name: value for name, value in by_parameter.items() if name in expected}
        assert told.keys() == expected.keys()
        assert_all_close(told, expected)
    batches = list(zip(x.split(3), y.split(3), strict=True))
    of_data = per_layer_fisher_diagonal(model, own_loss, batches, layer_types=layer_types).by_parameter()
    assert_all_close({name: of_data[name] for name in expected}, expected)
    assert per_layer_hessian_diagonal(model, own_loss, batches, layer_types=layer_types).keys()
    with pytest.raises(InvalidArgumentError, match="does not depend"):
        per_layer_fisher_diagonal(model, lambda f, t: f.detach().sum(), x, y, layer_types)
