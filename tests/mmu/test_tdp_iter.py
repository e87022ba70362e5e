"""The TDP iterator against a recursion that visits the same tables, and its yields."""

from __future__ import annotations

import random
from typing import TypeAlias

import pytest

from hvmodel.errors import ArgumentError
from hvmodel.mmu.tdp_iter import TdpIter

PRESENT = 1 << 62  # of these tests: an entry that leads to the table in its low bits
Tables: TypeAlias = "dict[int, dict[int, int]]"


def tables_of(rng: random.Random, level: int, found: Tables) -> int:
    # A random tree: a few entries of each table lead on.
    number = len(found)
    entries: dict[int, int] = {}
    found[number] = entries
    for index in [*rng.sample(range(512), 4), 0, 511]:
        if level > 1 and rng.random() < 0.6:
            entries[index] = PRESENT | tables_of(rng, level - 1, found)
        else:
            entries[index] = rng.randrange(1, 1 << 20)  # a leaf
    return number


def make(found: Tables, root_level: int, **more: int) -> TdpIter:
    return TdpIter(
        0,
        root_level,
        lambda table, index: found[table].get(index, 0),
        lambda entry, level: entry & ~PRESENT if entry & PRESENT and level > 1 else None,
        **more,
    )


Visit: TypeAlias = "tuple[int, int, int]"  # level, frame, entry


def visits(found: Tables, table: int, level: int, base: int, start: int, end: int, min_level: int) -> list[Visit]:
    # What for_each_tdp_pte_min_level must visit, by recursion: entries that meet [start, end), in pre-order.
    pages = 512 ** (level - 1)
    seen: list[Visit] = []
    for index in range(512):
        gfn = base + index * pages
        if gfn + pages <= start or gfn >= end:
            continue
        entry = found[table].get(index, 0)
        seen.append((level, gfn, entry))
        if entry & PRESENT and level > min_level:
            seen += visits(found, entry & ~PRESENT, level - 1, gfn, start, end, min_level)
    return seen


@pytest.mark.parametrize("root_level", [1, 2, 3])
def test_it_visits_what_a_recursion_visits(root_level: int) -> None:
    rng = random.Random(root_level)
    for _ in range(6):
        found: Tables = {}
        tables_of(rng, root_level, found)
        top = 512**root_level
        for _ in range(4):
            # Near the entries that lead on, for most frames are not mapped.
            near = rng.choice([0, rng.choice(list(found[0])) * 512 ** (root_level - 1), rng.randrange(top)])
            start = min(near, top - 1)
            end = min(top, start + rng.randrange(1, 3000))
            min_level = rng.randrange(1, root_level + 1)
            it = make(found, root_level)
            seen = [(i.level, i.gfn, i.old_spte) for i in it.entries(start, end, min_level=min_level)]
            assert seen == visits(found, 0, root_level, 0, start, end, min_level)


def test_all_of_five_levels() -> None:
    # One entry of each table leads on: the last one, so that the walk goes up through all levels at its end.
    found: Tables = {level: {511: PRESENT | level + 1} for level in range(4)} | {4: {511: 7}}
    it = make(found, 5)
    seen = [(i.level, i.gfn) for i in it.entries(0, 512**5)]
    assert len(seen) == 5 * 512
    assert seen[-1] == (1, 512**5 - 1)
    assert not it.valid
    assert repr(it) == "<TdpIter at its end>"
    assert it.pt_path == [4, 3, 2, 1, 0]


def test_where_it_is() -> None:
    found: Tables = {0: {3: PRESENT | 1}, 1: {}}
    it = make(found, 2, as_id=1)
    it.start(1, 3 * 512 + 9)
    assert (it.sptep, it.level, it.gfn, it.next_last_level_gfn, it.as_id) == ((0, 3), 2, 3 * 512, 3 * 512 + 9, 1)
    it.next()
    assert (it.sptep, it.level, it.gfn, it.next_last_level_gfn) == ((1, 9), 1, 3 * 512 + 9, 3 * 512 + 9)
    it.next()
    assert (it.sptep, it.gfn, it.next_last_level_gfn) == ((1, 10), 3 * 512 + 10, 3 * 512 + 10)
    assert repr(it) == "<TdpIter level 1, gfn 0x60a, towards 0x60a>"


def test_a_new_iterator() -> None:
    it = make({0: {}}, 2)
    assert (it.root_level, it.level, it.min_level, it.pt_path) == (2, 2, 1, [None, 0, None, None, None])
    assert not it.valid
    assert not it.yielded
    zeros = ("next_last_level_gfn", "yielded_gfn", "gfn", "gfn_bits", "as_id", "old_spte")
    assert [getattr(it, name) for name in zeros] == [0] * 6
    assert it.sptep == (0, 0)


def test_it_reads_an_entry_again_before_it_goes_down() -> None:
    found: Tables = {0: {0: PRESENT | 1}, 1: {}}
    it = make(found, 2)
    it.start()
    del found[0][0]  # the table is gone
    it.next()
    assert (it.level, it.gfn) == (2, 512)


def test_a_yield_begins_at_the_root_and_goes_on() -> None:
    rng = random.Random(9)
    found: Tables = {}
    tables_of(rng, 3, found)
    it = make(found, 3)
    plain = [(i.level, i.gfn) for i in it.entries(0, 600_000)]
    it = make(found, 3)
    seen: list[tuple[int, int]] = []
    yields = 0
    for i in it.entries(0, 600_000):
        if rng.random() < 0.1 and i.cond_resched(need_resched=True):
            yields += 1
            continue  # as every caller does
        if (i.level, i.gfn) not in seen[-3:]:
            seen.append((i.level, i.gfn))
    assert yields > 10
    # Every entry is seen; those on the way down from the root again after a yield, and no others.
    assert set(seen) == set(plain)
    assert [visit for visit in seen if visit[0] == 1] == [visit for visit in plain if visit[0] == 1]


def test_yielding() -> None:
    found: Tables = {0: {}}
    it = make(found, 1)
    it.start()
    # At the start it has not gone on: no yield, whoever waits.
    assert it.cond_resched(need_resched=True, lock_contended=True) == ()
    it.next()
    assert it.cond_resched() == ()
    unlock, lock = "rcu_read_unlock", "rcu_read_lock"
    assert it.cond_resched(lock_contended=True) == (unlock, "cond_resched_rwlock_write", lock)
    state = it.yielded
    assert state
    with pytest.raises(ArgumentError, match="next comes between two yields"):
        it.cond_resched(need_resched=True)
    it.next()
    assert not it.yielded
    assert (it.level, it.gfn, it.yielded_gfn) == (1, 1, 1)
    # The same goal as the yield before: not again, until it goes on.
    assert it.cond_resched(need_resched=True, flush=True) == ()
    it.next()
    flush = "kvm_flush_remote_tlbs"
    assert it.cond_resched(need_resched=True, flush=True, shared=True) == (
        flush, unlock, "cond_resched_rwlock_read", lock,
    )  # fmt: skip


def test_gfn_bits_are_part_of_the_index_alone() -> None:
    # A mirror's bit 9: with one level more it chooses the second half... of a table of level 2 entry 1 instead of 0.
    found: Tables = {0: {1: PRESENT | 1}, 1: {}}
    it = make(found, 2, gfn_bits=512)
    it.start(1, 5)
    assert (it.sptep, it.gfn, it.old_spte) == ((0, 1), 0, PRESENT | 1)
    it.next()
    assert (it.level, it.gfn) == (1, 5)


def test_an_index_with_gfn_bits_ends_at_the_last_entry() -> None:
    # Bit 17 of the frame: the upper half of a table of level 2 alone, entries 256 to 511.
    it = make({0: {}}, 2, gfn_bits=1 << 17)
    assert [(i.sptep, i.gfn) for i in it.entries(0, 1 << 18)] == [((0, 256 + at), at << 9) for at in range(256)]
    with pytest.raises(ArgumentError, match=r"TdpIter\.start: gfn=.*below gfn_bits"):
        it.start(1, 1 << 17)
    it.start(1, (1 << 17) - 1)
    assert it.sptep == (0, 511)


def test_refusals() -> None:
    found: Tables = {0: {}}
    for level in (0, 6):
        with pytest.raises(ArgumentError, match="TdpIter: root_level="):
            make(found, level)
    with pytest.raises(ArgumentError, match="TdpIter: as_id="):
        make(found, 1, as_id=2)
    with pytest.raises(ArgumentError, match="TdpIter: gfn_bits="):
        make(found, 1, gfn_bits=1 << 64)
    it = make(found, 1)
    for min_level in (0, 2):
        with pytest.raises(ArgumentError, match=r"TdpIter\.start: min_level="):
            it.start(min_level)
    with pytest.raises(ArgumentError, match=r"TdpIter\.start: gfn="):
        it.start(1, 512)
    it.start(1, 511)
    assert it.valid
    with pytest.raises(ArgumentError, match=r"TdpIter\.entries: end="):
        next(it.entries(0, 1 << 64))
