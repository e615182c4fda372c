"""The paper's tokens per expert (Figure 11, on an A40): looked up by the names this project gives probes and moments.

The figure labels its inputs HE and GS, its text says CS and MATH; looked up here is the text's reading (items 5, 6 and
34 of the transcription's list of contradictions).
"""

from functools import cache
from typing import NamedTuple

from tunescope import paper

FIGURE_LABELS = {"cs": "he", "math": "gs"}
MOMENTS = {"before": "pretrained", "after": "tuned"}
TOP_K = 2  # the figure has no other


class PrintedVariance(NamedTuple):
    """A variance over experts, (tokens/query)^2, as printed above the bars, and by which definition it was computed.

    population: recomputed from the bars; the printed one is a sample variance in some places.
    """

    dataset: str
    when: str
    printed: float
    definition: str
    population: float


@cache
def a40_tokens_per_query(model: str, dataset: str, when: str) -> tuple[float, ...] | None:
    """Tokens per query given to each expert, mean over layers as it seems; None where the figure has no bars."""
    bars = [
        (int(row["expert_index"]), float(row["tokens_per_query"]))
        for row in paper.rows("expert_tokens")
        if (row["model"], row["dataset"], row["tuning"]) == (model, FIGURE_LABELS.get(dataset), MOMENTS.get(when))
    ]
    return tuple(tokens for _, tokens in sorted(bars)) or None


@cache
def a40_variances(model: str) -> tuple[PrintedVariance, ...]:
    """The variances printed in the figure for a model, in its order; empty for a model that it does not have."""
    datasets = {label: dataset for dataset, label in FIGURE_LABELS.items()}
    moments = {label: when for when, label in MOMENTS.items()}
    return tuple(
        PrintedVariance(
            dataset=datasets[row["dataset"]],
            when=moments[row["tuning"]],
            printed=float(row["variance_printed"]),
            definition=row["printed_convention"],
            population=float(row["variance_population"]),
        )
        for row in paper.rows("expert_token_variance")
        if row["model"] == model
    )
