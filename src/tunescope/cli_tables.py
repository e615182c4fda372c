"""The commands of `python -m tunescope table`, which the parsers call. Each imports its own half only when called."""

from pathlib import Path
from typing import Annotated

import typer

from tunescope.errors import UserError

table_app = typer.Typer(no_args_is_help=True, help="Print a figure's table, most of them from measured points.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="folder with measured points, at any depth")]
Format = Annotated[str, typer.Option(help="text, csv or json")]
Plot = Annotated[Path | None, typer.Option(help="draw the figure into this file, too: .svg, .png or .pdf")]


@table_app.command("throughput")
def table_throughput(folder: Folder, format: Format = "text", plot: Plot = None) -> None:
    """Figure 8: queries/s, one row a bar, the paper's A40 beside it."""
    if plot is not None:
        from tunescope.report.figures.plots import plot_throughput

        plot_throughput(folder, plot)
    from tunescope.report.throughput import print_throughput

    if not print_throughput(folder, format):
        raise typer.Exit(UserError.EXIT_CODE)


@table_app.command("latency")
def table_latency(
    folder: Folder,
    format: Format = "text",
    layer: Annotated[int | None, typer.Option(help="one decoder layer, from 0, instead of their sum")] = None,
    plot: Plot = None,
) -> None:
    """Figures 4, 5 and 11, and what the profiler sees of Figure 6: phases, layers, operators, memory, experts."""
    if plot is not None:
        from tunescope.report.figures.plots import plot_latency

        plot_latency(folder, plot)
    from tunescope.report.latency import print_latency

    if not print_latency(folder, format, layer):
        raise typer.Exit(UserError.EXIT_CODE)


Phase = Annotated[str, typer.Option(help="all, forward, recompute or backward")]
Metric = Annotated[str | None, typer.Option(help="another counter instead, as dram_percent or occupancy_percent")]


@table_app.command("sm")
def table_sm(
    folder: Folder, format: Format = "text", phase: Phase = "all", metric: Metric = None, plot: Plot = None
) -> None:
    """Figures 6 and 9: SM utilisation of the MoE layer's kernels, the paper's A40 beside it."""
    from tunescope.report.kernels import SM, print_utilization

    if plot is not None:
        from tunescope.report.figures.plots import plot_utilization

        plot_utilization(folder, "sm", plot)
    if not print_utilization(folder, SM, format, phase, metric):
        raise typer.Exit(UserError.EXIT_CODE)


@table_app.command("mem")
def table_mem(
    folder: Folder, format: Format = "text", phase: Phase = "all", metric: Metric = None, plot: Plot = None
) -> None:
    """Figures 6 and 10: memory utilisation of the MoE layer's kernels, as the paper counts it, and of DRAM."""
    from tunescope.report.kernels import MEMORY, print_utilization

    if plot is not None:
        from tunescope.report.figures.plots import plot_utilization

        plot_utilization(folder, "mem", plot)
    if not print_utilization(folder, MEMORY, format, phase, metric):
        raise typer.Exit(UserError.EXIT_CODE)


@table_app.command("kernels")
def table_kernels(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="a PyTorch trace, .json or .json.gz")],
    format: Format = "text",
    limit: Annotated[int, typer.Option(help="kernels and operators shown; the rest is one row")] = 30,
) -> None:
    """Kernels, the operators that launched them, and idle time of any PyTorch trace, NVIDIA or ROCm."""
    from tunescope.report.trace_kernels import print_kernels

    if not print_kernels(trace, format, limit):
        raise typer.Exit(UserError.EXIT_CODE)


@table_app.command("roofline")
def table_roofline(
    folder: Folder,
    format: Format = "text",
    phase: Phase = "all",
    plot: Plot = None,
) -> None:
    """Operators of the MoE layer against the GPU's ceilings: bound by compute, memory or latency."""
    from tunescope.report.roofline import print_roofline

    if not print_roofline(folder, format, phase, plot):
        raise typer.Exit(UserError.EXIT_CODE)


@table_app.command("ncu")
def table_ncu(
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="a .ncu-rep file, of whatever program")],
    by: Annotated[str | None, typer.Option(help="range or kernel; range if the report has NVTX ranges")] = None,
    format: Format = "text",
    limit: Annotated[int | None, typer.Option(help="rows; 40 in text, all in csv and json if not given")] = None,
) -> None:
    """Launches of any Nsight Compute report, by NVTX range or kernel."""
    from tunescope.report.ncu_file import print_ncu_file

    print_ncu_file(report, format, by, limit)


@table_app.command("paper-model")
def table_paper_model(format: Format = "text") -> None:
    """Figures 13 to 15, Tables III and IV: what the paper's own model gives, beside what the paper prints."""
    from tunescope.report.paper_model import print_paper_model

    print_paper_model(format)


@table_app.command("validation")
def table_validation(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="points to hold out instead of the project's own")
    ] = None,
    format: Format = "text",
) -> None:
    """Forecasts of step times on points held out: the paper's and this project's own, the paper's Equation 2 beside."""
    from tunescope.report.validation import print_validation

    print_validation(format, folder)
