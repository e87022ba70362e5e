"""What KVM refuses of a vCPU's state: `RULES`, the table of its checks, and `faults`, which asks them.

KVM answers EINVAL to nearly every mistake in a part of the state.  A rule is one of its checks: it says which field
breaks it, and what would be taken.  The rules of a part stand in the order in which KVM looks, so that the first fault
is the one that the kernel stumbled over:

    sregs, sregs2 the rules of hvmodel.arch.legal, under its names
    xcrs          how many, flags; then of XCR0: x87, AVX without SSE, what the guest lacks, bits that go together
    debugregs     flags, DR6, DR7
    events        flags, payload, vector; then, with the rest already in force, SMM and the triple fault
    xsave         components, compaction, reserved bytes, MXCSR
    lapic         whether there is one in the kernel; its id in x2APIC mode
    mp_state      a number that x86 does not have, or one that takes an in-kernel APIC
    cpuid         how many; address width; a component that the process may not use; a change after the first run
    msrs          one MSR at a time: hvmodel.state.msr_rules
    tsc_khz       slower than the host
    nested_state  its header

Of regs and fpu KVM takes everything.  Pure: any host can be asked about the rules of another, by its `Facts`.
"""

from __future__ import annotations

import errno
from struct import unpack_from

from ..arch.legal import SREGS_RULES, sregs_repairs, sregs_violations
from ..arch.registers import XCR0, bit_names
from ..kvm.cpuid import KVM_MAX_CPUID_ENTRIES
from ..value import Value
from .facts import XSAVE, Facts, decode
from .msr_rules import MSR_RULES, MsrRule

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from .facts import Leaves
    from .values import DebugRegs, Lapic, MpState, Sregs, Sregs2, VcpuEvents, Xcrs

    # (field, value, accepted, detail or None)
    Found = tuple[str, object, str, str | None]
    Find = Callable[[Any, Facts], Iterator[Found]]

__all__ = ["CPUID_FIELDS", "RULES", "Fault", "Rule", "cpuid_fields", "faults"]

_KVM_MAX_XCRS = 16
CPUID_FIELDS = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")
_SSE, _AVX, _BNDREGS, _BNDCSR, _AVX512, _AMX = 0x2, 0x4, 0x8, 0x10, 0xE0, 0x60000  # bits of XCR0
_XTILEDATA = 1 << 18  # the component that a process has to ask for: XFEATURE_MASK_USER_DYNAMIC
_MXCSR_USERS = 0x7  # x87, SSE, AVX
_APIC_ID = 0x20  # offset of the register in the page
_SMM, _PAYLOAD, _TRIPLE_FAULT, _EVENT_FLAGS = 0x8, 0x10, 0x20, 0x3F  # KVM_VCPUEVENT_VALID_*
_EVENT_NAMES = "NMI_PENDING 1, SIPI_VECTOR 2, SHADOW 4, SMM 8, PAYLOAD 0x10, TRIPLE_FAULT 0x20"
_TOLERANCE_PPM = 250  # linux:arch/x86/kvm/x86.c tsc_tolerance_ppm

# What KVM works out itself whenever it compares leaves: (leaf, subleaf, register) -> bits.
# OSXSAVE and MONITOR, APIC, OSPKE, the size of the XSAVE area (cpuid.c kvm_update_cpuid_runtime).
_RUNTIME = {
    (1, 0, "ecx"): 1 << 27 | 1 << 3,
    (1, 0, "edx"): 1 << 9,
    (7, 0, "ecx"): 1 << 4,
    (0xD, 0, "ebx"): 0xFFFFFFFF,
    (0xD, 1, "ebx"): 0xFFFFFFFF,
}

# struct kvm_nested_state: flags (16 bits), format (16 bits), size (32 bits), then 120 bytes of the vendor's.
_NESTED_HEADER, _NESTED_FLAGS, _GUEST_MODE, _RUN_PENDING = 128, 0x1F, 1, 2
_NESTED_FORMATS = {"kvm_intel": 0, "kvm_amd": 1}


class Fault(Value):
    """A broken rule: its name, the `field` and its `value`, what would be `accepted`, a `detail` or None; the errno."""

    rule: str
    field: str
    value: object
    accepted: str
    detail: str | None
    errno: int


class Rule(Value):
    """One check of KVM's.

    `name`: "part.check", stable.  `part`.  `field`: which can break it.  `why`: what is wrong then.  `source`: the
    function that checks it, below linux:arch/x86/ @v6.18.  `find(value, facts)`: what breaks it.  `hosts`: the vendor
    modules that have it, () for all.  `errno`: KVM's answer.
    """

    name: str
    part: str
    field: str
    why: str
    source: str
    find: Find
    hosts: tuple[str, ...] = ()
    errno: int = errno.EINVAL


def cpuid_fields(rows: Leaves) -> list[str]:
    """The paths of these leaves, to be followed by ".eax" and its like: one that is there again has "#2" behind it.

    >>> cpuid_fields(((0x80000008, 0, 0, 0, 0, 0, 0), (0xD, 1, 1, 0, 0, 0, 0)))
    ['cpuid[0x80000008]', 'cpuid[0xd, 0x1]']
    """
    seen: dict[str, int] = {}
    found = []
    for function, index, flags, *_ in rows:
        path = f"cpuid[{function:#x}, {index:#x}]" if flags & 1 else f"cpuid[{function:#x}]"
        seen[path] = seen.get(path, 0) + 1
        found.append(path if seen[path] == 1 else f"{path}#{seen[path]}")
    return found


def faults(part: str, data: bytes, facts: Facts) -> Iterator[Fault]:
    """What KVM refuses of these bytes of a part, the first that it stumbles over first; none where it takes them.

    Pure.  Two rules are to be asked of what was refused only, for `facts` do not tell whether they apply: every change
    breaks cpuid.after_run, though the vCPU has not run; every area msrs.no_memory, though there is memory.

    >>> from hvmodel.state import DebugRegs
    >>> [fault.rule for fault in faults("debugregs", bytes(DebugRegs(dr7=1 << 40)), Facts())]
    ['debugregs.dr7']
    """
    value = decode(part, data)
    for rule in _OF_PART.get(part, ()):
        if not rule.hosts or not facts.vendor or facts.vendor in rule.hosts:
            for field, wrong, accepted, detail in rule.find(value, facts):
                yield Fault(rule.name, field, wrong, accepted, detail or rule.why, rule.errno)


# ---- what the rules look for ----


def _xcrs_count(v: Xcrs, _f: Facts) -> Iterator[Found]:
    if v.nr_xcrs > _KVM_MAX_XCRS:
        yield "nr_xcrs", v.nr_xcrs, f"0 to {_KVM_MAX_XCRS}", None


def _no_flags(v: Xcrs | DebugRegs, _f: Facts) -> Iterator[Found]:
    if v.flags:
        yield "flags", v.flags, "0", None


def _xcr0(wrong: Callable[[int, Facts], str | None]) -> Find:
    # A rule of XCR0: KVM sets the first that is numbered 0, and looks at no other.
    def find(v: Xcrs, f: Facts) -> Iterator[Found]:
        for at, xcr in enumerate(v.xcrs[: v.nr_xcrs]):
            if xcr.xcr == 0:
                detail = wrong(xcr.value, f)
                if detail is not None:
                    accepted = f"bits of {f.guest_xcr0:#x}, bit 0 set, those that go together all or none"
                    yield f"xcrs[{at}].value", xcr.value, accepted, detail
                return

    return find


def _lacking(value: int, f: Facts) -> str | None:
    bits = value & ~f.guest_xcr0
    return f"{', '.join(bit_names(XCR0, bits))}: not in the guest's CPUID leaf 0xd, or not in KVM" if bits else None


def _avx512(value: int, _f: Facts) -> str | None:
    if not value & _AVX512:
        return None
    if not value & _AVX:
        return "AVX-512 without XCR0.AVX"
    return None if value & _AVX512 == _AVX512 else "bits 7:5, of AVX-512, are set all or none"


def _pair(value: int, bits: int, text: str) -> str | None:
    return text if value & bits not in (0, bits) else None


def _debug_high(field: str) -> Find:
    def find(v: DebugRegs, _f: Facts) -> Iterator[Found]:
        value = getattr(v, field)
        if value >> 32:
            yield field, value, "bits of 0xffffffff", None

    return find


def _event_flags(v: VcpuEvents, _f: Facts) -> Iterator[Found]:
    if v.flags & ~_EVENT_FLAGS:
        yield "flags", v.flags, f"bits of {_EVENT_FLAGS:#x} (KVM_VCPUEVENT_VALID_{_EVENT_NAMES})", None


def _event_payload(v: VcpuEvents, f: Facts) -> Iterator[Found]:
    if v.flags & _PAYLOAD and not f.payload:
        yield "flags", v.flags, f"{v.flags & ~_PAYLOAD:#x}, or the capability enabled first", None


def _event_vector(v: VcpuEvents, _f: Facts) -> Iterator[Found]:
    exception = v.exception
    pending = exception.pending and v.flags & _PAYLOAD  # without the flag KVM clears it
    if (exception.injected or pending) and (exception.nr > 31 or exception.nr == 2):
        detail = "vector 2 is the NMI" if exception.nr == 2 else "vectors above 31 are interrupts"
        yield "exception.nr", exception.nr, "0, 1, 3 to 31", detail


def _event_smm(v: VcpuEvents, f: Facts) -> Iterator[Found]:
    if v.flags & _SMM and not f.smm:
        for name in ("smm", "pending", "smm_inside_nmi"):
            value = getattr(v.smi, name)
            if value:
                yield f"smi.{name}", value, "0", None


def _event_triple_fault(v: VcpuEvents, f: Facts) -> Iterator[Found]:
    if v.flags & _TRIPLE_FAULT and not f.triple_fault:
        yield "flags", v.flags, f"{v.flags & ~_TRIPLE_FAULT:#x}, or the capability enabled first", None


def _xsave_components(v: bytes, f: Facts) -> Iterator[Found]:
    (components,) = unpack_from("<Q", v, XSAVE["xstate_bv"])
    bits = components & ~f.xcr0
    if bits:
        detail = f"{', '.join(bit_names(XCR0, bits))}: no component that this KVM gives a guest"
        yield "xstate_bv", components, f"bits of {f.xcr0:#x}", detail


def _xsave_compacted(v: bytes, _f: Facts) -> Iterator[Found]:
    (compacted,) = unpack_from("<Q", v, XSAVE["xcomp_bv"])
    if compacted:
        yield "xcomp_bv", compacted, "0", None


def _xsave_reserved(v: bytes, _f: Facts) -> Iterator[Found]:
    reserved = v[XSAVE["reserved"] : XSAVE["end"]]
    if any(reserved):
        yield f"region[{XSAVE['reserved']}:{XSAVE['end']}]", reserved, "48 zeros", None


def _xsave_mxcsr(v: bytes, f: Facts) -> Iterator[Found]:
    (mxcsr,) = unpack_from("<I", v, XSAVE["mxcsr"])
    (components,) = unpack_from("<Q", v, XSAVE["xstate_bv"])
    if components & _MXCSR_USERS and mxcsr & ~f.mxcsr_mask:
        yield "mxcsr", mxcsr, f"bits of {f.mxcsr_mask:#x}", None


def _lapic_absent(_v: Lapic, f: Facts) -> Iterator[Found]:
    if not f.lapic:
        yield "regs", None, "nothing: such a vCPU has no lapic", None


def _lapic_id(v: Lapic, f: Facts) -> Iterator[Found]:
    (apic_id,) = unpack_from("<I", v.regs, _APIC_ID)
    if f.lapic and f.x2apic and apic_id != f.apic_id:
        yield f"regs[{_APIC_ID:#x}]", apic_id, f"{f.apic_id:#x}", None


def _mp_state_unknown(v: MpState, f: Facts) -> Iterator[Found]:
    if v.mp_state not in (0, 1, 2, 3, 4, 9):
        yield "mp_state", v.mp_state, "0 to 4, 9" if f.lapic else "0 (KVM_MP_STATE_RUNNABLE)", None


def _mp_state_lapic(v: MpState, f: Facts) -> Iterator[Found]:
    if v.mp_state in (1, 2, 3, 4, 9) and not f.lapic:
        yield "mp_state", v.mp_state, "0 (KVM_MP_STATE_RUNNABLE)", None


def _cpuid_count(v: Leaves, _f: Facts) -> Iterator[Found]:
    if len(v) > KVM_MAX_CPUID_ENTRIES:
        yield "nent", len(v), f"0 to {KVM_MAX_CPUID_ENTRIES}", None


def _cpuid_width(v: Leaves, _f: Facts) -> Iterator[Found]:
    for path, (function, _index, _flags, eax, *_) in zip(cpuid_fields(v), v, strict=True):
        if function == 0x80000008:  # the first counts
            width = eax >> 8 & 0xFF
            if width not in (0, 48, 57):
                rest = eax & ~0xFF00
                accepted = f"{rest | 48 << 8:#x}, {rest | 57 << 8:#x} or {rest:#x}"
                detail = f"bits 15:8, the width of a linear address, are {width}; 48, 57 and 0 are known"
                yield f"{path}.eax", eax, accepted, detail
            return


def _cpuid_permission(v: Leaves, _f: Facts) -> Iterator[Found]:
    for path, (function, index, _flags, eax, *_) in zip(cpuid_fields(v), v, strict=True):
        if (function, index) == (0xD, 0):
            if eax & _XTILEDATA:
                accepted = f"{eax & ~_XTILEDATA:#x}, or the permission (arch_prctl ARCH_REQ_XCOMP_GUEST_PERM)"
                yield f"{path}.eax", eax, accepted, None
            return


def _cpuid_after_run(v: Leaves, f: Facts) -> Iterator[Found]:
    # Whether the vCPU has run cannot be asked, but of a refusal there is no other cause left.
    if len(v) != len(f.cpuid):
        yield "nent", len(v), f"{len(f.cpuid)}, the leaves as they are", None
        return
    for at, (path, asked, now) in enumerate(zip(cpuid_fields(v), v, f.cpuid, strict=True)):
        for register, new, old in zip(CPUID_FIELDS, asked, now, strict=True):
            if (new ^ old) & ~_RUNTIME.get((now[0], now[1], register), 0):
                # A leaf that is another one has no path of its own: entries[5].function.
                field = f"entries[{at}].{register}" if register in CPUID_FIELDS[:3] else f"{path}.{register}"
                yield field, new, f"{old:#x}, as it is", None


def _tsc_slow(v: int, f: Facts) -> Iterator[Found]:
    if v and v * 1_000_000 < f.host_khz * (1_000_000 - _TOLERANCE_PPM):
        yield "tsc_khz", v, f"0, or from {f.host_khz} on", None


def _nested_size(v: bytes, _f: Facts) -> Iterator[Found]:
    (size,) = unpack_from("<I", v, 4)
    if size < _NESTED_HEADER:
        yield "size", size, f"at least {_NESTED_HEADER}, the header", None


def _nested_flags(v: bytes, _f: Facts) -> Iterator[Found]:
    (flags,) = unpack_from("<H", v)
    if flags & ~_NESTED_FLAGS:
        yield "flags", flags, f"bits of {_NESTED_FLAGS:#x} (KVM_STATE_NESTED_*)", None


def _nested_pending(v: bytes, _f: Facts) -> Iterator[Found]:
    (flags,) = unpack_from("<H", v)
    if flags & _RUN_PENDING and not flags & _GUEST_MODE:
        yield "flags", flags, f"{flags | _GUEST_MODE:#x}, or {flags & ~_RUN_PENDING:#x}", None


def _nested_format(v: bytes, f: Facts) -> Iterator[Found]:
    (found,) = unpack_from("<H", v, 2)
    wanted = _NESTED_FORMATS.get(f.vendor, found)
    if found != wanted:
        yield "format", found, str(wanted), None


# ---- the table ----


def _sregs(name: str) -> Find:
    # One rule of hvmodel.arch.legal.  The field is one that, changed alone, makes KVM take the registers, if there is
    # one: EFER.LMA is refused without CR0.PG, and it may be CR0 that is wrong.
    def find(v: Sregs | Sregs2, f: Facts) -> Iterator[Found]:
        for broken in sregs_violations(v, f.limits):
            if broken.rule != name:
                continue
            repairs = sregs_repairs(v, f.limits)
            if repairs and broken.field not in [repair.field for repair in repairs]:
                at = repairs[0]
                asked = dict(v.items())[at.field]
                yield at.field, asked, f"{at.value:#x}", f"{broken.field}={broken.value:#x}: {broken.detail}"
            else:
                yield broken.field, broken.value, broken.accepted, broken.detail

    return find


def _sregs_rules(part: str) -> list[Rule]:
    return [
        Rule(f"{part}.{row.name}", part, ", ".join(row.looks_at), row.text, f"kvm/{row.source}", _sregs(row.name))
        for row in SREGS_RULES.values()
        if row.refuses and (part == "sregs2" or not row.name.startswith("sregs2-"))
    ]


def _msr_rule(row: MsrRule) -> Rule:
    return Rule(f"msrs.{row.name}", "msrs", row.field, row.why, row.source, row.find, row.hosts)


_XCR = "kvm/x86.c __kvm_set_xcr"
_EVENTS = "kvm/x86.c kvm_vcpu_ioctl_x86_set_vcpu_events"
_DEBUG = "kvm/x86.c kvm_vcpu_ioctl_x86_set_debugregs"
_MP = "kvm/x86.c kvm_arch_vcpu_ioctl_set_mpstate"
_XSTATE = "kernel/fpu/xstate.c copy_uabi_to_xstate, validate_user_xstate_header"
_NESTED = "kvm/x86.c kvm_arch_vcpu_ioctl (KVM_SET_NESTED_STATE)"
_VALUE = "xcrs[].value"

RULES: tuple[Rule, ...] = (
    *_sregs_rules("sregs"),
    *_sregs_rules("sregs2"),
    Rule(
        "xcrs.count",
        "xcrs",
        "nr_xcrs",
        "more than the struct has",
        "kvm/x86.c kvm_vcpu_ioctl_x86_set_xcrs",
        _xcrs_count,
    ),
    Rule("xcrs.flags", "xcrs", "flags", "no flag is defined", "kvm/x86.c kvm_vcpu_ioctl_x86_set_xcrs", _no_flags),
    Rule(
        "xcrs.x87",
        "xcrs",
        _VALUE,
        "XCR0.X87 is always set",
        _XCR,
        _xcr0(lambda v, _f: None if v & 1 else "bit 0 (XCR0.X87) is always set"),
    ),
    Rule(
        "xcrs.avx",
        "xcrs",
        _VALUE,
        "AVX without SSE",
        _XCR,
        _xcr0(lambda v, _f: "XCR0.AVX without XCR0.SSE" if v & _AVX and not v & _SSE else None),
    ),
    Rule("xcrs.lacking", "xcrs", _VALUE, "a component that the guest's CPUID does not have", _XCR, _xcr0(_lacking)),
    Rule(
        "xcrs.mpx",
        "xcrs",
        _VALUE,
        "one of the two of MPX",
        _XCR,
        _xcr0(lambda v, _f: _pair(v, _BNDREGS | _BNDCSR, "bits 4:3, of MPX, are set both or none")),
    ),
    Rule("xcrs.avx512", "xcrs", _VALUE, "some of the three of AVX-512, or no AVX", _XCR, _xcr0(_avx512)),
    Rule(
        "xcrs.amx",
        "xcrs",
        _VALUE,
        "one of the two of AMX",
        _XCR,
        _xcr0(lambda v, _f: _pair(v, _AMX, "bits 18:17, of AMX, are set both or none")),
    ),
    Rule("debugregs.flags", "debugregs", "flags", "no flag is defined", _DEBUG, _no_flags),
    Rule("debugregs.dr6", "debugregs", "dr6", "bits 63:32 of DR6 are reserved", _DEBUG, _debug_high("dr6")),
    Rule("debugregs.dr7", "debugregs", "dr7", "bits 63:32 of DR7 are reserved", _DEBUG, _debug_high("dr7")),
    Rule("events.flags", "events", "flags", "a flag that KVM does not know", _EVENTS, _event_flags),
    Rule(
        "events.payload",
        "events",
        "flags",
        "PAYLOAD (0x10) takes KVM_CAP_EXCEPTION_PAYLOAD to be enabled",
        _EVENTS,
        _event_payload,
    ),
    Rule("events.vector", "events", "exception.nr", "no vector of an exception", _EVENTS, _event_vector),
    Rule(
        "events.smm",
        "events",
        "smi.smm, smi.pending, smi.smm_inside_nmi",
        "this KVM has no SMM (KVM_CAP_X86_SMM)",
        _EVENTS,
        _event_smm,
    ),
    Rule(
        "events.triple_fault",
        "events",
        "flags",
        "TRIPLE_FAULT (0x20) takes KVM_CAP_X86_TRIPLE_FAULT_EVENT to be enabled",
        _EVENTS,
        _event_triple_fault,
    ),
    Rule("xsave.components", "xsave", "xstate_bv", "components that KVM gives no guest", _XSTATE, _xsave_components),
    Rule(
        "xsave.compacted",
        "xsave",
        "xcomp_bv",
        "KVM takes the standard format, not a compacted one",
        _XSTATE,
        _xsave_compacted,
    ),
    Rule("xsave.reserved", "xsave", "region[528:576]", "reserved bytes of the XSAVE header", _XSTATE, _xsave_reserved),
    Rule(
        "xsave.mxcsr",
        "xsave",
        "mxcsr",
        "reserved bits of MXCSR, which counts where xstate_bv has x87, SSE or AVX",
        _XSTATE,
        _xsave_mxcsr,
    ),
    Rule(
        "lapic.absent",
        "lapic",
        "regs",
        "the VM has no in-kernel APIC (KVM_CREATE_IRQCHIP, KVM_CAP_SPLIT_IRQCHIP)",
        "kvm/x86.c kvm_arch_vcpu_ioctl",
        _lapic_absent,
    ),
    Rule(
        "lapic.id",
        "lapic",
        "regs[0x20]",
        "in x2APIC mode, with KVM_X2APIC_API_USE_32BIT_IDS, the APIC id is the vCPU's",
        "kvm/lapic.c kvm_apic_state_fixup",
        _lapic_id,
    ),
    Rule("mp_state.unknown", "mp_state", "mp_state", "no state of an x86 vCPU", _MP, _mp_state_unknown),
    Rule(
        "mp_state.lapic",
        "mp_state",
        "mp_state",
        "without an in-kernel APIC a vCPU is always runnable",
        _MP,
        _mp_state_lapic,
    ),
    Rule(
        "cpuid.count",
        "cpuid",
        "nent",
        "too many leaves",
        "kvm/cpuid.c kvm_vcpu_ioctl_set_cpuid2",
        _cpuid_count,
        errno=errno.E2BIG,
    ),
    Rule(
        "cpuid.address_width",
        "cpuid",
        "cpuid[0x80000008].eax",
        "an unknown width of linear addresses",
        "kvm/cpuid.c kvm_check_cpuid",
        _cpuid_width,
    ),
    Rule(
        "cpuid.permission",
        "cpuid",
        "cpuid[0xd, 0x0].eax",
        "XCR0.XTILEDATA, which this process has not asked for",
        "kvm/cpuid.c kvm_check_cpuid, kernel/fpu/core.c fpu_enable_guest_xfd_features",
        _cpuid_permission,
        errno=errno.EPERM,
    ),
    Rule(
        "cpuid.after_run",
        "cpuid",
        "nent, cpuid[].…",
        "the leaves cannot change once the vCPU has run",
        "kvm/cpuid.c kvm_set_cpuid, kvm_cpuid_check_equal",
        _cpuid_after_run,
    ),
    *[_msr_rule(row) for row in MSR_RULES],
    Rule(
        "tsc_khz.slow",
        "tsc_khz",
        "tsc_khz",
        "this host cannot make a guest's TSC slower than its own (KVM_CAP_TSC_CONTROL)",
        "kvm/x86.c kvm_set_tsc_khz",
        _tsc_slow,
    ),
    Rule("nested_state.size", "nested_state", "size", "smaller than its header", _NESTED, _nested_size),
    Rule("nested_state.flags", "nested_state", "flags", "a flag that KVM does not know", _NESTED, _nested_flags),
    Rule(
        "nested_state.pending",
        "nested_state",
        "flags",
        "RUN_PENDING (2) without GUEST_MODE (1)",
        _NESTED,
        _nested_pending,
    ),
    Rule(
        "nested_state.format",
        "nested_state",
        "format",
        "the format of another vendor",
        "kvm/vmx/nested.c vmx_set_nested_state, kvm/svm/nested.c svm_set_nested_state",
        _nested_format,
        ("kvm_intel", "kvm_amd"),
    ),
)
"""All rules: those of a part in the order in which KVM checks them."""

_OF_PART: dict[str, tuple[Rule, ...]] = {
    part: tuple([rule for rule in RULES if rule.part == part]) for part in dict.fromkeys(rule.part for rule in RULES)
}
