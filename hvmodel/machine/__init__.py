"""Machines: the front door of hvmodel.

machine   Machine, Stop   RAM, a vCPU, the loop around KVM_RUN
cpu       Cpu, Location   a vCPU that knows the RAM
console   Console         serial and debug output
"""

from __future__ import annotations

from .._ffi import guests
from .cpu import Cpu, Location
from .machine import Machine, Stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .console import Console

__all__ = ["Console", "Cpu", "Location", "Machine", "Stop", "guests"]


def __getattr__(name: str) -> object:
    if name != "Console":  # which a bare machine does not need
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .console import Console

    globals()[name] = Console
    return Console
