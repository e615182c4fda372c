"""The five findings at the top of the page, each computed from the points, or left out with the reason."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tunescope.cost.prices import Price
from tunescope.paper import latency as papers
from tunescope.report.compare import ratio_interval
from tunescope.report.figures import throughput as rates
from tunescope.report.figures.chart import has_papers_size, label, machine
from tunescope.report.page.collect import Collected
from tunescope.report.text import number, records

_MAX_MACHINES = 4  # said in words; tables have the others


@dataclass(frozen=True)
class Finding:
    """name: what is asked. sentences: the answer, one a model and machine; empty where `why_not` says why."""

    name: str
    sentences: tuple[str, ...]
    why_not: str = ""


def findings(found: Collected, prices: Sequence[Price] = ()) -> list[Finding]:
    """Always five, in this order."""
    return [
        _finding("How fast", _speed(found), "no throughput point is whole (run ./mixtral_tp.sh or ./mamba_tp.sh)"),
        _finding(
            "Sparse against dense",
            _sparsity(found),
            "no batch size was measured both sparse and dense (run ./mixtral_tp.sh or ./mamba_tp.sh)",
        ),
        _finding("The MoE layer's part", _moe(found), "no breakdown is whole (run ./mixtral_lt.sh or ./mamba_lt.sh)"),
        _finding("Waiting, and work done twice", _waiting(found), "no breakdown is whole (run ./mixtral_lt.sh)"),
        _finding("Energy and money", _cost(found, prices), "no point has energy or a priced GPU (both need a GPU)"),
    ]


def _finding(name: str, sentences: list[str], why_not: str) -> Finding:
    more = len(sentences) - _MAX_MACHINES
    shown = [*sentences[:_MAX_MACHINES], *([f"And {more} more, in the tables."] if more > 0 else [])]
    return Finding(name, tuple(shown), "" if sentences else why_not)


def _by_machine(rows: list[dict[str, Any]], say: Callable[[list[dict[str, Any]]], str]) -> list[str]:
    """What `say` makes of the rows of each model and machine, without empty answers."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(machine(row), []).append(row)
    said = ((name, say(group)) for name, group in groups.items())
    return [f"{name}: {words}" for name, words in said if words]


def _rates(found: Collected) -> list[dict[str, Any]]:
    if found.throughput is None:
        return []
    rows = []
    for row in rates.shown_rows(found.throughput):
        value, interval = rates.rate(row)
        if row["status"] == "ok" and pd.notna(value):
            rows.append(row | {"rate": float(value), "rate_low": interval[0], "rate_high": interval[1]})
    return rows


def _speed(found: Collected) -> list[str]:
    def say(rows: list[dict[str, Any]]) -> str:
        best = max(rows, key=lambda row: row["rate"])
        words = f"up to {number(best['rate'])} queries/s ({label(best)}, {rates.path_of(best)}"
        words += f", 95 % interval {number(best['rate_low'])} to {number(best['rate_high'])})"
        ratios = pd.Series([row["ratio_to_paper"] for row in rows], dtype=float).dropna()
        if ratios.empty:
            return words + "; nothing to compare with the paper's A40."
        if len(ratios) == 1:
            return words + f"; {number(ratios.iloc[0])} times the paper's A40 in the one bar that both have."
        return words + (
            f"; {number(ratios.min())} to {number(ratios.max())} times the paper's A40 over {len(ratios)} bars "
            f"(median {number(ratios.median())})."
        )

    return _by_machine(_rates(found), say)


def _sparsity(found: Collected) -> list[str]:
    def say(rows: list[dict[str, Any]]) -> str:
        names = ("dataset", "seq_len_tokens", "per_device_batch_size", "path", "sparsity")
        rows = [row | {"path": rates.path_of(row)} for row in rows]
        # NaN, which no key equals, is what stands for queries each of its own length.
        bars = {tuple(None if pd.isna(row[name]) else row[name] for name in names): row for row in rows}
        pairs = [
            (row, bars[(*bar[:4], "sparse")])
            for bar, row in bars.items()
            if bar[4] == "dense" and (*bar[:4], "sparse") in bars
        ]
        if not pairs:
            return ""
        dense, sparse = max(pairs, key=lambda pair: pair[0]["per_device_batch_size"])
        ratio, low, high = ratio_interval(_interval(dense), _interval(sparse))
        batch = f"{dense['per_device_batch_size']:g}"
        interval = "" if low != low else f" (95 % interval {number(low)} to {number(high)})"
        rate = f"sparse trains {number(ratio)} times as many queries/s as dense"
        return f"{rate} at batch {batch}{interval}, {dense['dataset']}, {dense['path']}."

    return _by_machine(_rates(found), say)


def _interval(row: dict[str, Any]) -> tuple[float, float, float]:
    return row["rate"], float(row["rate_low"]), float(row["rate_high"])


def _breakdowns(found: Collected) -> list[dict[str, Any]]:
    if found.latency is None:
        return []
    points = found.latency.points
    return records(points[points["status"] == "ok"])


def _moe(found: Collected) -> list[str]:
    def say(rows: list[dict[str, Any]]) -> str:
        shares = pd.Series([row.get("op_part_of_layers_frac") for row in rows], dtype=float).dropna()
        if shares.empty:
            return ""
        words = f"{number(100 * shares.mean())} % of the decoder layers' time is in {rows[0]['op_part']} "
        words += f"(mean of {len(shares)} points; {number(100 * shares.min())} to {number(100 * shares.max())})"
        if has_papers_size(rows[0]):
            words += f"; the paper's A40: {number(papers.moe_pct(rows[0]['model']))} %"
        return words + "."

    return _by_machine(_breakdowns(found), say)


def _waiting(found: Collected) -> list[str]:
    assert found.latency is not None or not _breakdowns(found)

    def say(rows: list[dict[str, Any]]) -> str:
        idle = pd.Series([row.get("idle_frac") for row in rows], dtype=float).dropna()
        if idle.empty:
            return ""
        device = "GPU" if rows[0]["clock"] == "cuda_event" else "CPU, outside of operators,"
        words = f"the {device} is idle {number(100 * idle.min())} to {number(100 * idle.max())} % of a step"
        shares = [share for row in rows if (share := _recompute_percent(found, row)) is not None]
        if shares:
            words += f"; recompute is {number(min(shares))} to {number(max(shares))} % of its work"
        return words + "."

    return _by_machine(_breakdowns(found), say)


def _recompute_percent(found: Collected, row: dict[str, Any]) -> float | None:
    assert found.latency is not None
    layers = found.latency.layers
    sums = layers[layers["folder"] == row["folder"]].groupby("phase")["busy_ns"].sum()
    return 100 * float(sums["recompute"] / sums.sum()) if "recompute" in sums and sums.sum() else None


def _cost(found: Collected, prices: Sequence[Price]) -> list[str]:
    if found.throughput is None:
        return []
    known = rates.price_of_rows(found.throughput, prices)

    def say(rows: list[dict[str, Any]]) -> str:
        words = []
        energies = [row for row in rows if pd.notna(row["gpu_energy_j_per_query"])]
        if energies:
            best = min(energies, key=lambda row: row["gpu_energy_j_per_query"])
            kj = best["gpu_energy_j_per_query"] * rates.QUERIES / 1e3
            words.append(f"1,000 queries take {number(kj)} kJ at the least ({label(best)})")
        price = known.get(str(rows[0]["device"]))
        if price is not None:
            fastest = max(rows, key=lambda row: row["rate"])
            usd = rates.usd_of_queries(price, fastest["rate"])
            words.append(f"{'and' if words else '1,000 queries cost'} {number(usd)} USD ({label(fastest)}; {price})")
        elif words:
            words.append(f"there is no price for {rows[0]['device']}")
        return ", ".join(words) + "." if words else ""

    return _by_machine(_rates(found), say)
