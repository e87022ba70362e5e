"""SPTEs: the 8-byte entries of the page tables that KVM builds, made, changed, asked and decoded.

An SPTE is one of five things; bit 11 (MMU present) tells the first two from the rest:

    leaf      bit 11 set; level 1, or bit 7 set: maps a page
    table     bit 11 set, else: points to the table below
    mmio      the bits of mmio_mask read as mmio_value: no memory there, KVM emulates; has the address and a generation
    frozen    a TDP MMU is changing it in several steps
    none      nothing is mapped

A leaf, of shadow paging and NPT (above) and of EPT (below); H is host-writable, M MMU-writable, B MMU-present:

     63 62  59 58   54 53 52 51                12 11 10  9  8   7   6  5   4   3  2  1  0
    |NX| pkey |       | AD  |      address       |B |M |H |G |PAT| D |A |PCD|PWT| U| W| P|
     63 62 61 60 59 58 57 56 55 54 53 52 51    12 11 10  9  8   7   6  5      3  2  1  0
    |VE|  |SPP|SS|  |M |H |X'|  |R'| AD | addr.  |B |UX|D |A |   |IP|memory type| X| W| R|

At levels 2 and 3 bit 7 is the page size, and PAT moves to bit 12.  AD says how accesses are tracked: 0 by A/D bits, 1
without them, 2 by write protection alone.  X' and R' keep X and R of an entry made inaccessible to see the next access.

An MMIO SPTE.  g is the generation of the memslots, 19 bits of it in two pieces; m are the bits of mmio_mask:

     63 62          52 51 50                   12 11 10       3  2 1 0
    |m | g 18:8       |m |      address          |0 | g 7:0    |access m|

Under L1TF the five highest bits that the cache looks at are ones, and the address' bits of that place stand five
higher.

All functions are pure and take the masks (`hvmodel.mmu.masks`).  Source: kernel arch/x86/kvm/mmu/spte.c and spte.h
@v6.18, and the same files of 6.1, 6.9 and 6.12 for what was otherwise before 6.13: make_spte and access tracking, as
`masks.version` says.
"""

from __future__ import annotations

from ..arch.number import number
from ..errors import ArgumentError
from .bits import BitLayout, Decoded, Field, Part
from .masks import kernel_version
from .permission import ACC_ALL, ACC_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from .masks import ShadowMasks

    class _Role(Protocol):
        # What of a page's role (hvmodel.mmu.role.PageRole) an SPTE in that page depends on.
        @property
        def level(self) -> int: ...
        @property
        def access(self) -> int: ...
        @property
        def ad_disabled(self) -> int: ...
        @property
        def guest_mode(self) -> int: ...


__all__ = [
    "MMIO_SPTE_GEN_MASK",
    "SPTE_BASE_ADDR_MASK",
    "SPTE_LAYOUTS",
    "SPTE_MMU_PRESENT_MASK",
    "SPTE_TDP_AD_DISABLED",
    "SPTE_TDP_AD_MASK",
    "SPTE_TDP_AD_WRPROT_ONLY",
    "WRITABLE_STATES",
    "check_mmio_spte",
    "check_spte_writable_invariants",
    "decode_spte",
    "generation_mmio_spte_mask",
    "get_mmio_spte_access",
    "get_mmio_spte_generation",
    "get_mmio_spte_gfn",
    "is_access_allowed",
    "is_access_track_spte",
    "is_accessed_spte",
    "is_dirty_spte",
    "is_ept_ve_possible",
    "is_executable_pte",
    "is_frozen_spte",
    "is_large_pte",
    "is_last_spte",
    "is_mmio_spte",
    "is_mmu_writable_spte",
    "is_shadow_present_pte",
    "is_writable_pte",
    "leaf_spte_change_needs_tlb_flush",
    "make_huge_spte",
    "make_mmio_spte",
    "make_nonleaf_spte",
    "make_small_spte",
    "make_spte",
    "make_spte_executable",
    "make_spte_nonexecutable",
    "mark_spte_for_access_track",
    "mmio_layout",
    "restore_acc_track_spte",
    "spte_ad_enabled",
    "spte_ad_need_write_protect",
    "spte_has_volatile_bits",
    "spte_kind",
    "spte_needs_atomic_update",
    "spte_to_pfn",
    "vmx_get_mt_mask",
]

SPTE_MMU_PRESENT_MASK = 1 << 11
"""Set in every SPTE that maps memory, whatever the hardware makes of its other bits."""

SPTE_TDP_AD_MASK = 3 << 52
SPTE_TDP_AD_DISABLED = 1 << 52
SPTE_TDP_AD_WRPROT_ONLY = 2 << 52

SPTE_BASE_ADDR_MASK = (1 << 52) - (1 << 12)
"""Bits 51:12, the address.  With SME the kernel's mask lacks the bit of encryption (physical_mask)."""

MMIO_SPTE_GEN_MASK = (1 << 19) - 1
"""How much of the memslots' generation an MMIO SPTE has."""

WRITABLE_STATES = {
    (1, 1, 1): "writable",
    (1, 1, 0): "write-protected to see writes (dirty log) or accesses; KVM may make it writable without mmu_lock",
    (1, 0, 0): "write-protected because the page holds a guest's page table",
    (0, 0, 0): "the host lets nobody write: a read-only slot or mapping",
}
"""(host-writable, MMU-writable, writable) of a leaf -> what it says.  No other three are legal."""

_P, _W, _PSE = 1 << 0, 1 << 1, 1 << 7
_GENERATION_UPDATE = 1 << 63  # KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS
_SAVED, _SAVED_SHIFT = 1 << 0 | 1 << 2, 54  # SHADOW_ACC_TRACK_SAVED_BITS_MASK, _SHIFT
_GEN_LOW_BITS, _GEN_LOW, _GEN_HIGH = 8, 3, 52
_L1TF_LEN = 5
_SUPPRESS_VE = 1 << 63
_LAST_GFN = (1 << 40) - 1
_NEW_ACCESSED = (6, 13)  # from here accessed and dirty are set without A/D bits too
_RULES: dict[str, bool] = {}  # version -> whether it is from there on: asked for every SPTE

_NAMES = {1: "4K", 2: "2M", 3: "1G"}  # of a page at each level
_KINDS = {"shadow": "shadow", "npt": "NPT", "ept": "EPT"}


def _new_rules(masks: ShadowMasks) -> bool:
    known = _RULES.get(masks.version)
    if known is None:
        known = _RULES[masks.version] = kernel_version(masks.version) >= _NEW_ACCESSED
    return known


# -- questions ----------------------------------------------------------------------------------------------------


def is_shadow_present_pte(spte: int) -> bool:
    """Whether the SPTE maps memory: a page or a table (bit 11)."""
    return bool(spte & SPTE_MMU_PRESENT_MASK)


def is_large_pte(spte: int) -> bool:
    """Whether bit 7 is set: at levels 2 and 3, the SPTE maps a large page."""
    return bool(spte & _PSE)


def is_last_spte(spte: int, level: int) -> bool:
    """Whether the SPTE, if present, maps a page and not a table."""
    return level == 1 or is_large_pte(spte)


def is_writable_pte(spte: int) -> bool:
    """Whether bit 1 is set: the hardware lets writes through."""
    return bool(spte & _W)


def is_executable_pte(masks: ShadowMasks, spte: int) -> bool:
    """Whether x is set and nx is not."""
    return spte & (masks.x_mask | masks.nx_mask) == masks.x_mask


def is_mmu_writable_spte(masks: ShadowMasks, spte: int) -> bool:
    """Whether KVM itself has nothing against writes to the page."""
    return bool(spte & masks.mmu_writable_mask)


def is_frozen_spte(masks: ShadowMasks, spte: int) -> bool:
    """Whether the TDP MMU is just changing this SPTE (is_removed_spte before 6.11)."""
    return spte == masks.frozen_spte


def is_mmio_spte(masks: ShadowMasks, spte: int) -> bool:
    """Whether the SPTE says "no memory here, emulate".  Never where MMIO caching is off."""
    return spte & masks.mmio_mask == masks.mmio_value and masks.enable_mmio_caching


def spte_ad_enabled(spte: int) -> bool:
    """Whether A/D bits track this SPTE (bits 53:52 are not 1).  It has to be present."""
    return spte & SPTE_TDP_AD_MASK != SPTE_TDP_AD_DISABLED


def spte_ad_need_write_protect(spte: int) -> bool:
    """Whether writes are seen by write protection, not by the D bit (bits 53:52 are not 0).  It has to be present."""
    return spte & SPTE_TDP_AD_MASK != 0


def is_access_track_spte(masks: ShadowMasks, spte: int) -> bool:
    """Whether the SPTE was made inaccessible to see the next access.  It has to be present."""
    return not spte_ad_enabled(spte) and spte & masks.acc_track_mask == 0


def is_accessed_spte(masks: ShadowMasks, spte: int) -> bool:
    """Whether the page counts as accessed.  Before 6.13, without A/D bits: whether it is not access-tracked."""
    if _new_rules(masks):
        return bool(spte & masks.accessed_mask)
    mask = masks.accessed_mask if spte_ad_enabled(spte) else 0
    return bool(spte & mask) if mask else not is_access_track_spte(masks, spte)


def is_dirty_spte(masks: ShadowMasks, spte: int) -> bool:
    """Whether the page counts as written: D, or without A/D bits whether it is writable.  To 6.12, gone with 6.13."""
    mask = masks.dirty_mask if spte_ad_enabled(spte) else 0
    return bool(spte & mask) if mask else is_writable_pte(spte)


def is_access_allowed(masks: ShadowMasks, spte: int, *, write: bool = False, execute: bool = False) -> bool:
    """Whether this present leaf lets such an access through, so that a fault for it was spurious.

    `execute` goes first, as in the kernel; else `write`; else bit 0, P or R.
    """
    if execute:
        return is_executable_pte(masks, spte)
    return is_writable_pte(spte) if write else bool(spte & _P)


def is_ept_ve_possible(masks: ShadowMasks, spte: int) -> bool:
    """Whether the SPTE could give the guest a #VE, which none of KVM's should: suppress #VE is clear."""
    return bool(masks.present_mask & _SUPPRESS_VE) and not spte & _SUPPRESS_VE and spte & 7 != 6


def spte_needs_atomic_update(masks: ShadowMasks, spte: int) -> bool:
    """Whether a bit of this present leaf may change under KVM's hands, so that it must be exchanged atomically.

    That is: it can be made writable without mmu_lock, or has no A/D bits, or the processor may still set D.  To 6.14
    the kernel has `spte_has_volatile_bits` instead.
    """
    if not is_writable_pte(spte):
        return is_mmu_writable_spte(masks, spte) or not spte_ad_enabled(spte)
    return not spte_ad_enabled(spte) or not spte & masks.dirty_mask


def spte_has_volatile_bits(masks: ShadowMasks, spte: int) -> bool:
    """The same question as kernels to 6.14 ask it: A counts too, and without A/D bits only access tracking."""
    if not is_writable_pte(spte) and is_mmu_writable_spte(masks, spte):
        return True
    if not spte_ad_enabled(spte):
        return is_access_track_spte(masks, spte)
    return not spte & masks.accessed_mask or (is_writable_pte(spte) and not spte & masks.dirty_mask)


def leaf_spte_change_needs_tlb_flush(masks: ShadowMasks, old_spte: int, new_spte: int) -> bool:
    """Whether other processors must be flushed: MMU-writable goes away.  From 6.13."""
    return is_mmu_writable_spte(masks, old_spte) and not is_mmu_writable_spte(masks, new_spte)


def spte_to_pfn(spte: int, masks: ShadowMasks | None = None) -> int:
    """The frame, of 4 KiB, that bits 51:12 name; with `masks` that have SME's bit, but for it, as in the kernel."""
    if masks is not None:
        spte &= ~masks.me_value
    return (spte & SPTE_BASE_ADDR_MASK) >> 12


def spte_kind(masks: ShadowMasks, spte: int, level: int) -> str:
    """ "leaf", "table", "mmio", "frozen", "none", or "unknown": without bit 11, and none of the others.

    ArgumentError: an SPTE of more than 64 bits, a level not 1 to 5.
    """
    return _kind("spte_kind", masks, spte, level)


def _kind(call: str, masks: ShadowMasks, spte: int, level: int) -> str:
    spte, level = number(call, "spte", spte), number(call, "level", level, 5, 1)
    if is_shadow_present_pte(spte):
        return "leaf" if level == 1 or (level <= 3 and is_large_pte(spte)) else "table"
    if is_frozen_spte(masks, spte):
        return "frozen"
    if is_mmio_spte(masks, spte):
        return "mmio"
    return "none" if spte in (0, masks.nonpresent_value) else "unknown"


def check_spte_writable_invariants(masks: ShadowMasks, spte: int) -> tuple[str, ...]:
    """What is wrong with the (host-writable, MMU-writable, writable) of a present leaf: at most one sentence.

    The kernel warns of the same.  `WRITABLE_STATES` has the four that are legal.
    """
    host, mmu = bool(spte & masks.host_writable_mask), is_mmu_writable_spte(masks, spte)
    if mmu and not host:
        return ("MMU-writable and not host-writable: KVM never lets through what the host does not",)
    if not mmu and is_writable_pte(spte):
        return ("writable and not MMU-writable: nothing would stop writes that KVM has to see",)
    return ()


# -- constructors -------------------------------------------------------------------------------------------------


def vmx_get_mt_mask(is_mmio: bool, *, ignore_guest_pat: bool = True) -> int:
    """The memory type and IPAT that kvm_intel puts into a leaf of EPT (from 6.11).

    Host MMIO is uncacheable (0 in bits 5:3); memory is write-back (6), with IPAT (bit 6) where the guest's PAT is to be
    ignored.  It is, but in a VM with a device that bypasses the caches (non-coherent DMA), and, in 6.18, in one whose
    VMM has disabled KVM_X86_QUIRK_IGNORE_GUEST_PAT.  To 6.10 a VM with such a device has types by the guest's MTRRs.
    Source: vmx/vmx.c vmx_get_mt_mask, vmx_ignore_guest_pat @v6.18.
    """
    if is_mmio:
        return 0
    return 6 << 3 | (1 << 6 if ignore_guest_pat else 0)


def make_spte(
    masks: ShadowMasks,
    role: _Role,
    pte_access: int,
    gfn: int,
    pfn: int,
    *,
    old_spte: int = 0,
    prefetch: bool = False,
    synchronizing: bool = False,
    host_writable: bool = True,
    cannot_unsync: bool = False,
    nx_huge_page: bool = False,
    host_mmio: bool = False,
    mt_mask: int | None = None,
    cpu_dirty_log: bool = False,
) -> tuple[int, bool]:
    """A leaf, and whether it was write-protected because of a guest's page table (wrprot).

    `role` is that of the page the SPTE goes into: its level, ad_disabled and guest_mode count.  `pte_access` is what
    the guest's tables allow (ACC_*), `gfn` the guest's frame, `pfn` the host's; of a large page, its first ones.

    `old_spte`: what stands there now.  `prefetch`: nobody accessed the page yet.  `synchronizing`: the entry is brought
    up to date with a guest's table.  `host_writable`: neither the slot nor the host's mapping is read-only.
    `cannot_unsync`: the page holds a guest's page table that must stay in step (mmu_try_to_unsync_pages fails).
    `nx_huge_page`: the mitigation that keeps large pages from being executable is on.  `host_mmio`: the frame is a
    device's.  `mt_mask`: what the vendor's get_mt_mask gave, by default `vmx_get_mt_mask(host_mmio)` where the masks
    have one.  `cpu_dirty_log`: the processor logs dirty pages (PML), which it cannot do for a nested guest's addresses.

    A slot under dirty logging has the page marked in its log where the result is writable; that changes no bit.

    Before 6.13 any writable old SPTE, also one of a table, saves the page from `cannot_unsync`; updates of those
    kernels (6.11.11 has it) brought the rule of 6.13, a writable leaf, which is not modelled for them.

    ArgumentError: a number out of range; a `gfn` or `pfn` not aligned to the level.

    >>> from hvmodel.mmu import PageRole, reset_all_pte_masks
    >>> masks, role = reset_all_pte_masks(46), PageRole.of(level=1, access=7)
    >>> spte, wrprot = make_spte(masks, role, ACC_ALL, gfn=0x10, pfn=0x12345)
    >>> hex(spte), wrprot
    ('0x12345e67', False)
    """
    call = "make_spte"
    level = number(call, "role.level", role.level, 3, 1)
    pte_access = number(call, "pte_access", pte_access, ACC_ALL)
    gfn, pfn = number(call, "gfn", gfn, _LAST_GFN), number(call, "pfn", pfn, _LAST_GFN)
    old_spte = number(call, "old_spte", old_spte)
    inside = (1 << 9 * (level - 1)) - 1
    for name, frame in (("gfn", gfn), ("pfn", pfn)):
        if frame & inside:
            raise ArgumentError(
                call, name, frame, f"a multiple of {inside + 1:#x}", f"the page is one of {_NAMES[level]}"
            )
    if mt_mask is None:
        mt_mask = vmx_get_mt_mask(host_mmio) if masks.has_mt_mask else 0
    mt_mask = number(call, "mt_mask", mt_mask, 0xFF)
    new_rules = _new_rules(masks)

    spte = SPTE_MMU_PRESENT_MASK
    if role.ad_disabled:
        spte |= SPTE_TDP_AD_DISABLED
    elif cpu_dirty_log and role.guest_mode:
        spte |= SPTE_TDP_AD_WRPROT_ONLY
    tracked = new_rules or spte_ad_enabled(spte)
    quiet = prefetch and not (synchronizing and new_rules)  # nobody is known to access the page

    spte |= masks.present_mask
    if not quiet and tracked:
        spte |= masks.accessed_mask
    if level > 1 and nx_huge_page:
        pte_access &= ~ACC_EXEC_MASK
    spte |= masks.x_mask if pte_access & ACC_EXEC_MASK else masks.nx_mask
    if pte_access & ACC_USER_MASK:
        spte |= masks.user_mask
    if level > 1:
        spte |= _PSE
    spte |= mt_mask
    if host_writable:
        spte |= masks.host_writable_mask
    else:
        pte_access &= ~ACC_WRITE_MASK
    if not host_mmio:
        spte |= masks.me_value
    spte |= pfn << 12

    wrprot = False
    if pte_access & ACC_WRITE_MASK:
        # An old writable leaf of the same page: what had to be unsynced was, when it was made.
        was_writable = is_writable_pte(old_spte) and (not new_rules or is_last_spte(old_spte, level))
        if cannot_unsync and not was_writable:
            wrprot = True
        else:
            spte |= _W | masks.mmu_writable_mask
            if new_rules or not was_writable:
                spte |= masks.dirty_mask if tracked else 0
    if quiet:
        spte = mark_spte_for_access_track(masks, spte)
    return spte, wrprot


def make_nonleaf_spte(masks: ShadowMasks, child_pa: int, ad_disabled: bool = False) -> int:
    """An SPTE that points to the table at host address `child_pa`; all accesses pass, the leaf decides.

    ArgumentError: an address that is not of a page, or has more than 52 bits.
    """
    call = "make_nonleaf_spte"
    child_pa = number(call, "child_pa", child_pa, SPTE_BASE_ADDR_MASK)
    if child_pa & 0xFFF:
        raise ArgumentError(call, "child_pa", child_pa, "a multiple of 0x1000", "a table is a page")
    spte = SPTE_MMU_PRESENT_MASK | child_pa | masks.present_mask | _W | masks.user_mask | masks.x_mask | masks.me_value
    return spte | (SPTE_TDP_AD_DISABLED if ad_disabled else masks.accessed_mask)


def generation_mmio_spte_mask(generation: int) -> int:
    """Where an MMIO SPTE has these 19 bits of a generation: 7:0 in bits 10:3, 18:8 in bits 62:52.

    ArgumentError: a generation of more than 19 bits (the kernel warns).

    >>> hex(generation_mmio_spte_mask(0x40102))
    '0x4010000000000010'
    """
    generation = number("generation_mmio_spte_mask", "generation", generation, MMIO_SPTE_GEN_MASK)
    low = generation & (1 << _GEN_LOW_BITS) - 1
    return low << _GEN_LOW | generation >> _GEN_LOW_BITS << _GEN_HIGH


def get_mmio_spte_generation(spte: int) -> int:
    """The 19 bits of the generation that an MMIO SPTE was made in.

    >>> hex(get_mmio_spte_generation(0x4010000000000010))
    '0x40102'
    """
    low = spte >> _GEN_LOW & (1 << _GEN_LOW_BITS) - 1
    return low | (spte >> _GEN_HIGH & 0x7FF) << _GEN_LOW_BITS


def make_mmio_spte(masks: ShadowMasks, generation: int, gfn: int, access: int) -> int:
    """The SPTE of a guest frame without memory: KVM will emulate accesses without looking the slot up again.

    `generation` is the memslots' (struct kvm_memslots), of which 19 bits are kept; bit 63, an update in progress, is
    none of them.  `access` (ACC_*) is kept where the masks have room: not with EPT.  `gfn` comes back from
    `get_mmio_spte_gfn` only below `masks.x86_phys_bits`.

    ArgumentError: a number out of range; MMIO caching is off, so that KVM makes no such SPTE.
    """
    call = "make_mmio_spte"
    if not masks.enable_mmio_caching:
        raise ArgumentError(
            call, "masks.enable_mmio_caching", False, "True", "MMIO caching is off: KVM makes no such SPTE"
        )
    generation, gfn = number(call, "generation", generation), number(call, "gfn", gfn, _LAST_GFN)
    access = number(call, "access", access, ACC_ALL) & masks.mmio_access_mask
    gpa = gfn << 12
    rsvd = masks.nonpresent_or_rsvd_mask
    spte = generation_mmio_spte_mask(generation & MMIO_SPTE_GEN_MASK) | masks.mmio_value | access
    return spte | gpa | rsvd | (gpa & rsvd) << _L1TF_LEN


def check_mmio_spte(spte: int, generation: int) -> bool:
    """Whether an MMIO SPTE still holds: it is of this generation of the memslots, and they are not just being changed.

    `generation` is the memslots' of 64 bits, with bit 63 for "being changed"; 19 bits count.  ArgumentError: more bits.

    >>> check_mmio_spte(generation_mmio_spte_mask(5), 5), check_mmio_spte(generation_mmio_spte_mask(5), 1 << 63 | 5)
    (True, False)
    """
    generation = number("check_mmio_spte", "generation", generation)
    if generation & _GENERATION_UPDATE:
        return False
    return get_mmio_spte_generation(spte) == generation & MMIO_SPTE_GEN_MASK


def get_mmio_spte_gfn(masks: ShadowMasks, spte: int) -> int:
    """The guest's frame of an MMIO SPTE."""
    gpa = spte & masks.nonpresent_or_rsvd_lower_gfn_mask
    return (gpa | spte >> _L1TF_LEN & masks.nonpresent_or_rsvd_mask) >> 12


def get_mmio_spte_access(masks: ShadowMasks, spte: int) -> int:
    """The access (ACC_*) of an MMIO SPTE; always 0 with EPT."""
    return spte & masks.mmio_access_mask


# -- changes ------------------------------------------------------------------------------------------------------


def mark_spte_for_access_track(masks: ShadowMasks, spte: int) -> int:
    """The SPTE after "not accessed": A clear, or without A/D bits R and X kept aside and the page inaccessible.

    The SPTE has to be present.  Before 6.13 A stays as it is in the second case.
    """
    if spte_ad_enabled(spte):
        return spte & ~masks.accessed_mask
    if is_access_track_spte(masks, spte):
        return spte
    spte |= (spte & _SAVED) << _SAVED_SHIFT
    return spte & ~(masks.acc_track_mask | (masks.accessed_mask if _new_rules(masks) else 0))


def restore_acc_track_spte(masks: ShadowMasks, spte: int) -> int:
    """An access-tracked SPTE made accessible again, by the R and X kept aside.  W does not come back by itself."""
    saved = spte >> _SAVED_SHIFT & _SAVED
    return spte & ~masks.acc_track_mask & ~(_SAVED << _SAVED_SHIFT) | saved


def _modify_protections(masks: ShadowMasks, spte: int, set_bits: int, clear: int) -> int:
    # The SPTE with bits set and cleared, also where it is access-tracked.
    tracked = is_access_track_spte(masks, spte)
    if tracked:
        spte = restore_acc_track_spte(masks, spte)
    spte = (spte | set_bits) & ~clear
    return mark_spte_for_access_track(masks, spte) if tracked else spte


def make_spte_executable(masks: ShadowMasks, spte: int) -> int:
    """The present leaf with execution let through; one that is access-tracked stays so, and keeps it."""
    return _modify_protections(masks, spte, masks.x_mask, masks.nx_mask)


def make_spte_nonexecutable(masks: ShadowMasks, spte: int) -> int:
    """The present leaf without execution; one that is access-tracked stays so."""
    return _modify_protections(masks, spte, masks.nx_mask, masks.x_mask)


def make_small_spte(masks: ShadowMasks, huge_spte: int, role: _Role, index: int, *, nx_huge_page: bool = False) -> int:
    """One of the 512 SPTEs a large page is split into (to 6.12: make_huge_page_split_spte).

    `role` is that of the new page below, of level 1 or 2; `index` is the entry in it, 0 to 511.  With the mitigation of
    large pages on (`nx_huge_page`), a page of 4 KiB whose role has ACC_EXEC_MASK becomes executable.

    ArgumentError: an SPTE that is not a present large leaf, a number out of range.
    """
    call = "make_small_spte"
    huge_spte = number(call, "huge_spte", huge_spte)
    level = number(call, "role.level", role.level, 2, 1)
    index = number(call, "index", index, 511)
    if not (is_shadow_present_pte(huge_spte) and is_large_pte(huge_spte)):
        raise ArgumentError(call, "huge_spte", huge_spte, "bits 11 and 7 set", "only a large page can be split")
    spte = huge_spte | index << 9 * (level - 1) + 12
    if level == 1:
        spte &= ~_PSE
        if role.access & ACC_EXEC_MASK and nx_huge_page:
            spte = make_spte_executable(masks, spte)
    return spte


def make_huge_spte(masks: ShadowMasks, small_spte: int, level: int, *, nx_huge_page: bool = False) -> int:
    """The SPTE of the large page at `level` (2 or 3) that the page of `small_spte` lies in.  From 6.13.

    With the mitigation of large pages on (`nx_huge_page`) it is not executable.

    ArgumentError: an SPTE that is not present, a level that is neither.
    """
    call = "make_huge_spte"
    small_spte, level = number(call, "small_spte", small_spte), number(call, "level", level, 3, 2)
    if not is_shadow_present_pte(small_spte):
        raise ArgumentError(call, "small_spte", small_spte, "bit 11 set", "only a present page can become a large one")
    inside = (1 << 9 * (level - 1) + 12) - (1 << 12)
    spte = (small_spte | _PSE) & ~inside
    return make_spte_nonexecutable(masks, spte) if nx_huge_page else spte


# -- decoding -----------------------------------------------------------------------------------------------------

_AD = Field("tdp_ad", 52, 2, values={0: "A/D bits", 1: "no A/D bits", 2: "write protection only"})
_IGNORED = "the processor does not look at it"
_PRESENT = Field("mmu_present", 11, text="maps memory (KVM's own bit)", clear="not present for KVM")


def _address(low: int, what: str) -> Field:
    return Field("address", low, 52 - low, what, scale=low)


def _legacy_layout(level: int, leaf: bool) -> BitLayout:
    # An entry of shadow paging or NPT: what a page table of long mode has (SDM 3A 4.5, APM 2 5.3.3).
    low = [
        Field("present", 0, text="present", clear="every access faults"),
        Field("writable", 1, text="writes pass", clear="writes fault"),
        Field("user", 2, text="user accesses pass", clear="supervisor only"),
        Field("pwt", 3, text="index bit 0 of the PAT"),
        Field("pcd", 4, text="index bit 1 of the PAT"),
        Field("accessed", 5, text="accessed"),
    ]
    nx = Field("nx", 63, text="not executable", clear="executable")
    if not leaf:
        last = (Field("page_size", 7, text="a page, not a table"),) if level < 4 else ()
        return BitLayout(
            f"SPTE of level {level}, table",
            64,
            (
                *low,
                Field("ignored_6", 6, text=_IGNORED),
                *last,
                Field("ignored_8", 8, text=_IGNORED),
                Field("ignored_9", 9, text=_IGNORED),
                Field("ignored_10", 10, text=_IGNORED),
                _PRESENT,
                _address(12, "host address of the table below"),
                _AD,
                Field("ignored_54", 54, 9, _IGNORED),
                nx,
            ),
        )
    sized: tuple[Field, ...]
    if level == 1:
        sized = (Field("pat", 7, text="index bit 2 of the PAT"), _address(12, "host address of the page"))
    else:
        sized = (
            Field("page_size", 7, text="a page, not a table"),
            Field("pat", 12, text="index bit 2 of the PAT"),
            _address(12 + 9 * (level - 1), "host address of the page"),
        )
    return BitLayout(
        f"SPTE of level {level}, page of {_NAMES[level]}",
        64,
        (
            *low,
            Field("dirty", 6, text="dirty"),
            sized[0],
            Field("global", 8, text="global"),
            Field("host_writable", 9, text="the host lets write", clear="the host lets nobody write"),
            Field("mmu_writable", 10, text="KVM has nothing against writes", clear="KVM has to see writes"),
            _PRESENT,
            *sized[1:],
            _AD,
            Field("ignored_54", 54, 5, _IGNORED),
            Field("pkey", 59, 4, "protection key"),
            nx,
        ),
    )


def _ept_layout(level: int, leaf: bool) -> BitLayout:
    # An entry of EPT (SDM 3C 29.3.2, tables 29-1 to 29-7).
    low = (
        Field("readable", 0, text="reads pass", clear="reads fault"),
        Field("writable", 1, text="writes pass", clear="writes fault"),
        Field("executable", 2, text="executable", clear="not executable"),
    )
    accessed = Field("accessed", 8, text="accessed")
    user_x = Field("user_executable", 10, text="user code executable (mode-based execute control)")
    kept = (Field("saved_readable", 54), Field("ignored_55", 55, text=_IGNORED), Field("saved_executable", 56))
    if not leaf:
        last = (Field("page_size", 7, text="a page, not a table"),) if level < 4 else ()
        return BitLayout(
            f"EPT SPTE of level {level}, table",
            64,
            (
                *low,
                *last,
                accessed,
                Field("ignored_9", 9, text=_IGNORED),
                user_x,
                _PRESENT,
                _address(12, "host address of the table below"),
                _AD,
                Field("ignored_54", 54, 9, _IGNORED),
                Field("suppress_ve", 63, text="no #VE (ignored in an entry that points to a table)"),
            ),
        )
    types = {0: "uncacheable", 1: "write-combining", 4: "write-through", 5: "write-protected", 6: "write-back"}
    return BitLayout(
        f"EPT SPTE of level {level}, page of {_NAMES[level]}",
        64,
        (
            *low,
            Field("memory_type", 3, 3, values=types),
            Field("ignore_pat", 6, text="the guest's PAT does not count", clear="combined with the guest's PAT"),
            Field("page_size", 7, text="a page, not a table") if level > 1 else Field("ignored_7", 7, text=_IGNORED),
            accessed,
            Field("dirty", 9, text="dirty"),
            user_x,
            _PRESENT,
            _address(12 + 9 * (level - 1), "host address of the page"),
            _AD,
            *(Field(f.name, f.low, text="kept of an access-tracked page") for f in kept if f.low != 55),
            kept[1],
            Field("host_writable", 57, text="the host lets write", clear="the host lets nobody write"),
            Field("mmu_writable", 58, text="KVM has nothing against writes", clear="KVM has to see writes"),
            Field("ignored_59", 59, text=_IGNORED),
            Field("supervisor_shadow_stack", 60, text="supervisor shadow stack (with bit 7 of the EPTP)"),
            Field("sub_page_writes", 61, text="sub-page write permissions"),
            Field("ignored_62", 62, text=_IGNORED),
            Field("suppress_ve", 63, text="no #VE, an EPT violation instead", clear="#VE possible"),
        ),
    )


SPTE_LAYOUTS = {
    (flavour, kind, level): make(level, kind == "leaf")
    for flavour, make in (("legacy", _legacy_layout), ("ept", _ept_layout))
    for kind, levels in (("leaf", (1, 2, 3)), ("table", (2, 3, 4, 5)))
    for level in levels
}
"""("legacy" or "ept", "leaf" or "table", level) -> the bits.  "legacy" are shadow paging and NPT."""


_ACCESS = {ACC_EXEC_MASK: "execute", ACC_WRITE_MASK: "write", ACC_USER_MASK: "user"}


def mmio_layout(masks: ShadowMasks) -> BitLayout:
    """The bits of an MMIO SPTE under these masks: what is value, access, generation and address depends on them."""
    value_bits = masks.mmio_mask & ~masks.mmio_access_mask
    rsvd, lower = masks.nonpresent_or_rsvd_mask, masks.nonpresent_or_rsvd_lower_gfn_mask
    access = masks.mmio_access_mask
    fields = [
        Field("generation_low", _GEN_LOW, _GEN_LOW_BITS, "bits 7:0 of the memslots' generation"),
        Field("generation_high", _GEN_HIGH, 11, "bits 18:8 of the memslots' generation"),
        *_runs("mmio", value_bits, "marks an SPTE of emulated MMIO"),
        *[Field(f"access_{_ACCESS.get(1 << at, at)}", at) for at in range(access.bit_length()) if access >> at & 1],
        *_runs("gfn", lower & ~value_bits, "the guest's address"),
        *_runs("l1tf", rsvd & ~value_bits, "ones: no cache line has such an address"),
        *_runs("gfn_high", rsvd << _L1TF_LEN & ~value_bits, "the guest's address bits that L1TF's ones displace"),
    ]
    return BitLayout("MMIO SPTE", 64, tuple(sorted(fields, key=lambda field: field.low)))


def _runs(name: str, mask: int, text: str) -> list[Field]:
    # A field for each run of ones in a mask; where there are several, each has its lowest bit in its name.
    found = []
    while mask:
        lowest = mask & -mask
        low = lowest.bit_length() - 1
        rest = mask & mask + lowest  # the carry clears the run
        found.append((low, (mask ^ rest).bit_length() - low))
        mask = rest
    return [
        Field(
            name if len(found) == 1 else f"{name}_{low}",
            low,
            width,
            text,
            scale=12 if name == "gfn" and low == 12 else 0,
        )
        for low, width in found
    ]


def decode_spte(spte: int, masks: ShadowMasks, level: int = 1) -> Decoded:
    """The SPTE by its bits, with what in it KVM would not have made.

    `level` is that of the table it stands in, 1 to 5.  The title says what it is: a page, a table, MMIO, frozen, not
    present.  str() of the result is text, `.table()` a table, a notebook shows HTML.

    ArgumentError: more than 64 bits, a level not 1 to 5.

    >>> from hvmodel.mmu import reset_all_pte_masks
    >>> masks = reset_all_pte_masks(46)
    >>> decode_spte(0x12345e67, masks).set()
    ('address', 'mmu_present', 'mmu_writable', 'host_writable', 'dirty', 'accessed', 'user', 'writable', 'present')
    >>> decode_spte(0x12345e67 & ~1 << 9, masks).problems
    ('MMU-writable and not host-writable: KVM never lets through what the host does not',)
    """
    kind, flavour = _kind("decode_spte", masks, spte, level), "ept" if masks.kind == "ept" else "legacy"
    name = _KINDS[masks.kind]
    if kind == "mmio":
        return _titled(
            mmio_layout(masks).decode(spte, _mmio_problems(masks, spte)), f"{name} MMIO SPTE of level {level}"
        )
    if kind in ("none", "frozen"):
        return _decode_absent(spte, f"{name} SPTE of level {level}, {_ABSENT[kind]}")
    if kind == "unknown":
        leaf = level == 1 or (level <= 3 and is_large_pte(spte))
        problems: tuple[str, ...] = (
            "bit 11 is clear and this is neither MMIO nor frozen nor empty: not KVM's, or a root of a PAE guest",
        )
    else:
        leaf = kind == "leaf"
        problems = _leaf_problems(masks, spte) if leaf else ()
    problems += _address_problems(masks, spte)
    if flavour == "ept":
        problems += _ept_problems(masks, spte)
    layout = SPTE_LAYOUTS[flavour, "leaf" if leaf else "table", level]
    found = layout.decode(spte, problems)
    title = layout.title.removeprefix("EPT ")
    return _titled(_with_me(found, masks), f"{name} {title}")


_ABSENT = {"none": "not present", "frozen": "frozen: being changed"}


def _titled(found: Decoded, title: str) -> Decoded:
    return Decoded(title, found.width, found.value, found.parts, found.problems)


def _decode_absent(spte: int, title: str) -> Decoded:
    # 0, SHADOW_NONPRESENT_VALUE or FROZEN_SPTE: no field but suppress #VE means anything.
    ve = Field("suppress_ve", 63, text="no #VE where the hardware would raise one")
    return BitLayout(title, 64, (Field("ignored_0", 0, 63, _IGNORED), ve)).decode(spte)


def _with_me(found: Decoded, masks: ShadowMasks) -> Decoded:
    # The bits of the address that are memory encryption's, as parts of their own.
    me = masks.me_mask & SPTE_BASE_ADDR_MASK
    if not me:
        return found
    parts: list[Part] = []
    for part in found.parts:
        if part.name != "address":
            parts.append(part)
            continue
        plain = found.value & ((1 << 52) - (1 << part.low)) & ~me
        meaning = f"{plain:#x} {part.meaning.partition(' ')[2]}"
        parts.append(Part("address", part.high, part.low, plain >> part.low, meaning, part.scale))
        runs = _runs("encryption", me, "the page is encrypted" if masks.me_value else "key of the page")
        parts += [Part(f.name, f.high, f.low, f.of(found.value), f.meaning(f.of(found.value)), f.scale) for f in runs]
    return Decoded(found.title, found.width, found.value, tuple(parts), found.problems)


def _leaf_problems(masks: ShadowMasks, spte: int) -> tuple[str, ...]:
    found = check_spte_writable_invariants(masks, spte)
    if masks.kind == "npt" and not spte & masks.user_mask:
        found += ("user is clear: NPT takes every access of a guest for one of a user, so that all fault",)
    return found


def _address_problems(masks: ShadowMasks, spte: int) -> tuple[str, ...]:
    over = (spte & SPTE_BASE_ADDR_MASK & ~masks.me_mask) >> masks.maxphyaddr << masks.maxphyaddr
    if not over:
        return ()
    return (f"address bits {over:#x} are set, and the processor has {masks.maxphyaddr}: they are reserved",)


def _mmio_problems(masks: ShadowMasks, spte: int) -> tuple[str, ...]:
    rsvd = masks.nonpresent_or_rsvd_mask
    if spte & rsvd != rsvd:
        return (f"bits {rsvd & ~spte:#x} are clear: L1TF needs ones there",)
    return ()


def _ept_problems(masks: ShadowMasks, spte: int) -> tuple[str, ...]:
    # What makes the access an EPT misconfiguration (SDM 3C 29.3.3.1) by bits 2:0.
    rwx = spte & 7
    if rwx in (2, 6):
        return ("writable and not readable: an EPT misconfiguration",)
    if rwx == 4 and masks.present_mask & 1:
        return ("executable and not readable: an EPT misconfiguration on this processor",)
    return ()
