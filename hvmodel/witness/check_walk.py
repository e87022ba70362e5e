"""Checks of hvmodel.mmu.walk: the kernel's own walks of random guest page tables, entry by entry.

A `_World` is a set of page tables, of 4 levels, whose entries are drawn at random: what is right, and what is not
(absent, reserved bits, tables where there is no memory, tables and pages in a read-only slot), under random CR0.WP,
CR4.SMEP, SMAP, PKE, EFER.NXE, PKRU and EFLAGS.AC.  The model has a copy of the guest's memory.  Each walk that the
kernel traces is made in the copy too, with its updates of A and D, so that the copy goes along with the guest; behind
each world the tables of both are compared byte for byte.

Worlds are numbered, and a number says all that is random.  A run of `cases` cases begins with the world of the number
`cases`, so that fast and slow runs see others; what differs is told with its world's number, and
`check_walk_access(Tally("ours", "theirs"), 1, first=NUMBER)` does that world again.

Not compared: the walks of the lab's own addresses (MmuLab), and worlds of whose trace records were lost, which are
counted, and told as lacking.
"""

from __future__ import annotations

import random
from itertools import count

from ..arch.cpuid import has_feature, max_phys_bits, vendor_of
from ..errors import KvmError
from ..mmu.guest_memory import GuestMemory
from ..mmu.walk import GuestMmu, Walker
from ..units import PAGE_SIZE, MiB
from .kvm_trace import TraceLost, VcpuMatchMmio, walks
from .lab import Access, LabSlot, MmuLab
from .registry import check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..mmu.walk import Walk
    from .kvm_trace import TracedWalk
    from .lab import Outcome
    from .result import Tally

__all__ = ["check_walk", "check_walk_access"]

# The guest's memory: tables at the start of slot 1, pages of 4 KiB and of 2 MiB behind; slot 2 is read-only, the same.
_RAM, _RAM_SIZE = 16 * MiB, 8 * MiB
_TABLES = 96 * PAGE_SIZE
_ROM, _ROM_SIZE = 32 * MiB, 4 * MiB
_ROM_TABLES = 16 * PAGE_SIZE
_HOLES = (0xD0000000, 0x3FFFFE00000, 0x40000000)  # where no slot is
_CR3 = _RAM

# Of the root's entries the last one is the driver's; at CPL 3 kvm_pvm has 256 for itself, and gives #PF with no walk.
_ROOT_INDICES = [index for index in range(511) if index != 256]

_P, _RW, _US, _A, _D, _PS, _G = 1, 2, 4, 0x20, 0x40, 0x80, 0x100
_NX = 1 << 63
_W, _U, _F = 2, 4, 0x10  # PFERR
_WP, _AC, _NXE = 1 << 16, 1 << 18, 1 << 11
_SMEP, _SMAP, _PKE = 1 << 20, 1 << 21, 1 << 22

_PK = 0x20  # of an error code: a protection key forbids it

# A few values, for the model makes a walker for each; key 0, which the driver's pages have, permits all.  Nothing
# permitted, no writes, and mixtures.
_PKRU = (0x55555554, 0xAAAAAAA8, 0xE4E4E4E4, 0x1B6C39D8, 0xA038B35C)

_KIND_BITS = {"load": 0, "store": _W, "fetch": _F}
_STORES = 0x80  # stores go below this offset of a page, fetches to it and above
_PAGE_FAULT = 14

_ACCESSES = 64  # of a world
_PATHS, _WIDE_PATHS = 40, 160  # addresses of a world, which has few tables, and of a wide one
_RETRIES = 20  # of worlds whose trace was not complete, one after the other


class _Copy:
    # The model's copy of the guest's memory, and what it walks there by.
    def __init__(self, lab: MmuLab) -> None:
        self.lab = lab
        self.ram, self.rom = bytearray(_RAM_SIZE), bytearray(_ROM_SIZE)
        self.memory = GuestMemory([(_RAM, self.ram, True), (_ROM, self.rom, False)])
        self.resync()
        entries = lab.vcpu.get_cpuid2()
        self.maxphyaddr = max_phys_bits(entries)
        self.gbpages = has_feature(entries, "PDPE1GB")
        self.amd = vendor_of(entries) in ("AuthenticAMD", "HygonGenuine")
        self._walkers: dict[tuple[int, ...], Walker] = {}
        self.pkru = 0  # the guest's, where it has a meaning
        self.cr4_bits = _cr4_bits(lab)
        self.emulates = False  # whether KVM walks for each access of CPL 0, and not for the first to a page only

    def resync(self) -> None:
        self.ram[:] = self.lab.read(_RAM, _RAM_SIZE)
        self.rom[:] = self.lab.read(_ROM, _ROM_SIZE)

    def draw_registers(self, rng: random.Random) -> None:
        lab = self.lab
        lab.cr0 = lab.cr0 & ~_WP | _WP * (rng.random() < 0.6)
        lab.cr4 = 0x20 | sum(bit for bit in self.cr4_bits if rng.random() < 0.4)
        lab.efer = lab.efer & ~_NXE | _NXE * (rng.random() < 0.85)
        lab.cr3 = _CR3
        if _PKE in self.cr4_bits:
            lab.pkru = rng.choice(_PKRU)
            self.pkru = lab.pkru if lab.cr4 & _PKE else 0

    def registers(self) -> str:
        lab = self.lab
        return f"CR0 {lab.cr0:#x} CR4 {lab.cr4:#x} EFER {lab.efer:#x} PKRU {self.pkru:#x}"

    def walker(self, ac: bool = False, *, keys: bool = True) -> Walker:
        # By the registers of now; without `keys` as if CR4.PKE were clear.
        lab = self.lab
        key = (lab.cr0, lab.cr4, lab.efer, self.pkru, ac, keys)
        walker = self._walkers.get(key)
        if walker is None:
            mmu = GuestMmu.of(
                cr3=_CR3,
                cr0=lab.cr0,
                cr4=lab.cr4 if keys else lab.cr4 & ~_PKE,
                efer=lab.efer,
                rflags=2 | _AC * ac,
                pkru=self.pkru,
                maxphyaddr=self.maxphyaddr,
                gbpages=self.gbpages,
                amd=self.amd,
            )
            walker = self._walkers[key] = Walker.of(self.memory, mmu)
        return walker

    def read(self, gpa: int, size: int) -> int | None:
        # A number in memory; None where there is none.
        for start, data in ((_RAM, self.ram), (_ROM, self.rom)):
            if start <= gpa < start + len(data):
                return int.from_bytes(data[gpa - start : gpa - start + size], "little")
        return None

    def store(self, gpa: int, value: int) -> bool:
        # False: no memory that may be written.
        if not _RAM <= gpa < _RAM + _RAM_SIZE:
            return False
        self.ram[gpa - _RAM : gpa - _RAM + 8] = value.to_bytes(8, "little")
        return True

    def tables_differ(self) -> str | None:
        # Where the tables of the guest are not those of the copy.
        for start, data, size in ((_RAM, self.ram, _TABLES), (_ROM, self.rom, _ROM_TABLES)):
            theirs = self.lab.read(start, size)
            if theirs != data[:size]:
                at = next(at for at in range(0, size, 8) if theirs[at : at + 8] != data[at : at + 8])
                return f"the entry at {start + at:#x} is {int.from_bytes(theirs[at : at + 8], 'little'):#x}"
        return None


class _World:
    # Random registers, and random tables in both memories; `addresses` that they map, or nearly, each of another page.
    def __init__(self, number: int, copy: _Copy, *, wide: bool = False) -> None:
        self.number, self.copy = number, copy
        self.rng = rng = random.Random(f"{'wide ' * wide}world {number}")
        copy.draw_registers(rng)
        self.name = f"world {number}: {copy.registers()}"
        copy.ram[:_TABLES] = bytes(_TABLES)
        copy.rom[:_ROM_TABLES] = bytes(_ROM_TABLES)
        self._free = [_CR3 + PAGE_SIZE, _ROM]
        self.addresses: list[int] = []
        width = 4 if wide else 3
        sets = [rng.sample(_ROOT_INDICES, width), rng.sample(range(512), width), rng.sample(range(512), width)]
        window = rng.randrange(0, 504)
        for _ in range(_WIDE_PATHS if wide else _PATHS):
            path = [rng.choice(indices) for indices in sets] + [window + rng.randrange(8)]
            self._path(path)
        self.addresses = list(dict.fromkeys(self.addresses))
        copy.lab.write(_RAM, bytes(copy.ram[:_TABLES]))
        copy.lab.write(_ROM, bytes(copy.rom[:_ROM_TABLES]))
        copy.lab.link(_CR3)
        copy.ram[8 * 511 : 4096] = copy.lab.read(_CR3 + 8 * 511, 8)

    def _path(self, path: list[int]) -> None:
        # Makes the entries of one address, as far as they lead to a table.
        gva = path[0] << 39 | path[1] << 30 | path[2] << 21 | path[3] << 12
        if path[0] >> 8:
            gva |= 0xFFFF << 48
        self.addresses.append(gva)
        table = _CR3
        for level, index in zip((4, 3, 2, 1), path, strict=True):
            data, at = self._table(table)
            at += 8 * index
            entry = int.from_bytes(data[at : at + 8], "little")
            if not entry:
                entry = self._entry(level)
                data[at : at + 8] = entry.to_bytes(8, "little")
            table = entry & 0xFFFFFFFFFF000
            if level == 1 or entry & _PS or not self._is_table(table):
                return

    def _table(self, gpa: int) -> tuple[bytearray, int]:
        return (self.copy.ram, gpa - _RAM) if gpa >= _RAM and gpa < _RAM + _TABLES else (self.copy.rom, gpa - _ROM)

    def _is_table(self, gpa: int) -> bool:
        return _RAM <= gpa < _RAM + _TABLES or _ROM <= gpa < _ROM + _ROM_TABLES

    def _entry(self, level: int) -> int:
        rng = self.rng
        draw = rng.random
        if draw() < 0.04:
            return rng.getrandbits(63) << 1 | 0x2000  # absent
        entry = _P if draw() < 0.98 else 0
        for bit, share in ((_RW, 0.8), (_US, 0.75), (_A, 0.5), (_D, 0.5), (_G, 0.1), (8, 0.1), (16, 0.1), (_NX, 0.08)):
            if draw() < share:
                entry |= bit
        if draw() < 0.2:
            entry |= rng.getrandbits(3) << 9
        if draw() < 0.2:
            entry |= rng.getrandbits(7) << 52  # ignored
        if draw() < 0.5:
            entry |= rng.getrandbits(4) << 59  # protection key
        if draw() < 0.015 and self.copy.maxphyaddr < 52:
            entry |= 1 << rng.randrange(self.copy.maxphyaddr, 52)
        if level == 1:
            return entry | _PS * (draw() < 0.1) | self._page(PAGE_SIZE, _TABLES, _ROM_TABLES)
        if level == 2 and draw() < 0.25:
            entry |= _PS | self._page(2 * MiB, 2 * MiB, 2 * MiB) | 0x1000 * (draw() < 0.1)
            return entry | (1 << rng.randrange(13, 21)) * (draw() < 0.05)
        if level > 2 and draw() < 0.01:
            return entry | _PS | _HOLES[2]
        return entry | self._new_table()

    def _page(self, size: int, ram_from: int, rom_from: int) -> int:
        rng = self.rng
        where = rng.random()
        if where < 0.06:
            return rng.choice(_HOLES) & -size
        if where < 0.18:
            return _ROM + rng.randrange(rom_from // size, _ROM_SIZE // size) * size
        return _RAM + rng.randrange(ram_from // size, _RAM_SIZE // size) * size

    def _new_table(self) -> int:
        where = self.rng.random()
        if where < 0.015:
            return self.rng.choice(_HOLES)
        rom = where < 0.06 and self._free[1] < _ROM + _ROM_TABLES
        at = self._free[rom]
        if at >= _RAM + _TABLES and not rom:
            return _HOLES[0]
        self._free[rom] += PAGE_SIZE
        return at

    def accesses(self, nr: int) -> Iterator[Access]:
        rng = self.rng
        for _ in range(nr):
            kind = rng.choices(("load", "store", "fetch"), (5, 4, 2))[0]
            offset = rng.randrange(0, 16) * 8
            if kind == "fetch":
                offset = rng.randrange(_STORES, PAGE_SIZE)
            elif kind == "load" and rng.random() < 0.5:
                offset = rng.randrange(512) * 8
            value = rng.getrandbits(64) if kind == "store" else 0x5A
            yield Access(rng.choice(self.addresses) + offset, kind, rng.random() < 0.45, value, ac=rng.random() < 0.15)

    def translations(self) -> list[int]:
        # An address of each page, of pages that differ from them in one bit, and of any page.
        rng, found = self.rng, {}
        for page in self.addresses:
            found[page] = page
            if rng.random() < 0.2:
                found.setdefault(other := page ^ 1 << rng.randrange(12, 64), other)
            elif rng.random() < 0.1:
                found.setdefault(other := rng.getrandbits(52) << 12, other)
        gvas = [page + rng.randrange(PAGE_SIZE) for page in found if page >> 39 & 511 != 511]
        rng.shuffle(gvas)
        return gvas


def _slots() -> tuple[LabSlot, LabSlot]:
    return LabSlot(_RAM, _RAM_SIZE), LabSlot(_ROM, _ROM_SIZE, flags=2)


def _cr4_bits(lab: MmuLab) -> list[int]:
    # Those of the bits that change a walk that KVM takes.
    found = []
    for bit in (_SMEP, _SMAP, _PKE):
        sregs = lab.sregs(False)
        sregs.cr4 |= bit
        try:
            lab.vcpu.sregs = sregs
            found.append(bit)
        except KvmError:
            continue
    lab.vcpu.sregs = lab.sregs(False)
    return found


@check("page walker", "KVM_TRANSLATE", cases=100_000, slow=1_000_000)
def check_walk(tally: Tally, cases: int, first: int | None = None) -> None:
    """Where random addresses lead, or that they lead nowhere, for a read by the supervisor; and the A bits it sets.

    `cases` addresses: of one world each of another page.  `first`: number of the first world, by default `cases`.
    """
    with MmuLab(_slots(), trace=False) as lab:
        copy = _Copy(lab)
        for number in count(cases if first is None else first):
            if tally.compared >= cases:
                break
            world = _World(number, copy, wide=True)
            walk, differ = copy.walker().walk, []
            gvas = world.translations()
            for gva, theirs in zip(gvas, lab.translate(gvas), strict=True):
                ours = walk(gva, 0, True).gpa
                if ours != theirs:
                    differ.append(f"{world.name}, {gva:#x}: {_gpa(ours)}, KVM_TRANSLATE says {_gpa(theirs)}")
            tally.count(len(gvas), differ)
            tally.compare(f"{world.name}: tables behind the walks", None, copy.tables_differ())


def _gpa(gpa: int | None) -> str:
    return "nowhere" if gpa is None else f"{gpa:#x}"


@check("page walker", "kvmmmu trace of guest accesses", cases=20_000, slow=200_000)
def check_walk_access(tally: Tally, cases: int, first: int | None = None) -> None:
    """Loads, stores and fetches at CPL 0 and 3: each walk the kernel makes, with every entry it reads, the A and D bits
    it sets, and its error code; then what the guest has of it: the #PF's error code and CR2, the data, the exit.

    `cases` accesses that KVM walked for; of each are compared, and counted, the accesses its walks were for, each
    walk, and what it came to.  What KVM did not walk for is compared as far as it goes.  `first`: number of the first
    world, by default `cases`.
    """
    with MmuLab(_slots()) as lab:
        copy = _Copy(lab)
        copy.emulates = lab.need_walks()
        if not copy.cr4_bits:
            tally.lack("KVM takes none of CR4.SMEP, SMAP, PKE")
        done = lost = in_a_row = nr = 0
        unguarded = 0
        for number in count(cases if first is None else first):
            if done >= cases:
                break
            nr += 1
            world = _World(number, copy)
            lab.flush()
            try:
                outcomes = lab.run(world.accesses(_ACCESSES))
            except TraceLost:
                lost, in_a_row = lost + 1, in_a_row + 1
                if in_a_row > _RETRIES:
                    raise
                copy.resync()
                continue
            in_a_row, wrong = 0, tally.mismatches
            for outcome in outcomes:
                found = _Case(tally, world, outcome)
                done += found.compare()
                unguarded += found.unguarded
            tally.compare(f"{world.name}: walks behind the last access", [], walks(lab.trailing))
            tally.compare(f"{world.name}: tables behind the accesses", None, copy.tables_differ())
            if tally.mismatches > wrong:
                copy.resync()
        if lost:
            tally.lack(f"{lost} of {nr} worlds, of whose trace records were lost")
        if unguarded:
            tally.lack(
                f"protection keys where KVM does not walk again: {unguarded} accesses that PKRU forbids were made"
            )


class _Case:
    # One access, against the walks that it had and what it came to.
    def __init__(self, tally: Tally, world: _World, outcome: Outcome) -> None:
        self.tally, self.copy, self.outcome = tally, world.copy, outcome
        access = self.access = outcome.access
        self.walker = world.copy.walker(access.ac)
        self.bits = _KIND_BITS[access.kind] | (_U if access.user else 0)
        self.name = f"{world.name}, {access.kind} at {access.gva:#x} by {'user' if access.user else 'supervisor'}"
        self.unguarded = False  # it was made without a walk, and PKRU forbids it

    def compare(self) -> bool:
        # Whether KVM walked for it.
        tally, walker, own = self.tally, self.walker, self.outcome.own
        ours = walker.walk(self.access.gva, self.bits)
        if own:
            self._compare_accesses([traced.pferr & ~_P for traced in own])
        for traced in self.outcome.walks:
            found = walker.walk(traced.addr, traced.pferr & (_W | _U | _F), True)
            tally.compare(f"{self.name}: walk of {traced.addr:#x} for {traced.pferr:#x}", _told(found), _tells(traced))
        if not own:
            ours = self._not_walked(ours)
        tally.compare(f"{self.name}: outcome", self._expected(ours), _came(self.outcome))
        return bool(own)

    def _compare_accesses(self, theirs: list[int]) -> None:
        # What each of its walks is for: the access.  Of a fetch KVM's emulator walks once more, for the instruction
        # to be read as data, and does so first where there is a shadow page already.
        bits, access = self.bits, self.access
        if access.kind == "fetch":
            ours = [their if their == bits & ~_F else bits for their in theirs]
            if not access.user:
                ours[0] = bits
        else:
            ours = [bits] * len(theirs)
        self.tally.compare(f"{self.name}: accesses of its walks", ours, theirs)

    def _not_walked(self, walk: Walk) -> Walk:
        # By a shadow page, or because KVM keeps where the last access went that found no memory: these have nothing
        # but what a walk without a fault and without updates would find again.  They have no protection keys (kvm_pvm
        # lets the guest have them all the same; for the last one see linux:arch/x86/kvm/x86.c@v6.18,
        # vcpu_mmio_gva_to_gpa).
        again = any(type(event) is VcpuMatchMmio for event in self.outcome.records)
        may = self.access.user or again or not self.copy.emulates
        code = walk.error_code
        if may and code is not None and code & _PK:
            self.unguarded = True
            walk = self.copy.walker(self.access.ac, keys=False).walk(self.access.gva, self.bits)
        updates = [update for update in walk.updates if self.copy.memory.is_writable(update.gpa)] if not again else []
        self.tally.compare(f"{self.name}: not walked", (True, None, []), (may, walk.error_code, updates))
        return walk

    def _expected(self, walk: Walk) -> tuple[object, ...]:
        # What the guest should have of the access; a store is made in the copy.
        access, copy = self.access, self.copy
        if walk.gpa is None:
            return "fault", _PAGE_FAULT, walk.error_code, access.gva
        here = copy.read(walk.gpa, 8)
        if access.kind == "fetch":
            # Where the instruction may be fetched, and not read (SMAP, protection keys), KVM's reading it has failed,
            # and the guest has that fault as one of a fetch.
            own = self.outcome.own
            if own and own[-1].error is not None:
                code = self.walker.walk(access.gva, self.bits & ~_F).error_code or 0
                return "fault", _PAGE_FAULT, code | _F * self.walker.mmu.reports_fetch, access.gva
            return ("stop", "InternalError") if here is None else ("value", access.value)
        if access.kind == "store":
            if copy.store(walk.gpa, access.value):
                return "value", access.value
            return "mmio", walk.gpa, True
        return ("mmio", walk.gpa, False) if here is None else ("value", here)


def _told(walk: Walk) -> tuple[object, ...]:
    updates = walk.updates
    return (
        tuple((entry.level, entry.value) for entry in walk.entries),
        tuple(update.gpa for update in updates if update.accessed),
        tuple(update.gpa for update in updates if update.dirty),
        walk.error_code,
    )


def _tells(walk: TracedWalk) -> tuple[object, ...]:
    return walk.entries, walk.accessed, walk.dirty, walk.error


def _came(outcome: Outcome) -> tuple[object, ...]:
    fault = outcome.fault
    if fault is not None:
        return "fault", fault.vector, fault.error_code, fault.cr2
    if outcome.stop is not None:
        return "stop", type(outcome.stop).__name__
    if outcome.mmio:
        (gpa, _, write), *more = outcome.mmio
        return ("mmio", gpa, write, *more)
    return "value", outcome.value
