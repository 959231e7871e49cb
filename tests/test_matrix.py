"""Every case × (Hessian, one-shot Fisher, online Fisher): exact to 1e-9 of brute force, or a named error.

``python -m tests.test_matrix`` prints the counts.
"""

import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder import CurvatureProbe, CurvatureWarning
from secorder._torch.pytree import call_model, map_tensors
from secorder.layers.selection import select_layers

from .cases import CASES, Case
from .helpers import ROOT, seed
from .reference import (
    assert_all_close,
    fisher_of,
    gradients_by_sample,
    gradients_by_slices,
    hessian_by_element,
    norms_of_layers,
    relative_error,
)

#: What is measured, and the brute force that it is held against.
MEASUREMENTS = {"hessian": "hessian", "fisher": "fisher", "online": "fisher", "norms": "norms"}

#: What a case says of the online Fisher it says of its trace and of gradient noise.
SAID_OF = {"norms": "online"}


def measure(what: str, case: Case, batch: tuple[Any, ...]) -> dict[str, Tensor]:
    model, loss_fn, inputs, targets = batch
    layer_types = None if "layers" in case.options else "all"
    with (
        warnings.catch_warnings(),
        CurvatureProbe(model, **{"layer_types": layer_types, "frozen": True, **case.options}) as probe,
    ):
        warnings.simplefilter("ignore", CurvatureWarning)  # of layers that are measured without a rule
        if what == "hessian":  # "auto" would estimate it where the machine is so busy that it seems to take long
            return probe.hessian_diagonal(loss_fn, inputs, targets, method="exact").by_parameter()
        if what == "fisher":
            return probe.fisher_diagonal(loss_fn, inputs, targets).by_parameter()
        if what == "norms":
            return told_by_norms(case, batch, layer_types)
        loss_fn(call_model(model, inputs), targets).backward()
        return probe.fisher_diagonal().by_parameter()


def told_by_norms(case: Case, batch: tuple[Any, ...], layer_types: Any) -> dict[str, Tensor]:
    """As :func:`~tests.reference.norms_of_layers`: by a probe of norms alone, and by one that has the diagonal too."""
    model, loss_fn, inputs, targets = batch
    options = {"layer_types": layer_types, **case.options}
    with CurvatureProbe(model, accumulate="trace", **options) as alone, CurvatureProbe(model, **options) as both:
        loss_fn(call_model(model, inputs), targets).backward()
        found: list[dict[str, Tensor]] = []
        for probe in (alone, both):
            traces = probe.fisher_trace()
            values = {f"{name}: trace": [x.value**2, x.standard_error**2] for name, x in traces.items()}
            assert {x.num_samples for x in traces.values()} == {case.count}
            if case.count > 1:
                noise = probe.gradient_noise_scale()
                values |= {f"{name}: noise": [x.squared_norm, x.variance] for name, x in noise.items()}
            found.append({name: torch.tensor(numbers) for name, numbers in values.items()})
        assert_all_close(*found)
    return found[0]


def parameters_of(case: Case) -> dict[str, list[str]]:
    """The parameters' names of each layer that is measured."""
    model = build(case)[0]
    layers = select_layers(model, case.options.get("layer_types", "all"), case.options.get("layers"))
    return {x.name: [x.parameter_name(name) for name in x.parameters] for x in layers}


def build(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """The case's batch, the same at every call, and the random state from which each measurement of it starts."""
    seed(0)
    with default_dtype(torch.float64):
        batch = case.make()
    if dtype == torch.float32:
        batch = to_float32(batch)
    seed(1)
    return batch


def to_float32(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    model, loss_fn, inputs, targets = batch
    if isinstance(loss_fn, nn.Module):
        loss_fn.float()
    return model.float(), loss_fn, *map_tensors(lambda t: t.float() if t.is_floating_point() else t, (inputs, targets))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@cache
def brute_force(
    case: Case, quantity: str, dtype: torch.dtype = torch.float64, autocast: bool = False
) -> dict[str, Tensor]:
    """The Hessian or the Fisher of a batch that is built here, so that the arguments say which numbers it is of."""
    batch = build(case, dtype)
    with default_dtype(dtype), torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=autocast):
        if quantity == "hessian":
            with torch.backends.cudnn.flags(enabled=False):  # whose recurrent layers have no second derivative
                return hessian_by_element(*batch)
        if case.by_slices:
            gradients = gradients_by_slices(*batch, case.count)
        else:
            gradients = gradients_by_sample(*batch, case.count, dim=case.options.get("sample_dim", 0))
        return fisher_of(gradients) if quantity == "fisher" else norms_of_layers(gradients, parameters_of(case))


def check(what: str, case: Case, tolerance: float = 1e-9) -> str:
    """``"exact"`` or ``"refused"``; anything else is an assertion that fails."""
    said = SAID_OF.get(what, what)
    if said in case.refused:
        batch = build(case)
        with pytest.raises(case.refused[said]):
            measure(what, case, batch)
        return "refused"
    reference = brute_force(case, MEASUREMENTS[what])
    assert_all_close(measure(what, case, build(case)), reference, tolerance)
    return "exact"


PAIRS = [(what, case) for case in CASES for what in MEASUREMENTS if SAID_OF.get(what, what) not in case.skip]


def require_same_draws(what: str, case: Case) -> None:
    """Skip what draws other random numbers than brute force: an LSTM's dropout, in and without cuDNN."""
    if case.name == "graph/dropout_in_lstm" and what == "fisher" and torch.get_default_device().type == "cuda":
        pytest.skip("one-shot measurements run recurrent layers without cuDNN, which draws other masks")


@pytest.mark.parametrize(("what", "case"), PAIRS, ids=[f"{case.name}-{what}" for what, case in PAIRS])
def test_exact_or_refused(what: str, case: Case) -> None:
    require_same_draws(what, case)
    check(what, case)


#: Cases that cannot be turned into float32 after they were built, or whose numbers mean nothing in it (no variance).
DOUBLE_ONLY = {"graph/loss_differentiates_the_model", "samples/all_alike"}
SINGLE = [
    (what, case)
    for what, case in PAIRS
    if what != "norms" and what not in case.refused and case.name not in DOUBLE_ONLY
]


@pytest.mark.parametrize(("what", "case"), SINGLE, ids=[f"{case.name}-{what}" for what, case in SINGLE])
def test_float32(what: str, case: Case) -> None:
    require_same_draws(what, case)
    same_draws = not case.by_slices or torch.get_default_device().type == "cpu"  # else others in each dtype
    reference = brute_force(case, MEASUREMENTS[what], torch.float64 if same_draws else torch.float32)
    with default_dtype(torch.float32):
        found = measure(what, case, build(case, torch.float32))
    assert {d.dtype for d in found.values()} == {torch.float32}
    tolerance = 1e-4
    if case.ill_conditioned:  # brute force itself is no closer in float32
        by_element = brute_force(case, MEASUREMENTS[what], torch.float32)
        tolerance = max(relative_error(by_element[name], reference[name]) for name in found)
        assert tolerance > 1e-4
    assert_all_close(found, reference, tolerance)


#: What torch's own nn.LSTM raises in bfloat16 on a processor without AVX-512.
NO_BFLOAT16_LSTM = "could not create a primitive descriptor for the LSTM forward propagation primitive"

#: What torch's own nn.AdaptiveLogSoftmaxWithLoss raises under autocast on CUDA.
NO_BFLOAT16_ADAPTIVE = "index_copy_(): self and source expected to have the same dtype"


def brute_force_or_skip(case: Case, quantity: str) -> dict[str, Tensor]:
    """Brute force under autocast; where torch itself cannot run the model so on this machine, the test is skipped."""
    try:
        return brute_force(case, quantity, torch.float32, autocast=True)
    except RuntimeError as error:
        adaptive = torch.get_default_device().type == "cuda" and NO_BFLOAT16_ADAPTIVE in str(error)
        if NO_BFLOAT16_LSTM not in str(error) and not adaptive:
            raise
        pytest.skip(f"torch's own module has no bfloat16 on this processor: {error}")


FISHER = [(what, case) for what, case in SINGLE if what != "hessian"]


@pytest.mark.parametrize(("what", "case"), FISHER, ids=[f"{case.name}-{what}" for what, case in FISHER])
def test_fisher_under_bfloat16_autocast(what: str, case: Case) -> None:
    """Within 2e-2 of brute force under the same autocast, or nearer to float64 than that brute force is."""
    require_same_draws(what, case)
    exact = brute_force(case, MEASUREMENTS[what])
    reference = brute_force_or_skip(case, MEASUREMENTS[what])
    batch = build(case, torch.float32)
    with default_dtype(torch.float32), torch.autocast(torch.get_default_device().type, torch.bfloat16):
        found = measure(what, case, batch)
    assert found
    for name, diagonal in found.items():
        assert diagonal.dtype == torch.float32
        if relative_error(diagonal, reference[name]) > 2e-2:
            assert relative_error(diagonal, exact[name]) < relative_error(reference[name], exact[name])


@pytest.mark.parametrize(
    ("message", "outcome"),
    [
        (f"{NO_BFLOAT16_LSTM}. Run workload with environment variable ONEDNN_VERBOSE=all.", pytest.skip.Exception),
        ("could not create a primitive descriptor for the convolution forward propagation primitive", RuntimeError),
        ("mat1 and mat2 must have the same dtype, but got BFloat16 and Float", RuntimeError),
    ],
    ids=["lstm", "convolution", "dtypes"],
)
def test_only_torch_without_a_bfloat16_lstm_skips(
    message: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*args: Any) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr(nn.LSTM, "forward", forward)
    case = replace(next(case for case in CASES if case.name == "generic/lstm"))  # a copy, of which nothing is cached
    with pytest.raises(outcome, match=re.escape(message)):
        brute_force_or_skip(case, "fisher")
    with pytest.raises(RuntimeError, match=re.escape(message)):  # of float64, where nothing is missing
        brute_force(case, "fisher")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="oneDNN's instruction sets of x86 are chosen")
def test_lstm_cases_skip_without_avx512() -> None:
    """The real thing: oneDNN is told to use nothing above AVX2."""
    command = [sys.executable, "-m", "pytest", "tests/test_matrix.py", "-k", "bfloat16_autocast and lstm", "-rs"]
    command += ["-n", "0"]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout
    assert "10 skipped" in done.stdout, done.stdout
    assert done.stdout.count(NO_BFLOAT16_LSTM) >= 1


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 100
    assert len({case.name for case in CASES}) == len(CASES)


def main() -> None:
    """Print how many are exact, refused, and wrong."""
    torch.set_default_dtype(torch.float64)
    print(f"{len(CASES)} cases")
    for what in MEASUREMENTS:
        counts = {"exact": 0, "refused": 0, "wrong": 0, "not comparable": 0}
        for case in CASES:
            if SAID_OF.get(what, what) in case.skip:
                counts["not comparable"] += 1
                continue
            try:
                counts[check(what, case)] += 1
            except Exception as error:
                counts["wrong"] += 1
                print(f"  {case.name}: {type(error).__name__}: {error}")
        print(f"{what:8}", ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
