"""The floors of the house: an earlier floor never imports a later one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from hvmodel import errors

PACKAGE = Path(errors.__file__).parent

# Names on one line are one floor and may import each other.
FLOORS = (
    ("errors", "finalizer", "units", "value"),
    ("arch",),
    ("mmu", "mm", "vfs", "qom"),
    ("_native",),
    ("_ffi",),
    ("host",),
    ("kvm",),
    ("state",),
    ("ram",),
    ("report",),
    ("machine",),
    ("witness",),
    ("debug",),
    ("cli",),
)
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}
PURE = {name for names in FLOORS[:3] for name in names}

# What a pure model may not know: descriptors, foreign memory, clocks.
IMPURE = {"cffi", "_cffi_backend", "ctypes", "fcntl", "mmap", "select", "selectors", "signal", "socket", "time"}


def modules() -> list[Path]:
    # All but hvmodel/__init__.py, which shows every floor, and __main__.py, which is the cli.
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0][:2] != "__"]


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[int, str]]:
    # (line, absolute dotted name) of every import, those inside functions and under TYPE_CHECKING too.
    package = ["hvmodel", *path.relative_to(PACKAGE).parent.parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            # `from hvmodel import x` and `from .. import x` name a floor; elsewhere the module is enough.
            names = [[*base, alias.name] for alias in node.names] if base == ["hvmodel"] else [base]
            found += [(node.lineno, ".".join(parts)) for parts in names]
    return found


def test_every_module_is_on_a_floor() -> None:
    assert not {floor_of(path) for path in modules()} - HEIGHT.keys()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_floor_imports_a_later_one(path: Path) -> None:
    floor = floor_of(path)
    for line, name in imports(path):
        where = f"{path.relative_to(PACKAGE.parent)}:{line} imports {name}"
        parts = name.split(".")
        if parts[0] != "hvmodel":
            assert not (floor in PURE and parts[0] in IMPURE), where
            continue
        assert len(parts) > 1, f"{where}: the package itself is above every floor"
        if floor == "cli" and parts[1:] == ["__version__"]:
            continue  # a name of the package, not a floor
        assert parts[1] in HEIGHT, f"{where}: on no floor"
        assert HEIGHT[parts[1]] <= HEIGHT[floor], f"{where}: a later floor"


def test_the_walls_are_tight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The reader of imports sees each way to write one.
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "kvm").mkdir()
    module = tmp_path / "kvm" / "vm.py"
    module.write_text(
        "import hvmodel.machine\nfrom .. import cli\nfrom ..machine import Machine\nfrom . import exits\n"
        "def f():\n    from hvmodel import debug, state\n    from hvmodel.witness.btf import read\n"
    )
    assert sorted(name for _, name in imports(module)) == [
        "hvmodel.cli",
        "hvmodel.debug",
        "hvmodel.kvm",
        "hvmodel.machine",
        "hvmodel.machine",
        "hvmodel.state",
        "hvmodel.witness.btf",
    ]


def test_only_ffi_opens_the_extension() -> None:
    # Under TYPE_CHECKING the stub's classes may be named.
    for path in modules():
        if floor_of(path) == "_ffi":
            continue
        tree = ast.parse(path.read_text())
        typing_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in typing_only:
                names = {node.module or "", *(alias.name for alias in node.names)}
                assert not any(name.split(".")[-1] == "_native" for name in names), f"{path}:{node.lineno}"
