"""Answers to page faults and error codes: by the manual, by KVM's formats (check_mmu_types), by its statistics."""

from __future__ import annotations

import pytest

from hvmodel.errors import ArgumentError
from hvmodel.mmu import fault
from hvmodel.mmu.fault import PFERR, decode_pfec, fault_stats, pferr, ret_pf_codes, ret_pf_name
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
    # enum RET_PF_* of Linux 6.6 and of 6.12.
    old = ["CONTINUE", "RETRY", "EMULATE", "INVALID", "FIXED", "SPURIOUS"]
    new = ["CONTINUE", "RETRY", "EMULATE", "WRITE_PROTECTED", "INVALID", "FIXED", "SPURIOUS"]
    for version, names in (("5.18", old), ("6.6", old), ("6.11", old), ("6.12", new), ("6.18.44", new)):
        assert ret_pf_codes(version) == {f"RET_PF_{name}": code for code, name in enumerate(names)}
        for code, name in enumerate(names):
            assert ret_pf_name(code, version) == f"RET_PF_{name}"
        with pytest.raises(ArgumentError, match="ret_pf_name: code="):
            ret_pf_name(len(names), version)
    for name, code in ret_pf_codes().items():
        assert getattr(fault, name) == code
    for version in ("5.17", "4.19", "x"):
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
    answers = {answer for kind in check_mmu_small._KINDS for answer in kind.answers}
    assert answers == {fault.RET_PF_RETRY, fault.RET_PF_EMULATE, fault.RET_PF_FIXED}


def test_the_check_sees_a_wrong_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fault._STATS, fault.RET_PF_FIXED, "pf_spurious")
    assert only(100)[1]
