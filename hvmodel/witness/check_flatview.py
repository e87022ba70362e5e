"""The check of flat views: `FlatView` against a painter that asks, for one byte after the other, what shows there.

The painter knows nothing of ranges: it has its own record of the tree (`Twin`), sorts subregions itself, and goes from
the root down to each byte.  Trees are random, and so are the changes that are made to them; with each, a listener that
only believes what it is told must end up with the same ranges.

The bytes painted are all those of a window at 0 and of one below 2**64, as large as everything of finite size in the
tree is together; what is between them is one byte's worth, for no edge can be there.
"""

from __future__ import annotations

from itertools import count

from ..ram.address_space import AddressSpace
from ..ram.listener import MemoryListener
from ..ram.region import ADDRESS_END, MemoryRegion, MemoryRegionOps
from ..ram.topology import transaction
from .registry import check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from random import Random

    from ..ram.block import RamBlock
    from ..ram.flatview import FlatRange
    from ..ram.listener import MemoryRegionSection
    from .result import Tally

    # What a byte shows: twin, offset in it, readonly, romd, nonvolatile, unmergeable, dirty_log_mask, and the way.
    Shown = tuple["Twin", int, bool, bool, bool, bool, int, tuple[int, ...]]
    # start, size, name, offset, readonly, romd, nonvolatile, unmergeable; and with dirty_log_mask
    Key = tuple[int, int, str, int, bool, bool, bool, bool]
    Range = tuple[int, int, str, int, bool, bool, bool, bool, int]

__all__ = ["Forest", "Twin", "check_flatview"]

_KINDS = ("container", "container", "container", "ram", "rom", "rom_device", "io", "io", "alias", "alias", "alias")
_SMALL = 24  # bytes: what offsets and sizes are below, but for those of 2**64


class _Block:
    # In the place of a RamBlock, whose sizes are whole pages; nobody reads or writes it.
    def __init__(self, size: int) -> None:
        self.used_length = self.max_length = size


class Twin:
    """The painter's own record of a region, and the region."""

    def __init__(self, kind: str, name: str, size: int, target: Twin | None, offset: int) -> None:
        self.kind, self.name, self.size, self.target, self.offset = kind, name, size, target, offset
        self.addr = self.priority = self.joined = self.mask = 0
        self.parent: Twin | None = None
        self.children: list[Twin] = []
        self.enabled = self.romd = True
        self.readonly = kind == "rom"
        self.nonvolatile = self.unmergeable = False
        block: RamBlock = _Block(size)  # type: ignore[assignment]
        if kind == "container":
            self.region = MemoryRegion.container(name, size)
        elif kind == "ram":
            self.region = MemoryRegion.ram(name, block)
        elif kind == "rom":
            self.region = MemoryRegion.rom(name, block)
        elif kind == "rom_device":
            self.region = MemoryRegion.rom_device(name, block, MemoryRegionOps())
        elif kind == "io":
            self.region = MemoryRegion.io(name, size)
        else:
            assert target is not None
            self.region = MemoryRegion.alias(name, target.region, offset, size)

    def show(self, at: int, above: tuple[bool, bool, bool], way: tuple[int, ...]) -> Shown | None:
        """What the byte `at` of this region shows, if anything."""
        if not self.enabled or not 0 <= at < self.size:
            return None
        way = (*way, id(self))
        readonly, nonvolatile, unmergeable = above
        above = readonly or self.readonly, nonvolatile or self.nonvolatile, unmergeable or self.unmergeable
        if self.target is not None:
            return self.target.show(at + self.offset, above, way)
        for child in sorted(self.children, key=lambda child: (-child.priority, -child.joined)):
            shown = child.show(at - child.addr, above, way)
            if shown is not None:
                return shown
        if self.kind == "container":
            return None
        return self, at, above[0], self.romd, above[1], above[2], self.mask, way

    def top(self) -> Twin | None:
        """From where an address space with this root is painted: the rule of QEMU's memory_region_get_flatview_root."""
        if not self.enabled:
            return None
        if self.target is not None:
            whole = self.offset == 0 and self.size >= self.target.size
            return self.target.top() if whole else self
        if self.kind != "container":
            return self
        enabled = [child for child in self.children if child.enabled]
        if len(enabled) == 1 and enabled[0].addr == 0 and self.size >= enabled[0].size:
            return enabled[0].top()
        return self if enabled else None

    def shows(self, other: Twin) -> bool:
        """Whether `other` is this one, or in it, also by aliases."""
        below = [*self.children, *([] if self.target is None else [self.target])]
        return self is other or any(child.shows(other) for child in below)


class _Believer(MemoryListener):
    # Has the sections that it was told of, with the mask that is logged, and notes where what it was told was wrong.
    def __init__(self) -> None:
        self.sections: dict[Key, int] = {}
        self.wrong: list[str] = []

    @staticmethod
    def _key(section: MemoryRegionSection) -> Key:
        s = section
        start, name, offset = s.offset_within_address_space, s.region.name, s.offset_within_region
        return start, s.size, name, offset, s.readonly, s.romd, s.nonvolatile, s.unmergeable

    def region_add(self, section: MemoryRegionSection) -> None:
        start = section.offset_within_address_space
        if any(key[0] < section.end and start < key[0] + key[1] for key in self.sections):
            self.wrong.append(f"added where something is: {section}")
        self.sections[self._key(section)] = section.region.dirty_log_mask

    def region_del(self, section: MemoryRegionSection) -> None:
        if self.sections.pop(self._key(section), None) is None:
            self.wrong.append(f"deleted, but never added: {section}")

    def region_nop(self, section: MemoryRegionSection) -> None:
        if self._key(section) not in self.sections:
            self.wrong.append(f"stayed, but was never added: {section}")

    def log_start(self, section: MemoryRegionSection, old: int, new: int) -> None:
        if not new & ~old:
            self.wrong.append(f"started nothing: {section}, {old} {new}")
        self.sections[self._key(section)] = new

    def log_stop(self, section: MemoryRegionSection, old: int, new: int) -> None:
        if not old & ~new:
            self.wrong.append(f"stopped nothing: {section}, {old} {new}")
        self.sections[self._key(section)] = new


class Forest:
    """Random regions, some of them roots of address spaces, and random changes to them."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.twins: list[Twin] = []
        self.spaces: list[tuple[Twin, AddressSpace, _Believer]] = []
        self.clock = count()
        for number in range(random.randint(3, 16)):
            twin = self.twin(number)
            self.twins.append(twin)
            if random.random() < 0.85:
                # Most of them near the root, so that there is something to see, and to overlap.
                self.place(twin, self.twins[int(number * random.random() ** 3)])
                for _ in range(random.randint(0, 3)):
                    self.neighbour(twin)
                    twin = self.twins[-1]
        for _ in range(random.randint(0, 10)):
            self.change()
        for number in range(random.randint(1, 3)):
            root = self.twins[int(len(self.twins) * random.random() ** 3)]
            if random.random() < 0.3:
                root = Twin("alias", f"root{number}", ADDRESS_END, root, 0)
                self.twins.append(root)
            self.spaces.append((root, AddressSpace(root.region, f"space{number}"), _Believer()))
        for _, space, listener in self.spaces:
            space.add_listener(listener)

    def end(self) -> None:
        """Closes the address spaces."""
        for _, space, _ in self.spaces:
            space.close()

    def twin(self, number: int) -> Twin:
        """A new region, in nothing yet."""
        random = self.random
        kind = random.choice(_KINDS if self.twins else _KINDS[:3])
        size = random.choice((0, 1, _SMALL, ADDRESS_END)) if random.random() < 0.15 else random.randint(1, _SMALL)
        if kind in ("ram", "rom", "rom_device"):
            size = min(size, _SMALL)
        elif not self.twins or (kind == "container" and random.random() < 0.5):
            size = ADDRESS_END
        target, offset = None, 0
        if kind == "alias":
            target = random.choice(self.twins)
            if size != ADDRESS_END and random.random() < 0.7:
                offset = self.somewhere(size)
                if random.random() < 0.7:  # something of the target shows, and mostly goes on behind this part
                    size = random.randint(1, _SMALL // 4)
                    offset = random.randint(0, min(target.size, _SMALL) // 2)
        return Twin(kind, f"{kind}{number}", size, target, offset)

    def change(self) -> None:
        """One change, of one of the things that can change; of the twin and of its region."""
        random = self.random
        twin = random.choice(self.twins)
        what = random.choice(("place", "place", "place", "take", "enabled", "readonly", "nonvolatile", "unmergeable",
                              "romd", "mask", "size", "offset", "addr"))  # fmt: skip
        if what == "place":
            self.place(twin, random.choice(self.twins))
        elif what == "take" and twin.parent is not None:
            twin.parent.region.del_subregion(twin.region)
            twin.parent.children.remove(twin)
            twin.parent = None
        elif what == "addr" and twin.parent is not None:
            addr = self.somewhere(twin.size)
            if addr != twin.addr:
                twin.joined = next(self.clock)
            twin.region.addr = twin.addr = addr
        elif what == "size" and twin.size < ADDRESS_END:
            longest = min(_SMALL, ADDRESS_END - max(twin.addr, twin.offset))
            if twin.kind in ("ram", "rom", "rom_device"):
                longest = min(longest, twin.size)
            twin.region.size = twin.size = random.randint(0, longest)
        elif what == "offset" and twin.kind == "alias":
            twin.region.alias_offset = twin.offset = self.somewhere(twin.size)
        elif what == "mask":
            twin.region.dirty_log_mask = twin.mask = random.choice((0, 1, 4, 5))
        elif what in ("readonly", "nonvolatile", "unmergeable", "enabled") or (
            what == "romd" and twin.kind == "rom_device"
        ):
            value = random.random() < (0.8 if what in ("enabled", "romd") else 0.3)
            setattr(twin, what, value)
            setattr(twin.region, what, value)

    def somewhere(self, size: int) -> int:
        """An offset at which a region of this size may be: a low one, or one near the end."""
        low = self.random.randint(0, min(_SMALL, ADDRESS_END - size))
        high = min(ADDRESS_END - size, ADDRESS_END - 1) - low
        return low if self.random.random() < 0.85 else max(high, 0)

    def place(self, twin: Twin, parent: Twin) -> None:
        """Puts a region into another one, where that may be."""
        if twin.parent is not None or parent.kind == "alias" or twin.shows(parent):
            return
        addr, priority = self.somewhere(twin.size), self.random.choice((None, 0, 0, 1, -1, 7))
        parent.region.add_subregion(addr, twin.region, priority)
        twin.addr, twin.priority, twin.parent, twin.joined = addr, priority or 0, parent, next(self.clock)
        parent.children.append(twin)

    def neighbour(self, twin: Twin) -> None:
        """Puts an alias beside an alias that goes on where that one ends, and may differ in one attribute."""
        if twin.kind != "alias" or twin.parent is None or twin.size > _SMALL or twin.addr > ADDRESS_END >> 1:
            return
        offset = twin.offset + twin.size
        if offset > ADDRESS_END - _SMALL:
            return
        other = Twin("alias", f"{twin.name}+", self.random.randint(1, _SMALL // 4), twin.target, offset)
        self.twins.append(other)
        what = self.random.choice(("readonly", "nonvolatile", "unmergeable", "addr"))
        if what != "addr":
            marked = self.random.choice((twin, other))
            setattr(marked, what, True)
            setattr(marked.region, what, True)
        gap = self.random.choice((0, 0, 0, 1))
        other.addr, other.parent, other.joined = twin.addr + twin.size + gap, twin.parent, next(self.clock)
        twin.parent.region.add_subregion(other.addr, other.region)
        twin.parent.children.append(other)

    # ---- what is compared ----

    def painted(self, root: Twin) -> list[Range]:
        """The ranges of an address space with this root: bytes that go on where the one before ended are one."""
        top = root.top()
        if top is None:
            return []
        finite = [part for t in self.twins for part in (t.size, t.addr, t.offset)]
        window = sum(min(part, ADDRESS_END - part) for part in finite) + 1
        ranges: list[Range] = []
        before: Shown | None = None
        for first, step in [*((at, 1) for at in range(window)), (window, ADDRESS_END - 2 * window),
                            *((at, 1) for at in range(ADDRESS_END - window, ADDRESS_END))]:  # fmt: skip
            shown = top.show(first - top.addr, (False, False, False), ())
            if shown is None:
                before = None
                continue
            # An unmergeable one goes on only where the way to it is the same.
            same = 7 if not shown[5] else 8
            if before is not None and before[0] is shown[0] and before[2:same] == shown[2:same]:
                start, size, name, offset, *rest = ranges[-1]
                if offset + size == shown[1]:
                    ranges[-1] = start, size + step, name, offset, *rest  # type: ignore[assignment]
                    before = shown
                    continue
            ranges.append((first, step, shown[0].name, *shown[1:7]))
            before = shown
        return ranges

    def compare(self, tally: Tally, case: str) -> None:
        """Compares every space: its ranges, those its listener believes in, and with whom it shares its view."""
        for root, space, listener in self.spaces:
            where = f"{case}, {space.name} of {root.name}"
            painted = self.painted(root)
            tally.compare(where, _ranges(space.flatview), painted)
            told = sorted((*key, mask) for key, mask in listener.sections.items())
            tally.compare(f"{where}, as told", told, painted)
            tally.compare(f"{where}, told wrongly", listener.wrong, [])
            top = root.top()
            shares = [other.name for _, other, _ in self.spaces if other.flatview is space.flatview]
            tally.compare(f"{where}, shared", shares, [o.name for r, o, _ in self.spaces if r.top() is top])


def _ranges(view: Iterable[FlatRange]) -> list[Range]:
    return [
        (r.start, r.size, r.region.name, r.offset_in_region, r.readonly, r.romd, r.nonvolatile, r.unmergeable,
         r.dirty_log_mask)
        for r in view
    ]  # fmt: skip


@check("FlatView", "a painter of single bytes", cases=150, slow=6_000)
def check_flatview(tally: Tally, cases: int) -> None:
    """Random trees of regions, each changed 5 times: flat views, what listeners are told, and who shares a view."""
    from random import Random

    for case in range(cases):
        random = Random(case)
        forest = Forest(random)
        try:
            forest.compare(tally, f"tree {case}")
            for nr in range(5):
                with transaction():
                    for _ in range(random.randint(1, 3)):
                        forest.change()
                forest.compare(tally, f"tree {case}, change {nr}")
        finally:
            forest.end()
