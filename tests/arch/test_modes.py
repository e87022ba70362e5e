"""Modes and paging: every combination of the deciding bits against the tables of the manual."""

from __future__ import annotations

from inspect import signature
from itertools import product
from types import SimpleNamespace

import pytest

from hvmodel.arch.modes import Mode, Paging, default_bits, linear_bits, mode_of, mode_of_sregs, paging_of
from hvmodel.errors import ArgumentError, ArgumentTypeError

PE, PG, PSE, PAE, LA57, LME, LMA, VM = 1, 1 << 31, 1 << 4, 1 << 5, 1 << 12, 1 << 8, 1 << 10, 1 << 17

# Intel SDM volume 3, table 4-1 and figure 4-1; (CR0.PG, CR4.PAE, EFER.LMA, CR4.LA57, CR4.PSE) as a word of 0, 1 and
# "." for both, and what it says.
PAGING_TABLE = {
    "0....": Paging.NONE,
    "100.0": Paging.BITS32,
    "100.1": Paging.PSE,
    "110..": Paging.PAE,
    "1110.": Paging.LEVEL4,
    "1111.": Paging.LEVEL5,
}
# The same of modes; (CR0.PE, EFER.LMA, RFLAGS.VM, CS.L, CS.D): Intel SDM volume 3, 2.2 and 5.2.1.
MODE_TABLE = {
    "0....": Mode.REAL,
    "101..": Mode.VM86,
    "100.0": Mode.PROTECTED16,
    "100.1": Mode.PROTECTED32,
    "11.00": Mode.COMPAT16,
    "11.01": Mode.COMPAT32,
    "11.10": Mode.LONG,
}


def looked_up(table: dict[str, Mode] | dict[str, Paging], bits: tuple[int, ...]) -> object:
    found = [
        answer
        for word, answer in table.items()
        if all(mark in (".", str(bit)) for mark, bit in zip(word, bits, strict=True))
    ]
    assert len(found) <= 1, "the table says two things"
    return found[0] if found else None


@pytest.mark.parametrize("bits", list(product((0, 1), repeat=5)))
def test_paging(bits: tuple[int, ...]) -> None:
    pg, pae, lma, la57, pse = bits
    cr0, cr4, efer = pg * PG | PE, pae * PAE | la57 * LA57 | pse * PSE, lma * (LMA | LME)
    wanted = looked_up(PAGING_TABLE, bits)
    if wanted is None:  # long mode without PAE
        with pytest.raises(ArgumentError, match=r"CR4\.PAE"):
            paging_of(cr0, cr4, efer)
        return
    assert paging_of(cr0, cr4, efer) is wanted
    assert linear_bits(cr0, cr4, efer) == {Paging.LEVEL4: 48, Paging.LEVEL5: 57}.get(wanted, 32)


@pytest.mark.parametrize("bits", list(product((0, 1), repeat=5)))
def test_modes(bits: tuple[int, ...]) -> None:
    pe, lma, vm, l_bit, d_bit = bits
    arguments = (pe * PE, lma * (LMA | LME), vm * VM)
    wanted = looked_up(MODE_TABLE, bits)
    sregs = SimpleNamespace(cr0=arguments[0], efer=arguments[1], cs=SimpleNamespace(l=l_bit, db=d_bit))
    if wanted is None:  # CS.L with CS.D
        with pytest.raises(ArgumentError, match=r"CS\.D"):
            mode_of(*arguments, cs_l=l_bit, cs_db=d_bit)
        with pytest.raises(ArgumentError):
            mode_of_sregs(sregs, arguments[2])
        return
    assert mode_of(*arguments, cs_l=l_bit, cs_db=d_bit) is wanted
    assert mode_of_sregs(sregs, arguments[2]) is wanted


def test_what_goes_with_a_mode() -> None:
    assert [mode for mode in Mode if mode.is_long] == [Mode.COMPAT16, Mode.COMPAT32, Mode.LONG]
    assert [mode for mode in Mode if not mode.is_protected] == [Mode.REAL, Mode.VM86]
    assert [default_bits(mode) for mode in Mode] == [16, 16, 16, 32, 16, 32, 64]
    assert default_bits(Mode.REAL, cs_db=1) == 32


def test_what_goes_with_a_way_of_paging() -> None:
    # A table has 4096 bytes (PAE: its first 32), an entry's index the bits that are left: 2 x 10 + 12 = 32,
    # 2 + 2 x 9 + 12 = 32, 4 x 9 + 12 = 48, 5 x 9 + 12 = 57.
    for paging in Paging:
        if paging is Paging.NONE:
            assert (paging.levels, paging.entry_size) == (0, 0)
            continue
        width = {4: 10, 8: 9}[paging.entry_size]
        bits = paging.levels * width + 12 - (7 if paging is Paging.PAE else 0)
        assert bits == paging.linear_bits


def test_reset_state_is_real_mode() -> None:
    # Intel SDM volume 3, table 9-1.
    assert mode_of(0x60000010) is Mode.REAL
    assert paging_of(0x60000010) is Paging.NONE


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_numbers_that_no_register_has(value: int) -> None:
    with pytest.raises(ArgumentError):
        mode_of(value)
    with pytest.raises(ArgumentError):
        mode_of(1, value)
    with pytest.raises(ArgumentError):
        paging_of(PG | PE, value)
    with pytest.raises(ArgumentTypeError):
        paging_of("1")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError):
        mode_of_sregs(5)
    for name in ("efer", "rflags", "cs_l", "cs_db"):
        with pytest.raises(ArgumentError, match=name):
            mode_of(0, **{name: value})  # in real mode too, which they do not change
    with pytest.raises(ArgumentError, match="cs_l"):
        mode_of(1, cs_l=2)
    with pytest.raises(ArgumentError, match="mode"):
        default_bits("32-bit")  # type: ignore[arg-type]  # a way of paging, no mode


def test_flags_of_cs_are_bits_and_registers_are_0_by_default() -> None:
    for flags in ({"cs_l": 2}, {"cs_db": 2}):
        with pytest.raises(ArgumentError, match="0 to 1"):
            mode_of(1, **flags)
    for call in (mode_of, mode_of_sregs, paging_of, linear_bits, default_bits):
        defaults = [one.default for one in signature(call).parameters.values() if one.default is not one.empty]
        assert defaults == [0] * len(defaults) != []
