"""Flat views: `FlatView`, the ranges of an address space as a tree of regions shows them, and how they are rendered.

    leaves    what shows itself, with where it would show: found from the root downwards
    painting  the leaves that show first take their bytes first, the others take what is left
    merging   neighbours that go on where the last one ended, in the same region and with the same attributes, are one

A view never changes: a change of the tree makes another one.  n leaves are rendered in O(n log n): the ends of all
leaves are sorted and cut the space into fewer than 2n pieces, each is taken once, and a chain of pointers with path
halving leads over the pieces that are taken already.

Source: generate_memory_topology, render_memory_region, flatview_simplify and memory_region_get_flatview_root,
softmmu/memory.c@v7.2 of QEMU; there each leaf is compared with all ranges before it.
"""

from __future__ import annotations

from _bisect import bisect_right

from ..errors import ArgumentTypeError
from ..value import Value
from .region import ADDRESS_END, MemoryRegion

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    # start, size, region, offset in region, readonly, romd, nonvolatile, unmergeable, dirty_log_mask: a FlatRange's
    # fields in their order.  Two of them compare in C.
    Row = tuple[int, int, MemoryRegion, int, bool, bool, bool, bool, int]
    # where it shows, where its offset 0 would be, and readonly, nonvolatile and unmergeable from above
    Leaf = tuple[int, int, MemoryRegion, int, bool, bool, bool]

__all__ = ["FlatRange", "FlatView", "flatview_root", "render"]


class FlatRange(Value):
    """A range of an address space, [start, start + size), that shows `region` from `offset_in_region` on.

    `readonly`, `nonvolatile` and `unmergeable` are those of the region or of anything it shows through; `romd` and
    `dirty_log_mask` are the region's.
    """

    start: int
    size: int
    region: MemoryRegion
    offset_in_region: int
    readonly: bool
    romd: bool
    nonvolatile: bool
    unmergeable: bool
    dirty_log_mask: int

    @property
    def end(self) -> int:
        """First address behind the range."""
        return self.start + self.size

    @property
    def kind(self) -> str:
        """As `info mtree -f` says it: "rom" where it is readonly, else the region's kind."""
        return "rom" if self.readonly else self.region.kind


class FlatView:
    """What shows where: ranges in ascending order that do not overlap; between them there is nothing.

    `root`: the region it was rendered from, see `flatview_root`; None for the one empty view of all spaces that show
    nothing.  Iteration gives the ranges.  Immutable; any thread may use it.

    >>> from hvmodel.ram.region import MemoryRegion
    >>> port, reset = MemoryRegion.io("pci-conf-idx", 4), MemoryRegion.io("reset", 1)
    >>> io = MemoryRegion.container("io", 0x10000)
    >>> io.add_subregion(0xCF8, port)
    >>> io.add_subregion(0xCF9, reset, priority=1)
    >>> for r in render(io):
    ...     print(f"{r.start:x}-{r.end - 1:x} {r.region.name} @{r.offset_in_region}")
    cf8-cf8 pci-conf-idx @0
    cf9-cf9 reset @0
    cfa-cfb pci-conf-idx @2
    """

    __slots__ = ("__weakref__", "_ranges", "_rows", "_starts", "root")

    def __init__(self, root: MemoryRegion | None, rows: list[Row]) -> None:
        self.root = root
        self._rows = rows
        self._starts = [row[0] for row in rows]
        self._ranges: tuple[FlatRange, ...] | None = None

    @property
    def ranges(self) -> tuple[FlatRange, ...]:
        """Its ranges, in ascending order."""
        if self._ranges is None:  # most commits need none of them as values
            self._ranges = tuple([FlatRange(*row) for row in self._rows])
        return self._ranges

    def at(self, addr: int) -> FlatRange | None:
        """The range that has `addr`, or None.  O(log n)."""
        if isinstance(addr, bool) or not isinstance(addr, int):
            raise ArgumentTypeError("FlatView.at", "addr", addr, "an int")
        row = self._row(addr)
        return None if row is None else FlatRange(*row)

    def _row(self, addr: int) -> Row | None:
        index = bisect_right(self._starts, addr) - 1
        if index >= 0:
            row = self._rows[index]
            if addr < row[0] + row[1]:
                return row
        return None

    # Where the first range behind `addr` begins, or 2**64.
    def _next(self, addr: int) -> int:
        index = bisect_right(self._starts, addr)
        return self._starts[index] if index < len(self._starts) else ADDRESS_END

    def __iter__(self) -> Iterator[FlatRange]:
        return iter(self.ranges)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        root = "(none)" if self.root is None else self.root.name
        return f"<FlatView of {root}: {len(self._rows)} ranges>"


def flatview_root(region: MemoryRegion) -> MemoryRegion | None:
    """The region from which an address space with this root is rendered; spaces with the same one share a view.

    From a container with one enabled subregion, which is at 0 and not larger, it goes on to that; from an alias of
    all of a region to that region.  None: the region is not enabled, or a container without enabled subregions.

    As in QEMU, what the regions on the way say is lost (a readonly alias of the whole gives a view that is not), and
    a region that is the target of an alias shows at its own `addr`.

    Source: memory_region_get_flatview_root, softmmu/memory.c@v7.2 of QEMU.
    """
    while region._enabled:
        target = region._alias
        if target is not None:
            if region._alias_offset or region._size < target._size:
                return region
            region = target
        elif region._terminates:
            return region
        else:
            enabled = 0
            only = None
            for child in region._subregions:
                if child._enabled:
                    enabled += 1
                    if enabled > 1:
                        return region
                    if not child._addr and region._size >= child._size:
                        only = child
            if not enabled:
                return None
            if only is None:
                return region
            region = only
    return None


def render(root: MemoryRegion | None) -> FlatView:
    """The flat view of `root`, which need not be in an address space.  O(n log n) of the regions it shows.

    A region that shows by several aliases counts as often.
    """
    return FlatView(root, [] if root is None else _merge(_paint(_leaves(root))))


def _leaves(root: MemoryRegion) -> list[Leaf]:
    # From the last that shows to the first: a region itself shows after its subregions, and they stand in the order in
    # which they show.  Addresses may be negative or above 2**64 on the way, where an alias begins before its target.
    leaves: list[Leaf] = []
    todo: list[tuple[MemoryRegion, int, int, int, bool, bool, bool]] = []
    push, pop, found = todo.append, todo.pop, leaves.append
    push((root, 0, 0, ADDRESS_END, False, False, False))
    while todo:
        region, base, low, high, readonly, nonvolatile, unmergeable = pop()
        if not region._enabled:
            continue
        base += region._addr
        if base > low:  # noqa: PLR1730  # max and min are calls, and here they are a tenth of a commit
            low = base
        end = base + region._size
        if end < high:  # noqa: PLR1730
            high = end
        if low >= high:
            continue
        readonly = readonly or region._readonly
        nonvolatile = nonvolatile or region._nonvolatile
        unmergeable = unmergeable or region._unmergeable
        target = region._alias
        if target is not None:
            base -= target._addr + region._alias_offset
            push((target, base, low, high, readonly, nonvolatile, unmergeable))
            continue
        if region._terminates:
            found((low, high, region, base, readonly, nonvolatile, unmergeable))
        for child in region._subregions:
            push((child, base, low, high, readonly, nonvolatile, unmergeable))
    return leaves


def _paint(leaves: list[Leaf]) -> list[tuple[int, int, Leaf]]:
    # Which leaf shows on which range: [(start, end, leaf)], ascending.
    ends = {leaf[0] for leaf in leaves}
    ends.update([leaf[1] for leaf in leaves])
    cuts = sorted(ends)
    index = {cut: piece for piece, cut in enumerate(cuts)}
    shows: list[Leaf | None] = [None] * len(cuts)  # by the piece, [cuts[piece], cuts[piece + 1])
    free = list(range(len(cuts)))  # from a piece towards the first one behind it that nobody has; the last stays so
    for leaf in reversed(leaves):
        piece, end = index[leaf[0]], index[leaf[1]]
        while piece < end:
            ahead = free[piece]
            if ahead == piece:
                shows[piece] = leaf
                free[piece] = piece = piece + 1
            else:
                free[piece] = piece = free[ahead]  # halves the chain for the next one who comes this way
    painted: list[tuple[int, int, Leaf]] = []
    last: Leaf | None = None
    start = 0
    for cut, shown in zip(cuts, shows, strict=True):
        if shown is not last:
            if last is not None:
                painted.append((start, cut, last))
            last, start = shown, cut
    return painted


def _merge(painted: list[tuple[int, int, Leaf]]) -> list[Row]:
    rows: list[Row] = []
    previous: MemoryRegion | None = None
    for start, end, (_, _, region, base, readonly, nonvolatile, unmergeable) in painted:
        offset = start - base
        if region is previous:
            # Neighbours of one region; its romd and dirty_log_mask are the same in both.
            s, n, _, o, ro, romd, nv, un, mask = rows[-1]
            if s + n == start and o + n == offset and ro == readonly and nv == nonvolatile and not (un or unmergeable):
                rows[-1] = (s, end - s, region, o, ro, romd, nv, un, mask)
                continue
        previous = region
        romd, mask = region._romd, region._dirty_log_mask
        rows.append((start, end - start, region, offset, readonly, romd, nonvolatile, unmergeable, mask))
    return rows
