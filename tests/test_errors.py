"""Every error: what it keeps, what it prints, and that it survives pickling and copying."""

from __future__ import annotations

import copy
import errno
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from hvmodel import errors
from hvmodel._ffi import ffi
from hvmodel.errors import (
    ArgumentError,
    ArgumentTypeError,
    BuildError,
    BusyError,
    ChangedStateError,
    ClosedError,
    ForkedError,
    GuestAccessError,
    HostError,
    HvError,
    KvmError,
    PartialError,
    RefusedStateError,
    UnansweredError,
    UnqualifiedError,
    UnsupportedError,
    VmDeadError,
)


class Refuses:
    """Neither pickles nor has a repr."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("no")


class Number(int):
    """An int that does not pickle."""

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("no")


# What callers hand in by mistake, of which some does not pickle, and some changes later.
ODD = [
    lambda: 0,
    Refuses(),
    Refuses,
    Number(3),
    Number(77),
    ffi.new("struct kvm_regs *"),
    ffi.NULL,
    memoryview(b"x"),
    bytearray(b"x"),
    [1, [2]],
    {"a": object()},
    (i for i in ""),
    (1, (lambda: 0, "x")),
    1j,
]
MAKERS: list[Callable[[object], Exception]] = [
    lambda value: ArgumentError("Machine", "ram", value, "an int"),
    lambda value: ArgumentTypeError("Machine", "ram", value, "an int"),
    lambda value: HostError(errno.EINVAL, "mmap", "fd", value),
    lambda value: KvmError(errno.EINVAL, "KVM_SET_MSRS", "index", value, "a number"),
    lambda value: PartialError(errno.EINVAL, "KVM_SET_MSRS", 0, 1, value, "index"),
    lambda value: RefusedStateError(errno.EINVAL, "KVM_SET_SREGS2", "sregs", "cr4", value, "a number"),
    lambda value: ChangedStateError("KVM_SET_SREGS2", "sregs", "cr0", value, value),
]

EXAMPLES: list[Exception] = [
    HvError("anything"),
    ArgumentError("Machine", "ram", 5, "a multiple of 4096 bytes", "too small"),
    ArgumentError("Machine", "ram", b"x" * 300),
    ArgumentTypeError("Machine", "ram", object(), "an int"),
    ArgumentTypeError("Machine", "ram", None, "an int"),
    BuildError("hvmodel's extension is not built"),
    BusyError("Vcpu.run", "<Vcpu 0 fd=5>", "another thread runs it"),
    ClosedError("Vm.fd", "<Vm closed>"),
    UnansweredError("KVM_RUN", "IoIn(port=0x60, size=1, count=1)"),
    HostError(errno.ENOENT, "open", "path", "/dev/kvm", None, "KVM is not loaded"),
    HostError(errno.EBADF, "dup"),
    KvmError(errno.EINVAL, "KVM_CREATE_VCPU", "id", 5000, "0 to 4095"),
    UnsupportedError(errno.ENOTTY, "KVM_SMI", "KVM_CAP_X86_SMM", None, None, "this kernel does not have it"),
    UnqualifiedError("add_breakpoint", "long", "software", "Shutdown()", ("step", "hlt")),
    UnqualifiedError("step", "long-user", "step", "no stop"),
    VmDeadError(errno.EIO, "KVM_RUN", None, None, "close", "KVM has marked this VM dead"),
    ForkedError(errno.EIO, "KVM_RUN", None, None, "a VM made by this process", "process 7 made it"),
    PartialError(errno.EINVAL, "KVM_SET_MSRS", 3, 9, 0xC0000081, "index"),
    GuestAccessError("port", 0x60, 1, 1, False, b"", 0xF000, 0xFFF0, b"\xe4\x60"),
    GuestAccessError("address", 0xA0000, 4, 1, True, b"\1\2\3\4", 0, 0x7C00, b""),
    GuestAccessError("address", 0xA0000, 1, 1, True, b"\1", 0, 0x7C05, b"\xf4", False, b"\xa2\x00\x00"),
    RefusedStateError(
        errno.EINVAL, "KVM_SET_SREGS2", "sregs", "cr4", 1 << 40, "bits of 0x7ffef", "bit 40 is reserved", "cr4-reserved"
    ),
    RefusedStateError(errno.EINVAL, "KVM_SET_LAPIC", "lapic"),
    ChangedStateError("KVM_SET_SREGS2", "sregs", "cr0", 0x80000011, 0x11, "CR0.PG was dropped", "cr0-pg-dropped"),
    ChangedStateError("KVM_SET_SREGS2", "sregs", "cr0", 0x80000011, 0x11),
    *(make(value) for value in ODD for make in MAKERS),
]

ids = [f"{type(error).__name__}-{at}" for at, error in enumerate(EXAMPLES)]


def test_every_error_has_an_example() -> None:
    public = {getattr(errors, name) for name in errors.__all__}
    assert {type(error) for error in EXAMPLES} == public
    assert all(issubclass(kind, HvError) for kind in public)


def same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    assert str(one) == str(other)
    assert vars(one) == vars(other)
    assert one.args == other.args
    assert getattr(one, "errno", None) == getattr(other, "errno", None)
    assert getattr(one, "strerror", None) == getattr(other, "strerror", None)


@pytest.mark.parametrize("error", EXAMPLES, ids=ids)
def test_errors_survive_pickling(error: Exception) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        same(pickle.loads(pickle.dumps(error, protocol)), error)


@pytest.mark.parametrize("error", EXAMPLES, ids=ids)
def test_errors_survive_copying(error: Exception) -> None:
    same(copy.copy(error), error)
    same(copy.deepcopy(error), error)


def test_errors_are_also_python_s_own() -> None:
    for kind, also in (
        (ArgumentError, ValueError),
        (ArgumentTypeError, TypeError),
        (ClosedError, ValueError),
        (BuildError, ImportError),
        (HostError, OSError),
        (KvmError, OSError),
    ):
        assert issubclass(kind, also)
    for kind in (UnsupportedError, VmDeadError, ForkedError, PartialError):
        assert issubclass(kind, KvmError)


def test_a_refused_call_prints_all_it_knows() -> None:
    error = KvmError(errno.EINVAL, "KVM_CREATE_VCPU", "id", 5000, "0 to 4095", "beyond the limit")
    assert str(error) == (
        "KVM_CREATE_VCPU: id=0x1388: beyond the limit; accepted: 0 to 4095 [EINVAL: Invalid argument]"
    )
    assert (error.ioctl, error.errno, error.strerror) == ("KVM_CREATE_VCPU", errno.EINVAL, "Invalid argument")
    assert str(KvmError(errno.EIO, "KVM_RUN")) == "KVM_RUN [EIO: Input/output error]"
    assert str(HostError(9999, "open")) == "open [9999: Unknown error 9999]"


def test_the_capability_of_what_is_unsupported() -> None:
    assert UnsupportedError(errno.ENOTTY, "KVM_SMI", "KVM_CAP_X86_SMM").capability == "KVM_CAP_X86_SMM"
    assert UnsupportedError(errno.ENOTTY, "KVM_X").capability is None


def test_long_values_are_cut() -> None:
    assert len(str(ArgumentError("call", "field", "x" * 10_000))) < 200


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_no_plain_value_is_kept_as_text(make: Callable[[object], Any]) -> None:
    # An object of any type would not pickle, and a list may change.
    function = make(lambda: None)
    assert isinstance(function.value, str)
    assert function.value.startswith("<function")
    assert str(function.value) in str(function)
    plain: object
    for plain in (None, True, 5, 1 << 70, 1.5, "text", b"bytes", (1, "two", (b"three",))):
        assert make(plain).value == plain
    parts = [1]
    error = make(parts)
    said = str(error)
    parts.append(2)
    assert (error.value, str(error)) == ("[1]", said)
    assert make((1, parts)).value == (1, "[1, 2]")


def test_where_the_guest_was() -> None:
    # A write to memory, `mov [0], al`, that KVM has finished; and an `in al, 0x60`.
    write = str(GuestAccessError("address", 0xA0000, 1, 1, True, b"\1", 0, 0x7C05, b"\xf4", False, b"\xa2\x00\x00"))
    assert "wrote 01 to address 0xa0000 (1 x 1 bytes), which nobody claims, behind the instruction, " in write
    assert "at CS:IP 0000:7c05 (bytes before it: a2 00 00);" in write
    read = str(GuestAccessError("port", 0x60, 1, 1, False, b"", 0xF000, 0xFFF0, b"\xe4\x60"))
    assert "which nobody claims, at CS:IP f000:fff0 (instruction bytes: e4 60);" in read
