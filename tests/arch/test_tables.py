"""Descriptor tables, task-state segments and vectors: their bytes by the manual, and what is refused.

Expected: Intel SDM vol. 3 figures 8-2 (32-bit TSS), 8-10 (16-bit TSS), 8-11 (64-bit TSS), 7-2 and 7-8 (gates), 21-1
(IVT).  That processors read them so is tested with the modes: tests/machine/test_modes.py, by KVM and QEMU.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel.arch.segment import Descriptor, Gate, decode
from hvmodel.arch.tables import DescriptorTable, Idt, Ivt, io_bitmap, tss16, tss32, tss64
from hvmodel.errors import ArgumentError, ArgumentTypeError
from tests.cases import cases


def fields(data: bytes, layout: str, names: str) -> dict[str, int]:
    """The fields of a struct, packed, that are not 0; "_" are reserved and must be."""
    words = struct.unpack("<" + layout, data)
    rows = list(zip(names.split(), words, strict=True))
    assert not any(word for name, word in rows if name == "_")
    return {name: word for name, word in rows if word}


# The manual's figures, word by word from offset 0.
FIGURE_16 = "link sp0 ss0 sp1 ss1 sp2 ss2 ip flags ax cx dx bx sp bp si di es cs ss ds ldt"
FIGURE_32 = (
    "link _ esp0 ss0 _ esp1 ss1 _ esp2 ss2 _ cr3 eip eflags eax ecx edx ebx esp ebp esi edi "
    "es _ cs _ ss _ ds _ fs _ gs _ ldt _ trap iomap"
)
LAYOUT_32 = "HH" + "IHH" * 3 + "I" * 11 + "HH" * 7 + "HH"
FIGURE_64 = "_ rsp0 rsp1 rsp2 _ ist1 ist2 ist3 ist4 ist5 ist6 ist7 _ _ iomap"
LAYOUT_64 = "IQQQQ" + "Q" * 7 + "QHH"


def numbers(names: str, bits: dict[str, int], default: int) -> Any:
    """Values for some of a figure's fields."""
    wanted = [name for name in names.split() if name not in ("_", "iomap")]
    return st.fixed_dictionaries(
        {}, optional={name: st.integers(1, (1 << bits.get(name, default)) - 1) for name in wanted}
    )


WORDS = dict.fromkeys(("link", "ss0", "ss1", "ss2", "es", "cs", "ss", "ds", "fs", "gs", "ldt", "trap"), 16)


@settings(max_examples=cases(50, 1000), deadline=None)
@given(values=numbers(FIGURE_16, {}, 16))
def test_a_16_bit_tss_is_the_figure(values: dict[str, int]) -> None:
    data = tss16(**values)
    assert len(data) == 0x2C
    assert fields(data, "H" * 22, FIGURE_16) == values


@settings(max_examples=cases(50, 1000), deadline=None)
@given(values=numbers(FIGURE_32, WORDS, 32))
def test_a_32_bit_tss_is_the_figure(values: dict[str, int]) -> None:
    data = tss32(False, **values)
    assert len(data) == 0x68
    assert fields(data, LAYOUT_32, FIGURE_32) == values | {"iomap": 0x68}


@settings(max_examples=cases(50, 1000), deadline=None)
@given(values=numbers(FIGURE_64, {}, 64))
def test_a_64_bit_tss_is_the_figure(values: dict[str, int]) -> None:
    data = tss64(False, **values)
    assert len(data) == 0x68
    assert fields(data, LAYOUT_64, FIGURE_64) == values | {"iomap": 0x68}


@settings(max_examples=cases(50, 2000), deadline=None)
@given(ports=st.lists(st.one_of(st.integers(0, 0xFFFF), st.builds(range, st.integers(0, 500), st.integers(0, 500)))))
def test_the_ports_of_a_bitmap(ports: list[Any]) -> None:
    wanted = {port for row in ports for port in (row if isinstance(row, range) else [row])}
    data = io_bitmap(ports)
    # As the processor does: a port's bit in the byte at port / 8; two bytes are read, so one more follows.
    opened = {8 * at + bit for at, byte in enumerate(data) for bit in range(8) if not byte >> bit & 1}
    assert opened == wanted
    assert len(data) == (max(wanted) // 8 + 2 if wanted else 0)
    assert data[-1:] in (b"", b"\xff")
    assert tss32(ports, esp0=5)[0x68:] == tss64(ports)[0x68:] == data


def test_all_ports_or_none() -> None:
    assert io_bitmap(True) == bytes(0x2000) + b"\xff"
    assert io_bitmap(False) == io_bitmap([]) == io_bitmap([range(0)]) == b""
    assert io_bitmap([range(0x10000)]) == io_bitmap(True)
    assert io_bitmap([range(0xFFFF, -1, -1)]) == io_bitmap(True)


@pytest.mark.parametrize(
    ("call", "arguments", "field", "says"),
    [
        (tss16, {"esp0": 1}, "esp0", "there is no such field"),
        (tss16, {"sp0": 0x10000}, "sp0", "0 to 0xffff"),
        (tss32, {"ss0": 0x10000}, "ss0", "0 to 0xffff"),
        (tss32, {"esp0": 1 << 32}, "esp0", "0 to 0xffffffff"),
        (tss32, {"esp0": -1}, "esp0", "0 to 0xffffffff"),
        (tss32, {"rsp0": 0}, "rsp0", "link, esp0"),
        (tss64, {"ist0": 0}, "ist0", "rsp0, rsp1, rsp2, ist1"),
        (tss64, {"ist8": 0}, "ist8", "ist7"),
        (tss64, {"rsp0": 1 << 64}, "rsp0", "0 to 2**64-1"),
        (tss64, {"ports": [0x10000]}, "ports[0]", "0 to 0xffff"),
        (io_bitmap, {"ports": [0, -1]}, "ports[1]", "0 to 0xffff"),
        (io_bitmap, {"ports": [range(-1, 5)]}, "ports[0]", "0 to 0xffff"),
        (io_bitmap, {"ports": [range(5, 0x10001)]}, "ports[0]", "0 to 0xffff"),
    ],
)
def test_task_states_that_are_refused(call: Any, arguments: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(ArgumentError) as error:
        call(**arguments)
    assert (error.value.call, error.value.field) == (call.__name__, field)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        (tss32, {"esp0": "0"}),
        (tss32, {"esp0": True}),
        (tss64, {"rsp0": None}),
        (io_bitmap, {"ports": 5}),
        (io_bitmap, {"ports": None}),
        (io_bitmap, {"ports": "80"}),
        (io_bitmap, {"ports": [True]}),
    ],
)
def test_types_of_task_states(call: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentTypeError):
        call(**arguments)


# ---- descriptor tables ----


def test_a_gdt_grows() -> None:
    gdt = DescriptorTable()
    assert (bytes(gdt), gdt.limit, len(gdt)) == (bytes(8), 7, 8)
    code, task = Descriptor.code(64), Descriptor.tss(0x1234_5678_9ABC)
    assert gdt.add(code) == 0x08
    assert gdt.add(task) == 0x10  # of 16 bytes
    assert gdt.add(bytes(code), rpl=3) == 0x23
    assert bytes(gdt) == bytes(8) + bytes(code) + bytes(task) + bytes(code)
    assert gdt.limit == 39
    gdt.set(0x33, code)  # RPL does not count
    assert (bytes(gdt)[0x28:], gdt.limit) == (bytes(8) + bytes(code), 55)
    gdt.set(0x08, Descriptor.data())
    assert decode(bytes(gdt)[8:16]) == Descriptor.data(limit=0xFFFFFFFF).replace(g=1)
    assert repr(gdt) == "<DescriptorTable GDT, 56 bytes>"


def test_an_ldt_has_no_null_descriptor() -> None:
    ldt = DescriptorTable(ldt=True)
    assert (bytes(ldt), ldt.limit) == (b"", -1)
    assert ldt.add(Descriptor.data(), rpl=3) == 0x07  # index 0, TI, RPL 3
    assert ldt.add(Descriptor.data()) == 0x0C
    ldt.set(0x07, Descriptor.code(32))
    assert bytes(ldt) == bytes(Descriptor.code(32)) + bytes(Descriptor.data())


def test_a_full_table() -> None:
    gdt = DescriptorTable()
    gdt.set(0xFFF8, Descriptor.data())
    assert gdt.limit == 0xFFFF
    before = bytes(gdt)
    for call, field in (
        (lambda: gdt.add(Descriptor.data()), "descriptor"),
        (lambda: gdt.set(0xFFF8, Descriptor.tss(0)), "selector"),
        (lambda: gdt.set(0x10000, Descriptor.data()), "selector"),
        (lambda: gdt.set(3, Descriptor.data()), "selector"),
        (lambda: gdt.set(8, b"1234567"), "descriptor"),
        (lambda: gdt.add(b""), "descriptor"),
        (lambda: DescriptorTable().add(bytes(8), rpl=4), "rpl"),
    ):
        with pytest.raises(ArgumentError) as error:
            call()
        assert error.value.field == field
    for wrong in (8, None, "12345678", object()):
        with pytest.raises(ArgumentTypeError):
            gdt.add(wrong)  # type: ignore[arg-type]
    assert bytes(gdt) == before


# ---- gates and vectors ----


@settings(max_examples=cases(100, 2000), deadline=None)
@given(
    bits=st.sampled_from([16, 32, 64]),
    vector=st.integers(0, 255),
    offset=st.integers(0, (1 << 64) - 1),
    selector=st.integers(0, 0xFFFF),
    kind=st.sampled_from(["interrupt", "trap"]),
    dpl=st.integers(0, 3),
    ist=st.integers(0, 7),
)
def test_a_gate_is_the_figure(
    bits: Any, vector: int, offset: int, selector: int, kind: Any, dpl: int, ist: int
) -> None:
    idt = Idt(bits)
    offset &= (1 << bits) - 1
    ist = ist if bits == 64 else 0
    idt.gate(vector, offset, selector, kind=kind, dpl=dpl, ist=ist)
    width = 16 if bits == 64 else 8
    data = bytes(idt)
    assert (len(data), idt.limit) == (256 * width, 256 * width - 1)
    low, found, reserved, access, high = struct.unpack_from("<HHBBH", data, vector * width)
    top = struct.unpack_from("<Q", data, vector * width + 8)[0] if bits == 64 else 0
    assert low | high << 16 | top << 32 == offset
    assert (found, reserved) == (selector, ist)
    # P, DPL, 0, type: 6 and 7 of 16 bits, 14 and 15 of 32 and 64
    assert access == 0x80 | dpl << 5 | {"interrupt": 6, "trap": 7}[kind] | (0 if bits == 16 else 8)
    assert not any(data[: vector * width])
    assert not any(data[(vector + 1) * width :])
    idt.clear(vector)
    assert not any(bytes(idt))


def test_a_task_gate() -> None:
    idt = Idt(32, 16)
    idt.task_gate(8, 0x40, dpl=1)
    gate = decode(bytes(idt)[64:72])
    assert isinstance(gate, Gate)
    assert (gate.type, gate.selector, gate.offset, gate.dpl, gate.present) == (5, 0x40, 0, 1, 1)
    assert (repr(idt), idt.limit, idt.bits) == ("<Idt 32-bit, 16 vectors, 1 gates>", 127, 32)
    with pytest.raises(ArgumentError, match="long mode has no task gates"):
        Idt(64).task_gate(8, 0x40)


@pytest.mark.parametrize(
    ("bits", "arguments", "field"),
    [
        (64, (256, 0, 8), "vector"),
        (64, (-1, 0, 8), "vector"),
        (32, (0, 1 << 32, 8), "offset"),
        (16, (0, 1 << 16, 8), "offset"),
        (64, (0, 0, 0x10000), "selector"),
    ],
)
def test_gates_that_are_refused(bits: Any, arguments: Any, field: str) -> None:
    idt = Idt(bits)
    with pytest.raises(ArgumentError) as error:
        idt.gate(*arguments)
    assert error.value.field == field
    for options, name in (({"dpl": 4}, "dpl"), ({"ist": 8}, "ist"), ({"kind": "task"}, "kind")):
        with pytest.raises(ArgumentError) as error:
            idt.gate(0, 0, 8, **options)
        assert error.value.field == name
    assert not any(bytes(idt))


def test_tables_of_gates_that_are_none() -> None:
    for bits in (8, 63, True, "64"):
        with pytest.raises(ArgumentError):
            Idt(bits)  # type: ignore[arg-type]
    for vectors in (0, 257):
        with pytest.raises(ArgumentError):
            Idt(64, vectors)
    with pytest.raises(ArgumentTypeError):
        Idt(64, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError):
        Idt(32).gate(0, 0, 8, ist=1)
    with pytest.raises(ArgumentError):
        Idt(64, 8).gate(8, 0, 8)
    with pytest.raises(ArgumentTypeError):
        Idt(64).gate(0, "0", 8)  # type: ignore[arg-type]


def test_an_ivt() -> None:
    ivt = Ivt()
    assert (len(ivt), ivt.limit, any(bytes(ivt))) == (1024, 0x3FF, False)
    for vector in (0, 0x10, 0xFF):
        ivt.set(vector, 0xF000 + vector, 0x1000 + vector)
    rows = struct.unpack("<" + "HH" * 256, bytes(ivt))
    assert {at // 2: rows[at : at + 2] for at in range(0, 512, 2) if any(rows[at : at + 2])} == {
        vector: (0x1000 + vector, 0xF000 + vector) for vector in (0, 0x10, 0xFF)
    }
    assert repr(ivt) == "<Ivt, 3 vectors>"
    for arguments in ((256, 0, 0), (0, 0x10000, 0), (0, 0, -1)):
        with pytest.raises(ArgumentError):
            ivt.set(*arguments)
    with pytest.raises(ArgumentTypeError):
        ivt.set(0, 0, None)  # type: ignore[arg-type]


def test_what_a_gate_is_by_default_and_who_refuses() -> None:
    idt = Idt(32, 2)
    idt.gate(0, 0x1234, 8)
    idt.task_gate(1, 0x40)
    # P, DPL 0; type 14, an interrupt gate of 32 bits, and 5, a task gate.
    assert (bytes(idt)[5], bytes(idt)[13]) == (0x8E, 0x85)
    with pytest.raises(ArgumentError) as error:
        Idt(64).gate(0, 0, 8, ist=8)
    assert (error.value.call, error.value.accepted) == ("Idt.gate", "0 to 7")
    assert DescriptorTable().add(bytes(8)) == 8


def test_the_table_itself_refuses() -> None:
    # Not the gate that it makes, whose call would be named.
    for call, arguments, options, field, accepted in (
        (Idt(64).gate, (0, 0, 0x10000), {}, "selector", "0 to 0xffff"),
        (Idt(64).gate, (0, 0, 8), {"dpl": 4}, "dpl", "0 to 3"),
        (Idt(32).gate, (0, 0, 8), {"ist": 1}, "ist", "0 to 0"),
        (Idt(32).task_gate, (0, 0x10000), {}, "selector", "0 to 0xffff"),
        (Idt(32).task_gate, (0, 8), {"dpl": 4}, "dpl", "0 to 3"),
        (DescriptorTable().set, (0x10000, bytes(8)), {}, "selector", "0 to 0xffff"),
        (DescriptorTable().add, (bytes(8), 4), {}, "rpl", "0 to 3"),
        (Ivt().set, (0, 0x10000, 0), {}, "cs", "0 to 0xffff"),
        (Ivt().set, (0, 0, 0x10000), {}, "ip", "0 to 0xffff"),
        (Ivt().set, (0x100, 0, 0), {}, "vector", "0 to 0xff"),
    ):
        with pytest.raises(ArgumentError) as error:
            call(*arguments, **options)  # type: ignore[arg-type,call-overload]
        assert (error.value.call, error.value.field, error.value.accepted) == (call.__qualname__, field, accepted)
