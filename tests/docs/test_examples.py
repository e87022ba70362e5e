"""What the documentation shows runs, and prints what it says: docs/examples/*.py, and the Python blocks of its pages.

An example says under "Prints:" what it prints, and after "Needs:" what it takes besides KVM.  A Python block of a page
prints what the text block that follows it says, or nothing.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.need import need

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n?^```text\n(.*?)^```\n)?", re.M | re.S)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def run(code: str, name: str, tmp_path: Path) -> str:
    # In a process of its own, from another directory, as strict with warnings as the tests.
    script = tmp_path / name
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def blocks() -> list[tuple[str, str, str]]:
    # (page and line, code, expected output)
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append((f"{page.name}:{line}", match[1], match[2] or ""))
    return found


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    code = path.read_text()
    text = ast.get_docstring(ast.parse(code)) or ""
    needs = re.search(r"^Needs: (.*)$", text, re.M)
    need("kvm", *(needs[1].split(", ") if needs else ()))
    _, marker, expected = text.partition("\nPrints:\n\n")
    assert marker, "the docstring says what the example prints"
    assert run(code, path.name, tmp_path) == textwrap.dedent(expected).rstrip() + "\n"


@pytest.mark.parametrize(("where", "code", "expected"), blocks(), ids=[where for where, _, _ in blocks()])
def test_block(where: str, code: str, expected: str, tmp_path: Path) -> None:
    need("kvm", *(["userfaultfd"] if where.startswith("userfaultfd.md") else []))
    assert run(code, "block.py", tmp_path) == expected


def test_the_readme_opens_with_the_two_commands_and_the_script() -> None:
    text = (ROOT / "README.md").read_text()
    commands, script = text.index("```sh\n"), text.index("```python\n")
    assert commands < script < text.index("\n## ")
    assert text.count(".venv/bin/hvmodel boot\n", commands, script) == 1
    assert text.count(".venv/bin/python -m pytest\n", commands, script) == 1
    block = BLOCK.search(text)
    assert block
    assert 8 <= len([line for line in block[1].splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_page_and_example_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for path in [*(ROOT / "docs").glob("*.md"), *EXAMPLES]:
        if path.name != "index.md":
            assert f"({path.relative_to(ROOT / 'docs')})" in index, path.name
