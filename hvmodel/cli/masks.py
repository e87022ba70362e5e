"""The masks of KVM's page table entries, as `hvmodel masks` shows them: this host's, or those of a KVM that is told."""

from __future__ import annotations

import json

from .status import OK
from .terminal import line, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..mmu.masks import ShadowMasks
    from ..witness import HostMasks

__all__ = ["Found", "gather", "show"]


class Found:
    """What `gather` found: the masks, and what this host says of them (None: they are of a KVM that was told)."""

    def __init__(self, masks: ShadowMasks, host: HostMasks | None) -> None:
        self.masks, self.host = masks, host

    def sources(self) -> dict[str, str]:
        """Where each field of the masks comes from, on this host; {} where it was told."""
        if self.host is None:
            return {}
        facts = self.host.facts
        caching = facts.parameter("kvm.mmio_caching")
        parameter = {} if caching is None else {"mmio_caching": f"the parameter kvm.mmio_caching reads {caching}"}
        return {
            **parameter,
            "kind": f"{facts.vendor} is loaded",
            "version": f"kernel {facts.kernel}",
            "maxphyaddr": facts.source("maxphyaddr"),
            "x86_phys_bits": facts.source("x86_phys_bits"),
            **dict(self.host.sources),
        }

    def to_json(self) -> dict[str, object]:
        """An object for json.dumps: "host", "vendor", "kernel", "masks", "sources", "notes" and "warnings"."""
        told = self.host is None
        return {
            "host": not told,
            "vendor": None if self.host is None else self.host.facts.vendor,
            "kernel": None if self.host is None else self.host.facts.kernel,
            "masks": {name: getattr(self.masks, name) for name in self.masks.fields() if name != "warnings"},
            "sources": self.sources(),
            "notes": [] if self.host is None else list(self.host.notes),
            "warnings": list(self.masks.warnings),
        }


def gather(
    *,
    kernel: str | None = None,
    ept: bool = False,
    ad: bool = True,
    exec_only: bool = True,
    phys_bits: int | None = None,
    npt: bool = False,
    host: bool = True,
) -> Found:
    """The masks: with `host` those of this host, else those that the other arguments tell.

    ArgumentError: a kernel or width that is none.  Lacking: this host does not show what they are.
    """
    if host:
        from ..witness import host_masks

        found = host_masks()
        return Found(found.masks, found)
    from ..mmu.masks import reset_all_pte_masks

    masks = reset_all_pte_masks(46 if phys_bits is None else phys_bits, npt=npt, version=kernel or "6.18")
    return Found(masks.set_ept_masks(ad, exec_only) if ept else masks, None)


def _bits(mask: int) -> str:
    # 0x600 -> "10:9"; runs of bits, highest first.
    runs = []
    rest = mask
    while rest:
        high = low = rest.bit_length() - 1
        while low and rest >> low - 1 & 1:
            low -= 1
        runs.append(str(high) if high == low else f"{high}:{low}")
        rest &= (1 << low) - 1
    return " ".join(runs)


def show(found: Found, *, as_json: bool) -> int:
    """Print what `gather` found; the exit status."""
    if as_json:
        line(json.dumps(found.to_json()))
        return OK
    told = found.sources()
    columns = ("MASK", "VALUE", "BITS", "FROM") if told else ("MASK", "VALUE", "BITS")
    rows = []
    for name in found.masks.fields():
        value = getattr(found.masks, name)
        if name == "warnings":
            continue
        is_mask = name.endswith(("mask", "value")) and not isinstance(value, bool)
        row = (name, f"{value:#018x}" if is_mask else str(value), _bits(value) if is_mask else "", told.get(name, ""))
        rows.append(row[: len(columns)])
    table(columns, rows)
    for text in () if found.host is None else found.host.notes:
        line(f"note: {text}")
    for text in found.masks.warnings:
        line(f"warning: {text}")
    return OK
