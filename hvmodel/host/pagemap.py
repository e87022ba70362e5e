"""Page tables as the kernel shows them: `PageMap` owns a descriptor of /proc/PID/pagemap.

A word of it, one for each page of 4096 bytes:

    63       62    61    60 59   58     57       56         55          54                               0
    present  swap  file  0       guard  uffd-wp  exclusive  soft-dirty  page frame number, if present
                                                                        swap offset << 5 | swap type, if swap

file: of a file or shared memory, not anonymous.  exclusive: mapped here and nowhere else.  Page frame numbers read as
0 without CAP_SYS_ADMIN.  Soft-dirty is always 0 on a kernel without CONFIG_MEM_SOFT_DIRTY.

PAGEMAP_SCAN, an ioctl of the same descriptor, finds the pages of some categories and can write-protect them as it goes.

Source: fs/proc/task_mmu.c, Documentation/admin-guide/mm/pagemap.rst@v6.18; mincore(2).
"""

from __future__ import annotations

import errno
import os
from enum import IntFlag

from .._ffi import ffi, lib
from ..errors import ArgumentError, ArgumentTypeError, ClosedError, HostError
from ..finalizer import Finalizer
from ..units import PAGE_SHIFT, PAGE_SIZE, Hva, Pfn
from ..value import Value
from .mapping import index
from .pageframe import open_frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

__all__ = [
    "ADDRESSES",
    "RANGE_MAX",
    "Category",
    "PageCounts",
    "PageEntry",
    "PageMap",
    "PageRegion",
    "Scan",
    "mincore",
    "open_proc",
    "page_range",
]

ADDRESSES = (1 << 47) - PAGE_SIZE
"""Where the addresses of a process end, without five-level paging: TASK_SIZE_MAX of the kernel."""

RANGE_MAX = 1 << 36
"""Bytes that one call looks at, where it tells of each page: 64 GiB; of `PageMap.entries` 1 GiB."""

_ENTRIES_MAX = 1 << 30
_FRAMES = (1 << lib.HV_PM_PFRAME_BITS) - 1
_SWAP_TYPES = (1 << lib.HV_PM_SWAP_TYPE_BITS) - 1

# Bits with a property of their own, as a word's repr names them.
_BITS = {
    "present": lib.HV_PM_PRESENT,
    "swap": lib.HV_PM_SWAP,
    "file": lib.HV_PM_FILE,
    "guard": lib.HV_PM_GUARD_REGION,
    "uffd_wp": lib.HV_PM_UFFD_WP,
    "exclusive": lib.HV_PM_MMAP_EXCLUSIVE,
    "soft_dirty": lib.HV_PM_SOFT_DIRTY,
}

_GONE = "the process has gone, or executed another program"
_MAX_REGIONS = 1024  # of one PAGEMAP_SCAN


class Category(IntFlag):
    """The categories of PAGEMAP_SCAN, PAGE_IS_*.

    WPALLOWED: registered with userfaultfd in mode wp-async.  WRITTEN: not write-protected by it (all pages are where
    nothing is registered).  FILE: of a file or shared memory.  PRESENT.  SWAPPED: a swap entry, be it of the kernel's
    own kind.  PFNZERO: the zero page.  HUGE: mapped by a huge page-table entry.  SOFT_DIRTY.  GUARD (Linux 6.15).
    """

    WPALLOWED = lib.HV_PAGE_IS_WPALLOWED
    WRITTEN = lib.HV_PAGE_IS_WRITTEN
    FILE = lib.HV_PAGE_IS_FILE
    PRESENT = lib.HV_PAGE_IS_PRESENT
    SWAPPED = lib.HV_PAGE_IS_SWAPPED
    PFNZERO = lib.HV_PAGE_IS_PFNZERO
    HUGE = lib.HV_PAGE_IS_HUGE
    SOFT_DIRTY = lib.HV_PAGE_IS_SOFT_DIRTY
    GUARD = lib.HV_PAGE_IS_GUARD


_CATEGORIES = int(sum(Category))  # an IntFlag's complement would be within its members


class PageEntry(Value):
    """One word of a pagemap, decoded.

    >>> PageEntry(0x8180_0000_0000_1234)
    PageEntry(present exclusive soft_dirty pfn=0x1234)
    >>> PageEntry(0x4000_0000_0000_0045).swap_type, PageEntry(0x4000_0000_0000_0045).swap_offset
    (5, 2)
    """

    word: int

    @property
    def present(self) -> bool:
        """Whether the page is in memory and mapped."""
        return bool(self.word >> lib.HV_PM_PRESENT & 1)

    @property
    def swapped(self) -> bool:
        """Whether its bytes are in a swap area."""
        return self.swap_type is not None and self.swap_type < lib.HV_PM_SWAP_AREAS

    @property
    def file(self) -> bool:
        """Whether it belongs to a file or shared memory."""
        return bool(self.word >> lib.HV_PM_FILE & 1)

    @property
    def exclusive(self) -> bool:
        """Whether it is mapped here and nowhere else."""
        return bool(self.word >> lib.HV_PM_MMAP_EXCLUSIVE & 1)

    @property
    def soft_dirty(self) -> bool:
        """Whether it was written since the soft-dirty bits were cleared; never, where the kernel has none."""
        return bool(self.word >> lib.HV_PM_SOFT_DIRTY & 1)

    @property
    def uffd_wp(self) -> bool:
        """Whether userfaultfd has write-protected it."""
        return bool(self.word >> lib.HV_PM_UFFD_WP & 1)

    @property
    def guard(self) -> bool:
        """Whether it is part of a guard region (MADV_GUARD_INSTALL)."""
        return bool(self.word >> lib.HV_PM_GUARD_REGION & 1)

    @property
    def pfn(self) -> Pfn | None:
        """Its page frame number; None where the page is not present, or the kernel hides it from this process."""
        return (Pfn(self.word & _FRAMES) or None) if self.present else None

    @property
    def swap_type(self) -> int | None:
        """The number of its swap area, or, from 23 on, the kind of an entry of the kernel's own; None if present."""
        return self.word & _SWAP_TYPES if self.word >> lib.HV_PM_SWAP & 1 else None

    @property
    def swap_offset(self) -> int | None:
        """Its page in the swap area; None if present."""
        if not self.word >> lib.HV_PM_SWAP & 1:
            return None
        return (self.word & _FRAMES) >> lib.HV_PM_SWAP_TYPE_BITS

    def __repr__(self) -> str:
        said = [name for name, bit in _BITS.items() if self.word >> bit & 1]
        if self.swap_type is not None:
            said += [f"swap_type={self.swap_type}", f"swap_offset={self.swap_offset:#x}"]
        elif self.pfn is not None:
            said.append(f"pfn={self.pfn:#x}")
        return f"PageEntry({' '.join(said) or 'nothing'})"


class PageCounts(Value):
    """How many pages of a range have which bit: see `PageEntry`.

    `marked` are swap entries of the kernel's own, which stand for neither memory nor swap.
    """

    pages: int
    present: int
    swapped: int
    marked: int
    file: int
    exclusive: int
    soft_dirty: int
    uffd_wp: int
    guard: int


class PageRegion(Value):
    """Pages [start, end) in a row that have the same categories."""

    start: Hva
    end: Hva
    categories: Category

    @property
    def nr_pages(self) -> int:
        """How many pages of 4096 bytes it has."""
        return (self.end - self.start) >> PAGE_SHIFT


class Scan(Value):
    """What `PageMap.scan` found: the regions, ascending, and where the walk ended."""

    regions: tuple[PageRegion, ...]
    walk_end: Hva

    @property
    def nr_pages(self) -> int:
        """Pages in all regions."""
        return sum(region.nr_pages for region in self.regions)


def open_proc(call: str, name: str, pid: int | None) -> int:
    """Opens /proc/PID/NAME for reading (pid None: this process); a descriptor of the caller's.

    Raises ArgumentError and ArgumentTypeError, naming `call`; HostError of open: ENOENT where there is no such process,
    ESRCH where it has no memory any more, EACCES or EPERM where this process may not look at it.
    """
    path = f"/proc/self/{name}"
    if pid is not None:
        pid = index(pid, call, "pid", "an int, or None for this process")
        if not 1 <= pid < 1 << 31:
            raise ArgumentError(call, "pid", pid, "the number of a process, from 1, or None for this one")
        path = f"/proc/{pid}/{name}"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        number = error.errno or 0
        detail = accepted = None
        if number in (errno.EACCES, errno.EPERM):
            accepted = "a process of this user that may be traced (ptrace(2)), or CAP_SYS_PTRACE"
        elif number == errno.ESRCH:
            detail, accepted = "it has ended, or is a thread of the kernel", "the number of a process that is alive"
        elif number == errno.ENOENT and pid is not None and not os.path.exists(f"/proc/{pid}"):
            detail, accepted = "there is no such process", "the number of a process that is alive"
        raise HostError(number, "open", "path", path, accepted, detail) from None


def page_range(call: str, hva: int, size: int, most: int = ADDRESSES) -> tuple[int, int]:
    """The range [hva, hva + size), which must be whole pages below `ADDRESSES`, at most `most`; errors name `call`."""
    hva, size = index(hva, call, "hva"), index(size, call, "size")
    if hva % PAGE_SIZE or not 0 <= hva < ADDRESSES:
        raise ArgumentError(call, "hva", hva, f"a multiple of {PAGE_SIZE} from 0, below {ADDRESSES:#x}")
    most = min(most, ADDRESSES - hva)
    if size % PAGE_SIZE or not 0 <= size <= most:
        raise ArgumentError(call, "size", size, f"a multiple of {PAGE_SIZE} from 0 to {most:#x}")
    return hva, size


def _leaked(fd: int, pid: int | None) -> None:
    # The finalizer of a PageMap that nobody closed.
    import warnings

    os.close(fd)
    warnings.warn(f"unclosed PageMap(pid={pid}, fd={fd})", ResourceWarning, stacklevel=2)


class PageMap:
    """The page tables of process `pid` (None: this one); owns a descriptor of its pagemap.

    It looks at the addresses that the process had when this was made: in a child of os.fork still at the parent's, and
    not at those after an execve.  Ranges are whole pages, at most 64 GiB (of `scan` any number); what is not mapped
    reads as pages that are not present.

    Raises ArgumentError, ArgumentTypeError; HostError of open: ENOENT (no such process), ESRCH (it has ended), EACCES
    or EPERM (not to be looked at).  The methods raise HostError ESRCH once the process has gone, and ClosedError.

    Calls: open(2), pread(2), ioctl(2) PAGEMAP_SCAN.
    Threads: any, but for `close`, which must not race with another method.

    >>> from hvmodel.host import Mapping
    >>> with Mapping(None, "16K") as memory, PageMap() as pages:
    ...     memory.write(0x1000, b"touched")
    ...     [entry.present for entry in pages.entries(memory.hva, memory.size)]
    [False, True, False, False]
    """

    __slots__ = ("__weakref__", "_fd", "_finalizer", "_pid")

    def __init__(self, pid: int | None = None) -> None:
        self._fd = -1
        self._fd = open_proc("PageMap", "pagemap", pid)
        self._pid = pid
        self._finalizer = Finalizer(self, _leaked, self._fd, pid)

    @property
    def pid(self) -> int | None:
        """The process, as given."""
        return self._pid

    @property
    def fd(self) -> int:
        """The descriptor, which stays this object's.  Raises ClosedError."""
        if self._fd < 0:
            raise ClosedError("PageMap.fd", f"PageMap(pid={self._pid})")
        return self._fd

    def fileno(self) -> int:
        """The descriptor, so that os functions take this object."""
        return self.fd

    def words(self, hva: int, size: int) -> memoryview:
        """The undecoded words of [hva, hva + size), one per page, as a memoryview of 64-bit integers (format "Q")."""
        fd = self.fd
        hva, size = page_range("PageMap.words", hva, size, RANGE_MAX)
        words = bytearray(size // PAGE_SIZE * 8)
        self._check("pread", lib.hv_pagemap_read(fd, hva, size, ffi.from_buffer(words)))
        return memoryview(words).cast("Q")

    def entries(self, hva: int, size: int) -> list[PageEntry]:
        """The entries of the pages of [hva, hva + size), at most 1 GiB; see `words` and `count` where that is many."""
        hva, size = page_range("PageMap.entries", hva, size, _ENTRIES_MAX)
        return [PageEntry(word) for word in self.words(hva, size)]

    def entry(self, hva: int) -> PageEntry:
        """The entry of the page that address `hva` lies in."""
        hva = index(hva, "PageMap.entry", "hva")
        if not 0 <= hva < ADDRESSES:
            raise ArgumentError("PageMap.entry", "hva", hva, f"0 <= hva < {ADDRESSES:#x}")
        return PageEntry(self.words(hva & -PAGE_SIZE, PAGE_SIZE)[0])

    def count(self, hva: int, size: int) -> PageCounts:
        """How many pages of [hva, hva + size) have which bit; counted in C, with the GIL released."""
        fd = self.fd
        hva, size = page_range("PageMap.count", hva, size, RANGE_MAX)
        counts = ffi.new("struct hv_page_counts *")
        self._check("pread", lib.hv_pagemap_count(fd, hva, size, counts))
        return PageCounts(size // PAGE_SIZE, *(getattr(counts, field) for field in PageCounts.fields()[1:]))

    def pss(self, hva: int, size: int) -> float:
        """The proportional set size of [hva, hva + size) in bytes: each page divided by how often it is mapped.

        Raises HostError EPERM without CAP_SYS_ADMIN, which /proc/kpagecount and page frame numbers take.
        """
        fd = self.fd
        hva, size = page_range("PageMap.pss", hva, size, RANGE_MAX)
        count_fd = open_frames("kpagecount")
        try:
            found = lib.hv_pagemap_pss(fd, count_fd, hva, size)
        finally:
            os.close(count_fd)
        self._check("pread", found)
        return float(found / 4096)

    def scan(
        self,
        start: int,
        end: int,
        *,
        mask: int = 0,
        anyof: int = 0,
        inverted: int = 0,
        returned: int | None = None,
        max_pages: int = 0,
        write_protect: bool = False,
        check_wp_async: bool = False,
    ) -> Scan:
        """The pages of [start, end) that match, as regions of equal categories (PAGEMAP_SCAN, Linux 6.7).

        A page matches if it has all categories of `mask` and, where `anyof` is not 0, one of `anyof`; those in
        `inverted` count as had where the page does not have them.  `returned` are the categories that the regions tell
        of (None: all that `mask`, `anyof` and `inverted` name, or all there are if those are 0).  `max_pages` ends the
        walk once so many pages were found; 0 is no limit.  Where nothing is mapped nothing is found.

        `write_protect` also write-protects the pages found (PM_SCAN_WP_MATCHING), in ranges that are registered with
        userfaultfd in mode wp-async; so that with mask=Category.WRITTEN each call finds what was written since the one
        before.  Other ranges are left out, or refused with EPERM with `check_wp_async` (PM_SCAN_CHECK_WPASYNC).

        Raises ArgumentError, ArgumentTypeError, ClosedError; HostError of ioctl: ENOTTY (Linux before 6.7), EINVAL (a
        category that this kernel does not have), EPERM, ESRCH.
        """
        fd, call = self.fd, "PageMap.scan"
        start, end = index(start, call, "start"), index(end, call, "end")
        for field, address, least in (("start", start, 0), ("end", end, start)):
            if address % PAGE_SIZE or not least <= address <= ADDRESSES:
                accepted = f"a multiple of {PAGE_SIZE}, 0 <= start <= end <= {ADDRESSES:#x}"
                raise ArgumentError(call, field, address, accepted)
        masks = {"mask": mask, "anyof": anyof, "inverted": inverted}
        if returned is not None:
            masks["returned"] = returned
        for field, value in masks.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(call, field, value, "a Category")
            if value & ~_CATEGORIES:
                raise ArgumentError(call, field, value, f"a combination of {Category(_CATEGORIES)!r}")
        max_pages = index(max_pages, call, "max_pages")
        if not 0 <= max_pages < 1 << 63:
            raise ArgumentError(call, "max_pages", max_pages, "0 (no limit) <= max_pages < 2**63")
        named = mask | anyof | inverted
        wanted = int(returned if returned is not None else named)
        vector = ffi.new("struct hv_page_region[]", _MAX_REGIONS)
        arg = ffi.new("struct hv_pm_scan_arg *")
        arg.size = ffi.sizeof("struct hv_pm_scan_arg")
        arg.flags = write_protect * lib.HV_PM_SCAN_WP_MATCHING | check_wp_async * lib.HV_PM_SCAN_CHECK_WPASYNC
        arg.start, arg.end = start, end
        arg.vec, arg.vec_len = int(ffi.cast("uintptr_t", vector)), _MAX_REGIONS
        arg.category_mask, arg.category_anyof_mask, arg.category_inverted = mask, anyof, inverted
        arg.return_mask = wanted if returned is not None or named else _known_categories(fd)
        found: list[tuple[int, int, int]] = []
        pages = 0
        while arg.start < arg.end:
            arg.max_pages = max_pages - pages if max_pages else 0
            nr = lib.hv_pagemap_scan(fd, arg)
            if nr < 0:
                raise _scan_error(-nr, self._path, named | wanted)
            for region in vector[0:nr]:
                pages += (region.end - region.start) >> PAGE_SHIFT
                # The kernel joins neighbours within one call; here those of two calls are joined.
                if found and found[-1][1] == region.start and found[-1][2] == region.categories:
                    found[-1] = (found[-1][0], region.end, region.categories)
                else:
                    found.append((region.start, region.end, region.categories))
            # The part of a huge page that reaches out of the range is not write-protected: the walk stands still there.
            if (not nr and arg.walk_end == arg.start) or (max_pages and pages >= max_pages):
                break
            arg.start = arg.walk_end
        regions = tuple(PageRegion(Hva(first), Hva(last), Category(bits)) for first, last, bits in found)
        return Scan(regions, Hva(arg.walk_end if start < end else start))

    def _check(self, call: str, result: int) -> None:
        if result == -errno.ESRCH:
            raise HostError(errno.ESRCH, call, "path", self._path, None, _GONE)
        if result == -errno.EPERM:
            raise HostError(errno.EPERM, call, "path", self._path, "CAP_SYS_ADMIN", "page frame numbers are hidden")
        if result < 0:
            raise HostError(-result, call, "path", self._path)

    @property
    def _path(self) -> str:
        return f"/proc/{'self' if self._pid is None else self._pid}/pagemap"

    def close(self) -> None:
        """Closes the descriptor.  Closing twice is fine."""
        if self._fd >= 0 and self._finalizer.detach():
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._fd < 0:
            return "<PageMap closed>"
        return f"PageMap(pid={self._pid}, fd={self._fd})"

    def __reduce__(self) -> str:
        raise TypeError(f"{self!r} cannot be copied or pickled: it owns a file descriptor of this process")


# All categories that this kernel has: it refuses a return_mask with another, even for an empty range.
def _known_categories(fd: int) -> int:
    arg = ffi.new("struct hv_pm_scan_arg *")
    arg.size = ffi.sizeof("struct hv_pm_scan_arg")
    arg.return_mask = _CATEGORIES
    while arg.return_mask and lib.hv_pagemap_scan(fd, arg) == -errno.EINVAL:
        arg.return_mask >>= 1  # the newest is the highest
    return arg.return_mask


def _scan_error(number: int, path: str, categories: int) -> HostError:
    # Which field a refusal of PAGEMAP_SCAN means; what can be known beforehand was checked.
    if number == errno.ENOTTY:
        return HostError(number, "ioctl(PAGEMAP_SCAN)", None, None, "Linux 6.7 or later")
    if number == errno.EINVAL:
        return HostError(
            number, "ioctl(PAGEMAP_SCAN)", "categories", Category(categories), "categories that this kernel has"
        )
    if number == errno.EPERM:
        accepted = "a range all of which is registered with userfaultfd in mode wp-async"
        return HostError(number, "ioctl(PAGEMAP_SCAN)", "check_wp_async", True, accepted)
    if number == errno.ESRCH:
        return HostError(number, "ioctl(PAGEMAP_SCAN)", "path", path, None, _GONE)
    return HostError(number, "ioctl(PAGEMAP_SCAN)")


def mincore(hva: int, size: int) -> bytes:
    """One byte for each page of [hva, hva + size) of this process: 1 where touching it needs no I/O, else 0.

    For memory of a file that is whether the page is in the page cache, mapped or not; for anonymous memory whether it
    is there.  Of a file that this user may not write all pages read as 1.

    Raises ArgumentError, ArgumentTypeError; HostError of mincore: ENOMEM where part of the range is not mapped.
    Threads: any.

    >>> from hvmodel.host import Mapping
    >>> with Mapping(None, "16K") as memory:
    ...     memory.write(0x1000, b"touched")
    ...     mincore(memory.hva, memory.size)
    b'\\x00\\x01\\x00\\x00'
    """
    hva, size = page_range("mincore", hva, size, RANGE_MAX)
    found = bytearray(size // PAGE_SIZE)
    error = lib.hv_mincore(hva, size, ffi.from_buffer(found)) if size else 0
    if error == -errno.ENOMEM:
        raise HostError(errno.ENOMEM, "mincore", "hva", hva, "a range all of which is mapped")
    if error < 0:
        raise HostError(-error, "mincore", "hva", hva)
    return bytes(byte & 1 for byte in found)
