"""Witnesses: readers of what the running kernel says, and the checks that compare the models with it.

Importing this package imports none of its modules; each name is loaded at its first use.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .qemu import Qemu, QemuError
    from .registry import Check, check, registered, run
    from .result import CheckResult, Lacking, Tally
    from .ringbuffer import Record
    from .stats import Stats
    from .tracefs import Instance, Lost, Tracefs

_HOMES = {
    "Check": "registry",
    "CheckResult": "result",
    "Instance": "tracefs",
    "Lacking": "result",
    "Lost": "tracefs",
    "Qemu": "qemu",
    "QemuError": "qemu",
    "Record": "ringbuffer",
    "Stats": "stats",
    "Tally": "result",
    "Tracefs": "tracefs",
    "check": "registry",
    "registered": "registry",
    "run": "registry",
}

__all__ = [
    "Check",
    "CheckResult",
    "Instance",
    "Lacking",
    "Lost",
    "Qemu",
    "QemuError",
    "Record",
    "Stats",
    "Tally",
    "Tracefs",
    "check",
    "registered",
    "run",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
