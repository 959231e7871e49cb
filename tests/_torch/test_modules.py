"""What hangs on a module, and where it holds what its forward reads."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder._torch.modules import (
    backward_hooks,
    batch_normalisation,
    buffer_places,
    computes_as,
    constant_in_place_of,
    convolution_padding,
    evaluating,
    forward_hooks,
    forward_hooks_removed,
    gradient_hooks_removed,
    holds,
    is_scripted,
    modules_in,
    observe_nothing,
    observers,
    own_attributes,
    own_tensors,
    parameter_places,
    parameters_replaced,
    parameters_with,
    put_back,
    put_copies,
    tables_of,
)
from secorder._torch.pytree import tensors_in


def test_a_modules_own_parameters_and_those_of_one_part_are_told_once_each() -> None:
    model: Any = nn.Linear(2, 2)
    model.again, model.none = model.weight, None  # a second name, and none at all
    model.part = nn.Sequential(nn.Linear(2, 1), nn.Linear(2, 1, bias=False))
    model.part.mine, model.other = model.bias, nn.Linear(2, 1)
    every = dict(model.named_parameters())
    assert list(parameters_with(model).items()) == [(name, every[name]) for name in ("weight", "bias")]
    found = [(name, p) for name, p in every.items() if not name.startswith("other.")]
    assert list(parameters_with(model, "part").items()) == found
    assert len(found) == 5


def test_a_module_holds_its_own_parameters_until_others_take_their_place() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    assert holds(model[0], dict(model[0].named_parameters()))
    assert not holds(model, dict(model.named_parameters()))  # its part does
    before = dict(model[0].named_parameters())
    model[0].bias = nn.Parameter(torch.zeros(3))
    assert not holds(model[0], before)


def test_copies_of_buffers_of_which_two_are_one() -> None:
    norms = [nn.BatchNorm1d(3), nn.BatchNorm1d(3)]
    norms[1].running_mean = norms[0].running_mean
    places = [place for norm in norms for place in buffer_places(norm)]
    put_copies(places)
    assert norms[0].running_mean is norms[1].running_mean
    assert norms[0].running_var is not norms[1].running_var
    for place in places:
        assert place.held() is not place.value
        assert torch.equal(place.held(), place.value)
    put_back(places)
    assert all(place.held() is place.value for place in places)


@pytest.mark.parametrize("kind", [nn.Linear, nn.LSTM, nn.GRU])
def test_what_is_put_into_a_modules_places_is_what_it_computes_with(kind: type[nn.Module]) -> None:
    module = kind(3, 4)

    def output() -> Tensor:
        return next(tensors_in(module(x)))

    x = torch.randn(2, 5, 3)
    first = output()
    places = parameter_places(module)
    assert {id(p) for p in module.parameters()} == {id(place.value) for place in places}
    leaves = {id(p): p.detach().mul(2).requires_grad_() for p in module.parameters()}
    for place in places:
        place.put(leaves[id(place.value)])
    second = output()
    assert not torch.allclose(first, second)
    assert all(g is not None for g in torch.autograd.grad(second.sum(), list(leaves.values()), allow_unused=True))
    for place in places:
        place.put(place.value)
    assert torch.equal(output(), first)
    assert all(isinstance(p, nn.Parameter) for p in module.parameters())


def test_buffers() -> None:
    norm = nn.BatchNorm1d(3)
    places = {place.key: place for place in buffer_places(norm)}
    assert places.keys() == {"running_mean", "running_var", "num_batches_tracked"}
    places["running_mean"].put(torch.ones(3))
    assert norm.eval()(torch.ones(1, 3)).abs().max() == 0
    assert buffer_places(nn.BatchNorm1d(3, track_running_stats=False)) == []


def test_parameters_are_replaced_for_a_while() -> None:
    layer, x = nn.Linear(3, 2), torch.ones(1, 3)
    before = dict(layer.named_parameters())
    with parameters_replaced(layer, {"weight": torch.zeros(2, 3)}):
        assert torch.equal(layer(x)[0], layer.bias)
    assert all(layer.get_parameter(name) is p for name, p in before.items())


def test_forward_hooks_are_listed_and_removed_for_a_while() -> None:
    layer, calls = nn.Linear(2, 2), list[str]()

    def unwanted(*_: Any) -> None:
        calls.append("unwanted")

    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(unwanted)
    layer.register_forward_hook(lambda *_: calls.append("after"))
    assert len(forward_hooks(layer)) == 3
    with forward_hooks_removed(layer.modules(), lambda hook: hook is unwanted):
        layer(torch.ones(1, 2))
    assert calls == ["before", "after"]
    layer(torch.ones(1, 2))
    assert calls[2:] == ["before", "unwanted", "after"]


def test_gradient_hooks_are_removed_for_a_while() -> None:
    p, calls = nn.Parameter(torch.ones(2)), list[Tensor]()
    p.register_hook(calls.append)
    with gradient_hooks_removed([p, nn.Parameter(torch.ones(2))]):
        torch.autograd.grad((2 * p).sum(), p)
    assert not calls
    torch.autograd.grad((2 * p).sum(), p)
    assert len(calls) == 1


def test_gradient_hooks_are_back_where_removing_them_is_broken_off() -> None:
    class Interrupted(dict[int, Any]):
        def clear(self) -> None:
            raise KeyboardInterrupt

    p, broken = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    p.register_hook(print)
    broken._backward_hooks = Interrupted({0: print})
    with pytest.raises(KeyboardInterrupt), gradient_hooks_removed([p, broken]):
        raise AssertionError
    assert p._backward_hooks


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
@pytest.mark.parametrize("padding", [0, (1, 2), "same", "valid"])
@pytest.mark.parametrize("changed", [False, True])
def test_a_convolution_of_the_padded_image_is_what_the_module_computes(mode: str, padding: Any, changed: bool) -> None:
    conv = nn.Conv2d(2, 3, (3, 2), padding=padding, padding_mode=mode, dilation=(1, 2))
    if changed:
        conv.padding, conv.dilation = (2, 1), (2, 1)
    x = torch.randn(1, 2, 8, 9)
    padded = F.pad(x, convolution_padding(conv), "constant" if mode == "zeros" else mode)
    torch.testing.assert_close(F.conv2d(padded, conv.weight, conv.bias, dilation=conv.dilation), conv(x))


def test_what_overrides_a_forward_is_seen() -> None:
    class Other(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, weight, bias) * 2

    class Same(nn.Conv2d):
        pass

    assert computes_as(nn.Conv2d(1, 1, 1), nn.Conv2d)
    assert computes_as(Same(1, 1, 1), nn.Conv2d)
    assert not computes_as(Other(1, 1, 1), nn.Conv2d)
    patched = nn.Linear(1, 1)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    assert not computes_as(patched, nn.Linear)


def test_what_is_stored_on_a_module_besides_its_own() -> None:
    module = nn.Linear(2, 2)
    module.kept = [1]  # type: ignore[assignment]
    assert own_attributes(module) == {"in_features": 2, "out_features": 2, "kept": [1]}
    assert [list(table) for table in tables_of(module)] == [["weight", "bias"], [], []]
    assert [t.shape for t in own_tensors(nn.Sequential(module))] == []
    assert {id(t) for t in own_tensors(module)} == {id(t) for t in module.parameters()}


def test_hooks_on_gradients() -> None:
    module = nn.Linear(2, 2)
    assert backward_hooks(module) == []
    module.register_full_backward_hook(lambda *_: None)
    module.register_full_backward_pre_hook(lambda *_: None)
    assert len(backward_hooks(module)) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_known() -> None:
    assert is_scripted(torch.jit.script(nn.Linear(2, 2)))
    assert not is_scripted(nn.Linear(2, 2))


def test_batch_normalisation_that_goes_by_the_batch_of_now() -> None:
    norm, still = nn.BatchNorm2d(3), nn.BatchNorm1d(3)
    model = nn.Sequential(norm, still.eval(), nn.BatchNorm1d(3, track_running_stats=False), nn.GroupNorm(1, 3))
    assert batch_normalisation(model) == (norm,)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_fake_quantisation_that_observes() -> None:
    quantised = torch.ao.quantization.default_fake_quant()
    model = nn.Sequential(nn.Linear(2, 2), quantised)
    assert observers(model) == (quantised,)
    place = next(place for place in buffer_places(quantised) if place.key == "observer_enabled")
    observe_nothing(model)
    assert not observers(model)
    assert bool(place.value)
    put_back([place])
    assert observers(model) == (quantised,)


def test_a_model_is_evaluated_for_a_while() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False]


def test_parameters_and_what_is_computed_are_no_constants() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    assert constant_in_place_of(model, "0.weight") is None
    value = torch.ones(3, 2)
    with torch.no_grad():
        del model[0].weight
        model[0].weight = value
    assert constant_in_place_of(model, "0.weight") is value
    assert constant_in_place_of(model[0], "weight") is value
    model[0].weight = value.clone().requires_grad_()
    assert constant_in_place_of(model, "0.weight") is None
    assert constant_in_place_of(model, "2.weight") is None
    del model[1].bias
    model[1].register_buffer("bias", value)
    assert constant_in_place_of(model, "1.bias") is value


def test_modules_are_those_of_pytorch_in_its_order() -> None:
    shared = nn.Linear(2, 2)
    inner = nn.Sequential(nn.ReLU(), shared, nn.Sequential(shared, nn.Tanh()))
    model = nn.ModuleDict({"a": inner, "b": shared, "c": nn.LSTM(2, 2), "d": inner})
    inner.register_module("none", None)
    for x in (model, shared, torch.jit.script(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))):
        found = modules_in(x)
        assert len(found) == len(list(x.modules()))
        assert all(one is other for one, other in zip(found, x.modules(), strict=True))


def test_who_tells_of_other_modules_is_asked() -> None:
    class Hiding(nn.Sequential):
        def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
            yield "", self

    for model in (Hiding(nn.ReLU()), nn.Sequential(nn.Tanh(), Hiding(nn.ReLU()))):
        assert modules_in(model) == list(model.modules())
