from __future__ import annotations

import errno
import fcntl
import os
import struct

import pytest

from hvmodel.errors import ArgumentTypeError, ClosedError, HostError
from hvmodel.witness import Stats
from hvmodel.witness.ringbuffer import FormatError
from hvmodel.witness.stats import StatsDescriptor
from tests.need import need
from tests.witness.plainvm import KVM_EXIT_IO, KVM_GET_STATS_FD, PlainVm


def _file(content: bytes) -> int:
    fd = os.memfd_create("stats", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


def _descriptor(name: str, flags: int, exponent: int, size: int, offset: int, bucket: int = 0) -> bytes:
    # u32 flags, s16 exponent, u16 size, u32 offset, u32 bucket_size: 16 bytes; then the name of 16.
    return struct.pack("<IhHII", flags, exponent, size, offset, bucket) + name.encode().ljust(16, b"\0")


def test_descriptor_is_sixteen_bytes_and_the_name() -> None:
    assert len(_descriptor("x", 0, 0, 1, 0)) == 32


def test_file_made_by_hand() -> None:
    # flags: type | unit << 4 | base << 8.
    descriptors = [
        _descriptor("exits", 0, 0, 1, 0),
        _descriptor("free", 1 | 1 << 4 | 1 << 8, 20, 1, 8),  # instant, bytes, 2 ** 20
        _descriptor("wait_hist", 3 | 2 << 4, -9, 3, 16, 500),  # linear histogram, seconds, 10 ** -9
        _descriptor("future", 9 | 9 << 4 | 9 << 8, 0, 1, 40),
    ]
    # Header of 24 bytes, the id (16), four descriptors of 16 + 16 bytes, the data.
    header = struct.pack("<6I", 0, 16, 4, 24, 24 + 16, 24 + 16 + 4 * 32)
    content = header + b"kvm-7/vcpu-3".ljust(16, b"\0") + b"".join(descriptors)
    content += struct.pack("<6Q", 5, 6, 1, 2, 1 << 63, 9)
    with Stats(_file(content)) as stats:
        assert stats.id == "kvm-7/vcpu-3"
        assert stats.descriptors == (
            StatsDescriptor("exits", "cumulative", "none", 10, 0, 1, 0, 0),
            StatsDescriptor("free", "instant", "bytes", 2, 20, 1, 8, 0),
            StatsDescriptor("wait_hist", "linear_hist", "seconds", 10, -9, 3, 16, 500),
            StatsDescriptor("future", "type 9", "unit 9", 0, 0, 1, 40, 0),
        )
        assert stats.read() == {"exits": 5, "free": 6, "wait_hist": (1, 2, 1 << 63), "future": 9}


def test_file_cut_short_is_refused() -> None:
    header = struct.pack("<6I", 0, 16, 1, 24, 40, 72)
    fd = _file(header + b"kvm-7".ljust(16, b"\0") + _descriptor("exits", 0, 0, 1, 0)[:20])
    try:
        with pytest.raises(FormatError, match="descriptors cut short after 20 of 32"):
            Stats(fd)
        os.fstat(fd)  # still the caller's: the constructor failed
    finally:
        os.close(fd)


def test_bad_descriptors() -> None:
    with pytest.raises(ArgumentTypeError, match="fd"):
        Stats("3")  # type: ignore[arg-type]
    with pytest.raises(HostError) as caught:
        Stats(-1)
    assert caught.value.errno == errno.EBADF
    end, other = os.pipe()
    try:
        with pytest.raises(HostError) as caught:
            Stats(end)
        assert caught.value.errno == errno.ESPIPE
    finally:
        os.close(end)
        os.close(other)


def test_close() -> None:
    header = struct.pack("<6I", 0, 16, 0, 24, 40, 40)
    fd = _file(header + bytes(16))
    stats = Stats(fd)
    assert stats.read() == {}
    stats.close()
    stats.close()
    assert repr(stats) == "<Stats closed>"
    with pytest.raises(ClosedError):
        stats.read()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_not_owned_stays_open() -> None:
    fd = _file(struct.pack("<6I", 0, 16, 0, 24, 40, 40) + bytes(16))
    with Stats(fd, owned=False):
        pass
    os.close(fd)


def test_forgotten_warns_and_closes() -> None:
    fd = _file(struct.pack("<6I", 0, 16, 0, 24, 40, 40) + bytes(16))
    stats = Stats(fd)
    with pytest.warns(ResourceWarning, match="Stats"):
        del stats
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_live_vcpu_counts_exits() -> None:
    need("kvm")
    with PlainVm() as vm, Stats(fcntl.ioctl(vm.vcpu, KVM_GET_STATS_FD, 0)) as stats:
        assert stats.id == f"kvm-{os.getpid()}/vcpu-0"
        before = stats.read()
        for _ in range(300):
            assert vm.run() == KVM_EXIT_IO
        after = stats.read()
        grown = {n: v - before[n] for n, v in after.items() if isinstance(v, int) and v != before[n]}  # type: ignore[operator]
        assert grown["exits"] >= 300
        if "insn_emulation" in grown:  # where real mode is emulated: 300 out, and the jmp between them
            assert grown["insn_emulation"] == 300 + 299


def test_live_vm() -> None:
    need("kvm")
    with PlainVm() as vm:
        stats = Stats(fcntl.ioctl(vm.vm, KVM_GET_STATS_FD, 0))
        names = {d.name: d for d in stats.descriptors}
        # kernel arch/x86/kvm/x86.c @6.18: STATS_DESC_COUNTER(VM, mmu_pte_write), STATS_DESC_ICOUNTER(VM, pages_4k),
        # STATS_DESC_PCOUNTER(VM, max_mmu_rmap_size).
        assert names["mmu_pte_write"].type == "cumulative"
        assert names["pages_4k"].type == "instant"
        assert names["max_mmu_rmap_size"].type == "peak"
        assert set(stats.read()) == set(names)
    assert set(stats.read()) == set(names)  # the fd keeps the VM
    stats.close()


def test_live_histogram() -> None:
    need("kvm")
    with PlainVm() as vm, Stats(fcntl.ioctl(vm.vcpu, KVM_GET_STATS_FD, 0)) as stats:
        (hist,) = (d for d in stats.descriptors if d.name == "halt_poll_success_hist")
        # kernel virt/kvm: HALT_POLL_HIST_COUNT 32 buckets, logarithmic, nanoseconds.
        assert (hist.type, hist.unit, hist.base, hist.exponent, hist.size) == ("log_hist", "seconds", 10, -9, 32)
        value = stats.read()[hist.name]
        assert isinstance(value, tuple)
        assert len(value) == 32
