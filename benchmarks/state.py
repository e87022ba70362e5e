"""state: all of a vCPU's state got and put, the bytes kept; against the same ioctls in C.

    full get      VcpuState.get(vcpu): a new value every time
    full put      put() of a state that the vCPU has had before
    new put       put() of a state that is new to the vCPU: all is got first, for a refusal changes nothing; C gets too
    get, decoded  full get, and every field of it looked at

The vCPU is in real mode, with CPUID as KVM gives it, and without an in-kernel APIC.
"""

from __future__ import annotations

import ctypes
import os
import pickle
from collections.abc import Callable
from typing import Any

from . import harness
from .guests import assemble
from .harness import BenchmarkError, FloorVm, Pace, Result
from .subject import Subject

__all__ = ["run"]

BAR = 1.15
TIMES = 60
PARTS = ("cpuid", "tsc_khz", "sregs2", "regs", "xsave", "xcrs", "msrs", "debugregs", "mp_state", "events")


def run(pace: Pace) -> list[Result]:
    """Gets and puts take turns; the floor's VM is another than hvmodel's, made with the same calls."""
    from hvmodel.state import VcpuState

    lib = harness.load_floor("state")
    lib.floor_state_new.restype = ctypes.c_void_p
    lib.floor_state_new.argtypes = [ctypes.c_void_p]
    lib.floor_state_free.restype = None
    lib.floor_state_free.argtypes = [ctypes.c_void_p]
    for call in (lib.floor_state_get, lib.floor_state_put):
        call.restype = ctypes.c_int64
        call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
    image = assemble("halt")
    times = pace.count(TIMES)
    with FloorVm(lib, image, cpuid=True) as floor, Subject(image, cpuid=True) as subject:
        kept = lib.floor_state_new(floor.address)
        if not kept:
            raise BenchmarkError(f"the C floor: {os.strerror(ctypes.get_errno())}")
        try:
            vcpu = subject.vcpu
            state = VcpuState.get(vcpu)
            if tuple(name for name in state.parts if name != "nested_state") != PARTS:
                raise BenchmarkError(f"this host has other parts than the C floor: {', '.join(state.parts)}")
            done = harness.checked(lib.floor_state_get(floor.address, kept, 1), "the C floor")
            if done != len(state.msrs) * 1000 + len(state.cpuid):
                raise BenchmarkError(f"the C floor has other MSRs or CPUID entries: {done}")
            return _compare(pace, lib, floor.address, kept, vcpu, state, times)
        finally:
            lib.floor_state_free(kept)


def _compare(pace: Pace, lib: Any, floor: int | None, kept: int, vcpu: Any, state: Any, times: int) -> list[Result]:
    from hvmodel.state import VcpuState

    data = pickle.dumps(state)
    strangers = iter([pickle.loads(data) for _ in range(times * (pace.rounds * pace.turns + 1))])

    def in_c(call: Callable[..., int]) -> Callable[[], float]:
        return lambda: harness.per_item_us(lambda: harness.checked(call(floor, kept, times), "the C floor"), times)

    def repeated(work: Callable[[Any], object], what: Any) -> Callable[[], float]:
        def turn() -> None:
            for _ in range(times):
                work(what)

        return lambda: harness.per_item_us(turn, times)

    best = harness.interleave(
        pace,
        {
            "c get": in_c(lib.floor_state_get),
            "get": repeated(VcpuState.get, vcpu),
            "c put": in_c(lib.floor_state_put),
            "put": repeated(state.put, vcpu),
            "new put": repeated(lambda vcpu: next(strangers).put(vcpu), vcpu),
            "decoded": repeated(lambda vcpu: list(VcpuState.get(vcpu).items()), vcpu),
        },
    )
    both = best["c get"] + best["c put"]
    return [
        harness.against_floor("full get", best["get"], "us", best["c get"], BAR),
        harness.against_floor("full put", best["put"], "us", best["c put"], BAR),
        harness.against_floor("new put", best["new put"], "us", both, None),
        harness.against_floor("get, decoded", best["decoded"], "us", best["c get"], None),
    ]
