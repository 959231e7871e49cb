"""The examples in docstrings run."""

import doctest
import importlib
import pkgutil
import re

import pytest

import secorder

MODULES = [m.name for m in pkgutil.walk_packages(secorder.__path__, "secorder.") if "_alias" not in m.name]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_public_objects_are_documented_with_an_example() -> None:
    for name in secorder.__all__:
        assert getattr(secorder, name).__doc__, name
    for name in ("CurvatureProbe", "Diagonals", "per_layer_hessian_diagonal", "per_layer_fisher_diagonal"):
        assert ">>>" in getattr(secorder, name).__doc__, name


def test_properties_are_told_in_a_sentence_without_a_colon() -> None:
    """The page would have what is before it for a type."""
    public = [secorder.CurvatureProbe, secorder.CurvatureRecorder, secorder.Diagonals, secorder.Cost, secorder.Window]
    members = [member for kind in public for member in vars(kind).items()]
    properties = [p for name, p in members if isinstance(p, property) and not name.startswith("_")]
    assert properties
    for p in properties:
        text = re.sub(r":\w+:`", "`", (p.__doc__ or "").split("\n")[0])  # references
        assert ":" not in text, p.__doc__
