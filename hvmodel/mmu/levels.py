"""Levels of page tables: how many frames an entry covers, which entry an address takes, the 4 MiB pages of PSE-36.

A table of 8-byte entries has 512 of them, one of 4-byte entries 1024:

    bits of an address            56   48 47   39 38   30 29   21 20   12 11     0
    8-byte entries, by level     |   5   |   4   |   3   |   2   |   1   | offset |
                                             31       22 21       12 11     0
    4-byte entries, by level                |     2     |     1     | offset |

    level of an entry that maps      1      2      3       4        5
    frames of 4 KiB it covers        1    512    2^18    2^27     2^36
    name                            4K     2M      1G    512G     256T

Levels 4 and 5 map no page anywhere (`KVM_MAX_HUGEPAGE_LEVEL` is 3); their numbers say what a table's entry covers.

Source: linux:arch/x86/include/asm/pgtable_types.h (enum pg_level), arch/x86/include/asm/kvm_host.h
(KVM_HPAGE_GFN_SHIFT), arch/x86/kvm/mmu/{mmu_internal.h,spte.h,paging_tmpl.h} @v6.18.
"""

from __future__ import annotations

from ..arch.number import number

__all__ = [
    "KVM_MAX_HUGEPAGE_LEVEL",
    "LEVEL_NAMES",
    "PG_LEVEL_1G",
    "PG_LEVEL_2M",
    "PG_LEVEL_4K",
    "PG_LEVEL_256T",
    "PG_LEVEL_512G",
    "PG_LEVEL_NONE",
    "PG_LEVEL_NUM",
    "PT32E_ROOT_LEVEL",
    "PT32_ROOT_LEVEL",
    "PT64_ROOT_4LEVEL",
    "PT64_ROOT_5LEVEL",
    "PT64_ROOT_MAX_LEVEL",
    "gfn_round_for_level",
    "hpage_gfn_shift",
    "hpage_shift",
    "pages_per_hpage",
    "pse36_gfn_delta",
    "pt32_index",
    "shadow_pt_index",
    "spte_index",
]

# enum pg_level
PG_LEVEL_NONE, PG_LEVEL_4K, PG_LEVEL_2M, PG_LEVEL_1G, PG_LEVEL_512G, PG_LEVEL_256T, PG_LEVEL_NUM = range(7)

# The level of a root: of 2-level, PAE, 4-level and 5-level paging.
PT32_ROOT_LEVEL, PT32E_ROOT_LEVEL, PT64_ROOT_4LEVEL, PT64_ROOT_5LEVEL = 2, 3, 4, 5
PT64_ROOT_MAX_LEVEL = PT64_ROOT_5LEVEL

KVM_MAX_HUGEPAGE_LEVEL = PG_LEVEL_1G
"""The highest level of an entry that maps a page."""

LEVEL_NAMES = {1: "4K", 2: "2M", 3: "1G", 4: "512G", 5: "256T"}
"""What an entry of each level covers."""

_PAGE_SHIFT = 12
_LEVEL_BITS, _LEVEL_BITS_32 = 9, 10
_PSE36_FIRST_BIT, _PSE36_BITS = 13, 4  # of the directory entry
_PSE36_SHIFT = 32 - _PSE36_FIRST_BIT - _PAGE_SHIFT  # entry bit 13 is address bit 32, and so bit 20 of the frame


def hpage_gfn_shift(level: int) -> int:
    """log2 of `pages_per_hpage(level)`: 0, 9, 18, 27, 36 (KVM_HPAGE_GFN_SHIFT).  ArgumentError: a level not 1 to 5.

    >>> [hpage_gfn_shift(level) for level in (1, 2, 3)]
    [0, 9, 18]
    """
    return (number("hpage_gfn_shift", "level", level, PG_LEVEL_256T, PG_LEVEL_4K) - 1) * _LEVEL_BITS


def hpage_shift(level: int) -> int:
    """log2 of the bytes that an entry of this level covers: 12, 21, 30, 39, 48 (KVM_HPAGE_SHIFT).

    ArgumentError: a level not 1 to 5.

    >>> 1 << hpage_shift(PG_LEVEL_2M) == 2 << 20
    True
    """
    return (number("hpage_shift", "level", level, PG_LEVEL_256T, PG_LEVEL_4K) - 1) * _LEVEL_BITS + _PAGE_SHIFT


def pages_per_hpage(level: int) -> int:
    """Frames of 4 KiB that an entry of this level covers (KVM_PAGES_PER_HPAGE).  ArgumentError: a level not 1 to 5.

    >>> [pages_per_hpage(level) for level in (1, 2, 3)]
    [1, 512, 262144]
    """
    return 1 << (number("pages_per_hpage", "level", level, PG_LEVEL_256T, PG_LEVEL_4K) - 1) * _LEVEL_BITS


def gfn_round_for_level(gfn: int, level: int) -> int:
    """The first frame that the entry of this level covers which covers `gfn` (0 to 2**64-1).

    ArgumentError: a level not 1 to 5, or a `gfn` of more than 64 bits.

    >>> hex(gfn_round_for_level(0x12345, PG_LEVEL_2M))
    '0x12200'
    """
    gfn = number("gfn_round_for_level", "gfn", gfn)
    level = number("gfn_round_for_level", "level", level, PG_LEVEL_256T, PG_LEVEL_4K)
    return gfn & -1 << (level - 1) * _LEVEL_BITS


def shadow_pt_index(addr: int, level: int) -> int:
    """The entry, 0 to 511, that an address takes in a table of this level of 8-byte entries (SPTE_INDEX).

    ArgumentError: a level not 1 to 5, or an `addr` of more than 64 bits.

    >>> [shadow_pt_index(0xFFFF_8080_4060_1000, level) for level in (4, 3, 2, 1)]
    [257, 1, 3, 1]
    """
    addr = number("shadow_pt_index", "addr", addr)
    level = number("shadow_pt_index", "level", level, PG_LEVEL_256T, PG_LEVEL_4K)
    return addr >> (level - 1) * _LEVEL_BITS + _PAGE_SHIFT & (1 << _LEVEL_BITS) - 1


def pt32_index(addr: int, level: int) -> int:
    """The entry, 0 to 1023, that an address takes in a table of level 1 or 2 of 4-byte entries.

    ArgumentError: a level not 1 to 2, or an `addr` of more than 32 bits.

    >>> pt32_index(0xC0101000, 2), pt32_index(0xC0101000, 1)
    (768, 257)
    """
    addr = number("pt32_index", "addr", addr, (1 << 32) - 1)
    level = number("pt32_index", "level", level, PT32_ROOT_LEVEL, PG_LEVEL_4K)
    return addr >> (level - 1) * _LEVEL_BITS_32 + _PAGE_SHIFT & (1 << _LEVEL_BITS_32) - 1


def spte_index(sptep: int) -> int:
    """The entry, 0 to 511, at this address inside a table of 8-byte entries; the table is 4 KiB, aligned.

    ArgumentError: an address of more than 64 bits.

    >>> spte_index(0xFFFF_8881_0000_0FF8)
    511
    """
    return number("spte_index", "sptep", sptep) >> 3 & (1 << _LEVEL_BITS) - 1


def pse36_gfn_delta(gpte: int) -> int:
    """What bits 16:13 of a 4 MiB directory entry add to its frame: bits 35:32 of the address (PSE-36).

    KVM always takes the guest to have PSE-36.  ArgumentError: an entry of more than 32 bits.

    >>> hex(pse36_gfn_delta(0x0040_20E7))
    '0x100000'
    """
    gpte = number("pse36_gfn_delta", "gpte", gpte, (1 << 32) - 1)
    return (gpte & ((1 << _PSE36_BITS) - 1) << _PSE36_FIRST_BIT) << _PSE36_SHIFT
