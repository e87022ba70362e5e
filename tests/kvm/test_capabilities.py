"""The capability numbers against the kernel: its header, our own header, and what KVM_CHECK_EXTENSION answers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hvmodel._ffi import IOCTLS, lib
from hvmodel.errors import KvmError, UnsupportedError
from hvmodel.kvm import Cap, Kvm, Vm
from tests.need import need

HEADER = Path("/usr/include/linux/kvm.h")
OURS = Path(__file__).parents[2] / "native" / "kvm_uapi.h"

# By their names' first word, capabilities that no x86 kernel has.
FOREIGN = ("ARM", "LOONGARCH", "MIPS", "PPC", "RISCV", "S390", "SPAPR", "SW", "IRQ_MPIC", "IRQ_XICS", "XICS")


def defined(path: Path) -> dict[str, int]:
    return {name: int(value, 0) for name, value in re.findall(r"#define KVM_CAP_(\w+)\s+(\w+)", path.read_text())}


def test_the_numbers_are_those_of_the_kernel_s_header(capsys: pytest.CaptureFixture[str]) -> None:
    need("kvm-header")
    theirs = defined(HEADER)
    ours = {name: int(cap) for name, cap in Cap.__members__.items()}
    common = theirs.keys() & ours.keys()
    assert {name: ours[name] for name in common} == {name: theirs[name] for name in common}
    assert len(common) > 200
    with capsys.disabled():
        print(f"\ncapabilities: {len(ours)}, of which {len(common)} in {HEADER}", end="")


def test_the_numbers_are_those_of_our_own_header() -> None:
    assert {name: int(cap) for name, cap in Cap.__members__.items()} == defined(OURS)
    assert all(getattr(lib, f"KVM_CAP_{name}") == cap for name, cap in Cap.__members__.items())


def test_numbers_are_given_once() -> None:
    assert len(set(Cap)) == len(Cap.__members__) == len(Cap)


def test_the_table_names_capabilities_that_exist() -> None:
    for row in IOCTLS.values():
        assert row.capability is None or row.capability.removeprefix("KVM_CAP_") in Cap.__members__


def test_the_kernel_answers_every_number(kvm: Kvm, vm: Vm) -> None:
    # A number off by one would show as a capability of another architecture, or as a missing one of every x86.
    system = {cap: kvm.check_extension(cap) for cap in Cap}
    machine = {cap: vm.check_extension(cap) for cap in Cap}
    for cap in Cap:
        if cap.name.startswith(FOREIGN):
            assert (system[cap], machine[cap]) == (0, 0), cap
    for cap in (
        Cap.HLT,
        Cap.USER_MEMORY,
        Cap.SET_TSS_ADDR,
        Cap.EXT_CPUID,
        Cap.NR_VCPUS,
        Cap.MP_STATE,
        Cap.COALESCED_MMIO,
        Cap.SET_GUEST_DEBUG,
        Cap.VCPU_EVENTS,
        Cap.DEBUGREGS,
        Cap.ENABLE_CAP,
        Cap.MAX_VCPUS,
        Cap.ENABLE_CAP_VM,
        Cap.CHECK_EXTENSION_VM,
        Cap.IMMEDIATE_EXIT,
        Cap.GET_MSR_FEATURES,
        Cap.MANUAL_DIRTY_LOG_PROTECT2,
        Cap.SYNC_REGS,
    ):
        assert system[cap] > 0, cap
    assert system[Cap.NR_VCPUS] <= system[Cap.MAX_VCPUS] <= system[Cap.MAX_VCPU_ID]


def test_enabling_what_the_kernel_does_not_have_is_refused_even_where_it_would_not_mind(vm: Vm) -> None:
    absent = [cap for cap in Cap if vm.check_extension(cap) == 0]
    for cap in absent:
        with pytest.raises(UnsupportedError) as refused:
            vm.enable_cap(cap)
        assert (refused.value.call, refused.value.value) == ("KVM_ENABLE_CAP", cap)
    with vm.create_vcpu(0) as vcpu, pytest.raises(UnsupportedError):
        vcpu.enable_cap(absent[0])


def test_a_refused_capability_names_what_is_at_fault(vm: Vm) -> None:
    if vm.check_extension(Cap.SPLIT_IRQCHIP):
        with pytest.raises(KvmError) as refused:
            vm.enable_cap(Cap.SPLIT_IRQCHIP, 100_000)
        assert (refused.value.field, refused.value.value) == ("args", (100_000,))
    with pytest.raises(KvmError) as refused:
        vm.enable_cap(Cap.USER_MEMORY)  # nothing to enable
    assert refused.value.field == "cap"
    with pytest.raises(KvmError) as refused:
        vm.enable_cap(Cap.X86_USER_SPACE_MSR, flags=1)
    assert refused.value.field == "flags"
