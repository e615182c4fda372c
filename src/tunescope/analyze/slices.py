"""Preset slice: the step time of the whole model from two depths that fit.

Every decoder layer does the same work, so step time is affine in depth: seconds(n) = outside + n * per_layer. Two
measured depths give the line; queries per step do not depend on depth.
"""

import math
from pathlib import Path

import pandas as pd

_SAME_BAR = [
    "model",
    "dataset",
    "top_k",
    "per_device_batch_size",
    "seq_len_tokens",
    "device",
    "weights",
    "data",
    "moe",
    # Anything else that both depths must share: a line through two recipes or two machines would look measured.
    "setup_hash",
]


def add_extrapolation(table: pd.DataFrame) -> pd.DataFrame:
    """Fills queries_per_s_all_layers and its interval in the deepest `slice` row of each bar that has two depths.

    The bar's other rows get is_shallow_end. Both depths are of one results folder.
    """
    table["is_shallow_end"] = False
    sliced = table[(table["preset"] == "slice") & (table["status"] == "ok")]
    results_folder = sliced["folder"].map(lambda folder: str(Path(folder).parent))
    for _, group in sliced.groupby([*(sliced[name] for name in _SAME_BAR), results_folder], dropna=False):
        by_depth = group.sort_values("num_layers")
        shallow, deep = by_depth.iloc[0], by_depth.iloc[-1]
        if shallow["num_layers"] == deep["num_layers"]:
            continue
        value, low, high = extrapolate(shallow, deep)
        columns = [
            "queries_per_s_all_layers",
            "queries_per_s_all_layers_low",
            "queries_per_s_all_layers_high",
        ]
        table.loc[by_depth.index[-1], columns] = [value, low, high]
        table.loc[by_depth.index[by_depth["num_layers"] < deep["num_layers"]], "is_shallow_end"] = True
    return table


def extrapolate(shallow: pd.Series, deep: pd.Series) -> tuple[float, float, float]:
    """Queries/s at total_layers with a 95 % interval, from two rows with num_layers, queries_per_s and its interval.

    Works on seconds per query, whose errors at the two depths are independent; half-widths add as squares.
    NaN for all three where the line reaches no positive time, for `high` where its interval includes none.
    """
    reach = (deep["total_layers"] - deep["num_layers"]) / (deep["num_layers"] - shallow["num_layers"])
    deep_s, shallow_s = 1 / deep["queries_per_s"], 1 / shallow["queries_per_s"]
    seconds = deep_s + reach * (deep_s - shallow_s)
    half = math.hypot((1 + reach) * _half_width_s(deep), reach * _half_width_s(shallow))
    if seconds <= 0:
        return math.nan, math.nan, math.nan
    return 1 / seconds, 1 / (seconds + half), 1 / (seconds - half) if seconds > half else math.nan


def _half_width_s(row: pd.Series) -> float:
    return (1 / row["queries_per_s_low"] - 1 / row["queries_per_s_high"]) / 2
