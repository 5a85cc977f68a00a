"""Imports go downward only, by the layers of the design; imports inside functions count, those for types do not."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cadapt

PACKAGE = Path(cadapt.__file__).parent
# lowest first; a part may import parts of lower layers, and of its own layer where the pair is not forbidden below
LAYERS = (
    ("errors", "version"),
    ("site", "plan", "preprocessing", "kinds"),
    ("files", "hashing", "known_checkpoints", "checkpoints", "thresholds", "tolerance"),
    ("meta", "seeding", "probe", "classifiers"),
    ("graph", "adapters", "head"),
    ("backbone",),
    ("planning", "making"),
    ("adapted", "surgery"),
    ("bundle",),
    ("frozen",),
    ("data", "train", "evaluation", "merging", "combining", "export", "costing", "analysis", "verify"),
    ("describe", "report"),
    ("library",),
    ("jobs",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FORBIDDEN = {
    ("graph", "adapters"),
    ("adapters", "graph"),
    ("graph", "head"),
    ("adapters", "head"),
    ("adapted", "surgery"),
}
PARTS = sorted({path.stem if path.suffix else path.name for path in PACKAGE.iterdir()} - {"__init__", "__main__", "py"})
PARTS = [name for name in PARTS if not name.startswith("_")]
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run: what stands under ``if TYPE_CHECKING`` does not."""
    yield node
    children = node.orelse if isinstance(node, ast.If) and for_types_only(node) else ast.iter_child_nodes(node)
    for child in children:
        yield from walk(child)


def imported_modules(source: str, package: str) -> set[str]:
    """The full names of the modules that a file of a package imports, wherever in the file."""
    found = set()
    for node in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (stem, node.module)))
            # "from cadapt import surgery" imports a module, too
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "cadapt" else {module}
    return found


def parts_imported(path: Path) -> set[str]:
    package = ".".join(("cadapt", *path.relative_to(PACKAGE).parts[:-1]))
    modules = imported_modules(path.read_text(encoding="utf-8"), package)
    return {name.split(".")[1] for name in modules if name.startswith("cadapt.")} & {*PARTS, *LEVEL}


@pytest.mark.parametrize("name", PARTS)
def test_every_part_has_a_layer(name: str) -> None:
    assert name in LEVEL, f"cadapt/{name} has no layer: say in tests/test_layers.py where in LAYERS it belongs"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path: Path) -> None:
    own = part_of(path)
    if own not in LEVEL:
        return  # the package's own front, which hands out names lazily
    for other in sorted(parts_imported(path) - {own}):
        assert other in LEVEL, f"cadapt/{other} has no layer: say in tests/test_layers.py where in LAYERS it belongs"
        assert LEVEL[other] <= LEVEL[own], f"{path.relative_to(PACKAGE)} ({own}) imports {other}, which is above it"
        assert (own, other) not in FORBIDDEN, f"{path.relative_to(PACKAGE)} imports {other}: the two must not meet"


def test_the_front_imports_no_torch() -> None:
    modules = imported_modules((PACKAGE / "__init__.py").read_text(encoding="utf-8"), "cadapt")
    assert not {name.split(".")[0] for name in modules} & {"torch", "timm"}


@pytest.mark.parametrize(
    "name", ["errors", "site", "plan", "preprocessing", "thresholds", "files", "known_checkpoints"]
)
def test_value_types_import_no_torch(name: str) -> None:
    path = PACKAGE / f"{name}.py"
    if not path.exists():
        pytest.fail(f"cadapt/{name}.py is gone: take it out here")
    modules = imported_modules(path.read_text(encoding="utf-8"), "cadapt")
    assert not {module.split(".")[0] for module in modules} & {"torch", "timm", "numpy"}


def test_a_method_is_one_file_that_knows_values_only() -> None:
    for path in (PACKAGE / "adapters").glob("*.py"):
        assert parts_imported(path) <= {"adapters", "errors", "site", "plan"}, path.name


def test_the_walk_sees_what_it_should() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import cadapt.cli\nelse:\n    import cadapt.plan\n"
        "def act():\n    from cadapt import surgery\n    from . import errors\n    from .graph import trace\n"
    )
    assert imported_modules(source, "cadapt") == {
        "typing",
        "cadapt.plan",
        "cadapt.surgery",
        "cadapt.errors",
        "cadapt.graph",
    }
