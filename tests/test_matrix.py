"""Every case × (Hessian, one-shot Fisher, passive Fisher): exact to 1e-9 of brute force, or a named error.

``python -m tests.test_matrix`` prints the counts.
"""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder import CurvatureProbe, CurvatureWarning
from secorder._torch.pytree import call_model, map_tensors

from .cases import CASES, Case
from .reference import assert_all_close, fisher_by_sample, fisher_by_slices, hessian_by_element, relative_error

MEASUREMENTS = ("hessian", "fisher", "passive")


def measure(what: str, case: Case, batch: tuple[Any, ...]) -> dict[str, Tensor]:
    model, loss_fn, inputs, targets = batch
    layer_types = None if "layers" in case.options else "all"
    with warnings.catch_warnings(), CurvatureProbe(model, **{"layer_types": layer_types, **case.options}) as probe:
        warnings.simplefilter("ignore", CurvatureWarning)  # of layers that are measured the slow way
        if what == "hessian":
            return probe.hessian_diagonal(loss_fn, inputs, targets).by_parameter()
        if what == "fisher":
            return probe.fisher_diagonal(loss_fn, inputs, targets).by_parameter()
        loss_fn(call_model(model, inputs), targets).backward()
        return probe.fisher_diagonal().by_parameter()


def expected(what: str, case: Case, batch: tuple[Any, ...]) -> dict[str, Tensor]:
    if what == "hessian":
        return hessian_by_element(*batch)
    if case.by_slices:
        return fisher_by_slices(*batch, case.count)
    return fisher_by_sample(*batch, case.count, dim=case.options.get("sample_dim", 0))


def check(what: str, case: Case, tolerance: float = 1e-9) -> str:
    """``"exact"`` or ``"refused"``; anything else is an assertion that fails."""
    torch.manual_seed(0)
    batch = case.make()
    torch.manual_seed(1)
    if what in case.refused:
        with pytest.raises(case.refused[what]):
            measure(what, case, batch)
        return "refused"
    torch.manual_seed(1)
    reference = expected(what, case, batch)
    torch.manual_seed(1)
    assert_all_close(measure(what, case, batch), reference, tolerance)
    return "exact"


PAIRS = [(what, case) for case in CASES for what in MEASUREMENTS if what not in case.skip]


@pytest.mark.parametrize(("what", "case"), PAIRS, ids=[f"{case.name}-{what}" for what, case in PAIRS])
def test_exact_or_refused(what: str, case: Case) -> None:
    check(what, case)


def rounded_batch(case: Case) -> tuple[Any, ...]:
    """A case whose parameters, buffers and data are float32 numbers held in float64."""
    model, loss_fn, inputs, targets = case.make()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.float())
    return model, loss_fn, *map_tensors(lambda t: t.float().double() if t.is_floating_point() else t, (inputs, targets))


def to_float32(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    model, loss_fn, inputs, targets = batch
    if isinstance(loss_fn, nn.Module):
        loss_fn.float()
    return model.float(), loss_fn, *map_tensors(lambda t: t.float() if t.is_floating_point() else t, (inputs, targets))


#: Cases that cannot be turned into float32 after they were built, or whose numbers mean nothing in it (no variance).
DOUBLE_ONLY = {"graph/loss_differentiates_the_model", "samples/all_alike"}
SINGLE = [(what, case) for what, case in PAIRS if what not in case.refused and case.name not in DOUBLE_ONLY]


def in_single(what: str, case: Case) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    """A case in float32, and brute force on the same numbers in float64."""
    torch.manual_seed(0)
    batch = rounded_batch(case)
    torch.manual_seed(1)
    reference = expected(what, case, batch)
    torch.set_default_dtype(torch.float32)
    batch = to_float32(batch)
    torch.manual_seed(1)
    return batch, reference


@pytest.mark.parametrize(("what", "case"), SINGLE, ids=[f"{case.name}-{what}" for what, case in SINGLE])
def test_float32(what: str, case: Case) -> None:
    batch, reference = in_single(what, case)
    found = measure(what, case, batch)
    assert {d.dtype for d in found.values()} == {torch.float32}
    tolerance = 1e-4
    if case.ill_conditioned:  # brute force itself is no closer in float32
        by_element = expected(what, case, batch)
        tolerance = max(relative_error(by_element[name], reference[name]) for name in found)
        assert tolerance > 1e-4
    assert_all_close(found, reference, tolerance)


FISHER = [(what, case) for what, case in SINGLE if what != "hessian"]


@pytest.mark.parametrize(("what", "case"), FISHER, ids=[f"{case.name}-{what}" for what, case in FISHER])
def test_fisher_under_bfloat16_autocast(what: str, case: Case) -> None:
    """Within 2e-2 of brute force under the same autocast, or nearer to float64 than that brute force is."""
    batch, exact = in_single(what, case)
    with torch.autocast("cpu", torch.bfloat16):
        reference = expected(what, case, batch)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = measure(what, case, batch)
    assert found
    for name, diagonal in found.items():
        assert diagonal.dtype == torch.float32
        if relative_error(diagonal, reference[name]) > 2e-2:
            assert relative_error(diagonal, exact[name]) < relative_error(reference[name], exact[name])


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
            if what in case.skip:
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
