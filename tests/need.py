"""What a test lacks: `need("kvm")` skips, with the reason, or fails where the environment requires it.

HVMODEL_REQUIRE=kvm,tracefs,... names what this machine is known to have: a test that lacks one of those fails.
"""

from __future__ import annotations

import fcntl
import functools
import os
import platform
import shutil
from pathlib import Path

import pytest

__all__ = ["NEEDS", "lacking", "need", "need_cap"]

_KVM_GET_API_VERSION = 0xAE00  # _IO(KVMIO, 0x00)


def _kvm() -> str | None:
    if not Path("/dev/kvm").exists():
        return "/dev/kvm is not there"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "no permission to open /dev/kvm"
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return str(error)
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    except OSError as error:
        return f"/dev/kvm is not KVM: {error.strerror}"
    finally:
        os.close(fd)
    return None if version == 12 else f"/dev/kvm speaks version {version} of KVM's API, not 12"


def _tracefs() -> str | None:
    if os.geteuid() != 0:
        return "reading trace events takes root"
    if "tracefs" not in Path("/proc/filesystems").read_text():
        return "the kernel has no tracefs"
    return None


def _file(path: str, what: str) -> str | None:
    return None if Path(path).exists() else f"{path} is not there ({what})"


def _command(*names: str) -> str | None:
    missing = [name for name in names if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def _userfaultfd() -> str | None:
    # Faults that the kernel makes for us too: without UFFD_USER_MODE_ONLY.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(323, os.O_CLOEXEC)
    if fd < 0:
        return f"userfaultfd(2): {os.strerror(ctypes.get_errno())}"
    os.close(fd)
    return None


NEEDS = {
    "kvm": _kvm,
    "tracefs": _tracefs,
    "root": lambda: None if os.geteuid() == 0 else "not run as root",
    "btf": lambda: _file("/sys/kernel/btf/vmlinux", "a kernel with CONFIG_DEBUG_INFO_BTF"),
    "seabios": lambda: _file("/usr/share/seabios/bios.bin", "Debian's package seabios"),
    "gcc": lambda: _command("gcc", "ld"),
    "qemu": lambda: _command("qemu-system-x86_64"),
    "strace": lambda: _command("strace"),
    "pmap": lambda: _command("pmap"),
    "kvm-header": lambda: _file("/usr/include/linux/kvm.h", "Debian's package linux-libc-dev"),
    "userfaultfd": _userfaultfd,
    "x86-64": lambda: None if platform.machine() == "x86_64" else "not an x86-64 machine",
}


def _required() -> set[str]:
    return {word for word in os.environ.get("HVMODEL_REQUIRE", "").split(",") if word}


@functools.cache
def lacking(what: str) -> str | None:
    """Why this machine does not have `what`, or None."""
    return NEEDS[what]()


def need(*whats: str) -> None:
    """Skip the test where one of `whats` is lacking; fail it where the environment requires that one."""
    for what in whats:
        why = lacking(what)
        if why is not None:
            (pytest.fail if what in _required() else pytest.skip)(f"needs {what}: {why}")


def need_cap(fd_owner: object, name: str) -> int:
    """Skip the test where the kernel's KVM_CHECK_EXTENSION says 0 for KVM_CAP_`name`; its value otherwise."""
    from hvmodel._ffi import lib

    value = fd_owner.check_extension(getattr(lib, f"KVM_CAP_{name}"))
    if value <= 0:
        pytest.skip(f"needs KVM_CAP_{name}: KVM_CHECK_EXTENSION says {value}")
    return value
