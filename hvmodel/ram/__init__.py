"""Guest RAM as QEMU has it: `RamBlock`, a sealed memory file that is mapped, with QEMU's fields and a record of what
the host wrote."""

from __future__ import annotations

from .block import RAM_SHARED, RamBlock, host_memory, ram_size
from .dirty import HostDirty

__all__ = ["RAM_SHARED", "HostDirty", "RamBlock", "host_memory", "ram_size"]
