"""The one table of all parts of a vCPU's and a VM's state: which ioctls, in which order, and why.

The rows stand in the order in which the parts are put; `turn` orders the gets, where another order is the right one.
docs/state.md compares both with QEMU's and Firecracker's.

Sources of the reasons: linux:arch/x86/kvm/x86.c, cpuid.c, lapic.c, vmx/nested.c, svm/nested.c@v6.18.
"""

from __future__ import annotations

from .._ffi import lib
from ..value import Value
from .cpuid import CpuidTable
from .msrs import Msrs
from .nested import NestedState
from .record import Packed
from .values import (
    Clock,
    DebugRegs,
    Fpu,
    IoApic,
    Lapic,
    MpState,
    Pic,
    Pit,
    Regs,
    Sregs,
    Sregs2,
    TscKhz,
    VcpuEvents,
    Xcrs,
)
from .xsave import Xsave

__all__ = ["PARTS", "Part", "part", "vcpu_parts", "vm_parts"]


class Part(Value):
    """A part of the state.

    `scope`: of a "vcpu" or a "vm".  `get`, `put`: the ioctls.  `capability`: the KVM_CAP_… that announces it, None
    where every KVM has it.  `record`: the class of its value.  `turn`: the gets are made in the order of this number.
    `why_put`, `why_get`: why it stands where it stands.  `can_fail`: whether KVM may refuse a value of the right size.
    `kind`, `argument`: how native/state.c passes it (HV_PART_…).
    """

    name: str
    scope: str
    get: str
    put: str
    capability: str | None
    record: type[Packed]
    turn: int
    why_put: str
    why_get: str
    can_fail: bool = True
    kind: int = lib.HV_PART_STRUCT
    argument: int = 0


PARTS = (
    Part(
        "cpuid",
        "vcpu",
        "KVM_GET_CPUID2",
        "KVM_SET_CPUID2",
        "KVM_CAP_EXT_CPUID",
        CpuidTable,
        120,
        "First: what CR4, EFER, XCR0, the XSAVE area and the MSRs may hold depends on it.",
        "Late: nothing changes it, and it depends on CR4, XCR0 and the APIC base (OSXSAVE, APIC, XSAVE size).",
        kind=lib.HV_PART_CPUID,
    ),
    Part(
        "tsc_khz",
        "vcpu",
        "KVM_GET_TSC_KHZ",
        "KVM_SET_TSC_KHZ",
        "KVM_CAP_GET_TSC_KHZ",
        TscKhz,
        130,
        "Before the MSRs: a TSC that is set runs on at this pace from there.",
        "Anywhere: nothing changes it.",
        kind=lib.HV_PART_VALUE,
    ),
    Part(
        "sregs2",
        "vcpu",
        "KVM_GET_SREGS2",
        "KVM_SET_SREGS2",
        "KVM_CAP_SREGS2",
        Sregs2,
        60,
        "Before lapic, which is read by the APIC base in it; before mp_state, for KVM wakes a boot CPU that is put to "
        "the reset vector; before events, for SREGS can bring an interrupt of its own.",
        "After events, which may write CR2: the payload of a pending #PF, without KVM_CAP_EXCEPTION_PAYLOAD.",
    ),
    Part(
        "sregs",
        "vcpu",
        "KVM_GET_SREGS",
        "KVM_SET_SREGS",
        None,
        Sregs,
        60,
        "As sregs2, which is taken instead where KVM has it: it has the PDPTRs of PAE paging too.",
        "As sregs2.",
    ),
    Part(
        "regs",
        "vcpu",
        "KVM_GET_REGS",
        "KVM_SET_REGS",
        None,
        Regs,
        30,
        "Before events: KVM_SET_REGS drops a pending exception.",
        "After mp_state, which may write RIP.",
        can_fail=False,
    ),
    Part(
        "xsave",
        "vcpu",
        "KVM_GET_XSAVE2",
        "KVM_SET_XSAVE",
        "KVM_CAP_XSAVE",
        Xsave,
        40,
        "After cpuid, which says the components it may have.  KVM_GET_XSAVE where there is no KVM_CAP_XSAVE2.",
        "After mp_state: an INIT that it lets in resets parts of it.",
    ),
    Part(
        "fpu",
        "vcpu",
        "KVM_GET_FPU",
        "KVM_SET_FPU",
        None,
        Fpu,
        40,
        "As xsave, of which it is the beginning; for hosts without XSAVE.  It has no MXCSR (KVM neither gets nor sets "
        "it there), and a component that is in its initial state stays so.",
        "As xsave.",
    ),
    Part(
        "xcrs",
        "vcpu",
        "KVM_GET_XCRS",
        "KVM_SET_XCRS",
        "KVM_CAP_XCRS",
        Xcrs,
        50,
        "After cpuid, which says the bits that XCR0 may have.",
        "After mp_state: an INIT resets it.",
    ),
    Part(
        "lapic",
        "vcpu",
        "KVM_GET_LAPIC",
        "KVM_SET_LAPIC",
        "KVM_CAP_IRQCHIP",
        Lapic,
        100,
        "After sregs: the APIC base says whether the ID register is that of an xAPIC or an x2APIC.  Before msrs: "
        "TSC_DEADLINE only takes where the timer is in that mode.  Only with an in-kernel APIC.",
        "After mp_state, which may let an INIT in.",
    ),
    Part(
        "msrs",
        "vcpu",
        "KVM_GET_MSRS",
        "KVM_SET_MSRS",
        None,
        Msrs,
        90,
        "After cpuid, which says which there are; TSC_DEADLINE last of them, after TSC and lapic.",
        "Before lapic, as QEMU does: the TSC-deadline timer may fire in between, and then the page shows it.",
        kind=lib.HV_PART_MSRS,
    ),
    Part(
        "debugregs",
        "vcpu",
        "KVM_GET_DEBUGREGS",
        "KVM_SET_DEBUGREGS",
        "KVM_CAP_DEBUGREGS",
        DebugRegs,
        110,
        "Anywhere before events: a payload that is delivered writes DR6.",
        "After events, which may write DR6: the payload of a pending #DB, without KVM_CAP_EXCEPTION_PAYLOAD.",
    ),
    Part(
        "mp_state",
        "vcpu",
        "KVM_GET_MP_STATE",
        "KVM_SET_MP_STATE",
        "KVM_CAP_MP_STATE",
        MpState,
        10,
        "After sregs, which may write it.  Before events: SMM is refused to a vCPU that has received an INIT.",
        "First: it lets a pending INIT or SIPI in, which resets the vCPU.",
    ),
    Part(
        "events",
        "vcpu",
        "KVM_GET_VCPU_EVENTS",
        "KVM_SET_VCPU_EVENTS",
        "KVM_CAP_VCPU_EVENTS",
        VcpuEvents,
        20,
        "After sregs and regs, which put and drop events.",
        "Before sregs and debugregs: it may deliver a pending exception's payload to CR2 or DR6.  After mp_state: an "
        "INIT drops events.",
    ),
    Part(
        "nested_state",
        "vcpu",
        "KVM_GET_NESTED_STATE",
        "KVM_SET_NESTED_STATE",
        "KVM_CAP_NESTED_STATE",
        NestedState,
        140,
        "Last: whether it is legal depends on cpuid, CR4.VMXE or EFER.SVME, MSRs, and on SMM, which is in events.",
        "Last: nothing depends on it.",
        kind=lib.HV_PART_NESTED,
    ),
    Part(
        "pic_master",
        "vm",
        "KVM_GET_IRQCHIP",
        "KVM_SET_IRQCHIP",
        "KVM_CAP_IRQCHIP",
        Pic,
        10,
        "Before pit, whose output is an input of it.  Only with an in-kernel PIC.",
        "Before pit, so that a tick between the two is not lost but seen later.",
        kind=lib.HV_PART_CHIP,
        argument=lib.KVM_IRQCHIP_PIC_MASTER,
    ),
    Part(
        "pic_slave",
        "vm",
        "KVM_GET_IRQCHIP",
        "KVM_SET_IRQCHIP",
        "KVM_CAP_IRQCHIP",
        Pic,
        20,
        "As pic_master, whose input 2 it is.",
        "As pic_master.",
        kind=lib.HV_PART_CHIP,
        argument=lib.KVM_IRQCHIP_PIC_SLAVE,
    ),
    Part(
        "ioapic",
        "vm",
        "KVM_GET_IRQCHIP",
        "KVM_SET_IRQCHIP",
        "KVM_CAP_IRQCHIP",
        IoApic,
        30,
        "As pic_master.  After the vCPUs' lapic: an entry that is pending is sent at once.",
        "As pic_master.",
        kind=lib.HV_PART_CHIP,
        argument=lib.KVM_IRQCHIP_IOAPIC,
    ),
    Part(
        "pit",
        "vm",
        "KVM_GET_PIT2",
        "KVM_SET_PIT2",
        "KVM_CAP_PIT_STATE2",
        Pit,
        40,
        "After the chips: its channel 0 starts to count.  Only with an in-kernel PIT.",
        "After the chips.",
    ),
    Part(
        "clock",
        "vm",
        "KVM_GET_CLOCK",
        "KVM_SET_CLOCK",
        "KVM_CAP_ADJUST_CLOCK",
        Clock,
        50,
        "Last, as near to the first KVM_RUN as can be: it runs.",
        "Last, as near to the vCPUs' TSC as can be: it runs.",
    ),
)
"""All parts; those of a scope in the order in which they are put."""

_BY_NAME = {row.name: row for row in PARTS}


def part(name: str) -> Part:
    """The row of a part; KeyError where there is none of that name.

    >>> part("regs").get, part("regs").record.__name__
    ('KVM_GET_REGS', 'Regs')
    """
    return _BY_NAME[name]


def vcpu_parts(*, getting: bool = False) -> tuple[Part, ...]:
    """The parts of a vCPU in the order in which they are put, or got.

    >>> [row.name for row in vcpu_parts(getting=True)][:3]
    ['mp_state', 'events', 'regs']
    """
    return _ordered("vcpu", getting)


def vm_parts(*, getting: bool = False) -> tuple[Part, ...]:
    """The parts of a VM in the order in which they are put, or got."""
    return _ordered("vm", getting)


def _ordered(scope: str, getting: bool) -> tuple[Part, ...]:
    rows = [row for row in PARTS if row.scope == scope]
    return tuple(sorted(rows, key=_turn) if getting else rows)


def _turn(row: Part) -> int:
    return row.turn
