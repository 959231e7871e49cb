"""Compiled models: recorded steps run eagerly, all others as they are compiled, and nothing is compiled again."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secorder import AttributionError, CurvatureProbe, CurvatureWarning, ProbeStateError
from secorder._torch.compile import hooks_prevent_compiling
from secorder._torch.graph import tells_recomputation

from ..helpers import data, mlp, no_warnings, reference, seed
from ..reference import assert_all_close

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.a(x)) * self.b(x))


class Breaks(Branches):
    """A graph break in its middle."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x))
        torch._dynamo.graph_break()
        return self.head(hidden * self.b(x))


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.model
        for layer in others:
            x = layer(checkpoint(first, x, use_reentrant=False) if layer is others[0] else x)
        return x


def seeded_model(kind: type[nn.Module]) -> nn.Module:
    seed()
    return kind()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sequential": mlp,
    "custom": lambda: seeded_model(Branches),
    "graph break": lambda: seeded_model(Breaks),
    "blocks": lambda: nn.Sequential(seeded_model(Branches), nn.Linear(3, 3)),
}
KINDS = ["sequential", "custom", "graph break"]


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class Counting:
    """A backend that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.compiled = 0
        self.runs = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.compiled += 1

        def run(*arguments: Any) -> Any:
            self.runs += 1
            return graph.forward(*arguments)

        return run


ATTACHED = ["compiled module", "before", "after", "in place, before", "in place, after"]


def setup(name: str, attached: str, backend: Any, probed: bool = True, **options: Any) -> tuple[Any, nn.Module, Any]:
    """What is called, the model itself, and the probe."""
    model, probe = MODELS[name](), None
    fullgraph = options.pop("fullgraph", False)
    if attached in ("before", "in place, before") and probed:
        probe = CurvatureProbe(model, **options)
    called: Any = model
    if attached.startswith("in place"):
        model.compile(backend=backend, fullgraph=fullgraph)
    else:
        called = torch.compile(model, backend=backend, fullgraph=fullgraph)
    if probe is None and probed:
        probe = CurvatureProbe(called if attached == "compiled module" else model, **options)
    return called, model, probe


def compiles_with_a_probe(model: nn.Module, attached: str) -> bool:
    """Older PyTorch compiles nothing of its own containers when a hook has to run outside of the graph.

    What it compiles all the same is code of the user's inside.
    """
    own = any(isinstance(part, Branches) for part in model.modules())
    return attached == "compiled module" or own or not hooks_prevent_compiling(model)


def test_what_the_compiler_leaves_alone_for_the_probe_is_told() -> None:
    """A warning where nothing is compiled any more, and only there."""
    for attached in ATTACHED:
        for name in ("sequential", "custom"):
            torch._dynamo.reset()
            called, model, probe = setup(name, attached, "eager", every=2)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(3):
                    called(data()[0])
            probe.detach()
            told = [str(warning.message) for warning in caught if "compiles nothing of" in str(warning.message)]
            assert len(told) == (0 if compiles_with_a_probe(model, attached) else 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("attached", ATTACHED)
@pytest.mark.parametrize(("backend", "every"), [("eager", 1), ("eager", 3), ("aot_eager", 2)])
def test_compiled_models(name: str, attached: str, every: int, backend: str) -> None:
    """All numbers as without a compiler, and as many graphs as without a probe."""
    batches = [data() for _ in range(6)]
    called, model, _ = setup(name, attached, backend, probed=False)
    plain = []
    for inputs, targets in batches:
        model.zero_grad()
        output = called(inputs)
        F.cross_entropy(output, targets).backward()
        plain.append([output.detach(), *[p.grad.clone() for p in model.parameters()]])
    expected_graphs = graphs()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    called, model, probe = setup(name, attached, backend, every=every)
    seen = []
    for index, (inputs, targets) in enumerate(batches):
        model.zero_grad()
        output = called(inputs)
        F.cross_entropy(output, targets).backward()
        for one, other in zip(plain[index], [output.detach(), *[p.grad for p in model.parameters()]], strict=True):
            assert torch.equal(one, other)
        seen.append(graphs())
    recorded = batches[::every]
    if name == "sequential" and attached.startswith("in place"):
        expected_graphs = 1  # without any hook, PyTorch does not compile what has no code of the user's
    if not compiles_with_a_probe(model, attached):
        expected_graphs = 0
    assert seen[-1] == (0 if every == 1 else expected_graphs)
    assert seen[-1] == seen[min(every, len(seen) - 1)]  # none after the first step that is not recorded
    assert probe.num_samples == 6 * len(recorded)
    parts = [reference(MODELS[name](), batch) for batch in recorded]
    found = probe.fisher_diagonal().by_parameter()
    assert_all_close(
        {n.removeprefix("_orig_mod."): f for n, f in found.items()},
        {n: sum(part[n] for part in parts) / len(parts) for n in parts[0]},
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sequential", "custom", "blocks"])
@pytest.mark.parametrize("attached", ATTACHED)
@pytest.mark.parametrize("every", [1, 3])
def test_whole_graphs_never_stop_training(name: str, attached: str, every: int) -> None:
    """With ``fullgraph=True`` the numbers are told, or the read says how."""
    batch = data()
    backend = Counting()
    called, model, probe = setup(name, attached, backend, every=every, fullgraph=True)
    for _ in range(4):
        model.zero_grad()
        F.cross_entropy(called(batch[0]), batch[1]).backward()
    assert backend.compiled <= 1
    try:
        found = probe.fisher_diagonal().by_parameter()
    except ProbeStateError as error:
        told = str(error)
    else:
        told = ""
        expected = reference(MODELS[name](), batch)
        assert_all_close({n.removeprefix("_orig_mod."): f for n, f in found.items()}, expected)
    if told:
        assert "torch.compile" in told
        assert backend.runs == 4
    elif compiles_with_a_probe(model, attached):
        assert backend.runs == 4 - len(range(0, 4, every))  # all but the steps that are recorded
    else:
        assert backend.runs == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("attached", ["compiled module", "before", "after"])
@pytest.mark.parametrize("order", ["attached first", "compiled first"])
def test_steps_that_are_not_recorded_run_compiled(name: str, attached: str, order: str) -> None:
    backend, batch = Counting(), data()
    called, model, probe = setup(name, attached, backend, every=4)
    if order == "compiled first":
        probe.detach()
        F.cross_entropy(called(batch[0]), batch[1]).backward()
        probe.attach()
        if attached != "compiled module":
            return
    runs = []
    for _ in range(8):
        before = backend.runs
        F.cross_entropy(called(batch[0]), batch[1]).backward()
        runs.append(backend.runs - before)
    compiles = compiles_with_a_probe(model, attached)
    assert [count > 0 for count in runs] == [False, compiles, compiles, compiles] * 2
    assert probe.num_samples == 12
    with torch.no_grad():
        before = backend.runs
        called(batch[0])
        assert (backend.runs > before) is compiles


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("name", ["sequential", "custom"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_step_that_is_compiled_around_the_model(name: str, fullgraph: bool, every: int) -> None:
    """Told, or refused with the cause; and the step is what it is without a probe."""
    batch = data()
    found = []
    for probed in (False, True):
        torch._dynamo.reset()
        model = MODELS[name]()
        if probed:
            probe = CurvatureProbe(model, every=every)

        def loss_of(inputs: Tensor, targets: Tensor, model: nn.Module = model) -> Tensor:
            return F.cross_entropy(model(inputs), targets)

        compiled = torch.compile(loss_of, backend="eager", fullgraph=fullgraph)
        for _ in range(4):
            loss = compiled(*batch)
            loss.backward()
        found.append([loss.detach(), *[p.grad for p in model.parameters()]])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    try:
        fisher = probe.fisher_diagonal().by_parameter()
    except ProbeStateError as error:
        message = str(error)
        assert "compiled with what is around it" in message
        assert "attach to what torch.compile returned" in message
        assert "was not called" not in message
    else:
        assert_all_close(fisher, reference(MODELS[name](), batch))


@pytest.mark.filterwarnings("ignore")
def test_a_whole_training_step_that_is_compiled() -> None:
    """Around the probe all is compiled as ever, and nothing of the probe's is."""
    batch = data()
    found = []
    for probed in (False, True):
        torch._dynamo.reset()
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if probed:
            probe = CurvatureProbe(model)
        backend = Counting()

        @torch.compile(backend=backend)
        def train(inputs: Tensor, targets: Tensor, model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            return loss

        losses = [train(*batch).detach() for _ in range(4)]
        found.append([*losses, *[p.detach() for p in model.parameters()]])
        assert backend.compiled == 2  # the loss, with the model where no probe is, and the optimizer's step
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    try:
        assert probe.num_samples == 24
    except AssertionError:
        with pytest.raises(ProbeStateError, match=r"torch\.compile"):
            probe.fisher_diagonal()


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_was_compiled_and_run_before_its_probe() -> None:
    model, batch = mlp(), data()
    compiled = torch.compile(model, backend="eager")
    F.cross_entropy(compiled(batch[0]), batch[1]).backward()
    with CurvatureProbe(compiled) as probe:  # to what torch.compile returned, as the message says
        before = graphs()
        for _ in range(3):
            F.cross_entropy(compiled(batch[0]), batch[1]).backward()
        assert graphs() == before
        assert_all_close(
            {n.removeprefix("_orig_mod."): f for n, f in probe.fisher_diagonal().by_parameter().items()},
            reference(mlp(), batch),
        )
    F.cross_entropy(compiled(batch[0]), batch[1]).backward()
    assert graphs() == before


@pytest.mark.filterwarnings("ignore")
def test_parts_that_are_compiled() -> None:
    """A compiled block within a model, the usual way for transformers."""
    batch = data()
    backend = Counting()
    model = Branches()
    model.a = torch.compile(model.a, backend=backend)
    model.b = torch.compile(model.b, backend=backend)
    expected = {n.replace("_orig_mod.", ""): f for n, f in reference(model, batch).items()}
    model.zero_grad()
    with CurvatureProbe(model, every=2) as probe:
        runs = []
        for _ in range(4):
            before = backend.runs
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            runs.append(backend.runs - before)
        assert runs == [0, 2, 0, 2]
        found = {n.replace("_orig_mod.", ""): f for n, f in probe.fisher_diagonal().by_parameter().items()}
        assert_all_close(found, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", ["*", "2"])
@pytest.mark.parametrize("inside", [False, True])
def test_parts_that_are_compiled_within_a_checkpoint(layers: str, inside: bool) -> None:
    """They are computed again in backward as they were at first, in steps that are recorded and in others."""

    def trained(probed: bool) -> tuple[list[Tensor], Any]:
        torch._dynamo.reset()
        model, batches = mlp(), [data(6), data(6), data(4), data(6)]
        if inside:
            model[0].compile(backend="aot_eager")
        else:
            model[0] = torch.compile(model[0], backend="aot_eager")
        whole = Checkpointed(model)
        probe = CurvatureProbe(whole, layers=f"model.{layers}", every=2, reduction="mean") if probed else None
        for x, y in batches:
            F.cross_entropy(whole(x), y).backward()
        return [p.grad for p in whole.parameters() if p.grad is not None], probe

    (bare, _), (found, probe) = trained(False), trained(True)
    assert all(torch.equal(one, other) for one, other in zip(bare, found, strict=True))
    assert probe.num_samples == 10
    assert len(probe.fisher_diagonal()) == (3 if layers == "*" else 1)


@pytest.mark.filterwarnings("ignore")
def test_exceptions_in_a_compiled_model_leave_the_compiler_as_it_was() -> None:
    backend, batch = Counting(), data()
    model = mlp()
    compiled = torch.compile(model, backend=backend)
    with CurvatureProbe(compiled, every=2) as probe:
        for index in range(4):
            with pytest.raises((RuntimeError, torch._dynamo.exc.TorchRuntimeError)):
                compiled(torch.randn(6, 5))
            before = backend.runs
            other = torch.compile(torch.sin, backend=backend)
            other(torch.ones(2))
            assert backend.runs == before + 1, index  # what is not the probe's runs compiled
        runs = []
        for _ in range(4):
            before = backend.runs
            F.cross_entropy(compiled(batch[0]), batch[1]).backward()
            runs.append(backend.runs - before)
        assert runs == [0, 1, 0, 1]
        assert probe.num_samples == 12


def test_a_compiled_model_warns_of_nothing() -> None:
    batch = data()
    compiled = torch.compile(mlp(), backend="eager")
    with no_warnings(), CurvatureProbe(compiled, every=2):
        for _ in range(4):
            F.cross_entropy(compiled(batch[0]), batch[1]).backward()


#: Losses of outputs and targets.
COMPILED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a mean": F.cross_entropy,
    "a sum": lambda z, t: F.cross_entropy(z, t, reduction="sum"),
    "contrastive": lambda z, t: F.cross_entropy(z @ z.T, torch.arange(len(z))),
}


@pytest.mark.skipif(not tells_recomputation(), reason="losses are not looked at")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPILED)
def test_a_loss_that_is_compiled_stays_so_and_is_warned_of(name: str) -> None:
    model, stance, batch = mlp(), torch._dynamo.eval_frame._stance, data(6)
    compiled = torch.compile(COMPILED[name], backend="aot_eager", dynamic=False)
    with CurvatureProbe(model, reduction="mean") as probe:
        for _ in range(3):
            loss = compiled(model(batch[0]), batch[1])
            assert type(loss.grad_fn).__name__ == "CompiledFunctionBackward"
            assert torch._dynamo.eval_frame._stance is stance
            loss.backward()
        with pytest.warns(CurvatureWarning, match="nor how it reduces them.*a compiled one"):
            found = probe.fisher_diagonal().by_parameter()
        if name == "a mean":
            assert_all_close(found, reference(mlp(), batch))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [0, 2])
def test_backward_passes_that_are_compiled_are_told(first: int) -> None:
    from torch._dynamo import compiled_autograd

    model, (x, t) = mlp(), data(6)
    with CurvatureProbe(model, reduction="mean") as probe:
        for number in range(4):
            loss = F.cross_entropy(model(x), t)
            compiles = compiled_autograd._enable(torch.compile(backend="eager"))
            with compiles if number >= first else nullcontext():
                loss.backward()
        if torch.__version__ < "2.12":  # no hook runs in a compiled backward
            assert probe.num_samples == 6 * first
            return
        with pytest.raises(AttributionError, match="its backward pass is compiled"):
            probe.fisher_diagonal()
