"""The check of the synchronisation, and that it sees a call too many, one too few, and a wrong number of MSRs."""

from __future__ import annotations

import pytest

from hvmodel.state import sync
from hvmodel.witness import check_sync
from hvmodel.witness.check_sync import VARIANTS, our_events, qemu_events
from hvmodel.witness.result import Tally
from tests.cases import cases
from tests.need import need

TRACE = """\
12 ioctl(9, KVM_CREATE_VCPU, 0 <unfinished ...>
11 ioctl(9, KVM_SET_CLOCK, 0x7ffc) = 0
12 <... ioctl resumed>) = 10
12 ioctl(10, KVM_SET_MSRS, 0x7fd3) = 58
12 ioctl(10, KVM_SET_REGS, {rax=0, ..., rip=0xfff0, rflags=0x2}) = 0
11 ioctl(3, KVM_GET_MSRS, 0x7ffc) = 1
12 ioctl(10, KVM_SET_SREGS2, 0x7fd3) = -1 EINVAL (Invalid argument)
12 ioctl(10, KVM_RUN, 0) = 0
12 ioctl(10, KVM_GET_REGS, {rax=0}) = 0
"""


def test_a_trace_is_read() -> None:
    lines = check_sync._lines(TRACE)
    assert check_sync._vcpu_fd(lines) == 10
    calls = check_sync._calls(lines, 10)
    assert calls == [("KVM_SET_MSRS", 58), ("KVM_SET_REGS", 0), ("KVM_SET_SREGS2", -1)]


def test_qemu_agrees() -> None:
    need("kvm", "qemu", "strace")
    tally = Tally("ours", "QEMU")
    check_sync.check_sync(tally, cases(2, len(VARIANTS)))
    found = tally.result()
    assert found.ok, found.examples
    assert found.compared >= 50


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    need("kvm", "qemu", "strace")
    theirs, ours = qemu_events("qemu64"), our_events(VARIANTS[0])
    for event, change in (
        ("run", lambda calls: [*calls, ("KVM_SET_FPU", 0)]),
        ("run", lambda calls: calls[:-1]),
        ("reset", lambda calls: [calls[1], calls[0], *calls[2:]]),
        ("first_get", lambda calls: [(name, count - (count > 0)) for name, count in calls]),
    ):
        tally = Tally("ours", "QEMU")
        check_sync._compare(tally, event, ours[event], theirs[event])
        assert tally.result().ok, tally.result().examples
        tally = Tally("ours", "QEMU")
        check_sync._compare(tally, event, change(ours[event]), theirs[event])
        assert not tally.result().ok


def test_the_orders_name_every_part_once() -> None:
    assert len(set(sync._GET_ORDER)) == len(sync._GET_ORDER)
    assert {name for name, _ in sync._PUT_ORDER} - {"feature_control", "tsc_deadline", "tsc_khz"} == set(
        sync._GET_ORDER
    ) - {"lapic"}
