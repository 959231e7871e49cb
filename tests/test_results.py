"""What measurements return."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secorder import CurvatureProbe, Diagonals, InvalidArgumentError, InvalidTypeError

from .helpers import data, make, seeded, step
from .reference import assert_all_close


def test_by_parameter_names_and_shapes() -> None:
    model = make()
    probe = CurvatureProbe(model, reduction="mean")
    step(model, data())
    found = probe.fisher_diagonal()
    assert {k: v.shape for k, v in found.by_parameter().items()} == {k: v.shape for k, v in model.named_parameters()}
    assert torch.equal(found["0"], torch.cat([v.flatten() for v in list(found.by_parameter().values())[:2]]))
    copied = pickle.loads(pickle.dumps(found))
    assert_all_close(copied.by_parameter(), found.by_parameter(), 0.0)


def measured(**options: Any) -> Diagonals:
    torch.manual_seed(0)
    with CurvatureProbe(make(nn.Tanh())) as probe:
        return probe.hessian_diagonal(F.cross_entropy, torch.randn(6, 4), torch.arange(6) % 3, **options)


def test_without_a_graph() -> None:
    found = measured(method="exact", create_graph=True)
    assert all(value.requires_grad for value in found.values())
    assert not any(value.requires_grad for value in found.detach().values())
    assert all(torch.equal(value, found[name]) for name, value in found.detach().items())


def test_a_parameter_is_an_item() -> None:
    found = measured(method="exact")
    for name, part in found.by_parameter().items():
        assert torch.equal(found[name], part)
        assert name not in found
    with pytest.raises(KeyError, match="neither a layer nor a parameter"):
        found["0.wait"]


def test_totals_and_shares() -> None:
    found = measured(method="exact")
    assert found.total == pytest.approx(sum(d.sum().item() for d in found.values()))
    assert sum(found.shares().values()) == pytest.approx(1.0)
    assert found.shares()["0"] == pytest.approx(found["0"].sum().item() / found.total)


def test_arithmetic_carries_standard_errors_along() -> None:
    one, other = (measured(method="hutchinson", num_draws=20, generator=seeded(k)) for k in range(2))
    name = "0"
    a, b, x, y = one[name], other[name], one.standard_error[name], other.standard_error[name]  # type: ignore[index]
    for found, value, error in (
        (one + other, a + b, (x**2 + y**2).sqrt()),
        (one - other, a - b, (x**2 + y**2).sqrt()),
        (sum([one, other]), a + b, (x**2 + y**2).sqrt()),
        (3 * one, 3 * a, 3 * x),
        (-one, -a, x),
        (one / -4, a / -4, x / 4),
        (one * other, a * b, ((x * b) ** 2 + (y * a) ** 2).sqrt()),
        (9 - one, 9 - a, x),
        (2 / (one + 9), 2 / (a + 9), 2 * x / (a + 9) ** 2),
        (one / (other + 9), a / (b + 9), ((x / (b + 9)) ** 2 + (y * a / (b + 9) ** 2) ** 2).sqrt()),
    ):
        torch.testing.assert_close(found[name], value)
        torch.testing.assert_close(found.standard_error[name], error)  # type: ignore[index, union-attr]
    assert (measured(method="exact") * 2).standard_error is None
    with (
        CurvatureProbe(make(nn.Tanh()), layers="0") as probe,
        pytest.raises(InvalidArgumentError, match="other layers"),
    ):
        one + probe.fisher_diagonal(F.mse_loss, torch.randn(2, 4), torch.randn(2, 3))


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = measured(method="hutchinson", num_draws=5)
    found.save(tmp_path / "hessian.pt")
    again = Diagonals.load(tmp_path / "hessian.pt")
    assert (again.info, again.layer_types) == (found.info, found.layer_types)
    assert again.parameter_shapes() == found.parameter_shapes()
    assert all(torch.equal(again[k], found[k]) for k in found)
    assert all(torch.equal(again.standard_error[k], found.standard_error[k]) for k in found)  # type: ignore[index]
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(InvalidArgumentError, match=r"save\(\)"):
        Diagonals.load(tmp_path / "other.pt")
    with pytest.raises(InvalidArgumentError, match="map_location must be a device of this machine"):
        Diagonals.load(tmp_path / "hessian.pt", map_location="cuda:77")


def test_to_another_dtype() -> None:
    found = measured(method="hutchinson", num_draws=5).to(torch.float32)
    assert {d.dtype for d in (*found.values(), *found.standard_error.values())} == {torch.float32}  # type: ignore[union-attr]
    assert found.info["0"].num_draws == 5


def test_arithmetic_tells_how_both_were_come_by() -> None:
    exact, drawn = measured(method="exact"), measured(method="hutchinson", num_draws=20, generator=seeded())
    for found in (exact + drawn, drawn + exact):
        assert found.info["0"].num_draws == 20
        assert found.info["0"].num_hvps == exact.info["0"].num_hvps + drawn.info["0"].num_hvps
    noisy = drawn.replaced(drawn, {name: torch.ones_like(d) for name, d in drawn.items()})
    found = noisy + exact
    expected = len(found["0"]) ** 0.5 / found["0"].norm().item()
    assert found.info["0"].relative_error == pytest.approx(expected)
    copied = noisy.copy()
    assert (copied.info, list(copied)) == (noisy.info, list(noisy))


@pytest.mark.parametrize("other", ["2", None, {"0": 1.0}, torch.ones(3), 1j], ids=str)
def test_what_diagonals_cannot_be_combined_with(other: Any) -> None:
    with pytest.raises(InvalidTypeError, match="with one number"):
        measured(method="exact") * other


@pytest.mark.parametrize("file", [None, 3, [], b"x"])
def test_what_is_neither_a_path_nor_a_file_is_refused(file: Any) -> None:
    diagonals = measured()
    for use in (diagonals.save, Diagonals.load):
        with pytest.raises(InvalidTypeError, match="file must be the path of a file"):
            use(file)


def test_files_of_something_else(tmp_path: Path) -> None:
    found, file = measured(method="exact"), tmp_path / "file.pt"
    torch.save(found, file)
    for path, content in ((file, None), (tmp_path / "text", b"words"), (tmp_path / "empty", b"")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InvalidArgumentError, match=r"save\(\)"):
            Diagonals.load(path)
    with pytest.raises(FileNotFoundError):
        Diagonals.load(tmp_path / "none.pt")
    state = found.state_dict()
    for part, wrong in (
        ("version", 2),
        ("values", {}),
        ("values", dict.fromkeys(state["values"], 1.0)),
        ("values", {name: value[:-1] for name, value in state["values"].items()}),
        ("standard_error", {"0": found["0"]}),
        ("info", {"0": {}}),
        ("info", {name: kept | {"strategy": "magic"} for name, kept in state["info"].items()}),
        ("parameters", None),
    ):
        with pytest.raises(InvalidArgumentError, match=r"save\(\)"):
            Diagonals.from_state_dict(state | {part: wrong})
    assert torch.equal(Diagonals.from_state_dict(state)["0"], found["0"])
