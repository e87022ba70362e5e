"""Serial and debug output, and firmware that uses it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest

import hvmodel as hv
from tests.guests import assemble
from tests.need import need

SEABIOS = Path("/usr/share/seabios")


def writes(*pairs: tuple[int, int]) -> bytes:
    """A guest that writes bytes to ports, then halts."""
    code = b"".join(
        b"\xba" + port.to_bytes(2, "little") + b"\xb0" + value.to_bytes(1, "little") + b"\xee" for port, value in pairs
    )
    return code + b"\xf4"


def run(code: bytes) -> tuple[bytes, bytes]:
    """(serial output, debug output) of a guest that halts."""
    need("kvm")
    with hv.Machine(ram="64K") as machine:
        console = machine.console
        assert machine.console is console
        machine.load(0x7C00, code)
        machine.vcpu.real_mode()
        assert machine.run(timeout=10).halted
        return console.serial.read(), console.debug.read()


def test_bytes_go_where_their_port_leads() -> None:
    assert run(writes((0x3F8, 0x41), (0x402, 0x42), (0xE9, 0x43), (0x3F8, 0x44))) == (b"AD", b"BC")


def test_a_divisor_is_not_output() -> None:
    # As drivers set 115200 8N1 (PC16550D, "Programmable baud generator"): DLAB, divisor 1, 8N1; then text.
    setup = [(0x3F9, 0), (0x3FB, 0x80), (0x3F8, 1), (0x3F9, 0), (0x3FB, 0x03), (0x3FA, 0xC7), (0x3FC, 0x0B)]
    assert run(writes((0x3F8, 0x40), *setup, (0x3F8, 0x41))) == (b"@A", b"")
    # DLAB set twice and cleared twice is set and cleared once.
    twice = [(0x3FB, 0x80), (0x3FB, 0x83), (0x3F8, 1), (0x3FB, 0x03), (0x3FB, 0x03)]
    assert run(writes(*twice, *twice, (0x3F8, 0x41))) == (b"A", b"")


def test_every_register_of_the_serial_port_reads() -> None:
    need("kvm", "gcc")
    with hv.Machine(ram="64K") as machine:
        machine.console  # noqa: B018
        machine.load(0x7C00, assemble("com"))
        machine.vcpu.real_mode()
        values = []
        for exit in machine.exits(timeout=10):
            if exit == hv.Hlt():
                break
            values.append(exit.value)
    line_status = values[5]
    assert line_status & 0x60 == 0x60  # THRE and TEMT: room for a byte, and all sent
    assert not line_status & 0x01  # DR: nothing to read
    assert values[2] & 0x01  # no interrupt pending
    assert len(values) == 8


def wide(code: str, *, unclaimed: Literal["strict", "open_bus"] = "strict") -> tuple[hv.Machine, hv.Stop]:
    """A machine with a console that has run this code and a HLT, and how that ended."""
    machine = hv.Machine(ram="64K", unclaimed=unclaimed)
    try:
        machine.console  # noqa: B018
        machine.load(0x7C00, bytes.fromhex(code) + b"\xf4")
        machine.vcpu.real_mode()
        return machine, machine.run(timeout=10)
    except BaseException:
        machine.close()
        raise


POLICIES = ["strict", "open_bus"]


@pytest.mark.parametrize("unclaimed", POLICIES)
@pytest.mark.parametrize(
    ("code", "serial"),
    [
        ("baf803 b84142 ef b043 ee", b"AC"),  # out 0x3f8, ax: the data, and interrupts enabled; out 0x3f8, al
        ("baf803 66b841424344 66ef b045 ee", b"AE"),  # the fourth byte, 0x44, is the line control: no DLAB
        ("baf803 66b841000080 66ef b045 ee", b"A"),  # with DLAB 0x45 is a divisor
        ("bafa03 b80180 ef baf803 b045 ee bafb03 b80300 ef baf803 b046 ee", b"F"),  # DLAB by out 0x3fa, ax; off
        ("baf803 be007c b90200 fc f36f", b"\xba\x03"),  # rep outsw: each word is the data and interrupts enabled
    ],
)
def test_wide_writes_are_split_into_bytes(code: str, serial: bytes, unclaimed: Any) -> None:
    need("kvm")
    machine, stop = wide(code, unclaimed=unclaimed)
    with machine:
        assert stop.halted
        assert machine.console.serial.read() == serial


@pytest.mark.parametrize("unclaimed", POLICIES)
@pytest.mark.parametrize(
    ("port", "size"), [(0x3FC, 2), (0x3FD, 2), (0x3F8, 4), (0x3FC, 4), (0x3F9, 2), (0x3FE, 2), (0x3FA, 4)]
)
def test_wide_reads_are_made_of_bytes(port: int, size: int, unclaimed: Any) -> None:
    need("kvm")
    # mov dx, port + n; in al, dx; mov [0x4000 + n], al for each byte; then in ax|eax, dx; mov [0x4008], ax|eax
    code = "".join(f"ba{(port + n).to_bytes(2, 'little').hex()} ec a2{n:02x}40" for n in range(size))
    code += f"ba{port.to_bytes(2, 'little').hex()}" + ("ed a30840" if size == 2 else "66ed 66a30840")
    machine, stop = wide(code, unclaimed=unclaimed)
    with machine:
        assert stop.halted
        assert machine.read(0x4008, size) == machine.read(0x4000, size)


def test_wide_accesses_that_reach_beyond_the_console() -> None:
    need("kvm")
    # out 0x402, ax; in ax, 0x402; mov [0x4000], ax: nobody has port 0x403.
    code = "ba0204 b84142 ef ed a30040"
    with pytest.raises(hv.GuestAccessError, match=r"wrote 4142 to port 0x402 \(1 x 2 bytes\)"):
        wide(code)
    # On an open bus port 0x403 reads ones.
    with hv.Machine(ram="64K", unclaimed="open_bus") as machine:
        console = machine.console
        machine.load(0x7C00, bytes.fromhex(code) + b"\xf4")
        machine.vcpu.real_mode()
        assert next(machine.exits(timeout=10)) == hv.Hlt()
        assert console.debug.read() == b"A"
        assert machine.read(0x4000, 2) == b"\xe9\xff"


def test_wide_writes_that_reach_into_the_console_from_below() -> None:
    need("kvm")
    code = "baf703 b84241 ef"  # out 0x3f7, ax: the second byte is for port 0x3f8
    machine, stop = wide(code, unclaimed="open_bus")
    with machine:
        assert stop.halted
        assert machine.console.serial.read() == b"A"
    with pytest.raises(hv.GuestAccessError, match=r"wrote 4241 to port 0x3f7 \(1 x 2 bytes\)"):
        wide(code)


def test_more_wide_output_than_a_ring_holds() -> None:
    need("kvm")
    # mov cx, 20000; mov dx, 0x3f8; 1: mov al, cl; out dx, ax; loop 1b; then the same in bytes
    nr = 20_000
    code = f"b9{nr.to_bytes(2, 'little').hex()} baf803 88c8 %s e2fb "
    machine, stop = wide(code % "ef" + code % "ee")
    with machine:
        assert stop.halted
        assert machine.console.serial.read() == bytes(n % 256 for n in range(nr, 0, -1)) * 2


@pytest.mark.parametrize("port", [0x402, 0xE9])
def test_the_debug_ports_read_as_there(port: int) -> None:
    need("kvm")
    with hv.Machine(ram="64K") as machine:
        machine.console  # noqa: B018
        machine.load(0x7C00, b"\xba" + port.to_bytes(2, "little") + b"\xec\xa2\x00\x40\xf4")
        machine.vcpu.real_mode()
        assert machine.run(10).halted
        assert machine.read(0x4000, 1) == b"\xe9"


def test_more_output_than_a_ring_holds() -> None:
    need("kvm")
    # mov cx, 20000; mov dx, 0x3f8; 1: mov al, cl; out dx, al; loop 1b, four times over; hlt
    nr = 20_000
    once = b"\xb9" + nr.to_bytes(2, "little") + bytes.fromhex("baf803 88c8 ee e2fb")
    serial, _ = run(once * 4 + b"\xf4")
    assert serial == bytes(n % 256 for n in range(nr, 0, -1)) * 4


@pytest.mark.parametrize("name", ["bios.bin", "bios-256k.bin"])
def test_seabios_greets(name: str) -> None:
    need("kvm", "seabios")
    image = (SEABIOS / name).read_bytes()
    with hv.Machine(ram="16M", unclaimed="open_bus") as machine:
        machine.load_bios(image)
        machine.vcpu.reset()
        debug, text = machine.console.debug, b""
        for _ in range(200):
            stop = machine.run(timeout=0.05)
            text += debug.read()
            if b"\n" in text or stop.reason != "timeout":
                break
    banner = re.match(rb"SeaBIOS \(version (\S+)\)\n", text)
    assert banner, text
    assert banner[1] in image


def test_where_firmware_lies() -> None:
    need("kvm")
    image = bytes(n >> 8 & 0xFF for n in range(512 << 10))
    with hv.Machine(ram="2M") as machine:
        machine.load_bios(image)
        assert machine.read(0xE0000, 0x20000) == image[-0x20000:]  # the last 128 KiB
        assert not any(machine.read(0xC0000, 0x20000))
        rom = machine.vm.memslot_at(0xFFFFFFFF)
        assert (rom.gpa, rom.size, rom.readonly) == (0xFFF80000, 512 << 10, True)
        assert machine.read(0xFFF80000, 512 << 10) == image
        with pytest.raises(hv.BusyError, match="firmware is loaded already"):
            machine.load_bios(image)
    with hv.Machine(ram="2M") as machine:
        machine.load_bios(image[: 256 << 10])
        assert machine.read(0xC0000, 0x40000) == image[: 256 << 10]


def test_firmware_runs_from_the_reset_vector_and_its_rom_is_not_written() -> None:
    need("kvm")
    image = bytearray(0x10000)
    image[0xFFF0:0xFFF5] = bytes.fromhex("ea 00000 0f0".replace(" ", ""))  # ljmp 0xf000:0
    # mov al, 0x5a; cs: mov [0x20], al; mov ax, 0xffff … to the ROM below 4 GiB it cannot reach; out 0x10, al; hlt
    image[0:9] = bytes.fromhex("b05a 2ea22000 e610 f4")
    with hv.Machine(ram="1M") as machine:
        machine.load_bios(image)
        machine.vcpu.reset()
        assert [next(machine.exits(10)), machine.run(10).reason] == [hv.IoOut(0x10, 1, 1, b"\x5a"), "halted"]
        assert machine.read(0xF0020, 1) == b"\x5a"  # the low copy is RAM
        assert machine.read(0xFFFF0020, 1) == b"\0"


@pytest.mark.parametrize("size", [0, 1, 0xFFFF, 0x10001, 0x18000, (16 << 20) + 0x10000])
def test_firmware_of_a_size_that_cannot_be(size: int) -> None:
    need("kvm")
    with hv.Machine(ram="2M") as machine:
        with pytest.raises(hv.ArgumentError) as caught:
            machine.load_bios(bytes(size))
        assert (caught.value.call, caught.value.field, caught.value.value) == ("Machine.load_bios", "image", size)
        with pytest.raises(hv.ArgumentTypeError):
            machine.load_bios("bios.bin")
        machine.load_bios(bytes(0x10000))


def test_firmware_without_ram_for_its_low_copy() -> None:
    need("kvm")
    with hv.Machine(ram="640K") as machine:
        with pytest.raises(hv.ArgumentError, match="not in RAM"):
            machine.load_bios(bytes(0x20000))
        assert len(machine.vm.memslots) == 1
