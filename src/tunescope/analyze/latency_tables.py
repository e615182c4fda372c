"""All latency points below a folder as one set of tables, the paper's numbers beside ours."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tunescope import expert_tokens as expert_files
from tunescope import results
from tunescope.analyze.experts import ALL_LAYERS as EVERY_LAYER
from tunescope.analyze.experts import ExpertPoint, expert_tokens
from tunescope.analyze.latency import KEY, LatencyPoint, key_columns, latency_point
from tunescope.analyze.points import ATTACHED, UNREADABLE, Row, point_folders, read_row
from tunescope.config import LATENCY, PAPER_DATASETS, Point
from tunescope.paper import latency as papers

# What every row of points has, unreadable ones too; ok rows have LatencyPoint.summary's columns as well.
POINT_COLUMNS = (
    *KEY, "status", "cause", "clock", "tokenizer", "moe", "scan", "attention", "compute_dtype", "torch",
    "peak_allocated_gib", "oom_snapshot", "expert_probe_why_not", "is_papers_model",
)  # fmt: skip
TABLES = ("phases", "layers", "operators", "memory", "memory_parts", "expert_loads")


@dataclass(frozen=True)
class LatencyTables:
    """points: one row a point, with its status and, if it is ok, what LatencyPoint.summary says.

    phases, layers, operators, memory: rows of all ok points, with KEY and the paper's values. Layers outside of decoder
    layers have number -1. experts: of each point that has them.
    """

    points: pd.DataFrame
    phases: pd.DataFrame
    layers: pd.DataFrame
    operators: pd.DataFrame
    memory: pd.DataFrame
    memory_parts: pd.DataFrame
    expert_loads: pd.DataFrame
    experts: list[ExpertPoint]


def latency_tables(folder: Path) -> LatencyTables:
    """Reads every latency point at or below `folder`. One that cannot be read is a row with status `unreadable`.

    Raises UserError if there is no such folder or no point in it.
    """
    rows: list[Row] = []
    frames: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    for path in point_folders(folder, "./mixtral_lt.sh or ./mamba_lt.sh"):
        row = read_row(path, LATENCY, _tables_of_point)
        found = row.pop("tables", None)
        rows.append(row)
        if found is not None:
            for name, frame in found.items():
                frames[name].append(frame)
    rows.sort(key=_order)
    experts = [point for row in rows if (point := row.pop("experts", None)) is not None]
    places = {row["folder"]: place for place, row in enumerate(rows)}
    columns = dict.fromkeys([*POINT_COLUMNS, *(name for row in rows for name in row)])
    return LatencyTables(
        points=pd.DataFrame(rows, columns=list(columns)),
        **{name: _joined(frames[name], places) for name in TABLES},
        experts=experts,
    )


def _tables_of_point(found: results.PointFolder) -> Row:
    """The point's row; under `tables` its tables, under `experts` its expert loads, if it is ok."""
    row = latency_point(found)
    point: LatencyPoint | None = row.pop("point", None)
    if point is None:
        return row
    row |= point.summary()
    bar = (row["model"], row["top_k"], row["per_device_batch_size"], row["seq_len_tokens"])
    row["paper_a40_ablation_s"] = papers.ablation_s(*bar)
    tables = {
        "phases": _beside(point.phases(), "phase", "paper_a40_s", papers.phase_s(*bar)),
        "layers": point.layers(),
        "operators": _operators(point, papers.kernel_us(*bar)),
        "memory": point.memory(),
        "memory_parts": point.memory_parts(),
    }
    experts = _experts(found, row)
    if experts is not None:
        loads = experts.loads[experts.loads["layer"] != EVERY_LAYER]
        tables["expert_loads"] = loads.drop(columns=[name for name in KEY if name in loads])
    for name, frame in tables.items():
        tables[name] = pd.concat(
            [pd.DataFrame([key_columns(row)] * len(frame), index=frame.index, columns=list(KEY)), frame], axis=1
        )
    return row | {"tables": tables, "experts": experts}


def _experts(found: results.PointFolder, row: Row) -> ExpertPoint | None:
    if row["preset"] == ATTACHED:
        return None
    rows = results.read_arrow(found.path / expert_files.EXPERT_TOKENS_FILE, expert_files.EXPERT_TOKENS_SCHEMA)
    if not rows.num_rows:
        return None
    return ExpertPoint(
        label=Point(**found.point["point"]).label,
        model=row["model"],
        device=row["device"],
        preset=row["preset"],
        weights=row["weights"],
        synthetic_probes=tuple(name for name in PAPER_DATASETS if name not in found.point["probes"]),
        loads=expert_tokens(rows),
    )


def _operators(point: LatencyPoint, papers_us: dict[str, float]) -> pd.DataFrame:
    """The paper's numbers stand beside the operators of its figure's part only."""
    frame = _beside(point.operators(), "label", "paper_a40_us_per_launch", papers_us)
    frame.loc[frame["part"] != point.op_part, "paper_a40_us_per_launch"] = np.nan
    return frame


def _beside(frame: pd.DataFrame, column: str, name: str, values: dict[str, float]) -> pd.DataFrame:
    frame[name] = frame[column].map(values).astype(float)
    return frame


def _order(row: Row) -> tuple[Any, ...]:
    """By machine, preset and model; sparse before dense, then by length and batch, as Figure 4 has its bars."""
    if row["status"] == UNREADABLE:
        return (1, row["folder"])
    return (
        0, row["model"], row["device"], row["preset"], row["dataset"], row["top_k"] or 0, row["seq_len_tokens"] or 0,
        row["per_device_batch_size"], row["folder"],
    )  # fmt: skip


def _joined(frames: list[pd.DataFrame], places: dict[str, int]) -> pd.DataFrame:
    if not frames:
        return pd.DataFrame(columns=list(KEY))
    table = pd.concat(frames, ignore_index=True)
    return table.iloc[table["folder"].map(places).argsort(kind="stable")].reset_index(drop=True)


def summed_over_layers(layers: pd.DataFrame, layer: int | None = None) -> pd.DataFrame:
    """part x phase of one point's `layers`: decoder layers summed, or just one of them; what is outside of layers as
    it is (left out for a single layer). Columns busy_ns, num_launches, span_ns."""
    chosen = layers if layer is None else layers[layers["layer"] == layer]
    values = ["busy_ns", "num_launches", "span_ns"]
    return chosen.groupby(["part", "phase"], sort=False)[values].sum(min_count=1).reset_index()


def tidy(tables: LatencyTables) -> pd.DataFrame:
    """Every number of every table as one row: KEY, table, layer, part, item, phase, moment, quantity, value.

    item: the part of a layer; of operators the operator, whose part is in `part`.
    """
    part = ["layer", "part"]
    shapes: dict[str, list[str]] = {"phases": [], "layers": part, "operators": [*part, "label"], "memory": part}
    made = []
    for name, ids in shapes.items():
        frame = getattr(tables, name)
        if frame.empty:
            continue
        long = frame.melt([*KEY, *ids, "phase"], var_name="quantity", value_name="value")
        names = {"label": "item"} if "label" in long else {"part": "item"}
        long = long.rename(columns=names).assign(table=name)
        made.append(long[pd.to_numeric(long["value"], errors="coerce").notna()])
    parts = tables.memory_parts.rename(columns={"part": "item"})
    if not parts.empty:
        parts = parts.melt([*KEY, "moment", "item"], var_name="quantity", value_name="value").assign(
            table="memory_parts"
        )
        made.append(parts)
    loads = tables.expert_loads
    if not loads.empty:
        shown = loads.assign(item=[f"expert {number}" for number in loads["expert"]])
        shown["moment"] = [f"{probe} {when}" for probe, when in zip(loads["probe"], loads["when"], strict=True)]
        ids = [*KEY, "layer", "item", "moment"]
        shown = shown[[*ids, "tokens", "tokens_per_query"]].melt(ids, var_name="quantity", value_name="value")
        made.append(shown.assign(table="expert_loads"))
    columns = [*KEY, "table", "layer", "part", "item", "phase", "moment", "quantity", "value"]
    return pd.concat(made, ignore_index=True).reindex(columns=columns) if made else pd.DataFrame(columns=columns)
