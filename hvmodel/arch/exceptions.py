"""The queue of exceptions of a vCPU, as KVM keeps it: a model without a vCPU.

An exception is *pending* from the moment it is raised until the vCPU is entered, and *injected* from then on until the
guest has taken it.  One that is raised while another is pending or injected is merged with it (`merge`).  What comes
with a #DB or #PF besides the error code, the bits for DR6 or the address for CR2, is its *payload*: it reaches the
register when the exception is injected.

Names are those of struct kvm_queued_exception and struct kvm_vcpu_arch.  Not modelled: nested guests (their
exceptions become exits, exception_vmexit), system management mode, and the interrupts of an in-kernel controller.

Sources: linux:arch/x86/kvm/x86.c kvm_multiple_exception, kvm_requeue_exception, kvm_deliver_exception_payload,
kvm_check_and_inject_events, process_nmi, kvm_vcpu_ioctl_x86_{get,set}_vcpu_events@v6.18.44.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from ..errors import ArgumentError, ArgumentTypeError
from ..value import Value
from .number import ALL, number
from .vectors import (
    NR_EXCEPTIONS,
    ExceptionClass,
    ExceptionType,
    Vector,
    exception_class,
    exception_type,
    is_exception,
    is_soft,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

__all__ = [
    "DB_PAYLOAD",
    "ExceptionQueue",
    "Injection",
    "Merge",
    "QueuedException",
    "merge",
    "payload_to_dr6",
]

# The payload of a #DB, and DR6, bit by bit.  The payload is what VMX calls pending debug exceptions: a bit that is 1
# says that it happened.  DR6 has two of them the other way round, 0 for "it happened".
#
#   31        17  16  15  14  13  12  11  10        4  3  2  1  0
#   |  1 ... 1  |RTM| BT| BS| BD| 0 |BLD|  1 ... 1  |B3|B2|B1|B0|     DR6
#                ~                    ~                               ~ 0 where it happened
#               |RTM| BT| BS| BD| E |BLD|           |B3|B2|B1|B0|     payload; E: one of B0-B3 was enabled
_DR6_TRAPS = 0xF  # B0 to B3: cleared by every #DB that sets one
_DR6_ENABLED = 1 << 12  # a bit of the payload only
_DR6_ACTIVE_LOW = 0xFFFF0FF0  # RTM, BLD, and the bits that are always 1
DB_PAYLOAD = 0x1F80F
"""The bits that the payload of a #DB may have."""

_DR7_GD = 1 << 13  # general detect: MOV to a debug register raises #DB
_RFLAGS_RF = 1 << 16  # resume: no instruction breakpoint at the next instruction

# flags of struct kvm_vcpu_events: which of its fields mean something
_NMI_PENDING, _SIPI_VECTOR, _SHADOW, _SMM, _PAYLOAD, _TRIPLE_FAULT = 1, 2, 4, 8, 0x10, 0x20
_EVENT_FLAGS = _NMI_PENDING | _SIPI_VECTOR | _SHADOW | _SMM | _PAYLOAD | _TRIPLE_FAULT

# path of a field of struct kvm_vcpu_events -> its highest value
_U8, _U32 = 0xFF, 0xFFFFFFFF
_EVENTS = {
    **dict.fromkeys([f"exception.{name}" for name in ("injected", "nr", "has_error_code", "pending")], _U8),
    **dict.fromkeys([f"interrupt.{name}" for name in ("injected", "nr", "soft", "shadow")], _U8),
    **dict.fromkeys([f"nmi.{name}" for name in ("injected", "pending", "masked", "pad")], _U8),
    **dict.fromkeys([f"smi.{name}" for name in ("smm", "pending", "smm_inside_nmi", "latched_init")], _U8),
    **dict.fromkeys(("triple_fault.pending", "exception_has_payload"), _U8),
    **dict.fromkeys(("exception.error_code", "sipi_vector", "flags"), _U32),
    "exception_payload": ALL,
}


class Merge(Enum):
    """What becomes of an exception that is raised while another is pending or injected."""

    REPLACED = "replaced"
    DOUBLE_FAULT = "double fault"
    TRIPLE_FAULT = "triple fault"


def merge(first: int, second: int) -> Merge:
    """What KVM makes of exception `second` while `first` is pending or injected.

        first          | second: benign, #DF | contributory | page fault
        ---------------|---------------------|--------------|-------------
        benign         | replaced            | replaced     | replaced
        contributory   | replaced            | double fault | replaced
        page fault     | replaced            | double fault | double fault
        #DF            | triple fault        | triple fault | triple fault

    Replaced: the first is lost; its instruction raises it again when it is executed again.  In the SDM both are
    delivered one after the other then, and a benign one after #DF is no shutdown.

    ArgumentError: no exception (2, or above 31).

    >>> merge(13, 13), merge(13, 14), merge(14, 13), merge(8, 6)
    (<Merge.DOUBLE_FAULT: 'double fault'>, <Merge.REPLACED: 'replaced'>, <Merge.DOUBLE_FAULT: 'double fault'>, \
<Merge.TRIPLE_FAULT: 'triple fault'>)
    """
    _check_vector("merge", "first", first)
    _check_vector("merge", "second", second)
    one, other = exception_class(first), exception_class(second)
    if one is ExceptionClass.DOUBLE_FAULT:
        return Merge.TRIPLE_FAULT
    if one is ExceptionClass.CONTRIBUTORY and other is ExceptionClass.CONTRIBUTORY:
        return Merge.DOUBLE_FAULT
    if one is ExceptionClass.PAGE_FAULT and other in (ExceptionClass.CONTRIBUTORY, ExceptionClass.PAGE_FAULT):
        return Merge.DOUBLE_FAULT
    return Merge.REPLACED


def payload_to_dr6(dr6: int, payload: int) -> int:
    """DR6 after a #DB with this payload, both 0 to 2**64-1: BD, BS and BT are only ever added, the others replaced.

    >>> hex(payload_to_dr6(0xFFFF0FF0, 0x4001))  # BS and B0
    '0xffff4ff1'
    >>> hex(payload_to_dr6(0xFFFF4FF1, 0x800))  # a bus lock: BLD becomes 0, BS stays
    '0xffff47f0'
    """
    number("payload_to_dr6", "payload", payload)
    dr6 = (number("payload_to_dr6", "dr6", dr6) & ~_DR6_TRAPS) | _DR6_ACTIVE_LOW | payload
    return (dr6 ^ (payload & _DR6_ACTIVE_LOW)) & ~_DR6_ENABLED


class QueuedException(Value):
    """struct kvm_queued_exception.

    Neither pending nor injected: there is none, and the other fields are left over from the last one.
    """

    pending: bool = False
    injected: bool = False
    has_error_code: bool = False
    vector: int = 0
    error_code: int = 0
    payload: int = 0
    has_payload: bool = False

    def __bool__(self) -> bool:
        return self.pending or self.injected


class Injection(Value):
    """What one entry into the guest brings it.

    `kind`: "exception", "nmi", "interrupt", or "shutdown" (a triple fault: KVM_RUN returns KVM_EXIT_SHUTDOWN instead).
    `error_code`: what is pushed, None for nothing.  `again`: whether an earlier entry had injected it already.
    """

    kind: str
    vector: int = 0
    error_code: int | None = None
    again: bool = False


class ExceptionQueue:
    """The exceptions, NMIs and interrupts that wait for one vCPU, and the registers that their delivery changes.

    `protected`: CR0.PE.  `rflags`: as the next delivery pushes it.  `exception_payload_enabled`, `triple_fault_event`:
    whether the VM has KVM_CAP_EXCEPTION_PAYLOAD and KVM_CAP_X86_TRIPLE_FAULT_EVENT enabled.  `defers_payload`: True as
    in kernels with a fix of 2026, which v6.18.44 has; older ones put a payload into its register when the exception is
    queued.

    Thread safety: one thread at a time.

    >>> queue = ExceptionQueue()
    >>> queue.queue(Vector.GP, 0)
    >>> queue.queue(Vector.NP, 0x18)
    >>> queue.exception.vector, queue.enter()
    (8, Injection(kind='exception', vector=8, error_code=0, again=False))
    """

    __slots__ = (
        "_entered",
        "cr2",
        "defers_payload",
        "dr6",
        "dr7",
        "exception",
        "exception_payload_enabled",
        "interrupt_injected",
        "interrupt_nr",
        "interrupt_shadow",
        "interrupt_soft",
        "nmi_injected",
        "nmi_masked",
        "nmi_pending",
        "protected",
        "rflags",
        "triple_fault",
        "triple_fault_event",
    )

    def __init__(
        self,
        *,
        protected: bool = True,
        rflags: int = 2,
        cr2: int = 0,
        dr6: int = 0xFFFF0FF0,
        dr7: int = 0x400,
        exception_payload_enabled: bool = True,
        triple_fault_event: bool = True,
        defers_payload: bool = True,
    ) -> None:
        call = "ExceptionQueue"
        self.protected, self.rflags, self.cr2 = protected, number(call, "rflags", rflags), number(call, "cr2", cr2)
        self.dr6, self.dr7 = number(call, "dr6", dr6), number(call, "dr7", dr7)
        self.exception_payload_enabled, self.triple_fault_event = exception_payload_enabled, triple_fault_event
        self.defers_payload = defers_payload
        self.exception = QueuedException()
        self.triple_fault = False
        self.nmi_injected = self.nmi_masked = False
        self.nmi_pending = 0
        self.interrupt_injected = self.interrupt_soft = False
        self.interrupt_nr = self.interrupt_shadow = 0
        self._entered = ""  # the kind of what the last entry injected, until the guest has taken it

    # ---- raising ----

    def queue(self, vector: int, error_code: int | None = None, payload: int | None = None) -> None:
        """Raise an exception: it becomes pending, or what `merge` says (kvm_queue_exception, _e, _p, _e_p).

        An error code or payload of None is none.  KVM does not ask whether the vector has one, nor does this.

        ArgumentError: no exception (2, or above 31).
        """
        _check("queue", vector, error_code, payload)
        before = self.exception
        if before:
            merged = merge(before.vector, vector)
            if merged is Merge.TRIPLE_FAULT:
                self.triple_fault = True  # and #DF stays as it is
                return
            if merged is Merge.DOUBLE_FAULT:
                vector, error_code, payload = Vector.DF, 0, None
        self.exception = QueuedException(
            True, False, error_code is not None, int(vector), error_code or 0, payload or 0, payload is not None
        )
        if not self.defers_payload:
            self.deliver_payload()

    def requeue(self, vector: int, error_code: int | None = None) -> None:
        """Take back an exception whose delivery an exit interrupted (kvm_requeue_exception): it is injected again.

        It merges with nothing, and has no payload: that was delivered the first time.
        """
        _check("requeue", vector, error_code, None)
        self.exception = QueuedException(
            self.exception.pending, True, error_code is not None, int(vector), error_code or 0
        )

    def nmi(self) -> None:
        """Another NMI (KVM_NMI): at most two wait, one of them where NMIs are masked or one is being injected."""
        self.nmi_pending += 1
        self._process_nmi()

    def _process_nmi(self) -> None:
        self.nmi_pending = min(self.nmi_pending, 1 if self.nmi_masked or self.nmi_injected else 2)

    def interrupt(self, vector: int) -> None:
        """An interrupt of user space (KVM_INTERRUPT without an in-kernel controller); takes the place of another.

        ArgumentError: `vector` is not 0 to 255.
        """
        self.interrupt_nr = number("interrupt", "vector", vector, 0xFF)
        self.interrupt_injected, self.interrupt_soft = True, False

    # ---- delivering ----

    def deliver_payload(self) -> None:
        """The payload, if there is one, goes to CR2 or DR6 (kvm_deliver_exception_payload)."""
        exception = self.exception
        if not exception.has_payload:
            return
        if exception.vector == Vector.DB:
            self.dr6 = payload_to_dr6(self.dr6, exception.payload)
        elif exception.vector == Vector.PF:
            self.cr2 = exception.payload
        self.exception = _changed(exception, payload=0, has_payload=False)

    def enter(self) -> Injection | None:
        """What the next entry injects, and its effects (kvm_check_and_inject_events); None: nothing waits.

        In this order: a triple fault; the exception that is injected already; the one that is pending; the NMI, then
        the interrupt that is injected already; a pending NMI that is not masked.  The others wait for a later entry.

        A pending fault sets RFLAGS.RF in what is pushed; a pending #DB clears DR7.GD; in real mode no error code is
        pushed.  What is injected stays injected until `delivered()`.
        """
        injection = self._inject()
        self._entered = injection.kind if injection is not None else ""
        return injection

    def _inject(self) -> Injection | None:
        if self.triple_fault:
            self.triple_fault = False
            return Injection("shutdown")
        self._process_nmi()
        exception = self.exception
        if exception:
            again = exception.injected
            if not again:
                if exception_type(exception.vector) is ExceptionType.FAULT:
                    self.rflags |= _RFLAGS_RF
                if exception.vector == Vector.DB:
                    self.dr7 &= ~_DR7_GD
            self.deliver_payload()
            has_error_code = exception.has_error_code and self.protected
            self.exception = _changed(self.exception, pending=False, injected=True, has_error_code=has_error_code)
            error_code = exception.error_code if has_error_code else None
            return Injection("exception", exception.vector, error_code, again)
        if self.nmi_injected:
            return Injection("nmi", int(Vector.NMI), None, True)
        if self.interrupt_injected:
            return Injection("interrupt", self.interrupt_nr, None, True)
        if self.nmi_pending and not self.nmi_masked and not self.interrupt_shadow:
            self.nmi_pending -= 1
            self.nmi_injected = self.nmi_masked = True
            return Injection("nmi", int(Vector.NMI))
        return None

    def delivered(self) -> None:
        """The guest has taken what the last `enter()` injected: it is in the handler, that of an NMI with NMIs masked.

        Nothing changes where that entry injected nothing, or was none (a triple fault).
        """
        if self._entered == "exception":
            self.exception = _changed(self.exception, injected=False)
        elif self._entered == "nmi":
            self.nmi_injected, self.nmi_masked = False, True
        elif self._entered == "interrupt":
            self.interrupt_injected = False
        self._entered = ""

    # ---- as KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS have it ----

    def get_events(self) -> dict[str, int]:
        """KVM_GET_VCPU_EVENTS: struct kvm_vcpu_events as numbers by the paths of its fields, "exception.nr".

        Without KVM_CAP_EXCEPTION_PAYLOAD this delivers the payload, and tells a pending exception as injected.
        #BP and #OF are told as neither.
        """
        self._process_nmi()
        self.read_registers()
        exception = self.exception
        told = not is_soft(exception.vector)
        injected = exception.injected or (exception.pending and not self.exception_payload_enabled)
        flags = _NMI_PENDING | _SHADOW | _SMM
        if self.exception_payload_enabled:
            flags |= _PAYLOAD
        if self.triple_fault_event:
            flags |= _TRIPLE_FAULT
        return {
            "exception.injected": int(told and injected),
            "exception.nr": exception.vector,
            "exception.has_error_code": int(exception.has_error_code),
            "exception.pending": int(told and exception.pending),
            "exception.error_code": exception.error_code,
            "interrupt.injected": int(self.interrupt_injected and not self.interrupt_soft),
            "interrupt.nr": self.interrupt_nr,
            "interrupt.soft": 0,
            "interrupt.shadow": self.interrupt_shadow,
            "nmi.injected": int(self.nmi_injected),
            "nmi.pending": self.nmi_pending,
            "nmi.masked": int(self.nmi_masked),
            "flags": flags,
            "triple_fault.pending": int(self.triple_fault and self.triple_fault_event),
            "exception_has_payload": int(exception.has_payload),
            "exception_payload": exception.payload,
        }

    def read_registers(self) -> None:
        """User space reads CR2, DR6 or the events: without KVM_CAP_EXCEPTION_PAYLOAD the payload is delivered then."""
        if not self.exception_payload_enabled and self.exception.pending:
            self.deliver_payload()

    def set_events(self, events: Mapping[str, int]) -> None:
        """KVM_SET_VCPU_EVENTS, of the numbers that `get_events()` gives; a path that is not there is 0.

        ArgumentError: what KVM refuses with EINVAL: a flag that is not known, or whose capability is not enabled; an
        exception that is pending or injected and is none (2, or above 31); and a path or a number that the struct does
        not have.  The queue is as before then.
        """
        call = "KVM_SET_VCPU_EVENTS"
        if not isinstance(events, Mapping):
            raise ArgumentTypeError(call, "events", events, "a mapping of paths to numbers")
        for path, value in events.items():
            if path not in _EVENTS:
                raise ArgumentError(call, path, value, "a path of struct kvm_vcpu_events, as exception.nr")
            number(call, path, value, _EVENTS[path])
        flags = events.get("flags", 0)
        accepted = _EVENT_FLAGS
        for flag, enabled in ((_PAYLOAD, self.exception_payload_enabled), (_TRIPLE_FAULT, self.triple_fault_event)):
            accepted &= ~0 if enabled else ~flag
        if flags & ~accepted:
            capability = "the capability of the bit is not enabled" if not flags & ~_EVENT_FLAGS else "unknown bits"
            raise ArgumentError(call, "flags", flags, f"bits of {accepted:#x}", capability)
        pending = bool(events.get("exception.pending", 0)) and bool(flags & _PAYLOAD)
        injected = bool(events.get("exception.injected", 0)) and not pending
        vector = events.get("exception.nr", 0)
        if (pending or injected) and not is_exception(vector):
            raise ArgumentError(call, "exception.nr", vector, "0 to 31, but not 2")
        self.exception = QueuedException(
            pending,
            injected,
            bool(events.get("exception.has_error_code", 0)),
            vector,
            events.get("exception.error_code", 0),
            events.get("exception_payload", 0),
            pending and bool(events.get("exception_has_payload", 0)),
        )
        self.interrupt_injected = bool(events.get("interrupt.injected", 0))
        self.interrupt_nr = events.get("interrupt.nr", 0)
        self.interrupt_soft = bool(events.get("interrupt.soft", 0))
        if flags & _SHADOW:
            self.interrupt_shadow = events.get("interrupt.shadow", 0)
        self.nmi_injected = bool(events.get("nmi.injected", 0))
        if flags & _NMI_PENDING:
            self.nmi_pending = events.get("nmi.pending", 0)
        self.nmi_masked = bool(events.get("nmi.masked", 0))
        if flags & _TRIPLE_FAULT:
            self.triple_fault = bool(events.get("triple_fault.pending", 0))

    @classmethod
    def from_events(cls, events: Mapping[str, int], *, protected: bool = True, rflags: int = 2) -> Self:
        """The queue that KVM_GET_VCPU_EVENTS tells of; its flags say which capabilities the VM has enabled.

        >>> queue = ExceptionQueue.from_events({"flags": 0x1D, "exception.pending": 1, "exception.nr": 13})
        >>> queue.exception.vector, queue.exception_payload_enabled, queue.triple_fault_event
        (13, True, False)
        """
        if not isinstance(events, Mapping):
            raise ArgumentTypeError("ExceptionQueue.from_events", "events", events, "a mapping of paths to numbers")
        flags = number("ExceptionQueue.from_events", "flags", events.get("flags", 0), 0xFFFFFFFF)
        self = cls(
            protected=protected,
            rflags=rflags,
            exception_payload_enabled=bool(flags & _PAYLOAD),
            triple_fault_event=bool(flags & _TRIPLE_FAULT),
        )
        self.set_events(events)
        return self

    def __repr__(self) -> str:
        shown = [f"exception={self.exception!r}"] if self.exception else []
        shown += ["triple_fault=True"] if self.triple_fault else []
        shown += ["nmi_injected=True"] if self.nmi_injected else []
        shown += [f"nmi_pending={self.nmi_pending}"] if self.nmi_pending else []
        shown += [f"interrupt={self.interrupt_nr:#x}"] if self.interrupt_injected else []
        return f"ExceptionQueue({', '.join(shown)})"


def _changed(exception: QueuedException, **fields: Any) -> QueuedException:
    # The same one, but for these fields.
    return QueuedException(*[fields.get(name, getattr(exception, name)) for name in QueuedException.fields()])


def _check(call: str, vector: int, error_code: int | None, payload: int | None) -> None:
    # What struct kvm_queued_exception can hold.
    _check_vector(call, "vector", vector)
    if error_code is not None:
        number(call, "error_code", error_code, 0xFFFFFFFF)
    if payload is not None:
        number(call, "payload", payload)


def _check_vector(call: str, field: str, vector: int) -> None:
    if not is_exception(number(call, field, vector, NR_EXCEPTIONS - 1)):
        raise ArgumentError(call, field, vector, "0 to 31, but not 2, which is the NMI")
