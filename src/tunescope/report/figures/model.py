"""Length histograms, the paper's model (Figures 13 to 15, Tables III and IV), and forecasts beside measured steps."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tunescope import paper
from tunescope.analyze.points import UNREADABLE
from tunescope.cost import paper_tables
from tunescope.cost.paper_constants import CODED, LONGEST, PRINTED_SET
from tunescope.cost.validation import HeldOut
from tunescope.families import find_family
from tunescope.report.figures.chart import LINES, SCATTER, Chart, entry, frame_of
from tunescope.report.text import records

BIN_TOKENS = 16
PAPERS, OURS = "paper", "ours"


def lengths() -> Chart:
    """Figure 2: how many queries of CS and MATH have which length, counted in bins of BIN_TOKENS tokens."""
    entries = []
    for dataset in ("cs", "math"):
        tokens, counts = paper.length_histogram(dataset)
        bins = np.array(tokens) // BIN_TOKENS
        longest = int(bins.max())
        sums = np.bincount(bins, weights=counts, minlength=longest + 1)
        median = int(np.median(np.repeat(tokens, counts)))
        panel = f"{dataset}: {sum(counts):,} queries, median {median} tokens, longest {max(tokens)}"
        for number, count in enumerate(sums):
            x = (number + 0.5) * BIN_TOKENS
            group = f"{number * BIN_TOKENS} to {(number + 1) * BIN_TOKENS - 1}"
            entries.append(entry(panel, group, f"queries in {BIN_TOKENS} tokens", count, x=x, key=f"{dataset}|{group}"))
    return Chart(
        "figure02_lengths", "Figure 2: token lengths of the queries", frame_of(entries), "queries", kind=LINES,
        x_label="tokens (middle of the bin)", group_label="tokens, from and to",
    )  # fmt: skip


def figure13() -> Chart:
    """Mixtral's largest batch by GPU memory: the paper's points, and Equation 1 by both sets of constants."""
    table = paper_tables.figure13()
    entries = []
    for row in records(table[table["reading"].str.endswith(paper_tables.NO_FLOOR)]):
        memory_gb = row["gpu_memory_gb"]
        group = f"{memory_gb:g} GB" + (f" ({row['gpu']})" if row["gpu"] else "")
        if row["reading"].startswith(CODED):
            kind = "measured" if row["kind"] == "ground_truth_point" else "projected"
            entries.append(entry("mixtral", group, f"{PAPERS}, {kind}", row["paper_queries"], x=memory_gb))
        series = f"Equation 1, {row['reading'].split(',')[0]}"
        entries.append(entry("mixtral", group, series, row["ours_queries"], x=memory_gb))
    marked = (f"{PAPERS}, measured", f"{PAPERS}, projected")
    return Chart(
        "figure13_max_batch", "Figure 13: largest batch by GPU memory", frame_of(entries), "queries", kind=LINES,
        x_label="GPU memory (GB)", group_label="GPU", markers_only=marked,
    )  # fmt: skip


def figure14() -> Chart:
    """Equation 2 against the paper's points on its A40."""
    return _sweeps("figure14_throughput", "Figure 14: throughput by batch, A40", paper_tables.figure14())


def figure15() -> Chart:
    """Equation 2 against the paper's points on A100 and H100."""
    return _sweeps("figure15_throughput", "Figure 15: throughput by batch, A100 and H100", paper_tables.figure15())


def _sweeps(name: str, title: str, table: pd.DataFrame) -> Chart:
    entries = []
    for row in records(table[table["reading"] == paper_tables.PAPERS_CURVE]):
        panel = f"{row['model']}, {row['gpu']}, {row['dataset']}"
        group, batch = f"{row['sparsity']} {row['batch_size']}", row["batch_size"]
        measured, curve = f"{PAPERS}, {row['sparsity']}", f"Equation 2, {row['sparsity']}"
        entries.append(entry(panel, group, measured, row["measured_queries_per_s"], x=batch))
        entries.append(entry(panel, group, curve, row["curve_queries_per_s"], x=batch))
    marked = tuple(f"{PAPERS}, {sparsity}" for sparsity in ("dense", "sparse"))
    return Chart(
        name, title, frame_of(entries), "queries/s", kind=LINES, x_label="batch", group_label="sparsity, batch",
        markers_only=marked,
    )  # fmt: skip


def table3(throughput: pd.DataFrame | None = None) -> Chart:
    """Largest batches on the A40 by the paper and by Equation 1 at the longest length; and ours, of any GPU, where a
    batch was searched for."""
    entries = []
    table = paper_tables.table3()
    for row in records(table[table["seq_len_choice"] == LONGEST]):
        panel, group = f"{row['model']}, A40 48 GB", f"{row['dataset']} {row['sparsity']}"
        if row["parameter_set"] == PRINTED_SET:
            entries.append(entry(panel, group, f"{PAPERS}, Table III", row["paper_queries"]))
            entries.append(entry(panel, group, f"{PAPERS}, Figure 14", row["paper_sweep_queries"]))
        series = f"Equation 1, {row['parameter_set']} constants"
        entries.append(entry(panel, group, series, row["ours_queries"]))
    if throughput is not None and len(throughput):
        known = throughput[(throughput["status"] != UNREADABLE) & throughput["max_batch_size"].notna()]
        for row in records(known):
            panel = f"{row['model']}, {row['device']}, preset {row['preset']}"
            group = f"{row['dataset']} {row['sparsity']}"
            entries.append(entry(panel, group, "measured", row["max_batch_size"], place=row["folder"]))
    return Chart(
        "table3_max_batch", "Table III: largest batch", frame_of(entries), "queries", group_label="data, sparsity"
    )


def table4() -> Chart:
    """USD of the paper's ten epochs by GPU: printed, recomputed, and by Equations 1 and 2 alone."""
    table = paper_tables.table4()
    table = table[table["figure"] == "Table IV"]
    readings = {
        paper_tables.TABLE4_READING: f"{OURS}, from measured throughput",
        "Equations 1 and 2, 15,000 queries": f"{OURS}, Equations 1 and 2",
    }
    entries = []
    for row in records(table[table["reading"].isin(list(readings))]):
        group = f"{row['gpu']}, {row['price_usd_per_hour']:g} USD/h"
        if row["reading"] == paper_tables.TABLE4_READING:
            entries.append(entry("mixtral, math, sparse, 10 epochs", group, f"{PAPERS}, printed", row["paper_usd"]))
        series = readings[row["reading"]]
        entries.append(entry("mixtral, math, sparse, 10 epochs", group, series, row["ours_usd"]))
    return Chart(
        "table4_cost", "Table IV: cost of a fine-tuning run", frame_of(entries), "USD", group_label="GPU, price"
    )


def validation(rows: Sequence[HeldOut]) -> Chart:
    """Forecast against measured seconds of a step, each point held out of the fit that forecasts it."""
    entries = []
    for row in rows:
        point = row.point
        sparsity = (
            "dense" if point.top_k == point.config[find_family(point.model).experts_key] else f"top-{point.top_k}"
        )
        group = f"{point.model} {point.dataset} {sparsity} {point.batch_size}, {point.device.name}"
        interval = (row.forecast.low_s, row.forecast.high_s)
        entries.append(entry(row.split, group, "forecast", row.forecast.median_s, x=point.step_s, interval=interval))
        if row.paper_step_s is not None and np.isfinite(row.paper_step_s):
            entries.append(entry(row.split, group, f"{PAPERS}, Equation 2", row.paper_step_s, x=point.step_s))
    return Chart(
        "validation", "Predicted against measured", frame_of(entries), "forecast (s a step)", kind=SCATTER,
        x_label="measured (s a step)", group_label="point held out", is_log=True, extra={"is_parity": True},
    )  # fmt: skip
