"""From the tables of latency points: Figures 4, 5 and 6; recompute, the GPU's busy time, and memory by phase."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from tunescope import latency_files as files
from tunescope.analyze.latency_tables import LatencyTables, summed_over_layers
from tunescope.analyze.layouts import LAYOUTS
from tunescope.analyze.points import UNREADABLE
from tunescope.families import FAMILIES
from tunescope.hardware import GIB
from tunescope.paper import latency as papers
from tunescope.report.figures import papers as unmeasured
from tunescope.report.figures.chart import (
    LOWER,
    PAPERS,
    STACKED,
    Chart,
    entry,
    frame_of,
    has_papers_size,
    in_order,
    key_of,
    label,
    machine,
)
from tunescope.report.text import records

MEASURED = "measured"
BACKWARD_ALONE = "backward, recompute apart"
_GROUP_LABEL = "data, sparsity, batch"
_SMALL_FRAC = 0.01  # of the time of a part: operators below it and without the paper's number are not drawn


def shown_rows(tables: LatencyTables) -> list[dict[str, Any]]:
    return records(tables.points[tables.points["status"] != UNREADABLE])


def figure4(tables: LatencyTables | None, models: Sequence[str] = ()) -> Chart:
    """Seconds of a step by phase, ours and the paper's. The paper's backward has the recompute in it, ours apart.

    tables: None without a point. models: whose bars of the paper stand there even if no point is of them; so in
    figure5 and figure6.
    """
    entries: list[dict[str, Any]] = []
    rows = [] if tables is None else shown_rows(tables)
    for row in rows:
        assert tables is not None
        seconds, lows, highs = (_by(tables.phases, row, "phase", f"duration_s{end}") for end in ("", "_low", "_high"))
        ours = _phases(seconds)
        intervals = {phase: (lows[phase], highs[phase]) for phase in ours if phase in lows}
        entries += _stack(machine(row), row, MEASURED, ours, "phase", intervals)
        entries += _beside(papers.phase_s, row, "phase")
    entries += _unmeasured(rows, models, papers.phase_s, "phase")
    order = (files.FORWARD, files.RECOMPUTE, BACKWARD_ALONE, files.BACKWARD, files.CLIP, files.OPTIMIZER_STEP)
    return _stacked("figure04_phases", "Figure 4: phases of a step", entries, "s a step", order)


def _phases(seconds: dict[str, float]) -> dict[str, float]:
    """The phases that add up to a step: recompute taken out of backward."""
    if not seconds:
        return {}
    made = {files.FORWARD: seconds[files.FORWARD], files.RECOMPUTE: seconds[files.RECOMPUTE]}
    made[BACKWARD_ALONE] = seconds[files.BACKWARD] - seconds[files.RECOMPUTE]
    for phase in (files.CLIP, files.OPTIMIZER_STEP, files.REST):
        made[phase] = max(seconds[phase], 0.0)  # what is left over may come out a rounding below zero
    return made


def figure5(tables: LatencyTables | None, models: Sequence[str] = ()) -> Chart:
    """GPU time of each part of the decoder layers (ms a step, all passes), ours and the paper's."""
    entries: list[dict[str, Any]] = []
    rows = [] if tables is None else shown_rows(tables)
    for row in rows:
        assert tables is not None
        of_point = _of_point(tables.layers, row)
        ours: dict[str, float] = {}
        if len(of_point):
            cells = summed_over_layers(of_point[of_point["layer"] >= 0])
            ours = {str(part): ns / 1e6 for part, ns in cells.groupby("part", sort=False)["busy_ns"].sum().items()}
        entries += _stack(machine(row), row, MEASURED, ours, "part")
        entries += _beside(_layer_ms, row, "part")
    entries += _unmeasured(rows, models, _layer_ms, "part")
    order = [part for layout in LAYOUTS for part in layout.parts]
    return _stacked("figure05_layers", "Figure 5: parts of the decoder layers", entries, "ms a step", order)


def figure6(tables: LatencyTables | None, models: Sequence[str] = ()) -> Chart:
    """Mean of one launch of each operator of the MoE layer (us), over all passes, the paper's beside it."""
    entries: list[dict[str, Any]] = []
    rows = [] if tables is None else shown_rows(tables)
    for row in rows:
        assert tables is not None
        panel = f"{label(row)} of {machine(row)}"
        cells = _of_point(tables.operators, row)
        cells = cells[cells["part"] == row.get("op_part")] if len(cells) else cells
        if cells.empty:
            entries.append(_no_operators(panel, row))
            entries += _papers_operators(panel, row) if has_papers_size(row) else []
            continue
        sums = cells.groupby("label", sort=False).agg(
            busy_ns=("busy_ns", "sum"),
            num_launches=("num_launches", "sum"),
            paper_us=("paper_a40_us_per_launch", "max"),
        )
        shown = sums[(sums["busy_ns"] >= _SMALL_FRAC * sums["busy_ns"].sum()) | sums["paper_us"].notna()]
        for name in in_order(map(str, shown.index), _op_order(row)):
            busy_ns, launches, paper_us = (float(shown.loc[name, column]) for column in shown.columns)
            bar: dict[str, Any] = {"panel": panel, "group": name}
            us = busy_ns / launches / 1e3 if launches else None
            entries.append(entry(**bar, series=MEASURED, value=us, key=key_of(row, name)))
            if has_papers_size(row) and paper_us == paper_us:
                entries.append(entry(**bar, series=PAPERS, value=paper_us, key=key_of(row, name, "paper")))
    for missing in unmeasured.breakdown_bars(rows, models):
        panel = f"{label(missing.row)} of {missing.panel}"
        entries += [] if missing.is_told else [_no_operators(panel, missing.row)]
        entries += _papers_operators(panel, missing.row)
    return Chart(
        "figure06_kernels", "Figure 6: one launch of each operator of the MoE layer", frame_of(entries),
        "us a launch", better=LOWER, group_label="operator",
    )  # fmt: skip


def recompute(tables: LatencyTables) -> Chart:
    """What part of the GPU's work in decoder layers and around them is forward, recompute and backward (%)."""
    entries: list[dict[str, Any]] = []
    for row in shown_rows(tables):
        of_point = _of_point(tables.layers, row)
        ours: dict[str, float] = {}
        if len(of_point):
            sums = of_point.groupby("phase", sort=False)["busy_ns"].sum()
            ours = {
                phase: 100 * float(sums.get(phase, 0.0)) / float(sums.sum())
                for phase in in_order(map(str, sums.index), files.PHASES)
            }
        entries += _stack(machine(row), row, MEASURED, ours, "share")
    return _stacked("recompute", "Recompute's share of the work", entries, "% of busy time", files.PHASES)


def busy(tables: LatencyTables) -> Chart:
    """How long of a step the GPU is busy, and how long it waits (%)."""
    entries: list[dict[str, Any]] = []
    for row in shown_rows(tables):
        idle: Any = row.get("idle_frac")
        ours = {} if idle is None or pd.isna(idle) else {"busy": 100 * (1 - idle), "idle": 100 * idle}
        entries += _stack(machine(row), row, MEASURED, ours, "busy")
    return _stacked("busy", "The GPU busy and idle", entries, "% of a step", ("busy", "idle"))


def memory(tables: LatencyTables) -> Chart:
    """Highest allocated memory in each phase (GiB); without a GPU the growth since the step began."""
    entries: list[dict[str, Any]] = []
    for row in shown_rows(tables):
        of_point = _of_point(tables.memory, row)
        panel, group = machine(row), label(row)
        if of_point.empty:
            entries.append(entry(panel, group, files.FORWARD, None, note=str(row["status"]), key=key_of(row, "GiB")))
            continue
        peaks = of_point.groupby("phase", sort=False)["peak_bytes"].max() / GIB
        for phase in in_order(map(str, peaks.index), files.PHASES):
            if phase in files.PHASES:
                value = float(peaks[phase])
                entries.append(entry(panel, group, phase, value, key=key_of(row, phase, "GiB")))
    return Chart(
        "memory",
        "Peak memory by phase",
        frame_of(entries),
        "GiB allocated",
        better=LOWER,
        group_label=_GROUP_LABEL,
        order=files.PHASES,
    )


# --- rows ------------------------------------------------------------------------------------------------------------


def _of_point(frame: pd.DataFrame, row: dict[str, Any]) -> pd.DataFrame:
    return frame[frame["folder"] == row["folder"]] if len(frame) else frame


def _by(frame: pd.DataFrame, row: dict[str, Any], key: str, value: str) -> dict[str, float]:
    if frame.empty:
        return {}
    cells = frame[frame["folder"] == row["folder"]]
    return dict(zip(cells[key].astype(str), cells[value].astype(float), strict=True))


def _op_order(row: Mapping[str, Any]) -> Sequence[str]:
    layout = FAMILIES[row["model"]].layout if row["model"] in FAMILIES else None
    return layout.op_order if layout else ()


def _no_operators(panel: str, row: dict[str, Any]) -> dict[str, Any]:
    note = str(row["status"]) if row["status"] != "ok" else ""
    return entry(panel, "all operators", MEASURED, None, note=note, key=key_of(row, "operators", "missing"))


def _papers_operators(panel: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    theirs = _papers(papers.kernel_us, row)
    return [
        entry(panel, name, PAPERS, theirs[name], key=key_of(row, name, "paper"))
        for name in in_order(theirs, _op_order(row))
    ]


def _layer_ms(*bar: Any) -> dict[str, float]:
    return {part: 1e3 * seconds for part, seconds in papers.layer_s(*bar).items()}


def _papers(lookup: Any, row: dict[str, Any]) -> dict[str, float]:
    if row["top_k"] is None or pd.isna(row["top_k"]) or pd.isna(row["seq_len_tokens"]):
        return {}
    bar = (row["model"], int(row["top_k"]), int(row["per_device_batch_size"]), int(row["seq_len_tokens"]))
    found: dict[str, float] = lookup(*bar)
    return found


def _beside(lookup: Any, row: dict[str, Any], what: str) -> Iterable[dict[str, Any]]:
    """The paper's bar in the panel of a point of its own size."""
    theirs = _papers(lookup, row) if has_papers_size(row) else {}
    return _stack(machine(row), row, PAPERS, theirs, what) if theirs else ()


def _unmeasured(
    rows: Sequence[dict[str, Any]], models: Sequence[str], lookup: Any, what: str
) -> Iterator[dict[str, Any]]:
    """The paper's bars that stand beside no point, and ours there as missing."""
    for missing in unmeasured.breakdown_bars(rows, models):
        if not missing.is_told:
            yield from _stack(missing.panel, missing.row, MEASURED, {}, what)
        theirs = _papers(lookup, missing.row)
        if theirs:
            yield from _stack(missing.panel, missing.row, PAPERS, theirs, what)


def _stack(
    panel: str,
    row: dict[str, Any],
    bar: str,
    values: dict[str, float],
    what: str,
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> Iterator[dict[str, Any]]:
    """One bar's segments. intervals: of those that have one; a stacked figure has no room for them, its table has."""
    group = label(row)
    if not values:
        note = str(row["status"]) if row["status"] != "ok" else ""
        yield entry(panel, group, "missing", None, bar=bar, note=note, key=key_of(row, what, bar, "missing"))
    for series, value in values.items():
        interval = (intervals or {}).get(series, (None, None))
        yield entry(panel, group, series, value, interval=interval, bar=bar, key=key_of(row, what, bar, series))


def _stacked(name: str, title: str, entries: list[dict[str, Any]], value_label: str, order: Iterable[str]) -> Chart:
    """Segments in `order`."""
    made = frame_of(entries)
    series = in_order(made["series"], list(order))
    if len(made):
        ranks = {name: rank for rank, name in enumerate(series)}
        places = {key: rank for rank, key in enumerate(dict.fromkeys(zip(made["panel"], made["place"], strict=True)))}
        ordered = made.assign(
            rank=made["series"].map(ranks),
            at=[places[key] for key in zip(made["panel"], made["place"], strict=True)],
            second=made["bar"].ne(MEASURED),
        ).sort_values(["at", "second", "rank"], kind="stable")
        made = ordered.drop(columns=["rank", "at", "second"]).reset_index(drop=True)
    return Chart(name, title, made, value_label, kind=STACKED, better=LOWER, group_label=_GROUP_LABEL)
