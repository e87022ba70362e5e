"""A second implementation, to be asked: `Qemu` owns a QEMU process that is stopped before its first instruction.

    qemu-system-x86_64 -S -accel tcg -nodefaults -vga none -display none  <options>   and a monitor (QMP)
                                                                          over one end of a socket pair

Nothing is put on disk and no port is opened.  The guest never runs: its memory layout is built before the first
instruction, and the registers of its devices are written through the monitor's `o` and read through `i`.

The process ends with `close`, with the object, with the interpreter, and, where util-linux's setpriv is installed, with
the thread that started it.

Sources: QEMU docs/interop/qmp-spec.txt@v7.2, hmp-commands.hx@v7.2.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import weakref

from ..errors import ArgumentError, ArgumentTypeError, ClosedError, HostError, HvError
from .result import Lacking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import IO, Any, Self

__all__ = ["BINARY", "Qemu", "QemuError", "allocations"]

BINARY = "qemu-system-x86_64"

_STOPPED = ("-S", "-nodefaults", "-vga", "none", "-display", "none", "-no-user-config")
_WIDTHS = {1: "b", 2: "h", 4: "w"}  # of the monitor's `o` and `i`

_CONFIG_ADDRESS, _CONFIG_DATA = 0xCF8, 0xCFC  # PCI configuration mechanism 1
_CONFIG_ENABLE = 1 << 31


class QemuError(HvError):
    """QEMU refused its options, a command of its monitor, or stopped answering: `call`, `text` (its own words).

    >>> raise QemuError("info mtree", "it answers no more")
    Traceback (most recent call last):
    hvmodel.witness.qemu.QemuError: info mtree: it answers no more
    """

    def __init__(self, call: str, text: str) -> None:
        self.call, self.text = call, text
        super().__init__(f"{call}: {text}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.call, self.text)


def _reap(process: subprocess.Popen[bytes], monitor: socket.socket, errors: IO[bytes], pid: int) -> None:
    # Also what happens at the interpreter's exit.  A child of os.fork owns copies of the descriptors, not the process.
    monitor.close()
    errors.close()
    if os.getpid() == pid:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a session of its own: the prefix, and what it started
        process.wait()


def _lost(process: subprocess.Popen[bytes], monitor: socket.socket, errors: IO[bytes], pid: int) -> None:
    import warnings

    _reap(process, monitor, errors, pid)
    if os.getpid() == pid:
        warnings.warn(f"unclosed Qemu(pid={process.pid})", ResourceWarning, stacklevel=2)


def _start(words: list[str], fds: Sequence[int]) -> tuple[subprocess.Popen[bytes], socket.socket, IO[bytes]]:
    # The process, our end of its monitor, and what it says.
    call = "socketpair"
    with contextlib.ExitStack() as undo:
        try:
            ours, theirs = map(undo.enter_context, socket.socketpair())
            call = "memfd_create"
            errors = undo.enter_context(os.fdopen(os.memfd_create("qemu", os.MFD_CLOEXEC), "r+b", 0))
            call = "execve"
            fd = theirs.fileno()
            monitor = ["-chardev", f"socket,id=hvmodel,fd={fd}", "-mon", "chardev=hvmodel,mode=control"]
            process = subprocess.Popen(
                words + monitor,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=(fd, *fds),
                start_new_session=True,
            )
        except OSError as error:
            raise HostError(error.errno or errno.EIO, call, "command", words[0]) from None
        undo.pop_all()
        theirs.close()
        return process, ours, errors


def allocations(text: str) -> list[int]:
    """Sizes of the anonymous RAM blocks in the order in which QEMU made them: from `Qemu.messages`, where QEMU was
    started with "-trace", "qemu_anon_ram_alloc".

    >>> allocations("qemu_anon_ram_alloc size 262144 ptr 0x7f505ca00000")
    [262144]
    """
    head = "qemu_anon_ram_alloc size "
    return [int(line.partition(head)[2].split()[0]) for line in text.splitlines() if head in line]


class Qemu:
    """QEMU with these options, stopped before the first instruction; see the module's text.

    `options` are added to the command line; `machine` is its -machine, `accel` its -accel.  `prefix` goes before the
    command: ("strace", "-f", "-o", path).  `fds`: open descriptors that it inherits, under the numbers they have here.
    `timeout` in seconds bounds the start and every command.

    Raises Lacking where QEMU is not installed, QemuError with QEMU's words where it refuses the options, HostError of
    the calls.
    Calls: socketpair(2), memfd_create(2) for what QEMU says, fork and execve(2), kill(2).
    Threads: any, one at a time; the one that makes it must outlive it.
    """

    def __init__(
        self,
        *options: str,
        machine: str = "pc",
        accel: str = "tcg",
        prefix: Sequence[str] = (),
        fds: Sequence[int] = (),
        timeout: float = 60.0,
    ) -> None:
        for option in (*options, machine, accel, *prefix):
            if not isinstance(option, str):
                raise ArgumentTypeError("Qemu", "options", option, "words of QEMU's command line, each a str")
        binary = shutil.which(BINARY)
        if binary is None:
            raise Lacking(f"{BINARY} is not installed")
        self._timeout = timeout
        self._received = b""
        self._events: list[str | None] = []
        setpriv = shutil.which("setpriv")
        # The prefix dies with us, and what it has forked with the prefix.
        dies = (setpriv, "--pdeathsig", "KILL") if setpriv else ()
        words = [*dies, *prefix, *(dies if prefix else ()), binary, *_STOPPED]
        words += ["-accel", accel, "-machine", machine, *options]
        self._call = " ".join([BINARY, "-machine", machine, *options])
        process, ours, errors = _start(words, fds)
        self._process, self._monitor, self._errors = process, ours, errors
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(self, _lost, process, ours, errors, self._owner)
        try:
            ours.settimeout(timeout)
            greeting = self._line(self._call)
            self._version = greeting["QMP"]["version"]["qemu"]
            self._ask(self._call, "qmp_capabilities", {})  # answered when the machine is there
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The process's id; with a `prefix` that forks (strace) that of the prefix."""
        return self._process.pid

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version, such as (7, 2, 22)."""
        return self._version["major"], self._version["minor"], self._version["micro"]

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._finalizer.alive

    @property
    def messages(self) -> str:
        """What QEMU wrote to stdout and stderr so far: warnings, and the lines of -trace.  Raises ClosedError."""
        if self.closed:
            raise ClosedError("Qemu.messages", "Qemu")
        # pread leaves alone the position, which QEMU's descriptor shares.
        parts, at = [], 0
        while part := os.pread(self._errors.fileno(), 1 << 16, at):
            parts.append(part)
            at += len(part)
        return b"".join(parts).decode(errors="replace")

    def _fail(self, call: str, why: str) -> QemuError:
        # What QEMU itself said is better than that it went away.
        said = [line for line in self.messages.strip().splitlines() if not line.startswith("qemu_anon_ram_alloc")]
        return QemuError(call, "\n".join(said) or why)

    def _line(self, call: str) -> Any:
        end = time.monotonic() + self._timeout
        while b"\n" not in self._received:
            left = end - time.monotonic()
            try:
                self._monitor.settimeout(max(left, 1e-3))
                part = self._monitor.recv(1 << 20)
            except TimeoutError:
                raise QemuError(call, f"no answer in {self._timeout} s") from None
            except ConnectionResetError:
                part = b""
            if not part:
                try:
                    status = self._process.wait(self._timeout)
                except subprocess.TimeoutExpired:
                    raise QemuError(call, "it has closed its monitor") from None
                raise self._fail(call, f"it has ended with status {status}")
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def execute(self, command: str, **arguments: object) -> Any:
        """The answer to a command of QMP, as json.loads makes it; names with a dash are given with an underscore.

        Raises QemuError with QEMU's reason, ClosedError.
        """
        if self.closed:
            raise ClosedError("Qemu.execute", "Qemu")
        return self._ask(command, command, {name.replace("_", "-"): value for name, value in arguments.items()})

    def _ask(self, call: str, command: str, arguments: dict[str, object]) -> Any:
        request = {"execute": command, "arguments": arguments}
        try:
            self._monitor.settimeout(self._timeout)
            self._monitor.sendall(json.dumps(request).encode() + b"\n")
        except TimeoutError:
            raise QemuError(call, f"no answer in {self._timeout} s") from None
        except OSError:  # it went away: its last words say why
            self._line(call)
            raise
        while True:
            answer = self._line(call)
            if "error" in answer:
                raise QemuError(call, answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]
            self._events.append(answer.get("event"))

    def reset(self) -> None:
        """Reset the machine, as its reset button does, and wait until that is done.  Raises QemuError, ClosedError."""
        self._events.clear()
        self.execute("system_reset")
        while "RESET" not in self._events:
            self._events.append(self._line("system_reset").get("event"))

    def monitor(self, line: str) -> str:
        """What QEMU's human monitor prints for this line: `info mtree -f`, `info ramblock`.

        An error of the command is in that text.  Raises QemuError, ClosedError.
        """
        text: str = self.execute("human-monitor-command", command_line=line)
        return text.replace("\r\n", "\n")

    def outport(self, port: int, value: int, size: int) -> None:
        """Write `size` bytes (1, 2 or 4) to an I/O port, by the monitor's `o`."""
        answer = self.monitor(f"o/{self._width(port, size)} {port:#x} {value:#x}")
        if answer.strip():
            raise QemuError("Qemu.outport", answer.strip())

    def inport(self, port: int, size: int) -> int:
        """Read `size` bytes (1, 2 or 4) from an I/O port, by the monitor's `i`."""
        answer = self.monitor(f"i/{self._width(port, size)} {port:#x}")
        try:
            return int(answer.partition("=")[2], 16)
        except ValueError:
            raise QemuError("Qemu.inport", answer.strip() or "no value") from None

    @staticmethod
    def _width(port: int, size: int) -> str:
        if size not in _WIDTHS:
            raise ArgumentError("Qemu", "size", size, "1, 2 or 4 bytes")
        if not 0 <= port <= 0x10000 - size:
            raise ArgumentError("Qemu", "port", port, f"0 <= port <= {0x10000 - size:#x}")
        return _WIDTHS[size]

    def config_write(self, offset: int, value: int, size: int = 1, *, device: int = 0, function: int = 0) -> None:
        """Write a register of a PCI device of bus 0, the host bridge by default, through ports 0xCF8 and 0xCFC."""
        self._select(offset, size, device, function)
        self.outport(_CONFIG_DATA + (offset & 3), value, size)

    def config_read(self, offset: int, size: int = 1, *, device: int = 0, function: int = 0) -> int:
        """Read a register of a PCI device of bus 0, the host bridge by default, through ports 0xCF8 and 0xCFC."""
        self._select(offset, size, device, function)
        return self.inport(_CONFIG_DATA + (offset & 3), size)

    #   0xCF8: |31 enable|30..24 0|23..16 bus|15..11 device|10..8 function|7..2 register|1..0 0|
    def _select(self, offset: int, size: int, device: int, function: int) -> None:
        if size not in _WIDTHS:
            raise ArgumentError("Qemu", "size", size, "1, 2 or 4 bytes")
        if not 0 <= offset <= 0x100 - size or offset & 3 > 4 - size:
            raise ArgumentError("Qemu", "offset", offset, f"0 <= offset <= {0x100 - size:#x}, in one doubleword")
        self.outport(_CONFIG_ADDRESS, _CONFIG_ENABLE | device << 11 | function << 8 | offset & ~3, 4)

    def close(self) -> None:
        """Kill the process and wait for its end.  Any number of calls."""
        if self._finalizer.detach():
            _reap(self._process, self._monitor, self._errors, self._owner)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return "<Qemu closed>" if self.closed else f"<Qemu pid={self.pid}: {self._call}>"
