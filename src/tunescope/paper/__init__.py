"""The paper's own numbers (arXiv 2408.04693), as CSV beside this file, and the few ways they are looked up.

Values are the artifact's, digit for digit; `source` and `note` columns say where each came from.
"""

import csv
import io
from functools import cache
from importlib.resources import files
from typing import NamedTuple

GPU = "NVIDIA A40"  # every launcher of the paper ran on it; sweeps on other GPUs say so in `gpu`


@cache
def rows(table: str) -> tuple[dict[str, str], ...]:
    """All rows of `<table>.csv`, in file order: column of its header -> text."""
    text = (files(__name__) / f"{table}.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(io.StringIO(text)))


def figure8_order(model: str) -> list[tuple[str, int, int]]:
    """(dataset, top_k, batch) of the bars of Figure 8, left to right; batch as the figure labels it."""
    return [
        (row["dataset"], int(row["top_k"]), int(row["batch_size"]))
        for row in rows("throughput")
        if row["figure"] == "Fig. 8" and row["model"] == model
    ]


@cache
def a40_queries_per_s(model: str, dataset: str, top_k: int, batch_size: int) -> float | None:
    """Measured A40 throughput (queries/s) of Figures 8 and 14 at one batch size, None where not measured.

    Looked up by `sweep_batch_size`: four MATH bars of Figure 8 wear a smaller batch label than the
    identical value has in Figure 14, and step times only make sense with the latter.
    """
    for row in rows("throughput"):
        if (row["gpu"], row["model"], row["dataset"]) == ("a40", model, dataset) and (
            int(row["top_k"]),
            int(row["sweep_batch_size"] or row["batch_size"]),
        ) == (top_k, batch_size):
            return float(row["throughput_queries_per_s"])
    return None


class RelabelledBar(NamedTuple):
    """A bar of Figure 8 whose value the paper's own sweep (Figure 14) has at another batch size, which step times
    support."""

    dataset: str
    top_k: int
    figure_batch_size: int
    sweep_batch_size: int
    queries_per_s: float


@cache
def relabelled_bars(model: str) -> tuple[RelabelledBar, ...]:
    """Of one model, in the figure's order."""
    return tuple(
        RelabelledBar(
            row["dataset"],
            int(row["top_k"]),
            int(row["batch_size"]),
            int(row["sweep_batch_size"]),
            float(row["throughput_queries_per_s"]),
        )
        for row in rows("throughput")
        if row["figure"] == "Fig. 8"
        and row["model"] == model
        and row["sweep_batch_size"] not in ("", row["batch_size"])
    )


def length_histogram(dataset: str) -> tuple[list[int], list[int]]:
    """Token lengths of the queries of `cs` or `math` and how many queries have each (Figure 2).

    Zero bins are left out. The tokenizer and template behind the histogram are not recorded.
    Raises KeyError for another data set.
    """
    bins = [row for row in rows("token_lengths") if row["dataset"] == dataset and int(row["count"])]
    if not bins:
        raise KeyError(dataset)
    return [int(row["length_tokens"]) for row in bins], [int(row["count"]) for row in bins]
