"""Random guest programs for the shadow-MMU simulator: page tables, accesses, and what the host does meanwhile.

A `Program` is made of its seed while the simulator runs it: each step is chosen by what the guest's tables and the
shadow tables are then (a fetch must come from where there is code).  `ShadowLab` (check_simulator) runs it on KVM.

Guest physical memory: the driver's slot of MmuLab, and

    16 MiB  4 MiB  plain      its first NR_TABLES pages are tables
    32 MiB  ~1 MiB logged     253 pages; dirty logging comes and goes; a few tables
    40 MiB  1 MiB  read-only  a few tables
    48 MiB  4 MiB  huge       in the host's huge pages
    56 MiB         nothing
    64 MiB  1 MiB  absent     not in the host's memory yet

Linear addresses, by the entry of the PML4:

      0, 1   random tables of all levels, shared among each other and between roots
      2      the window: all tables, page by page, for CPL 3
      3      in some: the PML4 itself, by which each table is at an address too
    510      the plain slot for the supervisor: where CPL 0 writes to tables
    511      the driver's
"""

from __future__ import annotations

from random import Random
from struct import pack

from ..mmu.shadow_page import HostMemory, HostPage, MmuEvent, SimSlot
from ..mmu.simulate import ShadowMmu, SimAccess
from ..mmu.walk import walk_addr
from ..units import PAGE_SIZE, MiB
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    class Bench(Protocol):
        """What a program is made on: guest memory and host as KVM has them, and simulators of it."""

        memory: GuestCopy
        host: HostFrames
        driver: dict[str, int]

        def poke(self, gpa: int, data: bytes) -> None:
            """Write to memory before the program begins."""

        def new_mmu(self, registers: Registers) -> ShadowMmu:
            """A simulator of a VM without shadow pages."""


__all__ = ["FAKE_PFN", "SLOTS", "GuestCopy", "HostFrames", "Player", "Program", "Registers", "Step"]

_P, _W, _U, _PWT, _PCD, _A, _D, _PS, _G = (1 << bit for bit in range(9))
_NX = 1 << 63
_USER, _FETCH = 4, 0x10  # PFERR bits
_FILL = b"\xee"  # OUT DX, AL: what may be fetched
_FILL_VALUE = 0xEEEEEEEE_EEEEEEEE

# gpa, bytes, flags, huge, in memory from the beginning
SLOTS = (
    (16 * MiB, 4 * MiB, 0, False, True),
    (32 * MiB, 1 * MiB - 3 * PAGE_SIZE, 0, False, True),
    (40 * MiB, 1 * MiB, 2, False, True),
    (48 * MiB, 4 * MiB, 0, True, True),
    (64 * MiB, 1 * MiB, 0, False, False),
)
"""The slots; KVM's have the numbers from 1 on."""
PLAIN, LOGGED, READONLY, HUGE, ABSENT = range(5)
_HOLE = 56 * MiB
_NR_TABLES = 96
_TABLES = SLOTS[PLAIN][0]
_LEAVES = 64  # pages from the beginning of a slot that leaves lead to
_FAR_TABLES = 200  # page of the logged and the read-only slot where tables are

_WINDOW, _RECURSIVE, _ALIAS, _DRIVER = 2, 3, 510, 511  # entries of each PML4
_WINDOW_GVA = _WINDOW << 39
_ALIAS_GVA = (1 << 64) - (2 << 39)
_FIXED = [_TABLES + (_NR_TABLES - 1 - i) * PAGE_SIZE for i in range(5)]  # tables of alias (2) and window (3)
_DRIVER_PDPT = 0x1000
_TABLE = _P | _W | _U | _A

_NO_ENTRIES = [0] * 512

FAKE_PFN = 1 << 38
"""From here on are frames that the host has yet to choose; the one before is the zero page."""

_CR0, _CR0_WP, _CR4, _SMEP, _SMAP = 0x80010033, 1 << 16, 0x20, 1 << 20, 1 << 21
_EFER, _EFER_NX = 0xD00, 1 << 11


class Registers(Value):
    """The control registers that a program's accesses are made with."""

    cr3: int
    cr0: int = _CR0
    cr4: int = _CR4
    efer: int = _EFER

    def at(self, cr3: int) -> Registers:
        """The same with another CR3."""
        return Registers(cr3, self.cr0, self.cr4, self.efer)


class Step(Value):
    """One step of a program.

    `what`: "load", "store", "store8", "fetch", "invlpg", "cr3": accesses, as the lab's kinds, to `gva`; or "sregs",
    which sets `registers`; or a step of the host: "log" (dirty logging of `slot` `on` or off), "take_log", "discard"
    (`count` pages of `slot` from `first` on go), "zap" (all shadow pages).
    """

    what: str
    gva: int = 0
    user: bool = True
    value: int = _FILL_VALUE
    slot: int = 0
    first: int = 0
    count: int = 0
    on: bool = False
    registers: Registers | None = None

    @property
    def is_access(self) -> bool:
        """Whether the guest makes it."""
        return self.what not in ("sregs", "log", "take_log", "discard", "zap")

    def __str__(self) -> str:
        if self.what == "sregs":
            return f"sregs {self.registers}"
        if not self.is_access:
            return f"{self.what} slot {self.slot} first {self.first:#x} count {self.count} on {self.on}"
        return f"{self.what} {self.gva:#x} by CPL {3 if self.user else 0}, value {self.value:#x}"


class HostFrames(HostMemory):
    """The host's memory: frame by guest frame that is in memory, those of them that are the zero page, and where the
    host maps huge pages (first frames of 2 MiB)."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: dict[int, int] = {}
        self.zero: set[int] = set()
        self.huge_ranges: set[int] = set()
        #: What KVM is told of when a copy of a page is made: set by who has the simulator.
        self.mmu: ShadowMmu | None = None
        self._next = FAKE_PFN

    def fault_in(self, gfn: int, write: bool) -> HostPage | None:
        """Private memory: what is not there is the zero page when read, and a frame of its own once written."""
        pfn = self.frames.get(gfn)
        if pfn is None and not write:
            self.frames[gfn] = pfn = FAKE_PFN - 1
            self.zero.add(gfn)
        elif pfn is None or (write and gfn in self.zero):
            if pfn is not None:  # what maps the zero page goes
                self.zero.discard(gfn)
                assert self.mmu is not None
                self.mmu.unmap_gfn_range(gfn, gfn + 1)
            self.frames[gfn] = pfn = self._next
            self._next += 1
        return HostPage(pfn, gfn not in self.zero)

    def fast(self, gfn: int) -> int | None:
        """The frame, unless it is not there or the zero page."""
        return None if gfn in self.zero else self.frames.get(gfn)

    def mapping_level(self, gfn: int) -> int:
        """2 in a huge page, else 1."""
        return 2 if gfn & ~511 in self.huge_ranges else 1

    def discard(self, first: int, last: int) -> list[tuple[int, int]]:
        """The host takes back [first, last): the ranges that KVM is told of, in order.

        A huge page of which only a part goes is split before, and KVM is told of all of it.
        """
        told = [(first, last)]
        for start in sorted({first & ~511, last - 1 & ~511} & self.huge_ranges):
            if start < first or last < start + 512:
                told.insert(0, (start, start + 512))
        for gfn in range(first, last):
            self.frames.pop(gfn, None)
            self.zero.discard(gfn)
            self.huge_ranges.discard(gfn & ~511)
        return told


class GuestCopy:
    """A copy of guest memory: `pieces` of (gpa, bytearray)."""

    def __init__(self, pieces: list[tuple[int, bytearray]]) -> None:
        self.pieces = pieces

    def _find(self, gpa: int) -> tuple[bytearray, int] | None:
        for start, data in self.pieces:
            if start <= gpa < start + len(data):
                return data, gpa - start
        return None

    def get(self, gpa: int, size: int = 1) -> bytes | None:
        """Bytes at `gpa`; None: there is no memory."""
        found = self._find(gpa)
        return None if found is None else bytes(found[0][found[1] : found[1] + size])

    def put(self, gpa: int, data: bytes) -> None:
        """Write bytes, all in one piece."""
        found = self._find(gpa)
        assert found is not None
        found[0][found[1] : found[1] + len(data)] = data


class Player:
    """Lets a simulator take the steps of a program, as KVM takes them with the lab's driver.

    `memory`, `host`: what the simulator works on.  `driver`: the address of the driver's code for each kind of access.
    `logs`: what each "take_log" found.
    """

    def __init__(self, mmu: ShadowMmu, memory: GuestCopy, host: HostFrames, driver: Mapping[str, int]) -> None:
        self.mmu, self.memory, self.host, self.driver = mmu, memory, host, driver
        self.logs: list[set[int]] = []
        host.mmu = mmu

    def take(self, step: Step) -> tuple[SimAccess, list[MmuEvent]] | None:
        """One step.  Of an access: what becomes of it, and the events since the access before."""
        mmu, what = self.mmu, step.what
        base = SLOTS[step.slot][0] >> 12
        if what == "sregs":
            assert step.registers is not None
            registers = step.registers
            mmu.set_sregs(cr0=registers.cr0, cr3=registers.cr3, cr4=registers.cr4, efer=registers.efer)
        elif what == "log":
            mmu.set_log_dirty(base, step.on)
        elif what == "take_log":
            self.logs.append(mmu.get_dirty_log(base))
        elif what == "discard":
            last = min(base + step.first + step.count, base + SLOTS[step.slot][1] // PAGE_SIZE)
            for start, end in self.host.discard(base + step.first, last):
                mmu.unmap_gfn_range(start, end)
            self.memory.put((base + step.first) << 12, bytes((last - base - step.first) << 12))
        elif what == "zap":
            mmu.add_slot(SimSlot(1 << 28, 1))
            mmu.delete_slot(1 << 28)
        else:
            return self._access(step), mmu.take_events()
        return None

    def _access(self, step: Step) -> SimAccess:
        mmu, what = self.mmu, step.what
        data = step.value.to_bytes(8, "little")[: 1 if what == "store8" else 8]
        if not step.user:
            mmu.enter()
            if what == "invlpg":
                mmu.invlpg(step.gva)
            elif what == "cr3":
                mmu.mov_cr3(step.gva)
            else:
                return mmu.write(step.gva, data)
            return SimAccess()
        if what == "fetch":
            found = mmu.access(step.gva, "fetch", b"\0")
            if found.fault is None and found.mmio is None:
                # OUT is privileged: KVM reads it by the guest's tables, kvm_pvm and the emulator once each
                for access in (_USER, _USER | _FETCH):
                    mmu.walk(step.gva, access)
            return found
        if mmu.access(self.driver[what], "fetch", b"\0").fault is not None:
            raise AssertionError("the driver faults")
        found = mmu.access(step.gva, "store" if what == "store8" else what, data)
        if found.fault is None:
            mmu.access(self.driver[what], "fetch", b"\0")  # OUT, behind the access
        return found


class Program:
    """A random program; see the module's text.

    `steps`: all of it.  `predicted`: of each access, what becomes of it and the events since the access before.
    `logs`: what each "take_log" finds, as offsets of frames.
    """

    def __init__(self, seed: int, bench: Bench) -> None:
        self.seed, self._random = seed, Random(seed)
        self.steps: list[Step] = []
        self.predicted: list[tuple[Step, SimAccess, list[MmuEvent]]] = []
        self.logs: list[set[int]] = []
        self._bench, self._memory = bench, bench.memory
        self._gvas: list[int] = []
        self._hot: list[int] = []  # addresses that an access reached
        self._roots: list[int] = []
        self._made: dict[int, list[int]] = {1: [], 2: [], 3: []}
        rnd = self._random
        self._wide = rnd.random() < 0.3  # many large pages, thus many shadow pages
        self._windowed = rnd.random() < 0.7
        self._recursive = rnd.random() < 0.15
        self._build_tables()
        #: The registers that it begins with.
        self.registers = self._any_registers(plain=0.65)
        self.mmu = bench.new_mmu(self.registers)
        self._player = Player(self.mmu, bench.memory, bench.host, bench.driver)
        self._choose_steps()

    # ---- tables ----

    def _poke(self, gpa: int, value: int) -> None:
        table = self._tables.setdefault(gpa & ~0xFFF, [0] * 512)
        table[gpa % PAGE_SIZE // 8] = value

    def _build_tables(self) -> None:
        rnd = self._random
        self._tables: dict[int, list[int]] = {}
        far = [SLOTS[slot][0] + (_FAR_TABLES + i) * PAGE_SIZE for slot in (LOGGED, READONLY) for i in range(2)]
        alias_pdpt, alias_pd, pdpt, pd, pt = _FIXED
        self._poke(alias_pdpt, alias_pd | _TABLE)
        for i in range(2):
            self._poke(alias_pd + 8 * i, _TABLES + i * 2 * MiB | _P | _W | _A | _D | _PS)
        self._poke(pdpt, pd | _TABLE)
        self._poke(pd, pt | _TABLE)
        for i in range(_NR_TABLES - 2):
            flags = _P | _U | _A | (_W if rnd.random() < 0.92 else 0) | (_D if rnd.random() < 0.8 else 0)
            self._poke(pt + 8 * i, _TABLES + i * PAGE_SIZE | flags)
        self._free = [_TABLES + i * PAGE_SIZE for i in range(_NR_TABLES - len(_FIXED))]
        rnd.shuffle(self._free)
        for _ in range(rnd.choice((1, 2, 2, 3, 5))):
            self._roots.append(root := self._free.pop())
            self._poke(root + 8 * _DRIVER, _DRIVER_PDPT | _TABLE)
            self._poke(root + 8 * _ALIAS, alias_pdpt | _TABLE)
            if self._windowed:
                self._poke(root + 8 * _WINDOW, pdpt | _TABLE)
            if self._recursive:
                self._poke(root + 8 * _RECURSIVE, root | _TABLE | (_D if rnd.random() < 0.8 else 0))
        self._free += far * rnd.randrange(2)
        rnd.shuffle(self._free)
        for root in self._roots:
            for i in range(rnd.choice((1, 1, 2))):
                self._poke(root + 8 * i, self._link(3, i << 39))
        if self._recursive:
            top = _RECURSIVE << 39
            self._gvas += [top | _RECURSIVE << 30 | _RECURSIVE << 21 | i << 12 for i in range(4)]
            self._gvas += [top | _RECURSIVE << 30 | i << 12 for i in range(3)]
            self._gvas += [top | i << 12 for i in range(3)]
        self._gvas = sorted(set(self._gvas)) or [0]
        near = range(_TABLES, _TABLES + _NR_TABLES * PAGE_SIZE, PAGE_SIZE)
        images = {gpa: pack("<512Q", *self._tables.get(gpa, _NO_ENTRIES)) for gpa in [*near, *far]}
        self._bench.poke(_TABLES, b"".join(images[gpa] for gpa in near))
        for gpa in far:
            self._bench.poke(gpa, images[gpa])

    def _upper(self) -> int:
        rnd, flags = self._random, _P | _U if self._wide else 0
        for bit, odds in ((_P, 0.97), (_W, 0.85), (_U, 0.95), (_A, 0.5), (_PWT, 0.03), (_PCD, 0.03), (_NX, 0.03)):
            flags |= bit if rnd.random() < odds else 0
        return flags

    def _link(self, level: int, gva: int) -> int:
        # An entry that leads to a table of `level`: a new one, or one that is there.
        rnd = self._random
        made = self._made[level]
        if rnd.random() < 0.06:  # made for another level
            made = self._made[rnd.choice((1, 2, 3))]
        if made and (rnd.random() < (0.05 if self._wide else 0.3) or not self._free):
            return rnd.choice(made) | self._upper()
        if not self._free:
            return 0
        table = self._free.pop()
        self._made[level].append(table)
        odds = 0.4 if self._wide else 0.3
        sizes = {3: (1, 2), 2: (12, 24, 48) if self._wide else (1, 2, 3), 1: (3, 8, 14, 24)}
        start = rnd.choice((0, 0, 4, 13, 500)) if level == 1 else 0
        for i in range(start, min(start + rnd.choice(sizes[level]), 512)):
            at = gva | i << 12 + 9 * (level - 1)
            if level == 1 or (level == 2 and rnd.random() < odds):
                self._poke(table + 8 * i, self._leaf(level))
                self._gvas.append(at)
            else:
                self._poke(table + 8 * i, self._link(level - 1, at))
        return table | self._upper()

    def _leaf(self, level: int) -> int:
        # A random entry that maps a page.
        rnd, flags = self._random, 0
        for bit, odds in (
            (_P, 0.94), (_W, 0.75), (_U, 0.94), (_A, 0.7), (_D, 0.5), (_NX, 0.12), (_G, 0.1), (_PCD, 0.04),
            (1 << 9, 0.1), (1 << 55, 0.05), (1 << 51, 0.02),
        ):  # fmt: skip
            flags |= bit if rnd.random() < odds else 0
        return self._frame(level) | flags | (_PS if level > 1 else 0)

    def _frame(self, level: int) -> int:
        rnd = self._random
        gpa, size, *_ = rnd.choice(SLOTS)
        if rnd.random() < 0.03:
            gpa, size = _HOLE, 2 * MiB
        elif level == 1 and rnd.random() < 0.1:
            gpa, size = _TABLES, _NR_TABLES * PAGE_SIZE
        elif level == 2 and rnd.random() < 0.3:
            gpa, size, *_ = SLOTS[HUGE]
        if level == 2:
            return gpa + rnd.randrange(max(size // (2 * MiB), 1)) * 2 * MiB
        first = _NR_TABLES if gpa == _TABLES and size == SLOTS[PLAIN][1] else 0
        return gpa + (first + rnd.randrange(min(size // PAGE_SIZE, _LEAVES))) * PAGE_SIZE

    def _any_registers(self, plain: float) -> Registers:
        rnd = self._random
        cr3 = rnd.choice(self._roots)
        if rnd.random() < plain:
            return Registers(cr3)
        cr0 = _CR0 & ~(_CR0_WP if rnd.random() < 0.4 else 0)
        cr4 = _CR4 | (_SMEP if rnd.random() < 0.4 else 0) | (_SMAP if rnd.random() < 0.3 else 0)
        return Registers(cr3, cr0, cr4, _EFER & ~(_EFER_NX if rnd.random() < 0.4 else 0))

    # ---- steps ----

    def _now(self) -> Registers:
        mmu = self.mmu
        return Registers(mmu.cr3, mmu.cr0, mmu.cr4, mmu.efer)

    def _choose_steps(self) -> None:
        rnd = self._random
        if self._wide:
            tables = list({gva >> 21: gva for gva in rnd.sample(self._gvas, len(self._gvas))}.values())
            for gva in tables[:70]:
                self._step(Step("load", self._inside(gva)))
        for _ in range(rnd.randrange(16, 48)):
            for step in self._random_steps():
                self._step(step)
        for gva in rnd.sample(self._gvas, min(len(self._gvas), 14)):
            self._step(Step("load", self._inside(gva)))
        for gva in rnd.sample(self._gvas, min(len(self._gvas), 6)):
            self._step(self._store(self._inside(gva)))

    def _inside(self, gva: int) -> int:
        return gva + self._random.randrange(512) * 8

    def _any_gva(self) -> int:
        rnd = self._random
        gva = rnd.choice(self._gvas) if rnd.random() < 0.94 else rnd.randrange(1 << 30) & ~0xFFF
        gva += rnd.randrange(512) << 12 if rnd.random() < 0.08 else 0
        return self._inside(gva)

    def _random_steps(self) -> list[Step]:
        rnd = self._random
        gva, what = self._any_gva(), rnd.random()
        if what < 0.24:
            return [Step("load", gva)]
        if what < 0.44:
            return [self._store(gva)]
        if what < 0.53:
            # KVM reads the 15 bytes that an instruction may have; where they go on in the next page, it walks that too
            # (and sets A there), which no access of the guest does.
            gva -= 8 * (gva % PAGE_SIZE == PAGE_SIZE - 8)
            return [Step("fetch", gva) if self._may_fetch(gva) else Step("load", gva)]
        if what < 0.66:
            return self._edit(rnd.choice(self._hot) if self._hot and rnd.random() < 0.7 else gva)
        if what < 0.74:
            return [self._table_store()]
        if what < 0.76:
            level = rnd.choice((2, 3, 4))
            return [self._table_store(level) for _ in range(rnd.randrange(2, 6))]
        if what < 0.78:
            return self._log_huge()
        if what < 0.81:
            return [Step("invlpg", gva, user=False)]
        if what < 0.86:
            return [Step("cr3", rnd.choice(self._roots), user=False)]
        if what < 0.89:
            return [Step("sregs", registers=self._any_registers(plain=0.8))]
        if what < 0.93:
            slot = rnd.choice((LOGGED, LOGGED, HUGE, HUGE, PLAIN))
            on = self.mmu.slots[slot + 1].log_dirty
            return [Step("take_log", slot=slot) if on and rnd.random() < 0.5 else Step("log", slot=slot, on=not on)]
        if what < 0.985:
            slot = rnd.choice((LOGGED, READONLY, ABSENT, ABSENT, HUGE))
            first = rnd.randrange(_LEAVES) if slot != HUGE else rnd.randrange(SLOTS[HUGE][1] // PAGE_SIZE)
            return [Step("discard", slot=slot, first=first, count=rnd.randrange(1, 17))]
        return [Step("zap")]

    def _store(self, gva: int) -> Step:
        # To a table an entry; else what may be fetched.
        gpa = self.mmu.where(gva, _USER)
        stale = self.mmu.translation(gva)
        tables = range(_TABLES, _TABLES + _NR_TABLES * PAGE_SIZE)
        if stale is not None and stale != gpa and (stale in tables or stale < 2 * MiB):
            return Step("load", gva)  # what the driver needs may be there
        if gpa is not None and gpa < 2 * MiB:
            return Step("load", gva)
        if gpa is None or gpa not in tables:
            return Step("store8" if self._random.random() < 0.2 else "store", gva)
        if gpa >= _FIXED[-1] or gpa % PAGE_SIZE >= 8 * _ALIAS or gpa % PAGE_SIZE // 8 in (_WINDOW, _RECURSIVE):
            return Step("load", gva)
        return Step("store", gva, value=self._new_entry())

    def _new_entry(self) -> int:
        rnd = self._random
        if rnd.random() < 0.15:
            return 0
        made = self._made[rnd.choice((1, 2))]
        return rnd.choice(made) | self._upper() if made and rnd.random() < 0.25 else self._leaf(1)

    def _write(self, at: int, value: int) -> Step | None:
        # A step that writes an entry at gpa `at`, by CPL 0 or by CPL 3 through its window.
        rnd = self._random
        if not _TABLES <= at < _FIXED[-1]:
            return None
        user = self._windowed and rnd.random() < 0.6
        kind = "store8" if rnd.random() < 0.04 else "store"
        return Step(kind, (_WINDOW_GVA if user else _ALIAS_GVA) + at - _TABLES, user=user, value=value)

    def _edit(self, gva: int) -> list[Step]:
        # The last entry of an address is changed, and perhaps made known.
        rnd = self._random
        entries = walk_addr(self.mmu.guest, self._entry, gva, _USER).entries
        if not entries:
            return []
        entry = entries[-1]
        index = entry.gpa % PAGE_SIZE // 8
        if entry.gpa & ~0xFFF in self._roots and index > 1:
            return [Step("load", gva)]
        value, how = entry.value, rnd.random()
        if how < 0.45:
            value ^= rnd.choice((_W, _W, _U, _NX, _P, _A, _D, _A | _D, _W | _D))
        elif how < 0.7 and entry.level <= 2:
            large = value & _PS if entry.level == 2 else 0
            if large or entry.level == 1:
                value = self._frame(entry.level) | value & (0xFFF | _NX)
        elif how < 0.8:
            value = 0
        elif entry.level <= 2:
            value = self._leaf(entry.level)
        step = self._write(entry.gpa, value)
        if step is None:
            return [Step("load", gva)]
        after = rnd.choice(("", "", "load", "store", "invlpg", "cr3", "sregs"))
        found = [step]
        if after == "invlpg":
            found.append(Step("invlpg", gva, user=False))
        elif after == "cr3":
            found.append(Step("cr3", self.mmu.cr3 if rnd.random() < 0.6 else rnd.choice(self._roots), user=False))
        elif after == "sregs":
            found.append(Step("sregs", registers=self._now().at(rnd.choice(self._roots))))
        if after:
            found.append(Step("store" if after == "store" and entry.level > 1 else "load", gva))
        return found

    def _entry(self, gpa: int, size: int) -> int | None:
        found = self._memory.get(gpa, size)
        return None if found is None else int.from_bytes(found, "little")

    def _table_store(self, level: int = 0) -> Step:
        # An entry of any table is written, with what may stand at its level.
        rnd = self._random
        level = level or rnd.choice((1, 1, 1, 2, 2, 3))
        made = self._roots if level == 4 else [table for table in self._made[level] if _TABLES <= table < _FIXED[-1]]
        if not made:
            return Step("invlpg", rnd.choice(self._gvas), user=False)
        at = rnd.choice(made) + rnd.randrange({1: 24, 4: 2}.get(level, 3)) * 8
        if level == 1:
            value = self._leaf(1) if rnd.random() < 0.85 else 0
        elif level == 2 and rnd.random() < 0.4:
            value = self._leaf(2)
        else:
            below = self._made[level - 1]
            value = rnd.choice(below) | self._upper() if below and rnd.random() < 0.9 else 0
        step = self._write(at, value)
        assert step is not None
        return step

    def _log_huge(self) -> list[Step]:
        # Dirty logging of the huge slot on and off again, with accesses between.
        base, size, *_ = SLOTS[HUGE]
        there = [gva for gva in self._gvas if base <= (self.mmu.where(gva, _USER) or 0) < base + size]
        if not there:
            return [Step("invlpg", self._random.choice(self._gvas), user=False)]
        gva = self._inside(self._random.choice(there))
        on = self.mmu.slots[HUGE + 1].log_dirty
        kinds = [self._random.choice(("load", "store")) for _ in range(3)]
        logs = [Step("log", slot=HUGE, on=not on), Step("log", slot=HUGE, on=on)]
        return [Step(kinds[0], gva), logs[0], Step(kinds[1], gva), logs[1], Step(kinds[2], gva)]

    def _may_fetch(self, gva: int) -> bool:
        # Whether a fetch faults, or finds OUT; KVM reads the instruction once more by the guest's tables.
        gpa, stale = self.mmu.where(gva, _USER | _FETCH), self.mmu.translation(gva)
        if gpa is None:
            return stale is None
        found = self._memory.get(gpa)
        return (stale is None or stale == gpa) and found is not None and found == _FILL

    def _step(self, step: Step) -> None:
        self.steps.append(step)
        found = self._player.take(step)
        if step.what == "take_log":
            self.logs.append(self._player.logs[-1])
        if found is None:
            return
        self.predicted.append((step, *found))
        if step.user and found[0].fault is None and step.gva < _WINDOW_GVA:
            self._hot.append(step.gva)
