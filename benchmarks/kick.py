"""kick: from the call to KVM_RUN's return, and to the next Python statement of the thread that runs the vCPU.

The guest spins in real mode.  To KVM_RUN's return: a thread of C runs the vCPU, hvmodel's through hvmodel's own entry,
and reads the clock when it is back, so that both sides stop at the same place; the kick itself is Python's.  To the
next statement: a Python thread runs the vCPU and reads the clock in the statement after `run()`; the kicking thread
either waits for it, or goes on computing in Python and so holds the GIL.

Kicker and runner have a CPU each, in C as in Python, or the wake-up of the one would push the other off its CPU.
A turn is the median of its kicks; of the turns, the least counts.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import harness
from .guests import assemble
from .harness import BenchmarkError, FloorVm, Pace, Result
from .subject import Subject

__all__ = ["run"]

BAR_RETURN = 1.3
BAR_STATEMENT = 2.0
KICKS = 20
GAP_NS = 300_000


def run(pace: Pace) -> list[Result]:
    """Medians of KICKS kicks each."""
    image = assemble("spin")
    lib = harness.load_floor("kick")
    lib.floor_kicks.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_int64, ctypes.c_void_p]
    lib.floor_runner_new.restype = ctypes.c_void_p
    lib.floor_runner_new.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    lib.floor_runner_wait.restype = ctypes.c_int64
    lib.floor_runner_wait.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64)]
    for function in (lib.floor_runner_go, lib.floor_runner_free):
        function.restype = None
        function.argtypes = [ctypes.c_void_p]
    kicks = pace.count(KICKS)

    with FloorVm(lib, image) as floor, Subject(image) as subject, _two_cpus() as cpu:
        best = harness.interleave(
            pace,
            {
                "c": lambda: _floor(lib, floor, cpu, kicks),
                "return": lambda: _to_return(lib, subject, cpu, kicks),
                "waiting": lambda: _to_statement(subject, cpu, kicks, _wait),
                "computing": lambda: _to_statement(subject, cpu, kicks, _compute),
            },
        )
    c = best["c"]
    return [
        harness.against_floor("real mode, to KVM_RUN's return", best["return"], "us", c, BAR_RETURN),
        harness.against_floor("real mode, to the runner's next statement", best["waiting"], "us", c, BAR_STATEMENT),
        harness.against_floor("real mode, to it while the kicker computes", best["computing"], "us", c, BAR_STATEMENT),
    ]


@contextmanager
def _two_cpus() -> Iterator[int]:
    # Keep this thread on one CPU; the other one is the runners', -1 where there is only one.
    allowed = os.sched_getaffinity(0)
    mine, *others = sorted(allowed)
    if not others:
        yield -1
        return
    os.sched_setaffinity(0, {mine})
    try:
        yield others[0]
    finally:
        os.sched_setaffinity(0, allowed)


def _floor(lib: ctypes.CDLL, floor: FloorVm, cpu: int, kicks: int) -> float:
    latencies = (ctypes.c_int64 * kicks)()
    harness.checked(lib.floor_kicks(floor.address, cpu, kicks, GAP_NS, latencies), "the C floor of kick")
    return harness.median_us(latencies)


def _to_return(lib: ctypes.CDLL, subject: Any, cpu: int, kicks: int) -> float:
    from hvmodel._ffi import ffi
    from hvmodel._ffi import lib as native

    hv_run = int(ffi.cast("uintptr_t", ffi.addressof(native, "hv_run")))
    vcpu = int(ffi.cast("uintptr_t", subject.vcpu._c))
    runner = lib.floor_runner_new(hv_run, vcpu, native.HV_RETRY, cpu)
    if not runner:
        raise BenchmarkError("the thread of C that runs the vCPU cannot be made")
    latencies, rc = [], ctypes.c_int64()
    kick, now = subject.vcpu.kick, time.perf_counter_ns
    try:
        for _ in range(kicks):
            lib.floor_runner_go(runner)
            time.sleep(GAP_NS / 1e9)
            start = now()
            kick()
            latencies.append(lib.floor_runner_wait(runner, ctypes.byref(rc)) - start)
            if rc.value != native.HV_KICKED:
                raise BenchmarkError(f"hv_run() answered {rc.value}, not HV_KICKED")
    finally:
        lib.floor_runner_free(runner)
    return harness.median_us(latencies)


class _Runner(threading.Thread):
    # Runs the vCPU once for every `go`; `left_ns` is set in the statement after run().
    def __init__(self, vcpu: Any, cpu: int) -> None:
        super().__init__(daemon=True)
        self.vcpu = vcpu
        self.cpu = cpu
        self.go = threading.Semaphore(0)
        self.done = threading.Semaphore(0)
        self.left_ns = 0
        self.exit: object = None
        self.stopping = False

    def run(self) -> None:
        if self.cpu >= 0:
            os.sched_setaffinity(0, {self.cpu})
        enter, now = self.vcpu.run, time.perf_counter_ns
        while True:
            self.go.acquire()
            if self.stopping:
                return
            left = enter()
            self.left_ns = now()
            self.exit = left
            self.done.release()


def _wait(runner: _Runner) -> None:
    runner.done.acquire()


def _compute(runner: _Runner) -> None:
    # Nothing in here gives the GIL up.
    total = 0
    while not runner.left_ns:
        total += 1
    runner.done.acquire()


def _to_statement(subject: Any, cpu: int, kicks: int, meanwhile: Callable[[_Runner], None]) -> float:
    from hvmodel.kvm import Interrupted

    latencies = []
    kick, now = subject.vcpu.kick, time.perf_counter_ns
    runner = _Runner(subject.vcpu, cpu)
    runner.start()
    try:
        for _ in range(kicks):
            runner.left_ns = 0
            runner.go.release()
            time.sleep(GAP_NS / 1e9)
            start = now()
            kick()
            meanwhile(runner)
            if not isinstance(runner.exit, Interrupted):
                raise BenchmarkError(f"a kicked vCPU left with {runner.exit!r}")
            latencies.append(runner.left_ns - start)
    finally:
        runner.stopping = True
        runner.go.release()
        runner.join()
    return harness.median_us(latencies)
