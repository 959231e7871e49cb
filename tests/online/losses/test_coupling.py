"""A loss that is computed of the model's outputs: refused where it couples samples, and never where it does not."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe, CurvatureWarning
from secorder._torch.graph import tells_recomputation
from secorder._torch.loss_graph import Place, place_of
from secorder.layers.layout import DIM_ZERO, Layout
from secorder.online.losses.coupling import adds_up_samples, couples
from secorder.online.losses.marks import Output
from secorder.online.losses.seen import SeenLoss, see
from secorder.online.reading import unreadable

from ...helpers import Net, data, make
from ...reference import assert_all_close
from ..loops import follow

pytestmark = pytest.mark.skipif(not tells_recomputation(), reason="saved tensors tell nothing")

#: A loss of logits, shape (N, 3), and labels.
Criterion = Callable[[Tensor, Tensor], Tensor]


def residual() -> Net:
    """A model that is looked at again, since its structure does not tell by itself."""
    return Net(lambda m, x: m.b(torch.tanh(m.a(x)) + x), a=nn.Linear(4, 4), b=nn.Linear(4, 3))


def info_nce(z: Tensor, _: Tensor) -> Tensor:
    z = F.normalize(z)
    return F.cross_entropy(z @ z.T / 0.5, torch.arange(len(z)))


def supervised_contrastive(z: Tensor, t: Tensor) -> Tensor:
    z, same = F.normalize(z), (t[:, None] == t).double()
    return -((z @ z.T).log_softmax(1) * same).sum(1).div(same.sum(1)).mean()


def correlations(z: Tensor, _: Tensor) -> Tensor:
    """Zbontar et al. (2021), of one view."""
    z = (z - z.mean(0)) / z.std(0)
    return (z.T @ z / len(z) - torch.eye(3)).square().sum()


def partial_likelihood(z: Tensor, t: Tensor) -> Tensor:
    """Cox (1972): each sample's risk among those that lived longer."""
    risk = z[t.argsort(descending=True), 0]
    return (risk.logcumsumexp(0) - risk).mean()


def kernels(z: Tensor, _: Tensor) -> Tensor:
    """A maximum mean discrepancy between the halves of a batch."""
    a, b = z[: len(z) // 2], z[len(z) // 2 :]

    def mean(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-(x[:, None] - y).square().sum(-1)).mean()

    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


COUPLING: dict[str, Criterion] = {
    "InfoNCE": info_nce,
    "supervised contrastive": supervised_contrastive,
    "smoothed": lambda z, _: F.cross_entropy(z @ z.T, torch.arange(len(z)), label_smoothing=0.1),
    "correlations": correlations,
    "partial likelihood": partial_likelihood,
    "kernels": kernels,
    "variance": lambda z, _: F.softplus(1 - z.std(0)).mean(),
    "triplets over the batch": lambda z, _: F.triplet_margin_loss(z, z.roll(1, 0), z.roll(2, 0), margin=20.0),
    "root of a mean": lambda z, t: (z - t[:, None]).square().mean().sqrt(),
    "a listwise ranking": lambda z, t: -(z[:, 0].log_softmax(0) * t.double().softmax(0)).sum(),
    "dice of the batch": lambda z, t: 1 - 2 * (z.sigmoid()[:, 0] * (t > 1)).sum() / (z.sigmoid()[:, 0] + (t > 1)).sum(),
    "a correlation": lambda z, t: -torch.corrcoef(torch.stack([z[:, 0], t.double()]))[0, 1],
    "pairs of neighbours": lambda z, _: (z[1:] * z[:-1]).mean(),
    "divided by its own mean": lambda z, t: F.cross_entropy(z, t) / z.square().mean(),
    "a little, beside another": lambda z, t: F.cross_entropy(z, t) + 0.01 * z.mean(0).square().sum(),
    "smooth along the batch": lambda z, _: F.conv1d(z.T[:, None], torch.ones(1, 1, 3), padding=1).square().mean(),
    "uniformity": lambda z, _: torch.pdist(F.normalize(z)).square().mul(-2).exp().mean().log(),
    "bags": lambda z, _: F.embedding_bag(torch.arange(len(z)).view(2, -1), z).square().mean(),
    "entropy of the mean": lambda z, t: F.cross_entropy(z, t) + (z.softmax(1).mean(0) ** 2).sum(),
}


@pytest.mark.parametrize("name", COUPLING)
def test_a_loss_that_couples_samples_is_refused(name: str) -> None:
    for model in (make(), residual()):
        with CurvatureProbe(model, reduction="mean") as probe, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                x, t = data(8)
                COUPLING[name](model(x), t).backward()
            with pytest.raises(AttributionError, match="couples the samples"):
                probe.fisher_diagonal()


def dice(z: Tensor, t: Tensor) -> Tensor:
    p, one = z.sigmoid(), F.one_hot(t, 3)
    return (1 - 2 * (p * one).sum(1) / (p + one).sum(1)).mean()


def focal(z: Tensor, t: Tensor) -> Tensor:
    ce = F.cross_entropy(z, t, reduction="none")
    return ((1 - (-ce).exp()) ** 2 * ce).mean()


def written_in_place(z: Tensor, t: Tensor) -> Tensor:
    z = z * 2
    z[:, 0] = 0.0
    return F.cross_entropy(z.masked_fill(z > 5, 5.0), t)


APART: dict[str, Criterion] = {
    "cross entropy": F.cross_entropy,
    "smoothed": lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1),
    "focal": focal,
    "dice of samples": dice,
    "divergence": lambda z, t: F.kl_div(z.log_softmax(1), F.one_hot(t, 3) * 0.7 + 0.1, reduction="batchmean"),
    "gaussian": lambda z, t: F.gaussian_nll_loss(z[:, 0], t.double(), z[:, 1].exp()),
    "hinge": lambda z, t: F.multi_margin_loss(z, t),
    "huber": lambda z, t: F.smooth_l1_loss(z, F.one_hot(t, 3).double()),
    "shifted by the largest of the batch": lambda z, t: F.cross_entropy(z - z.amax(), t),
    "flooded": lambda z, t: (F.cross_entropy(z, t) - 0.9).abs() + 0.9,
    "products, of which each sample's own count": lambda z, _: torch.diag(z @ z.T).mean(),
    "products, masked": lambda z, _: (z @ z.T * torch.eye(len(z))).sum() / len(z),
    "a statistic, switched off": lambda z, t: F.cross_entropy(z, t) + 0.0 * z.mean(0).square().sum(),
    "a statistic, as a number": lambda z, t: F.cross_entropy(z, t) + 0 * z.mean(0).square().sum().detach(),
    "heads": lambda z, t: F.cross_entropy(z, t) + 0.3 * (z[:, :1] - t[:, None]).square().mean() + z.abs().mean(),
    "scaled up and down": lambda z, t: F.cross_entropy(z * 1024, t) / 1024,
    "written in place": written_in_place,
    "normalised": lambda z, t: F.cross_entropy(5 * F.normalize(z), t),
    "quantiles": lambda z, t: F.relu(z.sort(1).values - t[:, None]).mean(),
    "a derivative": lambda z, t: (
        torch.autograd.grad(F.cross_entropy(z, t, reduction="sum"), z, create_graph=True)[0].square().sum(1).mean()
    ),
    "convolved": lambda z, t: F.cross_entropy(F.conv1d(z[:, None], torch.ones(1, 1, 3), padding=1)[:, 0], t),
    "bags of one": lambda z, t: F.cross_entropy(F.embedding_bag(torch.arange(len(z))[:, None], z), t),
    "paths": lambda z, t: F.ctc_loss(z.log_softmax(1)[None], t.clamp(min=1), *torch.ones(2, len(z)).long()),
    "energies": lambda z, t: (z.logsumexp(1) - z.gather(1, t[:, None])[:, 0]).mean() + 0.1 * z.logsumexp(1).mean(),
}


@pytest.mark.parametrize("name", APART)
def test_a_loss_whose_samples_are_apart_stays_exact(name: str) -> None:
    for model in (make(), residual()):
        came = follow(model, [data(n) for n in (8, 6, 5, 7)], lambda m, b: APART[name](m(b[0]), b[1]))
        assert came.exact
        assert not came.warned


def features(kept: dict[str, Tensor]) -> nn.Module:
    """A hook of the user's keeps what a part returned."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[1].register_forward_hook(lambda _, args, output: kept.update(h=output))
    return model


#: Of the samples' features, what a loss takes beside the outputs.
OF_FEATURES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "decorrelated": (lambda h: (h.T @ h / len(h)).square().sum(), True),
    "a contrast": (lambda h: F.cross_entropy(h @ h.T, torch.arange(len(h))), True),
    "small": (lambda h: h.square().sum(1).mean(), False),
}


@pytest.mark.parametrize("name", OF_FEATURES)
def test_features_that_a_loss_takes_past_what_the_model_returns(name: str) -> None:
    """Of those that it couples, the layers before them are refused, and no others."""
    beside, coupled = OF_FEATURES[name]
    kept: dict[str, Tensor] = {}

    def loss(m: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1]) + 0.1 * beside(kept["h"])

    came = follow(features(kept), [data(n) for n in (6, 7)], loss)
    assert came.refused.keys() == ({"0"} if coupled else set())


def two_heads() -> Net:
    return Net(
        lambda m, x: ((h := torch.tanh(m.a(x))), m.b(h), m.c(x))[1:],
        a=nn.Linear(4, 5),
        b=nn.Linear(5, 3),
        c=nn.Linear(4, 3),
    )


def test_layers_behind_other_outputs_stay_exact() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        coupled, apart = model(batch[0])
        return coupled.mean(0).square().sum() + F.cross_entropy(apart, batch[1])

    came = follow(two_heads(), [data(n) for n in (6, 7, 8)], loss)
    assert set(came.refused) == {"a", "b"}


@pytest.mark.parametrize("model", [make, residual])
def test_it_begins_to_couple_later(model: Callable[[], nn.Module]) -> None:
    """A weight that grows from zero: seen at the next look, also where only the loss is looked at."""
    steps: list[int] = []

    def loss(m: nn.Module, batch: Any) -> Tensor:
        z = m(batch[0])
        return F.cross_entropy(z, batch[1]) + 0.1 * (len(steps) > 2) * z.mean(0).square().sum()

    came = follow(model(), [data(n) for n in (6, 7, 8, 6)], loss, after=lambda: steps.append(1))
    assert came.refused
    assert all("couples the samples" in reason for reason in came.refused.values())


def test_batch_normalisation_in_the_loss_is_told_of_as_in_the_model() -> None:
    critic = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    for training in (True, False):
        critic.train(training)
        model = residual()
        with CurvatureProbe(model, reduction="mean") as probe, warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                critic(model(data(6)[0])).square().mean().backward()
            assert probe.fisher_diagonal()
        assert any("batch normalisation" in str(w.message) for w in seen) is training


@pytest.mark.filterwarnings("ignore:the samples of a batch influence one another by batch normalisation")
def test_what_couples_samples_behind_batch_normalisation_is_refused() -> None:
    """A correlation of outputs that are normalised first: by their statistics as they are, it couples samples still."""
    model = residual()
    with CurvatureProbe(model, reduction="mean") as probe:
        z = F.batch_norm(model(data(6)[0]), None, None, training=True)
        (z.T @ z / len(z) - torch.eye(z.shape[1])).square().sum().backward()
        with pytest.raises(AttributionError, match="couples the samples"):
            probe.fisher_diagonal()


def test_a_strict_probe_raises_at_once() -> None:
    model = residual()
    with CurvatureProbe(model, reduction="mean", strict=True), pytest.raises(AttributionError, match="couples"):
        info_nce(model(data(6)[0]), data(6)[1]).backward()


def pairwise_sigmoid(a: Tensor, b: Tensor) -> Tensor:
    """Zhai et al. (2023): bilinear in two embeddings, so that neither alone has a second derivative across samples."""
    return -F.logsigmoid((2 * torch.eye(len(a), len(b)) - 1) * (a @ b.T)).sum() / len(a)


#: Losses of two forwards, and by what is told of these, whether samples are apart.
OF_TWO: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[str]]] = {
    "pairs of samples": (pairwise_sigmoid, []),
    "rows that meet": (lambda a, b: (1 - F.cosine_similarity(a, b)).mean(), ["joined"]),
    "rows that are compared": (lambda a, b: (1 - a + b).relu().mean(), ["joined"]),
    "all that are compared": (lambda a, b: (1 - a[:, :1] + b[:, 0]).relu().mean(), []),
    "apart": (lambda a, b: F.softplus(-a).mean() + F.softplus(b).mean(), ["separate"]),
}


@pytest.mark.parametrize("told", ["joined", "separate"])
@pytest.mark.parametrize("name", OF_TWO)
def test_samples_of_several_forwards(name: str, told: str) -> None:
    """Joined, rows that are apart are a sample's affair, too; only the sum of both means is not one over samples."""
    loss, apart = OF_TWO[name]
    for model in (make(), residual()):
        with CurvatureProbe(model, reduction="mean", forwards=told) as probe, warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.simplefilter("ignore")
            loss(model(torch.randn(6, 4)), model(torch.randn(6, 4))).backward()
            refused = unreadable(probe._fisher)
        assert bool(refused) is (told not in apart and name != "apart")
        assert all(("forwards=" in reason) is (told == "separate") for reason in refused.values())


def test_forwards_of_other_sizes_that_the_loss_couples() -> None:
    """Nothing needs to be told of them, and they are not apart all the same; one sample each is enough."""
    for sizes in ((6, 9), (1, 1)):
        model = make()
        with CurvatureProbe(model, reduction="mean", forwards="separate", sample_dim=0) as probe:
            with pytest.warns(CurvatureWarning, match="couples the samples"):
                pairwise_sigmoid(*[model(torch.randn(n, 4)) for n in sizes]).backward()
            assert len(unreadable(probe._fisher)) == len(probe.layer_names)


def test_rows_of_positions_and_samples_in_another_dimension() -> None:
    """Tokens that are coupled within a sample are apart; across samples they are not."""

    def sequences(m: Net, x: Tensor) -> Tensor:
        return m.b(torch.tanh(m.a(x)).cumsum(0))

    for coupled in (False, True):
        model = Net(sequences, a=nn.Linear(4, 5), b=nn.Linear(5, 3))
        with CurvatureProbe(model, reduction="mean", sample_dim=1) as probe, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                z = model(torch.randn(7, 6, 4))
                ((z[1:] - z[:-1]) if not coupled else (z[:, 1:] - z[:, :-1])).square().mean().backward()
            assert bool(unreadable(probe._fisher)) is coupled


def centred(z: Tensor) -> Tensor:
    return z.sub_(z.mean(0, keepdim=True))


def cooled(z: Tensor) -> Tensor:
    z[:, 0].mul_(0.5)
    return z.div_(2.0)


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize(("change", "coupled"), [(centred, True), (cooled, False)])
def test_outputs_over_sequences_that_are_overwritten_in_place(
    change: Callable[[Tensor], Tensor], coupled: bool, time_major: bool
) -> None:
    """A linear layer returns a view, whose place an operation in place takes."""

    def forward(m: Any, x: Tensor) -> Tensor:
        output: Tensor = m.b(torch.tanh(m.a(x)).cumsum(int(not time_major)))
        return output

    dim = int(time_major)
    model = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    x = torch.randn(6, 5, 4).transpose(0, dim)
    with CurvatureProbe(model, reduction="mean", sample_dim=dim) as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureWarning)
        change(model(x).transpose(0, dim) if time_major else model(x)).logsumexp(2).sin().mean().backward()
        if coupled:
            with pytest.raises(AttributionError, match=r"layers 'a', 'b': the loss couples"):
                probe.fisher_diagonal()
        else:
            assert probe.fisher_diagonal().keys() == {"a", "b"}


def looked_at(criterion: Callable[[Tensor], Tensor], z: Tensor, layout: Layout = DIM_ZERO) -> SeenLoss:
    """What is seen of a loss of one output."""
    f = z.detach().requires_grad_().clone()
    total = criterion(f)
    outputs: dict[Place, Output | None] = {place_of(f): Output(layout, 1.0, z.shape[layout.dim])}
    loss = see({place_of(total): torch.ones_like(total)}, {0: outputs}, joined=False)
    assert loss is not None
    return loss


@pytest.mark.parametrize("criterion", [*COUPLING.values(), *APART.values()])
def test_a_graph_never_shows_samples_apart_that_are_coupled(criterion: Criterion) -> None:
    z, t = torch.randn(8, 3), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    if adds_up_samples(looked_at(lambda f: criterion(f, t), z)):
        second = torch.autograd.functional.hessian(lambda f: criterion(f, t), z)
        assert bool((second.abs().sum((1, 3)).fill_diagonal_(0) == 0).all())


#: Losses of outputs of 8 samples, 8 steps, 8 columns: of these sizes none tells what it is of.
SHIFTED: dict[str, tuple[Criterion, int, bool]] = {
    "tokens": (lambda z, t: F.cross_entropy(z[:, :-1].flatten(0, 1), t[:, 1:].flatten()), 0, True),
    "tokens, time first": (lambda z, t: F.cross_entropy(z[:-1].flatten(0, 1), t[1:].flatten()), 1, True),
    "columns in dim 1": (lambda z, t: F.cross_entropy(z.transpose(1, 2), t, reduction="sum") / 3, 0, True),
    "two terms": (lambda z, t: F.cross_entropy(z.transpose(1, 2), t) - 0.1 * z.square().mean((1, 2)).mean(), 0, True),
    "over samples": (lambda z, t: F.cross_entropy(z, t), 1, False),
    "of neighbours": (lambda z, t: F.cross_entropy((z + z.roll(1, 0)).transpose(1, 2), t), 0, False),
    "centred": (lambda z, t: F.cross_entropy((z - z.mean(0)).transpose(1, 2), t), 0, False),
    "of a mean": (lambda z, t: F.cross_entropy(z.mean(0), t[0]), 0, False),
    "exchanged": (lambda z, t: F.cross_entropy((z * z.transpose(0, 1)).transpose(1, 2), t), 0, False),
}


@pytest.mark.parametrize("name", SHIFTED)
def test_what_a_graph_shows_of_where_samples_are(name: str) -> None:
    criterion, dim, apart = SHIFTED[name]
    t = torch.randint(8, (8, 8))
    loss = looked_at(lambda f: criterion(f, t), torch.randn(8, 8, 8), Layout(dim))
    assert adds_up_samples(loss) is apart
    assert (not couples(loss)) is apart


def test_few_samples_whose_gradients_add_up_to_zero_are_seen_to_be_coupled() -> None:
    """A softmax's do, so that what is drawn for each of them must not be the same by chance."""
    for _ in range(64):
        loss = looked_at(lambda f: F.cross_entropy(f, torch.tensor([0, 1])).square(), torch.randn(2, 2))
        assert couples(loss)


def test_steps_that_were_taken_for_samples_are_told_what_to_pass() -> None:
    targets, *lengths = torch.tensor([[1, 2], [2, 1], [1, 1]]), torch.tensor([7, 8, 7]), torch.tensor([1, 2, 2])
    model, x = make(), torch.randn(8, 3, 4)

    def loss(ids: Tensor) -> Tensor:
        return F.ctc_loss(model(x[:, ids]).log_softmax(2), targets[ids], *(each[ids] for each in lengths))

    expected: dict[str, Any] = {name: 0.0 for name, _ in model.named_parameters()}
    for n in range(3):
        own = torch.autograd.grad(loss(torch.tensor([n])), list(model.parameters()))
        expected = {name: expected[name] + g.square() / 3 for name, g in zip(expected, own, strict=True)}
    for dim in (None, 1):
        with CurvatureProbe(model, sample_dim=dim, reduction="mean") as probe, warnings.catch_warnings():
            warnings.simplefilter("ignore", CurvatureWarning)
            loss(torch.arange(3)).backward()
            if dim is None:
                with pytest.raises(AttributionError, match="pass sample_dim= where samples are in another dimension"):
                    probe.fisher_diagonal()
            else:
                assert_all_close(probe.fisher_diagonal().by_parameter(), expected)
