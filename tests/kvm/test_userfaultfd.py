"""Guests that fault through a userfaultfd: emulated (real and protected mode) and at CPL3, which may run natively."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

import hvmodel as hv
from hvmodel.host import UserFaultFd
from hvmodel.host.faults import Fault, FaultCounts
from tests.guests import assemble
from tests.need import need

PAGE = 4096
START, COUNT = 0x100000, 4  # of guest `fault`
MODES = {"emulated": {}, "cpl3": {"USER": 1}}


@pytest.fixture(params=MODES)
def machine(request: pytest.FixtureRequest) -> Iterator[hv.Machine]:
    need("kvm", "userfaultfd", "gcc")
    with hv.Machine(ram="2M") as machine:
        machine.load(0x7C00, assemble("fault", START=START, COUNT=COUNT, **MODES[request.param]))
        machine.vcpu.real_mode(entry=0x7C00)
        yield machine


@pytest.fixture
def uffd(machine: hv.Machine) -> Iterator[UserFaultFd]:
    with UserFaultFd() as uffd:
        yield uffd


def run(machine: hv.Machine) -> bytes:
    """The bytes that the guest has read, up to its end."""
    told = b""
    for exit in machine.exits(timeout=30):
        assert isinstance(exit, hv.IoOut), exit
        if exit.port == 0x11:
            return told
        told += exit.data
    raise AssertionError("it has stopped")


def register(uffd: UserFaultFd, machine: hv.Machine, *modes: str) -> None:
    uffd.register(machine.ram.mapping, START, COUNT * PAGE, modes)


def is_refused(ended: object) -> bool:
    # The host may not touch the page: emulated code exits with its address, KVM_RUN of other code is EFAULT.
    return isinstance(ended, hv.HostFault) and ended.gpa in (START, None)


def pages(machine: hv.Machine) -> list[bytes]:
    return [machine.ram.read(START + n * PAGE, 2) for n in range(COUNT)]


def test_missing_pages_of_a_handler_in_python(machine: hv.Machine, uffd: UserFaultFd) -> None:
    asked = []

    def handler(fault: Fault) -> bytes:
        asked.append((fault.kind, fault.page))
        return bytes([0xA0 + (fault.page - START) // PAGE]) * PAGE

    register(uffd, machine, "missing")
    uffd.serve(handler)
    assert run(machine) == b"\xa0\xa1\xa2\xa3"
    uffd.stop()
    assert sorted(set(asked)) == [("missing", START + n * PAGE) for n in range(COUNT)]
    assert pages(machine) == [bytes([0xA0 + n, 0x77]) for n in range(COUNT)]


def test_a_slow_handler_is_asked_once(machine: hv.Machine, uffd: UserFaultFd) -> None:
    # While a signal is pending, the kernel's emulator asks again and again for the page that it waits for.
    asked = []

    def handler(fault: Fault) -> bytes:
        asked.append(fault.page)
        time.sleep(0.05)
        return bytes(PAGE)

    register(uffd, machine, "missing")
    uffd.serve(handler)
    exit: object = None
    while not isinstance(exit, hv.IoOut) or exit.port != 0x11:
        exit = next(iter(machine.exits(timeout=0.01)))
    uffd.stop()
    assert COUNT <= len(asked) <= 3 * COUNT  # a question may be on its way when its answer comes


def test_missing_pages_of_a_file_in_c(machine: hv.Machine, uffd: UserFaultFd) -> None:
    with hv.MemFd("source", 2 << 20) as source:
        for n in range(COUNT):
            os.pwrite(source.fd, bytes([0xB0 + n]), START + n * PAGE)
        register(uffd, machine, "missing")
        uffd.serve_native(source)
        assert run(machine) == b"\xb0\xb1\xb2\xb3"
        assert uffd.counts == FaultCounts(COUNT, 0, 0, 0)
        uffd.stop()


def test_minor_faults(machine: hv.Machine, uffd: UserFaultFd) -> None:
    # Pages that the file has and this process has not mapped: written through the descriptor.
    for n in range(COUNT):
        os.pwrite(machine.ram.fd, bytes([0xC0 + n]), START + n * PAGE)
    register(uffd, machine, "minor")
    uffd.serve_native()
    assert run(machine) == b"\xc0\xc1\xc2\xc3"
    assert uffd.counts == FaultCounts(0, COUNT, 0, 0)


def test_written_pages(machine: hv.Machine, uffd: UserFaultFd) -> None:
    ram = machine.ram.mapping
    ram.write(START, bytes(COUNT * PAGE))
    uffd.register(ram, mode="wp")
    uffd.writeprotect(ram, START, (COUNT + 2) * PAGE)
    uffd.serve_native()
    assert run(machine) == bytes(COUNT)
    assert uffd.take_written(ram) == [range(START // PAGE, START // PAGE + COUNT)]
    assert uffd.counts.wp == COUNT
    assert uffd.take_written(ram) == []


def test_written_pages_of_wp_async(machine: hv.Machine) -> None:
    with UserFaultFd(wp_async=True) as uffd, machine.ram.writable(START, PAGE) as window:
        ram = machine.ram.mapping
        ram.write(START, bytes((COUNT + 2) * PAGE))
        uffd.register(ram, START, (COUNT + 2) * PAGE, mode="wp-async")
        uffd.writeprotect(ram, START, (COUNT + 2) * PAGE)
        assert run(machine) == bytes(COUNT)
        first = START // PAGE
        assert uffd.take_written(ram, START, (COUNT + 2) * PAGE) == [range(first, first + COUNT)]
        window[0] = 1  # the host's writes count too
        assert uffd.take_written(ram, START, (COUNT + 2) * PAGE) == [range(first, first + 1)]


def test_a_guest_whose_faults_nobody_serves_comes_back(machine: hv.Machine, uffd: UserFaultFd) -> None:
    # Emulated code waits where no signal reaches it; then the fault is given up, and the access fails.
    uffd.patience = 0.2
    register(uffd, machine, "missing")
    ended: object = hv.Interrupted("timeout")
    while ended == hv.Interrupted("timeout"):
        ended = next(iter(machine.exits(timeout=0.05)))
    assert uffd.counts.given_up == 1
    assert is_refused(ended)


@pytest.mark.parametrize("named", [{"sigbus": True}, {"user_mode_only": True}], ids=["sigbus", "user_mode_only"])
def test_modes_in_which_a_guest_is_refused_at_once(machine: hv.Machine, named: dict[str, bool]) -> None:
    with UserFaultFd(patience=None, **named) as uffd:
        register(uffd, machine, "missing")
        assert is_refused(next(iter(machine.exits(timeout=30))))
        assert uffd.counts == FaultCounts(0, 0, 0, 0)


def test_poisoned_pages_and_memslots_exclude_each_other(machine: hv.Machine, uffd: UserFaultFd) -> None:
    # The kernel sends SIGBUS for them to a vCPU that runs natively.
    register(uffd, machine, "missing")
    with pytest.raises(hv.BusyError, match="memslot"):
        uffd.poison(machine.ram.mapping, START, PAGE)
    uffd.unregister(machine.ram.mapping)
    machine.ram.view(START, PAGE)
    with hv.Mapping(None, PAGE) as other:
        uffd.register(other)
        uffd.poison(other, 0, PAGE)
        with pytest.raises(hv.BusyError, match="SIGBUS"):
            machine.vm.set_user_memory_region(7, 1 << 30, other)
        uffd.close()


def test_closing_lets_the_guest_go_on(machine: hv.Machine) -> None:
    uffd = UserFaultFd(patience=None)
    register(uffd, machine, "missing")
    told = []
    runner = threading.Thread(target=lambda: told.append(run(machine)), daemon=True)
    runner.start()
    for _ in range(3000):
        if uffd.counts.missing:
            break
        time.sleep(0.01)
    assert runner.is_alive()
    uffd.close()
    runner.join(30)
    assert told == [bytes(COUNT)]


def test_a_machine_with_registered_ram_stays_open(machine: hv.Machine, uffd: UserFaultFd) -> None:
    register(uffd, machine, "missing")
    with pytest.raises(hv.BusyError, match="UserFaultFd"):
        machine.ram.mapping.close()
    uffd.close()
