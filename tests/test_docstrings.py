"""The examples in docstrings run."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import secorder

DOCS = Path(__file__).parent.parent / "docs"

MODULES = [m.name for m in pkgutil.walk_packages(secorder.__path__, "secorder.") if "_alias" not in m.name]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_public_objects_are_documented() -> None:
    for name in secorder.__all__:
        assert getattr(secorder, name).__doc__, name


def test_functions_of_the_reference_have_an_example() -> None:
    """But for those that carry out what a method's example shows."""
    pages = [DOCS / "api.rst", DOCS / "per_layer_curvature.rst"]
    named = [name for page in pages for name in re.findall(r"autofunction:: (\S+)", page.read_text())]
    assert len(named) > 15
    for name in named:
        place, _, function = (name if "." in name else f"secorder.core.per_layer_curvature.{name}").rpartition(".")
        text = getattr(importlib.import_module(place), function).__doc__
        assert ">>>" in text or "which this function carries out" in text, name


def test_properties_are_told_in_a_sentence_without_a_colon() -> None:
    """The page would have what is before it for a type."""
    public = [secorder.CurvatureProbe, secorder.CurvatureRecorder, secorder.Diagonals, secorder.Cost, secorder.Window]
    members = [member for kind in public for member in vars(kind).items()]
    properties = [p for name, p in members if isinstance(p, property) and not name.startswith("_")]
    assert properties
    for p in properties:
        text = re.sub(r":\w+:`", "`", (p.__doc__ or "").split("\n")[0])  # references
        assert ":" not in text, p.__doc__
