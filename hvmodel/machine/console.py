"""What a bare machine shows of its guest's output: a transmit-only serial port and the debug ports.

    0x3F8-0x3FF  16550A, as far as a guest that only writes needs it: transmit, line status, DLAB
    0x402        QEMU's isa-debugcon for SeaBIOS; reads give 0xE9, or SeaBIOS stays silent
    0xE9         the Bochs debug port; reads give 0xE9

The ports are io regions, "serial" and "debugcon"; rules serve single bytes in C (hvmodel.kvm.batch), so that the
regions' callbacks see the rest: writes of the line control, and accesses of 2 and 4 bytes, split into bytes.
Sources: National Semiconductor PC16550D data sheet, table "Summary of registers"; qemu:hw/char/debugcon.c@v10.1.
"""

from __future__ import annotations

from .._ffi import lib
from ..kvm.batch import Batch, Capture
from ..ram.region import MemoryRegion, MemoryRegionOps
from ..ram.topology import transaction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..kvm.batch import Write

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

    def __init__(self, batch: Batch, ports: MemoryRegion) -> None:
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
            with transaction():
                ports.add_subregion(SERIAL_PORT, self._region("serial", SERIAL_PORT, 8))
                for port in DEBUG_PORTS:
                    ports.add_subregion(port, self._region("debugcon", port, 1))
        except BaseException:  # somebody else has one of the ports
            for port in claimed:
                batch.remove("pio", port)
            raise

    def _region(self, name: str, port: int, size: int) -> MemoryRegion:
        # What C leaves of the accesses to these ports.
        ops = MemoryRegionOps(
            read=lambda addr, _: self._reads[port + addr],
            write=lambda addr, value, _: self._write(port + addr, value),
            impl_max=1,
        )
        return MemoryRegion.io(name, size, ops)

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
