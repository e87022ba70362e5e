"""Model-specific registers by name: the architectural ones, and every one that KVM keeps for a guest.

Names are those of Linux's msr-index.h without MSR_ (of Intel's, IA32_...; of AMD's, as EFER, STAR, K7_HWCR,
AMD64_TSC_RATIO), and of kvm_para.h (KVM_...), hyperv-tlfs (HV_X64_...) for those that are KVM's and Hyper-V's own.
Rows of equal MSRs are made from their first one: the banks of MTRRs, counters, machine-check registers, APIC registers.

Sources: linux:arch/x86/include/asm/msr-index.h@v6.18, linux:arch/x86/include/uapi/asm/kvm_para.h@v6.18,
linux:include/hyperv/hvgdk.h@v6.18; which of them KVM keeps: linux:arch/x86/kvm/x86.c@v6.18 (msrs_to_save_base,
msrs_to_save_pmu, emulated_msrs_all, msr_based_features_all_except_vmx).
"""

from __future__ import annotations

from enum import IntEnum

from ..errors import ArgumentError, ArgumentTypeError
from .number import number
from .registers import APIC_BASE, EFER, XSS, Bits
from .registers import bit_names as _register_bit_names

__all__ = [
    "MISC_ENABLE",
    "MSR_BITS",
    "MTRR_DEF_TYPE",
    "SPEC_CTRL",
    "X2APIC_REGISTERS",
    "Msr",
    "bit_names",
    "msr_index",
    "msr_name",
]

_FIRST_PMC, _FIRST_FIXED = 0xC1, 0x309
_NR_PMCS, _NR_FIXED, _NR_BANKS, _NR_VAR_MTRRS = 8, 4, 32, 10

# (name with the number in it, first index, how many, step)
_ROWS = (
    ("IA32_PERFCTR{}", _FIRST_PMC, _NR_PMCS, 1),
    ("P6_EVNTSEL{}", 0x186, _NR_PMCS, 1),
    ("MTRRphysBase{}", 0x200, _NR_VAR_MTRRS, 2),
    ("MTRRphysMask{}", 0x201, _NR_VAR_MTRRS, 2),
    ("IA32_MC{}_CTL2", 0x280, _NR_BANKS, 1),
    ("CORE_PERF_FIXED_CTR{}", _FIRST_FIXED, _NR_FIXED, 1),
    ("IA32_MC{}_CTL", 0x400, _NR_BANKS, 4),
    ("IA32_MC{}_STATUS", 0x401, _NR_BANKS, 4),
    ("IA32_MC{}_ADDR", 0x402, _NR_BANKS, 4),
    ("IA32_MC{}_MISC", 0x403, _NR_BANKS, 4),
    ("IA32_PMC{}", 0x4C1, _NR_PMCS, 1),
    ("K7_EVNTSEL{}", 0xC0010000, 4, 1),
    ("K7_PERFCTR{}", 0xC0010004, 4, 1),
    ("F15H_PERF_CTL{}", 0xC0010200, 6, 2),
    ("F15H_PERF_CTR{}", 0xC0010201, 6, 2),
    ("HV_X64_SINT{}", 0x40000090, 16, 1),
    ("HV_X64_STIMER{}_CONFIG", 0x400000B0, 4, 2),
    ("HV_X64_STIMER{}_COUNT", 0x400000B1, 4, 2),
)

# Registers of the APIC in x2APIC mode, MSR 0x800 + offset >> 4 (Intel SDM volume 3, table 12-6).
X2APIC_REGISTERS = {
    0x802: "X2APIC_APICID",
    0x803: "X2APIC_VERSION",
    0x808: "X2APIC_TPR",
    0x80A: "X2APIC_PPR",
    0x80B: "X2APIC_EOI",
    0x80D: "X2APIC_LDR",
    0x80F: "X2APIC_SIVR",
    **{0x810 + at: f"X2APIC_ISR{at}" for at in range(8)},
    **{0x818 + at: f"X2APIC_TMR{at}" for at in range(8)},
    **{0x820 + at: f"X2APIC_IRR{at}" for at in range(8)},
    0x828: "X2APIC_ESR",
    0x82F: "X2APIC_LVT_CMCI",
    0x830: "X2APIC_ICR",
    0x832: "X2APIC_LVT_TIMER",
    0x833: "X2APIC_LVT_THERMAL",
    0x834: "X2APIC_LVT_PMI",
    0x835: "X2APIC_LVT_LINT0",
    0x836: "X2APIC_LVT_LINT1",
    0x837: "X2APIC_LVT_ERROR",
    0x838: "X2APIC_INIT_COUNT",
    0x839: "X2APIC_CUR_COUNT",
    0x83E: "X2APIC_DIV_CONF",
    0x83F: "X2APIC_SELF_IPI",
}


class Msr(IntEnum):
    """Index of each MSR that has a name; those of `_ROWS` and `X2APIC_REGISTERS` too.

    >>> Msr.IA32_TSC, hex(Msr.EFER), Msr(0xC0000100).name, Msr["IA32_MC2_CTL"]
    (<Msr.IA32_TSC: 16>, '0xc0000080', 'FS_BASE', <Msr.IA32_MC2_CTL: 1032>)
    """

    _ignore_ = "at count first index register row step"  # the variables of the loops below

    # Intel's
    IA32_P5_MC_ADDR = 0x0
    IA32_P5_MC_TYPE = 0x1
    IA32_TSC = 0x10
    KVM_WALL_CLOCK = 0x11
    KVM_SYSTEM_TIME = 0x12
    IA32_PLATFORM_ID = 0x17
    IA32_APICBASE = 0x1B
    IA32_EBL_CR_POWERON = 0x2A
    EBC_FREQUENCY_ID = 0x2C
    SMI_COUNT = 0x34
    CORE_THREAD_COUNT = 0x35
    IA32_FEAT_CTL = 0x3A
    IA32_TSC_ADJUST = 0x3B
    IA32_SPEC_CTRL = 0x48
    IA32_PRED_CMD = 0x49
    IA32_UCODE_WRITE = 0x79
    IA32_UCODE_REV = 0x8B
    IA32_SGXLEPUBKEYHASH0 = 0x8C
    IA32_SGXLEPUBKEYHASH1 = 0x8D
    IA32_SGXLEPUBKEYHASH2 = 0x8E
    IA32_SGXLEPUBKEYHASH3 = 0x8F
    IA32_SMBASE = 0x9E
    FSB_FREQ = 0xCD
    PLATFORM_INFO = 0xCE
    IA32_CORE_CAPS = 0xCF
    IA32_UMWAIT_CONTROL = 0xE1
    IA32_MPERF = 0xE7
    IA32_APERF = 0xE8
    MTRRcap = 0xFE
    IA32_ARCH_CAPABILITIES = 0x10A
    IA32_FLUSH_CMD = 0x10B
    IA32_TSX_CTRL = 0x122
    IA32_MCU_OPT_CTRL = 0x123
    MISC_FEATURES_ENABLES = 0x140
    IA32_SYSENTER_CS = 0x174
    IA32_SYSENTER_ESP = 0x175
    IA32_SYSENTER_EIP = 0x176
    IA32_MCG_CAP = 0x179
    IA32_MCG_STATUS = 0x17A
    IA32_MCG_CTL = 0x17B
    IA32_PERF_STATUS = 0x198
    IA32_PERF_CTL = 0x199
    IA32_THERM_CONTROL = 0x19A
    IA32_THERM_INTERRUPT = 0x19B
    IA32_THERM_STATUS = 0x19C
    IA32_MISC_ENABLE = 0x1A0
    IA32_ENERGY_PERF_BIAS = 0x1B0
    IA32_PACKAGE_THERM_STATUS = 0x1B1
    IA32_PACKAGE_THERM_INTERRUPT = 0x1B2
    IA32_XFD = 0x1C4
    IA32_XFD_ERR = 0x1C5
    IA32_DEBUGCTLMSR = 0x1D9
    IA32_LASTBRANCHFROMIP = 0x1DB
    IA32_LASTBRANCHTOIP = 0x1DC
    IA32_LASTINTFROMIP = 0x1DD
    IA32_LASTINTTOIP = 0x1DE
    IA32_POWER_CTL = 0x1FC
    MTRRfix64K_00000 = 0x250
    MTRRfix16K_80000 = 0x258
    MTRRfix16K_A0000 = 0x259
    MTRRfix4K_C0000 = 0x268
    MTRRfix4K_C8000 = 0x269
    MTRRfix4K_D0000 = 0x26A
    MTRRfix4K_D8000 = 0x26B
    MTRRfix4K_E0000 = 0x26C
    MTRRfix4K_E8000 = 0x26D
    MTRRfix4K_F0000 = 0x26E
    MTRRfix4K_F8000 = 0x26F
    IA32_CR_PAT = 0x277
    MTRRdefType = 0x2FF
    IA32_PERF_CAPABILITIES = 0x345
    CORE_PERF_FIXED_CTR_CTRL = 0x38D
    CORE_PERF_GLOBAL_STATUS = 0x38E
    CORE_PERF_GLOBAL_CTRL = 0x38F
    CORE_PERF_GLOBAL_OVF_CTRL = 0x390
    CORE_PERF_GLOBAL_STATUS_SET = 0x391
    IA32_PEBS_ENABLE = 0x3F1
    PEBS_DATA_CFG = 0x3F2
    IA32_VMX_BASIC = 0x480
    IA32_VMX_PINBASED_CTLS = 0x481
    IA32_VMX_PROCBASED_CTLS = 0x482
    IA32_VMX_EXIT_CTLS = 0x483
    IA32_VMX_ENTRY_CTLS = 0x484
    IA32_VMX_MISC = 0x485
    IA32_VMX_CR0_FIXED0 = 0x486
    IA32_VMX_CR0_FIXED1 = 0x487
    IA32_VMX_CR4_FIXED0 = 0x488
    IA32_VMX_CR4_FIXED1 = 0x489
    IA32_VMX_VMCS_ENUM = 0x48A
    IA32_VMX_PROCBASED_CTLS2 = 0x48B
    IA32_VMX_EPT_VPID_CAP = 0x48C
    IA32_VMX_TRUE_PINBASED_CTLS = 0x48D
    IA32_VMX_TRUE_PROCBASED_CTLS = 0x48E
    IA32_VMX_TRUE_EXIT_CTLS = 0x48F
    IA32_VMX_TRUE_ENTRY_CTLS = 0x490
    IA32_VMX_VMFUNC = 0x491
    IA32_VMX_PROCBASED_CTLS3 = 0x492
    IA32_MCG_EXT_CTL = 0x4D0
    IA32_RTIT_OUTPUT_BASE = 0x560
    IA32_RTIT_OUTPUT_MASK = 0x561
    IA32_RTIT_CTL = 0x570
    IA32_RTIT_STATUS = 0x571
    IA32_RTIT_CR3_MATCH = 0x572
    IA32_RTIT_ADDR0_A = 0x580
    IA32_RTIT_ADDR0_B = 0x581
    IA32_RTIT_ADDR1_A = 0x582
    IA32_RTIT_ADDR1_B = 0x583
    IA32_RTIT_ADDR2_A = 0x584
    IA32_RTIT_ADDR2_B = 0x585
    IA32_RTIT_ADDR3_A = 0x586
    IA32_RTIT_ADDR3_B = 0x587
    IA32_DS_AREA = 0x600
    IA32_U_CET = 0x6A0
    IA32_S_CET = 0x6A2
    IA32_PL0_SSP = 0x6A4
    IA32_PL1_SSP = 0x6A5
    IA32_PL2_SSP = 0x6A6
    IA32_PL3_SSP = 0x6A7
    IA32_INT_SSP_TAB = 0x6A8
    IA32_TSC_DEADLINE = 0x6E0
    IA32_PKRS = 0x6E1
    IA32_BNDCFGS = 0xD90
    IA32_XSS = 0xDA0
    ARCH_LBR_CTL = 0x14CE
    ARCH_LBR_DEPTH = 0x14CF
    # of FRED
    IA32_FRED_RSP0 = 0x1CC
    IA32_FRED_RSP1 = 0x1CD
    IA32_FRED_RSP2 = 0x1CE
    IA32_FRED_RSP3 = 0x1CF
    IA32_FRED_STKLVLS = 0x1D0
    IA32_FRED_SSP1 = 0x1D1
    IA32_FRED_SSP2 = 0x1D2
    IA32_FRED_SSP3 = 0x1D3
    IA32_FRED_CONFIG = 0x1D4
    # of long mode
    EFER = 0xC0000080
    STAR = 0xC0000081
    LSTAR = 0xC0000082
    CSTAR = 0xC0000083
    SYSCALL_MASK = 0xC0000084
    FS_BASE = 0xC0000100
    GS_BASE = 0xC0000101
    KERNEL_GS_BASE = 0xC0000102
    TSC_AUX = 0xC0000103
    # AMD's
    AMD64_TSC_RATIO = 0xC0000104
    AMD_DBG_EXTN_CFG = 0xC000010F
    AMD64_PERF_CNTR_GLOBAL_STATUS = 0xC0000300
    AMD64_PERF_CNTR_GLOBAL_CTL = 0xC0000301
    AMD64_PERF_CNTR_GLOBAL_STATUS_CLR = 0xC0000302
    AMD64_PERF_CNTR_GLOBAL_STATUS_SET = 0xC0000303
    AMD64_SYSCFG = 0xC0010010
    K7_HWCR = 0xC0010015
    K8_TOP_MEM1 = 0xC001001A
    K8_TOP_MEM2 = 0xC001001D
    AMD64_NB_CFG = 0xC001001F
    AMD64_PATCH_LOADER = 0xC0010020
    K8_INT_PENDING_MSG = 0xC0010055
    VM_CR = 0xC0010114
    VM_IGNNE = 0xC0010115
    VM_HSAVE_PA = 0xC0010117
    AMD64_VIRT_SPEC_CTRL = 0xC001011F
    AMD64_SEV_ES_GHCB = 0xC0010130
    AMD64_SEV = 0xC0010131
    AMD64_OSVW_ID_LENGTH = 0xC0010140
    AMD64_OSVW_STATUS = 0xC0010141
    AMD64_LS_CFG = 0xC0011020
    F15H_IC_CFG = 0xC0011021
    AMD64_DC_CFG = 0xC0011022
    AMD64_DE_CFG = 0xC0011029
    AMD64_BU_CFG2 = 0xC001102A
    # KVM's own
    KVM_WALL_CLOCK_NEW = 0x4B564D00
    KVM_SYSTEM_TIME_NEW = 0x4B564D01
    KVM_ASYNC_PF_EN = 0x4B564D02
    KVM_STEAL_TIME = 0x4B564D03
    KVM_PV_EOI_EN = 0x4B564D04
    KVM_POLL_CONTROL = 0x4B564D05
    KVM_ASYNC_PF_INT = 0x4B564D06
    KVM_ASYNC_PF_ACK = 0x4B564D07
    KVM_MIGRATION_CONTROL = 0x4B564D08
    # Hyper-V's
    HV_X64_GUEST_OS_ID = 0x40000000
    HV_X64_HYPERCALL = 0x40000001
    HV_X64_VP_INDEX = 0x40000002
    HV_X64_RESET = 0x40000003
    HV_X64_VP_RUNTIME = 0x40000010
    HV_X64_TIME_REF_COUNT = 0x40000020
    HV_X64_REFERENCE_TSC = 0x40000021
    HV_X64_TSC_FREQUENCY = 0x40000022
    HV_X64_APIC_FREQUENCY = 0x40000023
    HV_X64_EOI = 0x40000070
    HV_X64_ICR = 0x40000071
    HV_X64_TPR = 0x40000072
    HV_X64_VP_ASSIST_PAGE = 0x40000073
    HV_X64_SCONTROL = 0x40000080
    HV_X64_SVERSION = 0x40000081
    HV_X64_SIEFP = 0x40000082
    HV_X64_SIMP = 0x40000083
    HV_X64_EOM = 0x40000084
    HV_X64_SYNDBG_CONTROL = 0x400000F1
    HV_X64_SYNDBG_STATUS = 0x400000F2
    HV_X64_SYNDBG_SEND_BUFFER = 0x400000F3
    HV_X64_SYNDBG_RECV_BUFFER = 0x400000F4
    HV_X64_SYNDBG_PENDING_BUFFER = 0x400000F5
    HV_X64_SYNDBG_OPTIONS = 0x400000FF
    HV_X64_CRASH_P0 = 0x40000100
    HV_X64_CRASH_P1 = 0x40000101
    HV_X64_CRASH_P2 = 0x40000102
    HV_X64_CRASH_P3 = 0x40000103
    HV_X64_CRASH_P4 = 0x40000104
    HV_X64_CRASH_CTL = 0x40000105
    HV_X64_REENLIGHTENMENT_CONTROL = 0x40000106
    HV_X64_TSC_EMULATION_CONTROL = 0x40000107
    HV_X64_TSC_EMULATION_STATUS = 0x40000108
    HV_X64_TSC_INVARIANT_CONTROL = 0x40000118

    for row, first, count, step in _ROWS:
        for at in range(count):
            vars()[row.format(at)] = first + at * step
    for index, register in X2APIC_REGISTERS.items():
        vars()[register] = index


class MISC_ENABLE(Bits):
    """Bits of IA32_MISC_ENABLE."""

    FAST_STRING = 1 << 0
    TCC = 1 << 3
    EMON = 1 << 7
    BTS_UNAVAIL = 1 << 11
    PEBS_UNAVAIL = 1 << 12
    ENHANCED_SPEEDSTEP = 1 << 16
    MWAIT = 1 << 18
    LIMIT_CPUID = 1 << 22
    XTPR_DISABLE = 1 << 23
    XD_DISABLE = 1 << 34


class SPEC_CTRL(Bits):
    """Bits of IA32_SPEC_CTRL."""

    IBRS = 1 << 0
    STIBP = 1 << 1
    SSBD = 1 << 2
    IPRED_DIS_U = 1 << 3
    IPRED_DIS_S = 1 << 4
    RRSBA_DIS_U = 1 << 5
    RRSBA_DIS_S = 1 << 6
    PSFD = 1 << 7
    BHI_DIS_S = 1 << 10


class MTRR_DEF_TYPE(Bits):
    """Bits of MTRRdefType; the default memory type is in bits 7:0."""

    TYPE = 0xFF
    FE = 1 << 10  # the fixed-range MTRRs count
    E = 1 << 11  # the MTRRs count


# MSRs that are sets of bits -> their bits
MSR_BITS: dict[int, type[Bits]] = {
    0x1B: APIC_BASE,
    0x48: SPEC_CTRL,
    0x1A0: MISC_ENABLE,
    0x2FF: MTRR_DEF_TYPE,
    0xDA0: XSS,
    0xC0000080: EFER,
}

_NAMES: dict[int, str] = {int(member): member.name for member in Msr}


def msr_name(index: int) -> str:
    """The MSR's name, or "MSR 0x…" where it has none.  ArgumentError: `index` is not 0 to 2**32-1.

    >>> msr_name(0x10), msr_name(0x12345)
    ('IA32_TSC', 'MSR 0x12345')
    """
    found = number("msr_name", "index", index, 0xFFFFFFFF)
    return _NAMES.get(found) or f"MSR {found:#x}"


def msr_index(name: str) -> int:
    """The index of the MSR with this name, in either case; with or without "MSR_".  ArgumentError: no such name.

    >>> hex(msr_index("efer")), hex(msr_index("MSR_IA32_TSC"))
    ('0xc0000080', '0x10')
    """
    if not isinstance(name, str):
        raise ArgumentTypeError("msr_index", "name", name, "the name of an MSR")
    wanted = name.upper().removeprefix("MSR_")
    for known, member in Msr.__members__.items():
        if known.upper() == wanted:
            return int(member)
    from difflib import get_close_matches

    near = get_close_matches(wanted, list(Msr.__members__), 3)
    raise ArgumentError("msr_index", "name", name, ", ".join(near) or "a name of hvmodel.arch.msr.Msr")


def bit_names(index: int, value: int) -> tuple[str, ...]:
    """Names of the bits that are set in `value` (64 bits) of an MSR, from bit 0 up; () where it is no set of bits.

    >>> bit_names(0xC0000080, 0x500)
    ('EFER.LME', 'EFER.LMA')
    >>> bit_names(0x10, 0x500)
    ()
    """
    register = MSR_BITS.get(number("bit_names", "index", index, 0xFFFFFFFF))
    return () if register is None else _register_bit_names(register, value)
