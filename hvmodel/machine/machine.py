"""The front door: `Machine`, guest RAM and a vCPU on /dev/kvm, ready to run.

Owns the guest physical address space of a bare machine and the loop around KVM_RUN.

    gpa 0            RAM, up to 3 GiB of it
    0xfeffc000       identity map page and TSS of KVM's real-mode emulation on Intel (four pages)
    0x100000000      the rest of the RAM

Sources: qemu:target/i386/kvm/kvm.c kvm_arch_init@v10.1 (identity map and TSS addresses).
"""

from __future__ import annotations

from .._ffi import lib
from ..errors import ArgumentError, ArgumentTypeError, BusyError, GuestAccessError, HvError, UnansweredError
from ..kvm import exits as kvm_exits
from ..kvm.batch import Batch
from ..kvm.exits import (
    Again,
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
from ..ram import RamBlock
from ..ram.block import ram_size
from ..units import GiB
from ..value import Value
from .console import Console
from .cpu import MAX_INSN, Cpu, is_64_bit_code

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Any, Literal, Self

    from typing_extensions import Buffer

    from .._native import kvm_cpuid2
    from ..host.mapping import Writable
    from ..kvm.exits import Exit
    from .console import Claim
    from .cpu import Location

__all__ = ["Machine", "Stop"]

_LOW_RAM = 3 * GiB  # as QEMU's pc: the rest of the first 4 GiB is the PCI hole's
_HIGH_RAM = 4 * GiB
_IDENTITY_MAP = 0xFEFFC000
_TSS = 0xFEFFD000

_POLICIES = ("strict", "open_bus")
_TERMINAL = (Shutdown, FailEntry, InternalError)
_PORT_EXITS = (IoIn, IoOut)
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
    "memory-fault", "system-event", or "exit" for any other.
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


class Machine:
    """A virtual machine with RAM and one vCPU, and nothing else: no devices, no interrupt controller.

    `ram`: size in bytes, or text such as "16M"; whole pages; one RamBlock "pc.ram" (a memfd sealed against GROW and
    SHRINK) at gpa 0, what exceeds 3 GiB from 4 GiB on.
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
        ram: int | str = "16M",
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
        size = ram_size(ram, "Machine", "ram")
        self.unclaimed = unclaimed
        self.debug_exit = debug_exit
        self._closed = False
        self._batch: Batch | None = None
        self._console: Console | None = None
        self._debug_rule: int | None = None  # the port of the rule for debug_exit
        self._claims: dict[int, Claim] = {}  # by the port where an access begins
        self._roms: list[RamBlock] = []
        self._owned: list[Any] = []  # closed in reverse
        self._spaces: list[tuple[int, int, RamBlock, int]] = []  # gpa, size, block, offset
        try:
            self.kvm = kvm if kvm is not None else self._own(Kvm())
            self.vm = self.kvm.create_vm()
            # The VM is closed before the memory in its slots is unmapped.
            self.ram: RamBlock = self._own(RamBlock("pc.ram", size))
            self._own(self.vm)
            self.vm.set_identity_map_addr(_IDENTITY_MAP)
            self.vm.set_tss_addr(_TSS)
            self._add(0, self.ram, 0, min(size, _LOW_RAM))
            if size > _LOW_RAM:
                self._add(_HIGH_RAM, self.ram, _LOW_RAM, size - _LOW_RAM)
            self.vcpu = Cpu(self.vm.create_vcpu(0), self.read)
            self.vcpu.kvm.set_cpuid2(_guest_cpuid(self.kvm, 0))
        except BaseException:
            if hasattr(self, "vm") and self.vm not in self._owned:
                self.vm.close()
            self.close()
            raise

    def _own(self, thing: Any) -> Any:
        self._owned.append(thing)
        return thing

    def _add(self, gpa: int, block: RamBlock, offset: int, size: int, flags: int = 0) -> None:
        spaces, slots = len(self._spaces), self.vm.memslots
        slot = next(n for n in range(len(slots) + 1) if n not in slots)  # there may be some of the caller's
        try:
            self.vm.set_user_memory_region(slot, gpa, block.mapping, offset=offset, size=size, flags=flags)
            self._spaces.append((gpa, size, block, offset))
            if self._batch is not None and flags & lib.KVM_MEM_READONLY:
                self._drop_writes(self._batch, gpa, size)
        except BaseException:
            del self._spaces[spaces:]
            try:
                if slot in self.vm.memslots:
                    self.vm.delete_memory_region(slot)
            except HvError:
                pass  # the first error says more; close() lets go of the memory
            raise

    # ---- life ----

    def close(self) -> None:
        """Stop the vCPU and release everything: slots, RAM, vCPU, VM, /dev/kvm.  May be called again.

        BufferError: a view of the RAM is alive; the VM is closed by then, and a later close() releases the rest.
        """
        self._closed = True
        while self._owned:
            self._owned[-1].close()
            self._owned.pop()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

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
        # The block and the offset in it of the RAM [gpa, gpa + size).
        for field, value in (("gpa", gpa), ("size", size)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(call, field, value, "an int")
        assert isinstance(gpa, int) and isinstance(size, int)
        for start, length, block, offset in self._spaces:
            if start <= gpa < start + length and 0 <= size <= start + length - gpa:
                return block, gpa - start + offset
        ranges = ", ".join(f"[{start:#x}, {start + length:#x})" for start, length, _, _ in self._spaces)
        raise ArgumentError(call, "gpa", gpa, f"a range within one of {ranges}", f"size={size:#x}: not in RAM")

    def read(self, gpa: int, size: int) -> bytes:
        """A copy of `size` bytes of RAM at `gpa`.  ArgumentError: not all of it is RAM."""
        block, offset = self._find("Machine.read", gpa, size)
        return block.read(offset, size)

    def write(self, gpa: int, data: Buffer) -> None:
        """Write `data` to RAM at `gpa`, and mark its pages as written by the host.  ArgumentError: not all RAM."""
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
            self._add(_HIGH_RAM - size, rom, 0, size, lib.KVM_MEM_READONLY)
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
        """The rules by which C serves exits; made and attached at the first use, with a rule for each range of RAM."""
        if self._batch is None:
            batch = Batch()
            for slot in self.vm.memslots.values():
                if slot.readonly:
                    self._drop_writes(batch, slot.gpa, slot.size)
            self.vcpu.kvm.batch = batch
            self._batch = batch
        return self._batch

    @staticmethod
    def _drop_writes(batch: Batch, gpa: int, size: int) -> None:
        # A write to ROM does nothing, as on a PC.  Every other MMIO exit inside a memslot is a fault of the host page,
        # which no rule serves.
        batch.mmio(gpa, size, read="stop", write="ignore")

    @property
    def console(self) -> Console:
        """Serial port 0x3F8 and debug ports 0x402 and 0xE9, captured; claimed at the first use.

        ArgumentError: one of the ports has a rule already.
        """
        if self._console is None:
            if self._debug_rule is not None:  # which reaches three ports further; the next run() makes it anew
                self.batch.remove("pio", self._debug_rule)
                self._debug_rule = None
            self._console = Console(self.batch, self._claims.__setitem__)
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
            self._serve_unclaimed("stop")
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
        run = self.vcpu.kvm.run_until
        claims = self._claims
        while True:
            try:
                exit = run(deadline)
            except UnansweredError:
                if self.unclaimed != "open_bus" or not self._answer_ones():
                    raise
                continue
            if claims and isinstance(exit, _PORT_EXITS) and exit.port in claims:
                answer = claims[exit.port](exit, self.unclaimed == "open_bus")
                if answer is not None:
                    if isinstance(exit, IoIn):
                        self.answer(answer)
                    continue
            if type(exit) is Again:
                continue
            yield exit
            if isinstance(exit, _TERMINAL) or (type(exit) is Interrupted and exit.cause == "timeout"):
                return

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

    def _serve_unclaimed(self, policy: Literal["stop", "ignore"]) -> None:
        batch = self.batch
        if batch._unclaimed != {"unclaimed_pio": policy, "unclaimed_mmio": policy}:
            batch.configure(unclaimed_pio=policy, unclaimed_mmio=policy)

    def run(self, timeout: float | None = None) -> Stop:
        """Run until something ends it; see `Stop`.

        Accesses that nobody claims: see `unclaimed` of the constructor.  `timeout` in seconds; None: no limit.
        Raises GuestAccessError (strict), KeyboardInterrupt and whatever else a signal's Python handler raises.
        """
        deadline = self._deadline("Machine.run", timeout)
        open_bus = self.unclaimed == "open_bus"
        if open_bus:
            self._claim_debug_exit()
            self._serve_unclaimed("ignore")
        elif self._batch is not None:
            self._serve_unclaimed("stop")
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
