"""Page tables, built: `PageTables` maps ranges of linear addresses and hands out the tables as bytes.

    "32bit"    2 levels, 10+10 bits        4 KiB and, with CR4.PSE, 4 MiB
    "pae"      3 levels, 2+9+9 bits        4 KiB, 2 MiB
    "4level"   4 levels, 9+9+9+9 bits      4 KiB, 2 MiB, 1 GiB (where CPUID has it)
    "5level"   5 levels, 9+9+9+9+9 bits    the same; CR4.LA57

An entry of 8 bytes, of all but "32bit":

     63 62         52 51                                 12 11  9  8  7  6  5   4   3   2   1  0
    +--+-------------+-------------------------------------+-----+--+--+--+--+---+---+---+---+--+
    |NX|   ignored   | physical address of page or table   | ign.| G|PS| D| A|PCD|PWT|U/S|R/W| P|
    +--+-------------+-------------------------------------+-----+--+--+--+--+---+---+---+---+--+

G, PS, D have a meaning where the entry maps a page; PS 1 says that one above the lowest level does (at the lowest, the
bit is PAT).  The entry of a page of 2 MiB or 1 GiB has its address from bit 21 or 30 on, PAT in bit 12, zeros between.
The four entries at the top of "pae" have no R/W, U/S, A and NX: these bits are reserved there.

An entry of 4 bytes, of "32bit": the low half of the above.  That of a page of 4 MiB (PSE-36):

     31           22 21 20              13 12  11  9  8  7  6  5   4   3   2   1  0
    +---------------+--+------------------+---+-----+--+--+--+--+---+---+---+---+--+
    | address 31:22 | 0|  address 39:32   |PAT| ign.| G| 1| D| A|PCD|PWT|U/S|R/W| P|
    +---------------+--+------------------+---+-----+--+--+--+--+---+---+---+---+--+

Entries that lead to a table permit all (R/W, U/S, no NX), so that the last entry alone decides what a page permits.

Sources: Intel SDM vol. 3 chapter 5 (paging), tables 5-4 to 5-20.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right

from ..errors import ArgumentError, ArgumentTypeError
from ..units import PAGE_SIZE, GiB, MiB
from ..value import Value
from .number import number
from .registers import is_canonical

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal

    Mode = Literal["32bit", "pae", "4level", "5level"]

__all__ = ["PAGING_MODES", "Leaf", "PageTables"]

_P, _RW, _US, _PWT, _PCD, _A, _D, _PS, _G = (1 << bit for bit in range(9))
_PAT, _PAT_LARGE = 1 << 7, 1 << 12  # where the lowest level has it, and where a larger page does
_NX = 1 << 63
_TABLE = _P | _RW | _US
_ADDRESS = (1 << 52) - PAGE_SIZE
_MAX_SIZE = 64 * MiB


class _Format(Value):
    # `levels`: (lowest bit, number of bits) of the index into a table, from the lowest level, number 1, upwards.
    entry: int
    levels: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]

    @property
    def bits(self) -> int:
        # Of a linear address.
        shift, bits = self.levels[-1]
        return shift + bits


_LONG = ((12, 9), (21, 9), (30, 9), (39, 9), (48, 9))
_FORMATS: dict[Mode, _Format] = {
    "32bit": _Format(4, ((12, 10), (22, 10)), (PAGE_SIZE, 4 * MiB)),
    "pae": _Format(8, ((12, 9), (21, 9), (30, 2)), (PAGE_SIZE, 2 * MiB)),
    "4level": _Format(8, _LONG[:4], (PAGE_SIZE, 2 * MiB, GiB)),
    "5level": _Format(8, _LONG, (PAGE_SIZE, 2 * MiB, GiB)),
}

PAGING_MODES: tuple[Mode, ...] = tuple(_FORMATS)
"""The names of the modes that page."""


class Leaf(Value):
    """What maps a page: its first linear address, where it leads, the page's size, and the entry as it is in memory."""

    gva: int
    gpa: int
    size: int
    entry: int

    @property
    def writable(self) -> bool:
        """R/W."""
        return bool(self.entry & _RW)

    @property
    def user(self) -> bool:
        """U/S: CPL 3 may use it."""
        return bool(self.entry & _US)

    @property
    def nx(self) -> bool:
        """NX: no instruction is fetched from it."""
        return bool(self.entry & _NX)


class PageTables:
    """Page tables whose root lies at guest physical address `root_gpa`, the other tables behind it, page by page.

    `mode`: "32bit", "pae", "4level" or "5level".  `maxphyaddr`: bits of a physical address (CPUID 0x80000008), 32 to
    52; "32bit" reaches 40 at most, and 32 with pages of 4 KiB.  `accessed`: A is set in all entries.  `dirty`: D is set
    in those of writable pages.  With both, no walk writes to the tables; by default both are clear.  `max_size`: bytes
    that the tables may take, all together.

    The tables lie below 4 GiB with "32bit", their root with "pae", for so wide is CR3.

    ArgumentError, ArgumentTypeError: the arguments.  Nothing has changed after an error.
    Thread safety: one thread at a time.

    >>> tables = PageTables(0x10000)
    >>> tables.map(0, 0, 4 << 20)                               # two pages of 2 MiB
    >>> tables.map(0xffff_8000_0000_0000, 0x5000, 0x1000, nx=True)
    >>> tables.find(0x20_1234)
    Leaf(gva=0x200000, gpa=0x200000, size=0x200000, entry=0x200083)
    >>> tables.translate(0xffff_8000_0000_0123)
    20771
    >>> [hex(gpa) for gpa in tables.pages()]                    # PML4; PDPT and PD; PDPT, PD and PT
    ['0x10000', '0x11000', '0x12000', '0x13000', '0x14000', '0x15000']
    """

    def __init__(
        self,
        root_gpa: int,
        mode: Mode = "4level",
        *,
        maxphyaddr: int = 52,
        accessed: bool = False,
        dirty: bool = False,
        max_size: int = _MAX_SIZE,
    ) -> None:
        if not isinstance(mode, str):
            raise ArgumentTypeError("PageTables", "mode", mode, "one of " + ", ".join(map(repr, _FORMATS)))
        if mode not in _FORMATS:
            raise ArgumentError("PageTables", "mode", mode, ", ".join(map(repr, _FORMATS)))
        self._format = _FORMATS[mode]
        self._mode = mode
        number("PageTables", "maxphyaddr", maxphyaddr, 52, 32)
        self._width = min(maxphyaddr, 40) if mode == "32bit" else maxphyaddr
        # What the entry of a table and CR3 can name.
        self._tables_end = 1 << (32 if mode == "32bit" else self._width)
        root_end = 1 << (32 if mode in ("32bit", "pae") else self._width)
        _aligned("PageTables", "root_gpa", root_gpa, PAGE_SIZE, root_end - PAGE_SIZE)
        _aligned("PageTables", "max_size", max_size, PAGE_SIZE, 1 << 40)
        if not max_size:
            raise ArgumentError("PageTables", "max_size", max_size, f"at least {PAGE_SIZE:#x}, for the root")
        self._root = root_gpa
        self._max = min(max_size, self._tables_end - root_gpa)
        self._accessed, self._dirty = _A * bool(accessed), _D * bool(dirty)
        top = len(self._format.levels)
        self._tables: list[bytearray] = [bytearray(PAGE_SIZE)]
        self._numbers: dict[tuple[int, int], int] = {(top, 0): 0}  # (level, the address bits above its index)
        self._starts: list[int] = []  # of the mapped ranges, in order
        self._ranges: list[tuple[int, int, int]] = []  # start, end, gpa; addresses without the bits above `bits`
        self._uses_nx = False
        self._uses_large = False

    # ---- what it is ----

    @property
    def mode(self) -> str:
        """The mode it was made for."""
        return self._mode

    @property
    def cr3(self) -> int:
        """What goes into CR3: the root's address."""
        return self._root

    @property
    def size(self) -> int:
        """Bytes of all tables, which lie at [cr3, cr3 + size)."""
        return len(self._tables) * PAGE_SIZE

    @property
    def uses_nx(self) -> bool:
        """Whether an entry has NX: a reserved bit unless EFER.NXE is 1."""
        return self._uses_nx

    @property
    def uses_large_pages(self) -> bool:
        """Whether a page is larger than 4 KiB: with "32bit" that takes CR4.PSE."""
        return self._uses_large

    def pages(self) -> dict[int, bytes]:
        """The tables by their guest physical addresses, 4096 bytes each."""
        return {self._root + at * PAGE_SIZE: bytes(table) for at, table in enumerate(self._tables)}

    def image(self) -> bytes:
        """All tables, `size` bytes, as they lie in memory from `cr3` on."""
        return b"".join(self._tables)

    def ranges(self) -> list[tuple[int, int, int]]:
        """What was mapped, in the order of the addresses: (gva, gpa, size), one for each map()."""
        return [(self._sign_extended(start), gpa, end - start) for start, end, gpa in self._ranges]

    # ---- mapping ----

    def map(
        self,
        gva: int,
        gpa: int,
        size: int,
        *,
        writable: bool = True,
        user: bool = False,
        nx: bool = False,
        page_size: int | None = None,
        global_: bool = False,
        pwt: bool = False,
        pcd: bool = False,
        pat: bool = False,
    ) -> None:
        """Map linear addresses [gva, gva + size) to physical [gpa, gpa + size).

        All three are multiples of 4096, and of `page_size` where one is given.  Without, each page is as large as fits,
        but never 1 GiB, which not every processor has.  `gva` and the range's last byte are in one half of the
        canonical addresses; "32bit" and "pae" have 32 bits.

        `writable`: R/W.  `user`: U/S.  `nx`: NX, which "32bit" lacks.  `global_`: G (with CR4.PGE the TLB keeps it).
        `pwt`, `pcd`, `pat`: the page's memory type, by the MSR IA32_PAT.

        ArgumentError: an address or size that is not such; a part of the range is mapped already; a page of 4 KiB
        above 4 GiB with "32bit"; the tables would take more than `max_size`.  ArgumentTypeError.

        >>> PageTables(0x1000, "pae").map(0x1000, 0x800, 0x1000)
        Traceback (most recent call last):
        hvmodel.errors.ArgumentError: PageTables.map: gpa=0x800; accepted: a multiple of 0x1000, up to 0xffffffffff000
        """
        call = "PageTables.map"
        start = self._start(call, gva)
        if page_size is not None:
            number(call, "page_size", page_size)
            if page_size not in self._format.sizes:
                sizes = ", ".join(map(hex, self._format.sizes))
                raise ArgumentError(call, "page_size", page_size, f"{sizes}, or None: the largest that fits")
        unit = page_size or PAGE_SIZE
        if start % unit:
            raise ArgumentError(call, "gva", gva, f"a multiple of {unit:#x}")
        _aligned(call, "gpa", gpa, unit, (1 << self._width) - unit)
        _aligned(call, "size", size, unit, 1 << 64)
        if not size:
            raise ArgumentError(call, "size", size, f"at least one page, {unit:#x} bytes")
        self._check_room(call, gva, start, gpa, size)
        if nx and self._format.entry == 4:
            raise ArgumentError(call, "nx", nx, "False", "entries of 4 bytes have no NX")
        runs = list(self._runs(start, gpa, size, page_size))
        if self._format.entry == 4:
            for _, to, length, page in runs:
                if page == PAGE_SIZE and to + length > 4 * GiB:
                    raise ArgumentError(
                        call, "gpa", gpa, "[gpa, gpa + size) below 4 GiB", "only a page of 4 MiB reaches further"
                    )
        self._add_tables(call, size, runs)
        flags = _P | _RW * bool(writable) | _US * bool(user) | _NX * bool(nx) | _G * bool(global_)
        flags |= _PWT * bool(pwt) | _PCD * bool(pcd)
        flags |= self._accessed | self._dirty * bool(writable)
        for at, to, length, page in runs:
            self._fill(at, to, length, page, flags | self._page_flags(page, bool(pat)))
        place = bisect_right(self._starts, start)
        self._starts.insert(place, start)
        self._ranges.insert(place, (start, start + size, gpa))
        self._uses_nx |= bool(nx)
        self._uses_large |= any(page != PAGE_SIZE for *_, page in runs)

    def _start(self, call: str, gva: object) -> int:
        # The bits of a linear address that are looked at.
        bits = self._format.bits
        gva = number(call, "gva", gva)
        if bits == 32:
            if gva >> 32:
                raise ArgumentError(call, "gva", gva, "0 to 0xffffffff")
        elif not is_canonical(gva, la57=bits == 57):
            half = 1 << bits - 1
            accepted = f"a canonical address: 0 to {half - 1:#x}, or {(1 << 64) - half:#x} to {(1 << 64) - 1:#x}"
            raise ArgumentError(call, "gva", gva, accepted)
        return gva & (1 << bits) - 1

    def _sign_extended(self, address: int) -> int:
        bits = self._format.bits
        return address if bits == 32 or not address >> bits - 1 else address | (1 << 64) - (1 << bits)

    def _check_room(self, call: str, gva: int, start: int, gpa: int, size: int) -> None:
        bits = self._format.bits
        half = 1 << (bits if bits == 32 else bits - 1)
        left = half - start % half
        if size > left:
            raise ArgumentError(call, "size", size, f"up to {left:#x}", f"no linear address follows from {gva:#x} on")
        if size > (1 << self._width) - gpa:
            accepted = f"up to {(1 << self._width) - gpa:#x}"
            raise ArgumentError(call, "size", size, accepted, f"physical addresses have {self._width} bits")
        after = bisect_right(self._starts, start)
        for at in (after - 1, after):
            if 0 <= at < len(self._ranges):
                first, end, to = self._ranges[at]
                if first < start + size and start < end:
                    taken = f"[{self._sign_extended(first):#x}, {self._sign_extended(end - 1) + 1:#x}) is mapped"
                    raise ArgumentError(call, "gva", gva, "addresses not yet mapped", f"{taken} to {to:#x}")

    def _runs(self, start: int, gpa: int, size: int, page_size: int | None) -> Iterator[tuple[int, int, int, int]]:
        # The range as runs of pages of one size: (start, gpa, bytes, page size), in order.
        if page_size is not None:
            yield start, gpa, size, page_size
            return
        large = self._format.sizes[1]
        head = -start % large
        if (start - gpa) % large or head + large > size:
            yield start, gpa, size, PAGE_SIZE
            return
        body = (size - head) // large * large
        if head:
            yield start, gpa, head, PAGE_SIZE
        yield start + head, gpa + head, body, large
        if tail := size - head - body:
            yield start + head + body, gpa + head + body, tail, PAGE_SIZE

    def _level(self, page_size: int) -> int:
        # The level whose entries map pages of this size.
        return self._format.sizes.index(page_size) + 1

    def _add_tables(self, call: str, size: int, runs: list[tuple[int, int, int, int]]) -> None:
        levels = self._format.levels
        left = self._max // PAGE_SIZE - len(self._tables)
        missing: dict[tuple[int, int], None] = {}
        for start, _, length, page in runs:
            for level in range(len(levels) - 1, self._level(page) - 1, -1):
                shift = levels[level][0]  # of the entry above, which leads to the table
                first, last = start >> shift, (start + length - 1) >> shift
                if last - first >= left + len(self._tables):
                    missing[-1, 0] = None  # too many to be listed
                    break
                missing |= dict.fromkeys((level, at) for at in range(first, last + 1))
        new = [key for key in missing if key not in self._numbers]
        if len(new) > left or (-1, 0) in missing:
            most = f"{self._max // PAGE_SIZE} tables, {self._max:#x} bytes at {self._root:#x}"
            raise ArgumentError(call, "size", size, f"what {most}, can map", "that takes more tables; see max_size")
        for level, at in new:
            number = self._numbers[level, at] = len(self._tables)
            self._tables.append(bytearray(PAGE_SIZE))
            is_pdpte = self._mode == "pae" and level == 2  # the entry that leads to it is one of the four at the top
            flags = _P if is_pdpte else _TABLE | self._accessed
            self._store(level + 1, at, [(self._root + number * PAGE_SIZE) | flags])

    def _store(self, level: int, at: int, entries: list[int]) -> None:
        # Puts entries of one table, the first at `at`: its index with the address bits above it.
        bits, width = self._format.levels[level - 1][1], self._format.entry
        table = self._tables[self._numbers[level, at >> bits]]
        index = (at & (1 << bits) - 1) * width
        table[index : index + len(entries) * width] = array("Q" if width == 8 else "I", entries).tobytes()

    def _page_flags(self, page: int, pat: bool) -> int:
        if page == PAGE_SIZE:
            return _PAT * pat
        return _PS | _PAT_LARGE * pat

    def _fill(self, start: int, gpa: int, length: int, page: int, flags: int) -> None:
        level = self._level(page)
        shift, bits = self._format.levels[level - 1]
        at, stop = start >> shift, (start + length) >> shift
        while at < stop:
            end = min(stop, (at >> bits) + 1 << bits)  # where this table ends
            count = end - at
            addresses = range(gpa, gpa + count * page, page)
            if self._format.entry == 4:
                entries = [(to & 0xFFFFFFFF) | to >> 32 << 13 | flags for to in addresses]
            else:
                entries = [to | flags for to in addresses]
            self._store(level, at, entries)
            at, gpa = end, gpa + count * page

    # ---- looking up, as the processor does ----

    def find(self, gva: int) -> Leaf | None:
        """The page that maps `gva`, read from the tables, or None.  ArgumentError: not a canonical address."""
        start = self._start("PageTables.find", gva)
        width, number = self._format.entry, 0
        for level in range(len(self._format.levels), 0, -1):
            shift, bits = self._format.levels[level - 1]
            index = (start >> shift & (1 << bits) - 1) * width
            entry = int.from_bytes(self._tables[number][index : index + width], "little")
            if not entry & _P:
                return None
            if level > 1 and not entry & _PS:
                number = ((entry & _ADDRESS) - self._root) // PAGE_SIZE
                continue
            size = 1 << shift
            gpa = entry & _ADDRESS & -size
            if width == 4 and level > 1:
                gpa |= (entry >> 13 & 0xFF) << 32
            return Leaf(self._sign_extended(start & -size), gpa, size, entry)
        raise AssertionError("the lowest level leads to no table")

    def translate(self, gva: int) -> int | None:
        """Where `gva` leads, a physical address, or None where it is not mapped.  ArgumentError as find()."""
        leaf = self.find(gva)
        return None if leaf is None else leaf.gpa + gva % leaf.size

    def leaves(self) -> Iterator[Leaf]:
        """All pages, in the order of their addresses."""
        for start, end, _ in list(self._ranges):
            at = start
            while at < end:
                leaf = self.find(self._sign_extended(at))
                assert leaf is not None
                yield leaf
                at += leaf.size

    def __repr__(self) -> str:
        return f"<PageTables {self._mode} at {self._root:#x}, {len(self._tables)} tables>"


def _aligned(call: str, field: str, value: object, unit: int, last: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(call, field, value, "an int")
    if value % unit or not 0 <= value <= last:
        raise ArgumentError(call, field, value, f"a multiple of {unit:#x}, up to {last:#x}")
