"""Checks of hvmodel.arch.exceptions: the kernel's own exception queue, and what a guest sees of what comes out of it.

The queue cannot be filled from outside: KVM_SET_VCPU_EVENTS puts one exception there and merges nothing.  So the second
one is raised by the kernel itself, while it completes an instruction.  The guest's instruction first reads where there
is no memory, which is an exit; at that exit the first exception is put; the answer lets the instruction go on, to where
it must fail, and KVM_RUN returns at once (immediate_exit).  #BP and #MC are raised by an ioctl instead.  Then
KVM_GET_VCPU_EVENTS shows the queue as it was merged, and the next KVM_RUN delivers it to a handler that is one HLT.

The guest is one of long mode, CPL0, or real mode; its tables are written here, byte by byte.
"""

from __future__ import annotations

import errno
import random
from itertools import product

from .._ffi import ffi, lib
from ..arch.exceptions import DB_PAYLOAD, ExceptionQueue
from ..arch.msr import Msr
from ..arch.vectors import Vector, has_error_code, is_exception, vector_name
from ..errors import ArgumentError, KvmError
from ..state.values import VcpuEvents
from ..value import Value
from .registry import check
from .result import Lacking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, Self

    from ..kvm import Vcpu
    from .result import Tally

__all__ = ["check_exceptions", "check_exceptions_delivery", "check_exceptions_order", "check_exceptions_refused"]

# The guest's memory.  What is mapped is 0 to 2 MiB, of which the first MiB is RAM, and 2 to 4 MiB, where nothing is.
_IVT = 0x0  # of real mode
_PML4, _PDPT, _PD = 0x1000, 0x2000, 0x3000
_GDT = 0x4000
_IDT = 0x5000
_HANDLERS = 0x7000  # that of vector v is one HLT, at _HANDLERS + v
_CODE = 0x8000
_STACK = 0x9000
_RAM = 1 << 20
_MMIO = 0x200000
_UNMAPPED = 0x400000
_NON_CANONICAL = 1 << 63

_DESCRIPTORS = (
    0,
    0x00209B0000000000,  # 0x08: 64-bit code
    0x00CF93000000FFFF,  # 0x10: data
    0x00CF13000000FFFF,  # 0x18: data that is not present
)
_ABSENT = 0x18

_RFLAGS_TF = 0x100
_CR4 = 0x60  # PAE, MCE
_CR2, _DR6, _DR7 = 0x1111000, 0xFFFF0FF0, 0x400
_HLT = b"\xf4"
_READ = bytes.fromhex("488b06")  # mov rax, [rsi]


class _Second(Value):
    # An exception, and what raises it: the instruction `code`, which reads `answer` from _MMIO by RSI, and before it
    # goes on `act`; without code `act` alone.
    vector: int
    error_code: int | None
    payload: int | None
    code: bytes = b""
    answer: bytes = b""
    rdi: int = 0
    rflags: int = 2
    act: Callable[[Vcpu], object] | None = None

    def can_follow(self, state: str) -> bool:
        # KVM_SET_GUEST_DEBUG gives EBUSY where an exception is pending.
        return self.vector != Vector.BP or state != "pending"


def _breakpoint(vcpu: Vcpu) -> None:
    control = lib.KVM_GUESTDBG_INJECT_BP
    vcpu.ioctl("KVM_SET_GUEST_DEBUG", ffi.new("struct kvm_guest_debug *", {"control": control}))


def _x87_error(vcpu: Vcpu) -> None:
    # FCW with IM clear, FSW with B, ES and IE set: the next x87 or MMX instruction reports an invalid operation.
    vcpu.fpu = ffi.new("struct kvm_fpu *", {"fcw": 0x37E, "fsw": 0x8081, "mxcsr": 0x1F80})


def _machine_check(vcpu: Vcpu) -> None:
    # MCG_STATUS clear: none is under way.  MCi_STATUS VAL and UC, MCG_STATUS.MCIP: an error that was not corrected.
    vcpu.set_msrs({Msr.IA32_MCG_STATUS: 0})
    vcpu.ioctl("KVM_X86_SET_MCE", ffi.new("struct kvm_x86_mce *", {"status": 1 << 63 | 1 << 61, "mcg_status": 4}))


_SECONDS = (
    _Second(Vector.DE, None, None, bytes.fromhex("48f736"), bytes(8)),  # div qword [rsi]: by zero
    _Second(Vector.DB, None, 0x4000, _READ, bytes(8), 0, 2 | _RFLAGS_TF),  # one step
    _Second(Vector.BP, None, None, act=_breakpoint),
    _Second(Vector.UD, None, None, bytes.fromhex("8e0e"), bytes(2)),  # mov cs, [rsi]
    _Second(Vector.NP, _ABSENT, None, bytes.fromhex("8e1e"), _ABSENT.to_bytes(2, "little")),  # mov ds, [rsi]
    _Second(Vector.SS, _ABSENT, None, bytes.fromhex("8e16"), _ABSENT.to_bytes(2, "little")),  # mov ss, [rsi]
    _Second(Vector.GP, 0, None, bytes.fromhex("48a5"), bytes(8), _NON_CANONICAL),  # movsq
    _Second(Vector.PF, 2, _UNMAPPED, bytes.fromhex("48a5"), bytes(8), _UNMAPPED),  # movsq: a write, not present
    _Second(Vector.MF, None, None, bytes.fromhex("0f6f06"), bytes(8), act=_x87_error),  # movq mm0, [rsi]
    _Second(Vector.MC, None, None, act=_machine_check),
)
_FIRSTS = tuple(vector for vector in range(32) if is_exception(vector))


class _Guest:
    # A VM with one vCPU, and the capabilities that the payload and the triple fault of its events take.
    def __init__(self, *, payload: bool, triple_fault: bool) -> None:
        from contextlib import ExitStack

        from ..host import Mapping
        from ..kvm import Kvm

        self.payload, self.triple_fault = payload, triple_fault
        self.has_read_left = False
        self._stack = ExitStack()
        try:
            kvm = self._stack.enter_context(Kvm())
            self.ram = self._stack.enter_context(Mapping(None, _RAM))
            vm = self._stack.enter_context(kvm.create_vm())
            if payload:
                vm.enable_cap(lib.KVM_CAP_EXCEPTION_PAYLOAD, 1)
            if triple_fault:
                vm.enable_cap(lib.KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)
            vm.set_tss_addr(0xFFFBD000)
            vm.set_user_memory_region(0, 0, self.ram)
            self.vcpu: Vcpu = self._stack.enter_context(vm.create_vcpu())
            self.vcpu.set_cpuid2(kvm.supported_cpuid())
            self.vcpu.ioctl("KVM_X86_SETUP_MCE", ffi.new("uint64_t *", 1))  # one bank, whose control is all ones
            self._write_tables()
            self._long = self._long_mode()
            self._real = self._real_mode()
        except BaseException:
            self._stack.close()
            raise
        self.zero = {"flags": 0xF & ~2 | (0x10 if payload else 0) | (0x20 if triple_fault else 0)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _write_tables(self) -> None:
        write = self.ram.write
        write(_PML4, _qword(_PDPT | 3))
        write(_PDPT, _qword(_PD | 3))
        write(_PD, _qword(0x83) + _qword(_MMIO | 0x83))
        write(_GDT, b"".join(_qword(word) for word in _DESCRIPTORS))
        for vector in range(256):
            handler = _HANDLERS + vector
            # an interrupt gate: offset, selector 8, present and of type 14
            write(_IDT + 16 * vector, _qword(handler | 8 << 16 | 0x8E00 << 32) + bytes(8))
            write(_IVT + 4 * vector, handler.to_bytes(4, "little"))
        write(_HANDLERS, _HLT * 256)

    def _long_mode(self) -> Any:
        sregs = self.vcpu.sregs
        _segment(sregs.cs, 8, 0xB, long=1)
        for name in ("ds", "es", "fs", "gs", "ss"):
            _segment(getattr(sregs, name), 0x10, 3, db=1)
        _segment(sregs.tr, 0, 0xB, s=0, limit=0x67, g=0)
        sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer = 0x80050033, _CR2, _PML4, _CR4, 0xD00
        sregs.gdt.base, sregs.gdt.limit = _GDT, 8 * len(_DESCRIPTORS) - 1
        sregs.idt.base, sregs.idt.limit = _IDT, 0xFFF
        return sregs

    def _real_mode(self) -> Any:
        sregs = self.vcpu.sregs
        for name, kind in (("cs", 0xB), ("ds", 3), ("es", 3), ("fs", 3), ("gs", 3), ("ss", 3)):
            _segment(getattr(sregs, name), 0, kind, limit=0xFFFF, g=0)
        sregs.cr0, sregs.cr2, sregs.efer = 0x10, _CR2, 0
        sregs.idt.base, sregs.idt.limit = _IVT, 0x3FF
        return sregs

    def start(self, code: bytes, *, real: bool = False, dr6: int = _DR6, dr7: int = _DR7, **regs: int) -> None:
        # The state before a case: nothing waits, and `code` comes next.
        self.put({})
        self.vcpu.sregs = self._real if real else self._long
        self.vcpu.regs = ffi.new("struct kvm_regs *", {"rip": _CODE, "rsp": _STACK, "rflags": 2, "rsi": _MMIO, **regs})
        self.vcpu.debugregs = ffi.new("struct kvm_debugregs *", {"dr6": dr6, "dr7": dr7})
        self.vcpu.fpu = ffi.new("struct kvm_fpu *", {"fcw": 0x37F, "mxcsr": 0x1F80})
        self.ram.write(_CODE, code)

    def put(self, events: dict[str, int]) -> None:
        # KVM_SET_VCPU_EVENTS, zero where nothing is said.
        record = VcpuEvents()
        nested: dict[str, Any] = {**self.zero, **events}
        record = record.replace(**nested)
        self.vcpu.vcpu_events = ffi.from_buffer("struct kvm_vcpu_events *", bytearray(bytes(record)))

    def events(self) -> dict[str, Any]:
        # KVM_GET_VCPU_EVENTS by the paths of its fields.
        return dict(VcpuEvents.from_bytes(ffi.buffer(self.vcpu.vcpu_events)).items())

    def registers(self) -> dict[str, int]:
        # What the delivery of an exception changes, but for the stack.
        debug = self.vcpu.debugregs
        return {"cr2": self.vcpu.sregs.cr2, "dr6": debug.dr6, "dr7": debug.dr7}

    def model(self, *, defers: bool, protected: bool = True, rflags: int = 2, **registers: int) -> ExceptionQueue:
        # The model of this guest as start() leaves it.
        return ExceptionQueue(
            protected=protected,
            rflags=rflags,
            cr2=_CR2,
            dr6=registers.get("dr6", _DR6),
            dr7=registers.get("dr7", _DR7),
            exception_payload_enabled=self.payload,
            triple_fault_event=self.triple_fault,
            defers_payload=defers,
        )

    def taken(self, *, real: bool = False) -> _Taken | None:
        # From the handler that it is in back to the first one that was entered; None: it is in no handler.
        regs = self.vcpu.regs
        at, vector, found = int(regs.rsp), _handler(regs.rip), None
        while vector is not None:
            size = 2 if real else 8
            nr_words = 3 if real else 5
            stack = [int.from_bytes(self.ram.read(at + size * n, size), "little") for n in range(nr_words + 1)]
            # An error code lies below the frame, which begins with RIP and CS: the handler's or the code's CS.
            code_selector = 0 if real else 8
            error_code = None
            if not real and stack[1] != code_selector:
                error_code, stack = stack[0], stack[1:]
            at += size * (nr_words + (error_code is not None))
            found = _Taken(vector, error_code, stack[2])
            if not real:
                at = stack[3]  # the stack was aligned before the frame was pushed
            vector = _handler(stack[0])
        return found


class _Taken(Value):
    # The first handler: of which vector, with which error code, and the flags that were pushed.
    vector: int
    error_code: int | None
    rflags: int


def _handler(rip: int) -> int | None:
    # The vector whose handler this is in, at its HLT or behind it: RIP is behind the HLT that made the exit.
    return rip - _HANDLERS - 1 if _HANDLERS < rip <= _HANDLERS + 256 else None


def _qword(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _segment(
    segment: Any,
    selector: int,
    kind: int,
    *,
    s: int = 1,
    long: int = 0,
    db: int = 0,
    limit: int = 0xFFFFFFFF,
    g: int = 1,
) -> None:
    segment.base, segment.limit, segment.selector, segment.type, segment.s = 0, limit, selector, kind, s
    segment.present, segment.dpl, segment.db, segment.l, segment.g, segment.unusable = 1, 0, db, long, g, 0


def _compare(tally: Tally, case: str, ours: dict[str, int], theirs: dict[str, Any]) -> bool:
    # Compares what the model has; shows what differs.
    wrong = [name for name in ours if ours[name] != theirs[name]]
    return tally.compare(case, {name: ours[name] for name in wrong}, {name: theirs[name] for name in wrong})


def _queued(model: ExceptionQueue) -> dict[str, int]:
    # The events of the model but the shadow, which is an instruction's doing: MOV SS makes one even where it fails.
    return {name: value for name, value in model.get_events().items() if name != "interrupt.shadow"}


def _raise_second(guest: _Guest, second: _Second, first: dict[str, int] | None) -> bool:
    # Lets the kernel raise `second` while `first` waits; False where this host does not do it this way.
    from ..kvm import Hlt, MmioRead

    if guest.has_read_left:
        # The next read takes it, without an exit; a kernel that drops it shows the exit.
        guest.start(_READ + _HLT)
        if guest.vcpu.run(10) != Hlt():
            guest.vcpu.answer(bytes(8))
        guest.has_read_left = False
    guest.start(second.code or _HLT, rdi=second.rdi, rflags=second.rflags)
    if second.code:
        if guest.vcpu.run(10) != MmioRead(_MMIO, len(second.answer)):
            return False
        guest.vcpu.answer(second.answer)
    if first is not None:
        guest.put(first)
    try:
        if second.act is not None:
            second.act(guest.vcpu)
    except KvmError:
        return False
    guest.vcpu.complete_io()
    # Where `act` made the instruction fail before it read again, KVM still has what it was answered.
    guest.has_read_left = bool(second.code) and second.act is not None
    return True


def _first(vector: int, state: str) -> dict[str, int]:
    # KVM_SET_VCPU_EVENTS for an exception that is "injected" or "pending".
    code = has_error_code(vector)
    return {
        f"exception.{state}": 1,
        "exception.nr": vector,
        "exception.has_error_code": int(code),
        "exception.error_code": 0x70 if code else 0,
    }


def _defers_payload(guest: _Guest) -> bool:
    # Whether this kernel keeps the payload of a #PF until it is injected, or has put it into CR2 already.
    (page_fault,) = [second for second in _SECONDS if second.vector == Vector.PF]
    if not _raise_second(guest, page_fault, None):
        raise Lacking("the kernel does not emulate MOVS from where there is no memory")
    return bool(guest.events()["exception_has_payload"])


def _has(cap: int) -> bool:
    from ..kvm import Kvm

    with Kvm() as kvm:
        return kvm.check_extension(cap) > 0


@check("exception queue", "KVM_GET_VCPU_EVENTS after the kernel merged two")
def check_exceptions(tally: Tally, _cases: int) -> None:
    """Every first vector, injected and pending, x every second one that an instruction or an ioctl can raise.

    With the capabilities of payloads and triple faults enabled, and with neither.  Compared each time: the events, CR2,
    DR6 and DR7 after the merge; what the next KVM_RUN does; and all of it again after that.
    """
    triple_fault = _has(lib.KVM_CAP_X86_TRIPLE_FAULT_EVENT)
    with _Guest(payload=True, triple_fault=triple_fault) as guest, _Guest(payload=False, triple_fault=False) as plain:
        if not triple_fault:
            tally.lack("KVM_CAP_X86_TRIPLE_FAULT_EVENT: a triple fault is seen by its exit only")
        defers = _defers_payload(guest)
        seconds = []
        for second in _SECONDS:
            if _raise_second(guest, second, None) and guest.events()["exception.nr"] == second.vector:
                seconds.append(second)
            else:
                tally.lack(f"{vector_name(second.vector)} as the second exception")
        if not {Vector.GP, Vector.PF} <= {second.vector for second in seconds}:
            tally.break_off("#GP or #PF cannot be raised as a second exception")
            return
        for one, states in ((guest, ("injected", "pending")), (plain, ("injected",))):
            for second, first in product(seconds, (None, *_FIRSTS)):
                for state in states if first is not None else ("",):
                    if second.can_follow(state):
                        _queue_case(tally, one, second, first, state, defers)


def _queue_case(tally: Tally, guest: _Guest, second: _Second, first: int | None, state: str, defers: bool) -> None:
    model = guest.model(defers=defers, rflags=second.rflags)
    events = None
    case = vector_name(second.vector)
    if first is not None:
        events = {**guest.zero, **_first(first, state)}
        model.set_events(events)
        case += f" while {vector_name(first)} is {state}"
    if not guest.payload:
        case += ", without capabilities"
    if not _raise_second(guest, second, events):
        tally.compare(f"{case}: whether it is raised", True, False)
        return
    model.queue(second.vector, second.error_code, second.payload)
    _compare(tally, f"{case}: the queue", _queued(model), guest.events())
    _compare(tally, f"{case}: registers", _registers(model), guest.registers())
    _enter(tally, case, guest, model)


def _registers(model: ExceptionQueue) -> dict[str, int]:
    return {"cr2": model.cr2, "dr6": model.dr6, "dr7": model.dr7}


def _enter(tally: Tally, case: str, guest: _Guest, model: ExceptionQueue, *, real: bool = False) -> None:
    # The next KVM_RUN: which handler it leads to, what that finds on the stack, and what is left.
    from ..kvm import Hlt, Shutdown

    exit = guest.vcpu.run(10)
    ours = model.enter()
    if ours is not None and ours.kind == "shutdown":
        tally.compare(f"{case}: the next KVM_RUN", Shutdown(), exit)
    elif tally.compare(f"{case}: the next KVM_RUN", Hlt(), exit):
        model.delivered()
        taken = guest.taken(real=real)
        theirs = None if taken is None else (taken.vector, taken.error_code, taken.rflags)
        pushed = model.rflags & 0xFFFF if real else model.rflags
        tally.compare(f"{case}: vector, error code and flags", ours and (ours.vector, ours.error_code, pushed), theirs)
    _compare(tally, f"{case}: the queue after that", _queued(model), guest.events())
    _compare(tally, f"{case}: registers after that", _registers(model), guest.registers())


@check("exception delivery", "the guest's stack, CR2, DR6 and DR7", cases=500, slow=12_400)
def check_exceptions_delivery(tally: Tally, cases: int) -> None:
    """Every vector, pending and injected, in long and real mode; random error codes, payloads, flags, DR6 and DR7."""
    dice = random.Random(0)
    kinds = list(product(_FIRSTS, ("pending", "injected"), (False, True)))
    with _Guest(payload=True, triple_fault=False) as guest:
        for number in range(cases):
            vector, state, real = kinds[number % len(kinds)]
            rflags = 2 | (dice.getrandbits(12) & 0xCD5)  # OF, DF, SF, ZF, AF, PF, CF
            dr6, dr7 = _DR6 | (dice.getrandbits(16) & 0xE00F), _DR7 | dice.getrandbits(1) << 13
            events = {**guest.zero, **_first(vector, state)}
            if events["exception.has_error_code"]:
                events["exception.error_code"] = dice.getrandbits(15)
            if vector in (Vector.DB, Vector.PF) and state == "pending" and dice.random() < 0.8:
                is_page_fault = vector == Vector.PF
                events["exception_has_payload"] = 1
                events["exception_payload"] = dice.getrandbits(47 if is_page_fault else 17)
                events["exception_payload"] &= ~0 if is_page_fault else DB_PAYLOAD
            guest.start(_HLT, real=real, dr6=dr6, dr7=dr7, rflags=rflags)
            guest.put(events)
            model = guest.model(defers=True, protected=not real, rflags=rflags, dr6=dr6, dr7=dr7)
            model.set_events(events)
            case = f"case {number}: {vector_name(vector)}, {state}, {'real' if real else 'long'} mode"
            _enter(tally, case, guest, model, real=real)


@check("order of events at entry", "the handler that the guest enters first")
def check_exceptions_order(tally: Tally, _cases: int) -> None:
    """All combinations: an exception pending or injected, NMIs injected, pending and masked, an interrupt, a shadow.

    The events as they are read back, and the handler that is entered first.  What follows before that handler's first
    instruction differs between vendor modules.
    """
    from ..kvm import Hlt, Shutdown

    triple_fault = _has(lib.KVM_CAP_X86_TRIPLE_FAULT_EVENT)
    with _Guest(payload=True, triple_fault=triple_fault) as guest:
        for state, injected, pending, masked, irq, shadow, triple in product(
            ("", "injected", "pending"), (0, 1), (0, 1, 2), (0, 1), (0, 1), (0, 1, 2), range(1 + triple_fault)
        ):
            if shadow and (injected or irq):
                continue  # VMX refuses to enter the guest
            events = {
                **guest.zero,
                **(_first(Vector.UD, state) if state else {}),
                "nmi.injected": injected,
                "nmi.pending": pending,
                "nmi.masked": masked,
                "interrupt.injected": irq,
                "interrupt.nr": 0x40,
                "interrupt.shadow": shadow,
                "triple_fault.pending": triple,
            }
            guest.start(_HLT, rflags=0x202)
            guest.put(events)
            model = guest.model(defers=True, rflags=0x202)
            model.set_events(events)
            case = ", ".join(f"{name}={value}" for name, value in events.items() if value)
            found = guest.events()
            _compare(tally, f"{case}: the queue", _queued(model), found)
            # AMD has one bit for both kinds of shadow.
            tally.compare(f"{case}: the shadow", bool(model.interrupt_shadow), bool(found["interrupt.shadow"]))
            ours, exit = model.enter(), guest.vcpu.run(10)
            if ours is not None and ours.kind == "shutdown":
                tally.compare(f"{case}: KVM_RUN", Shutdown(), exit)
            elif tally.compare(f"{case}: KVM_RUN", Hlt(), exit):
                taken = guest.taken()
                tally.compare(f"{case}: the first handler", ours and ours.vector, taken and taken.vector)


@check("events that KVM refuses", "EINVAL of KVM_SET_VCPU_EVENTS")
def check_exceptions_refused(tally: Tally, _cases: int) -> None:
    """Every vector, as nothing, injected and pending, and every bit of the flags, with the capabilities and without.

    Where neither refuses, the events as they are read back.
    """
    triple_fault = _has(lib.KVM_CAP_X86_TRIPLE_FAULT_EVENT)
    with _Guest(payload=True, triple_fault=triple_fault) as guest, _Guest(payload=False, triple_fault=False) as plain:
        for one in (guest, plain):
            vectors = [
                {"exception.nr": nr, **({f"exception.{state}": 1} if state else {})}
                for nr, state in product(range(256), ("", "injected", "pending"))
            ]
            for events in [*vectors, *({"flags": 1 << bit} for bit in range(32))]:
                case = ", ".join(f"{name}={value:#x}" for name, value in events.items())
                one.put({})
                model = one.model(defers=True)
                ours, theirs = "taken", "taken"
                try:
                    model.set_events({**one.zero, **events})
                except ArgumentError:
                    ours = "refused"
                try:
                    one.put(events)
                except KvmError as error:
                    theirs = "refused" if error.errno == errno.EINVAL else str(error)
                tally.compare(f"{case}, {'with' if one.payload else 'without'} capabilities", ours, theirs)
                _compare(tally, f"{case}: the queue", _queued(model), one.events())
