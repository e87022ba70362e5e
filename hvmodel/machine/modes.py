"""The modes that a machine's vCPU starts in, beside real mode: protected, virtual-8086, long, compatibility.

Owns where their tables lie in RAM, and the registers that go with them.  `start` is the `tables` of the calls:

    start + 0x0000  GDT       see SELECTORS: the same places in every mode
          + 0x1000  IDT       where handlers are given; without, IDTR has limit 0, and any exception is a triple fault
          + 0x2000  TSS       and the I/O permission bitmap behind it
          + 0x5000  stack     of CPL 0 where it is entered from CPL 3: ESP0 or RSP0 is its end, 0x6000
          + 0x6000  page tables, where paging is on and they are not the caller's

By default that is the end of the last RAM below 4 GiB.  The page tables made here map the first 4 GiB, and all RAM
above, to themselves; with `user`, CPL 3 may use all of that but the tables.  A is set in their entries, so that walks
do not write to the tables to set it; D is clear, for KVM may count a page as written that it finds D set for.

A call looks at everything first, writes the tables, then sets sregs, regs, pending events (none) and MP state
(runnable).  Where one of these is refused, or KVM drops CR0.PG as kvm_pvm does outside long mode, memory and vCPU are
as before.

Sources: Intel SDM vol. 3 sections 3.4 (segments), 5.1 (paging modes), 8.2 and 8.7 (TSS), 10.8.5 (IA-32e mode), 21.2
(virtual-8086 mode); linux:arch/x86/kvm/x86.c __set_sregs@v6.18.
"""

from __future__ import annotations

from ..arch.cpuid import has_feature, max_phys_bits
from ..arch.number import number
from ..arch.paging import PageTables
from ..arch.registers import is_canonical
from ..arch.segment import Descriptor, real_mode_segment
from ..arch.tables import DescriptorTable, Idt, io_bitmap, tss32, tss64
from ..errors import ArgumentError, ArgumentTypeError, ChangedStateError, HvError
from ..state.values import DTable, Regs, Segment, Sregs
from ..units import PAGE_SIZE, GiB, MiB, align_down, align_up
from ..value import Value
from .cpu import _real_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Literal

    from ..arch.paging import Mode
    from ..arch.tables import Ports
    from ..kvm.cpuid import CpuidEntry
    from ..ram.flatview import FlatRange
    from .cpu import Cpu
    from .machine import Machine

__all__ = ["SELECTORS", "ModeTables", "long_mode", "protected_mode", "vm86_mode"]

_GDT, _IDT, _TSS, _STACK, _PAGES = 0x0000, 0x1000, 0x2000, 0x5000, 0x6000

# name: (selector, bits, whether code).  The first five stand as SYSCALL and SYSRET want them.
_SEGMENTS = {
    "code": (0x08, None, True),  # 64 bits in long mode, else 32
    "data": (0x10, 32, False),
    "user_code32": (0x18 | 3, 32, True),
    "user_data": (0x20 | 3, 32, False),
    "user_code64": (0x28 | 3, 64, True),  # in long mode
    "code32": (0x30, 32, True),
    "code16": (0x38, 16, True),
    "data16": (0x40, 16, False),
    "user_code16": (0x48 | 3, 16, True),
    "user_data16": (0x50 | 3, 16, False),
}
_TASK = 0x58
_TSS_SIZE = 0x68  # of a TSS without its bitmap
SELECTORS: dict[str, int] = {name: row[0] for name, row in _SEGMENTS.items()} | {"task": _TASK}
"""The selectors of the GDT by name.  "code" is that of CPL 0: of 64 bits in long mode, else of 32."""

_DATA_SEGMENTS = ("ds", "es", "fs", "gs", "ss")

_CR0_PE, _CR0_MP, _CR0_ET, _CR0_NE, _CR0_WP, _CR0_PG = 1 << 0, 1 << 1, 1 << 4, 1 << 5, 1 << 16, 1 << 31
_CR4_PSE, _CR4_PAE, _CR4_OSFXSR, _CR4_OSXMMEXCPT, _CR4_LA57 = 1 << 4, 1 << 5, 1 << 9, 1 << 10, 1 << 12
_EFER_LME, _EFER_LMA, _EFER_NXE = 1 << 8, 1 << 10, 1 << 11
_RFLAGS_FIXED, _RFLAGS_VM = 1 << 1, 1 << 17
_PAGING_CR4 = {"32bit": _CR4_PSE, "pae": _CR4_PAE, "4level": _CR4_PAE, "5level": _CR4_PAE | _CR4_LA57}


class ModeTables(Value):
    """Where a mode's tables lie, [start, start + size): gpas, which are linear addresses too.

    `idt`: None without handlers.  `kernel_stack`: the end of the stack of CPL 0 when entered from CPL 3.  `cr3`: the
    root of the page tables, which are the caller's where `pages` was given, or None without paging.
    """

    start: int
    size: int
    gdt: int
    idt: int | None
    tss: int
    kernel_stack: int
    cr3: int | None


class _Mode(Value):
    # What a call asks for, after the checks of its own arguments.
    call: str
    bits: int  # of the code: 16, 32, 64
    long: bool
    user: bool
    paging: Mode | None
    pages: PageTables | None
    handlers: Mapping[int, int] | Idt | None
    bitmap: bytes  # I/O permissions
    tables: int | None


# ---- the three calls ----


def long_mode(
    cpu: Cpu,
    entry: int,
    *,
    stack: int | None,
    user: bool,
    bits: Literal[64, 32, 16],
    levels: Literal[4, 5],
    pages: PageTables | None,
    handlers: Mapping[int, int] | Idt | None,
    ports: Ports,
    tables: int | None,
) -> ModeTables:
    """Put a vCPU into long mode: see Cpu.long_mode."""
    call = "Cpu.long_mode"
    _one_of(call, "bits", bits, (64, 32, 16))
    _one_of(call, "levels", levels, (4, 5))
    _one_of(call, "user", user, (False, True))
    _check_pages(call, pages, ("4level", "5level"))
    if pages is not None and levels == 5 and pages.mode != "5level":
        raise ArgumentError(call, "levels", levels, "4, as `pages`")
    paging: Mode = "5level" if (pages.mode == "5level" if pages else levels == 5) else "4level"
    mode = _Mode(call, bits, True, user, paging, pages, handlers, io_bitmap(ports, call), tables)
    return _start(cpu, mode, entry, stack)


def protected_mode(
    cpu: Cpu,
    entry: int,
    *,
    stack: int | None,
    user: bool,
    bits: Literal[32, 16],
    paging: Literal["32bit", "pae"] | None,
    pages: PageTables | None,
    handlers: Mapping[int, int] | Idt | None,
    ports: Ports,
    tables: int | None,
) -> ModeTables:
    """Put a vCPU into protected mode: see Cpu.protected_mode."""
    call = "Cpu.protected_mode"
    _one_of(call, "bits", bits, (32, 16))
    _one_of(call, "paging", paging, (None, "32bit", "pae"))
    _one_of(call, "user", user, (False, True))
    _check_pages(call, pages, ("32bit", "pae"))
    if pages is not None:
        if paging not in (None, pages.mode):
            raise ArgumentError(call, "paging", paging, f"{pages.mode!r}, as `pages`, or None")
        paging = "pae" if pages.mode == "pae" else "32bit"
    mode = _Mode(call, bits, False, user, paging, pages, handlers, io_bitmap(ports, call), tables)
    return _start(cpu, mode, entry, stack)


def vm86_mode(
    cpu: Cpu,
    entry: int,
    *,
    cs: int | None,
    sp: int,
    iopl: int,
    handlers: Mapping[int, int] | Idt | None,
    ports: Ports,
    tables: int | None,
) -> ModeTables:
    """Put a vCPU into virtual-8086 mode: see Cpu.vm86_mode."""
    call = "Cpu.vm86_mode"
    cs, ip = _real_address(call, entry, cs, sp)
    number(call, "iopl", iopl, 3)
    mode = _Mode(call, 16, False, True, None, None, handlers, io_bitmap(ports, call), tables)
    entries = cpu.kvm.get_cpuid2()
    placed, memory = _plan(cpu, mode, entries, entry, None)
    data = Segment(**real_mode_segment(0)).replace(dpl=3)
    sregs = _sregs(cpu, mode, placed, entries).replace(
        cs=data.replace(selector=cs, base=cs << 4), **dict.fromkeys(_DATA_SEGMENTS, data)
    )
    _set(cpu, call, memory, sregs, Regs(rip=ip, rsp=sp, rflags=_RFLAGS_FIXED | _RFLAGS_VM | iopl << 12))
    return placed


def _start(cpu: Cpu, mode: _Mode, entry: int, stack: int | None) -> ModeTables:
    # All but virtual-8086 mode: segments that begin at 0 and have all there is.
    last = (1 << mode.bits) - 1
    number(mode.call, "entry", entry, last)
    if stack is not None:
        number(mode.call, "stack", stack, last if mode.bits == 64 else last + 1)
        if not stack:
            raise ArgumentError(mode.call, "stack", stack, "an address below which the stack grows, or None")
    entries = cpu.kvm.get_cpuid2()
    placed, memory = _plan(cpu, mode, entries, entry, stack)
    if stack is None:
        stack = _default_stack(mode, placed)
    regs = Regs(rip=entry, rsp=stack, rflags=_RFLAGS_FIXED)
    _set(cpu, mode.call, memory, _sregs(cpu, mode, placed, entries), regs)
    return placed


def _default_stack(mode: _Mode, placed: ModeTables) -> int:
    return placed.start if mode.bits != 16 else 0x7C00


# ---- what lies in memory ----


def _plan(
    cpu: Cpu, mode: _Mode, entries: list[CpuidEntry], entry: int, stack: int | None
) -> tuple[ModeTables, list[tuple[int, bytes]]]:
    # Where the tables go, and all that is to be written: nothing has been by then.
    machine, call = cpu._machine, mode.call
    if machine is None:
        raise ArgumentError(call, "cpu", repr(cpu), "the vCPU of a Machine", "it has no RAM to put tables into")
    _check_cpuid(mode, entries)
    start, pages, size = _place(machine, mode, entries)
    taken = [(start, start + size, "the tables")]
    memory: list[tuple[int, bytes]] = []
    if pages is not None:
        memory.append((pages.cr3, pages.image()))
        if mode.pages is not None:
            _check_ram(machine, call, "pages", pages.cr3, pages.size)
            taken.append((pages.cr3, pages.cr3 + pages.size, "the page tables"))
            if pages.cr3 < start + size and start < pages.cr3 + pages.size:
                detail = f"the page tables are at [{pages.cr3:#x}, {pages.cr3 + pages.size:#x})"
                raise ArgumentError(call, "tables", start, f"{size:#x} bytes elsewhere", detail)
            _check_identity(call, pages, start, size)
    placed = ModeTables(
        start,
        size,
        start + _GDT,
        None if mode.handlers is None else start + _IDT,
        start + _TSS,
        start + _PAGES,
        None if pages is None else pages.cr3,
    )
    memory.append((placed.gdt, _gdt(mode, placed.tss)))
    if mode.handlers is not None:
        memory.append((start + _IDT, _idt(mode)))
    memory.append((placed.tss, _tss(mode, placed)))
    _check_address(machine, mode, pages, "entry", entry, taken)
    if mode.call != "Cpu.vm86_mode":
        at = _default_stack(mode, placed) if stack is None else stack
        _check_address(machine, mode, pages, "stack", at, taken)
    return placed, memory


def _place(machine: Machine, mode: _Mode, entries: list[CpuidEntry]) -> tuple[int, PageTables | None, int]:
    # Where the tables begin, the page tables, and how much RAM they take without those of the caller.
    call, pages, size = mode.call, mode.pages, _PAGES
    own = mode.paging is not None and pages is None
    if own:
        # Two tables more where the tables are cut out of larger pages, at the start and at the end.
        size += _identity(machine, mode, entries, 0, None).size + 2 * PAGE_SIZE * mode.user
    if mode.tables is not None:
        number(call, "tables", mode.tables, (1 << 32) - size)
        if mode.tables % PAGE_SIZE:
            raise ArgumentError(call, "tables", mode.tables, "a multiple of 0x1000")
        start = mode.tables
        _check_ram(machine, call, "tables", start, size)
    else:
        found = [r for r in machine.memory.flatview if r.kind == "ram" and r.start < 4 * GiB]
        starts = [align_down(min(r.end, 4 * GiB), PAGE_SIZE) - size for r in found]
        fits = [at for at, r in zip(starts, found, strict=True) if at >= align_up(r.start, PAGE_SIZE)]
        if not fits:
            raise ArgumentError(
                call, "tables", None, f"a machine with {size:#x} bytes of RAM in one piece", "too little RAM"
            )
        start = fits[-1]
    if own:
        hole = (start, start + size) if mode.user else None
        pages = _identity(machine, mode, entries, start + _PAGES, hole)
    return start, pages, size


def _identity(
    machine: Machine, mode: _Mode, entries: list[CpuidEntry], root: int, hole: tuple[int, int] | None
) -> PageTables:
    # The first 4 GiB and all RAM above mapped to themselves, but for `hole` open to CPL 3 if the mode is.
    assert mode.paging is not None
    pages = PageTables(root, mode.paging, maxphyaddr=max(32, min(52, max_phys_bits(entries))), accessed=True)
    high = max((r.end for r in machine.memory.flatview if r.kind in ("ram", "rom")), default=0)
    end = align_up(high, 2 * MiB) if mode.long and high > 4 * GiB else 4 * GiB
    if hole is None:
        pages.map(0, 0, end, user=mode.user)
        return pages
    for first, last, user in ((0, hole[0], True), (*hole, False), (hole[1], end, True)):
        if last > first:
            pages.map(first, first, last - first, user=user)
    return pages


def _gdt(mode: _Mode, tss: int) -> bytes:
    gdt = DescriptorTable()
    for name, (selector, bits, _) in _SEGMENTS.items():
        if bits != 64 or mode.long:
            gdt.set(selector, _flat(name, mode.long))
    gdt.set(_TASK, _task(mode, tss))
    return bytes(gdt)


def _flat(name: str, long: bool) -> Descriptor:
    selector, bits, is_code = _SEGMENTS[name]
    if is_code:
        return Descriptor.code(bits or (64 if long else 32), dpl=selector & 3)
    return Descriptor.data(bits or 32, dpl=selector & 3)


def _task(mode: _Mode, tss: int, *, busy: bool = False) -> Descriptor:
    limit = _TSS_SIZE + len(mode.bitmap) - 1
    return Descriptor.tss(tss, limit, bits=64 if mode.long else 32, busy=busy)


def _idt(mode: _Mode) -> bytes:
    bits = 64 if mode.long else 32
    if isinstance(mode.handlers, Idt):
        if (mode.handlers.bits == 64) != mode.long:
            accepted = f"a table of {'64' if mode.long else '32- or 16'}-bit gates"
            raise ArgumentError(mode.call, "handlers", mode.handlers, accepted)
        return bytes(mode.handlers)
    if mode.handlers is None or not hasattr(mode.handlers, "items"):
        accepted = "an Idt, a mapping of vectors to addresses, or None"
        raise ArgumentTypeError(mode.call, "handlers", mode.handlers, accepted)
    idt = Idt(bits)  # type: ignore[arg-type]  # 32 or 64
    for vector, address in mode.handlers.items():
        number(mode.call, "handlers", vector, 255)
        field = f"handlers[{vector}]"
        number(mode.call, field, address, (1 << bits) - 1)
        if bits == 64 and not is_canonical(address, la57=mode.paging == "5level"):
            raise ArgumentError(mode.call, field, address, "a canonical address")
        # As Linux has it, INT3 and INTO may be used at CPL 3; other vectors by INT n of user code take an Idt.
        idt.gate(vector, address, SELECTORS["code"], dpl=3 if vector in (3, 4) else 0)
    return bytes(idt)


def _tss(mode: _Mode, placed: ModeTables) -> bytes:
    if mode.long:
        return tss64(rsp0=placed.kernel_stack) + mode.bitmap
    return tss32(esp0=placed.kernel_stack, ss0=SELECTORS["data"]) + mode.bitmap


# ---- checks ----


def _check_cpuid(mode: _Mode, entries: list[CpuidEntry]) -> None:
    # What the guest's CPUID must have.
    if mode.long and not has_feature(entries, "LM"):
        raise ArgumentError(mode.call, "cpuid", "no LM", "a vCPU with long mode", "the guest's CPUID has no LM")
    if mode.paging == "5level" and not has_feature(entries, "LA57"):
        field = "levels" if mode.pages is None else "pages"
        raise ArgumentError(
            mode.call, field, 5 if mode.pages is None else mode.pages, "4 levels", "its CPUID has no LA57"
        )
    if mode.pages is not None and mode.pages.uses_nx and not has_feature(entries, "NX"):
        raise ArgumentError(mode.call, "pages", mode.pages, "tables without NX", "the guest's CPUID has no NX")


def _check_ram(machine: Machine, call: str, field: str, start: int, size: int) -> None:
    found = machine.memory.at(start)
    if found is None or found.kind != "ram" or found.end - start < size:
        ranges = ", ".join(f"[{r.start:#x}, {r.end:#x})" for r in machine.memory.flatview if r.kind == "ram")
        raise ArgumentError(call, field, start, f"{size:#x} bytes within one of {ranges}", "not in RAM")


def _check_identity(call: str, pages: PageTables, start: int, size: int) -> None:
    # The processor reads GDT, IDT and TSS through the caller's page tables.
    for at in range(start, start + size, PAGE_SIZE):
        leaf = pages.find(at)
        if leaf is None or pages.translate(at) != at or not leaf.writable:
            detail = f"they do not map the tables at [{start:#x}, {start + size:#x}) to themselves, writable"
            raise ArgumentError(call, "pages", pages, f"with map({start:#x}, {start:#x}, {size:#x})", detail)


def _check_address(
    machine: Machine,
    mode: _Mode,
    pages: PageTables | None,
    field: str,
    address: int,
    taken: list[tuple[int, int, str]],
) -> None:
    # `entry` is fetched from, the bytes below `stack` are written.
    call, is_entry = mode.call, field == "entry"
    at = address if is_entry else address - 1
    if mode.bits == 64 and not is_canonical(at, la57=mode.paging == "5level"):
        raise ArgumentError(call, field, address, "a canonical address")
    gpa: int | None = at
    if pages is not None:
        leaf = pages.find(at)
        gpa = pages.translate(at)
        if leaf is None:
            raise ArgumentError(call, field, address, "an address that the page tables map", f"they do not map {at:#x}")
        if mode.user and not leaf.user and mode.pages is not None:
            raise ArgumentError(call, field, address, "a page with user=True", f"CPL 3 may not use {at:#x}")
        if is_entry and leaf.nx:
            raise ArgumentError(call, field, address, "a page with nx=False", f"no instruction is fetched from {at:#x}")
        if not is_entry and not leaf.writable:
            raise ArgumentError(call, field, address, "a page with writable=True", f"{at:#x} cannot be written")
    assert gpa is not None
    for first, last, what in taken:
        if first <= gpa < last:
            raise ArgumentError(
                call, field, address, f"an address outside [{first:#x}, {last:#x})", f"{what} are there"
            )
    found: FlatRange | None = machine.memory.at(gpa)
    kinds = ("ram", "rom") if is_entry else ("ram",)
    if found is None or found.kind not in kinds:
        ranges = ", ".join(f"[{r.start:#x}, {r.end:#x})" for r in machine.memory.flatview if r.kind in kinds)
        what = f"gpa {gpa:#x} is not in RAM" if gpa != address else "not in RAM"
        raise ArgumentError(
            call, field, address, f"in one of {ranges}" if is_entry else f"RAM below it: {ranges}", what
        )


def _check_pages(call: str, pages: object, modes: tuple[str, ...]) -> None:
    if pages is None:
        return
    if not isinstance(pages, PageTables):
        raise ArgumentTypeError(call, "pages", pages, "PageTables or None")
    if pages.mode not in modes:
        raise ArgumentError(call, "pages", pages, f"tables for {' or '.join(map(repr, modes))}")


def _one_of(call: str, field: str, value: object, accepted: tuple[object, ...]) -> None:
    # 4.0 and True are equal to numbers, and none.
    if not any(type(value) is type(one) and value == one for one in accepted):
        raise ArgumentError(call, field, value, ", ".join(map(repr, accepted)))


# ---- registers ----


def _loaded(descriptor: Descriptor, selector: int) -> Segment:
    return Segment(**descriptor.to_kvm(selector))


def _sregs(cpu: Cpu, mode: _Mode, placed: ModeTables, entries: list[CpuidEntry]) -> Sregs:
    user = "user_" if mode.user else ""
    # CPL 0 has one selector for the widest code of the mode.
    is_widest = mode.bits == (64 if mode.long else 32)
    code = "code" if is_widest and not mode.user else f"{user}code{mode.bits}"
    data = f"{user}data16" if mode.bits == 16 else f"{user}data"
    cr0, cr4, efer = _CR0_PE | _CR0_MP | _CR0_ET | _CR0_NE, 0, 0
    if has_feature(entries, "FXSR") and has_feature(entries, "SSE"):
        cr4 = _CR4_OSFXSR | _CR4_OSXMMEXCPT
    if mode.paging is not None:
        cr0 |= _CR0_PG | _CR0_WP
        cr4 |= _PAGING_CR4[mode.paging]
        if mode.paging != "32bit" and has_feature(entries, "NX"):
            efer = _EFER_NXE
    if mode.long:
        efer |= _EFER_LME | _EFER_LMA
    return Sregs(
        cs=_loaded(_flat(code, mode.long), SELECTORS[code]),
        **dict.fromkeys(_DATA_SEGMENTS, _loaded(_flat(data, mode.long), SELECTORS[data])),
        tr=_loaded(_task(mode, placed.tss, busy=True), _TASK),
        ldt=Segment(unusable=1),
        gdt=DTable(base=placed.gdt, limit=len(_gdt(mode, placed.tss)) - 1),
        idt=DTable() if placed.idt is None else DTable(base=placed.idt, limit=len(_idt(mode)) - 1),
        cr0=cr0,
        cr3=placed.cr3 or 0,
        cr4=cr4,
        efer=efer,
        apic_base=cpu.sregs.apic_base,
    )


def _set(cpu: Cpu, call: str, memory: list[tuple[int, bytes]], sregs: Sregs, regs: Regs) -> None:
    # All of it, or nothing.
    kvm, machine = cpu.kvm, cpu._machine
    assert machine is not None
    kvm._complete_for_change()
    is_calm = kvm._has_calm()
    parts = ((cpu, "sregs"), (cpu, "regs"), (kvm, "vcpu_events"), (kvm, "mp_state"))
    before = [getattr(owner, name) for owner, name in parts]
    overwritten = [(gpa, machine.read(gpa, len(data))) for gpa, data in memory]
    try:
        for gpa, data in memory:  # before the registers: with PAE paging, KVM reads the tables when CR3 is set
            machine.write(gpa, data)
        cpu.sregs = sregs
        cpu.regs = regs
        if regs.rflags & _RFLAGS_VM and not (became := kvm.regs.rflags) & _RFLAGS_VM:
            detail = "it clears RFLAGS.VM: no virtual-8086 mode (kvm_pvm); real_mode() runs the same code"
            raise ChangedStateError(call, "regs", "rflags", regs.rflags, became, detail, "rflags_vm")
        cpu._begin(is_calm)
    except BaseException as error:
        for gpa, data in overwritten:
            machine.write(gpa, data)
        for (owner, name), value in zip(parts, before, strict=True):
            try:
                setattr(owner, name, value)
            except HvError as refused:  # KVM can have given what it does not take: EFER.LMA without LME
                error.add_note(f"{name} could not be put back: {refused}")
        raise
