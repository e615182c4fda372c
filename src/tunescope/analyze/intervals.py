"""Confidence intervals over steps."""

from functools import cache

import numpy as np

NUM_RESAMPLES = 2000
SEED = 0


@cache
def _resample_counts(num_steps: int) -> np.ndarray:
    """How often each step is drawn in each resample, (NUM_RESAMPLES, num_steps).

    Depends on nothing but the number of steps, so that thousands of points share it and a table never changes
    between two readings.
    """
    rng = np.random.default_rng(SEED)
    return rng.multinomial(num_steps, np.full(num_steps, 1 / num_steps), size=NUM_RESAMPLES).astype(np.float64)


def bootstrap_ratio(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float, float]:
    """sum(numerators) / sum(denominators) over steps, with its 95 % bootstrap percentile interval (value, low, high).

    Both (num_steps,), denominators positive. Steps are taken as independent: slow drift of a GPU's clock within a
    run is not in the interval. One step gives an interval of zero width, which says nothing.
    """
    numerators, denominators = (
        np.asarray(numerators, dtype=float),
        np.asarray(denominators, dtype=float),
    )
    counts = _resample_counts(len(numerators))
    ratios = (counts @ numerators) / (counts @ denominators)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(numerators.sum() / denominators.sum()), float(low), float(high)
