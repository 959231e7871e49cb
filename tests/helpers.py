"""Small models and steps that many tests share."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import AttributionError, CurvatureWarning
from secorder._torch import onednn
from secorder._torch.graph import tells_recomputation
from secorder.layers.per_sample import Outer, PerSample
from secorder.layers.selection import select_layers
from secorder.oneshot.measurement import Measurement, measure

from .reference import fisher_by_sample

ROOT = Path(__file__).parent.parent

#: What :func:`run_after_torch` runs first: torch alone may load numpy, and do with random numbers what it likes.
AFTER_TORCH = """
import random, sys
import torch
def random_states():
    numpy = sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state()[1].tobytes()
    return random.getstate(), drawn, torch.get_rng_state().tolist()
before = random_states()
known = set(sys.modules)
"""


@contextmanager
def no_warnings() -> Iterator[None]:
    """The library warns of nothing inside; a filter that makes errors of warnings would not show it (see caution)."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
    if said := [str(one.message) for one in told if issubclass(one.category, CurvatureWarning)]:
        pytest.fail(f"warned: {said}")


class Fn(nn.Module):
    """A function as a module, for ``nn.Sequential``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


class Opaque(torch.autograd.Function):
    """A function that the graph does not tell of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Clamped(torch.autograd.Function):
    """A tanh whose backward is not linear: large gradients are clamped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.01, 0.01)


class Exponential(torch.autograd.Function):
    """A function of the user's own, that has saved a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(y := x.exp())
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        found: Tensor = g * ctx.saved_tensors[0]
        return found


class Doubled(torch.autograd.Function):
    """Another one, that has not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class Net(nn.Module):
    """Named parts and a function of them."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def by_onednn(patch: pytest.MonkeyPatch) -> None:
    """Let every product that oneDNN could make go by its nodes, in float64: around what PyTorch computes."""
    patch.setattr(onednn, "multiplied_by_onednn", lambda *_: True)
    patch.setattr(onednn, "product_by_onednn", lambda a, b, c=None: a @ b if c is None else torch.addmm(c, a, b))


def in_sight_of_modes(patch: pytest.MonkeyPatch) -> None:
    """Dispatch modes see what the probe does inside of a training step: else one that counts would count nothing."""
    for place in ("troubles", "backward"):
        patch.setattr(f"secorder.online.{place}.out_of_sight", lambda work, *arguments: work(*arguments))


#: Where PyTorch does not tell what a saved tensor is unpacked by, parameters are not measured by their operations: what
#: has no other way is refused, and the rest is run again.
refused_where_nothing_tells, run_again_where_nothing_tells = (
    pytest.mark.xfail(not tells_recomputation(), reason="saved tensors tell nothing", raises=error, strict=True)
    for error in (AttributionError, AssertionError)
)


class Shared(nn.Module):
    """A layer sees one row for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.shift = nn.Linear(4, 3), nn.Linear(2, 3)
        self.condition = nn.Parameter(torch.randn(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x)) * self.shift(self.condition)


class Twice(nn.Module):
    """A layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


def make(*middle: nn.Module) -> nn.Sequential:
    """A classifier, the same at every call: two layers with these modules between them, or with a tanh."""
    seed()
    return nn.Sequential(nn.Linear(4, 5), *(middle or [nn.Tanh()]), nn.Linear(5, 3))


def mlp() -> nn.Sequential:
    """A deeper classifier for the same data, the same at every call."""
    seed()
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def data(count: int = 6) -> tuple[Tensor, Tensor]:
    """A batch for them."""
    return torch.randn(count, 4), torch.randint(3, (count,))


def step(model: nn.Module, batch: tuple[Tensor, Tensor], scale: float = 1.0) -> None:
    """Forward and backward of one batch."""
    (F.cross_entropy(model(batch[0]), batch[1]) * scale).backward()


def reference(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Its empirical Fisher by brute force."""
    return fisher_by_sample(model, F.cross_entropy, *batch, len(batch[0]))


class Mixed(nn.Module):
    """A product with a matrix, of which the outputs are then mixed."""

    mix: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4))
        self.register_buffer("mix", torch.tensor([[1.0, 2.0], [-1.0, 3.0]]))

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = x @ self.weight.t() @ self.mix
        return mixed


def rule_of_mixed(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """Its rule, exact, of which no factor is a cotangent as it is."""
    assert isinstance(module, Mixed)
    return {"weight": Outer(inputs[0][:, None, None], (g @ module.mix.t())[:, None, None])}


def measured(
    work: Callable[[Measurement], Any],
    model: nn.Module,
    batch: tuple[Any, Any],
    loss_fn: Any = F.cross_entropy,
    **options: Any,
) -> Any:
    """What a piece of a one-shot measurement gives for all layers of an isolated model."""
    layers = select_layers(model, "all")
    return measure(work, model, layers, loss_fn, *batch, by_sample=True, **({"generator": seeded()} | options))


def by_layer(model: nn.Module, by_parameter: dict[str, Tensor], layer: str) -> list[Tensor]:
    """The flat parts of a layer, of something by parameter."""
    return [by_parameter[f"{layer}.{name}"].flatten() for name, _ in model.get_submodule(layer).named_parameters()]


def seed(value: int = 0) -> None:
    """As ``torch.manual_seed``, which writes down a stack trace for each accelerator that is not used yet."""
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


def seeded(value: int = 0) -> torch.Generator:
    """A generator of random numbers."""
    return torch.Generator().manual_seed(value)


class Recording:
    """A writer that remembers its calls: any object with the methods of SummaryWriter will do."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append((name, (args, kwargs)))


def run_ranks(case: str, ranks: int) -> None:
    """A case of :mod:`tests.distributed_worker` in real processes, all of which must agree with one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "tests.distributed_worker", case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stdout.count("agrees") == ranks


def run_after_torch(script: str) -> str:
    """What a script prints, in a process of its own that has imported torch."""
    command = [sys.executable, "-c", AFTER_TORCH + script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Taking:
    """A sink that remembers the numbers and texts that it got."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.texts: list[tuple[int, str, str]] = []

    def scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        self.points.append((step, dict(numbers)))

    def text(self, step: int, name: str, text: str) -> None:
        self.texts.append((step, name, text))


class Label(tuple):  # type: ignore[type-arg]
    """A tuple that stands for one thing, and tells no length, as irreps are in e3nn."""

    def __len__(self) -> int:
        raise NotImplementedError
