"""Linux without KVM: memory files with seals (`MemFd`) and mappings whose bytes are handed out without copying
(`Mapping`).  Nothing here raises SIGSEGV or SIGBUS; see hvmodel.host.mapping for how."""

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

__all__ = [
    "F_SEAL_EXEC",
    "F_SEAL_FUTURE_WRITE",
    "F_SEAL_GROW",
    "F_SEAL_SEAL",
    "F_SEAL_SHRINK",
    "F_SEAL_WRITE",
    "Mapping",
    "MemFd",
    "PROT_EXEC",
    "PROT_NONE",
    "PROT_READ",
    "PROT_WRITE",
    "ViewError",
    "Writable",
    "seal_names",
]
