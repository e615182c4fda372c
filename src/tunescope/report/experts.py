"""Figure 11 as a table: tokens per expert and query before and after training, the paper's A40 beneath."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tunescope import paper
from tunescope.analyze.experts import ALL_LAYERS, STATISTICS, ExpertPoint, expert_summary, load_statistics
from tunescope.expert_tokens import AFTER, BEFORE
from tunescope.paper import experts as papers
from tunescope.report.text import number, text_table

NO_CONCLUSION = "random weights: no conclusion about routing can be drawn"
_PAPER = f"{paper.GPU.removeprefix('NVIDIA ')} paper"
_BUSIEST_OF_MIXTRAL = (
    "The paper's text names expert 3 as the busiest of mixtral after tuning; in its data and legend that is e2."
)
_FOOTER_WIDTH = 120
_POINT_COLUMNS = ("point", "model", "device", "preset", "weights", "probe_data")
_COMPARED = ("expert_imbalance", "coefficient_of_variation", "variance_population", "load_entropy_bits")


def experts_text(points: Sequence[ExpertPoint]) -> str:
    """One block for each model, device and preset, then the footer. Empty where no point has expert counts."""
    points = [point for point in points if not point.loads.empty]
    if not points:
        return ""
    blocks = []
    for key in dict.fromkeys((point.model, point.device, point.preset) for point in points):
        group = [point for point in points if (point.model, point.device, point.preset) == key]
        model, device, preset = key
        title = f"Figure 11: tokens per expert and query of {model} on {device}, preset {preset}, over layers"
        blocks.append(f"{title}\n\n{_block(group)}")
    footer = [part for line in _footer(points) for part in textwrap.wrap(line, _FOOTER_WIDTH)]
    return "\n\n".join([*blocks, "\n".join(footer)])


def expert_loads_frame(points: Iterable[ExpertPoint]) -> pd.DataFrame:
    """Every load of every point, for csv and json: _POINT_COLUMNS, analyze's LOAD_COLUMNS, and the paper's bar where
    it has one (mean over layers, top-2)."""
    return _joined(points, lambda point: point.loads, _paper_loads, ["paper_a40_tokens_per_query"])


def expert_summary_frame(points: Iterable[ExpertPoint]) -> pd.DataFrame:
    """Every layer's evenness of every point, for csv and json: _POINT_COLUMNS, analyze's SUMMARY_COLUMNS, and the
    same statistics of the paper's bars where it has them (mean over layers, top-2)."""
    names = [f"paper_a40_{name}" for name in _COMPARED]
    return _joined(points, lambda point: expert_summary(point.loads), _paper_statistics, names)


def _joined(
    points: Iterable[ExpertPoint],
    table: Callable[[ExpertPoint], pd.DataFrame],
    beside: Callable[[ExpertPoint, dict[Any, Any]], list[float] | None],
    names: list[str],
) -> pd.DataFrame:
    """The tables of all points beneath each other, each row with what describes its point and with beside(point, row):
    values for the columns `names`, or None."""
    frames = []
    for point in points:
        frame = table(point).copy()
        synthetic = frame["probe"].isin(point.synthetic_probes)
        frame.insert(0, "probe_data", np.where(synthetic, "synthetic", "file"))
        for name in reversed(_POINT_COLUMNS[:-1]):
            frame.insert(0, name, point.label if name == "point" else getattr(point, name))
        papers_own = [beside(point, row) or [np.nan] * len(names) for row in frame.to_dict("records")]
        columns = pd.DataFrame(papers_own, columns=names, index=frame.index, dtype=float)
        frames.append(pd.concat([frame, columns], axis=1))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*_POINT_COLUMNS, *names])


def _papers_bars(point: ExpertPoint, row: dict[Any, Any]) -> tuple[float, ...] | None:
    if row["layer"] != ALL_LAYERS or row["top_k"] != papers.TOP_K:
        return None
    return papers.a40_tokens_per_query(point.model, row["probe"], row["when"])


def _paper_loads(point: ExpertPoint, row: dict[Any, Any]) -> list[float] | None:
    bars = _papers_bars(point, row)
    return None if bars is None or row["expert"] >= len(bars) else [bars[row["expert"]]]


def _paper_statistics(point: ExpertPoint, row: dict[Any, Any]) -> list[float] | None:
    bars = _papers_bars(point, row)
    return None if bars is None else load_statistics(np.array([bars]))[list(_COMPARED)].iloc[0].tolist()


# --- text ------------------------------------------------------------------------------------------------------------


def _block(points: Sequence[ExpertPoint]) -> str:
    """Points of one model, device and preset."""
    num_experts = max(int(point.loads["num_experts"].iloc[0]) for point in points)
    header = (
        ["trained", "probe", "when"]
        + [f"e{expert}" for expert in range(num_experts)]
        + ["mean", "max/mean", "CV", "variance", "load bits", "router bits", "busiest", "worst layer"]
    )
    rows = [row for point in points for row in _point_rows(point)]
    if any((point.loads["top_k"] == papers.TOP_K).any() for point in points):
        probes = dict.fromkeys(probe for point in points for probe in point.loads["probe"])
        rows += [
            _cells(_PAPER, probe, when, bars, load_statistics(np.array([bars])).iloc[0].to_dict(), None, "-")
            for probe in probes
            for when in (BEFORE, AFTER)
            if (bars := papers.a40_tokens_per_query(points[0].model, probe, when)) is not None
        ]
    return text_table(header, rows, left_columns=3)


def _point_rows(point: ExpertPoint) -> list[list[str]]:
    summary = expert_summary(point.loads)
    made = []
    for row in summary[summary["layer"] == ALL_LAYERS].to_dict("records"):
        same = (point.loads["probe"] == row["probe"]) & (point.loads["when"] == row["when"])
        loads = point.loads.loc[same & (point.loads["layer"] == ALL_LAYERS), "tokens_per_query"]
        layers = summary[
            (summary["probe"] == row["probe"]) & (summary["when"] == row["when"]) & (summary["layer"] != ALL_LAYERS)
        ].reset_index(drop=True)
        worst = layers.iloc[layers["expert_imbalance"].idxmax()]
        statistics = {name: row[name] for name in STATISTICS}
        worst_layer = f"{number(worst['expert_imbalance'])} ({worst['layer']})"
        cells = (loads.tolist(), statistics, row["router_entropy_bits"], worst_layer)
        made.append(_cells(point.label, row["probe"], row["when"], *cells))
    return made


def _cells(
    trained: str,
    probe: str,
    when: str,
    tokens_per_query: Sequence[float],
    statistics: dict[Any, Any],
    router_entropy_bits: float | None,
    worst_layer: str,
) -> list[str]:
    return [
        trained,
        probe,
        when,
        *(number(tokens) for tokens in tokens_per_query),
        number(statistics["mean_tokens_per_query"]),
        number(statistics["expert_imbalance"]),
        number(statistics["coefficient_of_variation"]),
        number(statistics["variance_population"]),
        number(statistics["load_entropy_bits"], 4),
        number(router_entropy_bits, 4),
        "-" if statistics["variance_population"] == 0 else f"e{int(statistics['busiest_expert'])}",
        worst_layer,
    ]


def _footer(points: Sequence[ExpertPoint]) -> list[str]:
    loads = pd.concat([point.loads for point in points], ignore_index=True)
    num_experts = int(loads["num_experts"].max())
    lines = [
        f"Probe: {_numbers(loads['num_queries'])} fixed queries of each data set, run before the first step and after "
        f"the last, none of it timed. Recompute is not counted, nor is padding ({_padding_pct(loads):.0f} % of slots).",
        "Checked: in every layer the experts' tokens sum to tokens x top-k. e0 is expert 0.",
        "max/mean: 1 is even. CV: standard deviation over mean. variance: (tokens/query)^2, population; it grows with "
        "the square of a query's length.",
        f"load bits: entropy of the experts' shares, {np.log2(num_experts):g} is even. router bits: mean entropy of a "
        "token's own router scores, low is certain.",
        "Experts of one number in different layers have nothing in common, so the mean over layers looks more even "
        "than its layers: 'worst layer' is the largest max/mean of one, with its number. --format csv has every layer.",
    ]
    if any(point.weights == "random" for point in points):
        lines.append(f"{NO_CONCLUSION}.")
    synthetic = {probe for point in points for probe in point.synthetic_probes}
    if synthetic:
        lines.append(
            f"{', '.join(sorted(synthetic))}: synthetic queries, random words of the data set's lengths; how real "
            "text is routed cannot be read from them."
        )
    if (loads["top_k"] == loads["num_experts"]).any():
        lines.append("dense: every token goes to every expert, so that loads are even by definition.")
    for model in dict.fromkeys(point.model for point in points if (point.loads["top_k"] == papers.TOP_K).any()):
        lines += _paper_lines(model, set(loads["probe"]))
    return lines


def _paper_lines(model: str, probes: set[str]) -> list[str]:
    """Which reading of a figure that contradicts its text is shown."""
    variances = [variance for variance in papers.a40_variances(model) if variance.dataset in probes]
    if not variances:
        return []
    per_query = []
    for dataset in dict.fromkeys(variance.dataset for variance in variances):
        bars = papers.a40_tokens_per_query(model, dataset, BEFORE)
        if bars is not None:
            per_query.append(f"{dataset} {number(sum(bars) / papers.TOP_K, 4)}")
    labels = ", ".join(f"{label.upper()} for {dataset}" for dataset, label in papers.FIGURE_LABELS.items())
    printed = ", ".join(
        f"{variance.dataset} {variance.when} {variance.printed:g} ({variance.definition})" for variance in variances
    )
    return [
        f"{_PAPER}, {model}: the figure is labelled {labels}; the text says CS and MATH, which is the reading shown. "
        f"Its tokens per query ({', '.join(per_query)}: bars summed, over top-{papers.TOP_K}) match the lengths of "
        "neither and probably count padding: compare max/mean and CV, not tokens or variance.",
        f"{_PAPER}, {model}: variances as printed mix two definitions: {printed}. Shown is population throughout.",
        *([_BUSIEST_OF_MIXTRAL] if model == "mixtral" else []),
    ]


def _padding_pct(loads: pd.DataFrame) -> float:
    probes = loads.drop_duplicates(["probe", "num_tokens", "padding_tokens"])
    padding = float(probes["padding_tokens"].sum())
    return 100 * padding / (padding + float(probes["num_tokens"].sum()))


def _numbers(column: pd.Series) -> str:
    return " or ".join(str(value) for value in sorted(set(column)))
