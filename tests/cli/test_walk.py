"""`hvmodel walk`: walks of an image, as the Walker's own, with every refusal in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hvmodel.arch.paging import PageTables
from hvmodel.mmu import Walker, decode_pfec
from tests.cli.command import hvmodel, is_one_sentence

GVA, GPA = 0x40_0000, 0x9000


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 4 levels at 0x1000: a user page at GVA, a supervisor's 2 MiB page at 0x600000.
    tables = PageTables(0x1000)
    tables.map(GVA, GPA, 0x1000, user=True, writable=False)
    tables.map(0x60_0000, 0x20_0000, 0x20_0000, page_size=0x20_0000)
    path = tmp_path_factory.mktemp("walk") / "image"
    path.write_bytes(bytes(0x1000) + tables.image())
    return path


def test_text_is_the_walkers(image: Path) -> None:
    walker = Walker(image.read_bytes(), cr3=0x1000)
    done = hvmodel("walk", "--cr3", "0x1000", image, hex(GVA + 0x123), 0x60_0000)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == f"{walker.walk(GVA + 0x123)}\n{walker.walk(0x60_0000)}\n"


def test_json_has_every_entry(image: Path) -> None:
    done = hvmodel("walk", "--cr3", "0x1000", "--json", image, hex(GVA + 0x123), "0x500000")
    assert done.returncode == 1  # the second faults
    there, nowhere = json.loads(done.stdout)
    assert (there["gpa"], there["level"], there["page_size"], there["error_code"]) == (GPA + 0x123, 1, 4096, None)
    # 0x400000: indices 0, 0, 2, 0, and the tables follow each other from 0x1000 on
    assert [(entry["level"], entry["gpa"]) for entry in there["entries"]] == [
        (4, 0x1000),
        (3, 0x2000),
        (2, 0x3010),
        (1, 0x4000),
    ]
    assert [update["accessed"] for update in there["updates"]] == [True] * 4
    assert (nowhere["gpa"], nowhere["error_code"], nowhere["updates"]) == (None, 0, [])


@pytest.mark.parametrize(
    ("options", "gva", "code"),
    [
        (("-w",), GVA, 3),  # read-only, CR0.WP
        (("-w", "-u"), GVA, 7),
        (("-u",), 0x60_0000, 5),  # the supervisor's
        (("-x", "-u"), 0x60_0000, 0x15),
        (("-w", "--cr0", "0x80000001"), GVA, None),  # without WP
    ],
)
def test_accesses_and_registers(image: Path, options: tuple[str, ...], gva: int, code: int | None) -> None:
    done = hvmodel("walk", "--cr3", "0x1000", *options, image, hex(gva))
    assert done.returncode == (0 if code is None else 1)
    if code is not None:
        assert str(decode_pfec(code)) in done.stdout.decode()
    (walk,) = json.loads(hvmodel("walk", "--cr3", "0x1000", *options, "--json", image, hex(gva)).stdout)
    assert walk["error_code"] == code


def test_stdin_and_where_the_image_begins(image: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.write_bytes(image.read_bytes()[0x1000:])
    done = hvmodel("walk", "--cr3", "0x1000", "--at", "0x1000", moved, input=b"0x400000 # the page\n6291456\n")
    assert done.stdout == hvmodel("walk", "--cr3", "0x1000", image, "0x400000", "0x600000").stdout
    assert done.returncode == 0


def test_ept(tmp_path: Path) -> None:
    # One entry each at indices 0, 0, 0, 5: gpa 0x5000 -> 0x7000; read and write, WB.
    words = {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007, 0x4028: 0x7033}
    memory = bytearray(0x5000)
    for at, word in words.items():
        memory[at : at + 8] = word.to_bytes(8, "little")
    image = tmp_path / "ept"
    image.write_bytes(memory)
    (walk,) = json.loads(hvmodel("walk", "--eptp", "0x105e", "--json", image, "0x5678").stdout)
    assert (walk["gpa"], walk["exit_qualification"]) == (0x7678, None)
    done = hvmodel("walk", "--eptp", "0x105e", "--json", "-x", image, "0x5678")
    (walk,) = json.loads(done.stdout)
    # a fetch (bit 2) of what may be read and written (4:3), with a linear address (7)
    assert done.returncode == 1
    assert walk["exit_qualification"] & 0xBF == 1 << 2 | 3 << 3 | 1 << 7


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("IMAGE", "1"), "--cr3"),
        (("--cr3", "0x1000", "--eptp", "0x105e", "IMAGE", "1"), "--eptp"),
        (("--cr3", "x", "IMAGE", "1"), "--cr3"),
        (("--cr3", "0x100000", "IMAGE", "1"), "0x100000"),
        (("--cr3", "0x1000", "--at", "0x2000", "IMAGE", "1"), "--cr3"),
        (("--cr3", "0x1000", "--cr0", "0x80000000", "IMAGE", "1"), "cr0"),
        (("--cr3", "0x1000", "--phys-bits", "60", "IMAGE", "1"), "maxphyaddr"),
        (("--cr3", "0x1000", "IMAGE", "word"), "word"),
        (("--cr3", "0x1000", "IMAGE", "0x10000000000000000"), "gva"),
        (("--cr3", "0x1000", "-w", "-x", "IMAGE", "1"), "not both"),
        (("--eptp", "0x105e", "--cr0", "1", "IMAGE", "1"), "--cr0"),
        (("--eptp", "0x1000", "IMAGE", "1"), "eptp"),
        (("--cr3", "0x1000", "/nowhere", "1"), "/nowhere"),
        (("--cr3", "0x1000", "/dev/null", "1"), "/dev/null"),
        (("--cr3", "0x1000", "/tmp", "1"), "/tmp"),
    ],
)
def test_bad_input_is_one_sentence_that_names_it(image: Path, arguments: tuple[str, ...], word: str) -> None:
    done = hvmodel("walk", *(image if one == "IMAGE" else one for one in arguments))
    assert done.returncode == 2, done
    assert done.stdout == b""
    assert is_one_sentence(done.stderr)
    assert word in done.stderr.decode()


def test_a_short_image_ends_a_walk_as_missing_memory_does(image: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(image.read_bytes()[:0x3000])
    done = hvmodel("walk", "--cr3", "0x1000", "--json", short, hex(GVA))
    (walk,) = json.loads(done.stdout)
    assert done.returncode == 1
    assert (walk["gpa"], walk["missing"], len(walk["entries"])) == (None, 0x3010, 2)
