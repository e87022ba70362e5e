"""Shadow pages as KVM keeps them: by hash, by age, and by who maps what; no rule of paging is here.

Owns `ShadowPage`, the book that `PageBook` keeps of them, the memory slots (`SimSlot`), the host's side (`HostMemory`),
and the records of what happens (`MmuEvent`).

    PageBook.buckets     the pages by kvm_page_table_hashfn(gfn), newest first   (kvm->arch.mmu_page_hash)
    PageBook.active      the pages in use, oldest first                          (active_mmu_pages, from its end)
    SimSlot.rmap         (level, gfn) -> the entries that map it                 (slot->arch.rmap)
    SimSlot.disallow     (level, gfn) -> why no large page: a count              (slot->arch.lpage_info)
    SimSlot.tracked      gfn -> how many tables of level 2 and more it holds     (slot->arch.gfn_write_track)
    ShadowPage.parents   the entries that lead to the page                       (sp->parent_ptes)

Source: linux:arch/x86/include/asm/kvm_host.h (struct kvm_mmu_page), arch/x86/kvm/mmu/mmu_internal.h, mmu/mmu.c
@v6.18.
"""

from __future__ import annotations

from ..arch.number import number
from ..errors import ArgumentError
from ..value import Value
from .levels import gfn_round_for_level, pages_per_hpage
from .page_hash import kvm_page_table_hashfn
from .role import PageRole
from .spte import is_last_spte, is_shadow_present_pte

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["HostMemory", "HostPage", "MmuEvent", "PageBook", "ShadowPage", "SimSlot"]

_INVALID = 1 << 11  # of a page role
_LOG_DIRTY, _READONLY = 1, 2  # KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
_MAX_GFN = (1 << 40) - 1
_LARGE_LEVELS = (2, 3)  # up to KVM_MAX_HUGEPAGE_LEVEL


class MmuEvent(Value):
    """What KVM's tracepoints of the MMU tell; `name` is the event's, without "kvm_mmu_", and says which fields count.

    get_page, unsync_page, sync_page, prepare_zap_page: gfn, role, root_count, unsync; get_page: created.
    set_spte: gfn, level, spte, sptep.  spte_requested: gfn, pfn, level.  mark_mmio_spte: gfn, spte, sptep.
    fast_page_fault: gfn (of the address), spte, sptep.  zap_all_fast: level is the generation, pfn the pages in use.
    """

    name: str
    gfn: int = 0
    role: int = 0
    root_count: int = 0
    unsync: bool = False
    created: bool = False
    level: int = 0
    spte: int = 0
    sptep: int = 0
    pfn: int = 0

    def __str__(self) -> str:
        said = [f"{key}={getattr(self, key):#x}" for key in self.fields()[1:] if getattr(self, key) or key == "gfn"]
        return f"{self.name} {' '.join(said)}"


class ShadowPage:
    """One shadow page (struct kvm_mmu_page): 512 entries that stand for a guest's table, or for plain memory (direct).

    `gfn`: the table's frame, or the first frame that a direct page maps.  `role`: its word; `level`, `access`,
    `direct`, `has_gptes` are parts of it.  `pa`: where its entries lie in the host's memory.  `spt`: entry by index,
    those that are not there are SHADOW_NONPRESENT_VALUE.  `children`: the page below, by index.  `translation`: for
    pages that are not direct, (gfn, access) by index of a leaf.  `unsync`: the guest may write to the table, so the
    entries may be stale.  `unsync_children`: indices below which such a page is.  `root_count`: how many roots it is.
    """

    __slots__ = (
        "access",
        "children",
        "direct",
        "gfn",
        "gpte_bytes",
        "has_gptes",
        "level",
        "nx_huge_page_disallowed",
        "pa",
        "parents",
        "role",
        "root_count",
        "spt",
        "translation",
        "unsync",
        "unsync_children",
        "valid_gen",
        "write_flooding_count",
    )

    def __init__(self, gfn: int, role: PageRole, pa: int, valid_gen: int) -> None:
        self.gfn, self.role, self.pa, self.valid_gen = gfn, role.word, pa, valid_gen
        self.level, self.access, self.direct = role.level, role.access, bool(role.direct)
        self.gpte_bytes = 4 if role.has_4_byte_gpte else 8
        self.has_gptes = not (role.direct or role.passthrough)
        self.spt: dict[int, int] = {}
        self.children: dict[int, ShadowPage] = {}
        self.translation: dict[int, tuple[int, int]] = {}
        # (page, index) in the order they were linked; a dict, for it keeps that order
        self.parents: dict[tuple[ShadowPage, int], None] = {}
        self.unsync = self.nx_huge_page_disallowed = False
        self.unsync_children: set[int] = set()
        self.root_count = self.write_flooding_count = 0

    def __repr__(self) -> str:
        return f"<ShadowPage gfn={self.gfn:#x} {PageRole(self.role)!r}>"

    @property
    def invalid(self) -> bool:
        """It is taken away already, and stays only while it is a root."""
        return bool(self.role & _INVALID)

    def invalidate(self) -> None:
        """Set role.invalid."""
        self.role |= _INVALID

    def entry(self, index: int) -> int:
        """The entry at `index`; 0 where nothing was put there."""
        return self.spt.get(index, 0)

    def present(self) -> Iterator[tuple[int, int]]:
        """(index, entry) of the entries that are shadow-present, by index."""
        for index in sorted(self.spt):
            if is_shadow_present_pte(self.spt[index]):
                yield index, self.spt[index]

    def is_leaf(self, index: int) -> bool:
        """Whether the entry maps memory (is_last_spte); it is present."""
        return is_last_spte(self.spt[index], self.level)

    def gfn_of(self, index: int) -> int:
        """The first frame that a leaf at `index` maps (kvm_mmu_page_get_gfn)."""
        if not self.direct:
            return self.translation[index][0]
        return self.gfn + (index << 9 * (self.level - 1))

    def access_of(self, index: int) -> int:
        """What the guest's tables allow at a leaf (kvm_mmu_page_get_access)."""
        return self.access if self.direct else self.translation[index][1]

    def event(self, name: str, created: bool = False) -> MmuEvent:
        """The record of something that happens to this page."""
        return MmuEvent(name, self.gfn, self.role, self.root_count, self.unsync, created)


class HostPage(Value):
    """What the host's page tables say of one frame of a slot: its page frame, and whether it may be written there."""

    pfn: int
    writable: bool = True


class HostMemory:
    """The host's side of guest memory: what backs each frame, and by pages of which size.

    This one has every frame in memory from the beginning, at frame `base_pfn` + gfn, in pages of 4 KiB but for the
    ranges in `huge` (first frames of 2 MiB); frames in `readonly` it never lets be written.  A subclass answers for a
    real process.
    """

    def __init__(self, base_pfn: int = 0x100000, huge: Iterable[int] = (), readonly: Iterable[int] = ()) -> None:
        self.base_pfn = base_pfn
        self.huge = frozenset(huge)
        self.readonly = frozenset(readonly)

    def fault_in(self, gfn: int, write: bool) -> HostPage | None:
        """The page after it was brought in for reading or writing; None: the host refuses that (EFAULT)."""
        writable = gfn not in self.readonly
        return HostPage(self.base_pfn + gfn, writable) if writable or not write else None

    def fast(self, gfn: int) -> int | None:
        """The frame, if it is in memory and writable already; nothing is brought in (get_user_pages_fast_only)."""
        return None if gfn in self.readonly else self.base_pfn + gfn

    def mapping_level(self, gfn: int) -> int:
        """Level of the host's entry that maps this frame: 1, 2 or 3."""
        return 2 if gfn_round_for_level(gfn, 2) in self.huge else 1


class SimSlot:
    """A memory slot: `npages` frames from `base_gfn`; `flags` as KVM_SET_USER_MEMORY_REGION's; `hva` where it lies.

    `dirty`: offsets that are in its dirty log.
    """

    def __init__(self, base_gfn: int, npages: int, flags: int = 0, hva: int | None = None) -> None:
        call = "SimSlot"
        self.base_gfn = number(call, "base_gfn", base_gfn, _MAX_GFN)
        self.npages = number(call, "npages", npages, (1 << 31) - 1)
        if not npages:
            raise ArgumentError(call, "npages", npages, "1 or more")
        self.flags = number(call, "flags", flags, _LOG_DIRTY | _READONLY)
        self.hva = base_gfn << 12 if hva is None else number(call, "hva", hva)
        self.dirty: set[int] = set()
        self.rmap: dict[tuple[int, int], dict[tuple[ShadowPage, int], None]] = {}
        self.tracked: dict[int, int] = {}
        self.disallow: dict[tuple[int, int], int] = {}
        # What of a slot's ends, or of its place in the host, is no whole large page (kvm_alloc_memslot_metadata).
        self._cut: set[tuple[int, int]] = set()
        self._shifted: set[int] = set()
        outside = [base_gfn + npages, *([base_gfn - 1] if base_gfn else [])]  # the frames beside it
        for level in _LARGE_LEVELS:
            self._cut |= {(level, gfn_round_for_level(gfn, level)) for gfn in outside}
            if (base_gfn - (self.hva >> 12)) % pages_per_hpage(level):
                self._shifted.add(level)

    def __contains__(self, gfn: int) -> bool:
        return self.base_gfn <= gfn < self.base_gfn + self.npages

    def __repr__(self) -> str:
        return f"<SimSlot {self.base_gfn:#x}+{self.npages:#x} flags={self.flags}>"

    @property
    def readonly(self) -> bool:
        """KVM_MEM_READONLY."""
        return bool(self.flags & _READONLY)

    @property
    def log_dirty(self) -> bool:
        """KVM_MEM_LOG_DIRTY_PAGES (kvm_slot_dirty_track_enabled)."""
        return bool(self.flags & _LOG_DIRTY)

    def lpage_allowed(self, gfn: int, level: int) -> bool:
        """Whether a page of `level` may map this frame, as far as the slot is asked (kvm_gfn_is_lpage_allowed)."""
        key = level, gfn_round_for_level(gfn, level)
        return level not in self._shifted and key not in self._cut and not self.disallow.get(key)

    def count_disallow(self, gfn: int, by: int) -> None:
        """One table more or less keeps this frame from being part of a large page."""
        for level in _LARGE_LEVELS:
            key = level, gfn_round_for_level(gfn, level)
            self.disallow[key] = self.disallow.get(key, 0) + by

    def mark_dirty(self, gfn: int) -> None:
        """Note a frame in the log, where there is one (mark_page_dirty_in_slot)."""
        if self.log_dirty:
            self.dirty.add(gfn - self.base_gfn)


class PageBook:
    """All shadow pages of a VM, and where to find them."""

    def __init__(self) -> None:
        self.buckets: dict[int, list[ShadowPage]] = {}
        # oldest first; a dict, for it keeps the order
        self.active: dict[ShadowPage, None] = {}
        self.used = 0  # kvm->stat.mmu_shadow_pages
        self.max_collisions = 0

    def bucket(self, gfn: int) -> list[ShadowPage]:
        """The pages whose gfn has the same hash, newest first."""
        return self.buckets.setdefault(kvm_page_table_hashfn(gfn), [])

    def of_table(self, gfn: int, valid_gen: int) -> list[ShadowPage]:
        """The valid pages that shadow the table at `gfn` (for_each_gfn_valid_sp_with_gptes)."""
        return [
            sp
            for sp in self.bucket(gfn)
            if sp.gfn == gfn and sp.has_gptes and not sp.invalid and sp.valid_gen == valid_gen
        ]

    def add(self, sp: ShadowPage) -> None:
        """A page is made."""
        self.bucket(sp.gfn).insert(0, sp)
        self.active[sp] = None
        self.used += 1

    def free(self, sp: ShadowPage) -> None:
        """A page is given back (kvm_mmu_free_shadow_page)."""
        self.bucket(sp.gfn).remove(sp)
