"""The end of a backward: several forwards, second backwards, layers that nothing reaches, tied layers."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe, CurvatureWarning
from secorder.layers.low_precision import contraction
from secorder.online import closing, norms

from ..helpers import Net, data, make, mlp, reference
from ..reference import assert_all_close


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_a_second_backward_through_one_forward(same: bool, frozen: bool) -> None:
    """The same loss once more changes nothing; another one is to be told of."""
    model, batch = make(), data()
    model[-1].requires_grad_(not frozen)
    probe = CurvatureProbe(model, layers="2" if frozen else None, reduction="mean")
    outputs = model(batch[0])
    F.cross_entropy(outputs, batch[1]).backward(retain_graph=True)
    (F.cross_entropy(outputs, batch[1]) if same else outputs.square().sum()).backward()
    if same:
        found = probe.fisher_diagonal().by_parameter()
        expected = reference(model.requires_grad_(), batch)
        assert_all_close(found, {name: expected[name] for name in found})
    else:
        with pytest.raises(AttributionError, match="second backward"):
            probe.fisher_diagonal()


@pytest.mark.parametrize("decay", [None, 0.75])
def test_a_layer_that_the_loss_does_not_depend_on_has_zeros_of_its_batch(decay: float | None) -> None:
    model = Net(lambda m, x: (m.a(x), m.b(x)), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    batches = [data(), data(), data(4)]
    squares = [gradients.square().mean(0) for gradients in map(partial(of_bias, model.b), batches)]
    with CurvatureProbe(model, reduction="mean", decay=decay) as probe:
        for which, (x, t) in zip((1, 0, 1), batches, strict=True):
            F.cross_entropy(model(x)[which], t).backward()
        found = probe.fisher_diagonal().by_parameter()["b.bias"]
    weights = [6 / 16, 6 / 16, 4 / 16] if decay is None else [0.75**2, 0.75, 1.0]
    expected = (weights[0] * squares[0] + weights[2] * squares[2]) / sum(weights)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{}, {"decay": 0.75}, {"accumulate": "trace"}])
def test_batches_of_layers_that_are_not_small_are_counted_when_it_is_asked_for(options: dict[str, Any]) -> None:
    """Of several sizes, with a read and a copy between them; one that is not finite does not count."""
    model = nn.Sequential(nn.Linear(600, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    batches = [(torch.randn(n, 600).double(), torch.randint(3, (n,))) for n in (120, 150, 150, 120)]
    batches[2][0][0, 0] = torch.nan
    good = [batches[0], batches[1], batches[3]]
    traces = [{n: v.sum() for n, v in reference(model, batch).items()} for batch in good]
    with CurvatureProbe(model, reduction="mean", **options) as probe:
        loss_of(model, batches[0]).backward()
        loss_of(model, batches[1]).backward()
        assert probe.num_samples == 270
        copied = copy.deepcopy(probe)
        for batch in batches[2:]:
            loss_of(model, batch).backward()
    assert (probe.num_samples, copied.num_samples) == (390, 270)
    weights = [0.75**3, 0.75**2, 1.0] if "decay" in options else [120.0, 150.0, 120.0]
    for name in ("0", "2"):
        each = [sum(v for n, v in own.items() if n.startswith(name)) for own in traces]
        expected = sum(w * x for w, x in zip(weights, each, strict=True)) / sum(weights)
        torch.testing.assert_close(torch.tensor(probe.fisher_trace()[name].value).double(), torch.as_tensor(expected))


def of_bias(layer: nn.Linear, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy's gradient on the bias of the last layer, sample by sample."""
    return (layer(batch[0]).softmax(1) - F.one_hot(batch[1], 3)).detach()


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.LeakyReLU])
def test_a_second_backward_that_reaches_a_layer_by_none_of_its_calls(activation: type[nn.Module]) -> None:
    """The weight of the last layer is in the derivatives by the inputs, whatever its output is."""
    model, inputs = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 1)), data()[0].requires_grad_()
    probe = CurvatureProbe(model, reduction="mean")
    outputs = model(inputs)
    F.softplus(outputs).mean().backward(retain_graph=True)
    (slopes,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    slopes.square().sum(1).mean().backward()
    with pytest.raises(AttributionError, match=r"layers '0', '2': .*another loss in a second backward"):
        probe.fisher_diagonal()


def test_a_second_backward_leaves_layers_that_it_does_not_reach() -> None:
    model, batch = Net(lambda m, x: (m.a(x), m.b(x)), a=nn.Linear(4, 3), b=nn.Linear(4, 3)), data()
    probe = CurvatureProbe(model, reduction="mean")
    a, b = model(batch[0])
    (F.cross_entropy(a, batch[1]) + F.cross_entropy(b, batch[1])).backward(retain_graph=True)
    b.square().sum().backward()
    assert probe.fisher_diagonal(missing="skip").keys() == {"a"}


@pytest.mark.parametrize(("sizes", "forwards"), [((6, 6), None), ((6, 4), "joined")])
def test_forwards_that_cannot_be_told_apart(sizes: tuple[int, int], forwards: Any) -> None:
    model = make()
    probe = CurvatureProbe(model, forwards=forwards)
    sum(loss_of(model, (data()[0][:n], data()[1][:n])) for n in sizes).backward()  # type: ignore[union-attr]
    with pytest.raises(AttributionError, match="one backward"):
        probe.fisher_diagonal()


def test_a_backward_through_a_forward_that_is_not_recorded() -> None:
    model, batch = make(), data()
    probe = CurvatureProbe(model, every=2)
    (loss_of(model, batch) + loss_of(model, batch)).backward()
    with pytest.raises(AttributionError, match="not recorded"):
        probe.fisher_diagonal()


def test_a_layer_that_the_loss_does_not_reach_has_zeros_and_counts_its_samples() -> None:
    model = Net(lambda m, x: (m.a(x), m.b(x))[0], a=nn.Linear(4, 3), b=nn.Linear(4, 2))
    probe = CurvatureProbe(model, reduction="mean")
    loss_of(model, data()).backward()
    found = probe.fisher_diagonal()
    assert not found["b"].any()
    assert found["a"].any()


ASKED_FOR = {
    "the head, and nothing behind it": (["4"], "02"),
    "all but a layer in the middle": (["0", "4"], "2"),
    "weights": (["0.weight", "2.weight", "4.weight"], "024"),
    "a weight less": (["0.bias", "2", "4"], "0"),
    "all": (["0", "2", "4"], ""),
}


@pytest.mark.parametrize("asked", ASKED_FOR)
def test_layers_that_a_backward_is_not_asked_for_are_not_told(asked: str) -> None:
    names, untold = ASKED_FOR[asked]
    model, batch = mlp(), data()
    inputs = [p for name, p in model.named_parameters() if name in names or name.partition(".")[0] in names]
    probe = CurvatureProbe(model, reduction="mean")
    for _ in range(3):
        loss_of(model, batch).backward(inputs=inputs)
    expected = reference(model, batch)
    if untold:
        with pytest.raises(AttributionError, match="inputs="):
            probe.fisher_diagonal()
    if len(untold) < 3:
        found = probe.fisher_diagonal(missing="skip").by_parameter()
        assert_all_close(found, {name: value for name, value in expected.items() if name[0] not in untold})
    probe.detach()


def test_tied_layers_are_put_together() -> None:
    model = Net(
        lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 3)
    )
    model.b.weight = model.a.weight
    probe = CurvatureProbe(model, reduction="mean")
    batch = data()
    loss_of(model, batch).backward()
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


@pytest.mark.parametrize("accumulate", ["diagonal", "trace"])
def test_what_several_layers_hold_is_worked_out_once(accumulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(lambda m, x: m.c(m.b(torch.tanh(m.a(x)))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
    model.b.weight, model.b.bias = model.a.weight, model.a.bias
    model.c.weight = model.a.weight
    done: list[int] = []

    def counted(work: Any) -> Any:
        return lambda parts, *args, **kwargs: done.append(len(parts)) or work(parts, *args, **kwargs)

    monkeypatch.setattr(closing, "contraction", lambda low: counted(contraction(low)))
    monkeypatch.setattr(norms, "squared_norms", counted(norms.squared_norms))
    batch = data()
    with CurvatureProbe(model, reduction="mean", accumulate=accumulate) as probe:
        loss_of(model, batch).backward()
        expected = reference(model, batch)
        if accumulate == "diagonal":
            assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
        else:
            traces = {name: trace.value for name, trace in probe.fisher_trace().items()}
            of_layers = {x: sum(float(v.sum()) for name, v in expected.items() if name[0] == x) for x in "abc"}
            assert traces == pytest.approx(of_layers, rel=1e-9)
    # A diagonal: of the weight and a's bias, and the first batch's norms of a and b together, and of c, whose bias is
    # its own; norms take the weight and the bias of a layer at once.
    assert len(done) == (4 if accumulate == "diagonal" else 2)


def test_an_output_that_is_kept_and_not_returned() -> None:
    kept: list[Tensor] = []
    model = Net(lambda m, x: kept.append(m.a(x)), a=nn.Linear(4, 3))
    inputs, targets = data()
    with CurvatureProbe(model) as probe:
        model(inputs)
        with pytest.warns(CurvatureWarning, match="let the model return what the loss is computed from"):
            F.cross_entropy(kept[-1], targets).backward()
        with pytest.raises(AttributionError, match="returned nothing"):
            probe.fisher_diagonal()
