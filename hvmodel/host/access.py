"""Access: reading, writing and viewing memory that may fault, without a SIGSEGV or SIGBUS; the half of `Mapping` that
handles bytes.  What it knows, and by which rules: hvmodel.host.mapping.
"""

from __future__ import annotations

import errno
from _weakref import ref
from time import sleep

from .._ffi import ffi, lib
from ..errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, HostError
from ..units import PAGE_SIZE
from .changes import PATIENCE, Bar, Change
from .memfd import F_SEAL_SHRINK, MemFd, file_size, get_seals, index
from .pieces import within
from .views import Export, ViewError, Writable, keep_alive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from typing_extensions import Buffer

    from .._native import buffer
    from .pieces import Pieces

__all__ = ["PROT_EXEC", "PROT_NONE", "PROT_READ", "PROT_WRITE", "Access", "Inside"]

PROT_NONE: int = lib.HV_PROT_NONE
PROT_READ: int = lib.HV_PROT_READ
PROT_WRITE: int = lib.HV_PROT_WRITE
PROT_EXEC: int = lib.HV_PROT_EXEC

_RW = PROT_READ | PROT_WRITE
_UNREACHABLE = "the page is not accessible: its protection forbids it, or it lies past the end of the file"


class Inside:
    """Whoever gives the address to the kernel holds the mapping's one, and `close` unmaps when nobody does."""

    __slots__ = ("__weakref__",)


class Access:
    """What `Mapping` is made of; not for use alone.  Threads: any."""

    # _base     the one buffer over all of it; whoever copies by pointer holds it meanwhile (`_quiesce`, `close`); None
    #           once closed, as _inside
    # _direct   the protection that every byte is known to have, by pointer; 0 where there is something to look up
    # _fault    why all of it could fault, or None;  _prots  protection by page range;  _bars  what else is in the way
    __slots__ = (
        "__weakref__",
        "_bars",
        "_base",
        "_changes",
        "_direct",
        "_exports",
        "_fault",
        "_hva",
        "_inside",
        "_noreserve",
        "_offset",
        "_owner",
        "_page_size",
        "_pins",
        "_prots",
        "_reap_at",
        "_shared",
        "_size",
        "_source",
        "_start",
        "_written",
    )

    _bars: dict[Bar, None]
    _base: buffer | None
    _changes: dict[ref[Bar], None]
    _direct: int
    _exports: list[Export]
    _fault: str | None
    _hva: int
    _inside: Inside | None
    _noreserve: bool
    _offset: int
    _owner: str
    _pins: list[str]
    _page_size: int
    _prots: Pieces
    _reap_at: int
    _shared: bool
    _size: int
    _source: MemFd | int | None
    _start: Any  # char *
    _written: Callable[[int, int], None] | None

    def view(self, offset: int = 0, size: int | None = None) -> memoryview:
        """The bytes [offset, offset + size) as a read-only memoryview, without copying; `size` None is all the rest.

        It shows what anybody writes, at once.  The mapping cannot be closed before the view and all that was made from
        it (slices, numpy arrays) are gone.

        Raises ArgumentError, ArgumentTypeError, ClosedError; ViewError where the memory could fault, see the module.
        """
        offset, size = self._range("view", offset, size)
        return memoryview(self._export("view", offset, size, False)).toreadonly()

    def writable(self, offset: int = 0, size: int | None = None) -> Writable:
        """A context manager whose `with` gives the bytes [offset, offset + size) as a writable memoryview.

        Leaving the `with` releases the memoryview.  What was made from it may live on; until the last of it is gone,
        the range counts as being written.

        Raises ArgumentError, ArgumentTypeError, ClosedError; on entry, ViewError where the memory could fault or is not
        mapped with PROT_WRITE.
        """
        return Writable(self, *self._range("writable", offset, size))

    def read(self, offset: int, size: int) -> bytes:
        """A copy of the bytes [offset, offset + size).

        Raises ArgumentError, ArgumentTypeError, ClosedError; HostError of process_vm_readv (EFAULT) where a page is not
        accessible.
        """
        offset, size = self._range("read", offset, size)
        # Whoever holds `base` keeps it mapped.  The `del` is for tracebacks, which would hold it for long.
        base = self._hold("read")
        try:
            if self._direct & PROT_READ or self._why_not(offset, size, PROT_READ) is None:
                return base[offset : offset + size]
        finally:
            del base
        inside = self._enter("read")
        try:
            copy = bytearray(size)
            done = lib.hv_vm_read(self._hva + offset, ffi.from_buffer(copy), size)
        finally:
            del inside
        self._check_done("process_vm_readv", offset, size, done)
        return bytes(copy)

    def write(self, offset: int, data: Buffer) -> None:
        """Copies `data` (bytes, or any C-contiguous buffer; it may overlap) to `offset`.

        Raises ArgumentError, ArgumentTypeError, ClosedError; HostError of process_vm_writev (EFAULT) where a page is
        not accessible or not writable, with the bytes before it written.
        """
        if type(data) is bytes:
            size = len(data)
        else:
            # A memoryview keeps a bytearray from being resized meanwhile, by `written` or another thread.
            data = _contiguous(data, self._owner)
            size = data.nbytes
        offset, size = self._range("write", offset, size, "len(data)")
        try:
            # Told before, so that an exception on the way cannot hide the write, and after, in case somebody took
            # note of the range and forgot it before the bytes were there.
            if self._written is not None:
                self._written(offset, size)
            base = self._hold("write")
            try:
                direct = self._direct & PROT_WRITE or self._why_not(offset, size, _RW) is None
                if direct:
                    ffi.memmove(self._start + offset, data, size)
            finally:
                del base
            if direct:
                return
            inside = self._enter("write")
            try:
                done = lib.hv_vm_write(self._hva + offset, ffi.from_buffer(data), size)
            finally:
                del inside
        finally:
            if self._written is not None:
                self._written(offset, size)
        self._check_done("process_vm_writev", offset, size, done)

    def open_writable(self) -> list[tuple[int, int]]:
        """(offset, size) of each writable view that is alive; `written` was called for those that are gone."""
        self._reap()
        return [(export.offset, export.size) for export in self._exports[:] if export.writable]

    def pin(self, why: str) -> None:
        """Keeps the mapping from being closed until `unpin(why)`, on behalf of somebody who has its address.

        Pins count: the same text may be given twice.  The pinner holds a strong reference to the mapping besides.
        """
        self._hold("pin")
        self._pins.append(why)

    def unpin(self, why: str) -> None:
        """Takes back one `pin(why)`.  Raises ArgumentError if there is none."""
        try:
            self._pins.remove(why)
        except ValueError:
            raise ArgumentError(f"{self._owner}.unpin", "why", why, f"one of {self._pins}") from None

    def prot_at(self, offset: int) -> int:
        """The protection of the page that has byte `offset`, PROT_* or-ed, as this object set it."""
        offset, _ = self._range("prot_at", offset, 1)
        return next(value for _, _, value in within(self._prots, offset, offset + 1))

    # Checks a range and returns it as ints.  Sums of Python ints do not wrap.
    def _range(self, method: str, offset: int, size: int | None, field: str = "size") -> tuple[int, int]:
        if self._base is None:
            raise ClosedError(f"{self._owner}.{method}", self._owner)
        if type(offset) is not int:
            offset = index(offset, f"{self._owner}.{method}", "offset")
        if not 0 <= offset <= self._size:
            raise ArgumentError(f"{self._owner}.{method}", "offset", offset, f"0 <= offset <= {self._size:#x}")
        rest = self._size - offset
        if size is None:
            size = rest
        elif type(size) is not int:
            size = index(size, f"{self._owner}.{method}", field)
        if not 0 <= size <= rest:
            accepted = f"0 <= {field} <= {rest:#x}, the bytes from offset {offset:#x} to the end"
            raise ArgumentError(f"{self._owner}.{method}", field, size, accepted)
        return offset, size

    # As `_range`, for what is done to whole pages, at least one.
    def _pages(self, method: str, offset: int, size: int | None) -> tuple[int, int]:
        offset, size = self._range(method, offset, size)
        for field, value in (("offset", offset), ("size", size)):
            if value % self._page_size:
                accepted = f"a multiple of {self._page_size}"
                raise ArgumentError(f"{self._owner}.{method}", field, value, accepted)
        if not size:
            raise ArgumentError(f"{self._owner}.{method}", "size", size, f"at least {self._page_size}")
        return offset, size

    # The base buffer, which its holder must `del` before an exception leaves its frame.
    def _hold(self, method: str) -> buffer:
        base = self._base
        if base is None:
            raise ClosedError(f"{self._owner}.{method}", self._owner)
        return base

    # The same for those whom the kernel would tell, and who may take long: they are in nobody's way but `close`'s.
    def _enter(self, method: str) -> Inside:
        inside = self._inside
        if inside is None:
            raise ClosedError(f"{self._owner}.{method}", self._owner)
        return inside

    def _export(self, method: str, offset: int, size: int, writable: bool) -> buffer:
        base = self._hold(method)
        try:
            why = None if self._direct & PROT_READ else self._why_not(offset, size, PROT_READ)
            if why is not None:
                why = f"it could fault: {why}; read() and write() do without a view"
                raise ViewError(f"{self._owner}.{method}", repr(self), why)
            if writable and not self._direct & PROT_WRITE:
                why = self._why_not(offset, size, PROT_WRITE)
                if why is not None:
                    raise ViewError(f"{self._owner}.{method}", repr(self), why)
            if len(self._exports) >= self._reap_at:
                self._reap()
                self._reap_at = 2 * len(self._exports) + 16
            out = ffi.buffer(self._start + offset, size)
            export = Export(out, keep_alive.pop)
            export.offset, export.size, export.writable = offset, size, writable
            keep_alive[export] = self
            self._exports.append(export)
            return out
        finally:
            del base

    def _nr_views(self) -> int:
        return sum(export() is not None for export in self._exports[:])

    # Forgets the views that are gone, after it has told what they may have written.
    def _reap(self) -> None:
        for export in self._exports[:]:
            if export() is not None:
                continue
            if export.writable and self._written is not None:
                self._written(export.offset, export.size)
            try:  # noqa: SIM105 (not worth importing contextlib)
                self._exports.remove(export)
            except ValueError:
                pass  # another thread was faster

    # Why no pointer may touch [offset, offset + size) for `prot`, or None.
    def _why_not(self, offset: int, size: int, prot: int) -> str | None:
        if self._fault is not None and self._recheck_fault() is not None:
            return self._fault
        end = offset + size
        for bar in [*self._bars, *[place() for place in list(self._changes)]]:
            if bar is not None and bar.offset < end and offset < bar.end:
                return bar.why
        for _, _, have in within(self._prots, offset, end):
            if prot & ~have:
                return f"it is not mapped with PROT_{'READ' if prot & ~have & PROT_READ else 'WRITE'}"
        return None

    # What every byte can be touched for: the usual case, for which there is nothing to look up.  Who has a turn to
    # change calls this, so that nobody overwrites it with what was true before.
    def _settle(self) -> None:
        direct = 0
        if self._fault is None and not self._bars:
            direct = _RW
            for _, _, prot in self._prots:
                direct &= prot
        self._direct = direct if direct & PROT_READ else 0

    # Why the whole of it could fault, or None.
    def _find_fault(self) -> str | None:
        if self._source is None:
            return None
        if self._page_size != PAGE_SIZE and (self._noreserve or not self._shared):
            how = "noreserve" if self._noreserve else "private"
            return f"its huge pages may not be there when they are touched: the mapping is {how}"
        try:
            if isinstance(self._source, MemFd):
                fd, sealed = self._source.fd, self._source._sealed
            else:
                fd, sealed = self._source, 0
            if not sealed & F_SEAL_SHRINK and not get_seals(fd) & F_SEAL_SHRINK:
                return "its file can be truncated: seal it with F_SEAL_SHRINK, if it is a MemFd, or before it is mapped"
            if file_size(fd) < self._offset + self._size:
                return "it reaches past the end of its file"
        except ClosedError:
            return "its MemFd was closed before it was sealed with F_SEAL_SHRINK"
        except HostError:
            return "its file has no seals, so that it can be truncated"
        return None

    # Seals may have been added since; they are never taken off, so None is final.  A mere descriptor number may by now
    # be another file's.
    def _recheck_fault(self) -> str | None:
        if isinstance(self._source, MemFd):
            fault = self._find_fault()
            self._fault = fault
            if fault is None:
                self._resettle()
        return self._fault

    # Keeps pointers off [offset, offset + size) from now on; the answer is for `_allow`.  ViewError while a view of it
    # is alive.  For who makes access there fault: a userfaultfd.  `why` completes "it could fault: ...".
    def _forbid(self, offset: int, size: int, why: str) -> Bar:
        offset, size = self._pages("forbid", offset, size)
        with Change(self, f"{self._owner}.forbid", offset, size, why):
            bar = Bar(offset, offset + size, why)
            self._bars[bar] = None
            return bar

    # Takes back one `_forbid`, in any state.  Twice is fine.
    def _allow(self, token: Bar) -> None:
        self._bars.pop(token, None)
        self._resettle()

    # After a change for the better.  It waits for nobody: whoever has the turn settles at its end.
    def _resettle(self) -> None:
        change = Change(self, "", 0, 0, "")
        if change.begin(0):
            change.end()

    # Waits until nobody is in the middle of a memcpy that began before now.
    def _quiesce(self, call: str) -> None:
        base = self._hold("quiesce")
        holder = ref(base)
        self._base = ffi.buffer(self._start, self._size)
        del base
        for _ in range(PATIENCE * 1000):
            if holder() is None:
                return
            sleep(0.001)
        raise BusyError(call, repr(self), "another thread is in one of its methods, and does not leave it")

    def _check_done(self, call: str, offset: int, size: int, done: int) -> None:
        if done == size:
            return
        error = -done if done < 0 else errno.EFAULT
        offset += max(done, 0)
        detail = None
        if error == errno.EFAULT:
            bars = [bar.why for bar in self._bars if bar.offset <= offset < bar.end]
            detail = f"the page is not accessible: {bars[0]}" if bars else _UNREACHABLE
        raise HostError(error, call, "offset", offset, None, detail)


# A view of anything that memmove takes.
def _contiguous(data: Buffer, owner: str) -> memoryview:
    try:
        view = memoryview(data)
        if view.c_contiguous:
            return view
    except (TypeError, ValueError, BufferError):
        pass
    raise ArgumentTypeError(f"{owner}.write", "data", data, "bytes or a C-contiguous buffer")
