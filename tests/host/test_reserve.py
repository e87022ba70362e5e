from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel.errors import ArgumentError, ArgumentTypeError, HostError
from hvmodel.host import F_SEAL_SHRINK, PROT_READ, Mapping, MemFd, ViewError
from hvmodel.host import mapping as mapping_module
from tests.cases import cases
from tests.host.held import nothing_leaks
from tests.host.smaps import flags, vmas
from tests.need import need

PAGE = 4096
MiB = 1 << 20
ROOT = Path(__file__).parents[2]


@settings(deadline=None, max_examples=cases(60, 1000))
@given(
    pages=st.integers(1, 600),
    shift=st.integers(12, 26),
    source=st.sampled_from(["memfd", "anonymous"]),
    shared=st.booleans(),
)
def test_aligned_memory_with_a_page_behind_it(pages: int, shift: int, source: str, shared: bool) -> None:
    size = pages * PAGE
    with MemFd("align", size, seals=F_SEAL_SHRINK) as memfd:
        before = reserved()
        mapping = Mapping(memfd if source == "memfd" else None, size, shared=shared, align=1 << shift)
        address = mapping.hva
        assert address % (1 << shift) == 0
        assert (mapping.align, mapping.guard_size) == (1 << shift, PAGE)
        # What is mapped there, and nothing of the reservation before or behind it.
        kind = "s" if shared else "p"
        assert vmas(address, size + PAGE) == [
            (address, address + size, f"rw-{kind}"),
            (address + size, address + size + PAGE, "---p"),
        ]
        assert reserved() == before + PAGE
        mapping.close()
        assert vmas(address, size + PAGE) == []


def reserved() -> int:
    """Bytes of inaccessible anonymous memory in this process."""
    return sum(end - start for start, end, permissions in vmas(0, 1 << 47) if permissions == "---p")


def calls_of(script: str, names: str = "mmap,munmap") -> list[str]:
    """The system calls of these names that a script makes between its two marks (getppid)."""
    need("strace")
    code = f"import os, hvmodel as hv\n{script.replace('MARK', 'os.getppid()')}"
    done = subprocess.run(
        ["strace", "-qq", "-e", f"trace={names},getppid", "-e", "signal=none", sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stderr.splitlines()
    marks = [n for n, line in enumerate(lines) if line.startswith("getppid")]
    return lines[marks[0] + 1 : marks[1]]


def test_the_system_calls() -> None:
    # util/mmap-alloc.c of QEMU: reserve, activate, trim the head if there is one, trim the tail behind one page.
    script = (
        "fd = os.memfd_create('trace'); os.ftruncate(fd, 1 << 27)\n"
        "m = hv.Mapping(fd, 1 << 27, align=1 << 21)\nMARK\n"
        "n = hv.Mapping(fd, 1 << 27, align=1 << 21)\nMARK\nprint(n.hva); m.close(); n.close()"
    )
    calls = calls_of(script)
    assert calls[0].startswith(f"mmap(NULL, {(1 << 27) + (1 << 21)}, PROT_NONE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0)")
    reserved = int(calls[0].split("= ")[1], 16)
    address = -(-reserved // (1 << 21)) << 21
    assert calls[1].startswith(f"mmap({address:#x}, {1 << 27}, PROT_READ|PROT_WRITE, MAP_SHARED|MAP_FIXED, ")
    head, tail = address - reserved, (1 << 21) - (address - reserved) - PAGE
    trims = [f"munmap({reserved:#x}, {head})"] * bool(head)
    trims += [f"munmap({address + (1 << 27) + PAGE:#x}, {tail})"] * bool(tail)
    assert [call.split(" ")[0] + " " + call.split(" ")[1] for call in calls[2:]] == trims


def test_a_refused_activation_leaves_nothing() -> None:
    with MemFd("ro", PAGE) as memfd:
        fd = os.open(f"/proc/self/fd/{memfd.fd}", os.O_RDONLY)
        try:
            before = reserved()
            with nothing_leaks(), pytest.raises(HostError) as caught:
                Mapping(fd, 64 * MiB, align="2M")
            assert (caught.value.call, caught.value.errno) == ("mmap", errno.EACCES)
            assert reserved() == before
        finally:
            os.close(fd)


def test_no_room_for_the_reservation() -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    try:
        resource.setrlimit(resource.RLIMIT_AS, (pages * PAGE + 256 * MiB, limits[1]))
        with nothing_leaks(), pytest.raises(HostError) as caught:
            Mapping(None, "16M", align="1G")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert (caught.value.call, caught.value.errno, caught.value.field) == ("mmap", errno.ENOMEM, "size")


@pytest.mark.parametrize("align", [0, 1, 2048, -4096, 3 * PAGE, PAGE + 1, 1 << 47, 1 << 63, 1 << 64, "3K", "x"])
def test_alignments_refused(align: int | str) -> None:
    with nothing_leaks(), pytest.raises(ArgumentError) as caught:
        Mapping(None, PAGE, align=align)
    assert caught.value.field == "align"


def test_alignment_of_another_type() -> None:
    for align in (2.0, True, b"2M"):
        with pytest.raises(ArgumentTypeError):
            Mapping(None, PAGE, align=align)


def test_noreserve_is_the_kernels_flag() -> None:
    # VmFlags "nr"; the kernel leaves it out where it would not have reserved anyway: /proc/sys/vm/overcommit_memory 1.
    with Mapping(None, MiB, shared=False, noreserve=True, prot=7) as mapping:
        assert mapping.noreserve
        assert "nr" in flags(mapping.hva)
        assert mapping.view(0, 1) == b"\0"
    with Mapping(None, MiB, shared=False, prot=7) as mapping:
        assert not mapping.noreserve
        assert "nr" not in flags(mapping.hva)


def test_noreserve_where_the_host_never_overcommits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # map_noreserve_effective, util/mmap-alloc.c: refused where the kernel would account the mapping all the same.
    (tmp_path / "two").write_text("2\n")
    monkeypatch.setattr(mapping_module, "_OVERCOMMIT", str(tmp_path / "two"))
    with MemFd("shared", PAGE) as memfd:
        for source, shared, prot in ((None, False, 3), (None, True, 3), (memfd, False, 3)):
            with nothing_leaks(), pytest.raises(HostError, match="is 2") as caught:
                Mapping(source, PAGE, shared=shared, prot=prot, noreserve=True)
            assert (caught.value.field, caught.value.errno) == ("noreserve", errno.EOPNOTSUPP)
        for source, shared, prot in ((memfd, True, 3), (None, False, PROT_READ), (memfd, False, PROT_READ)):
            Mapping(source, PAGE, shared=shared, prot=prot, noreserve=True).close()
    monkeypatch.setattr(mapping_module, "_OVERCOMMIT", str(tmp_path / "not there"))
    Mapping(None, PAGE, noreserve=True).close()


@pytest.mark.parametrize("align", [None, "2M"])
def test_sync_falls_back_with_a_warning(align: str | None) -> None:
    # Only a file system on persistent memory takes MAP_SYNC (mmap(2): EOPNOTSUPP).
    with nothing_leaks(), MemFd("dax", PAGE, seals=F_SEAL_SHRINK) as memfd:
        with pytest.warns(RuntimeWarning, match="MAP_SYNC"):
            mapping = Mapping(memfd, PAGE, sync=True, align=align)
        assert not mapping.synced
        mapping.write(0, b"there")
        assert os.pread(memfd.fd, 5, 0) == b"there"
        assert vmas(mapping.hva, PAGE)[0][2] == "rw-s"
        mapping.close()
        with Mapping(memfd, PAGE, sync=True, shared=False) as private:  # left out, as QEMU does
            assert not private.synced
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with nothing_leaks(), pytest.raises(RuntimeWarning):
                Mapping(memfd, PAGE, sync=True, align=align)


def test_huge_pages_that_need_not_be_there() -> None:
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    if not free.exists():
        pytest.skip("needs huge pages of 2 MiB")
    with nothing_leaks(), MemFd("huge", 4 * MiB, hugetlb=True, hugetlbsize="2M", seals=F_SEAL_SHRINK) as memfd:
        for arguments in ({"size": MiB}, {"size": 4 * MiB, "offset": PAGE}, {"size": 4 * MiB, "align": MiB}):
            with nothing_leaks(), pytest.raises(ArgumentError) as caught:
                Mapping(memfd, noreserve=True, **arguments)
            assert caught.value.field in arguments
            with nothing_leaks(), pytest.raises(ArgumentError) as by_number:
                Mapping(memfd.fd, noreserve=True, **arguments)
            assert by_number.value.field == caught.value.field
        for shared in (True, False):
            with Mapping(memfd, 4 * MiB, noreserve=True, shared=shared, align="2M") as mapping:
                assert (mapping.page_size, mapping.guard_size) == (2 * MiB, PAGE)
                with pytest.raises(ViewError, match="huge pages may not be there"):
                    mapping.view(0, 1)
                if int(free.read_text()) == 0:
                    for use in (lambda m=mapping: m.read(0, 1), lambda m=mapping: m.write(0, b"1")):
                        with pytest.raises(HostError) as refused:
                            use()
                        assert refused.value.errno == errno.EFAULT
                with pytest.raises(ArgumentError, match="multiple of 2097152"):
                    mapping.protect(0, PAGE, PROT_READ)
        if int(free.read_text()) == 0:
            with nothing_leaks(), pytest.raises(HostError, match="too few free huge pages") as none:
                Mapping(memfd, 4 * MiB, align="2M")
            assert (none.value.errno, none.value.field) == (errno.ENOMEM, "size")
