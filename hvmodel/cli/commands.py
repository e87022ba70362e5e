"""The command line: commands, options, help; every refusal becomes one sentence on stderr and a status."""

from __future__ import annotations

import math
import os
import signal
import sys

import click

from .. import __version__
from ..errors import ArgumentError, BuildError, HostError, HvError, KvmError
from ..units import MiB
from .decode import KINDS
from .status import BAD_INPUT, BOOT, FAULT, INTERRUPTED, MISMATCH, NO_KVM, OK
from .terminal import OutputError, ReaderGoneError, line, say, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from ..machine import Machine

__all__ = ["Refusal", "hvmodel", "run"]


class Refusal(Exception):
    """Ends the command: the sentence in the text on stderr, and `status`."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def run(arguments: Sequence[str] | None) -> int:
    """Run the command with these arguments (None: the process's own); its exit status.  See `hvmodel.cli.main`."""
    _fill_standard_descriptors()
    try:
        # What click's main() does, but for its own way with errors.
        words = list(sys.argv[1:] if arguments is None else arguments)
        with hvmodel.make_context("hvmodel", words or ["--help"]) as context:
            found = hvmodel.invoke(context)
        return found if isinstance(found, int) else OK
    except click.exceptions.Exit as end:
        return end.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except click.ClickException as error:
        # click's own words may name alternatives on lines of their own; say() makes one line of them.
        where = getattr(error, "ctx", None)
        path = where.command_path if where is not None else "hvmodel"
        say(f"{error.format_message().rstrip('.')}; see `{path} --help`")
        return BAD_INPUT
    except Refusal as error:
        say(str(error))
        return error.status
    except BuildError as error:
        say(str(error))
        return NO_KVM
    except OutputError as error:
        say(str(error))
        return BAD_INPUT
    except (ReaderGoneError, BrokenPipeError):
        # Whoever waits for us sees what happens to any filter; machines are closed by now.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)
        return 128 + signal.SIGPIPE


def _fill_standard_descriptors() -> None:
    # Else /dev/kvm could become descriptor 1, and take the guest's output.
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


# ---- words of the command line ----


class _Size(click.ParamType[int]):
    # Guest RAM: whole pages, no more than the host has.
    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from ..ram.block import ram_size

        try:
            return ram_size(str(value), "boot", "--ram")
        except ArgumentError as error:
            accepted = f"; accepted: {error.accepted}" if error.accepted else ""
            self.fail(f"{error.value!r}{accepted}", param, ctx)


class _BoardSize(click.ParamType[int]):
    # RAM of a board that is not made: whole pages, as much as x86 can address.
    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from ..host.memfd import page_multiple

        try:
            return page_multiple(str(value), "mtree", "--ram", 1 << 52)
        except ArgumentError as error:
            accepted = f"; accepted: {error.accepted}" if error.accepted else ""
            self.fail(f"{error.value!r}{accepted}", param, ctx)


class _Address(click.ParamType[int]):
    name = "address"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from .boot import REAL_MODE_LAST

        try:
            address = int(str(value), 0)
        except ValueError:
            self.fail(f"{value!r}; accepted: a number such as 0x7C00", param, ctx)
        if not 0 <= address <= REAL_MODE_LAST:
            self.fail(f"{value}: real mode reaches 0 to {REAL_MODE_LAST:#x}", param, ctx)
        return address


class _Seconds(click.ParamType[float]):
    name = "seconds"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(str(value))
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds <= 1e9:
            self.fail(f"{value!r}; accepted: 0 to 1e9 seconds", param, ctx)
        return seconds


_json = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hvmodel", message="%(prog)s %(version)s")
def hvmodel() -> None:
    """The hypervisor you can import: real guests on /dev/kvm."""


# ---- boot ----


def _epilog() -> str:
    width = max(len(status) for status, _ in BOOT)
    return "\b\nExit status:\n" + "\n".join(f"  {status:<{width}}  {meaning}" for status, meaning in BOOT)


@hvmodel.command(epilog=_epilog())
@click.argument("file", required=False)
@click.option("--ram", type=_Size(), default="16M", show_default=True, help="Guest RAM, whole pages.")
@click.option("--at", type=_Address(), help="Where FILE is loaded and entered.  [default: 0x7C00]")
@click.option("--timeout", type=_Seconds(), help="End the run after so many seconds.")
@click.option("--trace", is_flag=True, help="A line per exit, on stderr.")
@_json
@click.option("--bios", is_flag=True, help="FILE is firmware: mapped as on a PC, entered at the reset vector.")
@click.option(
    "--unclaimed",
    type=click.Choice(["open_bus", "strict"]),
    default="open_bus",
    show_default=True,
    help="Ports and addresses that nobody claims: reads give all ones and writes are dropped, or the run ends.",
)
def boot(
    file: str | None,
    ram: int,
    at: int | None,
    timeout: float | None,
    trace: bool,
    as_json: bool,
    bios: bool,
    unclaimed: Literal["open_bus", "strict"],
) -> int:
    """Boot FILE, a flat real-mode image ("-": stdin), on KVM; without FILE, a guest that says hello.

    The serial port 0x3F8 of the guest is stdout.  The debug ports 0x402 and 0xE9, the trace and messages go to
    stderr.  With --json, all of that is in the object.
    """
    from .boot import MAX_BIOS, Image, ImageError, Output, read_image, report
    from .boot import run as run_guest

    if bios and file is None:
        raise click.UsageError("--bios needs a FILE")
    if bios and at is not None:
        raise click.UsageError("--bios: firmware is entered at the reset vector, --at has no meaning")
    at = 0x7C00 if at is None else at
    if not bios and at >= ram:
        raise Refusal(BAD_INPUT, f"--at {at:#x} is outside the RAM, which ends at {ram:#x}")
    try:
        if file is None:
            from ..machine import guests

            image = Image("hello", guests()["hello"])
        elif bios:
            image = read_image(file, MAX_BIOS, "firmware has up to")
        else:
            image = read_image(file, ram - at, f"RAM of {ram:#x} bytes has room from {at:#x} on for")
    except ImageError as error:
        raise Refusal(BAD_INPUT, str(error)) from None

    with _machine(ram, unclaimed) as machine:
        try:
            if bios:
                machine.load_bios(image.data)
                machine.vcpu.reset()
            else:
                machine.load(at, image.data)
                machine.vcpu.real_mode(entry=at)
        except ArgumentError as error:
            raise Refusal(BAD_INPUT, f"{image.name}: {error}") from None
        output = Output(trace=trace, collect=as_json)
        try:
            outcome = run_guest(machine, timeout, output)
            report(machine, outcome, output)
        except HvError as error:
            raise Refusal(FAULT, str(error)) from None
        return outcome.status


def _machine(ram: int, unclaimed: Literal["open_bus", "strict"]) -> Machine:
    from ..kvm import Kvm
    from ..machine import Machine
    from .boot import DEBUG_EXIT_PORT

    try:
        kvm = Kvm()
    except HvError as error:
        raise Refusal(NO_KVM, str(error)) from None
    # The machine makes its VM of it and needs it no longer.
    with kvm:
        try:
            return Machine(ram, unclaimed=unclaimed, debug_exit=DEBUG_EXIT_PORT, kvm=kvm)
        except KvmError as error:
            raise Refusal(NO_KVM, str(error)) from None
        except (ArgumentError, HostError) as error:
            raise Refusal(BAD_INPUT, str(error)) from None


# ---- decode ----


@hvmodel.command()
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("values", nargs=-1)
@click.option("--level", type=int, help="spte, ept: level of the table it stands in, 1 to 5.  [default: 1]")
@click.option("--ept", "flavour", flag_value="ept", help="spte: of a KVM that uses EPT.")
@click.option("--npt", "flavour", flag_value="npt", help="spte: of a KVM that uses NPT.")
@click.option("--ad/--no-ad", default=None, help="spte --ept: with accessed and dirty flags.  [default: with]")
@click.option("--exec-only/--no-exec-only", default=None, help="spte, ept: entries may execute alone.  [default: may]")
@click.option("--mbec", is_flag=True, default=None, help="ept: with mode-based execute control.")
@click.option("--kernel", help="spte, role, cpu-role: by the rules of this kernel.  [default: 6.18]")
@click.option("--phys-bits", type=int, help="spte, ept, eptp: width of physical addresses.  [default: 46; ept: 52]")
@click.option("--cap", "capability", help="eptp: IA32_VMX_EPT_VPID_CAP of the processor.")
@click.option("--reason", help="qualification: the exit reason, 48 or EPT_VIOLATION.")
@click.option("--vector", type=int, help="qualification of reason 0: vector of the exception.")
@click.option("--table/--lines", "as_table", default=None, help="A table or a line each.  [default: a table for one]")
@_json
def decode(
    kind: str,
    values: tuple[str, ...],
    level: int | None,
    flavour: str | None,
    ad: bool | None,
    exec_only: bool | None,
    mbec: bool | None,
    kernel: str | None,
    phys_bits: int | None,
    capability: str | None,
    reason: str | None,
    vector: int | None,
    as_table: bool | None,
    as_json: bool,
) -> int:
    """Words of the MMU by their bits: VALUES of a KIND, in hexadecimal (0x...) or decimal; "-" or none: from stdin.

    --json prints an array of objects.

    \b
    Kinds:
      spte           a shadow page table entry        ept       an EPT entry, as the processor reads it
      role, cpu-role kvm_mmu_page_role, kvm_cpu_role  eptp      an EPT pointer
      pfec           a page fault's error code        vmx-ept-cap  IA32_VMX_EPT_VPID_CAP
      exit-reason, qualification: of a VM exit

    \b
    Exit status:
      0  all values are such words
      1  some value has a problem, which is printed
      2  bad input
    """
    from .decode import Options, show

    options = Options(
        level=level,
        reason=reason,
        vector=vector,
        flavour=flavour,
        kernel=kernel,
        phys_bits=phys_bits,
        capability=capability,
        ad=ad,
        exec_only=exec_only,
        mbec=mbec,
    )
    try:
        return show(kind, values, options, as_json=as_json, as_table=as_table)
    except ArgumentError as error:
        raise Refusal(BAD_INPUT, str(error)) from None


# ---- info ----


@hvmodel.command()
@_json
def info(as_json: bool) -> int:
    """What KVM is here, what that means for a guest's speed, its capabilities and limits; for each no, what to do.

    Exit status: 0; 8 where /dev/kvm cannot be used (the rest is told all the same).
    """
    from .info import gather, show

    return show(gather(), as_json=as_json)


# ---- ioctls ----


@hvmodel.command()
@_json
def ioctls(as_json: bool) -> int:
    """The ioctls of KVM on x86-64 that hvmodel knows, as in its table native/kvm_ioctl.tbl."""
    from .._ffi import IOCTLS

    rows = list(IOCTLS.values())
    if as_json:
        import json

        line(json.dumps([{field: getattr(row, field) for field in row.fields()} for row in rows]))
        return OK
    columns = ("NR", "NAME", "REQUEST", "SCOPE", "ARGUMENT", "RETURNS", "CAPABILITY", "SECTION")
    table(
        columns,
        (
            (
                f"{row.nr:#04x}",
                row.name,
                f"{row.request:#010x}",
                ",".join(row.scope),
                row.argument,
                row.returns,
                row.capability or "",
                row.section or "",
            )
            for row in rows
        ),
    )
    return OK


# ---- masks ----


@hvmodel.command()
@click.option("--kernel", help="The rules of this kernel, as 6.18.")
@click.option("--ept", "flavour", flag_value="ept", help="kvm_intel with EPT.")
@click.option("--npt", "flavour", flag_value="npt", help="kvm_amd with NPT.")
@click.option("--ad/--no-ad", default=None, help="With --ept: accessed and dirty flags.  [default: with]")
@click.option("--exec-only/--no-exec-only", default=None, help="With --ept: entries may execute alone.  [default: may]")
@click.option("--phys-bits", type=int, help="Width of physical addresses, 32 to 52.  [default: 46]")
@_json
def masks(
    kernel: str | None,
    flavour: str | None,
    ad: bool | None,
    exec_only: bool | None,
    phys_bits: int | None,
    as_json: bool,
) -> int:
    """The masks that KVM makes its page table entries of: this host's and where each is from, or, with any option,
    those of a kernel and processor that are told.

    Exit status: 0; 2 for bad input; 8 where this host does not show what its masks are.
    """
    from ..witness.result import Lacking
    from .masks import gather, show

    if flavour != "ept" and (ad is not None or exec_only is not None):
        raise click.UsageError("--ad and --exec-only are about EPT: they go with --ept")
    told = kernel is not None or flavour is not None or phys_bits is not None
    try:
        found = gather(
            kernel=kernel,
            ept=flavour == "ept",
            npt=flavour == "npt",
            ad=ad is not False,
            exec_only=exec_only is not False,
            phys_bits=phys_bits,
            host=not told,
        )
    except Lacking as error:
        raise Refusal(NO_KVM, f"lacking: {error}; --ept, --npt and --kernel tell what to show") from None
    except ArgumentError as error:
        raise Refusal(BAD_INPUT, str(error)) from None
    return show(found, as_json=as_json)


# ---- mtree ----


@hvmodel.command()
@click.option("--pc", "board", flag_value="pc", default=True, help="QEMU's pc: i440FX.  [default]")
@click.option("--q35", "board", flag_value="q35", help="QEMU's q35.")
@click.option("--ram", type=_BoardSize(), default="128M", show_default=True, help="Guest RAM; none is allocated.")
@click.option("-f", "flatview", is_flag=True, help="The flat views: what is at which address.")
@click.option("-D", "disabled", is_flag=True, help="Regions that are disabled, too.")
@_json
def mtree(board: str, ram: int, flatview: bool, disabled: bool, as_json: bool) -> int:
    """The memory of a board before its first instruction, as QEMU's `info mtree` prints it.

    Of devices the IOAPIC, the HPET and the window for MSIs are there, and no I/O ports.
    """
    from .mtree import show

    try:
        return show(board, ram, flatview=flatview, disabled=disabled, as_json=as_json)
    except ArgumentError as error:
        raise Refusal(BAD_INPUT, str(error)) from None


# ---- ram ----


@hvmodel.command()
@click.argument("pid", required=False, type=click.IntRange(1, (1 << 31) - 1))
@click.option("--ram", type=_Size(), help="Without PID: RAM of the machine that is made.  [default: 16M]")
@click.option("--populate", is_flag=True, help="Without PID: with all of its pages there.")
@_json
def ram(pid: int | None, ram: int | None, populate: bool, as_json: bool) -> int:
    """What guest RAM costs the host, block by block: of process PID (hvmodel, QEMU or another), or of a new machine.

    \b
    The table is in KiB, --json in bytes:
      RSS      in memory and mapped by the process
      PSS      each page divided by how often it is mapped
      PRIVATE  of RSS: mapped by this process alone      SHARED  by others too
      DIRTY    of RSS: written     ANON  anonymous       HUGE    by huge page-table entries
      HUGETLB  pages of hugetlbfs, which RSS leaves out  SWAPPED out
      FILE     what its memory file has, mapped or not ("-": no file, or not to be asked)

    \b
    A mapping is taken for guest RAM if it is of a memory file (memfd), of a file in /dev/shm (shm) or of hugetlbfs
    (hugetlb), or marked MADV_DONTFORK as QEMU marks its RAM blocks (dontfork); but not if it is executable.
    """
    from .ram import gather, show

    if pid is not None and (ram is not None or populate):
        raise click.UsageError("--ram and --populate are for a new machine, which needs no PID")
    try:
        if pid is not None:
            return show(gather(pid), as_json=as_json)
        with _machine(16 * MiB if ram is None else ram, "open_bus") as machine:
            if populate:
                machine.ram.mapping.populate()
            return show(gather(os.getpid()), as_json=as_json)
    except HvError as error:
        raise Refusal(BAD_INPUT, str(error)) from None


# ---- verify ----


@hvmodel.command()
@click.argument("names", nargs=-1)
@click.option("--slow", is_flag=True, help="Compare each check's larger number of cases.")
@_json
def verify(names: tuple[str, ...], slow: bool, as_json: bool) -> int:
    """Compare hvmodel with the running kernel: all checks, or those with these NAMES.

    \b
    Exit status:
      0  nothing differs
      1  something differs
      8  nothing could be compared on this host
    """
    from .. import _ffi  # noqa: F401 - a missing extension ends the command, not each check
    from ..witness import registered
    from ..witness import run as run_checks

    checks = [check for check in registered() if not names or check.name in names]
    try:
        results = run_checks(names or None, slow=slow)
    except ArgumentError as error:
        raise click.BadParameter(f"{error.value}; accepted: {error.accepted}", param_hint="NAMES") from None
    found = [(check.name, result) for check, result in zip(checks, results, strict=True)]
    if as_json:
        import json

        line(json.dumps([{"name": name, **result.to_json()} for name, result in found]))
    else:
        table(
            ("NAME", "MODEL", "WITNESS", "COMPARED", "MISMATCHES", "RESULT"),
            (
                (
                    name,
                    result.model,
                    result.witness,
                    result.compared,
                    result.mismatches,
                    "ok" if result.ok else "skipped" if result.skipped else "WRONG",
                )
                for name, result in found
            ),
        )
        for name, result in found:
            for text in result.examples:
                line(f"{name}: mismatch: {text}")
            for text in result.lacking:
                line(f"{name}: not observed here: {text}")
    if any(not result.ok and not result.skipped for _, result in found):
        return MISMATCH
    return OK if any(result.ok for _, result in found) else NO_KVM


# ---- walk ----


class _Number(click.ParamType[int]):
    name = "number"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from .decode import number_of

        try:
            return number_of(str(value), "number", "walk")
        except ArgumentError as error:
            self.fail(f"{error.value!r}; accepted: {error.accepted}", param, ctx)


@hvmodel.command()
@click.argument("image")
@click.argument("gva", nargs=-1)
@click.option("--cr3", type=_Number(), help="Where the root table is.  [this or --eptp]")
@click.option("--eptp", type=_Number(), help="The tables are EPT's, GVA is a guest physical address.")
@click.option("--cr0", type=_Number(), help="[default: 0x80010001, PG WP PE]")
@click.option("--cr4", type=_Number(), help="[default: 0x20, PAE]")
@click.option("--efer", type=_Number(), help="[default: 0xd00, LME LMA NXE]")
@click.option("--rflags", type=_Number(), help="Of it, AC counts (SMAP).")
@click.option("--pkru", type=_Number(), help="Protection keys.")
@click.option("--phys-bits", "maxphyaddr", type=int, help="Width of physical addresses, 32 to 52.  [default: 52]")
@click.option(
    "--at", type=_Number(), default="0", help="Guest physical address of the image's first byte.  [default: 0]"
)
@click.option("-w", "--write", is_flag=True, help="The access is a write.")
@click.option("-x", "--fetch", is_flag=True, help="The access is a fetch.")
@click.option("-u", "--user", is_flag=True, help="The access is by CPL 3.")
@_json
def walk(
    image: str,
    gva: tuple[str, ...],
    cr3: int | None,
    eptp: int | None,
    at: int,
    write: bool,
    fetch: bool,
    user: bool,
    as_json: bool,
    **registers: int | None,
) -> int:
    """Walk page tables in an IMAGE of guest memory, for each GVA ("-" or none: from stdin), as KVM's walker does.

    \b
    Exit status:
      0  every address leads somewhere
      1  one faults
      2  bad input
    """
    from .walk import ImageError, show, walker_of

    if (cr3 is None) == (eptp is None):
        raise click.UsageError("one of --cr3 and --eptp says where the root table is")
    if write and fetch:
        raise click.UsageError("an access is a write or a fetch, not both")
    given = {name: value for name, value in registers.items() if value is not None}
    if cr3 is not None:
        given["cr3"] = cr3
    try:
        walker = walker_of(image, at, given, eptp=eptp)
        return show(walker, gva, write << 1 | user << 2 | fetch << 4, as_json=as_json)
    except (ArgumentError, ImageError) as error:
        raise Refusal(BAD_INPUT, str(error)) from None
