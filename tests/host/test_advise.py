from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError, HostError
from hvmodel.host import (
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_SHRINK,
    PROT_READ,
    Mapping,
    MemFd,
    ViewError,
)
from hvmodel.host.advice import ADVICE
from tests.host.held import nothing_leaks
from tests.host.smaps import flags, rss, smaps

PAGE = 4096
PAGES = 16
SIZE = PAGES * PAGE
MiB = 1 << 20
ROOT = Path(__file__).parents[2]

Told = list[tuple[int, int]]


@pytest.fixture
def told() -> Told:
    return []


@pytest.fixture
def memfd():
    with nothing_leaks(), MemFd("advise", SIZE, seals=F_SEAL_SHRINK | F_SEAL_GROW) as memfd:
        yield memfd


@pytest.fixture
def mapping(memfd: MemFd, told: Told):
    with Mapping(memfd, SIZE, align="2M", written=lambda offset, size: told.append((offset, size))) as mapping:
        mapping.write(0, b"\5" * SIZE)
        del told[:]
        yield mapping


@pytest.mark.parametrize(
    ("advice", "flag", "back"),
    [
        ("dontfork", "dc", "dofork"),
        ("dontdump", "dd", "dodump"),
        ("hugepage", "hg", "nohugepage"),
        ("nohugepage", "nh", None),
        ("mergeable", "mg", "unmergeable"),
    ],
)
def test_flags_are_the_kernels(advice: str, flag: str, back: str | None) -> None:
    # VmFlags of smaps: Documentation/filesystems/proc.rst.
    with nothing_leaks(), Mapping(None, 4 * MiB, shared=False, align="2M", prot=7) as mapping:
        before = flags(mapping.hva)
        assert flag not in before
        try:
            mapping.advise(advice)
        except HostError as error:
            assert error.errno == errno.EINVAL  # noqa: PT017
            pytest.skip(f"this kernel cannot: {error}")
        assert flags(mapping.hva) == before | {flag}
        assert mapping.view(0, 4) == bytes(4)
        if back is not None:
            mapping.advise(back)
            assert flag not in flags(mapping.hva)
            mapping.advise(advice, MiB, MiB)
            assert flag in flags(mapping.hva + MiB)
            assert flag not in flags(mapping.hva + 2 * MiB)


def test_huge_pages_of_anonymous_memory() -> None:
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("transparent huge pages are off")
    with nothing_leaks(), Mapping(None, 4 * MiB, shared=False, align="2M", prot=7) as mapping:
        mapping.write(0, b"x" * (4 * MiB))
        mapping.advise("collapse", 0, 2 * MiB)
        assert smaps(mapping.hva)["AnonHugePages"] == "2048 kB"
        assert mapping.read(0, 4 * MiB) == b"x" * (4 * MiB)
        with pytest.raises(HostError, match="aligned") as caught:
            mapping.advise("collapse", 2 * MiB + PAGE, PAGE)
        assert (caught.value.errno, caught.value.field, caught.value.value) == (errno.EINVAL, "advice", "collapse")


def test_huge_pages_of_shared_memory() -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text()
    if "[deny]" in enabled:
        pytest.skip("this host denies huge pages of shared memory")
    with MemFd("thp", 4 * MiB) as memfd, Mapping(memfd, 4 * MiB, align="2M") as mapping:
        if "[never]" in enabled:
            mapping.advise("hugepage")  # accepted, and without effect
            with pytest.raises(HostError, match="nothing of one is in memory yet"):
                mapping.advise("collapse")
        mapping.populate()
        if "[never]" in enabled:
            assert smaps(mapping.hva)["ShmemPmdMapped"] == "0 kB"
        mapping.advise("collapse")
        assert smaps(mapping.hva)["ShmemPmdMapped"] == "4096 kB"


@pytest.mark.parametrize("advice", ["willneed", "cold", "pageout", "dontdump", "dofork", "nohugepage"])
def test_what_keeps_the_bytes(mapping: Mapping, told: Told, advice: str) -> None:
    view = mapping.view()
    try:
        mapping.advise(advice)
    except HostError as error:
        assert error.errno == errno.EINVAL  # noqa: PT017
        pytest.skip(f"this kernel cannot: {error}")
    assert bytes(view) == b"\5" * SIZE
    assert told == []


def test_dontneed_of_shared_memory_keeps_the_files_bytes(mapping: Mapping, memfd: MemFd, told: Told) -> None:
    assert rss(mapping.hva) == SIZE
    mapping.advise("dontneed", PAGE, 2 * PAGE)
    assert rss(mapping.hva) == SIZE - 2 * PAGE
    assert mapping.read(0, SIZE) == b"\5" * SIZE
    assert set(told) == {(PAGE, 2 * PAGE)}


def test_dontneed_of_private_memory_loses_the_copies(memfd: MemFd) -> None:
    told: Told = []
    os.pwrite(memfd.fd, b"file" * PAGE, 0)
    for source, rest in ((memfd, b"file"), (None, bytes(4))):
        with Mapping(source, SIZE, shared=False, written=lambda *what: told.append(what)) as mapping:
            mapping.write(0, b"mine" * PAGE)
            del told[:]
            mapping.advise("dontneed", 0, 2 * PAGE)
            assert mapping.read(0, 4) == rest
            assert mapping.read(2 * PAGE, 4) == b"mine"
            assert set(told) == {(0, 2 * PAGE)}


def test_remove_punches_a_hole(mapping: Mapping, memfd: MemFd, told: Told) -> None:
    mapping.advise("remove", PAGE, 2 * PAGE)
    assert os.fstat(memfd.fd).st_blocks * 512 == SIZE - 2 * PAGE
    assert mapping.read(0, 4 * PAGE) == b"\5" * PAGE + bytes(2 * PAGE) + b"\5" * PAGE
    assert set(told) == {(PAGE, 2 * PAGE)}
    with Mapping(None, SIZE, shared=False) as private, pytest.raises(HostError) as caught:
        private.advise("remove")
    assert caught.value.errno == errno.EINVAL
    assert "there is no file behind the range" in str(caught.value)
    with Mapping(memfd, SIZE, prot=PROT_READ) as readonly:
        memfd.add_seals(F_SEAL_FUTURE_WRITE)
        with pytest.raises(HostError) as refused:
            mapping.advise("remove")
        assert (refused.value.errno, refused.value.field) == (errno.EPERM, "advice")
        assert "FUTURE_WRITE" in str(refused.value)
        assert readonly.read(0, 1) == b"\5"


@pytest.mark.parametrize("advice", ["dontneed", "remove", "guard_install", "discard"])
def test_what_takes_bytes_away_spares_views(mapping: Mapping, told: Told, advice: str) -> None:
    def take(offset: int, size: int) -> None:
        if advice == "discard":
            mapping.discard(offset, size)
        else:
            mapping.advise(advice, offset, size)

    kept = np.frombuffer(mapping.view(4 * PAGE, 2 * PAGE), np.uint8)
    for offset, size in ((0, SIZE), (4 * PAGE, PAGE), (5 * PAGE, PAGE), (0, 5 * PAGE)):
        with pytest.raises(BufferError, match="1 views of the range") as caught:
            take(offset, size)
        assert isinstance(caught.value, ViewError)
    assert (kept == 5).all()
    assert told == []
    assert mapping.read(0, SIZE) == b"\5" * SIZE
    take(0, 4 * PAGE)
    take(6 * PAGE, PAGE)
    assert (kept == 5).all()
    del kept
    take(0, SIZE)


def test_guards(mapping: Mapping, told: Told) -> None:
    try:
        mapping.advise("guard_install", 2 * PAGE, 4 * PAGE)
    except HostError as error:
        assert error.errno == errno.EINVAL  # noqa: PT017
        assert mapping.view().nbytes == SIZE
        pytest.skip(f"this kernel cannot: {error}")
    for offset, size in ((2 * PAGE, 1), (PAGE, 2 * PAGE), (0, SIZE)):
        with pytest.raises(ViewError, match="guarded"):
            mapping.view(offset, size)
        with pytest.raises(HostError, match="guarded") as caught:
            mapping.read(offset, size)
        assert (caught.value.errno, caught.value.value) == (errno.EFAULT, 2 * PAGE)
    with pytest.raises(HostError):
        mapping.write(5 * PAGE, b"1")
    with pytest.raises(HostError):
        mapping.populate(2 * PAGE, PAGE)
    assert mapping.view(0, 2 * PAGE)[0] == mapping.view(6 * PAGE)[0] == 5
    # The middle of it is taken back, then all.
    mapping.advise("guard_remove", 3 * PAGE, PAGE)
    assert mapping.view(3 * PAGE, PAGE)[0] == 5  # shared memory keeps its bytes
    for page in (2, 4, 5):
        with pytest.raises(ViewError):
            mapping.view(page * PAGE, 1)
    mapping.advise("guard_remove")
    assert mapping.read(0, SIZE) == bytes(mapping.view()) == b"\5" * SIZE


def test_a_guard_is_a_fault_for_who_has_the_address() -> None:
    script = """
import hvmodel as hv
from hvmodel._ffi import ffi
m = hv.Mapping(None, 8192, shared=False)
m.advise("guard_install", 4096, 4096)
print(ffi.cast("char *", m.hva)[0], flush=True)
ffi.cast("char *", m.hva)[4096]
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    if "EINVAL" in done.stderr:
        pytest.skip("this kernel has no guards")
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "b'\\x00'\n")


# Children of fork


def in_child(work: Callable[[], object]) -> None:
    """Runs `work` in a child of fork, which must return."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:  # noqa: BLE001
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_child_without_the_memory_does_not_die_of_it(memfd: MemFd, mapping: Mapping) -> None:
    with Mapping(memfd, SIZE) as inherited, Mapping(memfd, SIZE, align="2M") as part:
        mapping.advise("dontfork")
        part.advise("dontfork", PAGE, PAGE)
        kept = mapping.view(0, 2 * PAGE)
        door = mapping.writable(0, PAGE)
        with door as writable:

            def child(kept: memoryview = kept, writable: memoryview = writable) -> None:
                assert mapping.closed
                for use in (
                    lambda: mapping.read(0, 1),
                    lambda: mapping.write(0, b"1"),
                    lambda: mapping.view(0, 1),
                    lambda: mapping.protect(0, PAGE, 0),
                    lambda: part.read(0, 1),
                ):
                    with pytest.raises(ClosedError):
                        use()
                assert bytes(kept) == bytes(2 * PAGE)
                writable[0] = 1
                assert inherited.read(0, 4) == b"\5" * 4
                mapping.close()

            in_child(child)
            del child
        assert bytes(kept) == mapping.read(0, 2 * PAGE) == b"\5" * (2 * PAGE)
        del kept, writable


def test_taken_back_before_the_fork(mapping: Mapping) -> None:
    mapping.advise("dontfork")
    mapping.advise("dofork", 0, PAGE)
    mapping.advise("dofork", PAGE, None)

    def child() -> None:
        assert mapping.read(0, SIZE) == bytes(mapping.view()) == b"\5" * SIZE

    in_child(child)


# discard and sync


@pytest.mark.parametrize("kind", ["memfd", "number", "anonymous shared", "anonymous", "private"])
def test_discard(memfd: MemFd, kind: str, told: Told) -> None:
    source = {"memfd": memfd, "number": memfd.fd, "private": memfd}.get(kind)
    shared = kind not in ("anonymous", "private")
    os.pwrite(memfd.fd, b"file" * (SIZE // 4), 0)
    with Mapping(
        source, SIZE - PAGE, offset=PAGE if source else 0, shared=shared, written=lambda *what: told.append(what)
    ) as mapping:
        mapping.write(0, b"\5" * mapping.size)
        del told[:]
        mapping.discard(2 * PAGE, PAGE)
        assert mapping.read(0, 4 * PAGE) == b"\5" * (2 * PAGE) + bytes(PAGE) + b"\5" * PAGE
        assert set(told) == {(2 * PAGE, PAGE)}
        if source:
            assert os.pread(memfd.fd, PAGE, 3 * PAGE) == bytes(PAGE)  # the file's, at the mapping's offset
            assert os.pread(memfd.fd, 4, 4 * PAGE) != bytes(4)
        mapping.discard(0)
        assert mapping.read(0, mapping.size) == bytes(mapping.size)


@pytest.mark.parametrize("what", ["discard", "remove"])
def test_huge_pages_that_were_given_back_may_not_be_there(
    mapping: Mapping, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A host without huge pages in its pool shows only that views are refused.
    mapping.view()
    monkeypatch.setattr(mapping, "_page_size", SIZE)
    for _ in range(2):
        mapping.discard(0) if what == "discard" else mapping.advise("remove")
    with pytest.raises(ViewError, match="pool"):
        mapping.view(0, 1)
    assert mapping.read(0, 1) == b"\0"
    assert len(mapping._bars) == 1


def test_discard_makes_qemus_calls() -> None:
    # ram_block_discard_range, softmmu/physmem.c of QEMU 7.2.
    from tests.host.test_reserve import calls_of

    script = (
        "fd = os.memfd_create('trace'); os.ftruncate(fd, 65536)\n"
        "f = hv.Mapping(fd, 65536); a = hv.Mapping(None, 65536); p = hv.Mapping(None, 65536, shared=False)\n"
        "[m.discard(0, 4096) for m in (f, a, p)]\nMARK\n"
        "[m.discard(4096, 8192) for m in (f, a, p)]\nMARK\nf.close(), a.close(), p.close()"
    )
    calls = [line.split(" = ")[0].rstrip() for line in calls_of(script, "fallocate,madvise")]
    assert len(calls) == 4
    assert calls[0].endswith(", FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE, 4096, 8192)")
    assert [call.split(", ", 1)[1] for call in calls[1:]] == [
        "8192, MADV_DONTNEED)",
        "8192, MADV_REMOVE)",
        "8192, MADV_DONTNEED)",
    ]


def test_discard_is_not_done_to_another_file(memfd: MemFd) -> None:
    fd = os.dup(memfd.fd)
    try:
        with Mapping(fd, SIZE) as mapping, MemFd("other", SIZE) as other:
            os.pwrite(other.fd, b"precious", 0)
            os.dup2(other.fd, fd)
            with pytest.raises(HostError, match="not that of the mapped file") as caught:
                mapping.discard(0, PAGE)
            assert caught.value.errno == errno.EBADF
            assert os.pread(other.fd, 8, 0) == b"precious"
    finally:
        os.close(fd)
    with MemFd("closed", SIZE) as gone, Mapping(gone, SIZE) as mapping:
        gone.close()
        with pytest.raises(ClosedError):
            mapping.discard(0)


def test_discard_of_a_sealed_file(mapping: Mapping, memfd: MemFd) -> None:
    memfd.add_seals(F_SEAL_FUTURE_WRITE)
    with pytest.raises(HostError, match="sealed with") as caught:
        mapping.discard(0, PAGE)
    assert (caught.value.errno, caught.value.call) == (errno.EPERM, "fallocate")
    assert mapping.read(0, 1) == b"\5"


def test_sync(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    fd = os.open(path, os.O_RDWR)
    try:
        with Mapping(fd, SIZE) as mapping:
            mapping.write(PAGE, b"synced")
            mapping.sync()
            mapping.sync(PAGE, PAGE)
            assert path.read_bytes()[PAGE : PAGE + 6] == b"synced"
            with pytest.raises(ArgumentError):
                mapping.sync(1)
    finally:
        os.close(fd)
    with pytest.raises(ClosedError):
        mapping.sync()


# Arguments


def test_words() -> None:
    with Mapping(None, SIZE) as mapping:
        for advice in ("", "HUGEPAGE", "free", "populate_write"):
            with pytest.raises(ArgumentError, match="guard_install") as caught:
                mapping.advise(advice)
            assert caught.value.field == "advice"
        for wrong in (4, None, b"cold"):
            with pytest.raises(ArgumentTypeError, match="guard_install"):
                mapping.advise(wrong)


@pytest.mark.parametrize("advice", [*ADVICE, "discard"])
def test_ranges_refused(advice: str) -> None:
    with Mapping(None, SIZE, shared=False) as mapping:
        before = flags(mapping.hva)
        for field, offset, size in (
            ("offset", 1, PAGE),
            ("offset", -PAGE, PAGE),
            ("offset", SIZE + PAGE, PAGE),
            ("offset", 1 << 64, PAGE),
            ("size", 0, 0),
            ("size", SIZE, None),
            ("size", 0, PAGE - 1),
            ("size", 0, -PAGE),
            ("size", PAGE, SIZE),
            ("size", PAGE, (1 << 64) - PAGE),
        ):
            with pytest.raises(ArgumentError) as caught:
                mapping.discard(offset, size) if advice == "discard" else mapping.advise(advice, offset, size)
            assert caught.value.field == field
        assert flags(mapping.hva) == before
    with pytest.raises(ClosedError):
        mapping.discard(0) if advice == "discard" else mapping.advise(advice)
