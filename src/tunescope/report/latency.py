"""Figures 4, 5 and 11 as tables, and Figure 6 from the profiler's side: what a step spends, and where."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from tunescope import latency_files as files
from tunescope import results
from tunescope.analyze.latency_tables import LatencyTables, latency_tables, summed_over_layers, tidy
from tunescope.analyze.layouts import EMBEDDING, FINAL_NORM, HEAD, LAYER_ITSELF, LAYOUTS, OUTSIDE_LAYERS
from tunescope.analyze.points import UNREADABLE
from tunescope.errors import UserError
from tunescope.families import FAMILIES
from tunescope.hardware import GIB
from tunescope.paper import latency as papers
from tunescope.report import latency_notes
from tunescope.report.experts import expert_loads_frame, expert_summary_frame, experts_text
from tunescope.report.text import check_format, number, records, text_table

_PASSES = (files.FORWARD, files.RECOMPUTE, files.BACKWARD)
_OTHER_PHASES = (files.CLIP, files.OPTIMIZER_STEP, files.REST)


def print_latency(folder: Path, format: str, layer: int | None) -> bool:
    """Prints the tables to stdout. False if a point could not be read: stderr says why, the rest stand.

    layer: one decoder layer, from 0, instead of the sum of all.
    """
    check_format(format)
    tables = latency_tables(folder)
    if layer is not None:
        deepest = int(tables.layers["layer"].max()) if not tables.layers.empty else -1
        if deepest < 0:
            raise UserError(f"--layer {layer}: no point in {folder} has decoder layers to show")
        if not 0 <= layer <= deepest:
            raise UserError(f"--layer {layer}: the points in {folder} have layers 0 to {deepest}")
    if format == "csv":
        print(tidy(tables).to_csv(index=False), end="")
    elif format == "json":
        print(json.dumps(_frames(tables), indent=1, allow_nan=False))
    else:
        print(latency_text(tables, layer, num_unfinished=len(results.find_unfinished(folder))))
    unreadable = tables.points[tables.points["status"] == UNREADABLE]
    for row in unreadable.to_dict("records"):
        print(f"tunescope: {row['point_id']}: {row['cause']}", file=sys.stderr)
    return unreadable.empty


def _frames(tables: LatencyTables) -> dict[str, Any]:
    frames = {name: getattr(tables, name) for name in ("points", "phases", "layers", "operators", "memory")}
    frames["memory_parts"] = tables.memory_parts
    frames["expert_loads"] = expert_loads_frame(tables.experts)
    frames["expert_summary"] = expert_summary_frame(tables.experts)
    return {name: json.loads(frame.to_json(orient="records", double_precision=15)) for name, frame in frames.items()}


def latency_text(tables: LatencyTables, layer: int | None = None, *, num_unfinished: int = 0) -> str:
    """Everything as text: tables in the figures' order, each followed by what must be known to read it."""
    points = tables.points
    ok = points[points["status"] == "ok"]
    blocks: list[str] = []
    for (device, preset), group in ok.groupby(["device", "preset"], sort=False):
        machine = f"on {device}, preset {preset}"
        where = f"{', '.join(sorted(set(group['model'])))} {machine}"
        blocks.append(f"Figure 4: phases of a step (s), {where}\n\n{_phases_table(tables, group)}")
        blocks.append(latency_notes.phases(group))
        for row in records(group):
            title = f"Figure 5: {_scope(row, layer)} (ms a step), {_label(row)} {machine}"
            blocks.append(f"{title}\n\n{_layers_table(tables, row, layer)}")
        blocks.append(latency_notes.layers(tables, group))
        for row in records(group):
            for part, cells in _operators_by_part(tables, row, layer):
                figure = "Figure 6 from the profiler: operators" if part == row["op_part"] else "Operators"
                what = f"{figure} of {part}, {_scope(row, layer)}"
                blocks.append(f"{what}, {_label(row)} {machine}\n\n{_operators_table(cells)}")
        blocks.append(latency_notes.operators(group))
        blocks.append(f"Memory (GiB), {where}\n\n{_memory_table(tables, group)}")
        blocks.append(latency_notes.memory(group))
        blocks.append(f"How it was measured, {where}\n\n{_quality_table(group)}")
        blocks.append(latency_notes.quality(group))
    if experts := experts_text(tables.experts):
        blocks.append(experts)
    others = points[points["status"] != "ok"]
    if not others.empty:
        rows = [(str(row["point_id"]), str(row["status"])) for row in records(others)]
        blocks.append("Points without a breakdown\n\n" + text_table(("point", "status"), rows, left_columns=2))
        blocks.append(latency_notes.failures(others))
    blocks.append(latency_notes.provenance(points))
    if num_unfinished:
        blocks.append(f"{num_unfinished} point(s) were begun and not finished; run the launcher again to measure them.")
    return "\n\n".join(block for block in blocks if block)


# --- Figure 4 ---


def _phases_table(tables: LatencyTables, group: pd.DataFrame) -> str:
    header = [
        "data", "sparsity", "batch", "step", "forward", "backward", "of it recompute", "clip", "optimizer", "rest",
        "forward %", "backward %", "optimizer %", "steps",
    ]  # fmt: skip
    with_paper = tables.phases["paper_a40_s"].notna().any()
    if with_paper:
        header += ["A40 paper: forward", "backward", "optimizer", "optimizer %"]
    rows = []
    for row in records(group):
        phases = tables.phases[tables.phases["folder"] == row["folder"]].set_index("phase")
        shares = 100 * phases["share_frac"]
        cells = [*_bar(row), number(row["step_s"])]
        for phase in (files.FORWARD, files.BACKWARD, files.RECOMPUTE, files.CLIP, files.OPTIMIZER_STEP, files.REST):
            cells.append(_with_interval(phases.loc[phase]))
        cells += [number(shares[phase]) for phase in (files.FORWARD, files.BACKWARD, files.OPTIMIZER_STEP)]
        cells.append(str(int(phases["num_steps"].max())))
        if with_paper:
            papers_s = phases["paper_a40_s"]
            cells += [number(papers_s[phase]) for phase in (files.FORWARD, files.BACKWARD, files.OPTIMIZER_STEP)]
            cells.append(number(100 * papers_s[files.OPTIMIZER_STEP] / papers_s.sum(min_count=1)))
        rows.append(cells)
    return text_table(header, rows, left_columns=2)


def _with_interval(phase: pd.Series) -> str:
    half = (phase["duration_s_high"] - phase["duration_s_low"]) / 2
    return f"{number(phase['duration_s'])} ±{number(half, 2)}"


# --- Figure 5 ---


def _layers_table(tables: LatencyTables, row: dict[str, Any], layer: int | None) -> str:
    of_point = tables.layers[tables.layers["folder"] == row["folder"]]
    cells = summed_over_layers(of_point, layer)
    busy_ms = cells.pivot(index="part", columns="phase", values="busy_ns") / 1e6
    span_ms = cells.pivot(index="part", columns="phase", values="span_ns") / 1e6
    launches = cells.groupby("part")["num_launches"].sum()
    whole_ms = busy_ms.sum().sum()
    papers_s = papers.layer_s(row["model"], row["top_k"], row["per_device_batch_size"], row["seq_len_tokens"])
    with_paper = bool(papers_s) and layer is None
    header = ["part", *_PASSES, "other", "total", "share %", "launches", *(f"span {phase}" for phase in _PASSES)]
    header += ["A40 paper", "its share %"] if with_paper else []
    rows = []
    for part in sorted(busy_ms.index, key=_part_order(row["model"])):
        per_phase = busy_ms.loc[part]
        total_ms = per_phase.sum()
        other_ms = per_phase.reindex(_OTHER_PHASES).sum()
        made = [str(part), *(number(_value(per_phase, phase)) for phase in _PASSES), number(other_ms or None)]
        made += [number(total_ms), number(100 * total_ms / whole_ms), number(launches[part])]
        made += [number(_value(span_ms.loc[part], phase)) for phase in _PASSES]
        if with_paper:
            theirs_s = papers_s.get(str(part), float("nan"))
            made += [number(1e3 * theirs_s), number(100 * theirs_s / sum(papers_s.values()))]
        rows.append(made)
    sums = busy_ms.sum()
    other_ms = sums.reindex(_OTHER_PHASES).sum()
    total = ["all", *(number(_value(sums, phase)) for phase in _PASSES), number(other_ms or None)]
    total += [number(whole_ms), "100", number(launches.sum()), *["-"] * 3]
    rows.append(total + ([number(1e3 * sum(papers_s.values())), "100"] if with_paper else []))
    return text_table(header, rows, left_columns=1)


def _value(values: pd.Series, name: str) -> float:
    return float(values.get(name, float("nan")))


def _part_order(model: str) -> Callable[[str], tuple[int, str]]:
    """In the order of a step: parts of the model's own layout, then any other, then work outside of modules."""
    layout = FAMILIES[model].layout if model in FAMILIES else None
    order = [EMBEDDING, *(layout.parts if layout else ()), LAYER_ITSELF, FINAL_NORM, HEAD, OUTSIDE_LAYERS]

    def key(part: str) -> tuple[int, str]:
        if part in order:
            return order.index(part), part
        return (len(order) if not part.startswith("(") else len(order) + 1), part

    return key


# --- Figure 6 ---


def _operators_by_part(
    tables: LatencyTables, row: dict[str, Any], layer: int | None
) -> Iterator[tuple[str, pd.DataFrame]]:
    """The figure's part first, then the others that the layout divides."""
    cells = tables.operators[tables.operators["folder"] == row["folder"]]
    if layer is not None:
        cells = cells[cells["layer"] == layer]
    for part in sorted(set(cells["part"]), key=lambda part: (part != row["op_part"], part)):
        yield part, cells[cells["part"] == part]


def _operators_table(cells: pd.DataFrame) -> str:
    sums = cells.groupby(["label", "phase"])[["busy_ns", "num_launches"]].sum()
    whole_ns = sums["busy_ns"].sum()
    with_paper = cells["paper_a40_us_per_launch"].notna().any()
    header = ["operator"]
    for phase in _PASSES:
        header += [f"{phase} ms", "launches", "us each"]
    header += ["total ms", "share %"] + (["A40 paper us each"] if with_paper else [])
    places = {label: place for layout in LAYOUTS for place, label in enumerate(layout.op_order)}
    labels = sorted(set(cells["label"]), key=lambda label: (places.get(label, len(places)), label))
    rows = []
    for label in labels:
        made = [label]
        for phase in _PASSES:
            if (label, phase) in sums.index:
                busy, launches = sums.loc[(label, phase)]
                made += [number(busy / 1e6), number(launches), number(busy / launches / 1e3)]
            else:
                made += ["-"] * 3
        total_ns = sums.loc[label]["busy_ns"].sum()
        made += [number(total_ns / 1e6), number(100 * total_ns / whole_ns)]
        if with_paper:
            made.append(number(cells.loc[cells["label"] == label, "paper_a40_us_per_launch"].max()))
        rows.append(made)
    return text_table(header, rows, left_columns=1)


# --- memory and quality ---


def _memory_table(tables: LatencyTables, group: pd.DataFrame) -> str:
    held_parts = ("frozen_weights", "trained_weights", "gradients", "optimizer")
    header = ["data", "sparsity", "batch", *(part.replace("_", " ") for part in held_parts), "forward leaves"]
    header += [f"peak in {phase}" for phase in (*_PASSES, files.OPTIMIZER_STEP)]
    header += ["activations", "peak of all", "in phase", "in part", "in layer"]
    rows = []
    for row in records(group):
        memory = tables.memory[tables.memory["folder"] == row["folder"]]
        held = tables.memory_parts[tables.memory_parts["folder"] == row["folder"]].set_index("part")
        held_gib = held["allocated_bytes"] / GIB
        phases = memory.groupby("phase", sort=False).agg({"peak_bytes": "max", "end_bytes": "last"}) / GIB
        peaks_gib = phases["peak_bytes"]
        # Without a GPU only growth is known, and what a step begins with is not in it.
        base_gib = 0.0
        if files.EVERYTHING in held_gib.index:
            base_gib = sum(held_gib[part] for part in ("frozen_weights", "trained_weights", "optimizer", "buffers"))
        highest = memory.loc[memory["peak_bytes"].idxmax()]
        made = [*_bar(row), *(number(held_gib[part]) for part in held_parts)]
        made += [number(_value(phases["end_bytes"], files.FORWARD))]
        made += [number(_value(peaks_gib, phase)) for phase in (*_PASSES, files.OPTIMIZER_STEP)]
        made += [number(peaks_gib.reindex(_PASSES).max() - base_gib), number(peaks_gib.max())]
        made += [str(highest["phase"]), str(highest["part"])]
        made += [str(int(highest["layer"])) if highest["layer"] >= 0 else "-"]
        rows.append(made)
    return text_table(header, rows, left_columns=2)


def _quality_table(group: pd.DataFrame) -> str:
    header = [
        "data", "sparsity", "batch", "step s", "profiled step s", "ratio", "busy s", "cells' sum s", "idle %",
        "launches", "us of step a launch", "attributed %", "layer spans s: unprofiled", "profiled", "difference %",
    ]  # fmt: skip
    rows = [
        [
            *_bar(row), number(row["step_s"]), number(row["profiled_step_s"]), number(row["profiled_over_unprofiled"]),
            number(row["busy_s"]), number(row["cells_sum_s"]), number(100 * row["idle_frac"]),
            number(row["num_launches"]), number(row["step_us_per_launch"]),
            f"{100 * row['attributed_frac']:.2f}", number(row["layer_span_s"]), number(row["profiled_layer_span_s"]),
            number(100 * (row["profiled_layer_span_s"] / row["layer_span_s"] - 1)) if row["layer_span_s"] else "-",
        ]
        for row in records(group)
    ]  # fmt: skip
    return text_table(header, rows, left_columns=2)


def _bar(row: dict[str, Any]) -> list[str]:
    length = "" if pd.isna(row["seq_len_tokens"]) else f" len {int(row['seq_len_tokens'])}"
    return [f"{row['dataset']}{length}", row["sparsity"], str(int(row["per_device_batch_size"]))]


def _label(row: dict[str, Any]) -> str:
    data, sparsity, batch = _bar(row)
    return f"{row['model']} {data} {sparsity} batch {batch}"


def _scope(row: dict[str, Any], layer: int | None) -> str:
    return f"layer {layer}" if layer is not None else f"sum of {int(row['num_layers'])} layers"
