"""The precision of float32 under PyTorch's settings: TF32 on tensor cores, bfloat16 on some processors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch

from .surroundings import assigned

#: A product of matrices, a convolution, or a recurrent layer.
Operation = Literal["product", "convolution", "recurrence"]

#: Half the distance of neighbours near one, in the settings' words and in the older ones for matrix products.
_ROUNDED = {"tf32": 2.0**-11, "bf16": 2.0**-8, "high": 2.0**-11, "medium": 2.0**-8}

#: The settings by what is computed, since PyTorch 2.9: device, ``torch.backends.<library>.<operation>``.
_SETTINGS: dict[tuple[str, Operation], tuple[str, str]] = {
    ("cuda", "product"): ("cuda", "matmul"),
    ("cuda", "convolution"): ("cudnn", "conv"),
    ("cuda", "recurrence"): ("cudnn", "rnn"),
    ("cpu", "product"): ("mkldnn", "matmul"),
    ("cpu", "convolution"): ("mkldnn", "conv"),
    ("cpu", "recurrence"): ("mkldnn", "rnn"),
}
_BY_OPERATION = hasattr(torch.backends.cudnn, "conv")
_precision: Any = getattr(torch._C, "_get_fp32_precision_getter", None)

#: What the older words are for float32 proper.
_FULL = ("highest", False)


def rounding_of_products(device: torch.device, operation: Operation = "product") -> float:
    """The relative error that a setting allows in factors of float32; zero where they are taken as they are."""
    if _BY_OPERATION:
        library, name = _SETTINGS.get((device.type, operation), ("", ""))
        # What the settings' attributes are, which Python looks for in two other places first.
        return _ROUNDED.get(_precision("cuda" if library == "cudnn" else library, name), 0.0) if library else 0.0
    if device.type == "cuda" and operation != "product":
        return _ROUNDED["tf32"] if torch.backends.cudnn.allow_tf32 else 0.0
    precision = torch.get_float32_matmul_precision()
    return _ROUNDED.get(precision, 0.0)


@contextmanager
def full_float32() -> Iterator[None]:
    """Products, convolutions and recurrent layers in float32 proper, whatever the settings; these are put back."""
    kept = [(setting, setting.fp32_precision) for setting in map(_setting, _SETTINGS.values())] if _BY_OPERATION else []
    older = _in_older_words()
    try:
        if older is None:
            _set_by_operation([(setting, "ieee") for setting, value in kept if value in _ROUNDED])
        else:
            _set_in_older_words(older, _FULL)
        yield
    finally:
        if older is not None:
            _set_in_older_words(_FULL, older)
        _set_by_operation(kept)  # an older word stands for several


def _in_older_words() -> tuple[str, bool] | None:
    """The settings for products and convolutions as they were called before PyTorch 2.9.

    None where they were made by operation: PyTorch refuses to tell them in the older words then.
    """
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _set_in_older_words(before: tuple[str, bool], after: tuple[str, bool]) -> None:
    if before[0] != after[0]:
        torch.set_float32_matmul_precision(after[0])
    if before[1] != after[1]:
        torch.backends.cudnn.allow_tf32 = after[1]


def _set_by_operation(settings: Sequence[tuple[Any, str]]) -> None:
    for setting, value in settings:
        if setting.fp32_precision != value:
            setting.fp32_precision = value


@contextmanager
def products_as_convolutions(device: torch.device) -> Iterator[None]:
    """Matrix products in TF32 on a device whose convolutions are: the precision of training's own weight gradient."""
    if device.type != "cuda" or not rounding_of_products(device, "convolution") or rounding_of_products(device):
        yield
        return
    tf32: dict[str, Any] = {"fp32_precision": "tf32"} if _BY_OPERATION else {"allow_tf32": True}
    with assigned([torch.backends.cuda.matmul], **tf32):
        yield


@cache
def _setting(place: tuple[str, str]) -> Any:
    library, operation = place
    return getattr(getattr(torch.backends, library), operation)
