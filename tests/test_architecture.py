"""The house stands: imports go down the packages, and what is private of PyTorch has one door."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import secorder

ROOT = Path(secorder.__file__).parent

#: From the top of the house to its foundation: a package imports from itself and from what stands below it.
FLOORS = (
    ("__init__",), ("__main__", "integrations"), ("core",), ("probe",), ("online",), ("oneshot",), ("monitor",),
    ("means",), ("results", "testing"), ("layers",), ("parallel", "batch"), ("owners",), ("_torch",),
    ("_arguments", "_caution", "_keywords", "_sharing"), ("errors",),
)  # fmt: skip
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}
MODULES = sorted(p for p in ROOT.rglob("*.py") if "_alias" not in p.parts)

TESTS = Path(__file__).parent

#: What is longer than it should be, and why: files by the module's name, classes and functions by theirs in it.
LONG = {
    "probe": "the facade, whose methods are documented in full",
    "probe.CurvatureProbe": "the same",
    "probe.__init__": "the same",
}


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


def imported(path: Path) -> set[str]:
    """Modules of the package that a module imports when it runs: what only its annotations name is left out."""
    tree = ast.parse(path.read_text())
    named = [node for block in ast.walk(tree) if isinstance(block, ast.If) for node in ast.walk(block)]
    inside, parts = set(map(id, named)), path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in inside:
            base = [*parts[: len(parts) - node.level], *(node.module or "").split(".")]
            found |= {".".join(filter(None, base)), *(".".join(filter(None, [*base, x.name])) for x in node.names)}
    return found


def test_no_module_imports_itself_by_way_of_others() -> None:
    order = TopologicalSorter({name_of(path): imported(path) for path in MODULES if path.name != "__init__.py"})
    order.prepare()  # raises CycleError


def test_writers_know_no_autograd_and_rules_no_hooks() -> None:
    below = {"monitor", "results", "_arguments", "_caution", "_keywords", "_sharing", "errors"}
    of_ranks = {"_torch.fsdp", "_torch.collectives"}  # parts of a tensor, and what they are together
    for path in (ROOT / "monitor").rglob("*.py"):
        assert {name.split(".")[0] for name in imports(path) - of_ranks} <= below
        assert "import autograd" not in path.read_text()
    for path in (ROOT / "layers").rglob("*.py"):
        assert "register_" not in path.read_text()


def lines_of_code(node: ast.ClassDef | ast.FunctionDef) -> int:
    """Lines of a class or function without its docstrings."""
    texts = [
        part
        for part in ast.walk(node)
        if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and isinstance(part.value.value, str)
    ]
    whole, *parts = (part.end_lineno - part.lineno + 1 for part in [node, *texts])
    return whole - sum(parts)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_is_long_without_a_reason(path: Path) -> None:
    """Files of 400 lines; of code, classes of 250 and functions of 60."""
    name, text = name_of(path), path.read_text()
    long = {name} if text.count("\n") > 400 else set()
    for node in ast.walk(ast.parse(text)):
        limit = {ast.ClassDef: 250, ast.FunctionDef: 60}.get(type(node))
        if limit and lines_of_code(node) > limit:
            long.add(f"{name}.{node.name}")
    assert long == {part for part in LONG if part == name or part.startswith(f"{name}.")}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_tests_mirror_the_package(path: Path) -> None:
    here = path.relative_to(ROOT)
    package_itself = here.name == "__init__.py" and len(here.parts) > 1  # which tells what is in it, and no more
    if not package_itself:
        place = here.with_name(f"test_{here.stem.strip('_')}.py")
        assert (TESTS / place).exists(), f"{name_of(path)} has no tests in tests/{place}"


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
