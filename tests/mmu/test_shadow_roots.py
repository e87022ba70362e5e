"""Roots of shadow tables: without paging, of 2 levels, of PAE; kept ones; requests."""

from __future__ import annotations

from hvmodel.mmu import HostMemory, ShadowMmu
from tests.mmu.shadow_ram import ALL, P, Ram, named


def test_a_batch_of_emulated_instructions_puts_the_sync_off() -> None:
    ram = Ram(0x10000 | ALL, 0x4000 | ALL)
    for batch, at_once in ((False, ["sync_page"]), (True, [])):
        mmu = ram.mmu(emulation_batch=batch)
        mmu.access(0)
        mmu.access(0x1000, "store", (0x10000 | ALL).to_bytes(8, "little"))
        mmu.take_events()
        mmu.mov_cr3(0x1000)
        assert [e.name for e in mmu.take_events()] == at_once
        mmu.enter()
        assert [e.name for e in mmu.take_events()] == (["sync_page"] if batch else [])


def test_roots_without_paging() -> None:
    # Four direct pages of level 2, a GiB each: role 0x1782, as a live kernel traces them.
    mmu = Ram().mmu(cr0=0x11, cr3=0, cr4=0, efer=0)
    mmu.enter()
    roots = named(mmu.take_events(), "get_page")
    assert [(e.gfn, e.role, e.created) for e in roots] == [(i << 18, 0x1782, True) for i in range(4)]
    mmu.access(0x5008, "store", b"\2" * 8)
    events = mmu.take_events()
    assert [(e.gfn, e.role) for e in named(events, "get_page")] == [(0, 0x1781)]
    assert [e.gfn for e in named(events, "set_spte")] == [5, 0, 1, 2, 3, 4, 6, 7]


def test_two_levels_are_shadowed_by_four_directories() -> None:
    # 4-byte entries: PDE 1 covers 4 to 8 MiB, by two shadow tables; its address bit 21 is the quadrant.
    ram = Ram()
    ram.data[0x1000:0x5000] = bytes(0x4000)
    ram.put(0x1004, 0x2000 | ALL, 4)
    ram.put(0x2000 + 4 * 0x201, 0x10000 | ALL, 4)
    mmu = ram.mmu(cr0=0x80010011, cr4=0, efer=0)
    assert mmu.access(0x601000).fault is None
    pages = [(e.gfn, e.role & 0xFF) for e in named(mmu.take_events(), "get_page")]
    # level 2, has_4_byte_gpte (bit 4), quadrant in bits 6:5; then level 1, quadrant 1
    assert pages == [(1, 0x12 | quadrant << 5) for quadrant in range(4)] + [(2, 0x11 | 1 << 5)]
    assert mmu.translation(0x601000) == 0x10000
    mmu.write_guest(0x2000 + 4 * 0x201, bytes(4))
    assert mmu.translation(0x601000) is None


def test_pae_roots_are_the_pdptes() -> None:
    ram = Ram()
    ram.data[0x1000:0x5000] = bytes(0x4000)
    ram.put(0x1000, 0x2000 | P)
    ram.put(0x1018, 0x2000 | P)
    ram.put(0x2000, 0x3000 | ALL)
    ram.put(0x3008, 0x10000 | ALL)
    mmu = ram.mmu(cr0=0x80010011, cr4=0x20, efer=0)
    assert mmu.access(0xC0001000).fault is None
    events = mmu.take_events()
    # entries 1 and 2 are not present: two roots, of one page
    assert [(e.gfn, e.role & 0x7F, e.created) for e in named(events, "get_page")] == [
        (2, 2, True),
        (2, 2, False),
        (3, 1, True),
    ]
    assert mmu.access(0x40001000).fault == 4


def test_kept_roots() -> None:
    ram = Ram(0x10000 | ALL)
    for root in (0x5000, 0x6000, 0x7000, 0x8000):
        ram.put(root, 0x2000 | ALL)
    mmu = ram.mmu()
    mmu.enter()
    made = []
    for cr3 in (0x5000, 0x6000, 0x7000, 0x1000, 0x8000, 0x6000, 0x5000):
        mmu.take_events()
        mmu.mov_cr3(cr3)
        made.append([(e.gfn, e.created) for e in named(mmu.take_events(), "get_page")])
    # three beside the one in use; 0x5000 was the last used when 0x8000 came, so that it is looked up again
    assert made == [[(5, True)], [(6, True)], [(7, True)], [], [(8, True)], [], [(5, False)]]
    mmu.set_sregs(cr3=0x6000)
    mmu.enter()
    assert [(e.gfn, e.created) for e in named(mmu.take_events(), "get_page")] == [(6, False)]
    mmu.set_sregs(cr3=0x6000)
    mmu.enter()
    assert not mmu.take_events()


def test_a_root_in_no_slot() -> None:
    mmu = Ram().mmu(cr3=0x40000000)
    assert mmu.access(0).fault == 4
    mmu.mov_cr3(0x1000)
    assert mmu.access(0).fault == 4


def two_levels() -> tuple[Ram, ShadowMmu]:
    # The PD at 0x1000; its entries 0 and 1 lead to 0x2000 and 0x3000, whose every entry maps page 0x10000.
    ram = Ram()
    ram.data[0x1000:0x5000] = bytes(0x4000)
    for i in range(2):
        ram.put(0x1000 + 4 * i, 0x2000 + 0x1000 * i | ALL, 4)
        for entry in range(1024):
            ram.put(0x2000 + 0x1000 * i + 4 * entry, 0x10000 | ALL, 4)
    return ram, ram.mmu(cr0=0x80010011, cr4=0, efer=0)


def test_a_directory_entry_of_4_bytes_is_two_of_the_shadow() -> None:
    _, mmu = two_levels()
    gvas = (0x0, 0x200000, 0x400000, 0x600000)
    for gva in gvas:
        mmu.access(gva)
    mmu.write_guest(0x1000, bytes(4))
    assert [mmu.translation(gva) for gva in gvas] == [None, None, 0x10000, 0x10000]
    mmu.write_guest(0x1004, bytes(4))
    assert [mmu.translation(gva) for gva in gvas] == [None] * 4


def test_the_upper_half_of_a_table_of_4_bytes() -> None:
    # 0x2ff000 is entry 767 of the table: entry 255 of quadrant 1
    ram, mmu = two_levels()
    ram.put(0x3000, 0x2000 | ALL, 4)  # 0x400000 is the table 0x2000
    mmu.access(0x2FF000)
    mmu.access(0x400000 + 4 * 767, "store", (0x11000 | ALL).to_bytes(4, "little"))
    assert mmu.translation(0x2FF000) == 0x10000
    mmu.invlpg(0x2FF000)
    assert mmu.translation(0x2FF000) is None
    mmu.access(0x2FF000)
    assert mmu.translation(0x2FF000) == 0x11000


def test_roots_of_pae_are_not_kept() -> None:
    ram = Ram()
    ram.data[0x1000:0x5000] = bytes(0x4000)
    ram.put(0x1000, 0x2000 | P)
    ram.put(0x1020, 0x2000 | P)
    mmu = ram.mmu(cr0=0x80010011, cr4=0x20, efer=0)
    mmu.enter()
    mmu.mov_cr3(0x1020)
    assert mmu.prev_roots == [None] * 3
    assert [sp.root_count for sp in mmu.pages.active] == [1]


def test_a_root_taken_again_begins_to_count_writes_anew() -> None:
    ram = Ram(0x10000 | ALL)
    ram.put(0x5000, 0x2000 | ALL)
    mmu = ram.mmu()
    mmu.enter()
    for _ in range(2):
        mmu.write_guest(0x1800, bytes(8))
    mmu.mov_cr3(0x5000)
    mmu.mov_cr3(0x1000)
    mmu.take_events()
    for _ in range(2):
        mmu.write_guest(0x1800, bytes(8))
    assert not named(mmu.take_events(), "prepare_zap_page")
    mmu.write_guest(0x1800, bytes(8))
    # it is in use: it is taken from the lists now, and freed when the guest is entered
    assert [(e.gfn, e.root_count) for e in named(mmu.take_events(), "prepare_zap_page")] == [(1, 1)]
    mmu.enter()
    events = mmu.take_events()
    assert [(e.name, e.gfn, e.root_count) for e in events] == [("prepare_zap_page", 1, 0), ("get_page", 1, 0)]


def test_without_paging_large_pages_are_of_2_mib_at_most() -> None:
    class Host(HostMemory):
        def mapping_level(self, gfn: int) -> int:
            return 3

    mmu = Ram(size=8 << 20).mmu(cr0=0x11, cr3=0, cr4=0, efer=0, host=Host())
    mmu.access(0x205000)
    events = mmu.take_events()
    assert [(e.gfn, e.pfn, e.level) for e in named(events, "spte_requested")] == [(0x205, 0x100205, 2)]
    assert [(e.gfn, e.level) for e in named(events, "set_spte")] == [(0x200, 2)]
    assert mmu.translation(0x205008) == 0x205008
    # logged, it can't be made writable as a whole: a page of 4 KiB comes in its place
    mmu.set_log_dirty(0, True)
    mmu.take_events()
    mmu.access(0x206000, "store")
    events = mmu.take_events()
    assert next((e.name, e.spte >> 1 & 1) for e in events) == ("fast_page_fault", 0)
    assert next((e.gfn, e.level) for e in named(events, "set_spte")) == (0x206, 1)


def test_pdptes_lie_at_32_bytes() -> None:
    ram = Ram()
    ram.data[0x1000:0x5000] = bytes(0x4000)
    ram.put(0x1020 + 8 * 3, 0x2000 | P)
    ram.put(0x2000, 0x3000 | ALL)
    ram.put(0x3000, 0x10000 | ALL)
    mmu = ram.mmu(cr0=0x80010011, cr4=0x20, efer=0, cr3=0x103F)
    assert mmu.access(0xC0000000).fault is None
    assert mmu.root is not None
    assert [None if sp is None else sp.gfn for sp in mmu.root.pages] == [None, None, None, 2]
    mmu.zap_all_fast()
    mmu.access(0xC0000000)
    assert [sp.valid_gen for sp in mmu.root.pages if sp is not None] == [1]


def test_bits_below_12_of_cr3_are_no_address() -> None:
    mmu = Ram(0x10000 | ALL).mmu(cr3=0x1018)
    assert mmu.access(0).fault is None


def test_a_directory_entry_takes_no_more_than_its_two() -> None:
    # Directory entry 0 is entries 0 and 1 of the shadow; 2 and 3 are of the next one.
    _, mmu = two_levels()
    gvas = (0x0, 0x200000, 0x400000, 0x600000)
    for gva in gvas:
        mmu.access(gva)
    mmu.write_guest(0x1000, bytes(4))
    assert [mmu.translation(gva) for gva in gvas] == [None, None, 0x10000, 0x10000]


def test_roots_of_pae_are_loaded_anew_when_any_goes() -> None:
    # is_obsolete_root: a root that is no shadow page (the four PDPTEs) cannot be told to be fresh, and counts as stale.
    ram = Ram()
    ram.data[0x1000:0x5000] = bytes(0x4000)
    ram.put(0x1000, 0x2000 | P)
    ram.put(0x1008, 0x5000 | P)
    mmu = ram.mmu(cr0=0x80010011, cr4=0x20, efer=0)
    mmu.enter()
    assert [(e.gfn, e.created) for e in named(mmu.take_events(), "get_page")] == [(2, True), (5, True)]
    for _ in range(3):  # the third write takes the directory of the second
        mmu.write_guest(0x5800, bytes(8))
    assert [e.gfn for e in named(mmu.take_events(), "prepare_zap_page")] == [5]
    mmu.enter()
    assert [(e.gfn, e.created) for e in named(mmu.take_events(), "get_page")] == [(2, False), (5, True)]
