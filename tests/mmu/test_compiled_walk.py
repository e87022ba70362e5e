"""Compiled walks give what `walk_addr`, the walk as it is written down, gives; and memory as it is."""

from __future__ import annotations

import random
import struct

import pytest

from hvmodel.arch.paging import PageTables
from hvmodel.mmu import compiled_walk
from hvmodel.mmu.permission import (
    PFERR_FETCH_MASK,
    PFERR_IMPLICIT_ACCESS,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)
from hvmodel.mmu.walk import Walker, walk_addr

from ..cases import cases
from ..guest_tables import CONFIGS, MODES, Config, address, four_levels, memory, walker

W, U, F = PFERR_WRITE_MASK, PFERR_USER_MASK, PFERR_FETCH_MASK
ACCESSES = (0, W, U, U | W, F, U | F, PFERR_IMPLICIT_ACCESS, PFERR_IMPLICIT_ACCESS | W)
PAE, PKE, PS = 1 << 5, 1 << 22, 1 << 7


@pytest.mark.parametrize("config", CONFIGS, ids=[config.name for config in CONFIGS])
def test_compiled_walks_are_the_same_walks(config: Config) -> None:
    rng = random.Random(config.name)
    outcomes = set()
    for seed in range(cases(1, 30)):
        held = memory(seed, config)
        walks = walker(held, config)
        gvas = [address(rng, config) for _ in range(cases(100, 600))]
        for access in ACCESSES:
            plain = [walk_addr(walks.mmu, walks.memory.entry, gva, access) for gva in gvas]
            for _ in range(2):
                assert [walks.walk(gva, access) for gva in gvas] == plain
            function = walks.function(access)
            assert [function(gva) for gva in gvas] == plain
            outcomes |= {(walk.error_code, walk.level, len(walk.entries)) for walk in plain}
    assert len(outcomes) > 12  # the tables are as mixed as they should be
    assert {None, True} == {code if code is None else True for code, _, _ in outcomes}


@pytest.mark.parametrize("mode", MODES)
def test_the_straight_way_is_taken(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = PageTables(0x1000, mode)  # type: ignore[arg-type]  # of MODES
    tables.map(0x40_0000, 0x40_1000, 0x3000, user=True)
    tables.map(0x80_0000, 0x80_0000, 0x40_0000, user=True)
    gvas = [0x40_1234, 0x80_1234]
    if "level" in mode:
        tables.map(0xFFFF_8000_0000_0000, 0x40_1000, 0x3000, user=True)
        tables.map(0xFFFF_FFFF_FFE0_0000, 0x40_0000, 0x20_0000, user=True)
        tables.map(0x40_0000_0000, 0x4000_0000, 0x4000_0000, user=True, page_size=1 << 30)
        gvas += [0xFFFF_8000_0000_1234, 0xFFFF_FFFF_FFFF_FFFF, 0x40_1234_5678]
    # The root's page is the last one of memory, and so is that of another table in turn.
    held = [(0x1000, tables.image())]
    for gpa in list(tables.pages())[1:]:
        start, image = held.pop()
        held += [(start, image[: gpa - start]), (gpa, image[gpa - start :])]
    registers = MODES[mode] | {"cr4": MODES[mode].get("cr4", PAE) | (PKE if "level" in mode else 0), "pkru": 0b1100}
    walks = Walker(held, cr3=tables.cr3, **registers)  # type: ignore[arg-type]  # of MODES
    asked = [(gva, access) for gva in gvas for access in (0, W, U, U | W, U | F)]
    first = [walks.walk(*one) for one in asked]

    def never(*_: object) -> None:
        raise AssertionError("walked by walk_addr")

    monkeypatch.setattr(compiled_walk, "walk_addr", never)
    assert [walks.walk(*one) for one in asked] == first
    assert all(walk.ok for walk in first)
    with pytest.raises(AssertionError):
        walks.walk(0x1000)


def test_the_straight_way_from_pdptrs(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = PageTables(0x1000, "pae")
    tables.map(0x4040_0000, 0x9000, 0x1000)
    held = struct.unpack_from("<4Q", tables.image())
    registers = {**MODES["pae"], "cr3": 0x1000}
    walks = Walker([(0x2000, tables.image()[0x1000:])], pdptrs=held, **registers)  # type: ignore[arg-type]  # of MODES
    first = walks.walk(0x4040_0123)
    monkeypatch.setattr(compiled_walk, "walk_addr", None)
    assert walks.walk(0x4040_0123) == first
    assert first.gpa == 0x9123


@pytest.mark.parametrize("key", range(16))
def test_every_key_is_looked_at(key: int) -> None:
    tables = four_levels(0x9007)
    walks = Walker(tables, cr3=0x1000, cr4=PAE | PKE, pkru=1 << 2 * key)
    for other in (0, key, *range(16)):
        tables[0x4000:0x4008] = (0x9007 | other << 59).to_bytes(8, "little")
        for _ in range(2):
            assert walks.walk(0x123, U).error_code == (0x25 if other == key else None)


def test_every_walk_reads_memory_anew() -> None:
    tables = four_levels(0x9007)
    walks = Walker(tables, cr3=0x1000)
    assert walks.walk(0x123).gpa == 0x9123
    for gpa, value, expected in (
        (0x4000, 0xA007, 0xA123),
        (0x3000, PS | 0x20_0000 | 7, 0x20_0123),
        (0x3000, 0x5007, None),
        (0x5000, 0xB007, 0xB123),
        (0x1000, 0, None),
        (0x1000, 0x2005, 0xB123),
    ):
        tables[gpa : gpa + 8] = value.to_bytes(8, "little")
        assert walks.walk(0x123).gpa == expected
        assert walks.walk(0x123).gpa == expected


def test_a_flood_of_values_is_forgotten() -> None:
    # 70,000 different entries of one level: more than a walker remembers the meaning of.
    tables = four_levels(0x9007)
    walks = Walker(tables, cr3=0x1000)
    for ignored in range(cases(2_000, 70_000)):
        struct.pack_into("<Q", tables, 0x3000, 0x4007 | (ignored & 0x7FF) << 52 | (ignored >> 11) << 8 & 0xF00)
        assert walks.walk(0x10).gpa == 0x9010


def test_keys_of_pages_of_the_supervisor_take_nothing_of_the_straight_way(monkeypatch: pytest.MonkeyPatch) -> None:
    # With SMAP a read of the supervisor comes to no user page, and keys are of user pages alone (SDM 5.6.2).
    walks = Walker(four_levels(0x9003 | 5 << 59), cr3=0x1000, cr4=PAE | PKE | 1 << 21, pkru=(1 << 32) - 1)
    first = [walks.walk(0x123, access) for access in (0, W)]
    assert [walk.gpa for walk in first] == [0x9123] * 2
    monkeypatch.setattr(compiled_walk, "walk_addr", None)
    assert [walks.walk(0x123, access) for access in (0, W)] == first


def known(walks: Walker) -> list[int]:
    """How many values of each level a walker remembers, from the root's on."""
    (held,) = [tables() for tables in walks.memory._out]
    assert held is not None
    return [len(values) for values in held.levels.values()]


def test_what_is_remembered_has_an_end() -> None:
    # 2**16 values of a level; then it begins anew.
    walks = Walker(four_levels(0x9007), cr3=0x1000)
    assert walks.walk(0x123).gpa == 0x9123
    assert known(walks) == [1, 1, 1]
    (held,) = [tables() for tables in walks.memory._out]
    assert held is not None
    held.levels[2].clear()
    held.levels[2].update(dict.fromkeys(range(1 - 2**16, 0)))  # no entry is negative
    assert walks.walk(0x123).gpa == 0x9123
    assert known(walks) == [1, 1, 2**16]
    del held.levels[2][0x4007]
    held.levels[2][-(2**16)] = None
    assert walks.walk(0x123).gpa == 0x9123
    assert known(walks) == [1, 1, 1]


def test_the_code_of_configurations_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    # 64 texts; then it begins anew.  The same text is compiled once.
    codes = dict.fromkeys([str(number) for number in range(63)], compile("", "", "exec"))
    monkeypatch.setattr(compiled_walk, "_codes", codes)
    first = compiled_walk._code("5")
    assert first is codes["5"]
    assert (compiled_walk._code("x = 1"), len(codes)) == (codes["x = 1"], 64)
    assert (compiled_walk._code("x = 1"), len(codes)) == (codes["x = 1"], 64)
    assert (compiled_walk._code("x = 2"), list(codes)) == (codes["x = 2"], ["x = 2"])


def test_a_walk_keeps_the_access_it_was_asked_for() -> None:
    # P is a bit that an access may have, and says nothing: the walk is that of 0, and says 1.
    walks = Walker(four_levels(0x9007), cr3=0x1000)
    for access in (0, 1, W, W | 1):
        for _ in range(2):
            assert walks.walk(0x123, access) == walk_addr(walks.mmu, walks.memory.entry, 0x123, access)
            assert walks.walk(0x123, access).access == access
