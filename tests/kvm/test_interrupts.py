"""Interrupting a guest: timeouts, kicks, Ctrl-C and other signals, the end of the interpreter, os.fork.

A lost interruption shows as a guest that runs on: every wait ends after many seconds, and then fails the test.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hvmodel as hv
from hvmodel._ffi import lib
from tests.cases import cases
from tests.kvm import interrupts
from tests.kvm.guest import Guest
from tests.need import need

ROOT = Path(__file__).parents[2]
SPIN, PORTS = interrupts.SPIN, interrupts.PORTS
LONG = 60.0

NewGuest = Callable[..., Guest]


@pytest.fixture(autouse=True)
def _no_heartbeat() -> Iterator[None]:
    """A lost interruption must not be mended a tenth of a second later, or these tests could not fail."""
    lib.hv_set_heartbeat(interrupts.HOUR_NS)
    yield
    lib.hv_set_heartbeat(interrupts.BEAT_NS)


# ---- timeouts ----


def test_no_time_at_all(guest: NewGuest) -> None:
    g = guest(SPIN)
    for _ in range(50):
        assert g.vcpu.run(timeout=0) == hv.Interrupted("timeout")
    assert g.vcpu.run_until(1) == hv.Interrupted("timeout")


def test_a_timeout_after_one_that_had_passed_at_once(guest: NewGuest) -> None:
    # A timer that fires before timer_settime has returned must not count as armed.
    g = guest(SPIN)
    for _ in range(cases(100, 5000)):
        g.vcpu.run(timeout=0)
        assert g.vcpu.run(timeout=1e-4) == hv.Interrupted("timeout")


@pytest.mark.parametrize("timeout", [1e-9, 1e-6, 1e-5, 1e-4, 1e-3, 0.05])
def test_a_timeout_does_not_come_early(guest: NewGuest, timeout: float) -> None:
    g = guest(SPIN)
    for _ in range(3):
        begin = time.monotonic_ns()
        assert g.vcpu.run(timeout) == hv.Interrupted("timeout")
        assert time.monotonic_ns() - begin >= int(timeout * 1e9)


def test_longer_than_the_heartbeat(guest: NewGuest) -> None:
    begin = time.monotonic_ns()
    assert guest(SPIN).vcpu.run(0.35) == hv.Interrupted("timeout")
    assert time.monotonic_ns() - begin >= 350_000_000


def test_deadlines_that_move(guest: NewGuest) -> None:
    # The one timer of a thread serves earlier and later deadlines, and none, and two vCPUs.
    one, other = guest(SPIN).vcpu, guest(PORTS).vcpu
    for _ in range(cases(20, 200)):
        assert other.run(LONG) == hv.IoOut(0x80, 1, 1, b"\0")
        assert one.run(random.random() * 2e-3) == hv.Interrupted("timeout")
        assert other.run() == hv.IoOut(0x80, 1, 1, b"\0")
        assert one.run(random.random() * 2e-3) == hv.Interrupted("timeout")


def test_a_deadline_holds_over_many_exits(guest: NewGuest) -> None:
    vcpu = guest(PORTS).vcpu
    deadline = time.monotonic_ns() + 20_000_000
    exits = 0
    while (exit := vcpu.run_until(deadline)) != hv.Interrupted("timeout"):
        assert exit == hv.IoOut(0x80, 1, 1, b"\0")
        exits += 1
    assert exits
    assert time.monotonic_ns() >= deadline


def test_an_exit_comes_before_a_far_deadline(guest: NewGuest) -> None:
    g = guest()
    assert g.vcpu.run(1e9) == hv.Hlt()
    g.load(b"\xf4")
    assert g.vcpu.run_until((1 << 63) - 1) == hv.Hlt()


def test_timeouts_in_many_threads(guest: NewGuest) -> None:
    bad: list[object] = []

    def runner(g: Guest, seed: int) -> None:
        times = random.Random(seed)
        for _ in range(cases(20, 300)):
            exit = g.vcpu.run(times.random() * 3e-3)
            if exit != hv.Interrupted("timeout"):
                bad.append(exit)

    threads = [threading.Thread(target=runner, args=(guest(SPIN), n)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()
    assert not bad


def test_one_vcpu_in_one_thread_after_the_other(guest: NewGuest) -> None:
    g = guest(SPIN)
    for _ in range(cases(10, 100)):
        got: list[object] = []
        thread = threading.Thread(target=lambda got=got: got.append(g.vcpu.run(1e-3)))
        thread.start()
        thread.join(LONG)
        assert got == [hv.Interrupted("timeout")]
        assert g.vcpu.run(1e-3) == hv.Interrupted("timeout")


# ---- kicks ----


def test_a_kick_before_the_run_is_kept_and_kicks_do_not_add_up(guest: NewGuest) -> None:
    g = guest(SPIN)
    assert [g.vcpu.kick() for _ in range(3)] == [False] * 3
    assert g.vcpu.run(LONG) == hv.Interrupted("kick")
    assert g.vcpu.run(1e-3) == hv.Interrupted("timeout")


def test_a_kick_at_an_exit_comes_next(guest: NewGuest) -> None:
    g = guest(PORTS)
    assert g.run() == hv.IoOut(0x80, 1, 1, b"\0")
    g.vcpu.kick()
    assert [g.run(), g.run()] == [hv.Interrupted("kick"), hv.IoOut(0x80, 1, 1, b"\0")]


def kicked(g: Guest, rounds: int, pause: Callable[[], None], jobs: int = 1) -> None:
    """Kick a guest that is run on and on, `rounds` times by each of `jobs` threads, and see each kick arrive.

    An answered kick is one after whose begin a run came back with Interrupted("kick").
    """
    began = answered = 0
    lock, bad = threading.Lock(), []
    arrived = threading.Condition(lock)
    stop = False

    def runner() -> None:
        nonlocal answered
        while not stop:
            exit = g.vcpu.run(LONG)
            if exit == hv.Interrupted("kick"):
                with arrived:
                    answered += 1
                    arrived.notify_all()
            elif not isinstance(exit, hv.IoOut):
                bad.append(exit)
                return

    def kicker() -> None:
        nonlocal began
        for _ in range(rounds):
            pause()
            with arrived:
                before = answered
            g.vcpu.kick()
            with arrived:
                began += 1
                if not arrived.wait_for(lambda before=before: answered > before, LONG / 2):
                    bad.append("lost")
                    return

    thread = threading.Thread(target=runner)
    thread.start()
    kickers = [threading.Thread(target=kicker) for _ in range(jobs)]
    for each in kickers:
        each.start()
    for each in kickers:
        each.join()
    stop = True
    g.vcpu.kick()
    thread.join(LONG)
    assert not thread.is_alive()
    assert not bad
    assert began == rounds * jobs
    assert (rounds if jobs == 1 else 1) <= answered <= rounds * jobs + 1


def some_time(most: float) -> Callable[[], None]:
    """Nothing, a few loops, or a sleep of up to `most` seconds."""

    def pause() -> None:
        kind = random.random()
        if kind < 0.4:
            time.sleep(random.random() * most)
        elif kind < 0.8:
            for _ in range(random.randrange(200)):
                pass

    return pause


@pytest.mark.parametrize("code", [SPIN, PORTS], ids=["spinning", "exiting"])
def test_no_kick_is_lost(guest: NewGuest, code: bytes) -> None:
    kicked(guest(code), cases(500, 5000), some_time(2e-4))


def test_no_kick_of_several_kickers_is_lost(guest: NewGuest) -> None:
    kicked(guest(PORTS), cases(60, 1000), some_time(2e-4), jobs=4)


def test_a_kick_of_a_running_guest_tells_that_it_arrived(guest: NewGuest) -> None:
    g = guest(SPIN)
    arrived = 0
    for _ in range(20):
        got: list[object] = []
        thread = threading.Thread(target=lambda got=got: got.append(g.vcpu.run(LONG)))
        thread.start()
        while g.vcpu._c.state != 2:
            time.sleep(1e-4)
        arrived += g.vcpu.kick()
        thread.join(LONG)
        assert got == [hv.Interrupted("kick")]
    assert arrived  # it waits for 1 ms at most: on a busy machine, not always


def test_a_kick_of_a_guest_that_c_serves(guest: NewGuest) -> None:
    g = guest(PORTS)
    g.vcpu.batch = hv.Batch(unclaimed_pio="ignore")
    kicked(g, cases(200, 2000), some_time(5e-4))
    assert g.vcpu.batch.nr_served


# ---- signals, each in a process of its own ----


def child(name: str, rounds: int, *, status: int = 0, forgets: bool = False) -> str:
    """Run a program of interrupts.py; its output."""
    need("kvm")
    leaks = ["-W", "ignore::ResourceWarning"] if forgets else []
    done = subprocess.run(
        [sys.executable, "-W", "error", *leaks, "-X", "faulthandler", "-m", "tests.kvm.interrupts", name, str(rounds)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LONG + rounds / 10,
        check=False,
    )
    assert done.returncode == status, done.stderr
    if status == 0:
        assert "ok" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "name", ["spinning", "exiting", "at_the_entry", "other_threads", "quiet_handler", "worker", "storm", "capturing"]
)
def test_a_signal_stops_the_guest(name: str) -> None:
    child(name, {"at_the_entry": cases(2000, 50_000), "storm": cases(300, 5000)}.get(name, cases(150, 5000)))


@pytest.mark.parametrize("name", ["replaced_handler", "chained_twice", "ignored"])
def test_the_handler_of_now_is_what_counts(name: str) -> None:
    child(name, cases(20, 300))


def test_the_default_action_is_kept() -> None:
    child("default_action", 1, status=-signal.SIGINT)


@pytest.mark.parametrize("name", ["exit_non_daemon", "exit_daemon", "exit_executor", "exit_executor_late"])
def test_the_interpreter_exits_while_guests_run(name: str) -> None:
    for _ in range(cases(1, 20)):
        child(name, 1, forgets=True)


def test_a_machine_made_while_the_interpreter_exits() -> None:
    assert child("exit_late", 1).split() == ["ok", "refused"]


def test_after_fork() -> None:
    child("forked", 1)


def test_without_a_timer() -> None:
    child("no_signal_queue", 1)
