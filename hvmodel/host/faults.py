"""Faults of a userfaultfd: what the kernel has of it, what a fault tells, and what a refusal means.

Owns nothing; `hvmodel.host.userfaultfd` opens what is opened here.

Source: include/uapi/linux/userfaultfd.h, fs/userfaultfd.c@v6.18; userfaultfd(2), ioctl_userfaultfd(2).
"""

from __future__ import annotations

import errno
import os

from .._ffi import lib
from ..errors import HostError
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .mapping import Mapping

__all__ = ["IOCTLS", "MODES", "WANTED", "Fault", "FaultCounts", "feature_names", "features", "open_uffd", "refused"]

# UFFD_FEATURE_*, by bit.
_FEATURES = (
    "PAGEFAULT_FLAG_WP",
    "EVENT_FORK",
    "EVENT_REMAP",
    "EVENT_REMOVE",
    "MISSING_HUGETLBFS",
    "MISSING_SHMEM",
    "EVENT_UNMAP",
    "SIGBUS",
    "THREAD_ID",
    "MINOR_HUGETLBFS",
    "MINOR_SHMEM",
    "EXACT_ADDRESS",
    "WP_HUGETLBFS_SHMEM",
    "WP_UNPOPULATED",
    "POISON",
    "WP_ASYNC",
    "MOVE",
)
WANTED: int = (
    lib.HV_UFFD_FEATURE_MISSING_HUGETLBFS
    | lib.HV_UFFD_FEATURE_MISSING_SHMEM
    | lib.HV_UFFD_FEATURE_THREAD_ID
    | lib.HV_UFFD_FEATURE_MINOR_HUGETLBFS
    | lib.HV_UFFD_FEATURE_MINOR_SHMEM
    | lib.HV_UFFD_FEATURE_EXACT_ADDRESS
    | lib.HV_UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | lib.HV_UFFD_FEATURE_WP_UNPOPULATED
    | lib.HV_UFFD_FEATURE_POISON
    | lib.HV_UFFD_FEATURE_MOVE
)
"""Features that change nothing but what we are told and may do: asked for where the kernel has them."""

IOCTLS = {2: "WAKE", 3: "COPY", 4: "ZEROPAGE", 5: "MOVE", 6: "WRITEPROTECT", 7: "CONTINUE", 8: "POISON"}
"""The ioctls that a registered range allows, by bit of the kernel's answer."""

MODES = {
    "missing": lib.HV_UFFD_MISSING,
    "minor": lib.HV_UFFD_MINOR,
    "wp": lib.HV_UFFD_WP,
    "wp-async": lib.HV_UFFD_WP | lib.HV_UFFD_ASYNC,
}
"""The modes of a range by name: the bits that native/uffd.h has for them."""

# What a refusal means, by ioctl and errno: (field, accepted, detail).
_REFUSED = {
    ("UFFDIO_REGISTER", errno.EBUSY): (
        "offset",
        "a range that no userfaultfd has",
        "another userfaultfd has registered a part of it",
    ),
    ("UFFDIO_REGISTER", errno.EPERM): (
        "mapping",
        "memory that its file lets be written",
        "a shared mapping of a file that is read-only or sealed against writing",
    ),
    ("UFFDIO_COPY", errno.EEXIST): ("offset", "a page that is missing", "the page is there already"),
    ("UFFDIO_COPY", errno.ENOENT): ("offset", "a registered range", "the memory is not registered, or has changed"),
    ("UFFDIO_COPY", errno.EFAULT): ("data", None, "the source cannot be read"),
    ("UFFDIO_COPY", errno.EINVAL): ("offset", None, "this range does not take it: see `registrations`"),
    ("UFFDIO_COPY", errno.ENOSPC): ("offset", None, "no huge page is free"),
    ("UFFDIO_CONTINUE", errno.EEXIST): ("offset", "a page that is not mapped", "the page is mapped already"),
    ("UFFDIO_CONTINUE", errno.EFAULT): ("offset", "a page that its file has", "the file has no page there"),
    ("UFFDIO_CONTINUE", errno.EINVAL): ("offset", "a range registered as minor", None),
    ("UFFDIO_POISON", errno.EEXIST): ("offset", "a page that is missing or not mapped", "the page is there already"),
    ("UFFDIO_WRITEPROTECT", errno.ENOENT): ("offset", "a range registered as wp or wp-async", None),
    ("UFFDIO_MOVE", errno.EBUSY): ("source_offset", None, "a page of the source is shared or in use by the kernel"),
    ("UFFDIO_MOVE", errno.ENOENT): ("source_offset", "pages that are there, or holes=True", "the source has a hole"),
    ("UFFDIO_MOVE", errno.EEXIST): ("offset", "a page that is missing", "the page is there already"),
    ("UFFDIO_MOVE", errno.EINVAL): ("mapping", "private anonymous memory, of equal protection, on both sides", None),
}
_REFUSED["UFFDIO_ZEROPAGE", errno.EEXIST] = _REFUSED["UFFDIO_COPY", errno.EEXIST]
_REFUSED["UFFDIO_ZEROPAGE", errno.EINVAL] = _REFUSED["UFFDIO_COPY", errno.EINVAL]


def refused(ioctl: str, error: int, values: dict[str, object]) -> HostError:
    """The error for a refusal of `ioctl` with errno `error`; `values` of the arguments by name."""
    field, accepted, detail = _REFUSED.get((ioctl, error), ("offset", None, None))
    return HostError(error, f"ioctl({ioctl})", field, values.get(field), accepted, detail)


def features() -> tuple[str, ...]:
    """The kernel's UFFD_FEATURE_* by name, in the order of their bits.  HostError as of UserFaultFd.

    >>> "MISSING_SHMEM" in features()
    True
    """
    return feature_names(_kernel_features())


def feature_names(bits: int) -> tuple[str, ...]:
    """The UFFD_FEATURE_* in `bits`, by name."""
    return tuple(name for bit, name in enumerate(_FEATURES) if bits >> bit & 1)


_known: int | None = None


def _kernel_features() -> int:
    # A descriptor tells them once, and then takes no other choice: so a second one is opened for use.
    global _known
    if _known is None:
        fd = lib.hv_userfaultfd(0)
        if fd == -errno.EPERM:
            fd = lib.hv_userfaultfd(lib.HV_UFFD_USER_MODE_ONLY)
        if fd < 0:
            raise _open_refused(-fd, True)
        try:
            bits = lib.hv_uffdio_api(fd, 0)
        finally:
            os.close(fd)
        if bits < 0:
            raise HostError(-bits, "ioctl(UFFDIO_API)")
        _known = bits
    return _known


def open_uffd(*, user_mode_only: bool, sigbus: bool, wp_async: bool) -> tuple[int, int]:
    """A new userfaultfd and the features that are switched on: those of WANTED that there are, and those asked for.

    Raises HostError of userfaultfd or UFFDIO_API, also where a feature that is asked for is not there; nothing is left
    open then.
    """
    there = _kernel_features()
    wanted = there & WANTED
    for name, asked, bit in (
        ("sigbus", sigbus, lib.HV_UFFD_FEATURE_SIGBUS),
        ("wp_async", wp_async, lib.HV_UFFD_FEATURE_WP_ASYNC),
    ):
        if asked and not there & bit:
            detail = "this kernel does not have it"
            raise HostError(errno.EOPNOTSUPP, "ioctl(UFFDIO_API)", name, asked, "False", detail)
        wanted |= bit if asked else 0
    fd = lib.hv_userfaultfd(lib.HV_UFFD_USER_MODE_ONLY if user_mode_only else 0)
    if fd < 0:
        raise _open_refused(-fd, user_mode_only)
    got = lib.hv_uffdio_api(fd, wanted)
    if got < 0:
        os.close(fd)
        raise HostError(-got, "ioctl(UFFDIO_API)", "features", feature_names(wanted))
    return fd, wanted


def _open_refused(error: int, user_mode_only: bool) -> HostError:
    if error == errno.EPERM:
        accepted = "CAP_SYS_PTRACE, vm.unprivileged_userfaultfd=1, or /dev/userfaultfd; or user_mode_only=True"
        detail = "this process may not handle faults that the kernel makes on its behalf"
        return HostError(error, "userfaultfd", "user_mode_only", user_mode_only, accepted, detail)
    lacking = "this kernel has no userfaultfd" if error == errno.ENOSYS else None
    return HostError(error, "userfaultfd", None, None, None, lacking)


class Fault(Value):
    """A page fault that waits for its answer.

    `mapping` and `offset`: the byte that was touched (its page where the kernel does not tell the byte, before Linux
    5.18); `kind` "missing", "minor" or "wp"; `write` whether it is to be written; `thread` the kernel's id of the
    thread that waits (0: none of this process, such as KVM's own, or not told).
    """

    mapping: Mapping
    offset: int
    kind: str
    write: bool
    thread: int

    @property
    def page(self) -> int:
        """The offset of the page in `mapping`."""
        return self.offset & -self.mapping.page_size


class FaultCounts(Value):
    """Faults so far, by kind, and how many of them were given up."""

    missing: int
    minor: int
    wp: int
    given_up: int
