"""Breakdowns as tidy tables: phases, layers, operators and memory of every latency point."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from tunescope import latency_files as files
from tunescope import results
from tunescope.analyze.attribution import (
    Attribution,
    Recording,
    attribute,
    memory_timeline,
)
from tunescope.analyze.intervals import bootstrap_ratios
from tunescope.analyze.layouts import LAYER_ITSELF, Division
from tunescope.analyze.places import UNATTRIBUTED
from tunescope.analyze.points import Row, check_cells, identity
from tunescope.analyze.timelines import span_and_busy

ALL_LAYERS = -1
# Columns of a point that identify it in every table.
KEY = (
    "model", "dataset", "sparsity", "top_k", "per_device_batch_size", "seq_len_tokens", "preset", "num_layers",
    "total_layers", "weights", "data", "device", "folder", "point_id",
)  # fmt: skip


@dataclass(frozen=True)
class LatencyPoint:
    """One measured point with its files, read when they are asked for."""

    found: results.PointFolder
    row: Row

    @cached_property
    def recording(self) -> Recording:
        return self._recording(files.EVENTS_FILE)

    @cached_property
    def division(self) -> Division:
        return Division(self.recording.modules)

    @cached_property
    def attribution(self) -> Attribution:
        """With columns layer (ALL_LAYERS outside of them), part, below and label."""
        found = attribute(self.recording)
        work = found.work
        places = [self.division.place(module) for module in work["module"]]
        work["layer"], work["part"], work["below"] = zip(*places, strict=True) if places else ((), (), ())
        columns = (work[name] for name in ("part", "below", "node", "outer_op", "op", "name"))
        work["label"] = [self.division.op_label(*cells) for cells in zip(*columns, strict=True)]
        return found

    def read(self, name: str, schema: pa.Schema) -> pd.DataFrame:
        return results.read_arrow(self.found.path / name, schema).to_pandas()

    def _recording(self, name: str) -> Recording:
        events = self.read(name, files.EVENTS_SCHEMA)
        if (events["duration_ns"] < 0).any():
            raise results.PointFormatError(f"{self.found.path / name} holds an event of negative time")
        return Recording(
            events=events,
            calls=self.read(files.CALLS_FILE, files.CALLS_SCHEMA),
            modules=self.read(files.MODULES_FILE, files.MODULES_SCHEMA),
        )

    @cached_property
    def timed_step_ns(self) -> np.ndarray:
        assert self.found.steps is not None
        steps = self.found.steps.to_pandas()
        timed_ns = steps.loc[~steps["is_warmup"], "duration_ns"].to_numpy()
        if not len(timed_ns) or timed_ns.min() <= 0:
            raise results.PointFormatError(
                f"{self.found.path / results.STEPS_FILE} holds no timed step, or one of no time"
            )
        return timed_ns

    # --- tables; times are of one step ---

    def phases(self) -> pd.DataFrame:
        """phase, duration_s with its 95 % interval, host_duration_s, share_frac of the step: from unprofiled steps.

        Recompute lies inside backward; the others add up to the step.
        """
        phases = self.read(files.PHASES_FILE, files.PHASES_SCHEMA)
        # What is left over, `rest`, may come out a rounding below zero.
        if (phases.loc[phases["phase"] != files.REST, "duration_ns"] < 0).any():
            raise results.PointFormatError(f"{self.found.path / files.PHASES_FILE} holds a phase of negative time")
        step_s = self.timed_step_ns.mean() / 1e9
        rows = []
        for phase in files.PHASES:
            of_phase = phases[phases["phase"] == phase]
            seconds = of_phase["duration_ns"].to_numpy() / 1e9
            value, low, high = bootstrap_ratios([(seconds, np.ones(len(seconds)))])[0]
            rows.append(
                {
                    "phase": phase,
                    "duration_s": value,
                    "duration_s_low": low,
                    "duration_s_high": high,
                    "host_duration_s": of_phase["host_duration_ns"].mean() / 1e9,
                    "share_frac": value / step_s,
                    "num_steps": len(seconds),
                }
            )
        return pd.DataFrame(rows)

    def layers(self) -> pd.DataFrame:
        """layer, part, phase, busy_ns, num_launches (profiled steps), span_ns (unprofiled; NaN where not marked)."""
        work, num_steps = self.attribution.work, self.attribution.num_steps
        cells = work.groupby(["layer", "part", "phase"], sort=False)["duration_ns"].agg(["sum", "size"]) / num_steps
        cells = cells.rename(columns={"sum": "busy_ns", "size": "num_launches"}).reset_index()
        merged = cells.merge(self._spans, how="outer", on=["layer", "part", "phase"])
        return merged.fillna({"busy_ns": 0.0, "num_launches": 0.0})

    @cached_property
    def _spans(self) -> pd.DataFrame:
        spans = self.read(files.SPANS_FILE, files.SPANS_SCHEMA)
        modules = self.recording.modules
        paths = dict(zip(modules["module"], modules["path"], strict=True))
        places = [self.division.place(paths[module]) for module in spans["module"]]
        spans["layer"], spans["part"], _ = zip(*places, strict=True) if places else ((), (), ())
        spans["phase"] = spans["phase"].astype(str)
        num_steps = max(len(self.timed_step_ns), 1)
        sums = spans.groupby(["layer", "part", "phase"])["duration_ns"].sum() / num_steps
        return sums.rename("span_ns").reset_index()

    def operators(self) -> pd.DataFrame:
        """layer, part, label, phase, busy_ns, num_launches, mean_launch_ns: of op_parts."""
        work, num_steps = self.attribution.work, self.attribution.num_steps
        inside = work[work["part"].isin(self.op_parts) & (work["layer"] >= 0)]
        cells = inside.groupby(["layer", "part", "label", "phase"], sort=False)["duration_ns"].agg(["sum", "size"])
        cells = cells.reset_index()
        cells["busy_ns"], cells["num_launches"] = cells["sum"] / num_steps, cells["size"] / num_steps
        cells["mean_launch_ns"] = cells["sum"] / cells["size"]
        return cells.drop(columns=["sum", "size"])

    @property
    def op_parts(self) -> tuple[str, ...]:
        """Parts of a layer whose operators are shown, the figure's first: those that the layout divides, the one that
        takes longest where there is no layout."""
        if self.division.layout is not None:
            return tuple(self.division.layout.operators)
        work = self.attribution.work
        busy = work[(work["layer"] >= 0) & (work["part"] != LAYER_ITSELF)].groupby("part")["duration_ns"].sum()
        return (str(busy.idxmax()),) if len(busy) else ()

    @property
    def op_part(self) -> str:
        """The one that a figure looks into; empty for a model without layers."""
        return self.op_parts[0] if self.op_parts else ""

    def memory(self) -> pd.DataFrame:
        """phase, layer, part, peak_bytes, end_bytes: highest and last allocated of each, over one step.

        On a GPU absolute, anchored at what the allocator said before the optimizer. Without one it is the growth since
        the step began, and blocks that were freed without having been seen are missing.
        """
        recording = self._recording(files.MEMORY_EVENTS_FILE)
        changes = memory_timeline(recording)
        if changes.empty:
            raise results.PointFormatError(f"{self.found.path / files.MEMORY_EVENTS_FILE} holds no change of memory")
        on_gpu = (changes["device"] >= 0).any()
        changes = changes[(changes["device"] >= 0) == on_gpu].reset_index(drop=True)
        allocated = changes["allocated_bytes"].cumsum() + self._base_bytes(changes, recording.events)
        places = [self.division.place(module) for module in changes["module"]]
        changes["layer"], changes["part"], _ = zip(*places, strict=True) if places else ((), (), ())
        changes["now_bytes"] = allocated
        cells = changes.groupby(["phase", "layer", "part"], sort=False)["now_bytes"].agg(["max", "last"])
        return cells.rename(columns={"max": "peak_bytes", "last": "end_bytes"}).reset_index()

    def _base_bytes(self, changes: pd.DataFrame, events: pd.DataFrame) -> int:
        parts = self.memory_parts()
        everything = parts.loc[parts["part"] == files.EVERYTHING, "allocated_bytes"]
        if everything.empty:
            return 0
        is_moment = events["name"] == files.MARK_PREFIX + files.PRE_OPTIMIZER
        moment_ns = events.loc[is_moment, "start_ns"].max()
        return int(everything.iloc[0] - changes.loc[changes["time_ns"] <= moment_ns, "allocated_bytes"].sum())

    def memory_parts(self) -> pd.DataFrame:
        """part, allocated_bytes just before the optimizer."""
        parts = self.read(files.MEMORY_PARTS_FILE, files.MEMORY_PARTS_SCHEMA)
        if sorted(set(parts["part"]) - {files.EVERYTHING}) != sorted(files.PARTS) or parts["part"].duplicated().any():
            raise results.PointFormatError(
                f"{self.found.path / files.MEMORY_PARTS_FILE} has parts {list(parts['part'])}"
            )
        return parts

    # --- one row of facts ---

    def summary(self) -> Row:
        """How the profiled steps compare with the unprofiled ones, how busy the GPU was, how much was placed."""
        found = self.attribution
        work, num_steps = found.work, found.num_steps
        total_ns = int(work["duration_ns"].sum())
        busy = sum(
            span_and_busy(group["start_ns"].to_numpy(), (group["start_ns"] + group["duration_ns"]).to_numpy())[1]
            for _, group in work.groupby("device")
        )
        busy_step_ns = (busy if found.on_gpu else total_ns) / num_steps
        step_ns, profiled_step_ns = float(self.timed_step_ns.mean()), found.window_ns / num_steps
        # Kernels take as long under the profiler, operators on the CPU do not.
        idle_frac = 1 - busy_step_ns / (step_ns if found.on_gpu else profiled_step_ns)
        placed_ns = int(work.loc[work["phase"] != UNATTRIBUTED, "duration_ns"].sum())
        launches = len(work) / num_steps
        in_layers = work[work["layer"] >= 0].groupby("part")["duration_ns"].sum()
        of_op_part = float(in_layers.get(self.op_part, 0) / in_layers.sum()) if len(in_layers) else np.nan
        return {
            "source": "kernels" if found.on_gpu else "cpu operators' self time",
            "step_s": step_ns / 1e9,
            "profiled_step_s": profiled_step_ns / 1e9,
            "profiled_over_unprofiled": profiled_step_ns / step_ns,
            "busy_s": busy_step_ns / 1e9,
            "cells_sum_s": total_ns / num_steps / 1e9,
            "idle_frac": idle_frac,
            "num_launches": launches,
            "step_us_per_launch": step_ns / 1e3 / launches if launches else np.nan,
            "attributed_frac": placed_ns / total_ns if total_ns else np.nan,
            "op_part": self.op_part,
            "op_part_of_layers_frac": of_op_part,
            **self._span_check(),
        }

    def _span_check(self) -> Row:
        """Decoder layers' forward and recompute: from their first kernel's start to the last one's end in the profiled
        steps, against events around them in unprofiled ones."""
        work, num_steps = self.attribution.work, self.attribution.num_steps
        inside = work[(work["layer"] >= 0) & work["phase"].isin([files.FORWARD, files.RECOMPUTE])]
        inside = inside.assign(end_ns=inside["start_ns"] + inside["duration_ns"])
        ends = inside.groupby(["step", "layer", "phase"]).agg({"start_ns": "min", "end_ns": "max"})
        profiled_ns = float((ends["end_ns"] - ends["start_ns"]).sum()) / num_steps
        spans = self._spans
        of_layers = spans[(spans["part"] == LAYER_ITSELF) & spans["phase"].isin([files.FORWARD, files.RECOMPUTE])]
        return {"layer_span_s": float(of_layers["span_ns"].sum()) / 1e9, "profiled_layer_span_s": profiled_ns / 1e9}


def latency_point(found: results.PointFolder) -> Row:
    """The identity of a point; the point itself, if it is ok, under the key `point`."""
    row = identity(found)
    for name in ("oom_snapshot", "expert_probe_why_not"):
        row[name] = found.outcome.get(name)
    check_cells(row)
    for name in ("model", "dataset", "sparsity", "preset", "device", "point_id"):
        if not isinstance(row[name], str):
            raise TypeError(f"{name} is {row[name]}")
    for name in ("per_device_batch_size", "num_layers"):
        if type(row[name]) is not int:
            raise TypeError(f"{name} is {row[name]}")
    return row | ({"point": LatencyPoint(found, row)} if found.status == "ok" else {})


def key_columns(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in KEY}
