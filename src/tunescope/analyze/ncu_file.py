"""Any Nsight Compute report as a table: its launches by NVTX range or by kernel. Whose run it is does not matter."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tunescope.errors import UserError
from tunescope.ncu.counters import DURATION_NS, LAUNCH_METRICS, METRICS
from tunescope.ncu.reports import read_report

RANGE, KERNEL = "range", "kernel"
NO_RANGE = "(no range)"
_MEANS = tuple(name for name in METRICS if name != DURATION_NS and not name.endswith("_bytes"))
_SUMS = tuple(name for name in METRICS if name.endswith("_bytes"))


@dataclass(frozen=True)
class NcuGroups:
    """by: RANGE or KERNEL. groups: name, num_launches, duration_ns (sum), and of the other metrics that the report has
    the mean over time, of bytes the sum; the longest first. num_launches: of the report."""

    by: str
    groups: pd.DataFrame
    num_launches: int


def ncu_groups(path: Path, by: str | None = None) -> NcuGroups:
    """Reads a report. by: RANGE (all NVTX push/pop ranges around a launch) or KERNEL; None: by range if there is one.

    Raises UserError for a file that is none, holds no kernel, or cannot be read here.
    """
    if by not in (None, RANGE, KERNEL):
        raise UserError(f"--by {by} is unknown", cure=f"use {RANGE} or {KERNEL}")
    launches = read_report(path).to_pandas()
    ranges = [" / ".join(found) for found in launches["ranges"]]
    has_ranges = any(ranges)
    if by == RANGE and not has_ranges:
        raise UserError(
            f"{path} holds no NVTX range around a launch",
            cause="the program marked none, or ncu was run without --nvtx",
            cure=f"group by {KERNEL}",
        )
    by = by or (RANGE if has_ranges else KERNEL)
    launches["name"] = [text or NO_RANGE for text in ranges] if by == RANGE else launches[KERNEL]
    rows = [{"name": name, **_summed(group)} for name, group in launches.groupby("name", sort=False)]
    groups = pd.DataFrame(rows)
    order = groups[DURATION_NS].fillna(0).to_numpy()
    return NcuGroups(by, groups.iloc[np.argsort(-order, kind="stable")].reset_index(drop=True), len(launches))


def _summed(launches: pd.DataFrame) -> dict[str, float]:
    weights = launches[DURATION_NS].fillna(0.0)
    if not weights.sum():  # durations were not collected: launches count alike
        weights = pd.Series(1.0, index=launches.index)
    row: dict[str, float] = {"num_launches": len(launches), DURATION_NS: launches[DURATION_NS].sum(min_count=1)}
    for name in (*_MEANS, *LAUNCH_METRICS):
        has = launches[name].notna() & (weights > 0)
        row[name] = float(np.average(launches.loc[has, name], weights=weights[has])) if has.any() else np.nan
    for name in _SUMS:
        row[name] = launches[name].sum(min_count=1)
    return row
