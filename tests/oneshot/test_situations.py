"""Models, batches and settings out of the ordinary: the numbers, or an error that says why not."""

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder import (
    AttributionError,
    CouplingError,
    CurvatureProbe,
    CurvatureWarning,
    InvalidArgumentError,
    InvalidTypeError,
    NonFiniteError,
    ProbeStateError,
    SecorderError,
    per_layer_fisher_diagonal,
    per_layer_hessian_diagonal,
)

from ..helpers import Net, data, make, mlp, no_warnings
from ..reference import assert_all_close, fisher_by_sample, ggn_by_sample, hessian_by_element

N = 6


def exact(model: nn.Module, loss_fn: Any, x: Any, t: Any, *, layer_types: Any = None, count: int = N) -> None:
    """Fisher and Hessian against brute force."""
    hessian = per_layer_hessian_diagonal(model, loss_fn, x, t, layer_types, method="exact").by_parameter()
    assert_all_close(hessian, hessian_by_element(model, loss_fn, x, t))
    fisher = per_layer_fisher_diagonal(model, loss_fn, x, t, layer_types).by_parameter()
    assert_all_close(fisher, fisher_by_sample(model, loss_fn, x, t, count))


# ---- checkpoints


class Checkpointed(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.emb, self.block, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.run = run

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.run(self.block, self.emb(ids))))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_both_kinds(reentrant: bool) -> None:
    def run(block: nn.Module, h: Tensor) -> Tensor:
        return checkpoint(block, h.detach() if reentrant else h, use_reentrant=reentrant)

    plain = Checkpointed(lambda block, h: block(h.detach() if reentrant else h))
    model = Checkpointed(run)
    model.load_state_dict(plain.state_dict())
    ids, labels = torch.randint(7, (N,)), torch.randint(3, (N,))
    found = per_layer_hessian_diagonal(model, F.cross_entropy, ids, labels, "all", method="exact").by_parameter()
    assert_all_close(found, hessian_by_element(plain, F.cross_entropy, ids, labels))
    assert found["block.weight"].abs().max() > 0
    found = per_layer_fisher_diagonal(model, F.cross_entropy, ids, labels, "all").by_parameter()
    assert_all_close(found, fisher_by_sample(plain, F.cross_entropy, ids, labels, N))


class OwnCheckpoint(torch.autograd.Function):
    """As other libraries have them: runs a backward of its own."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor, dummy: Tensor) -> Tensor:
        ctx.block, ctx.x = block, x.detach()
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            out = ctx.block(x)
        torch.autograd.backward(out, g)
        return None, x.grad, None


@pytest.mark.parametrize("layer_types", [None, "all"])
def test_a_checkpoint_that_hides_its_layers_is_refused(layer_types: Any) -> None:
    dummy = torch.zeros((), requires_grad=True)
    model = Checkpointed(lambda block, h: OwnCheckpoint.apply(block, h, dummy))
    ids, labels = torch.randint(7, (N,)), torch.randint(3, (N,))
    loss = F.cross_entropy(model(ids), labels)
    loss.backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    for measure in (per_layer_fisher_diagonal, per_layer_hessian_diagonal):
        with pytest.raises(SecorderError, match=r"use_reentrant=False|double backward|once_differentiable"):
            measure(model, F.cross_entropy, ids, labels, layer_types)
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) == (g is None)
        assert g is None or torch.equal(p.grad, g)


def test_a_layer_under_no_grad_has_no_curvature() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = m.frozen(x)
        return m.head(torch.tanh(h))

    exact(Net(forward, frozen=nn.Linear(4, 4), head=nn.Linear(4, 3)), F.cross_entropy, *data())


# ---- the model is not what was attached to


def test_a_layer_that_was_replaced_is_an_error() -> None:
    model = make()
    probe = CurvatureProbe(model)
    model[2] = nn.Linear(5, 2)
    for measure in (probe.hessian_diagonal, probe.fisher_diagonal, probe.hessian_trace, probe.estimate_cost):
        with pytest.raises(ProbeStateError, match="'2' is no longer"):
            measure(F.cross_entropy, *data())
    del model[2]
    with pytest.raises(ProbeStateError, match="'2' is no longer"):
        probe.hessian_eigenvalues(F.cross_entropy, *data())


@pytest.mark.parametrize("how", ["assign", "attribute", "data"])
def test_parameters_that_were_exchanged_are_the_ones_measured(how: str) -> None:
    model, other = make(), mlp()
    probe = CurvatureProbe(model)
    other = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    if how == "assign":
        model.load_state_dict(other.state_dict(), assign=True)
    elif how == "attribute":
        for mine, theirs in zip((model[0], model[2]), (other[0], other[2]), strict=True):
            mine.weight, mine.bias = nn.Parameter(theirs.weight.detach()), nn.Parameter(theirs.bias.detach())
    else:
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.data = theirs.data.clone()
    batch = data()
    found = probe.hessian_diagonal(F.cross_entropy, *batch, method="exact").by_parameter()
    assert_all_close(found, hessian_by_element(other, F.cross_entropy, *batch))


@pytest.mark.parametrize("measure", [per_layer_fisher_diagonal, per_layer_hessian_diagonal])
def test_weights_on_meta(measure: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="meta device"):
        measure(make().to("meta"), F.cross_entropy, *data())


def test_by_passed_parameters_are_found_out_once() -> None:
    class Cached(nn.Module):
        forwards = 0

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.kept = (self.fc.weight,)

        def forward(self, x: Tensor) -> Tensor:
            type(self).forwards += 1
            return F.linear(x, self.kept[0], self.fc.bias)

    model, batch = Cached(), data()
    exact(model, F.cross_entropy, *batch)
    Cached.forwards = 0
    per_layer_hessian_diagonal(model, F.cross_entropy, *batch)
    second = Cached.forwards
    plain = nn.Sequential(nn.Linear(4, 3))
    assert second <= 3
    assert_all_close(
        per_layer_hessian_diagonal(plain, F.cross_entropy, *batch, method="exact").by_parameter(),
        hessian_by_element(plain, F.cross_entropy, *batch),
    )


def perturbed(m: Any, x: Tensor) -> Tensor:
    return torch.func.functional_call(m.net, {n: 1.5 * p for n, p in m.net.named_parameters()}, (x,))


def averaged(m: Any, x: Tensor) -> Tensor:
    others = {f"0.{n}": p.detach() / 2 for n, p in m.net[0].named_parameters()}
    return torch.func.functional_call(m.net, others, (x,))


def masked(m: Any, x: Tensor) -> Tensor:
    layer, weight = m.net[2], m.net[2].weight
    handle = layer.register_forward_pre_hook(lambda *_: layer._parameters.update(weight=weight * MASK))
    try:
        return m.net(x)
    finally:
        handle.remove()
        layer._parameters["weight"] = weight


MASK = torch.tensor([[1.0, 0, 2, 1, 0]])


@pytest.mark.parametrize("forward", [perturbed, averaged, masked])
def test_layers_that_are_called_with_other_parameters(forward: Any) -> None:
    """These may be made of their own, or not."""
    model, batch = Net(forward, net=make()), data()
    exact(model, F.cross_entropy, *batch)
    expected, parameters = {}, dict(model.named_parameters())
    for x in batch[0].split(1):
        f = model(x)
        p = f.detach().softmax(1)[0]
        root = torch.diag(p.sqrt()) - p[:, None] * p.sqrt()
        for column in root.T:
            end = f[0] @ column
            gradients = torch.autograd.grad(end, list(parameters.values()), retain_graph=True, allow_unused=True)
            for (name, q), g in zip(parameters.items(), gradients, strict=True):
                expected[name] = expected.get(name, torch.zeros_like(q)) + (0 if g is None else g**2 / N)
    for options in ({"fisher_type": "type-2"}, {"fisher_type": "type-2", "create_graph": True}):
        found = per_layer_fisher_diagonal(model, F.cross_entropy, *batch, **options).by_parameter()
        assert_all_close({name: v.detach() for name, v in found.items()}, expected)


def adapted(m: Any, x: Tensor) -> Tensor:
    """Adapts to each sample by a step of its own first."""
    parameters = dict(m.net.named_parameters())

    def one(x: Tensor) -> Tensor:
        loss = m.net(x[None]).square().sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        fast = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), gradients, strict=True)}
        return torch.func.functional_call(m.net, fast, (x[None],))

    return torch.cat([one(row) for row in x])


def test_a_model_that_differentiates_by_its_parameters() -> None:
    model, batch = Net(adapted, net=make()), data(3)
    exact(model, F.cross_entropy, *batch, count=3)
    with CurvatureProbe(model) as probe:
        trace = probe.hessian_trace(F.cross_entropy, *batch, method="exact")["net.0"].value
        hessian = probe.hessian_diagonal(F.cross_entropy, *batch, method="exact")["net.0"]
        assert trace == pytest.approx(hessian.sum().item())
        assert probe.hessian_eigenvalues(F.cross_entropy, *batch)["net.0"].top[0] >= hessian.max()
        assert probe.estimate_cost(F.cross_entropy, *batch).seconds > 0


# ---- backward passes


class Clipped(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(4, 5), nn.Linear(5, 3), how
        if how == "module":
            self.a.register_full_backward_hook(lambda m, i, o: (i[0] if i[0] is None else i[0].clamp(-1e-3, 1e-3),))

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        h = self.a(torch.sin(x))
        if h.requires_grad and self.how == "tensor":
            h.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
        if self.how == "function":
            h = Quantised.apply(h)
        return self.b(h)


class Quantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * g.abs()


@pytest.mark.parametrize("how", ["tensor", "function"])
def test_a_backward_that_is_not_linear(how: str) -> None:
    model, batch = Clipped(how), data()
    exact(model, F.cross_entropy, *batch)
    for kind in ("type-2", "mc"):
        with pytest.raises(AttributionError, match="not linear"):
            per_layer_fisher_diagonal(model, F.cross_entropy, *batch, fisher_type=kind)
    with CurvatureProbe(model) as probe, pytest.raises(AttributionError, match="not linear"):
        probe.hessian_eigenvalues(F.cross_entropy, *batch, of="ggn")


def test_a_hook_that_scales_is_linear() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        if h.requires_grad:
            h.register_hook(lambda g: 2 * g)
        return m.b(torch.relu(h))

    model, batch = Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3)), data()
    exact(model, F.cross_entropy, *batch)


# ---- complex, graphs, images, containers


class Complex(nn.Module):
    def __init__(self, coupled: bool = False) -> None:
        super().__init__()
        self.a, self.coupled = nn.Linear(4, 6), coupled

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        h = h - h.mean(0) / 2 if self.coupled else h
        return torch.view_as_complex(h.view(len(x), 3, 2)) * torch.tensor(1 + 2j)


def magnitude(f: Tensor, t: Tensor) -> Tensor:
    return (f - t).abs().pow(2).sum(1).mean()


def test_complex_outputs() -> None:
    x, t = torch.randn(N, 4), torch.randn(N, 3, dtype=torch.complex128)
    exact(Complex(), magnitude, x, t)
    with pytest.raises(CouplingError, match="influence one another"):
        per_layer_fisher_diagonal(Complex(coupled=True), magnitude, x, t)
    found = per_layer_hessian_diagonal(Complex(coupled=True), magnitude, x, t, method="exact")
    assert set(found) == {"a"}
    conjugated = Net(lambda m, x: m.a(x).conj(), a=Complex())
    exact(conjugated, magnitude, x, t)


def test_complex_type_2() -> None:
    model, x, t = Complex(), torch.randn(N, 4), torch.randn(N, 3, dtype=torch.complex128)
    found = per_layer_fisher_diagonal(model, magnitude, x, t, fisher_type="type-2").by_parameter()
    real = Net(lambda m, x: torch.view_as_real(m.a(x)).flatten(1), a=model)
    squares = lambda f, t: (f - t).square().sum(1).mean()  # noqa: E731
    expected = ggn_by_sample(real, squares, x, torch.view_as_real(t).flatten(1))
    assert_all_close({f"a.{name}": v for name, v in found.items()}, expected)


def graphs(m: Any, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
    h = m.a(x)
    h = torch.tanh(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))
    return m.b(torch.zeros(3 if m.training else int(graph.max()) + 1, 4).index_add(0, graph, h))


def test_graphs() -> None:
    model = Net(graphs, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    edges, graph = torch.tensor([[0, 3, 7], [1, 4, 8]]), torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    inputs = (torch.randn(9, 3), edges, graph)
    targets = torch.tensor([0, 1, 0])
    found = per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets, method="exact").by_parameter()
    assert_all_close(found, hessian_by_element(model, F.cross_entropy, inputs, targets))
    with CurvatureProbe(model) as probe:
        estimate = probe.hessian_diagonal(F.cross_entropy, inputs, targets, method="hutchinson", num_draws=2000)
        assert (estimate["a"] - found["a.weight"].new_tensor(0)).isfinite().all()
        assert probe.estimate_cost(F.cross_entropy, inputs, targets)["a"].num_hvps > 0
    with pytest.raises(CouplingError, match="work on the batch and fail on"):
        per_layer_fisher_diagonal(model, F.cross_entropy, inputs, targets)
    model.eval()
    ones = []
    for n in range(3):
        here = graph == n
        ones.append((inputs[0][here], edges[:, n : n + 1] - here.nonzero()[0], graph[here] * 0))
    found = per_layer_fisher_diagonal(model, F.cross_entropy, inputs, targets).by_parameter()
    assert_all_close(found, fisher_of_ones(model, ones, targets))
    with CurvatureProbe(model) as probe, pytest.raises(InvalidArgumentError, match="batches of one"):
        probe.hessian_eigenvalues(F.cross_entropy, inputs, targets, of="ggn")


def fisher_of_ones(model: nn.Module, ones: list[Any], labels: Tensor) -> dict[str, Tensor]:
    """The mean over batches of one."""
    found = [fisher_by_sample(model, F.cross_entropy, x, labels[n : n + 1], 1) for n, x in enumerate(ones)]
    return {name: torch.stack([f[name] for f in found]).mean(0) for name in found[0]}


@pytest.mark.parametrize(("channels", "count"), [(1, 4), (3, 2), (3, 1)])
def test_lists_of_images(channels: int, count: int) -> None:
    def forward(m: Any, images: list[Tensor]) -> Tensor:
        return torch.stack([m.b(torch.tanh(m.c(i)).mean((1, 2))) for i in images])

    model = Net(forward, c=nn.Conv2d(channels, 3, 1), b=nn.Linear(3, 2))
    images, labels = [torch.randn(channels, 4 + k, 5) for k in range(count)], torch.tensor([0, 1, 0, 1][:count])
    found = per_layer_hessian_diagonal(model, F.cross_entropy, (images,), labels, method="exact").by_parameter()
    assert_all_close(found, hessian_by_element(model, F.cross_entropy, (images,), labels))
    fisher = per_layer_fisher_diagonal(model, F.cross_entropy, (images,), labels).by_parameter()
    assert_all_close(fisher, fisher_of_ones(model, [([image],) for image in images], labels))


def test_inputs_on_meta() -> None:
    with pytest.raises(InvalidArgumentError, match="inputs are on the meta device"):
        per_layer_hessian_diagonal(make(), F.cross_entropy, torch.randn(N, 4, device="meta"), torch.zeros(N).long())


@dataclasses.dataclass
class Derived:
    logits: Tensor
    doubled: Any = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        self.doubled = self.logits * 2


def test_containers_of_outputs() -> None:
    x, y = data()
    for wrap, get in (
        (lambda h: defaultdict(list, {0: h}), lambda f: f[0]),
        (lambda h: Derived(h), lambda f: f.doubled),
        (lambda h: [h, None, "text", 3], lambda f: f[0]),
        (lambda h: {"logits": h, "features": h.sin(), "count": torch.tensor(3)}, lambda f: f["logits"]),
    ):
        model = Net(lambda m, x, wrap=wrap: wrap(m.a(x)), a=nn.Linear(4, 3))
        exact(model, lambda f, t, get=get: F.cross_entropy(get(f), t), x, y)


def test_distributions_as_outputs() -> None:
    model = Net(
        lambda m, x: torch.distributions.Normal(*m.a(x).chunk(2, 1)), a=nn.Sequential(nn.Linear(4, 2), nn.Softplus())
    )
    exact(model, lambda d, t: -d.log_prob(t).mean(), torch.randn(N, 4), torch.randn(N, 1))


def test_nested_tensors_are_refused_in_a_sentence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    for measure in (per_layer_fisher_diagonal, per_layer_hessian_diagonal):
        with pytest.raises(InvalidTypeError, match="nested"):
            measure(make(), F.cross_entropy, nested, torch.tensor([0, 1]))


def test_packed_sequences_among_the_inputs_are_refused_by_what_needs_samples() -> None:
    def forward(m: Any, packed: Any) -> Tensor:
        return m.head(nn.utils.rnn.pad_packed_sequence(m.rnn(packed)[0], batch_first=True)[0].sum(1))

    model = Net(forward, rnn=nn.GRU(3, 2, batch_first=True), head=nn.Linear(2, 3))
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(3, 4, 3), torch.tensor([4, 2, 1]), batch_first=True)
    labels = torch.tensor([0, 2, 1])
    with pytest.raises(InvalidTypeError, match="pass padded ones with their lengths"):
        per_layer_fisher_diagonal(model, F.cross_entropy, (packed,), labels, "all")
    found = per_layer_hessian_diagonal(model, F.cross_entropy, (packed,), labels, "all", method="exact").by_parameter()
    assert_all_close(found, hessian_by_element(model, F.cross_entropy, (packed,), labels))


@pytest.mark.parametrize("kind", ["empirical", "type-2", "mc"])
def test_inputs_of_one_number_a_sample(kind: Any) -> None:
    model = Net(lambda m, x: m.b(torch.tanh(m.a(x[:, None]))), a=nn.Linear(1, 3), b=nn.Linear(3, 3))
    inputs, labels = torch.randn(N), torch.randint(3, (N,))
    wide = nn.Sequential(model.a, nn.Tanh(), model.b)
    found, expected = (
        per_layer_fisher_diagonal(m, F.cross_entropy, x, labels, fisher_type=kind, generator=torch.Generator())
        for m, x in ((model, inputs), (wide, inputs[:, None]))
    )
    assert [v.shape for v in found.values()] == [v.shape for v in expected.values()]
    if kind != "mc":
        for value, other in zip(found.values(), expected.values(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12)


def test_sequences_that_must_stand_by_length() -> None:
    def forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)  # raises unless they are sorted
        outputs, _ = nn.utils.rnn.pad_packed_sequence(m.rnn(packed)[0], batch_first=True)
        return m.head(torch.tanh(m.a(outputs.sum(1))))

    model = Net(forward, rnn=nn.GRU(3, 2, batch_first=True), a=nn.Linear(2, 3), head=nn.Linear(3, 2))
    inputs, labels = (torch.randn(4, 5, 3), torch.tensor([5, 3, 3, 1])), torch.tensor([0, 1, 1, 0])
    exact(model, F.cross_entropy, inputs, labels, layer_types="all", count=4)
    coupled = Net(lambda m, x, lengths: (f := m.net(x, lengths)) + f.roll(1, 0), net=model)
    with pytest.raises(CouplingError, match="influence one another"):
        per_layer_fisher_diagonal(coupled, F.cross_entropy, inputs, labels)


def test_a_hook_on_all_modules_that_couples_samples() -> None:
    def less_the_mean(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        return output - output.mean(0) if isinstance(module, nn.ReLU) else None

    model, (x, y) = make(nn.ReLU()), data()
    handle = nn.modules.module.register_module_forward_hook(less_the_mean)
    try:
        with pytest.raises(CouplingError, match="influence one another"):
            per_layer_fisher_diagonal(model, F.cross_entropy, x, y)
        exact_by_element = hessian_by_element(model, F.cross_entropy, x, y)
        found = per_layer_hessian_diagonal(model, F.cross_entropy, x, y, method="exact").by_parameter()
    finally:
        handle.remove()
    assert_all_close(found, exact_by_element)


# ---- devices, dtypes, modes


def test_inference_tensors() -> None:
    with torch.inference_mode():
        x, y, values = torch.randn(N, 4), torch.randint(3, (N,)), torch.randn(N, 3)
        model = make()
        frozen = nn.Linear(3, 3)
    assert model[0].weight.is_inference()
    twin = make()
    expected = hessian_by_element(twin, F.mse_loss, x.clone(), values.clone())
    assert_all_close(per_layer_hessian_diagonal(model, F.mse_loss, x, values, method="exact").by_parameter(), expected)
    expected = fisher_by_sample(twin, F.cross_entropy, x.clone(), y.clone(), N)
    with torch.inference_mode():
        assert_all_close(per_layer_fisher_diagonal(model, F.cross_entropy, x, y).by_parameter(), expected)
    mixed = Net(lambda m, x: m.frozen(torch.tanh(m.a(x))), a=nn.Linear(4, 3), frozen=frozen)
    with CurvatureProbe(mixed, layers="a") as probe:
        assert probe.hessian_diagonal(F.cross_entropy, x, y, method="exact")["a"].abs().sum() > 0


@pytest.mark.parametrize("kind", ["empirical", "type-2", "mc"])
def test_another_default_device(kind: Any) -> None:
    model, batch = mlp(), data()
    expected = hessian_by_element(model, F.cross_entropy, *batch)
    smooth = lambda f, t: torch.cosh(f).mean()  # noqa: E731
    with torch.device("meta"):
        found = per_layer_hessian_diagonal(model, F.cross_entropy, *batch, method="exact").by_parameter()
        trace = CurvatureProbe(model).hessian_trace(F.cross_entropy, *batch, method="hutchinson", num_draws=3)
        fisher = per_layer_fisher_diagonal(model, smooth, *batch, fisher_type=kind)
    assert_all_close(found, expected)
    assert all(v.device.type == "cpu" for v in fisher.values())
    assert set(trace) == {"0", "2", "4"}


def test_inside_of_a_transform() -> None:
    model, batch = mlp(), data()

    def measured(factor: Tensor) -> Tensor:
        return factor * per_layer_hessian_diagonal(model, F.cross_entropy, *batch)["0"].sum()

    for transform in (torch.func.grad, torch.func.functionalize, torch.vmap):
        with pytest.raises(ProbeStateError, match="measure outside of them"):
            transform(measured)(torch.ones([2] if transform is torch.vmap else []))


def test_layers_without_elements() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3))
    x, y = data()
    exact(model, F.cross_entropy, x, y)
    with CurvatureProbe(model) as probe:
        assert probe.hessian_trace(F.cross_entropy, x, y, method="exact")["0"].value == 0.0
        assert probe.hessian_eigenvalues(F.cross_entropy, x, y)["0"].num_hvps == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_parts() -> None:
    scripted = torch.jit.script(nn.Linear(4, 5))
    model = nn.Sequential(scripted, nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(InvalidArgumentError, match="TorchScript"):
        CurvatureProbe(model, "all")
    x, y = data()
    with CurvatureProbe(model, layers="2") as probe:
        found = probe.hessian_diagonal(F.cross_entropy, x, y, method="exact").by_parameter()
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    plain.load_state_dict(model.state_dict())
    expected = hessian_by_element(plain, F.cross_entropy, x, y)
    assert_all_close(found, expected)


def test_compiled_parts_run_as_they_were_written() -> None:
    import torch._dynamo

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(m.f[0](m.a(x)))

    plain = Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    plain.f = (torch.exp,)
    compiled = Net(forward, a=plain.a, b=plain.b)
    compiled.f = (torch.compile(lambda h: h.exp(), backend="aot_eager"),)
    x, y = data()
    compiled(x)
    found = per_layer_hessian_diagonal(compiled, F.cross_entropy, x, y, method="exact").by_parameter()
    assert_all_close(found, hessian_by_element(plain, F.cross_entropy, x, y))
    found = per_layer_fisher_diagonal(compiled, F.cross_entropy, x, y).by_parameter()
    assert_all_close(found, fisher_by_sample(plain, F.cross_entropy, x, y, N))


def test_generators_that_a_model_owns_are_put_back() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
            self.generator = torch.Generator().manual_seed(1)
            self.calls: list[int] = []
            self.cache: dict[str, Tensor] = {}
            self.table = torch.zeros(3)

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append(len(x))
            self.table += 1
            h = torch.tanh(self.a(x)) * (1 + torch.rand(5, generator=self.generator))
            self.cache["h"] = h
            return self.b(h) + self.table

    model, (x, y) = Noisy(), data()
    state = model.generator.get_state()
    found = per_layer_hessian_diagonal(model, F.cross_entropy, x, y, method="exact").by_parameter()
    fisher = per_layer_fisher_diagonal(model, F.cross_entropy, x, y)
    assert torch.equal(model.generator.get_state(), state)
    assert (model.calls, model.cache, model.table.tolist()) == ([], {}, [0, 0, 0])
    scale = 1 + torch.rand(5, generator=torch.Generator().manual_seed(1))
    twin = Net(lambda m, x: m.b(torch.tanh(m.a(x)) * scale) + 1, a=model.a, b=model.b)
    assert_all_close(found, hessian_by_element(twin, F.cross_entropy, x, y))
    assert_all_close(fisher.by_parameter(), fisher_by_sample(twin, F.cross_entropy, x, y, N))


def test_gradients_and_flags_stay_after_an_exception_in_the_middle() -> None:
    model, (x, y) = make(nn.BatchNorm1d(5), nn.Dropout()), data()
    F.cross_entropy(model(x), y).backward()
    model[0].weight.requires_grad_(False)
    gradients = [p.grad for p in model.parameters()]
    copies = [g.clone() for g in gradients]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    weights = [id(p) for p in model.parameters()]
    calls = []

    def failing(f: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        if torch.is_grad_enabled() and len(calls) > 0 and not f.is_leaf:
            raise ZeroDivisionError
        return F.cross_entropy(f, t)

    for measure in (per_layer_fisher_diagonal, per_layer_hessian_diagonal):
        with pytest.raises(ZeroDivisionError):
            measure(model, failing, x, y)
    assert [id(p) for p in model.parameters()] == weights
    assert all(p.grad is g and torch.equal(g, c) for p, g, c in zip(model.parameters(), gradients, copies, strict=True))
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert not model[0].weight.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.utils.checkpoint.CheckpointFunction.__name__ == "CheckpointFunction"


# ---- what is said


def test_auto_tells_once_what_it_estimated_on_both_doors() -> None:
    model, batch = mlp(), data()
    with pytest.warns(CurvatureWarning, match=r'2 of 3 layers were estimated.*method="exact"') as told:
        per_layer_hessian_diagonal(model, F.cross_entropy, *batch, max_hvps=0)
    assert [w.filename for w in told] == [__file__]
    with CurvatureProbe(model) as probe, pytest.warns(CurvatureWarning, match=r'method="exact"') as told:
        probe.hessian_diagonal(F.cross_entropy, *batch, max_hvps=0)
    assert [w.filename for w in told] == [__file__]
    with CurvatureProbe(model) as probe, pytest.warns(CurvatureWarning, match=r'method="exact"'):
        probe.hessian_trace(F.cross_entropy, *batch, max_hvps=0)
    with no_warnings():
        per_layer_hessian_diagonal(model, F.cross_entropy, *batch, max_hvps=100)  # by no time that it takes
        per_layer_hessian_diagonal(model, F.cross_entropy, *batch, method="hutchinson", num_draws=3)


def test_results_that_are_not_finite_say_so() -> None:
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    root = lambda f, t: ((f * f).sum(1) + 0.0).sqrt().mean()  # noqa: E731
    with pytest.warns(CurvatureWarning, match="Hessian of '' holds nan"):
        per_layer_hessian_diagonal(model, root, torch.randn(3, 2), None)
    with pytest.raises(NonFiniteError, match="root or norm of zero"):
        per_layer_fisher_diagonal(model, root, torch.randn(3, 2), None)
    with CurvatureProbe(model, reduction="mean") as probe:
        with pytest.warns(CurvatureWarning, match="trace of '' holds nan"):
            probe.hessian_trace(root, torch.randn(3, 2), None)
        for inputs in (torch.randn(3, 2), [(torch.randn(3, 2), None)] * 2):
            with pytest.raises(NonFiniteError, match="root or norm of zero"):
                probe.hessian_eigenvalues(root, inputs)


def test_our_own_work_warns_of_nothing() -> None:
    class Looped(torch.autograd.Function):
        """Without a batching rule."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.from_numpy(x.detach().numpy() ** 2)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 2 * g * x

    model = Net(lambda m, x: m.b(Looped.apply(m.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    x, y = data()
    ctc = lambda f, t: (f[:, 0] * t.double()).var(correction=0) * 0 + F.cross_entropy(f, t)  # noqa: E731
    with no_warnings():
        per_layer_hessian_diagonal(model, F.cross_entropy, x, y, method="exact")
        per_layer_fisher_diagonal(model, F.cross_entropy, x, y, fisher_type="type-2")
        with pytest.raises(CouplingError):
            per_layer_fisher_diagonal(model, lambda f, t: ctc(f, t) + f[:, 0].std() * 1e-3, x, y)
