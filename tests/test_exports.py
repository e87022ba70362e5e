"""What the modules show: __all__ is right, the public is documented, importing is cheap."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cffi
import pytest

import hvmodel
from hvmodel import errors

PACKAGE = Path(errors.__file__).parent


def public_modules() -> list[str]:
    # Dotted names of all modules no part of which begins with an underscore.
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if not any(part.startswith("_") for part in parts):
            names.append(".".join(parts))
    return names


def load(name: str) -> ModuleType:
    # What needs a package that is not there is not judged here.
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "hvmodel":
            raise
        pytest.skip(f"needs {error.name}")


def typing_names(module: ModuleType) -> set[str]:
    # Imported under TYPE_CHECKING, and so perhaps replaced by a stand-in at run time.
    return {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(inspect.getsource(module) or "pass"))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in node.body
        if isinstance(inner, ast.Import | ast.ImportFrom)
        for alias in inner.names
    }


@pytest.mark.parametrize("name", [*public_modules(), "hvmodel._ffi"])
def test_all_is_what_the_module_defines(name: str) -> None:
    module = load(name)
    exported = module.__all__
    assert len(set(exported)) == len(exported), "a name is repeated"
    for item in exported:
        assert hasattr(module, item), f"{item} is in __all__ but not there"
    defined = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == name
    }
    assert not defined - set(exported) - typing_names(module), "public, but not in __all__"


@pytest.mark.parametrize("name", [*public_modules(), "hvmodel._ffi"])
def test_the_public_is_documented(name: str) -> None:
    module = load(name)
    assert (module.__doc__ or "").strip()
    bare = []
    for key in module.__all__:
        value = getattr(module, key)
        if getattr(value, "__module__", None) != name or not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        if not (value.__doc__ or "").strip():
            bare.append(key)
        if inspect.isclass(value):
            for member, item in vars(value).items():
                function = item.__func__ if isinstance(item, staticmethod | classmethod) else item
                is_method = inspect.isfunction(function) or isinstance(function, property)
                if is_method and not member.startswith("_") and not inspect.getdoc(getattr(value, member)):
                    bare.append(f"{key}.{member}")
    assert not bare


def test_the_stub_of_the_package_has_its_names() -> None:
    stub = PACKAGE / "__init__.pyi"
    names: set[str] = set()
    for node in ast.parse(stub.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    assert set(hvmodel.__all__) <= names
    assert set(hvmodel.__all__) <= set(dir(hvmodel))


# typing costs 5 ms, dataclasses 11, enum comes with re and is allowed; the others are for those who use them.
HEAVY = {
    "asyncio",
    "click",
    "concurrent",
    "ctypes",
    "dataclasses",
    "hashlib",
    "inspect",
    "json",
    "numpy",
    "pathlib",
    "psutil",
    "ptrace",
    "rich",
    "subprocess",
    "typing",
}


def loaded_by(code: str) -> set[str]:
    # Top-level modules that `code` loads in a bare interpreter (no site: an editable install loads pathlib).
    site = os.path.dirname(os.path.dirname(os.path.abspath(cffi.__file__)))
    prepare = f"import sys; sys.path[:0] = [{str(PACKAGE.parent)!r}, {site!r}]"
    report = "print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"{prepare}\n{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("code", ["import hvmodel", "import hvmodel; hvmodel.Machine", "import hvmodel._ffi"])
def test_import_is_light(code: str) -> None:
    assert not loaded_by(code) & HEAVY


def test_import_alone_loads_no_extension() -> None:
    assert "_cffi_backend" not in loaded_by("import hvmodel")
