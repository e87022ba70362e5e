"""The tree of shadow pages of one VM: how they are found, linked, written past, and taken away.

`ShadowTree` is the half of `ShadowMmu` (simulate) that needs no walk of the guest's tables:

    get_shadow_page      found by (gfn, role), or made; a table that gets its first one is write-protected
    link, drop_parent    an entry above leads to it; parents know their children, and children their parents
    drop_spte, rmap      a leaf goes; who maps a frame
    track_write          the emulator wrote to a table: the entries made of it go; too many, or crooked: the page goes
    try_to_unsync        a table of level 1 becomes writable: its pages are "unsync", and all above know that
    prepare_zap          a page goes: its entries, what leads to it, its place in the lists
    zap_oldest           there are too many pages

Only leaves' tables (level 1) are ever unsync.  Above them, `unsync_children` says below which entries one is.

Source: linux:arch/x86/kvm/mmu/mmu.c @v6.18.
"""

from __future__ import annotations

from itertools import count

from ..errors import ArgumentError
from .guest_memory import GuestMemory
from .levels import gfn_round_for_level
from .role import PageRole
from .shadow_page import MmuEvent, PageBook, ShadowPage, SimSlot
from .spte import is_last_spte, is_shadow_present_pte, make_nonleaf_spte

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .masks import ShadowMasks

    # (page, index of the entry above that leads to it), each before what is below it
    Found = list[tuple[ShadowPage, int]]

__all__ = ["ShadowTree"]

_MOST_FOUND = 15  # KVM_PAGE_ARRAY_NR, of which the page above takes one
_MIN_FREE_PAGES, _REFILL_PAGES = 5, 25  # KVM_MIN_FREE_MMU_PAGES, KVM_REFILL_PAGES
_PAGES_RATIO, _MIN_ALLOC_PAGES = 50, 64  # KVM_MEMSLOT_PAGES_TO_MMU_PAGES_RATIO, KVM_MIN_ALLOC_MMU_PAGES
_FLOOD = 3  # writes to a table until it is taken for none
_FIRST_PA = 1 << 40  # of pages of entries, where nobody says where they are
_W = 1 << 1
_PAGE = 4096


class ShadowTree:
    """The shadow pages of a VM; see the module's text, and `ShadowMmu` for the arguments.  One thread at a time."""

    _entry: int  # bytes of a guest's entry

    def __init__(
        self,
        masks: ShadowMasks,
        memory: GuestMemory,
        slots: Iterable[SimSlot],
        *,
        max_pages: int | None,
        spt_pa: Callable[[], int] | None,
        eager_zap_unsync_children: bool,
    ) -> None:
        #: The shadow_* masks.
        self.masks = masks
        #: Guest memory.
        self.memory = memory
        #: The memory slots.
        self.slots: list[SimSlot] = []
        #: All shadow pages.
        self.pages = PageBook()
        #: What happened, oldest first; `take_events` empties it.
        self.events: list[MmuEvent] = []
        #: kvm->arch.mmu_valid_gen: pages of the other generation are obsolete.
        self.valid_gen = 0
        #: The generation of the memory slots.
        self.generation = 0
        self._asked_pages = max_pages
        #: How many shadow pages KVM may have (n_max_mmu_pages).
        self.max_pages = _MIN_ALLOC_PAGES
        #: The kvm module's parameter of this name, which kernels with kvm_pvm have.
        self.eager_zap_unsync_children = bool(eager_zap_unsync_children)
        self._spt_pa = count(_FIRST_PA, _PAGE).__next__ if spt_pa is None else spt_pa
        self._free_obsolete = False  # KVM_REQ_MMU_FREE_OBSOLETE_ROOTS
        for slot in slots:
            self._add_slot(slot)

    def _sync_page(self, sp: ShadowPage) -> None:
        # __kvm_sync_page: the half that knows the guest's tables does it.
        raise NotImplementedError

    # ---- slots and memory ----

    def _add_slot(self, slot: SimSlot) -> None:
        for other in self.slots:
            if slot.base_gfn < other.base_gfn + other.npages and other.base_gfn < slot.base_gfn + slot.npages:
                raise ArgumentError("ShadowMmu", "slots", slot, f"no overlap with {other}")
        self.slots.append(slot)
        self._slots_changed()

    def _slots_changed(self) -> None:
        self.generation += 1
        total = sum(slot.npages for slot in self.slots)
        wanted = max(total // _PAGES_RATIO, _MIN_ALLOC_PAGES) if self._asked_pages is None else self._asked_pages
        if self.pages.used > wanted:
            self._zap_oldest(self.pages.used - wanted)
            wanted = self.pages.used
        self.max_pages = wanted

    def slot_at(self, gfn: int) -> SimSlot | None:
        """The slot that has this frame, or None."""
        for slot in self.slots:
            if gfn in slot:
                return slot
        return None

    def _event(self, event: MmuEvent) -> None:
        self.events.append(event)

    def take_events(self) -> list[MmuEvent]:
        """What happened since the last call, oldest first."""
        found, self.events = self.events, []
        return found

    def _read(self, gpa: int, size: int) -> bytes:
        found = self.memory.view(gpa)
        assert found is not None
        return bytes(found[1][gpa - found[0] : gpa - found[0] + size])

    def _write(self, gpa: int, data: bytes) -> None:
        self.memory.store(gpa, int.from_bytes(data, "little"), len(data))

    def _is_obsolete(self, sp: ShadowPage) -> bool:
        return sp.invalid or sp.valid_gen != self.valid_gen

    # ---- leaves ----

    def _drop_spte(self, sp: ShadowPage, index: int) -> None:
        # drop_spte
        if is_shadow_present_pte(sp.entry(index)):
            gfn = sp.gfn_of(index)
            slot = self.slot_at(gfn)
            assert slot is not None
            del slot.rmap[sp.level, gfn][sp, index]
            sp.translation.pop(index, None)
        sp.spt.pop(index, None)

    def _spte_write_protect(self, sp: ShadowPage, index: int, pt_protect: bool) -> None:
        # spte_write_protect
        spte = sp.spt[index] & ~_W
        sp.spt[index] = spte & ~self.masks.mmu_writable_mask if pt_protect else spte

    def _each_rmap(
        self, slot: SimSlot, first: int, last: int, levels: Iterable[int], do: Callable[[SimSlot, int, int], None]
    ) -> None:
        # for_each_slot_rmap_range
        for level in levels:
            start = gfn_round_for_level(first, level)
            for key in sorted(key for key in slot.rmap if key[0] == level and start <= key[1] <= last):
                do(slot, *key)

    def _zap_rmap(self, slot: SimSlot, level: int, gfn: int) -> None:
        for sp, index in list(slot.rmap[level, gfn]):
            self._drop_spte(sp, index)

    def _write_protect_rmap(self, slot: SimSlot, level: int, gfn: int) -> None:
        for sp, index in slot.rmap[level, gfn]:
            self._spte_write_protect(sp, index, False)

    # ---- shadow pages ----

    def _get_shadow_page(self, gfn: int, role: PageRole) -> ShadowPage:
        # kvm_mmu_get_shadow_page
        sp = self._find_shadow_page(gfn, role)
        created = sp is None
        if sp is None:
            sp = ShadowPage(gfn, role, self._spt_pa(), self.valid_gen)
            self.pages.add(sp)
            if sp.has_gptes:
                self._account_shadowed(sp)
        self._event(sp.event("get_page", created))
        return sp

    def _find_shadow_page(self, gfn: int, role: PageRole) -> ShadowPage | None:
        # kvm_mmu_find_shadow_page
        found, collisions = None, 0
        invalid: list[ShadowPage] = []
        for sp in list(self.pages.bucket(gfn)):
            if self._is_obsolete(sp):
                continue
            if sp.gfn != gfn:
                collisions += 1
            elif sp.role != role.word:
                if role.level > 1 and sp.unsync:
                    self._prepare_zap(sp, invalid)
            else:
                found = sp
                if not sp.direct:
                    if sp.unsync:
                        self._sync_page(sp)
                    sp.write_flooding_count = 0
                break
        self._commit_zap(invalid)
        self.pages.max_collisions = max(self.pages.max_collisions, collisions)
        return found

    def _account_shadowed(self, sp: ShadowPage) -> None:
        slot = self.slot_at(sp.gfn)
        assert slot is not None
        if sp.level > 1:
            slot.tracked[sp.gfn] = slot.tracked.get(sp.gfn, 0) + 1  # __kvm_write_track_add_gfn
        slot.count_disallow(sp.gfn, 1)
        self._write_protect_gfn(slot, sp.gfn)

    def _unaccount_shadowed(self, sp: ShadowPage) -> None:
        slot = self.slot_at(sp.gfn)
        assert slot is not None
        if sp.level > 1:
            slot.tracked[sp.gfn] -= 1
        slot.count_disallow(sp.gfn, -1)

    def _write_protect_gfn(self, slot: SimSlot, gfn: int) -> None:
        # kvm_mmu_slot_gfn_write_protect
        for level in (1, 2, 3):
            for sp, index in slot.rmap.get((level, gfn_round_for_level(gfn, level)), ()):
                self._spte_write_protect(sp, index, True)

    def _link(self, sp: ShadowPage, index: int, child: ShadowPage) -> None:
        # link_shadow_page
        if is_shadow_present_pte(sp.entry(index)):
            self._zap_pte(sp, index)
        sp.spt[index] = make_nonleaf_spte(self.masks, child.pa, bool(PageRole(child.role).ad_disabled))
        sp.children[index] = child
        child.parents[sp, index] = None
        if child.unsync_children or child.unsync:
            self._mark_unsync(sp, index)

    def _drop_parent(self, child: ShadowPage, sp: ShadowPage, index: int) -> None:
        # drop_parent_pte
        del child.parents[sp, index]
        del sp.spt[index]
        del sp.children[index]

    def _zap_pte(self, sp: ShadowPage, index: int) -> None:
        # mmu_page_zap_pte
        spte = sp.entry(index)
        if not is_shadow_present_pte(spte):
            sp.spt.pop(index, None)
        elif is_last_spte(spte, sp.level):
            self._drop_spte(sp, index)
        else:
            self._drop_parent(sp.children[index], sp, index)

    def _prepare_zap(self, sp: ShadowPage, invalid: list[ShadowPage]) -> int:
        # kvm_mmu_prepare_zap_page: how many other pages went with it
        self._event(sp.event("prepare_zap_page"))
        zapped = self._zap_unsync_children(sp, invalid)
        for index in sorted(sp.spt):
            self._zap_pte(sp, index)
        for parent, index in list(sp.parents):
            self._drop_parent(sp, parent, index)
        if not sp.invalid and sp.has_gptes:
            self._unaccount_shadowed(sp)
        if sp.unsync:
            self._unlink_unsync(sp)
        self.pages.active.pop(sp, None)
        if not sp.root_count:
            invalid.append(sp)
            self.pages.used -= 1
        elif not self._is_obsolete(sp):
            self._free_obsolete = True
        sp.invalidate()
        return zapped

    def _commit_zap(self, invalid: list[ShadowPage]) -> None:
        for sp in invalid:
            self.pages.free(sp)
        invalid.clear()

    def _zap_unsync_children(self, parent: ShadowPage, invalid: list[ShadowPage]) -> int:
        # mmu_zap_unsync_children
        zapped = 0
        if parent.level == 1 or not self.eager_zap_unsync_children:
            return 0
        while found := self._unsync_walk(parent):
            for sp, path in self._leaves(parent, found):
                self._prepare_zap(sp, invalid)
                self._clear_parents(path)
                zapped += 1
        return zapped

    def _make_available(self) -> None:
        # make_mmu_pages_available
        available = self.max_pages - self.pages.used
        if available < _MIN_FREE_PAGES:
            self._zap_oldest(_REFILL_PAGES - available)

    def _zap_oldest(self, count: int) -> None:
        # kvm_mmu_zap_oldest_mmu_pages
        invalid: list[ShadowPage] = []
        total, again = 0, True
        while again:
            again = False
            for sp in list(self.pages.active):
                if sp.root_count:
                    continue
                unstable = self._prepare_zap(sp, invalid)
                total += unstable + 1
                if total >= count:
                    break
                if unstable:
                    again = True
                    break
        self._commit_zap(invalid)

    # ---- writes to guest page tables ----

    def _track_write(self, gpa: int, size: int) -> None:
        # kvm_mmu_track_write
        invalid: list[ShadowPage] = []
        if self._entry == 8 and size == 4:
            gpa, size = gpa & ~7, 8
        for sp in self.pages.of_table(gpa >> 12, self.valid_gen):
            if self._misaligned(sp, gpa, size) or self._flooding(sp):
                self._prepare_zap(sp, invalid)
                continue
            for index in self._written(sp, gpa):
                self._zap_pte(sp, index)
        self._commit_zap(invalid)

    def _misaligned(self, sp: ShadowPage, gpa: int, size: int) -> bool:
        # detect_write_misaligned
        offset, mask = gpa % _PAGE, sp.gpte_bytes - 1
        if not offset & mask and size == 1:
            return False
        return bool((offset ^ offset + size - 1) & ~mask) or size < 4

    def _flooding(self, sp: ShadowPage) -> bool:
        # detect_write_flooding
        if sp.level == 1:
            return False
        sp.write_flooding_count += 1
        return sp.write_flooding_count >= _FLOOD

    def _written(self, sp: ShadowPage, gpa: int) -> range:
        # get_written_sptes: indices
        offset, count = gpa % _PAGE, 1
        if sp.gpte_bytes == 4:
            offset <<= 1
            if sp.level == 2:
                offset, count = (offset & ~7) << 1, 2
            quadrant, offset = offset >> 12, offset % _PAGE
            if quadrant != PageRole(sp.role).quadrant:
                return range(0)
        return range(offset // 8, offset // 8 + count)

    # ---- stale pages ----

    def _mark_parents_unsync(self, sp: ShadowPage) -> None:
        for parent, index in sp.parents:
            self._mark_unsync(parent, index)

    def _mark_unsync(self, sp: ShadowPage, index: int) -> None:
        # mark_unsync
        if index in sp.unsync_children:
            return
        first = not sp.unsync_children
        sp.unsync_children.add(index)
        if first:
            self._mark_parents_unsync(sp)

    def _unlink_unsync(self, sp: ShadowPage) -> None:
        # kvm_unlink_unsync_page
        self._event(sp.event("sync_page"))
        sp.unsync = False

    def _unsync_walk(self, top: ShadowPage) -> Found:
        # mmu_unsync_walk: unsync pages below, and those between, each after the one above; a part of them where many
        found: Found = []
        return found if self._unsync_below(top, found) else []

    def _unsync_below(self, sp: ShadowPage, found: Found) -> bool:
        # __mmu_unsync_walk: whether there is any.  Marks of entries without one are removed.
        stale = False
        for index in sorted(sp.unsync_children):
            child = sp.children.get(index)
            if child is not None and child.unsync_children:
                if self._pages_add(found, child, index):
                    return True
                below = self._unsync_below(child, found)
            else:
                below = child is not None and child.unsync
                if child is not None and child.unsync and self._pages_add(found, child, index):
                    return True
            if len(found) == _MOST_FOUND:
                return True
            if below:
                stale = True
            else:
                sp.unsync_children.discard(index)
        return stale

    @staticmethod
    def _pages_add(found: Found, sp: ShadowPage, index: int) -> bool:
        # mmu_pages_add; whether `found` is full
        if not sp.unsync or all(other is not sp for other, _ in found):
            found.append((sp, index))
        return len(found) == _MOST_FOUND

    @staticmethod
    def _leaves(top: ShadowPage, found: Found) -> Iterator[tuple[ShadowPage, Found]]:
        # for_each_sp: each page of level 1, with the entries that lead to it, the nearest first
        parent, at = {top.level: top}, {}
        for sp, index in found:
            at[sp.level] = index
            if sp.level > 1:
                parent[sp.level] = sp
            else:
                yield sp, [(parent[level], at[level - 1]) for level in range(2, top.level + 1)]

    @staticmethod
    def _clear_parents(path: Found) -> None:
        # mmu_pages_clear_parents
        for sp, index in path:
            sp.unsync_children.discard(index)
            if sp.unsync_children:
                return

    def _sync_children(self, parent: ShadowPage) -> None:
        # mmu_sync_children
        while found := self._unsync_walk(parent):
            for sp, _ in self._leaves(parent, found):
                slot = self.slot_at(sp.gfn)
                assert slot is not None
                self._write_protect_gfn(slot, sp.gfn)
            for sp, path in self._leaves(parent, found):
                self._unlink_unsync(sp)
                self._sync_page(sp)
                self._clear_parents(path)

    def _try_to_unsync(self, slot: SimSlot, gfn: int, synchronizing: bool, prefetch: bool) -> bool:
        # mmu_try_to_unsync_pages; False: the page must stay write-protected
        if slot.tracked.get(gfn):
            return False
        if slot.lpage_allowed(gfn, 2):
            return True
        for sp in self.pages.of_table(gfn, self.valid_gen):
            if synchronizing:
                return False
            if sp.unsync:
                continue
            if prefetch:
                return False
            self._event(sp.event("unsync_page"))
            sp.unsync = True
            self._mark_parents_unsync(sp)
        return True
