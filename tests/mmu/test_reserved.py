"""Reserved bits, against the formats of the manual's tables (Intel SDM volume 3, 5-4 to 5-20 and chapter 30)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hvmodel.errors import ArgumentError
from hvmodel.mmu.reserved import ReservedBits, reset_guest_rsvds_bits_mask, reset_rsvds_bits_mask_ept


def bits(*spans: int | tuple[int, int]) -> int:
    """Bits by number, or (highest, lowest)."""
    found = 0
    for span in spans:
        high, low = span if isinstance(span, tuple) else (span, span)
        for bit in range(low, high + 1):
            found |= 1 << bit
    return found


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("width", [36, 46, 51, 52])
def test_long_mode(levels: int, width: int) -> None:
    plain, large = reset_guest_rsvds_bits_mask(levels, maxphyaddr=width).rsvd_bits_mask
    high = bits((51, width)) if width < 52 else 0
    # Table 5-15 to 5-20: PML5E, PML4E: PS is reserved.  A page of 1 GiB: 29:13, of 2 MiB: 20:13; 12 is PAT.
    assert plain[:3] == (high, high, high)
    assert plain[3] == large[3] == high | bits(7)
    assert plain[4] == large[4] == (high | bits(7) if levels == 5 else 0)
    assert large[0] == high  # PAT
    assert large[1] == high | bits((20, 13))
    assert large[2] == high | bits((29, 13))


def test_what_of_cpuid_and_efer_counts() -> None:
    plain, large = reset_guest_rsvds_bits_mask(4, maxphyaddr=48, gbpages=False, amd=True).rsvd_bits_mask
    # Seen in kernel 6.18: kvm_mmu.guest_rsvd_check of a guest with 48 bits, AMD, no 1 GiB pages.
    assert plain[:4] == (0xF000000000000, 0xF000000000000, 0xF000000000080, 0xF000000000180)
    assert large[:4] == (0xF000000000000, 0xF0000001FE000, 0xF00003FFFE080, 0xF000000000180)
    without = reset_guest_rsvds_bits_mask(4, maxphyaddr=48, gbpages=False, amd=True, nx=False).rsvd_bits_mask
    assert without[0][:4] == tuple(mask | bits(63) for mask in plain[:4])
    assert without[1][:4] == tuple(mask | bits(63) for mask in large[:4])


def test_pae() -> None:
    plain, large = reset_guest_rsvds_bits_mask(3, maxphyaddr=40).rsvd_bits_mask
    # Table 5-8: a PDPTE's 63:M, 8:5 and 2:1.  Tables 5-9 to 5-11: 62:M; of a page of 2 MiB 20:13.
    assert plain[2] == bits((63, 40), (8, 5), (2, 1))
    assert plain[:2] == (bits((62, 40)),) * 2
    assert large[:2] == (bits((62, 40)), bits((62, 40), (20, 13)))
    assert reset_guest_rsvds_bits_mask(3, maxphyaddr=40, nx=False).rsvd_bits_mask[0][0] == bits((63, 40))


def test_two_levels() -> None:
    # Table 5-4: a page of 4 MiB: with PSE-36 of 40 bits 20:13 are address, 21 is reserved; KVM takes 36 bits, 16:13.
    assert reset_guest_rsvds_bits_mask(2, pse=True).rsvd_bits_mask[1][:2] == (0, bits((21, 17)))
    assert reset_guest_rsvds_bits_mask(2, pse=True, pse36=False).rsvd_bits_mask[1][:2] == (0, bits((21, 13)))
    for masks in (reset_guest_rsvds_bits_mask(2), reset_guest_rsvds_bits_mask(0)):
        assert masks.rsvd_bits_mask == ((0,) * 5, (0,) * 5)
    assert reset_guest_rsvds_bits_mask(2, pse=True).rsvd_bits_mask[0] == (0,) * 5


def test_ept() -> None:
    plain, large = reset_rsvds_bits_mask_ept(maxphyaddr=46).rsvd_bits_mask
    high = bits((51, 46))
    # Tables 30-1, 30-2: 7:3 of a PML4E; tables 30-4, 30-6: 6:3 of what leads to a table; pages 29:12 and 20:12.
    assert plain == (high, high | bits((6, 3)), high | bits((6, 3)), high | bits((7, 3)), high | bits((7, 3)))
    assert large[:3] == (high, high | bits((20, 12)), high | bits((29, 12)))
    assert large[3:] == plain[3:]
    for level, at in ((2, 2), (1, 1)):
        fewer = reset_rsvds_bits_mask_ept(maxphyaddr=46, huge_page_level=level).rsvd_bits_mask
        assert fewer[1][at] & bits(7)
        assert not plain[at] & bits(7)


@pytest.mark.parametrize("execonly", [False, True])
def test_ept_values(execonly: bool) -> None:
    masks = reset_rsvds_bits_mask_ept(execonly=execonly)
    for low in range(64):
        memtype, r, w, x = low >> 3, low & 1, low >> 1 & 1, low >> 2 & 1
        # 30.3.3.1: writable and not readable; execute-only where that is not there; memory type 2, 3 or 7.
        wrong = (w and not r) or (x and not r and not execonly) or memtype in (2, 3, 7)
        assert bool(masks.bad_mt_xwr >> low & 1) == bool(wrong), low
        assert masks.is_rsvd_bits_set(low | 1 << 12, 1) == bool(wrong)


def test_the_mask_is_chosen_by_bit_7() -> None:
    masks = ReservedBits(((1 << 10, 0, 0, 0, 0), (1 << 11, 0, 0, 0, 0)))
    assert [masks.is_rsvd_bits_set(entry, 1) for entry in (1 << 10, 1 << 11, 1 << 10 | 0x80, 1 << 11 | 0x80)] == [
        True,
        False,
        False,
        True,
    ]
    assert not masks.is_rsvd_bits_set(1 << 10, 2)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: reset_guest_rsvds_bits_mask(1), "level"),
        (lambda: reset_guest_rsvds_bits_mask(4).is_rsvd_bits_set(1, 0), "level"),
        (lambda: reset_guest_rsvds_bits_mask(4).is_rsvd_bits_set(1, 6), "level"),
        (lambda: reset_guest_rsvds_bits_mask(4).is_rsvd_bits_set(1 << 64, 1), "entry"),
        (lambda: reset_guest_rsvds_bits_mask(6), "level"),
        (lambda: reset_guest_rsvds_bits_mask(4, maxphyaddr=53), "maxphyaddr"),
        (lambda: reset_guest_rsvds_bits_mask(4, maxphyaddr=31), "maxphyaddr"),
        (lambda: reset_rsvds_bits_mask_ept(maxphyaddr=31), "maxphyaddr"),
        (lambda: reset_rsvds_bits_mask_ept(huge_page_level=4), "huge_page_level"),
        (lambda: reset_rsvds_bits_mask_ept(huge_page_level=0), "huge_page_level"),
    ],
)
def test_refusals(call: Callable[[], object], field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        call()
    assert caught.value.field == field


def test_the_ends_of_ranges_are_in_them() -> None:
    # Physical addresses have 32 to 52 bits: bits 51:32 are reserved, or none.
    for width, high in ((32, bits((51, 32))), (52, 0)):
        assert reset_guest_rsvds_bits_mask(4, maxphyaddr=width).rsvd_bits_mask[0][0] == high
        assert reset_rsvds_bits_mask_ept(maxphyaddr=width).rsvd_bits_mask[0][0] == high
    for width in (31, 53):
        with pytest.raises(ArgumentError, match="maxphyaddr"):
            reset_guest_rsvds_bits_mask(4, maxphyaddr=width)
        with pytest.raises(ArgumentError, match="maxphyaddr"):
            reset_rsvds_bits_mask_ept(maxphyaddr=width)
    for level in (1, 2, 3):
        # 31.3.2: bit 7 of a PDE or PDPTE maps a page, where the processor has pages of that size.
        masks = reset_rsvds_bits_mask_ept(huge_page_level=level)
        assert [masks.is_rsvd_bits_set(1 | 6 << 3 | 1 << 7, at) for at in (1, 2, 3, 4, 5)] == [
            False,
            level < 2,
            level < 3,
            True,
            True,
        ]
    for level in (0, 4):
        with pytest.raises(ArgumentError, match="huge_page_level"):
            reset_rsvds_bits_mask_ept(huge_page_level=level)
