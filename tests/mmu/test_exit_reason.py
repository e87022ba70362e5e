"""Exit reasons against the table of Intel's manual (volume 3, appendix C)."""

from __future__ import annotations

import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError
from hvmodel.mmu.exit_reason import EXIT_REASONS, decode_exit_reason, exit_reason_name, exit_reason_number

# Appendix C, table C-1: the numbers that have no reason, up to the last one.
UNUSED = {35, 38, 42, 71, 82, 83}

# The names that KVM has (arch/x86/include/uapi/asm/vmx.h@v6.18: EXIT_REASON_*).
KVMS = {
    0: "EXCEPTION_NMI",
    1: "EXTERNAL_INTERRUPT",
    2: "TRIPLE_FAULT",
    3: "INIT_SIGNAL",
    4: "SIPI_SIGNAL",
    6: "OTHER_SMI",
    7: "INTERRUPT_WINDOW",
    8: "NMI_WINDOW",
    9: "TASK_SWITCH",
    10: "CPUID",
    12: "HLT",
    13: "INVD",
    14: "INVLPG",
    15: "RDPMC",
    16: "RDTSC",
    18: "VMCALL",
    19: "VMCLEAR",
    20: "VMLAUNCH",
    21: "VMPTRLD",
    22: "VMPTRST",
    23: "VMREAD",
    24: "VMRESUME",
    25: "VMWRITE",
    26: "VMOFF",
    27: "VMON",
    28: "CR_ACCESS",
    29: "DR_ACCESS",
    30: "IO_INSTRUCTION",
    31: "MSR_READ",
    32: "MSR_WRITE",
    33: "INVALID_STATE",
    34: "MSR_LOAD_FAIL",
    36: "MWAIT_INSTRUCTION",
    37: "MONITOR_TRAP_FLAG",
    39: "MONITOR_INSTRUCTION",
    40: "PAUSE_INSTRUCTION",
    41: "MCE_DURING_VMENTRY",
    43: "TPR_BELOW_THRESHOLD",
    44: "APIC_ACCESS",
    45: "EOI_INDUCED",
    46: "GDTR_IDTR",
    47: "LDTR_TR",
    48: "EPT_VIOLATION",
    49: "EPT_MISCONFIG",
    50: "INVEPT",
    51: "RDTSCP",
    52: "PREEMPTION_TIMER",
    53: "INVVPID",
    54: "WBINVD",
    55: "XSETBV",
    56: "APIC_WRITE",
    57: "RDRAND",
    58: "INVPCID",
    59: "VMFUNC",
    60: "ENCLS",
    61: "RDSEED",
    62: "PML_FULL",
    63: "XSAVES",
    64: "XRSTORS",
    67: "UMWAIT",
    68: "TPAUSE",
    74: "BUS_LOCK",
    75: "NOTIFY",
    76: "SEAMCALL",
    77: "TDCALL",
    84: "MSR_READ_IMM",
    85: "MSR_WRITE_IMM",
}

# Those that it has not: a word of the row of appendix C.
OTHERS = {
    5: "IO_SMI",
    11: "GETSEC",
    17: "RSM",
    65: "PCONFIG",
    66: "SPP",
    69: "LOADIWKEY",
    70: "ENCLV",
    72: "ENQCMD",
    73: "ENQCMDS",
    78: "RDMSRLIST",
    79: "WRMSRLIST",
    80: "URDMSR",
    81: "UWRMSR",
}


def test_every_number_of_the_table_has_a_reason_and_no_other() -> None:
    assert set(EXIT_REASONS) == set(range(86)) - UNUSED
    names = [name for name, _ in EXIT_REASONS.values()]
    assert len(set(names)) == len(names)


def test_names() -> None:
    assert {number: exit_reason_name(number) for number in KVMS} == KVMS
    assert all(word in exit_reason_name(number) for number, word in OTHERS.items())
    assert set(KVMS) | set(OTHERS) == set(EXIT_REASONS)


@pytest.mark.parametrize("number", sorted(EXIT_REASONS))
def test_names_come_back(number: int) -> None:
    assert exit_reason_number(exit_reason_name(number)) == number
    assert exit_reason_number("EXIT_REASON_" + exit_reason_name(number).lower()) == number


@pytest.mark.parametrize("number", sorted({*UNUSED, 86, 0xFFFF}))
def test_unused_numbers_are_refused_and_shown(number: int) -> None:
    with pytest.raises(ArgumentError, match=f"reason={number}|reason={number:#x}"):
        exit_reason_name(number)
    assert decode_exit_reason(number).problems == (f"basic (bits 15:0) is {number}, which is reserved",)


def test_names_that_are_none() -> None:
    with pytest.raises(ArgumentError, match="EPT_VIOLATION"):
        exit_reason_number("NOTHING")
    with pytest.raises(ArgumentTypeError, match="reason"):
        exit_reason_name("48")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="value"):
        decode_exit_reason(1 << 32)


# 27.9.1, table 27-19: the modifier bits.
@pytest.mark.parametrize(
    ("bit", "name"),
    [(25, "shadow_stack_busy"), (26, "bus_lock"), (27, "enclave"), (28, "pending_mtf"), (29, "from_root")],
)
def test_modifiers(bit: int, name: str) -> None:
    decoded = decode_exit_reason(1 << bit | 12)
    assert decoded.set() == (name, "basic")
    assert decoded["basic"] == 12
    assert not decoded.problems


@pytest.mark.parametrize("reason", sorted(EXIT_REASONS))
def test_a_failed_entry_has_bit_31_and_one_of_three_reasons(reason: int) -> None:
    failed = reason in (33, 34, 41)  # 29.8: invalid guest state, MSR loading, machine check
    assert bool(decode_exit_reason(reason).problems) == failed
    assert bool(decode_exit_reason(reason | 1 << 31).problems) != failed


@pytest.mark.parametrize("bit", [*range(16, 25), 30])
def test_reserved_bits(bit: int) -> None:
    assert decode_exit_reason(1 << bit | 12).problems == (f"bit {bit} is reserved and set",)
