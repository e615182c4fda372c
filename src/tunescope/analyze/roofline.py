"""The roofline of the MoE layer's operators: what each attains of the GPU's arithmetic and of its memory, and what
holds it back (Williams, Waterman, Patterson: Roofline, CACM 2009)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tunescope import results
from tunescope.analyze.kernel_tables import LAUNCHERS, device_of
from tunescope.analyze.kernels import COUNTED, MODELLED, KernelPoint
from tunescope.analyze.latency import KEY, key_columns, latency_point
from tunescope.analyze.points import Row, rows_and_frames
from tunescope.config import NCU

COMPUTE, MEMORY, LATENCY_BOUND = "compute", "memory", "latency"
# Below this part of both ceilings neither is what holds a kernel back.
BOUND_FRAC = 0.4


@dataclass(frozen=True)
class Rooflines:
    """points: one row a point, as in kernel_tables. operators: KEY, label, flop, num_bytes, busy_ns of one step,
    intensity_flop_per_byte, flop_per_s, bytes_per_s, compute_frac and memory_frac of the ceilings, bound, and source:
    of the bytes; FLOP are always counted from tensors."""

    points: pd.DataFrame
    operators: pd.DataFrame


def rooflines(folder: Path, phases: tuple[str, ...]) -> Rooflines:
    """Of every kernel point at or below `folder`, over the phases given. Raises UserError if there is none."""
    rows, frames = rows_and_frames(folder, LAUNCHERS, NCU, lambda found: _roofline_of_point(found, phases), "operators")
    columns = dict.fromkeys([*KEY, "status", "cause", *(name for row in rows for name in row)])
    operators = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*KEY, "label"])
    return Rooflines(pd.DataFrame(rows, columns=list(columns)), operators)


def _roofline_of_point(found: results.PointFolder, phases: tuple[str, ...]) -> Row:
    row = latency_point(found)
    if row.pop("point", None) is None:
        return row
    device = device_of(row, found)
    row["roofline_device"] = device.name if device else None
    if device is None:
        return row | {"cause": f"no peaks are known of {row['device']} (hardware.py)"}
    point = KernelPoint(found, row, device)
    cells = point.operators()
    cells = cells[cells["phase"].isin(phases) & (cells["num_launches"] > 0)]
    work = point.op_work()
    work = work[work["phase"].isin(phases)].groupby("label")[["flop", "num_bytes"]].sum()
    sums = cells.groupby("label", sort=False)[["busy_ns", "num_launches"]].sum().join(work, how="left")
    sums["source"] = MODELLED
    if point.is_counted:
        counted = counted_bytes(point, phases)
        sums["source"] = np.where(sums.index.isin(counted.index), COUNTED, MODELLED)
        sums["num_bytes"] = counted.reindex(sums.index).fillna(sums["num_bytes"])
    table = sums.reset_index()
    seconds = table["busy_ns"] / 1e9
    is_matmul = table["label"].str.contains("matmul")
    table["flop_per_s"], table["bytes_per_s"] = table["flop"] / seconds, table["num_bytes"] / seconds
    table["intensity_flop_per_byte"] = table["flop"] / table["num_bytes"].where(table["num_bytes"] > 0)
    peaks = np.where(is_matmul, device.peak_bf16_flop_per_s, device.peak_fp32_flop_per_s)
    table["peak_flop_per_s"] = peaks
    table["compute_frac"] = table["flop_per_s"] / peaks
    table["memory_frac"] = table["bytes_per_s"] / device.dram_bytes_per_s
    table["bound"] = [bound_of(c, m) for c, m in zip(table["compute_frac"], table["memory_frac"], strict=True)]
    return row | {"operators": table.assign(**key_columns(row))}


def counted_bytes(point: KernelPoint, phases: tuple[str, ...]) -> pd.Series:
    """Label -> DRAM bytes of one step: the mean of the launches looked into, times the launches of their kind; kinds
    that nobody looked into as the others of their label."""
    kinds = point.kinds()
    kinds = kinds[kinds["phase"].isin(phases)]
    kinds["moved"] = (kinds["dram_read_bytes"] + kinds["dram_written_bytes"]) * kinds["num_launches"]
    known = kinds[kinds["moved"].notna()].groupby("label")[["moved", "busy_ns"]].sum()
    everything = kinds.groupby("label")["busy_ns"].sum()
    return (known["moved"] / known["busy_ns"] * everything).dropna()


def bound_of(compute_frac: float, memory_frac: float) -> str:
    """What holds an operator back: the ceiling that it comes nearer to, or neither."""
    if not max(compute_frac, memory_frac) >= BOUND_FRAC:
        return LATENCY_BOUND
    return COMPUTE if compute_frac >= memory_frac else MEMORY
