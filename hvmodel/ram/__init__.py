"""Guest RAM as QEMU lays it out: `RamBlock`, a memory file that is mapped, with QEMU's fields and a record of what the
host wrote; `MemoryRegion` and `AddressSpace`, the memory API; listeners that turn flat views into memslots."""

from __future__ import annotations

from .block import RAM_SHARED, RamBlock, host_memory, ram_size
from .dirty import HostDirty

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .address_space import AddressSpace, address_spaces
    from .backend import MemoryBackend, MemoryBackendFile, MemoryBackendMemfd, MemoryBackendRam
    from .dispatch import MEMTX_DECODE_ERROR, MEMTX_ERROR, MEMTX_OK, MemTxError
    from .flatview import FlatRange, FlatView
    from .kvm_listener import KvmMemoryListener
    from .listener import MemoryListener, MemoryRegionSection
    from .mtree import info_mtree
    from .page_size import HostPageSize, page_size_init
    from .ramlist import RamList, find_ram_offset
    from .region import MemoryRegion, MemoryRegionOps
    from .sharing import receive_block, send_block
    from .topology import transaction
    from .walk import Walks, walk_many

# Where what a bare machine does not need comes from, at its first use.
_LAZY = {
    "AddressSpace": "address_space",
    "FlatRange": "flatview",
    "FlatView": "flatview",
    "HostPageSize": "page_size",
    "KvmMemoryListener": "kvm_listener",
    "MEMTX_DECODE_ERROR": "dispatch",
    "MEMTX_ERROR": "dispatch",
    "MEMTX_OK": "dispatch",
    "MemTxError": "dispatch",
    "MemoryBackend": "backend",
    "MemoryBackendFile": "backend",
    "MemoryBackendMemfd": "backend",
    "MemoryBackendRam": "backend",
    "MemoryListener": "listener",
    "MemoryRegion": "region",
    "MemoryRegionOps": "region",
    "MemoryRegionSection": "listener",
    "RamList": "ramlist",
    "Walks": "walk",
    "address_spaces": "address_space",
    "find_ram_offset": "ramlist",
    "info_mtree": "mtree",
    "page_size_init": "page_size",
    "receive_block": "sharing",
    "send_block": "sharing",
    "transaction": "topology",
    "walk_many": "walk",
}

__all__ = [
    "RAM_SHARED",
    "AddressSpace",
    "FlatRange",
    "FlatView",
    "HostDirty",
    "HostPageSize",
    "KvmMemoryListener",
    "MEMTX_DECODE_ERROR",
    "MEMTX_ERROR",
    "MEMTX_OK",
    "MemTxError",
    "MemoryBackend",
    "MemoryBackendFile",
    "MemoryBackendMemfd",
    "MemoryBackendRam",
    "MemoryListener",
    "MemoryRegion",
    "MemoryRegionOps",
    "MemoryRegionSection",
    "RamBlock",
    "RamList",
    "Walks",
    "address_spaces",
    "find_ram_offset",
    "host_memory",
    "info_mtree",
    "page_size_init",
    "ram_size",
    "receive_block",
    "send_block",
    "transaction",
    "walk_many",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    return value
