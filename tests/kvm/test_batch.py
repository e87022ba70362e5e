"""Exits served in C: every policy, the rings, the records, and random rules against a plain decision per access."""

from __future__ import annotations

import random
import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hvmodel as hv
from hvmodel._ffi import ffi, lib
from hvmodel.kvm import RECORD_DTYPE, Exit, ExitRecord, iter_records
from tests.cases import cases
from tests.guests import assemble
from tests.kvm.guest import CODE, Guest
from tests.need import need, need_cap

NewGuest = Callable[..., Guest]

RAM_SIZE = 0xA0000  # what lies behind is MMIO that real mode reaches
MMIO = 0xA0000
RESULTS = 0x4000  # where a program puts what it read, a dword each
DATA = 0x8000
MIN_RING = 8192


# ---- programs ----


class Access(NamedTuple):
    """One instruction of a guest: a port access, or one of memory at MMIO + address."""

    kind: str
    address: int
    size: int
    value: int | None  # what is written; None reads

    def code(self) -> bytes:
        prefix = b"\x66" if self.size == 4 else b""
        wide = self.size != 1
        if self.kind == "pio":
            way = b"\xba" + struct.pack("<H", self.address) + prefix
            insn = bytes([(0xEE if self.value is not None else 0xEC) + wide])
        else:
            way = prefix + bytes([(0xA2 if self.value is not None else 0xA0) + wide])
            insn = struct.pack("<H", self.address)
        if self.value is not None:
            return b"\x66\xb8" + struct.pack("<I", self.value) + way + insn  # mov eax, value
        return b"\x66\x31\xc0" + way + insn + b"\x66\xab"  # xor eax, eax; …; stosd

    def exit(self) -> Exit:
        """What it is when Python gets it."""
        data = None if self.value is None else (self.value % (1 << 8 * self.size)).to_bytes(self.size, "little")
        if self.kind == "pio":
            return hv.IoIn(self.address, self.size, 1) if data is None else hv.IoOut(self.address, self.size, 1, data)
        gpa = MMIO + self.address
        return hv.MmioRead(gpa, self.size) if data is None else hv.MmioWrite(gpa, data)


def program(accesses: list[Access]) -> bytes:
    """The accesses in order, then hlt."""
    start = b"\xb8\x00\xa0\x8e\xd8\xbf" + struct.pack("<H", RESULTS)  # ds = 0xa000, di = RESULTS
    return start + b"".join(access.code() for access in accesses) + b"\xf4"


def results(guest: Guest, nr: int) -> list[int]:
    return list(struct.unpack(f"<{nr}I", guest.ram.read(RESULTS, 4 * nr)))


def string_io(op: bytes, count: int) -> bytes:
    """rep outs from, or rep ins to, DATA at port 0x50; then hlt."""
    return (
        b"\xbe"
        + struct.pack("<H", DATA)
        + b"\xbf"
        + struct.pack("<H", DATA)
        + b"\xb9"
        + struct.pack("<H", count)
        + (b"\xba\x50\x00\xf3" + op + b"\xf4")
    )


OUTSB, OUTSD, INSB, INSD = b"\x6e", b"\x66\x6f", b"\x6c", b"\x66\x6d"
OUT_FOR_EVER = bytes.fromhex("e650 ebfc")  # out 0x50, al; jmp back


@pytest.fixture
def served(guest: NewGuest) -> Callable[..., tuple[Guest, hv.Batch]]:
    """`served(code, **of Batch)`: a guest with a batch."""

    def make(code: bytes, **named: object) -> tuple[Guest, hv.Batch]:
        g = guest(code, size=RAM_SIZE)
        batch = hv.Batch(**named)
        g.vcpu.batch = batch
        return g, batch

    return make


# ---- policies ----


def test_without_a_rule_everything_is_pythons(served: Callable[..., tuple[Guest, hv.Batch]]) -> None:
    accesses = [Access("pio", 0x50, 1, 7), Access("mmio", 8, 4, 9)]
    g, batch = served(program(accesses))
    assert [g.run(), g.run(), g.run()] == [*(a.exit() for a in accesses), hv.Hlt()]
    assert (batch.nr_exits, batch.nr_served) == (3, 0)
    assert batch.counts == {lib.KVM_EXIT_IO: 1, lib.KVM_EXIT_MMIO: 1, lib.KVM_EXIT_HLT: 1}


@pytest.mark.parametrize("kind", ["pio", "mmio"])
def test_ignored(served: Callable[..., tuple[Guest, hv.Batch]], kind: str) -> None:
    g, batch = served(program([Access(kind, 0x50, size, value) for size in (1, 2, 4) for value in (0x12345678, None)]))
    getattr(batch, kind)(0x50 if kind == "pio" else MMIO + 0x50, 4, read="ignore", write="ignore")
    assert g.run() == hv.Hlt()
    assert results(g, 3) == [0xFF, 0xFFFF, 0xFFFFFFFF]  # open bus
    assert batch.nr_served == 6


@pytest.mark.parametrize("kind", ["pio", "mmio"])
def test_a_constant(served: Callable[..., tuple[Guest, hv.Batch]], kind: str) -> None:
    g, batch = served(program([Access(kind, 0x50, size, None) for size in (1, 2, 4)]))
    getattr(batch, kind)(0x50 if kind == "pio" else MMIO + 0x50, 4, read=0x1122334455667788)
    assert g.run() == hv.Hlt()
    assert results(g, 3) == [0x88, 0x7788, 0x55667788]


@pytest.mark.parametrize("kind", ["pio", "mmio"])
def test_captured(served: Callable[..., tuple[Guest, hv.Batch]], kind: str) -> None:
    g, batch = served(program([Access(kind, 0x50, size, 0x44434241) for size in (1, 2, 4)]))
    out = hv.Capture(MIN_RING)
    getattr(batch, kind)(0x50 if kind == "pio" else MMIO + 0x50, 4, write=out)
    assert g.run() == hv.Hlt()
    assert len(out) == 7
    assert out.read() == b"AABABCD"
    assert out.read() == b""
    assert len(out) == 0


@pytest.mark.parametrize("kind", ["pio", "mmio"])
def test_fed(served: Callable[..., tuple[Guest, hv.Batch]], kind: str) -> None:
    accesses = [Access(kind, 0x50, size, None) for size in (1, 2, 4, 2)]
    g, batch = served(program(accesses))
    feed = hv.Feed(b"abcdefgh")  # one byte is left for the last read, which wants two
    getattr(batch, kind)(0x50 if kind == "pio" else MMIO + 0x50, 4, read=feed)
    assert g.run() == accesses[-1].exit()
    assert len(feed) == 1
    g.vcpu.answer(0x5A5A)
    assert g.run() == hv.Hlt()
    assert results(g, 4) == [0x61, 0x6362, 0x67666564, 0x5A5A]


@pytest.mark.parametrize(("on_empty", "byte"), [("ignore", 0xFF), (0x41, 0x41), (0, 0)])
def test_an_empty_feed(served: Callable[..., tuple[Guest, hv.Batch]], on_empty: object, byte: int) -> None:
    g, batch = served(program([Access("pio", 0x50, 1, None) for _ in range(4)]))
    batch.pio(0x50, 1, read=hv.Feed(b"xy", on_empty=on_empty))
    assert g.run() == hv.Hlt()
    assert results(g, 4) == [0x78, 0x79, byte, byte]


def test_an_empty_feed_goes_on_when_it_is_filled(served: Callable[..., tuple[Guest, hv.Batch]]) -> None:
    g, batch = served(program([Access("pio", 0x50, 1, None) for _ in range(3)]))
    feed = hv.Feed(b"a")
    batch.pio(0x50, 1, read=feed)
    assert g.run() == hv.IoIn(0x50, 1, 1)
    with pytest.raises(hv.UnansweredError):
        g.vcpu.run()
    g.vcpu.answer(b"b")
    feed.write(b"c")
    assert g.run() == hv.Hlt()
    assert results(g, 3) == [0x61, 0x62, 0x63]


def test_an_access_that_straddles_the_end_is_not_covered(served: Callable[..., tuple[Guest, hv.Batch]]) -> None:
    accesses = [Access("pio", port, 2, 0) for port in (0x4F, 0x50, 0x51, 0x52, 0x53, 0x54)]
    accesses += [Access("mmio", at, 4, 0) for at in (0xD, 0x10, 0x1C, 0x1D, 0x20)]
    g, batch = served(program(accesses))
    batch.pio(0x50, 2, write="ignore")
    batch.pio(0x52, 2, write="ignore")  # beside it, but an access lies in one rule or in none
    batch.mmio(MMIO + 0x10, 0x10, write="ignore")
    left = []
    while (exit := g.run()) != hv.Hlt():
        left.append(exit)
    outside = [accesses[n].exit() for n in (0, 2, 4, 5, 6, 9, 10)]
    assert left == outside


def test_an_access_that_lies_in_a_rule_in_part_is_not_ignored(served: Callable[..., tuple[Guest, hv.Batch]]) -> None:
    accesses = [Access("pio", port, 2, 0) for port in (0x4E, 0x4F, 0x50, 0x51, 0x52)]
    accesses += [Access("mmio", at, 4, 0) for at in (0xC, 0xD, 0x10, 0x1D, 0x20)]
    g, batch = served(program(accesses))
    batch.configure(unclaimed_pio="ignore", unclaimed_mmio="ignore")
    batch.pio(0x50, 2, write="ignore")
    batch.mmio(MMIO + 0x10, 0x10, write="ignore")
    left = []
    while (exit := g.run()) != hv.Hlt():
        left.append(exit)
    assert left == [accesses[n].exit() for n in (1, 3, 6, 8)]


def test_string_io_is_served_too(served: Callable[..., tuple[Guest, hv.Batch]]) -> None:
    data = bytes(n * 11 % 253 for n in range(5000))
    g, batch = served(string_io(INSB, 5000))
    batch.pio(0x50, 1, read=hv.Feed(data))
    assert g.run() == hv.Hlt()
    assert g.ram.read(DATA, 5000) == data


def test_a_feed_too_short_for_a_string_gives_none_of_it(served: Callable[..., tuple[Guest, hv.Batch]]) -> None:
    g, batch = served(string_io(INSD, 100))
    feed = hv.Feed(b"1234567", on_empty="stop")
    batch.pio(0x50, 4, read=feed)
    while (exit := g.run()) != hv.Hlt():
        assert isinstance(exit, hv.IoIn)
        assert exit.size == 4
        if exit.count > 1:
            assert len(feed) == 7
        g.vcpu.answer(0xAABBCCDD)
    read = g.ram.read(DATA, 400)
    assert read in (b"\xdd\xcc\xbb\xaa" * 100, b"1234" + b"\xdd\xcc\xbb\xaa" * 99)


def test_rules_are_removed_and_changed(served: Callable[..., tuple[Guest, hv.Batch]]) -> None:
    g, batch = served(OUT_FOR_EVER, max_exits=10)
    one, other = hv.Capture(), hv.Capture()
    batch.pio(0x50, 1, write=one)
    assert g.run() == hv.Interrupted("limit")
    batch.remove("pio", 0x50)
    assert g.run() == hv.IoOut(0x50, 1, 1, b"\0")
    batch.pio(0x40, 0x20, write=other)
    assert g.run() == hv.Interrupted("limit")
    batch.remove("pio", 0x40)
    batch.configure(unclaimed_pio="ignore", max_exits=3)
    assert g.run() == hv.Interrupted("limit")
    assert (len(one), len(other)) == (10, 10)
    g.vcpu.batch = None
    assert g.run() == hv.IoOut(0x50, 1, 1, b"\0")
    assert batch.nr_served == 23


# ---- rings ----


@pytest.mark.parametrize("capacity", [MIN_RING, 1 << 14, 1 << 16])
@pytest.mark.parametrize("op", [OUTSB, OUTSD])
def test_more_than_the_ring_holds_is_not_lost(
    served: Callable[..., tuple[Guest, hv.Batch]], capacity: int, op: bytes
) -> None:
    size = 4 if op == OUTSD else 1
    count = 30_000 // size
    g, batch = served(string_io(op, count))
    data = random.Random(capacity).randbytes(count * size)
    g.ram.write(DATA, data)
    out = hv.Capture(capacity)
    batch.pio(0x50, 4, write=out)
    assert g.run() == hv.Hlt()
    assert out.read() == data
    assert batch.nr_served == count


def test_a_ring_is_read_while_the_guest_fills_it(served: Callable[..., tuple[Guest, hv.Batch]]) -> None:
    count = cases(7000, (0x10000 - DATA) // 4)  # SI wraps at 64 KiB
    rounds = cases(2, 20)
    g, batch = served(string_io(OUTSD, count), max_exits=0)
    data = random.Random(1).randbytes(4 * count)
    g.ram.write(DATA, data)
    out = hv.Capture(MIN_RING)
    batch.pio(0x50, 4, write=out)
    read = bytearray()
    stop = threading.Event()

    def reader() -> None:
        while not stop.is_set():
            read.extend(out.read())
            time.sleep(2e-4)

    thread = threading.Thread(target=reader)
    thread.start()
    for _ in range(rounds):
        g.load(string_io(OUTSD, count))
        assert g.run() == hv.Hlt()
    stop.set()
    thread.join()
    read.extend(out.read())
    assert read == data * rounds


def test_a_feed_is_filled_while_the_guest_drinks(served: Callable[..., tuple[Guest, hv.Batch]]) -> None:
    count = cases(20_000, 30_000)
    # mov di, DATA; mov cx, count; 1: in al, 0x50; test al, al; jz 1b; stosb; dec cx; jnz 1b; hlt
    g, batch = served(struct.pack("<BHBH", 0xBF, DATA, 0xB9, count) + bytes.fromhex("e450 84c0 74fa aa 49 75f6 f4"))
    feed = hv.Feed(capacity=MIN_RING, on_empty=0)
    batch.pio(0x50, 1, read=feed)
    sizes = random.Random(2)
    data = bytes(sizes.randrange(1, 256) for _ in range(count))

    def writer() -> None:
        given = 0
        while given < count:
            given += feed.write(data[given : given + sizes.randrange(3000)])

    thread = threading.Thread(target=writer)
    thread.start()
    assert g.run(60) == hv.Hlt()
    thread.join()
    assert g.ram.read(DATA, count) == data


def test_writing_to_a_feed_stops_at_its_capacity() -> None:
    feed = hv.Feed(b"x" * 100, capacity=MIN_RING)
    assert feed.write(b"y" * MIN_RING) == MIN_RING - 100
    assert feed.write(b"z") == 0
    assert len(feed) == feed.capacity == MIN_RING
    assert feed.write(b"") == 0
    assert feed.write(memoryview(b"z")) == feed.write(bytearray(b"z")) == 0


def test_a_ring_belongs_to_one_batch() -> None:
    # One producer, one consumer: two vCPUs at one ring would be two.
    out, feed, batch, other = hv.Capture(), hv.Feed(), hv.Batch(), hv.Batch()
    batch.pio(0x10, 1, write=out, read=feed)
    batch.pio(0x20, 1, write=out)  # twice in one batch is one vCPU still
    for named in ({"write": out}, {"read": feed}):
        with pytest.raises(hv.BusyError, match="another Batch"):
            other.pio(0x30, 1, **named)
    other.pio(0x30, 1)
    batch.remove("pio", 0x10)
    other.pio(0x31, 1, read=feed)
    with pytest.raises(hv.BusyError):
        other.mmio(0x1000, 1, write=out)
    del batch
    other.mmio(0x1000, 1, write=out)


# ---- limits ----


def test_max_exits_counts_exactly(served: Callable[..., tuple[Guest, hv.Batch]]) -> None:
    # Full rings (every 4096 bytes) and heartbeats (every 0.1 s) come in between, and do not begin a new count.
    limit = cases(20_000, 200_000)
    g, batch = served(OUT_FOR_EVER, max_exits=limit)
    out = hv.Capture(MIN_RING)
    batch.pio(0x50, 1, write=out)
    for n in range(1, 4):
        assert g.vcpu.run() == hv.Interrupted("limit")
        assert (batch.nr_served, len(out)) == (n * limit, n * limit)
    g.vcpu.kick()
    assert [g.run(), g.run()] == [hv.Interrupted("kick"), hv.Interrupted("limit")]
    assert batch.nr_served == 4 * limit


@pytest.mark.parametrize("limit", [1, 2, 4096, 4097])
def test_a_limit_where_the_ring_is_full_as_well(served: Callable[..., tuple[Guest, hv.Batch]], limit: int) -> None:
    g, batch = served(OUT_FOR_EVER, max_exits=limit)
    out = hv.Capture(MIN_RING)
    batch.pio(0x50, 1, write=out)
    for n in range(1, 4):
        assert g.run() == hv.Interrupted("limit")
        assert len(out) == n * limit


def test_an_exit_of_pythons_begins_a_new_count(served: Callable[..., tuple[Guest, hv.Batch]]) -> None:
    g, batch = served(
        program([Access("pio", 0x50, 1, 0)] * 2 + [Access("pio", 0x60, 1, 0)] + [Access("pio", 0x50, 1, 0)] * 3),
        max_exits=3,
    )
    batch.pio(0x50, 1, write="ignore")
    assert [g.run(), g.run(), g.run()] == [hv.IoOut(0x60, 1, 1, b"\0"), hv.Interrupted("limit"), hv.Hlt()]


def test_a_timeout_ends_a_run_that_c_serves(served: Callable[..., tuple[Guest, hv.Batch]]) -> None:
    g, batch = served(OUT_FOR_EVER, unclaimed_pio="ignore")
    assert g.vcpu.run(0.15) == hv.Interrupted("timeout")
    assert batch.nr_served == batch.nr_exits > 0


# ---- records ----


def test_the_dtype_is_the_struct() -> None:
    dtype = np.dtype(RECORD_DTYPE)
    assert dtype.itemsize == ffi.sizeof("struct hv_record") == 48
    fields = ffi.typeof("struct hv_record").fields
    assert [(name, dtype.fields[name][1], dtype.fields[name][0].itemsize) for name in dtype.names] == [
        (name, field.offset, ffi.sizeof(field.type)) for name, field in fields
    ]


ACCESSES = [
    *(
        Access(kind, 0x50 + n, size, value)
        for n in (0, 8)
        for kind in ("pio", "mmio")
        for size in (1, 2, 4)
        for value in (None, 0x81828384)
    ),
    Access("pio", 0xFFFF, 1, 3),
]


def one_by_one(g: Guest, answer: int) -> list[Exit]:
    """A guest's exits, each in Python; reads get `answer`, cut to their size."""
    exits = []
    while True:
        exit = g.run()
        exits.append(exit)
        match exit:
            case hv.IoIn(size=size) | hv.MmioRead(size=size):
                g.vcpu.answer(answer % (1 << 8 * size))
            case hv.Hlt():
                return exits


def as_record(exit: Exit, policy: str, answer: int | None) -> tuple[object, ...]:
    """What a record of this exit says, but for time and rip."""
    match exit:
        case hv.IoIn(port=at, size=size, count=count):
            return at, 0 if answer is None else answer % (1 << 8 * size), lib.KVM_EXIT_IO, count, size, False, policy
        case hv.IoOut(port=at, size=size, count=count, data=data):
            return at, int.from_bytes(data[:8], "little"), lib.KVM_EXIT_IO, count, size, True, policy
        case hv.MmioRead(gpa=at, size=size):
            return at, 0 if answer is None else answer % (1 << 8 * size), lib.KVM_EXIT_MMIO, 1, size, False, policy
        case hv.MmioWrite(gpa=at, data=data):
            return at, int.from_bytes(data, "little"), lib.KVM_EXIT_MMIO, 1, len(data), True, policy
    return 0, 0, lib.KVM_EXIT_HLT, 1, 0, False, policy


def brief(record: ExitRecord) -> tuple[object, ...]:
    return record.address, record.data, record.reason, record.count, record.size, record.is_write, record.policy


def test_records_are_the_exits_seen_one_by_one(guest: NewGuest, served: Callable[..., tuple[Guest, hv.Batch]]) -> None:
    exits = one_by_one(guest(program(ACCESSES), size=RAM_SIZE), 0x91929394)
    g, batch = served(program(ACCESSES))
    batch.record(1000)
    for kind in ("pio", "mmio"):
        base = MMIO if kind == "mmio" else 0
        getattr(batch, kind)(base + 0x50, 4, read=0x91929394, write="ignore")
        getattr(batch, kind)(base + 0x58, 4, read=hv.Feed(b"\x94\x94\x93\x94\x93\x92\x91"), write=hv.Capture())
    assert g.run() == exits[-2]  # port 0xffff is Python's
    assert g.run() == hv.Hlt()
    records = list(iter_records(batch.take_records()))
    # What C did with each, and what the reads got.
    expected = []
    for access, exit in zip(ACCESSES, exits, strict=False):
        policy = (
            ("constant" if access.value is None else "ignore")
            if access.address < 0x58
            else ("feed" if access.value is None else "capture")
        )
        expected.append(as_record(exit, "stop" if access.address == 0xFFFF else policy, 0x91929394))
    expected.append(as_record(hv.Hlt(), "stop", None))
    assert [brief(record) for record in records] == expected
    assert len(exits) == len(records)


def test_records_of_exits_that_are_left_to_python(
    guest: NewGuest, served: Callable[..., tuple[Guest, hv.Batch]]
) -> None:
    exits = one_by_one(guest(program(ACCESSES), size=RAM_SIZE), 0x11)
    g, batch = served(program(ACCESSES))
    batch.record(1000)
    assert one_by_one(g, 0x11) == exits
    assert [brief(r) for r in iter_records(batch.take_records())] == [as_record(e, "stop", None) for e in exits]


def test_records_in_numpy(served: Callable[..., tuple[Guest, hv.Batch]]) -> None:
    g, batch = served(program(ACCESSES), unclaimed_pio="ignore", unclaimed_mmio="ignore")
    if need_cap(g.vm, "SYNC_REGS") & 1:
        g.vcpu._kvm_run.kvm_valid_regs = 1
    batch.record(1000, timestamps=True)
    before = time.monotonic_ns()
    assert g.run() == hv.Hlt()
    table = np.frombuffer(batch.take_records(), dtype=RECORD_DTYPE)
    assert before <= table["time_ns"][0]
    assert table["time_ns"][-1] <= time.monotonic_ns()
    assert (np.diff(table["time_ns"].astype(np.int64)) >= 0).all()
    assert list(table["size"]) == [a.size for a in ACCESSES] + [0]
    assert list(table["is_write"]) == [a.value is not None for a in ACCESSES] + [0]
    assert table["rip"][-1] == CODE + len(program(ACCESSES))  # past the hlt
    assert len(set(table["rip"])) == len(table)


def test_a_string_exit_is_recorded_with_its_first_bytes(served: Callable[..., tuple[Guest, hv.Batch]]) -> None:
    g, batch = served(string_io(INSB, 100))
    batch.pio(0x50, 1, read=hv.Feed(bytes(range(1, 101))))
    batch.record(200)
    assert g.run() == hv.Hlt()
    *strings, _ = iter_records(batch.take_records())
    at = 0
    for record in strings:
        first = bytes(range(1, 101))[at : at + record.count][:8]
        assert (record.data, record.size, record.policy) == (int.from_bytes(first, "little"), 1, "feed")
        at += record.count
    assert at == 100


def test_msr_exits_are_recorded(guest: NewGuest) -> None:
    need("gcc")
    with hv.Machine(ram="1M") as m:
        need_cap(m.vm, "X86_USER_SPACE_MSR")
        m.vm.enable_cap(lib.KVM_CAP_X86_USER_SPACE_MSR, lib.KVM_MSR_EXIT_REASON_UNKNOWN)
        m.load(0x7C00, assemble("msr", MSR=0x12345, WRITE=1, VALUE=0x99))
        m.vcpu.real_mode()
        m.batch.record(10)
        assert m.vcpu.kvm.run(10) == hv.WrMsr(0x12345, 0x99, 2)
        (record,) = iter_records(m.batch.take_records())
        assert brief(record) == (0x12345, 0x99, lib.KVM_EXIT_X86_WRMSR, 1, 8, True, "stop")


@pytest.mark.parametrize("capacity", [1, 7, 100])
def test_full_records_end_the_run_and_lose_nothing(
    served: Callable[..., tuple[Guest, hv.Batch]], capacity: int
) -> None:
    accesses = [Access("pio", n % 256, 1, n % 256) for n in range(300)]
    g, batch = served(program(accesses), unclaimed_pio="ignore")
    batch.record(capacity)
    records: list[ExitRecord] = []
    while True:
        exit = g.run()
        if exit == hv.Hlt():
            break
        assert exit == hv.Interrupted("records")
        assert batch.nr_exits == len(records) + capacity
        assert g.run() == hv.Interrupted("records")  # until they are taken
        records += iter_records(batch.take_records())
    records += iter_records(batch.take_records())
    assert [(r.address, r.data) for r in records if r.reason == lib.KVM_EXIT_IO] == [
        (n % 256, n % 256) for n in range(300)
    ]


def test_a_record_of_an_exit_of_pythons_fills_up_too(served: Callable[..., tuple[Guest, hv.Batch]]) -> None:
    g, batch = served(OUT_FOR_EVER)
    batch.record(2)
    assert [g.run(), g.run()] == [hv.IoOut(0x50, 1, 1, b"\0")] * 2
    assert g.run() == hv.Interrupted("records")
    assert len(batch.take_records()) == 2 * 48
    assert g.run() == hv.IoOut(0x50, 1, 1, b"\0")
    batch.record(0)
    assert batch.take_records() == b""
    assert [g.run() for _ in range(5)] == [hv.IoOut(0x50, 1, 1, b"\0")] * 5


# ---- changes ----


def test_what_changes_while_the_guest_runs_is_refused_and_changes_nothing(
    served: Callable[..., tuple[Guest, hv.Batch]],
) -> None:
    g, batch = served(OUT_FOR_EVER)
    out = hv.Capture()
    batch.pio(0x50, 1, write=out)
    thread = threading.Thread(target=g.vcpu.run, args=(60,))
    thread.start()
    try:
        while not batch.nr_served:
            time.sleep(1e-3)
        for change in (
            lambda: batch.pio(0x60, 1),
            lambda: batch.mmio(0x60, 1),
            lambda: batch.remove("pio", 0x50),
            lambda: batch.configure(unclaimed_pio="ignore"),
            lambda: batch.configure(max_exits=1),
            lambda: batch.record(10),
            lambda: setattr(g.vcpu, "batch", None),
            lambda: setattr(g.vcpu, "batch", hv.Batch()),
        ):
            with pytest.raises(hv.BusyError):
                change()
        assert out.read()
        assert thread.is_alive()
    finally:
        g.vcpu.kick()
        thread.join()
    assert g.vcpu.batch is batch
    # Nothing of what was refused has been kept for later.
    batch.pio(0x60, 1)
    g.load(program([Access("pio", 0x70, 1, 0)]))
    assert [g.run(), g.run()] == [hv.IoOut(0x70, 1, 1, b"\0"), hv.Hlt()]
    assert batch.take_records() == b""


def test_records_cannot_be_taken_while_the_guest_runs(served: Callable[..., tuple[Guest, hv.Batch]]) -> None:
    g, batch = served(OUT_FOR_EVER, unclaimed_pio="ignore")
    batch.record(1 << 20)
    thread = threading.Thread(target=g.vcpu.run, args=(60,))
    thread.start()
    try:
        while not batch.nr_served:
            time.sleep(1e-3)
        with pytest.raises(hv.BusyError):
            batch.take_records()
    finally:
        g.vcpu.kick()
        thread.join()
    assert len(batch.take_records()) == 48 * batch.nr_exits


def test_a_batch_serves_one_vcpu_after_the_other(guest: NewGuest) -> None:
    batch, out = hv.Batch(), hv.Capture()
    batch.pio(0x50, 1, write=out)
    code = program([Access("pio", 0x50, 1, 1)])
    one, other = guest(code), guest(code)
    one.vcpu.batch = batch
    with pytest.raises(hv.BusyError, match="it serves"):
        other.vcpu.batch = batch
    assert one.run() == hv.Hlt()
    one.vcpu.close()
    batch.pio(0x51, 1)
    other.vcpu.batch = batch
    assert other.run() == hv.Hlt()
    assert out.read() == b"\1\1"


def test_rules_published_while_the_vcpu_is_being_closed(guest: NewGuest) -> None:
    batch, out = hv.Batch(), hv.Capture()
    g = guest(OUT_FOR_EVER)
    g.vcpu.batch = batch
    lib.hv_vcpu_close(g.vcpu._c, 0)  # where Vcpu.close() may be in another thread
    batch.pio(0x50, 1, write=out)
    g.vcpu.close()
    other = guest(program([Access("pio", 0x50, 1, 1)]))
    other.vcpu.batch = batch
    assert other.run() == hv.Hlt()
    assert out.read() == b"\1"


# ---- arguments ----


@pytest.mark.parametrize(
    ("port", "size"), [(-1, 1), (0, 0), (0, -1), (0xFFFF, 2), (0x10000, 1), (1 << 70, 1), (0, 0x10001)]
)
def test_port_ranges_that_cannot_be(port: int, size: int) -> None:
    batch = hv.Batch()
    with pytest.raises(hv.ArgumentError) as caught:
        batch.pio(port, size)
    assert (caught.value.call, caught.value.field) == ("Batch.pio", "port")


def test_ranges_at_the_ends() -> None:
    batch = hv.Batch()
    batch.pio(0, 1)
    batch.pio(0xFFFF, 1)
    batch.mmio(0, 1)
    batch.mmio((1 << 64) - 1, 1)
    with pytest.raises(hv.ArgumentError):
        batch.mmio((1 << 64) - 1, 2)


@pytest.mark.parametrize(("port", "size"), [(0x50, 1), (0x4F, 2), (0x5F, 1), (0x40, 0x100), (0x52, 3)])
def test_overlapping_rules_are_refused(port: int, size: int) -> None:
    batch = hv.Batch()
    batch.pio(0x50, 0x10)
    with pytest.raises(hv.ArgumentError, match=r"\[0x50, 0x60\) has a rule"):
        batch.pio(port, size)
    batch.mmio(port, size)  # another space
    batch.pio(0x60, 1)
    batch.pio(0x4F, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda b: b.pio("a", 1),
        lambda b: b.pio(1, 1.0),
        lambda b: b.pio(True, 1),
        lambda b: b.mmio(None, 1),
        lambda b: b.pio(1, 1, read="none"),
        lambda b: b.pio(1, 1, read=None),
        lambda b: b.pio(1, 1, read=True),
        lambda b: b.pio(1, 1, read=[]),
        lambda b: b.pio(1, 1, read=hv.Capture()),
        lambda b: b.pio(1, 1, write=5),
        lambda b: b.pio(1, 1, write=[]),
        lambda b: b.pio(1, 1, write=hv.Feed()),
        lambda b: b.configure(max_exits="1"),
        lambda b: b.configure(max_exits=True),
        lambda b: b.record("1"),
        lambda b: b.record(None),
        lambda b: hv.Capture("8192"),
        lambda b: hv.Feed("text"),
        lambda b: hv.Feed(on_empty=None),
        lambda b: hv.Feed().write("text"),
        lambda b: hv.Feed().write(5),
    ],
)
def test_wrong_types(call: Callable[[hv.Batch], object]) -> None:
    batch = hv.Batch()
    with pytest.raises(hv.ArgumentTypeError):
        call(batch)
    batch.pio(1, 1)  # nothing was kept


@pytest.mark.parametrize(
    "call",
    [
        lambda b: hv.Batch(unclaimed_pio="drop"),
        lambda b: b.configure(unclaimed_mmio="constant"),
        lambda b: b.configure(unclaimed_mmio=5),
        lambda b: b.configure(unclaimed_mmio=[]),
        lambda b: b.configure(max_exits=-1),
        lambda b: b.configure(max_exits=1 << 64),
        lambda b: b.pio(1, 1, read=-1),
        lambda b: b.pio(1, 1, read=1 << 64),
        lambda b: b.remove("pio", 1),
        lambda b: b.remove("irq", 1),
        lambda b: b.record(-1),
        lambda b: b.record((1 << 32) + 1),
        lambda b: hv.Capture(0),
        lambda b: hv.Capture(4096),
        lambda b: hv.Capture(10_000),
        lambda b: hv.Capture(-8192),
        lambda b: hv.Feed(b"x" * 8193, capacity=8192),
        lambda b: hv.Feed(on_empty=1 << 64),
    ],
)
def test_wrong_values(call: Callable[[hv.Batch], object]) -> None:
    with pytest.raises(hv.ArgumentError):
        call(hv.Batch())


def test_only_a_batch_can_be_attached(guest: NewGuest) -> None:
    g = guest()
    with pytest.raises(hv.ArgumentTypeError, match=r"Vcpu\.batch: batch: expected a Batch or None"):
        g.vcpu.batch = "batch"
    g.vcpu.close()
    with pytest.raises(hv.ClosedError):
        g.vcpu.batch = hv.Batch()


# ---- random rules against a plain decision per access ----


class Rule(NamedTuple):
    """A rule as the reference knows it."""

    kind: str
    start: int
    size: int
    read: object  # "stop", "ignore", an int, or ("feed", bytes, on_empty)
    write: str  # "stop", "ignore", "capture"


def reference(
    rules: list[Rule], unclaimed: dict[str, str], accesses: list[Access], answer: int
) -> tuple[list[Exit], list[int], dict[int, bytes], list[tuple[object, ...]]]:
    """What Python sees, what the reads get, what is captured by each rule, and what is recorded."""
    seen: list[Exit] = []
    read: list[int] = []
    captured: dict[int, bytes] = dict.fromkeys(range(len(rules)), b"")
    feeds = {n: rule.read[1] for n, rule in enumerate(rules) if isinstance(rule.read, tuple)}
    records = []
    for access in accesses:
        cut = 1 << 8 * access.size
        covering = [
            n
            for n, rule in enumerate(rules)
            if rule.kind == access.kind
            and rule.start <= access.address
            and access.address + access.size <= rule.start + rule.size
        ]
        in_part = any(
            rule.kind == access.kind
            and rule.start < access.address + access.size
            and access.address < rule.start + rule.size
            for rule in rules
        )
        policy: object
        if in_part and not covering:
            policy = "stop"
        elif not covering:
            policy = unclaimed[access.kind]
        else:
            policy = rules[covering[0]].read if access.value is None else rules[covering[0]].write
        got: int | None = None
        if isinstance(policy, tuple):
            (n,) = covering
            if len(feeds[n]) >= access.size:
                got, feeds[n] = int.from_bytes(feeds[n][: access.size], "little"), feeds[n][access.size :]
                policy = "feed"
            else:
                policy = policy[2]
        if isinstance(policy, int):
            got, policy = policy % cut, "constant"
        elif policy == "ignore" and access.value is None:
            got = cut - 1
        elif policy == "capture":
            captured[covering[0]] += (access.value % cut).to_bytes(access.size, "little")
        records.append(as_record(access.exit(), policy, got))
        if policy == "stop":
            seen.append(access.exit())
            got = answer % cut
        if access.value is None:
            read.append(got)
    seen.append(hv.Hlt())
    records.append(as_record(hv.Hlt(), "stop", None))
    return seen, read, captured, records


kinds = st.sampled_from(["pio", "mmio"])
simple = st.sampled_from(["stop", "ignore", 0, 0x5A, 0x1122334455667788])
reads = st.one_of(simple, st.tuples(st.just("feed"), st.binary(max_size=12), simple))
rules = st.builds(
    Rule,
    kinds,
    st.integers(0, 40),
    st.integers(1, 12),
    reads,
    st.sampled_from(["stop", "ignore", "capture"]),
)


def disjoint(rules: list[Rule]) -> list[Rule]:
    kept: list[Rule] = []
    for rule in rules:
        if not any(
            rule.kind == other.kind and rule.start < other.start + other.size and other.start < rule.start + rule.size
            for other in kept
        ):
            kept.append(rule)
    return kept


accesses = st.lists(
    st.builds(
        Access, kinds, st.integers(0, 50), st.sampled_from([1, 2, 4]), st.one_of(st.none(), st.integers(0, 0xFFFFFFFF))
    ),
    max_size=25,
)


@pytest.fixture
def one_guest(guest: NewGuest) -> Guest:
    """One guest for all examples of a property."""
    return guest(size=RAM_SIZE)


@settings(max_examples=cases(150, 5000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rules=st.lists(rules, max_size=8).map(disjoint),
    pio=st.sampled_from(["stop", "ignore"]),
    mmio=st.sampled_from(["stop", "ignore"]),
    accesses=accesses,
    answer=st.integers(0, 0xFFFFFFFF),
)
def test_random_rules(
    one_guest: Guest, rules: list[Rule], pio: str, mmio: str, accesses: list[Access], answer: int
) -> None:
    g = one_guest
    batch = hv.Batch(unclaimed_pio=pio, unclaimed_mmio=mmio)
    captures = {}
    for n, rule in enumerate(rules):
        read = rule.read
        if isinstance(read, tuple):
            read = hv.Feed(read[1], capacity=MIN_RING, on_empty=read[2])
        write: object = rule.write
        if write == "capture":
            write = captures[n] = hv.Capture(MIN_RING)
        getattr(batch, rule.kind)(rule.start + (MMIO if rule.kind == "mmio" else 0), rule.size, read=read, write=write)
    batch.record(1000)
    g.vcpu.batch = batch
    g.load(program(accesses))
    seen, read, captured, records = reference(rules, {"pio": pio, "mmio": mmio}, accesses, answer)
    assert one_by_one(g, answer) == seen
    assert results(g, len(read)) == read
    assert {n: capture.read() for n, capture in captures.items()} == {n: captured[n] for n in captures}
    assert [brief(record) for record in iter_records(batch.take_records())] == records
    assert batch.nr_exits == len(records)
    assert batch.nr_served == sum(record[-1] != "stop" for record in records)
    assert sum(batch.counts.values()) == len(records)
