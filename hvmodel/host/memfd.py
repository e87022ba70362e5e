"""Memory files: `MemFd` owns a file descriptor of memfd_create(2); seals say what nobody can do to the file any more.

    SEAL          no more seals            WRITE         no writing at all: EBUSY while a shared writable mapping lives
    SHRINK, GROW  the size is fixed        FUTURE_WRITE  no new way of writing; mappings that exist stay writable
                                           EXEC          the execute mode bits are fixed

A seal is never taken off.  SHRINK is what makes a mapping safe to hand out: without it anybody who holds the file can
truncate it, and touching the lost pages is SIGBUS.

Source: mm/memfd.c, mm/shmem.c@v6.18; memfd_create(2), fcntl(2).
"""

from __future__ import annotations

import errno
import os
from weakref import finalize

from .._ffi import lib
from ..errors import ArgumentError, ArgumentTypeError, ClosedError, HostError
from ..units import PAGE_SIZE, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

__all__ = [
    "F_SEAL_EXEC",
    "F_SEAL_FUTURE_WRITE",
    "F_SEAL_GROW",
    "F_SEAL_SEAL",
    "F_SEAL_SHRINK",
    "F_SEAL_WRITE",
    "NAME_MAX",
    "SIZE_MAX",
    "MemFd",
    "file_name",
    "file_size",
    "get_seals",
    "page_multiple",
    "seal_names",
]

F_SEAL_SEAL: int = lib.HV_F_SEAL_SEAL
F_SEAL_SHRINK: int = lib.HV_F_SEAL_SHRINK
F_SEAL_GROW: int = lib.HV_F_SEAL_GROW
F_SEAL_WRITE: int = lib.HV_F_SEAL_WRITE
F_SEAL_FUTURE_WRITE: int = lib.HV_F_SEAL_FUTURE_WRITE
F_SEAL_EXEC: int = lib.HV_F_SEAL_EXEC

_SEALS = {
    F_SEAL_SEAL: "SEAL",
    F_SEAL_SHRINK: "SHRINK",
    F_SEAL_GROW: "GROW",
    F_SEAL_WRITE: "WRITE",
    F_SEAL_FUTURE_WRITE: "FUTURE_WRITE",
    F_SEAL_EXEC: "EXEC",
}
_ALL_SEALS = sum(_SEALS)

NAME_MAX = 249  # NAME_MAX of the kernel (255) less its "memfd:"
SIZE_MAX = (1 << 63) - PAGE_SIZE  # the last whole page under loff_t's limit

# What a refusal of F_ADD_SEALS means: (detail, accepted).
_REFUSED = {
    errno.EBUSY: (
        "a shared writable mapping of this memfd is alive (here or in another process)",
        "unmap it first, or F_SEAL_FUTURE_WRITE, which leaves the mappings that exist writable",
    ),
    errno.EPERM: ("F_SEAL_SEAL is set, so that no seal can be added any more", None),
    errno.EINVAL: ("this kernel does not know one of the seals", None),
}


def seal_names(seals: int) -> str:
    """The seals as text, in the order of their bits.

    >>> seal_names(F_SEAL_SHRINK | F_SEAL_GROW)
    'SHRINK|GROW'
    """
    return "|".join(name for bit, name in _SEALS.items() if seals & bit) or "0"


def file_name(name: str, call: str, field: str) -> bytes:
    """The bytes of a memfd's name: at most 249 of them, none of them NUL; errors name `call` and `field`."""
    if not isinstance(name, str):
        raise ArgumentTypeError(call, field, name, "a str")
    accepted = f"a name of at most {NAME_MAX} bytes without NUL"
    try:
        text = os.fsencode(name)
    except UnicodeEncodeError:
        raise ArgumentError(call, field, name, accepted, "it has no encoding as a file name") from None
    if len(text) > NAME_MAX:
        raise ArgumentError(call, field, name, accepted, f"it has {len(text)} bytes")
    if 0 in text:
        raise ArgumentError(call, field, name, accepted, "it has a NUL in it")
    return text


def page_multiple(size: int | str, call: str, field: str, limit: int = SIZE_MAX, why: str = "") -> int:
    """A size in bytes that is whole pages, at least one, at most `limit`; errors name `call`, `field` and `why`."""
    value = parse_size(size, call, field)
    if value % PAGE_SIZE or not PAGE_SIZE <= value <= limit:
        raise ArgumentError(call, field, size, f"a multiple of {PAGE_SIZE} bytes from {PAGE_SIZE} to {limit:#x}{why}")
    return value


def _leaked(fd: int, name: str) -> None:
    # The finalizer of a MemFd that nobody closed.  The warning comes last, because it may be made an exception.
    import warnings

    os.close(fd)
    warnings.warn(f"unclosed MemFd({name!r}, fd={fd})", ResourceWarning, stacklevel=2)


class MemFd:
    """An anonymous memory file of `size` bytes, close-on-exec, to which seals can be added; owns its descriptor.

    `name` is what /proc/self/maps and /proc/self/fd show (`/memfd:NAME (deleted)`): at most 249 bytes without NUL, not
    necessarily unique.  `size` is whole pages, as bytes or as text such as "16M"; `seals` are added once the size is
    set.  All pages read as zero and cost nothing until they are written.

    Raises ArgumentError, ArgumentTypeError; HostError of memfd_create (EMFILE, ENFILE, ENOMEM), ftruncate (EFBIG) and
    F_ADD_SEALS.  Nothing is left open then.

    Calls: memfd_create(2) with MFD_CLOEXEC | MFD_ALLOW_SEALING, ftruncate(2), fcntl(2) F_ADD_SEALS.
    See: qemu_memfd_create, util/memfd.c@v10.1.
    Threads: any, but for `close`, which must not race with a use of `fd`.

    >>> with MemFd("doc", "64K", seals=F_SEAL_SHRINK | F_SEAL_GROW) as memfd:
    ...     memfd.size, seal_names(memfd.seals)
    (65536, 'SHRINK|GROW')
    >>> memfd
    <MemFd closed>
    """

    __slots__ = ("__weakref__", "_fd", "_finalizer", "_name")

    def __init__(self, name: str, size: int | str, *, seals: int = 0) -> None:
        self._fd = -1
        text = file_name(name, "MemFd", "name")
        size = page_multiple(size, "MemFd", "size")
        _check_seals("MemFd", seals)
        fd = lib.hv_memfd_create(text, lib.HV_MFD_CLOEXEC | lib.HV_MFD_ALLOW_SEALING)
        if fd < 0:
            raise HostError(-fd, "memfd_create", "name", name)
        try:
            error = lib.hv_ftruncate(fd, size)
            if error < 0:
                raise HostError(-error, "ftruncate", "size", size)
            if seals:
                _add_seals(fd, seals)
        except BaseException:
            os.close(fd)
            raise
        self._fd, self._name = fd, name
        self._finalizer = finalize(self, _leaked, fd, name)

    @property
    def name(self) -> str:
        """Its name, as given."""
        return self._name

    @property
    def fd(self) -> int:
        """The file descriptor, which stays this object's.  Raises ClosedError."""
        if self._fd < 0:
            raise ClosedError("MemFd.fd", f"MemFd({self._name!r})")
        return self._fd

    def fileno(self) -> int:
        """The file descriptor, so that os and select functions take this object."""
        return self.fd

    @property
    def size(self) -> int:
        """Size in bytes, as fstat(2) says now."""
        return file_size(self.fd)

    @property
    def seals(self) -> int:
        """The seals, F_SEAL_* or-ed, as the kernel says now (F_GET_SEALS)."""
        return get_seals(self.fd)

    def add_seals(self, seals: int) -> None:
        """Adds the seals F_SEAL_* or-ed in `seals` (F_ADD_SEALS); those that are there already do no harm.

        Raises HostError: EBUSY for F_SEAL_WRITE while a shared writable mapping is alive (F_SEAL_EXEC of a file with
        execute mode bits, as this one, brings F_SEAL_WRITE with it); EPERM once F_SEAL_SEAL is set; EINVAL for a seal
        that this kernel does not know.
        """
        fd = self.fd
        _check_seals("MemFd.add_seals", seals)
        _add_seals(fd, seals)

    def close(self) -> None:
        """Closes the descriptor; mappings of the file live on.  Closing twice is fine."""
        if self._fd >= 0 and self._finalizer.detach() is not None:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._fd < 0:
            return "<MemFd closed>"
        return f"MemFd({self._name!r}, fd={self._fd}, size={self.size:#x})"


def file_size(fd: int) -> int:
    """Size in bytes of any file descriptor's file; HostError where it has none."""
    try:
        return os.fstat(fd).st_size
    except OSError as error:
        raise HostError(error.errno or 0, "fstat", "fd", fd) from None


def get_seals(fd: int) -> int:
    """The seals of any file descriptor; HostError EINVAL where the file has none (no memfd)."""
    seals = lib.hv_get_seals(fd)
    if seals < 0:
        raise HostError(-seals, "fcntl(F_GET_SEALS)", "fd", fd)
    return seals


def _check_seals(call: str, seals: int) -> None:
    if isinstance(seals, bool) or not isinstance(seals, int):
        raise ArgumentTypeError(call, "seals", seals, "an int, F_SEAL_* or-ed")
    if seals & ~_ALL_SEALS:
        raise ArgumentError(call, "seals", seals, f"a combination of {_ALL_SEALS:#x}: {seal_names(_ALL_SEALS)}")


def _add_seals(fd: int, seals: int) -> None:
    error = lib.hv_add_seals(fd, seals)
    if error < 0:
        detail, accepted = _REFUSED.get(-error, (None, None))
        raise HostError(-error, "fcntl(F_ADD_SEALS)", "seals", seals, accepted, f"{seal_names(seals)}: {detail}")
