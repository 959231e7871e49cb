"""Statistics of diagonals."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from secorder import InvalidTypeError, get_layer_curvature_stats
from secorder.monitor.statistics import STATISTICS, layer_statistics, merged, summarize


def test_statistics() -> None:
    stats = get_layer_curvature_stats({"a": torch.tensor([[1.0, 2.0], [3.0, 6.0]]), "b": torch.tensor([5.0])})
    assert stats == {
        "a": {"mean": 3.0, "std": pytest.approx(14**0.5 / 3**0.5), "max": 6.0, "min": 1.0},
        "b": {"mean": 5.0, "std": 0.0, "max": 5.0, "min": 5.0},
    }
    assert all(type(value) is float for layer in stats.values() for value in layer.values())
    assert get_layer_curvature_stats({}) == {}
    assert get_layer_curvature_stats({"h": torch.tensor([1.0, 3.0], dtype=torch.float16)})["h"]["mean"] == 2.0


def test_statistics_take_one_transfer_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = []
    for name in ("tolist", "item", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, o=original, n=name: (transfers.append(n), o(self, *a))[1]
        )
    get_layer_curvature_stats({str(i): torch.randn(5) for i in range(20)})
    assert transfers == ["tolist"]


def test_an_empty_tensor_has_no_statistics() -> None:
    assert all(math.isnan(value) for value in get_layer_curvature_stats({"a": torch.zeros(0)})["a"].values())


@pytest.mark.parametrize(
    ("curvatures", "message"),
    [
        ([torch.zeros(2)], "must be a mapping of layer names to tensors, got list"),
        (torch.zeros(2), "must be a mapping of layer names to tensors, got Tensor"),
        (None, "must be a mapping of layer names to tensors, got NoneType"),
        ({"fc": [1.0, 2.0]}, "layer 'fc' must be a tensor of real numbers, got list"),
        ({"fc": torch.zeros(2), "fc2": 1.0}, "layer 'fc2' must be a tensor of real numbers, got float"),
        ({"fc": torch.zeros(2, dtype=torch.complex64)}, r"layer 'fc' .* got torch\.complex64"),
        ({"fc": torch.zeros(2, dtype=torch.int64)}, r"layer 'fc' .* got torch\.int64"),
        ({"fc": torch.zeros(2, dtype=torch.bool)}, r"layer 'fc' .* got torch\.bool"),
        ({"fc": torch.zeros(2, device="meta")}, r"layer 'fc' must be dense, .* got a tensor on the meta device"),
        ({"fc": torch.zeros(2).to_sparse()}, r"layer 'fc' must be dense, .* got torch\.sparse_coo"),
    ],
)
@pytest.mark.parametrize("function", [get_layer_curvature_stats, layer_statistics, summarize])
def test_what_is_no_mapping_of_real_tensors(function: Callable[..., Any], curvatures: Any, message: str) -> None:
    with pytest.raises(InvalidTypeError, match=message):
        function(curvatures)


def test_summaries_against_numpy() -> None:
    values = torch.randn(1000) ** 3
    summary = summarize({"a": values})["a"]
    logs = np.log10(np.abs(values.numpy()))
    assert summary.statistics["std"] == pytest.approx(np.std(values.numpy(), ddof=1))
    assert summary.statistics["negative"] == pytest.approx((values < 0).double().mean().item())
    assert (summary.low, summary.high) == (pytest.approx(logs.min()), pytest.approx(logs.max()))
    assert summary.sum == pytest.approx(logs.sum())
    expected, _ = np.histogram(logs, bins=len(summary.counts))
    assert np.abs(np.array(summary.counts) - expected).sum() <= 2  # an entry on the border of two bins


def test_many_layers_of_any_sizes_keep_their_order() -> None:
    """Layers of one size are looked at together, in pieces that do not grow."""
    sizes = [3, 5, 3, 0, 5, 1, 3, 70_000, 5, 70_000, 600_000, 70_000] + [70_000] * 15
    layers = {
        str(i): torch.randn(size, dtype=torch.float32 if i % 3 else torch.float64) for i, size in enumerate(sizes)
    }
    together = summarize(layers)
    assert list(together) == list(layers)
    for name, diagonal in layers.items():
        alone = summarize({name: diagonal})[name]
        assert together[name].statistics == pytest.approx(alone.statistics, rel=1e-12, nan_ok=True)
        assert together[name].counts == alone.counts


@pytest.mark.parametrize("size", [70_000, 200_000])
@pytest.mark.parametrize("kind", ["fisher", "some zero", "negative", "nan", "inf", "alike", "zero"])
def test_large_layers_of_any_kind_against_numpy(kind: str, size: int) -> None:
    """Of what is a Fisher's, each entry is looked at a few times only; nothing of others is lost by that."""
    values = torch.rand(size, dtype=torch.float32) ** 8
    change: dict[str, Callable[[], Any]] = {
        "some zero": lambda: values[:1000].zero_(),
        "negative": lambda: values[7].neg_(),
        "nan": lambda: values[7].fill_(torch.nan),
        "inf": lambda: values[7].fill_(torch.inf),
        "alike": lambda: values.mul_(1e-6).add_(1.0),
        "zero": lambda: values.zero_(),
    }
    if kind in change:
        change[kind]()
    array = values.double().numpy()
    with np.errstate(invalid="ignore"):
        expected = {
            "mean": array.mean(),
            "std": array.std(ddof=1),
            "max": array.max(),
            "min": array.min(),
            "trace": array.sum(),
            "negative": (array < 0).mean(),
            "zero": (array == 0).mean(),
            "nonfinite": (~np.isfinite(array)).mean(),
        }
    found = layer_statistics({"a": values})["a"]
    assert found == pytest.approx(expected, rel=1e-10, abs=0, nan_ok=True)
    assert found["zero"] == expected["zero"]


def test_summaries_put_together_are_that_of_all_entries() -> None:
    parts = [torch.randn(100) * 3, torch.randn(7) - 5, torch.zeros(3), torch.zeros(0), torch.randn(1)]
    summaries = summarize({str(i): part for i, part in enumerate(parts)})
    found = merged([(part.numel(), summaries[str(i)]) for i, part in enumerate(parts)])
    whole = summarize({"all": torch.cat(parts)})["all"]
    assert found.statistics == pytest.approx(whole.statistics, rel=1e-10)
    assert list(found.statistics) == list(STATISTICS)
    assert (found.low, found.high, found.sum) == pytest.approx((whole.low, whole.high, whole.sum))
    assert sum(found.counts) == sum(whole.counts)
    bad = merged([(1, summaries["4"]), (2, summarize({"b": torch.tensor([torch.nan, 1.0])})["b"])])
    assert all(math.isnan(bad.statistics[key]) for key in ("mean", "std", "max", "min", "trace"))
    assert bad.statistics["nonfinite"] == pytest.approx(1 / 3)
    assert math.isnan(merged([(0, summaries["3"])]).statistics["mean"])


@pytest.mark.parametrize("shape", [(512, 256, 3, 3), (128, 64, 5, 5), (64, 1000, 4), (96, 3, 11, 11), (250, 2, 7)])
def test_a_part_of_the_entries_is_none_of_the_taps_alone(shape: tuple[int, ...]) -> None:
    """A layer of which only the middle of each kernel is used: of 144 entries each, none was of a middle."""
    values = torch.zeros(shape)
    values[..., shape[-1] // 2] = 1.0
    part = summarize({"a": values}, entries=2**13)["a"]
    assert sum(part.counts) / min(2**13, values.numel()) == pytest.approx(1 / shape[-1], rel=0.01)


def test_the_histogram_of_a_part_of_the_entries() -> None:
    values = torch.randn(1000).exp()
    whole, part = (summarize({"a": values}, entries=entries)["a"] for entries in (None, 250))
    assert part.statistics == whole.statistics
    assert (sum(part.counts), sum(whole.counts)) == (250, 1000)
    assert part.high in values.double().log10().tolist()
