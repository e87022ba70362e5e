"""RAM blocks: `RamBlock` owns memory of the guest: its file, its mapping, and the record of what the host wrote there.

    file     |<-------------------------- max_length, from fd_offset ----------------------->|
    host     |<-- used_length: what the guest has ------>|<-- what it may be given later --->|G|   G: inaccessible page
    offset   where the block begins in the space of all RAM blocks (ram_addr_t), see hvmodel.ram.ramlist

Source: struct RAMBlock, include/system/ramblock.h@v10.1 of QEMU; ram_block_add, qemu_ram_resize and qemu_ram_free,
softmmu/physmem.c@v7.2.
"""

from __future__ import annotations

import errno
import os

from ..errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, HostError
from ..host.mapping import PROT_READ, PROT_WRITE, Mapping, index
from ..host.memfd import F_SEAL_FUTURE_WRITE, F_SEAL_GROW, F_SEAL_SHRINK, F_SEAL_WRITE, MemFd, file_name, page_multiple
from ..units import PAGE_SIZE, Hva, MiB
from .dirty import HostDirty, merge, pages_of
from .ramflags import RAM_READONLY, RAM_RESIZEABLE, RAM_SHARED, flag_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self
    from weakref import WeakSet

    from typing_extensions import Buffer

    from ..host.mapping import Writable
    from .backend import MemoryBackend
    from .backing import BackingFile
    from .ramlist import RamList
    from .region import MemoryRegion

__all__ = ["RAM_SHARED", "RamBlock", "host_memory", "ram_size"]


def host_memory() -> int:
    """The host's memory in bytes: sysconf(_SC_PHYS_PAGES) pages."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def ram_size(size: int | str, call: str = "ram_size", field: str = "size") -> int:
    """Bytes of a size for guest RAM: whole pages, at least one, not more than the host has.

    Raises ArgumentError and ArgumentTypeError, naming `call` and `field`.

    >>> ram_size("16M")
    16777216
    """
    limit = host_memory()
    return page_multiple(size, call, field, limit, f" (this host has {limit // MiB} MiB)")


class RamBlock:
    """A block of guest RAM called `idstr`: `size` bytes of a memfd sealed against SHRINK and GROW, mapped shared; or
    memory of a `backend`.

    The fields have QEMU's names.  `size` is an int or text such as "16M", whole pages, at most what the host has.  With
    `max_length` the block can be resized up to that many bytes; `resized(idstr, used_length, host)`, if given, is
    called after each `resize`.  `backend`: a MemoryBackend, which says the size and all else; the block then makes the
    system calls that QEMU makes for these options, see hvmodel.ram.backend.

    Bytes are addressed by their offset in the block.  `view` and `read` never fault, nor does `write`; see
    hvmodel.host.mapping.  All that the host writes through this object is remembered by page: `host_dirty`.

    A block with a backend is not there in a child of os.fork (MADV_DONTFORK, as with QEMU): the child finds it closed.

    Raises ArgumentError, ArgumentTypeError; HostError of memfd_create, open, ftruncate, F_ADD_SEALS, mmap, mbind and
    madvise (EMFILE, ENOMEM).  Nothing is left open then.

    Calls: memfd_create(2), ftruncate(2), fcntl(2) F_ADD_SEALS, mmap(2), munmap(2); with a backend also open(2),
    madvise(2), mbind(2).
    Threads: any; of `take_host_dirty` and `resize` one at a time.

    >>> with RamBlock("pc.ram", "1M") as block:
    ...     block.write(0x7C00, b"hello")
    ...     block.read(0x7C00, 5), block.take_host_dirty(), block.host_dirty()
    (b'hello', [range(7, 8)], [])
    """

    __slots__ = (
        "__weakref__",
        "_backend",
        "_dirty",
        "_fd_offset",
        "_file",
        "_flags",
        "_idstr",
        "_list",
        "_mapping",
        "_max_length",
        "_offset",
        "_regions",
        "_resized",
        "_used_length",
    )

    _file: MemFd | BackingFile | None

    def __init__(
        self,
        idstr: str,
        size: int | str | None = None,
        *,
        backend: MemoryBackend | None = None,
        max_length: int | str | None = None,
        resized: Callable[[str, int, int], object] | None = None,
    ) -> None:
        if not file_name(idstr, "RamBlock", "idstr"):
            raise ArgumentError("RamBlock", "idstr", idstr, "a name that is not empty")
        if resized is not None and not callable(resized):
            raise ArgumentTypeError("RamBlock", "resized", resized, "None, or a callable (idstr, used_length, host)")
        if backend is not None:
            _check_backend(backend, size, max_length)
            length = used = backend.size
        else:
            length = used = ram_size(size, "RamBlock", "size")  # type: ignore[arg-type]
            if max_length is not None:
                length = ram_size(max_length, "RamBlock", "max_length")
                if length < used:
                    accepted = f"at least size, {used:#x}"
                    raise ArgumentError("RamBlock", "max_length", max_length, accepted)
        self._dirty = _marks(length)
        self._init(idstr, used, length, backend, resized)
        if backend is not None:
            from .backend import allocate

            self._file, self._mapping, self._flags = allocate(backend, idstr, self._dirty.mark)
            self._fd_offset = self._mapping.offset
            return
        self._flags = RAM_SHARED if max_length is None else RAM_SHARED | RAM_RESIZEABLE
        self._map(MemFd(idstr, length, seals=F_SEAL_GROW | F_SEAL_SHRINK), 0, PROT_READ | PROT_WRITE)

    def _init(
        self,
        idstr: str,
        used_length: int,
        max_length: int,
        backend: MemoryBackend | None = None,
        resized: Callable[[str, int, int], object] | None = None,
    ) -> None:
        self._idstr, self._used_length, self._max_length = idstr, used_length, max_length
        self._backend, self._resized = backend, resized
        self._list: RamList | None = None
        self._regions: WeakSet[MemoryRegion] | None = None
        self._file = None
        self._offset = self._fd_offset = 0

    # Takes over `memfd`, also when it fails.
    def _map(self, memfd: MemFd, offset: int, prot: int) -> None:
        self._file = memfd
        self._fd_offset = offset
        try:
            self._mapping = Mapping(
                memfd,
                self._max_length,
                offset=offset,
                prot=prot,
                align=memfd.page_size,
                owner="RamBlock",
                written=self._dirty.mark,
            )
        except BaseException:
            memfd.close()
            raise

    @classmethod
    def from_fd(
        cls,
        idstr: str,
        fd: int,
        size: int | str | None = None,
        *,
        offset: int | str = 0,
        readonly: bool = False,
        seals: int = F_SEAL_SHRINK | F_SEAL_GROW,
    ) -> Self:
        """A block over memory that another process made: `size` bytes from `offset` of the memfd that `fd` refers to.

        `fd` stays the caller's: the block has a descriptor of its own.  `size` None is all the rest of the file.
        `readonly` maps it without PROT_WRITE.  The file is trusted as far as its `seals` go, which must all be there:
        with SHRINK nobody can take memory away (touching it would be SIGBUS); see docs/ram.md about who must not be
        trusted.  Huge pages can be taken away all the same, by a hole: there are no views of them, but for a file
        sealed with WRITE or FUTURE_WRITE.

        `host_dirty` knows what this process writes, not what the other does.

        Raises as `MemFd.from_fd`, and ArgumentError for a range that the file does not have; HostError of mmap: EPERM
        for a file sealed against writing, unless `readonly`.

        >>> with RamBlock("pc.ram", "1M") as block, RamBlock.from_fd("theirs", block.fd) as theirs:
        ...     theirs.write(0, b"hello")
        ...     block.read(0, 5), theirs.used_length
        (b'hello', 1048576)
        """
        call = "RamBlock.from_fd"
        if not file_name(idstr, call, "idstr"):
            raise ArgumentError(call, "idstr", idstr, "a name that is not empty")
        start = page_multiple(offset, call, "offset") if offset else 0
        memfd = MemFd.from_fd(fd, seals=seals)
        try:
            rest = memfd.size - start
            accepted = f" (the file has {memfd.size:#x} bytes)"
            if rest <= 0:
                raise ArgumentError(call, "offset", offset, f"less than {memfd.size:#x}, the size of the file")
            page_size = memfd.page_size
            length = rest if size is None else page_multiple(size, call, "size", rest, accepted, page_size)
            block = cls.__new__(cls)
            block._dirty = _marks(length)
            block._init(idstr, length, length)
            block._flags = RAM_SHARED | RAM_READONLY if readonly else RAM_SHARED
        except BaseException:
            memfd.close()
            raise
        block._map(memfd, start, PROT_READ if readonly else PROT_READ | PROT_WRITE)
        # The reservation of a huge page goes with it (hugetlb_unreserve_pages, fs/hugetlbfs/inode.c@v6.18).
        if memfd.hugetlb and not memfd.seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
            block._mapping._forbid(0, length, "others can punch holes in its huge pages")
        return block

    @property
    def idstr(self) -> str:
        """Its name: "pc.ram" for the main memory of a PC."""
        return self._idstr

    @property
    def used_length(self) -> int:
        """Bytes that the guest has."""
        return self._used_length

    @property
    def max_length(self) -> int:
        """Bytes up to which `used_length` can grow by `resize`; the same, for a block that is not resizeable."""
        return self._max_length

    @property
    def page_size(self) -> int:
        """Bytes of a page of its file: 4096, or of a file of huge pages theirs."""
        return self._mapping.page_size

    @property
    def flags(self) -> int:
        """QEMU's flags of the block, RAM_* or-ed: hvmodel.ram.ramflags."""
        return self._flags

    @property
    def offset(self) -> int:
        """Where the block begins in the space of all RAM blocks: what `RamList.add` said, 0 while it is in no list."""
        return self._offset

    @property
    def ram_list(self) -> RamList | None:
        """The list that it is in, or None."""
        return self._list

    @property
    def backend(self) -> MemoryBackend | None:
        """What it was made of, or None."""
        return self._backend

    @property
    def file(self) -> MemFd | BackingFile | None:
        """The file, which this object owns; None for anonymous memory."""
        return self._file

    @property
    def memfd(self) -> MemFd | None:
        """The file, which this object owns, where it is a memfd; else None."""
        return self._file if isinstance(self._file, MemFd) else None

    @property
    def fd(self) -> int:
        """The file's descriptor, which stays this object's; -1 for anonymous memory, as QEMU's.  Raises ClosedError."""
        if self._file is None:
            if self.closed:
                raise ClosedError("RamBlock.fd", f"RamBlock({self._idstr!r})")
            return -1
        return self._file.fd

    @property
    def fd_offset(self) -> int:
        """Where in the file the block begins."""
        return self._fd_offset

    @property
    def mapping(self) -> Mapping:
        """The mapping, which this object owns: what a memslot is made of, and pins.  It has `max_length` bytes."""
        return self._mapping

    @property
    def host(self) -> Hva:
        """The address of the first byte in this process.  Raises ClosedError.

        What is written through the address leaves no mark: see `mark_host_dirty`.
        """
        return self._mapping.hva

    @property
    def readonly(self) -> bool:
        """Whether it is mapped without PROT_WRITE (RAM_READONLY)."""
        return bool(self._flags & RAM_READONLY)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._mapping.closed

    def view(self, offset: int = 0, size: int | None = None) -> memoryview:
        """The bytes [offset, offset + size) as a read-only memoryview, without copying; see `Mapping.view`."""
        if self._used_length != self._max_length:
            offset, size = self._within("view", offset, size)
        return self._mapping.view(offset, size)

    def writable(self, offset: int = 0, size: int | None = None) -> Writable:
        """A context manager: the bytes [offset, offset + size) as a writable memoryview; see `Mapping.writable`.

        Its pages count as dirty while anything made from the view is alive, and are marked afterwards.
        """
        if self._used_length != self._max_length:
            offset, size = self._within("writable", offset, size)
        return self._mapping.writable(offset, size)

    def read(self, offset: int, size: int) -> bytes:
        """A copy of the bytes [offset, offset + size); see `Mapping.read`."""
        if self._used_length != self._max_length:
            offset, size = self._within("read", offset, size)
        return self._mapping.read(offset, size)

    def write(self, offset: int, data: Buffer) -> None:
        """Copies `data` to `offset` and marks the pages; see `Mapping.write`."""
        if self._used_length != self._max_length:
            try:
                size = memoryview(data).nbytes
            except TypeError:
                size = 0  # the mapping says what is wrong
            offset, _ = self._within("write", offset, size, "len(data)")
        self._mapping.write(offset, data)

    def resize(self, used_length: int | str) -> None:
        """Gives the guest the first `used_length` bytes, whole pages, at most `max_length`; the mapping stays.

        What lies behind keeps its bytes, and is mapped, but not reached through this object; views of it that are
        alive stay.  All pages the guest has count as written by the host then, for a restore or a migration must not
        take them for what they were; the others do not.  The same length again does nothing.

        Memory regions that show all of the block go on to do so, and with them memslots that a listener keeps: it is a
        transaction.  Who has made a memslot by hand is not told but by `resized`.

        Raises ArgumentError ("Size mismatch" for a block without RAM_RESIZEABLE, "Size too large", a region that would
        end above 2**64), ArgumentTypeError, ClosedError, BusyError in a listener; what listeners raise, with the length
        as it was; what `resized` raises, with the new length in place.
        """
        call = "RamBlock.resize"
        if self.closed:
            raise ClosedError(call, f"RamBlock({self._idstr!r})")
        size = page_multiple(used_length, call, "used_length")
        if size == self._used_length:
            return
        if not self._flags & RAM_RESIZEABLE:
            detail = f"Size mismatch: {self._idstr} has {self._used_length:#x} bytes and is not resizeable"
            raise ArgumentError(call, "used_length", used_length, "its length, or a block with max_length", detail)
        if size > self._max_length:
            detail = f"Size too large: {self._idstr}"
            raise ArgumentError(call, "used_length", used_length, f"at most max_length, {self._max_length:#x}", detail)
        if self._regions:
            from .region import resize

            resize(self, self._regions, size)
        else:
            self._use(size)
        if self._resized is not None:
            self._resized(self._idstr, size, self.host)

    # For the region that has its size from this block.
    def _show(self, region: MemoryRegion) -> None:
        if self._flags & RAM_RESIZEABLE:
            if self._regions is None:
                from weakref import WeakSet

                self._regions = WeakSet()
            self._regions.add(region)

    def _use(self, size: int) -> None:
        self._used_length = size
        self._dirty.mark(0, size)

    def mark_host_dirty(self, offset: int, size: int) -> None:
        """Marks the pages of [offset, offset + size): for who has written them through `host`.

        Raises ArgumentError and ArgumentTypeError for a range that is not in the block.
        """
        self._dirty.mark(*self._within("mark_host_dirty", offset, size))

    def host_dirty(self) -> list[range]:
        """Pages that the host has written or has a writable view of: ranges of their indexes, ascending, disjoint."""
        opened = self._opened()
        return self._of_guest(merge(self._dirty.ranges() + opened) if opened else self._dirty.ranges())

    def take_host_dirty(self) -> list[range]:
        """`host_dirty`, whose marks are taken off: the next call tells what was written since.

        Pages under a writable view stay dirty.  A write in another thread at the same time is in this answer or in the
        next one's, and in both rather than in none.
        """
        opened = self._opened()
        return self._of_guest(merge(self._dirty.take() + opened) if opened else self._dirty.take())

    # Asked before the marks are read: a view that goes away in between is then told twice, not never.
    def _opened(self) -> list[range]:
        return [pages_of(offset, size) for offset, size in self._mapping.open_writable() if size]

    # The pages behind `used_length` are nobody's; all count as written when they are the guest's again.
    def _of_guest(self, found: list[range]) -> list[range]:
        end = self._used_length // PAGE_SIZE
        if found and found[-1].stop > end:
            found = [range(pages.start, min(pages.stop, end)) for pages in found if pages.start < end]
        return found

    # Checks a range against what the guest has, which may be less than is mapped.
    def _within(self, method: str, offset: int, size: int | None, field: str = "size") -> tuple[int, int]:
        call, used = f"RamBlock.{method}", self._used_length
        offset = index(offset, call, "offset")
        if not 0 <= offset <= used:
            raise ArgumentError(call, "offset", offset, f"0 <= offset <= {used:#x}")
        size = used - offset if size is None else index(size, call, field)
        if not 0 <= size <= used - offset:
            raise ArgumentError(call, field, size, f"0 <= {field} <= {used - offset:#x}")
        return offset, size

    # For RamList, which has checked that the block may join.
    def _join(self, ram_list: RamList, offset: int) -> None:
        if self.closed:
            raise ClosedError("RamList.add", f"RamBlock({self._idstr!r})")
        if self._list is not None:
            raise BusyError("RamList.add", f"RamBlock({self._idstr!r})", "it is in a list")
        self._list, self._offset = ram_list, offset

    def _leave(self, ram_list: RamList) -> None:
        if self._list is ram_list:
            self._list, self._offset = None, 0

    def close(self) -> None:
        """Takes it off its list, unmaps the memory and closes the file.  Closing twice is fine.

        With discard_data=True its bytes in the file are dropped first, where the file system can do that.

        Raises ViewError (a BufferError) while a view is alive, BusyError while a memslot has it; then nothing has
        changed.  In a child of os.fork it releases the child's own mapping and descriptor only.
        """
        if getattr(self._backend, "discard_data", False) and not self.closed:
            _discard(self._mapping)
        self._mapping.close()
        if self._list is not None:
            self._list.remove(self)
        if self._file is not None:
            self._file.close()

    def __reduce__(self) -> str:
        raise TypeError(f"{self!r} cannot be copied or pickled: it owns a file and its mapping")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return f"<RamBlock {self._idstr} closed>"
        # The file is public, and may have been closed by itself.
        fd = -1 if self._file is None or self._file.closed else self._file.fd
        return (
            f"RamBlock({self._idstr!r}, used_length={self.used_length:#x}, max_length={self.max_length:#x}, "
            f"page_size={self.page_size:#x}, fd={fd}, flags={flag_names(self._flags)})"
        )


# One byte per page: for a size beyond all addresses there are not even those.
def _marks(length: int) -> HostDirty:
    try:
        return HostDirty(length // PAGE_SIZE)
    except (MemoryError, OverflowError, OSError):
        accepted = "a size that this process's addresses and the host's memory have room for"
        raise HostError(errno.ENOMEM, "mmap", "size", length, accepted) from None


def _check_backend(backend: object, size: object, max_length: object) -> None:
    from .backend import MemoryBackend

    if not isinstance(backend, MemoryBackend):
        raise ArgumentTypeError("RamBlock", "backend", backend, "None, or a MemoryBackend")
    if max_length is not None:
        detail = "memory of a backend is not resizeable"
        raise ArgumentError("RamBlock", "max_length", max_length, "None with a backend", detail)
    if size is not None and page_multiple(size, "RamBlock", "size") != backend.size:  # type: ignore[arg-type]
        raise ArgumentError("RamBlock", "size", size, f"None, or the backend's, {backend.size:#x}")


# MADV_REMOVE, as QEMU's backend does when it goes.  Not of memory that could not be closed then.
def _discard(mapping: Mapping) -> None:
    if mapping._pins:
        return  # `close` refuses, and says who has it
    try:  # noqa: SIM105 (not worth importing contextlib)
        mapping.advise("remove")
    except HostError:
        pass  # private memory (EACCES), or a file system without holes
