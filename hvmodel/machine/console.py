"""What a bare machine shows of its guest's output: a transmit-only serial port and the debug ports.

    0x3F8-0x3FF  16550A, as far as a guest that only writes needs it: transmit, line status, DLAB
    0x402        QEMU's isa-debugcon for SeaBIOS; reads give 0xE9, or SeaBIOS stays silent
    0xE9         the Bochs debug port; reads give 0xE9

Bytes are captured in C (hvmodel.kvm.batch).
Sources: National Semiconductor PC16550D data sheet, table "Summary of registers"; qemu:hw/char/debugcon.c@v10.1.
"""

from __future__ import annotations

from ..kvm.batch import Batch, Capture

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..kvm.batch import Write
    from ..kvm.exits import IoOut

__all__ = ["DEBUG_PORTS", "SERIAL_PORT", "Console"]

SERIAL_PORT = 0x3F8
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

    def __init__(self, batch: Batch, claim: Callable[[int, Callable[[IoOut], None]], None]) -> None:
        self.serial = Capture()
        self.debug = Capture()
        self._batch = batch
        self._divisor = False  # DLAB: the first two ports are the baud rate's
        rules: list[tuple[int, int, Write]] = [(port, _DEBUG_MAGIC, self.debug) for port in DEBUG_PORTS]
        rules += [
            (SERIAL_PORT, 0, self.serial),
            (SERIAL_PORT + 1, 0, "ignore"),
            (SERIAL_PORT + 2, _IIR_NONE, "ignore"),
            (SERIAL_PORT + 3, 0x03, "stop"),
            (SERIAL_PORT + 4, 0, "ignore"),
            (SERIAL_PORT + 5, _LSR_IDLE, "ignore"),
            (SERIAL_PORT + 6, _MSR_CONNECTED, "ignore"),
            (SERIAL_PORT + 7, 0xFF, "ignore"),
        ]
        claimed: list[int] = []
        try:
            for port, read, write in rules:
                batch.pio(port, 1, read=read, write=write)
                claimed.append(port)
        except BaseException:  # somebody else has one of the ports
            for port in claimed:
                batch.remove("pio", port)
            raise
        claim(SERIAL_PORT + 3, self._line_control)

    def _line_control(self, exit: IoOut) -> None:
        # Rare: a driver sets the baud rate.  While DLAB is set, the data port takes the divisor's low byte.
        divisor = bool(exit.value & _LCR_DLAB)
        if divisor == self._divisor:
            return
        self._divisor = divisor
        self._batch.remove("pio", SERIAL_PORT)
        self._batch.pio(SERIAL_PORT, 1, read=0, write="ignore" if divisor else self.serial)
