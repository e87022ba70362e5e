"""Descriptors and gates: against Linux's own encoder (modify_ldt), the processor (LAR, LSL), and the processor that
loads them in a guest."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmodel.arch.segment import (
    CodeType,
    DataType,
    Descriptor,
    Gate,
    Selector,
    SystemType,
    access_rights,
    decode,
    kvm_segment,
    null_segment,
    real_mode_segment,
)
from hvmodel.errors import ArgumentError, ArgumentTypeError
from tests.cases import cases
from tests.need import need

# Reads "base limit 32bit contents read_only pages absent useable" per line; sets entry n of the LDT so, and prints its
# 8 bytes as Linux wrote them, and what LAR and LSL say of it.
LDT = r"""
#define _GNU_SOURCE
#include <asm/ldt.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(void)
{
	static uint64_t table[8192];
	unsigned base, limit, w, contents, ro, pages, absent, useable, n = 0;
	while (scanf("%u %u %u %u %u %u %u %u", &base, &limit, &w, &contents, &ro, &pages, &absent, &useable) == 8) {
		struct user_desc d;
		memset(&d, 0, sizeof(d));
		d.entry_number = n;
		d.base_addr = base;
		d.limit = limit;
		d.seg_32bit = w;
		d.contents = contents;
		d.read_exec_only = ro;
		d.limit_in_pages = pages;
		d.seg_not_present = absent;
		d.useable = useable;
		if (syscall(SYS_modify_ldt, 0x11, &d, sizeof(d)))
			return 1;
		n++;
	}
	if (syscall(SYS_modify_ldt, 0, table, sizeof(table)) < 0)
		return 1;
	for (unsigned i = 0; i < n; i++) {
		uint32_t selector = i << 3 | 7, lar = 0, lsl = 0;
		unsigned char ok;
		__asm__("lar %2, %0; setz %1" : "+r"(lar), "=q"(ok) : "r"(selector) : "cc");
		__asm__("lsl %1, %0" : "+r"(lsl) : "r"(selector) : "cc");
		printf("%llu %u %u %u\n", (unsigned long long)table[i], lar, lsl, ok);
	}
	return 0;
}
"""


def test_linux_encodes_them_alike_and_the_processor_reads_them(tmp_path: Path) -> None:
    need("gcc", "x86-64")
    source = tmp_path / "ldt.c"
    source.write_text(LDT)
    subprocess.run(["gcc", "-o", tmp_path / "ldt", source], check=True)
    rng = random.Random(1)
    rows = []
    for _ in range(cases(300, 4000)):
        pages = rng.randrange(2)
        contents = rng.randrange(3)  # data, expand down, code
        rows.append(
            (
                rng.getrandbits(32),
                rng.getrandbits(20),
                rng.randrange(2),
                contents,
                rng.randrange(2),
                pages,
                0,
                rng.randrange(2),
            )
        )
    text = "".join(" ".join(map(str, row)) + "\n" for row in rows)
    done = subprocess.run([tmp_path / "ldt"], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("modify_ldt is not allowed here")
    for row, line in zip(rows, done.stdout.splitlines(), strict=True):
        base, limit, wide, contents, read_only, pages, _, useable = row
        raw, lar, lsl, ok = map(int, line.split())
        # struct user_desc: contents are bits 3:2 of the type, bit 1 says writable or readable; Linux sets accessed.
        kind = contents << 2 | (1 - read_only) << 1 | 1
        scaled = limit << 12 | 0xFFF if pages else limit
        ours = Descriptor(base, scaled, kind, dpl=3, avl=useable, db=wide, g=pages)
        assert int.from_bytes(bytes(ours), "little") == raw, row
        assert decode(raw.to_bytes(8, "little")) == ours
        assert ok, "the processor takes it"
        assert lsl == scaled
        # LAR gives bits 23:8 of the descriptor's upper half; of those of the limit, 19:16, nobody promises anything.
        assert lar >> 8 & 0xF0FF == access_rights(ours.to_kvm(7)), row


def guest(code: bytes, table: bytes, **system: int) -> Any:
    # A vCPU in a guest whose GDT is at 0x2000 and whose code is at 0x1000.
    from contextlib import ExitStack

    from hvmodel.host import Mapping
    from hvmodel.kvm import Kvm

    stack = ExitStack()
    memory = stack.enter_context(Mapping(None, 0x10000))
    kvm = stack.enter_context(Kvm())
    vm = stack.enter_context(kvm.create_vm())
    vcpu = stack.enter_context(vm.create_vcpu())
    vcpu.set_cpuid2(kvm.supported_cpuid_table())
    memory.write(0x1000, code)
    memory.write(0x2000, table)
    vm.set_user_memory_region(0, 0, memory)
    sregs = vcpu.sregs
    sregs.gdt.base, sregs.gdt.limit = 0x2000, len(table) - 1
    for name, value in system.items():
        setattr(sregs, name, value)
    return stack, vcpu, sregs, memory


def put(segment: Any, fields: dict[str, int]) -> None:
    for name, value in fields.items():
        setattr(segment, name, value)


def got(segment: Any, fields: dict[str, int]) -> dict[str, int]:
    return {name: getattr(segment, name) for name in fields}


def test_a_guest_loads_them_alike() -> None:
    # Protected mode, CPL 0: MOV to DS for each selector in AX; what KVM then says of DS.
    need("kvm")
    from hvmodel.kvm import IoOut

    rng = random.Random(2)
    code = Descriptor.code(32)
    tried = []
    for _ in range(60):
        small = rng.random() < 0.5
        limit = rng.getrandbits(20) if small else rng.getrandbits(20) << 12 | 0xFFF
        kind = rng.choice([0, 2, 4, 6, 10, 14])  # data of all sorts, readable code
        tried.append(
            Descriptor(
                rng.getrandbits(32), limit, kind, dpl=rng.randrange(4), avl=rng.randrange(2), db=rng.randrange(2),
                g=0 if small else 1,
            )
        )  # fmt: skip
    table = bytes(8) + bytes(code) + b"".join(map(bytes, tried))
    # again: mov ds, ax; out 0x10, al; jmp again
    stack, vcpu, sregs, memory = guest(bytes.fromhex("8ed8e610ebfa"), table, cr0=0x11)
    with stack:
        put(sregs.cs, code.to_kvm(8))
        vcpu.sregs = sregs
        regs = vcpu.regs
        regs.rip = 0x1000
        for number, wanted in enumerate(tried):
            regs.rax = selector = int(Selector(2 + number))
            vcpu.regs = regs
            assert vcpu.run() == IoOut(port=0x10, size=1, count=1, data=bytes([selector & 0xFF]))
            # Loading marks it as accessed, in the register and in the table.
            loaded = wanted.replace(type=wanted.type | 1)
            fields = loaded.to_kvm(selector)
            assert got(vcpu.sregs.ds, fields) == fields
            assert memory.read(0x2000 + selector, 8) == bytes(loaded)
            assert Descriptor.from_kvm(vcpu.sregs.ds) == loaded
            regs = vcpu.regs
            regs.rip = 0x1000


def test_a_guest_loads_system_descriptors() -> None:
    # LTR and LLDT of 8 bytes in protected mode.
    need("kvm")
    from hvmodel.kvm import IoOut

    code = Descriptor.code(32)
    tss, ldt = Descriptor.tss(0x12345678, 0x89, bits=32), Descriptor.ldt(0x9ABCDEF0, 0xFFF7)
    table = bytes(8) + bytes(code) + bytes(tss) + bytes(ldt)
    # mov eax, 0x10; ltr ax; mov eax, 0x18; lldt ax; out 0x10, al
    stack, vcpu, sregs, memory = guest(bytes.fromhex("b810000000 0f00d8 b818000000 0f00d0 e610"), table, cr0=0x11)
    with stack:
        put(sregs.cs, code.to_kvm(8))
        vcpu.sregs = sregs
        regs = vcpu.regs
        regs.rip = 0x1000
        vcpu.regs = regs
        assert vcpu.run() == IoOut(port=0x10, size=1, count=1, data=b"\x18")
        busy = Descriptor.tss(0x12345678, 0x89, bits=32, busy=True)
        found = vcpu.sregs
        assert got(found.tr, busy.to_kvm(0x10)) == busy.to_kvm(0x10)
        assert got(found.ldt, ldt.to_kvm(0x18)) == ldt.to_kvm(0x18)
        assert memory.read(0x2010, 8) == bytes(busy)


def test_known_descriptors() -> None:
    # Those of linux:arch/x86/kernel/cpu/common.c gdt_page: code of 64 bits af9b, of 32 cf9b, data cf93, all with limit
    # 0xfffff in pages.
    for ours, upper in (
        (Descriptor.code(64), 0x00AF9B00),
        (Descriptor.data(), 0x00CF9300),
        (Descriptor.code(32), 0x00CF9B00),
    ):
        assert bytes(ours) == (upper << 32 | 0xFFFF).to_bytes(8, "little")
    assert bytes(Descriptor.code(16)) == (0x00009B00 << 32 | 0xFFFF).to_bytes(8, "little")
    wide = Descriptor.tss(0xFFFF_FE00_1234_5678)
    # Intel SDM volume 3, figure 7-4.
    assert bytes(wide).hex() == "670078563489001200feffff00000000"
    assert Descriptor.from_bytes(bytes(wide)) == wide.replace(g=0)


def test_known_gates() -> None:
    # Intel SDM volume 3, figures 6-2 and 6-8.
    assert bytes(Gate(0x10, 0xFFFF_FFFF_8100_0ABC, ist=2)).hex() == "bc0a1000028e0081ffffffff00000000"
    assert bytes(Gate(8, 0x12345678, 15, dpl=3, wide=False)).hex() == "7856080000ef3412"
    assert bytes(Gate(8, 0x1234, SystemType.CALL16, count=5, wide=False)).hex() == "3412080005840000"


@pytest.mark.parametrize("bit", range(96, 128))
def test_the_last_word_of_a_wide_gate_is_reserved(bit: int) -> None:
    # Intel SDM volume 3, figure 6-8: bits 127:96.
    word = int.from_bytes(bytes(Gate(0x10, 0x8100_0ABC)), "little")
    with pytest.raises(ArgumentError, match="reserved"):
        Gate.from_bytes((word | 1 << bit).to_bytes(16, "little"))


@given(st.binary(min_size=8, max_size=8))
def test_eight_bytes_back_and_forth(data: bytes) -> None:
    try:
        value = decode(data)
    except ArgumentError:
        assert not data[5] & 0x10, "a gate with reserved bits"
        return
    assert bytes(value) == data


@given(st.binary(min_size=12, max_size=12), st.sampled_from([bytes(4), b"\1\0\0\0", b"\0\0\0\x80"]))
def test_sixteen_bytes_back_and_forth(data: bytes, top: bytes) -> None:
    kind, s = data[5] & 15, data[5] >> 4 & 1
    try:
        value = decode(data + top)
    except ArgumentError:
        # Bits 127:96 are reserved, in a gate bits 39:35 too; code, data and the types of 16 bits have 8 bytes.
        reserved = kind in (12, 14, 15) and data[4] & 0xF8
        assert any(top) or s or kind not in (0, 2, 9, 11, 12, 14, 15) or reserved
        return
    assert bytes(value) == data + top


@given(st.integers(0, 0xFFFF))
def test_selectors_back_and_forth(value: int) -> None:
    selector = Selector.of(value)
    assert int(selector) == value
    # Intel SDM volume 3, figure 3-6: index 15:3, TI 2, RPL 1:0.
    assert (selector.index, selector.ldt, selector.rpl) == (value // 8, bool(value // 4 % 2), value % 4)
    assert selector.is_null == (value < 4)


def test_a_limit_is_scaled_or_refused() -> None:
    assert Descriptor(limit=0xFFFFF).scaled == (0, 0xFFFFF)
    assert Descriptor(limit=0x100FFF).scaled == (1, 0x100)
    assert Descriptor(limit=0xFFF, g=1).scaled == (1, 0)
    for bad in (Descriptor(limit=0x100000), Descriptor(limit=0x1000, g=1), Descriptor(limit=0x100FFF, g=0)):
        with pytest.raises(ArgumentError, match="limit"):
            bytes(bad)
    # Linear addresses of both halves, as (raw << 12 | 0xfff) makes them.
    assert Descriptor.from_bytes(bytes(Descriptor(limit=0x100FFF))).limit == 0x100FFF


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"base": 1 << 32}, "base"),
        ({"limit": 1 << 32}, "limit"),
        ({"type": 16}, "type"),
        ({"dpl": 4}, "dpl"),
        ({"s": 2}, "s="),
        ({"l": 2}, "l="),
        ({"present": -1}, "present"),
        ({"wide": True}, "wide"),
        ({"wide": True, "s": 0, "type": 1}, "wide"),
        ({"wide": True, "s": 0, "type": 3}, "wide"),
        ({"wide": True, "s": 0, "base": 1 << 64}, "base"),
    ],
)
def test_descriptors_that_do_not_fit(fields: dict[str, int], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        bytes(Descriptor(**fields))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=named):
        Descriptor(**fields).to_kvm(8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gate", "named"),
    [
        (Gate(8, 0, 9), "type"),
        (Gate(8, 0, SystemType.INTERRUPT16), "type"),
        (Gate(8, 0, SystemType.TASK), "type"),
        (Gate(8, 1, SystemType.TASK, wide=False), "offset"),
        (Gate(8, 1 << 32, wide=False), "offset"),
        (Gate(8, 0x10000, SystemType.TRAP16, wide=False), "offset"),
        (Gate(0x10000, 0), "selector"),
        (Gate(8, 0, ist=8), "ist"),
        (Gate(8, 0, ist=1, wide=False), "ist"),
        (Gate(8, 0, count=1), "count"),
        (Gate(8, 0, count=1, wide=False), "count"),
        (Gate(8, 0, SystemType.CALL, count=32, wide=False), "count"),
    ],
)
def test_gates_that_do_not_fit(gate: Gate, named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        bytes(gate)


def test_bad_bytes_and_names() -> None:
    for call in (decode, Descriptor.from_bytes, Gate.from_bytes):
        with pytest.raises(ArgumentError, match="8 or 16"):
            call(bytes(9))
        with pytest.raises(ArgumentTypeError):
            call("x" * 8)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="gate"):
        Descriptor.from_bytes(bytes(Gate(8, 0, wide=False)))
    with pytest.raises(ArgumentError, match="type 9"):
        Gate.from_bytes(bytes(Descriptor.tss(0, bits=32)))
    with pytest.raises(ArgumentError, match="127:96"):
        Descriptor.from_bytes(bytes(Descriptor.tss(0))[:12] + b"\1\0\0\0")
    for value in (Descriptor(), Gate(8, 0)):
        with pytest.raises(ArgumentError, match="no such field"):
            value.replace(colour=1)
    for build in (Descriptor.code, Descriptor.data, lambda bits: Descriptor.tss(0, bits=bits)):
        with pytest.raises(ArgumentError, match="bits"):
            build(8)
    with pytest.raises(ArgumentError):
        int(Selector(8192))
    with pytest.raises(ArgumentError):
        Selector.of(0x10000)


def test_registers_of_segments() -> None:
    # Intel SDM volume 3, table 9-1: CS after a reset.
    reset = real_mode_segment(0xF000, code=True)
    assert (reset["base"], reset["limit"], reset["present"]) == (0xF0000, 0xFFFF, 1)
    assert reset["type"] == CodeType.CODE | CodeType.READABLE | CodeType.ACCESSED
    assert real_mode_segment(0x10)["type"] == DataType.WRITABLE | DataType.ACCESSED
    assert null_segment(3) | {"selector": 0} == null_segment()
    assert (null_segment()["unusable"], null_segment()["present"]) == (1, 0)
    with pytest.raises(ArgumentTypeError, match="type"):
        access_rights(object())
    with pytest.raises(ArgumentError, match="rights"):
        kvm_segment(0, 0, 0, 1 << 17)


@given(st.integers(0, (1 << 17) - 1))
def test_access_rights_back_and_forth(rights: int) -> None:
    known = rights & 0x1F0FF  # bits 11:8 are none
    segment = kvm_segment(0, 0, 0, rights)
    # What is not present is unusable.
    assert access_rights(segment) == (known if known & 0x80 else known | 0x10000)


def test_a_descriptor_of_a_register_and_back() -> None:
    for value in (Descriptor.code(16, base=0xF0000), Descriptor.code(64), Descriptor.data(dpl=3), Descriptor.ldt(0, 7)):
        fields = value.to_kvm(8)
        assert Descriptor.from_kvm(fields) == value.replace(g=value.scaled[0])
    wide = Descriptor.tss(1 << 40)
    assert Descriptor.from_kvm(wide.to_kvm(0x40), wide=True) == wide.replace(g=0)
    assert Descriptor.data().replace(present=0).to_kvm(8)["unusable"] == 1


def test_gates_back_and_forth() -> None:
    for gate in (
        Gate(0x10, 0xFFFF_FFFF_8100_0ABC, ist=2),
        Gate(0x10, 0x1234_5678_9ABC_DEF0, 15, dpl=3, present=0),
        Gate(8, 0x12345678, 12, count=31, wide=False),
        Gate(8, 0x1234, 7, wide=False),
        Gate(0x18, 0, SystemType.TASK, dpl=1, wide=False),
    ):
        assert Gate.from_bytes(bytes(gate)) == gate
    with pytest.raises(ArgumentError, match="offset"):
        bytes(Gate(8, 1 << 64))
    for kind in (4, 5, 6, 7, 12, 14, 15):  # types of gates, but S is set
        with pytest.raises(ArgumentError, match="S clear"):
            Gate.from_bytes(bytes(Descriptor(type=kind)))


def test_segments_of_16_bits() -> None:
    # Intel SDM volume 3, figure 3-8: 64 KiB in bytes, D/B clear; data 3, code 11.
    assert bytes(Descriptor.data(16)) == (0x00009300 << 32 | 0xFFFF).to_bytes(8, "little")
    assert bytes(Descriptor.data(16, limit=0x7FF)) == (0x00009300 << 32 | 0x7FF).to_bytes(8, "little")
    assert bytes(Descriptor.code(16, limit=0x7FF)) == (0x00009B00 << 32 | 0x7FF).to_bytes(8, "little")
    assert Descriptor.data(32, limit=0xFFF).limit == Descriptor.code(32, limit=0xFFF).limit == 0xFFF


def test_access_rights_that_do_not_fit() -> None:
    # Intel SDM volume 3, format of access rights: type 4 bits, DPL 2, the others 1.
    for name in ("type", "s", "dpl", "present", "avl", "l", "db", "g", "unusable"):
        width = {"type": 4, "dpl": 2}.get(name, 1)
        access_rights({name: (1 << width) - 1})
        with pytest.raises(ArgumentError, match=name):
            access_rights({name: 1 << width})


def test_a_descriptor_of_nothing_is_present() -> None:
    # P (47) and S (44) alone.
    assert bytes(Descriptor()) == (1 << 47 | 1 << 44).to_bytes(8, "little")


def test_types_are_those_of_the_manual() -> None:
    # Intel SDM volume 3, tables 3-1 (code and data: bits E/W/A and C/R/A) and 3-2 (system types).
    assert [int(one) for one in (DataType.ACCESSED, DataType.WRITABLE, DataType.EXPAND_DOWN)] == [1, 2, 4]
    assert [int(one) for one in (CodeType.ACCESSED, CodeType.READABLE, CodeType.CONFORMING, CodeType.CODE)] == [
        1,
        2,
        4,
        8,
    ]
    assert {one.name: int(one) for one in SystemType} == {
        "TSS16": 1, "LDT": 2, "BUSY_TSS16": 3, "CALL16": 4, "TASK": 5, "INTERRUPT16": 6, "TRAP16": 7,
        "TSS": 9, "BUSY_TSS": 11, "CALL": 12, "INTERRUPT": 14, "TRAP": 15,
    }  # fmt: skip
