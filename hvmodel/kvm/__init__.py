"""The KVM binding: one class per kind of file descriptor, every ioctl of the x86 ABI, typed exits.

    system   Kvm      /dev/kvm
    vm       Vm       Kvm.create_vm()
    vcpu     Vcpu     Vm.create_vcpu()
    device   Device   Vm.create_device()

Ioctls with semantics are methods named after them; pairs that get and set a struct are attributes (`vcpu.regs`);
every other ioctl goes through `ioctl("KVM_…", arg)`.

    >>> from hvmodel.kvm import Kvm
    >>> with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
    ...     hex(vcpu.regs.rip)
    '0xfff0'
"""

from __future__ import annotations

from .. import _ffi
from .._ffi import Ioctl, ffi
from .cpuid import CpuidEntry
from .exits import *  # noqa: F403  # its __all__ is the list
from .exits import __all__ as _exits
from .handle import Handle, StructItem, fields
from .memslots import MemSlot, SlotMemory
from .system import KVM_API_VERSION, Kvm, vendor_module
from .vcpu import Translation, Vcpu
from .vm import IrqRoute, MsiRoute, MsrFilterRange, Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .batch import RECORD_DTYPE, Batch, Capture, ExitRecord, Feed, iter_records
    from .capabilities import Cap
    from .device import Device
    from .guest_memfd import GuestMemFd

    IOCTLS: dict[str, Ioctl]

# Where what a bare machine does not need comes from, at its first use.
_LAZY = {
    "Batch": "batch",
    "Cap": "capabilities",
    "Capture": "batch",
    "Device": "device",
    "ExitRecord": "batch",
    "Feed": "batch",
    "GuestMemFd": "guest_memfd",
    "RECORD_DTYPE": "batch",
    "iter_records": "batch",
}

__all__ = [
    "IOCTLS",
    "KVM_API_VERSION",
    "RECORD_DTYPE",
    "Batch",
    "Cap",
    "Capture",
    "CpuidEntry",
    "Device",
    "ExitRecord",
    "Feed",
    "GuestMemFd",
    "Handle",
    "Ioctl",
    "IrqRoute",
    "Kvm",
    "MemSlot",
    "MsiRoute",
    "MsrFilterRange",
    "SlotMemory",
    "StructItem",
    "Translation",
    "Vcpu",
    "Vm",
    "ffi",
    "fields",
    "iter_records",
    "vendor_module",
    *_exits,
]


def __getattr__(name: str) -> object:
    if name == "IOCTLS":
        return _ffi.IOCTLS
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    return value
