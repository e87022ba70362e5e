"""Changes one constant, bit or comparison of the pure models, and runs their tests: do they see it?

    python -m tests.mutation [--count N] [--seed S] [--workers N] [--explained] [MODULE ...]

A mutant is a module of hvmodel/mmu or hvmodel/arch with one place of its syntax tree changed; the file is not touched.
Each runs in a process of its own, forked from one that has imported what tests need, but nothing of hvmodel: first the
module's own tests (tests/arch/test_msr.py and test_msr_*.py for arch.msr) and doctests, then, where those pass, all
others of its package.  Tests of other packages do not count: a package stands by its own.  A test that fails, an error,
and a run that takes far more of the processor or of memory than that of the unchanged models kill the mutant.  What
survives is printed, and must be explained in `EXPLAINED`; what is explained there is not tried, unless by --explained,
which tries nothing else.

What is changed: a number by one, or a power of two to its neighbour; == and !=, < and <=, > and >=, `in` and `not in`,
`is` and `is not`; & and |, + and -, << and >>; `and` and `or`; a `not` or `~` is dropped.  What is not: docstrings and
annotations, the words of errors (calls of *Error), `__all__`, and code under TYPE_CHECKING.

The same mutants have the same outcomes in each run: hypothesis draws the same cases, and tests that ask a kernel or a
QEMU are of those too.  The quickest tests are run first, by the times of the unchanged run.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import hypothesis
import pytest

__all__ = ["EXPLAINED", "Mutant", "Outcome", "modules", "mutants", "run", "sample"]

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mmu", "arch")
TIMEOUT_S = 120  # of the clock, for a test that waits
MEMORY = 8 << 30  # address space; QEMU, started by a test, has the same limit

# Survivors that are right to survive: (module, line of source without its indent, change): why no test can see it.
EXPLAINED: dict[tuple[str, str, str], str] = {
    (
        "mmu.shadow_roots",
        'pdpte = int.from_bytes(self._read(self.guest.entry_gpa(0, 3, index << 30), 8), "little")',
        "0x8 -> 0x10",
    ): "of the next entry, which is above bit 63, nothing is looked at",
    ("mmu.shadow_tree", "if self.pages.used > wanted:", "Gt -> GtE"): "where both are equal, no page is zapped",
    (
        "mmu.simulate",
        "_TRIES = 64  # times that one access may fault: more is a bug of the model",
        "0x40 -> 0x80",
    ): "a bound that no access comes to",
    ("mmu.walk", "rflags: int = 2,", "0x2 -> 0x4"): "bit 1 is always 1; a walk looks at AC, bit 18, alone",
}

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
}


class Mutant(NamedTuple):
    """One change: the `place`th that `module` ("mmu.spte") allows; `line` of its source, and `what` in words."""

    module: str
    place: int
    line: int
    what: str
    source: str

    @property
    def key(self) -> tuple[str, str, str]:
        """As in EXPLAINED."""
        return self.module, self.source, self.what

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.what}: {self.source}"


class Outcome(NamedTuple):
    """`killer`: the test that saw it, or "no end"; None: it survived.  `seconds` of its run."""

    mutant: Mutant
    killer: str | None
    seconds: float


class _Mutate(ast.NodeTransformer):
    # Counts the places that can be changed, and changes the one numbered `wanted`.
    def __init__(self, wanted: int = -1) -> None:
        self.wanted = wanted
        self.found: list[tuple[int, str]] = []
        self.in_annotation = False

    def _here(self, node: ast.AST, what: str) -> bool:
        self.found.append((node.lineno, what))  # type: ignore[attr-defined]
        return len(self.found) - 1 == self.wanted

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if type(node.value) is not int:
            return node
        value = node.value
        other = value << 1 if value > 1 and value & value - 1 == 0 else value + 1
        return ast.copy_location(ast.Constant(other), node) if self._here(node, f"{value:#x} -> {other:#x}") else node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        for at, op in enumerate(node.ops):
            other = _COMPARISONS[type(op)]
            if self._here(node, f"{type(op).__name__} -> {other.__name__}"):
                node.ops[at] = other()
        return node

    def _operator(self, node: ast.BinOp | ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        other = _OPERATORS.get(type(node.op))
        # `1 << 0`, the lowest of a row of bits, is 1 either way.
        by = node.right if isinstance(node, ast.BinOp) else node.value
        if isinstance(node.op, ast.LShift | ast.RShift) and isinstance(by, ast.Constant) and by.value == 0:
            return node
        if other is not None and self._here(node, f"{type(node.op).__name__} -> {other.__name__}"):
            node.op = other()
        return node

    visit_BinOp = _operator
    visit_AugAssign = _operator

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        if self._here(node, f"{type(node.op).__name__} -> {other.__name__}"):
            node.op = other()
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.Not | ast.Invert) and self._here(node, f"{type(node.op).__name__} dropped"):
            return node.operand
        return node

    # What is not changed.

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return node if name.endswith("Error") else self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node
        return self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.args = self.visit(node.args)
        node.body = [self.visit(statement) for statement in node.body]
        return node


def _path(module: str) -> Path:
    return ROOT / "hvmodel" / Path(*module.split(".")).with_suffix(".py")


def modules() -> list[str]:
    """The modules that are changed, "mmu.spte" and so on."""
    return [
        f"{package}.{path.stem}"
        for package in PACKAGES
        for path in sorted((ROOT / "hvmodel" / package).glob("*.py"))
        if path.stem != "__init__"
    ]


@functools.cache  # the file may be edited while we run
def _source(module: str) -> str:
    return _path(module).read_text()


@functools.cache
def mutants(module: str) -> tuple[Mutant, ...]:
    """All mutants of a module."""
    lines = _source(module).splitlines()
    visitor = _Mutate()
    visitor.visit(ast.parse(_source(module)))
    return tuple(
        [Mutant(module, place, line, what, lines[line - 1].strip()) for place, (line, what) in enumerate(visitor.found)]
    )


def sample(count: int, seed: int, names: list[str] | None = None, *, explained: bool = False) -> list[Mutant]:
    """`count` mutants, about as many of each module, none twice; the same for the same seed.

    `explained`: those in EXPLAINED, else those that are not.  Each mutant has its rank by itself, so that an edit of
    the models changes the draw by the lines it touches and no more.
    """
    piles = {name: [one for one in mutants(name) if (one.key in EXPLAINED) == explained] for name in names or modules()}
    for pile in piles.values():
        seen: dict[tuple[str, str, str], int] = {}
        ranks = {}
        for one in pile:
            seen[one.key] = nth = seen.get(one.key, 0) + 1
            ranks[one.place] = hashlib.sha256(repr((seed, one.key, nth)).encode()).digest()
        pile.sort(key=lambda one, ranks=ranks: ranks[one.place])  # type: ignore[misc]
    chosen: list[Mutant] = []
    while len(chosen) < count and any(piles.values()):
        for pile in piles.values():
            if pile and len(chosen) < count:
                chosen.append(pile.pop())
    return chosen


# ---- in the forked process ----


class _Finder(importlib.abc.MetaPathFinder):
    # Gives the changed module in place of the one in its file.
    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != f"hvmodel.{self.mutant.module}":
            return None
        file = _path(self.mutant.module)
        return importlib.util.spec_from_file_location(name, file, loader=_Loader(name, str(file), self.mutant))


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, mutant: Mutant) -> None:
        super().__init__(name, path)
        self.mutant = mutant

    def get_code(self, name: str) -> CodeType:
        tree = _Mutate(self.mutant.place).visit(ast.parse(_source(self.mutant.module)))
        return compile(ast.fix_missing_locations(tree), self.path, "exec")


class _Plugin:
    # Of pytest: the quickest tests first; what each took; which failed, and how.
    def __init__(self, seconds: dict[str, float]) -> None:
        self.before = seconds
        self.seconds: dict[str, float] = {}
        self.failed = ""
        self.why = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.before.get(item.nodeid, 0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration
        self.pytest_collectreport(report)

    def pytest_collectreport(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed, self.why = report.nodeid, str(report.longrepr)[-4000:]


def _stages(module: str) -> list[list[Path]]:
    # The files of the module's own tests and doctests, and those of the rest of its package.
    package, _, stem = module.partition(".")
    tests = ROOT / "tests" / package
    own = [*tests.glob(f"test_{stem}.py"), *sorted(tests.glob(f"test_{stem}_*.py")), _path(module)]
    every = [*sorted(tests.glob("test_*.py")), *sorted((ROOT / "hvmodel" / package).glob("*.py"))]
    return [own, [path for path in every if path not in own]]


def _limit(seconds: float) -> None:
    # What the process may take of the processor from here on; SIGXCPU ends it.
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _child(mutant: Mutant, before: dict[str, float]) -> dict[str, object]:
    # `before`: what each test took unchanged; empty: this is that run.
    sys.meta_path.insert(0, _Finder(mutant))
    os.environ.pop("HVMODEL_SLOW", None)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    # Assertions are not rewritten: pytest would load modules that it is given by name itself, past our finder.
    options = ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain"]
    options += [f"--rootdir={ROOT}", f"-c={ROOT}/pyproject.toml"]
    plugin = _Plugin(before)
    for paths in _stages(mutant.module):
        # The second run is a new session in the same process: the mutant stays imported.
        files = {path.relative_to(ROOT).as_posix() for path in paths}
        usual = sum(took for test, took in before.items() if test.partition("::")[0] in files)
        _limit(2 + 5 * usual if before else TIMEOUT_S)
        code = pytest.main([*options, *map(str, paths)], [plugin])
        if code not in (0, 5):
            return {"killer": plugin.failed or f"pytest's exit status {int(code)}", "why": plugin.why}
        if not isinstance(sys.modules[f"hvmodel.{mutant.module}"].__loader__, _Loader):
            return {"killer": None, "seconds": {}, "inactive": True}
    return {"killer": None, "seconds": plugin.seconds}


# ---- in the process that forks ----


def _start(mutant: Mutant, before: dict[str, float]) -> tuple[int, int]:
    answer = os.memfd_create("answer")
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.setpgid(0, 0)
            os.write(answer, json.dumps(_child(mutant, before)).encode())
        os._exit(0)
    return pid, answer


def run(chosen: list[Mutant], *, workers: int = 2) -> Iterator[Outcome]:
    """Run the tests against each, `workers` at a time; the outcomes as they come.

    Forks: no other thread may run here.  Nothing of hvmodel may be imported yet.  Before any mutant the models as they
    are run: RuntimeError where even they fail, for then every mutant would seem killed.
    """
    if any(name == "hvmodel" or name.startswith("hvmodel.") for name in sys.modules):
        raise RuntimeError("hvmodel is imported: its modules cannot be changed any more")
    hypothesis.settings.register_profile(
        "mutation",
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("mutation")
    bytecode = sys.dont_write_bytecode, sys.pycache_prefix
    with tempfile.TemporaryDirectory() as cache:
        sys.dont_write_bytecode, sys.pycache_prefix = False, cache
        try:
            before: dict[str, float] = {}
            unchanged = {one.module.partition(".")[0]: Mutant(one.module, -1, 0, "unchanged", "") for one in chosen}
            for mutant, answer, _ in _run(list(unchanged.values()), {}, workers):
                if answer["killer"] is not None or not answer["seconds"]:
                    raise RuntimeError(f"{mutant}: {answer['killer']} fails:\n{answer.get('why')}")
                before |= answer["seconds"]
            for mutant, answer, seconds in _run(chosen, before, workers):
                if "inactive" in answer:
                    raise RuntimeError(f"{mutant}: the tests ran without it")
                yield Outcome(mutant, answer["killer"], seconds)
        finally:
            sys.dont_write_bytecode, sys.pycache_prefix = bytecode


def _run(
    chosen: list[Mutant], before: dict[str, float], workers: int
) -> Iterator[tuple[Mutant, dict[str, Any], float]]:
    waiting = list(reversed(chosen))
    running: dict[int, tuple[int, int, Mutant, float]] = {}  # pidfd: pid, answer, mutant, start
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                mutant = waiting.pop()
                pid, answer = _start(mutant, before)
                running[os.pidfd_open(pid)] = (pid, answer, mutant, time.monotonic())
            ready, _, _ = select.select(list(running), [], [], 1.0)
            now = time.monotonic()
            for fd in list(running):
                pid, answer, mutant, start = running[fd]
                if fd in ready or now - start > TIMEOUT_S:
                    text = _end(fd, *running.pop(fd)[:2])
                    yield mutant, json.loads(text or '{"killer": "no end"}'), now - start
    finally:
        for fd, (pid, answer, _, _) in running.items():
            _end(fd, pid, answer)


def _end(fd: int, pid: int, answer: int) -> bytes:
    # What its tests started may be left where it did not end by itself; its group is gone otherwise.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    text = os.pread(answer, os.fstat(answer).st_size, 0)
    os.close(fd)
    os.close(answer)
    return text


def main() -> int:
    """The command; 1 where a survivor is not explained, or one that is explained is killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="such as mmu.spte; default: all of mmu and arch")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--explained", action="store_true", help="those in EXPLAINED: do they survive?")
    options = parser.parse_args()
    unknown = set(options.modules) - set(modules())
    if unknown:
        parser.error(f"no such modules: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends those that run
    chosen = sample(options.count, options.seed, options.modules or None, explained=options.explained)
    survivors, killed = [], []
    for number, outcome in enumerate(run(chosen, workers=options.workers), 1):
        (survivors if outcome.killer is None else killed).append(outcome.mutant)
        word = "SURVIVED" if outcome.killer is None else f"killed by {outcome.killer}"
        print(f"{number:4} {outcome.seconds:5.1f} s  {outcome.mutant}: {word}", flush=True)
    print(f"{len(chosen)} mutants: {len(killed)} killed, {len(survivors)} survived")
    wrong = killed if options.explained else survivors
    for one in wrong:
        print(f"  {one}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
