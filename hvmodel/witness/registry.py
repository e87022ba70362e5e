"""The checks that `hvmodel verify` runs: who is compared with whom, by which function.

A check is a function `check_NAME(tally, cases)` under the decorator; it counts into the `Tally` and notes what is
lacking.  Every module that has checks stands in `MODULES`, so that what runs never depends on who imported what.
"""

from __future__ import annotations

import errno

from ..errors import ArgumentError, HostError, HvError, KvmError, UnsupportedError
from ..value import Value
from .result import CheckResult, Lacking, Tally

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import TypeVar

    Function = Callable[[Tally, int], None]
    _F = TypeVar("_F", bound=Function)

__all__ = ["Check", "check", "registered", "run"]

# modules of hvmodel.witness that hold checks
MODULES = (
    "checks",
    "check_alloc",
    "check_pages",
    "check_layout",
    "check_flatview",
    "check_memslots",
    "check_exceptions",
    "check_legal",
    "check_refusals",
    "check_sync",
    "check_state",
    "check_walk",
    "check_tcg",
    "check_spte",
    "check_masks",
    "check_ept",
    "check_role",
    "check_mmu_small",
    "check_simulator",
)

_PREFIX = "check_"

# The calls that open what a check needs (/dev/kvm, BTF, tracefs and an instance in it).
_OPENERS = ("fsconfig", "fsmount", "fsopen", "mkdir", "open", "set_event_pid")
_REFUSED = (errno.EPERM, errno.EACCES)
_ABSENT = (errno.ENODEV, errno.ENOENT, errno.ENOSYS, errno.ENOTSUP, errno.ENXIO)


def _is_lacking(error: Exception) -> bool:
    # Whether the host does not have, or does not let us have, what a check needs.  A relative path is one below a mount
    # that is there, so that its absence is an error of ours.
    if isinstance(error, Lacking | UnsupportedError):
        return True
    if not isinstance(error, HostError) or isinstance(error, KvmError) or error.call not in _OPENERS:
        return False
    relative = error.field == "path" and not str(error.value).startswith("/")
    return error.errno in _REFUSED or (error.errno in _ABSENT and not relative)


class Check(Value):
    """A registered check: `cases` of them are compared in a fast run, `slow` in a thorough one."""

    name: str
    model: str
    witness: str
    cases: int
    slow: int
    function: Function

    def run(self, cases: int) -> CheckResult:
        """Compare `cases` cases.

        Before the first comparison, `Lacking`, UnsupportedError, or a HostError that refuses or misses something to be
        opened mean that this host lacks it.  Any other HvError or OSError, and those later on, break the check off,
        which is a mismatch.  Every other exception is a bug and rises.
        """
        tally = Tally(self.model, self.witness)
        try:
            self.function(tally, cases)
        except (HvError, OSError) as error:
            text = f"{type(error).__name__}: {error}"
            if tally.compared == 0 and tally.mismatches == 0 and _is_lacking(error):
                tally.lack(text)
            else:
                tally.break_off(text)
        return tally.result()


_checks: dict[str, Check] = {}


def check(model: str, witness: str, *, cases: int = 1, slow: int | None = None) -> Callable[[_F], _F]:
    """Decorator: register `check_NAME(tally, cases)` as the check NAME of `model` by `witness`.

    `cases` is the number of cases of a fast run and `slow` (by default the same) of a thorough one; a check whose
    cases are fixed may ignore it.  ArgumentError for a name or a pair of model and witness that is taken.
    """
    slow = cases if slow is None else slow
    if not 1 <= cases <= slow:
        raise ArgumentError("check", "cases", cases, f"1 to {slow}, the number of a slow run")

    def register(function: _F) -> _F:
        name = function.__name__.removeprefix(_PREFIX)
        for other in _checks.values():
            if other.name == name or (other.model, other.witness) == (model, witness):
                detail = f"taken by {other.function.__module__}.{other.function.__name__}"
                raise ArgumentError("check", "name", f"{name}: {model} x {witness}", None, detail)
        _checks[name] = Check(name, model, witness, cases, slow, function)
        return function

    return register


def registered() -> tuple[Check, ...]:
    """All checks, ordered by model, then witness."""
    from importlib import import_module

    for module in MODULES:
        import_module(f"{__package__}.{module}")
    return tuple(sorted(_checks.values(), key=lambda c: (c.model, c.witness)))


def run(names: Iterable[str] | None = None, *, slow: bool = False, cases: int | None = None) -> list[CheckResult]:
    """Run the checks with these names (all by default), in the order of `registered()`.

    `slow` takes each check's larger number of cases, `cases` overrides both.  ArgumentError for an unknown name.
    """
    known = registered()
    if names is not None:
        wanted = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in wanted if name not in {c.name for c in known}]
        if unknown:
            raise ArgumentError("verify", "names", unknown[0], ", ".join(c.name for c in known))
        known = tuple(c for c in known if c.name in wanted)
    if cases is not None and cases < 1:
        raise ArgumentError("verify", "cases", cases, "at least 1")
    return [c.run(cases if cases is not None else c.slow if slow else c.cases) for c in known]
