"""The table in the terminal: columns, order, groups, widths, plain text and files."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from secorder import CurvatureProbe, InvalidArgumentError, InvalidTypeError, report

from ..helpers import run_again_where_nothing_tells


def make() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, torch.randn(6, 1, 4, 4), torch.randint(3, (6,))


def diagonals() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model, inputs, targets = make()
    with CurvatureProbe(model) as probe:
        return (
            probe.fisher_diagonal(F.cross_entropy, inputs, targets),
            probe.hessian_diagonal(F.cross_entropy, inputs, targets, method="exact"),
        )


def shown(what: object, width: int, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal)
    with console.capture() as captured:
        console.print(what)
    return captured.get()


def names(text: str) -> list[str]:
    """Of the rows, without the last one, which is of all layers."""
    return [name for name in (line.split()[1] for line in text.splitlines() if line.startswith("│")) if name != "total"]


def test_wide_table_has_everything() -> None:
    fisher, hessian = diagonals()
    text = shown(report(fisher, hessian, title="the title"), 220)
    for column in ("type", "shape", "params", "tr F", "mean F", "std F", "max F", "tr H", "H < 0", "share"):
        assert column in text
    assert "the title" in text
    assert "Conv2d" in text
    assert "2×1×3×3" in text
    assert any(block in text for block in "▁▂▃▄▅▆▇█")
    assert f"{fisher['3'].mean():.2e}" in text


@pytest.mark.parametrize("width", [200, 120, 80, 60, 40, 30])
def test_every_width_fits(width: int) -> None:
    text = shown(report(*diagonals()), width)
    assert max(map(len, text.splitlines())) <= width
    assert names(text) == ["0", "3", "5"]
    assert "tr F" in text


def test_plain_text_without_escape_codes() -> None:
    table = report(*diagonals())
    assert "\x1b" not in str(table)
    assert "\x1b" not in shown(table, 100)
    assert "\x1b" in shown(table, 100, terminal=True)


def test_sorted_and_grouped() -> None:
    fisher, hessian = diagonals()
    assert names(str(report(fisher, sort_by="parameters"))) == ["3", "0", "5"]
    traces = sorted(fisher, key=lambda name: -fisher[name].sum())
    assert names(str(report(fisher, hessian, sort_by="trace"))) == traces
    assert names(str(report(fisher, sort_by="name"))) == ["0", "3", "5"]
    assert names(str(report(fisher, group_by="type"))) == ["Conv2d", "0", "Linear", "3", "5"]
    assert names(str(report(fisher, group_by=lambda name: "head" if name == "5" else "body")))[0] == "body"


def test_any_mapping_and_odd_values() -> None:
    text = str(report({"a": torch.zeros(3), "": torch.tensor([float("nan"), 1.0])}, {"a": -torch.ones(3)}))
    assert names(text) == ["a", "model"]
    assert "nan" in text
    assert "type" not in text


def test_bad_input() -> None:
    with pytest.raises(InvalidArgumentError, match="needs a Fisher or a Hessian"):
        report()
    with pytest.raises(InvalidArgumentError, match='sort_by must be "name"'):
        report({"a": torch.ones(2)}, sort_by="size")  # type: ignore[arg-type]


def test_curvatures_of_two_models_are_no_table() -> None:
    with pytest.raises(InvalidArgumentError, match="'a' differ in size"):
        report({"a": torch.rand(3)}, {"a": torch.rand(4)})


def test_files(tmp_path: Path) -> None:
    table = report(*diagonals(), title="digits")
    table.save_svg(tmp_path / "table.svg")
    table.save_html(tmp_path / "table.html")
    assert (tmp_path / "table.svg").read_text().startswith("<svg")
    assert "tr F" in (tmp_path / "table.html").read_text()


def test_print_of_a_probe() -> None:
    model, inputs, targets = make()
    probe = CurvatureProbe(model, reduction="mean")
    assert "Conv2d(1, 2" in str(probe)
    assert "0 samples" in str(probe)
    F.cross_entropy(model(inputs), targets).backward()
    assert names(str(probe)) == ["0", "3", "5"]
    assert "6 samples" in str(probe)
    assert names(str(probe.summary(sort_by="parameters"))) == ["3", "0", "5"]


def test_print_of_a_probe_of_traces() -> None:
    model, inputs, targets = make()
    probe = CurvatureProbe(model, accumulate="trace", reduction="mean")
    assert "tr F" not in str(probe)
    F.cross_entropy(model(inputs), targets).backward()
    assert f"tr F = {probe.fisher_trace()['3'].value:.3g}" in str(probe)


LONG = ["a_model_with_a_very_long_name_indeed.embed"] + [
    f"a_model_with_a_very_long_name_indeed.encoder.layers.{i}.attention.{part}"
    for i in range(4)
    for part in ("query", "key", "value")
]


@pytest.mark.parametrize("width", [120, 80, 60, 40])
def test_names_give_way_before_columns_and_digits_never(width: int) -> None:
    fisher = {name: torch.rand(10) * 10.0 ** (-place) for place, name in enumerate(LONG)}
    text = shown(report(fisher, {name: -x for name, x in fisher.items()}), width)
    assert max(map(len, text.splitlines())) <= width
    assert len(names(text)) == len(LONG)
    for diagonal in fisher.values():
        assert f"{diagonal.sum():.3g}" in text
        assert f"{-diagonal.sum():.3g}" in text
    assert ("mean F" in text) == (width >= 80)
    if width >= 60:
        assert "…0.attention.query" in text
        assert "names without" in text


def test_the_last_row_is_of_all_layers() -> None:
    fisher, hessian = diagonals()
    lines = shown(report(fisher, hessian), 220).splitlines()
    (total,) = (line for line in lines if line.startswith("│ total"))
    whole = torch.cat(list(fisher.values()))
    for text in (f"{whole.numel():,}", f"{whole.sum():.3g}", f"{whole.mean():.2e}", f"{whole.std():.2e}"):
        assert f" {text} " in total
    assert "total" not in str(report({"a": torch.ones(2)}))


def test_depth_puts_layers_together() -> None:
    fisher = {name: torch.rand(10) for name in LONG}
    assert names(str(report(fisher, depth=1))) == ["a_model_with_a_very_long_name_indeed"]
    text = str(report(fisher, depth=2))
    assert [name.split(".")[-1] for name in names(text)] == ["embed", "encoder"]
    assert f"{sum(x.sum() for x in list(fisher.values())[1:]):.3g}" in text
    with pytest.raises(InvalidArgumentError, match="depth must be at least 1"):
        report(fisher, depth=0)


def test_what_no_table_can_be_made_of_is_refused() -> None:
    given: Any
    for given in (3, "fisher", [torch.ones(2)]):
        with pytest.raises(InvalidTypeError, match="must be a mapping of layer names to tensors"):
            report(hessian=given)
    for given in (3, "types", ["type"]):
        with pytest.raises(InvalidArgumentError, match='group_by must be "type", or a function'):
            report({"a": torch.ones(2)}, group_by=given)


def test_a_notebook_shows_everything() -> None:
    fisher, hessian = diagonals()
    html = report({"a<b": fisher["0"]}, title="1 & 2")._repr_html_()
    assert "a&lt;b" in html
    assert "1 &amp; 2" in html
    html = report(fisher, hessian, group_by="type")._repr_html_()
    for text in ("Conv2d", "2×1×3×3", "mean F", "H &lt; 0", "total", f"{fisher['3'].mean():.2e}"):
        assert text in html
    assert html.count("<tr") == 1 + 2 + 3 + 1


class Scale(nn.Module):
    """Measured by the operation that takes its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Mixed(Scale):
    """Run again: no rule for its operation."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.weight.expand(3, 4))


@run_again_where_nothing_tells
def test_what_measures_a_layer_is_told_where_it_is_no_rule() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Scale(), Mixed())
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        model(torch.randn(5, 4)).square().mean().backward()
        found = probe.fisher_diagonal()
        ways = ["rule", "operations", "rerun"]
        assert [info.measured_by for info in found.info.values()] == ways
        lines = shown(report(found), 200).splitlines()[3:6]
        assert [word for line in lines for word in line.split() if word in ways] == ways
    with CurvatureProbe(model, layers="0", reduction="mean") as probe:
        model(torch.randn(5, 4)).square().mean().backward()
        assert " by " not in shown(report(probe.fisher_diagonal()), 200)


def test_a_prompt_shows_the_table() -> None:
    table = report({"a": torch.rand(3)})
    assert repr(table) == str(table)


@pytest.mark.parametrize("save", ["save_html", "save_svg"])
def test_a_page_or_a_picture_has_a_path(save: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidTypeError, match=r"path must be the path of a file or folder, got None\."):
        getattr(report({"fc": torch.ones(2)}), save)(None)
    assert not list(tmp_path.iterdir())
