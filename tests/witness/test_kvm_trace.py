"""KvmTrace: typed records, by formats of any version; complete or refused."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator

import pytest

from hvmodel.errors import ArgumentError, ClosedError
from hvmodel.witness import KvmTrace, Lacking, Record, Tracefs, TraceLost
from hvmodel.witness import kvm_trace as module
from hvmodel.witness.kvm_trace import (
    EVENTS,
    EmulateInsn,
    Event,
    GetPage,
    PagetableWalk,
    PagingElement,
    SetAccessed,
    SetDirty,
    SetSpte,
    UserspaceExit,
    WalkerError,
    typed,
    walks,
)
from hvmodel.witness.ringbuffer import parse_format
from tests.need import need
from tests.witness.plainvm import KVM_EXIT_IO, PlainVm

SET_SPTE = "kvmmmu:kvm_mmu_set_spte"


@pytest.fixture
def vm() -> Iterator[PlainVm]:
    need("kvm", "tracefs")
    with PlainVm() as made:
        yield made


def of(event: str, **values: int) -> Record:
    return Record(event, 0, 1, 7, values)


# ---- without a kernel ----


def test_a_record_becomes_its_class() -> None:
    record = of(SET_SPTE, gfn=0x10, spte=0xA25, sptep=0x1018, level=1, r=1, x=0, u=-1)
    assert typed(record) == SetSpte(0x10, 0xA25, 0x1018, 1, 1, 0, -1)
    assert typed(of("sched:sched_switch", prev_pid=1)) is None


def test_fields_of_another_version() -> None:
    # One that has no `created`, and a field that no class knows.
    assert typed(of("kvmmmu:kvm_mmu_get_page", gfn=5, role=0x3704, root_count=1, unsync=0, novel=3)) == GetPage(
        5, 0x3704, 1, 0, None, None
    )
    with pytest.raises(Lacking, match="kvm_mmu_get_page has no field 'role'"):
        typed(of("kvmmmu:kvm_mmu_get_page", gfn=5))


def test_bytes_by_a_format_in_another_order() -> None:
    # The format's offsets count, not the order in the class; u is signed; `r` is not there.
    text = """name: kvm_mmu_set_spte
ID: 119
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:signed char u;\toffset:8;\tsize:1;\tsigned:1;
\tfield:bool x;\toffset:9;\tsize:1;\tsigned:0;
\tfield:u8 level;\toffset:10;\tsize:1;\tsigned:0;
\tfield:u64 sptep;\toffset:16;\tsize:8;\tsigned:0;
\tfield:u64 spte;\toffset:24;\tsize:8;\tsigned:0;
\tfield:u64 gfn;\toffset:32;\tsize:8;\tsigned:0;
"""
    make = module._raw_maker(parse_format(text, "kvmmmu"))
    data = bytes(8) + b"\xff\x01\x02" + bytes(5) + b"".join(n.to_bytes(8, "little") for n in (0x1018, 0xA25, 0x10))
    assert make(data) == SetSpte(0x10, 0xA25, 0x1018, 2, None, 1, -1)
    without = text.replace("u64 spte;", "u64 other;")
    with pytest.raises(Lacking, match="no field spte"):
        module._raw_maker(parse_format(without, "kvmmmu"))


def test_walks_are_grouped() -> None:
    first = [
        PagetableWalk(0x1000, 6),
        PagingElement(0x2007, 4),
        PagingElement(0x3007, 3),
        SetAccessed(0x10),
        SetDirty(8),
    ]
    spte = SetSpte(1, 2, 3, 1)
    second = [PagetableWalk(0x5000, 0), PagingElement(0, 4), WalkerError(0)]
    before: list[Event] = [GetPage(1, 2), PagingElement(9, 9)]
    one, two = walks([*before, *first, spte, *second])
    assert (one.addr, one.pferr, one.entries, one.error) == (0x1000, 6, ((4, 0x2007), (3, 0x3007)), None)
    assert (one.accessed, one.dirty, one.after, one.events(SetSpte)) == ((0x10,), (8,), (spte,), (spte,))
    assert (two.addr, two.entries, two.error, two.after) == (0x5000, ((4, 0),), 0, ())
    assert walks(before) == []


def test_every_event_has_a_class_and_a_name() -> None:
    kinds = [module._TYPES[event] for event in EVENTS]
    assert len(set(kinds)) == len(kinds)
    assert {kind.__name__ for kind in kinds} <= set(module.__all__)


# ---- of the running kernel ----


def test_classes_have_the_fields_of_the_running_kernel() -> None:
    need("kvm", "tracefs")
    with Tracefs() as tracefs:
        present = module._present(tracefs)
        for event in sorted(set(EVENTS) & present):
            layout = {field.name for field in tracefs.format(event).layout}
            kind = module._TYPES[event]
            required = {name for name in kind.fields() if name not in kind._defaults}
            assert required <= layout
            if platform.release().startswith("6.18."):
                assert set(kind.fields()) == layout, event
        if platform.release().startswith("6.18."):
            assert set(EVENTS) <= present
            assert {event for event in present if event.startswith("kvmmmu:")} <= set(EVENTS)


def test_two_decoders_agree(vm: PlainVm) -> None:
    # The same events, read by this class and by the general reader of records.
    tid = threading.get_native_id()
    with KvmTrace() as trace, Tracefs() as tracefs, tracefs.instance(trace.events, [tid], follow=False) as plain:
        for _ in range(20):
            assert vm.run() == KVM_EXIT_IO
        trace.pause()
        plain.pause()
        ours = trace.read()
        theirs = [typed(record) for record in plain.read()]
    start = ours.index(theirs[0])  # type: ignore[arg-type]  # the general one began later
    assert ours[start:] == theirs
    kinds = {type(event) for event in ours}
    assert {EmulateInsn, UserspaceExit} <= kinds or {UserspaceExit} <= kinds
    assert sum(type(event) is UserspaceExit for event in ours) == 20


def test_only_the_thread_it_was_made_for(vm: PlainVm) -> None:
    with KvmTrace(["kvm:kvm_userspace_exit"]) as trace:
        thread = threading.Thread(target=vm.run)
        thread.start()
        thread.join()
        assert trace.read() == []
        vm.run()
        assert trace.read() == [UserspaceExit(KVM_EXIT_IO, 0)]


def test_pause_and_filter(vm: PlainVm) -> None:
    with KvmTrace(["kvm:kvm_userspace_exit"]) as trace:
        trace.pause()
        vm.run()
        trace.resume()
        trace.filter("kvm:kvm_userspace_exit", f"reason != {KVM_EXIT_IO}")
        vm.run()
        assert trace.read() == []
        with pytest.raises(ArgumentError, match="kvm:kvm_userspace_exit"):
            trace.filter("kvm:kvm_pio", "0")
        trace.filter("kvm:kvm_userspace_exit", "0")
        vm.run()
        assert trace.read() == [UserspaceExit(KVM_EXIT_IO, 0)]


def test_lost_records_are_never_passed_over(vm: PlainVm) -> None:
    with KvmTrace(["kvm:kvm_userspace_exit"], buffer_size=4096) as trace:
        for _ in range(2000):
            vm.run()
        with pytest.raises(TraceLost) as caught:
            trace.read()
        assert caught.value.lost is None or caught.value.lost > 500
        # What comes after that is whole again.
        vm.run()
        assert trace.read() == [UserspaceExit(KVM_EXIT_IO, 0)]


def test_closed(vm: PlainVm) -> None:
    trace = KvmTrace()
    trace.close()
    trace.close()
    for call in (trace.read, trace.pause, trace.resume, lambda: trace.filter("kvm:kvm_pio", "0")):
        with pytest.raises(ClosedError):
            call()


def test_events_that_are_none() -> None:
    with pytest.raises(ArgumentError, match="names of EVENTS"):
        KvmTrace(["sched:sched_switch"])


def test_a_kernel_without_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    need("tracefs")
    monkeypatch.setattr(module, "_present", lambda tracefs: {"kvm:kvm_userspace_exit"})
    with pytest.raises(Lacking, match="kvm_mmu_pagetable_walk"):
        KvmTrace()
    with KvmTrace(["kvm:kvm_userspace_exit", "kvm:kvm_mmio"]) as trace:
        assert trace.events == ("kvm:kvm_userspace_exit",)


def test_lost_is_pickled() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(TraceLost(3, "why")))
    assert (error.lost, str(error)) == (3, "3 trace records lost: why")
