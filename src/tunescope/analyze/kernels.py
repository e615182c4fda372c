"""Kernels of the MoE layer: how each used the GPU, counted by Nsight Compute, or modelled where nothing may count.

Launches and their times come from the trace of an unprofiled run of the same point (unprofiled by ncu, that is); what a
launch does to the GPU comes from the few that ncu looked into. They meet in kinds: phase, module without the numbers of
layer and expert, kernel. A row of a table is the mean of its kinds, each weighted by the time that the trace gives it.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from tunescope.analyze.latency import LatencyPoint
from tunescope.hardware import Device
from tunescope.ncu.counters import (
    COUNTERS_FILE,
    COUNTERS_SCHEMA,
    DRAM_PERCENT,
    DURATION_NS,
    MEMORY_PERCENT,
    METRICS,
    OP_WORK_FILE,
    OP_WORK_SCHEMA,
    SM_PERCENT,
)
from tunescope.ncu.ranges import place_of

COUNTED, MODELLED = "ncu", "modelled"
TIME_WEIGHTED = "time_weighted"
KIND = ["phase", "path", "name"]
# What a row of a table has besides metrics.
NCU_OVER_TRACE = "ncu_over_trace_time"
FACTS = (
    "busy_ns", "num_launches", "mean_launch_ns", "num_sampled", "covered_frac", "share_frac", "source", NCU_OVER_TRACE,
)  # fmt: skip
VALUES = tuple(name for name in METRICS if name != DURATION_NS)
_TWINS = {"forward": "recompute", "recompute": "forward"}
_LEAST_LAUNCH_NS = 2_000.0  # of a kernel that does nothing


@dataclass(frozen=True)
class KernelPoint(LatencyPoint):
    """One point of `run kernels`. device: of hardware.py, whose peaks a model divides by; None if it is not known."""

    device: Device | None = None

    @cached_property
    def is_counted(self) -> bool:
        return (self.found.path / COUNTERS_FILE).is_file()

    @cached_property
    def launches(self) -> pd.DataFrame:
        """phase, path, name (of the kernel), label, busy_ns and num_launches of one step: a row a kind."""
        work = self.attribution.work
        inside = work[(work["part"] == self.op_part) & (work["layer"] >= 0)].copy()
        inside["path"] = [without_numbers(below) for below in inside["below"]]
        inside["name"] = [plain_kernel(name) for name in inside["name"]]
        kinds = inside.groupby([*KIND, "label"], sort=False)["duration_ns"].agg(["sum", "size"]).reset_index()
        kinds["busy_ns"] = kinds["sum"] / self.attribution.num_steps
        kinds["num_launches"] = kinds["size"] / self.attribution.num_steps
        return kinds.drop(columns=["sum", "size"])

    @cached_property
    def sampled(self) -> pd.DataFrame:
        """One row a launch that ncu looked into: phase, path, name, label and the columns of METRICS."""
        counters = self.read(COUNTERS_FILE, COUNTERS_SCHEMA)
        labels = {tuple(row[:3]): row[3] for row in self.launches[[*KIND, "label"]].itertuples(index=False)}
        alike = self._kernels_alone_of_their_function
        rows = []
        for row in counters.to_dict("records"):
            place = place_of(row["ranges"])
            if place is None:
                continue
            phase, module, op, node = place
            layer, part, below = self.division.place(module)
            if part != self.op_part or layer < 0:
                continue
            path = without_numbers(below)
            # The trace has a long name as the compiler gave it.
            names = [plain_kernel(str(row[column])) for column in ("kernel", "mangled")]
            name = next((name for name in names if (phase, path, name) in labels), None)
            name = name or alike.get((phase, path, function_of(names[0]))) or names[0]
            label = labels.get((phase, path, name))
            if label is None:  # not in the trace: a kernel that the library chose otherwise under ncu
                label = self.division.op_label(part, below, node, op, op, str(row["kernel"]))
            rows.append(row | {"phase": phase, "path": path, "name": name, "label": label, "op": op})
        return pd.DataFrame(rows, columns=[*KIND, "label", "op", *METRICS, "grid_blocks", "block_threads"])

    @property
    def _kernels_alone_of_their_function(self) -> dict[tuple[str, str, str], str]:
        """(phase, path, function) -> kernel, where only one instance of that function was launched there."""
        found: dict[tuple[str, str, str], set[str]] = {}
        for phase, path, name in self.launches[KIND].itertuples(index=False):
            found.setdefault((phase, path, function_of(name)), set()).add(name)
        return {place: next(iter(names)) for place, names in found.items() if len(names) == 1}

    def busy_ns(self, phases: tuple[str, ...]) -> float:
        """GPU time of the part in one step, straight from the trace; NaN where it has no GPU."""
        work = self.attribution.work
        inside = (work["part"] == self.op_part) & (work["layer"] >= 0) & work["phase"].isin(phases)
        total_ns = float(work.loc[inside, "duration_ns"].sum()) / self.attribution.num_steps
        return total_ns if self.attribution.on_gpu else np.nan

    def kinds(self) -> pd.DataFrame:
        """The rows of `launches`, with num_sampled, is_covered, and mean and variance over samples of DURATION_NS and
        each of VALUES. Forward and its recompute launch the same kernels on the same shapes: where only one of them was
        looked into, the other's row has its values, is covered, and has 0 samples."""
        groups = self.sampled.groupby(KIND, sort=False)
        found = groups.size().rename("num_sampled").to_frame()
        for name in (DURATION_NS, *VALUES):
            found[name] = groups[name].mean()
            found[f"{name}_var"] = groups[name].var(ddof=0)
        found = found.reset_index()
        twins = found[found["phase"].isin(list(_TWINS))].assign(num_sampled=0)
        twins = twins.assign(phase=twins["phase"].map(_TWINS))
        found = pd.concat([found, twins], ignore_index=True).drop_duplicates(KIND, keep="first")
        kinds = self.launches.merge(found, how="left", on=KIND)
        return kinds.assign(is_covered=kinds["num_sampled"].notna()).fillna({"num_sampled": 0})

    @property
    def num_unmatched(self) -> int:
        """Launches that ncu looked into, and that the trace does not have at their place. Where the library chooses
        another kernel under ncu, or torch another operator."""
        found = self.sampled.merge(self.launches[KIND], how="left", on=KIND, indicator=True)
        return int((found["_merge"] == "left_only").sum())

    def operators(self) -> pd.DataFrame:
        """label, phase, FACTS and VALUES with their spread, a row for each operator in each phase."""
        return self._counted() if self.is_counted else self._modelled()

    def _counted(self) -> pd.DataFrame:
        kinds = self.kinds()
        rows = [
            {"label": label, "phase": phase, **combined(group), "source": COUNTED}
            for (label, phase), group in kinds.groupby(["label", "phase"], sort=False)
        ]
        return with_shares(pd.DataFrame(rows))

    def _modelled(self) -> pd.DataFrame:
        """From the least FLOP and bytes of each operator over its time; without a GPU over the time they would take."""
        work = self.op_work()
        busy = self.launches.groupby(["label", "phase"], sort=False)[["busy_ns", "num_launches"]].sum()
        sums = work.groupby(["label", "phase"], sort=False)[["flop", "num_bytes", "num_calls"]].sum()
        cells = busy.join(sums, how="outer").fillna(0.0).reset_index()
        cells["source"] = MODELLED
        for name in VALUES:
            cells[name] = np.nan
        if self.device is None:
            return with_shares(cells)
        is_matmul = cells["label"].str.contains("matmul")
        peaks = np.where(is_matmul, self.device.peak_bf16_flop_per_s, self.device.peak_fp32_flop_per_s)
        flop_ns = cells["flop"] / peaks * 1e9
        bytes_ns = cells["num_bytes"] / self.device.dram_bytes_per_s * 1e9
        if not self.attribution.on_gpu:
            least_ns = cells["num_calls"] * _LEAST_LAUNCH_NS
            cells["busy_ns"] = np.maximum(np.maximum(flop_ns, bytes_ns), least_ns)
            cells["num_launches"] = cells["num_calls"]
        busy_ns = cells["busy_ns"].where(cells["busy_ns"] > 0)
        cells[SM_PERCENT] = 100 * flop_ns / busy_ns
        cells[MEMORY_PERCENT] = cells[DRAM_PERCENT] = 100 * bytes_ns / busy_ns
        return with_shares(cells)

    def op_work(self) -> pd.DataFrame:
        """label, phase, flop, num_bytes, num_calls: a row for each operator of each module of the part, one step."""
        work = self.read(OP_WORK_FILE, OP_WORK_SCHEMA)
        places = [self.division.place(path) for path in work["path"]]
        work["layer"], work["part"], work["below"] = zip(*places, strict=True) if places else ((), (), ())
        work = work[(work["part"] == self.op_part) & (work["layer"] >= 0)].copy()
        columns = (work[name] for name in ("below", "node", "op"))
        work["label"] = [
            self.division.op_label(self.op_part, below, node, op, op, op)
            for below, node, op in zip(*columns, strict=True)
        ]
        work["num_bytes"] = work["read_bytes"] + work["written_bytes"]
        return work


def combined(kinds: pd.DataFrame) -> dict[str, float]:
    """One row out of several kinds: sums of what adds up, and of each metric the mean over time.

    NaN where none of the kinds was looked into. spread: standard deviation over the launches looked into, each kind
    weighted by its time. NCU_OVER_TRACE: mean duration of a launch by ncu over that by the trace: 1, or more of what is
    short, as ncu empties the caches before each replay; where they are far apart they speak of different kernels.
    """
    busy_ns = float(kinds["busy_ns"].sum())
    row = {
        "busy_ns": busy_ns,
        "num_launches": float(kinds["num_launches"].sum()),
        "num_sampled": float(kinds["num_sampled"].sum()),
        "covered_frac": float(kinds.loc[kinds["is_covered"], "busy_ns"].sum()) / busy_ns if busy_ns else np.nan,
    }
    timed = kinds[kinds[DURATION_NS].notna() & (kinds["busy_ns"] > 0)]
    ratios = timed[DURATION_NS] * timed["num_launches"] / timed["busy_ns"]
    row[NCU_OVER_TRACE] = float(np.average(ratios, weights=timed["busy_ns"])) if len(timed) else np.nan
    for name in VALUES:
        has = kinds[name].notna() & (kinds["busy_ns"] > 0)
        weights, values = kinds.loc[has, "busy_ns"], kinds.loc[has, name]
        if not len(values):
            row[name] = row[f"{name}_spread"] = np.nan
            continue
        mean = float(np.average(values, weights=weights))
        between = np.average((values - mean) ** 2, weights=weights)
        within = np.average(kinds.loc[has, f"{name}_var"], weights=weights) if f"{name}_var" in kinds else 0.0
        row[name], row[f"{name}_spread"] = mean, float(np.sqrt(between + within))
    return row


def with_shares(rows: pd.DataFrame) -> pd.DataFrame:
    rows["mean_launch_ns"] = rows["busy_ns"] / rows["num_launches"].where(rows["num_launches"] > 0)
    rows["share_frac"] = rows["busy_ns"] / rows["busy_ns"].sum()
    return rows


def without_numbers(path: str) -> str:
    return re.sub(r"\.\d+\b", ".*", path)


def plain_kernel(name: str) -> str:
    """A kernel's name as both the profiler and ncu have it: they print types and namespaces each in its own way."""
    return re.sub(r"^void |\s+|\(anonymous namespace\)::|(?:<unnamed>|unnamed>|\(unnamed\))::", "", name)


def function_of(kernel: str) -> str:
    """The function's own name, of a plain_kernel: without namespaces, template arguments and parameters."""
    return re.split(r"[<(]", kernel, maxsplit=1)[0].rpartition("::")[2] or kernel
