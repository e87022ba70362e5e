"""What KVM_RUN came back with, as frozen values for `match`.

    match vcpu.run(timeout=1.0):
        case IoOut(port=0x3F8, data=data): ...
        case IoIn(port=0x60): vcpu.answer(0x1C)
        case Hlt(): ...

Owns one class per KVM_EXIT_* reason that x86 gives, `Interrupted` for a KVM_RUN that was interrupted (EINTR), `Again`
and `HostFault` for the refusals of KVM_RUN that are no errors, `Unknown` for every other reason, and the way from the
kvm_run page to these values.

After a read exit (`IoIn`, `MmioRead`, `RdMsr`, a `HostFault` of a read) the guest's instruction waits for its data:
`answer(data)` gives it; running on without is an UnansweredError.

Sources: linux:Documentation/virt/kvm/api.rst section 5 "The kvm_run structure", linux:include/uapi/linux/kvm.h.
"""

from __future__ import annotations

from .._ffi import ffi, lib
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

__all__ = [
    "Again",
    "Debug",
    "DirtyRingFull",
    "Exception_",
    "Exit",
    "FailEntry",
    "Hlt",
    "HostFault",
    "Hypercall",
    "InternalError",
    "Interrupted",
    "IoApicEoi",
    "IoIn",
    "IoOut",
    "IrqWindowOpen",
    "MemoryFault",
    "MmioRead",
    "MmioWrite",
    "Notify",
    "RdMsr",
    "SetTpr",
    "Shutdown",
    "SystemEvent",
    "TprAccess",
    "Unknown",
    "WrMsr",
    "X86BusLock",
    "Xen",
    "decode",
]


class IoOut(Value):
    """KVM_EXIT_IO, out: the guest wrote `count` elements of `size` bytes (1, 2, 4) to `port`.

    `data`: the `size * count` bytes, little-endian elements; `value`: the first element as an int.
    """

    _extra_slots = ("value",)
    port: int
    size: int
    count: int
    data: bytes

    if TYPE_CHECKING:
        # Not a field: derived from data, but a slot, so that `case IoOut(value=…)` costs an attribute.
        @property
        def value(self) -> int: ...

    def __init__(self, port: int, size: int, count: int, data: bytes) -> None:
        _set_out_port(self, port)
        _set_out_size(self, size)
        _set_out_count(self, count)
        _set_out_data(self, data)
        _set_out_value(self, int.from_bytes(data[:size], "little"))


_slots: Any = vars(IoOut)
_set_out_port, _set_out_size, _set_out_count, _set_out_data, _set_out_value = (
    _slots[name].__set__ for name in ("port", "size", "count", "data", "value")
)


class IoIn(Value):
    """KVM_EXIT_IO, in: the guest reads `count` elements of `size` bytes (1, 2, 4) from `port`; to be answered."""

    port: int
    size: int
    count: int


class MmioRead(Value):
    """KVM_EXIT_MMIO: the guest reads `size` bytes (1 to 8) at `gpa`, where no memslot is; to be answered."""

    gpa: int
    size: int


class MmioWrite(Value):
    """KVM_EXIT_MMIO: the guest wrote `data` (1 to 8 bytes) at `gpa`, where no writable memslot is."""

    gpa: int
    data: bytes

    @property
    def size(self) -> int:
        """Bytes written."""
        return len(self.data)

    @property
    def value(self) -> int:
        """The bytes as a little-endian int."""
        return int.from_bytes(self.data, "little")


class HostFault(Value):
    """The host page behind guest memory cannot be accessed: PROT_NONE, read-only, unmapped, or past the end of its
    file.

    Two ways lead here.  An emulated access comes as KVM_EXIT_MMIO with an address *inside* memslot `slot`: `gpa`,
    `size`, `is_write` and `data` are known; a write is lost unless you carry it out, a read is to be answered.  A
    native access makes KVM_RUN fail with EFAULT: then all five are None, and nothing is lost: make the page
    accessible and run again.
    """

    gpa: int | None = None
    size: int | None = None
    is_write: bool | None = None
    data: bytes | None = None
    slot: int | None = None


class MemoryFault(Value):
    """KVM_EXIT_MEMORY_FAULT (KVM_RUN: EFAULT or EHWPOISON): KVM could not resolve a guest access.

    `gpa`, `size` in bytes, `flags` (KVM_MEMORY_EXIT_FLAG_PRIVATE = 8), `errno` of KVM_RUN.  Capability:
    KVM_CAP_MEMORY_FAULT_INFO.
    """

    gpa: int
    size: int
    flags: int
    errno: int


class Hlt(Value):
    """KVM_EXIT_HLT: the guest executed HLT and there is no in-kernel irqchip to wait in."""


class Shutdown(Value):
    """KVM_EXIT_SHUTDOWN: triple fault.  Running on repeats it until the state is set anew."""


class IrqWindowOpen(Value):
    """KVM_EXIT_IRQ_WINDOW_OPEN: the guest can take an interrupt now (asked for by request_interrupt_window)."""


class InternalError(Value):
    """KVM_EXIT_INTERNAL_ERROR: KVM could not go on.

    `suberror`: KVM_INTERNAL_ERROR_EMULATION = 1, SIMUL_EX = 2, DELIVERY_EV = 3, UNEXPECTED_EXIT_REASON = 4;
    `data`: its words; `insn`: the instruction bytes where KVM gave them (emulation failures), else b"".
    """

    suberror: int
    data: tuple[int, ...]
    insn: bytes


class FailEntry(Value):
    """KVM_EXIT_FAIL_ENTRY: the processor refused the guest's state; `reason`: its code; `cpu`: the host CPU."""

    reason: int
    cpu: int


class Debug(Value):
    """KVM_EXIT_DEBUG: a breakpoint or step of KVM_SET_GUEST_DEBUG; `exception` 1 or 3, `pc` linear.

    `hits`: the breakpoints and watchpoints of a machine's vCPU (Cpu.add_breakpoint) that it stopped at; () for others.
    """

    exception: int
    pc: int
    dr6: int
    dr7: int
    hits: tuple[object, ...] = ()


class RdMsr(Value):
    """KVM_EXIT_X86_RDMSR: the guest reads MSR `index`; `reason` is a KVM_MSR_EXIT_REASON_*; to be answered, or refused
    with fail_msr() (the guest gets #GP)."""

    index: int
    reason: int


class WrMsr(Value):
    """KVM_EXIT_X86_WRMSR: the guest writes `data` (64 bits) to MSR `index`; fail_msr() refuses it with #GP."""

    index: int
    data: int
    reason: int


class Hypercall(Value):
    """KVM_EXIT_HYPERCALL: hypercall `nr` with six `args` and `flags`; answer(value) sets what the guest gets in RAX."""

    nr: int
    args: tuple[int, ...]
    flags: int


class SystemEvent(Value):
    """KVM_EXIT_SYSTEM_EVENT: `type` is KVM_SYSTEM_EVENT_* (shutdown 1, reset 2, crash 3, ...), `data` its words."""

    type: int
    data: tuple[int, ...]


class DirtyRingFull(Value):
    """KVM_EXIT_DIRTY_RING_FULL: harvest the ring, then KVM_RESET_DIRTY_RINGS."""


class X86BusLock(Value):
    """KVM_EXIT_X86_BUS_LOCK: the guest took a bus lock (KVM_CAP_X86_BUS_LOCK_EXIT)."""


class Notify(Value):
    """KVM_EXIT_NOTIFY: no event window for too long; `flags` KVM_NOTIFY_CONTEXT_INVALID = 1."""

    flags: int


class TprAccess(Value):
    """KVM_EXIT_TPR_ACCESS: the guest touched the TPR at `rip`."""

    rip: int
    is_write: bool


class SetTpr(Value):
    """KVM_EXIT_SET_TPR: the guest lowered CR8 below what the last run exported."""


class IoApicEoi(Value):
    """KVM_EXIT_IOAPIC_EOI: end of interrupt for `vector`, with the split irqchip."""

    vector: int


class Exception_(Value):
    """KVM_EXIT_EXCEPTION: `exception` vector and `error_code` (no KVM of today gives it on x86)."""

    exception: int
    error_code: int


class Xen(Value):
    """KVM_EXIT_XEN: a Xen hypercall: `input` number and six `params`."""

    type: int
    longmode: int
    cpl: int
    input: int
    params: tuple[int, ...]


class Unknown(Value):
    """Any other exit reason: `reason` as the kernel gave it, `data` the 256 bytes of the exit union as they were."""

    reason: int
    data: bytes


class Interrupted(Value):
    """KVM_RUN came back with EINTR, or was not entered because it would have.

    `cause`: "kick"; "signal" (one that this process handles); "timeout"; with a batch also "limit" (max_exits served)
    and "records" (the record buffer is full).  Run again to go on; nothing is lost.
    """

    cause: str


class Again(Value):
    """KVM_RUN said EAGAIN: the vCPU took INIT or SIPI, or left its wait for them.  Run again."""


if TYPE_CHECKING:
    Exit: TypeAlias = (
        IoOut
        | IoIn
        | MmioRead
        | MmioWrite
        | HostFault
        | MemoryFault
        | Hlt
        | Shutdown
        | IrqWindowOpen
        | InternalError
        | FailEntry
        | Debug
        | RdMsr
        | WrMsr
        | Hypercall
        | SystemEvent
        | DirtyRingFull
        | X86BusLock
        | Notify
        | TprAccess
        | SetTpr
        | IoApicEoi
        | Exception_
        | Xen
        | Unknown
        | Interrupted
        | Again
    )
else:
    Exit = Value

_EXIT_UNION = 32  # offset of the union in struct kvm_run
_EXIT_UNION_SIZE = 256


def _simple(word: int) -> Exit:
    # The exit of a word that says all there is (see native/run.h).
    reason = word & 0xFF
    if reason == 2:
        size = word >> 9 & 0xF
        port = word >> 14 & 0xFFFF
        if word & 0x100:
            return IoOut(port, size, 1, (word >> 30).to_bytes(4, "little")[:size])
        return IoIn(port, size, 1)
    if reason == 5:
        return Hlt()
    if reason == 8:
        return Shutdown()
    return IrqWindowOpen()


def decode(run: Any, size: int | None = None) -> Exit:
    """The exit that a `struct kvm_run *` shows; `Unknown` for a reason that has no class, or data beyond the page.

    `size`: bytes that can be read at `run`; without, those of the struct alone.  An MMIO exit is given as such: whether
    it lies in a memslot only the VM can tell.
    """
    if run.exit_reason == lib.KVM_EXIT_IO:
        return _io(run, ffi.sizeof("struct kvm_run") if size is None else size)
    decoder = _DECODERS.get(run.exit_reason)
    return _unknown(run) if decoder is None else decoder(run)


def _unknown(run: Any) -> Unknown:
    raw = bytes(ffi.buffer(run, _EXIT_UNION + _EXIT_UNION_SIZE)[_EXIT_UNION:])
    return Unknown(run.exit_reason, raw)


def _io(run: Any, size: int) -> Exit:
    io = run.io
    if io.direction == lib.KVM_EXIT_IO_IN:
        return IoIn(io.port, io.size, io.count)
    if io.data_offset + io.size * io.count > size:
        return _unknown(run)
    data = ffi.buffer(ffi.cast("uint8_t *", run) + io.data_offset, io.size * io.count)[:]
    return IoOut(io.port, io.size, io.count, data)


def _mmio(run: Any) -> Exit:
    mmio = run.mmio
    if mmio.is_write:
        return MmioWrite(mmio.phys_addr, ffi.buffer(mmio.data)[: mmio.len])
    return MmioRead(mmio.phys_addr, mmio.len)


def _internal(run: Any) -> Exit:
    suberror, ndata = run.internal.suberror, min(run.internal.ndata, 16)
    insn = b""
    if suberror == lib.KVM_INTERNAL_ERROR_EMULATION and ndata >= 4:
        failure = run.emulation_failure
        if failure.flags & lib.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES:
            insn = ffi.buffer(failure.insn_bytes)[: failure.insn_size]
    return InternalError(suberror, tuple(run.internal.data[0:ndata]), insn)


def _debug(run: Any) -> Exit:
    arch = run.debug.arch
    return Debug(arch.exception, arch.pc, arch.dr6, arch.dr7)


def _system_event(run: Any) -> Exit:
    event = run.system_event
    return SystemEvent(event.type, tuple(event.data[0 : min(event.ndata, 16)]))


def _xen(run: Any) -> Exit:
    hcall = run.xen.u.hcall
    return Xen(run.xen.type, hcall.longmode, hcall.cpl, hcall.input, tuple(hcall.params))


_DECODERS: dict[int, Callable[[Any], Exit]] = {
    1: lambda run: Exception_(run.ex.exception, run.ex.error_code),
    3: lambda run: Hypercall(run.hypercall.nr, tuple(run.hypercall.args), run.hypercall.flags),
    4: _debug,
    6: _mmio,
    9: lambda run: FailEntry(run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu),
    11: lambda _run: SetTpr(),
    12: lambda run: TprAccess(run.tpr_access.rip, bool(run.tpr_access.is_write)),
    17: _internal,
    24: _system_event,
    26: lambda run: IoApicEoi(run.eoi.vector),
    29: lambda run: RdMsr(run.msr.index, run.msr.reason),
    30: lambda run: WrMsr(run.msr.index, run.msr.data, run.msr.reason),
    31: lambda _run: DirtyRingFull(),
    33: lambda _run: X86BusLock(),
    34: _xen,
    37: lambda run: Notify(run.notify.flags),
}
