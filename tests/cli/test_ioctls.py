"""`hvmodel ioctls`: the rows of native/kvm_ioctl.tbl, all of them."""

from __future__ import annotations

from tests.cli.command import ROOT, hvmodel, object_of

ROWS = [
    line.split()
    for line in (ROOT / "native" / "kvm_ioctl.tbl").read_text().splitlines()
    if line.split() and not line.lstrip().startswith("#")
]


def test_json_has_every_row() -> None:
    done = hvmodel("ioctls", "--json")
    rows = object_of(done)
    assert done.returncode == 0
    assert done.stderr == b""
    assert set(rows[0]) == {"name", "nr", "request", "scope", "argument", "returns", "capability", "section"}
    # The table's columns: nr dir scope name argument returns capability section.
    assert sorted((row["name"], row["nr"], ",".join(row["scope"])) for row in rows) == sorted(
        (words[3], int(words[0], 16), words[2]) for words in ROWS
    )
    requests = {row["name"]: row["request"] for row in rows}
    # asm-generic/ioctl.h by hand: _IO(0xAE, 0x80); _IOR(0xAE, 0x81, 144 bytes) with 2 in bits 30 and 31.
    assert requests["KVM_RUN"] == 0xAE80
    assert requests["KVM_GET_REGS"] == 2 << 30 | 144 << 16 | 0xAE81


def test_a_pipe_gets_plain_columns() -> None:
    done = hvmodel("ioctls")
    lines = done.stdout.decode().splitlines()
    assert lines[0].split() == ["NR", "NAME", "REQUEST", "SCOPE", "ARGUMENT", "RETURNS", "CAPABILITY", "SECTION"]
    found = [line.split() for line in lines[1:]]
    assert {len(words) for words in found} == {8}
    assert sorted(words[1] for words in found) == sorted(words[3] for words in ROWS)
    run = next(words for words in found if words[1] == "KVM_RUN")
    assert run[:4] == ["0x80", "KVM_RUN", "0x0000ae80", "vcpu"]
