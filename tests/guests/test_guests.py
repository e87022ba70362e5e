"""The guests do what their texts say.  Expected: what the manuals say, arithmetic, and QEMU for what it can run."""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from pathlib import Path

import pytest

import hvmodel as hv
from benchmarks import guests
from tests.guests import assemble
from tests.need import need

HERE = Path(__file__).resolve().parent
SOURCES = sorted([*HERE.glob("*.S"), *guests.DIRECTORY.glob("*.S"), *guests.SHIPPED.glob("*.S")])
ENTRY = 0x7C00


def outs(machine: hv.Machine, image: bytes, **answers: int) -> list[tuple[int, int]]:
    """Run a guest to its HLT: (port, value) of all it wrote."""
    machine.load(ENTRY, image)
    machine.vcpu.real_mode(entry=ENTRY)
    written = []
    for left in machine.exits(timeout=20.0):
        match left:
            case hv.IoOut(port=port, data=data):
                written.append((port, int.from_bytes(data, "little")))
            case hv.IoIn() | hv.MmioRead():
                machine.answer(answers["answer"])
            case hv.Hlt():
                return written
            case other:
                pytest.fail(f"the guest left with {other!r}")
    pytest.fail("the guest did not halt")


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_every_guest_assembles_to_a_small_flat_image(source: Path) -> None:
    need("gcc")
    image = assemble(source.stem)
    # Between the entry and the tables of modes.h; a stray section would make megabytes of it.
    assert 0 < len(image) <= 0x10000 - ENTRY


def test_hello_does_not_depend_on_where_it_is() -> None:
    need("gcc")
    assert assemble("hello") == assemble("hello", org=0) == assemble("hello", org=0x1230)


def test_hello_is_the_guest_that_ships() -> None:
    need("gcc")
    from hvmodel import _ffi

    assert _ffi.guests()["hello"] == assemble("hello")


def qemu_serial(image: bytes, tmp_path: Path) -> bytes:
    """What QEMU's own CPU (TCG) lets a boot sector write to the serial port, up to the first newline."""
    sector = tmp_path / "boot.img"
    sector.write_bytes(image.ljust(510, b"\0") + b"\x55\xaa")
    command = ["qemu-system-x86_64", "-accel", "tcg", "-display", "none", "-monitor", "none", "-serial", "stdio"]
    command += ["-nic", "none", "-boot", "a", "-drive", f"file={sector},format=raw,if=floppy"]
    text = b""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as qemu:
        assert qemu.stdout is not None
        ready = selectors.DefaultSelector()
        ready.register(qemu.stdout, selectors.EVENT_READ)
        until = time.monotonic() + 30
        while not text.endswith(b"\n") and time.monotonic() < until:
            if ready.select(timeout=1) and not (chunk := os.read(qemu.stdout.fileno(), 4096)):
                break
            if chunk:
                text += chunk
        ready.close()
        qemu.kill()
    return text


@pytest.mark.parametrize(
    ("entry", "cs"), [(0x7C00, 0), (0x7C00, 0x7C0), (0x500, 0x50), (0x12340, 0x1234), (0xFFF00, 0xFFF0)]
)
def test_hello_says_the_same_as_in_qemu(entry: int, cs: int, tmp_path: Path) -> None:
    need("kvm")
    need("gcc")
    need("qemu")
    image = assemble("hello")
    with hv.Machine(ram="2M") as machine:
        machine.load(entry, image)
        machine.vcpu.real_mode(entry=entry, cs=cs)
        text = b""
        for left in machine.exits(timeout=10.0):
            match left:
                case hv.IoOut(port=0x3F8, data=data):
                    text += data
                case hv.IoIn(port=0x3FD):
                    machine.answer(0x60)
                case hv.Hlt():
                    break
                case other:
                    pytest.fail(f"hello left with {other!r}")
    assert text == qemu_serial(image, tmp_path)
    assert b"hvmodel" in text


# Vector -> (error code, saved RIP - the instruction), Intel SDM vol. 3 ch. 7: #UD, #GP(0) and #PF are faults, #BP is a
# trap behind its one byte; #PF's code for a read of what is not present from CPL3 is U/S = 4.
TRAPS = {6: (0, 0), 3: (0, 1), 13: (0, 0), 14: (4, 0)}


@pytest.mark.parametrize("trap", TRAPS)
def test_climb_reaches_cpl3_and_comes_back_by_an_exception(trap: int) -> None:
    need("kvm")
    need("gcc")
    code, beyond = TRAPS[trap]
    stages = [(1, 0), (2, 0x08), (3, 0x1_0018), (4, 3), (5, trap << 16 | 0x2B)]
    expected = [pair for number, proof in stages for pair in ((0x10, number), (0x11, proof))]
    with hv.Machine(ram="2M") as machine:
        assert outs(machine, assemble("climb", TRAP=trap)) == [*expected, (0x12, code), (0x13, beyond)]


def test_checksum_of_the_first_mebibyte() -> None:
    need("kvm")
    need("gcc")
    # Each of the four dwords of paragraph p holds p; the page 0x7000 is the guest's own.
    expected = 4 * sum(p for p in range(0x10000) if not 0x700 <= p < 0x800) % 2**32
    with hv.Machine(ram="1M") as machine:
        assert outs(machine, assemble("checksum")) == [(0x10, expected)]
        for paragraph in (0, 0x6FF, 0x800, 0x1000, 0xFFFF):
            assert machine.read(paragraph << 4, 16) == paragraph.to_bytes(4, "little") * 4


@pytest.mark.parametrize("size", [1, 2, 4])
def test_in_leaves_the_other_bytes_of_eax_alone_but_not_those_of_rax(size: int) -> None:
    need("kvm")
    need("gcc")
    answer = 0x4433_2211 % (1 << 8 * size)
    expected = 0xAAAA_AAAA >> 8 * size << 8 * size | answer
    with hv.Machine(ram="1M") as machine:
        assert outs(machine, assemble("in", SIZE=size, COUNT=3), answer=answer) == [(0x11, expected)] * 3


@pytest.mark.parametrize("size", [1, 2, 4])
def test_outs_sends_every_byte_in_order(size: int) -> None:
    need("kvm")
    need("gcc")
    data = bytes(range(1, 5 * size + 1))
    words = [int.from_bytes(data[at : at + size], "little") for at in range(0, len(data), size)]
    with hv.Machine(ram="1M") as machine:
        assert outs(machine, assemble("outs", SIZE=size)) == [(0x10, word) for word in words]


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_mmio_writes_go_out_in_pieces_of_up_to_8_bytes(size: int) -> None:
    need("kvm")
    need("gcc")
    data = bytes.fromhex("112233445566778899aabbccddeeff00")[:size]
    with hv.Machine(ram="1M") as machine:
        machine.load(ENTRY, assemble("mmio", SIZE=size, WRITE=1))
        machine.vcpu.real_mode(entry=ENTRY)
        left: list[object] = []
        for one in machine.exits(timeout=10.0):
            left.append(one)
            if isinstance(one, hv.Hlt):
                break
    pieces = [hv.MmioWrite(0xD000_0000 + at, data[at : at + 8]) for at in range(0, size, 8)]
    assert left == [*pieces, hv.Hlt()]


def test_a_guest_that_is_not_there_or_does_not_assemble_is_an_error(tmp_path: Path) -> None:
    need("gcc")
    with pytest.raises(guests.GuestBuildError, match="no guest 'nobody'"):
        assemble("nobody")
    source = tmp_path / "wrong.S"
    source.write_text("\t.code16\n\tfrobnicate %ax\n")
    with pytest.raises(guests.GuestBuildError, match="frobnicate"):
        guests.assemble_file(source)
