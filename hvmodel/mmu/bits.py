"""Words of bits by a table: a layout names every bit, and shows a value as text, as a table, as HTML, as JSON.

A layout is data: fields from the lowest bit up.  Bits that no field names are reserved; `encode` refuses them,
`decode` shows them, with the problem beside them.

    63                                             0
    | Field | Field |  reserved  | Field  | Field  |
"""

from __future__ import annotations

from ..arch.number import number
from ..errors import ArgumentError
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["BitLayout", "Decoded", "Field", "Part"]


class Field(Value):
    """One field of a word: its lowest bit, its width in bits, and what it says.

    `text` is what the field (one bit: when set) means; `clear` what one clear bit means.  `values` names the values of
    a field; one that is not listed is then reserved.  `scale` is what the field's number is shifted left by to be the
    thing it means (12 for a frame's address); a field with one is shown as that.
    """

    name: str
    low: int
    width: int = 1
    text: str = ""
    clear: str = ""
    values: Mapping[int, str] | None = None
    scale: int = 0

    @property
    def high(self) -> int:
        """The field's highest bit.

        >>> Field("level", 0, 4).high
        3
        """
        return self.low + self.width - 1

    @property
    def mask(self) -> int:
        """The field's bits, in place.

        >>> hex(Field("access", 8, 3).mask)
        '0x700'
        """
        return ((1 << self.width) - 1) << self.low

    def of(self, value: int) -> int:
        """The field's number in a word.

        >>> Field("access", 8, 3).of(0x783)
        7
        """
        return value >> self.low & (1 << self.width) - 1

    def meaning(self, number: int) -> str:
        """What this number of the field says, in words; "" where there is nothing to say."""
        if self.values is not None:
            return self.values.get(number, "reserved")
        if self.scale:
            return f"{number << self.scale:#x}" + (f" {self.text}" if self.text else "")
        if self.width == 1 and not number:
            return self.clear
        return self.text


class Part(Value):
    """One field of a decoded word.  `high`, `low`: its bits; `value`: its number; `meaning`: that in words.

    `scale`: as a `Field` has it; one line of text shows the number shifted left by it.
    """

    name: str
    high: int
    low: int
    value: int
    meaning: str
    scale: int = 0

    @property
    def bits(self) -> str:
        """The bits as manuals write them.

        >>> Part("level", 3, 0, 4, "").bits
        '3:0'
        """
        return str(self.low) if self.high == self.low else f"{self.high}:{self.low}"


class Decoded(Value):
    """A word by its fields, highest first.  `problems`: what in it no such word may have, one sentence each.

    str() is text; `table()` a table of text; a notebook shows HTML; `to_json()` what json.dumps takes.
    """

    title: str
    width: int
    value: int
    parts: tuple[Part, ...]
    problems: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> int:
        """The number of the field of this name.  KeyError where there is none."""
        for part in self.parts:
            if part.name == name:
                return part.value
        raise KeyError(name)

    def __int__(self) -> int:
        return self.value

    def set(self) -> tuple[str, ...]:
        """The names of the fields that are not 0, highest first."""
        return tuple(part.name for part in self.parts if part.value)

    def _number(self) -> str:
        return f"{self.value:#0{self.width // 4 + 2}x}"

    def __str__(self) -> str:
        said = [
            part.name if part.high == part.low else f"{part.name}={part.value << part.scale:#x}"
            for part in self.parts
            if part.value
        ]
        text = f"{self.title} {self._number()}: {' '.join(said) if said else 'no bit set'}"
        return "\n".join([text, *(f"  problem: {problem}" for problem in self.problems)])

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(bits, name, value, meaning) of every field, highest first, as text."""
        return [(p.bits, p.name, str(p.value) if p.value < 10 else f"{p.value:#x}", p.meaning) for p in self.parts]

    def table(self) -> str:
        """The fields as a table of text, a line each, with the problems below."""
        rows = [("bits", "field", "value", "meaning"), *self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.title} {self._number()}"]
        for bits, name, value, meaning in rows:
            lines.append(f"  {bits:>{widths[0]}}  {name:<{widths[1]}}  {value:<{widths[2]}}  {meaning}".rstrip())
        return "\n".join([*lines, *(f"  problem: {problem}" for problem in self.problems)])

    def to_json(self) -> dict[str, object]:
        """The same as plain values: title, value, fields (name, bits, value, meaning), problems."""
        return {
            "title": self.title,
            "width": self.width,
            "value": self.value,
            "fields": [
                {"name": p.name, "high": p.high, "low": p.low, "value": p.value, "meaning": p.meaning}
                for p in self.parts
            ],
            "problems": list(self.problems),
        }

    def _repr_html_(self) -> str:
        from html import escape

        head = "".join(f"<th>{word}</th>" for word in ("bits", "field", "value", "meaning"))
        body = "".join(
            f"""<tr{"" if part.value else ' style="opacity:.5"'}>"""
            + "".join(f"<td>{escape(cell)}</td>" for cell in row)
            + "</tr>"
            for part, row in zip(self.parts, self.rows(), strict=True)
        )
        below = "".join(f"<p>problem: {escape(problem)}</p>" for problem in self.problems)
        caption = f"<caption>{escape(self.title)} <code>{self._number()}</code></caption>"
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}"


class BitLayout(Value):
    """A word of `width` bits by its fields.  The fields do not overlap: a test holds every layout to that.

    >>> layout = BitLayout("access", 3, (Field("x", 0), Field("w", 1), Field("u", 2)))
    >>> layout.encode(x=1, u=1)
    5
    >>> print(layout.decode(5))
    access 0x5: u x
    """

    title: str
    width: int
    members: tuple[Field, ...]

    @property
    def mask(self) -> int:
        """All bits that a field names."""
        mask = 0
        for field in self.members:
            mask |= field.mask
        return mask

    def field(self, name: str, call: str | None = None) -> Field:
        """The field of this name.  ArgumentError, which names `call` or the layout, where there is none."""
        for field in self.members:
            if field.name == name:
                return field
        known = ", ".join(field.name for field in self.members)
        raise ArgumentError(self.title if call is None else call, "field", name, known)

    def encode(self, **values: int) -> int:
        """The word with these fields, the others 0.  A field takes its number, which `scale` has not shifted yet.

        ArgumentError names a field that is unknown or does not fit.
        """
        return self.encode_for(self.title, values)

    def encode_for(self, call: str, values: Mapping[str, int]) -> int:
        """The same for a caller that has another name than the layout: its errors name `call`."""
        word = 0
        for name, given in values.items():
            field = self.field(name, call)
            value = number(call, name, given, (1 << field.width) - 1)
            if field.values is not None and value not in field.values:
                raise ArgumentError(call, name, value, ", ".join(map(str, field.values)), "the rest is reserved")
            word |= value << field.low
        return word

    def decode(self, value: int, problems: tuple[str, ...] = ()) -> Decoded:
        """The word by its fields; reserved bits that are set are parts of their own, and problems.

        ArgumentError for a value that is negative or has more than `width` bits.
        """
        value = number(self.title, "value", value, (1 << self.width) - 1)
        parts = [Part(f.name, f.high, f.low, f.of(value), f.meaning(f.of(value)), f.scale) for f in self.members]
        found = list(problems)
        for field, part in zip(self.members, parts, strict=True):
            if field.values is not None and part.value not in field.values:
                found.append(f"{field.name} (bits {part.bits}) is {part.value}, which is reserved")
        rest = value & ~self.mask
        while rest:
            low = (rest ^ rest - 1).bit_length() - 1
            parts.append(Part("reserved", low, low, 1, "must be 0"))
            found.append(f"bit {low} is reserved and set")
            rest &= rest - 1
        parts.sort(key=lambda part: -part.low)
        return Decoded(self.title, self.width, value, tuple(parts), tuple(found))
