"""The tracefs reader against the running kernel: what it records, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError, HostError
from hvmodel.witness import Tracefs
from tests.need import need
from tests.witness.plainvm import KVM_EXIT_IO, KVM_RUN, PlainVm

ROOT = Path(__file__).parents[2]
EXIT = "kvm:kvm_userspace_exit"


@pytest.fixture
def tracefs() -> Iterator[Tracefs]:
    need("tracefs")
    with Tracefs() as opened:
        yield opened


@pytest.fixture
def vm() -> Iterator[PlainVm]:
    need("kvm")
    with PlainVm() as made:
        yield made


def _until(condition: Callable[[], bool], what: str) -> None:
    # Waits for what must happen, without a claim on how fast.
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"not within a minute: {what}"
        time.sleep(0.02)


def _ours(tracefs: Tracefs) -> list[str]:
    return [n for n in tracefs.listdir("instances") if n.startswith(f"hvmodel-{os.getpid()}-")]


def _python(code: str, *args: str, **kwargs: object) -> subprocess.Popen[str]:
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-c", code, *args], cwd=ROOT, stdout=subprocess.PIPE, text=True, **kwargs
    )


# What is recorded


def test_every_exit_is_recorded_once(tracefs: Tracefs, vm: PlainVm) -> None:
    with tracefs.instance([EXIT]) as trace:
        before = time.monotonic_ns()
        for _ in range(2000):
            assert vm.run() == KVM_EXIT_IO
        after = time.monotonic_ns()
        records = trace.read()
        assert trace.read() == []
        assert trace.lost.total == 0
        assert trace.gaps == []
        assert sum(s.read for s in trace.stats()) == 2000
    assert [r["reason"] for r in records] == [KVM_EXIT_IO] * 2000
    assert {(r.event, r.pid, r["errno"]) for r in records} == {(EXIT, threading.get_native_id(), 0)}
    times = [r.timestamp_ns for r in records]
    assert times == sorted(times)
    # Clock "mono" is CLOCK_MONOTONIC; its fast reading may be off by an adjustment of the clock, under a microsecond.
    assert before - 1000 <= times[0]
    assert times[-1] <= after + 1000


def test_records_are_those_of_the_text(tracefs: Tracefs, vm: PlainVm) -> None:
    with tracefs.instance(["kvm:*", "kvmmmu:*"]) as trace:
        for _ in range(20):
            vm.run()
        vm.kvm_run[1] = 1  # immediate_exit: EINTR, a negative field
        with pytest.raises(InterruptedError):
            fcntl.ioctl(vm.vcpu, KVM_RUN, 0)
        trace.pause()
        trace.set("options/fields", "1")
        lines = [line for line in trace.get("trace").splitlines() if line and not line.startswith("#")]
        records = trace.read()
    assert len(lines) == len(records)
    compared = 0
    for line, record in zip(lines, records, strict=True):
        match = re.match(r".*-(\d+) +\[(\d+)\] \S+ +(\d+)\.(\d{6}): (\w+): (.*)", line)
        assert match is not None, line
        pid, cpu, seconds, micros, name, text = match.groups()
        assert (int(pid), int(cpu), name) == (record.pid, record.cpu, record.event.partition(":")[2])
        # The text rounds to microseconds: (ns + 500) / 1000.
        assert int(seconds) * 10**6 + int(micros) == (record.timestamp_ns + 500) // 1000
        # The text prints "=0x… (…)" in the field's width, bools as "=(…)"; a pointer or array in other ways.
        sizes = {field.name: field.size for field in tracefs.format(record.event).layout}
        numbers = {
            key: int(hexadecimal, 16) if hexadecimal else int(decimal)
            for key, hexadecimal, decimal in re.findall(r"(\w+)=(?:0x([0-9a-f]+) )?\((-?\d+)\)", text)
            if not isinstance(record[key], bytes)
        }
        ours = {key: value % (1 << 8 * sizes[key]) for key, value in record.values.items() if isinstance(value, int)}
        assert numbers == ours, line
        compared += len(numbers)
    assert compared >= 20 * 6
    assert -errno.EINTR in [r.values.get("errno") for r in records]


def test_bytes_of_an_instruction(tracefs: Tracefs, vm: PlainVm) -> None:
    with tracefs.instance(["kvm:kvm_emulate_insn"]) as trace:
        vm.run()
        records = trace.read()
    if not records:
        pytest.skip("this vendor module does not emulate real mode")
    assert records[0]["rip"] == 0x1000
    insn = records[0]["insn"]
    assert isinstance(insn, bytes)
    assert insn[:2] == bytes.fromhex("e610")


def test_strings_and_children(tracefs: Tracefs) -> None:
    with tracefs.instance(["sched:sched_process_exec"]) as trace:
        child = subprocess.Popen(["/bin/true"])
        child.wait()
        records = [r for r in trace.read() if r.pid == child.pid]
    assert [r["filename"] for r in records] == ["/bin/true"]  # __data_loc char[]
    assert records[0]["pid"] == child.pid


def test_new_threads_are_followed_or_not(tracefs: Tracefs, vm: PlainVm) -> None:
    for follow, expected in ((True, 50), (False, 0)):
        with tracefs.instance([EXIT], follow=follow) as trace:
            ids: list[int] = []

            def run(ids: list[int] = ids) -> None:
                ids.append(threading.get_native_id())
                for _ in range(50):
                    vm.run()

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            assert [r.pid for r in trace.read()] == ids * expected


def test_pids_choose_the_threads(tracefs: Tracefs, vm: PlainVm) -> None:
    with tracefs.instance([EXIT], pids=[1]) as trace:
        vm.run()
        assert trace.read() == []
    with tracefs.instance([EXIT], pids=[threading.get_native_id()], follow=False) as trace:
        vm.run()
        assert len(trace.read()) == 1


def test_other_processes_are_not_recorded(tracefs: Tracefs) -> None:
    code = "import os, sys; sys.stdin.read(1); os.kill(os.getpid(), 18); sys.stdin.read()"
    other = _python(code, stdin=subprocess.PIPE)
    try:
        with tracefs.instance(["signal:signal_generate"]) as trace:
            os.kill(os.getpid(), signal.SIGCONT)
            assert other.stdin is not None
            other.stdin.write("x")
            other.stdin.close()
            other.wait()
            records = trace.read()
        assert other.pid not in {r.pid for r in records}
        assert [r["sig"] for r in records if r["pid"] == os.getpid() and r["sig"] == signal.SIGCONT] == [signal.SIGCONT]
    finally:
        other.kill()
        other.wait()
        if other.stdout:
            other.stdout.close()


def test_reading_while_it_runs_and_moves(tracefs: Tracefs, vm: PlainVm) -> None:
    cpus = sorted(os.sched_getaffinity(0))

    def run() -> None:
        for number in range(3000):
            if number % 20 == 0:  # of this thread alone
                os.sched_setaffinity(0, {cpus[number // 20 % len(cpus)]})
            vm.run()

    with tracefs.instance([EXIT]) as trace:
        thread = threading.Thread(target=run)
        thread.start()
        records = []
        while thread.is_alive():
            records += trace.read()
        thread.join()
        records += trace.read()
        assert len(records) == 3000
        assert trace.lost.total == 0
    assert {r.cpu for r in records} == set(cpus[:150])
    times = [r.timestamp_ns for r in records]
    assert times == sorted(times)


def test_pause(tracefs: Tracefs, vm: PlainVm) -> None:
    with tracefs.instance([EXIT]) as trace:
        trace.pause()
        vm.run()
        trace.resume()
        vm.run()
        assert len(trace.read()) == 1
        assert trace.lost.total == 0


@pytest.mark.parametrize("overwrite", [True, False])
def test_lost_events_are_counted(tracefs: Tracefs, vm: PlainVm, overwrite: bool) -> None:
    with tracefs.instance([EXIT], buffer_size=4096, overwrite=overwrite) as trace:
        for _ in range(5000):
            vm.run()
        lost, records = trace.lost, trace.read()
        assert len(records) + lost.total == 5000
        assert 0 < len(records) < 5000
        assert (lost.overrun > 0, lost.dropped > 0) == (overwrite, not overwrite)
        counts = [gap.count for gap in trace.gaps]
        if overwrite:
            assert counts
            assert None in counts or sum(c or 0 for c in counts) == lost.overrun
        else:
            assert counts == []
        assert trace.lost == lost
        for _ in range(10):
            vm.run()
        assert len(trace.read()) == 10


# What is left behind: nothing


TOP_FILES = (
    "tracing_on", "set_event", "set_event_pid", "trace_clock", "buffer_size_kb", "current_tracer", "trace_options",
)  # fmt: skip


def test_nothing_outside_the_instance_changes(tracefs: Tracefs, vm: PlainVm) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    before = {name: tracefs.read_text(name) for name in TOP_FILES}
    with Tracefs() as other, other.instance([EXIT], clock="boot", buffer_size=65536) as trace:
        trace.set("options/fields", "1")
        vm.run()
        assert len(trace.read()) == 1
        assert {name: tracefs.read_text(name) for name in TOP_FILES} == before
        assert Path("/proc/self/mountinfo").read_text() == mounts
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert {name: tracefs.read_text(name) for name in TOP_FILES} == before


def _children() -> set[str]:
    return {child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()}


def test_no_descriptor_child_or_instance_is_left(tracefs: Tracefs) -> None:
    fds, children = sorted(os.listdir("/proc/self/fd")), _children()
    for _ in range(3):
        with Tracefs() as other, other.instance([EXIT]) as trace:
            trace.read()
        with Tracefs() as other:
            with pytest.raises(ArgumentError, match="clock"):
                other.instance([EXIT], clock="sundial")
            with pytest.raises(HostError, match="set_event_pid"):
                other.instance([EXIT], pids=[2**31])
            with pytest.raises(ArgumentError, match="buffer_size"):
                other.instance([EXIT], buffer_size=0)
    assert _ours(tracefs) == []
    assert sorted(os.listdir("/proc/self/fd")) == fds
    assert _children() == children


def test_close(tracefs: Tracefs) -> None:
    other = Tracefs()
    trace = other.instance([EXIT])
    name = trace.name
    other.close()  # closes its instances
    other.close()
    trace.close()
    assert name not in tracefs.listdir("instances")
    assert (repr(trace), repr(other)) == ("<Instance closed>", "<Tracefs closed>")
    uses: list[Callable[[], object]] = [trace.read, trace.stats, trace.pause, lambda: trace.get("trace")]
    for call in [*uses, lambda: trace.lost, other.events, other.sweep, other.fileno]:
        with pytest.raises(ClosedError):
            call()


def test_forgotten_warns_and_is_removed(tracefs: Tracefs) -> None:
    trace = tracefs.instance([EXIT])
    name = trace.name
    with pytest.warns(ResourceWarning, match=name):
        del trace
    assert name not in tracefs.listdir("instances")


OPENER = """
import sys, time
from hvmodel.witness import Tracefs
tracefs = Tracefs()
trace = tracefs.instance(["kvm:kvm_userspace_exit", "sched:sched_switch"])
print(trace.name, trace._state.guard.pid, flush=True)
exec(sys.argv[1])
"""


def _gone(pid: str) -> bool:
    # A process is gone when it is a zombie too: who reaps an orphan is not ours to choose.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _opener(then: str, **kwargs: object) -> tuple[subprocess.Popen[str], str, str]:
    child = _python(OPENER, then, **kwargs)
    assert child.stdout is not None
    name, guard = child.stdout.readline().split()
    child.stdout.close()
    return child, name, guard


def test_sigkill_of_the_process_group(tracefs: Tracefs) -> None:
    child, name, guard = _opener("time.sleep(600)", start_new_session=True)
    assert name in tracefs.listdir("instances")
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    _until(lambda: name not in tracefs.listdir("instances"), "the guard removes the instance")
    _until(lambda: _gone(guard), "the guard ends")


def test_exit_without_close(tracefs: Tracefs) -> None:
    for then in ("", "import os; os._exit(0)", "import os; os.abort()"):
        child, name, guard = _opener(then, stderr=subprocess.DEVNULL)
        child.wait()
        _until(lambda name=name: name not in tracefs.listdir("instances"), then)  # type: ignore[misc]
        _until(lambda guard=guard: _gone(guard), then)  # type: ignore[misc]


def test_guard_holds_nothing_of_ours(tracefs: Tracefs) -> None:
    end, other = os.pipe()
    os.set_inheritable(other, True)
    with tracefs.instance([EXIT]) as trace:
        state = trace._state
        assert state is not None
        assert state.guard is not None
        links = {os.readlink(f"/proc/{state.guard.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{state.guard.pid}/fd")}
        assert os.readlink(f"/proc/self/fd/{other}") not in links
        assert not any("trace_pipe_raw" in link for link in links)
        assert os.getsid(state.guard.pid) == state.guard.pid
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(state.guard.pid, number)
        assert state.guard.poll() is None
    os.close(end)
    os.close(other)


def test_sweep_when_owner_and_guard_are_killed(tracefs: Tracefs) -> None:
    child, name, guard = _opener("time.sleep(600)")
    assert tracefs.sweep() == [] or name in tracefs.listdir("instances")  # a living owner's is not touched
    os.kill(int(guard), signal.SIGKILL)
    child.kill()
    child.wait()
    assert name in tracefs.listdir("instances")
    with tracefs.instance([EXIT]):  # sweeps first
        assert name not in tracefs.listdir("instances")


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_after_fork(tracefs: Tracefs, vm: PlainVm) -> None:
    trace = tracefs.instance([EXIT])
    child = os.fork()
    if child == 0:
        try:
            trace.close()  # only the child's copies
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert trace.name in tracefs.listdir("instances")
    vm.run()
    assert len(trace.read()) == 1
    # A child that keeps its copies keeps the instance busy until it ends.
    end, other = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(other)
        os.read(end, 1)
        os._exit(0)
    os.close(end)
    trace.close()
    os.close(other)
    os.waitpid(child, 0)
    _until(lambda: trace.name not in tracefs.listdir("instances"), "the guard removes it after the child's end")


# Mounts, rights, arguments


def test_detached_mount_only_without_another(tracefs: Tracefs) -> None:
    mounted = any(" - tracefs " in line for line in Path("/proc/self/mountinfo").read_text().splitlines())
    assert tracefs.detached == (not mounted)


def test_existing_mount_is_used(tracefs: Tracefs) -> None:
    # In a mount namespace of its own, with a path that mountinfo escapes.
    if shutil.which("unshare") is None:
        pytest.skip("no unshare(1)")
    code = (
        "from hvmodel.witness import Tracefs\n"
        "with Tracefs() as t, t.instance(['kvm:kvm_userspace_exit']) as i:\n"
        "    print(t.detached, i.name in t.listdir('instances'), i.read())\n"
    )
    with tempfile.TemporaryDirectory(prefix="a mount ") as place:
        script = 'mount -t tracefs tracefs "$1" && exec "$2" -c "$3"'
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", script, "sh", place, sys.executable, code],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
    assert (done.stdout, done.stderr) == ("False True []\n", "")


def _refused(prefix: list[str], code: str = "") -> str:
    code = f"from hvmodel.witness import Tracefs\n{code}try: Tracefs()\nexcept OSError as e: print(e)\n"
    done = subprocess.run([*prefix, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_without_root(tracefs: Tracefs) -> None:
    need("root")
    if not tracefs.detached:
        pytest.skip("tracefs is mounted; its rights decide")
    # Imported first: the interpreter itself may be unreadable to others.
    text = _refused([], "import ctypes, os; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n")
    for part in ("fsopen", "EPERM", "root (CAP_SYS_ADMIN)"):
        assert part in text


def test_in_a_pid_namespace(tracefs: Tracefs) -> None:
    need("root")
    if shutil.which("unshare") is None:
        pytest.skip("no unshare(1)")
    assert "the initial pid namespace" in _refused(["unshare", "--pid", "--fork", "--mount-proc"])


def test_unknown_events_name_the_nearest(tracefs: Tracefs) -> None:
    with pytest.raises(ArgumentError, match="kvm:kvm_userspace_exit"):
        tracefs.instance(["kvm:kvm_userspace_exits"])
    with pytest.raises(ArgumentError, match="kvm:kvm_userspace_exit"):
        tracefs.instance(["kvm_userspace_exit"])
    with pytest.raises(ArgumentError, match="kvm:kvm_userspace_exit"):
        tracefs.instance(["mvk:kvm_userspace_exit"])
    with pytest.raises(ArgumentError, match="pattern"):
        tracefs.format("kvm:*")
    assert _ours(tracefs) == []


def test_events_and_formats(tracefs: Tracefs) -> None:
    assert tracefs.events(EXIT) == [EXIT]
    # The directories name the same events as available_events, which the reader uses.
    names = [e.partition(":")[2] for e in tracefs.events("kvm:*")]
    assert tracefs.listdir("events/kvm") == sorted([*names, "enable", "filter"])
    for event in tracefs.events("kvm*:*"):
        assert tracefs.format(event).event == event


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"events": []}, ArgumentError),
        ({"events": [5]}, ArgumentTypeError),
        ({"pids": []}, ArgumentError),
        ({"pids": [0]}, ArgumentError),
        ({"pids": ["1"]}, ArgumentTypeError),
        ({"pids": [True]}, ArgumentTypeError),
        ({"buffer_size": -1}, ArgumentError),
        ({"buffer_size": "1M"}, ArgumentTypeError),
        ({"buffer_size": 1 << 60}, ArgumentError),
    ],
)
def test_bad_arguments(tracefs: Tracefs, arguments: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        tracefs.instance(**{"events": [EXIT], **arguments})  # type: ignore[arg-type]
    assert _ours(tracefs) == []


def test_files_outside_the_instance_are_refused(tracefs: Tracefs) -> None:
    with tracefs.instance([EXIT]) as trace:
        for path in ("../../tracing_on", "events/../../../tracing_on", "a\0b"):
            with pytest.raises(ArgumentError, match="inside the instance"):
                trace.set(path, "0")
            with pytest.raises(ArgumentError, match="inside the instance"):
                trace.get(path)
        with pytest.raises(HostError) as caught:
            trace.get("no such file")
        assert caught.value.errno == errno.ENOENT


def test_any_pattern_lists_or_is_refused() -> None:
    need("tracefs")
    half = st.text(max_size=5)
    with Tracefs() as opened:

        @given(st.text(max_size=12) | st.builds("{}:{}".format, half, st.just("*") | half))
        @settings(max_examples=20, deadline=None)
        def search(pattern: str) -> None:
            with contextlib.suppress(ArgumentError):
                assert opened.events(pattern)

        search()
