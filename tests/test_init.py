"""Importing the package: what it loads, what it leaves alone, and the names that it has."""

from importlib.metadata import version

import pytest

import secorder

from .helpers import run_after_torch


def test_import_loads_nothing_that_shows_results_and_draws_no_random_number() -> None:
    loaded = run_after_torch(
        "import secorder\n"
        "assert random_states() == before\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - known}))"
    )
    assert loaded.split() == ["secorder"]


def test_every_public_name_is_there_also_before_it_is_used() -> None:
    missing = run_after_torch("import secorder\nprint(*(set(secorder.__all__) - set(dir(secorder))))")
    assert not missing.split()
    for name in secorder.__all__:
        assert getattr(secorder, name).__module__.startswith("secorder.")
    assert secorder.report is secorder.report
    with pytest.raises(AttributeError, match="'secorder' has no attribute 'hessian'"):
        secorder.hessian  # noqa: B018


def test_the_version_is_that_of_the_distribution() -> None:
    assert secorder.__version__ == version("secorder")
