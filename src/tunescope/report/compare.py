"""Two folders of points side by side: the ratio of each number with its interval, and a verdict in a word."""

import math
from typing import Any

import pandas as pd

from tunescope.report.figures.chart import HIGHER, Chart
from tunescope.report.figures.style import PAPER

FASTER, SLOWER, NOISE, NO_INTERVAL = "faster", "slower", "within noise", "no interval"
MORE, LESS = "more", "less"
_SPEED = ("figure08_throughput", "paths", "figure04_phases", "figure05_layers", "figure06_kernels")
COLUMNS = (
    "panel", "group", "series", "a", "a_low", "a_high", "b", "b_low", "b_high", "ratio", "ratio_low", "ratio_high",
    "verdict",
)  # fmt: skip


def ratio_interval(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
    """b over a, each (value, low, high) with a 95 % interval of its own, and the ratio's 95 % interval.

    The logarithms' distances to their limits add as squares (MOVER: Zou and Donner, Statistics in Medicine 27, 2008),
    as the two runs are independent. The single intervals are bootstraps over steps (analyze.intervals). NaN where a
    number is not positive; NaN limits where one has no interval.
    """
    if not all(value > 0 for value in (a[0], b[0])):
        return math.nan, math.nan, math.nan
    ratio = b[0] / a[0]
    if not all(limit > 0 and math.isfinite(limit) for limit in (*a[1:], *b[1:])):
        return ratio, math.nan, math.nan
    down = math.hypot(math.log(b[0] / b[1]), math.log(a[2] / a[0]))
    up = math.hypot(math.log(b[2] / b[0]), math.log(a[0] / a[1]))
    return ratio, ratio * math.exp(-down), ratio * math.exp(up)


def verdict(low: float, high: float, better: str, *, is_speed: bool = True) -> str:
    """Of a ratio b / a by its interval. better: chart.HIGHER or LOWER; is_speed: else in terms of more and less."""
    if math.isnan(low) or math.isnan(high):
        return NO_INTERVAL
    if low <= 1 <= high:
        return NOISE
    is_more = low > 1
    if not is_speed:
        return MORE if is_more else LESS
    return FASTER if is_more == (better == HIGHER) else SLOWER


def compare(a: Chart, b: Chart) -> pd.DataFrame:
    """Rows of both charts that are of the same bar, COLUMNS; of bars that only one has, the other's number is NaN.

    Of several points of one bar in a folder the first meets the first, the second the second.
    """
    rows = _numbered(a).merge(_numbered(b), how="outer", on=["key", "nth"], suffixes=("_a", "_b"), sort=False)
    order = {key: place for place, key in enumerate(dict.fromkeys([*a.frame["key"], *b.frame["key"]]))}
    rows = rows.iloc[rows["key"].map(order).argsort(kind="stable")]
    made: list[dict[str, Any]] = []
    is_speed = a.name in _SPEED
    for row in rows.to_dict("records"):
        named = "a" if isinstance(row["series_a"], str) else "b"
        if str(row[f"series_{named}"]).startswith(PAPER):
            continue
        both = [tuple(float(row[f"{name}_{side}"]) for name in ("value", "low", "high")) for side in ("a", "b")]
        if all(math.isnan(values[0]) for values in both):
            continue
        ratio, low, high = ratio_interval(both[0], both[1])  # type: ignore[arg-type]
        made.append(
            {name: row[f"{name}_{named}"] for name in ("panel", "group", "series")}
            | dict(zip(("a", "a_low", "a_high", "b", "b_low", "b_high"), (*both[0], *both[1]), strict=True))
            | {"ratio": ratio, "ratio_low": low, "ratio_high": high}
            | {"verdict": "only one" if math.isnan(ratio) else verdict(low, high, a.better, is_speed=is_speed)}
        )
    return pd.DataFrame(made, columns=list(COLUMNS))


def _numbered(chart: Chart) -> pd.DataFrame:
    frame = chart.frame[["key", "panel", "group", "series", "value", "low", "high"]]
    return frame.assign(nth=frame.groupby("key").cumcount())


def both(a: Chart, b: Chart, names: tuple[str, str]) -> Chart:
    """One chart with the panels of both, each named after its folder."""
    from dataclasses import replace

    frames = [
        chart.frame.assign(panel=[f"{name}: {panel}" for panel in chart.frame["panel"]])
        for name, chart in zip(names, (a, b), strict=True)
    ]
    merged: dict[str, Any] = dict(a.extra)
    if "ceilings" in merged:
        merged["ceilings"] = {
            f"{name}: {panel}": lines
            for name, chart in zip(names, (a, b), strict=True)
            for panel, lines in chart.extra["ceilings"].items()
        }
    whole = [frame for frame in frames if len(frame)]
    return replace(a, frame=pd.concat(whole, ignore_index=True) if whole else a.frame, extra=merged)
