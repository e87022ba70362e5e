"""The state of a VM besides its RAM and its vCPUs: kvmclock, and the in-kernel interrupt controllers and timer.

The chips and the timer are there where the VM was given them (Vm.create_irqchip, Vm.create_pit2); what is not there is
left out.
"""

from __future__ import annotations

import errno

from .._ffi import ffi, lib
from ..errors import ArgumentError, ArgumentTypeError, HvError, KvmError, RefusedStateError
from ..kvm import Vm
from .block import Layout, State, _note_lost
from .parts import Part, part, vm_parts
from .values import Clock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Protocol, Self

    from .values import IoApic, Pic, Pit

    class Machine(Protocol):
        """A machine: it has the Vm underneath."""

        @property
        def vm(self) -> Vm: ...


__all__ = ["VmState"]

# What a get answers where the VM does not have the part.
_ABSENT = (errno.ENXIO, errno.ENODEV, errno.ENOTTY, errno.ENOENT)
_CLOCK_FLAGS = lib.KVM_CLOCK_REALTIME | lib.KVM_CLOCK_HOST_TSC | lib.KVM_CLOCK_TSC_STABLE


def _vm_of(call: str, vm: Vm | Machine) -> Vm:
    found = vm if isinstance(vm, Vm) else getattr(vm, "vm", None)
    if not isinstance(found, Vm):
        raise ArgumentTypeError(call, "vm", vm, "a hvmodel.kvm.Vm, or a machine")
    return found


class VmState(State):
    """The state of a VM, or some parts of it; `VmState.get(vm)` takes it, `put(vm)` sets it.

    No vCPU of it should run meanwhile: the parts are got and put one after the other.  A timer that is put starts its
    count anew.  Thread safety of get and put: any thread of the process that made the VM.
    """

    __slots__ = ()
    SCOPE = "vm"
    _MOVING = {  # noqa: RUF012  # as in State
        "clock": ("clock", "flags", "realtime", "host_tsc"),
        "pit": tuple([f"channels[{at}].count_load_time" for at in range(3)]),
    }

    @classmethod
    def get(cls, vm: Vm | Machine, parts: Iterable[str] | None = None) -> Self:
        """Take the state: these parts by name, or all that this VM has.

        ArgumentError: no such part, or this VM does not have it.  KvmError: a refusal; ForkedError, VmDeadError,
        ClosedError.

        Ioctls: KVM_GET_IRQCHIP (4.26), KVM_GET_PIT2 (4.72), KVM_GET_CLOCK (4.29).
        """
        call = "VmState.get"
        vm = _vm_of(call, vm)
        names = None if parts is None else _names(cls, call, parts)
        values: dict[str, bytes] = {}
        for row in vm_parts(getting=True):
            if names is not None and row.name not in names:
                continue
            data, err = _get(vm, row)
            if not err:
                values[row.name] = data
            elif names is not None and err in _ABSENT:
                raise ArgumentError(call, "parts", row.name, None, "this VM does not have it")
            elif err not in _ABSENT:
                raise vm._refusal(row.get, err, None, None, None, f"part {row.name}")
        layout = Layout.of((name, len(data)) for name, data in values.items())
        return cls._of(layout, b"".join([values[name] for name in layout.names]), None)

    def put(self, vm: Vm | Machine, parts: Iterable[str] | None = None, *, realtime: bool = False) -> None:
        """Set the VM's state: these parts of this value, or all that it has.

        The clock goes on from its value; with `realtime`, from its value and the time that has passed since, by the
        host's clock (KVM_CLOCK_REALTIME, since v5.16).

        RefusedStateError: a part was refused; the VM is as it was.  ArgumentError: this VM does not have one of the
        parts, or the value has none of that name, or `realtime` is asked of a clock without it.

        Ioctls: KVM_SET_IRQCHIP (4.27), KVM_SET_PIT2 (4.73), KVM_SET_CLOCK (4.30).
        """
        call = "VmState.put"
        vm = _vm_of(call, vm)
        state = self if parts is None else self.only(*_names(type(self), call, parts))
        if "clock" in state:
            state = state.replace(clock=_clock(call, state.clock, realtime))
        elif realtime:
            raise ArgumentError(call, "realtime", realtime, "False", "the state has no clock")
        for name in state.parts:
            if _get(vm, part(name))[1] in _ABSENT:
                raise ArgumentError(call, "part", name, None, "this VM does not have it")
        layout = state._layout
        block = ffi.new("uint8_t[]", max(layout.size, 1))
        undo = ffi.new("struct hv_state_undo *", {"get": layout.get, "put": layout.put, "block": block})
        undo.nr = layout.nr
        word = lib.hv_vm_state_put(vm.fd, layout.put, layout.nr, state._block, undo)
        if not word:
            return
        error = _put_error(vm, state, word, is_put=bool(undo.got))
        if undo.got:
            before = state._of(layout, bytes(ffi.buffer(block, layout.size)), None)
            _note_lost(error, before, lambda: VmState.get(vm, before.parts))
        raise error

    # ---- the parts ----

    @property
    def clock(self) -> Clock:
        """kvmclock."""
        return self.part("clock")  # type: ignore[no-any-return]  # the record of the part

    @property
    def pic_master(self) -> Pic:
        """The first in-kernel PIC."""
        return self.part("pic_master")  # type: ignore[no-any-return]

    @property
    def pic_slave(self) -> Pic:
        """The second in-kernel PIC."""
        return self.part("pic_slave")  # type: ignore[no-any-return]

    @property
    def ioapic(self) -> IoApic:
        """The in-kernel I/O APIC."""
        return self.part("ioapic")  # type: ignore[no-any-return]

    @property
    def pit(self) -> Pit:
        """The in-kernel interval timer."""
        return self.part("pit")  # type: ignore[no-any-return]


def _names(cls: type[VmState], call: str, parts: Iterable[str]) -> tuple[str, ...]:
    names = (parts,) if isinstance(parts, str) else parts
    try:
        found = tuple(names)
    except TypeError:
        raise ArgumentTypeError(call, "parts", parts, "names of parts") from None
    for name in found:
        cls._part_row(call, name)
    return found


def _get(vm: Vm, row: Part) -> tuple[bytes, int]:
    # A part's bytes and 0, or the errno.
    size = 520 if row.kind == lib.HV_PART_CHIP else int(row.record.SIZE)  # type: ignore[attr-defined]  # else a Record
    layout = Layout.of([(row.name, size)])
    block = bytearray(size)
    word = lib.hv_vm_state_get(vm.fd, layout.get, 1, ffi.from_buffer("uint8_t[]", block))
    return bytes(block), word >> lib.HV_STATE_ERROR_SHIFT & 0xFFFF


def _clock(call: str, clock: Clock, realtime: bool) -> Clock:
    # As KVM_SET_CLOCK is to take it.
    if not realtime:
        return clock.replace(flags=clock.flags & ~_CLOCK_FLAGS)
    if not clock.flags & lib.KVM_CLOCK_REALTIME:
        raise ArgumentError(call, "realtime", realtime, "False", "the clock of this state has no realtime")
    return clock


def _put_error(vm: Vm, state: VmState, word: int, *, is_put: bool) -> HvError:
    # What a put that stopped means; not `is_put`: it stopped at getting what was before.
    at, err = word >> lib.HV_STATE_AT_SHIFT & 0xFF, word >> lib.HV_STATE_ERROR_SHIFT & 0xFFFF
    row = part(state.parts[at] if is_put else state._layout.getting[at])
    call = row.put if is_put else row.get
    refusal = vm._refusal(call, err, None, None, None, f"part {row.name}")
    if type(refusal) is not KvmError or not is_put:
        return refusal
    field, value, accepted = None, None, None
    if row.name == "clock":
        field, value, accepted = "clock.flags", state.clock.flags, f"bits of {_CLOCK_FLAGS:#x}"
    return RefusedStateError(err, call, row.name, field, value, accepted)
