"""Page tables for tests of walkers: a few entries by hand, or memory full of random ones, of which most lead on."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from hvmodel.mmu.walk import Walker

__all__ = ["CONFIGS", "MODES", "PAGES", "Config", "address", "four_levels", "image", "memory", "walker"]

PAGES = 32

_PG, _WP, _PE = 1 << 31, 1 << 16, 1
_PSE, _PAE, _LA57, _SMEP, _SMAP, _PKE = 1 << 4, 1 << 5, 1 << 12, 1 << 20, 1 << 21, 1 << 22
_LONG, _NXE = 1 << 8 | 1 << 10, 1 << 11


MODES: dict[str, dict[str, int]] = {
    "32bit": {"cr0": _PG | _PE | _WP, "cr4": _PSE, "efer": 0},
    "pae": {"cr0": _PG | _PE | _WP, "cr4": _PAE, "efer": _NXE},
    "4level": {},
    "5level": {"cr4": _PAE | _LA57},
}
"""The modes of PageTables, and the arguments of Walker that make it walk them."""


def image(entries: dict[int, int], size: int = 0x6000, width: int = 8) -> bytearray:
    """Memory with these entries, by their addresses."""
    found = bytearray(size)
    for gpa, value in entries.items():
        found[gpa : gpa + width] = value.to_bytes(width, "little")
    return found


def four_levels(leaf: int, above: int = 7) -> bytearray:
    """PML4 at 0x1000, PDPT, PD, PT behind it; the entry at index 0 of each, the last one is `leaf`."""
    return image({0x1000: 0x2000 | above, 0x2000: 0x3000 | above, 0x3000: 0x4000 | above, 0x4000: leaf})


class Config(NamedTuple):
    """One way to page: arguments of Walker (or, with `ept`, of Walker.ept), and the bytes of an entry."""

    name: str
    arguments: dict[str, Any]
    size: int = 8
    ept: bool = False


def _long(name: str, cr0: int = _WP, cr4: int = 0, efer: int = _NXE, **more: Any) -> Config:
    return Config(name, {"cr0": _PG | _PE | cr0, "cr4": _PAE | cr4, "efer": _LONG | efer, "maxphyaddr": 48, **more})


def _legacy(name: str, cr4: int = 0, size: int = 8, **more: Any) -> Config:
    return Config(name, {"cr0": _PG | _PE | _WP, "cr4": cr4, "efer": _NXE, "maxphyaddr": 48, **more}, size)


CONFIGS = (
    _long("4 levels"),
    _long("4 levels, no WP, no NX", cr0=0, efer=0),
    _long("4 levels, SMEP, SMAP", cr4=_SMEP | _SMAP),
    _long("4 levels, SMAP lifted", cr4=_SMAP, rflags=1 << 18 | 2),
    _long("4 levels, keys", cr4=_PKE, pkru=0x5555_AAA4),
    _long("4 levels, keys, no WP", cr0=0, cr4=_PKE, pkru=0x0000_0002),
    _long("4 levels, AMD, no 1 GiB pages", amd=True, gbpages=False, maxphyaddr=40),
    _long("5 levels", cr4=_LA57 | _SMEP),
    _legacy("PAE", _PAE),
    _legacy("PAE, PDPTRs", _PAE, pdptrs=(0x1001, 0x2001, 0x3000, 0x1E7 | 0x5000)),
    _legacy("2 levels", _SMEP, 4),
    _legacy("2 levels, PSE", _PSE | _SMAP, 4),
    _legacy("2 levels, PSE without PSE-36", _PSE, 4, pse36=False),
    Config("EPT", {"eptp": 3 << 3 | 6 | 1 << 6, "maxphyaddr": 48}, ept=True),
    Config("EPT, no A and D, 5 levels, not execute-only", {"eptp": 4 << 3, "execonly": False}, ept=True),
)


def _entry(rng: random.Random, config: Config) -> int:
    entry = rng.randrange(PAGES) << 12
    if rng.random() < 0.02:
        entry = rng.randrange(PAGES * 2) << 12  # past the end of memory, for half of them
    if config.ept:
        entry |= rng.choice((7, 7, 7, 7, 3, 1, 5, 4, 0, 2)) if rng.random() < 0.3 else 7
        entry |= rng.randrange(4) << 8
        if rng.random() < 0.1:
            entry |= rng.randrange(8) << 3
    else:
        entry |= 1 if rng.random() < 0.96 else 0
        entry |= 2 if rng.random() < 0.85 else 0
        entry |= 4 if rng.random() < 0.8 else 0
        entry |= rng.randrange(4) << 5
        if config.size == 8 and rng.random() < 0.2:
            entry |= 1 << 63
        if config.size == 8:
            entry |= rng.choice((0, 0, 0, rng.randrange(16))) << 59
    if rng.random() < 0.1:
        entry |= 1 << 7
        if rng.random() < 0.8:  # as a large page must have it
            entry &= ~(0x3FF000 if config.size == 4 else 0x1FF000)
            entry |= rng.choice((0, 0x1E000, 0x1000)) if config.size == 4 else 0
    if rng.random() < 0.02:
        entry |= 1 << rng.randrange(config.size * 8)
    return entry


def memory(seed: int, config: Config) -> bytearray:
    """PAGES pages of entries, each a table."""
    rng = random.Random(f"{config.name} {seed}")
    count = PAGES * 4096 // config.size
    found = bytearray(b"".join(_entry(rng, config).to_bytes(config.size, "little") for _ in range(count)))
    if config.name == "PAE":  # of whose top entries random ones would all be wrong
        for at, entry in enumerate((0x1001, 0x3001, 0x2001, rng.choice((0x4000, 0x4003, 0x4001 | 1 << 60)))):
            found[at * 8 : at * 8 + 8] = entry.to_bytes(8, "little")
    return found


def walker(image: Any, config: Config) -> Walker:
    """The walker of a Config, its root at 0."""
    return Walker.ept(image, **config.arguments) if config.ept else Walker(image, **config.arguments)


def address(rng: random.Random, config: Config) -> int:
    """A random address; of those of 64 bits most are canonical."""
    if config.size == 4 or config.name.startswith("PAE"):
        return rng.getrandbits(32)
    found, bits = rng.getrandbits(64), 57 if config.name.startswith("5") else 48
    if config.ept or rng.random() < 0.1:
        return found
    return (found & (1 << bits) - 1 ^ 1 << bits - 1) - (1 << bits - 1) & (1 << 64) - 1
