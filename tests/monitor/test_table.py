"""The table in the terminal: columns, order, groups, widths, plain text and files."""

import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from secorder import CurvatureProbe, InvalidArgumentError, report


def make() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, torch.randn(6, 1, 4, 4), torch.randint(3, (6,))


def diagonals() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model, inputs, targets = make()
    with CurvatureProbe(model) as probe:
        return (
            probe.fisher_diagonal(F.cross_entropy, inputs, targets),
            probe.hessian_diagonal(F.cross_entropy, inputs, targets),
        )


def shown(what: object, width: int, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal)
    with console.capture() as captured:
        console.print(what)
    return captured.get()


def names(text: str) -> list[str]:
    return [line.split()[1] for line in text.splitlines() if line.startswith("│")]


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
    text = str(report({"a": torch.zeros(3), "": torch.tensor([float("nan"), 1.0])}, {"a": torch.tensor([-1.0])}))
    assert names(text) == ["a", "model"]
    assert "nan" in text
    assert "type" not in text


def test_bad_input() -> None:
    with pytest.raises(InvalidArgumentError, match="needs a Fisher or a Hessian"):
        report()
    with pytest.raises(InvalidArgumentError, match="sort_by must be one of"):
        report({"a": torch.ones(2)}, sort_by="size")  # type: ignore[arg-type]


def test_files(tmp_path: Path) -> None:
    table = report(*diagonals(), title="digits")
    table.save_svg(tmp_path / "table.svg")
    table.save_html(tmp_path / "table.html")
    assert (tmp_path / "table.svg").read_text().startswith("<svg")
    assert "tr F" in (tmp_path / "table.html").read_text()


def test_print_of_a_probe() -> None:
    model, inputs, targets = make()
    probe = CurvatureProbe(model)
    assert "Conv2d(1, 2" in str(probe)
    assert "0 samples" in str(probe)
    F.cross_entropy(model(inputs), targets).backward()
    assert names(str(probe)) == ["0", "3", "5"]
    assert "6 samples" in str(probe)
    assert names(str(probe.summary(sort_by="parameters"))) == ["3", "0", "5"]
