"""Accesses: which callbacks come, with which sizes, and what is put together; against QEMU, and by hand.

QEMU is driven by qtest, its own test protocol, whose reads and writes are address_space_read and _write, and traces
each callback (trace events memory_region_ops_read and _write).  The same regions with the same rules are made here,
their callbacks give the values that QEMU's gave, and must come in the same order with the same arguments.
"""

from __future__ import annotations

import errno
import random
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hvmodel as hv
from hvmodel.errors import ArgumentError, ArgumentTypeError, HostError
from hvmodel.host import limits
from hvmodel.ram.address_space import AddressSpace
from hvmodel.ram.dispatch import MEMTX_DECODE_ERROR, MEMTX_ERROR, MEMTX_OK, MemTxError
from hvmodel.ram.region import ADDRESS_END, MemoryRegion, MemoryRegionOps
from tests.cases import cases
from tests.need import need

# ---- QEMU ----


class Device(NamedTuple):
    """A region of QEMU's, with its rules: hw/*/*.c@v7.2; `reads` and `writes`: offsets that may be touched."""

    name: str
    space: str
    base: int
    size: int
    ops: dict[str, object]
    reads: range
    writes: range
    priority: int = 0


NOWHERE = range(0)
DEVICES = (
    # hw/misc/pc-testdev.c
    Device("pc-testdev-iomem", "memory", 0xFF000000, 0x10000, {}, range(0x10000), range(0x10000)),
    Device("pc-testdev-ioport", "io", 0xE0, 4, {}, range(4), range(4)),
    Device("pc-testdev-flush-page", "io", 0xE4, 4, {"valid_min": 4, "valid_max": 4}, range(4), NOWHERE),
    Device(
        "pc-testdev-ioport-byte", "io", 0xE8, 4, {"valid_min": 1, "valid_max": 4, "impl_min": 1, "impl_max": 1},
        range(4), range(4),
    ),
    # hw/timer/hpet.c
    Device("hpet", "memory", 0xFED00000, 0x400, {"valid_min": 4, "valid_max": 4}, range(0x400), NOWHERE),
    # hw/misc/edu.c; its BAR is put there below
    Device(
        "edu-mmio", "memory", 0xE0000000, 0x100000, {"valid_min": 4, "valid_max": 8, "impl_min": 4, "impl_max": 8},
        range(0x100), range(0x80, 0x90),
    ),
    # hw/nvram/fw_cfg.c: big-endian, and it says itself what it accepts
    Device(
        "fwcfg.dma", "io", 0x514, 8,
        {"valid_max": 8, "impl_max": 8, "endianness": "big",
         "accepts": lambda addr, size, is_write: not is_write or (size, addr) in ((4, 0), (4, 4), (8, 0))},
        range(8), NOWHERE,
    ),
    # hw/isa/piix3.c, hw/pci/pci_host.c: two that overlap
    Device("piix3-reset-control", "io", 0xCF9, 1, {"impl_min": 1, "impl_max": 1}, range(1), NOWHERE, 1),
    Device("pci-conf-idx", "io", 0xCF8, 4, {"endianness": "little"}, range(4), range(1)),
    Device("pci-conf-data", "io", 0xCFC, 4, {"endianness": "little"}, range(4), NOWHERE),
)  # fmt: skip
SETUP = ("outl 0xcf8 0x80001010", "outl 0xcfc 0xe0000000", "outl 0xcf8 0x80001004", "outw 0xcfc 0x2")  # edu's BAR 0
ACCESS = re.compile(r"memory_region_ops_(\w+) cpu -?\d+ mr \w+ addr (\w+) value (\w+) size (\d+) name '(.*)'")
COMMAND = re.compile(r"(read|write|in|out)([bwlq]?) (\w+)(?: (\w+))?(?: (\w+))?")
SIZES = {"b": 1, "w": 2, "l": 4, "q": 8}


def qtest(commands: list[str], directory: Path) -> tuple[list[str], list[tuple[str, str, int, int, int]]]:
    """QEMU's answers to qtest commands, and its trace of them: (read or write, name, address, size, value)."""
    log = directory / "trace"
    arguments = ["qemu-system-x86_64", "-accel", "tcg", "-S", "-machine", "pc", "-m", "16M", "-nodefaults"]
    arguments += ["-vga", "none", "-display", "none", "-monitor", "none", "-qtest", "stdio", "-qtest-log", "/dev/null"]
    arguments += ["-device", "pc-testdev", "-device", "edu,addr=2", "-trace", "memory_region_ops*", "-D", str(log)]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        try:
            answers = []
            for command in commands:
                qemu.stdin.write(command + "\n")
                qemu.stdin.flush()
                answers.append(qemu.stdout.readline().strip())
        finally:
            qemu.terminate()
            qemu.wait(timeout=20)
    trace = [
        (kind, name, int(addr, 0), int(size), int(value, 0))
        for kind, addr, value, size, name in ACCESS.findall(log.read_text())
    ]
    return answers, trace


def chosen(source: random.Random) -> str:
    """A random access near a device, that does no harm there."""
    device = source.choice(DEVICES)
    is_write = bool(device.writes) and source.random() < 0.4
    offset = source.choice(device.writes if is_write else device.reads)
    if source.random() < 0.3 and device.base not in (0xE0, 0xE8):
        offset = source.choice((0, 1, device.size - 1, device.size - 4)) if not is_write else offset
    addr = device.base + max(offset, 0)
    if device.space == "io":
        if is_write and device.name == "pci-conf-idx":
            return f"outl {addr:#x} {source.getrandbits(32) & 0xFFFFFF:#x}"
        # What reaches beyond a device must not write to one that minds.
        size = source.choice([s for s in "bwl" if not is_write or offset + SIZES[s] <= device.size])
        return f"out{size} {addr:#x} {source.getrandbits(8 * SIZES[size]):#x}" if is_write else f"in{size} {addr:#x}"
    if not is_write:
        return f"read {addr:#x} {source.randint(1, 24)}" if source.random() < 0.7 else f"readq {addr:#x}"
    length = source.randint(1, min(24, device.writes.stop - offset))
    return f"write {addr:#x} {length} 0x{source.randbytes(length).hex()}"


def test_callbacks_are_those_of_qemu(tmp_path: Path) -> None:
    need("qemu")
    source = random.Random(1)
    commands = [*SETUP, *(chosen(source) for _ in range(cases(300, 5000)))]
    answers, trace = qtest(commands, tmp_path)
    trace = [entry for entry in trace if entry[1] != "apic-msi"]  # of QEMU's own reset
    left = trace[::-1]
    ours: list[tuple[str, str, int, int, int]] = []

    def make(device: Device) -> MemoryRegion:
        def read(addr: int, size: int) -> int:
            value = left.pop()[4] if left else 0
            ours.append(("read", device.name, device.base + addr, size, value))
            return value

        def write(addr: int, value: int, size: int) -> None:
            if left:
                left.pop()
            ours.append(("write", device.name, device.base + addr, size, value))

        ops = MemoryRegionOps(read, write, **device.ops)  # type: ignore[arg-type]
        return MemoryRegion.io(device.name, device.size, ops)

    # QEMU's I/O space has a region behind all others (softmmu/ioport.c unassigned_io_ops).
    ports = make(Device("io", "io", 0, 0x10000, {}, NOWHERE, NOWHERE))
    system = MemoryRegion.container("system", ADDRESS_END)
    spaces = {"memory": AddressSpace(system, "memory"), "io": AddressSpace(ports, "I/O")}
    for device in DEVICES:
        spaces[device.space].root.add_subregion(device.base, make(device), device.priority)
    for command, answer in zip(commands, answers, strict=True):
        match = COMMAND.fullmatch(command)
        assert match is not None
        what, suffix, addr, *rest = match.groups()
        space = spaces["io" if what in ("in", "out") else "memory"]
        if suffix and what in ("read", "in"):
            value, _ = space.load(int(addr, 0), SIZES[suffix])
            assert int(answer.removeprefix("OK "), 0) == value, command
        elif suffix:
            space.store(int(addr, 0), int(rest[0], 0), SIZES[suffix])
        elif what == "read":
            data, _ = space.try_read(int(addr, 0), int(rest[0], 0))
            assert answer == f"OK 0x{data.hex()}", command
        else:
            space.try_write(int(addr, 0), bytes.fromhex(rest[1].removeprefix("0x")))
        assert answer.startswith("OK"), (command, answer)
        assert ours == trace[: len(ours)], command
    assert ours == trace
    # Of all kinds: cut, widened, refused, at odd addresses.
    assert len(trace) > len(commands) / 2
    assert {entry[3] for entry in trace} == {1, 2, 4, 8}
    assert {entry[1] for entry in trace} >= {device.name for device in DEVICES}


# ---- the pieces, by hand ----


class Registers:
    """A device of some bytes, and what it was asked for."""

    def __init__(self, size: int, order: str = "little", **rules: object) -> None:
        self.bytes = bytearray(random.Random(size).randbytes(size + 16))
        self.seen: list[tuple[object, ...]] = []
        self.order = order
        ops = MemoryRegionOps(self.read, self.write, endianness=order, **rules)  # type: ignore[arg-type]
        self.region = MemoryRegion.io("registers", size, ops)

    def read(self, addr: int, size: int) -> int:
        self.seen.append((addr, size))
        return int.from_bytes(self.bytes[addr : addr + size], self.order)  # type: ignore[arg-type]

    def write(self, addr: int, value: int, size: int) -> None:
        self.seen.append((addr, value, size))
        self.bytes[addr : addr + size] = value.to_bytes(size, self.order)  # type: ignore[arg-type]


def at(base: int, region: MemoryRegion, *more: tuple[int, MemoryRegion]) -> AddressSpace:
    root = MemoryRegion.container("system", ADDRESS_END)
    for start, other in ((base, region), *more):
        root.add_subregion(start, other)
    return AddressSpace(root, "memory")


@pytest.mark.parametrize(
    ("rules", "addr", "size", "seen", "result"),
    [
        # Sizes and addresses that the defaults take: 1 to 4, aligned.
        ({}, 0, 4, [(0, 4)], MEMTX_OK),
        ({}, 0, 8, [(0, 4), (4, 4)], MEMTX_OK),
        ({}, 1, 4, [(1, 1), (2, 2), (4, 1)], MEMTX_OK),
        ({}, 0, 3, [(0, 2), (2, 1)], MEMTX_OK),
        # Once unaligned is implemented, the rest is up to valid_unaligned.
        ({"impl_unaligned": True}, 1, 4, [], MEMTX_DECODE_ERROR),
        ({"impl_unaligned": True, "valid_unaligned": True}, 1, 4, [(1, 4)], MEMTX_OK),
        # At 0 there is no alignment to keep.
        ({"valid_max": 8}, 0, 8, [(0, 4), (4, 4)], MEMTX_OK),
        ({"valid_max": 8, "impl_max": 8}, 0, 8, [(0, 8)], MEMTX_OK),
        ({"valid_max": 8, "impl_max": 8}, 4, 8, [(4, 4), (8, 4)], MEMTX_OK),
        ({"valid_min": 4, "valid_max": 4}, 4, 2, [], MEMTX_DECODE_ERROR),
        ({"valid_min": 4, "valid_max": 4}, 2, 6, [(4, 4)], MEMTX_DECODE_ERROR),
        ({"impl_min": 4}, 1, 1, [(1, 4)], MEMTX_OK),
        ({"impl_min": 2, "impl_max": 2}, 0, 4, [(0, 2), (2, 2)], MEMTX_OK),
        ({"accepts": lambda addr, size, is_write: addr != 4}, 0, 8, [(0, 4)], MEMTX_DECODE_ERROR),
    ],
)
def test_pieces(rules: dict[str, object], addr: int, size: int, seen: list[object], result: int) -> None:
    for order in ("little", "big", "native"):
        device = Registers(16, "little" if order == "native" else order, **rules)
        with at(0x1000, device.region) as space:
            data, found = space.try_read(0x1000 + addr, size)
            assert (device.seen, found) == (seen, result)
            # What came through is as it stands there, in either order; the rest is 0.
            served = {at for start, length in seen for at in range(start, start + length)}  # type: ignore[misc,has-type]
            expected = [device.bytes[addr + n] if addr + n in served else 0 for n in range(size)]
            assert list(data) == expected
            assert space.load(0x1000 + addr, size) == (int.from_bytes(expected, "little"), result)


@settings(max_examples=cases(150, 5000), deadline=None)
@given(
    st.sampled_from(["little", "big"]),
    st.sampled_from([(0, 0), (1, 1), (1, 2), (2, 2), (1, 8), (4, 8), (8, 8), (2, 4)]),
    st.sampled_from([0, 1, 2, 4, 8]),
    st.booleans(),
    st.integers(0, 12),
    st.binary(min_size=1, max_size=12),
)
def test_bytes_come_and_go_as_they_are(
    order: str, impl: tuple[int, int], valid_max: int, unaligned: bool, addr: int, data: bytes
) -> None:
    # Whatever the sizes, bytes stay in their order: a device of bytes with any byte order looks the same.
    rules = {"impl_min": impl[0], "impl_max": impl[1], "valid_max": valid_max, "valid_unaligned": True}
    device = Registers(24, order, impl_unaligned=unaligned, **rules)
    with at(0, device.region) as space:
        assert space.read(addr, len(data)) == device.bytes[addr : addr + len(data)]
        space.write(addr, data)
        assert device.bytes[addr : addr + len(data)] == data


def test_accesses_to_registers_are_not_cut_where_another_begins() -> None:
    wide, narrow = Registers(4), Registers(1)
    with at(0xCF8, wide.region) as ports:
        ports.root.add_subregion(0xCF9, narrow.region, priority=1)
        ports.load(0xCF8, 4)
        assert (wide.seen, narrow.seen) == ([(0, 4)], [])
        ports.load(0xCF8, 2)
        ports.load(0xCF9, 1)
        assert (wide.seen, narrow.seen) == ([(0, 4), (0, 2)], [(0, 1)])


def test_values_are_cut_to_the_size() -> None:
    region = MemoryRegion.io("x", 16, MemoryRegionOps(lambda addr, size: -1, lambda *_: None))
    with at(0, region) as space:
        assert space.load(0, 2) == (0xFFFF, MEMTX_OK)
        assert space.load(0, 8) == ((1 << 64) - 1, MEMTX_OK)
        assert space.store(0, -1, 4) == space.store(0, 1 << 80, 1) == MEMTX_OK


def test_callbacks_that_refuse() -> None:
    def read(addr: int, size: int) -> int:
        if addr == 4:
            raise MemTxError("registers", addr, size)
        return 0x11

    region = MemoryRegion.io("x", 16, MemoryRegionOps(read))
    with at(0x10, region) as space:
        assert space.load(0x10, 8) == (0x11, MEMTX_ERROR)
        assert space.try_read(0xF, 6) == (b"\0\x11\0\0\0\0", MEMTX_ERROR | MEMTX_DECODE_ERROR)
        assert space.store(0x10, 0, 1) == MEMTX_DECODE_ERROR  # there is no write
        with pytest.raises(
            MemTxError, match=r"AddressSpace.read: not all of the 0x6 .* MEMTX_ERROR\|MEMTX_DECODE_ERROR"
        ):
            space.read(0xF, 6)
        with pytest.raises(MemTxError, match=r"AddressSpace.write: .* MEMTX_DECODE_ERROR"):
            space.write(0x10, b"a")


def test_other_exceptions_of_callbacks_rise() -> None:
    empty: dict[int, int] = {}
    region = MemoryRegion.io("x", 4, MemoryRegionOps(lambda addr, size: 1 // 0, lambda *_: empty[1]))
    with at(0, region) as space:
        with pytest.raises(ZeroDivisionError):
            space.load(0, 1)
        with pytest.raises(KeyError):
            space.store(0, 0, 1)


def test_a_value_that_is_no_int() -> None:
    ops = MemoryRegionOps(lambda addr, size: b"x")  # type: ignore[arg-type,return-value]
    with at(0, MemoryRegion.io("uart", 4, ops)) as space, pytest.raises(ArgumentTypeError, match="read of uart"):
        space.load(0, 1)


# ---- memory ----


def test_ram_rom_and_holes() -> None:
    with hv.RamBlock("ram", "4K") as block, hv.RamBlock("rom", "4K") as image:
        image.write(0, b"rom" * 10)
        with at(0x1000, MemoryRegion.ram("ram", block), (0x2000, MemoryRegion.rom("rom", image))) as space:
            space.write(0x1FFC, b"abcd")
            assert block.read(0xFFC, 4) == b"abcd"
            assert space.read(0x1FFC, 7) == b"abcdrom"
            # A write over both is dropped in the second, and that is no error.
            assert space.try_write(0x1FFE, b"1234") == MEMTX_OK
            assert (space.read(0x1FFC, 7), image.read(0, 3)) == (b"ab12rom", b"rom")
            assert space.store(0x2000, 0x55, 1) == MEMTX_OK
            assert space.load(0x2000, 1) == (ord("r"), MEMTX_OK)
            # Nothing before and behind.
            data, result = space.try_read(0xFF0, 0x30)
            assert (data, result) == (bytes(0x10) + block.read(0, 0x20), MEMTX_DECODE_ERROR)
            data, result = space.try_read(0x2FF0, 0x2000)
            assert (data, result) == (image.read(0xFF0, 0x10) + bytes(0x1FF0), MEMTX_DECODE_ERROR)
            assert space.try_write(0xFFE, b"wxyz") == MEMTX_DECODE_ERROR
            assert block.read(0, 3) == b"yz\0"
            space.write_rom(0x1FFF, b"XYZ")
            assert (block.read(0xFFF, 1), image.read(0, 4)) == (b"X", b"YZmr")
            assert block.host_dirty() == [range(1)]


def test_a_read_only_alias_drops_writes() -> None:
    # As a CPU's; qtest shows that QEMU's address_space_write goes through to the RAM (PAM at 1, writeb, readb).
    with hv.RamBlock("ram", "4K") as block:
        ram = MemoryRegion.ram("ram", block)
        pam = MemoryRegion.alias("pam-rom", ram, 0, 0x1000)
        pam.readonly = True
        with at(0x1000, ram, (0x2000, pam)) as space:
            assert space.try_write(0x2000, b"no") == space.store(0x2000, 1, 1) == MEMTX_OK
            space.write(0x1001, b"yes")
            assert space.read(0x2000, 4) == b"\0yes"


def test_a_read_only_alias_of_registers_lets_writes_through() -> None:
    device = Registers(4)
    alias = MemoryRegion.alias("a", device.region, 0, 4)
    alias.readonly = True
    with at(0, alias) as space:
        assert space.store(0, 5, 1) == MEMTX_OK
        assert device.seen == [(0, 5, 1)]


def test_a_rom_device() -> None:
    seen: list[tuple[int, ...]] = []
    ops = MemoryRegionOps(lambda addr, size: 0x77, lambda addr, value, size: seen.append((addr, value, size)))
    with hv.RamBlock("flash", "4K") as block:
        block.write(0, b"flash")
        flash = MemoryRegion.rom_device("flash", block, ops)
        with at(0x1000, flash) as space:
            assert space.load(0x1000, 4) == (int.from_bytes(b"flas", "little"), MEMTX_OK)
            assert space.store(0x1004, 0x90, 1) == MEMTX_OK
            space.write(0x1006, b"\1\2\3")
            assert seen == [(4, 0x90, 1), (6, 0x201, 2), (8, 3, 1)]
            flash.romd = False
            assert space.load(0x1000, 1) == (0x77, MEMTX_OK)
            assert space.try_read(0x1000, 3) == (b"\x77\0\x77", MEMTX_OK)
            space.write_rom(0x1000, b"no")
            assert block.read(0, 5) == b"flash"


def test_a_large_hole_is_not_walked() -> None:
    # 2**64 bytes in pieces of 4 would not end.
    with hv.RamBlock("ram", "4K") as block, at(ADDRESS_END - 0x1000, MemoryRegion.ram("ram", block)) as space:
        block.write(0, b"end")
        data, result = space.try_read(ADDRESS_END - 0x1000 - 0x2000003, 0x2000003 + 3)
        assert (data[-3:], data.count(0), result) == (b"end", 0x2000003, MEMTX_DECODE_ERROR)
        assert space.try_write(0x7FFF0001, bytes(1 << 24)) == MEMTX_DECODE_ERROR


def test_a_hole_of_some_bytes_takes_an_access_of_4() -> None:
    # As in QEMU: accesses to nothing are of up to 4 bytes, and are not cut where something begins.
    device = Registers(16)
    with at(0x1002, device.region) as space:
        assert space.try_read(0x1000, 4) == (b"\0\0\0\0", MEMTX_DECODE_ERROR)
        assert space.try_read(0x1001, 4) == (b"\0" + device.bytes[:3], MEMTX_DECODE_ERROR)
        assert device.seen == [(0, 2), (2, 1)]


# ---- bad input ----


@pytest.mark.parametrize(
    ("addr", "size", "field"),
    [
        (-1, 1, "addr"),
        (ADDRESS_END, 1, "addr"),
        (ADDRESS_END - 1, 2, "size"),
        (0, 9, "size"),
        (0, 0, "size"),
        (0, -1, "size"),
    ],
)
def test_ranges_that_are_refused(addr: int, size: int, field: str) -> None:
    with at(0, MemoryRegion.io("x", ADDRESS_END)) as space:
        for attempt in (lambda: space.load(addr, size), lambda: space.store(addr, 0, size)):
            with pytest.raises(ArgumentError) as caught:
                attempt()
            assert caught.value.field == field


def test_longer_ranges_that_are_refused() -> None:
    with at(0, MemoryRegion.io("x", 4)) as space:
        assert (space.try_read(5, 0), space.try_write(5, b"")) == ((b"", MEMTX_OK), MEMTX_OK)
        for addr, size in ((0, ADDRESS_END + 1), (1, ADDRESS_END), (0, -1)):
            with pytest.raises(ArgumentError):
                space.try_read(addr, size)
        with pytest.raises(ArgumentError):
            space.try_write(ADDRESS_END - 1, b"ab")
        for data in ("text", 5, None):
            with pytest.raises(ArgumentTypeError):
                space.try_write(0, data)  # type: ignore[arg-type]
        with pytest.raises(ArgumentTypeError):
            space.load("0", 1)  # type: ignore[arg-type]
        with pytest.raises(ArgumentTypeError):
            space.store(0, 1.5, 1)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError):
            space.try_write(0, memoryview(bytes(16))[::2])


def test_more_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with at(0, MemoryRegion.io("x", 4)) as space:
        with pytest.raises(HostError) as caught:
            space.try_read(0, 1 << 60)
        assert (caught.value.errno, caught.value.field) == (errno.ENOMEM, "size")
        monkeypatch.setattr(limits, "available_memory", lambda: 128 << 20)
        assert len(space.try_read(4, 64 << 20)[0]) == 64 << 20
        with pytest.raises(HostError, match="at most 0x4000000 bytes"):
            space.try_read(4, (64 << 20) + 1)


def test_the_error_pickles() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(MemTxError("call", 1, 2, MEMTX_DECODE_ERROR)))
    assert (error.call, error.addr, error.size, error.result) == ("call", 1, 2, MEMTX_DECODE_ERROR)
