"""Answers to page faults and error codes: by the manual, by KVM's formats (check_mmu_types), by its statistics."""

from __future__ import annotations

import pytest

from hvmodel.errors import ArgumentError
from hvmodel.mmu import fault
from hvmodel.mmu.fault import (
    PFERR,
    PageFaultAnswer,
    decode_pfec,
    fault_stats,
    kvm_mmu_page_fault,
    pferr,
    ret_pf_codes,
    ret_pf_name,
)
from hvmodel.witness import check_mmu_small, run
from tests.need import need


def test_the_bits_of_error_codes() -> None:
    # Intel SDM volume 3, figure 5-12 and "Page-Fault Exceptions": the processor's; then those of AMD's nested faults.
    places = {
        "P": 0, "W": 1, "U": 2, "RSVD": 3, "F": 4, "PK": 5, "SS": 6, "SGX": 15, "GUEST_RMP": 31, "GUEST_FINAL": 32,
        "GUEST_PAGE": 33, "GUEST_ENC": 34, "GUEST_SIZEM": 35, "GUEST_VMPL": 36, "IMPLICIT": 48, "PRIVATE": 49,
    }  # fmt: skip
    assert {field.name: field.low for field in PFERR.members} == places
    assert {field.width for field in PFERR.members} == {1}
    for name, bit in places.items():
        assert pferr(name) == 1 << bit
        assert decode_pfec(1 << bit).set() == (name,)
    assert pferr("P", "W", "U") == 7
    assert pferr() == 0
    with pytest.raises(ArgumentError, match="field='X'"):
        pferr("X")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (0x8, "RSVD without P"),
        (0x20, "PK without P"),
        (0x31, "PK with F"),
        (0x12, "W with F"),
        (0x300000001, "GUEST_FINAL with GUEST_PAGE"),
        (0x80, "bit 7 is reserved"),
    ],
)
def test_problems_of_error_codes(code: int, said: str) -> None:
    problems = decode_pfec(code).problems
    assert len(problems) == 1, problems
    assert said in problems[0]


@pytest.mark.parametrize("code", [0, 0x1, 0x2, 0x3, 0x7, 0x9, 0x11, 0x21, 0x100000001, 0x200000001, 0x10])
def test_error_codes_that_there_are(code: int) -> None:
    assert decode_pfec(code).problems == ()


def test_error_codes_have_64_bits() -> None:
    with pytest.raises(ArgumentError, match="decode_pfec: code="):
        decode_pfec(1 << 64)


def test_answers_by_version() -> None:
    # enum RET_PF_* as in mmu_internal.h of Linux 6.1 to 6.8, and of 6.12 to 6.18.
    old = ["CONTINUE", "RETRY", "EMULATE", "INVALID", "FIXED", "SPURIOUS"]
    new = ["CONTINUE", "RETRY", "EMULATE", "WRITE_PROTECTED", "INVALID", "FIXED", "SPURIOUS"]
    for version, names in (("5.19", old), ("6.6", old), ("6.11", old), ("6.12", new), ("6.18.44", new)):
        assert ret_pf_codes(version) == {f"RET_PF_{name}": code for code, name in enumerate(names)}
        for code, name in enumerate(names):
            assert ret_pf_name(code, version) == f"RET_PF_{name}"
        with pytest.raises(ArgumentError, match="ret_pf_name: code="):
            ret_pf_name(len(names), version)
    for name, code in ret_pf_codes().items():
        assert getattr(fault, name) == code
    for version in ("5.18", "4.19", "x"):
        with pytest.raises(ArgumentError, match="ret_pf_codes: version="):
            ret_pf_codes(version)


def test_what_an_answer_counts() -> None:
    # kvm_mmu_page_fault: pf_taken for each, and one more for three of the answers.
    assert fault_stats(fault.RET_PF_RETRY) == {"pf_taken": 1}
    assert fault_stats(fault.RET_PF_FIXED) == {"pf_taken": 1, "pf_fixed": 1}
    assert fault_stats(fault.RET_PF_EMULATE) == {"pf_taken": 1, "pf_emulate": 1}
    assert fault_stats(fault.RET_PF_SPURIOUS) == {"pf_taken": 1, "pf_spurious": 1}
    assert fault_stats(fault.RET_PF_WRITE_PROTECTED) == {"pf_taken": 1, "pf_emulate": 1}
    assert fault_stats(fault.RET_PF_WRITE_PROTECTED, write_protected=fault.RET_PF_RETRY) == {"pf_taken": 1}
    for answer in (fault.RET_PF_CONTINUE, fault.RET_PF_INVALID, 7):
        with pytest.raises(ArgumentError, match="fault_stats: answer="):
            fault_stats(answer)
    with pytest.raises(ArgumentError, match="write_protected="):
        fault_stats(fault.RET_PF_WRITE_PROTECTED, write_protected=fault.RET_PF_FIXED)
    # fast_page_fault counts pf_fast, and kvm_mmu_page_fault the rest as of any other answer.
    assert fault_stats(fault.RET_PF_FIXED, fast=True) == {"pf_taken": 1, "pf_fast": 1, "pf_fixed": 1}
    assert fault_stats(fault.RET_PF_SPURIOUS, fast=True) == {"pf_taken": 1, "pf_fast": 1, "pf_spurious": 1}
    for answer in (fault.RET_PF_RETRY, fault.RET_PF_EMULATE, fault.RET_PF_WRITE_PROTECTED):
        with pytest.raises(ArgumentError, match="fast_page_fault gives no other"):
            fault_stats(answer, fast=True)


MMIO, WALK, TRACK = "handle_mmio_page_fault", "walk_addr", "page_track"
FAST, PFN, STALE, MAP = "fast_page_fault", "kvm_mmu_faultin_pfn", "is_page_fault_stale", "map"
PROTECT, EMULATE = "kvm_mmu_write_protect_fault", "x86_emulate_instruction"

# The ways through kvm_mmu_page_fault as mmu.c and paging_tmpl.h have them: what the steps answer -> the last answer,
# what is counted, the steps that are reached.
WAYS: list[tuple[dict[str, int], str, tuple[str, ...], tuple[str, ...]]] = [
    ({}, "FIXED", ("pf_taken", "pf_fixed"), (WALK, TRACK, PFN, STALE, MAP)),
    ({"walks": 0}, "RETRY", ("pf_taken", "pf_guest"), (WALK,)),
    ({"tracked": 1}, "EMULATE", ("pf_taken", "pf_emulate"), (WALK, TRACK, PROTECT, EMULATE)),
    ({"tracked": 1, "write_protected": 1}, "RETRY", ("pf_taken",), (WALK, TRACK, PROTECT)),
    ({"faultin": 1}, "RETRY", ("pf_taken",), (WALK, TRACK, PFN)),
    ({"faultin": 2}, "EMULATE", ("pf_taken", "pf_emulate"), (WALK, TRACK, PFN, EMULATE)),
    ({"stale": 1}, "RETRY", ("pf_taken",), (WALK, TRACK, PFN, STALE)),
    ({"mapped": 6}, "SPURIOUS", ("pf_taken", "pf_spurious"), (WALK, TRACK, PFN, STALE, MAP)),
    ({"mapped": 1}, "RETRY", ("pf_taken",), (WALK, TRACK, PFN, STALE, MAP)),
    ({"mapped": 2}, "EMULATE", ("pf_taken", "pf_emulate"), (WALK, TRACK, PFN, STALE, MAP, EMULATE)),
    ({"mapped": 3}, "EMULATE", ("pf_taken", "pf_emulate"), (WALK, TRACK, PFN, STALE, MAP, PROTECT, EMULATE)),
    ({"direct": 1}, "FIXED", ("pf_taken", "pf_fixed"), (TRACK, FAST, PFN, STALE, MAP)),
    ({"direct": 1, "tracked": 1}, "EMULATE", ("pf_taken", "pf_emulate"), (TRACK, PROTECT, EMULATE)),
    ({"direct": 1, "fast": 5}, "FIXED", ("pf_taken", "pf_fast", "pf_fixed"), (TRACK, FAST)),
    ({"direct": 1, "fast": 6}, "SPURIOUS", ("pf_taken", "pf_fast", "pf_spurious"), (TRACK, FAST)),
    ({"mmio": 2}, "EMULATE", (), (MMIO, EMULATE)),
    ({"mmio": 1}, "RETRY", (), (MMIO,)),
    ({"mmio": 4, "direct": 1}, "FIXED", ("pf_taken", "pf_fixed"), (MMIO, TRACK, FAST, PFN, STALE, MAP)),
]


@pytest.mark.parametrize(("facts", "answer", "stats", "steps"), WAYS)
def test_the_ways_of_a_fault(
    facts: dict[str, int], answer: str, stats: tuple[str, ...], steps: tuple[str, ...]
) -> None:
    code = getattr(fault, f"RET_PF_{answer}")
    assert kvm_mmu_page_fault(**facts) == PageFaultAnswer(code, stats, steps)  # type: ignore[arg-type]


def test_a_step_has_its_own_answers() -> None:
    answers = {"mmio": {1, 2, 4}, "fast": {4, 5, 6}, "faultin": {0, 1, 2}, "mapped": {1, 2, 3, 5, 6}}
    answers |= {"write_protected": {1, 2}}
    for field, good in answers.items():
        for code in range(-1, 8):
            facts = {field: code, "direct": 1}
            if code in good:
                kvm_mmu_page_fault(**facts)  # type: ignore[arg-type]
                continue
            with pytest.raises(ArgumentError, match=f"kvm_mmu_page_fault: {field}="):
                kvm_mmu_page_fault(**facts)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"walks=.*no guest tables"):
        kvm_mmu_page_fault(direct=True, walks=False)
    with pytest.raises(ArgumentError, match=r"fast=.*direct root"):
        kvm_mmu_page_fault(fast=fault.RET_PF_FIXED)


def only(cases: int) -> tuple[int, int]:
    need("kvm")
    (result,) = run(["fault_stats"], cases=cases)
    if result.skipped:
        pytest.skip(result.lacking[0])
    return result.compared, result.mismatches


def test_the_kernel_counts_the_same() -> None:
    compared, mismatches = only(400)
    assert compared >= 400
    assert mismatches == 0
    # Every answer that one guest alone can bring about is among the accesses; RET_PF_SPURIOUS takes two vCPUs.
    facts = [kind.fault for kind in check_mmu_small._KINDS if kind.fault is not None]
    answers = {kvm_mmu_page_fault(**fact).answer for fact in facts}  # type: ignore[arg-type]
    assert answers == {fault.RET_PF_RETRY, fault.RET_PF_EMULATE, fault.RET_PF_FIXED}
    assert len(facts) < len(check_mmu_small._KINDS)  # and accesses that make no fault


def test_the_check_sees_a_wrong_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fault._STATS, fault.RET_PF_FIXED, "pf_spurious")
    assert only(100)[1]
