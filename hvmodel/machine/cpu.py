"""The machine's view of a vCPU: a kvm `Vcpu` that knows the RAM it runs in.

Owns the architectural states a machine starts a vCPU in, and the answer to "where is it?".

Sources: Intel SDM vol. 3 table 10-1 (state after reset), section 21.1 (real-address mode).
"""

from __future__ import annotations

import errno

from .. import _ffi
from .._ffi import ffi, lib
from ..errors import ArgumentError, ArgumentTypeError, HvError
from ..kvm.handle import _uint
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Literal

    from .._native import kvm_sregs
    from ..arch.paging import PageTables
    from ..arch.tables import Idt, Ports
    from ..kvm import Vcpu
    from ..kvm.exits import Exit
    from ..state.events import EventQueue
    from ..state.sync import VcpuSync
    from ..state.values import Regs, Sregs
    from .debug import Breakpoint, Debugger, Watchpoint
    from .machine import Machine
    from .modes import ModeTables

__all__ = ["MAX_INSN", "Cpu", "Location", "is_64_bit_code"]

_CR0_RESET = 0x60000010  # CD, NW, ET
_REAL_MODE_END = 0x10FFF0  # FFFF:FFFF + 1, the first byte that no CS:IP reaches
MAX_INSN = 15
"""Bytes of the longest instruction."""


def _real_sregs() -> kvm_sregs:
    # Real-address mode with CS still to be set: 64 KiB segments at 0, everything that pages or protects off.
    sregs = ffi.new("struct kvm_sregs *")
    for name, kind, code_or_data in (
        ("cs", 0xB, 1),
        ("ds", 0x3, 1),
        ("es", 0x3, 1),
        ("fs", 0x3, 1),
        ("gs", 0x3, 1),
        ("ss", 0x3, 1),
        ("tr", 0xB, 0),
        ("ldt", 0x2, 0),
    ):
        segment = getattr(sregs, name)
        segment.limit, segment.type, segment.present, segment.s = 0xFFFF, kind, 1, code_or_data
    sregs.gdt.limit = sregs.idt.limit = 0xFFFF
    sregs.cr0 = _CR0_RESET
    return sregs


_REAL_SREGS = _real_sregs()
_RUNNABLE = ffi.new("struct kvm_mp_state *", [lib.KVM_MP_STATE_RUNNABLE])
_EVENT_FLAGS = lib.KVM_VCPUEVENT_VALID_NMI_PENDING | lib.KVM_VCPUEVENT_VALID_SHADOW
_EFER_LME, _EFER_LMA = 0x100, 0x400
_CR0_PG = 1 << 31
_REGS: int = lib.KVM_SYNC_X86_REGS
_SREGS: int = lib.KVM_SYNC_X86_SREGS
_SREGS_OFFSET = ffi.offsetof("struct kvm_sync_regs", "sregs")


def is_64_bit_code(sregs: Sregs | kvm_sregs) -> bool:
    """Whether a vCPU with these registers executes 64-bit code: long mode, and a code segment with CS.L."""
    return bool(sregs.efer & _EFER_LMA and sregs.cs.l)


def _real_address(call: str, entry: int, cs: int | None, sp: int) -> tuple[int, int]:
    # CS and IP that lead to a physical address, after the checks of all three.
    for field, value in (("entry", entry), ("sp", sp), ("cs", 0 if cs is None else cs)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(call, field, value, "an int")
    if not 0 <= entry < _REAL_MODE_END:
        raise ArgumentError(call, "entry", entry, f"an address that real mode reaches: 0 to {_REAL_MODE_END - 1:#x}")
    if not 0 <= sp <= 0xFFFF:
        raise ArgumentError(call, "sp", sp, "0 to 0xffff")
    if cs is None:
        cs = 0xFFFF if entry >= 0x100000 else (entry & 0xF0000) >> 4
    elif not 0 <= cs <= 0xFFFF or not 0 <= entry - (cs << 4) <= 0xFFFF:
        raise ArgumentError(call, "cs", cs, f"a paragraph from which {entry:#x} is within 64 KiB")
    return cs, entry - (cs << 4)


class Location(Value):
    """Where a vCPU is: CS selector, RIP, their linear address, and up to 15 bytes there (b"": not in RAM).

    `linear` is RIP in 64-bit code, elsewhere the low 32 bits of CS base + RIP.
    """

    cs: int
    rip: int
    linear: int
    insn: bytes


if TYPE_CHECKING:

    class _Registers:
        # The base class in native/pyrun.c.
        def _bind(self, address: int, /) -> None: ...

else:
    _Registers = _ffi.run.Registers


class Cpu(_Registers):
    """A vCPU of a Machine.

    `kvm` is the `hvmodel.kvm.Vcpu` underneath, which this object owns.  What sets state first finishes the instruction
    of the last exit (Vcpu.complete_io), and raises UnansweredError where that is an unanswered read.

    `rax` to `r15`, `rip` and `rflags` are the general registers, ints of 64 bits; `regs` and `sregs` all of them, and
    the segments and control registers, as values (hvmodel.state.Regs, Sregs) which stay as they are when the guest runs
    on.  They come along with every exit and can be read at any, unanswered reads too, at the cost of an attribute;
    after something else has changed the vCPU's state the next reading takes an ioctl.  General registers that are
    assigned go to KVM with the next run, or before any other call that has to do with the vCPU's state; `sregs` is set
    at once (KVM_SET_SREGS).  See docs/sync.md.

    Of registers: BusyError where another thread runs the vCPU, ClosedError, ForkedError, VmDeadError; of assignments
    ArgumentError and ArgumentTypeError, UnansweredError; of `sregs` RefusedStateError, which names the field, and
    ChangedStateError where KVM took it and keeps something else.  After an error they are what they were before.

    Thread safety: as Vcpu.

    >>> from hvmodel import Machine
    >>> with Machine(ram="1M") as m:
    ...     m.load(0x7C00, bytes.fromhex("b041 e610 e610 f4"))   # mov al, 'A'; out 0x10, al; out 0x10, al; hlt
    ...     m.vcpu.real_mode(entry=0x7C00)
    ...     exits = m.exits(timeout=1.0)
    ...     first, where, rax = next(exits), m.vcpu.rip, m.vcpu.rax
    ...     m.vcpu.rax = 0x42
    ...     hex(where), hex(rax), next(exits).data, m.vcpu.sregs.cs.limit
    ('0x7c04', '0x41', b'B', 65535)
    """

    if TYPE_CHECKING:
        rax: int
        rbx: int
        rcx: int
        rdx: int
        rsi: int
        rdi: int
        rsp: int
        rbp: int
        r8: int
        r9: int
        r10: int
        r11: int
        r12: int
        r13: int
        r14: int
        r15: int
        rip: int
        rflags: int
        regs: Regs
        sregs: Sregs

    def __init__(self, kvm: Vcpu, read: Callable[[int, int], bytes], machine: Machine | None = None) -> None:
        self.kvm = kvm
        self._read = read
        self._machine = machine  # whose RAM the states to start in put their tables into
        self._debugger: Debugger | None = None  # from the first breakpoint or step on, it runs the vCPU
        # Nothing pending and, where there is such a thing, out of system management mode.
        smm = lib.KVM_VCPUEVENT_VALID_SMM if kvm.vm.check_extension(lib.KVM_CAP_X86_SMM) else 0
        self._no_events = ffi.new("struct kvm_vcpu_events *", {"flags": _EVENT_FLAGS | smm})
        synced = kvm.vm.check_extension(lib.KVM_CAP_SYNC_REGS)
        # Registers ride along with every exit: no measurable cost, where asking for them costs an ioctl.
        kvm.kvm_valid_regs = synced & (_REGS | _SREGS)
        kvm._c.sync = synced
        self._bind(kvm._address)

    @property
    def id(self) -> int:
        """Its number, which is its APIC id."""
        return self.kvm.id

    def kick(self) -> bool:
        """Interrupt the running or next run; see Vcpu.kick.  Thread safety: any thread."""
        return self.kvm.kick()

    def answer(self, data: int | bytes) -> None:
        """Answer the read exit at hand; see Vcpu.answer."""
        self.kvm.answer(data)

    # ---- registers: attributes made by native/pyrun.c; here is what takes more than the kvm_run page ----

    def _fetch_register(self, offset: int) -> int:
        number = ffi.new("uint64_t *")
        self._fetch_part(_REGS, offset, number, 8)
        return int(number[0])

    def _fetch_part(self, part: int, offset: int, to: Any, size: int) -> None:
        rc = lib.hv_sync_fetch(self.kvm._c, part, offset, ffi.cast("uint8_t *", to), size)
        if rc == lib.HV_DIRTY:
            name, begin = ("regs", 0) if part == _REGS else ("sregs", _SREGS_OFFSET)
            ffi.memmove(to, self.kvm._synchronizer._read(name)[offset - begin :][:size], size)
        elif rc:
            raise self._error("KVM_GET_REGS" if part == _REGS else "KVM_GET_SREGS", rc)

    def _error(self, call: str, rc: int) -> BaseException:
        # Of a code of native/run.h, or -errno.
        kvm = self.kvm
        return kvm._run_error(rc, call) if rc <= lib.HV_CODE_BASE else kvm._refusal(call, -rc)

    def _put_register(self, offset: int, value: int) -> None:
        name = _REGISTERS[offset // 8]
        number = ffi.new("uint64_t *", _uint(f"Cpu.{name}", "value", value, 64))
        self._put_regs(offset, number, 8)

    def _put_regs(self, offset: int, data: Any, size: int) -> None:
        rc = lib.hv_regs_write(self.kvm._c, offset, ffi.cast("uint8_t *", data), size, 1)
        if rc == lib.HV_DIRTY:
            self.kvm._synchronizer._write_regs(offset, bytes(ffi.buffer(data, size)))
        elif rc:
            raise self._error("KVM_SET_REGS", rc)

    def _fetch_value(self, offset: int) -> Regs | Sregs:
        from ..state.values import Regs, Sregs

        _ffi.run.install_values(Regs, Sregs)  # from now on native/pyrun.c makes them
        part, kind = (_SREGS, Sregs) if offset else (_REGS, Regs)
        data = ffi.new("uint8_t[]", kind.SIZE)
        self._fetch_part(part, offset, data, kind.SIZE)
        return kind._of(bytes(ffi.buffer(data)))

    def _put_value(self, offset: int, value: Regs | Sregs) -> None:
        from ..state.values import Regs, Sregs

        name, kind = ("sregs", Sregs) if offset else ("regs", Regs)
        if not isinstance(value, kind):
            raise ArgumentTypeError(f"Cpu.{name}", "value", value, f"a hvmodel.state.{kind.__name__}")
        if isinstance(value, Regs):
            self._put_regs(0, ffi.from_buffer(bytes(value)), Regs.SIZE)
        elif isinstance(value, Sregs):
            self._put_sregs(value)

    def _put_sregs(self, value: Sregs) -> None:
        before, kvm = self.sregs, self.kvm
        rc = self._set_sregs(value)
        if rc == lib.HV_DIRTY:
            kvm._synchronizer._write_sregs(value)
            return
        if rc == -errno.EINVAL:
            from ..state import refusals

            raise refusals.explain(kvm, "sregs", bytes(value), errno.EINVAL, "KVM_SET_SREGS")
        if rc:
            raise self._error("KVM_SET_SREGS", rc)
        # Hosts that page in long mode only drop CR0.PG and say nothing.
        if value.cr0 & _CR0_PG and not value.efer & _EFER_LME:
            kvm._calm = None
            from ..state import refusals

            changed = refusals.dropped(kvm, "sregs", bytes(value))
            if changed is not None:
                if self._set_sregs(before):  # KVM can have given what it does not take: EFER.LMA without LME
                    changed.add_note("sregs could not be put back")
                raise changed

    def _set_sregs(self, value: Sregs) -> int:
        rc: int = lib.hv_sregs_put(self.kvm._c, ffi.from_buffer("struct kvm_sregs *", bytes(value)))
        return rc

    @property
    def sync(self) -> VcpuSync:
        """QEMU's synchronisation of this vCPU: `synchronize_state()`, `vcpu_dirty`, `env`, …; see VcpuSync."""
        from ..state.sync import synchronizer

        return synchronizer(self)

    # ---- states to start in ----

    def reset(self) -> None:
        """The state after reset: real mode at F000:FFF0 with the CS base 0xffff0000, that is at 0xfffffff0.

        General registers 0 (RDX too, for want of a processor signature), RFLAGS 2, CR0 0x60000010; pending events
        dropped; out of system management mode; runnable.  FPU, MSRs and debug registers are left as they are.
        """
        self._real(cs=0xF000, cs_base=0xFFFF0000, ip=0xFFF0, sp=0)

    def real_mode(self, entry: int = 0x7C00, *, cs: int | None = None, sp: int = 0x7C00) -> None:
        """Real mode at physical address `entry`, as a boot sector expects it: DS, ES, SS 0, interrupts off.

        `entry`: 0 to 0x10ffef.  `cs`: the selector to reach it by; without, 0 below 0x10000, else the highest
        paragraph that is a multiple of 0x1000 (0xFFFF above 1 MiB).  `sp`: initial SP, with SS 0.  Everything else as
        `reset()`.

        ArgumentError: no CS:IP of the given `cs` reaches `entry`.
        """
        cs, ip = _real_address("real_mode", entry, cs, sp)
        self._real(cs=cs, cs_base=cs << 4, ip=ip, sp=sp)

    def protected_mode(
        self,
        entry: int,
        *,
        stack: int | None = None,
        user: bool = False,
        bits: Literal[32, 16] = 32,
        paging: Literal["32bit", "pae"] | None = None,
        pages: PageTables | None = None,
        handlers: Mapping[int, int] | Idt | None = None,
        ports: Ports = True,
        tables: int | None = None,
    ) -> ModeTables:
        """Protected mode at linear address `entry`: flat segments, interrupts off; where its tables lie is returned.

        `stack`: ESP, below which the stack grows; without, where the tables begin (0x7C00 with `bits` 16).  `user`:
        CPL 3, with a stack for CPL 0 in the TSS.  `bits`: 16 for 16-bit code, in the first 64 KiB.  `paging`: "32bit"
        (pages of 4 MiB, CR4.PSE) or "pae" (2 MiB); linear addresses are physical ones.  `pages`: your own page tables
        instead (hvmodel.arch.paging.PageTables), which are written to RAM at their place, and map the other tables to
        themselves.  `handlers`: exception handlers, vector -> address, run at CPL 0 with interrupts off, or an Idt;
        without, an exception shuts the vCPU down.  `ports`: what IN and OUT of CPL 3 may use: True for all, False for
        none, or ports and ranges of ports.  `tables`: gpa of the tables, 24 KiB and the page tables, a multiple of
        4096; by default the end of the last RAM below 4 GiB.  Everything else as `reset()`; CR0 has PE, MP, ET, NE, and
        WP and PG with paging; CR4 has OSFXSR and OSXMMEXCPT.  See hvmodel.machine.modes and docs/modes.md.

        ArgumentError, ArgumentTypeError: `entry` or the bytes below `stack` are not in RAM, not mapped, or where the
        tables go; `tables` not in RAM; too little RAM; pages, handlers or ports that are none.  ChangedStateError: this
        KVM drops CR0.PG outside long mode (kvm_pvm), so that nothing but paging=None works.  UnansweredError,
        RefusedStateError.  After an error memory and vCPU are as before.

        >>> from hvmodel import Machine
        >>> with Machine(ram="1M") as m:
        ...     m.load(0x1000, bytes.fromhex("8cc8 e610 f4"))        # mov eax, cs; out 0x10, al; hlt
        ...     m.vcpu.protected_mode(entry=0x1000)
        ...     next(m.exits(timeout=1.0))
        ModeTables(start=0xfa000, size=0x6000, gdt=0xfa000, idt=None, tss=0xfc000, kernel_stack=0x100000, cr3=None)
        IoOut(port=0x10, size=1, count=1, data=b'\\x08')
        """
        from . import modes

        return modes.protected_mode(
            self,
            entry,
            stack=stack,
            user=user,
            bits=bits,
            paging=paging,
            pages=pages,
            handlers=handlers,
            ports=ports,
            tables=tables,
        )

    def long_mode(
        self,
        entry: int,
        *,
        stack: int | None = None,
        user: bool = False,
        bits: Literal[64, 32, 16] = 64,
        levels: Literal[4, 5] = 4,
        pages: PageTables | None = None,
        handlers: Mapping[int, int] | Idt | None = None,
        ports: Ports = True,
        tables: int | None = None,
    ) -> ModeTables:
        """Long mode at linear address `entry`: 64-bit code, or with `bits` 32 or 16 compatibility mode.

        `levels`: of the page tables; 5 takes LA57 in CPUID.  They map the first 4 GiB, and the RAM above, to themselves
        by pages of 2 MiB.  The handlers are 64-bit code with any `bits`.  EFER has LME, LMA and, where CPUID has it,
        NXE.  All else, and the errors, as protected_mode(); ArgumentError too where CPUID has no LM or LA57.

        >>> from hvmodel import Machine
        >>> with Machine(ram="1M") as m:
        ...     m.load(0x1000, bytes.fromhex("48c7c0 ffffffff 48c1e820 e710"))   # mov rax, -1; shr rax, 32; out
        ...     tables = m.vcpu.long_mode(entry=0x1000, user=True)
        ...     next(m.exits(timeout=1.0))
        IoOut(port=0x10, size=4, count=1, data=b'\\xff\\xff\\xff\\xff')
        """
        from . import modes

        return modes.long_mode(
            self,
            entry,
            stack=stack,
            user=user,
            bits=bits,
            levels=levels,
            pages=pages,
            handlers=handlers,
            ports=ports,
            tables=tables,
        )

    def vm86_mode(
        self,
        entry: int = 0x7C00,
        *,
        cs: int | None = None,
        sp: int = 0x7C00,
        iopl: int = 3,
        handlers: Mapping[int, int] | Idt | None = None,
        ports: Ports = True,
        tables: int | None = None,
    ) -> ModeTables:
        """Virtual-8086 mode at physical address `entry`: 16-bit code at CPL 3 of protected mode, without paging.

        `entry`, `cs`, `sp` as real_mode(); `iopl`: below 3, CLI, STI, PUSHF, POPF, INT n and IRET raise #GP.
        `handlers` are 32-bit code at CPL 0.  All else, and the errors, as protected_mode(); ChangedStateError: this KVM
        drops RFLAGS.VM (kvm_pvm).
        """
        from . import modes

        return modes.vm86_mode(self, entry, cs=cs, sp=sp, iopl=iopl, handlers=handlers, ports=ports, tables=tables)

    def _real(self, cs: int, cs_base: int, ip: int, sp: int) -> None:
        kvm = self.kvm
        kvm._complete_for_change()
        is_calm = kvm._has_calm()
        sregs = kvm.sregs
        apic_base = sregs.apic_base
        ffi.memmove(sregs, _REAL_SREGS, ffi.sizeof(_REAL_SREGS[0]))
        sregs.apic_base = apic_base
        sregs.cs.selector, sregs.cs.base = cs, cs_base
        kvm.sregs = sregs
        kvm.regs = ffi.new("struct kvm_regs *", {"rip": ip, "rsp": sp, "rflags": 2})
        self._begin(is_calm)

    def _begin(self, is_calm: bool = False) -> None:
        # What goes with the registers of all states to start in: nothing waits, it is runnable, and a debugger has
        # reported nothing yet.  `is_calm`: before its registers were set no triple fault could wait.
        kvm = self.kvm
        if is_calm and kvm._calm is not None:
            kvm.vcpu_events = self._no_events
        else:
            from ..kvm.triple_fault import drop_triple_fault

            drop_triple_fault(kvm, self._no_events)
        kvm.mp_state = _RUNNABLE
        kvm._note_calm()
        if self._debugger is not None:
            self._debugger._passed = None

    # ---- events ----

    def inject_exception(self, vector: int, error_code: int | None = None, payload: int | None = None) -> EventQueue:
        """Raise an exception before the guest's next instruction; returns what waits then.

        `vector`: 0 to 31, but not 2.  `error_code`: just where the exception pushes one.  `payload`: the address of a
        #PF (for CR2), the bits of a #DB (for DR6).  Merged with one that waits already; the errors, and what is done
        without KVM_CAP_EXCEPTION_PAYLOAD: see hvmodel.state.events.inject_exception.

        >>> import hvmodel as hv
        >>> with hv.Machine(ram="64K") as m:
        ...     m.vcpu.real_mode()
        ...     print(m.vcpu.inject_exception(6))
        #UD injected
        """
        from ..state import events

        return events.inject_exception(self.kvm, vector, error_code, payload)

    def inject_nmi(self) -> None:
        """Send an NMI (KVM_NMI); see hvmodel.state.events.inject_nmi.  Thread safety: any thread."""
        from ..state import events

        events.inject_nmi(self.kvm)

    def inject_interrupt(self, vector: int) -> None:
        """Send external interrupt `vector` (KVM_INTERRUPT); see hvmodel.state.events.inject_interrupt.

        BusyError, which says why, where the guest cannot take one now: RFLAGS.IF clear, behind STI or MOV SS, another
        event waits.
        """
        from ..state import events

        events.inject_interrupt(self.kvm, vector)

    def event_queue(self) -> EventQueue:
        """What waits for the vCPU: exception, NMIs, interrupt (KVM_GET_VCPU_EVENTS); see hvmodel.state.EventQueue."""
        from ..state import events

        return events.queue(self.kvm)

    # ---- where it is ----

    def location(self) -> Location:
        """CS:RIP now, and the instruction bytes there as far as they are in RAM.

        At a read exit that is the instruction.  At a write exit it is the instruction behind it where KVM emulates it:
        always for an address, but for REP, which stays at its instruction until all is done; for a port where the mode
        is emulated (real mode on kvm_pvm).  A port write that the processor itself hands to KVM (kvm_intel, kvm_amd)
        leaves RIP at the OUT until the next run, port 0x7E excepted.  Costs an ioctl (KVM_TRANSLATE).

        Sources: linux:arch/x86/kvm/x86.c kvm_get_linear_rip, kvm_fast_pio_out, x86_emulate_instruction@v6.18.
        """
        regs, sregs = self.regs, self.sregs
        linear = regs.rip if is_64_bit_code(sregs) else (sregs.cs.base + regs.rip) & 0xFFFFFFFF
        return Location(sregs.cs.selector, regs.rip, linear, self._fetch(linear, MAX_INSN))

    def _before(self, where: Location, size: int) -> bytes:
        # Up to so many bytes before `where`, as far as they are in the code segment and in RAM.
        passed = b""
        while len(passed) < min(where.rip, size) and (byte := self._fetch(where.linear - len(passed) - 1, 1)):
            passed = byte + passed
        return passed

    def _fetch(self, linear: int, size: int) -> bytes:
        # As many of the bytes as lie in RAM; page by page, for the next page may lie elsewhere.
        found = b""
        linear &= 0xFFFFFFFFFFFFFFFF
        while size:
            here = min(size, 0x1000 - (linear & 0xFFF))
            try:
                where = self.kvm.translate(linear)
                if not where.valid:
                    break
                found += self._read(where.gpa, here)
            except HvError:
                break
            linear, size = linear + here, size - here
        return found

    # ---- debugging ----

    def step(self, n: int = 1, timeout: float | None = None) -> Exit:
        """Execute `n` instructions; the Debug exit behind the last one, or whatever exit came before.

        Devices and rules serve their exits, as in Machine.exits(); an exit that comes back is the last instruction's,
        which the next step or run finishes.  A breakpoint's address, or a watchpoint, ends it early: `hits` of the exit
        has them.  See docs/debug.md for what a step is of an instruction that repeats, faults or halts.  `timeout` in
        seconds: Interrupted("timeout").

        UnqualifiedError: this host cannot step in the mode that the vCPU is in; then the instructions before that are
        executed.  ArgumentError, UnansweredError, BusyError, ClosedError.  Ioctl: KVM_SET_GUEST_DEBUG (4.87).
        """
        from .debug import debugger

        return debugger(self).step(n, timeout)

    def add_breakpoint(self, address: int, kind: str = "hardware", *, mode: str | None = None) -> Breakpoint:
        """Stop the machine before it executes the instruction at linear `address`.

        The exit is `Debug(hits=(breakpoint,))`, of run() Stop("breakpoint"); running on passes the instruction.
        `kind`: "hardware", a debug register, of which there are four; "software", int3; "hlt", where HLT exits (real
        mode and CPL 0).  The last two put one byte into the RAM where `address` leads now, but only while the guest
        runs: at every exit the RAM has the guest's own.  `mode`: in which mode (hvmodel.machine.qualify.MODES) the
        guest will be there; without, the present one.

        UnqualifiedError: the kind does not work in that mode on this host.  ArgumentError: the address is not in RAM
        (software, hlt), or has one.  BusyError: all debug registers are in use, or the vCPU runs.  Ioctl:
        KVM_SET_GUEST_DEBUG (4.87), at the next run.
        """
        from .debug import debugger

        return debugger(self).add_breakpoint(address, kind, mode)

    def remove_breakpoint(self, breakpoint: Breakpoint | int) -> None:
        """Take away a breakpoint, given as such or by its address.  ArgumentError: there is none.  BusyError."""
        from .debug import debugger

        debugger(self).remove_breakpoint(breakpoint)

    def add_watchpoint(self, address: int, size: int = 1, access: str = "w", *, mode: str | None = None) -> Watchpoint:
        """Stop behind an instruction that accesses the `size` bytes (1, 2, 4, 8; aligned) at linear `address`.

        `access`: "w" a write, "rw" a read or a write.  It takes one of the four debug registers.  `mode` and errors as
        for add_breakpoint.  What KVM emulates for the guest, and what devices write, is not seen.
        """
        from .debug import debugger

        return debugger(self).add_watchpoint(address, size, access, mode)

    def remove_watchpoint(self, watchpoint: Watchpoint | int) -> None:
        """Take away a watchpoint, given as such or by its address.  ArgumentError: there is none.  BusyError."""
        from .debug import debugger

        debugger(self).remove_watchpoint(watchpoint)

    @property
    def breakpoints(self) -> tuple[Breakpoint | Watchpoint, ...]:
        """The breakpoints and watchpoints, in the order in which they were added."""
        return () if self._debugger is None else self._debugger.points

    def __repr__(self) -> str:
        return f"<Cpu {self.id}>"


# In the order of struct kvm_regs.
_REGISTERS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
)
_DOCS = {name: f"{name.upper()}, an int of 64 bits; see Cpu." for name in _REGISTERS}
_DOCS["rip"] = (
    "RIP, an int of 64 bits; see Cpu.  At a read exit it is at the instruction, at a write exit see Cpu.location."
)
_DOCS["rflags"] = "RFLAGS, an int of 64 bits, of which bit 1 is always set; see Cpu."
_DOCS["regs"] = "The general registers as a value (hvmodel.state.Regs); assign one to set them all.  See Cpu."
_DOCS["sregs"] = "Segments, descriptor tables, control registers, EFER (hvmodel.state.Sregs); see Cpu."
_ffi.run.install_registers(Cpu, _DOCS)
