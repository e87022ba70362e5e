"""What a check found: a model, its witness, and how they compared."""

from __future__ import annotations

from ..errors import HvError
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CheckResult", "Lacking", "Tally"]

MAX_EXAMPLES = 8


class Lacking(HvError):
    """Raised by a check before it compares anything: this host cannot show it, for the reason in the text."""


class CheckResult(Value):
    """One line of `hvmodel verify`.

    `compared` cases were compared, `mismatches` of them differ, `examples` shows the first few of those in words;
    a check that broke off counts as one more mismatch, whose example says why.  `lacking` says what this host cannot
    show, in words.
    """

    model: str
    witness: str
    compared: int
    mismatches: int
    examples: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the check ran to its end, something was compared, and nothing differs."""
        return self.compared > 0 and self.mismatches == 0

    @property
    def skipped(self) -> bool:
        """Whether nothing was compared, because something is lacking: neither right nor wrong.

        >>> result = CheckResult("exits", "tracefs", 0, 0, (), ("root",))
        >>> result.ok, result.skipped
        (False, True)
        """
        return self.compared == 0 and self.mismatches == 0 and bool(self.lacking)

    def to_json(self) -> dict[str, object]:
        """The fields, and `ok` and `skipped`, as an object that json.dumps takes."""
        return {
            "model": self.model,
            "witness": self.witness,
            "compared": self.compared,
            "mismatches": self.mismatches,
            "examples": list(self.examples),
            "lacking": list(self.lacking),
            "ok": self.ok,
            "skipped": self.skipped,
        }


class Tally:
    """Counts cases while a check runs; one thread at a time.

    >>> tally = Tally("a model", "its witness")
    >>> tally.compare("2 + 2", 4, 4), tally.compare("2 * 2", 5, 4)
    (True, False)
    >>> tally.result().examples
    ('2 * 2: a model says 5, its witness says 4',)
    """

    def __init__(self, model: str, witness: str) -> None:
        self.model, self.witness = model, witness
        self.compared = 0
        self.mismatches = 0
        self._examples: list[str] = []
        self._lacking: list[str] = []

    def compare(self, case: str, ours: object, theirs: object) -> bool:
        """Count one case, in which the model says `ours` and the witness `theirs`; whether they are equal."""
        self.compared += 1
        if ours == theirs:
            return True
        self.mismatches += 1
        if len(self._examples) < MAX_EXAMPLES:
            self._examples.append(f"{case}: {self.model} says {ours!r}, {self.witness} says {theirs!r}")
        return False

    def count(self, compared: int, mismatches: Iterable[str] = ()) -> None:
        """Count `compared` cases compared elsewhere, those of `mismatches` among them differing in these words."""
        self.compared += compared
        for text in mismatches:
            self.mismatches += 1
            if len(self._examples) < MAX_EXAMPLES:
                self._examples.append(text)

    def break_off(self, why: str) -> None:
        """Note that the check ends here, before its end: a mismatch, whatever was compared so far.

        >>> tally = Tally("a model", "its witness")
        >>> tally.count(5)
        >>> tally.break_off("12 events lost")
        >>> tally.result().ok, tally.result().examples
        (False, ('broke off after 5 cases: 12 events lost',))
        """
        self.mismatches += 1
        # Said even where there are examples enough: it is why there are no more.
        del self._examples[MAX_EXAMPLES - 1 :]
        self._examples.append(f"broke off after {self.compared} cases: {why}")

    def lack(self, *what: str) -> None:
        """Note what cannot be observed here; each text is kept once."""
        self._lacking += [text for text in dict.fromkeys(what) if text not in self._lacking]

    def result(self, lacking: Iterable[str] = ()) -> CheckResult:
        """What was counted so far."""
        self.lack(*lacking)
        return CheckResult(
            self.model, self.witness, self.compared, self.mismatches, tuple(self._examples), tuple(self._lacking)
        )
