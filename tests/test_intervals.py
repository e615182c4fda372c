"""The bootstrap interval of queries/s, and the stopping rule that guesses its width while a point runs."""

import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from tunescope.analyze.intervals import bootstrap_ratio, bootstrap_ratios
from tunescope.measure.stopping import interval_width_frac

QUERIES_PER_STEP = 4
MEAN_STEP_S = 3.0


def steps(rng: np.random.Generator, num_steps: int, noise_frac: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Queries and seconds of steps whose time varies as that of training steps does; always positive."""
    seconds = MEAN_STEP_S * rng.gamma(1 / noise_frac**2, noise_frac**2, num_steps)
    return np.full(num_steps, QUERIES_PER_STEP), seconds


positive_steps = st.lists(st.tuples(st.integers(1, 64), st.floats(1e-3, 100)), min_size=1, max_size=80)


@settings(max_examples=100, deadline=None)
@given(positive_steps)
def test_value_is_the_ratio_of_sums_and_lies_in_its_interval(made: list[tuple[int, float]]) -> None:
    queries, seconds = np.array([q for q, _ in made]), np.array([s for _, s in made])
    value, low, high = bootstrap_ratio(queries, seconds)
    assert value == pytest.approx(queries.sum() / seconds.sum(), rel=1e-12)
    assert low <= high
    # Every resample's ratio is a weighted mean of the steps' own, so the interval cannot leave their range.
    assert (queries / seconds).min() * (1 - 1e-9) <= low
    assert high <= (queries / seconds).max() * (1 + 1e-9)
    if len(made) >= 10 and (queries / seconds).std() < 0.5 * (queries / seconds).mean():
        assert low * (1 - 1e-9) <= value <= high * (1 + 1e-9)


def test_mean_of_the_rates_is_not_the_rate() -> None:
    """Two steps of one query in 1 s and in 3 s are 0.5 queries/s, not the mean of 1 and 1/3."""
    assert bootstrap_ratio(np.array([1, 1]), np.array([1.0, 3.0]))[0] == 0.5


def test_equal_steps_have_no_width() -> None:
    value, low, high = bootstrap_ratio(np.full(30, 8), np.full(30, 2.0))
    assert (value, low, high) == pytest.approx((4.0, 4.0, 4.0), rel=1e-12)


def test_one_step_has_no_width() -> None:
    assert bootstrap_ratio(np.array([3]), np.array([2.0])) == (1.5, 1.5, 1.5)


def test_interval_narrows_with_the_root_of_the_number_of_steps() -> None:
    def mean_width(num_steps: int) -> float:
        made = bootstrap_ratios([steps(np.random.default_rng(seed), num_steps) for seed in range(60)])
        return float(np.mean([high - low for _, low, high in made]))

    widths = [mean_width(num_steps) for num_steps in (25, 100, 400)]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.06)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.06)


@pytest.mark.parametrize("num_steps", [20, 60])
def test_interval_covers_the_truth_about_95_times_in_100(num_steps: int) -> None:
    """300 simulated points at the fewest steps the protocol allows and at a usual number; 3 sigma of 95 % is 3.8."""
    rng = np.random.default_rng(7)
    truth = QUERIES_PER_STEP / MEAN_STEP_S
    made = bootstrap_ratios([steps(rng, num_steps) for _ in range(300)])
    coverage = np.mean([low <= truth <= high for _, low, high in made])
    assert 0.905 <= coverage <= 0.985


def test_interval_covers_where_queries_vary_with_time() -> None:
    """Steps with a last, smaller batch: numerator and denominator go together."""
    rng = np.random.default_rng(8)
    covered = 0
    for _ in range(300):
        queries = rng.integers(1, 9, 40)
        seconds = queries * rng.gamma(50, 1 / 50, 40) + 0.5
        _, low, high = bootstrap_ratio(queries, seconds)
        covered += low <= 4.5 / 5.0 <= high
    assert 0.905 <= covered / 300 <= 0.985


def test_same_steps_give_the_same_interval_whatever_else_is_in_the_table() -> None:
    rng = np.random.default_rng(3)
    alone = steps(rng, 37)
    others = [steps(rng, number) for number in (1, 20, 64, 65, 300, 999)]
    assert bootstrap_ratio(*alone) == bootstrap_ratio(*alone)
    together = bootstrap_ratios([*others, alone, *others])
    assert together[len(others)] == pytest.approx(bootstrap_ratio(*alone), rel=1e-12)
    assert together[: len(others)] == together[len(others) + 1 :]
    assert together[len(others)][0] == bootstrap_ratio(*alone)[0]


def test_no_points_no_intervals() -> None:
    assert bootstrap_ratios([]) == []


@pytest.mark.parametrize("num_steps", [30, 200])
def test_agrees_with_scipy(num_steps: int) -> None:
    rng = np.random.default_rng(11)
    queries = rng.integers(1, 9, num_steps)
    seconds = queries * rng.gamma(25, 1 / 25, num_steps) + 1
    value, low, high = bootstrap_ratio(queries, seconds)
    reference = scipy.stats.bootstrap(
        (queries, seconds),
        lambda q, s, axis: q.sum(axis=axis) / s.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    # Poisson weights are wider than scipy's multinomial by about 1 / (2 n); 2,000 resamples scatter by 2 %.
    half = (reference.high - reference.low) / 2
    assert low == pytest.approx(reference.low, abs=0.08 * half)
    assert high == pytest.approx(reference.high, abs=0.08 * half)
    assert low < value < high


def test_a_thousand_points_take_well_under_a_second_each_hundred() -> None:
    rng = np.random.default_rng(2)
    made = [steps(rng, 20 + 5 * (number % 40)) for number in range(1000)]
    start_s = time.perf_counter()
    bootstrap_ratios(made)
    assert time.perf_counter() - start_s < 5


# --- the stopping rule ---


@pytest.mark.parametrize("num_steps", [25, 60, 200])
@pytest.mark.parametrize("noise_frac", [0.03, 0.3])
def test_stopping_rule_and_table_mean_the_same_interval(num_steps: int, noise_frac: float) -> None:
    rng = np.random.default_rng(5)
    ratios = []
    for _ in range(20):
        queries, seconds = steps(rng, num_steps, noise_frac)
        value, low, high = bootstrap_ratio(queries, seconds)
        rule = interval_width_frac(list(queries), [round(s * 1e9) for s in seconds])
        ratios.append((high - low) / value / rule)
    assert np.mean(ratios) == pytest.approx(1, abs=0.04)
    assert min(ratios) > 0.85
    assert max(ratios) < 1.15


def test_a_point_that_stopped_is_narrow_enough_in_the_table() -> None:
    """The rule stops at 0.9 of the 2 %: the interval that the table then shows is inside 2 %, nearly always."""
    from tunescope.config import Protocol
    from tunescope.measure.steps import STOP_MARGIN

    wanted = Protocol().interval_frac
    rng = np.random.default_rng(6)
    widths = []
    for _ in range(60):
        queries, seconds = steps(rng, 400, 0.05)
        for done in range(20, 400, 5):
            if interval_width_frac(queries[:done].tolist(), (seconds[:done] * 1e9).tolist()) < STOP_MARGIN * wanted:
                value, low, high = bootstrap_ratio(queries[:done], seconds[:done])
                widths.append((high - low) / value)
                break
    assert len(widths) == 60
    assert np.mean([width < wanted for width in widths]) > 0.9
    assert max(widths) < 1.1 * wanted


def test_too_few_steps_never_stop_a_point() -> None:
    assert interval_width_frac([1], [1]) == float("inf")
    assert interval_width_frac([], []) == float("inf")


@settings(deadline=None)
@given(positive_steps.filter(lambda made: len(made) > 1), st.floats(1e-3, 1e3))
def test_rule_has_no_unit(made: list[tuple[int, float]], factor: float) -> None:
    queries, seconds = [q for q, _ in made], np.array([s for _, s in made])
    width = interval_width_frac(queries, (seconds * 1e9).tolist())
    assert interval_width_frac(queries, (seconds * factor).tolist()) == pytest.approx(width, rel=1e-6, abs=1e-9)
