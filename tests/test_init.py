"""Importing the package: what it loads, what it leaves alone, and the names that it has."""

from importlib.metadata import version

import pytest

import secorder

from .helpers import run_after_torch


def test_import_loads_nothing_that_shows_results_and_draws_no_random_number() -> None:
    """Nor does a probe draw any, and every public name is there before it is used."""
    loaded = run_after_torch(
        "import secorder\n"
        "assert random_states() == before\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - known}))\n"
        "assert set(secorder.__all__) == {name for name in dir(secorder) if not name.startswith('__')}\n"
        "model = torch.nn.Linear(2, 2)\n"
        "before = random_states()\n"
        "secorder.CurvatureProbe(model)\n"
        "assert random_states() == before"
    )
    assert loaded.split() == ["secorder"]


def test_every_public_name_is_told_where_it_comes_from() -> None:
    for name in secorder.__all__:
        assert getattr(secorder, name).__module__.startswith("secorder.")
    with pytest.raises(AttributeError, match="'secorder' has no attribute 'hessian'"):
        secorder.hessian  # noqa: B018


def test_the_version_is_that_of_the_distribution() -> None:
    assert secorder.__version__ == version("secorder")
