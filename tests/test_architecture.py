"""Data flows one way: no module imports one that is downstream of it."""

import ast
from pathlib import Path

import secorder

ROOT = Path(secorder.__file__).parent

#: From upstream to downstream; a module may import what stands before it.
ORDER = (
    "errors",
    "_torch.autocast", "_torch.compiler", "_torch.differentiability", "_torch.engine", "_torch.failures",
    "_torch.fsdp", "_torch.modules", "_torch.pytree", "_torch.random_state", "_torch.transforms", "_torch.versions",
    "_torch.saved_tensors", "_torch.vjp",
    "batch", "progress", "rules", "sharded", "testing",
    "layers", "capture", "loan", "zspace", "diagonals", "samples", "units", "fisher", "hessian", "spectrum", "stats",
    "tensorboard", "report", "distributed", "accumulation", "probe", "recorder", "diagnosis",
    "core.per_layer_curvature", "integrations.lightning", "integrations.huggingface", "__main__", "__init__",
)  # fmt: skip


def imports(path: Path) -> set[str]:
    """Modules of the package that a module imports, wherever in its text."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            base = parts[: len(parts) - node.level]
            found.add(".".join((*base, node.module)))
    return found


def test_nothing_imports_downstream() -> None:
    paths = [p for p in ROOT.rglob("*.py") if ("_alias" not in p.parts and p.parent == ROOT) or p.stem != "__init__"]
    names = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths if "_alias" not in p.parts}
    assert set(names.values()) == set(ORDER)
    for path, name in names.items():
        for other in imports(path):
            assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}, which is downstream of it"


def test_every_module_has_its_tests() -> None:
    """``secorder/a/b.py`` is tested in ``tests/a/test_b.py``; what holds for all of them has files beside these."""
    for name in ORDER:
        folder, _, last = name.rpartition(".")
        if last != "__init__":
            path = Path(__file__).parent / folder / f"test_{last.strip('_')}.py"
            assert "def test_" in path.read_text(), name


def test_writers_know_no_autograd_and_rules_no_hooks() -> None:
    for name in ("stats", "tensorboard", "report"):
        assert imports(ROOT / f"{name}.py") <= {"stats", "diagonals", "errors"}
        assert "autograd" not in (ROOT / f"{name}.py").read_text()
    assert "register_" not in (ROOT / "rules.py").read_text()


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
    found = {name: foreign_private_names(ROOT.joinpath(*name.split(".")).with_suffix(".py")) for name in ORDER}
    assert "_version" in found["_torch.versions"]
    for name, private in found.items():
        if name.startswith("_torch."):
            assert imports(ROOT.joinpath(*name.split(".")).with_suffix(".py")) <= {"errors"} | {
                other for other in ORDER if other.startswith("_torch.")
            }
        else:
            assert not private, f"{name} uses {private}: give it a function in secorder/_torch"
