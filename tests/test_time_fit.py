"""The hierarchical fit: its derivatives, what it finds in simulated steps, how often its intervals hold the truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tunescope.cost import time_fit
from tunescope.cost.time_fit import CODE, DEVICE, HOST, TERMS, Fit, Group

COSTS = np.array([30.0, 1.5, 1.8, 2.0, 5.0, 1.1, 5.0, 1.5])
P = 1.6


def simulated(
    rng: np.random.Generator, num_machines: int, points_each: int, scatter: float
) -> tuple[np.ndarray, np.ndarray, list[Group]]:
    """work (N, T), step_s (N,), groups: machines whose host, DRAM and products are faster or slower at random."""
    works, steps, groups = [], [], []
    for machine in range(num_machines):
        host, traffic, matmul = rng.normal(0, [0.2, 0.15, 0.15])
        factors = np.exp(np.array([host, traffic, matmul, traffic, traffic, traffic, 0, matmul]))
        for _ in range(points_each):
            slots = rng.uniform(0.1, 6)
            work = np.array([0.05, 0.3, 0.2 * slots, 0.1 * slots, 0.02 * slots, 0.03, 0.01, 0.1]) * rng.uniform(0.5, 2)
            seconds = work * COSTS * factors
            step_s = (seconds[0] ** P + seconds[1:].sum() ** P) ** (1 / P)
            works.append(work)
            steps.append(step_s * np.exp(rng.normal(0, scatter)))
            groups.append((f"host {machine}", f"GPU {machine}", "code"))
    return np.array(works), np.array(steps), groups


def fitted(work: np.ndarray, step_s: np.ndarray, groups: list[Group]) -> Fit:
    return time_fit.fit(work, step_s, groups, np.zeros(len(step_s)))


def test_derivatives_are_those_of_the_prediction() -> None:
    work, step_s, groups = simulated(np.random.default_rng(0), 3, 4, 0.05)
    fit = fitted(work, step_s, groups)
    design = time_fit._design(groups, fit.names, len(fit.mean))
    _, jacobian = time_fit._predict(fit.mean, work, design)
    for parameter in range(len(fit.mean)):
        change = np.zeros(len(fit.mean))
        change[parameter] = 1e-6
        above, below = (time_fit._predict(fit.mean + sign * change, work, design)[0] for sign in (1, -1))
        assert jacobian[:, parameter] == pytest.approx((above - below) / 2e-6, abs=1e-6)


def test_steps_of_known_machines_are_found_again() -> None:
    rng = np.random.default_rng(1)
    work, step_s, groups = simulated(rng, 5, 15, 0.02)
    fit = fitted(work[::2], step_s[::2], groups[::2])
    errors = [
        fit.forecast(each, group).median_s / seconds - 1
        for each, seconds, group in zip(work[1::2], step_s[1::2], groups[1::2], strict=True)
    ]
    assert np.median(np.abs(errors)) < 0.03
    assert np.abs(np.mean(errors)) < 0.02
    assert all(0.01 < scatter < 0.05 for scatter in fit.scatter.values())


@pytest.mark.parametrize("is_new", [False, True])
def test_ninety_percent_intervals_hold_the_truth_about_nine_times_in_ten(is_new: bool) -> None:
    """Of another point of a fitted machine, and of machines that were not fitted; one point each, so that hits are
    independent."""
    hits = 0
    num_trials = 150
    for seed in range(num_trials):
        work, step_s, groups = simulated(np.random.default_rng(seed + 1000), 6, 5, 0.05)
        held = len(step_s) - 1
        kept = [
            place for place in range(held) if not (is_new and groups[place] == groups[held])
        ]  # fmt: skip
        fit = fitted(work[kept], step_s[kept], [groups[place] for place in kept])
        found = fit.forecast(work[held], groups[held])
        hits += abs(np.log(step_s[held] / found.median_s)) <= found.log_half_width
    assert 0.82 <= hits / num_trials <= 0.985


def test_what_was_never_measured_has_a_wider_interval() -> None:
    work, step_s, groups = simulated(np.random.default_rng(2), 5, 10, 0.03)
    fit = fitted(work, step_s, groups)
    host, device, code = groups[0]
    known = fit.forecast(work[0], groups[0]).log_half_width
    for group in [("new", device, code), (host, "new", code), (host, device, "new")]:
        assert fit.forecast(work[0], group).log_half_width > known
    assert (
        fit.forecast(work[0], ("new", "new", "new")).log_half_width
        > fit.forecast(work[0], ("new", "new", code)).log_half_width
    )


def test_the_order_of_points_does_not_matter() -> None:
    work, step_s, groups = simulated(np.random.default_rng(3), 4, 8, 0.03)
    order = np.random.default_rng(7).permutation(len(step_s))
    one, other = fitted(work, step_s, groups), fitted(work[order], step_s[order], [groups[place] for place in order])
    assert one.names == other.names
    assert one.mean == pytest.approx(other.mean, abs=1e-9)
    assert one.scatter == pytest.approx(other.scatter)


def test_a_point_known_to_be_rough_counts_less() -> None:
    work, step_s, groups = simulated(np.random.default_rng(4), 4, 8, 0.02)
    wrong = step_s.copy()
    wrong[0] *= 1.5
    trusted = time_fit.fit(work, wrong, groups, np.zeros(len(wrong)))
    rough = time_fit.fit(work, wrong, groups, np.array([0.5] + [0.0] * (len(wrong) - 1)))
    truth = fitted(work, step_s, groups).forecast(work[1], groups[1]).median_s
    assert abs(rough.forecast(work[1], groups[1]).median_s / truth - 1) < abs(
        trusted.forecast(work[1], groups[1]).median_s / truth - 1
    )


@given(st.lists(st.floats(1e-4, 10), min_size=len(TERMS), max_size=len(TERMS)))
def test_a_step_is_between_the_longer_of_host_and_gpu_and_their_sum(seconds: list[float]) -> None:
    fit = _some_fit()
    found = fit.forecast(np.array(seconds), ("host 0", "GPU 0", "code"))
    host, gpu = found.terms_s[0], sum(found.terms_s[1:])
    assert max(host, gpu) * (1 - 1e-9) <= found.median_s <= (host + gpu) * (1 + 1e-9)
    assert sum(found.terms_s) + found.overlap_s == pytest.approx(found.median_s)
    assert found.overlap_s <= 1e-12


def _some_fit(cache: list[Fit] = []) -> Fit:  # noqa: B006
    if not cache:
        cache.append(fitted(*simulated(np.random.default_rng(5), 3, 6, 0.03)))
    return cache[0]


def test_effects_and_costs_are_named() -> None:
    fit = _some_fit()
    assert set(fit.costs) == set(TERMS)
    assert [len(next(iter(fit.effects(kind).values()))) for kind in (HOST, DEVICE, CODE)] == [1, 2, 3]
    assert set(fit.effects(DEVICE)) == {"GPU 0", "GPU 1", "GPU 2"}
    assert fit.overlap_exponent > 1


@pytest.mark.parametrize("freedom", [4, 5, 7, 12, 40])
def test_students_quantile(freedom: int) -> None:
    assert time_fit._t95(freedom) == pytest.approx(stats.t.ppf(0.95, freedom), rel=3e-3)
