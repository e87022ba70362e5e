"""MmuLab: what the guest does is what was asked for, and each record is given to the access that it is of.

Error codes of page faults are those of the Intel SDM, volume 3, figure 5-12: P 1, W 2, U 4, RSVD 8, I 0x10.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from hvmodel._ffi import ffi
from hvmodel.arch.paging import PageTables
from hvmodel.errors import ArgumentError, BusyError, UnsupportedError
from hvmodel.kvm import Hlt, InternalError, IoOut
from hvmodel.units import MiB
from hvmodel.witness import Access, LabSlot, MmuLab, Poke, TraceLost
from hvmodel.witness import lab as module
from hvmodel.witness.kvm_trace import GetPage, SetSpte, UserspaceExit, ZapAllFast
from hvmodel.witness.lab import DRIVER
from tests.cases import cases
from tests.need import need

RAM, ROM, LOG = 16 * MiB, 32 * MiB, 40 * MiB
SLOTS = (LabSlot(RAM, 4 * MiB), LabSlot(ROM, MiB, flags=2), LabSlot(LOG, MiB, flags=1))
HOLE = 0xD0000000
P, RW, US, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
WP, SMEP, SMAP = 1 << 16, 1 << 20, 1 << 21


@pytest.fixture
def lab() -> Iterator[MmuLab]:
    need("kvm", "tracefs", "root")
    with MmuLab(SLOTS) as made:
        yield made


@pytest.fixture
def untraced() -> Iterator[MmuLab]:
    need("kvm")
    with MmuLab(SLOTS, trace=False) as made:
        yield made


def walks_here(lab: MmuLab) -> None:
    """Skip where KVM does not walk: EPT and NPT."""
    lab.map(0x7000_0000, RAM)
    if not lab.run([Access(0x7000_0000)])[0].own:
        pytest.skip("needs a KVM that walks guest page tables for CPL 3")


# ---- what the guest does ----


@pytest.mark.parametrize("user", [True, False])
def test_a_load_reads_and_a_store_writes(untraced: MmuLab, user: bool) -> None:
    lab = untraced
    lab.map(0x40_0000, RAM + 0x3000, P | RW | US)
    load, store, byte, fetch = lab.run(
        [
            Access(0x40_0000, user=user),
            Access(0x40_0010, "store", user=user, value=0x1122334455667788),
            Access(0x40_0011, "load8", user=user),
            Access(0x40_0123, "fetch", user=user, value=5),
        ]
    )
    assert load.value == RAM + 0x3000  # each page begins with its own address
    assert lab.read_entry(RAM + 0x3010) == store.value == 0x1122334455667788
    assert byte.value is not None
    assert byte.value & 0xFF == 0x77
    assert fetch.value == 5
    assert {(one.fault, one.mmio, one.stop, one.records) for one in (load, store, byte, fetch)} == {
        (None, (), None, ())
    }


def test_an_exchange_reads_and_writes(untraced: MmuLab) -> None:
    untraced.map(0x40_0000, RAM)
    (seen,) = untraced.run([Access(0x40_0000, "xchg", value=7)])
    assert (seen.value, untraced.read_entry(RAM)) == (RAM, 7)


@pytest.mark.parametrize(
    ("flags", "kind", "user", "code"),
    [
        (0, "load", True, 4),
        (0, "store", True, 6),
        (0, "fetch", True, 0x14),
        (0, "load", False, 0),
        (0, "store", False, 2),
        (P | US, "store", True, 7),
        (P | US, "store", False, 3),
        (P | RW, "load", True, 5),
        (P | RW, "store", True, 7),
        (P | US | NX, "fetch", True, 0x15),
        (P | NX, "fetch", False, 0x11),
        (P | US | 1 << 51, "load", True, 0xD),
        (P | US | 1 << 51, "store", False, 0xB),
    ],
)
def test_a_fault_is_delivered(untraced: MmuLab, flags: int, kind: str, user: bool, code: int) -> None:
    untraced.map(0x40_0000, RAM, flags)
    (seen,) = untraced.run([Access(0x40_0040, kind, user=user)])
    fault = seen.fault
    assert fault is not None
    assert (fault.vector, fault.error_code, fault.cr2) == (14, code, 0x40_0040)
    assert (seen.value, seen.stop) == (None, None)
    if kind == "fetch":
        assert fault.rip == 0x40_0040
    else:
        assert DRIVER <= fault.rip < DRIVER + 4 * MiB


def test_control_registers_count(untraced: MmuLab) -> None:
    lab = untraced
    lab.map(0x40_0000, RAM, P | US)
    store = Access(0x40_0008, "store", user=False)
    assert [seen.fault and seen.fault.error_code for seen in lab.run([store])] == [3]
    lab.cr0 &= ~WP
    assert lab.run([store])[0].fault is None
    lab.cr4 |= SMAP | SMEP
    seen = lab.run(
        [Access(0x40_0000, user=False), Access(0x40_0000, user=False, ac=True), Access(0x40_0800, "fetch", False)]
    )
    assert [one.fault and one.fault.error_code for one in seen] == [1, None, 0x11]


def test_no_memory_is_an_exit_that_is_answered(untraced: MmuLab) -> None:
    lab = untraced
    lab.map(0x40_0000, HOLE)
    lab.map(0x40_1000, ROM)
    for user in (True, False):
        load, store, rom, rom_store = lab.run(
            [
                Access(0x40_0008, user=user),
                Access(0x40_0010, "store", user=user),
                Access(0x40_1000, user=user),
                Access(0x40_1008, "store", user=user),
            ]
        )
        assert (load.mmio, load.value) == (((HOLE + 8, 8, False),), (1 << 64) - 1)
        assert (store.mmio, store.fault) == (((HOLE + 16, 8, True),), None)
        assert (rom.mmio, rom.value) == ((), ROM)
        assert rom_store.mmio == ((ROM + 8, 8, True),)
        assert lab.read_entry(ROM + 8) == 0xEEEEEEEEEEEEEEEE


def test_it_goes_on_after_an_exit_that_is_none_of_its_own(untraced: MmuLab) -> None:
    lab = untraced
    lab.map(0x40_0000, HOLE)
    lab.map(0x40_1000, RAM)
    seen = lab.run(
        [Access(0x40_0800, "fetch"), Access(0x40_1000), Access(0x40_0800, "fetch", False), Access(0x40_1000)]
    )
    assert [type(one.stop) for one in seen] == [InternalError, type(None), InternalError, type(None)]
    assert [one.value for one in seen] == [None, RAM, None, RAM]


def test_pokes_come_in_order(untraced: MmuLab) -> None:
    untraced.map(0x40_0000, RAM)
    program: list[Access | Poke] = [
        Access(0x40_0000),
        Poke(RAM, bytes(8)),
        Access(0x40_0000),
        Poke(RAM, b"\1" * 8),
        Access(0x40_0000),
    ]
    assert [seen.value for seen in untraced.run(program)] == [RAM, 0, 0x0101010101010101]


def test_cr3_is_loaded_by_the_guest(untraced: MmuLab) -> None:
    lab = untraced
    other = RAM + 0x10000
    lab.map(0x40_0000, RAM)
    lab.write(other, bytes(4096))
    lab.link(other)
    load = Access(0x40_0000)
    seen = lab.run([load, Access(other, "cr3", user=False), load, Access(0x40_0000, "invlpg", user=False)])
    assert [one.fault and one.fault.error_code for one in seen] == [None, None, 4, None]
    assert lab.cr3 == other


def test_translations_are_those_of_the_tables() -> None:
    # The builder of page tables looks its own pages up.
    need("kvm")
    rng = random.Random(1)
    with MmuLab(SLOTS, trace=False) as lab:
        tables = PageTables(RAM)
        for _ in range(40):
            page = 1 << rng.choice((12, 21))
            gva = rng.getrandbits(47) & -page
            gpa = rng.getrandbits(40) & -page
            tables.map(gva, gpa, page)
        lab.write(RAM, tables.image())
        lab.cr3 = RAM
        mapped = [leaf.gva + rng.randrange(leaf.size) for leaf in tables.leaves()]
        gvas = mapped + [rng.getrandbits(47) for _ in range(cases(200, 5000))]
        assert lab.translate(gvas) == [tables.translate(gva) for gva in gvas]


def test_a_state_of_ones_own(untraced: MmuLab) -> None:
    # Real mode: OUT DX, AL; then HLT.
    lab = untraced
    sregs = ffi.new("struct kvm_sregs *", lab._template[0])
    sregs.cs.base = sregs.cs.selector = 0
    regs = ffi.new("struct kvm_regs *", {"rip": lab.out_gpa, "rdx": 0x55, "rax": 0x77, "rflags": 2})
    assert lab.enter(sregs, regs) == (IoOut(0x55, 1, 1, b"\x77"), [])
    assert lab.vcpu.run(5) == Hlt()


# ---- what is told of it ----


def test_each_access_has_its_own_records(lab: MmuLab) -> None:
    walks_here(lab)
    lab.map(0x40_0000, RAM)
    lab.map(0x40_1000, HOLE)
    program = [
        Access(0x40_0000, "store", False),
        Access(0x40_1000),
        Access(0x50_0000),
        Access(0x40_0000, user=False),
    ] * 300
    seen = lab.run(program)
    assert [one.access for one in seen] == program
    for one in seen:
        exits = [event for event in one.records if type(event) is UserspaceExit]
        assert len(exits) == 1 + len(one.mmio)
        assert one.records[-1] is exits[-1]
        if one.access.gva == 0x50_0000:
            assert [walk.error for walk in one.own] == [4]
            assert one.fault is not None
        elif not one.access.user:
            assert [walk.addr for walk in one.own] == [one.access.gva]
        assert all(walk.addr >> 12 == one.access.gva >> 12 for walk in one.walks)


def test_the_walk_is_that_of_the_tables(lab: MmuLab) -> None:
    walks_here(lab)
    where = lab.map(0x12_3456_7000, RAM + 0x5000, P | US | RW)
    before = lab.read_entry(where)
    (load,) = lab.run([Access(0x12_3456_7008)])
    (walk,) = load.own
    table, entries = lab.root, []
    for level in (4, 3, 2, 1):
        at = table + 8 * (0x12_3456_7008 >> 12 + 9 * (level - 1) & 511)
        entries.append((level, lab.read_entry(at) if level > 1 else before))
        table = entries[-1][1] & 0xFFFFFFFFFF000
    assert (walk.pferr, walk.entries, walk.accessed, walk.dirty) == (4, tuple(entries), (where,), ())
    assert lab.read_entry(where) == before | A
    (store,) = lab.run([Access(0x12_3456_7008, "store")])
    (walk,) = store.own
    assert (walk.pferr & 6, walk.accessed, walk.dirty) == (6, (), (where,))
    assert lab.read_entry(where) == before | A | D


def test_a_shadow_page_lasts_until_a_flush(lab: MmuLab) -> None:
    walks_here(lab)
    lab.map(0x40_0000, RAM + 0x5000, P | US | RW | A | D)
    load = Access(0x40_0000)
    first, again = lab.run([load, load])
    (spte,) = [event for event in first.sptes if event.gfn == (RAM + 0x5000) >> 12]
    assert spte.spte >> 12 & (1 << 40) - 1 == lab.pfn(RAM + 0x5000) == lab.pfns(1)[5]
    assert (again.walks, again.sptes) == ([], [])
    lab.flush()
    (after,) = lab.run([load])
    assert spte.spte in [event.spte for event in after.sptes]
    root = after.pages[0]
    assert (root.gfn, root.created) == (lab.root >> 12, 1)


def test_the_drivers_own_shadow_pages_are_left_out(lab: MmuLab) -> None:
    walks_here(lab)
    lab.map(0x40_0000, RAM + 0x5000, P | US | RW | A)
    lab.flush()
    (seen,) = lab.run([Access(0x40_0000)])
    assert {event.gfn for event in seen.sptes} == {(RAM + 0x5000) >> 12}
    every = {event.gfn for event in seen.records if type(event) is GetPage}
    assert {event.gfn for event in seen.pages} < every


def test_dirty_log(lab: MmuLab) -> None:
    lab.map(0x40_0000, LOG + 0x3000)
    lab.run([Access(0x40_0008, "store")])
    assert lab.vm.get_dirty_log(3)[0] == 1 << 3
    lab.set_flags(3, 0)
    lab.set_flags(1, 1)
    lab.map(0x40_1000, RAM + 0x1000)
    lab.run([Access(0x40_1008, "store")])
    assert lab.vm.get_dirty_log(1)[0] == 1 << 1


def test_pages_that_are_given_back(untraced: MmuLab) -> None:
    lab = untraced
    lab.map(0x40_0000, RAM + 0x3000)
    assert lab.pfns(1)[3]
    lab.discard(RAM + 0x3000, 4096)
    assert not lab.pfns(1)[3]
    assert lab.run([Access(0x40_0000)])[0].value == 0


def test_lost_records_are_told() -> None:
    need("kvm", "tracefs", "root")
    with MmuLab(SLOTS, buffer_size=4096) as lab:
        lab.map(0x40_0000, RAM)
        with pytest.raises(TraceLost):
            lab.run([Access(0x40_0000, user=False)] * 500)
        (seen,) = lab.run([Access(0x40_0000, user=False)])
        assert seen.value == RAM
        assert type(seen.records[-1]) is UserspaceExit


def test_an_exit_that_is_not_in_the_trace_is_told(lab: MmuLab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.map(0x40_0000, RAM)
    trace = lab._trace
    assert trace is not None
    whole = trace.read_raw
    exits = trace.ids["kvm:kvm_userspace_exit"]
    monkeypatch.setattr(trace, "read_raw", lambda: [raw for raw in whole() if raw.id != exits])
    with pytest.raises(TraceLost, match="fewer exits"):
        lab.run([Access(0x40_0000)])
    monkeypatch.setattr(trace, "read_raw", lambda: (found := whole()) + found[-1:])
    with pytest.raises(TraceLost, match="more exits"):
        lab.run([Access(0x40_0000)])


def test_functions_are_called_between_the_accesses(lab: MmuLab) -> None:
    walks_here(lab)
    lab.map(0x40_0000, RAM + 0x3000, P | RW | US | A | D)
    load, order = Access(0x40_0000), []
    zap: list[Any] = [lab.flush, lambda: order.append("flushed")]
    program = [load, load, *zap, load] * 400 + [lab.flush]
    seen = lab.run(program)
    assert len(order) == 400
    assert [one.access for one in seen] == [load] * 1200
    # What a flush does is told with the access behind it, over the chunks' ends too (800 items).
    assert len(program) > module._CHUNK
    zapped = [sum(type(event) is ZapAllFast for event in one.records) for one in seen]
    assert zapped == [0, 0, 1] * 400
    assert [len(one.own) for one in seen[3:]] == [0, 0, 1] * 399
    assert sum(type(event) is ZapAllFast for event in lab.trailing) == 1
    lab.run([load])
    assert lab.trailing == ()


def test_it_goes_on_after_an_exception(untraced: MmuLab) -> None:
    # One that comes while a read waits for its answer, as Ctrl-C may.
    lab = untraced
    lab.map(0x40_0000, HOLE)
    lab.map(0x40_1000, RAM)
    vcpu = lab.vcpu

    class Interrupting:
        def __getattr__(self, name: str) -> Any:
            return getattr(vcpu, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(vcpu, name, value)

        def answer(self, data: Any) -> None:
            object.__setattr__(lab, "vcpu", vcpu)
            raise KeyboardInterrupt

    for user in (True, False):
        for kind in ("load", "xchg"):
            lab.vcpu = Interrupting()  # type: ignore[assignment]
            with pytest.raises(KeyboardInterrupt):
                lab.run([Access(0x40_0000, kind, user=user)])
            seen = lab.run([Access(0x40_1000, user=user), Access(0x40_1008, "store", user=user, value=9)])
            assert [(one.value, one.fault, one.mmio, one.stop) for one in seen] == [
                (RAM, None, (), None),
                (9, None, (), None),
            ]


def test_protection_keys(untraced: MmuLab) -> None:
    lab = untraced
    try:
        lab.pkru = 0b0100_0000 << 2  # key 4: no access; key 5 and others: all
    except UnsupportedError:
        pytest.skip("needs a KVM with protection keys")
    assert lab.pkru == 0x100
    lab.cr4 |= 1 << 22
    lab.map(0x40_0000, RAM, P | RW | US | 4 << 59)
    lab.map(0x40_1000, RAM + 0x1000, P | RW | US | 5 << 59)
    lab.map(0x40_2000, RAM + 0x2000, P | RW | 4 << 59)
    assert lab.translate([0x40_0000, 0x40_1000, 0x40_2000]) == [None, RAM + 0x1000, RAM + 0x2000]
    # P and PK, 0x20; a key counts for pages of the user only.
    seen = lab.run([Access(0x40_0000, user=False), Access(0x40_0000), Access(0x40_2000, user=False)])
    assert [one.fault and one.fault.error_code for one in seen] == [0x21, 0x25, None]
    lab.pkru = 0
    assert lab.pkru == 0
    assert lab.translate([0x40_0000]) == [RAM]


def test_registers_are_loaded_at_once(untraced: MmuLab) -> None:
    lab = untraced
    lab.cr4 |= SMEP
    assert not lab.vcpu.sregs.cr4 & SMEP
    lab.load_registers()
    assert lab.vcpu.sregs.cr4 & SMEP
    assert lab.vcpu.sregs.cs.dpl == 3


def test_where_the_driver_has_its_instructions(untraced: MmuLab) -> None:
    lab = untraced
    at = lab.stub("load")
    assert at - lab.stub("load", user=False) == 2 * MiB
    assert bytes(lab.mapping(0).view()[at & 0xFFFF : (at & 0xFFFF) + 3]) == bytes.fromhex("488b07")  # mov rax, [rdi]
    with pytest.raises(ArgumentError, match="kind"):
        lab.stub("fetch")


def test_exits_are_traced_whatever_is_asked_for() -> None:
    need("kvm", "tracefs", "root")
    with MmuLab(SLOTS, events=["kvmmmu:kvm_mmu_set_spte"]) as lab:
        lab.map(0x40_0000, RAM)
        (seen,) = lab.run([Access(0x40_0000)])
        assert lab.trace is not None
        assert set(lab.trace.events) == {"kvmmmu:kvm_mmu_set_spte", "kvm:kvm_userspace_exit"}
        assert [type(event) for event in seen.records if type(event) is not SetSpte] == [UserspaceExit]


# ---- bad input ----


def test_a_slot_that_is_filled_is_in_memory() -> None:
    with pytest.raises(ArgumentError, match="fill"):
        MmuLab([LabSlot(RAM, MiB, populate=False)], trace=False)


def test_another_thread_is_refused(untraced: MmuLab) -> None:
    errors: list[BaseException] = []

    def other() -> None:
        for call in (lambda: untraced.run([]), lambda: untraced.translate([0])):
            try:
                call()
            except BusyError as error:
                errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(errors) == 2


@pytest.mark.parametrize(
    ("item", "field"),
    [
        (Access(1 << 64), "gva"),
        (Access(0, "jump"), "kind"),
        (Access(0, "invlpg"), "kind"),
        (Access(0, "cr3", True), "kind"),
        ("load", "program"),
    ],
)
def test_what_is_no_access(untraced: MmuLab, item: Access, field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        untraced.run([item])
    assert caught.value.field == field


def test_addresses_that_are_in_no_slot(untraced: MmuLab) -> None:
    for call in (untraced.read_entry, untraced.hva, untraced.pfn):
        with pytest.raises(ArgumentError, match="gpa="):
            call(HOLE)
    with pytest.raises(ArgumentError, match="the slot's rest"):
        untraced.write(RAM + 4 * MiB - 4, bytes(8))


def test_maps_that_do_not_fit(untraced: MmuLab) -> None:
    untraced.map(0x40_0000, RAM + 2 * MiB, level=2)
    with pytest.raises(ArgumentError, match="2 MiB"):
        untraced.map(0x40_1000, RAM)
    with pytest.raises(ArgumentError, match="level=3"):
        untraced.map(0x40_0000, RAM, level=3)


def test_close_and_forget(untraced: MmuLab) -> None:
    untraced.close()
    untraced.close()
    assert "closed" in repr(untraced)


def test_the_stubs_are_what_they_are_called() -> None:
    # 16 bytes each, and the last byte before the next: OUT DX, AL; HLT.
    assert len(set(module._STUB.values())) == len(module._CODE)
    assert all(len(bytes.fromhex(code)) + 2 <= 16 for code in module._CODE.values())
