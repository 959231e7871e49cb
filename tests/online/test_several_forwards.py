"""One backward through several forwards: samples of their own, or row n of all of them; or it is not told."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder import CurvatureProbe
from secorder.online.reading import unreadable

from ..helpers import Net, make
from ..reference import assert_all_close, named_parameters
from .loops import follow, rows


def mlp() -> nn.Module:
    return make()


def shared() -> nn.Module:
    """A layer that is used twice in each forward."""
    return Net(lambda m, x: m.b(torch.tanh(m.a(torch.tanh(m.a(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 3))


def tied() -> nn.Module:
    model = Net(lambda m, x: F.linear(torch.tanh(m.a(x)), torch.eye(3, 4)) + m.b(torch.tanh(m.b(x)))[:, :3],
                a=nn.Linear(4, 4), b=nn.Linear(4, 4))  # fmt: skip
    model.b.weight = model.a.weight
    return model


def recurrent() -> nn.Module:
    """Measured by running the module again."""
    return Net(lambda m, x: m.head(m.rnn(x.unsqueeze(1))[0][:, -1]),
               rnn=nn.LSTM(4, 5, batch_first=True), head=nn.Linear(5, 3))  # fmt: skip


def checkpointed(reentrant: bool) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(checkpoint(lambda h: torch.tanh(m.mid(torch.tanh(h))), m.a(x), use_reentrant=reentrant))

    return Net(forward, a=nn.Linear(4, 5), mid=nn.Linear(5, 5), b=nn.Linear(5, 3))


def convolutional() -> nn.Module:
    return Net(lambda m, x: m.head(torch.tanh(m.conv(x.view(-1, 1, 2, 2))).flatten(1)),
               conv=nn.Conv2d(1, 2, 2, padding=1), head=nn.Linear(18, 3))  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "shared": shared,
    "tied": tied,
    "recurrent": recurrent,
    "checkpointed": lambda: checkpointed(False),
    "reentrant": lambda: checkpointed(True),
    "convolutional": convolutional,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


def squares(model: nn.Module, losses: Sequence[Tensor]) -> dict[str, Tensor]:
    """(1/N) Σ_n (∂ℓ_n/∂θ)²."""
    parameters = named_parameters(model)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for loss in losses:
        for p in parameters.values():
            p.grad = None
        loss.backward()
        for name, p in parameters.items():
            if p.grad is not None:
                total[name] += p.grad**2 / len(losses)
    return total


def two(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 4, requires_grad=True), torch.randint(3, (n,))) for n in sizes]


def losses(model: nn.Module, sets: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    return sum(F.cross_entropy(model(x), y) for x, y in sets)


@pytest.mark.parametrize("options", [{"forwards": "separate"}, {}])
@pytest.mark.parametrize("sizes", [(4, 3), (5, 3, 1), (4, 4), (3, 3, 4)])
def test_separate(model: nn.Module, options: Any, sizes: tuple[int, ...]) -> None:
    """Each forward's samples are its own: D(real) + D(fake), two sets of points."""
    probe = CurvatureProbe(model, layer_types="all", reduction="mean", **options)
    for _ in range(3):
        sets = two(*sizes)
        with probe.paused():
            expected = squares(
                model, [F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) for x, y in sets for n in range(len(x))]
            )
        losses(model, sets).backward()
        ambiguous = not options and len(set(sizes)) < len(sizes)
        if ambiguous:
            assert unreadable(probe._fisher)
            assert all("forwards=" in reason for reason in unreadable(probe._fisher).values())
            return
        assert probe.num_samples == sum(sizes)
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
        probe.reset()


@pytest.mark.parametrize("count", [2, 3])
def test_joined(model: nn.Module, count: int) -> None:
    """Row n of all forwards is one sample: a siamese net, a rollout."""
    probe = CurvatureProbe(model, layer_types="all", forwards="joined", reduction="mean")

    def loss(sets: Sequence[Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(sum(torch.tanh(model(x)) * (i + 1) for i, x in enumerate(sets)), y)

    for n in (4, 4, 1, 3):
        sets, y = [torch.randn(n, 4, requires_grad=True) for _ in range(count)], torch.randint(3, (n,))
        with probe.paused():
            expected = squares(model, [loss([x[i : i + 1] for x in sets], y[i : i + 1]) for i in range(n)])
        loss(sets, y).backward()
        assert probe.num_samples == n
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
        probe.reset()


@pytest.mark.parametrize("parts", [(0,), (1,), (0, 1)])
def test_joined_where_the_loss_takes_of_a_forward_what_it_likes(parts: tuple[int, ...]) -> None:
    """A forward whose output the loss does not depend on, or through some of its layers only."""
    heads = {name: nn.Linear(4, 3) for name in ("a", "b")}
    model = Net(lambda m, x: (torch.tanh(m.stem(x)), m.a(torch.tanh(m.stem(x))), m.b(x)), stem=nn.Linear(4, 4), **heads)
    probe = CurvatureProbe(model, forwards="joined", reduction="mean")

    def loss(x: Tensor, other: Tensor, y: Tensor) -> Tensor:
        first, second = model(x), model(other)
        return F.cross_entropy(first[1] + sum(second[1 + i] for i in parts), y)

    batch = (torch.randn(4, 4), torch.randn(4, 4), torch.randint(3, (4,)))
    with probe.paused():
        expected = squares(model, [loss(*one) for one in rows(batch)])
    loss(*batch).backward()
    assert_all_close(probe.fisher_diagonal().by_parameter(), expected)


@pytest.mark.parametrize("forwards", [None, "separate", "joined"])
@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("sizes", [(4, 4), (4, 3)])
@pytest.mark.parametrize("kind", ["mlp", "checkpointed", "reentrant"])
def test_a_backward_over_a_recorded_and_an_unrecorded_forward(
    forwards: Any, every: int, sizes: tuple[int, int], kind: str
) -> None:
    """One forward of the two is not recorded: what it brings belongs to samples that nobody saw."""
    model = MODELS[kind]()
    probe = CurvatureProbe(model, every=every, forwards=forwards)
    for _ in range(every):
        sets = two(*sizes)
        model.zero_grad()
        losses(model, sets).backward()
        found = [p.grad.clone() for p in model.parameters()]
        with probe.paused():
            model.zero_grad()
            losses(model, sets).backward()
        assert all(torch.equal(g, p.grad) for g, p in zip(found, model.parameters(), strict=True))
    assert set(unreadable(probe._fisher)) == set(probe.layer_names)


def test_a_forward_of_another_mode_that_is_not_recorded() -> None:
    """A teacher without gradients does not count."""
    model = mlp()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        with torch.no_grad():
            teacher = model(x).softmax(1)
        return F.cross_entropy(model(x), y) + F.kl_div(model_log(model, x), teacher, reduction="batchmean")

    def model_log(model: nn.Module, x: Tensor) -> Tensor:
        return model(x * 0.5).log_softmax(1)

    batches = [(torch.randn(4, 4), torch.randint(3, (4,))) for _ in range(3)]
    assert follow(model, batches, loss, forwards="joined").exact
    assert set(follow(model, batches, loss).refused) == {"0", "2"}


def test_micro_batches_that_add_up_in_one_backward() -> None:
    """Losses of four micro-batches, and one backward: each a forward with samples of its own."""
    model = recurrent()
    probe = CurvatureProbe(model, layer_types="all", forwards="separate", loss_scale=1 / 4, reduction="mean")
    sets = two(3, 3, 3, 3)
    with probe.paused():
        expected = squares(
            model, [F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) for x, y in sets for n in range(3)]
        )
    (losses(model, sets) / 4).backward()
    assert_all_close(probe.fisher_diagonal().by_parameter(), expected)


def test_policy_gradients_with_a_forward_a_step() -> None:
    """One observation a step, of as many environments: the loss of an environment is that of its whole rollout."""
    policy = mlp()
    steps, count = 5, 4

    def loss(model: nn.Module, batch: Any) -> Tensor:
        observations, actions, returns = batch
        chosen = [
            F.log_softmax(model(observations[:, t]), 1).gather(1, actions[:, t, None])[:, 0] for t in range(steps)
        ]
        return -(torch.stack(chosen, 1) * returns).sum(1).mean()

    batches = [
        (torch.randn(n, steps, 4), torch.randint(3, (n, steps)), torch.randn(n, steps)) for n in (count, count, 2)
    ]
    assert follow(policy, batches, loss, forwards="joined").exact
    assert set(follow(policy, batches, loss).refused) == {"0", "2"}


def test_policy_gradients_of_one_episode() -> None:
    """One observation a forward: of one sample each, which are each a sample of their own or all one."""
    policy = mlp()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        observations, actions, returns = batch
        return sum(
            F.cross_entropy(model(o[None]), a[None]) * r for o, a, r in zip(observations, actions, returns, strict=True)
        )

    episodes = [(torch.randn(6, 4), torch.randint(3, (6,)), torch.randn(6)) for _ in range(3)]
    came = follow(policy, episodes, loss, lambda b: [b], forwards="joined")
    assert not came.refused
    assert follow(policy, episodes, loss).refused or follow(policy, episodes, loss).left_out
    follow(policy, episodes, loss, forwards="separate")


@pytest.mark.parametrize("drop", ["second", "first"])
def test_a_forward_that_has_no_part_in_the_backward(drop: str) -> None:
    model = mlp()
    probe = CurvatureProbe(model, reduction="mean")
    (x, y), (other, _) = two(4, 4)
    with probe.paused():
        expected = squares(model, [F.cross_entropy(model(x[n : n + 1]), y[n : n + 1]) for n in range(4)])
    if drop == "second":
        loss = F.cross_entropy(model(x), y)
        model(other)
    else:
        model(other)
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    assert_all_close(probe.fisher_diagonal().by_parameter(), expected)


def test_forwards_of_two_steps_in_flight() -> None:
    """Each has a backward of its own, in another order."""
    model = mlp()
    probe = CurvatureProbe(model, reduction="mean")
    (x, y), (other, z) = two(4, 3)
    with probe.paused():
        pairs = [(a[n : n + 1], b[n : n + 1]) for a, b in ((x, y), (other, z)) for n in range(len(a))]
        expected = squares(model, [F.cross_entropy(model(a), b) for a, b in pairs])
    first, second = F.cross_entropy(model(x), y), F.cross_entropy(model(other), z)
    second.backward()
    first.backward()
    assert_all_close(probe.fisher_diagonal().by_parameter(), expected)


def test_a_generator_through_a_frozen_discriminator() -> None:
    """The discriminator's parameters get gradients that nobody uses: its probe sees samples all the same."""
    generator = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    critic = mlp()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return critic(model(batch[0])).square().mean()

    batches = [(torch.randn(4, 4),) for _ in range(3)]
    critic.requires_grad_(False)
    assert follow(generator, batches, loss).exact


@pytest.mark.parametrize("kind", ["GRUCell", "LSTMCell", "Linear"])
def test_a_state_that_one_forward_hands_to_the_next(kind: str) -> None:
    """What a forward was given was computed by the layers that it calls itself."""

    def forward(m: Any, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if kind == "Linear":
            state = torch.tanh(m.cell(torch.cat([x, state], 1)))
        else:
            state = m.cell(x, state) if kind == "GRUCell" else m.cell(x, (state, state))[0]
        return m.head(state), state

    def loss(model: nn.Module, batch: Any) -> Tensor:
        state, total = torch.zeros(len(batch[0]), 5), torch.zeros(())
        for x in batch[0].unbind(1):
            output, state = model(x, state)
            total = total + F.cross_entropy(output, batch[1])
        return total

    cell = nn.Linear(9, 5) if kind == "Linear" else getattr(nn, kind)(4, 5)
    batches = [(torch.randn(n, 3, 4), torch.randint(3, (n,))) for n in (3, 3, 4)]
    model = Net(forward, cell=cell, head=nn.Linear(5, 3))
    assert follow(model, batches, loss, forwards="joined", layer_types="all").exact
