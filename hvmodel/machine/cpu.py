"""The machine's view of a vCPU: a kvm `Vcpu` that knows the RAM it runs in.

Owns the architectural states a machine starts a vCPU in, and the answer to "where is it?".

Sources: Intel SDM vol. 3 table 10-1 (state after reset), section 21.1 (real-address mode).
"""

from __future__ import annotations

from .._ffi import ffi, lib
from ..errors import ArgumentError, ArgumentTypeError, HvError
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .._native import kvm_regs, kvm_sregs
    from ..kvm import Vcpu

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
_EFER_LMA = 0x400


def is_64_bit_code(sregs: kvm_sregs) -> bool:
    """Whether a vCPU with these registers executes 64-bit code: long mode, and a code segment with CS.L."""
    return bool(sregs.efer & _EFER_LMA and sregs.cs.l)


class Location(Value):
    """Where a vCPU is: CS selector, RIP, their linear address, and up to 15 bytes there (b"": not in RAM).

    `linear` is RIP in 64-bit code, elsewhere the low 32 bits of CS base + RIP.
    """

    cs: int
    rip: int
    linear: int
    insn: bytes


class Cpu:
    """A vCPU of a Machine.

    `kvm` is the `hvmodel.kvm.Vcpu` underneath, which this object owns.  Methods that set state first finish the
    instruction of the last exit (Vcpu.complete_io), and raise UnansweredError where that is an unanswered read.

    Thread safety: as Vcpu.
    """

    def __init__(self, kvm: Vcpu, read: Callable[[int, int], bytes]) -> None:
        self.kvm = kvm
        self._read = read
        # Nothing pending and, where there is such a thing, out of system management mode.
        smm = lib.KVM_VCPUEVENT_VALID_SMM if kvm.vm.check_extension(lib.KVM_CAP_X86_SMM) else 0
        self._no_events = ffi.new("struct kvm_vcpu_events *", {"flags": _EVENT_FLAGS | smm})
        synced = kvm.vm.check_extension(lib.KVM_CAP_SYNC_REGS)
        # Registers ride along with every exit: no measurable cost, where asking for them costs an ioctl.
        kvm.kvm_valid_regs = synced & (lib.KVM_SYNC_X86_REGS | lib.KVM_SYNC_X86_SREGS)

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

    @property
    def regs(self) -> kvm_regs:
        """General registers (KVM_GET_REGS); see Vcpu.regs.  At a read exit, RIP is still at the instruction."""
        return self.kvm.regs

    @regs.setter
    def regs(self, regs: kvm_regs) -> None:
        self.kvm.complete_io()
        self.kvm.regs = regs

    @property
    def sregs(self) -> kvm_sregs:
        """Segments and control registers (KVM_GET_SREGS); see Vcpu.sregs."""
        return self.kvm.sregs

    @sregs.setter
    def sregs(self, sregs: kvm_sregs) -> None:
        self.kvm.complete_io()
        self.kvm.sregs = sregs

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
        call = "real_mode"
        for field, value in (("entry", entry), ("sp", sp), ("cs", 0 if cs is None else cs)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(call, field, value, "an int")
        if not 0 <= entry < _REAL_MODE_END:
            raise ArgumentError(
                call, "entry", entry, f"an address that real mode reaches: 0 to {_REAL_MODE_END - 1:#x}"
            )
        if not 0 <= sp <= 0xFFFF:
            raise ArgumentError(call, "sp", sp, "0 to 0xffff")
        if cs is None:
            cs = 0xFFFF if entry >= 0x100000 else (entry & 0xF0000) >> 4
        elif not 0 <= cs <= 0xFFFF or not 0 <= entry - (cs << 4) <= 0xFFFF:
            raise ArgumentError(call, "cs", cs, f"a paragraph from which {entry:#x} is within 64 KiB")
        self._real(cs=cs, cs_base=cs << 4, ip=entry - (cs << 4), sp=sp)

    def _real(self, cs: int, cs_base: int, ip: int, sp: int) -> None:
        kvm = self.kvm
        kvm.complete_io()
        sregs = kvm.sregs
        apic_base = sregs.apic_base
        ffi.memmove(sregs, _REAL_SREGS, ffi.sizeof(_REAL_SREGS[0]))
        sregs.apic_base = apic_base
        sregs.cs.selector, sregs.cs.base = cs, cs_base
        kvm.sregs = sregs
        kvm.regs = ffi.new("struct kvm_regs *", {"rip": ip, "rsp": sp, "rflags": 2})
        kvm.vcpu_events = self._no_events
        kvm.mp_state = _RUNNABLE

    # ---- where it is ----

    def location(self) -> Location:
        """CS:RIP now, and the instruction bytes there as far as they are in RAM.

        At a read exit that is the instruction.  At a write exit it is the instruction behind it where KVM emulates it:
        always for an address, but for REP, which stays at its instruction until all is done; for a port where the mode
        is emulated (real mode on kvm_pvm).  A port write that the processor itself hands to KVM (kvm_intel, kvm_amd)
        leaves RIP at the OUT until the next run, port 0x7E excepted.  Costs three ioctls.

        Sources: linux:arch/x86/kvm/x86.c kvm_get_linear_rip, kvm_fast_pio_out, x86_emulate_instruction@v6.18.
        """
        regs, sregs = self.kvm.regs, self.kvm.sregs
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

    def __repr__(self) -> str:
        return f"<Cpu {self.id}>"
