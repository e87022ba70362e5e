"""The check of SPTEs: the kernel agrees, and a model that is wrong in one bit, or one access, is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hvmodel.errors import HostError
from hvmodel.mmu.spte import make_spte
from hvmodel.witness import CheckResult, KvmTrace, MmuLab, check_spte, run
from tests.cases import cases
from tests.need import need


def only(cases: int) -> CheckResult:
    need("kvm", "tracefs", "root")
    (result,) = run(["spte"], cases=cases)
    if result.skipped:
        pytest.skip(result.lacking[0])
    return result


def test_sptes_agree() -> None:
    nr = cases(1000, 50_000)
    result = only(nr)
    assert result.mismatches == 0, result.examples
    assert result.compared >= nr


Make = Callable[..., tuple[int, bool]]
WRONG: dict[str, Callable[[tuple[Any, ...], dict[str, Any]], int]] = {
    "a bit": lambda args, named: make_spte(*args, **named)[0] ^ 1 << 9,
    "the frame": lambda args, named: make_spte(*args, **named)[0] + 0x1000,
    "prefetch": lambda args, named: make_spte(*args, **named | {"prefetch": False})[0],
    "host-writable": lambda args, named: make_spte(*args, **named | {"host_writable": True})[0],
    "access": lambda args, named: make_spte(args[0], args[1], 7, *args[3:], **named)[0],
}


@pytest.mark.parametrize("how", WRONG)
def test_a_model_that_is_wrong_is_seen(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_spte, "make_spte", lambda *args, **named: (WRONG[how](args, named), False))
    assert only(300).mismatches > 0


def test_pages_that_move_are_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = check_spte._Host.same, [0]

    def same(self: Any, other: Any) -> bool:
        calls[0] += 1
        return bool(calls[0] % 3) and real(self, other)

    monkeypatch.setattr(check_spte._Host, "same", same)
    result = only(300)
    assert result.mismatches == 0
    assert any("host moved pages" in text for text in result.lacking)
    monkeypatch.setattr(check_spte._Host, "same", lambda self, other: False)
    result = only(300)
    assert not result.ok
    assert "moved" in result.examples[-1]


def test_a_request_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = check_spte._Checker._frame

    def other(self: Any, host: Any, gfn: int, number: int | None) -> tuple[int, bool]:
        pfn, writable = real(self, host, gfn, number)
        return pfn ^ 1, writable

    monkeypatch.setattr(check_spte._Checker, "_frame", other)
    result = only(200)
    assert any("request: " in text for text in result.examples), result.examples


def test_entries_that_belong_to_no_walk_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = check_spte._Checker.compare

    def forgets(self: Any, tally: Any, host: Any, outcome: Any) -> int:
        found = real(self, tally, host, outcome)
        self.nr_left += found  # as if none of these had been compared
        return found

    monkeypatch.setattr(check_spte._Checker, "compare", forgets)
    assert any("belong to no walk" in text for text in only(200).examples)


def test_kernels_that_cannot_show_it_are_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    need("kvm", "tracefs", "root")

    def old(lab: MmuLab, slot: int) -> set[int]:
        raise HostError(25, "ioctl(PAGEMAP_SCAN)", None, None, "Linux 6.7 or later")

    with monkeypatch.context() as patch:
        patch.setattr(MmuLab, "huge", old)
        (result,) = run(["spte"], cases=100)
        assert result.skipped
        assert "Linux 6.7" in result.lacking[0]
    events = check_spte._EVENTS[1:]
    real = KvmTrace.__init__

    def fewer(self: KvmTrace, names: Any = None, **named: Any) -> None:
        real(self, names, **named)
        self.events = tuple(event for event in self.events if event not in events)

    monkeypatch.setattr(KvmTrace, "__init__", fewer)
    (result,) = run(["spte"], cases=100)
    assert result.skipped
    assert "kvm_mmu_spte_requested" in result.lacking[0]
