"""After os.fork: a child cannot use its parent's VM, is told so, and can make one of its own; the parent goes on."""

from __future__ import annotations

import errno
import os
import traceback
import warnings
from collections.abc import Callable

import pytest

from hvmodel._ffi import IOCTLS, ffi, lib
from hvmodel.errors import ForkedError, KvmError
from hvmodel.host import Mapping
from hvmodel.kvm import Device, Kvm, Vcpu, Vm
from hvmodel.kvm.exits import Hlt, IoOut
from tests.kvm.guest import Guest

GuestMaker = Callable[..., Guest]

OUT_AND_HALT = bytes.fromhex("b041 e610 f4")  # mov al, 'A'; out 0x10, al; hlt


def in_child(work: Callable[[], object]) -> None:
    """Do `work` in a child of os.fork; its exceptions fail the test."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001  # whatever it is, the parent tells it
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        report = file.read()
    os.waitpid(pid, 0)
    assert report == "", report


def forked(call: Callable[[], object]) -> ForkedError:
    with pytest.raises(ForkedError) as refused:
        call()
    assert refused.value.errno == errno.EIO
    assert "a VM made by this process" in str(refused.value)
    return refused.value


def test_a_child_is_refused_every_ioctl_of_vm_and_vcpu(guest: GuestMaker) -> None:
    g = guest()
    parent = os.getpid()

    def work() -> None:
        for owner in (g.vm, g.vcpu):
            for name, row in IOCTLS.items():
                kind, _, detail = row.argument.partition(":")
                if owner.scope not in row.scope or detail == "void":
                    continue
                arg = {"-": None, "ulong": 0}.get(kind)
                if kind in ("struct", "ptr"):
                    arg = ffi.new("uint64_t[1]" if kind == "ptr" else f"struct {detail} *")
                error = forked(lambda owner=owner, name=name, arg=arg: owner.ioctl(name, arg))
                assert error.call == name
                assert f"process {parent} made" in str(error)

    in_child(work)


def test_a_child_is_refused_run_methods_and_attributes(guest: GuestMaker) -> None:
    g = guest(OUT_AND_HALT)

    def work() -> None:
        forked(g.vcpu.run)
        forked(lambda: g.vcpu.run(1.0))
        forked(lambda: g.vcpu.run_until(0))
        forked(g.vcpu.complete_io)
        forked(lambda: g.vcpu.regs)
        forked(lambda: setattr(g.vcpu, "regs", ffi.new("struct kvm_regs *")))
        forked(lambda: g.vcpu.get_msrs([0x10]))
        forked(lambda: g.vcpu.set_msrs({0x10: 0}))
        forked(g.vcpu.get_cpuid2)
        forked(lambda: g.vcpu.translate(0))
        forked(g.vcpu.nmi)
        forked(g.vm.create_irqchip)
        assert forked(lambda: g.vm.create_vcpu(1)).call == "KVM_CREATE_VCPU"
        assert forked(lambda: g.vm.set_gsi_routing([])).call == "KVM_SET_GSI_ROUTING"
        forked(lambda: g.vm.check_extension(0))
        forked(lambda: g.vm.get_dirty_log(0))
        forked(lambda: g.vm.set_user_memory_region(1, 1 << 20, g.ram.hva, size=4096))
        forked(lambda: g.vm.delete_memory_region(0))
        forked(lambda: g.vm.enable_cap(lib.KVM_CAP_X86_USER_SPACE_MSR, 1))
        forked(lambda: g.vcpu.enable_cap(lib.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1))

    in_child(work)
    assert g.run() == IoOut(0x10, 1, 1, b"A")


def test_a_child_is_refused_a_device(vm: Vm) -> None:
    try:
        device = vm.create_device(lib.KVM_DEV_TYPE_VFIO)
    except KvmError:
        pytest.skip("needs an in-kernel device: this kernel has no VFIO")

    def work() -> None:
        forked(lambda: device.has_attr(1, 1))
        forked(lambda: device.set_attr(1, 1))
        forked(lambda: device.get_attr(1, 1, 0))

    with device:
        in_child(work)
        assert isinstance(device, Device)
        assert device.has_attr(lib.KVM_DEV_VFIO_FILE, lib.KVM_DEV_VFIO_FILE_ADD)


def test_a_child_s_refused_slot_keeps_no_memory(guest: GuestMaker) -> None:
    g = guest()

    def work() -> None:
        memory = Mapping(None, 4096)
        forked(lambda: g.vm.set_user_memory_region(5, 1 << 20, memory))
        memory.close()

    in_child(work)


def test_the_parent_is_not_affected(guest: GuestMaker) -> None:
    g = guest(OUT_AND_HALT)

    def work() -> None:
        forked(g.vcpu.run)
        g.vcpu.kick()
        g.vcpu.close()
        g.vm.close()
        assert g.vcpu.closed
        assert g.vm.closed

    in_child(work)
    regs = bytes(ffi.buffer(g.vcpu.regs))
    in_child(work)
    assert bytes(ffi.buffer(g.vcpu.regs)) == regs
    assert g.run() == IoOut(0x10, 1, 1, b"A")
    assert g.run() == Hlt()


def test_a_child_can_make_its_own(kvm: Kvm, guest: GuestMaker) -> None:
    g = guest(OUT_AND_HALT)
    g.run()

    def work() -> None:
        assert kvm.api_version == 12
        with Guest(kvm, OUT_AND_HALT) as own:
            assert own.run() == IoOut(0x10, 1, 1, b"A")
            own.vcpu.kick()
            in_child(lambda: forked(own.vcpu.run))
            own.run()
        with Kvm() as again, again.create_vm() as vm, vm.create_vcpu(0) as vcpu:
            assert vcpu.regs.rip == 0xFFF0

    in_child(work)
    assert g.run() == Hlt()


def test_what_a_child_forgets_is_the_parent_s(vcpu: Vcpu) -> None:
    # A child's finalizers do not warn, and close the child's copies of the descriptors only.
    def work() -> None:
        fds = vcpu.fd, vcpu.vm.fd
        with warnings.catch_warnings(record=True, action="always") as seen:
            vcpu._finalizer()
            vcpu.vm._finalizer()
        assert seen == []
        for fd in fds:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)

    in_child(work)
    assert vcpu.regs.rip == 0xFFF0
