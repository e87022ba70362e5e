"""What owns something, or has its place in a tree, cannot be copied."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

import hvmodel as hv
from hvmodel.ram import AddressSpace, MemoryBackendFile, MemoryRegion, RamBlock
from tests.need import need


def refuses(thing: object) -> None:
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            make(thing)


def test_blocks_files_regions_and_spaces(tmp_path: Path) -> None:
    with RamBlock("file", backend=MemoryBackendFile("64K", str(tmp_path / "file"))) as block:
        region = MemoryRegion.ram("ram", block)
        with AddressSpace(region, "memory") as space:
            for thing in (block, block.file, region, space):
                refuses(thing)


def test_a_machine() -> None:
    need("kvm")
    with hv.Machine(ram="64K") as machine:
        refuses(machine)
