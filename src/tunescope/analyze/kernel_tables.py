"""All kernel points below a folder as one set of tables, the paper's numbers beside ours."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tunescope import results
from tunescope.analyze.kernels import NCU_OVER_TRACE, TIME_WEIGHTED, VALUES, KernelPoint
from tunescope.analyze.latency import KEY, key_columns, latency_point
from tunescope.analyze.points import Row, rows_and_frames
from tunescope.config import NCU
from tunescope.hardware import Device, UnknownDevice, find_device
from tunescope.paper import latency as paper_latency
from tunescope.paper import utilization

# The paper's GPU stands in for one that is not there: its roofline is what a model on a CPU is of.
ROOFLINE_WITHOUT_GPU = "NVIDIA A40"
ALL = "all"
LAUNCHERS = "./mixtral_pf.sh or ./mamba_pf.sh"
POINT_COLUMNS = (
    *KEY, "status", "cause", "clock", "moe", "scan", "compute_dtype", "torch", "is_papers_model", "source", "op_part",
    "ncu_version", "ncu_s", "ncu_why_not", "num_sampled", "covered_frac", "sm_clock_hz", "dram_clock_hz",
    "num_unmatched", NCU_OVER_TRACE, "busy_ns",
)  # fmt: skip


@dataclass(frozen=True)
class KernelTables:
    """points: one row a point; busy_ns: the part's GPU time in one step, of the phases asked for. operators: KEY,
    label, phase, kernels.FACTS, kernels.VALUES with _spread, and the paper's value of each metric that it has;
    per phase, and over the phases asked for as phase `all`, where TIME_WEIGHTED is a row, too."""

    points: pd.DataFrame
    operators: pd.DataFrame


def kernel_tables(folder: Path, phases: tuple[str, ...]) -> KernelTables:
    """Reads every kernel point at or below `folder`. One that cannot be read is a row with status `unreadable`.

    phases: those that `all` is of. Raises UserError if there is no such folder or no point in it.
    """
    rows, frames = rows_and_frames(folder, LAUNCHERS, NCU, lambda found: _tables_of_point(found, phases), "operators")
    rows.sort(key=lambda row: (row.get("top_k") or 0, row.get("per_device_batch_size") or 0, row["point_id"]))
    columns = dict.fromkeys([*POINT_COLUMNS, *(name for row in rows for name in row)])
    operators = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*KEY, "label", "phase"])
    return KernelTables(pd.DataFrame(rows, columns=list(columns)), operators)


def _tables_of_point(found: results.PointFolder, phases: tuple[str, ...]) -> Row:
    row = latency_point(found)
    if row.pop("point", None) is None:
        return row
    device = device_of(row, found)
    point = KernelPoint(found, row, device)
    cells = point.operators()
    cells = cells[cells["num_launches"] > 0]
    asked = cells[cells["phase"].isin(phases)]
    over_phases = [
        {"label": label, **weighted(group), "source": group["source"].iloc[0]}
        for label, group in [*asked.groupby("label", sort=False), (TIME_WEIGHTED, asked)]
        if len(group)
    ]
    over = pd.DataFrame(over_phases).assign(phase=ALL)
    is_total = over["label"] == TIME_WEIGHTED
    over["share_frac"] = over["busy_ns"] / over.loc[is_total, "busy_ns"].sum()
    over["mean_launch_ns"] = over["busy_ns"] / over["num_launches"]
    operators = pd.concat([over, cells], ignore_index=True).assign(**key_columns(row))
    bar = (row["model"], row["top_k"], row["per_device_batch_size"], row["seq_len_tokens"])
    for column, lookup in (
        ("paper_sm_percent", utilization.sm_percent),
        ("paper_memory_percent", utilization.memory_percent),
        ("paper_kernel_us", paper_latency.kernel_us),
    ):
        known = lookup(*bar)
        operators[column] = [known.get(label, np.nan) for label in operators["label"]]
    total = over[is_total].iloc[0]
    row |= {
        "source": total["source"],
        "op_part": point.op_part,
        **{name: found.outcome.get(name) for name in ("ncu_version", "ncu_s", "ncu_why_not")},
        **{name: total.get(name, np.nan) for name in ("num_sampled", "covered_frac", "sm_clock_hz", "dram_clock_hz")},
        "roofline_device": device.name if device else None,
        NCU_OVER_TRACE: total.get(NCU_OVER_TRACE, np.nan),
        "num_unmatched": point.num_unmatched if point.is_counted else np.nan,
        "busy_ns": point.busy_ns(phases),
    }
    return row | {"operators": operators}


def device_of(row: Row, found: results.PointFolder) -> Device | None:
    if row["clock"] != "cuda_event":
        return find_device(ROOFLINE_WITHOUT_GPU)
    try:
        memory = (found.environment.get("gpu") or {}).get("memory_total_bytes")
        return find_device(str(row["device"]), memory / 2**30 if memory else None)
    except UnknownDevice:
        return None


def weighted(cells: pd.DataFrame) -> dict[str, float]:
    """Several rows of KernelPoint.operators as one: sums, and means over time."""
    row = {name: float(cells[name].sum()) for name in ("busy_ns", "num_launches")}
    has_samples = "num_sampled" in cells
    if has_samples:
        row["num_sampled"] = float(cells["num_sampled"].sum())
        covered_ns = (cells["covered_frac"].fillna(0) * cells["busy_ns"]).sum()
        row["covered_frac"] = float(covered_ns / row["busy_ns"]) if row["busy_ns"] else np.nan
    means = [name for name in (NCU_OVER_TRACE, *VALUES) if name in cells]
    for name in means:
        weights = cells["busy_ns"]
        if name == NCU_OVER_TRACE:  # of kinds looked into alone
            weights = weights * cells["covered_frac"]
        has = cells[name].notna() & (weights > 0)
        if not has.any():
            row[name] = np.nan
            continue
        row[name] = float(np.average(cells.loc[has, name], weights=weights[has]))
        if f"{name}_spread" in cells:
            squares = cells.loc[has, f"{name}_spread"] ** 2 + (cells.loc[has, name] - row[name]) ** 2
            row[f"{name}_spread"] = float(np.sqrt(np.average(squares, weights=cells.loc[has, "busy_ns"])))
    return row
