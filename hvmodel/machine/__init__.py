"""Machines: the front door of hvmodel.

machine   Machine, Stop   RAM, a vCPU, the loop around KVM_RUN
cpu       Cpu, Location   a vCPU that knows the RAM
console   Console         serial and debug output
"""

from __future__ import annotations

from .._ffi import guests
from .console import Console
from .cpu import Cpu, Location
from .machine import Machine, Stop

__all__ = ["Console", "Cpu", "Location", "Machine", "Stop", "guests"]
