"""Linux without KVM: memory files with seals (`MemFd`) and mappings whose bytes are handed out without copying
(`Mapping`).  Nothing here raises SIGSEGV or SIGBUS; see hvmodel.host.mapping for how.

What a machine does not need is loaded when it is first asked for: page tables (`PageMap`), accounting (`account`),
NUMA policies (`mbind`), page faults answered by this process (`UserFaultFd`).
"""

from __future__ import annotations

from .mapping import PROT_EXEC, PROT_NONE, PROT_READ, PROT_WRITE, Mapping, ViewError, Writable
from .memfd import (
    F_SEAL_EXEC,
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_SEAL,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
    MemFd,
    seal_names,
)
from .seals import seal_order, who_maps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .faults import Fault
    from .limits import available_memory
    from .numa import NumaPolicy, get_mempolicy, mbind
    from .pageframe import PageFlags, kpagecount, kpageflags
    from .pagemap import Category, PageMap, mincore
    from .passing import PassingError, receive_fds, send_fds
    from .smaps import Accounting, account, read_smaps, smaps_rollup
    from .userfaultfd import UserFaultFd

# Loaded at the first use: name -> module.
_HOMES = {
    "Accounting": "smaps",
    "Category": "pagemap",
    "Fault": "faults",
    "NumaPolicy": "numa",
    "PageFlags": "pageframe",
    "PageMap": "pagemap",
    "PassingError": "passing",
    "UserFaultFd": "userfaultfd",
    "account": "smaps",
    "available_memory": "limits",
    "get_mempolicy": "numa",
    "kpagecount": "pageframe",
    "kpageflags": "pageframe",
    "mbind": "numa",
    "mincore": "pagemap",
    "read_smaps": "smaps",
    "receive_fds": "passing",
    "send_fds": "passing",
    "smaps_rollup": "smaps",
}

__all__ = [
    "Accounting",
    "Category",
    "F_SEAL_EXEC",
    "F_SEAL_FUTURE_WRITE",
    "F_SEAL_GROW",
    "F_SEAL_SEAL",
    "F_SEAL_SHRINK",
    "F_SEAL_WRITE",
    "Fault",
    "Mapping",
    "MemFd",
    "NumaPolicy",
    "PROT_EXEC",
    "PROT_NONE",
    "PROT_READ",
    "PROT_WRITE",
    "PageFlags",
    "PageMap",
    "PassingError",
    "UserFaultFd",
    "ViewError",
    "Writable",
    "account",
    "available_memory",
    "get_mempolicy",
    "kpagecount",
    "kpageflags",
    "mbind",
    "mincore",
    "read_smaps",
    "receive_fds",
    "seal_names",
    "send_fds",
    "seal_order",
    "smaps_rollup",
    "who_maps",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
