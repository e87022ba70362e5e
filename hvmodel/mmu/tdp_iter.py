"""The TDP iterator: how KVM walks the tables of EPT or NPT, in pre-order, and how it yields on the way.

A walk visits every entry that covers frames [start, end), an entry before what is below it, down to `min_level`:

    start   goal = start; at the root's entry that covers the goal
    next    yielded?            -> begin again at the root, towards the same goal
            a table below, and not at min_level?  -> one level down, to the entry that covers the goal
            not the last entry of its table?      -> the next entry, whose first frame is the new goal
            a table above?      -> one level up, then on to the next entry there
            else                -> the end: valid is false

A walker that holds mmu_lock too long lets go of it and says so to the iterator (`yielded`); the next step begins at the
root again, since the tables it stood in may be gone.  It does not yield twice for one goal, or it would never end.

By version: `gfn_bits` came with 6.14 (TDX: what the index of a shared frame has besides the frame); since 6.13 the
walker first asks whether it should yield, then whether it has gone on since; before, the other way round, with the same
answer.

Source: linux:arch/x86/kvm/mmu/tdp_iter.{h,c}, arch/x86/kvm/mmu/tdp_mmu.c (tdp_mmu_iter_need_resched,
tdp_mmu_iter_cond_resched) @v6.18.
"""

from __future__ import annotations

from ..arch.number import number
from ..errors import ArgumentError
from .levels import PG_LEVEL_4K, PT64_ROOT_MAX_LEVEL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Read = Callable[[int, int], int]  # table, index -> entry
    Child = Callable[[int, int], int | None]  # entry, level -> the table below, None where there is none

__all__ = ["TdpIter"]

_LEVEL_BITS = 9
_ENTRIES = 1 << _LEVEL_BITS


class TdpIter:
    """An iterator over the entries of one root, its fields named as those of struct tdp_iter; one thread at a time.

    `read(table, index)` gives an entry, `child(entry, level)` the table below it or None; a table is whatever these two
    understand, `root` the first of them.  `sptep` is here a pair (table, index), `pt_path` the tables on the way,
    that of level 1 first.

    ArgumentError: levels out of range (1 to 5; `min_level` no higher than `root_level`), a frame of more than 64 bits.

    >>> tables = {0: {0: 1}, 1: {3: 0x1234}}  # a root whose first entry leads to table 1
    >>> it = TdpIter(0, 2, lambda t, i: tables[t].get(i, 0), lambda e, level: e if level > 1 and e else None)
    >>> it.start(1, 0)
    >>> for _ in range(4):
    ...     print(it.level, it.gfn, it.old_spte)
    ...     it.next()
    2 0 1
    1 0 0
    1 1 0
    1 2 0
    """

    def __init__(
        self, root: int, root_level: int, read: Read, child: Child, *, gfn_bits: int = 0, as_id: int = 0
    ) -> None:
        self.root_level = number("TdpIter", "root_level", root_level, PT64_ROOT_MAX_LEVEL, PG_LEVEL_4K)
        self.gfn_bits = number("TdpIter", "gfn_bits", gfn_bits)
        self.as_id = number("TdpIter", "as_id", as_id, 1)
        self.next_last_level_gfn = 0
        self.yielded_gfn = 0
        self.pt_path: list[int | None] = [None] * PT64_ROOT_MAX_LEVEL
        self.pt_path[root_level - 1] = root
        self.gfn = 0
        self.min_level = PG_LEVEL_4K
        self.level = root_level
        self.old_spte = 0
        self.valid = False
        self.yielded = False
        self._read, self._child = read, child
        self._index = 0

    def __repr__(self) -> str:
        if not self.valid:
            return "<TdpIter at its end>"
        return f"<TdpIter level {self.level}, gfn {self.gfn:#x}, towards {self.next_last_level_gfn:#x}>"

    @property
    def sptep(self) -> tuple[int | None, int]:
        """Where the entry is: the table and the index in it."""
        return self.pt_path[self.level - 1], self._index

    def start(self, min_level: int = PG_LEVEL_4K, gfn: int = 0) -> None:
        """Begin at the root, towards a frame (tdp_iter_start).

        ArgumentError: `min_level` above the root, a frame beyond it, or one that reaches `gfn_bits`, for which the
        kernel warns and ends the walk.
        """
        self.min_level = number("TdpIter.start", "min_level", min_level, self.root_level, PG_LEVEL_4K)
        gfn = number("TdpIter.start", "gfn", gfn)
        if gfn >> _LEVEL_BITS * self.root_level:
            accepted = f"below {1 << _LEVEL_BITS * self.root_level:#x}"
            raise ArgumentError("TdpIter.start", "gfn", gfn, accepted, f"the root has {self.root_level} levels")
        if self.gfn_bits and gfn >= self.gfn_bits:
            accepted = f"below gfn_bits, {self.gfn_bits:#x}"
            raise ArgumentError("TdpIter.start", "gfn", gfn, accepted, "a frame has none of those bits itself")
        self.next_last_level_gfn = gfn
        self.restart()

    def restart(self) -> None:
        """Go back to the root, towards the same goal (tdp_iter_restart)."""
        self.yielded = False
        self.yielded_gfn = self.next_last_level_gfn
        self.level = self.root_level
        self.gfn = self._round(self.next_last_level_gfn, self.level)
        self._refresh()
        self.valid = True

    def next(self) -> None:
        """Step to the next entry; `valid` is false behind the last one (tdp_iter_next)."""
        if self.yielded:
            self.restart()
            return
        if self._step_down():
            return
        while True:
            if self._step_side():
                return
            if not self._step_up():
                break
        self.valid = False

    def need_resched(self, *, need_resched: bool, lock_contended: bool) -> bool:
        """Whether to yield here: somebody waits for the CPU or the lock, and the walk has gone on since it last did."""
        if not need_resched and not lock_contended:
            return False
        return self.next_last_level_gfn != self.yielded_gfn

    def cond_resched(
        self, *, need_resched: bool = False, lock_contended: bool = False, flush: bool = False, shared: bool = False
    ) -> tuple[str, ...]:
        """Yield if that is due (tdp_mmu_iter_cond_resched): what is done, in order; nothing where it is not due.

        After a yield the caller steps on at once by `next`, which begins at the root.  `flush`: TLBs wait to be
        flushed; `shared`: mmu_lock is held for reading.  ArgumentError: the iterator has yielded and not gone on, for
        which the kernel warns.
        """
        if self.yielded:
            raise ArgumentError("cond_resched", "yielded", True, "False", "next comes between two yields")
        if not self.need_resched(need_resched=need_resched, lock_contended=lock_contended):
            return ()
        lock = "read" if shared else "write"
        steps = ["kvm_flush_remote_tlbs"] if flush else []
        steps += ["rcu_read_unlock", f"cond_resched_rwlock_{lock}", "rcu_read_lock"]
        self.yielded = True
        return tuple(steps)

    def entries(self, start: int, end: int, *, min_level: int = PG_LEVEL_4K) -> Iterator[TdpIter]:
        """This iterator at each entry that covers a frame of [start, end), as for_each_tdp_pte_min_level visits them.

        A loop may call `cond_resched`, and goes on to the next round where that did something.
        """
        end = number("TdpIter.entries", "end", end)
        self.start(min_level, start)
        while self.valid and self.gfn < end:
            yield self
            self.next()

    # ---- steps ----

    def _round(self, gfn: int, level: int) -> int:
        return gfn & -1 << _LEVEL_BITS * (level - 1)

    def _refresh(self) -> None:
        # Finds and reads the entry of `gfn` in the table of `level`.
        self._index = (self.gfn | self.gfn_bits) >> _LEVEL_BITS * (self.level - 1) & _ENTRIES - 1
        self._reread()

    def _reread(self) -> None:
        table = self.pt_path[self.level - 1]
        assert table is not None
        self.old_spte = self._read(table, self._index)

    def _step_down(self) -> bool:
        if self.level == self.min_level:
            return False
        # Read again: the table may be gone since.
        self._reread()
        table = self._child(self.old_spte, self.level)
        if table is None:
            return False
        self.level -= 1
        self.pt_path[self.level - 1] = table
        self.gfn = self._round(self.next_last_level_gfn, self.level)
        self._refresh()
        return True

    def _step_side(self) -> bool:
        if self._index == _ENTRIES - 1:
            return False
        self.gfn += 1 << _LEVEL_BITS * (self.level - 1)
        self.next_last_level_gfn = self.gfn
        self._index += 1
        self._reread()
        return True

    def _step_up(self) -> bool:
        if self.level == self.root_level:
            return False
        self.level += 1
        self.gfn = self._round(self.gfn, self.level)
        self._refresh()
        return True
