"""Bad input: the library's own errors, each also the fitting built-in one, in words that say what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secorder import (
    CouplingError,
    CurvatureProbe,
    CurvatureRecorder,
    InvalidArgumentError,
    InvalidTypeError,
    NonFiniteError,
    ProbeStateError,
    SecorderError,
    diagnose,
    per_layer_fisher_diagonal,
    per_layer_hessian_diagonal,
    report,
    token_weights,
)

from .helpers import Net, data, make

BOTH = pytest.mark.parametrize("measure", [per_layer_hessian_diagonal, per_layer_fisher_diagonal])
Measure = Callable[..., Any]


@BOTH
def test_not_a_module(measure: Measure) -> None:
    with pytest.raises(InvalidTypeError, match=r"must be a torch\.nn\.Module, got function") as caught:
        measure(lambda x: x, F.cross_entropy, *data())
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, SecorderError)


@BOTH
def test_no_layer_matches(measure: Measure) -> None:
    assert measure(make(), F.cross_entropy, *data(), layer_types=nn.Conv3d) == {}
    assert measure(nn.ReLU(), F.cross_entropy, *data()) == {}
    with pytest.raises(InvalidArgumentError, match="no layer of the model matches") as caught:
        CurvatureProbe(make(), nn.Conv3d)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(InvalidArgumentError, match="the model has no parameters"):
        CurvatureProbe(nn.ReLU())


def test_a_name_that_matches_nothing() -> None:
    with pytest.raises(InvalidArgumentError, match=r"'fc1'.*the model has"):
        CurvatureProbe(make(), layers=["0", "fc1"])


@pytest.mark.parametrize("types", [[int], "conv", [3]])
def test_layer_types_that_are_no_module_types(types: Any) -> None:
    with pytest.raises(SecorderError, match="layer_types must"):
        CurvatureProbe(make(), types)


@BOTH
def test_loss_is_no_scalar(measure: Measure) -> None:
    with pytest.raises(InvalidArgumentError, match=r"shape \(6,\).*mean"):
        measure(make(), nn.CrossEntropyLoss(reduction="none"), *data())
    with pytest.raises(InvalidTypeError, match="scalar tensor, got float"):
        measure(make(), lambda f, t: F.cross_entropy(f, t).item(), *data())
    with pytest.raises(InvalidTypeError, match=r"complex one.*\.abs\(\)"):
        measure(make(), lambda f, t: f.sum() * 1j, *data())


@BOTH
def test_loss_does_not_depend_on_the_model(measure: Measure) -> None:
    with pytest.raises(InvalidArgumentError, match="does not depend on the model"):
        measure(make(), lambda f, t: F.cross_entropy(f.detach(), t), *data())
    with pytest.raises(InvalidArgumentError, match="does not depend on the model"):
        measure(make(), lambda f, t: torch.ones((), requires_grad=True) * 2, *data())


@BOTH
def test_layer_that_the_loss_does_not_reach_is_zero_when_another_is_reached(measure: Measure) -> None:
    model = Net(lambda m, x: m.used(x), conv=nn.Conv2d(1, 1, 1), used=nn.LayerNorm(4))
    found = measure(model, F.mse_loss, torch.randn(6, 4), torch.randn(6, 4))
    assert found["conv"].tolist() == [0, 0]


@BOTH
def test_batch_sizes_differ(measure: Measure) -> None:
    with pytest.raises(InvalidArgumentError, match="inputs hold 6 samples and targets 5"):
        measure(make(), F.cross_entropy, data(6)[0], data(5)[1])


@BOTH
def test_empty_batch(measure: Measure) -> None:
    with pytest.raises(InvalidArgumentError, match="batch is empty"):
        measure(make(), F.cross_entropy, *data(0))


@BOTH
@pytest.mark.parametrize("inputs", [3, "x", None, []])
def test_inputs_without_a_tensor(measure: Measure, inputs: Any) -> None:
    with pytest.raises(InvalidTypeError, match="inputs must be a tensor"):
        measure(make(), F.cross_entropy, inputs, data()[1])


@BOTH
def test_an_empty_data_set(measure: Measure) -> None:
    with pytest.raises(InvalidArgumentError, match="the data holds no batch"):
        measure(make(), F.cross_entropy, [])


@BOTH
def test_non_finite_loss_names_the_layer_where_it_began(measure: Measure) -> None:
    model = make()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"first in the output of layer '2'") as caught:
        measure(model, F.cross_entropy, *data())
    assert isinstance(caught.value, RuntimeError)
    inputs, targets = data()
    with pytest.raises(NonFiniteError, match="inputs hold non-finite values"):
        measure(make(), F.cross_entropy, inputs / 0, targets)


@BOTH
def test_loss_fn_is_not_callable(measure: Measure) -> None:
    with pytest.raises(InvalidTypeError, match="loss_fn must be callable"):
        measure(make(), "cross_entropy", *data())


@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_one(value: int) -> None:
    inputs, targets = data()
    with CurvatureProbe(make()) as probe:
        for call in (
            lambda: probe.hessian_diagonal(F.cross_entropy, inputs, targets, num_draws=value),
            lambda: probe.fisher_diagonal(F.cross_entropy, inputs, targets, num_draws=value),
            lambda: probe.hessian_diagonal(F.cross_entropy, inputs, targets, chunk_size=value),
            lambda: probe.fisher_diagonal(F.cross_entropy, inputs, targets, chunk_size=value),
        ):
            with pytest.raises(InvalidArgumentError, match="must be at least 1"):
                call()


@BOTH
@pytest.mark.parametrize(
    "options",
    [{"chunk_size": 1.5}, {"num_draws": "many"}, {"rtol": "0.1"}, {"generator": 3}, {"layer_types": 3}],
    ids=str,
)
def test_arguments_of_another_type(measure: Measure, options: dict[str, Any]) -> None:
    kind = {"method": "hutchinson"} if measure is per_layer_hessian_diagonal else {"fisher_type": "type-2"}
    with pytest.raises(InvalidTypeError, match=f"{next(iter(options))} must be"):
        measure(make(), F.cross_entropy, *data(), **kind, **options)


def test_how_many_eigenvalues_and_how_close() -> None:
    with CurvatureProbe(make()) as probe:
        for options in ({"count": 0}, {"max_iterations": 0}, {"tolerance": -1.0}, {"tolerance": float("nan")}):
            with pytest.raises(InvalidArgumentError, match=f"{next(iter(options))} must be"):
                probe.hessian_eigenvalues(F.cross_entropy, *data(), **options)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"reduction": "none"}, InvalidArgumentError),
        ({"every": 0}, InvalidArgumentError),
        ({"every": 1.5}, InvalidTypeError),
        ({"every": True}, InvalidTypeError),
        ({"decay": 1.0}, InvalidArgumentError),
        ({"decay": 0}, InvalidArgumentError),
        ({"decay": "slow"}, InvalidTypeError),
    ],
    ids=str,
)
def test_probe_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    model = make()
    with pytest.raises(error, match=next(iter(arguments))):
        CurvatureProbe(model, **arguments)
    assert not model._forward_pre_hooks
    assert not model[0]._forward_hooks


def test_unknown_names_of_methods() -> None:
    inputs, targets = data()
    with pytest.raises(InvalidArgumentError, match='"hutchinson"'):
        per_layer_hessian_diagonal(make(), F.cross_entropy, inputs, targets, method="lanczos")
    with pytest.raises(InvalidArgumentError, match='"type-2"'):
        per_layer_fisher_diagonal(make(), F.cross_entropy, inputs, targets, fisher_type="type2")
    with pytest.raises(InvalidArgumentError, match="create_graph"):
        per_layer_hessian_diagonal(make(), F.cross_entropy, inputs, targets, method="hutchinson", create_graph=True)


def test_use_after_detach() -> None:
    probe = CurvatureProbe(make())
    probe.detach()
    for call in (probe.hessian_diagonal, probe.fisher_diagonal):
        with pytest.raises(ProbeStateError, match="detached"):
            call(F.cross_entropy, *data())


def test_data_parallel_is_refused() -> None:
    with pytest.raises(InvalidTypeError, match="DataParallel"):
        CurvatureProbe(nn.DataParallel(make()))


def test_lazy_and_complex_layers_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="lazy"):
        CurvatureProbe(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(InvalidArgumentError, match="complex"):
        CurvatureProbe(nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64)))


def test_coupled_loss_has_no_per_sample_gradient() -> None:
    def contrastive(f: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(f @ f.T, torch.arange(len(f)))

    with pytest.raises(CouplingError, match="couples the samples"):
        per_layer_fisher_diagonal(make(), contrastive, *data())


def test_batch_statistics_have_no_per_sample_gradient() -> None:
    model = make(nn.BatchNorm1d(5))
    with pytest.raises(CouplingError, match="eval"):
        per_layer_fisher_diagonal(model, F.cross_entropy, *data())


@pytest.mark.parametrize(
    "arguments",
    [{"fisher_type": "type-2"}, {"inputs": torch.zeros(3, 4)}, {"targets": torch.zeros(3)}, {"num_draws": 5},
     {"generator": torch.Generator()}, {"create_graph": True}, {"chunk_size": 2}],
    ids=lambda arguments: next(iter(arguments)),
)  # fmt: skip
def test_arguments_of_a_measurement_without_a_loss(arguments: dict[str, Any]) -> None:
    model, batch = make(), data()
    with CurvatureProbe(model, reduction="mean") as probe:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        with pytest.raises(InvalidArgumentError, match="without loss_fn"):
            probe.fisher_diagonal(**arguments)
        assert set(probe.fisher_diagonal()) == {"0", "2"}


def test_a_measurement_with_a_loss_has_no_layers_to_skip() -> None:
    with pytest.raises(InvalidArgumentError, match="missing='skip' goes with what training accumulated"):
        CurvatureProbe(make()).fisher_diagonal(F.cross_entropy, *data(), missing="skip")


LOSS = torch.nn.CrossEntropyLoss


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (
            lambda m, x, y: diagnose(m, LOSS, x, y),
            r"is the class CrossEntropyLoss, not made yet: pass CrossEntropyLoss",
        ),
        (lambda m, x, y: diagnose(m, LOSS, iter([(x, y)])), r"pass CrossEntropyLoss\(\)"),
        (lambda m, x, y: CurvatureProbe(m).hessian_trace(LOSS, x, y), r"pass CrossEntropyLoss\(\)"),
        (lambda m, x, y: CurvatureProbe(m, reduction=LOSS), r"reduction is the class CrossEntropyLoss"),
        (lambda m, x, y: CurvatureRecorder(CurvatureProbe(m), hessian_every=1, loss_fn=LOSS, batch=(x, y)), "loss_fn"),
        (lambda m, x, y: diagnose(m, "cross_entropy", x, y), "must be callable as loss_fn"),
        (
            lambda m, x, y: diagnose(m, LOSS(), (x, y)),
            r"if the inputs are \(inputs, targets\), pass them as two arguments",
        ),
        (lambda m, x, y: diagnose(m, LOSS(), [x, y]), "pass them as two arguments"),
        (lambda m, x, y: CurvatureProbe(m).fisher_diagonal(LOSS(), (x, y)), "pass them as two arguments"),
        (lambda m, x, y: CurvatureProbe(m).hessian_diagonal(LOSS(), x), "failed without targets"),
        (
            lambda m, x, y: per_layer_hessian_diagonal(m, nn.MSELoss(), x),
            "pass targets. .'NoneType' obj",
        ),
        (lambda m, x, y: per_layer_fisher_diagonal(m, LOSS(), x, y.tolist()), "hold no tensor, .*as_tensor"),
        (lambda m, x, y: per_layer_hessian_diagonal(m, nn.MSELoss(), x, x.numpy()), "a ndarray of shape .*as_tensor"),
        (lambda m, x, y: per_layer_fisher_diagonal(m, LOSS(), x[0], y[0]), r"pass inputs\[None\] and targets\[None\]"),
        (lambda m, x, y: per_layer_fisher_diagonal(nn.Tanh(), m, x, y), "pass the model first, then the loss"),
        (
            lambda m, x, y: CurvatureProbe(m, layers="hidden1"),
            "matches 'hidden1': the model has '0'",
        ),
        (lambda m, x, y: report(CurvatureProbe(m)), r"got CurvatureProbe: pass what fisher_diagonal\(\) returns"),  # type: ignore[arg-type]
        (lambda m, x, y: token_weights(y), "not the labels"),
    ],
)
def test_misuse_is_told_in_our_own_words(measure: Callable[..., Any], message: str) -> None:
    with pytest.raises(SecorderError, match=message):
        measure(make(), *data())
