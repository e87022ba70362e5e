"""MSRs by name: against KVM's list and header, and against what their values are on a vCPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hvmodel.arch.msr import MSR_BITS, X2APIC_REGISTERS, Msr, bit_names, msr_index, msr_name
from hvmodel.errors import ArgumentError, ArgumentTypeError
from tests.need import need

PARA = Path("/usr/include/x86_64-linux-gnu/asm/kvm_para.h")


def test_every_msr_that_kvm_lists_has_a_name() -> None:
    need("kvm")
    from hvmodel.kvm import Kvm

    with Kvm() as kvm:
        indices = [*kvm.msr_index_list(), *kvm.msr_feature_index_list()]
    assert len(indices) > 20
    assert [hex(index) for index in indices if msr_name(index) == f"MSR {index:#x}"] == []


def test_kvm_header_has_the_same_msrs() -> None:
    if not PARA.exists():
        pytest.skip(f"{PARA} is not there")
    rows = re.findall(r"^#define MSR_KVM_(\w+)\s+(0x[0-9a-f]+)", PARA.read_text(), re.M)
    assert len(rows) >= 11
    for name, index in rows:
        assert int(Msr[f"KVM_{name}"]) == int(index, 16)


def test_names_mean_what_they_say() -> None:
    # The same state by KVM_GET_MSRS and KVM_GET_SREGS, and the values after a reset (Intel SDM volume 3, table 9-1).
    need("kvm")
    from hvmodel.kvm import Kvm

    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
        vcpu.set_cpuid2(kvm.supported_cpuid_table())
        sregs = vcpu.sregs
        sregs.fs.base, sregs.gs.base, sregs.efer = 0x11110000, 0x22220000, 0x901
        vcpu.sregs = sregs

        def read(*names: str) -> list[int]:
            found = vcpu.get_msrs([msr_index(name) for name in names])
            return [found[msr_index(name)] for name in names]

        assert read("FS_BASE", "GS_BASE", "EFER") == [0x11110000, 0x22220000, 0x901]
        assert read("IA32_APICBASE") == [sregs.apic_base]
        assert read("IA32_CR_PAT") == [0x0007040600070406]
        first, second = read("IA32_TSC")[0], read("IA32_TSC")[0]
        assert first < second
        vcpu.set_msrs({Msr.SYSCALL_MASK: 0x47700, Msr.KERNEL_GS_BASE: 0x33330000, Msr["MTRRphysMask1"]: 0x800})
        assert read("SYSCALL_MASK", "KERNEL_GS_BASE", "MTRRphysMask1", "MTRRphysBase1") == [
            0x47700,
            0x33330000,
            0x800,
            0,
        ]


def test_rows_step_as_the_manual_has_them() -> None:
    # Intel SDM volume 4, table 2-2: IA32_MC3_STATUS 40DH, IA32_MTRR_PHYSMASK2 205H, IA32_MC5_CTL2 285H; volume 3,
    # table 12-6: the in-service register of bits 255:224 is MSR 817H.
    assert Msr["IA32_MC3_STATUS"] == 0x40D
    assert Msr["MTRRphysMask2"] == 0x205
    assert Msr["IA32_MC5_CTL2"] == 0x285
    assert Msr["X2APIC_ISR7"] == 0x817
    assert Msr["IA32_PMC7"] == 0x4C8
    # AMD APM volume 2, appendix A: PerfCtr3 is C001_0207.
    assert Msr["F15H_PERF_CTR3"] == 0xC0010207


def test_no_two_names_for_one_index() -> None:
    assert len(Msr.__members__) == len(set(map(int, Msr)))
    assert all(0x800 <= index < 0x900 for index in X2APIC_REGISTERS)


def test_names_and_back() -> None:
    for name, member in Msr.__members__.items():
        assert msr_name(member) == name
        assert msr_index(name.lower()) == member
    assert msr_index("MSR_IA32_TSC") == 0x10
    assert msr_name(0xDEADBEEF) == "MSR 0xdeadbeef"


def test_bits() -> None:
    assert bit_names(Msr.EFER, 1 << 8 | 1 << 62) == ("EFER.LME", "EFER bit 62")
    assert bit_names(Msr.IA32_TSC, 5) == ()
    assert all(msr_name(index) != f"MSR {index:#x}" for index in MSR_BITS)


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match="IA32_TSC"):
        msr_index("IA32_TCS")
    for call in (msr_name, lambda index: bit_names(index, 0)):
        with pytest.raises(ArgumentError, match="0xffffffff"):
            call(1 << 32)
        with pytest.raises(ArgumentError):
            call(-1)
        with pytest.raises(ArgumentTypeError):
            call("EFER")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError):
        msr_index(0x10)  # type: ignore[arg-type]


# Linux's msr-index.h, the Intel SDM volume 4 (table 2-2) and AMD's APM volume 2 (appendix A): an index, and the names
# from there on, one by one; "-" is one that has no name here.
TABLE = """
    0x0 IA32_P5_MC_ADDR IA32_P5_MC_TYPE
    0x10 IA32_TSC
    0x17 IA32_PLATFORM_ID
    0x1b IA32_APICBASE
    0x2a IA32_EBL_CR_POWERON - EBC_FREQUENCY_ID
    0x34 SMI_COUNT CORE_THREAD_COUNT
    0x3a IA32_FEAT_CTL IA32_TSC_ADJUST
    0x48 IA32_SPEC_CTRL IA32_PRED_CMD
    0x79 IA32_UCODE_WRITE
    0x8b IA32_UCODE_REV IA32_SGXLEPUBKEYHASH0 IA32_SGXLEPUBKEYHASH1 IA32_SGXLEPUBKEYHASH2 IA32_SGXLEPUBKEYHASH3
    0x9e IA32_SMBASE
    0xc1 IA32_PERFCTR0 IA32_PERFCTR1 IA32_PERFCTR2 IA32_PERFCTR3 IA32_PERFCTR4 IA32_PERFCTR5 IA32_PERFCTR6 IA32_PERFCTR7
    0xcd FSB_FREQ PLATFORM_INFO IA32_CORE_CAPS
    0xe1 IA32_UMWAIT_CONTROL
    0xe7 IA32_MPERF IA32_APERF
    0xfe MTRRcap
    0x10a IA32_ARCH_CAPABILITIES IA32_FLUSH_CMD
    0x122 IA32_TSX_CTRL IA32_MCU_OPT_CTRL
    0x140 MISC_FEATURES_ENABLES
    0x174 IA32_SYSENTER_CS IA32_SYSENTER_ESP IA32_SYSENTER_EIP
    0x179 IA32_MCG_CAP IA32_MCG_STATUS IA32_MCG_CTL
    0x186 P6_EVNTSEL0 P6_EVNTSEL1
    0x198 IA32_PERF_STATUS IA32_PERF_CTL IA32_THERM_CONTROL IA32_THERM_INTERRUPT IA32_THERM_STATUS
    0x1a0 IA32_MISC_ENABLE
    0x1b0 IA32_ENERGY_PERF_BIAS IA32_PACKAGE_THERM_STATUS IA32_PACKAGE_THERM_INTERRUPT
    0x1c4 IA32_XFD IA32_XFD_ERR
    0x1cc IA32_FRED_RSP0 IA32_FRED_RSP1 IA32_FRED_RSP2 IA32_FRED_RSP3 IA32_FRED_STKLVLS
    0x1d1 IA32_FRED_SSP1 IA32_FRED_SSP2 IA32_FRED_SSP3 IA32_FRED_CONFIG
    0x1d9 IA32_DEBUGCTLMSR - IA32_LASTBRANCHFROMIP IA32_LASTBRANCHTOIP IA32_LASTINTFROMIP IA32_LASTINTTOIP
    0x1fc IA32_POWER_CTL
    0x200 MTRRphysBase0 MTRRphysMask0 MTRRphysBase1
    0x250 MTRRfix64K_00000
    0x258 MTRRfix16K_80000 MTRRfix16K_A0000
    0x268 MTRRfix4K_C0000 MTRRfix4K_C8000 MTRRfix4K_D0000 MTRRfix4K_D8000
    0x26c MTRRfix4K_E0000 MTRRfix4K_E8000 MTRRfix4K_F0000 MTRRfix4K_F8000
    0x277 IA32_CR_PAT
    0x280 IA32_MC0_CTL2 IA32_MC1_CTL2
    0x2ff MTRRdefType
    0x309 CORE_PERF_FIXED_CTR0 CORE_PERF_FIXED_CTR1 CORE_PERF_FIXED_CTR2 CORE_PERF_FIXED_CTR3
    0x345 IA32_PERF_CAPABILITIES
    0x38d CORE_PERF_FIXED_CTR_CTRL CORE_PERF_GLOBAL_STATUS CORE_PERF_GLOBAL_CTRL CORE_PERF_GLOBAL_OVF_CTRL
    0x391 CORE_PERF_GLOBAL_STATUS_SET
    0x3f1 IA32_PEBS_ENABLE PEBS_DATA_CFG
    0x400 IA32_MC0_CTL IA32_MC0_STATUS IA32_MC0_ADDR IA32_MC0_MISC IA32_MC1_CTL IA32_MC1_STATUS
    0x480 IA32_VMX_BASIC IA32_VMX_PINBASED_CTLS IA32_VMX_PROCBASED_CTLS IA32_VMX_EXIT_CTLS IA32_VMX_ENTRY_CTLS
    0x485 IA32_VMX_MISC IA32_VMX_CR0_FIXED0 IA32_VMX_CR0_FIXED1 IA32_VMX_CR4_FIXED0 IA32_VMX_CR4_FIXED1
    0x48a IA32_VMX_VMCS_ENUM IA32_VMX_PROCBASED_CTLS2 IA32_VMX_EPT_VPID_CAP IA32_VMX_TRUE_PINBASED_CTLS
    0x48e IA32_VMX_TRUE_PROCBASED_CTLS IA32_VMX_TRUE_EXIT_CTLS IA32_VMX_TRUE_ENTRY_CTLS IA32_VMX_VMFUNC
    0x492 IA32_VMX_PROCBASED_CTLS3
    0x4c1 IA32_PMC0 IA32_PMC1
    0x4d0 IA32_MCG_EXT_CTL
    0x560 IA32_RTIT_OUTPUT_BASE IA32_RTIT_OUTPUT_MASK
    0x570 IA32_RTIT_CTL IA32_RTIT_STATUS IA32_RTIT_CR3_MATCH
    0x580 IA32_RTIT_ADDR0_A IA32_RTIT_ADDR0_B IA32_RTIT_ADDR1_A IA32_RTIT_ADDR1_B
    0x584 IA32_RTIT_ADDR2_A IA32_RTIT_ADDR2_B IA32_RTIT_ADDR3_A IA32_RTIT_ADDR3_B
    0x600 IA32_DS_AREA
    0x6a0 IA32_U_CET - IA32_S_CET - IA32_PL0_SSP IA32_PL1_SSP IA32_PL2_SSP IA32_PL3_SSP IA32_INT_SSP_TAB
    0x6e0 IA32_TSC_DEADLINE IA32_PKRS
    0xd90 IA32_BNDCFGS
    0xda0 IA32_XSS
    0x14ce ARCH_LBR_CTL ARCH_LBR_DEPTH
    0xc0000080 EFER STAR LSTAR CSTAR SYSCALL_MASK
    0xc0000100 FS_BASE GS_BASE KERNEL_GS_BASE TSC_AUX AMD64_TSC_RATIO
    0xc000010f AMD_DBG_EXTN_CFG
    0xc0000300 AMD64_PERF_CNTR_GLOBAL_STATUS AMD64_PERF_CNTR_GLOBAL_CTL AMD64_PERF_CNTR_GLOBAL_STATUS_CLR
    0xc0000303 AMD64_PERF_CNTR_GLOBAL_STATUS_SET
    0xc0010000 K7_EVNTSEL0 K7_EVNTSEL1 K7_EVNTSEL2 K7_EVNTSEL3 K7_PERFCTR0 K7_PERFCTR1 K7_PERFCTR2 K7_PERFCTR3
    0xc0010010 AMD64_SYSCFG
    0xc0010015 K7_HWCR
    0xc001001a K8_TOP_MEM1 - - K8_TOP_MEM2 - AMD64_NB_CFG AMD64_PATCH_LOADER
    0xc0010055 K8_INT_PENDING_MSG
    0xc0010114 VM_CR VM_IGNNE - VM_HSAVE_PA
    0xc001011f AMD64_VIRT_SPEC_CTRL
    0xc0010130 AMD64_SEV_ES_GHCB AMD64_SEV
    0xc0010140 AMD64_OSVW_ID_LENGTH AMD64_OSVW_STATUS
    0xc0010200 F15H_PERF_CTL0 F15H_PERF_CTR0 F15H_PERF_CTL1 F15H_PERF_CTR1
    0xc0011020 AMD64_LS_CFG F15H_IC_CFG AMD64_DC_CFG
    0xc0011029 AMD64_DE_CFG AMD64_BU_CFG2
"""
# Intel SDM volume 3, table 12-6: offsets of the x2APIC's registers from MSR 800H.
APIC = """
    0x802 APICID VERSION
    0x808 TPR - PPR EOI - LDR - SIVR
    0x810 ISR0 ISR1 ISR2 ISR3 ISR4 ISR5 ISR6 ISR7 TMR0 TMR1 TMR2 TMR3 TMR4 TMR5 TMR6 TMR7
    0x820 IRR0 IRR1 IRR2 IRR3 IRR4 IRR5 IRR6 IRR7 ESR
    0x82f LVT_CMCI ICR - LVT_TIMER LVT_THERMAL LVT_PMI LVT_LINT0 LVT_LINT1 LVT_ERROR INIT_COUNT CUR_COUNT
    0x83e DIV_CONF SELF_IPI
"""
# Hypervisor Top Level Functional Specification, appendix on synthetic MSRs.
HYPERV = """
    0x40000000 GUEST_OS_ID HYPERCALL VP_INDEX RESET
    0x40000010 VP_RUNTIME
    0x40000020 TIME_REF_COUNT REFERENCE_TSC TSC_FREQUENCY APIC_FREQUENCY
    0x40000070 EOI ICR TPR VP_ASSIST_PAGE
    0x40000080 SCONTROL SVERSION SIEFP SIMP EOM
    0x40000090 SINT0 SINT1 SINT2 SINT3 SINT4 SINT5 SINT6 SINT7 SINT8 SINT9 SINT10 SINT11 SINT12 SINT13 SINT14 SINT15
    0x400000b0 STIMER0_CONFIG STIMER0_COUNT STIMER1_CONFIG STIMER1_COUNT STIMER2_CONFIG STIMER2_COUNT
    0x400000b6 STIMER3_CONFIG STIMER3_COUNT
    0x400000f1 SYNDBG_CONTROL SYNDBG_STATUS SYNDBG_SEND_BUFFER SYNDBG_RECV_BUFFER SYNDBG_PENDING_BUFFER
    0x400000ff SYNDBG_OPTIONS CRASH_P0 CRASH_P1 CRASH_P2 CRASH_P3 CRASH_P4 CRASH_CTL
    0x40000106 REENLIGHTENMENT_CONTROL TSC_EMULATION_CONTROL TSC_EMULATION_STATUS
    0x40000118 TSC_INVARIANT_CONTROL
"""
# How many of a kind there are; their steps: test_rows_step_as_the_manual_has_them.
LASTS = {"IA32_PERFCTR": 8, "P6_EVNTSEL": 8, "IA32_PMC": 8, "MTRRphysBase": 10, "MTRRphysMask": 10, "IA32_MC": 32,
         "CORE_PERF_FIXED_CTR": 4, "K7_EVNTSEL": 4, "K7_PERFCTR": 4, "F15H_PERF_CTL": 6, "F15H_PERF_CTR": 6,
         "HV_X64_SINT": 16, "HV_X64_STIMER": 4, "X2APIC_ISR": 8, "X2APIC_TMR": 8, "X2APIC_IRR": 8}  # fmt: skip


@pytest.mark.parametrize(("table", "prefix"), [(TABLE, ""), (APIC, "X2APIC_"), (HYPERV, "HV_X64_")])
def test_indices_are_those_of_the_tables(table: str, prefix: str) -> None:
    for line in table.strip().splitlines():
        first, *names = line.split()
        for index, name in enumerate(names, int(first, 16)):
            assert Msr.__members__.get(prefix + name) == (None if name == "-" else index), name


def test_every_name_is_of_a_table_or_a_row_of_its_like() -> None:
    known = {prefix + name for table, prefix in ((TABLE, ""), (APIC, "X2APIC_"), (HYPERV, "HV_X64_"))
             for name in table.split()}  # fmt: skip
    for name in Msr.__members__:
        row = re.match(rf"({'|'.join(LASTS)})(\d+)(?:_|$)", name)
        assert name in known or name.startswith("KVM_") or row, name
        if row:
            assert int(row[2]) < LASTS[row[1]], name
    for row, count in LASTS.items():
        assert any(re.match(rf"{row}{count - 1}(?:_|$)", name) for name in Msr.__members__), row
    assert set(X2APIC_REGISTERS) == {index for index in map(int, Msr) if 0x800 <= index < 0x900}


def test_bits_of_msrs_are_those_of_the_manual() -> None:
    # Intel SDM volume 4, table 2-2, IA32_SPEC_CTRL, IA32_MISC_ENABLE, IA32_MTRR_DEF_TYPE.
    for index, bits in (
        (0x48, {"IBRS": 0, "STIBP": 1, "SSBD": 2, "IPRED_DIS_U": 3, "IPRED_DIS_S": 4, "RRSBA_DIS_U": 5,
                "RRSBA_DIS_S": 6, "PSFD": 7, "BHI_DIS_S": 10}),
        (0x1A0, {"FAST_STRING": 0, "TCC": 3, "EMON": 7, "BTS_UNAVAIL": 11, "PEBS_UNAVAIL": 12,
                 "ENHANCED_SPEEDSTEP": 16, "MWAIT": 18, "LIMIT_CPUID": 22, "XTPR_DISABLE": 23, "XD_DISABLE": 34}),
        (0x2FF, {"FE": 10, "E": 11}),
    ):  # fmt: skip
        for name, bit in bits.items():
            assert bit_names(index, 1 << bit)[0].endswith(f".{name}")
        members = MSR_BITS[index].__members__
        assert set(members) - {"TYPE"} == bits.keys()
    assert bit_names(0x2FF, 1 << 8 | 0xFF) == (
        *[f"MTRR_DEF_TYPE.TYPE[{bit}]" for bit in range(8)],
        "MTRR_DEF_TYPE bit 8",
    )


def test_an_index_has_32_bits() -> None:
    assert msr_name(0xFFFFFFFF) == "MSR 0xffffffff"
    assert bit_names(0xFFFFFFFF, 1) == ()
