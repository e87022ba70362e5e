"""Which bits of a guest's page table entries are reserved: rsvd_bits_mask[bit 7][level - 1], and EPT's bad values.

    H = maxphyaddr..51, of PAE ..62; and bit 63 where EFER.NXE is 0

    2 levels, 4-byte entries           bit 7 = 0         bit 7 = 1
      PDE                              none              CR4.PSE: 21:17 (without PSE-36 21:13); else none
      PTE                              none              none (bit 7 is PAT)
    PAE
      PDPTE                            63 H 8:5 2:1      as bit 7 = 0 (bit 7 is in 8:5)
      PDE                              H                 H 20:13
      PTE                              H                 H
    4 and 5 levels
      PML5E, PML4E                     H 7, AMD: 8       the same
      PDPTE                            H                 H 29:13; both with bit 7 without 1 GiB pages
      PDE                              H                 H 20:13
      PTE                              H                 H
    EPT
      levels 5, 4                      H 7:3             the same
      level 3                          H 6:3             H 29:12; both with bit 7 without 1 GiB pages
      level 2                          H 6:3             H 20:12; both with bit 7 without 2 MiB pages
      level 1                          H                 H

    EPT, by bits 5:0 of the entry: memory type (5:3) 2, 3 and 7; RWX -W- and -WX; --X where execute-only is not there

KVM looks at rsvd_bits_mask[1][level - 1] for any entry with bit 7, page or not.

Sources: kernel arch/x86/kvm/mmu/mmu.c __reset_rsvds_bits_mask, reset_guest_rsvds_bits_mask,
__reset_rsvds_bits_mask_ept, arch/x86/kvm/mmu/spte.h __is_rsvd_bits_set, __is_bad_mt_xwr@v6.18; Intel SDM volume 3,
tables 5-4 to 5-20 and 30-1 to 30-7.
"""

from __future__ import annotations

from ..arch.number import number
from ..errors import ArgumentError
from ..value import Value

__all__ = ["ReservedBits", "reset_guest_rsvds_bits_mask", "reset_rsvds_bits_mask_ept"]

_LEVELS = (2, 3, 4, 5)


class ReservedBits(Value):
    """The kernel's struct rsvd_bits_validate: `rsvd_bits_mask[bit 7][level - 1]`, and `bad_mt_xwr`.

    Bit n of `bad_mt_xwr` is 1 where an EPT entry whose bits 5:0 are n is misconfigured; 0 for all but EPT.
    """

    rsvd_bits_mask: tuple[tuple[int, ...], tuple[int, ...]]
    bad_mt_xwr: int = 0

    def is_rsvd_bits_set(self, entry: int, level: int) -> bool:
        """Whether a present entry of this level (1 to 5) has a bit, or a value, that it must not have.

        ArgumentError: another level, more than 64 bits.

        >>> reset_guest_rsvds_bits_mask(4, maxphyaddr=48).is_rsvd_bits_set(1 << 50 | 1, 1)
        True
        """
        number("ReservedBits.is_rsvd_bits_set", "entry", entry)
        return self._is_set(entry, number("ReservedBits.is_rsvd_bits_set", "level", level, 5, 1))

    def _is_set(self, entry: int, level: int) -> bool:
        return bool(entry & self.rsvd_bits_mask[entry >> 7 & 1][level - 1] or self.bad_mt_xwr >> (entry & 0x3F) & 1)


def _bits(low: int, high: int) -> int:
    # Bits low to high; none where high is below low (the kernel's rsvd_bits).
    return (1 << high + 1) - (1 << low) if high >= low else 0


def reset_guest_rsvds_bits_mask(
    level: int,
    *,
    maxphyaddr: int = 52,
    nx: bool = True,
    gbpages: bool = True,
    pse: bool = False,
    amd: bool = False,
    pse36: bool = True,
) -> ReservedBits:
    """The reserved bits of a guest's tables of 2, 3 (PAE), 4 or 5 levels.

    `maxphyaddr`: the guest's, 32 to 52.  `nx`: EFER.NXE.  `gbpages`: its CPUID has 1 GiB pages.  `pse`: CR4.PSE, which
    counts with 2 levels only.  `amd`: its CPUID is AMD's or Hygon's.  `pse36`: 4 MiB pages reach 64 GiB; KVM always
    says so.  With `level` 0 (no paging) nothing is.

    kernel mmu/mmu.c reset_guest_rsvds_bits_mask@v6.18.  ArgumentError for what is out of range.

    >>> masks = reset_guest_rsvds_bits_mask(4, maxphyaddr=48, gbpages=False, amd=True)
    >>> [hex(mask) for mask in masks.rsvd_bits_mask[0][:4]]
    ['0xf000000000000', '0xf000000000000', '0xf000000000080', '0xf000000000180']
    """
    call = "reset_guest_rsvds_bits_mask"
    if number(call, "level", level) not in (0, *_LEVELS):
        raise ArgumentError(call, "level", level, "0 (no paging), 2, 3 (PAE), 4 or 5")
    number(call, "maxphyaddr", maxphyaddr, 52, 32)
    plain, large = [0] * 5, [0] * 5
    high = _bits(maxphyaddr, 62 if level == 3 else 51) | (0 if nx else 1 << 63)
    if level == 2:
        if pse:
            large[1] = _bits(17 if pse36 else 13, 21)
    elif level == 3:
        plain[0] = plain[1] = large[0] = high
        large[1] = high | _bits(13, 20)
        plain[2] = 1 << 63 | high | _bits(5, 8) | _bits(1, 2)
        # The kernel never looks a PDPTE up by its bit 7 = 1; bit 7 is reserved either way.
        large[2] = plain[2]
    elif level:
        no_1g = 0 if gbpages else 1 << 7
        plain[0] = plain[1] = large[0] = high
        large[1] = high | _bits(13, 20)
        plain[2], large[2] = high | no_1g, high | no_1g | _bits(13, 29)
        plain[3] = large[3] = high | 1 << 7 | (1 << 8 if amd else 0)
        if level == 5:
            plain[4] = large[4] = plain[3]
    return ReservedBits((tuple(plain), tuple(large)))


def reset_rsvds_bits_mask_ept(*, maxphyaddr: int = 52, execonly: bool = True, huge_page_level: int = 3) -> ReservedBits:
    """The reserved bits and bad values of EPT entries.

    `maxphyaddr`: 32 to 52.  `execonly`: entries that only permit to execute are there.  `huge_page_level`: the highest
    level that may map a page: 1 (4 KiB), 2 (2 MiB) or 3 (1 GiB).

    kernel mmu/mmu.c __reset_rsvds_bits_mask_ept@v6.18.  ArgumentError for what is out of range.

    >>> hex(reset_rsvds_bits_mask_ept(execonly=False).bad_mt_xwr)
    '0xff545454ffff5454'
    """
    call = "reset_rsvds_bits_mask_ept"
    number(call, "maxphyaddr", maxphyaddr, 52, 32)
    number(call, "huge_page_level", huge_page_level, 3, 1)
    high = _bits(maxphyaddr, 51)
    no_1g = 1 << 7 if huge_page_level < 3 else 0
    no_2m = 1 << 7 if huge_page_level < 2 else 0
    top = high | _bits(3, 7)
    plain = (high, high | _bits(3, 6) | no_2m, high | _bits(3, 6) | no_1g, top, top)
    large = (high, high | _bits(12, 20) | no_2m, high | _bits(12, 29) | no_1g, top, top)
    bad = 0
    for low in range(64):
        memtype, rwx = low >> 3, low & 7
        if memtype in (2, 3, 7) or rwx in (2, 6) or (rwx == 4 and not execonly):
            bad |= 1 << low
    return ReservedBits((plain, large), bad)
