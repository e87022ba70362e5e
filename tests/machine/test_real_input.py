"""Real input: the guest that ships, a megabyte through segments, a climb to CPL3 and back; and who may open the device.

Expected: what the guests' sources say, and arithmetic.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hvmodel as hv
from hvmodel._ffi import guests
from tests.cases import cases
from tests.guests import assemble
from tests.need import need

ROOT = Path(__file__).parents[2]
Boot = Callable[..., hv.Machine]


def test_hello(boot: Boot) -> None:
    machine = boot(guests()["hello"])
    console = machine.console
    assert machine.run(10).halted
    assert console.serial.read() == b"Hello from a real-mode guest: hvmodel runs me on KVM.\n"
    assert console.debug.read() == b""


@pytest.mark.parametrize("limit", [0x20000, 0x100000])
def test_checksum_of_memory_through_segments(boot: Boot, limit: int) -> None:
    need("gcc")
    machine = boot(assemble("checksum", LIMIT=limit))
    # Each paragraph p holds its number in four dwords; 0x7000 to 0x7fff is left out.
    paragraphs = [p for p in range(limit >> 4) if not 0x700 <= p < 0x800]
    exits = machine.exits(timeout=60)
    assert next(exits) == hv.IoOut(0x10, 4, 1, (4 * sum(paragraphs) % 2**32).to_bytes(4, "little"))
    assert next(exits) == hv.Hlt()
    memory = np.frombuffer(machine.read(0, limit), dtype="<u4").reshape(-1, 4)
    assert (memory[paragraphs] == np.array(paragraphs, dtype=np.uint32)[:, None]).all()


# What brings CPL3 back to CPL0: vector -> (error code, bytes from the instruction to the saved RIP).
TRAPS = {6: (0, 0), 3: (0, 1), 13: (0, 0), 14: (0b100, 0)}


@pytest.mark.parametrize("vector", TRAPS)
def test_a_climb_to_cpl3_and_back(boot: Boot, vector: int) -> None:
    need("gcc")
    machine = boot(assemble("climb", TRAP=vector))
    seen = []
    for exit in machine.exits(timeout=30):
        if exit == hv.Hlt():
            break
        assert isinstance(exit, hv.IoOut)
        seen.append((exit.port, exit.value))
    stage, proof = 0x10, 0x11
    code, after = TRAPS[vector]
    assert seen == [
        (stage, 1),
        (proof, 0),  # CR0.PE
        (stage, 2),
        (proof, 0x08),  # CS
        (stage, 3),
        (proof, 1 << 16 | 0x18),  # EFER.LMA, CS
        (stage, 4),
        (proof, 3),  # CPL
        (stage, 5),
        (proof, vector << 16 | 0x2B),
        (0x12, code),
        (0x13, after),
    ]


@pytest.fixture
def one_machine(boot: Boot) -> hv.Machine:
    """One machine for all examples of a property."""
    return boot(ram="2M")


@settings(max_examples=cases(100, 3000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gpa=st.one_of(st.integers(-10, 0x210000), st.integers()), size=st.integers(1, 0x3000))
def test_an_image_is_loaded_exactly_where_it_fits(one_machine: hv.Machine, gpa: int, size: int) -> None:
    image = bytes(n % 255 + 1 for n in range(size))
    if gpa >= 0 and gpa + size <= 0x200000:
        one_machine.load(gpa, image)
        assert one_machine.read(gpa, size) == image
        one_machine.write(gpa, bytes(size))
    else:
        with pytest.raises(hv.ArgumentError):
            one_machine.load(gpa, image)
        assert not any(one_machine.read(0x1F0000, 0x10000))


def test_no_permission_says_which_group() -> None:
    need("kvm", "root")
    if os.stat("/dev/kvm").st_mode & 0o006:
        pytest.skip("anybody may open /dev/kvm here")
    code = (
        "import os, hvmodel as hv; hv.Machine; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "before = os.listdir('/proc/self/fd')\n"
        "try: hv.Machine()\n"
        "except hv.HostError as error: print(error.errno, 'group' in str(error), error.value)\n"
        "assert os.listdir('/proc/self/fd') == before\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["13", "True", "/dev/kvm"], done.stderr


@pytest.mark.parametrize("code", ["ebfe", "e610 ebfc", "e410 ebfc", "b800b0 8ed8 a30000 ebfb"])
def test_closed_by_another_thread_while_it_runs(boot: Boot, code: str) -> None:
    for _ in range(cases(10, 300)):
        machine = boot(code, unclaimed="open_bus", ram="64K")
        got: list[object] = []
        entered = threading.Event()

        def runner(machine: hv.Machine = machine, got: list[object] = got, entered: threading.Event = entered) -> None:
            entered.set()
            try:
                while True:
                    got.append(machine.run(60).reason)
            except hv.ClosedError:
                got.append("closed")
            except BaseException as error:  # noqa: BLE001
                got.append(error)

        thread = threading.Thread(target=runner)
        thread.start()
        entered.wait()
        machine.close()
        thread.join(60)
        assert not thread.is_alive()
        assert got in (["closed"], ["interrupted", "closed"])
