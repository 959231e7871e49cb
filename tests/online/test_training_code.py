"""What training code does to a model and feeds it: training goes on bit for bit, and no number is wrong."""

import copy
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import (
    AttributionError,
    CurvatureProbe,
    CurvatureWarning,
    ProbeStateError,
    SecorderError,
    per_layer_hessian_diagonal,
)

from ..helpers import Net, data, make, mlp, reference, step
from ..reference import assert_all_close, fisher_by_sample
from .twins import bit_for_bit, traces

pytestmark = pytest.mark.filterwarnings("ignore::secorder.CurvatureWarning")


def train(model: nn.Module, batch: Any, times: int = 1) -> None:
    for _ in range(times):
        step(model, batch)


# ---- freezing


FROZEN = {
    "first": ["0"],
    "middle": ["2"],
    "last": ["4"],
    "all but the last": ["0", "2"],
    "bias": ["0.bias", "4.weight"],
    "all weights": ["0.weight", "2.weight", "4.weight"],
}


class Own(nn.Sequential):
    """Of a class of one's own, whose structure does not tell where samples are: it is looked at."""


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", [nn.Sequential, Own])
def test_freezing_at_any_step(kind: type[nn.Sequential], frozen: str, at: int) -> None:
    """The numbers are those of all layers at every step, whatever is frozen in some of them."""
    model, batch = kind(*mlp()), data()
    expected = reference(model, batch)
    names = FROZEN[frozen]
    with CurvatureProbe(model) as probe:
        for index in range(4):
            for name in names:
                part = model.get_submodule(name) if "." not in name else model.get_parameter(name)
                part.requires_grad_(index != at)
            step(model, batch)
        found = probe.fisher_diagonal(missing="skip").by_parameter()
        assert {name.split(".")[0] for name in found} == {"0", "2", "4"}
        assert_all_close(found, expected)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_forward_while_all_is_frozen_changes_nothing(at: int) -> None:
    model, (inputs, targets) = Own(*mlp()), data()
    expected = reference(model, (inputs, targets))
    with CurvatureProbe(model, reduction="mean") as probe, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for index in range(6):
            if index == at:
                model.requires_grad_(False)(inputs)
                model.requires_grad_(True)
            step(model, (inputs, targets))
        assert not said
        assert probe.num_samples == 6 * len(inputs)
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
        assert {layer.measured_by for layer in probe._attributions.any_known().layers} == {"rule"}  # type: ignore[union-attr]


def test_a_layer_that_is_followed_by_its_operations_may_be_frozen_for_a_while() -> None:
    model = Net(
        lambda m, x: m.head(m.rnn(m.first(x)[:, None])[0][:, 0]),
        first=nn.Linear(4, 4),
        rnn=nn.GRU(4, 5, batch_first=True),
    )
    model.add_module("head", nn.Linear(5, 3))
    batch = data()
    expected = reference(model, batch)
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for index in range(12):
            for part in (model.first, model.rnn):
                part.requires_grad_(not 3 <= index < 7)
            step(model, batch)
            if index in (2, 6, 11):
                assert_all_close(probe.fisher_diagonal().by_parameter(), expected)


@pytest.mark.parametrize("kind", [nn.Sequential, Own])
def test_unfreezing_layer_by_layer(kind: type[nn.Sequential]) -> None:
    model, batch = kind(*mlp()).requires_grad_(False), data()
    expected = reference(model, batch)
    with CurvatureProbe(model) as probe:
        model[4].requires_grad_(True)
        train(model, batch, 3)
        model[2].requires_grad_(True)
        train(model, batch, 3)
        model[0].requires_grad_(True)
        train(model, batch, 3)
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)


def test_a_model_that_is_frozen_at_first_is_no_trouble() -> None:
    model, batch = mlp().requires_grad_(False), data()
    with CurvatureProbe(model) as probe:
        model(batch[0])
        with pytest.raises(ProbeStateError, match="no tensor that depends on a parameter"):
            probe.fisher_diagonal()
        model.requires_grad_(True)
        train(model, batch, 2)
        assert probe.num_samples == 12
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


# ---- batches


def sized(sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    return [data(size) for size in sizes]


@pytest.mark.parametrize("sizes", [(0, 6), (6, 0, 6), (1, 6, 0, 1), (0, 0, 1, 2), (1, 1, 3), (6, 1, 2, 0, 5)])
def test_batches_of_none_and_one(sizes: tuple[int, ...]) -> None:
    """An empty one counts as nothing; one sample alone is left out until a batch has told where samples are."""
    batches = sized(sizes)

    def loop(model: nn.Module) -> Iterator[Any]:
        for inputs, targets in batches:
            output = model(inputs)
            F.cross_entropy(output, targets, reduction="sum").backward()
            yield output

    probe = bit_for_bit(make, loop, reduction="sum")
    model = make()
    counted = [b for i, b in enumerate(batches) if len(b[0]) > 1 or (len(b[0]) and any(s > 1 for s in sizes[:i]))]
    if probe.num_samples == sum(sizes):  # where the structure of the model tells, no batch is left out
        counted = [b for b in batches if len(b[0])]
    total = sum(len(b[0]) for b in counted)
    assert probe.num_samples == total
    expected = {n: sum(reference(model, b)[n] * len(b[0]) for b in counted) / total for n in reference(model, data())}
    assert_all_close(probe.fisher_diagonal().by_parameter(), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 1, 2, 4])
def test_bad_batches(bad: float, at: int) -> None:
    good, spoilt = data(), data()
    spoilt[0][2, 1] = bad

    def loop(model: nn.Module) -> Iterator[Any]:
        for index in range(5):
            model.zero_grad()
            inputs, targets = spoilt if index == at else good
            output = model(inputs)
            F.cross_entropy(output, targets).backward()
            yield output

    probe = bit_for_bit(make, loop)
    expected = reference(make(), good)
    if bad == bad:  # tanh of infinity is 1: the last layer's gradient is as good as any, and the first one's is nan
        spoilt_too = reference(make(), spoilt)
        expected |= {n: (4 * f + spoilt_too[n]) / 5 for n, f in expected.items() if n.startswith("2")}
        assert probe.num_skipped == {"0": 1}
    assert_all_close(probe.fisher_diagonal().by_parameter(), expected)


def test_a_batch_that_the_model_refuses_raises_the_models_own_error() -> None:
    for attached in (False, True):
        model, batch = make(), data()
        probe = CurvatureProbe(model) if attached else None
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            model(torch.randn(6, 3))
        with pytest.raises((TypeError, RuntimeError), match=r"positional argument|missing"):
            model()
        with pytest.raises(TypeError):
            model(None)
        step(model, batch)
        if probe is not None:
            assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


class Batch:
    """An object that no structure of tensors is, such as a graph library's batches."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


@pytest.mark.parametrize("wrap", [Batch, lambda x: SimpleNamespace(x=x), lambda x: Batch(x)])
def test_batch_objects_without_tensors_stop_no_training(wrap: Callable[[Tensor], Any]) -> None:
    inputs, targets = data()

    def loop(model: nn.Module) -> Iterator[Any]:
        for _ in range(3):
            output = model(wrap(inputs))
            F.cross_entropy(output, targets).backward()
            yield output

    def build() -> nn.Module:
        return Net(lambda m, batch: m.body(batch.x), body=make())

    probe = bit_for_bit(build, loop)
    expected = {f"body.{n}": f for n, f in reference(make(), (inputs, targets)).items()}
    try:
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
    except SecorderError as error:
        told = str(error)
    else:
        told = "argument"
    assert "argument" in told


def test_a_model_without_arguments() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make()
            self.register_buffer("x", torch.randn(6, 4))

        def forward(self) -> Tensor:
            return self.body(self.x)

    def loop(model: nn.Module) -> Iterator[Any]:
        for _ in range(3):
            output = model()
            output.square().sum(1).mean().backward()
            yield output

    probe = bit_for_bit(Own, loop)
    with pytest.raises(SecorderError, match="argument"):
        probe.fisher_diagonal()


def test_a_generator_among_the_arguments_is_put_back() -> None:
    """What a look at the batch draws from it, training draws afterwards."""

    def loop(model: nn.Module) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            output = model(data()[0], generator)
            output.square().sum(1).mean().backward()
            yield output, generator.get_state()

    def build() -> nn.Module:
        return Net(lambda m, x, generator: m.body(x + torch.randn(4, generator=generator)), body=make())

    assert bit_for_bit(build, loop).fisher_diagonal()


def test_an_iterator_among_the_arguments_is_left_alone() -> None:
    def loop(model: nn.Module) -> Iterator[Any]:
        steps = iter(range(5))
        for _ in range(3):
            output = model(data()[0], steps)
            output.square().sum(1).mean().backward()
            yield output

    probe = bit_for_bit(lambda: Net(lambda m, x, steps: m.body(x + next(steps)), body=make()), loop)
    with pytest.raises(AttributionError, match="called with an iterator"):
        probe.fisher_diagonal()


@pytest.mark.parametrize("by_rows", [False, True])
def test_sparse_inputs(by_rows: bool) -> None:
    dense = torch.randn(6, 4) * (torch.rand(6, 4) > 0.5)
    targets = torch.randint(3, (6,))

    def loop(model: nn.Module) -> Iterator[Any]:
        for _ in range(3):
            sparse = dense.to_sparse_csr() if by_rows else dense.to_sparse()
            output = model(sparse)
            F.cross_entropy(output, targets).backward()
            yield output

    def build() -> nn.Module:
        parts = {"first": nn.Linear(4, 5), "last": nn.Linear(5, 3)}
        return Net(lambda m, x: m.last(torch.tanh(torch.sparse.mm(x, m.first.weight.t()) + m.first.bias)), **parts)

    probe = bit_for_bit(build, loop, layers="last")
    try:
        found = probe.fisher_diagonal().by_parameter()
    except SecorderError:
        return
    torch.default_generator.manual_seed(0)
    expected = fisher_by_sample(build(), lambda f, t: F.cross_entropy(f, t), dense, targets, 6)
    assert_all_close(found, {n: f for n, f in expected.items() if n.startswith("last")})


# ---- structure in integers


class Packed(nn.Module):
    """Sequences of different lengths."""

    def __init__(self, enforce_sorted: bool = True) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(7, 4), nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)
        self.enforce_sorted = enforce_sorted

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(ids), lengths, batch_first=True, enforce_sorted=self.enforce_sorted
        )
        return self.head(self.rnn(packed)[1][-1])


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("layer_types", [None, "all"])
def test_packed_lengths(enforce_sorted: bool, layer_types: Any) -> None:
    ids, targets = torch.randint(7, (4, 6)), torch.randint(3, (4,))
    lengths = torch.tensor([6, 5, 3, 2] if enforce_sorted else [3, 6, 2, 5])

    def loop(model: nn.Module) -> Iterator[Any]:
        for _ in range(4):
            output = model(ids, lengths)
            F.cross_entropy(output, targets).backward()
            yield output

    def build() -> nn.Module:
        return Packed(enforce_sorted)

    probe = bit_for_bit(build, loop, layer_types=layer_types)
    torch.default_generator.manual_seed(0)
    expected = fisher_by_sample(build(), F.cross_entropy, (ids, lengths), targets, 4)
    found = probe.fisher_diagonal(missing="skip").by_parameter()
    assert "head.weight" in found
    assert_all_close(found, expected)


class Bag(nn.Module):
    """Bags of words, by ids and offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 4, mode="sum"), nn.Linear(4, 3)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(ids, offsets)))


def test_bag_offsets() -> None:
    bags = [torch.randint(9, (size,)) for size in (2, 1, 4, 3, 2)]
    ids, offsets = torch.cat(bags), torch.tensor([0, 2, 3, 7, 10])
    targets = torch.randint(3, (5,))

    def loop(model: nn.Module) -> Iterator[Any]:
        for _ in range(4):
            output = model(ids, offsets)
            F.cross_entropy(output, targets).backward()
            yield output

    probe = bit_for_bit(Bag, loop, layer_types=(nn.Linear, nn.EmbeddingBag))
    torch.default_generator.manual_seed(0)
    model = Bag()
    total: dict[str, Tensor] = {}
    for bag, target in zip(bags, targets, strict=True):
        model.zero_grad()
        F.cross_entropy(model(bag, torch.tensor([0])), target[None]).backward()
        for name, p in model.named_parameters():
            total[name] = total.get(name, 0) + p.grad**2 / 5
    found = probe.fisher_diagonal(missing="skip").by_parameter()
    assert_all_close(found, total)
    assert "head.weight" in found


# ---- the model changes under the probe


def test_a_replaced_layer_is_refused_by_its_name_and_the_others_are_told() -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model) as probe:
        train(model, batch, 2)
        model[4] = nn.Linear(5, 3)
        with pytest.warns(CurvatureWarning, match="another module has taken its place"):
            step(model, batch)
        train(model, batch, 3)
        with pytest.raises(AttributionError, match=r"'4'.*new probe"):
            probe.fisher_diagonal()
        assert probe.fisher_diagonal(missing="skip").keys() == {"0", "2"}
        probe.reset()
        train(model, batch, 2)
        found = probe.fisher_diagonal(missing="skip")
        assert found.keys() == {"0", "2"}
        assert_all_close(found.by_parameter(), reference(model, batch))
        with pytest.raises(AttributionError, match="'4'"):
            probe.fisher_diagonal()
    with CurvatureProbe(model) as probe:
        step(model, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def exchange_by_assign(model: nn.Module) -> None:
    other = {name: torch.randn_like(t) for name, t in model.state_dict().items()}
    model.load_state_dict(other, assign=True)


def exchange_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = torch.randn_like(p)


def exchange_parameters(model: nn.Module) -> None:
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.randn_like(p)))


def load_in_place(model: nn.Module) -> None:
    model.load_state_dict({name: torch.randn_like(t) for name, t in model.state_dict().items()})


EXCHANGES = [exchange_by_assign, exchange_data, exchange_parameters, load_in_place]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_parameters_that_are_exchanged_between_steps_are_followed(exchange: Callable[[nn.Module], None]) -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model) as probe:
        before = reference(model, batch)
        train(model, batch, 2)
        exchange(model)
        model.requires_grad_(True)
        train(model, batch, 2)
        after = reference(model, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), {n: (before[n] + after[n]) / 2 for n in before})


@pytest.mark.parametrize("exchange", [exchange_by_assign, exchange_parameters])
def test_parameters_that_are_exchanged_before_the_backward(exchange: Callable[[nn.Module], None]) -> None:
    """The backward goes to the old ones, which the forward computed with."""
    model, batch = mlp(), data()
    with CurvatureProbe(model) as probe:
        before = reference(model, batch)
        loss = F.cross_entropy(model(batch[0]), batch[1])
        exchange(model)
        model.requires_grad_(True)
        loss.backward()
        assert_all_close(probe.fisher_diagonal().by_parameter(), before)
        train(model, batch)
        after = reference(model, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), {n: (before[n] + after[n]) / 2 for n in before})


def test_parameters_of_another_shape_are_refused() -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model) as probe:
        step(model, batch)
        model[2].weight = nn.Parameter(torch.randn(5, 6)[:, :6].clone())
        step(model, batch)
        probe.fisher_diagonal()
        model[0].weight, model[0].bias = nn.Parameter(torch.randn(7, 4)), nn.Parameter(torch.randn(7))
        model[2].weight = nn.Parameter(torch.randn(5, 7))
        train(model, batch, 3)
        with pytest.raises(AttributionError, match="other shapes"):
            probe.fisher_diagonal()
        assert probe.fisher_diagonal(missing="skip").keys() == {"4"}


def test_a_parameter_that_is_removed_is_refused() -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model) as probe:
        step(model, batch)
        model[2].bias = None
        train(model, batch, 2)
        with pytest.raises(AttributionError, match="'2'"):
            probe.fisher_diagonal()
        assert probe.fisher_diagonal(missing="skip").keys() == {"0", "4"}


def test_weights_on_meta() -> None:
    """A model that has no memory yet, and gets it later."""
    with torch.device("meta"):
        model = mlp()
    with CurvatureProbe(model) as probe:
        model(torch.randn(6, 4, device="meta")).sum().backward()
        with pytest.raises(SecorderError, match="meta"):
            probe.fisher_diagonal()
        model.to_empty(device="cpu")
        for p in model.parameters():
            nn.init.normal_(p)
        probe.reset()
        batch = data()
        train(model, batch, 3)
        assert probe.num_samples == 18
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


def test_a_model_that_moves_to_another_dtype() -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model, accumulator_dtype=torch.float64) as probe:
        train(model, batch, 2)
        model.float()
        train(model, (batch[0].float(), batch[1]), 2)
        model.double()
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch), 1e-4)


RESETTABLE: dict[str, Callable[[nn.Module, Any], Any]] = {
    "frozen": lambda m, b: (m[0].requires_grad_(False), step(m, b)),
    "empty": lambda m, b: m(b[0][:0]).sum().backward(),
    "bad": lambda m, b: step(m, (b[0] * float("nan"), b[1])),
    "assign": lambda m, b: exchange_by_assign(m),
    "two forwards": lambda m, b: (F.cross_entropy(m(b[0]), b[1]) + F.cross_entropy(m(b[0] * 2), b[1])).backward(),
    "penalty": lambda m, b: (F.cross_entropy(m(b[0]), b[1]) + m[0].weight.square().sum()).backward(),
    "one": lambda m, b: step(m, (b[0][:1], b[1][:1])),
    "wrong loss": lambda m, b: m(b[0]).sum().backward(),
}


@pytest.mark.parametrize("what", RESETTABLE)
@pytest.mark.parametrize("before", [0, 1, 3])
def test_reset_after_any_of_it(what: str, before: int) -> None:
    model, batch = mlp(), data()
    with CurvatureProbe(model) as probe:
        train(model, batch, before)
        RESETTABLE[what](model, batch)
        model.zero_grad()
        for p in model.parameters():
            p.requires_grad_(True)
        probe.reset()
        train(model, batch, 3)
        assert probe.num_samples == 18
        assert_all_close(probe.fisher_diagonal().by_parameter(), reference(model, batch))


# ---- how the model is called


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.value = make(), nn.Linear(4, 1)

    def get_value(self, x: Tensor) -> Tensor:
        return self.value(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def nothing_told(probe: CurvatureProbe) -> str:
    with pytest.raises(ProbeStateError, match="nothing is accumulated") as told:
        probe.fisher_diagonal()
    return str(told.value)


def test_methods_that_are_called_in_place_of_the_module() -> None:
    agent, batch = Agent(), data()
    with CurvatureProbe(agent) as probe:
        agent.get_value(batch[0]).sum().backward()
        agent.forward(batch[0]).sum().backward()
        assert "methods" in nothing_told(probe)
        agent.zero_grad()
        step(agent, batch)
        found = probe.fisher_diagonal()
        assert_all_close(found.by_parameter(), reference(agent, batch))
        assert found["value"].abs().max() == 0


@pytest.mark.parametrize("together", [True, False])
def test_layers_that_are_trained_by_methods_only_are_not_zero_but_refused(together: bool) -> None:
    agent, batch = Agent(), data()
    expected = reference(agent, batch)
    with CurvatureProbe(agent) as probe:
        for _ in range(3):
            agent.zero_grad()
            loss, value_loss = F.cross_entropy(agent(batch[0]), batch[1]), agent.get_value(batch[0]).square().mean()
            if together:
                (loss + value_loss).backward()
            else:
                value_loss.backward()
                loss.backward()
        with pytest.raises(AttributionError, match=r"'value'.*outside of the layer's calls"):
            probe.fisher_diagonal()
        found = probe.fisher_diagonal(missing="skip")
        assert found.keys() == {"body.0", "body.2"}
        assert_all_close(found.by_parameter(), expected)


def test_a_parent_that_calls_its_parts() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = make()

        def forward(self, x: Tensor) -> Tensor:
            for part in self.encoder:
                x = part(x)
            return x

    parent, batch = Parent(), data()
    with CurvatureProbe(parent.encoder) as probe:
        step(parent, batch)
        assert "parent that calls its parts" in nothing_told(probe)


def test_forwards_without_gradients() -> None:
    model, batch = make(), data()
    with CurvatureProbe(model) as probe:
        with torch.no_grad():
            model(batch[0])
        message = nothing_told(probe)
        assert "no_grad" in message
        assert "methods" not in message
        assert "torch.compile" not in message


class Policy(nn.Module):
    """Its forward is for rollouts; a method is called in its place in training."""

    def __init__(self) -> None:
        super().__init__()
        self.extractor, self.heads, self.idle = make(), nn.ModuleList([nn.Linear(3, 3)]), nn.Linear(4, 4)

    def evaluate_actions(self, x: Tensor) -> Tensor:
        return self.heads[0](self.extractor(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.evaluate_actions(x).argmax(1)


class Evaluation(nn.Module):
    """What the message advises: a module whose forward calls the method."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, x: Tensor) -> Tensor:
        return self.policy.evaluate_actions(x)


def test_a_method_that_trains_what_is_called_without_gradients() -> None:
    policy, batch = Policy(), data()
    with CurvatureProbe(policy) as probe:
        for _ in range(2):
            with torch.no_grad():
                policy(batch[0])
            F.cross_entropy(policy.evaluate_actions(batch[0]), batch[1]).backward()
        message = nothing_told(probe)
        assert "no_grad" in message
        assert "evaluate_actions" in message
        assert "(perhaps 'extractor')" in message  # a list is never called, and no gradient comes to the other
        assert "torch.compile" in message
        with torch.no_grad():
            policy.extractor[0].weight.add_(1.0)
        policy.zero_grad()
        assert nothing_told(probe) == message  # gradients are gone, and parameters have moved
    evaluation = Evaluation(policy)
    policy.zero_grad()
    with (
        CurvatureProbe(evaluation, reduction="mean") as probe,
        CurvatureProbe(policy.extractor, reduction="mean") as own,
    ):
        step(evaluation, batch)
        expected = reference(evaluation, batch)
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
        found = own.fisher_diagonal().by_parameter()
        assert_all_close(found, {name: expected[f"policy.extractor.{name}"] for name in found})


def test_other_reasons_why_nothing_is_accumulated() -> None:
    model, batch = make(), data()
    with CurvatureProbe(model) as probe:
        with probe.paused():
            step(model, batch)
        message = nothing_told(probe)
        assert "paused" in message
        assert "no_grad" not in message
    with CurvatureProbe(model) as probe:
        torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))
        message = nothing_told(probe)
        assert "torch.autograd.grad" in message
        assert "paused" not in message
    with CurvatureProbe(model) as probe:
        model(batch[0]).detach()
        assert "no backward" in nothing_told(probe)
    with CurvatureProbe(model) as probe:
        model(batch[0][:0]).sum().backward()
        assert "empty" in nothing_told(probe)


@pytest.mark.parametrize("lazily", [lambda model, x: (model(x) for _ in "1"), lambda model, x: lambda: model(x)])
def test_a_model_that_computes_after_its_forward(lazily: Callable[..., Any]) -> None:
    class Later(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make()

        def forward(self, inputs: Tensor) -> Any:
            return lazily(self.inner, inputs)

    model, (inputs, targets) = Later(), data()
    with CurvatureProbe(model) as probe:
        output = model(inputs)
        output = output() if callable(output) else next(output)
        F.cross_entropy(output, targets).backward()
        message = nothing_told(probe)
        assert "computes only when it is used" in message
        assert "no backward has reached its parameters" not in message


def test_all_that_happens_leaves_no_trace() -> None:
    model, batch = mlp(), data()
    before = traces(model)
    for what in RESETTABLE:
        if what != "assign":
            probe = CurvatureProbe(model)
            RESETTABLE[what](model, batch)
            model.requires_grad_(True)
            copy.deepcopy(model)
            probe.detach()
            assert traces(model) == before, what


# ---- other ways to train


def loop_of(*batches: Any, optimizer: Callable[..., Any] = torch.optim.SGD) -> Callable[[nn.Module], Iterator[Any]]:
    """A loop with an optimizer, over batches in turn."""

    def loop(model: nn.Module) -> Iterator[Any]:
        steps = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for inputs, targets in batches * 3:
            steps.zero_grad()
            output = model(inputs)
            loss = F.cross_entropy(output, targets)
            loss.backward()
            yield output
            steps.step()

    return loop


def words(kind: Any, sparse: bool) -> nn.Module:
    return nn.Sequential(kind(7, 4, sparse=sparse), nn.Flatten(), nn.Tanh(), nn.LazyLinear(3))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("layer_types", [None, "all"])
def test_sparse_gradients(kind: Any, layer_types: Any) -> None:
    """Of a table that is looked at or not, added up over steps or cleared; and by one-shot calls."""
    batch = torch.randint(7, (6, 3)), torch.randint(3, (6,))

    def build(sparse: bool) -> nn.Module:
        model = words(kind, sparse)
        model(batch[0])
        return model

    probe = bit_for_bit(lambda: build(True), loop_of(batch), layer_types=layer_types)
    dense = bit_for_bit(lambda: build(False), loop_of(batch), layer_types=layer_types)
    assert_all_close(probe.fisher_diagonal(), dense.fisher_diagonal())
    assert probe.gradient_noise_scale().total.value == pytest.approx(dense.gradient_noise_scale().total.value)
    one, other = (p.fisher_diagonal(F.cross_entropy, *batch) for p in (probe, dense))
    assert_all_close(one, other)


def test_a_use_of_a_table_with_sparse_gradients_outside_of_its_layer_is_seen() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3))
    ids, targets = torch.randint(7, (6, 3)), torch.randint(3, (6,))
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for _ in range(3):
            (F.cross_entropy(model(ids), targets) + 0.1 * model[0](ids).square().mean()).backward()
        with pytest.raises(AttributionError, match="layer '0'"):
            probe.fisher_diagonal()


def test_an_optimizer_that_steps_in_the_middle_of_the_backward() -> None:
    """Layers are measured with the parameters that the forward computed with, or refused."""

    def build() -> nn.Module:
        parts = {"fc": nn.Linear(4, 3), "shift": nn.Linear(2, 3)}
        net = Net(lambda m, x: torch.tanh(m.fc(x)) * m.shift(m.condition), **parts)
        net.condition = nn.Parameter(torch.randn(1, 2))  # a row that all samples share: the model runs again for it
        return net

    inputs, targets = data()
    taken: list[dict[str, Tensor]] = []

    def loop(model: nn.Module) -> Iterator[Any]:
        def update(p: Tensor) -> None:
            with torch.no_grad():
                p -= 0.1 * p.grad
            p.grad = None

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(update)
        for _ in range(3):
            taken.append({n: p.detach().clone() for n, p in model.named_parameters()})
            output = model(inputs)
            F.cross_entropy(output, targets).backward()
            yield output

    probe = bit_for_bit(build, loop, layers=["fc", "shift"])
    model, expected = build(), []
    for parameters in taken[:3]:
        model.load_state_dict(parameters)
        expected.append(reference(model, (inputs, targets)))
    mean = {n: sum(one[n] for one in expected) / 3 for n in expected[0]}
    found = probe.fisher_diagonal(missing="skip").by_parameter()
    assert "fc.weight" in found
    assert_all_close(found, mean)


def test_anomaly_detection_and_warnings_that_are_errors() -> None:
    batch = data()

    def loop(model: nn.Module) -> Iterator[Any]:
        with torch.autograd.detect_anomaly(check_nan=True):
            yield from loop_of(batch)(model)

    with pytest.warns(UserWarning, match="Anomaly"):
        probe = bit_for_bit(mlp, loop)
    assert probe.num_samples == 18


@pytest.mark.filterwarnings("error")
def test_a_warning_is_no_error_in_the_middle_of_training() -> None:
    model, (inputs, targets) = mlp(), data()
    with CurvatureProbe(model) as probe:
        (F.cross_entropy(model(inputs), targets) + F.cross_entropy(model(inputs * 2), targets)).backward()
        with pytest.raises(AttributionError, match="forwards"):
            probe.fisher_diagonal()


def test_mixed_precision() -> None:
    inputs, targets = data()

    def loop(model: nn.Module) -> Iterator[Any]:
        model.float()
        for _ in range(3):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                output = model(inputs.float())
                loss = F.cross_entropy(output.float(), targets)
            (loss * 64).backward()
            yield output

    probe = bit_for_bit(mlp, loop, loss_scale=64)
    expected = reference(mlp(), (inputs, targets))
    assert_all_close(probe.fisher_diagonal().by_parameter(), expected, 5e-2)


@pytest.mark.parametrize("where", ["output", "module", "parameter", "parameter, in place of it"])
def test_hooks_of_the_users_own_see_and_change_what_they_did(where: str) -> None:
    inputs, targets = data()

    def loop(model: nn.Module) -> Iterator[Any]:
        seen: list[Tensor] = []
        if where == "module":
            model[2].register_full_backward_hook(lambda m, i, o: seen.append(o[0].clone()))
        if where.startswith("parameter"):
            doubles = where != "parameter"
            model[2].weight.register_hook(lambda g: (seen.append(g.clone()), g * 2 if doubles else None)[1])
        for _ in range(4):
            model.zero_grad()
            output = model(inputs)
            if where == "output":
                output.register_hook(lambda g: seen.append(g.clone()))
            F.cross_entropy(output, targets).backward()
            yield output, list(seen)

    probe = bit_for_bit(mlp, loop)
    assert_all_close(probe.fisher_diagonal().by_parameter(), reference(mlp(), (inputs, targets)))


def test_parameter_groups_by_autograd_edges_are_untouched() -> None:
    """What user code finds on its parameters is what it put there, in its order."""
    model, batch = mlp(), data()
    order: list[str] = []
    model[0].weight.register_hook(lambda g: order.append("first"))
    with CurvatureProbe(model):
        model[0].weight.register_hook(lambda g: order.append("second"))
        train(model, batch, 2)
    assert order == ["first", "second"] * 2
    assert len(model[0].weight._backward_hooks) == 2


class Captures(nn.Module):
    """Puts hooks on its parts when it is called for the first time, and remembers that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = make(), nn.Linear(3, 3)
        self.captured: list[Tensor] = []

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        if not hasattr(self, "installed"):
            self.body.register_forward_hook(lambda _, args, kwargs, y: self.captured.append(y), with_kwargs=True)
            self.head.register_full_backward_hook(lambda *_: None)
            self.installed = True
        self.captured.clear()
        return self.head(self.body(x)), len(self.captured)


def test_hooks_that_a_model_puts_on_its_parts_are_there_once() -> None:
    batch = data()
    found: list[Any] = []

    def loop(model: nn.Module) -> Iterator[Any]:
        for _ in range(3):
            model.zero_grad()
            output, captured = model(batch[0])
            F.cross_entropy(output, batch[1]).backward()
            yield output, captured
        found.append(traces(model))

    probe = bit_for_bit(Captures, loop)
    probe.detach()
    counts = [{name: len(own) for name, own in one["hooks"]["body"].items()} for one in found]
    assert counts == [{"_forward_hooks": 1, "_forward_hooks_with_kwargs": 1}] * 2
    model = Captures()
    before = traces(model)
    per_layer_hessian_diagonal(model, lambda output, y: F.cross_entropy(output[0], y), *batch)
    assert traces(model) == before


class Collects(nn.Module):
    """Keeps what its forward makes in containers: the losses of experts, features, counts."""

    def __init__(self, cleared: bool) -> None:
        super().__init__()
        self.a, self.b, self.head, self.cleared = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3), cleared
        self.losses: list[Tensor] = []
        self.stats: dict[str, list[float]] = {"mean": []}
        self.seen: set[int] = set()
        self.features: dict[str, Tensor] = {}
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.cleared:
            self.losses.clear()
        self.calls += 1
        self.seen.add(self.calls)
        hidden = torch.tanh(self.a(x))
        self.features["hidden"] = hidden
        self.losses.append(hidden.square().sum(1).mean())
        self.stats["mean"].append(float(hidden.detach().mean()))
        return self.head(hidden + self.b(x))


@pytest.mark.parametrize("cleared", [True, False])
def test_what_a_forward_collects_is_what_its_own_calls_collected(cleared: bool) -> None:
    batches = [data(), data(4), data(1), data()]

    def loop(model: nn.Module) -> Iterator[Any]:
        for inputs, targets in batches:
            model.zero_grad()
            output = model(inputs)
            loss = (
                F.cross_entropy(output, targets) + sum(model.losses) + model.features["hidden"].square().sum(1).mean()
            )
            loss.backward()
            yield output, len(model.losses), model.stats["mean"], model.calls, sorted(model.seen)
            model.losses.clear()

    probe = bit_for_bit(lambda: Collects(cleared), loop)
    torch.default_generator.manual_seed(0)
    model = Collects(cleared)
    total: dict[str, Tensor] = {}
    for inputs, targets in batches:
        for x, t in zip(inputs.split(1), targets.split(1), strict=True):
            model.zero_grad()
            model.losses.clear()
            output = model(x)
            (F.cross_entropy(output, t) + model.losses[0] + model.features["hidden"].square().sum()).backward()
            for name, p in model.named_parameters():
                total[name] = total.get(name, 0) + p.grad**2 / 17
    assert probe.num_samples == 17
    assert_all_close(probe.fisher_diagonal().by_parameter(), total)


STEPS: Counter[str] = Counter()
WARMUP = 0


class Scheduled(nn.Module):
    """Keeps where its schedule is in variables of the script, on its class, and in what its code closes over."""

    where = 0

    def __init__(self, count: Callable[[], int]) -> None:
        super().__init__()
        self.a, self.b, self.count = nn.Linear(4, 5), nn.Linear(5, 3), count

    def forward(self, x: Tensor) -> Tensor:
        global WARMUP
        WARMUP += 1
        STEPS["forward"] += 1
        type(self).where += 1
        hidden = torch.tanh(self.a(x)) * (WARMUP + STEPS["forward"] + self.where + self.count())
        if hidden.requires_grad:
            hidden.register_hook(lambda _: STEPS.update(["backward"]))
        outputs: Tensor = self.b(hidden)
        return outputs


def scheduled() -> Scheduled:
    global WARMUP
    WARMUP, Scheduled.where, calls = 0, 0, 0
    STEPS.clear()

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    return Scheduled(count)


def test_a_schedule_that_the_forward_moves_on() -> None:
    def loop(model: nn.Module) -> Iterator[Any]:
        for count in (6, 4, 6, 6):
            step(model, data(count))
            yield WARMUP, dict(STEPS), Scheduled.where

    assert bit_for_bit(scheduled, loop).num_samples == 22


class Endless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.noise = nn.Linear(4, 3), itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * (1 + next(self.noise))


def test_an_iterator_that_the_model_holds_is_left_alone() -> None:
    def loop(model: nn.Module) -> Iterator[Any]:
        for _ in range(3):
            step(model, data())
            yield None

    probe = bit_for_bit(Endless, loop)
    with pytest.raises(AttributionError, match="attribute 'noise'"):
        probe.fisher_diagonal()


def test_parameters_that_are_computed_from_others() -> None:
    """An inner step, and a loss of the model at what it leads to: the outer backward is no mean over samples."""
    model, (inputs, targets) = make(), data()
    own = dict(model.named_parameters())
    with CurvatureProbe(model, reduction="mean") as probe:
        inner = F.cross_entropy(model(inputs), targets)
        gradients = torch.autograd.grad(inner, list(own.values()), create_graph=True)
        adapted = {name: p - 0.1 * g for (name, p), g in zip(own.items(), gradients, strict=True)}
        with pytest.warns(CurvatureWarning, match="computed from others"):
            output = torch.func.functional_call(model, adapted, (inputs,))
        F.cross_entropy(output, targets).backward()
        with pytest.raises(AttributionError, match="functional_call"):
            probe.fisher_diagonal()


# ---- layers of no width


@pytest.mark.parametrize("layer_types", [None, "all"])
@pytest.mark.parametrize("size", [(4, 4), (4, 3, 4)])
def test_layers_without_inputs_or_outputs(size: tuple[int, ...], layer_types: Any) -> None:
    """A width that was divided down to zero: those layers have no numbers, and the others have theirs."""
    parts = {"a": nn.Linear(4, 0), "b": nn.Linear(0, 3), "c": nn.Linear(4, 5), "d": nn.Linear(5, 3)}
    model = Net(lambda m, x: (m.b(m.a(x)) + m.d(torch.tanh(m.c(x)))).view(len(x), -1, 3).mean(1), **parts)
    batch = torch.randn(size), torch.randint(3, (4,))
    expected = reference(model, batch)
    with CurvatureProbe(model, layer_types) as probe:
        train(model, batch, 2)
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
    with CurvatureProbe(model, layer_types, accumulate="trace") as probe:
        train(model, batch, 2)
        for name, trace in probe.fisher_trace().items():
            whole = sum(float(expected[f"{name}.{local}"].sum()) for local in ("weight", "bias"))
            assert trace.value == pytest.approx(whole, rel=1e-9)


class MovingTeacher(nn.Module):
    """A momentum encoder that the forward moves on before it is used, and weights that it normalises in place."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = make(), make().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for p, q in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            q.data = 0.5 * q.data + 0.5 * p.data
        with torch.no_grad():
            self.student[2].weight.div_(self.student[2].weight.norm())
        similarity: Tensor = self.student(x) * self.teacher(x)
        return similarity


def test_parameters_that_the_forward_overwrites() -> None:
    """Attributions run the forward, too, and leave the parameters as they were."""
    bare, probed = MovingTeacher(), MovingTeacher()
    x, y = data()
    probe = CurvatureProbe(probed, reduction="mean", layers="student.*")
    squares: dict[str, Tensor] = {}
    for _ in range(3):
        twin = copy.deepcopy(bare)
        for loss in F.cross_entropy(twin(x), y, reduction="none"):
            twin.zero_grad()
            loss.backward(retain_graph=True)
            for name, p in twin.named_parameters():
                if p.grad is not None:
                    squares[name] = squares.get(name, torch.zeros_like(p)) + p.grad**2
        for model in (bare, probed):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
        for p, q in zip(bare.parameters(), probed.parameters(), strict=True):
            assert torch.equal(p, q)
    found = probe.fisher_diagonal().by_parameter()
    assert_all_close(found, {name: total / (3 * len(x)) for name, total in squares.items()})
    probe.detach()
