"""Exceptions, NMIs and interrupts for a vCPU: what waits, and putting more there.

An exception is put into the queue as the kernel itself would raise it there: merged with one that waits already, by the
model of hvmodel.arch.exceptions.  Where the VM has KVM_CAP_EXCEPTION_PAYLOAD enabled it becomes pending, and its
payload goes along.  Elsewhere KVM takes injected ones only, and what their delivery would do before (RFLAGS.RF, CR2,
DR6, DR7.GD, waking a halted vCPU) is done here, as QEMU does with CR2 and DR6.

Sources: linux:arch/x86/kvm/x86.c kvm_vcpu_ioctl_x86_set_vcpu_events, kvm_vcpu_ioctl_interrupt,
kvm_vcpu_ready_for_interrupt_injection@v6.18; qemu:target/i386/kvm/kvm.c kvm_queue_exception@v7.2.
"""

from __future__ import annotations

import errno

from .._ffi import ffi, lib
from ..arch.exceptions import DB_PAYLOAD, ExceptionQueue, QueuedException
from ..arch.vectors import Vector, has_error_code, is_exception, vector_name
from ..errors import ArgumentError, ArgumentTypeError, BusyError, KvmError, UnsupportedError
from ..value import Value
from .values import VcpuEvents
from .vcpu_state import _vcpu_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..kvm import Vcpu

__all__ = ["EventQueue", "inject_exception", "inject_interrupt", "inject_nmi", "queue"]

_CR0_PE = 1
_RFLAGS_IF = 1 << 9
_PAYLOAD, _TRIPLE_FAULT = 0x10, 0x20  # KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_TRIPLE_FAULT
_SHADOW_MOV_SS, _SHADOW_STI = 1, 2  # KVM_X86_SHADOW_INT_*

# Error codes that depend on the processor: #CP has one where there is such a thing, #VC and #SX are AMD's.
_EITHER = frozenset({Vector.CP, Vector.VC, Vector.SX})
_WITH_PAYLOAD = (Vector.DB, Vector.PF)


class EventQueue(Value):
    """What waits for a vCPU, as KVM_GET_VCPU_EVENTS tells it.

    `exception`: the one that is pending (not yet in the guest's state) or injected (KVM goes on delivering it); None
    where there is none, and for #BP and #OF, which KVM does not tell.  Without KVM_CAP_EXCEPTION_PAYLOAD enabled a
    pending one is told as injected.
    `nmi_injected`, `nmi_pending` (how many wait), `nmi_masked` (until IRET).
    `interrupt`: the vector of the interrupt that is injected, or None; those that wait in an interrupt controller are
    its state.  `interrupt_shadow`: 1 behind MOV SS or POP SS, 2 behind STI: none is taken at the next instruction.
    `smm`, `smi_pending`: system management mode.
    `triple_fault`: whether one is pending; None where KVM_CAP_X86_TRIPLE_FAULT_EVENT is not enabled.
    `events`: all of it as the kernel's struct.

    bool() of it: whether anything is pending or injected.
    """

    exception: QueuedException | None
    nmi_injected: bool
    nmi_pending: int
    nmi_masked: bool
    interrupt: int | None
    interrupt_shadow: int
    smm: bool
    smi_pending: bool
    triple_fault: bool | None
    events: VcpuEvents

    @classmethod
    def of(cls, events: VcpuEvents) -> EventQueue:
        """What a struct of KVM_GET_VCPU_EVENTS says.

        >>> from hvmodel.state import ExceptionEvent, VcpuEvents
        >>> waits = EventQueue.of(VcpuEvents(flags=0x1D, exception=ExceptionEvent(pending=1, nr=6)))
        >>> waits.exception.vector, waits.interrupt, waits.triple_fault, bool(waits)
        (6, None, None, True)
        """
        if not isinstance(events, VcpuEvents):
            raise ArgumentTypeError("EventQueue.of", "events", events, "VcpuEvents")
        told = ExceptionQueue.from_events(dict(_numbers(events))).exception
        return cls(
            told or None,
            bool(events.nmi.injected),
            events.nmi.pending,
            bool(events.nmi.masked),
            events.interrupt.nr if events.interrupt.injected else None,
            events.interrupt.shadow,
            bool(events.smi.smm),
            bool(events.smi.pending),
            bool(events.triple_fault.pending) if events.flags & _TRIPLE_FAULT else None,
            events,
        )

    def __bool__(self) -> bool:
        waits = (self.exception, self.nmi_injected, self.nmi_pending, self.smi_pending, self.triple_fault)
        return any(waits) or self.interrupt is not None

    def __str__(self) -> str:
        shown = []
        if self.triple_fault:
            shown.append("a triple fault")
        if self.exception:
            text = f"{vector_name(self.exception.vector)} {'injected' if self.exception.injected else 'pending'}"
            if self.exception.has_error_code:
                text += f", error code {self.exception.error_code:#x}"
            if self.exception.has_payload:
                text += f", payload {self.exception.payload:#x}"
            shown.append(text)
        shown += ["an NMI injected"] if self.nmi_injected else []
        shown += [f"{self.nmi_pending} NMI pending"] if self.nmi_pending else []
        shown += [f"interrupt {self.interrupt:#x} injected"] if self.interrupt is not None else []
        shown += ["an SMI pending"] if self.smi_pending else []
        return "; ".join(shown) or "nothing waits"


def _numbers(events: VcpuEvents) -> list[tuple[str, int]]:
    return [(path, leaf) for path, leaf in events.items() if isinstance(leaf, int)]


def _get(vcpu: Vcpu) -> VcpuEvents:
    return VcpuEvents.from_bytes(ffi.buffer(vcpu.vcpu_events))


def _put(vcpu: Vcpu, events: VcpuEvents) -> None:
    struct = ffi.new("struct kvm_vcpu_events *")
    ffi.memmove(struct, bytes(events), VcpuEvents.SIZE)
    vcpu.vcpu_events = struct


def queue(vcpu: Vcpu) -> EventQueue:
    """What waits for the vCPU now (KVM_GET_VCPU_EVENTS, 4.31).

    At an exit of IO, MMIO or MSRs the instruction is unfinished, and may yet raise an exception; this does not finish
    it.  Where KVM_CAP_EXCEPTION_PAYLOAD is not enabled the kernel delivers a waiting payload to CR2 or DR6 now.

    ClosedError, and KvmError where the kernel refuses.

    >>> import hvmodel as hv
    >>> with hv.Machine(ram="64K") as m:
    ...     str(queue(m.vcpu.kvm))
    'nothing waits'
    """
    return EventQueue.of(_get(_vcpu_of("queue", vcpu)))


def inject_exception(vcpu: Vcpu, vector: int, error_code: int | None = None, payload: int | None = None) -> EventQueue:
    """Raise exception `vector` before the next instruction of the guest; returns what waits then.

    `vector`: 0 to 31, but not 2 (that is `inject_nmi`).  `error_code`: 0 to 0xffffffff, just where the exception pushes
    one: #DF, #TS, #NP, #SS, #GP, #PF, #AC, not in real mode; #CP, #VC and #SX with one or without.  VMX cuts it to 16
    bits.  `payload`: the address of a #PF, which goes to CR2, or the bits of a #DB as in `DB_PAYLOAD`, which go to DR6;
    None: they stay as they are.

    One that waits already is merged with it: two of #DE, #TS, #NP, #SS, #GP, or one of these or #PF on top of #PF, make
    #DF; any on top of #DF a triple fault; else the new one takes the place of the old.  See `merge`.

    RIP stays where it is, which is right for a fault.  What #BP or #OF push is the vendor module's choice; KVM takes
    them for raised by an instruction.

    First finishes the instruction of the last exit.  ArgumentError, ArgumentTypeError: a vector, error code or payload
    that cannot be.  BusyError: #DF waits, and KVM_CAP_X86_TRIPLE_FAULT_EVENT is not enabled, so that a triple fault
    cannot be put.  UnansweredError: a read exit waits for its data.  After an error the vCPU is as before.

    Ioctls: KVM_GET_SREGS, KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS; without KVM_CAP_EXCEPTION_PAYLOAD also those of
    the registers, and of MP_STATE, for a halted vCPU must be woken.  One thread at a time, as Vcpu.run.
    """
    call = "inject_exception"
    vcpu = _vcpu_of(call, vcpu)
    _check_exception(call, vector, error_code, payload)
    vcpu.complete_io()
    before = _get(vcpu)  # first: it may deliver a payload
    sregs = vcpu.sregs
    protected = bool(sregs.cr0 & _CR0_PE)
    _check_error_code(call, vector, error_code, protected)
    model = ExceptionQueue.from_events(dict(_numbers(before)), protected=protected)
    model.queue(vector, error_code, payload)
    if model.triple_fault and not model.triple_fault_event:
        why = "#DF waits there, and a triple fault is put only with KVM_CAP_X86_TRIPLE_FAULT_EVENT enabled"
        raise BusyError(call, "the exception queue", why)
    if model.exception_payload_enabled or model.triple_fault:
        _put(vcpu, _as_put(before, model))
    else:
        _put_delivered(vcpu, before, model, sregs)
    return queue(vcpu)


def _check_exception(call: str, vector: object, error_code: object, payload: object) -> None:
    # What does not depend on the vCPU.
    for field, value, bits in (("vector", vector, 0), ("error_code", error_code, 32), ("payload", payload, 64)):
        if value is None and bits:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(call, field, value, "an int or None" if bits else "an int")
        if bits and not 0 <= value < 1 << bits:
            raise ArgumentError(call, field, value, f"0 to {(1 << bits) - 1:#x}, or None")
    assert isinstance(vector, int)
    if vector == Vector.NMI:
        raise ArgumentError(call, "vector", vector, "0 to 31, but not 2", "2 is the NMI: use inject_nmi()")
    if not is_exception(vector):
        detail = "exceptions are below 32; an interrupt is for inject_interrupt()" if vector > 31 else None
        raise ArgumentError(call, "vector", vector, "0 to 31, but not 2", detail)
    if payload is None:
        return
    if vector not in _WITH_PAYLOAD:
        raise ArgumentError(call, "payload", payload, "None", f"only #DB and #PF have one, not {vector_name(vector)}")
    assert isinstance(payload, int)
    if vector == Vector.DB and payload & ~DB_PAYLOAD:
        raise ArgumentError(call, "payload", payload, f"bits of {DB_PAYLOAD:#x}", "it goes to DR6")


def _check_error_code(call: str, vector: int, error_code: int | None, protected: bool) -> None:
    name = vector_name(vector)
    if not protected:
        if error_code is not None:
            raise ArgumentError(call, "error_code", error_code, "None", "real mode (CR0.PE clear) pushes none")
    elif vector not in _EITHER and (error_code is not None) != has_error_code(vector):
        if error_code is None:
            raise ArgumentError(call, "error_code", None, "0 to 0xffffffff", f"{name} pushes one")
        raise ArgumentError(call, "error_code", error_code, "None", f"{name} pushes none")


def _as_put(before: VcpuEvents, model: ExceptionQueue) -> VcpuEvents:
    # The events with the exception of the model.  Flags name no more than that, so that an NMI which another thread
    # sends meanwhile is not lost.
    exception = model.exception
    event = before.exception.replace(
        injected=int(exception.injected),
        pending=int(exception.pending),
        nr=exception.vector,
        has_error_code=int(exception.has_error_code),
        error_code=exception.error_code,
    )
    changed: dict[str, Any] = {
        "exception": event,
        "exception_has_payload": int(exception.has_payload),
        "exception_payload": exception.payload,
        "flags": (_PAYLOAD if model.exception_payload_enabled else 0) | (_TRIPLE_FAULT if model.triple_fault else 0),
        "triple_fault.pending": int(model.triple_fault),
    }
    return before.replace(**changed)


def _put_delivered(vcpu: Vcpu, before: VcpuEvents, model: ExceptionQueue, sregs: Any) -> None:
    # As injected, with what the entry would do before done now; all put back where one of these is refused.
    new = {"regs": vcpu.regs, "debugregs": vcpu.debugregs, "sregs": sregs, "mp_state": vcpu.mp_state}
    old = {name: bytes(ffi.buffer(struct)) for name, struct in new.items()}
    regs, debugregs, mp_state = new["regs"], new["debugregs"], new["mp_state"]
    model.rflags, model.cr2, model.dr6, model.dr7 = regs.rflags, sregs.cr2, debugregs.dr6, debugregs.dr7
    model.enter()
    regs.rflags, sregs.cr2, debugregs.dr6, debugregs.dr7 = model.rflags, model.cr2, model.dr6, model.dr7
    if mp_state.mp_state == lib.KVM_MP_STATE_HALTED:
        mp_state.mp_state = lib.KVM_MP_STATE_RUNNABLE  # a pending exception would wake it, an injected one does not
    done = []
    try:
        for name, struct in new.items():
            if bytes(ffi.buffer(struct)) != old[name]:
                done.append(name)
                setattr(vcpu, name, struct)
        _put(vcpu, _as_put(before, model))
    except BaseException as error:
        for name in done:
            ffi.memmove(new[name], old[name], len(old[name]))
            try:
                setattr(vcpu, name, new[name])
            except KvmError as refused:  # KVM can have given what it does not take: EFER.LMA without LME
                error.add_note(f"{name} could not be put back: {refused}")
        if "regs" in done:  # KVM_SET_REGS drops an exception that is pending
            _put(vcpu, before.replace(flags=0))
        raise


def inject_nmi(vcpu: Vcpu) -> None:
    """Send the vCPU an NMI (KVM_NMI, 4.64).

    It comes before the next instruction, or where NMIs are masked, in the handler of one, behind its IRET.  One more
    can wait meanwhile; further ones are that one.

    While another thread runs the vCPU, KVM takes this up when KVM_RUN returns, and the caller waits: `Vcpu.kick` has it
    return.

    UnsupportedError: no KVM_CAP_USER_NMI.  Thread safety: any thread.
    """
    _vcpu_of("inject_nmi", vcpu).nmi()


def inject_interrupt(vcpu: Vcpu, vector: int) -> None:
    """Send the vCPU external interrupt `vector`, 0 to 255, as the interrupt controller of user space (KVM_INTERRUPT).

    Without an in-kernel interrupt controller KVM asks nothing and interrupts the guest even with RFLAGS.IF clear, and a
    second vector takes the place of the first.  So this asks before, and raises BusyError, which says why, where the
    guest cannot take it now: set `request_interrupt_window` then, and run on until the exit IrqWindowOpen.

    With a split one (only the local APIC in the kernel) KVM waits itself until the guest can take it; BusyError: one
    waits already.  With a full one UnsupportedError: raise a line with Vm.irq_line().

    First finishes the instruction of the last exit; UnansweredError where a read exit waits for its data.
    Ioctls: KVM_GET_LAPIC, which says whether there is one; without, KVM_GET_VCPU_EVENTS and KVM_GET_REGS; KVM_INTERRUPT
    (4.16).  One thread at a time, as Vcpu.run.
    """
    call = "inject_interrupt"
    vcpu = _vcpu_of(call, vcpu)
    if isinstance(vector, bool) or not isinstance(vector, int):
        raise ArgumentTypeError(call, "vector", vector, "an int")
    if not 0 <= vector <= 255:
        raise ArgumentError(call, "vector", vector, "0 to 255")
    vcpu.complete_io()
    if not _has_lapic(vcpu) and (why := _closed_window(vcpu)) is not None:
        raise BusyError(call, "the interrupt window", f"{why}; set request_interrupt_window and run on")
    try:
        vcpu.interrupt(vector)
    except KvmError as error:
        if error.errno == errno.ENXIO:
            detail = "the VM has an in-kernel interrupt controller: raise one of its lines, Vm.irq_line()"
            raise UnsupportedError(errno.ENXIO, "KVM_INTERRUPT", None, None, None, detail) from None
        if error.errno == errno.EEXIST:
            raise BusyError(call, "the interrupt window", "another external interrupt waits already") from None
        raise


def _has_lapic(vcpu: Vcpu) -> bool:
    # Whether the local APIC is in the kernel, which then looks after the window itself.
    try:
        _ = vcpu.lapic
    except KvmError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def _closed_window(vcpu: Vcpu) -> str | None:
    # Why the guest cannot take an interrupt before its next instruction, or None: what the kernel asks for
    # ready_for_interrupt_injection, but now and not at the last exit.
    events = _get(vcpu)
    waits = EventQueue.of(events)
    if events.exception.injected or events.exception.pending:
        return f"{vector_name(events.exception.nr)} waits"
    if waits.nmi_injected:
        return "an NMI waits"
    if waits.interrupt is not None:
        return f"interrupt {waits.interrupt:#x} waits"
    if not vcpu.regs.rflags & _RFLAGS_IF:
        return "RFLAGS.IF is clear"
    if waits.interrupt_shadow & _SHADOW_MOV_SS:
        return "the last instruction loaded SS"
    if waits.interrupt_shadow & _SHADOW_STI:
        return "the last instruction was STI"
    return None
