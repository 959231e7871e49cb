"""Measurements of a data set are those of all its samples together, and tell their error over batches."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from secorder import (
    CurvatureProbe,
    CurvatureWarning,
    InvalidArgumentError,
    InvalidTypeError,
    diagnose,
    per_layer_hessian_diagonal,
)
from secorder.oneshot.data_set import is_data_set

from ..helpers import make, mlp, seeded
from ..reference import assert_all_close, assert_close, fisher_by_sample, hessian_by_element

X, Y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
SIZES = (6, 6, 8)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(X.split(SIZES), Y.split(SIZES), strict=True)


def summed(f: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(f, t, reduction="sum")


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, summed])
def test_batches_of_one_and_of_two(loss_fn: Any) -> None:
    """The next one tells with the first whether the loss is a mean or a sum, unless both have the same targets."""
    model, expected = make(), hessian_by_element(make(), loss_fn, X[:5], Y[:5])
    with CurvatureProbe(model) as probe:
        for size in (1, 2):
            loader = DataLoader(TensorDataset(X[:5], Y[:5]), size)
            assert_all_close(probe.hessian_diagonal(loss_fn, loader, method="exact").by_parameter(), expected)
            later = DataLoader(TensorDataset(X[[0, 3, 1]], Y[[0, 3, 1]]), size)  # the first two are of one class
            expected_later = hessian_by_element(model, loss_fn, X[[0, 3, 1]], Y[[0, 3, 1]])
            assert_all_close(probe.hessian_diagonal(loss_fn, later, method="exact").by_parameter(), expected_later)
            assert probe.hessian_eigenvalues(loss_fn, later, max_iterations=2)
        alike = [(X[:1], Y[:1]), (X[1:2], Y[:1])]
        for measure in (probe.hessian_diagonal, probe.hessian_eigenvalues):
            if loss_fn is F.cross_entropy:  # whose definition tells
                assert measure(loss_fn, alike)
            else:
                with pytest.raises(InvalidArgumentError, match="a mean or a sum"):
                    measure(loss_fn, alike)


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, summed])
def test_diagonals_of_all_samples_together(loss_fn: Any) -> None:
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with CurvatureProbe(model) as probe:
        fisher = probe.fisher_diagonal(loss_fn, batches())
        hessian = probe.hessian_diagonal(loss_fn, batches(), method="exact")
        parts = [probe.fisher_diagonal(loss_fn, *batch) for batch in batches()]
        trace = probe.hessian_trace(loss_fn, batches(), method="exact")
        ggn = probe.hessian_trace(loss_fn, DataLoader(TensorDataset(X, Y), 6), of="ggn", by="parameter", method="exact")
        whole = probe.hessian_trace(loss_fn, X, Y, of="ggn", by="parameter", method="exact")
    assert_all_close(fisher.by_parameter(), fisher_by_sample(model, loss_fn, X, Y, 20))
    assert_all_close(hessian.by_parameter(), hessian_by_element(model, loss_fn, X, Y))
    for name, value in fisher.items():
        spread = sum(n * (part[name] - value) ** 2 for n, part in zip(SIZES, parts, strict=True))
        assert_close(fisher.standard_error[name], (spread / 2 / 20).sqrt())  # type: ignore[index, operator, union-attr]
        assert trace[name].value == pytest.approx(hessian[name].sum().item())
        assert trace[name].standard_error > 0
    assert {k: t.value for k, t in ggn.items()} == pytest.approx({k: t.value for k, t in whole.items()})
    assert hessian.info["0"].num_batches == 3
    assert hessian.info["4"].strategy == "chain"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_one_batch_is_a_batch_and_the_functions_take_them_too() -> None:
    model = make(nn.Tanh())
    loader = DataLoader(TensorDataset(X, Y), 20)
    found = per_layer_hessian_diagonal(model, F.cross_entropy, loader, method="exact")
    assert found.standard_error is None
    assert_all_close(found.by_parameter(), hessian_by_element(model, F.cross_entropy, X, Y))


def test_estimates_of_a_data_set() -> None:
    model = mlp()
    with CurvatureProbe(model) as probe:
        exact = probe.hessian_diagonal(F.cross_entropy, X, Y, method="exact")
        loader = [(X.roll(k, 0), Y.roll(k, 0)) for k in range(20)]
        how: Any = {"method": "hutchinson", "num_draws": 30, "generator": seeded()}
        drawn = probe.hessian_diagonal(F.cross_entropy, iter(loader), **how)
    assert drawn.info["0"].num_draws == 600
    error = drawn.standard_error["0"]  # type: ignore[index]
    assert ((drawn["0"] - exact["0"]) / error)[error > 0].square().mean() < 3  # what differs is the draws alone
    assert drawn.info["0"].relative_error == pytest.approx((error.norm() / drawn["0"].norm()).item())


@pytest.mark.parametrize("by", ["layer", "parameter"])
@pytest.mark.parametrize("of", ["hessian", "ggn", "fisher"])
def test_eigenvalues_are_those_of_the_whole(of: Any, by: Any) -> None:
    for loss_fn in (F.cross_entropy, summed):
        with CurvatureProbe(mlp()) as probe:
            found = probe.hessian_eigenvalues(loss_fn, batches(), of=of, by=by, tolerance=1e-10)
            whole = probe.hessian_eigenvalues(loss_fn, X, Y, of=of, by=by, tolerance=1e-10)
        assert list(found) == list(whole)
        for name, values in found.items():
            assert values.top == pytest.approx(whole[name].top)
            assert values.converged


def test_what_passes_for_a_data_set() -> None:
    class Graph:
        """A batch object that can be iterated over, as those of graph libraries can."""

        def __init__(self) -> None:
            self.x = X

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            yield "x", self.x

    class Loader(Graph):
        def __iter__(self) -> Iterator[Any]:
            yield self.x, Y

    assert is_data_set(Loader(), None)
    assert is_data_set(DataLoader(TensorDataset(X, Y)), None)
    assert is_data_set(iter([(X, Y)]), None)
    assert is_data_set([(X, Y), (X, Y)], None)
    assert is_data_set(list(DataLoader(TensorDataset(X, Y))), None)
    assert is_data_set([{"input": X}, {"input": X}], None)
    assert not is_data_set([X, Y], None)
    assert not is_data_set([(X, X), (X, X)], Y)
    assert not any(is_data_set(batch, None) for batch in (X, [X], (X, Y), {"x": X}, Graph(), None))
    for stream in (iter([X]), DataLoader(X)):
        with pytest.raises(InvalidArgumentError, match=r"yields \(inputs, targets\): pass no targets beside it"):
            is_data_set(stream, Y)


@pytest.mark.parametrize("measure", [CurvatureProbe.hessian_diagonal, CurvatureProbe.hessian_trace])
def test_what_is_not_finite_in_a_later_batch_is_told_of(measure: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Tanh())
    nn.init.ones_(model[0].weight)
    batches = [(torch.full((3, 2), value), torch.randn(3, 2)) for value in (1.0, torch.inf)]  # where tanh is flat
    probe = CurvatureProbe(model)
    with pytest.warns(CurvatureWarning, match="mean over the batches of '0' holds nan"):
        measure(probe, F.mse_loss, batches)


def test_batches_without_samples_count_as_nothing() -> None:
    model, parts = make(), [(X[:0], Y[:0]), (X[:6], Y[:6]), (X[:0], Y[:0]), (X[6:], Y[6:])]
    expected = hessian_by_element(model, F.cross_entropy, X, Y)
    with CurvatureProbe(model) as probe:
        found = probe.hessian_diagonal(F.cross_entropy, parts, method="exact")
        assert_all_close(found.by_parameter(), expected)
        assert found.info["0"].num_batches == 2
        top = probe.hessian_eigenvalues(F.cross_entropy, parts, tolerance=1e-6)["0"].top
        assert top == pytest.approx(probe.hessian_eigenvalues(F.cross_entropy, X, Y, tolerance=1e-6)["0"].top)
        assert probe.estimate_cost(F.cross_entropy, parts).seconds > 0
        with pytest.raises(InvalidArgumentError, match="holds no batch"):
            probe.hessian_diagonal(F.cross_entropy, parts[:1])
    assert diagnose(model, F.cross_entropy, parts).num_samples == 20


def test_misuse_is_told() -> None:
    with CurvatureProbe(mlp()) as probe:
        for data, error, match in (
            (iter([X, X]), InvalidArgumentError, "failed without targets"),
            (iter([(X, Y, X)]), InvalidTypeError, "must yield"),
            (iter(["text"]), InvalidTypeError, "must yield"),
            (TensorDataset(X, Y), InvalidTypeError, "DataLoader of it"),
            (iter([]), InvalidArgumentError, "no batch"),
        ):
            with pytest.raises(error, match=match):
                probe.hessian_diagonal(F.cross_entropy, data)
        with pytest.raises(InvalidArgumentError, match="no targets beside"):
            probe.hessian_diagonal(F.cross_entropy, DataLoader(X), Y)
        with pytest.raises(InvalidArgumentError, match="one batch"):
            probe.fisher_diagonal(F.cross_entropy, batches(), create_graph=True)
        for one_batch in (probe.verify, probe.hessian_facts):
            with pytest.raises(InvalidTypeError, match=rf"{one_batch.__name__}\(\) takes one batch"):
                one_batch(F.cross_entropy, DataLoader(TensorDataset(X, Y), 6))

    def odd(f: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(f, t) * len(t) ** 0.5

    with CurvatureProbe(mlp()) as probe, pytest.raises(InvalidArgumentError, match="mean nor a sum"):
        probe.hessian_diagonal(odd, batches())
    with (
        CurvatureProbe(mlp(), reduction="mean") as probe,
        pytest.warns(CurvatureWarning, match="weighted as those of a mean"),
    ):
        assert probe.hessian_diagonal(odd, batches(), method="exact").info["0"].num_batches == 3


@pytest.mark.parametrize(
    "inputs_alone", [lambda x: x, lambda x: (x,), lambda x: {"input": x}], ids=["tensor", "tuple", "dict"]
)
def test_batches_without_targets(inputs_alone: Any) -> None:
    def loss_fn(f: Tensor, t: None) -> Tensor:
        return f.sin().mean()

    with CurvatureProbe(make()) as probe:
        found = probe.fisher_diagonal(loss_fn, iter([inputs_alone(X[:6]), inputs_alone(X[6:])]))
        assert_all_close(found, probe.fisher_diagonal(loss_fn, X))


def test_loaders_of_streams_have_no_length() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from zip(X, Y, strict=True)

    loader: Any = DataLoader(Stream(), 6)
    with CurvatureProbe(make()) as probe:
        found = probe.fisher_diagonal(F.cross_entropy, loader, progress=True)
        assert_all_close(found, probe.fisher_diagonal(F.cross_entropy, X, Y))
        with pytest.raises(InvalidArgumentError, match="has no length"):
            probe.estimate_cost(F.cross_entropy, loader)
    assert diagnose(make(), F.cross_entropy, loader).num_samples == 20


def test_random_numbers_of_a_loader_are_put_back() -> None:
    loader = DataLoader(TensorDataset(X, Y), 5, shuffle=True)
    with CurvatureProbe(mlp()) as probe:
        torch.manual_seed(1)
        before = torch.get_rng_state()
        probe.fisher_diagonal(F.cross_entropy, loader)
        probe.hessian_eigenvalues(F.cross_entropy, loader, max_iterations=2)
        probe.estimate_cost(F.cross_entropy, loader)
        diagnose(probe._model, F.cross_entropy, loader)
    assert torch.equal(torch.get_rng_state(), before)
