"""The host's page as QEMU 7.2 sees it: `HostPageSize`, at least a page of the target.

QEMU keeps memory in two sizes of page: the target's (the guest's smallest, 4 KiB on x86; a bit of a dirty bitmap) and
the host's (what mmap, mprotect and madvise work on).  `page_size_init` makes sure that the host's is not the smaller
one, by taking the target's for both:

    host 4K, target 4K     host page = 4K      a bit of the bitmap is a page of the host
    host 64K, target 4K    host page = 64K     one host page holds 16 target pages: protecting one protects all
    host 4K, target 8K     host page = 8K      a target page is two host pages, always protected and mapped together

Without the rule a range that is whole in host pages could end within a target page.  RAM blocks, which are rounded up
to host pages, would then have a last page that is half there: its bit in the bitmap, its place in a migration stream
and a write to its other half would all be about memory that nobody has.  With the rule whole host pages are whole
target pages, whatever the two sizes are, because both are powers of two.

QEMU 10.2 has done away with the variable; its callers ask for the real page size.

Source: page_size_init, softmmu/physmem.c and qemu_host_page_size, include/exec/cpu-common.h@v7.2 of QEMU.
"""

from __future__ import annotations

import os

from ..errors import ArgumentError
from ..host.mapping import index
from ..units import PAGE_SIZE
from ..value import Value

__all__ = ["HostPageSize", "page_size_init"]


class HostPageSize(Value):
    """What `page_size_init` sets: QEMU's qemu_host_page_size and qemu_host_page_mask.

    >>> HostPageSize(0x1000, 0x1000, 0x1000).align_up(1)
    4096
    """

    size: int
    real: int
    target: int

    @property
    def mask(self) -> int:
        """-size: what an address is and-ed with, to have the beginning of its page."""
        return -self.size

    def align_up(self, value: int) -> int:
        """The end of the page that `value` is in: HOST_PAGE_ALIGN.  QEMU rounds the sizes of RAM blocks by it."""
        return (value + self.size - 1) & self.mask


def page_size_init(host_page_size: int = 0, *, real: int | None = None, target: int = PAGE_SIZE) -> HostPageSize:
    """The page size that QEMU 7.2 works with.

    `host_page_size`: what was asked for (the option -p of user-mode QEMU), 0 for the real one.  `real`: the host's, by
    default of this host.  `target`: a page of the guest.  All are powers of two, in bytes.

    Raises ArgumentError, ArgumentTypeError.

    >>> page_size_init(real=0x1000).size, page_size_init(real=0x1000, target=0x2000).size
    (4096, 8192)
    """
    call = "page_size_init"
    if real is None:
        real = os.sysconf("SC_PAGE_SIZE")
    sizes = {"host_page_size": host_page_size, "real": real, "target": target}
    for field, value in sizes.items():
        size = sizes[field] = index(value, call, field)
        if size & (size - 1) or size < (0 if field == "host_page_size" else 1):
            raise ArgumentError(call, field, value, "a power of two" + (", or 0" if field == "host_page_size" else ""))
    size = sizes["host_page_size"] or sizes["real"]
    return HostPageSize(max(size, sizes["target"]), sizes["real"], sizes["target"])
