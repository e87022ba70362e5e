"""A device inside the kernel, made by KVM_CREATE_DEVICE, and its attributes."""

from __future__ import annotations

import errno

from .._ffi import ffi, lib
from .handle import Handle, _uint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._native import kvm_device_attr

__all__ = ["Device"]


class Device(Handle):
    """An in-kernel device (KVM_CREATE_DEVICE), such as KVM_DEV_TYPE_VFIO.

    Thread safety: any thread.
    """

    scope = "device"
    __slots__ = ()

    def has_attr(self, group: int, attr: int) -> bool:
        """Whether the device knows attribute `attr` of `group` (KVM_HAS_DEVICE_ATTR)."""
        call = "KVM_HAS_DEVICE_ATTR"
        rc = lib.kvm_has_device_attr(self.fd, _attr(call, group, attr))
        if rc in (-errno.ENXIO, -errno.EPERM):  # not this one; a device without any
            return False
        return self._check(call, rc) == 0

    def set_attr(self, group: int, attr: int, address: int = 0, flags: int = 0) -> None:
        """Set an attribute from the memory at `address` (KVM_SET_DEVICE_ATTR).

        Unsafe: the kernel reads from `address`.  KvmError: ENXIO no such group or attribute, EFAULT address, EPERM
        not now, others by device.
        """
        call = "KVM_SET_DEVICE_ATTR"
        arg = _attr(call, group, attr, address, flags)
        self._check(call, lib.kvm_set_device_attr(self.fd, arg), "attr", (group, attr))

    def get_attr(self, group: int, attr: int, address: int, flags: int = 0) -> None:
        """Get an attribute into the memory at `address` (KVM_GET_DEVICE_ATTR).  Unsafe, as set_attr."""
        call = "KVM_GET_DEVICE_ATTR"
        arg = _attr(call, group, attr, address, flags)
        self._check(call, lib.kvm_get_device_attr(self.fd, arg), "attr", (group, attr))


def _attr(call: str, group: int, attr: int, address: int = 0, flags: int = 0) -> kvm_device_attr:
    return ffi.new(
        "struct kvm_device_attr *",
        {
            "group": _uint(call, "group", group),
            "attr": _uint(call, "attr", attr, 64),
            "addr": _uint(call, "address", address, 64),
            "flags": _uint(call, "flags", flags),
        },
    )
