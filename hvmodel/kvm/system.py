"""/dev/kvm: the system file descriptor.

Owns the opening of the device with its refusals explained, what can be asked without a VM, and the making of VMs.
"""

from __future__ import annotations

import errno
import os
import stat

from .._ffi import ffi, lib
from ..errors import ArgumentError, ArgumentTypeError, HostError
from . import cpuid
from .handle import Handle, _check_extension
from .vm import Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    from .._native import kvm_cpuid2
    from .cpuid import CpuidEntry

__all__ = ["KVM_API_VERSION", "Kvm", "vendor_module"]

KVM_API_VERSION = 12


def vendor_module() -> str | None:
    """The vendor module that serves /dev/kvm, "kvm_intel", "kvm_amd" or another kvm_*, or None where none is visible.

    Where both are built into the kernel, the one of the processor's maker.  Source: /sys/module, /proc/cpuinfo.
    """
    try:
        names = [name for name in os.listdir("/sys/module") if name.startswith("kvm_")]
    except OSError:
        return None
    if len(names) > 1:
        own = {"GenuineIntel": "kvm_intel", "AuthenticAMD": "kvm_amd", "HygonGenuine": "kvm_amd"}.get(_maker())
        if own in names:
            return own
    return min(names, default=None)


def _maker() -> str:
    # The processor's maker, as CPUID leaf 0 has it; "" where it cannot be read.
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
            for text in info:
                name, _, value = text.partition(":")
                if name.strip() == "vendor_id":
                    return value.strip()
    except OSError:
        pass
    return ""


def _explain_open(path: str, err: int) -> str:
    # What would help, for each way /dev/kvm refuses to open.
    if err == errno.ENOENT:
        if vendor_module():
            return f"KVM is loaded but {path} is not there: in a container, pass it in (--device {path})"
        return (
            "KVM is not loaded: switch virtualization on in the firmware and load kvm_intel or kvm_amd (modprobe); "
            "in a virtual machine, ask for nested virtualization"
        )
    if err in (errno.EACCES, errno.EPERM):
        try:
            status = os.stat(path)
        except OSError:
            return "no permission"
        if status.st_mode & 0o060 != 0o060:
            cure = f"as root `chgrp kvm {path}; chmod 660 {path}`, and join group kvm"
            return f"no permission: only its owner may use it: {cure}"
        try:
            import grp

            group = grp.getgrgid(status.st_gid).gr_name
        except (ImportError, KeyError):
            group = "kvm"
        return f"no permission: join group {group} (usermod -aG {group} $USER, then log in again)"
    if err in (errno.ENODEV, errno.ENXIO):
        return "no vendor module serves the device: load kvm_intel or kvm_amd"
    if err == errno.EBUSY:
        return "another hypervisor holds the virtualization hardware"
    return ""


class Kvm(Handle):
    """The KVM system: `Kvm()` opens /dev/kvm; `Kvm.from_fd(fd)` takes a descriptor that was handed to this process.

    Raises HostError (ENOENT, EACCES, ENODEV, ...) that says what to do, ArgumentError for a file that is not KVM.
    Thread safety: any thread.  A child of os.fork may go on using it.

    >>> with Kvm() as kvm:
    ...     kvm.api_version
    12
    """

    scope = "system"
    __slots__ = ("_mmap_size",)

    def __init__(self, path: str | os.PathLike[str] = "/dev/kvm") -> None:
        try:
            name = os.fspath(path)
        except TypeError:
            raise ArgumentTypeError("Kvm", "path", path, "a path") from None
        if not isinstance(name, str):
            raise ArgumentTypeError("Kvm", "path", path, "a path as str")
        try:
            encoded = os.fsencode(name)
        except UnicodeEncodeError:
            encoded = b"\0"
        if b"\0" in encoded:
            raise ArgumentError("Kvm", "path", path, "a path without NUL, of characters that file names can have")
        try:
            fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            err = error.errno or errno.EIO
            raise HostError(err, "open", "path", name, None, _explain_open(name, err) or None) from None
        self._adopt(fd, "Kvm", "path", name)

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """A Kvm over a duplicate of descriptor `fd` of /dev/kvm, for processes that may not open it themselves.

        The descriptor stays the caller's.  Raises ArgumentError where it is not /dev/kvm, HostError EBADF.
        """
        if isinstance(fd, bool) or not isinstance(fd, int):
            raise ArgumentTypeError("Kvm.from_fd", "fd", fd, "a file descriptor")
        try:
            own = os.dup(fd)
        except (OSError, OverflowError) as error:
            err = getattr(error, "errno", None) or errno.EBADF
            raise HostError(err, "dup", "fd", fd, "an open descriptor of /dev/kvm") from None
        kvm = cls.__new__(cls)
        kvm._adopt(own, "Kvm.from_fd", "fd", fd)
        return kvm

    def _adopt(self, fd: int, call: str, field: str, value: object) -> None:
        # Only a character device is asked: other drivers give ioctl numbers other meanings.
        version = -errno.ENOTTY
        if stat.S_ISCHR(os.fstat(fd).st_mode):
            version = lib.kvm_get_api_version(fd)
        if version != KVM_API_VERSION:
            os.close(fd)
            detail = "not a KVM device" if version < 0 else f"it speaks KVM API {version}"
            raise ArgumentError(call, field, value, f"/dev/kvm with API version {KVM_API_VERSION}", detail)
        super().__init__(fd, None)
        self._mmap_size = 0

    @property
    def api_version(self) -> int:
        """KVM_GET_API_VERSION: 12 since Linux 2.6.22."""
        return self._check("KVM_GET_API_VERSION", lib.kvm_get_api_version(self.fd))

    @property
    def vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: bytes to map of a vCPU's fd (kvm_run, PIO data, coalesced ring)."""
        if not self._mmap_size:
            self._mmap_size = self._check("KVM_GET_VCPU_MMAP_SIZE", lib.kvm_get_vcpu_mmap_size(self.fd))
        return self._mmap_size

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 where capability `cap` (KVM_CAP_*, or `Cap`) is absent, else 1 or its value."""
        return _check_extension(self, cap)

    def create_vm(self, type: int = 0) -> Vm:
        """Make a VM (KVM_CREATE_VM) of machine type `type`: KVM_X86_DEFAULT_VM = 0, SW_PROTECTED_VM = 1, SEV..., TDX.

        KvmError: EINVAL unknown type (KVM_CAP_VM_TYPES is the mask of known ones), ENOMEM, EMFILE.
        """
        if isinstance(type, bool) or not isinstance(type, int):
            raise ArgumentTypeError("KVM_CREATE_VM", "type", type, "a KVM_X86_*_VM number")
        if not 0 <= type < 1 << 64:
            raise ArgumentError("KVM_CREATE_VM", "type", type, "a KVM_X86_*_VM number")
        fd = lib.kvm_create_vm(self.fd, type)
        if fd < 0:
            types = max(self.check_extension(lib.KVM_CAP_VM_TYPES), 1)
            known = [bit for bit in range(32) if types >> bit & 1]
            field = "type" if fd == -errno.EINVAL and type not in known else None
            raise self._refusal("KVM_CREATE_VM", -fd, field, type, f"one of {known}")
        return Vm(fd, self)

    def supported_cpuid(self) -> list[CpuidEntry]:
        """KVM_GET_SUPPORTED_CPUID: the leaves KVM can give a guest here.  Some hold the current CPU's APIC id."""
        return cpuid._unpack(self.supported_cpuid_table())

    def supported_cpuid_table(self) -> kvm_cpuid2:
        """The same as a `struct kvm_cpuid2 *`, to be given to Vcpu.set_cpuid2 as it is."""
        rc, table = cpuid._fetch(lambda t: lib.kvm_get_supported_cpuid(self.fd, t))
        self._check("KVM_GET_SUPPORTED_CPUID", rc)
        supported: kvm_cpuid2 = table
        return supported

    def emulated_cpuid(self) -> list[CpuidEntry]:
        """KVM_GET_EMULATED_CPUID: features that KVM emulates though the host lacks them."""
        rc, table = cpuid._fetch(lambda t: lib.kvm_get_emulated_cpuid(self.fd, t))
        self._check("KVM_GET_EMULATED_CPUID", rc)
        return cpuid._unpack(table)

    def msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST: the MSRs whose values make up a guest's state on this host."""
        return self._index_list("KVM_GET_MSR_INDEX_LIST")

    def msr_feature_index_list(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST: MSRs that tell what the host can do; read with get_feature_msrs."""
        return self._index_list("KVM_GET_MSR_FEATURE_INDEX_LIST")

    def _index_list(self, name: str) -> list[int]:
        call = getattr(lib, name.lower())
        # With too small a list the kernel answers E2BIG and says how many there are.
        nmsrs = 0
        while True:
            table = ffi.new("struct kvm_msr_list *", {"nmsrs": nmsrs, "indices": nmsrs})
            rc = call(self.fd, table)
            if rc != -errno.E2BIG or table.nmsrs <= nmsrs:
                break
            nmsrs = table.nmsrs
        self._check(name, rc)
        return [table.indices[i] for i in range(table.nmsrs)]

    def get_feature_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS on the system: values of feature MSRs; PartialError names the first that is none."""
        from .vcpu import get_msrs

        return get_msrs(self, indices)
