"""The front door: `Machine`, guest RAM and a vCPU on /dev/kvm, ready to run.

Owns the two address spaces of a bare machine, and the loop around KVM_RUN that serves its exits from them.

    memory   0             ram-below-4g: RAM, up to 3 GiB of it
             0xfeffc000    identity map page and TSS of KVM's real-mode emulation on Intel (four pages)
             0x100000000   ram-above-4g: the rest of the RAM
    I/O      0 - 0xffff    empty, but for the ports of `console`

RAM becomes memslots; an exit is an access to what a space shows at its address, see `_dispatch`.

Sources: qemu:target/i386/kvm/kvm.c kvm_arch_init@v10.1 (identity map and TSS addresses).
"""

from __future__ import annotations

from .._ffi import lib
from ..errors import ArgumentError, ArgumentTypeError, BusyError, GuestAccessError, HvError, UnansweredError
from ..kvm import exits as kvm_exits
from ..kvm.exits import (
    Again,
    Debug,
    FailEntry,
    Hlt,
    HostFault,
    InternalError,
    Interrupted,
    IoIn,
    IoOut,
    MemoryFault,
    MmioRead,
    MmioWrite,
    Shutdown,
    SystemEvent,
)
from ..kvm.system import Kvm
from ..kvm.vcpu import _timeout_ns
from ..ram.address_space import AddressSpace
from ..ram.block import RamBlock, ram_size
from ..ram.dispatch import MEMTX_DECODE_ERROR
from ..ram.kvm_listener import KvmMemoryListener
from ..ram.listener import MemoryListener
from ..ram.region import ADDRESS_END, MemoryRegion
from ..ram.topology import transaction
from ..units import PAGE_SIZE, GiB
from ..value import Value
from .cpu import MAX_INSN, Cpu, is_64_bit_code

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _weakref import ref
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Any, Literal, Self

    from typing_extensions import Buffer

    from .._native import kvm_cpuid2
    from ..host.mapping import Writable
    from ..kvm.batch import Batch
    from ..kvm.exits import Exit
    from ..mmu.guest_memory import GuestMemory
    from ..mmu.walk import Walk, Walker
    from ..ram.backend import MemoryBackend
    from ..ram.flatview import FlatView, Row
    from .console import Console
    from .cpu import Location

__all__ = ["Machine", "Stop"]

_LOW_RAM = 3 * GiB  # as QEMU's pc: the rest of the first 4 GiB is the PCI hole's
_HIGH_RAM = 4 * GiB
_IDENTITY_MAP = 0xFEFFC000
_TSS = 0xFEFFD000
_PORTS = 0x10000

_POLICIES = ("strict", "open_bus")
_TERMINAL = (Shutdown, FailEntry, InternalError)
_PORT_EXITS = (IoIn, IoOut)
_BUS_EXITS = (IoIn, IoOut, MmioRead, MmioWrite)
_DF = 0x400  # RFLAGS: string instructions go downwards
_REASONS: dict[type, str] = {
    Hlt: "halted",
    Shutdown: "shutdown",
    InternalError: "internal-error",
    FailEntry: "fail-entry",
    HostFault: "host-fault",
    MemoryFault: "memory-fault",
    SystemEvent: "system-event",
}

_cpuid_tables: dict[int, kvm_cpuid2] = {}  # by APIC id: what KVM supports does not change, and asking takes 0.3 ms


class Stop(Value):
    """Why `Machine.run()` came back.

    `reason`: "halted" (HLT, and nothing can wake it), "debug-exit" (a write to the debug-exit port), "shutdown"
    (triple fault), "timeout", "interrupted" (a kick or a signal), "internal-error", "fail-entry", "host-fault",
    "memory-fault", "system-event", "breakpoint" (or a watchpoint; see Cpu.add_breakpoint), or "exit" for any other.
    `exit`: the exit itself.  `report`: a crash report, where there is one.
    """

    reason: str
    exit: Exit
    report: object = None

    @property
    def halted(self) -> bool:
        """Whether the guest halted and nothing can wake it."""
        return self.reason == "halted"

    @property
    def value(self) -> int | None:
        """What the guest wrote to the debug-exit port, or None."""
        return self.exit.value if self.reason == "debug-exit" and isinstance(self.exit, IoOut) else None


class _Regions(MemoryListener):
    # What C ignores was decided by regions that have changed: until the next run() decides anew, it ignores nothing.
    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def commit(self) -> None:
        self._batch._stop_ignoring()


class Machine:
    """A virtual machine with RAM and one vCPU, and nothing else: no devices, no interrupt controller.

    `ram`: size in bytes, or text such as "16M"; whole pages; one RamBlock "pc.ram" (a memfd sealed against GROW and
    SHRINK) at gpa 0, what exceeds 3 GiB from 4 GiB on.  Or a memory backend (hvmodel.ram.MemoryBackendMemfd, …), of
    which the block is made; or a RamBlock, which stays yours.

    `memory` and `io` are its address spaces (hvmodel.ram.AddressSpace).  A region that is put into
    `memory.root` or `io.root` is there for the guest at once: ram and rom as memslots, io by its callbacks, which are
    called in the thread that runs the machine.
    `unclaimed`: what becomes of an access to a port or address that nobody claims.  "strict": `run()` raises
    GuestAccessError, and in `exits()` a read must be answered.  "open_bus": reads give all ones, writes are dropped.
    `debug_exit`: a port whose writes end `run()` with Stop("debug-exit"), as QEMU's isa-debug-exit.
    `kvm`: a `Kvm` to make it from (it stays yours); default: a new one on /dev/kvm.

    Raises ArgumentError and ArgumentTypeError for the arguments; HostError where /dev/kvm cannot be opened; KvmError.
    Nothing is left open then.

    Thread safety: one thread at a time, but `kick()` from any.

    >>> with Machine(ram="1M") as m:
    ...     m.load(0x7C00, bytes.fromhex("b041 e610 f4"))      # mov al, 'A'; out 0x10, al; hlt
    ...     m.vcpu.real_mode(entry=0x7C00)
    ...     next(m.exits(timeout=1.0))
    IoOut(port=0x10, size=1, count=1, data=b'A')
    """

    def __init__(
        self,
        ram: int | str | MemoryBackend | RamBlock = "16M",
        *,
        unclaimed: Literal["strict", "open_bus"] = "strict",
        debug_exit: int | None = None,
        kvm: Kvm | None = None,
    ) -> None:
        if unclaimed not in _POLICIES:
            raise ArgumentError("Machine", "unclaimed", unclaimed, '"strict" or "open_bus"')
        if debug_exit is not None:
            if isinstance(debug_exit, bool) or not isinstance(debug_exit, int):
                raise ArgumentTypeError("Machine", "debug_exit", debug_exit, "a port number or None")
            if not 0 <= debug_exit <= 0xFFFF:
                raise ArgumentError("Machine", "debug_exit", debug_exit, "a port, 0 to 0xffff")
        if kvm is not None and not isinstance(kvm, Kvm):
            raise ArgumentTypeError("Machine", "kvm", kvm, "a Kvm or None")
        backend, size = None, 0
        if isinstance(ram, RamBlock):
            size = ram.used_length
        elif isinstance(ram, Value):
            from ..ram.backend import MemoryBackend

            if not isinstance(ram, MemoryBackend):
                raise ArgumentTypeError("Machine", "ram", ram, "a size, a memory backend or a RamBlock")
            backend = ram
        else:
            size = ram_size(ram, "Machine", "ram")
        self.unclaimed = unclaimed
        self.debug_exit = debug_exit
        self._closed = False
        self._batch: Batch | None = None
        self._console: Console | None = None
        self._debug_rule: int | None = None  # the port of the rule for debug_exit
        self._roms: list[RamBlock] = []
        self._walked: list[ref[GuestMemory]] = []  # by the walkers that are out
        self._owned: list[Any] = []  # closed in reverse
        self._views: tuple[FlatView | None, FlatView | None] = (None, None)  # of which `_devices` is the answer
        self._devices = False  # whether there is anything but RAM and ROM in them
        try:
            self.kvm = kvm if kvm is not None else self._own(Kvm())
            self.vm = self.kvm.create_vm()
            # The VM is closed before the memory in its slots is unmapped.
            self.ram: RamBlock
            if isinstance(ram, RamBlock):
                self.ram = ram
            else:
                self.ram = self._own(RamBlock("pc.ram", size or None, backend=backend))
            self.memory: AddressSpace = self._own(AddressSpace(_ram_layout(self.ram), "memory"))
            # By the last `_find`: the view, start and end of a range, its block, what its offset is more than the gpa.
            self._found: tuple[FlatView | None, int, int, RamBlock, int] = (None, 0, 0, self.ram, 0)
            self.io: AddressSpace = self._own(AddressSpace(MemoryRegion.container("io", _PORTS), "I/O"))
            self._own(self.vm)
            self.vm.set_identity_map_addr(_IDENTITY_MAP)
            self.vm.set_tss_addr(_TSS)
            self.memory.add_listener(KvmMemoryListener(self.vm))
            self.vcpu = Cpu(self.vm.create_vcpu(0), self.read, self)
            self.vcpu.kvm.set_cpuid2(_guest_cpuid(self.kvm, 0))
        except BaseException:
            if hasattr(self, "vm") and self.vm not in self._owned:
                self.vm.close()
            self.close()
            raise

    def _own(self, thing: Any) -> Any:
        self._owned.append(thing)
        return thing

    # ---- life ----

    def close(self) -> None:
        """Stop the vCPU and release everything: slots, RAM, vCPU, VM, /dev/kvm.  May be called again.

        BufferError: a view of the RAM is alive; the VM is closed by then, and a later close() releases the rest.
        """
        self._closed = True
        for walked in self._walked:
            if (memory := walked()) is not None:
                memory.close()
        while self._owned:
            self._owned[-1].close()
            self._owned.pop()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    def __reduce__(self) -> str:
        raise TypeError(f"{self!r} cannot be copied or pickled: it owns a virtual machine of this process")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._closed:
            return "<Machine closed>"
        return f"<Machine ram={self.ram.used_length:#x} unclaimed={self.unclaimed}>"

    # ---- memory ----

    def _find(self, call: str, gpa: object, size: object) -> tuple[RamBlock, int]:
        # The block and the offset in it of the memory [gpa, gpa + size).  Most calls are to the range of the last one.
        view = self.memory._view
        last, start, end, block, offset = self._found
        if last is view and type(gpa) is int and type(size) is int and start <= gpa < end and 0 <= size <= end - gpa:
            return block, gpa + offset
        for field, value in (("gpa", gpa), ("size", size)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(call, field, value, "an int")
        assert isinstance(gpa, int) and isinstance(size, int)
        self._check_open(call)
        row = view._row(gpa)
        if row is not None and 0 <= size <= row[0] + row[1] - gpa and row[2].block is not None:
            block, offset = row[2].block, row[3] - row[0]
            self._found = view, row[0], row[0] + row[1], block, offset
            return block, gpa + offset
        ranges = ", ".join(f"[{r.start:#x}, {r.end:#x})" for r in view if r.region.block is not None)
        raise ArgumentError(call, "gpa", gpa, f"a range within one of {ranges}", f"size={size:#x}: not in RAM")

    def read(self, gpa: int, size: int) -> bytes:
        """A copy of `size` bytes of RAM at `gpa`.  ArgumentError: not all of it is in one range of RAM or ROM."""
        block, offset = self._find("Machine.read", gpa, size)
        return block.read(offset, size)

    def write(self, gpa: int, data: Buffer) -> None:
        """Write `data` to RAM at `gpa`, and mark its pages as written by the host.

        ROM is written too.  ArgumentError: not all of it is in one range of RAM or ROM.
        """
        view = _bytes("Machine.write", "data", data)
        block, offset = self._find("Machine.write", gpa, view.nbytes)
        block.write(offset, view)

    def view(self, gpa: int, size: int) -> memoryview:
        """`size` bytes of RAM at `gpa`, read-only and without a copy; see RamBlock.view."""
        block, offset = self._find("Machine.view", gpa, size)
        return block.view(offset, size)

    def writable(self, gpa: int, size: int) -> Writable:
        """A context manager: the same, writable; its pages count as written by the host; see RamBlock.writable."""
        block, offset = self._find("Machine.writable", gpa, size)
        return block.writable(offset, size)

    def walker(self) -> Walker:
        """A Walker of the vCPU's page tables, by its registers, PKRU and CPUID as they are now, in RAM in place.

        It reads RAM as it is at each walk, but keeps those registers.  RAM that it has views of cannot be unmapped
        before it is gone, or was closed.  `close()` of the machine closes it, and so does a change of `memory` after
        which RAM or ROM is elsewhere: it raises ClosedError then.  See hvmodel.mmu.Walker and docs/walk.md.

        BusyError where another thread runs the vCPU, and in a MemoryListener; ClosedError; what RamBlock.view raises.
        """
        from .walk import walker

        return walker(self)

    def walk(self, gva: int, access: int = 0, update: bool = False) -> Walk:
        """Walk one linear address, as `walker().walk(gva, access, update)`; for many, keep a walker.

        `access`: PFERR bits: 0 a read by the supervisor, W 2, U 4, F 0x10.  `update`: set A and D in the tables.

        >>> with Machine(ram="16M") as m:
        ...     tables = m.vcpu.long_mode(entry=0x1000)
        ...     m.walk(0x20_1234), len(m.walk(0x20_1234).entries)
        (<Walk 0x201234 -> 0x201234, level 2, access 1>, 3)
        """
        walker = self.walker()
        try:
            return walker.walk(gva, access, update)
        finally:
            walker.close()

    def load(self, gpa: int, image: Buffer) -> None:
        """Load a flat image at `gpa`.

        ArgumentError: the image is empty, or does not fit into the RAM there.
        """
        view = _bytes("Machine.load", "image", image)
        if not view.nbytes:
            raise ArgumentError("Machine.load", "image", b"", "an image of at least one byte", "it is empty")
        block, offset = self._find("Machine.load", gpa, view.nbytes)
        block.write(offset, view)

    def load_bios(self, image: Buffer) -> None:
        """Firmware, as a PC maps it: its last 128 KiB at the top of the first MiB (in RAM), all of it below 4 GiB
        (ROM).

        Then `vcpu.reset()` starts it at the reset vector.  An image of up to 256 KiB goes whole below 1 MiB, for
        there are no PAM registers with which firmware could copy the rest.  ArgumentError: not a multiple of 64 KiB,
        above 16 MiB, or too little RAM.
        """
        view = _bytes("Machine.load_bios", "image", image)
        size = view.nbytes
        if size == 0 or size % 0x10000 or size > 16 << 20:
            raise ArgumentError("Machine.load_bios", "image", size, "a multiple of 64 KiB, up to 16 MiB", "its size")
        if self._roms:
            raise BusyError("Machine.load_bios", repr(self), "firmware is loaded already")
        low = size if size <= 256 << 10 else 128 << 10
        block, offset = self._find("Machine.load_bios", (1 << 20) - low, low)
        block.write(offset, view[size - low :])
        rom: RamBlock = RamBlock("pc.bios", size)
        self._owned.insert(self._owned.index(self.vm), rom)
        try:
            rom.write(0, view)
            region = MemoryRegion.rom("pc.bios", rom)
            try:
                self.memory.root.add_subregion(_HIGH_RAM - size, region)
            except BaseException:
                if region.parent is not None:
                    self.memory.root.del_subregion(region)
                raise
        except BaseException:
            try:
                rom.close()
                self._owned.remove(rom)
            except HvError:
                pass  # its slot could not be removed: it stays owned
            raise
        self._roms.append(rom)

    # ---- exits served in C ----

    @property
    def batch(self) -> Batch:
        """The rules by which C serves exits, before any region does; made and attached at the first use."""
        if self._batch is None:
            from ..kvm.batch import Batch

            batch = Batch()
            self.vcpu.kvm.batch = batch
            for space in (self.memory, self.io):
                space.add_listener(_Regions(batch))
            self._batch = batch
        return self._batch

    @property
    def console(self) -> Console:
        """Serial port 0x3F8 and debug ports 0x402 and 0xE9, captured; claimed at the first use.

        ArgumentError: one of the ports has a rule already.
        """
        if self._console is None:
            from .console import Console

            if self._debug_rule is not None:  # which reaches three ports further; the next run() makes it anew
                self.batch.remove("pio", self._debug_rule)
                self._debug_rule = None
            self._console = Console(self.batch, self.io.root)
        return self._console

    # ---- running ----

    def kick(self) -> bool:
        """Interrupt the running, or else the next, run()/exits(); see Vcpu.kick.  Thread safety: any thread."""
        return self.vcpu.kick()

    def answer(self, data: int | bytes) -> None:
        """Answer the read exit at hand: an int of its size, or all its bytes; see Vcpu.answer."""
        self.vcpu.kvm.answer(data)

    def exits(self, timeout: float | None = None) -> Iterator[Exit]:
        """Run, and yield every exit that nothing claims.

        The next exit is run for when the loop asks for it; a read that was yielded must be answered by then
        (UnansweredError on a strict machine, all ones with open_bus).  `timeout` in seconds, for the whole loop: at
        its end comes Interrupted("timeout").  The iteration ends after that, and after Shutdown, FailEntry and
        InternalError, which would repeat; call exits() again to go on.  A kick yields Interrupted("kick"), a signal
        Interrupted("signal") after its Python handler.
        """
        deadline = self._deadline("Machine.exits", timeout)
        if self._batch is not None:
            self._serve_unclaimed(False)
        return self._exits(deadline)

    def _deadline(self, call: str, timeout: float | None) -> int:
        self._check_open(call)
        ns = _timeout_ns(call, timeout)
        # A handler that was installed since the last run interrupts this one too, not only from the heartbeat on.
        lib.hv_chain_signals()
        lib.hv_ack_signals(self.vcpu.kvm._c)
        return 0 if ns < 0 else lib.hv_monotonic_ns() + ns

    def _check_open(self, call: str) -> None:
        if self._closed:
            from ..errors import ClosedError

            raise ClosedError(call, repr(self))

    def _exits(self, deadline: int) -> Iterator[Exit]:
        cpu = self.vcpu
        run = cpu.kvm.run_until
        while True:
            try:
                exit = run(deadline) if cpu._debugger is None else cpu._debugger.run_until(deadline)
            except UnansweredError:
                if self.unclaimed != "open_bus" or not self._answer_ones():
                    raise
                continue
            if isinstance(exit, _BUS_EXITS) and self._has_devices() and self._dispatch(exit):
                continue
            if type(exit) is Again:
                continue
            yield exit
            if isinstance(exit, _TERMINAL) or (type(exit) is Interrupted and exit.cause == "timeout"):
                return

    def _has_devices(self) -> bool:
        # Asked at every exit, and answered anew when a view was replaced.
        views = self.memory._view, self.io._view
        if views[0] is not self._views[0] or views[1] is not self._views[1]:
            self._devices = any(_is_device(row) for view in views for row in view._rows)
            self._views = views
        return self._devices

    def _dispatch(self, exit: IoIn | IoOut | MmioRead | MmioWrite) -> bool:
        # Serves an access from its address space, as QEMU does (qemu:accel/kvm/kvm-all.c kvm_handle_io, kvm_cpu_exec
        # @v7.2).  False where nobody claims it, or on a strict machine a part of it.  A write to ROM is nobody's.
        # One to the debug-exit port is no region's.
        if isinstance(exit, IoOut) and exit.port == self.debug_exit:
            return False
        space, addr, count = (
            (self.io, exit.port, exit.count) if isinstance(exit, _PORT_EXITS) else (self.memory, exit.gpa, 1)
        )
        strict = self.unclaimed != "open_bus"
        size = exit.size
        pieces = _pieces(space._view, addr, size)
        is_read = isinstance(exit, IoIn | MmioRead)
        claimed = [row is not None and _is_device(row) and (is_read or not _is_rom(row)) for _, _, row in pieces]
        if not any(claimed) or (strict and not all(claimed)):
            return False
        if isinstance(exit, IoIn | MmioRead):
            answer = b""
            for _ in range(count):
                for (at, length, _), is_claimed in zip(pieces, claimed, strict=True):
                    data, result = space.try_read(at, length) if is_claimed else (b"", MEMTX_DECODE_ERROR)
                    if result & MEMTX_DECODE_ERROR:
                        if strict:
                            return False
                        data = b"\xff" * length
                    answer += data
            self.answer(answer)
            return True
        for start in range(0, len(exit.data), size):
            for (at, length, _), is_claimed in zip(pieces, claimed, strict=True):
                offset = start + at - addr
                result = space.try_write(at, exit.data[offset : offset + length]) if is_claimed else 0
                if strict and result & MEMTX_DECODE_ERROR:
                    return False
        return True

    def _answer_ones(self) -> bool:
        # As an empty bus would.  False for what is no bus: a host page that cannot be read.
        exit = self.vcpu.kvm._not_in_slot(kvm_exits.decode(self.vcpu.kvm._c.exit, self.vcpu.kvm._c.exit_size))
        if isinstance(exit, HostFault):
            return False
        if isinstance(exit, IoIn | MmioRead):
            count = exit.count if isinstance(exit, IoIn) else 1
            self.answer(b"\xff" * (exit.size * count))
        else:
            self.vcpu.kvm.fail_msr()
        return True

    def _serve_unclaimed(self, ignore: bool) -> None:
        # What C does with an access that no rule covers.  It knows no regions: it may ignore only where rules cover
        # all of them.
        batch = self.batch
        views: tuple[FlatView, ...] = ()
        while views != (self.io._view, self.memory._view):  # another thread may change them
            views = self.io._view, self.memory._view
            policies = {}
            for kind, view in zip(("pio", "mmio"), views, strict=True):
                covered = ignore and all(_is_covered(row, batch._rules[kind]) for row in view._rows)
                policies[f"unclaimed_{kind}"] = "ignore" if covered else "stop"
            if batch._unclaimed != policies:
                batch.configure(**policies)  # type: ignore[arg-type]  # both are its words

    def run(self, timeout: float | None = None) -> Stop:
        """Run until something ends it; see `Stop`.

        Accesses that nobody claims: see `unclaimed` of the constructor.  `timeout` in seconds; None: no limit.
        Raises GuestAccessError (strict), KeyboardInterrupt and whatever else a signal's Python handler raises.
        """
        deadline = self._deadline("Machine.run", timeout)
        open_bus = self.unclaimed == "open_bus"
        if open_bus:
            self._claim_debug_exit()
        if open_bus or self._batch is not None:
            self._serve_unclaimed(open_bus)
        exits = self._exits(deadline)
        while True:
            exit = next(exits)  # what ends them ends this loop
            if isinstance(exit, IoOut) and exit.port == self.debug_exit:
                return Stop("debug-exit", exit)
            if isinstance(exit, IoIn | IoOut | MmioRead | MmioWrite):
                if not open_bus:
                    raise self._unclaimed_error(exit)
                if isinstance(exit, IoIn | MmioRead):
                    self._answer_ones()
                continue
            if isinstance(exit, Interrupted):
                return Stop("timeout" if exit.cause == "timeout" else "interrupted", exit)
            if type(exit) is Debug and exit.hits:
                return Stop("breakpoint", exit)
            return Stop(_REASONS.get(type(exit), "exit"), exit)

    def _claim_debug_exit(self) -> None:
        # Under open bus C would drop the write.  Guests write up to 4 bytes, as QEMU's iosize=4 has them.
        port, rules = self.debug_exit, self.batch._rules["pio"]
        if port is not None and not any(rule[0] <= port < rule[1] for rule in rules):
            end = min(port + 4, 1 << 16, *(rule[0] for rule in rules if rule[0] > port))
            self.batch.pio(port, end - port, read="ignore", write="stop")
            self._debug_rule = port

    def _unclaimed_error(self, exit: IoIn | IoOut | MmioRead | MmioWrite) -> GuestAccessError:
        where = self.vcpu.location()
        if isinstance(exit, IoIn | IoOut):
            space, address, count = "port", exit.port, exit.count
        else:
            space, address, count = "address", exit.gpa, 1
        behind: int | None = 0  # how far RIP is behind the start of the instruction, which a read leaves it at
        if isinstance(exit, IoOut):
            behind = self._behind_out(exit, where)
        elif isinstance(exit, MmioWrite) and not self._at_rep_store(exit, where):
            behind = None
        before = self.vcpu._before(where, MAX_INSN if behind is None else behind)
        rip, insn = where.rip, where.insn
        if behind is not None:
            rip, insn, before = rip - behind, (before + insn)[:MAX_INSN], b""
        is_write = isinstance(exit, IoOut | MmioWrite)
        data = exit.data if isinstance(exit, IoOut | MmioWrite) else b""
        return GuestAccessError(
            space, address, exit.size, count, is_write, data, where.cs, rip, insn, behind is not None, before
        )

    def _behind_out(self, exit: IoOut, where: Location) -> int | None:
        # How many bytes of the OUT or OUTS RIP has passed, None where that cannot be told.  KVM's emulator moves RIP
        # past it before the exit, but leaves it at a REP OUTS.  A port exit of the processor's own leaves it at the OUT
        # until that is completed, but for port 0x7E (linux:arch/x86/kvm/x86.c kvm_fast_pio_out@v6.18).
        cpu = self.vcpu
        cpu.kvm.complete_io()
        regs, sregs = cpu.regs, cpu.sregs
        if regs.rip != where.rip:
            return 0
        passed, wide = cpu._before(where, 3), exit.size > 1
        is_dx = regs.rdx & 0xFFFF == exit.port
        is_al = regs.rax.to_bytes(8, "little")[: exit.size] == exit.data
        sizes = []
        if is_al and exit.port <= 0xFF and passed[-2:] == bytes((0xE6 | wide, exit.port)):
            sizes.append(2)  # out imm8
        elif is_dx and passed and (passed[-1] == 0x6E | wide or (is_al and passed[-1] == 0xEE | wide)):
            sizes.append(1)  # outs, out dx
        if is_dx and _rep_opcode(where.insn, is_64_bit_code(sregs)) == 0x6E | wide:
            sizes.append(0)  # rep outs
        if len(sizes) != 1:
            return None
        size = sizes[0]
        # The operand size that is not the code segment's own takes a prefix.
        other = 2 if sregs.cs.db or sregs.cs.l else 4
        if size and exit.size == other and passed[:-size][-1:] == b"\x66":
            size += 1
        return size

    def _at_rep_store(self, exit: MmioWrite, where: Location) -> bool:
        # Whether RIP is at the REP MOVS, STOS or INS that wrote: the emulator leaves it there until RCX is 0 and it is
        # looked at once more, and has moved RDI on.
        cpu = self.vcpu
        regs, sregs = cpu.regs, cpu.sregs
        is_64_bit = is_64_bit_code(sregs)
        if _rep_opcode(where.insn, is_64_bit) not in (0x6C, 0x6D, 0xA4, 0xA5, 0xAA, 0xAB):
            return False
        rdi = (regs.rdi + (exit.size if regs.rflags & _DF else -exit.size)) & (1 << 64) - 1
        linear = [rdi]
        if not is_64_bit:  # of 16 or of 32 bits
            linear = [(sregs.es.base + (rdi & mask)) & 0xFFFFFFFF for mask in (0xFFFF, 0xFFFFFFFF)]
        found = [cpu.kvm.translate(gva) for gva in linear]
        return any(at.valid and at.gpa == exit.gpa for at in found)


_PREFIXES = b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf2\xf3"
_REX = bytes(range(0x40, 0x50))


def _rep_opcode(insn: bytes, is_64_bit: bool) -> int | None:
    # The opcode of the instruction where it has a REP prefix.
    code = insn.lstrip(_PREFIXES)
    prefixes = insn[: len(insn) - len(code)]
    if is_64_bit and code[:1] in _REX:
        code = code[1:]
    return code[0] if code and (0xF2 in prefixes or 0xF3 in prefixes) else None


def _bytes(call: str, field: str, data: Buffer) -> memoryview:
    try:
        return memoryview(data).cast("B")
    except TypeError:
        raise ArgumentTypeError(call, field, data, "bytes or another contiguous buffer") from None


def _ram_layout(ram: RamBlock) -> MemoryRegion:
    # The root "system" with the block in it, named as QEMU's pc does.
    system = MemoryRegion.container("system", ADDRESS_END)
    region, low = MemoryRegion.ram(ram.idstr, ram), min(ram.used_length, _LOW_RAM)
    with transaction():
        system.add_subregion(0, MemoryRegion.alias("ram-below-4g", region, 0, low))
        if ram.used_length > low:
            high = MemoryRegion.alias("ram-above-4g", region, low, ram.used_length - low)
            system.add_subregion(_HIGH_RAM, high)
    return system


def _is_device(row: Row) -> bool:
    # Whether an exit from this range is an access to be served: of all but memory that is in a memslot.  The ends of
    # memory that are less than a page are in none.
    start, size, region = row[:3]
    return not region.is_ram or bool((start | size) % PAGE_SIZE)


def _is_rom(row: Row) -> bool:
    # Whether writes to this range are nobody's: read-only memory.
    return row[2].is_ram and row[4]


def _pieces(view: FlatView, addr: int, size: int) -> list[tuple[int, int, Row | None]]:
    # [addr, addr + size) in pieces of one range each: (address, size, range or None).
    pieces: list[tuple[int, int, Row | None]] = []
    end = addr + size
    while addr < end:
        row = view._row(addr)
        stop = addr + 1 if row is None else min(end, row[0] + row[1])
        pieces.append((addr, stop - addr, row))
        addr = stop
    return pieces


def _is_covered(row: Row, rules: list[tuple[int, int, Any, Any]]) -> bool:
    # Whether C's rules, which are in the order of their addresses, cover all of a range, or it has no need of it.
    if not _is_device(row):
        return True
    at, end = row[0], row[0] + row[1]
    for start, stop, _, _ in rules:
        if start > at:
            break
        at = max(at, stop)
    return at >= end


def _guest_cpuid(kvm: Kvm, apic_id: int) -> kvm_cpuid2:
    # What KVM supports here, with the vCPU's own APIC id instead of the CPU's that happened to be asked.
    table = _cpuid_tables.get(apic_id)
    if table is None:
        table = kvm.supported_cpuid_table()
        for at in range(table.nent):
            entry = table.entries[at]
            if entry.function == 1:
                entry.ebx = (entry.ebx & 0x00FFFFFF) | apic_id << 24
            elif entry.function in (0xB, 0x1F):
                entry.edx = apic_id
        _cpuid_tables[apic_id] = table
    return table
