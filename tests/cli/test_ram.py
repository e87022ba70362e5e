"""`hvmodel ram`: which mappings are guest RAM, and what they cost, as QEMU and the kernel say it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hvmodel.cli.ram import blocks_of
from hvmodel.host.smaps import Vma
from tests.cli.command import ENVIRONMENT, hvmodel, in_namespace, is_one_sentence, object_of
from tests.need import need

PAGE = 4096
MiB = 1 << 20
AMOUNTS = ["mapped", "rss", "pss", "private", "shared", "dirty", "anon", "huge", "hugetlb", "swapped"]


# ---- a new machine ----


def test_a_new_machine_costs_nothing_yet() -> None:
    need("kvm", "root")  # of the file's size and seals only root is told
    done = hvmodel("ram", "--json")
    found = object_of(done)
    assert (done.returncode, done.stderr, set(found)) == (0, b"", {"pid", "command", "blocks", "total"})
    (block,) = found["blocks"]
    assert (block["name"], block["why"], block["size"], block["rss"]) == ("pc.ram", "memfd", 16 * MiB, 0)
    assert (block["file_bytes"], block["map_shared"], block["offset"]) == (0, True, 0)
    assert set(block["seals"].split("|")) == {"GROW", "SHRINK"}
    assert found["total"] == {field: block[field] for field in AMOUNTS}


def test_a_new_machine_with_all_of_its_pages() -> None:
    need("kvm", "root")  # of the file's size and seals only root is told
    (block,) = object_of(hvmodel("ram", "--ram", "8M", "--populate", "--json"))["blocks"]
    expected = dict.fromkeys(("size", "mapped", "rss", "pss", "private", "dirty", "file_bytes"), 8 * MiB)
    assert {field: block[field] for field in expected} == expected
    assert (block["shared"], block["anon"], block["swapped"], block["hugetlb"]) == (0, 0, 0, 0)


def test_the_table_is_the_object() -> None:
    need("kvm", "root")  # of the file's size and seals only root is told
    done = hvmodel("ram", "--ram", "2M", "--populate")
    head, row = (line.split() for line in done.stdout.decode().splitlines())
    assert (done.returncode, done.stderr) == (0, b"")
    cells = dict(zip(head, row, strict=True))
    assert cells.pop("START").startswith("0x7")
    assert set(cells.pop("SEALS").split("|")) == {"GROW", "SHRINK"}
    assert cells == {
        "NAME": "pc.ram", "KIND": "memfd,shared", "KIB": "2048", "RSS": "2048", "PSS": "2048", "PRIVATE": "2048",
        "SHARED": "0", "DIRTY": "2048", "ANON": "0", "HUGE": "0", "HUGETLB": "0", "SWAPPED": "0", "FILE": "2048",
    }  # fmt: skip


# ---- processes ----


@contextlib.contextmanager
def waiting(code: str) -> Iterator[int]:
    """The number of a process that runs `code` and then waits."""
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}\nprint(flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT,
    ) as process:  # fmt: skip
        try:
            assert process.stdout
            assert process.stdout.readline() == b"\n"
            yield process.pid
        finally:
            process.kill()


def test_a_process_of_ours() -> None:
    code = (
        "import hvmodel as hv\n"
        "blocks = [hv.RamBlock('pc.ram', '4M'), hv.RamBlock('pc.bios', '256K')]\n"
        "for page in (0, 7, 1023): blocks[0].write(page * 4096, b'x')\n"
        "blocks[1].write(0, bytes(0x40000))\n"
    )
    with waiting(code) as pid:
        found = object_of(hvmodel("ram", pid, "--json"))
        table = hvmodel("ram", pid).stdout.decode().splitlines()
    assert found["pid"] == pid
    rss = {block["name"]: (block["mapped"], block["rss"], block["dirty"]) for block in found["blocks"]}
    assert rss == {"pc.ram": (4 * MiB, 3 * PAGE, 3 * PAGE), "pc.bios": (256 << 10, 256 << 10, 256 << 10)}
    assert found["total"]["rss"] == 3 * PAGE + (256 << 10)
    assert table[-1].split()[0] == "total"
    assert table[-1].split()[3:6] == ["4352", "268", "268"]
    assert len(table) == 4


def test_kinds_of_memory_that_are_guest_ram_and_others() -> None:
    code = (
        "import ctypes, mmap, os, multiprocessing, tempfile\n"
        "lock = multiprocessing.Lock()\n"  # a semaphore in /dev/shm
        "def block(fd, size, flags=mmap.MAP_SHARED):\n"
        "    m = mmap.mmap(fd, size, flags=flags); m[:8192] = bytes(8192); return m\n"
        "def file(where):\n"
        "    fd, path = tempfile.mkstemp(dir=where)\n"
        "    os.truncate(fd, 1 << 20); os.unlink(path); return fd\n"
        "def memfd(name): fd = os.memfd_create(name); os.truncate(fd, 1 << 20); return fd\n"
        "kept = [block(memfd('one'), 1 << 20), block(file('/dev/shm'), 1 << 20)]\n"
        "ordinary = file('/var/tmp')\n"
        "kept += [block(ordinary, 1 << 20), block(-1, 1 << 20), block(-1, 3 << 20, mmap.MAP_PRIVATE)]\n"
        "kept += [block(ordinary, 1 << 20)]; kept[-1].madvise(mmap.MADV_DONTFORK)\n"
        "kept += [block(-1, 5 << 20, mmap.MAP_PRIVATE)]; kept[-1].madvise(mmap.MADV_DONTFORK)\n"
        "jit = memfd('jit'); kept += [block(jit, 1 << 20)]\n"
        "kept += [mmap.mmap(jit, 1 << 20, prot=mmap.PROT_READ | mmap.PROT_EXEC)]\n"
    )
    with waiting(code) as pid:
        found = object_of(hvmodel("ram", pid, "--json"))["blocks"]
    kinds = sorted((block["why"], block["mapped"], block["rss"], block["anon"], block["map_shared"]) for block in found)
    assert kinds == [
        ("dontfork", MiB, 2 * PAGE, 0, True),
        ("dontfork", 5 * MiB, 2 * PAGE, 2 * PAGE, False),
        ("memfd", MiB, 2 * PAGE, 0, True),
        ("shm", MiB, 2 * PAGE, 0, True),
    ]
    assert {block["file_bytes"] for block in found if block["why"] in ("memfd", "shm")} <= {2 * PAGE, None}


@contextlib.contextmanager
def qemu(*options: str) -> Iterator[tuple[int, list[tuple[str, int]]]]:
    """A stopped QEMU: its pid, and (name, total size) of each RAM block as its monitor tells it."""
    need("qemu")
    words = ["qemu-system-x86_64", "-S", "-accel", "tcg", "-nodefaults", "-vga", "none", "-display", "none"]
    with subprocess.Popen(
        [*words, "-monitor", "stdio", *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdin
            assert process.stdout
            process.stdin.write(b"info ramblock\ninfo version\n")
            process.stdin.flush()
            blocks: list[tuple[str, int]] = []
            for line in process.stdout:
                if found := re.match(rb" *(\S*) +\d+ [KMG]iB +0x\w+ +0x\w+ +(0x\w+)", line):
                    blocks.append((found[1].decode(), int(found[2], 16)))
                elif line.startswith(b"7.") or re.match(rb"\d+\.\d+\.\d+", line):
                    break
            yield process.pid, blocks
        finally:
            process.kill()


MAIN = ["-m", "32M", "-machine", "memory-backend=m", "-object"]  # and the object that is all of the RAM


@pytest.mark.parametrize(
    "options",
    [
        ["-m", "64M"],
        ["-m", "64M", "-machine", "q35"],
        [*MAIN, "memory-backend-memfd,id=m,size=32M,prealloc=on"],
        [*MAIN, "memory-backend-file,id=m,size=32M,mem-path=/dev/shm,share=on"],
        [*MAIN, "memory-backend-file,id=m,size=32M,mem-path=/var/tmp,share=off"],
        [*MAIN, "memory-backend-ram,id=m,size=32M,share=on,merge=off,dump=off"],
    ],
    ids=["pc", "q35", "memfd", "shm", "file", "shared ram"],
)  # fmt: skip
def test_the_blocks_of_qemu_are_those_its_monitor_lists(options: list[str]) -> None:
    with qemu(*options) as (pid, theirs):
        found = object_of(hvmodel("ram", pid, "--json"))
        smaps = Path(f"/proc/{pid}/smaps").read_text()
    assert len(theirs) >= 5
    ours: list[dict[str, Any]] = found["blocks"]
    assert sorted(block["mapped"] for block in ours) == sorted(size for _, size in theirs)
    assert found["command"].startswith("qemu-system-x86")
    # The kernel's numbers of the first VMA of each, read without our code.
    for block in ours:
        said = smaps[smaps.index(f"{block['start']:x}-") :]
        assert block["rss"] == int(re.search(r"^Rss: +(\d+) kB$", said, re.MULTILINE)[1]) * 1024
    if "memfd" in " ".join(options):
        (block,) = [block for block in ours if block["name"] == "memory-backend-memfd"]
        assert (block["why"], block["mapped"], block["rss"]) == ("memfd", 32 * MiB, 32 * MiB)
        if block["seals"] is not None:
            assert set(block["seals"].split("|")) == {"GROW", "SHRINK", "SEAL"}  # its seal=on


def test_a_process_without_any() -> None:
    with waiting("") as pid:
        done = hvmodel("ram", pid, "--json")
        assert (done.returncode, object_of(done)["blocks"]) == (0, [])
        done = hvmodel("ram", pid)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1)
    assert is_one_sentence(done.stderr)
    assert b"nothing" in done.stderr


# ---- the rule ----


def vma(start: int, end: int, **fields: object) -> Vma:
    named = {"prot": "rw-", "shared": True, "offset": 0, "device": "00:01", "inode": 7, "path": "/memfd:ram (deleted)"}
    return Vma(start, end, **{**named, **fields})


ANONYMOUS = {"inode": 0, "device": "00:00", "path": "", "shared": False}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "memfd"),
        ({"prot": "---"}, "memfd"),
        ({"prot": "r-x"}, None),
        ({"flags": ("rd", "ht")}, "hugetlb"),
        ({"path": "/mnt/huge/x", "flags": ("ht",)}, "hugetlb"),
        ({"path": "/anon_hugepage (deleted)", "flags": ("ht", "dc")}, "hugetlb"),
        ({"path": "/dev/shm/ram"}, "shm"),
        ({"path": "/dev/shm/sem.mp-1 (deleted)"}, None),
        ({"path": "/tmp/ram"}, None),
        ({"path": "/tmp/ram", "flags": ("rd", "dc")}, "dontfork"),
        ({**ANONYMOUS}, None),
        ({**ANONYMOUS, "flags": ("rd", "wr", "dc")}, "dontfork"),
        ({**ANONYMOUS, "flags": ("dc",), "prot": "rwx"}, None),
        ({"path": "/dev/vfio/9", "flags": ("io", "pf", "de", "dc")}, None),
        ({"path": "/[aio] (deleted)", "flags": ("de", "dc")}, None),
    ],
)
def test_the_rule(fields: dict[str, object], why: str | None) -> None:
    one = vma(0x1000, 0x9000, **fields)
    assert blocks_of([one]) == ([] if why is None else [(why, [one])])


def test_a_file_that_is_mapped_executable_anywhere_is_none() -> None:
    assert blocks_of([vma(0x1000, 0x9000), vma(0x20000, 0x28000, prot="r-x")]) == []
    other = vma(0x30000, 0x38000, inode=8)
    assert blocks_of([vma(0x1000, 0x9000, prot="r-x"), other]) == [("memfd", [other])]


def test_what_is_one_block() -> None:
    def spans(*vmas: Vma) -> list[list[int]]:
        return [[part.start for part in parts] for _, parts in blocks_of(vmas)]

    first = vma(0x1000, 0x3000)
    # A file's parts, of whatever protection, with a hole between them.
    parts = [first, vma(0x3000, 0x4000, offset=0x2000, prot="r--"), vma(0x8000, 0x9000, offset=0x7000)]
    assert spans(*parts) == [[0x1000, 0x3000, 0x8000]]
    # The same file once more, another file, a private mapping of it.
    assert spans(first, vma(0x3000, 0x5000)) == [[0x1000], [0x3000]]
    assert spans(first, vma(0x3000, 0x5000, offset=0x2000, inode=8)) == [[0x1000], [0x3000]]
    assert spans(first, vma(0x3000, 0x5000, offset=0x2000, shared=False)) == [[0x1000], [0x3000]]
    # Anonymous memory: side by side and alike, or not.
    anonymous = {**ANONYMOUS, "flags": ("rd", "dc")}
    one, near = vma(0x1000, 0x3000, **anonymous), vma(0x3000, 0x5000, **anonymous)
    assert spans(one, near) == [[0x1000, 0x3000]]
    assert spans(one, vma(0x4000, 0x5000, **anonymous)) == [[0x1000], [0x4000]]
    assert spans(one, vma(0x3000, 0x5000, **{**anonymous, "flags": ("rd", "dc", "hg")})) == [[0x1000], [0x3000]]


# ---- what is refused ----


def test_no_such_process() -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    done = hvmodel("ram", gone.pid)
    assert (done.returncode, done.stdout) == (2, b"")
    assert is_one_sentence(done.stderr)
    assert f"/proc/{gone.pid}/smaps: ".encode() not in done.stderr
    assert b"no such process" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["x"], b"PID"),
        (["0"], b"PID"),
        (["-1"], b"-1"),
        (["99999999999"], b"PID"),
        (["1", "--ram", "1M"], b"--ram"),
        (["1", "--populate"], b"--populate"),
        (["--ram", "5"], b"--ram"),
        (["--ram", "-4096"], b"--ram"),
        (["--ram", "1000T"], b"--ram"),
    ],
)
def test_bad_words(words: list[str], says: bytes) -> None:
    done = hvmodel("ram", *words)
    assert (done.returncode, done.stdout) == (2, b"")
    assert is_one_sentence(done.stderr)
    assert says in done.stderr


def test_a_process_that_may_not_be_looked_at() -> None:
    need("root")
    # Another user may not be able to read this Python's packages: what the command imports is imported before.
    code = """
import os, sys
from hvmodel.cli import main
main(["ram", str(os.getpid())])
main(["ram", "0"])
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
for stream in (sys.stdout, sys.stderr):
    print("now", file=stream, flush=True)
sys.exit(main(["ram", "1"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    out, says = (stream.partition(b"now\n")[2] for stream in (done.stdout, done.stderr))
    assert (done.returncode, out) == (2, b"")
    assert is_one_sentence(says)
    assert b"CAP_SYS_PTRACE" in says


def test_without_kvm_there_is_no_new_machine() -> None:
    done = in_namespace('mount -t tmpfs none /dev && exec "$@"', "ram")
    assert (done.returncode, done.stdout) == (8, b"")
    assert is_one_sentence(done.stderr)
