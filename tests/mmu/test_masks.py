"""The shadow_* masks: every bit by the manual's table of entries, every refusal of set_mmio_spte_mask, each version.

What the running kernel shows of them is compared by `hvmodel verify masks masks_rules`; EPT, NPT, encryption and L1TF
are compared here alone where the host has none of them.
"""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmodel.errors import ArgumentError, ArgumentTypeError
from hvmodel.mmu import ShadowMasks, reset_all_pte_masks
from hvmodel.mmu.masks import CHANGES, NEWEST, OLDEST, SPTE_MMIO_ALLOWED_MASK, kernel_version

BIT = [1 << bit for bit in range(64)]

# Intel SDM volume 3A, 4.5.4, table 4-20 (an entry that maps a 4-KByte page), and AMD APM volume 2, 5.4.1.  NPT tables
# have the format of the host's own: APM volume 2, 15.25.5.
P, RW, US, ACCESSED, DIRTY, XD = BIT[0], BIT[1], BIT[2], BIT[5], BIT[6], BIT[63]
LEGACY_IGNORED = (9, 10, 11)  # the same table: "Ignored"
# Intel SDM volume 3C, 29.3.2, table 29-7 (an EPT entry that maps a 4-KByte page).
EPT_R, EPT_W, EPT_X, EPT_A, EPT_D, EPT_SVE = BIT[0], BIT[1], BIT[2], BIT[8], BIT[9], BIT[63]
# The same table: 57 is "verify guest paging" and 58 "paging-write access", both "ignored" while the VM-execution
# controls of those names are 0; KVM sets neither (kernel arch/x86/kvm/vmx/vmx.h @v6.18).
EPT_IGNORED = (57, 58)
# 29.3.3.1: bits 2:0 = 110b is a misconfiguration.
EPT_WX = EPT_W | EPT_X


def rsvd_bits(low: int, high: int) -> int:
    return sum(BIT[bit] for bit in range(low, high + 1))


def test_shadow_paging_has_the_bits_of_a_page_table() -> None:
    masks = reset_all_pte_masks(46)
    assert (masks.kind, masks.version, masks.kvm_ad_enabled) == ("shadow", "6.18", True)
    assert (masks.user_mask, masks.accessed_mask, masks.dirty_mask) == (US, ACCESSED, DIRTY)
    assert (masks.nx_mask, masks.x_mask, masks.present_mask) == (XD, 0, P)
    assert (masks.acc_track_mask, masks.me_value, masks.me_mask, masks.memtype_mask) == (0, 0, 0, 0)
    assert (masks.host_writable_mask, masks.mmu_writable_mask) == tuple(BIT[at] for at in LEGACY_IGNORED[:2])
    assert (masks.has_mt_mask, masks.warnings) == (False, ())


def test_npt_has_the_same() -> None:
    shadow, npt = reset_all_pte_masks(48), reset_all_pte_masks(48, npt=True)
    assert npt.kind == "npt"
    assert npt == shadow.replace(kind="npt")


@pytest.mark.parametrize("ad", [False, True])
@pytest.mark.parametrize("exec_only", [False, True])
def test_ept_has_the_bits_of_its_entries(ad: bool, exec_only: bool) -> None:
    masks = reset_all_pte_masks(46).set_ept_masks(ad, exec_only)
    assert (masks.kind, masks.kvm_ad_enabled, masks.has_mt_mask) == ("ept", ad, True)
    assert (masks.user_mask, masks.nx_mask, masks.x_mask) == (EPT_R, 0, EPT_X)
    # Without A/D bits the processor ignores both (table 29-7), and KVM sets them itself.
    assert (masks.accessed_mask, masks.dirty_mask) == (EPT_A, EPT_D)
    assert masks.present_mask == (EPT_SVE if exec_only else EPT_SVE | EPT_R)
    assert masks.acc_track_mask == EPT_R | EPT_W | EPT_X
    assert (masks.host_writable_mask, masks.mmu_writable_mask) == tuple(BIT[at] for at in EPT_IGNORED)
    assert (masks.mmio_value, masks.mmio_mask) == (EPT_WX, EPT_R | EPT_W | EPT_X | EPT_SVE)
    assert (masks.mmio_access_mask, masks.enable_mmio_caching, masks.warnings) == (0, True, ())


def test_ept_leaves_the_masks_of_encryption_and_l1tf() -> None:
    before = reset_all_pte_masks(46, l1tf=True).set_me_spte_mask(0, BIT[45])
    after = before.set_ept_masks(True, True)
    for name in ("me_value", "me_mask", "nonpresent_or_rsvd_mask", "nonpresent_or_rsvd_lower_gfn_mask"):
        assert getattr(after, name) == getattr(before, name), name


# -- versions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "nonpresent", "sve", "ad_less", "memtype"),
    [
        # kernel arch/x86/kvm/mmu/spte.{c,h}: what the constants and kvm_mmu_set_ept_masks are in each.
        ("6.1", 0, 0, 0, 0x78),
        ("6.6", 0, 0, 0, 0x78),
        ("6.9", 0, 0, 0, 0x78),
        ("6.10", BIT[63], BIT[63], 0, 0x78),
        ("6.12", BIT[63], BIT[63], 0, 0x78),
        ("6.13", BIT[63], BIT[63], 0x300, 0x78),
        ("6.15", BIT[63], BIT[63], 0x300, 0x78),
        ("6.16", BIT[63], BIT[63], 0x300, 0),
        ("6.18", BIT[63], BIT[63], 0x300, 0),
    ],
)
def test_what_changed_from_kernel_to_kernel(
    version: str, nonpresent: int, sve: int, ad_less: int, memtype: int
) -> None:
    shadow = reset_all_pte_masks(46, version=version)
    ept = shadow.set_ept_masks(False, True)
    assert (shadow.version, shadow.nonpresent_value, shadow.memtype_mask) == (version, nonpresent, 0)
    assert shadow.frozen_spte == nonpresent | 0x5A0
    assert (ept.present_mask, ept.mmio_mask) == (sve, sve | 7)
    # Without A/D bits, memory type bits 5:3 and IPAT (SDM table 29-7: 5:3 and 6).
    assert (ept.accessed_mask | ept.dirty_mask, ept.memtype_mask) == (ad_less, memtype)
    assert shadow.set_ept_masks(True, True).accessed_mask == EPT_A


def test_versions_are_those_of_the_list_and_no_others() -> None:
    assert kernel_version("6.18.44-fc-v669") == NEWEST == (6, 18)
    assert kernel_version("6.1") == OLDEST
    steps = [kernel_version(version) for version, _ in CHANGES]
    assert steps == sorted(steps)
    for bad in ("6.19", "6.0", "5.15", "7.0", "6", "", "six.one", "6.x", "-6.1", "６.12"):
        with pytest.raises(ArgumentError, match=r"version=.*6\.1 to 6\.18"):
            reset_all_pte_masks(46, version=bad)
    with pytest.raises(ArgumentTypeError, match="version"):
        reset_all_pte_masks(46, version=6.18)  # type: ignore[arg-type]


def test_each_kernel_of_the_list_of_changes_changes_a_mask_or_a_rule() -> None:
    def shown(version: str) -> tuple[object, ...]:
        masks = reset_all_pte_masks(46, version=version)
        ept = masks.set_ept_masks(False, False)
        return tuple(getattr(m, f) for m in (masks, ept) for f in m.fields() if f != "version")

    for version in {version for version, text in CHANGES if "same numbers" not in text}:
        before = f"6.{int(version.partition('.')[2]) - 1}"
        assert shown(before) != shown(version), version


def test_a_vms_own_mmio_value_is_of_6_10() -> None:
    old = reset_all_pte_masks(46, version="6.9")
    with pytest.raises(ArgumentError, match=r"6\.10 or later"):
        old.set_mmio_spte_value(0)
    new = reset_all_pte_masks(46, version="6.10").set_mmio_spte_value(0)
    assert (new.mmio_value, new.enable_mmio_caching, new.mmio_mask) == (0, True, BIT[51] | P)


# -- MMIO ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phys_bits", range(32, 53))
def test_the_mmio_value_has_a_reserved_bit_while_there_is_one(phys_bits: int) -> None:
    masks = reset_all_pte_masks(phys_bits)
    # Bit 51 is reserved unless addresses have 52 bits (SDM table 4-20: bits 51:M must be 0).
    value = BIT[51] | P if phys_bits < 52 else 0
    assert (masks.mmio_value, masks.mmio_mask, masks.mmio_access_mask) == (value, value, RW | US)
    assert masks.enable_mmio_caching == (phys_bits < 52)
    assert masks.warnings == ()


def test_the_parameter_mmio_caching_makes_the_value_0_without_a_warning() -> None:
    masks = reset_all_pte_masks(46, mmio_caching=False)
    assert (masks.mmio_value, masks.mmio_mask, masks.enable_mmio_caching) == (0, BIT[51] | P, False)
    ept = masks.set_ept_masks(True, True)
    assert (ept.mmio_value, ept.enable_mmio_caching, ept.warnings) == (0, False, ())


BASE = reset_all_pte_masks(46)
L1TF = reset_all_pte_masks(46, l1tf=True)  # its bits 45:41 are moved to 50:46


@pytest.mark.parametrize(
    ("masks", "value", "mask", "word"),
    [
        (BASE, 0x8, 0x8, "beside 63, 51:12 and 2:0"),  # bit 3 is the generation's
        (BASE, BIT[51] | 1, BIT[51] | 1 | BIT[11], "beside 63, 51:12 and 2:0"),  # MMU present
        (BASE, 1, 1 | BIT[52], "beside 63, 51:12 and 2:0"),
        (L1TF, BIT[46] | 1, BIT[46] | 1, "L1TF's mask moves"),
        (L1TF, BIT[50] | 1, BIT[50] | 1, "L1TF's mask moves"),
        (BASE, BIT[51] | 1, BIT[51], "outside its mask"),
        # FROZEN_SPTE is bit 63 and 0x5a0: under a mask of bit 63 alone it is the value.
        (BASE, BIT[63], BIT[63], "frozen SPTE"),
    ],
)
def test_a_value_is_refused(masks: ShadowMasks, value: int, mask: int, word: str) -> None:
    refused = masks.set_mmio_spte_mask(value, mask, 6)
    assert (refused.mmio_value, refused.mmio_mask, refused.enable_mmio_caching) == (0, mask, False)
    assert len(refused.warnings) == 1
    assert word in refused.warnings[0]
    assert "MMIO caching is off" in refused.warnings[0]
    # The next call begins anew, from the module's parameter.
    again = refused.set_mmio_spte_mask(BIT[51] | 1, BIT[51] | 1, 6)
    assert (again.mmio_value, again.enable_mmio_caching) == (BIT[51] | 1, True)


@pytest.mark.parametrize(
    ("masks", "value", "mask"),
    [
        (BASE, BIT[63] | 1, BIT[63] | 1),  # a frozen SPTE reads as bit 63 alone
        (BASE, 6, 7),
        (BASE, 1, 1),
        (BASE, BIT[50] | 1, BIT[50] | 1),
        (L1TF, BIT[51] | 1, BIT[51] | 1),
        (BASE, rsvd_bits(46, 51) | 1, rsvd_bits(46, 51) | 1),
        (BASE.replace(version="6.6", nonpresent_value=0), BIT[63], BIT[63]),  # REMOVED_SPTE was 0x5a0
    ],
)
def test_a_value_is_taken(masks: ShadowMasks, value: int, mask: int) -> None:
    taken = masks.set_mmio_spte_mask(value, mask, 0)
    assert (taken.mmio_value, taken.mmio_mask, taken.warnings) == (value, mask, ())
    assert taken.enable_mmio_caching


def test_a_value_in_the_low_bits_of_the_address_is_taken_with_a_warning() -> None:
    taken = BASE.set_mmio_spte_mask(BIT[45], BIT[45], 0)
    assert (taken.mmio_value, taken.enable_mmio_caching) == (BIT[45], True)
    assert len(taken.warnings) == 1
    assert "of the address" in taken.warnings[0]
    assert "off" not in taken.warnings[0]


def test_a_warning_says_off_only_where_it_is_the_reason() -> None:
    # The parameter turned caching off: the value was 0 before any rule, and the bits of the address only warn.
    made = reset_all_pte_masks(46, mmio_caching=False).set_mmio_spte_mask(BIT[45], BIT[45], 0)
    assert made.warnings == ("MMIO value 0x200000000000 has bits 0x200000000000 of the address of the page",)
    assert (made.mmio_value, made.enable_mmio_caching) == (0, False)
    # A mask that is refused warns with any value.
    assert BASE.set_mmio_spte_mask(0, BIT[3] | BIT[12], 0).warnings == (
        "MMIO mask 0x1008 has bits 0x8 beside 63, 51:12 and 2:0: MMIO caching is off",
    )
    assert rsvd_bits(12, 51) | BIT[63] | 7 == SPTE_MMIO_ALLOWED_MASK


def test_every_rule_that_is_broken_is_told() -> None:
    refused = L1TF.set_mmio_spte_mask(BIT[46] | BIT[12], BIT[3], 0)
    # The value is already 0 when it is held against the mask: two rules, and the warning about the address.
    assert [text.split()[1] for text in refused.warnings] == ["value", "mask"]
    assert refused.mmio_value == 0


@given(
    value=st.integers(0, (1 << 64) - 1),
    extra=st.integers(0, (1 << 64) - 1),
    l1tf=st.booleans(),
    caching=st.booleans(),
    phys_bits=st.integers(32, 52),
)
def test_a_value_that_stands_breaks_no_rule(value: int, extra: int, l1tf: bool, caching: bool, phys_bits: int) -> None:
    masks = reset_all_pte_masks(phys_bits, l1tf=l1tf, mmio_caching=caching)
    made = masks.set_mmio_spte_mask(value, value | extra, 6)
    assert made.enable_mmio_caching == (made.mmio_value != 0)
    assert made.mmio_value in (0, value)
    if made.mmio_value:
        assert caching
        assert made.mmio_mask & (rsvd_bits(3, 11) | rsvd_bits(52, 62)) == 0
        assert made.frozen_spte & made.mmio_mask != made.mmio_value


# -- encryption, L1TF -----------------------------------------------------------------------------------------------


def test_an_encryption_value_outside_its_mask_makes_both_0() -> None:
    made = BASE.set_me_spte_mask(BIT[47], BIT[47])
    assert (made.me_value, made.me_mask, made.warnings) == (BIT[47], BIT[47], ())
    keys = BASE.set_me_spte_mask(0, rsvd_bits(40, 45))
    assert (keys.me_value, keys.me_mask) == (0, rsvd_bits(40, 45))
    refused = made.set_me_spte_mask(BIT[47] | BIT[51], BIT[47])
    assert (refused.me_value, refused.me_mask) == (0, 0)
    assert len(refused.warnings) == 1
    assert "outside its mask" in refused.warnings[0]


@pytest.mark.parametrize(
    ("phys", "cache", "low", "mask"),
    [
        # low = cache - 5, the mask is the five bits from there.
        (46, 46, 41, rsvd_bits(41, 45)),
        (39, 44, 39, rsvd_bits(39, 43)),
        (36, 36, 31, rsvd_bits(31, 35)),
        (46, None, 41, rsvd_bits(41, 45)),
    ],
)
def test_l1tf_takes_the_five_highest_bits_of_the_cache(phys: int, cache: int | None, low: int, mask: int) -> None:
    masks = reset_all_pte_masks(phys, l1tf=True, cache_bits=cache)
    assert masks.nonpresent_or_rsvd_mask == mask
    assert masks.nonpresent_or_rsvd_lower_gfn_mask == rsvd_bits(12, low - 1)
    assert masks.warnings == ()


@pytest.mark.parametrize("cache", [47, 52])
def test_l1tf_with_47_bits_or_more_has_no_room(cache: int) -> None:
    masks = reset_all_pte_masks(52, l1tf=True, cache_bits=cache)
    assert masks.nonpresent_or_rsvd_mask == 0
    assert masks.nonpresent_or_rsvd_lower_gfn_mask == rsvd_bits(12, 51)
    assert len(masks.warnings) == 1
    assert f"{cache} address bits" in masks.warnings[0]


def test_the_cache_looks_at_the_width_of_cpuid() -> None:
    # kernel arch/x86/kernel/cpu/common.c get_cpu_address_sizes: before bits of encryption are taken away.
    masks = reset_all_pte_masks(46, x86_phys_bits=40, l1tf=True)
    assert masks.nonpresent_or_rsvd_mask == rsvd_bits(41, 45)
    assert masks.nonpresent_or_rsvd_lower_gfn_mask == rsvd_bits(12, 40)


def test_without_l1tf_the_width_of_the_kernel_counts() -> None:
    masks = reset_all_pte_masks(46, x86_phys_bits=40, cache_bits=44)
    assert masks.nonpresent_or_rsvd_mask == 0
    assert masks.nonpresent_or_rsvd_lower_gfn_mask == rsvd_bits(12, 39)
    assert (masks.maxphyaddr, masks.x86_phys_bits) == (46, 40)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"phys_bits": 31}, "phys_bits"),
        ({"phys_bits": 53}, "phys_bits"),
        ({"phys_bits": 46, "x86_phys_bits": 47}, "x86_phys_bits"),
        ({"phys_bits": 46, "x86_phys_bits": 31}, "x86_phys_bits"),
        ({"phys_bits": 46, "cache_bits": 53}, "cache_bits"),
    ],
)
def test_a_width_that_is_none(arguments: dict[str, int], field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        reset_all_pte_masks(**arguments)  # type: ignore[arg-type]
    assert (caught.value.call, caught.value.field) == ("reset_all_pte_masks", field)


@pytest.mark.parametrize(
    ("call", "arguments", "field"),
    [
        ("set_mmio_spte_mask", (1 << 64, 0, 0), "value"),
        ("set_mmio_spte_mask", (0, -1, 0), "mask"),
        ("set_mmio_spte_mask", (0, 0, 1 << 32), "access"),  # BUG_ON: the access mask has 32 bits
        ("set_me_spte_mask", (1 << 64, 0), "value"),
        ("set_me_spte_mask", (0, 1 << 64), "mask"),
        ("set_mmio_spte_value", (-1,), "value"),
    ],
)
def test_a_number_that_does_not_fit(call: str, arguments: tuple[int, ...], field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        getattr(BASE, call)(*arguments)
    assert (caught.value.call, caught.value.field) == (call, field)


def test_masks_are_values() -> None:
    assert pickle.loads(pickle.dumps(BASE)) == BASE == reset_all_pte_masks(46)
    assert hash(BASE) == hash(reset_all_pte_masks(46))
    with pytest.raises(AttributeError):
        BASE.user_mask = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        BASE.replace(no_such_mask=1)
