"""The BTF reader: a blob assembled by hand, broken ones, and the running kernel's."""

from __future__ import annotations

import errno
import os
import pickle
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvmodel.errors import HostError, HvError
from hvmodel.witness.btf import Btf, BtfError, BtfField, BtfLookupError, BtfStruct
from tests.need import need

# Kinds, by the numbers of Documentation/bpf/btf.rst.
INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST = range(1, 11)
FUNC, FUNC_PROTO, ENUM64 = 12, 13, 19
FLAG = 1 << 31  # kind_flag


def type_(name: int, kind: int, vlen: int, size_or_type: int, *words: int, flag: int = 0) -> bytes:
    """A type: the three common words, then what the kind adds."""
    return struct.pack(f"<{3 + len(words)}I", name, flag | kind << 24 | vlen, size_or_type, *words)


def blob(types: bytes, strings: bytes, magic: int = 0xEB9F, version: int = 1) -> bytes:
    """A file: a header of 24 bytes, then the types, then the strings."""
    return struct.pack("<HBBIIIII", magic, version, 0, 24, 0, len(types), len(types), len(strings)) + types + strings


class Strings:
    """A string section under construction: offset 0 is the empty name."""

    def __init__(self, start: int = 0) -> None:
        self.data, self.start = (b"\0" if start == 0 else b""), start

    def __call__(self, name: str) -> int:
        self.data += name.encode() + b"\0"
        return self.start + len(self.data) - len(name) - 1


def demo() -> tuple[bytes, bytes]:
    """Types and strings of

    struct demo {                     bit
        u32 x;                          0   size 32
        union { u32 a; u8 b; };        32   size 32 and 8
        u8 bytes[3];                   64   size 24
        u8 low : 3, high : 5;          88   91 = 88 + 3
        struct demo *next;            128   pointers are aligned to 8 bytes
        demo_inner pair[2];           192   each 8 bytes
        u8 tail[];                    320   192 + 2 * 64
    };                                      40 bytes
    """
    s = Strings()
    u32, u8 = 1, 2
    types = type_(s("u32"), INT, 0, 4, 32)  # 1
    types += type_(s("u8"), INT, 0, 1, 8)  # 2
    types += type_(0, ARRAY, 0, 0, u8, u32, 3)  # 3: u8[3]
    types += type_(0, UNION, 2, 4, s("a"), u32, 0, s("b"), u8, 0)  # 4
    types += type_(0, PTR, 0, 6)  # 5: struct demo *
    members = [
        (s("x"), u32, 0),
        (0, 4, 32),
        (s("bytes"), 3, 64),
        (s("low"), u8, 3 << 24 | 88),
        (s("high"), u8, 5 << 24 | 91),
        (s("next"), 5, 128),
        (s("pair"), 10, 192),
        (s("tail"), 11, 320),
    ]
    types += type_(s("demo"), STRUCT, len(members), 40, *(word for m in members for word in m), flag=FLAG)  # 6
    types += type_(s("inner"), STRUCT, 2, 8, s("p"), u32, 0, s("q"), u32, 32)  # 7
    types += type_(s("demo_inner"), TYPEDEF, 0, 9)  # 8
    types += type_(0, CONST, 0, 7)  # 9: const struct inner
    types += type_(0, ARRAY, 0, 0, 8, u32, 2)  # 10: demo_inner[2]
    types += type_(0, ARRAY, 0, 0, u8, u32, 0)  # 11: u8[]
    types += type_(s("color"), ENUM, 2, 4, s("RED"), 0, s("BLUE"), 0xFFFFFFFF)  # 12: unsigned
    types += type_(s("sign"), ENUM, 1, 4, s("MINUS"), 0xFFFFFFFF, flag=FLAG)  # 13: signed
    types += type_(s("wide"), ENUM64, 2, 8, s("TOP"), 1, 2, s("LOW"), 0xFFFFFFFF, 0xFFFFFFFF, flag=FLAG)  # 14
    types += type_(s("demo_t"), TYPEDEF, 0, 6)  # 15
    types += type_(s("opaque"), FWD, 0, 0)  # 16
    types += type_(s("nothing"), TYPEDEF, 0, 0)  # 17: of void
    return types, s.data


TYPES, STRINGS = demo()
DEMO = blob(TYPES, STRINGS)


def test_every_field_of_a_struct_by_path() -> None:
    found = Btf(DEMO).struct("demo")
    assert (found.kind, found.size) == ("struct", 40)
    assert {path: (f.bit_offset, f.bit_size) for path, f in found.fields.items()} == {
        "x": (0, 32),
        "a": (32, 32),
        "b": (32, 8),
        "bytes": (64, 24),
        "low": (88, 3),
        "high": (91, 5),
        "next": (128, 64),
        "pair": (192, 128),
        "pair[0].p": (192, 32),
        "pair[0].q": (224, 32),
        "tail": (320, 0),
    }
    assert [found.fields[path].type for path in ("x", "bytes", "next", "pair", "tail")] == [
        "u32",
        "u8[3]",
        "struct demo *",
        "demo_inner[2]",
        "u8[]",
    ]


def test_bytes_of_a_field() -> None:
    field = Btf(DEMO).struct("demo").fields["high"]
    assert (field.offset, field.size) == (11, 1)  # bits 91..95 lie in byte 11
    assert BtfField(64, 24, "u8[3]").size == 3


def test_a_typedef_stands_for_its_struct() -> None:
    btf = Btf(DEMO)
    assert btf.struct("demo_t").fields == btf.struct("demo").fields
    assert btf.struct("demo_inner") == BtfStruct(
        "struct", "demo_inner", 8, {"p": BtfField(0, 32, "u32"), "q": BtfField(32, 32, "u32")}
    )


def test_enumerators() -> None:
    btf = Btf(DEMO)
    assert btf.enum("color") == {"RED": 0, "BLUE": 0xFFFFFFFF}
    assert btf.enum("sign") == {"MINUS": -1}
    assert btf.enum("wide") == {"TOP": (2 << 32) + 1, "LOW": -1}  # low word first
    assert btf.enumerators() == btf.enum("color") | btf.enum("sign") | btf.enum("wide")


def test_what_is_there() -> None:
    btf = Btf(DEMO)
    assert "demo" in btf
    assert "demo_t" in btf
    assert "color" in btf
    for absent in ("x", "u32", "dem", "emo", "", "demo\0", 5):
        assert absent not in btf


@pytest.mark.parametrize("name", ["nowhere", "u32", "opaque", "nothing", "color", ""])
def test_no_such_struct(name: str) -> None:
    with pytest.raises(BtfLookupError, match=f"BTF data has no struct {name}:") as caught:
        Btf(DEMO).struct(name)
    assert (caught.value.kind, caught.value.name, caught.value.source) == ("struct", name, "BTF data")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_no_such_enum() -> None:
    with pytest.raises(BtfLookupError, match="no enum demo:"):
        Btf(DEMO).enum("demo")


def functions() -> bytes:
    """void first(void); static int second(u32 at, void *, ...) as the kernel's BTF has them, and a func of an int."""
    s = Strings()
    types = type_(s("u32"), INT, 0, 4, 32)  # 1
    types += type_(0, PTR, 0, 0)  # 2: void *
    types += type_(0, FUNC_PROTO, 0, 0)  # 3
    types += type_(0, FUNC_PROTO, 3, 1, s("at"), 1, s("where"), 2, 0, 0)  # 4: the dots have neither name nor type
    types += type_(s("first"), FUNC, 1, 3)  # 5
    types += type_(s("second"), FUNC, 0, 4)  # 6
    types += type_(s("broken"), FUNC, 0, 1)  # 7
    return blob(types, s.data)


def test_the_parameters_of_a_function() -> None:
    btf = Btf(functions())
    assert btf.function("first") == {}
    assert list(btf.function("second").items()) == [("at", "u32"), ("where", "void *"), ("", "void")]
    assert "second" not in btf  # a function is no type
    with pytest.raises(BtfError, match="function broken is of type 1"):
        btf.function("broken")
    for name in ("u32", "nowhere", ""):
        with pytest.raises(BtfLookupError, match=f"no function {name}:"):
            btf.function(name)


def test_split_btf_goes_on_from_its_base() -> None:
    base = Btf(DEMO)
    s = Strings(len(STRINGS))
    mine = type_(s("mine"), STRUCT, 2, 48, s("own"), 1, 0, s("whole"), 6, 64)  # of the base's u32 and struct demo
    # 17 types in the base, so this is type 18; a struct may be named by a string of the base, too
    mine += type_(STRINGS.index(b"RED\0"), STRUCT, 1, 48, s("m"), 18, 0)
    module = Btf(blob(mine, s.data), base, "the module")
    fields = module.struct("mine").fields
    assert (fields["own"].bit_offset, fields["own"].bit_size) == (0, 32)
    assert (fields["whole"].bit_offset, fields["whole"].bit_size) == (64, 40 * 8)
    assert fields["whole.high"].bit_offset == 64 + 91
    assert module.struct("RED").fields["m.whole.x"].bit_offset == 64
    assert module.struct("demo") == base.struct("demo")
    assert module.enumerators() == base.enumerators()
    assert "mine" not in base


# What is done to the blob, and what is said about it.
BROKEN = {
    "empty": (b"", "0 bytes are too few for a BTF header"),
    "magic": (blob(TYPES, STRINGS, magic=0x1234), "magic is 0x1234, not 0xeb9f"),
    "big-endian": (blob(TYPES, STRINGS, magic=0x9FEB), "big-endian"),
    "version": (blob(TYPES, STRINGS, version=2), "BTF version 2"),
    "cut": (DEMO[:-1], f"the string section ends at byte {len(DEMO)} of {len(DEMO) - 1}"),
    "strings": (blob(TYPES, STRINGS + b"x"), "does not end with a zero byte"),
    "kind": (blob(TYPES + type_(0, 31, 0, 0), STRINGS), "type 18 at byte .* has kind 31"),
    "cut off": (blob(TYPES + b"\0" * 4, STRINGS), "type 18 at byte .* is cut off"),
    "vlen": (blob(type_(1, STRUCT, 2, 4, 0, 0, 0), STRINGS), "the last type ends at byte"),  # has one member of two
    "reference": (blob(type_(1, STRUCT, 1, 4, 1, 99, 0), b"\0demo\0"), "refers to type 99; there are 1"),
    "name": (blob(type_(1, STRUCT, 1, 4, 1000, 0, 0), b"\0demo\0"), "a name at byte 1000 of 6 bytes"),
    "loop": (blob(type_(1, TYPEDEF, 0, 1), b"\0demo\0"), "typedefs from type 1 on do not end"),
    "itself": (blob(type_(1, STRUCT, 1, 4, 1, 1, 0), b"\0demo\0"), "type 1 contains itself"),
    "arrays": (
        blob(type_(1, STRUCT, 1, 4, 1, 2, 0) + type_(0, ARRAY, 0, 0, 2, 2, 1), b"\0demo\0"),
        "arrays from type 2 on do not end",
    ),
    "pointers": (blob(type_(1, STRUCT, 1, 8, 1, 2, 0) + type_(0, PTR, 0, 2), b"\0demo\0"), "type 2 does not end"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_btf_is_named(case: str) -> None:
    data, sentence = BROKEN[case]
    with pytest.raises(BtfError, match=sentence) as caught:
        Btf(data, source="some file").struct("demo")
    assert str(caught.value).startswith("some file: ")
    assert isinstance(caught.value, ValueError)


@given(st.dictionaries(st.integers(0, len(DEMO) - 1), st.integers(0, 255), max_size=4))
def test_no_byte_makes_it_raise_anything_else(changes: dict[int, int]) -> None:
    data = bytearray(DEMO)
    for at, byte in changes.items():
        data[at] = byte
    try:
        btf = Btf(bytes(data))
        for look_up in (lambda: btf.struct("demo"), lambda: btf.enum("color"), btf.enumerators):
            look_up()
    except HvError:
        pass


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="open: path=") as caught:
        Btf.from_kernel(tmp_path / "absent")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(HostError) as caught:
        Btf.from_kernel(tmp_path)
    assert caught.value.errno == errno.EISDIR


def test_a_kernel_without_btf_says_which_option_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hvmodel.witness.btf.VMLINUX", str(tmp_path / "vmlinux"))
    with pytest.raises(HostError, match="CONFIG_DEBUG_INFO_BTF"):
        Btf.from_kernel(tmp_path / "vmlinux")


def test_a_module_goes_on_from_vmlinux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(DEMO)
    monkeypatch.setattr("hvmodel.witness.btf.VMLINUX", str(tmp_path / "vmlinux"))
    monkeypatch.setattr(Btf.from_kernel.__func__, "__defaults__", (str(tmp_path / "vmlinux"), None))
    assert Btf.for_module("kvm").base is None  # built in
    (tmp_path / "kvm").write_bytes(blob(b"", b"\0"))
    module = Btf.for_module("kvm")
    assert module.source == str(tmp_path / "kvm")
    assert module.struct("demo").size == 40


@pytest.fixture(scope="module")
def kernel() -> Btf:
    need("btf")
    return Btf.from_kernel()


def test_the_kernels_list_head_is_two_pointers(kernel: Btf) -> None:
    found = kernel.struct("list_head")
    assert found.size == 2 * 8
    assert {path: f.bit_offset for path, f in found.fields.items()} == {"next": 0, "prev": 64}
    assert found.fields["next"].type == "struct list_head *"


def test_the_kernels_stat_struct_is_that_of_the_c_library(kernel: Btf, tmp_path: Path) -> None:
    # What fstat(2) filled in, read by the offsets that BTF gives.
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    libc_stat = path.stat()
    found = kernel.struct("stat").fields
    import ctypes

    buffer = ctypes.create_string_buffer(kernel.struct("stat").size + 512)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syscall(4, os.fsencode(path), buffer) == 0  # SYS_stat of x86-64

    def value(name: str) -> int:
        field = found[name]
        return int.from_bytes(buffer.raw[field.offset : field.offset + field.size], "little")

    assert value("st_size") == 5
    assert value("st_ino") == libc_stat.st_ino
    assert value("st_mode") == libc_stat.st_mode
    assert value("st_mtime") == int(libc_stat.st_mtime)


def test_the_kernels_enums(kernel: Btf) -> None:
    # from the kernel's own text: include/uapi/linux/bpf.h begins enum bpf_cmd with these
    found = kernel.enum("bpf_cmd")
    assert list(found)[:3] == ["BPF_MAP_CREATE", "BPF_MAP_LOOKUP_ELEM", "BPF_MAP_UPDATE_ELEM"]
    assert list(found.values())[:3] == [0, 1, 2]


def test_the_kernels_functions(kernel: Btf) -> None:
    # include/linux/fs.h: ssize_t vfs_read(struct file *, char __user *, size_t, loff_t *), of every kernel
    assert list(kernel.function("vfs_read").values()) == ["struct file *", "char *", "size_t", "loff_t *"]


def test_the_kernels_kvm_run(capsys: pytest.CaptureFixture[str]) -> None:
    need("btf")
    start = time.perf_counter()
    found = Btf.for_module("kvm").struct("kvm_run")
    with capsys.disabled():
        print(f"\nBTF: opened and indexed in {time.perf_counter() - start:.2f} s", end="")
    # 32 bytes of head, a union padded to 256, two masks of 8, a union padded to 2048
    assert found.size == 32 + 256 + 2 * 8 + 2048
    assert found.fields["padding"].bit_offset == 32 * 8
    assert found.fields["s.regs.regs.rbx"].offset == 32 + 256 + 2 * 8 + 8
