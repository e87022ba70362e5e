"""The masks of a host: this one's facts against the files they are in, and the rules for hosts of other kinds.

The recorded hosts are a Xeon, a client processor with L1TF, one with encryption keys, and two EPYCs; expected masks are
counted out beside each.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hvmodel.mmu import ShadowMasks, reset_all_pte_masks
from hvmodel.witness import (
    CheckResult,
    HostFacts,
    HostMasks,
    Lacking,
    check_masks,
    host_facts,
    host_masks,
    hostmasks,
    masks_of,
    run,
)
from tests.need import need

BIT = [1 << bit for bit in range(64)]

# A Xeon with EPT: the MSR has execute-only, walks of 4 levels, WB, 2 MiB, 1 GiB, INVEPT, A/D (SDM volume 3D, A.10).
EPT_VPID_CAP = BIT[0] | BIT[6] | BIT[14] | BIT[16] | BIT[17] | BIT[20] | BIT[21] | BIT[25] | BIT[26]
INTEL = (("kvm.mmio_caching", "Y"), ("kvm_intel.ept", "Y"), ("kvm_intel.eptad", "Y"))
AMD = (("kvm.mmio_caching", "Y"), ("kvm_amd.npt", "Y"))


def with_parameters(rows: tuple[tuple[str, str], ...], **changed: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, changed.get(name.rpartition(".")[2], value)) for name, value in rows)


XEON = HostFacts("6.18.2-generic", "kvm_intel", INTEL, 46, 46, 6, 0x6A, False, EPT_VPID_CAP)
CLIENT = HostFacts("6.12.9", "kvm_intel", INTEL, 39, 39, 6, 0x9E, True, EPT_VPID_CAP)
MKTME = HostFacts("6.18.0", "kvm_intel", INTEL, 52, 46, 6, 0x8F, False, EPT_VPID_CAP)
EPYC = HostFacts("6.18.0", "kvm_amd", AMD, 48, 48, 25, 1, False, None, False, 51, False)
# Memory encryption on: CPUID 0x8000001f EBX has 47 in 5:0 and 5 bits less of the address in 11:6, 48 - 5 = 43.
EPYC_SME = HostFacts("6.18.0", "kvm_amd", AMD, 48, 43, 23, 49, False, None, True, 47, True)


def test_a_xeon_has_ept() -> None:
    found = host_masks(XEON)
    assert found.masks == reset_all_pte_masks(46).set_ept_masks(True, True)
    assert found.notes == ()
    assert (found.masks.kind, found.masks.me_mask, found.masks.mmio_value) == ("ept", 0, 6)
    assert "kvm_intel.eptad is on" in found.source("accessed_mask")
    assert "execute-only is there" in found.source("present_mask")


def test_without_a_d_bits() -> None:
    facts = HostFacts("6.18.0", "kvm_intel", with_parameters(INTEL, eptad="N"), 46, 46, ept_vpid_cap=EPT_VPID_CAP)
    found = host_masks(facts)
    assert found.masks == reset_all_pte_masks(46).set_ept_masks(False, True)
    assert "eptad is off; set even so" in found.source("dirty_mask")
    older = HostFacts("6.12.1", "kvm_intel", facts.parameters, 46, 46, ept_vpid_cap=EPT_VPID_CAP)
    old = host_masks(older)
    assert (old.masks.accessed_mask, old.masks.dirty_mask) == (0, 0)
    assert "set even so" not in old.source("dirty_mask")


def test_without_execute_only() -> None:
    facts = HostFacts("6.18.0", "kvm_intel", INTEL, 46, 46, l1tf=False, ept_vpid_cap=EPT_VPID_CAP & ~1)
    found = host_masks(facts)
    assert found.masks == reset_all_pte_masks(46).set_ept_masks(True, False)
    assert "execute-only is lacking" in found.source("present_mask")


def test_without_ept_it_is_shadow_paging() -> None:
    facts = HostFacts("6.18.0", "kvm_intel", with_parameters(INTEL, ept="N", eptad="N"), 46, 46, l1tf=False)
    found = host_masks(facts)
    assert found.masks == reset_all_pte_masks(46)
    assert found.notes == ()


def test_a_client_processor_with_l1tf() -> None:
    found = host_masks(CLIENT)
    # 39 address bits, and the cache looks at 44: ones in bits 43:39, the address below 39.
    assert found.masks.nonpresent_or_rsvd_mask == sum(BIT[39:44]) == 0xF8000000000
    assert found.masks.nonpresent_or_rsvd_lower_gfn_mask == BIT[39] - BIT[12]
    assert found.masks.kind == "ept"
    assert "44 address bits of the cache" in found.source("nonpresent_or_rsvd_mask")
    # A server of the same years: its cache looks at what CPUID says.
    server = host_masks(HostFacts("6.12.9", "kvm_intel", INTEL, 46, 46, 6, 0x55, True, EPT_VPID_CAP))
    assert server.masks.nonpresent_or_rsvd_mask == sum(BIT[41:46])
    # A cache that looks at 47 bits or more leaves no room (spte.c kvm_mmu_reset_all_pte_masks).
    wide = host_masks(HostFacts("6.12.9", "kvm_intel", INTEL, 47, 47, 6, 0x55, True, EPT_VPID_CAP))
    assert (wide.masks.nonpresent_or_rsvd_mask, len(wide.masks.warnings)) == (0, 1)
    assert wide.source("nonpresent_or_rsvd_mask") == "L1TF (given), 47 address bits of the cache, which leave no room"
    # The kernel takes the width of CPUID for the cache's (get_cpu_address_sizes), before bits of a key go.
    keys = host_masks(HostFacts("6.12.9", "kvm_intel", INTEL, 46, 42, 6, 0x55, True, EPT_VPID_CAP))
    assert keys.masks.nonpresent_or_rsvd_mask == sum(BIT[41:46])
    # An older one of the list with few address bits, on a kernel of another family number.
    other = host_masks(HostFacts("6.12.9", "kvm_intel", INTEL, 39, 39, 15, 0x9E, True, EPT_VPID_CAP))
    assert other.masks.nonpresent_or_rsvd_mask == sum(BIT[34:39])


@pytest.mark.parametrize("ept", ["Y", "N"])
def test_keys_are_in_the_mask_and_not_in_the_value(ept: str) -> None:
    facts = HostFacts("6.18.0", "kvm_intel", with_parameters(INTEL, ept=ept), 52, 46, 6, 0x8F, False, EPT_VPID_CAP)
    found = host_masks(facts)
    assert (found.masks.me_value, found.masks.me_mask) == (0, sum(BIT[46:52]))
    assert "bits of a key" in found.source("me_mask")
    # 52 address bits leave none reserved for shadow paging's MMIO; EPT needs none.
    assert found.masks.mmio_value == (6 if ept == "Y" else 0)


def test_an_epyc_has_npt() -> None:
    found = host_masks(EPYC)
    assert found.masks == reset_all_pte_masks(48, npt=True)
    assert (found.masks.me_value, found.masks.kind, found.notes) == (0, "npt", ())
    assert "kvm_amd.npt is on" in found.source("user_mask")
    shadow = host_masks(HostFacts("6.18.0", "kvm_amd", with_parameters(AMD, npt="N"), 48, 48, memory_encryption=False))
    assert shadow.masks.kind == "shadow"


def test_an_epyc_with_memory_encryption() -> None:
    found = host_masks(EPYC_SME)
    assert (found.masks.me_value, found.masks.me_mask) == (BIT[47], BIT[47])
    # svm_adjust_mmio_mask: P and the bits from the kernel's width to 51.
    assert found.masks.mmio_value == found.masks.mmio_mask == sum(BIT[43:52]) | 1
    assert found.masks.mmio_access_mask == 6
    assert "bits 43 to 51" in found.source("mmio_mask")
    assert found.masks.warnings == ()


def test_the_encryption_bit_itself_is_not_in_the_mmio_value() -> None:
    # Where the first bit above the addresses is the one of encryption, the next one is the first.
    facts = HostFacts("6.18.0", "kvm_amd", AMD, 48, 47, 25, 1, False, None, True, 47, False)
    assert host_masks(facts).masks.mmio_value == sum(BIT[48:52]) | 1
    assert host_masks(facts).masks.me_value == 0
    # None is left at 52: caching is off.
    last = HostFacts("6.18.0", "kvm_amd", AMD, 52, 51, 25, 1, False, None, True, 51, True)
    assert (host_masks(last).masks.mmio_value, host_masks(last).masks.enable_mmio_caching) == (0, False)
    assert "no address bit is left" in host_masks(last).source("mmio_mask") == host_masks(last).source("mmio_value")
    # With 51 and the bit of encryption elsewhere bit 51 alone is left.
    one = HostFacts("6.18.0", "kvm_amd", AMD, 52, 51, 25, 1, False, None, True, 47, False)
    assert host_masks(one).masks.mmio_value == BIT[51] | 1


def test_encryption_of_which_cpuid_is_not_shown() -> None:
    hidden = HostFacts("6.18.0", "kvm_amd", AMD, 48, 43, 23, 49, False, None, True, None, True)
    found = host_masks(hidden)
    assert (found.masks.me_mask, found.masks.mmio_mask) == (0, sum(BIT[43:52]) | 1)
    assert len(found.notes) == 1
    assert "CPUID 0x8000001f" in found.notes[0]
    unknown = HostFacts("6.18.0", "kvm_amd", AMD, 48, 43, 23, 49, False, None, True, 47, None)
    assert host_masks(unknown).notes == ("whether the kernel itself uses SME is not shown: taken for no",)
    # sme_me_mask is 0 where SYSCFG has encryption off (arch/x86/boot/startup/sme.c sme_enable).
    off = HostFacts("6.18.0", "kvm_amd", AMD, 48, 48, 23, 49, False, None, False, 47, True)
    assert host_masks(off).masks == reset_all_pte_masks(48, npt=True)


def test_syscfg_that_is_not_shown_is_told_by_the_widths() -> None:
    hidden = HostFacts("6.18.0", "kvm_amd", AMD, 48, 43, 23, 49, False, None, None, 47, True)
    assert host_masks(hidden).masks == host_masks(EPYC_SME).masks
    assert any("taken for on" in note for note in host_masks(hidden).notes)
    plain = HostFacts("6.18.0", "kvm_amd", AMD, 48, 48, 23, 49, False, None, None, 47, False)
    assert host_masks(plain).masks == reset_all_pte_masks(48, npt=True)
    assert any("taken for off" in note for note in host_masks(plain).notes)


def test_another_vendor_has_shadow_paging() -> None:
    found = host_masks(HostFacts("6.18.44-fc", "kvm_pvm", (("kvm.mmio_caching", "N"),), 46, 46, l1tf=False))
    assert found.masks == reset_all_pte_masks(46, mmio_caching=False)
    assert found.source("user_mask").startswith("kvm_pvm has neither EPT nor NPT")
    assert "kvm.mmio_caching reads N" in found.source("mmio_value")
    assert found.notes == ()


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        (HostFacts("6.18.0", "kvm_pvm", (), 46, 46, l1tf=False), "kvm.mmio_caching is not shown"),
        (HostFacts("6.18.0", "kvm_pvm", (("kvm.mmio_caching", "Y"),), 46, 46), "L1TF is not shown"),
        (
            HostFacts("6.18.0", "kvm_intel", INTEL[::2], 46, 46, l1tf=False, ept_vpid_cap=1),
            "kvm_intel.ept is not shown",
        ),
        (HostFacts("6.18.0", "kvm_intel", INTEL[:2], 46, 46, l1tf=False, ept_vpid_cap=1), "eptad is not shown"),
        (HostFacts("6.18.0", "kvm_intel", INTEL, 46, 46, l1tf=False), "IA32_VMX_EPT_VPID_CAP is not shown"),
        (HostFacts("6.18.0", "kvm_amd", AMD[:1], 48, 48, l1tf=False, memory_encryption=False), "npt is not shown"),
        (HostFacts("7.1.0", "kvm_pvm", AMD[:1], 46, 46, l1tf=False), "those of 6.18"),
        (HostFacts("5.10.0", "kvm_pvm", AMD[:1], 46, 46, l1tf=False), "those of 6.1,"),
        (HostFacts("strange", "kvm_pvm", AMD[:1], 46, 46, l1tf=False), "those of 6.1,"),
    ],
)
def test_what_is_taken_for_granted_is_said(facts: HostFacts, word: str) -> None:
    found = host_masks(facts)
    assert len(found.notes) == 1
    assert word in found.notes[0]
    assert f"note: {found.notes[0]}" in str(found)


def test_a_parameter_that_is_not_shown_is_on_where_the_processor_can() -> None:
    facts = HostFacts("6.18.0", "kvm_intel", INTEL[:2], 46, 46, l1tf=False, ept_vpid_cap=EPT_VPID_CAP & ~BIT[21])
    assert not host_masks(facts).masks.kvm_ad_enabled
    assert "taken for N, for the processor has no A/D bits" in host_masks(facts).notes[0]
    facts = HostFacts("6.18.0", "kvm_intel", INTEL[:2], 46, 46, l1tf=False, ept_vpid_cap=EPT_VPID_CAP)
    assert host_masks(facts).masks.kvm_ad_enabled
    assert "taken for Y, which the processor has" in host_masks(facts).notes[0]
    facts = HostFacts("6.18.0", "kvm_intel", INTEL[:2], 46, 46, l1tf=False)
    assert host_masks(facts).masks == reset_all_pte_masks(46).set_ept_masks(True, True)
    assert len(host_masks(facts).notes) == 2


def test_without_a_width_there_is_no_answer() -> None:
    with pytest.raises(Lacking, match="width of physical addresses"):
        masks_of(HostFacts("6.18.0", "kvm_intel", INTEL))


@pytest.mark.parametrize("facts", [XEON, CLIENT, MKTME, EPYC, EPYC_SME], ids=lambda facts: facts.vendor)
def test_every_mask_has_a_source(facts: HostFacts) -> None:
    found = host_masks(facts)
    names = [name for name in ShadowMasks.fields() if name.endswith(("_mask", "_value")) and name != "has_mt_mask"]
    assert [name for name, _ in found.sources] == names
    assert all(text for _, text in found.sources)
    assert [row[0] for row in found.rows()] == names
    shown = json.loads(json.dumps(found.to_json()))
    assert [row["value"] for row in shown["masks"]] == [getattr(found.masks, name) for name in names]
    assert pickle.loads(pickle.dumps(found)) == found
    with pytest.raises(KeyError):
        found.source("kind")


# -- this host ------------------------------------------------------------------------------------------------------


def loaded() -> str:
    names = (
        [name for name in os.listdir("/sys/module") if name.startswith("kvm_")] if Path("/sys/module").exists() else []
    )
    if not names:
        pytest.skip("no vendor module of KVM is loaded")
    return min(names)


def test_this_hosts_facts_are_those_of_its_files() -> None:
    vendor = loaded()
    facts = host_facts()
    info = Path("/proc/cpuinfo").read_text()
    assert (facts.kernel, facts.vendor) == (os.uname().release, vendor)
    width = re.search(r"address sizes\s*:\s*(\d+) bits physical", info)
    assert width
    assert facts.x86_phys_bits == int(width[1])
    assert facts.maxphyaddr is not None
    assert facts.maxphyaddr >= facts.x86_phys_bits
    assert facts.l1tf == bool(re.search(r"^bugs\s*:.*\bl1tf\b", info, re.MULTILINE))
    caching = Path("/sys/module/kvm/parameters/mmio_caching")
    if caching.exists():
        assert facts.parameter("kvm.mmio_caching") == caching.read_text().strip()
    assert facts.parameter("kvm.no_such_parameter") is None
    assert facts.source("x86_phys_bits") == "address sizes (/proc/cpuinfo)"
    known = {name for name in facts.fields() if getattr(facts, name) is not None} - {
        "kernel",
        "vendor",
        "parameters",
        "sources",
    }
    assert {name for name, _ in facts.sources} == known


def test_this_hosts_masks() -> None:
    vendor = loaded()
    found = host_masks()
    assert isinstance(found, HostMasks)
    assert found.facts == host_facts()
    if vendor not in ("kvm_intel", "kvm_amd"):
        assert found.masks.kind == "shadow"
        assert vendor in found.source("user_mask")


def test_nothing_readable_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded()
    monkeypatch.setattr(hostmasks, "_read", lambda _path: None)
    monkeypatch.setattr(hostmasks, "_device", lambda *_: None)
    monkeypatch.setattr(hostmasks, "_kvm_width", lambda: None)
    facts = host_facts()
    assert (facts.maxphyaddr, facts.x86_phys_bits, facts.l1tf, facts.parameters, facts.sources) == (None,) * 3 + (
        (),
        (),
    )
    with pytest.raises(Lacking, match="can be read"):
        host_masks()


def test_what_kvm_tells() -> None:
    need("kvm")
    width = hostmasks._kvm_width()
    assert width is not None
    assert 32 <= width <= 52
    assert hostmasks._kvm_msr(0xFFFF) is None  # no feature MSR


def test_no_vendor_module_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostmasks, "_modules", list)
    with pytest.raises(Lacking, match="no vendor module"):
        host_facts()


def test_of_several_vendor_modules_that_are_built_in_the_processor_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    for maker, modules, vendor in (
        ("GenuineIntel", ["kvm_amd", "kvm_intel"], "kvm_intel"),
        ("CentaurHauls", ["kvm_amd", "kvm_intel"], "kvm_intel"),
        ("AuthenticAMD", ["kvm_amd", "kvm_intel"], "kvm_amd"),
        ("HygonGenuine", ["kvm_amd", "kvm_intel"], "kvm_amd"),
        ("GenuineIntel", ["kvm_pvm"], "kvm_pvm"),
        ("AuthenticAMD", ["kvm_intel"], "kvm_intel"),
    ):
        Asked(monkeypatch, modules, cpuinfo=f"vendor_id\t: {maker}\naddress sizes\t: 46 bits physical\n")
        assert host_facts().vendor == vendor


def test_without_the_extension() -> None:
    # A vendor module that asks /dev/kvm for what the files do not tell: nothing is told, and that is said.
    code = (
        "import sys; sys.modules['hvmodel._native'] = None\n"
        "from hvmodel.witness import host_masks, hostmasks\n"
        "hostmasks._modules = lambda: ['kvm_intel']\n"
        "hostmasks._cpuinfo = lambda: {'address sizes': '46 bits physical', 'bugs': ''}\n"
        "hostmasks._device = lambda *_: None\n"
        "hostmasks._parameters = lambda _: (('kvm_intel.ept', 'Y'), ('kvm.mmio_caching', 'Y'))\n"
        "print(hostmasks._kvm_msr(0x48C), hostmasks._kvm_width())\n"
        "print(host_masks().masks.kind, len(host_masks().notes))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=60, text=True)
    # The notes: CPUID can't be read, IA32_VMX_EPT_VPID_CAP and eptad are not shown.
    assert (done.stdout.splitlines(), done.stderr) == (["None None", "ept 3"], "")


class Asked:
    """A host of files and devices that are told: what host_facts reads of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, modules: list[str], **files: str) -> None:
        self.cpuid: dict[int, tuple[int, int, int, int]] = {}
        self.msrs: dict[int, int] = {}
        self.kvm_msrs: dict[int, int] = {}
        self.files = {"/proc/cpuinfo": "", **{f"/proc/{name}": text for name, text in files.items()}}
        monkeypatch.setattr(hostmasks, "_modules", lambda: modules)
        monkeypatch.setattr(hostmasks, "_read", self.files.get)
        monkeypatch.setattr(hostmasks, "_cpuid", self.cpuid.get)
        monkeypatch.setattr(hostmasks, "_msr", self.msrs.get)
        monkeypatch.setattr(hostmasks, "_kvm_msr", self.kvm_msrs.get)
        self.kvm_width: int | None = None
        self.parameters: tuple[tuple[str, str], ...] = ()
        monkeypatch.setattr(hostmasks, "_kvm_width", lambda: self.kvm_width)
        monkeypatch.setattr(hostmasks, "_parameters", lambda _modules: self.parameters)


def test_where_the_ept_capabilities_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "address sizes\t: 46 bits physical, 48 bits virtual\nvmx flags\t: vnmi ept_x_only ept_ad\n\nprocessor: 1\n"
    host = Asked(monkeypatch, ["kvm_intel"], cpuinfo=flags)
    # What KVM tells lacks A/D where it does not use them: it counts last.
    host.kvm_msrs[0x48C] = BIT[0]
    facts = host_facts()
    assert (facts.ept_vpid_cap, facts.maxphyaddr) == (BIT[0] | BIT[21], 46)
    assert facts.source("ept_vpid_cap").startswith("vmx flags")
    host.files["/proc/cpuinfo"] = flags.replace("vmx flags", "flags")
    assert host_facts().ept_vpid_cap == BIT[0]
    assert "KVM_GET_MSRS" in host_facts().source("ept_vpid_cap")
    host.kvm_msrs[0x48C] = 0  # KVM without "nested"
    assert host_facts().ept_vpid_cap is None
    host.files["/proc/cpuinfo"] = flags
    host.msrs[0x48C] = EPT_VPID_CAP
    assert host_facts().ept_vpid_cap == EPT_VPID_CAP
    assert "/dev/cpu/0/msr" in host_facts().source("ept_vpid_cap")
    host.cpuid[0x80000000] = (0x80000008, 0, 0, 0)
    host.cpuid[0x80000008] = (0x3034, 0, 0, 0)
    assert (host_facts().maxphyaddr, host_facts().x86_phys_bits) == (52, 46)
    host.files["/proc/cpuinfo"] = ""
    host.msrs.clear()
    host.kvm_msrs.clear()
    assert host_facts().ept_vpid_cap is None
    # Nothing of another vendor's is asked for.
    Asked(monkeypatch, ["kvm_pvm"], cpuinfo=flags)
    assert host_facts().ept_vpid_cap is None


def test_where_the_width_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Asked(monkeypatch, ["kvm_intel"], cpuinfo="address sizes\t: 46 bits physical, 48 bits virtual\nbugs\t: \n")
    host.kvm_msrs[0x48C] = EPT_VPID_CAP
    host.kvm_width = 52
    # Without EPT a guest has the kernel's width: it tells nothing.
    host.parameters = with_parameters(INTEL, ept="N", eptad="N")
    assert (host_facts().maxphyaddr, host_masks().masks.me_mask) == (46, 0)
    assert host_masks().notes == ("CPUID can't be read: no bits of address taken for those of encryption",)
    host.parameters = INTEL
    assert (host_facts().maxphyaddr, host_masks().masks.me_mask) == (52, sum(BIT[46:52]))
    assert "KVM_GET_SUPPORTED_CPUID" in host_facts().source("maxphyaddr")
    assert host_masks().notes == ()
    host.cpuid[0x80000000] = (0x80000008, 0, 0, 0)
    host.cpuid[0x80000008] = (0x302E, 0, 0, 0)
    assert host_facts().maxphyaddr == 46


def test_where_encryption_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = "address sizes\t: 43 bits physical, 48 bits virtual\n"
    host = Asked(monkeypatch, ["kvm_amd"], cpuinfo=sizes)

    def told() -> tuple[bool | None, bool | None, int | None]:
        facts = host_facts()
        return facts.memory_encryption, facts.sme, facts.encryption_bit

    assert told() == (None, None, None)
    assert any("SYSCFG is not shown" in note for note in host_masks().notes)
    # The kernel clears the flags sme and sev where SYSCFG has encryption off, and sme where it does not use it
    # (arch/x86/kernel/cpu/amd.c early_detect_mem_encrypt @v6.18, the same in 6.1).
    for flags, on, sme in (("fpu sme sev", True, True), ("fpu sev", True, False), ("fpu", None, False)):
        host.files["/proc/cpuinfo"] = f"{sizes}flags\t: {flags}\n"
        assert told() == (on, sme, None)
    host.cpuid[0x80000000] = (0x8000001E, 0, 0, 0)
    assert told() == (False, False, None)
    assert "has no leaf 0x8000001f" in host_facts().source("sme")
    host.cpuid[0x80000000] = (0x8000001F, 0, 0, 0)
    host.cpuid[0x80000008] = (0x3030, 0, 0, 0)
    host.cpuid[0x8000001F] = (0xF, 0x16F, 0, 0)  # EBX: 5 bits less (11:6), bit 47 (5:0)
    host.msrs[0xC0010010] = BIT[23]
    facts = host_facts()
    assert (facts.maxphyaddr, facts.encryption_bit, facts.memory_encryption, facts.sme) == (48, 47, True, False)
    host.files["/proc/cpuinfo"] = f"{sizes}flags\t: fpu sme\n"
    assert told() == (True, True, 47)
    assert host_masks().masks.me_value == BIT[47]
    host.msrs[0xC0010010] = ~BIT[23] & (1 << 64) - 1
    assert host_facts().memory_encryption is False


# -- the checks -----------------------------------------------------------------------------------------------------


def only(name: str) -> CheckResult:
    need("kvm", "root", "tracefs")
    (result,) = run([name], cases=1)
    if result.skipped:
        pytest.skip(result.lacking[0])
    return result


def test_the_kernels_sptes_agree() -> None:
    result = only("masks")
    assert result.mismatches == 0, result.examples
    assert result.compared >= 15
    assert any("manual only" in text for text in result.lacking)


@pytest.mark.parametrize(
    ("facts", "unseen"),
    [
        (XEON, ["shadow paging", "NPT"]),
        (EPYC, ["EPT"]),
        (HostFacts("6.18.0", "kvm_pvm", (), 46, 46, l1tf=False), ["NPT", "EPT"]),
    ],
)
def test_what_a_host_cannot_show_is_said(facts: HostFacts, unseen: list[str]) -> None:
    texts = check_masks._manual_only(host_masks(facts))
    assert [text.partition("masks of ")[2] for text in texts if "masks of " in text][: len(unseen)] == unseen
    assert all(text.startswith("manual only: ") for text in texts)
    assert any("MMIO SPTEs" in text for text in texts) == (not host_masks(facts).masks.enable_mmio_caching)


def test_the_rules_are_those_of_this_kernel() -> None:
    need("btf")
    result = only("masks_rules")
    assert result.mismatches == 0, result.examples
    assert result.compared >= len(check_masks.FUNCTIONS)


@pytest.mark.parametrize(
    "changed",
    [
        {"user_mask": 0},
        {"accessed_mask": BIT[6]},
        {"dirty_mask": BIT[5]},
        {"nx_mask": BIT[62]},
        {"host_writable_mask": BIT[8]},
        {"mmu_writable_mask": BIT[8]},
        {"present_mask": 0},
        {"enable_mmio_caching": None},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_wrong_mask_is_seen(changed: dict[str, int | None], monkeypatch: pytest.MonkeyPatch) -> None:
    need("kvm", "root", "tracefs")
    real = host_masks()
    if real.masks.kind != "shadow":
        pytest.skip("the masks to be changed are those of shadow paging")
    if changed == {"enable_mmio_caching": None}:
        changed = {"enable_mmio_caching": not real.masks.enable_mmio_caching}
    wrong = HostMasks(real.masks.replace(**changed), real.facts, real.sources, real.notes)
    monkeypatch.setattr(check_masks, "host_masks", lambda: wrong)
    assert only("masks").mismatches > 0


def test_the_rules_of_another_kernel_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    need("btf")
    real = host_masks()
    if real.masks.version != "6.18":
        pytest.skip("the kernel is another one")
    for version in ("6.9", "6.12"):
        wrong = HostMasks(real.masks.replace(version=version), real.facts, real.sources, real.notes)
        monkeypatch.setattr(check_masks, "host_masks", lambda wrong=wrong: wrong)
        assert only("masks_rules").mismatches > 0
