"""Samples that no dimension holds: entries of lists, graphs, and calls of one sample."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureProbe, ProbeStateError

from ..helpers import Net, make
from .loops import follow

Images = tuple[list[Tensor], Tensor]


def images(channels: int, *counts: int) -> list[Images]:
    """Batches of images of several sizes, one label each."""
    return [
        ([torch.randn(channels, 5 + n, 6 - n) for n in range(count)], torch.randint(2, (count,))) for count in counts
    ]


def one_image(batch: Images) -> list[Images]:
    return [([image], label[None]) for image, label in zip(*batch, strict=True)]


def each(m: Any, batch: list[Tensor]) -> Tensor:
    """One after the other."""
    return torch.stack([m.head(torch.tanh(m.body(image[None])).sum((2, 3))[0]) for image in batch])


def padded(m: Any, batch: list[Tensor]) -> Tensor:
    height, width = (max(image.shape[d] for image in batch) for d in (1, 2))
    whole = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in batch]
    return m.head(torch.tanh(m.body(torch.stack(whole))).sum((2, 3)))


def detector(forward: Callable[..., Any], channels: int) -> nn.Module:
    return Net(forward, body=nn.Conv2d(channels, 3, 1, bias=False), head=nn.Linear(3, 2))


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(*batch[:-1]), batch[-1])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("forward", [each, padded])
def test_lists_of_images_of_several_sizes(forward: Any, channels: int) -> None:
    """As many as there are channels, fewer, more, and one: no size tells."""
    came = follow(detector(forward, channels), images(channels, 3, 3, 2, 4, 1, 3), classify, one_image)
    assert came.exact


def test_a_list_of_which_a_loss_alone_is_returned_has_to_be_told() -> None:
    def forward(m: Any, batch: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(padded(m, batch), torch.stack(labels))}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(*batch)["loss"]

    def alone(batch: Any) -> Any:
        return [([image], [label]) for image, label in zip(*batch, strict=True)]

    batches = [(x, list(y)) for x, y in images(1, 3, 3, 2)]
    assert follow(detector(forward, 1), batches, loss, alone, sample_dim="list").exact
    came = follow(detector(forward, 1), batches, loss, alone)
    assert all('pass sample_dim="list"' in reason for reason in came.refused.values())
    assert len(came.refused) == 2


def of_words(m: Any, sentences: list[Tensor]) -> Tensor:
    """Packed inside; a sentence of two words is as long as there are classes."""
    lengths = torch.tensor([len(words) for words in sentences])
    padded = nn.utils.rnn.pad_sequence(sentences, batch_first=True)
    packed = nn.utils.rnn.pack_padded_sequence(m.table(padded), lengths, batch_first=True, enforce_sorted=False)
    return m.head(m.rnn(packed)[1][-1])


def of_texts(m: Any, texts: list[str]) -> Tensor:
    return m.head(torch.stack([m.table(torch.tensor([ord(c) - ord("a") for c in text])).mean(0) for text in texts]))


def of_trees(m: Any, trees: list[Any]) -> Tensor:
    def vector(tree: Any) -> Tensor:
        if isinstance(tree, int):
            return m.table(torch.tensor(tree))
        return torch.tanh(m.join(torch.cat([vector(child) for child in tree])))

    return m.head(torch.stack([vector(tree) for tree in trees]))


SENTENCES = [torch.tensor(words) for words in ([4, 1, 2], [0, 3, 3, 1, 5], [2, 5], [1, 0, 4, 4])]
TEXTS = ["ab", "feed", "c", "bad"]
TREES: list[Any] = [((1, 2), 3), 4, (5, (0, (3, 1))), (2, 2)]
LISTS = {"words": (of_words, SENTENCES), "texts": (of_texts, TEXTS), "trees": (of_trees, TREES)}


@pytest.mark.parametrize("kind", list(LISTS))
@pytest.mark.parametrize("sample_dim", [None, "list"])
def test_lists_of_what_holds_no_numbers(kind: str, sample_dim: Any) -> None:
    forward, entries = LISTS[kind]
    inner = {"words": {"rnn": nn.GRU(4, 4, batch_first=True)}, "texts": {}, "trees": {"join": nn.Linear(8, 4)}}
    model = Net(forward, table=nn.Embedding(6, 4), **inner[kind], head=nn.Linear(4, 2))
    batches = [(entries[:count], torch.randint(2, (count,))) for count in (4, 3, 3)]
    one = lambda b: [([entry], y[None]) for entry, y in zip(*b, strict=True)]  # noqa: E731
    assert follow(model, batches, classify, one, layer_types="all", sample_dim=sample_dim).exact


@pytest.mark.parametrize("sample_dim", [None, "list"])
def test_a_list_whose_entries_draw_random_numbers(sample_dim: Any) -> None:
    """In another's place, an entry of another length draws others. One is as long as there are samples."""
    table = nn.Sequential(nn.Embedding(6, 4), nn.Dropout(0.5))
    model = Net(of_words, table=table, rnn=nn.GRU(4, 4, batch_first=True), head=nn.Linear(4, 2))
    labels = torch.tensor([0, 1, 1, 0])
    with CurvatureProbe(model, sample_dim=sample_dim, reduction="mean") as probe:
        state = torch.get_rng_state()
        classify(model, (SENTENCES, labels)).backward()
        found = probe.fisher_diagonal().by_parameter()["head.weight"]
        assert probe.num_samples == 4
    torch.set_rng_state(state)
    losses = F.cross_entropy(model(SENTENCES), labels, reduction="none")
    own = [torch.autograd.grad(loss, model.head.weight, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(found, (torch.stack(own) ** 2).mean(0), rtol=1e-10, atol=1e-14)


def test_a_list_of_outputs_is_refused() -> None:
    model = detector(lambda m, batch: list(each(m, batch)), 1)
    with CurvatureProbe(model) as probe:
        for batch, labels in images(1, 3, 3):
            F.cross_entropy(torch.stack(model(batch)), labels).backward()
        with pytest.raises(ProbeStateError, match="one tensor of a row a sample"):
            probe.fisher_diagonal()


def test_a_list_of_features_holds_samples_in_a_dimension() -> None:
    model = Net(
        lambda m, xs: m.b(torch.cat([torch.tanh(m.a(x)).mean(1) for x in xs], 1)), a=nn.Linear(4, 5), b=nn.Linear(10, 3)
    )
    batches = [([torch.randn(n, 5, 4), torch.randn(n, 3, 4)], torch.randint(3, (n,))) for n in (4, 2, 2, 1, 3)]
    batches.insert(0, ([x[:1] for x in batches[0][0]], batches[0][1][:1]))  # of one, which tells nothing
    came = follow(
        model, batches, classify, lambda b: [([x[n : n + 1] for x in b[0]], b[1][n : n + 1]) for n in range(len(b[1]))]
    )
    assert not came.refused
    assert came.left_out == {"a": [0], "b": [0]}


def graphs(m: Any, nodes: Tensor, graph: Tensor) -> Tensor:
    """The number of graphs is in no argument's shape; attention among the nodes of each."""
    hidden = torch.tanh(m.a(m.table(nodes) if nodes.dtype == torch.long else nodes))
    weights = m.gate(hidden).exp()
    count = int(graph.max()) + 1
    total = weights.new_zeros(count, 1).index_add(0, graph, weights)
    return m.b(hidden.new_zeros(count, 5).index_add(0, graph, hidden * weights / total[graph]))


def graph_batch(*sizes: int, integers: bool) -> Any:
    graph = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    graph = graph[torch.randperm(len(graph))] if len(sizes) == 4 else graph  # in any order
    nodes = torch.randint(6, (len(graph),)) if integers else torch.randn(len(graph), 4)
    return nodes, graph, torch.randint(3, (len(sizes),))


def one_graph(batch: Any) -> list[Any]:
    nodes, graph, y = batch
    return [(nodes[graph == n], graph[graph == n] * 0, y[n : n + 1]) for n in range(len(y))]


def packed(m: Any, tokens: Tensor, bounds: Tensor) -> Tensor:
    """Sequences one after the other, with where each begins and ends."""
    sample = torch.arange(len(bounds) - 1).repeat_interleave(bounds.diff())
    return graphs(m, tokens, sample)


def test_sequences_with_their_bounds() -> None:
    def batch(*sizes: int) -> Any:
        return torch.randn(sum(sizes), 4), torch.tensor([0, *sizes]).cumsum(0), torch.randint(3, (len(sizes),))

    def alone(b: Any) -> list[Any]:
        ends = b[1].tolist()
        pairs = zip(ends[:-1], ends[1:], b[2], strict=True)
        return [(b[0][start:end], torch.tensor([0, end - start]), y[None]) for start, end, y in pairs]

    model = Net(packed, a=nn.Linear(4, 5), gate=nn.Linear(5, 1), b=nn.Linear(5, 3))
    assert follow(model, [batch(2, 4, 3), batch(3, 3), batch(2, 2, 2), batch(3, 1)], classify, alone).exact


@pytest.mark.parametrize("integers", [False, True])
def test_graphs_whose_number_no_shape_tells(integers: bool) -> None:
    model = Net(graphs, a=nn.Linear(4, 5), gate=nn.Linear(5, 1), b=nn.Linear(5, 3), table=nn.Embedding(6, 4))
    sizes = [(2, 4, 3), (3, 3, 1, 2), (2, 2, 2), (4, 5), (1, 1, 1), (2, 2, 2)]
    came = follow(model, [graph_batch(*s, integers=integers) for s in sizes], classify, one_graph)
    assert came.exact


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_graphs_with_a_sparse_matrix_of_their_edges(layout: torch.layout) -> None:
    def forward(m: Any, nodes: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        return graphs(m, torch.sparse.mm(edges, nodes), graph)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nodes, edges, graph, y = batch
        return F.cross_entropy(model(nodes, edges.to_sparse(layout=layout), graph), y)

    def batch(*sizes: int) -> Any:
        nodes, graph, y = graph_batch(*sizes, integers=False)
        return nodes, torch.block_diag(*[torch.rand(n, n).round() for n in sizes]), graph, y

    def alone(b: Any) -> list[Any]:
        nodes, edges, graph, y = b
        own = [graph == n for n in range(len(y))]
        return [(nodes[at], edges[at][:, at], graph[at] * 0, y[n : n + 1]) for n, at in enumerate(own)]

    model = Net(forward, a=nn.Linear(4, 5), gate=nn.Linear(5, 1), b=nn.Linear(5, 3))
    assert follow(model, [batch(2, 4, 3), batch(3, 3), batch(2, 2, 2)], loss, alone).exact


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_named() -> None:
    model = Net(lambda m, xs: m.head(xs.to_padded_tensor(0.0).sum(1)), head=nn.Linear(4, 3))
    with CurvatureProbe(model) as probe:
        model(torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])).sum().backward()
        with pytest.raises(AttributionError, match="called with a nested tensor"):
            probe.fisher_diagonal()


def test_a_nested_tensor_within_the_model_is_named() -> None:
    def forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        pieces = [row[:n] for row, n in zip(x, lengths.tolist(), strict=True)]
        hidden = torch.tanh(m.a(torch.nested.as_nested_tensor(pieces, layout=torch.jagged)))
        return m.b(torch.nested.to_padded_tensor(hidden, 0.0).sum(1))

    batches = [(torch.randn(n, 4, 4), torch.randint(1, 5, (n,)), torch.randint(3, (n,))) for n in (4, 3)]
    model = Net(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3))
    with CurvatureProbe(model, reduction="mean") as probe:
        classify(model, batches[0]).backward()
        with pytest.raises(AttributionError, match=r"layer 'a' returns a nested tensor.*padded ones, or leave"):
            probe.fisher_diagonal()
    assert follow(model, batches, classify, layers="!a").exact


def test_calls_of_one_tree() -> None:
    model = Net(
        lambda m, tree: of_trees(m, [tree]), table=nn.Embedding(6, 4), join=nn.Linear(8, 4), head=nn.Linear(4, 2)
    )
    batches = [(tree, torch.randint(2, (1,))) for tree in TREES]
    assert follow(model, batches, classify, lambda b: [b], layer_types="all", sample_dim={"args": None}).exact


def test_calls_of_one_sample() -> None:
    model = make()
    batches = [(torch.randn(4), torch.randint(3, ())) for _ in range(3)]
    assert follow(model, batches, classify, lambda b: [b], sample_dim={"input": None}).exact
    probe = CurvatureProbe(model)
    with pytest.warns(UserWarning, match="for all of them where each call is one sample"):
        classify(model, batches[0]).backward()
    with pytest.raises(AttributionError, match="for all of them where each call is one sample"):
        probe.fisher_diagonal()
