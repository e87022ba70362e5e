"""The vectors: names, types, classes and error codes by the manual, and where the kernel has it otherwise."""

from __future__ import annotations

import pytest

from hvmodel.arch.vectors import (
    NR_EXCEPTIONS,
    ExceptionClass,
    ExceptionType,
    Vector,
    exception_class,
    exception_type,
    has_error_code,
    is_exception,
    is_soft,
    vector_name,
)

EXCEPTIONS = [vector for vector in range(32) if vector != 2]

# Intel SDM vol. 3 table 7-1: vector, mnemonic, type, whether it has an error code.
SDM = [
    (0, "DE", "fault", False),
    (1, "DB", "fault or trap", False),
    (3, "BP", "trap", False),
    (4, "OF", "trap", False),
    (5, "BR", "fault", False),
    (6, "UD", "fault", False),
    (7, "NM", "fault", False),
    (8, "DF", "abort", True),
    (10, "TS", "fault", True),
    (11, "NP", "fault", True),
    (12, "SS", "fault", True),
    (13, "GP", "fault", True),
    (14, "PF", "fault", True),
    (16, "MF", "fault", False),
    (17, "AC", "fault", True),
    (18, "MC", "abort", False),
    (19, "XM", "fault", False),
    (20, "VE", "fault", False),
    (21, "CP", "fault", True),
]
TYPES = {
    "fault": ExceptionType.FAULT,
    "trap": ExceptionType.TRAP,
    "abort": ExceptionType.ABORT,
    "fault or trap": ExceptionType.DEBUG,
}


@pytest.mark.parametrize(("vector", "name", "kind", "code"), SDM)
def test_vectors_are_those_of_the_manual(vector: int, name: str, kind: str, code: bool) -> None:
    assert Vector(vector).name == name
    assert vector_name(vector) == f"#{name}"
    assert exception_type(vector) is TYPES[kind]
    assert has_error_code(vector, cet=True) == code
    assert not has_error_code(vector, protected=False, cet=True)  # SDM 21.1.4: real mode pushes none


def test_no_other_vector_has_an_error_code_without_cet() -> None:
    assert {vector for vector in range(256) if has_error_code(vector)} == {8, 10, 11, 12, 13, 14, 17}


def test_what_is_no_exception() -> None:
    assert [vector for vector in range(256) if is_exception(vector)] == EXCEPTIONS
    assert not is_exception(-1)
    for vector in (2, 32, 255):
        assert exception_type(vector) is ExceptionType.INTERRUPT
    assert (vector_name(2), vector_name(15), vector_name(0x20)) == ("NMI", "exception 15", "interrupt 0x20")
    assert [vector for vector in range(256) if is_soft(vector)] == [3, 4]  # INT3, INTO


def test_classes() -> None:
    found: dict[str, set[int]] = {}
    for vector in EXCEPTIONS:
        found.setdefault(exception_class(vector).name, set()).add(vector)
    # SDM table 7-4, less #VE and #CP, which the kernel leaves benign.
    assert found.pop("CONTRIBUTORY") == {0, 10, 11, 12, 13}
    assert found.pop("PAGE_FAULT") == {14}
    assert found.pop("DOUBLE_FAULT") == {8}
    assert set(found) == {"BENIGN"}
    assert exception_class(255) is ExceptionClass.BENIGN


def test_numbers_are_the_kernels() -> None:
    # linux:arch/x86/kvm/x86.c: EXCPT_BENIGN, CONTRIBUTORY, PF; EXCPT_FAULT, TRAP, ABORT, INTERRUPT, DB.
    assert [(kind.name, int(kind)) for kind in ExceptionType] == [
        ("FAULT", 0),
        ("TRAP", 1),
        ("ABORT", 2),
        ("INTERRUPT", 3),
        ("DEBUG", 4),
    ]
    assert [(kind.name, int(kind)) for kind in ExceptionClass] == [
        ("BENIGN", 0),
        ("CONTRIBUTORY", 1),
        ("PAGE_FAULT", 2),
        ("DOUBLE_FAULT", 3),
    ]
    assert NR_EXCEPTIONS == 32


def test_vectors_that_only_amd_has() -> None:
    # AMD APM volume 2, table 8-1: 28 #HV, 29 #VC, 30 #SX; and those of the manual's table above, and the NMI.
    assert {int(vector): vector.name for vector in Vector} == {
        **{vector: name for vector, name, _, _ in SDM},
        2: "NMI",
        28: "HV",
        29: "VC",
        30: "SX",
    }
