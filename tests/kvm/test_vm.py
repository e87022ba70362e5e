"""Vm: what its methods do beyond issuing their ioctl, and how their refusals are explained."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hvmodel._ffi import ffi, lib
from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError, HvError, KvmError
from hvmodel.host import Mapping
from hvmodel.kvm import IrqRoute, Kvm, MsiRoute, MsrFilterRange, Vm
from hvmodel.kvm.exits import Hlt, IoOut, RdMsr, WrMsr
from tests.host.held import nothing_leaks
from tests.kvm.guest import Guest
from tests.need import need_cap

GuestMaker = Callable[..., Guest]

PAGE = 4096
OUT_AND_HALT = bytes.fromhex("b041 e610 f4")  # mov al, 'A'; out 0x10, al; hlt


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def refused(call: Callable[..., object], *args: Any, **named: Any) -> KvmError:
    with pytest.raises(KvmError) as error:
        call(*args, **named)
    return error.value


def raised(eventfd: int) -> int:
    ready, _, _ = select.select([eventfd], [], [], 0)
    return os.eventfd_read(eventfd) if ready else 0


# ---- vCPUs and what comes before them ----


def test_vcpu_ids(vm: Vm) -> None:
    with vm.create_vcpu(7) as vcpu:
        assert (vcpu.id, vcpu.vm, vm.vcpus) == (7, vm, (vcpu,))
        error = refused(vm.create_vcpu, 7)
        assert (error.errno, error.field, error.value) == (errno.EEXIST, "id", 7)
        assert "has a vCPU with that id" in str(error)
    error = refused(vm.create_vcpu, vm.check_extension(lib.KVM_CAP_MAX_VCPU_ID))
    assert (error.errno, error.field) == (errno.EINVAL, "id")
    assert refused(vm.create_vcpu, (1 << 63) - 1).errno == errno.EINVAL
    for wrong in (-1, 1 << 63, None, "0", 0.0, True):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            vm.create_vcpu(wrong)


def test_what_must_come_before_the_first_vcpu(vm: Vm) -> None:
    with vm.create_vcpu(0):
        assert "before the first vCPU" in str(refused(vm.create_irqchip))
        assert refused(vm.set_boot_cpu_id, 1).errno == errno.EBUSY
        assert refused(vm.set_identity_map_addr, 0).errno == errno.EINVAL


def test_devices_of_unknown_type(vm: Vm) -> None:
    error = refused(vm.create_device, 99)
    assert (error.errno, error.field, error.value) == (errno.ENODEV, "type", 99)


# ---- interrupt controllers ----


def test_without_interrupt_controllers(vm: Vm, eventfd: int) -> None:
    assert refused(vm.create_pit2).errno == errno.ENOENT
    assert refused(vm.irq_line, 4, 1).errno == errno.ENXIO
    assert refused(vm.irq_line_status, 4, 1).errno == errno.ENXIO
    assert refused(vm.get_irqchip, 0).errno == errno.ENXIO
    assert refused(vm.irqfd, eventfd, 4).errno == errno.EINVAL
    assert refused(vm.signal_msi, 0xFEE00000, 0x41).errno == errno.EINVAL
    assert refused(lambda: vm.pit2).errno == errno.ENXIO


def test_there_are_three_chips(vm: Vm) -> None:
    vm.create_irqchip()
    for chip_id in (0, 1, 2):
        assert vm.get_irqchip(chip_id).chip_id == chip_id
    error = refused(vm.get_irqchip, 3)
    assert (error.errno, error.field, error.value) == (errno.EINVAL, "chip_id", 3)
    chip = vm.get_irqchip(0)
    chip.chip_id = 3
    assert refused(vm.set_irqchip, chip).errno == errno.EINVAL
    with pytest.raises(ArgumentTypeError):
        vm.set_irqchip(ffi.new("struct kvm_regs *"))


def test_split_interrupt_controllers(vm: Vm) -> None:
    need_cap(vm, "SPLIT_IRQCHIP")
    vm.enable_cap(lib.KVM_CAP_SPLIT_IRQCHIP, 24)
    with vm.create_vcpu(0) as vcpu:
        assert len(bytes(ffi.buffer(vcpu.lapic.regs))) == 1024
        assert refused(vm.get_irqchip, 2).errno == errno.ENXIO
        assert refused(vm.create_irqchip).errno in (errno.EEXIST, errno.EINVAL)


def test_the_speaker_port_of_the_timer(guest: GuestMaker) -> None:
    # in al, 0x61; out 0x10, al: with a speaker dummy the kernel answers port 0x61, else it exits.
    code = bytes.fromhex("e461 e610 f4")
    with_dummy = guest(code, irqchip=True, before=lambda vm: vm.create_pit2(speaker_dummy=True))
    exit = with_dummy.run()
    assert isinstance(exit, IoOut)
    assert exit.port == 0x10
    without = guest(code, irqchip=True, before=lambda vm: vm.create_pit2())
    assert getattr(without.run(), "port", None) == 0x61


def test_routes(vm: Vm) -> None:
    vm.create_irqchip()
    rows = (5, None, (0, 0, 0), IrqRoute(-1, 0, 0), IrqRoute(0, "x", 0), MsiRoute(0, 1 << 64, 0), MsiRoute(0, 0, -1))
    for wrong in (None, 5, *([row] for row in rows)):
        with pytest.raises((HvError, TypeError)) as error:
            vm.set_gsi_routing(wrong)
        assert not isinstance(error.value, OSError)
    limit = vm.check_extension(lib.KVM_CAP_IRQ_ROUTING)
    for row in (IrqRoute(limit, 0, 0), IrqRoute(0, 9, 0), IrqRoute(0, 0, 24)):
        error_ = refused(vm.set_gsi_routing, [row])
        assert (error_.errno, error_.call) == (errno.EINVAL, "KVM_SET_GSI_ROUTING")
    vm.set_gsi_routing(iter([IrqRoute(3, 1, 3)]))
    vm.irq_line(3, 1)
    assert vm.get_irqchip(1).chip.pic.irr == 1 << 3
    vm.set_gsi_routing([])
    vm.irq_line(3, 0)
    vm.irq_line(4, 1)
    assert vm.get_irqchip(0).chip.pic.irr & 1 << 4 == 0


def test_resampling(guest: GuestMaker, eventfd: int) -> None:
    # Level-triggered: the resample eventfd fires when the guest's interrupt controller ends the interrupt.
    need_cap(guest().vm, "IRQFD_RESAMPLE")
    resample = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        vm = guest(irqchip=True).vm
        ioapic = vm.get_irqchip(2)
        entry = ioapic.chip.ioapic.redirtbl[10].fields
        entry.vector, entry.trig_mode, entry.mask = 0x50, 1, 0
        vm.set_irqchip(ioapic)
        vm.irqfd(eventfd, 10, resamplefd=resample)
        assert refused(vm.irqfd, eventfd, 10).errno == errno.EBUSY
        assert raised(resample) == 0
        vm.irqfd(eventfd, 10, deassign=True)
    finally:
        os.close(resample)


def test_eventfds_may_be_objects_and_must_be_eventfds(vm: Vm, eventfd: int) -> None:
    vm.create_irqchip()

    class File:
        def fileno(self) -> int:
            return eventfd

    vm.irqfd(File(), 4)
    vm.irqfd(File(), 4, deassign=True)
    assert refused(vm.irqfd, vm, 4).errno == errno.EINVAL
    assert refused(vm.irqfd, 1 << 20, 4).errno == errno.EBADF
    assert refused(vm.ioeventfd, 1 << 20, 0x10, 1, pio=True).errno == errno.EBADF
    for wrong in (-1, 1 << 31, None, "3", 3.0, True):
        for call in (lambda wrong=wrong: vm.irqfd(wrong, 4), lambda wrong=wrong: vm.ioeventfd(wrong, 0x10, 1)):
            with pytest.raises((ArgumentError, ArgumentTypeError)):
                call()
    with open(os.devnull) as closed:
        pass
    with pytest.raises(ValueError, match="closed file"):
        vm.irqfd(closed, 4)


# ---- writes that do not exit ----


def test_refused_ioeventfds(vm: Vm, eventfd: int) -> None:
    for size in (3, 5, 16, 1 << 31):
        error = refused(vm.ioeventfd, eventfd, 0x10, size)
        assert (error.errno, error.field, error.value) == (errno.EINVAL, "size", size)
    error = refused(vm.ioeventfd, eventfd, 0x10, 0, datamatch=5)
    assert (error.errno, error.field) == (errno.EINVAL, "datamatch")
    assert refused(vm.ioeventfd, eventfd, (1 << 64) - 1, 8).errno == errno.EINVAL
    assert refused(vm.ioeventfd, eventfd, 0x10, 1, deassign=True).errno == errno.ENOENT
    vm.ioeventfd(eventfd, 0x10, 4)
    assert refused(vm.ioeventfd, eventfd, 0x10, 4).errno == errno.EEXIST
    vm.ioeventfd(eventfd, 0x10, 4, deassign=True)
    vm.ioeventfd(eventfd, 0x10, 4)


def test_ioeventfds_match_size_value_and_space(guest: GuestMaker, eventfd: int) -> None:
    # mov al, 'A'; out 0x10, al; out 0x11, al; out 0x10, ax; hlt
    code = bytes.fromhex("b041 e610 e611 e710 f4")
    g = guest(code)
    g.vm.ioeventfd(eventfd, 0x10, 1)  # memory, not a port
    assert g.run() == IoOut(0x10, 1, 1, b"A")
    g.vm.ioeventfd(eventfd, 0x10, 1, pio=True, datamatch=0x42)
    g.load(code)
    assert g.run() == IoOut(0x10, 1, 1, b"A")
    g.vm.ioeventfd(eventfd, 0x10, 1, pio=True, datamatch=0x42, deassign=True)
    g.vm.ioeventfd(eventfd, 0x10, 0, pio=True)  # any size, any value
    g.load(code)
    assert g.run() == IoOut(0x11, 1, 1, b"A")
    assert g.run() == Hlt()
    assert raised(eventfd) == 2


def test_coalesced_ports(guest: GuestMaker) -> None:
    need_cap(guest().vm, "COALESCED_PIO")
    g = guest(OUT_AND_HALT)
    g.vm.register_coalesced_mmio(0x10, 1, pio=True)
    assert g.run() == Hlt()
    g.vm.unregister_coalesced_mmio(0x10, 1, pio=True)
    g.load(OUT_AND_HALT)
    assert g.run() == IoOut(0x10, 1, 1, b"A")


# ---- memory ----


def test_refused_dirty_logs(vm: Vm) -> None:
    error = refused(vm.get_dirty_log, 3)
    assert (error.errno, error.field, error.value) == (errno.ENOENT, "slot", 3)
    with Mapping(None, 100 * PAGE) as memory, vm:
        vm.set_user_memory_region(0, 0, memory)
        assert "no KVM_MEM_LOG_DIRTY_PAGES" in str(refused(vm.get_dirty_log, 0))
        vm.set_user_memory_region(0, 0, memory, flags=1)
        assert vm.get_dirty_log(0) == bytes(16)  # 100 pages: two words


def test_refused_clearings_of_the_dirty_log(vm: Vm) -> None:
    need_cap(vm, "MANUAL_DIRTY_LOG_PROTECT2")
    vm.enable_cap(lib.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1)
    bitmap = bytes(16)
    error = refused(vm.clear_dirty_log, 3, bitmap, num_pages=64)
    assert (error.errno, error.field) == (errno.ENOENT, "slot")
    with Mapping(None, 100 * PAGE) as memory, vm:
        vm.set_user_memory_region(0, 0, memory, flags=1)
        for named, field in (
            ({"first_page": 1, "num_pages": 64}, "first_page"),
            ({"first_page": 64, "num_pages": 37}, "num_pages"),
            ({"num_pages": 65}, "num_pages"),
            ({"num_pages": 128}, "num_pages"),
            ({"first_page": 1 << 40, "num_pages": 64}, "num_pages"),
        ):
            error = refused(vm.clear_dirty_log, 0, bitmap, **named)
            assert (error.errno, error.field) == (errno.EINVAL, field), named
        for named in ({"num_pages": 64}, {"first_page": 64, "num_pages": 36}, {"first_page": 64}, {}):
            vm.clear_dirty_log(0, bitmap, **named)
        vm.clear_dirty_log(0, bytearray(13))  # 100 bits
        with pytest.raises(ArgumentError, match="at least 13 bytes for 100 pages"):
            vm.clear_dirty_log(0, bytes(12))
        for wrong in (None, 5, "x", [0] * 16, memoryview(bitmap)):
            with pytest.raises(ArgumentTypeError):
                vm.clear_dirty_log(0, wrong)


def test_the_dirty_ring_excludes_the_log(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        need_cap(vm, "DIRTY_LOG_RING")
        assert refused(vm.enable_cap, lib.KVM_CAP_DIRTY_LOG_RING, 1000).field == "args"
        vm.enable_cap(lib.KVM_CAP_DIRTY_LOG_RING, PAGE)
        with Mapping(None, 64 * PAGE) as memory, vm:
            vm.set_user_memory_region(0, 0, memory, flags=1)
            assert refused(vm.get_dirty_log, 0).errno == errno.ENXIO
            assert vm.reset_dirty_rings() == 0


def test_refused_guest_memfds(vm: Vm) -> None:
    need_cap(vm, "GUEST_MEMFD")
    with nothing_leaks():
        for size in (0, 1, PAGE + 1):
            error = refused(vm.create_guest_memfd, size)
            assert (error.errno, error.field, error.value) == (errno.EINVAL, "size", size)
        error = refused(vm.create_guest_memfd, PAGE, 1 << 40)
        assert (error.errno, error.field) == (errno.EINVAL, "flags")
        os.close(vm.create_guest_memfd(PAGE))


def test_the_tss_and_the_identity_map(vm: Vm) -> None:
    for gpa in ((1 << 32) - 2 * PAGE, 1 << 32, (1 << 64) - PAGE):
        error = refused(vm.set_tss_addr, gpa)
        assert (error.errno, error.field, error.value) == (errno.EINVAL, "gpa", gpa)
    vm.set_tss_addr((1 << 32) - 3 * PAGE - 1)
    vm.set_identity_map_addr(0)


# ---- MSR filters ----


def test_filters_of_writes_and_by_default(guest: GuestMaker) -> None:
    # mov ecx, 0x174; mov eax, 7; xor edx, edx; wrmsr; rdmsr; out 0x10, al; hlt
    code = bytes.fromhex("66b974010000 66b807000000 6631d2 0f30 0f32 e610 f4")
    g = guest(code)
    need_cap(g.vm, "X86_MSR_FILTER")
    g.vm.enable_cap(lib.KVM_CAP_X86_USER_SPACE_MSR, lib.KVM_MSR_EXIT_REASON_FILTER)
    g.vm.set_msr_filter([MsrFilterRange(0x170, b"\x00", lib.KVM_MSR_FILTER_WRITE)])
    assert g.run() == WrMsr(0x174, 7, lib.KVM_MSR_EXIT_REASON_FILTER)
    assert g.run() == IoOut(0x10, 1, 1, b"\0")  # the write was ours to carry out
    g.vm.set_msr_filter([MsrFilterRange(0x170, b"\x00\xff")], default_allow=False)
    g.load(code)
    assert isinstance(g.run(), WrMsr)
    assert g.run() == RdMsr(0x174, lib.KVM_MSR_EXIT_REASON_FILTER)
    g.vcpu.answer(3)
    assert g.run() == IoOut(0x10, 1, 1, b"\x03")


def test_wrong_filters(vm: Vm) -> None:
    need_cap(vm, "X86_MSR_FILTER")
    with pytest.raises(ArgumentError, match="up to 16 ranges"):
        vm.set_msr_filter([MsrFilterRange(0, b"\xff")] * 17)
    for bitmap in (5, 1 << 40, None, "text", [1]):
        with pytest.raises(ArgumentTypeError):
            vm.set_msr_filter([MsrFilterRange(0, bitmap)])
    for row in (MsrFilterRange(-1, b"\xff"), MsrFilterRange(1 << 32, b"\xff"), MsrFilterRange(0, b"\xff", -1), None, 5):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            vm.set_msr_filter([row])
    assert refused(vm.set_msr_filter, [MsrFilterRange(0, b"\xff", 4)]).errno == errno.EINVAL
    assert refused(vm.set_msr_filter, [MsrFilterRange(0, bytes(1 << 16))]).errno == errno.EINVAL
    vm.set_msr_filter(iter([MsrFilterRange(0, bytearray(b"\xff"))]))


# ---- closed ----


def test_a_closed_vm_says_so(kvm: Kvm, eventfd: int) -> None:
    vm = kvm.create_vm()
    vm.close()
    with nothing_leaks():
        for call in (
            lambda: vm.check_extension(0),
            lambda: vm.enable_cap(0),
            vm.create_vcpu,
            lambda: vm.create_device(4),
            vm.stats_fd,
            lambda: vm.set_user_memory_region(0, 0, 4096, size=4096),
            lambda: vm.delete_memory_region(0),
            lambda: vm.create_guest_memfd(4096),
            lambda: vm.get_dirty_log(0),
            lambda: vm.clear_dirty_log(0, b""),
            vm.reset_dirty_rings,
            lambda: vm.set_tss_addr(0),
            lambda: vm.set_identity_map_addr(0),
            lambda: vm.set_boot_cpu_id(0),
            vm.create_irqchip,
            vm.create_pit2,
            lambda: vm.get_irqchip(0),
            lambda: vm.set_irqchip(ffi.new("struct kvm_irqchip *")),
            lambda: vm.irq_line(0, 0),
            lambda: vm.irq_line_status(0, 0),
            lambda: vm.set_gsi_routing([]),
            lambda: vm.signal_msi(0, 0),
            lambda: vm.irqfd(eventfd, 0),
            lambda: vm.ioeventfd(eventfd, 0, 1),
            lambda: vm.register_coalesced_mmio(0, 1),
            lambda: vm.unregister_coalesced_mmio(0, 1),
            vm.set_msr_filter,
        ):
            with pytest.raises(ClosedError):
                call()
    assert (vm.memslots, vm.vcpus, vm.memslot_at(0)) == ({}, (), None)
