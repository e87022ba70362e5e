"""native/kvm_uapi.h against the running kernel's BTF, and every cffi type of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hvmodel._ffi import ffi
from hvmodel.errors import HvError
from hvmodel.witness.abi import compare_abi, layout, nested, our_types
from hvmodel.witness.btf import Btf
from tests.need import need

HEADER = Path(__file__).parents[2] / "native" / "kvm_uapi.h"

# What a kernel's BTF need not have, and why.  Everything else in our header must be there.
NOT_IN_BTF = {
    "a request that the kernel has forgotten": {"kvm_memory_region"},
    "CONFIG_KVM_HYPERV": {"kvm_hyperv_eventfd"},
    "CONFIG_KVM_XEN": {"kvm_xen_hvm_attr", "kvm_xen_hvm_config", "kvm_xen_vcpu_attr"},
    "CONFIG_KVM_GENERIC_MEMORY_ATTRIBUTES": {"kvm_memory_attributes"},
    "CONFIG_KVM_AMD_SEV": {
        "kvm_sev_attestation_report",
        "kvm_sev_cmd",
        "kvm_sev_dbg",
        "kvm_sev_guest_status",
        "kvm_sev_init",
        "kvm_sev_launch_measure",
        "kvm_sev_launch_secret",
        "kvm_sev_launch_start",
        "kvm_sev_launch_update_data",
        "kvm_sev_receive_start",
        "kvm_sev_receive_update_data",
        "kvm_sev_send_start",
        "kvm_sev_send_update_data",
        "kvm_sev_snp_launch_finish",
        "kvm_sev_snp_launch_start",
        "kvm_sev_snp_launch_update",
    },
    "CONFIG_KVM_INTEL_TDX": {
        "kvm_tdx_capabilities",
        "kvm_tdx_cmd",
        "kvm_tdx_init_mem_region",
        "kvm_tdx_init_vm",
    },
    "compiled out of the kernel's own build": {"kvm_run.hypercall.longmode", "kvm_run.system_event.flags"},
    "Linux after 6.1": {
        "kvm_create_guest_memfd",
        "kvm_pre_fault_memory",
        "kvm_userspace_memory_region2",
        "kvm_run.iocsr_io",
        "kvm_run.hypercall.flags",
        "kvm_run.memory_fault",
        "kvm_run.tdx",
    },
}


@pytest.fixture(scope="module")
def kernel() -> Btf:
    need("btf")
    return Btf.for_module("kvm")


def test_every_struct_lies_as_in_the_running_kernel(kernel: Btf, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare_abi(kernel)
    reasons = {name: reason for reason, names in NOT_IN_BTF.items() for name in names}
    with capsys.disabled():
        print(f"\nABI: {found.structs} structs, {found.fields} fields equal {kernel.source}'s", end="")
        for reason in NOT_IN_BTF:
            names = [name for name in found.missing if reasons.get(name) == reason]
            if names:
                print(f"\nABI: not there ({reason}): {', '.join(names)}", end="")
    assert found.mismatches == ()
    unexplained = [name for name in found.missing if not any(name == r or name.startswith(f"{r}.") for r in reasons)]
    assert unexplained == []
    assert found.structs >= 70


def test_the_kernel_has_no_field_that_we_lack(kernel: Btf) -> None:
    # The vendor's part of the nested state is bytes in our header, for either vendor.
    newer = [name for name in compare_abi(kernel).newer if not name.startswith("kvm_nested_state.data")]
    if newer:
        pytest.skip(f"this kernel is newer than our header: {', '.join(newer)}")


def test_constants_equal_the_kernels_enumerators(kernel: Btf) -> None:
    ours = dict(re.findall(r"^#define\s+(\w+)\s+(\w+)$", HEADER.read_text(), re.M))
    theirs = kernel.enumerators()
    both = ours.keys() & theirs.keys()
    assert {name: int(ours[name], 0) for name in both} == {name: theirs[name] for name in both}
    assert "KVM_DEV_TYPE_VFIO" in both


def test_a_lie_is_found(kernel: Btf, monkeypatch: pytest.MonkeyPatch) -> None:
    import cffi

    liar = cffi.FFI()
    liar.cdef(
        """
        struct kvm_dtable { uint64_t base; uint32_t limit; uint16_t padding[2]; };
        struct kvm_mp_state { uint32_t mp_state; uint32_t more; };
        struct kvm_regs { uint64_t rbx; };
        """
    )
    names = ("kvm_dtable", "kvm_mp_state", "kvm_regs")
    lies = {name: liar.typeof(f"struct {name}") for name in names}
    monkeypatch.setattr("hvmodel.witness.abi.our_types", lambda: lies)
    monkeypatch.setattr("hvmodel._ffi.ffi", liar)
    found = compare_abi(kernel)
    assert found.mismatches == (
        "kvm_dtable.limit: ours at 8, size 4; the kernel's at 8, size 2",
        "kvm_dtable.padding: ours at 12, size 4; the kernel's at 10, size 6",
        "kvm_mp_state: our size is 8, the kernel's 4",
        "kvm_regs.rbx: ours at 0, size 8; the kernel's at 8, size 8",
        "kvm_regs: our size is 8, the kernel's 144",
    )
    assert found.missing == ("kvm_mp_state.more",)
    assert "kvm_regs.rax" in found.newer


OPAQUE = ("struct hv_uffd",)  # of which Python has pointers only; cffi must not be asked for their fields


def test_every_cffi_type_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    # cffi compares its layout with the compiler's at the first use of a type: so use each.
    typedefs, structs, unions = ffi.list_types()
    types = [*typedefs, *(f"struct {name}" for name in structs), *(f"union {name}" for name in unions)]
    fields = 0
    for cname in types:
        ctype = ffi.typeof(cname)
        if cname in OPAQUE:
            with pytest.raises((TypeError, ffi.error), match="size"):
                ffi.sizeof(ctype)
        elif ctype.kind in ("struct", "union") and ctype.fields is not None:
            ffi.new(f"{cname} *")
            fields += len(list(layout(ctype)))
    with capsys.disabled():
        print(f"\ncffi: {len(types)} types, {fields} fields", end="")
    assert len(our_types()) >= 160


def test_layout_of_bits_and_arrays() -> None:
    # struct kvm_ioapic_state: 24 bytes, then 24 entries of 8; an entry is vector (8 bits), then fields of 3, 1, 1, ...
    found = {path: (start, size) for path, start, size in layout(ffi.typeof("struct kvm_ioapic_state"))}
    entry = 24 * 8
    assert found["redirtbl"] == (entry, 24 * 64)
    assert found["redirtbl[0].fields.delivery_mode"] == (entry + 8, 3)
    assert found["redirtbl[0].fields.mask"] == (entry + 8 + 3 + 5, 1)  # dest_mode to trig_mode are five bits
    assert found["redirtbl[0].fields.dest_id"] == (entry + 56, 8)
    # members without a name leave no trace in the path
    assert dict.fromkeys(path for path, *_ in layout(ffi.typeof("struct kvm_irq_level"))).keys() == {
        "irq",
        "status",
        "level",
    }


def test_nested_names() -> None:
    assert set(nested(ffi.typeof("struct kvm_irqchip"))) == {
        "kvm_irqchip_chip",
        "kvm_pic_state",
        "kvm_ioapic_state",
        "kvm_ioapic_state_redirtbl",
        "kvm_ioapic_state_redirtbl_fields",
    }


def test_tags_of_ours_are_none_of_the_kernels(kernel: Btf) -> None:
    # A tag that we gave to a nested struct must not be a kernel type of another layout: compare_abi would compare them.
    assert compare_abi(kernel).mismatches == ()
    known = [name for name in our_types() if name in kernel]
    assert "kvm_run_io" not in known
    assert "kvm_vcpu_events_exception" not in known


def test_errors_are_ours() -> None:
    with pytest.raises(HvError):
        Btf(b"")
