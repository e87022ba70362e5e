"""guest_memfd: memory that is the VM's own file, seen from the host and from a guest."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from hvmodel._ffi import lib
from hvmodel.errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, HostError, KvmError
from hvmodel.host import PROT_READ, Mapping, ViewError
from hvmodel.kvm import GuestMemFd, IoOut, Kvm, Vm
from hvmodel.kvm.guest_memfd import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP
from tests.need import need_cap

PAGE = 4096
SIZE = 16 * PAGE
SHARED = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED


@pytest.fixture(autouse=True)
def _has_it(kvm: Kvm) -> None:
    need_cap(kvm, "GUEST_MEMFD")


@pytest.fixture
def shared(kvm: Kvm, vm: Vm) -> Iterator[GuestMemFd]:
    if kvm.check_extension(lib.KVM_CAP_GUEST_MEMFD_FLAGS) & SHARED != SHARED:
        pytest.skip("needs GUEST_MEMFD_FLAG_INIT_SHARED, Linux 6.18")
    with GuestMemFd(vm, SIZE, SHARED) as memory:
        yield memory


def test_it_is_what_the_kernel_shows(vm: Vm) -> None:
    with GuestMemFd(vm, "64K") as memory:
        assert (memory.size, memory.flags, memory.vm) == (SIZE, 0, vm)
        assert "kvm-gmem" in os.readlink(f"/proc/self/fd/{memory.fd}")
        assert os.fstat(memory.fileno()).st_size == SIZE
        fd = memory.fd
    with pytest.raises(OSError):
        os.fstat(fd)
    memory.close()
    assert repr(memory) == "<GuestMemFd closed>"
    for call in (lambda: memory.fd, memory.fileno, memory.mapping, memory.allocate, memory.punch):
        with pytest.raises(ClosedError):
            call()


def test_private_memory_cannot_be_mapped(vm: Vm) -> None:
    with GuestMemFd(vm, SIZE) as memory:
        with pytest.raises(HostError) as caught:
            memory.mapping()
        assert (caught.value.errno, caught.value.field) == (errno.ENODEV, "flags")
        with pytest.raises(OSError) as kernel:  # the kernel says so too
            Mapping(memory.fd, SIZE)
        assert kernel.value.errno == errno.ENODEV


def test_it_cannot_be_mapped_privately(shared: GuestMemFd) -> None:
    with pytest.raises(HostError) as caught:
        Mapping(shared.fd, PAGE, shared=False)
    assert (caught.value.call, caught.value.errno, caught.value.field) == ("mmap", errno.EINVAL, "shared")


def test_what_is_not_shared_is_no_sigbus(kvm: Kvm, vm: Vm) -> None:
    if not kvm.check_extension(lib.KVM_CAP_GUEST_MEMFD_FLAGS) & GUEST_MEMFD_FLAG_MMAP:
        pytest.skip("needs GUEST_MEMFD_FLAG_MMAP, Linux 6.18")
    with GuestMemFd(vm, SIZE, GUEST_MEMFD_FLAG_MMAP) as memory, memory.mapping() as mapping:
        for access in (lambda: mapping.read(0, 1), lambda: mapping.write(0, b"x")):
            with pytest.raises(HostError) as caught:
                access()
            assert caught.value.errno == errno.EFAULT
        with pytest.raises(ViewError):
            mapping.view()


def test_bytes_holes_and_mappings(shared: GuestMemFd) -> None:
    with shared.mapping() as mapping, shared.mapping(PAGE, PAGE, prot=PROT_READ) as part:
        assert mapping.read(0, 8) == bytes(8)
        mapping.write(PAGE, b"second")
        assert part.read(0, 6) == b"second"
        before = os.fstat(shared.fd).st_blocks
        shared.allocate()
        assert mapping.read(PAGE, 6) == b"second"
        shared.punch(PAGE, PAGE)
        assert mapping.read(PAGE, 6) == bytes(6)
        shared.punch()
        assert os.fstat(shared.fd).st_blocks <= before
        with pytest.raises(HostError):
            part.write(0, b"x")


@pytest.mark.parametrize("flags", [0, SHARED])
def test_a_guest_runs_in_it(vm: Vm, shared: GuestMemFd, flags: int) -> None:
    # mov al, [0x2000]; out 0x10, al; mov byte [0x3000], 'W'; hlt
    code = bytes.fromhex("a00020 e610 c606003057 f4")
    with shared.mapping() as mapping:
        slot = shared.bind(3, 0, mapping)
        assert (slot.slot, slot.gpa, slot.size, slot.guest_memfd) == (3, 0, SIZE, shared.fd)
        vm.set_tss_addr(0xFFFBD000)
        mapping.write(0x1000, code)
        mapping.write(0x2000, b"R")
        with vm.create_vcpu(0) as vcpu:
            sregs = vcpu.sregs
            sregs.cs.base = sregs.cs.selector = 0
            vcpu.sregs = sregs
            regs = vcpu.regs
            regs.rip, regs.rflags = 0x1000, 2
            vcpu.regs = regs
            assert vcpu.run() == IoOut(0x10, 1, 1, b"R")
            vcpu.run()
            assert mapping.read(0x3000, 1) == b"W"
        for busy in (shared.close, mapping.close):
            with pytest.raises(BusyError, match="memslot 3"):
                busy()
        vm.delete_memory_region(3)


def test_a_part_of_it_in_a_slot(vm: Vm, shared: GuestMemFd) -> None:
    with shared.mapping(4 * PAGE) as mapping:
        shared.bind(0, 0x100000, mapping, offset=4 * PAGE, size=8 * PAGE)
        assert vm.memslots[0].guest_memfd_offset == 4 * PAGE
        with pytest.raises(KvmError) as caught:
            shared.bind(1, 0x200000, mapping, offset=5 * PAGE, size=PAGE)
        assert (caught.value.errno, caught.value.field) == (errno.EINVAL, "guest_memfd_offset")
        vm.delete_memory_region(0)


def test_closing_the_vm_lets_go(kvm: Kvm, vm: Vm, shared: GuestMemFd) -> None:
    mapping = shared.mapping()
    shared.bind(0, 0, mapping)
    mapping.write(0, b"alive")
    vm.close()
    assert mapping.read(0, 5) == b"alive"
    mapping.close()
    shared.close()
    with pytest.raises(ClosedError):
        GuestMemFd(vm, SIZE)


def test_refusals(vm: Vm, shared: GuestMemFd) -> None:
    for size in (0, -PAGE, 1, PAGE + 1, 1 << 63, 1 << 64, "5"):
        with pytest.raises(ArgumentError, match="size"):
            GuestMemFd(vm, size)
    with pytest.raises(ArgumentTypeError):
        GuestMemFd(vm, 4096.0)
    with pytest.raises(ArgumentTypeError):
        GuestMemFd(7, SIZE)
    with pytest.raises(KvmError) as caught:
        GuestMemFd(vm, SIZE, 1 << 40)
    assert (caught.value.errno, caught.value.field) == (errno.EINVAL, "flags")
    for offset, size in ((1, PAGE), (-PAGE, PAGE), (SIZE, None), (0, 0), (0, PAGE + 1), (PAGE, SIZE), (0, 1 << 64)):
        for call in (shared.punch, shared.allocate, shared.mapping):
            with pytest.raises(ArgumentError):
                call(offset, size)
    with pytest.raises(ArgumentError, match="why"):
        shared.unpin("nobody")
