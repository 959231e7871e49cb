"""Well-known training loops, written anew in their shape: the number is that of a loop over samples, or is not told."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe

from ..helpers import Net
from ..reference import assert_all_close, named_parameters
from .loops import follow, rows


def add_squares(total: dict[str, Tensor], model: nn.Module, losses: Sequence[Callable[[], Tensor]]) -> None:
    """Σ_n (∂ℓ_n/∂θ)², by parameter name."""
    parameters = named_parameters(model)
    kept = {name: p.grad for name, p in parameters.items()}
    for loss in losses:
        for p in parameters.values():
            p.grad = None
        loss().backward()
        for name, p in parameters.items():
            if p.grad is not None:
                total[name] = total.get(name, 0.0) + p.grad**2
    for name, p in parameters.items():
        p.grad = kept[name]


def mean(total: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    return {name: value / count for name, value in total.items()}


class LanguageModel(nn.Module):
    def __init__(self, letters: int = 11, width: int = 5) -> None:
        super().__init__()
        self.encoder, self.rnn = nn.Embedding(letters, width), nn.LSTM(width, width, 2)
        self.decoder = nn.Linear(width, letters)

    def forward(self, ids: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, hidden = self.rnn(self.encoder(ids), hidden)
        return F.log_softmax(self.decoder(output).view(-1, self.decoder.out_features), dim=1), hidden


def test_a_language_model_over_a_text_with_its_state_carried() -> None:
    """Time first, one text cut into columns, truncated backpropagation, gradients clipped, a shorter last piece."""
    model, columns, steps = LanguageModel(), 4, 6
    text = torch.randint(11, (23, columns))
    hidden = (torch.zeros(2, columns, 5), torch.zeros(2, columns, 5))
    probe = CurvatureProbe(model, layer_types="all", reduction="mean")
    expected: dict[str, Tensor] = {}
    count = 0
    for start in range(0, len(text) - 1, steps):
        size = min(steps, len(text) - 1 - start)
        ids, targets = text[start : start + size], text[start + 1 : start + 1 + size].flatten()
        model.zero_grad()
        hidden = (hidden[0].detach(), hidden[1].detach())
        with probe.paused():
            pieces = [
                (ids[:, n : n + 1], tuple(h[:, n : n + 1].contiguous() for h in hidden), targets.view(size, -1)[:, n])
                for n in range(columns)
            ]
            add_squares(expected, model, [lambda i=i, h=h, t=t: F.nll_loss(model(i, h)[0], t) for i, h, t in pieces])
        count += columns
        output, hidden = model(ids, hidden)
        F.nll_loss(output, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad, alpha=-0.5)
    assert probe.num_samples == count
    assert_all_close(probe.fisher_diagonal().by_parameter(), mean(expected, count))


def test_a_generative_adversarial_network() -> None:
    """D(real) and D(fake) in two backward passes, then the generator through the discriminator; and both in one."""
    critic = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.2), nn.Linear(6, 1))
    generator = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    ones, zeros = torch.ones, torch.zeros
    of_critic, of_generator = CurvatureProbe(critic, reduction="mean"), CurvatureProbe(generator, reduction="mean")
    critic_squares: dict[str, Tensor] = {}
    generator_squares: dict[str, Tensor] = {}
    count = 6
    for _ in range(3):
        real, noise = torch.randn(count, 4), torch.randn(count, 3)
        fake = generator(noise)
        critic.zero_grad()
        with of_critic.paused(), of_generator.paused():
            for batch, label in ((real, 1.0), (fake.detach(), 0.0)):
                add_squares(
                    critic_squares,
                    critic,
                    [
                        lambda x=x, label=label: F.binary_cross_entropy_with_logits(
                            critic(x), torch.full((1, 1), label)
                        )
                        for x in batch.split(1)
                    ],
                )
        F.binary_cross_entropy_with_logits(critic(real), ones(count, 1)).backward()
        F.binary_cross_entropy_with_logits(critic(fake.detach()), zeros(count, 1)).backward()
        generator.zero_grad()
        with of_critic.paused(), of_generator.paused():
            add_squares(
                generator_squares,
                generator,
                [
                    lambda z=z: F.binary_cross_entropy_with_logits(critic(generator(z)), ones(1, 1))
                    for z in noise.split(1)
                ],
            )
        with of_critic.paused():
            F.binary_cross_entropy_with_logits(critic(fake), ones(count, 1)).backward()
    assert_all_close(of_critic.fisher_diagonal().by_parameter(), mean(critic_squares, 6 * count))
    assert_all_close(of_generator.fisher_diagonal().by_parameter(), mean(generator_squares, 3 * count))

    # The discriminator's losses added: the samples of each forward are its own, where it is said.
    of_critic.detach()
    for forwards in ("separate", None):
        with CurvatureProbe(critic, forwards=forwards, reduction="mean") as probe:
            real, fake = torch.randn(count, 4), torch.randn(count, 4)
            total: dict[str, Tensor] = {}
            with probe.paused():
                add_squares(
                    total,
                    critic,
                    [lambda x=x: F.softplus(-critic(x)).mean() for x in real.split(1)]
                    + [lambda x=x: F.softplus(critic(x)).mean() for x in fake.split(1)],
                )
            (F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean()).backward()
            if forwards is None:
                with pytest.raises(AttributionError, match="several forwards"):
                    probe.fisher_diagonal(missing="skip")
            else:
                assert_all_close(probe.fisher_diagonal().by_parameter(), mean(total, 2 * count))


def test_a_physics_informed_network() -> None:
    """The loss is a derivative of the network: its parameters act past their layers, and nothing is told of it."""
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    probe = CurvatureProbe(model, forwards="separate")
    for _ in range(3):
        inside, edge = torch.rand(6, 1, requires_grad=True), torch.tensor([[0.0], [1.0]])
        u = model(inside)
        (slope,) = torch.autograd.grad(u.sum(), inside, create_graph=True)
        (slope.square().mean() + model(edge).square().mean()).backward()
    with pytest.raises(AttributionError, match="a derivative of the model's output"):
        probe.fisher_diagonal(missing="skip")


def test_a_physics_informed_network_that_returns_its_residual() -> None:
    """The way out: a model that differentiates itself, whose enclosing call tells."""

    def residual(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            u = m.net(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return slope - u

    model = Net(residual, net=nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)))
    batches = [(torch.rand(n, 1),) for n in (6, 6, 4)]
    follow(model, batches, lambda m, b: m(b[0]).square().mean())


def test_policy_gradients() -> None:
    """Actions chosen step by step without gradients; then one forward over all of the episode's observations."""
    policy = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def episode(length: int) -> Any:
        observations = torch.randn(length, 4)
        with torch.no_grad():
            actions = torch.distributions.Categorical(logits=policy(observations)).sample()
        return observations, actions, torch.randn(length)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        observations, actions, returns = batch
        return -(torch.distributions.Categorical(logits=model(observations)).log_prob(actions) * returns).mean()

    assert follow(policy, [episode(n) for n in (9, 5, 1, 12)], loss).exact


def test_an_actor_and_a_critic_with_a_forward_a_step() -> None:
    """A list of log probabilities and values, one forward of one observation each, and one backward at the end."""
    model = Net(lambda m, x: (m.actor(F.relu(m.affine(x))), m.critic(F.relu(m.affine(x)))),
                affine=nn.Linear(4, 6), actor=nn.Linear(6, 2), critic=nn.Linear(6, 1))  # fmt: skip

    def loss(model: nn.Module, batch: Any) -> Tensor:
        total: Any = 0.0
        for x, action, value in zip(*batch, strict=True):
            logits, guess = model(x[None])
            total = total + F.cross_entropy(logits, action[None]) * value + F.smooth_l1_loss(guess[0, 0], value)
        return total

    episodes = [(torch.randn(n, 4), torch.randint(2, (n,)), torch.randn(n)) for n in (5, 4)]
    follow(model, episodes, loss)
    follow(model, episodes, loss, lambda b: [b], forwards="joined")
    wide = [(torch.randn(3, 4), torch.randint(2, (3,))), (torch.randn(2, 4), torch.randint(2, (2,)))]

    def of_batch(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0])[0], batch[1])

    assert follow(model, wide, of_batch).exact


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(6, 5), nn.Linear(5, 2), nn.Linear(5, 2)
        self.fc3, self.fc4 = nn.Linear(2, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = F.relu(self.fc1(x.view(-1, 6)))
        mu, logvar = self.fc21(hidden), self.fc22(hidden)
        z = mu + noise * torch.exp(0.5 * logvar)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mu, logvar


def test_a_variational_autoencoder_with_a_sum() -> None:
    """The loss is summed over samples, the last batch is smaller, images come as (N, 1, 2, 3)."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, noise = batch
        found, mu, logvar = model(x, noise)
        likelihood = F.binary_cross_entropy(found, x.view(-1, 6), reduction="sum")
        return likelihood - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())

    batches = [(torch.rand(n, 1, 2, 3), torch.randn(n, 2)) for n in (6, 6, 6, 1, 6, 2)]
    assert follow(Autoencoder(), batches, loss, reduction="sum").exact


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), nn.Linear(width, 3 * width, bias=False)
        self.proj, self.ln_2 = nn.Linear(width, width, bias=False), nn.LayerNorm(width)
        self.up, self.down, self.heads = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = (part.view(n, t, self.heads, -1).transpose(1, 2) for part in self.attn(self.ln_1(x)).split(width, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(n, t, width)
        x = x + self.proj(y)
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class Nano(nn.Module):
    """Tied embeddings, learnt positions, the loss returned besides the logits."""

    def __init__(self, letters: int = 13, width: int = 8, length: int = 8) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(letters, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, 2) for _ in range(2)])
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, letters, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        if targets is None:
            return self.lm_head(self.ln_f(x)[:, [-1], :]), None
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1)


def of_loss(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(*batch)[1]
    return loss


def test_a_small_gpt_with_gradient_accumulation() -> None:
    """Four micro-batches a step, each loss divided by four; evaluation and generation in between."""
    for layer_types in (None, "all"):
        model = Nano()
        probe = CurvatureProbe(model, layer_types=layer_types, loss_scale=1 / 4, reduction="mean")
        expected: dict[str, Tensor] = {}
        count = 0
        for _ in range(3):
            for _ in range(4):
                ids, targets = torch.randint(13, (3, 8)), torch.randint(13, (3, 8))
                with probe.paused():
                    ones = rows((ids, targets))
                    add_squares(expected, model, [partial(of_loss, model, b) for b in ones])
                count += 3
                _, loss = model(ids, targets)
                (loss / 4).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(p.grad, alpha=-0.1)
            model.zero_grad(set_to_none=True)
            model.eval()
            with torch.no_grad():
                model(torch.randint(13, (1, 4)))
                model(torch.randint(13, (2, 8)), torch.randint(13, (2, 8)))
            model.train()
        assert probe.num_samples == count
        found = probe.fisher_diagonal()  # also of the row of positions that all samples share
        assert set(probe.layer_names) == set(found)
        assert_all_close(found.by_parameter(), mean(expected, count))
        probe.detach()
