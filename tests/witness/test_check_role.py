"""The checks of roles and of the kernel's types: all agree here, and they see models that are wrong."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest

from hvmodel.mmu import role
from hvmodel.mmu.role import PageRole
from hvmodel.witness import CheckResult, check_mmu_small, check_role, run
from tests.cases import cases
from tests.need import need


def only(name: str, cases: int | None = None) -> CheckResult:
    need("kvm", "root", "tracefs")
    (result,) = run([name], cases=cases)
    if result.skipped:
        pytest.skip(result.lacking[0])
    return result


def test_all_registers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    # The fast run has all sums, and of the other bits each 16th combination.
    others, legal = check_role._others, check_role._legal
    step = cases(16, 1)
    monkeypatch.setattr(check_role, "_others", lambda *regs, **more: islice(others(*regs, **more), 0, None, step))
    monkeypatch.setattr(check_role, "_legal", lambda **more: islice(legal(**more), 0, None, step))
    result = only("role", cases(1, 2))
    assert result.mismatches == 0, result
    # At least: without paging PE, WP, 5 bits of CR4 but LA57, PAE, LME, NXE; in long mode WP, 5 of CR4, NXE.
    assert result.compared >= 2**9 + 2**6
    assert any("extended roles" in text for text in result.lacking)


def test_the_sums_of_the_bits_that_matter() -> None:
    bases = list(check_role._bases())
    assert len(set(bases)) == len(bases) == 2**3 * 2**6 * 2**3
    known = [0, 0, 0]
    for base in bases:
        known = [bits | value for bits, value in zip(known, base, strict=True)]
    assert known == [sum(bits) for bits in check_role._ROLE_BITS]


def test_other_bits_are_single_and_of_all_three() -> None:
    base = (0x80000001, 0x20, 0xD00)
    every = set(check_role._others([base], every=True))
    # 64 of each register but those that a role depends on.
    assert len(every) == 3 * 64 - 3 - 6 - 3
    assert set(check_role._others([base], every=False)) == every
    for regs in every:
        assert sum((value ^ was).bit_count() for value, was in zip(regs, base, strict=True)) == 1
    without = (1, 0x100020, 0)
    assert len(set(check_role._others([without], every=True))) == len(every)
    assert list(check_role._others([without], every=False)) == []


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    # The sums alone.
    monkeypatch.setattr(check_role, "_others", lambda *_, **__: iter(()))
    monkeypatch.setattr(check_role, "_legal", lambda **_: iter(()))


@pytest.mark.parametrize("bit", [7, 8, 12, 13, 14, 15])
def test_a_wrong_bit_of_a_role_is_seen(bit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    real = role.root_pages

    def without(*args: Any) -> tuple[tuple[int, int, PageRole], ...]:
        return tuple((number, gfn, PageRole(page.word & ~(1 << bit))) for number, gfn, page in real(*args))

    monkeypatch.setattr(check_role, "root_pages", without)
    assert only("role").mismatches


def test_roots_that_the_model_lacks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    monkeypatch.setattr(check_role, "root_pages", lambda *_: ())
    result = only("role")
    assert result.mismatches == result.compared


def test_bits_that_are_confused_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    assert only("role").mismatches == 0
    monkeypatch.setattr(role, "_CR4_SMEP", role._CR4_SMAP)
    assert only("role").mismatches


def test_the_children_agree() -> None:
    result = only("role_children")
    # EFER.NXE, CR0.WP, 4 bits of CR4.  With 2 rights: root, 3 of the code, 2 + 4 + 8 tables, 4 * 4 large pages; with 4
    # rights 4 + 16 + 64 tables, 16 * 8 large pages.
    each = (4 + 2 + 4 + 8 + 16) + (4 + 4 + 16 + 64 + 128)
    assert (result.mismatches, result.compared, result.lacking) == (0, 2 * 16 * each, ()), result


def wrong_child(parent: PageRole, access: int, direct: bool, **more: Any) -> PageRole:
    return role.child_role(parent, access | 2, direct, **more)


def test_a_wrong_child_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_role, "child_role", wrong_child)
    assert only("role_children").mismatches


def types() -> CheckResult:
    need("btf")
    (result,) = run(["mmu_types"])
    if result.skipped:
        pytest.skip(result.lacking[0])
    return result


def test_the_types_agree() -> None:
    result = types()
    assert result.mismatches == 0, result
    # Fields of the three unions, and their sizes, are but a part.
    assert result.compared > 15 + 8 + 23 + 3


def test_a_wrong_type_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = role.EXTENDED_ROLE
    wrong = type(fewer)(fewer.title, fewer.width, (*fewer.members[1:], fewer.members[0])[:-1])
    monkeypatch.setattr(check_mmu_small, "EXTENDED_ROLE", wrong)
    assert types().mismatches == 1
    monkeypatch.setitem(check_mmu_small._FIELDS, "kvm_mmu", {"permissions": "u8[8]", "nothing": "u8"})
    assert types().mismatches == 3
    monkeypatch.setattr(check_mmu_small, "KVM_NR_MMU_TYPES", 7)
    assert types().mismatches >= 3
