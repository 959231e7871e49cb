"""Sphinx configuration: ``python -m sphinx -W -b html docs docs/_build``."""

import socket

import secorder

project = "secorder"
author = "the secorder maintainers"
copyright = "2026, the secorder maintainers"
release = version = secorder.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "secorder"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = True
intersphinx_timeout = 5


def reachable(host: str) -> bool:
    """Whether a host can be asked: where the network is closed, links to PyTorch's documentation are left out."""
    try:
        socket.create_connection((host, 443), timeout=intersphinx_timeout).close()
    except OSError:
        return False
    return True


PYTORCH = "docs.pytorch.org"
intersphinx_mapping = {"torch": (f"https://{PYTORCH}/docs/stable", None)} if reachable(PYTORCH) else {}
