"""The tool that changes the models: its changes by example, its verdicts on a project of three lines, and the models.

What is expected of the small project follows from its test: f(2) == 3 alone is asked for, and a loop that ends.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import mutation
from tests.cases import cases

ROOT = Path(__file__).resolve().parents[1]

TOY = '''"""A number, 5."""
from __future__ import annotations


def f(n: int) -> int:
    left, total = n, 0
    while left > 0:
        total += left
        left -= 1
    return total if n < 7 else 9
'''
TOY_TEST = """
from hypothesis import given, strategies as st
from hvmodel.arch.toy import f

def test_f():
    assert f(2) == 3

@given(st.integers(0, 6))
def test_sum(n):
    assert f(n) == sum(range(n + 1))
"""
# line, change, and the word for what becomes of it; f is asked for 0 to 6.
VERDICTS = [
    (6, "0x0 -> 0x1", "test"),  # the sum of none is 1
    (7, "0x0 -> 0x1", "test"),  # the last number is left out
    (7, "Gt -> GtE", "survived"),  # one round more, which adds 0
    (8, "Add -> Sub", "test"),
    (9, "0x1 -> 0x2", "test"),
    (9, "Sub -> Add", "no end"),
    (10, "0x7 -> 0x8", "survived"),
    (10, "0x9 -> 0xa", "survived"),
    (10, "Lt -> LtE", "survived"),
]


def tool(root: Path, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.mutation", *arguments]
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=timeout
    )


def project(root: Path, source: str = TOY, explained: str = "") -> None:
    """A project with the tool, one module, and its tests."""
    for name in ("hvmodel/arch", "hvmodel/mmu", "tests/arch", "tests/mmu"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").touch()
        (root / name).parent.joinpath("__init__.py").touch()
    text = (ROOT / "tests" / "mutation.py").read_text()
    table = re.search(r"^EXPLAINED: .*? = \{.*?\}$", text, re.M | re.S)
    assert table
    text = text.replace(table[0], f"EXPLAINED = {{{explained}}}")
    (root / "tests/mutation.py").write_text(text)
    (root / "tests/arch/test_toy.py").write_text(TOY_TEST)
    (root / "hvmodel/arch/toy.py").write_text(source)
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = ["--import-mode=importlib"]\n')


def test_verdicts_of_a_small_project(tmp_path: Path) -> None:
    # What does not end takes its seconds: not in the fast lane.
    endless = "('arch.toy', 'left -= 1', 'Sub -> Add'): 'not tried'"
    project(tmp_path, explained=cases(endless, ""))
    verdicts = [one for one in VERDICTS if one[2] != "no end" or cases(False, True)]
    done = tool(tmp_path, "--workers", "2", timeout=120)
    found = []
    for line in done.stdout.splitlines():
        match = re.match(r" *\d+ +[\d.]+ s  arch\.toy:(\d+): (\w+ -> \w+): .*: (SURVIVED|killed by (\S+).*)$", line)
        if match:
            word = {"SURVIVED": "survived", "killed by no end": "no end"}.get(match[3], "test")
            assert word != "test" or match[4].startswith("tests/arch/test_toy.py::test_")
            found.append((int(match[1]), match[2], word))
    assert sorted(found) == sorted(verdicts), done.stdout + done.stderr
    assert f"{len(verdicts)} mutants: {len(verdicts) - 4} killed, 4 survived" in done.stdout
    assert done.returncode == 1


def test_what_is_explained_is_not_tried_but_on_demand(tmp_path: Path) -> None:
    line = "return total if n < 7 else 9"
    project(
        tmp_path,
        TOY.replace("while left > 0", "while left"),
        ", ".join(
            [
                f"('arch.toy', {line!r}, '0x7 -> 0x8'): 'the test asks up to 6'",
                f"('arch.toy', {line!r}, '0x9 -> 0xa'): 'the same'",
                f"('arch.toy', {line!r}, 'Lt -> LtE'): 'the same'",
                "('arch.toy', 'left -= 1', 'Sub -> Add'): 'slow to try'",
                "('arch.toy', 'left -= 1', '0x1 -> 0x2'): 'slow to try'",
            ]
        ),
    )
    done = tool(tmp_path, timeout=120)
    assert done.stdout.splitlines()[-1] == "2 mutants: 2 killed, 0 survived", done.stdout + done.stderr
    assert done.returncode == 0
    # One that is said to survive and does not is told.
    text = (tmp_path / "tests/mutation.py").read_text()
    text = re.sub(r", \('arch.toy', 'left -= 1', .*\}", ", ('arch.toy', 'total += left', 'Add -> Sub'): 'wrong'}", text)
    (tmp_path / "tests/mutation.py").write_text(text)
    done = tool(tmp_path, "--explained", timeout=120)
    assert "4 mutants: 1 killed, 3 survived\n  arch.toy:8: Add -> Sub" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 1


def test_models_that_fail_unchanged_are_not_changed(tmp_path: Path) -> None:
    project(tmp_path, TOY.replace("total += left", "total -= left"))
    done = tool(tmp_path, "--count", "1", timeout=120)
    assert "arch.toy:0: unchanged" in done.stderr
    assert "test_toy.py::test_f fails" in done.stderr
    assert (done.stdout, done.returncode) == ("", 1)


def test_nothing_is_changed_once_it_is_imported() -> None:
    import hvmodel.arch.number  # noqa: F401

    with pytest.raises(RuntimeError, match="hvmodel is imported"):
        next(mutation.run(mutation.sample(1, 1)))


def changed(source: str) -> list[str]:
    # The source with each of its places changed.
    visitor = mutation._Mutate()
    visitor.visit(ast.parse(source))
    return [ast.unparse(mutation._Mutate(place).visit(ast.parse(source))) for place in range(len(visitor.found))]


@pytest.mark.parametrize(
    ("source", "mutants"),
    [
        ("x = 5", ["x = 6"]),
        ("x = 8", ["x = 16"]),
        ("x = 0", ["x = 1"]),
        ("x = 1", ["x = 2"]),
        ("x = True, 1.5, 'a', None", []),
        ("x = a == b", ["x = a != b"]),
        ("x = a <= b < c", ["x = a < b < c", "x = a <= b <= c"]),
        ("x = a in b", ["x = a not in b"]),
        ("x = a is not b", ["x = a is b"]),
        ("x = a & ~b", ["x = a & b", "x = a | ~b"]),
        ("x |= a << b", ["x |= a >> b", "x &= a << b"]),
        ("x = a + b - c", ["x = a - b - c", "x = a + b + c"]),
        ("x = a and (not b)", ["x = a and b", "x = a or not b"]),
        ("x: Literal[16] = a", []),
        ("def f(a: Literal[1]=2) -> Literal[3]:\n    pass", ["def f(a: Literal[1]=4) -> Literal[3]:\n    pass"]),
        ("if TYPE_CHECKING:\n    x = 5", []),
        ("raise ArgumentError('f', 5)", []),
        ("x = f'{5}'", []),
        ("from ..a import b", []),
    ],
)
def test_each_place_is_changed_once(source: str, mutants: list[str]) -> None:
    assert changed(source) == mutants


def test_a_sample_is_of_all_modules_and_the_same_each_time() -> None:
    names = mutation.modules()
    assert {"arch.paging", "mmu.spte"} <= set(names)
    assert all(len(mutation.mutants(name)) >= 10 for name in names)
    chosen = mutation.sample(240, 1)
    assert chosen == mutation.sample(240, 1) != mutation.sample(240, 2)
    assert len(set(chosen)) == 240
    assert {one.module for one in chosen} == set(names)
    assert not any(one.key in mutation.EXPLAINED for one in chosen)


def test_what_is_explained_is_there() -> None:
    keys = {one.key for name in mutation.modules() for one in mutation.mutants(name)}
    assert mutation.EXPLAINED.keys() <= keys
    assert all(mutation.EXPLAINED.values())


if cases(False, True):

    def test_the_tests_see_a_change_of_the_models() -> None:
        done = tool(ROOT, "--count", "240", "--seed", "1", timeout=1500)
        print(done.stdout)
        assert done.returncode == 0, "\n".join(done.stdout.splitlines()[-20:]) + done.stderr[-2000:]
