"""The checks of roles and of the kernel's types: all agree here, and they see models that are wrong."""

from __future__ import annotations

from functools import cache
from itertools import islice
from typing import Any

import pytest

from hvmodel.mmu import role
from hvmodel.mmu.role import PageRole, tdp_root_role
from hvmodel.witness import CheckResult, check_mmu_small, check_role, run
from hvmodel.witness.btf import Btf
from hvmodel.witness.result import Tally
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


class TdpGuest:
    # What check_role needs of a guest on a host with EPT: a root, and tables below it, once.
    tdp_role = tdp_root_role(4)

    def __init__(self, *cases: list[tuple[int, int]]) -> None:
        self.cases = list(cases)

    def put(self, regs: tuple[int, int, int], _cr3: int) -> tuple[int, int, int]:
        return regs

    def run(self, **_regs: int) -> int:
        return 1

    def seen(self, runs: list[int]) -> tuple[list[list[tuple[int, int]]], None]:
        return self.cases[: len(runs)], None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], ""),
        ([(0x40000, 0x3782)], ""),
        ([(0x40000, 0x13783)], "the model has"),
        ([(0x40200, 0x3782)], "no table of this level begins"),
        ([(0x200, 0x3784)], "no table of this level begins"),
    ],
)
def test_with_ept_only_tables_that_are_seen_count(more: list[tuple[int, int]], said: str) -> None:
    tree = [(0, 0x3784), (0, 0x3783), (0, 0x3782), (0, 0x3781)]
    tally = Tally("roles", "the trace")
    a_run = check_role._Run(tally, TdpGuest(tree, [], [], more))  # type: ignore[arg-type]
    for _ in range(4):
        assert a_run.case((0x80000001, 0x20, 0xD00))
    a_run.compare()
    a_run.say_what_was_lacking()
    result = tally.result()
    assert (result.compared, result.mismatches) == (4 + len(more), int(bool(said)))
    assert said in "".join(result.examples)
    assert any("EPT or NPT has one root" in text for text in result.lacking)


@cache
def kernel_types() -> Btf:
    return Btf.for_module("kvm")


@pytest.fixture(autouse=True)
def one_btf(monkeypatch: pytest.MonkeyPatch) -> None:
    # Read and indexed once for all tests here: half a second each else.
    monkeypatch.setattr(check_mmu_small, "_btf", kernel_types)


def types() -> CheckResult:
    need("btf", "root", "tracefs")
    (result,) = run(["mmu_types"])
    if result.skipped:
        pytest.skip(result.lacking[0])
    return result


def test_the_types_agree() -> None:
    result = types()
    assert result.mismatches == 0, result
    # At least: fields and sizes of the three unions; of formats 8 bits, 8 rights, 2 answers.
    assert result.compared >= 15 + 8 + 23 + 3 + 8 + 8 + 2
    assert not [text for text in result.lacking if "format" in text]


def test_a_type_that_an_older_kernel_has_not_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check_mmu_small._FIELDS, "kvm_mmu", {"nothing": "u8"})
    assert types().mismatches == 1
    monkeypatch.setattr(check_mmu_small, "_MODELLED", (99, 0))
    result = types()
    assert result.mismatches == 0
    assert "type of kvm_mmu.nothing: this kernel has none" in result.lacking


def test_formats_that_are_not_known_are_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_mmu_small, "_formats", lambda: iter(()))
    assert len([text for text in types().lacking if "not of the form" in text]) == 3


def test_a_wrong_type_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = role.EXTENDED_ROLE
    wrong = type(fewer)(fewer.title, fewer.width, (*fewer.members[1:], fewer.members[0])[:-1])
    monkeypatch.setattr(check_mmu_small, "EXTENDED_ROLE", wrong)
    assert types().mismatches == 1
    monkeypatch.setitem(check_mmu_small._FIELDS, "kvm_mmu", {"permissions": "u8[8]", "nothing": "u8"})
    assert types().mismatches == 3
    monkeypatch.setattr(check_mmu_small, "KVM_NR_MMU_TYPES", 7)
    assert types().mismatches >= 3
