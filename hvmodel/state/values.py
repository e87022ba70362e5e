"""The parts of a vCPU's and a VM's state that are structs of fixed size, as values: see hvmodel.state.record.

Fields have KVM's names.  Sources: linux:arch/x86/include/uapi/asm/kvm.h@v6.18.
"""

from __future__ import annotations

from struct import Struct

from ..errors import ArgumentError, ArgumentTypeError
from .record import Packed, Record, _set_data, bits_named

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, ClassVar, Self

__all__ = [
    "Clock",
    "DTable",
    "DebugRegs",
    "ExceptionEvent",
    "Fpu",
    "InterruptEvent",
    "IoApic",
    "IoApicState",
    "Lapic",
    "MpState",
    "NmiEvent",
    "Pic",
    "PicState",
    "Pit",
    "PitChannel",
    "Regs",
    "Segment",
    "SmiEvent",
    "Sregs",
    "Sregs2",
    "TripleFaultEvent",
    "TscKhz",
    "VcpuEvents",
    "Xcr",
    "Xcrs",
]

_U32 = Struct("<I")
_CHIP_HEAD = 8  # chip_id and pad of struct kvm_irqchip
_CHIP_SIZE = 520


def _bit_names(kind: str) -> Any:
    # A function that names the bits which are set in a number: hvmodel.arch.registers is imported when one is asked.
    def name(bits: int) -> tuple[str, ...]:
        from ..arch import registers

        return registers.bit_names(getattr(registers, kind), bits)

    return name


_CONTROL_BITS = {
    "cr0": _bit_names("CR0"),
    "cr4": _bit_names("CR4"),
    "efer": _bit_names("EFER"),
    "apic_base": _bit_names("APIC_BASE"),
}

# Bits of the APIC's registers (Intel SDM vol. 3, 13.5.1, 13.9) and of a redirection entry (Intel 82093AA, 3.2.4).
_VECTOR = tuple([f"vector[{at}]" for at in range(8)])
_LVT = (*_VECTOR, "mode[0]", "mode[1]", "mode[2]", "", "pending", "low", "remote_irr", "level", "masked")
_LVTS = {0x2F0: "CMCI", 0x320: "TIMER", 0x330: "THERMAL", 0x340: "PMC", 0x350: "LINT0", 0x360: "LINT1", 0x370: "ERROR"}
_SVR = bits_named("SVR", (*_VECTOR, "enabled", "no_focus", "", "", "no_eoi_broadcast"))
_ENTRY = (*_LVT[:11], "logical", *_LVT[12:], *[""] * 39, *[f"destination[{at}]" for at in range(8)])
_INPUTS = tuple([f"input {at}" for at in range(8)])


def _lapic_bits(offset: int) -> Any:
    # A function that names the bits of an APIC register, or None.
    for first, kind in ((0x100, "ISR"), (0x180, "TMR"), (0x200, "IRR")):
        if first <= offset < first + 0x80:
            return bits_named(kind, tuple([f"vector {2 * (offset - first) + at:#x}" for at in range(32)]))
    if offset in _LVTS:
        return bits_named(f"LVT_{_LVTS[offset]}", (*_LVT, "periodic", "tsc_deadline"))
    return _SVR if offset == 0xF0 else None


class Segment(Record, struct="kvm_segment"):
    """A segment register with its hidden part: `limit` in bytes (as the processor scales it), `type` 0 to 15."""

    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int  # noqa: E741  # the kernel's name
    g: int
    avl: int
    unusable: int
    padding: int


class DTable(Record, struct="kvm_dtable"):
    """GDTR or IDTR: linear address and limit (its size - 1)."""

    base: int
    limit: int
    padding: tuple[int, ...]


class Regs(Record, struct="kvm_regs"):
    """The general registers, RIP and RFLAGS."""

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

    _bits = {"rflags": _bit_names("RFLAGS")}  # noqa: RUF012  # as in Record


class Sregs(Record, struct="kvm_sregs"):
    """Segments, descriptor tables, control registers, EFER, the APIC base; a pending interrupt as one bit of 256."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: DTable
    idt: DTable
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    interrupt_bitmap: tuple[int, ...]

    _bits = _CONTROL_BITS


class Sregs2(Record, struct="kvm_sregs2"):
    """As Sregs, with the PDPTRs of PAE paging instead of the interrupt: `flags` 1 where they are valid."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: DTable
    idt: DTable
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    flags: int
    pdptrs: tuple[int, ...]

    _bits = _CONTROL_BITS


class Fpu(Record, struct="kvm_fpu"):
    """x87 and SSE: `fpr` 8 registers of 16 bytes, `xmm` 16 of 16 bytes, each as one bytes.

    KVM neither gets nor sets `mxcsr`; and what KVM_SET_FPU writes into a component that is in its initial state (a bit
    of XSTATE_BV is clear) does not take it out of that (linux:arch/x86/kvm/x86.c kvm_arch_vcpu_ioctl_set_fpu@v6.18).
    """

    fpr: bytes
    fcw: int
    fsw: int
    ftwx: int
    pad1: int
    last_opcode: int
    last_ip: int
    last_dp: int
    xmm: bytes
    mxcsr: int
    pad2: int


class Xcr(Record, struct="kvm_xcr"):
    """One extended control register: its number and value."""

    xcr: int
    reserved: int
    value: int


class Xcrs(Record, struct="kvm_xcrs"):
    """The extended control registers: the first `nr_xcrs` of `xcrs`."""

    nr_xcrs: int
    flags: int
    xcrs: tuple[Xcr, ...]
    padding: tuple[int, ...]

    _bits = {"xcrs[0].value": _bit_names("XCR0")}  # noqa: RUF012  # as in Record

    @property
    def xcr0(self) -> int | None:
        """Value of XCR0, None where it is not among them."""
        for row in self.xcrs[: self.nr_xcrs]:
            if row.xcr == 0:
                return row.value
        return None


class DebugRegs(Record, struct="kvm_debugregs"):
    """DR0 to DR3 (`db`), DR6, DR7."""

    db: tuple[int, ...]
    dr6: int
    dr7: int
    flags: int
    reserved: tuple[int, ...]

    _bits = {"dr6": _bit_names("DR6"), "dr7": _bit_names("DR7")}  # noqa: RUF012  # as in Record


class ExceptionEvent(Record, struct="kvm_vcpu_events_exception"):
    """The exception that is pending or injected: vector `nr`, its error code."""

    injected: int
    nr: int
    has_error_code: int
    pending: int
    error_code: int


class InterruptEvent(Record, struct="kvm_vcpu_events_interrupt"):
    """The interrupt that is injected; `shadow`: 1 after MOV SS or POP SS, 2 after STI."""

    injected: int
    nr: int
    soft: int
    shadow: int


class NmiEvent(Record, struct="kvm_vcpu_events_nmi"):
    """The NMI that is injected, how many are pending, whether they are masked."""

    injected: int
    pending: int
    masked: int
    pad: int


class SmiEvent(Record, struct="kvm_vcpu_events_smi"):
    """Whether it is in system management mode, and what is pending there."""

    smm: int
    pending: int
    smm_inside_nmi: int
    latched_init: int


class TripleFaultEvent(Record, struct="kvm_vcpu_events_triple_fault"):
    """Whether a triple fault is pending."""

    pending: int


class VcpuEvents(Record, struct="kvm_vcpu_events"):
    """What is pending and injected; `flags`: KVM_VCPUEVENT_VALID_*, which of it is meant."""

    exception: ExceptionEvent
    interrupt: InterruptEvent
    nmi: NmiEvent
    sipi_vector: int
    flags: int
    smi: SmiEvent
    triple_fault: TripleFaultEvent
    reserved: bytes
    exception_has_payload: int
    exception_payload: int

    _bits = {  # noqa: RUF012  # as in Record
        "flags": bits_named("VALID", ("NMI_PENDING", "SIPI_VECTOR", "SHADOW", "SMM", "PAYLOAD", "TRIPLE_FAULT")),
    }


class MpState(Record, struct="kvm_mp_state"):
    """KVM_MP_STATE_*: 0 runnable, 1 uninitialized, 2 INIT received, 3 halted, 4 SIPI received, …"""

    mp_state: int


class Lapic(Record, struct="kvm_lapic_state"):
    """The page of registers of the local APIC, 1024 bytes of it: one of 32 bits at every multiple of 16.

    >>> Lapic().replace_register(0x80, 0x20).register(0x80)
    32
    """

    regs: bytes

    def register(self, offset: int) -> int:
        """The 32 bits at this offset: 0x20 ID, 0x80 TPR, 0xf0 SVR, … (Intel SDM vol. 3 table 13-1)."""
        return int(_U32.unpack_from(self._data, self._register("offset", offset))[0])

    def replace_register(self, offset: int, value: object) -> Self:
        """The same page but for these 32 bits.  ArgumentError: no such offset, or a value of more bits."""
        self._register("offset", offset)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
            raise ArgumentError("Lapic.replace_register", "value", value, "0 to 0xffffffff")
        return self._of(self._data[:offset] + _U32.pack(value) + self._data[offset + 4 :])

    def _register(self, field: str, offset: int) -> int:
        if isinstance(offset, bool) or not isinstance(offset, int):
            raise ArgumentTypeError("Lapic.register", field, offset, "an int")
        if not 0 <= offset <= self.SIZE - 4 or offset % 4:
            raise ArgumentError("Lapic.register", field, offset, f"a multiple of 4 below {self.SIZE:#x}")
        return offset

    def items(self) -> Iterator[tuple[str, int | bytes]]:
        """All registers, as ("regs[0x80]", 0), and what is between them where it is not zero."""
        for offset, (value,) in zip(range(0, self.SIZE, 4), _U32.iter_unpack(self._data), strict=True):
            if value or not offset % 16:
                yield f"regs[{offset:#x}]", value

    def _named(self, path: str, bits: int) -> tuple[str, ...]:
        names = _lapic_bits(int(path[5:-1], 16))
        return names(bits) if names else ()


class TscKhz(Packed):
    """The TSC's frequency in kHz, 1 to 0x7fffffff: 4 bytes, as KVM_GET_TSC_KHZ returns and KVM_SET_TSC_KHZ takes it.

    KVM may take more, and then KVM_GET_TSC_KHZ, which returns an int, cannot tell it.
    """

    STRUCT = "uint32_t"

    @classmethod
    def of(cls, khz: object) -> Self:
        """The value of a number of kHz."""
        if isinstance(khz, bool) or not isinstance(khz, int):
            raise ArgumentTypeError("TscKhz", "khz", khz, "an int")
        if not 0 < khz < 1 << 31:
            raise ArgumentError("TscKhz", "khz", khz, "1 to 0x7fffffff")
        return cls._of(_U32.pack(khz))

    @classmethod
    def _checked(cls, data: bytes) -> None:
        if len(data) != 4:
            raise ArgumentError("TscKhz.from_bytes", "data", data, "4 bytes", f"{len(data)} bytes")
        cls.of(int.from_bytes(data, "little"))

    @property
    def khz(self) -> int:
        """The number of kHz."""
        return int(_U32.unpack(self._data)[0])

    def items(self) -> Iterator[tuple[str, int | bytes]]:
        """The number, whose path is empty."""
        yield "", self.khz

    def to_json(self) -> int:
        """The number."""
        return self.khz

    @classmethod
    def from_json(cls, document: int) -> Self:
        """The value that `to_json()` gave."""
        return cls.of(document)

    def __repr__(self) -> str:
        return f"TscKhz.of({self.khz})"


class Clock(Record, struct="kvm_clock_data"):
    """kvmclock: `clock` in ns; `flags`: whether `realtime` (CLOCK_REALTIME, ns) and `host_tsc` belong to it."""

    clock: int
    flags: int
    pad0: int
    realtime: int
    host_tsc: int
    pad: tuple[int, ...]

    _bits = {"flags": bits_named("CLOCK", ("", "TSC_STABLE", "REALTIME", "HOST_TSC"))}  # noqa: RUF012  # as in Record


class PitChannel(Record, struct="kvm_pit_channel_state"):
    """A counter of the interval timer (Intel 8254); `count_load_time` in ns of the host's monotonic clock."""

    count: int
    latched_count: int
    count_latched: int
    status_latched: int
    status: int
    read_state: int
    write_state: int
    write_latch: int
    rw_mode: int
    mode: int
    bcd: int
    gate: int
    count_load_time: int


class Pit(Record, struct="kvm_pit_state2"):
    """The interval timer: three counters; `flags`: KVM_PIT_FLAGS_*."""

    channels: tuple[PitChannel, ...]
    flags: int
    reserved: tuple[int, ...]


class PicState(Record, struct="kvm_pic_state"):
    """An interrupt controller (Intel 8259A): its request, mask and service registers, and the rest."""

    last_irr: int
    irr: int
    imr: int
    isr: int
    priority_add: int
    irq_base: int
    read_reg_select: int
    poll: int
    special_mask: int
    init_state: int
    auto_eoi: int
    rotate_on_auto_eoi: int
    special_fully_nested_mode: int
    init4: int
    elcr: int
    elcr_mask: int

    _bits = {name: bits_named(name.upper(), _INPUTS) for name in ("irr", "imr", "isr", "elcr")}  # noqa: RUF012


class IoApicState(Record, struct="kvm_ioapic_state"):
    """The I/O APIC: `redirtbl` are its 24 redirection entries, 64 bits each."""

    base_address: int
    ioregsel: int
    id: int
    irr: int
    pad: int
    redirtbl: tuple[int, ...]

    _bits = {  # noqa: RUF012  # as in Record
        "irr": bits_named("IRR", tuple([f"input {at}" for at in range(24)])),
        **{f"redirtbl[{at}]": bits_named(f"entry {at}", _ENTRY) for at in range(24)},
    }


class _Chip(Packed):
    # A struct kvm_irqchip: the number of the chip, and its state.
    STRUCT = "kvm_irqchip"
    if TYPE_CHECKING:
        INNER: ClassVar[type[Record]]
        CHIPS: ClassVar[tuple[int, ...]]

    @classmethod
    def _make(cls, chip_id: int, state: Record) -> Self:
        if type(state) is not cls.INNER:
            raise ArgumentTypeError(cls.__name__, "state", state, cls.INNER.__name__)
        if chip_id not in cls.CHIPS:
            raise ArgumentError(cls.__name__, "chip_id", chip_id, " or ".join(map(str, cls.CHIPS)))
        return cls._of((_U32.pack(chip_id) + bytes(4) + bytes(state)).ljust(_CHIP_SIZE, b"\0"))

    @classmethod
    def _checked(cls, data: bytes) -> None:
        call = f"{cls.__name__}.from_bytes"
        if len(data) != _CHIP_SIZE:
            raise ArgumentError(call, "data", data, f"{_CHIP_SIZE} bytes, a struct kvm_irqchip", f"{len(data)} bytes")
        chip_id = _U32.unpack_from(data)[0]
        if chip_id not in cls.CHIPS:
            raise ArgumentError(call, "chip_id", chip_id, " or ".join(map(str, cls.CHIPS)))

    @property
    def chip_id(self) -> int:
        """KVM_IRQCHIP_*: 0 and 1 the PICs, 2 the I/O APIC."""
        return int(_U32.unpack_from(self._data)[0])

    def _state(self) -> Any:
        return self.INNER._of(self._data[_CHIP_HEAD : _CHIP_HEAD + self.INNER.SIZE])

    def replace(self, **fields: Any) -> Self:
        """The same chip but for these fields of its state; see Record.replace."""
        return self._make(self.chip_id, self._state().replace(**fields))

    def items(self) -> Iterator[tuple[str, int | bytes]]:
        """The fields of its state."""
        yield from self._state().items()

    def _named(self, path: str, bits: int) -> tuple[str, ...]:
        names: tuple[str, ...] = self._state()._named(path, bits)
        return names

    def to_json(self) -> dict[str, Any]:
        """The number and the state as JSON has them."""
        return {"chip_id": self.chip_id, "state": self._state().to_json()}

    @classmethod
    def from_json(cls, document: object) -> Self:
        """The value that `to_json()` gave."""
        if not isinstance(document, dict) or document.keys() != {"chip_id", "state"}:
            raise ArgumentTypeError(f"{cls.__name__}.from_json", "document", document, "an object of chip_id and state")
        return cls._make(document["chip_id"], cls.INNER.from_json(document["state"]))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.chip_id}, {self._state()!r})"


class Pic(_Chip):
    """One of the two in-kernel PICs: `chip_id` 0 (master) or 1 (slave), and its `state`."""

    INNER, CHIPS = PicState, (0, 1)

    def __init__(self, chip_id: int, state: PicState) -> None:
        _set_data(self, bytes(self._make(chip_id, state)))

    @property
    def state(self) -> PicState:
        """Its registers."""
        state: PicState = self._state()
        return state


class IoApic(_Chip):
    """The in-kernel I/O APIC: `chip_id` 2, and its `state`."""

    INNER, CHIPS = IoApicState, (2,)

    def __init__(self, state: IoApicState) -> None:
        _set_data(self, bytes(self._make(2, state)))

    @property
    def state(self) -> IoApicState:
        """Its registers."""
        state: IoApicState = self._state()
        return state
