"""The tables of bits: what they encode and decode, and that no layout of the package names a bit twice."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError
from hvmodel.mmu import bits
from hvmodel.mmu.bits import BitLayout, Field

ACCESS = BitLayout(
    "access",
    8,
    (Field("x", 0, text="execute"), Field("kind", 1, 2, values={0: "none", 3: "all"}), Field("frame", 4, 3, scale=12)),
)


def layouts() -> list[tuple[str, BitLayout]]:
    found = []
    for path in sorted(Path(bits.__file__).parent.glob("*.py")):
        module = import_module(f"hvmodel.mmu.{path.stem}")
        for name, value in vars(module).items():
            some = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
            found += [(f"{path.stem}.{name}", layout) for layout in some if isinstance(layout, BitLayout)]
    return found


@pytest.mark.parametrize(("name", "layout"), layouts())
def test_no_layout_names_a_bit_twice(name: str, layout: BitLayout) -> None:
    seen = 0
    for field in layout.members:
        assert 0 <= field.low <= field.high < layout.width, (name, field)
        assert not seen & field.mask, (name, field)
        seen |= field.mask
    assert seen == layout.mask
    assert len({field.name for field in layout.members}) == len(layout.members)


def test_fields_come_back() -> None:
    word = ACCESS.encode(x=1, kind=3, frame=5)
    assert word == 0b1 | 3 << 1 | 5 << 4
    decoded = ACCESS.decode(word)
    assert (decoded["x"], decoded["kind"], decoded["frame"]) == (1, 3, 5)
    assert [part.name for part in decoded.parts] == ["frame", "kind", "x"]
    assert [part.meaning for part in decoded.parts] == ["0x5000", "all", "execute"]
    assert not decoded.problems
    assert pickle.loads(pickle.dumps(decoded)) == decoded


def test_reserved_bits_and_values_are_shown_not_hidden() -> None:
    decoded = ACCESS.decode(0x80 | 0x8 | 1 << 1)
    assert decoded.problems == (
        "kind (bits 2:1) is 1, which is reserved",
        "bit 3 is reserved and set",
        "bit 7 is reserved and set",
    )
    assert [(part.name, part.low) for part in decoded.parts] == [
        ("reserved", 7),
        ("frame", 4),
        ("reserved", 3),
        ("kind", 1),
        ("x", 0),
    ]
    with pytest.raises(KeyError):
        decoded["y"]


@pytest.mark.parametrize("values", [{"x": 2}, {"kind": 1}, {"frame": 8}, {"y": 1}, {"x": -1}])
def test_encode_refuses_and_names_the_field(values: dict[str, int]) -> None:
    with pytest.raises(ArgumentError) as caught:
        ACCESS.encode(**values)
    (name,) = values
    assert name in str(caught.value)


@pytest.mark.parametrize(("value", "kind"), [(256, ArgumentError), (-1, ArgumentError), ("1", ArgumentTypeError)])
def test_decode_refuses_what_is_no_such_word(value: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="access: value"):
        ACCESS.decode(value)  # type: ignore[arg-type]


def test_every_form_shows_every_field() -> None:
    decoded = ACCESS.decode(0x81)
    table, html, plain = decoded.table(), decoded._repr_html_(), json.loads(json.dumps(decoded.to_json()))
    for part in decoded.parts:
        assert part.name in table
        assert part.name in html
        assert part.bits in table
        assert part.bits in html
    assert [field["name"] for field in plain["fields"]] == [part.name for part in decoded.parts]
    assert plain["problems"] == ["bit 7 is reserved and set"]
    assert "bit 7 is reserved and set" in table
    assert "bit 7 is reserved and set" in html
    assert str(decoded).startswith("access 0x81: reserved x")


class _Tags(HTMLParser):
    # Elements that are open, and how many of each there were; fails where a tag closes another.
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.seen[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(("name", "layout"), layouts())
def test_html_has_a_row_for_every_field(name: str, layout: BitLayout) -> None:
    for value in (0, (1 << layout.width) - 1):
        decoded, tags = layout.decode(value), _Tags()
        tags.feed(decoded._repr_html_())
        tags.close()
        assert tags.open == [], name
        assert tags.seen["tr"] == 1 + len(decoded.parts)
        assert tags.seen["td"] == 4 * len(decoded.parts)
        assert tags.seen["p"] == len(decoded.problems)
        # Every bit is named: the parts cover the fields, and each bit that is set and not of them
        covered = sum(((1 << part.high + 1) - (1 << part.low)) for part in decoded.parts)
        assert covered == layout.mask | value


def test_one_line_shows_what_a_scaled_field_means() -> None:
    decoded = ACCESS.decode(5 << 4)
    assert str(decoded) == "access 0x50: frame=0x5000"
    assert (decoded["frame"], decoded.rows()[0]) == (5, ("6:4", "frame", "5", "0x5000"))


def test_errors_name_who_was_called() -> None:
    for values, word in (({"x": 2}, "call: x=2"), ({"kind": 1}, "call: kind=1"), ({"y": 1}, "call: field='y'")):
        with pytest.raises(ArgumentError, match=word):
            ACCESS.encode_for("call", values)


def test_html_is_escaped() -> None:
    decoded = BitLayout("<b>", 1, (Field("a&b", 0),)).decode(1)
    assert "<b>" not in decoded._repr_html_().replace("<tbody>", "")
    assert "a&amp;b" in decoded._repr_html_()


def test_a_reserved_bit_is_one() -> None:
    # Its row says the bit, its number 1 and why it is a problem; so it is among the fields that are not 0.
    decoded = ACCESS.decode(0x88)
    assert decoded.rows()[0] == ("7", "reserved", "1", "must be 0")
    assert decoded.set() == ("reserved", "reserved")
    assert sum(part.value << part.low for part in decoded.parts) == 0x88


@pytest.mark.parametrize("word", [*range(16), 0b1010_0001, 0b1111_1110, 0xFF])
def test_reserved_bits_are_found_from_the_lowest_up(word: int) -> None:
    # Of eight bits one, bit 4, has a name.
    decoded = BitLayout("sparse", 8, (Field("named", 4),)).decode(word)
    wrong = [bit for bit in range(8) if bit != 4 and word >> bit & 1]
    assert decoded.problems == tuple(f"bit {bit} is reserved and set" for bit in wrong)
    assert [part.low for part in decoded.parts] == sorted([4, *wrong], reverse=True)


def test_what_a_field_says() -> None:
    one, wide = Field("one", 0, text="set", clear="not set"), Field("wide", 0, 2, text="of two", clear="not said")
    assert [one.meaning(number) for number in (0, 1)] == ["not set", "set"]
    assert [wide.meaning(number) for number in range(4)] == ["of two"] * 4
    assert Field("frame", 0, 4, text="a frame", scale=12).meaning(10) == "0xa000 a frame"
    assert Field("kind", 0, 2, values={2: "two"}).meaning(2) == "two"
    assert Field("kind", 0, 2, values={2: "two"}).meaning(0) == "reserved"
    # Numbers of one digit are the same in both systems; others are shown as 0x.
    shown = [BitLayout("word", 5, (Field("n", 0, 5),)).decode(number).rows()[0][2] for number in (9, 10, 31)]
    assert shown == ["9", "0xa", "0x1f"]
