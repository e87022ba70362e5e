"""`hvmodel masks`: this host's masks and where each is from; those of a KVM that is told; what it does without KVM."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hvmodel.cli.masks import Found, show
from hvmodel.witness import HostFacts, host_masks
from tests.cli.command import ENVIRONMENT, hvmodel, in_namespace, is_one_sentence, object_of

MASKS = {
    "user_mask",
    "accessed_mask",
    "dirty_mask",
    "nx_mask",
    "x_mask",
    "present_mask",
    "acc_track_mask",
    "me_value",
    "me_mask",
    "host_writable_mask",
    "mmu_writable_mask",
    "mmio_value",
    "mmio_mask",
    "mmio_access_mask",
    "memtype_mask",
    "nonpresent_or_rsvd_mask",
    "nonpresent_or_rsvd_lower_gfn_mask",
    "nonpresent_value",
}


def vendor() -> str:
    found = sorted(path.name for path in Path("/sys/module").glob("kvm_*"))
    if not found:
        pytest.skip("no vendor module of KVM")
    return found[0]


def test_this_host() -> None:
    module = vendor()
    found = object_of(hvmodel("masks", "--json"))
    assert (found["host"], found["vendor"], found["kernel"]) == (True, module, os.uname().release)
    assert set(found["masks"]) >= MASKS
    assert set(found["sources"]) >= MASKS
    assert all(found["sources"].values())
    # What the host itself says, read here by other means
    width = re.search(r"address sizes\s*: (\d+) bits physical", Path("/proc/cpuinfo").read_text(encoding="ascii"))
    assert width is not None
    assert found["masks"]["x86_phys_bits"] == int(width[1])
    caching = Path("/sys/module/kvm/parameters/mmio_caching").read_text(encoding="ascii").strip()
    assert found["masks"]["enable_mmio_caching"] == (caching == "Y")
    ept = Path("/sys/module/kvm_intel/parameters/ept")
    has_ept = ept.exists() and ept.read_text(encoding="ascii").strip() == "Y"
    # kvm_mmu_set_ept_masks and kvm_mmu_reset_all_pte_masks, arch/x86/kvm/mmu/spte.c@v6.18
    assert found["masks"]["user_mask"] == (1 if has_ept else 4)
    assert found["masks"]["nx_mask"] == (0 if has_ept else 1 << 63)


def test_text_says_where_each_is_from() -> None:
    vendor()
    found = object_of(hvmodel("masks", "--json"))
    done = hvmodel("masks")
    assert (done.returncode, done.stderr) == (0, b"")
    head, *rows = done.stdout.decode().splitlines()
    assert head.split() == ["MASK", "VALUE", "BITS", "FROM"]
    lines = {row.split()[0]: row for row in rows}
    for name in MASKS:
        assert f"{found['masks'][name]:#018x}" in lines[name]
        assert lines[name].endswith(found["sources"][name])
    for text in found["notes"]:
        assert f"note: {text}" in rows


def test_notes_and_warnings_are_below_the_table(capfd: pytest.CaptureFixture[str]) -> None:
    # A kernel that is not known, a cache that leaves L1TF's mask no room: 47 bits of 52 (spte.c, a WARN of the kernel).
    facts = HostFacts("7.2.0", "kvm_intel", (("kvm_intel.ept", "Y"),), 47, 47, 6, 0x55, True)
    host = host_masks(facts)
    assert (len(host.notes), len(host.masks.warnings)) == (4, 1)
    assert show(Found(host.masks, host), as_json=False) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-5:] == [*(f"note: {text}" for text in host.notes), f"warning: {host.masks.warnings[0]}"]
    assert show(Found(host.masks, host), as_json=True) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["notes"], found["warnings"]) == ([*host.notes], [*host.masks.warnings])


# arch/x86/kvm/mmu/spte.c@v6.18, kvm_mmu_reset_all_pte_masks and kvm_mmu_set_ept_masks.
@pytest.mark.parametrize(
    ("options", "values"),
    [
        (("--npt",), {"kind": "npt", "user_mask": 1 << 2, "nx_mask": 1 << 63, "mmio_value": 1 << 51 | 1}),
        (("--phys-bits", "52"), {"kind": "shadow", "mmio_value": 0, "enable_mmio_caching": False}),
        (("--ept",), {"kind": "ept", "user_mask": 1, "x_mask": 4, "present_mask": 1 << 63, "mmio_value": 6}),
        (("--ept", "--no-exec-only"), {"present_mask": 1 << 63 | 1}),
        (("--ept", "--no-ad"), {"kvm_ad_enabled": False, "accessed_mask": 1 << 8, "dirty_mask": 1 << 9}),
        (("--ept", "--no-ad", "--kernel", "6.12"), {"accessed_mask": 0, "dirty_mask": 0}),
        (("--kernel", "6.1"), {"version": "6.1", "nonpresent_value": 0}),
        (("--phys-bits", "40"), {"nonpresent_or_rsvd_lower_gfn_mask": (1 << 40) - (1 << 12)}),
    ],
)
def test_a_kvm_that_is_told(options: tuple[str, ...], values: dict[str, object]) -> None:
    found = object_of(hvmodel("masks", *options, "--json"))
    assert (found["host"], found["vendor"], found["sources"], found["notes"]) == (False, None, {}, [])
    assert {name: found["masks"][name] for name in values} == values
    text = hvmodel("masks", *options).stdout.decode()
    assert text.splitlines()[0].split() == ["MASK", "VALUE", "BITS"]


def test_bits_are_runs() -> None:
    lines = {row.split()[0]: row for row in hvmodel("masks", "--npt").stdout.decode().splitlines()}
    assert lines["mmio_value"].split()[2:] == ["51", "0"]
    assert lines["mmio_access_mask"].split()[2:] == ["2:1"]
    assert lines["nonpresent_or_rsvd_lower_gfn_mask"].split()[2:] == ["45:12"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--phys-bits", "99"), "phys_bits"),
        (("--phys-bits", "x"), "phys-bits"),
        (("--kernel", "2.4"), "version"),
        (("--kernel", "6.99"), "6.1 to 6.18"),
        (("--ad",), "--ept"),
        (("--npt", "--exec-only"), "--ept"),
        (("more",), "more"),
    ],
)
def test_bad_input_is_one_sentence(arguments: tuple[str, ...], word: str) -> None:
    done = hvmodel("masks", *arguments)
    assert (done.returncode, done.stdout) == (2, b"")
    assert is_one_sentence(done.stderr)
    assert word in done.stderr.decode()


def test_without_dev_kvm() -> None:
    # in_namespace: the script's /dev is empty but for null
    module = vendor()
    script = 'mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec "$@"'
    done = in_namespace(script, "masks", "--json")
    assert (done.returncode, done.stderr) == (0, b"")
    found = object_of(done)
    assert found["vendor"] == module
    assert set(found["sources"]) >= MASKS


def test_without_a_vendor_module() -> None:
    done = in_namespace('mount -t tmpfs none /sys/module && exec "$@"', "masks")
    assert (done.returncode, done.stdout) == (8, b"")
    assert is_one_sentence(done.stderr)
    assert b"lacking: no vendor module" in done.stderr
    assert b"--ept" in done.stderr


def without_extension(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    code = (
        "import sys; sys.modules['hvmodel._native'] = None\nfrom hvmodel.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=False, timeout=60)


def test_a_told_kvm_needs_no_extension() -> None:
    done = without_extension("masks", "--ept", "--json")
    assert (done.returncode, done.stderr) == (0, b"")
    assert object_of(done)["masks"]["kind"] == "ept"


def test_this_host_needs_no_extension() -> None:
    module = vendor()
    done = without_extension("masks", "--json")
    assert (done.returncode, done.stderr) == (0, b"")
    assert object_of(done)["vendor"] == module
