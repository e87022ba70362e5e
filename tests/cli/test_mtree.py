"""`hvmodel mtree`: QEMU's own text, and the same as an object."""

from __future__ import annotations

import pytest

from hvmodel.witness import Qemu
from hvmodel.witness.mtree import parse_flat, parse_mtree
from tests.cli.command import hvmodel, is_one_sentence, object_of
from tests.need import need

GiB = 1 << 30


@pytest.mark.parametrize("board", ["pc", "q35"])
def test_text_is_qemus(board: str) -> None:
    need("qemu")
    with Qemu("-m", "128M", machine=board) as qemu:
        for options in ([], ["-D"], ["-f"]):
            done = hvmodel("mtree", f"--{board}", *options)
            assert (done.returncode, done.stderr) == (0, b"")
            text, theirs = done.stdout.decode(), qemu.monitor(" ".join(["info mtree", *options]))
            if options == ["-f"]:
                views = {space[0]: view.ranges for view in parse_flat(theirs) for space in view.spaces}
                ours = {space[0]: view.ranges for view in parse_flat(text) for space in view.spaces}
                assert {name: views[name] for name in ours if name != "I/O"} == {
                    name: ranges for name, ranges in ours.items() if name != "I/O"
                }
            else:
                blocks = {block for block in text.strip("\n").split("\n\n") if "address-space: I/O" not in block}
                assert len(blocks) >= 5
                assert blocks <= {block.strip("\n") for block in theirs.split("\n\n")}


def test_defaults_are_pc_with_128_mib() -> None:
    assert hvmodel("mtree").stdout == hvmodel("mtree", "--pc", "--ram", "128M").stdout
    assert b"ram-below-4g @pc.ram 0000000000000000-0000000007ffffff" in hvmodel("mtree").stdout


def test_json_of_trees() -> None:
    found = object_of(hvmodel("mtree", "--q35", "--ram", "4G", "--json"))
    assert set(found) == {"board", "ram", "spaces", "regions"}
    assert (found["board"], found["ram"]) == ("q35", 4 * GiB)
    lines = next(space["lines"] for space in found["spaces"] if "memory" in space["names"])
    above = next(line for line in lines if line["name"] == "ram-above-4g")
    # 2.75 GiB or more: the hole begins at 2 GiB.
    assert (above["start"], above["end"]) == (4 * GiB, 6 * GiB - 1)
    assert (above["target"], above["target_start"], above["target_end"]) == ("pc.ram", 2 * GiB, 4 * GiB - 1)
    printed = parse_mtree(hvmodel("mtree", "--q35", "--ram", "4G").stdout.decode())
    assert [region["name"] for region in found["regions"]] == [tree.names[0] for tree in printed.regions]


def test_json_of_views() -> None:
    found = object_of(hvmodel("mtree", "--ram", "1G", "-f", "--json"))
    assert set(found) == {"board", "ram", "views"}
    view = next(view for view in found["views"] if view["root"] == "system")
    assert {space["name"] for space in view["spaces"]} == {"memory", "cpu-memory-0"}
    first = view["ranges"][0]
    assert (first["start"], first["end"], first["kind"], first["name"]) == (0, 0xBFFFF, "ram", "pc.ram")
    assert [one["end"] + 1 for one in view["ranges"] if one["name"] == "pc.ram"] == [0xC0000, GiB]


def test_more_ram_than_any_host_has() -> None:
    done = hvmodel("mtree", "--ram", "8T", "-f")
    assert done.returncode == 0
    assert b"0000000100000000-000008003fffffff (prio 0, ram): pc.ram @00000000c0000000" in done.stdout


@pytest.mark.parametrize("size", ["0", "5", "-4096", "4097", "16X", "8192T"])
def test_bad_sizes_are_refused(size: str) -> None:
    done = hvmodel("mtree", "--ram", size)
    assert done.returncode == 2
    assert done.stdout == b""
    assert is_one_sentence(done.stderr)
