"""What a machine leaves behind: nothing.  Descriptors, mappings, threads and timers, before and after."""

from __future__ import annotations

import errno
import gc
import importlib
import inspect
import os
import pkgutil
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

import hvmodel as hv
from hvmodel._ffi import lib
from hvmodel.host import PageMap
from hvmodel.kvm import vcpu as vcpu_module
from hvmodel.machine import machine as machine_module
from hvmodel.mmu import reset_all_pte_masks
from hvmodel.witness.check_simulator import ShadowLab
from tests.cases import cases
from tests.need import need, need_cap

SPIN = b"\xeb\xfe"
PORTS = bytes.fromhex("e610 ebfc")


class Held(NamedTuple):
    """What the process holds."""

    fds: list[str]
    guest_maps: int  # of KVM's files and of guest RAM
    maps: int
    threads: int
    timers: int


def held() -> Held:
    gc.collect()
    fds = []
    for fd in sorted(os.listdir("/proc/self/fd"), key=int):
        with suppress(OSError):
            fds.append(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    maps = Path("/proc/self/maps").read_text().splitlines()
    timers = Path("/proc/self/timers")
    return Held(
        [fd for fd in fds if not fd.endswith("/fd")],  # the one that lists them
        sum(("kvm" in line and ".so" not in line) or "memfd:" in line for line in maps),
        len(maps),
        len(os.listdir("/proc/self/task")),
        timers.read_text().count("notify:") if timers.exists() else 0,
    )


@contextmanager
def nothing_left(maps: int = 4) -> Iterator[None]:
    """The block leaves nothing; `maps`: by how many lines the allocator's own mappings may differ."""
    need("kvm")
    with hv.Machine(ram="64K") as warm:  # timers, caches, allocator
        warm.load(0x7C00, b"\xf4")
        warm.vcpu.real_mode()
        warm.run(timeout=1)
    before = held()
    yield
    for _ in range(100):  # a thread leaves /proc a little after it was joined
        after = held()
        if after.threads == before.threads and after.timers == before.timers:
            break
        time.sleep(0.01)
    assert after._replace(maps=before.maps) == before
    assert abs(after.maps - before.maps) <= maps


def spin(code: bytes = SPIN, **named: object) -> hv.Machine:
    machine = hv.Machine(ram="64K", **named)
    machine.load(0x7C00, code)
    machine.vcpu.real_mode()
    return machine


def test_machines_in_a_row() -> None:
    with nothing_left():
        for n in range(cases(50, 200)):
            with spin(PORTS if n % 2 else SPIN, unclaimed="open_bus") as machine:
                machine.console.serial.read()
                machine.batch.record(10)
                assert machine.run(timeout=1e-4).reason in ("timeout", "exit")
                machine.vcpu.location()


def test_many_machines_at_once() -> None:
    # More vCPUs than the pool of the run loop holds in one piece.
    with nothing_left():
        machines = [hv.Machine(ram="64K") for _ in range(cases(70, 300))]
        for machine in machines:
            machine.close()


def test_more_vcpus_than_are_kept_in_quarantine() -> None:
    # A VM keeps the vCPUs that were closed until it is closed itself, and has at most 1024.
    with nothing_left(), hv.Kvm() as kvm:
        for _ in range(cases(1, 4)):
            with kvm.create_vm() as vm:
                for n in range(700):
                    with vm.create_vcpu(n) as vcpu:
                        vcpu.kick()
                        assert vcpu.run() == hv.Interrupted("kick")


def test_machines_in_threads_that_end() -> None:
    def one() -> None:
        with spin() as machine:
            machine.run(timeout=1e-3)

    def several() -> None:
        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    need("kvm")
    several()
    with nothing_left(maps=16):  # stacks and heaps of threads are kept for later ones
        for _ in range(cases(5, 25)):
            several()


def test_machines_closed_while_they_run() -> None:
    def runner(machine: hv.Machine) -> None:
        with suppress(hv.ClosedError):
            while True:
                machine.run()

    with nothing_left():
        for n in range(cases(20, 200)):
            machine = spin(PORTS if n % 2 else SPIN, unclaimed="open_bus")
            thread = threading.Thread(target=runner, args=(machine,))
            thread.start()
            if n % 3:
                time.sleep(1e-3)
            machine.close()
            thread.join(60)
            assert not thread.is_alive()


# ---- constructors that fail ----

WHERE = {
    # what fails: the object and its attribute
    "open": (machine_module, "Kvm"),
    "vm": (hv.Kvm, "create_vm"),
    "ram": (hv.RamBlock, "__init__"),
    "identity map": (hv.Vm, "set_identity_map_addr"),
    "tss": (hv.Vm, "set_tss_addr"),
    "slot": (hv.Vm, "change_memory_regions"),
    "vcpu": (hv.Vm, "create_vcpu"),
    "cpu": (machine_module, "Cpu"),
    "cpuid": (machine_module, "_guest_cpuid"),
}


@pytest.mark.parametrize("step", WHERE)
@pytest.mark.parametrize("error", [OSError(errno.EIO, "injected"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_a_constructor_that_fails_at_any_step(step: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = WHERE[step]

    def fail(*args: object, **named: object) -> None:
        raise error

    with nothing_left():
        monkeypatch.setattr(owner, name, fail)
        for _ in range(3):
            with pytest.raises(type(error)):
                hv.Machine(ram="64K")
        monkeypatch.undo()


@contextmanager
def limit(what: int, value: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


def test_no_descriptor_is_left_at_any_step() -> None:
    with nothing_left():
        made = refused = 0
        free = os.dup(0)
        os.close(free)
        for more in range(16):
            with limit(resource.RLIMIT_NOFILE, free + more):
                try:
                    hv.Machine(ram="64K").close()
                    made += 1
                except hv.HostError as error:
                    refused += 1
                    assert error.errno == errno.EMFILE  # noqa: PT017
        assert refused >= 4  # system, VM, memfd, vCPU
        assert made


def test_no_address_is_left_where_the_ram_does_not_fit() -> None:
    need("kvm")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    with nothing_left(), limit(resource.RLIMIT_AS, pages * 4096 + (256 << 20)), pytest.raises(hv.HostError) as caught:
        hv.Machine(ram="1G")
    assert (caught.value.errno, caught.value.call) == (errno.ENOMEM, "mmap")


def test_no_vcpu_is_left_where_its_page_cannot_be_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    real = vcpu_module.lib

    class Refuses:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        @staticmethod
        def hv_vcpu_open(fd: int, size: int, out: object) -> int:
            return -errno.ENOMEM

    with nothing_left():
        monkeypatch.setattr(vcpu_module, "lib", Refuses())
        with pytest.raises(hv.HostError, match="kvm_run page"):
            hv.Machine(ram="64K")
        monkeypatch.undo()


def test_a_vcpu_of_a_vm_whose_system_was_closed() -> None:
    with nothing_left():
        kvm = hv.Kvm()
        vm = kvm.create_vm()
        kvm.close()
        with suppress(hv.ClosedError):
            vm.create_vcpu(0)
        vm.close()


# ---- what was forgotten ----


def forget(make: Callable[[], object]) -> list[str]:
    """Make something, forget it; the warnings."""
    kept = [make()]
    with pytest.warns(ResourceWarning) as warned:
        kept.clear(), gc.collect()
    return [str(each.message) for each in warned]


def test_a_forgotten_machine_warns_and_is_released() -> None:
    def make() -> hv.Machine:
        machine = spin()
        machine.run(timeout=1e-3)
        return machine

    with nothing_left():
        for _ in range(3):
            text = "\n".join(forget(make))
            for what in ("unclosed Kvm", "unclosed Vm", "unclosed Vcpu", "unclosed MemFd", "unclosed Mapping"):
                assert what in text


def test_a_forgotten_vcpu_does_not_keep_its_vm() -> None:
    # The kvm_run page is a mapping of the vCPU's file: it must go too.
    def make() -> hv.Vcpu:
        kvm = hv.Kvm()
        vcpu = kvm.create_vm().create_vcpu(3)
        vcpu.kick()
        assert vcpu.run() == hv.Interrupted("kick")
        return vcpu

    with nothing_left():
        assert any("Vcpu 3" in text for text in forget(make))


def test_what_was_closed_does_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    with nothing_left():
        machine = spin()
        machine.run(timeout=1e-3)
        machine.close()
        del machine
        gc.collect()
    assert not recwarn.list


def test_a_warning_made_an_error_releases_all_the_same() -> None:
    import subprocess
    import sys

    need("kvm")
    code = (
        "import gc, os, hvmodel as hv\n"
        "hv.Machine(ram='64K').close()\n"
        "before = os.listdir('/proc/self/fd')\n"
        "machine = hv.Machine(ram='64K'); del machine; gc.collect()\n"
        "assert os.listdir('/proc/self/fd') == before\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'kvm-vcpu' not in maps and 'memfd' not in maps\n"
        "print('ok')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "ok\n", done.stderr
    assert done.stderr.count("ResourceWarning: unclosed") >= 5


# ---- every class that owns something ----


def _device(stack: ExitStack) -> object:
    vm = stack.enter_context(stack.enter_context(hv.Kvm()).create_vm())
    return vm.create_device(lib.KVM_DEV_TYPE_VFIO)


def _stats(stack: ExitStack) -> object:
    from hvmodel.witness.stats import Stats

    vm = stack.enter_context(stack.enter_context(hv.Kvm()).create_vm())
    return Stats(vm.stats_fd())


def _uffd(stack: ExitStack) -> object:
    need("userfaultfd")
    from hvmodel.host import UserFaultFd

    uffd = UserFaultFd()
    uffd.register(stack.enter_context(hv.Mapping(None, "64K")))
    uffd.serve_native()
    return uffd


def _guest_memfd(stack: ExitStack) -> object:
    from hvmodel.kvm import GuestMemFd

    kvm = stack.enter_context(hv.Kvm())
    need_cap(kvm, "GUEST_MEMFD")
    return GuestMemFd(stack.enter_context(kvm.create_vm()), "64K")


def _backing_file(_stack: ExitStack) -> object:
    from hvmodel.ram.backing import BackingFile

    return BackingFile("/dev/shm", 1 << 16)


def _tracefs(_stack: ExitStack) -> object:
    need("tracefs")
    from hvmodel.witness.tracefs import Tracefs

    return Tracefs()


def _instance(stack: ExitStack) -> object:
    tracefs = stack.enter_context(_tracefs(stack))  # type: ignore[arg-type]
    return tracefs.instance(["kvm:kvm_userspace_exit"])


def _scratch(stack: ExitStack) -> object:
    from hvmodel.state.trial import Scratch

    vm = stack.enter_context(stack.enter_context(hv.Kvm()).create_vm())
    return Scratch(stack.enter_context(vm.create_vcpu(0)))


def _qemu(_stack: ExitStack) -> object:
    need("qemu")
    from hvmodel.witness.qemu import Qemu

    return Qemu("-m", "16M")


def _gdbstub(stack: ExitStack) -> object:
    from hvmodel.witness.gdbstub import GdbStub, frame

    ours, theirs = socket.socketpair()
    stack.enter_context(theirs).sendall(b"+" + frame(b"PacketSize=400"))
    return GdbStub(ours)


def _tcg(_stack: ExitStack) -> object:
    need("qemu")
    from hvmodel.witness.tcg import TcgWalks

    return TcgWalks()


def _layout(name: str) -> object:
    from hvmodel.machine import layouts

    return getattr(layouts, name)("1M")


# Class -> how to make one; what it is made from is closed with the stack.
OWNERS: dict[str, Callable[[ExitStack], object]] = {
    "Kvm": lambda _: hv.Kvm(),
    "Vm": lambda stack: stack.enter_context(hv.Kvm()).create_vm(),
    "Vcpu": lambda stack: stack.enter_context(stack.enter_context(hv.Kvm()).create_vm()).create_vcpu(0),
    "Device": _device,
    "MemFd": lambda _: hv.MemFd("leaks", "64K"),
    "Mapping": lambda _: hv.Mapping(None, "64K"),
    "RamBlock": lambda _: hv.RamBlock("leaks", "64K"),
    "BackingFile": _backing_file,
    "Machine": lambda _: hv.Machine(ram="64K"),
    "PageMap": lambda _: PageMap(),
    "UserFaultFd": _uffd,
    "GuestMemFd": _guest_memfd,
    "Scratch": _scratch,
    "Stats": _stats,
    "Tracefs": _tracefs,
    "Instance": _instance,
    "KvmTrace": lambda _: hv.witness.KvmTrace(),
    "MmuLab": lambda _: hv.witness.MmuLab([hv.witness.LabSlot(1 << 24, 1 << 16)], trace=False),
    "ShadowLab": lambda _: ShadowLab(reset_all_pte_masks(46, mmio_caching=False)),
    "Qemu": _qemu,
    "GdbStub": _gdbstub,
    "TcgWalks": _tcg,
    "PcLayout": lambda _: _layout("PcLayout"),
    "Q35Layout": lambda _: _layout("Q35Layout"),
}


# As above, but with nobody left who knows it: a VM keeps its vCPUs.
FORGOTTEN = OWNERS | {"Vcpu": lambda _: hv.Kvm().create_vm().create_vcpu(0)}
# What warns for one that was forgotten, where that is not the class itself.
WARNS = {"RamBlock": ("MemFd", "Mapping"), "Machine": ("Kvm", "Vm", "Vcpu", "MemFd", "Mapping"), "Instance": ("",)}
WARNS["Scratch"] = ("Vm", "Vcpu")
WARNS["KvmTrace"] = ("tracing instance",)
WARNS["MmuLab"] = ("Kvm", "Vm", "Vcpu", "Mapping")
WARNS["ShadowLab"] = ("Kvm", "Vm", "Vcpu", "Mapping", "PageMap", "tracing instance")
WARNS |= dict.fromkeys(("PcLayout", "Q35Layout"), ("MemFd", "Mapping"))


def warm_up(name: str) -> None:
    """Make one, for what importing and allocating leaves; skip where this host cannot."""
    need("kvm")
    try:
        with ExitStack() as stack:
            OWNERS[name](stack).close()  # type: ignore[attr-defined]
    except hv.HostError as error:
        if name not in ("Tracefs", "Instance", "KvmTrace", "ShadowLab"):
            raise
        pytest.skip(f"needs tracefs: {error}")


def test_every_public_owner_is_in_the_table() -> None:
    found = set()
    for info in pkgutil.walk_packages(hv.__path__, "hvmodel."):
        if info.name in ("hvmodel.__main__", "hvmodel._native"):
            continue
        module = importlib.import_module(info.name)
        for name, thing in vars(module).items():
            if inspect.isclass(thing) and thing.__module__ == info.name and not name.startswith("_"):
                found |= {name} if callable(getattr(thing, "close", None)) else set()
    # What several have in common; and what holds neither descriptor nor mapping (of a walker's memory: views, which go
    # with it), and may be forgotten.
    assert found - {"Handle", "Layout"} - {"AddressSpace", "GuestMemory", "Walker"} == set(OWNERS)


@pytest.mark.parametrize("name", FORGOTTEN)
def test_an_owner_that_was_forgotten_warns_and_lets_go(name: str) -> None:
    warm_up(name)
    with nothing_left():
        for _ in range(cases(3, 20)):
            with ExitStack() as parents:
                text = "\n".join(forget(lambda parents=parents: FORGOTTEN[name](parents)))
            for what in WARNS.get(name, (name,)):
                assert f"unclosed {what}" in text


@pytest.mark.parametrize("name", OWNERS)
def test_an_owner_that_was_closed_holds_nothing(name: str, recwarn: pytest.WarningsRecorder) -> None:
    warm_up(name)
    with nothing_left():
        for _ in range(cases(3, 20)):
            with ExitStack() as stack:
                owner = OWNERS[name](stack)
                before = held()
                assert owner.__enter__() is owner  # type: ignore[attr-defined]
                owner.__exit__(None, None, None)  # type: ignore[attr-defined]
                owner.close()  # type: ignore[attr-defined]
                assert "closed" in repr(owner)
                assert held() != before
                del owner
        gc.collect()
    assert not recwarn.list


@pytest.mark.parametrize("name", FORGOTTEN)
def test_an_owner_whose_warning_is_an_error_lets_go(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a finalizer raises goes to sys.unraisablehook or to stderr; here it is only counted.
    raised: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda info: raised.append(info.exc_type))
    monkeypatch.setattr(sys, "excepthook", lambda kind, *_: raised.append(kind))
    warm_up(name)
    with nothing_left():
        with ExitStack() as stack:
            kept = [FORGOTTEN[name](stack)]
            kept.clear()
            gc.collect()
        gc.collect()
    assert set(raised) == {ResourceWarning}


@pytest.mark.parametrize("name", OWNERS)
def test_an_owner_cannot_be_made_without_a_descriptor(name: str) -> None:
    warm_up(name)
    with nothing_left():
        free = os.dup(0)
        os.close(free)
        for more in range(cases(6, 12)):
            with ExitStack() as stack, suppress(OSError), limit(resource.RLIMIT_NOFILE, free + more):
                OWNERS[name](stack).close()  # type: ignore[attr-defined]
