"""The masks that this machine's KVM uses, worked out from what the host shows, with where each comes from.

Owns the facts (`HostFacts`), which are plain numbers and words, so that those of any host can be given; and the rules
by which the vendor modules set the masks up from them (`masks_of`):

    any          reset_all_pte_masks: CPUID's widths, the bug L1TF, the parameter kvm.mmio_caching
    kvm_intel    set_ept_masks where kvm_intel.ept reads Y: kvm_intel.eptad, execute-only of IA32_VMX_EPT_VPID_CAP;
                 set_me_spte_mask: the bits of a key, between the kernel's and CPUID's width
    kvm_amd      set_me_spte_mask: the encryption bit, with SME; NPT where kvm_amd.npt reads Y, with the same masks;
                 set_mmio_spte_mask anew where memory encryption is on in SYSCFG
    other        neither EPT nor NPT: the masks of shadow paging

Source: kernel arch/x86/kvm/vmx/vmx.c (vmx_hardware_setup, vmx_setup_me_spte_mask), svm/svm.c (svm_hardware_setup,
svm_adjust_mmio_mask), arch/x86/kernel/cpu/bugs.c (override_cache_bits), cpu/amd.c (early_detect_mem_encrypt),
cpu/common.c (get_cpu_address_sizes) @v6.18.

Works without the extension and without /dev/kvm: what only they tell is then not shown.
"""

from __future__ import annotations

import os
import struct

from ..errors import HvError
from ..mmu.masks import NEWEST, OLDEST, ShadowMasks, reset_all_pte_masks
from ..value import Value
from .result import Lacking

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HostFacts", "HostMasks", "host_facts", "host_masks", "masks_of"]

_EPT_VPID_CAP, _SYSCFG = 0x48C, 0xC0010010
_SYSCFG_MEM_ENCRYPT = 1 << 23
_CAP_EXEC_ONLY, _CAP_AD = 1 << 0, 1 << 21
_W, _U, _P = 2, 4, 1

# Processors with L1TF whose cache looks at 44 address bits, whatever CPUID says: family 6, Nehalem to Kaby Lake of
# the client line (override_cache_bits).
_CACHE_44 = frozenset({0x1E, 0x25, 0x2A, 0x3A, 0x3C, 0x45, 0x46, 0x3D, 0x47, 0x4E, 0x5E, 0x8E, 0x9E})
_CACHE_BITS = 44

_TDP = {"kvm_intel": "kvm_intel.ept", "kvm_amd": "kvm_amd.npt"}
_MAKERS = {"AuthenticAMD": "kvm_amd", "HygonGenuine": "kvm_amd"}  # of processors; all others that KVM knows have VMX
_CPUINFO_WIDTH = "address sizes (/proc/cpuinfo), which lack the bits of encryption"

_SHADOW_FIELDS = (
    ("user_mask", "a page table's U bit"),
    ("accessed_mask", "a page table's A bit"),
    ("dirty_mask", "a page table's D bit"),
    ("nx_mask", "a page table's NX bit"),
    ("x_mask", "a page table has NX and not X"),
    ("present_mask", "a page table's P bit"),
    ("acc_track_mask", "a page table has an A bit"),
    ("host_writable_mask", "a bit that page tables ignore"),
    ("mmu_writable_mask", "a bit that page tables ignore"),
)


class HostFacts(Value):
    """What the masks depend on, of one host; None is "this host does not show it".

    `kernel`: its release.  `vendor`: the vendor module.  `parameters`: ("kvm.mmio_caching", "N") and so on, of the
    modules kvm and vendor.  `maxphyaddr`: the width of physical addresses by CPUID; `x86_phys_bits`: by the kernel.
    `family`, `model`: the processor's.  `l1tf`: the kernel counts the processor among those with that bug.
    `ept_vpid_cap`: IA32_VMX_EPT_VPID_CAP, at least its bits 0 and 21.  `memory_encryption`: it is on in SYSCFG;
    `encryption_bit`: the address bit for it by CPUID 0x8000001f; `sme`: the kernel itself uses it.  They are AMD's.
    `sources`: (fact, where it was found), one for each that is known.
    """

    kernel: str
    vendor: str
    parameters: tuple[tuple[str, str], ...] = ()
    maxphyaddr: int | None = None
    x86_phys_bits: int | None = None
    family: int | None = None
    model: int | None = None
    l1tf: bool | None = None
    ept_vpid_cap: int | None = None
    memory_encryption: bool | None = None
    encryption_bit: int | None = None
    sme: bool | None = None
    sources: tuple[tuple[str, str], ...] = ()

    def parameter(self, name: str) -> str | None:
        """A module's parameter by "module.name", None where it is not shown.

        >>> HostFacts("6.18", "kvm_amd", (("kvm_amd.npt", "Y"),)).parameter("kvm_amd.npt")
        'Y'
        """
        return dict(self.parameters).get(name)

    def source(self, fact: str) -> str:
        """Where the fact was found; "given" for one without a source, else that nothing shows it."""
        return dict(self.sources).get(fact) or ("not shown" if getattr(self, fact) is None else "given")


class HostMasks(Value):
    """The masks of a host, and why.

    `sources`: (field of the masks, where its bits come from), for every field that is a mask.  `notes`: what was taken
    for granted because the host does not show it.
    """

    masks: ShadowMasks
    facts: HostFacts
    sources: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()

    def source(self, field: str) -> str:
        """Where the bits of this field of the masks come from.  KeyError: it is no mask."""
        return dict(self.sources)[field]

    def rows(self) -> list[tuple[str, str, str]]:
        """(field, value, where its bits come from) of every mask, as text."""
        return [(name, f"{getattr(self.masks, name):#x}", where) for name, where in self.sources]

    def to_json(self) -> dict[str, object]:
        """Plain values: kind, version, masks (name, value, source), notes, warnings."""
        return {
            "kind": self.masks.kind,
            "version": self.masks.version,
            "vendor": self.facts.vendor,
            "kernel": self.facts.kernel,
            "masks": [
                {"name": name, "value": getattr(self.masks, name), "source": where} for name, where in self.sources
            ],
            "notes": list(self.notes),
            "warnings": list(self.masks.warnings),
        }

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        head = f"masks of {self.masks.kind} paging, {self.facts.vendor} of kernel {self.facts.kernel}"
        lines = [f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {where}" for name, value, where in rows]
        notes = [f"  note: {note}" for note in self.notes] + [f"  warning: {text}" for text in self.masks.warnings]
        return "\n".join([head, *lines, *notes])


# -- the facts ----------------------------------------------------------------------------------------------------


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None


def _parameters(modules: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    found = []
    for module in modules:
        place = f"/sys/module/{module}/parameters"
        try:
            names = sorted(os.listdir(place))
        except OSError:
            continue
        for name in names:
            text = _read(f"{place}/{name}")
            if text is not None:
                found.append((f"{module}.{name}", text.strip()))
    return tuple(found)


def _cpuinfo() -> dict[str, str]:
    # The lines of the first processor.
    text = _read("/proc/cpuinfo") or ""
    pairs = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]
    return {name.strip(): value.strip() for name, _, value in pairs}


def _device(path: str, place: int, size: int) -> bytes | None:
    # `size` bytes at `place` of a device that tells a CPUID leaf or an MSR; None where it can't be read.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = os.pread(fd, size, place)
    except OSError:
        return None
    finally:
        os.close(fd)
    return data if len(data) == size else None


def _cpuid(leaf: int) -> tuple[int, int, int, int] | None:
    data = _device("/dev/cpu/0/cpuid", leaf, 16)
    return None if data is None else struct.unpack("<4I", data)


def _msr(index: int) -> int | None:
    data = _device("/dev/cpu/0/msr", index, 8)
    return None if data is None else int.from_bytes(data, "little")


def _kvm_msr(index: int) -> int | None:
    # A feature MSR, as KVM tells it.  Without the extension the import fails with BuildError, an HvError.
    try:
        from ..kvm import Kvm

        with Kvm() as kvm:
            return kvm.get_feature_msrs([index]).get(index) if index in kvm.msr_feature_index_list() else None
    except HvError:
        return None


def _kvm_width() -> int | None:
    # The width of physical addresses that KVM supports for guests: with EPT and NPT the processor's own.
    from ..arch.cpuid import max_phys_bits

    try:
        from ..kvm import Kvm

        with Kvm() as kvm:
            rows = kvm.supported_cpuid()
    except HvError:
        return None
    return max_phys_bits([(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in rows])


def _modules() -> list[str]:
    # The modules of KVM but the common one, loaded or built in.
    try:
        return sorted(name for name in os.listdir("/sys/module") if name.startswith("kvm_"))
    except OSError:
        return []


def _vendor_module(info: dict[str, str]) -> str | None:
    # The vendor module in use.  Where several are built into the kernel, the processor's maker tells.
    names = _modules()
    own = _MAKERS.get(info.get("vendor_id", ""), "kvm_intel")
    return own if own in names else min(names, default=None)


def host_facts() -> HostFacts:
    """The facts of this host: /sys/module, /proc/cpuinfo, /dev/cpu/0/cpuid and msr, what KVM tells.

    What cannot be read is None.  Lacking: no vendor module is loaded.
    """
    info = _cpuinfo()
    vendor = _vendor_module(info)
    if vendor is None:
        raise Lacking("no vendor module of KVM is visible in /sys/module")
    facts: dict[str, object] = {}
    sources: list[tuple[str, str]] = []

    def know(fact: str, value: object, where: str) -> None:
        if value is not None and fact not in facts:
            facts[fact] = value
            sources.append((fact, where))

    widths = _cpuid(0x80000008) if (_cpuid(0x80000000) or (0,))[0] >= 0x80000008 else None
    know("maxphyaddr", widths[0] & 0xFF if widths else None, "CPUID 0x80000008 (/dev/cpu/0/cpuid)")
    parameters = _parameters(("kvm", vendor))
    tdp = dict(parameters).get(_TDP.get(vendor, "")) == "Y"
    know("maxphyaddr", _kvm_width() if tdp and not widths else None, "CPUID 0x80000008 (KVM_GET_SUPPORTED_CPUID)")
    words = info.get("address sizes", "").split()
    bits = int(words[0]) if words and words[0].isdigit() else None
    know("x86_phys_bits", bits, "address sizes (/proc/cpuinfo)")
    know("maxphyaddr", bits, _CPUINFO_WIDTH)
    for fact, name in (("family", "cpu family"), ("model", "model")):
        text = info.get(name, "")
        know(fact, int(text) if text.isdigit() else None, f"{name} (/proc/cpuinfo)")
    if "bugs" in info:
        know("l1tf", "l1tf" in info["bugs"].split(), "bugs (/proc/cpuinfo)")
    if vendor == "kvm_intel":
        _ept_facts(know, info)
    if vendor == "kvm_amd":
        _encryption_facts(know, info)
    return HostFacts(os.uname().release, vendor, parameters, **facts, sources=tuple(sources))  # type: ignore[arg-type]


def _ept_facts(know: Callable[[str, object, str], None], info: dict[str, str]) -> None:
    know("ept_vpid_cap", _msr(_EPT_VPID_CAP), "IA32_VMX_EPT_VPID_CAP (/dev/cpu/0/msr)")
    if "vmx flags" in info:
        flags = info["vmx flags"].split()
        cap = _CAP_EXEC_ONLY * ("ept_x_only" in flags) | _CAP_AD * ("ept_ad" in flags)
        know("ept_vpid_cap", cap, "vmx flags ept_x_only and ept_ad (/proc/cpuinfo)")
    # What KVM tells is for nested guests: without "nested" nothing, A/D only where it uses them itself.
    know("ept_vpid_cap", _kvm_msr(_EPT_VPID_CAP) or None, "IA32_VMX_EPT_VPID_CAP (KVM_GET_MSRS of /dev/kvm)")


def _encryption_facts(know: Callable[[str, object, str], None], info: dict[str, str]) -> None:
    last = _cpuid(0x80000000)
    if last is not None and last[0] < 0x8000001F:
        know("memory_encryption", False, "CPUID has no leaf 0x8000001f (/dev/cpu/0/cpuid)")
        know("sme", False, "CPUID has no leaf 0x8000001f (/dev/cpu/0/cpuid)")
        return
    leaf = _cpuid(0x8000001F) if last is not None else None
    know("encryption_bit", leaf[1] & 0x3F if leaf else None, "CPUID 0x8000001f EBX 5:0 (/dev/cpu/0/cpuid)")
    value = _msr(_SYSCFG)
    on = None if value is None else bool(value & _SYSCFG_MEM_ENCRYPT)
    know("memory_encryption", on, "SYSCFG bit 23 (/dev/cpu/0/msr)")
    if "flags" in info:
        # The kernel takes both flags away where SYSCFG has encryption off, and "sme" where it does not use it itself.
        flags = info["flags"].split()
        know("memory_encryption", True if {"sme", "sev"} & {*flags} else None, "flags sme or sev (/proc/cpuinfo)")
        know("sme", "sme" in flags, "flag sme (/proc/cpuinfo)")


# -- the masks ----------------------------------------------------------------------------------------------------


def host_masks(facts: HostFacts | None = None) -> HostMasks:
    """The masks of this host's KVM, or of the host with these facts.

    Lacking: no vendor module is loaded, or the width of physical addresses is not shown.

    >>> facts = HostFacts("6.18.44", "kvm_amd", (("kvm_amd.npt", "Y"), ("kvm.mmio_caching", "Y")), 48, 48)
    >>> found = host_masks(facts)
    >>> found.masks.kind, hex(found.masks.mmio_value)
    ('npt', '0x8000000000001')
    """
    return masks_of(host_facts() if facts is None else facts)


def masks_of(facts: HostFacts) -> HostMasks:
    """The masks of a host with these facts.  Lacking: the width of physical addresses is not among them."""
    notes: list[str] = []
    version = _version(facts.kernel, notes)
    if facts.maxphyaddr is None:
        raise Lacking("the width of physical addresses is not shown: neither CPUID nor /proc/cpuinfo can be read")
    if facts.vendor in _TDP and facts.source("maxphyaddr") == _CPUINFO_WIDTH:
        notes.append("CPUID can't be read: no bits of address taken for those of encryption")
    x86 = facts.maxphyaddr if facts.x86_phys_bits is None else min(facts.x86_phys_bits, facts.maxphyaddr)
    caching = facts.parameter("kvm.mmio_caching")
    if caching is None:
        notes.append("the parameter kvm.mmio_caching is not shown: taken for Y, which is its default")
    if facts.l1tf is None:
        notes.append("whether the processor has L1TF is not shown: taken for no")
    cache = _cache_bits(facts, facts.maxphyaddr)
    masks = reset_all_pte_masks(
        facts.maxphyaddr,
        x86_phys_bits=x86,
        l1tf=bool(facts.l1tf),
        cache_bits=cache,
        mmio_caching=caching != "N",
        npt=facts.vendor == "kvm_amd" and _is_on(facts, "kvm_amd.npt", notes),
        version=version,
    )
    where = {name: f"shadow paging: {what}" for name, what in _SHADOW_FIELDS}
    where |= _reset_sources(facts, masks, cache)
    if facts.vendor == "kvm_intel":
        masks = _intel(facts, masks, where, notes)
    elif facts.vendor == "kvm_amd":
        masks = _amd(facts, masks, where, notes)
    else:
        where = {
            name: text.replace("shadow paging:", f"{facts.vendor} has neither EPT nor NPT:")
            for name, text in where.items()
        }
    order = [name for name in masks.fields() if name in where]
    return HostMasks(masks, facts, tuple([(name, where[name]) for name in order]), tuple(notes))


def _version(release: str, notes: list[str]) -> str:
    # The rules to take for this kernel.
    numbers = release.partition("-")[0].split(".")[:2]
    found = (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 and all(map(str.isdigit, numbers)) else (0, 0)
    kept = min(max(found, OLDEST), NEWEST)
    if kept != found:
        notes.append(f"kernel {release}: the rules are those of {kept[0]}.{kept[1]}, the nearest that are known")
    return f"{kept[0]}.{kept[1]}"


def _is_on(facts: HostFacts, name: str, notes: list[str]) -> bool:
    # A parameter that reads Y or 1; where it is not shown, its default, which is Y for all that are asked here.
    text = facts.parameter(name)
    if text is None:
        notes.append(f"the parameter {name} is not shown: taken for Y, which is its default")
    return text in (None, "Y", "1")


def _cache_bits(facts: HostFacts, maxphyaddr: int) -> int:
    # The kernel begins with the width of CPUID, before it takes bits of encryption away from its own.
    if facts.l1tf and facts.family == 6 and facts.model in _CACHE_44:
        return max(maxphyaddr, _CACHE_BITS)
    return maxphyaddr


def _reset_sources(facts: HostFacts, masks: ShadowMasks, cache: int) -> dict[str, str]:
    # Where the masks come from that no vendor's table has.
    width = f"{facts.maxphyaddr} address bits: {facts.source('maxphyaddr')}"
    bugs = facts.source("l1tf")
    l1tf = f"L1TF ({bugs}), {cache} address bits of the cache" if facts.l1tf else f"no L1TF: {bugs}"
    if facts.l1tf and not masks.nonpresent_or_rsvd_mask:
        l1tf += ", which leave no room"
    low = masks.x86_phys_bits
    mmio = width
    if facts.parameter("kvm.mmio_caching") == "N":
        mmio = "the parameter kvm.mmio_caching reads N"
    return {
        "me_value": "no memory encryption",
        "me_mask": "no memory encryption",
        "mmio_value": mmio,
        "mmio_mask": width,
        "mmio_access_mask": "shadow paging: W and U",
        "memtype_mask": "shadow paging: no memory type in an entry",
        "nonpresent_or_rsvd_mask": l1tf,
        "nonpresent_or_rsvd_lower_gfn_mask": f"{low} address bits: {facts.source('x86_phys_bits')}; {l1tf}",
        "nonpresent_value": f"the rules of kernel {masks.version}",
    }


def _intel(facts: HostFacts, masks: ShadowMasks, where: dict[str, str], notes: list[str]) -> ShadowMasks:
    keys = 0
    if masks.x86_phys_bits != masks.maxphyaddr:
        keys = (1 << masks.maxphyaddr) - (1 << masks.x86_phys_bits)
        where["me_mask"] = (
            f"the bits of a key: {masks.x86_phys_bits} address bits for the kernel ({facts.source('x86_phys_bits')}), "
            f"for the processor {masks.maxphyaddr} ({facts.source('maxphyaddr')})"
        )
    if not _is_on(facts, "kvm_intel.ept", notes):
        return masks.set_me_spte_mask(0, keys)
    cap = facts.ept_vpid_cap
    if cap is None:
        notes.append("IA32_VMX_EPT_VPID_CAP is not shown: taken for one with execute-only and A/D bits")
        cap = _CAP_EXEC_ONLY | _CAP_AD
    # KVM turns the parameter off where the processor has none.
    ad = bool(cap & _CAP_AD)
    if facts.parameter("kvm_intel.eptad") is not None:
        ad = _is_on(facts, "kvm_intel.eptad", notes)
    elif facts.ept_vpid_cap is not None:
        shown = "which the processor has" if ad else "for the processor has no A/D bits"
        notes.append(f"the parameter kvm_intel.eptad is not shown: taken for {'Y' if ad else 'N'}, {shown}")
    else:
        notes.append("the parameter kvm_intel.eptad is not shown: taken for Y, which is its default")
    exec_only = bool(cap & _CAP_EXEC_ONLY)
    made = masks.set_ept_masks(ad, exec_only).set_me_spte_mask(0, keys)
    ept = "kvm_intel.ept is on"
    ad_text = f"kvm_intel.eptad is {'on' if ad else 'off'}"
    unconditional = "" if ad or not made.accessed_mask else "; set even so from 6.13 on, for KVM's own use"
    where |= {
        "user_mask": f"{ept}: EPT's R",
        "accessed_mask": f"{ept}: EPT's A; {ad_text}{unconditional}",
        "dirty_mask": f"{ept}: EPT's D; {ad_text}{unconditional}",
        "nx_mask": f"{ept}: EPT has X and not NX",
        "x_mask": f"{ept}: EPT's X",
        "present_mask": f"{ept}: execute-only {'is there' if exec_only else 'is lacking'} "
        f"({facts.source('ept_vpid_cap')}){', suppress #VE' if made.present_mask >> 63 else ''}",
        "acc_track_mask": f"{ept}: R, W and X",
        "host_writable_mask": f"{ept}: a bit that EPT ignores",
        "mmu_writable_mask": f"{ept}: a bit that EPT ignores",
        "memtype_mask": f"{ept}: bits 5:3 and IPAT" if made.memtype_mask else "gone with kernel 6.16",
        "mmio_mask": f"{ept}: R, W and X{', suppress #VE' if made.mmio_mask >> 63 else ''}",
        "mmio_access_mask": f"{ept}: no room",
    }
    if made.mmio_value:
        where["mmio_value"] = f"{ept}: W and X without R, an EPT misconfiguration"
    return made


def _amd(facts: HostFacts, masks: ShadowMasks, where: dict[str, str], notes: list[str]) -> ShadowMasks:
    if masks.kind == "npt":
        for name, text in where.items():
            where[name] = text.replace("shadow paging:", "kvm_amd.npt is on, and NPT is as shadow paging:")
    on = facts.memory_encryption
    if on is None:
        on = masks.x86_phys_bits != masks.maxphyaddr
        notes.append(
            f"SYSCFG is not shown: memory encryption taken for {'on' if on else 'off'}, by the address bits it takes"
        )
    if not on:
        return masks  # nor has the kernel SME then
    bit = facts.encryption_bit
    if bit is None:
        notes.append(
            "memory encryption is on, and CPUID 0x8000001f, which has its bit, is not shown: "
            "me_value and me_mask are taken for 0, mmio_value and mmio_mask as if the bit were above the addresses"
        )
    if facts.sme is None:
        notes.append("whether the kernel itself uses SME is not shown: taken for no")
    if facts.sme and bit is not None:
        masks = masks.set_me_spte_mask(1 << bit, 1 << bit)
        text = f"SME ({facts.source('sme')}): bit {bit} by {facts.source('encryption_bit')}"
        where |= {"me_value": text, "me_mask": text}
    first = masks.x86_phys_bits + (masks.x86_phys_bits == bit)
    mask = (1 << 52) - (1 << first) | _P if first < 52 else 0
    masks = masks.set_mmio_spte_mask(mask, mask, _W | _U)
    text = f"memory encryption is on ({facts.source('memory_encryption')}): "
    text += f"P and bits {first} to 51" if mask else "no address bit is left that is reserved"
    where["mmio_mask"] = text
    if masks.mmio_value or not mask:
        where["mmio_value"] = text
    return masks
