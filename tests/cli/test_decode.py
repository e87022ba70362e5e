"""`hvmodel decode`: the same words as the models', from the command line and from stdin, as text, table and JSON."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from hvmodel.mmu import (
    EptControls,
    decode_cpu_role,
    decode_ept_entry,
    decode_role,
    decode_spte,
    reset_all_pte_masks,
)
from tests.cli.command import COMMAND, ENVIRONMENT, hvmodel, is_one_sentence, object_of


def test_one_value_is_a_table_and_many_are_lines() -> None:
    one = hvmodel("decode", "role", "0x1783")
    assert (one.returncode, one.stdout.decode(), one.stderr) == (0, decode_role(0x1783).table() + "\n", b"")
    many = hvmodel("decode", "role", "0x1783", "14084")
    assert many.stdout.decode() == f"{decode_role(0x1783)}\n{decode_role(0x3704)}\n"
    tables = hvmodel("decode", "role", "0x1783", "0x3704", "--table").stdout.decode()
    assert tables == f"{decode_role(0x1783).table()}\n\n{decode_role(0x3704).table()}\n"
    assert hvmodel("decode", "role", "0x1783", "--lines").stdout.decode() == f"{decode_role(0x1783)}\n"


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_stdin(arguments: tuple[str, ...]) -> None:
    text = b"0x8100003704, 33024 # a comment\n\n  0x0\n"
    done = hvmodel("decode", "cpu-role", *arguments, input=text)
    wanted = [decode_cpu_role(value) for value in (0x81_0000_3704, 33024, 0)]
    assert done.stdout.decode() == "".join(f"{word}\n" for word in wanted)
    assert done.returncode == (1 if any(word.problems for word in wanted) else 0)


def test_words_of_stdin_that_end_between_two_reads() -> None:
    text = b"0x1 # one\n0x\n"[:-2] + b"2,,3\t4\r\n#5 6\n7#8"
    with subprocess.Popen(
        [sys.executable, "-m", "hvmodel", "decode", "pfec", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for byte in text:
            process.stdin.write(bytes([byte]))
            process.stdin.flush()
        process.stdin.close()
        assert [word["value"] for word in json.loads(process.stdout.read())] == [1, 2, 3, 4, 7]


def test_stdin_is_shown_as_it_comes() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "hvmodel", "decode", "pfec"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"0x3\n")
        process.stdin.flush()
        assert process.stdout.readline().endswith(b"W P\n")
        process.stdin.close()
        assert process.wait(60) == 0


# What each kind says of one value, worked out by hand from the layouts.
@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        (("spte", "0x12345e67"), {"address": 0x12345, "host_writable": 1, "mmu_writable": 1, "nx": 0}),
        (("spte", "0x8600000012345b77", "--ept"), {"address": 0x12345, "writable": 1}),
        (("ept", "0x400", "--mbec"), {"xu": 1, "memory_type": 0}),
        (("ept", "0x8000000000000400"), {"suppress_ve": 1, "ignored": 0x400 >> 3}),
        (("ept", "0x2000b7", "--level", "2"), {"page_size": 1, "memory_type": 6, "address": 1}),
        (("eptp", "0x105e"), {"walk_length_minus_1": 3, "ad": 1, "address": 1}),
        (("role", "0x3704"), {"level": 4, "access": 7, "efer_nx": 1, "cr0_wp": 1}),
        (("pfec", "0x15"), {"P": 1, "U": 1, "F": 1, "W": 0}),
        (("exit-reason", "48"), {"basic": 48}),
        (("qualification", "--reason", "30", "0x3f80008"), {"port": 0x3F8, "in": 1}),
        (("qualification", "--reason", "EPT_VIOLATION", "0x182"), {"write": 1, "final": 1}),
        (("qualification", "--reason", "0", "--vector", "1", "0x4000"), {"BS": 1}),
        (("vmx-ept-cap", "0x4041"), {"wb": 1, "walk_4": 1, "exec_only": 1, "ad": 0}),
    ],
)
def test_every_kind_as_json(arguments: tuple[str, ...], fields: dict[str, int]) -> None:
    done = hvmodel("decode", *arguments, "--json")
    assert done.stderr == b""
    (word,) = json.loads(done.stdout)
    values = {field["name"]: field["value"] for field in word["fields"]}
    assert {name: values[name] for name in fields} == fields


def test_options_reach_the_model() -> None:
    masks = reset_all_pte_masks(40, version="6.12").set_ept_masks(has_ad_bits=False, has_exec_only=False)
    done = hvmodel(
        "decode",
        "spte",
        "--ept",
        "--no-ad",
        "--no-exec-only",
        "--kernel",
        "6.12",
        "--phys-bits",
        40,
        "--level",
        2,
        0x807,
    )
    assert done.stdout.decode() == decode_spte(0x807, masks, 2).table() + "\n"
    done = hvmodel("decode", "ept", "--no-exec-only", "--lines", 4, 7)
    controls = EptControls(maxphyaddr=52, exec_only=False)
    assert done.stdout.decode() == f"{decode_ept_entry(4, 1, controls)}\n{decode_ept_entry(7, 1, controls)}\n"


def test_a_problem_is_status_1_and_printed() -> None:
    done = hvmodel("decode", "eptp", "0x105f")
    assert done.returncode == 1
    assert b"problem: memory_type" in done.stdout
    assert done.stderr == b""
    # As JSON too: one line, with the problem in it
    done = hvmodel("decode", "eptp", "0x105f", "0x105e", "--json")
    assert (done.returncode, done.stderr) == (1, b"")
    assert [bool(word["problems"]) for word in object_of(done)] == [True, False]
    # What VM entry refuses: 4 levels without bit 6 of the capability; an address above MAXPHYADDR
    assert b"bit 6 of IA32_VMX_EPT_VPID_CAP" in hvmodel("decode", "eptp", "0x105e", "--cap", "0x204000").stdout
    assert b"above MAXPHYADDR 40" in hvmodel("decode", "eptp", hex(1 << 41 | 0x105E), "--phys-bits", 40).stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("role", "xyz"), "xyz"),
        (("role", "0x"), "0x"),
        (("role", "0x100000000"), "word"),
        (("role", "-5"), "-5"),
        (("role", "--", "-5"), "-5"),
        (("role", "--json", "--", "-5"), "-5"),
        (("role", "\u0663"), "\u0663"),
        (("role", "1e3"), "decode role: VALUE"),
        (("ept", "1", "--ad"), "--ad"),
        (("ept", "1", "--phys-bits", "99"), "phys_bits|maxphyaddr"),
        (("spte", "1", "--no-exec-only"), "--ept"),
        (("spte", "1", "--npt", "--ad"), "--ept"),
        (("qualification", "1", "--reason", "48", "--vector", "1"), "vector"),
        (("eptp", "1", "--cap", str(1 << 64)), "capability"),
        (("spte", "1", "--level", "6"), "level"),
        (("spte", "1", "--kernel", "2.4"), "version"),
        (("spte", "1", "--phys-bits", "60"), "phys_bits"),
        (("role", "1", "--level", "1"), "--level"),
        (("qualification", "1"), "--reason"),
        (("qualification", "1", "--reason", "NOTHING"), "NOTHING"),
        (("qualification", "1", "--reason", "35"), "reason"),
        (("qualification", "1", "--reason", "0", "--vector", "40"), "vector"),
        (("eptp", "1", "--cap", "x"), "--cap"),
        (("nothing", "1"), "nothing"),
        (("pfec", "9" * 5000), "VALUE"),
    ],
)
def test_bad_input_is_one_sentence_that_names_it(arguments: tuple[str, ...], word: str) -> None:
    done = hvmodel("decode", *arguments)
    assert done.returncode == 2
    assert done.stdout == b""
    assert is_one_sentence(done.stderr)
    assert any(one in done.stderr.decode() for one in word.split("|"))


def test_what_comes_before_bad_input_is_kept() -> None:
    done = hvmodel("decode", "pfec", input=b"1 2\n3 x 4\n")
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 3
    assert is_one_sentence(done.stderr)
    assert hvmodel("decode", "pfec", input=b"\xff\xfe").returncode == 2
    # JSON stays JSON, and ends before what is wrong
    done = hvmodel("decode", "pfec", "--json", input=b"1 2\n3 x 4\n")
    assert done.returncode == 2
    assert [word["value"] for word in object_of(done)] == [1, 2, 3]
    assert is_one_sentence(done.stderr)


def test_stdin_that_is_empty_not_for_reading_or_closed() -> None:
    assert (hvmodel("decode", "role").stdout, object_of(hvmodel("decode", "role", "--json"))) == (b"", [])
    for redirection, status in (("0> /dev/null", 2), ("<&-", 0)):
        script = f'exec "$@" {redirection}'
        words = ["sh", "-c", script, "sh", *COMMAND, "decode", "role"]
        done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, check=False, timeout=60)
        assert (done.returncode, done.stdout) == (status, b"")
        assert is_one_sentence(done.stderr) == (status == 2), done.stderr


def test_input_without_an_end_takes_no_memory() -> None:
    # 1 GiB of address space is not enough for what /dev/zero or "yes" would give.
    limit = 'ulimit -v 1048576; exec "$@"'
    words = ["sh", "-c", limit + " < /dev/zero", "sh", *COMMAND, "decode", "role"]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, b"")
    assert is_one_sentence(done.stderr)


@pytest.mark.parametrize("options", [(), ("--json",), ("--table",)])
def test_a_reader_that_goes_away_ends_it_by_sigpipe(options: tuple[str, ...]) -> None:
    # The writer goes on for ever: the command ends only because nobody reads.
    with subprocess.Popen(["yes", "0x3"], stdout=subprocess.PIPE) as source:
        with subprocess.Popen(
            [*COMMAND, "decode", "pfec", *options],
            stdin=source.stdout,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
        ) as process:
            assert source.stdout is not None
            source.stdout.close()
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.read(10)
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(60) == -signal.SIGPIPE
        source.wait(60)


def test_needs_no_extension() -> None:
    code = (
        "import sys; sys.modules['hvmodel._native'] = None\n"
        "from hvmodel.cli import main\n"
        "sys.exit(main(['decode', 'role', '0x1783']))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == decode_role(0x1783).table() + "\n"
