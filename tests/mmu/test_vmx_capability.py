"""IA32_VMX_EPT_VPID_CAP against the manual's list (volume 3, appendix A.10)."""

from __future__ import annotations

import pytest

from hvmodel.errors import ArgumentError
from hvmodel.mmu.vmx_capability import EPT_VPID_CAP, decode_ept_vpid_cap, ept_vpid_cap

# A.10, bit by bit.
BITS = {
    0: "exec_only",
    6: "walk_4",
    7: "walk_5",
    8: "uc",
    14: "wb",
    16: "page_2m",
    17: "page_1g",
    20: "invept",
    21: "ad",
    22: "advanced_exit_info",
    23: "supervisor_shadow_stack",
    25: "invept_single",
    26: "invept_all",
    32: "invvpid",
    40: "invvpid_address",
    41: "invvpid_single",
    42: "invvpid_all",
    43: "invvpid_single_non_global",
}


@pytest.mark.parametrize("bit", range(64))
def test_bits(bit: int) -> None:
    decoded = decode_ept_vpid_cap(1 << bit)
    if bit in BITS:
        assert decoded.set() == (BITS[bit],)
        assert ept_vpid_cap(**{BITS[bit]: 1}) == 1 << bit
    elif 48 <= bit <= 53:
        assert decoded["hlat_prefix"] == 1 << bit - 48
    else:
        assert f"bit {bit} is reserved and set" in decoded.problems
        assert not EPT_VPID_CAP.mask >> bit & 1


# What a server processor of 2014 reports: execute-only, 4 levels, UC, WB, 2M, 1G, INVEPT and INVVPID with all their
# types, accessed and dirty flags; no 5 levels, no advanced exit information, no supervisor shadow stacks.
def test_a_processors_value() -> None:
    decoded = decode_ept_vpid_cap(0xF01_0633_4141)
    assert not decoded.problems
    assert decoded.set() == tuple(name for bit, name in sorted(BITS.items(), reverse=True) if bit not in (7, 22, 23))


@pytest.mark.parametrize(
    ("value", "word"), [(1 << 20, "invept"), (1 << 25, "invept"), (1 << 32, "invvpid"), (1 << 40, "invvpid")]
)
def test_an_instruction_and_its_types_go_together(value: int, word: str) -> None:
    (problem,) = decode_ept_vpid_cap(value).problems
    assert problem.startswith(word)


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="value"):
        decode_ept_vpid_cap(1 << 64)
    with pytest.raises(ArgumentError, match="nothing"):
        ept_vpid_cap(nothing=1)
