"""The check of memslots: what our model says of random slot changes, and what the kernel answers."""

from __future__ import annotations

import errno
import random

from .registry import check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..host import Mapping
    from ..kvm import Vm
    from ..kvm.slotrules import SlotLimits
    from .result import Tally

__all__ = ["check_memslots", "random_change", "set_region"]

_PAGE = 4096
_NR_PAGES = 64  # of the memory that the slots have
_LOG, _READONLY, _GUEST = 1, 2, 4  # KVM_MEM_*
_CHUNK = 500  # changes of one VM


def random_change(rng: random.Random, limits: SlotLimits, hva: int, guests: list[int]) -> tuple[tuple[int, ...], bool]:
    """A change as ((slot, gpa, size, hva, flags, guest_memfd, guest_memfd_offset), whether by ..._REGION2).

    It could be right; one in three has a value that is wrong, or at a limit.  `hva` is the address of 64 pages,
    `guests` are descriptors, of guest_memfds and of what is none.
    """
    second = rng.random() < 0.4

    def pages(*counts: int) -> int:
        return rng.choice(counts) * _PAGE

    slot, gpa = rng.randrange(5), rng.randrange(16) * _PAGE
    size, at = pages(0, 0, 1, 2, 2, 2, 2, 3), hva + pages(0, 0, 0, 0, 8)
    flags = rng.choice((0, 0, 0, _LOG, _LOG, _READONLY))
    fd, offset = -1, 0
    if second and guests and rng.random() < 0.5:
        flags, fd, offset = _GUEST, rng.choice(guests), pages(0, 0, 1, 2, 4, 62, 63)
    if rng.random() < 0.33:
        edge = 1 << limits.gpa_bits
        field = rng.randrange(6)
        if field == 0:
            slot = rng.choice((limits.nr_slots - 1, limits.nr_slots, 0xFFFF, limits.nr_spaces << 16, (1 << 32) - 1))
        elif field == 1:
            gpa = rng.choice((1, gpa + 8, edge - _PAGE, edge - 2 * _PAGE, edge, (1 << 64) - _PAGE, (1 << 64) - 8192))
        elif field == 2:
            size = rng.choice((100, _PAGE + 1, _PAGE << 31, 1 << 63, (1 << 64) - _PAGE))
        elif field == 3:
            end = limits.user_end
            at = rng.choice((at + 1, at + 8, end, end - _PAGE, end - 2 * _PAGE, 1 << 63, (1 << 64) - _PAGE))
        elif field == 4:
            flags = rng.choice((_LOG | _READONLY, _GUEST, _GUEST | _LOG, _GUEST | _READONLY, 8, 1 << 31))
        else:
            offset = rng.choice((1, 100, _PAGE << 40, (1 << 64) - _PAGE, (1 << 64) - 1))
    return (slot, gpa, size, at, flags, fd, offset), second


def set_region(vm: Vm, change: tuple[int, ...], second: bool) -> int:
    """Issues the change, past everything that would check or note it; 0, or the errno."""
    from .._ffi import ffi, lib

    slot, gpa, size, hva, flags, fd, offset = change
    if second:
        arg2 = ffi.new("struct kvm_userspace_memory_region2 *", [slot, flags, gpa, size, hva, offset])
        arg2.guest_memfd = fd & 0xFFFFFFFF
        return -min(lib.kvm_set_user_memory_region2(vm.fd, arg2), 0)
    arg = ffi.new("struct kvm_userspace_memory_region *", [slot, flags, gpa, size, hva])
    return -min(lib.kvm_set_user_memory_region(vm.fd, arg), 0)


@check("memslots", "KVM_SET_USER_MEMORY_REGION", cases=4000, slow=100_000)
def check_memslots(tally: Tally, cases: int) -> None:
    """Random changes of slots: the errno that the rules of `hvmodel.kvm.slotrules` predict is the kernel's, where both
    follow the same history of what was taken.  With guest_memfds, where KVM has them."""
    from .._ffi import lib
    from ..host import Mapping
    from ..kvm import Kvm
    from ..kvm.slotrules import SlotLimits

    rng = random.Random(3)
    with Mapping(None, _NR_PAGES * _PAGE) as memory, Kvm() as kvm:
        if kvm.check_extension(lib.KVM_CAP_GUEST_MEMFD) <= 0:
            tally.lack("KVM_CAP_GUEST_MEMFD: slots with a guest_memfd")
        while tally.compared < cases:
            with kvm.create_vm() as vm:
                limits = SlotLimits.of(vm.fd)
                _compare(tally, rng, vm, limits, memory, min(_CHUNK, cases - tally.compared))


def _compare(tally: Tally, rng: random.Random, vm: Vm, limits: SlotLimits, memory: Mapping, cases: int) -> None:
    # A new VM's answers to so many changes.
    import os

    from ..kvm import MemSlot
    from ..kvm.slotrules import refusal

    mine = _guest_memfds(vm, limits)
    guests = dict.fromkeys(mine, _NR_PAGES * _PAGE)
    other = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    guests[other] = -errno.EINVAL
    slots: dict[int, MemSlot] = {}
    try:
        for _ in range(cases):
            change, second = random_change(rng, limits, memory.hva, [*mine, *mine, other, -1])
            slot, gpa, size, hva, flags, fd, offset = change
            wanted = MemSlot(slot, gpa, size, hva, flags, fd if flags & _GUEST else None, offset)
            fault = refusal(limits, slots, wanted, guests, second=second)
            err = set_region(vm, change, second)
            tally.compare(f"{wanted} to {slots}", fault.errno if fault else 0, err)
            if not err:
                # The history is the kernel's, so that one mistake of ours is counted once.
                slots.pop(slot, None)
                if size:
                    slots[slot] = wanted
    finally:
        for fd in guests:
            os.close(fd)


def _guest_memfds(vm: Vm, limits: SlotLimits) -> list[int]:
    return [vm.create_guest_memfd(_NR_PAGES * _PAGE) for _ in range(2)] if limits.flags & _GUEST else []
