"""Tokens per expert as tables: not a token lost between the counts and what is printed, the paper's beside them."""

import csv
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunescope import paper, results
from tunescope.analyze import experts as analyze
from tunescope.expert_tokens import AFTER, BEFORE, EXPERT_TOKENS_SCHEMA
from tunescope.paper import experts as papers
from tunescope.report import experts as report

NUM_EXPERTS = 8


def as_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=EXPERT_TOKENS_SCHEMA)


# --- analysis --------------------------------------------------------------------------------------------------------


def made_rows(
    loads_LE: list[list[int]], num_tokens: int, top_k: int, probe: str = "cs", when: str = BEFORE, num_queries: int = 4
) -> list[dict[str, Any]]:
    return [
        {
            "probe": probe,
            "when": when,
            "layer": layer,
            "expert": expert,
            "tokens": tokens,
            "num_queries": num_queries,
            "num_tokens": num_tokens,
            "padding_tokens": 3,
            "top_k": top_k,
            "num_experts": len(loads_LE[0]),
            "router_entropy_bits": 1.5,
        }
        for layer, loads_E in enumerate(loads_LE)
        for expert, tokens in enumerate(loads_E)
    ]


@st.composite
def routed(draw: Any) -> tuple[list[list[int]], int, int]:
    """Loads (layers, experts) of tokens that each chose top_k different experts in every layer."""
    num_experts = draw(st.integers(1, 8))
    top_k = draw(st.integers(1, num_experts))
    num_tokens = draw(st.integers(1, 12))
    chosen = st.permutations(range(num_experts)).map(lambda order: order[:top_k])
    layers = draw(st.lists(st.lists(chosen, min_size=num_tokens, max_size=num_tokens), min_size=1, max_size=3))
    loads = [[sum(expert in of_token for of_token in layer) for expert in range(num_experts)] for layer in layers]
    return loads, num_tokens, top_k


@given(routed(), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_no_token_is_lost_and_evenness_is_bounded(case: tuple[list[list[int]], int, int], num_queries: int) -> None:
    loads_LE, num_tokens, top_k = case
    num_experts = len(loads_LE[0])
    loads = analyze.expert_tokens(as_table(made_rows(loads_LE, num_tokens, top_k, num_queries=num_queries)))
    assert tuple(loads.columns) == analyze.LOAD_COLUMNS
    assert list(dict.fromkeys(loads["layer"])) == [*map(str, range(len(loads_LE))), analyze.ALL_LAYERS]
    of_all = loads[loads["layer"] == analyze.ALL_LAYERS]
    assert of_all["tokens"].sum() == num_tokens * top_k * len(loads_LE)
    for _, layer in loads.groupby("layer"):
        assert layer["tokens_per_query"].sum() * num_queries == pytest.approx(num_tokens * top_k)
    summary = analyze.expert_summary(loads)
    assert tuple(summary.columns) == analyze.SUMMARY_COLUMNS
    assert len(summary) == len(loads_LE) + 1
    within = 1e-9
    assert (summary["expert_imbalance"] >= 1 - within).all()
    assert (summary["expert_imbalance"] <= num_experts / top_k + within).all()
    assert (summary["load_entropy_bits"] <= math.log2(num_experts) + within).all()
    assert (summary["load_entropy_bits"] >= math.log2(top_k) - within).all()
    spread = summary["coefficient_of_variation"] * summary["mean_tokens_per_query"]
    assert np.allclose(spread**2, summary["variance_population"])


@given(routed(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_naming_experts_otherwise_changes_no_evenness(case: tuple[list[list[int]], int, int], rng: Any) -> None:
    loads_LE, num_tokens, top_k = case
    order = list(range(len(loads_LE[0])))
    rng.shuffle(order)
    renamed_LE = [[loads_E[number] for number in order] for loads_E in loads_LE]
    one, other = (
        analyze.expert_summary(analyze.expert_tokens(as_table(made_rows(loads, num_tokens, top_k))))
        for loads in (loads_LE, renamed_LE)
    )
    pd.testing.assert_frame_equal(one.drop(columns="busiest_expert"), other.drop(columns="busiest_expert"))
    for layer, (loads_E, renamed_E) in enumerate(zip(loads_LE, renamed_LE, strict=True)):
        assert renamed_E[other["busiest_expert"][layer]] == loads_E[one["busiest_expert"][layer]] == max(loads_E)


def test_known_loads_give_known_statistics() -> None:
    loads = analyze.expert_tokens(as_table(made_rows([[8, 0, 0, 0], [2, 2, 2, 2]], 8, 1)))
    summary = analyze.expert_summary(loads).set_index("layer")
    assert summary["expert_imbalance"].tolist() == [4, 1, 2.5]
    assert summary["load_entropy_bits"].tolist() == pytest.approx([0, 2, 1.5487949])
    assert summary["variance_population"].tolist() == pytest.approx([12 / 16, 0, 3 / 16])  # 4 queries
    assert summary["busiest_expert"].tolist() == [0, 0, 0]


def spoilt(name: str, value: Any, rows: slice = slice(None)) -> list[dict[str, Any]]:
    made = made_rows([[3, 1], [2, 2]], 4, 1) + made_rows([[1, 3], [2, 2]], 4, 1, when=AFTER)
    for row in made[rows]:
        row[name] = value
    return made


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (spoilt("tokens", 2, slice(1)), "gave its experts 3 tokens"),
        (spoilt("tokens", 5, slice(1)), "more tokens than the probe has"),
        (spoilt("tokens", -1, slice(1)), "fewer than none"),
        (spoilt("top_k", 2), "gave its experts 4 tokens"),
        (spoilt("top_k", 2, slice(1)), "several numbers"),
        (spoilt("top_k", 3), "top_k 3 of 2"),
        (spoilt("num_tokens", 5, slice(4, 8)), "other queries before training than after"),
        (spoilt("num_queries", 0), "a probe of no token"),
        (spoilt("expert", 0), "each of 2 experts once"),
        (spoilt("layer", 1)[:-1], "each of 2 experts once"),
        (spoilt("when", "later"), "a moment other than"),
        (spoilt("top_k", 1)[:6], "counted in one probe and not in another"),
    ],
)
def test_rows_of_no_probe_are_refused(rows: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(results.PointFormatError, match=words):
        analyze.expert_tokens(as_table(rows))


def test_no_rows_are_no_table() -> None:
    loads = analyze.expert_tokens(as_table([]))
    assert tuple(loads.columns) == analyze.LOAD_COLUMNS
    assert tuple(analyze.expert_summary(loads).columns) == analyze.SUMMARY_COLUMNS


# --- the paper -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mixtral", "blackmamba"])
def test_the_papers_variances_follow_from_its_bars(model: str) -> None:
    variances = papers.a40_variances(model)
    assert len(variances) == 4
    for variance in variances:
        bars = papers.a40_tokens_per_query(model, variance.dataset, variance.when)
        assert bars is not None
        assert len(bars) == NUM_EXPERTS
        statistics = analyze.load_statistics(np.array([bars])).iloc[0]
        assert statistics["variance_population"] == pytest.approx(variance.population, abs=1e-6)
        by_definition = np.var(bars, ddof={"sample": 1, "population": 0}[variance.definition])
        assert by_definition == pytest.approx(variance.printed, abs=0.051)


def test_the_papers_busiest_experts_and_sums_are_those_of_the_transcription() -> None:
    with (Path(paper.__file__).parent / "expert_token_variance.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            dataset = {"he": "cs", "gs": "math"}[row["dataset"]]
            when = {"pretrained": BEFORE, "tuned": AFTER}[row["tuning"]]
            bars = papers.a40_tokens_per_query(row["model"], dataset, when)
            assert bars is not None
            assert sum(bars) == pytest.approx(float(row["sum_tokens_per_query"]), abs=1e-6)
            assert bars.index(max(bars)) == int(row["busiest_expert_index"])


def test_what_the_figure_does_not_have_is_none() -> None:
    assert papers.a40_tokens_per_query("mixtral", "he", BEFORE) is None
    assert papers.a40_tokens_per_query("llama", "cs", BEFORE) is None
    assert papers.a40_variances("llama") == ()


# --- the report ------------------------------------------------------------------------------------------------------


# top_k -> loads of 4 tokens in each of two layers
LOADS = {
    1: [[1, 3, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]],
    2: [[4, 3, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]],
    8: [[4] * 8, [4] * 8],
}


def expert_point(top_k: int = 1, **changes: Any) -> analyze.ExpertPoint:
    loads = LOADS[top_k]
    rows = made_rows(loads, 4, top_k) + made_rows(loads[::-1], 4, top_k, when=AFTER)
    facts = {
        "label": f"cs top-{top_k} batch 1",
        "model": "mixtral",
        "device": "NVIDIA A40",
        "preset": "full",
        "weights": "checkpoint",
        "synthetic_probes": (),
        "loads": analyze.expert_tokens(as_table(rows)),
    }
    return analyze.ExpertPoint(**(facts | changes))


def test_the_papers_bars_stand_beneath_and_its_contradictions_in_the_footer() -> None:
    text = report.experts_text([expert_point(top_k=2)])
    lines = text.splitlines()
    ours = next(line for line in lines if line.startswith("cs top-2 batch 1"))
    assert ours.split()[4:9] == ["cs", "before", "0.625", "0.5", "0.25"]
    assert ours.split()[-3:] == ["e0", "4.00", "(0)"]
    papers_own = [line.split() for line in lines if line.startswith("A40 paper ")]
    assert papers_own[0][2:6] == ["cs", "before", "46.2", "50.5"]
    assert "48.6" in papers_own[0]
    joined = " ".join(lines)
    for words in ("labelled HE for cs", "cs 205.7", "cs before 55.5 (sample)", "population throughout", "that is e2"):
        assert words in joined
    assert report.NO_CONCLUSION not in joined
    assert "synthetic" not in joined


def test_random_weights_and_words_draw_no_conclusion() -> None:
    text = " ".join(report.experts_text([expert_point(weights="random", synthetic_probes=("cs",))]).split())
    assert "random weights: no conclusion about routing can be drawn" in text
    assert "cs: synthetic queries" in text
    assert "A40 paper" not in text  # it has no top-1


def test_dense_loads_are_even_and_said_to_be() -> None:
    text = report.experts_text([expert_point(top_k=8)])
    assert "even by definition" in text
    assert "A40 paper" not in text
    row = next(line for line in text.splitlines() if line.startswith("cs top-8"))
    assert row.split()[-3:] == ["-", "1.00", "(0)"]


def test_points_without_counts_have_no_block() -> None:
    empty = replace(expert_point(), loads=analyze.expert_tokens(as_table([])))
    assert report.experts_text([empty]) == ""
    assert report.experts_text([]) == ""
    assert report.expert_loads_frame([]).empty


def test_frames_for_machines_have_every_layer_and_the_papers_values_beside_the_mean() -> None:
    chosen = [expert_point(top_k=2), expert_point(top_k=8, synthetic_probes=("cs",))]
    loads, summary = report.expert_loads_frame(chosen), report.expert_summary_frame(chosen)
    assert len(loads) == 2 * 2 * 3 * 8
    assert len(summary) == 2 * 2 * 3
    assert summary["probe_data"].tolist() == ["file"] * 6 + ["synthetic"] * 6
    beside = summary.dropna(subset=["paper_a40_variance_population"])
    assert set(beside["layer"]) == {analyze.ALL_LAYERS}
    assert set(beside["top_k"]) == {2}
    assert beside["paper_a40_variance_population"].tolist() == pytest.approx([48.589893, 112.313888], abs=1e-5)
    bars = loads.dropna(subset=["paper_a40_tokens_per_query"])
    assert bars["paper_a40_tokens_per_query"].tolist()[:2] == [46.2043125, 50.46909375]
