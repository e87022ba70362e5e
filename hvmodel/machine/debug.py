"""Breakpoints, watchpoints and single steps of a machine's vCPU, by KVM_SET_GUEST_DEBUG.

Owns what is set, the debug registers that it takes, and the bytes that stand in RAM for it while the guest runs.

    DR7   31  30 29  28   19  18 17  16          10  9   8   7  6   1  0
         +------+------+ +------+------+ +------+---+---+---+--+--+ +--+--+
         | LEN3 | RW3  |.| LEN0 | RW0  | |      | 1 |GE |LE |G3|L3|.|G0|L0|     KVM sets the host's DR0-DR3 and DR7
         +------+------+ +------+------+ +------+---+---+---+--+--+ +--+--+     instead of the guest's (USE_HW_BP)
         RW: 0 execute, 1 write, 3 access;  LEN: 0 one byte, 1 two, 3 four, 2 eight

    DR6   bits 0-3: DR0-DR3 hit;  14 BS: single step

How a run goes.  Where the vCPU stands at a breakpoint that was reported, its instruction is stepped first, with nothing
set.  Then the debug registers are armed and the bytes planted, the guest runs, and the bytes are put back, whatever
came.  An exit of ours gets its `hits`; a #DB or #BP that is the guest's own is handed to the guest.

Sources: linux:arch/x86/kvm/x86.c kvm_arch_vcpu_ioctl_set_guest_debug, kvm_vcpu_do_singlestep, __kvm_set_rflags@v6.18;
qemu:target/i386/kvm/kvm.c kvm_arch_update_guest_debug, kvm_handle_debug@v7.2; Intel SDM vol. 3 section 18.2.
"""

from __future__ import annotations

import errno
from threading import Lock

from .._ffi import ffi, lib
from ..errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, HvError, UnsupportedError
from ..kvm.exits import (
    Again,
    Debug,
    Hlt,
    HostFault,
    Interrupted,
    IoIn,
    IoOut,
    MemoryFault,
    MmioRead,
    MmioWrite,
    RdMsr,
    WrMsr,
)
from ..value import Value
from .cpu import MAX_INSN
from .machine import _PREFIXES, _REX, _rep_opcode
from .qualify import KINDS, MODES, mode_name, qualify

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias, TypeGuard

    from ..kvm.exits import Exit
    from ..ram.block import RamBlock
    from ..state.values import Regs, Sregs
    from .cpu import Cpu
    from .machine import Machine

__all__ = ["Breakpoint", "Debugger", "Watchpoint", "debugger"]

_DB, _BP = 1, 3  # vectors
_DR6_BS = 0x4000
_DR6_FIXED = 0xFFFF0FF0  # the bits that read as 1
_DR6_GUESTS = 0xE000  # BD, BS, BT: causes of a #DB that no debug register of ours is
_DR7_FIXED = 0x600  # bit 10, GE
_LEN = {1: 0, 2: 1, 4: 3, 8: 2}
_RW = {"w": 1, "rw": 3}
_NR_DEBUG_REGISTERS = 4
_MOST_TRIES = 100  # to put back a byte
_CPL_0 = ("real", "protected", "compat", "long")
_TF = 0x100
_EFER_LMA = 0x400
_TRAPS = {"software": 0xCC, "hlt": 0xF4}  # int3, HLT
_CODE_KINDS = ("hardware", *_TRAPS)
_UNREAD = 2  # HELD_UNREAD of native/run.c
_STRINGS = (*range(0x6C, 0x70), *range(0xA4, 0xA8), *range(0xAA, 0xB0))  # INS, OUTS, MOVS, CMPS, STOS, LODS, SCAS
_POPF, _IRET = b"\x9d", b"\xcf"
_POPS = (_POPF, _IRET)  # they set TF
_INTS = (b"\xcc", b"\xcd", b"\xce", b"\xf1")  # INT3, INT, INTO, INT1: they clear it, and no trap follows
_GUESTS_OWN = (IoIn, IoOut, MmioRead, MmioWrite, RdMsr, WrMsr)  # exits that an instruction goes on after
_NO_EXITS = (Again, HostFault, Interrupted, MemoryFault)  # which KVM_RUN did not return 0 for
_EXCLUSIVE = "another thread runs the vCPU, or this is called by what its run has called"


class Breakpoint(Value):
    """A place in the guest's code to stop at: linear `address`, `kind` "hardware", "software" or "hlt"."""

    address: int
    kind: str


class Watchpoint(Value):
    """`size` bytes of the guest's memory at linear `address`, to stop behind an `access`: "w" write, "rw" any."""

    address: int
    size: int
    access: str

    @property
    def kind(self) -> str:
        """The kind of stop that it is, as qualify() has it: "watch-w" or "watch-rw"."""
        return f"watch-{self.access}"


if TYPE_CHECKING:
    Point: TypeAlias = Breakpoint | Watchpoint
    # Where a byte was planted: block, offset in it, the guest's own byte, the planted one.
    Planted: TypeAlias = tuple[RamBlock, int, int, int]


def debugger(cpu: Cpu) -> Debugger:
    """The debugger of a machine's vCPU; made at the first call."""
    if cpu._debugger is None:
        if cpu._machine is None:
            raise ArgumentError("debugger", "cpu", cpu, "the vCPU of a Machine")
        cpu._debugger = Debugger(cpu, cpu._machine)
    return cpu._debugger


class Debugger:
    """What the methods of a `Cpu` set, and the runs that stop for it.

    Thread safety: one thread at a time, that which runs the vCPU; another gets BusyError.
    """

    def __init__(self, cpu: Cpu, machine: Machine) -> None:
        self._cpu, self._kvm, self._machine = cpu, cpu.kvm, machine
        self._points: list[Point] = []
        self._gpas: dict[Point, int] = {}  # of those that are bytes in RAM
        self._slots: list[Point] = []  # what DR0, DR1, … stand for in the run at hand
        self._traps: list[Breakpoint] = []  # which bytes were planted for it
        self._planted: list[Planted] = []  # and have not been put back
        self._control: tuple[int, ...] = (0,) * 9  # what KVM has: the control word and eight debug registers
        self._passed: int | None = None  # linear address of an instruction whose breakpoints were reported
        self._left: int | None = None  # instructions still to step; None: a run
        self._unfinished = False  # an instruction that was stepped waits to be finished
        self._stepping = False  # an instruction is stepped, or was when a signal's handler raised
        self._lock = Lock()  # who changes what is set, or runs with it
        self._exit: Exit | None = None  # of KVM, until it is handed out
        self._is_rewound = False  # RIP stands at the HLT of that exit again
        flags = max(cpu.kvm.vm.check_extension(lib.KVM_CAP_SET_GUEST_DEBUG2), 0)
        self._step = lib.KVM_GUESTDBG_SINGLESTEP | (flags & lib.KVM_GUESTDBG_BLOCKIRQ)

    def _alone(self, call: str) -> Lock:
        # To be held with `with`, which no signal's handler comes between.
        if self._lock.locked():
            raise BusyError(call, repr(self._cpu), _EXCLUSIVE)
        return self._lock

    # ---- what is set ----

    @property
    def points(self) -> tuple[Point, ...]:
        """All that is set, in the order in which it was added."""
        return tuple(self._points)

    def add_breakpoint(self, address: int, kind: str, mode: str | None) -> Breakpoint:
        """See Cpu.add_breakpoint."""
        call = "add_breakpoint"
        _check_address(call, address)
        if kind not in _CODE_KINDS:
            raise ArgumentError(call, "kind", kind, f"one of {', '.join(_CODE_KINDS)}")
        with self._alone(call):
            there = [point for point in self._points if isinstance(point, Breakpoint) and point.address == address]
            if there:
                raise ArgumentError(call, "address", address, "an address without a breakpoint", f"it has {there[0]!r}")
            point = Breakpoint(address, kind)
            self._qualify(call, point, mode)
            if kind in _TRAPS:
                self._gpas[point] = self._backing(call, address)
            self._points.append(point)
        return point

    def add_watchpoint(self, address: int, size: int, access: str, mode: str | None) -> Watchpoint:
        """See Cpu.add_watchpoint."""
        call = "add_watchpoint"
        _check_address(call, address)
        if isinstance(size, bool) or not isinstance(size, int):
            raise ArgumentTypeError(call, "size", size, "an int")
        if size not in _LEN:
            raise ArgumentError(call, "size", size, "1, 2, 4 or 8 bytes")
        if address % size:
            raise ArgumentError(call, "address", address, f"a multiple of size={size}")
        if access not in tuple(_RW):  # whatever it is, a dict would want it hashable
            raise ArgumentError(call, "access", access, '"w" or "rw"')
        with self._alone(call):
            point = Watchpoint(address, size, access)
            if point in self._points:
                raise ArgumentError(call, "address", address, "an address without such a watchpoint")
            self._qualify(call, point, mode)
            self._points.append(point)
        return point

    def _qualify(self, call: str, point: Point, mode: str | None) -> None:
        # Whether the host can stop for it, where the guest will be then.
        self._machine._check_open(call)
        if mode is None:
            mode = self._where().mode
        elif mode not in MODES:
            raise ArgumentError(call, "mode", mode, f"one of {', '.join(MODES)}")
        assert point.kind in KINDS
        qualify().require(call, mode, point.kind)
        if point.kind == "hlt" and self._has_irqchip():
            detail = "HLT waits in the kernel and does not exit, for the VM has an irqchip there"
            raise UnsupportedError(errno.EOPNOTSUPP, call, None, None, "another kind", detail)
        if point.kind not in _TRAPS:
            taken = [other for other in self._points if other.kind not in _TRAPS]
            if len(taken) >= _NR_DEBUG_REGISTERS:
                raise BusyError(call, "DR0 to DR3", f"they stand for {', '.join(map(repr, taken))}")

    def _has_irqchip(self) -> bool:
        try:
            return bool(self._kvm.lapic)
        except HvError:
            return False

    def _backing(self, call: str, address: int) -> int:
        # The gpa of one byte of code, which must be in RAM that can be written.
        accepted = "the address of an instruction in RAM"
        found = self._kvm.translate(address)
        if not found.valid:
            raise ArgumentError(call, "address", address, accepted, "the guest's page tables do not map it")
        try:
            block, offset = self._machine._find(call, found.gpa, 1)
        except ArgumentError:
            raise ArgumentError(call, "address", address, accepted, f"it leads to {found.gpa:#x}") from None
        block.write(offset, block.read(offset, 1))
        return found.gpa

    def remove_breakpoint(self, breakpoint: Breakpoint | int) -> None:
        """See Cpu.remove_breakpoint."""
        self._remove("remove_breakpoint", "breakpoint", Breakpoint, breakpoint)

    def remove_watchpoint(self, watchpoint: Watchpoint | int) -> None:
        """See Cpu.remove_watchpoint."""
        self._remove("remove_watchpoint", "watchpoint", Watchpoint, watchpoint)

    def _remove(self, call: str, field: str, kind: type[Point], which: object) -> None:
        if isinstance(which, bool) or not isinstance(which, int | kind):
            raise ArgumentTypeError(call, field, which, f"a {kind.__name__} or its address")
        with self._alone(call):
            for point in self._points:
                if isinstance(point, kind) and which in (point, point.address):
                    break
            else:
                there = [repr(point) for point in self._points if isinstance(point, kind)]
                raise ArgumentError(call, field, which, ", ".join(there) or None, "there is no such one")
            self._points.remove(point)
            self._gpas.pop(point, None)
            if not self._points and not self._machine.closed:
                self._arm(False, None)

    # ---- running ----

    def step(self, n: int, timeout: float | None) -> Exit:
        """See Cpu.step."""
        if isinstance(n, bool) or not isinstance(n, int):
            raise ArgumentTypeError("step", "n", n, "a number of instructions")
        if n < 1:
            raise ArgumentError("step", "n", n, "at least 1")
        if self._left is not None:
            raise BusyError("step", repr(self._cpu), _EXCLUSIVE)
        self._alone("step")
        exits = self._machine.exits(timeout)
        try:
            self._left = n
            return next(exits)
        finally:
            self._left = None
            # Else KVM hides RFLAGS.TF, and a run that is not the machine's would step.
            if not self._unfinished and not self._machine.closed:
                self._arm(False, self._passed)

    def run_until(self, deadline_ns: int) -> Exit:
        """Vcpu.run_until with all that is set; the machine's runs call it."""
        with self._alone("KVM_RUN"):
            if self._left is None and not self._points and not self._unfinished and not self._planted:
                return self._kvm.run_until(deadline_ns)
            exit = self._exit = None
            try:
                while exit is None:
                    is_plain = self._left is None and self._passed is None and not self._unfinished
                    if not is_plain or self._kvm._c.held == _UNREAD:
                        exit = self._further(deadline_ns)
                    if exit is None:
                        exit = self._run(deadline_ns) if self._left is None else self._stepped(deadline_ns)
                return exit
            except HvError:
                raise
            except BaseException:  # a signal's handler
                self._come_again()
                raise

    def _come_again(self) -> None:
        # Nobody has seen the last exit: it is the next run's.
        exit = self._exit
        if exit is None or self._machine.closed:
            return
        self._passed = None
        if isinstance(exit, _NO_EXITS) or _is_step(exit):
            return
        if type(exit) is Hlt and (self._is_rewound or self._trapped(self._hlt_pc(), "hlt")):
            self._rewind()
        else:
            lib.hv_unread(self._kvm._c)

    def _further(self, deadline: int) -> Exit | None:
        # Finish the instruction of the last exit.  What it still brings, but for the end of its step, which was
        # counted at its first exit: not every KVM tells of it (none at a write that KVM emulates).
        kvm = self._kvm
        while self._is_pending():
            if kvm._c.held == _UNREAD:  # of a run that a signal's handler ended: it comes first
                self._exit = kvm.run_until(deadline)
                exit = self._ours(self._exit)
                if exit is not None:
                    return exit
                continue
            kvm.complete_io()
            if not self._is_pending():
                break
            if not self._unfinished:
                return None  # the run brings it
            exit = self._enter(True, None, deadline)
            if _is_step(exit):
                hits = self._of_registers(exit)
                self._unfinished = False
                return self._hit(exit, hits) if hits else None
            if not _is_limit(exit):
                return exit
        self._unfinished = False
        return None

    def _is_pending(self) -> bool:
        return self._kvm.has_exit_pending

    def _run(self, deadline: int) -> Exit | None:
        # To the next exit; None: go on.
        if self._passed is not None:
            here = self._where()
            if here.at == self._passed and self._points_at(here.at):
                return self._pass(here, deadline)
            self._passed = None
        return self._ours(self._enter(False, None, deadline))

    def _pass(self, here: _Here, deadline: int) -> Exit | None:
        # Execute an instruction whose breakpoints were reported; None: that was all.
        exit, _ = self._one(here, deadline)
        if exit is None or not _is_step(exit):
            return exit if exit is None else self._ours(exit)
        # A string instruction that repeats is passed as a whole.
        if exit.pc != here.at or not self._repeats(here):
            self._passed = None
        hits = self._of_registers(exit)
        return self._hit(exit, hits) if hits else None

    def _stepped(self, deadline: int) -> Exit | None:
        # One instruction of a step; None: go on.
        assert self._left is not None
        here = self._where()
        stop = Debug(_DB, here.at, _DR6_FIXED | _DR6_BS, 0)  # where the exits of the last one were served
        if self._left:
            exit, is_done = self._one(here, deadline)
            self._left -= is_done
            if exit is None or not _is_step(exit):
                return exit if exit is None else self._ours(exit)
            stop = exit
        hits = self._of_registers(stop)
        hits += tuple([point for point in self._points_at(stop.pc) if point not in hits])
        if not hits and self._left:
            return None
        self._passed = stop.pc
        return self._hit(stop, hits)

    def _one(self, here: _Here, deadline: int) -> tuple[Exit | None, bool]:
        # Step the instruction: its exit, and whether it is executed as far as is known.  None: C served its exit.
        at = here.at
        call = "step" if self._left is not None else "KVM_RUN"
        qualify().require(call, here.mode, "step")
        insn = self._cpu._fetch(at, MAX_INSN)
        opcode = insn.lstrip(_PREFIXES + _REX if here.is_long else _PREFIXES)[:1]
        to: int | None = None
        if opcode == _IRET and here.is_long:
            frame = self._cpu._fetch(here.linear_sp(), 16)
            to = int.from_bytes(frame[:8], "little")
            if frame[8:9] and frame[8] & 3 == 3 and here.mode == "long":
                qualify().require(call, "long-user", "step")
        is_own = bool(here.regs.rflags & _TF)
        own_trap = is_own and opcode not in _INTS and not self._has_event()
        popped = here.popped_flags(insn, opcode, self._cpu._fetch) if opcode in _POPS else 0
        # A HLT is run, for it exits itself: stepped by KVM's emulator it does not, but makes a later instruction exit
        # so (linux:arch/x86/kvm/x86.c emulator_halt, halt_request@v6.18).
        is_hlt = opcode == b"\xf4" and here.mode in _CPL_0 and not self._has_event()
        exit = self._enter(True, at, deadline, to, is_hlt)
        if _is_step(exit):
            has_trap = bool(popped & _TF) if opcode in _POPS else own_trap
            try:
                self._settle_flags(here, opcode, exit.pc, has_trap, own_trap)
            except BaseException:  # a signal's handler: the guest has KVM's TF
                self._settle_flags(here, opcode, exit.pc, has_trap, own_trap)
                raise
            return exit, True
        if _is_limit(exit):
            self._unfinished = True
            return None, True
        if isinstance(exit, Interrupted):
            return exit, False
        self._unfinished = isinstance(exit, _GUESTS_OWN)
        return exit, True

    def _enter(self, is_step: bool, at: int | None, deadline: int, to: int | None = None, is_hlt: bool = False) -> Exit:
        # One KVM_RUN with what is set, but for the code breakpoints at `at`; of one instruction, which goes on at `to`
        # where that is given, or to the next exit.
        batch, limit = self._machine._batch, 0
        self._put_back()
        self._traps = []
        self._arm(is_step, at, to=to, is_hlt=is_hlt)
        try:
            if is_step:
                if batch is not None:
                    limit = batch._max_exits
                    batch.configure(max_exits=1)
            else:
                self._plant(at)
            self._stepping = is_step
            self._exit, self._is_rewound = None, False
            self._exit = exit = self._kvm.run_until(deadline)
            self._stepping = False
            if to is not None and type(exit) is Debug and exit.exception == _DB and exit.pc == to:
                exit = Debug(_DB, to, exit.dr6 | _DR6_BS, exit.dr7)
            return exit
        finally:
            try:
                self._put_back()
            except BaseException:  # a signal's handler, before the first byte was put back
                self._put_back()
                raise
            if is_step and batch is not None and not self._machine.closed:
                batch.configure(max_exits=limit)

    def _where(self) -> _Here:
        # As they came with the exit, and as they were written since: no ioctl.
        regs, sregs = self._cpu.regs, self._cpu.sregs
        mode = mode_name(regs, sregs)
        at = regs.rip if mode.startswith("long") else (sregs.cs.base + regs.rip) & 0xFFFFFFFF
        return _Here(regs, sregs, mode, at)

    # ---- what stands for it ----

    def _arm(self, is_step: bool, at: int | None, inject: int = 0, to: int | None = None, is_hlt: bool = False) -> None:
        # KVM_SET_GUEST_DEBUG, where it would change something.  A step needs it each time: KVM puts RFLAGS.TF back only
        # for the RIP that it saw then.
        points = [point for point in self._points if isinstance(point, Watchpoint) or point.address != at]
        self._slots = [point for point in points if point.kind not in _TRAPS]
        if is_step:
            # A step may go further than one instruction: one that faults takes the first one of the handler with it,
            # and KVM's IRETQ on kvm_pvm what it returns to.  Nothing is planted then, so free registers stand in.
            others = [point for point in points if point.kind in _TRAPS]
            if to is not None:
                others.insert(0, Breakpoint(to, "step"))
            self._slots = [*self._slots, *others][:_NR_DEBUG_REGISTERS]
        control, registers = inject, [0] * 8
        if self._slots:
            control |= lib.KVM_GUESTDBG_USE_HW_BP
            registers[7] = _DR7_FIXED
            for number, point in enumerate(self._slots):
                registers[number] = point.address
                registers[7] |= 2 << 2 * number
                if isinstance(point, Watchpoint):
                    registers[7] |= (_RW[point.access] | _LEN[point.size] << 2) << (16 + 4 * number)
        if is_step:
            control |= 0 if is_hlt else self._step
        elif "software" in [point.kind for point in self._points]:
            control |= lib.KVM_GUESTDBG_USE_SW_BP
        if control:
            control |= lib.KVM_GUESTDBG_ENABLE
        wanted = (control, *registers)
        if is_step or inject or wanted != self._control:
            debug = ffi.new("struct kvm_guest_debug *", {"control": control, "arch": {"debugreg": registers}})
            self._kvm.guest_debug = debug
            self._control = (control & ~inject, *registers)

    def _plant(self, at: int | None) -> None:
        # A byte for each breakpoint that is one, but for those at `at`.  What is no RAM any more has none.
        for point, gpa in self._gpas.items():
            if point.address == at:
                continue
            try:
                block, offset = self._machine._find("KVM_RUN", gpa, 1)
            except ArgumentError:
                continue
            assert isinstance(point, Breakpoint)
            trap = _TRAPS[point.kind]
            self._planted.append((block, offset, block.read(offset, 1)[0], trap))
            block.write(offset, bytes((trap,)))
            self._traps.append(point)

    def _put_back(self) -> None:
        # The guest's own bytes, the last one planted first; all of them, also where a signal's handler raises.  What
        # the guest has written over ours is its own.  A byte that cannot be put back after _MOST_TRIES stays known,
        # with those planted in the same place before: the next run or step begins here, and with no more success does
        # not begin.
        failed: BaseException | None = None
        at, tries = len(self._planted) - 1, 0
        left: list[tuple[RamBlock, int]] = []
        while at >= 0:
            try:
                block, offset, own, trap = self._planted[at]
                if (block, offset) not in left:
                    try:
                        if block.read(offset, 1)[0] == trap:
                            block.write(offset, bytes((own,)))
                    except ClosedError:
                        pass
                    except HvError as error:
                        failed = error
                    del self._planted[at]
                at, tries = at - 1, 0
            except BaseException as error:  # noqa: BLE001  # raised by a signal's handler, or MemoryError: once more
                failed, tries = error, tries + 1
                if at >= len(self._planted):  # it came when all was done
                    at, tries = at - 1, 0
                elif tries >= _MOST_TRIES:
                    left.append(self._planted[at][:2])
                    at, tries = at - 1, 0
        if failed is not None:
            raise failed

    # ---- whose stop it is ----

    def _ours(self, exit: Exit) -> Exit | None:
        # An exit of a run: with its hits; or None where it was a trap of the guest's own.
        if self._stepping:
            self._stepping = False
            if _is_step(exit):  # that nobody has seen yet
                return self._hit(exit, self._of_registers(exit))
        if type(exit) is Debug and self._control[0]:
            if exit.exception == _BP:
                code = self._trapped(exit.pc, "software")
                if code:
                    self._passed = exit.pc
                    return self._hit(exit, code)
                self._arm(False, None, lib.KVM_GUESTDBG_INJECT_BP)
                self._exit = None
                return None
            hits = self._of_registers(exit)
            if hits:
                if Breakpoint in map(type, hits):
                    self._passed = exit.pc
                return self._hit(exit, hits)
            self._give(exit.dr6)
            self._exit = None
            return None
        if type(exit) is Hlt and self._traps:
            pc = self._hlt_pc()
            code = self._trapped(pc, "hlt")
            if code:
                self._rewind()
                self._passed = pc
                return Debug(_BP, pc, _DR6_FIXED, 0, code)
        return exit

    def _hlt_pc(self) -> int:
        # The linear address of the HLT that has exited.
        here = self._where()
        return (here.at - 1) & (0xFFFFFFFFFFFFFFFF if here.is_long else 0xFFFFFFFF)

    def _rewind(self) -> None:
        # Back to the instruction that the HLT stands for.
        if not self._is_rewound:
            rip = (self._cpu.rip - 1) & 0xFFFFFFFFFFFFFFFF
            self._cpu.rip, self._is_rewound = rip, True  # no handler runs between the two

    def _hit(self, exit: Debug, hits: tuple[Point, ...]) -> Debug:
        return Debug(exit.exception, exit.pc, exit.dr6, exit.dr7, hits)

    def _of_registers(self, exit: Debug) -> tuple[Point, ...]:
        # What DR6 says was hit.
        hits = [point for number, point in enumerate(self._slots) if exit.dr6 >> number & 1]
        return tuple([point for point in hits if point in self._points])

    def _trapped(self, pc: int, kind: str) -> tuple[Point, ...]:
        # The breakpoints whose planted byte was executed at `pc`, which may be another address of the same RAM.
        traps = [point for point in self._traps if point.kind == kind]
        found = [point for point in traps if point.address == pc]
        if traps and not found:
            gpa = self._kvm.translate(pc)
            found = [point for point in traps if gpa.valid and self._gpas[point] == gpa.gpa]
        return tuple(found)

    def _points_at(self, at: int) -> tuple[Point, ...]:
        # The breakpoints of the instruction at `at`.
        found: list[Point] = [p for p in self._points if isinstance(p, Breakpoint) and p.address == at]
        others = [point for point in self._gpas if point not in found]
        if others:
            gpa = self._kvm.translate(at)
            found += [point for point in others if gpa.valid and self._gpas[point] == gpa.gpa]
        return tuple(found)

    def _repeats(self, here: _Here) -> bool:
        # Whether the instruction is a string instruction with REP.
        return _rep_opcode(self._cpu._fetch(here.at, MAX_INSN), here.is_long) in _STRINGS

    def _has_event(self) -> bool:
        # Whether the guest takes an exception or interrupt before its next instruction.
        events = self._kvm.vcpu_events
        exception, nmi = events.exception, events.nmi
        waits = exception.pending, exception.injected, events.interrupt.injected, nmi.pending, nmi.injected
        return any(waits)

    def _give(self, dr6: int) -> None:
        # A #DB that is the guest's own, with its cause in the guest's DR6.
        registers = self._kvm.debugregs
        registers.dr6 |= dr6 & _DR6_GUESTS
        self._kvm.debugregs = registers
        self._arm(False, None, lib.KVM_GUESTDBG_INJECT_DB)

    def _settle_flags(self, before: _Here, opcode: bytes, pc: int, has_trap: bool, is_due: bool) -> None:
        # Behind a step, which KVM makes with RFLAGS.TF: in the guest's memory the flag is what it was, and the guest's
        # own flag, which KVM has taken for the step's, is there again, with the trap that was to follow.
        if not before.regs.rflags & _TF:
            self._hide_trap_flag(before, opcode, pc)
        if has_trap:
            self._arm(False, None)
            self._cpu.rflags |= _TF
        if is_due and not self._has_event():
            self._give(_DR6_BS)

    def _hide_trap_flag(self, before: _Here, opcode: bytes, pc: int) -> None:
        # KVM steps with RFLAGS.TF.  Where the instruction has pushed the flags (PUSHF, INT, a fault), TF can be among
        # them, and would be the guest's own after POPF or IRET.
        if opcode == b"\x9c":
            stack = self._where()
            self._clear_tf(stack.linear_sp())
        elif not 0 < pc - before.at <= MAX_INSN:
            slot, size = before.flags_slot(self._where().sregs, self._cpu._fetch)
            frame = self._cpu._fetch(slot - 2 * size, 2 * size)
            rip, cs = (int.from_bytes(part, "little") for part in (frame[:size], frame[size : size + 2]))
            if frame and 0 <= rip - before.regs.rip <= MAX_INSN and cs == before.sregs.cs.selector:
                self._clear_tf(slot)

    def _clear_tf(self, flags: int) -> None:
        # In flags that lie at this linear address.
        there = self._kvm.translate((flags + 1) & 0xFFFFFFFFFFFFFFFF)
        if there.valid:
            try:
                byte = self._machine.read(there.gpa, 1)[0]
                if byte & _TF >> 8:
                    self._machine.write(there.gpa, bytes((byte & ~(_TF >> 8),)))
            except ArgumentError:  # a stack outside RAM
                pass


class _Here(Value):
    # Where a vCPU stands: its registers, its mode, the linear address of its next instruction.
    regs: Regs
    sregs: Sregs
    mode: str
    at: int

    @property
    def is_long(self) -> bool:
        return self.mode.startswith("long")

    def linear_sp(self, below: int = 0) -> int:
        # The linear address `below` bytes below the top of the stack.
        sp, stack = self.regs.rsp - below, self.sregs.ss
        return sp if self.is_long else (stack.base + (sp & (0xFFFFFFFF if stack.db else 0xFFFF))) & 0xFFFFFFFF

    def popped_flags(self, insn: bytes, opcode: bytes, fetch: Callable[[int, int], bytes]) -> int:
        # What POPF takes for flags, or IRET, behind RIP and CS.
        prefixes = insn[: insn.index(opcode)]
        if self.is_long:
            is_wide = opcode == _POPF or any(byte & 8 and byte in _REX for byte in prefixes[-1:])
            size = 8 if is_wide else 4
        else:
            size = 4 if self.sregs.cs.db else 2
        if 0x66 in prefixes:
            size = 2 if self.is_long or size == 4 else 4
        return int.from_bytes(fetch(self.linear_sp(0 if opcode == _POPF else -2 * size), 2), "little")

    def flags_slot(self, after: Sregs, fetch: Callable[[int, int], bytes]) -> tuple[int, int]:
        # Where an exception or interrupt from here pushes the flags, and the size of what it pushes: on this stack, or
        # on the TSS's where the CPL has changed.  A gate with an IST, or of 16 bits, is not looked for.
        #
        #   real: FLAGS CS IP      protected: [SS ESP] EFLAGS CS EIP      long: SS RSP RFLAGS CS RIP, 16-byte aligned
        if self.mode == "real":
            return self.linear_sp(2), 2
        is_inner = after.ss.dpl != self.sregs.ss.dpl
        size = 8 if self.sregs.efer & _EFER_LMA else 4
        tss = int.from_bytes(fetch(self.sregs.tr.base + 4, size), "little") if is_inner else 0
        if size == 8:
            return ((tss if is_inner else self.regs.rsp) & ~15) - 24, 8
        return (after.ss.base + tss - 12) & 0xFFFFFFFF if is_inner else self.linear_sp(4), 4


def _check_address(call: str, address: object) -> None:
    if isinstance(address, bool) or not isinstance(address, int):
        raise ArgumentTypeError(call, "address", address, "an int")
    # Canonical for 57 bits: the widest linear addresses there are.
    if not (0 <= address < 1 << 56 or (1 << 64) - (1 << 56) <= address < 1 << 64):
        raise ArgumentError(call, "address", address, "a canonical linear address")


def _is_step(exit: Exit) -> TypeGuard[Debug]:
    return type(exit) is Debug and exit.exception == _DB and bool(exit.dr6 & _DR6_BS)


def _is_limit(exit: Exit) -> bool:
    # C has served an exit of the instruction.
    return type(exit) is Interrupted and exit.cause == "limit"
