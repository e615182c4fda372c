"""Synthetic queries: the paper's lengths, exact to the token after the engine's own template."""

from pathlib import Path

import numpy as np
import pytest
from helpers_points import engine_queries, tiny_workload
from hypothesis import given, settings
from hypothesis import strategies as st

from tunescope import paper
from tunescope.config import Point
from tunescope.data import synthetic
from tunescope.errors import UserError
from tunescope.families.mixtral import MIXTRAL_TINY

MEDIANS = {"cs": 79, "math": 174}
TEMPLATE_TOKENS = 4  # <s> [INST] ... [/INST] ... </s>
CUTOFF_TOKENS = 1024

both = pytest.mark.parametrize("dataset", ["cs", "math"])


def tiny_point(dataset: str = "cs", seq_len_tokens: int | None = None) -> Point:
    return Point(
        model="mixtral",
        dataset=dataset,
        top_k=2,
        per_device_batch_size=1,
        seq_len_tokens=seq_len_tokens,
        preset="tiny",
        num_layers=2,
        total_layers=2,
    )


def paper_lengths(dataset: str) -> np.ndarray:
    return np.repeat(*paper.length_histogram(dataset))


def kolmogorov_distance(sample: np.ndarray, population: np.ndarray) -> float:
    at = np.arange(population.max() + 2)
    ours = np.searchsorted(np.sort(sample), at, side="right") / len(sample)
    papers = np.searchsorted(np.sort(population), at, side="right") / len(population)
    return float(np.abs(ours - papers).max())


# --- lengths ---


@both
@pytest.mark.parametrize("num_queries", [256, 1000])
def test_lengths_follow_the_papers_histogram(dataset: str, num_queries: int) -> None:
    """Stratified: no further from the histogram than one query, where a random sample would be at 1.36 / sqrt(n)."""
    sample = synthetic.sample_lengths(dataset, num_queries)
    assert len(sample) == num_queries
    assert kolmogorov_distance(sample, paper_lengths(dataset)) <= 1 / num_queries
    assert np.median(sample) == pytest.approx(MEDIANS[dataset], abs=1)
    assert sample.mean() == pytest.approx(paper_lengths(dataset).mean(), rel=0.01)
    assert sample.std() == pytest.approx(paper_lengths(dataset).std(), rel=0.06)


@both
def test_the_longest_and_shortest_queries_are_there(dataset: str) -> None:
    population = paper_lengths(dataset)
    sample = synthetic.sample_lengths(dataset, 1000)
    assert np.quantile(population, 0.999) <= sample.max() <= population.max()
    assert population.min() <= sample.min() <= np.quantile(population, 0.001)


@both
def test_order_is_random_and_the_same_each_time(dataset: str) -> None:
    """Sorted lengths would time short batches first; another order each time would not be the same point."""
    sample = synthetic.sample_lengths(dataset, 1000)
    assert (sample == synthetic.sample_lengths(dataset, 1000)).all()
    assert (sample != synthetic.sample_lengths(dataset, 1000, seed=1)).any()
    assert sorted(sample) == sorted(synthetic.sample_lengths(dataset, 1000, seed=1))
    halves = sample[:500].mean(), sample[500:].mean()
    assert halves[0] == pytest.approx(halves[1], rel=0.15)
    assert abs(np.corrcoef(sample[:-1], sample[1:])[0, 1]) < 0.1


@given(st.sampled_from(["cs", "math"]), st.integers(1, 2000), st.integers(0, 10))
@settings(deadline=None)
def test_every_length_is_one_the_paper_has(dataset: str, num_queries: int, seed: int) -> None:
    sample = synthetic.sample_lengths(dataset, num_queries, seed)
    assert len(sample) == num_queries
    assert set(sample.tolist()) <= set(paper.length_histogram(dataset)[0])


def test_no_lengths_for_another_data_set() -> None:
    with pytest.raises(KeyError):
        synthetic.sample_lengths("gs", 10)


# --- queries ---


@given(st.lists(st.integers(0, 1500), min_size=1, max_size=20), st.integers(0, 20), st.integers(1, 5))
@settings(deadline=None)
def test_every_query_has_its_words_in_prompt_and_answer(lengths: list[int], overhead: int, vocabulary: int) -> None:
    words = [f"w{number}" for number in range(vocabulary)]
    for length, query in zip(lengths, synthetic.queries(lengths, overhead, words), strict=True):
        prompt, answer = query["instruction"].split(" "), query["output"].split(" ")
        assert len(prompt) + len(answer) == max(length - overhead, synthetic.MIN_WORDS)
        assert set(prompt) | set(answer) <= set(words)
        assert query["input"] == ""


# --- through the engine ---


@both
def test_lengths_are_exact_in_the_engine(dataset: str, tmp_path: Path) -> None:
    """LLaMA-Factory's own template, tokenizer call and cutoff, on a model folder as the launcher makes it."""
    ids = engine_queries(tiny_workload(tiny_point(dataset), num_samples=1000), tmp_path)
    expected = np.minimum(synthetic.sample_lengths(dataset, 1000), CUTOFF_TOKENS)
    assert [len(row) for row in ids] == expected.tolist()


def test_no_id_is_unknown_or_beyond_the_vocabulary(tmp_path: Path) -> None:
    ids = engine_queries(tiny_workload(tiny_point("math")), tmp_path)
    unknown, bos, eos = 0, 1, 2
    every = np.concatenate([np.asarray(row) for row in ids])
    assert every.min() > unknown
    assert every.max() < MIXTRAL_TINY["vocab_size"]
    assert all(row[0] == bos and row[-1] == eos for row in ids)
    # Nor only a few words of it: experts would see the same tokens again and again.
    assert len(set(every.tolist())) > 0.9 * MIXTRAL_TINY["vocab_size"]


@pytest.mark.parametrize("seq_len_tokens", [TEMPLATE_TOKENS + 2, 64, 128, 1000, CUTOFF_TOKENS])
def test_a_fixed_length_is_exact_in_the_engine(seq_len_tokens: int, tmp_path: Path) -> None:
    ids = engine_queries(tiny_workload(tiny_point(seq_len_tokens=seq_len_tokens), num_samples=8), tmp_path)
    assert [len(row) for row in ids] == [seq_len_tokens] * 8


def test_a_fixed_length_too_short_for_the_template_is_refused(tmp_path: Path) -> None:
    """It used to be made longer without a word, and the row said 3 tokens."""
    with pytest.raises(UserError, match="length of 5 tokens"):
        engine_queries(tiny_workload(tiny_point(seq_len_tokens=5), num_samples=8), tmp_path)


def test_a_fixed_length_beyond_the_recipes_cutoff_is_run_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine cut `seq=2048` at the recipe's 1,024, and the row said 2,048."""
    from tunescope.gpus import GpuInventory
    from tunescope.measure import plan

    monkeypatch.setattr(plan, "list_gpus", GpuInventory)
    made = plan.make_plan(plan.Options(preset="tiny", points="cs:sparse:bs=1:seq=2048"))
    ids = engine_queries(made.specs[0].workload, tmp_path)
    assert {len(row) for row in ids} == {2048}


def test_the_template_takes_as_many_tokens_as_counted(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tunescope.models import folder
    from tunescope.train.engine import count_template_tokens

    folder.build_model_folder(tmp_path / "model", MIXTRAL_TINY, None, 1024)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert count_template_tokens(loaded, "mistral", "w0") == TEMPLATE_TOKENS
