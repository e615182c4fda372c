"""The paper's numbers and how they are looked up (inconsistencies 1 and 2 of the transcription)."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tunescope import paper

TABLES = sorted(file.stem for file in Path(paper.__file__).parent.glob("*.csv"))


@pytest.mark.parametrize(
    ("dataset", "top_k", "batch", "queries_per_s"),
    [
        ("cs", 8, 1, 0.3213791846),
        ("cs", 8, 2, 0.5138618605),
        ("cs", 2, 1, 0.341252845),
        ("cs", 2, 2, 0.6567373669),
        ("cs", 2, 8, 1.655243555),
        ("math", 8, 1, 0.2833587728),
        ("math", 2, 1, 0.3354076283),
        ("math", 2, 3, 0.8325194069),  # the figure's bar "3" shows 1.005, which its own sweep has at batch 4
        ("math", 2, 4, 1.005476933),
    ],
)
def test_lookup_is_by_the_batch_of_the_sweeps(dataset: str, top_k: int, batch: int, queries_per_s: float) -> None:
    assert paper.a40_queries_per_s("mixtral", dataset, top_k, batch) == queries_per_s


@pytest.mark.parametrize(
    ("top_k", "batch", "queries_per_s"),
    [(8, 2, 3.231858367), (8, 3, 5.321407704), (2, 2, 4.56952556), (2, 8, 11.09739966), (2, 10, 11.6119473)],
)
def test_blackmamba_lookup_is_by_the_batch_of_the_sweeps(top_k: int, batch: int, queries_per_s: float) -> None:
    assert paper.a40_queries_per_s("blackmamba", "math", top_k, batch) == queries_per_s


@pytest.mark.parametrize(
    ("model", "dataset", "top_k", "batch"),
    [
        ("mixtral", "cs", 8, 3),
        ("mixtral", "cs", 2, 9),
        ("mixtral", "math", 2, 5),
        ("mixtral", "math", 8, 2),
        ("mixtral", "cs", 4, 1),
        ("mixtral", "he", 2, 1),
        ("mixtral", "mine", 2, 1),
        ("llama", "cs", 2, 1),
    ],
)
def test_no_value_for_what_was_not_measured(model: str, dataset: str, top_k: int, batch: int) -> None:
    assert paper.a40_queries_per_s(model, dataset, top_k, batch) is None


def test_one_value_per_batch_of_the_sweeps() -> None:
    """The figure and the sweep agree wherever both have a value, so the order of rows does not matter."""
    values: dict[tuple[str, ...], set[float]] = {}
    for row in paper.rows("throughput"):
        if row["gpu"] == "a40":
            key = (row["model"], row["dataset"], row["top_k"], row["sweep_batch_size"])
            values.setdefault(key, set()).add(float(row["throughput_queries_per_s"]))
    assert all(len(found) == 1 for found in values.values())
    assert {row["sweep_batch_size"] == "" for row in paper.rows("throughput")} == {False}


def test_values_of_other_gpus_are_never_taken_for_the_a40s() -> None:
    others = {
        float(row["throughput_queries_per_s"]) for row in paper.rows("throughput") if row["gpu"] not in ("a40", "")
    }
    assert others
    for dataset in ("cs", "math"):
        for top_k in (2, 8):
            for batch in range(1, 40):
                assert paper.a40_queries_per_s("mixtral", dataset, top_k, batch) not in others


def test_ratios_of_the_figure_make_physical_sense() -> None:
    """Throughput grows with the batch, and sparse is never slower than dense at one batch size."""
    for dataset, largest in (("cs", 8), ("math", 4)):
        sparse = [paper.a40_queries_per_s("mixtral", dataset, 2, batch) for batch in range(1, largest + 1)]
        known = [value for value in sparse if value is not None]
        assert known == sorted(known)
        dense = paper.a40_queries_per_s("mixtral", dataset, 8, 1)
        assert dense is not None
        assert dense < known[0]


def test_figure_order_has_ten_blackmamba_bars() -> None:
    assert Counter(dataset for dataset, _, _ in paper.figure8_order("blackmamba")) == {"cs": 5, "math": 5}
    assert paper.figure8_order("llama") == []


# --- Figure 2 ---


@pytest.mark.parametrize(
    ("dataset", "num_queries", "median", "mean", "longest"),
    [("cs", 15119, 79, 99.887559, 512), ("math", 13921, 174, 187.262194, 1470)],
)
def test_histograms(dataset: str, num_queries: int, median: int, mean: float, longest: int) -> None:
    lengths, counts = paper.length_histogram(dataset)
    every = np.repeat(lengths, counts)
    assert len(every) == num_queries
    assert np.median(every) == median
    assert every.mean() == pytest.approx(mean, abs=1e-6)
    assert every.max() == longest
    assert min(counts) > 0
    assert lengths == sorted(set(lengths))


def test_no_histogram_for_another_data_set() -> None:
    with pytest.raises(KeyError):
        paper.length_histogram("gs")


# --- the files ---


@pytest.mark.parametrize("table", TABLES)
def test_packaged_tables_are_whole(table: str) -> None:
    rows = paper.rows(table)
    assert rows
    assert all(None not in row and None not in row.values() for row in rows)
    assert all(row["source"].strip() for row in rows if "source" in row)


@pytest.mark.parametrize("table", TABLES)
def test_packaged_tables_are_plain_csv(table: str) -> None:
    file = Path(paper.__file__).parent / f"{table}.csv"
    with file.open(newline="", encoding="utf-8") as opened:
        assert len({len(row) for row in csv.reader(opened)}) == 1
