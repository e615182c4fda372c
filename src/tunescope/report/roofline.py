"""The roofline of the MoE layer's operators, as a table and as a plot."""

import sys
import textwrap
from pathlib import Path
from typing import Any

from tunescope.analyze.points import UNREADABLE
from tunescope.analyze.roofline import BOUND_FRAC, Rooflines, rooflines
from tunescope.errors import UserError
from tunescope.hardware import find_device
from tunescope.ncu.settings import PHASES
from tunescope.report.text import check_format, number, records, text_table

_WIDTH = 120


def print_roofline(folder: Path, format: str, phase: str = "all", plot: Path | None = None) -> bool:
    """Prints the table to stdout, and draws it into `plot` if given (.png, .svg, .pdf). False if a point could not be
    read: stderr says why, the rest stand."""
    check_format(format)
    if phase not in ("all", *PHASES):
        raise UserError(f"--phase {phase} is unknown", cure=f"use one of all, {', '.join(PHASES)}")
    found = rooflines(folder, PHASES if phase == "all" else (phase,))
    if plot is not None:
        draw(found, plot)
    if format == "csv":
        print(found.operators.to_csv(index=False), end="")
    elif format == "json":
        print(found.operators.to_json(orient="records", indent=1))
    else:
        print(_text(found, phase))
    unreadable = found.points[found.points["status"] == UNREADABLE]
    for row in records(unreadable):
        print(f"tunescope: {row['point_id']}: {row['cause']}", file=sys.stderr)
    return unreadable.empty


def _text(found: Rooflines, phase: str) -> str:
    over = "forward, recompute and backward" if phase == "all" else phase
    header = ["operator", "bound by", "FLOP/byte", "TFLOP/s", "% of peak", "GB/s", "% of DRAM", "ms a step", "bytes"]
    blocks = []
    for row in records(found.points[found.points["status"] == "ok"]):
        cells = found.operators[found.operators["folder"] == row["folder"]]
        if cells.empty:
            blocks.append(f"{row['point_id']}: {row['cause']}")
            continue
        rows = [
            [
                str(cell["label"]),
                str(cell["bound"]),
                number(cell["intensity_flop_per_byte"]),
                number(cell["flop_per_s"] / 1e12),
                number(100 * cell["compute_frac"]),
                number(cell["bytes_per_s"] / 1e9),
                number(100 * cell["memory_frac"]),
                number(cell["busy_ns"] / 1e6),
                str(cell["source"]),
            ]
            for cell in records(cells.sort_values("busy_ns", ascending=False))
        ]
        what = f"{row['model']} {row['sparsity']} batch {int(row['per_device_batch_size'])}"
        title = f"Roofline, {what} on {row['device']}, preset {row['preset']}; {over}"
        ceilings = find_device(str(row["roofline_device"]))
        note = (
            f"Ceilings: {ceilings.name}, {ceilings.peak_bf16_flop_per_s / 1e12:.0f} TFLOP/s bf16 for matrix products, "
            f"{ceilings.peak_fp32_flop_per_s / 1e12:.0f} fp32 for others, {ceilings.dram_bytes_per_s / 1e9:.0f} GB/s. "
            f"Bound by the ceiling that is nearer; by latency where neither reaches {100 * BOUND_FRAC:.0f} %. FLOP are "
            "counted from tensors; bytes by ncu at DRAM, or modelled: every input and output once."
        )
        blocks.append(f"{title}\n\n{text_table(header, rows, left_columns=2)}\n\n{textwrap.fill(note, _WIDTH)}")
    return "\n\n".join(blocks)


def draw(found: Rooflines, path: Path) -> None:
    """One panel a point: operators by intensity and attained FLOP/s under their ceilings; area is time.

    Raises UserError where there is nothing to draw or the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [row for row in records(found.points) if (found.operators["folder"] == row.get("folder")).any()]
    if not points:
        raise UserError("there is no roofline to draw", cause="no point is whole, or of a GPU in hardware.py")
    figure, axes = plt.subplots(1, len(points), figsize=(5 * len(points), 4.2), squeeze=False, layout="constrained")
    for row, panel in zip(points, axes[0], strict=True):
        draw_point(panel, row, found)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be drawn: {error}", cure="name a file that ends in .png, .svg or .pdf"
        ) from None
    finally:
        plt.close(figure)


def draw_point(panel: Any, row: dict[str, Any], found: Rooflines) -> None:
    """One point on matplotlib's Axes."""
    cells = found.operators[(found.operators["folder"] == row["folder"]) & (found.operators["flop"] > 0)]
    device = find_device(str(row["roofline_device"]))
    low, high = 1e-2, 1e4
    for peak, label in ((device.peak_bf16_flop_per_s, "bf16"), (device.peak_fp32_flop_per_s, "fp32")):
        ridge = peak / device.dram_bytes_per_s
        panel.plot([low, ridge, high], [low * device.dram_bytes_per_s, peak, peak], color="0.5", linewidth=1)
        panel.annotate(label, (high, peak), ha="right", va="bottom", fontsize=7, color="0.4")
    shares = cells["busy_ns"] / cells["busy_ns"].sum()
    panel.scatter(cells["intensity_flop_per_byte"], cells["flop_per_s"], s=20 + 400 * shares, alpha=0.6)
    for cell in records(cells):
        panel.annotate(cell["label"], (cell["intensity_flop_per_byte"], cell["flop_per_s"]), fontsize=6)
    panel.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOP per byte", ylabel="FLOP/s")
    panel.set_title(
        f"{row['model']} {row['sparsity']} {int(row['per_device_batch_size'])}, {row['device']}", fontsize=8
    )
