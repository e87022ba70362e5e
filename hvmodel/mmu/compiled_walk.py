"""Walks, compiled: a function for one configuration and one kind of access, with all that does not change left out.

The function is straight code from the root to the last level.  What an entry's value means is looked up in a dict of
its level, that gives the table it leads to, as a view of the memory in place, or None where the straight way ends
(a large page, an entry that is not present, one that has a reserved bit or takes a right away).  The dicts are about
values, not about memory: each walk reads each entry anew.  What the straight way cannot decide, `walk_addr` decides.

    hi = gva >> 30                      e4 = root[TOP4[hi >> 9]]
    low = gva & 0x3fffffff              e3 = (table of e4)[hi & 511]      … e1 = (table of e2)[low >> 12 & 511]

Tables of 4-byte entries are split at bit 22.  EPT is not compiled.
"""

from __future__ import annotations

from ..arch.number import number
from .guest_memory import GuestMemory, Tables
from .permission import ACC_EXEC_MASK, ACC_USER_MASK, ACC_WRITE_MASK, _is_forbidden, _permission_fault, check_access
from .walk import _ADDRESS, GuestMmu, Update, Walk, walk_addr

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType

    from .guest_memory import Code

    Function = Callable[[int], Walk]

__all__ = ["Functions"]

_MOST = 1 << 16  # values in one dict; then it begins anew
_codes: dict[str, CodeType] = {}  # by text: compiling costs more than all the rest
_MOST_CODES = 64
_KEYS = 0xF << 59


class Functions:
    """The compiled walks of one configuration in one memory, by access; made when one is first asked for.

    Neither they nor this refer to a Walker, and it is no part of a cycle: views go when nobody needs them.
    """

    __slots__ = ("_made", "_memory", "_mmu")

    def __init__(self, mmu: GuestMmu, memory: GuestMemory) -> None:
        self._mmu, self._memory = mmu, memory
        self._made: dict[int, Function] = {}

    def function(self, call: str, access: int) -> Function:
        """The function of this access, PFERR bits; ArgumentError, ArgumentTypeError, ClosedError."""
        self._memory.check_open(call)
        access = check_access(call, access)
        if access not in self._made:
            self._made[access] = _compiled(self._mmu, self._memory, access)
        return self._made[access]

    def dispatcher(self) -> Callable[..., Walk]:
        """What `Walker.walk` is: (gva, access=0, update=False) -> Walk."""
        mmu, memory, made, function = self._mmu, self._memory, self._made, self.function

        def other(gva: int, access: int, update: bool) -> Walk:
            known = made.get(access) if type(access) is int else None  # 2.0 and True are in the dict too
            walk = function("Walker.walk", access) if known is None else known
            found = walk(gva)
            while update and not _store(memory, found.updates):
                found = walk(gva)
            return found

        return _compiled(mmu, memory, 0, other)


def _store(memory: GuestMemory, updates: tuple[Update, ...]) -> bool:
    # Sets A and D; False: an entry has changed since it was read, and the walk is to be made again.
    return all(memory.exchange(update.gpa, update.old, update.new, update.size) for update in updates)


def _compiled(mmu: GuestMmu, memory: GuestMemory, access: int, other: object = None) -> Callable[..., Walk]:
    # The function (gva) of one access; with `other`, of any: it does the walks of access 0 itself.
    last = (1 << mmu.linear_bits) - 1
    read = memory.entry

    def plain(gva: int) -> Walk:
        memory.check_open("Walker.walk")
        return walk_addr(mmu, read, number("Walker.walk", "gva", gva, last), access)

    bits = 10 if mmu.kind == "paging32" else 9
    code: Code = "I" if mmu.kind == "paging32" else "Q"
    root: memoryview | tuple[int, ...] | None = None
    if mmu.pdptrs is not None:
        root = mmu.pdptrs
    elif mmu.kind in ("paging64", "paging32"):
        root = memory.table(mmu.root, 32 if mmu.level == 3 else 4096, code)
    allowed = [not _is_forbidden(mmu.permissions, rights, access, mmu.rflags_ac) for rights in range(8)]
    held = Tables(mmu.level, root if isinstance(root, memoryview) else None)
    memory.keep(held)  # alive as long as `slow` is, and no longer

    def meaning(level: int, entry: int) -> memoryview | None:
        # The table that an entry above level 1 leads to, if the straight way goes on there.
        is_pdpte = level == 3 == mmu.level
        if not entry & 1 or mmu.is_last(entry, level):
            return None
        if mmu.rsvd._is_set(entry, level) and not (is_pdpte and mmu.pdptrs is not None):
            return None
        if not is_pdpte and _restricts(allowed, mmu.gpte_access(entry)):
            return None
        return memory.table(mmu.gpa_of(entry, 1, 0), 4096, code)

    def slow(gva: int) -> Walk:
        walk = plain(gva)
        for (level, known), entry in zip(held.levels.items(), walk._values if root is not None else (), strict=False):
            if entry not in known:
                if len(known) >= _MOST:
                    known.clear()
                known[entry] = meaning(level, entry)
        if memory.closed:
            held.release()  # another thread has closed it meanwhile
        return walk

    scope: dict[str, object] = {"root": root, "slow": slow, "other": other, "Walk": Walk, "nothing": 0}
    if other is None:
        text = ["def walk(gva):"]
    else:
        # By identity: what is no number, and false, is not taken for 0.
        text = ["def walk(gva, access=nothing, update=False):"]
        text.append(" if access is not nothing or update: return other(gva, access, update)")
    if root is None:
        text.append(" return slow(gva)")
    else:
        text += _straight(mmu, allowed, access, scope, bits)
    scope |= {f"d{level}": known for level, known in held.levels.items()}
    made: dict[str, Callable[..., Callable[..., Walk]]] = {}
    exec(_code(f"def make({', '.join(scope)}):\n " + "\n ".join(text) + "\n return walk\n"), made)
    return made["make"](**scope)


def _code(text: str) -> CodeType:
    found = _codes.get(text)
    if found is None:
        if len(_codes) >= _MOST_CODES:
            _codes.clear()
        found = _codes[text] = compile(text, "<a walk>", "exec")
    return found


def _straight(mmu: GuestMmu, allowed: list[bool], access: int, scope: dict[str, object], bits: int) -> list[str]:
    split = 22 if bits == 10 else 30
    text = [" if type(gva) is not int: return slow(gva)", " try:"]
    text += [f"  hi = gva >> {split}", f"  low = gva & {(1 << split) - 1:#x}"]
    values: list[str] = []
    for level in range(mmu.level, 0, -1):
        shift = 12 + bits * (level - 1)
        part, by = ("hi", shift - split) if shift >= split else ("low", shift)
        index = f"{part} >> {by}" if by else part
        if level == mmu.level:
            # The table's index by the address above the level's shift: no other address is in the dict.
            scope["top"] = _top(mmu.level, bits)
            index = f"top[{index}]"
        elif shift + bits != split:
            index += f" & {(1 << bits) - 1}"
        values.append(f"e{level}")
        text.append(f"  e{level} = {'root' if level == mmu.level else 't'}[{index}]")
        if level > 1:
            text += [f"  t = d{level}[e{level}]", "  if t is None:"]
            text += _leaf(mmu, level, values, allowed, access, scope, "   ")
            text.append("   return slow(gva)")
    text += [" except (KeyError, TypeError, ValueError):", "  return slow(gva)"]
    return [*text, *_leaf(mmu, 1, values, allowed, access, scope, " "), " return slow(gva)"]


def _top(level: int, bits: int) -> dict[int, int]:
    # Index into the root table by what of an address is above the lower levels.
    if bits == 10:
        return {at: at for at in range(1024)}
    if level == 3:
        return {at: at for at in range(4)}
    high = (1 << 64) - (1 << 11 + 9 * level) >> 12 + 9 * (level - 1)
    return {at if at < 256 else high + at - 256: at for at in range(512)}


def _restricts(allowed: list[bool], own: int) -> bool:
    # Whether an entry with these rights can forbid what the entries below it allow.
    return any(allowed[rights] and not allowed[rights & own] for rights in range(8))


def _wanted(mmu: GuestMmu, level: int, allowed: list[bool], access: int) -> tuple[int, int]:
    # Bits that are 1, and bits that are 0, in a last entry of this level that allows the access for sure.
    ones, zeros = 1, mmu.rsvd.rsvd_bits_mask[1][level - 1]  # of level 1, where bit 7 is PAT, both masks are the same
    if level > 1:
        ones |= 0x80
    # Each right is one that the access needs, one that it must not find, or one that does not matter.
    for right, bit in ((ACC_WRITE_MASK, 1 << 1), (ACC_USER_MASK, 1 << 2), (ACC_EXEC_MASK, 1 << 63)):
        needed = not any(allowed[rights] for rights in range(8) if not rights & right)
        refused = not any(allowed[rights] for rights in range(8) if rights & right)
        if right == ACC_EXEC_MASK:
            if mmu.kind == "paging32":
                continue
            needed, refused = refused, needed
        ones |= bit if needed else 0
        zeros |= bit if refused else 0
    if mmu.pkru_mask and not zeros & ACC_USER_MASK:
        bad = [
            key
            for key in range(16)
            if _permission_fault(mmu.permissions, mmu.pkru_mask, 7, key, access, mmu.pkru, mmu.rflags_ac)
        ]
        # Of keys only 0 is told apart; where that is bad too, a page must not be the user's.
        zeros |= (_KEYS if bad else 0) | (ACC_USER_MASK if 0 in bad else 0)
    return ones, zeros


def _leaf(
    mmu: GuestMmu,
    level: int,
    values: list[str],
    allowed: list[bool],
    access: int,
    scope: dict[str, object],
    indent: str,
) -> list[str]:
    # Returns with the Walk where the entry of this level is a last one that allows the access; else goes on.
    if not mmu.is_last(0x80, level):
        return []
    ones, zeros = _wanted(mmu, level, allowed, access)
    if ones & zeros:
        return []
    bits, last = (10, 0xFFFFFFFF) if mmu.kind == "paging32" else (9, _ADDRESS)
    name, offset = values[-1], (1 << 12 + bits * (level - 1)) - 1
    frame = f"{name} & {last & ~offset:#x}"
    if bits == 10 and level == 2 and mmu.pse36:
        frame += f" | ({name} & 0x1e000) << 19"
    scope[f"head{level}"] = (mmu, access, None, level)
    return [
        f"{indent}if {name} & {ones | zeros:#x} == {ones:#x}:",
        f"{indent} w = Walk()",
        f"{indent} w._gva = gva",
        f"{indent} w._gpa = {frame} | low & {offset:#x}",
        f"{indent} w._head = head{level}",
        f"{indent} w._values = {', '.join(values)}{',' if len(values) == 1 else ''}",
        f"{indent} return w",
    ]
