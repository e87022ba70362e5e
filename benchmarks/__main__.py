"""`python -m benchmarks NAME [--json]`: status 0 when every bar holds, 1 when one is missed, 2 when it cannot run."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from . import harness
from .harness import BenchmarkError, Pace

NAMES = {"exits": "exits", "import": "imports", "kick": "kick", "lifecycle": "lifecycle"}


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark and print its results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What hvmodel costs, against plain C.")
    parser.add_argument("name", choices=sorted(NAMES))
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds of each variant (7)")
    parser.add_argument(
        "--short",
        action="store_true",
        help="one small round: shows that all works, no figure means anything, no bar is asked",
    )
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    pace = Pace(rounds=1, turns=1, short=True) if options.short else Pace(rounds=options.rounds)
    from hvmodel.errors import HvError

    try:
        results = import_module(f".{NAMES[options.name]}", __package__).run(pace)
    except (BenchmarkError, HvError) as error:
        print(f"python -m benchmarks {options.name}: {error}", file=sys.stderr)
        return 2
    harness.report(options.name, results, as_json=options.json)
    missed = any(result.holds is False for result in results)
    return 1 if missed and not options.short else 0


if __name__ == "__main__":
    sys.exit(main())
