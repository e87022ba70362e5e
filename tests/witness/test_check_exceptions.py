"""The checks of the exception queue: they agree with the running kernel, and they see a model that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from hvmodel.arch import exceptions, vectors
from hvmodel.arch.exceptions import ExceptionQueue, Injection, Merge
from hvmodel.arch.vectors import ExceptionClass, ExceptionType, Vector
from hvmodel.kvm import Kvm
from hvmodel.witness import CheckResult, Tally, check_exceptions, run
from tests.need import need, need_cap

NAMES = ["exceptions", "exceptions_delivery", "exceptions_order", "exceptions_refused"]


@pytest.fixture(autouse=True)
def _kvm() -> None:
    need("kvm")


def only(name: str, cases: int | None = None) -> CheckResult:
    (result,) = run([name], cases=cases)
    return result


def need_triple_fault() -> None:
    with Kvm() as kvm, kvm.create_vm() as vm:
        need_cap(vm, "X86_TRIPLE_FAULT_EVENT")


def test_they_agree() -> None:
    for result in run(NAMES):
        assert result.ok, result
        assert not result.lacking, result


def test_as_many_cases_as_there_are() -> None:
    # (31 first vectors injected, and none; with the capabilities and without) x 10 second ones; the first pending, with
    # the capabilities, x all of them but #BP; the queue and the registers before and behind the entry, the exit, and
    # the handler where there is no shutdown.
    pairs = 10 * 2 * (31 + 1) + 9 * 31
    triple = 10 * 2 + 9  # #DF first
    assert only("exceptions").compared == 6 * pairs - triple
    assert only("exceptions_delivery", cases=124).compared == 4 * 124  # 31 vectors x 2 states x 2 modes


def test_it_finds_each_pair_that_makes_a_double_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without merging at all, exactly the pairs of SDM table 7-5 differ, of the second ones that can be raised here; and
    # all with #DF first, which KVM makes a shutdown.
    def compare(tally: Tally, case: str, ours: object, theirs: object) -> bool:
        if ours != theirs:
            differ.add(case.partition(":")[0])
        return right(tally, case, ours, theirs)

    differ: set[str] = set()
    right = Tally.compare
    monkeypatch.setattr(Tally, "compare", compare)
    monkeypatch.setattr(exceptions, "merge", lambda first, second: Merge.REPLACED)
    assert only("exceptions").mismatches
    contributory, seconds = (
        ["#DE", "#NP", "#SS", "#GP"],
        ["#DE", "#DB", "#UD", "#NP", "#SS", "#GP", "#PF", "#MF", "#MC"],
    )
    pairs = {(first, second) for first in ("#DE", "#TS", "#NP", "#SS", "#GP", "#PF") for second in contributory}
    pairs |= {("#PF", "#PF")} | {("#DF", second) for second in seconds}
    injected = pairs | {("#DF", "#BP")}
    assert differ == (
        {f"{second} while {first} is pending" for first, second in pairs}
        | {f"{second} while {first} is injected" for first, second in injected}
        | {f"{second} while {first} is injected, without capabilities" for first, second in injected}
    )


def test_what_the_kernel_makes_of_two_is_in_the_manual() -> None:
    # Without the model: SDM table 7-5, and shutdown (a triple fault) for what follows #DF.
    need_triple_fault()
    contributory = (0, 10, 11, 12, 13)
    seconds = {second.vector: second for second in check_exceptions._SECONDS}
    assert {Vector.DE, Vector.DB, Vector.BP, Vector.UD, Vector.GP, Vector.PF, Vector.MC} <= seconds.keys()
    pairs = 0
    with check_exceptions._Guest(payload=True, triple_fault=True) as guest:
        for first, second in product([v for v in range(32) if v != 2], seconds):
            events = {**guest.zero, "exception.injected": 1, "exception.nr": first}
            assert check_exceptions._raise_second(guest, seconds[second], events), second
            double = (first in (*contributory, 14) and second in contributory) or first == second == 14
            kept = 8 if double or first == 8 else second
            found = guest.events()
            assert (found["exception.nr"], found["triple_fault.pending"]) == (kept, int(first == 8)), (first, second)
            pairs += 1
    assert pairs >= 14 * 2


def wrong_class(vector: int) -> ExceptionClass:
    return ExceptionClass.CONTRIBUTORY if vector == Vector.CP else RIGHT_CLASS(vector)


def wrong_type(vector: int) -> ExceptionType:
    return ExceptionType.FAULT if vector == Vector.MC else RIGHT_TYPE(vector)


RIGHT_CLASS, RIGHT_TYPE = vectors.exception_class, vectors.exception_type


def test_one_vector_in_the_wrong_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exceptions, "exception_class", wrong_class)
    result = only("exceptions")
    assert result.mismatches
    assert all("while #CP is" in example for example in result.examples)


def test_one_vector_of_the_wrong_type_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exceptions, "exception_type", wrong_type)
    result = only("exceptions_delivery", cases=124)
    assert result.mismatches == 1  # pending, in long mode: 16 bits of flags have no RF
    assert "#MC, pending, long mode" in result.examples[0]


def early(queue: ExceptionQueue, *arguments: Any) -> None:
    queue.defers_payload = False
    RIGHT_QUEUE(queue, *arguments)


def keeps(queue: ExceptionQueue) -> None:
    RIGHT_ENTER(queue)
    queue.exception = exceptions._changed(queue.exception, injected=True)


RIGHT_QUEUE, RIGHT_ENTER, RIGHT_INJECT = ExceptionQueue.queue, ExceptionQueue.delivered, ExceptionQueue._inject


def interrupts_first(queue: ExceptionQueue) -> Injection | None:
    if queue.interrupt_injected and not queue.triple_fault:
        return Injection("interrupt", queue.interrupt_nr, None, True)
    return RIGHT_INJECT(queue)


def no_payload(queue: ExceptionQueue) -> None:
    queue.exception = exceptions._changed(queue.exception, payload=0, has_payload=False)


@pytest.mark.parametrize(
    ("name", "attribute", "wrong"),
    [
        ("exceptions", "queue", early),
        ("exceptions", "delivered", keeps),
        ("exceptions", "deliver_payload", no_payload),
        ("exceptions_delivery", "deliver_payload", no_payload),
        ("exceptions_order", "_inject", interrupts_first),
        ("exceptions_order", "_process_nmi", lambda queue: None),
        ("exceptions_refused", "set_events", lambda queue, events: None),
    ],
)
def test_what_is_wrong_is_seen(
    monkeypatch: pytest.MonkeyPatch, name: str, attribute: str, wrong: Callable[..., object]
) -> None:
    monkeypatch.setattr(ExceptionQueue, attribute, wrong)
    assert only(name, cases=124).mismatches


def test_what_cannot_be_raised_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = list(check_exceptions._SECONDS)
    (at,) = [at for at, second in enumerate(seconds) if second.vector == Vector.UD]
    seconds[at] = check_exceptions._Second(Vector.UD, None, None, check_exceptions._READ, bytes(8))  # raises nothing
    monkeypatch.setattr(check_exceptions, "_SECONDS", tuple(seconds))
    result = only("exceptions")
    assert result.mismatches == 0
    assert result.lacking == ("#UD as the second exception",)


def test_a_host_that_raises_too_little_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = tuple(second for second in check_exceptions._SECONDS if second.vector != Vector.GP)
    monkeypatch.setattr(check_exceptions, "_SECONDS", seconds)
    assert not only("exceptions").ok


def test_a_queued_exception_is_told_as_the_kernel_holds_it() -> None:
    (page_fault,) = [second for second in check_exceptions._SECONDS if second.vector == Vector.PF]
    with check_exceptions._Guest(payload=True, triple_fault=False) as guest:
        assert check_exceptions._raise_second(guest, page_fault, None)
        events = guest.events()
    assert (events["exception.pending"], events["exception.nr"], events["exception.error_code"]) == (1, 14, 2)
