"""SPTEs: made bit by bit as the manuals' tables and the kernel's own SPTEs have them, changed, asked, decoded.

LIVE are the low bits of SPTEs that a running 6.18 kernel built (trace event kvm_mmu_set_spte); `hvmodel verify masks`
compares more of them.  EPT and NPT, which the reference host has not, are held against the SDM's and APM's tables.
"""

from __future__ import annotations

import json
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmodel.errors import ArgumentError, ArgumentTypeError
from hvmodel.mmu import (
    SPTE_LAYOUTS,
    WRITABLE_STATES,
    BitLayout,
    PageRole,
    ShadowMasks,
    check_mmio_spte,
    check_spte_writable_invariants,
    decode_spte,
    generation_mmio_spte_mask,
    get_mmio_spte_access,
    get_mmio_spte_generation,
    get_mmio_spte_gfn,
    is_access_allowed,
    is_access_track_spte,
    is_accessed_spte,
    is_dirty_spte,
    is_ept_ve_possible,
    is_executable_pte,
    is_frozen_spte,
    is_large_pte,
    is_last_spte,
    is_mmio_spte,
    is_mmu_writable_spte,
    is_shadow_present_pte,
    is_writable_pte,
    leaf_spte_change_needs_tlb_flush,
    make_huge_spte,
    make_mmio_spte,
    make_nonleaf_spte,
    make_small_spte,
    make_spte,
    make_spte_executable,
    make_spte_nonexecutable,
    mark_spte_for_access_track,
    mmio_layout,
    reset_all_pte_masks,
    restore_acc_track_spte,
    spte_ad_enabled,
    spte_ad_need_write_protect,
    spte_has_volatile_bits,
    spte_kind,
    spte_needs_atomic_update,
    spte_to_pfn,
    vmx_get_mt_mask,
)

BIT = [1 << bit for bit in range(64)]
X, W, U = 1, 2, 4  # ACC_EXEC_MASK, ACC_WRITE_MASK, ACC_USER_MASK

SHADOW = reset_all_pte_masks(46)
NPT = reset_all_pte_masks(48, npt=True)
EPT = SHADOW.set_ept_masks(True, True)
EPT_NO_AD = SHADOW.set_ept_masks(False, True)
OLD_EPT = reset_all_pte_masks(46, version="6.12").set_ept_masks(True, True)
OLD_NO_AD = reset_all_pte_masks(46, version="6.12").set_ept_masks(False, True)

LEVEL = {level: PageRole.of(level=level, access=7) for level in (1, 2, 3)}
NO_AD = {level: PageRole.of(level=level, access=7, ad_disabled=1) for level in (1, 2, 3)}


def made(masks: ShadowMasks, access: int, **facts: object) -> int:
    level = facts.pop("level", 1)
    spte, wrprot = make_spte(masks, LEVEL[level], access, 0, 0, **facts)  # type: ignore[index,arg-type]
    assert not wrprot
    return spte


# -- shadow paging and NPT ------------------------------------------------------------------------------------------

LIVE = [
    # guest's bits and access                      access   facts                           bits but the address
    ("a load, the guest's entry clean", X | U, {}, 0xA25),
    ("its neighbour, prefetched", X | U, {"prefetch": True}, 0xA05),
    ("a load of the zero page or a read-only slot", X | U, {"host_writable": False}, 0x825),
    ("the same where the guest's entry has D", X | W | U, {"host_writable": False}, 0x825),
    ("a store", X | W | U, {}, 0xE67),
    ("a load of 2 MiB", X | U, {"level": 2}, 0xAA5),
    ("a store to 2 MiB", X | W | U, {"level": 2}, 0xEE7),
    ("a load, NX", U, {}, BIT[63] | 0xA25),
    ("a store, NX", W | U, {}, BIT[63] | 0xE67),
]


@pytest.mark.parametrize(("name", "access", "facts", "spte"), LIVE, ids=[row[0] for row in LIVE])
@pytest.mark.parametrize("masks", [SHADOW, NPT], ids=["shadow", "npt"])
def test_leaves_are_those_the_kernel_built(
    masks: ShadowMasks, name: str, access: int, facts: dict[str, object], spte: int
) -> None:
    assert made(masks, access, **facts) == spte, name


def test_the_frame_stands_in_bits_51_12() -> None:
    spte, _ = make_spte(SHADOW, LEVEL[1], X | U, 0x123, 0xFF_FFFF_FFFF)
    assert spte == 0xA25 | ((1 << 52) - (1 << 12))
    assert spte_to_pfn(spte) == 0xFF_FFFF_FFFF
    assert spte_to_pfn(spte | BIT[63] | 0xFFF) == 0xFF_FFFF_FFFF
    spte, _ = make_spte(SHADOW, LEVEL[3], X | U, 1 << 18, 5 << 18)
    assert spte == 0xAA5 | 5 << 30


def test_a_page_that_holds_a_guests_table_is_write_protected() -> None:
    # Host-writable stays; W, MMU-writable and D go: 0xe67 without 0x442.
    assert make_spte(SHADOW, LEVEL[1], 7, 0, 0, cannot_unsync=True) == (0xE67 & ~0x442, True)
    assert make_spte(SHADOW, LEVEL[1], X | U, 0, 0, cannot_unsync=True) == (0xA25, False)
    assert make_spte(SHADOW, LEVEL[1], 7, 0, 0, cannot_unsync=True, host_writable=False) == (0x825, False)


def test_an_old_writable_leaf_is_not_asked_again() -> None:
    assert make_spte(SHADOW, LEVEL[1], 7, 0, 0, cannot_unsync=True, old_spte=0xE67) == (0xE67, False)
    assert make_spte(SHADOW, LEVEL[2], 7, 0, 0, cannot_unsync=True, old_spte=0xEE7) == (0xEE7, False)
    # A table is writable and no leaf: from 6.13 it does not count, before it did, and D was left out as well.
    table = make_nonleaf_spte(SHADOW, 0x1000)
    assert make_spte(SHADOW, LEVEL[2], 7, 0, 0, cannot_unsync=True, old_spte=table) == (0xEE7 & ~0x442, True)
    old = reset_all_pte_masks(46, version="6.12")
    assert make_spte(old, LEVEL[2], 7, 0, 0, cannot_unsync=True, old_spte=table) == (0xEE7 & ~0x40, False)
    assert make_spte(old, LEVEL[1], 7, 0, 0, old_spte=0xE67) == (0xE27, False)
    assert make_spte(old, LEVEL[1], 7, 0, 0, old_spte=0xA25) == (0xE67, False)


@pytest.mark.parametrize(
    ("version", "prefetch", "synchronizing", "accessed"),
    [
        ("6.18", False, False, True),
        ("6.18", True, False, False),
        ("6.18", True, True, True),
        ("6.18", False, True, True),
        ("6.13", True, True, True),
        ("6.12", True, True, False),
        ("6.12", True, False, False),
        ("6.12", False, False, True),
    ],
)
def test_what_counts_as_an_access(version: str, prefetch: bool, synchronizing: bool, accessed: bool) -> None:
    masks = reset_all_pte_masks(46, version=version)
    spte = made(masks, X | U, prefetch=prefetch, synchronizing=synchronizing)
    assert spte == (0xA25 if accessed else 0xA05)
    assert is_accessed_spte(masks, spte) == accessed


def test_the_mitigation_takes_execution_from_large_pages_only() -> None:
    assert made(SHADOW, 7, nx_huge_page=True) == 0xE67
    assert made(SHADOW, 7, level=2, nx_huge_page=True) == BIT[63] | 0xEE7
    assert made(SHADOW, W | U, level=2, nx_huge_page=True) == BIT[63] | 0xEE7


def test_encryption_is_in_every_entry_but_those_of_devices() -> None:
    masks = NPT.set_me_spte_mask(BIT[47], BIT[47])
    assert made(masks, 7) == BIT[47] | 0xE67
    assert made(masks, 7, host_mmio=True) == 0xE67
    assert make_nonleaf_spte(masks, 0x1000) == BIT[47] | 0x1000 | 0x827
    assert spte_to_pfn(BIT[47] | 0x12345E67, masks) == spte_to_pfn(0x12345E67) == 0x12345
    # A key of Intel's is in the mask, and no entry has one.
    keys = SHADOW.set_me_spte_mask(0, BIT[45])
    assert spte_to_pfn(BIT[45], keys) == spte_to_pfn(BIT[45]) == BIT[45 - 12]
    assert made(keys, 7) == 0xE67
    assert make_nonleaf_spte(keys, 0x1000) == 0x1000 | 0x827


# -- EPT: the bits by SDM volume 3C, 29.3.2, tables 29-3 (PDPTE, 1 GByte), 29-5 (PDE, 2 MBytes), 29-7 (PTE) -----------

R, WR, EX, WB, IPAT, PS, EPT_A, EPT_D = BIT[0], BIT[1], BIT[2], 6 << 3, BIT[6], BIT[7], BIT[8], BIT[9]
MMU_PRESENT, HOST, MMU, SVE = BIT[11], BIT[57], BIT[58], BIT[63]
# A VM without non-coherent DMA: write-back whatever the guest's PAT says (vmx/vmx.c vmx_get_mt_mask @v6.18).
ALWAYS = MMU_PRESENT | SVE | WB | IPAT

EPT_LEAVES = [
    ("read, write, execute", EPT, 7, {}, ALWAYS | R | WR | EX | EPT_A | EPT_D | HOST | MMU),
    ("read, execute", EPT, X | U, {}, ALWAYS | R | EX | EPT_A | HOST),
    ("read", EPT, U, {}, ALWAYS | R | EPT_A | HOST),
    ("execute alone", EPT, X, {}, ALWAYS | EX | EPT_A | HOST),
    ("prefetched", EPT, 7, {"prefetch": True}, ALWAYS | R | WR | EX | EPT_D | HOST | MMU),
    ("the host is read-only", EPT, 7, {"host_writable": False}, ALWAYS | R | EX | EPT_A),
    ("2 MiB", EPT, 7, {"level": 2}, ALWAYS | R | WR | EX | PS | EPT_A | EPT_D | HOST | MMU),
    ("1 GiB, mitigated", EPT, 7, {"level": 3, "nx_huge_page": True}, ALWAYS | R | WR | PS | EPT_A | EPT_D | HOST | MMU),
    ("a device", EPT, 7, {"host_mmio": True}, MMU_PRESENT | SVE | R | WR | EX | EPT_A | EPT_D | HOST | MMU),
    ("another type", EPT, U, {"mt_mask": WB}, MMU_PRESENT | SVE | WB | R | EPT_A | HOST),
    ("no suppress #VE before 6.10", reset_all_pte_masks(46, version="6.9").set_ept_masks(True, True), U, {},
     MMU_PRESENT | WB | IPAT | R | EPT_A | HOST),
    # Without execute-only R is in each entry (present_mask).
    ("execute without execute-only", SHADOW.set_ept_masks(True, False), X, {}, ALWAYS | R | EX | EPT_A | HOST),
]  # fmt: skip


@pytest.mark.parametrize(("name", "masks", "access", "facts", "spte"), EPT_LEAVES, ids=[row[0] for row in EPT_LEAVES])
def test_leaves_of_ept(name: str, masks: ShadowMasks, access: int, facts: dict[str, object], spte: int) -> None:
    assert made(masks, access, **facts) == spte, name


AD_DISABLED = BIT[52]
SAVED_R, SAVED_X = BIT[54], BIT[56]


def test_leaves_of_ept_without_accessed_and_dirty() -> None:
    always = ALWAYS | AD_DISABLED
    # From 6.13 KVM keeps A and D itself, in the bits that the processor then ignores (table 29-7).
    assert make_spte(EPT_NO_AD, NO_AD[1], 7, 0, 0) == (always | R | WR | EX | EPT_A | EPT_D | HOST | MMU, False)
    assert make_spte(OLD_NO_AD, NO_AD[1], 7, 0, 0) == (always | R | WR | EX | HOST | MMU, False)
    # An L1 that turned A/D off, on a host that has them: the same bits by the role.
    assert make_spte(OLD_EPT, NO_AD[1], 7, 0, 0) == (always | R | WR | EX | HOST | MMU, False)
    assert make_spte(EPT, NO_AD[1], 7, 0, 0) == (always | R | WR | EX | EPT_A | EPT_D | HOST | MMU, False)
    # Prefetched: access-tracked at once; R and X are kept in 54 and 56, W is not.
    tracked = always | SAVED_R | SAVED_X | HOST | MMU
    assert make_spte(EPT_NO_AD, NO_AD[1], 7, 0, 0, prefetch=True) == (tracked | EPT_D, False)
    assert make_spte(OLD_NO_AD, NO_AD[1], 7, 0, 0, prefetch=True) == (tracked, False)


def test_a_nested_guests_pages_are_write_protected_while_the_processor_logs() -> None:
    nested = PageRole.of(level=1, access=7, guest_mode=1)
    spte, _ = make_spte(EPT, nested, 7, 0, 0, cpu_dirty_log=True)
    assert spte == made(EPT, 7) | BIT[53]
    assert make_spte(EPT, LEVEL[1], 7, 0, 0, cpu_dirty_log=True)[0] == made(EPT, 7)
    assert make_spte(EPT, nested, 7, 0, 0)[0] == made(EPT, 7)
    both = PageRole.of(level=1, access=7, guest_mode=1, ad_disabled=1)
    assert make_spte(EPT, both, 7, 0, 0, cpu_dirty_log=True)[0] == make_spte(EPT, both, 7, 0, 0)[0]


def test_memory_types() -> None:
    # SDM volume 3C, 29.3.7: bits 5:3, 0 uncacheable, 6 write-back; bit 6 is IPAT.
    assert vmx_get_mt_mask(False) == vmx_get_mt_mask(False, ignore_guest_pat=True) == WB | IPAT
    assert vmx_get_mt_mask(False, ignore_guest_pat=False) == WB
    assert vmx_get_mt_mask(True) == vmx_get_mt_mask(True, ignore_guest_pat=False) == 0


@pytest.mark.parametrize(
    ("masks", "spte"),
    [
        # P, W, U, A and MMU present (SDM table 4-20); shadow tables give all.
        (SHADOW, 0x827),
        # R, W, X, A, suppress #VE.
        (EPT, SVE | MMU_PRESENT | EPT_A | 7),
        (reset_all_pte_masks(46, version="6.9").set_ept_masks(True, True), MMU_PRESENT | EPT_A | 7),
    ],
)
def test_tables(masks: ShadowMasks, spte: int) -> None:
    assert make_nonleaf_spte(masks, 0x7FFF_F000) == 0x7FFF_F000 | spte
    for level in (2, 3, 4, 5):
        decoded = decode_spte(make_nonleaf_spte(masks, 0x1000), masks, level)
        assert (decoded["address"], decoded.problems) == (1, ())
    accessed = masks.accessed_mask
    assert make_nonleaf_spte(masks, 0x1000, True) == 0x1000 | (spte & ~accessed) | AD_DISABLED


# -- access tracking ------------------------------------------------------------------------------------------------


def test_with_accessed_bits_tracking_clears_a() -> None:
    assert mark_spte_for_access_track(SHADOW, 0xE67) == 0xE47
    assert mark_spte_for_access_track(EPT, made(EPT, 7)) == made(EPT, 7) & ~EPT_A
    assert is_accessed_spte(SHADOW, 0xE67)
    assert not is_accessed_spte(SHADOW, 0xE47)
    assert not is_access_track_spte(SHADOW, 0xE47)


@pytest.mark.parametrize("access", range(1, 8))
@pytest.mark.parametrize("masks", [EPT_NO_AD, OLD_NO_AD], ids=["6.18", "6.12"])
def test_without_them_it_keeps_r_and_x_and_takes_all(masks: ShadowMasks, access: int) -> None:
    spte, _ = make_spte(masks, NO_AD[1], access, 0, 0)
    tracked = mark_spte_for_access_track(masks, spte)
    assert is_access_track_spte(masks, tracked)
    assert not is_accessed_spte(masks, tracked)
    assert tracked & 7 == 0
    assert bool(tracked & SAVED_R) == bool(access & U)
    assert bool(tracked & SAVED_X) == bool(access & X)
    assert mark_spte_for_access_track(masks, tracked) == tracked  # once is enough
    back = restore_acc_track_spte(masks, tracked)
    # All comes back but W, and A from 6.13 on.
    assert back == spte & ~W & ~(masks.accessed_mask if masks.version == "6.18" else 0)
    assert is_mmu_writable_spte(masks, back) == bool(access & W)


def test_a_tracked_entry_is_only_one_without_accessed_bits() -> None:
    assert not is_access_track_spte(EPT, MMU_PRESENT | HOST)  # A/D bits are on
    assert is_access_track_spte(EPT, MMU_PRESENT | HOST | AD_DISABLED)
    assert not is_access_track_spte(EPT, MMU_PRESENT | AD_DISABLED | R)
    assert not is_access_track_spte(EPT, MMU_PRESENT | AD_DISABLED | EX)
    # Before 6.13 an entry without A/D bits counts as accessed unless it is tracked.
    assert is_accessed_spte(OLD_NO_AD, MMU_PRESENT | AD_DISABLED | R)
    assert is_accessed_spte(OLD_NO_AD, MMU_PRESENT | AD_DISABLED | EX)
    assert not is_accessed_spte(OLD_NO_AD, MMU_PRESENT | AD_DISABLED)
    assert not is_accessed_spte(OLD_EPT, MMU_PRESENT | R)
    assert is_accessed_spte(OLD_EPT, MMU_PRESENT | R | EPT_A)


# -- MMIO -----------------------------------------------------------------------------------------------------------


def test_the_generation_is_in_two_pieces() -> None:
    # Bits 7:0 in 10:3, 18:8 in 62:52.
    for bit in range(19):
        assert generation_mmio_spte_mask(BIT[bit]) == (BIT[bit + 3] if bit < 8 else BIT[bit - 8 + 52])
    for generation in (0, 1, 0xFF, 0x100, 0x40102, 0x7FFFF):
        spte = generation_mmio_spte_mask(generation)
        assert get_mmio_spte_generation(spte) == generation
        assert get_mmio_spte_generation(spte | ~(0xFF << 3 | 0x7FF << 52) & (1 << 64) - 1) == generation


def test_an_mmio_spte_bit_by_bit() -> None:
    # Bit 51 and P; W and U as the access says; the address; generation 0x102: 2 in 10:3, 1 in 62:52.
    spte = make_mmio_spte(SHADOW, 0x102, 0xFEE00, X | W | U)
    assert spte == BIT[51] | 1 | W | U | 0xFEE00000 | 2 << 3 | BIT[52]
    assert make_mmio_spte(SHADOW, 0x102, 0xFEE00, X | U) == spte & ~W
    # EPT: 110b, no access, no suppress #VE.
    assert make_mmio_spte(EPT, 0x102, 0xFEE00, X | W | U) == 6 | 0xFEE00000 | 2 << 3 | BIT[52]


MMIO_MASKS = [
    SHADOW,
    EPT,
    reset_all_pte_masks(46, l1tf=True),
    reset_all_pte_masks(39, l1tf=True, cache_bits=44),
    reset_all_pte_masks(39, l1tf=True, cache_bits=44).set_ept_masks(True, True),
    reset_all_pte_masks(36),
    # AMD with memory encryption on: bits 43 to 51 (kernel svm_adjust_mmio_mask).
    reset_all_pte_masks(48, x86_phys_bits=43, npt=True).set_mmio_spte_mask(
        (1 << 52) - (1 << 43) | 1, (1 << 52) - (1 << 43) | 1, W | U
    ),
]


@given(
    masks=st.sampled_from(MMIO_MASKS),
    generation=st.integers(0, (1 << 64) - 1),
    gfn=st.integers(0, (1 << 40) - 1),
    access=st.integers(0, 7),
)
def test_an_mmio_spte_gives_back_what_it_was_made_of(
    masks: ShadowMasks, generation: int, gfn: int, access: int
) -> None:
    gfn &= (1 << masks.x86_phys_bits - 12) - 1
    spte = make_mmio_spte(masks, generation, gfn, access)
    assert spte < 1 << 64
    assert get_mmio_spte_generation(spte) == generation & 0x7FFFF
    assert get_mmio_spte_gfn(masks, spte) == gfn
    assert get_mmio_spte_access(masks, spte) == access & masks.mmio_access_mask
    assert is_mmio_spte(masks, spte)
    assert not is_shadow_present_pte(spte)
    assert not is_frozen_spte(masks, spte)
    assert spte_kind(masks, spte, 1) == "mmio"
    # L1TF: the highest bits that the cache looks at are ones.
    assert spte & masks.nonpresent_or_rsvd_mask == masks.nonpresent_or_rsvd_mask
    decoded = decode_spte(spte, masks)
    assert decoded.problems == ()
    assert decoded["generation_low"] | decoded["generation_high"] << 8 == generation & 0x7FFFF


def test_an_mmio_spte_holds_for_its_generation() -> None:
    # kernel arch/x86/kvm/mmu/mmu.c check_mmio_spte @v6.18: 19 bits count, and bit 63 is "being changed".
    spte = make_mmio_spte(SHADOW, 0x4_0102, 0xFEE00, U)
    assert check_mmio_spte(spte, 0x4_0102)
    assert check_mmio_spte(spte, 1 << 19 | 0x4_0102)
    assert check_mmio_spte(spte, BIT[62] | 0x4_0102)
    assert not check_mmio_spte(spte, BIT[63] | 0x4_0102)
    for bit in range(19):
        assert not check_mmio_spte(spte, 0x4_0102 ^ BIT[bit])


def test_without_caching_there_are_none() -> None:
    masks = reset_all_pte_masks(46, mmio_caching=False)
    assert not is_mmio_spte(masks, 0)
    assert not is_mmio_spte(masks, BIT[51] | 1)
    with pytest.raises(ArgumentError, match="MMIO caching is off"):
        make_mmio_spte(masks, 0, 0, 0)


def test_nothing_else_reads_as_mmio() -> None:
    for masks in MMIO_MASKS:
        assert not is_mmio_spte(masks, 0)
        assert not is_mmio_spte(masks, masks.nonpresent_value)
        assert not is_mmio_spte(masks, masks.frozen_spte)
        for access in range(8):
            assert not is_mmio_spte(masks, make_spte(masks, LEVEL[1], access, 0, 0)[0])
    # With bit 63 in the mask, one with suppress #VE is none.
    assert is_mmio_spte(EPT, 6)
    assert not is_mmio_spte(EPT, 6 | SVE)


# -- large and small ------------------------------------------------------------------------------------------------


def test_a_large_page_in_512_small_ones() -> None:
    huge, _ = make_spte(SHADOW, LEVEL[2], 7, 0, 0x600)
    small = [make_small_spte(SHADOW, huge, LEVEL[1], index) for index in range(512)]
    assert small == [make_spte(SHADOW, LEVEL[1], 7, 0, 0x600 + index)[0] for index in range(512)]
    giant, _ = make_spte(SHADOW, LEVEL[3], 7, 0, 1 << 18)
    parts = [make_small_spte(SHADOW, giant, LEVEL[2], index) for index in range(512)]
    assert parts == [make_spte(SHADOW, LEVEL[2], 7, 0, (1 << 18) + (index << 9))[0] for index in range(512)]


def test_small_ones_are_executable_again() -> None:
    huge, _ = make_spte(EPT, LEVEL[2], 7, 0, 0, nx_huge_page=True)
    assert not is_executable_pte(EPT, huge)
    assert make_small_spte(EPT, huge, LEVEL[1], 0, nx_huge_page=True) == made(EPT, 7)
    assert make_small_spte(EPT, huge, LEVEL[1], 0) == made(EPT, 7) & ~EX
    no_exec = PageRole.of(level=1, access=W | U)
    assert make_small_spte(EPT, huge, no_exec, 0, nx_huge_page=True) == made(EPT, 7) & ~EX
    # Between 1 GiB and 2 MiB nothing changes.
    giant, _ = make_spte(EPT, LEVEL[3], 7, 0, 0, nx_huge_page=True)
    assert make_small_spte(EPT, giant, LEVEL[2], 0, nx_huge_page=True) == giant
    shadow, _ = make_spte(SHADOW, LEVEL[2], 7, 0, 0, nx_huge_page=True)
    assert make_small_spte(SHADOW, shadow, LEVEL[1], 0, nx_huge_page=True) == 0xE67


def test_and_back() -> None:
    for masks in (SHADOW, EPT):
        huge, _ = make_spte(masks, LEVEL[2], 7, 0, 0x600)
        for index in (0, 1, 511):
            assert make_huge_spte(masks, make_small_spte(masks, huge, LEVEL[1], index), 2) == huge
        giant = make_huge_spte(masks, huge, 3)
        assert giant == make_spte(masks, LEVEL[3], 7, 0, 0)[0]
        mitigated = make_huge_spte(masks, made(masks, 7), 2, nx_huge_page=True)
        assert mitigated == make_spte(masks, LEVEL[2], 7, 0, 0, nx_huge_page=True)[0]


def test_a_tracked_one_stays_tracked_when_its_execution_changes() -> None:
    huge, _ = make_spte(EPT_NO_AD, NO_AD[2], 7, 0, 0)
    tracked = mark_spte_for_access_track(EPT_NO_AD, huge)
    role = PageRole.of(level=1, access=7, ad_disabled=1)
    without_x = make_huge_spte(EPT_NO_AD, tracked & ~BIT[7], 2, nx_huge_page=True)
    assert without_x == tracked & ~SAVED_X
    small = make_small_spte(EPT_NO_AD, without_x, role, 0, nx_huge_page=True)
    assert small == tracked & ~BIT[7]
    assert is_access_track_spte(EPT_NO_AD, small)


def test_execution_given_and_taken() -> None:
    # Shadow paging and NPT have NX, EPT has X; A/D bits and the rest stay.
    assert make_spte_nonexecutable(SHADOW, 0xE67) == BIT[63] | 0xE67
    assert make_spte_executable(SHADOW, BIT[63] | 0xE67) == make_spte_executable(SHADOW, 0xE67) == 0xE67
    assert make_spte_nonexecutable(EPT, made(EPT, 7)) == made(EPT, 7) & ~EX
    assert make_spte_executable(EPT, made(EPT, W | U)) == made(EPT, 7)
    # One that is access-tracked has X in bit 56, and no access beside.
    tracked = MMU_PRESENT | SVE | AD_DISABLED | SAVED_R | HOST | MMU
    assert make_spte_executable(EPT_NO_AD, tracked) == tracked | SAVED_X
    assert make_spte_nonexecutable(EPT_NO_AD, tracked | SAVED_X) == tracked


# -- questions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [SHADOW, NPT, EPT], ids=["shadow", "npt", "ept"])
def test_which_states_of_writing_are_legal(masks: ShadowMasks) -> None:
    # kernel arch/x86/kvm/mmu/spte.h @v6.18: the table above is_writable_pte.
    assert set(WRITABLE_STATES) == {(1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0)}
    for host, mmu, writable in product((0, 1), repeat=3):
        spte = MMU_PRESENT | 5 | host * masks.host_writable_mask | mmu * masks.mmu_writable_mask | writable * 2
        problems = check_spte_writable_invariants(masks, spte)
        assert (problems == ()) == ((host, mmu, writable) in WRITABLE_STATES), (host, mmu, writable)
        assert set(problems) <= set(decode_spte(spte, masks).problems)


@given(
    masks=st.sampled_from([SHADOW, NPT, EPT, EPT_NO_AD, OLD_EPT, OLD_NO_AD]),
    level=st.integers(1, 3),
    access=st.integers(0, 7),
    ad_disabled=st.booleans(),
    flags=st.lists(st.booleans(), min_size=6, max_size=6),
    pfn=st.integers(0, (1 << 34) - 1),
)
def test_every_leaf_that_is_made_is_sound(
    masks: ShadowMasks, level: int, access: int, ad_disabled: bool, flags: list[bool], pfn: int
) -> None:
    role = PageRole.of(level=level, access=7, ad_disabled=int(ad_disabled and masks.kind == "ept"))
    names = ("prefetch", "synchronizing", "host_writable", "cannot_unsync", "nx_huge_page", "host_mmio")
    pfn &= ~((1 << 9 * (level - 1)) - 1)
    if masks.kind == "ept" and access in (0, W, W | X):
        access |= U  # no entry of EPT allows writes alone, and none nothing
    spte, wrprot = make_spte(masks, role, access, 0, pfn, **dict(zip(names, flags, strict=True)))
    assert spte_kind(masks, spte, level) == "leaf"
    assert is_last_spte(spte, level)
    assert is_large_pte(spte) == (level > 1)
    assert spte_to_pfn(spte) == pfn
    assert check_spte_writable_invariants(masks, spte) == ()
    assert not (wrprot and (is_writable_pte(spte) or is_mmu_writable_spte(masks, spte)))
    assert not is_ept_ve_possible(masks, spte)
    assert spte_ad_enabled(spte) == (not role.ad_disabled)
    if masks.kind != "npt" or access & U:
        decoded = decode_spte(spte, masks, level)
        assert decoded.problems == ()


def test_who_must_be_changed_atomically() -> None:
    logged = 0xE67 & ~W  # write-protected for the dirty log
    assert spte_needs_atomic_update(SHADOW, logged)
    assert not spte_needs_atomic_update(SHADOW, 0xE67)
    assert spte_needs_atomic_update(SHADOW, 0xE67 & ~0x40)  # writable and not dirty: the processor may set D
    assert not spte_needs_atomic_update(SHADOW, 0xA25)
    assert spte_needs_atomic_update(EPT, made(EPT, U) | AD_DISABLED)
    assert spte_needs_atomic_update(EPT, made(EPT, 7) | AD_DISABLED)
    assert not spte_needs_atomic_update(EPT, made(EPT, 7))
    assert not spte_needs_atomic_update(EPT, made(EPT, 7) | BIT[53])
    assert leaf_spte_change_needs_tlb_flush(SHADOW, 0xE67, 0xA25)
    assert not leaf_spte_change_needs_tlb_flush(SHADOW, 0xE67, logged)
    assert not leaf_spte_change_needs_tlb_flush(SHADOW, 0xA25, 0xE67)


@pytest.mark.parametrize(
    ("masks", "spte", "volatile", "dirty"),
    [
        # kernel arch/x86/kvm/mmu/spte.c spte_has_volatile_bits and spte.h is_dirty_spte @v6.12.  With A/D bits:
        # volatile where the processor may still set A, or D of a writable one, or KVM make it writable at any time.
        (SHADOW, 0xE67, False, True),
        (SHADOW, 0xE67 & ~0x20, True, True),
        (SHADOW, 0xE67 & ~0x40, True, False),
        (SHADOW, 0xE67 & ~W, True, True),
        (SHADOW, 0xA25, False, False),
        (SHADOW, 0xA25 & ~0x20, True, False),
        # Without them: only one that is access-tracked; written is what is writable.
        (OLD_EPT, MMU_PRESENT | AD_DISABLED | HOST | MMU | 7, False, True),
        (OLD_EPT, MMU_PRESENT | AD_DISABLED | HOST | MMU | 5, True, False),
        (OLD_EPT, MMU_PRESENT | AD_DISABLED | HOST | 5, False, False),
        (OLD_EPT, MMU_PRESENT | AD_DISABLED | HOST | SAVED_R, True, False),
        (OLD_EPT, MMU_PRESENT | AD_DISABLED | HOST | EPT_D | 5, False, False),
        (OLD_EPT, MMU_PRESENT | HOST | MMU | EPT_A | EPT_D | 7, False, True),
        (OLD_EPT, MMU_PRESENT | HOST | MMU | EPT_A | 7, True, False),
        # By write protection alone: A and D are there.
        (OLD_EPT, MMU_PRESENT | BIT[53] | HOST | MMU | EPT_A | 7, True, False),
    ],
)
def test_the_questions_of_older_kernels(masks: ShadowMasks, spte: int, volatile: bool, dirty: bool) -> None:
    assert (spte_has_volatile_bits(masks, spte), is_dirty_spte(masks, spte)) == (volatile, dirty)


def test_which_faults_are_spurious() -> None:
    # kernel arch/x86/kvm/mmu/spte.h is_access_allowed @v6.18: execution first, then writing, else bit 0.
    cases = [
        (SHADOW, 0xE67, (True, True, True)),
        (SHADOW, 0xA25, (True, False, True)),
        (SHADOW, BIT[63] | 0xE67, (True, True, False)),
        (SHADOW, 0xE66, (False, True, True)),
        (EPT, MMU_PRESENT | EX, (False, False, True)),
        (EPT, MMU_PRESENT | R, (True, False, False)),
        (EPT, MMU_PRESENT | R | WR, (True, True, False)),
    ]
    for masks, spte, (read, write, execute) in cases:
        assert is_access_allowed(masks, spte) == read
        assert is_access_allowed(masks, spte, write=True) == write
        assert is_access_allowed(masks, spte, execute=True) == execute
        assert is_access_allowed(masks, spte, write=True, execute=True) == execute


def test_small_questions() -> None:
    assert is_executable_pte(SHADOW, 0xA25)
    assert not is_executable_pte(SHADOW, BIT[63] | 0xA25)
    assert is_executable_pte(EPT, MMU_PRESENT | EX)
    assert not is_executable_pte(EPT, MMU_PRESENT | R)
    assert [spte_ad_enabled(at << 52) for at in range(4)] == [True, False, True, True]
    assert [spte_ad_need_write_protect(at << 52) for at in range(4)] == [False, True, True, True]
    assert not is_last_spte(0x827, 2)
    assert is_last_spte(0x827, 1)
    assert is_frozen_spte(SHADOW, BIT[63] | 0x5A0)
    assert not is_frozen_spte(SHADOW, 0x5A0)
    assert is_frozen_spte(reset_all_pte_masks(46, version="6.9"), 0x5A0)
    assert is_ept_ve_possible(EPT, R | MMU_PRESENT)
    assert not is_ept_ve_possible(EPT, 6)  # an MMIO SPTE gives a misconfiguration
    assert not is_ept_ve_possible(SHADOW, 0xA25)


# -- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masks", "spte", "level", "kind", "title"),
    [
        (SHADOW, 0xE67, 1, "leaf", "shadow SPTE of level 1, page of 4K"),
        (SHADOW, 0xEE7, 2, "leaf", "shadow SPTE of level 2, page of 2M"),
        (SHADOW, 0xEE7, 3, "leaf", "shadow SPTE of level 3, page of 1G"),
        (SHADOW, 0xEE7, 4, "table", "shadow SPTE of level 4, table"),
        (NPT, 0x827, 2, "table", "NPT SPTE of level 2, table"),
        (EPT, SVE | MMU_PRESENT | WB | PS | HOST | MMU | 7, 2, "leaf", "EPT SPTE of level 2, page of 2M"),
        (EPT, SVE | MMU_PRESENT | EPT_A | 7, 5, "table", "EPT SPTE of level 5, table"),
        (SHADOW, 0, 1, "none", "shadow SPTE of level 1, not present"),
        (SHADOW, BIT[63], 1, "none", "shadow SPTE of level 1, not present"),
        (EPT, BIT[63] | 0x5A0, 3, "frozen", "EPT SPTE of level 3, frozen: being changed"),
        (EPT, 6, 1, "mmio", "EPT MMIO SPTE of level 1"),
        (SHADOW, BIT[51] | 1, 1, "mmio", "shadow MMIO SPTE of level 1"),
        (SHADOW, 0x1001, 3, "unknown", "shadow SPTE of level 3, table"),
    ],
)
def test_what_an_spte_is(masks: ShadowMasks, spte: int, level: int, kind: str, title: str) -> None:
    assert spte_kind(masks, spte, level) == kind
    decoded = decode_spte(spte, masks, level)
    assert decoded.title == title
    assert (decoded.value, decoded.width) == (spte, 64)
    assert bool(decoded.problems) == (kind == "unknown" or level == 4)


@pytest.mark.parametrize("masks", [SHADOW, EPT, NPT.set_me_spte_mask(BIT[47], BIT[47])], ids=["shadow", "ept", "me"])
@pytest.mark.parametrize("level", range(1, 6))
def test_every_bit_that_is_set_has_one_name(masks: ShadowMasks, level: int) -> None:
    for base in (MMU_PRESENT, MMU_PRESENT | PS):
        for bit in range(64):
            decoded = decode_spte(base ^ BIT[bit], masks, level)
            names = [part.name for part in decoded.parts if part.low <= bit <= part.high]
            if masks.me_mask >> bit & 1:
                # The address goes on above the bit of encryption.
                assert names == ["address", "encryption"]
            elif decoded.value >> bit & 1:
                assert len(names) == 1, (hex(decoded.value), bit)
                told = any(f"bit {bit} is reserved" in text for text in decoded.problems)
                assert (names == ["reserved"]) == told
            else:
                assert len(names) <= 1


@pytest.mark.parametrize("masks", MMIO_MASKS)
def test_the_layout_of_mmio_names_no_bit_twice(masks: ShadowMasks) -> None:
    layout = mmio_layout(masks)
    assert isinstance(layout, BitLayout)
    seen = 0
    for field in layout.members:
        assert field.width > 0
        assert field.high < 64
        assert not seen & field.mask, field
        seen |= field.mask
    assert seen & MMU_PRESENT == 0
    whole = masks.mmio_mask | masks.nonpresent_or_rsvd_lower_gfn_mask | 0xFF << 3 | 0x7FF << 52
    assert seen & whole == whole


def test_parts_of_a_leaf() -> None:
    decoded = decode_spte(BIT[63] | 0x12345E67, SHADOW)
    named = {part.name: (part.bits, part.value, part.meaning) for part in decoded.parts}
    assert named["address"] == ("51:12", 0x12345, "0x12345000 host address of the page")
    assert named["nx"] == ("63", 1, "not executable")
    assert named["host_writable"] == ("9", 1, "the host lets write")
    assert named["mmu_writable"] == ("10", 1, "KVM has nothing against writes")
    assert named["tdp_ad"] == ("53:52", 0, "A/D bits")
    assert "address=0x12345" in str(decoded)
    assert "0x12345000 host address of the page" in decoded.table()
    assert "<table>" in decoded._repr_html_()
    assert json.loads(json.dumps(decoded.to_json()))["value"] == BIT[63] | 0x12345E67


@pytest.mark.parametrize(("masks", "spte"), [(SHADOW, 0xAA5), (EPT, SVE | MMU_PRESENT | WB | PS | HOST | R)])
@pytest.mark.parametrize(("level", "low"), [(2, 21), (3, 30)])
def test_the_address_of_a_large_page_begins_at_its_size(masks: ShadowMasks, spte: int, level: int, low: int) -> None:
    decoded = decode_spte(spte | BIT[low], masks, level)
    assert (decoded["address"], decoded["page_size"], decoded.problems) == (1, 1, ())
    assert f"address={1 << low:#x} " in f"{decoded} "
    assert decode_spte(spte | BIT[low - 1], masks, level).problems == (f"bit {low - 1} is reserved and set",)
    # Bit 12 is the PAT's in a page table, and reserved in EPT.
    assert len(decode_spte(spte | BIT[12], masks, level).problems) == (masks is EPT)


def test_parts_of_mmio() -> None:
    named = {part.name: (part.bits, part.value, part.meaning) for part in decode_spte(
        make_mmio_spte(SHADOW, 0x102, 0xFEE00, W | U), SHADOW).parts}  # fmt: skip
    assert named["gfn"] == ("45:12", 0xFEE00, "0xfee00000 the guest's address")
    assert (named["access_write"][:2], named["access_user"][:2]) == (("1", 1), ("2", 1))
    read_only = decode_spte(make_mmio_spte(SHADOW, 0x102, 0xFEE00, X | U), SHADOW)
    assert (read_only["access_write"], read_only["access_user"]) == (0, 1)
    assert (named["mmio_0"][:2], named["mmio_51"][:2]) == (("0", 1), ("51", 1))


def test_encryption_is_shown_beside_the_address() -> None:
    decoded = decode_spte(BIT[47] | 0x12345E67, NPT.set_me_spte_mask(BIT[47], BIT[47]))
    assert (decoded["address"], decoded["encryption"]) == (0x12345, 1)
    assert decoded.problems == ()
    assert decode_spte(BIT[52] | 0x12345E67, NPT.set_me_spte_mask(BIT[47], BIT[47]))["address"] == 0x12345
    keys = decode_spte(3 << 40 | 0x12345A25, SHADOW.set_me_spte_mask(0, 0x3F << 40))
    assert (keys["address"], keys["encryption"], keys.problems) == (0x12345, 3, ())
    assert str(keys).startswith(
        "shadow SPTE of level 1, page of 4K 0x0000030012345a25: address=0x12345000 encryption=0x3 "
    )
    meanings = {part.name: part.meaning for part in keys.parts}
    assert (meanings["address"], meanings["encryption"]) == ("0x12345000 host address of the page", "key of the page")
    named = {part.name: part.meaning for part in decoded.parts}
    assert (named["address"], named["encryption"]) == ("0x12345000 host address of the page", "the page is encrypted")
    large = decode_spte(BIT[47] | 5 << 30 | 0xEE7, NPT.set_me_spte_mask(BIT[47], BIT[47]), 3)
    assert (large["address"], large.problems) == (5, ())
    assert f"address={5 << 30:#x} encryption " in str(large)


@pytest.mark.parametrize(
    ("masks", "spte", "level", "word"),
    [
        (SHADOW, 0xE67 & ~0x200, 1, "MMU-writable and not host-writable"),
        (SHADOW, 0xE67 & ~0x400, 1, "writable and not MMU-writable"),
        (SHADOW, 0xA25 | BIT[46], 1, "the processor has 46"),
        (SHADOW, 0xAA5 | BIT[13], 2, "bit 13 is reserved"),
        (SHADOW, 0xAA5 | BIT[29], 3, "bit 29 is reserved"),
        (SHADOW, 0x827 | BIT[7], 4, "bit 7 is reserved"),
        (SHADOW, 0x827 | BIT[7], 5, "bit 7 is reserved"),
        # SDM volume 3C, tables 29-1 and 29-2: bits 7:3 of an EPT PML4E or PML5E are reserved.
        (EPT, SVE | MMU_PRESENT | 0x187, 4, "bit 7 is reserved"),
        (EPT, SVE | MMU_PRESENT | 0x187, 5, "bit 7 is reserved"),
        (SHADOW, 0xA25 | 3 << 52, 1, "tdp_ad"),
        (NPT, 0xA21, 1, "user is clear"),
        # SDM volume 3C, 29.3.3.1: bits 2:0 = 010b or 110b; 100b without execute-only; a reserved memory type.
        (EPT, SVE | MMU_PRESENT | WB | 2 | HOST | MMU, 1, "writable and not readable"),
        (EPT, SVE | MMU_PRESENT | WB | 6 | HOST | MMU, 1, "writable and not readable"),
        (EPT, SVE | MMU_PRESENT | 2, 2, "writable and not readable"),
        (SHADOW.set_ept_masks(True, False), SVE | MMU_PRESENT | WB | 4, 1, "executable and not readable"),
        (EPT, SVE | MMU_PRESENT | 3 << 3 | 5, 1, "memory_type"),
        (EPT, SVE | MMU_PRESENT | BIT[3] | 7, 2, "bit 3 is reserved"),
        (SHADOW, 0x1021, 1, "bit 11 is clear"),
        (MMIO_MASKS[2], make_mmio_spte(MMIO_MASKS[2], 0, 0, 0) & ~BIT[45], 1, "L1TF"),
    ],
)
def test_problems_are_told(masks: ShadowMasks, spte: int, level: int, word: str) -> None:
    assert any(word in problem for problem in decode_spte(spte, masks, level).problems)


def test_execute_only_is_no_problem_where_it_is_there() -> None:
    assert decode_spte(SVE | MMU_PRESENT | WB | EX, EPT).problems == ()


def test_all_layouts_are_there() -> None:
    assert {key for key in SPTE_LAYOUTS if key[0] == "ept"} == {
        ("ept", kind, level) for kind, levels in (("leaf", (1, 2, 3)), ("table", (2, 3, 4, 5))) for level in levels
    }
    assert len(SPTE_LAYOUTS) == 2 * 7


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: make_spte(SHADOW, LEVEL[1], 8, 0, 0), "pte_access"),
        (lambda: make_spte(SHADOW, LEVEL[1], -1, 0, 0), "pte_access"),
        (lambda: make_spte(SHADOW, LEVEL[1], 7, 1 << 40, 0), "gfn"),
        (lambda: make_spte(SHADOW, LEVEL[1], 7, 0, 1 << 40), "pfn"),
        (lambda: make_spte(SHADOW, LEVEL[2], 7, 1, 0), "gfn"),
        (lambda: make_spte(SHADOW, LEVEL[2], 7, 0, 0x1FF), "pfn"),
        (lambda: make_spte(SHADOW, LEVEL[3], 7, 0, 1 << 17), "pfn"),
        (lambda: make_spte(SHADOW, PageRole.of(level=4), 7, 0, 0), "role.level"),
        (lambda: make_spte(SHADOW, PageRole.of(), 7, 0, 0), "role.level"),
        (lambda: make_spte(SHADOW, LEVEL[1], 7, 0, 0, old_spte=1 << 64), "old_spte"),
        (lambda: make_spte(SHADOW, LEVEL[1], 7, 0, 0, mt_mask=0x100), "mt_mask"),
        (lambda: make_nonleaf_spte(SHADOW, 0x1001), "child_pa"),
        (lambda: make_nonleaf_spte(SHADOW, 1 << 52), "child_pa"),
        (lambda: make_mmio_spte(SHADOW, 1 << 64, 0, 0), "generation"),
        (lambda: make_mmio_spte(SHADOW, 0, 1 << 40, 0), "gfn"),
        (lambda: make_mmio_spte(SHADOW, 0, 0, 8), "access"),
        (lambda: make_mmio_spte(reset_all_pte_masks(52), 0, 0, 0), "masks.enable_mmio_caching"),
        (lambda: check_mmio_spte(0, 1 << 64), "generation"),
        (lambda: generation_mmio_spte_mask(1 << 19), "generation"),
        (lambda: make_small_spte(SHADOW, 0xEE7, LEVEL[1], 512), "index"),
        (lambda: make_small_spte(SHADOW, 0xEE7, LEVEL[3], 0), "role.level"),
        (lambda: make_small_spte(SHADOW, 0xE67, LEVEL[1], 0), "huge_spte"),
        (lambda: make_small_spte(SHADOW, 0x4E7, LEVEL[1], 0), "huge_spte"),
        (lambda: make_huge_spte(SHADOW, 0x667, 2), "small_spte"),
        (lambda: make_huge_spte(SHADOW, 0xE67, 1), "level"),
        (lambda: make_huge_spte(SHADOW, 0xE67, 4), "level"),
        (lambda: decode_spte(1 << 64, SHADOW), "spte"),
        (lambda: decode_spte(-1, SHADOW), "spte"),
        (lambda: decode_spte(0, SHADOW, 0), "level"),
        (lambda: decode_spte(0, SHADOW, 6), "level"),
        (lambda: spte_kind(SHADOW, 1 << 64, 1), "spte"),
    ],
)
def test_what_does_not_fit_is_named(call: object, field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        call()  # type: ignore[operator]
    assert caught.value.field == field
    assert field in str(caught.value)


def test_what_is_no_number_is_named() -> None:
    with pytest.raises(ArgumentTypeError, match="pte_access"):
        make_spte(SHADOW, LEVEL[1], "7", 0, 0)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="spte"):
        decode_spte(1.0, SHADOW)  # type: ignore[arg-type]
