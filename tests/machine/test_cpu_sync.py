"""`Cpu.sync`: a machine's way to QEMU's synchronisation (tests/state/test_sync.py has the rest of it).

Expected: what the guest does, and KVM's own registers, asked for past the library.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

import hvmodel as hv
from hvmodel._ffi import ffi, lib
from hvmodel.state.sync import PutLevel, VcpuSync, synchronizer

Boot = Callable[..., hv.Machine]
OUTS = "e610 e611 f4"  # out 0x10, al; out 0x11, al; hlt


def kernel_rax(machine: hv.Machine) -> int:
    """By KVM_GET_REGS on the bare fd."""
    regs = ffi.new("struct kvm_regs *")
    assert lib.kvm_get_regs(machine.vcpu.kvm._fd, regs) == 0
    return int(regs.rax)


def test_it_is_the_vcpus_own_and_one_for_all(boot: Boot) -> None:
    one, other = boot(), boot()
    sync = one.vcpu.sync
    assert isinstance(sync, VcpuSync)
    assert sync is one.vcpu.sync is synchronizer(one.vcpu) is synchronizer(one.vcpu.kvm)
    assert sync is not other.vcpu.sync
    with pytest.raises(AttributeError):
        one.vcpu.sync = other.vcpu.sync  # type: ignore[misc]  # is what is asked


def test_it_begins_as_kvms(boot: Boot) -> None:
    sync = boot().vcpu.sync
    assert not sync.vcpu_dirty
    with pytest.raises(hv.ArgumentError, match=r"KVM has it: call synchronize_state\(\)"):
        sync.env  # noqa: B018
    for put in (sync.synchronize_post_reset, sync.synchronize_post_init, lambda: sync.put(PutLevel.RUNTIME)):
        with pytest.raises(hv.ArgumentError, match="KVM has it"):
            put()
    sync.flush()  # there is nothing to put


def test_what_is_taken_is_put_before_the_run(boot: Boot) -> None:
    machine = boot(OUTS)
    cpu, exits = machine.vcpu, machine.exits(20)
    cpu.rax = 0x21
    assert next(exits) == hv.IoOut(0x10, 1, 1, b"\x21")
    env = cpu.sync.synchronize_state()
    assert bool(cpu.sync.vcpu_dirty) is True
    assert (env.regs.rip, env.regs.rax) == (0x7C02, 0x21)
    assert cpu.sync.synchronize_state() is cpu.sync.env is env
    cpu.sync.env = env.replace(**{"regs.rax": 0x22})
    assert (cpu.rax, kernel_rax(machine)) == (0x22, 0x21)
    cpu.rax = 0x23
    assert (cpu.sync.env.regs.rax, kernel_rax(machine)) == (0x23, 0x21)
    assert next(exits) == hv.IoOut(0x11, 1, 1, b"\x23")
    assert not cpu.sync.vcpu_dirty
    assert kernel_rax(machine) == 0x23
    assert cpu.sync.synchronize_state().regs.rip == 0x7C04


def test_discard_leaves_kvm_what_it_had(boot: Boot) -> None:
    machine = boot(OUTS)
    cpu, exits = machine.vcpu, machine.exits(20)
    next(exits)
    cpu.sync.synchronize_state()
    cpu.rax = 0x55
    cpu.sync.discard()
    assert not cpu.sync.vcpu_dirty
    assert cpu.rax == kernel_rax(machine) == 0
    assert next(exits) == hv.IoOut(0x11, 1, 1, b"\0")


def test_a_state_to_start_in_puts_it_first(boot: Boot) -> None:
    # real_mode() is a change like any other: env goes to KVM, what it sets comes on top.
    machine = boot(OUTS)
    cpu = machine.vcpu
    next(machine.exits(20))
    env = cpu.sync.synchronize_state()
    cpu.sync.env = env.replace(**{"msrs[0x174]": 0x77})
    cpu.real_mode(entry=0x7C02)
    assert not cpu.sync.vcpu_dirty
    assert cpu.kvm.get_msrs([0x174]) == {0x174: 0x77}
    assert (cpu.rip, cpu.rax) == (0x7C02, 0)
    assert next(machine.exits(20)) == hv.IoOut(0x11, 1, 1, b"\0")


def test_a_read_without_an_answer_comes_first(boot: Boot) -> None:
    machine = boot("e420 e611 f4")  # in al, 0x20; out 0x11, al; hlt
    sync, exits = machine.vcpu.sync, machine.exits(20)
    assert next(exits) == hv.IoIn(0x20, 1, 1)
    with pytest.raises(hv.UnansweredError):
        sync.synchronize_state()
    assert not sync.vcpu_dirty
    machine.answer(0x66)
    assert sync.synchronize_state().regs.rax == 0x66
    assert next(exits) == hv.IoOut(0x11, 1, 1, b"\x66")


def test_refused_while_another_thread_runs_the_vcpu(boot: Boot) -> None:
    machine = boot("e610 ebfe")  # out 0x10, al; jmp $
    cpu = machine.vcpu
    next(machine.exits(20))
    runs, found = cpu.kvm._c.runs, []
    thread = threading.Thread(target=lambda: found.append(machine.run(30)))
    thread.start()
    while cpu.kvm._c.runs == runs:
        pass
    calls: tuple[Callable[[], Any], ...] = (
        lambda: cpu.sync.synchronize_state(),
        lambda: cpu.sync.synchronize_pre_loadvm(),
        lambda: cpu.sync.discard(),
    )
    try:
        for call in calls:
            with pytest.raises(hv.BusyError, match="another thread runs it"):
                call()
            assert not cpu.sync.vcpu_dirty
    finally:
        while thread.is_alive():
            machine.kick()
            thread.join(0.01)
    assert found[0].reason == "interrupted"
    assert cpu.sync.synchronize_state().regs.rip == 0x7C02


def test_of_a_closed_machine(boot: Boot) -> None:
    machine = boot()
    cpu, sync = machine.vcpu, machine.vcpu.sync
    sync.synchronize_state()
    machine.close()
    calls: tuple[Callable[[], Any], ...] = (
        sync.synchronize_state,
        sync.synchronize_post_init,
        sync.discard,
        lambda: sync.env,
        lambda: cpu.sync.synchronize_state(),
    )
    for call in calls:
        with pytest.raises(hv.ClosedError):
            call()


def test_a_machine_that_is_closed_without_it_ever_asked_for(boot: Boot) -> None:
    machine = boot()
    machine.close()
    with pytest.raises(hv.ClosedError):
        machine.vcpu.sync.synchronize_state()
