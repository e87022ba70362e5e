"""Many slots changed at once: the deletions, changes and additions of `Vm.change_memory_regions`, and their undoing.

Owns the journal of one such change.  Each step is written down before it is made, and undoing a step that was not made
does nothing: so neither a refusal nor an interruption (Ctrl-C) leaves it half done.
"""

from __future__ import annotations

import errno

from ..errors import ArgumentError, ArgumentTypeError, HvError, KvmError
from ..units import PAGE_SIZE
from .handle import _uint
from .memslots import MemSlot, SlotMemory
from .vm import _backing, _pin, _unpin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .vm import Vm

__all__ = ["change"]

_CALL = "KVM_SET_USER_MEMORY_REGION"
_MAX_PAGES = (1 << 31) - 1  # KVM_MEM_MAX_NR_PAGES
_GUEST_MEMFD = 4


def change(
    vm: Vm,
    delete: list[int],
    flags: dict[int, int],
    add: list[SlotMemory],
    space: int,
    done: Callable[[list[MemSlot]], object] | None,
) -> list[MemSlot]:
    """What `Vm.change_memory_regions` does."""
    fd = vm.fd
    _uint(_CALL, "address_space", space, 16)
    if done is not None and not callable(done):
        raise ArgumentTypeError(_CALL, "done", done, "None, or a callable (list of MemSlot)")
    backings = [_check(row) for row in add]
    with vm._slot_lock:
        slots = dict(vm._slots.slots)
        for slot in delete:
            if slots.pop(_uint(_CALL, "slot", slot), None) is None:
                raise ArgumentError(_CALL, "delete", slot, f"a slot that exists, once: {sorted(vm._slots.slots)}")
        for slot, new in flags.items():
            _uint(_CALL, "flags", new)
            if _uint(_CALL, "slot", slot) not in slots:
                raise ArgumentError(_CALL, "flags", slot, f"a slot that stays: {sorted(slots)}")
        ids = _free_ids(vm, slots, space, len(add))
        return _Journal(vm, fd).make(delete, flags, add, backings, ids, done)


def _check(row: object) -> tuple[Any, int]:
    # The mapping and the address of a new slot.
    if not isinstance(row, SlotMemory):
        raise ArgumentTypeError(_CALL, "add", row, "a SlotMemory")
    mapping, hva, size = _backing(_CALL, 0, row.gpa, row.memory, row.offset, row.size, row.flags)
    if size // PAGE_SIZE > _MAX_PAGES:
        raise ArgumentError(_CALL, "size", size, f"up to {_MAX_PAGES} pages", "too large for one slot")
    return mapping, hva


_LEAST_SLOTS = 32  # of every KVM: what QEMU takes where KVM_CAP_NR_MEMSLOTS is 0


def _free_ids(vm: Vm, slots: dict[int, MemSlot], space: int, count: int) -> list[int]:
    # The first ids of the address space that no slot has.
    from .._ffi import lib

    ids: list[int] = []
    slot, nr_slots = 0, _LEAST_SLOTS
    while len(ids) < count:
        if slot == _LEAST_SLOTS:
            nr_slots = max(vm._extension(lib.KVM_CAP_NR_MEMSLOTS), _LEAST_SLOTS)
        if slot == nr_slots:
            detail = f"{len(slots)} slots stay, and {count} are to be made"
            raise ArgumentError(_CALL, "add", count, f"up to {nr_slots} slots in an address space", detail)
        if space << 16 | slot not in slots:
            ids.append(space << 16 | slot)
        slot += 1
    return ids


class _Journal:
    # What was done of a change, or may have been: steps (entry before or None, entry after or None).
    def __init__(self, vm: Vm, fd: int) -> None:
        self.vm, self.fd = vm, fd
        self.steps: list[tuple[MemSlot | None, MemSlot | None]] = []
        self.pins: dict[int, tuple[list[Any], str]] = {}  # of the new slots

    def make(
        self,
        delete: list[int],
        flags: dict[int, int],
        add: list[SlotMemory],
        backings: list[tuple[Any, int]],
        ids: list[int],
        done: Callable[[list[MemSlot]], object] | None,
    ) -> list[MemSlot]:
        vm, before, pinned = self.vm, self.vm._slots.slots, self.vm._pinned
        after = dict(before)
        try:
            for slot in delete:
                self._step(before[slot], None, after)
            for slot, new in flags.items():
                old = before[slot]
                if old.flags != new:
                    entry = MemSlot(slot, old.gpa, old.size, old.hva, new, old.guest_memfd, old.guest_memfd_offset)
                    self._step(old, entry, after)
            added = []
            for slot, row, (mapping, hva) in zip(ids, add, backings, strict=True):
                pin = [mapping], f"memslot {slot} of VM fd={self.fd}"
                _pin(*pin)
                self.pins[slot] = pin
                added.append(MemSlot(slot, row.gpa, row.size, hva, row.flags))
                self._step(None, added[-1], after)
            vm._slots.replace(after, self._ids())
            vm._pinned = {slot: pins for slot, pins in pinned.items() if slot not in delete} | self.pins
            if done is not None:
                done(added)
        except BaseException as error:
            vm._pinned = pinned
            self._undo(error, after)
            raise
        for slot in delete:
            _unpin(*pinned.get(slot, ((), "")))
        return added

    def _step(self, before: MemSlot | None, entry: MemSlot | None, after: dict[int, MemSlot]) -> None:
        slot = (before or entry).slot  # type: ignore[union-attr]  # one of them is there
        self.steps.append((before, entry))
        try:
            self.vm._set(self.fd, entry or MemSlot(slot, 0, 0, 0, 0), slots=after)
        except HvError:
            self.steps.pop()  # refused: there is nothing to undo
            raise
        if entry is None:
            del after[slot]
        else:
            after[slot] = entry

    def _ids(self) -> list[int]:
        return [slot.slot for step in self.steps for slot in step if slot is not None]

    def _undo(self, error: BaseException, now: dict[int, MemSlot]) -> None:
        # Every step backwards, from the slots as they are now.  What the kernel refuses is noted in `error`; what is
        # left then is what `memslots` says.
        vm = self.vm
        for old, entry in reversed(self.steps):
            slot = (old or entry).slot  # type: ignore[union-attr]  # one of them is there
            try:
                if old is None:
                    vm._set(self.fd, MemSlot(slot, 0, 0, 0, 0), slots=now)
                    now.pop(slot, None)
                else:
                    vm._set(self.fd, old, second=bool(old.flags & _GUEST_MEMFD), slots=now)
                    now[slot] = old
            except KvmError as refused:
                if old is None and refused.errno == errno.EINVAL:
                    continue  # an interruption came before it was made
                error.add_note(f"slot {slot} could not be put back as it was: {refused}")
                if slot not in now:
                    vm._release(slot)
                elif old is None:
                    # The new slot stays, and what it keeps; so the old one of its id could not come back either.
                    vm._release(slot)
                    vm._pinned[slot] = self.pins.pop(slot)
        for pin in self.pins.values():
            _unpin(*pin)
        vm._slots.replace(now, self._ids())
