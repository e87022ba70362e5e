"""Walks, against page tables whose contents the test knows, and error codes that kernel 6.18 or the manual gives.

The kernel itself and QEMU judge the same walker in hvmodel/witness (check_walk, check_tcg).
"""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import struct
from typing import Any

import numpy as np
import pytest

from hvmodel.arch.paging import PageTables
from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError
from hvmodel.mmu.guest_memory import GuestMemory
from hvmodel.mmu.permission import (
    PFERR_FETCH_MASK,
    PFERR_GUEST_FINAL_MASK,
    PFERR_GUEST_PAGE_MASK,
    PFERR_IMPLICIT_ACCESS,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)
from hvmodel.mmu.walk import Entry, Fault, GuestMmu, NestedWalker, Update, Walker

from ..guest_tables import CONFIGS, MODES, PAGES, address, four_levels, image, memory, walker

W, U, F = PFERR_WRITE_MASK, PFERR_USER_MASK, PFERR_FETCH_MASK
ACCESSES = (0, W, U, U | W, F, U | F, PFERR_IMPLICIT_ACCESS, PFERR_IMPLICIT_ACCESS | W)

PG, PE, WP = 1 << 31, 1, 1 << 16
PSE, PAE, LA57, SMEP, SMAP, PKE = 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21, 1 << 22
LME, LMA, NXE = 1 << 8, 1 << 10, 1 << 11
AC = 1 << 18
P, RW, US, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63


# ---- where walks lead ----


@pytest.mark.parametrize("mode", MODES)
def test_walks_lead_where_the_tables_were_made_to_lead(mode: str) -> None:
    rng = random.Random(mode)
    tables = PageTables(0, mode, maxphyaddr=40)  # type: ignore[arg-type]  # of MODES
    at = 0
    for _ in range(24):
        at += rng.randrange(1, 64) << 21
        size = rng.choice((0x1000, 0x5000, 4 << 20))
        at = (at + (1 << 22)) & ~0x3FFFFF
        gpa = rng.randrange(1 << 30) & ~0x3FFFFF
        if rng.random() < 0.5:
            gpa += 0x1000
            size = 0x3000
        tables.map(at, gpa, size, writable=rng.random() < 0.5, user=rng.random() < 0.5)
        at += size
    if mode not in ("32bit", "pae"):
        tables.map(0xFFFF_8000_0000_0000, 1 << 30, 1 << 30, page_size=1 << 30, nx=True)
    memory = tables.image()
    walks = Walker(memory, maxphyaddr=40, **MODES[mode])  # type: ignore[arg-type]  # of MODES
    shifts = {"32bit": (12, 22), "pae": (12, 21, 30)}.get(mode, (12, 21, 30, 39, 48))
    for start, to, size in tables.ranges():
        for offset in (0, size - 1, rng.randrange(size)):
            walk = walks.walk(start + offset)
            leaf = tables.find(start + offset)
            assert leaf is not None
            assert walk.gpa == to + offset == tables.translate(start + offset)
            assert walk.gfn == walk.gpa >> 12
            assert (walk.ok, walk.fault, walk.error_code, walk.missing) == (True, None, None, None)
            assert walk.page_size == leaf.size
            assert walk.entries[-1].value == leaf.entry
            assert leaf.size == 1 << shifts[walk.level - 1]
            # Entries lie where the address and the entry above say.
            table = 0
            for entry in walk.entries:
                width = 4 if mode == "32bit" else 8
                index = (start + offset) >> shifts[entry.level - 1] & (0x3FF if width == 4 else 0x1FF)
                if mode == "pae" and entry.level == 3:
                    index &= 3
                assert (entry.gpa, entry.index, entry.size) == (table + index * width, index, width)
                assert entry.value == int.from_bytes(memory[entry.gpa : entry.gpa + width], "little")
                assert entry.gfn == entry.gpa >> 12
                table = entry.value & 0xFFFFFFFFFF000
            user, write = bool(leaf.entry & US), bool(leaf.entry & RW)
            assert walks.walk(start + offset, U).ok == user
            assert walks.walk(start + offset, W).ok == write
            assert walks.walk(start + offset, F).ok == (not leaf.nx)
        hole = walks.walk(start + size)
        if tables.find(start + size) is None:
            assert (hole.gpa, hole.error_code) == (None, 0)


def test_a_page_of_4_mib_above_4_gib() -> None:
    # PSE-36: bits 16:13 of the entry are bits 35:32 of the address (Intel SDM volume 3, table 5-4).
    tables = image({0x1000: 0x0140_0000 | 0b1011 << 13 | PS | RW | P}, width=4)
    found = Walker(tables, cr3=0x1000, cr0=PG | PE, cr4=PSE, efer=0).walk(0x12_3456)
    assert found.gpa == 0xB_0152_3456
    assert found.page_size == 4 << 20
    without = Walker(tables, cr3=0x1000, cr0=PG | PE, cr4=PSE, efer=0, pse36=False).walk(0x12_3456)
    assert without.error_code == 9  # bits 21:13 are reserved then
    # Without CR4.PSE bit 7 says nothing, and the walk goes on: to a table that no memory has.
    flat = Walker(tables, cr3=0x1000, cr0=PG | PE, cr4=0, efer=0).walk(0x12_3456)
    assert (flat.level, flat.missing, flat.error_code) == (1, 0x0141_6000 + 0x123 * 4, 0)


def test_without_paging_an_address_is_physical() -> None:
    walk = Walker(bytes(8), cr0=PE, cr4=0, efer=0).walk(0x1234_5678, U | W)
    assert (walk.gpa, walk.level, walk.entries, walk.pte_access, walk.updates) == (0x1234_5678, 0, (), 7, ())
    assert walk.page_size is None


def test_pae_reads_its_top_entries_or_has_them() -> None:
    tables = image({0x1028: 0x2001, 0x2000: 0x3000 | RW | P, 0x3000: 0x9000 | RW | P})
    arguments: dict[str, Any] = {"cr0": PG | PE, "cr4": PAE, "efer": NXE}
    gva = 1 << 30 | 0x123
    read = Walker(tables, cr3=0x1020, **arguments)
    assert read.walk(gva).gpa == 0x9123
    assert [(e.level, e.gpa) for e in read.walk(gva).entries] == [(3, 0x1028), (2, 0x2000), (1, 0x3000)]
    held = Walker(tables, cr3=0x1020, pdptrs=(0, 0x2001, 0, 0), **arguments)
    tables[0x1028:0x1030] = bytes(8)
    assert held.walk(gva).gpa == 0x9123
    assert (read.walk(gva).error_code, read.walk(gva).level) == (0, 3)
    assert (held.walk(0).error_code, held.walk(0).level) == (0, 3)
    # A PDPTE's bit 1 is reserved; what the processor holds was looked at when CR3 was loaded.
    tables[0x1028:0x1030] = (0x2003).to_bytes(8, "little")
    assert read.walk(gva).error_code == 9
    assert Walker(tables, cr3=0x1020, pdptrs=(0, 0x2003, 0, 0), **arguments).walk(gva).ok
    # It has no A bit to be set, and no R/W that would count.
    assert [u.level for u in held.walk(gva, W).updates] == [2, 1]


# ---- error codes ----

CODES = [
    # What the running kernel's walker answered (6.18): the leaf, the registers, the access, the code.
    ("a reserved bit of a page of 2 MiB", None, {}, 0, 0x9),
    ("an address above maxphyaddr", 1 << 50 | 0x9000 | P, {}, 0, 0x9),
    ("bit 52 is ignored", 1 << 52 | 0x9000 | P, {}, 0, None),
    ("a supervisor's write to a read-only page", 0x9000 | P, {}, W, 0x3),
    ("the same without WP", 0x9000 | P, {"cr0": PG | PE}, W, None),
    ("CPL 3 reads a supervisor page", 0x9000 | P | RW, {}, U, 0x5),
    ("CPL 3 writes a read-only page", 0x9000 | P | US, {}, U | W, 0x7),
    ("CPL 3 writes a read-only page without WP", 0x9000 | P | US, {"cr0": PG | PE}, U | W, 0x7),
    ("a fetch from an NX page", 0x9000 | P | NX, {}, F, 0x11),
    ("CPL 3 fetches from an NX page", 0x9000 | P | US | NX, {}, U | F, 0x15),
    ("a write to a page that is not present", 0, {}, W, 0x2),
    ("a fetch from a page that is not present", 0, {}, F, 0x10),
    ("the same where neither NXE nor SMEP is set", 0, {"efer": LME | LMA}, F, 0x0),
    ("the same with SMEP", 0, {"efer": LME | LMA, "cr4": PAE | SMEP}, F, 0x10),
    ("NX without NXE", 0x9000 | P | NX, {"efer": LME | LMA}, 0, 0x9),
    ("SMAP", 0x9000 | P | US, {"cr4": PAE | SMAP}, 0, 0x1),
    ("SMAP, a write", 0x9000 | P | US | RW, {"cr4": PAE | SMAP}, W, 0x3),
    ("SMAP, lifted", 0x9000 | P | US, {"cr4": PAE | SMAP, "rflags": AC}, 0, None),
    ("SMAP, not lifted", 0x9000 | P | US, {"cr4": PAE | SMAP, "rflags": AC}, PFERR_IMPLICIT_ACCESS, 0x1),
    ("SMEP", 0x9000 | P | US, {"cr4": PAE | SMEP}, F, 0x11),
    ("SMEP does not mind CPL 3", 0x9000 | P | US, {"cr4": PAE | SMEP}, U | F, None),
    ("a protection key", 0x9000 | P | US | 5 << 59, {"cr4": PAE | PKE, "pkru": 1 << 10}, U, 0x25),
    ("its write-disable", 0x9000 | P | US | RW | 5 << 59, {"cr4": PAE | PKE, "pkru": 2 << 10}, U | W, 0x27),
    ("its write-disable, a read", 0x9000 | P | US | 5 << 59, {"cr4": PAE | PKE, "pkru": 2 << 10}, U, None),
    ("another key", 0x9000 | P | US | 4 << 59, {"cr4": PAE | PKE, "pkru": 1 << 10}, U, None),
    ("a key of a supervisor page", 0x9000 | P | 5 << 59, {"cr4": PAE | PKE, "pkru": 1 << 10}, 0, None),
    ("a key, a fetch", 0x9000 | P | US | 5 << 59, {"cr4": PAE | PKE, "pkru": 1 << 10}, U | F, None),
    ("without PKE", 0x9000 | P | US | 5 << 59, {"pkru": 1 << 10}, U, None),
    ("a reserved bit comes before a right", 1 << 50 | 0x9000 | P, {}, U | W, 0xF),
]


@pytest.mark.parametrize(("leaf", "registers", "access", "code"), [row[1:] for row in CODES], ids=[r[0] for r in CODES])
def test_error_codes(leaf: int | None, registers: dict[str, int], access: int, code: int | None) -> None:
    large = image({0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 1 << 13 | PS | P})
    memory = large if leaf is None else four_levels(leaf)
    walks = Walker(memory, cr3=0x1000, maxphyaddr=48, **registers)  # type: ignore[arg-type]  # of CODES
    for _ in range(2):  # the first walk, and one whose entries are known
        walk = walks.walk(0x123, access)
        assert walk.error_code == code
        assert walk.fault == (None if code is None else Fault(code, 0x123))
        assert walk.gpa == (0x9123 if code is None else None)
    if code is not None:
        assert walk.updates == ()


@pytest.mark.parametrize("level", [4, 3, 2, 1])
@pytest.mark.parametrize("what", ["not present", "reserved", "not writable", "supervisor", "NX"])
def test_one_wrong_entry_at_any_level(level: int, what: str) -> None:
    values = {at: (6 - at) << 12 | P | RW | US for at in (4, 3, 2)} | {1: 0x9000 | P | RW | US}
    wrong = {"not present": -P, "reserved": 1 << 49, "not writable": -RW, "supervisor": -US, "NX": NX}[what]
    values[level] += wrong
    memory = image({(5 - at) << 12: value for at, value in values.items()})
    walks = Walker(memory, cr3=0x1000, maxphyaddr=48)
    access = F if what == "NX" else U | W
    expected = {"not present": 6, "reserved": 0xF, "not writable": 7, "supervisor": 7, "NX": 0x11}[what]
    for _ in range(2):
        walk = walks.walk(0x456, access)
        assert walk.error_code == expected
        ends_here = what in ("not present", "reserved")
        assert walk.level == (level if ends_here else 1)
        assert [entry.value for entry in walk.entries] == [values[at] for at in range(4, walk.level - 1, -1)]
        if not ends_here:
            assert walk.pte_access == {"not writable": 5, "supervisor": 3, "NX": 6}[what]
    assert walks.walk(0x456, 0).ok == (not ends_here)


# ---- rights, A and D ----


def test_rights_add_up_and_pages_that_are_clean_are_not_writable() -> None:
    memory = image({0x1000: 0x2007, 0x2000: 0x3005, 0x3000: 0x4007 | NX, 0x4000: 0x9007 | D | A})
    walks = Walker(memory, cr3=0x1000)
    walk = walks.walk(0)
    assert walk.pte_access == 4
    assert walk.pt_access == (7, 7, 5, 4)  # of the entries above each
    clean = Walker(four_levels(0x9007 | A), cr3=0x1000)
    assert clean.walk(0).pte_access == 5
    assert clean.walk(0, W).pte_access == 7
    dirty = Walker(four_levels(0x9007 | A | D), cr3=0x1000)
    assert dirty.walk(0).pte_access == 7
    assert Walker(four_levels(0x9007 | 6 << 59), cr3=0x1000).walk(0).pkey == 6


def test_a_and_d_are_set_from_the_root_on() -> None:
    memory = four_levels(0x9007, P | RW | US)
    walks = Walker(memory, cr3=0x1000)
    before = bytes(memory)
    read = walks.walk(0)
    assert read.updates == tuple(
        Update(5 - n, n << 12, value, value | A, 8, True, False)
        for n, value in ((1, 0x2007), (2, 0x3007), (3, 0x4007), (4, 0x9007))
    )
    write = walks.walk(0, W)
    assert write.updates[-1] == Update(1, 0x4000, 0x9007, 0x9067, 8, True, True)
    assert (write.updates[-1].gfn, write.updates[-1].index) == (4, 0)
    assert bytes(memory) == before  # nobody asked for it
    assert walks.walk(0, 0, True).updates == read.updates
    assert memory == four_levels(0x9027, 0x27)
    assert walks.walk(0).updates == ()
    assert walks.walk(0, W, update=True).updates == (Update(1, 0x4000, 0x9027, 0x9067, 8, False, True),)
    assert memory == four_levels(0x9067, 0x27)
    assert walks.walk(0, W).updates == ()


def test_a_walk_that_faults_sets_nothing() -> None:
    memory = four_levels(0x9000 | P)
    before = bytes(memory)
    assert Walker(memory, cr3=0x1000).walk(0, W, update=True).error_code == 3
    assert memory == before


def test_memory_that_may_not_be_written_is_left_alone() -> None:
    memory = four_levels(0x9007)
    pieces = GuestMemory([(0, memoryview(memory)[:0x2000], False), (0x2000, memoryview(memory)[0x2000:])])
    walk = Walker(pieces, cr3=0x1000).walk(0, W, update=True)
    assert len(walk.updates) == 4  # the kernel traces all of them
    assert memory[0x1000:0x1008] == (0x2007).to_bytes(8, "little")
    assert memory[0x2000:0x2008] == (0x3027).to_bytes(8, "little")
    frozen = bytes(four_levels(0x9007))
    assert Walker(frozen, cr3=0x1000).walk(0, W, update=True).ok


def test_an_entry_that_changes_on_the_way_is_walked_again() -> None:
    memory = four_levels(0x9007)
    seen: list[int] = []

    def write(gpa: int, data: bytes) -> None:
        seen.append(gpa)
        memory[gpa : gpa + 8] = data
        if len(seen) == 1:  # somebody else makes the page another one, after the walk has read its entry
            memory[0x4000:0x4008] = (0xA007).to_bytes(8, "little")

    walk = Walker(GuestMemory([(0, memory)], write=write), cr3=0x1000).walk(0, W, update=True)
    assert walk.gpa == 0xA000
    assert memory == four_levels(0xA067, 0x27)
    assert seen == [0x1000, 0x2000, 0x3000, 0x4000]


# ---- memory in pieces ----


def test_tables_in_several_pieces_and_across_an_end() -> None:
    whole = memory(7, CONFIGS[0])
    view = memoryview(whole)
    cut = (0, 0x3000, 0x8000, 0x8800, 0xF000, PAGES * 4096 - 2044)
    pieces = [(start, view[start:end]) for start, end in itertools.pairwise(cut)]
    walks = walker(pieces, CONFIGS[0])
    one = walker(whole, CONFIGS[0])
    rng = random.Random(1)
    missing = 0
    for gva in [address(rng, CONFIGS[0]) for _ in range(600)]:
        found, expected = walks.walk(gva), one.walk(gva)
        gone = [e for e in expected.entries if e.gpa + 8 > cut[-1]]
        if gone:
            missing += 1
            assert (found.missing, found.error_code, found.level) == (gone[0].gpa, 0, gone[0].level)
        else:
            assert found == expected
    assert missing


# ---- in two dimensions ----


def two_dimensions(ept: bool) -> tuple[bytearray, PageTables, PageTables]:
    """A guest's tables at 0x1000 of the guest, which lies at 0x20_0000; the tables below it at 0x10_0000."""
    inner, outer = PageTables(0x1000), PageTables(0x10_0000)
    inner.map(0x40_0000, 0x9000, 0x1000, user=True)
    inner.map(0x80_0000, 0x20_0000, 0x20_0000)
    outer.map(0, 0x20_0000, 1 << 20, page_size=4096, user=True)
    memory = bytearray(4 << 20)
    memory[0x20_1000 : 0x20_1000 + inner.size] = inner.image()
    memory[0x10_0000 : 0x10_0000 + outer.size] = outer.image()
    if ept:  # the same as EPT: P RW US are R W X, and memory type 6 at the end
        for gpa in outer.pages():
            for at in range(gpa, gpa + 4096, 8):
                entry = int.from_bytes(memory[at : at + 8], "little")
                if entry:
                    memory[at : at + 8] = (entry | (6 << 3 if gpa == 0x10_3000 else 0)).to_bytes(8, "little")
    return memory, inner, outer


@pytest.mark.parametrize("ept", [True, False])
def test_every_entry_touched_in_two_dimensions(ept: bool) -> None:
    memory, inner, outer = two_dimensions(ept)
    nested = Walker.ept(memory, eptp=outer.cr3 | 3 << 3 | 6) if ept else Walker(memory, cr3=outer.cr3)
    walks = NestedWalker(nested, cr3=inner.cr3)
    walk = walks.walk(0x40_0123, U)
    assert (walk.gpa, walk.guest_gpa, walk.fault) == (0x20_9123, 0x9123, None)
    # Four tables of the guest, each after four entries that find it, and four more that find the page: 4 * 5 + 4.
    assert [entry.nested for entry in walk.entries] == ([True] * 4 + [False]) * 4 + [True] * 4
    assert [entry.level for entry in walk.entries] == [
        *(level for guest in (4, 3, 2, 1) for level in (4, 3, 2, 1, guest)),
        *(4, 3, 2, 1),
    ]
    own = [entry for entry in walk.entries if not entry.nested]
    assert [entry.gpa for entry in own] == [0x1000, 0x2000, 0x3010, 0x4000]
    for entry in walk.entries:
        at = entry.gpa if entry.nested else entry.gpa + 0x20_0000
        assert entry.value == int.from_bytes(memory[at : at + 8], "little")
    # Each table page, and the last one, by its entry in the last table.
    leaves = [entry.gpa for entry in walk.entries if entry.nested and entry.level == 1]
    assert leaves == [0x10_3000 + 8 * page for page in (1, 2, 3, 4, 9)]


def test_faults_in_two_dimensions() -> None:
    memory, inner, outer = two_dimensions(True)
    walks = NestedWalker(Walker.ept(memory, eptp=outer.cr3 | 3 << 3 | 6), cr3=inner.cr3)
    # The guest's own fault: nothing of the nested tables in it.
    walk = walks.walk(0x50_0000, U | W)
    assert (walk.gpa, walk.guest_gpa, walk.fault) == (None, None, Fault(6, 0x50_0000))
    assert len(walk.entries) == 5 * 4
    # The page's own address has nothing behind it: 0x20_0000 of the guest is not mapped.
    walk = walks.walk(0x80_0123)
    assert walk.guest_gpa == 0x20_0123
    assert walk.fault is not None
    assert (walk.fault.nested, walk.fault.address) == (True, 0x20_0000)
    assert walk.fault.error_code == PFERR_GUEST_FINAL_MASK | U
    # Read; nothing readable, writable or executable; the linear address is valid and this is its translation.
    assert walk.fault.exit_qualification == 1 | 1 << 7 | 1 << 8
    # A table of the guest that may not be written: KVM asks for it as for a write.
    memory[0x10_3010:0x10_3018] = (0x20_2000 | 6 << 3 | 5).to_bytes(8, "little")
    walk = walks.walk(0x40_0123)
    assert walk.fault is not None
    assert (walk.fault.address, walk.fault.error_code) == (0x2000, PFERR_GUEST_PAGE_MASK | 1 | W | U)
    assert walk.fault.exit_qualification == 3 | 5 << 3 | 1 << 7
    assert len(walk.entries) == 4 + 1 + 4
    # A misconfiguration has no qualification.
    memory[0x10_3010:0x10_3018] = (0x20_2000 | 6 << 3 | 2).to_bytes(8, "little")
    walk = walks.walk(0x40_0123)
    assert walk.fault is not None
    assert (walk.fault.error_code & 9, walk.fault.exit_qualification) == (9, None)


def test_pdptrs_in_two_dimensions() -> None:
    inner, outer = PageTables(0x1000, "pae"), PageTables(0x10_0000)
    inner.map(0x4040_0000, 0x9000, 0x1000)
    outer.map(0, 0, 1 << 20, page_size=4096, user=True)
    memory = [(inner.cr3, inner.image()), (outer.cr3, outer.image())]
    registers: dict[str, Any] = {**MODES["pae"], "cr3": inner.cr3}
    held = struct.unpack_from("<4Q", inner.image())
    read = NestedWalker(Walker(memory, cr3=outer.cr3), **registers).walk(0x4040_0123)
    walk = NestedWalker(Walker(memory, cr3=outer.cr3), pdptrs=held, **registers).walk(0x4040_0123)
    assert walk.gpa == read.gpa == 0x9123
    own = [entry for entry in walk.entries if not entry.nested]
    assert [entry.level for entry in own] == [3, 2, 1]
    assert own == [entry for entry in read.entries if not entry.nested]
    assert "".join("n" if entry.nested else "G" for entry in walk.entries) == "GnnnnGnnnnGnnnn"
    assert "".join("n" if entry.nested else "G" for entry in read.entries) == "nnnnGnnnnGnnnnGnnnn"


def test_one_entry_at_all_levels() -> None:
    # The root's entry leads to the root: four entries are one.  KVM's second cmpxchg fails, and it walks again.
    memory = image({0x1000: 0x1007}, 0x2000)
    assert Walker(memory, cr3=0x1000).walk(0, W, update=True).gpa == 0x1000
    assert memory == image({0x1000: 0x1067}, 0x2000)
    outer = PageTables(0x10_0000)
    outer.map(0, 0, 1 << 20, page_size=4096, user=True)
    memory = image({0x1000: 0x1007}, 0x2000)
    nested = Walker(GuestMemory([(0, memory), (outer.cr3, bytearray(outer.image()))]), cr3=outer.cr3)
    assert NestedWalker(nested, cr3=0x1000).walk(0, W, update=True).gpa == 0x1000
    assert memory == image({0x1000: 0x1067}, 0x2000)


def test_an_entry_that_changes_on_the_way_in_two_dimensions() -> None:
    held, inner, outer = two_dimensions(False)
    seen: list[int] = []

    def write(gpa: int, data: bytes) -> None:
        seen.append(gpa)
        held[gpa : gpa + 8] = data
        if gpa == 0x20_1000:  # the guest's root entry: somebody makes the page another one
            held[0x20_4000:0x20_4008] = (0xA007).to_bytes(8, "little")

    nested = Walker(GuestMemory([(0, held)], write=write), cr3=outer.cr3)
    walk = NestedWalker(nested, cr3=inner.cr3).walk(0x40_0123, W, update=True)
    assert walk.guest_gpa == 0xA123
    assert int.from_bytes(held[0x20_4000:0x20_4008], "little") == 0xA067
    assert seen.count(0x20_1000) == 1


def test_a_and_d_in_two_dimensions() -> None:
    memory, inner, outer = two_dimensions(True)
    before = bytes(memory)
    walks = NestedWalker(Walker.ept(memory, eptp=outer.cr3 | 3 << 3 | 6 | 1 << 6), cr3=inner.cr3)
    walk = walks.walk(0x40_0123, U | W)
    assert bytes(memory) == before
    own = [update for update in walk.updates if not update.nested]
    assert [(u.level, u.gpa, u.accessed, u.dirty) for u in own] == [
        (4, 0x1000, True, False),
        (3, 0x2000, True, False),
        (2, 0x3010, True, False),
        (1, 0x4000, True, True),
    ]
    assert walk.updates[-4:] == tuple(own)  # the guest's come last
    assert walks.walk(0x40_0123, U | W, update=True).gpa == 0x20_9123
    # Of EPT A is bit 8 and D bit 9; tables of the guest count as written.
    for page in (1, 2, 3, 4, 9):
        assert memory[0x10_3000 + 8 * page + 1] & 3 == 3
    assert memory[0x20_4000] & 0x60 == 0x60
    assert memory[0x20_1000] & 0x60 == 0x20
    assert walks.walk(0x40_0123, U | W).updates == ()
    without = NestedWalker(Walker.ept(bytearray(before), eptp=outer.cr3 | 3 << 3 | 6), cr3=inner.cr3)
    assert [update.nested for update in without.walk(0x40_0123).updates] == [False] * 4


# ---- EPT alone ----


def test_ept_entries_permit_what_they_say() -> None:
    memory = image({0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007, 0x4000: 0x9000 | 6 << 3})
    for rwx in range(8):
        memory[0x4000] = rwx
        for execonly in (True, False):
            walks = Walker.ept(memory, eptp=0x1000 | 3 << 3 | 6, execonly=execonly)
            wrong = rwx in (2, 6) or (rwx == 4 and not execonly)
            for access, right in ((U, 1), (W, 2), (F, 4)):
                walk = walks.walk(0x123, access)
                assert walk.ok == (bool(rwx & right) and not wrong)
                if wrong:
                    assert walk.fault == Fault(9 | access, 0x123)
                elif not walk.ok:
                    kind = {U: 1, W: 2, F: 4}[access]
                    qualification = kind | rwx << 3 | 1 << 7 | 1 << 8
                    assert walk.fault == Fault(bool(rwx) | access, 0x123, False, qualification)


# ---- as values ----


def test_walks_are_values() -> None:
    walks = Walker(four_levels(0x9005), cr3=0x1000)
    walk, again, fault = walks.walk(0x123), walks.walk(0x123), walks.walk(0x123, W)
    assert walk == again
    assert hash(walk) == hash(again)
    assert walk != fault
    assert walk != walks.walk(0x124)
    assert walk != "walk"
    for one in (walk, fault):
        assert pickle.loads(pickle.dumps(one)) == one == copy.deepcopy(one)
    assert repr(walk) == "<Walk 0x123 -> 0x9123, level 1, access 5>"
    assert repr(fault) == "<Walk 0x123 faults at level 1 with 0x3>"
    assert str(walk).splitlines()[4:6] == [
        "  level 1  0x000000004000  0x0000000000009005",
        "  sets A at 0x1000: 0x2007 -> 0x2027",
    ]
    lost = Walker(image({0x1000: 0x80_0007}), cr3=0x1000).walk(0)
    assert str(lost).splitlines()[-1] == "  level 3  0x000000800000  no memory there"
    with pytest.raises(AttributeError):
        walk.gpa = 5  # type: ignore[misc]  # is what is asked


# ---- bad input ----

BAD = {
    "PG without PE": ({"cr0": PG}, "cr0"),
    "LMA without PAE": ({"cr4": 0}, "cr4"),
    "LMA without LME": ({"efer": LMA}, "efer"),
    "LME and PG without LMA": ({"efer": LME}, "efer"),
    "LMA without PG": ({"cr0": PE}, "efer"),
    "a register too wide": ({"cr4": 1 << 64}, "cr4"),
    "CR3 above maxphyaddr": ({"cr3": 1 << 40, "maxphyaddr": 40}, "cr3"),
    "CR3 of 33 bits": ({"cr3": 1 << 32, "efer": 0, "cr4": 0}, "cr3"),
    "maxphyaddr": ({"maxphyaddr": 53}, "maxphyaddr"),
    "PKRU": ({"pkru": 1 << 32}, "pkru"),
    "PDPTRs of long mode": ({"pdptrs": (0, 0, 0, 0)}, "pdptrs"),
    "three PDPTRs": ({"pdptrs": (0, 0, 0), "efer": 0}, "pdptrs"),
    "a short image": ({"cr3": 0x5000}, "memory"),
}


@pytest.mark.parametrize(("arguments", "field"), BAD.values(), ids=BAD)
def test_registers_that_no_processor_has(arguments: dict[str, int], field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        Walker(bytes(0x5000), **arguments)  # type: ignore[arg-type]  # of BAD
    assert caught.value.field == field
    if field not in ("memory", "maxphyaddr", "pkru"):
        with pytest.raises(ArgumentError) as caught:
            NestedWalker(Walker(bytes(0x5000)), **arguments)  # type: ignore[arg-type]  # of BAD
        assert caught.value.field == field


@pytest.mark.parametrize("eptp", [0, 5 << 3 | 6, 2 << 3 | 6, 3 << 3 | 1, 3 << 3 | 6 | 1 << 8, 1 << 40, -1])
def test_eptps_that_are_none(eptp: int) -> None:
    with pytest.raises(ArgumentError) as caught:
        Walker.ept(bytes(0x1000), eptp=eptp, maxphyaddr=40)
    assert caught.value.field == "eptp"


@pytest.mark.parametrize(
    ("arguments", "bits"),
    [
        ({}, 64),
        ({"cr4": PAE | LA57}, 64),
        ({"cr0": PG | PE, "cr4": PAE, "efer": 0}, 32),
        ({"cr0": PG | PE, "cr4": 0, "efer": 0}, 32),
        ({"cr0": PE, "efer": 0}, 64),  # of real mode's addresses KVM asks nothing
    ],
)
def test_addresses_and_accesses_that_are_none(arguments: dict[str, int], bits: int) -> None:
    walks = Walker(bytes(0x1000), **arguments)  # type: ignore[arg-type]  # of the list above
    nested = NestedWalker(Walker(bytes(0x1000)), **arguments)  # type: ignore[arg-type]  # of the list above
    assert walks.mmu.linear_bits == bits
    last = (1 << bits) - 1
    for _ in range(2):
        for walk in (walks.walk, nested.walk, Walker.walk.__get__(walks)):
            walk(last)
            for gva in (-1, last + 1, -(1 << 70)):
                with pytest.raises(ArgumentError):
                    walk(gva)
            for wrong in (1.5, "0", None, b"", True, np.int64(5), np.uint64(5)):
                with pytest.raises(ArgumentTypeError):
                    walk(wrong)  # type: ignore[arg-type]  # is what is asked
            for access in (8, 0x20, 1 << 60, -1):
                with pytest.raises(ArgumentError):
                    walk(0, access)
            walk(0, W)
            for kind in ("w", "", None, 2.0, 0.0, False, True):  # some of them equal to one that is known
                with pytest.raises(ArgumentTypeError):
                    walk(0, kind)  # type: ignore[arg-type]  # is what is asked
        with pytest.raises(ArgumentError):
            walks.function(8)
        with pytest.raises(ArgumentError):
            walks.function(0)(-1)


@pytest.mark.parametrize(("kind", "level"), [("paging64", 2), ("paging64", 6), ("paging32", 3), ("ept", 3), ("npt", 4)])
def test_levels_that_are_none(kind: str, level: int) -> None:
    mmu = GuestMmu(kind=kind, level=level, root=0, rsvd=GuestMmu.of().rsvd, permissions=bytes(16))
    with pytest.raises(ArgumentError) as caught:
        Walker.of(bytes(0x1000), mmu)
    assert caught.value.field == "mmu"


def test_pdptrs_of_another_type() -> None:
    for pdptrs in (5, "1234", ("1", 2, 3, 4)):
        with pytest.raises(ArgumentTypeError):
            Walker(bytes(0x1000), pdptrs=pdptrs, **MODES["pae"])  # type: ignore[arg-type]  # is what is asked


def test_a_closed_walker_holds_nothing() -> None:
    tables = four_levels(0x9007)
    walks = Walker(tables, cr3=0x1000)
    assert walks.walk(0x123).ok
    function = walks.function(W)
    function(0x123)
    with pytest.raises(BufferError):
        tables.clear()  # a view is out
    walks.close()
    walks.close()
    tables.clear()
    assert walks.memory.closed
    for call in (lambda: walks.walk(0x123), lambda: walks.walk(0x123, W), lambda: walks.function(U)):
        with pytest.raises(ClosedError):
            call()
    with pytest.raises(ClosedError):
        function(0x123)
    with pytest.raises(ClosedError):
        walks.memory.entry(0)
    assert repr(walks.memory) == "<GuestMemory closed>"


def test_a_walker_that_nobody_has_holds_nothing() -> None:
    tables = four_levels(0x9007)
    walks = Walker(tables, cr3=0x1000)
    walk = walks.walk(0x123)
    walks.walk(0x123, W)
    del walks
    tables.clear()  # without a collection of cycles
    assert walk.gpa == 0x9123


def test_entries_and_what_a_walk_is_made_by() -> None:
    mmu = GuestMmu.of(cr3=0x1000)
    walks = Walker.of(four_levels(0x9007), mmu)
    assert walks.mmu is mmu
    assert walks.walk(0).entries[0] == Entry(4, 0x1000, 0x2007)
    assert repr(walks) == "<Walker paging64, 4 levels, root 0x1000>"
    assert "paging64" in repr(NestedWalker(walks))


def test_every_register_takes_its_last_value() -> None:
    # The widest of each register, and one more: CR3 is as wide as maxphyaddr (bits 63:61 are no address), PKRU has 32
    # bits, CR3 below long mode 32.  A walk reads nothing there, for no memory is so high.
    low = GuestMemory([(0, bytes(0x1000))])
    legacy = {"cr0": PG | PE, "cr4": PAE, "efer": 0}
    for width in (32, 52):
        last = (1 << width) - 1
        for cr3 in (last, 7 << 61 | last):
            assert Walker(low, cr3=cr3, maxphyaddr=width).mmu.root == last & ~0xFFF
        with pytest.raises(ArgumentError):
            Walker(low, cr3=last + 1, maxphyaddr=width)
        with pytest.raises(ArgumentError):
            Walker(low, maxphyaddr={32: 31, 52: 53}[width])
        # An EPTP of all address bits, 5 levels, A and D, WB: what is left of its low 12 bits are 0x66.
        assert Walker.ept(low, eptp=last & ~0xFFF | 0x66, maxphyaddr=width).mmu.root == last & ~0xFFF
        for eptp, maxphyaddr in ((last + 1 | 0x66, width), (0x66, {32: 31, 52: 53}[width])):
            with pytest.raises(ArgumentError):
                Walker.ept(low, eptp=eptp, maxphyaddr=maxphyaddr)
    assert Walker(low, pkru=(1 << 32) - 1).mmu.pkru == (1 << 32) - 1
    assert Walker(low, cr3=(1 << 32) - 1, **legacy).mmu.root == 0xFFFF_FFE0  # type: ignore[arg-type]
    assert Walker(low, cr3=(1 << 32) - 1, cr0=PG | PE, cr4=0, efer=0).mmu.root == 0xFFFF_F000
    held = Walker(low, pdptrs=(0, 0, 0, (1 << 64) - 1), **legacy)  # type: ignore[arg-type]
    assert held.mmu.pdptrs == (0, 0, 0, (1 << 64) - 1)


@pytest.mark.parametrize("bit", range(12))
def test_the_low_bits_of_an_eptp(bit: int) -> None:
    # 27.6.11: 2:0 is 0 or 6, 5:3 is 3 or 4, 6 is A and D, 7 shadow stacks; 11:8 are reserved.
    eptp = 0x1000 | 3 << 3 | 6
    other = eptp ^ 1 << bit
    if bit in (6, 7):
        assert Walker.ept(bytes(0x2000), eptp=other).mmu.have_ad == (bit == 6)
    else:
        with pytest.raises(ArgumentError, match="eptp="):
            Walker.ept(bytes(0x2000), eptp=other)
    assert not Walker.ept(bytes(0x2000), eptp=eptp).mmu.have_ad


@pytest.mark.parametrize(
    ("registers", "size"),
    [
        ({}, 4096),
        ({"cr4": PAE | LA57}, 4096),
        ({"cr0": PG | PE, "cr4": 0, "efer": 0}, 4096),
        ({"cr0": PG | PE, "cr4": PAE, "efer": 0}, 32),  # four PDPTEs of 8 bytes
    ],
)
def test_an_image_that_just_holds_the_root(registers: dict[str, int], size: int) -> None:
    assert Walker(bytes(0x1000 + size), cr3=0x1000, **registers).walk(0).error_code == 0  # type: ignore[arg-type]
    above = [(0x1000, bytes(size))]
    assert Walker(above, cr3=0x1000, **registers).walk(0).error_code == 0  # type: ignore[arg-type]
    for held, cr3 in ((bytes(0x1000 + size - 1), 0x1000), (above, 0), (above, 0x2000)):
        with pytest.raises(ArgumentError, match="Walker: memory"):
            Walker(held, cr3=cr3, **registers)  # type: ignore[arg-type]
