"""Regions: what they are, what may change, what is refused, and what a transaction is."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest

import hvmodel as hv
from hvmodel.errors import ArgumentError, ArgumentTypeError, BusyError
from hvmodel.ram.address_space import AddressSpace
from hvmodel.ram.listener import MemoryListener, MemoryRegionSection
from hvmodel.ram.region import (
    ADDRESS_END,
    DIRTY_MEMORY_CODE,
    DIRTY_MEMORY_MIGRATION,
    MemoryRegion,
    MemoryRegionOps,
    seen_from,
)
from hvmodel.ram.topology import transaction

OPS = MemoryRegionOps(read=lambda addr, size: 0, write=lambda addr, value, size: None)


class Block:
    """In the place of a RamBlock."""

    def __init__(self, size: int) -> None:
        self.used_length, self.max_length = size, 2 * size


def ram(name: str = "ram", size: int = 0x1000, **named: bool) -> MemoryRegion:
    return MemoryRegion.ram(name, Block(size), **named)  # type: ignore[arg-type]


def box(name: str = "box", size: int = ADDRESS_END) -> MemoryRegion:
    return MemoryRegion.container(name, size)


# ---- kinds ----


def test_kinds() -> None:
    block = Block(0x2000)
    cases = [
        (box(), "i/o", False, None, ADDRESS_END),
        (MemoryRegion.ram("a", block), "ram", True, block, 0x2000),  # type: ignore[arg-type]
        (MemoryRegion.ram("a", block, readonly=True), "rom", True, block, 0x2000),  # type: ignore[arg-type]
        (MemoryRegion.rom("a", block), "rom", True, block, 0x2000),  # type: ignore[arg-type]
        (MemoryRegion.rom_device("a", block, OPS), "romd", True, block, 0x2000),  # type: ignore[arg-type]
        (MemoryRegion.io("a", 5, OPS), "i/o", True, None, 5),
        (MemoryRegion.io("a", 5), "i/o", True, None, 5),
        (MemoryRegion.alias("a", ram(), 0x10, 5), "ram", False, None, 5),
    ]
    for region, kind, terminates, of, size in cases:
        assert (region.kind, region.terminates, region.block, region.size) == (kind, terminates, of, size)
        assert (region.enabled, region.addr, region.priority, region.parent, region.subregions) == (
            True,
            0,
            0,
            None,
            (),
        )
    assert [region.is_ram for region, *_ in cases] == [False, True, True, True, False, False, False, False]
    assert [region.is_rom_device for region, *_ in cases] == [False] * 4 + [True] + [False] * 3


def test_an_alias_has_the_kind_of_what_it_shows() -> None:
    flash = MemoryRegion.rom_device("flash", Block(64), OPS)  # type: ignore[arg-type]
    outer = MemoryRegion.alias("outer", MemoryRegion.alias("inner", flash, 0, 64), 0, 32)
    assert (outer.kind, outer.target.kind if outer.target else None) == ("romd", "romd")
    flash.romd = False
    assert outer.kind == "i/o"


def test_a_real_block() -> None:
    with hv.RamBlock("pc.ram", "64K") as block:
        region = MemoryRegion.ram("pc.ram", block)
        assert (region.size, region.block) == (0x10000, block)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: MemoryRegion.container("x", -1), "size"),
        (lambda: MemoryRegion.container("x", ADDRESS_END + 1), "size"),
        (lambda: MemoryRegion.io("x", ADDRESS_END + 1), "size"),
        (lambda: MemoryRegion.alias("x", ram(), -1, 1), "offset"),
        (lambda: MemoryRegion.alias("x", ram(), ADDRESS_END - 1, 2), "offset"),
        (lambda: MemoryRegion.alias("x", ram(), 1, ADDRESS_END), "offset"),
        (lambda: MemoryRegion.alias("x", ram(), ADDRESS_END, 0), "offset"),
        (lambda: MemoryRegion.io("x", 1, MemoryRegionOps(valid_min=3)), "ops.valid_min"),
        (lambda: MemoryRegion.io("x", 1, MemoryRegionOps(impl_max=16)), "ops.impl_max"),
        (lambda: MemoryRegion.io("x", 1, MemoryRegionOps(valid_min=4, valid_max=2)), "ops.valid_min"),
        (lambda: MemoryRegion.io("x", 1, MemoryRegionOps(impl_min=8)), "ops.impl_min"),  # impl_max is 4 then
        (lambda: MemoryRegion.io("x", 1, MemoryRegionOps(endianness="middle")), "ops.endianness"),  # type: ignore[arg-type]
    ],
)
def test_values_that_are_refused(make: Callable[[], MemoryRegion], field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        make()
    assert caught.value.field == field
    assert caught.value.accepted


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: MemoryRegion.container("x", "16M"), "size"),  # type: ignore[arg-type]
        (lambda: MemoryRegion.container("x", True), "size"),
        (lambda: MemoryRegion.container("x", 1.0), "size"),  # type: ignore[arg-type]
        (lambda: MemoryRegion.container(b"x", 1), "name"),  # type: ignore[arg-type]
        (lambda: MemoryRegion.container("x", 1, owner=3), "owner"),  # type: ignore[arg-type]
        (lambda: MemoryRegion.ram("x", bytes(4096)), "block"),  # type: ignore[arg-type]
        (lambda: MemoryRegion.ram("x", Block(1), readonly=1), "readonly"),  # type: ignore[arg-type]
        (lambda: MemoryRegion.alias("x", "pc.ram", 0, 1), "target"),  # type: ignore[arg-type]
        (lambda: MemoryRegion.io("x", 1, {}), "ops"),  # type: ignore[arg-type]
        (lambda: MemoryRegion.rom_device("x", Block(1), None), "ops"),  # type: ignore[arg-type]
        (lambda: MemoryRegion.io("x", 1, MemoryRegionOps(read=5)), "ops.read"),  # type: ignore[arg-type]
    ],
)
def test_types_that_are_refused(make: Callable[[], MemoryRegion], field: str) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        make()
    assert caught.value.field == field


def test_a_region_of_size_0_is_nowhere() -> None:
    # QEMU's q35 has tseg-blackhole and tseg-window of size 0, until the guest sets TSEG.
    root, tseg = box(), MemoryRegion.io("tseg-blackhole", 0)
    root.add_subregion(0x1000, tseg, priority=1)
    with AddressSpace(root, "memory") as space:
        assert len(space.flatview) == 0
        tseg.size = 0x100000
        assert [(r.start, r.size) for r in space.flatview] == [(0x1000, 0x100000)]
        tseg.size = 0
        assert len(space.flatview) == 0


# ---- the tree ----


def test_order_of_subregions() -> None:
    # A new one goes before the first whose priority is not higher: the newest of equals shows.
    root = box()
    for name, priority in (("a", 0), ("b", 1), ("c", -1), ("d", None), ("e", 1), ("f", -1)):
        root.add_subregion(0, MemoryRegion.io(name, 1), priority)
    assert [region.name for region in root.subregions] == ["e", "b", "d", "a", "f", "c"]


def test_moving_makes_it_the_newest() -> None:
    # memory_region_set_address takes it out and puts it in again; a new size does not.
    root, a, b = box(), MemoryRegion.io("a", 16), MemoryRegion.io("b", 16)
    root.add_subregion(0, a)
    root.add_subregion(0, b)
    a.size = 32
    a.addr = 0
    assert root.subregions == (b, a)
    a.addr = 8
    assert root.subregions == (a, b)


def test_taken_out_and_put_elsewhere() -> None:
    one, other, region = box(), box(), MemoryRegion.io("a", 1)
    one.add_subregion(5, region, 3)
    one.del_subregion(region)
    assert (region.parent, one.subregions) == (None, ())
    other.add_subregion(6, region)
    assert (region.parent, region.addr, region.priority) == (other, 6, 0)
    with pytest.raises(ArgumentError, match="one of the 0 subregions"):
        one.del_subregion(region)


def refused(region: MemoryRegion, into: MemoryRegion, match: str, offset: int = 0) -> None:
    before = into.subregions, region.parent, region.addr
    with pytest.raises(ArgumentError, match=match) as caught:
        into.add_subregion(offset, region)
    assert caught.value.call == "MemoryRegion.add_subregion"
    assert (into.subregions, region.parent, region.addr) == before


def test_added_twice() -> None:
    one, other, region = box("one"), box("other"), MemoryRegion.io("a", 1)
    one.add_subregion(0x10, region)
    refused(region, one, "it is in .*one.* already, at 0x10")
    refused(region, other, "it is in .*one.* already, at 0x10")


def test_into_itself() -> None:
    a, b, c = box("a"), box("b"), box("c")
    refused(a, a, "it is the region itself")
    a.add_subregion(0, b)
    b.add_subregion(0, c)
    refused(a, b, "would show itself")
    refused(a, c, "would show itself")


def test_cycles_of_aliases() -> None:
    a, b = box("a"), box("b")
    refused(MemoryRegion.alias("of a", a, 0, 16), a, "would show itself")
    a.add_subregion(0, MemoryRegion.alias("of b", b, 0, 16))
    refused(MemoryRegion.alias("of a", a, 0, 16), b, "would show itself")
    # Through an alias of an alias, and through a part that is not shown.
    twice = MemoryRegion.alias("twice", MemoryRegion.alias("of a", a, 0x1000, 16), 0x2000, 16)
    refused(twice, b, "would show itself")
    refused(b, MemoryRegion.alias("of c", box("c"), 0, 1), "an alias shows its target only")
    # The same region twice in one tree is no cycle.
    a.add_subregion(32, MemoryRegion.alias("of b too", b, 0, 16))
    a.add_subregion(0, b)


def test_a_cycle_that_comes_about_later() -> None:
    a, b = box("a"), box("b")
    alias = MemoryRegion.alias("of a", a, 0, 16)
    b.add_subregion(0, alias)
    refused(b, a, "would show itself")
    b.del_subregion(alias)
    a.add_subregion(0, b)
    refused(alias, b, "would show itself")


def test_a_very_deep_tree() -> None:
    # Deeper than Python's stack.
    root = inner = MemoryRegion.container("root", 1 << 63)
    for depth in range(5000):
        child = MemoryRegion.container(f"{depth}", 1 << 63)
        inner.add_subregion(1, child)
        inner = child
    inner.add_subregion(0, MemoryRegion.io("deep", 1))
    with AddressSpace(root, "memory") as space:
        assert [(r.start, r.region.name) for r in space.flatview] == [(5000, "deep")]
    refused(root, inner, "would show itself")


@pytest.mark.parametrize(
    ("offset", "size"), [(ADDRESS_END, 0), (ADDRESS_END - 1, 2), (1, ADDRESS_END), (-1, 1), (1 << 70, 1)]
)
def test_wrapping(offset: int, size: int) -> None:
    refused(MemoryRegion.io("a", size), box(), "offset", offset)


def test_wrapping_later() -> None:
    root, region = box(), MemoryRegion.io("a", 2)
    root.add_subregion(ADDRESS_END - 2, region)
    alias = MemoryRegion.alias("b", region, ADDRESS_END - 2, 2)
    for changed, field, value, match in (
        (region, "addr", ADDRESS_END - 1, "addr"),
        (region, "size", 3, "0 to 0x2: it begins at 0xfffffffffffffffe"),
        (alias, "size", 3, "0 to 0x2: it begins at"),
        (alias, "alias_offset", ADDRESS_END - 1, "alias_offset"),
    ):
        with pytest.raises(ArgumentError, match=match):
            setattr(changed, field, value)
    assert (region.addr, region.size, alias.size, alias.alias_offset) == (ADDRESS_END - 2, 2, 2, ADDRESS_END - 2)


@pytest.mark.parametrize("priority", [1 << 31, -(1 << 31) - 1])
def test_priorities_are_ints_of_32_bits(priority: int) -> None:
    with pytest.raises(ArgumentError, match="priority"):
        box().add_subregion(0, box(), priority)
    box().add_subregion(0, box(), max(min(priority, (1 << 31) - 1), -(1 << 31)))


@pytest.mark.parametrize(
    ("attempt", "field"),
    [
        (lambda: setattr(MemoryRegion.io("a", 1), "romd", False), "romd"),
        (lambda: setattr(MemoryRegion.io("a", 1), "alias_offset", 1), "alias_offset"),
        (lambda: setattr(MemoryRegion.io("a", 1), "addr", 1), "addr"),  # in no container
        (lambda: setattr(ram(), "size", 0x2001), "size"),  # its block's max_length is 0x2000
        (lambda: setattr(ram(), "dirty_log_mask", 8), "mask"),
        (lambda: ram().set_log(True, 3), "client"),
    ],
)
def test_changes_that_make_no_sense(attempt: Callable[[], None], field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        attempt()
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["enabled", "readonly", "nonvolatile", "unmergeable", "romd"])
def test_flags_are_bools(field: str) -> None:
    region = MemoryRegion.rom_device("a", Block(1), OPS)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError) as caught:
        setattr(region, field, 1)
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["name", "block", "ops", "target", "parent", "subregions", "kind", "terminates"])
def test_the_rest_cannot_be_set(field: str) -> None:
    with pytest.raises(AttributeError):
        setattr(box(), field, None)


def test_logging() -> None:
    region = ram()
    region.set_log(True)
    region.set_log(True, DIRTY_MEMORY_MIGRATION)
    assert region.dirty_log_mask == 0b101
    region.set_log(False)
    region.set_log(False, DIRTY_MEMORY_CODE)
    assert region.dirty_log_mask == 0b100


def test_who_is_seen_from_where() -> None:
    a, b, c = box("a"), box("b"), ram("c")
    a.add_subregion(0, b)
    b.add_subregion(0, c)
    lone = MemoryRegion.alias("lone", c, 0, 1)
    assert seen_from([c]) == {a, b, c, lone}
    assert seen_from([a]) == {a}


def test_regions_go_when_nobody_has_them() -> None:
    target = ram("target")
    alias = MemoryRegion.alias("alias", target, 0, 1)
    root = box()
    root.add_subregion(0, alias)
    gone = [weakref.ref(region) for region in (root, alias)]
    del root, alias
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert seen_from([target]) == {target}


# ---- transactions ----


class Counter(MemoryListener):
    """Counts commits."""

    def __init__(self) -> None:
        self.commits = 0

    def commit(self) -> None:
        self.commits += 1


def test_a_transaction_is_rendered_once() -> None:
    root, counter = box(), Counter()
    with AddressSpace(root, "memory") as space:
        space.add_listener(counter)
        view = space.flatview
        with transaction():
            for n in range(10):
                root.add_subregion(n, MemoryRegion.io(f"{n}", 1))
                with transaction():
                    root.subregions[0].readonly = True
            assert space.flatview is view
            assert counter.commits == 1  # of add_listener
        assert (counter.commits, len(space.flatview)) == (2, 10)
        with transaction():
            pass
        root.subregions[0].enabled = True  # as it is
        assert counter.commits == 2


def test_a_body_that_raises_has_made_its_changes() -> None:
    root, counter = box(), Counter()
    with AddressSpace(root, "memory") as space:
        space.add_listener(counter)

        def body() -> None:
            with transaction(), transaction():
                root.add_subregion(0, MemoryRegion.io("a", 1))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            body()
        assert (counter.commits, len(space.flatview)) == (2, 1)
        root.subregions[0].enabled = False  # the depth is 0 again
        assert (counter.commits, len(space.flatview)) == (3, 0)


class Refuser(MemoryListener):
    """Raises at its `at`-th call; `calls` are what it was told, but for nops."""

    def __init__(self, priority: int, at: int = -1) -> None:
        self.priority, self.at, self.count = priority, at, 0
        self.sections: dict[tuple[str, int], int] = {}  # and the mask of who wants it logged
        self.open = False
        self.saved: dict[tuple[str, int], int] = {}

    @staticmethod
    def key(section: MemoryRegionSection) -> tuple[str, int]:
        return section.region.name, section.offset_within_address_space

    def call(self) -> None:
        self.count += 1
        if self.count - 1 == self.at:
            self.sections, self.open = self.saved, False  # as it was before
            raise MemoryError("refused")

    def begin(self) -> None:
        assert not self.open
        self.saved = self.sections.copy()
        self.call()
        self.open = True

    def commit(self) -> None:
        self.call()
        self.open = False

    def region_add(self, section: MemoryRegionSection) -> None:
        self.call()
        self.sections[self.key(section)] = section.region.dirty_log_mask

    def region_del(self, section: MemoryRegionSection) -> None:
        self.call()
        del self.sections[self.key(section)]

    def log_start(self, section: MemoryRegionSection, old: int, new: int) -> None:
        self.call()
        assert section.region.dirty_log_mask in (old, new)
        self.sections[self.key(section)] = new

    log_stop = log_start


def state(*regions: MemoryRegion) -> list[object]:
    return [
        (r.name, r.addr, r.priority, r.parent, r.subregions, r.enabled, r.size, r.dirty_log_mask, r.alias_offset,
         r.readonly)
        for r in regions
    ]  # fmt: skip


@pytest.mark.parametrize("priority", [0, 1, 2])
def test_a_listener_that_refuses_takes_all_back(priority: int) -> None:
    # At each call that it gets; two others, one told before it and one after it, and two spaces.
    refusals = 0
    for at in range(1000):
        root, moved, gone = box(), MemoryRegion.io("moved", 4), box("gone", 0x1000)
        logged, shrunk = ram("logged"), ram("shrunk")
        for n, region in enumerate((moved, gone, logged, shrunk)):
            root.add_subregion(n * 0x10000, region)
        gone.add_subregion(4, MemoryRegion.io("inner", 4))
        alias, late = MemoryRegion.alias("alias", shrunk, 0, 0x1000), MemoryRegion.io("late", 4)
        root.add_subregion(0x90000, alias)
        logged.dirty_log_mask = 1
        regions = (root, moved, gone, logged, shrunk, alias, late, *gone.subregions)
        others = [Refuser(0), Refuser(2), Refuser(1)]
        with (
            AddressSpace(root, "memory") as space,
            AddressSpace(MemoryRegion.alias("a", root, 1, 1 << 20), "b") as second,
        ):
            listener = Refuser(priority)
            for one in (others[0], others[1], listener):
                space.add_listener(one)
            second.add_listener(others[2])
            before = state(*regions)
            views = space.flatview, second.flatview
            told = [one.sections.copy() for one in others]
            listener.at, listener.count = at, 0
            try:
                with transaction():
                    moved.addr = 0x5000
                    root.del_subregion(gone)
                    gone.del_subregion(gone.subregions[0])
                    logged.dirty_log_mask = 4
                    shrunk.size = 0x800
                    shrunk.enabled = False
                    shrunk.enabled = True
                    alias.alias_offset = 0x100
                    root.readonly = True
                    root.add_subregion(0x1000, late, 9)
            except MemoryError:
                refusals += 1
                assert state(*regions) == before
                assert (space.flatview, second.flatview) == views
                assert [one.sections.copy() for one in others] == told
                assert not any(one.open for one in others)
                listener.at = -1
            else:
                listener.at = -1
                assert state(*regions) != before
                assert space.flatview is not views[0]
                assert [one.sections for one in others[:2]] == [listener.sections] * 2 != told[:2]
                break
            # All goes on as if nothing had been: the next change arrives.
            moved.addr = 0x7000
            assert ("moved", 0x7000) in others[0].sections
    # begin, 5 ranges that go or change, 4 that come or change and commit, give or take.
    assert refusals > 8


def test_who_is_told_the_way_back_may_fail_too() -> None:
    root, region = box(), MemoryRegion.io("a", 1)
    root.add_subregion(0, region)

    class Fails(MemoryListener):
        deleted = False

        def region_del(self, section: MemoryRegionSection) -> None:
            self.deleted = True

        def region_add(self, section: MemoryRegionSection) -> None:
            if self.deleted:
                raise OSError("broken")

    class Refuses(MemoryListener):
        def region_del(self, section: MemoryRegionSection) -> None:
            raise KeyError("no")

    with AddressSpace(root, "memory") as space:
        space.add_listener(Refuses())
        space.add_listener(Fails())  # told of what goes before the one above
        with pytest.raises(KeyError) as caught:
            region.enabled = False
        assert any("told of the way back, raised OSError: broken" in note for note in caught.value.__notes__)
        assert region.enabled
        Refuses.region_del = MemoryListener.region_del  # type: ignore[method-assign]


def test_what_stops_the_rendering_takes_all_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvmodel.ram import address_space

    def interrupted(_root: MemoryRegion) -> object:
        raise KeyboardInterrupt

    root, counter = box(), Counter()
    root.add_subregion(0, MemoryRegion.io("a", 1))
    root.add_subregion(4, MemoryRegion.io("b", 1))
    with AddressSpace(root, "memory") as space:
        space.add_listener(counter)
        view = space.flatview
        with monkeypatch.context() as patch:
            patch.setattr(address_space, "render", interrupted)
            with pytest.raises(KeyboardInterrupt):
                root.subregions[0].readonly = True
        assert (space.flatview, root.subregions[0].readonly, counter.commits) == (view, False, 1)
        root.subregions[0].readonly = True
        assert (space.flatview.ranges[1].readonly, counter.commits) == (True, 2)


def test_a_listener_cannot_change_what_it_is_told_of() -> None:
    root, region = box(), MemoryRegion.io("a", 1)
    root.add_subregion(0, region)

    class Meddles(MemoryListener):
        def region_del(self, section: MemoryRegionSection) -> None:
            section.region.enabled = True

    with AddressSpace(root, "memory") as space:
        listener = Meddles()
        space.add_listener(listener)
        with pytest.raises(BusyError, match="listeners are being told"):
            region.enabled = False
        assert region.enabled
        with pytest.raises(BusyError):
            space.remove_listener(listener)
        Meddles.region_del = MemoryListener.region_del  # type: ignore[method-assign]


def test_changes_in_many_threads() -> None:
    # The lock is one; readers take none.
    root = box()
    regions = [MemoryRegion.io(f"{n}", 1) for n in range(8)]
    for n, region in enumerate(regions):
        root.add_subregion(n, region)
    with AddressSpace(root, "memory") as space:
        counter = Counter()
        space.add_listener(counter)
        wrong: list[object] = []

        def change(region: MemoryRegion) -> None:
            for _ in range(50):
                with transaction():
                    region.enabled = False
                    region.enabled = True
                    region.addr += 16
                view = space.flatview
                if len(view) != 8 or sum(r.start % 16 for r in view) != 28:
                    wrong.append(view.ranges)

        threads = [threading.Thread(target=change, args=(region,)) for region in regions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert counter.commits == 1 + 8 * 50
        assert sorted(r.start for r in space.flatview) == [16 * 50 + n for n in range(8)]
