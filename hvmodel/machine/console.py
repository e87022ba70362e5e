"""What a bare machine shows of its guest's output: a transmit-only serial port and the debug ports.

    0x3F8-0x3FF  16550A, as far as a guest that only writes needs it: transmit, line status, DLAB
    0x402        QEMU's isa-debugcon for SeaBIOS; reads give 0xE9, or SeaBIOS stays silent
    0xE9         the Bochs debug port; reads give 0xE9

Bytes are captured in C (hvmodel.kvm.batch).  Accesses of 2 and 4 bytes are split into bytes at consecutive ports.
Sources: National Semiconductor PC16550D data sheet, table "Summary of registers"; qemu:hw/char/debugcon.c@v10.1.
"""

from __future__ import annotations

from .._ffi import lib
from ..kvm.batch import Batch, Capture
from ..kvm.exits import IoIn, IoOut

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from ..kvm.batch import Write

    # What is done with a port access that Python gets (on an open bus?): the answer, or None where it is not claimed.
    Claim: TypeAlias = Callable[[IoIn | IoOut, bool], bytes | None]

__all__ = ["DEBUG_PORTS", "SERIAL_PORT", "Console"]

SERIAL_PORT = 0x3F8
_LINE_CONTROL = SERIAL_PORT + 3
DEBUG_PORTS = (0x402, 0xE9)

_LSR_IDLE = 0x60  # THRE, TEMT: the transmitter is always empty
_IIR_NONE = 0x01  # no interrupt pending
_MSR_CONNECTED = 0xB0  # DCD, DSR, CTS
_LCR_DLAB = 0x80
_DEBUG_MAGIC = 0xE9


class Console:
    """Captures what the guest transmits on the serial port and the debug ports.

    Thread safety: `serial.read()` and `debug.read()` from any thread.
    """

    def __init__(self, batch: Batch, claim: Callable[[int, Claim], None]) -> None:
        self.serial = Capture()
        self.debug = Capture()
        self._batch = batch
        self._divisor = False  # DLAB: the first two ports are the baud rate's
        rules: list[tuple[int, int, Write]] = [(port, _DEBUG_MAGIC, self.debug) for port in DEBUG_PORTS]
        rules += [
            (SERIAL_PORT, 0, self.serial),
            (SERIAL_PORT + 1, 0, "ignore"),
            (SERIAL_PORT + 2, _IIR_NONE, "ignore"),
            (_LINE_CONTROL, 0x03, "stop"),
            (SERIAL_PORT + 4, 0, "ignore"),
            (SERIAL_PORT + 5, _LSR_IDLE, "ignore"),
            (SERIAL_PORT + 6, _MSR_CONNECTED, "ignore"),
            (SERIAL_PORT + 7, 0xFF, "ignore"),
        ]
        self._reads = {port: read for port, read, _ in rules}
        claimed: list[int] = []
        try:
            for port, read, write in rules:
                batch.pio(port, 1, read=read, write=write)
                claimed.append(port)
        except BaseException:  # somebody else has one of the ports
            for port in claimed:
                batch.remove("pio", port)
            raise
        for port in self._reads:
            claim(port, self._access)

    def _access(self, exit: IoIn | IoOut, open_bus: bool) -> bytes | None:
        # What C leaves: writes of the line control, and accesses of 2 and 4 bytes, which a PC splits into bytes at
        # consecutive ports.  The answer to a read (b"" to a write); None where a port of them is nobody's.
        if not open_bus and any(exit.port + at not in self._reads for at in range(exit.size)):
            return None
        if isinstance(exit, IoIn):
            return bytes(self._reads.get(exit.port + at, 0xFF) for at in range(exit.size)) * exit.count
        for at, value in enumerate(exit.data):
            self._write(exit.port + at % exit.size, value)
        return b""

    def _write(self, port: int, value: int) -> None:
        if port == _LINE_CONTROL:
            self._set_divisor(bool(value & _LCR_DLAB))
        elif port in DEBUG_PORTS:
            _append(self.debug, value)
        elif port == SERIAL_PORT and not self._divisor:
            _append(self.serial, value)

    def _set_divisor(self, divisor: bool) -> None:
        # Rare: a driver sets the baud rate.  While DLAB is set, the data port takes the divisor's low byte.
        if divisor == self._divisor:
            return
        self._divisor = divisor
        self._batch.remove("pio", SERIAL_PORT)
        self._batch.pio(SERIAL_PORT, 1, read=0, write="ignore" if divisor else self.serial)


def _append(capture: Capture, value: int) -> None:
    # As C does, whose vCPU is not running now; and make room again, which C relies on.
    lib.hv_ring_write(capture._ring, bytes((value,)), 1)
    capture._spill()
