"""The hash of shadow pages: the product worked out here, collisions counted by hand, and KVM's own count."""

from __future__ import annotations

import random

import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError
from hvmodel.mmu.page_hash import (
    GOLDEN_RATIO_64,
    KVM_MMU_HASH_SHIFT,
    KVM_NUM_MMU_PAGES,
    PageHash,
    hash_64,
    kvm_page_table_hashfn,
)
from hvmodel.mmu.role import PageRole
from hvmodel.witness import run
from tests.need import need

ROLE = PageRole(0x3704)
SAME = (0x101, 0x1156, 0x21AB, 0x2BC3, 0x3C18)  # frames whose roots the kernel's statistic showed to collide


def test_the_constant_is_the_golden_ratio() -> None:
    from math import isqrt

    # 2**64 * (3 - sqrt(5)) / 2 in whole numbers, and odd, as include/linux/hash.h has it.
    exact = ((3 << 64) - isqrt(5 << 128)) // 2
    assert exact | 1 == GOLDEN_RATIO_64
    assert (KVM_MMU_HASH_SHIFT, KVM_NUM_MMU_PAGES) == (12, 4096)


def test_the_hash_is_the_upper_bits_of_the_product() -> None:
    rng = random.Random(1)
    for _ in range(300):
        value, bits = rng.getrandbits(64), rng.randrange(1, 65)
        product = value * GOLDEN_RATIO_64 % 2**64
        assert hash_64(value, bits) == product // 2 ** (64 - bits)
        assert kvm_page_table_hashfn(value) == product // 2**52
    assert len({kvm_page_table_hashfn(gfn) for gfn in SAME}) == 1


def test_collisions() -> None:
    pages = PageHash()
    for number, gfn in enumerate(SAME):
        assert pages.get_page(gfn, ROLE)
        assert pages.max_collisions == number
    # Newest first: the last one is found at once, the first one behind all others.
    assert not pages.get_page(SAME[-1], ROLE)
    assert pages.chain(kvm_page_table_hashfn(SAME[0])) == tuple((gfn, ROLE) for gfn in reversed(SAME))
    pages.zap_all()
    assert (len(pages), pages.max_collisions) == (0, 4)
    assert pages.chain(kvm_page_table_hashfn(SAME[0])) == ()


def test_another_role_of_the_frame_is_no_collision() -> None:
    pages = PageHash()
    for level in (4, 3, 2, 1):
        assert pages.get_page(0x101, ROLE.replace(level=level))
    assert (len(pages), pages.max_collisions) == (4, 0)
    assert not pages.get_page(0x101, ROLE)


def test_a_page_behind_many_roles_of_another_frame() -> None:
    # It is found behind three pages of that frame, though none of those met more than one collision.
    pages = PageHash()
    pages.get_page(SAME[0], ROLE)
    for word in (0x3704, 0x1704, 0x5704):
        pages.get_page(SAME[1], PageRole(word))
    assert pages.max_collisions == 1
    assert not pages.get_page(SAME[0], ROLE)
    assert pages.max_collisions == 3


def test_zapping() -> None:
    pages = PageHash()
    for gfn in SAME[:3]:
        pages.get_page(gfn, ROLE)
    assert pages.zap(SAME[1], ROLE)
    assert not pages.zap(SAME[1], ROLE)
    assert not pages.zap(SAME[0], PageRole(0x1704))
    assert not pages.get_page(SAME[0], ROLE)
    assert pages.max_collisions == 2
    assert pages.get_page(SAME[1], ROLE)
    assert pages.max_collisions == 2
    assert repr(pages) == "<PageHash: 3 pages, max_collisions 2>"


def test_refusals() -> None:
    pages = PageHash()
    with pytest.raises(ArgumentError, match="kvm_page_table_hashfn: gfn="):
        kvm_page_table_hashfn(1 << 64)
    with pytest.raises(ArgumentError, match="gfn="):
        pages.get_page(-1, ROLE)
    with pytest.raises(ArgumentError, match="hash_64: value="):
        hash_64(1 << 64, 1)
    for bits in (0, 65):
        with pytest.raises(ArgumentError, match="hash_64: bits="):
            hash_64(1, bits)
    with pytest.raises(ArgumentError, match="bucket="):
        pages.chain(4096)
    assert pages.chain(4095) == ()
    for call in (pages.get_page, pages.zap):
        with pytest.raises(ArgumentTypeError, match="a PageRole"):
            call(1, 0x3704)  # type: ignore[arg-type]


def only(cases: int) -> tuple[int, int]:
    need("kvm", "root", "tracefs")
    (result,) = run(["page_hash"], cases=cases)
    if result.skipped:
        pytest.skip(result.lacking[0])
    return result.compared, result.mismatches


def test_the_kernel_counts_the_same() -> None:
    compared, mismatches = only(1500)
    assert compared >= 1500
    assert mismatches == 0


@pytest.mark.parametrize("wrong", ["constant", "order", "roles"])
def test_the_check_sees_a_wrong_model(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hvmodel.mmu import page_hash

    if wrong == "constant":
        monkeypatch.setattr(page_hash, "GOLDEN_RATIO_64", GOLDEN_RATIO_64 + (1 << 40))
    elif wrong == "order":
        # Pages go to the end of their list.
        class Last(list):  # type: ignore[type-arg]
            def insert(self, _at: object, page: object) -> None:
                self.append(page)

        monkeypatch.setattr(PageHash, "_bucket", lambda self, bucket: self._buckets.setdefault(bucket, Last()))
    else:
        monkeypatch.setattr(page_hash, "_word", lambda role: role.word & ~(1 << 13))
    assert only(800)[1]
