"""Confidence intervals over steps."""

from collections.abc import Sequence
from functools import cache

import numpy as np

NUM_RESAMPLES = 2000
SEED = 0
_BLOCK_STEPS = 64
_CHUNK = 128  # pairs in one matrix product: fast, and a few MB


@cache
def _block_weights(block: int) -> np.ndarray:
    rng = np.random.default_rng([SEED, block])
    return rng.poisson(1.0, size=(_BLOCK_STEPS, NUM_RESAMPLES)).astype(np.float64)


def _weights(num_steps: int) -> np.ndarray:
    """How often each step is drawn in each resample, (num_steps, NUM_RESAMPLES).

    Poisson counts: unlike multinomial ones they do not depend on the number of steps, so that thousands of points of
    any length share one matrix (16 MB for 1,000 steps; a matrix for each of 200 lengths took 1.7 GB and 40 s). A ratio
    does not mind that the number of steps drawn varies. Depends on nothing but the seed: a table never changes between
    two readings.
    """
    blocks = [_block_weights(block) for block in range(-(-num_steps // _BLOCK_STEPS))]
    return np.concatenate(blocks)[:num_steps]


def bootstrap_ratios(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
) -> list[tuple[float, float, float]]:
    """For each (numerators, denominators): the ratio of their sums with its 95 % bootstrap interval (value, low, high).

    Both (num_steps,), denominators positive. Steps are taken as independent: slow drift of a GPU's clock within a
    run is not in the interval. One step gives an interval of zero width, which says nothing.
    """
    found = np.empty((len(pairs), 3))
    by_length = sorted(range(len(pairs)), key=lambda place: len(pairs[place][0]))
    for start in range(0, len(pairs), _CHUNK):
        chunk = by_length[start : start + _CHUNK]
        values = np.zeros((2, len(chunk), len(pairs[chunk[-1]][0])))  # the chunk's shorter ones end in zeros
        for row, place in enumerate(chunk):
            for side in (0, 1):
                values[side, row, : len(pairs[place][side])] = pairs[place][side]
        numerators, denominators = values @ _weights(values.shape[2])
        # Of the pair alone, so that no last digit depends on what else is in the table.
        ratio = np.array([np.sum(pairs[place][0]) / np.sum(pairs[place][1]) for place in chunk])
        drawn = np.repeat(ratio[:, None], NUM_RESAMPLES, axis=1)
        np.divide(numerators, denominators, out=drawn, where=denominators > 0)  # few steps: a resample may draw none
        found[chunk] = np.column_stack([ratio, *np.percentile(drawn, [2.5, 97.5], axis=1)])
    return [(value, low, high) for value, low, high in found.tolist()]


def bootstrap_ratio(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float, float]:
    """bootstrap_ratios of one pair."""
    return bootstrap_ratios([(np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float))])[0]
