"""Registrations: ranges of mappings whose faults go to a userfaultfd, and what they hold while they do.

Owns the record of which mappings can make a reader wait and which are read by handlers in C; each `Range` owns a pin
of its mapping and the mark that keeps views out; a `State` owns all that a UserFaultFd has to undo.
"""

from __future__ import annotations

import os
from _thread import RLock

from .._ffi import ffi, lib
from ..errors import BusyError
from ..value import Value
from .advice import GUARDED
from .changes import Bar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Thread

    from .._native import hv_uffd
    from .mapping import Mapping

__all__ = [
    "WRITTEN",
    "Poisoned",
    "Range",
    "Registration",
    "State",
    "release_source",
    "take_source",
    "tell_written",
    "whole",
]

WRITTEN = 0
"""Which pages `State.take` gives: those that the thread in C let be written."""
_FILLED, _GUARDED, _BARRED = 1, 2, 3

# id(mapping) -> how many ranges of it can make a reader wait, and how many handlers in C read from it: never both, for
# a handler that waits for another, or itself, is a deadlock.
_table_lock = RLock()
_waiting: dict[int, int] = {}
_sources: dict[int, int] = {}


def _renew_lock() -> None:
    # In a child of fork nobody would release it.
    global _table_lock
    _table_lock = RLock()


os.register_at_fork(after_in_child=_renew_lock)


class Registration(Value):
    """A range that is registered: [offset, offset + size) of `mapping`, its modes, and the ioctls it allows by name."""

    mapping: Mapping
    offset: int
    size: int
    modes: tuple[str, ...]
    ioctls: tuple[str, ...]


class Poisoned(Bar):
    """Pages that were poisoned: touching one is SIGBUS even for KVM, so `Vm` takes no memory with such a mark."""

    __slots__ = ()
    signals = True


class Range:
    """A registration, and what it holds: a pin and, where it can wait, the mark that keeps views out."""

    __slots__ = ("end", "holds", "ioctls", "mapping", "modes", "offset", "page_size", "size", "start", "why")

    def __init__(self, mapping: Mapping, offset: int, size: int, modes: tuple[str, ...], fd: int) -> None:
        self.mapping, self.offset, self.size, self.modes = mapping, offset, size, modes
        self.start = mapping.hva + offset
        self.end = self.start + size
        self.page_size = mapping.page_size
        self.ioctls: tuple[str, ...] = ()
        self.why = f"registered with UserFaultFd fd={fd} ({', '.join(modes)})"
        self.holds: list[Callable[[], None]] = []  # in the order in which they were taken

    @property
    def waits(self) -> bool:
        """Whether who touches it may have to wait."""
        return self.modes != ("wp-async",)

    def hold(self) -> None:
        """Takes what it holds, one after the other; `let_go` undoes what was taken when one is refused."""
        mapping = self.mapping
        mapping.pin(self.why)
        self.holds.append(lambda: mapping.unpin(self.why))
        if self.waits:
            token = mapping._forbid(self.offset, self.size, self.why)
            self.holds.append(lambda: mapping._allow(token))
            if self.modes != ("wp",):
                _enter(_waiting, mapping, _sources, "it is the source of a handler in C, which would wait for itself")
                self.holds.append(lambda: _leave(_waiting, mapping))

    def let_go(self) -> None:
        """Gives back what it holds, the last first."""
        while self.holds:
            self.holds.pop()()


def _enter(table: dict[int, int], mapping: Mapping, other: dict[int, int], why: str) -> None:
    with _table_lock:
        busy = id(mapping) in other
        if not busy:
            table[id(mapping)] = table.get(id(mapping), 0) + 1
    if busy:
        raise BusyError("UserFaultFd", repr(mapping), why)


def _leave(table: dict[int, int], mapping: Mapping) -> None:
    with _table_lock:
        table[id(mapping)] -= 1
        if not table[id(mapping)]:
            del table[id(mapping)]


class State:
    """What is to be undone when nobody has closed a UserFaultFd: it outlives that, in its finalizer."""

    __slots__ = ("fd", "native", "pid", "ranges", "server", "source", "thread")

    def __init__(self, native: hv_uffd, fd: int) -> None:
        self.native, self.fd, self.pid = native, fd, os.getpid()
        self.ranges: list[Range] = []
        self.thread: Thread | None = None  # serves in Python
        self.server = ""  # what serves, in words
        self.source: list[Callable[[], None]] = []  # what the handler in C holds

    def unregister(self, range_: Range) -> int:
        """Ends a range, and its waiters go on; -errno where the kernel refuses.

        What the thread filled in is told to the mapping, as what the host wrote.
        """
        error: int = lib.hv_uffd_unregister(self.native, range_.start, range_.size)
        if error < 0:
            return error
        self._end_range(range_)
        return 0

    def _end_range(self, range_: Range) -> None:
        self.ranges.remove(range_)
        self.note_filled(range_)
        mapping = range_.mapping
        if range_.waits:
            for which, why in ((_GUARDED, GUARDED), (_BARRED, "its faults were given up")):
                for first, last in self.take(range_, which):
                    mapping._forbid(first, last - first, why)
        lib.hv_uffd_forget(self.native, range_.start)
        range_.let_go()

    def take(self, range_: Range, which: int) -> list[tuple[int, int]]:
        """[first, last) in the mapping of each run of pages whose bit is set; the bits are cleared."""
        bits = bytearray((range_.size // range_.page_size + 63) // 64 * 8)
        lib.hv_uffd_take(self.native, range_.start, which, ffi.from_buffer("uint8_t[]", bits), len(bits))
        return [
            (range_.offset + first * range_.page_size, range_.offset + last * range_.page_size)
            for first, last in _runs(bits)
        ]

    def note_filled(self, range_: Range) -> None:
        """Tells the mapping what the thread has brought in."""
        for first, last in self.take(range_, _FILLED) if range_.waits else ():
            tell_written(range_.mapping, first, last - first)

    def stop(self) -> None:
        """Ends serving, but for the thread of Python, which still has to come back."""
        lib.hv_uffd_stop(self.native)
        self.server = ""
        for range_ in self.ranges:
            self.note_filled(range_)
        while self.source:
            self.source.pop()()

    def end(self) -> None:
        """Ends everything; of a child of fork, its copies of the descriptors."""
        if os.getpid() != self.pid:
            # A child of fork, whose memory is not registered.  Which pages were poisoned nobody can tell: the marks
            # that keep views out, each a range's second hold, stay.
            for range_ in self.ranges:
                del range_.holds[1:2]
                range_.let_go()
            self.ranges = []
            while self.source:
                self.source.pop()()
        else:
            self.stop()
            for range_ in self.ranges[:]:
                if self.unregister(range_) < 0:
                    self._end_range(range_)
        lib.hv_uffd_close(self.native)


def tell_written(mapping: Mapping, offset: int, size: int) -> None:
    """Marks a range as written by the host, for a mapping that wants to know."""
    written = mapping._written
    if written is not None:
        written(offset, size)


def _runs(bits: bytearray) -> list[tuple[int, int]]:
    # [first, last) of each run of ones, bit 0 of byte 0 first.
    runs: list[tuple[int, int]] = []
    for at, word in enumerate(memoryview(bits).cast("Q")):
        start = 64 * at
        while word:
            zeros = (word & -word).bit_length() - 1
            word >>= zeros  # noqa: PLW2901
            ones = (~word & (word + 1)).bit_length() - 1
            word >>= ones  # noqa: PLW2901
            start += zeros
            if runs and runs[-1][1] == start:
                runs[-1] = runs[-1][0], start + ones
            else:
                runs.append((start, start + ones))
            start += ones
    return runs


def whole(ranges: list[Range]) -> str:
    """The ranges as text, for errors."""
    shown = [f"[{r.offset:#x}, {r.offset + r.size:#x})" for r in ranges]
    return ", ".join(shown) if shown else "none, nothing of this mapping is registered"


def take_source(mapping: Mapping, why: str) -> None:
    """Notes that a handler reads from `mapping`; BusyError with `why` where that could make it wait."""
    _enter(_sources, mapping, _waiting, why)


def release_source(mapping: Mapping) -> None:
    """Takes back one `take_source`."""
    _leave(_sources, mapping)
