"""`hvmodel info`: what it says is what the kernel says, also where it says no."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvmodel.cli.info import MODES
from tests.cli.command import hvmodel, in_namespace, object_of
from tests.need import need

KEYS = {
    "version",
    "python",
    "kernel",
    "cpus",
    "device",
    "usable",
    "problem",
    "module",
    "parameters",
    "meaning",
    "api_version",
    "limits",
    "emulated",
    "capabilities",
    "advice",
}


def test_json_is_what_the_kernel_says() -> None:
    need("kvm")
    from hvmodel.kvm import Cap, Kvm

    done = hvmodel("info", "--json")
    found = object_of(done)
    assert (done.returncode, done.stderr, set(found)) == (0, b"", KEYS)
    assert (found["usable"], found["problem"], found["api_version"]) == (True, None, 12)
    with Kvm() as kvm:
        assert found["capabilities"] == {name: kvm.check_extension(Cap[name]) for name in found["capabilities"]}
        assert found["limits"]["vcpu_mmap_size"] == kvm.vcpu_mmap_size
    # Every no has its advice, and nothing else has.
    assert set(found["advice"]) == {name for name, value in found["capabilities"].items() if not value}
    assert all(found["advice"].values())


def test_capabilities_that_every_kvm_on_x86_has_are_asked() -> None:
    need("kvm")
    # linux:Documentation/virt/kvm/api.rst, 4.4: "Basic" capabilities, and those of x86 since 2.6.
    capabilities = object_of(hvmodel("info", "--json"))["capabilities"]
    assert all(capabilities[name] > 0 for name in ("USER_MEMORY", "IRQCHIP", "EXT_CPUID", "MP_STATE", "NR_MEMSLOTS"))
    assert not any(name.startswith(("S390", "PPC", "ARM", "MIPS", "RISCV")) for name in capabilities)


def test_which_modes_are_emulated() -> None:
    need("kvm")
    found = object_of(hvmodel("info", "--json"))
    if not found["capabilities"]["BINARY_STATS_FD"]:
        assert found["emulated"] == {}
        return
    real, _, user = (found["emulated"][mode] for mode in MODES)
    # User code in long mode runs on the processor with every vendor module there is.
    assert user is False
    if found["module"] == "kvm_pvm":
        assert real is True
    if found["parameters"].get("unrestricted_guest") == "Y" or found["parameters"].get("npt") in ("Y", "1"):
        assert real is False
    assert f"{MODES[2]}: runs on the processor" in found["meaning"]


def test_the_module_is_one_of_the_kernels() -> None:
    found = object_of(hvmodel("info", "--json"))
    modules = [path.name for path in Path("/sys/module").glob("kvm_*")]
    assert found["module"] in modules if modules else found["module"] is None
    for name, value in found["parameters"].items():
        assert Path(f"/sys/module/{found['module']}/parameters/{name}").read_text().strip() == value


def test_text() -> None:
    need("kvm")
    done = hvmodel("info")
    lines = done.stdout.decode().splitlines()
    assert (done.returncode, done.stderr) == (0, b"")
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    found = object_of(hvmodel("info", "--json"))
    assert rows["/dev/kvm"] == ["KVM", "API", "12"]
    for name, value in found["capabilities"].items():
        # A capability that is a limit too stands in both lists; the last is the capabilities'.
        assert rows[name][0] == (str(value) if value else "no")
        assert " ".join(rows[name][1:]) == found["advice"].get(name, "-"), name


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('mount -t tmpfs none /dev && exec "$@"', "No such file"),
        (
            "mount -t tmpfs none /dev && mknod -m 000 /dev/kvm c 10 232 && "
            'exec setpriv --inh-caps=-all --bounding-set=-all "$@"',
            "chgrp kvm /dev/kvm",
        ),
        (
            "mount -t tmpfs none /dev && mknod -m 660 /dev/kvm c 10 232 && chown 1:1 /dev/kvm && "
            'exec setpriv --inh-caps=-all --bounding-set=-all --regid 2 --clear-groups "$@"',
            "join group daemon",
        ),
    ],
    ids=["missing", "nobody's", "a group's"],
)
def test_without_kvm_it_says_what_to_do(script: str, words: str) -> None:
    done = in_namespace(script, "info")
    assert (done.returncode, done.stderr) == (8, b"")
    assert words in done.stdout.decode()
    assert "cannot be used" in done.stdout.decode()
    done = in_namespace(script, "info", "--json")
    found = object_of(done)
    assert (done.returncode, found["usable"], found["capabilities"]) == (8, False, {})
    assert words in found["problem"]
