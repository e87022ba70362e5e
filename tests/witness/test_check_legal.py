"""The check of special registers: all combinations agree, and it sees a model that is wrong."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest

from hvmodel.arch import legal
from hvmodel.arch.registers import CR4
from hvmodel.witness import CheckResult, check_legal, run
from tests.cases import cases
from tests.need import need

NAMED = sum(1 for bit in CR4 if bit is not CR4.PAE)


def only(cases: int = 1) -> CheckResult:
    need("kvm")
    (result,) = run(["legal"], cases=cases)
    if result.skipped:
        pytest.skip(result.lacking[0])
    return result


def test_all_combinations_agree() -> None:
    result = only(cases(1, 2))
    assert (result.mismatches, result.lacking) == (0, ()), result
    # CR0 2**5, CR4.PAE 2, EFER 2**3, CS.L 2; other bits of CR4: none, 63 alone, pairs.
    pairs = cases(NAMED * (NAMED - 1) // 2, 63 * 62 // 2)
    assert result.compared == 2**5 * 2 * 2**3 * 2 * (1 + 63 + pairs)


def test_the_bits_of_cr4_are_none_singles_and_pairs() -> None:
    for all_pairs, paired in ((True, 63), (False, NAMED)):
        sets = check_legal.cr4_sets(all_pairs=all_pairs)
        assert len(set(sets)) == len(sets)
        by_count = [sum(1 for one in sets if one.bit_count() == count) for count in range(4)]
        assert by_count == [1, 63, paired * (paired - 1) // 2, 0]
        assert not any(one & CR4.PAE for one in sets)


def some(monkeypatch: pytest.MonkeyPatch) -> None:
    # The combinations of CR0.PE and CR0.PG with all of EFER and CS.L, and no pairs.
    chosen = [base for base in check_legal._bases() if base[0] in (1, 0x80000001, 0x80000000, 0)]
    assert len(chosen) == 4 * 2 * 8 * 2
    monkeypatch.setattr(check_legal, "_bases", lambda: iter(chosen))
    singles = list(islice(check_legal.cr4_sets(all_pairs=False), 64))
    monkeypatch.setattr(check_legal, "cr4_sets", lambda **_: singles)


@pytest.mark.parametrize(
    "rule", ["long-mode-needs-pae", "long-mode-needs-lma", "lma-without-long-mode", "cr4-reserved"]
)
def test_a_rule_that_is_forgotten_is_seen(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    some(monkeypatch)
    assert only().mismatches == 0
    real = legal._broken
    monkeypatch.setattr(legal, "_broken", lambda *args: [name for name in real(*args) if name != rule])
    result = only()
    assert result.mismatches
    assert "says accepted, KVM refused" in result.examples[0] or "says changed" in result.examples[0]


def test_a_rule_too_many_and_a_wrong_change_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    some(monkeypatch)
    real = legal._changes

    def wrong(core: tuple[int, ...], *rest: Any) -> list[legal.Change]:
        found = real(core, *rest)
        # EFER.NXE is said to be lost.
        lost = [legal.Change("efer", core[3], core[3] & ~0x800, "pvm-drops-paging")] if core[3] & 0x800 else []
        return [*found, *lost]

    monkeypatch.setattr(legal, "_changes", wrong)
    result = only()
    assert result.mismatches
    assert "changed to EFER" in result.examples[0]
    monkeypatch.setattr(legal, "_changes", real)
    monkeypatch.setattr(legal, "_broken", lambda *_: ["cr0-upper-half"])
    assert "says refused, KVM accepted" in only().examples[0]


def test_an_unknown_vendor_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    need("kvm")
    from hvmodel.state import facts

    monkeypatch.setattr(facts, "facts_of", lambda *_: facts.Facts(limits=legal.SregsLimits("kvm_other")))
    (result,) = run(["legal"], cases=1)
    assert result.skipped
    assert "kvm_other" in result.lacking[0]
