"""A guest's run, as `hvmodel boot` shows it: its output while it runs, its exits, and how it ended.

The guest runs in slices.  C serves the console and records the exits meanwhile (hvmodel.kvm.batch); between two slices
what came is written out.  So neither output nor trace costs Python per exit, and every exit is recorded once, in order.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import time

from .._ffi import lib
from ..errors import GuestAccessError
from ..kvm.batch import iter_records
from ..value import Value
from .status import FAULT, HALTED, INTERRUPTED, SHUTDOWN, TIMEOUT, UNCLAIMED
from .terminal import STDERR, STDOUT, line, say, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, TracebackType
    from typing import Self

    from ..kvm.batch import ExitRecord
    from ..machine import Console, Machine, Stop

__all__ = [
    "DEBUG_EXIT_PORT",
    "MAX_BIOS",
    "REAL_MODE_LAST",
    "Image",
    "ImageError",
    "Outcome",
    "Output",
    "read_image",
    "report",
    "run",
]

DEBUG_EXIT_PORT = 0xF4
MAX_BIOS = 16 << 20
REAL_MODE_LAST = 0x10FFEF  # FFFF:FFFF, the last byte that CS:IP reaches

_SLICE = 0.02  # seconds between two looks at what the guest wrote
_RECORDS = 1 << 16  # exits between two looks: 3 MiB; when they are full the slice ends early

_STATUS_OF = {"halted": HALTED, "shutdown": SHUTDOWN, "timeout": TIMEOUT, "interrupted": INTERRUPTED}

# Exit reasons that x86 has, and their numbers from the ABI header.
_NAMES = (
    "UNKNOWN", "EXCEPTION", "IO", "HYPERCALL", "DEBUG", "HLT", "MMIO", "IRQ_WINDOW_OPEN", "SHUTDOWN",
    "FAIL_ENTRY", "INTR", "SET_TPR", "TPR_ACCESS", "NMI", "INTERNAL_ERROR", "SYSTEM_EVENT", "IOAPIC_EOI",
    "HYPERV", "X86_RDMSR", "X86_WRMSR", "DIRTY_RING_FULL", "AP_RESET_HOLD", "X86_BUS_LOCK", "XEN", "NOTIFY",
    "MEMORY_FAULT", "TDX",
)  # fmt: skip
_REASONS: dict[int, str] = {getattr(lib, f"KVM_EXIT_{name}"): name for name in _NAMES}
_SPACES = {"IO": "port", "MMIO": "gpa", "X86_RDMSR": "msr", "X86_WRMSR": "msr"}


def _reason(number: int) -> str:
    return _REASONS.get(number, f"KVM_EXIT_{number}")


# ---- the image ----


class ImageError(Exception):
    """The file cannot be booted, for the reason in the text."""


class Image(Value):
    """What is booted: its bytes, and the `name` by which messages call it."""

    name: str
    data: bytes


def read_image(path: str, limit: int, what: str) -> Image:
    """The bytes of file `path` ("-": stdin), up to `limit`; `what` the limit is, for the message.

    ImageError: the file is missing, unreadable, empty, or longer than the limit; it is not read beyond that.
    """
    name = "stdin" if path == "-" else path
    try:
        # A descriptor of our own: closing it leaves stdin alone.
        fd = os.dup(0) if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with open(fd, "rb", buffering=0) as file:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and path != "-" and status.st_size > limit:
                raise ImageError(f"{name} has {status.st_size} bytes, {what} {max(limit, 0)}")
            data = _read(file.fileno(), limit + 1)
    except OSError as error:
        raise ImageError(f"cannot read {name}: {error.strerror}") from None
    except ValueError:
        raise ImageError(f"cannot read {name!r}: no file has such a name") from None
    except MemoryError:
        raise ImageError(f"cannot read {name}: out of memory") from None
    if not data:
        raise ImageError(f"{name} is empty: an image has at least one byte")
    if len(data) > limit:
        raise ImageError(f"{name} has more than {max(limit, 0)} bytes, {what} that many")
    return Image(name, data)


def _read(fd: int, limit: int) -> bytes:
    parts: list[bytes] = []
    room = max(limit, 1)
    while room and (part := os.read(fd, min(room, 1 << 20))):
        parts.append(part)
        room -= len(part)
    return b"".join(parts)


# ---- what comes out ----


class Output:
    """Where the guest's output and the trace go: to the descriptors as they come, or (`collect`) into this object."""

    def __init__(self, *, trace: bool, collect: bool) -> None:
        self.trace, self.collect = trace, collect
        self.serial = bytearray()
        self.debug = bytearray()
        self.records: list[ExitRecord] = []
        self.start_ns = 0
        self.console: Console

    def prepare(self, machine: Machine) -> None:
        """Claim the console, and begin the record of exits where a trace is wanted."""
        self.console = machine.console  # claimed by this
        if self.trace:
            machine.batch.record(_RECORDS, timestamps=True)
        self.start_ns = time.monotonic_ns()

    def drain(self, machine: Machine) -> None:
        """Take what came since the last call."""
        serial, debug = self.console.serial.read(), self.console.debug.read()
        records = list(iter_records(bytes(machine.batch.take_records()))) if self.trace else []
        if self.collect:
            self.serial += serial
            self.debug += debug
            self.records += records
            return
        write(STDOUT, serial)
        if records:
            write(STDERR, "".join(f"{self.show(record)}\n" for record in records).encode())
        write(STDERR, debug)

    def show(self, record: ExitRecord) -> str:
        """The line of one exit: seconds since the start, rip, reason, where, what was carried, what was done."""
        seconds = (record.time_ns - self.start_ns) / 1e9
        reason = _reason(record.reason)
        words = [f"{seconds:13.6f}", f"rip={record.rip:#x}", f"{reason:<4}"]
        space = _SPACES.get(reason)
        if space is not None:
            words += ["out" if record.is_write else "in ", f"{space}={record.address:#x}", f"size={record.size}"]
            if record.count != 1:
                words.append(f"count={record.count}")
            words.append(f"data={_data(record) or '-'}")
        return " ".join([*words, record.policy])

    def to_json(self, record: ExitRecord) -> dict[str, object]:
        """The object of one exit in `--json --trace`."""
        reason = _reason(record.reason)
        has_address = reason in _SPACES
        return {
            "time_ns": record.time_ns - self.start_ns,
            "rip": record.rip,
            "reason": reason,
            "address": record.address if has_address else None,
            "is_write": record.is_write if has_address else None,
            "size": record.size if has_address else None,
            "count": record.count if has_address else None,
            "data": _data(record) if has_address else None,
            "policy": record.policy,
        }


def _data(record: ExitRecord) -> str | None:
    # The first 8 bytes in the order of their addresses, "+" where there were more; None for a read left to Python.
    if record.policy == "stop" and not record.is_write:
        return None
    size = record.size * record.count
    return record.data.to_bytes(8, "little")[:size].hex() + ("+" if size > 8 else "")


# ---- the run ----


class Outcome(Value):
    """How a run ended: the `reason` of Stop, or "unclaimed"; the exit `status`; what to tell about it, or None."""

    reason: str
    status: int
    debug_exit: int | None
    message: str | None
    cs: int
    rip: int
    seconds: float


class _Interrupt:
    # The first Ctrl-C ends the run in order; one more, with the output stuck, raises KeyboardInterrupt.

    def __init__(self) -> None:
        self.came = False

    def _take(self, number: int, _frame: FrameType | None) -> None:
        self.came = True
        signal.signal(number, signal.default_int_handler)

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:  # of a job in the background Ctrl-C is none of its business
            signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)


def run(machine: Machine, timeout: float | None, output: Output) -> Outcome:
    """Run the machine until something ends it, its output going to `output` meanwhile.

    `timeout` in seconds, None: no limit.  HvError where KVM_RUN fails; ReaderGoneError, OutputError.
    """
    output.prepare(machine)
    start = time.monotonic()
    with _Interrupt() as interrupt:
        while True:
            left = _SLICE if timeout is None else min(_SLICE, max(0.0, start + timeout - time.monotonic()))
            stop: Stop | GuestAccessError
            try:
                stop = machine.run(timeout=left)
            except GuestAccessError as error:
                stop = error
            finally:
                output.drain(machine)
            seconds = time.monotonic() - start
            if isinstance(stop, GuestAccessError) or stop.reason not in ("timeout", "interrupted"):
                return _outcome(machine, stop, seconds)
            if interrupt.came:
                return _ended(machine, "interrupted", seconds, "interrupted")
            if timeout is not None and seconds >= timeout:
                return _ended(machine, "timeout", seconds, f"the guest still ran after {timeout:g} s")


def _outcome(machine: Machine, stop: Stop | GuestAccessError, seconds: float) -> Outcome:
    if isinstance(stop, GuestAccessError):
        return Outcome("unclaimed", UNCLAIMED, None, str(stop), stop.cs, stop.rip, seconds)
    if stop.value is not None:
        where = machine.vcpu.location()
        status = (stop.value << 1 | 1) & 0xFF
        return Outcome("debug-exit", status, stop.value, None, where.cs, where.rip, seconds)
    message = {"halted": None, "shutdown": "the guest shut down (triple fault)"}.get(
        stop.reason, f"KVM could not go on: {stop.exit!r}"
    )
    return _ended(machine, stop.reason, seconds, message)


def _ended(machine: Machine, reason: str, seconds: float, message: str | None) -> Outcome:
    where = machine.vcpu.location()
    if message is not None:
        message += f", at CS:RIP {where.cs:04x}:{where.rip:04x}"
    return Outcome(reason, _STATUS_OF.get(reason, FAULT), None, message, where.cs, where.rip, seconds)


def report(machine: Machine, outcome: Outcome, output: Output) -> None:
    """Tell how it ended: a sentence on stderr unless it ended well, or the JSON object on stdout."""
    if not output.collect:
        if outcome.message is not None:
            say(outcome.message)
        return
    batch = machine.batch
    found: dict[str, object] = {
        "reason": outcome.reason,
        "status": outcome.status,
        "message": outcome.message,
        "debug_exit": outcome.debug_exit,
        "exits": {_reason(number): count for number, count in batch.counts.items()},
        "nr_exits": batch.nr_exits,
        # One character per byte: whatever the guest wrote comes back with .encode("latin-1").
        "serial": output.serial.decode("latin-1"),
        "debug": output.debug.decode("latin-1"),
        "seconds": outcome.seconds,
        "cs": outcome.cs,
        "rip": outcome.rip,
    }
    if output.trace:
        found["trace"] = [output.to_json(record) for record in output.records]
    line(json.dumps(found))
