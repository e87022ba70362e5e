"""`ShadowMmu`: KVM's shadow MMU as a model: which shadow pages and SPTEs it makes for a guest's page tables.

It has the guest's memory, memory slots and control registers, and is told what happens: accesses at CPL 3 through the
shadow tables, writes of the emulator, INVLPG, CR3 loads, changes of slots, and pages the host takes back.  What KVM's
tracepoints would tell is in `events`; what stands in the tables is in `tree()` and `sptes()`.

An access goes as the processor and KVM have it between them:

    access()            the processor walks the shadow tables; done, or a fault:
      kvm_mmu_page_fault
        walk of the guest's tables (A and D are set)       not there, forbidden: #PF for the guest
        a write to a table of level 2 or more              emulated
        the host's page is brought in                      nothing there, read-only: emulated (MMIO)
        fetch()         a shadow page for each table, linked from the root down
                        direct pages where the guest's page is larger than what the host can map
          mmu_set_spte  the leaf; a table of level 1 that becomes writable is "unsync" from now on
          pte_prefetch  the neighbours among 8
    … and the processor tries again

The rules are those of the other modules here: roles of `role`, entries of `spte`, walks of `walk`, the hash of
`page_hash`.  Names are the kernel's.  One vCPU; no nested guest; no SMM.

Source: linux:arch/x86/kvm/mmu/mmu.c, mmu/paging_tmpl.h, mmu/spte.c, x86.c (kvm_set_cr3, emulator_write_phys,
kvm_arch_commit_memory_region), virt/kvm/kvm_main.c (kvm_prefetch_pages) @v6.18.
"""

from __future__ import annotations

from ..arch.number import number
from ..errors import ArgumentError
from ..value import Value
from .fault import RET_PF_EMULATE, RET_PF_FIXED, RET_PF_RETRY, RET_PF_SPURIOUS, RET_PF_WRITE_PROTECTED
from .guest_memory import GuestMemory
from .levels import PG_LEVEL_2M, PG_LEVEL_4K, gfn_round_for_level, pages_per_hpage, shadow_pt_index
from .permission import (
    ACC_EXEC_MASK,
    ACC_USER_MASK,
    ACC_WRITE_MASK,
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)
from .role import PageRole, child_role
from .shadow_page import HostMemory, HostPage, MmuEvent, ShadowPage, SimSlot
from .shadow_roots import _NUM_PREV_ROOTS, Root, ShadowRoots
from .spte import (
    MMIO_SPTE_GEN_MASK,
    get_mmio_spte_generation,
    get_mmio_spte_gfn,
    is_large_pte,
    is_last_spte,
    is_mmio_spte,
    is_mmu_writable_spte,
    is_shadow_present_pte,
    is_writable_pte,
    make_mmio_spte,
    make_spte,
    spte_to_pfn,
)
from .walk import walk_addr

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .masks import ShadowMasks
    from .walk import Memory, Walk

__all__ = ["ShadowMmu", "SimAccess"]

PTE_PREFETCH_NUM = 8
_TRIES = 64  # times that one access may fault: more is a bug of the model

_P, _W, _A, _D = 1, 2, 1 << 5, 1 << 6
_NOSLOT = 1 << 63  # KVM_PFN_NOSLOT
_PAGE = 4096
_KINDS = {"load": 0, "store": PFERR_WRITE_MASK, "fetch": PFERR_FETCH_MASK}


class SimAccess(Value):
    """What became of an access.

    `data`: what a load read, else None.  `fault`: the error code of the #PF that the guest gets, or None.  `emulated`:
    KVM's emulator made it, for the page is write-protected.  `mmio`: the gpa, where no memory answers.
    """

    data: bytes | None = None
    fault: int | None = None
    emulated: bool = False
    mmio: int | None = None


class _Walk:
    # A walk of the guest's tables that leads somewhere (struct guest_walker); by level, where a level was walked.
    __slots__ = ("gfn", "gptes", "level", "prefetch_gptes", "pt_access", "pte_access", "pte_gpa")

    def __init__(self, walk: Walk) -> None:
        found = walk.entries
        self.gptes = {entry.level: entry.value for entry in found}
        self.pte_gpa = {entry.level: entry.gpa for entry in found}
        self.pt_access = {entry.level: access for entry, access in zip(found, walk.pt_access, strict=True)}
        self.prefetch_gptes: list[int] = []
        self.level, self.pte_access = walk.level, walk.pte_access
        assert walk.gfn is not None
        self.gfn = walk.gfn

    def table_gfn(self, level: int) -> int:
        return self.pte_gpa[level] >> 12


class _Fault:
    # A page fault on its way (struct kvm_page_fault).
    __slots__ = (
        "addr", "exec", "gfn", "goal_level", "huge_page_disallowed", "map_writable", "max_level", "pfn", "present",
        "rsvd", "slot", "user", "write",
    )  # fmt: skip

    # What it leads to, once that is known.
    gfn: int
    slot: SimSlot | None
    max_level: int
    pfn: int
    map_writable: bool

    def __init__(self, addr: int, code: int) -> None:
        self.addr = addr
        self.exec, self.write = bool(code & PFERR_FETCH_MASK), bool(code & PFERR_WRITE_MASK)
        self.present, self.user = bool(code & PFERR_PRESENT_MASK), bool(code & PFERR_USER_MASK)
        self.rsvd = bool(code & PFERR_RSVD_MASK)
        self.goal_level = PG_LEVEL_4K
        self.huge_page_disallowed = False


class ShadowMmu(ShadowRoots):
    """The shadow MMU of a VM with one vCPU; see the module's text.

    `masks`: the shadow_* masks, of kind "shadow".  `memory`: guest memory: bytes that begin at gpa 0, pieces of (gpa,
    buffer), or a GuestMemory; the model sets A and D there, and makes the guest's writes.  `slots`: the memory slots.
    `host`: the host's pages.  `cr0`, `cr3`, `cr4`, `efer`: the registers.  `maxphyaddr`, `gbpages`, `amd`: of the
    guest's CPUID.  `nx_huge_pages`: KVM's mitigation is on.  `max_huge_page_level`: 2 or 3.  `max_pages`: shadow pages
    that KVM may have, by default what it computes of the slots.  `spt_pa`: gives each new shadow page the address of
    its entries.

    Where kernels differ from v6.18: those with kvm_pvm have a parameter of the kvm module `eager_zap_unsync_children`,
    and v6.18 does as with that on.  `emulation_batch`: kvm_pvm emulates many instructions of CPL 0 at a time; between
    them KVM does nothing that it was asked for but load a missing root.  So the synchronisation that MOV to CR3 asks
    for waits until the guest is entered again (v6.18 enters it before each).

    ArgumentError: masks of another kind; slots that overlap; registers as `calc_cpu_role`.  One thread at a time.

    >>> from hvmodel.mmu import ShadowMmu, SimSlot, reset_all_pte_masks
    >>> ram = bytearray(1 << 20)
    >>> for at, entry in ((0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4000, 0x5007), (0x4008, 0x6027)):
    ...     ram[at : at + 8] = entry.to_bytes(8, "little")
    >>> mmu = ShadowMmu(reset_all_pte_masks(46), ram, [SimSlot(0, 256)], cr3=0x1000)
    >>> mmu.access(0x123, "load")
    SimAccess(data=b'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00', fault=None, emulated=False, mmio=None)
    >>> print(mmu.tree())
    root gfn 0x1, level 4, xwu, cr3 0x1000
      [0x000] gfn 0x2, level 3, xwu
        [0x000] gfn 0x3, level 2, xwu
          [0x000] gfn 0x4, level 1, xwu
            [0x000] 0x0                gfn 0x5      pfn 0x100005   x-u a
            [0x001] 0x1000             gfn 0x6      pfn 0x100006   x-u
    """

    def __init__(
        self,
        masks: ShadowMasks,
        memory: Memory,
        slots: Iterable[SimSlot],
        *,
        host: HostMemory | None = None,
        cr0: int = 0x80010033,
        cr3: int = 0,
        cr4: int = 0x20,
        efer: int = 0xD00,
        maxphyaddr: int = 48,
        gbpages: bool = False,
        amd: bool = False,
        nx_huge_pages: bool = False,
        max_huge_page_level: int = 3,
        max_pages: int | None = None,
        spt_pa: Callable[[], int] | None = None,
        emulation_batch: bool = False,
        eager_zap_unsync_children: bool = True,
    ) -> None:
        call = "ShadowMmu"
        if masks.kind == "ept":
            raise ArgumentError(call, "masks", masks.kind, "those of shadow paging: reset_all_pte_masks")
        super().__init__(
            masks,
            GuestMemory.of(call, memory),
            slots,
            max_pages=max_pages,
            spt_pa=spt_pa,
            eager_zap_unsync_children=eager_zap_unsync_children,
        )
        #: The host's memory.
        self.host = HostMemory() if host is None else host
        self.root: Root | None = None
        self.prev_roots: list[Root | None] = [None] * _NUM_PREV_ROOTS
        self._cpuid = (number(call, "maxphyaddr", maxphyaddr, 52, 32), bool(gbpages), bool(amd))
        self.nx_huge_pages = bool(nx_huge_pages)
        self.max_huge_page_level = number(call, "max_huge_page_level", max_huge_page_level, 3, 2)
        self.emulation_batch = bool(emulation_batch)
        self._sync = False  # KVM_REQ_MMU_SYNC
        self._init_mmu(cr0, cr3, cr4, efer)

    # ---- what it shows ----

    def tree(self) -> str:
        """The shadow tables as text; see hvmodel.mmu.picture."""
        from .picture import tree

        return tree(self)

    def svg(self) -> str:
        """The shadow tables as a picture; a notebook shows it by itself."""
        from .picture import svg

        return svg(self)

    def _repr_svg_(self) -> str:
        return self.svg()

    def sptes(self) -> dict[tuple[int, int], int]:
        """All leaves of all shadow pages, linked or not: the SPTE by (its address, its level)."""
        return {
            (sp.pa + 8 * index, sp.level): spte
            for sp in self.pages.active
            for index, spte in sp.present()
            if is_last_spte(spte, sp.level)
        }

    # ---- what the guest does ----

    def access(self, gva: int, kind: str = "load", data: bytes = bytes(8), *, user: bool = True) -> SimAccess:
        """An access of the processor through the shadow tables: "load", "store" of `data`, or "fetch".

        A load reads as many bytes as `data` has; it must lie in one page.  `user`: at CPL 3.

        ArgumentError: a kind there is not; bytes that cross a page.
        """
        call = "ShadowMmu.access"
        gva = number(call, "gva", gva)
        if kind not in _KINDS:
            raise ArgumentError(call, "kind", kind, ", ".join(_KINDS))
        if not 0 < len(data) <= _PAGE - gva % _PAGE:
            raise ArgumentError(call, "data", len(data), "1 byte or more, all in one page")
        access = _KINDS[kind] | (PFERR_USER_MASK if user else 0)
        for _ in range(_TRIES):
            self._enter()
            found = self._hardware(gva, access)
            if isinstance(found, int):
                return self._touch(found, kind, data)
            code = found[0]
            fault = _Fault(gva, code)
            if code & PFERR_RSVD_MASK and (gfn := self._mmio_gfn(gva)) is not None:
                return SimAccess(mmio=gfn << 12 | gva % _PAGE)
            if self.root_role.direct:
                ret = self._direct_page_fault(fault)
            else:
                result = self._walk_addr(gva, code & ~PFERR_RSVD_MASK)
                if isinstance(result, int):
                    self._inject(gva, result)
                    return SimAccess(fault=result)
                ret = self._paging_page_fault(fault, result)
            if ret == RET_PF_EMULATE:
                return SimAccess(mmio=fault.gfn << 12 | gva % _PAGE)
            if ret == RET_PF_WRITE_PROTECTED:
                return self._emulate_store(gva, access, data)
        raise AssertionError(f"{kind} at {gva:#x} does not end")

    def _touch(self, gpa: int, kind: str, data: bytes) -> SimAccess:
        if kind == "store":
            self._write(gpa, data)
            return SimAccess()
        return SimAccess(self._read(gpa, len(data)) if kind == "load" else None)

    def _emulate_store(self, gva: int, access: int, data: bytes) -> SimAccess:
        # x86_emulate_instruction of a MOV to memory: it translates once more, and writes.
        gpa: int | None = gva
        if not self.root_role.direct:
            result = self._walk_addr(gva, access)
            if isinstance(result, int):
                return SimAccess(fault=result, emulated=True)
            gpa = result.gfn << 12 | gva % _PAGE
        assert gpa is not None
        return SimAccess(emulated=True) if self.write_guest(gpa, data) else SimAccess(mmio=gpa, emulated=True)

    def write(self, gva: int, data: bytes) -> SimAccess:
        """A store at CPL 0 made by KVM's emulator, which walks the guest's tables itself.

        So are the guest's kernel's with kvm_pvm; with others, what KVM emulates for another reason.
        """
        self._enter()
        result = self._walk_addr(number("ShadowMmu.write", "gva", gva), PFERR_WRITE_MASK)
        if isinstance(result, int):
            self._inject(gva, result)
            return SimAccess(fault=result)
        gpa = result.gfn << 12 | gva % _PAGE
        return SimAccess(emulated=True) if self.write_guest(gpa, data) else SimAccess(mmio=gpa, emulated=True)

    def read(self, gva: int, size: int = 8, *, fetch: bool = False) -> SimAccess:
        """A load, or a fetch, at CPL 0 made by KVM's emulator."""
        self._enter()
        access = PFERR_FETCH_MASK if fetch else _KINDS["load"]
        result = self._walk_addr(number("ShadowMmu.read", "gva", gva), access)
        if isinstance(result, int):
            self._inject(gva, result)
            return SimAccess(fault=result)
        gpa = result.gfn << 12 | gva % _PAGE
        if self.slot_at(result.gfn) is None:
            return SimAccess(mmio=gpa, emulated=True)
        return SimAccess(self._read(gpa, size), emulated=True)

    def write_guest(self, gpa: int, data: bytes) -> bool:
        """A write of the emulator (emulator_write_phys), of which shadow pages learn.  False: no RAM is there."""
        slot = self.slot_at(gpa >> 12)
        if slot is None or slot.readonly:
            return False
        self.host.fault_in(gpa >> 12, True)
        self._write(gpa, data)
        slot.mark_dirty(gpa >> 12)
        self._track_write(gpa, len(data))
        return True

    def enter(self) -> None:
        """KVM_RUN: what was put off is done, and a root is loaded."""
        self._enter()

    def walk(self, gva: int, access: int = 0) -> int | None:
        """A walk that KVM makes for itself, as to read an instruction: sets A and D; the gpa, or None: it faults."""
        found = self._walk_addr(number("ShadowMmu.walk", "gva", gva), access)
        return None if isinstance(found, int) else found.gfn << 12 | gva % _PAGE

    def where(self, gva: int, access: int = 0) -> int | None:
        """Where the guest's tables lead, without a change; None: a fault."""
        return walk_addr(self.guest, self._read_entry, number("ShadowMmu.where", "gva", gva), access).gpa

    def translation(self, gva: int) -> int | None:
        """Where the shadow tables lead, without a change; None: no present leaf."""
        for sp, index in self._shadow_walk(gva):
            spte = sp.entry(index)
            if is_shadow_present_pte(spte) and is_last_spte(spte, sp.level):
                return (sp.gfn_of(index) << 12) + (gva & (pages_per_hpage(sp.level) << 12) - 1)
        return None

    def mov_cr3(self, value: int) -> None:
        """MOV to CR3 at CPL 0 (kvm_set_cr3): roots used lately are kept, and the new one is brought up to date."""
        self._enter()
        value = number("ShadowMmu.mov_cr3", "value", value)
        if value != self.cr3:
            self._new_pgd(value)
            self._init_mmu(self.cr0, value, self.cr4, self.efer)
        self._sync = True
        if not self.emulation_batch:
            self._enter()
        elif self.root is None:
            self._load()

    def invlpg(self, gva: int) -> None:
        """INVLPG at CPL 0 (kvm_mmu_invlpg): the entry of this address is brought up to date, below every root kept."""
        self._enter()
        gva = number("ShadowMmu.invlpg", "gva", gva)
        for root in (self.root, *self.prev_roots):
            self._invalidate_addr(root, gva)

    def set_sregs(
        self, *, cr0: int | None = None, cr3: int | None = None, cr4: int | None = None, efer: int | None = None
    ) -> None:
        """KVM_SET_SREGS: a change drops all roots (kvm_mmu_reset_context); what is not given stays."""
        new = tuple(
            old if given is None else given
            for given, old in ((cr0, self.cr0), (cr3, self.cr3), (cr4, self.cr4), (efer, self.efer))
        )
        if new != (self.cr0, self.cr3, self.cr4, self.efer):
            self._free_roots(current=True, previous=range(_NUM_PREV_ROOTS))
            self._init_mmu(*new)

    # ---- what the host does ----

    def unmap_gfn_range(self, start: int, end: int) -> None:
        """The host takes back the pages of frames [start, end): what maps them goes (kvm_unmap_gfn_range)."""
        for slot in self.slots:
            first, last = max(start, slot.base_gfn), min(end, slot.base_gfn + slot.npages) - 1
            if first <= last:
                self._each_rmap(slot, first, last, (1, 2, 3), self._zap_rmap)

    def set_log_dirty(self, base_gfn: int, on: bool) -> None:
        """KVM_MEM_LOG_DIRTY_PAGES of the slot at `base_gfn` (kvm_mmu_slot_apply_flags).  ArgumentError: no such slot.

        On: everything is write-protected.  Off: what could be mapped by larger pages is zapped.
        """
        slot = self._slot("ShadowMmu.set_log_dirty", base_gfn)
        if slot.log_dirty == bool(on):
            return
        slot.flags ^= 1
        self.generation += 1
        first, last = slot.base_gfn, slot.base_gfn + slot.npages - 1
        if on:
            slot.dirty.clear()
            self._each_rmap(slot, first, last, (1, 2, 3), self._write_protect_rmap)
        else:
            self._each_rmap(slot, first, last, (1, 2), self._zap_collapsible)

    def get_dirty_log(self, base_gfn: int) -> set[int]:
        """KVM_GET_DIRTY_LOG of the slot at `base_gfn`: the offsets of frames written; they are protected again."""
        slot = self._slot("ShadowMmu.get_dirty_log", base_gfn)
        found, slot.dirty = slot.dirty, set()
        for offset in sorted(found):
            for sp, index in list(slot.rmap.get((1, slot.base_gfn + offset), ())):
                self._spte_write_protect(sp, index, False)
        return found

    def add_slot(self, slot: SimSlot) -> None:
        """KVM_SET_USER_MEMORY_REGION makes a slot.  ArgumentError: it overlaps another."""
        self._add_slot(slot)

    def delete_slot(self, base_gfn: int) -> None:
        """KVM_SET_USER_MEMORY_REGION deletes a slot: all shadow pages go (KVM_X86_QUIRK_SLOT_ZAP_ALL)."""
        slot = self._slot("ShadowMmu.delete_slot", base_gfn)
        self.zap_all_fast()
        self.slots.remove(slot)
        self._slots_changed()

    def _slot(self, call: str, base_gfn: int) -> SimSlot:
        for slot in self.slots:
            if slot.base_gfn == base_gfn:
                return slot
        raise ArgumentError(call, "base_gfn", base_gfn, ", ".join(hex(slot.base_gfn) for slot in self.slots))

    def zap_all_fast(self) -> None:
        """Make all shadow pages obsolete, and free those that no root is (kvm_mmu_zap_all_fast)."""
        self._event(MmuEvent("zap_all_fast", level=self.valid_gen, pfn=self.pages.used))
        self.valid_gen ^= 1
        self._free_obsolete = True
        invalid: list[ShadowPage] = []
        again = True
        while again:
            again = False
            for sp in list(self.pages.active):
                if sp.valid_gen == self.valid_gen and not sp.invalid:
                    break
                if self._prepare_zap(sp, invalid):
                    again = True
                    break
        self._commit_zap(invalid)

    # ---- walks ----

    def _hardware(self, gva: int, access: int) -> int | tuple[int]:
        # The processor's walk of the shadow tables: the gpa, with A and D set; or the fault's error code.
        masks = self.masks
        for sp, index in self._shadow_walk(gva):
            spte = sp.entry(index)
            if is_mmio_spte(masks, spte):
                return (access | PFERR_PRESENT_MASK | PFERR_RSVD_MASK,)
            if not is_shadow_present_pte(spte):
                return (access,)
            if not is_last_spte(spte, sp.level):
                continue
            if (
                (access & PFERR_USER_MASK and not spte & masks.user_mask)
                or (access & PFERR_WRITE_MASK and not is_writable_pte(spte))
                or (access & PFERR_FETCH_MASK and spte & masks.nx_mask)
            ):
                return (access | PFERR_PRESENT_MASK,)
            spte |= masks.accessed_mask | (masks.dirty_mask if access & PFERR_WRITE_MASK else 0)
            sp.spt[index] = spte
            inside = gva & (pages_per_hpage(sp.level) << 12) - 1
            return (sp.gfn_of(index) << 12) + inside
        return (access,)

    def _shadow_root(self, root: Root | None, gva: int) -> ShadowPage | None:
        # shadow_walk_init_using_root: the page that the walk begins with
        if root is None:
            return None
        return root.pages[gva >> 30 & 3 if len(root.pages) == 4 else 0]

    def _shadow_walk(self, gva: int, root: Root | None = None) -> Iterator[tuple[ShadowPage, int]]:
        # for_each_shadow_entry: (page, index) from the root down; what the body links is walked into.
        sp = self._shadow_root(root or self.root, gva)
        while sp is not None:
            index = shadow_pt_index(gva, sp.level)
            yield sp, index
            spte = sp.entry(index)
            if not is_shadow_present_pte(spte) or is_last_spte(spte, sp.level):
                return
            sp = sp.children[index]

    def _read_entry(self, gpa: int, size: int) -> int | None:
        # An entry where a slot is; elsewhere none, whatever memory is there.
        return self.memory.entry(gpa, size) if self.slot_at(gpa >> 12) is not None else None

    def _gpte(self, gpa: int) -> int:
        found = self._read_entry(gpa, self._entry)
        assert found is not None
        return found

    def _walk_addr(self, gva: int, access: int) -> _Walk | int:
        # FNAME(walk_addr): what was found, A and D set; or the error code of the #PF.
        while True:
            walk = walk_addr(self.guest, self._read_entry, gva, access)
            if walk.error_code is not None:
                return walk.error_code
            found = _Walk(walk)
            for update in walk.updates:
                slot = self.slot_at(update.gfn)
                assert slot is not None
                if slot.readonly:
                    continue
                if self._gpte(update.gpa) != update.old:
                    break  # it was changed by a former one: the walk begins anew
                self.memory.store(update.gpa, update.new, update.size)
                slot.mark_dirty(update.gfn)
                found.gptes[update.level] = update.new
            else:
                return found

    def _gpte_access(self, gpte: int) -> int:
        return self.guest.gpte_access(gpte)

    def _gpte_gfn(self, gpte: int) -> int:
        return self.guest.gpa_of(gpte, 1, 0) >> 12

    def _inject(self, gva: int, code: int) -> None:
        # kvm_inject_emulated_page_fault: the entry of this address is brought up to date
        if code & PFERR_PRESENT_MASK and not code & PFERR_RSVD_MASK:
            self._invalidate_addr(self.root, gva)

    def _gpte_changed(self, walk: _Walk, level: int) -> bool:
        # FNAME(gpte_changed)
        gpa = walk.pte_gpa[level]
        if level == 1:
            size = PTE_PREFETCH_NUM * self._entry
            raw = self._read(gpa & ~(size - 1), size)
            walk.prefetch_gptes = [
                int.from_bytes(raw[at : at + self._entry], "little") for at in range(0, size, self._entry)
            ]
        return self._gpte(gpa) != walk.gptes[level]

    # ---- faults ----

    def _paging_page_fault(self, fault: _Fault, walk: _Walk) -> int:
        # FNAME(page_fault) behind the walk
        fault.gfn, fault.max_level = walk.gfn, walk.level
        fault.slot = self.slot_at(fault.gfn)
        if self._handle_page_track(fault):
            for sp, _ in self._shadow_walk(fault.addr):
                sp.write_flooding_count = 0
            return RET_PF_WRITE_PROTECTED
        ret = self._faultin_pfn(fault)
        if ret:
            return ret
        may_write = walk.pte_access & ACC_WRITE_MASK or self.cpu_role.base.cr0_wp or fault.user
        if fault.write and not may_write and fault.slot is not None:
            walk.pte_access = (walk.pte_access | ACC_WRITE_MASK) & ~ACC_USER_MASK
            if self.cpu_role.ext.cr4_smep:
                walk.pte_access &= ~ACC_EXEC_MASK
        self._make_available()
        if self._is_stale():
            return RET_PF_RETRY
        return self._fetch(fault, walk)

    def _is_stale(self) -> bool:
        # is_page_fault_stale; notifiers run inside fault_in here, before the page is looked up
        root = self.root
        return (
            root is not None and len(root.pages) == 1 and root.pages[0] is not None and self._is_obsolete(root.pages[0])
        )

    def _handle_page_track(self, fault: _Fault) -> bool:
        # page_fault_handle_page_track
        if fault.rsvd or not fault.present or not fault.write or fault.slot is None:
            return False
        return bool(fault.slot.tracked.get(fault.gfn))

    def _faultin_pfn(self, fault: _Fault) -> int:
        # kvm_mmu_faultin_pfn: 0 is RET_PF_CONTINUE
        slot = fault.slot
        if slot is None:
            if not self.masks.enable_mmio_caching:
                return RET_PF_EMULATE
            fault.pfn, fault.map_writable = _NOSLOT, False
            return 0
        if slot.readonly and fault.write:
            return RET_PF_EMULATE
        page: HostPage | None = self.host.fault_in(fault.gfn, fault.write)
        if page is None:
            raise ArgumentError("ShadowMmu.access", "gva", fault.addr, "memory that the host has", "KVM_RUN: EFAULT")
        fault.pfn, fault.map_writable = page.pfn, page.writable and not slot.readonly
        return 0

    def _mmio_gfn(self, gva: int) -> int | None:
        # handle_mmio_page_fault: what the entry says, if it is as young as the slots
        *_, (sp, index) = self._shadow_walk(gva)
        spte = sp.spt[index]
        young = get_mmio_spte_generation(spte) == self.generation & MMIO_SPTE_GEN_MASK
        return get_mmio_spte_gfn(self.masks, spte) if young else None

    def _mark_mmio_spte(self, sp: ShadowPage, index: int, gfn: int, access: int) -> None:
        spte = make_mmio_spte(self.masks, self.generation, gfn, access)
        sp.spt[index] = spte
        self._event(MmuEvent("mark_mmio_spte", gfn, spte=spte, sptep=sp.pa + 8 * index))

    def _fetch(self, fault: _Fault, walk: _Walk) -> int:
        # FNAME(fetch)
        if self._gpte_changed(walk, max(walk.gptes)):
            return RET_PF_RETRY
        at = self._fetch_tables(fault, walk)
        if at is None:
            return RET_PF_RETRY
        self._hugepage_adjust(fault)
        inside = pages_per_hpage(fault.goal_level) - 1
        self._event(MmuEvent("spte_requested", fault.gfn, pfn=fault.pfn | fault.gfn & inside, level=fault.goal_level))
        sp, index = self._fetch_direct(fault, walk.pte_access, *at)
        base = gfn_round_for_level(fault.gfn, sp.level)
        ret = self._set_spte(sp, index, walk.pte_access, base, fault.pfn, fault.slot, fault)
        if ret != RET_PF_SPURIOUS:
            self._pte_prefetch(walk, sp, index)
        return ret

    def _fetch_tables(self, fault: _Fault, walk: _Walk) -> tuple[ShadowPage, int] | None:
        # The first loop: a shadow page for each of the guest's tables.  None: start over.
        for sp, index in self._shadow_walk(fault.addr):
            sp.write_flooding_count = 0
            if sp.level == walk.level:
                return sp, index
            below = sp.level - 1
            child = self._get_child(sp, index, walk.table_gfn(below), False, walk.pt_access[below])
            if child is not None and child.unsync_children:
                self._sync_children(child)
            if self._gpte_changed(walk, below):
                return None
            if child is not None:
                self._link(sp, index, child)
        return None

    def _fetch_direct(self, fault: _Fault, access: int, sp: ShadowPage, index: int) -> tuple[ShadowPage, int]:
        # The second loop: direct pages down to the level that is mapped.
        while True:
            if self.nx_huge_pages:
                self._disallowed_hugepage_adjust(fault, sp, index)
            if sp.level == fault.goal_level:
                return sp, index
            self._validate_direct_spte(sp, index, access)
            base = gfn_round_for_level(fault.gfn, sp.level)
            child = self._get_child(sp, index, base, True, access)
            if child is not None:
                self._link(sp, index, child)
                if fault.huge_page_disallowed:
                    child.nx_huge_page_disallowed = True
            sp = sp.children[index]
            index = shadow_pt_index(fault.addr, sp.level)

    def _direct_page_fault(self, fault: _Fault) -> int:
        # direct_page_fault: the guest has no paging, addresses are gpas
        fault.max_level = PG_LEVEL_2M
        fault.gfn = fault.addr >> 12
        fault.slot = self.slot_at(fault.gfn)
        if self._handle_page_track(fault):
            return RET_PF_WRITE_PROTECTED
        ret = self._fast_page_fault(fault)
        if ret:
            return ret
        ret = self._faultin_pfn(fault)
        if ret:
            return ret
        self._make_available()
        if self._is_stale():
            return RET_PF_RETRY
        self._hugepage_adjust(fault)
        access = self.root_role.access
        inside = pages_per_hpage(fault.goal_level) - 1
        self._event(MmuEvent("spte_requested", fault.gfn, pfn=fault.pfn | fault.gfn & inside, level=fault.goal_level))
        root = self._shadow_root(self.root, fault.addr)
        assert root is not None
        index = shadow_pt_index(fault.addr, root.level)
        sp, index = self._fetch_direct(fault, access, root, index)
        base = gfn_round_for_level(fault.gfn, sp.level)
        ret = self._set_spte(sp, index, access, base, fault.pfn, fault.slot, fault)
        if ret != RET_PF_SPURIOUS and sp.level == 1:
            self._direct_pte_prefetch(sp, index)
        return ret

    def _fast_page_fault(self, fault: _Fault) -> int:
        # fast_page_fault: a leaf that only dirty logging write-protected becomes writable without more; 0: it can't
        if fault.rsvd or not fault.present or not fault.write:
            return 0
        *_, (sp, index) = self._shadow_walk(fault.addr)
        old = sp.entry(index)
        ret, new = 0, old
        if is_shadow_present_pte(old) and is_last_spte(old, sp.level):
            assert fault.slot is not None
            if is_writable_pte(old):
                ret = RET_PF_SPURIOUS
            elif is_mmu_writable_spte(self.masks, old) and not (sp.level > 1 and fault.slot.log_dirty):
                ret, new = RET_PF_FIXED, old | _W
                sp.spt[index] = new
                fault.slot.mark_dirty(fault.gfn)
        self._event(MmuEvent("fast_page_fault", fault.addr >> 12, spte=new, sptep=sp.pa + 8 * index))
        return ret

    def _hugepage_adjust(self, fault: _Fault) -> None:
        # kvm_mmu_hugepage_adjust
        slot = fault.slot
        fault.huge_page_disallowed = fault.exec and self.nx_huge_pages
        if fault.max_level == 1 or slot is None or slot.log_dirty:
            return
        level = min(fault.max_level, self.max_huge_page_level)
        while level > 1 and not slot.lpage_allowed(fault.gfn, level):
            level -= 1
        if level > 1:
            level = min(level, self.host.mapping_level(fault.gfn))
        if fault.huge_page_disallowed:
            return
        fault.goal_level = level
        fault.pfn &= ~(pages_per_hpage(fault.goal_level) - 1)

    def _disallowed_hugepage_adjust(self, fault: _Fault, sp: ShadowPage, index: int) -> None:
        # disallowed_hugepage_adjust
        spte = sp.entry(index)
        if sp.level == 1 or sp.level != fault.goal_level or not is_shadow_present_pte(spte) or is_large_pte(spte):
            return
        if sp.children[index].nx_huge_page_disallowed:
            fault.pfn |= fault.gfn & (pages_per_hpage(sp.level) - pages_per_hpage(sp.level - 1))
            fault.goal_level -= 1

    # ---- leaves ----

    def _set_spte(
        self,
        sp: ShadowPage,
        index: int,
        access: int,
        gfn: int,
        pfn: int,
        slot: SimSlot | None,
        fault: _Fault | None,
    ) -> int:
        # mmu_set_spte; `fault` None: a prefetch
        if slot is None:
            self._mark_mmio_spte(sp, index, gfn, access)
            return RET_PF_EMULATE
        ret = RET_PF_FIXED
        old = sp.entry(index)
        rmapped = False
        if is_shadow_present_pte(old):
            if not is_last_spte(old, sp.level):
                self._drop_parent(sp.children[index], sp, index)
            elif pfn != spte_to_pfn(old):
                self._drop_spte(sp, index)
            else:
                rmapped = True
        old = sp.entry(index)
        writable = fault is None or fault.map_writable
        spte, wrprot = self._make_spte(sp, slot, access, gfn, pfn, old, fault is None, False, writable)
        if old == spte:
            ret = RET_PF_SPURIOUS
        else:
            sp.spt[index] = spte
            self._event(MmuEvent("set_spte", gfn, level=sp.level, spte=spte, sptep=sp.pa + 8 * index))
        if wrprot and fault is not None and fault.write:
            ret = RET_PF_WRITE_PROTECTED
        if not rmapped:
            slot.rmap.setdefault((sp.level, gfn), {})[sp, index] = None
        if not sp.direct:
            sp.translation[index] = gfn, access
        return ret

    def _make_spte(
        self,
        sp: ShadowPage,
        slot: SimSlot,
        access: int,
        gfn: int,
        pfn: int,
        old: int,
        prefetch: bool,
        synchronizing: bool,
        host_writable: bool,
    ) -> tuple[int, bool]:
        # make_spte, with the search for shadow pages of what becomes writable
        cannot = False
        if access & ACC_WRITE_MASK and host_writable and not (is_writable_pte(old) and is_last_spte(old, sp.level)):
            cannot = not self._try_to_unsync(slot, gfn, synchronizing, prefetch)
        spte, wrprot = make_spte(
            self.masks,
            PageRole(sp.role),
            access,
            gfn,
            pfn,
            old_spte=old,
            prefetch=prefetch,
            synchronizing=synchronizing,
            host_writable=host_writable,
            cannot_unsync=cannot,
            nx_huge_page=self.nx_huge_pages,
        )
        if is_writable_pte(spte):
            slot.mark_dirty(gfn)
        return spte, wrprot

    def _pte_prefetch(self, walk: _Walk, sp: ShadowPage, index: int) -> None:
        # FNAME(pte_prefetch)
        if sp.level > 1:
            return
        if sp.direct:
            self._direct_pte_prefetch(sp, index)
            return
        first = index & ~(PTE_PREFETCH_NUM - 1)
        for i, gpte in enumerate(walk.prefetch_gptes):
            at = first + i
            if at == index or is_shadow_present_pte(sp.entry(at)):
                continue
            if not self._prefetch_gpte(sp, at, gpte):
                break

    def _prefetch_gpte(self, sp: ShadowPage, index: int, gpte: int) -> bool:
        # FNAME(prefetch_gpte)
        if self._prefetch_invalid(sp, index, gpte):
            return False
        return self._prefetch(sp, index, self._gpte_gfn(gpte), 1, self._effective(sp, gpte))

    def _prefetch_invalid(self, sp: ShadowPage, index: int, gpte: int) -> bool:
        # FNAME(prefetch_invalid_gpte)
        if gpte & _P and gpte & _A and not self.guest.rsvd.is_rsvd_bits_set(gpte, 1):
            return False
        self._drop_spte(sp, index)
        return True

    def _effective(self, sp: ShadowPage, gpte: int) -> int:
        # What a last-level entry below this page allows; a clean one no write.
        access = sp.access & self._gpte_access(gpte)
        return access if gpte & _D else access & ~ACC_WRITE_MASK

    def _direct_pte_prefetch(self, sp: ShadowPage, index: int) -> None:
        # __direct_pte_prefetch
        first = index & ~(PTE_PREFETCH_NUM - 1)
        start: int | None = None
        for at in range(first, first + PTE_PREFETCH_NUM):
            if at == index or is_shadow_present_pte(sp.entry(at)):
                if start is None:
                    continue
                if not self._prefetch(sp, start, sp.gfn + start, at - start, sp.access):
                    return
                start = None
            elif start is None:
                start = at
        if start is not None:
            self._prefetch(sp, start, sp.gfn + start, first + PTE_PREFETCH_NUM - start, sp.access)

    def _prefetch(self, sp: ShadowPage, index: int, gfn: int, count: int, access: int) -> bool:
        # kvm_mmu_prefetch_sptes, kvm_prefetch_pages
        slot = self.slot_at(gfn)
        if slot is None or (access & ACC_WRITE_MASK and slot.log_dirty) or slot.readonly:
            return False
        if slot.base_gfn + slot.npages - gfn < count:
            return False
        for done in range(count + 1):
            pfn = self.host.fast(gfn + done) if done < count else None
            if pfn is None:
                break
            self._set_spte(sp, index + done, access, gfn + done, pfn, slot, None)
        return done > 0

    def _zap_collapsible(self, slot: SimSlot, level: int, gfn: int) -> None:
        # kvm_mmu_zap_collapsible_spte
        for sp, index in list(slot.rmap[level, gfn]):
            if not sp.direct:
                continue
            most = self.max_huge_page_level
            while most > 1 and not slot.lpage_allowed(sp.gfn, most):
                most -= 1
            if sp.level < min(most, self.host.mapping_level(sp.gfn)):
                self._drop_spte(sp, index)

    # ---- children ----

    def _get_child(self, sp: ShadowPage, index: int, gfn: int, direct: bool, access: int) -> ShadowPage | None:
        # kvm_mmu_get_child_sp; None: it is linked there already (-EEXIST)
        spte = sp.entry(index)
        if is_shadow_present_pte(spte) and not is_large_pte(spte):
            return None
        return self._get_shadow_page(gfn, child_role(PageRole(sp.role), access, direct, index=index))

    def _validate_direct_spte(self, sp: ShadowPage, index: int, access: int) -> None:
        spte = sp.entry(index)
        if is_shadow_present_pte(spte) and not is_large_pte(spte) and sp.children[index].access != access:
            self._drop_parent(sp.children[index], sp, index)

    # ---- stale pages ----

    def _sync_page(self, sp: ShadowPage) -> None:
        # __kvm_sync_page
        for index in sorted(sp.spt):
            self._sync_spte(sp, index)

    def _sync_spte(self, sp: ShadowPage, index: int) -> bool:
        # FNAME(sync_spte); True: there was something to flush
        if index not in sp.spt:
            return False
        spte = sp.spt[index]
        quadrant = PageRole(sp.role).quadrant if self._entry == 4 else 0
        gpte = self._gpte((sp.gfn << 12) + (quadrant << 9) * self._entry + index * self._entry)
        if self._prefetch_invalid(sp, index, gpte):
            return True
        gfn, access = self._gpte_gfn(gpte), self._effective(sp, gpte)
        if is_mmio_spte(self.masks, spte):
            if gfn != get_mmio_spte_gfn(self.masks, spte):
                del sp.spt[index]
            else:
                self._mark_mmio_spte(sp, index, gfn, access)
            return False
        if gfn != sp.gfn_of(index):
            self._drop_spte(sp, index)
            return True
        if sp.access_of(index) == access:
            return False
        sp.translation[index] = gfn, access
        slot = self.slot_at(gfn)
        assert slot is not None
        writable = bool(spte & self.masks.host_writable_mask)
        sp.spt[index], _ = self._make_spte(sp, slot, access, gfn, spte_to_pfn(spte), spte, True, True, writable)
        return True

    def _invalidate_addr(self, root: Root | None, gva: int) -> None:
        # __kvm_mmu_invalidate_addr
        if root is None:
            return
        for sp, index in self._shadow_walk(gva, root):
            if sp.unsync:
                self._sync_spte(sp, index)
            if not sp.unsync_children:
                break
