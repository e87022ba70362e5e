from __future__ import annotations

import re

import pytest

from hvmodel.ram import MemoryBackendMemfd
from hvmodel.witness import check_alloc
from hvmodel.witness.check_alloc import AllocationError, allocations_of, backends, parse_strace
from hvmodel.witness.registry import run
from tests.cases import cases
from tests.need import need

# strace -f of QEMU 7.2.22, as it was written; 0x1000 bytes of the reservation are in front of the block.
TRACE = """\
14211 memfd_create("memory-backend-memfd", MFD_CLOEXEC|MFD_ALLOW_SEALING) = 8
14211 ftruncate(8, 1048576)             = 0
14211 fcntl(8, F_ADD_SEALS, F_SEAL_SEAL|F_SEAL_SHRINK|F_SEAL_GROW) = 0
14211 mmap(NULL, 3145728, PROT_NONE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7fc4895ff000
14211 mmap(0x7fc489600000, 1048576, PROT_READ|PROT_WRITE, MAP_SHARED|MAP_FIXED, 8, 0) = 0x7fc489600000
14211 munmap(0x7fc4895ff000, 4096)      = 0
14211 munmap(0x7fc489701000, 2088960)   = 0
14211 mmap(NULL, 266240, PROT_READ|PROT_WRITE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0) = 0x7fc48aeba000
14211 madvise(0x7fc489600000, 1048576, MADV_HUGEPAGE) = 0
14211 madvise(0x7fc489600000, 1048576, MADV_DONTFORK) = 0
14211 mbind(0x7fc489600000, 1048576, MPOL_BIND, [0x00000000000001], 2, MPOL_MF_STRICT|MPOL_MF_MOVE) = 0
14211 madvise(0x7fc489600000, 4096, MADV_POPULATE_WRITE) = 0
14213 madvise(0x7fc489680000, 524288, MADV_POPULATE_WRITE <unfinished ...>
14214 madvise(0x7fc489600000, 524288, MADV_POPULATE_WRITE <unfinished ...>
14213 <... madvise resumed>)            = 0
14214 <... madvise resumed>)            = 0
14212 munmap(0x7fc489600000, 1052672)   = 0
14212 close(8)                          = 0
14212 madvise(0x7fc43c006000, 4096, MADV_DONTNEED) = 0
14212 munmap(0x7fc489600000, 4096)      = 0
14212 close(8)                          = -1 EBADF (Bad file descriptor)
"""
CALLS = [
    'memfd_create("memory-backend-memfd", MFD_CLOEXEC|MFD_ALLOW_SEALING) = fd',
    "ftruncate(fd, 1048576) = 0",
    "fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL|F_SEAL_SHRINK|F_SEAL_GROW) = 0",
    "mmap(NULL, size + 2097152, PROT_NONE, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0)",
    "mmap(base + 0x0, 1048576, PROT_READ|PROT_WRITE, MAP_SHARED|MAP_FIXED, fd, 0) = base + 0x0",
    "madvise(base + 0x0, 1048576, MADV_HUGEPAGE) = ok",
    "madvise(base + 0x0, 1048576, MADV_DONTFORK) = ok",
    "mbind(base + 0x0, 1048576, MPOL_BIND, [0x00000000000001], 2, MPOL_MF_STRICT|MPOL_MF_MOVE) = ok",
    "madvise(base + 0x0, 4096, MADV_POPULATE_WRITE) = ok",
    "madvise(base + 0x0, 524288, MADV_POPULATE_WRITE) = ok",
    "madvise(base + 0x80000, 524288, MADV_POPULATE_WRITE) = ok",
    "munmap(base + 0x0, 1052672) = ok",
    "close(fd) = 0",
]


def test_a_trace_becomes_texts() -> None:
    assert allocations_of(parse_strace(TRACE)) == CALLS


@pytest.mark.parametrize("line", [n for n, text in enumerate(TRACE.splitlines()) if "0x7fc48aeba000" not in text][:10])
def test_a_call_that_is_missing_is_seen(line: int) -> None:
    lines = TRACE.splitlines()
    del lines[line]
    try:
        found = allocations_of(parse_strace("\n".join(lines)))
    except (AllocationError, ValueError):
        return
    assert found != CALLS


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0x7fc4895ff000, 4096)", "0x7fc4895ff000, 8192)"),  # too much in front
        ("0x7fc489701000, 2088960)", "0x7fc489700000, 2093056)"),  # the guard page too
        ("0x7fc489701000, 2088960)", "0x7fc489702000, 2084864)"),  # not all behind it
    ],
)
def test_a_reservation_that_is_trimmed_wrongly(old: str, new: str) -> None:
    assert old in TRACE
    with pytest.raises(AllocationError, match="should be"):
        allocations_of(parse_strace(TRACE.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("F_SEAL_SEAL|", ""),
        ("MAP_SHARED|MAP_FIXED", "MAP_PRIVATE|MAP_FIXED"),
        ("MADV_HUGEPAGE", "MADV_NOHUGEPAGE"),
        ("1048576, MADV_DONTFORK) = 0", "1048576, MADV_DONTFORK) = -1 EINVAL (Invalid argument)"),
        ("1052672)   = 0", "1048576)   = 0"),
        ("0x7fc489680000, 524288", "0x7fc489690000, 524288"),
    ],
)
def test_an_argument_or_a_result_that_differs_is_seen(old: str, new: str) -> None:
    assert old in TRACE
    assert allocations_of(parse_strace(TRACE.replace(old, new))) != CALLS


def test_questions_can_be_left_out() -> None:
    asked = TRACE.replace("14211 munmap", "14211 fcntl(8, F_GET_SEALS) = 0x7 (F_SEAL_SEAL)\n14211 munmap", 1)
    assert len(allocations_of(parse_strace(asked))) == len(CALLS) + 1
    assert allocations_of(parse_strace(asked), asks=False) == CALLS


def test_no_block() -> None:
    with pytest.raises(AllocationError, match="no memory is reserved"):
        allocations_of(parse_strace("1 munmap(0x1000, 4096) = 0"))


def test_our_system_calls_are_qemus() -> None:
    need("qemu", "strace")
    (result,) = run(["alloc"])
    assert (result.mismatches, result.examples) == (0, ())
    assert result.compared == len(backends("/")) >= 30


def test_what_we_do_otherwise_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    need("qemu", "strace")
    monkeypatch.setattr(check_alloc, "backends", lambda _: {"memfd": MemoryBackendMemfd("1M")})
    ours = check_alloc._OURS.replace("block.close()", "block.mapping.advise('cold'); block.close()")
    monkeypatch.setattr(check_alloc, "_OURS", ours)
    (result,) = run(["alloc"])
    assert (result.compared, result.mismatches) == (1, 1)
    assert "MADV_COLD" in result.examples[0]


def test_our_refusals_are_qemus() -> None:
    need("qemu")
    (result,) = run(["backends"], cases=cases(60, 2000))
    assert (result.mismatches, result.examples) == (0, ())
    assert result.compared > cases(60, 2000) * 0.9


def test_a_refusal_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    need("qemu")
    monkeypatch.setattr(check_alloc, "_make_block", lambda _: None)
    (result,) = run(["backends"], cases=30)
    assert result.mismatches > 3
    assert re.search("memory backends? says 'made', QEMU's object-add says 'refused'", result.examples[0])
