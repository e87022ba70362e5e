"""VmState: kvmclock, PIT and the chips, as the single ioctls give them."""

from __future__ import annotations

import json
import os
import pickle

import pytest

from hvmodel._ffi import ffi, lib
from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError, ForkedError, RefusedStateError
from hvmodel.kvm import Kvm, Vm
from hvmodel.state import Clock, IoApicState, PicState, Pit, Regs, VmState, vm_parts
from tests.need import need_cap

CHIPS = ("pic_master", "pic_slave", "ioapic")


@pytest.fixture
def full(vm: Vm) -> Vm:
    """A VM with all chips."""
    vm.create_irqchip()
    vm.create_pit2()
    return vm


def test_every_part_is_what_its_own_ioctl_gives(full: Vm) -> None:
    state = VmState.get(full)
    assert state.parts == tuple([row.name for row in vm_parts()])
    for chip_id, name in enumerate(CHIPS):
        assert state.part_bytes(name) == bytes(ffi.buffer(full.get_irqchip(chip_id)))
        assert state.part(name).chip_id == chip_id
    assert bytes(state.pit) == bytes(ffi.buffer(full.pit2))
    assert state.clock.clock <= full.clock.clock
    assert isinstance(state.pic_master.state, PicState)
    assert isinstance(state.ioapic.state, IoApicState)
    # Intel 82093AA: every entry is masked (bit 16) after reset; KVM's base is 0xfec00000.
    assert state.ioapic.state.base_address == 0xFEC00000
    assert all(entry >> 16 & 1 for entry in state.ioapic.state.redirtbl)


def test_what_is_not_there_is_left_out(vm: Vm) -> None:
    assert VmState.get(vm).parts == ("clock",)
    for name in (*CHIPS, "pit"):
        with pytest.raises(ArgumentError, match="does not have it") as refused:
            VmState.get(vm, (name,))
        assert refused.value.value == name
    with pytest.raises(ArgumentError, match="does not have it"):
        VmState(pit=Pit()).put(vm)
    vm.create_irqchip()
    assert VmState.get(vm).parts == (*CHIPS, "clock")


def test_what_is_put_arrives(kvm: Kvm, full: Vm) -> None:
    state = VmState.get(full)
    entries = list(state.ioapic.state.redirtbl)
    entries[4] = 0x0100_0000_0001_0031
    state = state.replace(
        pic_master=state.pic_master.replace(imr=0xA5, irq_base=0x20),
        pic_slave=state.pic_slave.replace(imr=0x5A, irq_base=0x28),
        ioapic=state.ioapic.replace(redirtbl=tuple(entries), id=3),
        pit=state.pit.replace(channels=(state.pit.channels[0].replace(count=0x1234, mode=2), *state.pit.channels[1:])),
    )
    with kvm.create_vm() as fresh:
        fresh.create_irqchip()
        fresh.create_pit2()
        for vm in (full, fresh):
            state.put(vm)
            assert state.diff(VmState.get(vm), time=False) == []
            assert vm.get_irqchip(0).chip.pic.imr == 0xA5
            assert vm.get_irqchip(1).chip.pic.irq_base == 0x28
            assert vm.get_irqchip(2).chip.ioapic.redirtbl[4].bits == entries[4]
            assert vm.pit2.channels[0].count == 0x1234


def test_the_clock_goes_on_from_its_value(vm: Vm) -> None:
    need_cap(vm, "ADJUST_CLOCK")
    start = 10**15  # ns: no host has been up for 11 days and asked in the first ms
    VmState(clock=Clock(clock=start)).put(vm)
    assert start <= VmState.get(vm).clock.clock < start + 60 * 10**9
    state = VmState.get(vm)
    if state.clock.flags & lib.KVM_CLOCK_REALTIME:
        # A day ago by the host's clock: the guest's clock is a day further.
        day = 86400 * 10**9
        past = state.replace(clock=state.clock.replace(realtime=state.clock.realtime - day))
        past.put(vm, realtime=True)
        assert start + day <= VmState.get(vm).clock.clock < start + day + 60 * 10**9
        past.put(vm)
        assert VmState.get(vm).clock.clock < start + day
    with pytest.raises(ArgumentError, match="no realtime"):
        VmState(clock=Clock(clock=1)).put(vm, realtime=True)
    with pytest.raises(ArgumentError, match="no clock"):
        VmState().put(vm, realtime=True)


def test_what_is_refused_leaves_all_as_it_was(full: Vm) -> None:
    before = VmState.get(full)
    changed = before.replace(pic_master=before.pic_master.replace(imr=0x77))
    bad = changed.replace(clock=Clock(clock=5, flags=1 << 20))
    with pytest.raises(RefusedStateError) as refused:
        bad.put(full)
    assert (refused.value.part, refused.value.field, refused.value.call) == ("clock", "clock.flags", "KVM_SET_CLOCK")
    assert before.diff(VmState.get(full), time=False) == []


def test_there_and_back(full: Vm) -> None:
    state = VmState.get(full)
    assert pickle.loads(pickle.dumps(state)) == state
    assert VmState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert state.only("pit").pit == state.pit


def test_who_may(kvm: Kvm, full: Vm) -> None:
    state = VmState.get(full)
    for wrong in (5, None, kvm):
        with pytest.raises(ArgumentTypeError):
            VmState.get(wrong)  # type: ignore[arg-type]
    for parts in (5, [5], ["x"], ["regs"]):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            VmState.get(full, parts)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError):
        VmState(regs=Regs())
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for call in (lambda: VmState.get(full), lambda: state.put(full)):
                with pytest.raises(ForkedError):
                    call()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    full.close()
    for call in (lambda: VmState.get(full), lambda: state.put(full)):
        with pytest.raises(ClosedError):
            call()
