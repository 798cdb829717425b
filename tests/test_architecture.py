"""The rooms of docs/architecture.md: imports point down only, and importing mobilekit is cheap."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mobilekit

ROOT = Path(mobilekit.__file__).parent
LEVELS: dict[str, int] = {
    **dict.fromkeys(("types", "errors"), 0),
    **dict.fromkeys(("interfaces", "registry", "profiles", "stats", "files", "documents", "schemas"), 1),
    "significance": 1,
    **dict.fromkeys(("workload", "named_models", "exportable", "signature", "network", "sensitivity", "cost"), 2),
    **dict.fromkeys(("evaluate", "probes", "drift", "store", "manifest", "packing"), 2),
    **dict.fromkeys(("transforms", "runtimes", "training", "reports"), 3),
    **dict.fromkeys(("planner", "devices", "bench"), 4),
    "pipeline": 5,
    **dict.fromkeys(("cli", "__main__", "__init__", "workloads"), 6),
}
"""Bundled workloads are the user's side of the door: they may use anything, and nothing imports them."""
FORBIDDEN = {"utils", "util", "common", "helpers", "helper", "base", "manager", "engine", "misc"}
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Rooms that a file imports, inside functions and type checks too."""
    rooms = {p.name.removesuffix(".py") for p in ROOT.iterdir()}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "mobilekit":
                inside = rest.partition(".")[0]
                yield inside if inside in rooms else "__init__"


def test_every_room_has_a_level() -> None:
    assert {room(path) for path in FILES} <= set(LEVELS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = room(path)
    for other in imports(path):
        if other == own or (other == "__init__" and own != "__init__"):
            continue  # the package itself holds only its version and lazy names
        assert other != "workloads", f"{path} imports a bundled workload"
        assert LEVELS[other] <= LEVELS[own], f"{own} (level {LEVELS[own]}) imports {other} (level {LEVELS[other]})"
        assert not (LEVELS[own] == LEVELS[other] == 3), f"the siblings {own} and {other} know each other"


def test_no_vague_module_names() -> None:
    names = {path.stem for path in FILES} | {path.parent.name for path in FILES}
    assert not names & FORBIDDEN


def test_types_and_errors_import_nothing_of_ours() -> None:
    for path in (ROOT / "types").glob("*.py"):
        assert set(imports(path)) <= {"types"}
    assert not list(imports(ROOT / "errors.py"))


@pytest.mark.parametrize("statement", ["import mobilekit", "from mobilekit import Budget", "import mobilekit.cli"])
def test_importing_is_cheap(statement: str) -> None:
    code = f"import sys; {statement}; print(sorted({{'torch', 'numpy', 'onnx', 'tensorflow'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", mobilekit.__all__)
def test_public_names_resolve_and_say_what_they_are(name: str) -> None:
    value = getattr(mobilekit, name)
    assert value.__doc__
    assert value.__doc__.strip()
    if inspect.isfunction(value):
        assert ">>> " in value.__doc__, f"{name}() has no example"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mobilekit.nonsense


def test_all_names_are_listed() -> None:
    assert sorted(mobilekit.__all__) == mobilekit.__all__
