"""QEMU's synchronisation: who has the state, what the levels put, and that nothing is seen old or lost.

Expected: what the guest does, the ioctls behind it, and QEMU 7.2's source as cited; QEMU itself is the witness in
tests/witness/test_check_sync.py.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

import hvmodel as hv
from hvmodel._ffi import ffi, lib
from hvmodel.kvm import CpuidEntry, Kvm
from hvmodel.state import Regs, Sregs, VcpuState
from hvmodel.state import sync as sync_module
from hvmodel.state.sync import (
    PutLevel,
    VcpuSync,
    get_msr_indices,
    put_msr_indices,
    synchronize_all_post_init,
    synchronize_all_post_reset,
    synchronize_all_pre_loadvm,
    synchronize_all_states,
    synchronizer,
)
from tests.kvm.guest import Guest
from tests.need import need

TSC, TSC_DEADLINE, SYSENTER_CS, STAR, MTRR_DEF_TYPE = 0x10, 0x6E0, 0x174, 0xC0000081, 0x2FF


@pytest.fixture
def boot() -> Any:
    need("kvm")
    machines: list[hv.Machine] = []

    def start(code: str) -> hv.Machine:
        machine = hv.Machine(ram="1M")
        machines.append(machine)
        machine.load(0x7C00, bytes.fromhex(code))
        machine.vcpu.real_mode(0x7C00)
        return machine

    yield start
    for machine in machines:
        machine.close()


Boot = Callable[[str], hv.Machine]


def kernel_regs(machine: hv.Machine) -> Any:
    """KVM_GET_REGS past everything."""
    regs = ffi.new("struct kvm_regs *")
    assert lib.kvm_get_regs(machine.vcpu.kvm._fd, regs) == 0
    return regs


def test_the_state_is_ours_until_the_next_run(boot: Boot) -> None:
    machine = boot("e610 e611 f4")
    exits, sync = machine.exits(20), synchronizer(machine.vcpu)
    next(exits)
    assert not sync.vcpu_dirty
    env = sync.synchronize_state()
    assert sync.vcpu_dirty
    assert sync.synchronize_state() is env is sync.env
    assert (env.regs.rip, env.regs) == (0x7C02, machine.vcpu.regs)
    sync.env = env.replace(**{"regs.rax": 0x31, "msrs[0xc0000081]": 0x123})
    assert kernel_regs(machine).rax == 0  # KVM has the old one
    assert machine.vcpu.rax == 0x31
    assert next(exits) == hv.IoOut(0x11, 1, 1, b"\x31")
    assert not sync.vcpu_dirty
    assert machine.vcpu.kvm.get_msrs([STAR]) == {STAR: 0x123}
    with pytest.raises(hv.ArgumentError, match=r"KVM has it: call synchronize_state"):
        sync.env  # noqa: B018


def test_registers_are_those_of_env_while_it_is_ours(boot: Boot) -> None:
    machine = boot("e610 8a07 e611 f4")
    machine.write(0x12340, b"\x77")
    cpu, exits = machine.vcpu, machine.exits(20)
    next(exits)
    regs, sregs = cpu.regs, cpu.sregs
    sync = synchronizer(cpu)
    sync.synchronize_state()
    assert (cpu.regs, cpu.sregs) == (regs, sregs)
    cpu.rbx, cpu.rflags = 0, 0x246
    cpu.sregs = cpu.sregs.replace(**{"ds.base": 0x12340})
    assert (sync.env.regs.rflags, sync.env.sregs.ds.base, cpu.sregs.ds.base) == (0x246, 0x12340, 0x12340)
    cpu.regs = cpu.regs.replace(rsi=5)
    assert (cpu.rsi, sync.env.regs.rsi, kernel_regs(machine).rsi) == (5, 5, 0)
    assert next(exits) == hv.IoOut(0x11, 1, 1, b"\x77")
    assert (cpu.rsi, cpu.rflags) == (5, 0x246)
    for wrong in (-1, 1 << 64, "x"):
        sync.synchronize_state()
        with pytest.raises((hv.ArgumentError, hv.ArgumentTypeError)):
            cpu.rax = wrong


def test_any_other_way_to_the_state_puts_it_first(boot: Boot) -> None:
    machine = boot("e610 e611 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    next(exits)
    sync = synchronizer(cpu)
    kvm = cpu.kvm
    ways: list[Callable[[], int]] = [
        lambda: int(kvm.regs.rdi),
        lambda: VcpuState.get(kvm).regs.rdi,
        lambda: VcpuState.get(cpu, ["regs"]).regs.rdi,
        lambda: [kvm.get_msrs([STAR]), kernel_regs(machine).rdi][1],
        lambda: [kvm.translate(0), kernel_regs(machine).rdi][1],
        lambda: [setattr(kvm, "mp_state", kvm.mp_state), kernel_regs(machine).rdi][1],
        lambda: [VcpuState.get(kvm, ["xcrs"]).put(kvm), kernel_regs(machine).rdi][1],
        lambda: [kvm.ioctl("KVM_NMI"), kernel_regs(machine).rdi][1],
        lambda: [kvm.get_cpuid2(), kernel_regs(machine).rdi][1],
        lambda: [kvm.fd, kernel_regs(machine).rdi][1],
        lambda: [kvm.fileno(), kernel_regs(machine).rdi][1],
    ]
    for at, way in enumerate(ways):
        sync.synchronize_state()
        cpu.rdi = 100 + at
        assert way() == 100 + at
        assert not sync.vcpu_dirty
        assert cpu.rdi == 100 + at


def test_what_each_level_puts(boot: Boot) -> None:
    # The MTRRs are put from RESET on, as is whether an NMI is pending (that flag of vcpu_events).
    machine = boot("e610 f4")
    cpu, kvm = machine.vcpu, machine.vcpu.kvm
    next(machine.exits(20))
    sync = synchronizer(cpu)
    assert MTRR_DEF_TYPE in put_msr_indices(cpu, PutLevel.RESET)
    for level in PutLevel:
        env = sync.synchronize_state()
        nmi = env.events.nmi.replace(pending=1)
        sync.env = env.replace(**{"events.nmi": nmi, "msrs[0x2ff]": 0x806, "msrs[0x174]": 0x10 + level})
        sync.put(level)
        assert not sync.vcpu_dirty
        got = VcpuState.get(kvm, ["events", "msrs"], msrs=[MTRR_DEF_TYPE, SYSENTER_CS])
        is_heavy = level >= PutLevel.RESET
        assert got.msrs[MTRR_DEF_TYPE] == (0x806 if is_heavy else 0)
        assert got.msrs[SYSENTER_CS] == 0x10 + level
        assert bool(got.events.nmi.pending) is is_heavy
        got.replace(**{"events.nmi": nmi.replace(pending=0), "msrs[0x2ff]": 0}).put(kvm)


def test_the_msrs_of_each_level(boot: Boot) -> None:
    cpu = boot("f4").vcpu
    runtime, reset, full = (put_msr_indices(cpu, level) for level in PutLevel)
    assert reset == full
    assert set(runtime) < set(reset)
    assert TSC in reset
    assert not {TSC, TSC_DEADLINE} & set(runtime)
    got = get_msr_indices(cpu)
    assert set(reset) <= set(got)
    assert set(got) - set(reset) <= {TSC_DEADLINE, 0x3A}
    assert set(get_msr_indices(cpu, tsc=False)) == set(got) - {TSC}
    assert runtime[:4] == (0x174, 0x175, 0x176, 0x277)
    with pytest.raises(hv.ArgumentError, match="RUNTIME, RESET or FULL"):
        put_msr_indices(cpu, 4)


def test_the_pmu_is_stopped_before_it_is_set(kvm: Kvm) -> None:
    # qemu:target/i386/kvm/kvm.c kvm_put_msrs@v7.2: version 2 with 2 general and 3 fixed counters.
    with Guest(kvm) as g:
        g.vcpu.set_cpuid2([CpuidEntry(0), CpuidEntry(0xA, eax=2 | 2 << 8 | 48 << 16, edx=3)])
        indices = put_msr_indices(g.vcpu, PutLevel.RESET)
        begin = indices.index(0x38D)
        assert indices[begin : begin + 13] == (
            *(0x38D, 0x38F),
            *(0x309, 0x30A, 0x30B),
            *(0xC1, 0x186, 0xC2, 0x187),
            *(0x38E, 0x390, 0x38D, 0x38F),
        )


def test_local_machine_checks_have_a_register_of_their_own(kvm: Kvm) -> None:
    # qemu:target/i386/kvm/kvm.c kvm_arch_init_vcpu, kvm_put_msrs@v7.2: MCG_CAP.LMCE_P brings two MSRs.
    with Guest(kvm) as g:
        has = sync_module._Features(g.vcpu, ())
        has.mcg_cap = 1 << 8 | 2
        without = sync_module._get_indices(has, False), sync_module._put_indices(has, PutLevel.RUNTIME)
        assert not has.has_feature_control
        has.mcg_cap |= 1 << 27
        with_it = sync_module._get_indices(has, False), sync_module._put_indices(has, PutLevel.RUNTIME)
        assert has.has_feature_control
    assert set(with_it[0]) - set(without[0]) == {0x3A, 0x4D0}
    assert set(with_it[1]) - set(without[1]) == {0x4D0}
    for indices in with_it:
        at = indices.index(0x17A)
        assert indices[at : at + 11] == (0x17A, 0x17B, 0x4D0, *range(0x400, 0x408))


def test_reset_and_load(boot: Boot) -> None:
    machine = boot("e610 e611 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    saved = synchronizer(cpu).synchronize_state()
    next(exits)
    next(exits)
    sync = synchronizer(cpu)
    sync.synchronize_pre_loadvm()
    assert sync.vcpu_dirty
    with pytest.raises(hv.ArgumentError, match="nothing was assigned"):
        cpu.rip  # noqa: B018
    with pytest.raises(hv.ArgumentError, match="nothing was assigned"):
        machine.run(1)
    sync.env = saved
    assert cpu.rip == 0x7C00
    sync.synchronize_post_init()
    assert not sync.vcpu_dirty
    assert next(machine.exits(20)) == hv.IoOut(0x10, 1, 1, b"\0")
    sync.synchronize_state()
    sync.env = sync.env.replace(regs=Regs(rip=0x7C02, rax=0x41, rflags=2))
    sync.synchronize_post_reset()
    assert next(machine.exits(20)) == hv.IoOut(0x11, 1, 1, b"A")
    for put in (sync.synchronize_post_reset, sync.synchronize_post_init, lambda: sync.put(PutLevel.RUNTIME)):
        with pytest.raises(hv.ArgumentError, match="KVM has it"):
            put()
    with pytest.raises(hv.ArgumentTypeError):
        sync.env = None  # type: ignore[assignment]


def test_all_vcpus_of_a_machine(boot: Boot) -> None:
    machine = boot("e610 f4")
    second = machine.vm.create_vcpu(1)
    both = [synchronizer(machine.vcpu), synchronizer(second)]
    synchronize_all_states(machine)
    assert [sync.vcpu_dirty for sync in both] == [True, True]
    saved = [sync.env for sync in both]
    synchronize_all_post_reset(machine)
    assert [sync.vcpu_dirty for sync in both] == [False, False]
    synchronize_all_pre_loadvm(machine)
    for sync, env in zip(both, saved, strict=True):
        sync.env = env
    synchronize_all_post_init(machine)
    assert [sync.vcpu_dirty for sync in both] == [False, False]


def test_a_refused_put_keeps_the_state_ours(boot: Boot) -> None:
    machine = boot("e610 e611 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    next(exits)
    sync = synchronizer(cpu)
    good = sync.synchronize_state()
    for change, part, field in (
        ({"sregs2.cr4": 1 << 63} if "sregs2" in good else {"sregs.cr4": 1 << 63}, "sregs", "cr4"),
        ({"msrs[0xc0000082]": 1 << 63}, "msrs", "[0xc0000082]"),
        ({"xcrs.xcrs": (good.xcrs.xcrs[0].replace(value=2), *good.xcrs.xcrs[1:])}, "xcrs", "xcr"),
    ):
        bad = good.replace(**change)
        sync.env = bad
        for run in (lambda: machine.run(5), lambda: sync.put(PutLevel.FULL), lambda: cpu.kvm.regs):
            with pytest.raises(hv.RefusedStateError) as refused:
                run()
            assert refused.value.part.startswith(part)
            assert field in str(refused.value.field)
            assert sync.vcpu_dirty
            assert sync.env is bad
            assert cpu.rip == 0x7C02
    sync.env = good
    assert next(machine.exits(20)) == hv.IoOut(0x11, 1, 1, b"\0")


def test_a_failed_get_says_which_part_and_leaves_it_dirty(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = boot("e610 e611 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    next(exits)
    sync = synchronizer(cpu)
    monkeypatch.setattr("hvmodel.state.sync._LONG_MODE", (0x12345678,))  # an MSR that there is not
    with pytest.raises(hv.PartialError) as failed:
        sync.synchronize_state()
    assert failed.value.first_failed == 0x12345678
    assert sync.vcpu_dirty
    for call in (lambda: sync.env, lambda: machine.run(1), lambda: cpu.rip, lambda: setattr(cpu, "rax", 1)):
        with pytest.raises(hv.ArgumentError, match=r"the last get failed: KVM_GET_MSRS.*0x12345678"):
            call()
    with pytest.raises(hv.PartialError):
        sync.synchronize_state()  # tries again
    monkeypatch.undo()
    sync.discard()
    assert not sync.vcpu_dirty
    assert cpu.rip == 0x7C02
    sync.synchronize_state()
    assert next(machine.exits(20)) == hv.IoOut(0x11, 1, 1, b"\0")


def test_refused_while_another_thread_runs_the_vcpu(boot: Boot) -> None:
    machine = boot("e610 ebfe")
    cpu, sync = machine.vcpu, synchronizer(machine.vcpu)
    next(machine.exits(20))
    runs = cpu.kvm._c.runs
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(machine.run(30)))
    thread.start()
    while cpu.kvm._c.runs == runs:
        pass
    for call in (sync.synchronize_state, sync.synchronize_pre_loadvm, sync.discard):
        with pytest.raises(hv.BusyError, match="another thread runs it"):
            call()
        assert not sync.vcpu_dirty
    while thread.is_alive():
        machine.kick()
        thread.join(0.01)
    assert found[0].reason == "interrupted"
    assert sync.synchronize_state().regs.rip == 0x7C02


def test_an_unanswered_read_is_answered_first(boot: Boot) -> None:
    machine = boot("e420 e611 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    next(exits)
    sync = synchronizer(cpu)
    for call in (sync.synchronize_state, sync.synchronize_pre_loadvm):
        with pytest.raises(hv.UnansweredError):
            call()
        assert not sync.vcpu_dirty
    machine.answer(0x44)
    assert sync.synchronize_state().regs.rax == 0x44
    assert next(exits) == hv.IoOut(0x11, 1, 1, b"\x44")


def test_a_state_of_other_parts(boot: Boot) -> None:
    # What is missing stays as KVM has it; sregs without sregs2, and fpu without xsave, will do.
    machine = boot("e610 e611 f4")
    cpu, exits = machine.vcpu, machine.exits(20)
    next(exits)
    cpu.kvm.complete_io()
    state = VcpuState.get(cpu, ["regs", "sregs", "fpu", "events"])
    sync = synchronizer(cpu)
    sync.synchronize_pre_loadvm()
    sync.env = state.replace(**{"regs.rax": 0x61, "sregs.cr2": 0x5000})
    assert isinstance(cpu.sregs, Sregs)
    cpu.sregs = cpu.sregs.replace(**{"es.base": 0x100})
    assert next(exits) == hv.IoOut(0x11, 1, 1, b"\x61")
    assert (cpu.sregs.cr2, cpu.sregs.es.base) == (0x5000, 0x100)


def test_with_an_in_kernel_apic(kvm: Kvm) -> None:
    with Guest(kvm, bytes.fromhex("e610 f4"), irqchip=True) as g:
        g.run()
        sync = synchronizer(g.vcpu)
        env = sync.synchronize_state()
        assert "lapic" in env
        regs = bytearray(env.lapic.regs)
        regs[0x80] = 0x30  # TPR
        sync.env = env.replace(lapic=env.lapic.replace(regs=bytes(regs)))
        sync.synchronize_post_reset()
        assert g.vcpu.sregs.cr8 == 0  # the put of a vCPU is without the APIC
        sync.synchronize_state()
        sync.env = env.replace(lapic=env.lapic.replace(regs=bytes(regs)))
        sync.put_apic()
        assert sync.vcpu_dirty
        sync.discard()
        assert g.vcpu.sregs.cr8 == 3


def test_a_second_machine_keeps_its_own(boot: Boot) -> None:
    one, two = boot("e610 f4"), boot("e610 f4")
    assert synchronizer(one.vcpu) is synchronizer(one.vcpu.kvm) is not synchronizer(two.vcpu)
    with pytest.raises(hv.ArgumentError, match="has its synchronizer"):
        synchronizer(one.vcpu, cpuid=[])
    with pytest.raises(hv.ArgumentTypeError):
        synchronizer(None)  # type: ignore[arg-type]


def test_closed(boot: Boot) -> None:
    machine = boot("e610 f4")
    sync = synchronizer(machine.vcpu)
    sync.synchronize_state()
    machine.close()
    calls: list[Callable[[], object]] = [
        sync.synchronize_state,
        sync.synchronize_pre_loadvm,
        sync.synchronize_post_reset,
        sync.discard,
        lambda: sync.env,
        lambda: synchronizer(machine.vcpu).synchronize_state(),
    ]
    for call in calls:
        with pytest.raises(hv.ClosedError):
            call()


def test_a_vcpu_that_is_gone(kvm: Kvm) -> None:
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        sync = synchronizer(vcpu)
        vcpu.close()
    del vm, vcpu
    gc.collect()
    assert isinstance(sync, VcpuSync)
    with pytest.raises(hv.ClosedError):
        sync.synchronize_state()
    assert "VcpuSync" in repr(sync)


def test_all_states_are_those_of_a_machine() -> None:
    for nothing in (None, 5, "machine"):
        with pytest.raises(hv.ArgumentTypeError, match="synchronize_all"):
            sync_module.synchronize_all_states(nothing)  # type: ignore[arg-type]
