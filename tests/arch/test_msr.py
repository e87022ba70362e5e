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
