"""KVM's binary statistics: the file descriptor of KVM_GET_STATS_FD, read by its own descriptors.

Owns the descriptor it is given, unless told otherwise.  The file:

    struct kvm_stats_header { u32 flags, name_size, num_desc, id_offset, desc_offset, data_offset; }
    id_offset     char id[name_size], such as "kvm-1234/vcpu-0"
    desc_offset   num_desc times struct kvm_stats_desc { u32 flags; s16 exponent; u16 size; u32 offset, bucket_size;
                  char name[name_size]; }
    data_offset   u64 values; those of a statistic at data_offset + offset, `size` of them

    flags of a descriptor: bits 0..3 type, bits 4..7 unit, bits 8..11 base

Sources: kernel Documentation/virt/kvm/api.rst section 4.133, include/uapi/linux/kvm.h @6.18.
"""

from __future__ import annotations

import errno
import os
import struct
import weakref

from ..errors import ArgumentTypeError, ClosedError, HostError
from ..value import Value
from .ringbuffer import FormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ["Stats", "StatsDescriptor"]

_HEADER = struct.Struct("<6I")
_DESCRIPTOR = struct.Struct("<IhHII")

TYPES = ("cumulative", "instant", "peak", "linear_hist", "log_hist")
UNITS = ("none", "bytes", "seconds", "cycles", "boolean")
BASES = (10, 2)


class StatsDescriptor(Value):
    """One statistic.  A value counts in `unit` times `base` ** `exponent`.

    `type`: cumulative, instant, peak, linear_hist (buckets `bucket_size` wide) or log_hist; `unit`: none, bytes,
    seconds, cycles, boolean; `base` is 10 or 2; `size` values at byte `offset` of the data.  What a newer kernel adds
    shows as "type 7", "unit 9" and base 0.
    """

    name: str
    type: str
    unit: str
    base: int
    exponent: int
    size: int
    offset: int
    bucket_size: int


def _name(names: tuple[str, ...], index: int, what: str) -> str:
    return names[index] if index < len(names) else f"{what} {index}"


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("ascii", "replace")


def _release(fd: int, pid: int) -> None:
    import warnings

    if os.getpid() == pid:
        os.close(fd)
        warnings.warn(f"unclosed Stats(fd={fd})", ResourceWarning, stacklevel=2)


class Stats:
    """The statistics of a VM or vCPU from the fd that KVM_GET_STATS_FD (KVM_CAP_BINARY_STATS_FD) returned.

    `close()` closes the fd too, unless `owned` is False.  Any thread may read.  The fd stays readable after the VM's
    other descriptors are closed.  HostError as pread(2); FormatError where the file is not as documented.
    """

    def __init__(self, fd: int, *, owned: bool = True) -> None:
        if isinstance(fd, bool) or not isinstance(fd, int):
            raise ArgumentTypeError("Stats", "fd", fd, "the descriptor from KVM_GET_STATS_FD, an int")
        self._fd = fd
        header = _HEADER.unpack(self._pread(_HEADER.size, 0, "header"))
        _, name_size, count, id_offset, desc_offset, self._data_offset = header
        #: What the kernel calls the VM or vCPU, such as "kvm-1234/vcpu-0".
        self.id = _text(self._pread(name_size, id_offset, "id"))
        step = _DESCRIPTOR.size + name_size
        table = self._pread(count * step, desc_offset, "descriptors")
        #: The statistics in the kernel's order.
        self.descriptors = tuple(self._descriptor(table[at : at + step]) for at in range(0, len(table), step))
        self._data_size = max((d.offset + 8 * d.size for d in self.descriptors), default=0)
        self._finalizer = weakref.finalize(self, _release, fd, os.getpid()) if owned else None

    @staticmethod
    def _descriptor(data: bytes) -> StatsDescriptor:
        flags, exponent, size, offset, bucket_size = _DESCRIPTOR.unpack_from(data)
        base = flags >> 8 & 15
        return StatsDescriptor(
            _text(data[_DESCRIPTOR.size :]),
            _name(TYPES, flags & 15, "type"),
            _name(UNITS, flags >> 4 & 15, "unit"),
            BASES[base] if base < len(BASES) else 0,
            exponent,
            size,
            offset,
            bucket_size,
        )

    def _pread(self, size: int, offset: int, what: str) -> bytes:
        # The kernel returns less than asked only at the end of a part; parts may be read in pieces.
        data = b""
        while len(data) < size:
            try:
                part = os.pread(self._fd, size - len(data), offset + len(data))
            except OSError as error:
                accepted = "the descriptor from KVM_GET_STATS_FD"
                raise HostError(error.errno or errno.EIO, "pread", "fd", self._fd, accepted) from None
            if not part:
                why = f"{what} cut short after {len(data)} of {size} bytes"
                raise FormatError(f"KVM statistics of fd {self._fd}", why)
            data += part
        return data

    def __repr__(self) -> str:
        return "<Stats closed>" if self._fd < 0 else f"Stats({self.id!r}, fd={self._fd})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the fd, where it is owned.  Any number of calls."""
        fd, self._fd = self._fd, -1
        if self._finalizer is not None and self._finalizer.detach():
            os.close(fd)

    def read(self) -> dict[str, int | tuple[int, ...]]:
        """All values now, by name: an int, or for histograms a tuple with one int per bucket.

        ClosedError after close(); HostError as pread(2).
        """
        if self._fd < 0:
            raise ClosedError("Stats.read", "Stats")
        data = self._pread(self._data_size, self._data_offset, "data")
        found: dict[str, int | tuple[int, ...]] = {}
        for d in self.descriptors:
            values = struct.unpack_from(f"<{d.size}Q", data, d.offset)
            found[d.name] = values[0] if d.size == 1 else values
        return found
