"""The check of hvmodel.mmu.spte: the entries KVM puts into its shadow pages, each worked out from the guest's tables.

Random guest page tables map pages of memory of every kind that KVM tells apart; a guest at CPL 3 loads, stores and
fetches.  For each kvm_mmu_set_spte the model gives the whole entry, the host's page frame (/proc/self/pagemap) too:
from the walk that came before it (hvmodel.mmu.walk, in a copy of the tables), and for the entries that KVM makes ahead,
beside the one that was needed, from the guest's entries there.

    slot    memory                      host's pages      what is special
    1       guest page tables, pages    4 KiB
    2       pages                       4 KiB             read-only slot: nothing is host-writable
    3       pages                       4 KiB             dirty log
    4       pages                       2 MiB
    5       pages                       2 MiB             dirty log: KVM maps 4 KiB
    6       pages                       none at first     a read finds the zero page, which is not host-writable

Compared: of each fault that KVM maps what it maps (spte_requested: frame, level), and each entry that it then sets.
Not compared: entries for the lab's own addresses (they must be of slot 0), entries that KVM could have made ahead and
has not, and those that say that nothing is there (mark_mmio_spte): the checks of the simulator and of the masks have
them.  Worlds of whose trace records were lost, or of which the host moved pages meanwhile, are told as lacking.

Worlds are numbered as in check_walk: a run of `cases` begins with number `cases`.
"""

from __future__ import annotations

import random
from itertools import count

from ..arch.cpuid import has_feature, max_phys_bits, vendor_of
from ..errors import HostError, HvError
from ..host import Mapping, PageMap
from ..mmu.guest_memory import GuestMemory
from ..mmu.role import PageRole
from ..mmu.spte import check_spte_writable_invariants, is_executable_pte, make_spte
from ..mmu.walk import GuestMmu, Walker
from ..units import PAGE_SIZE, MiB
from ..value import Value
from .hostmasks import host_masks
from .kvm_trace import SetSpte, SpteRequested, TraceLost
from .lab import Access, LabSlot, MmuLab
from .registry import check
from .result import Lacking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..mmu.masks import ShadowMasks
    from ..mmu.walk import Walk
    from .lab import Outcome
    from .result import Tally

__all__ = ["PagesMoved", "check_spte"]

_LOG_DIRTY, _READONLY = 1, 2
_SLOTS = (
    LabSlot(16 * MiB, 6 * MiB),
    LabSlot(32 * MiB, 2 * MiB, flags=_READONLY),
    LabSlot(40 * MiB, 2 * MiB, flags=_LOG_DIRTY),
    LabSlot(64 * MiB, 8 * MiB, huge=True),
    LabSlot(80 * MiB, 4 * MiB, huge=True, flags=_LOG_DIRTY),
    LabSlot(96 * MiB, 4 * MiB, populate=False, fill=False),
)
_FRESH = 6  # number of the slot that has no pages at first
_LOGGED = (3, 5)
_TABLES = MiB  # at the start of slot 1, the root first
_DRIVER_GFNS = 512  # slot 0 is 2 MiB
_EVENTS = ("kvmmmu:kvm_mmu_set_spte", "kvmmmu:kvm_mmu_spte_requested")

_P, _RW, _US, _A, _D, _PS, _G, _NX = 1, 2, 4, 0x20, 0x40, 0x80, 0x100, 1 << 63
_WP, _NXE, _SMEP = 1 << 16, 1 << 11, 1 << 20
_ADDRESS = 0xFFFFFFFFFF000
_PTE_PREFETCH_NUM = 8
_NO_SLOT = 1 << 63  # KVM_PFN_NOSLOT, linux:include/linux/kvm_host.h@v6.18
_KIND_BITS = {"load": 4, "store": 6, "fetch": 0x14}
_ACC_WRITE = 2

_ACCESSES = 48  # of a world, each round
_RETRIES = 20  # of worlds of which something was lost, one after the other


class PagesMoved(HvError):
    """The host has given other frames to the guest's pages meanwhile: the model went by the old ones."""


class _Spte(Value):
    # What is compared of one kvm_mmu_set_spte.
    spte: int
    level: int
    index: int  # in its shadow page
    executable: int | None
    user: int | None  # -1 where the format of SPTEs has no such bit
    wrong: tuple[str, ...]


class _Tables:
    # Random tables of the guest, most of them right, in a copy that goes along with the guest's.
    def __init__(self, lab: MmuLab) -> None:
        self.lab = lab
        self.root = _SLOTS[0].gpa
        self.data = bytearray(_TABLES)
        self.memory = GuestMemory([(self.root, self.data, True)])
        entries = lab.vcpu.get_cpuid2()
        self._facts = {
            "maxphyaddr": max_phys_bits(entries),
            "gbpages": has_feature(entries, "PDPE1GB"),
            "amd": vendor_of(entries) in ("AuthenticAMD", "HygonGenuine"),
        }
        self._walkers: dict[tuple[int, int, int], Walker] = {}
        self.addresses: list[int] = []

    def walker(self) -> Walker:
        lab = self.lab
        key = (lab.cr0, lab.cr4, lab.efer)
        if key not in self._walkers:
            mmu = GuestMmu.of(cr3=self.root, cr0=lab.cr0, cr4=lab.cr4, efer=lab.efer, **self._facts)  # type: ignore[arg-type]
            self._walkers[key] = Walker.of(self.memory, mmu)
        return self._walkers[key]

    def build(self, rng: random.Random) -> None:
        self.rng = rng
        self.data[:] = bytes(_TABLES)
        self.addresses = []
        free = iter(range(self.root + PAGE_SIZE, self.root + _TABLES, PAGE_SIZE))
        for top, _ in zip(rng.sample([at for at in range(511) if at != 256], 2), range(2), strict=False):
            table = self._table(self.root, top, next(free))
            for middle in rng.sample(range(512), 2):
                below = self._table(table, middle, next(free))
                for low in rng.sample(range(512), 6):
                    gva = top << 39 | middle << 30 | low << 21
                    if top >> 8:
                        gva |= 0xFFFF << 48
                    if rng.random() < 0.3:
                        self._put(below, low, self._page(2 * MiB) | _PS)
                        self.addresses += [gva | rng.randrange(512) << 12 for _ in range(8)]
                        continue
                    leaves = self._table(below, low, next(free))
                    first = rng.randrange(0, 500)
                    for index in range(first, first + 12):
                        self._put(leaves, index, self._page(PAGE_SIZE))
                    self.addresses += [gva | index << 12 for index in range(first, first + 12)]
        self.lab.write(self.root, bytes(self.data))
        self.lab.link(self.root)
        self.data[8 * 511 : 4096] = self.lab.read(self.root + 8 * 511, 8)

    def entry(self, gpa: int) -> int:
        at = gpa - self.root
        return int.from_bytes(self.data[at : at + 8], "little")

    def differ(self) -> str | None:
        # Where the tables of the guest are not those of the copy.
        theirs = self.lab.read(self.root, _TABLES)
        if theirs == self.data:
            return None
        at = next(at for at in range(0, _TABLES, 8) if theirs[at : at + 8] != self.data[at : at + 8])
        return f"the entry at {self.root + at:#x} is {int.from_bytes(theirs[at : at + 8], 'little'):#x}"

    def _put(self, table: int, index: int, entry: int) -> None:
        at = table - self.root + 8 * index
        self.data[at : at + 8] = entry.to_bytes(8, "little")

    def _table(self, parent: int, index: int, table: int) -> int:
        rng = self.rng
        flags = _P | _RW * (rng.random() < 0.9) | _US | _A * (rng.random() < 0.5) | _NX * (rng.random() < 0.06)
        self._put(parent, index, table | flags)
        return table

    def _page(self, size: int) -> int:
        rng = self.rng
        draw = rng.random
        if draw() < 0.03:
            return rng.randrange(_DRIVER_GFNS, 1 << 20) << 12
        at = rng.randrange(len(_SLOTS))
        slot = _SLOTS[at]
        first = max(slot.gpa, self.root + 2 * MiB) if at == 0 else slot.gpa
        entry = rng.randrange(first, slot.gpa + slot.size, size) | _P
        for bit, share in ((_RW, 0.75), (_US, 0.93), (_A, 0.75), (_D, 0.5), (_G, 0.1), (_NX, 0.15), (0x200, 0.1)):
            if draw() < share:
                entry |= bit
        return entry

    def accesses(self, nr: int) -> Iterator[Access]:
        rng = self.rng
        for gva in rng.sample(self.addresses, nr):
            kind = rng.choices(("load", "store", "fetch"), (5, 5, 2))[0]
            if kind == "fetch":
                found = self.walker().walk(gva, _KIND_BITS[kind])
                if found.gpa is not None and _slot_of(found.gpa >> 12) == _FRESH:
                    kind = "load"  # there are zeros, no instruction that leaves
            offset = rng.randrange(0x80, 0x1000) if kind == "fetch" else rng.randrange(16) * 8
            yield Access(gva + offset, kind, True, rng.getrandbits(64))


def _slot_of(gfn: int) -> int | None:
    for number, slot in enumerate(_SLOTS, 1):
        if slot.gpa <= gfn << 12 < slot.gpa + slot.size:
            return number
    return None


class _Host:
    # What the host has behind the guest's memory: page frames, and which of them are parts of 2 MiB pages.
    def __init__(self, lab: MmuLab) -> None:
        self.frames = {number: lab.pfns(number) for number in range(1, len(_SLOTS) + 1)}
        self.huge = lab.huge(4) | lab.huge(5)

    def same(self, other: _Host) -> bool:
        # Nothing was moved; the slot of fresh pages may have got some.
        return self.huge == other.huge and all(
            self.frames[number] == other.frames[number] for number in self.frames if number != _FRESH
        )

    def pfn(self, gfn: int, number: int) -> int:
        return self.frames[number][gfn - (_SLOTS[number - 1].gpa >> 12)]


def _zero_pfn() -> int | None:
    # The frame of the zero page, which a read of fresh memory finds.
    with Mapping(None, PAGE_SIZE, shared=False) as memory, PageMap() as pages:
        memory.read(0, 1)
        return pages.entry(int(memory.hva)).pfn


def _nx_huge_pages() -> bool:
    try:
        with open("/sys/module/kvm/parameters/nx_huge_pages", encoding="ascii") as file:
            return file.read().strip() in ("Y", "1")
    except OSError:
        return False


@check("SPTEs", "kvmmmu:kvm_mmu_set_spte", cases=10_000, slow=100_000)
def check_spte(tally: Tally, cases: int, first: int | None = None) -> None:
    """Each entry of a shadow page that KVM sets: all 64 bits, level, place in its page; and that its bits go together.

    Random guest page tables, with pages of 4 KiB and 2 MiB, NX, read-only, not dirty, in slots with and without dirty
    log, read-only, of small and of large pages of the host, and of pages that are not there yet.

    `cases` entries; the requests before them are counted besides.  `first`: number of the first world, by default
    `cases`.
    """
    masks = host_masks().masks
    zero = _zero_pfn()
    if not zero:
        raise Lacking("/proc/self/pagemap does not tell page frames: root (CAP_SYS_ADMIN)")
    with MmuLab(_SLOTS) as lab:
        absent = [event for event in _EVENTS if lab.trace is None or event not in lab.trace.events]
        if absent:
            raise Lacking(f"the kernel has no event {', '.join(absent)}")
        lab.need_walks()
        tables = _Tables(lab)
        lab.cr3 = tables.root
        try:
            host = _Host(lab)
        except HostError as error:
            raise Lacking(f"which pages of the host are huge: {error}") from None
        if not host.huge:
            tally.lack("huge pages of the host: none are free, or transparent_hugepage is never")
        done = lost = in_a_row = nr = 0
        for number in count(cases if first is None else first):
            if done >= cases:
                break
            nr += 1
            try:
                for compared in _world(tally, number, tables, masks, zero):
                    done += compared
            except (TraceLost, PagesMoved):
                lost, in_a_row = lost + 1, in_a_row + 1
                if in_a_row > _RETRIES:
                    raise
                continue
            in_a_row = 0
        if lost:
            tally.lack(f"{lost} of {nr} worlds, whole or in part: records were lost, or the host moved pages")


def _world(tally: Tally, number: int, tables: _Tables, masks: ShadowMasks, zero: int) -> Iterator[int]:
    # The world of this number, from its registers and tables on: how many SPTEs were compared, round by round.
    lab, rng = tables.lab, random.Random(f"world {number}")
    lab.cr0 = lab.cr0 & ~_WP | _WP * (rng.random() < 0.7)
    lab.cr4 = 0x20 | _SMEP * (rng.random() < 0.3)
    lab.efer = lab.efer & ~_NXE | _NXE * (rng.random() < 0.9)
    tables.build(rng)
    lab.flush()
    fresh = _SLOTS[_FRESH - 1]
    lab.discard(fresh.gpa, fresh.size)
    name = f"world {number}: CR0 {lab.cr0:#x} CR4 {lab.cr4:#x} EFER {lab.efer:#x}"
    checker = _Checker(tables, masks, zero, name)
    for again in range(3):
        before = _Host(lab)
        outcomes = lab.run(tables.accesses(_ACCESSES))
        now = _Host(lab)
        if not now.same(before):
            raise PagesMoved("the host has moved pages of the guest")
        yield sum([checker.compare(tally, now, outcome) for outcome in outcomes])
        tally.compare(f"{name}: SPTEs that belong to no walk", 0, checker.nr_left)
        tally.compare(f"{name}: records behind the last access", (), lab.trailing)
        if again == 0:
            for slot in _LOGGED:
                lab.vm.get_dirty_log(slot)  # write-protects what was written
    tally.compare(f"{name}: tables behind the accesses", None, tables.differ())


class _Checker:
    def __init__(self, tables: _Tables, masks: ShadowMasks, zero: int, name: str) -> None:
        self.tables, self.masks, self.zero, self.name = tables, masks, zero, name
        self.nx_huge_pages = _nx_huge_pages()
        self.nr_left = 0  # SPTEs, but the driver's, that were not compared
        self.written: set[int] = set()  # frames of the fresh slot that the guest wrote to

    def compare(self, tally: Tally, host: _Host, outcome: Outcome) -> int:
        # All SPTEs of one access, walk by walk; how many they are.
        found = 0
        access = outcome.access
        walker = self.tables.walker()
        target = walker.walk(access.gva, _KIND_BITS[access.kind])
        if access.kind == "store" and target.gpa is not None and _slot_of(target.gpa >> 12) == _FRESH:
            self.written.add(target.gpa >> 12)
        for traced in outcome.walks:
            walk = walker.walk(traced.addr, traced.pferr & 0x16, True)
            sptes = traced.events(SetSpte)
            requested = traced.events(SpteRequested)
            if sptes or requested:
                self._group(tally, host, access, walk, requested, sptes)
            found += len(sptes)
        self.nr_left -= found
        self.nr_left += sum(type(event) is SetSpte and event.gfn >= _DRIVER_GFNS for event in outcome.records)
        return found

    def _group(
        self,
        tally: Tally,
        host: _Host,
        access: Access,
        walk: Walk,
        requested: tuple[SpteRequested, ...],
        sptes: tuple[SetSpte, ...],
    ) -> None:
        where = f"{self.name}, {access.kind} at {access.gva:#x}, "
        level = self._level(walk, host, access)
        if walk.gpa is None or len(requested) != 1:
            # Of a walk that fails nothing is mapped; of another, what was asked for once.
            for event in (*requested, *sptes):
                tally.compare(f"{where}{event}", None, event)
            return
        gfn = walk.gpa >> 12 & -(1 << 9 * (level - 1))
        number = _slot_of(gfn)
        frame = self._frame(host, walk.gpa >> 12, _slot_of(walk.gpa >> 12))[0]
        theirs: object = (requested[0].gfn, requested[0].pfn, requested[0].level)
        tally.compare(f"{where}request", (walk.gpa >> 12, frame, level), theirs)
        for at, event in enumerate(sptes):
            index = (event.sptep & 0xFFF) >> 3
            demanded = at == 0 and event.gfn == gfn
            if demanded:
                ours = self._made(host, gfn, number, walk.pte_access, level, False)
                want = access.gva >> 12 + 9 * (level - 1) & 511
            else:
                ours, want = self._ahead(host, walk, event, index)
            wrong = check_spte_writable_invariants(self.masks, event.spte)
            theirs = _Spte(event.spte, event.level, index, event.x, event.u, wrong)
            made = None if ours is None else self._spte(ours, level if demanded else 1, want)
            kind = "" if demanded else "ahead of need, "
            tally.compare(f"{where}{kind}gfn {event.gfn:#x} of slot {_slot_of(event.gfn)}", made, theirs)

    def _spte(self, spte: int, level: int, index: int) -> _Spte:
        user = self.masks.user_mask
        is_user = int(bool(spte & user)) if user else -1
        return _Spte(spte, level, index, int(is_executable_pte(self.masks, spte)), is_user, ())

    def _level(self, walk: Walk, host: _Host, access: Access) -> int:
        # kvm_mmu_hugepage_adjust: as large as guest, host and slot have it.
        if walk.gpa is None or walk.level < 2:
            return 1
        gfn = walk.gpa >> 12 & -512
        number = _slot_of(gfn)
        if number in (*_LOGGED, None) or gfn not in host.huge:
            return 1
        return 1 if self.nx_huge_pages and access.kind == "fetch" else 2

    def _made(
        self, host: _Host, gfn: int, number: int | None, pte_access: int, level: int, prefetch: bool
    ) -> int | None:
        pfn, writable = self._frame(host, gfn, number)
        if not pfn or pfn == _NO_SLOT:
            return None
        role = PageRole.of(level=level, access=7)
        spte, _ = make_spte(
            self.masks,
            role,
            pte_access,
            gfn,
            pfn,
            prefetch=prefetch,
            host_writable=writable,
            nx_huge_page=self.nx_huge_pages,
        )
        return spte

    def _frame(self, host: _Host, gfn: int, number: int | None) -> tuple[int, bool]:
        # The host's page frame, 0 where there is none, and whether the host lets it be written to.
        if number is None:
            return _NO_SLOT, False
        if number == _FRESH and gfn not in self.written:
            return self.zero, False
        return host.pfn(gfn, number), not _SLOTS[number - 1].flags & _READONLY

    def _ahead(self, host: _Host, walk: Walk, event: SetSpte, index: int) -> tuple[int | None, int]:
        # An entry of the same eight, that nobody asked for: what it should be, and its place.
        assert walk.gpa is not None
        if walk.level == 2:
            # In the shadow page of a large page's small ones all have the large one's access.
            gfn, access = event.gfn, walk.pte_access
            window = (walk.gpa >> 12) & -_PTE_PREFETCH_NUM
            if not window <= gfn < window + _PTE_PREFETCH_NUM:
                return None, gfn & 511
            want = gfn & 511
        else:
            last = walk.entries[-1]
            want = last.index & -_PTE_PREFETCH_NUM | index & _PTE_PREFETCH_NUM - 1
            entry = self.tables.entry((last.gpa & -PAGE_SIZE) + 8 * want)
            if not entry & _P or not entry & _A:
                return None, want  # of an entry that was not used KVM makes none
            gfn = (entry & _ADDRESS) >> 12
            access = walk.pt_access[-1] & (entry & 6 | (not entry & _NX))
            if not entry & _D:
                access &= ~_ACC_WRITE
        number = _slot_of(gfn)
        if number is None or _SLOTS[number - 1].flags & _READONLY:
            return None, want
        if number in _LOGGED and access & _ACC_WRITE:
            return None, want
        return self._made(host, gfn, number, access, 1, True), want
