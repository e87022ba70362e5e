"""Exit qualifications against the tables of Intel's manual (volume 3, 30.2.1; numbers of edition 092, 2026)."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from hvmodel.errors import ArgumentError
from hvmodel.mmu.exit_reason import EXIT_REASONS
from hvmodel.mmu.qualification import (
    UNCLAIMED,
    decode_qualification,
    encode_qualification,
    qualification_layout,
)

# 30.2.1: (exit reason, vector of the exception): {field: (highest bit, lowest bit)}.
TABLES: dict[tuple[int, int | None], dict[str, tuple[int, int]]] = {
    # table 30-1: debug exceptions
    (0, 1): {
        "B0": (0, 0),
        "B1": (1, 1),
        "B2": (2, 2),
        "B3": (3, 3),
        "bus_lock": (11, 11),
        "BD": (13, 13),
        "BS": (14, 14),
        "RTM": (16, 16),
    },
    # NMI-source information, where there is such reporting
    (0, 2): {"sources": (63, 0)},
    (0, 14): {"linear_address": (63, 0)},
    (4, None): {"vector": (7, 0)},
    # table 30-2: task switches
    (9, None): {"selector": (15, 0), "source": (31, 30)},
    (14, None): {"linear_address": (63, 0)},
    # table 30-3: control registers
    (28, None): {"register": (3, 0), "type": (5, 4), "lmsw_memory": (6, 6), "gpr": (11, 8), "lmsw_source": (31, 16)},
    # table 30-4: debug registers
    (29, None): {"register": (2, 0), "from_dr": (4, 4), "gpr": (11, 8)},
    # table 30-5: I/O instructions; table 34-9: SMIs after them
    **{
        (reason, None): {
            "size": (2, 0),
            "in": (3, 3),
            "string": (4, 4),
            "rep": (5, 5),
            "immediate": (6, 6),
            "port": (31, 16),
        }
        for reason in (5, 30)
    },
    # 29.8: VM-entry failures
    (33, None): {"cause": (2, 0)},
    (34, None): {"entry": (31, 0)},
    (36, None): {"armed": (0, 0)},
    # table 30-6: APIC accesses
    (44, None): {"offset": (11, 0), "type": (15, 12), "asynchronous": (16, 16)},
    (45, None): {"vector": (7, 0)},
    # table 30-7: EPT violations
    (48, None): {
        "read": (0, 0),
        "write": (1, 1),
        "fetch": (2, 2),
        "readable": (3, 3),
        "writable": (4, 4),
        "executable": (5, 5),
        "user_executable": (6, 6),
        "linear_valid": (7, 7),
        "final": (8, 8),
        "user_linear": (9, 9),
        "writable_linear": (10, 10),
        "nx_linear": (11, 11),
        "nmi_unblocked": (12, 12),
        "shadow_stack": (13, 13),
        "supervisor_shadow_stack": (14, 14),
        "guest_paging_verification": (15, 15),
        "asynchronous": (16, 16),
    },
    (56, None): {"offset": (11, 0)},
    # page-modification log full, SPP events, instruction timeout: all other bits are undefined
    (62, None): {"nmi_unblocked": (12, 12), "asynchronous": (16, 16)},
    (66, None): {"miss": (11, 11), "nmi_unblocked": (12, 12), "asynchronous": (16, 16)},
    (75, None): {"context_invalid": (0, 0), "nmi_unblocked": (12, 12)},
    # WRMSR 0, WRMSRNS 1; WBINVD 0, WBNOINVD 1
    (32, None): {"wrmsrns": (0, 0)},
    (54, None): {"wbnoinvd": (0, 0)},
    # IA32_PASID[19:0]; the low 32 bits of the source operand
    (72, None): {"pasid": (19, 0)},
    (73, None): {"operand": (31, 0)},
    # RDMSRLIST, WRMSRLIST: the MSR's index
    (78, None): {"index": (31, 0)},
    (79, None): {"index": (31, 0)},
    # handle_rdmsr_imm and handle_wrmsr_imm of arch/x86/kvm/vmx/vmx.c@v6.18 take it for the MSR's index
    (84, None): {"index": (31, 0)},
    (85, None): {"index": (31, 0)},
    # the displacement of a memory operand: VMCLEAR VMPTRLD VMPTRST VMREAD VMWRITE VMXON, GDTR/IDTR, LDTR/TR, INVEPT
    # INVVPID INVPCID XSAVES XRSTORS
    **{(reason, None): {"displacement": (63, 0)} for reason in (19, 21, 22, 23, 25, 27, 46, 47, 50, 53, 58, 63, 64)},
}


@pytest.mark.parametrize(("which", "fields"), TABLES.items())
def test_fields_are_the_manuals(which: tuple[int, int | None], fields: dict[str, tuple[int, int]]) -> None:
    layout = qualification_layout(*which)
    assert layout is not None
    named = [field for field in layout.members if not field.name.startswith("undefined")]
    assert {field.name: (field.high, field.low) for field in named} == fields


# 30.2.1: of these all bits that it does not name are undefined, so that none is wrong.
@pytest.mark.parametrize("reason", [62, 66, 75])
def test_undefined_bits_are_no_problem(reason: int) -> None:
    decoded = decode_qualification(reason, (1 << 64) - 1)
    assert not decoded.problems
    assert sum(part.high - part.low + 1 for part in decoded.parts) == 64


@pytest.mark.parametrize("which", [which for which in TABLES if which[0] not in (62, 66, 75)])
def test_all_other_bits_are_problems(which: tuple[int, int | None]) -> None:
    named = 0
    for high, low in TABLES[which].values():
        named |= (1 << high + 1) - (1 << low)
    for bit in range(64):
        problems = decode_qualification(which[0], 1 << bit, which[1]).problems
        assert (f"bit {bit} is reserved and set" in problems) == (not named >> bit & 1), bit


@pytest.mark.parametrize("reason", sorted(EXIT_REASONS))
def test_all_other_reasons_have_none(reason: int) -> None:
    if (reason, None) in TABLES:
        return
    assert qualification_layout(reason) is None
    assert not decode_qualification(reason, 0).problems
    said = decode_qualification(reason, 5)
    assert said["value"] == 5
    # URDMSR and UWRMSR, 80 and 81, are in appendix C, and 30.2.1 says nothing of them.
    assert bool(said.problems) == (reason not in (80, 81))
    assert (reason in UNCLAIMED) == (reason in (80, 81))


# Values and what they say, by hand from the tables.
SAID = [
    (30, 0x03F8_0000, {"port": 0x3F8, "size": 0, "in": 0}),  # out dx, al
    (30, 0x0060_0048, {"port": 0x60, "size": 0, "in": 1, "immediate": 1}),  # in al, 0x60
    (30, 0x01F0_0039, {"port": 0x1F0, "size": 1, "in": 1, "string": 1, "rep": 1}),  # rep insw
    (28, 0x0000_0300, {"register": 0, "type": 0, "gpr": 3}),  # mov cr0, rbx
    (28, 0x0000_0813, {"register": 3, "type": 1, "gpr": 8}),  # mov r8, cr3
    (28, 0x1234_0070, {"type": 3, "lmsw_memory": 1, "lmsw_source": 0x1234}),  # lmsw [mem]
    (29, 0x0000_0217, {"register": 7, "from_dr": 1, "gpr": 2}),  # mov rdx, dr7
    (9, 0x8000_0028, {"selector": 0x28, "source": 2}),  # jmp 0x28:...
    (48, 0x0000_0182, {"write": 1, "linear_valid": 1, "final": 1, "readable": 0}),
    (48, 0x0000_018A, {"write": 1, "linear_valid": 1, "final": 1, "readable": 1}),
    (44, 0x0000_1300, {"offset": 0x300, "type": 1}),
    (44, 0x0001_4300, {"offset": 0x300, "type": 4, "asynchronous": 1}),
    (44, 0x0001_B000, {"type": 11, "asynchronous": 1}),
    (32, 1, {"wrmsrns": 1}),
    (54, 0, {"wbnoinvd": 0}),
    (78, 0xC000_0080, {"index": 0xC000_0080}),
]


# table 30-6: the access types that are used
def test_types_of_apic_accesses() -> None:
    used = {value for value in range(16) if not decode_qualification(44, value << 12).problems}
    assert used == {0, 1, 2, 3, 4, 10, 11, 15}


def test_an_nmi_may_tell_its_sources() -> None:
    assert not decode_qualification(0, 0, 2).problems
    assert decode_qualification(0, 6, 2)["sources"] == 6


@pytest.mark.parametrize(("reason", "value", "fields"), SAID)
def test_values_both_ways(reason: int, value: int, fields: dict[str, int]) -> None:
    decoded = decode_qualification(reason, value)
    assert {name: decoded[name] for name in fields} == fields
    assert not decoded.problems
    assert encode_qualification(reason, **fields) == value


@pytest.mark.parametrize(
    ("reason", "value", "word"),
    [
        (48, 0x102, "final"),  # table 30-7: bit 8 is 0 where bit 7 is
        (48, 0x180, "none of read, write, fetch"),
        (28, 0x23, "CLTS and LMSW access CR0"),
        (28, 0x10000, "lmsw"),
        (28, 0x40, "lmsw"),
        (28, 0x120, "gpr"),
        (30, 0x0100_0040, "8 bits"),
        (30, 0x2, "size"),
        (30, 0x80, "bit 7"),
        (33, 0x1, "cause"),
        (44, 0x5000, "type"),
        (49, 0x1, "undefined"),
        (0, 0x1, "vector"),
        (12, 0x1, "HLT has no qualification"),
    ],
)
def test_contradictions_are_told(reason: int, value: int, word: str) -> None:
    problems = decode_qualification(reason, value).problems
    assert any(word in problem for problem in problems), problems


def test_bad_arguments_name_the_field() -> None:
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: decode_qualification(35, 0), "reason=0x23"),
        (lambda: decode_qualification(1 << 32, 0), "reason"),
        (lambda: decode_qualification(48, 1 << 64), "value"),
        (lambda: decode_qualification(0, 0, 32), "vector=0x20"),
        (lambda: encode_qualification(30, port=0x10000), "port"),
        (lambda: encode_qualification(30, size=2), "size=2"),
        (lambda: encode_qualification(30, address=2), "address"),
        (lambda: encode_qualification(12, port=2), "encode_qualification: port=2: none exists for HLT"),
        (lambda: encode_qualification(80, port=2), "none is known here for URDMSR"),
        (lambda: decode_qualification(48, 0, 1), "decode_qualification: vector=1"),
    ]
    for call, word in calls:
        with pytest.raises(ArgumentError, match=word):
            call()


def test_the_high_half_of_the_reason_does_not_count() -> None:
    assert qualification_layout(48 | 1 << 27) is qualification_layout(48)
    assert qualification_layout(0, 13) is None
    assert encode_qualification(12) == 0


def test_a_qualification_is_a_word_of_64_bits() -> None:
    # A natural-width field of the VMCS: 16 digits, in whatever layout; bits 31:16 of the exit reason do not count.
    for reason, vector in [*((reason, None) for reason in EXIT_REASONS), (0, 1), (0, 2), (0, 14), (0, 31)]:
        decoded = decode_qualification(reason, (1 << 64) - 1, vector)
        assert (decoded.width, decoded.parts[0].high) == (64, 63)
        assert " 0xffffffffffffffff: " in str(decoded)
        assert qualification_layout(0xFFFF_0000 | reason, vector) is qualification_layout(reason, vector)


# 30.2.1, tables 30-2 to 30-5 and 29.8: what the numbers of a field mean; others are reserved.
_REGISTERS = ["RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{number}" for number in range(8, 16))]
NAMED = [
    (9, "source", {0: "CALL", 1: "IRET", 2: "JMP", 3: "task gate"}),
    (28, "register", {0: "CR0", 3: "CR3", 4: "CR4", 8: "CR8"}),
    (28, "type", {0: "MOV to CR", 1: "MOV from CR", 2: "CLTS", 3: "LMSW"}),
    (28, "gpr", dict(enumerate(_REGISTERS))),
    (29, "register", {number: f"DR{number}" for number in range(8)}),
    (29, "gpr", dict(enumerate(_REGISTERS))),
    (30, "size", {0: "1 byte", 1: "2 bytes", 3: "4 bytes"}),
    (33, "cause", {0: "", 2: "PDPTE", 3: "NMI", 4: "link pointer"}),
]


@pytest.mark.parametrize(("reason", "name", "meanings"), NAMED)
def test_numbers_that_have_a_meaning(reason: int, name: str, meanings: dict[int, str]) -> None:
    layout = qualification_layout(reason)
    assert layout is not None
    field = layout.field(name)
    for number in range(1 << field.width):
        decoded = decode_qualification(reason, number << field.low)
        said = f"{name} (bits {field.high}:{field.low}) is {number}, which is reserved"
        assert (said in decoded.problems) == (number not in meanings)
        if number in meanings:
            assert field.meaning(number).startswith(meanings[number]) or meanings[number] in field.meaning(number)
            assert encode_qualification(reason, **{name: number}) == number << field.low


def test_contradictions_of_control_registers() -> None:
    # Table 30-3: CLTS (2) and LMSW (3) are of CR0 and have no GPR; a source and a kind of operand are LMSW's alone.
    for kind, register, gpr, memory, source in itertools.product(range(4), (0, 3), (0, 5), (0, 1), (0, 1)):
        value = register | kind << 4 | memory << 6 | gpr << 8 | source << 16
        wrong = [kind in (2, 3) and register, kind in (2, 3) and gpr, kind != 3 and (memory or source)]
        assert len(decode_qualification(28, value).problems) == sum(map(bool, wrong)), hex(value)
