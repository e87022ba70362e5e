"""Page faults answered by this process: `UserFaultFd` owns a userfaultfd, its thread, and what is registered with it.

    mode        a fault comes                               and is answered by
    missing     where the memory has no page yet            copy, zeropage (move)
    minor       where the file has the page, but it is      continue_
                not mapped yet
    wp          at a write to a page under write            writeprotect(..., protect=False)
                protection (`writeprotect`)
    wp-async    never: the kernel lifts the protection      nobody; `take_written` says what was written

Whoever touches such a page waits in the kernel: a thread in `Mapping.read` or `write`, a vCPU in KVM_RUN.  It goes on
when the page was answered, or when the range is unregistered.  Signals do not reach it there, but for a vCPU whose
guest's code runs natively.  So this module sees to it that nobody waits for ever:

    nobody serves    a fault that nobody takes by `read` within `patience` is given up
    serve(function)  a fault that the function does not answer, or raises at, is given up; so is its own
    unregister,      all who wait go on, as if the memory had never been registered
    close, exit

To give up a fault is to make the access fail: the page is guarded (madvise GUARD_INSTALL), `Mapping.read` and `write`
raise HostError (EFAULT), a guest gets what it gets for memory that the host may not touch.  `copy` and its like still
bring the page in, and `mapping.advise("guard_remove")` makes it as it was.  (Before Linux 6.15 it is made PROT_NONE,
until `mapping.protect`.)  A write to a protected page is let through instead, and counts as written.

Ranges that can wait are out of reach of views: registering one that is handed out raises ViewError, and then `view`
and `writable` do.  `read` and `write` go through the kernel and hold no lock of Python's, so that a handler in Python
can answer them.  wp-async never waits, and leaves views alone.

The events of fork, mremap, munmap and madvise are not asked for: they would make that call wait for a reader, which in
the same process may wait for a lock that the caller holds.

The calls that answer: hvmodel.host.answers.

Source: fs/userfaultfd.c@v6.18; userfaultfd(2), ioctl_userfaultfd(2).
"""

from __future__ import annotations

import errno
import os
from _thread import RLock, get_ident
from weakref import ref

from .._ffi import ffi, lib
from ..errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, HostError, HvError
from ..finalizer import Finalizer
from .answers import Answers, Question, whole_range
from .faults import IOCTLS, MODES, Fault, FaultCounts, feature_names, open_uffd
from .mapping import Mapping, index
from .memfd import MemFd
from .registered import (
    Range,
    Registration,
    State,
    release_source,
    take_source,
    whole,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from threading import Thread
    from typing import Self

    from typing_extensions import Buffer

    from .._native import hv_fault, hv_uffd

    Handler = Callable[["Fault"], "Buffer | None"]

__all__ = ["UserFaultFd"]

_JOIN_TIMEOUT = 10.0  # seconds that a handler has to come back from its last fault


def _leaked(state: State, fd: int) -> None:
    # The finalizer of a UserFaultFd that nobody closed.  The warning comes last, because it may be made an exception.
    import warnings

    state.end()
    if os.getpid() == state.pid:
        warnings.warn(f"unclosed UserFaultFd(fd={fd})", ResourceWarning, stacklevel=2)


class UserFaultFd(Answers):
    """A userfaultfd: ranges of mappings are registered with it, and their page faults come here to be answered.

    `user_mode_only`: only faults of user code come, so that no privilege is needed; the kernel's own accesses
    (`Mapping.read`, KVM's emulator) fail with EFAULT there.  `sigbus`: no fault comes at all, every access to a missing
    page fails with EFAULT.  `wp_async`: this object does wp-async instead of wp, which the kernel does not mix.
    `patience`: seconds that a fault waits, while nobody serves, before it is given up; None is for ever.

    Serve the faults by one of

        serve(function)       in a thread of Python
        serve_native(...)     in a thread of C: zeros, or bytes of another mapping or file; minor faults are continued;
                              writes to protected pages are noted for `take_written` and allowed
        read(timeout)         yourself

    Raises ArgumentError, ArgumentTypeError; HostError of userfaultfd (EPERM, ENOSYS, EMFILE) and UFFDIO_API.

    Calls: userfaultfd(2), or USERFAULTFD_IOC_NEW of /dev/userfaultfd where that is refused; UFFDIO_API.
    Threads: any.  A child of os.fork can only close it (ForkedError).

    >>> from hvmodel.host import Mapping
    >>> with Mapping(None, "16K") as mapping, UserFaultFd() as uffd:
    ...     uffd.register(mapping, mode="missing").modes
    ...     uffd.serve(lambda fault: b"%04x" % fault.page * 1024)
    ...     mapping.read(0x1000, 8), mapping.read(0x3ffc, 4)
    ('missing',)
    (b'10001000', b'3000')
    """

    __slots__ = (
        "__weakref__",
        "_error",
        "_finalizer",
        "_patience",
        "_wp_async",
    )

    def __init__(
        self,
        *,
        user_mode_only: bool = False,
        sigbus: bool = False,
        wp_async: bool = False,
        patience: float | None = 5.0,
    ) -> None:
        self._state = None
        self._error: BaseException | None = None
        self._question = None
        self._lock = RLock()
        self._wp_async = bool(wp_async)
        nanoseconds = _patience(patience)
        self._patience = patience
        fd, self._features = open_uffd(
            user_mode_only=bool(user_mode_only), sigbus=bool(sigbus), wp_async=self._wp_async
        )
        try:
            out = ffi.new("struct hv_uffd **")
            error = lib.hv_uffd_new(fd, self._features, out)
            if error < 0:
                raise HostError(-error, "eventfd")
        except BaseException:
            os.close(fd)
            raise
        native = ffi.gc(out[0], lib.hv_uffd_free)
        lib.hv_uffd_set_patience(native, nanoseconds)
        self._state = State(native, fd)
        self._finalizer = Finalizer(self, _leaked, self._state, fd)

    # ---- what it is ----

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._state is None

    @property
    def fd(self) -> int:
        """The userfaultfd, which stays this object's; its faults are read by this object's thread.  ClosedError."""
        return self._open("fd").fd

    def fileno(self) -> int:
        """A descriptor that is readable while `read` would not wait, for select and its like.  ClosedError."""
        return lib.hv_uffd_ready_fd(self._open("fileno").native)

    @property
    def features(self) -> tuple[str, ...]:
        """The UFFD_FEATURE_* that are switched on, by name."""
        return feature_names(self._features)

    @property
    def patience(self) -> float | None:
        """Seconds that a fault waits, while nobody serves, before it is given up; None is for ever.  Can be set."""
        return self._patience

    @patience.setter
    def patience(self, seconds: float | None) -> None:
        nanoseconds = _patience(seconds)
        lib.hv_uffd_set_patience(self._open("patience").native, nanoseconds)
        self._patience = seconds

    @property
    def registrations(self) -> tuple[Registration, ...]:
        """What is registered, in the order of registration."""
        ranges = self._open("registrations").ranges[:]
        return tuple(Registration(r.mapping, r.offset, r.size, r.modes, r.ioctls) for r in ranges)

    @property
    def counts(self) -> FaultCounts:
        """How many faults there were so far."""
        out = ffi.new("struct hv_uffd_counts *")
        self._check("counts", lib.hv_uffd_get_counts(self._open("counts").native, out))
        return FaultCounts(out.missing, out.minor, out.wp, out.given_up)

    @property
    def serving(self) -> str:
        """What serves the faults: "python", "native", or "" for nobody."""
        return self._open("serving").server

    # ---- ranges ----

    def register(
        self, mapping: Mapping, offset: int = 0, size: int | None = None, mode: str | Iterable[str] = "missing"
    ) -> Registration:
        """Registers [offset, offset + size) of `mapping`, whole pages of it; `size` None is all the rest.

        `mode`: "missing", "minor", "wp", or several of them; "wp-async" where the object was made with `wp_async`, also
        with the first two.  The mapping stays open until the range is unregistered (it is pinned).

        Raises ArgumentError, ArgumentTypeError, ClosedError; ViewError where a view of the range is alive and the mode
        can wait; BusyError where this object has it already, or a handler in C reads from `mapping`; HostError of
        UFFDIO_REGISTER: EINVAL (memory that does not do this mode), EBUSY (another userfaultfd), EPERM, ENOMEM.
        """
        call = "UserFaultFd.register"
        state = self._open("register")
        offset, size = whole_range(call, mapping, offset, size)
        modes = self._modes(call, mode)
        bits = 0
        for name in modes:
            bits |= MODES[name]
        if modes != ("wp-async",):
            bits &= ~lib.HV_UFFD_ASYNC
        with self._lock:
            range_ = Range(mapping, offset, size, modes, state.fd)
            for other in state.ranges:
                if other.start < range_.end and range_.start < other.end:
                    why = f"[{other.offset:#x}, {other.offset + other.size:#x}) is {other.why}; unregister it first"
                    raise BusyError(call, repr(mapping), why)
            try:
                range_.hold()
                answer = lib.hv_uffd_register(
                    state.native, range_.start, size, bits, range_.page_size, range_.start - offset
                )
                if answer < 0:
                    raise self._register_refused(-answer, mapping, offset, modes)
                range_.ioctls = tuple(name for bit, name in IOCTLS.items() if answer >> bit & 1)
                state.ranges.append(range_)
            except BaseException:
                range_.let_go()
                raise
        return Registration(mapping, offset, size, modes, range_.ioctls)

    def unregister(self, mapping: Mapping, offset: int = 0, size: int | None = None) -> None:
        """Ends the registrations within [offset, offset + size) of `mapping` (UFFDIO_UNREGISTER); who waits goes on.

        Missing pages then are zeros or the file's, protections are lifted.  Pages that were poisoned, or guarded when
        their faults were given up, stay so, and out of reach of views.

        Raises ArgumentError (nothing is registered there, or only a part of a registration is meant), ClosedError.
        """
        call = "UserFaultFd.unregister"
        state = self._open("unregister")
        offset, size = whole_range(call, mapping, offset, size)
        with self._lock:
            mine = [r for r in state.ranges if r.mapping is mapping]
            chosen = [r for r in mine if r.offset < offset + size and offset < r.offset + r.size]
            if not chosen or any(r.offset < offset or r.offset + r.size > offset + size for r in chosen):
                raise ArgumentError(call, "offset", offset, whole(mine), f"size={size:#x}")
            for range_ in chosen:
                error = state.unregister(range_)
                if error < 0:
                    raise self._refused("UFFDIO_UNREGISTER", -error, {"offset": range_.offset})
            self._answered(mapping.hva + offset, size, withdrawn=True)

    # ---- faults ----

    def read(self, timeout: float | None = None) -> Fault | None:
        """The next fault, to be answered by one of the calls above; None after `timeout` seconds (None waits).

        Who takes a fault has to answer it: nobody gives it up any more, and its thread waits until it is answered or
        its range is unregistered.

        Raises ArgumentError, ArgumentTypeError; ClosedError, also when it is closed meanwhile; BusyError while
        somebody serves.  Ctrl-C ends the waiting.
        """
        call = "UserFaultFd.read"
        state = self._open("read")
        if state.server:
            raise BusyError(call, repr(self), f"its faults are served ({state.server})")
        out = ffi.new("struct hv_fault *")
        deadline = None if timeout is None else _now() + _seconds(call, "timeout", timeout)
        while True:
            rest = -1 if deadline is None else max(0, min(deadline - _now(), 1 << 20))
            got = lib.hv_uffd_next(state.native, -1 if deadline is None else int(rest * 1000 + 0.999), 0, out)
            if got == -errno.EBADF:
                raise ClosedError(call, repr(self))
            if got == 1:
                fault = self._fault(state, out)
                if fault is not None:
                    return fault
            elif got == 0 and deadline is not None and _now() >= deadline:
                return None

    def serve(self, handler: Handler) -> None:
        """Starts a thread of Python that calls `handler(fault)` for each fault, until `stop` or `close`.

        The handler returns bytes, whole pages that go to the fault's page and on (missing faults only), or None after
        it has answered the fault by one of this object's calls.  A fault that it left unanswered, or at which it
        raised, is given up; `stop` raises the first such error.  A page that the handler touches itself must be there:
        its own faults are given up at once.

        Raises ArgumentTypeError, ClosedError; BusyError while somebody serves, or a handler has not come back from its
        last fault.
        """
        from threading import Thread

        call = "UserFaultFd.serve"
        state = self._open("serve")
        if not callable(handler):
            raise ArgumentTypeError(call, "handler", handler, "a function of one argument, a Fault")
        with self._lock:
            self._begin(call, state, "python", lib.HV_UFFD_SERVED)
            thread = Thread(
                target=_serve, args=(ref(self), state.native, handler), name=f"UserFaultFd fd={state.fd}", daemon=True
            )
            try:
                thread.start()
            except BaseException:
                state.stop()
                raise
            state.thread = thread

    def serve_native(self, source: Mapping | MemFd | int | None = None, *, offset: int = 0) -> None:
        """Has the faults answered by the thread in C, until `stop` or `close`; the GIL plays no part in it.

        Missing pages come from `source`, or are zeros: the byte at x of a registered mapping is the one at offset + x
        of the source; behind its end are zeros.  The source is a Mapping (which must not be registered as missing or
        minor itself; it stays open until `stop`), a MemFd, or the descriptor of a file that can be read at any offset.
        Minor faults are continued.  A write to a protected page is noted (`take_written`) and let through.  In ranges
        that are also wp, pages come in under protection.

        What cannot be answered (the source is unreadable there) is given up, and counted.

        Raises ArgumentError, ArgumentTypeError, ClosedError; BusyError while somebody serves or where the source is
        registered; HostError where the descriptor is none or cannot be read so (ESPIPE).
        """
        call = "UserFaultFd.serve_native"
        state = self._open("serve_native")
        offset = index(offset, call, "offset")
        address, fd, end = 0, -1, 0
        held: list[Callable[[], None]] = []
        try:
            if isinstance(source, Mapping):
                if not 0 <= offset < source.size or offset % source.page_size:
                    accepted = f"a multiple of {source.page_size} below {source.size:#x}"
                    raise ArgumentError(call, "offset", offset, accepted)
                take_source(source, "it has registered ranges: a handler would wait for itself")
                held.append(lambda: release_source(source))
                why = f"the source of UserFaultFd fd={state.fd}"
                source.pin(why)
                held.append(lambda: source.unpin(why))
                address, end = source.hva, source.size
            elif source is not None:
                accepted = "a Mapping, a MemFd, a file descriptor, or None"
                number = source.fd if isinstance(source, MemFd) else index(source, call, "source", accepted)
                if not 0 <= number < 1 << 31:
                    raise ArgumentError(call, "source", source, accepted)
                if not 0 <= offset < 1 << 62:
                    raise ArgumentError(call, "offset", offset, "0 <= offset < 2**62")
                fd = _readable(number)
                held.append(lambda: os.close(fd))
                end = (1 << 63) - 1
            elif offset:
                raise ArgumentError(call, "offset", offset, "0 where there is no source")
            with self._lock:
                self._begin(call, state, "native", lib.HV_UFFD_NATIVE, address, fd, offset, end)
                state.source = held
                held = []
        finally:
            while held:
                held.pop()()

    def stop(self) -> None:
        """Ends serving; faults wait for the next who serves.  Fine where nobody serves.

        Waits for the handler to come back from the fault it is at (unless the handler calls this itself).  Raises
        the first error of the handler; BusyError if it does not come back within 10 s (it is not called again);
        ClosedError.
        """
        state = self._open("stop")
        with self._lock:
            thread = state.thread  # which stays noted, so that nobody else serves before it has come back
            state.stop()
        self._join("UserFaultFd.stop", thread)
        self._raise_error()

    def close(self) -> None:
        """Ends serving, unregisters everything, wakes all who wait, and closes it.  Closing twice is fine.

        Raises what `stop` raises, when all that is done.  In a child of os.fork it closes the child's copies only.
        """
        state = self._state
        if state is None:
            return
        if os.getpid() != state.pid:
            self._state = None
            self._finalizer.detach()
            state.end()
            return
        with self._lock:
            if self._state is None:
                return
            self._state = None
            self._finalizer.detach()
            thread, state.thread = state.thread, None
            state.end()
        self._join("UserFaultFd.close", thread)
        self._raise_error()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        try:
            self.close()
        except Exception as more:
            if error is None:
                raise
            error.add_note(f"and at the end of the `with`: {type(more).__name__}: {more}")  # the body's own comes first

    def __repr__(self) -> str:
        state = self._state
        if state is None:
            return "<UserFaultFd closed>"
        return f"UserFaultFd(fd={state.fd}, nr_ranges={len(state.ranges)}, serving={state.server!r})"

    def __reduce__(self) -> str:
        raise TypeError(f"{self!r} cannot be pickled: it is a file descriptor of this process")

    # ---- inside ----

    def _modes(self, call: str, mode: str | Iterable[str]) -> tuple[str, ...]:
        accepted = '"missing", "minor", "wp", "wp-async", or several of them'
        try:
            names = {mode} if isinstance(mode, str) else set(mode)
        except TypeError:
            raise ArgumentTypeError(call, "mode", mode, accepted) from None
        if not names or not names <= MODES.keys():
            raise ArgumentError(call, "mode", mode, accepted)
        if "wp-async" in names and not self._wp_async:
            raise ArgumentError(call, "mode", mode, None, "wp-async takes UserFaultFd(wp_async=True)")
        if "wp" in names and self._wp_async:
            raise ArgumentError(call, "mode", mode, None, "this object does wp-async: make another one for wp")
        return tuple(name for name in MODES if name in names)

    def _register_refused(self, error: int, mapping: Mapping, offset: int, modes: tuple[str, ...]) -> HvError:
        if error == errno.EINVAL:
            accepted = "anonymous memory (not for minor), a memfd, or hugetlbfs; for wp-async alone, any memory"
            return HostError(
                error, "ioctl(UFFDIO_REGISTER)", "mode", ", ".join(modes), accepted, f"{mapping!r} does not do it"
            )
        return self._refused("UFFDIO_REGISTER", error, {"offset": offset, "mapping": mapping})

    def _check(self, method: str, result: int) -> None:
        if result < 0:
            raise self._refused(method, -result, {})

    def _begin(self, call: str, state: State, server: str, who: int, *source: int) -> None:
        # With the lock held.
        if self._state is None:
            raise ClosedError(call, repr(self))
        if state.server:
            raise BusyError(call, repr(self), f"its faults are served ({state.server}); stop() first")
        if state.thread is not None and state.thread.is_alive():
            raise BusyError(call, repr(self), "the handler before has not come back; stop() waits for it")
        self._error = None
        error = lib.hv_uffd_serve(state.native, who, *(source or (0, -1, 0, 0)))
        if error < 0:
            raise self._refused(call, -error, {})
        state.server = server

    def _join(self, call: str, thread: Thread | None) -> None:
        if thread is None or thread.ident == get_ident():
            return
        thread.join(_JOIN_TIMEOUT)
        if thread.is_alive():
            raise BusyError(call, repr(self), f"its handler has not come back within {_JOIN_TIMEOUT:g} s")

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    # What the kernel's message means; None where its range is gone, and who waited woken.
    def _fault(self, state: State, out: hv_fault) -> Fault | None:
        for range_ in state.ranges[:]:
            if range_.start <= out.address < range_.end:
                kind = "wp" if out.flags & 2 else "minor" if out.flags & 4 else "missing"
                offset = out.address - range_.start + range_.offset
                return Fault(range_.mapping, offset, kind, bool(out.flags & 1), out.thread)
        return None

    # One fault, in the thread that serves.  Whatever happens, it is answered or given up.
    def _ask(self, state: State, handler: Handler, out: hv_fault) -> None:
        fault = self._fault(state, out)
        if fault is None:
            return
        page_size = fault.mapping.page_size
        self._question = question = Question(out.address & -page_size, page_size)
        try:
            data = handler(fault)
            if data is not None:
                self._bring(fault, data)
            if not question.answered:
                raise HvError(f"{self!r}: the handler {handler!r} returned without an answer to {fault!r}")
        except BaseException as error:  # noqa: BLE001  # whoever waits must not
            if question.withdrawn or self._state is None:
                return  # unregistered meanwhile: nobody waits any more, and there is nothing to be answered
            if not question.answered and isinstance(error, HostError) and error.errno == errno.EEXIST:
                # Another thread's fault has brought the page in.
                lib.hv_uffd_wake(state.native, question.address, page_size)
                return
            if not question.answered:
                lib.hv_uffd_give_up(state.native, out)
            if self._error is None:
                self._error = error
        finally:
            self._question = None

    def _bring(self, fault: Fault, data: Buffer) -> None:
        if fault.kind != "missing":
            answer = "continue_" if fault.kind == "minor" else "writeprotect"
            raise ArgumentError("UserFaultFd.serve", "data", "bytes", f"None, for a {fault.kind} fault, and {answer}()")
        view = memoryview(data).cast("B")
        mapping, page_size = fault.mapping, fault.mapping.page_size
        ranges = [r for r in self.registrations if r.mapping is mapping and r.offset <= fault.page < r.offset + r.size]
        wp = any(name.startswith("wp") for r in ranges for name in r.modes)
        at = 0
        while at < len(view) or not at:
            try:
                self.copy(mapping, fault.page + at, view[at:], wp=wp)
                return
            except HostError as error:
                # Pages that are there already are left as they are.
                if error.errno != errno.EEXIST or not isinstance(error.value, int):
                    raise
                at = error.value - fault.page
                self.wake(mapping, fault.page + at, page_size)
                at += page_size


def _serve(owner: ref[UserFaultFd], native: hv_uffd, handler: Handler) -> None:
    # The thread of serve().  It keeps the object only while a fault is answered.
    out = ffi.new("struct hv_fault *")
    lib.hv_uffd_server(native)
    while True:
        got = lib.hv_uffd_next(native, -1, 1, out)
        if got == -errno.EINTR:
            continue
        if got != 1:
            return
        uffd = owner()
        state = uffd._state if uffd is not None else None
        if uffd is None or state is None:
            return
        uffd._ask(state, handler, out)
        del uffd, state


def _readable(fd: int) -> int:
    # A descriptor of our own for a file that pread takes.
    try:
        os.pread(fd, 1, 0)
        return os.dup(fd)
    except OSError as error:
        raise HostError(
            error.errno or 0, "pread", "source", fd, "an open descriptor of a file that can be read at any offset"
        ) from None


def _now() -> float:
    from time import monotonic

    return monotonic()


def _seconds(call: str, field: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(call, field, value, "seconds, or None")
    if not 0 <= value < 1e9:
        raise ArgumentError(call, field, value, "0 <= seconds < 1e9, or None")
    return float(value)


def _patience(seconds: float | None) -> int:
    if seconds is None:
        return 0
    return max(int(_seconds("UserFaultFd", "patience", seconds) * 1e9), 1)
