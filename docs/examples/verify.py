"""A check from Python: every size and field offset of our ABI header against the running kernel's types.

Needs: btf

Prints:

    ABI header x BTF of the running kernel: 0 mismatches
"""

from __future__ import annotations

from hvmodel.witness import run

for result in run(["abi"]):
    assert result.ok, result.examples
    print(f"{result.model} x {result.witness}: {result.mismatches} mismatches")
