"""Exit qualifications: what the VMCS field 6400H says of a VM exit, by the exit's reason.

A layout for every reason that has a qualification.  For all others the field is 0 (or, for an EPT misconfiguration,
undefined), and a value that is not is told as a problem; of URDMSR and UWRMSR nothing is claimed, see `UNCLAIMED`.  The
guest-physical address of an EPT violation is in the VMCS field 2400H and never here.

Bits that the manual calls undefined for an exit are fields named undefined; bits that it says are cleared, or that it
has not defined yet, are reserved: set, they are problems.

Source: Intel SDM volume 3 (edition 092 of 2026), 30.2.1 and tables 30-1 to 30-7, 29.8, 34.15.2.3; older editions have
this in 27.2.1.  Reasons 84 and 85 are by KVM's handlers (arch/x86/kvm/vmx/vmx.c@v6.18), not by a manual we could read.
"""

from __future__ import annotations

from ..arch.number import number
from ..errors import ArgumentError
from .bits import BitLayout, Decoded, Field
from .exit_reason import EXIT_REASONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["QUALIFICATIONS", "UNCLAIMED", "decode_qualification", "encode_qualification", "qualification_layout"]

_GPR = {
    **dict(enumerate(("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI"))),
    **{number: f"R{number}" for number in range(8, 16)},
}

_DEBUG = BitLayout(
    "qualification of #DB",
    64,
    (
        *(Field(f"B{n}", n, text=f"the condition of DR{n} was met") for n in range(4)),
        Field("bus_lock", 11, text="a bus lock at CPL above 0 (DR6 clears this bit for it)"),
        Field("BD", 13, text="access to a debug register"),
        Field("BS", 14, text="single step, or a taken branch"),
        Field("RTM", 16, text="in a transaction (DR6 clears this bit for it)"),
    ),
)
_NMI = BitLayout(
    "qualification of an NMI", 64, (Field("sources", 0, 64, text="NMI sources, where the processor reports them"),)
)
_LINEAR = BitLayout("qualification: linear address", 64, (Field("linear_address", 0, 64),))
_DISPLACEMENT = BitLayout("qualification: displacement of the operand", 64, (Field("displacement", 0, 64),))
_SIPI = BitLayout("qualification of a start-up IPI", 64, (Field("vector", 0, 8, text="start address / 4 KiB"),))
_TASK_SWITCH = BitLayout(
    "qualification of a task switch",
    64,
    (
        Field("selector", 0, 16, text="of the task-state segment"),
        Field("source", 30, 2, values={0: "CALL", 1: "IRET", 2: "JMP", 3: "task gate in the IDT"}),
    ),
)
_CR = BitLayout(
    "qualification of a control-register access",
    64,
    (
        Field("register", 0, 4, values={0: "CR0", 3: "CR3", 4: "CR4", 8: "CR8"}),
        Field("type", 4, 2, values={0: "MOV to CR", 1: "MOV from CR", 2: "CLTS", 3: "LMSW"}),
        Field("lmsw_memory", 6, text="LMSW from memory", clear="register, for LMSW"),
        Field("gpr", 8, 4, values=_GPR),
        Field("lmsw_source", 16, 16, text="what LMSW loads"),
    ),
)
_DR = BitLayout(
    "qualification of a debug-register access",
    64,
    (
        Field("register", 0, 3, values={n: f"DR{n}" for n in range(8)}),
        Field("from_dr", 4, text="MOV from DR", clear="MOV to DR"),
        Field("gpr", 8, 4, values=_GPR),
    ),
)
_IO = BitLayout(
    "qualification of an I/O instruction",
    64,
    (
        Field("size", 0, 3, values={0: "1 byte", 1: "2 bytes", 3: "4 bytes"}),
        Field("in", 3, text="IN", clear="OUT"),
        Field("string", 4, text="INS or OUTS"),
        Field("rep", 5, text="REP prefix"),
        Field("immediate", 6, text="port in the instruction", clear="port in DX"),
        Field("port", 16, 16, text="port"),
    ),
)
_MSR_LOAD = BitLayout(
    "qualification of a failed MSR load", 64, (Field("entry", 0, 32, text="number of the entry, from 1"),)
)
_INVALID_STATE = BitLayout(
    "qualification of an invalid guest state",
    64,
    (
        Field(
            "cause",
            0,
            3,
            values={0: "not told", 2: "a PDPTE", 3: "an NMI while blocked by STI", 4: "the VMCS link pointer"},
        ),
    ),
)
_MSR = BitLayout("qualification: index of the MSR", 64, (Field("index", 0, 32),))
_MSR_LIST = BitLayout(
    "qualification of a list of MSRs", 64, (Field("index", 0, 32, text="of the MSR; 0 without MSR bitmaps"),)
)
_MSR_WRITE = BitLayout("qualification of a write of an MSR", 64, (Field("wrmsrns", 0, text="WRMSRNS", clear="WRMSR"),))
_WBINVD = BitLayout(
    "qualification of a write-back of the caches", 64, (Field("wbnoinvd", 0, text="WBNOINVD", clear="WBINVD"),)
)
_ENQCMD = BitLayout("qualification of ENQCMD", 64, (Field("pasid", 0, 20, text="of IA32_PASID"),))
_ENQCMDS = BitLayout("qualification of ENQCMDS", 64, (Field("operand", 0, 32, text="low half of the source operand"),))
_MWAIT = BitLayout("qualification of MWAIT", 64, (Field("armed", 0, text="address-range monitoring is armed"),))
_APIC_TYPES = {
    0: "linear access: read",
    1: "linear access: write",
    2: "linear access: fetch",
    3: "linear access: during event delivery",
    4: "linear access: asynchronous to instructions",
    10: "guest-physical access: during event delivery",
    11: "guest-physical access: asynchronous to instructions",
    15: "guest-physical access: an instruction's fetch or execution",
}
_APIC_ACCESS = BitLayout(
    "qualification of an APIC access",
    64,
    (
        Field("offset", 0, 12, text="in the APIC page; undefined for a guest-physical access"),
        Field("type", 12, 4, values=_APIC_TYPES),
        Field("asynchronous", 16, text="not by an instruction, nor by delivery of an event"),
    ),
)
_EOI = BitLayout("qualification of a virtualised EOI", 64, (Field("vector", 0, 8),))
_APIC_WRITE = BitLayout(
    "qualification of an APIC write", 64, (Field("offset", 0, 12, text="in the virtual-APIC page"),)
)
_EPT_VIOLATION = BitLayout(
    "qualification of an EPT violation",
    64,
    (
        Field("read", 0, text="the access was a read"),
        Field("write", 1, text="the access was a write"),
        Field("fetch", 2, text="the access was a fetch"),
        Field("readable", 3, text="every entry allows reads"),
        Field("writable", 4, text="every entry allows writes"),
        Field("executable", 5, text="every entry allows execution (MBEC: by the supervisor)"),
        Field("user_executable", 6, text="every entry allows execution by the user (undefined without MBEC)"),
        Field("linear_valid", 7, text="the guest-linear address field is valid"),
        Field("final", 8, text="access to the translation of a linear address", clear="access to a paging structure"),
        Field("user_linear", 9, text="a user-mode linear address (bits 11:9: advanced information)"),
        Field("writable_linear", 10, text="a read/write linear address"),
        Field("nx_linear", 11, text="an execute-disable linear address"),
        Field("nmi_unblocked", 12, text="IRET had unblocked NMIs"),
        Field("shadow_stack", 13, text="a shadow-stack access"),
        Field("supervisor_shadow_stack", 14, text="the leaf has bit 60 (undefined without EPTP bit 7)"),
        Field("guest_paging_verification", 15, text="guest-paging verification"),
        Field("asynchronous", 16, text="not by an instruction, nor by delivery of an event"),
    ),
)
_UNBLOCKED = Field("nmi_unblocked", 12, text="IRET had unblocked NMIs")
_ASYNCHRONOUS = Field("asynchronous", 16, text="not by an instruction, nor by delivery of an event")


def _undefined(low: int, high: int) -> Field:
    # Bits of which the manual says that they are undefined: anything may be there.
    return Field(f"undefined_{low}", low, high - low + 1, text="undefined")


_PML = BitLayout(
    "qualification of a full PML log",
    64,
    (_undefined(0, 11), _UNBLOCKED, _undefined(13, 15), _ASYNCHRONOUS, _undefined(17, 63)),
)
_SPP = BitLayout(
    "qualification of an SPP event",
    64,
    (
        _undefined(0, 10),
        Field("miss", 11, text="a valid SPP entry is missing", clear="an SPP entry is misconfigured"),
        _UNBLOCKED,
        _undefined(13, 15),
        _ASYNCHRONOUS,
        _undefined(17, 63),
    ),
)
_NOTIFY = BitLayout(
    "qualification of a notify window",
    64,
    (Field("context_invalid", 0, text="the VM's context is lost"), _undefined(1, 11), _UNBLOCKED, _undefined(13, 63)),
)

# Instructions with a memory operand: the qualification is its displacement.
_WITH_OPERAND = (19, 21, 22, 23, 25, 27, 46, 47, 50, 53, 58, 63, 64)

QUALIFICATIONS: Mapping[int, BitLayout] = {
    4: _SIPI,
    5: _IO,
    9: _TASK_SWITCH,
    14: _LINEAR,
    28: _CR,
    29: _DR,
    30: _IO,
    32: _MSR_WRITE,
    33: _INVALID_STATE,
    34: _MSR_LOAD,
    36: _MWAIT,
    44: _APIC_ACCESS,
    45: _EOI,
    48: _EPT_VIOLATION,
    54: _WBINVD,
    56: _APIC_WRITE,
    62: _PML,
    66: _SPP,
    72: _ENQCMD,
    73: _ENQCMDS,
    75: _NOTIFY,
    78: _MSR_LIST,
    79: _MSR_LIST,
    84: _MSR,
    85: _MSR,
    **dict.fromkeys(_WITH_OPERAND, _DISPLACEMENT),
}
"""Basic exit reason: the layout of its qualification.  Reason 0 has three by its vector: `qualification_layout`."""

UNCLAIMED = frozenset({80, 81})
"""URDMSR, UWRMSR: 30.2.1 does not name them.  Of their qualification nothing is claimed: the number is shown."""

_EXCEPTIONS = {1: _DEBUG, 2: _NMI, 14: _LINEAR}


def _basic(call: str, reason: int) -> int:
    basic = number(call, "reason", reason, 0xFFFFFFFF) & 0xFFFF
    if basic not in EXIT_REASONS:
        raise ArgumentError(call, "reason", basic, "0 to 85, of which some are unused", "appendix C has no such reason")
    return basic


def qualification_layout(reason: int, vector: int | None = None) -> BitLayout | None:
    """The layout of an exit's qualification; None where the reason has none.

    `reason`: the exit reason (its bits 15:0 count); `vector`: of the exception (2: an NMI), for reason 0.
    ArgumentError where there is no such reason, the vector is not 0 to 31, or the reason has none.

    >>> qualification_layout(12) is None
    True
    """
    return _layout("qualification_layout", reason, vector)


def _layout(call: str, reason: int, vector: int | None) -> BitLayout | None:
    basic = _basic(call, reason)
    if basic == 0:
        return None if vector is None else _EXCEPTIONS.get(number(call, "vector", vector, 31))
    if vector is not None:
        raise ArgumentError(call, "vector", vector, "None", f"reason {basic} is no exception")
    return QUALIFICATIONS.get(basic)


def decode_qualification(reason: int, value: int, vector: int | None = None) -> Decoded:
    """An exit qualification by its fields.  Arguments and errors as `qualification_layout`; `value` has 64 bits.

    Contradictions in an EPT violation, a CR or an I/O access are told as problems.

    >>> print(decode_qualification(30, 0x03F80008))
    qualification of an I/O instruction 0x0000000003f80008: port=0x3f8 in
    """
    call = "decode_qualification"
    number(call, "value", value)
    layout = _layout(call, reason, vector)
    if layout is None:
        basic = _basic(call, reason)
        name = EXIT_REASONS[basic][0]
        bare = BitLayout(f"qualification of {name}", 64, (Field("value", 0, 64),))
        told = {49: "an EPT misconfiguration leaves it undefined"}.get(basic)
        if told is None and basic == 0 and vector is None:
            told = "an exception's depends on its vector: give it"
        wrong = () if told or not value or basic in UNCLAIMED else (f"{name} has no qualification: the field is 0",)
        return bare.decode(value, (told,) if told and value else wrong)
    problems = []
    decoded = layout.decode(value)
    if layout is _EPT_VIOLATION:
        if not decoded["linear_valid"] and decoded["final"]:
            problems.append("final (bit 8) without linear_valid (bit 7): bit 8 is 0 then")
        if not decoded["read"] | decoded["write"] | decoded["fetch"] and not decoded["guest_paging_verification"]:
            problems.append("none of read, write, fetch (bits 2:0) is set")
    elif layout is _CR:
        if decoded["type"] in (2, 3) and decoded["register"]:
            problems.append("CLTS and LMSW access CR0")
        if decoded["type"] in (2, 3) and decoded["gpr"]:
            problems.append("gpr is 0 for CLTS and LMSW")
        if decoded["type"] != 3 and decoded["lmsw_source"] | decoded["lmsw_memory"]:
            problems.append("lmsw_source and lmsw_memory are 0 unless type is LMSW")
    elif layout is _IO and decoded["immediate"] and decoded["port"] > 0xFF:
        problems.append("a port in the instruction is 8 bits")
    return layout.decode(value, tuple(problems)) if problems else decoded


def encode_qualification(reason: int, vector: int | None = None, /, **fields: int) -> int:
    """The qualification with these fields, by the names of the layout.  ArgumentError names field and value.

    >>> hex(encode_qualification(48, write=1, readable=1, linear_valid=1, final=1))
    '0x18a'
    """
    call = "encode_qualification"
    layout = _layout(call, reason, vector)
    if layout is None:
        for field, value in fields.items():
            basic = _basic(call, reason)
            known = "is known here" if basic in UNCLAIMED else "exists"
            raise ArgumentError(call, field, value, "no field", f"none {known} for {EXIT_REASONS[basic][0]}")
        return 0
    return layout.encode_for(call, fields)
