"""The shadow-MMU simulator against recorded programs of a kernel, and by hand where no host at hand can show it.

shadow_programs.json.gz is what Linux 6.18 with kvm_pvm did (record_shadow.py): tables, steps, and its trace.  What its
KVM cannot show (no paging, 2 levels, PAE, MMIO caching, the mitigation of large pages, WP clear at CPL 0) is held
against numbers worked out from the kernel's rules, beside them in the tests.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError
from hvmodel.mmu import HostMemory, ShadowMmu, SimAccess, SimSlot, reset_all_pte_masks
from hvmodel.mmu.masks import ShadowMasks
from hvmodel.witness.check_simulator import _Names, _ours
from hvmodel.witness.shadow_program import SLOTS, GuestCopy, HostFrames, Player, Registers, Step
from tests.mmu.shadow_ram import ALL, MASKS, NX, PS, A, P, Ram, U, W, check_books, large_ram, low, named

FRAMES = 1 << 30
DRIVER = 0xFFFFFF80_0020B000  # the lab's code for CPL 3, 16 bytes for each kind of access
KINDS = ("load", "store", "fetch", "invlpg", "cr3", "load8", "store8", "xchg")


# ---- recorded programs ----


@cache
def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        gzip.decompress(Path(__file__).with_name("shadow_programs.json.gz").read_bytes())
    )
    return found


@cache
def filled(gpa: int, size: int) -> bytes:
    return b"".join((gpa + at).to_bytes(8, "little") + b"\xee" * 4088 for at in range(0, size, 4096))


def player_of(program: dict[str, Any]) -> Player:
    facts = dict(recorded()["facts"])
    masks = ShadowMasks(**{**facts.pop("masks"), "warnings": ()})
    pieces = [(0, bytearray(2 << 20))]
    pieces += [(gpa, bytearray(filled(gpa, size) if there else size)) for gpa, size, _, _, there in SLOTS]
    memory = GuestCopy(pieces)
    for start in (SLOTS[0][0], *(SLOTS[slot][0] + 200 * 4096 for slot in (1, 2))):
        memory.put(start, bytes(96 * 4096 if start == SLOTS[0][0] else 2 * 4096))
    for gpa, word in program["memory"]:
        memory.put(gpa, word.to_bytes(8, "little"))
    host = HostFrames()
    spans = [(0, 512), *((gpa >> 12, gpa + size >> 12) for gpa, size, *_ in SLOTS)]
    for first, last in spans:
        host.frames |= {gfn: FRAMES + gfn for gfn in range(first, last)}
    for first, last in program["absent"]:
        for gfn in range(first, last):
            del host.frames[gfn]
    host.huge_ranges |= set(program["huge"])
    slots = [SimSlot(0, 512, 0, program["hvas"][0])]
    for (gpa, size, flags, *_), hva in zip(SLOTS, program["hvas"][1:], strict=True):
        slots.append(SimSlot(gpa >> 12, size >> 12, flags, hva))
    cr3, cr0, cr4, efer = program["registers"]
    mmu = ShadowMmu(masks, list(pieces), slots, host=host, cr0=cr0, cr3=cr3, cr4=cr4, efer=efer, **facts)
    return Player(mmu, memory, host, {kind: DRIVER + 16 * at for at, kind in enumerate(KINDS)})


def check(program: dict[str, Any]) -> None:
    player, names, results = player_of(program), _Names(), iter(program["results"])
    early: list[Any] = []
    for at, fields in enumerate(program["steps"]):
        registers = fields.get("registers")
        step = Step(**{**fields, "registers": Registers(*registers) if registers else None})
        found = player.take(step)
        if found is None:
            continue
        result, events = found
        ours = [our for event in events if (our := _ours(event)) is not None]
        fault, mmio, traced = next(results)
        theirs = [*early, *map(tuple, traced)]
        where = f"program {program['seed']}, step {at} ({step})"
        early = []
        if step.what == "cr3" and len(theirs) > len(ours):  # the host interrupted kvm_pvm's batch
            early = theirs[len(ours) :]
            assert {event[0] for event in early} == {"sync_page"}, where
            del theirs[len(ours) :]
        for our, their in zip(ours, theirs, strict=False):
            assert names.same(our, their), f"{where}: {our} {their}"
        assert len(ours) == len(theirs), f"{where}: {ours[len(theirs) :]} {theirs[len(ours) :]}"
        assert (result.fault, result.mmio) == (fault, mmio), where
        if at % 8 == 0:
            check_books(player.mmu)
    assert [sorted(log) for log in player.logs] == program["logs"]


@pytest.mark.parametrize("at", range(len(recorded()["programs"])))
def test_recorded_program(at: int) -> None:
    check(recorded()["programs"][at])


def test_the_records_show_everything() -> None:
    names = {event[0] for p in recorded()["programs"] for _, _, events in p["results"] for event in events}
    assert names == {"get_page", "set_spte", "spte_requested", "prepare_zap_page", "unsync_page", "sync_page"}
    assert sum(len(events) for p in recorded()["programs"] for _, _, events in p["results"]) > 2000
    levels = {
        event[2]
        for p in recorded()["programs"]
        for *_, events in p["results"]
        for event in events
        if event[0] == "set_spte"
    }
    assert levels == {1, 2}


def test_what_is_there_unless_it_is_said() -> None:
    mmu = Ram().mmu(cr3=0)
    assert (mmu.cr0, mmu.cr3, mmu.cr4, mmu.efer) == (0x80010033, 0, 0x20, 0xD00)
    assert mmu.root_role.word == 0x3704  # 4 levels, all access, NX, WP
    assert mmu.max_pages == 64  # KVM_MIN_ALLOC_MMU_PAGES; 1 MiB would be 5
    assert ShadowMmu(MASKS, bytearray(4096), [SimSlot(0, 5000)]).max_pages == 100  # a 50th


def test_a_wrong_record_is_seen() -> None:
    program = json.loads(json.dumps(recorded()["programs"][0]))
    event = next(event for *_, events in program["results"] for event in events if event[0] == "set_spte")
    event[3] ^= W
    with pytest.raises(AssertionError):
        check(program)


# ---- by hand ----


def test_the_prefetch_window_is_8() -> None:
    # Entries 0 to 15 present, accessed, dirty; an access to number 10 takes 8 to 15 with it, with A in its own only.
    ram = Ram(*[0x10000 + 0x1000 * i | ALL for i in range(16)])
    mmu = ram.mmu()
    mmu.access(10 << 12)
    found = low(mmu)
    assert found[0] == (0x1A, 0xE67)
    assert found[1:] == [(0x10 + i, 0xE47) for i in (8, 9, 11, 12, 13, 14, 15)]


def test_prefetch_stops_at_the_first_entry_that_nobody_accessed() -> None:
    leaves = [0x10000 + 0x1000 * i | (ALL if i != 2 else ALL & ~A) for i in range(8)]
    mmu = Ram(*leaves).mmu()
    mmu.access(4 << 12)
    assert [gfn for gfn, _ in low(mmu)] == [0x14, 0x10, 0x11]


def test_bit_7_of_a_small_page_is_no_size() -> None:
    # It is PAT there: a neighbour with an address that no large page could have is prefetched.
    mmu = Ram(0x10000 | ALL, 0x13000 | ALL | PS).mmu()
    mmu.access(0)
    assert [gfn for gfn, _ in low(mmu)] == [0x10, 0x13]


def test_a_read_of_a_clean_page_is_read_only_until_a_write_sets_d() -> None:
    ram = Ram(0x10000 | P | W | U)
    mmu = ram.mmu()
    assert mmu.access(0).fault is None
    assert low(mmu) == [(0x10, 0xA25)]
    assert ram.get(0x4000) == 0x10000 | P | W | U | A
    mmu.access(0, "store", b"\1" * 8)
    assert low(mmu) == [(0x10, 0xE67)]
    assert ram.get(0x4000) == 0x10000 | ALL
    assert ram.get(0x10000) == 0x0101010101010101


def test_faults_are_the_guests() -> None:
    mmu = Ram(0x10000 | P | U | A, 0x11000 | P | W | A, 0x12000 | ALL | NX, 0x13000 | ALL | 1 << 51).mmu()
    assert mmu.access(0x0, "store").fault == 7
    assert mmu.access(0x1000).fault == 5
    assert mmu.access(0x2000, "fetch", b"\0").fault == 0x15
    assert mmu.access(0x3000).fault == 0xD
    assert mmu.access(0x4000).fault == 4
    assert mmu.access(0x1234_5000).fault == 4
    assert mmu.access(0x1234_5000, user=False).fault == 0
    assert mmu.access(0x1234_5000, "fetch", b"\0", user=False).fault == 0x10
    assert mmu.access(0x1000, "store", user=False).fault is None


def test_a_write_to_a_table_of_level_1_makes_it_unsync_until_it_is_invalidated() -> None:
    ram = Ram(0x10000 | ALL, 0x4000 | ALL)  # page 1 is the table itself
    mmu = ram.mmu()
    mmu.access(0)
    mmu.access(0x1000, "store", (0x11000 | ALL).to_bytes(8, "little"))
    events = mmu.take_events()
    assert [e.gfn for e in named(events, "unsync_page")] == [4]
    assert mmu.access(0, "load", bytes(1)).data is not None
    assert mmu.translation(0) == 0x10000  # stale
    mmu.invlpg(0)
    assert mmu.translation(0) is None
    mmu.access(0)
    assert mmu.translation(0) == 0x11000
    mmu.mov_cr3(0x1000)
    assert [e.gfn for e in named(mmu.take_events(), "sync_page")] == [4]


def test_a_fault_for_rights_brings_its_entry_up_to_date() -> None:
    # Page 1 is the table.  The entry of page 0 is read-only, or gone, and KVM has not seen it yet.
    for new, code, stays in ((0x10000 | P | U | A, 7, False), (0, 6, True), (0x10000 | ALL | 1 << 51, 0xF, True)):
        ram = Ram(0x12000 | P | U | A, 0x4000 | ALL)
        mmu = ram.mmu()
        mmu.access(0)
        mmu.access(0x1000, "store", new.to_bytes(8, "little"))
        assert mmu.translation(0) == 0x12000
        assert mmu.access(0, "store").fault == code
        assert (mmu.translation(0) is not None) is stays


def test_a_large_page_of_guest_and_host_is_one_entry() -> None:
    mmu = large_ram(HostMemory(huge=[0x400]))
    mmu.access(0x123456)
    assert [(e.gfn, e.level, e.spte & 0xFFF) for e in named(mmu.take_events(), "set_spte")] == [(0x400, 2, 0xEE7)]
    assert mmu.translation(0x123456) == 0x523456


def test_pages_of_1_gib() -> None:
    # The first GiB is one page of guest and host; the tables lie behind it.
    class Host(HostMemory):
        def mapping_level(self, gfn: int) -> int:
            return 3

    tables, first = bytearray(0x3000), bytearray(0x6000)
    tables[0x1000:0x1008] = (0x40002000 | ALL).to_bytes(8, "little")
    tables[0x2000:0x2008] = (ALL | PS).to_bytes(8, "little")
    mmu = ShadowMmu(
        MASKS,
        [(0, first), (1 << 30, tables)],
        [SimSlot(0, 0x40000), SimSlot(0x40000, 3)],
        host=Host(),
        cr3=0x40001000,
        gbpages=True,
    )
    mmu.access(0x5000)
    assert [(e.gfn, e.level, e.spte & 0xFFF) for e in named(mmu.take_events(), "set_spte")] == [(0, 3, 0xEE7)]
    assert mmu.translation(0x3FFFF123) == 0x3FFFF123
    mmu.unmap_gfn_range(0x3FFFF, 0x40000)
    assert mmu.translation(0x5000) is None
    check_books(mmu)


def test_dirty_logging_splits_it() -> None:
    mmu = large_ram(HostMemory(huge=[0x400]))
    mmu.access(0)
    mmu.take_events()
    mmu.set_log_dirty(0, True)
    assert mmu.translation(0) == 0x400000
    mmu.access(0x5000, "store")
    events = mmu.take_events()
    # a direct page of the 2 MiB, one leaf; its neighbours could be written, and would not be logged
    assert [(e.gfn, e.role & 0x78F) for e in named(events, "get_page")] == [(0x400, 0x781)]
    assert [(e.gfn, e.level) for e in named(events, "set_spte")] == [(0x405, 1)]
    assert mmu.get_dirty_log(0) == {0x405}
    assert mmu.access(0x5000, "store").fault is None
    assert mmu.get_dirty_log(0) == {0x405}
    assert mmu.get_dirty_log(0) == set()
    mmu.set_log_dirty(0, False)  # what could be large goes, and becomes large
    assert mmu.translation(0x5000) is None
    mmu.take_events()
    mmu.access(0x5000)
    assert [(e.gfn, e.level) for e in named(mmu.take_events(), "set_spte")] == [(0x400, 2)]


def test_the_mitigation_makes_large_pages_not_executable() -> None:
    mmu = large_ram(HostMemory(huge=[0x400]), nx_huge_pages=True)
    mmu.access(0)
    assert [(e.level, e.spte >> 63, e.spte & 0xFFF) for e in named(mmu.take_events(), "set_spte")] == [(2, 1, 0xEE7)]
    mmu.access(0x7000, "fetch", b"\0")
    events = mmu.take_events()
    assert next((e.gfn, e.level, e.spte >> 63) for e in named(events, "set_spte")) == (0x407, 1, 0)
    # from now on a small page stands there, and a load makes no large one of it
    mmu.access(0x9000)
    events = named(mmu.take_events(), "set_spte")
    assert {e.level for e in events} == {1}
    # in the frame of its own, 9 pages into the huge one (HostMemory: frame 0x100000 + gfn)
    assert {e.gfn: e.spte >> 12 & 0xFFFFFFFFFF for e in events}[0x409] == 0x100409


def test_host_pages_that_may_not_be_written() -> None:
    mmu = Ram(0x10000 | ALL, 0x11000 | ALL).mmu(host=HostMemory(readonly=[0x10]))
    mmu.access(0)
    # no HOST_WRITABLE, no W; and its neighbour is prefetched
    assert low(mmu) == [(0x10, 0x825), (0x11, 0xE47)]
    with pytest.raises(ArgumentError, match="EFAULT"):
        mmu.access(0, "store")


def test_memory_that_is_not_there() -> None:
    mmu = Ram(0x10000 | ALL, 0x300000 | ALL, 0x11000 | ALL).mmu(
        slots=[SimSlot(0, 0x11), SimSlot(0x11, 1, 2), SimSlot(0x12, 0x10)]
    )
    assert mmu.access(0x1008) == SimAccess(mmio=0x300008)
    assert mmu.access(0x2008, "store") == SimAccess(mmio=0x11008)  # a read-only slot
    assert mmu.access(0x2008).data == bytes(8)
    assert low(mmu) == [(0x11, 0x825), (0x10, 0xE47)]


def test_mmio_caching_leaves_an_entry_with_the_slots_generation() -> None:
    # mmio_value: bit 51 and P; access W, U; the slots' generation after one change, 1, in bits 10:3
    ram = Ram(0x300000 | ALL)
    mmu = ram.mmu(reset_all_pte_masks(46))
    assert mmu.access(0x8) == SimAccess(mmio=0x300008)
    [event] = named(mmu.take_events(), "mark_mmio_spte")
    assert (event.gfn, event.spte) == (0x300, 1 << 51 | 1 | W | U | 0x300000 | 1 << 3)
    assert mmu.access(0x10) == SimAccess(mmio=0x300010)
    assert not mmu.take_events()
    mmu.add_slot(SimSlot(0x300, 1))  # another generation: looked at anew
    with pytest.raises(AssertionError):  # the slot has no bytes here, but the model went for them
        mmu.access(0x10)
    assert [e.gfn for e in named(mmu.take_events(), "set_spte")] == [0x300]


def test_fast_page_fault_gives_writing_back() -> None:
    mmu = Ram().mmu(cr0=0x11, cr3=0, cr4=0, efer=0)
    mmu.access(0x5000, "store")
    mmu.set_log_dirty(0, True)
    mmu.take_events()
    mmu.access(0x5000, "store")
    [event] = mmu.take_events()
    assert (event.name, event.gfn, event.spte & 0xFFF) == ("fast_page_fault", 5, 0xE67)
    assert mmu.get_dirty_log(0) == {5}


def test_supervisor_writes_to_read_only_pages_where_wp_is_clear() -> None:
    # The entry becomes writable, and the supervisor's alone; with SMEP not executable either.
    for cr4, nx in ((0x20, 0), (0x100020, 1)):
        mmu = Ram(0x10000 | P | U | A).mmu(cr0=0x80000011, cr4=cr4)
        assert mmu.access(0, "store", user=False).fault is None
        [(gfn, spte)] = low(mmu)
        assert (gfn, spte & 0xFFF, spte >> 63) == (0x10, 0xE63, nx)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: Ram().mmu(reset_all_pte_masks(46).set_ept_masks(True, True)), ArgumentError),
        (lambda: Ram().mmu(slots=[SimSlot(0, 4), SimSlot(3, 4)]), ArgumentError),
        (lambda: SimSlot(0, 0), ArgumentError),
        (lambda: SimSlot(-1, 1), ArgumentError),
        (lambda: SimSlot(0, 1, 4), ArgumentError),
        (lambda: SimSlot("0", 1), ArgumentTypeError),
        (lambda: Ram().mmu().access(0, "jump"), ArgumentError),
        (lambda: Ram().mmu().access(-1), ArgumentError),
        (lambda: Ram().mmu().access(0xFFC, "load", bytes(8)), ArgumentError),
        (lambda: Ram().mmu().access(0, "load", b""), ArgumentError),
        (lambda: Ram().mmu(cr0=0x80000000), ArgumentError),
        (lambda: Ram().mmu(maxphyaddr=53), ArgumentError),
        (lambda: Ram().mmu(max_huge_page_level=4), ArgumentError),
        (lambda: Ram().mmu().set_log_dirty(5, True), ArgumentError),
        (lambda: Ram().mmu().get_dirty_log(5), ArgumentError),
        (lambda: Ram().mmu().delete_slot(5), ArgumentError),
        (lambda: Ram().mmu().mov_cr3(-1), ArgumentError),
        (lambda: Ram().mmu().set_sregs(efer=0x400), ArgumentError),
    ],
)
def test_bad_input(call: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        call()


def test_mmio_entries_are_synchronised_too() -> None:
    ram = Ram(0x300000 | ALL, 0x301000 | ALL, 0x4000 | ALL)
    mmu = ram.mmu(reset_all_pte_masks(46))
    for gva in (0, 0x1000):
        mmu.access(gva)
    # one leads to another frame, one may not be written any more
    mmu.access(0x2000, "store", (0x302000 | ALL).to_bytes(8, "little"))
    mmu.access(0x2008, "store", (0x301000 | P | U | A).to_bytes(8, "little"))
    mmu.take_events()
    mmu.mov_cr3(0x1000)
    [event] = named(mmu.take_events(), "mark_mmio_spte")
    assert (event.gfn, event.spte & 0x7) == (0x301, P | U)
    assert mmu.access(0x8) == SimAccess(mmio=0x302008)
    assert [e.gfn for e in named(mmu.take_events(), "mark_mmio_spte")] == [0x302]


def test_addresses_of_entries() -> None:
    mmu = Ram(0x10000 | ALL, 0x11000 | ALL).mmu(spt_pa=iter(range(0x1000, 0x10000, 0x1000)).__next__)
    mmu.access(0x1000)
    assert [(e.gfn, e.sptep) for e in named(mmu.take_events(), "set_spte")] == [(0x11, 0x4008), (0x10, 0x4000)]
    assert mmu.sptes() == {(0x4008, 1): FRAME << 12 | 0x11E67, (0x4000, 1): FRAME << 12 | 0x10E47}


def test_the_newest_page_of_a_table_comes_first() -> None:
    # The PD leads to the table twice, once read-only: two shadow pages, and a write to the table makes both unsync.
    ram = Ram(0x10000 | ALL, 0x4000 | ALL)
    ram.put(0x3008, 0x4000 | P | U | A)
    mmu = ram.mmu()
    mmu.access(0)
    mmu.access(0x200000)
    mmu.take_events()
    mmu.access(0x1000, "store")
    assert [e.role >> 8 & 7 for e in named(mmu.take_events(), "unsync_page")] == [5, 7]
    check_books(mmu)


FRAME = 0x100000
