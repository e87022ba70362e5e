"""QEMU's own page-table walker, to be asked: `Tcg` runs lists of memory accesses on an emulated processor.

    we                                 QEMU -accel tcg -machine none -cpu max
    RAM: a memfd, mapped      <---->   the same memfd as its RAM, from address 0, without a hole
    GdbStub over a socketpair <---->   its gdb stub: registers, a breakpoint, on and off it goes

The guest `walks` (native/guests/walks.S) does the accesses.  Each has its own CR0, CR3, CR4, EFER, PKRU, CPL and
RFLAGS.AC, and finds an empty TLB; its value or its exception is read back.  Tables and what they lead to are written
and read through `ram`, so that A and D bits are simply there afterwards.  QEMU does not notice code that changes so:
code to be fetched is written before the first access, and stays.

    0x07c00   the guest; every page table of the caller maps 0x7000-0xafff by its entry 0, see `set_root`
    0x10000   tables behind that entry: PT, PD, PDPT, PML4, PML5 of 64-bit entries, PT of 32-bit ones
    0x100000  the list, to 0xffffff
    FREE      from 0x1000000 on: the caller's

Not on disk, no port, no process left behind: see `hvmodel.witness.qemu`.
Sources: QEMU docs/system/gdb.rst, hw/core/null-machine.c@v7.2.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
import struct
import warnings
import weakref

from ..arch.number import number
from ..arch.registers import CR0, CR4, EFER
from ..errors import ArgumentError, ArgumentTypeError, ClosedError, HostError
from ..value import Value
from .gdbstub import GdbError, GdbStub
from .qemu import Qemu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

__all__ = ["DONE", "FREE", "MODES", "OPS", "PHYS_BITS", "TcgAccess", "TcgResult", "TcgWalks", "paging_mode"]

FREE = 0x1000000
"""The first address that is the caller's."""
PHYS_BITS = 40
"""Bits of a physical address of TCG's processors (QEMU target/i386/cpu.h TCG_PHYS_ADDR_BITS)."""
DONE = 0x80
"""`TcgResult.vector` of an access without exception."""

# op -> its number in the guest's list
OPS = {"load": 0, "store": 1, "fetch": 2, "exchange": 3, "implicit": 4}

# How pages are found, by CR0, CR4 and EFER -> bytes of an entry
MODES = {"none": 0, "2-level": 4, "pae": 8, "4-level": 8, "5-level": 8}

_ENTRY, _LIST, _LIST_END = 0x7C00, 0x100000, FREE
_HEADER = struct.Struct("<4I")  # list, count, idle, run; at _ENTRY + 4
_RECORD = struct.Struct("<4I3QI4BI76x")
_ANSWER = struct.Struct("<64xII4Q24x")
_PT, _PD, _PDPT, _PML4, _PML5, _PT32 = range(0x10000, 0x16000, 0x1000)

#           0x20 accessed  0x40 dirty  4 user  2 writable  1 present
_TABLE, _KERNEL_PAGE, _USER_PAGE = 0x27, 0x63, 0x65
# The guest's entry 0 of a root.  TCG sets bit 5 of a PDPTE of PAE paging, so that it is set from the beginning.
_ROOT_ENTRY = {"2-level": _PT32 | _TABLE, "pae": _PD | 0x21, "4-level": _PDPT | _TABLE, "5-level": _PML4 | _TABLE}

_PG, _PE, _WP, _AM = int(CR0.PG), int(CR0.PE), int(CR0.WP), int(CR0.AM)
_PAE, _LA57, _PKE = int(CR4.PAE), int(CR4.LA57), int(CR4.PKE)
_LME, _LMA, _NXE = int(EFER.LME), int(EFER.LMA), int(EFER.NXE)
_CR0_TAKEN = _PG | _PE | _WP
_CR4_TAKEN = int(CR4.PSE | CR4.PAE | CR4.PGE | CR4.SMEP | CR4.SMAP | CR4.PKE | CR4.LA57)
_AC, _RFLAGS = 1 << 18, 2


def paging_mode(cr0: int, cr4: int, efer: int) -> str:
    """Which of `MODES` these registers ask for; EFER.LMA is not looked at.

    ArgumentError: paging with EFER.LME and without CR4.PAE, which no processor enters.

    >>> paging_mode(0x80000001, 0x1020, 0x100), paging_mode(0x80000001, 0x1020, 0)
    ('5-level', 'pae')
    """
    if not cr0 & _PG:
        return "none"
    if efer & _LME:
        if not cr4 & _PAE:
            raise ArgumentError("paging_mode", "cr4", cr4, "CR4.PAE set", "CR0.PG and EFER.LME are set")
        return "5-level" if cr4 & _LA57 else "4-level"
    return "pae" if cr4 & _PAE else "2-level"


class TcgAccess(Value):
    """One access: the linear address `gva`, `op` (one of `OPS`), and the processor that does it.

    `cr0`: PG, PE, WP.  `cr4`: PSE, PAE, PGE, SMEP, SMAP, PKE, LA57.  `efer`: LME (LMA is ignored), NXE.  `user`: at
    CPL 3, else 0.  `ac`: with RFLAGS.AC.  `value`: what a store or an exchange stores.  A load, store or exchange has 8
    bytes in long mode, 4 elsewhere; a fetch executes what stands there, which must end with `int $0x80` (cd 80);
    "implicit" reads a descriptor of 8 bytes, as LAR does, which is a supervisor's access at any CPL.
    """

    gva: int
    op: str
    cr0: int
    cr3: int
    cr4: int
    efer: int
    user: bool = False
    ac: bool = False
    pkru: int = 0
    value: int = 0


class TcgResult(Value):
    """What came of an access: `vector` is `DONE`, or that of the exception with its `error` code.

    `cr2`: the register, whatever left it there.  `value`: RAX (EAX) afterwards, what was loaded.  `rip`, `cs`: where
    the exception happened, or after the `int $0x80`.
    """

    vector: int
    error: int
    cr2: int
    value: int
    rip: int
    cs: int


def _give_back(stub: GdbStub | None, qemu: Qemu | None, view: memoryview, ram: mmap.mmap) -> None:
    if stub is not None:
        stub.close()
    if qemu is not None:
        qemu.close()
    with contextlib.suppress(BufferError):  # somebody still holds a part of the view: the mapping goes with that
        view.release()
        ram.close()


def _lost(stub: GdbStub, qemu: Qemu, view: memoryview, ram: mmap.mmap) -> None:
    _give_back(stub, qemu, view, ram)
    warnings.warn("unclosed TcgWalks", ResourceWarning, stacklevel=2)


def _memory(size: int) -> tuple[int, mmap.mmap]:
    # A memfd and our mapping of it.
    call = "memfd_create"
    fd = -1
    try:
        fd = os.memfd_create("tcg", os.MFD_CLOEXEC)
        call = "ftruncate"
        os.ftruncate(fd, size)
        call = "mmap"
        return fd, mmap.mmap(fd, size)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise HostError(error.errno or errno.EIO, call, "ram", size) from None


class TcgWalks:
    """An emulated processor that does memory accesses; see the module's text.

    `ram`: bytes of its RAM, which takes what is written only; by default 128 GiB.  `timeout` in seconds bounds the
    start, and each `run`.

    Raises Lacking where QEMU is not installed, QemuError where it refuses its options, HostError of the calls.
    Calls: memfd_create(2), mmap(2), socketpair(2), and those of `Qemu`.
    Threads: any, one at a time; the one that makes it must outlive it.

        with TcgWalks() as tcg:
            tcg.set_root("4-level", FREE)
            done = tcg.run([TcgAccess(0x8000000000, "load", 0x80000011, FREE, 0x20, 0x100)])
            print(done[0].vector, done[0].error, hex(done[0].cr2))  # 14 0 0x8000000000
    """

    def __init__(self, ram: int = 1 << 37, *, timeout: float = 60.0) -> None:
        from .._ffi import guests

        size = number("TcgWalks", "ram", ram, 1 << PHYS_BITS, 2 * FREE)
        if size % 4096:
            raise ArgumentError("TcgWalks", "ram", ram, "a multiple of 4096 bytes")
        fd, self._map = _memory(size)
        self._ram = memoryview(self._map)
        self._timeout = timeout
        stub: GdbStub | None = None
        qemu: Qemu | None = None
        try:
            image = guests()["walks"]
            self._ram[_ENTRY : _ENTRY + len(image)] = image
            self._write_tables()
            *_, self._idle, self._run = _HEADER.unpack_from(image, 4)
            qemu, stub = self._start(fd, size)
            stub.write_register("cs", 0)
            stub.write_register("rip", _ENTRY)
            stub.set_breakpoint(self._idle)
            stub.cont()
        except BaseException:
            _give_back(stub, qemu, self._ram, self._map)
            raise
        finally:
            os.close(fd)
        self._qemu, self._stub = qemu, stub
        self._finalizer = weakref.finalize(self, _lost, stub, qemu, self._ram, self._map)

    def _start(self, fd: int, size: int) -> tuple[Qemu, GdbStub]:
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise HostError(error.errno or errno.EIO, "socketpair") from None
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            backend = f"memory-backend-file,id=ram,size={size},share=on,mem-path=/proc/self/fd/{fd}"
            options = ["-cpu", "max,apic-id=0", "-m", f"{size >> 20}M", "-object", backend]
            options += ["-chardev", f"socket,id=gdb,fd={theirs.fileno()}", "-gdb", "chardev:gdb"]
            machine = "none,memory-backend=ram"
            qemu = Qemu(*options, machine=machine, fds=(fd, theirs.fileno()), timeout=self._timeout)
            undo.callback(qemu.close)
            theirs.close()
            stub = GdbStub(ours, timeout=self._timeout)
            undo.pop_all()
            return qemu, stub

    def _write_tables(self) -> None:
        # What leads to the guest's own pages, in every mode.
        def put(table: int, entries: dict[int, int], size: int = 8) -> None:
            for at, entry in entries.items():
                self._ram[table + size * at : table + size * (at + 1)] = entry.to_bytes(size, "little")

        pages = {at: at << 12 | _KERNEL_PAGE for at in (7, 8, 9)} | {10: 10 << 12 | _USER_PAGE}
        put(_PT, pages)
        put(_PT32, pages, 4)
        for table, below in ((_PD, _PT), (_PDPT, _PD), (_PML4, _PDPT), (_PML5, _PML4)):
            put(table, {0: below | _TABLE})

    @property
    def ram(self) -> memoryview:
        """The guest's RAM, to be read and written: byte n is physical address n.  Raises ClosedError."""
        if self.closed:
            raise ClosedError("TcgWalks.ram", "TcgWalks")
        return self._ram

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version, such as (7, 2, 22)."""
        return self._qemu.version

    @property
    def stub(self) -> GdbStub:
        """The connection to QEMU's gdb stub.  Between two calls of `run` the processor is in the guest's idle loop."""
        return self._stub

    def set_root(self, mode: str, root: int) -> None:
        """Write entry 0 of a caller's top table, at `root`: it maps the guest's own pages, low in the address space.

        `mode`: one of `MODES` but "none".  ArgumentError: another mode; a root outside RAM, not aligned.
        """
        if mode not in _ROOT_ENTRY:
            raise ArgumentError("TcgWalks.set_root", "mode", mode, ", ".join(_ROOT_ENTRY))
        root = number("TcgWalks.set_root", "root", root, len(self.ram) - 4096, FREE)
        if root & (0x1F if mode == "pae" else 0xFFF):
            raise ArgumentError("TcgWalks.set_root", "root", root, "a multiple of 4096 (PAE: of 32)")
        size = MODES[mode]
        self._ram[root : root + size] = _ROOT_ENTRY[mode].to_bytes(size, "little")

    def run(self, accesses: Iterable[TcgAccess]) -> list[TcgResult]:
        """Do the accesses, one after the other, and say what came of each.

        The top table of each must have had `set_root`.  ArgumentError: an unknown op; bits of a control register that
        `TcgAccess` does not name; CR3 above 4 GiB, or a gva of more than 32 bits, outside long mode.
        GdbError: the guest did not come back, for a page table does not map it, or a fetch ran away.
        """
        if self.closed:
            raise ClosedError("TcgWalks.run", "TcgWalks")
        rows = [self._row(access) for access in accesses]
        found: list[TcgResult] = []
        most = (_LIST_END - _LIST) // _RECORD.size
        for first in range(0, len(rows), most):
            part = rows[first : first + most]
            end = _LIST + len(part) * _RECORD.size
            self._ram[_LIST:end] = b"".join([_RECORD.pack(*row) for row in part])
            self._ram[_ENTRY + 4 : _ENTRY + 12] = struct.pack("<II", _LIST, len(part))
            self._stub.cont(self._run, self._timeout)
            at = self._stub.read_register("rip")
            if at != self._idle:
                raise GdbError("TcgWalks.run", "c", f"the guest stopped at {at:#x} instead of {self._idle:#x}")
            found += [TcgResult(*answer) for answer in _ANSWER.iter_unpack(self._ram[_LIST:end])]
        return found

    @staticmethod
    def _row(access: TcgAccess) -> tuple[int, ...]:
        # The fields of a record of the guest's list.
        call = "TcgWalks.run"
        if not isinstance(access, TcgAccess):
            raise ArgumentTypeError(call, "accesses", access, "TcgAccess")
        if access.op not in OPS:
            raise ArgumentError(call, "op", access.op, ", ".join(OPS))
        cr0, cr4, efer = access.cr0 & ~int(CR0.ET), access.cr4, access.efer & ~_LMA
        for name, value, taken in (("cr0", cr0, _CR0_TAKEN), ("cr4", cr4, _CR4_TAKEN), ("efer", efer, _LME | _NXE)):
            if number(call, name, value) & ~taken:
                raise ArgumentError(call, name, value, f"bits of {taken:#x}")
        mode = paging_mode(cr0, cr4, efer)
        long = efer & _LME and mode != "none"
        last = (1 << 64) - 1 if long else (1 << 32) - 1
        number(call, "gva", access.gva, last)
        number(call, "cr3", access.cr3, (1 << PHYS_BITS) - 1 if long else last)
        if mode == "none" and efer & _LME:
            efer &= ~_LME  # without paging it does nothing, and the guest is in 32-bit code
        return (
            cr0 | _PE | int(CR0.ET), cr4, efer, number(call, "pkru", access.pkru, 0xFFFFFFFF),
            access.cr3, access.gva, number(call, "value", access.value),
            _RFLAGS | (_AC if access.ac else 0), OPS[access.op], bool(access.user), bool(long), bool(cr4 & _PKE),
            _PML5 if mode == "5-level" else _PML4,
        )  # fmt: skip

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._finalizer.alive

    def close(self) -> None:
        """End QEMU, and give the memory back.  Any number of calls."""
        if self._finalizer.detach():
            _give_back(self._stub, self._qemu, self._ram, self._map)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return "<TcgWalks closed>" if self.closed else f"<TcgWalks pid={self._qemu.pid}: {len(self._ram):#x} bytes>"
