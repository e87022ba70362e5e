"""`hvmodel boot`: what a guest shows, how its run ends, and what is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvmodel.errors import HvError
from tests.cli.command import ROOT, feed, hvmodel, is_one_sentence, object_of, started, wait_for_vcpu
from tests.guests import assemble
from tests.need import need

HALT = b"\xf4"  # hlt
KILOBYTE = b"\x90" * 1024
SPIN = b"\xeb\xfe"  # jmp $

# What the shipped guest says, from its source.
GREETING = re.search(r'\.asciz\s+"(.*)"', (ROOT / "native" / "guests" / "hello.S").read_text())[1]  # type: ignore[index]
GREETING_BYTES = GREETING.replace("\\n", "\n").encode()


def out(port: int, data: bytes) -> bytes:
    # mov dx, port; then mov al, byte; out dx, al for each
    return b"\xba" + port.to_bytes(2, "little") + b"".join(b"\xb0" + bytes([byte]) + b"\xee" for byte in data)


@pytest.fixture(autouse=True)
def _kvm() -> None:
    need("kvm")


# ---- what it shows ----


def test_without_a_file_it_boots_hello() -> None:
    done = hvmodel("boot")
    assert (done.returncode, done.stdout, done.stderr) == (0, GREETING_BYTES, b"")


def test_the_script_is_the_module() -> None:
    script = Path(sys.executable).with_name("hvmodel")
    if not script.exists():
        pytest.skip("hvmodel is not installed beside this Python")
    done = subprocess.run([script, "boot"], capture_output=True, check=False, cwd="/", timeout=60)
    assert (done.returncode, done.stdout) == (0, GREETING_BYTES)


def test_file_and_stdin(tmp_path: Path) -> None:
    image = out(0x3F8, b"hi\xff\x00") + HALT
    (tmp_path / "boot.bin").write_bytes(image)
    for done in (hvmodel("boot", "boot.bin", cwd=tmp_path), hvmodel("boot", "-", input=image)):
        assert (done.returncode, done.stdout, done.stderr) == (0, b"hi\xff\x00", b"")


@pytest.mark.parametrize("at", ["0", "0x7C00", "0x10000", "0x9FC00", "0x10FFEF"])
def test_at(at: str) -> None:
    # One byte fits even at FFFF:FFFF.
    found = object_of(hvmodel("boot", "-", "--at", at, "--json", input=HALT))
    assert (found["status"], (found["cs"] << 4) + found["rip"]) == (0, int(at, 0) + 1)


def test_debug_ports_go_to_stderr() -> None:
    done = hvmodel("boot", "-", input=out(0x402, b"one\n") + out(0xE9, b"two\n") + out(0x3F8, b"three\n") + HALT)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"three\n", b"one\ntwo\n")


def test_output_is_live_and_ctrl_c_ends_it() -> None:
    with started("boot", "-") as process:
        feed(process, out(0x3F8, b"up") + SPIN)
        assert process.stdout.read(2) == b"up"  # while the guest spins
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        error = process.stderr.read()
    assert is_one_sentence(error)
    assert b"interrupted, at CS:RIP 0000:7c" in error


@pytest.mark.parametrize("moment", range(6))
def test_ctrl_c_at_any_moment(moment: int) -> None:
    # From the making of the vCPU on, over the beginning of the run.
    with started("boot", "-", "--trace") as process:
        feed(process, SPIN)
        wait_for_vcpu(process)
        time.sleep(moment / 1000)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        error = process.stderr.read()
    assert is_one_sentence(error), error
    assert b"interrupted" in error


def test_ctrl_c_while_reading_stdin() -> None:
    with started("boot", "-") as process:
        while not Path(f"/proc/{process.pid}/wchan").read_text().startswith(("pipe", "anon_pipe")):
            if Path(f"/proc/{process.pid}/wchan").read_text() == "":
                pytest.skip("needs /proc/PID/wchan")
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert b"Traceback" not in process.stderr.read()


def test_seabios_shows_its_banner() -> None:
    need("seabios")
    done = hvmodel("boot", "--bios", "/usr/share/seabios/bios.bin", "--timeout", "0.5")
    assert (done.returncode, done.stdout) == (124, b"")
    assert re.match(rb"SeaBIOS \(version \S+\)\n", done.stderr)


# ---- how it ends ----


@pytest.mark.parametrize("value", [0, 0x10, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("unclaimed", ["open_bus", "strict"])
def test_debug_exit_is_qemus(value: int, unclaimed: str) -> None:
    # qemu:hw/misc/debugexit.c: exit((val << 1) | 1), of which the system keeps the low 8 bits.
    done = hvmodel("boot", "-", "--unclaimed", unclaimed, input=assemble("debug_exit", CODE=value))
    assert (done.returncode, done.stdout, done.stderr) == ((value << 1 | 1) & 0xFF, b"", b"")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_debug_exit_of_any_size(size: int) -> None:
    image = assemble("out", PORT=0xF4, SIZE=size, VALUE=0x44332211)
    found = object_of(hvmodel("boot", "-", "--json", input=image))
    assert found["debug_exit"] == 0x44332211 & ((1 << 8 * size) - 1)
    assert (found["reason"], found["status"]) == ("debug-exit", 0x11 << 1 | 1)


@pytest.mark.parametrize(
    ("image", "arguments", "status", "words"),
    [
        (assemble("triple"), (), 4, "triple fault"),
        (assemble("internal_error"), (), 6, "InternalError"),
        (assemble("internal_error", FETCH=1), (), 6, "InternalError"),
        (out(0x99, b"A"), ("--unclaimed", "strict"), 10, "wrote 41 to port 0x99"),
        (SPIN, ("--timeout", "0.05"), 124, "still ran after 0.05 s, at CS:RIP 0000:7c00"),
        (SPIN, ("--timeout", "0"), 124, "still ran after 0 s"),
    ],
)
def test_status_and_sentence(image: bytes, arguments: tuple[str, ...], status: int, words: str) -> None:
    done = hvmodel("boot", "-", *arguments, input=image)
    assert (done.returncode, done.stdout) == (status, b"")
    assert is_one_sentence(done.stderr)
    assert words in done.stderr.decode()
    found = object_of(hvmodel("boot", "-", "--json", *arguments, input=image))
    assert found["status"] == status
    assert words in found["message"]


def test_open_bus_reads_ones_and_drops_writes() -> None:
    # in al, 0x99; out 0xf4, al
    done = hvmodel("boot", "-", input=bytes.fromhex("e499 e6f4"))
    assert done.returncode == (0xFF << 1 | 1) & 0xFF


def test_all_statuses_are_in_the_help() -> None:
    text = hvmodel("boot", "--help").stdout.decode()
    table = text[text.index("Exit status:") :]
    found = re.findall(r"^\s+(\d+|odd)  ", table, re.M)
    assert found == ["0", "odd", "2", "4", "6", "8", "10", "124", "130"]


# ---- trace and JSON ----

LINE = re.compile(
    r" *(?P<time>\d+\.\d{6}) rip=0x(?P<rip>[0-9a-f]+) (?P<reason>\w+) *"
    r"(?: (?P<dir>in|out) +(?P<space>port|gpa|msr)=0x(?P<address>[0-9a-f]+) size=(?P<size>\d+)"
    r"(?: count=(?P<count>\d+))? data=(?P<data>\S+))? (?P<policy>\w+)"
)


def test_trace_of_a_few_exits_by_hand() -> None:
    # 7c00 in al, 0x99; 7c02 out 0xe9, al; 7c04 out 0x98, al; 7c06 out 0xf4, al
    done = hvmodel("boot", "-", "--trace", input=bytes.fromhex("e499 e6e9 e698 e6f4"))
    assert done.stderr.endswith(b"\xff")  # what went to the debug port
    rows = [LINE.fullmatch(line) for line in done.stderr[:-1].decode().splitlines()]
    found = [(r["reason"], r["dir"], r["address"], r["size"], r["data"], r["policy"]) for r in rows if r]
    assert found == [
        ("IO", "in", "99", "1", "ff", "ignore"),
        ("IO", "out", "e9", "1", "ff", "capture"),
        ("IO", "out", "98", "1", "ff", "ignore"),
        ("IO", "out", "f4", "1", "ff", "stop"),
    ]
    assert all(row and 0x7C00 <= int(row["rip"], 16) <= 0x7C08 for row in rows)


def test_every_exit_is_traced_once_and_in_order() -> None:
    # 5000 exits take several slices; each carries its number.
    image = assemble("out", PORT=0x10, SIZE=4, VALUE=0, COUNT=5000)
    done = hvmodel("boot", "-", "--trace", input=image)
    rows = [LINE.fullmatch(line) for line in done.stderr.decode().splitlines()]
    assert all(rows)
    assert done.returncode == 0
    numbers = [int.from_bytes(bytes.fromhex(row["data"]), "little") for row in rows if row and row["reason"] == "IO"]
    assert numbers == list(range(5000))
    assert [row["reason"] for row in rows[5000:] if row] == ["HLT"]
    times = [float(row["time"]) for row in rows if row]
    assert times == sorted(times)


def test_json() -> None:
    image = out(0x3F8, b"\xe9\n") + out(0x402, b"dbg") + HALT
    done = hvmodel("boot", "-", "--json", "--trace", input=image)
    found = object_of(done)
    assert (done.returncode, done.stderr) == (0, b"")
    seconds = found.pop("seconds")
    assert isinstance(seconds, float)
    assert seconds >= 0
    trace = found.pop("trace")
    assert found == {
        "reason": "halted",
        "status": 0,
        "message": None,
        "debug_exit": None,
        "exits": {"IO": 5, "HLT": 1},
        "nr_exits": 6,
        "serial": "\xe9\n",  # one character per byte
        "debug": "dbg",
        "cs": 0,
        "rip": 0x7C00 + len(image),
    }
    assert len(trace) == 6
    assert [set(row) for row in trace] == [
        {"time_ns", "rip", "reason", "address", "is_write", "size", "count", "data", "policy"}
    ] * 6
    assert [(row["address"], row["data"]) for row in trace[:5]] == [
        (0x3F8, "e9"),
        (0x3F8, "0a"),
        (0x402, "64"),
        (0x402, "62"),
        (0x402, "67"),
    ]
    assert (trace[5]["reason"], trace[5]["address"], trace[5]["policy"]) == ("HLT", None, "stop")


def test_json_after_ctrl_c() -> None:
    # With --json nothing shows that the guest runs; a signal that comes before that is a sentence, and no object.
    for moment in (0.2, 1, 5):
        with started("boot", "-", "--json", "--trace") as process:
            feed(process, out(0x3F8, b"up") + SPIN)
            wait_for_vcpu(process)
            time.sleep(moment)
            process.send_signal(signal.SIGINT)
            text = process.stdout.read()
            assert process.wait(30) == 130
        if text:
            break
    found = json.loads(text)
    assert (found["reason"], found["status"], found["serial"]) == ("interrupted", 130, "up")
    assert [row["reason"] for row in found["trace"]] == ["IO", "IO"]


# ---- output that goes nowhere ----


def test_a_reader_that_leaves_ends_it_like_any_filter() -> None:
    # The guest writes for ever.
    image = out(0x3F8, b"x" * 16)
    image += b"\xe9" + (-len(image) - 3 & 0xFFFF).to_bytes(2, "little")  # jmp to the start
    with started("boot", "-") as process:
        feed(process, image)
        assert process.stdout.read(4) == b"xxxx"
        process.stdout.close()
        assert process.wait(30) == -signal.SIGPIPE
        assert process.stderr.read() == b""


def test_a_full_disk_is_a_sentence() -> None:
    with open("/dev/full", "wb") as full, started("boot", stdout=full) as process:
        _, error = process.communicate(timeout=30)
    assert process.returncode == 2
    assert is_one_sentence(error)
    assert b"No space left" in error


def test_closed_descriptors() -> None:
    for redirection in (">&-", "2>&-", "<&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "hvmodel", "boot"],
            capture_output=True,
            cwd=ROOT,
            check=False,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == (b"" if ">&-" in redirection.split() else GREETING_BYTES)


# ---- in this process: what is left behind ----


def _descriptors() -> dict[str, str]:
    return {fd.name: os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.exists()}


@pytest.mark.parametrize(
    ("image", "arguments", "status"),
    [
        (HALT, (), 0),
        (assemble("triple"), ("--json", "--trace"), 4),
        (out(0x99, b"A"), ("--unclaimed", "strict"), 10),
        (SPIN, ("--timeout", "0.01"), 124),
        (b"", (), 2),
        (KILOBYTE, ("--bios",), 2),
        (KILOBYTE[1:] + HALT, ("--ram", "32K"), 0),  # to the last byte of the RAM
    ],
)
def test_nothing_is_left_open(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], image: bytes, arguments: tuple[str, ...], status: int
) -> None:
    from hvmodel.cli import main

    (tmp_path / "image").write_bytes(image)
    before, handler = _descriptors(), signal.getsignal(signal.SIGINT)
    assert main(["boot", str(tmp_path / "image"), *arguments]) == status
    assert (_descriptors(), signal.getsignal(signal.SIGINT)) == (before, handler)


def test_an_error_of_kvm_run_is_a_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hvmodel import Machine
    from hvmodel.cli import main

    def run(*_: object, **__: object) -> None:
        raise HvError("KVM_RUN: injected")

    monkeypatch.setattr(Machine, "run", run)
    before = _descriptors()
    assert main(["boot"]) == 6
    assert capfd.readouterr().err == "hvmodel: KVM_RUN: injected\n"
    assert _descriptors() == before
