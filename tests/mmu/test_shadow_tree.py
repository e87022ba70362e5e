"""Shadow pages: written past, too many, taken away.  Numbers worked out from the kernel's rules."""

from __future__ import annotations

import pytest

from hvmodel.mmu import HostMemory, ShadowMmu, SimAccess, SimSlot
from tests.mmu.shadow_ram import ALL, MASKS, Ram, U, W, named


def test_a_write_to_a_table_above_is_emulated_and_takes_what_was_made_of_it() -> None:
    ram = Ram(0x10000 | ALL, 0x3000 | ALL)
    mmu = ram.mmu()
    mmu.access(0)
    mmu.access(0x1000)
    mmu.take_events()
    found = mmu.access(0x1800, "store", (0x4000 | ALL).to_bytes(8, "little"))
    assert found == SimAccess(emulated=True)
    assert mmu.translation(0) == 0x10000  # entry 256 was written, not 0
    mmu.write_guest(0x3000, (0x4000 | ALL).to_bytes(8, "little"))
    assert mmu.translation(0) is None


def test_the_third_write_takes_the_whole_page() -> None:
    ram = Ram(0x10000 | ALL)
    mmu = ram.mmu()
    mmu.access(0)
    mmu.take_events()
    for count in range(3):
        assert not named(mmu.take_events(), "prepare_zap_page"), count
        mmu.write_guest(0x3800, bytes(8))
    assert [e.gfn for e in named(mmu.take_events(), "prepare_zap_page")] == [3]


@pytest.mark.parametrize(
    ("gpa", "size", "goes"),
    [(0x3801, 8, True), (0x3800, 1, False), (0x3800, 2, True), (0x3800, 8, False), (0x3806, 4, False)],
)
def test_a_crooked_write_takes_the_whole_page(gpa: int, size: int, goes: bool) -> None:
    mmu = Ram(0x10000 | ALL).mmu()
    mmu.access(0)
    mmu.take_events()
    mmu.write_guest(gpa, bytes(size))
    assert bool(named(mmu.take_events(), "prepare_zap_page")) is goes


def test_half_an_entry_is_written() -> None:
    # 4 bytes, of 8: both halves take what was made of the entry, and of no other; neither is crooked
    for half in (0, 4):
        mmu = Ram(0x10000 | ALL, 0x11000 | ALL).mmu()
        mmu.access(0)
        mmu.take_events()
        mmu.write_guest(0x4000 + half, bytes(4))
        assert (mmu.translation(0), mmu.translation(0x1000)) == (None, 0x11000)
        assert not mmu.take_events()


def test_unsync_pages_go_with_the_page_above_unless_the_parameter_is_off() -> None:
    for eager, expected in ((True, [3, 4]), (False, [3])):
        ram = Ram(0x10000 | ALL, 0x4000 | ALL)
        mmu = ram.mmu(eager_zap_unsync_children=eager)
        mmu.access(0)
        mmu.access(0x1000, "store", (0x10000 | ALL).to_bytes(8, "little"))
        mmu.take_events()
        mmu.write_guest(0x3801, bytes(8))
        assert [e.gfn for e in named(mmu.take_events(), "prepare_zap_page")] == expected


def test_the_oldest_pages_go_when_there_are_too_many() -> None:
    # KVM frees until it has 25 (KVM_REFILL_PAGES) once fewer than 5 are left of what it may have.
    size = 4 << 20
    ram = Ram(size=size)
    for i in range(70):  # 70 tables of level 1, each with one page
        ram.put(0x3000 + 8 * i, 0x100000 + 0x1000 * i | ALL)
        ram.put(0x100000 + 0x1000 * i, 0x10000 | ALL)
    mmu = ram.mmu(max_pages=64)
    for i in range(70):
        mmu.access(i << 21)
        assert mmu.pages.used <= 64
        if gone := [e.gfn for e in named(mmu.take_events(), "prepare_zap_page")]:
            break
    # 60 in use: the root, levels 3 and 2, 57 tables; the next finds 4 free, and 21 go, oldest first, but the root.
    assert i == 57
    assert gone == [2, 3, *range(0x100, 0x100 + 19)]


def test_zap_all() -> None:
    mmu = Ram(0x10000 | ALL).mmu()
    mmu.access(0)
    mmu.take_events()
    mmu.zap_all_fast()
    assert [e.gfn for e in named(mmu.take_events(), "prepare_zap_page")] == [1, 2, 3, 4]
    mmu.access(0)
    events = mmu.take_events()
    # the root goes once nobody uses it: its role has the bit "invalid" now
    assert [(e.gfn, e.role >> 11 & 1) for e in named(events, "prepare_zap_page")] == [(1, 1)]
    assert [e.created for e in named(events, "get_page")] == [True] * 4


def test_unmapped_frames() -> None:
    mmu = Ram(0x10000 | ALL, 0x11000 | ALL).mmu()
    mmu.access(0)
    mmu.unmap_gfn_range(0x10, 0x11)
    assert (mmu.translation(0), mmu.translation(0x1000)) == (None, 0x11000)


def two_roots() -> tuple[Ram, ShadowMmu]:
    # Roots 0x1000 and 0x5000 with tables of their own down to the PD; both PDs lead to the table 0x4000.
    ram = Ram(0x10000 | ALL, 0x4000 | ALL)
    for table in (0x5000, 0x6000):
        ram.put(table, table + 0x1000 | ALL)
    ram.put(0x7000, 0x4000 | ALL)
    return ram, ram.mmu()


def test_a_stale_page_is_brought_up_to_date_where_it_is_found_again() -> None:
    _, mmu = two_roots()
    mmu.access(0)
    mmu.access(0x1000, "store", (0x11000 | ALL).to_bytes(8, "little"))
    assert mmu.translation(0) == 0x10000
    mmu.set_sregs(cr3=0x5000)
    mmu.access(0)
    events = mmu.take_events()
    assert (4, False) in [(e.gfn, e.created) for e in named(events, "get_page")]
    assert mmu.translation(0) == 0x11000
    # it stays unsync, and the new tables above know of it
    assert not named(events, "sync_page")
    mmu.mov_cr3(0x5000)
    assert [e.gfn for e in named(mmu.take_events(), "sync_page")] == [4]


def test_a_page_found_again_begins_to_count_writes_anew() -> None:
    ram, mmu = two_roots()
    ram.put(0x6000, 0x3000 | ALL)  # both PDPTs lead to the PD 0x3000
    mmu.access(0)
    for _ in range(2):
        mmu.write_guest(0x3800, bytes(8))
    mmu.set_sregs(cr3=0x5000)
    mmu.access(0)
    mmu.take_events()
    for _ in range(2):
        mmu.write_guest(0x3800, bytes(8))
    assert not named(mmu.take_events(), "prepare_zap_page")
    mmu.write_guest(0x3800, bytes(8))
    assert named(mmu.take_events(), "prepare_zap_page")


def test_an_unsync_table_that_becomes_a_directory_goes() -> None:
    # The table 0x4000, unsync, is linked as a PD now: the pages made of it as a table cannot stay unsync.
    ram = Ram(0x10000 | ALL, 0x4000 | ALL)
    mmu = ram.mmu()
    mmu.access(0)
    mmu.access(0x1000, "store", (0x9000 | ALL).to_bytes(8, "little"))
    ram.put(0x2008, 0x4000 | ALL)
    ram.put(0x9000, 0x10000 | ALL)
    mmu.take_events()
    mmu.access(1 << 30)
    events = mmu.take_events()
    assert [(e.gfn, e.role & 15) for e in named(events, "prepare_zap_page")] == [(4, 1)]
    assert (4, 2) in [(e.gfn, e.role & 15) for e in named(events, "get_page")]


def test_many_unsync_tables_are_synchronised_part_by_part() -> None:
    # 20 tables from 0x20000 on, each at an address too; KVM's lists hold 16 pages, with those of the levels above.
    ram = Ram(0x10000 | ALL)
    for i in range(20):
        ram.put(0x3000 + 8 * (i + 1), 0x20000 + 0x1000 * i | ALL)
        ram.put(0x20000 + 0x1000 * i, 0x10000 | ALL)
        ram.put(0x4000 + 8 * (100 + i), 0x20000 + 0x1000 * i | ALL)
    mmu = ram.mmu()
    for i in range(20):
        mmu.access((i + 1) << 21)
        mmu.access((100 + i) << 12, "store", (0x11000 | ALL).to_bytes(8, "little"))
    assert len(named(mmu.take_events(), "unsync_page")) == 20
    mmu.mov_cr3(0x1000)
    assert [e.gfn for e in named(mmu.take_events(), "sync_page")] == [0x20 + i for i in range(20)]
    for i in range(20):
        assert mmu.translation((i + 1) << 21) is None
    mmu.mov_cr3(0x1000)
    assert not mmu.take_events()


def test_memory_of_several_pieces() -> None:
    ram = Ram(0x10000 | ALL, 0x400000 | ALL)
    extra = bytearray(0x1000)
    extra[8:16] = b"abcdefgh"
    mmu = ram.mmu(slots=[SimSlot(0, 256), SimSlot(0x400, 1)], memory=[(0, ram.data), (0x400000, extra)])
    assert mmu.access(0x1008).data == b"abcdefgh"
    assert mmu.read(0x1008).data == b"abcdefgh"
    mmu.access(0x1010, "store", b"12345678")
    mmu.write(0x1018, b"XY345678")
    assert bytes(extra[16:32]) == b"12345678XY345678"


def test_slots_side_by_side() -> None:
    mmu = Ram().mmu(slots=[SimSlot(0, 4), SimSlot(4, 4), SimSlot(0x100, 1)])
    assert [mmu.slot_at(gfn) is not None for gfn in (0, 3, 4, 7, 8, 0xFF, 0x100)] == [1, 1, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("readonly", [False, True])
def test_what_the_host_does_not_let_be_written_stays_so_when_it_is_synchronised(readonly: bool) -> None:
    # Page 0x10 is read-only in the host's mapping, or not; the guest takes U from its entry, in a table that is unsync.
    mmu = Ram(0x10000 | ALL, 0x4000 | ALL).mmu(host=HostMemory(readonly=[0x10] if readonly else []))
    mmu.access(0)
    mmu.access(0x1000, "store", (0x10000 | ALL & ~U).to_bytes(8, "little"))
    mmu.mov_cr3(0x1000)
    assert [e.gfn for e in named(mmu.take_events(), "sync_page")] == [4]
    (table,) = [sp for sp in mmu.pages.active if sp.gfn == 4]
    assert table.spt[0] & U == 0
    assert bool(table.spt[0] & W) == bool(table.spt[0] & MASKS.host_writable_mask) == (not readonly)
