"""Witnesses: readers of what the running kernel says, and the checks that compare the models with it.

Importing this package imports none of its modules; each name is loaded at its first use.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .gdbstub import GdbError, GdbStub
    from .hostmasks import HostFacts, HostMasks, host_facts, host_masks, masks_of
    from .kvm_trace import KvmTrace, TraceLost
    from .lab import Access, LabSlot, MmuLab, Outcome, Poke
    from .qemu import Qemu, QemuError
    from .registry import Check, check, registered, run
    from .result import CheckResult, Lacking, Tally
    from .ringbuffer import Record
    from .stats import Stats
    from .tcg import TcgAccess, TcgResult, TcgWalks
    from .tracefs import Instance, Lost, Tracefs

_HOMES = {
    "Access": "lab",
    "Check": "registry",
    "CheckResult": "result",
    "GdbError": "gdbstub",
    "GdbStub": "gdbstub",
    "HostFacts": "hostmasks",
    "HostMasks": "hostmasks",
    "Instance": "tracefs",
    "KvmTrace": "kvm_trace",
    "LabSlot": "lab",
    "Lacking": "result",
    "Lost": "tracefs",
    "MmuLab": "lab",
    "Outcome": "lab",
    "Poke": "lab",
    "Qemu": "qemu",
    "QemuError": "qemu",
    "Record": "ringbuffer",
    "Stats": "stats",
    "Tally": "result",
    "TcgAccess": "tcg",
    "TcgResult": "tcg",
    "TcgWalks": "tcg",
    "TraceLost": "kvm_trace",
    "Tracefs": "tracefs",
    "check": "registry",
    "host_facts": "hostmasks",
    "host_masks": "hostmasks",
    "masks_of": "hostmasks",
    "registered": "registry",
    "run": "registry",
}

__all__ = [
    "Access",
    "Check",
    "CheckResult",
    "GdbError",
    "GdbStub",
    "HostFacts",
    "HostMasks",
    "Instance",
    "KvmTrace",
    "LabSlot",
    "Lacking",
    "Lost",
    "MmuLab",
    "Outcome",
    "Poke",
    "Qemu",
    "QemuError",
    "Record",
    "Stats",
    "Tally",
    "TcgAccess",
    "TcgResult",
    "TcgWalks",
    "TraceLost",
    "Tracefs",
    "check",
    "host_facts",
    "host_masks",
    "masks_of",
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
