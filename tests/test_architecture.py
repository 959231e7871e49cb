"""The house stands: imports go down the packages, and what is private of PyTorch has one door."""

import ast
from pathlib import Path

import pytest

import secorder

ROOT = Path(secorder.__file__).parent

#: From the top of the house to its foundation: a package imports from itself and from what stands below it.
FLOORS = (
    ("__init__",), ("__main__", "integrations"), ("core",), ("probe",), ("online",), ("oneshot",), ("monitor",),
    ("results", "testing"), ("layers",), ("parallel", "batch"), ("_torch",), ("errors",),
)  # fmt: skip
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}
MODULES = sorted(p for p in ROOT.rglob("*.py") if "_alias" not in p.parts)


def name_of(path: Path) -> str:
    """The dotted name of a module in the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """Modules of the package that a module imports, wherever in its text."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level]
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join((*base, module)) for module in modules}
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down_the_packages_only(path: Path) -> None:
    here = name_of(path).split(".")[0]
    for other in imports(path):
        there = other.split(".")[0]
        assert here == there or FLOOR[here] < FLOOR[there], f"{name_of(path)} imports {other}, which is above it"


def test_writers_know_no_autograd_and_rules_no_hooks() -> None:
    for path in (ROOT / "monitor").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= {"monitor", "results", "errors"}
        assert "import autograd" not in path.read_text()
    for path in (ROOT / "layers").rglob("*.py"):
        assert "register_" not in path.read_text()


def foreign_private_names(path: Path) -> set[str]:
    """Private attributes that a module uses and does not define: those of other libraries."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    used |= {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("torch")
        for alias in node.names
    }
    own = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    return {name for name in used - own - {"_replace"} if name.startswith("_") and not name.endswith("__")}


def test_private_names_of_pytorch_are_behind_one_door() -> None:
    assert "_version" in foreign_private_names(ROOT / "_torch" / "versions.py")
    for path in MODULES:
        if path.parent.name != "_torch":
            private = foreign_private_names(path)
            assert not private, f"{name_of(path)} uses {private}: give it a function in secorder/_torch"
