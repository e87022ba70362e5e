"""The driver of a stopped QEMU: started, asked, refused, ended."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError
from hvmodel.witness import Lacking
from hvmodel.witness.qemu import Qemu, QemuError, allocations
from tests.need import need

MiB = 1 << 20


@pytest.fixture(scope="module")
def pc() -> Iterator[Qemu]:
    need("qemu")
    with Qemu("-m", "16M", "-trace", "qemu_anon_ram_alloc") as qemu:
        yield qemu


def lives(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def wait_until_gone(pid: int) -> None:
    for _ in range(500):
        if not lives(pid):
            return
        time.sleep(0.01)
    pytest.fail(f"process {pid} lives")


def test_it_is_stopped_before_its_first_instruction(pc: Qemu) -> None:
    assert pc.version >= (5, 0, 0)
    assert pc.execute("query-status")["running"] is False
    # The reset vector: CS base 0xffff0000, IP 0xfff0.
    registers = pc.monitor("info registers")
    assert "EIP=0000fff0" in registers
    assert "CS =f000 ffff0000" in registers


def test_configuration_space_through_its_ports(pc: Qemu) -> None:
    assert pc.config_read(0, 4) == 0x1237_8086  # device and vendor id of the 82441FX
    assert pc.config_read(2, 2) == 0x1237
    assert pc.config_read(0, 4, device=1) == 0x7000_8086  # PIIX3
    pc.config_write(0x5A, 0x3311, 2)
    assert (pc.config_read(0x5A), pc.config_read(0x5B)) == (0x11, 0x33)
    pc.config_write(0x5A, 0, 2)
    assert pc.inport(0xCF8, 4) == 0x8000_0058


def test_ports(pc: Qemu) -> None:
    pc.outport(0xCF8, 0x8000_0004, 4)
    assert [pc.inport(0xCF8, size) for size in (1, 2, 4)][2] == 0x8000_0004
    pc.outport(0x70, 0x0E, 1)  # a byte of the CMOS that keeps what it is given
    pc.outport(0x71, 0x5A, 1)
    assert pc.inport(0x71, 1) == 0x5A


def test_monitor_has_lines(pc: Qemu) -> None:
    text = pc.monitor("info ramblock")
    assert "\r" not in text
    assert text.splitlines()[0].split()[:2] == ["Block", "Name"]
    assert "unknown command" in pc.monitor("no-such-command")


def test_allocations_are_the_blocks(pc: Qemu) -> None:
    from hvmodel.witness.mtree import parse_ramblock

    blocks = parse_ramblock(pc.monitor("info ramblock"))
    assert sorted(allocations(pc.messages)) == sorted(block.max_length for block in blocks)
    assert allocations(pc.messages)[0] == 16 * MiB


def test_reset_waits() -> None:
    need("qemu")
    with Qemu("-m", "16M", machine="q35") as q35:
        for _ in range(3):
            q35.config_write(0x9D, 0x4A)
            assert q35.config_read(0x9D) == 0x4A
            q35.reset()
            assert q35.config_read(0x9D) == 0x02  # Q35's datasheet: SMRAM is 02h after reset


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda q: q.inport(0, 3), "size"),
        (lambda q: q.inport(0xFFFF, 2), "port"),
        (lambda q: q.outport(-1, 0, 1), "port"),
        (lambda q: q.config_read(0x100), "offset"),
        (lambda q: q.config_read(3, 2), "offset"),
        (lambda q: q.config_write(0, 0, 8), "size"),
    ],
)
def test_bad_accesses_are_refused(pc: Qemu, call: object, field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        call(pc)  # type: ignore[operator]
    assert caught.value.field == field


def test_refused_commands_say_why(pc: Qemu) -> None:
    with pytest.raises(QemuError, match="no-such-command has not been found") as caught:
        pc.execute("no-such-command")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.call, again.text) == (caught.value.call, caught.value.text)
    assert pc.execute("query-status")["status"] in ("prelaunch", "paused")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["-no-such-option"], "invalid option"),
        (["-object", "memory-backend-memfd,id=m,size=0"], "doesn't take value '0'"),
        (["-machine", "max-ram-below-4g=5G"], "less than or equal to 4G"),
        (["-bios", "no-such-file"], "no-such-file"),
    ],
)
def test_refused_options_say_why(options: list[str], why: str) -> None:
    need("qemu")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(QemuError, match=why):
        Qemu(*options)
    assert os.listdir("/proc/self/fd") == before


def test_options_are_text() -> None:
    with pytest.raises(ArgumentTypeError):
        Qemu("-m", 16)  # type: ignore[arg-type]


def test_without_qemu_it_is_lacking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Lacking, match="not installed"):
        Qemu()


def test_close_ends_the_process_and_leaves_nothing() -> None:
    need("qemu")
    before = os.listdir("/proc/self/fd")
    qemu = Qemu("-m", "16M")
    pid = qemu.pid
    assert lives(pid)
    assert not qemu.closed
    qemu.close()
    qemu.close()
    assert qemu.closed
    assert not Path(f"/proc/{pid}").exists()  # waited for
    assert os.listdir("/proc/self/fd") == before
    assert repr(qemu) == "<Qemu closed>"
    for call in (lambda: qemu.monitor("info mtree"), lambda: qemu.messages, lambda: qemu.inport(0x70, 1)):
        with pytest.raises(ClosedError):
            call()


def test_a_forgotten_one_is_ended_and_named() -> None:
    need("qemu")
    qemu = Qemu("-m", "16M")
    pid = qemu.pid
    with pytest.warns(ResourceWarning, match=f"unclosed Qemu.pid={pid}"):
        del qemu
    assert not Path(f"/proc/{pid}").exists()


def test_what_a_prefix_starts_ends_too(tmp_path: Path) -> None:
    need("qemu", "strace")
    log = tmp_path / "trace"
    with Qemu("-m", "16M", prefix=("strace", "-f", "-o", str(log), "-e", "trace=memfd_create")) as qemu:
        threads = Path(f"/proc/{qemu.pid}/task/{qemu.pid}/children").read_text().split()
        assert threads
        child = int(threads[0])
        assert "qemu-system" in Path(f"/proc/{child}/cmdline").read_text()
    wait_until_gone(child)


def test_a_dead_one_is_an_error() -> None:
    need("qemu")
    with Qemu("-m", "16M") as qemu:
        os.kill(qemu.pid, signal.SIGKILL)
        with pytest.raises(QemuError, match="has ended with status -9"):
            qemu.monitor("info mtree")


def test_a_silent_one_is_an_error() -> None:
    need("qemu")
    with Qemu("-m", "16M") as qemu:
        os.kill(qemu.pid, signal.SIGSTOP)
        qemu._timeout = 0.2
        with pytest.raises(QemuError, match=r"no answer in 0.2 s"):
            qemu.monitor("info mtree")


def test_it_ends_with_its_maker() -> None:
    need("qemu")
    code = (
        "import os, signal; from hvmodel.witness import Qemu; q = Qemu('-m', '16M'); "
        "print(q.pid, flush=True); os.kill(os.getpid(), signal.{})"
    )
    if shutil.which("setpriv") is None:
        pytest.skip("needs util-linux's setpriv")
    for how in ("SIGKILL", "SIGTERM"):
        done = subprocess.run([sys.executable, "-c", code.format(how)], capture_output=True, check=False, timeout=60)
        wait_until_gone(int(done.stdout))


def test_under_a_prefix_it_ends_with_its_maker(tmp_path: Path) -> None:
    need("qemu", "strace")
    if shutil.which("setpriv") is None:
        pytest.skip("needs util-linux's setpriv")
    code = (
        "import os, signal, subprocess; from hvmodel.witness import Qemu; "
        f"q = Qemu('-m', '16M', prefix=['strace', '-f', '-o', {str(tmp_path / 'trace')!r}]); "
        "print(*open(f'/proc/{q.pid}/task/{q.pid}/children'), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=60)
    for pid in done.stdout.split() or [b"none"]:
        wait_until_gone(int(pid))


def test_a_child_of_fork_leaves_it_alone() -> None:
    need("qemu")
    with Qemu("-m", "16M") as qemu:
        child = os.fork()
        if child == 0:
            qemu.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert lives(qemu.pid)
        assert qemu.execute("query-status")["running"] is False
