"""The documented functions: importable as written, their examples run from the document's own text."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import secorder
from secorder import (
    CurvatureProbe,
    CurvatureWarning,
    ProbeStateError,
    per_layer_fisher_diagonal,
    per_layer_hessian_diagonal,
)

from ..helpers import no_warnings

DOCUMENT = Path(__file__).parents[2] / "docs" / "per_layer_curvature.rst"
SHARED = Path(__file__).parents[3] / "shared" / "per_layer_curvature.rst"


def code_blocks() -> list[str]:
    text = DOCUMENT.read_text()
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", text)
    return [re.sub(r"^   ", "", block, flags=re.MULTILINE) for block in blocks]


def test_examples_of_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    hessian, fisher, stats = code_blocks()
    namespace: dict[str, object] = {}
    exec(hessian, namespace)
    assert re.findall(r"(linear\d) Hessian diagonal shape: torch.Size\(\[(\d+)\]\)", capsys.readouterr().out) == [
        ("linear1", "220"),
        ("linear2", "105"),
        ("linear3", "6"),
    ]
    exec(stats, namespace)
    printed = capsys.readouterr().out
    numbers = [float(x) for x in re.findall(r"(?:Mean|Std|Max|Min): +(-?\d+\.\d{4})", printed)]
    assert len(numbers) == 12
    assert all(low <= mean <= high for mean, _, high, low in zip(*[iter(numbers)] * 4, strict=True))
    exec(fisher, {})
    printed = capsys.readouterr().out
    assert "Layer: linear1, Shape: torch.Size([55])" in printed
    assert "Layer: linear2, Shape: torch.Size([18])" in printed


@pytest.mark.skipif(not SHARED.exists(), reason="the original document is not beside the checkout")
def test_the_document_is_the_original() -> None:
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", SHARED.read_text())
    assert [re.sub(r"^   ", "", block, flags=re.MULTILINE) for block in blocks] == code_blocks()


def test_the_alias_holds_the_same_objects() -> None:
    from torch_secorder.core import per_layer_curvature as alias

    from secorder.core import per_layer_curvature as own

    for name in own.__all__:
        assert getattr(alias, name) is getattr(own, name) is getattr(secorder, name)


def test_positional_arguments_and_layer_types() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    batch = torch.randn(4, 3), torch.randn(4, 2)
    for measure in (per_layer_hessian_diagonal, per_layer_fisher_diagonal):
        assert list(measure(model, nn.MSELoss(), *batch)) == ["0"]
        assert list(measure(model, nn.MSELoss(), *batch, [nn.LayerNorm])) == ["1"]
        assert list(measure(model, nn.MSELoss(), *batch, (nn.Linear, nn.LayerNorm), False)) == ["0", "1"]
        assert measure(model, nn.MSELoss(), *batch, nn.Linear, True)["0"].requires_grad


def test_numbers_are_those_of_a_probe_which_takes_no_batch_once_detached() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))
    batch = nn.functional.cross_entropy, torch.randn(4, 3), torch.randint(3, (4,))
    with CurvatureProbe(model) as probe:
        pairs = [
            (per_layer_fisher_diagonal(model, *batch), probe.fisher_diagonal(*batch)),
            (per_layer_hessian_diagonal(model, *batch, method="exact"), probe.hessian_diagonal(*batch, method="exact")),
        ]
    for one, other in pairs:
        assert list(one) == list(other) == ["0", "2"]
        assert all(torch.equal(one[name], other[name]) for name in one)
    data = iter([batch[1:]])
    for measure in (probe.fisher_diagonal, probe.hessian_diagonal):
        with pytest.raises(ProbeStateError):
            measure(batch[0], data)
    assert len(list(data)) == 1


def test_layers_are_chosen_as_the_probe_chooses_them() -> None:
    model, batch = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (torch.randn(5, 3), torch.randn(5, 2))
    model[0].requires_grad_(False)
    for measure in (per_layer_hessian_diagonal, per_layer_fisher_diagonal):
        assert list(measure(model, nn.MSELoss(), *batch)) == ["2"]
        whole = measure(model, nn.MSELoss(), *batch, frozen=True)
        assert list(whole) == ["0", "2"]
        for names in ("0", iter(["0"])):
            named = measure(model, nn.MSELoss(), *batch, layers=names)
            assert list(named) == ["0"]
            torch.testing.assert_close(named["0"], whole["0"])


def test_a_model_without_layers_of_the_default_types_is_told_of() -> None:
    model, batch = nn.Sequential(nn.LayerNorm(3)), (torch.randn(5, 3), torch.randn(5, 3))
    with pytest.warns(CurvatureWarning, match='has no nn.Linear or nn.Conv2d.*layer_types="all"'):
        assert per_layer_hessian_diagonal(model, nn.MSELoss(), *batch) == {}
    with no_warnings():
        assert per_layer_hessian_diagonal(model, nn.MSELoss(), *batch, layer_types=nn.Linear) == {}
        assert per_layer_hessian_diagonal(nn.Tanh(), nn.MSELoss(), *batch) == {}
        assert per_layer_hessian_diagonal(nn.Sequential(nn.Linear(3, 3)), nn.MSELoss(), *batch, layers="!0") == {}
