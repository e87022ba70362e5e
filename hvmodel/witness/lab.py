"""MmuLab: a VM made for looking at KVM's MMU: accesses through guest page tables, each with the trace of it.

Owns the VM, its memory, the driver guest, and the trace of the thread that runs it.

Guest physical memory: slot 0 is the driver's, gpa 0 to 2 MiB; the others are the caller's (`LabSlot`).  Linear
addresses: the top 512 GiB, from DRIVER on, are the driver's, by entry 511 of each PML4 that is used (`link`); all
below is the caller's.  Every page of the caller's slots begins as 8 bytes that are its gpa, the rest 0xee: that is
OUT DX, AL at every address, so that a fetch from anywhere ends in an exit.

    DRIVER + 0x0000_0000   2 MiB, for supervisor: the driver's slot
           + 0x0020_0000   2 MiB, for user: the same

An access is one entry into the guest: registers are set so that the next instruction makes it, and the one behind it
leaves by an exit.  With `user` it runs at CPL 3, natively, through KVM's shadow page tables where KVM has no EPT or
NPT; else at CPL 0, which kvm_pvm emulates.  A fault is delivered through the guest's IDT; the handler leaves by an
exit too, and the error code is read from the guest's stack.  Each KVM_RUN ends in one kvm_userspace_exit, and by these
the records are given to the accesses, exactly; where the kernel lost records, TraceLost is raised.

What `records` do not have, and nothing else: the entries read on the way to the driver's own pages (filtered in the
kernel, by value), the exits of a KVM_RUN that a signal interrupted, and kvm_unmap_hva_range of memory that is not the
lab's.  The walks of the driver's pages are there, but not in `walks` and `own`.

    with MmuLab() as lab:
        ram = lab.slots[0].gpa
        lab.map(0x40_0000, ram + 0x10_0000)
        [seen] = lab.run([Access(0x40_0000, "store", user=True)])
        print(seen.own[0].entries, seen.fault)
"""

from __future__ import annotations

import errno
import threading
from contextlib import suppress

from .._ffi import ffi, lib
from ..arch.number import number
from ..errors import ArgumentError, BusyError, HvError, KvmError, UnsupportedError
from ..units import PAGE_SIZE, MiB
from ..value import Value
from .kvm_trace import (
    GetPage,
    KvmTrace,
    PagetableWalk,
    SetSpte,
    TracedWalk,
    TraceLost,
    UnmapHvaRange,
    UserspaceExit,
    walks,
)
from .result import Lacking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType
    from typing import Any, Self, TypeAlias, TypeVar

    from ..host import Mapping
    from ..host.pagemap import PageMap
    from ..kvm.exits import Exit
    from .kvm_trace import Event

    _E = TypeVar("_E", bound=Event)
    _Item: TypeAlias = "Access | Poke | Callable[[], object]"  # of a program
    # What an access came to, as in Outcome, and the number of its exits.
    _Result = tuple[int | None, "Fault | None", tuple[tuple[int, int, bool], ...], Exit | None, int]

__all__ = ["DRIVER", "Access", "Fault", "LabSlot", "MmuLab", "Outcome", "Poke"]

DRIVER = 0xFFFFFF80_00000000
"""The driver's first linear address."""

_USER = 0x200000  # from DRIVER: where CPL 3 may use the driver's memory
_INDEX = 511  # of its entry in a PML4

# The driver's slot.
_DRIVER_SIZE = 2 * MiB
_PDPT, _PD = 0x1000, 0x2000
_ROOT = 0x4000
_GDT, _IDT, _TSS = 0x5000, 0x6000, 0x7000
_STACK, _STACK_END = 0x8000, 0xA000
_HANDLERS = 0xA000  # of vector v: OUT v, AL at _HANDLERS + 16 * v
_STUBS = 0xB000  # 16 bytes each
_FREE = 0x10000  # what is behind is for tables that `map` makes

_P, _RW, _US, _A, _D, _PS = 1, 2, 4, 0x20, 0x40, 0x80

_GDT_WORDS = (
    0,
    0x00209B0000000000,  # 0x08: code, 64 bits, DPL 0
    0x00CF93000000FFFF,  # 0x10: data, DPL 0
    0x00CFF3000000FFFF,  # 0x18: data, DPL 3
    0x0020FB0000000000,  # 0x20: code, 64 bits, DPL 3
)
_TSS_SELECTOR = 0x28
_IOMAP = 0x68  # right behind the TSS; clear for ports 0 to 0x1ff, so that CPL 3 may leave by OUT
_TSS_LIMIT = _IOMAP + 0x40

_DONE = 0x99  # the port that says that the access is done; ports below 32 are a handler's, of that vector
_PAGE_FAULT = 14
_WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17, 21, 29, 30})

# The instruction of each kind of access, by RDI and RAX; then OUT DX, AL.
_CODE = {
    "load": "488b07",  # mov rax, [rdi]
    "store": "488907",  # mov [rdi], rax
    "fetch": "",  # RIP is the address itself
    "invlpg": "0f013f",  # invlpg [rdi]
    "cr3": "0f22df",  # mov cr3, rdi
    "load8": "8a07",  # mov al, [rdi]
    "store8": "8807",  # mov [rdi], al
    "xchg": "488707",  # xchg [rdi], rax
}
_STUB = {kind: _STUBS + 16 * at for at, kind in enumerate(_CODE)}
_SUPERVISOR_KINDS = ("invlpg", "cr3")
_FILL = 0xEEEEEEEEEEEEEEEE

_CR0, _CR4, _EFER = 0x80010033, 0x20, 0xD00  # PE MP ET NE WP PG; PAE; LME LMA NXE
_RFLAGS = 2
_RFLAGS_AC = 1 << 18

_FLUSH_SLOT, _FLUSH_GPA = 500, 1 << 40
_PFN = (1 << 55) - 1  # in a word of /proc/self/pagemap, whose bit 63 says that the page is there
_TIMEOUT = 5.0  # seconds that one access may take
_CHUNK = 800  # accesses between two reads of the trace
_TABLE = _P | _RW | _US | _A

# What a walk of the driver's addresses reads below the root's entry, and that one: left out of the trace.
_LARGE = _P | _RW | _A | _D | _PS
_DRIVER_ENTRIES = (_PDPT | _TABLE, _PD | _TABLE, _LARGE, _LARGE | _US)

_ELEMENT, _EXIT = "kvmmmu:kvm_mmu_paging_element", "kvm:kvm_userspace_exit"

_PKRU = 9  # component of the XSAVE area
_XSTATE_BV = 512  # in it: the bytes that say which components are not in their initial state


class LabSlot(Value):
    """A memory slot of the lab: `gpa` and `size` in bytes, whole pages.

    `flags`: KVM_MEM_LOG_DIRTY_PAGES 1, KVM_MEM_READONLY 2.  `huge`: the host's memory is advised to be of huge pages
    (2 MiB, where the host has some free), else it is of 4 KiB for good.  `populate`: the host has it in memory, for
    writing, before the guest's first access; without, `fill` must be False.  `fill`: each page begins as described
    in this module's text, else as zeros.
    """

    gpa: int
    size: int
    flags: int = 0
    huge: bool = False
    populate: bool = True
    fill: bool = True


class Access(Value):
    """One access of the guest to the linear address `gva`.

    `kind`: "load" and "store" of 8 bytes, "load8" and "store8" of one, "xchg" of 8 (locked), "fetch" (an instruction
    is fetched from it: one that leaves, as the slots are filled); at CPL 0 "invlpg", and "cr3", which loads `gva` into
    CR3.  `user`: at CPL 3.  `value`: what a store writes.  `ac`: EFLAGS.AC is set.
    """

    gva: int
    kind: str = "load"
    user: bool = True
    value: int = _FILL
    ac: bool = False


class Poke(Value):
    """Not an access: the lab writes `data` at `gpa` from outside before the next access, as by MmuLab.write."""

    gpa: int
    data: bytes


class Fault(Value):
    """The exception that the guest's handler was entered for: `cr2` is that of then, `rip` what was pushed."""

    vector: int
    error_code: int | None
    cr2: int
    rip: int


class Outcome(Value):
    """What became of an access.

    `value`: RAX behind it (what a load read), None where it did not end.  `fault`: the first exception, or None.
    `mmio`: (gpa, size, is_write) of each exit for memory that is in no slot; reads were answered with ones.  `stop`:
    the exit that ended it where that is none of the driver's (an internal error, a shutdown, …).

    `records`: what the trace has of it, in order; also what a function called before it did.  Left out is what the
    module's text says.  Of the caller's tables no entry may have the value of one of the driver's (an address below
    0x3000 with P, RW and A, or 0 with PS): it would be missing in `entries`.
    """

    access: Access
    value: int | None
    fault: Fault | None
    mmio: tuple[tuple[int, int, bool], ...]
    stop: Exit | None
    records: tuple[Event, ...]

    @property
    def walks(self) -> list[TracedWalk]:
        """The walks but those of the driver's addresses, with what followed each."""
        return [walk for walk in walks(self.records) if walk.addr < DRIVER]

    @property
    def own(self) -> list[TracedWalk]:
        """The walks of the access' own page."""
        page = self.access.gva >> 12
        return [walk for walk in walks(self.records) if walk.addr >> 12 == page]

    def events(self, kind: type[_E]) -> list[_E]:
        """The records of one class, but those that follow from walks of the driver's addresses."""
        found, skipping = [], False
        for event in self.records:
            if type(event) is PagetableWalk:
                skipping = event.addr >= DRIVER
            elif type(event) is kind and not skipping:
                found.append(event)
        return found

    @property
    def sptes(self) -> list[SetSpte]:
        """The entries of shadow pages that were set, without the driver's own."""
        return self.events(SetSpte)

    @property
    def pages(self) -> list[GetPage]:
        """The shadow pages that were looked up or made, roots too, without the driver's own."""
        return self.events(GetPage)


def _qword(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _segment(segment: Any, selector: int, kind: int, dpl: int, *, long: int = 0, db: int = 0) -> None:
    segment.base, segment.limit, segment.selector, segment.type, segment.s = 0, 0xFFFFFFFF, selector, kind, 1
    segment.present, segment.dpl, segment.db, segment.l, segment.g, segment.unusable = 1, dpl, db, long, 1, 0


class MmuLab:
    """The laboratory; see the module's text.  It belongs to the thread that made it: others get BusyError.

    `slots`: the caller's memory, slot numbers 1, 2, …; by default 32 MiB at 16 MiB.  `trace`: whether accesses are
    traced; without, `records` are empty, and neither root nor tracefs is needed.  `events`: what is traced, by default
    all of kvm_trace.EVENTS; exits are, always.  `cpuid`: entries of the guest's CPUID, by default those KVM supports.
    `buffer_size`: of the trace, bytes per CPU.

    Lacking, HostError, UnsupportedError: the host cannot do this.  ArgumentError: a slot that cannot be.
    """

    def __init__(
        self,
        slots: Sequence[LabSlot] | None = None,
        *,
        trace: bool = True,
        events: Iterable[str] | None = None,
        cpuid: Any = None,
        buffer_size: int = 8 << 20,
    ) -> None:
        from contextlib import ExitStack

        from ..host import Mapping
        from ..kvm import Kvm

        self._stack = ExitStack()
        self._tid = threading.get_native_id()
        #: The caller's slots; lab.slots[i] is slot number i + 1 of the VM.
        self.slots: tuple[LabSlot, ...] = tuple(slots) if slots is not None else (LabSlot(16 * MiB, 32 * MiB),)
        self._memory: list[tuple[int, int, Mapping, int]] = []  # gpa, end, mapping, its hva
        self._pagemap: PageMap | None = None
        for slot in self.slots:
            if slot.fill and not slot.populate:
                raise ArgumentError("LabSlot", "fill", True, "False where populate is: what is filled is in memory")
        try:
            self.kvm = self._stack.enter_context(Kvm())
            # Before the VM, for what is entered last is left first.
            for slot in (LabSlot(0, _DRIVER_SIZE, fill=False), *self.slots):
                self._make_memory(
                    slot, self._stack.enter_context(Mapping(None, slot.size, shared=False, align=2 * MiB))
                )
            self._small = self._stack.enter_context(Mapping(None, PAGE_SIZE))
            #: The VM and its vCPU, for calls that the lab has none for.
            self.vm = self._stack.enter_context(self.kvm.create_vm())
            self._trace: KvmTrace | None = None
            if trace:
                if events is not None:
                    events = dict.fromkeys((*events, _EXIT))
                self._trace = self._stack.enter_context(KvmTrace(events, buffer_size=buffer_size))
                self._trace.pause()
                if _ELEMENT in self._trace.events:
                    self._trace.filter(_ELEMENT, " && ".join(f"pte != {entry:#x}" for entry in _DRIVER_ENTRIES))
            self.vm.set_tss_addr(0xFFFBD000)
            for at, slot in enumerate((LabSlot(0, _DRIVER_SIZE), *self.slots)):
                self.vm.set_user_memory_region(at, slot.gpa, self._memory[at][2], flags=slot.flags)
            self.vcpu = self._stack.enter_context(self.vm.create_vcpu())
            self.vcpu.set_cpuid2(self.kvm.supported_cpuid() if cpuid is None else cpuid)
            self._write_driver()
        except BaseException:
            self._stack.close()
            raise
        #: Records of the last `run` that came behind its last access: what the functions called after it did.
        self.trailing: tuple[Event, ...] = ()
        #: Control registers of the accesses from now on; a change makes KVM look for roots anew.
        self.cr0, self.cr3, self.cr4, self.efer = _CR0, _ROOT, _CR4, _EFER
        self._template = ffi.new("struct kvm_sregs *", self.vcpu.sregs[0])
        self._regs = ffi.new("struct kvm_regs *")
        self._now: tuple[object, ...] | None = None  # the sregs the vCPU has, if known
        self._cached: dict[tuple[object, ...], Any] = {}
        self._next_table = _FREE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.vm.closed:
            return "<MmuLab closed>"
        return f"<MmuLab, {len(self.slots)} slots, CR3 {self.cr3:#x}>"

    def close(self) -> None:
        """Give back the VM, its memory and the trace.  Any number of calls."""
        self._stack.close()

    @property
    def trace(self) -> KvmTrace | None:
        """The trace of the lab's thread, or None: for its `events`.  It is paused but within `run` and `enter`."""
        return self._trace

    # ---- memory ----

    def mapping(self, slot: int) -> Mapping:
        """The host's memory of slot number `slot` (0: the driver's), for what the lab has no call for (advise, …)."""
        return self._memory[slot][2]

    def _make_memory(self, what: LabSlot, memory: Mapping) -> None:
        memory.advise("hugepage" if what.huge else "nohugepage")
        memory.advise("dontfork")  # a child would have the pages write-protected
        if what.populate:
            memory.populate()
        if what.fill:
            rest = b"\xee" * (PAGE_SIZE - 8)
            for start in range(0, what.size, MiB):
                size = min(MiB, what.size - start)
                memory.write(start, b"".join(_qword(what.gpa + start + at) + rest for at in range(0, size, PAGE_SIZE)))
        self._memory.append((what.gpa, what.gpa + what.size, memory, int(memory.hva)))

    def _find(self, call: str, gpa: int, size: int) -> tuple[Mapping, int, int]:
        number(call, "gpa", gpa)
        for first, end, memory, hva in self._memory:
            if first <= gpa < end:
                if gpa + size > end:
                    raise ArgumentError(call, "size", size, f"up to {end - gpa:#x}: the slot's rest")
                return memory, gpa - first, hva
        raise ArgumentError(call, "gpa", gpa, "a guest physical address in a slot")

    def read(self, gpa: int, size: int) -> bytes:
        """Bytes of guest memory, which lie in one slot.  ArgumentError: they do not."""
        memory, offset, _ = self._find("MmuLab.read", gpa, size)
        return memory.read(offset, size)

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory from outside: KVM does not see it, and keeps shadow pages made before; see flush()."""
        memory, offset, _ = self._find("MmuLab.write", gpa, len(data))
        memory.write(offset, data)

    def read_entry(self, gpa: int) -> int:
        """The 8 bytes at `gpa` as a number."""
        return int.from_bytes(self.read(gpa, 8), "little")

    def write_entry(self, gpa: int, value: int) -> None:
        """Write a number as 8 bytes at `gpa`, as write() does."""
        self.write(gpa, _qword(value))

    def view(self, slot: int) -> memoryview:
        """The memory of slot number `slot` (0: the driver's), read-only, without copying; it keeps the lab's memory."""
        return self._memory[slot][2].view()

    def hva(self, gpa: int) -> int:
        """The host's virtual address of `gpa`."""
        _, offset, hva = self._find("MmuLab.hva", gpa, 1)
        return hva + offset

    def pfn(self, gpa: int) -> int | None:
        """The host's page frame that is at `gpa` now, by /proc/self/pagemap; None: no page is, or it does not say."""
        return self._pages().entry(self.hva(gpa)).pfn

    def pfns(self, slot: int) -> list[int]:
        """The host's page frames of all pages of slot number `slot` now; 0 where none is, or it may not be told."""
        first, end, _, hva = self._memory[slot]
        return [word & _PFN if word >> 63 else 0 for word in self._pages().words(hva, end - first)]

    def huge(self, slot: int) -> set[int]:
        """The guest frames, multiples of 512, of slot number `slot` that the host maps as 2 MiB now (PAGEMAP_SCAN)."""
        from ..host.pagemap import Category

        first, end, _, hva = self._memory[slot]
        found: set[int] = set()
        for region in self._pages().scan(hva, hva + end - first, mask=Category.HUGE | Category.PRESENT).regions:
            gfns = range((first + region.start - hva) >> 12, (first + region.end - hva) >> 12)
            found.update(gfn for gfn in gfns if gfn % 512 == 0 and gfn + 512 <= gfns.stop)
        return found

    def _pages(self) -> PageMap:
        from ..host.pagemap import PageMap

        if self._pagemap is None:
            self._pagemap = self._stack.enter_context(PageMap())
        return self._pagemap

    def discard(self, gpa: int, size: int) -> None:
        """Give the host's memory of these pages back: they are zeros without a frame until the next access."""
        memory, offset, _ = self._find("MmuLab.discard", gpa, size)
        memory.discard(offset, size)

    def set_flags(self, slot: int, flags: int) -> None:
        """Change a slot's flags: KVM_MEM_LOG_DIRTY_PAGES 1 may come and go; KVM refuses others (KvmError)."""
        first, _, memory, _ = self._memory[slot]
        self.vm.set_user_memory_region(slot, first, memory, flags=flags)

    def flush(self) -> None:
        """Make KVM drop all shadow pages: a slot is made and deleted, for which it zaps them all."""
        self.vm.set_user_memory_region(_FLUSH_SLOT, _FLUSH_GPA, self._small)
        self.vm.delete_memory_region(_FLUSH_SLOT)

    # ---- guest page tables ----

    @property
    def root(self) -> int:
        """The gpa of a PML4 in the driver's slot, which cr3 is at first; entries 0 to 510 are the caller's."""
        return _ROOT

    def link(self, root: int) -> None:
        """Write entry 511 of the PML4 at gpa `root`, by which the driver is mapped: every CR3 used must have it."""
        self.write_entry((root & ~0xFFF) + 8 * _INDEX, _PDPT | _TABLE)

    def map(self, gva: int, gpa: int, flags: int = _P | _RW | _US, *, level: int = 1) -> int:
        """Map the page at `gva` to `gpa` with the bits `flags`, in the tables of `root`; the gpa of the entry written.

        `level` 2: a page of 2 MiB.  Tables that lack are made in the driver's slot, permitting all, A set.
        """
        call = "MmuLab.map"
        number(call, "level", level, 2, 1)
        table = _ROOT
        for at in range(4, level, -1):
            where = table + 8 * (gva >> 12 + 9 * (at - 1) & 511)
            entry = self.read_entry(where)
            if not entry & _P:
                if self._next_table >= _DRIVER_SIZE:
                    raise ArgumentError(call, "gva", gva, "no more tables: the driver's slot is full")
                entry = self._next_table | _TABLE
                self.write(self._next_table, bytes(PAGE_SIZE))
                self._next_table += PAGE_SIZE
                self.write_entry(where, entry)
            elif at == 2 and entry & _PS:
                raise ArgumentError(call, "gva", gva, "an address that no page of 2 MiB maps")
            table = entry & 0xFFFFF_FFFFF000
        where = table + 8 * (gva >> 12 + 9 * (level - 1) & 511)
        self.write_entry(where, gpa | flags | (_PS if level > 1 else 0))
        return where

    def _write_driver(self) -> None:
        write = self.write
        write(_PDPT, _qword(_PD | _TABLE))
        write(_PD, _qword(_LARGE) + _qword(_LARGE | _US))
        self.link(_ROOT)
        tss = DRIVER + _TSS
        low = _TSS_LIMIT | (tss & 0xFFFFFF) << 16 | 0x8B << 40 | (tss >> 24 & 0xFF) << 56
        write(_GDT, b"".join(map(_qword, (*_GDT_WORDS, low, tss >> 32))))
        write(_TSS + 4, _qword(DRIVER + _STACK_END))  # RSP0
        write(_TSS + 0x66, _IOMAP.to_bytes(2, "little"))
        for vector in range(32):
            handler = DRIVER + _HANDLERS + 16 * vector
            gate = handler & 0xFFFF | 8 << 16 | 0x8E00 << 32 | (handler >> 16 & 0xFFFF) << 48
            write(_IDT + 16 * vector, _qword(gate) + _qword(handler >> 32))
            write(_HANDLERS + 16 * vector, bytes((0xE6, vector, 0xF4)))
        for kind, stub in _STUB.items():
            write(stub, bytes.fromhex(_CODE[kind]) + b"\xee\xf4")

    def stub(self, kind: str, *, user: bool = True) -> int:
        """Where the driver's instruction of an access of this kind is (not "fetch", which is wherever it is)."""
        if kind not in _CODE or kind == "fetch":
            raise ArgumentError("MmuLab.stub", "kind", kind, ", ".join(name for name in _CODE if name != "fetch"))
        return DRIVER + (_USER if user else 0) + _STUB[kind]

    # ---- running ----

    def _check_thread(self, call: str) -> None:
        if threading.get_native_id() != self._tid:
            raise BusyError(call, "MmuLab", "it belongs to the thread that made it, whose events are traced")

    def sregs(self, user: bool) -> Any:
        """A struct kvm_sregs as the accesses have it, with the control registers of now."""
        sregs = ffi.new("struct kvm_sregs *", self._template[0])
        if user:
            _segment(sregs.cs, 0x23, 0xB, 3, long=1)
        else:
            _segment(sregs.cs, 0x08, 0xB, 0, long=1)
        for name in ("ds", "es", "fs", "gs", "ss"):
            _segment(getattr(sregs, name), 0x1B if user else 0x10, 3, 3 if user else 0, db=1)
        _segment(sregs.tr, _TSS_SELECTOR, 0xB, 0)
        sregs.tr.s, sregs.tr.g, sregs.tr.limit, sregs.tr.base = 0, 0, _TSS_LIMIT, DRIVER + _TSS
        sregs.gdt.base, sregs.gdt.limit = DRIVER + _GDT, 8 * len(_GDT_WORDS) + 15
        sregs.idt.base, sregs.idt.limit = DRIVER + _IDT, 32 * 16 - 1
        sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer = self.cr0, 0, self.cr3, self.cr4, self.efer
        return sregs

    @property
    def pkru(self) -> int:
        """The guest's PKRU: two bits for each protection key.  UnsupportedError on setting it: the guest has none."""
        offset, area = self._pkru_offset(), ffi.buffer(self.vcpu.xsave)
        if offset is None or not area[_XSTATE_BV + 1][0] & 1 << _PKRU - 8:
            return 0
        return int.from_bytes(area[offset : offset + 4], "little")

    @pkru.setter
    def pkru(self, value: int) -> None:
        number("MmuLab.pkru", "value", value, (1 << 32) - 1)
        offset = self._pkru_offset()
        if offset is None:
            raise UnsupportedError(errno.EOPNOTSUPP, "MmuLab.pkru", "cpuid", None, "a guest with protection keys")
        xsave = self.vcpu.xsave
        area = ffi.buffer(xsave)
        area[_XSTATE_BV + 1] = bytes((area[_XSTATE_BV + 1][0] | 1 << _PKRU - 8,))
        area[offset : offset + 4] = value.to_bytes(4, "little")
        self.vcpu.xsave = xsave

    def _pkru_offset(self) -> int | None:
        found = [leaf.ebx for leaf in self.vcpu.get_cpuid2() if (leaf.function, leaf.index) == (0xD, _PKRU)]
        return found[0] if found and found[0] else None

    def load_registers(self, *, user: bool = True) -> None:
        """Give the vCPU the control registers of now at once, and not with the next access.  KvmError: KVM refuses."""
        self._check_thread("MmuLab.load_registers")
        self._set_sregs(user)

    def run(self, program: Iterable[Access | Poke | Callable[[], object]]) -> list[Outcome]:
        """Make these accesses one after the other, and say what became of each.

        A function in `program` is called between the accesses (to change slots, control registers, the host's memory);
        its records are the next access', or `trailing`.

        BusyError: another thread's lab.  TraceLost: the kernel lost records; the accesses were made all the same, and
        what they changed is changed.  KvmError: KVM refuses the control registers.  ArgumentError: an access is none.
        """
        self._check_thread("MmuLab.run")
        found: list[Outcome] = []
        left = list(program)
        for item in left:
            if type(item) is Access:
                number("Access", "gva", item.gva)
                if item.kind not in _CODE or (item.user and item.kind in _SUPERVISOR_KINDS):
                    raise ArgumentError("Access", "kind", item.kind, f"{', '.join(_CODE)}; of CPL 0 where privileged")
            elif type(item) is not Poke and not callable(item):
                raise ArgumentError("MmuLab.run", "program", item, "Access, Poke and functions")
        self.trailing = ()
        for start in range(0, len(left), _CHUNK):
            found += self._run_chunk(left[start : start + _CHUNK])
        return found

    def enter(self, sregs: Any, regs: Any, timeout: float = _TIMEOUT) -> tuple[Exit, list[Event]]:
        """Enter the guest once with these registers (struct kvm_sregs *, struct kvm_regs *): the exit, and all records.

        For states that `run` has no accesses for; `sregs()` gives one to begin with, and `out_gpa` is code that leaves.
        KvmError: KVM refuses them.  TraceLost.
        """
        self._check_thread("MmuLab.enter")
        self._now = None
        self.vcpu.sregs = sregs
        self.vcpu.regs = regs
        if self._trace is None:
            return self.vcpu.run(timeout), []
        self._trace.resume()
        try:
            exit = self.vcpu.run(timeout)
        finally:
            self._trace.pause()
            records = self._trace.read()
        return exit, records

    def need_walks(self) -> bool:
        """Whether KVM walks the guest's tables for every access of CPL 0, as kvm_pvm does, and not for the first to a
        page only; `Lacking` where it does not walk for the first one of CPL 3: where there is EPT or NPT.

        It maps a page of the first slot at 4 MiB in the tables of `root`.  TraceLost: it was, twenty times.
        """
        if self._trace is None or "kvmmmu:kvm_mmu_pagetable_walk" not in self._trace.events:
            raise Lacking("a trace of walks")
        gva, registers = 0x40_0000, (self.cr0, self.cr3, self.cr4, self.efer)
        self.cr0, self.cr3, self.cr4, self.efer = _CR0, _ROOT, _CR4, _EFER
        try:
            self.map(gva, self.slots[0].gpa)
            for left in reversed(range(20)):
                self.flush()
                try:
                    user, *supervisor = self.run([Access(gva), Access(gva, user=False), Access(gva, user=False)])
                    break
                except TraceLost:
                    if not left:
                        raise
        finally:
            self.cr0, self.cr3, self.cr4, self.efer = registers
        if not user.own:
            raise Lacking("KVM does not walk the guest's tables for each page: the processor does (EPT, NPT)")
        return all(seen.own for seen in supervisor)

    @property
    def out_gpa(self) -> int:
        """The gpa of OUT DX, AL; HLT in the driver's slot, below 64 KiB: code of any mode that leaves by an exit."""
        return _STUBS + 16 * list(_CODE).index("fetch")

    def translate(self, gvas: Iterable[int]) -> list[int | None]:
        """KVM_TRANSLATE of each, by the registers that the vCPU has: the gpa, or None; sets A as a read of CPL 0 does.

        The control registers of now are set before.  KvmError.
        """
        self._check_thread("MmuLab.translate")
        self._set_sregs(False)
        self._regs.rip, self._regs.rflags = DRIVER + _STUBS, _RFLAGS
        self.vcpu.regs = self._regs
        data, fd, call = ffi.new("struct kvm_translation *"), self.vcpu.fd, lib.kvm_translate
        found: list[int | None] = []
        for gva in gvas:
            data.linear_address = gva
            error = call(fd, data)
            if error:
                raise KvmError(-error, "KVM_TRANSLATE", "linear_address", gva)
            found.append(data.physical_address if data.valid else None)
        return found

    def _set_sregs(self, user: bool) -> None:
        state = (user, self.cr0, self.cr3, self.cr4, self.efer)
        if self._now != state:
            self._now = None
            sregs = self._cached.get(state)
            if sregs is None:
                if len(self._cached) > 64:
                    self._cached.clear()
                sregs = self._cached[state] = self.sregs(user)
            self.vcpu.sregs = sregs
            self._now = state

    def _run_chunk(self, items: list[_Item]) -> list[Outcome]:
        trace = self._trace
        if trace is None:
            return [Outcome(access, *result[:4], ()) for access, result in self._do(items)]
        trace.resume()
        try:
            seen = self._do(items)
        except BaseException:
            trace.pause()
            with suppress(TraceLost):
                trace.read_raw()  # it is nobody's
            raise
        trace.pause()
        return self._give(trace, seen, trace.read_raw())

    def _do(self, items: list[_Item]) -> list[tuple[Access, _Result]]:
        seen: list[tuple[Access, _Result]] = []
        try:
            for item in items:
                if isinstance(item, Access):
                    seen.append((item, self._one(item)))
                elif isinstance(item, Poke):
                    self.write(item.gpa, item.data)
                else:
                    item()
        except BaseException:
            self._recover()  # where it was interrupted, nobody knows
            raise
        return seen

    def _one(self, access: Access) -> _Result:
        from ..kvm.exits import Interrupted, IoOut, MmioRead, MmioWrite

        vcpu, regs, user, kind = self.vcpu, self._regs, access.user, access.kind
        self._set_sregs(user)
        base = DRIVER + _USER if user else DRIVER
        regs.rip = access.gva if kind == "fetch" else base + _STUB[kind]
        regs.rdi, regs.rax, regs.rdx, regs.rsp = access.gva, access.value, _DONE, base + _STACK_END - 0x100
        regs.rflags = _RFLAGS | (_RFLAGS_AC if access.ac else 0)
        vcpu.regs = regs
        exits = 0
        mmio: list[tuple[int, int, bool]] = []
        fault: Fault | None = None
        while True:
            exit = vcpu.run(_TIMEOUT)
            if type(exit) is IoOut:
                exits += 1
                now = vcpu.regs
                if exit.port == _DONE:
                    if kind == "cr3":
                        self.cr3 = access.gva
                        self._now = (user, self.cr0, access.gva, self.cr4, self.efer)
                    return (now.rax, None, tuple(mmio), None, exits)
                fault = self._fault(exit.port, now)
                self._now = None
                return (None, fault, tuple(mmio), None, exits)
            if type(exit) is MmioRead:
                exits += 1
                mmio.append((exit.gpa, exit.size, False))
                vcpu.answer(b"\xff" * exit.size)
            elif type(exit) is MmioWrite:
                exits += 1
                mmio.append((exit.gpa, len(exit.data), True))
            elif exit == Interrupted("signal"):
                continue
            else:
                exits += not isinstance(exit, Interrupted)
                self._recover()
                return (None, None, tuple(mmio), exit, exits)

    def _fault(self, vector: int, regs: Any) -> Fault:
        # The handler of `vector` has left; RSP is at what was pushed last.
        at = regs.rsp - DRIVER
        if at >= _USER:
            at -= _USER
        words = [self.read_entry(at), self.read_entry(at + 8)]
        code = words.pop(0) if vector in _WITH_ERROR_CODE else None
        return Fault(vector, code, int(self.vcpu.sregs.cr2), words[0])

    def _recover(self) -> None:
        # After an exit that is none of the driver's, or an exception anywhere: nothing may be pending, or it would end
        # upon the state of the next access.
        self._now = None
        for _ in range(8):  # an instruction may have several exits
            with suppress(HvError):
                self.vcpu.answer(0)
            with suppress(HvError):
                self.vcpu.complete_io()
            if not self.vcpu.has_exit_pending:
                break
            with suppress(HvError):
                self.vcpu.run(_TIMEOUT)  # takes the exit, and does not enter
        events = self.vcpu.vcpu_events
        clear = ffi.new("struct kvm_vcpu_events *")
        clear.flags = events.flags & ~lib.KVM_VCPUEVENT_VALID_SHADOW
        try:
            self.vcpu.vcpu_events = clear
            self.vcpu.mp_state = ffi.new("struct kvm_mp_state *", {"mp_state": lib.KVM_MP_STATE_RUNNABLE})
        except HvError:
            pass  # what cannot be cleared is seen by the next access

    def _is_ours(self, event: UnmapHvaRange) -> bool:
        # Whether a range of addresses is of the guest's memory.
        return any(event.start < hva + last - gpa and hva < event.end for gpa, last, _, hva in self._memory)

    def _give(self, trace: KvmTrace, seen: list[tuple[Access, _Result]], records: list[Any]) -> list[Outcome]:
        # Splits the records at the exits; those before are what came behind the last access of the chunk before.
        found: list[Outcome] = []
        kept: list[Event] = list(self.trailing)
        events = map(trace.event, records)
        for access, (value, fault, mmio, stop, nr_exits) in seen:
            left = nr_exits
            while left:
                event = next(events, None)
                if event is None:
                    raise TraceLost(None, "fewer exits than KVM_RUN returned")
                if self._is_kept(event):
                    kept.append(event)
                    left -= type(event) is UserspaceExit
            found.append(Outcome(access, value, fault, mmio, stop, tuple(kept)))
            kept = []
        kept += filter(self._is_kept, events)
        if any(type(event) is UserspaceExit for event in kept):
            raise TraceLost(None, "more exits than KVM_RUN returned")
        self.trailing = tuple(kept)
        return found

    def _is_kept(self, event: Event) -> bool:
        if isinstance(event, UserspaceExit):
            return event.errno != -errno.EINTR  # interrupted: no exit of the guest
        return not isinstance(event, UnmapHvaRange) or self._is_ours(event)
