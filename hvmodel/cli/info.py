"""What KVM is on this host, and what that means: asked of the kernel, not taken from its name.

    /sys/module          the vendor module and its parameters (ept, npt, nested, ...)
    KVM_CHECK_EXTENSION  capabilities and limits
    a probe              64 nops and one exit, in three modes of a throw-away VM: KVM's statistics tell how many
                         instructions it emulated, which says whether that mode runs on the processor

All but the vendor module needs /dev/kvm.  Where it cannot be opened, that is the finding.
"""

from __future__ import annotations

import json
import os
import platform

from .. import __version__
from ..errors import BuildError, HvError
from ..units import MiB
from .status import NO_KVM, OK
from .terminal import line, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..kvm import Kvm

__all__ = ["MODES", "gather", "show"]

_PARAMETERS = "/sys/module/{module}/parameters/{name}"

# Of each vendor module: the parameters that matter, and what they mean when they are on and when off.
_SHADOW = "KVM shadows the guest's page tables, and their changes cost exits"
_VENDORS = {
    "kvm_intel": (
        ("ept", "EPT: the processor walks the guest's page tables", f"no EPT: {_SHADOW}; load kvm_intel with ept=1"),
        (
            "unrestricted_guest",
            "real mode runs on the processor",
            "real mode is partly emulated; load kvm_intel with unrestricted_guest=1",
        ),
        ("nested", "guests can run guests", "guests cannot run guests; load kvm_intel with nested=1"),
    ),
    "kvm_amd": (
        ("npt", "NPT: the processor walks the guest's page tables", f"no NPT: {_SHADOW}; load kvm_amd with npt=1"),
        ("nested", "guests can run guests", "guests cannot run guests; load kvm_amd with nested=1"),
    ),
}
_KINDS = {
    "kvm_intel": "hardware virtualization by VMX",
    "kvm_amd": "hardware virtualization by SVM",
    "kvm_pvm": "software virtualization, without VMX or SVM",
}

# Capabilities whose absence people meet, and what to do.
_NO = {
    "IMMEDIATE_EXIT": "needs Linux 4.13: without it a kick can be lost",
    "SYNC_REGS": "needs Linux 4.17: registers at an exit then cost an ioctl",
    "BINARY_STATS_FD": "needs Linux 5.14; debugfs has the same counters",
    "DIRTY_LOG_RING": "needs Linux 5.11; use the dirty log",
    "SREGS2": "needs Linux 5.14; sregs is there",
    "XSAVE2": "needs Linux 5.17; xsave is there",
    "X86_USER_SPACE_MSR": "needs Linux 5.10",
    "X86_MSR_FILTER": "needs Linux 5.10",
    "USER_MEMORY2": "needs Linux 6.8; KVM_SET_USER_MEMORY_REGION is there",
    "GUEST_MEMFD": "needs Linux 6.8",
    "MEMORY_FAULT_INFO": "needs Linux 6.8",
    "MEMORY_ATTRIBUTES": "needs Linux 6.8 and a VM type with private memory",
    "PRE_FAULT_MEMORY": "needs Linux 6.11 and two-dimensional paging (EPT or NPT)",
    "NESTED_STATE": "guests cannot run guests: load the vendor module with nested=1, where it has that parameter",
    "X86_SMM": "needs a kernel with CONFIG_KVM_SMM and a vendor module that does it",
    "TSC_CONTROL": "the guest's TSC runs at the host's frequency: the processor cannot scale it",
    "X86_BUS_LOCK_EXIT": "needs a processor that detects bus locks",
    "X86_NOTIFY_VMEXIT": "needs a processor with notify VM exit",
    "PMU_CAPABILITY": "no virtual PMU: load kvm with enable_pmu=1, where the host has a PMU of its own",
}
# Of other architectures; all share one number space.
# By prefix, for those without a line above.
_NO_FAMILY = (
    ("HYPERV", "needs a kernel with CONFIG_KVM_HYPERV and a vendor module that does it"),
    ("SYS_HYPERV", "needs a kernel with CONFIG_KVM_HYPERV and a vendor module that does it"),
    ("XEN", "needs a kernel with CONFIG_KVM_XEN"),
    ("SGX", "needs a processor and a kernel with SGX"),
    ("IOMMU", "gone from Linux: assign devices with VFIO"),
    ("ASSIGN_DEV", "gone from Linux: assign devices with VFIO"),
    ("PCI_2_3", "gone from Linux: assign devices with VFIO"),
    ("PV_MMU", "gone from Linux"),
    ("MANUAL_DIRTY_LOG_PROTECT", "gone from Linux: MANUAL_DIRTY_LOG_PROTECT2"),
    ("MULTI_ADDRESS_SPACE", "comes with X86_SMM"),
    ("VM_TSC_CONTROL", "as TSC_CONTROL"),
    ("", "not in this kernel, or not with this vendor module"),
)
# Of other architectures; all share one number space.
_ELSEWHERE = (
    "ARM_", "COUNTER_OFFSET", "GUEST_DEBUG_HW", "IRQ_MPIC", "IRQ_XICS", "MIPS_", "MSI_DEVID", "ONE_REG",
    "PPC_", "RISCV_", "S390_", "SPAPR_", "SW_TLB",
)  # fmt: skip
_LIMITS = {
    "NR_VCPUS": "vCPUs per VM, recommended",
    "MAX_VCPUS": "vCPUs per VM, at most",
    "MAX_VCPU_ID": "vCPU ids, from 0",
    "NR_MEMSLOTS": "memory slots per VM",
}

MODES = ("real mode", "long mode, CPL0", "long mode, CPL3")
"""The modes that are probed."""

_NR_NOPS = 64
_HOLE = 0x200000  # mapped by the probe's page tables, in no memslot


def gather() -> dict[str, Any]:
    """All that `hvmodel info` tells, as an object for json.dumps; its keys are in docs/cli.md."""
    found: dict[str, Any] = {
        "version": __version__,
        "python": platform.python_version(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "device": "/dev/kvm",
        "usable": False,
        "problem": None,
        "module": None,
        "parameters": {},
        "meaning": [],
        "api_version": None,
        "limits": {},
        "emulated": {},
        "capabilities": {},
        "advice": {},
    }
    try:
        from ..kvm import Kvm, vendor_module
    except BuildError as error:
        found["problem"] = str(error)
        return found
    found["module"] = module = vendor_module()
    found["parameters"] = _parameters(module)
    found["meaning"] = _meaning(module, found["parameters"])
    try:
        kvm = Kvm()
    except HvError as error:
        found["problem"] = str(error)
        return found
    with kvm:
        found["usable"] = True
        found["api_version"] = kvm.api_version
        _ask(kvm, found)
    return found


def _parameters(module: str | None) -> dict[str, str]:
    found = {}
    for name, _, _ in _VENDORS.get(module or "", ()):
        try:
            with open(_PARAMETERS.format(module=module, name=name), encoding="ascii") as file:
                found[name] = file.read().strip()
        except OSError:
            continue  # a kernel that has no such parameter, or does not show it
    return found


def _meaning(module: str | None, parameters: dict[str, str]) -> list[str]:
    if module is None:
        return []
    meaning = [_KINDS.get(module, "a vendor module that hvmodel does not know")]
    for name, yes, no in _VENDORS.get(module, ()):
        if name in parameters:
            meaning.append(yes if parameters[name] in ("Y", "1") else no)
    return meaning


def _ask(kvm: Kvm, found: dict[str, Any]) -> None:
    from ..kvm import Cap
    from ..ram.block import host_memory

    capabilities = {cap.name: kvm.check_extension(cap) for cap in Cap if not cap.name.startswith(_ELSEWHERE)}
    found["capabilities"] = capabilities
    found["advice"] = {name: _advise(name) for name, value in capabilities.items() if not value}
    found["limits"] = {name: capabilities[name] for name in _LIMITS}
    found["limits"] |= {"vcpu_mmap_size": kvm.vcpu_mmap_size, "host_memory": host_memory()}
    for entry in kvm.supported_cpuid():
        if entry.function == 0x80000008:
            found["limits"]["guest_physical_bits"] = entry.eax & 0xFF
    if capabilities["BINARY_STATS_FD"]:
        found["emulated"] = {mode: _is_emulated(kvm, mode) for mode in MODES}
    for mode, emulated in found["emulated"].items():
        if emulated is not None:
            how = "is emulated by KVM, instruction by instruction" if emulated else "runs on the processor"
            found["meaning"].append(f"{mode}: {how}")


def _advise(name: str) -> str:
    return _NO.get(name) or next(what for prefix, what in _NO_FAMILY if name.startswith(prefix))


def _is_emulated(kvm: Kvm, mode: str) -> bool | None:
    # Whether KVM emulates a run of nops in this mode; None where it could not be asked.
    from ..kvm import Hlt, MmioWrite
    from ..machine import Machine
    from ..witness import Stats

    code = b"\x90" * _NR_NOPS
    try:
        with Machine("1M", kvm=kvm) as m:
            m.vcpu.real_mode(entry=0x7C00)
            if mode == MODES[0]:
                m.load(0x7C00, code + b"\xf4")  # hlt
            else:
                m.load(0x7C00, code + b"\xa2" + _HOLE.to_bytes(8, "little"))  # mov [_HOLE], al
                _enter_long_mode(m, cpl=3 if mode == MODES[2] else 0)
            with Stats(m.vcpu.kvm.stats_fd()) as stats:
                exit = m.vcpu.kvm.run(timeout=1)
                count = stats.read().get("insn_emulation")
    except (HvError, OSError):
        return None
    if not isinstance(exit, Hlt | MmioWrite) or not isinstance(count, int):
        return None
    return count >= _NR_NOPS


def _enter_long_mode(m: Any, cpl: int) -> None:
    # Identity-mapped 2 MiB pages of the first 4 MiB, for the user too: PML4 at 0x1000, PDPT at 0x2000, PD at 0x3000.
    for at, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x87), (0x3008, _HOLE | 0x87)):
        m.write(at, entry.to_bytes(8, "little"))
    sregs = m.vcpu.kvm.sregs
    for name in ("cs", "ds", "es", "ss"):
        segment = getattr(sregs, name)
        is_code = name == "cs"
        segment.base, segment.limit, segment.g, segment.present, segment.s = 0, 0xFFFFFFFF, 1, 1, 1
        segment.type, segment.l, segment.db = (0xB, 1, 0) if is_code else (3, 0, 1)
        segment.dpl, segment.selector = cpl, (0x08 if is_code else 0x10) | cpl
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80000011, 0x1000, 0x20, 0x500  # PG ET PE; PAE; LMA LME
    m.vcpu.kvm.sregs = sregs


def show(found: dict[str, Any], *, as_json: bool) -> int:
    """Print what gather() found; the exit status: 0, or 8 where /dev/kvm cannot be used."""
    if as_json:
        line(json.dumps(found))
        return OK if found["usable"] else NO_KVM
    limits = dict(found["limits"])
    memory = limits.pop("host_memory", None)
    rows = [
        ("hvmodel", f"{found['version']}, Python {found['python']}"),
        ("kernel", f"{found['kernel']}, {found['cpus']} CPUs"),
        (found["device"], f"KVM API {found['api_version']}" if found["usable"] else "cannot be used"),
        ("vendor module", found["module"] or "none visible in /sys/module"),
        *[("", text) for text in found["meaning"]],
        *[(name, f"{limits[name]}  ({text})") for name, text in _LIMITS.items() if name in limits],
        *[(name, value) for name, value in limits.items() if name not in _LIMITS],
    ]
    if memory is not None:
        rows.append(("host memory", f"{memory // MiB} MiB"))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        line(f"{name:<{width}}  {text}")
    if found["problem"] is not None:
        line(f"\nNo: {found['problem']}")
        return NO_KVM
    line("")
    advice = found["advice"]
    table(
        ("CAPABILITY", "VALUE", "WHAT TO DO"),
        ((name, value or "no", advice.get(name, "")) for name, value in found["capabilities"].items()),
    )
    return OK
