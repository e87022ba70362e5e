"""The first 32 vectors: their names, what kind of event they are, and which push an error code.

KVM's own view, which is what happens in a guest of KVM; where the manuals differ the text says so.

Sources: linux:arch/x86/kvm/x86.c exception_class, exception_type, x86.h x86_exception_has_error_code,
kvm_exception_is_soft@v6.18; Intel SDM vol. 3 table 7-1 (exceptions and interrupts), 7-4 and 7-5 (double fault);
AMD APM vol. 2 table 8-1.
"""

from __future__ import annotations

from enum import IntEnum

from ..errors import ArgumentTypeError

__all__ = [
    "NR_EXCEPTIONS",
    "ExceptionClass",
    "ExceptionType",
    "Vector",
    "exception_class",
    "exception_type",
    "has_error_code",
    "is_exception",
    "is_soft",
    "vector_name",
]

NR_EXCEPTIONS = 32
"""Vectors below it are the processor's own; those from it on are for interrupts."""


class Vector(IntEnum):
    """The vectors that the processor itself uses, by the letters of the manuals' #DE, #DB, …

    >>> Vector.GP, vector_name(13)
    (<Vector.GP: 13>, '#GP')
    """

    DE = 0  # divide error
    DB = 1  # debug
    NMI = 2  # an interrupt, no exception
    BP = 3  # breakpoint, INT3
    OF = 4  # overflow, INTO
    BR = 5  # BOUND range
    UD = 6  # invalid opcode
    NM = 7  # no FPU
    DF = 8  # double fault
    TS = 10  # invalid TSS
    NP = 11  # segment not present
    SS = 12  # stack segment
    GP = 13  # general protection
    PF = 14  # page fault
    MF = 16  # x87 error
    AC = 17  # alignment check
    MC = 18  # machine check
    XM = 19  # SIMD error
    VE = 20  # virtualization (Intel)
    CP = 21  # control protection
    HV = 28  # hypervisor injection (AMD)
    VC = 29  # VMM communication (AMD)
    SX = 30  # security (AMD)


class ExceptionClass(IntEnum):
    """How an exception combines with one that comes while it is being delivered; see `merge`.

    KVM has the first three as EXCPT_BENIGN, EXCPT_CONTRIBUTORY and EXCPT_PF, and asks for #DF by its number.
    """

    BENIGN = 0
    CONTRIBUTORY = 1
    PAGE_FAULT = 2
    DOUBLE_FAULT = 3


class ExceptionType(IntEnum):
    """Whether the instruction is to be executed again (fault), is over (trap), or is lost (abort).

    #DB can be either, by what raised it: it has a type of its own.  KVM's EXCPT_FAULT, …, EXCPT_DB.
    """

    FAULT = 0
    TRAP = 1
    ABORT = 2
    INTERRUPT = 3
    DEBUG = 4


_CONTRIBUTORY = frozenset({Vector.DE, Vector.TS, Vector.NP, Vector.SS, Vector.GP})
_ERROR_CODE = frozenset({Vector.DF, Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.PF, Vector.AC})


def _checked(call: str, vector: object) -> int:
    if isinstance(vector, bool) or not isinstance(vector, int):
        raise ArgumentTypeError(call, "vector", vector, "an int")
    return vector


def is_exception(vector: int) -> bool:
    """Whether it can be in KVM's exception queue: 0 to 31, but not 2, the NMI."""
    return 0 <= _checked("is_exception", vector) < NR_EXCEPTIONS and vector != Vector.NMI


def exception_class(vector: int) -> ExceptionClass:
    """The class of an exception, as this kernel has it.

    #CP and #VE are benign for the kernel; for the SDM #CP is contributory, and #VE is as #PF.

    >>> exception_class(Vector.NP).name, exception_class(Vector.CP).name
    ('CONTRIBUTORY', 'BENIGN')
    """
    if _checked("exception_class", vector) == Vector.PF:
        return ExceptionClass.PAGE_FAULT
    if vector == Vector.DF:
        return ExceptionClass.DOUBLE_FAULT
    return ExceptionClass.CONTRIBUTORY if vector in _CONTRIBUTORY else ExceptionClass.BENIGN


def exception_type(vector: int) -> ExceptionType:
    """The type of a vector; reserved ones are faults, 2 and those above 31 interrupts."""
    if not is_exception(vector):
        return ExceptionType.INTERRUPT
    if vector == Vector.DB:
        return ExceptionType.DEBUG
    if vector in (Vector.BP, Vector.OF):
        return ExceptionType.TRAP
    return ExceptionType.ABORT if vector in (Vector.DF, Vector.MC) else ExceptionType.FAULT


def has_error_code(vector: int, *, protected: bool = True, cet: bool = False) -> bool:
    """Whether the exception pushes an error code.

    `protected`: CR0.PE; real mode pushes none.  `cet`: whether the guest has shadow stacks or branch tracking, without
    which there is no #CP.  AMD's #VC and #SX push one too, but KVM never raises them.

    >>> [vector_name(v) for v in range(32) if has_error_code(v)]
    ['#DF', '#TS', '#NP', '#SS', '#GP', '#PF', '#AC']
    """
    vector = _checked("has_error_code", vector)
    return bool(protected and (vector in _ERROR_CODE or (cet and vector == Vector.CP)))


def is_soft(vector: int) -> bool:
    """Whether KVM takes it for raised by an instruction, INT3 or INTO: KVM_GET_VCPU_EVENTS does not tell of those."""
    return vector in (Vector.BP, Vector.OF)


def vector_name(vector: int) -> str:
    """The manuals' name: "#GP", "NMI"; "exception 15" and "interrupt 0x20" for those that have none."""
    if _checked("vector_name", vector) in Vector._value2member_map_:
        name = Vector(vector).name
        return name if vector == Vector.NMI else f"#{name}"
    return f"exception {vector}" if is_exception(vector) else f"interrupt {vector:#x}"
