"""userfaultfd: who touches waits and is answered, or is told; nobody waits for ever, and nothing is left behind.

What the kernel has of it is read from /proc/self/fdinfo (features) and /proc/self/smaps (VmFlags um, uw, ui).
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvmodel._ffi import ffi, lib
from hvmodel.errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, ForkedError, HostError, HvError
from hvmodel.host import F_SEAL_GROW, F_SEAL_SHRINK, F_SEAL_WRITE, PROT_READ, Mapping, MemFd, ViewError, userfaultfd
from hvmodel.host.faults import Fault, FaultCounts, features
from hvmodel.host.registered import Registration, _runs
from hvmodel.host.userfaultfd import UserFaultFd
from tests.cases import cases
from tests.host.held import fds, maps
from tests.need import need

PAGE = 4096
SIZE = 16 * PAGE
SEALS = F_SEAL_SHRINK | F_SEAL_GROW
ROOT = Path(__file__).parents[2]
# Whether the kernel guards pages of shared memory (MADV_GUARD_INSTALL); before, what is given up is made PROT_NONE.
GUARDS = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 15)
PATIENCE = 0.05  # of tests in which a fault is to be given up


@pytest.fixture(autouse=True)
def _needs():
    # Nothing is collected here, which would take longer than the tests: nothing may be left open even so.
    need("userfaultfd")
    before = fds(), len(os.listdir("/proc/self/task"))
    yield
    for _ in range(1000):  # a thread leaves /proc a little after it was joined
        after = fds(), len(os.listdir("/proc/self/task"))
        if after[0] == before[0] and after[1] <= before[1]:  # fewer, where a thread of the test before was leaving
            break
        time.sleep(0.01)
    assert after[0] == before[0]
    assert after[1] <= before[1]
    assert not maps("uffd")


@pytest.fixture(params=["memfd", "private memfd", "anonymous", "private anonymous"])
def memory(request):
    """Mappings of each kind, without a page."""
    shared = "private" not in request.param
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(MemFd("uffd", SIZE, seals=SEALS)) if "memfd" in request.param else None
        yield stack.enter_context(Mapping(source, SIZE, shared=shared))


@pytest.fixture
def memfd():
    with MemFd("uffd", SIZE, seals=SEALS) as memfd:
        yield memfd


@pytest.fixture
def mapping(memfd):
    with Mapping(memfd, SIZE) as mapping:
        yield mapping


@pytest.fixture
def uffd(mapping):  # made after the mapping, closed before it
    with UserFaultFd() as uffd:
        yield uffd


def number(page: int) -> bytes:
    """Contents that tell their page."""
    return b"%08x" % page * (PAGE // 8)


def vm_flags(address: int) -> set[str]:
    """The flags of the mapping at `address`, from smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if m := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(m[1], 16) <= address < int(m[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError(f"nothing is mapped at {address:#x}")


def fdinfo(fd: int) -> dict[str, str]:
    return dict(line.split(":\t") for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines() if ":\t" in line)


class Waiter(threading.Thread):
    """Does something in a thread; `result` is what came out, or the error."""

    def __init__(self, call, *args):
        super().__init__(daemon=True)
        self.call, self.args, self.result = call, args, None
        self.start()

    def run(self):
        try:
            self.result = self.call(*self.args)
        except Exception as error:  # noqa: BLE001
            self.result = error

    def get(self):
        self.join(30)
        assert not self.is_alive(), "it hangs"
        return self.result


def waiting(uffd: UserFaultFd, nr: int = 1) -> None:
    """Until the kernel has told of `nr` faults."""
    for _ in range(3000):
        counts = uffd.counts
        if counts.missing + counts.minor + counts.wp >= nr:
            return
        time.sleep(0.01)
    pytest.fail(f"no {nr} faults came: {uffd.counts}")


# ---- what the kernel has of it ----


def test_features_are_the_kernels(uffd: UserFaultFd) -> None:
    # UFFD_FEATURE_* by bit, from include/uapi/linux/userfaultfd.h: bit 5 is MISSING_SHMEM, 10 MINOR_SHMEM.
    told = int(fdinfo(uffd.fd)["API"].split(":")[1], 16)
    assert uffd.features
    assert set(uffd.features) <= set(features())
    assert ("MISSING_SHMEM" in uffd.features, "MINOR_SHMEM" in uffd.features) == (bool(told & 32), bool(told & 1024))
    assert not {name for name in uffd.features if name.startswith("EVENT_")}
    assert not told & 0x4E  # EVENT_FORK, _REMAP, _REMOVE, _UNMAP
    assert os.readlink(f"/proc/self/fd/{uffd.fd}") == "anon_inode:[userfaultfd]"


def test_each_feature_has_its_bit() -> None:
    for named, bit in (({}, 0), ({"sigbus": True}, 7), ({"wp_async": True}, 15)):
        with UserFaultFd(**named) as uffd:
            told = int(fdinfo(uffd.fd)["API"].split(":")[1], 16)
            assert [bool(told >> 7 & 1), bool(told >> 15 & 1)] == [bit == 7, bit == 15]


@pytest.mark.parametrize(
    ("modes", "flags"),
    [("missing", {"um"}), ("minor", {"ui"}), ("wp", {"uw"}), (("wp", "missing"), {"um", "uw"}), (["minor"], {"ui"})],
)
def test_modes_are_in_smaps(mapping: Mapping, uffd: UserFaultFd, modes: object, flags: set[str]) -> None:
    all_flags = {"um", "uw", "ui"}
    made = uffd.register(mapping, PAGE, 2 * PAGE, modes)
    assert uffd.registrations == (made,)
    assert (made.mapping, made.offset, made.size) == (mapping, PAGE, 2 * PAGE)
    assert set(made.modes) == ({modes} if isinstance(modes, str) else set(modes))
    assert [vm_flags(mapping.hva + n * PAGE) & all_flags for n in range(4)] == [set(), flags, flags, set()]
    uffd.unregister(mapping)
    assert not vm_flags(mapping.hva + PAGE) & all_flags
    assert uffd.registrations == ()


def test_the_ioctls_of_a_range(mapping: Mapping, uffd: UserFaultFd) -> None:
    # ioctl_userfaultfd(2): CONTINUE for minor ranges only, ZEROPAGE not for hugetlb, WRITEPROTECT for wp.
    assert {"WAKE", "COPY", "ZEROPAGE"} <= set(uffd.register(mapping, 0, PAGE).ioctls)
    assert "CONTINUE" in uffd.register(mapping, PAGE, PAGE, "minor").ioctls
    assert "WRITEPROTECT" in uffd.register(mapping, 2 * PAGE, PAGE, "wp").ioctls


# ---- a handler in Python, and the main thread that touches ----


def test_missing_pages_come_from_the_handler(memory: Mapping) -> None:
    asked = []

    def handler(fault: Fault) -> bytes:
        asked.append(fault)
        return number(fault.page // PAGE)

    with UserFaultFd() as uffd:
        uffd.register(memory)
        uffd.serve(handler)
        assert uffd.serving == "python"
        assert memory.read(3 * PAGE + 8, 8) == b"%08x" % 3
        memory.write(5 * PAGE + 16, b"W")
        assert memory.read(5 * PAGE + 8, 10) == b"00000005W0"
        assert memory.read(0, SIZE) == b"".join(
            number(n) if n != 5 else number(5)[:16] + b"W" + number(5)[17:] for n in range(16)
        )
        assert [(fault.page, fault.kind, fault.write, fault.thread) for fault in asked[:2]] == [
            (3 * PAGE, "missing", False, threading.get_native_id()),
            (5 * PAGE, "missing", True, threading.get_native_id()),
        ]
        assert asked[0].offset in (3 * PAGE, 3 * PAGE + 8)  # process_vm_readv pins the page
        assert sorted(fault.page // PAGE for fault in asked) == list(range(16))  # each page once
        assert uffd.counts == FaultCounts(16, 0, 0, 0)
        uffd.stop()
        assert uffd.serving == ""


def test_the_handler_runs_while_the_main_thread_waits() -> None:
    # In a process of its own: with the lock held, or a memcpy there, this would wait for ever.
    code = """
        from hvmodel.host import MemFd, Mapping, UserFaultFd
        with MemFd("m", "64K", seals=6) as memfd, Mapping(memfd, "64K") as mapping, UserFaultFd() as uffd:
            uffd.register(mapping, mode="missing")
            def handler(fault):
                n = sum(range(100000))  # takes the GIL, and longer than its switch interval
                return bytes([fault.page >> 12]) * 4096
            uffd.serve(handler)
            print(mapping.read(0x2000, 1), end=" ")
            mapping.write(0x3001, b"x")
            print(mapping.read(0x3000, 2))
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("b'\\x02' b'\\x03x'\n", "")


def test_minor_faults_are_continued(memfd: MemFd, mapping: Mapping, uffd: UserFaultFd) -> None:
    os.pwrite(memfd.fd, b"of the file", PAGE)
    uffd.register(mapping, mode="minor")
    kinds = []

    def handler(fault: Fault) -> None:
        kinds.append((fault.kind, fault.page))
        os.pwrite(memfd.fd, b"OF", PAGE)  # what is continued is the file's page as it is then
        uffd.continue_(fault.mapping, fault.page, PAGE)

    uffd.serve(handler)
    assert mapping.read(PAGE, 11) == b"OF the file"
    assert mapping.read(PAGE, 11) == b"OF the file"
    assert kinds == [("minor", PAGE)]
    assert mapping.read(2 * PAGE, 1) == b"\0"  # a page that the file does not have is no minor fault
    uffd.stop()


def test_writes_to_protected_pages_wait(memory: Mapping) -> None:
    memory.write(0, number(0))
    asked = []

    def handler(fault: Fault) -> None:
        asked.append((fault.kind, fault.page, fault.write))
        uffd.writeprotect(fault.mapping, fault.page, PAGE, protect=False)

    with UserFaultFd() as uffd:
        uffd.register(memory, mode="wp")
        uffd.writeprotect(memory, 0, 2 * PAGE)
        uffd.serve(handler)
        assert memory.read(0, 8) == b"00000000"  # reading is free
        memory.write(1, b"w")
        memory.write(2, b"w")  # lifted
        memory.write(PAGE, b"w")  # was not there when it was protected
        memory.write(2 * PAGE, b"w")  # never protected
        assert memory.read(0, 4) == b"0ww0"
        assert asked == [("wp", 0, True), ("wp", PAGE, True)]
        uffd.stop()


def test_who_answers_may_be_another_thread(mapping: Mapping, uffd: UserFaultFd) -> None:
    uffd.register(mapping)
    reader = Waiter(mapping.read, 0, 8)
    fault = uffd.read(10)
    assert fault is not None
    assert (fault.mapping, fault.page, fault.kind) == (mapping, 0, "missing")
    uffd.copy(mapping, 0, number(7), wake=False)
    assert reader.is_alive()
    uffd.wake(mapping, 0, PAGE)
    assert reader.get() == b"%08x" % 7


def test_several_pages_in_one_answer(mapping: Mapping, uffd: UserFaultFd) -> None:
    uffd.register(mapping)
    mapping.source  # noqa: B018
    uffd.copy(mapping, 2 * PAGE, number(99))  # there before
    asked = []

    def handler(fault: Fault) -> bytes:
        asked.append(fault.page)
        return b"".join(number(n) for n in range(fault.page // PAGE, 4))

    uffd.serve(handler)
    assert mapping.read(0, 4 * PAGE) == number(0) + number(1) + number(99) + number(3)
    assert asked == [0]
    uffd.stop()


def test_many_threads_and_one_handler(memory: Mapping) -> None:
    with UserFaultFd() as uffd:
        uffd.register(memory)
        uffd.serve(lambda fault: number(fault.page // PAGE))
        readers = [Waiter(memory.read, n % 16 * PAGE, 8) for n in range(cases(32, 400))]
        assert [reader.get() for reader in readers] == [b"%08x" % (n % 16) for n in range(len(readers))]
        uffd.stop()


# ---- the handler in C ----


def test_zeros(memory: Mapping) -> None:
    with UserFaultFd() as uffd:
        uffd.register(memory)
        uffd.serve_native()
        assert uffd.serving == "native"
        assert memory.read(0, 2 * PAGE) == bytes(2 * PAGE)
        memory.write(4 * PAGE, b"written")
        assert memory.read(4 * PAGE, 8) == b"written\0"
        assert uffd.counts == FaultCounts(3, 0, 0, 0)


@pytest.mark.parametrize("source", ["mapping", "memfd", "fd"])
@pytest.mark.parametrize("pages", [14, 18])
def test_bytes_from_elsewhere(memory: Mapping, source: str, pages: int, tmp_path: Path) -> None:
    data = b"".join(number(n) for n in range(pages))
    expected = data[PAGE:][:SIZE].ljust(SIZE, b"\0")  # from the second page on; zeros where the source ends
    with contextlib.ExitStack() as stack:
        uffd = stack.enter_context(UserFaultFd())
        file = stack.enter_context(MemFd("source", pages * PAGE, seals=SEALS))
        os.pwrite(file.fd, data, 0)
        other = stack.enter_context(Mapping(file, pages * PAGE))
        path = tmp_path / "data"
        path.write_bytes(data)
        opened = stack.enter_context(path.open("rb"))
        uffd.register(memory, PAGE, SIZE - PAGE)
        uffd.serve_native({"mapping": other, "memfd": file, "fd": opened.fileno()}[source], offset=PAGE)
        if source == "mapping":
            with pytest.raises(BusyError, match="source of UserFaultFd"):
                other.close()
        else:
            opened.close()  # it has a descriptor of its own
        assert memory.read(PAGE, SIZE - PAGE) == expected[PAGE:]
        assert uffd.counts == FaultCounts(15, 0, 0, 0)
        uffd.stop()
        other.close()


def test_a_source_of_odd_length(memory: Mapping, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"A" * (PAGE + 5))
    with path.open("rb") as file, UserFaultFd() as uffd:
        uffd.register(memory)
        uffd.serve_native(file.fileno(), offset=3)
        assert memory.read(0, 3 * PAGE) == b"A" * (PAGE + 2) + bytes(2 * PAGE - 2)


def test_native_minor_and_written(memfd: MemFd, mapping: Mapping, uffd: UserFaultFd) -> None:
    for n in range(16):
        os.pwrite(memfd.fd, number(n), n * PAGE)
    uffd.register(mapping, mode=["minor", "wp"])
    uffd.writeprotect(mapping)
    uffd.serve_native()
    assert mapping.read(0, SIZE) == b"".join(number(n) for n in range(16))
    assert uffd.take_written(mapping) == []
    for n in (3, 4, 9):
        mapping.write(n * PAGE, b"x")
    assert uffd.take_written(mapping) == [range(3, 5), range(9, 10)]
    assert uffd.take_written(mapping) == []
    mapping.write(4 * PAGE, b"y")  # protected again by the first call
    assert uffd.take_written(mapping, protect=False) == [range(4, 5)]
    mapping.write(4 * PAGE, b"z")
    assert uffd.take_written(mapping) == []


def test_pages_that_come_in_are_protected_where_writes_are_noted(mapping: Mapping, uffd: UserFaultFd) -> None:
    uffd.register(mapping, mode=["missing", "wp"])
    uffd.serve_native()
    mapping.read(0, 4 * PAGE)
    assert uffd.take_written(mapping) == []
    mapping.write(2 * PAGE, b"x")
    mapping.write(7 * PAGE, b"x")  # missing, comes in, is written
    assert uffd.take_written(mapping) == [range(2, 3), range(7, 8)]


@pytest.mark.parametrize("mode", ["wp", "wp-async"])
def test_what_was_written_is_what_take_written_says(mode: str) -> None:
    pages = 128

    @given(st.lists(st.sets(st.integers(0, pages - 1), max_size=12), max_size=4))
    @settings(max_examples=cases(15, 200), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def check(rounds: list[set[int]]) -> None:
        with (
            MemFd("written", pages * PAGE, seals=SEALS) as memfd,
            Mapping(memfd, pages * PAGE) as mapping,
            UserFaultFd(wp_async=mode == "wp-async") as uffd,
        ):
            uffd.register(mapping, mode=mode)
            uffd.writeprotect(mapping)
            if mode == "wp":
                uffd.serve_native()
            for chosen in rounds:
                for page in chosen:
                    mapping.write(page * PAGE + page, b"x")
                told = uffd.take_written(mapping)
                assert {page for run in told for page in run} == chosen
                assert all(a.stop < b.start for a, b in pairwise(told))

    check()


def test_wp_async_waits_for_nobody_and_leaves_views_alone(mapping: Mapping) -> None:
    with UserFaultFd(wp_async=True) as uffd, mapping.writable(0, SIZE) as window:
        uffd.register(mapping, mode="wp-async")
        assert vm_flags(mapping.hva) & {"um", "uw", "ui"} == {"uw"}
        uffd.writeprotect(mapping)
        window[5 * PAGE] = 1
        window[6 * PAGE] = 1
        assert uffd.take_written(mapping) == [range(5, 7)]
        assert uffd.take_written(mapping, 0, PAGE) == []
        window[5 * PAGE] = 2
        assert uffd.take_written(mapping, 4 * PAGE, 2 * PAGE) == [range(5, 6)]
        assert uffd.counts == FaultCounts(0, 0, 0, 0)


def test_what_the_thread_cannot_read_is_given_up(mapping: Mapping, uffd: UserFaultFd) -> None:
    with MemFd("gone", SIZE) as source:
        uffd.register(mapping)
        with Mapping(source, SIZE) as other:
            uffd.serve_native(other)
            os.ftruncate(source.fd, PAGE)
            assert mapping.read(0, 1) == b"\0"
            with pytest.raises(HostError) as caught:
                mapping.read(4 * PAGE, 1)
            assert caught.value.errno == errno.EFAULT
            assert uffd.counts.given_up == 1
            uffd.stop()


def test_stop_and_serve_again(mapping: Mapping, uffd: UserFaultFd) -> None:
    uffd.register(mapping)
    for n in range(4):
        for start in (uffd.serve_native, lambda: uffd.serve(lambda fault: bytes(PAGE))):
            start()
            assert mapping.read(n * PAGE, 1) == b"\0"
            uffd.stop()
            uffd.stop()
    reader = Waiter(mapping.read, 8 * PAGE, 1)
    waiting(uffd, 5)
    uffd.serve_native()  # what waits since before is answered too
    assert reader.get() == b"\0"


# ---- views ----


@pytest.mark.parametrize("mode", ["missing", "minor", "wp"])
def test_a_range_that_is_handed_out_is_refused(mapping: Mapping, uffd: UserFaultFd, mode: str) -> None:
    view = mapping.view(3 * PAGE, 8)
    for offset, size in ((0, SIZE), (3 * PAGE, PAGE)):
        with pytest.raises(ViewError):
            uffd.register(mapping, offset, size, mode)
    assert uffd.registrations == ()
    uffd.register(mapping, 4 * PAGE, None, mode)
    view.release()
    del view
    uffd.register(mapping, 0, 4 * PAGE, mode)
    with pytest.raises(ViewError, match="registered with UserFaultFd"):
        mapping.view(3 * PAGE, 8)
    with pytest.raises(ViewError), mapping.writable(5 * PAGE, 1):
        pass
    uffd.unregister(mapping, 4 * PAGE)
    assert bytes(mapping.view(4 * PAGE, 1)) == b"\0"
    with pytest.raises(ViewError):
        mapping.view()
    uffd.close()
    assert bytes(mapping.view()) == bytes(SIZE)


def test_a_registered_mapping_stays_open(mapping: Mapping, uffd: UserFaultFd) -> None:
    uffd.register(mapping)
    with pytest.raises(BusyError, match="registered with UserFaultFd"):
        mapping.close()
    uffd.unregister(mapping)
    mapping.close()
    with pytest.raises(ClosedError):
        uffd.register(mapping)


# ---- nobody waits for ever ----


def test_a_fault_that_nobody_takes_is_given_up(memory: Mapping) -> None:
    with UserFaultFd(patience=PATIENCE) as uffd:
        uffd.register(memory)
        for access in (lambda: memory.read(PAGE, 8), lambda: memory.write(PAGE, b"x")):
            with pytest.raises(HostError) as caught:
                access()
            assert (caught.value.errno, caught.value.value) == (errno.EFAULT, PAGE)
            assert "UserFaultFd" in str(caught.value)
        assert uffd.counts.given_up == 1  # the second finds the page guarded
        if GUARDS:
            uffd.copy(memory, PAGE, number(3))  # contents may come all the same
            assert memory.read(PAGE, 8) == b"%08x" % 3
        with pytest.raises(HostError):
            memory.read(2 * PAGE, 1)
    with pytest.raises(ViewError, match="guard_remove" if GUARDS else "given up"):
        memory.view(2 * PAGE, 1)
    assert bytes(memory.view(3 * PAGE, 4)) == bytes(4)
    if GUARDS:
        assert bytes(memory.view(PAGE, 8)) == b"%08x" % 3  # it came in after all
    with pytest.raises(HostError):
        memory.read(2 * PAGE, 1)
    if not GUARDS:
        return
    memory.advise("guard_remove", 2 * PAGE, PAGE)
    assert bytes(memory.view()) == bytes(PAGE) + number(3) + bytes(14 * PAGE)


def test_a_page_that_is_there_is_not_given_up(mapping: Mapping) -> None:
    # Who answers while the fault lies in the queue has answered it; giving up what is there would lose it.
    with UserFaultFd(patience=None) as uffd:
        uffd.register(mapping)
        reader = Waiter(mapping.read, 0, 8)
        waiting(uffd)
        fault = ffi.new("struct hv_fault *", {"address": mapping.hva})
        uffd.copy(mapping, 0, number(4))
        assert reader.get() == b"%08x" % 4
        assert lib.hv_uffd_give_up(uffd._state.native, fault) == 0
        assert mapping.read(0, 8) == b"%08x" % 4


def test_a_minor_fault_that_nobody_takes(memfd: MemFd, mapping: Mapping) -> None:
    os.pwrite(memfd.fd, b"there", 0)
    with UserFaultFd(patience=PATIENCE) as uffd:
        uffd.register(mapping, mode="minor")
        with pytest.raises(HostError):
            mapping.read(0, 5)
        if GUARDS:
            uffd.continue_(mapping, 0, PAGE)
            assert mapping.read(0, 5) == b"there"


def test_a_write_that_nobody_takes_goes_through_and_counts(mapping: Mapping) -> None:
    with UserFaultFd(patience=PATIENCE) as uffd:
        uffd.register(mapping, mode="wp")
        uffd.writeprotect(mapping)
        mapping.write(2 * PAGE, b"through")
        assert mapping.read(2 * PAGE, 7) == b"through"
        assert uffd.counts == FaultCounts(0, 0, 1, 1)
        assert uffd.take_written(mapping) == [range(2, 3)]


def test_patience_can_be_changed(mapping: Mapping, uffd: UserFaultFd) -> None:
    uffd.patience = None
    uffd.register(mapping)
    reader = Waiter(mapping.read, 0, 1)
    waiting(uffd)
    assert uffd.patience is None
    uffd.patience = PATIENCE
    error = reader.get()
    assert isinstance(error, HostError)
    assert error.errno == errno.EFAULT


class Boom(Exception):
    pass


def boom(_fault: Fault) -> bytes:
    raise Boom


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        (boom, Boom),
        (lambda _: None, HvError),
        (lambda _: b"short", ArgumentError),
        (lambda _: b"", ArgumentError),
        (lambda _: "text", TypeError),
        (lambda _: 5, TypeError),
        (lambda _: bytes(SIZE), ArgumentError),  # beyond the registered range
        (lambda: b"", TypeError),
    ],
)
def test_a_handler_that_does_not_answer(mapping: Mapping, handler: object, error: type) -> None:
    with UserFaultFd() as uffd:
        uffd.register(mapping, 0, 8 * PAGE)
        uffd.serve(handler)
        for page in (0, 3):
            with pytest.raises(HostError) as caught:
                mapping.read(page * PAGE, 8)
            assert caught.value.errno == errno.EFAULT
        with pytest.raises(error):
            uffd.stop()
        uffd.stop()  # raised once
        assert uffd.counts == FaultCounts(2, 0, 0, 2)


def test_bytes_do_not_answer_a_write_fault(mapping: Mapping) -> None:
    uffd = UserFaultFd()
    uffd.register(mapping, mode="wp")
    uffd.writeprotect(mapping)
    uffd.serve(lambda fault: bytes(PAGE))
    mapping.write(0, b"let through")
    with pytest.raises(ArgumentError, match="writeprotect"):
        uffd.close()
    assert uffd.closed
    assert mapping.read(0, 11) == b"let through"


def test_the_error_of_a_with_body_wins(mapping: Mapping) -> None:
    def body() -> None:
        with UserFaultFd() as uffd:
            uffd.register(mapping)
            uffd.serve(boom)
            mapping.read(0, 1)

    with pytest.raises(HostError):
        body()


def test_a_handler_that_waits_for_itself(mapping: Mapping, uffd: UserFaultFd) -> None:
    seen = []

    def handler(fault: Fault) -> bytes:
        try:
            mapping.read(fault.page + PAGE, 1)
        except HostError as error:
            seen.append(error.errno)
        return number(1)

    uffd.register(mapping)
    uffd.serve(handler)
    assert mapping.read(0, 8) == b"%08x" % 1
    uffd.stop()
    assert seen == [errno.EFAULT]


@pytest.mark.parametrize("how", ["close", "unregister"])
@pytest.mark.parametrize("mode", ["missing", "minor", "wp"])
@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("forked", [False, True])
def test_those_who_wait_go_on(how: str, mode: str, taken: bool, forked: bool) -> None:
    # With a child that has the descriptor too, closing ours is not the last close.
    child = 0
    with (
        MemFd("wait", SIZE, seals=SEALS) as memfd,
        Mapping(memfd, SIZE) as mapping,
        UserFaultFd(patience=None) as uffd,
    ):
        if mode == "minor":
            os.pwrite(memfd.fd, bytes(SIZE), 0)
        uffd.register(mapping, mode=mode)
        if mode == "wp":
            uffd.writeprotect(mapping)
        if forked:
            child = os.fork()
            if not child:
                time.sleep(60)
                os._exit(0)
        try:
            waiters = [Waiter(mapping.write, n * PAGE, b"x") for n in range(4)]
            waiting(uffd, 4)
            if taken:
                assert [uffd.read(10).kind for _ in range(4)] == [mode] * 4
            assert all(waiter.is_alive() for waiter in waiters)
            uffd.close() if how == "close" else uffd.unregister(mapping)
            assert [waiter.get() for waiter in waiters] == [None] * 4
            assert mapping.read(0, SIZE) == (b"x".ljust(PAGE, b"\0") * 4).ljust(SIZE, b"\0")
            if how == "unregister":
                assert uffd.read(0) is None  # none of them is left in the queue
        finally:
            if child:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def test_close_while_the_handler_is_at_a_fault(mapping: Mapping) -> None:
    come, go = threading.Event(), threading.Event()

    def handler(fault: Fault) -> bytes:
        come.set()
        go.wait(30)
        return bytes(PAGE)

    uffd = UserFaultFd()
    uffd.register(mapping)
    uffd.serve(handler)
    reader = Waiter(mapping.read, 0, 1)
    assert come.wait(30)
    closer = Waiter(uffd.close)
    assert reader.get() == b"\0"  # before the handler comes back
    go.set()
    assert closer.get() is None
    assert uffd.closed


def test_a_handler_may_close(mapping: Mapping) -> None:
    uffd = UserFaultFd()
    uffd.register(mapping)
    uffd.serve(lambda fault: uffd.close())
    assert mapping.read(0, 1) == b"\0"
    for _ in range(1000):
        if threading.active_count() == 1:
            break
        time.sleep(0.01)
    assert uffd.closed


def test_a_handler_may_stop_and_unregister(mapping: Mapping, uffd: UserFaultFd) -> None:
    uffd.register(mapping)

    def handler(fault: Fault) -> None:
        uffd.stop()
        uffd.unregister(mapping)

    uffd.serve(handler)
    assert mapping.read(0, 1) == b"\0"  # woken in the middle of `unregister`
    for _ in range(1000):
        if not uffd.registrations:
            break
        time.sleep(0.01)
    assert uffd.registrations == ()


def test_a_handler_that_is_late_is_not_called_again(
    mapping: Mapping, uffd: UserFaultFd, monkeypatch: pytest.MonkeyPatch
) -> None:
    uffd.register(mapping)
    go = threading.Event()
    asked: list[int] = []

    def late(fault: Fault) -> bytes:
        asked.append(fault.page)
        go.wait()
        return bytes(PAGE)

    uffd.serve(late)
    reader = Waiter(mapping.read, 0, 1)
    while not asked:
        time.sleep(0.01)
    monkeypatch.setattr(userfaultfd, "_JOIN_TIMEOUT", 0.05)
    with pytest.raises(BusyError, match="has not come back"):
        uffd.stop()
    for start in (uffd.serve_native, lambda: uffd.serve(boom)):
        with pytest.raises(BusyError, match="has not come back"):
            start()
    go.set()
    assert reader.get() == b"\0"
    monkeypatch.undo()
    uffd.stop()
    uffd.serve(lambda fault: b"n" * PAGE)
    assert [mapping.read(n * PAGE, 1) for n in range(1, SIZE // PAGE)] == [b"n"] * (SIZE // PAGE - 1)
    assert asked == [0]


def test_the_interpreter_ends_with_threads_that_wait() -> None:
    code = """
        import threading, time
        from hvmodel.host import Mapping, UserFaultFd
        mapping = Mapping(None, "64K")
        uffd = UserFaultFd(patience={patience})
        uffd.register(mapping)
        {serve}
        def wait():
            try:
                print(mapping.read(0, 4))
            except OSError as error:
                print(error.errno)
        threading.Thread(target=wait, daemon={daemon}).start()
        while not uffd.counts.missing:
            time.sleep(0.01)
    """
    for serve, daemon, patience, out in (
        ("", False, 0.1, "14\n"),  # the thread is waited for: what it waits for is given up
        ("", True, None, ""),
        ("uffd.serve(lambda fault: time.sleep(0.1) or b'abcd' * 1024)", False, None, "b'abcd'\n"),
        ("uffd.serve_native()", False, None, "b'\\x00\\x00\\x00\\x00'\n"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code.format(serve=serve, daemon=daemon, patience=patience))],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == out or daemon


# ---- reading faults ----


def test_read_with_a_timeout(mapping: Mapping, uffd: UserFaultFd) -> None:
    uffd.register(mapping)
    assert uffd.read(0) is None
    assert uffd.read(0.05) is None
    assert select.select([uffd], [], [], 0)[0] == []
    readers = [Waiter(mapping.read, n * PAGE, 1) for n in range(3)]
    pages = set()
    for _ in range(3):
        assert select.select([uffd], [], [], 10)[0] == [uffd]
        pages.add(uffd.read(0).page)
    assert select.select([uffd], [], [], 0)[0] == []
    assert pages == {0, PAGE, 2 * PAGE}
    uffd.zeropage(mapping, 0, 3 * PAGE)
    assert [reader.get() for reader in readers] == [b"\0"] * 3


def test_closing_ends_read(uffd: UserFaultFd) -> None:
    readers = [Waiter(uffd.read), Waiter(uffd.read, 60)]
    time.sleep(0.05)
    uffd.close()
    assert all(isinstance(reader.get(), ClosedError) for reader in readers)


def test_a_signal_ends_read(uffd: UserFaultFd) -> None:
    def on_alarm(*_: object) -> None:
        raise Boom

    before = signal.signal(signal.SIGALRM, on_alarm)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Boom):
            uffd.read()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- other answers ----


def test_poison(mapping: Mapping, uffd: UserFaultFd) -> None:
    uffd.register(mapping)
    uffd.poison(mapping, PAGE, PAGE)
    uffd.serve_native()
    with pytest.raises(HostError) as caught:
        mapping.read(0, 3 * PAGE)
    assert (caught.value.errno, caught.value.value) == (errno.EFAULT, PAGE)
    with pytest.raises(HostError) as caught:
        uffd.poison(mapping, 0, PAGE)
    assert (caught.value.errno, caught.value.field) == (errno.EEXIST, "offset")


def test_poison_spares_what_is_handed_out(mapping: Mapping) -> None:
    with UserFaultFd(wp_async=True) as uffd:
        uffd.register(mapping, mode="wp-async")
        view = mapping.view(0, PAGE)
        with pytest.raises(ViewError):
            uffd.poison(mapping, 0, PAGE)
        assert bytes(view) == bytes(PAGE)
        view.release()


def test_copy_from_another_mapping(mapping: Mapping, uffd: UserFaultFd) -> None:
    with Mapping(None, SIZE) as other:
        other.write(0, b"".join(number(n) for n in range(16)))
        uffd.register(mapping)
        uffd.copy_from(mapping, 0, other, 3 * PAGE, 2 * PAGE)
        assert mapping.read(0, 2 * PAGE) == number(3) + number(4)
        uffd.unregister(mapping)
        with UserFaultFd() as foreign:
            foreign.register(other, 8 * PAGE, PAGE)
            uffd.register(mapping, PAGE * 8, PAGE)
            with pytest.raises(BusyError):
                uffd.copy_from(mapping, 8 * PAGE, other, 0, PAGE)
    assert other.closed


def test_move() -> None:
    if "MOVE" not in features():
        pytest.skip("needs UFFD_FEATURE_MOVE, Linux 6.8")
    with Mapping(None, SIZE, shared=False) as to, Mapping(None, SIZE, shared=False) as source, UserFaultFd() as uffd:
        source.write(0, number(1) + number(2))
        uffd.register(to)
        uffd.move(to, 4 * PAGE, source, 0, 2 * PAGE)
        assert to.read(4 * PAGE, 2 * PAGE) == number(1) + number(2)
        assert source.read(0, 2 * PAGE) == bytes(2 * PAGE)
        with pytest.raises(HostError) as caught:
            uffd.move(to, 0, source, 8 * PAGE, PAGE)  # a page that was never there
        assert (caught.value.errno, caught.value.field, caught.value.value) == (errno.ENOENT, "source_offset", None)
        uffd.move(to, 0, source, 8 * PAGE, PAGE, holes=True)
        with pytest.raises(ArgumentError, match="apart"):
            uffd.move(to, 0, to, 0, PAGE)


def test_sigbus_and_user_mode_only_fail_at_once(mapping: Mapping) -> None:
    for named in ({"sigbus": True}, {"user_mode_only": True}):
        with UserFaultFd(patience=None, **named) as uffd:
            uffd.register(mapping)
            with pytest.raises(HostError) as caught:
                mapping.read(0, 1)
            assert caught.value.errno == errno.EFAULT
            assert uffd.counts.missing == 0
            uffd.copy(mapping, 0, number(1))
            assert mapping.read(0, 8) == b"%08x" % 1
        mapping.discard(0, SIZE)


def test_what_is_brought_in_counts_as_written() -> None:
    told: list[tuple[int, int]] = []
    with (
        MemFd("told", SIZE, seals=SEALS) as memfd,
        Mapping(memfd, SIZE, written=lambda offset, size: told.append((offset, size))) as mapping,
        UserFaultFd() as uffd,
    ):
        uffd.register(mapping)
        uffd.copy(mapping, PAGE, number(0))
        uffd.zeropage(mapping, 3 * PAGE, PAGE)
        assert {(PAGE, PAGE), (3 * PAGE, PAGE)} <= set(told)
        told.clear()
        uffd.serve_native()
        mapping.read(6 * PAGE, 2 * PAGE)
        assert told == []
        uffd.stop()
        assert told == [(6 * PAGE, 2 * PAGE)]


# ---- refusals ----


def test_refused_registrations(mapping: Mapping, uffd: UserFaultFd) -> None:
    with pytest.raises(ArgumentTypeError, match="mapping"):
        uffd.register(mapping.hva)
    for offset, size, field in (
        (1, PAGE, "offset"),
        (-PAGE, PAGE, "offset"),
        (SIZE, None, "offset"),
        (1 << 64, PAGE, "offset"),
        (0, 0, "size"),
        (0, 5, "size"),
        (0, -PAGE, "size"),
        (PAGE, SIZE, "size"),
        (PAGE, (1 << 64) - PAGE, "size"),
    ):
        with pytest.raises(ArgumentError) as caught:
            uffd.register(mapping, offset, size)
        assert caught.value.field == field
    for mode in ("", "MISSING", [], "missing wp", ["missing", "no"], "wp-async", b"missing"):
        with pytest.raises(ArgumentError) as caught:
            uffd.register(mapping, mode=mode)
        assert caught.value.field == "mode"
    with pytest.raises(ArgumentTypeError):
        uffd.register(mapping, mode=3)
    with UserFaultFd(wp_async=True) as other, pytest.raises(ArgumentError, match="another one"):
        other.register(mapping, mode="wp")
    uffd.register(mapping, PAGE, PAGE)
    with pytest.raises(BusyError, match="unregister it first"):
        uffd.register(mapping)
    with UserFaultFd() as other, pytest.raises(HostError) as refused:
        other.register(mapping)
    assert (refused.value.errno, refused.value.call) == (errno.EBUSY, "ioctl(UFFDIO_REGISTER)")
    assert "another userfaultfd" in str(refused.value)
    mapping.view(0, PAGE)  # nothing is left of what was refused
    with pytest.raises(ArgumentError, match="0x1000, 0x2000"):
        uffd.unregister(mapping, 4 * PAGE)
    uffd.unregister(mapping)
    with pytest.raises(ArgumentError, match="nothing of this mapping"):
        uffd.unregister(mapping)
    mapping.view()


def test_a_part_of_a_registration_is_not_unregistered(mapping: Mapping, uffd: UserFaultFd) -> None:
    uffd.register(mapping, 0, 4 * PAGE)
    with pytest.raises(ArgumentError):
        uffd.unregister(mapping, PAGE, PAGE)
    assert len(uffd.registrations) == 1


def test_memory_that_a_mode_is_not_for(uffd: UserFaultFd, tmp_path: Path) -> None:
    with Mapping(None, SIZE, shared=False) as anonymous, pytest.raises(HostError) as caught:
        uffd.register(anonymous, mode="minor")
    assert (caught.value.errno, caught.value.field, caught.value.value) == (errno.EINVAL, "mode", "minor")
    with MemFd("sealed", SIZE, seals=SEALS | F_SEAL_WRITE) as sealed, Mapping(sealed, SIZE, prot=PROT_READ) as mapping:
        with pytest.raises(HostError) as caught:
            uffd.register(mapping)
        assert (caught.value.errno, caught.value.field) == (errno.EPERM, "mapping")
        mapping.view()


def test_refused_answers_say_where(mapping: Mapping, uffd: UserFaultFd) -> None:
    calls = {
        "copy": lambda offset, size: uffd.copy(mapping, offset, bytes(size) if 0 <= size <= SIZE else bytes(1)),
        "zeropage": lambda offset, size: uffd.zeropage(mapping, offset, size),
        "continue_": lambda offset, size: uffd.continue_(mapping, offset, size),
        "poison": lambda offset, size: uffd.poison(mapping, offset, size),
        "writeprotect": lambda offset, size: uffd.writeprotect(mapping, offset, size),
        "wake": lambda offset, size: uffd.wake(mapping, offset, size),
        "take_written": lambda offset, size: uffd.take_written(mapping, offset, size),
    }
    uffd.register(mapping, 4 * PAGE, 4 * PAGE)
    for call in calls.values():
        # not registered; only partly; no pages
        for offset, size in ((0, PAGE), (3 * PAGE, 2 * PAGE), (7 * PAGE, 2 * PAGE), (4 * PAGE, 1), (4 * PAGE, 0)):
            with pytest.raises(ArgumentError):
                call(offset, size)
        for offset in (-PAGE, 1 << 63, 5):
            with pytest.raises(ArgumentError):
                call(offset, PAGE)
        with pytest.raises(ArgumentTypeError):
            call("0", PAGE)
    uffd.copy(mapping, 6 * PAGE, number(6))
    for call in (calls["copy"], calls["zeropage"]):
        uffd.zeropage(mapping, 4 * PAGE, PAGE) if call is calls["copy"] else None
        first = 5 * PAGE if call is calls["copy"] else 7 * PAGE
        with pytest.raises(HostError) as caught:
            call(5 * PAGE, 3 * PAGE)
        at = 6 * PAGE if first == 5 * PAGE else 5 * PAGE
        assert (caught.value.errno, caught.value.field, caught.value.value) == (errno.EEXIST, "offset", at)
    assert mapping.read(5 * PAGE, PAGE) == bytes(PAGE)  # what was before it is in
    with pytest.raises(HostError) as caught:
        uffd.writeprotect(mapping, 4 * PAGE, PAGE)
    assert (caught.value.errno, caught.value.call) == (errno.ENOENT, "ioctl(UFFDIO_WRITEPROTECT)")
    uffd.register(mapping, 8 * PAGE, PAGE, "minor")
    with pytest.raises(HostError) as caught:
        uffd.continue_(mapping, 8 * PAGE, PAGE)
    assert (caught.value.errno, caught.value.field, caught.value.value) == (errno.EFAULT, "offset", 8 * PAGE)
    for data in (b"", bytes(PAGE - 1)):
        with pytest.raises(ArgumentError, match="len"):
            uffd.copy(mapping, 7 * PAGE, data)
    for data in (5, None, "text", memoryview(bytes(2 * PAGE))[::2]):
        with pytest.raises(ArgumentTypeError, match="data"):
            uffd.copy(mapping, 7 * PAGE, data)


def test_one_serves_at_a_time(mapping: Mapping, uffd: UserFaultFd) -> None:
    for start in (uffd.serve_native, lambda: uffd.serve(boom)):
        start()
        for refused in (uffd.serve_native, lambda: uffd.serve(boom), uffd.read):
            with pytest.raises(BusyError, match="served"):
                refused()
        uffd.stop()
    with pytest.raises(ArgumentTypeError):
        uffd.serve(b"no function")


def test_refused_sources(mapping: Mapping, uffd: UserFaultFd) -> None:
    with Mapping(None, SIZE) as other:
        for source, offset in ((other, 1), (other, SIZE), (other, -PAGE), (None, PAGE), (-1, 0)):
            with pytest.raises(ArgumentError):
                uffd.serve_native(source, offset=offset)
        for source in ("file", 1.5, True):
            with pytest.raises(ArgumentTypeError):
                uffd.serve_native(source)
        reader, writer = os.pipe()
        os.close(writer)
        with pytest.raises(HostError) as caught:
            uffd.serve_native(reader)
        assert caught.value.errno == errno.ESPIPE
        os.close(reader)
        with pytest.raises(HostError) as caught:
            uffd.serve_native(reader)
        assert caught.value.errno == errno.EBADF
        assert uffd.serving == ""
        # A handler that would wait for itself.
        uffd.register(mapping)
        with pytest.raises(BusyError, match="itself"):
            uffd.serve_native(mapping)
        uffd.serve_native(other)
        with pytest.raises(BusyError, match="source"):
            uffd.register(other)
        uffd.register(other, mode="wp")  # reading does not wait for that
        uffd.stop()
        uffd.unregister(other)
        uffd.register(other)
        uffd.unregister(other)


def test_bad_numbers() -> None:
    for patience in (-1, float("nan"), float("inf"), 1e10):
        with pytest.raises(ArgumentError, match="patience"):
            UserFaultFd(patience=patience)
    for patience in ("1", True, b""):
        with pytest.raises(ArgumentTypeError, match="patience"):
            UserFaultFd(patience=patience)
    with UserFaultFd() as uffd:
        for timeout in (-1, float("nan")):
            with pytest.raises(ArgumentError, match="timeout"):
                uffd.read(timeout)
        with pytest.raises(ArgumentTypeError, match="timeout"):
            uffd.read("1")


CLOSED = {
    "fd": lambda u, m: u.fd,
    "fileno": lambda u, m: u.fileno(),
    "patience": lambda u, m: setattr(u, "patience", 1),
    "registrations": lambda u, m: u.registrations,
    "counts": lambda u, m: u.counts,
    "serving": lambda u, m: u.serving,
    "register": lambda u, m: u.register(m),
    "unregister": lambda u, m: u.unregister(m),
    "copy": lambda u, m: u.copy(m, 0, bytes(PAGE)),
    "copy_from": lambda u, m: u.copy_from(m, 0, m, PAGE, PAGE),
    "zeropage": lambda u, m: u.zeropage(m, 0, PAGE),
    "continue_": lambda u, m: u.continue_(m, 0, PAGE),
    "poison": lambda u, m: u.poison(m, 0, PAGE),
    "move": lambda u, m: u.move(m, 0, m, PAGE, PAGE),
    "writeprotect": lambda u, m: u.writeprotect(m),
    "wake": lambda u, m: u.wake(m),
    "take_written": lambda u, m: u.take_written(m),
    "read": lambda u, m: u.read(0),
    "serve": lambda u, m: u.serve(boom),
    "serve_native": lambda u, m: u.serve_native(),
    "stop": lambda u, m: u.stop(),
}


def test_closed_is_said(mapping: Mapping) -> None:
    public = {name for name in dir(UserFaultFd) if not name.startswith("_")}
    assert public - {"close", "closed", "features"} == set(CLOSED)
    uffd = UserFaultFd()
    uffd.register(mapping)
    uffd.close()
    uffd.close()
    assert repr(uffd) == "<UserFaultFd closed>"
    for name, call in CLOSED.items():
        with pytest.raises(ClosedError) as caught:
            call(uffd, mapping)
        assert name in caught.value.call


def test_a_child_of_fork_can_only_close(mapping: Mapping, uffd: UserFaultFd) -> None:
    uffd.register(mapping)
    uffd.serve(lambda fault: number(9))
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            for call in CLOSED.values():
                with pytest.raises(ForkedError):
                    call(uffd, mapping)
            fd = uffd.fd if uffd.closed else uffd._state.fd
            uffd.close()
            uffd.close()
            with pytest.raises(OSError):
                os.fstat(fd)
            assert mapping.read(0, 4) == bytes(4)  # its memory is not registered
            mapping.close()
            status = 0
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert mapping.read(PAGE, 8) == b"%08x" % 9  # ours goes on
    uffd.stop()


def test_a_page_that_came_after_all_is_not_guarded(mapping: Mapping) -> None:
    with UserFaultFd(patience=PATIENCE) as uffd:
        uffd.register(mapping)
        with pytest.raises(HostError):
            mapping.read(PAGE, 1)
        mapping.protect(PAGE, PAGE, PROT_READ) if not GUARDS else mapping.advise("guard_remove")
        uffd.serve_native()
        assert mapping.read(PAGE, 1) == b"\0"
        uffd.unregister(mapping)
        if GUARDS:
            mapping.view()


@pytest.mark.parametrize("kind", ["mapping", "descriptor"])
def test_a_child_of_fork_keeps_nothing_of_the_source(mapping: Mapping, memfd: MemFd, kind: str) -> None:
    with Mapping(None, SIZE) as other, UserFaultFd() as uffd:
        before = fds().total()
        uffd.register(mapping)
        uffd.serve_native(other if kind == "mapping" else memfd.fd)
        child = os.fork()
        if not child:
            status = 1
            with contextlib.suppress(BaseException):
                uffd.close()
                other.close()
                mapping.close()
                status = 0 if fds().total() == before - 4 else 2  # the userfaultfd and its three eventfds
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        uffd.unregister(mapping)


def test_a_forgotten_one_wakes_who_waits(mapping: Mapping) -> None:
    uffd = UserFaultFd(patience=None)
    uffd.register(mapping)
    reader = Waiter(mapping.read, 0, 1)
    waiting(uffd)
    kept = [uffd]
    del uffd
    with pytest.warns(ResourceWarning, match="unclosed UserFaultFd"):
        kept.clear(), gc.collect()
    assert reader.get() == b"\0"
    mapping.view()
    mapping.close()


@given(st.sets(st.integers(0, 511)))
@settings(max_examples=cases(50, 1000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_runs_of_bits(pages: set[int]) -> None:
    bits = bytearray(64)
    for page in pages:
        bits[page // 8] |= 1 << page % 8
    runs = _runs(bits)
    assert [page for first, last in runs for page in range(first, last)] == sorted(pages)
    assert all(a[1] < b[0] for a, b in pairwise(runs))


def test_values() -> None:
    with Mapping(None, SIZE) as mapping:
        fault = Fault(mapping, 5 * PAGE + 7, "missing", True, 1)
        assert fault.page == 5 * PAGE
    assert Registration.fields() == ("mapping", "offset", "size", "modes", "ioctls")


def test_random_calls_come_back() -> None:
    # In a process of its own: no signal kills it, and it comes to its end.
    code = """
        import random, sys, threading
        from hvmodel.errors import HvError
        from hvmodel.host import Mapping, MemFd, UserFaultFd
        rng = random.Random(int(sys.argv[1]))
        page = 4096
        memfd = MemFd("m", 8 * page, seals=6)
        maps = [Mapping(memfd, 8 * page), Mapping(memfd, 8 * page), Mapping(None, 8 * page, shared=False)]
        uffds = [UserFaultFd(patience=0.001), UserFaultFd(patience=0.001, wp_async=True)]
        kept = []
        def handler(fault):
            if rng.random() < 0.3:
                return None
            return bytes(page)
        def one():
            u, m, o = rng.choice(uffds), rng.choice(maps), rng.choice(maps)
            at, size = rng.randrange(-1, 9) * page, rng.choice([page, page, 2 * page, 3, 0, None, 8 * page])
            some = size or page
            call = rng.choice([
                lambda: u.register(m, at, size, rng.choice(["missing", "minor", "wp", "wp-async", ["missing", "wp"]])),
                lambda: u.unregister(m, at, size), lambda: u.unregister(m), lambda: u.copy(m, at, bytes(some)),
                lambda: u.copy_from(m, at, o, 0, some), lambda: u.zeropage(m, at, some),
                lambda: u.continue_(m, at, some), lambda: u.poison(m, at, some), lambda: u.wake(m, at, size),
                lambda: u.writeprotect(m, at, size, protect=rng.random() < 0.5), lambda: u.take_written(m, at, size),
                lambda: u.move(m, at, o, 0, some), lambda: u.read(0), lambda: u.serve(handler),
                lambda: u.serve_native(rng.choice([None, memfd, o])), lambda: u.stop(), lambda: m.read(max(at, 0), 9),
                lambda: m.write(max(at, 0), b"x"), lambda: kept.append(m.view(max(at, 0), 5)), kept.clear,
                lambda: sum(v[0] for v in kept), lambda: m.discard(max(at, 0), page), lambda: u.counts,
            ])
            try:
                call()
            except HvError:
                pass
        for _ in range(int(sys.argv[2])):
            one()
        kept.clear()
        for u in uffds:
            try:
                u.close()
            except HvError:
                pass
        for m in maps:
            m.close()
        memfd.close()
        print("ok")
    """
    for seed in range(cases(2, 20)):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(seed), str(cases(1500, 10000))],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
