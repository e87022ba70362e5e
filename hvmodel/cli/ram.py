"""What the guest RAM of a process costs its host, block by block.

Which mappings are guest RAM nobody tells, so there is a rule.  A mapping is taken for guest RAM if it is

    memfd       of a memory file (memfd_create(2))
    shm         of a file in /dev/shm, but not of a semaphore (sem.*)
    hugetlb     of hugetlbfs
    dontfork    anything else that is marked MADV_DONTFORK, as QEMU marks each of its RAM blocks (its `ram` backend is
                anonymous memory, `file` one of any file)

and the process maps no part of the same file executable (as just-in-time compilers do), and it is no device's memory.
Mappings of one file that continue each other, and anonymous ones of the same flags side by side, are one block.
"""

from __future__ import annotations

import json
import os

from ..errors import HostError
from ..host.memfd import get_seals, seal_names
from ..host.smaps import Accounting, Vma, read_smaps
from ..units import KiB
from ..value import Value
from .status import OK
from .terminal import line, say, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Block", "Report", "blocks_of", "gather", "show"]

_DELETED = " (deleted)"
_MEMFD = "/memfd:"
_SHM = "/dev/shm/"
_SEMAPHORE = _SHM + "sem."
_DEVICE = {"io", "pf", "de"}  # VmFlags of what drivers map: VM_IO, VM_PFNMAP, VM_DONTEXPAND

# Columns of the table that are amounts, in KiB.
_AMOUNTS = ("rss", "pss", "private", "shared", "dirty", "anon", "huge", "hugetlb", "swapped")


class Block(Value):
    """A block of guest RAM: its name ("" for anonymous memory), the word of the rule (see the module), where it is
    mapped, its accounting; of its file the bytes it has in memory or on disk and its seals, None where it has none or
    this user may not ask."""

    name: str
    why: str
    path: str
    offset: int
    shared: bool
    accounting: Accounting
    file_bytes: int | None
    seals: str | None


class Report(Value):
    """The blocks of a process, ascending by address."""

    pid: int
    command: str
    blocks: tuple[Block, ...]


def gather(pid: int) -> Report:
    """What the guest RAM of process `pid` costs.  HostError where there is none such, or it may not be looked at."""
    vmas = list(read_smaps(pid))
    blocks = []
    for why, parts in blocks_of(vmas):
        first = parts[0]
        file_bytes, seals = _file(pid, first) if first.inode else (None, None)
        blocks.append(
            Block(_name(first), why, first.path, first.offset, first.shared, Accounting.of(parts), file_bytes, seals)
        )
    return Report(pid, _command(pid), tuple(blocks))


def blocks_of(vmas: Iterable[Vma]) -> list[tuple[str, list[Vma]]]:
    """The blocks of guest RAM among these VMAs, which ascend: the rule's word, and the VMAs of each."""
    every = list(vmas)
    executable = {(vma.device, vma.inode) for vma in every if vma.inode and "x" in vma.prot}
    blocks: list[tuple[str, list[Vma]]] = []
    for vma in every:
        why = _rule(vma)
        if why is None or "x" in vma.prot or (vma.device, vma.inode) in executable:
            continue
        if blocks and blocks[-1][0] == why and _continues(blocks[-1][1][-1], vma):
            blocks[-1][1].append(vma)
        else:
            blocks.append((why, [vma]))
    return blocks


def _rule(vma: Vma) -> str | None:
    if vma.path.startswith(_MEMFD):
        return "hugetlb" if "ht" in vma.flags else "memfd"
    if "ht" in vma.flags:
        return "hugetlb"
    if vma.path.startswith(_SHM):
        return None if vma.path.startswith(_SEMAPHORE) else "shm"
    return "dontfork" if "dc" in vma.flags and not _DEVICE & set(vma.flags) else None


def _continues(last: Vma, vma: Vma) -> bool:
    # Whether `vma` goes on where `last` ends; for a file, a hole between them may have been unmapped.
    if (last.device, last.inode, last.shared) != (vma.device, vma.inode, vma.shared):
        return False
    if vma.inode:
        return vma.start - last.start == vma.offset - last.offset
    return vma.start == last.end and vma.flags == last.flags


def _name(vma: Vma) -> str:
    path = vma.path.removesuffix(_DELETED)
    return path[len(_MEMFD) :] if path.startswith(_MEMFD) else os.path.basename(path)


def _file(pid: int, vma: Vma) -> tuple[int | None, str | None]:
    # Through /proc/PID/map_files, for the file may have no name any more.  It takes CAP_CHECKPOINT_RESTORE.
    path = f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}"
    try:
        found = os.stat(path).st_blocks * 512
        if not vma.path.startswith(_MEMFD):
            return found, None
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None, None
    try:
        return found, seal_names(get_seals(fd))
    except HostError:
        return found, None
    finally:
        os.close(fd)


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""  # it has gone


def show(report: Report, *, as_json: bool) -> int:
    """Print the report, as a table of KiB or as an object of bytes; the exit status."""
    total = {field: _total(report.blocks, field) for field in ("mapped", *_AMOUNTS)}
    if as_json:
        blocks = [
            {
                "name": block.name,
                "why": block.why,
                "path": block.path,
                "offset": block.offset,
                "map_shared": block.shared,
                **{field: getattr(block.accounting, field) for field in Accounting.fields() if field != "cut"},
                "file_bytes": block.file_bytes,
                "seals": block.seals,
            }
            for block in report.blocks
        ]
        line(json.dumps({"pid": report.pid, "command": report.command, "blocks": blocks, "total": total}))
        return OK
    rows: list[tuple[object, ...]] = [
        (
            block.name or "anonymous",
            f"{block.why},{'shared' if block.shared else 'private'}",
            f"{block.accounting.start:#x}",
            *(_kib(getattr(block.accounting, field)) for field in ("mapped", *_AMOUNTS)),
            _kib(block.file_bytes),
            block.seals or "",
        )
        for block in report.blocks
    ]
    if len(rows) > 1:
        rows.append(("total", "", "", *(_kib(value) for value in total.values()), "", ""))
    columns = ("NAME", "KIND", "START", "KIB", *(field.upper() for field in _AMOUNTS), "FILE", "SEALS")
    table(columns, rows)
    if not rows:
        say(f"process {report.pid} ({report.command}) maps nothing that is taken for guest RAM")
    return OK


def _total(blocks: Iterable[Block], field: str) -> int | None:
    values = [getattr(block.accounting, field) for block in blocks]
    return None if None in values else sum(values)


def _kib(value: int | None) -> str:
    return "" if value is None else str(value // KiB)
