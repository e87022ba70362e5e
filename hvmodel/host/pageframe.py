"""Page frames: what the kernel tells of one, wherever it is mapped.

    /proc/kpagecount   how often it is mapped
    /proc/kpageflags   the state it is in

Both take root.  A page's frame is `PageEntry.pfn` of hvmodel.host.pagemap.

Source: fs/proc/page.c, Documentation/admin-guide/mm/pagemap.rst@v6.18.
"""

from __future__ import annotations

import errno
import os
from enum import IntFlag

from .._ffi import lib
from ..errors import ArgumentError, HostError
from .mapping import index

__all__ = ["PageFlags", "kpagecount", "kpageflags", "open_frames"]


class PageFlags(IntFlag):
    """The state of a page frame, as /proc/kpageflags has it: KPF_* of include/uapi/linux/kernel-page-flags.h.

    Bits from 32 on are for the kernel's developers and have no name here.
    """

    LOCKED = 1 << lib.HV_KPF_LOCKED
    ERROR = 1 << lib.HV_KPF_ERROR
    REFERENCED = 1 << lib.HV_KPF_REFERENCED
    UPTODATE = 1 << lib.HV_KPF_UPTODATE
    DIRTY = 1 << lib.HV_KPF_DIRTY
    LRU = 1 << lib.HV_KPF_LRU
    ACTIVE = 1 << lib.HV_KPF_ACTIVE
    SLAB = 1 << lib.HV_KPF_SLAB
    WRITEBACK = 1 << lib.HV_KPF_WRITEBACK
    RECLAIM = 1 << lib.HV_KPF_RECLAIM
    BUDDY = 1 << lib.HV_KPF_BUDDY
    MMAP = 1 << lib.HV_KPF_MMAP
    ANON = 1 << lib.HV_KPF_ANON
    SWAPCACHE = 1 << lib.HV_KPF_SWAPCACHE
    SWAPBACKED = 1 << lib.HV_KPF_SWAPBACKED
    COMPOUND_HEAD = 1 << lib.HV_KPF_COMPOUND_HEAD
    COMPOUND_TAIL = 1 << lib.HV_KPF_COMPOUND_TAIL
    HUGE = 1 << lib.HV_KPF_HUGE
    UNEVICTABLE = 1 << lib.HV_KPF_UNEVICTABLE
    HWPOISON = 1 << lib.HV_KPF_HWPOISON
    NOPAGE = 1 << lib.HV_KPF_NOPAGE
    KSM = 1 << lib.HV_KPF_KSM
    THP = 1 << lib.HV_KPF_THP
    OFFLINE = 1 << lib.HV_KPF_OFFLINE
    ZERO_PAGE = 1 << lib.HV_KPF_ZERO_PAGE
    IDLE = 1 << lib.HV_KPF_IDLE
    PGTABLE = 1 << lib.HV_KPF_PGTABLE


def open_frames(name: str) -> int:
    """Opens /proc/NAME, "kpagecount" or "kpageflags": a word of 64 bits for each page frame; the caller's to close.

    Raises HostError of open: EACCES, EPERM without CAP_SYS_ADMIN.
    """
    path = f"/proc/{name}"
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        accepted = "root (CAP_SYS_ADMIN)" if error.errno in (errno.EACCES, errno.EPERM) else None
        raise HostError(error.errno or 0, "open", "path", path, accepted) from None


def _read_page(call: str, pfn: int) -> int:
    # The word of a page frame in /proc/`call`.
    pfn = index(pfn, call, "pfn", "a page frame number")
    if not 0 <= pfn < 1 << 52:
        raise ArgumentError(call, "pfn", pfn, "0 <= pfn < 2**52")
    fd = open_frames(call)
    try:
        word = os.pread(fd, 8, pfn * 8)
    except OSError as error:
        raise HostError(error.errno or 0, "pread", "pfn", pfn) from None
    finally:
        os.close(fd)
    if len(word) < 8:
        raise ArgumentError(call, "pfn", pfn, "a page frame below the end of this host's memory")
    return int.from_bytes(word, "little")


def kpagecount(pfn: int) -> int:
    """How often page frame `pfn` is mapped, by all processes (/proc/kpagecount).

    Raises ArgumentError, ArgumentTypeError; HostError of open: EACCES, EPERM without CAP_SYS_ADMIN.  Threads: any.
    """
    return _read_page("kpagecount", pfn)


def kpageflags(pfn: int) -> PageFlags:
    """The state of page frame `pfn` (/proc/kpageflags).

    Some bits lag behind: LRU is set once a batch of 31 pages was moved to the lists.

    Raises ArgumentError, ArgumentTypeError; HostError of open: EACCES, EPERM without CAP_SYS_ADMIN.  Threads: any.
    """
    return PageFlags(_read_page("kpageflags", pfn))
