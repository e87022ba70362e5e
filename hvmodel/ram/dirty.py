"""Which pages the host has written: `HostDirty` owns one byte per page.

KVM's dirty log sees what the guest writes, never what this process writes into guest memory.  So everything here that
writes leaves a mark, and whoever restores or migrates takes the marks.  A byte and not a bit, because a byte is set by
a plain store, from C and from any thread, without a lock.
"""

from __future__ import annotations

from ..units import PAGE_SHIFT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from mmap import mmap

__all__ = ["HostDirty", "merge", "pages_of"]


_MANY = 1 << 24  # pages (64 GiB of RAM): a bytearray touches all of its bytes, and memory from mmap none


def _lazy(nr_pages: int) -> mmap:
    from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

    return mmap(-1, nr_pages, MAP_PRIVATE | MAP_ANONYMOUS)


def merge(ranges: Iterable[range]) -> list[range]:
    """The same pages as disjoint ranges in ascending order, none touching the next.

    >>> merge([range(4, 6), range(0, 2), range(5, 9), range(2, 3)])
    [range(0, 3), range(4, 9)]
    """
    merged: list[range] = []
    for pages in sorted(ranges, key=lambda pages: pages.start):
        if merged and pages.start <= merged[-1].stop:
            if pages.stop > merged[-1].stop:
                merged[-1] = range(merged[-1].start, pages.stop)
        else:
            merged.append(pages)
    return merged


def pages_of(offset: int, size: int) -> range:
    """Indexes of the pages that have a byte of [offset, offset + size).

    >>> pages_of(0xFFF, 2)
    range(0, 2)
    """
    if not size:
        return range(0)
    return range(offset >> PAGE_SHIFT, ((offset + size - 1) >> PAGE_SHIFT) + 1)


class HostDirty:
    """Marks for `nr_pages` pages.  Threads: any; a mark made during a `take` is in its answer, or in the next one's.

    >>> dirty = HostDirty(16)
    >>> dirty.mark(0x1000, 0x2001)
    >>> dirty.take(), dirty.ranges()
    ([range(1, 4)], [])
    """

    __slots__ = ("marks",)

    def __init__(self, nr_pages: int) -> None:
        self.marks: bytearray | mmap = bytearray(nr_pages) if nr_pages < _MANY else _lazy(nr_pages)
        """One byte per page, 1 where the host has written; never resized, so that C may hold its address."""

    def mark(self, offset: int, size: int) -> None:
        """Marks the pages that have a byte of [offset, offset + size)."""
        # On the way of every write: one store for one page, one memcpy for many.
        if size:
            first, last = offset >> PAGE_SHIFT, (offset + size - 1) >> PAGE_SHIFT
            if first == last:
                self.marks[first] = 1
            else:
                self.marks[first : last + 1] = b"\1" * (last + 1 - first)

    def ranges(self) -> list[range]:
        """The marked pages: ranges of page indexes, ascending, disjoint."""
        return self._scan(False)

    def take(self) -> list[range]:
        """The marked pages as `ranges` gives them, whose marks are taken off."""
        return self._scan(True)

    # A run of marks is found, and taken off, by three calls of C's memory functions.
    def _scan(self, take: bool) -> list[range]:
        marks, found, first = self.marks, [], 0
        while (first := marks.find(b"\1", first)) >= 0:
            end = marks.find(b"\0", first)
            if end < 0:
                end = len(marks)
            if take:
                marks[first:end] = bytes(end - first)
            found.append(range(first, end))
            first = end
        return found
