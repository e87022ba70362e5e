"""What guest debugging does on this host: every mode of the processor x every kind of stop, tried with a tiny guest.

KVM_SET_GUEST_DEBUG returns 0 for whatever it is asked, and whether the vCPU then stops depends on who executes the
guest's code: the processor, or KVM's emulator, which knows single steps and code breakpoints and nothing else.  So a
kind is tried before it is used, in a VM of its own.

    mode             CR0.PE  RFLAGS.VM  EFER.LMA  CS.L  CPL
    real                0        -          -       -    0
    vm86                1        1          0       -    3
    protected           1        0          0       -    0     protected-user: CPL 3
    compat              1        -          1       0    0     compat-user: CPL 3
    long                1        -          1       1    0     long-user: CPL 3

Sources: linux:arch/x86/kvm/x86.c kvm_arch_vcpu_ioctl_set_guest_debug, kvm_vcpu_check_code_breakpoint,
kvm_vcpu_do_singlestep@v6.18; Intel SDM vol. 3 section 18.2 (debug registers).
"""

from __future__ import annotations

from .._ffi import ffi, lib
from ..errors import ArgumentError, ArgumentTypeError, HvError, UnqualifiedError
from ..kvm.exits import Debug, Hlt, Interrupted, MmioWrite
from ..kvm.system import Kvm
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from ..kvm import Vcpu
    from ..kvm.exits import Exit

__all__ = ["KINDS", "MODES", "Qualification", "Verdict", "mode_name", "qualify"]

MODES = ("real", "vm86", "protected", "protected-user", "compat", "compat-user", "long", "long-user")
"""Modes of the processor that are told apart; "-user" is CPL 3.  Paging outside long mode makes no difference."""

KINDS = ("step", "hardware", "software", "hlt", "watch-w", "watch-rw")
"""Kinds of stops: a single step; code breakpoints: a debug register, int3, HLT; a watched write, a watched access."""

_EFER_LMA = 0x400
_RFLAGS_VM = 0x20000
_DR6_BS = 0x4000


class Verdict(Value):
    """What came of one kind in one mode: whether it `works`, and what the vCPU `saw` for it."""

    mode: str
    kind: str
    works: bool
    saw: str


class Qualification:
    """Which kinds of stops work in which modes on this host; each is tried when it is first asked for.

    A try takes about a millisecond and a VM of its own, and is remembered for the process.  One that fails may end in a
    triple fault of that VM, which some hosts log.

    Thread safety: any thread; two may try the same at once.
    """

    def __init__(self, kvm: Kvm | None = None) -> None:
        if kvm is not None and not isinstance(kvm, Kvm):
            raise ArgumentTypeError("Qualification", "kvm", kvm, "a Kvm or None")
        self._kvm = kvm
        self._verdicts: dict[tuple[str, str], Verdict] = {}

    def verdict(self, mode: str, kind: str) -> Verdict:
        """What comes of `kind` (of KINDS) in `mode` (of MODES).  ArgumentError for others; HvError: there is no VM."""
        for field, value, known in (("mode", mode, MODES), ("kind", kind, KINDS)):
            if value not in known:
                raise ArgumentError("Qualification.verdict", field, value, f"one of {', '.join(known)}")
        found = self._verdicts.get((mode, kind))
        if found is None:
            works, saw = _try(self._kvm, mode, kind)
            found = self._verdicts[mode, kind] = Verdict(mode, kind, works, saw)
        return found

    def works(self, mode: str, kind: str) -> bool:
        """Whether `kind` works in `mode`; see `verdict`."""
        return self.verdict(mode, kind).works

    def kinds(self, mode: str) -> tuple[str, ...]:
        """The kinds that work in `mode`."""
        return tuple([kind for kind in KINDS if self.works(mode, kind)])

    def require(self, call: str, mode: str, kind: str) -> None:
        """Raise UnqualifiedError in the name of `call` where `kind` does not work in `mode`."""
        verdict = self.verdict(mode, kind)
        if not verdict.works:
            raise UnqualifiedError(call, mode, kind, verdict.saw, self.kinds(mode))

    def __iter__(self) -> Iterator[Verdict]:
        """All verdicts, mode by mode; tries what was not tried yet."""
        for mode in MODES:
            for kind in KINDS:
                yield self.verdict(mode, kind)

    def to_json(self) -> list[dict[str, Any]]:
        """All verdicts as JSON has them."""
        return [{"mode": v.mode, "kind": v.kind, "works": v.works, "saw": v.saw} for v in self]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("mode", *KINDS)]
        rows += [(mode, *("yes" if self.works(mode, kind) else "no" for kind in KINDS)) for mode in MODES]
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


_known: Qualification | None = None


def qualify(kvm: Kvm | None = None) -> Qualification:
    """What works on this host; without `kvm` the answer is kept for the process, and nothing is tried before it is
    asked for.

    `kvm`: the `Kvm` to make the VMs of, which stays yours; then the answer is a new one.

    >>> qualify().works("real", "step")
    True
    """
    global _known
    if kvm is not None:
        return Qualification(kvm)
    if _known is None:
        _known = Qualification()
    return _known


def mode_name(regs: Any, sregs: Any) -> str:
    """Which of MODES a vCPU with these general registers and these segments is in; the CPL is SS's DPL.

    `regs`, `sregs`: structs or values with KVM's field names.
    """
    if not sregs.cr0 & 1:
        return "real"
    user = "-user" if sregs.ss.dpl == 3 else ""
    if sregs.efer & _EFER_LMA:
        return ("long" if sregs.cs.l else "compat") + user
    return "vm86" if regs.rflags & _RFLAGS_VM else "protected" + user


# ---- the tiny guests ----
#
#   0x0000  IVT: every vector leads to 0x0500, where the end stands once more
#   0x1000  nop; nop; STOP; nop; read DATA; write DATA; write to 0x20000, where no RAM is; jmp $
#   0x3000  DATA
#   0x4000  PML4, 0x5000 PDPT, 0x6000 PD: the first 2 MiB
#
# STOP, a nop, is where breakpoints stand.  The write to 0x20000 exits in every mode and is the end: no stop came.

_CODE, _STOP, _DATA, _PML4, _END = 0x1000, 0x1002, 0x3000, 0x4000, 0x20000
_HANDLER = 0x500
_RAM = 0x10000
_TIMEOUT = 5.0
_ENABLE, _STEP = lib.KVM_GUESTDBG_ENABLE, lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_SINGLESTEP
_HARDWARE = lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_USE_HW_BP
_SOFTWARE = lib.KVM_GUESTDBG_ENABLE | lib.KVM_GUESTDBG_USE_SW_BP
_TRAPS = {"software": b"\xcc", "hlt": b"\xf4"}
_DR7 = {"hardware": 0x602, "watch-w": 0xD0602, "watch-rw": 0xF0602}  # DR0: execute; write, 4 bytes; access, 4 bytes


def _accesses(mode: str) -> tuple[bytes, bytes, bytes]:
    # mov DATA to EAX; mov EAX to DATA; mov AL to END, which is FS:0 in 16-bit code.
    if mode in ("real", "vm86"):
        data = _DATA.to_bytes(2, "little")
        return b"\x66\xa1" + data, b"\x66\xa3" + data, b"\x64\xa2\x00\x00"
    data, end = _DATA.to_bytes(4, "little"), _END.to_bytes(4, "little")
    if mode.startswith("long"):
        return b"\x8b\x04\x25" + data, b"\x89\x04\x25" + data, b"\x88\x04\x25" + end
    return b"\xa1" + data, b"\xa3" + data, b"\xa2" + end


def _image(mode: str, stop: bytes) -> tuple[bytes, int, int]:
    # The guest's RAM, and where the read and the write end.
    load, store, end = _accesses(mode)
    code = b"\x90\x90" + stop + b"\x90" + load + store + end + b"\xeb\xfe"
    memory = bytearray(_RAM)
    memory[:0x400] = _HANDLER.to_bytes(4, "little") * 256
    memory[_HANDLER : _HANDLER + len(end) + 2] = end + b"\xeb\xfe"
    memory[_CODE : _CODE + len(code)] = code
    for table in (_PML4, _PML4 + 0x1000):
        memory[table : table + 8] = (table + 0x1000 | 7).to_bytes(8, "little")  # present, writable, user
    memory[_PML4 + 0x2000 : _PML4 + 0x2008] = (0x87).to_bytes(8, "little")  # and 2 MiB
    loaded = _CODE + 4 + len(load)
    return bytes(memory), loaded, loaded + len(store)


def _enter_mode(vcpu: Vcpu, mode: str) -> None:
    # Sets the hidden parts of the segments; the guest loads none, so no descriptor tables are needed.
    sregs = vcpu.sregs
    is_16_bit, is_long = mode in ("real", "vm86"), mode.startswith("long")
    dpl = 3 if mode == "vm86" or mode.endswith("user") else 0
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        is_code = name == "cs"
        segment.type = 0xB if is_code and mode != "vm86" else 0x3  # readable code, writable data; accessed
        segment.present, segment.s, segment.dpl, segment.unusable = 1, 1, dpl, 0
        if is_16_bit:
            segment.base = _END if name == "fs" else 0
            segment.selector, segment.limit, segment.g, segment.db, segment.l = segment.base >> 4, 0xFFFF, 0, 0, 0
        else:
            segment.selector, segment.base, segment.limit, segment.g = (8 if is_code else 16) | dpl, 0, 0xFFFFFFFF, 1
            segment.l = int(is_long and is_code)
            segment.db = 1 - segment.l
    sregs.tr.selector, sregs.tr.base, sregs.tr.limit, sregs.tr.type, sregs.tr.present = 24, 0x3800, 0x67, 0xB, 1
    sregs.tr.s = sregs.tr.dpl = sregs.tr.unusable = sregs.tr.g = 0
    sregs.ldt.unusable, sregs.ldt.present = 1, 0
    sregs.gdt.base = sregs.gdt.limit = sregs.idt.base = 0
    sregs.idt.limit = 0x3FF if mode == "real" else 0
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x10 | (mode != "real"), 0, 0, 0  # ET, PE
    if mode.startswith(("compat", "long")):
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = sregs.cr0 | 1 << 31, _PML4, 1 << 5, 0x500  # PG; PAE; LMA, LME
    vcpu.sregs = sregs
    rflags = 2 | (_RFLAGS_VM if mode == "vm86" else 0)
    vcpu.regs = ffi.new("struct kvm_regs *", {"rip": _CODE, "rsp": 0x2FF0, "rflags": rflags})


def _set(vcpu: Vcpu, control: int, address: int = 0, dr7: int = 0) -> None:
    debug = ffi.new("struct kvm_guest_debug *", {"control": control})
    debug.arch.debugreg[0], debug.arch.debugreg[7] = address, dr7
    vcpu.guest_debug = debug


def _try(kvm: Kvm | None, mode: str, kind: str) -> tuple[bool, str]:
    # Whether it works, and what was seen.
    from .machine import Machine

    memory, loaded, stored = _image(mode, _TRAPS.get(kind, b"\x90"))
    with Machine(ram=_RAM, kvm=kvm) as machine:
        vcpu = machine.vcpu.kvm
        machine.write(0, memory)
        try:
            _enter_mode(vcpu, mode)
        except HvError as error:
            return False, f"the mode cannot be set: {error}"
        became = mode_name(vcpu.regs, vcpu.sregs)
        if became != mode:
            return False, f"the mode cannot be set: KVM makes it {became!r}"
        try:
            if kind == "step":
                _set(vcpu, _STEP)
                return _expect(vcpu, (_CODE + 1, _CODE + 2), _DR6_BS)
            if kind == "hardware":
                _set(vcpu, _HARDWARE, _STOP, _DR7[kind])
                return _expect(vcpu, (_STOP,), 1)
            if kind == "software":
                _set(vcpu, _SOFTWARE)
                exit = _run(vcpu)
                return type(exit) is Debug and (exit.exception, exit.pc) == (3, _STOP), _seen(exit)
            if kind == "hlt":
                exit = _run(vcpu)
                return type(exit) is Hlt and vcpu.regs.rip == _STOP + 1, _seen(exit)
            _set(vcpu, _HARDWARE, _DATA, _DR7[kind])
            return _expect(vcpu, (stored,) if kind == "watch-w" else (loaded, stored), 1)
        except HvError as error:
            return False, str(error)


def _expect(vcpu: Vcpu, stops: tuple[int, ...], dr6: int) -> tuple[bool, str]:
    # Debug exits with these linear addresses and this cause, one after the other; and with all taken away, the end.
    for pc in stops:
        exit = _run(vcpu)
        if type(exit) is not Debug or (exit.exception, exit.pc) != (1, pc) or not exit.dr6 & dr6:
            return False, _seen(exit)
    seen = _seen(exit)
    _set(vcpu, 0)
    exit = _run(vcpu)
    if type(exit) is not MmioWrite or exit.gpa != _END:
        return False, f"{seen}, and after it was taken away {_seen(exit)}"
    return True, seen


def _run(vcpu: Vcpu) -> Exit:
    # A signal that interrupts says nothing about the host.
    while (exit := vcpu.run(_TIMEOUT)) == Interrupted("signal"):
        pass
    return exit


def _seen(exit: object) -> str:
    if type(exit) is MmioWrite and exit.gpa == _END:
        return "no stop"
    return repr(exit)
