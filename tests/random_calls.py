"""Makes random public calls of all that has guest memory: blocks, regions, address spaces, machines, memslots, page
faults, descriptors that are passed.

    random_calls.py SEED NUMBER LIMIT DIRECTORY...      in LIMIT seconds, with files in the directories

A kind of call is a method of `World`.  It picks what it calls by chance, and `do` at times replaces one argument by
nonsense.  After every call all views that are out are read and written.  The last line of the output is a JSON object:
how often each kind succeeded and failed, what the errors were, what was no documented error, and what was left open.
Dies where the library lets it die; test_random_calls.py looks at how it ended.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import pickle
import random
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import hvmodel as hv
from hvmodel.errors import HvError
from hvmodel.host import Mapping, MemFd, UserFaultFd
from hvmodel.host.advice import ADVICE
from hvmodel.host.passing import receive_fds, send_fds
from hvmodel.host.views import keep_alive
from hvmodel.kvm import Kvm, Vcpu, Vm
from hvmodel.kvm.guest_memfd import GuestMemFd
from hvmodel.kvm.memslots import SlotMemory
from hvmodel.ram import (
    AddressSpace,
    KvmMemoryListener,
    MemoryBackend,
    MemoryBackendFile,
    MemoryBackendMemfd,
    MemoryBackendRam,
    MemoryListener,
    MemoryRegion,
    MemoryRegionOps,
    MemTxError,
    RamBlock,
    RamList,
    address_spaces,
    info_mtree,
    receive_block,
    send_block,
    transaction,
)
from tests.need import lacking

PAGE = 4096
PAGES = 16
SIZE = PAGES * PAGE
END = 1 << 64
CODE = 0x7C00
HIGH = 0x100000  # where the machine has no RAM of its own
TAKES_AWAY = ("dontneed", "remove", "guard_install")
# What real-mode code does there: reads and writes at DS:BX upwards, the same with ports, copies, halts, goes wrong.
GUESTS = [bytes.fromhex(code) for code in ("8b07 8907 81c3f10f ebf6", "8b07 8907 ecee 81c3f10f ebf4", "f3a4ebfc", "f4")]
WITHOUT_RANDOM = ("hugepage", "collapse")  # nothing to be had for them but time


class Skip(Exception):
    """There is nothing to call this on."""


class Refusal(Exception):
    """What our own callbacks raise, and what must come out as it is."""


class Broken(Exception):
    """A promise was not kept."""


class Kept:
    """A view that is out: memoryview or numpy array over [offset, offset + size) of `mapping`."""

    def __init__(self, view: Any, mapping: Mapping, offset: int, writable: bool) -> None:
        self.view, self.mapping, self.offset, self.size, self.writable = view, mapping, offset, len(view), writable


Kinds = dict[str, tuple[Callable[[Any], object], float, str | None, bool]]
kinds: Kinds = {}


def kind(
    weight: float = 1.0, needs: str | None = None, *, callbacks: bool = False, table: Kinds = kinds
) -> Callable[[Any], Any]:
    """A kind of call, as likely as `weight`, that takes what tests.need calls `needs`, and may run our callbacks."""

    def note(method: Callable[[Any], object]) -> Callable[[Any], object]:
        table[method.__name__] = method, weight, needs, callbacks
        return method

    return note


class Recorder(MemoryListener):
    """A listener that at times refuses, or changes what it is being told."""

    def __init__(self, world: World) -> None:
        self.world, self.priority = world, world.rng.choice([-1, 0, 10, 20])

    def _heard(self) -> None:
        world = self.world
        if not world.calm and world.rng.random() < 0.01:
            if world.regions and world.rng.random() < 0.5:
                world.rng.choice(world.regions).enabled = False  # BusyError, or nothing where it is so already
            raise Refusal("a listener's")

    def begin(self) -> None:
        self._heard()

    def commit(self) -> None:
        self._heard()

    def region_add(self, section: object) -> None:
        self._heard()

    def region_del(self, section: object) -> None:
        self._heard()

    def region_nop(self, section: object) -> None:
        self._heard()

    def log_start(self, section: object, old: int, new: int) -> None:
        self._heard()


class World:
    def __init__(self, seed: int, directories: list[str]) -> None:
        self.rng = random.Random(seed)
        self.calm = False  # whether callbacks refuse nothing any more
        self.spoil = 0.1  # how likely an argument is made nonsense
        self.directories = directories
        self.paths = [f"{directory}/{name}" for directory in directories for name in ("a", "b", "c")]
        os.mkfifo(f"{directories[0]}/fifo")
        os.symlink(f"{directories[0]}/nowhere", f"{directories[0]}/link")
        self.odd_paths = [*directories, "/dev/zero", "/dev/null", *(f"{directories[0]}/{n}" for n in ("fifo", "link"))]
        self.odd_paths.append(f"{directories[0]}/no/such")
        self.maps: list[Mapping] = []
        self.memfds: list[MemFd] = []
        self.blocks: list[RamBlock] = []
        self.backends: list[MemoryBackend] = []
        self.lists: list[RamList] = []
        self.regions: list[MemoryRegion] = []
        self.spaces: list[AddressSpace] = []
        self.listeners: list[MemoryListener] = []
        self.uffds: list[UserFaultFd] = []
        self.machines: list[hv.Machine] = []
        self.kvms: list[Kvm] = []
        self.vms: list[Vm] = []
        self.vcpus: list[Vcpu] = []
        self.gmems: list[GuestMemFd] = []
        self.sockets: list[socket.socket] = []
        for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
            for end in socket.socketpair(socket.AF_UNIX, kind):
                end.setblocking(False)
                self.sockets.append(end)
        self.sockets += [socket.socket(socket.AF_INET), socket.socket(socket.AF_UNIX)]
        self.sockets[-1].close()
        self.kept: list[Kept] = []
        self.stuck: list[Any] = []
        closed = RamBlock("closed", PAGE)
        closed.close()
        self.nonsense = [
            None, -1, 0, 1, 7, PAGE - 1, 1 << 47, (1 << 63) - 1, 1 << 63, END - PAGE, END, -END, 2.5, float("nan"),
            "4K", "x", "", "\0", "\ud800", "x" * 300, b"", b"abc", True, (), [], [None], {}, {1: 2}, object(), closed,
            range(3), memoryview(b"abcdef")[::2],
        ]  # fmt: skip

    @classmethod
    def warm(cls) -> None:
        """What stays open for the rest of the process."""

    # ---- picking ----

    def one(self, pool: list[Any], *more: Any) -> Any:
        pool = [*pool, *more]
        if not pool:
            raise Skip
        found = self.rng.choice(pool)
        for _ in range(8):  # what is closed is of less interest
            if getattr(found, "closed", False) is not True or self.rng.random() < 0.1:
                break
            found = self.rng.choice(pool)
        return found

    def offset(self) -> int:
        """An offset or a size: mostly whole pages inside, often near an edge."""
        draw = self.rng.random()
        if draw < 0.6:
            return self.rng.randrange(PAGES + 1) * PAGE
        return self.rng.randrange(SIZE + 2) if draw < 0.9 else self.rng.choice([SIZE + PAGE, -PAGE, END - 1, PAGE, 0])

    def length(self) -> int | None:
        return self.rng.choice([PAGE, PAGE, 2 * PAGE, None, 8, 1, self.offset()])

    def size(self) -> int | str:
        return self.rng.choice([SIZE, SIZE, SIZE // 2, PAGE, 4 * PAGE, "64K", "32K"])

    def data(self, most: int = 2 * PAGE) -> Any:
        data = bytes([self.rng.randrange(256)]) * self.rng.choice([1, 2, 4, 8, 9, PAGE, self.rng.randrange(most + 1)])
        draw = self.rng.random()
        if draw < 0.1 and self.kept:
            view = self.rng.choice(self.kept).view  # memory to itself
            return view[:most]
        return bytearray(data) if draw < 0.3 else np.frombuffer(data, "u1") if draw < 0.4 else data

    def address(self) -> int:
        """Where regions are, and accesses go."""
        draw = self.rng.random()
        if draw < 0.75:
            return self.rng.choice([0, 0, HIGH, HIGH]) + self.rng.randrange(4 * PAGES) * PAGE
        if draw < 0.95:
            return self.rng.choice([0, HIGH]) + self.rng.randrange(4 * SIZE)
        return self.rng.choice([END - 1, END - PAGE, END - SIZE, END, 1 << 52, 4 << 30])

    def within(self, space: AddressSpace) -> int:
        """An address in it: mostly of what it shows."""
        if not space.closed and len(space.flatview) and self.rng.random() < 0.7:
            shown = self.rng.choice(space.flatview.ranges)
            at = self.rng.choice([0, 0, PAGE, shown.size - 1, shown.size - 8, shown.size // 2, shown.size - PAGE])
            return max(shown.start + at, 0)
        return self.address()

    def mapping(self) -> Mapping:
        return self.one(self.maps, *[block.mapping for block in self.blocks], *[m.ram.mapping for m in self.machines])

    def space(self) -> AddressSpace:
        return self.one(self.spaces, *[s for m in self.machines for s in (m.memory, m.io)])

    def container(self) -> MemoryRegion:
        roots = [s.root for m in self.machines for s in (m.memory, m.memory, m.io)]
        return self.one(self.regions, *roots, *roots)

    def do(self, function: Callable[..., Any], *args: Any, firm: tuple[str | int, ...] = (), **named: Any) -> Any:
        """Calls `function`, at times with one argument made nonsense, but those that are `firm`."""
        places: list[Any] = [n for n in range(len(args)) if n not in firm] + [n for n in named if n not in firm]
        if places and self.rng.random() < self.spoil:
            place, value = self.rng.choice(places), self.rng.choice(self.nonsense)
            if isinstance(place, int):
                args = (*args[:place], value, *args[place + 1 :])
            else:
                named[place] = value
        return function(*args, **named)

    def put(self, pool: list[Any], thing: Any, most: int) -> None:
        pool.append(thing)
        while len(pool) > most:
            self.close(pool.pop(self.rng.randrange(len(pool) - 1)))

    def close(self, thing: Any) -> None:
        """Lets go of it: closes it, now or, where it is in use, at the end; or just forgets it."""
        if isinstance(thing, MemoryRegion):
            with contextlib.suppress(HvError, Refusal):
                if thing.parent is not None:
                    thing.parent.del_subregion(thing)
            return
        if isinstance(thing, hv.Machine):
            for root in (thing.memory.root, thing.io.root):
                for region in root.subregions:
                    with contextlib.suppress(HvError, Refusal):
                        root.del_subregion(region)
        if not hasattr(thing, "close") or (self.rng.random() < 0.1 and not isinstance(thing, Kvm)):
            return  # forgotten: its finalizer closes it
        try:
            thing.close()
        except (HvError, Refusal):
            self.stuck.append(thing)
        if len(self.stuck) > 10:
            again, self.stuck = self.stuck, []
            for other in again:
                try:
                    other.close()
                except (HvError, Refusal):
                    self.stuck.append(other)

    def prune(self) -> None:
        """Forgets what is closed, but for one of each."""
        for pool in vars(self).values():
            if isinstance(pool, list):
                pool[:] = [each for n, each in enumerate(pool) if not n or getattr(each, "closed", False) is not True]

    # ---- views ----

    def keep(self, view: Any, mapping: Mapping, offset: int, writable: bool = False) -> None:
        if self.rng.random() < 0.5:
            view = np.frombuffer(view, "u1") if len(view) else view
        elif self.rng.random() < 0.3:
            view = view[: len(view) // 2]
        self.kept.append(Kept(view, mapping, offset, writable))
        if len(self.kept) > 10:
            del self.kept[self.rng.randrange(len(self.kept))]

    def touch(self) -> None:
        """Reads, and writes where it may, every view that is out: what was handed out never faults."""
        for kept in self.kept:
            if kept.size:
                bytes(kept.view[::PAGE]), kept.view[kept.size - 1]
                if kept.writable:
                    kept.view[kept.size - 1] = 0xF4
                    kept.view[0] = 1
            if kept.mapping.closed:
                raise Broken(f"closed, and a view of it is out: {kept.mapping!r}")

    def taken(self, mapping: Mapping, offset: int, size: int | None, prot: int = 0) -> None:
        """That range can be accessed by `prot` at most now."""
        end = mapping.size if size is None else offset + size
        for kept in self.kept:
            needs = 3 if kept.writable else 1
            if kept.mapping is mapping and kept.offset < end and offset < kept.offset + kept.size and needs & ~prot:
                raise Broken(f"taken away under a view of [{kept.offset:#x}, +{kept.size:#x}): {mapping!r}")

    # ---- memory files and mappings ----

    @kind()
    def memfd(self) -> None:
        seals = self.one([0, 2, 2, 6, 7, 0x10])
        self.put(self.memfds, self.do(MemFd, "random", self.size(), seals=seals), 4)

    @kind(0.5)
    def memfd_close(self) -> None:
        memfd = self.one(self.memfds, *[b.memfd for b in self.blocks if b.memfd is not None])
        if self.rng.random() < 0.5:
            memfd.fd  # noqa: B018  # ClosedError
        memfd.close()

    @kind()
    def memfd_resize(self) -> None:
        self.do(self.one(self.memfds, *[b.memfd for b in self.blocks if b.memfd]).resize, self.size())

    @kind(0.5)
    def memfd_add_seals(self) -> None:
        self.do(self.one(self.memfds, *[b.memfd for b in self.blocks if b.memfd]).add_seals, self.one([1, 2, 4, 8, 64]))

    @kind(0.7)
    def memfd_from_fd(self) -> None:
        self.put(self.memfds, self.do(MemFd.from_fd, self.one(self.memfds, *self.blocks).fd), 4)

    @kind(2)
    def map_new(self) -> None:
        source = self.one(self.memfds, None, None)
        if isinstance(source, MemFd) and self.rng.random() < 0.2:
            source = source.fd
        named = {
            "offset": self.one([0, 0, 0, PAGE]),
            "prot": self.one([3, 3, 3, 1, 0]),
            "shared": self.one([True, True, False]),
            "align": self.one([None, None, PAGE, "2M"]),
            "noreserve": self.one([False, False, True]),
        }
        self.put(self.maps, self.do(Mapping, source, self.size(), **named), 5)

    @kind()
    def map_close(self) -> None:
        mapping = self.mapping()
        mapping.close()

    @kind(3)
    def map_view(self) -> None:
        mapping, offset = self.mapping(), self.offset()
        self.keep(self.do(mapping.view, offset, self.length(), firm=(0,)), mapping, offset)

    @kind(3)
    def map_writable(self) -> None:
        mapping, offset = self.mapping(), self.offset()
        with self.do(mapping.writable, offset, self.length(), firm=(0,)) as view:
            view[:] = b"\1" * len(view)
            self.keep(view[:], mapping, offset, True)

    @kind(2)
    def map_read(self) -> None:
        self.do(self.mapping().read, self.offset(), self.offset())

    @kind(2)
    def map_write(self) -> None:
        self.do(self.mapping().write, self.offset(), self.data())

    @kind(3)
    def map_protect(self) -> None:
        mapping, offset, size, prot = self.mapping(), self.offset(), self.length(), self.one([0, 1, 3, 3, 3])
        self.do(mapping.protect, offset, size, prot, firm=(0, 1, 2))
        self.taken(mapping, offset, size, prot)

    @kind(3)
    def map_advise(self) -> None:
        words = [word for word in ADVICE if word not in WITHOUT_RANDOM]
        mapping, offset, size, advice = self.mapping(), self.offset(), self.length(), self.one(words, "guard_remove")
        self.do(mapping.advise, advice, offset, size, firm=(1, 2))
        if advice in TAKES_AWAY:
            self.taken(mapping, offset, size)

    @kind(2)
    def map_discard(self) -> None:
        mapping, offset, size = self.mapping(), self.offset(), self.length()
        self.do(mapping.discard, offset, size, firm=(0, 1))
        self.taken(mapping, offset, size)

    @kind()
    def map_populate(self) -> None:
        named = {"write": self.one([True, False]), "threads": self.one([1, 1, 2])}
        self.do(self.mapping().populate, self.offset(), self.length(), **named)

    @kind(0.5)
    def map_sync(self) -> None:
        self.do(self.mapping().sync, self.offset(), self.length())

    @kind(2)
    def views_drop(self) -> None:
        # Python's own BufferError would come out of release() of what numpy uses; ours are dropped.
        if not self.kept:
            raise Skip
        if self.rng.random() < 0.2:
            self.one(self.kept).mapping.unpin("nobody pinned it so")
        self.kept.clear()

    # ---- blocks ----

    @kind(1.5)
    def backend(self) -> None:
        common = {
            "share": self.one([True, False]),
            "prealloc": self.one([False, False, True]),
            "reserve": self.one([True, True, False]),
            "dump": self.one([True, False]),
            "merge": self.one([True, False]),
            "host_nodes": self.one([(), (), (), (0,), (5,)]),
            "policy": self.one(["default", "default", "default", "bind", "preferred", "interleave"]),
        }
        match self.rng.randrange(4):
            case 0:
                new = self.do(MemoryBackendRam, self.size(), **common)
            case 1:
                seal, hugetlb = self.one([True, True, False]), self.one([False] * 9 + [True])
                new = self.do(MemoryBackendMemfd, self.size(), seal=seal, hugetlb=hugetlb, **common)
            case 2:
                named = {
                    "readonly": self.one([False, False, True]),
                    "rom": self.one(["auto", "auto", "on", "off"]),
                    "align": self.one([0, 0, PAGE, "2M"]),
                    "offset": self.one([0, 0, PAGE]),
                    "discard_data": self.one([False, True]),
                    "pmem": self.one([False, False, False, True]),
                }
                path = self.one(self.paths * 4, *self.odd_paths)
                new = self.do(MemoryBackendFile, self.size(), path, **named, **common)
            case _:
                text = self.one(["memory-backend-memfd,id=m,size=64K,share=on", "memory-backend-ram,size=1M,bad=on"])
                new = self.do(MemoryBackend.parse, text)
        self.put(self.backends, new, 10)

    @kind(3)
    def block_of_backend(self) -> None:
        backend = self.one(self.backends)
        block = self.do(RamBlock, self.one(["mem", "a", "b", "c"]), backend=backend)
        self.put(self.blocks, block, 8)

    @kind(2, callbacks=True)
    def block_new(self) -> None:
        named = {"max_length": self.one([None, None, SIZE, 2 * SIZE]), "resized": self.one([None, self.heard])}
        block = self.do(RamBlock, self.one(["mem", "a", "b", "c"]), self.size(), **named)
        self.put(self.blocks, block, 8)

    @kind()
    def block_from_fd(self) -> None:
        named = {"readonly": self.one([False, True]), "offset": self.one([0, 0, PAGE]), "seals": self.one([6, 2, 0])}
        fd = self.one(self.blocks, *self.memfds, *self.machines)
        fd = fd.ram.fd if isinstance(fd, hv.Machine) else fd.fd
        self.put(self.blocks, self.do(RamBlock.from_fd, "from", fd, self.one([None, PAGE, SIZE]), **named), 8)

    def heard(self, *_: object) -> None:
        if not self.calm and self.rng.random() < 0.1:
            raise Refusal("a callback's")

    @kind(2)
    def block_view(self) -> None:
        block, offset = self.one(self.blocks), self.offset()
        self.keep(self.do(block.view, offset, self.length(), firm=(0,)), block.mapping, offset)

    @kind(2)
    def block_writable(self) -> None:
        block, offset = self.one(self.blocks), self.offset()
        with self.do(block.writable, offset, self.length(), firm=(0,)) as view:
            self.keep(view[:], block.mapping, offset, True)

    @kind(2)
    def block_read(self) -> None:
        self.do(self.one(self.blocks).read, self.offset(), self.offset())

    @kind(2)
    def block_write(self) -> None:
        self.do(self.one(self.blocks).write, self.offset(), self.data())

    @kind(2, callbacks=True)
    def block_resize(self) -> None:
        self.do(self.one([b for b in self.blocks if b.used_length != b.max_length] or self.blocks).resize, self.size())

    @kind()
    def block_dirty(self) -> None:
        block = self.one(self.blocks)
        self.do(block.mark_host_dirty, self.offset(), self.one([0, 1, PAGE]))
        block.host_dirty(), block.take_host_dirty()

    @kind(1.5)
    def block_close(self) -> None:
        block = self.one(self.blocks)
        if self.rng.random() < 0.3:
            block.host  # noqa: B018  # ClosedError
        block.close()

    @kind(0)
    def file_cut(self) -> None:
        """The host cuts or extends a file that is mapped: no call of ours."""
        with contextlib.suppress(HvError, OSError):
            path = self.one(self.paths, *[f"/proc/self/fd/{self.one(self.blocks).fd}" for _ in self.blocks])
            os.truncate(path, self.rng.randrange(PAGES + 2) * PAGE)

    # ---- lists ----

    @kind(0.2)
    def list_new(self) -> None:
        blocks = [self.one(self.blocks)]
        self.put(self.lists, self.do(RamList, blocks), 3)

    @kind()
    def list_add(self) -> None:
        self.do(self.one(self.lists).add, self.one(self.blocks))

    @kind(0.7)
    def list_remove(self) -> None:
        ram_list = self.one(self.lists)
        self.do(ram_list.remove, self.one(self.blocks, *ram_list))

    @kind(0.7)
    def list_ask(self) -> None:
        ram_list = self.one(self.lists)
        ram_list.info_ramblock()
        self.do(ram_list.at, self.offset())
        self.do(ram_list.named, self.one(["mem", "a", "b"]))

    # ---- regions ----

    def ops(self) -> MemoryRegionOps:
        rng = self.rng

        def read(addr: int, size: int) -> Any:
            self.callback()
            return rng.choice([addr, -1, 0, 1 << 70, rng.getrandbits(32), "nonsense" if rng.random() < 0.1 else 5])

        def write(addr: int, value: int, size: int) -> None:
            self.callback()

        named = {
            "read": self.one([read, read, read, None]),
            "write": self.one([write, write, write, None]),
            "valid_min": self.one([0, 0, 1, 2]),
            "valid_max": self.one([0, 0, 4, 8, 1]),
            "valid_unaligned": self.one([True, False]),
            "impl_min": self.one([0, 0, 1, 4, 8]),
            "impl_max": self.one([0, 0, 1, 4, 8]),
            "impl_unaligned": self.one([True, False]),
            "endianness": self.one(["native", "little", "big"]),
            "accepts": self.one([None, None, lambda *_: rng.random() < 0.9]),
        }
        return self.do(MemoryRegionOps, **named)

    def callback(self) -> None:
        """Within an access: it may refuse, fail, change the topology, and access memory itself."""
        draw = self.rng.random()
        if self.calm or draw > 0.08:
            return
        if draw < 0.02:
            raise MemTxError("callback", 0, 1)
        if draw < 0.03:
            raise Refusal("a device's")
        if draw < 0.06 and self.regions:
            self.rng.choice(self.regions).enabled = self.rng.random() < 0.8
        if draw > 0.06 and self.spaces and self.rng.random() < 0.3:
            self.rng.choice(self.spaces).try_read(self.address() % (1 << 40), 8)

    @kind(3)
    def region_new(self) -> None:
        name = self.one(["r", "s"])
        match self.rng.randrange(8):
            case 0:
                new = self.do(MemoryRegion.container, name, self.one([SIZE, 4 * SIZE, END, PAGE + 7, 0]))
            case 1:
                new = self.do(MemoryRegion.io, name, self.one([SIZE, 8, 0x20, PAGE, END]), self.one([None, self.ops()]))
            case 2:
                new = self.do(MemoryRegion.rom, name, self.one(self.blocks))
            case 3:
                new = self.do(MemoryRegion.rom_device, name, self.one(self.blocks), self.ops())
            case 4 | 5:
                size = self.one([SIZE, PAGE, SIZE // 2, 0x1234, END])
                new = self.do(MemoryRegion.alias, name, self.container(), self.offset(), size)
            case _:
                new = self.do(MemoryRegion.ram, name, self.one(self.blocks), readonly=self.one([True, False]))
        self.put(self.regions, new, 24)

    @kind(6, callbacks=True)
    def region_add(self) -> None:
        container = self.container()
        region = self.one([r for r in self.regions if r.parent is None])
        self.do(container.add_subregion, self.address(), region, self.one([None, None, -1, 0, 1, 1 << 31]))

    @kind(3, callbacks=True)
    def region_del(self) -> None:
        container = self.one([r.parent for r in self.regions if r.parent is not None])
        self.do(container.del_subregion, self.one(container.subregions, *container.subregions, self.one(self.regions)))

    @kind(5, callbacks=True)
    def region_set(self) -> None:
        region = self.one([r for r in self.regions if r.parent is not None] or self.regions)
        flag = self.rng.random() < 0.6
        name, value = self.one(
            [
                ("enabled", flag),
                ("readonly", flag),
                ("nonvolatile", flag),
                ("unmergeable", flag),
                ("romd", flag),
                ("addr", self.address()),
                ("size", self.one([SIZE, PAGE, 0x1800, 0])),
                ("alias_offset", self.offset()),
                ("dirty_log_mask", self.rng.randrange(9)),
            ]
        )
        self.do(setattr, region, name, value, firm=(0, 1))

    @kind(0.7, callbacks=True)
    def region_log(self) -> None:
        self.do(self.one(self.regions).set_log, self.one([True, False]), self.rng.randrange(4))

    @kind(2, callbacks=True)
    def several_changes(self) -> None:
        with transaction():
            for _ in range(self.rng.randrange(1, 6)):
                change = self.one([World.region_add, World.region_del, World.region_set, World.region_new])
                with contextlib.suppress(Skip, HvError):
                    change(self)
            if self.rng.random() < 0.1:
                raise Refusal("the body's")

    # ---- address spaces ----

    @kind(0.5, callbacks=True)
    def space_new(self) -> None:
        whole = [r for r in self.regions if not r.terminates]
        self.put(self.spaces, self.do(AddressSpace, self.one(whole, *self.regions), "space"), 4)

    @kind(0.3, callbacks=True)
    def space_close(self) -> None:
        space = self.one(self.spaces)
        if self.rng.random() < 0.5:
            space.flatview  # noqa: B018  # ClosedError
        space.close()

    @kind(callbacks=True)
    def space_listen(self) -> None:
        space = self.space()
        if self.vms and self.rng.random() < 0.4:
            listener = self.do(KvmMemoryListener, self.one(self.vms), readonly_sections=self.one([True, False]))
        else:
            listener = Recorder(self)
        self.do(space.add_listener, listener)
        self.put(self.listeners, listener, 8)

    @kind(0.7, callbacks=True)
    def space_unlisten(self) -> None:
        space = self.space()
        own = [machine.vm for machine in self.machines]  # whose slots are to be those of its view
        known = [listener for listener in space.listeners if getattr(listener, "vm", None) not in own]
        self.do(space.remove_listener, self.one(known, self.one(self.listeners)))

    @kind(3, callbacks=True)
    def space_read(self) -> None:
        space = self.space()
        self.do(space.read, self.within(space), self.one([1, 4, 8, 16, PAGE, 2 * PAGE]))

    @kind(3, callbacks=True)
    def space_write(self) -> None:
        space = self.space()
        self.do(space.write, self.within(space), self.data(PAGE))

    @kind(callbacks=True)
    def space_try_read(self) -> None:
        space = self.space()
        self.do(space.try_read, self.within(space), self.one([1, 4, 8, 16, PAGE, 2 * PAGE]))

    @kind(callbacks=True)
    def space_try_write(self) -> None:
        space = self.space()
        self.do(space.try_write, self.within(space), self.data(PAGE))

    @kind(2, callbacks=True)
    def space_load(self) -> None:
        space = self.space()
        self.do(space.load, self.within(space), self.rng.randrange(10))

    @kind(2, callbacks=True)
    def space_store(self) -> None:
        space = self.space()
        self.do(space.store, self.within(space), self.rng.getrandbits(65), self.rng.randrange(10))

    @kind(0.7)
    def space_write_rom(self) -> None:
        space = self.space()
        self.do(space.write_rom, self.within(space), self.data())

    @kind(0.5)
    def space_at(self) -> None:
        space = self.space()
        self.do(space.at, self.within(space))

    @kind(0.3)
    def mtree(self) -> None:
        named = {"flatview": self.one([True, False]), "owner": self.one([True, False])}
        self.do(info_mtree, [*self.spaces, self.space()], **named)

    # ---- machines ----

    @kind(0.15, "kvm", callbacks=True)
    def machine_new(self) -> None:
        named = {"unclaimed": self.one(["strict", "open_bus"]), "debug_exit": self.one([None, 0x501])}
        self.put(self.machines, self.do(hv.Machine, self.one(["64K", "128K", "32K"]), **named), 2)

    @kind(0.05, "kvm", callbacks=True)
    def machine_close(self) -> None:
        machine = self.one(self.machines)
        machine.close()
        if self.rng.random() < 0.5:
            machine.vcpu.regs  # noqa: B018  # ClosedError

    @kind(2, "kvm")
    def machine_read(self) -> None:
        machine = self.one(self.machines)
        self.do(machine.read, self.within(machine.memory), self.one([0, 1, 8, PAGE, self.offset()]))

    @kind(2, "kvm")
    def machine_write(self) -> None:
        machine = self.one(self.machines)
        self.do(machine.write, self.within(machine.memory), self.data())

    @kind(0.7, "kvm")
    def machine_load(self) -> None:
        machine = self.one(self.machines)
        self.do(machine.load, self.within(machine.memory), self.data())

    def found(self, machine: hv.Machine, gpa: object) -> tuple[Mapping, int]:
        row = machine.memory.at(gpa)  # type: ignore[arg-type]
        if row is None or row.region.block is None:
            raise Broken(f"a view of what is no memory, at {gpa!r}")
        return row.region.block.mapping, gpa - row.start + row.offset_in_region  # type: ignore[operator]

    @kind(2, "kvm")
    def machine_view(self) -> None:
        machine = self.one(self.machines)
        gpa = self.within(machine.memory)
        view = self.do(machine.view, gpa, self.one([0, 1, 8, PAGE, self.offset()]), firm=(0,))
        self.keep(view, *self.found(machine, gpa))

    @kind(2, "kvm")
    def machine_writable(self) -> None:
        machine = self.one(self.machines)
        gpa = self.within(machine.memory)
        with self.do(machine.writable, gpa, self.one([0, 1, 8, PAGE, self.offset()]), firm=(0,)) as view:
            self.keep(view[:], *self.found(machine, gpa), True)

    @kind(3, "kvm", callbacks=True)
    def machine_run(self) -> None:
        machine = self.one(self.machines)
        if self.rng.random() < 0.7:
            machine.load(CODE, self.one(GUESTS))
            self.do(machine.vcpu.real_mode, entry=CODE)
            base = self.one([0, 0, HIGH, self.address() % END])
            machine.vcpu.sregs = machine.vcpu.sregs.replace(**{"ds.base": base})
            machine.vcpu.rdx = self.one([0, 0x10, 0x501])
        with contextlib.suppress(HvError):
            machine.answer(self.rng.getrandbits(8))  # of the last run, which may have ended at a read
        machine.run(timeout=self.one([0.0, 0.0005, 0.002]))

    @kind(0.5, "kvm", callbacks=True)
    def machine_exits(self) -> None:
        machine = self.one(self.machines)
        for exit in machine.exits(self.do(self.one, [0.0, 0.0005], firm=(0,))):
            if self.rng.random() < 0.5:
                break
            if hasattr(exit, "size"):
                machine.answer(bytes(exit.size))

    # ---- memslots ----

    @kind(0.15, "kvm")
    def vm_new(self) -> None:
        if not self.kvms:
            self.kvms.append(Kvm())
        vm = self.kvms[0].create_vm()
        self.put(self.vms, vm, 2)
        vm.set_tss_addr(0xFFFBD000)
        vcpu = self.do(vm.create_vcpu, 0)
        self.put(self.vcpus, vcpu, 2)
        sregs, regs = vcpu.sregs, vcpu.regs
        sregs.cs.base = sregs.cs.selector = 0
        sregs.ds.base = HIGH
        regs.rip, regs.rflags = 0, 2
        vcpu.sregs, vcpu.regs = sregs, regs

    @kind(0.05, "kvm")
    def vm_close(self) -> None:
        vm = self.one(self.vms)
        vm.close()
        if self.rng.random() < 0.5:
            vm.fd  # noqa: B018  # ClosedError

    def slot(self, vm: Vm) -> int:
        return self.one([0, 1, 2, 3, 3, 40000, *vm.memslots])

    def gpa(self) -> int:
        return self.one([0, HIGH, HIGH + SIZE, HIGH + 2 * SIZE, self.address()])

    @kind(3, "kvm")
    def slot_set(self) -> None:
        named = {
            "offset": self.one([0, 0, PAGE]),
            "size": self.one([None, PAGE, SIZE]),
            "flags": self.one([0, 0, 1, 1, 2, 3]),
        }
        vm = self.one(self.vms)
        self.do(vm.set_user_memory_region, self.slot(vm), self.gpa(), self.mapping(), firm=(2,), **named)

    @kind(1.5, "kvm")
    def slot_delete(self) -> None:
        vm = self.one(self.vms)
        self.do(vm.delete_memory_region, self.slot(vm))

    @kind(2, "kvm")
    def slots_change(self) -> None:
        vm = self.one(self.vms)
        add = [
            SlotMemory(self.gpa(), self.mapping(), self.one([0, PAGE]), self.one([PAGE, SIZE]))
            for _ in range(self.rng.randrange(3))
        ]
        have = sorted(vm.memslots)
        delete = [self.one(have, 5)] if have and self.rng.random() < 0.4 else []
        flags = {self.one(have): self.rng.randrange(3)} if have and self.rng.random() < 0.4 else {}
        self.do(vm.change_memory_regions, delete=delete, flags=flags, add=add)

    @kind(0.7, "kvm")
    def slot_log(self) -> None:
        vm = self.one(self.vms)
        logged = [slot for slot, entry in vm.memslots.items() if entry.flags & 1]
        self.do(vm.get_dirty_log, self.one(logged, self.slot(vm)))

    @kind(2, "kvm")
    def vcpu_run(self) -> None:
        vcpu = self.one(self.vcpus)
        vm, code = vcpu.vm, self.one(GUESTS)
        for mapping in self.maps:  # where there is code to be run is left to chance
            if any(s.gpa == 0 and s.hva == mapping._hva for s in vm.memslots.values()):
                with contextlib.suppress(HvError):
                    mapping.write(0, code)
        with contextlib.suppress(HvError):
            vcpu.answer(self.rng.getrandbits(8))
        with contextlib.suppress(HvError):
            regs = vcpu.regs
            regs.rip = 0
            vcpu.regs = regs
        vcpu.run(self.do(self.one, [0.0, 0.0005, 0.002], firm=(0,)))

    @kind(0.7, "guest_memfd")
    def gmem_new(self) -> None:
        self.put(self.gmems, self.do(GuestMemFd, self.one(self.vms), self.size(), self.one([3, 3, 1, 0])), 3)

    @kind(0.7, "guest_memfd")
    def gmem_map(self) -> None:
        self.put(self.maps, self.do(self.one(self.gmems).mapping, self.one([0, PAGE]), self.one([None, PAGE])), 5)

    @kind(0.7, "guest_memfd")
    def gmem_bind(self) -> None:
        gmem = self.one(self.gmems)
        named = {"offset": self.one([0, PAGE]), "size": self.one([None, PAGE])}
        slot = self.rng.randrange(4, 20)  # one of a guest_memfd cannot be changed
        self.do(gmem.bind, slot, self.gpa(), self.one(self.maps), firm=(2,), **named)

    @kind(0.7, "guest_memfd")
    def gmem_change(self) -> None:
        gmem = self.one(self.gmems)
        self.do(self.one([gmem.punch, gmem.allocate]), self.offset(), self.length())

    @kind(0.3, "guest_memfd")
    def gmem_close(self) -> None:
        gmem = self.one(self.gmems)
        if self.rng.random() < 0.5:
            gmem.fd  # noqa: B018  # ClosedError
        gmem.close()

    # ---- page faults ----

    @kind(0.5, "userfaultfd")
    def uffd_new(self) -> None:
        new = self.do(
            UserFaultFd, patience=0.001, wp_async=self.one([True, False]), sigbus=self.one([False] * 4 + [True])
        )
        new.patience = 0.001  # whatever nonsense it was made with
        self.put(self.uffds, new, 2)

    @kind(0.2, "userfaultfd")
    def uffd_close(self) -> None:
        uffd = self.one(self.uffds)
        if self.rng.random() < 0.3:
            uffd.fd  # noqa: B018  # ClosedError
        uffd.close()

    @kind(2, "userfaultfd")
    def uffd_register(self) -> None:
        mapping, offset, size = (
            self.mapping(),
            self.rng.randrange(-1, PAGES) * PAGE,
            self.one([PAGE, 2 * PAGE, None, 5]),
        )
        mode = self.one(["missing", "missing", "minor", "wp", "wp-async", ("missing", "wp")])
        got = self.do(self.one(self.uffds).register, mapping, offset, size, mode, firm=(1, 2))
        if got.modes != ("wp-async",):
            self.taken(mapping, offset, size)

    @kind(1, "userfaultfd")
    def uffd_unregister(self) -> None:
        uffd = self.one(self.uffds)
        ranges = [(r.mapping, r.offset, r.size) for r in uffd.registrations]
        self.do(uffd.unregister, *self.one(ranges, (self.mapping(), self.offset(), self.length())))

    def range(self, uffd: UserFaultFd, mode: str = "") -> tuple[Mapping, int, int]:
        """A page of what is registered, if it can be in `mode`."""
        known = [r for r in uffd.registrations if any(each.startswith(mode) for each in r.modes)]
        ranges = [(r.mapping, r.offset + self.rng.randrange(r.size // PAGE) * PAGE, PAGE) for r in known]
        return self.one(ranges, (ranges and self.one(ranges)) or (self.mapping(), 0, PAGE), *ranges)

    @kind(1.5, "userfaultfd")
    def uffd_fill(self) -> None:
        uffd = self.one(self.uffds)
        mapping, offset, size = self.range(uffd)
        source = self.mapping()
        match self.rng.randrange(5):
            case 0:
                self.do(uffd.copy, mapping, offset, bytes(size), wp=self.one([True, False]))
            case 1:
                self.do(uffd.zeropage, mapping, offset, size)
            case 2:
                self.do(uffd.continue_, mapping, offset, size)
            case 3:
                self.do(uffd.copy_from, mapping, offset, source, self.offset(), size)
            case _:
                self.do(uffd.move, mapping, offset, source, self.offset(), size, holes=self.one([True, False]))

    @kind(0.5, "userfaultfd")
    def uffd_poison(self) -> None:
        uffd = self.one(self.uffds)
        mapping, offset, size = self.range(uffd)
        self.do(uffd.poison, mapping, offset, size, firm=(0, 1, 2))
        self.taken(mapping, offset, size)

    @kind(0.7, "userfaultfd")
    def uffd_protect(self) -> None:
        uffd = self.one(self.uffds)
        if self.rng.random() < 0.5:
            self.do(uffd.writeprotect, *self.range(uffd, "wp"), protect=self.one([True, False]))
        else:
            self.do(uffd.take_written, *self.range(uffd, "wp"))

    @kind(0.5, "userfaultfd")
    def uffd_serve(self) -> None:
        uffd = self.one(self.uffds)
        handler = random.Random(self.rng.random())  # its own: it is another thread
        if self.rng.random() < 0.5:
            self.do(uffd.serve, lambda fault: None if handler.random() < 0.2 else bytes(fault.mapping.page_size))
        else:
            self.do(uffd.serve_native, self.one(self.maps, None, *self.memfds))

    @kind(0.7, "userfaultfd")
    def uffd_stop(self) -> None:
        uffd = self.one(self.uffds)
        uffd.stop()
        uffd.read(0), uffd.counts

    # ---- descriptors ----

    @kind(0.7)
    def pass_send(self) -> None:
        if self.rng.random() < 0.3:
            self.do(send_fds, self.one(self.sockets), [self.one(self.memfds)], self.data(64))
        else:
            self.do(send_block, self.one(self.sockets), self.one(self.blocks))

    @kind(0.7)
    def pass_receive(self) -> None:
        if self.rng.random() < 0.3:
            _, fds = self.do(receive_fds, self.one(self.sockets), self.one([1, 0]))
            for fd in fds:
                os.close(fd)
        else:
            named = {"readonly": self.one([True, False]), "seals": self.one([6, 2, 14])}
            self.put(self.blocks, self.do(receive_block, self.one(self.sockets), **named), 8)

    @kind(0)
    def fork(self) -> None:
        """A child touches what is out: where it has not inherited the memory it finds zeros, or a closed mapping."""
        pid = os.fork()
        if not pid:
            try:
                for kept in self.kept:
                    if kept.size:
                        bytes(kept.view[::PAGE])
                for mapping in self.maps[:2]:
                    with contextlib.suppress(HvError):
                        mapping.view(0, PAGE)
                os._exit(0)
            except BaseException:  # noqa: BLE001  # a child does not go on as its parent
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        if status:
            raise Broken(f"a child of fork ended with {os.waitstatus_to_exitcode(status)}")

    # ---- what must hold ----

    def check(self) -> None:
        """Views are those of their trees, memslots those of their views; everything has a repr."""
        for space in address_spaces():
            with AddressSpace(space.root, "again") as again:
                if [*again.flatview] != [*space.flatview]:
                    raise Broken(f"{space!r} shows\n{space.flatview!r}, and its tree is\n{again.flatview!r}")
        for machine in self.machines:
            if machine.closed:
                continue
            want = set()
            for each in machine.memory.flatview:
                start, end = -(-each.start // PAGE) * PAGE, each.end // PAGE * PAGE
                if start < end and each.region.block is not None and (each.region.is_ram or each.romd):
                    hva = each.region.block.mapping._hva + each.offset_in_region + start - each.start
                    want.add((start, end - start, hva))
            have = {(slot.gpa, slot.size, slot.hva) for slot in machine.vm.memslots.values()}
            if want != have:
                raise Broken(f"slots {sorted(have)} of a machine that shows {sorted(want)}")
        repr([vars(self)[name] for name in vars(self) if name not in ("nonsense", "rng")])

    # ---- the end ----

    def end(self) -> None:
        self.calm = True
        self.kept.clear()
        for space in address_spaces():
            space.close()
        self.listeners.clear()  # which have VMs, as have vCPUs and guest_memfds
        self.vms += [each.vm for each in (*self.vcpus, *self.gmems, *self.stuck) if hasattr(each, "vm")]
        gc.collect()  # what was forgotten, and may have something else in use
        for space in [*self.spaces, *address_spaces()]:
            space.close()
        pools = (self.uffds, self.vcpus, self.vms, self.gmems, self.machines, self.kvms)
        pools += (self.blocks, self.maps, self.memfds)
        for _ in range(3):  # one may be in the way of another
            for thing in [each for pool in (self.stuck, *pools) for each in pool]:
                with contextlib.suppress(HvError):
                    thing.close()
        for thing in [each for pool in (self.stuck, *pools) for each in pool]:
            thing.close()
        for end in self.sockets:
            end.close()


def held() -> tuple[Counter[str], Counter[str], int, int, int]:
    """Descriptors, mappings of our files, other mappings, threads, views."""
    gc.collect()
    fds: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            fds[os.readlink(f"/proc/self/fd/{fd}").partition(":")[0]] += 1
    lines = Path("/proc/self/maps").read_text().splitlines()
    names = [line.split(maxsplit=5)[5] if len(line.split()) > 5 else "" for line in lines]
    ours = Counter(name for name in names if name.startswith(("/", "anon_inode")) and ".so" not in name)
    return fds, ours, sum(not name for name in names), len(os.listdir("/proc/self/task")), len(keep_alive)


def available(needs: str | None) -> bool:
    if needs == "guest_memfd":
        return lacking("kvm") is None and Kvm().check_extension(hv._ffi.lib.KVM_CAP_GUEST_MEMFD_FLAGS) == 3
    return needs is None or lacking(needs) is None


def main(
    seed: int, number: int, limit: float, directories: list[str], kinds: Kinds = kinds, make: type[World] = World
) -> None:
    faulthandler.enable()
    faulthandler.dump_traceback_later(limit, exit=True)
    warnings.simplefilter("ignore")
    os.chdir(directories[0])
    have = {needs: available(needs) for needs in {entry[2] for entry in kinds.values()}}
    mine = {name: entry for name, entry in kinds.items() if have[entry[2]] and entry[1]}
    names, weights = list(mine), [entry[1] for entry in mine.values()]
    if have.get("kvm"):
        with hv.Machine("64K") as warm:  # timers, caches
            warm.load(CODE, b"\xf4")
            warm.vcpu.real_mode(entry=CODE)
            warm.run(timeout=1)
    if have.get("userfaultfd"):
        with UserFaultFd() as uffd:
            uffd.serve(lambda fault: None)
    trace = os.environ.get("TRACE")
    make.warm()
    before = held()
    world = make(seed, directories)
    rng = world.rng
    succeeded: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    slowest: Counter[str] = Counter()
    undocumented: dict[str, str] = {}
    calls = 0
    while calls < number:
        name = rng.choices(names, weights)[0]
        world.spoil = 0.1
        if rng.random() < 0.1:  # one that has not been seen from both sides
            lacks = [each for each in names if not (succeeded[each] and failed[each])]
            if lacks:
                name = rng.choice(lacks)
                world.spoil = 0.0 if failed[name] else 0.5
        function, _, _, callbacks = mine[name]
        if trace:
            print(calls, name, file=sys.stderr, flush=True)
        began = time.perf_counter()
        try:
            function(world)
            succeeded[name] += 1
        except Skip:
            continue
        except (HvError, Refusal) as error:
            failed[name] += 1
            errors[type(error).__name__] += 1
            if isinstance(error, Refusal) and not callbacks:
                undocumented.setdefault(f"{name}: Refusal", traceback.format_exc())
            if rng.random() < 0.1 and isinstance(error, HvError):
                str(error), pickle.loads(pickle.dumps(error))
        except Broken:
            raise
        except Exception as error:  # noqa: BLE001  # which is what is looked for
            failed[name] += 1
            undocumented.setdefault(f"{name}: {type(error).__name__}: {str(error)[:60]}", traceback.format_exc())
        finally:
            took = int((time.perf_counter() - began) * 1e6)
            spent[name] += took
            slowest[name] = max(slowest[name], took)
        calls += 1
        world.touch()
        if rng.random() < 0.02:
            world.prune()
        if rng.random() < 0.03:
            world.file_cut()
            world.touch()
        if rng.random() < 0.002:
            world.fork()
        if rng.random() < 0.01:
            world.check()
    world.check()
    world.end()
    del world, function, mine
    for _ in range(100):  # a thread leaves /proc a little after it was joined
        after = held()
        if after[3] == before[3]:
            break
        time.sleep(0.01)
    left = [f"fd {name}" for name in (after[0] - before[0]).elements()]
    left += [f"mapping {name}" for name in (after[1] - before[1]).elements()]
    left += [f"{thread}" for thread in threading.enumerate() if thread is not threading.main_thread()]
    left += [f"{after[4]} views"] if after[4] else []
    left += [f"{after[3]} threads"] if after[3] > before[3] else []
    if after[2] > before[2] + 16:  # of the allocator
        left.append(f"{after[2] - before[2]} mappings without a name")
    outcome = {
        "seed": seed,
        "calls": calls,
        "succeeded": {name: succeeded[name] for name in names},
        "failed": {name: failed[name] for name in names},
        "errors": errors,
        "undocumented": undocumented,
        "left": left,
        "slowest": {name: us // 1000 for name, us in slowest.most_common(6)},
        "milliseconds": {name: us // 1000 for name, us in spent.most_common(12)},
    }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
