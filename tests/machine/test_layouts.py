"""The memory of the boards: by arithmetic, by what the chips' datasheets say, and by QEMU."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hvmodel as hv
from hvmodel.errors import ArgumentError, ArgumentTypeError, ClosedError
from hvmodel.machine import layouts
from hvmodel.machine.layouts import PAM_READ, PAM_WRITE, BlockPlan, Layout, PcLayout, Q35Layout
from hvmodel.ram import KvmMemoryListener, MemoryListener, RamBlock, info_mtree
from hvmodel.witness import run
from hvmodel.witness.check_layout import (
    CONFIGURATIONS,
    Configuration,
    check_layout,
    creation_order,
    ours,
    recorded,
)
from hvmodel.witness.mtree import RamBlockLine, flat_ranges, parse_flat, parse_mtree
from hvmodel.witness.qemu import Qemu, QemuError
from hvmodel.witness.result import Tally
from tests.cases import cases
from tests.need import need

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
BOARDS = (PcLayout, Q35Layout)


def plan(size: int) -> BlockPlan:
    return BlockPlan("pc.ram", size)


def shown(layout: Layout, space: str, address: int) -> tuple[str, str, int] | None:
    """What is at an address: region, kind, offset in the region."""
    found = layout.space(space).at(address)
    return None if found is None else (found.region.name, found.kind, found.offset_in_region + address - found.start)


# ---- sizes ----


@pytest.mark.parametrize(
    ("board", "size", "limit", "below", "above"),
    [
        (PcLayout, 3584 * MiB - 4 * KiB, None, 3584 * MiB - 4 * KiB, 0),
        (PcLayout, 3584 * MiB, None, 3 * GiB, 512 * MiB),
        (PcLayout, 8 * GiB, None, 3 * GiB, 5 * GiB),
        (PcLayout, 8 * GiB, 0, 3 * GiB, 5 * GiB),
        (PcLayout, 8 * GiB, "2G", 2 * GiB, 6 * GiB),
        (PcLayout, 3968 * MiB, 4 * GiB, 3968 * MiB, 0),
        (PcLayout, 4 * GiB, 4 * GiB, 3 * GiB, 1 * GiB),
        (PcLayout, 64 * MiB, 1 * MiB, 1 * MiB, 63 * MiB),
        (Q35Layout, 2816 * MiB - 4 * KiB, None, 2816 * MiB - 4 * KiB, 0),
        (Q35Layout, 2816 * MiB, None, 2 * GiB, 768 * MiB),
        (Q35Layout, 8 * GiB, "4G", 2 * GiB, 6 * GiB),
        (Q35Layout, 8 * GiB, "1G", 1 * GiB, 7 * GiB),
        (Q35Layout, 2500 * MiB, 2200 * MiB, 2200 * MiB, 300 * MiB),
    ],
)
def test_where_the_hole_is(board: type[Layout], size: int, limit: int | str | None, below: int, above: int) -> None:
    with board(plan(size), max_ram_below_4g=limit) as layout:
        assert (layout.below_4g, layout.above_4g) == (below, above)
        assert shown(layout, "memory", 1 * MiB - 1) == ("pc.bios", "rom", 256 * KiB - 1)
        assert shown(layout, "memory", below - 1) == ("pc.ram", "ram", below - 1) or below == 1 * MiB
        assert shown(layout, "memory", below) is None
        if above:
            assert shown(layout, "memory", 4 * GiB) == ("pc.ram", "ram", below)
        assert shown(layout, "memory", 4 * GiB + above - 1) == (
            ("pc.ram", "ram", size - 1) if above else ("pc.bios", "rom", 256 * KiB - 1)
        )
        assert shown(layout, "memory", 4 * GiB + above) is None


def test_ram_is_moved_above_1_tib_for_amd() -> None:
    # i440FX keeps 2 GiB for PCI behind the RAM, from a whole GiB on; HyperTransport's range begins at 1012 GiB.
    # 1009 GiB of RAM end at 1010 GiB (the hole is 1 GiB), and with the 2 GiB just below 1012.
    size = 1009 * GiB
    with PcLayout(plan(size), amd=True, phys_bits=40) as layout:
        assert layout.above_4g_start == 4 * GiB
    with PcLayout(plan(size + 4 * KiB), amd=True) as layout:
        assert layout.above_4g_start == 1 << 40
        assert shown(layout, "memory", 1 << 40) == ("pc.ram", "ram", 3 * GiB)
        assert shown(layout, "memory", 4 * GiB) is None
    with PcLayout(plan(size + 4 * KiB), phys_bits=40) as layout:
        assert layout.above_4g_start == 4 * GiB
    with pytest.raises(ArgumentError) as caught:
        PcLayout(plan(size + 4 * KiB), amd=True, phys_bits=40)
    assert caught.value.field == "ram"


@pytest.mark.parametrize("board", BOARDS)
@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"ram": 0}, "ram"),
        ({"ram": -4096}, "ram"),
        ({"ram": 4097}, "ram"),
        ({"ram": 1 << 64}, "ram"),
        ({"ram": BlockPlan("pc.ram", 4097)}, "ram"),
        ({"ram": BlockPlan("pc.ram", 1 << 53)}, "ram"),
        ({"ram": "much"}, "ram"),
        ({"max_ram_below_4g": 4 * GiB + 1}, "max_ram_below_4g"),
        ({"max_ram_below_4g": -1}, "max_ram_below_4g"),
        ({"bios": b""}, "bios"),
        ({"bios": bytes(64 * KiB - 1)}, "bios"),
        ({"bios": bytes(16 * MiB + 64 * KiB)}, "bios"),
        ({"cpus": 0}, "cpus"),
        ({"phys_bits": 32}, "phys_bits"),
        ({"phys_bits": 36, "ram": plan(64 * GiB)}, "ram"),
    ],
)
def test_bad_arguments(board: type[Layout], arguments: dict[str, object], field: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        board(**{"ram": plan(16 * MiB), **arguments})  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"ram": None}, "ram"),
        ({"ram": 1.5}, "ram"),
        ({"smm": 1}, "smm"),
        ({"bios": "text"}, "bios"),
        ({"cpus": "1"}, "cpus"),
    ],
)
def test_wrong_types(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        PcLayout(**{"ram": plan(16 * MiB), **arguments})  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("board", "options", "arguments"),
    [
        (PcLayout, "pc,max-ram-below-4g=5G -m 128M", {"ram": 128 * MiB, "max_ram_below_4g": 5 * GiB}),
        (PcLayout, "pc,max-ram-below-4g=4G -m 4095M", {"ram": 4095 * MiB, "max_ram_below_4g": 4 * GiB}),
        (PcLayout, "pc,max-ram-below-4g=4G -m 4076M", {"ram": 4076 * MiB, "max_ram_below_4g": 4 * GiB}),
        (PcLayout, "pc -m 1010G", {"ram": 1010 * GiB, "amd": True, "phys_bits": 40}),
        (Q35Layout, "q35 -m 1T", {"ram": 1 << 40, "amd": True, "phys_bits": 40}),
        (
            Q35Layout,
            "q35 -m 128M -global mch.extended-tseg-mbytes=4096",
            {"ram": 128 * MiB, "extended_tseg_mbytes": 4096},
        ),
    ],
)
def test_what_qemu_refuses_is_refused(board: type[Layout], options: str, arguments: dict[str, object]) -> None:
    need("qemu")
    machine, *words = options.split()
    size = arguments.pop("ram")
    words += ["-object", f"memory-backend-memfd,id=m,size={size}"]
    with pytest.raises(QemuError):
        Qemu(*words, machine=f"{machine},memory-backend=m").close()
    with pytest.raises(ArgumentError):
        board(BlockPlan("m", size), **arguments)  # type: ignore[arg-type]


# ---- memory ----


@pytest.fixture(params=BOARDS, ids=lambda board: board.BOARD)
def layout(request: pytest.FixtureRequest) -> Iterator[Layout]:
    """A board with RAM, and firmware of two bytes in turn."""
    with request.param("16M", bios=b"\xb1\x05" * (64 * KiB)) as layout:
        yield layout


def test_firmware_is_there_twice_and_is_read_only(layout: Layout) -> None:
    for address in (0xE0000, 0xFFFF0, 0xFFFE0000, 0xFFFFFFFE):
        assert layout.memory.read(address, 2) == b"\xb1\x05"
        layout.memory.try_write(address, b"xx")
        assert layout.memory.read(address, 2) == b"\xb1\x05"
    assert layout.memory.read(0xC0000, 4) == bytes(4)  # the option ROMs
    assert [block.idstr for block in layout.blocks] == ["pc.ram", "pc.bios", "pc.rom"]


def test_pam_shadows_the_firmware(layout: Layout) -> None:
    """As firmware does it: read ROM and write RAM, then read RAM, then make it read-only."""
    memory, ram = layout.memory, layout.ram
    assert isinstance(ram, RamBlock)
    ram.write(0xF0000, b"behind")
    assert layout.pam(0) == 0
    assert memory.read(0xF0000, 2) == b"\xb1\x05"
    layout.set_pam(0, 3)
    assert memory.read(0xF0000, 6) == b"behind"
    memory.write(0xF0000, b"shadow")
    assert ram.read(0xF0000, 6) == b"shadow"
    layout.set_pam(0, 1)
    assert shown(layout, "memory", 0xF0000) == ("pc.ram", "rom", 0xF0000)
    memory.try_write(0xF0000, b"xxxxxx")
    assert memory.read(0xF0000, 6) == b"shadow"
    assert memory.read(0xEFFFE, 2) == b"\xb1\x05"  # the segment below is another register's


@pytest.mark.parametrize("number", range(13))
def test_every_pam_segment_is_its_own(layout: Layout, number: int) -> None:
    start, size = (0xF0000, 0x10000) if number == 0 else (0xC0000 + (number - 1) * 0x4000, 0x4000)
    layout.set_pam(number, 3)
    assert layout.pam(number) == 3
    assert [layout.pam(other) for other in range(13) if other != number] == [0] * 12
    ours = [address for address in range(0xC0000, 0x100000, 0x1000) if shown(layout, "memory", address)[0] == "pc.ram"]
    assert ours == list(range(start, start + size, 0x1000))
    # Registers 1 to 6 have two segments each, the lower one in bits 0 to 3; register 0 has one in bits 4 to 7.
    assert layout.config_read(layout.PAM0 + (number + 1) // 2) == (0x03 if number % 2 else 0x30)


def test_smram_is_for_smm_only(layout: Layout) -> None:
    # RAM at 0xa0000 is hidden by PCI's memory once there is any, such as VGA's, unless the access is from SMM.
    from hvmodel.ram import MemoryRegion, MemoryRegionOps

    ram = layout.ram
    assert isinstance(ram, RamBlock)
    ram.write(0xA0000, b"\x5a")
    ops = MemoryRegionOps(read=lambda addr, size: 0x11, write=lambda addr, value, size: None)
    layout.pci.add_subregion(0xA0000, MemoryRegion.io("vga-lowmem", 0x20000, ops), priority=1)
    smm = layout.space("cpu-smm-0")
    assert (layout.memory.load(0xA0000, 1)[0], smm.load(0xA0000, 1)[0]) == (0x11, 0x11)
    layout.set_smram(layouts.G_SMRAME)
    assert (layout.memory.load(0xA0000, 1)[0], smm.load(0xA0000, 1)[0]) == (0x11, 0x5A)
    layout.set_smram(layouts.G_SMRAME | layouts.D_OPEN)
    assert (layout.memory.load(0xA0000, 1)[0], smm.load(0xA0000, 1)[0]) == (0x5A, 0x5A)
    assert layout.space("cpu-memory-0").load(0xA0000, 1)[0] == 0x5A


def test_q35_tseg_and_high_smram() -> None:
    with Q35Layout("16M") as q35:
        q35.set_smram(layouts.G_SMRAME)
        for code, size in ((0, 1 * MiB), (1, 2 * MiB), (2, 8 * MiB), (3, 16 * MiB)):
            q35.set_esmramc(layouts.T_EN | code << 1)
            start = 16 * MiB - size
            assert shown(q35, "memory", start)[0] == "tseg-blackhole"
            assert shown(q35, "memory", 16 * MiB - 1)[0] == "tseg-blackhole"
            assert shown(q35, "cpu-smm-0", start) == ("pc.ram", "ram", start)
            if start:
                assert shown(q35, "memory", start - 1) == ("pc.ram", "ram", start - 1)
        q35.set_esmramc(layouts.H_SMRAME)
        assert shown(q35, "memory", 0xFEDA0000) is None
        assert shown(q35, "cpu-smm-0", 0xFEDA0000) == ("pc.ram", "ram", 0xA0000)
        assert shown(q35, "memory", 16 * MiB - 1) == ("pc.ram", "ram", 16 * MiB - 1)


def test_q35_lock_holds_until_reset() -> None:
    with Q35Layout(plan(128 * MiB)) as q35:
        q35.config_write(0x9D, layouts.G_SMRAME | layouts.D_LCK | layouts.D_OPEN)
        assert q35.config_read(0x9D) == layouts.G_SMRAME | layouts.D_LCK | layouts.C_BASE_SEG  # the lock closes it
        q35.config_write(0x9D, 0)
        q35.config_write(0x9E, 0xFF)
        assert q35.config_read(0x9D) == layouts.G_SMRAME | layouts.D_LCK | layouts.C_BASE_SEG
        assert q35.config_read(0x9E) == 0x38
        q35.reset()
        q35.config_write(0x9D, layouts.D_OPEN)
        assert q35.config_read(0x9D) == layouts.D_OPEN | layouts.C_BASE_SEG


# ---- what is refused, and what it leaves ----


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda board: board.config_write(0x59, 0x100), "value"),
        (lambda board: board.config_write(0x59, -1), "value"),
        (lambda board: board.config_write(0xFF, 0, 2), "offset"),
        (lambda board: board.config_read(0, 3), "size"),
        (lambda board: board.set_pam(13, 0), "number"),
        (lambda board: board.set_pam(0, 4), "attributes"),
        (lambda board: board.set_smram(256), "value"),
        (lambda board: board.space("nowhere"), "name"),
    ],
)
def test_bad_writes(layout: Layout, call: object, field: str) -> None:
    before = [layout.config_read(offset) for offset in layout.OFFSETS]
    with pytest.raises(ArgumentError) as caught:
        call(layout)  # type: ignore[operator]
    assert caught.value.field == field
    assert [layout.config_read(offset) for offset in layout.OFFSETS] == before


def test_other_registers_are_left_alone(layout: Layout) -> None:
    layout.config_write(0, 0xFFFFFFFF, 4)
    assert layout.config_read(0, 4) == 0
    assert layout.pam(0) == 0


def test_a_refused_change_leaves_registers_and_memory(layout: Layout) -> None:
    class Refuses(MemoryListener):
        refusing = False

        def region_add(self, section: object) -> None:
            if self.refusing:
                raise OSError(28, "no slot left")

    listener = Refuses()
    layout.memory.add_listener(listener)
    before = info_mtree(layout.spaces, flatview=True)
    listener.refusing = True
    with pytest.raises(OSError, match="no slot left"):
        layout.config_write(layout.PAM0, 0x33333333, 4)
    listener.refusing = False
    assert layout.config_read(layout.PAM0, 4) == 0
    assert info_mtree(layout.spaces, flatview=True) == before
    layout.config_write(layout.PAM0, 0x33333333, 4)
    assert shown(layout, "memory", 0xC0000) == ("pc.ram", "ram", 0xC0000)


def test_one_write_is_one_transaction(layout: Layout) -> None:
    class Counts(MemoryListener):
        commits = 0

        def commit(self) -> None:
            self.commits += 1

    counts = Counts()
    layout.memory.add_listener(counts)
    counts.commits = 0
    layout.config_write(layout.PAM0, 0x33333333, 4)
    assert counts.commits == 1
    layout.config_write(layout.PAM0, 0x33333333, 4)  # nothing changes
    assert counts.commits == 1


def test_close_leaves_the_callers_block() -> None:
    with RamBlock("pc.ram", "1M") as ram:
        layout = PcLayout(ram)
        firmware = layout.blocks[1]
        assert isinstance(firmware, RamBlock)
        layout.close()
        layout.close()
        assert layout.closed
        assert firmware.closed
        assert not ram.closed
        assert repr(layout) == "<PcLayout closed>"
        for call in (lambda: layout.memory, lambda: layout.set_pam(0, 1), layout.reset):
            with pytest.raises(ClosedError):
                call()


def test_a_plan_has_no_memory() -> None:
    with PcLayout(plan(16 * MiB)) as pc:
        for access in (lambda: pc.memory.read(0, 4), lambda: pc.memory.write(0, b"x"), lambda: pc.memory.load(0, 1)):
            with pytest.raises(ArgumentError, match="without memory"):
                access()
        assert all(isinstance(block, BlockPlan) for block in pc.blocks)
        with pytest.raises(ArgumentError, match="without memory"):
            pc.blocks[0].mapping  # noqa: B018  # which a KvmMemoryListener would put into a memslot


def test_cpus_have_their_spaces() -> None:
    with Q35Layout(plan(16 * MiB), cpus=2) as q35:
        names = [space.name for space in q35.spaces]
        assert sorted(names) == ["I/O", "cpu-memory-0", "cpu-memory-1", "cpu-smm-0", "cpu-smm-1", "memory"]
        assert q35.space("cpu-memory-1").flatview is q35.memory.flatview
        assert shown(q35, "I/O", 0) == ("io", "i/o", 0)


# ---- QEMU ----


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda configuration: configuration.title)
def test_trees_and_views_are_qemus(configuration: Configuration) -> None:
    """Every line of the trees, of QEMU 7.2 those of devices too; ranges of the views; the registers."""
    need("qemu")
    theirs, our = recorded(configuration), ours(configuration)
    assert our.registers == theirs.registers
    for mine, text in ((our.mtree, theirs.mtree), (our.mtree_disabled, theirs.mtree_disabled)):
        trees, qemus = parse_mtree(mine), parse_mtree(text)
        for space in trees.spaces:
            if space.names != ("I/O",):
                assert qemus.space(space.names[0]) == space
        assert {region.names: region.lines for region in trees.regions} == {
            region.names: region.lines for region in qemus.regions if region.names != ("io",)
        }
    views = {space[0]: (view.root, view.ranges) for view in parse_flat(theirs.flat) for space in view.spaces}
    for view in parse_flat(our.flat):
        for name, _, _ in view.spaces:
            assert name == "I/O" or views[name] == (view.root, view.ranges)


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.BOARD)
def test_text_is_qemus(board: type[Layout]) -> None:
    """The text itself, tree by tree: the order of trees is that of a hash table in QEMU."""
    need("qemu")

    def blocks(text: str) -> set[str]:
        found = {block.strip("\n") for block in text.split("\n\n") if block.strip("\n")}
        return {block.partition("\n")[2] if block.startswith("FlatView") else block for block in found}

    with (
        Qemu(
            "-m",
            "4G",
            "-object",
            f"memory-backend-ram,id=pc.ram,size={4 * GiB},reserve=off",
            machine=f"{board.BOARD},memory-backend=pc.ram",
        ) as qemu,
        board(plan(4 * GiB), devices=True) as layout,
    ):
        spaces = [space for space in layout.spaces if space.name != "I/O"]
        for options, arguments in (("", {}), (" -D", {"disabled": True}), (" -f", {"flatview": True})):
            mine = blocks(info_mtree(spaces, **arguments))
            assert len(mine) > 1
            assert mine <= blocks(qemu.monitor(f"info mtree{options}"))


def test_random_writes_of_registers() -> None:
    """Sequences of writes, and resets, to QEMU and to us: registers, trees and views stay equal."""
    need("qemu")
    rng = random.Random(3)
    for _ in range(cases(4, 25)):
        for board in BOARDS:
            ram = rng.choice((8, 64, 4096)) * MiB
            backend = f"memory-backend-ram,id=pc.ram,size={ram},reserve=off"
            words = ["-m", f"{ram // MiB}M", "-object", backend]
            with (
                Qemu(*words, machine=f"{board.BOARD},memory-backend=pc.ram") as qemu,
                board(plan(ram), devices=True) as layout,
            ):
                done: list[object] = []
                for _ in range(cases(8, 30)):
                    if rng.random() < 0.05:
                        qemu.reset()
                        layout.reset()
                        done.append("reset")
                    else:
                        size = rng.choice((1, 1, 1, 2, 4))
                        offset = rng.choice(board.OFFSETS) // size * size
                        if board is Q35Layout and offset + size > 0x9D and rng.random() < 0.7:
                            value = rng.getrandbits(8 * size) & ~sum(0x10 << 8 * n for n in range(size))  # D_LCK
                        else:
                            value = rng.choice((rng.getrandbits(8 * size), (1 << 8 * size) - 1))
                        qemu.config_write(offset, value, size)
                        layout.config_write(offset, value, size)
                        done.append((hex(offset), hex(value), size))
                    found = [layout.config_read(offset) for offset in layout.OFFSETS]
                    assert found == [qemu.config_read(offset) for offset in layout.OFFSETS], done
                    if layout.below_4g == 8 * MiB and found[-1] & 7 == 7:
                        continue  # an extended TSEG of 16 MiB, larger than the RAM
                    text = qemu.monitor("info mtree")
                    views = {
                        space[0]: view.ranges
                        for view in parse_flat(qemu.monitor("info mtree -f"))
                        for space in view.spaces
                    }
                    for view in parse_flat(info_mtree(layout.spaces, flatview=True)):
                        for name, _, _ in view.spaces:
                            if name != "I/O":
                                assert views[name] == view.ranges, done
                                assert flat_ranges(parse_mtree(text), name) == view.ranges, done
                    mine = parse_mtree(info_mtree(layout.spaces)).space("memory")
                    assert parse_mtree(text).space("memory") == mine, done


# ---- firmware ----


@pytest.mark.parametrize(("board", "identity"), [(PcLayout, 0x12378086), (Q35Layout, 0x29C08086)])
def test_seabios_makes_its_shadow_writable(board: type[Layout], identity: int) -> None:
    """SeaBIOS on KVM: it looks for the host bridge, jumps to its copy below 4 GiB, writes PAM, and copies itself."""
    need("kvm", "seabios")
    image = Path("/usr/share/seabios/bios-256k.bin").read_bytes()
    address, text, end = 0, b"", time.monotonic() + 60
    with (
        board("16M", bios=image) as layout,
        # Its vCPU, and no RAM but a page that is out of the way.
        hv.Machine(ram=0x1000, unclaimed="open_bus") as machine,
    ):
        machine.memory.root.subregions[0].enabled = False
        layout.memory.add_listener(KvmMemoryListener(machine.vm, readonly_sections=True))
        assert layout.pam(0) == 0
        machine.vcpu.reset()
        for exit in machine.exits():
            if isinstance(exit, hv.IoOut):
                value, at = int.from_bytes(exit.data, "little"), exit.port - 0xCFC
                if exit.port == 0x402:
                    text += exit.data
                elif exit.port == 0xCF8:
                    address = value
                elif 0 <= at < 4 and address & 0xFFFF00 == 0:
                    layout.config_write((address & 0xFC) + at, value, exit.size)
            elif isinstance(exit, hv.IoIn):
                at, answer = exit.port - 0xCFC, (1 << 8 * exit.size) - 1
                if exit.port == 0x402:
                    answer = 0xE9
                elif exit.port == 0xCF8:
                    answer = address
                elif 0 <= at < 4 and address & 0xFFFF00 == 0:
                    offset = (address & 0xFC) + at
                    answer = identity >> 8 * offset if offset < 4 else layout.config_read(offset, exit.size)
                machine.answer(answer & (1 << 8 * exit.size) - 1)
            if b"Running on KVM\n" in text or time.monotonic() > end:
                break
        assert b"Running on KVM\n" in text, text
        assert b"Unable to unlock ram" not in text
        assert [layout.pam(number) for number in range(13)] == [PAM_READ | PAM_WRITE] * 13
        slot = machine.vm.memslot_at(0xF0000)
        assert slot is not None
        assert not slot.readonly
        assert layout.ram.read(0xFFFF0, 5) == image[-16:-11]  # the jump at the reset vector, now in RAM
        layout.memory.remove_listener(layout.memory.listeners[0])


# ---- the checks ----


def test_the_checks_hold() -> None:
    need("qemu")
    for result in run(["layout", "flat_text", "ram_offsets"], cases=24):
        assert result.ok, result
        assert result.compared >= 24 * 3


def test_the_checks_see_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    need("qemu")
    monkeypatch.setattr(layouts, "OPTION_ROM_BASE", 0xC1000)
    tally = Tally("ours", "QEMU")
    check_layout(tally, 1)
    # Moved by a page: the line in the trees of memory, system and pci, and ranges of the views.
    assert tally.result().mismatches >= 3


def test_order_of_creation() -> None:
    def block(idstr: str, size: int) -> RamBlockLine:
        return RamBlockLine(idstr, 4096, 0, size, size)

    listed = [block("pc.ram", 64), block("mem", 32), block("a", 8), block("b", 8)]
    assert [one.idstr for one in creation_order(listed, [8, 64, 8])] == ["mem", "a", "pc.ram", "b"]
    with pytest.raises(ArgumentError):
        creation_order(listed, [16])
