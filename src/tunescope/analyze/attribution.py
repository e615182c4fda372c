"""Puts every piece of recorded work in one cell: phase, module, autograd node, operator.

Work is what ran on the GPU (kernels, copies, memsets) or, in a recording without a GPU, operators' self time. Work of a
GPU belongs where it was launched: to the place of the call of the CUDA library that launched it (places.py).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from tunescope import latency_files as files
from tunescope.analyze.places import Places


@dataclass(frozen=True)
class Recording:
    """What a recorder left: latency_files.EVENTS_SCHEMA, CALLS_SCHEMA and MODULES_SCHEMA as DataFrames."""

    events: pd.DataFrame
    calls: pd.DataFrame
    modules: pd.DataFrame

    @classmethod
    def from_tables(cls, events: pa.Table, calls: pa.Table, modules: pa.Table) -> "Recording":
        return cls(events.to_pandas(), calls.to_pandas(), modules.to_pandas())


@dataclass(frozen=True)
class Attribution:
    """work: one row a piece of work, see `attribute`.

    window_ns: length of all recorded steps together, each up to the end of its last work. num_steps: how many they are.
    on_gpu: work is GPU activities, else operators' self time.
    """

    work: pd.DataFrame
    window_ns: int
    num_steps: int
    on_gpu: bool


def attribute(recording: Recording) -> Attribution:
    """Every piece of work with its place.

    Columns of `work`: kind, name (kernel or operator), device, stream, start_ns, duration_ns, step (recorded step in
    which it was launched, from 0; -1 unknown), phase, module (path, or a name in parentheses), call (its number,
    or -1), node (autograd node's name, or ""), op (innermost operator that launched it), outer_op (outermost operator
    within the module or node). Durations are those recorded: the cells' sum is the sum of the kernels' durations, to
    the nanosecond.
    """
    events = recording.events.sort_values(["start_ns", "duration_ns"], ascending=[True, False], ignore_index=True)
    is_gpu = events["kind"].isin(files.GPU_KINDS)
    cpu = events[~is_gpu & (events["kind"] != files.MEMORY)].reset_index(drop=True)
    gpu = events[is_gpu].reset_index(drop=True)
    placed = Places(cpu, recording.modules, recording.calls)
    begins = _mark_times(cpu, files.RESUME)
    if len(gpu):
        launching = _launching(gpu, cpu)
        work = gpu[["kind", "name", "device", "thread", "start_ns", "duration_ns"]]
    else:
        launching = np.flatnonzero((cpu["kind"] == files.OP).to_numpy())
        work = cpu.loc[launching, ["kind", "name", "device", "thread", "start_ns"]].reset_index(drop=True)
        work["duration_ns"] = placed.self_ns()[launching]
    launched_ns = np.append(cpu["start_ns"].to_numpy(), -1)[launching]
    work = work.rename(columns={"thread": "stream"}).assign(step=np.searchsorted(begins, launched_ns, side="right") - 1)
    work = pd.concat([work, placed.of(launching)], axis=1)
    window_ns, num_steps = _window(begins, _mark_times(cpu, files.STEP_END), work, events)
    return Attribution(work, window_ns, num_steps, bool(len(gpu)))


def _mark_times(cpu: pd.DataFrame, mark: str) -> np.ndarray:
    return cpu.loc[(cpu["kind"] == files.MARK) & (cpu["name"] == files.MARK_PREFIX + mark), "start_ns"].to_numpy()


def _window(begins: np.ndarray, ends: np.ndarray, work: pd.DataFrame, events: pd.DataFrame) -> tuple[int, int]:
    """Length of all recorded steps, and their number; without marks the whole recording, as one step."""
    steps = list(zip(begins.tolist(), ends[ends >= begins.min()].tolist(), strict=False)) if len(begins) else []
    if not steps:
        whole_ns = (events["start_ns"] + events["duration_ns"]).max() - events["start_ns"].min() if len(events) else 0
        return int(whole_ns), 1
    done_ns = (work["start_ns"] + work["duration_ns"]).groupby(work["step"]).max()
    return sum(int(max(end, done_ns.get(step, 0)) - begin) for step, (begin, end) in enumerate(steps)), len(steps)


def memory_timeline(recording: Recording) -> pd.DataFrame:
    """Each change of allocated memory with its place: columns of `attribute`'s work but start_ns as `time_ns`, with
    `device` and `allocated_bytes` (negative: freed), in order of time."""
    events = recording.events.sort_values(["start_ns", "duration_ns"], ascending=[True, False], ignore_index=True)
    cpu = events[~events["kind"].isin(files.GPU_KINDS)].reset_index(drop=True)
    placed = Places(cpu, recording.modules, recording.calls)
    changes = np.flatnonzero((cpu["kind"] == files.MEMORY).to_numpy())
    table = cpu.loc[changes, ["start_ns", "device", "allocated_bytes"]].reset_index(drop=True)
    return pd.concat([table.rename(columns={"start_ns": "time_ns"}), placed.of(changes)], axis=1)


def _launching(gpu: pd.DataFrame, cpu: pd.DataFrame) -> np.ndarray:
    """Row in `cpu` of the call that launched each GPU activity, -1 where the recording lacks it. A graph's kernels
    share the number of its launch."""
    launches = cpu[cpu["kind"] == files.LAUNCH]
    by_number = pd.Series(launches.index.to_numpy(), index=launches["correlation"].to_numpy())
    by_number = by_number[~by_number.index.duplicated()]
    return by_number.reindex(gpu["correlation"].to_numpy()).fillna(-1).to_numpy(dtype=np.int64)
