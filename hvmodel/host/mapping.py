"""Mappings: `Mapping` owns a range of this process's addresses, and hands out its bytes without copying.

No access through this class raises SIGSEGV or SIGBUS:

    memory that cannot fault   readable, and anonymous or of a memfd that is sealed against SHRINK and reaches to the
                               end of the mapping: views are handed out, `read` and `write` are a memcpy
    all other memory           no views; `read` and `write` go through process_vm_readv/writev, which return errors
    memory handed out          stays mapped: every view keeps the mapping alive, and `close` refuses

A view is a memoryview over a cffi buffer made for it alone.  Whatever is derived from it (slices, casts, numpy arrays)
keeps that buffer alive, and a weak reference to it tells when the last of them is gone.
"""

from __future__ import annotations

import errno
from weakref import finalize, ref

from .._ffi import ffi, lib
from ..errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, HostError, HvError
from ..units import PAGE_SIZE, Hva
from .memfd import F_SEAL_SHRINK, MemFd, file_size, get_seals, page_multiple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self, SupportsIndex

    from typing_extensions import Buffer

    from .._native import buffer

__all__ = ["PROT_EXEC", "PROT_NONE", "PROT_READ", "PROT_WRITE", "Mapping", "ViewError", "Writable", "index"]

PROT_NONE: int = lib.HV_PROT_NONE
PROT_READ: int = lib.HV_PROT_READ
PROT_WRITE: int = lib.HV_PROT_WRITE
PROT_EXEC: int = lib.HV_PROT_EXEC

_PROTS = {PROT_READ: "r", PROT_WRITE: "w", PROT_EXEC: "x"}
_ALL_PROTS = sum(_PROTS)
_ADDRESSES = 1 << 47  # of a process, without LA57
_CHARS = ffi.typeof("char *")
_UNREACHABLE = "the page is not accessible: its protection forbids it, or it lies past the end of the file"

# What a refusal of mmap means: (field, accepted).
_REFUSED = {
    errno.EBADF: ("source", "an open file descriptor"),
    errno.EACCES: ("prot", "what the file was opened for"),
    errno.EPERM: ("prot", "no shared PROT_WRITE: the memfd is sealed with WRITE or FUTURE_WRITE"),
    errno.ENODEV: ("source", "a file that can be mapped"),
    errno.ENOMEM: ("size", "a size that this process's addresses and the host's memory have room for"),
}


class ViewError(HvError, BufferError):
    """Memory cannot be handed out as a view, or cannot be released because a view of it is alive.

    Attributes: `call`, `owner` (its repr), `why`.
    """

    def __init__(self, call: str, owner: str, why: str) -> None:
        self.call, self.owner, self.why = call, owner, why
        super().__init__(f"{call}: {owner}: {why}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.call, self.owner, self.why)


class _Export(ref):  # type: ignore[type-arg]
    # A view that is out: a weak reference to its buffer.  Compared by identity, for buffers compare by content.
    __slots__ = ("offset", "size", "writable")
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    offset: int
    size: int
    writable: bool


# What is handed out keeps its mapping alive, even when nobody else does.  An entry goes with the buffer: the callback
# of the weak reference is this dict's own `pop`, which no signal handler can interrupt, as it could a Python function.
_keep_alive: dict[_Export, Mapping] = {}


def _leaked(address: int, size: int) -> None:
    # The finalizer of a Mapping that nobody closed.  The warning comes last, because it may be made an exception.
    import warnings

    lib.hv_munmap(address, size)
    warnings.warn(f"unclosed Mapping(hva={address:#x}, size={size:#x})", ResourceWarning, stacklevel=2)


class Mapping:
    """A mapping of `size` bytes of a memfd from `offset`, or with source None of anonymous memory; owns the addresses.

    `source` is a MemFd, the number of a descriptor that the caller owns, or None.  `size` (bytes, or text such as
    "16M") and `offset` are whole pages; `prot` is PROT_NONE or of PROT_READ, PROT_WRITE, PROT_EXEC; `shared` False
    makes a private (copy-on-write) mapping.  `owner` is the name that errors use.  `written(offset, size)`, if given,
    is called for every range that was or may have been written through this object: before and after a `write`, and
    once a writable view is gone.

    Raises ArgumentError, ArgumentTypeError, ClosedError; HostError of mmap with its errno: EBADF, EACCES, ENODEV,
    ENOMEM, EPERM (a shared writable mapping of a memfd with F_SEAL_WRITE or F_SEAL_FUTURE_WRITE).

    Calls: mmap(2), munmap(2); process_vm_readv(2), process_vm_writev(2).
    Threads: any.  `close` against a view, a read or a write in another thread raises one of its errors or wins.

    >>> from hvmodel.host import F_SEAL_SHRINK, MemFd
    >>> with MemFd("doc", "64K", seals=F_SEAL_SHRINK) as memfd, Mapping(memfd, "64K") as mapping:
    ...     mapping.write(0x1000, b"hello")
    ...     with mapping.writable(0x1004, 1) as view:
    ...         view[0] = ord("!")
    ...     mapping.read(0x1000, 5), mapping.view(0x1000, 5).readonly
    (b'hell!', True)
    """

    __slots__ = (
        "__weakref__",
        "_base",
        "_exports",
        "_fault",
        "_finalizer",
        "_hva",
        "_offset",
        "_owner",
        "_pins",
        "_prot",
        "_reap_at",
        "_shared",
        "_size",
        "_source",
        "_start",
        "_written",
    )

    def __init__(
        self,
        source: MemFd | int | None,
        size: int | str,
        *,
        offset: int = 0,
        prot: int = PROT_READ | PROT_WRITE,
        shared: bool = True,
        owner: str = "Mapping",
        written: Callable[[int, int], None] | None = None,
    ) -> None:
        # The one buffer over all of it.  Whoever copies holds it meanwhile, and `close` unmaps when nobody does.
        self._base: buffer | None = None
        self._owner = owner
        size = page_multiple(size, owner, "size", _ADDRESSES)
        offset = index(offset, owner, "offset")
        if offset < 0 or offset % PAGE_SIZE or offset >= (1 << 63) - size:
            raise ArgumentError(owner, "offset", offset, f"a multiple of {PAGE_SIZE} from 0, ending below 2**63")
        if isinstance(prot, bool) or not isinstance(prot, int):
            raise ArgumentTypeError(owner, "prot", prot, "an int, PROT_* or-ed")
        if prot & ~_ALL_PROTS:
            raise ArgumentError(owner, "prot", prot, "PROT_NONE, or a combination of PROT_READ, PROT_WRITE, PROT_EXEC")
        flags = lib.HV_MAP_SHARED if shared else lib.HV_MAP_PRIVATE
        if isinstance(source, MemFd):
            fd = source.fd
        elif source is None:
            fd = -1
            flags |= lib.HV_MAP_ANONYMOUS
        else:
            fd = index(source, owner, "source", "a MemFd, a file descriptor, or None")
            if not 0 <= fd < 1 << 31:
                raise ArgumentError(owner, "source", source, "a MemFd, an open file descriptor, or None")
        address = lib.hv_mmap(0, size, prot, flags, fd, offset)
        if address < 0:
            field, accepted = _REFUSED.get(-address, ("source", None))
            value = {"size": size, "prot": prot}.get(field, source)
            raise HostError(-address, "mmap", field, value, accepted)
        self._finalizer = finalize(self, _leaked, address, size)
        # Not at exit: memory that is still handed out then must stay, and the kernel takes it back anyway.
        self._finalizer.atexit = False
        try:
            self._hva, self._size, self._source, self._offset = address, size, source, offset
            self._prot, self._shared, self._written = prot, bool(shared), written
            self._exports: list[_Export] = []
            self._reap_at = 16
            self._pins: list[str] = []
            self._fault: str | None = None
            self._start = ffi.cast(_CHARS, address)
            self._base = ffi.buffer(self._start, size)
            self._fault = self._find_fault()
        except BaseException:
            self._base = None
            self._finalizer.detach()
            lib.hv_munmap(address, size)
            raise

    @property
    def hva(self) -> Hva:
        """The address of the first byte, in this process.  Raises ClosedError.

        An address keeps nothing alive: who gives it to somebody (a memslot) pins the mapping.
        """
        if self._base is None:
            raise ClosedError(f"{self._owner}.hva", self._owner)
        return Hva(self._hva)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._size

    @property
    def offset(self) -> int:
        """Where in the file the first byte lies."""
        return self._offset

    @property
    def prot(self) -> int:
        """Its protection, PROT_* or-ed."""
        return self._prot

    @property
    def shared(self) -> bool:
        """Whether writes go to the file (True) or to private copies."""
        return self._shared

    @property
    def source(self) -> MemFd | int | None:
        """What is mapped, as given."""
        return self._source

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._base is None

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
            if self._fault is None or self._recheck_fault() is None:
                return base[offset : offset + size]
            copy = bytearray(size)
            done = lib.hv_vm_read(self._hva + offset, ffi.from_buffer(copy), size)
        finally:
            del base
        self._check_done("process_vm_readv", offset, size, done)
        return bytes(copy)

    def write(self, offset: int, data: Buffer) -> None:
        """Copies `data` (bytes, or any C-contiguous buffer; it may overlap) to `offset`.

        Raises ArgumentError, ArgumentTypeError, ClosedError; HostError of process_vm_writev (EFAULT) where a page is
        not accessible or not writable, with the bytes before it written.
        """
        size = len(data) if type(data) is bytes else _nbytes(data, self._owner)
        offset, size = self._range("write", offset, size, "len(data)")
        base = self._hold("write")
        try:
            # Told before, so that an exception on the way cannot hide the write, and after, in case somebody took
            # note of the range and forgot it before the bytes were there.
            if self._written is not None:
                self._written(offset, size)
            if self._prot & PROT_WRITE and (self._fault is None or self._recheck_fault() is None):
                ffi.memmove(self._start + offset, data, size)
                done = size
            else:
                done = lib.hv_vm_write(self._hva + offset, ffi.from_buffer(data), size)
        finally:
            if self._written is not None:
                self._written(offset, size)
            del base
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

    def close(self) -> None:
        """Unmaps it.  Closing twice is fine.

        Raises ViewError (a BufferError) while a view is alive, BusyError while it is pinned or another thread is in
        `read`, `write` or `view`; then nothing has changed.  In a child of os.fork it unmaps the child's copy only.
        """
        base = self._base
        if base is None:
            return
        call = f"{self._owner}.close"
        holder = ref(base)
        del base
        if nr_views := self._nr_views():
            raise ViewError(call, repr(self), f"{nr_views} views of it are alive (or arrays made from them)")
        if self._pins:
            raise BusyError(call, repr(self), f"in use by {', '.join(self._pins)}")
        # From here on every access finds a closed mapping.  One that was faster holds the base, or has made a view.
        self._base = None
        if holder() is not None or self._nr_views():
            self._base = holder() or ffi.buffer(self._start, self._size)
            raise BusyError(call, repr(self), "another thread is in one of its methods")
        if self._finalizer.detach() is not None:
            error = lib.hv_munmap(self._hva, self._size)
            if error < 0:
                raise HostError(-error, "munmap", "hva", self._hva)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._base is None:
            return "<Mapping closed>"
        prot = "".join(char if self._prot & bit else "-" for bit, char in _PROTS.items())
        kind = "shared" if self._shared else "private"
        return f"Mapping({self._source!r}, hva={self._hva:#x}, size={self._size:#x}, {prot}, {kind})"

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

    # The base buffer, which its holder must `del` before an exception leaves its frame.
    def _hold(self, method: str) -> buffer:
        base = self._base
        if base is None:
            raise ClosedError(f"{self._owner}.{method}", self._owner)
        return base

    def _export(self, method: str, offset: int, size: int, writable: bool) -> buffer:
        if self._fault is not None and self._recheck_fault() is not None:
            why = f"it could fault: {self._fault}; read() and write() do without a view"
            raise ViewError(f"{self._owner}.{method}", repr(self), why)
        if writable and not self._prot & PROT_WRITE:
            raise ViewError(f"{self._owner}.{method}", repr(self), "it is not mapped with PROT_WRITE")
        base = self._hold(method)
        try:
            if len(self._exports) >= self._reap_at:
                self._reap()
                self._reap_at = 2 * len(self._exports) + 16
            out = ffi.buffer(self._start + offset, size)
            export = _Export(out, _keep_alive.pop)
            export.offset, export.size, export.writable = offset, size, writable
            _keep_alive[export] = self
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

    # Why access by pointer could fault, or None.
    def _find_fault(self) -> str | None:
        if not self._prot & PROT_READ:
            return "it is not mapped with PROT_READ"
        if self._source is None:
            return None
        try:
            fd = self._source.fd if isinstance(self._source, MemFd) else self._source
            if not get_seals(fd) & F_SEAL_SHRINK:
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
            self._fault = self._find_fault()
        return self._fault

    def _check_done(self, call: str, offset: int, size: int, done: int) -> None:
        if done < 0:
            raise HostError(-done, call, "offset", offset, None, _UNREACHABLE if done == -errno.EFAULT else None)
        if done < size:
            raise HostError(errno.EFAULT, call, "offset", offset + done, None, _UNREACHABLE)


class Writable:
    """What `Mapping.writable` returns: a context manager for one `with` at a time.

    Threads: one at a time.
    """

    __slots__ = ("_mapping", "_offset", "_size", "_view")

    def __init__(self, mapping: Mapping, offset: int, size: int) -> None:
        self._mapping, self._offset, self._size = mapping, offset, size
        self._view: memoryview | None = None

    def __enter__(self) -> memoryview:
        if self._view is not None:
            raise BusyError("Writable.__enter__", repr(self), "its `with` is still open")
        self._view = memoryview(self._mapping._export("writable", self._offset, self._size, True))
        return self._view

    def __exit__(self, *_: object) -> None:
        view, self._view = self._view, None
        if view is not None:
            try:  # noqa: SIM105
                view.release()
            except BufferError:
                pass  # something made from it lives on, and keeps the range open
            del view
        self._mapping._reap()

    def __repr__(self) -> str:
        return f"Writable({self._mapping!r}, offset={self._offset:#x}, size={self._size:#x})"


def index(value: SupportsIndex, call: str, field: str, accepted: str = "an int") -> int:
    """The int that `value` is or stands for (numpy's, too, but not bool); errors name `call` and `field`."""
    if isinstance(value, bool):
        raise ArgumentTypeError(call, field, value, accepted)
    try:
        return value.__index__()
    except (AttributeError, TypeError):
        raise ArgumentTypeError(call, field, value, accepted) from None


# Bytes in anything that memmove takes.
def _nbytes(data: Buffer, owner: str) -> int:
    try:
        view = memoryview(data)
        if view.c_contiguous:
            return view.nbytes
    except (TypeError, ValueError, BufferError):
        pass
    raise ArgumentTypeError(f"{owner}.write", "data", data, "bytes or a C-contiguous buffer")
