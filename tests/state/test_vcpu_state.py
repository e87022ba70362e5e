"""VcpuState: what it gets is what the single ioctls give; what it puts arrives; what is refused changes nothing."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hvmodel as hv
from hvmodel._ffi import IOCTLS, ffi, lib
from hvmodel.errors import (
    ArgumentError,
    ArgumentTypeError,
    BusyError,
    ChangedStateError,
    ClosedError,
    ForkedError,
    PartialError,
    RefusedStateError,
    UnansweredError,
)
from hvmodel.host import Mapping
from hvmodel.kvm import CpuidEntry, Kvm, Vcpu, Vm, vendor_module
from hvmodel.kvm.exits import IoIn, IoOut
from hvmodel.state import (
    PARTS,
    CpuidTable,
    Msrs,
    Regs,
    Sregs,
    VcpuEvents,
    VcpuState,
    VmState,
    part,
    vcpu_parts,
)
from hvmodel.state.block import Layout
from hvmodel.witness.check_state import random_state
from tests.cases import cases
from tests.kvm.guest import CODE, Guest
from tests.need import need

GuestMaker = Callable[..., Guest]
ROOT = Path(__file__).resolve().parents[2]
LSTAR, STAR = 0xC0000082, 0xC0000081
OUT_IN_HALT = bytes.fromhex("b041 e610 e420 f4")  # mov al, 'A'; out 0x10, al; in al, 0x20; hlt


@pytest.fixture
def ready(kvm: Kvm, vcpu: Vcpu) -> Vcpu:
    """A vCPU with CPUID as KVM gives it, and something in every part."""
    vcpu.set_cpuid2(kvm.supported_cpuid())
    state = VcpuState.get(vcpu)
    if "sregs2" not in state or "xcrs" not in state:
        pytest.skip("needs KVM_CAP_SREGS2 and KVM_CAP_XCRS")
    random_state(random.Random(7), state).put(vcpu)
    return vcpu


@pytest.fixture
def page() -> Iterator[Mapping]:
    """A page of memory."""
    with Mapping(None, 4096) as mapping:
        yield mapping


def sregs_name(state: VcpuState) -> str:
    return "sregs2" if "sregs2" in state else "sregs"


# ---- the table ----


def test_the_rows_of_the_table() -> None:
    assert len({row.name for row in PARTS}) == len(PARTS)
    for row in PARTS:
        assert part(row.name) is row
        for call in (row.get, row.put):
            assert row.scope in IOCTLS[call].scope
        assert row.capability is None or hasattr(lib, row.capability)
        assert row.why_get.endswith(".")
        assert row.why_put.endswith(".")
        if row.kind == lib.HV_PART_STRUCT and row.name != "xsave":
            # The size that the request itself encodes.
            assert IOCTLS[row.get].size == IOCTLS[row.put].size == row.record.SIZE  # type: ignore[attr-defined]


def test_orders_that_the_reasons_demand() -> None:
    # As the kernel has it (x86.c, lapic.c@v6.18): what must come before what.
    put = [row.name for row in vcpu_parts()]
    got = [row.name for row in vcpu_parts(getting=True)]
    assert sorted(put) == sorted(got)
    for first, second in (
        ("cpuid", "sregs"), ("cpuid", "xcrs"), ("cpuid", "xsave"), ("cpuid", "msrs"), ("tsc_khz", "msrs"),
        ("sregs", "lapic"), ("sregs", "mp_state"), ("sregs", "events"), ("regs", "events"), ("lapic", "msrs"),
        ("sregs2", "lapic"), ("sregs2", "mp_state"), ("sregs2", "events"), ("events", "nested_state"),
    ):  # fmt: skip
        assert put.index(first) < put.index(second), (first, second)
    for first, second in (
        ("mp_state", "regs"), ("mp_state", "events"), ("mp_state", "sregs"), ("mp_state", "lapic"),
        ("events", "sregs"), ("events", "sregs2"), ("events", "debugregs"), ("msrs", "lapic"),
    ):  # fmt: skip
        assert got.index(first) < got.index(second), (first, second)


def test_why_regs_come_before_events(vcpu: Vcpu) -> None:
    vcpu.vm.enable_cap(lib.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    state = VcpuState.get(vcpu)
    pending = state.events.replace(**{"exception.pending": 1, "exception.nr": 6}, flags=state.events.flags)
    VcpuState(events=pending).put(vcpu)
    assert VcpuState.get(vcpu, ("events",)).events.exception.pending == 1
    VcpuState(regs=state.regs).put(vcpu)
    assert VcpuState.get(vcpu, ("events",)).events.exception.pending == 0  # KVM_SET_REGS has dropped it
    VcpuState(regs=state.regs, events=pending).put(vcpu)
    assert VcpuState.get(vcpu, ("events",)).events.exception.pending == 1


def test_why_events_are_got_before_sregs(vcpu: Vcpu) -> None:
    # Without KVM_CAP_EXCEPTION_PAYLOAD getting the events delivers a payload; no get after it may be older.  What is
    # pending is made by a VM that has the capability switched on, and then off again.
    vcpu.vm.enable_cap(lib.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    events = VcpuState.get(vcpu, ("events",)).events
    fault = {"exception.pending": 1, "exception.nr": 14, "exception.has_error_code": 1}
    events = events.replace(**fault, exception_has_payload=1, exception_payload=0x5000)
    VcpuState(events=events).put(vcpu)
    vcpu.vm.enable_cap(lib.KVM_CAP_EXCEPTION_PAYLOAD, 0)
    assert VcpuState.get(vcpu).sregs.cr2 == 0x5000


def strace(script: str) -> list[str]:
    """Names of the ioctls between the script's two os.getppid()."""
    need("kvm", "strace")
    done = subprocess.run(
        ["strace", "-qq", "-e", "trace=ioctl,getppid", "-e", "signal=none", sys.executable, "-c", script],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith(("ioctl", "getppid"))]
    marks = [at for at, line in enumerate(lines) if line.startswith("getppid")]
    names = {row.request: name for name, row in IOCTLS.items()}
    found = []
    for line in lines[marks[0] + 1 : marks[1]]:
        word = line.split(",")[1].strip(" )").split(" ")[0]
        found.append(names[int(word, 0)] if word.startswith("0x") else word)
    return found


SCRIPT = """
import os, pickle
from hvmodel.kvm import Kvm
from hvmodel.state import VcpuState
with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
    vcpu.set_cpuid2(kvm.supported_cpuid())
    state = VcpuState.get(vcpu)
    stranger = pickle.loads(pickle.dumps(state))
    os.getppid()
    WORK
    os.getppid()
"""


def test_one_ioctl_for_each_part_in_the_order_of_the_table(kvm: Kvm, vcpu: Vcpu) -> None:
    parts = VcpuState.get(vcpu).parts
    gets = [row.get for row in vcpu_parts(getting=True) if row.name in parts]
    puts = [row.put for row in vcpu_parts() if row.name in parts]
    assert strace(SCRIPT.replace("WORK", "VcpuState.get(vcpu)")) == gets
    assert strace(SCRIPT.replace("WORK", "state.put(vcpu)")) == puts
    assert strace(SCRIPT.replace("WORK", "stranger.put(vcpu)")) == gets + puts
    assert strace(SCRIPT.replace("WORK", "stranger.put(vcpu); stranger.put(vcpu)")) == gets + puts + puts
    some = SCRIPT.replace("WORK", "VcpuState.get(vcpu, ('msrs', 'regs')).put(vcpu)")
    assert strace(some) == ["KVM_GET_REGS", "KVM_GET_MSRS", *gets, "KVM_SET_REGS", "KVM_SET_MSRS"]
    assert strace(SCRIPT.replace("WORK", "VcpuState(regs=state.regs).put(vcpu)")) == ["KVM_SET_REGS"]  # never refused
    # After a refusal all is put back, and looked at.
    bad = "try: VcpuState(xcrs=state.xcrs.replace(nr_xcrs=17)).put(vcpu)\n    except OSError: pass"
    done = [*gets, "KVM_SET_XCRS", *puts]
    calls = [call for call in strace(SCRIPT.replace("WORK", bad)) if call.startswith("KVM_")]
    assert calls[: len(done)] == done
    assert calls[-len(gets) :] == gets


# ---- getting ----


def test_every_part_is_what_its_own_ioctl_gives(kvm: Kvm, ready: Vcpu) -> None:
    state = VcpuState.get(ready)
    pairs = {
        "regs": ready.regs, "sregs2": ready.sregs2, "xsave": ready.xsave, "xcrs": ready.xcrs,
        "debugregs": ready.debugregs, "events": ready.vcpu_events, "mp_state": ready.mp_state,
    }  # fmt: skip
    for name, struct in pairs.items():
        assert state.part_bytes(name) == bytes(ffi.buffer(struct)), name
    assert list(state.cpuid) == ready.get_cpuid2()
    assert state.tsc_khz == ready.tsc_khz
    msrs = state.msrs.to_dict()
    assert msrs.pop(0x10) < ready.get_msrs([0x10])[0x10]
    assert msrs == ready.get_msrs(msrs)
    assert bytes(VcpuState.get(ready, ("sregs",)).sregs) == bytes(ffi.buffer(ready.sregs))
    assert bytes(VcpuState.get(ready, "fpu").fpu) == bytes(ffi.buffer(ready.fpu))


def test_parts_by_name(ready: Vcpu) -> None:
    state = VcpuState.get(ready, ("events", "regs"))
    assert state.parts == ("regs", "events")
    assert "regs" in state
    assert "sregs" not in state
    for call in (lambda: state.xsave, lambda: state.part("xsave"), lambda: state.only("xsave")):
        with pytest.raises(ArgumentError, match="not in this state") as refused:
            call()
        assert refused.value.value == "xsave"
    assert state.only("regs") == VcpuState.get(ready, ("regs",))
    assert VcpuState.get(ready, ()).parts == ()
    VcpuState().put(ready)


@pytest.mark.parametrize(
    ("parts", "kind"),
    [(5, ArgumentTypeError), ([5], ArgumentTypeError), (["rip"], ArgumentError), (["clock"], ArgumentError),
     (["regs", "regs"], ArgumentError), (["lapic"], ArgumentError), ([["regs"]], ArgumentTypeError)],
)  # fmt: skip
def test_wrong_parts(vcpu: Vcpu, parts: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        VcpuState.get(vcpu, parts)
    with pytest.raises(kind):
        VcpuState(regs=Regs()).put(vcpu, parts)


def test_msrs_that_kvm_does_not_list(kvm: Kvm, ready: Vcpu) -> None:
    # The MTRRs (SDM vol. 3, 12.11.2) and the banks of machine checks (16.3.2): in a state, and in a fresh VM after it.
    values = {0x2FF: 0xC06, 0x26F: 0x0505050505050505, 0x200: 0x80000006, 0x201: 0xF80000800, 0x400: (1 << 64) - 1,
              0x401: 0x1234, 0x402: 0x5678, 0x403: 9}  # fmt: skip
    assert not values.keys() & set(kvm.msr_index_list())
    ready.set_msrs(values)
    state = VcpuState.get(ready)
    assert {index: state.msrs[index] for index in values} == values
    nr_banks = ready.get_msrs([0x179])[0x179] & 0xFF
    assert {index for index in state.msrs if 0x400 <= index < 0x600} == set(range(0x400, 0x400 + 4 * nr_banks))
    with kvm.create_vm() as vm, vm.create_vcpu(0) as other:
        state.put(other)
        assert other.get_msrs(values) == values
    ready.ioctl("KVM_X86_SETUP_MCE", 4)  # MCG_CAP of 4 banks
    assert 0x40F in VcpuState.get(ready).msrs
    assert 0x410 not in VcpuState.get(ready).msrs


def test_msrs_of_choice(ready: Vcpu) -> None:
    assert VcpuState.get(ready, ("msrs",), msrs=[STAR, LSTAR]).msrs.keys() == (STAR, LSTAR)
    assert "regs" in VcpuState.get(ready, msrs=[STAR])
    with pytest.raises(PartialError) as refused:
        Msrs.get(ready, [STAR, LSTAR, 0x12345678, 0x174])
    error = refused.value
    assert (error.call, error.done, error.requested, error.first_failed) == ("KVM_GET_MSRS", 2, 4, 0x12345678)
    for wrong in (5, [None], [-1], [1 << 32], [STAR, STAR], ["STAR"], [True]):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            Msrs.get(ready, wrong)  # type: ignore[arg-type]


def native(vcpu: Vcpu, call: Any, indices: list[int], values: list[int] | None = None) -> tuple[int, list[int]]:
    """hv_state_get or hv_state_put of these MSRs; its word, and the values that are there afterwards."""
    size = 8 + 16 * len(indices)
    table = ffi.new("struct kvm_msrs *", {"nmsrs": len(indices), "entries": len(indices)})
    for at, index in enumerate(indices):
        table.entries[at].index, table.entries[at].data = index, (values or [0] * len(indices))[at]
    layout = Layout.of([("msrs", size)])
    block = ffi.cast("uint8_t *", table)
    word = call(vcpu._c, layout.get, 1, block) if values is None else call(vcpu._c, layout.put, 1, block, ffi.NULL)
    return word, [table.entries[at].data for at in range(len(indices))]


def test_more_msrs_than_the_kernel_takes_at_once(vcpu: Vcpu) -> None:
    # 255 go at a time; KVM does not mind to be asked for one again.
    for nr in (254, 255, 256, 509, 510, 511, 700):
        word, _ = native(vcpu, lib.hv_state_put, [STAR] * (nr - 1) + [LSTAR], list(range(nr)))
        assert word == 0
        assert vcpu.get_msrs([STAR, LSTAR]) == {STAR: nr - 2, LSTAR: nr - 1}
        assert native(vcpu, lib.hv_state_get, [LSTAR, *[STAR] * (nr - 1)]) == (0, [nr - 1] + [nr - 2] * (nr - 1))
        for at in (0, 1, 253, 254, 255, nr - 1):
            if at < nr:
                indices = [STAR] * at + [0x12345678] + [STAR] * (nr - at - 1)
                # The word of native/state.h: failed, no errno, `at` done.
                expected = 1 | at << 32
                assert native(vcpu, lib.hv_state_get, indices)[0] == expected
                assert native(vcpu, lib.hv_state_put, indices, [5] * nr)[0] == expected


def test_sizes_that_change_are_followed(kvm: Kvm, vcpu: Vcpu) -> None:
    supported = kvm.supported_cpuid()
    whole = VcpuState.get(vcpu)
    for nr in (0, 5, len(supported), 1, 256, 40, 0):
        entries = (supported * 256)[:nr] if nr < 256 else [CpuidEntry(0x80000000 + at) for at in range(256)]
        vcpu.set_cpuid2(entries)
        assert list(VcpuState.get(vcpu).cpuid) == vcpu.get_cpuid2()
        assert list(VcpuState.get(vcpu, ("cpuid",)).cpuid) == vcpu.get_cpuid2()
    whole.put(vcpu)
    assert whole.diff(VcpuState.get(vcpu), time=False) == []


# ---- putting ----


def test_random_states_arrive(kvm: Kvm, ready: Vcpu) -> None:
    rng = random.Random(11)
    base = VcpuState.get(ready)
    for _ in range(cases(40, 1000)):
        state = random_state(rng, base)
        state.put(ready)
        assert state.diff(VcpuState.get(ready), time=False) == []
        assert bytes(ffi.buffer(ready.regs)) == bytes(state.regs)
        assert bytes(ffi.buffer(ready.sregs2)) == bytes(state.sregs2)
        again = pickle.loads(pickle.dumps(state))
        assert again == state
        assert VcpuState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_some_parts_are_put(ready: Vcpu) -> None:
    before = VcpuState.get(ready)
    other = random_state(random.Random(3), before)
    other.put(ready, ("regs", "xsave"))
    after = VcpuState.get(ready)
    assert after.regs == other.regs
    assert after.xsave == other.xsave
    assert {change.path.partition(".")[0] for change in before.diff(after, time=False)} == {"regs", "xsave"}
    with pytest.raises(ArgumentError, match="not in this state"):
        VcpuState(regs=Regs()).put(ready, ("regs", "events"))


BROKEN = {
    "sregs2": lambda s: s.replace(**{"sregs2.cr4": 1 << 31}),
    "xsave": lambda s: s.replace(**{"xsave.mxcsr": 1 << 31, "xsave.xstate_bv": 3}),
    "xcrs": lambda s: s.replace(xcrs=s.xcrs.replace(xcrs=(s.xcrs.xcrs[0].replace(value=6), *s.xcrs.xcrs[1:]))),
    "msrs": lambda s: s.replace(**{f"msrs[{LSTAR:#x}]": 1 << 63}),
    "debugregs": lambda s: s.replace(**{"debugregs.dr7": 1 << 32}),
    "mp_state": lambda s: s.replace(**{"mp_state.mp_state": 99}),
    "events": lambda s: s.replace(**{"events.exception.nr": 40, "events.exception.injected": 1}),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_refused_leaves_all_parts_as_they_were(ready: Vcpu, broken: str) -> None:
    before = VcpuState.get(ready)
    other = random_state(random.Random(5), before)
    assert {change.path.partition(".")[0].partition("[")[0] for change in before.diff(other, time=False)} >= {
        "regs", "sregs2", "xsave", "xcrs", "msrs", "debugregs",
    }  # fmt: skip
    bad = BROKEN[broken](other)
    for parts in (None, (broken,), ("regs", broken)):
        with pytest.raises(RefusedStateError) as refused:
            bad.put(ready, parts)
        assert refused.value.part == broken
        assert refused.value.call == part(broken).put
        assert not getattr(refused.value, "__notes__", [])
        assert before.diff(VcpuState.get(ready), time=False) == []
    other.put(ready)  # nothing is left over: what is right is taken


def bad_xcr0(state: VcpuState) -> VcpuState:
    # XCR0.X87 must be set (SDM vol. 1, 13.3): refused when cpuid, sregs, regs and xsave are in.
    return state.replace(xcrs=state.xcrs.replace(xcrs=(state.xcrs.xcrs[0].replace(value=6), *state.xcrs.xcrs[1:])))


def test_what_a_refused_put_changes_besides_is_put_back(kvm: Kvm) -> None:
    # KVM_SET_REGS drops a pending exception; KVM_SET_SREGS makes a boot CPU that it puts to the reset vector runnable,
    # and an APIC that goes to x2APIC mode and back another LDR (x86.c, lapic.c@v6.18).
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        vm.enable_cap(lib.KVM_CAP_EXCEPTION_PAYLOAD, 1)
        with vm.create_vcpu(0) as boot, vm.create_vcpu(3) as other:
            for vcpu in (boot, other):
                vcpu.set_cpuid2(kvm.supported_cpuid())
                state = VcpuState.get(vcpu)
                if "sregs2" not in state or "xcrs" not in state:
                    pytest.skip("needs KVM_CAP_SREGS2 and KVM_CAP_XCRS")
                pending = state.events.replace(**{"exception.pending": 1, "exception.nr": 6})
                state = state.replace(events=pending, **{"mp_state.mp_state": 3})
                state.put(vcpu)
                before = VcpuState.get(vcpu)
                assert (before.events.exception.pending, before.mp_state.mp_state) == (1, 3)
                bad = bad_xcr0(before.replace(**{"sregs2.apic_base": before.sregs.apic_base | 1 << 10}))
                for wrong in (bad, bad.only("regs", "sregs2", "xcrs")):
                    with pytest.raises(RefusedStateError) as refused:
                        wrong.put(vcpu)
                    assert refused.value.part == "xcrs"
                    assert before.diff(VcpuState.get(vcpu), time=False) == []
                    assert not getattr(refused.value, "__notes__", [])


def test_a_refused_put_leaves_no_triple_fault(guest: GuestMaker) -> None:
    # kvm_pvm answers CR0.PG without EFER.LME with one, also where another part is refused afterwards.
    subject = guest(OUT_IN_HALT)
    before = VcpuState.get(subject.vcpu)
    if "xcrs" not in before:
        pytest.skip("needs KVM_CAP_XCRS")
    name = sregs_name(before)
    cs = before.sregs.cs.replace(selector=8, base=0, limit=0xFFFFFFFF, g=1, db=1)
    with pytest.raises(RefusedStateError):
        bad_xcr0(before.replace(**{f"{name}.cr0": 0x80000011, f"{name}.cs": cs})).put(subject.vcpu)
    assert isinstance(subject.run(), IoOut)


def test_msrs_refused_in_the_middle_leave_those_before_as_they_were(ready: Vcpu) -> None:
    before = ready.get_msrs([STAR, LSTAR, 0x174])
    with pytest.raises(RefusedStateError) as refused:
        Msrs({STAR: before[STAR] ^ 1, LSTAR: 1 << 63, 0x174: 9}).put(ready)
    assert "msrs[0xc0000082]" in str(refused.value)
    with pytest.raises(RefusedStateError) as refused:
        Msrs({STAR: before[STAR] ^ 1, 0x12345678: 0}).put(ready)
    assert "0x12345678" in str(refused.value)
    assert ready.get_msrs(before) == before


def test_a_state_that_was_taken_and_is_refused_later(kvm: Kvm, vcpu: Vcpu) -> None:
    # Its mark is worth nothing once the CPUID leaves are others: it is put the careful way, and nothing is lost.
    full = kvm.supported_cpuid()
    vcpu.set_cpuid2(full)
    state = VcpuState.get(vcpu, ("regs", "xcrs"))
    assert state.xcrs.xcr0 == 1
    more = state.xcrs.replace(xcrs=(state.xcrs.xcrs[0].replace(value=3), *state.xcrs.xcrs[1:]))
    state = state.replace(xcrs=more, **{"regs.rax": 5})
    state.put(vcpu)
    state.put(vcpu)
    VcpuState(xcrs=more.replace(xcrs=(more.xcrs[0].replace(value=1), *more.xcrs[1:])), regs=Regs(rflags=2)).put(vcpu)
    vcpu.set_cpuid2([])
    before = VcpuState.get(vcpu)
    with pytest.raises(RefusedStateError) as refused:
        state.put(vcpu)
    assert refused.value.part == "xcrs"
    assert before.diff(VcpuState.get(vcpu), time=False) == []


def test_a_state_that_was_taken_before_other_leaves_were_put_with_others(kvm: Kvm, vcpu: Vcpu) -> None:
    vcpu.set_cpuid2(kvm.supported_cpuid())
    state = VcpuState.get(vcpu)
    if "xcrs" not in state:
        pytest.skip("needs KVM_CAP_XCRS")
    value = state.xcrs.xcrs[0].replace(value=3)
    state = state.replace(xcrs=state.xcrs.replace(xcrs=(value, *state.xcrs.xcrs[1:])), **{"regs.rax": 5})
    state.put(vcpu)
    low = state.replace(xcrs=state.xcrs.replace(xcrs=(value.replace(value=1), *state.xcrs.xcrs[1:])))
    low.put(vcpu)
    leaves = VcpuState(cpuid=CpuidTable([]), regs=Regs(rflags=2))
    leaves.put(vcpu, ("regs",))
    leaves.put(vcpu)
    before = VcpuState.get(vcpu)
    without = VcpuState(**{name: state.part(name) for name in state.parts if name != "cpuid"})
    for again in (without, state.only("regs", "xcrs")):
        with pytest.raises(RefusedStateError) as refused:
            again.put(vcpu)
        assert refused.value.part == "xcrs"
        assert before.diff(VcpuState.get(vcpu), time=False) == []
    state.put(vcpu)  # its leaves come with it


def test_a_state_that_was_taken_and_the_vm_is_another(kvm: Kvm, page: Mapping) -> None:
    # What its vCPU gave it, it takes no more: a capability is off, the memory that an MSR points to is gone.
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        vm.set_user_memory_region(0, 0x1000, page)
        vm.enable_cap(lib.KVM_CAP_EXCEPTION_PAYLOAD, 1)
        with vm.create_vcpu(0) as vcpu:
            vcpu.set_cpuid2(kvm.supported_cpuid())
            eoi = 0x4B564D04  # MSR_KVM_PV_EOI_EN: bit 0, and an address
            plain = VcpuState.get(vcpu)
            with_payload = plain.replace(**{"regs.rax": 0x77})
            with_payload.put(vcpu)
            with_memory = plain.replace(
                msrs=plain.msrs.replace({LSTAR: 0x1234, eoi: 0x1001}),
                events=plain.events.replace(flags=plain.events.flags & ~0x10),
            )
            with_memory.put(vcpu)
            vm.enable_cap(lib.KVM_CAP_EXCEPTION_PAYLOAD, 0)
            VcpuState(regs=Regs(rflags=2)).put(vcpu)
            before = VcpuState.get(vcpu)
            with pytest.raises(RefusedStateError) as refused:
                with_payload.put(vcpu)
            assert (refused.value.part, refused.value.field) == ("events", "flags")
            assert before.diff(VcpuState.get(vcpu), time=False) == []
            Msrs({LSTAR: 0, eoi: 0}).put(vcpu)
            vm.delete_memory_region(0)
            before = VcpuState.get(vcpu)
            for again in (with_memory, VcpuState(msrs=with_memory.msrs)):
                with pytest.raises(RefusedStateError) as refused:
                    again.put(vcpu)
                assert refused.value.field == f"msrs[{eoi:#x}]"
                assert before.diff(VcpuState.get(vcpu), time=False) == []
                assert not getattr(refused.value, "__notes__", [])


def test_what_nobody_could_know_is_said(kvm: Kvm, vm: Vm, vcpu: Vcpu) -> None:
    # A capability that somebody switched off by the VM's fd: the state is put without a way back.
    vm.enable_cap(lib.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    state = VcpuState.get(vcpu)
    VcpuState(regs=Regs(rflags=2)).put(vcpu)
    off = ffi.new("struct kvm_enable_cap *", {"cap": lib.KVM_CAP_EXCEPTION_PAYLOAD})
    assert lib.kvm_enable_cap(vm.fd, off) == 0
    for notes in (1, 0):  # after that it is put the careful way
        with pytest.raises(RefusedStateError) as refused:
            state.put(vcpu)
        assert refused.value.part == "events"
        said = getattr(refused.value, "__notes__", [])
        assert len(said) == notes
        assert all("nothing is undone" in note and "regs" in note and "events" not in note for note in said)
    assert vcpu.fd >= 0  # and so it is from now on, for this fd may be used as well
    assert lib.kvm_enable_cap(vm.fd, ffi.new("struct kvm_enable_cap *", {"cap": off.cap, "args": [1]})) == 0
    for _ in range(2):
        state.put(vcpu)
    assert lib.kvm_enable_cap(vm.fd, off) == 0
    before = VcpuState.get(vcpu)
    with pytest.raises(RefusedStateError):
        state.put(vcpu)
    assert before.diff(VcpuState.get(vcpu), time=False) == []


def test_what_cannot_be_put_back_is_said(kvm: Kvm, page: Mapping) -> None:
    # The vCPU has an MSR that points to memory which is gone: KVM does not take it again, and those behind it it does.
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        vm.set_user_memory_region(0, 0x1000, page)
        with vm.create_vcpu(0) as vcpu:
            vcpu.set_cpuid2(kvm.supported_cpuid())
            eoi, last = 0x4B564D04, 0x4B564D05
            Msrs({eoi: 0x1001, last: 1}).put(vcpu)
            vm.delete_memory_region(0)
            state = VcpuState.get(vcpu)
            order = state.msrs.keys()
            assert order.index(eoi) < order.index(last)
            with pytest.raises(RefusedStateError) as refused:
                Msrs({eoi: 0, last: 0, LSTAR: 1 << 63}).put(vcpu)
            assert refused.value.field == f"msrs[{LSTAR:#x}]"
            after = VcpuState.get(vcpu)
            assert [change.path for change in state.diff(after, time=False)] == [f"msrs[{eoi:#x}]"]
            assert refused.value.__notes__ == [f"not as before: msrs[{eoi:#x}]: 0x1001 -> 0x0"]


def test_feature_msrs_are_fixed_by_the_first_run(kvm: Kvm, guest: GuestMaker) -> None:
    subject = guest(OUT_IN_HALT)
    early = VcpuState.get(subject.vcpu)
    early.put(subject.vcpu)
    subject.run()
    assert subject.vcpu._state.has_run is False
    early.put(subject.vcpu)  # the careful way
    assert subject.vcpu._state.has_run is True
    assert VcpuState.get(subject.vcpu).regs == early.regs


def test_cpuid_after_a_run_is_refused_first(kvm: Kvm, guest: GuestMaker) -> None:
    subject = guest(OUT_IN_HALT)
    subject.vcpu.set_cpuid2(kvm.supported_cpuid())
    early = VcpuState.get(subject.vcpu)
    assert isinstance(subject.run(), IoOut)
    before = VcpuState.get(subject.vcpu)
    early.put(subject.vcpu)  # the same leaves may be set again
    assert VcpuState.get(subject.vcpu).regs.rip == CODE
    before.put(subject.vcpu)
    other = before.replace(cpuid=before.cpuid.replace(0, eax=5), **{"regs.rax": 5})
    with pytest.raises(RefusedStateError) as refused:
        other.put(subject.vcpu)
    assert (refused.value.part, refused.value.call) == ("cpuid", "KVM_SET_CPUID2")
    assert before.diff(VcpuState.get(subject.vcpu), time=False) == []


def test_paging_that_a_host_drops_is_an_error(vcpu: Vcpu) -> None:
    # kvm_pvm takes CR0.PG without EFER.LME and keeps CR0 without it; others keep it.
    before = VcpuState.get(vcpu)
    name = sregs_name(before)
    cs = before.sregs.cs.replace(selector=8, base=0, limit=0xFFFFFFFF, g=1, db=1)
    wanted = before.replace(**{f"{name}.cr0": 0x80000011, f"{name}.cs": cs, "regs.rax": 5})
    if vendor_module() != "kvm_pvm":
        wanted.put(vcpu)
        assert vcpu.sregs.cr0 == 0x80000011
        return
    with pytest.raises(ChangedStateError) as changed:
        wanted.put(vcpu)
    error = changed.value
    assert (error.part, error.field, error.value, error.became) == (name, "cr0", 0x80000011, 0x11)
    assert before.diff(VcpuState.get(vcpu), time=False) == []


def test_states_of_other_vcpus(kvm: Kvm, vcpu: Vcpu) -> None:
    state = VcpuState.get(vcpu)
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        with vm.create_vcpu(0) as other:
            other.set_cpuid2(kvm.supported_cpuid())
            state.put(other)  # it has less than the other has
            assert state.diff(VcpuState.get(other, state.parts, msrs=state.msrs), time=False) == []
            full = VcpuState.get(other)
            with pytest.raises(ArgumentError, match="no in-kernel APIC") as refused:
                full.replace(**{"regs.rax": 5}).put(vcpu)
            assert refused.value.value == "lapic"
            assert VcpuState.get(vcpu).regs == state.regs


def test_areas_of_other_sizes(vcpu: Vcpu) -> None:
    # KVM reads as many bytes as it says, however many there are: a longer area must be empty there.
    state = VcpuState.get(vcpu)
    if "xsave" not in state:
        pytest.skip("needs KVM_CAP_XSAVE")
    size = len(bytes(state.xsave))
    kind = type(state.xsave)
    longer = bytes(state.xsave.replace(fcw=0x35F, xstate_bv=3)) + bytes(64)
    VcpuState(xsave=kind.from_bytes(longer)).put(vcpu)
    assert vcpu.fpu.fcw == 0x35F
    whole = state.replace(xsave=kind.from_bytes(longer))
    whole.put(vcpu)
    assert whole._known is None  # KVM has not got these very bytes: next time they are fitted again
    with pytest.raises(ArgumentError, match="no room") as refused:
        VcpuState(xsave=kind.from_bytes(longer[:-4] + b"\1\0\0\0"), regs=Regs(rax=9)).put(vcpu)
    assert refused.value.value == size + 64
    assert vcpu.regs.rax != 9


# ---- who may ----


def test_exits_are_finished_first(guest: GuestMaker) -> None:
    subject = guest(OUT_IN_HALT)
    assert isinstance(subject.run(), IoOut)
    assert VcpuState.get(subject.vcpu).regs.rip == CODE + 4
    assert not subject.vcpu.has_exit_pending
    assert isinstance(subject.run(), IoIn)
    for call in (lambda: VcpuState.get(subject.vcpu), lambda: VcpuState(regs=Regs()).put(subject.vcpu)):
        with pytest.raises(UnansweredError):
            call()
    subject.vcpu.answer(0x77)
    state = VcpuState.get(subject.vcpu)
    assert (state.regs.rip, state.regs.rax & 0xFF) == (CODE + 6, 0x77)


def test_a_vcpu_that_runs_is_busy(guest: GuestMaker) -> None:
    subject = guest(b"\xeb\xfe")
    state = VcpuState.get(subject.vcpu)

    def run() -> None:
        while True:
            try:
                subject.vcpu.run(20)
                return
            except BusyError:  # our own get, below
                pass

    runner = threading.Thread(target=run)
    runner.start()
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                VcpuState.get(subject.vcpu)
            except BusyError:
                break
            assert time.monotonic() < deadline
        with pytest.raises(BusyError):
            state.put(subject.vcpu)
    finally:
        subject.vcpu.kick()
        runner.join()
    assert VcpuState.get(subject.vcpu).regs.rip == CODE


def test_the_first_get_of_a_vcpu_that_runs(guest: GuestMaker) -> None:
    # It asks nothing of KVM that would wait for the runner.
    subject = guest(b"\xeb\xfe")
    runner = threading.Thread(target=lambda: subject.vcpu.run(20))
    runner.start()
    try:
        deadline = time.monotonic() + 10
        while subject.vcpu._c.state != 2:  # HV_STATE_RUNNING of native/run.c
            assert time.monotonic() < deadline
        for call in (lambda: VcpuState.get(subject.vcpu), lambda: VcpuState(regs=Regs()).put(subject.vcpu)):
            with pytest.raises(BusyError):
                call()
        assert subject.vcpu._state is None
    finally:
        subject.vcpu.kick()
        runner.join()
    assert VcpuState.get(subject.vcpu).regs.rip == CODE


def test_a_closed_vcpu(kvm: Kvm, vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    state = VcpuState.get(vcpu)
    fresh = pickle.loads(pickle.dumps(state))
    never = vm.create_vcpu(1)
    vcpu.close()
    never.close()
    for closed in (vcpu, never):
        for call in (lambda: VcpuState.get(closed), lambda: state.put(closed), lambda: fresh.put(closed)):  # noqa: B023
            with pytest.raises(ClosedError):
                call()
    with vm.create_vcpu(2) as other:
        assert state.only("regs", "debugregs") == VcpuState.get(other, ("regs", "debugregs"))


def test_a_child_of_fork(vcpu: Vcpu) -> None:
    state = VcpuState.get(vcpu)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for call in (lambda: VcpuState.get(vcpu), lambda: state.put(vcpu)):
                with pytest.raises(ForkedError):
                    call()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    state.put(vcpu)


def test_threads_share_a_vcpu(ready: Vcpu) -> None:
    # They get BusyError, or a whole state: never one that another's get is still writing.
    expected = VcpuState.get(ready)
    wrong: list[object] = []

    def work() -> None:
        for _ in range(cases(200, 2000)):
            try:
                changes = expected.diff(VcpuState.get(ready), time=False)
            except BusyError:
                continue
            if changes:
                wrong.append(changes)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_of_a_machine() -> None:
    need("kvm")
    with hv.Machine(ram="1M") as machine:
        machine.vcpu.real_mode(entry=0x7C00)
        state = VcpuState.get(machine.vcpu)  # as well as of the Vcpu underneath
        assert state.regs.rip == 0x7C00
        state.replace(**{"regs.rip": 0x8000}).put(machine.vcpu)
        assert VcpuState.get(machine.vcpu.kvm).regs.rip == 0x8000
        assert "clock" in VmState.get(machine)
    for wrong in (5, None, machine):
        with pytest.raises(ArgumentTypeError):
            VcpuState.get(wrong)  # type: ignore[arg-type]


# ---- the value ----


def test_a_state_of_values() -> None:
    state = VcpuState(regs=Regs(rip=5), sregs=Sregs(), events=VcpuEvents(), tsc_khz=1000)
    assert state.parts == ("tsc_khz", "sregs", "regs", "events")
    assert (state.regs.rip, state.tsc_khz) == (5, 1000)
    assert repr(state) == "<VcpuState of tsc_khz, sregs, regs, events>"
    assert state == VcpuState(events=VcpuEvents(), tsc_khz=1000, sregs=Sregs(), regs=Regs(rip=5))
    assert len({state, state.replace(), state.replace(tsc_khz=1)}) == 2
    assert state != VmState()
    assert VcpuState() == VcpuState()
    assert dict(state.items())["regs.rip"] == 5
    assert dict(state.items())["tsc_khz"] == 1000
    for change in (lambda: setattr(state, "regs", 1), lambda: delattr(state, "_block"), lambda: setattr(state, "x", 1)):
        with pytest.raises(AttributeError):
            change()


def test_replace() -> None:
    state = VcpuState(regs=Regs(rip=5), msrs=Msrs({STAR: 1}))
    changed = state.replace(**{"regs.rip": 6, "regs.rax": 7, "msrs[0xc0000081]": 2, "msrs[0xc0000082]": 3})
    assert changed.regs == Regs(rip=6, rax=7)
    assert changed.msrs == Msrs({STAR: 2, LSTAR: 3})
    assert [str(change) for change in state.diff(changed)] == [
        "regs.rax: 0x0 -> 0x7", "regs.rip: 0x5 -> 0x6",
        "msrs[0xc0000081]: 0x1 -> 0x2", "msrs[0xc0000082]: None -> 0x3",
    ]  # fmt: skip
    assert state.replace(sregs=Sregs(cr0=1)).sregs.cr0 == 1
    gone = changed.diff(changed.only("regs"))
    assert [(change.path, change.before, change.after) for change in gone] == [("msrs", changed.msrs, None)]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"rip": 5}, ArgumentError),
        ({"clock": 5}, ArgumentError),
        ({"regs": 5}, ArgumentTypeError),
        ({"regs": Sregs()}, ArgumentTypeError),
        ({"regs.rip": "5"}, ArgumentTypeError),
        ({"regs.rip": 1 << 64}, ArgumentError),
        ({"regs.eip": 5}, ArgumentError),
        ({"xsave.fcw": 5}, ArgumentError),
        ({"msrs[x]": 5}, ArgumentError),
        ({"msrs[0x10]": -5}, ArgumentError),
        ({"tsc_khz": 0}, ArgumentError),
        ({"tsc_khz.x": 5}, ArgumentError),
    ],
)
def test_wrong_replacements(changes: dict[str, Any], kind: type[Exception]) -> None:
    state = VcpuState(regs=Regs(), msrs=Msrs(), tsc_khz=5)
    with pytest.raises(kind):
        state.replace(**changes)


def test_wrong_values() -> None:
    for wrong in ({"rip": 5}, {"regs": 5}, {"regs": Sregs()}, {"regs": bytes(144)}, {"clock": Regs()}, {"msrs": {}}):
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            VcpuState(**wrong)
    with pytest.raises(ArgumentTypeError):
        VcpuState().diff(VmState())  # type: ignore[arg-type]
    good = VcpuState(regs=Regs()).to_json()
    for document in (5, {}, {"format": 1}, good | {"format": 2}, {"format": 1, "parts": {"x": 1}},
                     {"format": 1, "parts": {"regs": {"rax": -1}}}, {"format": 1, "parts": {"clock": {}}}):  # fmt: skip
        with pytest.raises((ArgumentError, ArgumentTypeError)):
            VcpuState.from_json(document)


def test_a_pickle_stands_for_itself(ready: Vcpu) -> None:
    # Another process, without a VM, reads it and says the same of it.
    state = VcpuState.get(ready)
    script = "import json, pickle, sys; print(json.dumps(pickle.load(sys.stdin.buffer).to_json()))"
    done = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(state), capture_output=True, check=True)
    assert json.loads(done.stdout) == state.to_json()


def test_a_pickle_that_lies_is_refused() -> None:
    # The kernel believes the counts in these bytes, so they are checked.
    good = VcpuState(msrs=Msrs({STAR: 1}))
    function, (kind, sizes, block) = good.__reduce__()  # type: ignore[misc]
    assert function(kind, sizes, block) == good
    with pytest.raises(ArgumentError):
        function(kind, sizes, b"\xff" + block[1:])
    with pytest.raises(ArgumentError):
        function(kind, (("regs", 144),), block)
    with pytest.raises(ArgumentError):
        function(kind, (("clock", 48),), bytes(48))
