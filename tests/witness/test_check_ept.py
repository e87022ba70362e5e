"""The check of VMX exits: its guest does what it is compared with, and a wrong qualification is found."""

from __future__ import annotations

from pathlib import Path

import hvmodel as hv
from hvmodel.witness.check_ept import compare, expected_io, run_guest
from hvmodel.witness.registry import registered
from hvmodel.witness.result import Tally
from tests.need import need


def exits() -> list[tuple[int, int, int]]:
    # What the manual says of the guest's exits (table 29-5: size - 1, bit 3 IN, bit 6 immediate, port in 31:16;
    # table 29-7: bits 2:0 the access, 5:3 clear for an entry that is not present, 8:7 a linear address's translation).
    io = [
        size | direction << 3 | immediate << 6 | 0xE9 << 16
        for direction in (0, 1)
        for immediate in (1, 0)
        for size in (0, 1, 3)
    ]
    touched = [(48, 0x181, 0x10000), (48, 0x182, 0x11000), (48, 0x184, 0x12000)]
    return [(1, 0, -1), *((30, value, -1) for value in io), *touched, (12, 0, -1)]


def test_the_guest_does_what_is_expected() -> None:
    need("kvm")
    with hv.Machine(ram="1M") as m:
        seen = run_guest(m)
        ins = [exit for exit in seen if isinstance(exit, hv.IoIn)]
        outs = [exit for exit in seen if isinstance(exit, hv.IoOut)]
        assert isinstance(seen[-1], hv.Hlt)
        assert len(seen) == len(ins) + len(outs) + 1
        sizes = {0: 1, 1: 2, 3: 4}
        wanted = [(fields["port"], sizes[fields["size"]], fields["in"]) for fields in expected_io()]
        assert [(exit.port, exit.size, int(isinstance(exit, hv.IoIn))) for exit in seen[:-1]] == wanted  # type: ignore[union-attr]


def test_what_the_manual_says_is_no_mismatch() -> None:
    tally = Tally("model", "VMX")
    compare(tally, exits())
    assert tally.result().ok, tally.result().examples
    # the interrupt, two of each I/O instruction, three pages, the HLT, and how many of both there were
    assert tally.compared == 1 + 2 * 12 + 3 + 1 + 2


def test_bits_that_depend_on_the_processor_do_not_count() -> None:
    # table 30-7: bit 6 is undefined without MBEC, 11:9 without advanced information, 14 without EPTP bit 7
    tally = Tally("model", "VMX")
    compare(tally, [(reason, value | (0x4E40 if reason == 48 else 0), gpa) for reason, value, gpa in exits()])
    assert tally.result().ok, tally.result().examples


def test_every_wrong_bit_is_found() -> None:
    for place, (reason, value, gpa) in enumerate(exits()):
        if reason not in (30, 48):
            continue
        for bit in (*range(6), 7, 8, *([6, 16, 31] if reason == 30 else [])):
            wrong = exits()
            wrong[place] = (reason, value ^ 1 << bit, gpa)
            tally = Tally("model", "VMX")
            compare(tally, wrong)
            assert tally.mismatches, (reason, hex(value), bit)


def test_a_missing_exit_is_found() -> None:
    tally = Tally("model", "VMX")
    compare(tally, [exit for exit in exits() if exit[0] != 30])
    assert tally.mismatches == 1
    for place, (reason, value, gpa) in enumerate(exits()):
        if reason in (30, 48):
            tally = Tally("model", "VMX")
            compare(tally, exits()[:place] + exits()[place + 1 :])
            assert tally.mismatches, (reason, hex(value), gpa)
    tally = Tally("model", "VMX")
    compare(tally, [*exits(), (30, exits()[1][1], -1)])  # one I/O instruction too many
    assert tally.mismatches == 1
    tally = Tally("model", "VMX")
    compare(tally, [*exits(), (35, 0, -1)])  # a reason that there is not
    assert tally.mismatches == 1


def test_here_or_lacking() -> None:
    need("kvm", "root", "tracefs")
    (check,) = [one for one in registered() if one.name == "ept"]
    result = check.run(1)
    if Path("/sys/module/kvm_intel").exists():
        assert result.ok, result
    else:
        assert result.skipped, result
        assert any("no VMX on this host" in text and "manual only" in text for text in result.lacking), result
