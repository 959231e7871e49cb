"""Where samples are in the operations that parameters meet them in: by the graph, and by random cotangents."""

import pytest
import torch

from secorder._torch.graph import users_of
from secorder._torch.sample_graph import samples_in_nodes
from secorder.layers.layout import DIM_ZERO, Layout
from secorder.oneshot.use_rows import ByCotangents, follow_uses

from ..helpers import seeded

N, T = 4, 3


@pytest.mark.parametrize("by_graph", [True, False])
def test_layouts_of_uses(by_graph: bool) -> None:
    x, table, w = torch.randn(N * T, 5), torch.randn(T, 5, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    z = torch.tanh((x.view(N, T, 5) + 2 * table.exp()).view(-1, 5) @ w).view(N, T, 2).sum(1)
    told = samples_in_nodes([z], N) if by_graph else None
    evidence = ByCotangents([(z, DIM_ZERO)], N, seeded(), told)
    routes = {"table": frozenset(), "w": frozenset()}
    found = follow_uses(users_of([z]), {"table": {"table": table}, "w": {"w": w}}, evidence, routes, known=False)
    (use,) = found["w"].uses
    assert evidence.layouts[use.node] == [Layout(0, T)]
    (use,) = found["table"].uses
    assert (use.node.name(), evidence.layouts[use.node]) == ("AddBackward0", [Layout(0)])
    assert routes["table"] == {("table", "ExpBackward0 0"), ("table", "ExpBackward0 0", "MulBackward0 0")}


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_few_digits_inside_or_at_the_end_hide_no_order_of_rows(seed: int, kind: torch.dtype) -> None:
    """Two random weights are often the same to the rounding of bfloat16, and then do for both orders."""
    x, w = torch.randn(2 * 2, 5, dtype=torch.float32), torch.randn(5, 2, dtype=torch.float32, requires_grad=True)
    z = (x.to(kind) @ w.to(kind)).view(2, 2, 2).sum(0).to(torch.float32 if kind is torch.bfloat16 else torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    evidence = ByCotangents([(z, DIM_ZERO)], 2, generator)
    (use,) = follow_uses(users_of([z]), {"w": {"w": w}}, evidence, {"w": frozenset()}, known=False)["w"].uses
    assert evidence.layouts[use.node] == [Layout(0, 2, sample_major=False)]


@pytest.mark.parametrize("inside", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(20))
def test_fewer_digits_on_the_way_than_at_either_end(inside: torch.dtype, seed: int) -> None:
    """Taken for an operation that no sample owns, it would be followed to the model's end, and run for each sample."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.float64 if inside is torch.float32 else torch.float32
    x = torch.randn(N * T, 5, dtype=kind, generator=generator)
    table = torch.randn(T, 5, dtype=kind, generator=generator, requires_grad=True)
    w = torch.randn(5, 2, dtype=kind, generator=generator)
    z = ((x.view(N, T, 5) + 2 * table).to(inside).tanh().to(kind) @ w).sum(1)
    evidence, routes = ByCotangents([(z, DIM_ZERO)], N, generator), {"table": frozenset[tuple[str, ...]]()}
    (use,) = follow_uses(users_of([z]), {"table": {"table": table}}, evidence, routes, known=False)["table"].uses
    assert (use.node.name(), evidence.layouts[use.node]) == ("AddBackward0", [DIM_ZERO])
    assert routes["table"] == {("table", "MulBackward0 0")}


@pytest.mark.parametrize("end", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0.2, 1.0])
@pytest.mark.parametrize("seed", range(20))
def test_few_digits_do_not_make_rows_of_several_samples_those_of_one(end: torch.dtype, first: float, seed: int) -> None:
    """Rows of packed sequences: of samples of one and three steps, whose first one counts less."""
    generator = torch.Generator().manual_seed(seed)
    owners, x = torch.tensor([1, 0, 1, 1]), torch.randn(4, 5, dtype=torch.float32, generator=generator)
    w = torch.randn(5, 2, dtype=torch.float32, generator=generator, requires_grad=True)
    rows = (x @ w) * torch.tensor([first, 1.0, 1.0, 1.0], dtype=torch.float32)[:, None]
    z = torch.zeros(2, 2, dtype=torch.float32).index_add(0, owners, rows.bfloat16().tanh().float()).to(end)
    evidence = ByCotangents([(z, DIM_ZERO)], 2, generator)
    users = users_of([z])
    evidence.judge([node for node in users if node.name() == "MmBackward0"])
    assert list(evidence.layouts.values()) == [[None]]


def test_outputs_that_nothing_depends_on_do_not_hide_where_samples_are() -> None:
    """The states behind the last step of a recurrent layer: it would be followed, and run once a sample."""
    core, x = torch.nn.LSTM(3, 2, batch_first=True), torch.randn(N, T, 3)
    z = core(x)[0][:, -1]
    users, parameters = users_of([z]), {"core": dict(core.named_parameters())}
    evidence = ByCotangents([(z, DIM_ZERO)], N, seeded(), samples_in_nodes([z], N))
    routes: dict[str, frozenset[tuple[str, ...]]] = {"core": frozenset()}
    found = follow_uses(users, parameters, evidence, routes, known=False)
    assert not routes["core"]
    if "MkldnnRnnLayerBackward0" in {node.name() for node in users}:
        (use,) = found["core"].uses
        assert evidence.layouts[use.node] == [Layout(1), Layout(0), Layout(0)]
