"""Memory backends against QEMU: the system calls that make and release their memory, and the options that are refused.

`check_alloc` runs QEMU and a Python process of ours under strace, has both make the same backends one after the other
(QEMU by QMP's object-add and object-del), and compares what each did:

    compared    memfd_create, ftruncate, fcntl, mmap, munmap, madvise, mbind, close: of the block's file, and of the
                addresses of its reservation; their order, arguments and results
    addresses   relative to the block's first byte, which is where mmap is called with MAP_FIXED
    left out    what concerns other memory and files (both allocate for themselves, QEMU the block's dirty bitmaps); and
                F_GET_SEALS of files without seals of ours: we ask whether they can shrink, QEMU does not care
    by rule     the munmap in front of the block and the one behind its guard page depend on where the kernel put the
                reservation: each side is held to the rule (front: if it is not aligned; behind: if more is left than a
                page), and then they are not compared
    threads     the parts of a preallocation by several threads: as a set

`check_backends` has QEMU and us make backends with random options: what QEMU refuses we refuse.  What we refuse besides
is listed in hvmodel.ram.backend, and `_stricter` here says which options that are.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time

from ..errors import ArgumentError, HvError
from ..ram.backend import MemoryBackend, MemoryBackendFile, MemoryBackendMemfd, MemoryBackendRam
from .registry import check
from .result import Lacking

TYPE_CHECKING = False
if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, Sequence
    from typing import Self

    from .qemu import Qemu
    from .result import Tally

__all__ = [
    "AllocationError",
    "Call",
    "allocations_of",
    "backends",
    "check_alloc",
    "check_backends",
    "parse_strace",
    "sequences",
]

_CALLS = "memfd_create,ftruncate,fcntl,mmap,munmap,madvise,mbind,close,openat"
_MiB = 1 << 20


def backends(directory: str) -> dict[str, MemoryBackend]:
    """The backends that `check_alloc` compares, by a name; those of files are made in `directory`."""
    long = os.path.join(directory, "long")
    memory: dict[str, MemoryBackend] = {
        "ram": MemoryBackendRam("3M"),
        "ram share": MemoryBackendRam("1M", share=True),
        "ram reserve=off": MemoryBackendRam("4M", reserve=False, merge=False, dump=False),
        "ram prealloc": MemoryBackendRam("2M", prealloc=True),
        "memfd": MemoryBackendMemfd("16M"),
        "memfd of a page": MemoryBackendMemfd("4K"),
        "memfd share=off": MemoryBackendMemfd("2M", share=False),
        "memfd seal=off": MemoryBackendMemfd("2M", seal=False),
        "memfd reserve=off": MemoryBackendMemfd("2M", reserve=False),
        "memfd merge=off,dump=off": MemoryBackendMemfd("2M", merge=False, dump=False),
        "memfd prealloc": MemoryBackendMemfd("2M", prealloc=True, prealloc_threads=4),
        "memfd prealloc by threads": MemoryBackendMemfd("128M", prealloc=True, prealloc_threads=2),
        "memfd share=off prealloc": MemoryBackendMemfd("2M", prealloc=True, share=False),
        "memfd policy=bind": MemoryBackendMemfd("2M", policy="bind", host_nodes=[0], prealloc=True),
        "memfd policy=interleave": MemoryBackendMemfd("2M", policy="interleave", host_nodes=[0]),
        "memfd policy=preferred": MemoryBackendMemfd("2M", policy="preferred", host_nodes=[0]),
        "memfd hugetlb reserve=off": MemoryBackendMemfd("4M", hugetlb=True, reserve=False),
        "memfd hugetlbsize=2M": MemoryBackendMemfd("4M", hugetlb=True, hugetlbsize="2M", reserve=False, seal=False),
    }
    files: dict[str, MemoryBackend] = {
        "file": MemoryBackendFile("4M", long),
        "file share": MemoryBackendFile("4M", long, share=True),
        "file new": MemoryBackendFile("1M", os.path.join(directory, "new"), share=True),
        "file in a directory": MemoryBackendFile("1M", directory, share=True, prealloc=True),
        "file align": MemoryBackendFile("4M", long, share=True, align="4M", merge=False),
        "file align=1G": MemoryBackendFile("4M", long, align="1G", dump=False),
        "file readonly": MemoryBackendFile("4M", long, readonly=True),
        "file readonly share": MemoryBackendFile("4M", long, readonly=True, share=True),
        "file reserve=off": MemoryBackendFile("4M", long, reserve=False),
        "file discard-data": MemoryBackendFile("4M", long, share=True, discard_data=True),
        "file share=off discard-data": MemoryBackendFile("4M", long, discard_data=True),
        "file pmem": MemoryBackendFile("4M", long, share=True, pmem=True),
        "file pmem share=off": MemoryBackendFile("4M", long, pmem=True),
    }
    return memory | files


# ---- reading strace ----

# 14211 mmap(0x7fc4897fc000, 1048576, PROT_READ|PROT_WRITE, MAP_SHARED|MAP_FIXED, 8, 0) = 0x7fc4897fc000
_LINE = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\w+)(?: (E\w+))?")
_UNFINISHED = re.compile(r"^(\d+) +(\w+)\((.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>(.*)$")


class AllocationError(HvError):
    """The calls are not those of one block that is made and released."""


class Call:
    """A system call as strace shows it: `name`, `args` (texts), `result` (text), `errno` (its name, or None)."""

    __slots__ = ("args", "errno", "name", "result")

    def __init__(self, name: str, args: list[str], result: str, errno: str | None) -> None:
        self.name, self.args, self.result, self.errno = name, args, result, errno

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(self.args)}) = {self.errno or self.result}"


def parse_strace(text: str) -> list[Call]:
    """The calls in the output of `strace -f`, in the order in which they began.

    >>> parse_strace("1 munmap(0x1000, 4096) = 0\\n1 close(9) = -1 EBADF (Bad file descriptor)")
    [munmap(0x1000, 4096) = 0, close(9) = EBADF]
    """
    lines: list[str | None] = []
    waiting: dict[str, tuple[int, str]] = {}
    for line in text.splitlines():
        if found := _UNFINISHED.match(line):
            waiting[found[1]] = (len(lines), f"{found[1]} {found[2]}({found[3]}")
            lines.append(None)
        elif (found := _RESUMED.match(line)) and found[1] in waiting:
            place, begun = waiting.pop(found[1])
            lines[place] = begun + found[3]
        else:
            lines.append(line)
    matches = [_LINE.match(line) for line in lines if line is not None]
    return [Call(found[2], _arguments(found[3]), found[4], found[5]) for found in matches if found]


# Arguments are separated by ", ", which the list of words of a node mask has, too.
def _arguments(text: str) -> list[str]:
    return [part.strip() for part in re.split(r", (?![^\[]*\])", text)] if text else []


def allocations_of(calls: Sequence[Call], asks: bool = True) -> list[str]:
    """What `calls` did for the one block that they make, and release: texts that can be compared; `asks`: with
    F_GET_SEALS.

    Raises AllocationError where there is no block, and where a munmap of the reservation breaks the module's rule.
    """
    number, place = _find_block(calls)
    first, reserve = calls[number], calls[place]
    base, size = int(first.args[0], 16), int(first.args[1])
    fd = first.args[4]
    start = int(reserve.result, 16)
    end = start + int(reserve.args[1])
    front, behind = base - start, end - base - size - 4096
    texts = [f"mmap(NULL, size + {end - start - size}, {', '.join(reserve.args[2:])})"]
    trimmed, trimming, released = [], True, False
    mine = _of_file(calls, number, fd, asks)
    for n, call in enumerate(calls):
        if n in mine:
            texts.insert(len(texts) - (n < place), _text(call, fd))
        if n <= place or call.name not in ("mmap", "munmap", "madvise", "mbind"):
            continue
        at = int(call.args[0], 16) if call.args[0].startswith("0x") else 0
        length = int(call.args[1])
        low, high = (start, end) if trimming else (base, end - behind)
        if not low <= at < high or released:
            continue
        if call.name == "munmap" and at < base:
            trimmed.append(("front", at - start, length))
        elif call.name == "munmap" and at > base:
            trimmed.append(("behind", at - base - size, length))
        else:
            trimming = n <= number  # what was trimmed is soon others' memory
            released = call.name == "munmap"
            words = [f"base + {at - base:#x}", f"{length}", *call.args[2:]]
            words = [*words[:4], *["fd" if word == fd != "-1" else word for word in words[4:5]], *words[5:]]
            done = call.errno or ("ok" if call.name != "mmap" else f"base + {int(call.result, 16) - base:#x}")
            texts.append(f"{call.name}({', '.join(words)}) = {done}")
    rule = [("front", 0, front)] * (front > 0) + [("behind", 4096, behind)] * (behind > 0)
    if trimmed != rule:
        raise AllocationError(f"of the reservation {trimmed} were unmapped, which should be {rule}")
    return _threads_in_order(texts)


# Places of the mmap of the block and of its reservation: no library is loaded into anonymous memory.
def _find_block(calls: Sequence[Call]) -> tuple[int, int]:
    reserved: list[int] = []
    for number, call in enumerate(calls):
        if call.name != "mmap" or call.errno is not None:
            continue
        flags = call.args[3].split("|")
        if "MAP_FIXED" in flags:
            base = int(call.args[0], 16)
            for place in reversed(reserved):
                start = int(calls[place].result, 16)
                if start <= base < start + int(calls[place].args[1]):
                    return number, place
        elif call.args[2] == "PROT_NONE" and "MAP_ANONYMOUS" in flags:
            reserved.append(number)
    raise AllocationError(f"no memory is reserved and then mapped in {calls}")


# Places of the calls about the block's file: between the call that opened it and the one that closes it.
def _of_file(calls: Sequence[Call], mapped: int, fd: str, asks: bool) -> set[int]:
    if fd == "-1":
        return set()
    opened = max(
        n for n, call in enumerate(calls[:mapped]) if call.name in ("memfd_create", "openat") and call.result == fd
    )
    closed = next((n for n, call in enumerate(calls) if n > mapped and _is_close(call, fd)), len(calls) - 1)
    return {
        n
        for n, call in enumerate(calls)
        if opened <= n <= closed
        and (
            (n == opened and call.name == "memfd_create")
            or (call.args[:1] == [fd] and (asks or "F_GET_SEALS" not in call.args))
        )
    }


def _is_close(call: Call, fd: str) -> bool:
    return call.name == "close" and call.args == [fd]


def _text(call: Call, fd: str) -> str:
    args = ["fd" if n == 0 and arg == fd else arg for n, arg in enumerate(call.args)]
    return f"{call.name}({', '.join(args)}) = {call.errno or ('fd' if call.result == fd else call.result)}"


# Neighbours that populate different parts of the block come from threads: in the order of the parts.
def _threads_in_order(texts: list[str]) -> list[str]:
    ordered: list[str] = []
    group: list[str] = []
    for text in [*texts, ""]:
        if "MADV_POPULATE_WRITE" in text:
            group.append(text)
            continue
        probe, parts = group[:1], group[1:]
        ordered += probe + sorted(parts, key=lambda part: int(part.split("base + ")[1].split(",")[0], 16)) + [text]
        group = []
    return ordered[:-1]


# ---- making the same twice ----

# Ours: makes a block of each option that is read from stdin, says so, and releases it at the next line.
_OURS = """
import sys, warnings
warnings.simplefilter("ignore")
from hvmodel.host import numa, populate, advice
from hvmodel.ram import MemoryBackend, RamBlock
RamBlock("warm", backend=MemoryBackend.parse("memory-backend-memfd,id=warm,size=4K,prealloc=on")).close()
print("ready", flush=True)
for line in sys.stdin:
    block = RamBlock("m", backend=MemoryBackend.parse(line.rstrip("\\n")))
    print("made", flush=True)
    sys.stdin.readline()
    block.close()
    print("closed", flush=True)
"""


class _Traced:
    """A process under strace, asked over pipes: `do(line)` writes a line and returns the calls until the answer."""

    def __init__(self, command: Sequence[str], trace: str) -> None:
        self._trace = trace
        self._process = subprocess.Popen(
            [*_strace(trace), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self) -> str:
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        if not text:
            raise Lacking(f"strace or the process under it has ended with status {self._process.wait()}")
        return text

    def do(self, line: str) -> list[Call]:
        """Write `line`; the system calls until the process answers with a line of its own."""
        assert self._process.stdin is not None
        at = os.path.getsize(self._trace)
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        self._answer()
        return parse_strace(_from(self._trace, at))

    def close(self) -> None:
        """End the process, and wait for its end."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            import signal

            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<_Traced pid={self._process.pid} closed={self._process.poll() is not None}>"


def _strace(trace: str) -> list[str]:
    """The command that runs another one and writes its calls, and those of its threads, to the file `trace`."""
    binary = shutil.which("strace")
    if binary is None:
        raise Lacking("strace is not installed")
    return [binary, "-f", "-qq", "-s", "300", "-e", f"trace={_CALLS}", "-o", trace]


# What strace wrote since; it writes each line at once, before the process goes on.
def _from(trace: str, at: int) -> str:
    with open(trace, encoding="utf-8", errors="replace") as file:
        file.seek(at)
        return file.read()


def sequences(qemu: Qemu, trace: str, wanted: Sequence[MemoryBackend]) -> list[list[str]]:
    """What QEMU, whose calls strace writes to `trace`, does for each backend: all are made, then all are released.

    The files they are made of must be there, or not, as QEMU is to find them.
    """
    made = []
    for number, backend in enumerate(wanted):
        at = os.path.getsize(trace)
        named = {option.replace("-", "_"): value for option, value in backend.object_add(f"m{number}").items()}
        qemu.execute("object-add", **named)
        made.append(parse_strace(_from(trace, at)))
    at = os.path.getsize(trace)
    for number in range(len(wanted)):
        qemu.execute("object-del", id=f"m{number}")
    # The memory is released later, by another thread (RCU).
    end = time.monotonic() + 20
    while True:
        released = parse_strace(_from(trace, at))
        found = [allocations_of([*calls, *released]) for calls in made]
        if all(_is_released(texts) for texts in found):
            return found
        if time.monotonic() > end:
            raise AllocationError("QEMU does not release the memory of what was deleted")
        time.sleep(0.02)


def _is_released(texts: list[str]) -> bool:
    return texts[-1].startswith("close" if any("(fd" in text or " fd" in text for text in texts) else "munmap")


@check("memory backends", "system calls of QEMU 7.2 (strace)")
def check_alloc(tally: Tally, _cases: int) -> None:
    """The system calls for each of the backends that `backends` lists: always all of them."""
    import tempfile

    from .qemu import Qemu

    with tempfile.TemporaryDirectory(prefix="hvmodel-alloc-") as directory:
        theirs, ours = os.path.join(directory, "qemu.strace"), os.path.join(directory, "ours.strace")
        with open(os.path.join(directory, "long"), "wb") as file:
            file.truncate(8 * _MiB)
        wanted = backends(directory)
        with Qemu(machine="none", prefix=_strace(theirs)) as qemu:
            if qemu.version[:2] != (7, 2):
                tally.lack(f"this QEMU is {'.'.join(map(str, qemu.version))}: what differs may be its version")
            expected = sequences(qemu, theirs, list(wanted.values()))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, "new"))  # as QEMU found it
        with _Traced([sys.executable, "-c", _OURS], ours) as us:
            for (name, backend), texts in zip(wanted.items(), expected, strict=True):
                sealed = isinstance(backend, MemoryBackendRam) or bool(getattr(backend, "seal", False))
                found = allocations_of([*us.do(backend.option("m")), *us.do("close")], asks=sealed)
                tally.compare(name, found, texts)


# ---- options ----

_VALUES: dict[str, tuple[object, ...]] = {
    "size": (_MiB, 2 * _MiB, 4096, 3 * _MiB, 0, 1, 5000, 1 << 62, (1 << 64) - 4096),
    "share": (True, False),
    "reserve": (True, False),
    "merge": (True, False),
    "dump": (True, False),
    "prealloc": (True, False),
    "prealloc-threads": (1, 4, 0, 17),
    "host-nodes": ([], [0], [0], [1], [127], [128]),
    "policy": ("default", "bind", "preferred", "interleave", "local"),
    "seal": (True, False),
    "hugetlb": (False, False, True),
    "hugetlbsize": (2 * _MiB, 1 << 30, 3 * _MiB, 65536, 0),
    "readonly": (True, False),
    "discard-data": (True, False),
    "pmem": (True, False),
    "align": (0, 4096, 2 * _MiB, 1024, 12288, 3 * _MiB),
}


def _random_options(rng: random.Random, directory: str) -> dict[str, object]:
    kind = rng.choice((MemoryBackendRam, MemoryBackendMemfd, MemoryBackendMemfd, MemoryBackendFile))
    known = [option for option in kind.options() if option in _VALUES and option != "size"]
    named: dict[str, object] = {"qom-type": kind.TYPE}
    # Mostly few and mostly right, so that not all is refused for the first of several reasons.
    named["size"] = rng.choice(_VALUES["size"]) if rng.random() < 0.3 else 2 * _MiB
    for option in rng.sample(known, rng.randint(0, min(5, len(known)))):
        named[option] = rng.choice(_VALUES[option])
    if kind is MemoryBackendFile and rng.random() < 0.95:
        names = ("long", "short", "no/such", "fifo", "new", "empty", ".")
        named["mem-path"] = os.path.join(directory, rng.choice(names) if rng.random() < 0.5 else "long")
    return named


# Whether we refuse these options though QEMU does not: hvmodel.ram.backend names the reasons.
def _stricter(named: dict[str, object]) -> str | None:
    size = named["size"]
    if isinstance(size, int) and size % 4096:
        return "a size of whole pages"
    name = os.path.basename(str(named.get("mem-path", "")))
    if name == "fifo":
        return "a regular file"
    if named.get("readonly") and name in ("new", "empty"):
        return "a file that has bytes, with readonly=on"
    return None


def _kills(named: dict[str, object]) -> bool:
    # QEMU 7.2 writes to memory that is read-only, and waits for somebody who writes into a pipe.
    pipe = os.path.basename(str(named.get("mem-path", ""))) == "fifo"
    return bool(named.get("readonly") and (named.get("prealloc") or pipe))


@check("options of memory backends", "QEMU's object-add", cases=150, slow=2000)
def check_backends(tally: Tally, cases: int) -> None:
    """Random options: what QEMU refuses we refuse, what it makes we make, but for what `_stricter` names."""
    import random
    import tempfile

    from .qemu import Qemu, QemuError

    rng = random.Random(3)
    with tempfile.TemporaryDirectory(prefix="hvmodel-options-") as directory, contextlib.ExitStack() as stack:
        qemu: Qemu | None = None
        for case in range(cases):
            if case % 250 == 0:  # QEMU keeps the descriptors of what it refused
                stack.close()
                qemu = stack.enter_context(Qemu(machine="none"))
            assert qemu is not None
            named = _random_options(rng, directory)
            while _kills(named):
                named = _random_options(rng, directory)
            with _files(directory):
                theirs = None
                try:
                    arguments = {option.replace("-", "_"): value for option, value in named.items()}
                    qemu.execute("object-add", id="m", **arguments)
                    qemu.execute("object-del", id="m")
                except QemuError as error:
                    theirs = error.text
            with _files(directory):
                ours = None
                try:
                    _make_block(named)
                except HvError as error:
                    ours = str(error)
            what = " ".join(f"{option}={value}" for option, value in named.items())
            if theirs is None and ours is not None and _stricter(named) is not None:
                continue
            said = f" (ours: {ours}; QEMU: {theirs})"
            tally.compare(what + said, "made" if ours is None else "refused", "made" if theirs is None else "refused")


@contextlib.contextmanager
def _files(directory: str) -> Iterator[None]:
    for name, size in (("long", 8 * _MiB), ("short", 1000), ("empty", 0)):
        with open(os.path.join(directory, name), "wb") as file:
            file.truncate(size)
    fifo = os.path.join(directory, "fifo")
    with contextlib.suppress(FileExistsError):
        os.mkfifo(fifo)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, "new"))
    yield


def _make_block(named: dict[str, object]) -> None:
    import warnings

    from ..ram.backend import backend_types
    from ..ram.block import RamBlock

    kind: Callable[..., MemoryBackend] = backend_types()[str(named["qom-type"])]
    fields = {option.replace("-", "_"): value for option, value in named.items() if option != "qom-type"}
    try:
        backend = kind(**fields)
    except TypeError as error:
        if "mem_path" in fields or "mem_path" not in str(error):
            raise
        raise ArgumentError("MemoryBackendFile", "mem_path", None, "a path", "Parameter is missing") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # MAP_SYNC
        RamBlock("m", backend=backend).close()
