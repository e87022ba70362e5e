"""Seals: what nobody can do to a memory file any more; owns the words for them and the rules by which they are added.

    SEAL          no more seals            WRITE         no writing at all: EBUSY while a shared writable mapping lives
    SHRINK, GROW  the size is fixed        FUTURE_WRITE  no new way of writing; mappings that exist stay writable
                                           EXEC          the execute mode bits are fixed

A seal is never taken off.  SHRINK is what makes a mapping safe to hand out: without it anybody who holds the file can
truncate it, and touching the lost pages is SIGBUS.

What F_ADD_SEALS looks at, in this order; the first that refuses gives the error, and then nothing was added:

    EPERM    the descriptor was not opened for writing
    EINVAL   a seal that the kernel does not know, or a file that has no seals
    EPERM    the file has SEAL already: even adding what is there is refused
    EBUSY    WRITE is added, and a shared mapping is alive that is writable or could be made so by mprotect(2);
             or pages are pinned for I/O, which the kernel waits about 0.15 s for
    then     EXEC of a file with execute mode bits (mode 0777, as memfd_create without NOEXEC_SEAL makes it) adds
             SHRINK, GROW, WRITE and FUTURE_WRITE too, and so is refused as WRITE is

So SEAL comes last (or with the last), WRITE and the EXEC that brings it after the writable mappings are gone; for the
rest the order does not matter.  Of a file with FUTURE_WRITE or WRITE new shared mappings can only be read.

Source: memfd_add_seals, mm/memfd.c@v6.18; fcntl(2).
"""

from __future__ import annotations

import errno
import os

from .._ffi import lib
from ..errors import ArgumentError, ArgumentTypeError, HostError

__all__ = [
    "F_SEAL_EXEC",
    "F_SEAL_FUTURE_WRITE",
    "F_SEAL_GROW",
    "F_SEAL_SEAL",
    "F_SEAL_SHRINK",
    "F_SEAL_WRITE",
    "add_seals",
    "check_seals",
    "get_seals",
    "seal_error",
    "seal_names",
    "seal_order",
    "seals_after",
    "who_maps",
]

F_SEAL_SEAL: int = lib.HV_F_SEAL_SEAL
F_SEAL_SHRINK: int = lib.HV_F_SEAL_SHRINK
F_SEAL_GROW: int = lib.HV_F_SEAL_GROW
F_SEAL_WRITE: int = lib.HV_F_SEAL_WRITE
F_SEAL_FUTURE_WRITE: int = lib.HV_F_SEAL_FUTURE_WRITE
F_SEAL_EXEC: int = lib.HV_F_SEAL_EXEC

_SEALS = {
    F_SEAL_SEAL: "SEAL",
    F_SEAL_SHRINK: "SHRINK",
    F_SEAL_GROW: "GROW",
    F_SEAL_WRITE: "WRITE",
    F_SEAL_FUTURE_WRITE: "FUTURE_WRITE",
    F_SEAL_EXEC: "EXEC",
}
_ALL_SEALS = sum(_SEALS)
_BROUGHT = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_FUTURE_WRITE  # by EXEC of an executable file


def seal_names(seals: int) -> str:
    """The seals as text, in the order of their bits.

    >>> seal_names(F_SEAL_SHRINK | F_SEAL_GROW)
    'SHRINK|GROW'
    """
    return "|".join(name for bit, name in _SEALS.items() if seals & bit) or "0"


def check_seals(call: str, seals: int) -> None:
    """Raises ArgumentTypeError or ArgumentError, naming `call`, where `seals` is not F_SEAL_* or-ed."""
    if isinstance(seals, bool) or not isinstance(seals, int):
        raise ArgumentTypeError(call, "seals", seals, "an int, F_SEAL_* or-ed")
    if seals & ~_ALL_SEALS:
        raise ArgumentError(call, "seals", seals, f"a combination of {_ALL_SEALS:#x}: {seal_names(_ALL_SEALS)}")


def seals_after(have: int, add: int, *, executable: bool = True) -> int:
    """The seals of a file that had `have`, once `add` was accepted; `executable`: it has execute mode bits.

    >>> seal_names(seals_after(F_SEAL_SHRINK, F_SEAL_EXEC))
    'SHRINK|GROW|WRITE|FUTURE_WRITE|EXEC'
    """
    return have | add | (_BROUGHT if add & F_SEAL_EXEC and executable else 0)


def seal_error(have: int, add: int, *, executable: bool = True, mapped: bool = False) -> int:
    """The errno with which the kernel refuses to add `add` to a file that has `have`, or 0.

    `executable`: the file has execute mode bits; `mapped`: a shared mapping is alive that is writable or could become
    so.  The descriptor is one that was opened for writing, and nobody has pinned pages.

    >>> import errno
    >>> errno.errorcode[seal_error(F_SEAL_SEAL, F_SEAL_GROW)], seal_error(0, F_SEAL_WRITE, mapped=False)
    ('EPERM', 0)
    """
    check_seals("seal_error", have)
    check_seals("seal_error", add)
    if have & F_SEAL_SEAL:
        return errno.EPERM
    if mapped and seals_after(0, add, executable=executable) & ~have & F_SEAL_WRITE:
        return errno.EBUSY
    return 0


def seal_order(seals: int, *, have: int = 0, executable: bool = True, mapped: bool = False) -> tuple[int, ...]:
    """An order in which `seals` can be added one by one to a file that has `have`; see `seal_error` for the rest.

    Those that it has already are left out.  Raises ArgumentError where there is no such order, with the reason.

    >>> [seal_names(seal) for seal in seal_order(F_SEAL_SEAL | F_SEAL_GROW | F_SEAL_SHRINK)]
    ['SHRINK', 'GROW', 'SEAL']
    """
    call = "seal_order"
    check_seals(call, seals)
    check_seals(call, have)
    missing = seals & ~have
    if missing and have & F_SEAL_SEAL:
        raise ArgumentError(call, "have", have, "a file without SEAL", f"{seal_names(have)}: no seal can be added")
    if missing and seal_error(have, missing, executable=executable, mapped=mapped):
        detail = "a shared mapping that is writable, or could become so, keeps WRITE from being added"
        raise ArgumentError(call, "seals", seals, "these, once it is unmapped, or FUTURE_WRITE", detail)
    # By bits, but the one that ends it all last.
    return tuple(seal for seal in [*list(_SEALS)[1:], F_SEAL_SEAL] if seal & missing)


def get_seals(fd: int) -> int:
    """The seals of any file descriptor (F_GET_SEALS); HostError EINVAL where the file has none, as most have not."""
    seals = lib.hv_get_seals(fd)
    if seals < 0:
        raise HostError(-seals, "fcntl(F_GET_SEALS)", "fd", fd)
    return seals


def add_seals(fd: int, seals: int) -> None:
    """Adds the seals to the file of any descriptor (F_ADD_SEALS); HostError says why not, and who is in the way."""
    error = -lib.hv_add_seals(fd, seals)
    if error <= 0:
        return
    detail: str | None = None
    accepted: str | None = None
    if error == errno.EBUSY:
        detail, accepted = _why_busy(fd), "unmap it first, or F_SEAL_FUTURE_WRITE, which leaves existing mappings alone"
    elif error == errno.EPERM:
        if lib.hv_get_seals(fd) & F_SEAL_SEAL:
            detail = "F_SEAL_SEAL is set, so that no seal can be added any more"
        else:
            detail, accepted = "the descriptor was not opened for writing", "a descriptor opened with O_RDWR"
    elif error == errno.EINVAL:
        if lib.hv_get_seals(fd) < 0:
            detail, accepted = "the file has no seals", "a memfd"
        else:
            detail = "this kernel does not know one of the seals"
    raise HostError(error, "fcntl(F_ADD_SEALS)", "seals", seals, accepted, f"{seal_names(seals)}: {detail}")


def who_maps(fd: int, *, shared: bool = True) -> dict[int, list[tuple[int, int]]]:
    """Who has the file of descriptor `fd` mapped: process id -> its ranges, as (address, size).

    `shared`: only mappings whose writes reach the file, be they writable now or not.  A process whose
    /proc/PID/maps this one may not read is left out, and so is what another pid namespace hides.

    Raises HostError of fstat.
    """
    try:
        status = os.fstat(fd)
    except OSError as error:
        raise HostError(error.errno or 0, "fstat", "fd", fd) from None
    # 7f..-7f.. rw-s 00000000 00:01 1038    /memfd:NAME (deleted)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    found: dict[int, list[tuple[int, int]]] = {}
    for pid in os.listdir("/proc"):
        if not pid.isdecimal():
            continue
        try:
            with open(f"/proc/{pid}/maps", errors="replace") as maps:
                for line in maps:
                    words = line.split(None, 5)
                    if words[3] == device and words[4] == str(status.st_ino) and ("s" in words[1] or not shared):
                        start, end = (int(word, 16) for word in words[0].split("-"))
                        found.setdefault(int(pid), []).append((start, end - start))
        except OSError:
            continue  # gone, or not ours to read
    return found


def _why_busy(fd: int) -> str:
    detail = "a shared writable mapping of this memfd is alive"
    holders = who_maps(fd)
    if not holders:
        return f"{detail} in a process that cannot be seen from here, or pages of it are pinned for I/O"
    texts = []
    for pid, ranges in sorted(holders.items()):
        who = "this process" if pid == os.getpid() else f"process {pid}"
        texts.append(f"{who} at {', '.join(f'{address:#x}' for address, _ in ranges[:4])}")
    return f"{detail}: {'; '.join(texts)}"
