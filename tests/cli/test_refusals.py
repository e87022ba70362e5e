"""Every way to ask `hvmodel boot` wrongly, and a host without KVM: one sentence, a status, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import hvmodel, in_namespace, is_one_sentence
from tests.need import need

HALT = b"\xf4"  # hlt
KILOBYTE = b"\x90" * 1024

# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nothing",), "cannot read nothing: No such file"),
        (("directory",), "cannot read directory: Is a directory"),
        (("empty",), "empty is empty"),
        (("image", "--ram", "4K", "--at", "0xD00"), "image has 1024 bytes, RAM of 0x1000 bytes has room from 0xd00 on"),
        (("/dev/zero", "--ram", "64K"), "/dev/zero has more than 33792 bytes"),
        (("/proc/self/mem",), "cannot read /proc/self/mem"),
        (("image/below",), "Not a directory"),
        (("x" * 5000,), "File name too long"),
        (("image", "--at", "0x1000000"), "real mode reaches 0 to 0x10ffef"),
        (("image", "--at", "0x10FFF0"), "real mode reaches"),
        (("image", "--at", "0xFFFFFFFFFFFFFFFF"), "real mode reaches"),
        (("image", "--at=-1"), "real mode reaches"),
        (("image", "--at", "0x8000", "--ram", "32K"), "outside the RAM, which ends at 0x8000"),
        (("image", "--at", "here"), "accepted: a number such as 0x7C00"),
        (("--ram", "0"), "--ram"),
        (("--ram", "-4096"), "--ram"),
        (("--ram", "4097"), "4096"),
        (("--ram", "1000000T"), "this host has"),
        (("--ram", "much"), "--ram"),
        (("--timeout", "nan"), "accepted: 0 to 1e9 seconds"),
        (("--timeout", "-1"), "accepted: 0 to 1e9 seconds"),
        (("--timeout", "soon"), "accepted: 0 to 1e9 seconds"),
        (("--unclaimed", "sometimes"), "open_bus"),
        (("--bios",), "--bios needs a FILE"),
        (("--bios", "image", "--at", "0"), "--at has no meaning"),
        (("--bios", "image"), "a multiple of 64 KiB"),
        (("--bios", "nothing"), "cannot read nothing"),
        (("--bios", "firmware", "--ram", "64K"), "not in RAM"),
        (("--bios", "/dev/zero"), "firmware has up to"),
        (("image", "more"), "more"),
        (("--what",), "--what"),
    ],
)
def test_bad_input_is_a_sentence(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    (tmp_path / "image").write_bytes(KILOBYTE)
    (tmp_path / "firmware").write_bytes(bytes(64 << 10))
    (tmp_path / "empty").touch()
    (tmp_path / "directory").mkdir()
    if "--bios" in arguments:
        need("kvm")  # firmware is judged by the machine
    done = hvmodel("boot", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    assert is_one_sentence(done.stderr), done.stderr
    assert words in done.stderr.decode()


def test_empty_stdin_is_a_sentence() -> None:
    done = hvmodel("boot", "-")
    assert done.returncode == 2
    assert is_one_sentence(done.stderr)
    assert b"stdin is empty" in done.stderr


def test_an_unreadable_file_is_a_sentence(tmp_path: Path) -> None:
    need("root")  # who gives up the right to read everything
    (tmp_path / "image").write_bytes(HALT)
    (tmp_path / "image").chmod(0)
    script = 'exec setpriv --inh-caps=-all --bounding-set=-all "$@"'
    done = in_namespace(script, "boot", tmp_path / "image")
    assert done.returncode == 2
    assert is_one_sentence(done.stderr)
    assert b"Permission denied" in done.stderr


def test_a_sparse_image_is_not_read_before_it_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "image").open("wb") as file:
        file.truncate(1 << 40)
    done = hvmodel("boot", tmp_path / "image")
    assert done.returncode == 2
    assert is_one_sentence(done.stderr)


@pytest.mark.parametrize("command", [("nonsense",), ("boot", "--what"), ("ioctls", "more")])
def test_usage_errors(command: tuple[str, ...]) -> None:
    done = hvmodel(*command)
    assert done.returncode == 2
    assert is_one_sentence(done.stderr)


# ---- no KVM ----

MISSING = 'mount -t tmpfs none /dev && exec "$@"'
FORBIDDEN = (
    "mount -t tmpfs none /dev && mknod -m 000 /dev/kvm c 10 232 && "
    'exec setpriv --inh-caps=-all --bounding-set=-all "$@"'
)
NOT_KVM = 'mount -t tmpfs none /dev && mknod /dev/kvm c 1 3 && exec "$@"'
FILE = 'mount -t tmpfs none /dev && echo KVM >/dev/kvm && exec "$@"'


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (MISSING, "No such file"),
        (FORBIDDEN, "no permission"),
        (NOT_KVM, "not a KVM device"),
        (FILE, "not a KVM device"),
    ],
    ids=["missing", "forbidden", "another device", "a file"],
)
def test_no_kvm_is_a_sentence(script: str, words: str) -> None:
    done = in_namespace(script, "boot")
    assert (done.returncode, done.stdout) == (8, b"")
    assert is_one_sentence(done.stderr)
    assert words in done.stderr.decode()


def test_bad_input_comes_before_no_kvm() -> None:
    assert in_namespace(MISSING, "boot", "--at", "-1").returncode == 2
