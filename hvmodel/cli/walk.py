"""Walks of page tables in an image of guest memory, as `hvmodel walk` shows them: every entry, and where it ends."""

from __future__ import annotations

import json
import mmap

from ..errors import ArgumentError
from .decode import number_of, words_of
from .status import MISMATCH, OK
from .terminal import line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..mmu.walk import Walk, Walker

__all__ = ["ImageError", "show", "to_json", "walker_of"]


class ImageError(Exception):
    """The image cannot be read, for the reason in the text."""


def walker_of(path: str, at: int, registers: dict[str, int], *, eptp: int | None = None) -> Walker:
    """A walker of the image in the file at `path`, whose first byte is at guest physical address `at`.

    The file is mapped, not read.  `registers`: the arguments of `Walker` that are given; with `eptp` the tables are
    EPT's, and of them `maxphyaddr` alone has a meaning.  ImageError, ArgumentError.
    """
    from ..mmu.guest_memory import GuestMemory
    from ..mmu.walk import Walker

    try:
        with open(path, "rb") as file:
            image = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except ValueError:
        raise ImageError(f"{path}: the image is empty") from None
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from None
    memory = GuestMemory([(at, image)])
    if eptp is not None:
        others = sorted(set(registers) - {"maxphyaddr"})
        if others:
            raise ArgumentError("walk", f"--{others[0]}", registers[others[0]], "not given with --eptp")
        walker = Walker.ept(memory, eptp=eptp, maxphyaddr=registers.get("maxphyaddr", 52))
    else:
        walker = Walker(memory, **registers)  # type: ignore[arg-type]  # numbers all
    root = walker.mmu.root & ~0xFFF
    if walker.mmu.level and not at <= root < at + len(image):
        accepted = f"a table in the image, {at:#x} to {at + len(image) - 1:#x}"
        raise ArgumentError("walk", "--eptp" if eptp is not None else "--cr3", walker.mmu.root, accepted)
    return walker


def to_json(walk: Walk) -> dict[str, object]:
    """A walk as an object for json.dumps; its keys are in docs/cli.md."""
    fault = walk.fault
    return {
        "gva": walk.gva,
        "access": walk.access,
        "gpa": walk.gpa,
        "level": walk.level,
        "page_size": walk.page_size,
        "pte_access": walk.pte_access,
        "error_code": walk.error_code,
        "exit_qualification": fault.exit_qualification if fault is not None else None,
        "missing": walk.missing,
        "entries": [{"level": e.level, "gpa": e.gpa, "value": e.value, "size": e.size} for e in walk.entries],
        "updates": [{"level": u.level, "gpa": u.gpa, "accessed": u.accessed, "dirty": u.dirty} for u in walk.updates],
    }


def _say(walk: Walk) -> str:
    # The walk's own text; a fault's error code by its bits below.
    from ..mmu.fault import decode_pfec

    text = str(walk)
    if walk.error_code is not None:
        text += f"\n  {decode_pfec(walk.error_code)}"
    return text


def show(walker: Walker, values: tuple[str, ...], access: int, *, as_json: bool) -> int:
    """Walk the addresses ("-" or none: those on stdin) and print each; the exit status: 0, or 1 where one faults.

    Raises ArgumentError.
    """
    status, found = OK, []
    for word in words_of(values):
        walk = walker.walk(number_of(word, "GVA", "walk"), access)
        if not walk.ok:
            status = MISMATCH
        if as_json:
            found.append(to_json(walk))
        else:
            line(_say(walk))
    if as_json:
        line(json.dumps(found))
    return status
