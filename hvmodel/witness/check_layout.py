"""The checks of guest RAM's layout by QEMU: trees, flat views and block offsets of both boards.

Configuration   one machine: QEMU's command line, the options of our layout, the writes to the host bridge's registers
recorded        what QEMU prints for it: run once per process, stopped before the first instruction
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from itertools import zip_longest

from ..errors import ArgumentError
from ..units import GiB, KiB, MiB
from ..value import Value
from .registry import check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..machine.layouts import Layout
    from .mtree import FlatLine, Mtree, RamBlockLine, TreeLine
    from .result import Tally

__all__ = [
    "CONFIGURATIONS",
    "Configuration",
    "Recording",
    "check_flat_text",
    "check_layout",
    "check_ram_offsets",
    "creation_order",
    "layout_of",
    "ours",
    "record",
    "recorded",
]

_TRACE = ("-trace", "qemu_anon_ram_alloc")


class Configuration(Value):
    """A machine: `machine` and `options` are words for QEMU, `arguments` those of our layout of `board`.

    `writes` are made afterwards to the host bridge's configuration space: (offset, value, bytes).
    """

    board: str
    machine: str
    options: tuple[str, ...]
    ram: int
    idstr: str
    arguments: tuple[tuple[str, object], ...]
    writes: tuple[tuple[int, int, int], ...]

    @property
    def title(self) -> str:
        """In words: QEMU's options, then the writes."""
        words = ["-machine", self.machine, *self.options]
        words += [f"{offset:#x}:={value:#x}" for offset, value, _ in self.writes]
        return " ".join(words)


def _configuration(
    board: str,
    ram: int,
    *writes: tuple[int, int] | tuple[int, int, int],
    backend: str | None = None,
    idstr: str | None = None,
    max_ram_below_4g: int | None = None,
    smm: bool = True,
    hpet: bool = True,
    cpus: int = 1,
    cpu: str | None = None,
    bios: str | None = None,
    bios_size: int | None = None,
    mch: tuple[tuple[str, str, object], ...] = (),
) -> Configuration:
    # QEMU's words and our arguments for the same machine.
    machine, options = board, ["-m", f"{ram // KiB}K"]
    arguments: dict[str, object] = {"cpus": cpus, "hpet": hpet, "smm": smm}
    if backend is None and ram >= 2 * GiB:  # need not fit into the host's memory, for nobody touches it
        backend, idstr = "ram,reserve=off", idstr or "pc.ram"
    if max_ram_below_4g is not None:
        machine += f",max-ram-below-4g={max_ram_below_4g}"
        arguments["max_ram_below_4g"] = max_ram_below_4g
    if not smm:
        machine += ",smm=off"
    if not hpet:
        machine += ",hpet=off"
    if backend is not None:
        idstr = idstr or "mem"
        machine += f",memory-backend={idstr}"
        kind, _, more = backend.partition(",")
        words = [f"memory-backend-{kind}", f"id={idstr}", f"size={ram}", *([more] if more else [])]
        options += ["-object", ",".join(words)]
    if cpus != 1:
        options += ["-smp", str(cpus)]
    if cpu is not None:
        options += ["-cpu", cpu]
    # TCG has 40 bits, and its default CPU calls itself AuthenticAMD.
    arguments |= {"phys_bits": 40, "amd": cpu is None}
    if bios is not None:
        options += ["-bios", bios]
        arguments["bios"] = bytes(bios_size or 0)
    for name, field, value in mch:
        options += ["-global", f"mch.{name}={'off' if value is False else value}"]
        arguments[field] = value
    padded = tuple((write[0], write[1], write[2] if len(write) == 3 else 1) for write in writes)
    return Configuration(board, machine, tuple(options), ram, idstr or "pc.ram", tuple(arguments.items()), padded)


def _configurations() -> Iterable[Configuration]:
    pc = functools.partial(_configuration, "pc")
    q35 = functools.partial(_configuration, "q35")
    # RAM around where the hole begins: 3.5 GiB for pc, 2.75 GiB for q35; QEMU wants multiples of 8 KiB.
    for ram in (1 * MiB, 128 * MiB, 3 * GiB, 3584 * MiB - 8 * KiB, 3584 * MiB, 3584 * MiB + 8 * KiB, 4 * GiB, 6 * GiB):
        yield pc(ram)
    for ram in (1 * MiB, 128 * MiB, 2 * GiB, 2816 * MiB - 8 * KiB, 2816 * MiB, 2816 * MiB + 8 * KiB, 4 * GiB, 6 * GiB):
        yield q35(ram)
    # The option that moves it: pc takes all of it, q35 a smaller one only.
    for limit, ram in (
        (0, 4 * GiB),
        (512 * KiB, 64 * MiB),
        (1 * MiB, 64 * MiB),
        (1500 * MiB, 3 * GiB),
        (2 * GiB, 4 * GiB),
        (3 * GiB, 3 * GiB),
        (4 * GiB, 3968 * MiB),
        (4 * GiB, 4 * GiB),
    ):
        yield pc(ram, max_ram_below_4g=limit)
    for limit, ram in ((1 * GiB, 2 * GiB), (1 * GiB, 4 * GiB), (2200 * MiB, 2500 * MiB), (4 * GiB, 4 * GiB)):
        yield q35(ram, max_ram_below_4g=limit)
    # Backends; the region is called as the backend is.
    yield pc(256 * MiB, backend="memfd,share=on")
    yield q35(256 * MiB, backend="memfd,share=off,seal=off")
    yield pc(256 * MiB, backend="file,mem-path=/dev/shm,share=on")
    yield q35(256 * MiB, backend="ram,share=on,merge=off,dump=off", idstr="main")
    yield pc(4 * GiB, backend="memfd,share=on,reserve=off")
    # Close to 1 TiB; an Intel, whose RAM is not moved.
    yield pc(1000 * GiB, backend="memfd,share=on")
    yield pc(1010 * GiB, backend="memfd,share=on", cpu="Nehalem")
    # Other properties of the machine.
    yield pc(128 * MiB, smm=False)
    yield q35(128 * MiB, smm=False)
    yield pc(128 * MiB, hpet=False)
    yield q35(128 * MiB, cpus=3)
    yield pc(128 * MiB, bios="bios.bin", bios_size=128 * KiB)
    yield q35(128 * MiB, bios="bios.bin", bios_size=128 * KiB)
    # Registers of i440FX.
    pams = (0x30, 0x21, 0x13, 0x12, 0x33, 0x02, 0x30)
    yield pc(128 * MiB, *((0x59 + n, value) for n, value in enumerate(pams)))
    yield pc(4 * GiB, (0x59, 0xFF), (0x5C, 0x33221100, 4))
    for value in (0x0A, 0x42, 0x4A, 0x1A, 0x5A):
        yield pc(128 * MiB, (0x72, value))
    yield pc(128 * MiB, (0x72, 0x1A), (0x72, 0x4A))  # D_LCK locks nothing
    yield pc(128 * MiB, (0x72, 0x4A), smm=False)
    # Registers of Q35: PAM, SMRAM and ESMRAMC, then what locks.
    yield q35(128 * MiB, *((0x90 + n, value) for n, value in enumerate(pams)))
    yield q35(4 * GiB, (0x9D, 0x0A), (0x9E, 0x05))
    for smram, esmramc in (
        (0x0A, 0x00),
        (0x0A, 0x01),
        (0x0A, 0x03),
        (0x0A, 0x05),
        (0x0A, 0x07),
        (0x0A, 0x81),
        (0x42, 0x81),
        (0x4A, 0x00),
        (0x4A, 0x87),
        (0x1A, 0x81),
        (0x5A, 0x07),
    ):
        yield q35(128 * MiB, (0x9D, smram), (0x9E, esmramc))
    yield q35(128 * MiB, (0x9D, 0x0A), (0x9E, 0x01), (0x9D, 0x1A), (0x9D, 0x4A), (0x9E, 0x80))
    yield q35(128 * MiB, (0x9D, 0x0A), (0x9E, 0x01), (0x9E, 0x03), (0x9D, 0x02), (0x9D, 0x0A))
    yield q35(128 * MiB, (0x9D, 0x0A), (0x9E, 0x07), mch=(("extended-tseg-mbytes", "extended_tseg_mbytes", 48),))
    yield q35(128 * MiB, (0x9D, 0x0A), (0x9E, 0x07), mch=(("extended-tseg-mbytes", "extended_tseg_mbytes", 0),))
    yield q35(8 * MiB, (0x9D, 0x0A), (0x9E, 0x05))
    yield q35(128 * MiB, (0x9C, 0x02))
    yield q35(128 * MiB, (0x9C, 0xFF))
    yield q35(128 * MiB, (0x9C, 0xFF), (0x9C, 0x02))
    yield q35(128 * MiB, (0x9C, 0xFF), (0x9C, 0x02010203, 4), (0x9C, 0x00))
    yield q35(128 * MiB, (0x9C, 0xFF), (0x9C, 0x02), mch=(("smbase-smram", "smbase_smram", False),))


_ALL = tuple(_configurations())
CONFIGURATIONS = (*_ALL[::3], *_ALL[1::3], *_ALL[2::3])
"""The machines that are compared; the first third has some of every kind."""

_FAST = len(_ALL[::3])


class Recording(Value):
    """What QEMU prints: `info mtree`, that with -D, that with -f, and `info ramblock`.

    `allocations` are the sizes of its anonymous blocks in the order in which it made them; `registers` what the
    registers that move memory read as, by offset.
    """

    mtree: str
    mtree_disabled: str
    flat: str
    ramblock: str
    allocations: tuple[int, ...]
    registers: tuple[tuple[int, int], ...]


def record(configuration: Configuration) -> Recording:
    """Run QEMU with this configuration and ask it.  Raises Lacking and QemuError, as `Qemu`."""
    from ..machine.layouts import PcLayout, Q35Layout
    from .qemu import Qemu, allocations

    layout = PcLayout if configuration.board == "pc" else Q35Layout
    with Qemu(*configuration.options, *_TRACE, machine=configuration.machine) as qemu:
        for offset, value, size in configuration.writes:
            qemu.config_write(offset, value, size)
        return Recording(
            qemu.monitor("info mtree"),
            qemu.monitor("info mtree -D"),
            qemu.monitor("info mtree -f"),
            qemu.monitor("info ramblock"),
            tuple(allocations(qemu.messages)),
            tuple((offset, qemu.config_read(offset)) for offset in layout.OFFSETS),
        )


@functools.cache
def recorded(configuration: Configuration) -> Recording:
    """What `record` found, which is kept for the other checks."""
    return record(configuration)


def layout_of(configuration: Configuration) -> Layout:
    """Our layout for this configuration, its registers written; without memory, to be closed by the caller."""
    from ..machine.layouts import BlockPlan, PcLayout, Q35Layout

    make = PcLayout if configuration.board == "pc" else Q35Layout
    arguments: dict[str, object] = dict(configuration.arguments)
    layout: Layout = make(BlockPlan(configuration.idstr, configuration.ram), devices=True, **arguments)  # type: ignore[arg-type]
    try:
        for offset, value, size in configuration.writes:
            layout.config_write(offset, value, size)
    except BaseException:
        layout.close()
        raise
    return layout


def ours(configuration: Configuration) -> Recording:
    """What our layout of this configuration prints; of `info ramblock` nothing."""
    from ..ram.mtree import info_mtree

    with layout_of(configuration) as layout:
        return Recording(
            info_mtree(layout.spaces),
            info_mtree(layout.spaces, disabled=True),
            info_mtree(layout.spaces, flatview=True),
            "",
            (),
            tuple((offset, layout.config_read(offset)) for offset in layout.OFFSETS),
        )


# ---- trees ----


def _is_memory(line: TreeLine | FlatLine) -> bool:
    return line.kind != "i/o" or getattr(line, "target", None) is not None


def _by_name(mtree: Mtree, names: frozenset[str]) -> dict[str, Sequence[TreeLine]]:
    # The ram, rom and alias lines of every space of `names`, and of every region that an alias there shows.
    found: dict[str, Sequence[TreeLine]] = {}
    for tree in mtree.spaces:
        for name in names & set(tree.names):
            found[f"address-space {name}"] = [line for line in tree.lines if _is_memory(line)]
    shown = {line.target for lines in found.values() for line in lines if line.target is not None}
    todo = sorted(shown)
    while todo:
        name = todo.pop()
        for tree in mtree.regions:
            if name in tree.names and f"memory-region {name}" not in found:
                lines = [line for line in tree.lines if _is_memory(line)]
                found[f"memory-region {name}"] = lines
                todo += [line.target for line in lines if line.target is not None]
    return found


def _compare_lines(tally: Tally, case: str, our: Sequence[object], their: Sequence[object]) -> None:
    for number, (one, other) in enumerate(zip_longest(our, their)):
        tally.compare(f"{case}, line {number}", one, other)


@check("pc and q35 memory", "QEMU's info mtree", cases=_FAST, slow=len(CONFIGURATIONS))
def check_layout(tally: Tally, cases: int) -> None:
    """Our layouts and QEMU's boards: ram, rom and alias lines, ram and rom ranges of -f, registers, and their places.

    `cases` machines, each with the trees of "memory" and of every CPU, and of what their aliases show; what is in I/O
    ports and devices' registers is not compared.
    """
    from .mtree import parse_flat, parse_mtree

    for configuration in CONFIGURATIONS[:cases]:
        title = configuration.title
        theirs, our = recorded(configuration), ours(configuration)
        tally.compare(f"{title}: registers", our.registers, theirs.registers)
        our_trees = parse_mtree(our.mtree)
        names = frozenset(name for tree in our_trees.spaces for name in tree.names) - {"I/O"}
        for option, text, witness in (
            ("", our.mtree, theirs.mtree),
            (" -D", our.mtree_disabled, theirs.mtree_disabled),
        ):
            mine, qemus = _by_name(parse_mtree(text), names), _by_name(parse_mtree(witness), names)
            tally.compare(f"{title}: trees{option}", set(mine), set(qemus))
            for name in sorted(set(mine) & set(qemus)):
                _compare_lines(tally, f"{title}: {name}{option}", mine[name], qemus[name])
        flat, qemus_flat = (
            {space[0]: view for view in parse_flat(text) for space in view.spaces} for text in (our.flat, theirs.flat)
        )
        for name in sorted(names):
            tally.compare(f"{title}: root of {name}", flat[name].root, qemus_flat[name].root)
            pair = [[line for line in views[name].ranges if _is_memory(line)] for views in (flat, qemus_flat)]
            _compare_lines(tally, f"{title}: flat view of {name}", *pair)


@check("flat view of info mtree's text", "QEMU's info mtree -f", cases=_FAST, slow=len(CONFIGURATIONS))
def check_flat_text(tally: Tally, cases: int) -> None:
    """The flat views computed from the text of `info mtree` alone (with and without -D): every range of every space."""
    from .mtree import flat_ranges, parse_flat, parse_mtree

    for configuration in CONFIGURATIONS[:cases]:
        theirs = recorded(configuration)
        views = {space[0]: view.ranges for view in parse_flat(theirs.flat) for space in view.spaces}
        for option, text in (("", theirs.mtree), (" -D", theirs.mtree_disabled)):
            mtree = parse_mtree(text)
            names = {name for tree in mtree.spaces for name in tree.names}
            tally.compare(f"{configuration.title}: address spaces{option}", names, set(views))
            for name in sorted(names & set(views)):
                case = f"{configuration.title}: {name}{option}"
                _compare_lines(tally, case, flat_ranges(mtree, name), views[name])


# ---- offsets ----


def creation_order(blocks: Sequence[RamBlockLine], allocations: Sequence[int]) -> list[RamBlockLine]:
    """`blocks` of `info ramblock` in the order in which QEMU made them: those of files, which are objects, come first;
    the anonymous ones follow in the order of their allocations.

    Blocks of one size keep their order in the list, in which the older one comes first.
    ArgumentError for an allocation that is none of the blocks.
    """
    rest, anonymous = list(blocks), []
    for size in allocations:
        block = next((block for block in rest if block.max_length == size), None)
        if block is None:
            raise ArgumentError("creation_order", "allocations", size, "the max_length of a block")
        rest.remove(block)
        anonymous.append(block)
    return rest + anonymous


@check("offsets of RamList", "QEMU's info ramblock", cases=_FAST, slow=len(CONFIGURATIONS))
def check_ram_offsets(tally: Tally, cases: int) -> None:
    """A RamList that is given blocks of QEMU's sizes, in QEMU's order of making, has QEMU's offsets and order.

    Machines with more RAM than this host has are left out.
    """
    from ..ram.block import RamBlock, host_memory
    from ..ram.ramlist import RamList
    from .mtree import parse_ramblock

    for configuration in CONFIGURATIONS[:cases]:
        if configuration.ram > host_memory():
            tally.lack(f"a machine with {configuration.ram // GiB} GiB of RAM: this host has {host_memory() // GiB}")
            continue
        theirs = recorded(configuration)
        blocks = parse_ramblock(theirs.ramblock)
        with ExitStack() as stack:
            ram_list = RamList()
            for line in creation_order(blocks, theirs.allocations):
                block = RamBlock(line.idstr, line.used_length, max_length=line.max_length)
                ram_list.add(stack.enter_context(block))
            found = [(block.idstr, block.offset, block.used_length, block.max_length) for block in ram_list]
        expected = [(line.idstr, line.offset, line.used_length, line.max_length) for line in blocks]
        _compare_lines(tally, f"{configuration.title}: info ramblock", found, expected)
