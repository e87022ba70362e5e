"""The memory of QEMU's PC boards: `PcLayout` (i440FX) and `Q35Layout` own the tree of regions, the address spaces that
show it, the blocks of the firmware, and the registers of the host bridge that move memory about.

    system                                priority   what
      0            ram-below-4g               0      RAM up to the hole
      0            pci                       -1      all 2**64: pc.rom, the firmware, what devices put there
      0xa0000      smram-region               1      hides RAM from all but SMM, while SMRAM is closed
      0xc0000      pam-*, 13 times 4          1      by PAM: RAM, read-only RAM, or the firmware behind it
      0xfee00000   apic-msi                4096
      4 GiB        ram-above-4g               0      the rest of RAM

    where the hole begins     pc                    q35
      RAM smaller than        3.5 GiB: no hole      2.75 GiB: no hole
      otherwise at            3 GiB                 2 GiB
      max_ram_below_4g        moves it              makes it larger only

    smram, in front of system for a CPU in SMM
      0xa0000      smram-low                  0      the RAM behind smram-region
      q35 only: smram-high at 0xfeda0000, tseg-window at the end of ram-below-4g, smbase-window at 0x30000

Of two regions with the same place and priority the one added last shows, so the order of making is QEMU's too.

Sources: QEMU v7.2: pc_init1, hw/i386/pc_piix.c; pc_q35_init, hw/i386/pc_q35.c; pc_memory_init, hw/i386/pc.c;
x86_bios_rom_init, hw/i386/x86.c; hw/pci-host/{i440fx,q35,pam}.c; tcg_cpu_machine_done,
target/i386/tcg/sysemu/tcg-cpu.c.  82441FX (Intel 290549): PAM and SMRAM registers; 3 Series chipset (Intel 316966):
PAM, SMRAM, ESMRAMC.
"""

from __future__ import annotations

from ..errors import ArgumentError, ArgumentTypeError, ClosedError
from ..host.mapping import index
from ..host.memfd import page_multiple
from ..ram.address_space import AddressSpace
from ..ram.block import RamBlock
from ..ram.region import ADDRESS_END, MemoryRegion
from ..ram.topology import transaction
from ..units import GiB, KiB, MiB, align_up, parse_size
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar, Self, TypeAlias, cast

    from typing_extensions import Buffer

    from ..host.mapping import Mapping

    Block: TypeAlias = "RamBlock | BlockPlan"
else:

    def cast(_, value):
        return value


__all__ = ["BlockPlan", "Layout", "PcLayout", "Q35Layout"]

# ---- places ----

SMRAM_BASE, SMRAM_SIZE = 0xA0000, 0x20000
PAM_BASE, PAM_SIZE = 0xC0000, 0x4000  # of each of 12, under the 64 KiB of the BIOS
PAM_BIOS_BASE, PAM_BIOS_SIZE = 0xF0000, 0x10000
OPTION_ROM_BASE, OPTION_ROM_SIZE = 0xC0000, 0x20000
ISA_BIOS_END, ISA_BIOS_SIZE = 0x100000, 128 * KiB
BIOS_SIZE, BIOS_ALIGN, BIOS_MAX = 256 * KiB, 64 * KiB, 16 * MiB  # QEMU's own; of all; what a PC decodes
IOAPIC_BASE = 0xFEC00000
HIGH_SMRAM_BASE = 0xFEDA0000
SMBASE_BASE, SMBASE_SIZE = 0x30000, 0x20000

AMD_HT_START = 0xFD00000000  # of HyperTransport's range below 1 TiB, which an IOMMU of AMD keeps
AMD_ABOVE_1TB = 1 << 40

# name, address, size, priority
_DEVICES = (
    ("ioapic", IOAPIC_BASE, 0x1000, 0),
    ("hpet", 0xFED00000, 0x400, 0),
    ("apic-msi", 0xFEE00000, 0x100000, 4096),
)

# ---- registers ----
#
#   PAM0        |7..6|5..4 0xf0000..0xfffff|3..0|           two bits: 1 reads, 2 writes go to RAM; else to pci
#   PAM1..PAM6  |7..6|5..4 upper 16 KiB|3..2|1..0 lower 16 KiB|      of 0xc0000 + (n - 1) * 0x8000
#   SMRAM       |7|6 D_OPEN|5 D_CLS|4 D_LCK|3 G_SMRAME|2..0 C_BASE_SEG = 2|
#   ESMRAMC     |7 H_SMRAME|6 E_SMERR|5 SM_CACHE|4 SM_L1|3 SM_L2|2..1 TSEG_SZ 1, 2, 8 MiB, extended|0 T_EN|
#   F_SMBASE    QEMU's own: 0xff asks, 1 answers "there is RAM for SMBASE", 2 locks it into SMRAM

NR_PAM = 13
PAM_READ, PAM_WRITE = 1, 2
D_OPEN, D_CLS, D_LCK, G_SMRAME, C_BASE_SEG = 0x40, 0x20, 0x10, 0x08, 0x02
H_SMRAME, TSEG_SIZE, T_EN = 0x80, 0x06, 0x01
_TSEG_SIZES = {0: 1 * MiB, 2: 2 * MiB, 4: 8 * MiB}
SMBASE_QUERY, SMBASE_IN_RAM, SMBASE_LCK = 0xFF, 0x01, 0x02


class BlockPlan(Value):
    """A block of which only the name and the size are known, where a tree is all that is wanted: there is no memory."""

    idstr: str
    used_length: int

    @property
    def max_length(self) -> int:
        """The same as `used_length`."""
        return self.used_length

    @property
    def mapping(self) -> Mapping:
        """Raises ArgumentError: there is nothing that a memslot could have."""
        raise self._refusal("mapping", 0)

    def read(self, offset: int, size: int) -> bytes:  # noqa: ARG002
        """Raises ArgumentError: there is nothing to read."""
        raise self._refusal("read", offset)

    def write(self, offset: int, data: Buffer) -> None:  # noqa: ARG002
        """Raises ArgumentError: there is nothing to write to."""
        raise self._refusal("write", offset)

    def _refusal(self, call: str, offset: int) -> ArgumentError:
        detail = f"{self.idstr} is a plan, without memory"
        return ArgumentError(f"BlockPlan.{call}", "offset", offset, "a layout that was made with a RamBlock", detail)


class Layout:
    """What `PcLayout` and `Q35Layout` share.

    `ram` is a RamBlock, which stays the caller's; a size, of which a block "pc.ram" is made; or a BlockPlan, and then
    nothing is allocated.  The other options are QEMU's:

        max_ram_below_4g   bytes up to 4 GiB; None or 0: where the board has the hole
        smm                whether the guest can enter SMM; the trees are the same without, as QEMU's under TCG
        bios               the firmware, a multiple of 64 KiB up to 16 MiB; None: 256 KiB of zeros
        cpus               CPUs, each with its address spaces
        devices            whether IOAPIC, HPET and MSIs have their regions, which refuse accesses; hpet=False: not HPET
        phys_bits, amd     bits of the guest's physical addresses (None: not checked), and whether its CPU is an AMD,
                           for which RAM that comes near 1 TiB is moved above it (QEMU's default: 40, True)

    Raises ArgumentError and ArgumentTypeError for what QEMU refuses; what RamBlock raises.  Nothing is left open then.
    Threads: any, one at a time; reading is free.
    """

    BOARD: ClassVar[str]
    """QEMU's -machine."""
    PAM0: ClassVar[int]
    """Offset of the first of seven PAM registers in the host bridge's configuration space."""
    SMRAM: ClassVar[int]
    """Offset of the SMRAM register."""
    OFFSETS: ClassVar[tuple[int, ...]]
    """Offsets of all registers that move memory, and that this object has."""
    PCI_HOLE64: ClassVar[int]
    """Bytes kept free for PCI above RAM, as far as `phys_bits` are checked."""

    def __init__(
        self,
        ram: RamBlock | BlockPlan | int | str,
        *,
        max_ram_below_4g: int | str | None = None,
        smm: bool = True,
        bios: Buffer | None = None,
        cpus: int = 1,
        devices: bool = False,
        hpet: bool = True,
        phys_bits: int | None = None,
        amd: bool = False,
    ) -> None:
        call = type(self).__name__
        for field, flag in (("smm", smm), ("devices", devices), ("hpet", hpet), ("amd", amd)):
            if not isinstance(flag, bool):
                raise ArgumentTypeError(call, field, flag, "True or False")
        cpus = index(cpus, call, "cpus")
        if not 1 <= cpus <= 255:
            raise ArgumentError(call, "cpus", cpus, "1 to 255")
        size = _ram_size(ram, call)
        firmware = _firmware(bios, call)
        limit = _limit(max_ram_below_4g, call)
        low = self._low(size, limit)
        self._below_4g, self._above_4g = low, size - low
        if low >= IOAPIC_BASE:
            accepted = f"a hole that begins below the IOAPIC, {IOAPIC_BASE:#x}"
            raise ArgumentError(call, "max_ram_below_4g", max_ram_below_4g, accepted, f"RAM would end at {low:#x}")
        self._above_4g_start = self._high_start(phys_bits, amd, call)
        self._smm = smm
        self._closed = False
        self._config = bytearray(256)
        self._wmask = bytearray(b"\xff" * 256)
        self._owned: list[RamBlock] = []
        self._spaces: tuple[AddressSpace, ...] = ()
        try:
            if isinstance(ram, int | str):
                ram = RamBlock("pc.ram", size)
                self._owned.append(ram)
            self._ram: Block = ram
            self._bios = self._block("pc.bios", len(firmware))
            self._rom = self._block("pc.rom", OPTION_ROM_SIZE)
            if isinstance(self._bios, RamBlock) and bios is not None:
                self._bios.write(0, firmware)
            self._build(devices, hpet, cpus)
        except BaseException:
            self.close()
            raise

    # ---- making ----

    # Bytes of RAM below 4 GiB.
    def _low(self, size: int, limit: int) -> int:
        raise NotImplementedError

    def _high_start(self, phys_bits: int | None, amd: bool, call: str) -> int:
        # pc_max_used_gpa: above the RAM there is the 64-bit hole of PCI, at a whole GiB.
        def last(start: int) -> int:
            return align_up(start + self._above_4g, GiB) + self.PCI_HOLE64 - 1

        start = 4 * GiB
        if amd and last(start) >= AMD_HT_START:
            start = AMD_ABOVE_1TB
        if phys_bits is not None:
            phys_bits = index(phys_bits, call, "phys_bits")
            if not 32 < phys_bits <= 52:
                raise ArgumentError(call, "phys_bits", phys_bits, "33 to 52, or None")
            if last(start) >> phys_bits:
                size = self._below_4g + self._above_4g
                detail = (
                    f"RAM and the PCI hole reach {last(start):#x}, {phys_bits} bits end at {(1 << phys_bits) - 1:#x}"
                )
                raise ArgumentError(call, "ram", size, "less RAM, or more phys_bits", detail)
        return start

    def _block(self, idstr: str, size: int) -> Block:
        if not isinstance(self._ram, RamBlock):
            return BlockPlan(idstr, size)
        block = RamBlock(idstr, size)
        self._owned.append(block)
        return block

    def _build(self, devices: bool, hpet: bool, cpus: int) -> None:
        self._system = system = MemoryRegion.container("system", ADDRESS_END)
        self._ports = MemoryRegion.io("io", 0x10000)
        self._pci = pci = MemoryRegion.container("pci", ADDRESS_END)
        self._ram_region = ram = MemoryRegion.ram(self._ram.idstr, cast("RamBlock", self._ram))
        system.add_subregion(0, MemoryRegion.alias("ram-below-4g", ram, 0, self._below_4g))
        if self._above_4g:
            above = MemoryRegion.alias("ram-above-4g", ram, self._below_4g, self._above_4g)
            system.add_subregion(self._above_4g_start, above)
        bios = MemoryRegion.rom("pc.bios", cast("RamBlock", self._bios))
        isa_size = min(bios.size, ISA_BIOS_SIZE)
        isa_bios = MemoryRegion.alias("isa-bios", bios, bios.size - isa_size, isa_size)
        pci.add_subregion(ISA_BIOS_END - isa_size, isa_bios, priority=1)
        isa_bios.readonly = True
        pci.add_subregion(4 * GiB - bios.size, bios)
        pci.add_subregion(OPTION_ROM_BASE, MemoryRegion.rom("pc.rom", cast("RamBlock", self._rom)), priority=1)
        system.add_subregion(0, pci, priority=-1)
        self._smram_region = self._part("smram-region", pci, SMRAM_BASE, SMRAM_SIZE)
        system.add_subregion(SMRAM_BASE, self._smram_region, priority=1)
        self._smram = MemoryRegion.container("smram", 4 * GiB)
        self._low_smram = self._part("smram-low", ram, SMRAM_BASE, SMRAM_SIZE)
        self._smram.add_subregion(SMRAM_BASE, self._low_smram)
        self._build_smram()
        # PAM 0 is the BIOS's segment, 1 to 12 follow each other from 0xc0000 on.
        places = [(PAM_BIOS_BASE, PAM_BIOS_SIZE), *((PAM_BASE + n * PAM_SIZE, PAM_SIZE) for n in range(NR_PAM - 1))]
        self._pam = [self._build_pam(start, size) for start, size in places]
        for name, address, size, priority in _DEVICES if devices else ():
            if name != "hpet" or hpet:
                system.add_subregion(address, MemoryRegion.io(name, size), priority)
        self._power_on()
        self._build_spaces(cpus)

    @staticmethod
    def _part(name: str, target: MemoryRegion, start: int, size: int) -> MemoryRegion:
        # An alias that shows its target at the same address.
        return MemoryRegion.alias(name, target, start, size)

    # What one segment shows, by its two bits; QEMU calls that for "writes only" pam-pci, though it is RAM.
    def _build_pam(self, start: int, size: int) -> list[MemoryRegion]:
        shown = []
        kinds = (("pam-pci", self._pci), ("pam-rom", self._ram_region), ("pam-pci", self._ram_region))
        for name, target in (*kinds, ("pam-ram", self._ram_region)):
            region = self._part(name, target, start, size)
            region.readonly = name == "pam-rom"
            region.enabled = False
            self._system.add_subregion(start, region, priority=1)
            shown.append(region)
        return shown

    def _build_smram(self) -> None:
        pass

    def _build_spaces(self, cpus: int) -> None:
        spaces = [AddressSpace(self._system, "memory"), AddressSpace(self._ports, "I/O")]
        self._spaces = tuple(spaces)
        for n in range(cpus):
            spaces.append(AddressSpace(self._system, f"cpu-memory-{n}"))
            root = MemoryRegion.container("memory", ADDRESS_END)
            root.add_subregion(0, MemoryRegion.alias("memory", self._system, 0, ADDRESS_END))
            root.add_subregion(0, MemoryRegion.alias("smram", self._smram, 0, 4 * GiB), priority=1)
            spaces.append(AddressSpace(root, f"cpu-smm-{n}"))
            self._spaces = tuple(spaces)

    # ---- what there is ----

    @property
    def ram(self) -> RamBlock | BlockPlan:
        """The block of the RAM."""
        return self._ram

    @property
    def blocks(self) -> tuple[RamBlock | BlockPlan, ...]:
        """RAM, firmware ("pc.bios") and option ROMs ("pc.rom"), in the order in which QEMU makes them."""
        return self._ram, self._bios, self._rom

    @property
    def below_4g(self) -> int:
        """Bytes of RAM below the hole, from address 0."""
        return self._below_4g

    @property
    def above_4g(self) -> int:
        """Bytes of RAM from `above_4g_start` on."""
        return self._above_4g

    @property
    def above_4g_start(self) -> int:
        """Where the RAM goes on above the hole: 4 GiB, or 1 TiB."""
        return self._above_4g_start

    @property
    def smm(self) -> bool:
        """Whether the guest can enter SMM."""
        return self._smm

    @property
    def system(self) -> MemoryRegion:
        """The root of what CPUs and devices see."""
        return self._system

    @property
    def pci(self) -> MemoryRegion:
        """Where PCI devices put their memory: below all of `system`, as far as nothing there covers it."""
        return self._pci

    @property
    def ports(self) -> MemoryRegion:
        """The 64 KiB of I/O ports, root of the address space "I/O"; where nothing is added it refuses accesses."""
        return self._ports

    @property
    def smram(self) -> MemoryRegion:
        """What a CPU in SMM sees in front of `system`."""
        return self._smram

    @property
    def spaces(self) -> tuple[AddressSpace, ...]:
        """All address spaces: "memory", "I/O", and of every CPU n "cpu-memory-n" and "cpu-smm-n"."""
        return self._spaces

    @property
    def memory(self) -> AddressSpace:
        """The address space "memory", of devices."""
        return self.space("memory")

    @property
    def io(self) -> AddressSpace:
        """The address space "I/O", of the ports."""
        return self.space("I/O")

    def space(self, name: str) -> AddressSpace:
        """The address space of this name.  Raises ArgumentError, ClosedError."""
        call = f"{type(self).__name__}.space"
        if self._closed:
            raise ClosedError(call, repr(self))
        for space in self._spaces:
            if space.name == name:
                return space
        raise ArgumentError(call, "name", name, ", ".join(space.name for space in self._spaces))

    # ---- registers ----

    def config_read(self, offset: int, size: int = 1) -> int:
        """The bytes [offset, offset + size) of the registers; 0 where there is none of `OFFSETS`.

        `size`: 1, 2 or 4.  Raises ArgumentError, ArgumentTypeError.
        """
        offset, size = self._access(offset, size, "config_read")
        own = self.OFFSETS
        found = bytes([self._config[at] if at in own else 0 for at in range(offset, offset + size)])
        return int.from_bytes(found, "little")

    def config_write(self, offset: int, value: int, size: int = 1) -> None:
        """A write to the host bridge's configuration space, as the guest makes it: what the bridge lets be written is,
        and the memory changes in one transaction.  Bytes that are none of `OFFSETS` are left alone.

        Raises ArgumentError, ArgumentTypeError; what a listener raises, and then the registers are as before.
        """
        offset, size = self._access(offset, size, "config_write")
        call = f"{type(self).__name__}.config_write"
        value = index(value, call, "value")
        if not 0 <= value < 1 << 8 * size:
            raise ArgumentError(call, "value", value, f"0 <= value < {1 << 8 * size:#x}")
        if self._closed:
            raise ClosedError(call, repr(self))
        own = self.OFFSETS
        before = bytes(self._config), bytes(self._wmask)
        written = set()
        for at, byte in enumerate(value.to_bytes(size, "little"), offset):
            if at in own:
                self._config[at] = self._config[at] & ~self._wmask[at] | byte & self._wmask[at]
                written.add(at)
        self._apply(written, before)

    def _access(self, offset: int, size: int, name: str) -> tuple[int, int]:
        call = f"{type(self).__name__}.{name}"
        offset, size = index(offset, call, "offset"), index(size, call, "size")
        if size not in (1, 2, 4):
            raise ArgumentError(call, "size", size, "1, 2 or 4 bytes")
        if not 0 <= offset <= 256 - size:
            raise ArgumentError(call, "offset", offset, f"0 <= offset <= {256 - size:#x}")
        return offset, size

    # The memory as the registers say, those of `written` having been written; `before`: what they were.
    def _apply(self, written: set[int], before: tuple[bytes, bytes]) -> None:
        try:
            with transaction():
                self._update(written)
        except BaseException:
            self._config[:], self._wmask[:] = before
            raise

    def pam(self, number: int) -> int:
        """What segment `number` does: bits PAM_READ (1) and PAM_WRITE (2), set where RAM is read and written.

        0 is 0xf0000 to 0xfffff, and n, 1 to 12, the 16 KiB from 0xc0000 + (n - 1) * 0x4000 on.  Raises ArgumentError.
        """
        number = self._pam_number(number, "pam")
        return self._config[self.PAM0 + (number + 1) // 2] >> (0 if number & 1 else 4) & 3

    def set_pam(self, number: int, attributes: int) -> None:
        """Lets segment `number` (see `pam`) be: 0 the firmware's, 1 RAM that is read-only, 2 or 3 RAM.

        A write to half a register, as `config_write` makes it.  Raises ArgumentError, ArgumentTypeError.
        """
        call = f"{type(self).__name__}.set_pam"
        number = self._pam_number(number, "set_pam")
        attributes = index(attributes, call, "attributes")
        if not 0 <= attributes <= 3:
            raise ArgumentError(call, "attributes", attributes, "0 to 3")
        at, shift = self.PAM0 + (number + 1) // 2, 0 if number & 1 else 4
        self.config_write(at, self._config[at] & ~(3 << shift) | attributes << shift)

    def _pam_number(self, number: int, name: str) -> int:
        call = f"{type(self).__name__}.{name}"
        number = index(number, call, "number")
        if not 0 <= number < NR_PAM:
            raise ArgumentError(call, "number", number, f"0 to {NR_PAM - 1}")
        return number

    def set_smram(self, value: int) -> None:
        """Writes the SMRAM register: D_OPEN, D_CLS, D_LCK, G_SMRAME.  Raises ArgumentError, ArgumentTypeError."""
        self.config_write(self.SMRAM, value)

    def reset(self) -> None:
        """The registers as the board's reset leaves them; PAM stays as it is, as in QEMU."""
        if self._closed:
            raise ClosedError(f"{type(self).__name__}.reset", repr(self))
        before = bytes(self._config), bytes(self._wmask)
        self._reset()
        self._apply(set(self.OFFSETS), before)

    def _power_on(self) -> None:
        self._config[self.SMRAM] = C_BASE_SEG
        self._reset()
        with transaction():
            self._update(set(self.OFFSETS))

    # The registers, not the memory.
    def _reset(self) -> None:
        raise NotImplementedError

    # The memory as the registers say.
    def _update(self, written: set[int]) -> None:
        if written & {*range(self.PAM0, self.PAM0 + 7)}:
            for number, shown in enumerate(self._pam):
                attributes = self.pam(number)
                for which, region in enumerate(shown):
                    region.enabled = which == attributes

    # ---- life ----

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def close(self) -> None:
        """Closes the address spaces, then the blocks that were made here.  Any number of calls.

        Raises what a listener raises, and ViewError while a view of a block is alive; then it can be called again.
        """
        while self._spaces:
            self._spaces[-1].close()
            self._spaces = self._spaces[:-1]
        while self._owned:
            self._owned[-1].close()
            self._owned.pop()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._closed:
            return f"<{type(self).__name__} closed>"
        return f"<{type(self).__name__} {self._ram.idstr} below_4g={self._below_4g:#x} above_4g={self._above_4g:#x}>"


def _ram_size(ram: object, call: str) -> int:
    if isinstance(ram, RamBlock | BlockPlan):
        size = page_multiple(ram.used_length, call, "ram")
    elif isinstance(ram, int | str):
        size = page_multiple(ram, call, "ram")
    else:
        raise ArgumentTypeError(call, "ram", ram, 'a RamBlock, a BlockPlan, or a size such as "128M"')
    if size > 1 << 52:
        raise ArgumentError(call, "ram", size, "up to 2**52 bytes, what x86 can address")
    return size


def _firmware(bios: Buffer | None, call: str) -> memoryview:
    if bios is None:
        return memoryview(bytes(BIOS_SIZE))
    try:
        firmware = memoryview(bios).cast("B")
    except TypeError:
        raise ArgumentTypeError(call, "bios", bios, "bytes, or None") from None
    if len(firmware) % BIOS_ALIGN or not 0 < len(firmware) <= BIOS_MAX:
        accepted = f"a multiple of {BIOS_ALIGN:#x} bytes, up to {BIOS_MAX:#x}"
        raise ArgumentError(call, "bios", len(firmware), accepted)
    return firmware


def _limit(max_ram_below_4g: int | str | None, call: str) -> int:
    if max_ram_below_4g is None:
        return 0
    limit = parse_size(max_ram_below_4g, call, "max_ram_below_4g")
    if limit > 4 * GiB:
        raise ArgumentError(call, "max_ram_below_4g", max_ram_below_4g, "up to 4 GiB, or None")
    return limit


class PcLayout(Layout):
    """The memory of QEMU's `pc` (i440FX); see `Layout`.

    The registers: PAM0 to PAM6 at 0x59 to 0x5f and SMRAM at 0x72.  All bits can be written, D_LCK locks nothing, and
    reset changes none of them, as in QEMU.

    >>> with PcLayout(BlockPlan("pc.ram", 4 << 30)) as pc:
    ...     pc.below_4g >> 20, pc.above_4g >> 20
    ...     pc.set_pam(0, PAM_READ)
    ...     found = pc.memory.at(0xFFFF0)
    ...     found.region.name, found.kind
    (3072, 1024)
    ('pc.ram', 'rom')
    """

    BOARD = "pc"
    PAM0 = 0x59
    SMRAM = 0x72
    OFFSETS = (*range(PAM0, PAM0 + 7), SMRAM)
    PCI_HOLE64 = 2 * GiB

    def _low(self, size: int, limit: int) -> int:
        limit = limit or 0xE0000000
        # With a hole at all, RAM that is split at 3 GiB is made of whole large pages.
        low = min(limit, 0xC0000000) if size >= limit else limit
        return min(size, low)

    def _reset(self) -> None:
        pass

    def _update(self, written: set[int]) -> None:
        super()._update(written)
        smram = self._config[self.SMRAM]
        self._smram_region.enabled = not smram & D_OPEN
        self._smram.enabled = bool(smram & G_SMRAME)


class Q35Layout(Layout):
    """The memory of QEMU's `q35` (Q35 and ICH9); see `Layout`.

    The registers: PAM0 to PAM6 at 0x90 to 0x96, F_SMBASE at 0x9c, SMRAM at 0x9d, ESMRAMC at 0x9e, and the size of an
    extended TSEG in MiB at 0x50 (2 bytes: 0xffff asks).  D_LCK locks SMRAM and ESMRAMC until reset.

    `extended_tseg_mbytes` (0: none) is the size for TSEG_SZ 3.  `smbase_smram`: whether RAM at 0x30000 can be made
    SMRAM.  A TSEG larger than the RAM below 4 GiB is not shown; QEMU puts a part of it at the end of all addresses.

    >>> with Q35Layout(BlockPlan("pc.ram", 128 << 20)) as q35:
    ...     q35.set_smram(G_SMRAME)
    ...     q35.set_esmramc(T_EN)
    ...     q35.memory.at(0x7F00000).region.name, q35.space("cpu-smm-0").at(0x7F00000).region.name
    ('tseg-blackhole', 'pc.ram')
    """

    BOARD = "q35"
    PAM0 = 0x90
    SMRAM = 0x9D
    PCI_HOLE64 = 32 * GiB
    ESMRAMC = 0x9E
    F_SMBASE = 0x9C
    EXT_TSEG = 0x50
    OFFSETS = (EXT_TSEG, EXT_TSEG + 1, *range(PAM0, PAM0 + 7), F_SMBASE, SMRAM, ESMRAMC)

    def __init__(
        self,
        ram: RamBlock | BlockPlan | int | str,
        *,
        max_ram_below_4g: int | str | None = None,
        smm: bool = True,
        bios: Buffer | None = None,
        cpus: int = 1,
        devices: bool = False,
        hpet: bool = True,
        phys_bits: int | None = None,
        amd: bool = False,
        extended_tseg_mbytes: int = 16,
        smbase_smram: bool = True,
    ) -> None:
        extended_tseg_mbytes = index(extended_tseg_mbytes, "Q35Layout", "extended_tseg_mbytes")
        if not 0 <= extended_tseg_mbytes <= 0xFFF:
            raise ArgumentError("Q35Layout", "extended_tseg_mbytes", extended_tseg_mbytes, "0 to 4095")
        if not isinstance(smbase_smram, bool):
            raise ArgumentTypeError("Q35Layout", "smbase_smram", smbase_smram, "True or False")
        self._extended_tseg_mbytes, self._smbase_smram = extended_tseg_mbytes, smbase_smram
        super().__init__(
            ram,
            max_ram_below_4g=max_ram_below_4g,
            smm=smm,
            bios=bios,
            cpus=cpus,
            devices=devices,
            hpet=hpet,
            phys_bits=phys_bits,
            amd=amd,
        )

    def _low(self, size: int, limit: int) -> int:
        # Leaves room for 256 MiB of PCIe configuration space at 0xb0000000.
        low = 0x80000000 if size >= 0xB0000000 else 0xB0000000
        return min(size, low, limit or 4 * GiB)

    def _build_smram(self) -> None:
        system, smram, ram = self._system, self._smram, self._ram_region
        end = self._below_4g
        self._open_high_smram = MemoryRegion.alias("smram-open-high", ram, SMRAM_BASE, SMRAM_SIZE)
        system.add_subregion(HIGH_SMRAM_BASE, self._open_high_smram, priority=1)
        self._high_smram = MemoryRegion.alias("smram-high", ram, SMRAM_BASE, SMRAM_SIZE)
        smram.add_subregion(HIGH_SMRAM_BASE, self._high_smram)
        self._tseg_blackhole = MemoryRegion.io("tseg-blackhole", 0)
        system.add_subregion(end, self._tseg_blackhole, priority=1)
        self._tseg_window = MemoryRegion.alias("tseg-window", ram, end, 0)
        smram.add_subregion(end, self._tseg_window)
        self._smbase_blackhole = MemoryRegion.io("smbase-blackhole", SMBASE_SIZE)
        system.add_subregion(SMBASE_BASE, self._smbase_blackhole, priority=1)
        self._smbase_window = self._part("smbase-window", ram, SMBASE_BASE, SMBASE_SIZE)
        smram.add_subregion(SMBASE_BASE, self._smbase_window)
        self._smbase_blackhole.enabled = self._smbase_window.enabled = False

    def set_esmramc(self, value: int) -> None:
        """Writes the ESMRAMC register: H_SMRAME, TSEG_SZ, T_EN.  Raises ArgumentError, ArgumentTypeError."""
        self.config_write(self.ESMRAMC, value)

    def _reset(self) -> None:
        config, wmask = self._config, self._wmask
        config[self.SMRAM], wmask[self.SMRAM] = C_BASE_SEG, D_OPEN | D_CLS | D_LCK | G_SMRAME
        config[self.ESMRAMC], wmask[self.ESMRAMC] = 0x38, H_SMRAME | TSEG_SIZE | T_EN  # caches, as the chip says
        config[self.F_SMBASE], wmask[self.F_SMBASE] = 0, 0xFF
        config[self.EXT_TSEG : self.EXT_TSEG + 2] = self._extended_tseg_mbytes.to_bytes(2, "little")

    def _update(self, written: set[int]) -> None:
        super()._update(written)
        if written & {self.SMRAM, self.ESMRAMC}:
            self._update_smram()
        size = slice(self.EXT_TSEG, self.EXT_TSEG + 2)
        if self._extended_tseg_mbytes and self._config[size] == b"\xff\xff":
            self._config[size] = self._extended_tseg_mbytes.to_bytes(2, "little")
        if self.F_SMBASE in written and self._smbase_smram:
            self._update_smbase()

    def _update_smram(self) -> None:
        config, wmask = self._config, self._wmask
        if config[self.SMRAM] & D_LCK:
            config[self.SMRAM] &= ~D_OPEN
            wmask[self.SMRAM], wmask[self.ESMRAMC] = D_CLS, 0
        smram, esmramc = config[self.SMRAM], config[self.ESMRAMC]
        is_open, shown, high = bool(smram & D_OPEN), bool(smram & G_SMRAME), bool(esmramc & H_SMRAME)
        # Open SMRAM is RAM for everybody: the low one, or, with H_SMRAME, the high one in its stead.
        self._smram_region.enabled = high or not is_open
        self._open_high_smram.enabled = high and is_open
        self._low_smram.enabled = shown and not high
        self._high_smram.enabled = shown and high
        size = 0
        if shown and esmramc & T_EN:
            size = _TSEG_SIZES.get(esmramc & TSEG_SIZE, self._extended_tseg_mbytes * MiB)
        if size > self._below_4g:
            size = 0
        start = self._below_4g - size
        # Taken out and put back, which makes it the newest of its priority.
        self._system.del_subregion(self._tseg_blackhole)
        self._tseg_blackhole.enabled = bool(size)
        self._tseg_blackhole.size = size
        self._system.add_subregion(start, self._tseg_blackhole, priority=1)
        window = self._tseg_window
        window.enabled = bool(size)
        window.size = 0
        window.addr = window.alias_offset = start
        window.size = size

    # 0: 0xff asks -> 1: any write with bit 1 -> 2, until reset.
    def _update_smbase(self) -> None:
        state = self._config[self.F_SMBASE]
        if state == SMBASE_QUERY:
            self._config[self.F_SMBASE], self._wmask[self.F_SMBASE] = SMBASE_IN_RAM, SMBASE_LCK
        elif state == SMBASE_IN_RAM | SMBASE_LCK:
            self._config[self.F_SMBASE], self._wmask[self.F_SMBASE] = SMBASE_LCK, 0
        elif state not in (SMBASE_IN_RAM, SMBASE_LCK) or self._wmask[self.F_SMBASE] == 0xFF:
            self._config[self.F_SMBASE] = 0
        locked = self._config[self.F_SMBASE] == SMBASE_LCK
        self._smbase_blackhole.enabled = self._smbase_window.enabled = locked
