"""GDB's remote protocol, the client's side: `GdbStub` asks a stopped processor for registers and memory, and runs it.

    $packet-data#xx     xx: sum of the data's bytes, two hexadecimal digits; answered by + (taken) or - (again)
    }c                  in the data: the byte c ^ 0x20, for one of # $ } *
    0x03                outside a packet: stop

Of the protocol it speaks what QEMU's stub understands: p P m M, Z0 z0 Z1 z1, c s ?, qXfer:features, and QEMU's own
Qqemu.PhyMemMode.  Registers go by the names of the target description (eax or rax, rip, cs, cr0, efer), which is read
from the stub.

Sources: GDB manual, appendix "Remote Serial Protocol"; QEMU gdbstub/, docs/system/gdb.rst@v7.2.
"""

from __future__ import annotations

import re
import socket
import time
import warnings
import weakref

from ..arch.number import ALL, number
from ..errors import ArgumentError, ArgumentTypeError, ClosedError, HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from _typeshed import ReadableBuffer

__all__ = ["GdbError", "GdbStub", "frame", "unescape"]

_ESCAPED = re.compile(rb"[#$}*]")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_DEFAULT_SIZE = 400  # of a packet, where the stub does not say
_SMALLEST_SIZE = 64  # with which anything can be said
_INTERRUPT = b"\x03"
_KINDS = {"software": 0, "hardware": 1}


class GdbError(HvError):
    """The stub refused a packet, answered what no stub may, or answers no more: `call`, `packet`, `text`.

    >>> raise GdbError("GdbStub.read", "m0,8", "error 0x0e")
    Traceback (most recent call last):
    hvmodel.witness.gdbstub.GdbError: GdbStub.read: m0,8: error 0x0e
    """

    def __init__(self, call: str, packet: str, text: str) -> None:
        self.call, self.packet, self.text = call, packet, text
        super().__init__(f"{call}: {packet}: {text}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.call, self.packet, self.text)


def _lost(connection: socket.socket) -> None:
    connection.close()
    warnings.warn("unclosed GdbStub", ResourceWarning, stacklevel=2)


def frame(data: bytes) -> bytes:
    """The packet with this data: escaped, with its checksum.

    >>> frame(b"m0,8")
    b'$m0,8#01'
    >>> frame(b"#")
    b'$}\\x03#80'
    """
    data = _ESCAPED.sub(lambda match: bytes([0x7D, match[0][0] ^ 0x20]), data)
    return b"$%b#%02x" % (data, sum(data) & 0xFF)


def unescape(data: bytes) -> bytes:
    """The data of a packet without escapes and run lengths: `c*n` is c, and c again ord(n) - 29 times.

    ValueError for an escape or a run that is cut off, and for a run of nothing.

    >>> unescape(b"0*\\"12}]"), unescape(frame(b"}*#$")[1:-3])
    (b'00000012}', b'}*#$')
    """
    if b"}" not in data and b"*" not in data:
        return data
    out = bytearray()
    at = 0
    while at < len(data):
        byte = data[at]
        if byte in b"}*":
            if at + 1 == len(data):
                raise ValueError(f"{data!r} ends within an escape or a run")
            after = data[at + 1]
            if byte == 0x7D:
                out.append(after ^ 0x20)
            elif not out or after < 29:
                raise ValueError(f"{data!r}: a run of nothing, or shorter than nothing")
            else:
                out += out[-1:] * (after - 29)
            at += 2
        else:
            out.append(byte)
            at += 1
    return bytes(out)


class GdbStub:
    """A connection to a stub, over a connected stream socket, which it owns.

    `timeout` in seconds bounds every answer.  The processor is stopped when the connection begins, between a run's end
    and the next, and runs within `cont` and `step` only.

    Raises GdbError with the packet where the stub refuses, is gone or late; ClosedError.
    Threads: any, one at a time.
    """

    def __init__(self, connection: socket.socket, *, timeout: float = 60.0) -> None:
        if not isinstance(connection, socket.socket):
            raise ArgumentTypeError("GdbStub", "connection", connection, "a connected socket.socket")
        self._socket = connection
        self._finalizer = weakref.finalize(self, _lost, connection)
        self._timeout = timeout
        self._received = b""
        self._size = _DEFAULT_SIZE
        self._registers: dict[str, tuple[int, int]] | None = None
        self._physical = False
        try:
            features = self._ask("GdbStub", b"qSupported:xmlRegisters=i386").split(b";")
            self._has_description = b"qXfer:features:read+" in features
            for feature in features:
                name, _, value = feature.partition(b"=")
                if name == b"PacketSize":
                    self._size = self._packet_size(value)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _packet_size(value: bytes) -> int:
        try:
            size = int(value, 16)
        except ValueError:
            size = 0
        if size < _SMALLEST_SIZE:
            text = f"PacketSize={value.decode('latin-1')}, no number from {_SMALLEST_SIZE:#x} on"
            raise GdbError("GdbStub", "qSupported", text)
        return size

    # ---- packets ----

    def _next(self, call: str, packet: bytes, end: float) -> bytes:
        # The data of the next packet, acknowledged; what stands between packets are the stub's own +.
        while True:
            start = self._received.find(b"$")
            hash_at = self._received.find(b"#", start)
            if start >= 0 and 0 <= hash_at <= len(self._received) - 3:
                break
            try:
                self._socket.settimeout(max(end - time.monotonic(), 1e-3))
                part = self._socket.recv(1 << 16)
            except TimeoutError:
                raise GdbError(call, packet.decode("latin-1"), f"no answer in {self._timeout} s") from None
            except OSError as error:
                raise GdbError(call, packet.decode("latin-1"), f"the stub is gone: {error.strerror}") from None
            if not part:
                raise GdbError(call, packet.decode("latin-1"), "the stub is gone: it closed the connection")
            self._received += part
        data, check = self._received[start + 1 : hash_at], self._received[hash_at + 1 : hash_at + 3]
        self._received = self._received[hash_at + 3 :]
        try:
            right = int(check, 16) == sum(data) & 0xFF
            plain = unescape(data)
        except ValueError as error:
            raise GdbError(call, packet.decode("latin-1"), f"no packet of the protocol: {error}") from None
        if not right:
            raise GdbError(call, packet.decode("latin-1"), f"its answer {data!r} has the checksum {check!r}")
        self._write(call, packet, b"+")
        return plain

    def _write(self, call: str, packet: bytes, data: bytes) -> None:
        try:
            self._socket.settimeout(self._timeout)
            self._socket.sendall(data)
        except OSError as error:
            why = error.strerror or f"it took nothing for {self._timeout} s"
            raise GdbError(call, packet.decode("latin-1"), f"the stub is gone: {why}") from None

    def _ask(self, call: str, packet: bytes) -> bytes:
        if self.closed:
            raise ClosedError(call, "GdbStub")
        self._write(call, packet, frame(packet))
        return self._next(call, packet, time.monotonic() + self._timeout)

    def _checked(self, call: str, packet: bytes) -> bytes:
        # An answer that is neither "what is that?" (empty) nor an error (E and two digits).
        answer = self._ask(call, packet)
        if not answer:
            raise GdbError(call, packet.decode("latin-1"), "the stub does not know this packet")
        if len(answer) == 3 and answer[:1] == b"E":
            raise GdbError(call, packet.decode("latin-1"), f"error 0x{answer[1:].decode('latin-1')}")
        return answer

    def _bytes(self, call: str, packet: bytes) -> bytes:
        answer = self._checked(call, packet)
        try:
            return bytes.fromhex(answer.decode("ascii"))
        except ValueError:
            raise GdbError(call, packet.decode("latin-1"), f"answered {answer!r}, no hexadecimal digits") from None

    def _do(self, call: str, packet: bytes) -> None:
        answer = self._checked(call, packet)
        if answer != b"OK":
            raise GdbError(call, packet.decode("latin-1"), f"answered {answer!r} instead of OK")

    # ---- registers ----

    @property
    def registers(self) -> dict[str, int]:
        """Every register by name, with its width in bits, in the order of the stub's numbers; read once."""
        return {name: bits for name, (_, bits) in self._described("GdbStub.registers").items()}

    def _described(self, call: str) -> dict[str, tuple[int, int]]:
        # name -> (number, bits).  Numbers go up from 0 unless a register names its own.
        if self._registers is None:
            if not self._has_description:
                raise GdbError(call, "qSupported", "the stub has no target description, so registers have no names")
            found: dict[str, tuple[int, int]] = {}
            at = 0
            for element in re.findall(r"<reg\s[^>]*>", self._xml(call, "target.xml")):
                fields: dict[str, str] = dict(re.findall(r'([\w-]+)\s*=\s*"([^"]*)"', element))
                at = int(fields.get("regnum", at))
                found[fields["name"]] = at, int(fields["bitsize"])
                at += 1
            self._registers = found
        return self._registers

    def _xml(self, call: str, annex: str, depth: int = 0) -> str:
        # A description with those that it includes put in.
        parts, at = [], 0
        while True:
            packet = f"qXfer:features:read:{annex}:{at:x},{self._size - 16:x}".encode()
            answer = self._checked(call, packet)
            parts.append(answer[1:])
            at += len(answer) - 1
            if answer[:1] == b"l":
                break
            if answer[:1] != b"m" or len(answer) == 1:
                raise GdbError(call, packet.decode(), f"answered {answer[:20]!r} instead of a part of the description")
        text = _COMMENT.sub("", b"".join(parts).decode(errors="replace"))  # QEMU's have registers in comments
        if depth > 4:
            return ""
        return re.sub(r'<xi:include\s+href="([^"]+)"\s*/>', lambda match: self._xml(call, match[1], depth + 1), text)

    def _number(self, call: str, name: str) -> tuple[int, int]:
        registers = self._described(call)
        if name not in registers:
            raise ArgumentError(call, "name", name, ", ".join(registers))
        return registers[name]

    def read_register(self, name: str) -> int:
        """The value of a register.  ArgumentError: the stub has none of this name.

        QEMU shows system registers with 32 bits unless the processor is in 64-bit code.
        """
        at, _ = self._number("GdbStub.read_register", name)
        return int.from_bytes(self._bytes("GdbStub.read_register", b"p%x" % at), "little")

    def write_register(self, name: str, value: int) -> None:
        """Set a register.  ArgumentError: the stub has none of this name, or it has fewer bits."""
        call = "GdbStub.write_register"
        at, bits = self._number(call, name)
        value = number(call, name, value, (1 << bits) - 1)
        self._do(call, b"P%x=%b" % (at, value.to_bytes((bits + 7) // 8, "little").hex().encode()))

    # ---- memory ----

    @property
    def physical(self) -> bool:
        """Whether addresses of memory are physical ones; set, it asks QEMU's stub to take them as such (or not).

        GdbError where the stub knows no such mode.
        """
        return self._physical

    @physical.setter
    def physical(self, on: bool) -> None:
        self._do("GdbStub.physical", b"Qqemu.PhyMemMode:%d" % bool(on))
        self._physical = bool(on)

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes from `address`, a linear address of the processor as it is, or see `physical`.

        GdbError: the stub refuses (nothing is mapped there).
        """
        call = "GdbStub.read"
        address, size = number(call, "address", address), number(call, "size", size, 1 << 32)
        chunk = (self._size - 4) // 2
        out = b""
        for at in range(0, size, chunk):
            part = min(chunk, size - at)
            packet = b"m%x,%x" % (address + at & ALL, part)
            got = self._bytes(call, packet)
            if len(got) != part:
                raise GdbError(call, packet.decode(), f"answered {len(got)} bytes of {part}")
            out += got
        return out

    def write(self, address: int, data: ReadableBuffer) -> None:
        """Put bytes at `address`; addresses and errors as for `read`."""
        call = "GdbStub.write"
        address = number(call, "address", address)
        try:
            view = memoryview(data).cast("B")
        except TypeError:
            raise ArgumentTypeError(call, "data", data, "bytes, or another buffer") from None
        chunk = (self._size - 40) // 2
        for at in range(0, len(view), chunk):
            part = view[at : at + chunk]
            self._do(call, b"M%x,%x:%b" % (address + at & ALL, len(part), part.hex().encode()))

    # ---- running ----

    def _kind(self, call: str, kind: str) -> int:
        if kind not in _KINDS:
            raise ArgumentError(call, "kind", kind, " or ".join(_KINDS))
        return _KINDS[kind]

    def set_breakpoint(self, address: int, kind: str = "software") -> None:
        """Stop before the instruction at this linear address; kind "software" or "hardware"."""
        call = "GdbStub.set_breakpoint"
        self._do(call, b"Z%d,%x,1" % (self._kind(call, kind), number(call, "address", address)))

    def clear_breakpoint(self, address: int, kind: str = "software") -> None:
        """Undo `set_breakpoint`."""
        call = "GdbStub.clear_breakpoint"
        self._do(call, b"z%d,%x,1" % (self._kind(call, kind), number(call, "address", address)))

    def cont(self, address: int | None = None, timeout: float | None = None) -> int:
        """Run on from `address` (by default where it is) until it stops: the signal's number, 5 for a breakpoint.

        `timeout` in seconds, by default that of every answer; when it is over the processor is stopped and GdbError
        raised.
        """
        return self._run("GdbStub.cont", b"c", address, timeout)

    def step(self, address: int | None = None) -> int:
        """Execute one instruction, at `address` (by default where it is): the signal's number, 5."""
        return self._run("GdbStub.step", b"s", address, None)

    def _run(self, call: str, letter: bytes, address: int | None, timeout: float | None) -> int:
        if self.closed:
            raise ClosedError(call, "GdbStub")
        packet = letter if address is None else b"%b%x" % (letter, number(call, "address", address))
        self._write(call, packet, frame(packet))
        limit = self._timeout if timeout is None else timeout
        try:
            answer = self._next(call, packet, time.monotonic() + limit)
        except GdbError as error:
            if not error.text.startswith("no answer"):
                raise
            self._write(call, packet, _INTERRUPT)
            self._next(call, packet, time.monotonic() + self._timeout)
            raise GdbError(call, packet.decode(), f"it did not stop in {limit} s") from None
        return self._stopped(call, packet, answer)

    def _stopped(self, call: str, packet: bytes, answer: bytes) -> int:
        #   T05thread:01;   S05   W00 (the processor is gone)
        if answer[:1] in (b"T", b"S"):
            return int(answer[1:3], 16)
        raise GdbError(call, packet.decode(), f"answered {answer!r} instead of why it stopped")

    def reason(self) -> int:
        """Why the processor stands still: the signal's number."""
        return self._stopped("GdbStub.reason", b"?", self._checked("GdbStub.reason", b"?"))

    # ---- the end ----

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Close the connection, after which QEMU's processor runs on, if nobody ends QEMU.  Any number of calls."""
        if self._finalizer.detach():
            self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return "<GdbStub closed>" if self.closed else "<GdbStub>"
