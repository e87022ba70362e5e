from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import pickle
import re
import resource
import stat
import subprocess
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel.errors import ArgumentError, ArgumentTypeError, BusyError, ClosedError, HostError
from hvmodel.host import ViewError
from hvmodel.ram import MemoryBackend, MemoryBackendFile, MemoryBackendMemfd, MemoryBackendRam, RamBlock
from hvmodel.ram.backend import backend_types, prealloc_threads
from hvmodel.ram.backing import BackingFile
from hvmodel.ram.ramflags import (
    RAM_NAMED_FILE,
    RAM_NORESERVE,
    RAM_PMEM,
    RAM_READONLY,
    RAM_READONLY_FD,
    RAM_SHARED,
    flag_names,
)
from tests.cases import cases
from tests.host.held import fds, nothing_leaks
from tests.need import need

PAGE, M = 4096, 1 << 20


def vma(address: int) -> tuple[str, list[str]]:
    """Protection and kind of the mapping at `address`, and its VmFlags, from /proc/self/smaps."""
    header, flags, found = "", [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            found = start <= address < end
            header = line.split()[1] if found else header
        elif found and line.startswith("VmFlags:"):
            flags = line.split()[1:]
    return header, flags


def resident(address: int, size: int) -> int:
    """Pages of the range that are present: bit 63 of /proc/self/pagemap."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(address // PAGE * 8)
        words = file.read(size // PAGE * 8)
    return sum(words[at + 7] >> 7 for at in range(0, len(words), 8))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "long").write_bytes(bytes(8 * M))
    (tmp_path / "tiny").write_bytes(bytes(1000))
    (tmp_path / "empty").touch()
    return tmp_path


# ---- what is made ----


def test_memfd() -> None:
    with nothing_leaks(), RamBlock("mem", backend=MemoryBackendMemfd("2M")) as block:
        assert (block.used_length, block.max_length, block.page_size, block.flags) == (2 * M, 2 * M, PAGE, RAM_SHARED)
        assert os.readlink(f"/proc/self/fd/{block.fd}") == "/memfd:memory-backend-memfd (deleted)"
        seals = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        assert fcntl.fcntl(block.fd, fcntl.F_GET_SEALS) == seals
        with pytest.raises(PermissionError):
            fcntl.fcntl(block.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        prot, flags = vma(block.host)
        assert prot == "rw-s"
        assert {"dc", "hg"} <= set(flags)  # not in children, huge pages welcome
        assert "dd" not in flags
        block.write(M, b"hello")
        assert os.pread(block.fd, 5, M) == b"hello"
        assert bytes(block.view(M, 5)) == b"hello"
        assert block.take_host_dirty() == [range(256, 257)]


def test_private_memfd_keeps_its_writes() -> None:
    with RamBlock("mem", backend=MemoryBackendMemfd("1M", share=False)) as block:
        assert block.flags == 0
        assert vma(block.host)[0] == "rw-p"
        block.write(0, b"hello")
        assert (block.read(0, 5), os.pread(block.fd, 5, 0)) == (b"hello", bytes(5))


def test_unsealed_memfd_is_not_handed_out() -> None:
    with RamBlock("mem", backend=MemoryBackendMemfd("1M", seal=False)) as block:
        assert fcntl.fcntl(block.fd, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SEAL  # no seals can be added
        block.write(0, b"hello")
        with pytest.raises(ViewError):
            block.view()
        os.ftruncate(block.fd, 0)
        for use in (lambda: block.read(0, 1), lambda: block.write(0, b"x")):
            with pytest.raises(HostError) as caught:
                use()
            assert caught.value.errno == errno.EFAULT


def test_anonymous() -> None:
    with nothing_leaks(), RamBlock("mem", backend=MemoryBackendRam("1M")) as block:
        assert (block.fd, block.file, block.memfd, block.flags) == (-1, None, None, 0)
        assert block.host % (2 * M) == 0
        prot, flags = vma(block.host)
        assert prot == "rw-p"
        assert {"dc", "hg"} <= set(flags)
        guard, _ = vma(block.host + M)
        assert guard == "---p"
        block.write(0, b"hello")
        assert bytes(block.view(0, 5)) == b"hello"
    with pytest.raises(ClosedError):
        _ = block.fd


def test_anonymous_shared_and_noreserve() -> None:
    with RamBlock("mem", backend=MemoryBackendRam("1M", share=True, reserve=False, dump=False)) as block:
        assert block.flags == RAM_SHARED | RAM_NORESERVE
        prot, flags = vma(block.host)
        assert prot == "rw-s"
        assert {"nr", "dd"} <= set(flags)


@pytest.mark.parametrize("merge", [True, False])
def test_merge(merge: bool) -> None:
    # Of a memfd, for the machine marks anonymous memory in any case; KSM takes private memory only.
    with RamBlock("mem", backend=MemoryBackendMemfd("1M", share=False, merge=merge)) as block:
        if not Path("/sys/kernel/mm/ksm").exists():
            pytest.skip("needs a kernel with CONFIG_KSM")
        assert ("mg" in vma(block.host)[1]) == merge


@pytest.mark.parametrize("backend", [MemoryBackendRam, MemoryBackendMemfd])
def test_prealloc(backend: type) -> None:
    with RamBlock("mem", backend=backend("2M")) as block:
        assert resident(block.host, 2 * M) == 0
    with RamBlock("mem", backend=backend("2M", prealloc=True, prealloc_threads=8)) as block:
        assert resident(block.host, 2 * M) == 512
        assert block.host_dirty() == []  # zeros are what was there before


def test_prealloc_threads_are_qemus() -> None:
    # min(processors, 16, wanted, pages, one per 64 MiB or one): the processors of this host bound all but the first.
    online = os.sysconf("SC_NPROCESSORS_ONLN")
    assert prealloc_threads(1 << 40, PAGE, 1) == 1
    assert prealloc_threads(1 << 40, PAGE, 1000) == min(online, 16)
    assert prealloc_threads(127 * M, PAGE, 1000) == 1
    assert prealloc_threads(128 * M, PAGE, 1000) == min(online, 2)
    assert prealloc_threads(1 << 31, 1 << 30, 1000) == min(online, 2)


def test_prealloc_of_more_than_there_is_is_refused_before_it_begins() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * PAGE
    with nothing_leaks(), pytest.raises(HostError) as caught:
        RamBlock("mem", backend=MemoryBackendMemfd(total + (1 << 30), prealloc=True))
    assert caught.value.errno == errno.ENOMEM


def test_numa_policy() -> None:
    from hvmodel.host import get_mempolicy

    if not Path("/sys/devices/system/node/node0").exists():
        pytest.skip("needs a kernel with CONFIG_NUMA")
    for policy in ("bind", "interleave", "preferred"):
        with RamBlock("mem", backend=MemoryBackendMemfd("1M", policy=policy, host_nodes=[0])) as block:
            found = get_mempolicy(block.host)
            assert (found.policy, found.nodes) == (policy, (0,))


def test_hugetlb_without_pages() -> None:
    # reserve=off: nothing is asked of the pool until it is touched, and so nothing is handed out.
    if not Path("/sys/kernel/mm/hugepages/hugepages-2048kB").exists():
        pytest.skip("needs huge pages of 2 MiB")
    backend = MemoryBackendMemfd("4M", hugetlb=True, hugetlbsize="2M", reserve=False)
    with nothing_leaks(), RamBlock("mem", backend=backend) as block:
        assert block.page_size == 2 * M
        assert block.host % (2 * M) == 0
        with pytest.raises(ViewError):
            block.view()
        if Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text() == "0\n":
            with pytest.raises(HostError):
                block.write(0, b"x")
            with pytest.raises(HostError) as caught:
                RamBlock("mem", backend=MemoryBackendMemfd("4M", hugetlb=True, hugetlbsize="2M"))
            assert caught.value.errno == errno.ENOMEM


def test_hugetlb_of_a_size_that_the_host_does_not_have() -> None:
    with nothing_leaks(), pytest.raises(HostError) as caught:
        RamBlock("mem", backend=MemoryBackendMemfd("16M", hugetlb=True, hugetlbsize="16M"))
    assert (caught.value.errno, caught.value.field) == (errno.ENODEV, "hugetlbsize")


# ---- files ----


def test_a_file(directory: Path) -> None:
    path = str(directory / "long")
    with nothing_leaks(), RamBlock("mem", backend=MemoryBackendFile("4M", path, share=True)) as block:
        assert isinstance(block.file, BackingFile)
        assert block.flags == RAM_SHARED | RAM_NAMED_FILE
        assert block.memfd is None
        block.write(M, b"hello")
        with open(path, "rb") as file:
            file.seek(M)
            assert file.read(5) == b"hello"
        with pytest.raises(ViewError, match="truncated"):
            block.view()
        os.truncate(path, M)
        with pytest.raises(HostError):
            block.read(M, 1)
        assert block.read(0, 1) == b"\0"
    assert os.path.getsize(path) == M


def test_a_new_file_stays(directory: Path) -> None:
    path = directory / "new"
    with RamBlock("mem", backend=MemoryBackendFile("1M", str(path), share=True)) as block:
        assert block.file.created
        assert stat.filemode(path.stat().st_mode) == "-rw-r--r--"
        block.write(0, b"hello")
    assert path.read_bytes() == b"hello".ljust(M, b"\0")


def test_an_empty_file_is_made_as_long(directory: Path) -> None:
    RamBlock("mem", backend=MemoryBackendFile("1M", str(directory / "empty"))).close()
    assert (directory / "empty").stat().st_size == M


def test_a_file_in_a_directory_has_no_name(directory: Path) -> None:
    before = os.listdir(directory)
    with RamBlock("a/b", backend=MemoryBackendFile("1M", str(directory))) as block:
        assert os.listdir(directory) == before
        assert re.search(r"/qemu_back_mem\.a_b\.\w+ \(deleted\)$", os.readlink(f"/proc/self/fd/{block.fd}"))
        assert stat.S_IMODE(os.fstat(block.fd).st_mode) == 0o600


def test_a_new_file_goes_where_the_block_cannot_be_made(directory: Path) -> None:
    path = directory / "new"
    with nothing_leaks(), pytest.raises(HostError):
        RamBlock("mem", backend=MemoryBackendFile("64T", str(path), align="64T"))
    assert not path.exists()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (M, hard))
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with nothing_leaks(), pytest.raises(HostError) as caught:
            RamBlock("mem", backend=MemoryBackendFile("2M", str(path)))
        assert (caught.value.call, caught.value.errno) == ("ftruncate", errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert not path.exists()


def test_readonly(directory: Path) -> None:
    path = str(directory / "long")
    with RamBlock("mem", backend=MemoryBackendFile("4M", path, readonly=True, share=True)) as block:
        assert block.readonly
        assert block.flags == RAM_SHARED | RAM_NAMED_FILE | RAM_READONLY | RAM_READONLY_FD
        assert vma(block.host)[0] == "r--s"
        with pytest.raises(HostError):
            block.write(0, b"x")
        with pytest.raises(ArgumentError):
            block.mapping.populate()
        assert block.read(0, 1) == b"\0"


def test_rom_off_writes_to_private_copies(directory: Path) -> None:
    path = str(directory / "long")
    with RamBlock("mem", backend=MemoryBackendFile("4M", path, readonly=True, rom="off")) as block:
        assert not block.readonly
        assert block.flags == RAM_NAMED_FILE | RAM_READONLY_FD
        block.write(0, b"hello")
        assert block.read(0, 5) == b"hello"
    assert (directory / "long").read_bytes()[:5] == bytes(5)


def test_offset(directory: Path) -> None:
    path = directory / "long"
    with RamBlock("mem", backend=MemoryBackendFile("1M", str(path), share=True, offset="2M")) as block:
        assert (block.fd_offset, block.offset) == (2 * M, 0)
        block.write(0, b"hello")
    assert path.read_bytes()[2 * M :][:5] == b"hello"
    with pytest.raises(ArgumentError, match="from offset 0x780000"):
        RamBlock("mem", backend=MemoryBackendFile("1M", str(path), offset=8 * M - 512 * 1024))


@pytest.mark.parametrize("align", ["4M", "1G"])
def test_align(directory: Path, align: str) -> None:
    backend = MemoryBackendFile("4M", str(directory / "long"), align=align)
    with RamBlock("mem", backend=backend) as block:
        assert block.host % backend.align == 0


@pytest.mark.parametrize("share", [True, False])
def test_discard_data(directory: Path, share: bool) -> None:
    path = directory / "long"
    path.write_bytes(b"x" * 8 * M)
    backend = MemoryBackendFile("4M", str(path), share=share, discard_data=True)
    block = RamBlock("mem", backend=backend)
    # Not while the block cannot be closed.
    block.mapping.pin("memslot 0")
    with pytest.raises(BusyError):
        block.close()
    assert block.read(0, 1) == b"x"
    block.mapping.unpin("memslot 0")
    block.close()
    found = path.read_bytes()
    assert found == (bytes(4 * M) if share else b"x" * 4 * M) + b"x" * 4 * M


def test_pmem_on_what_is_none(directory: Path) -> None:
    backend = MemoryBackendFile("4M", str(directory / "long"), share=True, pmem=True)
    with pytest.warns(RuntimeWarning):
        made = RamBlock("mem", backend=backend)
    with made as block:
        assert block.flags == RAM_SHARED | RAM_NAMED_FILE | RAM_PMEM
        assert not block.mapping.synced
        assert flag_names(block.flags) == "SHARED|PMEM|NAMED_FILE"


@pytest.mark.parametrize(
    "what", ["tiny", "fifo", "null", "kvm", "no/such", "dangling", "readonly new", "readonly empty"]
)
def test_files_refused(directory: Path, what: str) -> None:
    readonly, _, name = what.rpartition(" ")
    path = {"null": "/dev/null", "kvm": "/dev/kvm"}.get(name, str(directory / name))
    if not os.path.exists(path) and name == "kvm":
        pytest.skip("needs /dev/kvm")
    os.mkfifo(directory / "fifo")
    os.symlink("nowhere", directory / "dangling")
    os.symlink("nowhere/at/all", directory / "dangling2")
    with nothing_leaks(), pytest.raises((ArgumentError, HostError)) as caught:
        RamBlock("mem", backend=MemoryBackendFile("1M", path, readonly=bool(readonly)))
    assert caught.value.field in ("mem_path", "size")
    assert not (directory / "new").exists()
    assert not (directory / "nowhere").exists()


def test_a_pipe_does_not_hang(directory: Path) -> None:
    os.mkfifo(directory / "fifo")
    for readonly in (True, False):
        with pytest.raises(ArgumentError, match="a pipe"):
            RamBlock("mem", backend=MemoryBackendFile("1M", str(directory / "fifo"), readonly=readonly))


def test_a_forgotten_file_warns(directory: Path) -> None:
    with nothing_leaks():
        kept = [BackingFile(str(directory / "long"), M)]
        assert fds()[str(directory / "long")] == 1
        with pytest.warns(ResourceWarning, match="unclosed BackingFile"):
            kept.clear(), gc.collect()


# ---- blocks of backends ----


def test_a_child_of_fork_has_no_such_memory() -> None:
    # MADV_DONTFORK, as with QEMU: the child is told, and not killed.
    with RamBlock("mem", backend=MemoryBackendMemfd("1M")) as block:
        block.write(0, b"parent")
        child = os.fork()
        if not child:
            code = 1
            try:
                try:
                    block.read(0, 1)
                except ClosedError:
                    code = 0
                block.close()
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert block.read(0, 6) == b"parent"


def test_size_and_backend() -> None:
    RamBlock("mem", "1M", backend=MemoryBackendRam("1M")).close()
    for size, longest, field in (("2M", None, "size"), (None, "2M", "max_length"), ("1M", "1M", "max_length")):
        with nothing_leaks(), pytest.raises(ArgumentError) as caught:
            RamBlock("mem", size, backend=MemoryBackendRam("1M"), max_length=longest)
        assert caught.value.field == field
    with pytest.raises(ArgumentTypeError, match="backend"):
        RamBlock("mem", backend="memory-backend-ram")


def test_more_than_all_addresses() -> None:
    with nothing_leaks():
        for backend in (MemoryBackendRam, MemoryBackendMemfd):
            for size in (1 << 47, 1 << 50, (1 << 62)):
                with pytest.raises((ArgumentError, HostError)) as caught:
                    RamBlock("mem", backend=backend(size))
                assert caught.value.field == "size"


def test_no_descriptor_left() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = os.dup(0)
    os.close(top)
    with nothing_leaks():
        resource.setrlimit(resource.RLIMIT_NOFILE, (top, hard))
        try:
            for backend in (MemoryBackendMemfd("1M"), MemoryBackendFile("1M", "/dev/shm")):
                with pytest.raises(HostError) as caught:
                    RamBlock("mem", backend=backend)
                assert caught.value.errno == errno.EMFILE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- values ----


def test_values() -> None:
    backend = MemoryBackendMemfd("1G", share=False, host_nodes=(1, 0, 1), policy="bind", id="mem")
    assert backend.size == 1 << 30
    assert backend.host_nodes == (0, 1)
    assert backend == pickle.loads(pickle.dumps(backend))
    assert hash(backend) == hash(pickle.loads(pickle.dumps(backend)))
    assert backend != MemoryBackendMemfd("1G")
    assert "hugetlb=False" in repr(backend)
    with pytest.raises(AttributeError):
        backend.size = 5
    with pytest.raises(ArgumentTypeError):
        MemoryBackend()


def test_every_option_of_qemu_is_here() -> None:
    need("qemu")
    left_out = {"prealloc-context", "x-use-canonical-path-for-ramblock-id"}
    newer = {"offset", "rom"}
    for name, cls in backend_types().items():
        text = subprocess.run(
            ["qemu-system-x86_64", "-object", f"{name},help"], capture_output=True, text=True, check=True
        ).stdout
        theirs = set(re.findall(r"^  ([\w-]+)=", text, re.M))
        assert theirs - left_out <= set(cls.options()) <= theirs | newer


REFUSED = [
    # class, arguments, the field at fault, QEMU's words
    (MemoryBackendMemfd, {"size": 0}, "size", "doesn't take value '0'"),
    (MemoryBackendMemfd, {"size": 5000}, "size", "does not match 'size'"),
    (MemoryBackendMemfd, {"prealloc_threads": 0}, "prealloc_threads", "doesn't take value '0'"),
    (MemoryBackendMemfd, {"prealloc_threads": 1 << 32}, "prealloc_threads", "expects uint32"),
    (MemoryBackendMemfd, {"prealloc": True, "reserve": False}, "reserve", "'prealloc=on' and 'reserve=off'"),
    (MemoryBackendMemfd, {"policy": "bind"}, "host_nodes", "host-nodes must be set for policy bind"),
    (MemoryBackendMemfd, {"policy": "local"}, "policy", "does not accept value|Invalid parameter"),
    (MemoryBackendMemfd, {"host_nodes": [0]}, "host_nodes", "host-nodes must be empty for policy default"),
    (MemoryBackendMemfd, {"policy": "bind", "host_nodes": [128]}, "host_nodes", "Invalid host-nodes value: 128"),
    (MemoryBackendMemfd, {"policy": "bind", "host_nodes": [77]}, "host_nodes", "cannot bind memory"),
    (MemoryBackendMemfd, {"hugetlbsize": 3 * M}, "hugetlbsize", "Hugepage size must be a power of 2"),
    (MemoryBackendMemfd, {"hugetlbsize": 0}, "hugetlbsize", "doesn't take value '0'"),
    (MemoryBackendMemfd, {"hugetlb": True, "hugetlbsize": 2 * M}, "size", "failed to resize memfd"),
    (MemoryBackendMemfd, {"size": 1 << 62}, "size", "unable to map backing store|Cannot allocate"),
    (MemoryBackendRam, {"size": 1 << 62}, "size", "cannot set up guest memory"),
    (MemoryBackendRam, {"size": 0}, "size", "doesn't take value '0'"),
    (MemoryBackendRam, {"prealloc": True, "reserve": False}, "reserve", "'prealloc=on' and 'reserve=off'"),
    (MemoryBackendFile, {"mem_path": "DIR/tiny"}, "size", "backing store size 0x3e8 does not match"),
    (MemoryBackendFile, {"mem_path": "DIR/no/such"}, "mem_path", "can't open backing store"),
    (MemoryBackendFile, {"mem_path": ""}, "mem_path", "can't open backing store"),
    (MemoryBackendFile, {"mem_path": "/dev/null"}, "mem_path", "unable to map backing store"),
    (MemoryBackendFile, {"mem_path": "DIR", "readonly": True}, "mem_path", "unable to map backing store"),
    (MemoryBackendFile, {"mem_path": "DIR/long", "align": 1024}, "align", "must be multiples of page size"),
    (MemoryBackendFile, {"mem_path": "DIR/long", "align": 3 * M}, "align", "must be a power of two"),
    (MemoryBackendFile, {"mem_path": "DIR/long", "align": 1 << 50}, "align", "unable to map backing store"),
    (MemoryBackendFile, {"mem_path": "DIR/long", "policy": "preferred"}, "host_nodes", "host-nodes must be set"),
]


def test_what_qemu_refuses_is_refused_with_the_reason(directory: Path) -> None:
    need("qemu")
    from hvmodel.witness.qemu import Qemu, QemuError

    with Qemu(machine="none") as qemu, nothing_leaks():
        for cls, arguments, field, words in REFUSED:
            named = {"size": M} | {
                name: value.replace("DIR", str(directory)) if isinstance(value, str) else value
                for name, value in arguments.items()
            }
            with pytest.raises(QemuError, match=words):
                qemu.execute("object-add", qom_type=cls.TYPE, id="m", **named)
            with pytest.raises((ArgumentError, HostError)) as caught:
                RamBlock("m", backend=cls(**named))
            assert caught.value.field == field, str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"rom": "on"}, "rom"),
        ({"rom": "off", "readonly": True, "share": True}, "rom"),
        ({"rom": "maybe"}, "rom"),
        ({"readonly": True, "prealloc": True}, "prealloc"),
        ({"offset": 100}, "offset"),
        ({"offset": 1 << 63}, "offset"),
        ({"mem_path": "a\0b"}, "mem_path"),
    ],
)
def test_what_later_qemus_refuse_or_die_of(arguments: dict, field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        MemoryBackendFile(**{"size": M, "mem_path": "/dev/shm/none"} | arguments)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        (MemoryBackendRam, "share", 1),
        (MemoryBackendRam, "size", 4096.0),
        (MemoryBackendRam, "size", None),
        (MemoryBackendRam, "prealloc", "on"),
        (MemoryBackendRam, "prealloc_threads", True),
        (MemoryBackendRam, "prealloc_threads", "2"),
        (MemoryBackendRam, "host_nodes", "0"),
        (MemoryBackendRam, "host_nodes", 0),
        (MemoryBackendRam, "host_nodes", ["0"]),
        (MemoryBackendRam, "policy", 2),
        (MemoryBackendRam, "id", 5),
        (MemoryBackendMemfd, "seal", None),
        (MemoryBackendMemfd, "hugetlb", 2),
        (MemoryBackendMemfd, "hugetlbsize", 2.0),
        (MemoryBackendFile, "mem_path", 3),
        (MemoryBackendFile, "align", None),
        (MemoryBackendFile, "rom", True),
    ],
)
def test_types_refused(cls: type, field: str, value: object) -> None:
    named = {"size": M} | ({"mem_path": "/x"} if cls is MemoryBackendFile else {}) | {field: value}
    with pytest.raises(ArgumentTypeError) as caught:
        cls(**named)
    assert (caught.value.call, caught.value.field) == (cls.__name__, field)


# ---- text ----

ids = st.from_regex(r"\A[A-Za-z][A-Za-z0-9._-]{0,10}\Z")
common = {
    "size": st.integers(1, 1 << 30).map(lambda n: n * PAGE),
    "share": st.booleans(),
    "merge": st.booleans(),
    "dump": st.booleans(),
    "prealloc_threads": st.integers(1, (1 << 32) - 1),
    "id": ids,
}
nodes = st.lists(st.integers(0, 127), min_size=1, max_size=5)
text = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1, max_size=12)
anything = st.one_of(
    st.builds(MemoryBackendRam, **common),
    st.builds(MemoryBackendRam, **common, host_nodes=nodes, policy=st.sampled_from(["bind", "interleave"])),
    st.builds(MemoryBackendMemfd, **common, seal=st.booleans(), hugetlbsize=st.sampled_from([None, 2 * M])),
    st.builds(MemoryBackendFile, **common, mem_path=text, readonly=st.booleans(), align=st.sampled_from([0, 2 * M])),
)


@settings(deadline=None)
@given(anything)
def test_what_is_written_is_read(backend: MemoryBackend) -> None:
    assert MemoryBackend.parse(backend.option()) == backend
    assert type(backend).parse(backend.option()) == backend


@settings(deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(["memory-backend-ram", ",", "=", "id", "size", "1M", "no"])))
def test_any_text_is_read_or_refused(words: str | list[str]) -> None:
    with contextlib.suppress(ArgumentError):
        assert MemoryBackend.parse("".join(words)).size == M


# Text after "memory-backend-memfd,id=m,": as QEMU's command line takes or refuses it.  What comes of it, or None.
TEXTS: dict[str, dict[str, object] | None] = {
    "size=1M": {"size": M},
    "size=1.5M": {"size": 3 * M // 2},
    "size=+1m": {"size": M},
    "size=0x100000": {"size": M},
    "size=1048576B": {"size": M},
    "size=010M": {"size": 10 * M},
    "size=1MB": None,
    "size=1MiB": None,
    "size=.5M": None,
    "size=-4096": None,
    "size=16E": None,
    "size=1 M": None,
    "size=": None,
    "": None,
    "size=1M,share=yes,seal=n": {"share": True, "seal": False},
    "size=1M,share=ON": None,
    "size=1M,share=": None,
    "size=1M,noseal": {"seal": False},
    "size=1M,seal,": {"seal": True},
    "size=1M,seal=on,seal=off": {"seal": False},
    "size=1M,prealloc-threads=0x2": {"prealloc_threads": 2},
    "size=1M,prealloc-threads=2K": None,
    "size=1M,prealloc_threads=2": None,
    "size=1M,host-nodes=0x0,policy=bind": {"host_nodes": (0,)},
    "size=1M,host-nodes=0-,policy=bind": None,
    "size=1M,host-nodes=3-1,policy=bind": None,
    "size=1M,policy=Bind,host-nodes=0": None,
    "size=1M,SIZE=1M": None,
    "size=1M,mem-path=/x": None,
    "size=1M,,x": None,
    "size=1M,id=n": {"id": "m"},
}


@pytest.mark.parametrize("words", TEXTS)
def test_text_is_read_as_qemu_reads_it(words: str) -> None:
    expected = TEXTS[words]
    option = f"memory-backend-memfd,id=m,{words}"
    if expected is None:
        with pytest.raises(ArgumentError):
            MemoryBackend.parse(option)
    else:
        backend = MemoryBackend.parse(option)
        assert {name: getattr(backend, name) for name in expected} == expected
    if words in list(TEXTS)[:: cases(4, 1)]:  # a process for each
        assert qemu_takes(option) == (expected is not None)


def qemu_takes(option: str) -> bool:
    need("qemu")
    done = subprocess.run(
        ["qemu-system-x86_64", "-machine", "none", "-display", "none", "-S", "-qmp", "stdio", "-object", option],
        input='{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n',
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode == 0


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("memory-backend-memfd,size=1M", "id"),
        ("memory-backend-memfd,id=1m,size=1M", "id"),
        ("memory-backend-memfd,id=a/b,size=1M", "id"),
        ("memory-backend-memfd,id=,size=1M", "id"),
        ("memory-backend-foo,id=m,size=1M", "qom-type"),
        ("id=m,size=1M", "qom-type"),
        ("memory-backend-file,id=m,size=1M", "mem-path"),
        ("memory-backend-memfd,id=m,size=1M,prealloc-context=x", "prealloc-context"),
    ],
)
def test_text_refused(option: str, field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        MemoryBackend.parse(option)
    assert caught.value.field == field
    if cases(0, 1):
        assert not qemu_takes(option)


def test_parse_of_one_kind() -> None:
    assert MemoryBackendRam.parse("qom-type=memory-backend-ram,id=m,size=1M").id == "m"
    with pytest.raises(ArgumentError, match="accepted: memory-backend-ram"):
        MemoryBackendRam.parse("memory-backend-memfd,id=m,size=1M")
    with pytest.raises(ArgumentTypeError):
        MemoryBackend.parse(b"memory-backend-ram")


def test_no_warning_at_all(directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RamBlock("mem", backend=MemoryBackendFile("1M", str(directory / "long"), pmem=True)).close()


@pytest.mark.parametrize("path", ["\ud800", "a\0b", ""])
def test_a_text_that_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(ArgumentError, match="mem_path"):
        MemoryBackendFile("4K", path)
    with pytest.raises(ArgumentError, match="path"):
        BackingFile(path, 4096)
