"""The ABI header against the running kernel: does every struct we pass lie as the kernel reads it?

Owns the comparison of cffi's layouts (of native/kvm_uapi.h) with the kernel's BTF, field by field.
"""

from __future__ import annotations

from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from .btf import Btf, BtfStruct

__all__ = ["AbiComparison", "compare_abi", "layout", "nested", "our_types"]


class AbiComparison(NamedTuple):
    """What `compare_abi` found.

    `structs` and `fields` count what was compared.  `mismatches` says what lies elsewhere or has another size.
    `missing` names our structs, and fields of compared structs, that this kernel's BTF does not have.  `newer` names
    the fields that the kernel has and we do not (but not its "__empty_" members, which only let C accept a flexible
    array).
    """

    structs: int
    fields: int
    mismatches: tuple[str, ...]
    missing: tuple[str, ...]
    newer: tuple[str, ...]


def our_types() -> dict[str, Any]:
    """Every struct and union of KVM's in our header: name without the keyword -> cffi's ctype."""
    from .._ffi import ffi

    _, structs, unions = ffi.list_types()
    named = [(name, f"struct {name}") for name in structs] + [(name, f"union {name}") for name in unions]
    return {name: ffi.typeof(cname) for name, cname in named if name.startswith("kvm_")}


def layout(ctype: Any, prefix: str = "", base: int = 0) -> Iterator[tuple[str, int, int]]:
    """(path, bit offset, size in bits) of every field of a cffi struct or union, in the manner of `BtfStruct.fields`.

    A flexible array has size 0.
    """
    for name, field in ctype.fields or ():
        kind = field.type
        path = prefix + name
        start = base + 8 * field.offset
        is_bits = field.bitsize >= 0
        if is_bits:
            start += field.bitshift
        if name:
            yield path, start, field.bitsize if is_bits else 8 * _sizeof(kind)
        while kind.kind == "array":
            path, kind = f"{path}[0]", kind.item
        if kind.kind in ("struct", "union"):
            yield from layout(kind, f"{path}." if name else prefix, start)


def nested(ctype: Any) -> Iterator[str]:
    """Names of the structs and unions that a ctype contains by value, at any depth."""
    for _, field in ctype.fields or ():
        kind = field.type
        while kind.kind == "array":
            kind = kind.item
        if kind.kind in ("struct", "union"):
            yield kind.cname.partition(" ")[2]
            yield from nested(kind)


def compare_abi(btf: Btf) -> AbiComparison:
    """Compare size, and offset and size of every field, of each struct in our header with the kernel's.

    A struct that the kernel nests without a name carries a tag of ours; it is compared as part of what holds it.
    BuildError where the extension is missing.
    """
    ours = our_types()
    structs = fields = 0
    mismatches: list[str] = []
    missing: list[str] = []
    newer: list[str] = []
    inside: set[str] = set()
    lacking: list[str] = []
    for name, ctype in ours.items():
        inside.update(nested(ctype))
        if name not in btf:
            lacking.append(name)
            continue
        theirs = btf.struct(name)
        structs += 1
        known = set()
        tail = 0  # bytes of an array that is flexible in our header, but has a length in the kernel's own build
        for path, start, size in layout(ctype):
            kernel_path = _kernel_path(path, theirs)
            field = theirs.fields.get(kernel_path)
            if field is None:
                missing.append(f"{name}.{path}")
                continue
            known.add(kernel_path)
            fields += 1
            if size == 0 and field.bit_offset == start:
                tail = field.size
            elif (field.bit_offset, field.bit_size) != (start, size):
                mismatches.append(
                    f"{name}.{path}: ours at {_bits(start)}, size {_bits(size)}; "
                    f"the kernel's at {_bits(field.bit_offset)}, size {_bits(field.bit_size)}"
                )
        newer += [f"{name}.{path}" for path in theirs.fields if path not in known and "__empty_" not in path]
        if theirs.size - tail != _sizeof(ctype):
            mismatches.append(f"{name}: our size is {_sizeof(ctype)}, the kernel's {theirs.size}")
    missing = [name for name in lacking if name not in inside] + missing
    return AbiComparison(structs, fields, tuple(mismatches), tuple(missing), tuple(newer))


# What the kernel calls a field in its own build: struct kvm_run marks what user space may change at any time.
def _kernel_path(path: str, theirs: BtfStruct) -> str:
    return path if path in theirs.fields else f"{path}__unsafe"


# Bytes, where they are whole ones.
def _bits(count: int) -> str:
    return f"{count // 8}" if count % 8 == 0 else f"{count} bits"


def _sizeof(ctype: Any) -> int:
    from .._ffi import ffi

    flexible = ctype.kind == "array" and ctype.length is None
    return 0 if flexible else ffi.sizeof(ctype)
