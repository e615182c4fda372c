"""Figure 8 as a table: queries/s of each bar, the paper's A40 beside it, and what makes them differ."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from tunescope import paper, results
from tunescope.analyze.throughput import UNREADABLE, counted_in_words, papers_max_batch_sizes, throughput
from tunescope.report.text import check_format, number, records, text_table

_HEADER = (
    "data", "sparsity", "batch", "status", "queries/s", "95 % interval", "A40 paper", "ratio", "steps", "s/step",
    "tokens/s", "padded tok/s", "q/train s", "MFU %", "HFU %", "peak GiB", "J/query",
)  # fmt: skip
_LEFT_COLUMNS = 2
_ALWAYS_SHOWN = ("queries/s", "A40 paper", "ratio")


def print_throughput(folder: Path, format: str) -> bool:
    """Prints the table to stdout. False if a point could not be read: its row and stderr say why, the rest stand."""
    check_format(format)
    table = throughput(folder)
    if format == "csv":
        print(table.to_csv(index=False), end="")
    elif format == "json":
        print(table.to_json(orient="records", indent=1, double_precision=15))
    else:
        print(throughput_text(table, num_unfinished=len(results.find_unfinished(folder))))
    unreadable = table[table["status"] == UNREADABLE]
    for row in unreadable.to_dict("records"):
        print(f"tunescope: {row['point_id']}: {row['cause']}", file=sys.stderr)
    return unreadable.empty


def throughput_text(table: pd.DataFrame, *, num_unfinished: int = 0) -> str:
    """The whole text: one block of rows for each device and preset, then the footer."""
    # The shallow end of an extrapolation has no other use; csv and json have it.
    shown = table[~table["is_shallow_end"]]
    blocks = []
    for (device, preset), group in shown[shown["status"] != UNREADABLE].groupby(["device", "preset"], sort=False):
        title = f"Figure 8: fine-tuning throughput of {', '.join(_names(group['model']))} on {device}, preset {preset}"
        blocks.append(title + "\n\n" + _block(group, str(preset)))
    unreadable = shown[shown["status"] == UNREADABLE]
    if not unreadable.empty:
        rows = [(str(point_id), UNREADABLE) for point_id in unreadable["point_id"]]
        blocks.append(text_table(("point", "status"), rows, left_columns=2))
    return "\n\n".join([*blocks, "\n".join(_footer(table, num_unfinished))])


def _recomputed(row: dict[str, Any]) -> str:
    """Of the decoder layers, how many run their forward again in backward."""
    frac = row["recompute_frac"]
    if pd.isna(frac) or 0 < frac < 1:
        return "-" if pd.isna(frac) else f"{frac * row['num_layers']:.0f}/{row['num_layers']:.0f}"
    return "all" if frac else "none"


# Columns that tell rows apart which would look alike -> their header and cell.
_APART: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "model": ("model", lambda row: str(row["model"])),
    "moe": ("MoE path", lambda row: str(row["moe"])),
    "recompute_frac": ("recomputed", _recomputed),
    "cuda_graphs": (
        "graphs",
        lambda row: "-" if pd.isna(row["cuda_graphs"]) else "yes" if row["cuda_graphs"] else "no",
    ),
}


def _block(group: pd.DataFrame, preset: str) -> str:
    header = list(_HEADER)
    if preset == "slice":
        header[4:4] = ["layers", "q/s all layers", "its interval"]
    rows = [_cells(row, preset) for row in records(group)]
    # What tells rows apart that would look alike.
    apart = [name for name in _APART if group[name].nunique() > 1]
    telling = [[_APART[name][1](row) for name in apart] for row in records(group)]
    rows = [[*cells, *others] for cells, others in zip(telling, rows, strict=True)]
    header = [*(_APART[name][0] for name in apart), *header]
    # What this machine cannot say (no GPU: no memory, energy or MFU) is said once in the footer, not in every row.
    kept = [i for i, name in enumerate(header) if name in _ALWAYS_SHOWN or any(row[i] != "-" for row in rows)]
    return text_table(
        [header[i] for i in kept], [[row[i] for i in kept] for row in rows], left_columns=len(apart) + _LEFT_COLUMNS
    )


def _cells(row: dict[str, Any], preset: str) -> list[str]:
    length = "" if pd.isna(row["seq_len_tokens"]) else f" len {int(row['seq_len_tokens'])}"
    cells = [
        f"{row['dataset']}{length}",
        row["sparsity"],
        f"{row['per_device_batch_size']:g}" + (" max" if row["max_batch_size"] > 0 else ""),
        row["status"],
        number(row["queries_per_s"]),
        _interval(row["queries_per_s_low"], row["queries_per_s_high"]),
        number(row["paper_a40_queries_per_s"]),
        number(row["ratio_to_paper"]),
        "-" if pd.isna(row["num_timed_steps"]) else str(int(row["num_timed_steps"])),
        number(row["step_s"]),
        number(row["tokens_per_s"]),
        number(row["padded_tokens_per_s"]),
        number(row["queries_per_train_runtime_s"]),
        number(row["mfu_pct"]),
        number(row["hfu_pct"]),
        number(row["peak_allocated_gib"]),
        number(row["gpu_energy_j_per_query"]),
    ]
    if preset == "slice":
        cells[4:4] = [
            f"{int(row['num_layers'])}/{int(row['total_layers'])}",
            number(row["queries_per_s_all_layers"]),
            _interval(row["queries_per_s_all_layers_low"], row["queries_per_s_all_layers_high"]),
        ]
    return cells


def _interval(low: float | None, high: float | None) -> str:
    if pd.isna(low):
        return "-"
    return f"over {number(low, 4)}" if pd.isna(high) else f"{number(low, 4)} to {number(high, 4)}"


def _names(column: pd.Series) -> list[str]:
    return sorted({str(value) for value in column.dropna()})


def _footer(table: pd.DataFrame, num_unfinished: int) -> list[str]:
    known = table[table["status"] != UNREADABLE]
    ok = known[known["status"] == "ok"]

    def names(column: str) -> str:
        return ", ".join(_names(known[column])) or "-"

    lines = [
        "queries/s: sum of queries over sum of step times, warm-up left out; 95 % bootstrap interval over steps.",
        "tokens/s: non-padding; padded tok/s: all slots. q/train s: all queries over the whole train runtime, which is",
        "the paper's definition. MFU counts non-padding tokens and no recompute (4 FLOP a weight and token, trained",
        "weights 6), HFU padding and recompute, both against the GPU's dense bf16 peak.",
    ]
    if not known.empty:
        recomputed = ", ".join(sorted({_recomputed(row) for row in records(known)}))
        lines.append(
            f"weights: {names('weights')}; data: {names('data')}; tokenizer: {names('tokenizer')}; "
            f"MoE path: {names('moe')}; recomputed layers: {recomputed}; attention: {names('attention')}; "
            f"scan: {names('scan')}; compute: {names('compute_dtype')}."
        )
    lines.append(
        f"A40 paper: queries/s the paper measured on an {paper.GPU} (48 GB) with pretrained weights and the real data, "
        "batch size as in its sweeps."
    )
    lines += _relabelled(known)
    lines += [_largest_batch(row) for row in records(known) if not pd.isna(row["max_batch_trials"])]
    if counted_in_words(ok).any():
        lines.append(
            "Without a checkpoint there is no tokenizer for a data file: its queries were cut at spaces, a word a "
            "token, which is shorter than real; such rows have no ratio to the paper."
        )
    if "tiny" in set(known["preset"]):
        lines.append(
            "Preset tiny is a small model of the same architecture on whatever runs it: its rows show that everything "
            "works and have no ratio to the paper."
        )
    if "slice" in set(known["preset"]):
        lines.append(
            "Preset slice runs some of the layers at full width; 'q/s all layers' extrapolates step time along a line "
            "through two depths, and the ratio uses it. --format csv has both depths."
        )
    lines += _conditions(ok)
    for row in records(known[known["status"] != "ok"]):
        peak_gib = row["peak_allocated_gib"]
        peak = "" if pd.isna(peak_gib) else f" (peak {number(peak_gib)} GiB allocated)"
        lines.append(f"{_bar(row)}: {row['status']}{peak}: {row['cause']}")
    if num_unfinished:
        lines.append(f"{num_unfinished} point(s) were begun and not finished; run the launcher again to measure them.")
    return lines


def _relabelled(known: pd.DataFrame) -> list[str]:
    """Bars that a reader will look for in the figure and find with another number."""
    lines = []
    bars = {(row["model"], row["dataset"], row["top_k"], row["per_device_batch_size"]): row for row in records(known)}
    for model in _names(known["model"]):
        for bar in paper.relabelled_bars(model):
            row = bars.get((model, bar.dataset, bar.top_k, bar.figure_batch_size))
            if row is not None:
                at_label = paper.a40_queries_per_s(model, bar.dataset, bar.top_k, bar.figure_batch_size)
                lines.append(
                    f"{_bar(row)}: the figure labels a bar of {number(bar.queries_per_s, 4)} so; the paper's own sweep "
                    f"has that value at batch {bar.sweep_batch_size} and {number(at_label)} at "
                    f"{bar.figure_batch_size}, which step times support."
                )
    return lines


def _largest_batch(row: dict[str, Any]) -> str:
    """Of a bar whose batch size was searched for: what fits, what does not, and how that was found."""
    tried = f"tried: {row['max_batch_trials'] or 'none'}"
    bar = f"{row['dataset']} {row['sparsity']}"
    if pd.isna(row["max_batch_size"]):
        return f"{bar}: the largest batch was not found ({tried})."
    longest = "" if pd.isna(row["max_batch_longest_tokens"]) else f" of {row['max_batch_longest_tokens']:g} tokens"
    what = f"padded to the longest query{longest}"
    if row["max_batch_size"] == 0:
        line = f"{bar}: not even one query{longest} fits ({tried})."
    elif pd.isna(row["first_oom_batch_size"]):
        line = f"{bar}: {row['max_batch_size']:g} queries fit, {what}; the data allow no more ({tried})."
    else:
        line = (
            f"{bar}: the largest batch is {row['max_batch_size']:g}, {what}; {row['first_oom_batch_size']:g} ran out "
            f"of memory ({tried})."
        )
    if pd.isna(row["paper_max_batch_size"]) or not row["is_papers_model"]:
        return line
    papers = papers_max_batch_sizes(row["model"], row["dataset"], int(row["top_k"]))
    sweep = f", Figure 14: {papers['Fig. 14']}" if papers["Fig. 14"] != papers["Table III"] else ""
    return f"{line} The paper's A40, Table III: {papers['Table III']}{sweep}."


def _conditions(ok: pd.DataFrame) -> list[str]:
    """What about the machine a reader must know before believing a row."""
    lines = []
    if not ok.empty and ok["mfu_pct"].isna().all():
        if (ok["clock"] == "host").all():
            lines.append("No GPU: no MFU, no GPU memory, no energy.")
        else:
            lines.append("No MFU: the GPU is not in the table of src/tunescope/hardware.py.")
    slowed = ok[pd.to_numeric(ok["slowed_frac"]) > 0]
    for row in records(slowed):
        share_pct = 100 * row["slowed_frac"]
        lines.append(f"{_bar(row)}: the GPU was held back by {row['slowed_by']} in {share_pct:.0f} % of samples.")
    crowded = ok[pd.to_numeric(ok["num_other_processes"]) > 0]
    if not crowded.empty:
        lines.append(f"{len(crowded)} point(s) shared the GPU with other processes: their times may be too long.")
    wide = ok[pd.to_numeric(ok["interval_width_pct"]) > 2]
    if not wide.empty:
        lines.append(f"{len(wide)} point(s) have an interval wider than 2 % of the mean: read them as rough.")
    return lines


def _bar(row: dict[str, Any]) -> str:
    return f"{row['dataset']} {row['sparsity']} {row['per_device_batch_size']:g}"
