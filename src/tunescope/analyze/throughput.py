"""Throughput points as a tidy table: one row a point, every column with its unit in its name."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from tunescope import flops, paper, results
from tunescope.analyze.intervals import bootstrap_ratios
from tunescope.analyze.points import UNREADABLE, check_cells, identity, point_folders, read_row, recompute_frac
from tunescope.analyze.slices import add_extrapolation
from tunescope.config import THROUGHPUT
from tunescope.families import find_family
from tunescope.hardware import GIB, Device, UnknownDevice, find_device

_QUERIES_AND_SECONDS = "queries and seconds of each timed step"  # of a row under way, no column

# Bits of NVML's throttle reasons (nvml.h, nvmlClocksThrottleReasons) that mean "slower than it could be". Idle and
# settings of the user are not among them.
SLOWED_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}

COLUMNS = (
    "model", "dataset", "sparsity", "top_k", "num_experts", "per_device_batch_size", "seq_len_tokens", "preset",
    "num_layers", "total_layers", "weights", "data", "tokenizer", "moe", "recompute_frac",
    "cuda_graphs", "scan", "device", "status", "cause",
    "queries_per_s", "queries_per_s_low", "queries_per_s_high", "interval_width_pct", "num_timed_steps",
    "num_warmup_steps", "step_s", "tokens_per_s", "padded_tokens_per_s", "queries_per_train_runtime_s", "mfu_pct",
    "hfu_pct", "peak_allocated_gib", "peak_reserved_gib", "gpu_energy_j_per_query", "gpu_power_w", "sm_clock_mhz",
    "slowed_frac", "slowed_by", "num_other_processes", "queries_per_s_all_layers", "queries_per_s_all_layers_low",
    "queries_per_s_all_layers_high", "paper_a40_queries_per_s", "ratio_to_paper", "clock", "compute_dtype", "attention",
    "driver", "power_limit_w", "torch", "git_revision", "recipe_hash", "setup_hash", "is_papers_model",
    "is_shallow_end", "max_batch_size", "first_oom_batch_size", "max_batch_longest_tokens", "max_batch_trials",
    "paper_max_batch_size", "point_id", "folder",
)  # fmt: skip


def throughput(folder: Path) -> pd.DataFrame:
    """Every throughput point at or below `folder`, one row each with COLUMNS, in the figure's order.

    A point that cannot be read is a row with status `unreadable` and its cause. Raises UserError if there is no such
    folder or no point in it.
    """
    rows = [read_row(path, THROUGHPUT, _row) for path in point_folders(folder, "./mixtral_tp.sh or ./mamba_tp.sh")]
    _add_rates(rows)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table = add_extrapolation(table)
    return _with_paper(table).iloc[_figure_order(table)].reset_index(drop=True)


def _row(found: results.PointFolder) -> dict[str, Any]:
    row = identity(found) | (_measured(found) if found.status == "ok" else {}) | _max_batch(found)
    return check_cells(row, (_QUERIES_AND_SECONDS,))


def _max_batch(found: results.PointFolder) -> dict[str, Any]:
    """Of a point whose batch size was searched for; max_batch_size is 0 where not one query fits, None if it failed.

    first_oom_batch_size: None where the data ended first. max_batch_longest_tokens: slots of a query in the batch that
    had to fit; None: of the longest in the file. max_batch_trials: sizes in the order they were tried, as `4 oom`.
    """
    if "max_batch" not in found.outcome:
        return {}
    content = found.outcome["max_batch"]
    return {
        "max_batch_size": content["batch_size"] if found.status != "failed" else None,
        "first_oom_batch_size": content["first_oom_batch_size"],
        "max_batch_longest_tokens": content["longest_tokens"],
        "max_batch_trials": ", ".join(f"{trial['batch_size']} {trial['status']}" for trial in content["trials"]),
    }


def _measured(found: results.PointFolder) -> dict[str, Any]:
    assert found.steps is not None
    columns = {name: found.steps[name].to_numpy() for name in found.steps.column_names}
    timed = ~columns["is_warmup"].astype(bool)
    if not timed.any():
        raise results.PointFormatError(f"{found.path / results.STEPS_FILE} holds no timed step")
    timed_steps = {name: values[timed] for name, values in columns.items()}
    seconds = timed_steps["duration_ns"] / 1e9
    if not (seconds > 0).all():
        raise results.PointFormatError(f"{found.path / results.STEPS_FILE} holds a step of no duration")
    if not (timed_steps["num_queries"] > 0).all():
        raise results.PointFormatError(f"{found.path / results.STEPS_FILE} holds a step of no query")
    if (columns["world_size"] != 1).any():
        raise results.PointFormatError(
            f"{found.path / results.STEPS_FILE} is of a run on several GPUs, which this version cannot add up"
        )
    total_s = float(seconds.sum())
    energy_j = found.outcome["gpu_energy_j"]
    row = {
        _QUERIES_AND_SECONDS: (timed_steps["num_queries"], seconds),
        "num_timed_steps": int(timed.sum()),
        "num_warmup_steps": int((~timed).sum()),
        "step_s": total_s / len(seconds),
        "tokens_per_s": float(timed_steps["tokens"].sum()) / total_s,
        "padded_tokens_per_s": float(timed_steps["padded_tokens"].sum()) / total_s,
        "queries_per_train_runtime_s": float(columns["num_queries"].sum()) / (found.outcome["train_runtime_ns"] / 1e9),
        "gpu_energy_j_per_query": None if energy_j is None else energy_j / float(timed_steps["num_queries"].sum()),
        "gpu_power_w": None if energy_j is None else energy_j / total_s,
    }
    return row | _utilisation(found, timed_steps, total_s) | _gpu_state(found)


def _add_rates(rows: list[dict[str, Any]]) -> None:
    """Turns the steps of every measured row into queries/s and its interval, all rows at once: 10 times faster."""
    measured = [row for row in rows if _QUERIES_AND_SECONDS in row]
    rates = bootstrap_ratios([row.pop(_QUERIES_AND_SECONDS) for row in measured])
    for row, (value, low, high) in zip(measured, rates, strict=True):
        row["queries_per_s"], row["queries_per_s_low"], row["queries_per_s_high"] = value, low, high
        row["interval_width_pct"] = 100 * (high - low) / value


def _utilisation(found: results.PointFolder, timed: dict[str, np.ndarray], total_s: float) -> dict[str, float | None]:
    """MFU and HFU against the GPU's dense bf16 peak; None without a GPU or for one that is not in the table."""
    device = _device(found.environment)
    if device is None:
        return {"mfu_pct": None, "hfu_pct": None}
    family = find_family(found.point["point"]["model"])
    forward = family.forward_flop(found.point["model_config"], found.point["recipe"])
    slots = timed["padded_tokens"].astype(float)
    lengths = timed["seq_len_tokens"].astype(float)
    tokens = timed["tokens"].astype(float)
    # A causal query of n tokens sees n * n / 2 keys; queries of one batch are taken as of equal real length.
    real_keys = float((tokens * tokens / timed["num_queries"]).sum()) / 2
    model_flop = flops.train_flop(forward, float(tokens.sum()), real_keys, recompute_frac=0)
    hardware_flop = flops.train_flop(
        forward,
        float(slots.sum()),
        float((slots * lengths).sum()) / 2,
        recompute_frac=recompute_frac(found.point),
    )
    peak = device.peak_bf16_flop_per_s * total_s
    return {"mfu_pct": 100 * model_flop / peak, "hfu_pct": 100 * hardware_flop / peak}


def _device(environment: dict[str, Any]) -> Device | None:
    gpu = environment.get("gpu")
    return None if gpu is None else _known_device(gpu["name"], gpu["memory_total_bytes"] / GIB)


@cache
def _known_device(name: str, memory_gib: float) -> Device | None:
    try:
        return find_device(name, memory_gib)
    except UnknownDevice:
        return None


def _gpu_state(found: results.PointFolder) -> dict[str, Any]:
    """Clock, throttling and company of the GPU during the timed steps, from the once-a-second samples."""
    file = found.path / results.GPU_SAMPLES_FILE
    if not file.is_file():
        return {}
    samples = results.read_arrow(file, results.GPU_SAMPLES_SCHEMA)
    taken_ns = samples["time_unix_ns"].to_numpy()
    start_ns, end_ns = found.outcome["timed_start_unix_ns"], found.outcome["timed_end_unix_ns"]
    samples = samples.filter(pa.array((taken_ns >= start_ns) & (taken_ns <= end_ns)))
    masks = samples["throttle_reasons_bitmask"].drop_null().to_numpy().astype(np.int64)
    slowed = [name for bit, name in SLOWED_REASONS.items() if (masks & bit).any()]
    return {
        "sm_clock_mhz": _mean(samples["sm_clock_mhz"]),
        "slowed_frac": float(((masks & sum(SLOWED_REASONS)) != 0).mean()) if len(masks) else None,
        "slowed_by": ", ".join(slowed) or None,
        "num_other_processes": pa.compute.max(samples["num_other_processes"]).as_py(),
    }


def _mean(column: pa.ChunkedArray) -> float | None:
    return pa.compute.mean(column).as_py()


def _with_paper(table: pd.DataFrame) -> pd.DataFrame:
    """The paper's A40 beside each row, and the ratio where the row is of the paper's model at its full depth.

    Preset full may be of the user's own model, which has the same bars and another size.
    """
    beside = [
        paper.a40_queries_per_s(row.model, row.dataset, int(row.top_k), int(row.per_device_batch_size))
        if row.status != UNREADABLE and pd.isna(row.seq_len_tokens)
        else None
        for row in table.itertuples()
    ]
    table["paper_a40_queries_per_s"] = pd.Series(beside, index=table.index, dtype=float)
    ours = table["queries_per_s"].where(table["preset"] == "full", table["queries_per_s_all_layers"])
    ours = pd.to_numeric(ours).where(table["is_papers_model"].eq(True) & ~counted_in_words(table))
    table["ratio_to_paper"] = ours / table["paper_a40_queries_per_s"]
    limits = [
        papers_max_batch_sizes(row.model, row.dataset, int(row.top_k)).get("Table III")
        if row.status != UNREADABLE and not pd.isna(row.max_batch_size) and pd.isna(row.seq_len_tokens)
        else None
        for row in table.itertuples()
    ]
    table["paper_max_batch_size"] = pd.Series(limits, index=table.index, dtype=float)
    return table


def papers_max_batch_sizes(model: str, dataset: str, top_k: int) -> dict[str, int]:
    """Where the paper says it -> its A40's largest batch: `Table III` and `Fig. 14`, which differ in three cases."""
    return {
        row["figure"]: int(row["max_batch_size"])
        for row in paper.rows("max_batch")
        if (row["model"], row["dataset"], row["gpu"]) == (model, dataset, "a40")
        and int(row["top_k"]) == top_k
        and row["figure"] in ("Table III", "Fig. 14")
    }


def counted_in_words(table: pd.DataFrame) -> pd.Series:
    """Rows whose queries came from a file and were cut at spaces, a word a token, for lack of the model's tokenizer.

    Such queries are shorter than the model's own tokenizer makes them, and so are their steps.
    """
    return table["data"].eq("file") & table["tokenizer"].eq("generated-wordlevel")


def _figure_order(table: pd.DataFrame) -> np.ndarray:
    """Row numbers: by device and preset, the figure's bars in the figure's order, then the rest."""
    bars = {
        bar: place for model in set(table["model"].dropna()) for place, bar in enumerate(paper.figure8_order(model))
    }

    rows = table.to_dict("records")

    def key(number: int) -> tuple[Any, ...]:
        row = rows[number]
        if row["status"] == UNREADABLE:
            return (1, str(row["folder"]))
        bar = (row["dataset"], int(row["top_k"]), int(row["per_device_batch_size"]))
        length = 0 if pd.isna(row["seq_len_tokens"]) else int(row["seq_len_tokens"])
        # The paper labels its bars with batch sizes that its own sweep contradicts; order follows the labels.
        place = bars.get(bar, len(bars)) if not length else len(bars)
        rest = (row["dataset"], -int(row["top_k"]), length, int(row["per_device_batch_size"]))
        return (
            0,
            row["model"],
            str(row["device"]),
            row["preset"],
            place,
            *rest,
            -int(row["num_layers"]),
        )

    return np.array(sorted(range(len(table)), key=key), dtype=int)
