"""Exit statuses of `hvmodel`: numbers that scripts may rely on.

Those of `boot` are even but for the guest's own: a debug exit is always odd.
"""

from __future__ import annotations

__all__ = [
    "BAD_INPUT",
    "BOOT",
    "FAULT",
    "HALTED",
    "INTERRUPTED",
    "MISMATCH",
    "NO_KVM",
    "OK",
    "SHUTDOWN",
    "TIMEOUT",
    "UNCLAIMED",
]

OK, MISMATCH = 0, 1
HALTED, BAD_INPUT, SHUTDOWN, FAULT, NO_KVM, UNCLAIMED, TIMEOUT, INTERRUPTED = 0, 2, 4, 6, 8, 10, 124, 130

# For the help of `boot`.
BOOT = (
    (str(HALTED), "the guest halted, and nothing can wake it"),
    ("odd", "the guest wrote v to the debug-exit port 0xf4: (v << 1) | 1, the low 8 bits of it, as QEMU"),
    (str(BAD_INPUT), "usage, bad input, or output that cannot be written"),
    (str(SHUTDOWN), "shutdown: a triple fault"),
    (str(FAULT), "KVM could not go on: internal error, entry refused, memory or host fault"),
    (str(NO_KVM), "no KVM: /dev/kvm missing or not permitted, or no extension for this platform"),
    (str(UNCLAIMED), "with --unclaimed strict: an access to a port or address that nobody claims"),
    (str(TIMEOUT), "the timeout passed"),
    (str(INTERRUPTED), "interrupted (Ctrl-C)"),
)
