"""hvmodel: the hypervisor you can import.

Names are imported when first used, so that `import hvmodel` costs next to nothing, and the pure models work where
there is neither /dev/kvm nor the compiled extension.

    errors, units, value   what can go wrong; sizes and pages; frozen values
    arch                   words of the architecture: registers, descriptors, page tables, exceptions; pure
    host, ram              memfd, mappings, page faults; RAM blocks, memory regions, address spaces
    kvm                    the binding: Kvm, Vm, Vcpu, Device, typed exits, batches
    state                  the state of a vCPU and a VM, part by part
    machine                Machine
    witness                what the kernel says of what we say
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

__version__ = "0.1.0"

_FLOORS = ("arch", "cli", "errors", "host", "kvm", "machine", "ram", "state", "units", "value", "witness")
_HOMES = {
    "hvmodel.machine": ("Console", "Cpu", "Machine", "Stop"),
    "hvmodel.kvm": (
        "Batch",
        "Cap",
        "Capture",
        "Feed",
        "Kvm",
        "Vcpu",
        "Vm",
    ),
    "hvmodel.kvm.exits": (
        "Again",
        "Debug",
        "DirtyRingFull",
        "FailEntry",
        "Hlt",
        "HostFault",
        "Hypercall",
        "InternalError",
        "Interrupted",
        "IoIn",
        "IoOut",
        "IrqWindowOpen",
        "MemoryFault",
        "MmioRead",
        "MmioWrite",
        "RdMsr",
        "Shutdown",
        "SystemEvent",
        "Unknown",
        "WrMsr",
    ),
    "hvmodel.ram": ("AddressSpace", "MemoryRegion", "MemoryRegionOps", "RamBlock"),
    "hvmodel.host": ("Mapping", "MemFd"),
    "hvmodel.errors": (
        "ArgumentError",
        "ArgumentTypeError",
        "BuildError",
        "BusyError",
        "ChangedStateError",
        "ClosedError",
        "ForkedError",
        "GuestAccessError",
        "HostError",
        "HvError",
        "KvmError",
        "PartialError",
        "RefusedStateError",
        "UnansweredError",
        "UnqualifiedError",
        "UnsupportedError",
        "VmDeadError",
    ),
    "hvmodel.units": ("GiB", "KiB", "MiB"),
}
_WHERE = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_FLOORS, *_WHERE]


def _import(module: str) -> ModuleType:
    # As importlib.import_module, whose own import takes a millisecond.
    __import__(module)
    return sys.modules[module]


def __getattr__(name: str) -> object:
    if name in _FLOORS:
        return _import(f"{__name__}.{name}")
    home = _WHERE.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(_import(home), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
