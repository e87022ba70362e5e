"""The roots of shadow tables: what KVM loads when the guest is entered, and which ones it keeps.

`ShadowRoots` adds to a `ShadowTree` the vCPU's control registers and

    enter        what was asked for is done: obsolete roots are freed, unsync pages brought up to date, a root is loaded
    load         a shadow page for the guest's root: one; four for PAE and for 2 levels; four direct ones without paging
    new_pgd      MOV to CR3: a root that was used lately is taken again; three are kept beside the one in use
    free_roots   a root that nobody uses stays where it is, unless it is invalid

Source: linux:arch/x86/kvm/mmu/mmu.c (kvm_mmu_load, kvm_mmu_new_pgd, kvm_mmu_free_roots, kvm_mmu_free_obsolete_roots),
arch/x86/kvm/x86.c (vcpu_enter_guest) @v6.18.
"""

from __future__ import annotations

from ..arch.number import number
from .role import calc_cpu_role, shadow_root_role
from .shadow_page import ShadowPage
from .shadow_tree import ShadowTree
from .walk import GuestMmu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Root", "ShadowRoots"]

_NUM_PREV_ROOTS = 3  # KVM_MMU_NUM_PREV_ROOTS
_P = 1


class Root:
    """A root (struct kvm_mmu_root_info): the CR3 it is for, and its shadow page.

    `pages`: four for PAE and for 2 levels, None for each that is not there; (None,) where the guest's root lies in no
    slot (KVM's dummy root).
    """

    __slots__ = ("pages", "pgd")

    def __init__(self, pgd: int, pages: tuple[ShadowPage | None, ...]) -> None:
        self.pgd, self.pages = pgd, pages


class ShadowRoots(ShadowTree):
    """A tree of shadow pages with its roots and the vCPU's registers; see the module's text.  One thread at a time."""

    #: The root in use, or None: one is loaded when the guest is entered.
    root: Root | None
    #: Those kept, the one used last first.
    prev_roots: list[Root | None]
    cr0: int
    cr3: int
    cr4: int
    efer: int
    _cpuid: tuple[int, bool, bool]  # maxphyaddr, gbpages, amd
    _sync: bool  # KVM_REQ_MMU_SYNC

    def _init_mmu(self, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        # kvm_init_mmu
        self.cpu_role = calc_cpu_role(cr0, cr4, efer)
        self.cr0, self.cr3, self.cr4, self.efer = cr0, number("ShadowMmu", "cr3", cr3), cr4, efer
        self.root_role = shadow_root_role(self.cpu_role)
        self._level = self.cpu_role.base.level
        maxphyaddr, gbpages, amd = self._cpuid
        #: What the guest's tables are walked by.
        self.guest = GuestMmu.of(
            "ShadowMmu", cr0=cr0, cr3=cr3, cr4=cr4, efer=efer, maxphyaddr=maxphyaddr, gbpages=gbpages, amd=amd
        )
        self._entry = self.guest.entry_size

    def _enter(self) -> None:
        # vcpu_enter_guest, as far as the MMU goes
        if self._free_obsolete:
            self._free_obsolete = False
            old = [i for i, root in enumerate(self.prev_roots) if self._is_obsolete_root(root)]
            self._free_roots(current=self._is_obsolete_root(self.root), previous=old)
        if self._sync:
            self._sync = False
            self._sync_roots()
        if self.root is None:
            self._load()

    def _is_obsolete_root(self, root: Root | None) -> bool:
        if root is None:
            return False
        if len(root.pages) != 1 or root.pages[0] is None:
            return True
        return self._is_obsolete(root.pages[0])

    def _free_roots(self, *, current: bool, previous: Iterable[int]) -> None:
        # kvm_mmu_free_roots
        invalid: list[ShadowPage] = []
        for index in previous:
            self._free_root(self.prev_roots[index], invalid)
            self.prev_roots[index] = None
        if current:
            self._free_root(self.root, invalid)
            self.root = None
        self._commit_zap(invalid)

    def _free_root(self, root: Root | None, invalid: list[ShadowPage]) -> None:
        for sp in root.pages if root is not None else ():
            if sp is not None:
                sp.root_count -= 1
                if not sp.root_count and sp.invalid:
                    self._prepare_zap(sp, invalid)

    def _load(self) -> None:
        # kvm_mmu_load
        if self.root_role.direct:
            self._make_available()
            self.root = Root(self.cr3, tuple([self._alloc_root(i << 18, 0, 2) for i in range(4)]))
            return
        root_gfn = self.guest.root >> 12
        if self.slot_at(root_gfn) is None:
            self.root = Root(self.cr3, (None,))
            return
        self._make_available()
        if self._level >= 4:
            self.root = Root(self.cr3, (self._alloc_root(root_gfn, 0, self._level),))
        elif self._level == 3:
            self.root = Root(self.cr3, tuple([self._pae_root(index) for index in range(4)]))
        else:
            self.root = Root(self.cr3, tuple([self._alloc_root(root_gfn, quadrant, 2) for quadrant in range(4)]))
        self._sync_roots()

    def _pae_root(self, index: int) -> ShadowPage | None:
        pdpte = int.from_bytes(self._read(self.guest.entry_gpa(0, 3, index << 30), 8), "little")
        gfn = self.guest.gpa_of(pdpte, 1, 0) >> 12
        return self._alloc_root(gfn, 0, 2) if pdpte & _P and self.slot_at(gfn) is not None else None

    def _alloc_root(self, gfn: int, quadrant: int, level: int) -> ShadowPage:
        # mmu_alloc_root
        sp = self._get_shadow_page(gfn, self.root_role.replace(level=level, quadrant=quadrant))
        sp.root_count += 1
        return sp

    def _new_pgd(self, pgd: int) -> None:
        # kvm_mmu_new_pgd
        if self._fast_pgd_switch(pgd):
            assert self.root is not None
            [sp] = self.root.pages
            assert sp is not None
            sp.write_flooding_count = 0

    def _is_root_usable(self, root: Root | None, pgd: int) -> bool:
        if root is None or len(root.pages) != 1 or root.pages[0] is None:
            return False
        return root.pgd == pgd and root.pages[0].role == self.root_role.word

    def _fast_pgd_switch(self, pgd: int) -> bool:
        prev = self.prev_roots
        if self.root is not None and (len(self.root.pages) != 1 or self.root.pages[0] is None):
            self._free_roots(current=True, previous=())
        if self.root is not None:
            # cached_root_find_and_keep_current
            if self._is_root_usable(self.root, pgd):
                return True
            for i in range(_NUM_PREV_ROOTS):
                self.root, prev[i] = prev[i], self.root
                if self._is_root_usable(self.root, pgd):
                    return True
            self._free_roots(current=True, previous=())
            return False
        # cached_root_find_without_current
        for i in range(_NUM_PREV_ROOTS):
            if self._is_root_usable(prev[i], pgd):
                self.root = prev.pop(i)
                prev.append(None)
                return True
        return False

    def _sync_roots(self) -> None:
        # kvm_mmu_sync_roots
        if self.root is None or self.root_role.direct:
            return
        for sp in self.root.pages:
            if sp is not None and (sp.unsync or sp.unsync_children):
                self._sync_children(sp)
