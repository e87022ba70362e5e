"""`walk_many` against `Walker.walk`: the same answers, for tables that are right and tables that are not."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

from hvmodel.arch.paging import PageTables
from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError
from hvmodel.mmu.guest_memory import GuestMemory
from hvmodel.mmu.walk import Walker
from hvmodel.ram import walk as many
from hvmodel.ram.walk import INVALID_GPA, Walks, walk_many

from ..cases import cases
from ..guest_tables import CONFIGS, PAGES, Config, address, memory, walker

W, U, F = 2, 4, 16
ACCESSES = (0, W, U, U | W, F, U | F)


def same(walks: Walker, gvas: list[int], access: int) -> Walks:
    """Holds the two against each other, and gives what walk_many found."""
    found = walk_many(walks, np.array(gvas, np.uint64), access)
    one = [walks.walk(gva, access) for gva in gvas]
    assert found.gva.tolist() == gvas
    assert found.gpa.tolist() == [INVALID_GPA if walk.gpa is None else walk.gpa for walk in one]
    assert found.error_code.tolist() == [-1 if walk.error_code is None else walk.error_code for walk in one]
    assert found.level.tolist() == [walk.level for walk in one]
    assert found.pte_access.tolist() == [walk.pte_access for walk in one]
    assert found.ok.tolist() == [walk.ok for walk in one]
    return found


@pytest.mark.parametrize("config", CONFIGS, ids=[config.name for config in CONFIGS])
def test_random_tables(config: Config) -> None:
    # 15 configurations, 100,000 walks and more of them together.
    rng = random.Random(config.name)
    faults = 0
    for seed in range(cases(2, 20)):
        walks = walker(memory(seed, config), config)
        for access in ACCESSES:
            found = same(walks, [address(rng, config) for _ in range(560)], access)
            faults += int(np.count_nonzero(~found.ok))
    assert 0 < faults < cases(2, 20) * len(ACCESSES) * 560


def well_made(levels: int, root: int = 0) -> tuple[PageTables, list[int]]:
    """Tables without a flaw: kernel and user, pages of three sizes, clean and dirty; and where something is mapped."""
    tables = PageTables(root, "4level" if levels == 4 else "5level", maxphyaddr=48, accessed=True, dirty=True)
    kernel = 0xFFFF_8880_0000_0000
    tables.map(kernel, 0, 64 << 20, page_size=4096)
    tables.map(kernel + (1 << 30), 0, 128 << 20, nx=True)
    tables.map(kernel + (2 << 30), 1 << 30, 2 << 30, page_size=1 << 30)
    tables.map(0x40_0000, 0x100_0000, 1 << 20, user=True, writable=False)
    tables.map(0x7F00_0000_0000, 0x200_0000, 32 << 20, user=True, nx=True, page_size=4096)
    return tables, [kernel, kernel + (1 << 30), kernel + (2 << 30), 0x40_0000, 0x7F00_0000_0000]


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("root", [0, 0x10_0000])
@pytest.mark.parametrize("block", [64, 16384])
def test_blocks_of_one_kind_and_mixed_ones(levels: int, root: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "_BLOCK", block)
    tables, starts = well_made(levels, root)
    cr4 = 1 << 5 | (1 << 12 if levels == 5 else 0)
    held = [(root, bytearray(tables.image()))] if root else tables.image()
    walks = Walker(held, cr3=root, cr4=cr4, maxphyaddr=48)
    rng = random.Random(levels)
    sizes = (64 << 20, 128 << 20, 2 << 30, 1 << 20, 32 << 20)
    alone = [[start + rng.randrange(size) for _ in range(100)] for start, size in zip(starts, sizes, strict=True)]
    for access in ACCESSES:
        for gvas in alone:
            same(walks, gvas, access)
            same(walks, gvas[:1], access)
        mixed = [gva for gvas in zip(*alone, strict=True) for gva in gvas]
        same(walks, mixed, access)
        same(walks, mixed + [rng.getrandbits(64) for _ in range(50)], access)


def test_the_uniform_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tables, starts = well_made(4)
    walks = Walker(tables.image(), maxphyaddr=48)

    def never(*_: object) -> None:
        raise AssertionError("a block went the mixed way")

    monkeypatch.setattr(many._Way, "_walk_mixed", never)
    offsets = np.arange(0, 1 << 20, 4096, dtype=np.uint64)
    for start in starts:
        assert walk_many(walks, np.uint64(start) + offsets).ok.all()
        assert not walk_many(walks, np.uint64(start) + offsets + np.uint64(1 << 40)).ok.any()
    together = np.concatenate([np.uint64(start) + offsets for start in (*starts, 1 << 40)])
    assert np.count_nonzero(walk_many(walks, together).ok) == len(starts) * len(offsets)
    with pytest.raises(AssertionError):
        walk_many(walks, [starts[0]])  # too few of them


def test_rights_that_differ_within_a_block() -> None:
    # Above: one entry that takes W away for half of the addresses.  Last entries: some dirty, some not, some NX.
    rng = random.Random(5)
    tables = PageTables(0)
    for at in range(0, 64 << 20, 1 << 21):
        tables.map(at, at, 1 << 21, page_size=4096, user=rng.random() < 0.5, nx=rng.random() < 0.5)
    image = bytearray(tables.image())
    words = memoryview(image).cast("Q")
    for at in range(3 * 512, len(words)):
        words[at] ^= rng.choice((0, 0x40)) | rng.choice((0, 2))
    for at in range(2 * 512, 2 * 512 + 16):
        words[at] &= ~2
    gvas = [rng.randrange(64 << 20) for _ in range(1000)]
    for cr4 in (1 << 5, 1 << 5 | 1 << 21, 1 << 5 | 1 << 22):
        walks = Walker(image, cr4=cr4, pkru=0x3)
        for access in ACCESSES:
            same(walks, gvas, access)


def test_pieces_that_are_not_whole_pages() -> None:
    config = CONFIGS[0]
    whole = memory(11, config)
    view = memoryview(whole)
    for cut in ((0, 0x2800, PAGES * 4096 - 4), (0, 0x3000, 0x5000, PAGES * 4096)):
        walks = walker([(start, view[start:end]) for start, end in itertools.pairwise(cut)], config)
        rng = random.Random(3)
        same(walks, [address(rng, config) for _ in range(300)], U)
    holes = walker([(0, view[:0x4000]), (0x8000, view[0x8000:])], config)
    found = same(holes, [address(rng, config) for _ in range(300)], 0)
    assert (found.error_code == 0).any()


def test_without_paging() -> None:
    same(Walker(bytes(8), cr0=1, cr4=0, efer=0), [0, 5, 0xFFFF_FFFF], W)


def test_it_reads_memory_anew() -> None:
    tables = PageTables(0)
    tables.map(0x40_0000, 0x1000, 0x1000)
    image = bytearray(tables.image())
    walks = Walker(image)
    assert walk_many(walks, [0x40_0000]).gpa.tolist() == [0x1000]
    image[0x3000:0x3008] = (0x9001).to_bytes(8, "little")
    assert walk_many(walks, [0x40_0000]).gpa.tolist() == [0x9000]
    walks.close()
    image.clear()  # nothing holds it
    with pytest.raises(ClosedError):
        walk_many(walks, [0x40_0000])


def test_kinds_of_addresses() -> None:
    walks = Walker(bytes(0x1000))
    kinds: list[Any] = [[], (1, 2), range(5), np.arange(3, dtype=np.int32), np.arange(9, dtype=np.uint64)[::3]]
    for given in kinds:
        found = walk_many(walks, given)
        assert len(found) == len(given) == len(found.gpa)
        assert found.gva.dtype == np.uint64
    assert walk_many(walks, [1 << 63, 5]).gva.tolist() == [1 << 63, 5]
    assert walk_many(walks, np.array([1, 1 << 40], ">u8")).gva.tolist() == [1, 1 << 40]
    mine = np.arange(3, dtype=np.uint64)
    mine.flags.writeable = False
    found = walk_many(walks, mine)
    mine.flags.writeable = True
    mine[0] = 7
    assert found.gva.tolist() == [0, 1, 2]
    assert repr(walk_many(walks, [1, 2])) == "<Walks of 2 addresses, 0 lead somewhere>"


@pytest.mark.parametrize("gvas", [[-1], [1 << 64], [-1, 1 << 63], [[1]], 5, np.array([-5])])
def test_addresses_that_are_none(gvas: object) -> None:
    with pytest.raises(ArgumentError):
        walk_many(Walker(bytes(0x1000)), gvas)  # type: ignore[arg-type]  # is what is asked


@pytest.mark.parametrize("gvas", [[1.0], ["a"], None, [None], [True], b"12", [[1], [2, 3]], [1j]])
def test_addresses_of_another_type(gvas: object) -> None:
    with pytest.raises(ArgumentTypeError):
        walk_many(Walker(bytes(0x1000)), gvas)  # type: ignore[arg-type]  # is what is asked


def test_other_arguments() -> None:
    walks = Walker(bytes(0x1000))
    with pytest.raises(ArgumentTypeError):
        walk_many(GuestMemory([(0, bytes(8))]), [1])  # type: ignore[arg-type]  # is what is asked
    with pytest.raises(ArgumentError):
        walk_many(walks, [1], 8)
    with pytest.raises(ArgumentError):
        walk_many(Walker(bytes(0x1000), efer=0), [1 << 32])
