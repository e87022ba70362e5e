"""A device inside the kernel, made by KVM_CREATE_DEVICE, and its attributes."""

from __future__ import annotations

from .._ffi import ffi, lib
from .handle import Handle

__all__ = ["Device"]


class Device(Handle):
    """An in-kernel device (KVM_CREATE_DEVICE), such as KVM_DEV_TYPE_VFIO.

    Thread safety: any thread.
    """

    scope = "device"
    __slots__ = ()

    def has_attr(self, group: int, attr: int) -> bool:
        """Whether the device knows attribute `attr` of `group` (KVM_HAS_DEVICE_ATTR)."""
        arg = ffi.new("struct kvm_device_attr *", {"group": group, "attr": attr})
        return lib.kvm_has_device_attr(self.fd, arg) == 0

    def set_attr(self, group: int, attr: int, address: int = 0, flags: int = 0) -> None:
        """Set an attribute from the memory at `address` (KVM_SET_DEVICE_ATTR).

        Unsafe: the kernel reads from `address`.  KvmError: ENXIO no such group or attribute, EFAULT address, EPERM
        not now, others by device.
        """
        arg = ffi.new("struct kvm_device_attr *", {"group": group, "attr": attr, "addr": address, "flags": flags})
        self._check("KVM_SET_DEVICE_ATTR", lib.kvm_set_device_attr(self.fd, arg), "attr", (group, attr))

    def get_attr(self, group: int, attr: int, address: int, flags: int = 0) -> None:
        """Get an attribute into the memory at `address` (KVM_GET_DEVICE_ATTR).  Unsafe, as set_attr."""
        arg = ffi.new("struct kvm_device_attr *", {"group": group, "attr": attr, "addr": address, "flags": flags})
        self._check("KVM_GET_DEVICE_ATTR", lib.kvm_get_device_attr(self.fd, arg), "attr", (group, attr))
