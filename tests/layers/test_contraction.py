"""Per-sample gradients and the contraction, against autograd sample by sample."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secorder import CurvatureProbe
from secorder.layers.contraction import contract, contract_sum
from secorder.layers.patches import Patches
from secorder.layers.per_sample import Outer, PerSample, Rows, dense, magnitude, total_gradient, with_cotangents
from secorder.layers.rules.convolution import convolution

from ..helpers import reference, step
from ..reference import assert_all_close, hessian_by_element

N = 5


LARGE_CONVOLUTIONS = {  # those that are cheaper as a grouped convolution than as matrix products
    "1d": (nn.Conv1d, (16, 4, 5), {"stride": 2, "padding": 2}, (600,)),
    "2d": (nn.Conv2d, (16, 8, 3), {"dilation": 2, "padding": 1}, (20, 21)),
    "2d_circular": (nn.Conv2d, (16, 8, 3), {"padding": 1, "padding_mode": "circular"}, (16, 16)),
    "3d": (nn.Conv3d, (16, 3, 2), {"stride": (1, 2, 1)}, (8, 10, 9)),
}


@pytest.mark.parametrize("setting", LARGE_CONVOLUTIONS)
def test_large_convolution(setting: str) -> None:
    kind, sizes, options, image = LARGE_CONVOLUTIONS[setting]
    model, inputs = kind(*sizes, **options), torch.randn(N, 16, *image)
    z = model(inputs)
    u, v = torch.randn_like(z), torch.randn_like(z)

    def per_sample(g: torch.Tensor) -> torch.Tensor:
        rows = [torch.autograd.grad(z[n], model.weight, g[n], retain_graph=True)[0].flatten() for n in range(N)]
        return torch.stack(rows)

    by_sample = per_sample(u)
    expected = (by_sample * per_sample(v)).sum(0)
    single = model.float()
    left, right = (convolution(single, (inputs.float(),), g.float())["weight"] for g in (u, v))
    assert isinstance(left.a, Patches)
    assert left.a.convolves_well(z.shape[1])
    torch.testing.assert_close(
        contract(left, right, numel=expected.numel()).double(),
        expected,
        rtol=0,
        atol=1e-6 * expected.abs().max().item(),
    )
    exact = convolution(model.double(), (inputs,), u)["weight"]
    gradients = exact.a.weight_gradients(slice(1, N), exact.g)
    torch.testing.assert_close(gradients.flatten(1), by_sample[1:], rtol=1e-10, atol=1e-10)


SIZE = 6 * 4
FORMS: dict[str, PerSample] = {
    "one_position": Outer(torch.randn(N, 1, 1, 4), torch.randn(N, 1, 1, 6)),
    "positions": Outer(torch.randn(N, 1, 7, 4), torch.randn(N, 1, 7, 6)),
    "groups": Outer(torch.randn(N, 2, 7, 4), torch.randn(N, 2, 7, 3)),
    "bias": Outer(None, torch.randn(N, 1, 7, SIZE)),
    "rows": Rows(torch.randint(6, (N, 9)), torch.randn(N, 9, 4), 6),
    "dense": torch.randn(N, 6, 4),
}


@pytest.fixture
def _double_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, form in FORMS.items():
        doubled = with_cotangents(form, torch.Tensor.double)
        if isinstance(doubled, Outer) and doubled.a is not None:
            doubled = doubled._replace(a=doubled.a.double())
        monkeypatch.setitem(FORMS, name, doubled)


def written_out(form: PerSample) -> torch.Tensor:
    """Sample by sample and position by position."""
    if isinstance(form, torch.Tensor):
        return form.flatten(1)
    rows = []
    for n in range(N):
        total = torch.zeros(6, 4)
        if isinstance(form, Rows):
            for index, g in zip(form.ids[n], form.g[n], strict=True):
                total[index] += g
        elif form.a is None:
            total = sum(form.g[n, 0])
        else:
            blocks = [
                sum(torch.outer(g, a) for g, a in zip(form.g[n, i], form.a[n, i], strict=True))
                for i in range(form.g.shape[1])
            ]
            total = torch.cat(blocks)
        rows.append(total.flatten())
    return torch.stack(rows)


@pytest.mark.usefixtures("_double_forms")
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_per_sample_gradient(name: str) -> None:
    form = FORMS[name]
    by_sample = written_out(form)
    torch.testing.assert_close(dense(form, SIZE), by_sample)
    torch.testing.assert_close(contract(form, numel=SIZE), (by_sample**2).sum(0))
    torch.testing.assert_close(total_gradient(form, SIZE), by_sample.sum(0))
    assert magnitude(form, SIZE) >= by_sample.sum(0).abs().max() * (1 - 1e-12)
    other = with_cotangents(form, lambda g: g.roll(1, -1) * 2)
    torch.testing.assert_close(contract(form, other, numel=SIZE), (by_sample * written_out(other)).sum(0))
    out = torch.ones(SIZE)
    contract(form, other, numel=SIZE, out=out, beta=0.5, alpha=3.0)
    torch.testing.assert_close(out, 0.5 + 3 * (by_sample * written_out(other)).sum(0))
    stacked = with_cotangents(form, lambda g: torch.stack([g, g.roll(1, -1) * 2]))
    torch.testing.assert_close(contract(stacked, numel=SIZE), (by_sample**2 + written_out(other) ** 2).sum(0))


@pytest.mark.usefixtures("_double_forms")
@pytest.mark.parametrize(
    "names",
    [["positions", "rows"], ["rows", "positions", "rows"], ["positions", "one_position"], ["rows", "dense"],
     ["dense", "dense"], ["rows", "rows"], ["positions", "dense", "rows"]],
)  # fmt: skip
def test_sums_of_what_several_layers_bring(names: list[str]) -> None:
    forms = [FORMS[name] for name in names]
    expected = (sum(written_out(form) for form in forms) ** 2).sum(0)
    torch.testing.assert_close(contract_sum(forms, numel=SIZE), expected)
    out = torch.ones(SIZE)
    contract_sum(forms, numel=SIZE, out=out, beta=0.5, alpha=3.0)
    torch.testing.assert_close(out, 0.5 + 3 * expected)


@pytest.mark.parametrize("padding", [(0, 2), "same"])
def test_a_convolution_whose_settings_are_changed_after_it_was_made(padding: tuple[int, int] | str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.LazyLinear(3))
    model[0].padding = padding
    if padding == "same":
        model[0].dilation = (2, 1)
    batch = (torch.randn(4, 1, 6, 5), torch.randint(3, (4,)))
    model(batch[0])
    probe = CurvatureProbe(model)
    step(model, batch)
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))
    hessian = probe.hessian_diagonal(F.cross_entropy, *batch).by_parameter()
    assert_all_close(hessian, hessian_by_element(model, F.cross_entropy, *batch))
