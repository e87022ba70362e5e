"""RAM blocks: `RamBlock` owns a memory file, its mapping, and the record of what the host wrote there.

    memfd  |<---------------- max_length, sealed GROW and SHRINK ---------------->|
    host   |<-- used_length: shared, readable and writable ---------------------->|
    offset  where the block begins in the space of all RAM blocks (ram_addr_t)

Source: struct RAMBlock, include/system/ramblock.h@v10.1 of QEMU; qemu_ram_alloc_internal, system/physmem.c.
"""

from __future__ import annotations

import os

from ..errors import ArgumentError
from ..host.mapping import PROT_READ, PROT_WRITE, Mapping, index
from ..host.memfd import F_SEAL_GROW, F_SEAL_SHRINK, MemFd, file_name, page_multiple
from ..units import PAGE_SIZE, Hva, MiB
from .dirty import HostDirty, merge, pages_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from typing_extensions import Buffer

    from ..host.mapping import Writable

__all__ = ["RAM_SHARED", "RamBlock", "host_memory", "ram_size"]

RAM_SHARED = 1 << 1
"""Flag of a block whose writes go to its file, where others who map it see them."""


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
    """A block of guest RAM: `size` bytes of a memfd called `idstr`, sealed against SHRINK and GROW, mapped shared.

    The fields have QEMU's names.  `size` is an int or text such as "16M", whole pages, at most what the host has.

    Bytes are addressed by their offset in the block.  `view` and `read` never fault, nor does `write`; see
    hvmodel.host.mapping.  All that the host writes through this object is remembered by page: `host_dirty`.

    Raises ArgumentError, ArgumentTypeError; HostError of memfd_create, ftruncate, F_ADD_SEALS and mmap (EMFILE,
    ENOMEM).  Nothing is left open then.

    Calls: memfd_create(2), ftruncate(2), fcntl(2) F_ADD_SEALS, mmap(2).
    Threads: any; of `take_host_dirty` one at a time.

    >>> with RamBlock("pc.ram", "1M") as block:
    ...     block.write(0x7C00, b"hello")
    ...     block.read(0x7C00, 5), block.take_host_dirty(), block.host_dirty()
    (b'hello', [range(7, 8)], [])
    """

    __slots__ = ("__weakref__", "_dirty", "_idstr", "_mapping", "_memfd", "_used_length")

    def __init__(self, idstr: str, size: int | str) -> None:
        if not file_name(idstr, "RamBlock", "idstr"):
            raise ArgumentError("RamBlock", "idstr", idstr, "a name that is not empty")
        size = ram_size(size, "RamBlock", "size")
        self._idstr, self._used_length = idstr, size
        self._dirty = HostDirty(size // PAGE_SIZE)
        self._memfd = MemFd(idstr, size, seals=F_SEAL_GROW | F_SEAL_SHRINK)
        try:
            self._mapping = Mapping(
                self._memfd, size, prot=PROT_READ | PROT_WRITE, owner="RamBlock", written=self._dirty.mark
            )
        except BaseException:
            self._memfd.close()
            raise

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
        """Bytes up to which `used_length` could grow: the same, for this block is not resizeable."""
        return self._used_length

    @property
    def page_size(self) -> int:
        """Bytes of a page of its file."""
        return PAGE_SIZE

    @property
    def flags(self) -> int:
        """QEMU's flags of the block: RAM_SHARED."""
        return RAM_SHARED

    @property
    def offset(self) -> int:
        """Where the block begins in the space of all RAM blocks: 0, as long as it is the only one."""
        return 0

    @property
    def memfd(self) -> MemFd:
        """The file, which this object owns."""
        return self._memfd

    @property
    def fd(self) -> int:
        """The file's descriptor, which stays this object's.  Raises ClosedError."""
        return self._memfd.fd

    @property
    def fd_offset(self) -> int:
        """Where in the file the block begins."""
        return 0

    @property
    def mapping(self) -> Mapping:
        """The mapping, which this object owns: what a memslot is made of, and pins."""
        return self._mapping

    @property
    def host(self) -> Hva:
        """The address of the first byte in this process.  Raises ClosedError.

        What is written through the address leaves no mark: see `mark_host_dirty`.
        """
        return self._mapping.hva

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._mapping.closed

    def view(self, offset: int = 0, size: int | None = None) -> memoryview:
        """The bytes [offset, offset + size) as a read-only memoryview, without copying; see `Mapping.view`."""
        return self._mapping.view(offset, size)

    def writable(self, offset: int = 0, size: int | None = None) -> Writable:
        """A context manager: the bytes [offset, offset + size) as a writable memoryview; see `Mapping.writable`.

        Its pages count as dirty while anything made from the view is alive, and are marked afterwards.
        """
        return self._mapping.writable(offset, size)

    def read(self, offset: int, size: int) -> bytes:
        """A copy of the bytes [offset, offset + size); see `Mapping.read`."""
        return self._mapping.read(offset, size)

    def write(self, offset: int, data: Buffer) -> None:
        """Copies `data` to `offset` and marks the pages; see `Mapping.write`."""
        self._mapping.write(offset, data)

    def mark_host_dirty(self, offset: int, size: int) -> None:
        """Marks the pages of [offset, offset + size): for who has written them through `host`.

        Raises ArgumentError and ArgumentTypeError for a range that is not in the block.
        """
        call = "RamBlock.mark_host_dirty"
        offset, size = index(offset, call, "offset"), index(size, call, "size")
        if not 0 <= offset <= self._used_length:
            raise ArgumentError(call, "offset", offset, f"0 <= offset <= {self._used_length:#x}")
        if not 0 <= size <= self._used_length - offset:
            raise ArgumentError(call, "size", size, f"0 <= size <= {self._used_length - offset:#x}")
        self._dirty.mark(offset, size)

    def host_dirty(self) -> list[range]:
        """Pages that the host has written or has a writable view of: ranges of their indexes, ascending, disjoint."""
        opened = self._opened()
        return merge(self._dirty.ranges() + opened) if opened else self._dirty.ranges()

    def take_host_dirty(self) -> list[range]:
        """`host_dirty`, whose marks are taken off: the next call tells what was written since.

        Pages under a writable view stay dirty.  A write in another thread at the same time is in this answer or in the
        next one's, and in both rather than in none.
        """
        opened = self._opened()
        return merge(self._dirty.take() + opened) if opened else self._dirty.take()

    # Asked before the marks are read: a view that goes away in between is then told twice, not never.
    def _opened(self) -> list[range]:
        return [pages_of(offset, size) for offset, size in self._mapping.open_writable() if size]

    def close(self) -> None:
        """Unmaps the memory and closes the file.  Closing twice is fine.

        Raises ViewError (a BufferError) while a view is alive, BusyError while a memslot has it; then nothing has
        changed.  In a child of os.fork it releases the child's own mapping and descriptor only.
        """
        self._mapping.close()
        self._memfd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return f"<RamBlock {self._idstr} closed>"
        return (
            f"RamBlock({self._idstr!r}, used_length={self.used_length:#x}, max_length={self.max_length:#x}, "
            f"page_size={self.page_size:#x}, fd={self.fd}, flags=SHARED)"
        )
