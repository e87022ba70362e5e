"""Refusals of a vCPU's state explained: which field, which rule, what would be taken.

KVM says EINVAL, and of an MSR not even that.  `explain` makes the error of it: by the rules of hvmodel.state.rules, or
where none is broken by trying (hvmodel.state.trial).  `kept` looks whether KVM keeps what it took, but for `CHANGES`,
which every KVM makes and nobody misses.

Neither changes the vCPU, but both get state from it: they are called by whoever runs it, or while nobody does.
"""

from __future__ import annotations

import errno as _errno

from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    ChangedStateError,
    HvError,
    KvmError,
    RefusedStateError,
    UnsupportedError,
)
from ..kvm.triple_fault import drop_triple_fault
from ..value import Value
from .facts import RECORDS, Facts, decode, facts_of
from .parts import part as part_row
from .record import Packed
from .rules import RULES, Fault, Rule, faults
from .vcpu_state import _vcpu_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..kvm import Vcpu
    from .vcpu_state import Cpu

__all__ = ["CHANGES", "RULES", "Change", "Rule", "dropped", "explain", "kept"]

PARTS = (*RECORDS, "xsave", "msrs", "cpuid", "tsc_khz", "nested_state")

# The answers to a value.  Others, such as ENOMEM, EFAULT and EIO, are about memory or the VM.
_OF_VALUES = (0, _errno.EINVAL, _errno.EPERM, _errno.E2BIG)

_ALL = (1 << 64) - 1


class Change(Value):
    """What KVM makes of a field that it does not keep, and nobody misses: `kept` is silent about it.

    `part`; `paths`: the fields, or what they begin with; `mask`: the bits, None for all; `why`; `source` below
    linux:arch/x86/ @v6.18.
    """

    part: str
    paths: tuple[str, ...]
    mask: int | None
    why: str
    source: str


_COMMON, _XCRS = "kvm/x86.c __get_sregs_common", "kvm/x86.c kvm_vcpu_ioctl_x86_set_xcrs"
_EVENTS, _APIC = "kvm/x86.c kvm_vcpu_ioctl_x86_get_vcpu_events", "kvm/lapic.c kvm_apic_set_state"

CHANGES: tuple[Change, ...] = (
    Change("regs", ("rflags",), 0x2, "bit 1 of RFLAGS is always set", "kvm/x86.c __set_regs"),
    Change("sregs", ("gdt.padding", "idt.padding"), None, "padding is not kept", _COMMON),
    Change("sregs2", ("gdt.padding", "idt.padding"), None, "padding is not kept", _COMMON),
    Change("fpu", ("pad1", "pad2"), None, "padding is not kept", "kvm/x86.c kvm_arch_vcpu_ioctl_get_fpu"),
    Change("fpu", ("mxcsr",), None, "MXCSR is set by xsave only", "kvm/x86.c kvm_arch_vcpu_ioctl_set_fpu"),
    Change("xcrs", ("nr_xcrs", "padding", "xcrs[0].reserved"), None, "KVM gives one XCR, and no padding", _XCRS),
    Change("xcrs", tuple([f"xcrs[{at}]." for at in range(1, 16)]), None, "KVM has no XCR but 0", _XCRS),
    Change("debugregs", ("reserved",), None, "padding is not kept", "kvm/x86.c kvm_vcpu_ioctl_x86_get_debugregs"),
    Change("events", ("nmi.pad", "reserved"), None, "padding is not kept", _EVENTS),
    Change("events", ("flags", "sipi_vector"), None, "KVM gives the flags that it knows, and no SIPI", _EVENTS),
    Change("lapic", ("regs[0x30]",), None, "the version is KVM's", _APIC),
    Change("lapic", ("regs[0xa0]",), None, "PPR follows from TPR and ISR", _APIC),
    Change("lapic", ("regs[0x390]",), None, "the timer's count runs", _APIC),
    Change("xsave", ("mxcsr_mask", "region[5:6]", "region[464:"), None, "reserved, or the processor's", "kernel/fpu"),
    Change("msrs", ("msrs[0x10]", "msrs[0x6e0]"), None, "the TSC runs, and its deadline passes", "kvm/x86.c"),
)
"""What every KVM changes and `kept` does not report."""

# What KVM looks at only where struct kvm_vcpu_events.flags says so: bit -> fields.
_FLAGGED = {
    0x01: ("nmi.pending",),
    0x04: ("interrupt.shadow",),
    0x08: ("smi.",),
    0x10: ("exception.pending", "exception_has_payload", "exception_payload"),
    0x20: ("triple_fault.",),
}

# Changes that `kept` reports by name: (parts, field, bits, name, why).  Others it reports without one.
_NAMED = (
    (("sregs", "sregs2"), "cr0", 1 << 31, "pvm-drops-paging", "without EFER.LME kvm_pvm clears CR0.PG"),
    (("sregs", "sregs2"), "cr8", _ALL & ~0xF, "cr8-reserved", "a CR8 above 15 is ignored"),
    (("sregs",), "interrupt_bitmap", _ALL, "one-interrupt", "of several interrupts the lowest is kept"),
    (("regs",), "rflags", 1 << 17, "pvm-drops-vm", "kvm_pvm does not let RFLAGS.VM be set from outside"),
)


def _checked(call: str, part: object, value: object) -> tuple[str, bytes]:
    if not isinstance(part, str):
        raise ArgumentTypeError(call, "part", part, "the name of a part of the state")
    if part not in PARTS:
        raise ArgumentError(call, "part", part, ", ".join(PARTS))
    if part == "tsc_khz" and isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < 1 << 32:
            raise ArgumentError(call, "value", value, "0 to 0xffffffff")
        return part, value.to_bytes(4, "little")
    try:
        data = bytes(value if isinstance(value, Packed) else memoryview(value))  # type: ignore[arg-type]  # is asked
    except TypeError:
        raise ArgumentTypeError(call, "value", value, f"a value of {part}, or its bytes") from None
    _check_size(call, part, data)
    return part, data


def _check_size(call: str, part: str, data: bytes) -> None:
    # ArgumentError where there are not as many bytes as the struct has.  Counts that KVM refuses are a rule's affair.
    if part in RECORDS:
        RECORDS[part].from_bytes(data)
        return
    least = {"xsave": 4096, "nested_state": 128, "tsc_khz": 4}.get(part, 8)
    if len(data) < least or (part == "tsc_khz" and len(data) > least):
        raise ArgumentError(call, "data", data, f"at least {least} bytes", f"{len(data)} bytes")
    if part in ("msrs", "cpuid"):
        nr, each = int.from_bytes(data[:4], "little"), 16 if part == "msrs" else 40
        if len(data) != 8 + nr * each:
            name = "nmsrs" if part == "msrs" else "nent"
            raise ArgumentError(call, name, nr, f"{8 + nr * each} bytes for so many", f"there are {len(data)}")


def explain(
    vcpu: Vcpu | Cpu,
    part: str,
    value: Packed | bytes | int,
    errno: int = _errno.EINVAL,
    call: str | None = None,
    *,
    among: Mapping[str, bytes] | None = None,
) -> HvError:
    """The error that says why KVM refused this value of a part; it is returned, not raised.

    `vcpu`: a hvmodel.kvm.Vcpu, or a machine's vcpu.  `value`: as it was put, typed or as the bytes of the kernel's
    struct.  `errno`: KVM's answer; 0, as KVM_SET_MSRS gives, counts as EINVAL.  `call`: the ioctl, by default the
    part's own.  `among`: the bytes of parts that were put before this one and are undone by now: the rules are asked
    about these rather than about what the vCPU has.

    RefusedStateError names the field, its value, what would be accepted, and the rule: `rule` is None where the field
    was found by trying, `field` too where that found nothing.  UnsupportedError, ForkedError, VmDeadError, ClosedError
    where that is the cause; RefusedStateError without a field for an errno that is not about the value.

    Ioctls: gets on the vCPU, never KVM_GET_MP_STATE, which can let an INIT in; KVM_GET_VCPU_EVENTS can, as ever without
    KVM_CAP_EXCEPTION_PAYLOAD, deliver a pending exception's payload to CR2 or DR6.  Where no rule is broken a VM is
    made and closed again, with up to 4096 puts in it (2 to 50 ms).

    ArgumentError, ArgumentTypeError (raised): no such part, or a value that is none of it.

    >>> from hvmodel.kvm import Kvm
    >>> from hvmodel.state import DebugRegs
    >>> with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
    ...     print(explain(vcpu, "debugregs", DebugRegs(dr7=1 << 32)))  # doctest: +ELLIPSIS
    KVM_SET_DEBUGREGS: dr7=0x100000000: bits 63:32 of DR7 are reserved; accepted: bits of 0xffffffff [EINVAL: ...]
    """
    vcpu, (part, data) = _vcpu_of("explain", vcpu), _checked("explain", part, value)
    if isinstance(errno, bool) or not isinstance(errno, int):
        raise ArgumentTypeError("explain", "errno", errno, "an int")
    if errno < 0:
        raise ArgumentError("explain", "errno", errno, "0, or a positive number of an error")
    if among is not None:
        if not hasattr(among, "items"):
            raise ArgumentTypeError("explain", "among", among, "a mapping of parts to their bytes, or None")
        among = dict([_checked("explain", *row) for row in among.items()])
    call = part_row(part).put if call is None else call
    if errno not in _OF_VALUES:
        return _other(vcpu, part, errno, call)
    answer = errno or _errno.EINVAL
    refusal = vcpu._refusal(call, answer)
    if type(refusal) is not KvmError and not (part == "tsc_khz" and isinstance(refusal, UnsupportedError)):
        return (
            refusal  # closed, of another process, dead, or nothing that this KVM has; a TSC's own pace is always taken
        )
    try:
        facts = _facts(vcpu, part, data, among)
        for fault in faults(part, data, facts):
            if fault.errno == answer:
                return _error(part, call, fault)
        found = _tried(vcpu, part, data, answer, call, among)
    except (HvError, OSError) as error:
        refused = RefusedStateError(answer, call, part, None, None, None, "the field at fault could not be found out")
        refused.add_note(f"because of {type(error).__name__}: {error}")
        return refused
    return found


def _other(vcpu: Vcpu, part: str, err: int, call: str) -> HvError:
    refusal = vcpu._refusal(call, err)
    if type(refusal) is not KvmError:
        return refusal
    return RefusedStateError(err, call, part, None, None, None, "KVM's answer is not about the value")


def _facts(vcpu: Vcpu, part: str, data: bytes, among: Mapping[str, bytes] | None) -> Facts:
    cpuid = None if not among or "cpuid" not in among or part == "cpuid" else decode("cpuid", among["cpuid"])
    return facts_of(vcpu, part, decode(part, data), cpuid)


def _error(part: str, call: str, fault: Fault) -> RefusedStateError:
    return RefusedStateError(
        fault.errno, call, part, fault.field, fault.value, fault.accepted, fault.detail, fault.rule
    )


def _tried(
    vcpu: Vcpu, part: str, data: bytes, err: int, call: str, among: Mapping[str, bytes] | None
) -> RefusedStateError:
    from .trial import Scratch, search

    with Scratch(vcpu, among) as scratch:
        suspect = search(scratch, part, data)
    if suspect is None:
        detail = "no field was found to be at fault: a vCPU made like it takes this value, or none near it"
        return RefusedStateError(err, call, part, None, None, None, detail)
    detail = "found by trying on a vCPU made like it"
    if suspect.together:
        detail += f"; together with {', '.join(suspect.together)}"
    if suspect.fix is None:
        accepted = "the MSRs without it"
        detail += "; none of its other values that were tried is taken"
    else:
        accepted = f"for one {suspect.fix:#x}" if isinstance(suspect.fix, int) else f"for one {suspect.fix.hex()}"
    return RefusedStateError(err, call, part, suspect.field, suspect.value, accepted, detail)


def kept(vcpu: Vcpu | Cpu, part: str, value: Packed | bytes | int) -> ChangedStateError | None:
    """None where the vCPU has this value of a part, which KVM just took; else the error that names the first field that
    it keeps another value of.  It is returned, not raised, and nothing is put back.

    `CHANGES`, which every KVM makes, do not count, and fields that KVM does not read: those of events that its flags do
    not name, components of xsave whose bit in xstate_bv is clear.

    Ioctls: one get.  Errors (raised) as those of that get; ArgumentError, ArgumentTypeError as of `explain`.
    """
    from .trial import get_part, leaves

    vcpu, (part, data) = _vcpu_of("kept", vcpu), _checked("kept", part, value)
    now = get_part(vcpu, part, data)
    if len(now) != len(data):
        name = "nent" if part == "cpuid" else "size"
        return ChangedStateError(part_row(part).put, part, name, len(data), len(now), "bytes")
    unread = _unread(vcpu, part, data)
    for leaf in leaves(part, data):
        if leaf.of(data) == leaf.of(now) or leaf.path.startswith(unread.paths) or leaf.offset in unread.offsets:
            continue
        asked, became = leaf.value(data), leaf.value(now)
        mask = _unmissed(part, leaf.path)
        if mask == _ALL or (isinstance(asked, int) and isinstance(became, int) and not (asked ^ became) & ~mask):
            continue
        rule, why = _named(part, leaf.path, asked, became)
        return ChangedStateError(part_row(part).put, part, leaf.path, asked, became, why, rule)
    return None


def dropped(vcpu: Vcpu | Cpu, part: str, value: Packed | bytes) -> ChangedStateError | None:
    """`kept`, of sregs or sregs2 with CR0.PG and without EFER.LME, which KVM just took.

    Where KVM did not keep them, the triple fault that kvm_pvm then has waiting is taken back, so that the vCPU runs
    again once it has other registers; see hvmodel.kvm.triple_fault.
    """
    vcpu = _vcpu_of("dropped", vcpu)
    changed = kept(vcpu, part, value)
    if changed is not None:
        drop_triple_fault(vcpu)
    return changed


class _Unread(Value):
    # Fields of a value that KVM does not read, by what their paths begin with or by offset.
    paths: tuple[str, ...] = ()
    offsets: frozenset[int] = frozenset()


def _unread(vcpu: Vcpu, part: str, data: bytes) -> _Unread:
    if part == "events":
        flags = decode(part, data).flags
        return _Unread(tuple([path for bit, paths in _FLAGGED.items() if not flags & bit for path in paths]))
    if part == "sregs2":
        return _Unread(() if decode(part, data).flags & 1 else ("pdptrs",))
    if part != "xsave":
        return _Unread()
    # Components whose bit in XSTATE_BV is clear.
    from .xsave import Xsave, components

    area = Xsave.from_bytes(data)
    read = set(range(512, 576))
    read |= {*range(24), *range(32, 160)} if area.xstate_bv & 1 else set()
    read |= set(range(160, 416)) if area.xstate_bv & 2 else set()
    read |= set(range(24, 32)) if area.xstate_bv & 7 else set()
    for component in components(vcpu.vm.kvm.supported_cpuid()):
        if area.xstate_bv >> component.number & 1:
            read |= set(range(component.offset, component.offset + component.size))
    return _Unread((), frozenset(range(len(data))) - read)


def _unmissed(part: str, path: str) -> int:
    # The bits of a field that every KVM changes.
    bits = 0
    for change in CHANGES:
        if change.part == part and path.startswith(change.paths):
            bits |= _ALL if change.mask is None else change.mask
    return bits


def _named(part: str, path: str, asked: object, became: object) -> tuple[str | None, str | None]:
    if isinstance(asked, int) and isinstance(became, int):
        for parts, field, mask, name, why in _NAMED:
            if part in parts and path.startswith(field) and (asked ^ became) & mask:
                return f"{part}.{name}", why
    return None, None
