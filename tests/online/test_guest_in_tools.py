"""Export, traces, copies, pickles and fused paths of a probed model are what they are without a probe."""

import copy
import io
import itertools
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe, ProbeStateError
from secorder._torch.compile import hooks_prevent_compiling

from ..helpers import Net, data, make, mlp, reference, seed, step
from ..reference import assert_all_close
from .twins import same, traces

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def cnn() -> nn.Sequential:
    seed()
    parts = [nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)]
    return nn.Sequential(*parts)


class Branches(nn.Module):
    """No chain, and no ``nn.Sequential``."""

    def __init__(self) -> None:
        super().__init__()
        seed()
        self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.a(x)) * self.b(x))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        seed()
        self.embed, self.drop, self.head = nn.Embedding(7, 4), nn.Dropout(0.3), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.drop(self.embed(ids)).mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(6, 4)),
    "cnn": (cnn, lambda: torch.randn(6, 2, 4, 4)),
    "branches": (Branches, lambda: torch.randn(6, 4)),
    "words": (Words, lambda: torch.randint(7, (6, 3))),
}

#: What happened with a probe before a tool is used.
HISTORIES = ["attached", "trained", "in flight", "failed"]


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def probed(name: str, history: str) -> tuple[nn.Module, nn.Module, Tensor, CurvatureProbe]:
    """A model without a probe, its twin with one, both trained alike, a batch, the probe."""
    build, inputs_of = MODELS[name]
    plain, model = build(), build()
    seed(1)
    inputs = inputs_of()
    probe = CurvatureProbe(model, "all", every=1)
    for one in (plain, model):
        seed(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if history == "trained":
                one(inputs).square().sum(1).mean().backward()
                one.zero_grad()
            if history == "in flight":
                probe.kept = one(inputs)
            if history == "failed":
                with pytest.raises((TypeError, RuntimeError, AttributeError)):
                    one(inputs, inputs, None)
    return plain, model, inputs, probe


TOOLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "export": lambda m, x: torch.export.export(m, (x,), strict=False),
    "export strictly": lambda m, x: torch.export.export(m, (x,), strict=True),
    "trace": lambda m, x: torch.jit.trace(m, x, check_trace=False),
    "make_fx": lambda m, x: torch.fx.experimental.proxy_tensor.make_fx(m)(x),
    "fx": lambda m, x: torch.fx.symbolic_trace(m),
    "deepcopy": lambda m, x: copy.deepcopy(m),
    "pickle": lambda m, x: pickle.loads(pickle.dumps(m)),
    "save": lambda m, x: saved_and_loaded(m),
    "functional": lambda m, x: lambda y: torch.func.functional_call(m, dict(m.named_parameters()), (y,)),
    "vmap": lambda m, x: lambda y: torch.func.vmap(lambda row: m(row[None])[0], randomness="same")(y),
    "dynamo export": lambda m, x: torch._dynamo.export(m)(x)[0],
}


#: Where older PyTorch names the parts of its own containers by whether they have hooks.
NAMES_BY_HOOKS = ("export strictly", "dynamo export")


def nothing(*_: Any) -> None:
    """A hook that does nothing."""


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def written(made: Any) -> str:
    """What a tool wrote, as text."""
    if hasattr(made, "graph_module"):
        return str(made.graph_module.code)
    return re.sub(r"___torch_mangle_\d+\.", "", str(getattr(made, "graph", "")))  # a counter of the process


def outcome(tool: Callable[[nn.Module, Tensor], Any], model: nn.Module, inputs: Tensor) -> Any:
    """What comes of a tool, its own error included."""
    seed(3)
    try:
        made = tool(model, inputs)
        module = made.module() if hasattr(made, "graph_module") else made
        return written(made), module(inputs).detach(), torch.get_rng_state()
    except Exception as error:
        return type(error).__name__


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_makes_of_a_probed_model_what_it_makes_without_a_probe(
    name: str, tool: str, history: str, train: bool
) -> None:
    torch._dynamo.reset()
    plain, model, inputs, probe = probed(name, history)
    if tool in NAMES_BY_HOOKS and hooks_prevent_compiling(plain):
        plain.register_forward_pre_hook(nothing)  # any hook, whoever's, changes the names in what is exported
    found = []
    for one in (plain, model):
        one.train(train)
        before, samples = traces(one), probe.num_samples
        found.append(outcome(TOOLS[tool], one, inputs))
        if tool != "dynamo export":  # which leaves a mark of its own on any module
            assert traces(one) == before
    assert same(*found), found
    # And the probe goes on as before.
    assert probe.num_samples == samples
    if name != "cnn" and not train:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            probe.reset()
            model(inputs).square().sum(1).mean().backward()
        assert probe.num_samples == 6


# ---- copies and pickles


class Holder(nn.Module):
    """Training code that is a module itself, and holds the probe of its own model."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.net = make()
        self.probe = CurvatureProbe(self if inside else self.net, reduction="mean")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("history", ["attached", "trained", "in flight"])
def test_a_module_that_holds_its_probe(inside: bool, history: str, copied: Callable[[Any], Any]) -> None:
    model, batch = Holder(inside), data()
    loss = None
    if history == "trained":
        step(model, batch)
        model.zero_grad()
    if history == "in flight":
        loss = F.cross_entropy(model(batch[0]), batch[1])
    twin = copied(model)
    assert not twin.probe.attached
    assert twin.probe.num_samples == (6 if history == "trained" else 0)
    assert traces(twin)["hooks"] == traces(make_holder_plain())["hooks"]
    step(twin, batch)  # recorded nowhere
    assert twin.probe.num_samples == model.probe.num_samples
    twin.probe.attach()
    twin.probe.reset()
    step(twin, batch)
    assert_all_close(twin.probe.fisher_diagonal(), fresh_fisher(twin, batch))
    if loss is not None:
        loss.backward()
        assert model.probe.num_samples == 6
    twin.probe.detach()


def make_holder_plain() -> nn.Module:
    model = Holder(False)
    model.probe.detach()
    return model


def fresh_fisher(model: Holder, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    wanted = reference(model.net, batch)
    flat: dict[str, Tensor] = {}
    for layer in model.probe.layer_names:
        inner = layer.removeprefix("net.")
        flat[layer] = torch.cat([wanted[f"{inner}.weight"].flatten(), wanted[f"{inner}.bias"]])
    return flat


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copied_probe_holds_what_was_accumulated(copied: Callable[[Any], Any]) -> None:
    model, batch = mlp(), data()
    probe = CurvatureProbe(model, reduction="mean")
    loss = F.cross_entropy(model(batch[0]), batch[1])
    step(model, batch)
    twin = copied(probe)
    loss.backward()
    assert twin.num_samples == 6
    assert not twin.attached
    assert_all_close(twin.fisher_diagonal().by_parameter(), reference(model, batch))
    with pytest.raises(ProbeStateError):
        twin.hessian_diagonal(F.cross_entropy, *batch, method="exact")
    assert probe.num_samples == 12


def test_models_with_a_state_of_their_own_making() -> None:
    """``__getstate__`` and ``__reduce__`` of the user's are called as without a probe."""

    model, batch = Stateful(), data()
    plain = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    probe = CurvatureProbe(model)
    step(model, batch)
    for one, other in zip(plain, [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)], strict=True):
        assert one.note == other.note == "restored"
        assert traces(one) == traces(other)
        assert torch.equal(one(batch[0]), other(batch[0]))
    probe.detach()
    assert "__getstate__" not in vars(model)


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = make()
        self.note = "original"

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "note": "saved"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.note = "restored"


def test_two_probes_and_a_copy_of_a_model_with_one_of_them() -> None:
    model, batch = mlp(), data()
    one, two = CurvatureProbe(model), CurvatureProbe(model, layers="2")
    pickle.dumps(model)
    one.detach()
    twin = copy.deepcopy(model)
    assert not any(traces(twin)["hooks"].values())
    step(model, batch)
    assert two.num_samples == 6
    two.detach()
    assert not any(traces(model)["hooks"].values())
    assert "__getstate__" not in vars(model)


LOAD = """
import sys
class Nothing:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "secorder":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
import torch
from torch import nn
kinds = [nn.Sequential, nn.Linear, nn.Tanh, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Flatten]
torch.serialization.add_safe_globals(kinds)
for path, *shape in (argument.split(",") for argument in sys.argv[1:]):
    model = torch.load(path, weights_only=True)
    print(float(model(torch.ones(1, *map(int, shape), dtype=torch.float64)).detach().sum()))
"""


def test_a_saved_model_is_loaded_by_the_users_own_safe_globals_where_secorder_is_not_installed(tmp_path: Path) -> None:
    arguments, expected = [], []
    for index, (kind, history) in enumerate(itertools.product(["mlp", "cnn"], HISTORIES)):
        _, model, inputs, probe = probed(kind, history)
        model.eval()
        path, shape = tmp_path / f"{index}.pt", inputs.shape[1:]
        torch.save(model, path)
        assert b"secorder" not in path.read_bytes()
        arguments.append(",".join(map(str, (path, *shape))))
        with probe.paused():
            expected.append(float(model(torch.ones(1, *shape)).detach().sum()))
    command = [sys.executable, "-c", LOAD, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [float(line) for line in done.stdout.split()] == pytest.approx(expected)


def test_a_saved_state_dict_and_the_module_tree_are_the_same() -> None:
    plain, model = mlp(), mlp()
    probe = CurvatureProbe(model, "all")
    step(model, data())
    plain_file, file = io.BytesIO(), io.BytesIO()
    torch.save(plain.state_dict(), plain_file)
    torch.save(model.state_dict(), file)
    assert plain_file.getvalue() == file.getvalue()
    assert str(plain) == str(model)
    assert list(dict(model.named_modules())) == list(dict(plain.named_modules()))
    probe.detach()


# ---- fused paths


class Encoder(nn.Module):
    def __init__(self, nested: bool) -> None:
        super().__init__()
        seed()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask)[:, 0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("grad", ["no_grad", "inference", "frozen", "grad"])
@pytest.mark.parametrize("root", ["model", "encoder", "layer"])
def test_the_fused_encoder_in_evaluation(root: str, grad: str, nested: bool, padded: bool) -> None:
    found = []
    inputs, targets = torch.randn(4, 5, 8), torch.randint(3, (4,))
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 3:] = mask[2, 4:] = True
    for attached in (False, True):
        model = Encoder(nested)
        part = {"model": model, "encoder": model.encoder, "layer": model.encoder.layers[0]}[root]
        if attached:
            probe = CurvatureProbe(part, "all")
        seed(3)
        F.cross_entropy(model(inputs, mask if padded else None), targets).backward()
        model.eval()
        if grad == "frozen":
            model.requires_grad_(False)
        context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(grad, torch.enable_grad)
        with context():
            output = model(inputs, mask if padded else None)
        found.append([output.clone(), [p.grad for p in model.parameters()]])
    assert same(*found)
    probe.detach()


@pytest.mark.filterwarnings("ignore")
def test_attention_in_evaluation() -> None:
    x = torch.randn(4, 5, 8)
    found = []
    for attached in (False, True):
        seed()
        model = Net(lambda m, x: m.attention(x, x, x, need_weights=False)[0], attention=nn.MultiheadAttention(8, 2))
        if attached:
            CurvatureProbe(model, "all")
        model(x).sum().backward()
        model.eval()
        with torch.no_grad():
            found.append(model(x))
    assert same(*found)


# ---- no trace


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["nothing", "step", "no backward", "forward fails", "backward fails", "two probes"])
def test_detach_leaves_no_trace(name: str, what: str) -> None:
    build, inputs_of = MODELS[name]
    model, inputs = build(), inputs_of()
    before, keys = traces(model), {key: sorted(vars(m)) for key, m in model.named_modules()}
    probe = CurvatureProbe(model, "all")
    other = CurvatureProbe(model) if what == "two probes" else None
    kept: list[Tensor] = []
    last = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))
    for _ in range(3):
        if what == "step":
            model(inputs).sum().backward()
        if what in ("no backward", "two probes"):
            kept.append(model(inputs))
        if what == "forward fails":
            handle = last.register_forward_hook(raises)
            with pytest.raises(KeyError):
                model(inputs)
            handle.remove()
        if what == "backward fails":
            handle = last.weight.register_hook(raises)
            with pytest.raises(KeyError):
                model(inputs).sum().backward()
            handle.remove()
    probe.detach()
    if other is not None:
        other.detach()
    assert traces(model) == before
    assert {key: sorted(vars(m)) for key, m in model.named_modules()} == keys
    for output in kept:
        output.sum().backward()
    assert traces(model) == before
    assert probe.num_samples in (0, 18, 6, 12)


def raises(*_: Any) -> None:
    raise KeyError("the user's")
