"""The TCG walks: each access does what the manuals say, and the checks see a model that is wrong.

Error codes: SDM volume 3, 5.7: P 1, W 2, U 4, RSVD 8, F 0x10, PK 0x20; QEMU's RSVD comes without P.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError, HostError
from hvmodel.mmu import permission, reserved
from hvmodel.mmu import role as roles
from hvmodel.mmu import walk as walks
from hvmodel.witness import Lacking, check_tcg, run, tcg
from hvmodel.witness.gdbstub import GdbError
from hvmodel.witness.tcg import DONE, FREE, MODES, OPS, TcgAccess, TcgResult, TcgWalks, paging_mode
from tests.cases import cases
from tests.need import need

PG, WP, PE = 1 << 31, 1 << 16, 1
PSE, PAE, LA57, SMEP, SMAP, PKE = 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21, 1 << 22
LME, NXE = 1 << 8, 1 << 11
PF, GP = 14, 13
CODE = bytes.fromhex("b8 44332211 cd80 90")  # mov $0x11223344, %eax; int $0x80; nop
PAGE = FREE + 0x8000

#  mode -> CR4, EFER, an address whose indexes are all 1
SETTINGS = {
    "2-level": (0, 0, 1 << 22 | 1 << 12),
    "pae": (PAE, 0, 1 << 30 | 1 << 21 | 1 << 12),
    "4-level": (PAE, LME, 1 << 39 | 1 << 30 | 1 << 21 | 1 << 12),
    "5-level": (PAE | LA57, LME, 1 << 48 | 1 << 39 | 1 << 30 | 1 << 21 | 1 << 12),
}
LEVELS = {"2-level": 2, "pae": 3, "4-level": 4, "5-level": 5}


@pytest.fixture(scope="module")
def shared() -> Iterator[TcgWalks]:
    need("qemu")
    with TcgWalks() as emulated:
        yield emulated


@pytest.fixture
def emulated(shared: TcgWalks) -> TcgWalks:
    shared.ram[FREE : FREE + 0x10000] = bytes(0x10000)
    shared.ram[PAGE : PAGE + 8] = CODE
    return shared


def lay(emulated: TcgWalks, mode: str, leaf: int, upper: int = 7) -> None:
    """Tables in a row from FREE on, entry 1 of each: `upper`, and `leaf` in the last."""
    emulated.set_root(mode, FREE)
    size, levels = MODES[mode], LEVELS[mode]
    for at in range(levels):
        entry = leaf if at == levels - 1 else (FREE + 0x1000 * (at + 1)) | (1 if (mode, at) == ("pae", 0) else upper)
        place = FREE + 0x1000 * at + size
        emulated.ram[place : place + size] = entry.to_bytes(size, "little")


def entry(emulated: TcgWalks, mode: str, table: int) -> int:
    size = MODES[mode]
    at = FREE + 0x1000 * table + size
    return int.from_bytes(emulated.ram[at : at + size], "little")


def one(emulated: TcgWalks, mode: str, op: str = "load", *, offset: int = 0, **more: Any) -> TcgResult:
    cr4, efer, gva = SETTINGS[mode]
    cr0 = more.pop("cr0", PG | PE | WP)
    access = TcgAccess(gva + offset, op, cr0, FREE, cr4 | more.pop("cr4", 0), efer | more.pop("efer", 0), **more)
    (result,) = emulated.run([access])
    return result


def code_of(result: TcgResult) -> int | None:
    assert result.vector in (PF, DONE)
    return None if result.vector == DONE else result.error


# ---- accesses that succeed


@pytest.mark.parametrize("mode", SETTINGS)
@pytest.mark.parametrize("user", [False, True])
def test_each_operation(emulated: TcgWalks, mode: str, user: bool) -> None:
    lay(emulated, mode, PAGE | 7)
    size = 8 if LEVELS[mode] > 3 else 4
    value = 0x1122334455667788 & (1 << 8 * size) - 1
    assert one(emulated, mode, user=user).value == int.from_bytes(CODE[:size], "little")
    fetched = one(emulated, mode, "fetch", user=user)
    assert (fetched.vector, fetched.value, fetched.rip) == (DONE, 0x11223344, SETTINGS[mode][2] + 7)
    assert fetched.cs & 3 == 3 * user
    assert one(emulated, mode, "store", offset=8, value=value, user=user).vector == DONE
    assert emulated.ram[PAGE + 8 : PAGE + 16] == value.to_bytes(8, "little")
    assert one(emulated, mode, "exchange", offset=8, value=5, user=user).value == value
    assert emulated.ram[PAGE + 8] == 5
    assert one(emulated, mode, "implicit", user=user).vector == DONE


@pytest.mark.parametrize("mode", SETTINGS)
def test_accessed_and_dirty(emulated: TcgWalks, mode: str) -> None:
    lay(emulated, mode, PAGE | 7)
    last = LEVELS[mode] - 1
    one(emulated, mode)
    assert [entry(emulated, mode, at) & 0x60 for at in range(last + 1)] == [0x20] * (last + 1)
    one(emulated, mode, "store", offset=8)
    assert [entry(emulated, mode, at) & 0x60 for at in range(last + 1)] == [0x20] * last + [0x60]


def test_without_paging_an_address_is_where_it_leads(emulated: TcgWalks) -> None:
    for op, value in (("load", 0x223344B8), ("fetch", 0x11223344)):
        for efer in (0, LME):  # LME alone does nothing
            (result,) = emulated.run([TcgAccess(PAGE, op, PE, 0, PAE, efer, user=True)])
            assert (result.vector, result.value) == (DONE, value)


# ---- faults


@pytest.mark.parametrize("mode", SETTINGS)
def test_a_page_that_is_not_there(emulated: TcgWalks, mode: str) -> None:
    lay(emulated, mode, 0)
    for op, code in (("load", 0), ("store", 2), ("fetch", 0), ("implicit", 0)):
        for user in (False, True):
            result = one(emulated, mode, op, user=user)
            assert (result.vector, result.cr2) == (PF, SETTINGS[mode][2])
            assert result.error == code | 4 * (user and op != "implicit")


@pytest.mark.parametrize("mode", SETTINGS)
@pytest.mark.parametrize(
    ("leaf", "op", "more", "code"),
    [
        (5, "store", {"user": True}, 7),
        (5, "store", {}, 3),
        (5, "store", {"cr0": PG | PE}, None),
        (3, "load", {"user": True}, 5),
        (3, "implicit", {"user": True}, None),
        (7, "fetch", {"cr4": SMEP}, 0x11),
        (7, "fetch", {"cr4": SMEP, "user": True}, None),
        (7, "load", {"cr4": SMAP}, 1),
        (7, "store", {"cr4": SMAP, "offset": 8}, 3),
        (7, "load", {"cr4": SMAP, "ac": True}, None),
        (7, "implicit", {"cr4": SMAP, "ac": True, "user": True}, 1),
        (7, "load", {"cr4": SMAP, "user": True}, None),
    ],
)
def test_rights(emulated: TcgWalks, mode: str, leaf: int, op: str, more: dict[str, Any], code: int | None) -> None:
    lay(emulated, mode, PAGE | leaf)
    assert code_of(one(emulated, mode, op, **more)) == code


@pytest.mark.parametrize("mode", ["pae", "4-level", "5-level"])
def test_no_execute(emulated: TcgWalks, mode: str) -> None:
    lay(emulated, mode, PAGE | 7 | 1 << 63)
    assert code_of(one(emulated, mode, "fetch", efer=NXE)) == 0x11
    assert code_of(one(emulated, mode, "load", efer=NXE)) is None
    assert code_of(one(emulated, mode, "load")) == 8  # reserved


@pytest.mark.parametrize("mode", ["4-level", "5-level"])
def test_protection_keys(emulated: TcgWalks, mode: str) -> None:
    lay(emulated, mode, PAGE | 7 | 9 << 59)
    access_off, write_off = 1 << 18, 2 << 18  # of key 9
    assert code_of(one(emulated, mode, user=True, cr4=PKE, pkru=access_off)) == 0x25
    assert code_of(one(emulated, mode, user=True, cr4=PKE, pkru=write_off)) is None
    assert code_of(one(emulated, mode, "store", offset=8, user=True, cr4=PKE, pkru=write_off)) == 0x27
    assert code_of(one(emulated, mode, "store", offset=8, cr4=PKE, pkru=write_off)) == 0x23
    assert code_of(one(emulated, mode, "store", offset=8, cr4=PKE, pkru=write_off, cr0=PG | PE)) is None
    assert code_of(one(emulated, mode, "fetch", user=True, cr4=PKE, pkru=access_off)) is None
    assert code_of(one(emulated, mode, user=True, cr4=PKE, pkru=0xFFFFFFFF ^ access_off * 3)) is None
    assert code_of(one(emulated, mode, user=True, pkru=access_off)) is None


def test_large_pages(emulated: TcgWalks) -> None:
    # 1 GiB, 2 MiB, 4 MiB pages at 5 GiB and 1 GiB, and their reserved bits.
    far = 5 << 30 | 0x12345000
    emulated.ram[far : far + 8] = CODE

    def put(at: int, word: int, size: int = 8) -> None:
        emulated.ram[at : at + size] = word.to_bytes(size, "little")

    emulated.set_root("4-level", FREE)
    put(FREE + 8, FREE + 0x1007)
    put(FREE + 0x1008, 5 << 30 | 0x87)
    put(FREE + 0x1010, FREE + 0x2007)
    put(FREE + 0x2000 + 8 * (0x12345000 >> 21), (5 << 30 | 0x12200000) | 0x87)
    put(FREE + 0x1018, 5 << 30 | 1 << 29 | 0x87)
    put(FREE + 0x1020, 5 << 30 | 0x1087)  # bit 12 is PAT

    def load(gigabyte: int) -> TcgResult:
        gva = 1 << 39 | gigabyte << 30 | 0x12345000
        return emulated.run([TcgAccess(gva, "load", PG | PE, FREE, PAE, LME)])[0]

    code = int.from_bytes(CODE, "little")
    assert [load(at).value for at in (1, 2, 4)] == [code] * 3
    assert code_of(load(3)) == 8

    emulated.ram[FREE : FREE + 16] = bytes(16)
    emulated.set_root("2-level", FREE)
    put(FREE + 4, 0x12000000 | 5 >> 2 << 13 | 1 << 30 | 0x87, 4)  # 4 GiB of PA in bit 13, 1 GiB in bit 30
    gva = 1 << 22 | 0x12345000 & 0x3FFFFF
    put(FREE + 4, 0x12000000 | 1 << 13 | 1 << 30 | 0x87, 4)
    (result,) = emulated.run([TcgAccess(gva, "load", PG | PE, FREE, PSE, 0)])
    assert result.value == int.from_bytes(CODE[:4], "little")
    (result,) = emulated.run([TcgAccess(gva, "load", PG | PE, FREE, 0, 0)])
    assert code_of(result) == 0  # without PSE it is a table, which is empty


def test_an_address_that_is_not_canonical(emulated: TcgWalks) -> None:
    lay(emulated, "4-level", PAGE | 7)
    assert one(emulated, "4-level", offset=1 << 47).vector == GP
    lay(emulated, "5-level", PAGE | 7)
    assert one(emulated, "5-level", offset=1 << 47).vector == PF  # there it is one


def test_many_accesses_in_several_lists(emulated: TcgWalks) -> None:
    # More than one list holds: (16 MiB - 1 MiB) / 128 bytes = 122880 would take long, so that the list is shortened.
    lay(emulated, "4-level", PAGE | 7)
    cr4, efer, gva = SETTINGS["4-level"]
    accesses = [TcgAccess(gva + 8 + 8 * n, "store", PG | PE, FREE, cr4, efer, value=n) for n in range(300)]
    end, tcg._LIST_END = tcg._LIST_END, tcg._LIST + 128 * 128
    try:
        results = emulated.run(iter(accesses))
    finally:
        tcg._LIST_END = end
    assert [result.vector for result in results] == [DONE] * 300
    data = bytes(emulated.ram[PAGE + 8 : PAGE + 8 + 8 * 300])
    assert data == b"".join([n.to_bytes(8, "little") for n in range(300)])
    assert emulated.run([]) == []


# ---- what is refused


def access(**fields: Any) -> TcgAccess:
    usual: dict[str, Any] = {"gva": 0, "op": "load", "cr0": PG | PE, "cr3": FREE, "cr4": PAE, "efer": LME}
    return TcgAccess(**(usual | fields))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"op": "jump"}, "op"),
        ({"cr0": PG | PE | 1 << 3}, "cr0"),
        ({"cr4": PAE | 1 << 17}, "cr4"),
        ({"cr4": 0}, "cr4"),
        ({"efer": LME | 1}, "efer"),
        ({"efer": 0, "gva": 1 << 32}, "gva"),
        ({"efer": 0, "cr3": 1 << 32}, "cr3"),
        ({"cr3": 1 << 40}, "cr3"),
        ({"pkru": 1 << 32}, "pkru"),
        ({"value": -1}, "value"),
    ],
)
def test_accesses_that_nobody_can_do(emulated: TcgWalks, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        emulated.run([access(), access(**fields)])
    assert caught.value.field == field


def test_wrong_arguments(emulated: TcgWalks) -> None:
    with pytest.raises(ArgumentTypeError, match="TcgAccess"):
        emulated.run([(0, "load")])  # type: ignore[list-item]
    with pytest.raises(ArgumentError, match="mode='none'; accepted: 2-level, pae, 4-level, 5-level"):
        emulated.set_root("none", FREE)
    for root in (FREE - 0x1000, FREE + 8, len(emulated.ram)):
        with pytest.raises(ArgumentError, match="root"):
            emulated.set_root("4-level", root)
    emulated.set_root("pae", FREE + 0x20)
    for ram in (FREE, (1 << 37) + 1, (1 << 40) + 4096):
        with pytest.raises(ArgumentError, match="ram"):
            TcgWalks(ram)


def test_paging_modes() -> None:
    # SDM volume 3, table 5-1; LME without PAE cannot be entered.
    assert paging_mode(PE, PAE | LA57, LME) == "none"
    assert [paging_mode(PG | PE, cr4, 0) for cr4 in (0, PSE, LA57, PAE, PAE | LA57)] == [*["2-level"] * 3, "pae", "pae"]
    assert [paging_mode(PG | PE, cr4, LME) for cr4 in (PAE, PAE | LA57)] == ["4-level", "5-level"]
    with pytest.raises(ArgumentError, match=r"CR4\.PAE"):
        paging_mode(PG | PE, 0, LME)


def test_a_fetch_that_runs_away_is_an_error() -> None:
    need("qemu")
    with TcgWalks(1 << 27, timeout=0.5) as emulated:
        lay(emulated, "4-level", PAGE | 7)
        emulated.ram[PAGE : PAGE + 2] = b"\xeb\xfe"
        with pytest.raises(GdbError, match=r"did not stop in 0.5 s"):
            one(emulated, "4-level", "fetch")


def test_what_was_closed() -> None:
    need("qemu")
    emulated = TcgWalks(1 << 27)
    assert emulated.version >= (7, 2)
    assert emulated.stub.registers["rip"] == 64
    assert repr(emulated).endswith("0x8000000 bytes>")
    held = emulated.ram[:1]
    emulated.close()
    emulated.close()
    assert repr(emulated) == "<TcgWalks closed>"
    for call in (lambda: emulated.ram, lambda: emulated.run([]), lambda: emulated.set_root("pae", FREE)):
        with pytest.raises(ClosedError):
            call()
    assert held[0] == 0  # a part that somebody holds stays


def test_without_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvmodel.witness.qemu.BINARY", "no-such-qemu")
    with pytest.raises(Lacking, match="not installed"):
        TcgWalks(1 << 27)
    for name in ("tcg_walks", "tcg_roles", "tcg_deviations"):
        (result,) = run([name], cases=1)
        assert result.skipped


def test_no_socket_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket, "socketpair", refuse)
    with pytest.raises(HostError, match="socketpair"):
        TcgWalks(1 << 27)


def test_the_operations_are_those_of_the_guest() -> None:
    assert list(OPS.values()) == [0, 1, 2, 3, 4]  # as native/guests/walks.S numbers them


# ---- the checks


def check(name: str, count: int = 1) -> Any:
    need("qemu")
    (result,) = run([name], cases=count)
    return result


def test_walks_agree_and_meet_every_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    met = dict.fromkeys(check_tcg.DEVIATIONS, 0)
    compare = check_tcg._compare_batch

    def watched(*args: Any) -> dict[str, int]:
        seen = compare(*args)
        for name, count in seen.items():
            met[name] += count
        return seen

    monkeypatch.setattr(check_tcg, "_compare_batch", watched)
    result = check("tcg_walks", cases(2000, 40_000))
    assert (result.mismatches, result.lacking) == (0, ()), result
    assert result.compared >= cases(2000, 40_000)
    assert all(met.values()), met


def test_roles_agree() -> None:
    result = check("tcg_roles")
    # PG, WP, PSE, PAE, SMEP, SMAP, PKE, LA57, LME, NXE, but for PG and LME without PAE.
    assert (result.compared, result.mismatches) == (2**10 - 2**7, 0), result


def test_every_deviation_is_there() -> None:
    result = check("tcg_deviations")
    assert (result.compared, result.mismatches) == (2 * len(check_tcg.DEVIATIONS), 0), result
    assert list(check_tcg._EXAMPLES) == list(check_tcg.DEVIATIONS)


@pytest.mark.parametrize("bit", [0, 4, 7, 12, 13, 14, 15, 34, 35, 36, 37, 38, 39])
def test_every_bit_of_a_role_is_looked_at(bit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    registers = [
        (cr0 | PE, cr4, efer)
        for cr0 in (PG, PG | WP, WP)
        for cr4, efer in ((PSE, 0), (PAE | SMEP, NXE), (PAE | SMAP, LME), (PAE | LA57 | PKE, LME | NXE))
    ]
    before = [check_tcg._predicted(*these) for these in registers]
    right = roles.calc_cpu_role
    monkeypatch.setattr(check_tcg, "calc_cpu_role", lambda *args: roles.CpuRole(right(*args).as_u64 ^ 1 << bit))
    assert [check_tcg._predicted(*these) for these in registers] != before


def test_a_wrong_role_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # efer_nx, which TCG shows with entries of 8 bytes: PAE has 2**7 combinations, 4 and 5 levels 2**6 each.
    right = roles.calc_cpu_role
    monkeypatch.setattr(check_tcg, "calc_cpu_role", lambda *args: roles.CpuRole(right(*args).as_u64 ^ 1 << 12))
    assert check("tcg_roles").mismatches == 2 * 2**7


def _flip(name: str) -> Any:
    right = permission.update_permission_bitmask
    return "update_permission_bitmask", lambda **bits: right(**bits | {name: not bits[name]})


WRONG: dict[str, Any] = {
    **{name: lambda name=name: _flip(name) for name in ("cr0_wp", "efer_nx", "cr4_smep", "cr4_smap")},
    "keys": lambda: ("update_pkru_bitmask", lambda **_: 0),
    "1G": lambda: (
        "reset_guest_rsvds_bits_mask",
        lambda level, right=reserved.reset_guest_rsvds_bits_mask, **more: right(level, **more | {"gbpages": False}),
    ),
    "width": lambda: (
        "reset_guest_rsvds_bits_mask",
        lambda level, right=reserved.reset_guest_rsvds_bits_mask, **more: right(level, **more | {"maxphyaddr": 41}),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_walker_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walks, *WRONG[what]())
    result = check("tcg_walks", 1200)
    assert result.mismatches > 0
    assert "QEMU TCG" in result.examples[0]


def test_wrong_bits_in_the_tables_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # The model forgets D.
    right = walks.Walk.updates.fget  # type: ignore[attr-defined]

    def forgetful(self: walks.Walk) -> tuple[walks.Update, ...]:
        return tuple(
            walks.Update(u.level, u.gpa, u.old, u.new & ~0x40 | u.old, u.size, u.accessed, u.dirty, u.nested)
            for u in right(self)
        )

    monkeypatch.setattr(walks.Walk, "updates", property(forgetful))
    result = check("tcg_walks", 400)
    assert result.mismatches > 0
    assert "by TCG" in result.examples[0]
