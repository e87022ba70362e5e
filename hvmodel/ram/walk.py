"""Walks by the million: `walk_many`, the walk of hvmodel.mmu.walk for arrays of addresses, with numpy.

Addresses go through in blocks that fit into the processor's cache.  Of a block, each level is read for all addresses at
once (once for all of them, where one entry is all of theirs).  As long as the entries of a level say the same (all lead
on, or all map a page, or none is present, or all are wrong) nothing else is asked.  A block where they do not is parted
by what they say, and the parts go through again; few addresses that differ go through one level after the other, with
those still under way picked out.

    index = (table & frame | gva >> shift - 3 & 0xff8) >> 3     entry = RAM[index]     rights &= entry ^ NX

Entries are read from RAM in place, by each call anew.
"""

from __future__ import annotations

import numpy as np

from ..errors import ArgumentError, ArgumentTypeError
from ..mmu.permission import (
    ACC_ALL,
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    _permission_fault,
    check_access,
)
from ..mmu.walk import Walker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import ArrayLike, NDArray

    Words = NDArray[np.uint64]
    Places = NDArray[np.intp]

__all__ = ["INVALID_GPA", "Walks", "walk_many"]

INVALID_GPA = (1 << 64) - 1
"""Where a walk leads that faults, as the kernel has it."""

_BLOCK = 16384  # addresses; a few arrays of them fit into the second-level cache
_ADDRESS = (1 << 52) - 4096
_NX = 1 << 63
_DIRTY = 1 << 6
_NO_FAULT = -1

# Made once: each of them costs as much as a hundred addresses.
_SHIFTS = {by: np.uint64(by) for by in (3, 5, 12, 21, 30, 39, 48, 63)}
_INDEX, _FRAME, _P, _PS = np.uint64(511), np.uint64(_ADDRESS), np.uint64(1), np.uint64(0x80)

_FEW = 64  # addresses, for which it does not pay to ask whether they are alike
_DONE = np.empty(0, np.bool_)


class Walks:
    """What `walk_many` found: arrays, an item for each address.

    `gva`: the addresses, a copy.  `gpa` (uint64): where each leads; INVALID_GPA: it faults.  `error_code` (int16): of
    its page fault; -1: it leads somewhere.  `level` (uint8) and `pte_access` (uint8): as of `Walk`.
    """

    __slots__ = ("error_code", "gpa", "gva", "level", "pte_access")

    def __init__(self, gva: Words) -> None:
        self.gva = gva
        self.gpa = np.empty(len(gva), np.uint64)
        self.error_code = np.empty(len(gva), np.int16)
        self.level = np.empty(len(gva), np.uint8)
        self.pte_access = np.empty(len(gva), np.uint8)

    @property
    def ok(self) -> NDArray[np.bool_]:
        """Which of them lead somewhere."""
        found: NDArray[np.bool_] = self.error_code == _NO_FAULT
        return found

    def __len__(self) -> int:
        return len(self.gva)

    def __repr__(self) -> str:
        return f"<Walks of {len(self)} addresses, {int(np.count_nonzero(self.ok))} lead somewhere>"


def walk_many(walker: Walker, gvas: ArrayLike, access: int = 0) -> Walks:
    """Walk many addresses for one kind of access: the answers of `walker.walk(gva, access)`, in arrays.

    `walker`: a Walker, of an image or of a live machine (`Machine.walker()`).  `gvas`: addresses, one-dimensional, of
    integers 0 to 2**64-1 (below long mode to 2**32-1).  A and D are not set in memory, and not listed: of an address of
    which more is to be known, ask `walker.walk`.

    ArgumentError: an address or access out of range; more than one dimension.  ArgumentTypeError: not integers.
    ClosedError.  Threads: as the walker; numpy lets others run meanwhile.  What is closed while it works is held to its
    end, and answered from.

    >>> from hvmodel.arch.paging import PageTables
    >>> tables = PageTables(0)
    >>> tables.map(0x40_0000, 0x9000, 0x2000, user=True)
    >>> found = walk_many(Walker(tables.image()), [0x40_0123, 0x40_1123, 0x40_2123])
    >>> [hex(gpa) for gpa in found.gpa], found.error_code.tolist(), found.level.tolist()
    (['0x9123', '0xa123', '0xffffffffffffffff'], [-1, -1, 0], [1, 1, 1])
    """
    call = "walk_many"
    if not isinstance(walker, Walker):
        raise ArgumentTypeError(call, "walker", walker, "a Walker")
    access = check_access(call, access)
    walker.memory.check_open(call)
    addresses = _addresses(call, gvas, walker.mmu.linear_bits)
    found = Walks(addresses)
    way = _Way(walker, access)
    walker.memory.check_open(call)  # another thread may have closed it while its pieces were taken
    for at in range(0, len(addresses), _BLOCK):
        piece = slice(at, at + _BLOCK)
        way.walk(addresses[piece], found, piece)
    return found


def _addresses(call: str, gvas: ArrayLike, bits: int) -> Words:
    asked: Any = gvas
    try:
        given: Any = np.asarray(asked)
    except ValueError:  # lists of lists that are not of one length
        raise ArgumentTypeError(call, "gvas", gvas, "integers, in one dimension") from None
    if given.size and given.dtype.kind in "fO" and not isinstance(asked, np.ndarray):
        # What numpy makes of ints of which some are above 2**63-1; or no ints.
        items = list(asked) if hasattr(asked, "__iter__") else []
        if not items or not all(type(item) is int or isinstance(item, np.integer) for item in items):
            raise ArgumentTypeError(call, "gvas", gvas, "integers")
        try:
            given = np.array(items, np.uint64)
        except OverflowError:
            raise ArgumentError(call, "gvas", gvas, f"0 to 2**{bits}-1") from None
    if given.size and given.dtype.kind not in "ui":
        raise ArgumentTypeError(call, "gvas", gvas, "integers", f"an array of {given.dtype}")
    if given.ndim != 1:
        raise ArgumentError(call, "gvas", given.shape, "one dimension")
    for end in (int(given.min()), int(given.max())) if given.size else ():
        if end < 0 or end >> bits:
            raise ArgumentError(call, "gvas", end, f"0 to 2**{bits}-1")
    # A copy: the caller's array may change.
    found: Words = np.array(given, np.uint64, order="C", subok=False)
    return found


class _Way:
    # One kind of access by one walker: what does not change from block to block, and the arrays that blocks share.
    def __init__(self, walker: Walker, access: int) -> None:
        self.mmu, self.access = walker.mmu, access
        mmu = self.mmu
        self.code = "<u4" if mmu.kind == "paging32" else "<u8"
        self.bits = 10 if mmu.kind == "paging32" else 9
        self.memory = walker.memory
        self.pieces = []
        for start, size, _ in walker.memory.pieces():
            found = walker.memory.view(start)
            assert found is not None
            # An entry that is cut off by the piece's end is not there.
            whole = np.frombuffer(found[1], self.code, size // mmu.entry_size) if start % 8 == 0 else None
            self.pieces.append((start, size, whole))
        # A whole table lies in one piece here: what lies across is seen to by the walker itself.
        self.plain = all(start % 4096 == 0 and size % 4096 == 0 for start, size, _ in self.pieces)
        self.walker = walker
        self.faults = np.array(
            [
                [
                    _permission_fault(mmu.permissions, mmu.pkru_mask, rights, key, access, mmu.pkru, mmu.rflags_ac)
                    for key in range(16)
                ]
                for rights in range(8)
            ],
            np.int16,
        )
        self.listed = self.faults.tolist()
        extra = access & (PFERR_WRITE_MASK | PFERR_USER_MASK)
        if mmu.reports_fetch:
            extra |= access & PFERR_FETCH_MASK
        self.extra = extra
        self.uniform = self._uniform_root()
        self.index = np.empty(_BLOCK, np.uint64)
        self.table = np.empty(_BLOCK, np.uint64)
        self.rights = np.empty(_BLOCK, np.uint64)
        self.entry = np.empty(_BLOCK, np.uint64)

    def _uniform_root(self) -> tuple[int, Words] | None:
        # The piece that has the root table, for blocks all of whose entries say the same: of long mode only.
        mmu = self.mmu
        if mmu.kind != "paging64" or mmu.level < 4 or not self.plain:
            return None
        for start, size, words in self.pieces:
            if words is not None and start <= mmu.root and mmu.root + 4096 <= start + size:
                return start, words
        return None

    def walk(self, gva: Words, found: Walks, where: slice | Places) -> None:
        # The addresses, which are those of `found` at `where`.
        split = None
        if self.uniform is not None and len(gva) > _FEW:
            split = self._walk_uniform(gva, found, where)
            if split is _DONE:
                return
        if split is not None:
            for part in (np.flatnonzero(split), np.flatnonzero(~split)):
                self.walk(gva[part], found, where[part] if isinstance(where, np.ndarray) else part + where.start)
            return
        one_by_one = self._walk_mixed if self.plain and self.mmu.level else self._walk_each
        if isinstance(where, slice):
            one_by_one(gva, found, where)
            return
        apart = Walks(gva)
        one_by_one(gva, apart, slice(0, len(gva)))
        found.gpa[where], found.error_code[where] = apart.gpa, apart.error_code
        found.level[where], found.pte_access[where] = apart.level, apart.pte_access

    def _walk_each(self, gva: Words, found: Walks, where: slice) -> None:
        function = self.walker.function(self.access)
        for at, address in enumerate(gva.tolist(), where.start):
            walk = function(address)
            found.gpa[at] = INVALID_GPA if walk.gpa is None else walk.gpa
            found.error_code[at] = _NO_FAULT if walk.error_code is None else walk.error_code
            found.level[at] = walk.level
            found.pte_access[at] = walk.pte_access

    def _walk_uniform(self, gva: Words, found: Walks, where: slice | Places) -> NDArray[np.bool_] | None:
        # _DONE: the entries all said the same, and all is written.  Else nothing is: a mask says which of the addresses
        # differ from the others, None that this is none of the cases here.
        assert self.uniform is not None
        start, words = self.uniform
        mmu, count = self.mmu, len(gva)
        index, table, entry = self.index[:count], self.table[:count], self.entry[:count]
        end, level, one = start + words.nbytes, mmu.level, mmu.root
        low, high = int(gva.min()), int(gva.max())
        rights: int | None = ACC_ALL  # of all of them so far; None: they differ, and are in self.rights
        split: NDArray[np.bool_]
        any_set = all_set = 0
        many = False  # whether `entry` has an item for each address, or `one` is it for all
        while True:
            shift = 12 + 9 * (level - 1)
            if not many and not start <= one & _ADDRESS < end:
                return None
            if many or (low ^ high) >> shift:
                np.right_shift(gva, _SHIFTS[shift], out=index)
                np.bitwise_and(index, _INDEX, out=index)
                if many:
                    np.bitwise_and(entry, _FRAME, out=table)
                    np.right_shift(table, _SHIFTS[3], out=table)
                    np.add(index, table, out=index)
                    if start:
                        np.subtract(index, np.uint64(start >> 3), out=index)
                    if (start or (any_set & _ADDRESS) + 4096 > end) and int(index.max()) >= len(words):
                        return None
                else:
                    np.add(index, np.uint64(((one & _ADDRESS) - start) >> 3), out=index)
                np.take(words, index.view(np.int64), out=entry, mode="clip")
                any_set, all_set = int(np.bitwise_or.reduce(entry)), int(np.bitwise_and.reduce(entry))
                many = True
            else:
                any_set = all_set = one = int(words[((one & _ADDRESS) - start >> 3) + (low >> shift & 511)])
            if not all_set & 1:
                if any_set & 1:
                    split = np.not_equal(entry & _P, 0)
                    return split
                return self._fail(found, where, level, self.extra)
            is_page = level > 1 and bool(any_set & 0x80)
            if is_page and not all_set & 0x80:
                split = np.not_equal(entry & _PS, 0)
                return split
            if wrong := any_set & mmu.rsvd.rsvd_bits_mask[is_page][level - 1]:
                split = np.not_equal(entry & np.uint64(wrong), 0) if many else _DONE
                if not split.all():
                    return split
                return self._fail(found, where, level, self.extra | PFERR_RSVD_MASK | PFERR_PRESENT_MASK)
            rights = self._join(rights, entry, any_set, all_set)
            if is_page or level == 1:
                break
            level -= 1
        if not many:
            entry[:] = one
        kept = self.rights[:count]
        seen = [rights] if rights is not None else np.flatnonzero(np.bincount(kept.view(np.int64))).tolist()
        keys = range(16) if (any_set ^ all_set) >> 59 & 15 else [all_set >> 59 & 15]
        faults = {self.listed[access][key] for access in seen for key in keys}
        if faults != {0}:
            if len(faults) > 1 or rights is None:
                return None
            self._fail(found, where, level, self.extra | faults.pop())
            found.pte_access[where] = rights
            return _DONE
        if self.access & PFERR_WRITE_MASK or (all_set & _DIRTY) or (rights is not None and not rights & 2):
            found.pte_access[where] = kept if rights is None else rights
        elif rights is not None and not any_set & _DIRTY:
            found.pte_access[where] = rights & ~2
        else:
            # Of a page that is not dirty: no write.  D is bit 6, W bit 1.
            np.right_shift(entry, _SHIFTS[5], out=table)
            np.bitwise_or(table, np.uint64(5), out=table)
            np.bitwise_and(table, kept if rights is None else np.uint64(rights), out=table)
            found.pte_access[where] = table
        found.level[where] = level
        found.error_code[where] = _NO_FAULT
        offset = (1 << shift) - 1
        np.bitwise_and(entry, np.uint64(_ADDRESS & ~offset), out=entry)
        np.bitwise_and(gva, np.uint64(offset), out=table)
        if isinstance(where, slice):
            np.bitwise_or(entry, table, out=found.gpa[where])
        else:
            np.bitwise_or(entry, table, out=entry)
            found.gpa[where] = entry
        return _DONE

    def _fail(self, found: Walks, where: slice | Places, level: int, code: int) -> NDArray[np.bool_]:
        found.gpa[where], found.error_code[where] = INVALID_GPA, code
        found.level[where], found.pte_access[where] = level, 0
        return _DONE

    def _join(self, rights: int | None, entry: Words, any_set: int, all_set: int) -> int | None:
        # The rights of the entries so far, and of these.
        if rights is not None and not (any_set ^ all_set) & (_NX | 6):
            return rights & self.mmu.gpte_access(all_set)
        count = len(entry)
        table, kept = self.table[:count], self.rights[:count]
        if rights is not None:
            kept[:] = rights
        np.right_shift(entry, _SHIFTS[63], out=table)
        np.bitwise_xor(table, np.uint64(7), out=table)  # X, and the places of W and U, which the next line fills
        np.bitwise_and(kept, table, out=kept)
        np.bitwise_or(entry, np.uint64(1), out=table)
        np.bitwise_and(kept, table, out=kept)
        return None

    def _read(self, gpa: Words) -> tuple[Words, NDArray[np.bool_]]:
        # The entries at these addresses, and which of them there are.
        values, known = np.zeros(len(gpa), np.uint64), np.zeros(len(gpa), np.bool_)
        for start, size, words in self.pieces:
            here = (gpa >= start) & (gpa < start + size)
            if words is not None and here.any():
                at = (gpa[here] - np.uint64(start)) // np.uint64(self.mmu.entry_size)
                values[here] = words[at.astype(np.int64)]
                known |= here
        return values, known

    def _walk_mixed(self, gva: Words, found: Walks, where: slice) -> None:
        # Every case, straight as walk_addr has it; `at`: which addresses are under way.
        mmu = self.mmu
        gpa, error = found.gpa[where], found.error_code[where]
        levels, accesses = found.level[where], found.pte_access[where]
        gpa[:], accesses[:] = INVALID_GPA, 0
        at = np.arange(len(gva))
        table = np.full(len(gva), mmu.root, np.uint64)
        rights = np.full(len(gva), ACC_ALL, np.uint64)
        present = 7 if mmu.kind == "ept" else 1
        level = mmu.level
        while len(at):
            is_pdpte = level == 3 == mmu.level
            address = gva[at]
            if is_pdpte and mmu.pdptrs is not None:
                entry = np.array(mmu.pdptrs, np.uint64)[(address >> np.uint64(30) & np.uint64(3)).astype(np.int64)]
                known = np.ones(len(at), np.bool_)
            else:
                entry, known = self._read(self._entry_gpa(table, level, address, is_pdpte))
            gone = ~known | (entry & np.uint64(present) == 0)
            error[at[gone]], levels[at[gone]] = self.extra, level
            at, entry, rights = at[~gone], entry[~gone], rights[~gone]
            if not is_pdpte:
                rights &= self._gpte_access(entry)
            if not (is_pdpte and mmu.pdptrs is not None):
                bad = self._is_reserved(entry, level)
                error[at[bad]] = PFERR_RSVD_MASK | PFERR_PRESENT_MASK | self.extra
                levels[at[bad]] = level
                at, entry, rights = at[~bad], entry[~bad], rights[~bad]
            if level == 1:
                last = np.ones(len(at), np.bool_)
            elif mmu.is_last(0x80, level):
                last = entry & np.uint64(0x80) != 0
            else:
                last = np.zeros(len(at), np.bool_)
            self._end(gva, at[last], entry[last], rights[last], level, gpa, error, accesses)
            levels[at[last]] = level
            at, table, rights = at[~last], entry[~last], rights[~last]
            level -= 1

    def _end(
        self,
        gva: Words,
        at: NDArray[Any],
        entry: Words,
        rights: Words,
        level: int,
        gpa: Words,
        error: NDArray[np.int16],
        accesses: NDArray[np.uint8],
    ) -> None:
        mmu = self.mmu
        key = entry >> np.uint64(59) & np.uint64(15) if mmu.kind == "paging64" else np.zeros(len(at), np.uint64)
        fault = self.faults[rights.astype(np.int64), key.astype(np.int64)]
        error[at] = np.where(fault != 0, fault | self.extra, _NO_FAULT)
        kept = rights.copy()
        if mmu.have_ad and not self.access & PFERR_WRITE_MASK:
            clean = (entry & np.uint64(1 << (9 if mmu.kind == "ept" else 6)) == 0) & (fault == 0)
            kept[clean] &= np.uint64(~2 & ACC_ALL)
        accesses[at] = kept
        fine = fault == 0
        gpa[at[fine]] = self._gpa_of(entry[fine], level, gva[at[fine]])

    def _entry_gpa(self, table: Words, level: int, gva: Words, is_pdpte: bool) -> Words:
        if is_pdpte:
            return np.uint64(self.mmu.root) + (gva >> np.uint64(30) & np.uint64(3)) * np.uint64(8)
        frame = 0xFFFFF000 if self.bits == 10 else _ADDRESS
        at = gva >> np.uint64(12 + self.bits * (level - 1)) & np.uint64((1 << self.bits) - 1)
        return (table & np.uint64(frame)) + at * np.uint64(self.mmu.entry_size)

    def _gpte_access(self, entry: Words) -> Words:
        found: Words
        if self.mmu.kind == "ept":
            found = entry & np.uint64(2) | entry >> np.uint64(2) & np.uint64(1) | (entry & np.uint64(1)) << np.uint64(2)
            return found
        found = entry & np.uint64(6) | np.uint64(1)
        if self.mmu.kind != "paging32":
            found ^= entry >> np.uint64(63)
        return found

    def _is_reserved(self, entry: Words, level: int) -> NDArray[np.bool_]:
        plain, large = (np.uint64(masks[level - 1]) for masks in self.mmu.rsvd.rsvd_bits_mask)
        bad: NDArray[np.bool_] = entry & np.where(entry & np.uint64(0x80) != 0, large, plain) != 0
        if self.mmu.rsvd.bad_mt_xwr:
            bad |= np.uint64(self.mmu.rsvd.bad_mt_xwr) >> (entry & np.uint64(0x3F)) & np.uint64(1) != 0
        return bad

    def _gpa_of(self, entry: Words, level: int, gva: Words) -> Words:
        offset = (1 << 12 + self.bits * (level - 1)) - 1
        frame = (0xFFFFFFFF if self.bits == 10 else _ADDRESS) & ~offset
        found: Words = entry & np.uint64(frame) | gva & np.uint64(offset)
        if self.bits == 10 and level == 2 and self.mmu.pse36:
            found |= (entry & np.uint64(0x1E000)) << np.uint64(19)
        return found
