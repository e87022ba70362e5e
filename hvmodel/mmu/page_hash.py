"""The hash table of shadow pages: which bucket a frame falls into, and how many pages collide there.

KVM finds a shadow page by the guest frame whose table it shadows and by its role, in a table of 4096 lists:

    bucket = gfn * 0x61C8864680B583EB mod 2**64 >> 52         the role is not hashed

A search goes through the bucket's list, newest page first, until it finds the page; every other frame on the way is a
collision, and the VM's statistic `max_mmu_page_hash_collisions` is the most that one search ever met.  Pages of the TDP
MMU (EPT, NPT) are not in the table.

By version: until 6.16 the table is an array in struct kvm_arch; since 6.17 (and in later stable kernels of 6.12) it is
a pointer, allocated with the VM or, with the TDP MMU, before the first shadow root.  The hash is the same.

Source: linux:include/linux/hash.h (hash_64_generic), arch/x86/kvm/mmu/mmu.c (kvm_page_table_hashfn,
kvm_mmu_find_shadow_page, kvm_mmu_alloc_shadow_page) @v6.18.
"""

from __future__ import annotations

from ..arch.number import ALL, number
from ..errors import ArgumentTypeError
from .role import PageRole

__all__ = [
    "GOLDEN_RATIO_64",
    "KVM_MMU_HASH_SHIFT",
    "KVM_NUM_MMU_PAGES",
    "PageHash",
    "hash_64",
    "kvm_page_table_hashfn",
]

KVM_MMU_HASH_SHIFT = 12
KVM_NUM_MMU_PAGES = 1 << KVM_MMU_HASH_SHIFT
"""Buckets of the table."""

GOLDEN_RATIO_64 = 0x61C8_8646_80B5_83EB
"""2**64 times (3 - sqrt(5)) / 2, made odd: what the kernel multiplies by to mix the bits of a number."""


def hash_64(value: int, bits: int) -> int:
    """The kernel's hash of 64 bits down to `bits` (1 to 64): the upper bits of a product.

    ArgumentError: a value of more than 64 bits, or `bits` out of range.

    >>> hex(hash_64(1, 12))
    '0x61c'
    """
    value, bits = number("hash_64", "value", value), number("hash_64", "bits", bits, 64, 1)
    return (value * GOLDEN_RATIO_64 & ALL) >> 64 - bits


def kvm_page_table_hashfn(gfn: int) -> int:
    """The bucket, 0 to 4095, of the shadow pages of a frame.  ArgumentError: a frame of more than 64 bits.

    >>> [kvm_page_table_hashfn(gfn) for gfn in (0x101, 0x1156, 0x21AB, 0x2BC3, 0x3C18)]
    [676, 676, 676, 676, 676]
    """
    return (number("kvm_page_table_hashfn", "gfn", gfn) * GOLDEN_RATIO_64 & ALL) >> 64 - KVM_MMU_HASH_SHIFT


class PageHash:
    """The table of one VM, and the statistic that it makes; one thread at a time.

    >>> pages = PageHash()
    >>> [(pages.get_page(gfn, PageRole(0x3704)), pages.max_collisions) for gfn in (0x101, 0x1156, 0x21AB, 0x101)]
    [(True, 0), (True, 1), (True, 2), (False, 2)]
    """

    def __init__(self) -> None:
        self._buckets: dict[int, list[tuple[int, int]]] = {}  # bucket -> (frame, role word), newest first
        #: The statistic max_mmu_page_hash_collisions of the VM; nothing lowers it.
        self.max_collisions = 0

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def __repr__(self) -> str:
        return f"<PageHash: {len(self)} pages, max_collisions {self.max_collisions}>"

    def get_page(self, gfn: int, role: PageRole) -> bool:
        """Find the page of this frame and role, or make it; whether it was made (kvm_mmu_get_shadow_page).

        A search for a page of level 2 or more also zaps pages of the same frame that are out of step with the guest;
        what is out of step is not known here, so say `zap` for those.

        ArgumentError: a frame of more than 64 bits.  ArgumentTypeError: `role` is no PageRole.
        """
        bucket = self._bucket(kvm_page_table_hashfn(gfn))
        wanted = (int(gfn), _word(role))
        collisions = 0
        found = False
        for page in bucket:
            if page == wanted:
                found = True
                break
            collisions += page[0] != wanted[0]
        self.max_collisions = max(self.max_collisions, collisions)
        if not found:
            bucket.insert(0, wanted)
        return not found

    def zap(self, gfn: int, role: PageRole) -> bool:
        """Take the page of this frame and role out; whether it was there.  Errors as `get_page`."""
        bucket, page = self._bucket(kvm_page_table_hashfn(gfn)), (int(gfn), _word(role))
        if page not in bucket:
            return False
        bucket.remove(page)
        return True

    def zap_all(self) -> None:
        """Take all pages out, as a memslot that goes does (KVM_X86_QUIRK_SLOT_ZAP_ALL); the statistic stays."""
        self._buckets.clear()

    def chain(self, bucket: int) -> tuple[tuple[int, PageRole], ...]:
        """The pages (frame, role) of a bucket, 0 to 4095, newest first.  ArgumentError: another bucket."""
        bucket = number("PageHash.chain", "bucket", bucket, KVM_NUM_MMU_PAGES - 1)
        return tuple([(gfn, PageRole(word)) for gfn, word in self._buckets.get(bucket, ())])

    def _bucket(self, bucket: int) -> list[tuple[int, int]]:
        return self._buckets.setdefault(bucket, [])


def _word(role: object) -> int:
    if not isinstance(role, PageRole):
        raise ArgumentTypeError("PageHash", "role", role, "a PageRole")
    return role.word
