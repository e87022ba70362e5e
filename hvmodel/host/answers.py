"""Answers to page faults: how pages come into ranges that are registered with a userfaultfd, and how their write
protection is put and lifted; the half of `UserFaultFd` that has the ioctls.  Who is answered, and when:
hvmodel.host.userfaultfd.

    copy, copy_from   UFFDIO_COPY          zeropage       UFFDIO_ZEROPAGE       continue_   UFFDIO_CONTINUE
    move              UFFDIO_MOVE          writeprotect   UFFDIO_WRITEPROTECT   poison      UFFDIO_POISON
    take_written      PAGEMAP_SCAN, or what the thread in C has noted           wake        UFFDIO_WAKE

Source: mm/userfaultfd.c@v6.18; ioctl_userfaultfd(2).
"""

from __future__ import annotations

import errno
import os
from _thread import RLock

from .._ffi import ffi, lib
from ..errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, ForkedError, HostError, HvError
from .faults import refused
from .mapping import Mapping, index
from .registered import WRITTEN, Poisoned, State, release_source, take_source, tell_written, whole

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from typing_extensions import Buffer

__all__ = ["Answers", "Question", "whole_range"]


class Question:
    """The page that a handler is asked for, and what has become of it meanwhile."""

    __slots__ = ("address", "answered", "size", "withdrawn")

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size = address, size
        self.answered = self.withdrawn = False


class Answers:
    """What `UserFaultFd` is made of; not for use alone.  Threads: any."""

    __slots__ = ("_features", "_lock", "_question", "_state")

    _features: int
    _lock: RLock  # ranges and serving change in one step
    _question: Question | None  # of the handler in Python, while it is asked
    _state: State | None  # None once closed

    def copy(self, mapping: Mapping, offset: int, data: Buffer, *, wp: bool = False, wake: bool = True) -> None:
        """Brings in missing pages with the bytes of `data`, whole pages, at `offset` (UFFDIO_COPY).

        `wp`: they come in under write protection.  `wake` False leaves those who wait to a later `wake`.  The bytes
        count as written by the host.

        Raises ArgumentError, ArgumentTypeError, ClosedError; HostError: EEXIST (a page is there already), ENOENT,
        ENOMEM, ENOSPC; `offset` says which page, those before it are in.
        """
        call = "UserFaultFd.copy"
        try:
            view = memoryview(data)
            if not view.c_contiguous:
                raise BufferError
        except (TypeError, ValueError, BufferError):
            raise ArgumentTypeError(call, "data", data, "bytes or a C-contiguous buffer") from None
        state, address, size = self._span(call, mapping, offset, view.nbytes, "len(data)")
        source = ffi.from_buffer(data)
        try:
            self._fill(
                "UFFDIO_COPY",
                mapping,
                offset,
                lambda done: lib.hv_uffd_copy(state.native, address, source, size, _bits(wake, wp), done),
                size,
            )
        finally:
            ffi.release(source)

    def copy_from(
        self,
        mapping: Mapping,
        offset: int,
        source: Mapping,
        source_offset: int,
        size: int,
        *,
        wp: bool = False,
        wake: bool = True,
    ) -> None:
        """As `copy`, with the bytes [source_offset, source_offset + size) of another mapping; HostError EFAULT where
        they cannot be read."""
        call = "UserFaultFd.copy_from"
        if not isinstance(source, Mapping):
            raise ArgumentTypeError(call, "source", source, "a Mapping")
        source_offset, size = source._range("read", source_offset, size)
        state, address, size = self._span(call, mapping, offset, size)
        why = f"{call} reads from it"
        take_source(source, "its own faults would have to be answered first")
        try:
            source.pin(why)
            try:
                self._fill(
                    "UFFDIO_COPY",
                    mapping,
                    offset,
                    lambda done: lib.hv_uffd_copy_from(
                        state.native, address, source.hva + source_offset, size, _bits(wake, wp), done
                    ),
                    size,
                )
            finally:
                source.unpin(why)
        finally:
            release_source(source)

    def zeropage(self, mapping: Mapping, offset: int, size: int, *, wake: bool = True) -> None:
        """Brings in missing pages of zeros (UFFDIO_ZEROPAGE; hugetlb does not have it).  Errors as of `copy`."""
        state, address, size = self._span("UserFaultFd.zeropage", mapping, offset, size)
        self._fill(
            "UFFDIO_ZEROPAGE",
            mapping,
            offset,
            lambda done: lib.hv_uffd_zeropage(state.native, address, size, _bits(wake), done),
            size,
        )

    def continue_(self, mapping: Mapping, offset: int, size: int, *, wp: bool = False, wake: bool = True) -> None:
        """Maps the pages that the file has (UFFDIO_CONTINUE), which answers minor faults.

        Raises as `copy`; HostError EFAULT where the file has no page.
        """
        state, address, size = self._span("UserFaultFd.continue_", mapping, offset, size)
        self._fill(
            "UFFDIO_CONTINUE",
            None,
            offset,
            lambda done: lib.hv_uffd_continue(state.native, address, size, _bits(wake, wp), done),
            size,
            mapping,
        )

    def poison(self, mapping: Mapping, offset: int, size: int, *, wake: bool = True) -> None:
        """Makes every access to pages that are missing fail (UFFDIO_POISON, Linux 6.6): for contents that are lost.

        `Mapping.read` and `write` raise HostError (EFAULT) there; a guest gets what it gets for memory that is not
        there.  `copy` and `continue_` bring such a page in all the same; views stay refused.

        To a vCPU that runs natively the kernel would send SIGBUS (as for a machine check): so a mapping with poisoned
        pages is not taken into a memslot any more, and one that is in a memslot is not poisoned.

        Raises as `copy`; ViewError where a view of the range is alive; BusyError where the mapping is in a memslot.
        """
        call = "UserFaultFd.poison"
        state, address, size = self._span(call, mapping, offset, size)
        if not self._features & lib.HV_UFFD_FEATURE_POISON:
            raise HostError(errno.EOPNOTSUPP, "ioctl(UFFDIO_POISON)", None, None, None, "this kernel does not have it")
        bar = mapping._forbid(offset, size, "its pages are poisoned")
        mark = Poisoned(bar.offset, bar.end, bar.why)
        mapping._bars[mark] = None
        mapping._allow(bar)
        if slots := [why for why in mapping._pins if why.startswith("memslot")]:
            # Who comes to pin it later finds the mark.
            mapping._allow(mark)
            raise BusyError(call, repr(mapping), f"a guest would touch it: {', '.join(slots)}")
        self._fill(
            "UFFDIO_POISON",
            None,
            offset,
            lambda done: lib.hv_uffd_poison(state.native, address, size, _bits(wake), done),
            size,
            mapping,
        )

    def move(
        self,
        mapping: Mapping,
        offset: int,
        source: Mapping,
        source_offset: int,
        size: int,
        *,
        holes: bool = False,
        wake: bool = True,
    ) -> None:
        """Moves pages of `source` to where they are missing, without copying (UFFDIO_MOVE, Linux 6.8).

        Both are private anonymous memory; the source reads as zeros, or is missing, afterwards.  `holes`: pages that
        the source does not have are skipped.

        Raises as `copy`; HostError EBUSY, ENOENT, EINVAL for the source.
        """
        call = "UserFaultFd.move"
        source_offset, source_size = whole_range(call, source, source_offset, size, "source", "source_offset")
        state, address, size = self._span(call, mapping, offset, size)
        if not self._features & lib.HV_UFFD_FEATURE_MOVE:
            raise HostError(errno.EOPNOTSUPP, "ioctl(UFFDIO_MOVE)", None, None, None, "this kernel does not have it")
        bits = _bits(wake) | (lib.HV_UFFD_HOLES if holes else 0)
        origin = source.hva + source_offset
        if origin < address + size and address < origin + size:
            raise ArgumentError(call, "source_offset", source_offset, "a range apart from the one moved to")
        why = f"{call} takes from it"
        source.pin(why)
        try:
            self._fill(
                "UFFDIO_MOVE",
                mapping,
                offset,
                lambda done: lib.hv_uffd_move(state.native, address, origin, source_size, bits, done),
                size,
            )
        finally:
            source.unpin(why)
            tell_written(source, source_offset, size)

    def writeprotect(
        self, mapping: Mapping, offset: int = 0, size: int | None = None, *, protect: bool = True, wake: bool = True
    ) -> None:
        """Puts the range under write protection, or lifts that and wakes who waits (UFFDIO_WRITEPROTECT).

        Only what is protected makes faults in mode wp, and is told by `take_written` in both modes.  Pages that are
        not there yet are protected too, but for anonymous memory before Linux 6.4.

        Raises ArgumentError, ArgumentTypeError, ClosedError; HostError ENOENT (not registered as wp or wp-async).
        """
        state, address, size = self._span("UserFaultFd.writeprotect", mapping, offset, size)
        mode = lib.HV_UFFD_PROTECT if protect else _bits(wake)
        error = lib.hv_uffd_writeprotect(state.native, address, size, mode)
        if error < 0:
            raise self._refused("UFFDIO_WRITEPROTECT", -error, {"offset": offset, "mapping": mapping})
        if not protect:
            self._answered(address, size)

    def wake(self, mapping: Mapping, offset: int = 0, size: int | None = None) -> None:
        """Wakes those who wait for pages of the range (UFFDIO_WAKE): they look again, and wait again if nothing has
        changed.  Raises ArgumentError, ArgumentTypeError, ClosedError."""
        state, address, size = self._span("UserFaultFd.wake", mapping, offset, size)
        error = lib.hv_uffd_wake(state.native, address, size)
        if error < 0:
            raise self._refused("UFFDIO_WAKE", -error, {"offset": offset})
        self._answered(address, size)

    def take_written(
        self, mapping: Mapping, offset: int = 0, size: int | None = None, *, protect: bool = True
    ) -> list[range]:
        """Pages of the range that were written since they were put under protection: ranges of indexes, ascending.

        In mode wp, those that `serve_native` has let through (or that were given up); in mode wp-async, those that the
        kernel has (PAGEMAP_SCAN, Linux 6.7).  `protect`: they are protected again, so that the next call tells what was
        written since.  Read their bytes after the call: a write that comes in meanwhile is in this answer's bytes, in
        the next answer, or in both.

        Raises ArgumentError, ArgumentTypeError, ClosedError; HostError of UFFDIO_WRITEPROTECT or PAGEMAP_SCAN.
        """
        call = "UserFaultFd.take_written"
        offset, size = whole_range(call, mapping, offset, size)
        state, address, size = self._span(call, mapping, offset, size)
        page_size = mapping.page_size
        with self._lock:
            range_ = next((r for r in state.ranges if r.start <= address and address + size <= r.end), None)
            if range_ is None or not {"wp", "wp-async"} & set(range_.modes):
                raise ArgumentError(call, "offset", offset, "a range registered as wp or wp-async")
            if "wp-async" in range_.modes:
                found = _scan(address, size, protect)
                base = mapping.hva
                return [range((first - base) // page_size, (last - base) // page_size) for first, last in found]
            if (range_.offset, range_.size) != (offset, size):
                accepted = f"the whole registration: {whole([range_])}"
                raise ArgumentError(call, "size", size, accepted, "its pages are noted together")
            runs = state.take(range_, WRITTEN)
            for first, last in runs if protect else ():
                error = lib.hv_uffd_writeprotect(state.native, mapping.hva + first, last - first, lib.HV_UFFD_PROTECT)
                if error < 0:
                    raise self._refused("UFFDIO_WRITEPROTECT", -error, {"offset": first})
            return [range(first // page_size, last // page_size) for first, last in runs]

    def _open(self, method: str) -> State:
        state = self._state
        if state is None:
            raise ClosedError(f"UserFaultFd.{method}", repr(self))
        if os.getpid() != state.pid:
            detail = f"process {state.pid} made {self!r}, and it handles the faults of that one"
            raise ForkedError(
                errno.ESRCH, f"UserFaultFd.{method}", None, None, "a UserFaultFd made by this process", detail
            )
        return state

    # The address of a range, which must lie within one registration: where the kernel is told to write is ours.
    def _span(
        self, call: str, mapping: Mapping, offset: int, size: int | None, size_field: str = "size"
    ) -> tuple[State, int, int]:
        state = self._open(call.partition(".")[2])
        offset, size = whole_range(call, mapping, offset, size, size_field=size_field)
        address = mapping.hva + offset
        for range_ in state.ranges[:]:
            if range_.start <= address and address + size <= range_.end:
                return state, address, size
        mine = [range_ for range_ in state.ranges if range_.mapping is mapping]
        raise ArgumentError(call, "offset", offset, f"a range within a registration: {whole(mine)}", f"size={size:#x}")

    def _fill(
        self,
        ioctl: str,
        written: Mapping | None,
        offset: int,
        call: Callable[[Any], int],
        size: int,
        mapping: Mapping | None = None,
    ) -> None:
        done = ffi.new("uint64_t *")
        mapping = written or mapping
        assert mapping is not None
        if written is not None:
            tell_written(written, offset, size)
        error = call(done)
        if written is not None:
            tell_written(written, offset, size)
        if done[0]:
            self._answered(mapping.hva + offset, done[0])
        if error < 0:
            raise self._refused(ioctl, -error, {"offset": offset + done[0], "mapping": mapping})

    def _refused(self, ioctl: str, error: int, values: dict[str, object]) -> HvError:
        if error == errno.EBADF:
            return ClosedError(f"ioctl({ioctl})", repr(self))
        return refused(ioctl, error, values)

    def _answered(self, address: int, size: int, withdrawn: bool = False) -> None:
        question = self._question
        if question is not None and address <= question.address < address + size:
            question.answered = True
            question.withdrawn |= withdrawn


def _scan(address: int, size: int, protect: bool) -> list[tuple[int, int]]:
    from .pagemap import Category, PageMap

    with PageMap() as pages:
        found = pages.scan(address, address + size, mask=Category.WRITTEN, write_protect=protect, check_wp_async=True)
    return [(region.start, region.end) for region in found.regions]


def whole_range(
    call: str,
    mapping: Mapping,
    offset: int,
    size: int | None,
    field: str = "mapping",
    offset_field: str = "offset",
    size_field: str = "size",
) -> tuple[int, int]:
    """(offset, size) of whole pages, at least one, of an open mapping (`size` None: all the rest); errors name `call`.

    Raises ArgumentError, ArgumentTypeError, ClosedError.
    """
    if not isinstance(mapping, Mapping):
        raise ArgumentTypeError(call, field, mapping, "a Mapping")
    if mapping.closed:
        raise ClosedError(call, repr(mapping))
    page_size = mapping.page_size
    offset = index(offset, call, offset_field)
    if offset % page_size or not 0 <= offset < mapping.size:
        accepted = f"a multiple of {page_size}, 0 <= {offset_field} < {mapping.size:#x}"
        raise ArgumentError(call, offset_field, offset, accepted)
    size = mapping.size - offset if size is None else index(size, call, size_field)
    if size % page_size or not 0 < size <= mapping.size - offset:
        accepted = f"a multiple of {page_size}, 0 < {size_field} <= {mapping.size - offset:#x}"
        raise ArgumentError(call, size_field, size, accepted)
    return offset, size


def _bits(wake: bool, wp: bool = False) -> int:
    return (0 if wake else lib.HV_UFFD_DONTWAKE) | (lib.HV_UFFD_COPY_WP if wp else 0)
