"""Guests as assembly source, assembled when asked for.

Owns the way from `NAME.S` to the bytes of a flat image: gcc's preprocessor and assembler, then ld.
A guest is linked at 0x7C00 unless asked otherwise and is entered there in real mode; its text says which
`defines` it takes.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

__all__ = ["DIRECTORY", "ORG", "GuestBuildError", "assemble", "assemble_file"]

DIRECTORY = Path(__file__).resolve().parent
SHIPPED = DIRECTORY.parents[1] / "native" / "guests"
ORG = 0x7C00


class GuestBuildError(RuntimeError):
    """The assembler or the linker refused a guest; the text is theirs."""


def assemble(name: str, *, org: int = ORG, **defines: int) -> bytes:
    """The flat image of benchmarks/guests/NAME.S or native/guests/NAME.S, built with `defines`."""
    for directory in (DIRECTORY, SHIPPED):
        if (source := directory / f"{name}.S").exists():
            return assemble_file(source, org=org, **defines)
    raise GuestBuildError(f"no guest {name!r} in {DIRECTORY} or {SHIPPED}")


def assemble_file(source: Path, *, org: int = ORG, **defines: int) -> bytes:
    """The flat image of one source file, linked at `org`; the same request is assembled once per process."""
    return _assemble(source, org, tuple(sorted(defines.items())))


@functools.cache
def _assemble(source: Path, org: int, defines: tuple[tuple[str, int], ...]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="guest-") as build:
        obj, image = Path(build, "guest.o"), Path(build, "guest.bin")
        flags = [f"-D{name}={int(value):#x}" for name, value in defines]
        _run("gcc", "-c", "-nostdinc", "-I", str(DIRECTORY), *flags, "-o", str(obj), str(source))
        # Any note section would be laid out in front of the code; the text is all there is to a flat image.
        _run("objcopy", "--only-section=.text", str(obj))
        _run("ld", "--oformat", "binary", f"-Ttext={org:#x}", "-e", f"{org:#x}", "-o", str(image), str(obj))
        return image.read_bytes()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GuestBuildError(f"{' '.join(command)}\n{done.stderr}")
