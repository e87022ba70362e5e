"""A virtual CPU: its state by get/set pairs, and running it without races.

Running.  `run()` enters KVM_RUN through native/run.c, which decides on the return value of KVM_RUN alone, lets no
kick, signal or timeout slip between a last check and the entry, and hands back one integer per exit.  Equal integers
are equal exits, so most exits are looked up, not built.

Registers.  Those of an exit are in the kvm_run page, and those that `Cpu` writes are put there (native/run.c).  So
every ioctl on the vCPU first gives KVM what was written (`_settled`), and one that may change its state is announced
(`_changing`): what the page has is not believed any more.
"""

from __future__ import annotations

import errno
import sys

from .. import _ffi
from .._ffi import ffi, lib
from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    BusyError,
    ClosedError,
    ForkedError,
    HostError,
    PartialError,
    UnansweredError,
)
from ..finalizer import Finalizer
from ..value import Value
from . import cpuid, exits
from .handle import Handle, StructItem, _abandon, _rows, _uint
from .vm import _enable_cap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from .._native import (
        hv_vcpu,
        kvm_cpuid2,
        kvm_debugregs,
        kvm_fpu,
        kvm_guest_debug,
        kvm_lapic_state,
        kvm_mp_state,
        kvm_regs,
        kvm_run,
        kvm_sregs,
        kvm_sregs2,
        kvm_sync_regs,
        kvm_vcpu_events,
        kvm_xcrs,
        kvm_xsave,
    )
    from .batch import Batch
    from .cpuid import CpuidEntry
    from .exits import Exit
    from .handle import T
    from .vm import Vm

__all__ = ["Translation", "Vcpu", "get_msrs"]


# What a closed Vcpu runs: a struct hv_vcpu whose state is "closed" for ever, and a struct kvm_run of zeros.  The layout
# of that takes cffi half a millisecond: it is not asked for before it is needed.
_CLOSED = ffi.new("struct hv_vcpu *")
_CLOSED_EXIT = ffi.new("uint64_t[512]")
_CLOSED.exit = ffi.cast("struct kvm_run *", _CLOSED_EXIT)
_COMPLEX: int = lib.HV_WORD_COMPLEX
_KICK_WAIT_NS = 1_000_000
_CLOSE_WAIT_NS = 10_000_000_000
_MAX_TIMEOUT = 1e9
_XSAVE_SIZE = 4096
# They change what the state may be.
_LIMITING = frozenset({"KVM_SET_CPUID", "KVM_SET_CPUID2", "KVM_ENABLE_CAP", "KVM_X86_SETUP_MCE"})
_EHWPOISON = 133  # the errno module of Python 3.11 lacks it

_BETWEEN = (lib.HV_RETRY, lib.HV_RING_FULL, lib.HV_DIRTY)

_CAUSES = {
    lib.HV_KICKED: "kick",
    lib.HV_SIGNALED: "signal",
    lib.HV_TIMEOUT: "timeout",
    lib.HV_LIMIT: "limit",
    lib.HV_RECORDS_FULL: "records",
}


def _timeout_ns(call: str, timeout: object) -> int:
    # Seconds to nanoseconds; -1 for None.
    if timeout is None:
        return -1
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise ArgumentTypeError(call, "timeout", timeout, "seconds, or None")
    if not 0 <= timeout <= _MAX_TIMEOUT:
        raise ArgumentError(call, "timeout", timeout, f"0 to {_MAX_TIMEOUT:g} seconds, or None")
    return int(timeout * 1e9)


def _kick_at_exit() -> None:
    # Threads that run guests must end before the interpreter can.
    lib.hv_exiting()


def _abandon_vcpu(fd: int, what: str, pid: int, address: int) -> None:
    # The finalizer.  The kvm_run page, which keeps the VM alive, goes with the fd; at exit a guest may still run.
    lib.hv_vcpu_close(ffi.cast("struct hv_vcpu *", address), 0)
    _abandon(fd, what, pid)


_at_exit_registered: bool | None = None  # None: no; else whether behind the hook of concurrent.futures


def _register_at_exit() -> None:
    # threading joins its threads before atexit handlers run, and only its own hooks come earlier, the last one first.
    # That of concurrent.futures waits for its threads: ours must be called before it.
    global _at_exit_registered
    behind_futures = "concurrent.futures.thread" in sys.modules
    if _at_exit_registered is not None and _at_exit_registered >= behind_futures:
        return
    _at_exit_registered = behind_futures
    import threading

    register = getattr(threading, "_register_atexit", None)
    if register is None:
        import atexit

        register = atexit.register
    try:
        register(_kick_at_exit)
    except RuntimeError:  # the interpreter is exiting already
        _kick_at_exit()


class Translation(Value):
    """What KVM_TRANSLATE says of a guest virtual address.  KVM gives writeable 1 and usermode 0 always."""

    gpa: int
    valid: bool
    writeable: bool
    usermode: bool


class _PageField:
    # A field of the kvm_run page, copied while nobody runs the vCPU.
    def __init__(self, name: str, doc: str) -> None:
        self.__doc__ = doc
        self._name = name
        self._ctype = ""

    def _find(self) -> None:
        # At the first use.
        field = dict(ffi.typeof("struct kvm_run").fields or ())[self._name]
        self._offset = field.offset
        self._bits = 8 * ffi.sizeof(field.type)
        self._ctype = ffi.getctype(field.type, "*")

    def __get__(self, vcpu: Vcpu | None, owner: type) -> Any:
        if vcpu is None:
            return self
        if not self._ctype:
            self._find()
        value = ffi.new(self._ctype)
        vcpu._page_access(lib.hv_page_read, self._offset, value)
        return int(value[0])

    def __set__(self, vcpu: Vcpu, value: int) -> None:
        if not self._ctype:
            self._find()
        number = ffi.new(self._ctype, _uint(f"Vcpu.{self._name}", "value", value, self._bits))
        vcpu._page_access(lib.hv_page_write, self._offset, number)


class _Changing:
    # An ioctl that may change the vCPU's state, perhaps while another thread runs it.
    __slots__ = ("_c",)

    def __init__(self, vcpu: Vcpu) -> None:
        self._c = vcpu._c
        if self._c.dirty:
            vcpu._flush()

    def __enter__(self) -> None:
        lib.hv_begin(self._c)  # where it fails, so does the ioctl, and says why

    def __exit__(self, *_: object) -> None:
        lib.hv_end(self._c)


class _Got(StructItem["T"]):
    # A pair of ioctls of which getting changes nothing.
    def _fetch(self, handle: Handle) -> tuple[int, T]:
        assert isinstance(handle, Vcpu)
        handle._settle()
        return super()._fetch(handle)

    def _store(self, handle: Handle, value: T) -> int:
        assert isinstance(handle, Vcpu)
        with _Changing(handle):
            return super()._store(handle, value)


class _Taken(_Got["T"]):
    # One of which getting may: KVM_GET_MP_STATE accepts an INIT or SIPI, KVM_GET_VCPU_EVENTS delivers a payload
    # (linux:arch/x86/kvm/x86.c kvm_arch_vcpu_ioctl_get_mpstate, kvm_vcpu_ioctl_x86_get_vcpu_events@v6.18).
    def _fetch(self, handle: Handle) -> tuple[int, T]:
        assert isinstance(handle, Vcpu)
        with _Changing(handle):
            return super()._fetch(handle)


class _SregsItem(_Got["T"]):
    # Without an in-kernel APIC every entry loads CR8 from the kvm_run page: it would undo this one.
    def _store(self, handle: Handle, value: T) -> int:
        rc = super()._store(handle, value)
        if rc >= 0:
            assert isinstance(handle, Vcpu)
            lib.hv_write_cr8(handle._c, value.cr8)  # type: ignore[attr-defined]  # of kvm_sregs and kvm_sregs2
        return rc


class _XsaveItem(_Got["kvm_xsave"]):
    # KVM_SET_XSAVE reads as many bytes as KVM_CAP_XSAVE2 says: more than the struct has, where the process has asked
    # for AMX in guests (arch_prctl ARCH_REQ_XCOMP_GUEST_PERM).
    @staticmethod
    def _new(handle: Handle) -> kvm_xsave:
        size = max(handle._extension(lib.KVM_CAP_XSAVE2), _XSAVE_SIZE)
        return ffi.new("struct kvm_xsave *", {"extra": (size - _XSAVE_SIZE + 3) // 4})

    def _fetch(self, handle: Handle) -> tuple[int, kvm_xsave]:
        area = self._new(handle)
        if ffi.sizeof(area[0]) > _XSAVE_SIZE:
            return lib.kvm_get_xsave2(handle._fd, area), area
        return lib.kvm_get_xsave(handle._fd, area), area

    def _store(self, handle: Handle, value: kvm_xsave) -> int:
        area = self._new(handle)
        ffi.memmove(area, value, min(ffi.sizeof(area[0]), ffi.sizeof(value[0])))
        return super()._store(handle, area)


class Vcpu(Handle):
    """A virtual CPU, made by `Vm.create_vcpu()`.

    Thread safety: `run()` and what changes the vCPU from one thread at a time (a second runner gets BusyError);
    `kick()` from any thread.  Get and set ioctls of another thread wait in the kernel until the runner has left.

    `fd` and `fileno()` hand out the file descriptor: from then on anybody may change the vCPU's state past this object,
    so `Cpu` believes the registers of an exit no more and asks for them by ioctl.
    """

    scope = "vcpu"
    __slots__ = ("_address", "_batch", "_c", "_calm", "_is_exposed", "_synchronizer", "_state", "id")

    def __init__(self, fd: int, vm: Vm, id: int) -> None:
        self.id = id
        self._state: Any = None  # what hvmodel.state knows of it; None again when what the state may be has changed
        self._batch: Batch | None = None
        self._is_exposed = False
        self._calm: tuple[int, int] | None = (0, 0)  # see _has_calm
        self._synchronizer: Any = None  # hvmodel.state.sync.VcpuSync, of a later floor
        self._point(_CLOSED)
        super().__init__(fd, vm)
        try:
            out = ffi.new("struct hv_vcpu **")
            rc = lib.hv_vcpu_open(fd, vm._mmap_size, out)
            if rc < 0:
                raise HostError(-rc, "mmap", "fd", fd, None, "the kvm_run page of a vCPU")
        except BaseException:
            super().close()
            raise
        self._point(out[0])
        self._c.slots = vm._slots.native
        self._finalizer.detach()
        self._finalizer = Finalizer(self, _abandon_vcpu, fd, f"Vcpu {id} fd={fd}", self._pid, self._address)
        vm._vcpus[id] = self
        _register_at_exit()

    def _point(self, c: hv_vcpu) -> None:
        # The C side's struct, and its address for native/pyrun.c.
        self._c = c
        self._address = int(ffi.cast("uintptr_t", c))

    @property
    def vm(self) -> Vm:
        """The VM it belongs to."""
        vm: Vm = self._owner  # type: ignore[assignment]  # the base class knows it as a Handle
        return vm

    @property
    def fd(self) -> int:
        """The file descriptor; ClosedError after close().  See above what it costs to take it."""
        fd = self._settled()
        if not self._is_exposed:
            self._is_exposed = True
            lib.hv_begin(self._c)  # and never ended
        return fd

    def close(self) -> None:
        """Stop a runner if there is one, unmap the kvm_run page, close the fd.  May be called again.

        BusyError: the runner's thread did not leave KVM_RUN within 10 s.
        """
        if self.closed:
            return
        if lib.hv_vcpu_close(self._c, _CLOSE_WAIT_NS) < 0:
            raise BusyError("Vcpu.close", repr(self), "its thread does not leave KVM_RUN")
        self._point(_CLOSED)
        self._synchronizer = None
        self.vm._vcpus.pop(self.id, None)
        if self._batch is not None:
            self._batch._vcpu = None
            self._batch = None
        super().close()

    def __repr__(self) -> str:
        return f"<Vcpu {self.id} closed>" if self.closed else f"<Vcpu {self.id} fd={self._fd}>"

    # ---- running ----

    def run(self, timeout: float | None = None) -> Exit:
        """Run the guest until an exit; returns it (see hvmodel.kvm.exits).

        `timeout` in seconds, from now on; None: no limit.  Interrupted("kick" | "signal" | "timeout") where KVM_RUN
        was interrupted; a signal's Python handler has run by then (KeyboardInterrupt comes out of here).

        Raises UnansweredError where the last exit was a read that nobody answered, BusyError where another thread runs
        it, ForkedError in a child of os.fork, VmDeadError, ClosedError, and KvmError for the other refusals of KVM_RUN.

        Ioctl: KVM_RUN (4.10).
        """
        return self.run_until(self._deadline(timeout))

    def run_until(self, deadline_ns: int) -> Exit:
        """run() with a deadline: CLOCK_MONOTONIC (time.monotonic_ns) in ns; 0: none."""
        while (word := lib.hv_run_until(self._c, self._until(deadline_ns))) in _BETWEEN:
            try:
                self._between(word)
            except BaseException:
                lib.hv_run_ends(self._c)
                raise
        return self._exit(word)

    def _deadline(self, timeout: float | None) -> int:
        ns = _timeout_ns("Vcpu.run", timeout)
        return 0 if ns < 0 else lib.hv_monotonic_ns() + ns

    def _until(self, deadline_ns: int) -> int:
        return _uint("Vcpu.run_until", "deadline_ns", deadline_ns, 63)

    def _between(self, word: int) -> None:
        # Before the guest is entered again without an exit; Python's signal handlers have run.
        if word == lib.HV_RING_FULL:
            if self._batch is not None:
                self._batch._spill()
        elif word == lib.HV_DIRTY:
            self._flush()
        else:
            _register_at_exit()

    def _exit(self, word: int) -> Exit:
        # What is not looked up: exits with more in the kvm_run page, interruptions, refusals.
        if word < 0:
            return self._interrupted(word)
        if not word & _COMPLEX:
            return exits._simple(word)
        c = self._c
        if c is _CLOSED:  # by another thread, since the exit
            raise self._run_error(lib.HV_CLOSED)
        exit = exits.decode(c.exit, c.exit_size)
        if word & 0xFF == lib.KVM_EXIT_MMIO:
            return self._not_in_slot(exit)
        return exit

    def _not_in_slot(self, exit: Exit) -> Exit:
        # An MMIO exit inside a memslot: the host page could not be accessed, unless it is a write to a ROM.
        if not isinstance(exit, exits.MmioRead | exits.MmioWrite):
            return exit
        slot = self.vm._slots.at(exit.gpa)
        is_write = isinstance(exit, exits.MmioWrite)
        if slot is None or (is_write and slot.readonly):
            return exit
        data = exit.data if isinstance(exit, exits.MmioWrite) else None
        return exits.HostFault(exit.gpa, exit.size, is_write, data, slot.slot)

    def _interrupted(self, word: int) -> Exit:
        # Negative words but HV_RETRY: an interruption, one of the refusals that are exits, or an error.
        c = self._c
        if word == lib.HV_KICKED:
            c.acks = c.kicks  # with the GIL held: the kicker waits for this
        cause = _CAUSES.get(word)
        if cause is not None:
            return exits.Interrupted(cause)
        if word == -errno.EAGAIN:
            return exits.Again()
        if word in (-errno.EFAULT, -_EHWPOISON):
            if c.exit.exit_reason == lib.KVM_EXIT_MEMORY_FAULT:
                fault = c.exit.memory_fault
                return exits.MemoryFault(fault.gpa, fault.size, fault.flags, -word)
            if word == -errno.EFAULT:
                return exits.HostFault()
        raise self._run_error(word)

    def _run_error(self, word: int, call: str = "KVM_RUN") -> BaseException:
        if word == lib.HV_CLOSED:
            return ClosedError(call, repr(self))
        if word == lib.HV_BUSY:
            return BusyError(call, repr(self), "another thread runs it")
        if word == lib.HV_FORKED:
            return ForkedError(
                errno.EIO, call, None, None, "a VM made by this process", f"process {self._pid} made {self!r}"
            )
        if word == lib.HV_UNANSWERED:
            return UnansweredError(call, repr(exits.decode(self._c.exit, self._c.exit_size)))
        if word == lib.HV_EXITING:
            return SystemExit(f"{call}: the interpreter is exiting")
        if word == lib.HV_NO_TIMER:
            cure = "each thread that runs a vCPU has a timer: raise RLIMIT_SIGPENDING (ulimit -i)"
            return HostError(errno.EAGAIN, "timer_create", None, None, None, cure)
        detail = None
        if word == -errno.EINVAL:
            detail = "the register state is invalid, or kvm_valid_regs has a bit that KVM_CAP_SYNC_REGS does not"
        return self._refusal(call, -word, None, None, None, detail)

    def kick(self) -> bool:
        """Make the running, or else the next, `run()` return Interrupted("kick"); never lost, kicks do not add up.

        True: the runner's Python code has it; waits up to 1 ms for that, with the GIL released.  False: pending, the
        vCPU is not running, or left with an exit of its own.  Thread safety: any thread.
        """
        c = self._c
        acks = c.acks
        if not lib.hv_kick_send(c):
            return self._kick_closed() if c is _CLOSED else False
        return lib.hv_kick_wait(c, acks, _KICK_WAIT_NS) == 1

    def _kick_closed(self) -> bool:
        raise ClosedError("Vcpu.kick", repr(self))

    def answer(self, data: int | bytes) -> None:
        """Answer the read exit at hand: IoIn, MmioRead, RdMsr, HostFault of a read; or a Hypercall's result.

        An int answers every element, and must fit its size; bytes must be the whole answer (`size * count`).

        ArgumentError: no read is pending, the int does not fit, or the bytes are not that many.
        """
        if isinstance(data, int) and not isinstance(data, bool):
            if not 0 <= data < 1 << 64:
                raise ArgumentError("Vcpu.answer", "data", data, "0 to 2**64-1")
            rc = lib.hv_answer(self._c, data)
        elif isinstance(data, bytes | bytearray | memoryview):
            data = bytes(data)
            rc = lib.hv_answer_bytes(self._c, data, len(data))
        else:
            raise ArgumentTypeError("Vcpu.answer", "data", data, "an int or bytes")
        if rc == 0:
            return
        if rc in (lib.HV_CLOSED, lib.HV_BUSY):
            raise self._run_error(rc, "Vcpu.answer")
        if rc == -errno.EINVAL:
            raise ArgumentError("Vcpu.answer", "data", data, None, "no read exit waits for data")
        raise ArgumentError(
            "Vcpu.answer", "data", data, f"the size of {exits.decode(self._c.exit, self._c.exit_size)!r}"
        )

    def fail_msr(self) -> None:
        """Refuse the RdMsr or WrMsr exit at hand: the guest's instruction raises #GP."""
        rc = lib.hv_fail_msr(self._c)
        if rc == -errno.EINVAL:
            raise ArgumentError("Vcpu.fail_msr", "exit", None, "an RdMsr or WrMsr exit", "there is none at hand")
        if rc:
            raise self._run_error(rc, "Vcpu.fail_msr")

    def complete_io(self) -> None:
        """Finish the instruction of the last exit, without running on (KVM_RUN with immediate_exit).

        At an IO, MMIO or MSR exit a vCPU's state is complete only after this.  A further exit of the same instruction
        is kept, and the next run() returns it.  UnansweredError: it is a read without an answer.
        """
        rc = lib.hv_complete(self._c)
        if rc:
            raise self._run_error(rc)

    def _complete_for_change(self) -> None:
        # The same for who is about to change the state: a further exit that is a read must be answered first, or its
        # instruction would end upon the new state.
        if self._c.dirty:
            self._flush()
        rc = lib.hv_claim(self._c)
        if rc:
            raise self._run_error(rc)
        lib.hv_unclaim(self._c)

    @property
    def batch(self) -> Batch | None:
        """The Batch that serves exits in C, or None.  Set it while the vCPU is not running (else BusyError)."""
        return self._batch

    @batch.setter
    def batch(self, batch: Batch | None) -> None:
        from .batch import Batch

        if batch is not None and not isinstance(batch, Batch):
            raise ArgumentTypeError("Vcpu.batch", "batch", batch, "a Batch or None")
        if batch is not None and batch._vcpu not in (None, self):
            raise BusyError("Vcpu.batch", repr(batch), f"it serves {batch._vcpu!r}")
        rc = lib.hv_set_batch(self._c, ffi.NULL if batch is None else batch._batch)
        if rc:
            raise self._run_error(rc, "Vcpu.batch")
        if self._batch is not None:
            self._batch._vcpu = None
        self._batch = batch
        if batch is not None:
            batch._vcpu = self

    @property
    def _kvm_run(self) -> kvm_run:
        # The page itself, for tests: reading it after close() is a segmentation fault.
        if self._c is _CLOSED:
            raise ClosedError("Vcpu.kvm_run", repr(self))
        run: kvm_run = self._c.run
        return run

    request_interrupt_window = _PageField(
        "request_interrupt_window", "kvm_run: 1 asks for IrqWindowOpen as soon as the guest can take an interrupt."
    )
    ready_for_interrupt_injection = _PageField(
        "ready_for_interrupt_injection", "kvm_run: whether interrupt() may be called, as of the last exit."
    )
    if_flag = _PageField("if_flag", "kvm_run: RFLAGS.IF as of the last exit.")
    cr8 = _PageField(
        "cr8", "kvm_run: CR8 as of the last exit; set, it is loaded at the next entry (no in-kernel APIC)."
    )
    apic_base = _PageField(
        "apic_base", "kvm_run: the APIC base as of the last exit; set, it is loaded at the next entry."
    )
    kvm_valid_regs = _PageField(
        "kvm_valid_regs", "kvm_run: which of KVM_SYNC_X86_* every exit puts into sync_regs (KVM_CAP_SYNC_REGS)."
    )
    kvm_dirty_regs = _PageField(
        "kvm_dirty_regs", "kvm_run: which of KVM_SYNC_X86_* the next entry takes from sync_regs; KVM clears it then."
    )

    @property
    def sync_regs(self) -> kvm_sync_regs:
        """A copy of kvm_run.s.regs, the registers that came with the last exit; set, it is what kvm_dirty_regs names.

        Costs no ioctl.  BusyError: another thread runs the vCPU.
        """
        regs = ffi.new("struct kvm_sync_regs *")
        self._page_access(lib.hv_page_read, ffi.offsetof("struct kvm_run", "s"), regs)
        return regs

    @sync_regs.setter
    def sync_regs(self, regs: kvm_sync_regs) -> None:
        if not isinstance(regs, ffi.CData) or ffi.typeof(regs) != ffi.typeof("struct kvm_sync_regs *") or not regs:
            raise ArgumentTypeError("Vcpu.sync_regs", "value", regs, "a 'struct kvm_sync_regs *'")
        self._page_access(lib.hv_page_write, ffi.offsetof("struct kvm_run", "s"), regs)

    def _page_access(self, call: Any, offset: int, data: Any) -> None:
        rc = call(self._c, offset, ffi.cast("uint8_t *", data), ffi.sizeof(ffi.typeof(data).item))
        if rc:
            raise self._run_error(rc, "Vcpu.kvm_run")

    @property
    def has_exit_pending(self) -> bool:
        """Whether the last exit's instruction is unfinished until the next run() or complete_io()."""
        return bool(self._c.incomplete or self._c.held)

    # ---- state ----

    def ioctl(self, name: str, arg: Any = None) -> int:
        """Issue any ioctl of a vCPU by name; see Handle.ioctl."""
        with _Changing(self):
            try:
                return super().ioctl(name, arg)
            finally:
                if name in _LIMITING:
                    self._state = None

    def _has_calm(self) -> bool:
        # Whether no triple fault can wait: since the vCPU was made, or since that was last known, it has not run, and
        # no ioctl may have changed its state.  What is put without being announced (hvmodel.state) clears it.
        return self._calm == (self._c.runs, self._c.begun) and not self._is_exposed

    def _note_calm(self) -> None:
        self._calm = self._c.runs, self._c.begun

    def _changing(self) -> _Changing:
        return _Changing(self)

    def _settled(self) -> int:
        # The fd, for an ioctl that gets state and changes none.
        self._settle()
        return self._open_fd()

    def _settle(self) -> None:
        # KVM has what was written, be it registers or a whole state.
        if self._c.dirty:
            self._flush()
        lib.hv_settle(self._c)

    def _flush(self) -> None:
        # The state that hvmodel.state.sync has is put.
        if self._synchronizer is not None:
            self._synchronizer.flush()

    regs: StructItem[kvm_regs] = _Got(
        "KVM_GET_REGS", "KVM_SET_REGS", "kvm_regs", "General registers, RIP and RFLAGS (4.11, 4.12)."
    )
    sregs: StructItem[kvm_sregs] = _SregsItem(
        "KVM_GET_SREGS", "KVM_SET_SREGS", "kvm_sregs", "Segments, descriptor tables, control registers, EFER (4.13)."
    )
    sregs2: StructItem[kvm_sregs2] = _SregsItem(
        "KVM_GET_SREGS2", "KVM_SET_SREGS2", "kvm_sregs2", "As sregs, with the PDPTRs (KVM_CAP_SREGS2)."
    )
    fpu: StructItem[kvm_fpu] = _Got("KVM_GET_FPU", "KVM_SET_FPU", "kvm_fpu", "x87 and SSE state (4.22).")
    xsave: StructItem[kvm_xsave] = _XsaveItem(
        "KVM_GET_XSAVE",
        "KVM_SET_XSAVE",
        "kvm_xsave",
        "The XSAVE area (KVM_CAP_XSAVE): 4096 bytes, or as many as KVM_CAP_XSAVE2 says, got with KVM_GET_XSAVE2.",
    )
    xcrs: StructItem[kvm_xcrs] = _Got("KVM_GET_XCRS", "KVM_SET_XCRS", "kvm_xcrs", "XCR0 (KVM_CAP_XCRS).")
    debugregs: StructItem[kvm_debugregs] = _Got(
        "KVM_GET_DEBUGREGS", "KVM_SET_DEBUGREGS", "kvm_debugregs", "DR0 to DR3, DR6, DR7 (KVM_CAP_DEBUGREGS)."
    )
    vcpu_events: StructItem[kvm_vcpu_events] = _Taken(
        "KVM_GET_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS", "kvm_vcpu_events", "Pending and injected events (4.31)."
    )
    mp_state: StructItem[kvm_mp_state] = _Taken(
        "KVM_GET_MP_STATE", "KVM_SET_MP_STATE", "kvm_mp_state", "KVM_MP_STATE_*: runnable 0, halted 3, ... (4.38)."
    )
    lapic: StructItem[kvm_lapic_state] = _Got(
        "KVM_GET_LAPIC", "KVM_SET_LAPIC", "kvm_lapic_state", "The local APIC page; EINVAL without an in-kernel one."
    )
    guest_debug: StructItem[kvm_guest_debug] = _Got(
        None, "KVM_SET_GUEST_DEBUG", "kvm_guest_debug", "Breakpoints and single-stepping; can only be set (4.87)."
    )

    @property
    def tsc_khz(self) -> int:
        """Guest TSC frequency in kHz, up to 0x7fffffff (KVM_GET_TSC_KHZ).

        KVM_SET_TSC_KHZ: EINVAL where the host cannot scale.
        """
        return self._check("KVM_GET_TSC_KHZ", lib.kvm_get_tsc_khz(self._settled()))

    @tsc_khz.setter
    def tsc_khz(self, khz: int) -> None:
        value = _uint("KVM_SET_TSC_KHZ", "tsc_khz", khz, 31)  # more, and KVM_GET_TSC_KHZ would return it as an error
        with self._changing():
            rc = lib.kvm_set_tsc_khz(self._open_fd(), value)
        self._check("KVM_SET_TSC_KHZ", rc, "tsc_khz", khz, "the host's own frequency, or any with KVM_CAP_TSC_CONTROL")

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """KVM_GET_MSRS: MSR index -> value.  PartialError names the first MSR that KVM does not know or let read."""
        self._settle()
        return get_msrs(self, indices)

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_MSRS, in the order given.  PartialError names the first MSR refused; those before it are set."""
        call = "KVM_SET_MSRS"
        if not hasattr(values, "items"):
            raise ArgumentTypeError(call, "values", values, "a mapping of MSR index to value")
        rows = list(values.items())
        for first in range(0, len(rows), _MSR_CHUNK):
            chunk = rows[first : first + _MSR_CHUNK]
            table = ffi.new("struct kvm_msrs *", {"nmsrs": len(chunk), "entries": len(chunk)})
            for at, (index, value) in enumerate(chunk):
                table.entries[at].index = _uint(call, "index", index)
                table.entries[at].data = _uint(call, f"values[{index:#x}]", value, 64)
            with self._changing():
                done = self._check(call, lib.kvm_set_msrs(self._open_fd(), table))
            if done < len(chunk):
                raise PartialError(errno.EINVAL, call, first + done, len(rows), chunk[done][0], "index")

    def set_cpuid2(self, entries: Iterable[CpuidEntry] | kvm_cpuid2) -> None:
        """KVM_SET_CPUID2: what CPUID shows the guest; entries, or a `struct kvm_cpuid2 *` as Kvm hands it out.

        KvmError: EINVAL the vCPU has run and the leaves differ, or leaf 0x80000008 gives addresses of an unknown width;
        E2BIG more than 256.
        """
        call, is_calm = "KVM_SET_CPUID2", self._has_calm()
        table: Any = entries if isinstance(entries, ffi.CData) else cpuid._pack(call, entries)
        try:
            with self._changing():
                rc = lib.kvm_set_cpuid2(self._open_fd(), table)
                self._state = None
        except TypeError:
            raise ArgumentTypeError(call, "entries", entries, "CpuidEntry values or a 'struct kvm_cpuid2 *'") from None
        if is_calm:
            self._note_calm()
        detail = None
        if rc == -errno.EINVAL:
            detail = "once the vCPU has run they cannot change; leaf 0x80000008 has 48 or 57 bits of virtual address"
        self._check(call, rc, None, None, None, detail)

    def get_cpuid2(self) -> list[CpuidEntry]:
        """KVM_GET_CPUID2: the leaves as KVM keeps them, which may differ from what was set."""
        rc, table = cpuid._fetch(lambda t: lib.kvm_get_cpuid2(self._settled(), t))
        self._check("KVM_GET_CPUID2", rc)
        return cpuid._unpack(table)

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT: inject external interrupt `vector` (0 to 255) at the next entry; without in-kernel irqchip.

        The caller checks that the guest can take it (ready_for_interrupt_injection).  ENXIO: there is an
        in-kernel PIC.
        """
        arg = ffi.new("struct kvm_interrupt *", {"irq": _uint("KVM_INTERRUPT", "vector", vector)})
        with self._changing():
            rc = lib.kvm_interrupt(self._open_fd(), arg)
        self._check("KVM_INTERRUPT", rc, "vector", vector, "0 to 255")

    def nmi(self) -> None:
        """KVM_NMI: inject a non-maskable interrupt (KVM_CAP_USER_NMI).

        It is only asked for: the next KVM_RUN delivers it, so that `vcpu_events` and the guest's registers need not
        show anything of it before that has been run.  Source: linux:arch/x86/kvm/x86.c kvm_inject_nmi@v6.18.
        """
        with self._changing():
            self._check("KVM_NMI", lib.kvm_nmi(self._open_fd()))

    def smi(self) -> None:
        """KVM_SMI: inject a system management interrupt (KVM_CAP_X86_SMM).

        It is only asked for, as by `nmi()`: the next KVM_RUN delivers it.  Source: linux:arch/x86/kvm/smm.h
        kvm_inject_smi@v6.18.
        """
        with self._changing():
            self._check("KVM_SMI", lib.kvm_smi(self._open_fd()))

    def translate(self, gva: int) -> Translation:
        """KVM_TRANSLATE: where the guest's page tables lead from linear address `gva`; sets accessed bits."""
        arg = ffi.new("struct kvm_translation *", {"linear_address": _uint("KVM_TRANSLATE", "gva", gva, 64)})
        self._check("KVM_TRANSLATE", lib.kvm_translate(self._settled(), arg), "gva", gva)
        return Translation(arg.physical_address, bool(arg.valid), bool(arg.writeable), bool(arg.usermode))

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP on the vCPU; see Vm.enable_cap."""
        with self._changing():
            try:
                return _enable_cap(self, cap, args, flags)
            finally:
                self._state = None

    def stats_fd(self) -> int:
        """KVM_GET_STATS_FD: a new file descriptor of the vCPU's statistics; the caller's to close."""
        return self._check("KVM_GET_STATS_FD", lib.kvm_get_stats_fd(self._open_fd()))


_MSR_CHUNK = 255  # KVM takes fewer than 256 at once (linux:arch/x86/kvm/x86.c MAX_IO_MSRS@v6.18)


def get_msrs(handle: Handle, indices: Iterable[int]) -> dict[int, int]:
    """KVM_GET_MSRS on the system (feature MSRs) or a vCPU: MSR index -> value.

    PartialError names the first index that KVM does not know or let read.
    """
    call = "KVM_GET_MSRS"
    rows = _rows(call, "indices", indices, "MSR indices")
    values: dict[int, int] = {}
    for first in range(0, len(rows), _MSR_CHUNK):
        chunk = rows[first : first + _MSR_CHUNK]
        table = ffi.new("struct kvm_msrs *", {"nmsrs": len(chunk), "entries": len(chunk)})
        for at, index in enumerate(chunk):
            table.entries[at].index = _uint(call, f"indices[{first + at}]", index)
        done = handle._check(call, lib.kvm_get_msrs(handle._open_fd(), table))
        values |= {table.entries[at].index: table.entries[at].data for at in range(done)}
        if done < len(chunk):
            raise PartialError(errno.EINVAL, call, first + done, len(rows), chunk[done], "index")
    return values


# run(), run_until() and kick() as C methods, for the common path; what stands above says what they do.
_SIGNATURES = {"run": "($self, /, timeout=None)", "run_until": "($self, deadline_ns, /)", "kick": "($self, /)"}
_ffi.run.install(
    Vcpu, {name: f"{name}{text}\n--\n\n{getattr(Vcpu, name).__doc__}" for name, text in _SIGNATURES.items()}
)
