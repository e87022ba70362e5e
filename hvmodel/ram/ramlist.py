"""The list of all RAM blocks: `RamList` gives every block its place in one space of RAM addresses.

    ram_addr_t  0            max_length           rounded up to 64 pages (256 KiB)
                |-- pc.ram --|...................|-- pc.bios --|.....|-- pc.rom --|

A RAM address (QEMU's ram_addr_t) is no guest address: it names a byte of a block whether or not the guest sees it.
The dirty bitmaps of QEMU have one bit per page of this space.  64 pages are one `long` of such a bitmap: a block that
begins there has words of its own.

Source: find_ram_offset and ram_block_add, softmmu/physmem.c@v7.2 of QEMU (system/physmem.c since v9.0).
"""

from __future__ import annotations

from threading import Lock

from ..errors import ArgumentError, ArgumentTypeError
from ..host.mapping import index
from ..units import PAGE_SIZE, GiB, KiB, MiB, TiB, align_up
from .block import RamBlock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["OFFSET_ALIGN", "RAM_ADDR_MAX", "RamList", "find_ram_offset"]

OFFSET_ALIGN = 64 * PAGE_SIZE
"""What a block's offset is a multiple of: one `long` of a dirty bitmap."""

RAM_ADDR_MAX = (1 << 64) - 1
"""QEMU's "no offset": ram_addr_t has 64 bits."""


def find_ram_offset(blocks: Iterable[tuple[int, int]], size: int) -> int:
    """Where a new block of `size` bytes goes: the smallest gap behind a block of `blocks` that it fits in.

    `blocks` are (offset, max_length) in the order of the list, which decides between gaps of equal size: the first
    one wins.  A gap begins at the end of a block, rounded up to 256 KiB, and ends at the next block.

    Raises ArgumentError for a size below 1, and where no gap is large enough (QEMU aborts there).

    >>> hex(find_ram_offset([(0, 0x8000000)], 0x40000))
    '0x8000000'
    >>> hex(find_ram_offset([(0, 0x1000), (0x80000, 0x1000)], 0x1000))
    '0x40000'
    """
    size = index(size, "find_ram_offset", "size")
    if size < 1:
        raise ArgumentError("find_ram_offset", "size", size, "at least 1 byte")
    known = list(blocks)
    if not known:
        return 0
    starts = sorted(offset for offset, _ in known)
    best = smallest = RAM_ADDR_MAX
    for offset, length in known:
        candidate = align_up(offset + length, OFFSET_ALIGN)
        gap = _next(starts, candidate) - candidate
        if size <= gap < smallest:
            best, smallest = candidate, gap
    if best == RAM_ADDR_MAX:
        detail = f"{len(known)} blocks leave no gap of that size below 2**64"
        raise ArgumentError("find_ram_offset", "size", size, "a size that a gap has room for", detail)
    return best


# The first block that begins at `candidate` or behind it.
def _next(starts: list[int], candidate: int) -> int:
    from bisect import bisect_left

    at = bisect_left(starts, candidate)
    return starts[at] if at < len(starts) else RAM_ADDR_MAX


class RamList:
    """The RAM blocks of a machine, as QEMU's ram_list: ordered by `max_length`, the largest first.

    It gives a block its `offset` and does not own it: closing a block takes it off the list.  Of blocks of the same
    length the older one comes first.

    Threads: any.

    >>> with RamBlock("pc.ram", "1M") as ram, RamBlock("pc.bios", "256K") as bios:
    ...     blocks = RamList([ram, bios])
    ...     [(block.idstr, hex(block.offset)) for block in blocks], blocks.at(0x100010) == (bios, 0x10)
    ([('pc.ram', '0x0'), ('pc.bios', '0x100000')], True)
    """

    __slots__ = ("_blocks", "_lock", "_version")

    def __init__(self, blocks: Iterable[RamBlock] = ()) -> None:
        self._blocks: tuple[RamBlock, ...] = ()
        self._lock = Lock()
        self._version = 0
        if not hasattr(blocks, "__iter__"):
            raise ArgumentTypeError("RamList", "blocks", blocks, "RamBlocks")
        for block in blocks:
            self.add(block)

    @property
    def blocks(self) -> tuple[RamBlock, ...]:
        """The blocks in their order."""
        return self._blocks

    @property
    def version(self) -> int:
        """How often the list has changed."""
        return self._version

    @property
    def ram_addr_end(self) -> int:
        """End of the last block, in RAM addresses: what a bitmap over all of them must reach to (QEMU: last_ram_page).

        0 for an empty list.
        """
        return max((block.offset + block.max_length for block in self._blocks), default=0)

    def __iter__(self) -> Iterator[RamBlock]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, block: RamBlock) -> int:
        """Gives `block` its offset, which is returned, and puts it in its place in the list.

        Raises ArgumentTypeError; ClosedError; ArgumentError for an `idstr` that is taken (QEMU: "already registered");
        BusyError for a block that is in a list.
        """
        if not isinstance(block, RamBlock):
            raise ArgumentTypeError("RamList.add", "block", block, "a RamBlock")
        size = block.max_length
        with self._lock:
            if any(other.idstr == block.idstr for other in self._blocks):
                accepted = "a name that no block of the list has"
                raise ArgumentError("RamList.add", "idstr", block.idstr, accepted, "already registered")
            offset = find_ram_offset([(other.offset, other.max_length) for other in self._blocks], size)
            block._join(self, offset)
            place = next((n for n, other in enumerate(self._blocks) if other.max_length < size), len(self._blocks))
            self._blocks = (*self._blocks[:place], block, *self._blocks[place:])
            self._version += 1
        return offset

    def remove(self, block: RamBlock) -> None:
        """Takes `block` off the list; its RAM addresses are free again.  Raises ArgumentError if it is not there."""
        with self._lock:
            rest = tuple(other for other in self._blocks if other is not block)
            if len(rest) == len(self._blocks):
                raise ArgumentError("RamList.remove", "block", block, "a block of this list")
            self._blocks = rest
            self._version += 1
            block._leave(self)

    def named(self, idstr: str) -> RamBlock:
        """The block called `idstr` (QEMU: qemu_ram_block_by_name).  Raises ArgumentError if there is none."""
        for block in self._blocks:
            if block.idstr == idstr:
                return block
        names = ", ".join(block.idstr for block in self._blocks)
        raise ArgumentError("RamList.named", "idstr", idstr, names or "nothing: the list is empty")

    def at(self, ram_addr: int) -> tuple[RamBlock, int]:
        """The block that has the RAM address, and the offset in it (QEMU: qemu_get_ram_block).

        Raises ArgumentError for an address in no block.
        """
        ram_addr = index(ram_addr, "RamList.at", "ram_addr")
        for block in self._blocks:
            if 0 <= ram_addr - block.offset < block.max_length:
                return block, ram_addr - block.offset
        raise ArgumentError("RamList.at", "ram_addr", ram_addr, "an address that a block has")

    def info_ramblock(self) -> str:
        """The text of QEMU 7.2's `info ramblock`: one line per block, in the order of the list.

        Source: ram_block_format, softmmu/physmem.c@v7.2.
        """
        lines = [f"{'Block Name':>24} {'PSize':>8}  {'Offset':>18} {'Used':>18} {'Total':>18}"]
        lines += [
            f"{block.idstr:>24} {_words(block.page_size):>8}  0x{block.offset:016x}"
            f" 0x{block.used_length:016x} 0x{block.max_length:016x}"
            for block in self._blocks
        ]
        return "\n".join(lines) + "\n"

    def __repr__(self) -> str:
        return f"<RamList of {', '.join(block.idstr for block in self._blocks) or 'nothing'}>"


# As QEMU's size_to_str of a power of two: "4 KiB".
def _words(size: int) -> str:
    for unit, name in ((TiB, "TiB"), (GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"
