"""The state of a vCPU and of a VM: every part of it as a value, in the order in which it must be got and put.

parts                 the one table of parts: ioctls, order, and why
vcpu_state, vm_state  the whole state as one value: get, put, diff, JSON, pickle
record, values        the structs of KVM as frozen values
events                exceptions, NMIs and interrupts: what waits, and putting more there
msrs, cpuid, xsave, nested  those whose size varies
refusals              why KVM refuses a value
"""

from __future__ import annotations

from .cpuid import CpuidTable
from .events import EventQueue
from .msrs import Msrs, more_indices, msr_indices
from .nested import NestedState
from .parts import PARTS, Part, part, vcpu_parts, vm_parts
from .record import Difference, Packed, Record
from .values import (
    Clock,
    DebugRegs,
    DTable,
    ExceptionEvent,
    Fpu,
    InterruptEvent,
    IoApic,
    IoApicState,
    Lapic,
    MpState,
    NmiEvent,
    Pic,
    PicState,
    Pit,
    PitChannel,
    Regs,
    Segment,
    SmiEvent,
    Sregs,
    Sregs2,
    TripleFaultEvent,
    TscKhz,
    VcpuEvents,
    Xcr,
    Xcrs,
)
from .vcpu_state import VcpuState
from .vm_state import VmState
from .xsave import Component, Xsave, components

__all__ = [
    "PARTS",
    "Clock",
    "Component",
    "CpuidTable",
    "DTable",
    "DebugRegs",
    "Difference",
    "EventQueue",
    "ExceptionEvent",
    "Fpu",
    "InterruptEvent",
    "IoApic",
    "IoApicState",
    "Lapic",
    "MpState",
    "Msrs",
    "NestedState",
    "NmiEvent",
    "Packed",
    "Part",
    "Pic",
    "PicState",
    "Pit",
    "PitChannel",
    "Record",
    "Regs",
    "Segment",
    "SmiEvent",
    "Sregs",
    "Sregs2",
    "TripleFaultEvent",
    "TscKhz",
    "VcpuEvents",
    "VcpuState",
    "VmState",
    "Xcr",
    "Xcrs",
    "Xsave",
    "components",
    "more_indices",
    "msr_indices",
    "part",
    "vcpu_parts",
    "vm_parts",
]
