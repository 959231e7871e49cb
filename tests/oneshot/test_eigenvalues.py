"""Traces and eigenvalues against dense blocks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secorder.oneshot.eigenvalues
from secorder import CurvatureProbe, InvalidArgumentError
from secorder.oneshot.eigenvalues import Ends, lanczos, nothing, start_of
from secorder.oneshot.operators import ProductInZ, ProductOnParameters, operators

from ..helpers import Twice, data, make, mlp, seeded

N = 6


def blocks(model: nn.Module, loss_fn: Any, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Each layer's dense Hessian block, weight then bias."""
    result = {}
    for path, layer in model.named_modules():
        parameters = list(layer.parameters(recurse=False))
        if not parameters:
            continue
        loss = loss_fn(model(inputs), targets)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
        rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in gradient]
        result[path] = torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])
    return result


def relu_cnn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def coupled() -> nn.Sequential:
    return make(nn.BatchNorm1d(5), nn.Tanh())


MODELS = {"mlp": (mlp, (4,)), "relu_cnn": (relu_cnn, (1, 3, 3)), "coupled": (coupled, (4,)), "twice": (Twice, (4,))}


@pytest.mark.parametrize("name", MODELS)
def test_trace_against_dense_blocks(name: str) -> None:
    build, shape = MODELS[name]
    model, inputs, targets = build(), torch.randn(N, *shape), torch.randint(3, (N,))
    dense = blocks(model, F.cross_entropy, inputs, targets)
    probe = CurvatureProbe(model)
    found = probe.hessian_trace(
        F.cross_entropy, inputs, targets, method="hutchinson", num_draws=300, generator=seeded()
    )
    for layer, trace in found.items():
        true = dense[layer].trace().item()
        if trace.standard_error == 0 or trace.num_draws == 0:
            assert trace.value == pytest.approx(true, rel=1e-9)
        else:
            assert abs(trace.value - true) < 4 * trace.standard_error + 1e-9
            assert trace.standard_error < 0.5 * abs(true) + 0.1
    close = probe.hessian_trace(F.cross_entropy, inputs, targets, method="hutchinson", rtol=0.2, max_draws=5_000)
    for layer, trace in close.items():
        assert trace.converged == (trace.standard_error <= 0.2 * abs(trace.value))
        assert trace.converged or trace.num_draws == 5_000  # a trace of about zero has no relative error
        assert abs(trace.value - dense[layer].trace().item()) < 5 * trace.standard_error + 1e-9


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 3])
def test_eigenvalues_against_dense_blocks(name: str, count: int) -> None:
    build, shape = MODELS[name]
    model, inputs, targets = build(), torch.randn(N, *shape), torch.randint(3, (N,))
    dense = blocks(model, F.cross_entropy, inputs, targets)
    probe = CurvatureProbe(model)
    found = probe.hessian_eigenvalues(
        F.cross_entropy, inputs, targets, count=count, tolerance=1e-10, generator=seeded()
    )
    for layer, values in found.items():
        true = torch.linalg.eigvalsh(dense[layer])
        assert values.converged
        assert len(values.top) == len(values.bottom) == count
        # A Krylov space holds a multiple eigenvalue (zero, here) once.
        distinct = true[torch.cat([torch.tensor([True]), true.diff() > 1e-9])]
        assert values.top == pytest.approx(distinct[-count:].flip(0).tolist(), rel=1e-7, abs=1e-9)
        assert values.bottom == pytest.approx(distinct[:count].tolist(), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("of", ["hessian", "fisher"])
@pytest.mark.parametrize("count", [1, 3])
def test_eigenvalues_of_one_end(count: int, of: Any) -> None:
    """Those of both ends, and of the largest in modulus the right ones of either; on data sets and of zeros as well."""
    model, (inputs, targets) = make(), data()
    model[2].weight.data.mul_(3)
    loss_fn = lambda f, t: -F.cross_entropy(f, t)  # whose largest eigenvalues in modulus are mostly negative  # noqa: E731
    probe = CurvatureProbe(model)

    def found(*batch: Any, **options: Any) -> dict[str, Any]:
        how = {"of": of, "count": count, "tolerance": 1e-10, "generator": seeded()}
        return probe.hessian_eigenvalues(loss_fn, *batch, **how, **options)

    whole = found(inputs, targets)
    for batch in ((inputs, targets), ([(inputs[:2], targets[:2]), (inputs[2:], targets[2:])],)):
        by_end = {which: found(*batch, which=which) for which in ("top", "bottom", "largest")}
        for name, both in whole.items():
            top, bottom, largest = (by_end[which][name] for which in by_end)
            assert all(x.converged for x in (top, bottom, largest))
            assert (top.bottom, bottom.top) == ([], [])
            assert top.top == pytest.approx(both.top, rel=1e-7, abs=1e-9)
            assert bottom.bottom == pytest.approx(both.bottom, rel=1e-7, abs=1e-9)
            expected = sorted({*both.top, *both.bottom}, key=abs, reverse=True)[:count]
            assert [*largest.top, *largest.bottom] == pytest.approx(
                sorted((x for x in expected if x >= 0), reverse=True) + sorted(x for x in expected if x < 0),
                rel=1e-7, abs=1e-9,
            )  # fmt: skip


def test_one_end_of_a_zero() -> None:
    ends = {"both": (2, 2), "top": (2, 0), "bottom": (0, 2), "largest": (2, 0)}
    for which, sizes in ends.items():
        found = nothing(2, which)
        assert (len(found.top), len(found.bottom)) == sizes


def test_the_largest_takes_fewer_products_than_both_ends() -> None:
    values = torch.cat([torch.linspace(-1, 1, 400), torch.tensor([3.0, 5.0])])
    start = torch.randn(402, generator=seeded())
    found, both = (lanczos(lambda v: values * v, start, Ends(1, which, 1e-3, 402)) for which in ("largest", "both"))
    assert found.converged
    assert (found.top, found.bottom) == (pytest.approx([5.0], rel=1e-6), [])
    assert found.num_hvps < both.num_hvps


@pytest.mark.parametrize("slope", [1.0, 0.0])
def test_the_start_has_a_part_in_the_gradient(slope: float) -> None:
    """But where there is none, as at a minimum."""

    def starts(task: Any) -> list[tuple[Tensor, Tensor]]:
        blocks = [(x, p) for x, p in operators(task, "hessian") if isinstance(p, (ProductInZ, ProductOnParameters))]
        found = [(p.gradient, start_of(task, x, p, slice(0, len(p.gradient)))) for x, p in blocks]
        assert len(found) == len(task.layers)
        return found

    probe = CurvatureProbe(Twice())
    for gradient, start in probe._measure(
        starts, lambda f, t: slope * F.cross_entropy(f, t), *data(), generator=seeded()
    ):
        assert bool(start.isfinite().all())
        assert bool(gradient.any()) == bool(slope)
        assert torch.cosine_similarity(gradient, start, 0) == pytest.approx(slope * 0.5**0.5, abs=0.25)


def test_of_one_parameter_whatever_the_start() -> None:
    model, x = nn.Linear(3, 1), torch.randn(5, 3)
    with CurvatureProbe(model) as probe:
        for number in range(8):
            found = probe.hessian_eigenvalues(
                F.mse_loss, x, torch.randn(5, 1), by="parameter", which="largest", generator=seeded(number)
            )
            assert found["bias"].top == pytest.approx([2.0])
            assert found["bias"].converged


def test_eigenvalues_say_when_they_are_not_there_yet() -> None:
    probe = CurvatureProbe(mlp())
    found = probe.hessian_eigenvalues(F.cross_entropy, *data(), tolerance=1e-12, max_iterations=3)
    assert not found["2"].converged
    assert found["2"].num_hvps == 3
    with pytest.raises(InvalidArgumentError, match="at least 1"):
        probe.hessian_eigenvalues(F.cross_entropy, *data(), count=0)


def test_no_more_products_than_the_tolerance_takes() -> None:
    """Of a matrix: two products fewer, and the residual is above what was asked, which two in turn must meet."""
    values = torch.cat([torch.linspace(-1, 1, 40), torch.tensor([3.0, 5.0])])
    start = torch.randn(42, generator=seeded())
    asked = 1e-4
    found = lanczos(lambda v: values * v, start, Ends(1, "both", asked, 42))
    assert found.converged
    assert found.top == pytest.approx([5.0], rel=1e-7)
    assert found.bottom == pytest.approx([-1.0], rel=1e-4)
    assert found.residual <= asked * 5
    before = lanczos(lambda v: values * v, start, Ends(1, "both", asked, found.num_hvps - 2))
    assert not before.converged
    assert before.residual > asked * 5


@pytest.mark.parametrize(("size", "rank", "seed"), [(60, 6, 48), (9, 9, 274), (9, 9, 321), (9, 9, 348)])
def test_another_eigenvalue_does_not_pass_for_an_extreme_one(size: int, rank: int, seed: int) -> None:
    """Where a start has next to nothing of its vector, one product meets the tolerance without it."""
    generator = seeded(seed)
    values = torch.zeros(size)
    values[:rank] = torch.randn(rank, generator=generator)
    found = lanczos(lambda v: values * v, torch.randn(size, generator=generator), Ends(max_iterations=size))
    assert found.converged
    within = 1e-3 * values.abs().max().item()
    assert found.top == pytest.approx([values.max().item()], abs=within)
    assert found.bottom == pytest.approx([values.min().item()], abs=within)


@pytest.mark.parametrize("of", ["hessian", "ggn", "fisher"])
def test_eigenvalues_under_autocast(of: Any) -> None:
    model, (inputs, targets) = make(), data()
    dense = blocks(model, F.cross_entropy, inputs, targets)
    if of != "hessian":
        dense = ggn_blocks(model, F.cross_entropy, inputs, targets, of)
    model, inputs = model.float(), inputs.float()
    with torch.autocast("cpu", torch.bfloat16), CurvatureProbe(model) as probe:
        found = probe.hessian_eigenvalues(F.cross_entropy, inputs, targets, of=of, tolerance=0.05)
    for layer, values in found.items():
        assert values.top[0] == pytest.approx(torch.linalg.eigvalsh(dense[layer])[-1].item(), rel=0.05)


@pytest.mark.parametrize("skew", [0.05, 0.0])
def test_what_products_lack_of_a_symmetric_matrix_is_told(skew: float) -> None:
    """Of a matrix that is not, and of products that are not linear: no residual by the recurrence tells of them."""
    values = torch.linspace(-1, 5, 9)
    beside = skew * torch.randn(9, 9, generator=seeded())

    def product(v: Tensor) -> Tensor:
        return values * v + beside @ v if skew else (values * v).clamp(-1.0, 1.0)

    found = lanczos(product, torch.randn(9, generator=seeded()), Ends(max_iterations=9))
    assert not found.converged
    assert found.residual > 0.01
    assert found.num_hvps <= 9


def ggn_blocks(model: nn.Module, loss_fn: Any, inputs: Tensor, targets: Tensor, of: str) -> dict[str, Tensor]:
    """Each layer's dense block of the GGN or the Fisher, sample by sample."""
    result = {}
    for path, layer in model.named_modules():
        parameters = list(layer.parameters(recurse=False))
        if not parameters:
            continue
        total = torch.zeros(sum(p.numel() for p in parameters), sum(p.numel() for p in parameters))
        for n in range(len(inputs)):
            f = model(inputs[n : n + 1])
            rows = [torch.autograd.grad(v, parameters, retain_graph=True) for v in f.flatten()]
            j = torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])
            leaf = f.detach().requires_grad_()
            loss = loss_fn(leaf, targets[n : n + 1])
            (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
            if of == "fisher":
                total += torch.outer(j.T @ g.flatten().detach(), j.T @ g.flatten().detach()) / len(inputs)
            else:
                h = torch.stack([torch.autograd.grad(v, leaf, retain_graph=True)[0].flatten() for v in g.flatten()])
                total += j.T @ h @ j / len(inputs)
        result[path] = total
    return result


@pytest.mark.parametrize("of", ["ggn", "fisher"])
@pytest.mark.parametrize("name", ["mlp", "relu_cnn", "twice"])
def test_ggn_and_fisher_against_dense_blocks(name: str, of: Any) -> None:
    build, shape = MODELS[name]
    model, inputs, targets = build(), torch.randn(N, *shape), torch.randint(3, (N,))
    dense = ggn_blocks(model, F.cross_entropy, inputs, targets, of)
    probe = CurvatureProbe(model)
    values = probe.hessian_eigenvalues(F.cross_entropy, inputs, targets, of=of, tolerance=1e-10, generator=seeded())
    traces = probe.hessian_trace(F.cross_entropy, inputs, targets, of=of, method="exact")
    draws: dict[str, Any] = {} if of == "fisher" else {"num_draws": 600}
    drawn = probe.hessian_trace(
        F.cross_entropy, inputs, targets, of=of, method="hutchinson", generator=seeded(), **draws
    )
    for layer, block in dense.items():
        assert values[layer].top[0] == pytest.approx(torch.linalg.eigvalsh(block)[-1].item(), rel=1e-7)
        assert traces[layer].value == pytest.approx(block.trace().item(), rel=1e-9)
        assert traces[layer].num_draws == 0
        assert drawn[layer].value == pytest.approx(block.trace().item(), rel=1e-9)
        assert drawn[layer].num_draws == 0  # as many draws as there are columns are no better than the columns


@pytest.mark.parametrize("of", ["hessian", "ggn", "fisher"])
def test_blocks_by_parameter(of: Any) -> None:
    model, inputs, targets = mlp(), torch.randn(N, 4), torch.randint(3, (N,))
    dense = (
        blocks(model, F.cross_entropy, inputs, targets)
        if of == "hessian"
        else ggn_blocks(model, F.cross_entropy, inputs, targets, of)
    )
    probe = CurvatureProbe(model)
    values = probe.hessian_eigenvalues(
        F.cross_entropy, inputs, targets, of=of, by="parameter", tolerance=1e-10, generator=seeded()
    )
    traces = probe.hessian_trace(F.cross_entropy, inputs, targets, of=of, by="parameter", method="exact")
    assert list(values) == list(traces) == [name for name, _ in model.named_parameters()]
    for layer, block in dense.items():
        size = model.get_parameter(f"{layer}.weight").numel()
        for name, part in (("weight", block[:size, :size]), ("bias", block[size:, size:])):
            true = torch.linalg.eigvalsh(part)
            assert values[f"{layer}.{name}"].top[0] == pytest.approx(true[-1].item(), rel=1e-7, abs=1e-12)
            assert traces[f"{layer}.{name}"].value == pytest.approx(part.trace().item(), rel=1e-9)


@pytest.mark.parametrize("of", ["hessian", "ggn"])
def test_the_model_is_left_as_it_was_after_an_exception_between_layers(
    of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = mlp(), data()
    parameters = [id(p) for p in model.parameters()]

    def failing(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(secorder.oneshot.eigenvalues, "lanczos", failing)
    probe = CurvatureProbe(model)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(KeyboardInterrupt) as caught:
        probe.hessian_eigenvalues(F.cross_entropy, *batch, of=of)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert [id(p) for p in model.parameters()] == parameters
    assert caught.value is not None


def test_what_may_be_asked() -> None:
    probe = CurvatureProbe(mlp())
    with pytest.raises(InvalidArgumentError, match="which must be"):
        probe.hessian_eigenvalues(F.cross_entropy, *data(), which="end")  # type: ignore[arg-type]
    for options in ({"of": "gauss"}, {"by": "row"}):
        for measure in (probe.hessian_trace, probe.hessian_eigenvalues):
            with pytest.raises(InvalidArgumentError, match="must be"):
                measure(F.cross_entropy, *data(), **options)
    with pytest.raises(InvalidArgumentError, match="quantity must be"):
        probe.estimate_cost(F.cross_entropy, *data(), quantity="rank")
    penalty = lambda f, t: F.cross_entropy(f, t) + probe._model[0].weight.square().sum()  # noqa: E731
    with pytest.raises(InvalidArgumentError, match='of="hessian"'):
        probe.hessian_eigenvalues(penalty, *data(), of="ggn")


def test_many_more_than_there_are_are_those_that_there_are() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    x, t = torch.randn(4, 2), torch.randint(2, (4,))
    with CurvatureProbe(model) as probe:
        found = probe.hessian_eigenvalues(F.cross_entropy, x, t, count=10**12)["0"]
    assert 0 < len(found.top) == len(found.bottom) <= 6
