"""Figure 11: tokens per expert and query, before and after training."""

from collections.abc import Iterator, Sequence
from typing import Any

from tunescope.analyze.experts import ALL_LAYERS, ExpertPoint
from tunescope.expert_tokens import AFTER, BEFORE
from tunescope.paper import experts as papers
from tunescope.report.figures.chart import PAPERS, Chart, entry, frame_of
from tunescope.report.figures.papers import NOT_MEASURED_YET
from tunescope.report.figures.papers import models as papers_models


def _top_k(point: ExpertPoint) -> int:
    return int(point.loads["top_k"].iloc[0]) if len(point.loads) else 0


def figure11(points: Sequence[ExpertPoint], models: Sequence[str] = ()) -> Chart:
    """Mean over layers of each expert's tokens per query, a panel for each set of queries and the first point of each
    model, machine and number of experts a token; the paper's beside those with its number, else apart.

    models: whose bars of the paper stand there even if no point is of them.
    """
    entries = []
    beside = set()  # models with bars of the paper in a panel of theirs
    first = {(point.model, point.device, point.preset, _top_k(point)): point for point in reversed(points)}
    for point in reversed(first.values()):
        loads = point.loads[point.loads["layer"] == ALL_LAYERS]
        for probe in dict.fromkeys(loads["probe"]):
            of_probe = loads[loads["probe"] == probe]
            panel = f"{probe} queries, {point.label} of {point.model}, {point.device}, preset {point.preset}"
            if point.weights == "random":
                panel += " (random weights)"
            for when in (BEFORE, AFTER):
                cells = of_probe[of_probe["when"] == when]
                key = f"{point.model}|{point.preset}|{point.label}|{probe}|{when}"
                series = f"{when} training"
                for expert, tokens in zip(cells["expert"], cells["tokens_per_query"], strict=True):
                    entries.append(entry(panel, f"expert {expert}", series, tokens, key=f"{key}|{expert}"))
                bars = papers.a40_tokens_per_query(point.model, str(probe), when)
                if bars is not None and (cells["top_k"] == papers.TOP_K).all() and point.preset == "full":
                    beside.add(point.model)
                    for expert, tokens in enumerate(bars):
                        entries.append(
                            entry(panel, f"expert {expert}", f"{PAPERS}, {when}", tokens, key=f"{key}|{expert}|paper")
                        )
    measured = [point.model for point in points]
    for model in papers_models([*measured, *models]):
        if model not in beside:
            entries += _apart(model, is_measured=model in measured)
    return Chart(
        "figure11_experts", "Figure 11: tokens per expert", frame_of(entries), "tokens per query", group_label="expert"
    )


def _apart(model: str, *, is_measured: bool) -> Iterator[dict[str, Any]]:
    """The paper's bars of a model, and ours as missing if no point is of it."""
    for probe in papers.FIGURE_LABELS:
        panel = f"{probe} queries, {model}, {PAPERS}"
        if not is_measured:
            missing = f"{BEFORE} training"
            yield entry(panel, "all experts", missing, None, note=NOT_MEASURED_YET, key=f"{model}|{probe}|missing")
        for when in (BEFORE, AFTER):
            for expert, tokens in enumerate(papers.a40_tokens_per_query(model, probe, when) or ()):
                yield entry(panel, f"expert {expert}", f"{PAPERS}, {when}", tokens)
