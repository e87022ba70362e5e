"""The memory of QEMU's boards, as `hvmodel mtree` shows it: the text of QEMU's `info mtree`, or one JSON object.

Nothing is allocated and no guest is made: a board's tree depends on sizes only.
"""

from __future__ import annotations

import json

from .status import OK
from .terminal import STDOUT, line, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..value import Value

__all__ = ["gather", "show", "text"]


def text(board: str, ram: int, *, flatview: bool = False, disabled: bool = False) -> str:
    """What QEMU's monitor prints for `board` ("pc" or "q35") with `ram` bytes, before the guest's first instruction:
    `info mtree`, with `disabled` that with -D, with `flatview` that with -f.

    The address spaces are "memory", "I/O", "cpu-memory-0" and "cpu-smm-0"; of devices the IOAPIC, HPET and MSI window
    are there.  Raises ArgumentError.
    """
    from ..machine.layouts import BlockPlan, PcLayout, Q35Layout
    from ..ram.mtree import info_mtree

    with (PcLayout if board == "pc" else Q35Layout)(BlockPlan("pc.ram", ram), devices=True) as layout:
        return info_mtree(layout.spaces, flatview=flatview, disabled=disabled)


def gather(board: str, ram: int, *, flatview: bool = False, disabled: bool = False) -> dict[str, Any]:
    """The same as an object for json.dumps; its keys are in docs/cli.md."""
    from ..witness.mtree import parse_flat, parse_mtree

    printed = text(board, ram, flatview=flatview, disabled=disabled)
    found: dict[str, Any] = {"board": board, "ram": ram}
    if flatview:
        found["views"] = [
            {
                "spaces": [{"name": name, "root": root, "alias": alias} for name, root, alias in view.spaces],
                "root": view.root,
                "ranges": [_fields(one) for one in view.ranges],
            }
            for view in parse_flat(printed)
        ]
        return found
    mtree = parse_mtree(printed)
    found["spaces"] = [{"names": tree.names, "lines": [_fields(one) for one in tree.lines]} for tree in mtree.spaces]
    found["regions"] = [
        {"name": tree.names[0], "lines": [_fields(one) for one in tree.lines]} for tree in mtree.regions
    ]
    return found


def _fields(value: Value) -> dict[str, object]:
    return {name: getattr(value, name) for name in value.fields()}


def show(board: str, ram: int, *, flatview: bool, disabled: bool, as_json: bool) -> int:
    """Print it; the exit status.  Raises ArgumentError."""
    if as_json:
        line(json.dumps(gather(board, ram, flatview=flatview, disabled=disabled)))
    else:
        write(STDOUT, text(board, ram, flatview=flatview, disabled=disabled).encode())
    return OK
