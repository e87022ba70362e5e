"""tracefs: a private tracing instance, our threads only, its records as values.

Owns the mount (`Tracefs`) and the instance (`Instance`).  A mount of tracefs that is there already is used; without
one a detached mount is made, which no mount table shows.  Every file is opened relative to that mount.  The top
instance and settings outside our own instance are never written.

Nothing stays behind.  An instance is a kernel object that outlives its maker, so each has a guard: a small process of
its own session that waits for the end of a pipe whose write end we hold, and then removes the instance.  The pipe ends
however we do, SIGKILL included.  Where guard and owner died together, the next `Tracefs.instance()` sweeps: the
instance's name tells its owner's pid and start time, and an instance in use (open trace_pipe_raw) is EBUSY to rmdir.

Sources: kernel Documentation/trace/ftrace.rst, kernel/trace/trace.c, fs/namespace.c @6.18.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import weakref
from fnmatch import fnmatchcase

from ..errors import ArgumentError, ArgumentTypeError, ClosedError, HostError
from ..value import Value
from .ringbuffer import Record, decoder, parse_format, parse_header_page, parse_subbuffer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from subprocess import Popen
    from types import TracebackType
    from typing import Self

    from .ringbuffer import EventFormat

__all__ = ["CpuStats", "Gap", "Instance", "Lost", "Tracefs"]

# Numbers of the mount calls, x86-64, and the constants of linux/mount.h they take.
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_CLOEXEC = 1  # FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC
_FSCONFIG_CMD_CREATE = 6
_MOUNT_ATTRS = 0x2 | 0x4 | 0x8  # nosuid, nodev, noexec

_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO: inode of the initial pid namespace

_NAME = re.compile(r"hvmodel-(\d+)-(\d+)-\d+")
_EVENT = re.compile(r"\w+:\w+")  # an event's name, no pattern

# What an instance inherits from the top instance and would change what ours records.
_OPTIONS = {"overwrite": True, "stacktrace": False, "userstacktrace": False, "pause-on-trace": False}

# The guard.  Its working directory is instances/, its standard input the pipe, $1 the instance.  An instance is busy
# until the last descriptor of its files is closed, which may come after the pipe's: hence the tries, for a minute.
_GUARD = """
trap '' HUP INT QUIT TERM
while read -r _; do :; done
i=0
while [ -d "$1" ] && ! rmdir "$1" && [ $i -lt 1200 ]; do i=$((i + 1)); sleep 0.05; done
"""

_ROOT = "root (CAP_SYS_ADMIN)"


def _host_error(error: OSError, call: str, field: str, value: object, accepted: str | None = None) -> HostError:
    if accepted is None and error.errno in (errno.EPERM, errno.EACCES):
        accepted = f"to be {_ROOT}"
    return HostError(error.errno or errno.EIO, call, field, value, accepted)


def _existing_mount() -> int | None:
    # Directory fd of a usable mount of tracefs in our mount table.  /sys/kernel/debug/tracing is not tried by its path:
    # a look at it would mount tracefs there.
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
            lines = table.readlines()
    except OSError:
        return None
    for line in lines:
        left, _, right = line.partition(" - ")
        mount, kind = left.split(), right.split()
        if not kind or kind[0] != "tracefs" or mount[3] != "/" or "rw" not in mount[5].split(","):
            continue
        path = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), mount[4])
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        # Another mount may hide this one, and we may lack the right to make instances.
        if os.access("instances", os.W_OK | os.X_OK, dir_fd=fd) and os.access("events/header_page", os.R_OK, dir_fd=fd):
            return fd
        os.close(fd)
    return None


def _detached_mount() -> int:
    import ctypes

    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long

    def call(name: str, number: int, *args: object) -> int:
        words = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
        result: int = syscall(ctypes.c_long(number), *words)
        if result < 0:
            code = ctypes.get_errno()
            accepted = {
                errno.EPERM: f"to be {_ROOT}",
                errno.ENODEV: "a kernel with CONFIG_FTRACE, which has tracefs",
                errno.ENOSYS: "Linux 5.2 or later, or tracefs mounted at /sys/kernel/tracing",
            }.get(code)
            raise HostError(code, name, "fs", "tracefs", accepted)
        return result

    context = call("fsopen", _SYS_FSOPEN, b"tracefs", _CLOEXEC)
    try:
        call("fsconfig", _SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return call("fsmount", _SYS_FSMOUNT, context, _CLOEXEC, _MOUNT_ATTRS)
    finally:
        os.close(context)


def _start_time(pid: int) -> int | None:
    # Field 22 of /proc/PID/stat (ticks since boot), which with the pid names a process for good; None where it is dead.
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return int(stat.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError):
        return None


def _our_threads() -> list[int]:
    return sorted(int(tid) for tid in os.listdir("/proc/self/task"))


def _release_mount(fd: int, pid: int, text: str) -> None:
    if os.getpid() == pid:
        os.close(fd)
        _warn(text)


def _warn(text: str) -> None:
    import warnings

    warnings.warn(f"unclosed {text}", ResourceWarning, stacklevel=3)


class Tracefs:
    """tracefs, by a mount that is there or a detached one of ours; any thread may call.

    HostError where it cannot be had: EPERM or EACCES without root, ENODEV in a kernel without tracing, ENOTSUP inside
    a pid namespace, where set_event_pid would mean other processes than ours.

        with Tracefs() as tracefs, tracefs.instance(["kvm:kvm_userspace_exit"]) as trace:
            ...
            for record in trace.read():
                print(record.timestamp_ns, record["reason"])
    """

    def __init__(self) -> None:
        if os.stat("/proc/self/ns/pid").st_ino != _INITIAL_PID_NAMESPACE:
            raise HostError(errno.ENOTSUP, "set_event_pid", "pid namespace", "nested", "the initial pid namespace")
        fd = _existing_mount()
        #: Whether the mount is our own, detached one.
        self.detached = fd is None
        self._fd = _detached_mount() if fd is None else fd
        self._instances: weakref.WeakSet[Instance] = weakref.WeakSet()
        self._finalizer = weakref.finalize(self, _release_mount, self._fd, os.getpid(), repr(self))

    def __repr__(self) -> str:
        if self._fd < 0:
            return "<Tracefs closed>"
        return f"Tracefs(fd={self._fd}, detached={self.detached})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the instances that are still open, then the mount.  Any number of calls."""
        for instance in list(self._instances):
            instance.close()
        if self._finalizer.detach():
            os.close(self._fd)
            self._fd = -1

    def fileno(self) -> int:
        """File descriptor of the mount's root (O_PATH where it is detached).  ClosedError after close()."""
        if self._fd < 0:
            raise ClosedError("Tracefs.fileno", "Tracefs")
        return self._fd

    def open(self, path: str, flags: int = os.O_RDONLY) -> int:
        """A new file descriptor (CLOEXEC) of a file below the mount.  HostError as open(2)."""
        fd = self.fileno()
        try:
            return os.open(path, flags | os.O_CLOEXEC, dir_fd=fd)
        except OSError as error:
            raise _host_error(error, "open", "path", path) from None

    def read_text(self, path: str) -> str:
        """The text of a file below the mount.  HostError as open(2) and read(2)."""
        with os.fdopen(self.open(path), encoding="utf-8", errors="surrogateescape") as file:
            try:
                return file.read()
            except OSError as error:
                raise _host_error(error, "read", "path", path) from None

    def listdir(self, path: str) -> list[str]:
        """The names in a directory below the mount, sorted.  HostError as open(2)."""
        fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)

    def events(self, pattern: str = "*:*") -> list[str]:
        """The events "system:name" of the running kernel that match a shell pattern, sorted.

        ArgumentError for a pattern without ":", or one that matches nothing; it names the nearest there are.
        """
        if ":" not in pattern:
            raise ArgumentError("Tracefs.events", "pattern", pattern, self._near(pattern), "no system:name")
        if _EVENT.fullmatch(pattern) and self._has(pattern):
            return [pattern]  # one event's name: the list of all need not be read
        found = [event for event in self._available() if fnmatchcase(event, pattern)]
        if not found:
            raise ArgumentError("Tracefs.events", "event", pattern, self._near(pattern), "not in this kernel")
        return found

    def format(self, event: str) -> EventFormat:
        """The format of an event "system:name".  ArgumentError where there is none."""
        if event not in self.events(event):
            raise ArgumentError("Tracefs.format", "event", event, "one event's name, no pattern")
        system, _, name = event.partition(":")
        return parse_format(self.read_text(f"events/{system}/{name}/format"), system)

    def _has(self, event: str) -> bool:
        system, _, name = event.partition(":")
        return system != "ftrace" and os.access(f"events/{system}/{name}/format", os.R_OK, dir_fd=self.fileno())

    def _available(self) -> list[str]:
        # "ftrace" are the kernel's own records, which cannot be enabled.
        listed = self.read_text("available_events").split()
        return sorted(event for event in listed if not event.startswith("ftrace:"))

    def _near(self, pattern: str) -> str:
        from difflib import get_close_matches

        every = self._available()
        by_name: dict[str, list[str]] = {}
        for event in every:
            by_name.setdefault(event.partition(":")[2], []).append(event)
        near = get_close_matches(pattern, every, 5, 0.6)
        for name in get_close_matches(pattern.partition(":")[2] or pattern, by_name, 5, 0.6):
            near += [e for e in by_name[name] if e not in near]
        return ", ".join(near[:6]) if near else "an event as system:name, such as kvm:kvm_userspace_exit"

    def instance(
        self,
        events: Iterable[str],
        pids: Iterable[int] | None = None,
        *,
        follow: bool = True,
        buffer_size: int = 1 << 20,
        clock: str = "mono",
        overwrite: bool = True,
    ) -> Instance:
        """A new tracing instance of our own that records at once.

        `events`: names "system:name", shell patterns allowed.  `pids`: thread ids, by default all threads of this
        process; `follow` adds the threads and children that those make later.  `buffer_size`: bytes per CPU, rounded up
        by the kernel.  `clock`: a name from trace_clock; "mono" is CLOCK_MONOTONIC, that of time.monotonic_ns().
        `overwrite`: a full buffer loses its oldest records, else the newest.

        ArgumentError for unknown events, clocks and sizes; HostError as the kernel says (EACCES without root).
        """
        self.sweep()
        return Instance(self, events, pids, follow, buffer_size, clock, overwrite)

    def sweep(self) -> list[str]:
        """Remove the instances whose owner, a process of this package, is dead; the names of those removed."""
        directory = self.open("instances", os.O_RDONLY | os.O_DIRECTORY)
        removed = []
        try:
            for name in sorted(os.listdir(directory)):
                match = _NAME.fullmatch(name)
                if match is None or _start_time(int(match[1])) == int(match[2]):
                    continue
                try:
                    os.rmdir(name, dir_fd=directory)
                    removed.append(name)
                except OSError:
                    continue  # busy: a child of the dead owner has it open; or gone: its guard was faster
        finally:
            os.close(directory)
        return removed


class CpuStats(Value):
    """A CPU's buffer, in records: `entries` unread, `read`, and the three ways of `Lost`; `size` in bytes."""

    cpu: int
    entries: int
    read: int
    overrun: int
    commit_overrun: int
    dropped: int
    size: int


class Lost(Value):
    """Records lost since the instance was made, exactly.

    `overrun`: overwritten unread (overwrite mode); `dropped`: refused by a full buffer (no overwrite);
    `commit_overrun`: nested interrupts filled the buffer.
    """

    overrun: int
    dropped: int
    commit_overrun: int

    @property
    def total(self) -> int:
        """All of them.

        >>> Lost(3, 0, 1).total
        4
        """
        return self.overrun + self.dropped + self.commit_overrun


class Gap(Value):
    """Where overwritten records are missing: `count` of them (None: the kernel had no room to say) before this time."""

    cpu: int
    timestamp_ns: int
    count: int | None


_serial = itertools.count()
_outliving: list[Popen[bytes]] = []  # guards that wait for a forked child's end, to be reaped


class Instance:
    """A private tracing instance, made by `Tracefs.instance`; one thread at a time, the traced ones are free to run.

    Close it, best by `with`: its directory, its descriptors and its guard are gone then.
    """

    def __init__(
        self,
        tracefs: Tracefs,
        events: Iterable[str],
        pids: Iterable[int] | None,
        follow: bool,
        buffer_size: int,
        clock: str,
        overwrite: bool,
    ) -> None:
        self.tracefs = tracefs
        #: Name of the directory below instances/.
        self.name = ""
        #: The events recorded, "system:name".
        self.events = self._resolve(events)
        threads = self._threads(pids)
        if isinstance(buffer_size, bool) or not isinstance(buffer_size, int):
            raise ArgumentTypeError("Tracefs.instance", "buffer_size", buffer_size, "bytes per CPU, an int")
        if not 1 <= buffer_size <= 1 << 40:
            raise ArgumentError("Tracefs.instance", "buffer_size", buffer_size, "1 byte to 1 TiB per CPU")
        formats = [tracefs.format(event) for event in self.events]
        self._decoders: dict[int, Callable[[int, int, bytes], Record]] = {f.id: decoder(f) for f in formats}
        self._layout = parse_header_page(tracefs.read_text("events/header_page"))
        #: Where records are missing in what `read` returned, in order.
        self.gaps: list[Gap] = []
        self._held: list[Record] = []
        self._state: _State | None = _State(tracefs)
        self._finalizer = weakref.finalize(self, _State.abandon, self._state, "tracing instance")
        try:
            self.name = self._state.make()
            self._set_up(threads, pids is None, follow, -(-buffer_size // 1024), clock, overwrite)
        except BaseException:
            self.close()
            raise
        tracefs._instances.add(self)

    def _resolve(self, events: Iterable[str]) -> tuple[str, ...]:
        wanted = [events] if isinstance(events, str) else list(events)
        for pattern in wanted:
            if not isinstance(pattern, str):
                raise ArgumentTypeError("Tracefs.instance", "events", pattern, 'names such as "kvm:kvm_userspace_exit"')
        if not wanted:
            raise ArgumentError("Tracefs.instance", "events", (), "at least one event")
        return tuple(dict.fromkeys(event for pattern in wanted for event in self.tracefs.events(pattern)))

    def _threads(self, pids: Iterable[int] | None) -> list[int]:
        threads = _our_threads() if pids is None else list(pids)
        for pid in threads:
            if isinstance(pid, bool) or not isinstance(pid, int):
                raise ArgumentTypeError("Tracefs.instance", "pids", pid, "thread ids, int")
            if pid < 1:
                raise ArgumentError("Tracefs.instance", "pids", pid, "thread ids from 1 up")
        if not threads:  # an empty set_event_pid would record every process of this machine
            raise ArgumentError("Tracefs.instance", "pids", (), "at least one thread id")
        return threads

    def _set_up(self, threads: list[int], ours: bool, follow: bool, size_kb: int, clock: str, overwrite: bool) -> None:
        clocks = self.get("trace_clock").replace("[", "").replace("]", "").split()
        if clock not in clocks:
            raise ArgumentError("Tracefs.instance", "clock", clock, ", ".join(clocks))
        self.set("buffer_size_kb", str(size_kb))
        # A read ends though the writers never do: at twice what the buffer holds (the kernel adds a page or two).
        self._nr_pages = 2 * (size_kb * 1024 // self._layout.size) + 8
        self.set("trace_clock", clock)
        present = self.tracefs.listdir(f"instances/{self.name}/options")
        for option, on in {**_OPTIONS, "overwrite": overwrite, "event-fork": follow}.items():
            if option in present:
                self.set(f"options/{option}", str(int(on)))
        # With event-fork on, only a thread made between the listing and the write can be missed: list until none is.
        written: set[int] = set()
        while not written.issuperset(threads):
            self.set("set_event_pid", " ".join(str(t) for t in threads if t not in written))
            written.update(threads)
            threads = _our_threads() if ours else threads
        state = self._open_state()
        for cpu in self._cpus():
            path = f"instances/{self.name}/per_cpu/cpu{cpu}/trace_pipe_raw"
            state.pipes.append((cpu, self.tracefs.open(path, os.O_RDONLY | os.O_NONBLOCK)))
        for event in self.events:
            self.set(f"events/{event.replace(':', '/')}/enable", "1")

    def _cpus(self) -> list[int]:
        names = self.tracefs.listdir(f"instances/{self.name}/per_cpu")
        return sorted(int(n[3:]) for n in names if re.fullmatch(r"cpu\d+", n))

    def _open_state(self) -> _State:
        if self._state is None:
            raise ClosedError("Instance", f"tracing instance {self.name}")
        return self._state

    def __repr__(self) -> str:
        if self._state is None:
            return "<Instance closed>"
        return f"Instance({self.name!r}, events={list(self.events)})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop recording and remove the instance with all it recorded.  Any number of calls.

        Where a child made by os.fork still has the instance open, its guard removes it at that child's end.
        """
        if self._state is None:
            return
        state, self._state = self._state, None
        self._finalizer.detach()
        self.tracefs._instances.discard(self)
        state.release()

    def _path(self, path: str, call: str) -> str:
        self._open_state()
        if ".." in path.split("/") or "\0" in path:  # ".." would lead to the top instance
            raise ArgumentError(f"Instance.{call}", "path", path, "a path inside the instance")
        return f"instances/{self.name}/{path}"

    def get(self, path: str) -> str:
        """The text of one of the instance's files, such as "trace" or "options/fields".  HostError as open(2)."""
        return self.tracefs.read_text(self._path(path, "get"))

    def set(self, path: str, text: str) -> None:
        """Write to one of the instance's files, such as "events/kvm/kvm_pio/filter".  HostError as open(2), write(2).

        Files that hold lists, such as set_event_pid, are appended to.
        """
        fd = self.tracefs.open(self._path(path, "set"), os.O_WRONLY)
        try:
            os.write(fd, text.encode())
        except OSError as error:
            raise _host_error(error, f"write {path}", path, text) from None
        finally:
            os.close(fd)

    def pause(self) -> None:
        """Record nothing until `resume()`; what happens meanwhile is not recorded and not counted as lost."""
        self.set("tracing_on", "0")

    def resume(self) -> None:
        """Record again after `pause()`."""
        self.set("tracing_on", "1")

    def read(self) -> list[Record]:
        """Take what was recorded since the last call, in order of time over all CPUs; never waits.

        Everything recorded before the call is in it.  What a running thread does meanwhile may come with the next call,
        in order.  Places where the buffer was overwritten go to `gaps`.
        FormatError for what the kernel's own format files do not describe.
        """
        # CPUs are read one by one, so a thread that moves may leave a record on a CPU read already and a later one on a
        # CPU yet to be read.  The second pass has every record that precedes one of the first; what is younger than the
        # first pass waits.
        found = self._held + self._pass()
        young = self._pass()
        last = max((record.timestamp_ns for record in found), default=0)
        found += (record for record in young if record.timestamp_ns <= last)
        self._held = [record for record in young if record.timestamp_ns > last]
        found.sort(key=lambda record: (record.timestamp_ns, record.cpu))
        return found

    def _pass(self) -> list[Record]:
        size, found = self._layout.size, []
        for cpu, fd in self._open_state().pipes:
            pages = []
            for _ in range(self._nr_pages):
                try:
                    page = os.read(fd, size)
                except BlockingIOError:
                    break
                if not page:
                    break
                pages.append(page)
            for page in pages:
                part = parse_subbuffer(page, self._layout)
                if part.missed != 0:
                    self.gaps.append(Gap(cpu, part.timestamp_ns, part.missed))
                for time, data in part.events:
                    decode = self._decoders.get(int.from_bytes(data[:2], "little"))
                    if decode is not None:  # else the kernel's own, such as a stack trace somebody asked for
                        found.append(decode(cpu, time, data))
        return found

    def stats(self) -> tuple[CpuStats, ...]:
        """The kernel's counts for each CPU's buffer."""
        found = []
        for cpu in self._cpus():
            lines = (line.partition(":") for line in self.get(f"per_cpu/cpu{cpu}/stats").splitlines())
            count = {key: value.strip() for key, _, value in lines}
            found.append(
                CpuStats(
                    cpu,
                    int(count["entries"]),
                    int(count["read events"]),
                    int(count["overrun"]),
                    int(count["commit overrun"]),
                    int(count["dropped events"]),
                    int(count["bytes"]),
                )
            )
        return tuple(found)

    @property
    def lost(self) -> Lost:
        """Records lost so far on all CPUs; read plus lost plus unread is all there were."""
        stats = self.stats()
        return Lost(sum(s.overrun for s in stats), sum(s.dropped for s in stats), sum(s.commit_overrun for s in stats))


class _State:
    """What an instance must give back: directory, descriptors, guard.  Knows nothing of the `Instance`."""

    def __init__(self, tracefs: Tracefs) -> None:
        self.tracefs = tracefs
        self.pipes: list[tuple[int, int]] = []  # CPU, descriptor of its trace_pipe_raw
        self.pid, self.name = os.getpid(), ""
        self.made = False
        self.guard: Popen[bytes] | None = None
        self.guard_pipe = -1

    def make(self) -> str:
        while True:
            self.name = f"hvmodel-{self.pid}-{_start_time(self.pid)}-{next(_serial)}"
            # The guard comes first: from the mkdir on there is someone to undo it.
            self.start_guard()
            try:
                os.mkdir(f"instances/{self.name}", 0o750, dir_fd=self.tracefs.fileno())
            except FileExistsError:  # ours from before an execve, which keeps pid and start time
                self.stop_guard()
                continue
            except OSError as error:
                raise _host_error(error, "mkdir", "path", f"instances/{self.name}") from None
            self.made = True
            return self.name

    def start_guard(self) -> None:
        # A plain exec by vfork: no Python runs in a copy of this process, no descriptor of ours but the mount's stays.
        from subprocess import DEVNULL, Popen

        _outliving[:] = [guard for guard in _outliving if guard.poll() is None]
        root = self.tracefs.fileno()
        end, self.guard_pipe = os.pipe()  # CLOEXEC both
        try:
            self.guard = Popen(
                ["/bin/sh", "-c", _GUARD, "hvmodel-guard", self.name],
                stdin=end,
                stdout=DEVNULL,
                stderr=DEVNULL,
                pass_fds=(root,),
                cwd=f"/proc/self/fd/{root}/instances",
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                start_new_session=True,
            )
        except OSError as error:
            os.close(self.guard_pipe)
            self.guard_pipe = -1
            raise _host_error(error, "execve", "path", "/bin/sh") from None
        finally:
            os.close(end)

    def stop_guard(self, wait: bool = True) -> None:
        if self.guard_pipe >= 0:
            os.close(self.guard_pipe)
            self.guard_pipe = -1
        guard, self.guard = self.guard, None
        if guard is not None:
            if wait:
                guard.wait()
            else:
                _outliving.append(guard)

    def release(self) -> None:
        if os.getpid() != self.pid:
            self.forget()
            return
        for _, fd in self.pipes:
            os.close(fd)
        self.pipes.clear()
        gone = not self.made
        if self.made:
            try:
                os.rmdir(f"instances/{self.name}", dir_fd=self.tracefs.fileno())
                gone = True
            except OSError as error:
                gone = error.errno == errno.ENOENT
            self.made = False
        self.stop_guard(wait=gone)

    def forget(self) -> None:
        # In a child after os.fork: give up its copies of the descriptors, leave the instance to its owner.
        for _, fd in self.pipes:
            os.close(fd)
        self.pipes.clear()
        if self.guard is not None:
            self.guard.returncode = 0
        self.stop_guard(wait=False)

    @staticmethod
    def abandon(state: _State, what: str) -> None:
        state.release()
        _warn(f"{what} {state.name}")
