"""The program break: this process's is looked at, a child's is moved."""

from __future__ import annotations

import ctypes
import errno
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel.errors import ArgumentError, ArgumentTypeError, HostError
from hvmodel.host import brk
from tests.host.held import nothing_leaks
from tests.need import need

PAGE = 4096


def heap_vma() -> tuple[int, int] | None:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[heap]"):
            start, end = line.split()[0].split("-")
            return int(start, 16), int(end, 16)
    return None


def test_current_is_what_the_kernel_shows() -> None:
    # malloc may move it in between, so more than one try.
    for _ in range(5):
        found, vma, sbrk = brk.heap(), heap_vma(), ctypes.CDLL(None).sbrk
        sbrk.restype = ctypes.c_void_p
        if found.current == sbrk(0) == brk.current():
            break
    assert found.current == brk.current()
    assert found.size == found.current - found.start
    if vma is None:
        assert found.size == 0
    else:
        # [heap] is whole pages.
        assert (found.start & -PAGE, -(-found.current & -PAGE)) == vma


def test_limit() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (1 << 33, resource.RLIM_INFINITY))\n"
        "from hvmodel.host import brk; print(brk.heap().limit)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 1 << 33
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    assert brk.heap().limit == (None if soft == resource.RLIM_INFINITY else soft)


def test_a_child_grows_and_shrinks() -> None:
    before = brk.current()
    with nothing_leaks():
        up, odd, down, under = brk.moves_in_child([16 * PAGE, 100, -(16 * PAGE + 100), -(1 << 40)])
    # Arithmetic: each starts where the one before ended.
    assert (up.asked, up.after, up.done) == (up.before + 16 * PAGE, up.before + 16 * PAGE, True)
    assert (odd.before, odd.after) == (up.after, up.after + 100)
    assert (down.before, down.after, down.done) == (odd.after, up.before, True)
    # Below the start of the heap: refused, and nothing moved.
    assert (under.asked, under.after, under.done) == (under.before - (1 << 40), under.before, False)
    # What the kernel maps ends with the page of the last byte.
    assert [(move.below_mapped, move.above_mapped) for move in (up, odd)] == [(True, False)] * 2
    assert brk.current() == before


def test_too_much_is_refused() -> None:
    up, more = brk.moves_in_child([1 << 46, PAGE])
    assert (up.done, up.after) == (False, up.before)
    assert (more.done, more.before) == (True, up.before)


def test_the_limit_on_data_counts() -> None:
    code = (
        "import resource; from hvmodel.host import brk\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (256 << 20, 256 << 20))\n"
        "print(*[move.done for move in brk.moves_in_child([1 << 20, 256 << 20, 1 << 20])])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True"]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(-(1 << 20), 1 << 22), min_size=1, max_size=20))
def test_moves_follow_each_other(increments: list[int]) -> None:
    start = brk.heap().start
    moves = brk.moves_in_child(increments)
    assert len(moves) == len(increments)
    for number, (move, increment) in enumerate(zip(moves, increments, strict=True)):
        assert move.asked == move.before + increment
        assert move.after in (move.before, move.asked)
        assert move.after >= start
        assert not number or move.before == moves[number - 1].after


def test_strace_sees_brk_in_the_child_only() -> None:
    need("strace")
    code = (
        "import os; from hvmodel.host import brk; brk.moves_in_child([0]); os.write(1, b'here')\n"
        "moves = brk.moves_in_child([0x5000, -0x5000]); os.write(1, b'done')\n"
        "print(os.getpid(), *(f'{move.asked:#x}' for move in moves))"
    )
    done = subprocess.run(
        ["strace", "-f", "-e", "trace=brk,write,fork,clone,clone3", sys.executable, "-c", code],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"needs ptrace: {done.stderr[:200]}")
    pid, *asked = done.stdout.removeprefix("heredone").split()
    between = done.stderr[done.stderr.index('"here"') : done.stderr.index('"done"')].splitlines()
    calls = [line for line in between if " brk(" in line or "brk(" in line.split("]")[-1]]
    in_child = [line for line in calls if line.startswith("[pid") and f"[pid {pid:>5}]" not in line]
    for address in asked:
        assert any(f"brk({address}" in line for line in in_child), (address, calls)
        assert not any(f"brk({address}" in line for line in calls if line not in in_child)


def test_nothing_to_do_makes_no_child() -> None:
    assert brk.moves_in_child([]) == []
    with pytest.raises(ArgumentError, match="at most 1024"):
        brk.moves_in_child([0] * 1025)
    for bad in (1 << 63, -(1 << 63) - 1):
        with pytest.raises(ArgumentError, match="increments"):
            brk.moves_in_child([bad])
    for wrong in ("4096", 1.5, None, True):
        with pytest.raises(ArgumentTypeError, match="increments"):
            brk.moves_in_child([wrong])


def test_no_descriptors_left() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with nothing_leaks():
        free = len(list(Path("/proc/self/fd").iterdir())) - 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            with pytest.raises(HostError) as caught:
                brk.moves_in_child([0])
            assert (caught.value.errno, caught.value.call) == (errno.EMFILE, "pipe2")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_children_that_nobody_waits_for() -> None:
    # With SIGCHLD ignored the kernel reaps them, and waitpid finds none.
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert brk.moves_in_child([PAGE])[0].done
    finally:
        signal.signal(signal.SIGCHLD, before)
