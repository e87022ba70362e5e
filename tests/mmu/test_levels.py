"""Levels: sizes and indices from the manual's bit positions, and rounding as a division would do it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError
from hvmodel.mmu import levels

# Intel SDM volume 3, tables 5-18 to 5-20: what an entry covers.
SIZES = {1: 4 << 10, 2: 2 << 20, 3: 1 << 30, 4: 512 << 30, 5: 256 << 40}


@pytest.mark.parametrize("level", SIZES)
def test_sizes(level: int) -> None:
    assert 1 << levels.hpage_shift(level) == SIZES[level]
    assert levels.pages_per_hpage(level) == SIZES[level] // 4096 == 1 << levels.hpage_gfn_shift(level)


def test_names_of_levels() -> None:
    assert [getattr(levels, f"PG_LEVEL_{name}") for name in levels.LEVEL_NAMES.values()] == list(levels.LEVEL_NAMES)
    assert (levels.PG_LEVEL_NONE, levels.PG_LEVEL_NUM) == (0, 6)
    assert levels.KVM_MAX_HUGEPAGE_LEVEL == 3
    roots = (levels.PT32_ROOT_LEVEL, levels.PT32E_ROOT_LEVEL, levels.PT64_ROOT_4LEVEL, levels.PT64_ROOT_5LEVEL)
    assert roots == (2, 3, 4, 5)
    assert levels.PT64_ROOT_MAX_LEVEL == 5


def test_rounding_is_a_division() -> None:
    rng = random.Random(5)
    for _ in range(300):
        gfn, level = rng.getrandbits(rng.randrange(65)), rng.randrange(1, 6)
        pages = SIZES[level] // 4096
        assert levels.gfn_round_for_level(gfn, level) == gfn // pages * pages
    assert levels.gfn_round_for_level(2**64 - 1, 5) == 0xFFFFFFF000000000


def test_indices_put_the_address_together_again() -> None:
    rng = random.Random(6)
    for _ in range(300):
        addr = rng.getrandbits(57)
        parts = [levels.shadow_pt_index(addr, level) << 12 + 9 * (level - 1) for level in range(1, 6)]
        assert sum(parts) + addr % 4096 == addr
        low = addr % 2**32
        assert (levels.pt32_index(low, 2) << 22) + (levels.pt32_index(low, 1) << 12) + low % 4096 == low
    assert levels.shadow_pt_index(2**64 - 1, 5) == 511


def test_spte_index() -> None:
    assert [levels.spte_index(0xFFFF888100000000 + 8 * at + 4096 * 7) for at in (0, 1, 511)] == [0, 1, 511]


def test_pse36() -> None:
    # Bits 16:13 of the entry are bits 35:32 of the address (SDM volume 3, table 5-4); a frame is 12 bits less.
    for bit in range(32):
        added = levels.pse36_gfn_delta(1 << bit) << 12
        assert added == (1 << bit - 13 + 32 if 13 <= bit <= 16 else 0)


@pytest.mark.parametrize(
    ("name", "args", "field"),
    [
        ("hpage_gfn_shift", (0,), "level"),
        ("hpage_shift", (6,), "level"),
        ("hpage_shift", (0,), "level"),
        ("hpage_gfn_shift", (6,), "level"),
        ("pages_per_hpage", (0,), "level"),
        ("pages_per_hpage", (6,), "level"),
        ("gfn_round_for_level", (1 << 64, 1), "gfn"),
        ("gfn_round_for_level", (0, 0), "level"),
        ("gfn_round_for_level", (0, 6), "level"),
        ("shadow_pt_index", (-1, 1), "addr"),
        ("shadow_pt_index", (0, 6), "level"),
        ("shadow_pt_index", (0, 0), "level"),
        ("pt32_index", (1 << 32, 1), "addr"),
        ("pt32_index", (0, 3), "level"),
        ("pt32_index", (0, 0), "level"),
        ("spte_index", (1 << 64,), "sptep"),
        ("pse36_gfn_delta", (1 << 32,), "gpte"),
    ],
)
def test_refusals(name: str, args: tuple[int, ...], field: str) -> None:
    with pytest.raises(ArgumentError, match=f"{name}: {field}="):
        getattr(levels, name)(*args)


def test_a_level_is_an_int() -> None:
    with pytest.raises(ArgumentTypeError):
        levels.pages_per_hpage("2")  # type: ignore[arg-type]


def test_the_ends_of_ranges_are_in_them() -> None:
    # Entries and addresses of two-level paging have 32 bits, others 64; a table has 512 entries, or 1024.
    narrow, wide = (1 << 32) - 1, (1 << 64) - 1
    assert levels.pse36_gfn_delta(narrow) == 0xF << 20  # bits 35:32 of the address
    assert levels.pt32_index(narrow, 1) == levels.pt32_index(narrow, 2) == 1023
    assert levels.shadow_pt_index(wide, 5) == levels.spte_index(wide) == 511
    assert levels.gfn_round_for_level(wide, 1) == wide
    calls: tuple[Callable[[], int], ...] = (
        lambda: levels.pse36_gfn_delta(narrow + 1),
        lambda: levels.pt32_index(narrow + 1, 1),
        lambda: levels.shadow_pt_index(wide + 1, 1),
        lambda: levels.spte_index(wide + 1),
        lambda: levels.gfn_round_for_level(wide + 1, 1),
    )
    for call in calls:
        with pytest.raises(ArgumentError):
            call()
