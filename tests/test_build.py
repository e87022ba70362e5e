"""The build: the table, what is generated from it, the proof of the ABI header, the handshake, the refusals."""

from __future__ import annotations

import ast
import errno
import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from hvmodel import _ffi
from hvmodel._ffi import IOCTLS, ffi, guests, lib

try:
    import build_ffi
except ImportError:
    pytest.skip("build_ffi.py is not beside the tests: they run against an installed wheel", allow_module_level=True)

ROWS = build_ffi.read_table()
FUNCTIONS = sorted(name for name in dir(lib) if inspect.isbuiltin(getattr(lib, name)))
PACKAGE = Path(_ffi.__file__).parent


# ------------------------------------------------------------------------------------------------ table and stub


def test_the_runtime_table_has_the_rows_of_the_table_file() -> None:
    # Counted by hand, not by the parser: lines that begin with a number.
    lines = (build_ffi.NATIVE / "kvm_ioctl.tbl").read_text().splitlines()
    assert len(IOCTLS) == lib.hv_nr_ioctls == sum(line.startswith("0x") for line in lines)
    for row in ROWS:
        ioctl = IOCTLS[row.name]
        assert (ioctl.nr, ioctl.scope, ioctl.argument) == (row.nr, row.scope, row.argument)
        assert (ioctl.returns, ioctl.capability, ioctl.section) == (row.returns, row.capability, row.section)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_request_number_by_arithmetic_equals_the_compilers(row: build_ffi.Row) -> None:
    # asm-generic/ioctl.h: nr in bits 0-7, type 8-15, size 16-29, direction 30-31 (1 write, 2 read).
    direction = {"-": 0, "w": 1, "r": 2, "rw": 3}[row.dir]
    size = ffi.sizeof(row.encoded) if row.encoded else 0
    assert IOCTLS[row.name].request == direction << 30 | size << 16 | 0xAE << 8 | row.nr
    assert IOCTLS[row.name].size == size


def test_some_request_numbers_are_as_strace_prints_them() -> None:
    # strace 6.1, xlat/ioctl_entries: numbers of <linux/kvm.h> on x86-64.
    assert IOCTLS["KVM_RUN"].request == 0xAE80
    assert IOCTLS["KVM_GET_REGS"].request == 0x8090AE81
    assert IOCTLS["KVM_SET_USER_MEMORY_REGION"].request == 0x4020AE46


def test_every_capability_of_the_table_is_a_constant() -> None:
    constants = build_ffi.constants()
    assert not {row.capability for row in ROWS if row.capability} - constants.keys()


@pytest.mark.parametrize(
    ("line", "column"),
    [
        ("0x81 r vcpu KVM_GET_REGS struct:kvm_regs zero -", "7 columns"),
        ("81 r vcpu KVM_GET_REGS struct:kvm_regs zero - 4.11", "nr"),
        ("0x81 x vcpu KVM_GET_REGS struct:kvm_regs zero - 4.11", "dir"),
        ("0x81 r vcpus KVM_GET_REGS struct:kvm_regs zero - 4.11", "scope"),
        ("0x81 r vcpu GET_REGS struct:kvm_regs zero - 4.11", "name"),
        ("0x81 r vcpu KVM_GET_REGS kvm_regs zero - 4.11", "argument"),
        ("0x81 r vcpu KVM_GET_REGS struct:kvm_regs nothing - 4.11", "returns"),
        ("0x81 r vcpu KVM_GET_REGS struct:kvm_regs zero CAP_X 4.11", "capability"),
        ("0x81 r vcpu KVM_GET_REGS ptr:void zero - 4.11", "type of the _IO macro"),
        ("0x80 - vcpu KVM_RUN - zero - 4.10\n0x80 - vcpu KVM_RUN - zero - 4.10", "name"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(
    line: str, column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kvm_ioctl.tbl").write_text(f"# comment\n{line}\n")
    monkeypatch.setattr(build_ffi, "NATIVE", tmp_path)
    with pytest.raises(SystemExit, match=rf"kvm_ioctl\.tbl:[23]: .*{column}"):
        build_ffi.read_table()


def test_the_generated_files_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert build_ffi.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_generated_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "ioctls.md").write_text("old")
    (tmp_path / "hvmodel").mkdir()
    shutil.copy(build_ffi.ROOT / "build_ffi.py", tmp_path)
    shutil.copy(build_ffi.ROOT / "hvmodel" / "_native.pyi", tmp_path / "hvmodel")
    monkeypatch.setattr(build_ffi, "ROOT", tmp_path)
    assert build_ffi.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert "docs/ioctls.md is stale" in said
    assert "_native.pyi" not in said
    assert build_ffi.main(["--write"]) == 0
    assert build_ffi.main(["--check"]) == 0


def stub_classes() -> dict[str, ast.ClassDef]:
    # Classes of the stub, by name.
    tree = ast.parse((PACKAGE / "_native.pyi").read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def members(node: ast.ClassDef) -> dict[str, ast.AST]:
    # Annotated names and functions of a class.
    named = {
        item.target.id: item
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    return named | {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}


def field_names(ctype: object) -> list[str]:
    # As Python sees them: those of unnamed members belong to the whole.
    names: list[str] = []
    try:
        ffi.sizeof(ctype)  # type: ignore[arg-type]
    except ffi.error:  # opaque: cffi must not be asked for its fields
        return names
    for name, field in ctype.fields or ():  # type: ignore[attr-defined]
        names += [name] if name else field_names(field.type)
    return names


def test_the_stub_has_the_functions_and_constants_of_the_module() -> None:
    stub = members(stub_classes()["Lib"])
    assert stub.keys() == set(dir(lib))
    for name in FUNCTIONS:
        node = stub[name]
        assert isinstance(node, ast.FunctionDef)
        assert len(node.args.posonlyargs + node.args.args) - 1 == len(ffi.typeof(getattr(lib, name)).args), name


def test_the_stub_has_the_structs_and_fields_of_the_module() -> None:
    classes = stub_classes()
    _, structs, unions = ffi.list_types()
    named = [f"struct {name}" for name in structs] + [f"union {name}" for name in unions]
    assert len(named) > 90
    for name in named:
        if "$" not in name:
            # Naming the fields makes cffi compare its layout with the compiler's.
            assert sorted(members(classes[name.split()[1]])) == sorted(field_names(ffi.typeof(name))), name


def test_constants_are_what_the_headers_say() -> None:
    for name, value in build_ffi.constants().items():
        assert getattr(lib, name) == value, name


def test_guests_are_embedded_as_they_are_assembled(tmp_path: Path) -> None:
    shipped = guests()
    assert sorted(shipped) == sorted(path.stem for path in build_ffi.guest_sources())
    for path in build_ffi.guest_sources():
        assert build_ffi.assemble(path, tmp_path / "image") == shipped[path.stem], path.name


# --------------------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_wrong_type_in_any_place_is_a_type_error(name: str) -> None:
    function = getattr(lib, name)
    kinds = ffi.typeof(function).args
    good = [ffi.NULL if kind.kind == "pointer" else 0 for kind in kinds]
    for index in range(len(kinds)):
        for wrong in (object(), "text", 1.5, None):
            if kinds[index].kind == "pointer" and wrong == "text" and kinds[index].item.kind == "primitive":
                continue
            with pytest.raises(TypeError):
                function(*good[:index], wrong, *good[index + 1 :])
    with pytest.raises(TypeError):
        function(*good, 0)
    if good:
        with pytest.raises(TypeError):
            function(*good[:-1])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_pointer_to_another_struct_is_a_type_error(name: str) -> None:
    function = getattr(lib, name)
    kinds = ffi.typeof(function).args
    good = [ffi.NULL if kind.kind == "pointer" else 0 for kind in kinds]
    for index, kind in enumerate(kinds):
        if kind.kind != "pointer" or kind.item.kind == "void":
            continue  # void * takes every pointer: what it points to is the caller's word
        wrong = "struct kvm_fpu *" if kind.cname != "struct kvm_fpu *" else "struct kvm_regs *"
        with pytest.raises(TypeError):
            function(*good[:index], ffi.new(wrong), *good[index + 1 :])


@pytest.mark.parametrize("row", [row for row in ROWS if row.argument == "ulong"], ids=lambda row: row.name)
def test_a_value_that_does_not_fit_is_an_overflow_error(row: build_ffi.Row) -> None:
    for value in (-1, 1 << 64):
        with pytest.raises(OverflowError):
            getattr(lib, row.wrapper)(-1, value)


@settings(max_examples=20, deadline=None)
@given(
    st.one_of(
        st.none(),
        st.integers(),
        st.text(),
        st.binary(),
        st.floats(),
        st.lists(st.integers()),
        st.dictionaries(st.text(), st.integers()),
        st.booleans(),
    )
)
def test_no_argument_crashes_an_ioctl(value: object) -> None:
    # File descriptor -1: what gets through the types is refused by the kernel.
    for row in ROWS:
        if row.parameter:
            try:
                result = getattr(lib, row.wrapper)(-1, value)
            except (TypeError, OverflowError, KeyError, ValueError, IndexError):
                continue
            assert result == -errno.EBADF, row.name


def test_a_wrapper_answers_with_the_negative_errno() -> None:
    with open("/dev/null") as null:
        assert lib.kvm_get_api_version(null.fileno()) == -errno.ENOTTY
    assert lib.kvm_get_api_version(-1) == -errno.EBADF


# ------------------------------------------------------------------------------------------------- the ABI proof


def test_the_abi_header_equals_the_systems() -> None:
    report = build_ffi.abi_check()
    print(report)
    assert not report.mismatches
    # Debian 12's linux/kvm.h is of 6.1; a newer one knows more.
    assert report.compared["constant"] > 500
    assert report.compared["request"] > 95
    assert report.compared["struct"] > 80
    assert report.compared["field"] > 500


@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "names"),
    [
        ("kvm_uapi.h", r"(#define KVM_EXIT_HLT\s+)\w+", r"\g<1>77", {"KVM_EXIT_HLT"}),
        ("kvm_ioctl.tbl", r"(0x81\s+)r ", r"\g<1>w ", {"KVM_GET_REGS"}),
        (
            "kvm_uapi.h",
            r"(struct kvm_pit_config \{\s+)uint32_t flags;\s+uint32_t pad\[15\]",
            r"\g<1>uint64_t flags; uint32_t pad[14]",
            {"struct kvm_pit_config.flags"},
        ),
    ],
    ids=["constant", "request", "field"],
)
def test_a_wrong_value_is_named(
    file: str, pattern: str, replacement: str, names: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = tmp_path / "native"
    shutil.copytree(build_ffi.NATIVE, native)
    text, count = re.subn(pattern, replacement, (native / file).read_text())
    assert count == 1
    (native / file).write_text(text)
    monkeypatch.setattr(build_ffi, "NATIVE", native)
    report = build_ffi.abi_check()
    assert {line.partition(":")[0] for line in report.mismatches} == names
    # Padding may shrink in a later kernel: that it differs is told, and is no error.
    assert report.grown == (["struct kvm_pit_config.pad"] if "pad" in pattern else [])


def test_missing_headers_of_the_c_library_name_the_package(tmp_path: Path) -> None:
    # gcc's own headers alone, as on a system with gcc and without libc6-dev.
    own = subprocess.run(["gcc", "-print-file-name=include"], capture_output=True, text=True, check=True).stdout.strip()
    with pytest.raises(SystemExit, match=r"the C header stdint.h was not found: run `apt install libc6-dev`"):
        build_ffi.abi_check(["gcc", "-nostdinc", f"-isystem{own}", f"-isystem{tmp_path}"])


def test_the_abi_unit_includes_only_the_systems_headers() -> None:
    source, facts = build_ffi.abi_unit()
    included = {line.split()[1] for line in source.splitlines() if line.startswith("#include")}
    assert all(name.startswith("<") for name in included)
    assert len(facts) > 1300


# ---------------------------------------------------------------------------------------------------- handshake


def run_python(code: str, root: Path) -> str:
    # What `code` prints, with hvmodel taken from `root`.
    site = os.path.dirname(os.path.dirname(_ffi_backend()))
    code = f"import sys; sys.path[:0] = [{str(root)!r}, {site!r}]\n{code}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _ffi_backend() -> str:
    import cffi

    return os.path.abspath(cffi.__file__)


IMPORT = """
try:
    import hvmodel._ffi
    print("fine")
except ImportError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    # A copy of the project, extension included.
    shutil.copytree(PACKAGE, tmp_path / "hvmodel", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(build_ffi.NATIVE, tmp_path / "native")
    shutil.copy(build_ffi.ROOT / "build_ffi.py", tmp_path)
    shutil.copy(build_ffi.ROOT / "pyproject.toml", tmp_path)
    for name in ("LICENSE", "README.md"):
        if (build_ffi.ROOT / name).exists():
            shutil.copy(build_ffi.ROOT / name, tmp_path)
    return tmp_path


def test_both_ends_of_the_handshake_hash_alike(tree: Path) -> None:
    assert _ffi._source_hash(str(build_ffi.ROOT)) == build_ffi.source_hash() == lib.HV_SOURCE_HASH


def test_a_fresh_extension_is_accepted(tree: Path) -> None:
    assert run_python(IMPORT, tree) == "fine\n"


@pytest.mark.parametrize("name", ["native/run.c", "native/kvm_ioctl.tbl", "native/guests/hello.S", "build_ffi.py"])
def test_an_edited_source_is_noticed(name: str, tree: Path) -> None:
    with open(tree / name, "a") as file:
        file.write("\n")
    assert run_python(IMPORT, tree) == (
        f"BuildError hvmodel's extension is older than its sources: run `pip install -e .` in {tree}\n"
    )


def test_without_sources_there_is_nothing_to_compare(tree: Path) -> None:
    shutil.rmtree(tree / "native")
    assert run_python(IMPORT, tree) == "fine\n"


def test_a_missing_extension_says_what_to_run(tree: Path) -> None:
    for path in (tree / "hvmodel").glob("_native*.so"):
        path.unlink()
    assert (
        run_python(IMPORT, tree) == f"BuildError hvmodel's extension is not built: run `pip install -e .` in {tree}\n"
    )
    shutil.rmtree(tree / "native")
    assert "pip install --force-reinstall hvmodel" in run_python(IMPORT, tree)


def test_a_broken_extension_says_what_to_run(tree: Path) -> None:
    for path in (tree / "hvmodel").glob("_native*.so"):
        path.write_bytes(b"\x7fELF")
    said = run_python(IMPORT, tree)
    assert said.startswith("BuildError hvmodel's extension cannot be loaded (")
    assert "pip install -e ." in said


def test_missing_cffi_says_what_to_run(tree: Path) -> None:
    assert run_python(f"sys.modules['_cffi_backend'] = None\n{IMPORT}", tree) == (
        "BuildError hvmodel needs cffi: run `pip install cffi`\n"
    )


# ----------------------------------------------------------------------------------------------------- refusals


PLATFORMS = [
    ("linux", "x86_64", 2**63 - 1, True),
    ("linux", "x86_64", 2**31 - 1, False),
    ("linux", "aarch64", 2**63 - 1, False),
    ("darwin", "x86_64", 2**63 - 1, False),
    ("win32", "AMD64", 2**63 - 1, False),
]


@pytest.mark.parametrize(("platform", "machine", "maxsize", "served"), PLATFORMS)
def test_other_platforms_are_refused_in_one_sentence(platform: str, machine: str, maxsize: int, served: bool) -> None:
    refusal = build_ffi.refuse_platform(platform, machine, maxsize)
    assert (refusal is None) is served
    assert refusal == _ffi._refuse_platform(platform, machine, maxsize)
    if refusal:
        assert refusal.startswith("hvmodel needs Linux on x86-64 with a 64-bit Python; this is ")
        assert "\n" not in refusal


def test_import_on_another_platform_is_refused(tree: Path) -> None:
    said = run_python(f"sys.platform = 'darwin'\n{IMPORT}", tree)
    assert said.startswith("BuildError hvmodel needs Linux on x86-64 with a 64-bit Python; this is darwin on ")


def test_pure_models_import_without_the_extension(tree: Path) -> None:
    for path in (tree / "hvmodel").glob("_native*.so"):
        path.unlink()
    code = "import hvmodel, hvmodel.errors, hvmodel.units, hvmodel.value; print('fine')"
    assert run_python(code, tree) == "fine\n"


def build_inplace(tree: Path, prepare: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    # Build the extension of the copy, after `prepare`.
    for path in (tree / "hvmodel").glob("_native*.so"):
        path.unlink()
    code = (
        f"import sys, warnings; warnings.simplefilter('ignore'); sys.path.insert(0, {str(tree)!r}); import build_ffi\n"
    )
    return subprocess.run(
        [sys.executable, "-c", f"{code}{prepare}\nbuild_ffi.main(['--inplace'])"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tree,
        env={**os.environ, **environment},
    )


def test_a_build_without_gcc_names_the_package(tree: Path) -> None:
    done = build_inplace(tree, PATH="/nonexistent")
    assert done.returncode != 0
    compiler = sysconfig.get_config_var("CC").split()[0]  # Debian's own Python has x86_64-linux-gnu-gcc
    assert done.stderr == f"hvmodel: the C compiler `{compiler}` was not found: run `apt install gcc libc6-dev`\n"


def test_a_build_without_python_headers_names_the_package(tree: Path) -> None:
    done = build_inplace(tree, "build_ffi.sysconfig.get_path = lambda name: '/nonexistent'")
    assert done.returncode != 0
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert done.stderr.startswith(f"hvmodel: Python.h was not found in /nonexistent: run `apt install {version}-dev`")
    assert done.stderr.count("\n") == 1


def test_a_build_on_another_platform_is_refused(tree: Path) -> None:
    done = build_inplace(tree, "build_ffi.refuse_platform = lambda *_: 'refused'")
    assert done.returncode != 0
    assert done.stderr == "refused\n"


def test_a_build_with_a_wrong_header_names_what_differs(tree: Path) -> None:
    header = tree / "native" / "kvm_uapi.h"
    header.write_text(re.sub(r"(#define KVM_API_VERSION\s+)12", r"\g<1>13", header.read_text()))
    done = build_inplace(tree)
    assert done.returncode != 0
    assert "native/kvm_uapi.h is wrong:\nKVM_API_VERSION: " in done.stderr
    assert "Traceback" not in done.stderr
