"""The client of a gdb stub: packets against the protocol's text, a stub that misbehaves, and QEMU's."""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Iterator
from typing import Self

import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError
from hvmodel.witness.gdbstub import GdbError, GdbStub, frame, unescape
from hvmodel.witness.qemu import Qemu
from tests.need import need

# ---- packets: expected values by the manual's rules, sums by hand


@pytest.mark.parametrize(
    ("data", "packet"),
    [
        (b"", b"$#00"),
        (b"OK", b"$OK#9a"),  # 0x4f + 0x4b
        (b"?", b"$?#3f"),
        (b"#$}*", b"$}\x03}\x04}\x5d}\x0a#62"),  # 4 * 0x7d + 3 + 4 + 0x5d + 0xa = 0x262
        (bytes([0xFF, 0x02]), b"$\xff\x02#01"),
    ],
)
def test_frame(data: bytes, packet: bytes) -> None:
    assert frame(data) == packet
    assert unescape(packet[1:-3]) == data


def test_a_run_of_one_character() -> None:
    # The manual's own example: "0* " is four zeros, for a space is 32 and 32 - 29 = 3 more.
    assert unescape(b"0* ") == b"0000"
    assert unescape(b"ab*!c") == b"abbbbbc"
    assert unescape(b"}\x03*\x20") == b"####"


@pytest.mark.parametrize("data", [b"}", b"a*", b"*!", b"a*\x1c"])
def test_what_is_cut_off_is_no_data(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"ends within|run of nothing"):
        unescape(data)


# ---- a stub that answers what it is told


class Told:
    """The other end: for each packet that arrives, the next answer, sent as it is."""

    def __init__(self, *answers: bytes, features: bytes = b"PacketSize=80;qXfer:features:read+") -> None:
        self.ours, self.theirs = socket.socketpair()
        self.asked: list[bytes] = []
        self.answers = [frame(features), *answers]
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        received = b""
        for answer in self.answers:
            while b"#" not in received or len(received) < received.index(b"#") + 3:
                part = self.theirs.recv(4096)
                if not part:
                    return
                received = (received + part).lstrip(b"+")
            end = received.index(b"#") + 3
            self.asked.append(received[1 : end - 3])
            received = received[end:].lstrip(b"+")
            self.theirs.sendall(b"+" + answer)

    def __enter__(self) -> Self:
        self.stub = GdbStub(self.ours, timeout=5.0)
        return self

    def __exit__(self, *_: object) -> None:
        self.stub.close()
        self.thread.join(10)
        self.theirs.close()


def test_memory_is_read_in_packets_that_fit() -> None:
    # 0x80 bytes of a packet: 4 for $, # and the sum, two digits a byte.
    size = (0x80 - 4) // 2
    first, rest = bytes(range(size)), b"\xaa\xbb"
    with Told(frame(first.hex().encode()), frame(rest.hex().encode())) as told:
        assert told.stub.read(0x1000, size + 2) == first + rest
    assert told.asked[1:] == [b"m1000,%x" % size, b"m%x,2" % (0x1000 + size)]


def test_memory_is_written_in_packets_that_fit() -> None:
    data = bytes(range(100))
    with Told(*[frame(b"OK")] * 3) as told:
        told.stub.write(0xFFFF_FFFF_FFFF_FFC0, data)
    parts = [packet.partition(b":") for packet in told.asked[1:]]
    assert b"".join(bytes.fromhex(digits.decode()) for _, _, digits in parts) == data
    assert all(len(packet) + 4 <= 0x80 for packet in told.asked)
    assert parts[1][0] == b"M%x,2c" % (2**64 - 0x40 + 0x2C)
    assert parts[2][0] == b"M%x,c" % (0x58 - 0x40)  # past the end of the address space: from 0 on


XML = b"""<target><architecture>i386</architecture><xi:include href="more.xml"/></target>"""
MORE = b"""<feature name="x"><reg name="eax" bitsize="32"/><!--reg name="no"
bitsize="8"/--><reg name="cr0" bitsize="64" regnum="27"/>
<reg bitsize="16" name="cs" type="int32"/></feature>"""


def test_registers_by_the_names_of_the_description() -> None:
    answers = [b"m" + XML[:20], b"l" + XML[20:], b"l" + MORE]
    with Told(*map(frame, [*answers, b"1100008000000000", b"OK", b"OK"])) as told:
        assert told.stub.registers == {"eax": 32, "cr0": 64, "cs": 16}
        assert told.stub.read_register("cr0") == 0x80000011
        told.stub.write_register("cs", 0x1234)
        told.stub.write_register("eax", 1)
        with pytest.raises(ArgumentError, match=r"name='rax'; accepted: eax, cr0, cs"):
            told.stub.read_register("rax")
        with pytest.raises(ArgumentError, match=r"cs=0x10000"):
            told.stub.write_register("cs", 1 << 16)
        with pytest.raises(ArgumentTypeError):
            told.stub.write_register("cs", "0")  # type: ignore[arg-type]
    assert told.asked[2] == b"qXfer:features:read:target.xml:14,70"
    assert told.asked[4:] == [b"p1b", b"P1c=3412", b"P0=01000000"]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (frame(b""), "does not know this packet"),
        (frame(b"E22"), "error 0x22"),
        (frame(b"0x1"), "no hexadecimal digits"),
        (frame(b"00"), "answered 1 bytes of 4"),
        (b"$00000000#00", "checksum"),
        (b"$00000000#zz", "no packet of the protocol"),
        (b"$}#7d", "no packet of the protocol"),
    ],
)
def test_wrong_answers_are_errors(answer: bytes, why: str) -> None:
    with Told(answer) as told, pytest.raises(GdbError, match=why) as caught:
        told.stub.read(8, 4)
    assert (caught.value.call, caught.value.packet) == ("GdbStub.read", "m8,4")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_stub_that_went_away() -> None:
    told = Told()
    with told:
        told.thread.join(10)
        told.theirs.close()
        with pytest.raises(GdbError, match="the stub is gone"):
            told.stub.read(8, 4)


def test_a_stub_that_is_silent() -> None:
    with Told() as told:
        told.stub._timeout = 0.02
        with pytest.raises(GdbError, match=r"no answer in 0\.02 s"):
            told.stub.reason()


def test_a_run_that_does_not_end_is_interrupted() -> None:
    told = Told()
    with told:
        told.thread.join(10)

        def stops() -> None:
            received = b""
            while b"\x03" not in received:
                received += told.theirs.recv(100)
            told.asked.append(received)
            told.theirs.sendall(b"+" + frame(b"T02thread:01;") + frame(b"S05"))

        thread = threading.Thread(target=stops)
        thread.start()
        with pytest.raises(GdbError, match=r"c: it did not stop in 0.02 s"):
            told.stub.cont(timeout=0.02)
        thread.join(10)
        assert told.stub.reason() == 5  # the answer to the interrupt was taken, and is no answer to this
    assert told.asked[-1].endswith(b"\x03")


@pytest.mark.parametrize("features", [b"PacketSize=zz", b"PacketSize=10", b"PacketSize="])
def test_a_packet_size_that_is_none(features: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(b"+" + frame(features))
        with pytest.raises(GdbError, match="PacketSize="):
            GdbStub(ours)
        assert ours.fileno() < 0  # closed, for nobody else would


def test_a_stub_without_description() -> None:
    with Told(features=b"PacketSize=80") as told, pytest.raises(GdbError, match="no target description"):
        told.stub.read_register("eax")


def test_wrong_arguments() -> None:
    with pytest.raises(ArgumentTypeError, match="connected socket"):
        GdbStub(3)  # type: ignore[arg-type]
    with Told() as told:
        with pytest.raises(ArgumentError, match="address=-1"):
            told.stub.read(-1, 4)
        with pytest.raises(ArgumentTypeError, match="data"):
            told.stub.write(0, "text")  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="kind='watch'; accepted: software or hardware"):
            told.stub.set_breakpoint(0, "watch")


def test_a_closed_one() -> None:
    with Told() as told:
        assert repr(told.stub) == "<GdbStub>"
        told.stub.close()
        told.stub.close()
        assert (told.stub.closed, repr(told.stub)) == (True, "<GdbStub closed>")
        for call in (lambda: told.stub.read(0, 1), lambda: told.stub.cont(), lambda: told.stub.reason()):
            with pytest.raises(ClosedError):
                call()


# ---- QEMU's stub


@pytest.fixture
def qemu_stub() -> Iterator[GdbStub]:
    need("qemu")
    ours, theirs = socket.socketpair()
    options = ("-m", "16M", "-chardev", f"socket,id=gdb,fd={theirs.fileno()}", "-gdb", "chardev:gdb")
    with theirs, Qemu(*options, fds=(theirs.fileno(),)):
        theirs.close()
        with GdbStub(ours) as stub:
            yield stub


def test_the_processor_of_qemu_after_its_reset(qemu_stub: GdbStub) -> None:
    # SDM volume 3, table 10-1: CS F000, EIP FFF0, EFLAGS 2, CR0 60000010, CR2 to CR4 0.
    read = qemu_stub.read_register
    assert [read(name) for name in ("cs", "rip", "eflags", "cr0", "cr2", "cr3", "cr4", "efer")] == [
        0xF000, 0xFFF0, 2, 0x60000010, 0, 0, 0, 0
    ]  # fmt: skip
    assert list(qemu_stub.registers)[:2] == ["rax", "rbx"]
    assert qemu_stub.reason() == 5


def test_code_in_qemu(qemu_stub: GdbStub) -> None:
    # mov $0x1234, %ax; inc %ax; mov %ax, 0x600; nop; jmp .
    code = bytes.fromhex("b83412 40 a30006 90 ebfe")
    qemu_stub.write(0x500, code)
    assert qemu_stub.read(0x500, len(code)) == code
    qemu_stub.write_register("cs", 0)
    assert qemu_stub.step(0x500) == 5
    assert (qemu_stub.read_register("rax"), qemu_stub.read_register("rip")) == (0x1234, 0x503)
    for kind in ("software", "hardware"):
        qemu_stub.write(0x600, bytes(2))
        qemu_stub.set_breakpoint(0x507, kind)
        assert qemu_stub.cont(0x500) == 5
        assert (qemu_stub.read_register("rip"), qemu_stub.read(0x600, 2)) == (0x507, b"\x35\x12")
        qemu_stub.clear_breakpoint(0x507, kind)
    with pytest.raises(GdbError, match="did not stop"):
        qemu_stub.cont(timeout=0.05)
    assert qemu_stub.read_register("rip") == 0x508  # in the loop, no breakpoint before it


def test_physical_memory_of_qemu(qemu_stub: GdbStub) -> None:
    qemu_stub.physical = True
    assert qemu_stub.physical
    qemu_stub.write(0x1000, b"physical")
    assert qemu_stub.read(0x1000, 8) == b"physical"
    qemu_stub.physical = False
    assert qemu_stub.read(0x1000, 8) == b"physical"  # without paging it is the same
