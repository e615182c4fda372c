"""Padding of an epoch: exact against every possible shuffle, against simulation, and what must always hold."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, pairwise, permutations
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunescope.cost.lengths import Lengths, paper_lengths
from tunescope.cost.padding import BatchLengths, batch_lengths, pad_epoch, padded, simulate_epochs
from tunescope.errors import UserError

queries = st.lists(st.integers(1, 120), min_size=1, max_size=40)
multiples = st.sampled_from([1, 8, 64])


def made(per_query: Sequence[int]) -> Lengths:
    return Lengths.of_queries(per_query, "made")


@pytest.mark.parametrize("per_query", [[5, 8, 9, 17, 17, 40], [3, 3, 3], [1, 100], [64, 65, 1, 1, 1, 1, 7]])
@pytest.mark.parametrize("pad_multiple", [1, 8])
def test_a_batch_is_any_set_of_queries_equally_likely(per_query: list[int], pad_multiple: int) -> None:
    for size in range(1, len(per_query) + 1):
        longest = [ceil(max(chosen) / pad_multiple) * pad_multiple for chosen in combinations(per_query, size)]
        expected = {tokens: Fraction(count, len(longest)) for tokens, count in Counter(longest).items()}
        batch = batch_lengths(made(per_query), size, pad_multiple=pad_multiple)
        found = dict(zip(batch.padded_tokens.tolist(), batch.probability.tolist(), strict=True))
        assert {tokens: probability for tokens, probability in found.items() if probability} == pytest.approx(
            {tokens: float(frac) for tokens, frac in expected.items()}
        )
        assert batch.mean_tokens == pytest.approx(np.mean(longest))
        for frac in (0.1, 0.5, 0.9, 1.0):
            rank = ceil(Fraction(str(frac)) * len(longest))
            assert batch.quantile_tokens(frac) == sorted(longest)[rank - 1]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 6, 9])
def test_an_epoch_is_the_mean_over_all_shuffles(batch_size: int) -> None:
    per_query = [3, 9, 9, 24, 70]
    slots = []
    for order in permutations(per_query):
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        slots.append(sum(len(batch) * ceil(max(batch) / 8) * 8 for batch in batches))
        num_steps = len(batches)
    epoch = pad_epoch(made(per_query), batch_size)
    assert epoch.expected_slots == pytest.approx(np.mean(slots))
    assert epoch.num_steps == num_steps
    assert epoch.expected_slots_per_step == pytest.approx(np.mean(slots) / num_steps)
    assert epoch.padding_frac == pytest.approx(1 - sum(per_query) / np.mean(slots))
    assert epoch.largest_step_slots == min(batch_size, 5) * 72
    assert (epoch.last.batch_size if epoch.last else 0) == (5 % batch_size if batch_size < 5 else 0)


@pytest.mark.parametrize("dataset", ["cs", "math"])
@pytest.mark.parametrize("batch_size", [2, 7, 64, 1024])
def test_simulation_agrees_within_its_own_error(dataset: str, batch_size: int) -> None:
    num_epochs = 400
    lengths = paper_lengths(dataset).cut(1024)
    epoch = pad_epoch(lengths, batch_size)
    simulated = simulate_epochs(lengths, batch_size, num_epochs, np.random.default_rng(20240812))
    assert simulated.shape == (num_epochs, epoch.num_steps)
    sizes = np.full(epoch.num_steps, batch_size)
    if epoch.last:
        sizes[-1] = epoch.last.batch_size
    assert sizes.sum() == lengths.num_queries
    slots = simulated @ sizes
    assert abs(slots.mean() - epoch.expected_slots) < 4 * slots.std(ddof=1) / num_epochs**0.5
    usual = simulated[:, : lengths.num_queries // batch_size].ravel()
    within = np.array([(usual <= tokens).mean() for tokens in epoch.usual.padded_tokens])
    # Batches of one epoch repel each other a little, so that independent draws bound the error.
    assert np.abs(within - np.cumsum(epoch.usual.probability)).max() < 4 * 0.5 / len(usual) ** 0.5


@pytest.mark.parametrize(
    ("dataset", "batch_size", "num_steps", "mean_tokens", "padding_pct", "median_tokens"),
    [
        ("cs", 1, 15119, 103.46, 3.45, 80),
        ("cs", 8, 1890, 216.87, 53.94, 240),
        ("cs", 20, 756, 279.61, 64.28, 296),
        ("math", 4, 3481, 263.58, 28.97, 248),
        ("math", 10, 1393, 316.50, 40.84, 296),
    ],
)
def test_padding_of_the_papers_data(
    dataset: str, batch_size: int, num_steps: int, mean_tokens: float, padding_pct: float, median_tokens: int
) -> None:
    # The expected values come from whole numbers: ratios of binomial coefficients, summed as fractions.
    epoch = pad_epoch(paper_lengths(dataset).cut(1024), batch_size)
    assert epoch.num_steps == num_steps
    assert epoch.usual.mean_tokens == pytest.approx(mean_tokens, abs=0.005)
    assert 100 * epoch.padding_frac == pytest.approx(padding_pct, abs=0.005)
    assert epoch.usual.quantile_tokens(0.5) == median_tokens
    assert epoch.largest_step_slots == batch_size * (512 if dataset == "cs" else 1024)


@settings(deadline=None)
@given(queries, st.integers(1, 50), multiples)
def test_an_epoch_keeps_every_query_and_token_and_pads_no_less_than_none(
    per_query: list[int], batch_size: int, pad_multiple: int
) -> None:
    epoch = pad_epoch(made(per_query), batch_size, pad_multiple=pad_multiple)
    num_usual = epoch.num_steps - (epoch.last is not None)
    num_last = epoch.last.batch_size if epoch.last else 0
    assert num_usual * epoch.usual.batch_size + num_last == epoch.num_queries == len(per_query)
    assert epoch.num_steps == ceil(len(per_query) / batch_size)
    assert epoch.tokens == sum(per_query)
    assert epoch.tokens_per_step * epoch.num_steps == pytest.approx(sum(per_query))
    assert epoch.expected_slots >= epoch.tokens * (1 - 1e-12)
    assert epoch.expected_slots <= epoch.num_steps * epoch.largest_step_slots * (1 + 1e-12)
    assert -1e-12 <= epoch.padding_frac < 1
    for batch in filter(None, (epoch.usual, epoch.last)):
        assert batch.probability.sum() == pytest.approx(1, abs=1e-12)
        assert (batch.probability >= 0).all()
        assert (batch.padded_tokens % pad_multiple == 0).all()
        assert batch.longest_tokens - max(per_query) in range(pad_multiple)


@settings(deadline=None)
@given(queries, multiples)
def test_a_larger_batch_is_never_padded_less(per_query: list[int], pad_multiple: int) -> None:
    batches = [batch_lengths(made(per_query), size, pad_multiple=pad_multiple) for size in range(1, len(per_query) + 1)]
    means = [batch.mean_tokens for batch in batches]
    assert all(after >= before * (1 - 1e-12) for before, after in pairwise(means))
    assert means[0] == pytest.approx(padded(np.array(per_query), pad_multiple).mean())
    assert means[-1] == batches[-1].quantile_tokens(0) == batches[-1].longest_tokens  # all queries: nothing is random


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 120), st.integers(0, 60)), min_size=1, max_size=30), st.data())
def test_longer_queries_are_never_padded_to_less(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(1, len(pairs)))
    short = batch_lengths(made([length for length, _ in pairs]), batch_size)
    long = batch_lengths(made([length + more for length, more in pairs]), batch_size)
    assert long.mean_tokens >= short.mean_tokens * (1 - 1e-12)
    for frac in (0.05, 0.5, 0.95):
        # Where a quantile falls on a step, rounding may take either side: compare with a hair's room.
        assert long.quantile_tokens(frac + 1e-9) >= short.quantile_tokens(frac - 1e-9)


@pytest.mark.parametrize("length", [1, 8, 9, 1024])
@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_queries_of_one_length_leave_nothing_to_chance(length: int, batch_size: int) -> None:
    epoch = pad_epoch(made([length] * 10), batch_size)
    tokens = ceil(length / 8) * 8
    assert epoch.usual.padded_tokens.tolist() == [tokens]
    assert epoch.usual.probability.tolist() == [1.0]
    assert epoch.expected_slots == 10 * tokens
    assert epoch.padding_frac == pytest.approx(1 - length / tokens)


def test_one_long_query_lengthens_just_its_own_batch() -> None:
    epoch = pad_epoch(made([8] * 999 + [800]), 10)
    assert epoch.usual.probability.tolist() == pytest.approx([0.99, 0.01])
    assert epoch.expected_slots == pytest.approx(99 * 80 + 8000)
    assert epoch.largest_step_slots == 8000


def test_a_batch_of_thousands_is_as_exact() -> None:
    batch = batch_lengths(made([8] * 4999 + [800]), 2500)
    assert batch.probability.tolist() == pytest.approx([0.5, 0.5], rel=1e-11)
    all_of_them = batch_lengths(made(range(8, 8 * 3001, 8)), 3000)
    assert all_of_them.probability.tolist() == [0.0] * 2999 + [1.0]


def test_what_follows_from_a_length_is_averaged_over_batches() -> None:
    batch = BatchLengths(2, np.array([8, 16]), np.array([0.25, 0.75]))
    assert batch.mean_of(lambda tokens: tokens**2) == 0.25 * 64 + 0.75 * 256
    assert [batch.quantile_tokens(frac) for frac in (0, 0.25, 0.26, 1)] == [8, 8, 16, 16]


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(UserError, match="a batch of 0 queries"):
        pad_epoch(made([5]), 0)
    for size in (0, 3):
        with pytest.raises(ValueError, match="from 2 queries"):
            batch_lengths(made([5, 6]), size)
    with pytest.raises(ValueError, match="multiple of 0"):
        padded(np.array([5]), 0)
    with pytest.raises(ValueError, match="quantile"):
        batch_lengths(made([5]), 1).quantile_tokens(1.1)
