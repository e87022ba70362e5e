"""The checks by QEMU's own page-table walker (TCG): random walks of every paging mode, and what a CPU role means.

A *system* is a choice of registers with random page tables behind it, and some tens of accesses.  For each access the
model's walk says what must come of it, in the very memory that TCG then walks: a value, or the fault with its code; at
the end the tables' A and D bits are compared, and all that was stored.

TCG differs from a processor, and KVM's walker differs from one, in the places of `DEVIATIONS`.  A case that one of them
touches is compared with what TCG is known to do there, never left out; `check_tcg_deviations` holds each of them, by
an example, to both sides.
"""

from __future__ import annotations

import random
from itertools import product

from ..mmu.guest_memory import GuestMemory
from ..mmu.permission import PFERR_IMPLICIT_ACCESS
from ..mmu.role import calc_cpu_role
from ..mmu.walk import Walker
from ..value import Value
from .registry import check
from .tcg import DONE, FREE, PHYS_BITS, TcgAccess, TcgWalks, paging_mode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..mmu.walk import Walk
    from .result import Tally
    from .tcg import TcgResult

__all__ = ["DEVIATIONS", "Deviation", "check_tcg_deviations", "check_tcg_roles", "check_tcg_walks"]

_PE, _WP, _PG = 1 << 0, 1 << 16, 1 << 31
_PSE, _PAE, _PGE, _LA57, _SMEP, _SMAP, _PKE = 1 << 4, 1 << 5, 1 << 7, 1 << 12, 1 << 20, 1 << 21, 1 << 22
_LME, _LMA, _NXE = 1 << 8, 1 << 10, 1 << 11
_P, _W, _U, _A, _D, _PS, _NX = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 7, 1 << 63
_ERR_P, _ERR_W, _ERR_U, _ERR_RSVD, _ERR_F, _ERR_PK = 1, 2, 4, 8, 16, 32
_PF = 14
_AC = 1 << 18
_WALKER = "qemu:target/i386/tcg/sysemu/excp_helper.c mmu_translate@v7.2"


class Deviation(Value):
    """A place where TCG and KVM's walker differ.  `tcg`, `kvm`: what each does.  `right`: which is as the manuals say.

    `source`: where it is seen.
    """

    tcg: str
    kvm: str
    right: str
    source: str


# name -> what differs
DEVIATIONS: dict[str, Deviation] = {
    "rsvd-without-p": Deviation(
        "the error code of a reserved bit has RSVD, and P clear",
        "RSVD and P",
        "kvm (SDM volume 3, 5.7: RSVD is only set with P)",
        f"{_WALKER} do_fault_rsvd",
    ),
    "early-accessed": Deviation(
        "A is set on the way down, also where the walk then faults (and in a 1 GiB page's entry before its rights)",
        "A is set once the access is allowed, in all entries together",
        "both (SDM volume 3, 5.8 leaves open when A is set in an entry that was used)",
        f"{_WALKER} ptw_setl",
    ),
    "pdpte-accessed": Deviation(
        "a PDPTE of PAE paging gets A",
        "it has none: bit 5 is reserved there",
        "kvm (SDM volume 3, 5.4.1)",
        f"{_WALKER} restart_3_nolma",
    ),
    "pdpte-low-bits": Deviation(
        "bits 8:5 and 2:1 of a PDPTE of PAE paging are ignored, and PDPTEs are read at each walk",
        "PDPTEs are loaded with CR3, which a reserved bit makes a #GP",
        "kvm (SDM volume 3, 5.4.1)",
        f"{_WALKER} restart_3_nolma",
    ),
    "pse-40": Deviation(
        "bits 20:13 of a 4 MiB page are bits 39:32 of its address; bit 21 is reserved",
        "bits 16:13 are bits 35:32, 21:17 are reserved",
        "tcg, with 40 bits of physical address (SDM volume 3, 5.3); kvm, with 36",
        f"{_WALKER} do_check_protect_pse36; linux:arch/x86/kvm/mmu/paging_tmpl.h pse36_gfn_delta@v6.18",
    ),
    "fetch-2-level": Deviation(
        "without CR4.PAE and CR4.SMEP the error code has no F",
        "F with EFER.NXE, also in 2-level paging",
        "tcg (SDM volume 3, 5.7: F with SMEP, or with PAE and NXE)",
        "qemu:target/i386/helper.c get_pg_mode@v7.2; linux:arch/x86/kvm/mmu/paging_tmpl.h walk_addr_generic@v6.18",
    ),
    "amd-bit-8": Deviation(
        "bit 8 of a PML4E or PML5E is ignored, also on a processor of AMD",
        "it is reserved where the guest's CPUID is AMD's",
        "kvm (APM volume 2, 5.3.3: must be 0)",
        f"{_WALKER} restart_4",
    ),
    "implicit-ac": Deviation(
        "at CPL 0 RFLAGS.AC lifts SMAP for an access of the processor's own (to the LDT) too",
        "it lifts it for explicit accesses only",
        "kvm (SDM volume 3, 5.6.1)",
        "qemu:target/i386/cpu.h cpu_mmu_index_kernel@v7.2",
    ),
    "exchange-loads": Deviation(
        "XCHG with one processor is a load, then a store: a page that is not there has the code of a read",
        "it is a write",
        "kvm (SDM volume 3, 5.7: W, the access was a write)",
        "qemu:tcg/tcg-op.c tcg_gen_atomic_xchg_i64, do_nonatomic_op_i64@v7.2",
    ),
}

# ---- the memory: tables from FREE and from 24 GiB on, pages that are not tables elsewhere, each 16 bytes of them as
#   0        1              5              8
#   | b8     | number       | cd 80 | 90   | to be stored to |      mov $number, %eax; int $0x80; nop

_GIB = 1 << 30
_SLOT = 16
_STORED = 8  # where in a slot stores go
_GIBS = (1, 2, 5, 31, 100)  # 100 GiB has bit 36: the first that PSE-36 does not reach
_MEBIS = (0, 1, 0x12A, 0x12B)  # 2 MiB pages of each
_PAGES = (0, 5, 0x155, 0x1FF)  # 4 KiB pages of each
_FRAMES = [g << 30 | m << 21 | p << 12 for g in _GIBS for m in _MEBIS for p in _PAGES]
_LOW, _HIGH = FREE, 24 * _GIB
_AREA = 0x3000000  # bytes of tables at either place
_MISSING = 1 << 38  # no RAM from here to 1 << 40
_OF_A_BATCH = 48  # systems whose tables are there together
_OF_A_SYSTEM = 40  # accesses
_OPS = ("load", "load", "store", "store", "fetch", "fetch", "exchange", "implicit")
_CODE = frozenset(_FRAMES)
_ACCESS = {"load": 0, "store": _ERR_W, "fetch": _ERR_F, "exchange": _ERR_W, "implicit": PFERR_IMPLICIT_ACCESS}


def _fill_pages(ram: memoryview) -> None:
    # Each slot's number is its address by 16.
    for frame in _FRAMES:
        slots = [b"\xb8%b\xcd\x80\x90%b" % ((gpa >> 4 & 0xFFFFFFFF).to_bytes(4, "little"), bytes(8))
                 for gpa in range(frame, frame + 4096, _SLOT)]  # fmt: skip
        ram[frame : frame + 4096] = b"".join(slots)


class _Tables:
    # Frames for tables: some below 4 GiB, some above.
    def __init__(self) -> None:
        self.low, self.high = _LOW, _HIGH

    def frame(self, high: bool) -> int:
        if high:
            self.high += 4096
            return self.high - 4096
        self.low += 4096
        return self.low - 4096

    @property
    def full(self) -> bool:
        return self.low > _LOW + _AREA - 0x200000 or self.high > _HIGH + _AREA - 0x200000


class _System:
    # Registers, with random tables behind them, and the model's walkers.
    def __init__(self, rng: random.Random, tcg: TcgWalks, tables: _Tables, memory: GuestMemory) -> None:
        self.rng, self.ram, self.tables = rng, tcg.ram, tables
        self.mode = rng.choice(("2-level", "pae", "4-level", "5-level"))
        self.long = self.mode in ("4-level", "5-level")
        self.levels = {"2-level": 2, "pae": 3, "4-level": 4, "5-level": 5}[self.mode]
        self.size, self.bits = (4, 10) if self.mode == "2-level" else (8, 9)
        self.cr0 = _PG | _PE | _WP * rng.getrandbits(1)
        self.cr4 = {"2-level": 0, "pae": _PAE, "4-level": _PAE, "5-level": _PAE | _LA57}[self.mode]
        for bit in (_PGE, _SMEP, _SMAP, _PKE):
            self.cr4 |= bit * rng.getrandbits(1)
        self.cr4 |= _PSE * (rng.random() < 0.7)
        self.efer = (_LME if self.long else 0) | _NXE * (rng.random() < 0.7)
        self.pkru = rng.choice((0, rng.getrandbits(32), rng.getrandbits(32) & rng.getrandbits(32)))
        self.ac = rng.random() < 0.3
        self.amd = self.long and rng.random() < 0.3
        self.root = tables.frame(high=self.long and rng.random() < 0.3)
        flags = rng.getrandbits(2) << 3  # PCD, PWT
        if self.mode == "pae":
            self.root += rng.randrange(128) * 32
        tcg.set_root(self.mode, self.root)
        self.cr3 = self.root | flags
        self.mine: list[int] = [self.root]
        self.gvas: list[int] = []
        for _ in range(rng.randrange(6, 15)):
            self._map()
        self.walker = self._walker(memory, amd=self.amd)
        self.intel = self._walker(memory) if self.amd else self.walker
        self.memory = memory
        if self.mode == "pae":
            self._load_pdptes()

    def _load_pdptes(self) -> None:
        # The processor's copies, made with CR3, which each access loads anew; there it takes no reserved bits.
        first, second, third, fourth = (self.entry(self.root + 8 * at) & ~_A for at in range(4))
        self.pdptes = first, second, third, fourth
        self.loaded = self._walker(self.memory, pdptrs=self.pdptes)

    def _walker(
        self, memory: GuestMemory, *, amd: bool = False, pdptrs: tuple[int, int, int, int] | None = None
    ) -> Walker:
        return Walker(
            memory,
            cr0=self.cr0,
            cr3=self.cr3,
            cr4=self.cr4,
            efer=self.efer | (_LMA if self.long else 0),
            rflags=2 | (_AC if self.ac else 0),
            pkru=self.pkru,
            maxphyaddr=PHYS_BITS,
            amd=amd,
            pdptrs=pdptrs,
        )

    def __str__(self) -> str:
        return (
            f"{self.mode} cr0={self.cr0:#x} cr3={self.cr3:#x} cr4={self.cr4:#x} efer={self.efer:#x} pkru={self.pkru:#x}"
            f" ac={int(self.ac)} amd={int(self.amd)}"
        )

    def entry(self, at: int) -> int:
        return int.from_bytes(self.ram[at : at + self.size], "little")

    def put(self, at: int, entry: int) -> None:
        self.ram[at : at + self.size] = entry.to_bytes(self.size, "little")

    # ---- tables ----

    def shift(self, level: int) -> int:
        return 12 + self.bits * (level - 1)

    def _map(self) -> None:
        # One more address, and what is not there yet of the entries that lead to it.
        rng = self.rng
        width = 32 if not self.long else 57 if self.mode == "5-level" else 48
        gva = rng.getrandbits(width)
        if self.gvas and rng.random() < 0.6:  # beside another one: tables in common
            gva = rng.choice(self.gvas) ^ rng.getrandbits(rng.choice((12, 21, 30)) + 3)
        gva &= (1 << width) - 1
        top = self.shift(self.levels)
        if not gva >> top:
            gva |= rng.choice((1, 2, 3)) << top  # entry 0 is the guest's
        large = rng.random() < 0.5  # the parts of large pages that are there have these low bits
        if large:
            gva = gva & ~0x3FFFFFFF | rng.choice(_MEBIS) << 21 | rng.choice(_PAGES) << 12
            if self.mode == "2-level" and not gva >> top:
                gva |= 1 << 30
        table = self.root
        for level in range(self.levels, 0, -1):
            index = gva >> self.shift(level) & ((1 << self.bits) - 1 if (level, self.mode) != (3, "pae") else 3)
            at = table + index * self.size
            entry = self.entry(at)
            if not entry:
                entry = self._random_entry(level, large)
                self.put(at, entry)
            if level == 1 or not self._leads_on(entry, level):
                break
            table = entry & ((1 << PHYS_BITS) - 4096 if self.size == 8 else 0xFFFFF000)
        if self.long and gva >> width - 1:
            gva |= (1 << 64) - (1 << width)
        self.gvas.append(gva)

    def _leads_on(self, entry: int, level: int) -> bool:
        # To a table of this system, so that it makes sense to fill it.
        table = entry & ((1 << PHYS_BITS) - 4096 if self.size == 8 else 0xFFFFF000)
        return table in self.mine and not (entry & _PS and self._may_be_large(level))

    def _may_be_large(self, level: int) -> bool:
        if self.mode == "2-level":
            return level == 2 and bool(self.cr4 & _PSE)
        return level == 2 or (level == 3 and self.long)

    def _random_entry(self, level: int, large: bool) -> int:
        rng, kind = self.rng, self.mode
        entry = _P | _W * (rng.random() < 0.75) | _U * (rng.random() < 0.7)
        entry |= rng.getrandbits(12) & 0xE78  # PWT, PCD, A, D, bits 11:9
        is_leaf = level == 1 or (large and self._may_be_large(level) and rng.random() < 0.45)
        if is_leaf:
            entry |= rng.getrandbits(1) << 8 | self._page(level)
            if level == 1:
                entry |= rng.getrandbits(1) << 7  # PAT
            else:
                entry |= _PS | rng.getrandbits(1) << 12
        else:
            entry |= self._table()
            if level >= 4:
                entry |= (rng.random() < 0.04) << 8
            if kind == "2-level" and not self.cr4 & _PSE:
                entry |= rng.getrandbits(1) << 7
        if kind == "pae" and level == 3:
            entry &= ~0x1E6
            if rng.random() < 0.05:
                entry |= 1 << rng.choice((1, 2, 5, 6, 7, 8))
        elif kind != "2-level":
            entry |= _NX * (self.efer & _NXE != 0 and rng.random() < 0.15)
        if self.long:
            entry |= rng.getrandbits(7) << 52 | (rng.getrandbits(4) << 59) * rng.getrandbits(1)
        if rng.random() < (0.15 if is_leaf and level > 1 else 0.06 if is_leaf or level > 3 else 0.02):
            entry ^= 1 << self._odd_bit(level, is_leaf)
        if rng.random() < 0.04:
            entry = entry & ~_P if rng.random() < 0.7 else 2
        return entry

    def _odd_bit(self, level: int, is_leaf: bool) -> int:
        # A bit that is, or may be, reserved.
        rng, large = self.rng, is_leaf and level > 1
        if self.mode == "2-level":
            return rng.randrange(13, 22) if large else 7
        if large and rng.random() < 0.6:
            return rng.randrange(13, self.shift(level))
        if level > 1 and not is_leaf and rng.random() < 0.2:
            return 7
        ends: tuple[int, ...] = () if self.long else (52, 62, rng.randrange(52, 63))
        return rng.choice((PHYS_BITS, 51, rng.randrange(PHYS_BITS, 52), 63, *ends))

    def _page(self, level: int) -> int:
        # The frame of a page: one of those that are filled, seldom one that is not there.
        rng = self.rng
        if rng.random() < 0.02 and self.mode != "2-level":
            return _MISSING | rng.getrandbits(20) << self.shift(level) & _MISSING - 1
        frame: int = rng.choice(_FRAMES)
        if self.mode != "2-level":
            return frame & -(1 << self.shift(level))
        if level == 1:
            return frame & 0x7FFFFFFF | 1 << 30 if frame >> 32 else frame
        return frame & 0xFFC00000 | frame >> 32 << 13  # PSE-36

    def _table(self) -> int:
        # The frame of a table: a new one; seldom one that is used already, or that is not there.
        rng = self.rng
        chance = rng.random()
        if chance < 0.02:
            return rng.choice(self.mine) & ~0xFFF
        if chance < 0.04 and self.mode != "2-level":
            return _MISSING | rng.getrandbits(24) << 12
        frame = self.tables.frame(high=self.mode != "2-level" and rng.random() < 0.3)
        self.mine.append(frame)
        return frame

    # ---- accesses ----

    def access(self) -> TcgAccess:
        rng = self.rng
        op = rng.choice(_OPS)
        offset = rng.randrange(256) * _SLOT
        if op in ("store", "exchange"):
            offset += _STORED
        elif op == "load" and not self.long:
            offset += 1  # to the number
        gva = rng.choice(self.gvas) & ~0xFFF | offset
        value = rng.getrandbits(64 if self.long else 32)
        user = bool(rng.getrandbits(1))
        if op == "fetch":  # what is no code is not run
            walk, above, _ = self._lead(gva, _ERR_F | (_ERR_U if user else 0), update=False)
            if walk.gpa is not None and (walk.gpa | above) & ~0xFFF not in _CODE:
                op = "load"
        return TcgAccess(gva, op, self.cr0, self.cr3, self.cr4, self.efer, user, self.ac, self.pkru, value)

    def expect(self, access: TcgAccess, seen: dict[str, int], stored: dict[int, bytes]) -> tuple[int, ...]:
        """What TCG does with this access, done here, in the memory: (vector, error, CR2), or (vector, value).

        `seen` counts deviations; `stored` keeps what was where a store went.
        """
        wanted = self._wanted(access)
        if wanted & PFERR_IMPLICIT_ACCESS and self.ac and self.cr4 & _SMAP and not access.user:
            wanted = 0
            seen["implicit-ac"] += 1
        gpa, error = 0, None
        if access.op == "exchange":
            gpa, error = self._walk(access.gva, wanted & ~_ERR_W, seen)
            seen["exchange-loads"] += error is not None
        if error is None:
            gpa, error = self._walk(access.gva, wanted, seen)
        if error is not None:
            return _PF, error, access.gva
        return DONE, self._do(access, gpa, stored)

    @staticmethod
    def _wanted(access: TcgAccess) -> int:
        return _ACCESS[access.op] | (_ERR_U if access.user and access.op != "implicit" else 0)

    def _do(self, access: TcgAccess, gpa: int, stored: dict[int, bytes]) -> int:
        # The access itself: RAX afterwards.
        size = 8 if self.long else 4
        mask = (1 << 8 * size) - 1
        if access.op == "implicit":
            return 0
        if access.op == "fetch":
            return int.from_bytes(self.ram[gpa + 1 : gpa + 5], "little")
        there = gpa < len(self.ram)
        old = int.from_bytes(self.ram[gpa : gpa + size], "little") if there else 0
        if access.op == "load":
            return old
        if there:
            stored.setdefault(gpa & ~7, bytes(self.ram[gpa & ~7 : (gpa & ~7) + 8]))
            self.ram[gpa : gpa + size] = (access.value & mask).to_bytes(size, "little")
        return old if access.op == "exchange" else access.value & mask

    def _lead(self, gva: int, wanted: int, *, update: bool) -> tuple[Walk, int, str]:
        # The model's walk; where it stops at what TCG does not, the walk on, the address bits to add, and which
        # deviation it is.
        walker = self.walker
        if self.mode == "pae":
            entry = self.entry(self.root + (gva >> 30) * 8)
            if entry & ~_A != self.pdptes[gva >> 30]:  # a store went there
                self._load_pdptes()
            if not (entry & _P and entry & (_NX | (1 << 63) - (1 << PHYS_BITS))):
                walker = self.loaded
        walk = walker.walk(gva, wanted, update)
        if walk.gpa is None and walk.error_code & _ERR_RSVD:  # type: ignore[operator]
            last = walk.entries[-1]
            if self.amd and last.level >= 4:
                on = self.intel.walk(gva, wanted, update)
                return on, 0, "" if on == walk else "amd-bit-8"
            if self.mode == "2-level" and not last.value & 1 << 21:
                above = last.value & 0x1E0000
                self.put(last.gpa, last.value & ~above)
                walk = walker.walk(gva, wanted, update)
                self.put(last.gpa, self.entry(last.gpa) | above)
                return walk, above << 19, "pse-40"
        return walk, 0, ""

    def _walk(self, gva: int, wanted: int, seen: dict[str, int]) -> tuple[int, int | None]:
        # Where a walk of TCG leads, or 0 and the error code; the A and D bits are set as TCG sets them.
        walk, above, name = self._lead(gva, wanted, update=True)
        if name:
            seen[name] += 1
        if self.mode == "pae" and walk.entries[0].value & _P and walk.level < 3:
            at, entry = walk.entries[0].gpa, self.entry(walk.entries[0].gpa)
            seen["pdpte-low-bits"] += entry & 0x1C6 != 0
            seen["pdpte-accessed"] += not entry & _A
            self.put(at, entry | _A)
        if walk.gpa is not None:
            return walk.gpa | above, None
        self._early(walk, seen)
        code = walk.error_code or 0
        if code & _ERR_RSVD:
            code &= ~_ERR_P
            seen["rsvd-without-p"] += 1
        if code & _ERR_F and self.mode == "2-level" and not self.cr4 & _SMEP:
            code &= ~_ERR_F
            seen["fetch-2-level"] += 1
        return 0, code

    def _early(self, walk: Walk, seen: dict[str, int]) -> None:
        # TCG has set A in the entries that the walk went through before it faulted.
        for entry in walk.entries:
            is_last = entry.level == walk.level and walk.missing is None
            if is_last and not self._marked_huge(entry.level, entry.value):
                break
            if entry.level == 3 and self.mode == "pae":
                continue
            value = self.entry(entry.gpa)
            if not value & _A:
                seen["early-accessed"] += 1
                self.put(entry.gpa, value | _A)

    def _marked_huge(self, level: int, value: int) -> bool:
        # A 1 GiB page's entry is marked before its low bits and its rights are looked at.
        reserved = (1 << 52) - (1 << PHYS_BITS) | (0 if self.efer & _NXE else _NX)
        return level == 3 and self.long and value & (_P | _PS) == _P | _PS and not value & reserved


@check("mmu.walk: Walker", "QEMU TCG: every paging mode", cases=24_000, slow=120_000)
def check_tcg_walks(tally: Tally, cases: int) -> None:
    """Loads, stores, fetches, exchanges and implicit reads at CPL 0 and 3 through random tables of 2, 3 (PAE), 4 and 5
    levels, with 4 MiB, 2 MiB and 1 GiB pages, under all choices of WP, NX, PSE, PGE, SMEP, SMAP, PKE and AC, with
    random PKRU: value or error code and CR2 of each, and the tables and pages at the end."""
    rng = random.Random(7)
    with TcgWalks() as tcg:
        _fill_pages(tcg.ram)
        memory = GuestMemory([(0, tcg.ram)])
        while tally.compared < cases:
            _compare_batch(tally, rng, tcg, memory, cases - tally.compared)


def _compare_batch(tally: Tally, rng: random.Random, tcg: TcgWalks, memory: GuestMemory, most: int) -> dict[str, int]:
    # Some systems at once; the deviations that were met.
    ram, tables, seen = tcg.ram, _Tables(), dict.fromkeys(DEVIATIONS, 0)
    systems: list[_System] = []
    while len(systems) < min(_OF_A_BATCH, -(-most // _OF_A_SYSTEM)) and not tables.full:
        systems.append(_System(rng, tcg, tables, memory))
    areas = [(_LOW, tables.low), (_HIGH, tables.high), *((frame, frame + 4096) for frame in _FRAMES)]
    before = [bytes(ram[start:end]) for start, end in areas]
    stored: dict[int, bytes] = {}
    done = []
    for system in systems:
        for _ in range(_OF_A_SYSTEM):
            access = system.access()
            done.append((system, access, system.expect(access, seen, stored)))
    areas += [(at, at + 8) for at in stored]
    before += stored.values()
    expected = [bytes(ram[start:end]) for start, end in areas]
    for (start, end), data in zip(reversed(areas), reversed(before), strict=True):
        ram[start:end] = data
    results = tcg.run([access for _, access, _ in done])
    for (system, access, ours), result in zip(done, results, strict=True):
        theirs = _outcome(result)
        if theirs == ours:
            tally.count(1)
        else:
            tally.compare(f"{access.op} at {access.gva:#x}, CPL {3 * access.user}, {system}", _say(ours), _say(theirs))
    for (start, end), data in zip(areas, expected, strict=True):
        now = bytes(ram[start:end])
        if now == data:
            continue
        at = next(at for at in range(0, end - start, 8) if now[at : at + 8] != data[at : at + 8])
        frame = (start + at) & ~0xFFF
        owner = next((f" of {system}" for system in systems if frame in {table & ~0xFFF for table in system.mine}), "")
        words = [int.from_bytes(text[at : at + 8], "little") for text in (data, now)]
        tally.count(0, [f"memory at {start + at:#x}{owner}: {words[0]:#x} by the model, {words[1]:#x} by TCG"])
    for start, end in areas[:2]:
        ram[start:end] = bytes(end - start)
    return seen


def _outcome(result: TcgResult) -> tuple[int, ...]:
    if result.vector == DONE:
        return DONE, result.value
    return result.vector, result.error, result.cr2


def _say(outcome: tuple[int, ...]) -> str:
    if outcome[0] == DONE:
        return f"value {outcome[1]:#x}"
    return f"exception {outcome[0]}, code {outcome[1]:#x}, CR2 {outcome[2]:#x}"


# ---- the deviations, by an example each

_RWU = _P | _W | _U
_PAGE = _FRAMES[0]
_LONG_GVA = 1 << 39 | 1 << 30 | 1 << 21 | 1 << 12
_LONG_ENTRIES = (_RWU, _RWU, _RWU, _RWU | _PAGE)
_PAE_GVA = 1 << 30 | 1 << 21 | 1 << 12


class _Example(Value):
    # One access to an address of which every index is 1, with the flags of the entries there (the last with its
    # frame), and what comes of it: (vector, error code or 0, bits 11:0 of the first entry afterwards).
    gva: int
    op: str
    cr4: int
    efer: int
    entries: tuple[int, ...]
    kvm: tuple[int, int, int]
    tcg: tuple[int, int, int]
    ac: bool = False
    amd: bool = False


_EXAMPLES: dict[str, _Example] = {
    "rsvd-without-p": _Example(
        1 << 22, "load", _PSE, 0, (_RWU | _PS | 1 << 21,), (_PF, _ERR_RSVD | _ERR_P, 0x87), (_PF, _ERR_RSVD, 0x87)
    ),
    "early-accessed": _Example(
        _LONG_GVA, "store", _PAE, _LME, (_RWU, _RWU, _RWU, 0), (_PF, _ERR_W, 0x07), (_PF, _ERR_W, 0x27)
    ),
    "pdpte-accessed": _Example(_PAE_GVA, "load", _PAE, 0, (_P, _RWU, _RWU | _PAGE), (DONE, 0, 0x01), (DONE, 0, 0x21)),
    "pdpte-low-bits": _Example(
        _PAE_GVA, "load", _PAE, 0, (_P | 1 << 8, _RWU, _RWU | _PAGE), (_PF, _ERR_RSVD | _ERR_P, 0x101), (DONE, 0, 0x121)
    ),
    "pse-40": _Example(
        1 << 22, "load", _PSE, 0, (_RWU | _PS | 1 << 17,), (_PF, _ERR_RSVD | _ERR_P, 0x87), (DONE, 0, 0xA7)
    ),
    "fetch-2-level": _Example(1 << 22, "fetch", 0, _NXE, (0,), (_PF, _ERR_F, 0), (_PF, 0, 0)),
    "amd-bit-8": _Example(
        _LONG_GVA, "load", _PAE, _LME, (_RWU | 1 << 8, *_LONG_ENTRIES[1:]),
        (_PF, _ERR_RSVD | _ERR_P, 0x107), (DONE, 0, 0x127), amd=True,
    ),
    "implicit-ac": _Example(
        _LONG_GVA, "implicit", _PAE | _SMAP, _LME, _LONG_ENTRIES, (_PF, _ERR_P, 0x07), (DONE, 0, 0x27), ac=True
    ),
    "exchange-loads": _Example(_LONG_GVA, "exchange", _PAE, _LME, (0,), (_PF, _ERR_W, 0), (_PF, 0, 0)),
}  # fmt: skip


@check("known deviations of TCG: KVM's side", "QEMU TCG: its own")
def check_tcg_deviations(tally: Tally, cases: int) -> None:
    """Each of `DEVIATIONS` by one access: the model's walk gives KVM's outcome, and QEMU the other one."""
    del cases
    with TcgWalks() as tcg:
        _fill_pages(tcg.ram)
        memory = GuestMemory([(0, tcg.ram)])
        for name, example in _EXAMPLES.items():
            _compare_example(tally, tcg, memory, name, example)


def _compare_example(tally: Tally, tcg: TcgWalks, memory: GuestMemory, name: str, example: _Example) -> None:
    cr0 = _PG | _PE | _WP
    mode = paging_mode(cr0, example.cr4, example.efer)
    size = 4 if mode == "2-level" else 8
    first = FREE + size
    ram = tcg.ram

    def write_tables() -> None:
        ram[FREE : FREE + 0x4000] = bytes(0x4000)
        tcg.set_root(mode, FREE)
        for at, flags in enumerate(example.entries):
            leads_on = at + 1 < len(example.entries)
            entry = flags | (FREE + 0x1000 * (at + 1) if leads_on else 0)
            ram[FREE + 0x1000 * at + size : FREE + 0x1000 * at + 2 * size] = entry.to_bytes(size, "little")

    def outcome(vector: int, error: int) -> tuple[int, int, int]:
        return vector, error, int.from_bytes(ram[first : first + size], "little") & 0xFFF

    walker = Walker(
        memory, cr0=cr0, cr3=FREE, cr4=example.cr4, efer=example.efer | (_LMA if example.efer & _LME else 0),
        rflags=_AC if example.ac else 2, maxphyaddr=PHYS_BITS, amd=example.amd,
    )  # fmt: skip
    write_tables()
    walk = walker.walk(example.gva, _ACCESS[example.op], update=True)
    kvm = outcome(DONE if walk.ok else _PF, walk.error_code or 0)
    write_tables()
    access = TcgAccess(example.gva, example.op, cr0, FREE, example.cr4, example.efer, ac=example.ac)
    result = tcg.run([access])[0]
    theirs = outcome(result.vector, result.error)
    tally.compare(f"{name}: (vector, error code, first entry), walked as KVM does", kvm, example.kvm)
    tally.compare(f"{name}: (vector, error code, first entry), as TCG is known to do", example.tcg, theirs)


# ---- what the registers of a CPU role do
#
# Tables that say how they were walked: entry 1 of each leads to the next, and each page says which one it is.
#
#   root -> T1 -> T2 -> T3 -> T4 -> T5      entries of 8 bytes; the walk of n levels ends in Tn
#            \-> U2                         entry 1 of 4 bytes
#
# Beside them, in every table: the entries of the probes; those of 4 bytes from 512 on.

_TAG = 0xFF0  # where a page says its (bytes of an entry << 8 | levels)
_ROOTS = {"2-level": FREE, "pae": FREE + 0x1000, "4-level": FREE + 0x2000, "5-level": FREE + 0x3000}
_LADDER = FREE + 0x10000  # T1
_OTHER = FREE + 0x18000  # U2
_READ_ONLY, _USER, _NO_EXECUTE, _ABSENT = 2, 3, 4, 5  # numbers of the probes' entries
_PROBES = {_READ_ONLY: _P, _USER: _RWU, _NO_EXECUTE: _P | _W | _NX, _ABSENT: 0}
_FOR_ALL = _RWU | _A | _D


def _write_ladder(tcg: TcgWalks) -> None:
    ram = tcg.ram

    def put(at: int, entry: int, size: int) -> None:
        ram[at : at + size] = entry.to_bytes(size, "little")

    for level in range(1, 6):
        table = _LADDER + 0x1000 * level - 0x1000
        put(table + _TAG, 8 << 8 | level, 4)
        put(table + 8, table + 0x1000 | _FOR_ALL, 8)
        for number, flags in _PROBES.items():
            put(table + 8 * number, flags and flags | _PAGE | _A, 8)
            put(table + 4 * (512 + number), flags and (flags | _PAGE | _A) & 0xFFFFFFFF, 4)
    put(_OTHER + _TAG, 4 << 8 | 2, 4)
    put(_LADDER + 4, _OTHER | _FOR_ALL, 4)
    for mode, root in _ROOTS.items():
        tcg.set_root(mode, root)
        size = 4 if mode == "2-level" else 8
        put(root + size, _LADDER | (_P | _A if mode == "pae" else _FOR_ALL), size)
        if size == 4:
            put(root + 8, _PAGE | _FOR_ALL | _PS, 4)  # entry 2: a page, or a table


def _role_probes(cr0: int, cr4: int, efer: int) -> dict[str, TcgAccess]:
    # The accesses that tell one field of the role each.
    mode = paging_mode(cr0, cr4, efer)
    if mode == "none":
        return {"level": TcgAccess(_LADDER + _TAG, "load", cr0, 0, cr4, efer)}
    size, levels = {"2-level": (4, 2), "pae": (8, 3), "4-level": (8, 4), "5-level": (8, 5)}[mode]
    bits = 10 if size == 4 else 9
    upper = sum(1 << 12 + bits * at for at in range(1, levels))

    def probe(entry: int, op: str, offset: int = 0, **more: int) -> TcgAccess:
        index = entry if size == 8 or entry == 1 else 512 + entry
        gva = upper | index << 12 | offset
        return TcgAccess(gva, op, cr0, _ROOTS[mode], cr4, efer, **more)  # type: ignore[arg-type]

    probes = {
        "level": probe(1, "load", _TAG, ac=1),
        "cr0_wp": probe(_READ_ONLY, "store", _STORED),
        "cr4_smep": probe(_USER, "fetch"),
        "cr4_smap": probe(_USER, "load"),
        "cr4_smap, AC": probe(_USER, "load", ac=1),
        "cr4_pke": probe(_USER, "load", user=1, pkru=1),
        "F": probe(_ABSENT, "fetch"),
    }
    if size == 8:
        probes["efer_nx"] = probe(_NO_EXECUTE, "fetch")
        probes["efer_nx, load"] = probe(_NO_EXECUTE, "load")
    else:
        probes["cr4_pse"] = TcgAccess(2 << 22, "load", cr0, _ROOTS[mode], cr4, efer, ac=True)
    return probes


def _observed(results: dict[str, TcgResult]) -> dict[str, object]:
    # The fields of the role, as the accesses tell them; what no role explains is there as it is.
    def is_on(name: str, on: tuple[int, int], off: tuple[int, int] = (DONE, 0)) -> object:
        seen = results[name].vector, results[name].error
        return 1 if seen == on else 0 if seen == off else seen

    tag = results["level"].value & 0xFFFF
    if len(results) == 1:
        return {"level": 0 if results["level"].vector == DONE and tag == 0x801 else tag}
    found: dict[str, object] = {
        "level": tag & 0xFF if results["level"].vector == DONE else results["level"],
        "has_4_byte_gpte": int(tag >> 8 == 4),
        "cr0_wp": is_on("cr0_wp", (_PF, _ERR_P | _ERR_W)),
        "cr4_smap": is_on("cr4_smap", (_PF, _ERR_P)),
        "cr4_smap, AC": is_on("cr4_smap, AC", (_PF, _ERR_P)),
        "cr4_pke": is_on("cr4_pke", (_PF, _ERR_P | _ERR_U | _ERR_PK)),
        "cr4_smep": is_on("cr4_smep", (_PF, _ERR_P | _ERR_F)),
        "F": is_on("F", (_PF, _ERR_F), (_PF, 0)),
    }
    if "efer_nx" in results:
        # Without NX bit 63 is reserved; TCG's codes of that have no P.
        found["efer_nx"] = is_on("efer_nx", (_PF, _ERR_P | _ERR_F), (_PF, _ERR_RSVD | (_ERR_F if found["F"] else 0)))
        found["efer_nx, load"] = is_on("efer_nx, load", (DONE, 0), (_PF, _ERR_RSVD))
    else:
        found["cr4_pse"] = is_on("cr4_pse", (DONE, 0), (_PF, 0))
    return found


def _predicted(cr0: int, cr4: int, efer: int) -> dict[str, object]:
    # The same by the role.
    role = calc_cpu_role(cr0, cr4, efer | (_LMA if cr0 & _PG and efer & _LME else 0))
    base, ext = role.base, role.ext
    if not base.level:
        return {"level": 0 if base.direct else "not direct"}
    nx_counts = base.efer_nx and not base.has_4_byte_gpte  # KVM's code has F there too: "fetch-2-level"
    found: dict[str, object] = {
        "level": base.level,
        "has_4_byte_gpte": base.has_4_byte_gpte,
        "cr0_wp": base.cr0_wp,
        "cr4_smap": ext.cr4_smap,
        "cr4_smap, AC": 0,
        "cr4_pke": ext.cr4_pke,
        "cr4_smep": ext.cr4_smep,
        "F": int(bool(ext.cr4_smep or nx_counts)),
    }
    if base.has_4_byte_gpte:
        found["cr4_pse"] = ext.cr4_pse
    else:
        found["efer_nx"] = found["efer_nx, load"] = base.efer_nx
    # What is said twice must be said alike, and what follows from the depth with it.
    for field, bit in ((base.smep_andnot_wp, ext.cr4_smep), (base.smap_andnot_wp, ext.cr4_smap)):
        if field != (bit & ~base.cr0_wp & 1):
            found["and not WP"] = field
    if (ext.efer_lma, ext.cr4_la57) != (int(base.level >= 4), int(base.level == 5)):
        found["efer_lma, cr4_la57"] = ext.efer_lma, ext.cr4_la57
    return found


@check("mmu.role: calc_cpu_role", "QEMU TCG: what each bit of it does")
def check_tcg_roles(tally: Tally, cases: int) -> None:
    """All combinations of CR0.{PG,WP}, CR4.{PSE,PAE,SMEP,SMAP,PKE,LA57} and EFER.{LME,NXE} that a processor takes: the
    depth of the walk, the size of an entry, and what NX, WP, SMEP, SMAP, PKE and PSE do, are those of the role."""
    del cases
    with TcgWalks() as tcg:
        _fill_pages(tcg.ram)
        _write_ladder(tcg)
        combinations: list[tuple[int, int, int]] = []
        accesses: list[TcgAccess] = []
        names: list[list[str]] = []
        bits = (_PG, _WP, _PSE, _PAE, _SMEP, _SMAP, _PKE, _LA57, _LME, _NXE)
        for chosen in product((0, 1), repeat=len(bits)):
            on = [bit for bit, is_set in zip(bits, chosen, strict=True) if is_set]
            cr0 = sum(bit for bit in on if bit in (_PG, _WP)) | _PE
            efer = _LME * chosen[8] | _NXE * chosen[9]
            cr4 = sum(bit for bit, is_set in zip(bits[2:8], chosen[2:8], strict=True) if is_set)
            if cr0 & _PG and efer & _LME and not cr4 & _PAE:
                continue  # no processor enters this
            probes = _role_probes(cr0, cr4, efer)
            combinations.append((cr0, cr4, efer))
            names.append(list(probes))
            accesses += probes.values()
        results = iter(tcg.run(accesses))
        for (cr0, cr4, efer), probed in zip(combinations, names, strict=True):
            seen = _observed({name: next(results) for name in probed})
            tally.compare(f"cr0={cr0:#x} cr4={cr4:#x} efer={efer:#x}", _predicted(cr0, cr4, efer), seen)
