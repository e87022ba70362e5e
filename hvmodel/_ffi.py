"""The one door to the compiled extension: `ffi` and `lib`, the ioctl table and the shipped guests.

`lib` has one function per ioctl, named as the ioctl in lower case: `lib.kvm_get_regs(fd, regs)`.  Each returns what the
kernel returned, or -errno.  Another struct's pointer is a TypeError; but cffi takes an empty list or array for a
pointer too, and the kernel would write behind it: `ioctl` of the handles refuses those, `lib` does not.

Importing this module raises `BuildError`, whose sentence says what to run, where the extension is missing, older than
the sources beside the package, or of no use on this platform.
"""

from __future__ import annotations

import os
import sys

from .errors import BuildError
from .value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from ._native import Lib

    class Run(Protocol):
        """What native/pyrun.c has."""

        Registers: type

        def install(self, cls: type, docs: dict[str, str], /) -> None:
            """Give class Vcpu its methods run(), run_until() and kick(), with these docstrings."""

        def install_registers(self, cls: type, docs: dict[str, str], /) -> None:
            """Give class Cpu rax to rflags, regs and sregs, with these docstrings."""

        def install_values(self, regs: type, sregs: type, /) -> None:
            """The classes of Cpu.regs and Cpu.sregs."""

        def forget_mmio(self) -> None:
            """The memslots of a VM have changed."""

    IOCTLS: dict[str, Ioctl]

__all__ = ["IOCTLS", "Ioctl", "ffi", "guests", "lib", "run"]

_SCOPES = ((1, "system"), (2, "vm"), (4, "vcpu"), (8, "device"))


class Ioctl(Value):
    """A row of the ioctl table.

    `request` is the number that ioctl(2) takes, as the compiler encoded it, and `nr` its low byte; `scope` the kinds of
    file descriptors that take it ("system", "vm", "vcpu", "device"); `argument` what is passed ("-", "ulong",
    "struct:X", "ptr:T"); `returns` what a success is ("zero", "fd", "count", "value"); `capability` the KVM_CAP_… that
    announces it, or None; `section` that of the kernel's Documentation/virt/kvm/api.rst, or None.

    >>> from hvmodel._ffi import IOCTLS
    >>> IOCTLS["KVM_GET_REGS"].scope, hex(IOCTLS["KVM_GET_REGS"].request)
    (('vcpu',), '0x8090ae81')
    """

    name: str
    nr: int
    request: int
    scope: tuple[str, ...]
    argument: str
    returns: str
    capability: str | None
    section: str | None

    @property
    def size(self) -> int:
        """Size of the argument in bytes, as the request encodes it; 0 where it does not."""
        return self.request >> 16 & 0x3FFF


def guests() -> dict[str, bytes]:
    """The guests that ship with hvmodel: name -> flat image, to be loaded and entered at 0x7C00.

    >>> sorted(guests())
    ['hello', 'walks']
    """
    return {
        ffi.string(guest.name).decode(): bytes(ffi.buffer(guest.data, guest.size))
        for guest in lib.hv_guests[0 : lib.hv_nr_guests]
    }


def _load(name: str) -> Any:
    # The library holds further modules (native/pyrun.c: _run, native/pystate.c: _state); the import system goes by file
    # names, so it is told.  Its classes come from the first module: to import importlib takes a millisecond.
    native: Any = sys.modules[f"{__package__}._native"]
    loader = type(native.__loader__)(f"{__package__}.{name}", native.__file__)
    spec = type(native.__spec__)(f"{__package__}.{name}", loader, origin=native.__file__)
    module: Any = loader.create_module(spec)
    loader.exec_module(module)
    return module


def _read_ioctls() -> dict[str, Ioctl]:
    text = ffi.string
    rows: dict[str, Ioctl] = {}
    for row in lib.hv_ioctls:
        name, capability, section = text(row.name).decode(), text(row.capability).decode(), text(row.section).decode()
        rows[name] = Ioctl(
            name,
            row.request & 0xFF,
            row.request,
            tuple(word for bit, word in _SCOPES if row.scope & bit),
            text(row.argument).decode(),
            text(row.returns).decode(),
            None if capability == "-" else capability,
            None if section == "-" else section,
        )
    return rows


def __getattr__(name: str) -> object:
    # The table takes as long to read as the extension takes to load: it is read when first asked for.
    if name == "IOCTLS":
        table = globals()["IOCTLS"] = _read_ioctls()
        return table
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _refuse_platform(platform: str, machine: str, maxsize: int) -> str | None:
    # The sentence for a platform that has no KVM as we know it, or None.
    if platform == "linux" and machine == "x86_64" and maxsize > 1 << 32:
        return None
    bits = 64 if maxsize > 1 << 32 else 32
    return f"hvmodel needs Linux on x86-64 with a 64-bit Python; this is {platform} on {machine} with {bits} bits"


def _source_hash(root: str) -> int | None:
    # What build_ffi.source_hash() computes, or None where the sources are not beside the package.
    native = os.path.join(root, "native")
    if not os.path.exists(os.path.join(native, "kvm_ioctl.tbl")):
        return None
    from zlib import crc32

    crc = 0
    for directory, suffixes in (
        (root, ("build_ffi.py",)),
        (native, (".c", ".h", ".tbl")),
        (os.path.join(native, "guests"), (".S",)),
    ):
        for name in sorted(os.listdir(directory)):
            if name.endswith(suffixes):
                with open(os.path.join(directory, name), "rb") as file:
                    crc = crc32(file.read(), crc32(name.encode(), crc))
    return crc


def _check(lib: Lib, root: str) -> None:
    # In an editable install the extension does not follow an edit of its sources.
    now = _source_hash(root)
    if now is not None and now != lib.HV_SOURCE_HASH:
        raise BuildError(f"hvmodel's extension is older than its sources: run `pip install -e .` in {root}")


def _explain(error: ImportError, root: str) -> BuildError:
    # Why the extension could not be imported, and what to run.
    if error.name == "_cffi_backend":
        return BuildError("hvmodel needs cffi: run `pip install cffi`")
    sources = os.path.exists(os.path.join(root, "native", "kvm_ioctl.tbl"))
    cure = f"run `pip install -e .` in {root}" if sources else "run `pip install --force-reinstall hvmodel`"
    if isinstance(error, ModuleNotFoundError):
        return BuildError(f"hvmodel's extension is not built: {cure}")
    return BuildError(f"hvmodel's extension cannot be loaded ({error}): {cure}")


_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if _refusal := _refuse_platform(sys.platform, os.uname().machine if hasattr(os, "uname") else "?", sys.maxsize):
    raise BuildError(_refusal)
try:
    from ._native import ffi, lib
except ImportError as error:
    raise _explain(error, _root) from None
_check(lib, _root)
run: Run = _load("_run")
