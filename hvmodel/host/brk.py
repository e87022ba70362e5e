"""The program break: where the heap ends that brk(2) and sbrk(3) move.

    |<- data of the program ->|   gap   |<----- [heap] ----->|
                                        start                current(), rounded up to a page in /proc/PID/maps

malloc uses it for small pieces, so this process's own break is only looked at.  `moves_in_child` shows what a change
does in a child of fork(2), which ends at once.

Source: mm/mmap.c, SYSCALL_DEFINE1(brk)@v6.18; brk(2).
"""

from __future__ import annotations

import errno
import resource

from .._ffi import ffi, lib
from ..errors import ArgumentError, HostError
from ..units import Hva
from ..value import Value
from .mapping import index

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Heap", "Move", "current", "heap", "moves_in_child"]

_MAX_MOVES = 1024
_START_BRK = 47  # its field in /proc/PID/stat, counted from 1: proc_pid_stat(5)


class Heap(Value):
    """The heap of this process: [start, current), in which `limit` bytes would be allowed (RLIMIT_DATA, which counts
    all private writable memory), or None where there is no limit."""

    start: Hva
    current: Hva
    limit: int | None

    @property
    def size(self) -> int:
        """Bytes from start to break."""
        return self.current - self.start


class Move(Value):
    """One change of the break: it was `before`, `asked` was asked for, the kernel answered `after`.

    `below_mapped`: whether the last byte below the break was mapped then; `above_mapped`: whether the first whole page
    above it was.  A refused change leaves `after` equal to `before`; the system call itself has no errors, sbrk(3)
    makes ENOMEM of it.
    """

    before: Hva
    asked: Hva
    after: Hva
    below_mapped: bool
    above_mapped: bool

    @property
    def done(self) -> bool:
        """Whether the break went where it was asked to."""
        return self.after == self.asked


def current() -> Hva:
    """The program break of this process: brk(2) with address 0, which changes nothing; what sbrk(0) returns.

    Threads: any; another thread's malloc may move it.
    """
    return Hva(lib.hv_brk_current())


def heap() -> Heap:
    """Where the heap of this process begins and ends.

    >>> 0 < heap().start <= heap().current
    True
    """
    with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
        words = file.read().rpartition(")")[2].split()  # the fields from the third on
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return Heap(Hva(int(words[_START_BRK - 3])), current(), None if limit == resource.RLIM_INFINITY else limit)


def moves_in_child(increments: Iterable[int]) -> list[Move]:
    """What each of sbrk(increment), one after the other, does in a child of fork(2); the child ends then.

    The child makes nothing but system calls, so that other threads do no harm.  This process's break stays.

    Raises ArgumentError for more than 1024 increments and for those out of 64 bits, ArgumentTypeError; HostError of
    fork (EAGAIN, ENOMEM) and pipe2 (EMFILE, ENFILE), and EPIPE where the child was killed.

    >>> up, down = moves_in_child([0x10000, -0x10000])
    >>> up.done, up.after - up.before, down.after == up.before
    (True, 65536, True)
    """
    call = "moves_in_child"
    wanted = [index(each, call, "increments", "ints: bytes, negative ones shrink") for each in increments]
    if len(wanted) > _MAX_MOVES:
        raise ArgumentError(call, "increments", len(wanted), f"at most {_MAX_MOVES} of them")
    for each in wanted:
        if not -(1 << 63) <= each < 1 << 63:
            raise ArgumentError(call, "increments", each, "-2**63 <= increment < 2**63")
    if not wanted:
        return []
    steps = ffi.new("struct hv_brk_step[]", len(wanted))
    done = lib.hv_brk_child(ffi.new("int64_t[]", wanted), len(wanted), steps)
    if done < 0:
        raise HostError(-done, "pipe2" if -done in (errno.EMFILE, errno.ENFILE) else "fork")
    if done < len(wanted):
        raise HostError(
            errno.EPIPE, "fork", "increments", done, None, f"the child ended after {done} of {len(wanted)} changes"
        )
    return [
        Move(Hva(step.before), Hva(step.asked), Hva(step.after), bool(step.below), bool(step.above)) for step in steps
    ]
