"""How far off forecasts of step times were on points held out, the paper's Equation 2 beside: `table validation`."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunescope.cost.time_fit import CODE, DEVICE, HOST, Fit
from tunescope.cost.time_model import default_model
from tunescope.cost.time_packaged import own_points
from tunescope.cost.time_points import read_points
from tunescope.cost.validation import (
    COVERAGE_LEVEL,
    LEAVE_GPU,
    LEAVE_POINT,
    OWN_UNSEEN,
    SPLITS,
    HeldOut,
    Summary,
    held_out,
    summary,
)
from tunescope.report.text import check_format, text_table

# Largest median errors that this project wants, as fractions.
TARGETS = {LEAVE_POINT: 0.08, LEAVE_GPU: 0.15, OWN_UNSEEN: 0.15}
CSV_COLUMNS = (
    "split", "model", "code", "dataset", "device", "host", "top_k", "num_layers", "batch_size", "slots",
    "measured_step_s", "forecast_step_s", "low_step_s", "high_step_s", "error_percent", "is_covered",
    "is_extrapolated", "equation2_step_s", "equation2_error_percent", "source",
)  # fmt: skip


def print_validation(format: str, folder: Path | None = None) -> None:
    """Prints to stdout: text, a summary of each split and what the fit to all packaged points says; csv or json, every
    held-out point.

    folder: point folders to hold out in place of this project's packaged points. Raises UserError for another format,
    and for a folder without usable points.
    """
    check_format(format)
    rows = held_out(own_points() if folder is None else read_points(folder))
    if format == "text":
        print(validation_text(rows), constants_text(default_model().fit), sep="\n\n")
    elif format == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(_record, rows))
        print(out.getvalue(), end="")
    else:
        print(json.dumps([_without_infinity(_record(row)) for row in rows], indent=1, allow_nan=False))


def _record(row: HeldOut) -> dict[str, Any]:
    point, forecast = row.point, row.forecast
    return {
        "split": row.split,
        "model": point.model,
        "code": point.code,
        "dataset": point.dataset,
        "device": point.device.name,
        "host": point.host,
        "top_k": point.top_k,
        "num_layers": point.config["num_hidden_layers"],
        "batch_size": point.batch_size,
        "slots": point.slots,
        "measured_step_s": point.step_s,
        "forecast_step_s": forecast.median_s,
        "low_step_s": forecast.low_s,
        "high_step_s": forecast.high_s,
        "error_percent": 100 * row.error_frac,
        "is_covered": row.is_covered,
        "is_extrapolated": forecast.is_extrapolated,
        "equation2_step_s": row.paper_step_s,
        "equation2_error_percent": None if row.paper_error_frac is None else 100 * row.paper_error_frac,
        "source": point.source,
    }


def _without_infinity(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has none; what Equation 2 forecasts to take forever is empty there."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }


def validation_text(rows: Sequence[HeldOut]) -> str:
    """A table with a line for each split, GPU and code and one for all of a split, and what it means."""
    header = (
        "held out", "GPU", "code", "points", "median", "p90", "largest", "mean", "in 90 %", "Eq. 2 on", "median",
        "p90", "ours there",
    )  # fmt: skip
    lines = []
    for split in SPLITS:
        of_split = [row for row in rows if row.split == split]
        groups = list(dict.fromkeys((row.point.device.name, row.point.code) for row in of_split))
        for device, code in groups:
            here = [row for row in of_split if (row.point.device.name, row.point.code) == (device, code)]
            lines.append([split, device.removeprefix("NVIDIA "), code, *_cells(summary(here))])
        if len(groups) > 1:
            lines.append([split, "all", "", *_cells(summary(of_split))])
    pooled = summary(rows)
    return "\n".join(
        [
            "Step times of points held out: absolute errors in % of what was measured",
            "",
            text_table(header, lines, left_columns=3),
            "",
            *(_target_words(split, target, rows) for split, target in TARGETS.items()),
            _coverage_words(pooled),
            "mean: signed, above 0 where forecasts are too long. in 90 %: points inside their 90 % interval. Eq. 2:",
            "the paper's, C2 and C4 refitted on the same split, on points of the same model, data set and depth (one",
            "point out: on the same GPU), in the form that its figures draw; it does not tell GPUs, lengths or code",
            "apart. ours there: our median on the points that Eq. 2 could be refitted for. inf: it forecasts no",
            "throughput above 0.",
        ]
    )


def _cells(found: Summary) -> list[str]:
    return [
        str(found.num_points),
        _percent(found.median_frac),
        _percent(found.p90_frac),
        _percent(found.largest_frac),
        f"{100 * found.mean_frac:+.1f}",
        f"{found.num_covered} of {found.num_points}",
        str(found.num_paper or "-"),
        _percent(found.paper_median_frac),
        _percent(found.paper_p90_frac),
        _percent(found.ours_median_frac),
    ]


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def _target_words(split: str, target: float, rows: Sequence[HeldOut]) -> str:
    of_split = [row for row in rows if row.split == split]
    if not of_split:
        return f"Target, {split}: no points."
    median = summary(of_split).median_frac
    verdict = "met" if median <= target else f"missed by {100 * (median - target):.1f} points"
    return f"Target, {split}: median at most {100 * target:.0f} %: {100 * median:.1f} %, {verdict}."


def _coverage_words(pooled: Summary) -> str:
    low, high = (100 * frac for frac in pooled.coverage_interval)
    return (
        f"Coverage of the {100 * COVERAGE_LEVEL:.0f} % intervals, all splits: {pooled.num_covered} of "
        f"{pooled.num_points}, {100 * pooled.coverage_frac:.1f} % (95 % interval {low:.1f} to {high:.1f} %, "
        "as if independent)."
    )


def constants_text(fit: Fit) -> str:
    """What a fit knows: costs of the terms, factors on them, scatter."""
    costs = fit.costs
    shared = [
        ["us a launch", f"{costs.pop('launches'):.1f}"],
        ["us a kernel of a CUDA graph", f"{costs.pop('kernels'):.1f}"],
        *([f"1 / part of the peak: {name}", f"{cost:.2f}"] for name, cost in costs.items()),
        ["p: 1 adds host and GPU, infinity overlaps them wholly", f"{fit.overlap_exponent:.2f}"],
    ]
    factors = [
        *([name, f"{launches:.2f}", "-", "-"] for name, (launches,) in fit.effects(HOST).items()),
        *([name, "-", f"{traffic:.2f}", f"{matmul:.2f}"] for name, (traffic, matmul) in fit.effects(DEVICE).items()),
        *([name, *(f"{factor:.2f}" for factor in factors)] for name, factors in fit.effects(CODE).items()),
    ]
    spreads = [
        ["spread of hosts", f"{fit.spread[HOST][0]:.2f}", "-", "-"],
        ["spread of GPUs (set)", "-", *(f"{spread:.2f}" for spread in fit.spread[DEVICE])],
        ["spread of codes (set)", *(f"{spread:.2f}" for spread in fit.spread[CODE])],
    ]
    scatters = [
        [device.removeprefix("NVIDIA "), code, str(fit.num_points[group]), f"{100 * scatter:.1f}"]
        for group, scatter in fit.scatter.items()
        for _, device, code in [group]
    ]
    return "\n".join(
        [
            "Fitted to all of these points: costs that all share",
            "",
            text_table(("cost", "value"), shared, left_columns=1),
            "",
            "Factors on them, and the spread (standard deviation of the logarithm) of factors of each kind",
            "",
            text_table(
                ("host, GPU or code", "launches", "DRAM traffic", "products"), factors + spreads, left_columns=1
            ),
            "",
            "Scatter of points around their curve, % of a step",
            "",
            text_table(("GPU", "code", "points", "scatter"), scatters, left_columns=2),
        ]
    )
