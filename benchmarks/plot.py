"""The picture of `--plot`: one panel per kind of work, our ways in colours, C's floor in grey behind each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from . import harness
from .harness import BenchmarkError, Curve, Findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check", "draw", "size_text"]

# Colours that the colour-blind tell apart too.
LOOKS = tuple(
    zip(("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"), "os^Dv<>", strict=True)
)
FLOOR_COLOUR = "0.55"
UNITS = ((30, "GiB"), (20, "MiB"), (10, "KiB"))


def size_text(size: int) -> str:
    """A size as people write it.

    >>> size_text(4096), size_text(1 << 30), size_text(100)
    ('4 KiB', '1 GiB', '100 B')
    """
    for shift, unit in UNITS:
        if size and not size & ((1 << shift) - 1):
            return f"{size >> shift} {unit}"
    return f"{size} B"


def check(path: str) -> None:
    """Say before the measurement what would make `draw` fail after it.  Raises BenchmarkError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise BenchmarkError("--plot needs matplotlib: pip install 'hvmodel[plot]'") from None
    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if Path(path).suffix.removeprefix(".") not in known:
        raise BenchmarkError(f"--plot {path}: the name must end in one of {', '.join(known)}")
    if not Path(path).resolve().parent.is_dir():
        raise BenchmarkError(f"--plot {path}: there is no such directory")


def draw(name: str, found: Findings, path: str) -> None:
    """Write the curves of a benchmark to `path`, in the format that its suffix names.  Raises BenchmarkError."""
    from matplotlib.figure import Figure

    panels: dict[str, list[Curve]] = {}
    for curve in found.curves:
        panels.setdefault(curve.panel, []).append(curve)
    ways = list(dict.fromkeys(curve.way for curve in found.curves))  # a way looks the same in each panel
    if not panels:
        raise BenchmarkError(f"--plot {path}: there is nothing to draw: {found.lacks}")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1 + 5.5 * columns, 0.4 + 4.8 * rows), layout="constrained")
    machine = harness.host()
    figure.suptitle(
        f"python -m benchmarks {name}: Linux {machine['kernel']}, {machine['cpu']} x {machine['cpus']}, "
        f"Python {machine['python']}",
        fontsize="medium",
    )
    for place, (title, curves) in enumerate(panels.items(), 1):
        _panel(figure.add_subplot(rows, columns, place), title, curves, ways)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise BenchmarkError(f"--plot {path}: {error.strerror}") from None


def _panel(axes: Axes, title: str, curves: list[Curve], all_ways: list[str]) -> None:
    floors: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for curve in curves:
        floors.setdefault(tuple(curve.floor), []).append(curve.way)
    for style, (floor, ways) in zip(("-", "--", ":", "-."), floors.items(), strict=False):
        label = "C" if len(floors) == 1 else f"C: {', '.join(ways)}"
        axes.plot(*zip(*floor, strict=True), color=FLOOR_COLOUR, linewidth=3, linestyle=style, label=label)
    for curve in curves:
        colour, marker = LOOKS[all_ways.index(curve.way) % len(LOOKS)]
        axes.plot(
            *zip(*curve.points, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.2, label=curve.way
        )
    sizes = sorted({size for curve in curves for size, _ in curve.points})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [size_text(size) for size in sizes], rotation=60)
    axes.minorticks_off()
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
    low, high = axes.get_ylim()
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.set_ylabel("GiB/s")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
