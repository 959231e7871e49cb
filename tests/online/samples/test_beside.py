"""What a model makes beside its outputs, and a loss that uses it: exact where it is a sum over samples, or refused."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe, CurvatureWarning
from secorder.online.reading import unreadable
from secorder.online.samples.beside import Beside

from ...helpers import Net, data
from ..loops import Followed, follow

#: Makes something of the experts' probabilities, shape (N, 3), and of the hidden features, shape (N, 5).
Made = Callable[[Tensor, Tensor], Any]


class Router(nn.Module):
    """A gate over experts, which keeps something beside what it returns, in train mode or always."""

    def __init__(self, made: Made, *, in_training: bool = False) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(5, 3), nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.made, self.in_training = made, in_training
        self.aux: Any = None

    def forward(self, h: Tensor) -> Tensor:
        p = self.gate(h).softmax(-1)
        self.aux = self.made(p, h) if self.training or not self.in_training else None
        return h + torch.stack([p[:, e : e + 1] * torch.tanh(x(h)) for e, x in enumerate(self.experts)]).sum(0)


class Experts(nn.Module):
    """Two such layers in a classifier."""

    def __init__(self, made: Made, *, dropout: float = 0.0, in_training: bool = False) -> None:
        super().__init__()
        self.embed, self.drop, self.head = nn.Linear(4, 5), nn.Dropout(dropout), nn.Linear(5, 3)
        self.blocks = nn.ModuleList(Router(made, in_training=in_training) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.tanh(self.embed(x)))
        for block in self.blocks:
            h = block(h)
        found: Tensor = self.head(h)
        return found


def added(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy, and whatever modules keep, as a loop collects it."""
    ce = F.cross_entropy(model(batch[0]), batch[1])
    return ce + 0.3 * sum(total(m.aux) for m in model.modules() if getattr(m, "aux", None) is not None)


def total(aux: Any) -> Any:
    if isinstance(aux, dict):
        return sum(map(total, aux.values()))
    return sum(map(total, aux)) if isinstance(aux, (list, tuple)) else aux.sum()


def train(made: Made, loss: Any = added, sizes: tuple[int, ...] = (6, 7, 5, 6), **options: Any) -> Followed:
    model = Experts(made, **options)
    return follow(model, [data(n) for n in sizes], loss)


def balance(p: Tensor, _: Tensor) -> Tensor:
    """Fedus et al. (2021): the share of each expert, which has no derivative, times its mean probability."""
    return 3 * (F.one_hot(p.argmax(-1), 3).to(p).mean(0) * p.mean(0)).sum()


def variation(p: Tensor, _: Tensor) -> Tensor:
    """Shazeer et al. (2017): the squared coefficient of variation of experts' importance."""
    importance = p.sum(0)
    return importance.var() / importance.mean() ** 2


def decorrelation(_: Tensor, h: Tensor) -> Tensor:
    return (h.T @ h / len(h) - torch.eye(5)).square().sum()


COUPLING: dict[str, Made] = {
    "balance": balance,
    "variation": variation,
    "decorrelation": decorrelation,
    "entropy of the mean": lambda p, _: (p.mean(0) * p.mean(0).log()).sum(),
    "standard deviation": lambda _, h: F.relu(1 - h.std(0)).mean(),
    "distances": lambda _, h: torch.pdist(h).mean(),
    "in a dict": lambda p, h: {"kl": p.square().mean(), "balance": balance(p, h)},
    "in a list": lambda p, h: [p.square().mean(), [balance(p, h)]],
    "of experts, a vector": lambda p, _: p.mean(0) ** 2,
    "the largest": lambda p, _: p.mean(0).max() * p.amax(),
}


@pytest.mark.parametrize("name", COUPLING)
def test_what_couples_samples_is_refused_where_the_loss_uses_it(name: str) -> None:
    came = train(COUPLING[name])
    before = {"embed", "blocks.0.gate", *(f"blocks.0.experts.{k}" for k in range(3))}
    if name not in ("decorrelation", "standard deviation", "distances"):
        before.add("blocks.1.gate")  # of what the last gate says, and not of what it sees
    assert came.refused.keys() == before  # no such loss has a gradient to what is behind them
    assert all("no sum of what each sample makes" in reason for reason in came.refused.values())


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"in_training": True}, {"dropout": 0.3, "in_training": True}])
def test_it_is_seen_in_train_mode(options: Any) -> None:
    """With dropout, no loop over samples has the same masks: that it is refused is what can be told."""
    model = Experts(balance, **options)
    with pytest.warns(match="balance of experts"):
        came = follow_without_numbers(model)
    assert "embed" in came
    assert "head" not in came


def follow_without_numbers(model: nn.Module, loss: Any = added) -> dict[str, str]:
    with CurvatureProbe(model, reduction="mean") as probe:
        for _ in range(2):
            loss(model, data(6)).backward()
        return unreadable(probe._fisher)


def test_one_sample_without_a_dimension_for_it_is_told_how_to_say_so() -> None:
    """The actor and critic of a rollout: neither output holds the observation's four numbers as samples."""
    parts = {"body": nn.Linear(4, 6), "actor": nn.Linear(6, 2), "critic": nn.Linear(6, 1)}
    model = Net(lambda m, x: (m.actor(h := torch.tanh(m.body(x))).softmax(-1), m.critic(h)), **parts)
    for options, told in (({}, False), ({"sample_dim": {"args": None}}, True)):
        with warnings.catch_warnings(), CurvatureProbe(model, reduction="sum", **options) as probe:
            warnings.simplefilter("ignore", CurvatureWarning)
            for _ in range(3):
                policy, value = model(torch.randn(4))
                (value.square().sum() - policy[0].log()).backward()
            if told:
                assert probe.num_samples == 3
                probe.fisher_diagonal()
            else:
                with pytest.raises(AttributionError, match=r'sample_dim={"x": None}'):
                    probe.fisher_diagonal()


def kept_rows(model: nn.Module, batch: Any) -> Tensor:
    """A loss of samples' own features, which the model keeps."""
    return F.cross_entropy(model(batch[0]), batch[1]) + sum(b.aux.square().sum(1).mean() for b in model.blocks)


def unused(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def detached(model: nn.Module, batch: Any) -> Tensor:
    ce = F.cross_entropy(model(batch[0]), batch[1])
    return ce + sum(b.aux.detach() for b in model.blocks)


def switched_off(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1]) + 0.0 * sum(b.aux for b in model.blocks)


EXACT: dict[str, tuple[Made, Any]] = {
    "kl": (lambda p, _: (p * p.log()).sum(-1).mean(), added),
    "z loss": (lambda p, h: h.logsumexp(-1).square().mean(), added),
    "activations": (lambda _, h: h.abs().mean(), added),
    "commitment": (lambda _, h: (h - h.detach().round()).square().mean(), added),
    "in a dict": (lambda p, h: {"kl": p.square().mean(), "rest": (h.relu().mean(), 2.0 * h.amax(1).mean())}, added),
    "a masked mean": (lambda p, h: (p.square().sum(1) * torch.ones(len(p))).sum() / torch.ones(len(p)).sum(), added),
    "a mean of the largest": (lambda p, _: p.amax(1).mean() + p.sort(1).values[:, 0].mean(), added),
    "rows": (lambda _, h: h, kept_rows),
    "coupling and unused": (balance, unused),
    "coupling and detached": (balance, detached),
    "coupling and switched off": (decorrelation, switched_off),
    "coupling as numbers": (lambda p, h: balance(p, h).item() * h.square().mean(), unused),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_a_sum_over_samples_stays_exact(name: str) -> None:
    came = train(*EXACT[name])
    assert came.exact
    assert not came.warned


def test_a_list_that_grows_is_read_from_its_end() -> None:
    """A loop that forgets to empty it: what was kept before is no part of a forward."""
    kept: dict[str, list[Tensor]] = {"losses": []}

    class Growing(nn.Module):
        def __init__(self, *, coupled: bool) -> None:
            super().__init__()
            self.fc, self.head, self.losses, self.coupled = nn.Linear(4, 5), nn.Linear(5, 3), kept["losses"], coupled

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.fc(x))
            self.losses.append(h.mean(0).square().sum() if self.coupled else h.square().mean())
            found: Tensor = self.head(h)
            return found

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) + model.losses[-1]

    for coupled in (False, True):
        kept["losses"].clear()
        came = follow(Growing(coupled=coupled), [data(n) for n in (5, 6, 7, 6, 5)], loss)
        assert set(came.refused) == ({"fc"} if coupled else set())
        assert coupled or came.exact


def test_it_begins_to_couple_later() -> None:
    """At the next look it is seen, and what was accumulated since the last one is not told."""
    steps: list[int] = []

    def made(p: Tensor, h: Tensor) -> Tensor:
        return balance(p, h) if len(steps) >= 2 else p.square().mean()

    model = Experts(made)
    came = follow(model, [data(n) for n in (6, 7, 5, 6, 6)], added, after=lambda: steps.append(1))
    assert "embed" in came.refused


def test_a_vector_that_is_returned_beside_the_outputs() -> None:
    """A squared mean of the batch is one that the loss adds up; of a mean it is the loss that squares it."""

    class Returning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.fc(x))
            return self.head(h), h.mean(0) ** 2

    def loss(model: nn.Module, batch: Any) -> Tensor:
        output, own = model(batch[0])
        return F.cross_entropy(output, batch[1]) + own.sum()

    came = follow(Returning(), [data(n) for n in (6, 7, 8)], loss)
    assert set(came.refused) == {"fc"}
    assert "tensor 1 of its output" in came.refused["fc"]


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (Beside("", ("aux",)), "aux"),
        (Beside("a.b", ("losses", -1)), "a.b.losses[-1]"),
        (Beside(None, (2,)), "tensor 2"),
    ],
)
def test_places_are_told_as_they_are_written(place: Beside, text: str) -> None:
    assert text in str(place)
