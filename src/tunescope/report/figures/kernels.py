"""From the tables of kernel points: Figures 9 and 10, and the roofline."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from tunescope import paper
from tunescope.analyze.kernel_tables import ALL, KernelTables
from tunescope.analyze.kernels import TIME_WEIGHTED
from tunescope.analyze.points import UNREADABLE
from tunescope.analyze.roofline import Rooflines
from tunescope.errors import UserError
from tunescope.families import FAMILIES
from tunescope.hardware import find_device
from tunescope.ncu.counters import DRAM_PERCENT, MEMORY_PERCENT, SM_PERCENT
from tunescope.paper import utilization
from tunescope.report.figures import papers as unmeasured
from tunescope.report.figures.chart import (
    HIGHER,
    PAPERS,
    SCATTER,
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

_SM = ("paper_sm_percent", utilization.sm_percent)
_MEMORY = ("paper_memory_percent", utilization.memory_percent)
_SMALL_FRAC = 0.01  # of the part's time: operators below it and without the paper's number are not drawn


def figure9(tables: KernelTables | None, models: Sequence[str] = ()) -> Chart:
    """SM utilisation (%) of the MoE layer's operators, the paper's beside it.

    tables: None without a point. models: whose bars of the paper stand there even if no point is of them; so in
    figure10.
    """
    return _utilization(tables, models, "figure09_sm", "Figure 9: SM utilisation", (("SM", SM_PERCENT),), _SM)


def figure10(tables: KernelTables | None, models: Sequence[str] = ()) -> Chart:
    """Nsight Compute's "Memory [%]" of the MoE layer's operators, DRAM's own (%) and the paper's beside it."""
    metrics = (("Memory [%]", MEMORY_PERCENT), ("DRAM", DRAM_PERCENT))
    return _utilization(tables, models, "figure10_memory", "Figure 10: memory utilisation", metrics, _MEMORY)


def _utilization(
    tables: KernelTables | None,
    models: Sequence[str],
    name: str,
    title: str,
    metrics: tuple[tuple[str, str], ...],
    papers: tuple[str, Callable[..., dict[str, float]]],
) -> Chart:
    paper_column, lookup = papers
    entries = []
    rows = [] if tables is None else records(tables.points[tables.points["status"] != UNREADABLE])
    for row in rows:
        assert tables is not None
        cells = tables.operators
        cells = cells[(cells["folder"] == row["folder"]) & (cells["phase"] == ALL)] if len(cells) else cells
        panel = f"{label(row)} of {machine(row)}"
        has_paper = has_papers_size(row)
        if cells.empty:
            entries.append(_nothing(panel, metrics[0][0], row))
            entries += _papers_alone(panel, lookup, row) if has_paper else []
            continue
        panel += f" ({row.get('source')})"
        by_label = cells.set_index("label")
        small = (by_label["share_frac"] < _SMALL_FRAC) & by_label[paper_column].isna()
        for operator in _ordered(map(str, by_label.index[~small]), row):
            for series, metric in metrics:
                value: Any = by_label.loc[operator, metric]
                entries.append(entry(panel, _shown(operator), series, value, key=key_of(row, operator, series)))
            theirs: Any = by_label.loc[operator, paper_column]
            if has_paper and pd.notna(theirs):
                entries.append(entry(panel, _shown(operator), PAPERS, theirs, key=key_of(row, operator, "paper")))
    for missing in unmeasured.breakdown_bars(rows, models):
        panel = f"{label(missing.row)} of {missing.panel}"
        entries += [] if missing.is_told else [_nothing(panel, metrics[0][0], missing.row)]
        entries += _papers_alone(panel, lookup, missing.row)
    return Chart(name, title, frame_of(entries), "%", better=HIGHER, group_label="operator")


def _nothing(panel: str, series: str, row: dict[str, Any]) -> dict[str, Any]:
    return entry(panel, "all operators", series, None, note=str(row["status"]), key=key_of(row, series, "missing"))


def _papers_alone(panel: str, lookup: Callable[..., dict[str, float]], row: dict[str, Any]) -> list[dict[str, Any]]:
    theirs = lookup(row["model"], row["top_k"], row["per_device_batch_size"], row["seq_len_tokens"])
    return [
        entry(panel, _shown(operator), PAPERS, theirs[operator], key=key_of(row, operator, "paper"))
        for operator in _ordered(theirs, row)
    ]


def _ordered(operators: Iterable[str], row: Mapping[str, Any]) -> list[str]:
    """As the layout has them, the mean over all by time last."""
    layout = FAMILIES[row["model"]].layout if row["model"] in FAMILIES else None
    ordered = in_order(operators, layout.op_order if layout else ())
    return sorted(ordered, key=lambda each: each == TIME_WEIGHTED)


def _shown(operator: str) -> str:
    return "all, by time" if operator == TIME_WEIGHTED else operator


def roofline(found: Rooflines) -> Chart:
    """Each operator of the MoE layer by its FLOP per byte and the TFLOP/s it attains, under the GPU's ceilings."""
    entries = []
    ceilings: dict[str, list[dict[str, Any]]] = {}
    for row in records(found.points[found.points["status"] == "ok"]):
        cells = found.operators[found.operators["folder"] == row["folder"]]
        cells = cells[(cells["flop"] > 0) & (cells["num_bytes"] > 0)]
        if cells.empty:
            continue
        panel = f"{label(row)} of {machine(row)}"
        for cell in records(cells.sort_values("busy_ns", ascending=False)):
            entries.append(
                entry(
                    panel, str(cell["label"]), f"bound by {cell['bound']}", cell["flop_per_s"] / 1e12,
                    x=cell["intensity_flop_per_byte"], key=key_of(row, str(cell["label"]), "TFLOP/s"),
                )
            )  # fmt: skip
        ceilings[panel] = _ceilings(str(row["roofline_device"]), cells["intensity_flop_per_byte"])
    return Chart(
        "roofline", "Roofline of the MoE layer's operators", frame_of(entries), "TFLOP/s", kind=SCATTER,
        x_label="FLOP per byte", group_label="operator", is_log=True, better=HIGHER,
        extra={"ceilings": ceilings, "is_named": True},
    )  # fmt: skip


def _ceilings(name: str, intensities: pd.Series) -> list[dict[str, Any]]:
    try:
        device = find_device(name or paper.GPU)
    except UserError:
        return []
    low, high = float(intensities.min()) / 2, max(float(intensities.max()) * 2, 1e3)
    lines = []
    for peak, words in ((device.peak_bf16_flop_per_s, "bf16"), (device.peak_fp32_flop_per_s, "fp32")):
        ridge = peak / device.dram_bytes_per_s
        corner = [low * device.dram_bytes_per_s / 1e12, peak / 1e12, peak / 1e12]
        lines.append({"x": [low, ridge, high], "y": corner, "name": f"{words} peak"})
    return lines
