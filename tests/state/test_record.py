"""Record: a struct's bytes as a value.  Offsets and sizes are cffi's, which the ABI check proves against the kernel."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmodel import state
from hvmodel._ffi import ffi
from hvmodel.errors import ArgumentError, ArgumentTypeError
from hvmodel.kvm.handle import fields
from hvmodel.state import Difference, DTable, Record, Regs, Segment, Sregs, VcpuEvents, Xcr, Xcrs

RECORDS = [
    kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Record) and kind is not Record
]


def random_bytes(kind: type[Record]) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=kind.SIZE, max_size=kind.SIZE)


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_fields_are_those_that_cffi_reads(kind: type[Record], data: st.DataObject) -> None:
    raw = data.draw(random_bytes(kind))
    value = kind.from_bytes(raw)
    struct = ffi.new(f"struct {kind.STRUCT} *")
    ffi.buffer(struct)[:] = raw
    theirs = fields(struct)
    assert kind.fields() == tuple(theirs)
    for name, their in theirs.items():
        assert plain(getattr(value, name)) == normal(their), name


def plain(value: Any) -> Any:
    if isinstance(value, Record):
        return {name: plain(getattr(value, name)) for name in value.fields()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def normal(value: Any) -> Any:
    # cffi's arrays of arrays of bytes are one bytes in a record; the union of a redirection entry is its 64 bits, and a
    # time that cffi has as signed is unsigned.
    if isinstance(value, dict):
        if value.keys() == {"bits", "fields"}:
            return value["bits"]
        return {name: normal(item) for name, item in value.items()}
    if isinstance(value, list):
        items = [normal(item) for item in value]
        return b"".join(items) if items and isinstance(items[0], bytes) else items
    return value & (1 << 64) - 1 if isinstance(value, int) else value


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_all_ways_there_and_back(kind: type[Record], data: st.DataObject) -> None:
    value = kind.from_bytes(data.draw(random_bytes(kind)))
    assert kind.from_bytes(bytes(value)) == value
    assert pickle.loads(pickle.dumps(value)) == value
    assert kind.from_json(json.loads(json.dumps(value.to_json()))) == value
    assert kind(**{name: getattr(value, name) for name in kind.fields()}) == value
    assert hash(value) == hash(kind.from_bytes(bytes(value)))


@given(random_bytes(Sregs), random_bytes(Sregs))
def test_diff_names_every_leaf_that_differs_and_no_other(first: bytes, second: bytes) -> None:
    one, other = Sregs.from_bytes(first), Sregs.from_bytes(second)
    mine, theirs = dict(one.items()), dict(other.items())
    assert {change.path for change in one.diff(other)} == {path for path in mine if mine[path] != theirs[path]}
    assert len(mine) == 8 * 13 + 2 * (2 + 3) + 7 + 4  # segments, tables, registers, the bitmap
    for change in one.diff(other):
        assert (change.before, change.after) == (mine[change.path], theirs[change.path])


def test_bits_are_named() -> None:
    # Manual: CR0.PG is bit 31 and PE bit 0; CR4.PAE is bit 5; EFER.LME is bit 8; RFLAGS.IF is bit 9.
    changes = Sregs().diff(Sregs(cr0=1 << 31 | 1, cr4=1 << 5, efer=1 << 8, cr2=5))
    named = {change.path: change.bits for change in changes}
    assert named == {"cr0": ("CR0.PE", "CR0.PG"), "cr4": ("CR4.PAE",), "efer": ("EFER.LME",), "cr2": ()}
    assert Regs().diff(Regs(rflags=1 << 9, rax=2)) == [
        Difference("rax", 0, 2),
        Difference("rflags", 0, 0x200, ("RFLAGS.IF",)),
    ]
    assert str(Sregs().diff(Sregs(cr0=1))[0]) == "cr0: 0x0 -> 0x1 (CR0.PE)"
    first = Xcrs(nr_xcrs=1, xcrs=(Xcr(value=1),) + (Xcr(),) * 15)
    changed = first.diff(first.replace(xcrs=(Xcr(value=7),) + (Xcr(),) * 15))
    assert [(c.path, c.bits) for c in changed] == [("xcrs[0].value", ("XCR0.SSE", "XCR0.AVX"))]
    assert first.xcr0 == 1
    assert Xcrs().xcr0 is None


def test_replace_by_path() -> None:
    sregs = Sregs().replace(**{"cs.base": 0xF0000, "gdt.limit": 5}, cr0=1)
    assert (sregs.cs.base, sregs.gdt, sregs.cr0) == (0xF0000, DTable(limit=5), 1)
    assert sregs.replace(cs=Segment()).cs == Segment()
    events = VcpuEvents().replace(**{"exception.nr": 14, "nmi.masked": 1})
    assert (events.exception.nr, events.nmi.masked) == (14, 1)


@pytest.mark.parametrize(
    ("fields", "kind", "field"),
    [
        ({"rax": 1 << 64}, ArgumentError, "rax"),
        ({"rax": -1}, ArgumentError, "rax"),
        ({"rax": "1"}, ArgumentTypeError, "rax"),
        ({"rax": 1.0}, ArgumentTypeError, "rax"),
        ({"rax": None}, ArgumentTypeError, "rax"),
        ({"rax": True}, ArgumentTypeError, "rax"),
        ({"eax": 1}, ArgumentError, "eax"),
        ({"rax.low": 1}, ArgumentError, "rax.low"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], kind: type[Exception], field: str) -> None:
    for call in (lambda: Regs(**fields), lambda: Regs().replace(**fields)):
        with pytest.raises(kind) as refused:
            call()
        assert refused.value.field == field


def test_wrong_structs_and_arrays() -> None:
    for wrong in (5, None, DTable(), b"x"):
        with pytest.raises(ArgumentTypeError):
            Sregs(cs=wrong)
    with pytest.raises(ArgumentError):
        Sregs(interrupt_bitmap=(1, 2))
    with pytest.raises(ArgumentTypeError):
        Sregs(interrupt_bitmap=1)
    with pytest.raises(ArgumentError):
        Xcrs(xcrs=(Xcr(),))
    with pytest.raises(ArgumentTypeError):
        Xcrs(xcrs=(1,) * 16)
    with pytest.raises(ArgumentTypeError):
        VcpuEvents(reserved=5)
    with pytest.raises(ArgumentError):
        VcpuEvents(reserved=b"123")
    with pytest.raises(ArgumentError):
        VcpuEvents.from_json({"reserved": "xy"})
    with pytest.raises(ArgumentTypeError):
        Regs.from_json([1])
    with pytest.raises(ArgumentTypeError):
        Regs.from_json({"rax": "1"})


@pytest.mark.parametrize("size", [0, 143, 145])
def test_wrong_sizes(size: int) -> None:
    with pytest.raises(ArgumentError, match="144 bytes, a struct kvm_regs"):
        Regs.from_bytes(bytes(size))
    with pytest.raises(ArgumentTypeError):
        Regs.from_bytes("x")


def test_values_are_frozen_and_of_their_class() -> None:
    regs = Regs(rax=1)
    for change in (lambda: setattr(regs, "rax", 2), lambda: delattr(regs, "rax"), lambda: setattr(regs, "_data", b"")):
        with pytest.raises(AttributeError, match="frozen"):
            change()
    assert regs == Regs(rax=1)
    assert regs != DTable()
    assert len({regs, Regs(rax=1), Regs(rax=2)}) == 2
    with pytest.raises(ArgumentTypeError):
        regs.diff(DTable())  # type: ignore[arg-type]
