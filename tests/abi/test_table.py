"""native/kvm_ioctl.tbl against the running kernel: which kind of fd takes which request."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvmodel._ffi import IOCTLS, lib
from tests.need import need

TABLE = Path(__file__).parents[2] / "native" / "kvm_ioctl.tbl"
SCOPES = ("system", "vm", "vcpu", "device")

# Requests that the table keeps although no kernel in use serves them.
GONE = {"KVM_SET_MEMORY_REGION", "KVM_GET_NR_MMU_PAGES"}

# Requests that look at the VM before they look at their argument, or that only some vendors' modules serve.
LATE = {
    "KVM_SET_IDENTITY_MAP_ADDR",  # EINVAL: there is a vCPU
    "KVM_GET_LAPIC",  # EINVAL: no local APIC in the kernel
    "KVM_SET_LAPIC",
    "KVM_SET_VAPIC_ADDR",
    "KVM_GET_PIT2",  # ENXIO: no PIT
    "KVM_MEMORY_ENCRYPT_OP",  # ENOTTY: neither SEV nor TDX; they have no capability of their own
    "KVM_MEMORY_ENCRYPT_REG_REGION",
    "KVM_MEMORY_ENCRYPT_UNREG_REGION",
    "KVM_GET_NESTED_STATE",
    "KVM_SET_NESTED_STATE",
    "KVM_IRQ_LINE",
    "KVM_GET_IRQCHIP",
    "KVM_SET_IRQCHIP",
    "KVM_IRQ_LINE_STATUS",
}

# What the kernel answers to a request that an fd of this kind does not know.
UNKNOWN = {"system": errno.EINVAL, "vm": errno.ENOTTY, "vcpu": errno.EINVAL}


def ioctl(fd: int, request: int, argument: int) -> int:
    """What the kernel answers: >= 0, or -errno.  `argument` is passed as it is."""
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        return -(error.errno or 0)


@pytest.fixture
def fds() -> Iterator[dict[str, int]]:
    need("kvm")
    system = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    vm = fcntl.ioctl(system, IOCTLS["KVM_CREATE_VM"].request, 0)
    vcpu = fcntl.ioctl(vm, IOCTLS["KVM_CREATE_VCPU"].request, 0)
    yield {"system": system, "vm": vm, "vcpu": vcpu}
    for fd in (vcpu, vm, system):
        os.close(fd)


@pytest.mark.parametrize("scope", list(UNKNOWN))
def test_no_other_kind_of_fd_takes_a_request(scope: str, fds: dict[str, int]) -> None:
    for name, row in IOCTLS.items():
        if scope not in row.scope:
            answer = ioctl(fds[scope], row.request, 1)  # address 1 cannot be read
            assert answer == -UNKNOWN[scope], f"{name} on a {scope} fd"


def test_a_vm_and_a_vcpu_know_the_requests_of_their_scope(fds: dict[str, int]) -> None:
    # EFAULT at address 1 shows that the request is known; without a pointer, any answer but ENOTTY shows it on a vm.
    for name, row in IOCTLS.items():
        for scope in {"vm", "vcpu"} & set(row.scope):
            if name in GONE or row.argument in ("-", "ulong") or lacks(fds, row.capability):
                continue
            answer = ioctl(fds[scope], row.request, 1)
            if answer != -errno.EFAULT:
                assert name in LATE, f"{name} on a {scope} fd: {answer}"


def lacks(fds: dict[str, int], capability: str | None) -> bool:
    """Whether the kernel says that it does not have a capability."""
    check = IOCTLS["KVM_CHECK_EXTENSION"].request
    return capability is not None and ioctl(fds["vm"], check, getattr(lib, capability)) <= 0


@pytest.mark.parametrize("name", sorted(GONE))
def test_what_is_gone_is_unknown_to_a_vm(name: str, fds: dict[str, int]) -> None:
    assert ioctl(fds["vm"], IOCTLS[name].request, 1) == -errno.ENOTTY


def test_rows_stand_by_scope_then_number() -> None:
    rows = [line.split() for line in TABLE.read_text().splitlines() if line and not line.startswith("#")]
    keys = [(SCOPES.index(row[2].split(",")[0]), int(row[0], 16), row[3]) for row in rows]
    assert keys == sorted(keys)


def test_every_returned_fd_is_known_to_be_one() -> None:
    # By api.rst: these four make a file descriptor and return it; KVM_CREATE_DEVICE puts it into its argument.
    assert {name for name, row in IOCTLS.items() if row.returns == "fd"} == {
        "KVM_CREATE_VM",
        "KVM_CREATE_VCPU",
        "KVM_GET_STATS_FD",
        "KVM_CREATE_GUEST_MEMFD",
    }


def test_every_count_is_known_to_be_one() -> None:
    # By api.rst: "number of msrs successfully returned", "... set".
    assert {name for name, row in IOCTLS.items() if row.returns == "count"} == {"KVM_GET_MSRS", "KVM_SET_MSRS"}


def test_count_of_rows(capsys: pytest.CaptureFixture[str]) -> None:
    by_scope = {scope: sum(scope in row.scope for row in IOCTLS.values()) for scope in SCOPES}
    with capsys.disabled():
        print(f"\nioctls: {len(IOCTLS)} rows: {by_scope}", end="")
    assert len(IOCTLS) >= 104
