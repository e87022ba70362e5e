"""Guests for the tests: `assemble("name", DEFINE=value)` gives the bytes of a flat image.

Looks in tests/guests, then benchmarks/guests, then native/guests.  A guest's defines stand at the top of its source.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import guests as _guests

__all__ = ["ORG", "assemble"]

ORG = _guests.ORG
_HERE = Path(__file__).resolve().parent


def assemble(name: str, *, org: int = ORG, **defines: int) -> bytes:
    """The flat image of a guest, linked at `org` (0x7C00) and entered there in real mode."""
    source = _HERE / f"{name}.S"
    if source.exists():
        return _guests.assemble_file(source, org=org, **defines)
    return _guests.assemble(name, org=org, **defines)
