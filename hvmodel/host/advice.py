"""Advice: what madvise(2) can be told about a range of a `Mapping`; owns the words, and what they do to the bytes.

    keeps     hugepage nohugepage collapse  which pages the memory is made of
              mergeable unmergeable         whether KSM may share pages that are equal (CONFIG_KSM; private memory)
              dontfork dofork               whether a child of fork inherits the range
              dontdump dodump               whether a core dump has it
              willneed cold pageout         when it will be used: soon, not soon, not at all for now
    loses     dontneed                      private memory reads as zero, or as the file; shared memory keeps its bytes
              remove                        shared memory reads as zero: a hole in the file
              guard_install                 access is SIGSEGV until guard_remove; private anonymous bytes are lost
              guard_remove                  access works again

Source: mm/madvise.c@v6.18; madvise(2).
"""

from __future__ import annotations

import errno
from weakref import WeakSet

from .._ffi import lib
from ..errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .mapping import Mapping

__all__ = ["ADVICE", "GUARDED", "LOSES", "advice_error", "inherit_not"]

ADVICE: dict[str, int] = {
    "hugepage": lib.HV_MADV_HUGEPAGE,
    "nohugepage": lib.HV_MADV_NOHUGEPAGE,
    "collapse": lib.HV_MADV_COLLAPSE,
    "mergeable": lib.HV_MADV_MERGEABLE,
    "unmergeable": lib.HV_MADV_UNMERGEABLE,
    "dontfork": lib.HV_MADV_DONTFORK,
    "dofork": lib.HV_MADV_DOFORK,
    "dontdump": lib.HV_MADV_DONTDUMP,
    "dodump": lib.HV_MADV_DODUMP,
    "willneed": lib.HV_MADV_WILLNEED,
    "cold": lib.HV_MADV_COLD,
    "pageout": lib.HV_MADV_PAGEOUT,
    "dontneed": lib.HV_MADV_DONTNEED,
    "remove": lib.HV_MADV_REMOVE,
    "guard_install": lib.HV_MADV_GUARD_INSTALL,
    "guard_remove": lib.HV_MADV_GUARD_REMOVE,
}
"""Word -> MADV_* number."""

LOSES = frozenset({"dontneed", "remove", "guard_install"})
"""The advice that takes bytes away, which nobody may have a view of then."""

GUARDED = "it is guarded: access is SIGSEGV, until advise('guard_remove')"
"""Why a range with guard pages has no views."""

# (word, errno) -> (detail, accepted): what the answer means for a range that is known to be of whole mapped pages.
_REFUSED = {
    ("hugepage", errno.EINVAL): ("this kernel has no transparent huge pages, or the range is of hugetlbfs", None),
    ("nohugepage", errno.EINVAL): ("this kernel has no transparent huge pages, or the range is of hugetlbfs", None),
    ("collapse", errno.EINVAL): (
        "no huge page can be made of this range: nothing of one is in memory yet, it has no whole aligned one, is of "
        "hugetlbfs, or the host denies huge pages",
        "a populated range with an aligned huge page (2 MiB) in it",
    ),
    ("collapse", errno.ENOMEM): ("the host has no free huge page, or the cgroup's memory is used up", None),
    ("collapse", errno.EBUSY): ("the cgroup's memory is used up", None),
    ("collapse", errno.EAGAIN): ("pages are in use right now (pinned, locked or under I/O): try again", None),
    ("mergeable", errno.EINVAL): ("this kernel was built without CONFIG_KSM", None),
    ("unmergeable", errno.EINVAL): ("this kernel was built without CONFIG_KSM", None),
    ("remove", errno.EACCES): ("the mapping is not shared and writable", "a mapping of shared, writable memory"),
    ("remove", errno.EINVAL): ("there is no file behind the range, or it is locked", "a mapping of shared memory"),
    ("remove", errno.EPERM): ("the memfd is sealed with WRITE or FUTURE_WRITE", "a file without these seals"),
    ("remove", errno.EOPNOTSUPP): ("the file's file system cannot punch holes", "a file of tmpfs or hugetlbfs"),
    ("dontneed", errno.EINVAL): ("the range is locked", None),
    ("cold", errno.EINVAL): ("the range is locked, or of hugetlbfs", None),
    ("pageout", errno.EINVAL): ("the range is locked, or of hugetlbfs", None),
    ("dofork", errno.EINVAL): ("the range is a device's memory", None),
    ("dodump", errno.EINVAL): ("the range is of hugetlbfs or a device's memory", None),
    ("guard_install", errno.EINVAL): (
        "the range is locked or of hugetlbfs, or this kernel has no guards for it: they came with Linux 6.13, for "
        "mappings of files with 6.15",
        None,
    ),
    ("guard_remove", errno.EINVAL): ("this kernel has no guards for this mapping", None),
}


def advice_error(error: int, advice: str, offset: int) -> HostError:
    """The HostError of a madvise(2) that answered `error`, with what that means for this advice."""
    detail, accepted = _REFUSED.get((advice, error), (None, None))
    if error in (errno.EINVAL, errno.EACCES, errno.EOPNOTSUPP) or detail is not None:
        return HostError(error, "madvise", "advice", advice, accepted, detail)
    return HostError(error, "madvise", "offset", offset)


# Mappings with a range that children of fork do not get.
_not_inherited: WeakSet[Mapping] = WeakSet()
_registered: list[bool] = []


def inherit_not(mapping: Mapping) -> None:
    """From now on, in a child of os.fork, `mapping` is closed; views of it that are alive there show zeros.

    For a mapping with a range that was advised "dontfork": the child has nothing at its addresses.
    """
    if not _registered:
        import os

        os.register_at_fork(after_in_child=_after_fork)
        _registered.append(True)
    _not_inherited.add(mapping)


def _after_fork() -> None:
    for mapping in list(_not_inherited):
        mapping._lose()
