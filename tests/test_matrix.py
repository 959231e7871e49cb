"""Every case × (Hessian, one-shot Fisher, passive Fisher): exact to 1e-9 of brute force, or a named error.

``python -m tests.test_matrix`` prints the counts.
"""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from secorder import CurvatureProbe, CurvatureWarning
from secorder.trees import call_model

from .cases import CASES, Case
from .reference import assert_all_close, fisher_by_sample, fisher_by_slices, hessian_by_element

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
