"""Every ioctl of a VM's fd, for its effect or against a second source; those of the device's fd are here too."""

from __future__ import annotations

import errno
import mmap
import os
import select
import time
from collections.abc import Callable
from contextlib import closing

import pytest

from hvmodel._ffi import ffi, lib
from hvmodel.errors import KvmError, UnsupportedError
from hvmodel.host import Mapping
from hvmodel.kvm import IrqRoute, Kvm, MsiRoute, MsrFilterRange, Vm
from hvmodel.kvm.exits import Hlt, InternalError, IoOut, MmioWrite, RdMsr
from hvmodel.witness import Stats
from tests.kvm.guest import Guest
from tests.kvm.rows import excused, exercises, scope_of, vm_with

GuestMaker = Callable[..., Guest]

PAGE = 4096
MSI_TO_APIC_0 = 0xFEE00000

OUT_AND_HALT = bytes.fromhex("b041 e610 f4")  # mov al, 'A'; out 0x10, al; hlt
WRITE_PAGE_9 = bytes.fromhex("b007 a20090 f4")  # mov al, 7; mov [0x9000], al; hlt
WRITE_MMIO = bytes.fromhex("b80020 8ed8 b055 a21000 b066 a21000 e610 f4")  # ds = 0x2000; [0x10] = 0x55, 0x66; out 0x10


def address_of(cdata: object) -> int:
    return int(ffi.cast("uintptr_t", cdata))


def irr(guest: Guest, vector: int) -> bool:
    """Whether `vector` waits in the local APIC's interrupt request register (0x200, a bit per vector, 32 a row)."""
    regs = ffi.buffer(guest.vcpu.lapic.regs)
    return bool(int.from_bytes(regs[0x200 + vector // 32 * 16 :][:4], "little") >> vector % 32 & 1)


def enable_lapic(guest: Guest) -> None:
    """Software-enable the local APIC (spurious vector register, bit 8), without which it takes no interrupts."""
    lapic = guest.vcpu.lapic
    ffi.buffer(lapic.regs)[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")
    guest.vcpu.lapic = lapic


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def dirty(bitmap: bytearray) -> set[int]:
    return {page for page in range(len(bitmap) * 8) if bitmap[page // 8] >> page % 8 & 1}


def raised(eventfd: int) -> int:
    """What an eventfd has counted since it was last asked."""
    ready, _, _ = select.select([eventfd], [], [], 0)
    return os.eventfd_read(eventfd) if ready else 0


# ---- the VM itself ----


@exercises("KVM_CHECK_EXTENSION", on="vm")
def test_a_vm_answers_for_itself(kvm: Kvm, vm: Vm) -> None:
    assert vm.check_extension(lib.KVM_CAP_CHECK_EXTENSION_VM) == 1
    slots = vm.check_extension(lib.KVM_CAP_NR_MEMSLOTS)
    with Mapping(None, PAGE) as memory:
        vm.set_user_memory_region(slots - 1, 0, memory)
        with pytest.raises(KvmError) as refused:
            vm.set_user_memory_region(slots, PAGE, memory)
        assert (refused.value.errno, refused.value.field) == (errno.EINVAL, "slot")
        vm.delete_memory_region(slots - 1)


@exercises("KVM_CREATE_VCPU")
def test_create_vcpu_makes_a_vcpu_fd(vm: Vm) -> None:
    with vm.create_vcpu(3) as vcpu:
        assert os.readlink(f"/proc/self/fd/{vcpu.fd}") == "anon_inode:kvm-vcpu:3"
        with pytest.raises(KvmError) as refused:
            vm.create_vcpu(3)
        assert refused.value.errno == errno.EEXIST
    raw = vm.ioctl("KVM_CREATE_VCPU", 4)
    try:
        assert os.readlink(f"/proc/self/fd/{raw}") == "anon_inode:kvm-vcpu:4"
    finally:
        os.close(raw)


@exercises("KVM_ENABLE_CAP", on="vm", cap="X86_USER_SPACE_MSR")
def test_enable_cap_of_a_vm_gives_unknown_msrs_to_userspace(guest: GuestMaker) -> None:
    # mov ecx, 0x12345678; rdmsr; out 0x10, al; hlt
    g = guest(bytes.fromhex("66b978563412 0f32 e610 f4"))
    g.vm.enable_cap(lib.KVM_CAP_X86_USER_SPACE_MSR, lib.KVM_MSR_EXIT_REASON_UNKNOWN | lib.KVM_MSR_EXIT_REASON_INVAL)
    exit = g.run()
    assert isinstance(exit, RdMsr)
    assert exit.index == 0x12345678
    g.vcpu.answer(0x5A)
    assert g.run() == IoOut(0x10, 1, 1, b"\x5a")


@exercises("KVM_GET_STATS_FD", on="vm", cap="BINARY_STATS_FD")
def test_stats_of_a_vm(vm: Vm) -> None:
    with Stats(vm.stats_fd()) as stats:
        assert stats.id == f"kvm-{os.getpid()}"
        assert "remote_tlb_flush" in stats.read()


def no_tsc_control(kvm: Kvm) -> str | None:
    with kvm.create_vm() as vm:
        found = vm.check_extension(lib.KVM_CAP_VM_TSC_CONTROL)
    return None if found else "KVM_CHECK_EXTENSION(KVM_CAP_VM_TSC_CONTROL) = 0"


@exercises("KVM_SET_TSC_KHZ", on="vm", unless=no_tsc_control)
def test_tsc_frequency_of_a_vm_is_that_of_its_vcpus(vm: Vm) -> None:
    khz = vm.ioctl("KVM_GET_TSC_KHZ") // 2
    vm.ioctl("KVM_SET_TSC_KHZ", khz)
    assert vm.ioctl("KVM_GET_TSC_KHZ") == khz
    with vm.create_vcpu(0) as vcpu:
        assert vcpu.tsc_khz == khz


def no_vm_tsc_khz(kvm: Kvm) -> str | None:
    with kvm.create_vm() as vm:
        rc = lib.kvm_get_tsc_khz(vm.fd)
    return None if rc >= 0 else f"KVM_GET_TSC_KHZ of a VM: {errno.errorcode[-rc]}"


@exercises("KVM_GET_TSC_KHZ", on="vm", unless=no_vm_tsc_khz)
def test_tsc_frequency_of_a_vm(vm: Vm) -> None:
    khz = vm.ioctl("KVM_GET_TSC_KHZ")
    with vm.create_vcpu(0) as vcpu:
        assert khz == vcpu.tsc_khz


@exercises("KVM_GET_CLOCK", "KVM_SET_CLOCK", cap="ADJUST_CLOCK")
def test_the_clock_goes_on_from_what_was_set(vm: Vm) -> None:
    before = time.monotonic_ns()
    vm.clock = ffi.new("struct kvm_clock_data *", {"clock": 10**15})
    now = vm.clock.clock
    assert 0 <= now - 10**15 <= (time.monotonic_ns() - before) * 1.01


# ---- memory ----


@exercises("KVM_SET_USER_MEMORY_REGION")
def test_the_guest_runs_in_the_memory_of_a_slot(guest: GuestMaker) -> None:
    g = guest(WRITE_PAGE_9)
    assert g.run() == Hlt()
    assert g.ram.read(0x9000, 2) == b"\x07\0"
    g.vm.delete_memory_region(0)
    assert g.vm.memslots == {}
    assert isinstance(g.run(), InternalError)  # nothing to execute


@exercises("KVM_SET_USER_MEMORY_REGION2", cap="USER_MEMORY2")
def test_the_guest_reads_a_slot_of_the_second_kind(guest: GuestMaker) -> None:
    # mov ax, 0x1000; mov ds, ax; mov al, [0x10]; out 0x10, al; hlt: the byte at 0x10010
    g = guest(bytes.fromhex("b80010 8ed8 a01000 e610 f4"), size=1 << 16)
    with Mapping(None, PAGE) as page:
        page.write(0x10, b"\x77")
        region = {"slot": 1, "guest_phys_addr": 0x10000, "memory_size": PAGE, "userspace_addr": page.hva}
        g.vm.ioctl("KVM_SET_USER_MEMORY_REGION2", ffi.new("struct kvm_userspace_memory_region2 *", region))
        assert g.run() == IoOut(0x10, 1, 1, b"\x77")
        region["memory_size"] = 0
        g.vm.ioctl("KVM_SET_USER_MEMORY_REGION2", ffi.new("struct kvm_userspace_memory_region2 *", region))


@exercises("KVM_GET_DIRTY_LOG")
def test_the_dirty_log_has_the_page_that_the_guest_wrote(guest: GuestMaker) -> None:
    g = guest(WRITE_PAGE_9, flags=lib.KVM_MEM_LOG_DIRTY_PAGES)
    assert dirty(g.vm.get_dirty_log(0)) == set()
    assert g.run() == Hlt()
    log = g.vm.get_dirty_log(0)
    assert len(log) == (1 << 20) // PAGE // 8
    assert 9 in dirty(log)
    assert 0x20 not in dirty(log)
    assert dirty(g.vm.get_dirty_log(0)) == set()


@exercises("KVM_CLEAR_DIRTY_LOG", cap="MANUAL_DIRTY_LOG_PROTECT2")
def test_with_manual_protection_the_log_stays_until_cleared(guest: GuestMaker) -> None:
    g = guest(
        WRITE_PAGE_9,
        flags=lib.KVM_MEM_LOG_DIRTY_PAGES,
        before=lambda vm: vm.enable_cap(lib.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1),
    )
    assert g.run() == Hlt()
    log = g.vm.get_dirty_log(0)
    assert 9 in dirty(log)
    assert g.vm.get_dirty_log(0) == log
    g.vm.clear_dirty_log(0, log)
    assert dirty(g.vm.get_dirty_log(0)) == set()


@exercises("KVM_RESET_DIRTY_RINGS", cap="DIRTY_LOG_RING")
def test_a_reset_takes_the_harvested_entries_of_the_dirty_ring(guest: GuestMaker) -> None:
    size = PAGE
    g = guest(
        WRITE_PAGE_9,
        flags=lib.KVM_MEM_LOG_DIRTY_PAGES,
        before=lambda vm: vm.enable_cap(lib.KVM_CAP_DIRTY_LOG_RING, size),
    )
    assert g.vm.reset_dirty_rings() == 0
    assert g.run() == Hlt()
    with mmap.mmap(g.vcpu.fd, size, offset=lib.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE) as ring:
        entries = ffi.cast("struct kvm_dirty_gfn *", ffi.from_buffer(ring))
        pages = set()
        at = 0
        while entries[at].flags & lib.KVM_DIRTY_GFN_F_DIRTY:
            pages.add(entries[at].offset)
            entries[at].flags |= lib.KVM_DIRTY_GFN_F_RESET
            at += 1
        del entries
    assert 9 in pages
    assert g.vm.reset_dirty_rings() == at


@exercises("KVM_SET_NR_MMU_PAGES", cap="MMU_SHADOW_CACHE_CONTROL")
def test_shadow_pages_have_a_lower_limit(vm: Vm) -> None:
    vm.ioctl("KVM_SET_NR_MMU_PAGES", 64)  # linux:arch/x86/include/asm/kvm_host.h KVM_MIN_ALLOC_MMU_PAGES
    with pytest.raises(KvmError) as refused:
        vm.ioctl("KVM_SET_NR_MMU_PAGES", 63)
    assert refused.value.errno == errno.EINVAL


@exercises("KVM_SET_TSS_ADDR", cap="SET_TSS_ADDR")
def test_the_tss_must_lie_below_four_gigabytes(vm: Vm) -> None:
    vm.set_tss_addr(0xFFFBD000)
    with pytest.raises(KvmError, match="below 4 GiB"):
        vm.set_tss_addr(0x100000000 - 2 * PAGE)


@exercises("KVM_SET_IDENTITY_MAP_ADDR", cap="SET_IDENTITY_MAP_ADDR")
def test_the_identity_map_comes_before_the_vcpus(vm: Vm) -> None:
    vm.set_identity_map_addr(0xFEFFC000)
    with vm.create_vcpu(0), pytest.raises(KvmError, match="vCPUs were made already"):
        vm.set_identity_map_addr(0xFEFFC000)


@exercises("KVM_CREATE_GUEST_MEMFD", cap="GUEST_MEMFD")
def test_guest_memfd_has_the_size_asked_for(kvm: Kvm) -> None:
    vm = vm_with(kvm, "GUEST_MEMFD")
    assert vm is not None
    with vm:
        fd = vm.create_guest_memfd(16 * PAGE)
        try:
            assert os.fstat(fd).st_size == 16 * PAGE
            assert os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[kvm-gmem]"
        finally:
            os.close(fd)


@exercises("KVM_SET_MEMORY_ATTRIBUTES", cap="MEMORY_ATTRIBUTES")
def test_memory_attributes_that_the_vm_knows(kvm: Kvm) -> None:
    vm = vm_with(kvm, "MEMORY_ATTRIBUTES")
    assert vm is not None
    with vm:
        known = vm.check_extension(lib.KVM_CAP_MEMORY_ATTRIBUTES)
        for attributes in (known, 0):
            arg = {"address": 0, "size": 4 * PAGE, "attributes": attributes}
            vm.ioctl("KVM_SET_MEMORY_ATTRIBUTES", ffi.new("struct kvm_memory_attributes *", arg))
        arg["attributes"] = 1 << 63
        with pytest.raises(KvmError) as refused:
            vm.ioctl("KVM_SET_MEMORY_ATTRIBUTES", ffi.new("struct kvm_memory_attributes *", arg))
        assert refused.value.errno == errno.EINVAL


@exercises("KVM_REGISTER_COALESCED_MMIO", "KVM_UNREGISTER_COALESCED_MMIO", cap="COALESCED_MMIO")
def test_coalesced_writes_are_in_the_ring_instead_of_exits(guest: GuestMaker) -> None:
    g = guest(WRITE_MMIO, size=1 << 16)
    g.vm.register_coalesced_mmio(0x20000, PAGE)
    assert g.run() == IoOut(0x10, 1, 1, b"\x66")
    page = g.vm.check_extension(lib.KVM_CAP_COALESCED_MMIO)
    with mmap.mmap(g.vcpu.fd, (page + 1) * PAGE) as run:
        ring = ffi.cast("struct kvm_coalesced_mmio_ring *", ffi.from_buffer(run, require_writable=True) + page * PAGE)
        found = [
            (ring.coalesced_mmio[at].phys_addr, ring.coalesced_mmio[at].len, ring.coalesced_mmio[at].data[0])
            for at in range(ring.first, ring.last)
        ]
        ring.first = ring.last
        del ring
    assert found == [(0x20010, 1, 0x55), (0x20010, 1, 0x66)]
    g.vm.unregister_coalesced_mmio(0x20000, PAGE)
    g.load(WRITE_MMIO)
    assert g.run() == MmioWrite(0x20010, b"\x55")


# ---- interrupt controllers ----


@exercises("KVM_CREATE_IRQCHIP", "KVM_GET_IRQCHIP", "KVM_SET_IRQCHIP", cap="IRQCHIP")
def test_interrupt_controllers_keep_what_was_set(vm: Vm) -> None:
    with pytest.raises(KvmError) as refused:
        vm.get_irqchip(0)
    assert refused.value.errno == errno.ENXIO
    vm.create_irqchip()
    assert vm.get_irqchip(2).chip.ioapic.base_address == 0xFEC00000
    for chip_id in (0, 1):
        chip = vm.get_irqchip(chip_id)
        assert chip.chip.pic.imr == 0
        chip.chip.pic.imr, chip.chip.pic.irq_base = 0xA5, 0x30
        vm.set_irqchip(chip)
        assert bytes(ffi.buffer(vm.get_irqchip(chip_id))) == bytes(ffi.buffer(chip))
    with pytest.raises(KvmError) as refused:
        vm.create_irqchip()
    assert refused.value.errno == errno.EEXIST


@exercises("KVM_IRQ_LINE", cap="IRQCHIP")
def test_an_interrupt_line_sets_the_pic_s_request_register(vm: Vm) -> None:
    vm.create_irqchip()
    vm.irq_line(4, 1)
    assert vm.get_irqchip(0).chip.pic.irr == 1 << 4
    vm.irq_line(10, 1)  # the slave's third
    assert vm.get_irqchip(1).chip.pic.irr == 1 << 2


@exercises("KVM_IRQ_LINE_STATUS", cap="IRQ_INJECT_STATUS")
def test_an_interrupt_line_tells_delivered_from_coalesced(vm: Vm) -> None:
    vm.create_irqchip()
    assert vm.irq_line_status(4, 1) == 1
    vm.irq_line_status(4, 0)
    assert vm.irq_line_status(4, 1) == 0  # the first still waits
    assert vm.get_irqchip(0).chip.pic.irr == 1 << 4


@exercises("KVM_CREATE_PIT", "KVM_GET_PIT", "KVM_SET_PIT", cap="PIT")
def test_the_timer_of_the_first_kind_keeps_what_was_set(vm: Vm) -> None:
    vm.create_irqchip()
    vm.ioctl("KVM_CREATE_PIT")
    pit = vm.pit
    pit.channels[2].count, pit.channels[2].mode, pit.channels[2].rw_mode = 0x1234, 3, 3
    vm.pit = pit
    assert (vm.pit.channels[2].count, vm.pit.channels[2].mode) == (0x1234, 3)


@exercises("KVM_CREATE_PIT2", cap="PIT2")
@exercises("KVM_GET_PIT2", "KVM_SET_PIT2", cap="PIT_STATE2")
def test_the_timer_keeps_what_was_set(vm: Vm) -> None:
    with pytest.raises(KvmError, match="create_irqchip"):
        vm.create_pit2()
    vm.create_irqchip()
    vm.create_pit2()
    pit = vm.pit2
    pit.channels[1].count, pit.channels[1].mode, pit.channels[1].rw_mode = 0x4321, 2, 3
    pit.flags |= lib.KVM_PIT_FLAGS_HPET_LEGACY
    vm.pit2 = pit
    assert (vm.pit2.channels[1].count, vm.pit2.channels[1].mode) == (0x4321, 2)
    assert vm.pit2.flags & lib.KVM_PIT_FLAGS_HPET_LEGACY


@exercises("KVM_REINJECT_CONTROL", cap="REINJECT_CONTROL")
def test_reinjection_is_the_timer_s(vm: Vm) -> None:
    control = ffi.new("struct kvm_reinject_control *", {"pit_reinject": 0})
    vm.create_irqchip()
    with pytest.raises(KvmError) as refused:
        vm.ioctl("KVM_REINJECT_CONTROL", control)
    assert refused.value.errno == errno.ENXIO
    vm.create_pit2()
    vm.ioctl("KVM_REINJECT_CONTROL", control)


@exercises("KVM_SET_GSI_ROUTING", cap="IRQ_ROUTING")
def test_a_routed_gsi_raises_its_pin(vm: Vm) -> None:
    vm.create_irqchip()
    vm.set_gsi_routing([IrqRoute(20, 0, 6)])
    vm.irq_line(20, 1)
    assert vm.get_irqchip(0).chip.pic.irr == 1 << 6
    vm.irq_line(4, 1)  # no longer routed
    assert vm.get_irqchip(0).chip.pic.irr == 1 << 6


@exercises("KVM_SIGNAL_MSI", cap="SIGNAL_MSI")
def test_a_message_reaches_the_local_apic(guest: GuestMaker) -> None:
    g = guest(irqchip=True)
    assert g.vm.signal_msi(MSI_TO_APIC_0, 0x41) == 0  # the APIC is switched off
    enable_lapic(g)
    assert g.vm.signal_msi(MSI_TO_APIC_0, 0x41) > 0
    assert irr(g, 0x41)
    assert not irr(g, 0x42)


@exercises("KVM_IRQFD", cap="IRQFD")
def test_an_eventfd_raises_its_gsi(guest: GuestMaker) -> None:
    g = guest(irqchip=True)
    enable_lapic(g)
    g.vm.set_gsi_routing([MsiRoute(24, MSI_TO_APIC_0, 0x51)])
    eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        g.vm.irqfd(eventfd, 24)
        assert not irr(g, 0x51)
        os.eventfd_write(eventfd, 1)
        wait_for(lambda: irr(g, 0x51))
        g.vm.irqfd(eventfd, 24, deassign=True)
    finally:
        os.close(eventfd)


@exercises("KVM_SET_BOOT_CPU_ID", cap="SET_BOOT_CPU_ID")
def test_the_boot_cpu_has_the_bsp_bit(vm: Vm) -> None:
    vm.create_irqchip()
    vm.set_boot_cpu_id(1)
    with vm.create_vcpu(0) as first, vm.create_vcpu(1) as second:
        bsp = [vcpu.get_msrs([0x1B])[0x1B] >> 8 & 1 for vcpu in (first, second)]  # IA32_APIC_BASE
        assert bsp == [0, 1]
        with pytest.raises(KvmError) as refused:
            vm.set_boot_cpu_id(0)
        assert refused.value.errno == errno.EBUSY


@exercises("KVM_IOEVENTFD", cap="IOEVENTFD")
def test_a_port_write_signals_an_eventfd_instead_of_an_exit(guest: GuestMaker) -> None:
    g = guest(OUT_AND_HALT)
    eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        g.vm.ioeventfd(eventfd, 0x10, 1, pio=True, datamatch=0x41)
        assert g.run() == Hlt()
        assert raised(eventfd) == 1
        g.vm.ioeventfd(eventfd, 0x10, 1, pio=True, datamatch=0x41, deassign=True)
        g.load(OUT_AND_HALT)
        assert g.run() == IoOut(0x10, 1, 1, b"A")
        assert raised(eventfd) == 0
    finally:
        os.close(eventfd)


# ---- filters ----


@exercises("KVM_X86_SET_MSR_FILTER", cap="X86_MSR_FILTER")
def test_a_filtered_msr_exits(guest: GuestMaker) -> None:
    # mov ecx, 0x174; rdmsr; out 0x10, al; hlt (SYSENTER_CS)
    code = bytes.fromhex("66b974010000 0f32 e610 f4")
    g = guest(code)
    g.vm.enable_cap(lib.KVM_CAP_X86_USER_SPACE_MSR, lib.KVM_MSR_EXIT_REASON_FILTER)
    g.vm.set_msr_filter([MsrFilterRange(0x170, b"\xef", lib.KVM_MSR_FILTER_READ)])  # all but the fifth of eight
    assert g.run() == RdMsr(0x174, lib.KVM_MSR_EXIT_REASON_FILTER)
    g.vcpu.answer(9)
    assert g.run() == IoOut(0x10, 1, 1, b"\x09")
    g.vm.set_msr_filter()
    g.load(code)
    assert g.run() == IoOut(0x10, 1, 1, b"\0")


@exercises("KVM_SET_PMU_EVENT_FILTER", cap="PMU_EVENT_FILTER")
def test_a_pmu_filter_has_an_action_and_a_limit(vm: Vm) -> None:
    def install(action: int, nevents: int) -> int:
        fields = {"action": action, "nevents": nevents, "events": max(nevents, 1)}
        arg = ffi.new("struct kvm_pmu_event_filter *", fields)
        try:
            return vm.ioctl("KVM_SET_PMU_EVENT_FILTER", arg)
        except KvmError as error:
            return -(error.errno or 0)

    assert install(lib.KVM_PMU_EVENT_ALLOW, 0) == 0
    assert install(lib.KVM_PMU_EVENT_DENY, 2) == 0
    assert install(2, 0) == -errno.EINVAL
    # linux:arch/x86/kvm/pmu.c KVM_PMU_EVENT_FILTER_MAX_EVENTS@v6.18
    assert install(lib.KVM_PMU_EVENT_DENY, 301) == -errno.E2BIG


# ---- other hypervisors' interfaces ----


@exercises("KVM_HYPERV_EVENTFD", cap="HYPERV_EVENTFD")
def test_a_hyperv_connection_has_one_eventfd(vm: Vm) -> None:
    eventfd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        arg = ffi.new("struct kvm_hyperv_eventfd *", {"conn_id": 5, "fd": eventfd})
        vm.ioctl("KVM_HYPERV_EVENTFD", arg)
        with pytest.raises(KvmError) as refused:
            vm.ioctl("KVM_HYPERV_EVENTFD", arg)
        assert refused.value.errno == errno.EEXIST
        arg.flags = lib.KVM_HYPERV_EVENTFD_DEASSIGN
        vm.ioctl("KVM_HYPERV_EVENTFD", arg)
    finally:
        os.close(eventfd)


def xen_attr(vm: Vm, type: int, **fields: object) -> None:
    vm.ioctl("KVM_XEN_HVM_SET_ATTR", ffi.new("struct kvm_xen_hvm_attr *", {"type": type, "u": fields}))


@exercises("KVM_XEN_HVM_CONFIG", "KVM_XEN_HVM_SET_ATTR", "KVM_XEN_HVM_GET_ATTR", cap="XEN_HVM")
def test_xen_attributes_keep_what_was_set(vm: Vm) -> None:
    config = {"flags": lib.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, "msr": 0x40000000}
    vm.ioctl("KVM_XEN_HVM_CONFIG", ffi.new("struct kvm_xen_hvm_config *", config))
    for long_mode in (1, 0):
        xen_attr(vm, lib.KVM_XEN_ATTR_TYPE_LONG_MODE, long_mode=long_mode)
        attr = ffi.new("struct kvm_xen_hvm_attr *", {"type": lib.KVM_XEN_ATTR_TYPE_LONG_MODE})
        vm.ioctl("KVM_XEN_HVM_GET_ATTR", attr)
        assert attr.u.long_mode == long_mode


def no_xen_events(kvm: Kvm) -> str | None:
    flags = kvm.check_extension(lib.KVM_CAP_XEN_HVM)
    if flags & lib.KVM_XEN_HVM_CONFIG_EVTCHN_SEND:
        return None
    return f"KVM_CHECK_EXTENSION(KVM_CAP_XEN_HVM) = {flags:#x}: without KVM_XEN_HVM_CONFIG_EVTCHN_SEND"


@exercises("KVM_XEN_HVM_EVTCHN_SEND", unless=no_xen_events)
def test_a_xen_event_is_pending_in_the_shared_page(guest: GuestMaker) -> None:
    g = guest()
    config = {"flags": lib.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | lib.KVM_XEN_HVM_CONFIG_EVTCHN_SEND, "msr": 0x40000000}
    g.vm.ioctl("KVM_XEN_HVM_CONFIG", ffi.new("struct kvm_xen_hvm_config *", config))
    xen_attr(g.vm, lib.KVM_XEN_ATTR_TYPE_LONG_MODE, long_mode=1)
    xen_attr(g.vm, lib.KVM_XEN_ATTR_TYPE_SHARED_INFO, shared_info={"gfn": 3})
    info = {"type": lib.KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, "u": {"gpa": 0x4000}}
    g.vcpu.ioctl("KVM_XEN_VCPU_SET_ATTR", ffi.new("struct kvm_xen_vcpu_attr *", info))
    event = {"port": 3, "vcpu": 0, "priority": 0xFFFFFFFF}  # two-level, the only kind there is
    g.vm.ioctl("KVM_XEN_HVM_EVTCHN_SEND", ffi.new("struct kvm_irq_routing_xen_evtchn *", event))
    # struct shared_info of a 64-bit guest: 32 times struct vcpu_info of 64 bytes, then evtchn_pending.
    assert g.ram.read(0x3000 + 32 * 64, 1) == bytes([1 << 3])


# ---- encrypted guests ----


def no_sev(kvm: Kvm) -> str | None:
    types = kvm.check_extension(lib.KVM_CAP_VM_TYPES)
    if types >> lib.KVM_X86_SEV_VM & 1:
        return None
    return f"KVM_CHECK_EXTENSION(KVM_CAP_VM_TYPES) = {types:#x}: no SEV"


@exercises("KVM_MEMORY_ENCRYPT_OP", on="vm", unless=no_sev)
def test_sev_answers_to_no_command(vm: Vm) -> None:
    # Without a command it tells whether the host has SEV (amd-memory-encryption.rst); ioctl() lets no NULL through.
    assert vm.ioctl("KVM_MEMORY_ENCRYPT_OP", 0) == 0


@excused("KVM_MEMORY_ENCRYPT_REG_REGION", "KVM_MEMORY_ENCRYPT_UNREG_REGION")
def test_memory_of_a_plain_vm_is_not_encrypted(vm: Vm) -> str:
    # A VM that takes them is launched through /dev/sev with the platform's firmware.
    found = set()
    for name in ("KVM_MEMORY_ENCRYPT_REG_REGION", "KVM_MEMORY_ENCRYPT_UNREG_REGION"):
        with pytest.raises(KvmError) as refused:
            vm.ioctl(name, ffi.new("struct kvm_enc_region *"))
        found.add(errno.errorcode[refused.value.errno or 0])
    assert found <= {"ENOTTY", "EINVAL"}
    return f"takes an encrypted guest; a plain VM answers {', '.join(sorted(found))}"


# ---- gone ----


@excused("KVM_SET_MEMORY_REGION")
def test_the_first_memory_ioctl_is_gone(vm: Vm) -> str:
    with pytest.raises(UnsupportedError, match="does not know the ioctl"):
        vm.ioctl("KVM_SET_MEMORY_REGION", ffi.new("struct kvm_memory_region *"))
    return "gone from the kernel before Linux 5.0: ENOTTY"


def not_gone_yet(kvm: Kvm) -> str | None:
    with kvm.create_vm() as vm:
        rc = lib.kvm_get_nr_mmu_pages(vm.fd)
    return None if rc >= 0 else f"gone since Linux 6.4: {errno.errorcode[-rc]}"


@exercises("KVM_GET_NR_MMU_PAGES", unless=not_gone_yet)
def test_the_number_of_shadow_pages_where_it_can_still_be_asked(vm: Vm) -> None:
    assert vm.ioctl("KVM_GET_NR_MMU_PAGES") >= 0


# ---- devices ----


def no_vfio(kvm: Kvm) -> str | None:
    with kvm.create_vm() as vm:
        fields = {"type": lib.KVM_DEV_TYPE_VFIO, "flags": lib.KVM_CREATE_DEVICE_TEST}
        arg = ffi.new("struct kvm_create_device *", fields)
        rc = lib.kvm_create_device(vm.fd, arg)
    return None if rc == 0 else f"KVM_CREATE_DEVICE(VFIO, TEST): {errno.errorcode[-rc]}"


@exercises("KVM_CREATE_DEVICE", unless=no_vfio)
def test_create_device_makes_a_device_fd(vm: Vm) -> None:
    with vm.create_device(lib.KVM_DEV_TYPE_VFIO) as device:
        assert scope_of(device.fd) == "device"
        assert os.readlink(f"/proc/self/fd/{device.fd}") == "anon_inode:kvm-vfio"
    with pytest.raises(KvmError) as refused:
        vm.create_device(99)
    assert refused.value.errno == errno.ENODEV


@exercises("KVM_HAS_DEVICE_ATTR", on="device", unless=no_vfio)
def test_the_vfio_device_has_its_attributes_only(vm: Vm) -> None:
    with vm.create_device(lib.KVM_DEV_TYPE_VFIO) as device:
        assert device.has_attr(lib.KVM_DEV_VFIO_FILE, lib.KVM_DEV_VFIO_FILE_ADD)
        assert device.has_attr(lib.KVM_DEV_VFIO_FILE, lib.KVM_DEV_VFIO_FILE_DEL)
        assert not device.has_attr(lib.KVM_DEV_VFIO_FILE, 77)
        assert not device.has_attr(99, lib.KVM_DEV_VFIO_FILE_ADD)


@excused("KVM_GET_DEVICE_ATTR", on="device")
def test_no_device_of_x86_has_attributes_that_can_be_got(vm: Vm) -> str:
    if no_vfio(vm.kvm) is not None:
        return "no device"
    value = ffi.new("uint64_t *")
    with vm.create_device(lib.KVM_DEV_TYPE_VFIO) as device, pytest.raises(KvmError) as refused:
        device.get_attr(lib.KVM_DEV_VFIO_FILE, lib.KVM_DEV_VFIO_FILE_ADD, address_of(value))
    assert refused.value.errno == errno.EPERM
    return "VFIO is x86's only device, and its attributes can only be set: EPERM"


@excused("KVM_SET_DEVICE_ATTR", on="device")
def test_the_vfio_device_takes_files_of_vfio_only(vm: Vm) -> str:
    if no_vfio(vm.kvm) is not None:
        return "no device"
    with closing(os.fdopen(os.eventfd(0, os.EFD_CLOEXEC))) as file, vm.create_device(lib.KVM_DEV_TYPE_VFIO) as device:
        fd = ffi.new("int32_t *", file.fileno())
        with pytest.raises(KvmError) as refused:
            device.set_attr(lib.KVM_DEV_VFIO_FILE, lib.KVM_DEV_VFIO_FILE_ADD, address_of(fd))
        assert refused.value.errno == errno.EINVAL
        assert refused.value.value == (lib.KVM_DEV_VFIO_FILE, lib.KVM_DEV_VFIO_FILE_ADD)
    return "takes a device that the host gives away to VFIO; any other file is refused: EINVAL"
