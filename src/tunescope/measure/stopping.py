"""When a point has been measured long enough."""

from collections.abc import Sequence

import numpy as np

Z_95 = 1.959964


def interval_width_frac(num_queries: Sequence[int], durations_ns: Sequence[int]) -> float:
    """Width of the 95 % interval of queries/s = sum(queries) / sum(time), as a fraction of it.

    The large-sample (delta method) variance of a ratio of means over steps; needs at least two steps.
    """
    queries, times = np.asarray(num_queries, dtype=float), np.asarray(durations_ns, dtype=float)
    if len(times) < 2:
        return float("inf")
    rate = queries.sum() / times.sum()
    residual = queries - rate * times
    standard_error = residual.std(ddof=1) / (times.mean() * np.sqrt(len(times)))
    return float(2 * Z_95 * standard_error / rate)
