"""Calls of layers in passes of our own."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder import AttributionError
from secorder._torch.vjp import gradients
from secorder.layers.selection import select_layers
from secorder.layers.structure import chain_of
from secorder.oneshot.isolation import isolate
from secorder.oneshot.recording import ChainForward, Recording, recorded, seen

from ..helpers import Fn, Net, Twice, data, make


def test_each_call_has_its_inputs_and_a_leaf_of_zeros() -> None:
    model, (x, _) = Twice(), data()
    layers = select_layers(model)
    with isolate(model, None, layers) as isolated, recorded(isolated, layers, own_parameters=False) as recording:
        isolated.forward(x)
    assert [len(recording.inputs[name]) for name in ("a", "b")] == [2, 1]
    assert torch.equal(recording.inputs["a"][0][0], x)
    assert not any(bool(leaf.any()) for leaves in recording.leaves.values() for leaf in leaves)
    assert not recording.unusable()


@pytest.mark.parametrize("own", [True, False])
def test_a_use_outside_of_the_calls_shows_where_the_calls_have_other_parameters(own: bool) -> None:
    model, (x, _) = Net(lambda m, x: m.a(x) @ m.a.weight, a=nn.Linear(4, 4)), data()
    layers = select_layers(model)
    with isolate(model, None, layers) as isolated, recorded(isolated, layers, own_parameters=own) as recording:
        output = isolated.forward(x)
        weight, bias = isolated.replacements(layers[0])
        found = torch.autograd.grad(output.sum(), [weight, bias], retain_graph=True, allow_unused=True)
        assert [g is None for g in found] == [False, not own]
        assert torch.autograd.grad(output.sum(), recording.leaves["a"])[0].any()


def test_overwritten_inputs_and_derivatives_inside_make_calls_unusable() -> None:
    def overwrites(x: Tensor) -> Tensor:
        return x.mul_(2)

    def differentiates(m: Net, x: Tensor) -> Tensor:
        h = m.b(m.a(x))
        return h + torch.autograd.grad(h.square().sum(), x, create_graph=True)[0][:, :3]

    kept = Net(
        lambda m, x: m.b(overwrites(h) if m.a(h := x.sin()) is not None else h), a=nn.Linear(4, 4), b=nn.Linear(4, 3)
    )
    itself = Net(differentiates, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    for model, expected in ((kept, {"a"}), (itself, {"a", "b"})):
        layers = select_layers(model)
        with isolate(model, None, layers) as isolated, recorded(isolated, layers, own_parameters=False) as recording:
            isolated.forward(data()[0].requires_grad_())
            recording.close()
        assert recording.unusable() == expected


def test_a_layer_that_runs_in_backward_alone_is_found_out() -> None:
    hides = make(Fn(lambda h: checkpoint(lambda h: h.tanh(), h, use_reentrant=True)))
    inner = nn.Linear(5, 5)
    model = make(inner)
    layers = select_layers(model)
    with seen(layers) as recording:
        loss = model(data()[0]).sum()
    recording.require_seen(loss)
    inner.register_forward_pre_hook(lambda *_: None)
    model[1] = Checkpointed(inner)
    layers = select_layers(model)
    with (
        isolate(model, None, layers) as isolated,
        seen(layers) as recording,
        pytest.raises(AttributionError, match="1"),
    ):
        recording.require_seen(isolated.forward(data()[0]).sum())
    assert hides is not model


class Own(torch.autograd.Function):
    """A checkpoint that runs a backward of its own."""

    @staticmethod
    def forward(ctx: object, module: nn.Module, x: Tensor) -> Tensor:
        ctx.module = module  # type: ignore[attr-defined]
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        return module(x)

    @staticmethod
    def backward(ctx: object, g: Tensor) -> tuple[None, Tensor]:
        x = ctx.saved_tensors[0].detach().requires_grad_()  # type: ignore[attr-defined]
        with torch.enable_grad():
            torch.autograd.backward(ctx.module(x), g)  # type: ignore[attr-defined]
        return None, x.grad


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return Own.apply(self.inner, x)


def _chains() -> dict[str, tuple[nn.Module, Tensor]]:
    linear = nn.Linear(4, 4)
    return {
        "one layer": (nn.Linear(4, 3), torch.randn(5, 4)),
        "in place": (nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), torch.randn(5, 4)),
        "nested": (nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(6, 4), nn.Tanh())), torch.randn(5, 2, 3)),
        "called twice": (nn.Sequential(linear, nn.Tanh(), linear), torch.randn(5, 4)),
        "positions": (nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), torch.randn(5, 7, 4)),
        "without a batch": (nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(inplace=True)), torch.randn(1, 5, 5)),
        "wide": (
            nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).float(),
            torch.randn(128, 256, dtype=torch.float32),
        ),
    }


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("kind", _chains())
def test_a_chain_that_is_run_module_by_module(kind: str, onednn: bool) -> None:
    model, x = _chains()[kind]
    layers, tolerance = select_layers(model, "all"), {"rtol": 1e-4, "atol": 1e-4}
    found = Recording()
    z = ChainForward(found, chain_of(model), layers, onednn=onednn)(x)
    with isolate(model, None, layers) as isolated, recorded(isolated, layers, own_parameters=True) as expected:
        y = isolated.forward(x)
        ends = [leaf for name in expected.leaves for leaf in expected.leaves[name]]
        g = torch.randn_like(y)
        wanted = gradients(y, ends, [g])
    torch.testing.assert_close(z, y, **tolerance)
    assert found.leaves.keys() == expected.leaves.keys()
    assert not found.unusable()
    pulled = gradients(z, [leaf for name in expected.leaves for leaf in found.leaves[name]], [g])
    torch.testing.assert_close(pulled, wanted, **tolerance)
    for name, calls in expected.inputs.items():
        torch.testing.assert_close(found.inputs[name], calls, **tolerance)


def test_a_chain_says_what_is_wrong_with_its_input() -> None:
    model = nn.Linear(256, 256).float()
    forward = ChainForward(Recording(), [model], select_layers(model), onednn=True)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        forward(torch.randn(128, 255, dtype=torch.float32))


class _Kind(Tensor):
    pass


def test_weights_of_a_kind_of_their_own_are_multiplied_as_that_says() -> None:
    model, x = nn.Linear(256, 256).float(), torch.randn(128, 256, dtype=torch.float32)
    model.weight = nn.Parameter(model.weight.detach().as_subclass(_Kind))
    z = ChainForward(Recording(), [model], select_layers(model), onednn=True)(x)
    assert type(z) is _Kind
    assert torch.equal(z.as_subclass(Tensor), model(x).as_subclass(Tensor))
