"""The parser against sub-buffers made by hand from the layouts in kernel include/linux/ring_buffer.h."""

from __future__ import annotations

import pickle
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmodel.witness.ringbuffer import (
    EventFormat,
    Field,
    FormatError,
    PageLayout,
    Record,
    decoder,
    parse_format,
    parse_header_page,
    parse_subbuffer,
)

HEADER_PAGE = """\
\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;
\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;
\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;
\tfield: char data;\toffset:16;\tsize:4080;\tsigned:0;
"""

LAYOUT = PageLayout(timestamp=0, commit=8, data=16, size=4096)  # 16 + 4080 = 4096

USERSPACE_EXIT = """\
name: kvm_userspace_exit
ID: 42
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:__u32 reason;\toffset:8;\tsize:4;\tsigned:0;
\tfield:int errno;\toffset:12;\tsize:4;\tsigned:1;

print fmt: "reason %s (%d)", REC->errno < 0 ? 1 : 2
"""


def page(*events: bytes, time: int = 1000, commit_flags: int = 0, behind: bytes = b"") -> bytes:
    data = b"".join(events)
    return (struct.pack("<QQ", time, len(data) | commit_flags) + data + behind).ljust(4096, b"\0")


def head(type_len: int, delta: int) -> bytes:
    return struct.pack("<I", type_len | delta << 5)


def test_header_page() -> None:
    assert parse_header_page(HEADER_PAGE) == LAYOUT


def test_header_page_without_data_is_refused() -> None:
    with pytest.raises(FormatError, match="data"):
        parse_header_page(HEADER_PAGE.replace(" data;", " other;"))


def test_small_events() -> None:
    # type_len counts words: 2 -> 8 bytes, 28 -> 112 bytes; times 1000 + 5, + 7.
    parsed = parse_subbuffer(page(head(2, 5), b"A" * 8, head(28, 7), b"B" * 112), LAYOUT)
    assert parsed.events == ((1005, b"A" * 8), (1012, b"B" * 112))
    assert (parsed.timestamp_ns, parsed.missed) == (1000, 0)


def test_large_event() -> None:
    # Over 112 bytes: type_len 0, array[0] counts itself (4) and the data (120); the next event follows.
    large = head(0, 3) + struct.pack("<I", 124) + b"C" * 120
    assert parse_subbuffer(page(large, head(1, 1), b"DDDD"), LAYOUT).events == ((1003, b"C" * 120), (1004, b"DDDD"))


def test_time_extend() -> None:
    # 5 << 27 | 9 = 671088640 + 9; on top of 1000, then 2 more.
    extend = head(30, 9) + struct.pack("<I", 5)
    assert parse_subbuffer(page(extend, head(1, 2), b"EEEE"), LAYOUT).events == ((671089651, b"EEEE"),)


def test_time_stamp_is_absolute() -> None:
    # 1 << 27 | 3 = 134217731.
    stamp = head(31, 3) + struct.pack("<I", 1)
    assert parse_subbuffer(page(stamp, head(1, 2), b"FFFF"), LAYOUT).events == ((134217733, b"FFFF"),)


def test_time_stamp_takes_its_top_bits_from_the_time_so_far() -> None:
    # 59 bits are stored; the time so far has bit 60, 1 << 60.
    stamp = head(31, 3) + struct.pack("<I", 1)
    parsed = parse_subbuffer(page(stamp, head(1, 0), b"FFFF", time=1 << 60), LAYOUT)
    assert parsed.events[0][0] == (1 << 60) + (1 << 27) + 3


def test_time_stamp_that_wrapped() -> None:
    # Lower 59 bits smaller than those of the time so far (2**59 - 1): they overflowed, so 2**59 + 3.
    stamp = head(31, 3) + struct.pack("<I", 0)
    assert parse_subbuffer(page(stamp, head(1, 0), b"FFFF", time=(1 << 59) - 1), LAYOUT).events[0][0] == (1 << 59) + 3


def test_discarded_event_is_skipped() -> None:
    # Padding with a delta: array[0] = 8 bytes to skip behind the header; the time counts.
    discarded = head(29, 4) + struct.pack("<I", 8) + b"GGGG"
    assert parse_subbuffer(page(discarded, head(1, 1), b"HHHH"), LAYOUT).events == ((1005, b"HHHH"),)


def test_padding_ends_the_page() -> None:
    assert parse_subbuffer(page(head(1, 1), b"IIII", head(29, 0), b"junkjunk"), LAYOUT).events == ((1001, b"IIII"),)


def test_missed_events_counted() -> None:
    flags = 1 << 31 | 1 << 30
    parsed = parse_subbuffer(page(head(1, 1), b"JJJJ", commit_flags=flags, behind=struct.pack("<Q", 77)), LAYOUT)
    assert parsed.missed == 77
    assert parsed.events == ((1001, b"JJJJ"),)


def test_missed_events_without_room_for_the_count() -> None:
    assert parse_subbuffer(page(head(1, 1), b"JJJJ", commit_flags=1 << 31), LAYOUT).missed is None


def test_empty_page() -> None:
    assert parse_subbuffer(page(), LAYOUT).events == ()


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        bytes(15),
        struct.pack("<QQ", 0, 8) + b"1234",  # commits 8 bytes, has 4
        struct.pack("<QQ", 0, 8) + head(28, 1) + b"1234",  # an event of 112 bytes in 4
        struct.pack("<QQ", 0, 4) + head(0, 1),  # no length word
        struct.pack("<QQ", 0, 1 << 31 | 1 << 30),  # no count behind the data
    ],
)
def test_cut_short(bad: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        parse_subbuffer(bad, LAYOUT)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    try:
        parsed = parse_subbuffer(data, LAYOUT)
    except FormatError:
        return
    assert sum(4 + len(payload) for _, payload in parsed.events) <= len(data)


@given(st.lists(st.tuples(st.integers(0, (1 << 60) - 1), st.integers(1, 60)), max_size=20), st.integers(0, 1 << 40))
def test_what_was_written_is_read(events: list[tuple[int, int]], start: int) -> None:
    # Written as the kernel does: a time extend where the delta needs more than 27 bits (up to 59), the long form over
    # 112 bytes.
    data, expected, time = b"", [], start
    for number, (delta, words) in enumerate(events):
        delta %= 1 << 59
        time += delta
        payload = bytes([number]) * (4 * words)
        if delta >> 27:
            data += head(30, delta & (1 << 27) - 1) + struct.pack("<I", delta >> 27)
            delta = 0
        data += head(words, delta) if words <= 28 else head(0, delta) + struct.pack("<I", 4 + 4 * words)
        data += payload
        expected.append((time, payload))
    raw = struct.pack("<QQ", start, len(data)) + data
    assert list(parse_subbuffer(raw, LAYOUT).events) == expected


def test_format() -> None:
    assert parse_format(USERSPACE_EXIT, "kvm") == EventFormat(
        "kvm:kvm_userspace_exit",
        42,
        (Field("reason", "__u32", 8, 4, False), Field("errno", "int", 12, 4, True)),
    )


def test_format_without_id_is_refused() -> None:
    with pytest.raises(FormatError, match="ID"):
        parse_format(USERSPACE_EXIT.replace("ID: 42\n", ""), "kvm")


def test_decode_signed_and_unsigned() -> None:
    decode = decoder(parse_format(USERSPACE_EXIT, "kvm"))
    # common_type 42, flags 0, preempt_count 1, pid 1234; reason 0xffffffff stays positive, errno -4 is signed.
    record = decode(1, 99, struct.pack("<HBBiIi", 42, 0, 1, 1234, 0xFFFFFFFF, -4))
    assert record == Record("kvm:kvm_userspace_exit", 1, 99, 1234, {"reason": 0xFFFFFFFF, "errno": -4})
    assert record["errno"] == -4
    assert hash(record) == hash(Record("kvm:kvm_userspace_exit", 1, 99, 1234, {"reason": 0xFFFFFFFF, "errno": -4}))


def test_decode_of_a_short_record_is_refused() -> None:
    with pytest.raises(FormatError, match="16"):
        decoder(parse_format(USERSPACE_EXIT, "kvm"))(0, 0, bytes(12))


def _format(*fields: str) -> EventFormat:
    return parse_format("name: e\nID: 7\nformat:\n" + "".join(f"\tfield:{f};\n" for f in fields), "s")


COMMON = struct.pack("<HBBi", 7, 0, 0, 55)


def _values(event: EventFormat, data: bytes) -> dict[str, object]:
    return dict(decoder(event)(0, 0, COMMON + data).values)


def test_decode_arrays() -> None:
    # Offsets count the 8 common bytes: comm at 8, insn at 24, args at 40.
    event = _format(
        "char comm[16];\toffset:8;\tsize:16;\tsigned:0",
        "__u8 insn[15];\toffset:24;\tsize:15;\tsigned:0",
        "unsigned long args[2];\toffset:40;\tsize:16;\tsigned:0",
        "long back[1];\toffset:56;\tsize:8;\tsigned:1",
    )
    data = b"init\0junk".ljust(16, b"x") + bytes(range(15)) + b"\xee" + struct.pack("<QQq", 1, 1 << 63, -5)
    assert _values(event, data) == {"comm": "init", "insn": bytes(range(15)), "args": (1, 1 << 63), "back": (-5,)}


def test_decode_data_loc() -> None:
    # data_loc = offset | length << 16, the offset from the record's start: text at 8 + 12 = 20, six bytes with the
    # NUL; bytes at 26; words at 28.
    event = _format(
        "__data_loc char[] msg;\toffset:8;\tsize:4;\tsigned:0",
        "__data_loc u8[] raw;\toffset:12;\tsize:4;\tsigned:0",
        "__data_loc unsigned int[] words;\toffset:16;\tsize:4;\tsigned:0",
    )
    data = struct.pack("<III", 20 | 6 << 16, 26 | 2 << 16, 28 | 8 << 16) + b"hello\0\x01\x02" + struct.pack("<II", 3, 4)
    assert _values(event, data) == {"msg": "hello", "raw": b"\x01\x02", "words": (3, 4)}


def test_decode_rel_loc() -> None:
    # rel_loc counts from behind its own word, which ends at 12: text at 12 + 4 = 16.
    event = _format("__rel_loc char[] msg;\toffset:8;\tsize:4;\tsigned:0", "int n;\toffset:12;\tsize:4;\tsigned:1")
    assert _values(event, struct.pack("<Ii", 4 | 3 << 16, -1) + b"ok\0") == {"msg": "ok", "n": -1}


def test_decode_flexible_array_and_pointer() -> None:
    event = _format("void * p;\toffset:8;\tsize:8;\tsigned:0", "char buf[];\toffset:16;\tsize:0;\tsigned:0")
    assert _values(event, struct.pack("<Q", 1 << 63) + b"rest\0") == {"p": 1 << 63, "buf": "rest"}


def test_decode_array_whose_length_is_a_name() -> None:
    event = _format("char comm[TASK_COMM_LEN];\toffset:8;\tsize:16;\tsigned:0")
    assert _values(event, b"init".ljust(16, b"\0")) == {"comm": "init"}


def test_decode_keeps_the_order_of_the_format() -> None:
    event = _format(
        "char a[4];\toffset:12;\tsize:4;\tsigned:0",
        "int b;\toffset:8;\tsize:4;\tsigned:1",
        "char c;\toffset:16;\tsize:1;\tsigned:1",
    )
    assert list(_values(event, struct.pack("<i4sb", 5, b"abc", -1)).items()) == [("a", "abc"), ("b", 5), ("c", -1)]
