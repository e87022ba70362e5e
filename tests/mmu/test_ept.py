"""EPT against Intel's manual (volume 3, chapter 31 of edition 092): entries, EPTP, misconfigurations, violations."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable

import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError
from hvmodel.mmu.ept import (
    EPT_LEAF_1G,
    EPT_LEAF_2M,
    EPT_LEAF_4K,
    EPT_TABLE,
    EPTP,
    EptAccess,
    EptControls,
    EptOutcome,
    decode_ept_entry,
    decode_eptp,
    ept_access,
    ept_entry,
    ept_misconfigurations,
    ept_walk,
    eptp,
    is_ept_leaf,
    is_ept_present,
    sub_page_vector,
)
from hvmodel.mmu.qualification import decode_qualification

R, W, X, XU = 1, 2, 4, 1 << 10
WB = 6 << 3
PS = 1 << 7

# 31.3.2, tables 31-3, 31-5, 31-7: fields of an entry that maps a page (highest, lowest bit).
LEAF = {
    "r": (0, 0),
    "w": (1, 1),
    "x": (2, 2),
    "memory_type": (5, 3),
    "ignore_pat": (6, 6),
    "a": (8, 8),
    "d": (9, 9),
    "xu": (10, 10),
    "verify_guest_paging": (57, 57),
    "paging_write": (58, 58),
    "supervisor_shadow_stack": (60, 60),
    "suppress_ve": (63, 63),
}


@pytest.mark.parametrize(
    ("layout", "own"),
    [
        (EPT_LEAF_4K, {"address": (51, 12), "sub_page_write": (61, 61)}),
        (EPT_LEAF_2M, {"address": (51, 21), "page_size": (7, 7)}),
        (EPT_LEAF_1G, {"address": (51, 30), "page_size": (7, 7)}),
    ],
)
def test_fields_of_a_page(layout: object, own: dict[str, tuple[int, int]]) -> None:
    fields = {f.name: (f.high, f.low) for f in layout.members if not f.name.startswith("ignored")}  # type: ignore[attr-defined]
    assert fields == LEAF | own


def test_fields_of_a_table_and_of_the_eptp() -> None:
    fields = {f.name: (f.high, f.low) for f in EPT_TABLE.members if not f.name.startswith("ignored")}
    # tables 31-1, 31-2, 31-4, 31-6; bit 63 counts where such an entry is not present (28.5.8.1)
    assert fields == {
        "r": (0, 0),
        "w": (1, 1),
        "x": (2, 2),
        "a": (8, 8),
        "xu": (10, 10),
        "address": (51, 12),
        "suppress_ve": (63, 63),
    }
    # table 27-9
    assert {f.name: (f.high, f.low) for f in EPTP.members} == {
        "memory_type": (2, 0),
        "walk_length_minus_1": (5, 3),
        "ad": (6, 6),
        "supervisor_shadow_stack": (7, 7),
        "address": (51, 12),
    }


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("exec_only", [False, True])
def test_low_bits_that_are_misconfigured(level: int, exec_only: bool) -> None:
    # 31.3.3.1: bits 1:0 are 10b; 100b where that is not supported; types 2, 3 and 7 of a page; reserved bits of an
    # entry that refers to a table: 7:3 at levels 5 and 4, 6:3 at 3 and 2.
    controls = EptControls(exec_only=exec_only)
    for low in range(256):
        # ignored bits of every kind of entry: 11, 52 to 56, 59, 62
        high = (low & 1) << 11 | (low & 0x1F) << 52 | (low >> 1 & 1) << 59 | (low >> 2 & 1) << 62
        assert bool(ept_misconfigurations(low | high, level, controls)) == bool(
            ept_misconfigurations(low, level, controls)
        )
        leaf = level == 1 or (level in (2, 3) and low & PS)
        wrong = bool(low & 7) and (
            low & 3 == 2
            or (low & 7 == 4 and not exec_only)
            or (bool(leaf) and low >> 3 & 7 in (2, 3, 7))
            or (not leaf and bool(low & (0xF8 if level > 3 else 0x78)))
        )
        assert bool(ept_misconfigurations(low, level, controls)) == wrong, hex(low)
        assert is_ept_present(low) == bool(low & 7)
        assert bool(decode_ept_entry(low, level, controls).problems) == wrong
        if low & 7:
            assert is_ept_leaf(low, level) == bool(leaf)


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
def test_address_bits_that_are_misconfigured(level: int) -> None:
    # 31.3.2: below the page's size (20:12 of 2 MiB, 29:12 of 1 GiB), and from MAXPHYADDR to 51.
    leaf = R | WB | (PS if level > 1 else 0) if level < 4 else R
    for entry, size in ((leaf, 12 + 9 * (level - 1) if level < 4 else 12), (R | (WB if level == 1 else 0), 12)):
        for bit in range(12, 64):
            wrong = 46 <= bit < 52 or bit < size
            assert bool(ept_misconfigurations(entry | 1 << bit, level)) == wrong, (hex(entry), bit)
            wider = EptControls(maxphyaddr=52)
            assert bool(ept_misconfigurations(entry | 1 << bit, level, wider)) == (bit < size)
            assert not ept_misconfigurations((entry | 1 << bit) & ~7, level)  # not present: never


def test_page_sizes_the_processor_lacks() -> None:
    for level, name in ((2, "page_2m"), (3, "page_1g")):
        entry = R | WB | PS
        assert not ept_misconfigurations(entry, level)
        (rule,) = ept_misconfigurations(entry, level, EptControls(**{name: False}))
        assert "bit 7" in rule


def test_mode_based_execute_control() -> None:
    mbec = EptControls(mbec=True, exec_only=False)
    assert is_ept_present(XU, mbec=True)
    assert not is_ept_present(XU)
    # 31.3.3.1: bit 0 clear and bit 2 or 10 set, where execute-only is not supported
    for entry, wrong in ((XU | WB, True), (X | WB, True), (XU | R | WB, False), (X | XU | R | WB, False)):
        assert bool(ept_misconfigurations(entry, 1, mbec)) == wrong
    assert not ept_misconfigurations(XU | WB, 1, EptControls(mbec=True))
    leaf = ((4, R | W | X | XU), (3, R | W | X | XU), (2, R | W | X | XU))
    for bits, user, allowed in ((X, False, True), (X, True, False), (XU, True, True), (XU, False, False)):
        outcome = ept_access((*leaf, (1, bits | R | WB)), 0, EptAccess("fetch", user=user), EptControls(mbec=True))
        assert (outcome.exit is None) == allowed
        if not allowed:
            said = decode_qualification(48, outcome.qualification or 0)
            assert (said["executable"], said["user_executable"]) == (int(bits == X), int(bits == XU))


def test_paging_write_of_an_unreadable_page_is_misconfigured() -> None:
    # 31.3.3.1: with the control, for an entry that maps a page
    controls = EptControls(paging_write=True)
    for level, entry in ((1, X | WB | 1 << 58), (2, X | WB | PS | 1 << 58), (3, X | WB | PS | 1 << 58)):
        assert not ept_misconfigurations(entry, level)
        assert ept_misconfigurations(entry, level, controls)
        assert not ept_misconfigurations(entry | R, level, controls)
    for level in (2, 3, 4, 5):
        assert not ept_misconfigurations(X | 1 << 58, level, controls)
    # not present: never misconfigured (31.3.3.3)
    assert not ept_misconfigurations(1 << 58, 1, controls)


def test_encode_and_decode_agree() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        level = rng.randint(1, 5)
        leaf = level == 1 or (level < 4 and rng.random() < 0.5)
        shift = 12 + 9 * (level - 1) if leaf else 12
        address = rng.randrange(1 << 46 - shift) << shift
        read, write, execute, accessed, dirty, pat = (bool(rng.getrandbits(1)) for _ in range(6))
        memory_type = rng.choice((0, 1, 4, 5, 6))
        if write and not read:
            with pytest.raises(ArgumentError, match="10b"):
                ept_entry(address, level, read=read, write=write, execute=execute, leaf=leaf)
            continue
        entry = ept_entry(
            address,
            level,
            read=read,
            write=write,
            execute=execute,
            leaf=leaf,
            accessed=accessed,
            dirty=dirty,
            memory_type=memory_type,
            ignore_pat=pat,
        )
        expected = address | read | write << 1 | execute << 2 | accessed << 8
        if leaf:
            expected |= memory_type << 3 | pat << 6 | (level > 1) << 7 | dirty << 9
        assert entry == expected
        if entry & 7:
            decoded = decode_ept_entry(entry, level)
            assert not decoded.problems
            assert decoded["address"] << shift == address
            assert sum(part.value << part.low for part in decoded.parts) == entry


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"address": 0x1800, "level": 1}, "0x1000"),
        ({"address": 0x1000, "level": 2, "leaf": True}, "0x200000"),
        ({"address": 1 << 46, "level": 1}, "MAXPHYADDR"),
        ({"address": 0, "level": 0}, "level=0"),
        ({"address": 0, "level": 6}, "level=6"),
        ({"address": 0, "level": 4, "leaf": True}, "leaf"),
        ({"address": 0, "level": 1, "leaf": False}, "leaf"),
        ({"address": 0, "level": 1, "memory_type": 2}, "memory_type=2"),
        ({"address": 0, "level": 1, "nothing": 1}, "nothing"),
        ({"address": 0, "level": 1, "w": 0}, "argument write"),
        ({"address": 0, "level": 2, "leaf": True, "page_size": 0}, "argument leaf"),
        ({"address": 0, "level": 1, "xu": 2}, "ept_entry: xu=2"),
        ({"address": 0, "level": 1, "dirty": 2}, "ept_entry: dirty=2"),
    ],
)
def test_bad_entries_name_the_field(arguments: dict[str, int], word: str) -> None:
    with pytest.raises(ArgumentError, match=word):
        ept_entry(**arguments)  # type: ignore[arg-type]


def test_eptp() -> None:
    assert eptp(0x7000) == 0x7000 | 1 << 6 | 3 << 3 | 6
    assert eptp(0x7000, levels=5, ad=False, memory_type=0, sss=True) == 0x7000 | 1 << 7 | 4 << 3
    for arguments, word in (
        ({"levels": 3}, "levels=3"),
        ({"levels": 6}, "levels=6"),
        ({"memory_type": 1}, "memory_type=1"),
    ):
        with pytest.raises(ArgumentError, match=word):
            eptp(0x7000, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="0x1000"):
        eptp(0x7008)
    # 27.6.11, 29.2.1.1: what VM entry asks of it
    assert not decode_eptp(0x705E).problems
    for value, word in (
        (0x705F, "memory_type"),
        (0x7056, "walk_length_minus_1"),
        (0x715E, "bit 8"),
        (0x785E, "bit 11"),
        (1 << 52 | 0x705E, "bit 52"),
    ):
        assert any(word in problem for problem in decode_eptp(value).problems), hex(value)
    assert decode_eptp(1 << 45 | 0x705E, maxphyaddr=45).problems
    for bit, value in ((6, 0x701E), (14, 0x701E), (21, 0x705E), (23, 0x709E), (7, 0x7026), (8, 0x7018)):
        whole = (1 << 64) - 1
        assert not decode_eptp(value, capability=whole).problems
        assert any(f"bit {bit} of" in problem for problem in decode_eptp(value, capability=whole ^ 1 << bit).problems)


UPPER = ((4, R | W | X), (3, R | W | X), (2, R | W | X))


def test_violations_by_the_manuals_conditions() -> None:
    # 31.3.3.2 over every combination of rights in two of the entries: a read needs bit 0 of all, a write bit 1, a
    # fetch bit 2; table 30-7: bits 5:3 are their AND, 8:7 both set for the translation of a linear address.
    rights = [bits for bits in range(8) if bits & 3 != 2]
    for upper, leaf, (place, kind) in itertools.product(rights, rights, enumerate(("read", "write", "fetch"))):
        entries: tuple[tuple[int, int], ...] = ((4, 7), (3, 7), (2, upper), (1, leaf | WB))
        if not upper:
            entries = entries[:3]
        outcome = ept_access(entries, 0x5123, EptAccess(kind))
        both = upper & leaf if upper else 0
        if both >> place & 1:
            assert (outcome.exit, outcome.address) == (None, 0x123)
            assert outcome.accessed == (4, 3, 2, 1)
            assert outcome.dirty == ((1,) if kind == "write" else ())
        else:
            assert outcome.exit == "EPT_VIOLATION"
            assert outcome.qualification == 1 << place | both << 3 | 3 << 7
            assert outcome.rules


def test_a_misconfiguration_goes_before_a_violation() -> None:
    # 31.3.3.3: entries are looked at on the way down, rights only at the end of it.
    outcome = ept_access(((4, R), (3, W)), 0, EptAccess("write"))
    assert (outcome.exit, outcome.qualification) == ("EPT_MISCONFIG", None)
    # Not present comes before what is below, misconfigured before that: each ends the walk.
    tables = {0x1000: 0, 0x2000: W}
    assert ept_walk(lambda address: tables.get(address, 0), eptp(0x1000), 0).exit == "EPT_VIOLATION"
    tables = {0x1000: 0x2000 | R | 1 << 3, 0x2000: 0}
    outcome = ept_walk(lambda address: tables.get(address, 0), eptp(0x1000), 0)
    assert (outcome.exit, outcome.entries) == ("EPT_MISCONFIG", ((4, 0x2009),))
    # An entry of which only ignored bits are set is not present, reserved ones or not.
    assert ept_access(((4, 0xF8 | 1 << 51),), 0).exit == "EPT_VIOLATION"


def test_an_address_too_wide_for_four_levels() -> None:
    # 31.3.2: bits 51:48 are 0, or there is a violation; table 30-7 note 2: bits 5:3 are 0 then.
    entries = (*UPPER, (1, R | W | X | WB))
    for gpa in (1 << 48, 1 << 51):
        for outcome in (ept_access(entries, gpa), ept_walk(lambda _: 7, eptp(0x1000), gpa)):
            assert (outcome.exit, outcome.entries, outcome.qualification) == ("EPT_VIOLATION", (), 1 | 3 << 7)
    # Nothing is read for it.
    assert ept_walk(lambda _: pytest.fail("read"), eptp(0x1000), 1 << 48).exit == "EPT_VIOLATION"
    assert ept_access(((5, 7), *entries), 1 << 51).exit is None
    assert ept_access(entries, (1 << 48) - 1).exit is None


def test_guest_paging_structures() -> None:
    # 31.3.5: with bit 6 of the EPTP, accesses to guest paging structures are treated as writes.
    leaf = (*UPPER, (1, R | WB))
    table = EptAccess("read", final=False)
    assert ept_access(leaf, 0, table, EptControls(ad=False)).exit is None
    outcome = ept_access(leaf, 0, table)
    said = decode_qualification(48, outcome.qualification or 0)
    assert (said["read"], said["write"], said["linear_valid"], said["final"]) == (1, 1, 1, 0)
    # paging-write: bit 58 of the leaf lets the walker write all the same, and nobody else
    allowed = (*UPPER, (1, R | WB | 1 << 58))
    controls = EptControls(paging_write=True)
    assert ept_access(allowed, 0, table, controls).exit is None
    assert ept_access(allowed, 0, table, controls).dirty == (1,)
    # ... but not where an entry above has W clear, which bit 58 does not speak for
    for place in range(3):
        above = [(level, entry & ~W if place == at else entry) for at, (level, entry) in enumerate(UPPER)]
        assert ept_access((*above, allowed[3]), 0, table, controls).exit == "EPT_VIOLATION"
        above = [(level, entry & ~W | 1 << 58 if place == at else entry) for at, (level, entry) in enumerate(UPPER)]
        assert ept_access((*above, allowed[3]), 0, table, controls).exit == "EPT_VIOLATION"
    assert ept_access(leaf, 0, table, controls).exit == "EPT_VIOLATION"
    assert ept_access(allowed, 0, table).exit == "EPT_VIOLATION"
    assert ept_access(allowed, 0, EptAccess("write"), controls).exit == "EPT_VIOLATION"
    # An update of a flag is a write without bit 6 too: it needs W, or bit 58; a plain look is then a read.
    off, update = EptControls(ad=False), EptAccess(final=False, ad_update=True)
    outcome = ept_access(leaf, 0, update, off)
    said = decode_qualification(48, outcome.qualification or 0)
    assert said.set() == ("linear_valid", "readable", "write")
    assert ept_access(allowed, 0, update, EptControls(ad=False, paging_write=True)).exit is None
    assert ept_access(allowed, 0, update, EptControls(ad=False, paging_write=True)).dirty == ()
    # table 30-7 note 1: with bit 6 set both read and write are told
    said = decode_qualification(48, ept_access(leaf, 0, update).qualification or 0)
    assert (said["read"], said["write"]) == (1, 1)
    # the PDPTEs that MOV to CR loads have no linear address, and are reads even with bit 6
    for final in (False, True):
        outcome = ept_access(leaf, 0, EptAccess(linear=False, final=final))
        assert (outcome.exit, outcome.accessed, outcome.dirty) == (None, (4, 3, 2, 1), ())
    outcome = ept_access((*UPPER, (1, X | WB)), 0, EptAccess("read", linear=False))
    assert decode_qualification(48, outcome.qualification or 0).set() == ("executable", "read")


def test_guest_paging_verification() -> None:
    # 31.3.3.2: both controls, bit 57 of the page's entry, bit 58 of those that map the guest paging structures
    leaf = (*UPPER, (1, R | W | X | WB | 1 << 57))
    controls = EptControls(guest_paging_verification=True, paging_write=True)
    for lone in (EptControls(guest_paging_verification=True), EptControls(paging_write=True)):
        assert ept_access(leaf, 0, EptAccess(), lone, guest_tables_verified=False).exit is None
    unmarked = (*UPPER, (1, R | W | X | WB))
    assert ept_access(unmarked, 0, EptAccess(), controls, guest_tables_verified=False).exit is None
    table = EptAccess(final=False)
    assert ept_access(leaf, 0, table, controls, guest_tables_verified=False).exit is None
    assert ept_access(leaf, 0, EptAccess(), controls).exit is None
    assert ept_access(leaf, 0, EptAccess(), guest_tables_verified=False).exit is None
    outcome = ept_access(leaf, 0, EptAccess(), controls, guest_tables_verified=False)
    assert outcome.exit == "EPT_VIOLATION"
    assert decode_qualification(48, outcome.qualification or 0)["guest_paging_verification"] == 1
    assert outcome.qualification == 1 | 7 << 3 | 3 << 7 | 1 << 15
    assert ept_access(leaf, 0, EptAccess(linear=False), controls, guest_tables_verified=False).exit is None
    # A violation of another kind is no verification's.
    closed = (*UPPER, (1, R | WB | 1 << 57))
    outcome = ept_access(closed, 0, EptAccess("write"), controls, guest_tables_verified=False)
    assert decode_qualification(48, outcome.qualification or 0)["guest_paging_verification"] == 0
    memory = {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007, 0x4000: leaf[3][1]}
    assert ept_walk(lambda a: memory[a], eptp(0x1000), 0, None, controls, guest_tables_verified=False).exit is not None


def test_suppress_ve() -> None:
    # 28.5.8.1: bit 63 of the entry that is not present, or of the one that maps the page.
    controls = EptControls(ve=True)
    top = 1 << 63
    for entries, exit in (
        (((4, 0),), "VE"),
        (((4, top),), "EPT_VIOLATION"),
        (((4, R | top), (3, 0)), "VE"),
        ((*UPPER, (1, R | WB)), "VE"),
        ((*UPPER, (1, R | WB | top)), "EPT_VIOLATION"),
    ):
        assert ept_access(entries, 0, EptAccess("write"), controls).exit == exit
        assert ept_access(entries, 0, EptAccess("write")).exit == "EPT_VIOLATION"


def test_supervisor_shadow_stacks() -> None:
    # 31.3.3.2: reads and writes alike need R everywhere, W above the leaf (the leaf's own does not matter), and bit 60
    # of the leaf; only with bit 7 of the EPTP, and not for a user's shadow stack.
    controls = EptControls(sss=True)
    for kind in ("read", "write"):
        access = EptAccess(kind, shadow_stack=True)
        for upper, leaf, allowed in (
            (UPPER, R | WB | 1 << 60, True),
            (UPPER, R | W | WB | 1 << 60, True),
            (UPPER, R | W | WB, False),
            (UPPER, X | WB | 1 << 60, False),
            (((4, R | X), *UPPER[1:]), R | WB | 1 << 60, False),
        ):
            entries = (*upper, (1, leaf))
            outcome = ept_access(entries, 0, access, controls)
            assert (outcome.exit is None) == allowed
            if not allowed:
                said = decode_qualification(48, outcome.qualification or 0)
                assert (said["shadow_stack"], said["supervisor_shadow_stack"]) == (1, leaf >> 60 & 1)
            elif kind == "write":
                assert outcome.dirty == (1,)
            # otherwise as any read or write
            plain = ept_access(entries, 0, EptAccess(kind)).exit
            assert ept_access(entries, 0, access).exit == plain
            assert ept_access(entries, 0, EptAccess(kind, user=True, shadow_stack=True), controls).exit == plain
            assert ept_access(entries, 0, EptAccess(kind), controls).exit == plain


def test_advanced_exit_information() -> None:
    entries = ((4, 0),)
    access = EptAccess("write", user=True, nx_linear=True)
    plain = decode_qualification(48, ept_access(entries, 0, access).qualification or 0)
    more = decode_qualification(
        48, ept_access(entries, 0, access, EptControls(advanced_exit_info=True)).qualification or 0
    )
    assert set(more.set()) - set(plain.set()) == {"user_linear", "writable_linear", "nx_linear"}
    # valid only where bits 8 and 7 are set
    table = EptAccess("read", final=False, user=True)
    said = decode_qualification(
        48, ept_access(entries, 0, table, EptControls(advanced_exit_info=True)).qualification or 0
    )
    assert not {"user_linear", "writable_linear", "nx_linear"} & set(said.set())


def memory_of(words: dict[int, int]) -> Callable[[int], int]:
    return lambda address: words.get(address, 0)


def test_walks_of_tables_in_memory() -> None:
    # A gpa whose indices are 1, 2, 3, 4 (and 5 at the top), by hand.
    gpa = 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12 | 0x567
    words = {
        0x1000 + 8 * 1: 0x2000 | 7,
        0x2000 + 8 * 2: 0x3000 | 7,
        0x3000 + 8 * 3: 0x4000 | 7,
        0x4000 + 8 * 4: 0xABC000 | 7 | WB,
    }
    read = memory_of(words)
    assert ept_walk(read, eptp(0x1000), gpa, EptAccess("write")) == EptOutcome(
        None, 0xABC567, None, ((4, 0x2007), (3, 0x3007), (2, 0x4007), (1, 0xABC037)), (), (4, 3, 2, 1), (1,)
    )
    assert ept_walk(read, eptp(0x1000, ad=False), gpa).accessed == ()
    five = memory_of(words | {0x9000 + 8 * 5: 0x1000 | 7})
    outcome = ept_walk(five, eptp(0x9000, levels=5), 5 << 48 | gpa)
    assert (outcome.address, len(outcome.entries)) == (0xABC567, 5)
    # 2 MiB and 1 GiB: bits 20:0 and 29:0 of the gpa stay
    for table, address, size in ((0x3000 + 24, 0x4060_0000, 21), (0x2000 + 16, 0x8000_0000, 30)):
        large = memory_of(words | {table: address | 7 | WB | PS})
        assert ept_walk(large, eptp(0x1000), gpa).address == address | gpa & (1 << size) - 1
    missing = ept_walk(read, eptp(0x1000), 0)
    assert (missing.exit, missing.entries) == ("EPT_VIOLATION", ((4, 0),))
    for pointer, address, word in (
        (0x1000, 0, "pointer"),
        (eptp(0x1000), 1 << 52, "ept_walk: gpa"),
        (0x105F, 0, "pointer"),
        (1 << 46 | 0x105E, 0, "MAXPHYADDR 46"),
    ):
        with pytest.raises(ArgumentError, match=word):
            ept_walk(read, pointer, address)
    with pytest.raises(ArgumentTypeError, match=re.escape("ept_walk: read(0x1000): expected an int")):
        ept_walk(lambda _: None, eptp(0x1000), 0)  # type: ignore[arg-type, return-value]


def test_the_pointer_says_what_is_enabled() -> None:
    # Bits 6 and 7 of the EPTP count, not what the controls say of them.
    words = {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007, 0x4000: R | WB}
    read = memory_of(words)
    table, stack = EptAccess(final=False), EptAccess(shadow_stack=True)
    for ad, sss in itertools.product((False, True), repeat=2):
        pointer, other = eptp(0x1000, ad=ad, sss=sss), EptControls(ad=not ad, sss=not sss)
        assert (ept_walk(read, pointer, 0, table, other).exit is None) == (not ad)
        assert (ept_walk(read, pointer, 0, stack, other).exit is None) == (not sss)


def test_sub_page_permissions() -> None:
    # 31.3.4: 128-byte pieces; bit 2n of the vector allows piece n; indices as a 4-level walk's.
    gpa = 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12
    sppt = {
        0xA000 + 8: 0xB000 | 1,
        0xB000 + 16: 0xC000 | 1,
        0xC000 + 24: 0xD000 | 1,
        0xD000 + 32: 1 << 2 * 5,
    }
    ept = {
        0x1000 + 8: 0x2000 | 7,
        0x2000 + 16: 0x3000 | 7,
        0x3000 + 24: 0x4000 | 7,
        0x4000 + 32: 0xABC000 | R | WB | 1 << 61,
    }
    controls = EptControls(spp=True)
    read = memory_of(sppt | ept)
    assert sub_page_vector(read, 0xA000, gpa) == 1 << 10
    for piece in range(32):
        outcome = ept_walk(read, eptp(0x1000), gpa + 128 * piece, EptAccess("write"), controls, sub_page_table=0xA000)
        assert (outcome.exit is None) == (piece == 5)
    for address, value, why in (
        (0xC000 + 24, 0, "miss"),
        (0xB000 + 16, 0xC003, "misconfiguration"),
        (0xD000 + 32, 2, "misconfiguration"),
    ):
        broken = memory_of(sppt | ept | {address: value})
        assert sub_page_vector(broken, 0xA000, gpa) == why
        outcome = ept_walk(broken, eptp(0x1000), gpa, EptAccess("write"), controls, sub_page_table=0xA000)
        assert outcome.exit == "SPP_EVENT"
        assert decode_qualification(66, outcome.qualification or 0)["miss"] == int(why == "miss")
    # 31.3.4.2: bits 63:MAXPHYADDR of an entry are reserved
    wide = memory_of(sppt | {0xB000 + 16: 1 << 46 | 0xC000 | 1, 1 << 46 | 0xC000 + 24: 0xD000 | 1})
    assert sub_page_vector(wide, 0xA000, gpa) == 1 << 10
    assert sub_page_vector(wide, 0xA000, gpa, maxphyaddr=46) == "misconfiguration"
    assert sub_page_vector(read, 0xA000, 0xF << 48 | gpa) == 1 << 10  # bits 47:12 alone choose
    for pointer, word in ((0xA008, "0x1000"), (1 << 46, "pointer")):
        with pytest.raises(ArgumentError, match=word):
            sub_page_vector(read, pointer, gpa, maxphyaddr=46)
    # 31.3.4.1: eligible wherever some W is clear, also one above the leaf; a read-modify-write is a write
    closed = memory_of(sppt | ept | {0x2000 + 16: 0x3000 | R | X, 0x4000 + 32: 0xABC000 | R | W | WB | 1 << 61})
    for kind in ("write", "modify"):
        outcome = ept_walk(closed, eptp(0x1000), gpa + 640, EptAccess(kind), controls, sub_page_table=0xA000)
        assert (outcome.exit, outcome.dirty) == (None, (1,))
    # ... and where W is set everywhere the table is not asked
    plain = memory_of(ept | {0x4000 + 32: 0xABC000 | R | W | WB | 1 << 61})
    assert ept_walk(plain, eptp(0x1000), gpa, EptAccess("write"), controls, sub_page_table=0xA000).exit is None
    # Not eligible: without the control, without bit 61, for reads of what R forbids, for guest paging structures (which
    # are written, with bit 6 of the EPTP), for larger pages
    assert ept_walk(read, eptp(0x1000), gpa + 640, EptAccess("write")).exit == "EPT_VIOLATION"
    unmarked = memory_of(sppt | ept | {0x4000 + 32: 0xABC000 | R | WB})
    large = memory_of(sppt | ept | {0x3000 + 24: R | WB | PS | 1 << 61})
    for memory, access in (
        (unmarked, EptAccess("write")),
        (large, EptAccess("write")),
        (read, EptAccess(final=False)),
        (read, EptAccess(final=False, ad_update=True)),
    ):
        outcome = ept_walk(memory, eptp(0x1000), gpa + 640, access, controls, sub_page_table=0xA000)
        assert outcome.exit == "EPT_VIOLATION"
    with pytest.raises(ArgumentError, match="ept_walk: sub_page_table=None"):
        ept_walk(read, eptp(0x1000), gpa, EptAccess("write"), controls)
    with pytest.raises(ArgumentError, match="ept_access: sub_pages=None"):
        ept_access((*UPPER, (1, R | WB | 1 << 61)), 0, EptAccess("write"), controls)


def test_a_read_modify_write() -> None:
    # 30.2.1: it sets bit 1; whether bit 0 too is the processor's choice.  It needs R and W of every entry.
    modify = EptAccess("modify")
    assert ept_access((*UPPER, (1, R | W | WB)), 0, modify).dirty == (1,)
    outcome = ept_access((*UPPER, (1, R | WB)), 0, modify)
    assert outcome.qualification == 2 | 1 << 3 | 3 << 7
    unreadable = ((4, X), (3, 7), (2, 7), (1, R | W | X | WB))
    assert ept_access(unreadable, 0, modify).qualification == 2 | 1 << 5 | 3 << 7


def test_bad_accesses_name_the_field() -> None:
    none = EptControls()
    for entries, access, controls, word in (
        ((), EptAccess(), none, "entries"),
        (((4, 7), (2, 7)), EptAccess(), none, "one by one"),
        (((4, 7), (3, 7)), EptAccess(), none, "maps a page"),
        (((4, 0), (3, 7)), EptAccess(), none, "not present"),
        (((4, 2), (3, 0)), EptAccess(), none, "misconfigured"),
        (((3, 0),), EptAccess(), none, "level 5 or 4"),
        (((4, 0),), EptAccess("execute"), none, "access.kind='execute'"),
        (((4, 0),), EptAccess("fetch", final=False), none, "access.kind='fetch'"),
        (((4, 0),), EptAccess("fetch", linear=False), none, "access.kind='fetch'"),
        (((4, 0),), EptAccess(ad_update=True), none, "access.ad_update"),
        (((4, 0),), EptAccess("fetch", shadow_stack=True), none, "access.shadow_stack"),
        (((6, 0),), EptAccess(), none, "level=6"),
        (((4, 1 << 64),), EptAccess(), none, "entry"),
        (((4, 0),), EptAccess(), EptControls(maxphyaddr=60), "controls.maxphyaddr=0x3c"),
    ):
        with pytest.raises(ArgumentError, match=word):
            ept_access(entries, 0, access, controls)
    with pytest.raises(ArgumentError, match="ept_access: gpa"):
        ept_access(((4, 0),), 1 << 52)
    with pytest.raises(ArgumentTypeError, match="ept_access: access"):
        ept_access(((4, 0),), 0, "read")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="ept_misconfigurations: controls"):
        ept_misconfigurations(7, 1, True)  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
def test_every_bit_of_an_entry_is_shown_once(level: int) -> None:
    # Of an entry that is not present bits 62:3 are ignored, and bit 63 counts (28.5.8.1); of others all 64 are drawn.
    absent = decode_ept_entry(0, level)
    assert [(part.high, part.low) for part in absent.parts] == [(63, 63), (62, 3), (2, 2), (1, 1), (0, 0)]
    for entry in (R, R | PS) if level in (2, 3) else (R,):
        parts = decode_ept_entry(entry, level).parts
        bits = [bit for part in parts for bit in range(part.high, part.low - 1, -1)]
        reserved = {3: {3, 4, 5, 6}, 2: {3, 4, 5, 6}}.get(level, {3, 4, 5, 6, 7} if level > 3 else set())
        if entry & PS:
            reserved = set(range(12, 30 if level == 3 else 21))
        assert bits == [bit for bit in range(63, -1, -1) if bit not in reserved]


@pytest.mark.parametrize("width", [32, 46, 51, 52])
def test_addresses_end_at_maxphyaddr(width: int) -> None:
    # 27.6.11 and 31.3.2: bits 51:MAXPHYADDR are reserved, the one below is of the address.
    controls, first = EptControls(maxphyaddr=width), 1 << width
    last = first - 0x1000
    assert not decode_eptp(last | 0x5E, maxphyaddr=width).problems
    assert not ept_misconfigurations(last | R | WB, 1, controls)
    assert ept_entry(last, 1, controls=controls) == last | R | W | X | WB
    if width == 52:
        return
    assert (
        f"address bits {first:#x} are above MAXPHYADDR {width}" in decode_eptp(first | 0x5E, maxphyaddr=width).problems
    )
    assert ept_misconfigurations(first | R | WB, 1, controls) == (
        f"address bits {first:#x} are above MAXPHYADDR {width}",
    )


def test_widths_of_addresses_are_32_to_52() -> None:
    calls: tuple[Callable[[int], object], ...] = (
        lambda width: decode_eptp(0x5E, maxphyaddr=width),
        lambda width: ept_misconfigurations(R | WB, 1, EptControls(maxphyaddr=width)),
        lambda width: sub_page_vector(lambda _: 0, 0, 0, maxphyaddr=width),
    )
    for call in calls:
        for width in (32, 52):
            call(width)
        for width in (31, 53):
            with pytest.raises(ArgumentError, match=f"maxphyaddr={width:#x}|maxphyaddr={width}"):
                call(width)
    # Guest-physical addresses have 52 bits.
    last = (1 << 52) - 1
    assert ept_access(((5, 0),), last).exit == "EPT_VIOLATION"
    assert ept_walk(lambda _: 0, eptp(0x1000, levels=5), last).exit == "EPT_VIOLATION"
    assert sub_page_vector(lambda _: 0, 0, last) == "miss"
    assert ept_entry(last - 0xFFF, 1, controls=EptControls(maxphyaddr=52)) == last - 0xFFF | R | W | X | WB
    assert eptp(last - 0xFFF) == last - 0xFFF | 0x5E
    outside: tuple[Callable[[], object], ...] = (
        lambda: ept_access(((5, 0),), last + 1),
        lambda: ept_walk(lambda _: 0, eptp(0x1000, levels=5), last + 1),
        lambda: sub_page_vector(lambda _: 0, 0, last + 1),
        lambda: ept_entry(last + 1, 1),
        lambda: eptp(last + 1),
    )
    for one in outside:
        with pytest.raises(ArgumentError, match=r"gpa=|address="):
            one()
