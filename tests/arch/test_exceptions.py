"""The model of the exception queue.  Expected values are the manuals', or worked out beside them.

That the running kernel does the same: tests/witness/test_check_exceptions.py.
"""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmodel.arch.exceptions import (
    DB_PAYLOAD,
    ExceptionQueue,
    Injection,
    Merge,
    QueuedException,
    merge,
    payload_to_dr6,
)
from hvmodel.arch.vectors import is_soft
from hvmodel.errors import ArgumentError, ArgumentTypeError, HvError

EXCEPTIONS = [vector for vector in range(32) if vector != 2]
RF, GD = 1 << 16, 1 << 13


# ---- merging ----


def test_the_table_of_double_faults() -> None:
    contributory = {0, 10, 11, 12, 13}
    for first in EXCEPTIONS:
        for second in EXCEPTIONS:
            # SDM table 7-5, and shutdown for whatever follows #DF.
            double = (first in contributory and second in contributory) or (
                first == 14 and (second in contributory or second == 14)
            )
            expected = Merge.TRIPLE_FAULT if first == 8 else Merge.DOUBLE_FAULT if double else Merge.REPLACED
            assert merge(first, second) is expected, (first, second)


@pytest.mark.parametrize("state", ["pending", "injected"])
def test_a_second_one_meets_a_pending_and_an_injected_one_alike(state: str) -> None:
    for second, expected in ((13, (8, 0)), (6, (6, 0)), (14, (14, 2))):
        queue = ExceptionQueue()
        queue.queue(11, 0x18)
        if state == "injected":
            queue.enter()
        queue.queue(second, 2 if second == 14 else 0 if second == 13 else None)
        exception = queue.exception
        assert (exception.vector, exception.error_code) == expected
        assert (exception.pending, exception.injected) == (True, False)
        assert exception.has_error_code == (second != 6)
        assert not queue.triple_fault


def test_two_in_one_handler_are_no_double_fault() -> None:
    queue = ExceptionQueue()
    queue.queue(13, 0)
    queue.enter()
    queue.delivered()
    queue.queue(13, 8)
    assert queue.exception == QueuedException(pending=True, has_error_code=True, vector=13, error_code=8)


def test_a_triple_fault_keeps_the_double_fault_and_is_the_next_entry() -> None:
    queue = ExceptionQueue()
    for _ in range(3):
        queue.queue(13, 0)
    assert (queue.triple_fault, queue.exception.vector) == (True, 8)
    assert queue.enter() == Injection("shutdown")
    assert (queue.triple_fault, queue.exception.pending) == (False, True)


def test_the_payload_of_the_lost_one_is_lost() -> None:
    queue = ExceptionQueue(cr2=1)
    queue.queue(14, 2, 0x5000)
    queue.queue(14, 2, 0x6000)  # #DF, which has none
    assert queue.exception == QueuedException(pending=True, has_error_code=True, vector=8)
    queue.enter()
    assert queue.cr2 == 1


def test_requeue_merges_with_nothing_and_has_no_payload() -> None:
    queue = ExceptionQueue(rflags=2)
    queue.queue(14, 2, 0x5000)
    queue.enter()
    queue.requeue(14, 2)
    assert queue.exception == QueuedException(injected=True, has_error_code=True, vector=14, error_code=2)
    queue.rflags = 2
    assert queue.enter() == Injection("exception", 14, 2, again=True)
    assert queue.rflags == 2  # set the first time; an injected one leaves it


# ---- delivery ----


@pytest.mark.parametrize(
    ("before", "payload", "after"),
    [
        # 0xffff0ff0 is DR6 with nothing set: bits 31-16, 11-4 are 1, 12 is 0.
        (0xFFFF0FF0, 0x4001, 0xFFFF4FF1),  # BS, B0
        (0xFFFF0FFF, 0x0002, 0xFFFF0FF2),  # B0-B3 of before are cleared
        (0xFFFF4FF0, 0x2000, 0xFFFF6FF0),  # BS of before stays, BD comes
        (0xFFFF0FF0, 0x1000, 0xFFFF0FF0),  # 12, "enabled", is no bit of DR6
        (0xFFFF0FF0, 0x10000, 0xFFFE0FF0),  # RTM: 0 where it happened
        (0xFFFF0FF0, 0x0800, 0xFFFF07F0),  # BLD, a bus lock: 0 where it happened
        (0xFFFE07F0, 0x0000, 0xFFFF0FF0),  # and 1 again where it did not
        (0x00000000, 0x8000, 0xFFFF8FF0),  # BT; the fixed bits become 1
    ],
)
def test_dr6(before: int, payload: int, after: int) -> None:
    assert payload_to_dr6(before, payload) == after
    queue = ExceptionQueue(dr6=before, dr7=0x400 | GD)
    queue.queue(1, None, payload)
    assert queue.dr6 == before  # not before it is injected
    assert queue.enter() == Injection("exception", 1)
    assert (queue.dr6, queue.dr7) == (after, 0x400)  # GD is cleared, SDM 19.2.4


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF).map(lambda bits: bits & DB_PAYLOAD))
def test_dr6_keeps_its_fixed_bits(before: int, payload: int) -> None:
    after = payload_to_dr6(before, payload)
    assert after & 0xFFFE07F0 == 0xFFFE07F0
    assert not after & 1 << 12
    assert after & 0xF == payload & 0xF
    assert after & 0xE000 == (before | payload) & 0xE000


def test_a_page_fault_writes_cr2_when_it_is_injected() -> None:
    queue = ExceptionQueue(cr2=0x1000)
    queue.queue(14, 2, 0x5000)
    assert (queue.cr2, queue.exception.has_payload) == (0x1000, True)
    queue.enter()
    assert (queue.cr2, queue.exception.has_payload, queue.exception.payload) == (0x5000, False, 0)


def test_older_kernels_wrote_cr2_when_it_was_queued() -> None:
    queue = ExceptionQueue(cr2=0x1000, defers_payload=False)
    queue.queue(14, 2, 0x5000)
    assert (queue.cr2, queue.exception.has_payload) == (0x5000, False)


@pytest.mark.parametrize("vector", EXCEPTIONS)
def test_only_pending_faults_set_the_resume_flag(vector: int) -> None:
    queue = ExceptionQueue(rflags=0x202)
    queue.queue(vector)
    queue.enter()
    traps_and_aborts = {1, 3, 4, 8, 18}
    assert queue.rflags == (0x202 if vector in traps_and_aborts else 0x202 | RF)


def test_only_a_debug_exception_clears_general_detect() -> None:
    for vector in EXCEPTIONS:
        queue = ExceptionQueue(dr7=0x400 | GD)
        queue.queue(vector)
        queue.enter()
        assert bool(queue.dr7 & GD) == (vector != 1)


def test_no_error_code_in_real_mode() -> None:
    queue = ExceptionQueue(protected=False)
    queue.queue(13, 0x18)
    assert queue.exception.has_error_code  # as long as it waits
    assert queue.enter() == Injection("exception", 13, None)
    assert not queue.exception.has_error_code


def test_order() -> None:
    queue = ExceptionQueue()
    queue.set_events(
        {
            "flags": 0x3D,
            "exception.pending": 1,
            "exception.nr": 6,
            "nmi.injected": 1,
            "nmi.pending": 2,
            "interrupt.injected": 1,
            "interrupt.nr": 0x40,
            "triple_fault.pending": 1,
        }
    )
    found = []
    while (injection := queue.enter()) is not None:
        found.append((injection.kind, injection.again))
        queue.delivered()
    # The second NMI stays: its like masked it.
    assert found == [("shutdown", False), ("exception", False), ("nmi", True), ("interrupt", True)]
    assert (queue.nmi_pending, queue.nmi_masked) == (1, True)
    queue.nmi_masked = False  # IRET
    assert queue.enter() == Injection("nmi", 2)
    assert queue.nmi_masked


@pytest.mark.parametrize(("masked", "waiting"), [(False, 2), (True, 1)])
def test_how_many_nmis_wait(masked: bool, waiting: int) -> None:
    queue = ExceptionQueue()
    queue.nmi_masked = masked
    for _ in range(5):
        queue.nmi()
    assert queue.nmi_pending == waiting
    assert (queue.enter() is None) == masked


def test_a_shadow_holds_nmis_back() -> None:
    queue = ExceptionQueue()
    queue.nmi()
    queue.interrupt_shadow = 1
    assert queue.enter() is None


def test_a_second_interrupt_takes_the_place_of_the_first() -> None:
    queue = ExceptionQueue()
    queue.interrupt(0x20)
    queue.interrupt(0x21)
    assert queue.enter() == Injection("interrupt", 0x21, None, again=True)
    queue.delivered()
    assert queue.enter() is None


# ---- struct kvm_vcpu_events ----


def test_without_the_capability_pending_is_told_as_injected_and_reading_delivers() -> None:
    queue = ExceptionQueue(exception_payload_enabled=False, triple_fault_event=False)
    queue.queue(14, 2, 0x5000)
    events = queue.get_events()
    assert (events["exception.injected"], events["exception.pending"]) == (1, 1)
    assert (events["exception_has_payload"], events["exception_payload"]) == (0, 0)
    assert queue.cr2 == 0x5000
    assert events["flags"] == 0xD


@pytest.mark.parametrize(("payload", "triple", "flags"), [(True, True, 0x3D), (True, False, 0x1D), (False, False, 0xD)])
def test_flags(payload: bool, triple: bool, flags: int) -> None:
    queue = ExceptionQueue(exception_payload_enabled=payload, triple_fault_event=triple)
    assert queue.get_events()["flags"] == flags


@pytest.mark.parametrize("vector", [3, 4])
def test_soft_ones_are_not_told(vector: int) -> None:
    queue = ExceptionQueue()
    queue.queue(vector)
    events = queue.get_events()
    assert (events["exception.injected"], events["exception.pending"], events["exception.nr"]) == (0, 0, vector)
    assert queue.enter() == Injection("exception", vector)


@pytest.mark.parametrize(
    ("events", "field"),
    [
        ({"flags": 0x40}, "flags"),
        ({"flags": 1 << 31}, "flags"),
        ({"flags": 0x10}, "flags"),  # the capability is not enabled
        ({"flags": 0x20}, "flags"),
        ({"exception.injected": 1, "exception.nr": 2}, "exception.nr"),
        ({"exception.injected": 1, "exception.nr": 32}, "exception.nr"),
        ({"exception.injected": 1, "exception.nr": 255}, "exception.nr"),
    ],
)
def test_events_that_are_refused_leave_the_queue_as_it_was(events: dict[str, int], field: str) -> None:
    queue = ExceptionQueue(exception_payload_enabled=False, triple_fault_event=False)
    queue.queue(13, 0x18)
    before = queue.exception
    with pytest.raises(ArgumentError) as caught:
        queue.set_events({"nmi.masked": 1, **events})
    assert (caught.value.field, caught.value.value) == (field, events[field])
    assert queue.exception == before
    assert not queue.nmi_masked


def test_what_set_ignores() -> None:
    queue = ExceptionQueue()
    # Without the flag, pending means nothing, whatever its vector; with it, it overrides injected.
    queue.set_events({"exception.pending": 1, "exception.nr": 200})
    assert not queue.exception
    queue.set_events({"flags": 0x10, "exception.pending": 1, "exception.injected": 1, "exception.nr": 6})
    assert (queue.exception.pending, queue.exception.injected) == (True, False)
    queue.set_events({"flags": 0x10, "exception.injected": 1, "exception.nr": 14, "exception_has_payload": 1})
    assert not queue.exception.has_payload
    # NMIs, the shadow and triple faults need their flags.
    queue.set_events({"nmi.pending": 1, "interrupt.shadow": 1, "triple_fault.pending": 1})
    assert (queue.nmi_pending, queue.interrupt_shadow, queue.triple_fault) == (0, 0, False)


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("queue"),
            st.sampled_from(EXCEPTIONS),
            st.none() | st.integers(0, 0xFFFFFFFF),
            st.none() | st.integers(0, DB_PAYLOAD),
        ),
        st.tuples(st.just("nmi")),
        st.tuples(st.just("interrupt"), st.integers(0, 255)),
        st.tuples(st.just("enter")),
        st.tuples(st.just("delivered")),
    ),
    max_size=12,
)


@given(STEPS)
def test_events_carry_the_whole_queue(steps: list[tuple[Any, ...]]) -> None:
    # Whatever has happened, a queue made from the events goes on as the first one does; but #BP and #OF are lost.
    queue = ExceptionQueue()
    for name, *arguments in steps:
        getattr(queue, name)(*arguments)
        assert not (queue.exception.pending and queue.exception.injected)
        assert 0 <= queue.nmi_pending <= 2
    if is_soft(queue.exception.vector):
        return
    other = ExceptionQueue.from_events(queue.get_events(), rflags=queue.rflags)
    other.cr2, other.dr6, other.dr7 = queue.cr2, queue.dr6, queue.dr7
    assert other.get_events() == queue.get_events()
    for _ in range(6):
        assert other.enter() == queue.enter()
        queue.delivered()
        other.delivered()
    for name in ("rflags", "cr2", "dr6", "dr7"):
        assert getattr(other, name) == getattr(queue, name)


# ---- bad input, and the rest ----


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((2,), "vector"),
        ((32,), "vector"),
        ((-1,), "vector"),
        ((13, 1 << 32), "error_code"),
        ((13, -1), "error_code"),
        ((14, 0, 1 << 64), "payload"),
    ],
)
def test_values_that_cannot_be(arguments: tuple[int, ...], field: str) -> None:
    queue = ExceptionQueue()
    with pytest.raises(ArgumentError) as caught:
        queue.queue(*arguments)
    assert caught.value.field == field
    assert not queue.exception


@pytest.mark.parametrize("arguments", [("13",), (None,), (True,), (13, 1.0), (14, 0, "x")])
def test_types_that_cannot_be(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ArgumentTypeError):
        ExceptionQueue().queue(*arguments)
    if len(arguments) < 3:
        with pytest.raises(ArgumentTypeError):
            ExceptionQueue().requeue(*arguments)


@pytest.mark.parametrize("vector", [-1, 256, "32", None, True])
def test_interrupts_that_cannot_be(vector: Any) -> None:
    queue = ExceptionQueue()
    with pytest.raises(HvError) as caught:
        queue.interrupt(vector)
    assert getattr(caught.value, "field", None) == "vector"
    assert queue.enter() is None


@pytest.mark.parametrize("arguments", [(2, 13), (13, 2), (32, 13), (13, -1), ("13", 13), (13, None)])
def test_what_does_not_merge(arguments: tuple[Any, Any]) -> None:
    with pytest.raises(HvError) as caught:
        merge(*arguments)
    assert getattr(caught.value, "field", None) == ("second" if arguments[0] == 13 else "first")


@pytest.mark.parametrize("name", ["rflags", "cr2", "dr6", "dr7"])
def test_registers_that_cannot_be(name: str) -> None:
    for value in (-1, 1 << 64):
        with pytest.raises(ArgumentError, match=name):
            ExceptionQueue(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=name):
        ExceptionQueue(**{name: "0"})  # type: ignore[arg-type]
    for dr6, payload in ((-1, 0), (0, -1), (1 << 64, 0), (0, 1 << 64)):
        with pytest.raises(ArgumentError):
            payload_to_dr6(dr6, payload)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("exception.vector", 6),  # its name is nr
        ("exception.nr", 256),
        ("exception.nr", "6"),
        ("exception.error_code", 1 << 32),
        ("exception_payload", 1 << 64),
        ("exception_payload", -1),
        ("nmi.pending", 1.0),
    ],
)
def test_events_that_no_struct_has(path: str, value: Any) -> None:
    queue = ExceptionQueue()
    queue.queue(13, 0x18)
    before = queue.get_events()
    with pytest.raises(HvError) as caught:
        queue.set_events({"exception.injected": 1, path: value})
    assert str(caught.value).startswith(f"KVM_SET_VCPU_EVENTS: {path}")
    assert queue.get_events() == before


def test_events_have_the_paths_and_sizes_of_the_struct() -> None:
    from hvmodel._ffi import ffi
    from hvmodel.arch.exceptions import _EVENTS

    def sizes(kind: Any, at: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, field in kind.fields:
            if field.type.kind == "struct":
                found |= sizes(field.type, f"{at}{name}.")
            elif field.type.kind == "primitive":
                found[at + name] = ffi.sizeof(field.type)
        return found

    wanted = sizes(ffi.typeof("struct kvm_vcpu_events"), "")
    assert {path: (1 << 8 * size) - 1 for path, size in wanted.items()} == _EVENTS


def test_values() -> None:
    queue = ExceptionQueue()
    assert repr(queue) == "ExceptionQueue()"
    queue.queue(14, 2, 0x5000)
    queue.nmi()
    assert "vector=0xe" in repr(queue)
    assert "nmi_pending=1" in repr(queue)
    assert pickle.loads(pickle.dumps(queue.exception)) == queue.exception
    assert pickle.loads(pickle.dumps(Injection("nmi", 2))) == Injection("nmi", 2)


def test_a_new_queue_has_the_registers_of_a_reset() -> None:
    # Intel SDM volume 3, table 9-1: RFLAGS 2, CR2 0, DR6 FFFF0FF0H, DR7 400H.
    queue = ExceptionQueue()
    assert (queue.rflags, queue.cr2, queue.dr6, queue.dr7) == (2, 0, 0xFFFF0FF0, 0x400)
    assert ExceptionQueue.from_events({}).rflags == 2


def test_what_is_accepted_is_said() -> None:
    for vector, accepted in ((32, "0 to 31"), (2, "0 to 31, but not 2, which is the NMI")):
        with pytest.raises(ArgumentError) as caught:
            merge(13, vector)
        assert caught.value.accepted == accepted


def test_a_path_that_is_not_there_is_0() -> None:
    queue, fresh = ExceptionQueue(), ExceptionQueue()
    queue.set_events({"flags": 0x3D})
    for name in ExceptionQueue.__slots__:
        assert getattr(queue, name) == getattr(fresh, name), name


def test_why_flags_are_refused_is_said() -> None:
    queue = ExceptionQueue(exception_payload_enabled=False)
    for flags, why in ((0x40, "unknown bits"), (0x10, "capability of the bit is not enabled"), (0x50, "unknown bits")):
        with pytest.raises(ArgumentError, match=why):
            queue.set_events({"flags": flags})


def test_each_flag_of_the_struct_is_taken() -> None:
    # linux:arch/x86/include/uapi/asm/kvm.h: NMI_PENDING 1, SIPI_VECTOR 2, SHADOW 4, SMM 8, PAYLOAD, TRIPLE_FAULT.
    for bit in range(6):
        ExceptionQueue().set_events({"flags": 1 << bit})


def test_what_is_not_given_is_none() -> None:
    queue = ExceptionQueue()
    queue.set_events({"flags": 0x10, "exception.pending": 1, "exception.nr": 14})
    assert queue.exception == QueuedException(True, False, False, 14, 0, 0, False)
    assert Injection("shutdown") == Injection("shutdown", 0, None, False)
