"""The machine's address spaces: what is put into them is there for the guest, memory as memslots, io by callbacks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

import hvmodel as hv
from hvmodel.ram import MemoryBackendMemfd, MemoryRegion, MemoryRegionOps, RamBlock, transaction

Boot = Callable[..., hv.Machine]

PAGE = 0x1000

# mov ax, 0x9000; mov ds, ax: data at gpa 0x90000 from here on
AT_90000 = "b80090 8ed8 "


class Device:
    """Registers that answer 0x40 + address in each byte, and note every access as it comes."""

    def __init__(self, name: str, size: int, **limits: Any) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.region = MemoryRegion.io(name, size, MemoryRegionOps(self.read, self.write, **limits))

    def read(self, addr: int, size: int) -> int:
        self.seen.append(("read", addr, size))
        return int.from_bytes(bytes(0x40 + addr + at for at in range(size)), "little")

    def write(self, addr: int, value: int, size: int) -> None:
        self.seen.append(("write", addr, value, size))


def test_a_port_is_served_by_its_region(boot: Boot) -> None:
    # in al, 0x10; out 0x13, al; mov ax, 0x1234; out 0x12, ax; hlt
    machine = boot("e410 e613 b83412 e712 f4")
    device = Device("dev", 4)
    machine.io.root.add_subregion(0x10, device.region)
    assert machine.run(10).halted
    assert device.seen == [("read", 0, 1), ("write", 3, 0x40, 1), ("write", 2, 0x1234, 2)]


def test_an_address_is_served_by_its_region(boot: Boot) -> None:
    # mov eax, [0]; mov [0x10], eax; hlt
    machine = boot(AT_90000 + "66a10000 66a31000 f4", ram="512K")
    device = Device("dev", 0x20)
    machine.memory.root.add_subregion(0x90000, device.region)
    assert machine.run(10).halted
    assert device.seen == [("read", 0, 4), ("write", 0x10, 0x43424140, 4)]


def test_accesses_are_split_at_what_a_region_takes(boot: Boot) -> None:
    # mov eax, [1]; mov [2], eax; hlt
    machine = boot(AT_90000 + "66a10100 66a30200 f4", ram="512K")
    device = Device("dev", 0x20, valid_unaligned=True, impl_max=2)
    machine.memory.root.add_subregion(0x90000, device.region)
    assert machine.run(10).halted
    # Four bytes at 1: the callbacks take two at most, at a multiple of two.
    assert {seen[0] for seen in device.seen} == {"read", "write"}
    assert all(seen[-1] <= 2 for seen in device.seen)
    assert all(seen[1] % seen[-1] == 0 for seen in device.seen)
    written = bytearray(0x20)
    for what, addr, *rest in device.seen:
        if what == "write":
            written[addr : addr + rest[1]] = rest[0].to_bytes(rest[1], "little")
    assert written[2:6] == bytes((0x41, 0x42, 0x43, 0x44))


@pytest.mark.parametrize("unclaimed", ["strict", "open_bus"])
def test_strings_are_accesses_of_their_elements(boot: Boot, unclaimed: str) -> None:
    # mov dx, 0x10; mov si, 0x7c00; mov cx, 5; cld; rep outsb; mov di, 0x5000; mov cx, 6; rep insb; hlt
    code = "ba1000 be007c b90500 fc f36e bf0050 b90600 f36c f4"
    machine = boot(code, unclaimed=unclaimed)
    device = Device("dev", 1)
    machine.io.root.add_subregion(0x10, device.region)
    assert machine.run(10).halted
    image = bytes.fromhex(code)
    assert [seen for seen in device.seen if seen[0] == "write"] == [("write", 0, byte, 1) for byte in image[:5]]
    assert len([seen for seen in device.seen if seen[0] == "read"]) >= 6
    assert machine.read(0x5000, 6) == b"@" * 6


def test_what_is_partly_nobodys_is_an_error_on_a_strict_machine_and_ones_on_an_open_bus(boot: Boot) -> None:
    for unclaimed in ("strict", "open_bus"):
        machine = boot("ed 66a30050 f4".replace("ed", "ba1000 66ed"), unclaimed=unclaimed)  # in eax, dx
        device = Device("dev", 1)
        machine.io.root.add_subregion(0x10, device.region)
        if unclaimed == "strict":
            with pytest.raises(hv.GuestAccessError, match="read from port 0x10"):
                machine.run(10)
            assert device.seen == []
        else:
            assert machine.run(10).halted
            assert machine.read(0x5000, 4) == b"\x40\xff\xff\xff"


def test_what_a_region_refuses_is_nobodys_on_a_strict_machine(boot: Boot) -> None:
    machine = boot("e410 f4")  # in al, 0x10
    machine.io.root.add_subregion(0x10, Device("words", 2, valid_min=2, valid_max=4).region)
    with pytest.raises(hv.GuestAccessError, match="read from port 0x10"):
        machine.run(10)


def test_an_open_bus_is_served_in_c_only_where_no_region_needs_python(boot: Boot) -> None:
    # out 0x20, al; in al, 0x10; out 0x20, al; hlt
    machine = boot("e620 e410 e620 f4", unclaimed="open_bus")
    device = Device("dev", 1)
    machine.io.root.add_subregion(0x10, device.region)
    assert machine.run(10).halted
    assert device.seen == [("read", 0, 1)]
    machine.io.root.del_subregion(device.region)
    machine.vcpu.real_mode(entry=0x7C00)
    assert machine.run(10).halted
    assert device.seen == [("read", 0, 1)]
    assert machine.vcpu.regs.rax & 0xFF == 0xFF


def test_a_region_that_a_callback_adds_is_there_for_the_next_exit(boot: Boot) -> None:
    for unclaimed in ("strict", "open_bus"):
        machine = boot("e610 e411 f4", unclaimed=unclaimed)  # out 0x10, al; in al, 0x11; hlt
        late = Device("late", 1)
        ports = machine.io.root

        def switch(addr: int, value: int, size: int, ports: MemoryRegion = ports, late: Device = late) -> None:
            ports.add_subregion(0x11, late.region)

        ports.add_subregion(0x10, MemoryRegion.io("switch", 1, MemoryRegionOps(write=switch)))
        assert machine.run(10).halted
        assert late.seen == [("read", 0, 1)]


def test_an_exception_in_a_callback_reaches_who_runs_the_machine(boot: Boot) -> None:
    machine = boot("e410 e611 f4")  # in al, 0x10; out 0x11, al; hlt

    def broken(addr: int, size: int) -> int:
        raise ZeroDivisionError("in the device")

    seen = []
    machine.io.root.add_subregion(0x10, MemoryRegion.io("broken", 1, MemoryRegionOps(read=broken)))
    machine.io.root.add_subregion(
        0x11, MemoryRegion.io("after", 1, MemoryRegionOps(write=lambda addr, value, size: seen.append(value)))
    )
    with pytest.raises(ZeroDivisionError, match="in the device"):
        machine.run(10)
    with pytest.raises(hv.UnansweredError):
        machine.run(10)
    machine.answer(0x5A)
    assert machine.run(10).halted
    assert seen == [0x5A]


def test_exits_gives_only_what_no_region_claims(boot: Boot) -> None:
    machine = boot("e610 e611 f4")
    device = Device("dev", 1)
    machine.io.root.add_subregion(0x10, device.region)
    exit = next(machine.exits(10))
    assert isinstance(exit, hv.IoOut)
    assert exit.port == 0x11
    assert len(device.seen) == 1


def test_of_two_regions_the_one_of_higher_priority_is_asked(boot: Boot) -> None:
    machine = boot("e410 f4")
    low, high = Device("low", 8), Device("high", 1)
    machine.io.root.add_subregion(0x10, low.region)
    machine.io.root.add_subregion(0x10, high.region, priority=1)
    assert machine.run(10).halted
    high.region.enabled = False
    machine.vcpu.real_mode(entry=0x7C00)
    assert machine.run(10).halted
    assert (low.seen, high.seen) == ([("read", 0, 1)],) * 2


def test_ram_that_is_added_is_a_memslot_and_then_gone(boot: Boot) -> None:
    # mov al, [0]; mov byte ptr [1], 0x77; hlt
    machine = boot(AT_90000 + "a00000 c606010077 f4", ram="512K")
    with RamBlock("more", PAGE) as more:
        more.write(0, b"\x66")
        region = MemoryRegion.ram("more", more)
        machine.memory.root.add_subregion(0x90000, region)
        slot = machine.vm.memslot_at(0x90000)
        assert slot is not None
        assert (slot.gpa, slot.size, slot.hva) == (0x90000, PAGE, more.host)
        assert machine.run(10).halted
        assert machine.vcpu.regs.rax & 0xFF == 0x66
        assert machine.read(0x90000, 2) == more.read(0, 2) == b"\x66\x77"
        with pytest.raises(hv.BusyError):
            more.close()
        machine.memory.root.del_subregion(region)
        assert machine.vm.memslot_at(0x90000) is None
    machine.vcpu.real_mode(entry=0x7C00)
    with pytest.raises(hv.GuestAccessError, match="read from address 0x90000"):
        machine.run(10)


def test_a_rom_device_is_memory_or_registers(boot: Boot) -> None:
    # mov al, [0]; mov byte ptr [1], 0x90; mov ah, [1]; hlt
    machine = boot(AT_90000 + "a00000 c606010090 8a260100 f4", ram="512K", unclaimed="open_bus")
    seen: list[tuple[int, int]] = []
    flash = RamBlock("flash", PAGE)
    flash.write(0, b"\x11\x22")
    region: MemoryRegion

    def write(addr: int, value: int, size: int) -> None:
        seen.append((addr, value))
        region.romd = False

    region = MemoryRegion.rom_device("flash", flash, MemoryRegionOps(lambda addr, size: 0x80 | addr, write))
    machine.memory.root.add_subregion(0x90000, region)
    try:
        assert machine.run(10).halted
        assert seen == [(1, 0x90)]
        assert machine.vcpu.regs.rax & 0xFFFF == 0x8111  # 0x11 as memory, then 0x80 | 1 by the callback
        assert flash.read(0, 2) == b"\x11\x22"
    finally:
        machine.close()
        flash.close()


def test_less_than_a_page_of_ram_is_served_without_a_memslot(boot: Boot) -> None:
    machine = boot(AT_90000 + "a00800 c606090077 f4", ram="512K")  # mov al, [8]; mov byte ptr [9], 0x77; hlt
    with RamBlock("small", PAGE) as small:
        small.write(0x108, b"\x66")
        whole = MemoryRegion.ram("small", small)
        part = MemoryRegion.alias("part", whole, 0x100, 0x10)
        machine.memory.root.add_subregion(0x90000, part)
        assert machine.vm.memslot_at(0x90000) is None
        assert machine.run(10).halted
        assert machine.vcpu.regs.rax & 0xFF == 0x66
        assert small.read(0x108, 2) == b"\x66\x77"
        machine.memory.root.del_subregion(part)


def test_ram_is_reached_wherever_the_layout_shows_it(boot: Boot) -> None:
    machine = boot(ram="1M")
    low = machine.memory.root.subregions[0]
    target = low.target
    assert target is not None
    with transaction():
        machine.memory.root.add_subregion(1 << 32, MemoryRegion.alias("again", target, 0x8000, 0x4000))
    machine.write((1 << 32) + 4, b"here")
    assert machine.read(0x8004, 4) == b"here"
    assert bytes(machine.view((1 << 32) + 4, 4)) == b"here"
    with pytest.raises(hv.ArgumentError, match="not in RAM"):
        machine.read((1 << 32) + 0x3FFE, 4)


def test_a_closed_machine_no_longer_follows_its_spaces(boot: Boot) -> None:
    machine = boot()
    memory, io = machine.memory, machine.io
    machine.close()
    assert memory.closed
    assert io.closed
    memory.root.add_subregion(1 << 33, MemoryRegion.io("late", 0x10))


def test_what_a_region_refuses_reads_as_ones_on_an_open_bus(boot: Boot) -> None:
    machine = boot("66b80000 0000 66e510 66a30050 e414 a20450 f4".replace(" ", ""), unclaimed="open_bus")
    machine.io.root.add_subregion(0x10, MemoryRegion.io("write-only", 4, MemoryRegionOps(write=lambda *_: None)))
    machine.io.root.add_subregion(0x14, MemoryRegion.io("nothing", 1))
    assert machine.run(10).halted  # in eax, 0x10; mov [0x5000], eax; in al, 0x14; mov [0x5004], al; hlt
    assert machine.read(0x5000, 5) == b"\xff" * 5


@pytest.mark.parametrize("how", ["a rule's callback", "another thread"])
def test_a_region_that_comes_while_c_serves_an_open_bus_is_asked(boot: Boot, how: str) -> None:
    machine = boot("e610 e611 ebfc", unclaimed="open_bus")  # out 0x10, al; then out 0x11, al for ever
    seen = threading.Event()

    def come(*_: int) -> None:
        late = MemoryRegionOps(write=lambda *_: seen.set() or machine.kick())
        machine.io.root.add_subregion(0x11, MemoryRegion.io("late", 1, late))

    machine.batch  # noqa: B018  # C serves what no region claims
    if how == "another thread":
        timer = threading.Timer(0.1, come)
        timer.start()
    else:
        machine.io.root.add_subregion(0x10, MemoryRegion.io("switch", 1, MemoryRegionOps(write=come)))
        machine.batch.pio(0x10, 1, write="stop")
    assert machine.run(10).reason == "interrupted"
    assert seen.is_set()


def test_writes_to_rom_are_nobodys_whatever_its_size(boot: Boot) -> None:
    # mov byte ptr [1], 0x77 into ROM of a page and a half: the first page is a memslot, the rest is not
    for at in ("0100", "0110"):
        machine = boot(AT_90000 + f"c606{at}77 f4", ram="512K")
        with RamBlock("rom", 2 * PAGE) as rom:
            shown = MemoryRegion.alias("shown", MemoryRegion.rom("rom", rom), 0, PAGE + PAGE // 2)
            machine.memory.root.add_subregion(0x90000, shown)
            with pytest.raises(hv.GuestAccessError, match="wrote 77 to address 0x9"):
                machine.run(10)
            assert not any(rom.read(0, 2 * PAGE))
            machine.close()


@pytest.mark.parametrize("unclaimed", ["strict", "open_bus"])
def test_the_debug_exit_port_comes_before_a_region(boot: Boot, unclaimed: str) -> None:
    machine = boot("b005 e6f4 f4", unclaimed=unclaimed, debug_exit=0xF4)  # mov al, 5; out 0xf4, al; hlt
    device = Device("all", 0x10000)
    machine.io.root.add_subregion(0, device.region)
    assert machine.run(10).value == 5
    assert device.seen == []


def test_nothing_at_the_end_of_ram_is_refused_whatever_was_asked_before() -> None:
    with hv.Machine("64K") as machine:
        for ask in (lambda: machine.read(0, 1), lambda: machine.read(0xFFFF, 1)):
            for method in (machine.read, machine.view, machine.writable):
                with pytest.raises(hv.ArgumentError, match="not in RAM"):
                    method(0x10000, 0)
            ask()  # which notes the range
        assert machine.read(0xFFFF, 0) == b""


def test_ram_by_a_backend_or_as_a_block_of_ones_own(boot: Boot) -> None:
    code = bytes.fromhex("c60600507f f4")  # mov byte ptr [0x5000], 0x7f; hlt
    with boot(code, ram=MemoryBackendMemfd("1M", share=False, seal=False)) as machine:
        assert machine.run(10).halted
        assert machine.read(0x5000, 1) == b"\x7f"
        assert not machine.ram.mapping.shared
        assert machine.ram.idstr == "pc.ram"
    assert machine.ram.closed
    with RamBlock("mine", "1M") as block:
        with boot(code, ram=block) as machine:
            assert machine.ram is block
            assert machine.run(10).halted
            with pytest.raises(hv.BusyError):
                block.close()
        assert not block.closed
        assert block.read(0x5000, 1) == b"\x7f"
    with pytest.raises(hv.ClosedError):
        hv.Machine(ram=block)


def test_what_is_no_ram_is_refused() -> None:
    for ram in (hv.Hlt(), None, 1.5, True, b"1M"):
        with pytest.raises(hv.ArgumentTypeError, match=r"Machine: ram: expected"):
            hv.Machine(ram=ram)  # type: ignore[arg-type]
    with pytest.raises(hv.ArgumentError, match="size"):
        hv.Machine(ram=MemoryBackendMemfd(0))
