"""Programs that are interrupted while a guest runs: `python -m tests.kvm.interrupts NAME ROUNDS`.

Each is a process of its own for test_interrupts.py, ends with status 0 and prints "ok", or is killed when it hangs.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import hvmodel as hv
import hvmodel.kvm.batch  # else the first run() does, and a Ctrl-C in importlib leaves a file of importlib's open
from hvmodel._ffi import lib

SPIN = b"\xeb\xfe"  # jmp $
PORTS = bytes.fromhex("e680 ebfc")  # out 0x80, al for ever

# A handler in C, that Python's signal module does not know: it takes 50 us.
SLOW = r"""
#include <signal.h>
#include <time.h>
volatile int calls;
static long now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_nsec; }
static void slow(int number)
{
	long begin = now();
	while (number && (now() - begin + 1000000000) % 1000000000 < 50000)
		;
	calls++;
}
int install(int number) { struct sigaction a = { .sa_handler = slow }; return sigaction(number, &a, 0); }
"""
programs: dict[str, Callable[[int], None]] = {}


def program(function: Callable[[int], None]) -> Callable[[int], None]:
    programs[function.__name__] = function
    return function


HOUR_NS = 3600 * 10**9
BEAT_NS = 100_000_000


def program_with_heartbeat(function: Callable[[int], None]) -> Callable[[int], None]:
    """A program whose subject is what the heartbeat mends; from the others it would hide what was lost."""
    heartbeats.add(function.__name__)
    return program(function)


heartbeats: set[str] = set()


@contextmanager
def guest(code: bytes = SPIN, **named: object) -> Iterator[hv.Machine]:
    with hv.Machine(ram="64K", **named) as machine:
        machine.load(0x7C00, code)
        machine.vcpu.real_mode()
        yield machine


class Sender(threading.Thread):
    """Sends a signal some time after it was asked to; the time is random, up to `spread` seconds."""

    def __init__(self, number: int, spread: float, send: Callable[[int], None] | None = None) -> None:
        super().__init__(daemon=True)
        self.number, self.spread = number, spread
        self.send = send or (lambda number: os.kill(os.getpid(), number))
        self.asked = threading.Lock()  # of C: an exception cannot leave it half released
        self.asked.acquire()
        self.start()

    def run(self) -> None:
        while True:
            self.asked.acquire()
            time.sleep(random.random() * self.spread)
            self.send(self.number)


def interrupted(rounds: int, run: Callable[[], object], ask: Callable[[], None]) -> None:
    """Each time `ask` is called, a KeyboardInterrupt must come out of a guest that runs on and on."""
    for _ in range(rounds):
        try:
            ask()
            while True:
                run()
        except KeyboardInterrupt:
            pass


@program
def spinning(rounds: int) -> None:
    """Ctrl-C on a guest that never exits, by Vcpu.run and Machine.run in turns."""
    with guest() as machine:
        sender = Sender(signal.SIGINT, 0.002)
        interrupted(rounds // 2, machine.vcpu.kvm.run, sender.asked.release)
        interrupted(rounds // 2, machine.run, sender.asked.release)
        interrupted(rounds // 2, lambda: machine.run(timeout=30), sender.asked.release)


@program
def exiting(rounds: int) -> None:
    """Ctrl-C on a guest that exits all the time: into Python, and into C alone."""
    with guest(PORTS) as machine:
        sender = Sender(signal.SIGINT, 0.002)
        interrupted(rounds // 2, machine.vcpu.kvm.run, sender.asked.release)
    with guest(PORTS, unclaimed="open_bus") as machine:
        interrupted(rounds // 2, machine.run, sender.asked.release)


@program
def at_the_entry(rounds: int) -> None:
    """A signal within the microseconds around the entry into KVM_RUN, from a timer of the process."""

    def handler(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, handler)
    with guest() as machine:
        run = machine.vcpu.kvm.run
        run(0.001)
        for spread in (20e-6, 60e-6):

            def ask(spread: float = spread) -> None:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + random.random() * spread)

            interrupted(rounds // 2, run, ask)


@program
def other_threads(rounds: int) -> None:
    """Threads that do not block the signal are alive, and it is one of them that takes it."""
    stop = threading.Event()
    others = [threading.Thread(target=stop.wait) for _ in range(3)]
    for other in others:
        other.start()

    def to_another(number: int) -> None:
        signal.pthread_kill(random.choice(others).ident, number)

    try:
        with guest() as machine:
            sender = Sender(signal.SIGINT, 0.002, to_another)
            interrupted(rounds, machine.vcpu.kvm.run, sender.asked.release)
    finally:
        stop.set()


@program
def quiet_handler(rounds: int) -> None:
    """A handler that does not raise has run when the run comes back with Interrupted("signal")."""
    seen = []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    with guest() as machine:
        lib.hv_chain_signals()
        sender = Sender(signal.SIGUSR1, 0.002)
        for n in range(rounds):
            sender.asked.release()
            assert machine.vcpu.kvm.run(30) == hv.Interrupted("signal")
            assert len(seen) == n + 1, (len(seen), n)
        sender.asked.release()
        stop = machine.run(timeout=30)
        assert (stop.reason, stop.exit) == ("interrupted", hv.Interrupted("signal")), stop


@program
def worker(rounds: int) -> None:
    """The guest runs in a thread that the main thread joins: both are interrupted."""
    with guest() as machine:
        sender = Sender(signal.SIGINT, 0.002)
        for _ in range(rounds):
            got = []
            done = (
                threading.Event()
            )  # joined twice, for an interrupted join() of Python 3.11 takes the thread for ended

            def runner(got: list[object] = got, done: threading.Event = done) -> None:
                got.append(machine.vcpu.kvm.run(30))
                done.set()

            thread = threading.Thread(target=runner)
            thread.start()
            while machine.vcpu.kvm._c.state != 2:
                time.sleep(1e-4)
            try:
                sender.asked.release()
                while True:
                    thread.join(30)
            except KeyboardInterrupt:
                pass
            except RuntimeError as error:  # join() of Python 3.11, interrupted between two of its lines
                if str(error) != "release unlocked lock" or not isinstance(error.__context__, KeyboardInterrupt):
                    raise
            assert done.wait(30)
            assert got == [hv.Interrupted("signal")], got


@program
def replaced_handler(rounds: int) -> None:
    """signal.signal() after the first run, and asyncio.run() between runs: the handler of now is what counts."""
    import asyncio

    class Mine(Exception):
        pass

    def handler(number: int, frame: object) -> None:
        raise Mine

    with guest() as machine:
        sender = Sender(signal.SIGINT, 0.0005)
        for _ in range(rounds):
            interrupted(1, machine.vcpu.kvm.run, sender.asked.release)
            old = signal.signal(signal.SIGINT, handler)
            try:
                sender.asked.release()
                while True:
                    machine.vcpu.kvm.run()
            except Mine:
                pass
            signal.signal(signal.SIGINT, old)
            asyncio.run(asyncio.sleep(0))


@program
def ignored(rounds: int) -> None:
    """SIG_IGN stays SIG_IGN: the guest is not interrupted."""
    with guest() as machine:
        machine.vcpu.kvm.run(0.001)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for _ in range(rounds):
            os.kill(os.getpid(), signal.SIGINT)
            assert machine.vcpu.kvm.run(0.001) == hv.Interrupted("timeout")


@program
def default_action(rounds: int) -> None:
    """SIG_DFL stays SIG_DFL: the process dies of the signal."""
    with guest() as machine:
        machine.vcpu.kvm.run(0.001)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        Sender(signal.SIGINT, 0.001).asked.release()
        machine.vcpu.kvm.run(30)


@program
def capturing(rounds: int) -> None:
    """Ctrl-C while output is captured: not a byte is lost, doubled or given to somebody else."""
    # mov eax, 0; 1: out 0x50, eax; inc eax; jmp 1b
    with guest(bytes.fromhex("6631c0 66e750 6640 ebf9")) as machine:
        out = hv.Capture(8192)
        machine.batch.pio(0x50, 4, write=out)
        sender = Sender(signal.SIGINT, 0.01)
        data = b""
        for n in range(rounds):
            interrupted(1, lambda: machine.run(timeout=30), sender.asked.release)
            if n % 10 == 9:
                data += out.read()
        data += out.read()
        nr = len(data) // 4
        assert data == b"".join(value.to_bytes(4, "little") for value in range(nr)), nr


@program
def storm(rounds: int) -> None:
    """A Ctrl-C that comes while the handler of another signal is at work is not lost."""
    import ctypes
    import subprocess

    with TemporaryDirectory() as directory:
        library = f"{directory}/slow.so"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-O", "-x", "c", "-o", library, "-"], input=SLOW, text=True, check=True
        )
        slow = ctypes.CDLL(library)
    parent = os.getpid()
    with guest() as machine:
        slow.install(signal.SIGUSR1)
        lib.hv_chain_signals()
        child = os.fork()
        if child == 0:
            while os.getppid() == parent:
                os.kill(parent, signal.SIGUSR1)
        try:
            while not ctypes.c_int.in_dll(slow, "calls").value:
                time.sleep(1e-3)
            sender = Sender(signal.SIGINT, 0.0005)
            interrupted(rounds, machine.vcpu.kvm.run, sender.asked.release)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@program
def chained_twice(rounds: int) -> None:
    """A handler that passes the signal on to the one before it (us) does not hide the one behind us."""
    import faulthandler

    seen = []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    with guest() as machine, open(os.devnull, "w") as null:
        for n in range(rounds):
            faulthandler.register(signal.SIGUSR1, file=null, chain=True)
            lib.hv_chain_signals()
            os.kill(os.getpid(), signal.SIGUSR1)
            machine.vcpu.kvm.run(0.001)
            assert len(seen) == n + 1, (len(seen), n)


@program
def exit_non_daemon(rounds: int) -> None:
    """The interpreter exits while a thread runs a guest: it is told to end."""
    machine = hv.Machine(ram="64K")
    machine.load(0x7C00, SPIN)
    machine.vcpu.real_mode()

    def forever() -> None:
        while True:
            machine.vcpu.kvm.run()

    threading.Thread(target=forever).start()
    while machine.vcpu.kvm._c.state != 2:
        time.sleep(1e-4)


@program
def exit_daemon(rounds: int) -> None:
    """The same with daemon threads, several of them, that exit into Python all the time."""
    for _ in range(4):
        machine = hv.Machine(ram="64K")
        machine.load(0x7C00, PORTS)
        machine.vcpu.real_mode()

        def forever(machine: hv.Machine = machine) -> None:
            while True:
                machine.vcpu.kvm.run()

        threading.Thread(target=forever, daemon=True).start()
    time.sleep(0.02)


@program
def exit_executor(rounds: int) -> None:
    """The same in a concurrent.futures thread."""
    from concurrent.futures import ThreadPoolExecutor

    machine = hv.Machine(ram="64K")
    machine.load(0x7C00, SPIN)
    machine.vcpu.real_mode()
    ThreadPoolExecutor(1).submit(machine.run)
    while machine.vcpu.kvm._c.state != 2:
        time.sleep(1e-4)


@program_with_heartbeat
def exit_executor_late(rounds: int) -> None:
    """The same, with the executor imported after the machine was made: its exit hook comes before ours."""
    machine = hv.Machine(ram="64K")
    machine.load(0x7C00, SPIN)
    machine.vcpu.real_mode()
    assert "concurrent.futures.thread" not in sys.modules
    from concurrent.futures import ThreadPoolExecutor

    ThreadPoolExecutor(1).submit(machine.run)
    while machine.vcpu.kvm._c.state != 2:
        time.sleep(1e-4)


@program
def exit_late(rounds: int) -> None:
    """A thread that outlives the main thread makes its first machine: it may, but not run it."""

    def late() -> None:
        threading.main_thread().join()
        time.sleep(0.05)
        with hv.Machine(ram="64K") as machine:
            machine.load(0x7C00, SPIN)
            machine.vcpu.real_mode()
            try:
                machine.run()
            except SystemExit:
                print("refused", flush=True)

    import hvmodel.machine  # noqa: F401  # the import system is not to be used then

    threading.Thread(target=late).start()


@program
def forked(rounds: int) -> None:
    """What a child of os.fork may do with its parent's machine, and with one of its own."""
    with guest() as machine:
        vcpu = machine.vcpu.kvm
        vcpu.run(0.001)
        thread = threading.Thread(target=vcpu.run, args=(30,))
        thread.start()
        while vcpu._c.state != 2:
            time.sleep(1e-4)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for call in (vcpu.run, lambda: vcpu.regs, vcpu.complete_io, lambda: machine.vm.create_vcpu(7)):
                    try:
                        call()
                    except hv.ForkedError:
                        continue
                    os._exit(2)
                with guest(b"\xf4") as own:
                    assert own.run(30).reason == "halted"
                    own.load(0x7C00, SPIN)
                    own.vcpu.real_mode()
                    assert own.run(0.01).reason == "timeout"
                    threading.Timer(0.01, own.kick).start()
                    assert own.run(30).reason == "interrupted"
                machine.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert vcpu._c.state == 2  # and the parent's guest has run on
        vcpu.kick()
        thread.join(30)
        assert not thread.is_alive()
        assert vcpu.run(0.01) == hv.Interrupted("timeout")


@program
def no_signal_queue(rounds: int) -> None:
    """No timer to be had (ulimit -i 0): an error that says so, not an endless loop of Again."""
    import resource

    resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, 0))
    with guest() as machine:
        for call in (machine.vcpu.kvm.run, machine.run, lambda: machine.run(timeout=0.1)):
            refused = None
            try:
                call()
            except hv.HostError as error:
                refused = error
            assert refused is not None, call
            assert refused.call == "timer_create", refused
            assert "RLIMIT_SIGPENDING" in str(refused), refused


if __name__ == "__main__":
    lib.hv_set_heartbeat(BEAT_NS if sys.argv[1] in heartbeats else HOUR_NS)
    programs[sys.argv[1]](int(sys.argv[2]))
    print("ok", flush=True)
