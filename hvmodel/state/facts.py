"""What a refusal depends on beside the value: the guest's CPUID, the capabilities that are on, the vendor module.

`Facts` are plain numbers, so that hvmodel.state.rules can be asked about any host.  `facts_of` asks a vCPU for its own,
by get ioctls only; none of them changes it.  `decode` makes of a part's bytes what the rules look at.
"""

from __future__ import annotations

from functools import cache
from struct import iter_unpack, unpack_from

from .._ffi import ffi, lib
from ..arch.cpuid import has_feature
from ..arch.legal import SregsLimits
from ..value import Value
from .values import DebugRegs, Fpu, Lapic, MpState, Regs, Sregs, Sregs2, VcpuEvents, Xcrs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..kvm import CpuidEntry, Kvm, Vcpu
    from .record import Record

    Leaves = tuple[tuple[int, int, int, int, int, int, int], ...]

__all__ = ["RECORDS", "XSAVE", "Facts", "decode", "facts_of"]

RECORDS: dict[str, type[Record]] = {
    "regs": Regs,
    "sregs": Sregs,
    "sregs2": Sregs2,
    "fpu": Fpu,
    "xcrs": Xcrs,
    "debugregs": DebugRegs,
    "events": VcpuEvents,
    "mp_state": MpState,
    "lapic": Lapic,
}

# Offsets in the XSAVE area (Intel SDM volume 1, 13.4): the legacy region, the header, the components behind it.
XSAVE = {"mxcsr": 24, "mxcsr_mask": 28, "xstate_bv": 512, "xcomp_bv": 520, "reserved": 528, "end": 576}

_PAYLOAD, _TRIPLE_FAULT = 0x10, 0x20  # KVM_VCPUEVENT_VALID_*: KVM shows them where the capability is on
_EXTD = 0x400  # of the APIC base
_MXCSR_MASK = 0xFFBF  # of a processor that says 0 (Intel SDM volume 1, 11.6.6)


class Facts(Value):
    """What the answer depends on; the defaults are those of a bare vCPU of an unknown vendor.

    `vendor`: "kvm_intel", "kvm_amd", …  `cpuid`: the guest's leaves (function, index, flags, eax, ebx, ecx, edx);
    `host_cpuid`: those that KVM supports, () where not known.  `xcr0`: the components that this KVM can give a guest.
    `mxcsr_mask`: the bits that MXCSR has.  `lapic`: an in-kernel APIC; `x2apic`: it is in x2APIC mode; `apic_id`: the
    vCPU's.  `payload`, `triple_fault`: KVM_CAP_EXCEPTION_PAYLOAD and KVM_CAP_X86_TRIPLE_FAULT_EVENT are switched on.
    `smm`: KVM_CAP_X86_SMM.  `host_khz`: 0 where the TSC can be scaled.  `unreadable`: the MSRs that KVM does not let
    read.  `la57`: the host has 57 bits of linear address.  `limits`: of the special registers.
    """

    vendor: str = ""
    cpuid: Leaves = ()
    host_cpuid: Leaves = ()
    xcr0: int = 3
    mxcsr_mask: int = _MXCSR_MASK
    lapic: bool = False
    x2apic: bool = False
    apic_id: int = 0
    payload: bool = False
    triple_fault: bool = False
    smm: bool = False
    host_khz: int = 0
    unreadable: frozenset[int] = frozenset()
    la57: bool = False
    limits: SregsLimits = SregsLimits()  # a frozen value

    @property
    def guest_xcr0(self) -> int:
        """The components that XCR0 may have: leaf 0xD, of those that KVM knows; x87 always."""
        for function, index, _, eax, _, _, edx in self.cpuid:
            if (function, index) == (0xD, 0):
                return (eax | edx << 32) & self.xcr0 | 1
        return 1


def facts_of(vcpu: Vcpu, part: str, value: Any, cpuid: Leaves | None = None) -> Facts:
    """The facts of this vCPU as far as the rules of `part` ask for them; `value` is the decoded one.

    `cpuid`: leaves to be taken instead of the vCPU's.

    HvError: the vCPU is closed, or of another process.
    """
    from ..kvm.system import vendor_module

    found: dict[str, Any] = {"vendor": vendor_module() or "", "apic_id": vcpu.id}
    check = vcpu.vm.check_extension
    if part in ("sregs", "sregs2", "msrs", "cpuid", "xcrs"):
        found["cpuid"] = _leaves(vcpu.get_cpuid2()) if cpuid is None else cpuid
    if part in ("xcrs", "xsave"):
        found["xcr0"] = _supported_xcr0(vcpu.vm.kvm)
    if part == "xsave":
        area = bytes(ffi.buffer(vcpu.xsave))
        found["mxcsr_mask"] = unpack_from("<I", area, XSAVE["mxcsr_mask"])[0] or _MXCSR_MASK
    if part in ("lapic", "mp_state", "msrs"):
        found["lapic"] = lib.kvm_get_lapic(vcpu._settled(), ffi.new("struct kvm_lapic_state *")) == 0
    if part == "lapic" and found["lapic"]:
        found["x2apic"] = bool(vcpu.sregs.apic_base & _EXTD)
    if part == "events":
        flags = vcpu.vcpu_events.flags
        found |= {"payload": bool(flags & _PAYLOAD), "triple_fault": bool(flags & _TRIPLE_FAULT)}
        found["smm"] = check(lib.KVM_CAP_X86_SMM) > 0
    if part == "tsc_khz" and check(lib.KVM_CAP_TSC_CONTROL) <= 0:
        found["host_khz"] = _host_khz(vcpu)
    if part in ("sregs", "sregs2"):
        found["limits"] = _sregs_limits(vcpu, found["vendor"], found["cpuid"])
    if part == "msrs":
        found["host_cpuid"] = _host_cpuid(vcpu.vm.kvm)
        found["la57"] = has_feature(found["host_cpuid"], "LA57")
        found["unreadable"] = frozenset(index for index in value if not _is_readable(vcpu, index))
    return Facts(**found)


def _supported_xcr0(kvm: Kvm) -> int:
    found = _xcomp_attribute(kvm)
    return Facts(cpuid=_host_cpuid(kvm), xcr0=(1 << 64) - 1).guest_xcr0 if found is None else found


def _xcomp_attribute(kvm: Kvm) -> int | None:
    # KVM_X86_XCOMP_GUEST_SUPP of /dev/kvm; None before Linux 5.17.
    bits = ffi.new("uint64_t *")
    attr = ffi.new("struct kvm_device_attr *", {"attr": lib.KVM_X86_XCOMP_GUEST_SUPP})
    attr.addr = int(ffi.cast("uintptr_t", bits))
    return int(bits[0]) if lib.kvm_get_device_attr(kvm.fd, attr) == 0 else None


def _leaves(rows: list[CpuidEntry]) -> Leaves:
    return tuple([(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in rows])


def _host_cpuid(kvm: Kvm) -> Leaves:
    # Asked once, for it takes 0.3 ms.  The APIC ids in it, which differ from call to call, are of no interest here.
    if not _host:
        _host.append(_leaves(kvm.supported_cpuid()))
    return _host[0]


_host: list[Leaves] = []


@cache
def _processor() -> tuple[str, ...]:
    # The flags of /proc/cpuinfo, which kvm_pvm goes by.
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("flags"):
                return tuple(line.partition(":")[2].split())
    return ()


@cache
def _unrestricted() -> bool:
    try:
        with open("/sys/module/kvm_intel/parameters/unrestricted_guest") as file:
            return file.read(1) in ("Y", "1")
    except OSError:
        return True


def _sregs_limits(vcpu: Vcpu, vendor: str, cpuid: Leaves) -> SregsLimits:
    return SregsLimits.of(
        cpuid,
        _host_cpuid(vcpu.vm.kvm),
        vendor=vendor,
        processor=_processor(),
        unrestricted=_unrestricted(),
        apic_base=vcpu.sregs.apic_base,
    )


def _host_khz(vcpu: Vcpu) -> int:
    # A new vCPU has the host's.
    with vcpu.vm.kvm.create_vm() as vm, vm.create_vcpu() as fresh:
        return fresh.tsc_khz


def _is_readable(vcpu: Vcpu, index: int) -> bool:
    table = ffi.new("struct kvm_msrs *", {"nmsrs": 1, "entries": 1})
    table.entries[0].index = index
    return lib.kvm_get_msrs(vcpu._settled(), table) == 1


def decode(part: str, data: bytes) -> Any:
    """What the rules look at: a Record; of msrs a dict index -> value; of cpuid a tuple of leaves (function, index,
    flags, eax, ebx, ecx, edx); of tsc_khz an int; of xsave and nested_state the bytes."""
    record = RECORDS.get(part)
    if record is not None:
        return record.from_bytes(data)
    if part == "msrs":
        (nr,) = unpack_from("<I", data)
        return {index: value for index, _, value in iter_unpack("<IIQ", data[8 : 8 + 16 * nr])}
    if part == "cpuid":
        (nr,) = unpack_from("<I", data)
        return tuple([row[:7] for row in iter_unpack("<10I", data[8 : 8 + 40 * nr])])
    return int.from_bytes(data, "little") if part == "tsc_khz" else data
