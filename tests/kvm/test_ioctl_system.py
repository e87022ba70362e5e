"""Every ioctl of the /dev/kvm fd, for its effect or against a second source."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from hvmodel._ffi import ffi, lib
from hvmodel.errors import ArgumentError, KvmError
from hvmodel.kvm import CpuidEntry, Kvm, Vcpu
from tests.kvm.rows import exercises, scope_of

CPUINFO = Path("/proc/cpuinfo")


def cpuinfo(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo."""
    found = re.search(rf"^{field}\s*: (.*)$", CPUINFO.read_text(), re.M)
    assert found is not None
    return found[1]


def leaf(entries: list[CpuidEntry], function: int, index: int = 0) -> CpuidEntry | None:
    return next((e for e in entries if (e.function, e.index) == (function, index)), None)


@exercises("KVM_GET_API_VERSION")
def test_api_version_is_the_one_since_2_6_22(kvm: Kvm) -> None:
    assert kvm.api_version == 12
    assert kvm.ioctl("KVM_GET_API_VERSION") == 12


@exercises("KVM_CREATE_VM")
def test_create_vm_makes_a_vm_fd(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        assert os.readlink(f"/proc/self/fd/{vm.fd}") == "anon_inode:kvm-vm"
    raw = kvm.ioctl("KVM_CREATE_VM", 0)
    try:
        assert scope_of(raw) == "vm"
    finally:
        os.close(raw)


@exercises("KVM_GET_MSR_INDEX_LIST")
def test_the_listed_msrs_are_those_that_a_vcpu_can_be_asked_for(kvm: Kvm, vcpu: Vcpu) -> None:
    indices = kvm.msr_index_list()
    assert len(set(indices)) == len(indices)
    assert {0x10, 0x174, 0xC0000081} <= set(indices)  # TSC, SYSENTER_CS, STAR
    assert vcpu.get_msrs(indices).keys() == set(indices)


@exercises("KVM_CHECK_EXTENSION", on="system")
def test_capabilities_that_are_numbers_agree_with_the_host(kvm: Kvm) -> None:
    assert kvm.check_extension(lib.KVM_CAP_NR_VCPUS) == min(
        os.sysconf("SC_NPROCESSORS_ONLN"), kvm.check_extension(lib.KVM_CAP_MAX_VCPUS)
    )
    assert kvm.check_extension(lib.KVM_CAP_USER_MEMORY) == 1
    assert kvm.check_extension((1 << 32) - 1) == 0
    with kvm.create_vm() as vm:
        limit = kvm.check_extension(lib.KVM_CAP_MAX_VCPU_ID)
        vm.create_vcpu(limit - 1).close()
        with pytest.raises(KvmError, match=f"0 to {limit - 1}"):
            vm.create_vcpu(limit)


@exercises("KVM_GET_VCPU_MMAP_SIZE")
def test_vcpu_mmap_size_holds_kvm_run_and_its_pages(kvm: Kvm) -> None:
    size = kvm.vcpu_mmap_size
    page = os.sysconf("SC_PAGE_SIZE")
    assert size % page == 0
    assert size >= ffi.sizeof("struct kvm_run")
    coalesced = kvm.check_extension(lib.KVM_CAP_COALESCED_MMIO)  # the page that the ring is in
    assert size >= (coalesced + 1) * page


@exercises("KVM_GET_SUPPORTED_CPUID")
def test_supported_cpuid_is_this_processor_s(kvm: Kvm) -> None:
    entries = kvm.supported_cpuid()
    first = leaf(entries, 0)
    assert first is not None
    vendor = b"".join(register.to_bytes(4, "little") for register in (first.ebx, first.edx, first.ecx))
    assert vendor.decode() == cpuinfo("vendor_id")
    kvm_leaf = leaf(entries, 0x40000000)
    assert kvm_leaf is not None
    signature = b"".join(r.to_bytes(4, "little") for r in (kvm_leaf.ebx, kvm_leaf.ecx, kvm_leaf.edx))
    assert signature == b"KVMKVMKVM\0\0\0"


@exercises("KVM_GET_EMULATED_CPUID", cap="EXT_EMUL_CPUID")
def test_emulated_cpuid_has_movbe(kvm: Kvm) -> None:
    # Whatever the processor has, KVM's emulator knows MOVBE (linux:arch/x86/kvm/cpuid.c __do_cpuid_func_emulated).
    entry = leaf(kvm.emulated_cpuid(), 1)
    assert entry is not None
    assert entry.ecx >> 22 & 1


@exercises("KVM_GET_MSR_FEATURE_INDEX_LIST", cap="GET_MSR_FEATURES")
@exercises("KVM_GET_MSRS", on="system", cap="GET_MSR_FEATURES")
def test_feature_msrs_hold_the_microcode_revision_of_proc_cpuinfo(kvm: Kvm) -> None:
    values = kvm.get_feature_msrs(kvm.msr_feature_index_list())
    assert values
    if 0x8B in values:
        revision = int(cpuinfo("microcode"), 16)
        assert revision in (values[0x8B], values[0x8B] >> 32)  # AMD keeps it in the lower half, Intel in the upper


@exercises("KVM_X86_GET_MCE_CAP_SUPPORTED", cap="MCE")
def test_supported_mce_capabilities(kvm: Kvm) -> None:
    value = ffi.new("uint64_t *")
    kvm.ioctl("KVM_X86_GET_MCE_CAP_SUPPORTED", value)
    assert value[0] >> 8 & 1  # MCG_CTL_P
    assert value[0] >> 24 & 1  # MCG_SER_P
    with pytest.raises(ArgumentError):
        kvm.ioctl("KVM_X86_SET_MCE", ffi.new("struct kvm_x86_mce *"))


@exercises("KVM_GET_SUPPORTED_HV_CPUID", on="system", cap="SYS_HYPERV_CPUID")
def test_hyperv_cpuid_of_the_system(kvm: Kvm) -> None:
    table = ffi.new("struct kvm_cpuid2 *", {"nent": 64, "entries": 64})
    kvm.ioctl("KVM_GET_SUPPORTED_HV_CPUID", table)
    functions = {table.entries[at].function for at in range(table.nent)}
    assert {0x40000000, 0x40000001, 0x40000003} <= functions


@exercises("KVM_HAS_DEVICE_ATTR", "KVM_GET_DEVICE_ATTR", on="system", cap="SYS_ATTRIBUTES")
def test_xcomp_guest_supp_covers_what_cpuid_lists(kvm: Kvm) -> None:
    mask = ffi.new("uint64_t *")
    attr = ffi.new(
        "struct kvm_device_attr *",
        {"attr": lib.KVM_X86_XCOMP_GUEST_SUPP, "addr": int(ffi.cast("uintptr_t", mask))},
    )
    kvm.ioctl("KVM_HAS_DEVICE_ATTR", attr)
    kvm.ioctl("KVM_GET_DEVICE_ATTR", attr)
    entry = leaf(kvm.supported_cpuid(), 0xD)
    listed = entry.eax | entry.edx << 32 if entry is not None else 0
    assert listed & ~mask[0] == 0  # components that need a permission (AMX) are supported but not listed
