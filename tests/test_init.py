"""Importing the package: what it loads, what it leaves alone, and the names that it has."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import secorder

from .helpers import ROOT

#: Run in a process of its own; torch alone may load numpy, and may do with random numbers what it likes.
BEFORE = """
import random, sys
import torch
def random_states():
    numpy = sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state()[1].tobytes()
    return random.getstate(), drawn, torch.get_rng_state().tolist()
before = random_states()
known = set(sys.modules)
"""


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_that_shows_results_and_draws_no_random_number() -> None:
    loaded = run(
        "import secorder\n"
        "assert random_states() == before\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - known}))"
    )
    assert loaded.split() == ["secorder"]


def test_what_shows_results_draws_no_random_number_either() -> None:
    run(
        "import secorder, secorder.monitor.progress\n"
        "before = random_states()\n"
        "text = str(secorder.report({'a': torch.arange(3.0)}))\n"
        "with secorder.monitor.progress.progress_bar(True, 'HVPs', 3) as advance:\n"
        "    advance(3)\n"
        "assert 'rich' in sys.modules and 'tr F' in text\n"
        "assert random_states() == before"
    )


def test_every_public_name_is_there_also_before_it_is_used() -> None:
    missing = run("import secorder\nprint(*(set(secorder.__all__) - set(dir(secorder))))")
    assert not missing.split()
    for name in secorder.__all__:
        assert getattr(secorder, name).__module__.startswith("secorder.")
    assert secorder.report is secorder.report
    with pytest.raises(AttributeError, match="'secorder' has no attribute 'hessian'"):
        secorder.hessian  # noqa: B018


def test_the_version_is_that_of_the_distribution() -> None:
    assert secorder.__version__ == version("secorder")
