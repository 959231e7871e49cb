"""Fisher (online and one-shot) and Hessian of every Linear and Conv2d setting against brute force."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secorder import CurvatureProbe, per_layer_fisher_diagonal, per_layer_hessian_diagonal

from .reference import assert_all_close, fisher_by_sample, ggn_by_sample, hessian_by_element

N = 5
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}


def online(model: nn.Module, loss_fn: Any, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Any:
    with CurvatureProbe(model, reduction=reduction) as probe:
        loss_fn(model(inputs), targets).backward()
        model.zero_grad()
        assert probe.num_samples == len(inputs)
        return probe.fisher_diagonal()


def check(model: nn.Module, loss_fn: Any, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> None:
    fisher = fisher_by_sample(model, loss_fn, inputs, targets, len(inputs))
    hessian = hessian_by_element(model, loss_fn, inputs, targets)
    found = per_layer_hessian_diagonal(model, loss_fn, inputs, targets, method="exact").by_parameter()
    assert set(found) == set(hessian)
    assert_all_close(found, hessian)
    assert_all_close(per_layer_fisher_diagonal(model, loss_fn, inputs, targets).by_parameter(), fisher)
    assert_all_close(online(model, loss_fn, inputs, targets, reduction).by_parameter(), fisher)


def batch(kind: str, outputs: int, extra: tuple[int, ...] = ()) -> tuple[Any, Tensor]:
    if kind == "classification":
        return nn.CrossEntropyLoss(), torch.randint(outputs, (N, *extra))
    return nn.MSELoss(), torch.randn(N, *extra, outputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("extra", [(), (3,), (2, 3)], ids=["2d", "3d", "4d"])
def test_linear(activation: str, bias: bool, kind: str, extra: tuple[int, ...]) -> None:
    last = nn.Linear(4, 3, bias=bias)
    model = nn.Sequential(nn.Linear(3, 4, bias=bias), ACTIVATIONS[activation](), last)
    loss_fn, targets = batch(kind, 3, extra)
    if kind == "classification" and extra:
        classify = nn.CrossEntropyLoss()
        loss_fn = lambda f, t: classify(f.movedim(-1, 1), t)  # noqa: E731
    check(model, loss_fn, torch.randn(N, *extra, 3), targets)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_sum_reduction(kind: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    mean, targets = batch(kind, 3)
    check(model, type(mean)(reduction="sum"), torch.randn(N, 3), targets, reduction="sum")


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "stride": {"stride": 2},
    "asymmetric_stride": {"stride": (2, 1)},
    "padding": {"padding": 2},
    "asymmetric_padding": {"padding": (0, 1)},
    "same": {"padding": "same"},
    "same_even_kernel": {"padding": "same", "kernel_size": (2, 4)},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": (1, 2), "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "same_circular": {"padding": "same", "padding_mode": "circular"},
    "dilation": {"dilation": 2, "padding": 1},
    "asymmetric_dilation": {"dilation": (1, 2)},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "padding": 1},
    "asymmetric_kernel": {"kernel_size": (1, 3)},
    "one_by_one": {"kernel_size": 1},
    "covers_the_image": {"kernel_size": 5},
    "all_at_once": {"stride": 2, "padding": (2, 1), "dilation": (1, 2), "groups": 2, "kernel_size": (3, 2)},
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("setting", CONVOLUTIONS)
def test_conv2d(setting: str, channels_last: bool) -> None:
    options = {"kernel_size": 3, **CONVOLUTIONS[setting]}
    model = nn.Sequential(nn.Conv2d(4, 4, **options), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    inputs = torch.randn(N, 4, 5, 5)
    if channels_last:
        model, inputs = model.to(memory_format=torch.channels_last), inputs.to(memory_format=torch.channels_last)
    check(model, nn.MSELoss(), inputs, torch.randn(N, 16))


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_convolutional_network(activation: str, kind: str) -> None:
    act = ACTIVATIONS[activation]
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), act(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), act(), nn.Flatten(), nn.Linear(8, 3)
    )
    loss_fn, targets = batch(kind, 3)
    check(model, loss_fn, torch.randn(N, 1, 6, 6), targets)


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    size=st.tuples(st.integers(5, 7), st.integers(5, 7)),
)
def test_any_conv2d_fisher(kernel, stride, padding, dilation, groups, bias, size) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups, bias)
    inputs = torch.randn(3, 4, *size)
    targets = torch.randn_like(model(inputs))
    fisher = fisher_by_sample(model, nn.MSELoss(), inputs, targets, 3)
    assert_all_close(online(model, nn.MSELoss(), inputs, targets).by_parameter(), fisher)
    assert_all_close(per_layer_fisher_diagonal(model, nn.MSELoss(), inputs, targets).by_parameter(), fisher)


@settings(max_examples=20, deadline=None)
@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    activation=st.sampled_from(["tanh", "relu", "gelu"]),
    samples=st.integers(1, 6),
    bias=st.booleans(),
    classification=st.booleans(),
)
def test_any_mlp(widths: list[int], activation: str, samples: int, bias: bool, classification: bool) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), ACTIVATIONS[activation]()]
    model = nn.Sequential(*layers)
    inputs = torch.randn(samples, widths[0])
    moved = torch.func.jacrev(model)(inputs)
    assume(samples > 1 or moved.any())  # of one sample of a dead net, nothing tells where samples are
    if classification:
        check(model, nn.CrossEntropyLoss(), inputs, torch.randint(widths[-1], (samples,)))
    else:
        check(model, nn.MSELoss(), inputs, torch.randn(samples, widths[-1]))


LOSSES = {
    "cross_entropy": (F.cross_entropy, lambda: torch.randint(3, (N,))),
    "label_smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), lambda: torch.randint(3, (N,))),
    "soft_labels": (nn.CrossEntropyLoss(), lambda: torch.randn(N, 3).softmax(1)),
    "binary": (nn.BCEWithLogitsLoss(), lambda: torch.rand(N, 3)),
    "huber": (nn.HuberLoss(), lambda: torch.randn(N, 3)),
    "poisson": (nn.PoissonNLLLoss(), lambda: torch.rand(N, 3)),
    "not_convex": (lambda f, t: (torch.sin(3 * f) * t).sum(1).mean(), lambda: torch.randn(N, 3)),
}


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss: str, activation: str) -> None:
    loss_fn, make = LOSSES[loss]
    model = nn.Sequential(nn.Linear(4, 6), ACTIVATIONS[activation](), nn.Linear(6, 3))
    inputs, targets = torch.randn(N, 4), make()
    check(model, loss_fn, inputs, targets)
    found = per_layer_fisher_diagonal(model, loss_fn, inputs, targets, fisher_type="type-2").by_parameter()
    assert_all_close(found, ggn_by_sample(model, loss_fn, inputs, targets))


def test_weighted_classes_one_shot() -> None:
    """The batch's loss divides by the weights in it; a batch of one has its own: the definition is ℓ_n's."""
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]))
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    inputs, targets = torch.randn(N, 4), torch.tensor([0, 1, 2, 2, 0])
    found = per_layer_fisher_diagonal(model, loss_fn, inputs, targets).by_parameter()
    assert_all_close(found, fisher_by_sample(model, loss_fn, inputs, targets, N))
    found = per_layer_hessian_diagonal(model, loss_fn, inputs, targets, method="exact").by_parameter()
    assert_all_close(found, hessian_by_element(model, loss_fn, inputs, targets))


def test_a_loss_that_vmap_cannot_run() -> None:
    def loss_fn(f: Tensor, t: Tensor) -> Tensor:
        return F.mse_loss(f, t) if f.sum().item() > -1e9 else f.sum()

    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    check(model, loss_fn, torch.randn(N, 4), torch.randn(N, 3))


def test_one_sample() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    check(model, nn.CrossEntropyLoss(), torch.randn(1, 1, 4, 4), torch.tensor([1]))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 1000])
def test_chunks_do_not_change_the_result(chunk_size: int) -> None:
    model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))
    inputs, targets = torch.randn(N, 4), torch.randint(3, (N,))
    whole = per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets, method="exact")
    parts = per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets, chunk_size=chunk_size, method="exact")
    assert_all_close(parts, whole)
    whole = per_layer_fisher_diagonal(model, F.cross_entropy, inputs, targets, fisher_type="type-2")
    parts = per_layer_fisher_diagonal(
        model, F.cross_entropy, inputs, targets, fisher_type="type-2", chunk_size=chunk_size
    )
    assert_all_close(parts, whole)


def test_ways_are_as_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix must exercise each exact strategy, not one of them alone; chains are carried before all others."""
    inputs, targets = torch.randn(N, 4), torch.randint(3, (N,))
    tanh = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    info = per_layer_hessian_diagonal(tanh, F.cross_entropy, inputs, targets, method="exact").info
    assert {i.strategy for i in info.values()} == {"chain"}
    monkeypatch.setattr("secorder.oneshot.hessian.investigate.find_chain", lambda *_: None)
    info = per_layer_hessian_diagonal(tanh, F.cross_entropy, inputs, targets, method="exact").info
    assert (info["0"].strategy, info["2"].strategy) == ("output-basis", "columns")
    images = torch.randn(N, 1, 6, 6)
    conv = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(50, 3))
    info = per_layer_hessian_diagonal(conv, F.cross_entropy, images, targets, method="exact").info
    assert (info["0"].strategy, info["3"].strategy) == ("parameter-basis", "columns")
    relu = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    info = per_layer_hessian_diagonal(relu, F.cross_entropy, inputs, targets, method="exact").info
    assert {i.strategy for i in info.values()} == {"columns"}
    assert all(i.num_hvps > 0 for i in info.values())
