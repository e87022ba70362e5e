"""guest_memfd: memory of a VM that is a file of its own kind; `GuestMemFd` owns its descriptor.

    flags   0               private memory: only the guest reaches it, on VM types that have private memory
            MMAP 1          it can be mapped, shared only; to touch what is not INIT_SHARED is SIGBUS, to read it EFAULT
            INIT_SHARED 2   the host reaches it too, through such a mapping

Its size is fixed; read(2), write(2), ftruncate(2) and seals are refused by the kernel; its pages are 4 KiB, cannot be
swapped or moved, and are freed by a hole (`punch`) or with the file.  Each range of it is in one memslot at a time.

The file keeps its VM alive in the kernel, and a mapping keeps the file.

Source: virt/kvm/guest_memfd.c@v6.18; Documentation/virt/kvm/api.rst section 4.142.
"""

from __future__ import annotations

import errno
import os

from .._ffi import lib
from ..errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, HostError
from ..finalizer import Finalizer
from ..host.mapping import PROT_READ, PROT_WRITE, Mapping, index
from ..host.memfd import page_multiple
from ..units import PAGE_SIZE
from .handle import _uint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from .memslots import MemSlot
    from .vm import Vm

__all__ = ["GUEST_MEMFD_FLAG_INIT_SHARED", "GUEST_MEMFD_FLAG_MMAP", "GuestMemFd"]

GUEST_MEMFD_FLAG_MMAP: int = lib.GUEST_MEMFD_FLAG_MMAP
GUEST_MEMFD_FLAG_INIT_SHARED: int = lib.GUEST_MEMFD_FLAG_INIT_SHARED

_SIZE_MAX = (1 << 63) - PAGE_SIZE


def _leaked(fd: int) -> None:
    # The finalizer of one that nobody closed.  The warning comes last, because it may be made an exception.
    import warnings

    os.close(fd)
    warnings.warn(f"unclosed GuestMemFd(fd={fd})", ResourceWarning, stacklevel=2)


class GuestMemFd:
    """A guest_memfd of `vm`, `size` bytes (whole pages; an int or text such as "16M"); owns its descriptor.

    `flags`: GUEST_MEMFD_FLAG_*, or-ed; 3 (MMAP and INIT_SHARED) is memory that the host and any guest share.

    Raises ArgumentError, ArgumentTypeError, ClosedError; KvmError of KVM_CREATE_GUEST_MEMFD: EINVAL with `field` flags;
    UnsupportedError (KVM_CAP_GUEST_MEMFD, Linux 6.8; the flags came with Linux 6.18).

    Threads: any, but for `close`, which must not race with a use of `fd`.
    """

    __slots__ = ("__weakref__", "_fd", "_finalizer", "_flags", "_pins", "_size", "_vm")

    def __init__(self, vm: Vm, size: int | str, flags: int = 0) -> None:
        from .vm import Vm

        self._fd = -1
        call = "GuestMemFd"
        if not isinstance(vm, Vm):
            raise ArgumentTypeError(call, "vm", vm, "a Vm")
        size = page_multiple(size, call, "size", _SIZE_MAX)
        self._vm, self._size, self._flags = vm, size, _uint(call, "flags", flags, 64)
        self._pins: list[str] = []
        self._fd = vm.create_guest_memfd(size, flags)
        self._finalizer = Finalizer(self, _leaked, self._fd)

    @property
    def vm(self) -> Vm:
        """The VM whose memory it is."""
        return self._vm

    @property
    def fd(self) -> int:
        """The file descriptor, which stays this object's.  Raises ClosedError."""
        if self._fd < 0:
            raise ClosedError("GuestMemFd.fd", repr(self))
        return self._fd

    def fileno(self) -> int:
        """The file descriptor, so that os functions take this object."""
        return self.fd

    @property
    def size(self) -> int:
        """Size in bytes, which nothing changes."""
        return self._size

    @property
    def flags(self) -> int:
        """GUEST_MEMFD_FLAG_*, or-ed, as given."""
        return self._flags

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._fd < 0

    def mapping(self, offset: int = 0, size: int | str | None = None, *, prot: int = PROT_READ | PROT_WRITE) -> Mapping:
        """A shared mapping of [offset, offset + size), whole pages; the caller closes it.  `size` None is all the rest.

        `read` and `write` work where the memory is INIT_SHARED, and raise HostError (EFAULT) where it is not; views
        are not to be had, for touching pages that are not there may fail.

        Raises ArgumentError, ArgumentTypeError, ClosedError; HostError of mmap: ENODEV without GUEST_MEMFD_FLAG_MMAP.
        """
        call = "GuestMemFd.mapping"
        offset = index(offset, call, "offset")
        if not 0 <= offset < self._size:
            raise ArgumentError(call, "offset", offset, f"0 <= offset < {self._size:#x}")
        size = page_multiple(self._size - offset if size is None else size, call, "size", self._size - offset)
        fd = self.fd
        if not self._flags & GUEST_MEMFD_FLAG_MMAP:
            accepted = "GUEST_MEMFD_FLAG_MMAP when it is made"
            raise HostError(errno.ENODEV, "mmap", "flags", self._flags, accepted, "this guest_memfd cannot be mapped")
        return Mapping(fd, size, offset=offset, prot=prot)

    def bind(
        self, slot: int, gpa: int, memory: Mapping, *, offset: int = 0, size: int | None = None, flags: int = 0
    ) -> MemSlot:
        """Puts it into memslot `slot` at `gpa` (KVM_SET_USER_MEMORY_REGION2), from its `offset` on.

        `memory` is what backs the pages that the guest shares: all of a `mapping()` of this file, or any other; `size`
        (None: all of `memory`) is that of the slot.  The VM keeps both open until the slot is deleted.

        Errors as of `Vm.set_user_memory_region2`.
        """
        self.fd  # noqa: B018  # ClosedError
        return self._vm.set_user_memory_region2(
            slot, gpa, memory, size=size, flags=flags, guest_memfd=self, guest_memfd_offset=offset
        )

    def allocate(self, offset: int = 0, size: int | None = None) -> None:
        """Allocates the pages of [offset, offset + size) now, as zeros (fallocate FALLOC_FL_KEEP_SIZE).

        Raises ArgumentError, ArgumentTypeError, ClosedError; HostError ENOMEM.
        """
        self._fallocate("allocate", lib.HV_FALLOC_FL_KEEP_SIZE, offset, size)

    def punch(self, offset: int = 0, size: int | None = None) -> None:
        """Frees the pages of [offset, offset + size): they read as zeros next (fallocate FALLOC_FL_PUNCH_HOLE).

        KVM takes them from the guest first.  Raises ArgumentError, ArgumentTypeError, ClosedError.
        """
        self._fallocate("punch", lib.HV_FALLOC_FL_PUNCH_HOLE | lib.HV_FALLOC_FL_KEEP_SIZE, offset, size)

    def _fallocate(self, method: str, mode: int, offset: int, size: int | None) -> None:
        call = f"GuestMemFd.{method}"
        offset = index(offset, call, "offset")
        if offset % PAGE_SIZE or not 0 <= offset < self._size:
            accepted = f"a multiple of {PAGE_SIZE}, 0 <= offset < {self._size:#x}"
            raise ArgumentError(call, "offset", offset, accepted)
        rest = self._size - offset
        size = rest if size is None else index(size, call, "size")
        if size % PAGE_SIZE or not 0 < size <= rest:
            raise ArgumentError(call, "size", size, f"a multiple of {PAGE_SIZE}, 0 < size <= {rest:#x}")
        error = lib.hv_fallocate(self.fd, mode, offset, size)
        if error < 0:
            raise HostError(-error, "fallocate", "offset", offset)

    def pin(self, why: str) -> None:
        """Keeps it from being closed until `unpin(why)`, on behalf of a memslot.  Pins count.  Raises ClosedError."""
        self.fd  # noqa: B018  # ClosedError
        self._pins.append(why)

    def unpin(self, why: str) -> None:
        """Takes back one `pin(why)`.  Raises ArgumentError if there is none."""
        try:
            self._pins.remove(why)
        except ValueError:
            raise ArgumentError("GuestMemFd.unpin", "why", why, f"one of {self._pins}") from None

    def close(self) -> None:
        """Closes the descriptor; mappings of the file live on.  Closing twice is fine.  BusyError while a memslot has
        it: the kernel would take the memory from the guest."""
        if self._fd < 0:
            return
        if self._pins:
            raise BusyError("GuestMemFd.close", repr(self), f"in use by {', '.join(self._pins)}")
        if self._finalizer.detach():
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._fd < 0:
            return "<GuestMemFd closed>"
        return f"GuestMemFd(fd={self._fd}, size={self._size:#x}, flags={self._flags:#x})"

    def __reduce__(self) -> str:
        raise TypeError(f"{self!r} cannot be pickled: it is a file descriptor of this process")
