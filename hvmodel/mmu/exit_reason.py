"""Why a VM left VMX non-root operation: the exit reason of the VMCS (field 4402H), by name.

    31 30 29 28 27 26 25 24          16 15                       0
    |EF| 0|RT|MT|EN|BL|SS|      0      |      basic reason       |

    EF VM-entry failure, RT exit from VMX root operation, MT pending MTF, EN in an enclave, BL bus lock, SS shadow stack
    prematurely busy.

Names are those of KVM (arch/x86/include/uapi/asm/vmx.h@v6.18) where it has the reason, else the manual's words in the
same form.  Source: Intel SDM volume 3 (edition 092 of 2026), 27.9.1 and appendix C; 84 and 85 by KVM.
"""

from __future__ import annotations

from ..arch.number import number
from ..errors import ArgumentError
from .bits import BitLayout, Decoded, Field

__all__ = ["EXIT_REASON", "EXIT_REASONS", "decode_exit_reason", "exit_reason_name", "exit_reason_number"]

EXIT_REASONS = {
    0: ("EXCEPTION_NMI", "an exception that the exception bitmap selects, or an NMI"),
    1: ("EXTERNAL_INTERRUPT", "an interrupt from outside"),
    2: ("TRIPLE_FAULT", "a fault while a double fault was delivered"),
    3: ("INIT_SIGNAL", "INIT"),
    4: ("SIPI_SIGNAL", "start-up IPI"),
    5: ("IO_SMI", "an SMI after an I/O instruction"),
    6: ("OTHER_SMI", "another SMI"),
    7: ("INTERRUPT_WINDOW", "the guest can take an interrupt"),
    8: ("NMI_WINDOW", "the guest can take an NMI"),
    9: ("TASK_SWITCH", "a task switch"),
    10: ("CPUID", "CPUID"),
    11: ("GETSEC", "GETSEC"),
    12: ("HLT", "HLT"),
    13: ("INVD", "INVD"),
    14: ("INVLPG", "INVLPG"),
    15: ("RDPMC", "RDPMC"),
    16: ("RDTSC", "RDTSC"),
    17: ("RSM", "RSM"),
    18: ("VMCALL", "VMCALL"),
    19: ("VMCLEAR", "VMCLEAR"),
    20: ("VMLAUNCH", "VMLAUNCH"),
    21: ("VMPTRLD", "VMPTRLD"),
    22: ("VMPTRST", "VMPTRST"),
    23: ("VMREAD", "VMREAD"),
    24: ("VMRESUME", "VMRESUME"),
    25: ("VMWRITE", "VMWRITE"),
    26: ("VMOFF", "VMXOFF"),
    27: ("VMON", "VMXON"),
    28: ("CR_ACCESS", "an access to CR0, CR3, CR4 or CR8, CLTS or LMSW"),
    29: ("DR_ACCESS", "MOV to or from a debug register"),
    30: ("IO_INSTRUCTION", "an I/O instruction"),
    31: ("MSR_READ", "RDMSR"),
    32: ("MSR_WRITE", "WRMSR or WRMSRNS"),
    33: ("INVALID_STATE", "VM entry failed: the guest's state is not valid"),
    34: ("MSR_LOAD_FAIL", "VM entry failed: an MSR could not be loaded"),
    36: ("MWAIT_INSTRUCTION", "MWAIT"),
    37: ("MONITOR_TRAP_FLAG", "monitor trap flag"),
    39: ("MONITOR_INSTRUCTION", "MONITOR"),
    40: ("PAUSE_INSTRUCTION", "PAUSE"),
    41: ("MCE_DURING_VMENTRY", "VM entry failed: a machine check"),
    43: ("TPR_BELOW_THRESHOLD", "the task priority fell below the threshold"),
    44: ("APIC_ACCESS", "an access to the APIC-access page"),
    45: ("EOI_INDUCED", "a virtualised EOI"),
    46: ("GDTR_IDTR", "LGDT, LIDT, SGDT or SIDT"),
    47: ("LDTR_TR", "LLDT, LTR, SLDT or STR"),
    48: ("EPT_VIOLATION", "the EPT structures do not allow the access"),
    49: ("EPT_MISCONFIG", "an EPT entry is not valid"),
    50: ("INVEPT", "INVEPT"),
    51: ("RDTSCP", "RDTSCP"),
    52: ("PREEMPTION_TIMER", "the VMX preemption timer ran out"),
    53: ("INVVPID", "INVVPID"),
    54: ("WBINVD", "WBINVD or WBNOINVD"),
    55: ("XSETBV", "XSETBV"),
    56: ("APIC_WRITE", "a write to the virtual-APIC page that needs emulation"),
    57: ("RDRAND", "RDRAND"),
    58: ("INVPCID", "INVPCID"),
    59: ("VMFUNC", "VMFUNC"),
    60: ("ENCLS", "ENCLS"),
    61: ("RDSEED", "RDSEED"),
    62: ("PML_FULL", "the page-modification log is full"),
    63: ("XSAVES", "XSAVES"),
    64: ("XRSTORS", "XRSTORS"),
    65: ("PCONFIG", "PCONFIG"),
    66: ("SPP_EVENT", "a sub-page permission is missing or misconfigured"),
    67: ("UMWAIT", "UMWAIT"),
    68: ("TPAUSE", "TPAUSE"),
    69: ("LOADIWKEY", "LOADIWKEY"),
    70: ("ENCLV", "ENCLV"),
    72: ("ENQCMD_PASID", "ENQCMD: no translation of the PASID"),
    73: ("ENQCMDS_PASID", "ENQCMDS: no translation of the PASID"),
    74: ("BUS_LOCK", "a bus lock"),
    75: ("NOTIFY", "no interrupt window for too long"),
    76: ("SEAMCALL", "SEAMCALL"),
    77: ("TDCALL", "TDCALL"),
    78: ("RDMSRLIST", "RDMSRLIST"),
    79: ("WRMSRLIST", "WRMSRLIST"),
    80: ("URDMSR", "URDMSR"),
    81: ("UWRMSR", "UWRMSR"),
    84: ("MSR_READ_IMM", "RDMSR with the index in the instruction"),
    85: ("MSR_WRITE_IMM", "WRMSRNS with the index in the instruction"),
}
"""Basic exit reason: (name, what happened)."""

EXIT_REASON = BitLayout(
    "exit reason",
    32,
    (
        Field("basic", 0, 16, values={number: f"{name}: {text}" for number, (name, text) in EXIT_REASONS.items()}),
        Field("shadow_stack_busy", 25, text="a shadow stack was prematurely busy"),
        Field("bus_lock", 26, text="there was a bus lock too"),
        Field("enclave", 27, text="the guest was in an enclave"),
        Field("pending_mtf", 28, text="an MTF exit was pending (SMM exits)"),
        Field("from_root", 29, text="from VMX root operation (SMM exits)"),
        Field("entry_failure", 31, text="VM entry failed"),
    ),
)
"""The field's bits (27.9.1, table 27-19).  Bits 30 and 24:17 are not defined yet, bit 16 is always 0."""

_ENTRY_FAILURES = frozenset({33, 34, 41})
_NUMBERS = {name: number for number, (name, _) in EXIT_REASONS.items()}


def exit_reason_name(reason: int) -> str:
    """The name of a basic exit reason (bits 15:0 of the field; the rest is not looked at).

    ArgumentError where there is no such reason.

    >>> exit_reason_name(48)
    'EPT_VIOLATION'
    """
    basic = number("exit_reason_name", "reason", reason, 0xFFFFFFFF) & 0xFFFF
    if basic not in EXIT_REASONS:
        raise ArgumentError(
            "exit_reason_name", "reason", basic, "0 to 85, of which some are unused", "appendix C has no such reason"
        )
    return EXIT_REASONS[basic][0]


def exit_reason_number(name: str) -> int:
    """The number of a basic exit reason.  ArgumentError where the name is unknown.

    >>> exit_reason_number("EPT_MISCONFIG")
    49
    """
    found = _NUMBERS.get(str(name).upper().removeprefix("EXIT_REASON_"))
    if found is None:
        raise ArgumentError("exit_reason_number", "name", name, ", ".join(_NUMBERS))
    return found


def decode_exit_reason(value: int) -> Decoded:
    """The field by its bits.  ArgumentError: not a number of 32 bits.

    A failed VM entry has bit 31 and one of three reasons; either without the other is told as a problem.

    >>> print(decode_exit_reason(0x80000021))
    exit reason 0x80000021: entry_failure basic=0x21
    """
    number("decode_exit_reason", "value", value, 0xFFFFFFFF)
    basic, failed = value & 0xFFFF, bool(value >> 31)
    problems: tuple[str, ...] = ()
    if failed and basic not in _ENTRY_FAILURES:
        problems = (f"entry_failure (bit 31) is set, but reason {basic} is none of 33, 34, 41",)
    elif not failed and basic in _ENTRY_FAILURES:
        problems = (f"reason {basic} is a failed VM entry, but bit 31 is clear",)
    return EXIT_REASON.decode(value, problems)
