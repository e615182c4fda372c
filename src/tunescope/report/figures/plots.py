"""What `--plot FILE` of a parser draws: its figures on one sheet, .svg, .png or .pdf."""

from pathlib import Path

from tunescope.errors import UserError
from tunescope.ncu.settings import PHASES
from tunescope.report.figures.draw import save

SM, MEMORY = "sm", "mem"


def plot_throughput(folder: Path, file: Path) -> None:
    """Figure 8 and the energy of the points at or below `folder`. Raises UserError without points or for another kind
    of file."""
    from tunescope.analyze.throughput import throughput
    from tunescope.report.figures import throughput as figures

    table = throughput(folder)
    save([figures.figure8(table), figures.energy(table)], file)


def plot_latency(folder: Path, file: Path) -> None:
    """Figures 4, 5, 6 and 11, recompute, busy time and memory of the points at or below `folder`. Raises UserError."""
    from tunescope.analyze.latency_tables import latency_tables
    from tunescope.report.figures import latency as figures
    from tunescope.report.figures.experts import figure11

    tables = latency_tables(folder)
    makers = (figures.figure4, figures.figure5, figures.figure6, figures.recompute, figures.busy, figures.memory)
    save([*(make(tables) for make in makers), figure11(tables.experts)], file)


def plot_utilization(folder: Path, figure: str, file: Path) -> None:
    """Figure 9 (`sm`) or 10 (`mem`) of the points at or below `folder`. Raises UserError."""
    from tunescope.analyze.kernel_tables import kernel_tables
    from tunescope.report.figures.kernels import figure9, figure10

    makers = {SM: figure9, MEMORY: figure10}
    if figure not in makers:
        raise UserError(f"there is no figure {figure!r} of utilisation", cure=f"use one of {', '.join(makers)}")
    save([makers[figure](kernel_tables(folder, PHASES))], file)
