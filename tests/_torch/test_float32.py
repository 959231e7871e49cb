"""What PyTorch's settings round float32 to, told in its older words and by operation; nothing is left changed."""

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secorder import CurvatureProbe
from secorder._torch.float32 import Operation, full_float32, products_as_convolutions, rounding_of_products

from ..helpers import data, mlp

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
OPERATIONS: tuple[Operation, ...] = ("product", "convolution", "recurrence")
BY_OPERATION = hasattr(torch.backends.cudnn, "conv")
PLACES = [("cudnn", "conv"), ("cudnn", "rnn"), ("cuda", "matmul"), *(("mkldnn", x) for x in ("conv", "rnn", "matmul"))]


def setting(library: str, operation: str) -> Any:
    return getattr(getattr(torch.backends, library), operation)


def told() -> list[Any]:
    """All settings; those of the older words may be refused."""
    found: list[Any] = [rounding_of_products(device, operation) for device in (CUDA, CPU) for operation in OPERATIONS]
    older: list[Callable[[], Any]] = [
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cudnn.allow_tf32,
        lambda: torch.backends.cuda.matmul.allow_tf32,
    ]
    for ask in older:
        try:
            found.append(ask())
        except RuntimeError:
            found.append("refused")
    return found


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    convolutions = torch.backends.cudnn.allow_tf32
    kept = [setting(*place).fp32_precision for place in PLACES * BY_OPERATION]
    yield
    for place, value in zip(PLACES * BY_OPERATION, kept, strict=True):
        setting(*place).fp32_precision = value
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = convolutions


SETTINGS: dict[str, Callable[[], Any]] = {
    "as they are": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "products": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "no convolutions": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "convolutions": lambda: setattr(torch.backends.cudnn, "allow_tf32", True),
}
if BY_OPERATION:
    SETTINGS |= {
        "convolutions, by operation": lambda: setattr(setting("cudnn", "conv"), "fp32_precision", "ieee"),
        "products, by operation": lambda: setattr(setting("cuda", "matmul"), "fp32_precision", "tf32"),
        "bfloat16, by operation": lambda: setattr(setting("mkldnn", "matmul"), "fp32_precision", "bf16"),
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_full_for_a_time(name: str) -> None:
    SETTINGS[name]()
    before = told()
    with full_float32():
        assert not any(rounding_of_products(device, x) for device in (CUDA, CPU) for x in OPERATIONS)
    assert told() == before
    with pytest.raises(ZeroDivisionError), full_float32():
        raise ZeroDivisionError
    assert told() == before


def test_what_a_setting_rounds_to() -> None:
    torch.backends.cudnn.allow_tf32 = True
    assert [rounding_of_products(CUDA, x) for x in OPERATIONS] == [0, 2**-11, 2**-11]
    torch.set_float32_matmul_precision("medium")
    assert rounding_of_products(CPU) == 2**-8  # on processors that are faster in bfloat16
    assert rounding_of_products(CUDA) > 0


@pytest.mark.parametrize("name", SETTINGS)
def test_one_shot_numbers_do_not_depend_on_them(name: str) -> None:
    SETTINGS[name]()
    before = told()
    seen: SimpleQueue[float] = SimpleQueue()  # of which nothing is put back after a pass

    class Model(nn.Sequential):
        def forward(self, x: Any) -> Any:
            seen.put(max(rounding_of_products(CUDA, operation) for operation in OPERATIONS))
            return super().forward(x)

    CurvatureProbe(Model(*mlp())).fisher_diagonal(F.cross_entropy, *data())
    assert seen.qsize()
    assert not any(seen.get() for _ in range(seen.qsize()))
    assert told() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="rounds on CUDA devices")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv2d(3, 64, 3), (16, 3, 16, 16)),
        (lambda: nn.ConvTranspose2d(3, 64, 3), (16, 3, 16, 16)),
        (lambda: nn.ConvTranspose3d(3, 8, 3), (4, 3, 8, 8, 8)),
    ],
)
def test_an_audit_knows_what_training_rounds(layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.backends.cudnn.allow_tf32 = True
    x, y = torch.randn(shape, device="cuda", dtype=torch.float32), torch.randint(3, shape[:1], device="cuda")
    model = nn.Sequential(layer(), nn.Flatten(), nn.LazyLinear(3)).float().cuda()
    model(x)
    with CurvatureProbe(model, layer_types="all") as probe:
        for _ in range(6):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
        assert probe.fisher_diagonal()


@pytest.mark.parametrize("name", SETTINGS)
def test_products_as_convolutions(name: str) -> None:
    SETTINGS[name]()
    before, allowed = told(), rounding_of_products(CUDA, "convolution")
    with products_as_convolutions(CUDA):
        assert rounding_of_products(CUDA) >= allowed
    assert told() == before
