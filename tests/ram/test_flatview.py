"""Flat views: rendering, merging, sharing, and what listeners are told; against a painter and by hand."""

from __future__ import annotations

import gc
import math
import random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel.errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError
from hvmodel.ram import flatview
from hvmodel.ram.address_space import AddressSpace, address_spaces
from hvmodel.ram.flatview import flatview_root, render
from hvmodel.ram.listener import MemoryListener, MemoryRegionSection
from hvmodel.ram.region import ADDRESS_END, MemoryRegion, MemoryRegionOps
from hvmodel.ram.topology import transaction
from hvmodel.witness import registered, run
from hvmodel.witness.check_flatview import Forest
from hvmodel.witness.result import Tally
from tests.cases import cases

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hvmodel.ram.flatview import FlatRange


class Block:
    """In the place of a RamBlock."""

    def __init__(self, size: int) -> None:
        self.used_length = self.max_length = size


def ram(name: str, size: int, *, readonly: bool = False) -> MemoryRegion:
    return MemoryRegion.ram(name, Block(size), readonly=readonly)  # type: ignore[arg-type]


def io(name: str, size: int) -> MemoryRegion:
    return MemoryRegion.io(name, size)


def box(name: str = "system", size: int = ADDRESS_END) -> MemoryRegion:
    return MemoryRegion.container(name, size)


def alias(name: str, target: MemoryRegion, offset: int, size: int) -> MemoryRegion:
    return MemoryRegion.alias(name, target, offset, size)


def shown(view: Iterable[FlatRange]) -> list[tuple[int, int, str, int]]:
    return [(r.start, r.end, r.region.name, r.offset_in_region) for r in view]


# ---- rendering ----


def test_holes_show_what_is_below() -> None:
    # The same as QEMU's I/O space has: -f says "pci-conf-idx", "piix3-reset-control" and "pci-conf-idx @2".
    root = io("io", 0x10000)
    root.add_subregion(0xCF8, io("idx", 4))
    root.add_subregion(0xCF9, io("reset", 1), priority=1)
    assert shown(render(root)) == [
        (0, 0xCF8, "io", 0),
        (0xCF8, 0xCF9, "idx", 0),
        (0xCF9, 0xCFA, "reset", 0),
        (0xCFA, 0xCFC, "idx", 2),
        (0xCFC, 0x10000, "io", 0xCFC),
    ]


def test_a_container_is_clipped_and_shows_nothing_itself() -> None:
    root, inner = box(), box("inner", 0x10)
    root.add_subregion(0x100, inner)
    inner.add_subregion(0x8, io("wide", 0x100))
    inner.add_subregion(0x20, io("outside", 1))
    assert shown(render(root)) == [(0x108, 0x110, "wide", 0)]


def test_priorities_count_among_subregions_only() -> None:
    # The container's -1 keeps all that is in it below, however high that is within.
    root, pci = box(), box("pci")
    root.add_subregion(0, ram("ram", 0x10))
    root.add_subregion(0, pci, priority=-1)
    pci.add_subregion(0x8, io("bar", 0x10), priority=1000)
    assert shown(render(root)) == [(0, 0x10, "ram", 0), (0x10, 0x18, "bar", 8)]


def test_of_equal_priorities_the_newest_shows() -> None:
    root = box()
    for name in ("old", "new"):
        root.add_subregion(0, io(name, 4))
    assert shown(render(root)) == [(0, 4, "new", 0)]


def test_the_whole_space() -> None:
    view = render(io("all", ADDRESS_END))
    assert shown(view) == [(0, ADDRESS_END, "all", 0)]
    assert view.at(ADDRESS_END - 1) == view.ranges[0]


def test_at() -> None:
    root = box()
    root.add_subregion(4, io("a", 4))
    root.add_subregion(8, io("b", 1))
    view = render(root)
    found = [view.at(addr) for addr in (0, 3, 4, 7, 8, 9, ADDRESS_END)]
    assert [r and r.region.name for r in found] == [None, None, "a", "a", "b", None, None]
    with pytest.raises(ArgumentTypeError):
        view.at("4")  # type: ignore[arg-type]


def test_aliases() -> None:
    # A part, at another place; the target's own place does not matter, nor whether it is anywhere.
    target, root = ram("ram", 0x100), box()
    root.add_subregion(0x1000, alias("part", target, 0x40, 0x20))
    assert shown(render(root)) == [(0x1000, 0x1020, "ram", 0x40)]
    root.add_subregion(0x5000, target)
    assert shown(render(root)) == [(0x1000, 0x1020, "ram", 0x40), (0x5000, 0x5100, "ram", 0)]
    target.enabled = False
    assert shown(render(root)) == []


def test_an_alias_that_is_larger_than_its_target() -> None:
    root = box()
    root.add_subregion(0, alias("a", ram("ram", 0x10), 0x8, 0x100))
    assert shown(render(root)) == [(0, 8, "ram", 8)]


def test_an_alias_that_begins_before_its_target() -> None:
    # What is in the target at 2**64 - 8 shows at 0; in 64 bits that would be a negative address.
    low, root = box("low"), box()
    low.add_subregion(ADDRESS_END - 8, io("top", 8))
    root.add_subregion(0, alias("a", low, ADDRESS_END - 8, 8))
    assert shown(render(root)) == [(0, 8, "top", 0)]


def test_attributes_come_from_above() -> None:
    target, root = ram("ram", 0x10), box()
    for n, field in enumerate(("readonly", "nonvolatile", "unmergeable")):
        outer = box(field, 0x10)
        setattr(outer, field, True)
        outer.add_subregion(0, alias("a", target, 0, 0x10))
        root.add_subregion(0x100 * n, outer)
    found = [(r.readonly, r.nonvolatile, r.unmergeable, r.kind) for r in render(root)]
    assert found == [(True, False, False, "rom"), (False, True, False, "ram"), (False, False, True, "ram")]


def test_romd_is_the_regions() -> None:
    flash = MemoryRegion.rom_device("flash", Block(4), MemoryRegionOps())  # type: ignore[arg-type]
    assert [(r.romd, r.kind) for r in render(flash)] == [(True, "romd")]
    flash.romd = False
    assert [(r.romd, r.kind) for r in render(flash)] == [(False, "i/o")]


# ---- merging ----


def test_neighbours_that_go_on_are_one() -> None:
    target, root = ram("ram", 0x100), box()
    for n in range(4):
        root.add_subregion(n * 0x10, alias(f"{n}", target, n * 0x10, 0x10))
    assert shown(render(root)) == [(0, 0x40, "ram", 0)]
    third = root.subregions[1]
    for field in ("readonly", "nonvolatile", "unmergeable"):
        setattr(third, field, True)
        assert shown(render(root)) == [(0, 0x20, "ram", 0), (0x20, 0x30, "ram", 0x20), (0x30, 0x40, "ram", 0x30)]
        setattr(third, field, False)
    third.alias_offset = 0x21
    assert len(render(root)) == 3
    third.alias_offset, third.addr = 0x20, 0x80
    assert len(render(root)) == 3


def test_the_same_hole_is_not_cut() -> None:
    # What is below an unmergeable region is two ranges, but one where nothing is above.
    root, wide = box(), io("wide", 0x100)
    wide.unmergeable = True
    root.add_subregion(0, wide)
    root.add_subregion(0x80, io("above", 0x10), priority=1)
    root.add_subregion(0x200, io("far", 0x10))
    assert [row[:2] for row in shown(render(root))] == [(0, 0x80), (0x80, 0x90), (0x90, 0x100), (0x200, 0x210)]
    root.del_subregion(root.subregions[0])
    assert [row[:2] for row in shown(render(root))] == [(0, 0x100), (0x200, 0x210)]


# ---- the root, and who shares a view ----


def test_flatview_roots() -> None:
    # Each rule of memory_region_get_flatview_root.
    system, region = box(), io("io", 0x10)
    assert flatview_root(system) is None
    system.add_subregion(0, region)
    assert flatview_root(system) is region
    region.addr = 1
    assert flatview_root(system) is system  # it is not at 0
    region.addr = 0
    assert flatview_root(alias("a", system, 0, ADDRESS_END)) is region
    part = alias("part", region, 0, 0xF)
    assert flatview_root(part) is part
    later = alias("later", region, 1, 0x20)
    assert flatview_root(later) is later
    whole = alias("whole", region, 0, 0x20)
    assert flatview_root(whole) is region
    system.add_subregion(0x20, io("second", 1))
    assert flatview_root(system) is system  # two of them
    system.subregions[0].enabled = False
    assert flatview_root(system) is region
    region.enabled = False
    assert flatview_root(system) is None
    assert flatview_root(whole) is None
    small = box("small", 4)
    small.add_subregion(0, io("large", 8))
    assert flatview_root(small) is small  # what is in it is cut


def test_what_a_root_that_is_gone_through_says_is_lost() -> None:
    # As in QEMU: "readonly" of an alias that is the root itself, and where in its container a target is.
    target, other = io("io", 0x10), box("other", 0x100)
    other.add_subregion(0x40, target)
    root = alias("root", target, 0, ADDRESS_END)
    root.readonly = True
    with AddressSpace(root, "space") as space:
        assert [(r.start, r.readonly) for r in space.flatview] == [(0x40, False)]
        target.addr = 0x50
        assert [(r.start, r.readonly) for r in space.flatview] == [(0x50, False)]


def test_spaces_share_a_view() -> None:
    # As "memory" and "cpu-memory-0" do.
    system = box()
    system.add_subregion(0x10, ram("ram", 0x10))
    system.add_subregion(0x40, io("io", 0x10))
    window = box("window")
    window.add_subregion(0, alias("of system", system, 0, ADDRESS_END))
    with (
        AddressSpace(system, "memory") as memory,
        AddressSpace(window, "cpu-memory-0") as cpu,
        AddressSpace(alias("part", system, 0, 0x100), "part") as part,
        AddressSpace(box("empty"), "a") as a,
        AddressSpace(box("empty too"), "b") as b,
    ):
        assert memory.flatview is cpu.flatview is not part.flatview
        assert a.flatview is b.flatview
        assert (len(a.flatview), a.flatview.root, memory.flatview.root) == (0, None, system)
        system.subregions[0].enabled = False
        assert memory.flatview is cpu.flatview
        # One that comes to share joins the view that is there, and one that stays is not rendered.
        view = memory.flatview
        window.subregions[0].enabled = False
        assert (cpu.flatview, memory.flatview) == (a.flatview, view)
        window.subregions[0].enabled = True
        assert cpu.flatview is view is memory.flatview


def test_only_what_reaches_a_change_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvmodel.ram import address_space

    one, other, shared = box("one"), box("other"), ram("shared", 0x10)
    for root in (one, other):
        root.add_subregion(0, alias("a", shared, 0, 0x10))
        root.add_subregion(0x100, io("own", 0x10))
    rendered: list[str] = []

    def counted(root: MemoryRegion) -> flatview.FlatView:
        rendered.append(root.name)
        return render(root)

    monkeypatch.setattr(address_space, "render", counted)
    with (
        AddressSpace(one, "1"),
        AddressSpace(one, "1 too"),
        AddressSpace(other, "2") as second,
        AddressSpace(box("third"), "3"),
    ):
        assert rendered == ["one", "other"]
        view = second.flatview
        one.subregions[0].readonly = True
        assert rendered == ["one", "other", "one"]
        assert second.flatview is view
        shared.readonly = True
        assert rendered == ["one", "other", "one", "one", "other"]
        io("nowhere", 1).enabled = False
        assert len(rendered) == 5


# ---- listeners ----


class Log(MemoryListener):
    """What it was told, into a list that may be others' too."""

    def __init__(self, name: str, into: list[str], priority: int = 0) -> None:
        self.name, self.into, self.priority = name, into, priority

    def note(self, what: str, section: MemoryRegionSection) -> None:
        self.into.append(f"{self.name} {what} {section.region.name}@{section.offset_within_address_space:x}")

    def begin(self) -> None:
        self.into.append(f"{self.name} begin")

    def commit(self) -> None:
        self.into.append(f"{self.name} commit")

    def region_add(self, section: MemoryRegionSection) -> None:
        self.note("add", section)

    def region_del(self, section: MemoryRegionSection) -> None:
        self.note("del", section)

    def log_start(self, section: MemoryRegionSection, old: int, new: int) -> None:
        self.note(f"start {old}>{new}", section)

    def log_stop(self, section: MemoryRegionSection, old: int, new: int) -> None:
        self.note(f"stop {old}>{new}", section)


class NopLog(Log):
    """The same, which wants to hear of what stays."""

    def region_nop(self, section: MemoryRegionSection) -> None:
        self.note("nop", section)


def told(into: list[str]) -> list[str]:
    found = into[:]
    into.clear()
    return found


def test_the_order_of_what_is_told() -> None:
    # address_space_update_topology_pass: first what goes, by falling priority; then the rest, by rising.
    root, a, b, c = box(), io("a", 1), io("b", 1), io("c", 1)
    for n, region in enumerate((a, b, c)):
        root.add_subregion(n, region)
    into: list[str] = []
    with AddressSpace(root, "memory") as space:
        late, early = Log("late", into, 5), Log("early", into, -5)
        space.add_listener(late)
        assert told(into) == ["late begin", "late add a@0", "late add b@1", "late add c@2", "late commit"]
        space.add_listener(early)
        space.add_listener(Log("late too", into, 5))
        told(into)
        assert [one.name for one in space.listeners if isinstance(one, Log)] == ["early", "late", "late too"]
        with transaction():
            b.addr = 0x10
            c.readonly = True
        assert told(into) == [
            *("early begin", "late begin", "late too begin"),
            *("late too del b@1", "late del b@1", "early del b@1"),
            *("late too del c@2", "late del c@2", "early del c@2"),
            *("early add c@2", "late add c@2", "late too add c@2"),
            *("early add b@10", "late add b@10", "late too add b@10"),
            *("early commit", "late commit", "late too commit"),
        ]
        space.remove_listener(early)
        assert told(into) == ["early begin", "early del a@0", "early del c@2", "early del b@10", "early commit"]
    assert told(into)[:5] == ["late begin", "late del a@0", "late del c@2", "late del b@10", "late commit"]


def test_logging_is_told_without_del_and_add() -> None:
    region, root = ram("ram", 0x10), box()
    root.add_subregion(0, region)
    root.add_subregion(0x20, io("io", 1))
    into: list[str] = []
    with AddressSpace(root, "memory") as space:
        space.add_listener(NopLog("log", into))
        told(into)
        region.dirty_log_mask = 1
        assert told(into) == ["log begin", "log nop ram@0", "log start 0>1 ram@0", "log nop io@20", "log commit"]
        region.dirty_log_mask = 4
        assert told(into)[2:4] == ["log start 1>4 ram@0", "log stop 1>4 ram@0"]
        more: list[str] = []
        space.add_listener(Log("more", more))
        assert told(more) == ["more begin", "more add ram@0", "more start 0>4 ram@0", "more add io@20", "more commit"]
        told(into)
        region.readonly = True  # goes and comes, and whoever hears of it looks at the mask: no start
        assert told(into) == ["log begin", "log del ram@0", "log add ram@0", "log nop io@20", "log commit"]
    assert told(more)[-4:] == ["more stop 4>0 ram@0", "more del ram@0", "more del io@20", "more commit"]


def test_only_listeners_of_spaces_that_change_are_told() -> None:
    one, other = box("one"), box("other")
    into: list[str] = []
    with AddressSpace(one, "1") as first, AddressSpace(other, "2") as second:
        first.add_listener(Log("first", into))
        second.add_listener(Log("second", into))
        told(into)
        one.add_subregion(0, io("a", 1))
        assert told(into) == ["first begin", "first add a@0", "first commit"]
        # Nor where the way to the same view has changed.
        window = box("window")
        window.add_subregion(0, alias("a", one, 0, ADDRESS_END))
        with AddressSpace(window, "3") as third:
            third.add_listener(Log("third", into))
            told(into)
            window.readonly = True
            assert told(into) == []


def test_the_view_changes_between_region_add_and_commit() -> None:
    root = box()
    seen: list[tuple[str, int]] = []

    class Looks(MemoryListener):
        def region_add(self, section: MemoryRegionSection) -> None:
            seen.append(("add", len(section.address_space.flatview)))

        def commit(self) -> None:
            seen.append(("commit", len(space.flatview)))

    with AddressSpace(root, "memory") as space:
        space.add_listener(Looks())
        root.add_subregion(0, io("a", 1))
    assert seen == [("commit", 0), ("add", 0), ("commit", 1), ("commit", 1)]


def test_a_listener_joins_once() -> None:
    listener = MemoryListener()
    with AddressSpace(box("a"), "1") as first, AddressSpace(box("b"), "2") as second:
        first.add_listener(listener)
        for space in (first, second):
            with pytest.raises(ArgumentError, match="joined no space"):
                space.add_listener(listener)
        with pytest.raises(ArgumentError, match="have joined"):
            second.remove_listener(listener)
        with pytest.raises(ArgumentTypeError):
            first.add_listener(object())  # type: ignore[arg-type]
        first.remove_listener(listener)
        second.add_listener(listener)
        assert (first.listeners, second.listeners) == ((), (listener,))


def test_a_listener_that_refuses_to_join_or_to_leave() -> None:
    root = box()
    root.add_subregion(0, io("a", 1))

    class Stubborn(MemoryListener):
        refuse = True

        def region_add(self, section: MemoryRegionSection) -> None:
            if self.refuse:
                raise OSError("no")

        def region_del(self, section: MemoryRegionSection) -> None:
            self.region_add(section)

    listener = Stubborn()
    space = AddressSpace(root, "memory")
    with pytest.raises(OSError, match="no"):
        space.add_listener(listener)
    assert space.listeners == ()
    listener.refuse = False
    space.add_listener(listener)
    listener.refuse = True
    with pytest.raises(OSError, match="no"):
        space.close()
    assert [*space.listeners, space.closed] == [listener, False]
    listener.refuse = False
    space.close()
    assert [*space.listeners, space.closed] == [True]


# ---- life ----


def test_a_closed_space() -> None:
    space = AddressSpace(box(), "memory")
    space.close()
    space.close()
    assert space not in address_spaces()
    assert "closed" in repr(space)
    for attempt in (lambda: space.flatview, lambda: space.at(0), lambda: space.read(0, 1), lambda: space.load(0, 1)):
        with pytest.raises(ClosedError):
            attempt()
    with pytest.raises(ClosedError):
        space.add_listener(MemoryListener())


def test_a_space_made_of_changes_that_may_be_refused() -> None:
    root, region = box("root"), MemoryRegion.io("io", 16)
    with transaction():
        AddressSpace(root, "before").close()
        root.add_subregion(0, region)
        with pytest.raises(BusyError, match="make the space before or after"):
            AddressSpace(root, "space")
    with AddressSpace(root, "space") as space:
        assert len(space.flatview) == 1


def test_a_forgotten_space_is_gone() -> None:
    root = box()
    space = AddressSpace(root, "memory")
    number = len(address_spaces())
    assert space in address_spaces()
    del space
    gc.collect()
    assert len(address_spaces()) == number - 1
    root.add_subregion(0, io("a", 1))


@pytest.mark.parametrize(("root", "name"), [(None, "x"), ("system", "x"), (box(), 5)])
def test_spaces_are_made_of_regions(root: MemoryRegion, name: str) -> None:
    with pytest.raises(ArgumentTypeError):
        AddressSpace(root, name)


# ---- the painter ----


@settings(max_examples=cases(60, 2000), deadline=None)
@given(st.randoms(use_true_random=False))
def test_random_trees_are_as_painted(source: random.Random) -> None:
    forest = Forest(source)
    try:
        tally = Tally("FlatView", "the painter")
        forest.compare(tally, "at first")
        for number in range(3):
            with transaction():
                for _ in range(source.randint(1, 3)):
                    forest.change()
            forest.compare(tally, f"after change {number}")
        result = tally.result()
        assert result.mismatches == 0, result.examples
    finally:
        forest.end()


def test_the_check_is_registered_and_agrees() -> None:
    assert "flatview" in {check.name for check in registered()}
    (result,) = run(["flatview"], cases=20)
    assert result.ok, result
    assert result.compared > 500


@pytest.mark.parametrize("broken", ["_paint", "_merge"])
def test_the_check_would_see_it(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Leaves painted in the wrong order; nothing merged.
    paint = flatview._paint
    replacement = {
        "_paint": lambda leaves: paint(leaves[::-1]),
        "_merge": lambda painted: [
            (start, end - start, leaf[2], start - leaf[3], *leaf[4:5], leaf[2].romd, *leaf[5:], leaf[2].dirty_log_mask)
            for start, end, leaf in painted
        ],
    }
    monkeypatch.setattr(flatview, broken, replacement[broken])
    (result,) = run(["flatview"], cases=40)
    assert result.mismatches > 0


# ---- what it costs ----


@pytest.mark.parametrize("shape", ["apart", "stacked", "covered"])
def test_steps_grow_as_n_log_n(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Counted, not timed: every look at a pointer over the pieces that are taken.
    class Counted(list[Any]):
        looks = 0

        def __getitem__(self, index: Any) -> Any:
            Counted.looks += 1
            return super().__getitem__(index)

    monkeypatch.setattr(flatview, "list", Counted, raising=False)
    steps = {}
    for n in (100, 1000, 10_000):
        root = box()
        with transaction():
            for number in range(n):
                if shape == "apart":
                    start, size = number * 4, 2
                elif shape == "stacked":  # each is larger than those above it
                    start, size = n - number, 2 * number + 1
                else:  # one covers all others
                    start, size = (0, 4 * n) if number == n - 1 else (number * 4, 2)
                root.add_subregion(start, io("a", size), priority=n - number if shape == "stacked" else number)
        Counted.looks = 0
        assert len(render(root)) == {"apart": n, "stacked": 2 * n - 1, "covered": 1}[shape]
        steps[n] = Counted.looks / (n * math.log2(n))
    assert steps[10_000] <= 1.5 * steps[100] + 1
