from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel.errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, HostError
from hvmodel.host import F_SEAL_SHRINK, PROT_NONE, PROT_READ, PROT_WRITE, Mapping, MemFd
from hvmodel.host import populate as module
from hvmodel.host.limits import Limit
from tests.cases import cases
from tests.host.held import nothing_leaks
from tests.host.smaps import rss

PAGE = 4096
PAGES = 64
SIZE = PAGES * PAGE
MiB = 1 << 20


def blocks(fd: int) -> int:
    """Bytes of memory that a memfd has (st_blocks, in units of 512)."""
    return os.fstat(fd).st_blocks * 512


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pieces of four pages."""
    monkeypatch.setattr(module, "PIECE", 4 * PAGE)
    return 4 * PAGE


@settings(deadline=None, max_examples=cases(40, 500))
@given(
    pages=st.tuples(st.integers(0, PAGES - 1), st.integers(0, PAGES - 1)).map(sorted),
    write=st.booleans(),
    threads=st.integers(1, 5),
    shared=st.booleans(),
)
def test_exactly_the_pages_asked_for(pages: list[int], write: bool, threads: int, shared: bool) -> None:
    start, size = pages[0] * PAGE, (pages[1] + 1 - pages[0]) * PAGE
    with MemFd("populate", SIZE, seals=F_SEAL_SHRINK) as memfd:
        os.pwrite(memfd.fd, b"kept", start)
        with Mapping(memfd, SIZE, shared=shared, align="2M") as mapping:
            mapping.populate(start, size, write=write, threads=threads)
            assert rss(mapping.hva) == size
            assert mapping.read(start, 4) == b"kept"
            assert blocks(memfd.fd) == size  # a private copy takes the file's page too


def test_private_pages_are_copies() -> None:
    with Mapping(None, SIZE, shared=False, prot=7) as mapping:  # whose entry in smaps nobody shares
        mapping.populate(write=False)  # the page of zeros, which nobody counts
        assert rss(mapping.hva) == 0
        mapping.populate(0, SIZE // 2)
        assert rss(mapping.hva) == SIZE // 2


def test_progress(small: int) -> None:
    for threads in (1, 3):
        with MemFd("progress", SIZE) as memfd, Mapping(memfd, SIZE) as mapping:
            told: list[tuple[int, int]] = []
            who = set()

            def progress(done: int, total: int, told: list[tuple[int, int]] = told, who: set[int] = who) -> None:
                told.append((done, total))
                who.add(threading.get_ident())

            mapping.populate(threads=threads, progress=progress)
            assert told == [(done, SIZE) for done in range(small, SIZE + 1, small)]
            assert who == {threading.get_ident()}
            assert blocks(memfd.fd) == SIZE
            del told[:]
            mapping.populate(PAGE, 5 * PAGE, threads=threads, progress=progress)
            assert sorted(told) in ([(4 * PAGE, 5 * PAGE), (5 * PAGE,) * 2], [(PAGE, 5 * PAGE), (5 * PAGE,) * 2])


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("error", [RuntimeError("enough"), KeyboardInterrupt(), StopIteration(), GeneratorExit()])
def test_what_progress_raises_stops_the_work(small: int, threads: int, error: BaseException) -> None:
    with nothing_leaks(), MemFd("stop", 1 << 30) as memfd, Mapping(memfd, 1 << 30) as mapping:
        tasks = len(os.listdir("/proc/self/task"))

        def progress(done: int, total: int) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            mapping.populate(threads=threads, progress=progress)
        assert caught.value is error
        assert threading.active_count() == 1
        assert len(os.listdir("/proc/self/task")) <= tasks + threads  # a thread leaves /proc a little later
        stopped = blocks(memfd.fd)
        assert small <= stopped < 1 << 30
        assert blocks(memfd.fd) == stopped


def populate_for_ever(mapping: Mapping, threads: int) -> None:
    while True:
        mapping.populate(threads=threads)
        mapping.discard(0)


def test_ctrl_c_stops_it() -> None:
    # Not from progress: a signal comes while the threads work.
    with MemFd("ctrl-c", 1 << 30) as memfd, Mapping(memfd, 1 << 30) as mapping:
        for threads in (1, 2):
            main = threading.main_thread().ident
            timer = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                populate_for_ever(mapping, threads)
            timer.join()
            assert threading.active_count() == 1
            assert blocks(memfd.fd) <= 1 << 30
            mapping.discard(0)


def refusal(use: Callable[[], object]) -> Exception | None:
    try:
        use()
    except Exception as error:  # noqa: BLE001
        return error
    return None


def test_it_cannot_be_closed_meanwhile(small: int) -> None:
    with MemFd("close", SIZE) as memfd:
        mapping = Mapping(memfd, SIZE)
        seen: list[type] = []

        def progress(done: int, total: int) -> None:
            seen.append(type(refusal(mapping.close)))

        mapping.populate(progress=progress)
        assert set(seen) == {BusyError}
        mapping.close()
        with pytest.raises(ClosedError):
            mapping.populate()


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("offset", {"offset": 1}),
        ("offset", {"offset": -PAGE}),
        ("offset", {"offset": 1 << 64}),
        ("size", {"size": 0}),
        ("size", {"size": -PAGE}),
        ("size", {"size": SIZE + PAGE}),
        ("size", {"offset": PAGE, "size": (1 << 64) - PAGE}),
        ("size", {"size": PAGE + 1}),
        ("threads", {"threads": 0}),
        ("threads", {"threads": -1}),
        ("threads", {"threads": 257}),
        ("threads", {"threads": 1 << 64}),
    ],
)
def test_arguments_refused(field: str, arguments: dict[str, int]) -> None:
    with Mapping(None, SIZE, shared=False, prot=7) as mapping:
        with pytest.raises(ArgumentError) as caught:
            mapping.populate(**arguments)
        assert (caught.value.call, caught.value.field) == ("Mapping.populate", field)
        assert rss(mapping.hva) == 0


def test_types_refused() -> None:
    with Mapping(None, SIZE) as mapping:
        for arguments in ({"threads": "2"}, {"threads": True}, {"progress": 5}, {"offset": "0"}, {"size": 4096.0}):
            with pytest.raises(ArgumentTypeError):
                mapping.populate(**arguments)


def test_protection_is_looked_at_first() -> None:
    with MemFd("ro", SIZE) as memfd, Mapping(memfd, SIZE) as mapping:
        mapping.protect(SIZE // 2, PAGE, PROT_READ)
        with pytest.raises(ArgumentError, match=f"offset {SIZE // 2:#x} is not mapped with PROT_WRITE"):
            mapping.populate()
        mapping.populate(write=False)
        mapping.protect(0, PAGE, PROT_NONE)
        with pytest.raises(ArgumentError, match="PROT_READ"):
            mapping.populate(write=False)
        mapping.protect(0, PAGE, PROT_WRITE)
        mapping.populate(0, PAGE)


def test_past_the_end_of_the_file() -> None:
    with MemFd("short", PAGE) as memfd, Mapping(memfd, SIZE) as mapping:
        for threads in (1, 3):
            with pytest.raises(HostError, match="past the end") as caught:
                mapping.populate(threads=threads)
            assert caught.value.errno == errno.EFAULT
        mapping.populate(0, PAGE)


# Limits


def test_more_than_the_host_has_is_refused_before_it_kills() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * PAGE
    swap = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("SwapTotal"))
    size = 2 * (total + int(swap.split()[1]) * 1024) & -PAGE
    with MemFd("too much", size) as memfd, Mapping(memfd, size) as mapping:
        for threads in (1, 2):
            with pytest.raises(HostError, match="MemAvailable") as caught:
                mapping.populate(threads=threads)
            assert (caught.value.errno, caught.value.call) == (errno.ENOMEM, "Mapping.populate")
            assert (caught.value.field, caught.value.value) == ("size", size)
        assert blocks(memfd.fd) == 0
        mapping.populate(size // 2 & -PAGE, 16 * PAGE)  # what fits is done
        assert blocks(memfd.fd) == 16 * PAGE


@pytest.mark.parametrize("kind", ["shared", "private", "anonymous shared", "anonymous"])
def test_only_what_is_missing_counts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # 16 MiB, of which 12 have memory: the other 4, and the page tables of these, are what it takes.
    size, done = 16 * MiB, 12 * MiB
    shared = "shared" in kind
    room = [0]
    monkeypatch.setattr(module, "limits", lambda: (Limit("the test", room[0]),))
    times = 2 if kind == "private" else 1  # the file's page, and the copy of it
    with MemFd("part", size) as memfd, Mapping(None if "anonymous" in kind else memfd, size, shared=shared) as mapping:
        room[0] = times * (done + done // 512)
        mapping.populate(0, done)
        rest = times * (size - done)
        room[0] = rest
        with pytest.raises(HostError, match=f"{rest} bytes of it have no memory yet; .*the test") as caught:
            mapping.populate()
        assert caught.value.errno == errno.ENOMEM
        room[0] = rest + rest // 512
        mapping.populate()
        room[0] = 0
        mapping.populate()
        if not shared:
            mapping.advise("dontneed", 0, PAGE)
            with pytest.raises(HostError, match="4096 bytes of it"):
                mapping.populate()
            mapping.populate(write=False)  # the file's page, or that of zeros, which are there


def test_the_page_of_zeros_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with Mapping(None, SIZE, shared=False) as mapping:
        mapping.populate(write=False)
        monkeypatch.setattr(module, "limits", lambda: (Limit("the test", SIZE // 2),))
        mapping.populate(write=False)
        with pytest.raises(HostError, match=f"{SIZE} bytes of it"):
            mapping.populate()


def test_pages_shared_with_a_child_are_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    with Mapping(None, SIZE, shared=False) as mapping:
        mapping.populate()
        wake, hold = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(hold)
            os.read(wake, 1)
            os._exit(0)
        os.close(wake)
        monkeypatch.setattr(module, "limits", lambda: (Limit("the test", SIZE // 2),))
        try:
            with pytest.raises(HostError, match=f"{SIZE} bytes of it"):
                mapping.populate()
        finally:
            os.close(hold)
            os.waitpid(child, 0)
        mapping.populate()


def test_files_on_a_disk_are_not_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Their pages can be written back and dropped; private copies of them cannot.
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    fd = os.open(path, os.O_RDWR)
    try:
        monkeypatch.setattr(module, "limits", lambda: (Limit("the test", 0),))
        from hvmodel._ffi import lib

        if lib.hv_get_seals(fd) >= 0:
            pytest.skip("the temporary directory is on tmpfs")
        with Mapping(fd, SIZE) as mapping:
            mapping.populate()
        with Mapping(fd, SIZE, shared=False) as mapping:
            mapping.populate(write=False)
            with pytest.raises(HostError, match="the test"):
                mapping.populate()
    finally:
        os.close(fd)


def test_the_size_of_a_piece() -> None:
    told: list[tuple[int, int]] = []
    with MemFd("piece", SIZE) as memfd, Mapping(memfd, SIZE) as mapping:
        mapping.populate(0, 5 * PAGE, piece=2 * PAGE, progress=lambda done, total: told.append((done, total)))
        assert [done for done, _ in told] == [2 * PAGE, 4 * PAGE, 5 * PAGE]
        for piece in (0, -PAGE, 1, PAGE + 1):
            with pytest.raises(ArgumentError) as caught:
                mapping.populate(piece=piece)
            assert caught.value.field == "piece"
