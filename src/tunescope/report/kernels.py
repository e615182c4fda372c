"""Figures 6, 9 and 10 as tables: SM and memory utilisation of the MoE layer's kernels, the paper's A40 beside."""

import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tunescope import paper, results
from tunescope.analyze.kernel_tables import ALL, KernelTables, kernel_tables
from tunescope.analyze.kernels import COUNTED, NCU_OVER_TRACE, TIME_WEIGHTED, VALUES
from tunescope.analyze.points import UNREADABLE
from tunescope.errors import UserError
from tunescope.families import find_family
from tunescope.ncu.counters import DRAM_PERCENT, MEMORY_PERCENT, METRICS, SM_PERCENT
from tunescope.ncu.settings import PHASES
from tunescope.report.text import check_format, number, records, text_table

_WIDTH = 120


@dataclass(frozen=True)
class Figure:
    """One of the two tables. metric: shown by default. beside: another that stands next to it."""

    title: str
    metric: str
    paper_column: str
    beside: str | None = None


SM = Figure("Figure 9: SM utilisation (%)", SM_PERCENT, "paper_sm_percent")
MEMORY = Figure(
    'Figure 10: memory utilisation (ncu\'s "Memory [%]")', MEMORY_PERCENT, "paper_memory_percent", DRAM_PERCENT
)
_BESIDE_TITLES = {DRAM_PERCENT: "DRAM"}


def print_utilization(folder: Path, figure: Figure, format: str, phase: str = ALL, metric: str | None = None) -> bool:
    """Prints a figure's tables to stdout. False if a point could not be read: stderr says why, the rest stand.

    phase: forward, recompute, backward, or all of them. metric: another of ncu.counters.METRICS.
    """
    check_format(format)
    if phase not in (ALL, *PHASES):
        raise UserError(f"--phase {phase} is unknown", cure=f"use one of {ALL}, {', '.join(PHASES)}")
    if metric is not None and metric not in VALUES:
        raise UserError(f"--metric {metric} is unknown", cure=f"use one of {', '.join(VALUES)}")
    if metric is not None and metric != figure.metric:
        figure = Figure(f"{metric} ({METRICS[metric]})", metric, "")
    tables = kernel_tables(folder, PHASES if phase == ALL else (phase,))
    if format == "csv":
        print(tidy(tables).to_csv(index=False), end="")
    elif format == "json":
        frames = {"points": tables.points, "operators": tables.operators}
        content = {
            name: json.loads(frame.to_json(orient="records", double_precision=15)) for name, frame in frames.items()
        }
        print(json.dumps(content, indent=1, allow_nan=False))
    else:
        num_unfinished = len(results.find_unfinished(folder))
        print(utilization_text(tables, figure, phase, num_unfinished=num_unfinished))
    unreadable = tables.points[tables.points["status"] == UNREADABLE]
    for row in records(unreadable):
        print(f"tunescope: {row['point_id']}: {row['cause']}", file=sys.stderr)
    return unreadable.empty


def tidy(tables: KernelTables) -> pd.DataFrame:
    """Operators with what their points say of the counting, one row each."""
    facts = ["folder", "status", "ncu_version", "ncu_why_not", "roofline_device", "moe", "scan", "torch"]
    known = [name for name in facts if name in tables.points]
    return tables.operators.merge(tables.points[known], how="left", on="folder")


def utilization_text(tables: KernelTables, figure: Figure, phase: str = ALL, *, num_unfinished: int = 0) -> str:
    points = tables.points
    ok = points[points["status"] == "ok"]
    over = "forward, recompute and backward" if phase == ALL else phase
    blocks: list[str] = []
    for (model, device, preset), group in ok.groupby(["model", "device", "preset"], sort=False):
        cells = tables.operators[(tables.operators["phase"] == ALL) & tables.operators["folder"].isin(group["folder"])]
        part = str(group["op_part"].iloc[0])
        where = f"{part} of {model} on {device}, preset {preset}; {over}"
        labels = _labels(str(model), set(cells["label"]))
        blocks.append(f"{figure.title}, {where}\n\n{_figure_table(cells, group, figure, labels)}")
        blocks.append(_figure_notes(group, figure))
        blocks.append(f"Kernels behind it, {where}\n\n{_details_table(cells, group, figure, labels)}")
        blocks.append(_details_notes(cells))
        blocks.append(f"How it was counted\n\n{_quality_table(group)}")
        blocks.append(_checks(tables.operators, group, figure, phase))
        blocks.append(_quality_notes(group))
    others = points[points["status"] != "ok"]
    if not others.empty:
        rows = [(str(row["point_id"]), str(row["status"]), str(row["cause"])[:90]) for row in records(others)]
        blocks.append("Points without kernels\n\n" + text_table(("point", "status", "cause"), rows, left_columns=3))
    if num_unfinished:
        blocks.append(f"{num_unfinished} point(s) were begun and not finished; run the launcher again to measure them.")
    return "\n\n".join(block for block in blocks if block)


def _labels(model: str, present: set[str]) -> list[str]:
    """Operators in the order of the model's layout, those that it does not name after them, the mean over time last."""
    order = [label for label in find_family(model).layout.op_order if label in present]
    return [*order, *sorted(present - set(order) - {TIME_WEIGHTED}), TIME_WEIGHTED]


def _figure_table(cells: pd.DataFrame, group: pd.DataFrame, figure: Figure, labels: list[str]) -> str:
    with_paper = figure.paper_column in cells and cells[figure.paper_column].notna().any()
    header = ["operator"]
    for row in records(group):
        header.append(_bar(row))
        if figure.beside:
            header.append(_BESIDE_TITLES[figure.beside])
        if with_paper:
            header += ["paper", "points"]
    rows = []
    for label in labels:
        line = [label]
        for row in records(group):
            cell = _cell(cells, row, label)
            value: Any = cell.get(figure.metric)
            line.append(number(value))
            if figure.beside:
                line.append(number(cell.get(figure.beside)))
            if with_paper:
                theirs: Any = cell.get(figure.paper_column)
                line += [number(theirs), f"{value - theirs:+.1f}" if _are_numbers(value, theirs) else "-"]
        rows.append(line)
    return text_table(header, rows, left_columns=1)


def _are_numbers(*values: Any) -> bool:
    return all(pd.notna(value) for value in values)


def _cell(cells: pd.DataFrame, row: dict[str, Any], label: str) -> dict[str, Any]:
    found = cells[(cells["folder"] == row["folder"]) & (cells["label"] == label)]
    return {} if found.empty else records(found)[0]


def _details_table(cells: pd.DataFrame, group: pd.DataFrame, figure: Figure, labels: list[str]) -> str:
    with_paper = cells["paper_kernel_us"].notna().any()
    header = [
        "operator",
        "point",
        "us each",
        "launches",
        "share %",
        "counted",
        "of its time %",
        "spread",
        "ncu / trace",
        "source",
    ]
    if with_paper:
        header.insert(3, "paper us")
    rows = []
    for label in labels:
        for row in records(group):
            cell = _cell(cells, row, label)
            if not cell:
                continue
            line = [
                label,
                _bar(row),
                number(cell["mean_launch_ns"] / 1e3),
                number(cell["num_launches"], 4),
                number(100 * cell["share_frac"]),
                number(cell.get("num_sampled")),
                number(100 * cell["covered_frac"]) if pd.notna(cell.get("covered_frac")) else "-",
                number(cell.get(f"{figure.metric}_spread")),
                number(cell.get(NCU_OVER_TRACE)),
                str(cell["source"]),
            ]
            if with_paper:
                line.insert(3, number(cell["paper_kernel_us"]))
            rows.append(line)
    return text_table(header, rows, left_columns=2)


def _quality_table(group: pd.DataFrame) -> str:
    header = [
        "point",
        "source",
        "ncu",
        "s under ncu",
        "counted",
        "of the time %",
        "ncu / trace time",
        "SM MHz",
        "DRAM MHz",
    ]
    rows = [
        [
            _bar(row),
            str(row["source"]),
            str(row["ncu_version"] or "-"),
            number(row["ncu_s"]),
            number(row["num_sampled"]),
            number(100 * row["covered_frac"]) if pd.notna(row["covered_frac"]) else "-",
            number(row[NCU_OVER_TRACE]),
            number(row["sm_clock_hz"] / 1e6) if pd.notna(row["sm_clock_hz"]) else "-",
            number(row["dram_clock_hz"] / 1e6) if pd.notna(row["dram_clock_hz"]) else "-",
        ]
        for row in records(group)
    ]
    return text_table(header, rows, left_columns=3)


def _checks(operators: pd.DataFrame, group: pd.DataFrame, figure: Figure, phase: str) -> str:
    """What must agree, from the rows of each operator in each phase: a difference is a fault of the program."""
    phases = PHASES if phase == ALL else (phase,)
    lines = []
    for row in records(group):
        cells = operators[operators["folder"] == row["folder"]]
        rows = cells[cells["phase"].isin(phases)]
        shown = cells.loc[(cells["phase"] == ALL) & (cells["label"] == TIME_WEIGHTED), figure.metric].iloc[0]
        known = rows[rows[figure.metric].notna()]
        line = f"Check of {_bar(row)}: "
        if pd.notna(row["busy_ns"]):
            line += (
                f"rows add up to {rows['busy_ns'].sum() / 1e6:.3f} ms a step, the trace has {row['busy_ns'] / 1e6:.3f}"
            )
            line += " of this part; "
        again = (known[figure.metric] * known["busy_ns"]).sum() / known["busy_ns"].sum() if len(known) else float("nan")
        line += f"{TIME_WEIGHTED} from the rows {number(again)}, shown {number(shown)}"
        if pd.notna(row["num_unmatched"]) and row["num_unmatched"]:
            line += f"; {row['num_unmatched']:.0f} launches that ncu looked into are not in the trace at their place"
        lines.append(f"{line}.")
    return _wrapped(lines)


def _figure_notes(group: pd.DataFrame, figure: Figure) -> str:
    lines = [
        f"{METRICS[figure.metric]}: mean of a row's launches, each kind of them (module, phase, kernel) weighted by "
        f"the time that an unprofiled trace gives it. {TIME_WEIGHTED}: all rows.",
    ]
    if figure.metric == MEMORY_PERCENT:
        lines.append("It is the busiest unit of the memory system, not DRAM, which has a column of its own.")
    if figure.paper_column:
        lines.append(
            f"paper: on an {paper.GPU}, one launch for one expert, forward (Mixtral where backward recomputes it); "
            "points: ours less the paper's. Different GPUs, and kernels of 2024: read the differences as that."
        )
    if (group["source"] != COUNTED).any():
        lines.append(
            "modelled: the least FLOP and bytes of each operator over its time, against the data sheet's peak; of a "
            "matrix product the tensor cores'. What an instruction count would add is not in it."
        )
    return _wrapped(lines)


def _details_notes(cells: pd.DataFrame) -> str:
    return _wrapped(
        [
            "us each, launches: of one step, from the trace. share: of this part's time. counted: launches that ncu "
            "looked into; of its time: what share of the row's time is of kinds with at least one of them, where "
            "forward and its recompute stand for each other. spread: standard deviation over counted launches, "
            "weighted alike. ncu / trace: mean duration of a launch by ncu over that by the trace.",
        ]
    )


def _quality_notes(group: pd.DataFrame) -> str:
    lines = [
        "ncu / trace time: mean duration of a launch by ncu over the trace's, weighted by time. ncu empties the caches "
        "before each replay and replays one launch at a time, so small kernels take longer there.",
    ]
    for reason in sorted({str(reason) for reason in group["ncu_why_not"].dropna()}):
        lines.append(f"No counters: {reason}.")
    for device in sorted({str(name) for name in group.loc[group["clock"] != "cuda_event", "roofline_device"].dropna()}):
        lines.append(
            f"Without a GPU a kernel's time is what its FLOP and bytes would take at the peaks of an {device}."
        )
    if "tiny" in set(group["preset"]):
        lines.append("Preset tiny shows that everything works, and says nothing of the paper's model.")
    return _wrapped(lines)


def _bar(row: dict[str, Any]) -> str:
    return f"{row['sparsity']} {int(row['per_device_batch_size'])}"


def _wrapped(lines: list[str]) -> str:
    return "\n".join(textwrap.fill(line, _WIDTH) for line in lines)
