"""Memory backends: what a RAM block is made of, in the words of QEMU's -object memory-backend-ram, -memfd and -file.

    MemoryBackendRam     anonymous memory, at a multiple of 2 MiB
    MemoryBackendMemfd   a memfd, sealed SEAL|SHRINK|GROW (seal=on); perhaps of huge pages
    MemoryBackendFile    a file of any file system

A backend is a value: it owns nothing, and any number of blocks can be made of it.  `RamBlock(idstr, backend=...)` makes
the system calls that QEMU 7.2 makes for the same options, in the same order:

    memfd    memfd_create, ftruncate, fcntl(F_ADD_SEALS)
    file     open, ftruncate if it was empty
    mmap     reserve size + align, PROT_NONE; mmap MAP_FIXED in it; munmap what is in front, and behind a guard page
    madvise  [of ram: MERGEABLE], HUGEPAGE, DONTFORK, MERGEABLE (merge=on), DONTDUMP (dump=off)
    mbind    with a policy other than default: MPOL_MF_STRICT | MPOL_MF_MOVE
    madvise  POPULATE_WRITE of one page to see if the kernel has it, then of all (prealloc=on), in parts by threads
    ...
    madvise  REMOVE when the block is closed (discard-data=on)
    munmap, close

What QEMU refuses is refused here, with the reason: as soon as the backend is made where the options alone say so, else
with the block.  Refused beyond that: sizes that are not whole pages (QEMU rounds them up for ram and file, and refuses
them for memfd), nodes that the host does not have beside some that it has, a mem-path that is no regular file,
readonly=on with prealloc=on (QEMU 7.2 dies of SIGSEGV) or with a file that is not there or empty (QEMU 7.2 makes one;
8.2 refuses it).

Source: backends/hostmem.c, hostmem-memfd.c, hostmem-file.c, hostmem-ram.c, util/oslib-posix.c@v7.2 of QEMU, observed
with strace; `offset` and `rom` of memory-backend-file are QEMU 8.2's.
"""

from __future__ import annotations

import os

from ..errors import ArgumentError, ArgumentTypeError, HostError
from ..host.mapping import PROT_READ, PROT_WRITE, Mapping, index
from ..host.memfd import F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, MemFd, page_multiple
from ..units import PAGE_SIZE, MiB, parse_size
from ..value import Value
from .backing import BackingFile, check_path
from .options import join, split, to_bool, to_nodes, to_number, to_size
from .ramflags import RAM_NAMED_FILE, RAM_NORESERVE, RAM_PMEM, RAM_READONLY, RAM_READONLY_FD, RAM_SHARED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import ClassVar

__all__ = [
    "ANONYMOUS_ALIGN",
    "MEMFD_SEALS",
    "MemoryBackend",
    "MemoryBackendFile",
    "MemoryBackendMemfd",
    "MemoryBackendRam",
    "allocate",
    "backend_types",
    "prealloc_threads",
]

ANONYMOUS_ALIGN = 2 * MiB
"""What the address of anonymous RAM is a multiple of: a huge page (QEMU_VMALLOC_ALIGN on x86-64)."""

MEMFD_SEALS = F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL
"""What seal=on sets."""

_MEMFD_NAME = "memory-backend-memfd"
_POLICIES = ("default", "preferred", "bind", "interleave")
_MAX_NODES = 128
_MAX_PREALLOC_THREADS = 16
_PREALLOC_SHARE = 64 * MiB  # less than this is not worth a thread
_ROM = ("auto", "on", "off")


class MemoryBackend(Value):
    """What the three have in common; make one of those, or `parse` QEMU's text.

    `size` (bytes, or text such as "1G"): whole pages.  `share`: writes go to the file, where others see them (else to
    private copies).  `prealloc`: all pages are given memory at once, by at most `prealloc_threads` threads.  `reserve`:
    the kernel counts the memory beforehand (else MAP_NORESERVE).  `merge`: KSM may share equal pages.  `dump`: a core
    dump of this process has them.  `host_nodes` and `policy` ("default", "preferred", "bind", "interleave"): the NUMA
    nodes that the pages come from.  `id`: its name for QEMU.

    Raises ArgumentError and ArgumentTypeError with QEMU's reason.
    """

    TYPE: ClassVar[str] = "memory-backend"
    """QEMU's name of the type."""

    size: int
    share: bool
    prealloc: bool
    prealloc_threads: int
    reserve: bool
    merge: bool
    dump: bool
    host_nodes: tuple[int, ...]
    policy: str
    id: str | None

    def __init__(self) -> None:
        raise ArgumentTypeError("MemoryBackend", "type", type(self).__name__, "one of its subclasses")

    @classmethod
    def parse(cls, text: str) -> MemoryBackend:
        """A backend from the text of QEMU's -object: "memory-backend-memfd,id=mem,size=1G,share=on".

        Commas in values are doubled.  Sizes have QEMU's suffixes (K, M, G, T, P, E; "1.5M"), host-nodes is given as "0"
        or "0-3", more than once for more.  As with QEMU `share` means share=on and `noshare` share=off, and of an
        option that is given twice the last one counts.

        Raises ArgumentError, naming the option.

        >>> MemoryBackend.parse("memory-backend-memfd,id=mem,size=1G,share=on").size
        1073741824
        """
        call = "MemoryBackend.parse"
        if not isinstance(text, str):
            raise ArgumentTypeError(call, "text", text, "the text of an -object option")
        kind, id, given = split(call, text)
        types = backend_types()
        if kind not in types:
            raise ArgumentError(call, "qom-type", kind, ", ".join(types))
        target = types[kind]
        if not issubclass(target, cls):
            raise ArgumentError(call, "qom-type", kind, cls.TYPE)
        named: dict[str, object] = {"id": id}
        options = target.options()
        nodes: list[int] = []
        for option, value in given:
            field = options.get(option)
            if field is None:
                detail = _NOT_HERE.get(option, "Invalid parameter")
                raise ArgumentError(call, option, value, ", ".join(options), detail)
            if field == "host_nodes":
                nodes += to_nodes(call, option, value)
                named[field] = nodes
            else:
                named[field] = _READ.get(field, to_bool)(call, option, value)
        for field in target._NEEDED:
            if field not in named:
                raise ArgumentError(call, field.replace("_", "-"), None, "a value", "Parameter is missing")
        return target(**named)

    @classmethod
    def options(cls) -> dict[str, str]:
        """QEMU's names of the options, and the field that each is here."""
        return {field.replace("_", "-"): field for field in cls.fields() if field != "id"}

    def option(self, id: str | None = None) -> str:
        """The text of QEMU's -object for this backend, called `id` (by default its own); `parse` reads it.

        >>> MemoryBackendMemfd("1M", share=False).option("mem")
        'memory-backend-memfd,id=mem,size=1048576,share=off'
        """
        name = id if id is not None else self.id
        plain = type(self)(**{field: getattr(self, field) for field in self._NEEDED})
        words = [self.TYPE] + ([f"id={name}"] if name is not None else [])
        for option, field in self.options().items():
            value = getattr(self, field)
            if field == "host_nodes":
                words += [f"{option}={node}" for node in value]
            elif field in self._NEEDED or value != getattr(plain, field):
                words.append(f"{option}={('off', 'on')[value] if isinstance(value, bool) else value}")
        return join(words)

    def object_add(self, id: str | None = None) -> dict[str, object]:
        """The arguments of QMP's object-add for this backend: every option, and "qom-type" and "id"."""
        named: dict[str, object] = {"qom-type": self.TYPE, "id": id if id is not None else self.id}
        for option, field in self.options().items():
            value = getattr(self, field)
            if value is not None and option not in _NEWER:
                named[option] = list(value) if isinstance(value, tuple) else value
        return named

    def __reduce__(self) -> tuple[object, ...]:
        return _make, (type(self), {field: getattr(self, field) for field in self.fields()})

    # What must be given.
    _NEEDED: ClassVar[tuple[str, ...]] = ("size",)

    # Puts the fields in place, once they are checked.
    def _fill(self, named: dict[str, object]) -> None:
        for field in self.fields():
            object.__setattr__(self, field, named[field])

    # Checks what all have in common, and gives the fields their final form.
    @classmethod
    def _checked(cls, named: dict[str, object], page_size: int = PAGE_SIZE) -> dict[str, object]:
        call = cls.__name__
        named = {field: named[field] for field in cls.fields()}
        for field in cls.fields():
            if cls.__init__.__annotations__.get(field) == "bool" and not isinstance(named[field], bool):
                raise ArgumentTypeError(call, field, named[field], "True or False")
        id = named["id"]
        if id is not None and not isinstance(id, str):
            raise ArgumentTypeError(call, "id", id, "None, or a str")
        size = named["size"]
        if parse_size(size, call, "size") == 0:  # type: ignore[arg-type]
            raise ArgumentError(call, "size", size, "at least a page", "Property 'size' doesn't take value '0'")
        named["size"] = page_multiple(size, call, "size", page_size=page_size)  # type: ignore[arg-type]
        threads = index(named["prealloc_threads"], call, "prealloc_threads")  # type: ignore[arg-type]
        if not 1 <= threads < 1 << 32:
            raise ArgumentError(call, "prealloc_threads", threads, "1 to 2**32 - 1")
        named["prealloc_threads"] = threads
        if named["prealloc"] and not named["reserve"]:
            detail = "'prealloc=on' and 'reserve=off' are incompatible"
            raise ArgumentError(call, "reserve", False, "True, or prealloc=False", detail)
        named["host_nodes"] = nodes = _checked_nodes(call, named["host_nodes"])
        policy = named["policy"]
        if not isinstance(policy, str):
            raise ArgumentTypeError(call, "policy", policy, f"one of {', '.join(_POLICIES)}")
        if policy not in _POLICIES:
            raise ArgumentError(call, "policy", policy, ", ".join(_POLICIES))
        if nodes and policy == "default":
            detail = "host-nodes must be empty for policy default"
            raise ArgumentError(call, "host_nodes", nodes, "no nodes, or another policy", detail)
        if not nodes and policy != "default":
            raise ArgumentError(call, "host_nodes", (), "nodes", f"host-nodes must be set for policy {policy}")
        return named


class MemoryBackendRam(MemoryBackend):
    """memory-backend-ram: anonymous memory; the arguments of `MemoryBackend`.

    >>> MemoryBackendRam("64M", share=True).option("mem")
    'memory-backend-ram,id=mem,size=67108864,share=on'
    """

    TYPE: ClassVar[str] = "memory-backend-ram"

    def __init__(
        self,
        size: int | str,
        *,
        share: bool = False,
        prealloc: bool = False,
        prealloc_threads: int = 1,
        reserve: bool = True,
        merge: bool = True,
        dump: bool = True,
        host_nodes: Iterable[int] = (),
        policy: str = "default",
        id: str | None = None,
    ) -> None:
        self._fill(self._checked(locals()))


class MemoryBackendMemfd(MemoryBackend):
    """memory-backend-memfd: a memfd; the arguments of `MemoryBackend` and these.

    `seal`: sealed against growing, shrinking and other seals; without it the file takes no seals, can be cut off by
    whoever holds it, and is never handed out as a view.  `hugetlb`: of huge pages from the host's pool, each of
    `hugetlbsize` bytes (a power of two that the host has; None: its default size).  As with QEMU a `hugetlbsize`
    without `hugetlb` is checked, and does nothing.

    >>> MemoryBackendMemfd("1G", hugetlb=True, hugetlbsize="3M")
    Traceback (most recent call last):
    hvmodel.errors.ArgumentError: MemoryBackendMemfd: hugetlbsize='3M': Hugepage size must be a power of 2; ...
    """

    TYPE: ClassVar[str] = "memory-backend-memfd"

    hugetlb: bool
    hugetlbsize: int | None
    seal: bool

    def __init__(
        self,
        size: int | str,
        *,
        share: bool = True,
        seal: bool = True,
        hugetlb: bool = False,
        hugetlbsize: int | str | None = None,
        prealloc: bool = False,
        prealloc_threads: int = 1,
        reserve: bool = True,
        merge: bool = True,
        dump: bool = True,
        host_nodes: Iterable[int] = (),
        policy: str = "default",
        id: str | None = None,
    ) -> None:
        named = dict(locals())
        page_size = PAGE_SIZE
        if hugetlbsize is not None:
            page = parse_size(hugetlbsize, type(self).__name__, "hugetlbsize")
            if not PAGE_SIZE <= page < 1 << 63 or page & (page - 1):
                accepted = f"a power of two from {PAGE_SIZE} bytes, or None"
                detail = "Hugepage size must be a power of 2"
                raise ArgumentError(type(self).__name__, "hugetlbsize", hugetlbsize, accepted, detail)
            named["hugetlbsize"] = page
            page_size = page if hugetlb is True else PAGE_SIZE
        self._fill(self._checked(named, page_size))


class MemoryBackendFile(MemoryBackend):
    """memory-backend-file: the file `mem_path`, or one made there; the arguments of `MemoryBackend` and these.

    What `mem_path` may name: hvmodel.ram.backing.  `align`: what the address is to be a multiple of (a power of two; 0:
    a page of the file).  `offset`: where in the file the memory begins, whole pages.  `readonly`: the file is opened
    for reading only, and the memory is read-only, unless `rom` is "off" (then writes go to private copies: not with
    `share`); `rom` "on" goes with `readonly` only, "auto" follows it.  `discard_data`: when the block is closed its
    bytes in the file are dropped (a hole; of shared memory only).  `pmem`: the file is persistent memory, to be mapped
    with MAP_SYNC if `share`; where it is not, the mapping is made without, with a RuntimeWarning.

    >>> MemoryBackendFile("1M", "/dev/shm/ram", share=True, align="2M").align
    2097152
    """

    TYPE: ClassVar[str] = "memory-backend-file"
    _NEEDED: ClassVar[tuple[str, ...]] = ("size", "mem_path")

    mem_path: str
    align: int
    offset: int
    readonly: bool
    rom: str
    discard_data: bool
    pmem: bool

    def __init__(
        self,
        size: int | str,
        mem_path: str,
        *,
        share: bool = False,
        align: int | str = 0,
        offset: int | str = 0,
        readonly: bool = False,
        rom: str = "auto",
        discard_data: bool = False,
        pmem: bool = False,
        prealloc: bool = False,
        prealloc_threads: int = 1,
        reserve: bool = True,
        merge: bool = True,
        dump: bool = True,
        host_nodes: Iterable[int] = (),
        policy: str = "default",
        id: str | None = None,
    ) -> None:
        call = type(self).__name__
        named = dict(locals())
        check_path(mem_path, call, "mem_path")
        named["align"] = alignment = parse_size(align, call, "align")
        if alignment % PAGE_SIZE:
            detail = f"alignment {alignment:#x} must be multiples of page size {PAGE_SIZE:#x}"
            raise ArgumentError(call, "align", align, "0, or a power of two of whole pages", detail)
        if alignment & (alignment - 1):
            detail = f"alignment {alignment:#x} must be a power of two"
            raise ArgumentError(call, "align", align, "0, or a power of two of whole pages", detail)
        named["offset"] = start = parse_size(offset, call, "offset")
        if start % PAGE_SIZE or start >> 62:
            raise ArgumentError(call, "offset", offset, f"a multiple of {PAGE_SIZE} below 2**62")
        if not isinstance(rom, str):
            raise ArgumentTypeError(call, "rom", rom, " or ".join(_ROM))
        if rom not in _ROM:
            raise ArgumentError(call, "rom", rom, " or ".join(_ROM))
        checked = self._checked(named)
        if rom == "on" and not readonly:
            detail = "'rom=on' is not supported with 'readonly=off'"
            raise ArgumentError(call, "rom", rom, "'off' or 'auto', or readonly=True", detail)
        if rom == "off" and readonly and share:
            detail = "'rom=off' is incompatible with 'readonly=on' and 'share=on': writes would have to go to the file"
            raise ArgumentError(call, "rom", rom, "'on' or 'auto', or share=False", detail)
        self._fill(checked)
        if prealloc and self.is_rom:
            detail = "prealloc=on writes every page, and the memory is read-only"
            raise ArgumentError(call, "prealloc", True, "False, or readonly=False", detail)

    @property
    def is_rom(self) -> bool:
        """Whether the memory is read-only."""
        return self.rom == "on" or (self.rom == "auto" and self.readonly)


def backend_types() -> dict[str, type[MemoryBackend]]:
    """QEMU's names of the types, and their classes."""
    return {cls.TYPE: cls for cls in (MemoryBackendRam, MemoryBackendMemfd, MemoryBackendFile)}


# How the text of an option is read, where it is not on or off.
_READ: dict[str, Callable[[str, str, str], object]] = {
    "size": to_size,
    "hugetlbsize": to_size,
    "align": to_size,
    "offset": to_size,
    "prealloc_threads": to_number,
    "policy": lambda _call, _option, text: text,
    "mem_path": lambda _call, _option, text: text,
    "rom": lambda _call, _option, text: text,
}
_NEWER = ("offset", "rom")  # options that QEMU 7.2 does not have
_NOT_HERE = {
    "prealloc-context": "objects of type thread-context are not modelled",
    "x-use-canonical-path-for-ramblock-id": "the block is given its idstr",
}


def _make(cls: type[MemoryBackend], named: dict[str, object]) -> MemoryBackend:
    return cls(**named)


def _checked_nodes(call: str, nodes: object) -> tuple[int, ...]:
    accepted = f"numbers of nodes, 0 to {_MAX_NODES - 1}"
    if isinstance(nodes, str | bytes) or not hasattr(nodes, "__iter__"):
        raise ArgumentTypeError(call, "host_nodes", nodes, accepted)
    numbers = {index(node, call, "host_nodes", accepted) for node in nodes}
    for number in sorted(numbers):
        if not 0 <= number < _MAX_NODES:
            detail = f"Invalid host-nodes value: {number}"
            raise ArgumentError(call, "host_nodes", number, accepted, detail)
    return tuple(sorted(numbers))


def allocate(
    backend: MemoryBackend, idstr: str, written: Callable[[int, int], None]
) -> tuple[MemFd | BackingFile | None, Mapping, int]:
    """The file, the mapping and QEMU's flags (RAM_*) of a block `idstr` made of `backend`; both are the caller's.

    `written` is what the mapping tells who wrote it; see Mapping.  Raises what `RamBlock` does; nothing is left then.
    """
    file: MemFd | BackingFile | None = None
    mapping: Mapping | None = None
    flags = (RAM_SHARED if backend.share else 0) | (0 if backend.reserve else RAM_NORESERVE)
    source: MemFd | int | None = None
    align, offset, prot, sync = ANONYMOUS_ALIGN, 0, PROT_READ | PROT_WRITE, False
    try:
        match backend:
            case MemoryBackendMemfd():
                file = source = MemFd(
                    _MEMFD_NAME,
                    backend.size,
                    seals=MEMFD_SEALS if backend.seal else 0,
                    allow_sealing=backend.seal,
                    hugetlb=backend.hugetlb,
                    hugetlbsize=backend.hugetlbsize if backend.hugetlb else None,
                )
                align = file.page_size
            case MemoryBackendFile():
                file, flags, offset = _open(backend, idstr), flags | RAM_NAMED_FILE, backend.offset
                source, align = file.fd, max(file.page_size, backend.align)
                sync = backend.pmem and backend.share
                flags |= RAM_PMEM if backend.pmem else 0
                flags |= RAM_READONLY_FD if backend.readonly else 0
                if backend.is_rom:
                    flags, prot = flags | RAM_READONLY, PROT_READ
        mapping = Mapping(
            source,
            backend.size,
            offset=offset,
            prot=prot,
            shared=backend.share,
            align=align,
            noreserve=not backend.reserve,
            sync=sync,
            owner="RamBlock",
            written=written,
        )
        _advise(mapping, backend)
        if backend.policy != "default":
            from ..host.numa import NumaPolicy, mbind

            policy = NumaPolicy.of(backend.policy, backend.host_nodes, "RamBlock")
            mbind(mapping, policy, move=True, strict=True)
        if backend.prealloc:
            _prealloc(mapping, backend.prealloc_threads)
    except BaseException:
        if mapping is not None:
            mapping.close()
        if file is not None:
            if isinstance(file, BackingFile):
                file.remove()
            file.close()
        raise
    return file, mapping, flags


def _open(backend: MemoryBackendFile, idstr: str) -> BackingFile:
    return BackingFile(
        backend.mem_path,
        backend.size,
        offset=backend.offset,
        readonly=backend.readonly,
        name=idstr,
        call="RamBlock",
    )


# Advice: what the kernel does not have or does not want is done without, as QEMU does.  Of anonymous memory the first
# MERGEABLE is the machine's (mem-merge=on), the other one the backend's.
def _advise(mapping: Mapping, backend: MemoryBackend) -> None:
    words = ["mergeable"] if isinstance(backend, MemoryBackendRam) else []
    words += ["hugepage", "dontfork"]
    words += ["mergeable"] if backend.merge else []
    words += [] if backend.dump else ["dontdump"]
    for word in words:
        try:  # noqa: SIM105 (not worth importing contextlib)
            mapping.advise(word)
        except HostError:
            pass


def prealloc_threads(size: int, page_size: int, most: int) -> int:
    """How many threads QEMU 7.2 starts to populate `size` bytes, where it may start `most`.

    At most one per processor that is online, 16, one per page, and one per 64 MiB.

    Source: get_memset_num_threads, util/oslib-posix.c@v7.2.

    >>> prealloc_threads(64 << 20, 4096, 8)
    1
    """
    online = os.sysconf("SC_NPROCESSORS_ONLN")
    most = min(max(online, 1), _MAX_PREALLOC_THREADS, most)
    return min(most, -(-size // page_size), max(1, size // _PREALLOC_SHARE))


def _prealloc(mapping: Mapping, most: int) -> None:
    page_size, size = mapping.page_size, mapping.size
    mapping.populate(0, page_size)  # does the kernel have it?
    nr_threads = prealloc_threads(size, page_size, most)
    nr_pages = size // page_size
    mapping.populate(threads=nr_threads, piece=-(-nr_pages // nr_threads) * page_size)
