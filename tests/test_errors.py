"""Every error: what it keeps, what it prints, and that it survives pickling and copying."""

from __future__ import annotations

import copy
import errno
import pickle
from typing import Any

import pytest

from hvmodel import errors
from hvmodel.errors import (
    ArgumentError,
    ArgumentTypeError,
    BuildError,
    BusyError,
    ClosedError,
    ForkedError,
    GuestAccessError,
    HostError,
    HvError,
    KvmError,
    PartialError,
    UnansweredError,
    UnsupportedError,
    VmDeadError,
)

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
    VmDeadError(errno.EIO, "KVM_RUN", None, None, "close", "KVM has marked this VM dead"),
    ForkedError(errno.EIO, "KVM_RUN", None, None, "a VM made by this process", "process 7 made it"),
    PartialError(errno.EINVAL, "KVM_SET_MSRS", 3, 9, 0xC0000081, "index"),
    GuestAccessError("port", 0x60, 1, 1, False, b"", 0xF000, 0xFFF0, b"\xe4\x60"),
    GuestAccessError("address", 0xA0000, 4, 1, True, b"\1\2\3\4", 0, 0x7C00, b""),
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


def test_values_of_wrong_types_are_kept_as_text() -> None:
    # An object of any type would not pickle.
    assert ArgumentTypeError("call", "field", lambda: None, "an int").value.startswith("<function")
    assert ArgumentTypeError("call", "field", 1.5, "an int").value == 1.5
