"""How KVM notices that host memory goes away while a guest's fault is under way: the MMU notifier and its retry rules.

A fault looks its page up without holding mmu_lock.  Meanwhile the host may unmap that page (madvise, munmap, swap,
migration) and tell KVM by a notifier.  So a fault remembers `mmu_invalidate_seq` first, and asks again under the lock:

    fault    seq = mmu_invalidate_seq | look the page up          | lock | retry? -> give up, or map the page
    notifier                           begin, zap, end: seq + 1

    begin       in_progress + 1; from 0 to 1 the range is emptied
    range_add   the range grows to hold [start, end) too
    end         seq + 1, then in_progress - 1

    retry of a frame   in_progress and the frame in the range,  or  seq is not what the fault remembers

Only an invalidation that overlaps a memslot does any of that: others are told to KVM, which looks and leaves.  There is
one range for all invalidations under way: a frame between two of them retries too.

By version: this is 6.8 and later.  Until 6.7 the range was one of host addresses, given to begin at once
(mmu_invalidate_retry_hva), and there was no question without the lock; until 5.19 the names had mmu_notifier_ for
mmu_invalidate_.

Source: linux:virt/kvm/kvm_main.c (kvm_mmu_invalidate_begin, kvm_mmu_invalidate_range_add, kvm_mmu_invalidate_end,
kvm_handle_hva_range), include/linux/kvm_host.h (mmu_invalidate_retry, mmu_invalidate_retry_gfn and its unsafe kin),
arch/x86/kvm/mmu/mmu.c (is_page_fault_stale, kvm_faultin_pfn) @v6.18.
"""

from __future__ import annotations

from ..arch.number import ALL, number
from ..errors import ArgumentError
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["INVALID_GPA", "GfnRange", "MmuInvalidate", "Slot", "gfn_ranges", "is_page_fault_stale"]

INVALID_GPA = ALL
"""What the range's ends are while there is none."""

_PAGE_SHIFT = 12
_PAGE_SIZE = 1 << _PAGE_SHIFT


class Slot(Value):
    """A memslot as the notifier sees it: `npages` pages from the frame `base_gfn`, at the host address `hva`."""

    base_gfn: int
    npages: int
    hva: int
    id: int = 0


class GfnRange(Value):
    """Frames [start, end) of the memslot with this id, to be invalidated."""

    slot: int
    start: int
    end: int


def gfn_ranges(slots: Iterable[Slot], start: int, end: int) -> tuple[GfnRange, ...]:
    """What a change of host addresses [start, end) invalidates (kvm_handle_hva_range): frames of each slot it meets.

    In the order of the slots' host addresses.  ArgumentError: an empty range, or one of more than 64 bits.

    >>> gfn_ranges([Slot(0x100, 16, 0x7000_0000)], 0x7000_3000, 0x7000_5000)
    (GfnRange(slot=0, start=0x103, end=0x105),)
    """
    start, end = number("gfn_ranges", "start", start), number("gfn_ranges", "end", end)
    if end <= start:
        raise ArgumentError("gfn_ranges", "end", end, f"above start, {start:#x}")
    found = []
    for slot in sorted(slots, key=lambda slot: (slot.hva, slot.id)):
        low, high = max(start, slot.hva), min(end, slot.hva + (slot.npages << _PAGE_SHIFT))
        if low < high:
            first = slot.base_gfn + (low - slot.hva >> _PAGE_SHIFT)
            # The end is rounded up to a whole page.
            last = slot.base_gfn + (high + _PAGE_SIZE - 1 - slot.hva >> _PAGE_SHIFT)
            found.append(GfnRange(slot.id, first, last))
    return tuple(found)


class MmuInvalidate:
    """The notifier's state of one VM, its fields named as those of struct kvm; one thread at a time, as mmu_lock says.

    >>> state = MmuInvalidate()
    >>> seq = state.mmu_invalidate_seq  # a fault begins
    >>> state.begin(); state.range_add(5, 8)
    >>> [state.retry_gfn(seq, gfn) for gfn in (4, 5, 7, 8)]
    [False, True, True, False]
    >>> state.end()
    >>> state.retry_gfn(seq, 4), state.retry_gfn(state.mmu_invalidate_seq, 5)
    (True, False)
    """

    def __init__(self) -> None:
        self.mmu_invalidate_seq = 0
        self.mmu_invalidate_in_progress = 0
        self.mmu_invalidate_range_start = 0
        self.mmu_invalidate_range_end = 0

    def __repr__(self) -> str:
        text = f"seq={self.mmu_invalidate_seq}, in_progress={self.mmu_invalidate_in_progress}"
        if self.mmu_invalidate_in_progress:
            text += f", range=[{self.mmu_invalidate_range_start:#x}, {self.mmu_invalidate_range_end:#x})"
        return f"<MmuInvalidate {text}>"

    def begin(self) -> None:
        """kvm_mmu_invalidate_begin: the caller holds mmu_lock for writing, and adds its range before it lets go."""
        self.mmu_invalidate_in_progress += 1
        if self.mmu_invalidate_in_progress == 1:
            self.mmu_invalidate_range_start = INVALID_GPA
            self.mmu_invalidate_range_end = INVALID_GPA

    def range_add(self, start: int, end: int) -> None:
        """kvm_mmu_invalidate_range_add: frames [start, end) are invalidated too.

        ArgumentError: outside of begin and end, for which the kernel warns; an empty range.
        """
        start, end = number("range_add", "start", start), number("range_add", "end", end)
        if end <= start:
            raise ArgumentError("range_add", "end", end, f"above start, {start:#x}")
        self._check_under_way("range_add")
        if self.mmu_invalidate_range_start == INVALID_GPA:
            self.mmu_invalidate_range_start, self.mmu_invalidate_range_end = start, end
        else:
            self.mmu_invalidate_range_start = min(self.mmu_invalidate_range_start, start)
            self.mmu_invalidate_range_end = max(self.mmu_invalidate_range_end, end)

    def end(self) -> None:
        """kvm_mmu_invalidate_end.  ArgumentError: nothing is under way, for which the kernel calls the VM bugged.

        Where no range was added the kernel warns, and goes on as here.
        """
        self._check_under_way("end")
        # In this order, so that no one sees neither: an invalidation under way, nor a new sequence number.
        self.mmu_invalidate_seq = self.mmu_invalidate_seq + 1 & ALL
        self.mmu_invalidate_in_progress -= 1

    def invalidate(self, slots: Iterable[Slot], start: int, end: int) -> tuple[GfnRange, ...]:
        """What the notifier of a change of host addresses [start, end) does, from begin to end; the frames it zaps.

        Nothing at all where no slot overlaps.  Errors as `gfn_ranges`.

        >>> state = MmuInvalidate()
        >>> state.invalidate([Slot(0x100, 16, 0x7000_0000)], 0x1000, 0x2000), state.mmu_invalidate_seq
        ((), 0)
        """
        found = gfn_ranges(slots, start, end)
        if found:
            self.begin()
            for part in found:
                self.range_add(part.start, part.end)
            self.end()
        return found

    def retry(self, mmu_seq: int) -> bool:
        """mmu_invalidate_retry: whether a fault of any frame, begun at this sequence number, must be tried again."""
        number("retry", "mmu_seq", mmu_seq)
        return self.mmu_invalidate_in_progress > 0 or self.mmu_invalidate_seq != mmu_seq

    def retry_gfn(self, mmu_seq: int, gfn: int) -> bool:
        """mmu_invalidate_retry_gfn: whether a fault of this frame, begun at this sequence number, must be tried again.

        True too between begin and the first range_add, for which the kernel warns.
        """
        gfn = number("retry_gfn", "gfn", gfn)
        number("retry_gfn", "mmu_seq", mmu_seq)
        if self.mmu_invalidate_in_progress:
            if INVALID_GPA in (self.mmu_invalidate_range_start, self.mmu_invalidate_range_end):
                return True
            if self._has(gfn):
                return True
        return self.mmu_invalidate_seq != mmu_seq

    def retry_gfn_unsafe(self, mmu_seq: int, gfn: int) -> bool:
        """mmu_invalidate_retry_gfn_unsafe: the same asked without mmu_lock, before the lock is worth its price.

        It may miss what happens just then, so that the fault asks again under the lock; without a range no frame is in
        it.
        """
        gfn = number("retry_gfn_unsafe", "gfn", gfn)
        number("retry_gfn_unsafe", "mmu_seq", mmu_seq)
        if self.mmu_invalidate_in_progress and self._has(gfn):
            return True
        return self.mmu_invalidate_seq != mmu_seq

    def _has(self, gfn: int) -> bool:
        return self.mmu_invalidate_range_start <= gfn < self.mmu_invalidate_range_end

    def _check_under_way(self, call: str) -> None:
        if not self.mmu_invalidate_in_progress:
            progress = self.mmu_invalidate_in_progress
            raise ArgumentError(call, "mmu_invalidate_in_progress", progress, "1 or more", "begin comes first")


def is_page_fault_stale(
    state: MmuInvalidate,
    mmu_seq: int,
    gfn: int,
    *,
    has_slot: bool = True,
    root_obsolete: bool = False,
    root_is_special: bool = False,
    free_requested: bool = False,
) -> bool:
    """Whether a fault that now holds mmu_lock must give up and be tried again (is_page_fault_stale).

    `root_obsolete`: the root it began with belongs to an older generation.  `root_is_special`: the root has no page of
    its own (PAE's PDPTEs), for which `free_requested`, a pending request to free obsolete roots, counts instead.
    `has_slot`: the frame is in a memslot; without one there is no page that could go.

    >>> is_page_fault_stale(MmuInvalidate(), 0, 5), is_page_fault_stale(MmuInvalidate(), 1, 5)
    (False, True)
    """
    if root_obsolete and not root_is_special:
        return True
    if root_is_special and free_requested:
        return True
    return bool(has_slot) and state.retry_gfn(mmu_seq, gfn)
