"""Where samples are in a layer's calls: found, verified, or not told; held against a loop over samples."""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe, CurvatureWarning
from secorder._torch.graph import tells_recomputation
from secorder.online import attributions

from ..helpers import Doubled, Net, Opaque, refused_where_nothing_tells, run_again_where_nothing_tells
from ..reference import assert_all_close, fisher_by_sample
from .loops import follow, rows

Pair = tuple[Tensor, Tensor]


def classify(model: nn.Module, batch: Pair) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def vectors(*sizes: int) -> list[Pair]:
    return [(torch.randn(n, 4), torch.randint(3, (n,))) for n in sizes]


def sequences(*sizes: tuple[int, int]) -> list[Pair]:
    """Batches (N, T, 4), one label a sample."""
    return [(torch.randn(n, t, 4), torch.randint(3, (n,))) for n, t in sizes]


def time_major(m: Any, x: Tensor) -> Tensor:
    """Batch first outside, time first inside."""
    return m.b(torch.tanh(m.a(x.transpose(0, 1))).cumsum(0).mean(0))


def flattened(m: Any, x: Tensor) -> Tensor:
    """Rows of all samples, those of one together."""
    return m.b(torch.tanh(m.a(x.flatten(0, 1))).view(*x.shape[:2], -1).cumsum(1).mean(1))


def flattened_time_major(m: Any, x: Tensor) -> Tensor:
    n, t = x.shape[:2]
    return m.b(torch.tanh(m.a(x.transpose(0, 1).flatten(0, 1))).view(t, n, -1).cumsum(0).mean(0))


FORMS = [time_major, flattened, flattened_time_major]


def two_layers(forward: Callable[..., Tensor]) -> nn.Module:
    return Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3))


@pytest.mark.parametrize("forward", FORMS)
@pytest.mark.parametrize(
    "sizes",
    [
        [(1, 7), (4, 7), (5, 7)],
        [(4, 7), (1, 7), (4, 7)],
        [(4, 7), (4, 7), (1, 7)],
        [(4, 7), (4, 7), (3, 7), (2, 7)],
        [(4, 7), (4, 5), (4, 3), (4, 4), (4, 8), (4, 1), (4, 2)],  # T = N, and a multiple of N
        [(4, 4), (4, 4), (4, 7), (3, 4), (2, 4)],
        [(3, 6), (6, 3), (2, 9), (9, 2)],
        [(1, 1), (1, 4), (4, 1), (2, 2), (4, 4)],
        [(1, 3), (1, 4), (1, 5)],
    ],
)
def test_batch_sizes_and_lengths(forward: Callable[..., Tensor], sizes: list[tuple[int, int]]) -> None:
    came = follow(two_layers(forward), sequences(*sizes), classify)
    assert not came.refused
    left_out = {index for batches in came.left_out.values() for index in batches}
    assert len(left_out) <= sum(n == 1 for n, _ in sizes)  # a batch of one alone tells nothing


@pytest.mark.parametrize("form", ["sample", "time"])
def test_an_output_whose_rows_are_flattened(form: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(m.a(x)).cumsum(1)
        return m.b((hidden if form == "sample" else hidden.transpose(0, 1)).flatten(0, 1))

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        x, t = batch
        return F.cross_entropy(model(x), (t if form == "sample" else t.T).flatten())

    def batch(n: int, t: int) -> Pair:
        return torch.randn(n, t, 4), torch.randint(3, (n, t))

    batches = [batch(n, t) for n, t in [(4, 5), (4, 4), (3, 4), (2, 8), (1, 5), (4, 6)]]
    assert follow(two_layers(forward), batches, loss).exact


class Tutorial(nn.Module):
    """The language model of the well-known tutorial: time first, the state carried, one row of logits a token."""

    def __init__(self, kind: str = "LSTM", dropout: float = 0.0) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(11, 4)
        self.rnn = getattr(nn, kind)(4, 5, 2)
        self.decoder = nn.Linear(5, 11)

    def forward(self, ids: Tensor, hidden: Any) -> tuple[Tensor, Any]:
        output, hidden = self.rnn(self.drop(self.encoder(ids)), hidden)
        return F.log_softmax(self.decoder(self.drop(output)).view(-1, 11), 1), hidden


def carried(model: nn.Module, batch: Any) -> Tensor:
    ids, targets, hidden = batch
    return F.nll_loss(model(ids, hidden)[0], targets.flatten())


def of_text(kind: str, sizes: Sequence[tuple[int, int]]) -> list[Any]:
    def state(n: int) -> Any:
        parts = tuple(torch.randn(2, n, 5) for _ in range(2 if kind == "LSTM" else 1))
        return parts if kind == "LSTM" else parts[0]

    return [(torch.randint(11, (t, n)), torch.randint(11, (t, n)), state(n)) for n, t in sizes]


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("layer_types", [None, "all"])
@pytest.mark.parametrize(
    "sizes", [[(4, 7), (4, 7), (4, 5), (3, 7)], [(4, 4), (4, 5)], [(2, 6), (2, 6)], [(6, 3), (6, 3), (6, 2)]]
)
def test_a_language_model_with_its_state_carried(kind: str, layer_types: Any, sizes: list[tuple[int, int]]) -> None:
    batches = of_text(kind, sizes)
    came = follow(Tutorial(kind), batches, carried, lambda b: rows(b, 1), layer_types=layer_types)
    assert came.exact
    told = follow(Tutorial(kind), batches, carried, lambda b: rows(b, 1), layer_types=layer_types, sample_dim=1)
    assert told.exact
    assert not [message for message in told.warned if "sample_dim" in message or "batch normal" in message]


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_recurrent_networks_time_first(kind: str) -> None:
    rnn = getattr(nn, kind)(4, 5)
    model = Net(lambda m, x: m.head(m.rnn(x)[0][-1]), rnn=rnn, head=nn.Linear(5, 3))
    batches = [(torch.randn(t, n, 4), torch.randint(3, (n,))) for n, t in [(4, 6), (4, 6), (3, 6), (4, 4), (4, 8)]]

    def alone(batch: Pair) -> list[Pair]:
        return [(batch[0][:, n : n + 1], batch[1][n : n + 1]) for n in range(len(batch[1]))]

    assert follow(model, batches, classify, alone, layer_types="all").exact


def test_sequences_of_one_position_are_in_either_order() -> None:
    """Attention keeps its rows by positions; where there is one, they are those of the samples."""
    model = Net(lambda m, x: m.head(m.attention(x, x, x)[0]), head=nn.Linear(4, 3),
                attention=nn.MultiheadAttention(4, 2, batch_first=True))  # fmt: skip
    batches = [(torch.randn(n, t, 4), torch.randint(3, (n, t))) for n, t in ((4, 3), (3, 1), (5, 2), (4, 1))]
    loss = lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten())  # noqa: E731
    assert follow(model, batches, loss, layer_types="all").exact


def test_a_transformer_time_first() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6, 0.0), 1, enable_nested_tensor=False)
    model = Net(lambda m, x: m.head(m.encoder(x)), encoder=encoder, head=nn.Linear(4, 3))

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    batches = [(torch.randn(t, n, 4), torch.randint(3, (t, n))) for n, t in [(4, 6), (4, 6), (3, 6), (4, 4), (2, 4)]]
    assert follow(model, batches, loss, lambda b: rows(b, 1), layer_types="all").exact


def tokenwise(m: Any, x: Tensor) -> Tensor:
    return m.b(torch.tanh(m.a(x)))


def per_token(model: nn.Module, batch: Pair) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def tokens(*sizes: tuple[int, int]) -> list[Pair]:
    return [(torch.randn(n, t, 4), torch.randint(3, (n, t))) for n, t in sizes]


@pytest.mark.parametrize("forward", [tokenwise, lambda m, x: tokenwise(m, x) * 1])
def test_a_model_of_tokens_says_which_dimension_was_taken(forward: Any) -> None:
    batches = tokens((4, 6), (4, 6), (3, 6))
    came = follow(two_layers(forward), batches, per_token)
    assert came.exact
    said = [m for m in came.warned if "sample_dim=1" in m and "(4, 6, 4)" in m]
    assert len(said) == 1, came
    for dim in (0, 1):
        told = follow(two_layers(forward), batches, per_token, lambda b, d=dim: rows(b, d), sample_dim=dim)
        assert told.exact
        assert not told.warned


def test_a_table_as_an_argument() -> None:
    model = Net(lambda m, x, table: m.b(torch.tanh(m.a(x) + m.t(table).mean(0))),
                a=nn.Linear(4, 5), t=nn.Linear(2, 5), b=nn.Linear(5, 3))  # fmt: skip

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0], batch[1]), batch[2])

    def alone(batch: Any) -> list[Any]:
        x, table, t = batch
        return [(x[n : n + 1], table, t[n : n + 1]) for n in range(len(x))]

    for size in (7, 2, 6):  # another size, a divisor, the same
        for options in ({}, {"sample_dim": {"x": 0, "table": None}}):
            batches = [(torch.randn(n, 4), torch.randn(size, 2), torch.randint(3, (n,))) for n in (6, 6, 4)]
            model.__class__ = Tabled
            came = follow(model, batches, loss, alone, **options)
            if options or size != 6:
                assert came.exact, (size, options)


class Tabled(Net):
    def forward(self, x: Tensor, table: Tensor) -> Any:
        return self.function(self, x, table)


class Masked(nn.Module):
    """Time first, with a padding mask that is samples first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, key_padding_mask=mask)[0].mean(0))


@pytest.mark.parametrize("options", [{}, {"sample_dim": {"x": 1, "mask": 0}}])
@pytest.mark.parametrize("size", [pytest.param((4, 6), marks=run_again_where_nothing_tells), (4, 4)])
def test_arguments_with_samples_in_different_dimensions(options: Any, size: tuple[int, int]) -> None:
    def batch(n: int, t: int) -> Any:
        lengths = torch.randint(1, t + 1, (n,))
        return torch.randn(t, n, 4), torch.arange(t) >= lengths[:, None], torch.randint(3, (n,))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0], batch[1]), batch[2])

    def alone(b: Any) -> list[Any]:
        return [(b[0][:, n : n + 1], b[1][n : n + 1], b[2][n : n + 1]) for n in range(len(b[2]))]

    came = follow(Masked(), [batch(*size), batch(*size), batch(3, 6), batch(2, 2)], loss, alone, **options)
    if options or size[0] != size[1]:
        assert came.exact


def test_unbatched_calls() -> None:
    linear = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    batches = [(torch.randn(4), torch.randint(3, ())) for _ in range(4)]
    assert follow(linear, batches, classify, lambda b: [b]).left_out.keys() <= {"0", "2"}
    conv = nn.Sequential(nn.Conv2d(3, 3, 2), nn.Tanh(), nn.Flatten(0), nn.Linear(27, 3))
    for channels in (3, 3):
        images = [(torch.randn(channels, 4, 4), torch.randint(3, ())) for _ in range(4)]
        follow(conv, images, classify, lambda b: [b])


def test_mixed_batched_and_unbatched_calls() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    batches = [*vectors(4, 3), (torch.randn(4), torch.randint(3, ())), *vectors(2)]
    follow(model, batches, classify, lambda b: [b] if b[0].dim() == 1 else rows(b))


class Batch:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


@dataclasses.dataclass
class Data:
    x: Tensor
    y: Tensor


@pytest.mark.parametrize("kind", [Batch, Data, "encoding"])
@pytest.mark.parametrize("form", FORMS)
def test_batch_objects(kind: Any, form: Any) -> None:
    if kind == "encoding":
        transformers = pytest.importorskip("transformers")
        build = lambda x, y: transformers.BatchEncoding({"x": x, "y": y})  # noqa: E731
    else:
        build = kind
    model = two_layers(lambda m, b: form(m, b["x"] if kind == "encoding" else b.x))

    def loss(model: nn.Module, pair: Pair) -> Tensor:
        return F.cross_entropy(model(build(*pair)), pair[1])

    assert follow(model, sequences((4, 7), (4, 7), (1, 7), (3, 5), (4, 4)), loss).exact


class Experts(nn.Module):
    """Each token goes to its best expert, or to the experts that are told."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(4, count)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(count)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        flat = x.flatten(0, 1)
        scores = self.router(flat).softmax(-1)
        best = scores.argmax(-1) if chosen is None else chosen.flatten()
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            here = (best == index).nonzero()[:, 0]
            if len(here):
                out = out.index_add(0, here, torch.tanh(expert(flat[here])) * scores[here, index, None])
        return self.head(out.view(x.shape).cumsum(1).mean(1))


def routed(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0], batch[1]), batch[2])


def test_routed_tokens() -> None:
    torch.manual_seed(3)
    batches = [(torch.randn(n, t, 4), torch.randint(3, (n,))) for n, t in [(4, 6)] * 9 + [(3, 6), (1, 6), (4, 5)]]
    came = follow(Experts(), batches, classify)
    assert {"router", "head"}.isdisjoint(came.refused)
    assert {"router", "head"}.isdisjoint(came.left_out)


#: By sample the expert of each of its tokens.
BALANCED = [[0, 1, 0, 1]] * 4
MOVED = [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("first", [1, 2, 3, 4, 6])
def test_routed_tokens_that_are_balanced_at_first_by_chance(first: int) -> None:
    """As many rows each time, and other owners: at some steps nobody looks."""
    choices = [BALANCED] * first + [MOVED] * 3 + [BALANCED]
    batches = [(torch.randn(4, 4, 4), torch.tensor(c), torch.randint(3, (4,))) for c in choices]
    follow(Experts(), batches, routed)


@pytest.mark.parametrize("late", [1, 2, 3])
def test_an_expert_that_starts_late(late: int) -> None:
    choices = [[[0] * 4] * 4] * late + [MOVED, BALANCED]
    batches = [(torch.randn(4, 4, 4), torch.tensor(c), torch.randint(3, (4,))) for c in choices]
    follow(Experts(), batches, routed)


class Graphs(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            h = layer(x)
            x = torch.tanh(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))
        size = int(graph.max()) + 1
        return self.head(torch.zeros(size, 4).index_add(0, graph, x))


def graph_batch(sizes: Sequence[int]) -> Any:
    edges, start = [], 0
    for size in sizes:
        edges += [(start + i, start + (i + 1) % size) for i in range(size)]
        start += size
    graph = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return torch.randn(start, 4), torch.tensor(edges).T, graph, torch.randint(3, (len(sizes),))


def of_graphs(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(*batch[:3]), batch[3])


def one_graph(batch: Any) -> list[Any]:
    x, edges, graph, y = batch
    ones = []
    for n in range(len(y)):
        here = graph == n
        first = int(here.nonzero()[0])
        ones.append(
            (x[here], edges[:, here[edges[0]]] - first, torch.zeros(int(here.sum()), dtype=torch.long), y[n : n + 1])
        )
    return ones


@pytest.mark.parametrize(
    "sizes", [[[3, 4, 2], [3, 4, 2], [5, 2, 2]], [[3, 3, 3], [3, 3, 3], [4, 2, 3]], [[2, 2], [3, 1]]]
)
def test_graph_batches(sizes: Any) -> None:
    follow(Graphs(), [graph_batch(s) for s in sizes], of_graphs, one_graph)


def test_bags() -> None:
    model = Net(lambda m, ids, offsets: m.fc(m.bag(ids, offsets)), bag=nn.EmbeddingBag(9, 4), fc=nn.Linear(4, 3))

    def batch(*lengths: int) -> Any:
        offsets = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        return torch.randint(9, (sum(lengths),)), offsets, torch.randint(3, (len(lengths),))

    def alone(b: Any) -> list[Any]:
        ends = [*b[1][1:].tolist(), len(b[0])]
        return [
            (b[0][s:e], torch.zeros(1, dtype=torch.long), b[2][n : n + 1])
            for n, (s, e) in enumerate(zip(b[1].tolist(), ends, strict=True))
        ]

    def loss(model: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(model(b[0], b[1]), b[2])

    for batches in (
        [batch(3, 1, 4), batch(2, 2, 2), batch(1, 1, 1), batch(5, 2)],
        [batch(1, 1, 1), batch(1, 1), batch(2, 2, 2)],
    ):
        came = follow(model, batches, loss, alone)
        assert "fc" not in came.refused
        follow(model, batches, loss, alone, layer_types="all")


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("all_rows", [True, False])
def test_packed_sequences(kind: str, all_rows: bool) -> None:
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    def forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, state = m.rnn(packed)
        if all_rows:
            out = out._replace(data=torch.tanh(m.mid(out.data)))
            return m.head(pad_packed_sequence(out, batch_first=True)[0].sum(1))
        return m.head(m.mid((state[0] if kind == "LSTM" else state)[-1]))

    model = Net(forward, rnn=getattr(nn, kind)(4, 5, batch_first=True), mid=nn.Linear(5, 5), head=nn.Linear(5, 3))

    def batch(*lengths: int) -> Any:
        return torch.randn(len(lengths), 6, 4), torch.tensor(lengths), torch.randint(3, (len(lengths),))

    def loss(model: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(model(b[0], b[1]), b[2])

    batches = [batch(6, 5, 2), batch(3, 3, 6), batch(1, 2, 3), batch(4, 4, 4), batch(6, 1)]
    came = follow(model, batches, loss)
    assert "head" not in came.refused
    assert "head" not in came.left_out
    follow(model, batches, loss, layer_types="all")


@pytest.mark.parametrize("state", [False, True])
def test_packed_sequences_as_an_argument(state: bool) -> None:
    """Of any lengths, in any order; as many rows as samples times something, too. A state has samples in dim 1."""
    model = Net(
        lambda m, packed, *hx: m.head(m.rnn(packed, *([hx] if hx else []))[1][0][-1]),
        rnn=nn.LSTM(3, 4),
        head=nn.Linear(4, 3),
    )

    def loss(model: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(model(nn.utils.rnn.pack_sequence(b[0], enforce_sorted=False), *b[2:]), b[1])

    def batch(*lengths: int) -> Any:
        hx = torch.randn(2, 1, len(lengths), 4) if state else ()
        return [torch.randn(n, 3) for n in lengths], torch.randint(3, (len(lengths),)), *hx

    def alone(b: Any) -> list[Any]:
        return [(b[0][n : n + 1], b[1][n : n + 1], *(h[:, n : n + 1] for h in b[2:])) for n in range(len(b[0]))]

    batches = [batch(4, 3, 3, 2), batch(2, 3, 4), batch(5, 1), batch(3)]
    assert follow(model, batches, loss, alone, layer_types="all").exact


def test_sparse_inputs() -> None:
    model = Net(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, 3))

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        return F.cross_entropy(model(batch[0].to_sparse()), batch[1])

    assert follow(model, vectors(4, 4, 3), loss).exact


@pytest.mark.parametrize(
    "floats", [lambda ids: F.one_hot(ids, 11).double(), lambda ids: (ids[..., None] / 11) ** torch.arange(3)]
)
@pytest.mark.parametrize("size", [(6, 4), (4, 4)])
def test_integers_that_become_numbers_without_a_table(floats: Any, size: tuple[int, int]) -> None:
    """Letters, one-hot, time first."""
    width = floats(torch.zeros(1, 1, dtype=torch.long)).shape[-1]
    model = Net(lambda m, ids: m.head(m.rnn(floats(ids))[0]), rnn=nn.GRU(width, 5), head=nn.Linear(5, 11))

    def loss(model: nn.Module, batch: Pair) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    batches = [(torch.randint(11, size), torch.randint(11, size)) for _ in range(4)]
    assert follow(model, batches, loss, lambda b: rows(b, 1)).exact


@pytest.mark.parametrize("layer_types", [None, "all"])
def test_an_output_that_does_not_depend_on_its_input_at_first(layer_types: Any) -> None:
    """Time first, and a last layer that starts at zero: what is taken for the samples at first is said not to be."""
    model = Net(lambda m, x: m.head(m.rnn(x)[0]), rnn=nn.GRU(4, 5), head=nn.Linear(5, 3))
    nn.init.zeros_(model.head.weight)
    batches = [(torch.randn(6, 4, 4), torch.randint(3, (6, 4))) for _ in range(6)]

    def update() -> None:
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad

    follow(model, batches, per_token, lambda b: rows(b, 1), after=update, layer_types=layer_types)


class OnlyLoss(nn.Module):
    """Returns nothing but its loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.inner(x), labels)


@pytest.mark.parametrize("forward", FORMS)
def test_models_that_return_only_a_loss(forward: Any) -> None:
    came = follow(OnlyLoss(two_layers(forward)), sequences((4, 7), (4, 7), (3, 7), (4, 4), (1, 7)), lambda m, b: m(*b))
    assert came.exact


def test_a_model_with_samples_in_dim_1_that_returns_only_a_loss() -> None:
    rnn = nn.GRU(4, 5)
    inner = Net(lambda m, x: m.head(m.rnn(x)[0][-1]), rnn=rnn, head=nn.Linear(5, 3))
    batches = [(torch.randn(6, n, 4), torch.randint(3, (n,))) for n in (4, 4, 3)]

    def alone(batch: Pair) -> list[Pair]:
        return [(batch[0][:, n : n + 1], batch[1][n : n + 1]) for n in range(len(batch[1]))]

    follow(OnlyLoss(inner), batches, lambda m, b: m(*b), alone)


@pytest.mark.parametrize("size", [(6, 4), (4, 4)])
def test_time_steps_are_not_taken_for_samples_where_only_a_loss_is_returned(size: tuple[int, int]) -> None:
    """The rows of the first layer are changed one by one; what the loss makes of them depends on the others."""
    inner = Net(lambda m, x: m.head(m.rnn(torch.tanh(m.a(x)))[0][-1]),
                a=nn.Linear(4, 4), rnn=nn.GRU(4, 5), head=nn.Linear(5, 3))  # fmt: skip
    t, n = size
    batches = [(torch.randn(t, n, 4), torch.randint(3, (n,))) for _ in range(3)]

    def alone(batch: Pair) -> list[Pair]:
        return [(batch[0][:, n : n + 1], batch[1][n : n + 1]) for n in range(len(batch[1]))]

    follow(OnlyLoss(inner), batches, lambda m, b: m(*b), alone)
    told = follow(OnlyLoss(inner), batches, lambda m, b: m(*b), alone, sample_dim={"x": 1, "labels": 0})
    assert told.exact


class LossBeside(nn.Module):
    """Returns its loss, beside rows that a part of it does not depend on."""

    def __init__(self, hooked: bool) -> None:
        super().__init__()
        self.a, self.aux, self.hooked = nn.Linear(4, 4), nn.Linear(4, 3), hooked
        self.w, self.scale = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.tanh(self.a(x))
        if self.hooked:
            z.register_hook(lambda g: 2 * g)
        cosine = F.normalize(z.mean(1) * self.scale, dim=1) @ F.normalize(self.w, dim=0)
        steps = torch.tanh(self.aux(z.transpose(0, 1).flatten(0, 1))).view(x.shape[1], len(x), -1)
        return F.cross_entropy(9 * cosine + steps.cumsum(0).mean(0), labels), z


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("sizes", [[(3, 4), (5, 4), (3, 4), (2, 4)], [(4, 3), (4, 4), (3, 3)], [(4, 2), (2, 4)]])
def test_what_only_a_loss_beside_rows_depends_on(sizes: list[tuple[int, int]], hooked: bool) -> None:
    """As many classes, or positions, as samples: where nothing is looked at, these would be taken for them."""
    came = follow(LossBeside(hooked), sequences(*sizes), lambda m, b: m(*b)[0], layer_types="all")
    assert not came.refused
    followed = not hooked and tells_recomputation()  # operations are not followed past hooks
    assert came.left_out.keys() == (set() if followed else {""})


@pytest.mark.parametrize("coupled", [False, True])
def test_outputs_that_are_one_sample_each_have_as_many_rows_as_there_are_samples(coupled: bool) -> None:
    """Features of images, say, as a list of one tensor each: samples in their rows would influence one another."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        z = torch.tanh(m.a(x))
        return m.b(z.cumsum(1).mean(1)), list(z.cumsum(1) - z.mean() if coupled else z.cumsum(1))

    def loss(m: nn.Module, batch: Pair) -> Tensor:
        return F.cross_entropy(m(batch[0])[0], batch[1])

    sizes = [(4, 4), (3, 4), (2, 4), (4, 4), (4, 2), (3, 3), (2, 2), (4, 8)]
    came = follow(two_layers(forward), sequences(*sizes), loss)
    refused = coupled or not tells_recomputation()
    assert came.refused.keys() == ({"a", "b"} if refused else set())
    assert came.exact or refused


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside rows"])
@pytest.mark.parametrize("cut", [0, 1, 3])
@pytest.mark.parametrize("sizes", [[(3, 5), (4, 5), (3, 6)], [(5, 6), (5, 6)], [(3, 4), (2, 4)]])
def test_positions_of_outputs_that_are_one_sample_each_are_not_taken_for_samples(
    sizes: list[tuple[int, int]], cut: int, beside: bool
) -> None:
    """Of sequences of which some are cut, most outputs, or all, have as many rows as there are positions."""

    def forward(m: Any, x: Tensor, lengths: list[int]) -> Any:
        z = torch.tanh(m.a(x))
        own = [one[:length] for one, length in zip(z, lengths, strict=True)]
        return (m.b(z.mean(1)), own) if beside else [m.b(one) for one in own]

    def loss(m: nn.Module, batch: Pair) -> Tensor:
        x, labels = batch
        out = m(x, [x.shape[1] - cut * (label == 0) for label in labels.tolist()])
        rows = torch.stack([one.mean(0) for one in (out[1] if beside else out)])
        return F.cross_entropy(out[0], labels) + rows.square().mean() if beside else F.cross_entropy(rows, labels)

    came = follow(two_layers(forward), sequences(*sizes), loss)
    if tells_recomputation():  # else more is refused, or left out
        assert came.refused.keys() == (set() if beside else {"a", "b"})
        assert came.exact or not beside


def gpt(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=13, n_positions=12, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0, **options)  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


def with_labels(model: nn.Module, batch: Any) -> Tensor:
    logits = model(input_ids=batch[0], labels=batch[0]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())


@pytest.mark.parametrize("attention", [None, "sdpa"])
@pytest.mark.parametrize("hidden", [False, True])
def test_hugging_face_models_called_with_labels(attention: Any, hidden: bool) -> None:
    model = gpt(attn_implementation=attention, output_hidden_states=hidden)
    batches = [(torch.randint(13, (n, t)),) for n, t in [(4, 6), (4, 6), (3, 6), (1, 5), (4, 4), (2, 8)]]
    for layer_types in (None, "all"):
        came = follow(model, batches, with_labels, layer_types=layer_types)
        assert came.exact
    assert follow(model, batches, lambda m, b: m(input_ids=b[0], labels=b[0]).loss, tolerance=1e-6).exact  # in float32


def test_no_dimension_that_would_do_is_said_with_the_argument() -> None:
    """Attention over all tokens of all samples: nothing separates."""
    model = Net(lambda m, x: m.b(torch.tanh(m.a(x)) - m.a(x).mean()), a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    probe = CurvatureProbe(model)
    with pytest.warns(CurvatureWarning, match=r"\(4, 6, 4\)"):
        per_token(model, tokens((4, 6))[0]).backward()
    with pytest.raises(AttributionError, match=r"\(4, 6, 4\).*sample_dim"):
        probe.fisher_diagonal()


def test_a_coupling_over_time_is_not_called_batch_normalisation() -> None:
    model = Net(lambda m, x: m.head(m.rnn(x)[0][-1]), rnn=nn.GRU(4, 5), head=nn.Linear(5, 3))
    probe = CurvatureProbe(model, sample_dim=0)
    with pytest.warns(CurvatureWarning) as caught:
        F.cross_entropy(model(torch.randn(6, 4, 4)), torch.randint(3, (4,))).backward()
    assert not any("batch norm" in str(w.message) for w in caught)
    with pytest.raises(AttributionError, match="sample_dim=1"):
        probe.fisher_diagonal()


@pytest.mark.parametrize("form", ["dim 0", "time"])
def test_batch_normalisation_is_said_and_what_is_around_it_is_found(form: str) -> None:
    """Per-sample gradients are those for the statistics as they are: rows of the gradient that training has."""

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = m.a(x if form == "dim 0" else x.transpose(0, 1))
        hidden = hidden if form == "dim 0" else hidden.transpose(0, 1)
        return m.b(torch.tanh(m.norm(hidden.transpose(1, 2)).transpose(1, 2)).mean(1))

    model = Net(forward, a=nn.Linear(4, 5), norm=nn.BatchNorm1d(5), b=nn.Linear(5, 3))
    probe = CurvatureProbe(model, reduction="mean")
    x, y = sequences((4, 7))[0]
    seen: list[Tensor] = []
    with probe.paused():
        handle = model.a.register_forward_hook(lambda m, a, out: out.register_hook(seen.append) and None)
        classify(model, (x, y)).backward()
        handle.remove()
    g = 4 * (seen[0] if form == "dim 0" else seen[0].transpose(0, 1))
    expected = torch.einsum("nti,ntj->nij", g, x).square().mean(0)
    with pytest.warns(CurvatureWarning, match="batch normalisation in train mode"):
        classify(model, (x, y)).backward()
    found = probe.fisher_diagonal().by_parameter()["a.weight"]
    assert torch.allclose(found, expected, rtol=1e-9)
    probe.reset()
    classify(model, sequences((3, 7))[0]).backward()
    assert probe.num_samples == 3
    probe.fisher_diagonal()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("kind", [pytest.param("fused", marks=refused_where_nothing_tells), "plain"])
def test_fake_quantisation_that_observes_its_ranges_is_said(kind: str) -> None:
    """Per-sample gradients are those for the ranges as they are, from the batch on that they were taken from."""
    quantisation = torch.ao.quantization
    weight, activation = quantisation.default_weight_fake_quant, quantisation.default_fake_quant
    if kind == "fused":
        weight, activation = quantisation.default_fused_wt_fake_quant, quantisation.default_fused_act_fake_quant

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(m.after(F.linear(m.before(x), m.of_weight(m.a.weight), m.a.bias)).relu())

    parts = {"before": activation(), "after": activation(), "of_weight": weight()}
    with torch.random.fork_rng():
        model = Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3), **parts).float()
    expected: dict[str, Tensor] = {}
    with CurvatureProbe(model, reduction="mean") as probe:
        for index, (x, y) in enumerate(vectors(6, 6, 6)):
            twin = copy.deepcopy(model)
            with torch.no_grad():
                twin(x.float())
            twin.apply(quantisation.disable_observer)
            for name, value in fisher_by_sample(twin, F.cross_entropy, x.float(), y, len(x)).items():
                expected[name] = expected.get(name, 0.0) + value / 3
            with nullcontext() if index else pytest.warns(CurvatureWarning, match="observers of fake quantisation"):
                classify(model, (x.float(), y)).backward()
            ranges = {k: v for k, v in twin.state_dict().items() if not k.endswith("observer_enabled")}
            assert all(torch.equal(model.state_dict()[name], value) for name, value in ranges.items())
        assert_all_close(probe.fisher_diagonal().by_parameter(), expected, 1e-5)  # it is made for float32 alone


def test_what_is_refused_is_refused_again_after_a_reset() -> None:
    model = Net(lambda m, x: m.b(torch.tanh(m.a(x)) - m.a(x).mean()), a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    probe = CurvatureProbe(model)
    for _ in range(6):
        with pytest.warns(CurvatureWarning, match="no dimension"):
            per_token(model, tokens((4, 6))[0]).backward()
        with pytest.raises(AttributionError, match="no dimension"):
            probe.fisher_diagonal()
        probe.reset()


class Router(nn.Linear):
    """A layer that no rule is for, since its forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("router", [nn.Linear, Router])
def test_a_look_in_which_no_gradient_comes_to_a_layer_tells_nothing_of_it(router: type[nn.Linear]) -> None:
    """With as many samples as the rows have entries, zeros would do for samples in either dimension."""

    def forward(m: Any, x: Tensor, switch: Tensor) -> Tensor:
        rows = Doubled.apply(m.router(x.flatten(0, 1)))
        return m.head(x.mean(1) + switch * rows.view(x.shape).mean(1))

    model = Net(forward, router=router(4, 4), head=nn.Linear(4, 3))
    batches = [
        (torch.randn(n, 5, 4), torch.full((n, 1), switch), torch.randint(3, (n,)))
        for n, switch in ((3, 1.0), (2, 1.0), (3, 1.0), (4, 0.0), (4, 1.0))
    ]
    came = follow(model, batches, lambda m, b: F.cross_entropy(m(b[0], b[1]), b[2]), layer_types="all")
    assert came.exact, came


def test_a_layer_that_gets_no_gradient_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch is a verification batch until it gets one, which costs three times a step."""

    def forward(m: Any, x: Tensor) -> Tensor:
        windows = torch.tanh(m.first(x.reshape(-1, 4, 4).transpose(0, 1)))
        return m.head((x + 0 * windows.transpose(0, 1).reshape(x.shape)).mean(1))

    monkeypatch.setattr(attributions, "LONG_BLANK", 3)
    model = Net(forward, first=Router(4, 4), head=nn.Linear(4, 3))
    with CurvatureProbe(model, layer_types="all"):
        for step in range(1, 6):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                F.cross_entropy(model(torch.randn(4, 8, 4)), torch.randint(3, (4,))).backward()
            told = [w for w in caught if "no gradient came to first in 3 recorded batches" in str(w.message)]
            assert len(told) == (step == 3)


@pytest.mark.parametrize("router", [nn.Linear, Router])
@pytest.mark.parametrize("opens", [1, 2, 4, 6])
def test_a_branch_that_opens_later_is_looked_at_until_it_does(router: type[nn.Linear], opens: int) -> None:
    """Of a branch that starts at zero, the first looks tell nothing of where the samples are: here in windows."""

    def forward(m: Any, x: Tensor, switch: Tensor) -> Tensor:
        windows = m.second(torch.tanh(m.first(x.reshape(-1, 4, 4).transpose(0, 1))))
        return m.head((x + switch[..., None] * windows.transpose(0, 1).reshape(x.shape)).mean(1))

    model = Net(forward, first=router(4, 4), second=router(4, 4), head=nn.Linear(4, 3))
    batches = [
        (torch.randn(4, 8, 4), torch.full((4, 1), float(step >= opens)), torch.randint(3, (4,))) for step in range(7)
    ]
    came = follow(model, batches, lambda m, b: F.cross_entropy(m(b[0], b[1]), b[2]), layer_types="all")
    assert came.exact, came


class Gated(nn.Module):
    """One weight along both dimensions of a square, the second behind a gate, which is closed at first."""

    def __init__(self, opens: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.gate = nn.Parameter(torch.zeros(())) if opens else torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        other = Opaque.apply(x.transpose(0, 1) @ self.w.T).transpose(0, 1)
        found: Tensor = Opaque.apply(x @ self.w.T).tanh() + Opaque.apply(self.gate * other.tanh())
        return found


@pytest.mark.parametrize("opens", [True, False])
def test_a_gate_that_opens_shows_where_samples_are_behind_it(monkeypatch: pytest.MonkeyPatch, opens: bool) -> None:
    looks, attribute = [], attributions.attribute

    def counted(*args: Any, **options: Any) -> Any:
        looks.append(None)
        return attribute(*args, **options)

    monkeypatch.setattr(attributions, "attribute", counted)
    model = Net(lambda m, x: m.head(m.gated(x).mean(1)), gated=Gated(opens), head=nn.Linear(4, 3))

    def step() -> None:
        with torch.no_grad():
            for p in model.parameters():
                p -= 0 if p.grad is None else 0.1 * p.grad

    def loss(m: nn.Module, batch: Pair) -> Tensor:
        return F.cross_entropy(m(batch[0]), batch[1])

    came = follow(model, sequences(*[(5, 5)] * 12), loss, after=step, layer_types="all")
    assert came.exact, came.refused
    assert opens or not tells_recomputation() or len(looks) == 5  # the first four, and the eighth
